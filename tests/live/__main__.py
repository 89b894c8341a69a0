"""README's session on a real AWS account: `python -m tests.live --yes-this-costs-money [TYPE [COUNT]]`.

It uses config.py and its credentials, a group of its own, and nodes that end by themselves after an hour.
Whatever happens, Ctrl-C included, it ends all that it made, and verifies it. On the way it writes down how
AWS really behaved, as JSON and as a table, so that the local cloud's numbers can be replaced by real ones.

It was never run on AWS: those who wrote it had no account. It is tried on the local cloud (test_live.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

import cluster
from tests.localcloud.places import PROJECT

STEP_LIMIT = 3600  # seconds for one command
END_TRIES = 3
POLL = 0.5
ALIVE = {"pending", "running", "shutting-down", "stopping", "stopped"}
RELEASES = ("22.04", "24.04", "26.04")


class Watch:
    """Polls EC2 beside the tool, and notes when each thing was first seen."""

    def __init__(self, settings: cluster.Settings, group: str) -> None:
        self.group = group
        self.ec2 = cluster.open_client(settings, "ec2")
        self.seen: dict[str, dict[str, float]] = {}  # instance -> what -> time
        self.group_gone = 0.0
        self.codes: Counter[str] = Counter()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Poll until stop()."""
        while not self.stopped.wait(POLL):
            try:
                self.poll()
            except Exception as error:  # a poll that fails is a fact, too
                self.codes[cluster.error_code(error) or type(error).__name__] += 1

    def instances(self) -> list[dict[str, Any]]:
        """Return the group's instances as EC2 lists them."""
        answer = self.ec2.describe_instances(Filters=cluster.our_filter(self.group))
        return [instance for reservation in answer["Reservations"] for instance in reservation["Instances"]]

    def poll(self) -> None:
        """Note what is new."""
        for one in self.instances():
            known = self.seen.setdefault(one["InstanceId"], {})
            there = {
                "listed": True,
                "private address": one.get("PrivateIpAddress"),
                "public address": one.get("PublicIpAddress"),
                "public name": one.get("PublicDnsName"),
                one["State"]["Name"]: True,
            }
            for what in filter(there.get, there):
                known.setdefault(what, time.time())
        groups = self.ec2.describe_security_groups(Filters=cluster.our_filter(self.group))["SecurityGroups"]
        if self.seen and not groups and not self.group_gone:
            self.group_gone = time.time()

    def stop(self) -> None:
        """End the polling."""
        self.stopped.set()
        self.thread.join(60)


def spread(values: list[float]) -> dict[str, float] | None:
    """Return the least and the most of VALUES (seconds); None where there are none."""
    return {"least": round(min(values), 2), "most": round(max(values), 2), "of": len(values)} if values else None


class Live:
    """One run."""

    def __init__(self, config: Path, group: str, folder: Path) -> None:
        self.config, self.group, self.folder = config, group, folder
        self.settings = cluster.load_settings(config)
        self.record = folder / "answers.jsonl"
        self.steps: dict[str, dict[str, Any]] = {}
        self.child: subprocess.Popen[str] | None = None
        self.watch = Watch(self.settings, group)

    def tool(self, name: str, *words: str) -> str:
        """Run a command of the tool, note how it went, and return its stdout."""
        click.echo(f"$ ./cluster.py {' '.join([name, *words])}")
        line = [
            sys.executable,
            "-m",
            "tests.live.recorder",
            str(self.record),
            "--config",
            str(self.config),
            name,
            *words,
        ]
        begun = time.time()
        with subprocess.Popen(line, cwd=PROJECT, text=True, stdout=subprocess.PIPE, start_new_session=True) as child:
            self.child = child
            out, _ = child.communicate(timeout=STEP_LIMIT)
        click.echo(out, nl=False)
        self.steps[name] = {"code": child.returncode, "seconds": round(time.time() - begun, 1)}
        return out

    def session(self, machine: str, count: int) -> None:
        """Do what README does, as far as each step allows the next."""
        group = self.group
        self.tool("createNodes", machine, str(count), group, "--max-hours", "1", "--without-mitsuba")
        for name in ("install", "start"):
            if self.failed():
                break
            self.tool(name, group)
        if self.settings.bucket[0] and self.steps["createNodes"]["code"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{group}.vol"
                path.write_bytes(os.urandom(1 << 20))
                self.tool("syncData", str(path), group)
        self.tool("status", group)

    def failed(self) -> bool:
        """Tell whether a step has failed."""
        return any(step["code"] for step in self.steps.values())

    def interrupt(self) -> None:
        """Stop the command that is running, as Ctrl-C would."""
        if self.child and self.child.poll() is None:
            with suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(60)

    def end(self) -> list[str]:
        """End everything; return the ids of what runs on all the same. Ctrl-C does not stop this."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(END_TRIES):
            self.tool("terminateAll", self.group)
            alive = [one["InstanceId"] for one in self.watch.instances() if one["State"]["Name"] in ALIVE]
            if not alive and not self.steps["terminateAll"]["code"]:
                break
        deadline = time.monotonic() + 30
        while not self.watch.group_gone and self.watch.seen and time.monotonic() < deadline:
            time.sleep(POLL)
        self.watch.stop()
        return alive

    def answers(self) -> list[dict[str, Any]]:
        """Return AWS's answers to the tool."""
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def facts(self) -> dict[str, Any]:
        """Return how AWS behaved; times are seconds."""
        answers, seen = self.answers(), self.watch.seen
        launches = [one["time"] for one in answers if (one["action"], one["code"]) == ("RunInstances", "")]
        ends = [one["time"] for one in answers if (one["action"], one["code"]) == ("TerminateInstances", "")]
        facts: dict[str, Any] = {"steps": self.steps}
        for what in ("listed", "private address", "public address", "public name", "running"):
            times = [max(0.0, one[what] - launches[0]) for one in seen.values() if what in one and launches]
            facts[f"{what} after RunInstances"] = spread(times)
        last = max((one["terminated"] for one in seen.values() if "terminated" in one), default=0.0)
        times = [one["terminated"] - ends[0] for one in seen.values() if "terminated" in one and ends]
        facts["terminated after TerminateInstances"] = spread(times)
        gone = self.watch.group_gone
        facts["security group removed after the last end"] = spread([max(0.0, gone - last)] if gone and last else [])
        codes = Counter(f"{one['action']}: {one['code']}" for one in answers if one["code"])
        facts["codes that the tool met"] = dict(codes)
        facts["codes that the watch met"] = dict(self.watch.codes)
        facts["calls"] = dict(Counter(one["action"] for one in answers))
        return facts | self.look_ups()

    def look_ups(self) -> dict[str, Any]:
        """Return what a look shows that costs nothing: Ubuntu's parameters, and the bucket's ETags."""
        facts: dict[str, Any] = {}
        ssm = cluster.open_client(self.settings, "ssm")
        ec2 = self.watch.ec2
        for release in RELEASES:
            try:
                facts[f"image of Ubuntu {release}"] = cluster.fetch_ubuntu(ec2, ssm, release)
            except cluster.ClusterError as error:
                facts[f"image of Ubuntu {release}"] = error.message
        if "syncData" in self.steps and self.steps["syncData"]["code"] == 0:
            s3, bucket, prefix = cluster.open_bucket(self.settings)
            key = "/".join(filter(None, [prefix, f"{self.group}.vol"]))
            head = s3.head_object(Bucket=bucket, Key=key)
            facts["encryption of an object"] = head.get("ServerSideEncryption", "none")
            facts["ETag of an object"] = head["ETag"]
            with cluster.tolerate():  # the tool's own policy does not allow it
                s3.delete_object(Bucket=bucket, Key=key)
        return facts


def table(facts: dict[str, Any]) -> str:
    """Return FACTS as a table for a person."""
    lines = ["| fact | seen |", "|---|---|"]
    for name, value in facts.items():
        rows = value.items() if isinstance(value, dict) and "least" not in value else [("", value)]
        for what, one in rows:
            shown = ", ".join(f"{key} {part}" for key, part in one.items()) if isinstance(one, dict) else one
            lines.append(f"| {f'{name} {what}'.strip()} | {'not seen' if shown is None else shown} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--yes-this-costs-money", "agreed", is_flag=True, help="You pay for the nodes: some cents.")
@click.option(
    "--config", type=click.Path(path_type=Path), envvar=cluster.CONFIG_VARIABLE, default=PROJECT / "config.py"
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results (default: a new one here).")
@click.argument("machine", metavar="[TYPE]", default="c5.large")
@click.argument("count", metavar="[COUNT]", type=click.IntRange(1, 20), default=2)
def main(agreed: bool, config: Path, output: Path | None, machine: str, count: int) -> None:
    """Run the session and report."""
    if not agreed:
        raise click.UsageError("this launches real nodes, which you pay for; add --yes-this-costs-money")
    group = f"live-{int(time.time())}-{os.getpid()}"
    folder = (output or Path.cwd() / group).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    live = Live(config.resolve(), group, folder)
    interrupted = False
    try:
        live.session(machine, count)
    except KeyboardInterrupt:
        interrupted = True
        live.interrupt()
    finally:
        left = live.end()
    facts = live.facts()
    (folder / "live.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "live.md").write_text(table(facts))
    click.echo(table(facts))
    click.echo(f"Results: {folder}")
    if left:
        raise click.ClickException(f"these nodes run on and COST MONEY: {', '.join(left)}")
    sys.exit(130 if interrupted else int(live.failed()))


if __name__ == "__main__":
    main(prog_name="python -m tests.live")
