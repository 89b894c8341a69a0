"""One bad node among good ones: it is named with the reason, the others finish, and a second run mends it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import LocalCloud, Result, impatience, wait_until

pytestmark = [pytest.mark.sweep, pytest.mark.xdist_group("bad-nodes")]  # eight nodes serve them all

GROUP = "eight"
SIZE = 8
QUICK: dict[str, float] = {"LOGIN_LIMIT": 3, "LOOK_LIMIT": 3, "BOOT_LIMIT": 5, "EXCHANGE_LIMIT": 2, "SERVER_LIMIT": 2}
SLACK = 10  # seconds beyond the limits of QUICK within which a command ends
SSHD_FAULTS = {
    "sshd-refuses": "port {port} of {address} does not answer from here (",
    "sshd-resets": "port {port} of {address} does not answer from here (",
    "sshd-silent": "port {port} of {address} does not answer from here (",
    "sshd-garbage": "port {port} of {address} does not answer from here (",
}


@pytest.fixture(scope="module")
def eight(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """A group of eight nodes."""
    made = cloud.cluster("createNodes", "c1.xlarge", str(SIZE), GROUP)
    assert made.code == 0, made.err
    yield cloud
    cloud.end(GROUP)


@pytest.fixture
def bad(eight: LocalCloud) -> Iterator[dict[str, Any]]:
    """The node that a test may spoil; healed afterwards."""
    node = eight.nodes(GROUP)[3]
    yield node
    eight.fault("heal", node)


def seven_of_eight(done: Result, bad: dict[str, Any], what: str, reason: str) -> None:
    """See that one node failed for a reason, and the others did not."""
    assert done.code == 1
    assert "Traceback" not in done.err
    (line,) = (line for line in done.err.splitlines() if line.startswith(f"{bad['name']}: "))
    assert reason in line
    assert done.last_line == f"Error: {what} on 7 of 8 nodes; failed: {bad['name']}"


@pytest.mark.parametrize("fault", SSHD_FAULTS)
def test_install_with_a_bad_sshd(eight: LocalCloud, bad: dict[str, Any], fault: str) -> None:
    eight.fault(fault, bad)
    start = time.monotonic()
    done = eight.cluster("install", GROUP, limits=QUICK)
    assert time.monotonic() - start < QUICK["LOGIN_LIMIT"] + QUICK["EXCHANGE_LIMIT"] + SLACK
    reason = SSHD_FAULTS[fault].format(port=eight.ask("port"), address=bad["address"])
    seven_of_eight(done, bad, "Installed", reason)
    assert done.out.count(": Mitsuba 0.6.0\n") == SIZE - 1
    eight.fault("heal", bad)
    again = eight.cluster("install", GROUP)
    assert (again.code, again.out.count(": Mitsuba 0.6.0\n")) == (0, SIZE)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("install-fails", "the installation failed (exit code 1); the whole output: "),
        ("install-drops", "the connection broke"),
        ("check-python-fails", "has no Python 3.9 or newer, which this tool needs on its nodes"),
    ],
)
def test_install_that_goes_wrong(eight: LocalCloud, bad: dict[str, Any], fault: str, reason: str) -> None:
    eight.fault(fault, bad)
    done = eight.cluster("install", GROUP)
    seven_of_eight(done, bad, "Installed", reason)
    if fault == "install-fails":
        assert "\n    the last words of a step that goes wrong\n" in done.err


def test_logs_that_cannot_be_written(eight: LocalCloud) -> None:
    done = eight.run("sh", "-c", f'ulimit -f 0; exec "{sys.executable}" cluster.py install {GROUP}')
    assert done.code == 1
    assert done.err.count("can't be written: File too large") == SIZE
    assert done.last_line.startswith("Error: Installed on 0 of 8 nodes; failed: ")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("server-silent", "its mtssrv accepts connections, but stays silent"),
        ("server-another", "its mtssrv is another build of Mitsuba than what is installed there"),
        ("server-exits", "its mtssrv does not answer"),
        ("start-server-fails", "exit code 1"),
        ("start-server-drops", "the connection broke"),
    ],
)
def test_start_with_a_bad_worker(eight: LocalCloud, bad: dict[str, Any], fault: str, reason: str) -> None:
    assert eight.cluster("install", GROUP).code == 0
    eight.fault(fault, bad)
    if fault != "server-silent":
        eight.fault("server-gone", bad)
    done = eight.cluster("start", GROUP, limits=QUICK)
    assert done.code == 1
    assert done.last_line == f"Error: 7 of 8 nodes serving; failed: {bad['name']}"
    (line,) = (line for line in done.err.splitlines() if line.startswith(f"{bad['name']}: "))
    assert reason in line
    assert done.out.splitlines()[-1].startswith("Head node: ")
    assert "26 cores in all" in done.out  # 6 workers with 4, and 2 of the head
    eight.fault("heal", bad)
    again = eight.cluster("start", GROUP)
    assert again.code == 0, again.err
    assert "30 cores in all" in again.out
    assert again.out.count("serves already") >= SIZE - 2  # only the healed one and the head are touched


def test_a_bad_head_gives_no_head_line(eight: LocalCloud) -> None:
    assert eight.cluster("install", GROUP).code == 0
    assert eight.cluster("start", GROUP).code == 0
    head = next(node for node in eight.nodes(GROUP) if node["role"] == "head")
    eight.fault("server-another", head)
    done = eight.cluster("start", GROUP, limits=QUICK)
    eight.fault("heal", head)
    assert done.code == 1
    assert "Head node: " not in done.out
    assert done.last_line.startswith(f"Error: the head node does not serve; failed: {head['name']}. If it stays so: ")


@pytest.mark.parametrize("fault", ["sync-fails", "sync-drops"])
def test_sync_that_goes_wrong(eight: LocalCloud, bad: dict[str, Any], fault: str, tmp_path: Path) -> None:
    data = tmp_path / f"{fault}.vol"
    data.write_bytes(b"volume" * 200_000)
    eight.fault(fault, bad)
    done = eight.cluster("syncData", str(data), GROUP)
    seven_of_eight(
        done, bad, "Synchronized to /mnt", "exit code 1" if fault == "sync-fails" else "the connection broke"
    )
    eight.fault("heal", bad)
    again = eight.cluster("syncData", str(data), GROUP)
    assert again.code == 0, again.err
    assert again.out.count("has everything already") == SIZE - 1
    assert f"{bad['name']}: fetched 1 file, 1.2 MB" in again.out


def test_a_file_where_a_folder_should_be(eight: LocalCloud, bad: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "one.vol").write_bytes(b"1")
    blocked = eight.where.nodes / bad["id"] / "mnt"
    blocked.mkdir(exist_ok=True)
    (blocked / "inside").write_text("a file")
    done = eight.cluster("syncData", str(folder), GROUP)
    seven_of_eight(done, bad, "Synchronized to /mnt", "inside/one.vol: ")


def test_binary_output_and_much_of_it(eight: LocalCloud) -> None:
    words = f"{sys.executable} cluster.py runCommand 'head -c 25000000 /dev/urandom' {GROUP}"
    with eight.start("sh", "-c", f"{words} | wc -c", stderr=subprocess.STDOUT) as child:
        out, _ = child.communicate(timeout=200)
    assert 200_000_000 < int(out) < 210_000_000  # a line in 256 bytes has its node's name in front


def test_a_node_that_falls_silent_in_a_step(eight: LocalCloud, bad: dict[str, Any]) -> None:
    """The link goes: the process stays connected, and nothing comes any more."""
    env = eight.environment(**impatience({"SILENCE_LIMIT": 2, "LIVENESS_LIMIT": 2}))
    line = f'test "$NODE" = {bad["address"]} && touch asleep && sleep 1000; true'
    child = eight.start(sys.executable, "cluster.py", "runCommand", line, GROUP, env=env)
    asleep = eight.where.nodes / bad["id"] / "home" / "asleep"
    wait_until(asleep.exists)
    eight.fault("mute", bad)
    start = time.monotonic()
    _, err = child.communicate(timeout=60)
    assert time.monotonic() - start < 4 + SLACK
    assert f"Error: 1 of {SIZE} nodes failed: {bad['name']}\n" in err
    assert f"{bad['name']}: does not answer any more" in err
    assert child.returncode == 1


def test_create_with_bad_nodes(cloud: LocalCloud, group: str) -> None:
    faults = ["", "sshd-silent", "sshd-garbage", "sshd-refuses", "dies", "wait-for-boot-fails"]
    with cloud.options(launch_faults=list(faults)):
        start = time.monotonic()
        made = cloud.cluster("createNodes", "c1.xlarge", str(len(faults)), group, limits=QUICK)
        assert time.monotonic() - start < QUICK["BOOT_LIMIT"] + QUICK["EXCHANGE_LIMIT"] + 2 * SLACK
    assert made.code == 1
    assert f"Error: 1 of 6 nodes ready in group {group!r} (us-east-1); " in made.last_line
    assert made.last_line.endswith(f"./cluster.py status shows them, ./cluster.py terminateAll {group} ends them")
    assert made.err.count("does the security group allow this machine's address, and does the subnet route") == 3
    assert made.err.count("EC2 ended it while it started: Server.InternalError") == 1
    assert made.err.count(": exit code 1") == 1
    shown = cloud.nodes(group)
    assert sorted(node["state"] for node in shown) == 5 * ["running"] + ["terminated"]
    assert {node["state"]: node["cost"] is None for node in shown} == {"running": False, "terminated": True}
    ended = cloud.cluster("terminateAll", group)
    assert (ended.code, ended.out.count(": terminated\n")) == (0, 5)


def test_an_sshd_that_comes_up_late(cloud: LocalCloud, group: str) -> None:
    with cloud.options(launch_faults=["sshd-refuses"]):
        child = cloud.start(sys.executable, "cluster.py", "createNodes", "c1.xlarge", "1", group)
        (node,) = wait_until(lambda: [node for node in cloud.nodes(group) if node["state"] == "running"])
        cloud.fault("heal", node)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert node["id"] in out


def test_a_node_that_dies_in_mid_step(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "2", group).code == 0
    bad = cloud.nodes(group)[0]
    cloud.fault("install-dies", bad)
    done = cloud.cluster("install", group, limits=QUICK)
    assert (done.code, done.last_line) == (1, f"Error: Installed on 1 of 2 nodes; failed: {bad['name']}")
    wait_until(lambda: "Internal error" in cloud.cluster("status", group).out)
    again = cloud.cluster("install", group)
    assert (again.code, again.out.count("Mitsuba 0.6.0")) == (0, 1)
