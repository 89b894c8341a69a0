"""Pure functions, the handshake against literal bytes, and what stands in two places and must agree."""

from __future__ import annotations

import ast
import contextlib
import ipaddress
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster
from tests.localcloud.places import HERE, PROJECT

LAUNCHED = datetime(2026, 1, 1, tzinfo=timezone.utc)
GREETING = bytes.fromhex("1bcd302e362e30000300")  # of mitsuba-server's documentation: 0.6.0, single precision
ANSWER = bytes.fromhex("1bcd000469702d3137322d33312d302d3500")  # 4 cores, ip-172-31-0-5


def node(name: str, minutes: int = 0, **changes: Any) -> cluster.Node:
    """Return a running node that was launched MINUTES after the first."""
    return cluster.Node(name, "g", "c1.xlarge", "running", LAUNCHED + timedelta(minutes=minutes), **changes)


def test_plan_head_prefers_the_old_head_then_on_demand_then_age() -> None:
    spot, old, young = node("i-spot", 0, market="spot"), node("i-old", 1), node("i-young", 2)
    assert cluster.plan_head([young, spot, old]) is old
    assert cluster.plan_head([young, spot]) is young
    head = node("i-head", 9, market="spot", role="head")
    assert cluster.plan_head([old, head]) is head


@pytest.mark.parametrize(("own", "expected"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 6)])
def test_plan_head_cores(own: int, expected: int) -> None:
    assert cluster.plan_head_cores(own) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data/a.vol", "a.vol"),
        ("data/deep/er/a.vol", "deep/er/a.vol"),
        ("data/../etc/passwd", None),
        ("data/a/../../b", None),
        ("data/./a", None),
        ("data//a", "a"),
        ("data/a//b", None),
        ("data/" + "x" * 256, None),
        ("data/a\0b", None),
        ("data/-rf *", "-rf *"),
    ],
)
def test_plan_relative_path(key: str, expected: str | None) -> None:
    assert cluster.plan_relative_path(key, "data") == expected


@given(st.text(max_size=60))
def test_no_key_leads_out_of_the_data_directory(key: str) -> None:
    path = cluster.plan_relative_path(f"data/{key}", "data")
    if path is not None:
        assert os.path.commonpath([os.path.normpath(f"/mnt/{path}"), "/mnt"]) == "/mnt"
        assert not path.startswith("/")


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=4))
def test_quoting_survives_the_shell(arguments: list[str]) -> None:
    line = cluster.user_command("name", "printf '%s\\0' \"$@\"", *arguments)
    shown = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout
    assert shown.split(b"\0")[:-1] == ([one.encode() for one in arguments] or [b""])


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0s"), (59, "59s"), (60, "1m"), (3661, "1h01m"), (90061, "1d01h")]
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert cluster.format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(12, "12 B"), (1500, "1.5 kB"), (268435456, "268 MB"), (2e12, "2.0 TB")]
)
def test_format_size(size: float, expected: str) -> None:
    assert cluster.format_size(size) == expected


def test_format_table_stacks_what_does_not_fit() -> None:
    rows = [["NAME", "TYPE", "STATE"], ["a-long-name", "c1.xlarge", "running"]]
    assert cluster.format_table(rows, 80) == "NAME         TYPE       STATE\na-long-name  c1.xlarge  running"
    assert cluster.format_table(rows, 24) == "a-long-name\n  type c1.xlarge\n  state running"


def test_spent_counts_a_minute_at_least_and_the_public_address() -> None:
    one = node("i-1", price=0.595, public_ip="203.0.113.1")
    assert cluster.spent(one, LAUNCHED + timedelta(seconds=1)) == pytest.approx(0.01)
    assert cluster.spent(one, LAUNCHED + timedelta(hours=10)) == pytest.approx(6)
    assert cluster.spent(node("i-2"), LAUNCHED) is None


@pytest.mark.parametrize("text", ["\033[2Jgone", "a\rb", "\x07"])
def test_what_nodes_say_cannot_steer_the_terminal(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0a-\x1f]", cluster.printable(text))


@contextlib.contextmanager
def stand_in(folder: Path, *words: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the stand-in server in FOLDER."""
    command = [sys.executable, str(HERE / "mitsuba" / "mtssrv"), *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=os.environ | env, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()
            child.communicate()


def own_address() -> str:
    """Return a loopback address that no other test uses: there mtssrv's own port is free for sure."""
    return str(ipaddress.IPv4Address("127.128.0.0") + secrets.randbelow(1 << 22))


def ready(child: subprocess.Popen[bytes]) -> None:
    """Wait for the stand-in's ready line."""
    assert child.stdout
    while b"Listening on port" not in (line := child.stdout.readline()):
        assert line, "the stand-in ended"


def test_stand_in_answers_with_mitsubas_very_bytes(tmp_path: Path) -> None:
    address = own_address()
    with stand_in(tmp_path, "-p", "4", "-n", "ip-172-31-0-5", "-i", address) as server:
        ready(server)
        with socket.create_connection((address, cluster.SERVER_PORT), 5) as connection:
            connection.sendall(GREETING)
            assert connection.recv(100) == ANSWER
        with socket.create_connection((address, cluster.SERVER_PORT), 5) as connection:
            connection.sendall(GREETING[:-1] + b"\1")
            assert connection.recv(100) == bytes.fromhex("000d")
    assert "Listening on port" in (tmp_path / "mtssrv.ip-172-31-0-5.log").read_text()


def test_stand_in_head_dies_with_its_worker(tmp_path: Path) -> None:
    first, second = own_address(), own_address()
    with stand_in(tmp_path, "-i", first, "-n", "w", "-p", "3") as worker:
        ready(worker)
        with stand_in(tmp_path, "-i", second, "-n", "h", "-p", "1", "-c", first) as head:
            ready(head)
            with socket.create_connection((second, cluster.SERVER_PORT), 5) as connection:
                connection.sendall(GREETING)
                assert connection.recv(4)[2:] == b"\0\4"
            worker.kill()
            assert head.wait(10) == 255


def test_stand_in_fails_with_0_and_says_why(tmp_path: Path) -> None:
    with stand_in(tmp_path, "-c", own_address()) as head:
        out, err = head.communicate(timeout=10)
        assert head.returncode == 0
        assert b"Caught a critical exception" in err
        assert b"Listening" not in out


def test_inline_metadata_lists_what_pyproject_lists() -> None:
    inline = re.search(r"^# dependencies = (\[.*\])$", (PROJECT / "cluster.py").read_text(), re.M)
    project = re.search(r"^dependencies = (\[.*\])$", (PROJECT / "pyproject.toml").read_text(), re.M)
    assert inline
    assert project
    assert ast.literal_eval(inline[1]) == ast.literal_eval(project[1])


def test_config_has_every_setting_with_its_default() -> None:
    settings = cluster.load_settings(PROJECT / "config.py")
    text = (PROJECT / "config.py").read_text()
    for name in cluster.CHECKS:
        assert re.search(rf"^{name}\b.* = ", text, re.M), name
    assert cluster.Settings(S3_PATH="s3://XXXXXX") == settings
    assert set(cluster.CHECKS) == {name for name in cluster.Settings._fields if name.isupper()}


def test_placeholders_carry_no_secret() -> None:
    assert "PRIVATE KEY" not in (PROJECT / "mitsuba-key.pem").read_text()
    for line in (PROJECT / ".s3cfg").read_text().splitlines():
        assert not re.match(r"(access|secret)_key\s*=\s*\S", line)


def test_git_never_picks_up_a_secret(tmp_path: Path) -> None:
    def git(folder: str, *words: str) -> str:
        told = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *words]
        return subprocess.run(told, cwd=tmp_path / folder, check=True, capture_output=True, text=True).stdout

    (tmp_path / "upstream").mkdir()
    git("upstream", "init", "-q", "-b", "main")
    for name in ("mitsuba-key.pem", ".s3cfg", "cluster.py"):
        (tmp_path / "upstream" / name).write_bytes((PROJECT / name).read_bytes())
    git("upstream", "add", "-A")
    git("upstream", "commit", "-qm", "placeholders")
    git(".", "clone", "-q", "upstream", "mine")
    key, s3cfg = tmp_path / "mine" / "mitsuba-key.pem", tmp_path / "mine" / ".s3cfg"
    s3cfg.write_text("[default]\naccess_key = AKIAEXAMPLE\nsecret_key = topsecret\n")
    cluster.ensure_key_file(key)
    cluster.warn_of_secrets(tmp_path / "mine" / "config.py", cluster.Settings(folder=tmp_path / "mine"))
    made = key.read_text()
    assert "PRIVATE KEY" in made
    assert key.stat().st_mode & 0o777 == 0o600

    script = tmp_path / "mine" / "cluster.py"
    script.write_text(script.read_text() + "# work\n")
    (tmp_path / "mine" / "new").write_text("new")
    assert git("mine", "status", "--porcelain").splitlines() == [" M cluster.py", "?? new"]
    git("mine", "stash", "--include-untracked")
    (tmp_path / "upstream" / "README.md").write_text("news")
    git("upstream", "add", "-A")
    git("upstream", "commit", "-qm", "news")
    git("mine", "pull", "-q")
    git("mine", "stash", "pop")
    git("mine", "add", "-A")
    git("mine", "commit", "-qam", "work")
    history = git("mine", "log", "-p", "--all") + git("mine", "stash", "list", "-p")
    assert made.splitlines()[1] not in history
    assert "topsecret" not in history
    assert git("mine", "show", "--name-only", "--format=").split() == ["cluster.py", "new"]
    cluster.ensure_key_file(key)
    assert key.read_text() == made
    assert "topsecret" in s3cfg.read_text()


def test_a_region_that_boto3_does_not_know_spoils_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "fetch_regions", lambda _: ["us-east-1", "xx-new-1"])
    problems: list[str] = []
    found = cluster.App(PROJECT / "config.py").in_all_regions(lambda ec2: ec2.meta.region_name, problems)
    assert found == {"us-east-1": "us-east-1"}
    assert "xx-new-1: 'xx-new-1' is no region that boto3 knows" in problems[0]


def run_beside(folder: Path, script: str, *arguments: str, **programs: str) -> str:
    """Run a node's script with made-up PROGRAMS on its PATH; return what it prints."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    told = ["bash", "-c", script, "script", *arguments]
    return subprocess.run(told, env=env, check=True, capture_output=True, text=True).stdout


HANDSHAKE = "mtssrv: Incoming connection from 10.0.0.1\\nmtssrv: Closing connection to 10.0.0.1\\n"


def test_handshakes_do_not_hide_the_last_error(tmp_path: Path) -> None:
    backwards = f"printf '{HANDSHAKE * 300}ERROR: the last one\\nERROR: the first one\\n'"
    said = run_beside(tmp_path, cluster.FACTS, journalctl=backwards, systemctl="echo 1", mtssrv=":")
    assert "problem=ERROR: the last one\n" in said


@pytest.mark.parametrize(("shown", "lines"), [("2", ["two"]), ("+1", ["one", "two"])])
def test_the_journal_shows_no_handshakes(tmp_path: Path, shown: str, lines: list[str]) -> None:
    journal = f"printf '{HANDSHAKE * 300}one\\ntwo\\n{HANDSHAKE}-- cursor: s=1;i=2\\n'"
    said = run_beside(tmp_path, cluster.JOURNAL, "all", "", shown, journalctl=journal)
    assert said.splitlines() == [*lines, "-- cursor: s=1;i=2"]


def test_a_new_security_group_that_stays_unknown_is_not_waited_for_as_a_lost_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from botocore.exceptions import ClientError

    class Ec2:
        """Knows no security group."""

        def run_instances(self) -> None:
            """Refuse."""
            raise ClientError({"Error": {"Code": "InvalidGroup.NotFound", "Message": "no"}}, "RunInstances")

    monkeypatch.setattr(cluster, "NEW_LIMIT", -1)
    with pytest.raises(ClientError):
        cluster.launch_batch(Ec2(), {})
