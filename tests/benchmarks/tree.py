"""How long a scene takes to reach every node, flat and in a tree: real bytes through interfaces that tc limits."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cluster
from tests.benchmarks import measure
from tests.localcloud.places import HERE

MEGABYTES = 20
RATES = {"80 Mbit/s": 80, "1 Gbit/s": 1000}
SIZES = (17, 65)
COMPUTED = 1000


def plan_links(addresses: Sequence[str], tree: bool) -> dict[str, list[str]]:
    """Return linking address -> linked ones, heads after those that they link; the first address is the head's."""
    head, *workers = addresses
    when = datetime.now(timezone.utc)
    nodes = [cluster.Node(one, "g", "t", "running", when, private_ip=one) for one in workers]
    branches = cluster.plan_branches(nodes) if tree else {}
    below = {one for branch in branches.values() for one in branch}
    return branches | {head: [one for one in workers if one not in below]}


def compute(size: int, megabits: float, tree: bool) -> float:
    """Return the seconds that SIZE nodes take on paper: a sub-head sends once it has all; the client sends first."""
    links = plan_links([f"10.0.{i >> 8}.{i & 255}" for i in range(size)], tree)
    *branches, direct = map(len, links.values())
    return (1 + direct + max(branches, default=0)) * MEGABYTES * 8 / megabits


class Network:
    """Namespaces on one bridge, which is in a namespace of its own; each interface limited both ways."""

    def __init__(self, size: int, megabits: int) -> None:
        self.name = f"bench{secrets.token_hex(3)}"
        self.addresses = [f"10.99.0.{number}" for number in range(1, size + 1)]
        self.spaces = {one: f"{self.name}-{one.rpartition('.')[2]}" for one in self.addresses}
        self.limit = f"root tbf rate {megabits}mbit burst {max(64, megabits)}kb latency 100ms"

    def __enter__(self) -> Network:
        try:
            self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def make(self) -> None:
        """Make it all."""
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "add", "name", "bridge0", "type", "bridge")
        run("ip", "-n", self.name, "link", "set", "bridge0", "up")
        for number, (address, space) in enumerate(self.spaces.items()):
            run("ip", "netns", "add", space)
            run(
                *("ip", "-n", self.name, "link", "add", f"port{number}", "type", "veth"),
                *("peer", "name", "eth0", "netns", space),
            )
            run("ip", "-n", self.name, "link", "set", f"port{number}", "master", "bridge0", "up")
            run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            run("tc", "-n", space, "qdisc", "add", "dev", "eth0", *self.limit.split())
            run("tc", "-n", self.name, "qdisc", "add", "dev", f"port{number}", *self.limit.split())

    def __exit__(self, *_: object) -> None:
        for space in (*self.spaces.values(), self.name):
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)

    def inside(self, address: str, *words: str) -> list[str]:
        """Return the command line that runs WORDS on a node."""
        return ["ip", "netns", "exec", self.spaces[address], *words]


def run(*words: str) -> None:
    """Run a program that must succeed."""
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def serving(network: Network, folder: Path, links: dict[str, list[str]]) -> Iterator[None]:
    """Run every server of one core, workers before their heads."""
    linked = [one for ones in links.values() for one in ones]
    with ExitStack() as stack:
        for address in [*(one for one in linked if one not in links), *links]:
            hosts = ";".join(links.get(address, ()))
            words = [sys.executable, str(HERE / "mitsuba" / "mtssrv"), "-p", "1", "-n", address, "-c", hosts]
            pipes: Any = {"cwd": folder, "stdout": subprocess.PIPE, "text": True}
            server = stack.enter_context(subprocess.Popen(network.inside(address, *words), **pipes))
            stack.callback(server.terminate)
            if not any("Listening on" in line for line in server.stdout or ()):
                raise RuntimeError(f"the server of {address} does not start")
        yield


def measure_sending(network: Network, folder: Path, tree: bool) -> float:
    """Return the seconds from a client's start until every node has the scene, and the client its picture."""
    *nodes, client = network.addresses
    scene = folder / "scene.xml"
    scene.write_text(f'<scene><integer name="bytes" value="{MEGABYTES * 1_000_000}"/></scene>')
    with serving(network, folder, plan_links(nodes, tree)):
        words = [sys.executable, str(HERE / "mitsuba" / "mitsuba"), "-c", nodes[0], str(scene)]
        return measure.run(network.inside(client, *words)).wall


def measure_all(folder: Path) -> dict[str, Any]:
    """Return rate -> nodes -> seconds, flat and in a tree, measured and computed."""
    found: dict[str, Any] = {"megabytes": MEGABYTES}
    for rate, megabits in RATES.items():
        found[rate] = {}
        for size in (*SIZES, COMPUTED):
            ways = {"flat": False, "tree": True}
            figures = {f"computed {name}": compute(size, megabits, tree) for name, tree in ways.items()}
            if size in SIZES:
                with Network(size + 1, megabits) as network:
                    figures |= {name: measure_sending(network, folder, tree) for name, tree in ways.items()}
            found[rate][str(size)] = figures
    return found
