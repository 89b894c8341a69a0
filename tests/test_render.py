"""render: the picture is there in the end, whole, whatever dies; with the stand-in Mitsuba, which dies as the real one.

Every fault comes in mid-render for certain: a scene waits for the file go-on, which a test makes when it has done
its worst.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cluster
from cluster import Attempt, Facts
from tests.localcloud.places import HERE
from tests.support import LIMIT, LocalCloud, Result, create, impatience, interrupt, make_node, wait_until

QUICK: dict[str, float] = {"RENDER_POLL": 0.5, "RENDER_SILENCE": 4, "HEAL_POLL": 0.5}
QUICK |= dict.fromkeys(("EXCHANGE_LIMIT", "SILENCE_LIMIT", "LIVENESS_LIMIT"), 10)  # for a node that is silent
WHOLE = "the whole picture of "
FACTS = {
    "head": Facts(4, "0.6.0", "head", ("10.0.0.2", "10.0.0.3"), boot="a", started="1"),
    "one": Facts(4, "0.6.0", "worker", boot="b", started="2"),
    "two": Facts(4, "0.6.0", "worker", boot="c", started="3"),
    "sub": Facts(4, "0.6.0", "worker", ("10.0.0.4", "10.0.0.5"), boot="d", started="4", relays="yes"),
}
BROKEN = 'WARN  net0_r [Thread] Fatal error: uncaught exception: "Connection closed while reading!"\n'
MISSING = 'WARN  con0 [StreamBackend] Uncaught exception "The file "a.vol" could not be found!" - cleaning up!\n'


@pytest.mark.parametrize(
    ("attempt", "changes", "server_error", "blame", "reason"),
    [
        (Attempt(255, BROKEN), {"one": "is terminated (Spot)"}, "", "cluster", "one is terminated (Spot)"),
        (Attempt(255, BROKEN), {"one": "does not answer"}, "an error", "cluster", "one does not answer"),
        (Attempt(255, BROKEN), {"two": {"boot": "new"}}, "", "cluster", "two has rebooted"),
        (Attempt(255, BROKEN), {"head": {"boot": "new", "started": "9"}}, "", "cluster", "head has rebooted"),
        (Attempt(-9, "", "head was silent for 1m"), {}, "", "cluster", "head was silent for 1m"),
        (Attempt(255, BROKEN), {}, "", "cluster", "the connection to the head broke"),
        (
            Attempt(255, BROKEN),
            {"head": {"started": "9", "linked": ("10.0.0.2",)}},
            "",
            "cluster",
            "head was restarted to link other workers",
        ),
        (Attempt(-9, BROKEN), {"head": {"started": "9"}}, "", "server", "mtssrv died on head"),
        (
            Attempt(255, BROKEN),
            {"head": {"started": "9", "linked": ("10.0.0.2",)}, "two": {"started": "9"}},
            "",
            "server",
            "mtssrv died on head, two",
        ),
        (
            Attempt(255, BROKEN),
            {"head": {"started": "9"}, "sub": {"started": "9", "linked": ("10.0.0.5",)}},
            "",
            "cluster",
            "sub was restarted to link other workers",
        ),
        (
            Attempt(255, BROKEN),
            {"head": {"started": "9"}, "sub": {"started": "9", "linked": ()}},
            "",
            "cluster",
            "sub was restarted to link other workers",
        ),
        (Attempt(255, BROKEN), {"head": {"started": "9"}, "sub": {"started": "9"}}, "", "server", "died on head, sub"),
        (Attempt(255, BROKEN), {"head": {"started": ""}}, "", "cluster", "the connection to the head broke"),
        (Attempt(255, BROKEN), {}, "mtssrv on one: no file", "server", "mtssrv on one: no file"),
        (Attempt(255, "Caught a critical exception: no plugin"), {}, "", "scene", "Mitsuba refuses it: no plugin"),
        (Attempt(255, "Caught a critical exception: Error in connect(): refused!"), {}, "", "cluster", "connection"),
        (Attempt(0, f'"a.xml" {cluster.UNFINISHED}!'), {}, "", "server", "no whole picture"),
        (Attempt(0, f'"a.xml" {cluster.UNFINISHED}, caught exception: bad film'), {}, "", "scene", "bad film"),
        (Attempt(-11, ""), {}, "", "server", "this machine's mitsuba was killed"),
    ],
)
def test_who_is_to_blame(attempt: Attempt, changes: dict[str, Any], server_error: str, blame: str, reason: str) -> None:
    after: dict[str, Facts | str] = {
        name: change if isinstance(change := changes.get(name, {}), str) else replace(facts, **change)
        for name, facts in FACTS.items()
    }
    found = cluster.judge(attempt, FACTS, after, server_error)
    assert found[0] == blame, found
    assert reason in found[1]


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("", ""),
        (BROKEN, ""),
        (MISSING, 'The file "a.vol" could not be found'),
        (MISSING + BROKEN, 'The file "a.vol" could not be found'),
        (
            "Caught a critical exception: Plugin \x1b[2J not found!\nbye",
            "Plugin \N{REPLACEMENT CHARACTER}[2J not found",
        ),
        ("2026 WARN con1 [SocketStream] [10.0.0.9] Error in recv(): Connection reset by peer!", ""),
    ],
)
def test_the_error_in_a_log(log: str, error: str) -> None:
    assert cluster.find_error(log) == error


class SlowPool:
    """The head answers, and does not know since when its server runs; after three answers Mitsuba may end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, 0

    def each(self, nodes: Sequence[cluster.Node], *_: Any, **__: Any) -> list[cluster.Outcome[Facts]]:
        """Answer."""
        self.asked += 1
        if self.asked == 3:
            (self.folder / "go-on").touch()
        lost = self.asked > 600  # Mitsuba hangs
        return [cluster.Outcome(node, Facts(4, started="2" if lost else "")) for node in nodes]


def test_a_render_outlives_its_reader_and_an_answer_that_lacks_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe takes is printed, to a terminal that has gone."""
    program = tmp_path / "mitsuba"
    program.write_text("#!/bin/sh\nuntil [ -e go-on ]; do sleep 0.1; done\nhead -c 300000 /dev/zero\nexit 7\n")
    program.chmod(0o755)

    def echo(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "RENDER_POLL", 0.1)
    monkeypatch.setattr("click.echo", echo)
    pool: Any = SlowPool(tmp_path)
    attempt = cluster.run_mitsuba(pool, [], make_node("i-1"), "1")
    assert (attempt.code, attempt.ended) == (7, "")


def write_scene(path: Path, **job: str | float) -> Path:
    """Write a scene for the stand-in Mitsuba; return its path."""
    elements = "".join(f'<string name="{name}" value="{value}"/>' for name, value in job.items())
    path.write_text(f'<scene version="0.6.0">{elements}</scene>')
    return path


def with_mitsuba(cloud: LocalCloud, **changes: str) -> dict[str, str]:
    """Return the environment of a user who has Mitsuba."""
    path = f"{HERE / 'mitsuba'}:{os.environ['PATH']}"
    return cloud.environment(PATH=path, **(impatience(QUICK) | changes))


def render(cloud: LocalCloud, *words: str | Path, **changes: str) -> Result:
    """Run render to its end."""
    return cloud.run(sys.executable, "cluster.py", "render", *map(str, words), env=with_mitsuba(cloud, **changes))


class Rendering:
    """A render that is under way."""

    def __init__(self, cloud: LocalCloud, log: Path, *words: str | Path, **changes: str) -> None:
        self.log = log
        with log.open("w") as file:
            command = (sys.executable, "cluster.py", "render", *map(str, words))
            self.child = cloud.start(*command, env=with_mitsuba(cloud, **changes), stderr=file)
        self.await_line(r"Rendering: \[")

    def await_line(self, pattern: str) -> None:
        """Wait until the render has said something."""
        wait_until(lambda: re.search(pattern, self.log.read_text()) or self.child.poll() is not None, LIMIT, pattern)
        assert re.search(pattern, self.log.read_text()), self.log.read_text()

    def end(self) -> Result:
        """Wait for its end."""
        out, _ = self.child.communicate(timeout=LIMIT)
        return Result(self.child.returncode, out, self.log.read_text())


@pytest.fixture(scope="module")
def farm(cloud: LocalCloud) -> Iterator[str]:
    """A group of three process nodes that serve."""
    yield from serving(cloud, "farm", 3)


def serving(cloud: LocalCloud, group: str, count: int) -> Iterator[str]:
    """Make a group that serves; end it afterwards."""
    for words in (("createNodes", "c1.xlarge", str(count)), ("install",), ("start",)):
        done = cloud.cluster(*words, group)
        assert done.code == 0, done.err
    yield group
    cloud.end(group)


def head_of(cloud: LocalCloud, group: str) -> dict[str, Any]:
    """Return a group's head node."""
    return next(node for node in cloud.nodes(group) if node["role"] == "head")


def running(cloud: LocalCloud, group: str) -> list[dict[str, Any]]:
    """Return the nodes of a group that run."""
    return [node for node in cloud.nodes(group) if node["state"] == "running"]


def go_on(cloud: LocalCloud, group: str, name: str = "go-on") -> None:
    """Let the scenes end that wait for the file NAME."""
    for node in running(cloud, group):
        (cloud.where.nodes / node["id"] / "mnt" / name).touch()


def test_pictures_beside_their_scenes(cloud: LocalCloud, farm: str, tmp_path: Path) -> None:
    names = ("a.0001", "a.0002")
    scenes = [write_scene(tmp_path / f"{name}.xml") for name in names]
    done = render(cloud, *scenes, "--group", farm, "--", "-p", "0", "-D", "x=1")
    assert (done.code, done.out.count(".exr: rendered in ")) == (0, 2), done.err
    assert "Connected to ip-" in done.err
    for name in names:
        assert (tmp_path / f"{name}.exr").read_text() == f"{WHOLE}{name}.xml"
    assert len(list(tmp_path.iterdir())) == 4

    more = write_scene(tmp_path / "b.xml")
    again = render(cloud, *scenes, more, "--group", farm, "--", "-x")
    assert (again.code, again.out.count(".exr: there already\n")) == (0, 2), again.err
    assert again.out.count(".exr: rendered in ") == 1


def test_a_named_picture_through_the_tunnel(cloud: LocalCloud, farm: str, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "a.xml")
    done = render(cloud, scene, "-o", tmp_path / "final.png", "--tunnel", "--group", farm)
    assert (done.code, (tmp_path / "final.exr").read_text()) == (0, f"{WHOLE}a.xml"), done.err


def test_usage(cloud: LocalCloud, tmp_path: Path) -> None:
    a, b = (write_scene(tmp_path / name) for name in ("a.xml", "b.xml"))
    for words in ((a, b, "-o", "x.exr"), (a, "--", "-o", "x.exr"), (tmp_path / "none.xml",), (), (a, b, a)):
        assert render(cloud, *words).code == 2
    option, group = render(cloud, "-p", "0", a).last_line, render(cloud, a, "default").last_line
    assert option.endswith("; Mitsuba's own options come after --: ./cluster.py render SCENE -- -p 0")
    assert group.endswith("'default' does not exist; a group's name comes after --group")


def test_what_is_found_out_beforehand(cloud: LocalCloud, farm: str, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "a.xml")
    other = render(cloud, scene, "--group", farm, MTSSRV_VERSION="0.5.0")
    assert (other.code, other.last_line) == (
        1,
        "Error: the mitsuba on this machine is 0.5.0, and the nodes' 0.6.0 will refuse it",
    )
    nobody = render(cloud, scene, "--group", "nobody")
    assert nobody.code == 1, nobody.err
    assert "no running nodes in group 'nobody'" in nobody.last_line
    none = cloud.cluster("render", str(scene), env={"PATH": str(tmp_path)})
    assert none.code == 1, none.err
    assert "there is no mitsuba" in none.last_line


def test_a_group_without_a_head_is_said_to_run_on(cloud: LocalCloud, group: str, tmp_path: Path) -> None:
    create(cloud, group, 1)
    headless = render(cloud, write_scene(tmp_path / "a.xml"), "--group", group, "--then-terminate")
    assert headless.code == 1, headless.err
    assert "has no head node" in headless.last_line
    assert "keep running and cost money" in headless.last_line
    assert len(cloud.truth(group)[0]) == 1


def test_a_file_that_the_nodes_lack_and_a_wrong_scene(cloud: LocalCloud, farm: str, tmp_path: Path) -> None:
    lacking = write_scene(tmp_path / "lacking.xml", data="no.vol")
    (tmp_path / "lacking.exr").write_text("the old picture")
    wrong = tmp_path / "wrong.xml"
    wrong.write_text("<scene")
    good = write_scene(tmp_path / "good.xml")
    done = render(cloud, lacking, wrong, good, "--group", farm, "--", "-r", "1")
    assert done.code == 1
    assert done.err.count("lacking.xml: rendering on") == 2
    assert done.err.count(': The file "no.vol" could not be found; ') == 2
    assert done.err.count("wrong.xml: rendering on") == 1
    assert "wrong.xml: 0s lost: Mitsuba refuses it: Error while loading" in done.err
    assert done.last_line == f"Error: 2 of 3 pictures missing: {lacking}, {wrong}"
    assert (tmp_path / "lacking.exr").read_text() == "the old picture"
    assert (tmp_path / "good.exr").read_text() == f"{WHOLE}good.xml"


def test_a_connection_that_breaks(cloud: LocalCloud, farm: str, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "a.xml", until="broken")
    child = Rendering(cloud, tmp_path / "log", scene, "--group", farm)
    cloud.fault("clients-cut", head_of(cloud, farm))
    child.await_line(r"lost: the connection to the head broke; trying again \(2 of 5\)")
    go_on(cloud, farm, "broken")
    done = child.end()
    assert (done.code, (tmp_path / "a.exr").read_text()) == (0, f"{WHOLE}a.xml"), done.err


def test_a_silent_head(cloud: LocalCloud, farm: str, tmp_path: Path) -> None:
    head = head_of(cloud, farm)
    scene = write_scene(tmp_path / "a.xml", until="silent")
    child = Rendering(cloud, tmp_path / "log", scene, "--group", farm)
    cloud.fault("sshd-silent", head)
    wait_until(lambda: not mitsubas(tmp_path), what="the end of the render that hangs")
    cloud.fault("heal", head)
    child.await_line(r"was silent for 4s; trying again")
    go_on(cloud, farm, "silent")
    done = child.end()
    assert (done.code, (tmp_path / "a.exr").read_text()) == (0, f"{WHOLE}a.xml"), done.err


def mitsubas(folder: Path) -> str:
    """Return the processes of the Mitsubas that render into FOLDER."""
    pattern = f"mitsuba -c [^ ]+ -o {folder}"
    return subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout


def test_ctrl_c_ends_only_the_render(cloud: LocalCloud, farm: str, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "a.xml", until="never")
    child = Rendering(cloud, tmp_path / "log", scene, "--group", farm, "--then-terminate")
    interrupt(child.child, signal.SIGINT)
    done = child.end()
    assert done.code == 130
    assert done.last_line.startswith("Interrupted. Only the render has ended. The nodes of group 'farm'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.xml", "log"]
    assert not mitsubas(tmp_path)
    assert [node["state"] for node in cloud.nodes(farm)] == ["running"] * 3


def test_when_no_node_is_left_new_ones_are_what_helps(cloud: LocalCloud, tmp_path: Path) -> None:
    for group in serving(cloud, "all-gone", 1):
        child = Rendering(cloud, tmp_path / "log", write_scene(tmp_path / "a.xml", until="never"), "--group", group)
        cloud.client("ec2").terminate_instances(InstanceIds=[node["id"] for node in cloud.nodes(group)])
        done = child.end()
        assert done.code == 1, done.err
        given_up = f"Given up: no head serves: no node is left; ./cluster.py up TYPE COUNT {group} makes new nodes"
        assert given_up in done.err, done.err


def test_tries_that_are_spent_and_the_end_of_the_group(cloud: LocalCloud, tmp_path: Path) -> None:
    for group in serving(cloud, "spent", 2):
        scene = write_scene(tmp_path / "a.xml", until="never")
        words = (scene, "--group", group, "--tries", "2", "--then-terminate")
        child = Rendering(cloud, tmp_path / "log", *words)
        worker = next(node for node in cloud.nodes(group) if node["role"] == "worker")
        cloud.client("ec2").terminate_instances(InstanceIds=[worker["id"]])
        child.await_line(rf"lost: {worker['name']} is (terminated|shutting-down).*; trying again \(2 of 2\)")
        child.await_line(r"(?s)trying again.*Rendering: \[")
        cloud.fault("clients-cut", head_of(cloud, group))
        done = child.end()
        assert done.code == 1, done.err
        assert "the connection to the head broke; given up" in done.err
        assert "security group removed: nothing of group 'spent' is left in us-east-1. They cost $" in done.err
        assert done.last_line == f"Error: 1 of 1 pictures missing: {scene}"
        assert cloud.status(group) == {}


def test_the_group_ends_whatever_the_error(cloud: LocalCloud, tmp_path: Path) -> None:
    for group in serving(cloud, "refused", 1):
        words = (write_scene(tmp_path / "a.xml"), "--group", group, "--then-terminate")
        done = render(cloud, *words, MTSSRV_VERSION="0.5.0")
        assert done.code == 1, done.err
        assert "nothing of group 'refused' is left" in done.err
        assert "will refuse it" in done.last_line
        assert cloud.status(group) == {}


def test_a_head_that_is_gone_for_good(cloud: LocalCloud, tmp_path: Path) -> None:
    for group in serving(cloud, "headless", 2):
        scene = write_scene(tmp_path / "a.xml", until="go-on")
        child = Rendering(cloud, tmp_path / "log", scene, "--group", group, "--then-terminate")
        head = head_of(cloud, group)
        cloud.client("ec2").terminate_instances(InstanceIds=[head["id"]])
        child.await_line(rf"lost: {head['name']} is (terminated|shutting-down).*; trying again")
        go_on(cloud, group)
        done = child.end()
        assert (done.code, (tmp_path / "a.exr").read_text()) == (0, f"{WHOLE}a.xml"), done.err
        assert "The head node is gone: another node becomes the head\n" in done.err
        assert "nothing of group 'headless' is left" in done.err


def test_a_head_that_stays_frozen(cloud: LocalCloud, tmp_path: Path) -> None:
    limits = QUICK | {"FROZEN_LIMIT": 1, "LOOK_LIMIT": 5, "EXCHANGE_LIMIT": 5}
    for group in serving(cloud, "frozen", 2):
        scene = write_scene(tmp_path / "a.xml", until="go-on")
        child = Rendering(cloud, tmp_path / "log", scene, "--group", group, **impatience(limits))
        head = head_of(cloud, group)
        cloud.fault("sshd-silent", head)
        child.await_line(r"lost: .*; trying again")
        go_on(cloud, group)
        done = child.end()
        assert (done.code, (tmp_path / "a.exr").read_text()) == (0, f"{WHOLE}a.xml"), done.err
        assert f"{head['name']} is frozen; it costs money until ./cluster.py terminate {head['id']}\n" in done.err
        roles = {node["id"]: node["role"] for node in cloud.nodes(group)}
        assert (roles.pop(head["id"]), list(roles.values())) == ("worker", ["head"])


@pytest.fixture(scope="module")
def real_farm(nodes: LocalCloud) -> Iterator[str]:
    """Four real nodes that serve, one of them a spot node; the head's guard is quick."""
    group = "night"
    for words in (
        ("createNodes", "c1.xlarge", "3"),
        ("addSpotNodes", "c1.xlarge", "1", "0.5"),
        ("install",),
        ("start",),
    ):
        done = nodes.cluster(*words, group, limits={"WATCH_SILENCE": 4})
        assert done.code == 0, done.err
    yield group
    nodes.cluster("terminateAll", group)


def lose_one(cloud: LocalCloud, group: str, folder: Path, fault: str, victim: dict[str, Any], reason: str) -> Result:
    """Let something happen to a node in mid-render; see why the render began again, and its whole picture."""
    name = f"go-on-{fault}"
    child = Rendering(cloud, folder / "log", write_scene(folder / "a.xml", until=name), "--group", group)
    if fault == "interrupt":
        cloud.ask("interrupt", {"node": victim["id"], "seconds": 0})
    else:
        cloud.fault(fault, victim)
    if fault == "cut":
        wait_until(lambda: not mitsubas(folder), what="the end of the render that hangs")
        cloud.fault("plug", victim)
    child.await_line(rf"a\.xml: \w+ lost: {reason}; trying again \(2 of 5\)")
    cloud.cluster("runCommand", f"touch /mnt/{name}", group)  # fails on a node that is frozen
    done = child.end()
    assert (done.code, (folder / "a.exr").read_text()) == (0, f"{WHOLE}a.xml"), done.err
    return done


@pytest.mark.xdist_group("nspawn-render")
def test_a_spot_node_that_is_taken_back(nodes: LocalCloud, real_farm: str, tmp_path: Path) -> None:
    spot = next(node for node in nodes.nodes(real_farm) if node["market"] == "spot")
    reason = rf"{spot['name']} (is (shutting-down|terminated) .*|does not answer)"
    done = lose_one(nodes, real_farm, tmp_path, "interrupt", spot, reason)
    assert len(re.findall(r"rendering on \d+ cores", done.err)) == 2


@pytest.mark.xdist_group("nspawn-render")
def test_a_worker_that_freezes(nodes: LocalCloud, real_farm: str, tmp_path: Path) -> None:
    worker = next(node for node in running(nodes, real_farm) if node["role"] == "worker")
    lose_one(nodes, real_farm, tmp_path, "freeze", worker, f"{worker['name']} does not answer")
    nodes.fault("thaw", worker)


@pytest.mark.xdist_group("nspawn-render")
@pytest.mark.parametrize(("fault", "reason"), [("reboot", "has rebooted"), ("cut", "was silent for 4s")])
def test_a_head_that_reboots_or_is_cut_off(
    nodes: LocalCloud, real_farm: str, tmp_path: Path, fault: str, reason: str
) -> None:
    head = head_of(nodes, real_farm)
    lose_one(nodes, real_farm, tmp_path, fault, head, f"{head['name']} {reason}")


@pytest.mark.xdist_group("nspawn-render")
def test_a_scene_that_kills_servers(nodes: LocalCloud, real_farm: str, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "a.xml", kills="true")
    linked = functools.partial(nodes.cluster, "start", real_farm)  # the head may be alone yet after the tests before
    wait_until(lambda: linked().code == 0, LIMIT, "a whole cluster")
    done = render(nodes, scene, "--group", real_farm)
    assert (done.code, done.err.count("mtssrv died on ")) == (1, 2), done.err
    assert done.err.count("rendering on") == 2
