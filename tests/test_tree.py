"""A tree of heads: whom it links, how it heals on process nodes, and the same on seven real ones."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster
from tests.localcloud.places import HERE
from tests.support import LocalCloud, Result, ssh, wait_until

SIZE = 7
BUILD = "0.6.0 3 0"
LIMIT = 120  # seconds within which a head serves again by itself, on a slow machine
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
    monkeypatch.setattr(cluster, "RESTART_LIMIT", 0)  # of a mere worker
    monkeypatch.setattr(cluster, "ask_all", lambda *_: rounds.pop(0))
    monkeypatch.setattr(cluster, "write_file", lambda _, text: written.append(text))
    cluster.filter_workers(plan)
    rounds = [{"a": GONE}, {"a": GONE, "b": GOOD}]
    cluster.filter_workers(plan)
    monkeypatch.setattr(cluster, "RELAY_LIMIT", 0)
    rounds = [{"a": refuses}, {"a": refuses, "b": GOOD}]
    cluster.filter_workers(plan)
    assert (written, rounds) == (["a\n", "b\n", "b\n"], [])
    rounds = [{}, {}]
    lonely = {"role": "worker", "build": "0.6.0 3 0", "workers": {}, "branches": {}}
    cluster.filter_workers(lonely)  # a sub-head that lost all its workers
    assert (written[3:], rounds) == ([""], [])


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


class Linking:
    """Links branches of nodes that only pretend to be there, one after the other, and keeps what each is given."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        linked: dict[str, list[str]],
        client: bool = False,
        now: dict[str, list[str]] | None = None,
    ) -> None:
        """Let sub-heads be LINKED at the first look, and maybe otherwise NOW."""
        head, *workers = make_nodes(SIZE)
        self.rounds: list[list[str]] = []
        self.given: dict[str, tuple[list[str], bool]] = {}  # address -> (its plan's workers, whether it is restarted)
        clients = {"203.0.113.9:1": (60.0, 5.0)} if client else {}
        self.head = cluster.Facts(4, BUILD, "head", clients=clients)
        looked, asked = (
            {one.private_ip: self.facts(there, one) for one in workers} for there in (linked, now or linked)
        )
        asked[head.private_ip] = self.head
        outcomes = [
            cluster.Outcome(one, cluster.Served(looked[one.private_ip], self.cores(looked[one.private_ip]), "serves"))
            for one in workers
        ]
        monkeypatch.setattr(cluster, "fetch_facts", lambda remote: asked[remote.node.private_ip])
        monkeypatch.setattr(cluster, "ask_server", lambda remote, _: self.cores(asked[remote.node.private_ip]))
        monkeypatch.setattr(cluster, "configure_node", self.configure)
        monkeypatch.setattr(cluster, "restart_server", self.restart)
        app: Any = SimpleNamespace(pool=SimpleNamespace(each=self.each))
        plan = cluster.StartPlan(head, "/mnt", {}, "", tree=True)
        self.branches, self.outcomes, self.waits_for = cluster.link_branches(
            app, plan, cluster.Outcome(head, self.head), outcomes
        )
        self.lines = {one.node.private_ip: cluster.describe_server(one) for one in self.outcomes}

    @staticmethod
    def facts(linked: dict[str, list[str]], node: cluster.Node) -> cluster.Facts:
        """Return what a worker says of itself."""
        below = linked.get(node.private_ip)
        return cluster.Facts(4, BUILD, "worker", linked=tuple(below or ()), relays="" if below is None else "yes")

    @staticmethod
    def cores(facts: cluster.Facts) -> int:
        """Return what a node announces."""
        return 2 + 4 * len(facts.linked) if facts.relays else 4

    def each(self, nodes: list[cluster.Node], step: Any, progress: object = None) -> list[cluster.Outcome[Any]]:
        """Stand in for the pool."""
        self.rounds.append(sorted(node.private_ip for node in nodes))
        return [cluster.Outcome(node, step(SimpleNamespace(node=node))) for node in nodes]

    def configure(self, remote: Any, guard: str, plan: dict[str, Any]) -> None:
        """Note what a node is given."""
        self.given[remote.node.private_ip] = (sorted(plan["workers"]), False)

    def restart(self, start: Any, remote: Any, facts: Any, plan: dict[str, Any], cores: int | None) -> int:
        """Note what a node is given that is restarted."""
        self.given[remote.node.private_ip] = (sorted(plan["workers"]), True)
        return cores or 4


TWO, THREE, FOUR, FIVE, SIX, SEVEN = (f"10.0.0.{number}" for number in range(2, 8))
WANTED = {TWO: [FIVE, THREE], FOUR: [SEVEN, SIX]}


def test_a_former_sub_head_ends_its_links_before_others_link_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cores are its own again by then."""
    done = Linking(monkeypatch, {TWO: [FIVE], FOUR: [SEVEN], SIX: [THREE]})
    assert done.branches == WANTED
    assert done.rounds == [["10.0.0.1"], ["10.0.0.1"], [SIX], [TWO, FOUR]]
    assert done.given[SIX] == ([], True)
    assert done.given[FOUR] == ([SIX, SEVEN], True)
    assert done.lines[SIX].endswith(": worker, 4 cores, started")
    assert done.lines[FOUR].endswith(": worker, 10 cores, with 2 workers of its own, started")


@pytest.mark.parametrize("now", [[], [FIVE], [FIVE, THREE]])
def test_a_sub_head_is_asked_again_before_it_is_left_alone(monkeypatch: pytest.MonkeyPatch, now: list[str]) -> None:
    """Since the first look it may have lost a worker, or rebooted."""
    asked = {FOUR: WANTED[FOUR]} | ({TWO: now} if now else {})
    done = Linking(monkeypatch, WANTED, now=asked)
    assert done.given[TWO] == ([THREE, FIVE], len(now) < 2)
    assert done.given[FOUR] == ([SIX, SEVEN], False)


@pytest.mark.parametrize("same", [True, False])
def test_a_client_keeps_all_links(monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    """10.0.0.9 is a worker of a sub-head that SSH can't reach."""
    linked = WANTED if same else WANTED | {FOUR: [SEVEN, "10.0.0.9"]}
    done = Linking(monkeypatch, linked, client=True)
    assert done.given == {}
    assert done.branches == linked
    assert done.waits_for == ("" if same else "client 203.0.113.9, silent for 5s")


def test_the_guard_of_a_sub_head_that_serves_gets_its_plan_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its idle time begins anew, and it goes on watching those that it links; nothing is restarted."""
    node = make_nodes(2)[1]
    given: list[set[str]] = []
    facts = cluster.Facts(4, BUILD, "worker", linked=("10.0.0.5", "10.0.0.9"), relays="yes")
    monkeypatch.setattr(cluster, "fetch_facts", lambda _: facts)
    monkeypatch.setattr(cluster, "ask_server", lambda *_: 10)
    monkeypatch.setattr(cluster, "configure_node", lambda _, guard, plan: given.append(set(plan["workers"])))
    plan = cluster.StartPlan(node, "/mnt", {node.private_ip: 4}, "")
    remote: Any = SimpleNamespace(node=node)
    assert cluster.worker_step(plan, remote) == cluster.Served(facts, 10, "serves already")
    assert given == [{"10.0.0.5", "10.0.0.9"}]


def test_a_plan_of_any_size_reaches_its_node() -> None:
    """One of 4,095 nodes is longer than a command's argument may be."""
    given: list[tuple[str, list[bytes]]] = []
    remote: Any = SimpleNamespace(check=lambda line, stdin: given.append((line, stdin)))
    plan = {"role": "head", "workers": {f"172.31.{one // 256}.{one % 256}": 8 for one in range(4094)}}
    cluster.configure_node(remote, "program", plan, "unit")
    ((line, (sent,)),) = given
    assert len(line) < 10_000
    assert sent.count(b"\n") == 1
    assert json.loads(sent) == plan


def test_start_names_a_tree_where_it_is_worth_it(capsys: pytest.CaptureFixture[str]) -> None:
    head = make_nodes(1)[0]
    start = cluster.StartPlan(head, "/mnt", {}, "", gbits=1)
    cluster.suggest_tree(start, 63)
    cluster.suggest_tree(start, 20)
    cluster.suggest_tree(start._replace(tree=True), 63)
    cluster.suggest_tree(start._replace(gbits=0), 63)
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
    assert "free to relay, and so does each of 2 workers with workers of its own\n" in done.err
    yield group
    cloud.end(group)


def test_a_tree_heals(cloud: LocalCloud, tree: str) -> None:
    (head,) = (node for node in cloud.nodes(tree) if node["role"] == "head")
    shown = cloud.cluster("status", tree, "--servers")
    assert sorted(links(shown).values()) == [2, 2]
    again = cloud.cluster("start", tree)
    assert (again.code, again.out.count("serves already")) == (0, SIZE), again.out + again.err

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
    assert "head, 22 cores in all, " in grown.out, grown.out + grown.err  # it may have restarted by itself
    assert all(node["tree"] for node in cloud.nodes(tree))


def test_a_sub_head_without_workers_becomes_a_worker(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("up", "c1.xlarge", "5", group, "--tree").code == 0
    shown = cloud.cluster("status", group, "--servers")
    leaf = re.search(r"^([^:\s]+): .*, linked to ", shown.out, re.M)
    assert leaf
    gone = next(node for node in cloud.nodes(group) if node["name"] == leaf[1])
    assert cloud.cluster("terminate", gone["id"]).code == 0
    mended = cloud.cluster("start", group)
    assert "head, 14 cores in all, " in mended.out, mended.out + mended.err
    assert mended.out.count(": worker, 4 cores, started\n") == 2


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
        words = ["timeout", "60", sys.executable, str(HERE / "mitsuba" / "mitsuba")]
        drawn = nodes.run(*words, "-c", head["public_name"], str(scene))
        found = re.search(r": (\d+) cores", drawn.out)
        return int(found[1]) if found and drawn.code == 0 else 0

    assert render() == own_cores(3, 4)
    shown = nodes.cluster("status", group, "--servers")
    first, second = links(shown)
    pairs = re.findall(r"^([^:\s]+): .*, linked to ([^;]+);", shown.out, re.M)
    below = {one: {by_name[name]["private_ip"] for name, over in pairs if over == one} for one in (first, second)}

    def linked() -> set[str]:
        """Return whom the head links itself."""
        return set(ssh(nodes, head, "cat /run/mitsuba-cluster/linked").out.split())

    leaf = by_name[next(name for name, over in pairs if over == first)]
    # The head waits for the sub-head, which restarts; on a very slow machine it goes on with its workers meanwhile.
    assert nodes.cluster("terminate", leaf["id"]).code == 0
    wait_until(lambda: own_cores(2, 3) <= render() < own_cores(3, 4), LIMIT, "a render without the worker")
    assert by_name[second]["private_ip"] in linked()
    assert not below[second] & linked()

    nodes.fault("crash", by_name[second])
    wait_until(lambda: own_cores(1, 3) <= render() <= own_cores(2, 3), LIMIT, "a render without the sub-head")
    assert below[second] < linked()
    mended = nodes.cluster("start", group, "--force")  # the guard may still know a client that has left
    assert mended.code == 0, mended.err
    assert render() == own_cores(3, 2)
    shown = nodes.cluster("status", group, "--servers")
    assert sorted(links(shown).values()) == [1, 1]

    # With three workers there is no tree: one sub-head has no workers any more, and the other one more than it should.
    lost = re.search(r"^([^:\s]+): .*, linked to ", shown.out, re.M)
    assert lost
    assert nodes.cluster("terminate", by_name[lost[1]]["id"], "--force").code == 0
    mended = nodes.cluster("start", group, "--force")
    assert mended.code == 0, mended.err
    assert render() == own_cores(1, 3)
    assert nodes.cluster("terminateAll", group).code == 0
