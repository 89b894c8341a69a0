"""start: units and scripts, what it refuses and says, and the tunnel; on process nodes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster
from tests.scripts import find_scripts
from tests.support import LocalCloud, create, free_port, interrupt, make_node

GROUP = "servers"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    units = {name for name, text in vars(cluster).items() if isinstance(text, str) and "[Unit]" in text}
    assert units == {"GUARD_UNIT", "SERVER_UNIT"}
    place = {"address": "10.0.0.1", "port": 7554}
    worker = cluster.SERVER_UNIT.format(role="worker", data="/mnt", **place)
    head = worker + cluster.LINKS_UNIT.format(name="%H", cores=4, linked=cluster.LINKED_PATH, **place)
    for unit in (worker, head):
        (tmp_path / "mitsuba-guard.service").write_text(cluster.GUARD_UNIT)
        (tmp_path / "mtssrv.service").write_text(unit)
        files = sorted(map(str, tmp_path.iterdir()))
        done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_every_script_is_checked_and_can_be_pasted() -> None:
    scripts = find_scripts()
    assert {"FACTS", "INSTALL", "START_SERVER", "SERVER_LOG", "GUARD_BOOT", "BOOT"} <= scripts.keys()
    for name, text in scripts.items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert (name, done.stderr) == (name, "")


@pytest.fixture(scope="module")
def servers(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """A group of three nodes that serve."""
    for words in (("createNodes", "c1.xlarge", "3"), ("install",), ("start",)):
        done = cloud.cluster(*words, GROUP)
        assert done.code == 0, done.err
    yield cloud
    cloud.end(GROUP)


@pytest.fixture
def head(servers: LocalCloud) -> Iterator[dict[str, Any]]:
    """The head of three nodes that serve; mended afterwards."""
    (head,) = (node for node in servers.nodes(GROUP) if node["role"] == "head")
    yield head
    for node in servers.nodes(GROUP):
        servers.fault("client-goes", node)
        servers.fault("heal", node)
    done = servers.cluster("start", GROUP)
    assert done.code == 0, done.err


def worker_of(cloud: LocalCloud) -> dict[str, Any]:
    """Return one worker."""
    return next(node for node in cloud.nodes(GROUP) if node["role"] == "worker")


def test_the_client_that_moved_bytes_last_counts() -> None:
    """Two connections of one address, a silent one and one at work."""
    facts = cluster.Facts(4, role="head", clients={"203.0.113.9:2": (9000, 20), "203.0.113.9:1": (9000, 5000)})
    assert cluster.describe_client(facts, 600) == "client 203.0.113.9 (and 1 more), silent for 20s"
    assert cluster.describe_client(facts, 10) == cluster.describe_client(cluster.Facts(4, role="head")) == ""
    assert cluster.describe_client(replace(facts, role="worker")) == ""


@pytest.mark.parametrize(
    ("offered", "clients", "force", "restarted"),
    [(9, True, False, False), (9, True, True, True), (9, False, False, True), (None, True, False, True)],
    ids=["client", "force", "no client", "not answering"],
)
def test_a_head_is_asked_again_just_before_its_restart(
    monkeypatch: pytest.MonkeyPatch, offered: int | None, clients: bool, force: bool, restarted: bool
) -> None:
    """A client may have come since the first look; a linked worker that SSH can't reach is watched on."""

    def ask_server(*_: Any) -> int:
        if offered is None:
            raise cluster.NodeError("its mtssrv does not answer")
        return offered

    def restart_server(plan: Any, remote: Any, facts: Any, guard_plan: dict[str, Any], cores: int) -> int:
        given.append((set(guard_plan["workers"]), True))
        return cores

    def node(number: int) -> cluster.Node:
        when = datetime(2026, 1, 1, tzinfo=timezone.utc)
        return cluster.Node(f"i-{number}", "g", "c1.xlarge", "running", when, private_ip=f"10.0.0.{number}")

    looked = cluster.Facts(4, "0.6.0", "head", ("10.0.0.2", "10.0.0.3"))
    now = replace(looked, clients={"203.0.113.9:1": (60, 5)} if clients else {})
    given: list[tuple[set[str], bool]] = []
    monkeypatch.setattr(cluster, "ask_server", ask_server)
    monkeypatch.setattr(cluster, "restart_server", restart_server)
    monkeypatch.setattr(cluster, "fetch_facts", lambda remote: now)
    monkeypatch.setattr(cluster, "configure_node", lambda _, guard, plan: given.append((set(plan["workers"]), False)))
    served = cluster.Served(cluster.Facts(4, "0.6.0", "worker"), 4, "serves already")
    cut_off: Any = cluster.Outcome(node(3), error="port 22 does not answer")
    workers = [cluster.Outcome(node(2), served), cut_off, cluster.Outcome(node(4), served)]
    start = cluster.StartPlan(node(1), "/mnt", {}, "", force=force)
    remote: Any = SimpleNamespace(node=node(1))
    done = cluster.link_step(start, workers, {}, remote)
    if restarted:
        assert given == [({"10.0.0.2", "10.0.0.4"}, True)]
        assert done.client == ""
        assert done.action == ("restarted: a render that was running is lost" if clients else "restarted")
    else:
        assert given == [({"10.0.0.2", "10.0.0.3", "10.0.0.4"}, False)]
        assert done.client == "client 203.0.113.9, silent for 5s"


CLIENT = "client 203.0.113.9, silent for 5s"
WAITS, RESTART = f"1 node waits to be linked: {CLIENT}", f"the head waits to be restarted: {CLIENT}"
OTHERWISE = f"the nodes wait to be linked in another way: {CLIENT}"


@pytest.mark.parametrize(
    ("bad", "linked", "other_way", "client", "error"),
    [
        (
            True,
            ["10.0.0.2"],
            "",
            CLIENT,
            f"2 of 4 nodes serving; failed: g-4; {WAITS}; ./cluster.py start g --force links them now and ends that "
            "client, else they join when it leaves",
        ),
        (
            True,
            ["10.0.0.2"],
            CLIENT,
            CLIENT,
            f"2 of 4 nodes serving; failed: g-4; {OTHERWISE}; ./cluster.py start g --flat --force does that now and "
            "ends that client, else ./cluster.py start g --flat once it has left",
        ),
        (
            False,
            ["10.0.0.2", "10.0.0.3", "10.0.0.4"],
            "",
            CLIENT,
            f"{RESTART}; ./cluster.py start g --force does that now and ends that client, else ./cluster.py start g "
            "once it has left",
        ),
        (True, ["10.0.0.2", "10.0.0.3"], "", "", "3 of 4 nodes serving; failed: g-4"),
    ],
    ids=["one bad", "one bad, other levels", "head", "no client"],
)
def test_what_waits_is_told_beside_what_failed(
    monkeypatch: pytest.MonkeyPatch, bad: bool, linked: list[str], other_way: str, client: str, error: str
) -> None:
    def node(number: int) -> cluster.Node:
        when = datetime(2026, 1, 1, tzinfo=timezone.utc)
        return cluster.Node(
            f"i-{number}", "g", "c1.xlarge", "running", when, public_name=f"g-{number}", private_ip=f"10.0.0.{number}"
        )

    served = cluster.Served(cluster.Facts(4, "0.6.0", "worker"), 4, "serves already")
    workers = [cluster.Outcome(node(2), served), cluster.Outcome(node(3), served)]
    workers.append(cluster.Outcome[cluster.Served](node(4), error="…") if bad else cluster.Outcome(node(4), served))
    facts = cluster.Facts(4, "0.6.0", "head", tuple(linked))
    head = cluster.Outcome(node(1), cluster.Served(facts, 6, "serves already", client))
    for name in ("tag_nodes", "suggest_tree", "say_how_to_connect"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    monkeypatch.setattr(cluster, "link_branches", lambda *_: ({}, workers, other_way))
    app: Any = SimpleNamespace(ec2=None, pool=SimpleNamespace(each=lambda *_: [head]))
    plan = cluster.StartPlan(node(1), "/mnt", {}, "")
    with pytest.raises(cluster.ClusterError) as found:
        cluster.link_group(app, plan, cluster.Outcome(node(1), facts), workers)
    assert found.value.message == error


def test_start_before_install_says_so(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "2", group).code == 0
    done = cloud.cluster("start", group)
    assert done.code == 1
    assert done.last_line.startswith("Error: Mitsuba is not installed on ")
    assert done.last_line.endswith(f": ./cluster.py install {group} comes first")
    assert "terminate" not in done.err


def test_a_head_with_a_client_is_not_restarted(servers: LocalCloud, head: dict[str, Any]) -> None:
    servers.fault("server-greedy", worker_of(servers))
    left_out = servers.cluster("start", GROUP)
    assert left_out.code == 1
    assert f"{worker_of(servers)['name']}: its mtssrv announces 9000 cores, and the node has 8" in left_out.err
    assert "6 cores in all, restarted" in left_out.out
    servers.fault("heal", worker_of(servers))
    servers.fault("client-comes", head)

    refused = servers.cluster("start", GROUP)
    assert refused.code == 1
    assert refused.out.splitlines()[-1] == f"Head node: {head['name']}"
    assert refused.last_line == (
        "Error: 1 node waits to be linked: client 203.0.113.9 (and 1 more), silent for 1m; ./cluster.py start servers "
        "--force links them now and ends that client, else they join when it leaves"
    )
    shown = servers.cluster("status", GROUP, "--servers").out
    assert "client 203.0.113.9" in shown

    forced = servers.cluster("start", GROUP, "--force")
    assert forced.code == 0, forced.err
    assert "10 cores in all, restarted" in forced.out


def test_a_node_with_more_cores_than_its_type_serves(servers: LocalCloud, head: dict[str, Any]) -> None:
    worker = worker_of(servers)
    servers.fault("many-cores", worker)
    servers.fault("server-gone", worker)
    done = servers.cluster("start", GROUP)
    assert done.code == 0, done.err
    assert f"{worker['name']}: worker, 100 cores, started" in done.out
    assert "106 cores in all" in done.out


def test_an_sshd_that_forbids_forwarding(servers: LocalCloud, head: dict[str, Any]) -> None:
    worker = worker_of(servers)
    servers.fault("no-forwarding", worker)
    done = servers.cluster("start", GROUP)
    assert done.code == 1
    assert f"{worker['name']}: its sshd forbids forwarding (AllowTcpForwarding in /etc/ssh/sshd_config)" in done.err
    assert done.last_line == f"Error: 2 of 3 nodes serving; failed: {worker['name']}"


def test_another_build_is_started(servers: LocalCloud, tmp_path: Path) -> None:
    package = tmp_path / "mitsuba.deb"
    package.write_bytes(b"another build of the same version")
    started = servers.cluster("start", GROUP)
    assert (started.code, started.out.count("serves already")) == (0, 3), started.err
    installed = servers.cluster("install", GROUP, settings={"MITSUBA_PACKAGE": str(package)})
    assert installed.code == 0, installed.err
    for again, workers, head in ((0, ", started\n", ", restarted\n"), (1, ", serves already\n", ", serves already\n")):
        done = servers.cluster("start", GROUP)
        count = done.out.count(workers)
        assert done.code == 0, done.out + done.err
        assert count == 2 + again, done.out + done.err
        assert head in done.out


def test_a_linked_worker_is_not_restarted_under_a_client(servers: LocalCloud, head: dict[str, Any]) -> None:
    worker = worker_of(servers)
    servers.fault("client-comes", head)
    servers.fault("server-another", worker)
    refused = servers.cluster("start", GROUP)
    assert refused.code == 1
    assert f"{worker['name']}: its mtssrv needs a restart, which would end client 203.0.113.9" in refused.err


def test_terminate_spares_a_linked_node_only_while_a_client_is_at_work(cloud: LocalCloud, group: str) -> None:
    for words in (("createNodes", "c1.xlarge", "3"), ("install",), ("start",)):
        done = cloud.cluster(*words, group)
        assert done.code == 0, done.err
    head, worker, other = sorted(cloud.nodes(group), key=lambda node: str(node["role"]))
    cloud.fault("client-comes", head)
    refused = cloud.cluster("terminate", worker["id"])
    assert refused.code == 1
    assert refused.last_line == (
        "Error: client 203.0.113.9 (and 1 more), silent for 1m, would lose its render; "
        f"./cluster.py terminate {worker['id']} --force ends the node"
    )
    assert cloud.cluster("terminate", worker["id"], "--force").code == 0
    cloud.fault("sshd-silent", head)
    assert cloud.cluster("terminate", other["id"]).code == 0
    cloud.fault("heal", head)
    ended = cloud.cluster("terminateAll", group)
    assert ended.code == 0
    assert f"client 203.0.113.9 (and 1 more), silent for 1m, was connected to the head of group {group!r}" in ended.err


def test_a_dead_heads_connection_to_a_worker_is_no_client(cloud: LocalCloud, group: str) -> None:
    """Its guard still knows it for a while."""
    for words in (("createNodes", "c1.xlarge", "2"), ("install",), ("start",)):
        done = cloud.cluster(*words, group)
        assert done.code == 0, done.err
    head, worker = sorted(cloud.nodes(group), key=lambda node: str(node["role"]))
    cloud.fault("client-comes", worker)
    assert cloud.cluster("terminate", head["id"]).code == 0
    done = cloud.cluster("start", group)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{worker['name']}: head, 2 cores in all, started\n")


def test_tunnel_lets_any_number_of_connections_through(servers: LocalCloud) -> None:
    port = free_port()
    child = servers.start(sys.executable, "cluster.py", "tunnel", GROUP, "--port", str(port))
    assert child.stderr
    while "Forwarding to" not in (line := child.stderr.readline()):
        assert line

    def ask() -> int:
        open_stream = lambda limit: socket.create_connection(("127.0.0.1", port), limit)  # noqa: E731
        return cluster.handshake(open_stream, "0.6.0 3 0", 60)[0]

    assert [ask() for _ in range(10)] == 10 * [10]
    with ThreadPoolExecutor(50) as pool:
        assert [one.result() for one in [pool.submit(ask) for _ in range(50)]] == 50 * [10]
    done = interrupt(child)
    assert done.code == 130
    assert "Interrupted. The tunnel is closed." in done.err
    with pytest.raises(ConnectionRefusedError):
        ask()


def test_a_tunnel_that_breaks_says_so(servers: LocalCloud, head: dict[str, Any]) -> None:
    child = servers.start(sys.executable, "cluster.py", "tunnel", GROUP, "--port", str(free_port()))
    assert child.stderr
    while "Forwarding to" not in (line := child.stderr.readline()):
        assert line
    servers.fault("drop", head)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert f"Error: {head['name']}: ssh ended (exit code 255); run ./cluster.py tunnel servers again" in err


def test_plan_head_prefers_the_old_head_then_on_demand_then_age() -> None:
    spot, old, young = make_node("i-spot", 0, market="spot"), make_node("i-old", 1), make_node("i-young", 2)
    assert cluster.plan_head([young, spot, old]) is old
    assert cluster.plan_head([young, spot]) is young
    head = make_node("i-head", 9, market="spot", role="head")
    assert cluster.plan_head([old, head]) is head


@pytest.mark.parametrize(("own", "expected"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 6)])
def test_plan_head_cores(own: int, expected: int) -> None:
    assert cluster.plan_head_cores(own) == expected


def test_closed_port_means_tunnel(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    closed = {"PUBLIC_SERVER_PORT": False}
    for command in ("install", "start"):
        done = cloud.cluster(command, group, settings=closed)
        assert done.code == 0, done.err
    assert f"Port 7554 is closed. Run ./cluster.py tunnel {group}" in done.out
    found = cloud.client("ec2").describe_security_groups(Filters=[{"Name": "tag:mitsuba-group", "Values": [group]}])
    ports = {rule.get("FromPort") for rule in found["SecurityGroups"][0]["IpPermissions"] if rule["IpRanges"]}
    assert 7554 not in ports
