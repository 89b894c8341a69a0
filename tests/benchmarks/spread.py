"""A package to many nodes: once over a slow uplink to real ones, and in how many rounds to 64 process nodes."""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import measure
from tests.localcloud.places import CLIENT, HERE, PROJECT
from tests.support import LocalCloud

RATE = "20mbit"
# Only what the user's machine sends is slow: the nodes' package mirror, on the same bridge, is not.
SLOW_UPLINK = f"""
tc qdisc add dev bridge root handle 1: htb
tc class add dev bridge parent 1: classid 1:1 htb rate 10gbit
tc qdisc add dev bridge parent 1:1 handle 10: tbf rate {RATE} burst 32kb latency 400ms
tc filter add dev bridge parent 1: protocol ip u32 match ip src {CLIENT}/32 flowid 1:1
"""
ROUNDS = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
import cluster
current, most = threading.local(), 0
PlainSource, PlainSpread = cluster.Source, cluster.Spread
def make_source(*given):
    source = PlainSource(*given)
    source.transfers = getattr(current, "transfers", 0)
    return source
class Spread(PlainSpread):
    def take(self, tried, lacking):
        global most
        source = super().take(tried, lacking)
        current.transfers = source.transfers + 1
        most = max(most, current.transfers)
        return source
    def give_back(self, source, failed=False):
        source.transfers = max(source.transfers, current.transfers)
        super().give_back(source, failed)
cluster.Source, cluster.Spread = make_source, Spread
cluster.cli(["install", sys.argv[2]], standalone_mode=False)
print(most)
sys.stdout.flush()
os._exit(0)
"""


def make_package(path: Path, megabytes: int) -> Path:
    """Write the stand-in as a .tar.gz of so many megabytes that no transfer can compress."""
    noise = tarfile.TarInfo("mitsuba/data/noise")
    noise.size = megabytes << 20
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(HERE / "mitsuba" / "mtssrv", "mitsuba/mtssrv")
        archive.add(HERE / "mitsuba" / "mitsuba", "mitsuba/mitsuba")
        archive.addfile(noise, io.BytesIO(os.urandom(noise.size)))
    return path


def sent_bytes(cloud: LocalCloud) -> int:
    """Return how much has left the user's machine for the nodes since the uplink became slow."""
    found = json.loads(cloud.run("tc", "-s", "-j", "qdisc", "show", "dev", "bridge").out)
    return int(next(one["bytes"] for one in found if one["kind"] == "tbf"))


def measure_uplink(cloud: LocalCloud, package: Path, sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Return number of real nodes -> seconds of install, and bytes over the uplink by packages; medians."""
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    packages: dict[int, list[float]] = {size: [] for size in sizes}
    slow = cloud.run("bash", "-ec", SLOW_UPLINK)
    assert slow.code == 0, slow.err
    for _ in range(rounds):
        for size in sizes:
            made = cloud.cluster("createNodes", "c1.xlarge", str(size), f"uplink{size}")
            assert made.code == 0, made.err
            before, began = sent_bytes(cloud), time.monotonic()
            done = cloud.cluster("install", f"uplink{size}", settings={"MITSUBA_PACKAGE": str(package)})
            assert done.code == 0, done.err
            seconds[size].append(time.monotonic() - began)
            packages[size].append((sent_bytes(cloud) - before) / package.stat().st_size)
            cloud.cluster("terminateAll", f"uplink{size}")
    return {
        str(size): {"seconds": statistics.median(seconds[size]), "packages": statistics.median(packages[size])}
        for size in sizes
    }


def measure_rounds(cloud: LocalCloud, package: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Return number of process nodes -> the client's processor time, and the longest chain of transfers.

    A transfer follows that by which its source got the files, and those that its source had ended before.
    """
    config = str(cloud.config({"MITSUBA_PACKAGE": str(package)}))
    env = cloud.environment(MITSUBA_CLUSTER_CONFIG=config)
    found = {}
    for size in sizes:
        samples = [f"cpu{size}-{number}" for number in range(3 if size < 10 else 1)]
        for group in (*samples, f"rounds{size}"):
            made = cloud.cluster("createNodes", "c1.xlarge", str(size), group)
            assert made.code == 0, made.err
        command = [sys.executable, str(PROJECT / "cluster.py"), "install"]
        cpu = statistics.median(measure.run([*command, group], env).cpu for group in samples)
        words = [sys.executable, "-c", ROUNDS, str(PROJECT), f"rounds{size}"]
        done = subprocess.run(words, env=env, check=True, capture_output=True, text=True)
        found[str(size)] = {"cpu": cpu, "rounds": int(done.stdout.splitlines()[-1])}
        for group in (*samples, f"rounds{size}"):
            cloud.end(group)
    return found
