"""Errors and output: times, sizes, tables, and nothing that steers a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cluster


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0s"), (59, "59s"), (60, "1m"), (3661, "1h01m"), (90061, "1d01h")]
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert cluster.format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(12, "12 B"), (1500, "1.5 kB"), (99_990, "100 kB"), (999_900, "1.0 MB"), (268435456, "268 MB"), (2e12, "2.0 TB")],
)
def test_format_size(size: float, expected: str) -> None:
    assert cluster.format_size(size) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 nodes"), (1, "1 node"), (1.0, "1 node"), (2.5, "2.5 nodes"), (32767, "32767 nodes")]
)
def test_format_count(count: float, expected: str) -> None:
    assert cluster.format_count(count, "node") == expected


def test_a_bar_stands_neither_empty_nor_full(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(cluster, "is_terminal", lambda: True)
    monkeypatch.setattr(cluster, "draw", drawn.append)
    progress = cluster.Progress("Sending", 2, size=1000)
    for progress.moved["all"] in (0, 500, 1000):
        progress.redraw()
    cluster.Progress("Installing", 2).redraw()
    assert ["[" in line for line in drawn] == [False, True, False, False]
    assert drawn[1].startswith("Sending [##########··········]: 0/2, 500 B of 1.0 kB")
    assert drawn[3] == "Installing: 0/2, 0s"


def test_no_message_has_a_plural_that_one_makes_wrong() -> None:
    found = re.findall(
        r"\{[^{}]*\} (?:node|file|object|hour|minute|request|group)s\b.*", Path(cluster.__file__).read_text()
    )
    assert not found, "see format_count"


def test_format_table_stacks_what_does_not_fit() -> None:
    rows = [["NAME", "TYPE", "STATE"], ["a-long-name", "c1.xlarge", "running"]]
    assert cluster.format_table(rows, width=80) == "NAME         TYPE       STATE\na-long-name  c1.xlarge  running"
    assert cluster.format_table(rows, width=24) == "a-long-name\n  type c1.xlarge\n  state running"


@pytest.mark.parametrize("text", ["\033[2Jgone", "a\rb", "\x07"])
def test_what_nodes_say_cannot_steer_the_terminal(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0a-\x1f]", cluster.printable(text))
