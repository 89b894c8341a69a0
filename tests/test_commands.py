"""The command line: the overview, a quick start, a whole session, and calls that do not grow with the nodes."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.localcloud.places import PROJECT
from tests.support import LocalCloud, create

COMMANDS = (
    "createNodes install start up status syncData render terminateAll addSpotNodes tunnel systemLoad terminate "
    "spotPrices cancelSpot cancelAllSpot login runCommand logs regions completion extend policy"
).split()


def test_overview_lists_the_commands_in_the_users_order(cloud: LocalCloud) -> None:
    plain, asked = cloud.cluster(), cloud.cluster("--help")
    assert plain.code == asked.code == 0
    assert plain.out == asked.out
    assert re.findall(r"^  (\w+)  ", plain.out.split("Commands:")[1], re.M) == COMMANDS
    assert "..." not in plain.out.split("Commands:")[1]  # at 80 columns each line is whole


@pytest.mark.parametrize("words", [[], ["--help"], ["createNodes", "--help"]])
def test_help_imports_neither_boto3_nor_paramiko(words: list[str]) -> None:
    run = [sys.executable, "-X", "importtime", "cluster.py", *words]
    done = subprocess.run(run, cwd=PROJECT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"boto3", "botocore", "paramiko"}


def test_session(cloud: LocalCloud, group: str, tmp_path: Path) -> None:
    created = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert created.code == 0, created.err
    assert "3 × c1.xlarge: $1.56 an hour, and $0.0150 for public addresses" in created.err
    assert created.out.count("c1.xlarge") == 3
    assert created.err.splitlines()[-1] == f"3 nodes ready. Next: ./cluster.py install {group}"

    installed = cloud.cluster("install", group)
    assert (installed.code, installed.out.count(": Mitsuba 0.6.0\n")) == (0, 3)
    ids = {node["id"] for node in cloud.nodes(group)}
    logs = cloud.where.root / "state" / "mitsuba-cluster" / group
    assert {path.name for path in logs.iterdir()} == {f"{name}.install.log" for name in ids}
    assert all("version 0.6.0" in path.read_text() for path in logs.iterdir())

    started = cloud.cluster("start", group)
    assert started.code == 0, started.err
    shown = cloud.nodes(group)
    head = next(node for node in shown if node["role"] == "head")
    assert started.out.splitlines()[-1] == f"Head node: {head['name']}"
    assert "10 cores in all" in started.out  # 4 + 4 of the workers, 4 - 2 of the head
    assert sorted(node["role"] for node in shown) == ["head", "worker", "worker"]

    data = tmp_path / "smoke.vol"
    data.write_bytes(b"smoke" * 100_000)
    synced = cloud.cluster("syncData", str(data), group)
    assert synced.code == 0, synced.err
    for name in ids:
        assert (cloud.where.nodes / name / "mnt" / "smoke.vol").read_bytes() == data.read_bytes()

    ended = cloud.cluster("terminateAll", group)
    assert (ended.code, ended.out.count(": terminated\n")) == (0, 3)
    assert cloud.status(group) == {}


def test_calls_do_not_grow_with_the_number_of_nodes(cloud: LocalCloud, group: str) -> None:
    counts = []
    for size in (3, 9):
        create(cloud, group, size)
        commands = ("status", "install", "start", "terminateAll")
        *steps, ended = (cloud.calls(functools.partial(cloud.cluster, one, group)) for one in commands)
        counts.append([*steps, {name: count for name, count in ended.items() if name not in POLLS}])
    assert counts[0] == counts[1]
    assert counts[0][0] == {"DescribeInstances": 1, "DescribeSpotInstanceRequests": 1, "DescribeSecurityGroups": 1}


POLLS = ("DescribeInstances", "DescribeSecurityGroups", "DeleteSecurityGroup", "TerminateInstances")
