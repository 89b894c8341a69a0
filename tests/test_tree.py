"""A tree of heads: whom it links, how it heals on process nodes, and the same on seven real ones."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import cluster
from tests.localcloud.places import HERE
from tests.support import LocalCloud, Result, ssh, wait_until

SIZE = 7
LIMIT = 90  # seconds within which a head serves again by itself, on a slow machine
GOOD, RELAY, GONE = cluster.Answer(True), cluster.Answer(True, relays=True), cluster.Answer(False, "does not answer")


def make_nodes(count: int) -> list[cluster.Node]:
    """Return workers, one a minute, of which every third is a spot node."""
    begin = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return [
        cluster.Node(
            f"i-{number}",
            "g",
            "c1.xlarge",
            "running",
            begin + timedelta(minutes=number),
            private_ip=f"10.0.0.{number}",
            market="on-demand" if number % 3 else "spot",
        )
        for number in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("workers", "sizes"),
    [(0, []), (1, []), (3, []), (4, [1, 1]), (6, [2, 2]), (16, 4 * [3]), (17, [4, 3, 3, 3]), (64, 8 * [7])],
)
def test_branches_of_about_the_square_root(workers: int, sizes: list[int]) -> None:
    nodes = make_nodes(workers)
    branches = cluster.plan_branches(nodes[::-1])
    assert sorted(map(len, branches.values()), reverse=True) == sizes
    linked = Counter([*branches, *(one for branch in branches.values() for one in branch)])
    assert linked == Counter(node.private_ip for node in nodes if branches)
    first = [node.private_ip for node in nodes if node.market == "on-demand"]
    assert list(branches) == first[: len(sizes)]


@pytest.mark.parametrize(
    ("answers", "linked"),
    [
        ((RELAY, GOOD, GOOD, GOOD), "a d"),
        ((RELAY, GOOD, GONE, GOOD), "a d"),
        ((GONE, GOOD, GOOD, GOOD), "b c d"),
        ((GOOD, GOOD, GOOD, GOOD), "a b c d"),  # a sub-head that has rebooted: it is a worker now
        ((cluster.Answer(True, "announces 9000 cores"), GOOD, GONE, GOOD), "b d"),
    ],
    ids=["healthy", "a worker is gone", "a sub-head is gone", "rebooted", "greedy"],
)
def test_nobody_is_linked_twice_and_nobody_left_out(answers: tuple[cluster.Answer, ...], linked: str) -> None:
    plan = {"workers": dict.fromkeys("abcd", 8), "branches": {"a": ["b", "c"]}}
    assert cluster.pick_workers(plan, dict(zip("abcd", answers))) == linked.split()


def test_a_head_waits_for_a_sub_head_that_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses meanwhile; one that is cut off does not, and nobody waits for it."""
    refuses = GONE._replace(refuses=True)
    rounds = [{"a": refuses}, {"a": refuses}, {"a": RELAY}, {"a": RELAY, "b": GOOD}]
    plan = {"build": "0.6.0 3 0", "workers": {"a": 12, "b": 8}, "branches": {"a": ["b"]}}
    written: list[str] = []
    monkeypatch.setattr(cluster, "WATCH_PAUSE", 0)
    monkeypatch.setattr(cluster, "RELAY_LIMIT", 600)
    monkeypatch.setattr(cluster, "ask_all", lambda *_: rounds.pop(0))
    monkeypatch.setattr(cluster, "write_file", lambda _, text: written.append(text))
    cluster.filter_workers(plan)
    rounds = [{"a": GONE}, {"a": GONE, "b": GOOD}]
    cluster.filter_workers(plan)
    monkeypatch.setattr(cluster, "RELAY_LIMIT", 0)
    rounds = [{"a": refuses}, {"a": refuses, "b": GOOD}]
    cluster.filter_workers(plan)
    assert (written, rounds) == (["a\n", "b\n", "b\n"], [])


@pytest.mark.parametrize(
    ("role", "branches", "answers", "joining"),
    [
        ("head", {}, (GOOD, GOOD), {"a", "b"}),
        ("head", {"a": ["b"]}, (RELAY, GOOD), {"a"}),
        ("worker", {}, (GOOD, GOOD), set()),
    ],
    ids=["flat", "tree", "sub-head"],
)
def test_only_a_head_links_anew(
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    branches: dict[str, list[str]],
    answers: tuple[cluster.Answer, ...],
    joining: set[str],
) -> None:
    plan = {"role": role, "own": "o", "build": "0.6.0 3 0", "workers": {"a": 8, "b": 8}, "branches": branches}
    monkeypatch.setattr(cluster, "ask_all", lambda *_: dict(zip("oab", (GOOD, *answers))))
    monkeypatch.setattr(cluster, "read_file", lambda _: "")
    links = cluster.keep_serving(plan, cluster.Links())
    assert links.answering.keys() == joining


def test_start_names_a_tree_where_it_is_worth_it(capsys: pytest.CaptureFixture[str]) -> None:
    head = make_nodes(1)[0]
    kind = cluster.InstanceType(head.type, (), (), (), 8, True, False, gbits=1)
    start = cluster.StartPlan(head, "/mnt", {head.type: kind}, "")
    cluster.suggest_tree("g", start, 63)
    cluster.suggest_tree("g", start, 20)
    cluster.suggest_tree("g", start._replace(tree=True), 63)
    cluster.suggest_tree("g", start._replace(types={}), 63)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "A scene of 500 MB takes the head 4m to send to 63 workers at 1 Gbit/s, and in two levels about 1m: "
        "./cluster.py start g --tree"
    )


def offered(node: dict[str, Any]) -> int:
    """Return the cores that a process node's server announces; 0 where it does not answer."""
    try:
        return cluster.handshake(
            lambda limit: socket.create_connection((node["address"], 7554), limit), "0.6.0 3 0", 20
        )[0]
    except (OSError, EOFError):
        return 0


def links(shown: Result) -> Counter[str]:
    """Return how many workers each sub-head links, by what status shows."""
    return Counter(re.findall(r", linked to ([^;]+);", shown.out))


@pytest.fixture(scope="module")
def tree(cloud: LocalCloud) -> Iterator[str]:
    """A tree of seven process nodes: a head, two sub-heads, each with two workers."""
    group = "tree"
    for words in (("createNodes", "c1.xlarge", str(SIZE), group), ("install", group), ("start", group, "--tree")):
        done = cloud.cluster(*words)
        assert done.code == 0, done.err
    assert "head, 22 cores in all, started\n" in done.out
    assert done.out.count(": worker, 10 cores, with 2 workers of its own, started\n") == 2
    yield group
    cloud.end(group)


def test_a_tree_heals(cloud: LocalCloud, tree: str) -> None:
    (head,) = (node for node in cloud.nodes(tree) if node["role"] == "head")
    shown = cloud.cluster("status", tree, "--servers")
    assert sorted(links(shown).values()) == [2, 2]
    again = cloud.cluster("start", tree)
    assert (again.code, again.out.count("serves already")) == (0, SIZE + 2), again.out + again.err

    names = {node["name"]: node for node in cloud.nodes(tree)}
    sub = names[next(iter(links(shown)))]
    leaf = names[next(line.split(": ")[0] for line in shown.out.splitlines() if f"linked to {sub['name']}" in line)]
    cloud.fault("server-gone", leaf)
    assert (offered(head), offered(sub)) == (18, 6)
    mended = cloud.cluster("start", tree)
    assert "head, 22 cores in all, " in mended.out, mended.out + mended.err

    cloud.fault("server-gone", sub)
    assert offered(head) == 20  # its two workers are the head's own now
    mended = cloud.cluster("start", tree)
    assert "head, 22 cores in all, " in mended.out, mended.out + mended.err


def test_links_are_changed_under_no_client(cloud: LocalCloud, tree: str) -> None:
    (head,) = (node for node in cloud.nodes(tree) if node["role"] == "head")
    cloud.fault("client-comes", head)
    refused = cloud.cluster("start", tree, "--flat")
    assert (refused.code, offered(head)) == (1, 22)
    assert refused.last_line == (
        "Error: the nodes wait to be linked in another way: client 203.0.113.9 (and 1 more), silent for 1m; "
        "./cluster.py start tree --flat --force does that now and ends that client, else ./cluster.py start tree "
        "--flat once it has left"
    )
    forced = cloud.cluster("start", tree, "--flat", "--force")
    assert "head, 26 cores in all, restarted" in forced.out, forced.out + forced.err
    assert not links(cloud.cluster("status", tree, "--servers"))
    cloud.fault("client-goes", head)
    grown = cloud.cluster("up", "c1.xlarge", str(SIZE), tree, "--tree")
    assert "head, 22 cores in all, restarted" in grown.out, grown.out + grown.err
    assert all(node["tree"] for node in cloud.nodes(tree))


def own_cores(heads: int, workers: int) -> int:
    """Return what so many heads, of both kinds, and workers announce together on this machine."""
    cores = len(os.sched_getaffinity(0))
    return heads * max(1, cores - 2) + workers * cores


@pytest.mark.xdist_group("nspawn")
def test_seven_real_nodes(nodes: LocalCloud, tmp_path: Path) -> None:
    """All render; a worker dies and a sub-head dies, and the others stay; start puts all in order."""
    group, scene = "tree", tmp_path / "scene.xml"
    scene.write_text('<scene><float name="seconds" value="0.1"/></scene>')
    for words in (("createNodes", "c1.xlarge", str(SIZE), group), ("install", group), ("start", group, "--tree")):
        done = nodes.cluster(*words)
        assert done.code == 0, done.err
    by_name = {node["name"]: node for node in nodes.nodes(group)}
    (head,) = (node for node in by_name.values() if node["role"] == "head")

    def render() -> int:
        """Render on the head's nodes; return their cores, 0 where there is no picture."""
        words = ["timeout", "20", sys.executable, str(HERE / "mitsuba" / "mitsuba")]
        drawn = nodes.run(*words, "-c", head["public_name"], str(scene))
        found = re.search(r": (\d+) cores", drawn.out)
        return int(found[1]) if found and drawn.code == 0 else 0

    assert render() == own_cores(3, 4)
    shown = nodes.cluster("status", group, "--servers")
    first, second = links(shown)
    leaf = by_name[next(line.split(": ")[0] for line in shown.out.splitlines() if f"linked to {first}" in line)]
    # As a sub-head restarts, the head waits for it.
    assert nodes.cluster("terminate", leaf["id"]).code == 0
    wait_until(lambda: render() == own_cores(3, 3), LIMIT, "a render without the worker")
    linked = ssh(nodes, head, "cat /run/mitsuba-cluster/linked").out
    assert set(linked.split()) == {by_name[one]["private_ip"] for one in (first, second)}

    nodes.fault("crash", by_name[second])
    wait_until(lambda: render() == own_cores(2, 3), LIMIT, "a render without the sub-head")
    mended = nodes.cluster("start", group)
    assert mended.code == 0, mended.err
    assert render() == own_cores(3, 2)
    assert sorted(links(nodes.cluster("status", group, "--servers")).values()) == [1, 1]
    assert nodes.cluster("terminateAll", group).code == 0
