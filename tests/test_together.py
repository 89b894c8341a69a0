"""Two machines of one account at once, a wrong clock, and the soak.

`python -m pytest tests/test_together.py --rounds 100` is the whole soak.
"""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import LocalCloud, Result

pytestmark = pytest.mark.sweep

MEASURED = """
import atexit, os, runpy, sys, threading
tell = lambda: print("MEASURED", len(os.listdir("/proc/self/fd")), threading.active_count(), file=sys.stderr)
atexit.register(tell)
sys.argv = ["cluster.py", *sys.argv[1:]]
runpy.run_path("cluster.py", run_name="__main__")
"""


def machine(cloud: LocalCloud, name: str) -> dict[str, Any]:
    """Return the settings of another machine with the same key."""
    folder = cloud.where.root / name
    folder.mkdir(exist_ok=True)
    shutil.copy(cloud.where.root / "key.pem", folder / "key.pem")
    return {"SSH_PRIVATE_KEY_FILE": str(folder / "key.pem"), "CLIENT_CIDR": f"192.0.2.{len(name)}/32"}


def together(*works: Any) -> list[Result]:
    """Do several things at once."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [one.result() for one in [pool.submit(work) for work in works]]


def test_two_machines_create_in_one_group_at_once(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "1", f"{group}-0").code == 0  # the key exists
    first, second = machine(cloud, "a"), machine(cloud, "bb")
    create = ("createNodes", "c1.xlarge", "2", group)
    made = together(*(lambda one=one: cloud.cluster(*create, settings=one) for one in (first, second)))
    assert [done.code for done in made] == [0, 0], [done.err for done in made]
    assert len(cloud.nodes(group)) == 4
    groups = cloud.client("ec2").describe_security_groups(Filters=[{"Name": "tag:mitsuba-group", "Values": [group]}])
    assert len(groups["SecurityGroups"]) == 1
    sources = {one["CidrIp"] for rule in groups["SecurityGroups"][0]["IpPermissions"] for one in rule["IpRanges"]}
    assert sources <= {"192.0.2.1/32", "192.0.2.2/32"}
    cloud.end(f"{group}-0")


def test_the_end_of_one_group_leaves_the_other_alone(cloud: LocalCloud, group: str) -> None:
    other = f"{group}-other"
    assert cloud.cluster("createNodes", "c1.xlarge", "2", group).code == 0
    ended, made = together(
        lambda: cloud.cluster("terminateAll", group), lambda: cloud.cluster("createNodes", "c1.xlarge", "2", other)
    )
    assert (ended.code, made.code) == (0, 0), ended.err + made.err
    assert cloud.status(group) == {}
    assert [node["state"] for node in cloud.nodes(other)] == ["running", "running"]
    cloud.end(other)


def test_create_and_terminate_in_one_group_at_once(cloud: LocalCloud, group: str) -> None:
    """Whoever wins, each says what happened, and what exists is seen and ended."""
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    ended, made = together(
        lambda: cloud.cluster("terminateAll", group), lambda: cloud.cluster("createNodes", "c1.xlarge", "2", group)
    )
    for done in (ended, made):
        assert done.code in (0, 1)
        assert "Traceback" not in done.err
    last = cloud.cluster("terminateAll", group)
    assert last.code == 0, last.err
    assert cloud.status(group) == {}


def test_two_ends_at_once(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "3", group).code == 0
    ended = together(*(lambda: cloud.cluster("terminateAll", group) for _ in range(2)))
    assert [done.code for done in ended] == [0, 0], [done.err for done in ended]
    assert cloud.status(group) == {}


@pytest.mark.skipif(not shutil.which("faketime"), reason="needs faketime")
@pytest.mark.parametrize(("shift", "says"), [("-90m", r"1h(29|30)m behind"), ("+90m", r"1h(29|30)m ahead")])
def test_a_wrong_clock(cloud: LocalCloud, shift: str, says: str) -> None:
    done = cloud.run("faketime", "-f", shift, sys.executable, "cluster.py", "status")
    assert done.code == 1
    line = rf"Error: this machine's clock is {says} of AWS's, which so refuses it: set it"
    assert re.fullmatch(line, done.last_line), done.err


def test_soak(cloud: LocalCloud, group: str, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Rounds of a session with 5 % faults leave nothing behind: no node, group, key, file, nor open ends."""
    probe, scratch = tmp_path / "measured.py", tmp_path / "scratch"
    probe.write_text(MEASURED)
    scratch.mkdir()
    env = cloud.environment(TMPDIR=str(scratch))
    with cloud.faults(*({"kind": kind, "service": "ec2", "rate": 0.05} for kind in ("throttle", "500", "reset"))):
        for _ in range(pytestconfig.getoption("--rounds")):
            for words in (("createNodes", "c1.xlarge", "3"), ("runCommand", "true"), ("terminateAll",)):
                done = cloud.run(sys.executable, str(probe), *words, group, env=env)
                assert done.code == 0, done.err
                files, threads = map(int, done.err.split("MEASURED ")[1].split())
                assert files < 64
                assert threads < 32
    assert cloud.status(group) == {}
    assert list(scratch.iterdir()) == []
    ec2 = cloud.client("ec2")
    ours = [{"Name": "tag:mitsuba-group", "Values": [group]}]
    assert ec2.describe_security_groups(Filters=ours)["SecurityGroups"] == []
    states = [i["State"]["Name"] for r in ec2.describe_instances(Filters=ours)["Reservations"] for i in r["Instances"]]
    assert set(states) == {"terminated"}
    assert len(ec2.describe_key_pairs(KeyNames=["mitsuba-key"])["KeyPairs"]) == 1


def test_a_head_with_hundreds_of_workers(cloud: LocalCloud, group: str) -> None:
    """What a head says of itself grows with its workers: a second start and status --servers read it all."""
    assert cloud.cluster("createNodes", "c1.xlarge", "360", group).code == 0
    for command in ("install", "start"):
        done = cloud.cluster(command, group)
        assert done.code == 0, done.err
    again = cloud.cluster("start", group)
    assert (again.code, again.out.count("serves already")) == (0, 360), again.err
    asked = cloud.cluster("status", group, "--servers")
    assert (asked.code, asked.out.count(": serves 4 cores; load")) == (0, 359), asked.err
