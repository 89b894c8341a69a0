"""status, its costs, systemLoad and logs: what nodes cost, and what they say of themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

import cluster
from tests.support import LAUNCHED, LocalCloud, create, make_node


def test_status_json(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    shown = json.loads(cloud.cluster("status", "--json").out)
    assert shown["region"] == "us-east-1"
    assert shown["groups"][group]["spot_requests"] == []
    (node,) = shown["groups"][group]["nodes"]
    assert node["state"] == "running"
    assert node["address"] == node["name"] == node["public_ip"] != node["private_ip"]
    assert (node["type"], node["market"], node["role"]) == ("c1.xlarge", "on-demand", None)
    assert node["price"] == pytest.approx(0.52)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", node["launched"])


def test_a_mistyped_group_swapped_arguments_and_another_region(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    shown = cloud.cluster("status", f"{group}-x")
    assert f"Nothing is running in us-east-1 in group '{group}-x'; did you mean {group}? Running here: " in shown.err
    assert f"{group} (1 node, $0.5" in shown.err
    started = cloud.cluster("start", f"{group}-x")
    assert f"makes some; did you mean {group}? Running here: " in started.last_line
    for words in (("runCommand", group, "uptime"), ("syncData", group, "uptime")):
        swapped = cloud.cluster(*words)
        assert f"; did you mean ./cluster.py {words[0]} uptime {group}? Running here: " in swapped.last_line
    away = cloud.cluster("status", settings={"AWS_REGION": "eu-north-1"})
    assert "in eu-north-1; ./cluster.py status --all-regions shows every region" in away.err


def test_regions_and_system_load(cloud: LocalCloud, group: str) -> None:
    assert "* us-east-1\n" in cloud.cluster("regions").out
    create(cloud, group)
    shown = cloud.cluster("systemLoad", group)
    assert shown.out.splitlines()[0].split() == ["NODE", "NAME", "LOAD", "1", "5", "15", "CORES", "MEMORY"]
    assert shown.out.count("  0.42 ") == 2


def test_spent_counts_a_minute_at_least_and_the_public_address() -> None:
    one = make_node("i-1", price=0.595, public_ip="203.0.113.1")
    assert cluster.spent(one, LAUNCHED + timedelta(seconds=1)) == pytest.approx(0.01)
    assert cluster.spent(one, LAUNCHED + timedelta(hours=10)) == pytest.approx(6)
    assert cluster.spent(make_node("i-2"), LAUNCHED) is None


def run_beside(folder: Path, script: str, *arguments: str, **programs: str) -> str:
    """Run a node's script with made-up PROGRAMS on its PATH; return what it prints."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    told = ["bash", "-c", script, "script", *arguments]
    return subprocess.run(told, env=env, check=True, capture_output=True, text=True).stdout


HANDSHAKE = "mtssrv: Incoming connection from 10.0.0.1\\nmtssrv: Closing connection to 10.0.0.1\\n"


def test_handshakes_do_not_hide_the_last_error(tmp_path: Path) -> None:
    backwards = f"printf '{HANDSHAKE * 300}ERROR: the last one\\nERROR: the first one\\n'"
    said = run_beside(tmp_path, cluster.FACTS, journalctl=backwards, systemctl="echo 1", mtssrv=":")
    assert "problem=ERROR: the last one\n" in said


@pytest.mark.parametrize(("shown", "lines"), [("2", ["two"]), ("+1", ["one", "two"])])
def test_the_journal_shows_no_handshakes(tmp_path: Path, shown: str, lines: list[str]) -> None:
    journal = f"printf '{HANDSHAKE * 300}one\\ntwo\\n{HANDSHAKE}-- cursor: s=1;i=2\\n'"
    said = run_beside(tmp_path, cluster.JOURNAL, "all", "", shown, journalctl=journal)
    assert said.splitlines() == [*lines, "-- cursor: s=1;i=2"]


def test_a_node_without_mitsuba_says_so(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    shown = cloud.cluster("status", group, "--servers")
    assert shown.code == 0, shown.err
    assert "Mitsuba is not installed here; run install first" in shown.out


def test_json_is_of_one_moment(cloud: LocalCloud) -> None:
    both = cloud.cluster("status", "--json", "--watch")
    assert both.code == 2, both.err
    assert "choose one" in both.last_line
