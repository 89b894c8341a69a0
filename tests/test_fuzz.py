"""Whatever is typed, set, tagged or stored: no traceback, no shell injection, no path outside DATA_DIR."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cluster
from tests.ranges import RangeServer, run_sync

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
NASTY = ["; rm -rf /", "$(reboot)", "`id`", "-rf", "--", "a b", "\n", "☃", "'", '"', "\x1b[2J", "..", "%s", "x" * 1000]


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Let a refusal pass, if it has one line."""
    try:
        yield
    except cluster.ClusterError as error:
        if "\n" in error.message:
            raise


words = st.sampled_from([*cluster.cli.commands, *NASTY, "1", "-1", "c1.xlarge", "--json", "--port"]) | st.text(
    max_size=20
)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A config.py, and an environment in which nobody can be asked."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv(cluster.ADDRESS_VARIABLE, "http://127.0.0.1:1/")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "config.py"
    path.write_text("PKG_REPOSITORY = 'deb http://127.0.0.1:1/ ./'\n")
    return path


@SHARED
@given(st.lists(words.filter(lambda word: "\0" not in word), max_size=6))
@example(["login", "; rm -rf /"])
@example(["syncData", "../../etc/passwd", "x"])
def test_arguments(nowhere: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(cluster.cli, ["--config", str(nowhere), *arguments])
    assert done.exit_code in (0, 1, 2)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    if done.exit_code:
        assert "Error: " in done.stderr


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()) | st.binary()
names = st.sampled_from([name for name in cluster.Settings._fields if name.isupper()])


@SHARED
@given(st.dictionaries(names | st.from_regex(r"[A-Z_]{1,9}", fullmatch=True), values, max_size=4))
@example({"CLIENT_CIDR": "0.0.0.0/0"})
def test_settings(nowhere: Path, chosen: dict[str, Any]) -> None:
    text = "inf = float('inf')\nnan = float('nan')\n"
    nowhere.write_text(text + "".join(f"{name} = {value!r}\n" for name, value in chosen.items()), "utf-8")
    with refused_in_one_line():
        loaded = cluster.load_settings(nowhere)
        for name, (check, _) in cluster.CHECKS.items():
            assert check(getattr(loaded, name))


@SHARED
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"[default]\naccess_key = %(secret_key)s\n")
@example(b"[default]\nhost_base = :::\n[default]\n")
def test_s3cfg(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".s3cfg").write_bytes(content)
    with refused_in_one_line():
        found = cluster.read_s3cfg(cluster.Settings(folder=tmp_path))
        assert all(isinstance(value, str) for value in found.values())


tag_names = st.sampled_from([cluster.TAG_GROUP, cluster.TAG_ROLE, cluster.TAG_HOST_KEY, cluster.TAG_PRICE, "Name"])
tags = st.dictionaries(tag_names | st.text(max_size=9), st.sampled_from(NASTY) | st.text(), max_size=6)


@given(tags, st.sampled_from(["pending", "running", "terminated"]), st.text())
@example({cluster.TAG_PRICE: "1e999", cluster.TAG_HOURS: "-1", cluster.TAG_ROLE: "king"}, "running", "\x1b]0;owned\x07")
def test_tags_of_others(given_tags: dict[str, str], state: str, reason: str) -> None:
    raw = {
        "InstanceId": "i-1",
        "State": {"Name": state},
        "StateReason": {"Code": "Server.Odd", "Message": reason},
        "Tags": [{"Key": key, "Value": value} for key, value in given_tags.items()],
    }
    node = cluster.to_node(raw)
    assert node.role in (None, "head", "worker")
    json.dumps(cluster.node_json(node))
    shown = cluster.format_nodes([node]) + cluster.format_cost([node])
    shown += node.group + node.host_key + node.reason  # of status, and of known_hosts
    assert all(char.isprintable() or char in "\n\t" for char in shown)


@given(
    st.text(max_size=1024)
    | st.lists(st.sampled_from(["..", ".", "", "a", "-rf", "☃", "a\nb"]), max_size=5).map("/".join)
)
@example("data/../../etc/passwd")
@example("data//etc/passwd")
@example("data/\0")
def test_object_keys_stay_below_the_data_directory(key: str) -> None:
    path = cluster.plan_relative_path(key, "data")
    if path is not None:
        whole = os.path.normpath(os.path.join("/mnt", path))
        assert whole.startswith("/mnt/")
        assert "\0" not in path


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40), max_size=3))
@example(NASTY)
def test_no_argument_is_code(arguments: list[str]) -> None:
    line = cluster.user_command("probe", 'printf "%s\\0" "$@"', *arguments)
    out = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert out.decode() == "".join(f"{one}\0" for one in arguments or [""])


@pytest.mark.parametrize("path", ["-rf *", "a b/$(touch x)", "☃", "tab\there", "new\nline", "x" * 255, ".hidden"])
def test_odd_names_arrive(tmp_path: Path, small_s3: RangeServer, path: str) -> None:
    assert run_sync(tmp_path, small_s3.job(path))["fetched"] == 1
    assert (tmp_path / path).read_bytes() == b"data"
    assert not (tmp_path / "x").exists() or path.startswith("x")


def test_a_second_sync_waits_for_the_first(tmp_path: Path, small_s3: RangeServer) -> None:
    """The first may have lost its connection and still be at work: both would write the same part file."""
    (tmp_path / ".mitsuba-cluster").mkdir()
    program = [sys.executable, "-I", "-c", cluster.node_program(cluster.fetch_files), str(tmp_path)]
    with (tmp_path / ".mitsuba-cluster" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin
            assert child.stdout
            child.stdin.write(json.dumps(small_s3.job("x")))
            child.stdin.close()
            assert json.loads(child.stdout.readline()) == {"moved": 0}
            assert not (tmp_path / "x").exists()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert json.loads(child.stdout.read().splitlines()[-1])["fetched"] == 1
    assert (tmp_path / "x").read_bytes() == b"data"


@pytest.mark.parametrize("path", ["../outside", "way-out/outside", "deep/../../outside", "a-file/below"])
def test_no_name_leads_out(tmp_path: Path, small_s3: RangeServer, path: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "way-out").symlink_to(tmp_path)
    (data / "a-file").write_text("")
    assert "error" in run_sync(data, small_s3.job(path))
    assert not (tmp_path / "outside").exists()
