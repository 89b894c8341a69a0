"""Runs programs and functions in turn and keeps what they took; makes tables and a plot of it."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """What one run took, in seconds."""

    wall: float
    cpu: float  # of the program and of the children that it waited for
    server: float = 0.0  # processor time of the server that it talked to, where that is measured


@dataclass
class Series:
    """All runs of one thing."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def wall(self) -> float:
        """The median wall time, in seconds."""
        return statistics.median(sample.wall for sample in self.samples)

    @property
    def cpu(self) -> float:
        """The median processor time, in seconds."""
        return statistics.median(sample.cpu for sample in self.samples)

    @property
    def server(self) -> float:
        """The median processor time of the server, in seconds."""
        return statistics.median(sample.server for sample in self.samples)


def run(words: Sequence[str], env: Mapping[str, str] | None = None) -> Sample:
    """Run a program to its end; RuntimeError with its output where it fails."""
    start = time.monotonic()
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    child = subprocess.Popen(words, env=env, **pipes)
    assert child.stdout
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)[:300]}: exit code {child.returncode}: {output.decode()[-500:]}")
    return Sample(wall, usage.ru_utime + usage.ru_stime)


def timed(work: Callable[[], object]) -> Sample:
    """Do something in this process and in children that it waits for."""
    start, cpu = time.monotonic(), sum(os.times()[:4])
    work()
    return Sample(time.monotonic() - start, sum(os.times()[:4]) - cpu)


def process_cpu(pid: int) -> float:
    """Return the seconds of processor time that a running process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_server(pid: int, work: Callable[[], Sample]) -> Sample:
    """Add to a sample what its server has used meanwhile."""
    before = process_cpu(pid)
    return replace(work(), server=process_cpu(pid) - before)


def interleaved(things: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, Series]:
    """Do all THINGS in turn, ROUNDS times, after one round that does not count."""
    found = {name: Series() for name in things}
    for number in range(rounds + 1):
        for name, work in things.items():
            sample = work()
            if number:
                found[name].samples.append(sample)
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
