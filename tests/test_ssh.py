"""SSH: the key on the disk, quoting, and steps that end in time."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
