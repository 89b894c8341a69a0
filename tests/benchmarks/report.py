"""Turns the figures into a page with the targets, and a plot."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks import measure, peers
from tests.benchmarks.fanout import OURS

Results = dict[str, Any]
NO_OP = "no-op of cluster.py"
PLOT = """
import json, sys
import matplotlib; matplotlib.use("svg")
import matplotlib.pyplot as plt
lines = json.load(sys.stdin)
plt.figure(figsize=(7, 4.5))
for name, points in lines.items():
    ours = name == "cluster.py"
    plt.plot(*zip(*points), marker="o", label=name, linewidth=3 if ours else 1, color="black" if ours else None)
plt.xscale("log", base=2); plt.yscale("log"); plt.xlabel("nodes"); plt.ylabel("seconds, less each tool's no-op")
plt.title("One command on N nodes"); plt.grid(alpha=0.3); plt.legend(fontsize=7); plt.tight_layout()
plt.savefig(sys.argv[1])
"""


def less_no_op(results: Results, size: str) -> dict[str, float]:
    """Return tool -> seconds for one group, less what the tool takes to do nothing."""
    figures, idle = results["sizes"][size], dict(results["no-op"])
    idle[OURS] = figures[NO_OP]["wall"]
    return {name: figures[name]["wall"] - idle[name] for name in figures if name in idle}


def slope(results: Results, name: str) -> float:
    """Return a tool's processor time for one node more, in milliseconds."""
    sizes = list(results["sizes"])
    first, last = sizes[0], sizes[-1]
    more = results["sizes"][last][name]["cpu"] - results["sizes"][first][name]["cpu"]
    return float(1000 * more / (int(last) - int(first)))


def verdict(value: float, limit: float, least: bool = False) -> str:
    """Return a figure with its target and whether it is met; LEAST: more is better."""
    met = value >= limit if least else value <= limit
    return f"{value:.2f} (target {'≥' if least else '≤'} {limit:g}: {'met' if met else 'not met'})"


def fanout_section(results: Results) -> Iterator[str]:
    """The tables of one command on N nodes, and their ratios."""
    plain = results["true"]
    sizes = list(plain["sizes"])
    net = {size: less_no_op(plain, size) for size in sizes}
    tools = sorted(net[sizes[-1]], key=lambda name: net[sizes[-1]][name])
    rows = []
    for name in tools:
        cells = [f"{net[size][name]:.2f} ({plain['sizes'][size][name]['wall']:.2f})" for size in sizes]
        rows.append([f"**{name}**" if name == OURS else name, *cells, f"{slope(plain, name):.1f}"])
    floor = [f"{plain['sizes'][size]['sshd itself']['cpu']:.2f}" for size in sizes]
    rows.append(["(processor time of sshd itself)", *floor, f"{slope(plain, 'sshd itself'):.1f}"])
    yield "## `true` on N nodes\n"
    yield "Wall seconds less the tool's own no-op (and with it). A no-op is the tool's `--version`, a library's import,"
    yield "and for cluster.py its look-up of the nodes in EC2, which the others are given as a list.\n"
    yield measure.table(["tool", *(f"N = {size}" for size in sizes), "CPU ms a node"], rows)
    yield ""
    for size in sizes:
        others = min(value for name, value in net[size].items() if name != OURS)
        yield f"- N = {size}: {verdict(net[size][OURS] / others, 1.15)} of the best peer"
    last = net[sizes[-1]]
    yield f"- default pdsh at {sizes[-1]}: {verdict(last['pdsh'] / last[OURS], 3, least=True)} times ours"
    yield f"- ansible raw at {sizes[-1]}: {verdict(last['ansible raw'] / last[OURS], 6, least=True)} times ours"
    paramiko, look_up = slope(plain, "paramiko"), slope(plain, NO_OP)
    limit = 3.5 * paramiko / 6.1  # the target is 3.5 ms where default paramiko takes 6.1
    yield (
        f"- client CPU a node: {verdict(slope(plain, OURS) - look_up, limit)} ms, and {look_up:.1f} ms to read EC2's "
        f"list; default paramiko: {paramiko:.1f} ms"
    )
    sleep = less_no_op(results["sleep"], sizes[-1])
    others = min(value for name, value in sleep.items() if name != OURS)
    yield f"- `sleep 1` at {sizes[-1]}: {sleep[OURS]:.2f} s, {verdict(sleep[OURS] / others, 1.1)} of the best peer"
    steps = results["five steps"]
    yield (
        f"- five steps on 8 nodes: {steps[OURS]:.2f} s, {verdict(steps[OURS] / steps['paramiko'], 0.35)} of paramiko "
        f"reconnecting ({steps['paramiko']:.2f} s)"
    )
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in results["profile"].items())
    yield f"- where a node's processor time goes, by the profile of {sizes[-1]} nodes: {shares}\n"


def start_section(results: Results) -> Iterator[str]:
    """What a user waits for at each command."""
    cpu = {name: one["cpu"] for name, one in results.items() if name != "calls"}
    yield "## Start\n"
    ratio = cpu["--help"] / cpu["import click"]
    yield f"- `--help`: {1000 * cpu['--help']:.0f} ms CPU, {verdict(ratio, 1.5)} of `import click`"
    parts = {"Python": cpu["python"], "click": cpu["import click"] - cpu["python"]}
    parts["compiling cluster.py, which Python does anew for each script"] = cpu["compiling"] - cpu["python"]
    parts["the rest"] = cpu["--help"] - sum(parts.values())
    yield f"- of these: {', '.join(f'{name} {1000 * seconds:.0f}' for name, seconds in parts.items())} ms"
    yield (
        f"- `status`: {1000 * cpu['status']:.0f} ms CPU, {verdict(cpu['status'] / cpu['the same calls'], 1.1)} of a "
        "script with click, boto3 and the same calls"
    )
    yield f"- EC2 calls of `status`: {results['calls']}\n"


def boot_section(results: Results) -> Iterator[str]:
    """CreateNodes against the nodes' own boot."""
    yield "## createNodes, 8 real nodes\n"
    yield (
        f"- RunInstances → the slowest node's sshd answers: {results['boot']:.1f} s; → the last node was logged in to: "
        f"{results['login']:.1f} s: {verdict(results['login'] / results['boot'], 1.1)}\n"
    )


def up_section(results: Results) -> Iterator[str]:
    """The short way against the three commands."""
    classic, up = results["one after the other"], results["up"]
    yield "## up, 8 real nodes\n"
    yield f"- createNodes, install and start: {classic:.1f} s; up: {up:.1f} s: {verdict(up / classic, 0.9)}\n"


def data_table(label: str, results: Results) -> str:
    """Return seconds and processor time, ours and the S3 server's, which shares the processor."""
    rows = [[name, *(f"{one[key]:.2f}" for key in ("wall", "cpu", "server"))] for name, one in results.items()]
    return measure.table([label, "seconds", "CPU s", "CPU s of the S3 server beside it"], rows)


def data_section(results: Results) -> Iterator[str]:
    """The big file's ways."""
    up = {name: one["wall"] for name, one in results["upload"].items()}
    down = {name: one["wall"] for name, one in results["download"].items()}
    yield f"## {results['megabytes']} MiB through S3\n"
    yield data_table("upload", results["upload"])
    yield ""
    best, net = min(up["s5cmd"], up["boto3 tuned"]), up[OURS] - up["SHA-256 alone"]
    yield f"- upload less hashing: {verdict(net / best, 1.2)} of the best of s5cmd and tuned boto3"
    yield (
        f"- s3cmd: {verdict(up['s3cmd'] / up[OURS], 3, least=True)} times ours, hashing and all; "
        f"{up['s3cmd'] / best:.2f} times the best, since the S3 server shares the processor\n"
    )
    yield data_table("to 4 nodes at once", results["download"])
    yield ""
    curls = down["4 ranged curls"]
    ratio = down["cluster.py without hashing"] / curls
    yield f"- download: {verdict(ratio, 1.2)} of 4 ranged curls (with hashing: {down[OURS] / curls:.2f})"
    ratio = down["s3cmd"] / down["cluster.py without hashing"]
    yield (
        f"- s3cmd: {verdict(down['s3cmd'] / down[OURS], 3, least=True)} times ours, {ratio:.2f} without "
        f"hashing; {down['s3cmd'] / curls:.2f} times the curls, since the server and four nodes share the processor\n"
    )


def spread_section(results: Results) -> Iterator[str]:
    """A package once over the uplink."""
    one, eight = results["uplink"]["1"], results["uplink"]["8"]
    first, few, many = (results["rounds"][size]["cpu"] for size in ("1", "8", "64"))
    early, late = (few - first) / 7, (many - few) / 56
    yield f"## A package of {results['megabytes']} MiB, an uplink of 20 Mbit/s\n"
    yield f"- over the uplink for 8 real nodes: {verdict(eight['packages'], 1.05)} times the package"
    yield (
        f"- install of 1: {one['seconds']:.1f} s, of 8: {eight['seconds']:.1f} s: "
        f"{verdict(eight['seconds'] / one['seconds'], 1.3)}"
    )
    rounds = results["rounds"]["64"]["rounds"]
    yield f"- 64 process nodes: {verdict(rounds, 7)} transfers, one after the other, for the last node"
    yield (
        f"- client CPU for one node more: {1000 * early:.0f} ms up to 8 nodes, {1000 * late:.0f} ms up to 64: "
        f"{verdict(late / early, 1.2)}\n"
    )


def thousand_section(results: Results) -> Iterator[str]:
    """A thousand process nodes."""
    names = [name for name, one in results.items() if "wall" in one and name != "connections"]
    yield "## 1000 process nodes\n"
    rows = [[name, f"{results[name]['wall']:.1f}", f"{results[name]['cpu']:.1f}"] for name in names]
    yield measure.table(["command", "seconds", "CPU s of the client"], rows)
    one = results["connections"]
    yield f"\n- connections that stood: {one['good']:.0f} of 1000, after {one['wall']:.1f} s"
    memory, idle = verdict(one["memory"] / 1e6, 130), verdict(100 * one["idle"], 3)
    yield f"- memory over the start: {memory} MB; idle: {idle} % of a core"
    yield f"- EC2 calls of `status`: {results['calls of status']}\n"


def tree_section(results: Results) -> Iterator[str]:
    """How long a scene takes to reach every node, flat and in a tree."""
    rows, targets = [], {"17": 0.55, "65": 0.35}
    megabytes = results.pop("megabytes")
    for rate, sizes in results.items():
        for size, one in sizes.items():
            computed = [f"{one['computed flat']:.1f}", f"{one['computed tree']:.1f}"]
            measured, ratio = ["", ""], f"{one['computed tree'] / one['computed flat']:.2f} (computed)"
            if "flat" in one:
                measured, part = [f"{one['flat']:.1f}", f"{one['tree']:.1f}"], one["tree"] / one["flat"]
                ratio = verdict(part, targets[size]) if rate == "80 Mbit/s" else f"{part:.2f}"
            rows.append([rate, size, *measured, *computed, ratio])
    yield "## A scene to every node\n"
    yield (
        f"{megabytes} MB of resources from a client through the head to each worker, by the stand-in servers; every "
        "interface limited by tc. Seconds.\n"
    )
    header = ["each interface", "nodes", "flat", "tree", "flat, computed", "tree, computed", "ratio"]
    yield measure.table(header, rows) + "\n"


def markdown(results: Results) -> str:
    """Return the whole page."""
    lines = ["# Benchmarks", "", "Written by `python -m tests.benchmarks`; medians of interleaved runs.", ""]
    lines += [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += [""]
    sections = {
        "fanout": fanout_section,
        "start": start_section,
        "boot": boot_section,
        "up": up_section,
        "data": data_section,
        "spread": spread_section,
        "thousand": thousand_section,
        "tree": tree_section,
    }
    for name, section in sections.items():
        if name in results:
            # Through JSON, where every key is text: the same for fresh figures and for kept ones.
            lines += section(json.loads(json.dumps(results[name])))
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """Draw the fan-out's times into an SVG file."""
    plain = json.loads(json.dumps(results["fanout"]["true"]))
    lines: dict[str, list[tuple[int, float]]] = {}
    for size in plain["sizes"]:
        for name, wall in less_no_op(plain, size).items():
            lines.setdefault(name, []).append((int(size), max(wall, 0.01)))
    words = [str(peers.environment() / "python"), "-c", PLOT, str(path)]
    subprocess.run(words, input=json.dumps(lines), text=True, check=True)
