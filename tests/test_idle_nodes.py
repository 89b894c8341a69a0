"""Nodes that end themselves, and nodes that come back: the guard on real nodes, its minutes shortened to seconds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.localcloud.places import HERE
from tests.support import LocalCloud, impatience, ssh, wait_until

pytestmark = pytest.mark.xdist_group("nspawn-faults")

QUICK: dict[str, float] = {
    "USE_LOOK": 2,
    "CLIENT_LOOK": 1,
    "JOIN_ANSWERS": 3,
    "JOIN_QUIET": 5,
    # A machine that stalls for seconds must not pass for a server that is gone.
    "GUARD_TIMEOUT": 10,
    "HEAD_ASKED": 4,
    "WATCH_SILENCE": 60,
    "LOGIN_BYTES": 10_000_000,  # in two seconds instead of sixty, on a busy machine: only that it is no use is tested
}
IDLE = 12  # seconds
PATIENCE = 180  # seconds for what takes a few looks, on a slow machine
SILENT_CLIENT = """
import socket, sys
stream = socket.create_connection((sys.argv[1], 7554), 60)
stream.sendall(bytes.fromhex("1bcd302e362e30000300"))
stream.recv(100)
print("connected", flush=True)
sys.stdin.read()
"""


def serve(cloud: LocalCloud, group: str, count: int) -> list[dict[str, Any]]:
    """Make a group that serves; return its nodes, the head first."""
    for words in (("createNodes", "c1.xlarge", str(count)), ("install",), ("start",)):
        done = cloud.cluster(*words, group, limits=QUICK)
        assert done.code == 0, done.err
    return sorted(cloud.nodes(group), key=lambda node: str(node["role"]))


@contextlib.contextmanager
def running(cloud: LocalCloud, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program for as long as the block takes."""
    child = cloud.start(*words, stdin=subprocess.PIPE, env=cloud.environment(**impatience(QUICK)), **options)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def idle_seconds(cloud: LocalCloud, node: dict[str, Any]) -> float:
    """Return for how long a node's guard takes it for idle."""
    done = ssh(cloud, node, "cat /run/mitsuba-cluster/state.json")
    return float(json.loads(done.out or '{"idle": 0}')["idle"])


def states(cloud: LocalCloud, group: str) -> dict[str, str]:
    """Return each node's state."""
    return {node["id"]: node["state"] for node in cloud.nodes(group)}


def journal(cloud: LocalCloud, node: dict[str, Any]) -> str:
    """Return what a node's guard has said."""
    return ssh(cloud, node, "sudo journalctl -u mitsuba-guard -o cat").out


def test_a_node_that_nobody_uses_ends_from_its_first_boot_on(nodes: LocalCloud) -> None:
    group = "unused"
    nodes.cluster("createNodes", "c1.xlarge", "1", group, "--idle-minutes", "0.4", limits=QUICK)
    wait_until(lambda: set(states(nodes, group).values()) == {"terminated"}, PATIENCE, "the node's own end")
    (node,) = nodes.nodes(group)
    assert node["reason"] == "Client.InstanceInitiatedShutdown: Instance initiated shutdown"
    assert nodes.cluster("terminateAll", group).code == 0


def test_a_forgotten_cluster_ends_but_not_under_a_client_nor_a_worker_before_its_head(nodes: LocalCloud) -> None:
    group = "forgotten"
    head, *workers = serve(nodes, group, 3)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    shell = ["ssh", "-tt", "-q", "-i", str(nodes.where.root / "key.pem"), "-o", "StrictHostKeyChecking=no"]
    shell += ["-o", "UserKnownHostsFile=/dev/null", f"ubuntu@{workers[0]['address']}"]
    with contextlib.ExitStack() as forgotten:
        forgotten.enter_context(running(nodes, sys.executable, "cluster.py", "systemLoad", "--watch", group, **quiet))
        forgotten.enter_context(running(nodes, sys.executable, "cluster.py", "tunnel", group, **quiet))
        forgotten.enter_context(running(nodes, *shell, **quiet))
        client = forgotten.enter_context(running(nodes, sys.executable, "-c", SILENT_CLIENT, head["address"]))
        assert client.stdout
        assert client.stdout.readline() == "connected\n"
        for node in (head, *workers):
            limit = (
                f"echo {IDLE / 60} | sudo tee /etc/mitsuba-cluster/idle-minutes; sudo systemctl restart mitsuba-guard"
            )
            assert ssh(nodes, node, limit).code == 0
        for node in (head, *workers):
            wait_until(lambda node=node: idle_seconds(nodes, node) > 3 * IDLE, PATIENCE, f"idle time of {node}")  # type: ignore[misc]
        assert set(states(nodes, group).values()) == {"running"}
        shown = nodes.cluster("status", group, "--servers").out
        assert "; client 192.0.2.10 for " in shown

        nodes.fault("freeze", head)
        ended = {head["id"]: "running"} | {node["id"]: "terminated" for node in workers}
        wait_until(lambda: states(nodes, group) == ended, PATIENCE, "the end of the workers, whose head is frozen")
        client.kill()
        nodes.fault("thaw", head)
        wait_until(lambda: set(states(nodes, group).values()) == {"terminated"}, PATIENCE, "the end of the head")
    assert nodes.cluster("terminateAll", group).code == 0


def test_a_worker_that_comes_back_is_linked_by_the_guard(nodes: LocalCloud) -> None:
    group = "comes-back"
    head, worker = serve(nodes, group, 2)
    cores = len(os.sched_getaffinity(0))

    def offered() -> str:
        words = [sys.executable, str(HERE / "mitsuba" / "mitsuba"), "-c", head["address"], "scene.xml"]
        return nodes.run("timeout", "5", *words).out

    alone, both = (f": {max(1, cores - 2) + more} cores" for more in (0, cores))
    assert both in offered()
    nodes.fault("reboot", worker)
    wait_until(lambda: f"to link {worker['private_ip']}" in journal(nodes, head), PATIENCE, "a restart to link it")
    wait_until(lambda: both in offered(), PATIENCE, "an offer of all cores")
    assert alone not in offered()
    assert nodes.cluster("terminateAll", group).code == 0
