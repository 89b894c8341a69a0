"""Once over the user's uplink: what goes to one node, and who passes it on to whom."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

import cluster
from tests.support import LocalCloud, free_port, wait_until

SIZE = 4_000_000
PATIENT: dict[str, float] = {
    "SPREAD_PATIENCE": 100,
    "PEER_TIMEOUT": 100,
}  # seconds: this machine may be slow, and nothing fails here


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that does not compress (process nodes do not look into it)."""
    path = tmp_path / "mitsuba.tar.gz"
    path.write_bytes(secrets.token_bytes(SIZE))
    return path


def received(cloud: LocalCloud) -> int:
    """Return how many bytes the nodes have got over SSH."""
    return sum(node["received"] for node in cloud.ask("status").values())


def folder(cloud: LocalCloud, node: dict[str, Any]) -> Path:
    """Return a process node's home."""
    return cloud.where.nodes / str(node["id"])


def have(cloud: LocalCloud, nodes: list[dict[str, Any]], package: Path) -> list[str]:
    """Return the names of the nodes that have the package, whole."""
    wanted = package.read_bytes()
    found = {node["name"]: list(folder(cloud, node).glob(".mitsuba-package/*")) for node in nodes}
    return [name for name, files in found.items() if [file.read_bytes() for file in files] == [wanted]]


def serving(cloud: LocalCloud) -> list[str]:
    """Return the ids of the processes that serve files on this cloud's nodes."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(path / "cwd")).is_relative_to(cloud.where.nodes):
                found += [path.name] if b"\nserve_files(" in (path / "cmdline").read_bytes() else []
    return found


def test_a_package_goes_once_over_the_uplink(cloud: LocalCloud, group: str, package: Path) -> None:
    settings = {"MITSUBA_PACKAGE": str(package)}
    assert cloud.cluster("createNodes", "c1.xlarge", "8", group).code == 0
    before = received(cloud)
    done = cloud.cluster("install", group, settings=settings, limits=PATIENT)
    assert (done.code, done.out.count(": Mitsuba 0.6.0\n")) == (0, 8), done.err
    sent = received(cloud) - before
    assert SIZE <= sent <= 1.05 * SIZE + 8 * 60_000, "programs and SSH itself are some 40 kB a node"
    nodes = cloud.nodes(group)
    assert len(have(cloud, nodes, package)) == 8
    wait_until(lambda: not serving(cloud), 60, "the end of the nodes' programs")

    assert cloud.cluster("createNodes", "c1.xlarge", "2", group).code == 0
    before = received(cloud)
    done = cloud.cluster("install", group, settings=settings, limits=PATIENT)
    assert (done.code, done.out.count(": Mitsuba 0.6.0\n")) == (0, 10), done.err
    assert received(cloud) - before < SIZE / 2, "nodes that were added later get it from the others"
    assert len(have(cloud, cloud.nodes(group), package)) == 10


def test_the_others_finish_where_nodes_fail(cloud: LocalCloud, group: str, package: Path) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "6", group).code == 0
    dies, no_source, no_disk, *good = cloud.nodes(group)
    cloud.fault("sync-dies", dies)
    cloud.fault("serve-fails", no_source)
    (folder(cloud, no_disk) / ".mitsuba-package").write_text("a file where the folder belongs")
    done = cloud.cluster("install", group, settings={"MITSUBA_PACKAGE": str(package)}, limits={"SPREAD_PATIENCE": 0})
    assert done.code == 1
    assert sorted(done.out.splitlines()) == sorted(f"{node['name']}: Mitsuba 0.6.0" for node in [no_source, *good])
    assert f"{no_disk['name']}: the package can't be brought to its home folder: .mitsuba-package/" in done.err
    failed = done.last_line.partition("failed: ")[2].split(", ")
    assert sorted(failed) == sorted([dies["name"], no_disk["name"]])
    assert len(have(cloud, [no_source, *good], package)) == 4


def test_killed_here_and_run_again(cloud: LocalCloud, group: str, package: Path) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "3", group).code == 0
    nodes = cloud.nodes(group)
    config = str(cloud.config({"MITSUBA_PACKAGE": str(package)}))
    env = cloud.environment(MITSUBA_CLUSTER_CONFIG=config)
    child = cloud.start(sys.executable, "cluster.py", "install", group, env=env)
    wait_until(lambda: [path for node in nodes for path in folder(cloud, node).glob(".mitsuba-cluster/*")])
    child.send_signal(signal.SIGKILL)
    child.communicate()
    wait_until(lambda: not serving(cloud), 60, "the end of the nodes' programs")
    done = cloud.cluster("install", group, env={"MITSUBA_CLUSTER_CONFIG": config})
    assert (done.code, done.out.count(": Mitsuba 0.6.0\n")) == (0, 3), done.err
    assert len(have(cloud, nodes, package)) == 3


class Idle:
    """A node whose connection is up."""

    @property
    def transport(self) -> Idle:
        """The connection."""
        return self

    def is_active(self) -> bool:
        """Say so."""
        return True


def make_spread(nodes: int) -> cluster.Spread:
    """Return the plan for files of no matter."""
    return cluster.Spread([], [], nodes)


@pytest.mark.parametrize(("count", "most"), [(1, 1), (2, 2), (8, 3), (64, 5)])
def test_the_nodes_that_have_it_triple_in_each_round(count: int, most: int) -> None:
    spread = make_spread(count)
    for _ in range(count):
        spread.hear()
    waiting, rounds, from_here = count, 0, 0
    while waiting:
        rounds += 1
        sources = [source for _ in range(waiting) if (source := spread.choose([]))]
        assert sources, "everybody waits"
        waiting -= len(sources)
        for source in sources:
            from_here += source.remote is None
            spread.give_back(source)
            spread.sources.append(cluster.Source(Idle()))  # type: ignore[arg-type]
    assert rounds <= most
    assert from_here == 1


def test_two_peers_that_fail_lead_here() -> None:
    spread = make_spread(1)
    spread.hear()
    spread.sources += [cluster.Source(Idle()) for _ in range(3)]  # type: ignore[arg-type]
    tried: list[cluster.Source] = []
    for _ in range(2):
        source = spread.choose(tried)
        assert source
        assert source.remote
        spread.give_back(source, failed=True)
        tried.append(source)
    source = spread.choose(tried)
    assert source
    assert not source.remote
    assert spread.choose(tried) is None, "one at a time from here"


def test_a_source_whose_two_receivers_come_at_once_starts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spread, peer = make_spread(2), cluster.Source(Idle())  # type: ignore[arg-type]
    together, again, begun = threading.Barrier(2), threading.Event(), list[object]()
    monkeypatch.setattr(
        Idle, "node", cluster.to_node({"InstanceId": "i-1", "State": {"Name": "running"}}), raising=False
    )

    def begin(source: cluster.Source, remote: cluster.Remote) -> None:
        begun.append(source)
        if len(begun) > 1:
            again.set()
        again.wait(0.2)
        source.channel = Running()  # type: ignore[assignment]

    def receive() -> None:
        together.wait(20)
        with spread.address(peer, Idle()):  # type: ignore[arg-type]
            pass

    monkeypatch.setattr(spread, "begin", begin)
    threads = [threading.Thread(target=receive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == [peer]


def test_nothing_is_sent_before_the_nodes_have_said_what_they_have() -> None:
    spread = make_spread(2)
    spread.hear()
    spread.until = float("inf")
    assert spread.choose([]) is None
    spread.hear()
    source = spread.choose([])
    assert source
    assert not source.remote


class Running:
    """The session of a program that runs."""

    def exit_status_ready(self) -> bool:
        """It has not ended."""
        return False


class Ended:
    """The session of a program that has ended with this code."""

    def __init__(self, code: int) -> None:
        self.code = code

    def exit_status_ready(self) -> bool:
        """It has ended."""
        return True

    def recv_exit_status(self) -> int:
        """Return its code."""
        return self.code


@pytest.mark.parametrize(("code", "from_here"), [(0, False), (1, True)])
def test_a_source_whose_time_is_up_has_not_failed(code: int, from_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file takes longer than a program serves: what came is kept, and the same node goes on."""
    spread = cluster.Spread([cluster.Wanted("big", 5, "", "", "", {})], [], 1)
    peer = cluster.Source(Idle())  # type: ignore[arg-type]
    spread.sources.append(peer)
    breaks, asked = 3, list[str]()

    @contextlib.contextmanager
    def address(source: cluster.Source, remote: cluster.Remote) -> Iterator[str]:
        source.channel = Ended(code) if source.remote else None  # type: ignore[assignment]
        yield "peer" if source.remote else "here"

    def fetch(_: cluster.Delivery, wanted: list[cluster.Wanted], *patience: int) -> cluster.Fetched:
        asked.append(wanted[0].url)
        if 0 < len(asked) - 1 <= breaks and wanted[0].url == "peer/0":
            raise cluster.NodeError("it can't be fetched")
        return cluster.Fetched(1, 0, len(asked) == 1, 5, 0)

    monkeypatch.setattr(spread, "address", address)
    monkeypatch.setattr(cluster.Delivery, "fetch", fetch)
    assert spread.bring(cluster.Delivery(Idle(), ".", lambda *_: None)).fetched == 1  # type: ignore[arg-type]
    assert asked == (["", "peer/0", "here/0"] if from_here else ["", *4 * ["peer/0"]])
    assert peer.failures == from_here


def test_a_source_that_another_receiver_has_started_anew_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = cluster.Spread([cluster.Wanted("big", 5, "", "", "", {})], [], 1)
    peer, old = cluster.Source(Idle()), Ended(0)  # type: ignore[arg-type]
    peer.channel = old  # type: ignore[assignment]
    spread.sources.append(peer)
    reports = iter([cluster.Fetched(0, 0, 1, 0, 5), None, cluster.Fetched(1, 0, 0, 5, 0)])

    def fetch(*_: Any) -> cluster.Fetched:
        if report := next(reports):
            return report
        peer.channel = Running()  # type: ignore[assignment]
        raise cluster.NodeError("it can't be fetched")

    monkeypatch.setattr(spread, "address", lambda source, remote: contextlib.nullcontext("peer"))
    monkeypatch.setattr(cluster.Delivery, "fetch", fetch)
    assert spread.bring(cluster.Delivery(Idle(), ".", lambda *_: None)).fetched == 1  # type: ignore[arg-type]
    assert peer.failures == 0


@pytest.mark.parametrize(
    ("error", "status"), [(cluster.NodeError("No space left"), cluster.OWN_FAULT), (cluster.SilentNode("is silent"), 0)]
)
def test_a_receivers_own_fault_is_not_its_sources(
    error: cluster.NodeError, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = cluster.Spread([], [], 1)
    peer = cluster.Source(Idle())  # type: ignore[arg-type]
    spread.sources.append(peer)
    reports = iter([cluster.Fetched(0, 0, 1, 0, 5)])

    def fetch(delivery: cluster.Delivery, *_: Any) -> cluster.Fetched:
        for report in reports:
            return report
        delivery.status = status
        raise error

    monkeypatch.setattr(spread, "address", lambda source, remote: contextlib.nullcontext("peer"))
    monkeypatch.setattr(cluster.Delivery, "fetch", fetch)
    with pytest.raises(cluster.NodeError, match=str(error)):
        spread.bring(cluster.Delivery(Idle(), ".", lambda *_: None))  # type: ignore[arg-type]
    assert (peer.failures, peer.receivers, peer in spread.sources) == (0, 0, True)


class Frozen:
    """The connection of a node that replies to no request that begins with WHICH, until it is closed."""

    def __init__(self, which: str) -> None:
        self.which, self.closed = which, threading.Event()

    def is_active(self) -> bool:
        """Tell whether it is open."""
        return not self.closed.is_set()

    def close(self) -> None:
        """Let paramiko's calls return."""
        self.closed.set()

    def request_port_forward(self, *_: Any) -> int:
        """Return a port, or wait as paramiko does."""
        if self.which == "request":
            self.closed.wait(60)
            raise paramiko.SSHException("TCP forwarding request denied")
        return 1

    def cancel_port_forward(self, *_: Any) -> None:
        """Wait as paramiko does."""
        self.closed.wait(60)


@pytest.mark.parametrize("which", ["request", "cancel"])
def test_a_node_that_freezes_while_it_is_fed_from_here_is_given_up(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next node must get its turn, however long the connection of this one stays open."""
    monkeypatch.setattr(cluster, "LIVENESS_LIMIT", 0.1)
    reports = iter([cluster.Fetched(0, 0, 1, 0, 5)])

    def fetch(*_: Any) -> cluster.Fetched:
        for report in reports:
            return report
        raise cluster.SilentNode("is silent")

    monkeypatch.setattr(cluster.Delivery, "fetch", fetch)
    node, transport = cluster.to_node({"InstanceId": "i-1", "State": {"Name": "running"}}), Frozen(which)
    spread = cluster.Spread([], [], 1)
    pool = cluster.NodePool(cluster.Settings(), None)  # type: ignore[arg-type]
    pool.remotes[node.id] = cluster.Remote(node, transport)  # type: ignore[arg-type]
    (outcome,) = pool.each([node], lambda remote: spread.bring(cluster.Delivery(remote, ".", lambda *_: None)))
    assert not outcome.ok
    assert transport.closed.is_set(), "paramiko was asked with a time limit"
    assert (spread.here.receivers, spread.sources) == (0, [spread.here])


class Reporting(Idle):
    """A node whose fetching programs report this, one after the other."""

    def __init__(self, *reports: list[dict[str, Any]]) -> None:
        self.reports = list(reports)
        self.node, self.id = self, "i-1"

    def run(self, program: str, **options: Any) -> tuple[int, str]:
        """Report."""
        for report in self.reports.pop(0):
            options["sink"](json.dumps(report).encode() + b"\n")
        return 0, ""


def test_the_bytes_of_several_sources_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of 20 bytes is there; one peer dies after 90 of 100."""
    end = {"present": 0, "fetched": 0, "missing": 0}
    node = Reporting(
        [{"moved": 0}, {"moved": 0, "lacking": 100} | end | {"missing": 1}],
        [{"moved": 0}, {"moved": 90, "lacking": 100}, {"moved": 90, "lacking": 100, "error": "it can't be fetched"}],
        [{"moved": 0}, {"moved": 10, "lacking": 10} | end | {"fetched": 1}],
    )
    spread, heard = cluster.Spread([cluster.Wanted("big", 120, "", "", "", {})], [], 1), list[tuple[int, int]]()
    spread.sources.append(cluster.Source(Idle()))  # type: ignore[arg-type]
    monkeypatch.setattr(spread, "address", lambda source, remote: contextlib.nullcontext("peer"))
    done = spread.bring(cluster.Delivery(node, ".", lambda *numbers: heard.append(numbers)))  # type: ignore[arg-type]
    assert (done.fetched, done.moved) == (1, 100)
    assert heard == [(0, 100), (90, 100), (90, 100), (100, 100)]


def test_the_bar_is_of_what_the_nodes_lack() -> None:
    class Bar:
        """An app whose nodes have finished at once."""

        settings = cluster.Settings()

        @property
        def pool(self) -> Bar:
            """Its nodes' connections."""
            return self

        def each(self, nodes: list[Reporting], step: Any, progress: cluster.Progress) -> None:
            """Work, and keep what the bar says."""
            for node in nodes:
                step(node)
            self.size, self.moved = progress.size, sum(progress.moved.values())

        def report(self, *_: Any) -> None:
            """Do nothing."""

    app, bring = Bar(), iter([(0, 0), (60, 60)])
    nodes = [Reporting(), Reporting()]
    for number, one in enumerate(nodes):
        one.id = str(number)
    done = cluster.Fetched(1, 0, 0, 60, 60)
    wanted = [cluster.Wanted("big", 100, "", "", "", {})]
    cluster.sync_nodes(app, nodes, wanted, lambda delivery: (delivery.show(*next(bring)), done)[1])  # type: ignore[arg-type]
    assert (app.size, app.moved) == (60, 60)


def serve(folder: Path, address: str, port: int, token: str) -> subprocess.Popen[str]:
    """Start a node's program that serves one file."""
    (folder / "data").write_bytes(bytes(range(256)) * 8000)
    wanted = cluster.Wanted("data", 2_048_000, "m", "", "", {})
    fetcher = cluster.Fetcher(str(folder))
    fetcher.save("record.json", {"data": fetcher.entry(wanted)})
    words = [sys.executable, "-I", "-c", cluster.node_program(cluster.serve_files), str(folder), address, str(port)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin
    assert child.stdout
    job = {"token": token, "seconds": 60, "wanted": [wanted._asdict()]}
    child.stdin.write(json.dumps(job) + "\n")
    child.stdin.flush()
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.fixture
def source(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A node's program that serves one file: the process, its port and the token."""
    port, token = free_port(), secrets.token_hex(16)
    with serve(tmp_path, "127.0.0.1", port, token) as child:
        yield child, port, token
        child.kill()


def test_a_source_takes_the_place_of_one_whose_client_is_cut_off(
    source: tuple[subprocess.Popen[str], int, str], tmp_path: Path
) -> None:
    stale, port, old = source
    with serve(tmp_path, "127.0.0.2", port, old) as elsewhere, serve(tmp_path, "127.0.0.1", port, "new") as child:
        assert stale.wait(20) == -signal.SIGKILL
        assert ask(port, "/0", old) == (403, b"")
        assert ask(port, "/0", "new", "bytes=5-9") == (206, bytes(range(5, 10)))
        assert elsewhere.poll() is None, "another address is another node"
        for one in (elsewhere, child):
            one.kill()


def test_a_source_ends_no_program_of_another_kind(tmp_path: Path) -> None:
    port = free_port()
    words = [sys.executable, "-c", "input()", "127.0.0.1", str(port)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as other:
        with serve(tmp_path, "127.0.0.1", port, "token") as child:
            child.kill()
        assert other.poll() is None
        other.communicate(b"\n")
        assert other.returncode == 0


def ask(port: int, path: str, token: str, span: str = "bytes=0-9", peer: str = "127.0.0.1") -> tuple[int, bytes]:
    """Send one request; return the status and the body."""
    with socket.create_connection(("127.0.0.1", port), 10, (peer, 0)) as stream:
        stream.sendall(f"GET {path} HTTP/1.1\r\nAuthorization: Bearer {token}\r\nRange: {span}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: stream.recv(1 << 16), b""))
    head, body = answer.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), body


def test_a_source_gives_its_files_to_who_knows_the_token(source: tuple[subprocess.Popen[str], int, str]) -> None:
    child, port, token = source
    assert ask(port, "/0", token, "bytes=5-9") == (206, bytes(range(5, 10)))
    assert len(ask(port, "/0", token, "bytes=0-2047999")[1]) == 2_048_000
    assert ask(port, "/0", "0" * 32) == (403, b"")
    assert ask(port, "/0", "") == (403, b"")
    for path in ("/1", "/etc/passwd", "/../data", "/0/../../etc/passwd"):
        assert ask(port, path, token) == (404, b""), path
    for span in ("bytes=0-2048000", "bytes=9-5", "bytes=-5", "bytes=0-", "lines=0-5"):
        assert ask(port, "/0", token, span) == (416, b""), span
    assert child.stdin
    child.stdin.close()
    assert child.wait(20) == 0, "its end is that of its input"


def test_a_source_serves_two_at_once() -> None:
    hold, release = threading.Event(), threading.Event()

    class Held:
        """A connection whose receiver takes nothing until it is released."""

        def __init__(self) -> None:
            self.sent = b""

        def settimeout(self, seconds: float) -> None:
            """Do nothing."""

        def close(self) -> None:
            """Do nothing."""

        def recv(self, size: int) -> bytes:
            """Return the request."""
            return b"GET /0 HTTP/1.1\r\nAuthorization: Bearer x\r\nRange: bytes=0-0\r\n\r\n"

        def sendall(self, data: bytes) -> None:
            """Wait, and keep what is sent."""
            hold.set()
            assert release.wait(20)
            self.sent += data

    server = cluster.FileServer("x", [1], ["/dev/zero"])
    streams = {peer: Held() for peer in ("a", "b", "c")}
    threads = []
    for peer in ("a", "b"):
        hold.clear()
        threads.append(threading.Thread(target=server.answer, args=(streams[peer], peer)))
        threads[-1].start()
        assert hold.wait(20)
    again, third = Held(), streams["c"]
    for peer, stream in (("c", third), ("a", again)):
        hold.clear()
        threads.append(threading.Thread(target=server.answer, args=(stream, peer)))
        threads[-1].start()
        assert hold.wait(20)
    release.set()
    for thread in threads:
        thread.join()
    codes = [re.findall(rb"HTTP/1.1 (\d+)", stream.sent)[0] for stream in (streams["a"], streams["b"], third, again)]
    assert codes == [b"206", b"206", b"503", b"206"]
