"""The benchmarks' page is made of its figures, and their parts work."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from tests.benchmarks import measure, peers, report, tree

RESULTS = Path(report.__file__).parent / "results"


def test_the_page_is_made_of_the_figures() -> None:
    results = json.loads((RESULTS / "results.json").read_text())
    assert report.markdown(results) == (RESULTS / "results.md").read_text()
    assert (RESULTS / "fanout.svg").read_text().startswith("<?xml")


def test_a_run_counts_its_own_time_and_its_childrens() -> None:
    busy = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(3_000_000))'], check=True)"
    idle = "import time; time.sleep(0.2)"
    programs = {"busy": busy, "idle": idle}
    things = {name: functools.partial(measure.run, [sys.executable, "-c", text]) for name, text in programs.items()}
    found = measure.interleaved(things, 1)
    assert found["idle"].wall >= 0.2
    assert found["busy"].cpu > found["idle"].cpu


def test_every_peer_has_its_no_op(tmp_path: Path) -> None:
    hosts = peers.Hosts(["127.0.0.1", "127.0.0.2"], 22, "nobody", "key")
    lines = peers.command_lines(hosts, "echo 'a b'", tmp_path)
    assert set(lines) == set(peers.no_ops(tmp_path))
    assert all("127.0.0.2" in " ".join(words) for words in lines.values())


def test_figures_of_passing_on_are_held_against_their_targets() -> None:
    uplink = {"1": {"seconds": 20, "packages": 1.01}, "8": {"seconds": 25, "packages": 1.04}}
    rounds = {"1": {"cpu": 1.0, "rounds": 1}, "8": {"cpu": 1.7, "rounds": 4}, "64": {"cpu": 7.0, "rounds": 9}}
    lines = list(report.spread_section({"megabytes": 32, "uplink": uplink, "rounds": rounds}))
    assert [": met" in line for line in lines] == [False, True, True, False, True]
    assert "9.00 (target ≤ 7: not met)" in lines[3]


def test_a_scene_in_a_tree_takes_as_many_steps_as_the_two_levels_have() -> None:
    """20 MB at 80 Mbit/s take two seconds a copy: from the client, and then from a head to each of its own workers."""
    assert [tree.compute(17, 80, way) for way in (False, True)] == [34, 2 * (1 + 4 + 3)]
    assert [tree.compute(65, 80, way) for way in (False, True)] == [130, 2 * (1 + 8 + 7)]
