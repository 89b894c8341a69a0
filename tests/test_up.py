"""up: COUNT nodes that serve, whatever was there before and whatever went wrong; never one more."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import threading
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from botocore.exceptions import ClientError
from click.testing import CliRunner

import cluster
from tests.support import LIMIT, LocalCloud, Result, killed, make_node, wait_until

TYPE = "c1.xlarge"


def up(cloud: LocalCloud, count: int, group: str, *words: str, **options: Any) -> Result:
    """Run up."""
    return cloud.cluster("up", TYPE, str(count), group, *words, **options)


def assert_serving(cloud: LocalCloud, group: str, count: int) -> list[dict[str, Any]]:
    """See EC2 itself have COUNT nodes, and all of them linked to one head; return them."""
    assert len(cloud.truth(group)[0]) == count
    shown = [node for node in cloud.nodes(group) if node["state"] == "running"]
    assert sorted(node["role"] or "" for node in shown) == ["head", *["worker"] * (count - 1)]
    head = next(node for node in shown if node["role"] == "head")
    assert_last_line(cloud.cluster("start", group), head)
    return shown


def assert_last_line(done: Result, head: dict[str, Any]) -> None:
    """See a command succeed and name the head."""
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"Head node: {head['name']}"


def test_from_nothing_and_again(cloud: LocalCloud, group: str) -> None:
    made = up(cloud, 3, group)
    nodes = assert_serving(cloud, group, 3)
    head = next(node for node in nodes if node["role"] == "head")
    assert_last_line(made, head)
    for node in nodes:
        assert f"{node['name']}: has booted\n" in made.err
        assert f"{node['name']}: Mitsuba 0.6.0\n" in made.err
    assert made.out.count(": worker, 4 cores, started\n") == 2

    counts = cloud.calls(lambda: assert_last_line(up(cloud, 3, group), head))
    assert "RunInstances" not in counts

    fewer = up(cloud, 2, group)
    assert "has 3 nodes, more than 2: none is ended; none is created" in fewer.err
    assert_last_line(fewer, head)

    worker = next(node for node in nodes if node["role"] == "worker")
    cloud.client("ec2").terminate_instances(InstanceIds=[worker["id"]])
    mixed = cloud.cluster("up", "c5.xlarge", "3", group)
    assert_last_line(mixed, head)
    assert "2 nodes of another type (c1.xlarge)" in mixed.err
    assert_serving(cloud, group, 3)


def test_dry_run(cloud: LocalCloud, group: str) -> None:
    counts = cloud.calls(lambda: up(cloud, 2, group, "--dry-run"))
    assert not [name for name in counts if not name.startswith(("Describe", "Get"))]
    done = up(cloud, 2, group, "--dry-run")
    assert done.code == 0, done.err
    assert done.out.startswith("2 × c1.xlarge: $1.04 an hour"), done.err


def test_a_node_that_never_answers_and_one_whose_installation_fails(cloud: LocalCloud, group: str) -> None:
    with cloud.options(launch_faults=["", "sshd-silent", "install-fails", ""]):
        made = up(cloud, 4, group, "--idle-minutes", "9", limits={"BOOT_LIMIT": 15, "EXCHANGE_LIMIT": 5})
    assert made.code == 1
    assert made.out.splitlines()[-1].startswith("Head node: ")
    assert "the installation failed" in made.err
    assert re.search(r"port \d+ of .* does not answer", made.err), made.err
    assert "Error: 2 of 4 nodes serving; failed: " in made.last_line
    assert made.last_line.endswith(f"; ./cluster.py up c1.xlarge 4 {group} --idle-minutes 9 tries again")
    for node in cloud.nodes(group):
        cloud.fault("heal", node)
    again = up(cloud, 4, group)
    assert again.code == 0, again.err
    assert_serving(cloud, group, 4)


def test_two_at_once(cloud: LocalCloud, group: str) -> None:
    command = (sys.executable, "cluster.py", "up", TYPE, "2", group)
    first, second = cloud.start(*command), cloud.start(*command)
    for child in (first, second):
        child.communicate(timeout=LIMIT)
    wait_until(lambda: len(cloud.truth(group)[0]) == 2, what="the end of what is double")
    assert up(cloud, 2, group).code == 0
    assert_serving(cloud, group, 2)


@pytest.mark.parametrize("pattern", ["nodes launched", "has booted", "Mitsuba 0.6.0"])
def test_interrupted_and_run_again(cloud: LocalCloud, group: str, pattern: str) -> None:
    child = cloud.start(sys.executable, "cluster.py", "up", TYPE, "2", group)
    assert child.stderr
    while pattern not in (line := child.stderr.readline()):
        assert line
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 130, err
    assert f"./cluster.py up c1.xlarge 2 {group} goes on" in err
    assert up(cloud, 2, group).code == 0
    assert_serving(cloud, group, 2)


def test_the_board_fits_a_small_terminal(cloud: LocalCloud, group: str) -> None:
    terminal, theirs = pty.openpty()
    os.set_blocking(terminal, True)
    env = cloud.environment(COLUMNS="80", LINES="24", TERM="xterm")
    command = (sys.executable, "cluster.py", "up", TYPE, "8", group)
    with cloud.start(*command, env=env, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        seen = b""
        while block := read(terminal):
            seen += block
        assert child.wait(LIMIT) == 0, seen
    os.close(terminal)
    assert b": starting its server, " in seen
    assert re.search(rb"Up: 0/8 nodes, \d+s", seen)
    assert b"\x1b[8A\x1b[J" in seen  # nine lines, removed before others are drawn


@pytest.mark.parametrize("count", [1, 8, 40])
def test_the_boards_lines(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    now = datetime.now(timezone.utc)
    nodes = [cluster.Node(f"i-{i:02}", "g", TYPE, "pending", now, public_name=f"node-{i:02}") for i in range(count)]
    drawn: list[str] = []
    monkeypatch.setattr(cluster, "is_terminal", lambda: True)
    monkeypatch.setattr(cluster, "draw", lambda *lines: drawn.__setitem__(slice(None), lines))
    cluster.Board(nodes, str).step(nodes[0], "booting")
    *lines, whole = drawn
    assert len(lines) == min(count, 12)
    if count < 40:
        assert lines[-1].startswith("node-00: booting, ")  # waits for the least time
    more = ", 27 more waiting for its address, 1 more booting" if count > 12 else ""
    assert re.fullmatch(rf"Up: 0/{count} nodes?{more}, \d+s", whole)


def read(terminal: int) -> bytes:
    """Read from a terminal; its end is an error on Linux."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


CALLS = [("RunInstances", "kill-before"), ("RunInstances", "kill-after"), ("CreateTags", "kill-after")]


@pytest.mark.sweep
def test_killed_at_aws_calls(cloud: LocalCloud, request: pytest.FixtureRequest) -> None:
    """With --all-faults: after every call (so before the next), until up makes no more calls than that."""
    rules = [{"service": "ec2", "action": action, "kind": kind, "nth": 1} for action, kind in CALLS]
    if everything := request.config.getoption("--all-faults"):
        rules = [{"service": "*", "kind": "kill-after", "nth": call} for call in range(1, 200)]
    with cloud.options(pace="brief"):
        for number, rule in enumerate(rules):
            group = f"up-killed-{number}"
            done = killed(cloud, rule | {"signal": signal.SIGKILL}, "up", TYPE, "2", group)
            assert done.code in (0, -signal.SIGKILL)
            again = up(cloud, 2, group)
            assert again.code == 0, again.err
            assert_serving(cloud, group, 2)
            cloud.end(group)
            if everything and done.code == 0:
                assert number > 20, "up makes more calls than that: it was not killed"
                break


@pytest.mark.parametrize("fails", [False, True])
def test_nodes_are_counted_beside_their_work_and_a_poll_that_fails_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    begun, linked, node = threading.Event(), list[Any](), make_node("i-1", 1)

    def bring_up(*_: Any) -> tuple[Any, list[cluster.Outcome[Any]]]:
        begun.set()
        return SimpleNamespace(head=node), [cluster.Outcome(node)]

    def count_nodes(*_: Any) -> list[cluster.Node]:
        assert begun.wait(LIMIT), "the work waits for the count"
        if fails:
            raise ClientError({"Error": {"Code": "RequestLimitExceeded"}}, "DescribeInstances")
        return [node]

    monkeypatch.setattr(cluster, "plan_package", MagicMock())
    monkeypatch.setattr(cluster, "find_or_launch", lambda *_: ([node], "", "token"))
    monkeypatch.setattr(cluster, "bring_up", bring_up)
    monkeypatch.setattr(cluster, "count_nodes", count_nodes)
    monkeypatch.setattr(cluster, "poll_nodes", lambda *_: [node])
    monkeypatch.setattr(cluster, "is_ours", lambda *_: True)
    monkeypatch.setattr(cluster, "link_up", lambda *given: linked.append(given[-1]))
    done = CliRunner().invoke(cluster.up, [TYPE, "1"], obj=MagicMock(ours=list))
    assert done.exit_code == 0, done.output
    assert linked == [[cluster.Outcome(node)]]


def test_nothing_is_said_of_a_node_that_this_run_has_ended_again(capsys: pytest.CaptureFixture[str]) -> None:
    kept, ended = make_node("i-1", 1), make_node("i-2", 2)
    board = cluster.Board([kept, ended], lambda outcome: outcome.node.id, {ended.id})
    board.finished(cluster.Outcome(ended, error="EC2 ended it"))
    board.finished(cluster.Outcome(kept))
    out, err = capsys.readouterr()
    assert (out, err) == ("i-1\n", "")
    assert (board.done, board.total, board.steps) == (1, 1, {})
