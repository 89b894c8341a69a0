"""Nodes that end themselves, and nodes that come back: the guard on real nodes, its minutes shortened to seconds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import cluster
from tests.localcloud.places import HERE
from tests.support import LocalCloud, impatience, ssh, wait_until

pytestmark = pytest.mark.xdist_group("nspawn-faults")

QUICK: dict[str, float] = {
    "USE_LOOK": 2,
    "CLIENT_LOOK": 1,
    "JOIN_ANSWERS": 1,
    "JOIN_QUIET": 10,
    # A machine that stalls for seconds must not pass for a server that is gone.
    "GUARD_TIMEOUT": 10,
    "HEAD_ASKED": 4,
    "RESTART_LIMIT": 0,  # a node of this cloud boots within the time for which the head would wait for it
    "WATCH_SILENCE": 60,
    "LOGIN_BYTES": 10_000_000,  # in two seconds instead of sixty, on a busy machine: only that it is no use is tested
}
IDLE = 12  # seconds
PATIENCE = 180  # seconds for what takes a few looks, on a slow machine
GUARD = "/usr/local/lib/mitsuba-cluster/guard.py"
# Renders scenes one after the other, each for a connection of its own: HOST JOB COUNT.
MITSUBA = """
import json, socket, struct, sys, time
host, job, count = sys.argv[1:]
for _ in range(int(count)):
    try:
        with socket.create_connection((host, 7554), 60) as stream:
            stream.sendall(bytes.fromhex("1bcd302e362e30000300"))
            stream.recv(100)
            stream.sendall(b"\\0\\1" + struct.pack(">II", 0, len(job)) + job.encode())
            print("connected", flush=True)
            stream.settimeout(600)
            print("rendered" if stream.recv(6) else "lost", flush=True)
            stream.sendall(b"\\0\\x0c")
    except OSError:
        print("lost", flush=True)
    time.sleep(0.3)
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


def shorten(cloud: LocalCloud, *nodes: dict[str, Any], more: str = "true") -> None:
    """Give NODES a short idle limit, after a command of root's."""
    path = "/etc/mitsuba-cluster/idle-minutes"
    for node in nodes:
        done = ssh(cloud, node, f"sudo sh -c '{more}; echo {IDLE / 60} > {path}; systemctl restart mitsuba-guard'")
        assert done.code == 0, done.err


def ssh_bytes(cloud: LocalCloud, node: dict[str, Any]) -> dict[str, int]:
    """Return what each SSH connection to a node has moved."""
    return cluster.read_connections(ssh(cloud, node, "sudo ss -HtinpO state established").out)[1]


def test_a_forgotten_cluster_ends_but_not_under_a_client_nor_a_worker_before_its_head(nodes: LocalCloud) -> None:
    """Its client renders, with a long tail on one worker, then it sleeps."""
    group = "forgotten"
    head, *workers = serve(nodes, group, 3)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    shell = ["ssh", "-tt", "-q", "-i", str(nodes.where.root / "key.pem"), "-o", "StrictHostKeyChecking=no"]
    shell += ["-o", "UserKnownHostsFile=/dev/null", f"ubuntu@{workers[0]['address']}"]
    watches = [("systemLoad", "--watch"), ("status", "--watch"), ("tunnel",)]
    with contextlib.ExitStack() as forgotten:
        for words in [*((*words, group) for words in watches), ("logs", "-f", workers[0]["id"])]:
            forgotten.enter_context(running(nodes, sys.executable, "cluster.py", *words, **quiet))
        forgotten.enter_context(running(nodes, *shell, **quiet))
        client = forgotten.enter_context(
            running(nodes, sys.executable, "-c", MITSUBA, head["address"], '{"until": "go-on"}', "1")
        )
        assert client.stdout
        assert client.stdout.readline() == "connected\n"
        for node in (head, workers[0]):
            assert ssh(nodes, node, "touch /mnt/go-on").code == 0
        # What unattended-upgrades does: it computes, and holds dpkg's lock.
        nodes.fault("dpkg-locked", workers[0])
        upgrade = "while sleep 0.1; do sha512sum /usr/bin/python3 /usr/bin/python3; done"
        upgrade = f'systemd-run --quiet --unit apt-daily-upgrade sh -c "{upgrade}"'
        shorten(nodes, workers[0], more=upgrade)
        shorten(nodes, head, workers[1])
        wait_until(lambda: idle_seconds(nodes, workers[0]) > IDLE, PATIENCE, "a worker's idle time")
        wait_until(lambda: len(ssh_bytes(nodes, workers[0])) >= 4, PATIENCE, "the watches, the log and the shell")
        before, began = ssh_bytes(nodes, workers[0]), time.monotonic()
        for node in (head, *workers):
            wait_until(lambda node=node: idle_seconds(nodes, node) > 2 * IDLE, PATIENCE, f"idle time of {node}")  # type: ignore[misc]
        after, minutes = ssh_bytes(nodes, workers[0]), (time.monotonic() - began) / 60
        moved = {peer: (after[peer] - before[peer]) / minutes for peer in before.keys() & after.keys()}
        assert moved
        assert max(moved.values()) < cluster.LOGIN_BYTES, moved
        assert set(states(nodes, group).values()) == {"running"}
        assert "; client 192.0.2.10 for " in nodes.cluster("status", group, "--servers").out
        assert client.poll() is None

        shorten(nodes, head, more=f'sed -i "s/^CLIENT_SILENCE = .*/CLIENT_SILENCE = {IDLE}/" {GUARD}')
        wait_until(lambda: states(nodes, group)[head["id"]] == "terminated", PATIENCE, "the end of the head")
        wait_until(lambda: set(states(nodes, group).values()) == {"terminated"}, PATIENCE, "the end of the workers")
    assert nodes.cluster("terminateAll", group).code == 0


def test_workers_that_come_back_are_linked_and_end_when_their_head_is_frozen_or_cut_off(nodes: LocalCloud) -> None:
    group = "comes-back"
    head, worker, other = serve(nodes, group, 3)
    cores = len(os.sched_getaffinity(0))
    everything = f": {2 * cores + max(1, cores - 2)} cores"

    def offered() -> str:
        words = [sys.executable, str(HERE / "mitsuba" / "mitsuba"), "-c", head["address"], "scene.xml"]
        return nodes.run("timeout", "5", *words).out

    def linked() -> int:
        return journal(nodes, head).count(f"restarts mtssrv to link {worker['private_ip']}\n")

    wait_until(lambda: idle_seconds(nodes, worker) > IDLE / 2, PATIENCE, "a worker's idle time")
    rebooted = time.monotonic()
    nodes.fault("reboot", worker)
    # What asks the servers now and then, as from cron, is no client.
    ask = ("status", group, "--servers")
    wait_until(lambda: not nodes.cluster(*ask).code and linked() == 1, PATIENCE, "a restart to link it")
    idle = wait_until(lambda: idle_seconds(nodes, worker), PATIENCE, "the idle time after the boot")
    assert idle < time.monotonic() - rebooted
    shown = nodes.cluster("logs", head["id"]).out
    left_out = rf" mtssrv\[\d+\]: {worker['private_ip']} is left out: it does not answer: .*\n"
    assert re.search(rf"{left_out}(.*\n)+.* mitsuba-guard\[\d+\]: restarts mtssrv to link ", shown), shown
    wait_until(lambda: everything in offered(), PATIENCE, "an offer of all cores")

    short = json.dumps({"seconds": 0.3, "name": "a short render"})
    with running(nodes, sys.executable, "-c", MITSUBA, head["address"], short, "9999") as loop:
        lines = iter(loop.stdout or ())
        assert ssh(nodes, worker, "sudo systemctl stop mtssrv").code == 0
        while "lost" not in next(lines):
            pass
        while "rendered" not in next(lines):
            pass
        assert ssh(nodes, worker, "sudo systemctl start mtssrv").code == 0
        enough = time.monotonic() + 4 * QUICK["JOIN_ANSWERS"] + QUICK["JOIN_QUIET"] + 2
        while time.monotonic() < enough:
            assert "lost" not in next(lines)
        assert linked() == 1
    wait_until(lambda: linked() == 2, PATIENCE, "a restart once nobody renders")

    hasty = f'sed -i "s/^HEAD_ASKED = .*/HEAD_ASKED = 2/; s/^GUARD_TIMEOUT = .*/GUARD_TIMEOUT = 1/" {GUARD}'
    for fault, mend, node in (("freeze", "thaw", worker), ("cut", "plug", other)):
        nodes.fault(fault, head)
        shorten(nodes, node, more=hasty)
        wait_until(lambda node=node: states(nodes, group)[node["id"]] == "terminated", PATIENCE, f"the end of {node}")  # type: ignore[misc]
        nodes.fault(mend, head)
    assert set(states(nodes, group).values()) == {"running", "terminated"}
    assert nodes.cluster("terminateAll", group).code == 0
