"""SSH: the key on the disk, quoting, and steps that end in time."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import paramiko
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster
from tests.support import LocalCloud, create, make_node


@settings(deadline=None)  # each example starts a shell
@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=4))
def test_quoting_survives_the_shell(arguments: list[str]) -> None:
    line = cluster.user_command("name", "printf '%s\\0' \"$@\"", *arguments)
    shown = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout
    assert shown.split(b"\0")[:-1] == ([one.encode() for one in arguments] or [b""])


def test_a_key_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        seen.append(f"{os.fstat(handle).st_size} bytes synced")
        sync(handle)

    def rename(*names: Path) -> None:
        seen.append("renamed")
        real_rename(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    cluster.write_secret(tmp_path / "key.pem", "secret")
    assert seen[:2] == ["6 bytes synced", "renamed"]
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_step_over_its_limit_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that goes on and on: its end must not be taken for the step's."""

    class Channel:
        def settimeout(self, _: float) -> None:
            pass

        def recv(self, _: int) -> bytes:
            return b"still at it\n"

    remote = cluster.Remote(None, None)  # type: ignore[arg-type]
    assert remote.receive(Channel(), time.monotonic() + 60) == b"still at it\n"  # type: ignore[arg-type]
    with pytest.raises(cluster.NodeError, match="did not end within its time limit"):
        remote.receive(Channel(), time.monotonic() - 1)  # type: ignore[arg-type]


class Talking(cluster.Remote):
    """A node on which a command writes BLOCKS."""

    def __init__(self, *blocks: bytes) -> None:
        self.blocks = [*blocks, b""]

    @contextlib.contextmanager
    def session(self, line: str) -> Iterator[Any]:
        """Open a session for a command that succeeds."""
        yield Mock(**{"recv_exit_status.return_value": 0})

    def receive(self, *_: Any) -> bytes:
        """Return the next block."""
        return self.blocks.pop(0)


def test_output_comes_in_whole_lines_however_it_is_cut() -> None:
    lines: list[bytes] = []
    blocks = (b"apt says\nst", b"ep: unpack", b"ing\nstep: checking\nstep: unfin", b"ished")
    code, output = Talking(*blocks).run("install", sink=lines.append)
    assert lines == [b"apt says\n", b"step: unpacking\nstep: checking\n", b"step: unfinished"]
    assert (code, output.encode()) == (0, b"".join(blocks))


def test_a_line_without_end_is_cut() -> None:
    lines: list[bytes] = []
    Talking(*[bytes(cluster.MIB // 2)] * 3).run("cat /dev/zero", sink=lines.append)
    assert [len(line) for line in lines] == [cluster.MIB, cluster.MIB // 2]


def test_an_sshd_that_has_not_ended_the_last_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answers: list[Any] = [paramiko.ChannelException(2, "Connect failed"), paramiko.ChannelException(4, "x"), "session"]

    def open_session(timeout: float) -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    transport: Any = SimpleNamespace(open_session=open_session)
    assert cluster.Remote(make_node("i-1"), transport).open_session() == "session"  # type: ignore[comparison-overlap]


@pytest.fixture(scope="module")
def one(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """A cloud with one node, in the group "ssh"."""
    create(cloud, "ssh", 1)
    yield cloud
    cloud.end("ssh")


def test_one_session_and_a_silent_command(one: LocalCloud) -> None:
    """With MaxSessions 1 sshd refuses the session that would show its life, and shows it by that."""
    (node,) = one.nodes("ssh")
    one.fault("one-session", node)
    done = one.cluster("runCommand", "sleep 3; echo late", "ssh", limits={"SILENCE_LIMIT": 1})
    one.fault("heal", node)
    assert (done.code, done.out) == (0, "late\n"), done.err


@pytest.mark.parametrize("how", ["drops", "hangs"])
def test_a_login_that_breaks_is_no_refusal(one: LocalCloud, how: str) -> None:
    (node,) = one.nodes("ssh")
    one.fault(f"login-{how}", node)
    done = one.cluster("runCommand", "echo hi", "ssh", limits={"EXCHANGE_LIMIT": 4})
    assert (done.code, done.out) == (0, "hi\n"), done.err


def test_a_peer_that_breaks_the_protocol() -> None:
    payload = b"\x01\0\0\0\x02\0\0\0\x02\xff\xfe\0\0\0\0"  # it disconnects, with a message that is not UTF-8
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            stream, _ = listener.accept()
            with stream:
                padding = 16 - (5 + len(payload)) % 8
                size = (1 + len(payload) + padding).to_bytes(4, "big")
                stream.sendall(b"SSH-2.0-x\r\n" + size + bytes([padding]) + payload + bytes(padding))
                while stream.recv(1 << 16):
                    pass

        threading.Thread(target=answer, daemon=True).start()
        node, where = make_node("i-1", public_ip="127.0.0.1"), cluster.Settings(SSH_PORT=listener.getsockname()[1])
        identity: Any = None  # nobody gets so far
        with pytest.raises(paramiko.SSHException):
            cluster.connect(node, where, identity)
