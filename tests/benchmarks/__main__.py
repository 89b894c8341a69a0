"""Measures this tool and its peers on the same nodes, in one run: `python -m tests.benchmarks`.

Writes results/results.md, results.json and fanout.svg. A missing peer fails the run unless --go-on.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from tests.benchmarks import data, fanout, measure, peers, spread, tree
from tests.localcloud.__main__ import best_kind, bring_up, take_down
from tests.localcloud.places import PROJECT, Places
from tests.support import LocalCloud, ssh

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (8, 32, 128)
THOUSAND = 1000
MEMORY = "/dev/shm"
Results = dict[str, Any]


@contextmanager
def local_cloud(kind: str, parent: str | None = None) -> Iterator[LocalCloud]:
    """Run a local cloud in a folder of its own, below PARENT or where temporary files are."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=parent) as folder:
        where = Places(Path(folder) / "cloud")
        daemon = bring_up(where, kind)
        try:
            yield LocalCloud(where, kind)
        finally:
            take_down(where)
            daemon.wait()


def run_fanout(rounds: int) -> Results:
    """`true` and `sleep 1` on N hosts, and five steps on eight."""
    with local_cloud("process") as cloud, fanout.prepared(cloud, SIZES) as bench:
        return {
            "true": fanout.measure_command(bench, SIZES, rounds),
            "sleep": fanout.measure_command(bench, (SIZES[-1],), 1, "sleep 1"),
            "five steps": fanout.measure_five_steps(bench, SIZES[0], rounds),
            "profile": fanout.profile(bench, SIZES[-1]),
        }


SAME_CALLS = """
import click, boto3
from concurrent.futures import ThreadPoolExecutor
@click.command()
def main():
    ec2 = boto3.client("ec2", "us-east-1")
    def pages(call):
        filters = [{"Name": "tag-key", "Values": ["mitsuba-group"]}]
        return list(ec2.get_paginator(call).paginate(Filters=filters, PaginationConfig={"PageSize": 1000}))
    with ThreadPoolExecutor(3) as pool:
        calls = ("describe_instances", "describe_spot_instance_requests", "describe_security_groups")
        click.echo(len(list(pool.map(pages, calls))))
main()
"""


def run_start(rounds: int) -> Results:
    """--help, and `status` of 3 nodes."""
    python, tool = sys.executable, str(PROJECT / "cluster.py")
    with local_cloud("process") as cloud:
        assert cloud.cluster("createNodes", "c1.xlarge", "3").code == 0
        env = cloud.environment()
        things = {
            "import click": lambda: measure.run([python, "-c", "import click"]),
            "--help": lambda: measure.run([python, tool, "--help"]),
            "python": lambda: measure.run([python, "-c", ""]),
            "compiling": lambda: measure.run([python, "-c", f"compile(open({tool!r}).read(), '', 'exec')"]),
            "the same calls": lambda: measure.run([python, "-c", SAME_CALLS], env),
            "status": lambda: measure.run([python, tool, "status"], env),
        }
        found = measure.interleaved(things, 4 * rounds)
        calls = cloud.calls(lambda: cloud.cluster("status"))
    return {name: {"wall": one.wall, "cpu": one.cpu} for name, one in found.items()} | {"calls": calls}


def run_boot(rounds: int) -> Results:
    """CreateNodes on eight real nodes: from RunInstances until each was logged in to, and until its sshd answered."""
    with local_cloud("nspawn") as cloud:
        assert cloud.cluster("createNodes", "c1.xlarge", "8").code == 0
        calls = [json.loads(line) for line in cloud.where.calls.read_text().splitlines()]
        launched = next(call["time"] for call in calls if call.get("action") == "RunInstances")
        boots = cloud.ask("status")
        logins = {}
        for node in cloud.nodes("default"):
            log = ssh(cloud, node, "sudo journalctl -o short-unix -u ssh | grep -m 1 Accepted").out
            logins[node["id"]] = float(log.split()[0]) - launched
        cloud.cluster("terminateAll")
    return {"boot": max(boots[name]["boot"] for name in logins), "login": max(logins.values())}


def run_up(rounds: int) -> Results:
    """From nothing to a head node with eight real nodes: the three commands one after the other, and up."""
    ways: dict[str, list[tuple[str, ...]]] = {
        "one after the other": [("createNodes", "c1.xlarge", "8"), ("install",), ("start",)],
        "up": [("up", "c1.xlarge", "8")],
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with local_cloud("nspawn") as cloud:
        for _ in range(min(rounds, 3)):  # half a minute each
            for name, steps in ways.items():
                began = time.monotonic()
                for words in steps:
                    done = cloud.cluster(*words)
                    assert done.code == 0, done.err
                found[name].append(time.monotonic() - began)
                cloud.cluster("terminateAll")
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def run_data(rounds: int, megabytes: int = 1024) -> Results:
    """A big file to S3, and to four nodes; in memory, so that no disk is measured."""
    with (
        local_cloud("process", MEMORY) as cloud,
        tempfile.TemporaryDirectory(prefix="benchmark-data-", dir=MEMORY) as folder,
    ):
        path = data.make_file(Path(folder) / "big.vol", megabytes)
        return {
            "megabytes": megabytes,
            "upload": data.measure_uploads(cloud, path, rounds),
            "download": data.measure_downloads(cloud, path, Path(folder) / "nodes", rounds),
        }


def run_spread(rounds: int, megabytes: int = 32) -> Results:
    """A package once over a slow uplink, to 8 real nodes; and its rounds to 64 process nodes."""
    with tempfile.TemporaryDirectory(prefix="benchmark-package-") as folder:
        package = spread.make_package(Path(folder) / "mitsuba.tar.gz", megabytes)
        with local_cloud("nspawn") as cloud:
            uplink = spread.measure_uplink(cloud, package, (1, 8), min(rounds, 3))
        with local_cloud("process") as cloud:
            return {
                "megabytes": megabytes,
                "uplink": uplink,
                "rounds": spread.measure_rounds(cloud, package, (1, 8, 64)),
            }


def run_thousand(rounds: int) -> Results:
    """A thousand process nodes: each command, and as many open connections."""
    found: Results = {}
    steps = [("createNodes", "c1.xlarge", str(THOUSAND)), ("status",), ("runCommand", "true"), ("install",), ("start",)]
    with local_cloud("process") as cloud:
        env = cloud.environment()
        for words in steps:
            sample = measure.run([sys.executable, str(PROJECT / "cluster.py"), *words], env)
            found[words[0]] = {"wall": sample.wall, "cpu": sample.cpu}
        found["calls of status"] = cloud.calls(lambda: cloud.cluster("status"))
        found["connections"] = fanout.measure_connections(cloud, "default")
        sample = measure.run([sys.executable, str(PROJECT / "cluster.py"), "terminateAll"], env)
        found["terminateAll"] = {"wall": sample.wall, "cpu": sample.cpu}
    return found


def run_tree(rounds: int) -> Results:
    """A scene to 17 and 65 nodes through limited interfaces, once: no run has ever differed by more than a second."""
    with tempfile.TemporaryDirectory(prefix="benchmark-tree-") as folder:
        return tree.measure_all(Path(folder))


SECTIONS: dict[str, Callable[[int], Results]] = {
    "fanout": run_fanout,
    "start": run_start,
    "boot": run_boot,
    "up": run_up,
    "data": run_data,
    "spread": run_spread,
    "thousand": run_thousand,
    "tree": run_tree,
}


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} × {model[1] if model else platform.processor()}",
        "python": platform.python_version(),
        "load before": load,
        "commit": commit.stdout.strip(),
    }


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, help="Runs of each thing, in turn; medians are shown.")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Leave the other sections as they were.")
@click.option("--go-on", is_flag=True, help="Go on without the peers that are missing.")
def main(rounds: int, only: tuple[str, ...], go_on: bool) -> None:
    """Measure, and write the results."""
    from tests.benchmarks import report

    if (gone := peers.missing()) and not go_on:
        raise click.ClickException(
            f"{', '.join(gone)} not found: apt-get install pdsh clustershell s3cmd openssh-server, or --go-on"
        )
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / "results.json"
    results: Results = json.loads(kept.read_text()) if only and kept.exists() else {}
    results["machine"] = machine()
    for name in only or SECTIONS:
        if name in ("boot", "up", "spread", "tree") and best_kind() != "nspawn":
            click.echo(f"{name}: left out, since it needs root and nspawn", err=True)
            continue
        click.echo(f"{name} …", err=True)
        results[name] = SECTIONS[name](rounds)
        kept.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "results.md").write_text(report.markdown(results))
    if "fanout" in results:
        report.plot(results, RESULTS / "fanout.svg")
    click.echo(report.markdown(results))


if __name__ == "__main__":
    main(prog_name="python -m tests.benchmarks")
