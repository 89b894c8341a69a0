"""What the tests share: a running local cloud, and the tool run in it as a user runs it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3

import cluster
from tests.localcloud.__main__ import ask, environment, inside
from tests.localcloud.delays import PACES
from tests.localcloud.places import PROJECT, Places

# `python cluster.py`, but from cached bytecode: to compile the file anew costs each run a sixth of a second.
LAUNCHER = """
import os, sys
from importlib.machinery import SourceFileLoader
del sys.argv[0]
__file__ = os.path.abspath(sys.argv[0])
sys.dont_write_bytecode, kept = False, sys.dont_write_bytecode
code = SourceFileLoader("__main__", __file__).get_code("__main__")
sys.dont_write_bytecode = kept
exec(code)
"""
TOOL = (sys.executable, "-c", LAUNCHER, "cluster.py")

LIMIT = 240  # seconds for one command, far beyond what any should take


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of stderr: the one that says what went wrong."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def impatience(limits: dict[str, float]) -> dict[str, str]:
    """Return the environment in which cluster.py has these LIMITS instead of its own."""
    return {"MITSUBA_CLUSTER_LIMITS": json.dumps(limits)}


class LocalCloud:
    """A running local cloud."""

    def __init__(self, where: Places, kind: str) -> None:
        self.where, self.kind = where, kind
        self.clients: dict[str, Any] = {}

    def environment(self, **changes: str) -> dict[str, str]:
        """Return the environment in which AWS means this cloud."""
        return environment(self.where) | changes

    def start(self, *words: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start any program inside the cloud."""
        command = inside(self.where, list(words))
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": PROJECT} | options
        return subprocess.Popen(command, env=env or self.environment(), text=True, **pipes)

    def run(self, *words: str, **options: Any) -> Result:
        """Run any program inside the cloud."""
        with self.start(*words, **options) as child:
            out, err = child.communicate(timeout=LIMIT)
            return Result(child.returncode, out, err)

    def cluster(
        self,
        *words: str,
        settings: dict[str, Any] | None = None,
        limits: dict[str, float] | None = None,
        env: dict[str, str] | None = None,
    ) -> Result:
        """Run ./cluster.py with WORDS; SETTINGS replace some of config.py, LIMITS some of its constants."""
        given = {"MITSUBA_CLUSTER_CONFIG": str(self.config(settings))} if settings is not None else {}
        patient = {"ANSWER_LIMIT": 30}  # healthy nodes of a slow machine may take their time
        given |= impatience(patient | (limits or {})) | (env or {})
        return self.run(*TOOL, *words, env=self.environment(**given))

    def config(self, settings: dict[str, Any]) -> Path:
        """Write a config.py that differs from the cloud's own in SETTINGS; return its path."""
        text = (self.where.root / "config.py").read_text()
        path = self.where.root / f"config-{time.monotonic_ns()}.py"
        path.write_text(text + "".join(f"{name} = {value!r}\n" for name, value in settings.items()))
        return path

    def fault(self, what: str, node: dict[str, Any]) -> None:
        """Let WHAT go wrong with a node."""
        self.ask("fault", {"node": node["id"], "what": what})

    def ask(self, what: str, body: Any = None) -> Any:
        """Ask the cloud itself for something."""
        return ask(self.where, what, body)

    @contextmanager
    def faults(self, *rules: dict[str, Any]) -> Iterator[None]:
        """Spoil AWS calls for a while."""
        self.ask("faults", list(rules))
        try:
            yield
        finally:
            self.ask("faults", [])

    @contextmanager
    def options(self, **changes: Any) -> Iterator[None]:
        """Change EC2's options for a while; pace="none" takes all of AWS's delays away."""
        changes = PACES[changes.pop("pace")] | changes if "pace" in changes else changes
        before = self.ask("options", {})
        self.ask("options", changes)
        try:
            yield
        finally:
            self.ask("options", {name: before[name] for name in changes})

    def calls(self, work: Callable[[], Any]) -> dict[str, int]:
        """Return how often each AWS action was called while WORK was done."""
        self.ask("counts")
        work()
        counts: dict[str, int] = self.ask("counts")
        return counts

    def client(self, service: str) -> Any:
        """Return a boto3 client ("exact s3": moto's); only for process clouds, which this process can reach."""
        if service not in self.clients:
            self.clients[service] = self.make_client(service)
        return self.clients[service]

    def make_client(self, service: str, region: str = "us-east-1") -> Any:
        """Make what client() keeps."""
        given = self.environment()
        url = given["AWS_ENDPOINT_URL_S3"] if service == "s3" else given["AWS_ENDPOINT_URL"]
        key, secret = given["AWS_ACCESS_KEY_ID"], given["AWS_SECRET_ACCESS_KEY"]
        session = boto3.Session(key, secret, region_name=region)
        return session.client(service.removeprefix("exact "), endpoint_url=url)

    def signed(self, group: str, host_key: str) -> list[dict[str, str]]:
        """Return the tags of a node of GROUP with this HOST_KEY, signed with the user's key."""
        identity = cluster.load_identity(self.where.root / "key.pem")
        tags = {cluster.TAG_HOST_KEY: host_key} | cluster.sign_launch(identity, group, host_key)
        return [{"Key": name, "Value": value} for name, value in tags.items()]

    def end(self, group: str) -> None:
        """End a group past the tool and past AWS's delays, as far as there is something left of it."""
        self.ask("wipe", group)

    def ask_state(self, name: str) -> str:
        """Return an instance's state as EC2 shows it: "pending" until lists show it with its address."""
        filters = [{"Name": "instance-id", "Values": [name]}]
        found = self.client("ec2").describe_instances(Filters=filters)["Reservations"]
        shown = found[0]["Instances"][0] if found else {"State": {"Name": "pending"}}
        state = str(shown["State"]["Name"])
        return state if state != "running" or shown.get("PublicIpAddress") else "pending"

    def truth(self, group: str) -> tuple[list[str], int]:
        """Return what there is of GROUP, listed yet or not: instances that are not terminated, security groups."""
        found = self.ask("truth", group)
        return sorted(one for one, state in found["instances"].items() if state != "terminated"), len(found["groups"])

    def status(self, group: str) -> dict[str, Any]:
        """Return what `status --json` says of GROUP; {} where it says nothing."""
        shown = self.cluster("status", group, "--json")
        assert shown.code == 0, shown.err
        groups: dict[str, Any] = json.loads(shown.out)["groups"]
        return dict(groups.get(group, {}))

    def nodes(self, group: str) -> list[dict[str, Any]]:
        """Return GROUP's nodes as `status --json` shows them; of process nodes without a run of it."""
        if self.kind == "nspawn":
            return list(self.status(group).get("nodes", []))
        groups = cluster.fetch_groups(group, self.client("ec2"))
        return [cluster.node_json(node) for one in groups for node in one.nodes]


def wait_until(check: Callable[[], Any], limit: float = 60, what: str = "it") -> Any:
    """Wait until CHECK returns something true; return that."""
    deadline = time.monotonic() + limit
    while True:
        if found := check():
            return found
        assert time.monotonic() < deadline, f"{what} did not happen within {limit} s"
        time.sleep(0.1)


def ssh(cloud: LocalCloud, node: dict[str, Any], command: str) -> Result:
    """Run a command on a real node, past the tool."""
    words = ["ssh", "-q", "-i", str(cloud.where.root / "key.pem"), "-o", "ConnectTimeout=5"]
    words += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    return cloud.run(*words, f"ubuntu@{node['address']}", command)


REACH = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
source, address, *ports = sys.argv[1:]
def reach(port):
    try:
        socket.create_connection((address, int(port)), 2, (source, 0)).close()
    except TimeoutError:
        return None
    except OSError as error:
        return f"{port} ({type(error).__name__})"
    return port
with ThreadPoolExecutor(256) as pool:
    print(*filter(None, pool.map(reach, ports)))
"""


def reachable(cloud: LocalCloud, source: str, address: str, *ports: int) -> str:
    """Return which PORTS of an address answer to a client at SOURCE, even by a refusal."""
    done = cloud.run(sys.executable, "-c", REACH, source, address, *map(str, ports))
    assert done.code == 0, done.err
    return done.out.strip()


def free_port() -> int:
    """Return a port that nobody has, and that the system gives to nobody: those begin at 32768."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def killed(cloud: LocalCloud, rule: dict[str, Any], *words: str) -> Result:
    """Run the tool, with a signal (SIGKILL, if none is named) from the endpoint at the call that RULE describes."""
    pid_file = cloud.where.root / f"pid-{words[-1]}"
    pid_file.unlink(missing_ok=True)
    with cloud.faults(rule | {"pid_file": str(pid_file)}):
        script = f'echo $$ > {pid_file}.part; mv {pid_file}.part {pid_file}; exec "$@"'
        return cloud.run("sh", "-c", script, "sh", *TOOL, *words)


def interrupt(child: subprocess.Popen[str], number: int = signal.SIGINT) -> Result:
    """Send a signal to a running command and return what it did."""
    os.kill(child.pid, number)
    out, err = child.communicate(timeout=LIMIT)
    return Result(child.returncode, out, err)


LAUNCHED = datetime(2026, 1, 1, tzinfo=timezone.utc)


def make_node(name: str, minutes: int = 0, **changes: Any) -> cluster.Node:
    """Return a running node that was launched MINUTES after the first."""
    return cluster.Node(name, "g", "c1.xlarge", "running", LAUNCHED + timedelta(minutes=minutes), **changes)


def create(cloud: LocalCloud, group: str, count: int = 2) -> None:
    """Create COUNT nodes and see it succeed."""
    made = cloud.cluster("createNodes", "c1.xlarge", str(count), group)
    assert made.code == 0, made.err


def serve(cloud: LocalCloud, group: str, count: int = 2) -> None:
    """Create COUNT nodes with running servers."""
    create(cloud, group, count)
    for command in ("install", "start"):
        done = cloud.cluster(command, group)
        assert done.code == 0, done.err
