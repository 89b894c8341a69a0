"""The guard's functions: the handshake against literal bytes, its decisions over recorded looks and a made-up clock."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster
from tests.support import wait_until

GREETING = bytes.fromhex("1bcd302e362e30000300")  # of mitsuba-server's documentation: 0.6.0, single precision
BUILD = "0.6.0 3 0"
ANSWER = bytes.fromhex("1bcd000469702d3137322d33312d302d3500")  # 4 cores, ip-172-31-0-5
REFUSAL = bytes.fromhex("000d")


def own_address() -> str:
    """Return a loopback address that no other test uses: there mtssrv's own port is free for sure."""
    return str(ipaddress.IPv4Address("127.192.0.0") + secrets.randbelow(1 << 22))


class Peer:
    """A server on loopback that records what it got, and answers with fixed bytes."""

    def __init__(self, *answers: bytes, silent: bool = False, endless: bool = False) -> None:
        self.address = own_address()
        self.listener = socket.create_server((self.address, cluster.SERVER_PORT))
        self.got: list[bytes] = []
        self.ended: list[str] = []
        self.answers, self.silent, self.endless = answers, silent, endless
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        """Answer one connection for each of the answers."""
        with self.listener:
            for answer in self.answers:
                connection, _ = self.listener.accept()
                with connection:
                    self.converse(connection, answer)

    def converse(self, connection: socket.socket, answer: bytes) -> None:
        """Answer one greeting and note how the connection ends."""
        got = connection.recv(100)
        if not self.silent:
            connection.sendall(answer)
            if len(answer) < 2:
                connection.shutdown(socket.SHUT_WR)
        try:
            while self.endless:
                connection.sendall(b"x")
                time.sleep(0.01)
            while more := connection.recv(100):
                got += more
            self.ended.append("closed")
        except (ConnectionResetError, BrokenPipeError):
            self.ended.append("reset")
        self.got.append(got)

    @contextlib.contextmanager
    def dial(self, limit: float) -> Iterator[socket.socket]:
        """Connect to it."""
        with socket.create_connection((self.address, cluster.SERVER_PORT), limit) as connection:
            yield connection


def test_handshake_sends_and_reads_mitsubas_very_bytes() -> None:
    peer = Peer(ANSWER)
    assert cluster.handshake(peer.dial, BUILD, 20) == (4, "ip-172-31-0-5")
    peer.thread.join(20)
    assert peer.got == [GREETING + bytes.fromhex("000c")]
    assert peer.ended == ["closed"]


def test_handshake_greets_as_the_build_that_is_installed() -> None:
    peer = Peer(REFUSAL)
    with pytest.raises(cluster.AnotherBuild):
        cluster.handshake(peer.dial, "0.6.1 30 1", 20)
    peer.thread.join(20)
    assert peer.got == [bytes.fromhex("1bcd302e362e31001e01")]


@pytest.mark.parametrize(
    ("answer", "error"),
    [(b"", EOFError), (b"HTTP/1.1 400", ValueError), (b"\x1b", EOFError), (ANSWER[:4] + 300 * b"n", ValueError)],
    ids=["closes", "another protocol", "half", "endless name"],
)
def test_handshake_with_a_stranger(answer: bytes, error: type[Exception]) -> None:
    peer = Peer(answer)
    with pytest.raises(error):
        cluster.handshake(peer.dial, BUILD, 20)
    peer.thread.join(20)


@pytest.mark.parametrize(
    ("answer", "options"),
    [(b"", {"silent": True}), (ANSWER[:4], {"endless": True})],
    ids=["silent", "a name that drips"],
)
def test_one_deadline_ends_a_whole_handshake(answer: bytes, options: dict[str, bool]) -> None:
    peer = Peer(answer, **options)
    with pytest.raises(TimeoutError):
        cluster.handshake(peer.dial, BUILD, 0.5)
    peer.thread.join(20)


def test_a_server_that_talks_on_after_the_end_is_left_in_time() -> None:
    peer = Peer(ANSWER, endless=True)
    started = time.monotonic()
    assert cluster.handshake(peer.dial, BUILD, 1)[0] == 4
    assert time.monotonic() - started < 20
    peer.thread.join(20)


def test_a_probe_that_gives_up_resets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset of a connection that it has not accepted yet ends the real server."""
    monkeypatch.setattr(cluster, "GUARD_TIMEOUT", 0.3)
    address = own_address()
    with socket.create_server((address, cluster.SERVER_PORT)) as frozen:
        answer = cluster.ask_address(address, BUILD, 8)
        assert not answer.alive
        connection, _ = frozen.accept()
        with connection:
            connection.getpeername()
            assert connection.recv(100) == GREETING
            assert connection.recv(100) == b""


@pytest.mark.parametrize(
    ("answer", "most", "expected"),
    [
        (ANSWER, 4, cluster.Answer(True)),
        (ANSWER, 2, cluster.Answer(True, "announces 4 cores, and its node has 2")),
        (ANSWER[:2] + b"\xff\xff" + ANSWER[4:], 8, cluster.Answer(True, "announces -1 cores, and its node has 8")),
        (REFUSAL, 8, cluster.Answer(True, "is another build of Mitsuba than this node's")),
    ],
)
def test_what_a_handshake_tells_the_guard(answer: bytes, most: int, expected: cluster.Answer) -> None:
    assert cluster.ask_address(Peer(answer).address, BUILD, most) == expected


def test_one_bad_server_keeps_no_round_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "GUARD_TIMEOUT", 1)
    good, silent, drips = Peer(ANSWER), Peer(b"", silent=True), Peer(ANSWER[:4], endless=True)
    found = cluster.ask_all({one.address: 8 for one in (good, silent, drips)}, BUILD)
    assert {one: answer.alive for one, answer in found.items()} == {
        good.address: True,
        silent.address: False,
        drips.address: False,
    }


def test_nothing_but_a_plain_file_is_read(tmp_path: Path) -> None:
    plain, link, fifo = tmp_path / "plain", tmp_path / "link", tmp_path / "fifo"
    plain.write_text("10.0.0.1\n")
    link.symlink_to(plain)
    os.mkfifo(fifo)
    assert cluster.read_file(str(plain)) == "10.0.0.1\n"
    assert [cluster.read_file(str(path)) for path in (link, fifo, tmp_path, tmp_path / "none")] == ["", "", "", ""]
    assert cluster.read_file("/dev/zero") == ""


def test_the_guard_is_a_program_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PLAN_PATH", str(tmp_path / "plan.json"))
    monkeypatch.setattr(cluster, "LINKED_PATH", str(tmp_path / "linked"))
    monkeypatch.setattr(cluster, "GUARD_TIMEOUT", 20)
    good, greedy = Peer(ANSWER), Peer(ANSWER)
    plan = {"role": "head", "build": BUILD, "workers": {good.address: 4, greedy.address: 2}, "branches": {}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    path = tmp_path / "guard.py"
    path.write_text(cluster.node_program.__wrapped__(cluster.guard_node))
    done = subprocess.run([sys.executable, "-I", str(path), "filter"], capture_output=True, text=True, check=False)
    assert done.stdout == f"{greedy.address} is left out: it announces 4 cores, and its node has 2\n", done
    assert (tmp_path / "linked").read_text() == f"{good.address}\n"


SYSTEMCTL = """#!/bin/sh
[ "$1" != poweroff ] || kill $PPID
"""


@pytest.mark.parametrize("role", ["node", "worker"])
def test_what_ends_a_node_stands_in_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    for name in ("PLAN", "IDLE", "LINKED", "MEMORY", "STATE", "MARK"):
        monkeypatch.setattr(cluster, f"{name}_PATH", str(tmp_path / name))
    monkeypatch.setattr(cluster, "USE_LOOK", 0.2)
    (tmp_path / "IDLE").write_text(f"{1 / 60}\n")
    head = own_address()  # where nobody listens
    if role == "worker":
        (tmp_path / "PLAN").write_text(json.dumps({"role": role, "build": BUILD, "own": head, "head": head}))
    for name, text in (("systemctl", SYSTEMCTL), ("ss", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    program = cluster.node_program.__wrapped__(cluster.guard_node).replace("/dev/pts/", f"{tmp_path}/pts/")
    words = [sys.executable, "-I", "-u", "-c", program]
    given = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=given, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    lines = re.sub(r"for \d+s", "for 1s", done.stdout).splitlines()
    unused = "unused for 1s (before that: the node booted)"
    asked = [f"{unused}, and the head {head} does not answer: {times} of 3" for times in (1, 2, 3)]
    assert lines == [
        f"guards this {role}, which ends after 1s without use",
        *(asked if role == "worker" else ()),
        f"ends this node: {unused}",
    ]


def test_user_data_has_room_for_the_guard() -> None:
    """EC2 takes 16 KB in all."""
    private, public = cluster.make_ed25519()
    assert len(cluster.make_user_data(private, public, 8, 60)) < 16 * 1024 - 1500
    assert len(cluster.make_user_data(private, public, 8, 0)) < 4096


OWN, OTHER = "10.0.0.1", "10.0.0.2"
GOOD, SILENT = cluster.Answer(True), cluster.Answer(False, "does not answer")


def rounds(*answers: tuple[float, cluster.Answer, str]) -> cluster.Links:
    """Carry on with rounds at which OTHER answered so, and was linked or not."""
    links = cluster.Links()
    for now, answer, linked in answers:
        links = cluster.renew_links(links, now, OWN, frozenset(linked.split()), {OWN: GOOD, OTHER: answer})
    return links


def test_a_linked_worker_that_is_silent_is_found_after_a_while() -> None:
    links = rounds((0, GOOD, OTHER), (1, SILENT, OTHER), (11, SILENT, OTHER), (21, SILENT, OTHER))
    assert cluster.find_silent(links, 21) == []
    assert cluster.find_silent(links, 22) == [OTHER]
    strange = cluster.Answer(True, "is another build")
    assert cluster.find_silent(rounds(*((now, strange, OTHER) for now in (0, 10, 20, 30))), 40) == []


def test_no_worker_of_thousands_is_lost_by_a_handshake_or_two() -> None:
    """With 4,000 of them a round takes more than 20 s."""
    missed = [(22.0, SILENT, OTHER), (44.0, SILENT, OTHER)]
    assert cluster.find_silent(rounds((0, GOOD, OTHER), *missed), 44) == []
    assert cluster.find_silent(rounds((0, GOOD, OTHER), *missed, (66, SILENT, OTHER)), 66) == [OTHER]
    assert cluster.find_silent(rounds((0, GOOD, OTHER), *missed, (66, GOOD, OTHER), (88, SILENT, OTHER)), 109) == []


def test_not_all_of_thousands_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, asked, most = threading.Lock(), 0, 0

    def ask(*_: Any) -> cluster.Answer:
        nonlocal asked, most
        with lock:
            asked += 1
            most = max(most, asked)
        time.sleep(0.02)
        with lock:
            asked -= 1
        return GOOD

    monkeypatch.setattr(cluster, "WATCH_RATE", 3)
    monkeypatch.setattr(cluster, "ask_address", ask)
    assert len(cluster.ask_all({str(one): 4 for one in range(12)}, BUILD)) == 12
    assert most <= 3


def test_a_head_whose_filter_waits_for_sub_heads_is_let_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One refuses and one is frozen: that takes the filter longer than a silence may last."""
    now, state, restarts = 0, "activating", []

    def run(*words: str) -> str:
        if words[1] == "restart":
            restarts.append(now)
        return f"{state}\n"

    monkeypatch.setattr(cluster, "run_quietly", run)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(cluster, "LINKED_PATH", str(tmp_path / "linked"))
    (tmp_path / "linked").write_text(f"{OTHER}\n")
    monkeypatch.setattr(cluster, "ask_all", lambda addresses, _: dict.fromkeys(addresses, SILENT))
    plan = {"role": "head", "build": BUILD, "own": OWN, "workers": {OTHER: 4}, "branches": {}}
    links = cluster.Links()
    for moment in range(0, 60, 3):
        now = moment
        links = cluster.keep_serving(plan, links)
    assert restarts == []
    state = "active"  # but hangs: it connects to the frozen one
    for moment in range(60, 85, 3):
        now = moment
        links = cluster.keep_serving(plan, links)
    assert restarts == [81]


@pytest.mark.parametrize(("restarts", "linked"), [(True, f"{OTHER}\n"), (False, "")])
def test_the_filter_waits_for_a_worker_that_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: bool, linked: str
) -> None:
    refuses, now = cluster.Answer(False, "does not answer", refuses=True), 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(cluster, "LINKED_PATH", str(tmp_path / "linked"))
    monkeypatch.setattr(
        cluster, "ask_all", lambda addresses, _: dict.fromkeys(addresses, GOOD if restarts and now else refuses)
    )
    cluster.filter_workers({"role": "head", "build": BUILD, "own": OWN, "workers": {OTHER: 4}, "branches": {}})
    assert (tmp_path / "linked").read_text() == linked
    assert now == (1 if restarts else cluster.RESTART_LIMIT)


def test_a_worker_that_comes_back_is_linked_once_nobody_is_there() -> None:
    links = rounds((0, SILENT, ""), (10, GOOD, ""), (40, GOOD, ""))
    assert cluster.find_joining(links, 39, quiet=-60) == []
    assert cluster.find_joining(links, 40, quiet=-20) == [OTHER]
    assert cluster.find_joining(links, 40, quiet=-19) == []


def test_a_worker_that_comes_and_goes_waits_longer_each_time() -> None:
    links = rounds((0, GOOD, OTHER), (1, SILENT, ""), (2, GOOD, ""))
    assert cluster.find_joining(links, 61, quiet=-100) == []
    assert cluster.find_joining(links, 62, quiet=-100) == [OTHER]
    links = rounds((0, GOOD, OTHER), (1, GOOD, ""), (2, GOOD, OTHER), (3, GOOD, ""))
    assert cluster.find_joining(links, 122, quiet=-100) == []
    assert cluster.find_joining(links, 123, quiet=-100) == [OTHER]


def test_a_worker_that_announces_too_much_is_never_linked() -> None:
    links = rounds((0, cluster.Answer(True, "announces 9000 cores"), ""), (99, cluster.Answer(True, "announces …"), ""))
    assert cluster.find_joining(links, 9999, quiet=0) == []
    assert links.named == {OTHER}


CONNECTIONS = """\
0      0      172.31.0.5:7554  203.0.113.9:40312 users:(("mtssrv",pid=301,fd=5)) cubic wscale:7,7 rto:204 rtt:0.1/0.05 \
mss:1448 cwnd:10 segs_in:2 lastsnd:20 lastrcv:20 lastack:20 delivered:1
0      0      172.31.0.5:7554  172.31.0.5:53058  users:(("mtssrv",pid=301,fd=6)) cubic rto:204 ato:40 mss:32768 \
bytes_sent:7 bytes_retrans:3 bytes_acked:7 bytes_received:100 segs_out:2 segs_in:4 lastsnd:120
0      0      172.31.0.5:40100 172.31.0.6:7554   users:(("mtssrv",pid=301,fd=4)) cubic bytes_sent:9 bytes_acked:9
0      36     172.31.0.5:22    192.0.2.10:51000  users:(("sshd",pid=410,fd=4),("sshd",pid=400,fd=4)) cubic \
bytes_sent:5000 bytes_acked:4000 bytes_received:3000 unacked:1
0      0      [::ffff:172.31.0.5]:22 [::ffff:192.0.2.10]:51001 users:(("sshd-session",pid=510,fd=4)) cubic \
bytes_received:21
"""


def test_connections_are_read_as_ss_prints_them() -> None:
    servers, logins = cluster.read_connections(CONNECTIONS)
    assert servers == {"203.0.113.9:40312": 0.02, "172.31.0.5:53058": 0}  # has received just now
    assert logins == {"192.0.2.10:51000": 7000, "[::ffff:192.0.2.10]:51001": 21}


class Clock:
    """Looks at a made-up node, one after the other."""

    def __init__(self, role: str = "head", limit: float = 3600) -> None:
        self.role, self.limit = role, limit
        self.look = cluster.Look(1000, 5.0, False, {}, {}, {})
        self.memory = cluster.remember(None, self.look)
        self.moved: dict[str, tuple[int, float]] = {}  # what is connected -> (its bytes, when they last changed)

    def after(self, seconds: float, servers: dict[str, int] | None = None, **changes: Any) -> Clock:
        """Go on by so many seconds, a look every ten (a head) or sixty; CHANGES come with the first.

        SERVERS are what is connected to mtssrv from then on, and the bytes that it has moved.
        """
        pause = 10 if self.role == "head" else 60
        end = self.look.at + seconds
        self.idle = False  # it was, at a look
        while self.look.at < end:
            at = self.look.at + pause
            if servers is not None:
                now = {peer: (count, at) for peer, count in servers.items()}
                same = {peer: self.moved[peer] for peer in now if self.moved.get(peer, (None,))[0] == servers[peer]}
                self.moved, servers = now | same, None
            silences = {peer: at - moved for peer, (_, moved) in self.moved.items()}
            self.look = self.look._replace(at=at, left=False, servers=silences, **changes)
            changes = {}
            self.memory = cluster.remember(self.memory, self.look)
            judged = self.memory.at == self.memory.base.at
            self.idle = self.idle or (judged and cluster.is_idle(self.memory, self.limit))
        return self

    @property
    def silences(self) -> dict[str, float]:
        """The clients, and for how long they have been silent."""
        return {peer: silent for peer, (_, silent) in cluster.find_clients(self.memory).items()}


CLIENT = "203.0.113.9:40312"


@pytest.mark.parametrize("role", ["head", "worker"])
def test_an_unused_node_is_idle_after_its_limit_and_not_before(role: str) -> None:
    clock = Clock(role)
    assert not clock.after(3540).idle
    assert clock.after(60).idle
    assert not Clock(role, limit=0).after(7200).idle


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({"computed": 5 + 0.06 * 60}, True),
        ({"computed": 5 + 0.04 * 60}, False),
        ({"touched": {"/dev/pts/0": 1}}, True),
        ({"logins": {"192.0.2.10:51000": 100_001}}, True),
        ({"logins": {"192.0.2.10:51000": 99_999}}, False),
        ({}, False),
    ],
)
def test_what_counts_as_use(change: dict[str, Any], used: bool) -> None:
    clock = Clock("worker")
    clock.after(3000).after(60, **change)
    assert clock.after(600).idle != used


def test_an_idle_shell_counts_only_when_it_is_typed_into() -> None:
    clock = Clock("worker").after(60, touched={"/dev/pts/0": 1})
    assert not clock.after(3000).idle
    assert clock.after(600).idle
    assert not clock.after(60, touched={"/dev/pts/0": 2}).idle


def test_a_watch_of_a_big_cluster_is_no_use() -> None:
    base = cluster.Look(0, 0, False, {}, {"a": 0}, {})
    look = base._replace(at=60, logins={"a": 300_000})
    assert cluster.find_use(base, look, [], workers=1000) == ""
    assert cluster.find_use(base, look, [], workers=10) == "an SSH connection moved data"


def test_a_client_is_what_two_looks_see() -> None:
    clock = Clock().after(10, servers={CLIENT: 200})
    assert clock.silences == {}
    assert clock.after(10).silences == {CLIENT: 10}
    assert clock.after(10, servers={CLIENT: 300}).silences == {CLIENT: 0}
    assert clock.after(10, servers={}).silences == {}


def test_no_head_ends_under_somebody_who_has_just_connected() -> None:
    clock = Clock().after(3590)
    assert not clock.after(10, servers={CLIENT: 200}).idle
    assert Clock().after(3600, servers={}).idle


def test_a_command_between_two_judgements_is_use_of_a_head_but_nobody_who_connects() -> None:
    clock = Clock().after(3550)
    quiet = clock.memory.quiet
    clock.after(10, touched={cluster.MARK_PATH: 1}).after(40)
    assert clock.memory.how == "a terminal had input, or a command of cluster.py was at work"
    assert clock.memory.quiet == quiet
    assert not clock.after(3500).idle
    assert clock.after(120).idle


def test_a_head_keeps_a_silent_client_for_four_hours() -> None:
    clock = Clock().after(20, servers={CLIENT: 200})
    assert not clock.after(4 * 3600 - 120).idle
    assert clock.after(180).idle


def test_a_client_that_renders_is_use_and_one_that_leaves_starts_the_clock() -> None:
    clock = Clock().after(20, servers={CLIENT: 200}).after(3 * 3600)
    clock.after(60, servers={CLIENT: 900})
    assert clock.memory.how == "a client moved bytes"
    assert not clock.after(4 * 3600 - 120).idle
    assert not clock.after(60, servers={}).idle
    assert not clock.after(3480).idle
    assert clock.after(120).idle


def test_a_short_render_between_two_looks_is_seen_when_it_ends() -> None:
    clock = Clock().after(100)
    quiet = clock.memory.quiet
    clock.look = clock.look._replace(at=clock.look.at + 10, left=True)
    clock.memory = cluster.remember(clock.memory, clock.look)
    assert clock.memory.quiet == quiet + 110
    assert clock.memory.how == "a client left"
    clock.after(100)
    assert clock.memory.quiet == quiet + 110
    assert not clock.after(3480).idle
    assert clock.after(120).idle


@pytest.mark.skipif(not shutil.which("ss"), reason="needs ss")
@pytest.mark.parametrize(("size", "client"), [(12, False), (1000, True)])
def test_a_connection_that_ends_was_a_client_if_it_brought_more_than_a_handshake(
    monkeypatch: pytest.MonkeyPatch, size: int, client: bool
) -> None:
    """So neither status, run from cron, nor a worker that asks for its head keeps nodes from being linked."""

    def visit() -> bytes:
        with socket.create_connection(listener.getsockname()) as visitor, listener.accept()[0] as server:
            visitor.sendall(bytes(size))
            received = 0
            while received < size:
                received += len(server.recv(size))
        return (ends.stdout and ends.stdout.read()) or b""

    with socket.create_server((own_address(), 0)) as listener:
        monkeypatch.setattr(cluster, "SERVER_PORT", listener.getsockname()[1])
        with cluster.watch_ends() as ends:
            text = wait_until(visit, 60, "the report of a connection's end")
            told: Any = SimpleNamespace(stdout=io.BytesIO(text))
            assert cluster.has_left(told) == client, text
            ends.kill()


def test_without_ss_a_guard_only_misses_short_visits(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["sh", "-c", "exit 125"], stdout=subprocess.PIPE) as ends:
        ends.wait()
        assert not cluster.has_left(ends)
        assert not cluster.has_left(ends)
    assert capsys.readouterr().out == "ss has ended (125): short visits of clients are not noticed any more\n"


def test_the_guards_own_restart_changes_nothing(tmp_path: Path) -> None:
    clock = Clock("worker").after(1200, touched={"mark": 1}, logins={"a": 5})
    kept = json.dumps(clock.memory._asdict())
    assert cluster.restore_memory(kept) == clock.memory
    clock.memory = cluster.remember(cluster.restore_memory(kept), clock.look._replace(at=clock.look.at + 1))
    assert not clock.after(2340).idle
    assert clock.after(120).idle


def test_start_and_extend_begin_the_idle_time_anew_at_the_last_moment() -> None:
    clock = Clock("worker").after(3540)
    soon = clock.look._replace(at=clock.look.at + 62, touched={cluster.MARK_PATH: 1})
    clock.memory = cluster.remember(cluster.restore_memory(json.dumps(clock.memory._asdict())), soon)
    assert not cluster.is_idle(clock.memory, 3600)


def test_no_clock_but_the_monotonic_one_decides() -> None:
    """Nodes of the local cloud share this machine's clock: none can jump a day there."""
    clocks = re.findall(
        r"\b(?:time\.\w+|datetime|st_[a-z]*time\w*)\b", cluster.node_program.__wrapped__(cluster.guard_node)
    )
    assert set(clocks) == {"time.monotonic", "time.sleep", "st_atime_ns"}
    clock = Clock("worker").after(60, touched={"/dev/pts/0": 10**18})
    assert clock.after(3600).idle
    assert not clock.after(60, touched={"/dev/pts/0": 10**18 - 86_400 * 10**9}).idle  # typed into, after a jump back


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"base": 1}', "\0"])
def test_what_is_not_a_memory_is_none(text: str) -> None:
    assert cluster.restore_memory(text) is None


def test_a_command_counts_as_long_as_its_connection_stands(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    with mark.open():
        assert not cluster.is_held(str(mark))  # no sshd is above this process


@pytest.mark.parametrize("held", [True, False])
def test_a_mark_that_is_held_is_touched_at_each_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    os.utime(mark, (1, 1))
    monkeypatch.setattr(cluster, "MARK_PATH", str(mark))
    monkeypatch.setattr(cluster, "is_held", lambda _: held)
    monkeypatch.setattr(cluster, "run_quietly", lambda *_: "")
    assert (cluster.take_look(None).touched[str(mark)] != 10**9) == held


def test_a_slow_transfer_over_ssh_is_use_all_the_same() -> None:
    """Too little from look to look, enough in a minute."""
    clock = Clock().after(3000)
    for step in range(1, 13):
        clock.after(10, logins={"a": 20_000 * step})
    assert clock.memory.how == "an SSH connection moved data"


def test_every_short_command_touches_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node that is looked at once a minute, nothing else may tell of it."""
    mark, sudo = tmp_path / "mark", tmp_path / "sudo"
    sudo.write_text('#!/bin/sh\nshift; exec "$@"\n')
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "MARK_PATH", str(mark))
    remote: Any = SimpleNamespace(
        node=SimpleNamespace(short="1"),
        run=lambda line, **_: (subprocess.run(line, shell=True, check=False).returncode, ""),
    )
    install = cluster.INSTALL.replace("/run/mitsuba-cluster/in-use", str(mark))
    first_lines = install[: install.index("state=")]
    for use in (
        lambda: cluster.command_step("exit 0", False, False, remote),
        lambda: cluster.Fetcher(str(tmp_path)),
        lambda: subprocess.run(["bash", "-c", first_lines, "install", *"123456"], input=b"a\nb\n", check=True),
    ):
        mark.touch()
        os.utime(mark, (1, 1))
        use()
        assert mark.stat().st_atime > 1
