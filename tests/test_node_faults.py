"""Faults of real nodes, injected for real: cloud-init, locks, mirrors, disks, frozen and rebooting nodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import LocalCloud, impatience, ssh, wait_until

pytestmark = pytest.mark.xdist_group("nspawn-faults")  # a cloud of its own, beside test_nodes.py's

GROUP = "faulty"
QUICK: dict[str, float] = {"SILENCE_LIMIT": 3, "LIVENESS_LIMIT": 3, "LOGIN_LIMIT": 3}
SLOW_PACKAGE = r"""
touch /run/installing
while [ ! -e /run/go-on ]; do sleep 0.1; done
cat > /usr/local/bin/mtssrv << 'END'
#!/bin/bash
echo Mitsuba version 0.6.0
[ "$1" = -h ] || printf '\x1b\xcd0.6.0\0\3\0' > "/dev/tcp/${5/://}"
END
chmod 755 /usr/local/bin/mtssrv
"""


@pytest.mark.parametrize(
    ("fault", "says"),
    [("cloud-init-fails", "status: error"), ("cloud-init-hangs", "cloud-init did not end within 8 seconds")],
)
def test_cloud_init(nodes: LocalCloud, fault: str, says: str) -> None:
    with nodes.options(launch_faults=["", fault]):
        made = nodes.cluster("createNodes", "c1.xlarge", "2", fault, limits={"CLOUD_INIT_LIMIT": 8})
    assert made.code == 1, made.err
    assert says in made.err
    assert "Error: 1 of 2 nodes ready" in made.last_line
    ended = nodes.cluster("terminateAll", fault)
    assert (ended.code, ended.out.count(": terminated")) == (0, 2)


@pytest.fixture(scope="module")
def four(nodes: LocalCloud) -> Iterator[LocalCloud]:
    """A group of four nodes without Mitsuba."""
    made = nodes.cluster("createNodes", "c1.xlarge", "4", GROUP)
    assert made.code == 0, made.err
    yield nodes
    nodes.cluster("terminateAll", GROUP)


def test_a_dead_mirror(four: LocalCloud) -> None:
    four.ask("mirror", -1)
    try:
        done = four.cluster("install", GROUP)
    finally:
        four.ask("mirror", 0)
    assert done.code == 1
    assert done.err.count("\n    the package lists could not be fetched\n") == 4
    assert done.last_line.startswith("Error: Installed on 0 of 4 nodes")


def test_a_mirror_that_fails_for_a_while_a_held_lock_and_a_full_disk(four: LocalCloud) -> None:
    full, locked, *_ = four.nodes(GROUP)
    four.fault("system-disk-full", full)
    four.fault("dpkg-locked", locked)
    four.ask("mirror", 6)
    done = four.cluster("install", GROUP)
    assert (done.code, done.out.count(": Mitsuba 0.6.0\n")) == (1, 3), done.err
    assert f"{locked['name']}: Mitsuba 0.6.0\n" in done.out
    assert f"{full['name']}: the installation failed (exit code 100)" in done.err
    assert "No space left on device" in done.err or "You don't have enough free space in" in done.err, done.err
    four.fault("disk-healed", full)
    again = four.cluster("install", GROUP)
    assert (again.code, again.out.count(": Mitsuba 0.6.0\n")) == (0, 4), again.err


def test_a_full_data_disk(four: LocalCloud, tmp_path: Path) -> None:
    installed = four.cluster("install", GROUP)
    assert installed.code == 0, installed.err
    full = four.nodes(GROUP)[0]
    four.fault("data-disk-full", full)
    data = tmp_path / "big.vol"
    data.write_bytes(bytes(5 << 20))
    done = four.cluster("syncData", str(data), GROUP)
    four.fault("disk-healed", full)
    assert (done.code, done.out.count("fetched 1 file, 5.2 MB")) == (1, 3), done.err
    assert f"{full['name']}: 5.2 MB needed, " in done.err


def test_nodes_that_freeze_reboot_crash_or_lose_their_link_in_mid_install(four: LocalCloud, tmp_path: Path) -> None:
    frozen, rebooting, cut, good = four.nodes(GROUP)
    package = tmp_path / "slow.sh"
    package.write_text(SLOW_PACKAGE)
    env = four.environment(
        MITSUBA_CLUSTER_CONFIG=str(four.config({"MITSUBA_PACKAGE": str(package)})), **impatience(QUICK)
    )
    child = four.start(sys.executable, "cluster.py", "install", GROUP, env=env)
    for node in (frozen, rebooting, cut, good):
        wait_until(lambda node=node: not ssh(four, node, "test -e /run/installing").code)  # type: ignore[misc]
    four.fault("freeze", frozen)
    four.fault("reboot", rebooting)
    four.fault("cut", cut)
    ssh(four, good, "sudo touch /run/go-on")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (1, f"{good['name']}: Mitsuba 0.6.0\n"), err
    assert f"{frozen['name']}: does not answer any more\n" in err
    assert f"{rebooting['name']}: the connection broke" in err
    assert f"{cut['name']}: does not answer any more\n" in err
    four.fault("thaw", frozen)
    four.fault("plug", cut)
    wait_until(lambda: not ssh(four, rebooting, "test ! -e /run/installing").code, 60, "the reboot")
    mended = four.cluster("install", GROUP)
    assert (mended.code, mended.out.count(": Mitsuba 0.6.0\n")) == (0, 4), mended.err


def names(nodes: list[dict[str, Any]]) -> list[str]:
    """Return the names of NODES."""
    return [node["name"] for node in nodes]


def test_a_link_that_goes_in_mid_sync(four: LocalCloud, tmp_path: Path) -> None:
    cut, *others = four.nodes(GROUP)
    data = tmp_path / "volume.vol"
    data.write_bytes(bytes(range(256)) * (1 << 20))
    four.ask("stall", True)
    child = four.start(
        sys.executable, "cluster.py", "syncData", str(data), GROUP, env=four.environment(**impatience(QUICK))
    )
    wait_until(lambda: not ssh(four, cut, "ls /mnt/.mitsuba-cluster/*.part").code)
    four.fault("cut", cut)
    four.ask("stall", False)
    out, err = child.communicate(timeout=120)
    four.fault("plug", cut)
    assert (child.returncode, out.count("fetched 1 file, 268 MB")) == (1, 3), err
    assert sorted(line.split(":")[0] for line in out.splitlines()) == sorted(names(others))
    wait_until(lambda: not ssh(four, cut, "true").code)
    again = four.cluster("syncData", str(data), GROUP)
    assert again.code == 0, again.err
    assert again.out.count("has everything already") >= 3, again.err
    sums = {ssh(four, node, "sha256sum /mnt/volume.vol").out for node in four.nodes(GROUP)}
    assert len(sums) == 1


SLOW_LINK = "sudo tc qdisc add dev eth0 root tbf rate 16mbit burst 32kb latency 400ms"
NO_DISK = "mkdir -p .mitsuba-cluster; sudo mount -t tmpfs -o size=1m,uid=1000 none .mitsuba-cluster"


def test_a_node_that_goes_while_it_passes_on_and_a_full_disk(four: LocalCloud, tmp_path: Path) -> None:
    """Each node's link is so slow that the first is still serving the second when it goes."""
    package = tmp_path / "passed-on.sh"
    package.write_text(SLOW_PACKAGE.replace("installing", "passed").replace("go-on", "finish") + "exit 0\n")
    with package.open("ab") as file:
        file.write(os.urandom(8 << 20))
    full, *others = four.nodes(GROUP)
    for node in four.nodes(GROUP):
        assert ssh(four, node, SLOW_LINK).code == 0
    assert ssh(four, full, NO_DISK).code == 0
    config = str(four.config({"MITSUBA_PACKAGE": str(package)}))
    env = four.environment(MITSUBA_CLUSTER_CONFIG=config, **impatience({"PEER_TIMEOUT": 5}))
    child = four.start(sys.executable, "cluster.py", "install", GROUP, env=env)

    def having(what: str) -> list[dict[str, Any]]:
        return [node for node in others if not ssh(four, node, f"ls {what}").code]

    wait_until(lambda: having(".mitsuba-package/*passed-on.sh") and having(".mitsuba-cluster/*.part"))
    (source, *_) = having(".mitsuba-package/*passed-on.sh")
    four.fault("reboot", source)
    left = [node for node in others if node != source]
    for node in left:
        ssh(four, node, "sudo touch /run/finish")
    out, err = child.communicate(timeout=120)
    wait_until(lambda: not ssh(four, source, "test ! -e /run/passed").code, 60, "the reboot")
    for node in four.nodes(GROUP):
        ssh(four, node, "sudo tc qdisc del dev eth0 root; sudo umount .mitsuba-cluster")
    assert child.returncode == 1, err
    assert sorted(out.splitlines()) == sorted(f"{node['name']}: Mitsuba 0.6.0" for node in left), err
    assert f"{full['name']}: the package can't be brought to its home folder: " in err
    assert f"{source['name']}: the connection broke" in err
    assert ssh(four, full, "ls .mitsuba-package/*passed-on.sh").code, "half-installed"
