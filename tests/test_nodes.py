"""What only real nodes prove: cloud-init, apt, systemd, security groups, the head guard, deadlines.

Several tests share a cluster; what one of them has spoilt is mended before the next, so that any of them can run alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.localcloud.places import CLIENT, HERE
from tests.support import LocalCloud, Result, reachable, ssh, wait_until

pytestmark = pytest.mark.xdist_group("nspawn")  # one cloud, one test after another

GROUP = "main"
RENDER = str(HERE / "mitsuba" / "mitsuba")
GUARD_LIMIT = 30  # seconds within which the head serves again by itself


class Cluster:
    """The cluster that the tests share."""

    def __init__(self, cloud: LocalCloud) -> None:
        self.cloud = cloud
        self.spoilt = False

    def tool(self, *words: str) -> Result:
        """Run the tool on the shared group and see it succeed."""
        done = self.cloud.cluster(*words)
        assert done.code == 0, done.err
        return done

    def nodes(self, role: str = "") -> list[dict[str, Any]]:
        """Return the running nodes (of a role), oldest first."""
        shown = [node for node in self.cloud.nodes(GROUP) if node["state"] == "running"]
        return [node for node in shown if node["role"] == role or not role]

    @property
    def head(self) -> dict[str, Any]:
        """The head node."""
        (head,) = self.nodes("head")
        return head

    def ssh(self, node: dict[str, Any], command: str) -> Result:
        """Run a command on a node, past the tool."""
        return ssh(self.cloud, node, command)

    def offered(self, host: str) -> int:
        """Return the cores that Mitsuba is offered at HOST; 0 where it does not serve."""
        done = self.cloud.run("timeout", "3", sys.executable, RENDER, "-c", host, "scene.xml")
        found = re.search(r": (\d+) cores", done.out)
        return int(found[1]) if found else 0

    def serves_again(self, cores: int) -> None:
        """See the head offer CORES, by itself, at the same address, in time."""
        head = self.head
        start = time.monotonic()
        wait_until(lambda: self.offered(head["public_name"]) == cores, GUARD_LIMIT, f"an offer of {cores} cores")
        assert time.monotonic() - start < GUARD_LIMIT

    @property
    def cores(self) -> int:
        """The cores that the head offers where all workers are linked."""
        return own_cores(len(self.nodes("worker")))

    def crash(self, *victims: dict[str, Any]) -> None:
        """Let nodes die, and wait until EC2 knows it."""
        for node in victims:
            self.cloud.fault("crash", node)
        dead = {node["id"] for node in victims}
        wait_until(lambda: not dead & {node["id"] for node in self.nodes()}, what="the end of the nodes")

    def pids(self) -> dict[str, str]:
        """Return each node's mtssrv process."""
        return {node["id"]: self.ssh(node, "systemctl show -P MainPID mtssrv").out for node in self.nodes()}


@pytest.fixture(scope="module")
def shared(nodes: LocalCloud) -> Iterator[Cluster]:
    """The cluster, as it was made."""
    made = Cluster(nodes)
    created = made.tool("createNodes", "c1.xlarge", "3", GROUP)
    assert created.err.splitlines()[-1].startswith("3 nodes ready.")
    assert made.tool("install", GROUP).out.count(": Mitsuba 0.6.0\n") == 3
    started = made.tool("start", GROUP)
    assert started.out.splitlines()[-1] == f"Head node: {made.head['public_name']}"
    yield made
    nodes.cluster("terminateAll", GROUP)


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """A cluster of three nodes or more that serve, all linked."""
    if shared.spoilt:
        shared.tool("up", "c1.xlarge", "3", GROUP)
        shared.spoilt = False
    return shared


@pytest.fixture
def victim(cluster: Cluster) -> Cluster:
    """The cluster for a test that spoils it."""
    cluster.spoilt = True
    return cluster


def own_cores(count: int) -> int:
    """Return what a head with COUNT workers offers on this machine, whose cores each node sees."""
    cores = len(os.sched_getaffinity(0))
    return count * cores + max(1, cores - 2)


def test_mitsuba_is_offered_all_cores_through_the_security_group(cluster: Cluster) -> None:
    assert cluster.head["public_name"].startswith("ec2-203-0-113-")
    assert cluster.offered(cluster.head["public_name"]) == cluster.cores


def test_the_server_is_a_hardened_unit_in_the_data_directory(cluster: Cluster) -> None:
    shown = cluster.ssh(
        cluster.head, "systemctl show mtssrv -P User -P WorkingDirectory -P NoNewPrivileges -P ProtectSystem -P Restart"
    )
    assert sorted(shown.out.split()) == ["/mnt", "always", "mitsuba", "strict", "yes"]  # in systemd's own order
    assert cluster.ssh(cluster.head, "stat -c '%U:%G %a' /mnt").out == "ubuntu:mitsuba 3775\n"
    assert "Listening on port 7554" in cluster.ssh(cluster.head, "sudo journalctl -u mtssrv -o cat").out


def digests(cluster: Cluster, pattern: str) -> list[set[str]]:
    """Return the SHA-256 of the data files that PATTERN matches, a set a node."""
    outputs = [cluster.ssh(node, f"cd /mnt && sha256sum {pattern}").out for node in cluster.nodes()]
    return [{line.split()[0] for line in output.splitlines()} for output in outputs]


def bytes_served(cloud: LocalCloud, work: Callable[[], Any]) -> int:
    """Return how many bytes S3 sent while WORK was done."""
    before = cloud.where.calls.read_text()
    work()
    lines = cloud.where.calls.read_text()[len(before) :].splitlines()
    return sum(int(found[1]) for line in lines if (found := re.search(r'"bytes": (\d+)', line)))


def test_data_reaches_every_node_byte_for_byte_and_only_once(cluster: Cluster, tmp_path: Path) -> None:
    big = tmp_path / "big.vol"
    big.write_bytes(os.urandom(1 << 20) * 256)
    folder = tmp_path / "smoke"
    folder.mkdir()
    for number in range(3):
        (folder / f"density {number}.vol").write_bytes(os.urandom(1 << 20))
    sync = lambda: (cluster.tool("syncData", str(big), GROUP), cluster.tool("syncData", str(folder), GROUP))  # noqa: E731
    count = len(cluster.nodes())
    assert bytes_served(cluster.cloud, sync) == count * (256 + 3) * (1 << 20)
    assert digests(cluster, "big.vol") == count * [{hashlib.sha256(big.read_bytes()).hexdigest()}]
    parts = {hashlib.sha256(part.read_bytes()).hexdigest() for part in folder.iterdir()}
    assert digests(cluster, "smoke/*.vol") == count * [parts]
    assert bytes_served(cluster.cloud, sync) == 0
    assert bytes_served(cluster.cloud, lambda: cluster.tool("syncData", "smoke/density", GROUP)) == 0


def test_a_second_start_changes_nothing(cluster: Cluster) -> None:
    before = cluster.pids()
    again = cluster.tool("start", GROUP)
    assert again.out.count("serves already") == len(before)
    assert cluster.pids() == before


def test_a_killed_server_comes_back(victim: Cluster) -> None:
    cluster = victim
    worker = cluster.nodes("worker")[0]
    pid = cluster.ssh(worker, "systemctl show -P MainPID mtssrv; sudo systemctl kill -s KILL mtssrv").out
    wait_until(lambda: cluster.ssh(worker, "systemctl show -P MainPID mtssrv").out not in (pid, "0\n"))
    head = cluster.head
    wait_until(lambda: cluster.offered(head["address"]), GUARD_LIMIT)


def test_a_frozen_worker_is_left_out(victim: Cluster) -> None:
    cluster, worker = victim, victim.nodes("worker")[0]
    rest = own_cores(len(cluster.nodes("worker")) - 1)
    cluster.cloud.fault("freeze", worker)
    try:
        cluster.serves_again(rest)
    finally:
        cluster.cloud.fault("thaw", worker)
    shown = wait_until(lambda: found_unlinked(cluster, worker["name"]))
    assert "up but not linked: run ./cluster.py start main" in shown


def found_unlinked(cluster: Cluster, name: str) -> str:
    """Return the line of `status --servers` for a node, once it answers."""
    lines = cluster.cloud.cluster("status", GROUP, "--servers").out.splitlines()
    return next((line for line in lines if line.startswith(f"{name}: up")), "")


def test_a_worker_that_drops_off_the_network_is_left_out(victim: Cluster) -> None:
    cluster, worker = victim, victim.nodes("worker")[0]
    rest = own_cores(len(cluster.nodes("worker")) - 1)
    cluster.cloud.fault("cut", worker)
    cluster.serves_again(rest)
    shown = cluster.tool("status", GROUP, "--servers").out
    assert f"{worker['name']}: frozen or cut off: no answer within 30 s" in shown
    cluster.tool("terminate", worker["id"])


def test_new_nodes_join_and_the_rest_stays(cluster: Cluster) -> None:
    head, before = cluster.head["id"], cluster.pids()
    worker = cluster.nodes("worker")[0]
    more = cluster.tool("createNodes", "c1.xlarge", "1", GROUP)
    assert f"has {len(before)} nodes already; adding 1 more" in more.err
    assert cluster.tool("install", GROUP).out.count(": Mitsuba 0.6.0\n") == len(before) + 1
    cluster.tool("start", GROUP)
    assert cluster.offered(cluster.head["address"]) == own_cores(len(before))
    assert cluster.head["id"] == head
    assert cluster.pids()[worker["id"]] == before[worker["id"]]


def test_a_terminated_worker_is_left_out(victim: Cluster) -> None:
    workers = victim.nodes("worker")
    victim.tool("terminate", workers[0]["id"])
    victim.serves_again(own_cores(len(workers) - 1))


def test_two_workers_that_die_at_once(victim: Cluster) -> None:
    workers = victim.nodes("worker")
    victim.crash(*workers[:2])
    victim.serves_again(own_cores(len(workers) - 2))


def test_a_head_that_reboots_serves_again(victim: Cluster) -> None:
    cluster, head, cores = victim, victim.head, victim.cores
    booted = cluster.ssh(head, "cat /proc/sys/kernel/random/boot_id; systemctl show -P MainPID mtssrv").out
    cluster.cloud.fault("reboot", head)
    wait_until(lambda: not cluster.offered(head["address"]))
    wait_until(lambda: cluster.offered(head["address"]) == cores, GUARD_LIMIT)
    assert cluster.ssh(head, "cat /proc/sys/kernel/random/boot_id; systemctl show -P MainPID mtssrv").out != booted
    assert "serves already" in cluster.tool("start", GROUP).out


def test_a_head_that_is_gone_for_good(victim: Cluster) -> None:
    cluster, head = victim, victim.head
    cluster.crash(head)
    gone = f"The head node is gone: ./cluster.py start {GROUP} makes another node the head\n"
    assert gone in cluster.tool("status", GROUP).out
    started = cluster.tool("start", GROUP)
    assert cluster.head["id"] != head["id"]
    assert started.out.splitlines()[-1] == f"Head node: {cluster.head['public_name']}"
    assert cluster.offered(cluster.head["address"]) == cluster.cores


def test_one_bad_node_does_not_stop_the_others(victim: Cluster) -> None:
    cluster, bad = victim, victim.nodes("worker")[0]
    others = len(cluster.nodes()) - 1
    spoil = "sudo rm /var/lib/mitsuba-cluster/installed && sudo sh -c 'echo \"#!/bin/false\" > /usr/bin/apt-get'"
    assert cluster.ssh(bad, spoil).code == 0
    done = cluster.cloud.cluster("install", GROUP)
    assert done.code == 1
    assert done.out.count(": Mitsuba 0.6.0\n") == others
    assert f"{bad['name']}: the installation failed" in done.err
    assert "the package lists could not be fetched" in done.err
    assert done.last_line == f"Error: Installed on {others} of {others + 1} nodes; failed: {bad['name']}"
    cluster.tool("terminate", bad["id"])


def test_terminate_all_leaves_nothing(victim: Cluster) -> None:
    cluster = victim
    ended = cluster.tool("terminateAll", GROUP)
    assert "security group removed: nothing of group 'main' is left in us-east-1." in ended.err
    assert cluster.cloud.truth(GROUP) == ([], 0)
    assert cluster.cloud.status(GROUP) == {}


@pytest.mark.parametrize("reboot", [False, True], ids=["", "after a reboot"])
def test_a_node_ends_itself_at_its_deadline(nodes: LocalCloud, reboot: bool) -> None:
    group = f"deadline{reboot}"
    made = nodes.cluster("createNodes", "c1.xlarge", "1", group, "--max-hours", "0.015" if reboot else "0.004")
    assert made.code == 0 or not reboot, made.err  # after 14 s a slow machine may still boot it
    if reboot:
        nodes.fault("reboot", nodes.nodes(group)[0])
    shown = wait_until(lambda: [n for n in nodes.nodes(group) if n["state"] == "terminated"], 90, "its own end")
    assert shown[0]["reason"] == "Client.InstanceInitiatedShutdown: Instance initiated shutdown"
    assert nodes.cluster("terminateAll", group).code == 0


def test_closed_server_port_tunnel_and_extended_deadline(nodes: LocalCloud) -> None:
    group, closed = "closed", {"PUBLIC_SERVER_PORT": False}
    for words in (("createNodes", "c1.xlarge", "1", group, "--max-hours", "1"), ("install", group), ("start", group)):
        done = nodes.cluster(*words, settings=closed)
        assert done.code == 0, done.err
    (node,) = nodes.nodes(group)
    assert reachable(nodes, CLIENT, node["address"], 22, 7554) == "22"

    env = nodes.environment(MITSUBA_CLUSTER_CONFIG=str(nodes.config(closed)))
    tunnel = nodes.start(sys.executable, "cluster.py", "tunnel", group, env=env)
    assert tunnel.stderr
    while "Forwarding to" not in (line := tunnel.stderr.readline()):
        assert line
    assert Cluster(nodes).offered("localhost") == own_cores(0)
    tunnel.send_signal(signal.SIGINT)
    tunnel.communicate(timeout=20)

    moved = nodes.cluster("extend", "1.5", group, settings=closed)
    assert moved.code == 0, moved.err
    (shown,) = nodes.nodes(group)
    assert shown["max_hours"] == 2.5
    timer = Cluster(nodes).ssh(node, "systemctl show -P NextElapseUSecRealtime mitsuba-deadline.timer").out
    launched = datetime.fromisoformat(shown["launched"].replace("Z", "+00:00"))
    ends = datetime.strptime(timer.strip(), "%a %Y-%m-%d %H:%M:%S UTC").replace(tzinfo=timezone.utc)
    assert timedelta(hours=2.5) <= ends - launched < timedelta(hours=2.5, minutes=2)
    assert nodes.cluster("terminateAll", group).code == 0


def test_a_reclaimed_spot_node(nodes: LocalCloud) -> None:
    group = "spot"
    for words in (
        ("addSpotNodes", "c1.xlarge", "1", "0.5", group),
        ("createNodes", "c1.xlarge", "1", group),
        ("install", group),
        ("start", group),
    ):
        done = nodes.cluster(*words)
        assert done.code == 0, done.err
    head, spot = nodes.nodes(group)  # the head comes first
    assert (spot["market"], spot["role"], head["market"], head["role"]) == ("spot", "worker", "on-demand", "head")
    nodes.ask("interrupt", {"node": spot["id"], "seconds": 1})
    made = Cluster(nodes)
    wait_until(lambda: made.offered(head["public_name"]) == own_cores(0), GUARD_LIMIT, "the head's new start")
    shown = wait_until(lambda: [node for node in nodes.nodes(group) if node["state"] == "terminated"])
    assert shown[0]["reason"] == "Server.SpotInstanceTermination: Spot instance termination"
    assert "Spot instance termination" in nodes.cluster("status", group).out
    assert nodes.cluster("terminateAll", group).code == 0
