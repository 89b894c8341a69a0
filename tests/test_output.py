"""Errors and output: times, sizes, tables, and nothing that steers a terminal."""

from __future__ import annotations

import re

import pytest

import cluster


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0s"), (59, "59s"), (60, "1m"), (3661, "1h01m"), (90061, "1d01h")]
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert cluster.format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(12, "12 B"), (1500, "1.5 kB"), (268435456, "268 MB"), (2e12, "2.0 TB")]
)
def test_format_size(size: float, expected: str) -> None:
    assert cluster.format_size(size) == expected


def test_format_table_stacks_what_does_not_fit() -> None:
    rows = [["NAME", "TYPE", "STATE"], ["a-long-name", "c1.xlarge", "running"]]
    assert cluster.format_table(rows, 80) == "NAME         TYPE       STATE\na-long-name  c1.xlarge  running"
    assert cluster.format_table(rows, 24) == "a-long-name\n  type c1.xlarge\n  state running"


@pytest.mark.parametrize("text", ["\033[2Jgone", "a\rb", "\x07"])
def test_what_nodes_say_cannot_steer_the_terminal(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0a-\x1f]", cluster.printable(text))
