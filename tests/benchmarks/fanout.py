"""One command on N hosts, by this tool and by its peers, over real sshd on loopback addresses."""

from __future__ import annotations

import functools
import getpass
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import measure, peers
from tests.localcloud.places import PROJECT
from tests.support import LocalCloud, free_port

SSHD = """\
Port {port}
ListenAddress 0.0.0.0
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
MaxStartups 1000
MaxSessions 100
LogLevel ERROR
"""
OURS = "cluster.py"


@contextmanager
def real_sshd(folder: Path, public_key: str) -> Iterator[tuple[int, str, int]]:
    """Run an sshd for this user; yield (its port, its host key, its process id)."""
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")], check=True)
    (folder / "authorized_keys").write_text(public_key)
    port = free_port()
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    with subprocess.Popen([*quiet_shell(), "/usr/sbin/sshd", "-D", "-f", str(folder / "sshd_config")]) as server:
        line = " ".join((folder / "host_key.pub").read_text().split()[:2])
        try:
            yield port, line, server.pid
        finally:
            server.terminate()


def quiet_shell() -> list[str]:
    """Return what keeps bash from reading a ~/.bashrc at each login, as far as root can: a fresh node has none."""
    if os.getuid() != 0:
        return []
    Path("/run/sshd").mkdir(exist_ok=True)
    script = '[ ! -e ~/.bashrc ] || mount --bind /dev/null ~/.bashrc; exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


def child_cpu(pid: int) -> float:
    """Return the seconds that a process's ended children have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Fanout:
    """A local cloud whose nodes' addresses lead to one real sshd."""

    cloud: LocalCloud
    port: int
    sshd: int
    env: dict[str, str]
    key: str

    def addresses(self, count: int) -> list[str]:
        """Return the addresses of the group with COUNT nodes."""
        return [node["address"] for node in self.cloud.nodes(f"g{count}")]

    def hosts(self, count: int) -> peers.Hosts:
        """Return the same hosts as the peers take them."""
        return peers.Hosts(self.addresses(count), self.port, getpass.getuser(), self.key)

    def ours(self, *words: str) -> measure.Sample:
        """Run this tool."""
        return measure.run([sys.executable, str(PROJECT / "cluster.py"), *words], self.env)


@contextmanager
def prepared(cloud: LocalCloud, sizes: tuple[int, ...]) -> Iterator[Fanout]:
    """Make groups of these SIZES, and lead them to a real sshd."""
    for size in sizes:
        done = cloud.cluster("createNodes", "c1.xlarge", str(size), f"g{size}")
        assert done.code == 0, done.err
    key = cloud.where.root / "key.pem"
    public = subprocess.run(["ssh-keygen", "-y", "-f", str(key)], check=True, capture_output=True, text=True).stdout
    with real_sshd(cloud.where.root / "sshd", public) as (port, host_key, pid):
        ids = []
        for size in sizes:
            group = [node["id"] for node in cloud.nodes(f"g{size}")]
            cloud.client("ec2").create_tags(Resources=group, Tags=cloud.signed(f"g{size}", host_key))
            ids += group
        settings = cloud.config({"SSH_PORT": port, "SSH_USER": getpass.getuser()})
        env = cloud.environment(MITSUBA_CLUSTER_CONFIG=str(settings))
        yield Fanout(cloud, port, pid, env, str(key))
        cloud.client("ec2").create_tags(Resources=ids, Tags=[{"Key": "mitsuba-group", "Value": "done"}])


def measure_command(bench: Fanout, sizes: tuple[int, ...], rounds: int, command: str = "true") -> dict[str, Any]:
    """Run COMMAND on each group by every tool; return size -> tool -> figures, with no-ops and the server's cost."""
    folder = peers.environment()
    plain = {name: functools.partial(measure.run, words) for name, words in peers.no_ops(folder).items()}
    results: dict[str, Any] = {"no-op": {}, "sizes": {}}
    for size in sizes:
        lines = peers.command_lines(bench.hosts(size), command, folder)
        things: dict[str, Any] = {name: functools.partial(measure.run, words) for name, words in lines.items()}
        things[OURS] = functools.partial(bench.ours, "runCommand", command, f"g{size}")
        things["no-op of cluster.py"] = functools.partial(look_up, bench, f"g{size}")
        found = measure.interleaved(things, rounds)
        before = child_cpu(bench.sshd)
        measure.run(lines["asyncssh"])
        time.sleep(0.5)  # for sshd to reap its last children
        found["sshd itself"] = measure.Series([measure.Sample(0, child_cpu(bench.sshd) - before)])
        results["sizes"][size] = {name: {"wall": one.wall, "cpu": one.cpu} for name, one in found.items()}
    results["no-op"] = {name: one.wall for name, one in measure.interleaved(plain, rounds).items()}
    return results


FIVE_STEPS = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import cluster
from pathlib import Path
settings = cluster.load_settings(Path(os.environ["MITSUBA_CLUSTER_CONFIG"]))
app = cluster.App(Path(os.environ["MITSUBA_CLUSTER_CONFIG"]))
nodes = cluster.fetch_nodes(app.ec2, sys.argv[2])
app.identity
start = time.monotonic()
for _ in range(5):
    outcomes = app.pool.each(nodes, lambda remote: remote.check("true"))
    assert all(outcome.ok for outcome in outcomes), outcomes
print(time.monotonic() - start)
"""
LOOK_UP = """
import os, sys
sys.path.insert(0, sys.argv[1])
import cluster
from pathlib import Path
assert cluster.App(Path(os.environ["MITSUBA_CLUSTER_CONFIG"])).open_group(sys.argv[2])
os._exit(0)
"""
PROFILE = """
import collections, cProfile, json, os, pstats, sys, threading, time
sys.path.insert(0, sys.argv[1])
import cluster
from pathlib import Path
app = cluster.App(Path(os.environ["MITSUBA_CLUSTER_CONFIG"]))
nodes = app.open_group(sys.argv[2])
profiles = []
def begin(*_):
    profiles.append(cProfile.Profile(time.thread_time))
    profiles[-1].enable()
threading.setprofile(begin)
outcomes = app.pool.each(nodes, lambda remote: remote.check("true"))
assert all(outcome.ok for outcome in outcomes), outcomes
found = collections.Counter()
for profile in profiles:
    for (path, _, name), (_, _, seconds, *_) in pstats.Stats(profile).stats.items():
        if "recv" not in name:  # in which each connection still waits, with a clock of another thread
            found["in C" if path == "~" else "/".join(path.split("/")[-2:])] += seconds
print(json.dumps(found))
os._exit(0)
"""
RECONNECTING = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import paramiko
port, user, key, *hosts = sys.argv[1:]
def one(host):
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect(host, int(port), user, key_filename=key, allow_agent=False, look_for_keys=False)
    assert client.exec_command("true")[1].channel.recv_exit_status() == 0
    client.close()
start = time.monotonic()
for _ in range(5):
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(one, hosts))
print(time.monotonic() - start)
"""


def look_up(bench: Fanout, group: str) -> measure.Sample:
    """Do all that runCommand does before its first connection: import what it needs, and ask EC2 for the nodes."""
    return measure.run([sys.executable, "-c", LOOK_UP, str(PROJECT), group], bench.env)


def profile(bench: Fanout, size: int) -> dict[str, float]:
    """Return file -> share of the processor time that `true` on SIZE nodes takes in this tool's threads."""
    words = [sys.executable, "-c", PROFILE, str(PROJECT), f"g{size}"]
    found = json.loads(subprocess.run(words, env=bench.env, check=True, capture_output=True, text=True).stdout)
    total = sum(found.values())
    return {name: seconds / total for name, seconds in sorted(found.items(), key=lambda pair: -pair[1])[:8]}


def printed(words: list[str], env: dict[str, str]) -> measure.Sample:
    """Run a program that prints its own wall time."""
    done = subprocess.run(words, env=env, check=True, capture_output=True, text=True)
    return measure.Sample(float(done.stdout), 0)


def measure_five_steps(bench: Fanout, size: int, rounds: int) -> dict[str, float]:
    """Return the seconds of five steps on SIZE nodes: ours, and paramiko reconnecting for each."""
    hosts = bench.hosts(size)
    theirs = [sys.executable, "-c", RECONNECTING, str(hosts.port), hosts.user, hosts.key, *hosts.addresses]
    ours = [sys.executable, "-c", FIVE_STEPS, str(PROJECT), f"g{size}"]
    things = {"paramiko": lambda: printed(theirs, bench.env), OURS: lambda: printed(ours, bench.env)}
    return {name: one.wall for name, one in measure.interleaved(things, rounds).items()}


MEMORY = """
import json, os, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import cluster
app = cluster.App(Path(os.environ["MITSUBA_CLUSTER_CONFIG"]))
nodes = cluster.fetch_nodes(app.ec2, sys.argv[2])
app.identity
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
app.pool
before = resident()
start, cpu = time.monotonic(), time.process_time()
outcomes = app.pool.each(nodes, lambda remote: remote.check("true"), limit=300)
wall, busy = time.monotonic() - start, time.process_time() - cpu
after = resident()
cpu = time.process_time()
time.sleep(10)
idle = (time.process_time() - cpu) / 10
good = sum(outcome.ok for outcome in outcomes)
print(json.dumps({"good": good, "wall": wall, "cpu": busy, "memory": after - before, "idle": idle}))
os._exit(0)
"""


def measure_connections(cloud: LocalCloud, group: str) -> dict[str, float]:
    """Connect to every node of a group of process nodes and stay idle; return memory, processor time and success."""
    words = [sys.executable, "-c", MEMORY, str(PROJECT), group]
    done = subprocess.run(words, env=cloud.environment(), check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found
