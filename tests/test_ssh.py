"""SSH: the key on the disk, quoting, and steps that end in time."""

from __future__ import annotations

import contextlib
import os
import subprocess
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


def test_one_session_and_a_silent_command(cloud: LocalCloud, group: str) -> None:
    """With MaxSessions 1 sshd refuses the session that would show its life, and shows it by that."""
    create(cloud, group, 1)
    (node,) = cloud.nodes(group)
    cloud.fault("one-session", node)
    done = cloud.cluster("runCommand", "sleep 3; echo late", group, limits={"SILENCE_LIMIT": 1})
    assert (done.code, done.out) == (0, "late\n"), done.err
