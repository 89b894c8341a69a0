"""The nodes' half of syncData and of passing packages on: what fetches files, and what is heard of it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

import cluster
from tests.ranges import RangeServer, range_server, run_sync

PART = cluster.RANGE_SIZE


def wanted(server: RangeServer, *names: str, **changes: Any) -> list[cluster.Wanted]:
    """Return the job for files with these NAMES."""
    return [cluster.Wanted(**one)._replace(**changes) for one in server.job(*names)]


def test_every_name_that_is_sent_to_a_node_is_known_there() -> None:
    for program in (cluster.node_program(cluster.fetch_files), cluster.node_program(cluster.guard_node)):
        words = [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--select=F821", "-"]
        done = subprocess.run(words, input=program, text=True, capture_output=True, check=False)
        missing = re.findall(r"Undefined name `(\w+)`", done.stdout)
        assert set(missing) <= {"Stream"}, done.stdout  # that one is for annotations only


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_digest_of_either_kind_is_checked(tmp_path: Path, kind: str) -> None:
    with range_server(b"data") as server:
        good, bad = (hashlib.new(kind, text).hexdigest() for text in (b"data", b"other"))
        done = cluster.Fetcher(str(tmp_path)).fetch_all(wanted(server, "a/good", digest=good))
        assert done == {"fetched": 1, "present": 0, "missing": 0, "moved": 4, "lacking": 4}
        with pytest.raises(cluster.FetchFailed, match=r"^a/bad: its checksum is wrong after the transfer"):
            cluster.Fetcher(str(tmp_path)).fetch_all(wanted(server, "a/bad", digest=bad))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["good"]
    assert not list((tmp_path / cluster.FETCH_FOLDER).glob("*.part*"))


def test_a_file_that_was_edited_is_fetched_again_though_its_size_is_the_same(tmp_path: Path) -> None:
    with range_server(b"data") as server:
        job = server.job("mesh.vol")
        assert run_sync(tmp_path, job)["fetched"] == 1
        assert run_sync(tmp_path, job)["present"] == 1
        (tmp_path / "mesh.vol").write_bytes(b"DATA")
        os.utime(tmp_path / "mesh.vol", ns=(1, 1))
        assert run_sync(tmp_path, job)["fetched"] == 1
    assert (tmp_path / "mesh.vol").read_bytes() == b"data"


def test_a_nodes_proxy_is_not_asked_for_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not reach them, and would see the token."""
    with range_server(b"data") as server, range_server(b"0000") as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(
                name, server.job("x")[0]["url"].replace(f":{server.server_address[1]}", f":{proxy.server_address[1]}")
            )
        assert run_sync(tmp_path, server.job("x"))["fetched"] == 1
        assert not proxy.starts
    assert (tmp_path / "x").read_bytes() == b"data"


def test_another_content_is_fetched_whatever_came_of_the_last(tmp_path: Path) -> None:
    content = os.urandom(PART + 1)
    with range_server(bytes(PART + 1)) as server:
        server.refuse_from = PART
        assert "error" in run_sync(tmp_path, server.job("big"))
    with range_server(content) as server:
        job = [one._asdict() for one in wanted(server, "big", mark="e-2")]
        assert run_sync(tmp_path, job)["moved"] == PART + 1
    assert (tmp_path / "big").read_bytes() == content


def test_without_a_source_a_node_says_what_it_lacks(tmp_path: Path) -> None:
    with range_server(b"data") as server:
        run_sync(tmp_path, server.job("one"))
        job = [one._asdict() for one in wanted(server, "one", "two", url="")]
        assert run_sync(tmp_path, job) == {"fetched": 0, "present": 1, "missing": 1, "moved": 0, "lacking": 4}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../outside/x", "leads out of the folder"),
        ("..", "is not a name for a file"),
        ("way-out/x", "Not a directory"),
        ("way-out", None),  # the link itself gives way
        (f"{cluster.FETCH_FOLDER}/record.json", "is not a name for a file"),
    ],
)
def test_no_way_leads_out(tmp_path: Path, path: str, why: str | None) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    data.mkdir()
    outside.mkdir()
    (data / "way-out").symlink_to(outside)
    with range_server(b"data") as server:
        done = run_sync(data, server.job(path))
    if why:
        assert why in done["error"]
    else:
        assert (data / path).read_bytes() == b"data"
    assert not list(outside.iterdir())


def test_a_folder_that_becomes_a_link_in_mid_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write into the data folder could swap a folder after it was looked at."""
    data, outside = tmp_path / "data", tmp_path / "outside"
    data.mkdir()
    outside.mkdir()
    safe = cluster.Fetcher.fetch_range

    def swap(fetcher: cluster.Fetcher, one: cluster.Wanted, *place: int) -> None:
        (data / "scene").rename(data / "moved")
        (data / "scene").symlink_to(outside)
        safe(fetcher, one, *place)

    monkeypatch.setattr(cluster.Fetcher, "fetch_range", swap)
    with range_server(b"data") as server, pytest.raises(cluster.FetchFailed):
        cluster.Fetcher(str(data)).fetch_all(wanted(server, "scene/x"))
    assert not list(outside.iterdir())
    assert (data / "moved" / "x").read_bytes() == b"data"


def test_folders_of_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scene").mkdir()
    fetcher = cluster.Fetcher(str(tmp_path))
    with range_server(b"data") as server:
        with monkeypatch.context() as somebody:
            somebody.setattr(os, "geteuid", lambda: os.getuid() + 1)
            with pytest.raises(cluster.FetchFailed, match="scene/x: scene: belongs to another user"):
                fetcher.fetch_all(wanted(server, "scene/x"))
            with pytest.raises(PermissionError, match="belongs to another user"):
                cluster.Fetcher(str(tmp_path))
        assert not (tmp_path / "scene" / "x").exists()
        assert cluster.Fetcher(str(tmp_path)).fetch_all(wanted(server, "scene/x"))["fetched"] == 1


def test_what_comes_is_for_others_to_read_only(tmp_path: Path) -> None:
    with range_server(b"data") as server:
        assert run_sync(tmp_path, server.job("scene/x"))["fetched"] == 1
    assert (tmp_path / "scene").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "scene" / "x").stat().st_mode & 0o777 == 0o644


def test_a_disk_that_takes_less_and_then_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, write = os.urandom(5000), os.pwrite
    with range_server(content) as server:
        with monkeypatch.context() as slow:
            slow.setattr(os, "pwrite", lambda handle, block, at: write(handle, block[:999], at))
            done = cluster.Fetcher(str(tmp_path)).fetch_all(wanted(server, "x"))
        assert done["moved"] == 5000
        assert (tmp_path / "x").read_bytes() == content

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        server.starts = []
        with pytest.raises(cluster.FetchFailed, match=r"^y: No space left on device"):
            cluster.Fetcher(str(tmp_path)).fetch_all(wanted(server, "y"))
        assert server.starts == [0]  # it was not tried again


def test_a_part_counts_for_the_space_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(2 * PART)
    with range_server(content) as server:
        server.refuse_from = PART
        assert "error" in run_sync(tmp_path, server.job("big"))
        server.refuse_from = len(content)
        disk = os.statvfs_result((4096, 4096, *4 * [PART // 4096 + 1], 0, 0, 0, 255))
        monkeypatch.setattr(os, "fstatvfs", lambda _: disk)
        fetcher = cluster.Fetcher(str(tmp_path))
        with pytest.raises(cluster.FetchFailed, match=" needed, "):
            fetcher.make_room(wanted(server, "big", size=3 * PART))
        run_sync(tmp_path, server.job("big"))
        assert fetcher.fetch_all(wanted(server, "big"))["missing"] == 0


# What is heard of it


class LocalRemote(cluster.Remote):
    """Runs a node's programs on this machine, or says SAID in their place."""

    def __init__(self, said: bytes | None = None, code: int = 0) -> None:
        self.node: Any = cluster.to_node({"InstanceId": "i-1", "State": {"Name": "running"}})
        self.said, self.code = said, code

    def run(self, *command: Any, **options: Any) -> tuple[int, str]:
        """Run a command."""
        if self.said is None:
            given = b"".join(options["stdin"])
            done = subprocess.run(["bash", "-c", *command], input=given, capture_output=True, check=False)
            self.said, self.code = done.stdout + done.stderr, done.returncode
        output, self.said = self.said, None
        options["sink"](output)
        return self.code, output.decode()


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"[]",
        b'{"moved": 1e400}',
        b'{"moved": null}',
        b'{"moved": -1}',
        b'{"moved": true}',
        b'{"moved": 99999999999999999999}',
        b'{"error": 5}',
        b'{"status": "403"}',
    ],
)
def test_a_report_that_makes_no_sense(line: bytes) -> None:
    with pytest.raises(cluster.NodeError, match="sends a malformed report"):
        cluster.Delivery(LocalRemote(b'{"moved": 0}\n' + line + b"\n"), "/nowhere", lambda *_: None).fetch([])


def test_reports_that_lack_something_are_no_success() -> None:
    last = b'{"moved": 1, "fetched": 1, "present": 0}\n'
    for said in (last, b"", b"[" * 100_000 + b"\n", b'{"moved": 5}\nSegmentation fault\n'):
        with pytest.raises(cluster.NodeError, match="exit code 0"):
            cluster.Delivery(LocalRemote(said), "/nowhere", lambda *_: None).fetch([])


def test_a_node_that_can_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(cluster.NodeError, match=r"nowhere can't be written to \(No such file or directory\); install"):
        cluster.Delivery(LocalRemote(), str(tmp_path / "nowhere"), lambda *_: None).fetch([])


def sync_by(server: RangeServer, remote: LocalRemote, folder: Path) -> cluster.Fetched:
    """Fetch by the addresses /0, then /1 and so on; return what was done."""
    numbers = iter(range(100))

    def sign_again() -> list[cluster.Wanted]:
        return [one._replace(url=f"{one.url}{next(numbers)}") for one in wanted(server, "big")]

    return cluster.bring_from_s3(sign_again(), sign_again, cluster.Delivery(remote, str(folder), lambda *_: None))


def test_addresses_that_die_are_signed_again(tmp_path: Path) -> None:
    content = os.urandom(2 * PART)
    with range_server(content) as server:
        server.admit = lambda path, start: path == "/1" or start == 0
        assert sync_by(server, LocalRemote(), tmp_path).fetched == 1
    assert (tmp_path / "big").read_bytes() == content


def test_addresses_that_are_dead_at_once_are_named(tmp_path: Path) -> None:
    with range_server(bytes(PART)) as server:
        server.admit = lambda path, start: False
        with pytest.raises(cluster.NodeError) as failure:
            sync_by(server, LocalRemote(), tmp_path)
    assert str(failure.value) == (
        "big: its source answers 403 ExpiredToken; if your AWS session has expired, renew it and run this again"
    )


def test_an_archived_object_is_no_expired_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(delivery: cluster.Delivery, *_: Any) -> NoReturn:
        delivery.status = 403
        raise cluster.NodeError("big: its source answers 403 InvalidObjectState")

    monkeypatch.setattr(cluster.Delivery, "fetch", refuse)
    with pytest.raises(cluster.NodeError) as failure:
        cluster.bring_from_s3([], list, cluster.Delivery(LocalRemote(), str(tmp_path), lambda *_: None))
    assert str(failure.value) == (
        "big: its source answers 403 InvalidObjectState; the object is archived: restore it in S3, then run this again"
    )


# Who fetches from here


def test_what_an_interrupted_run_has_brought_need_not_come_from_here_again(tmp_path: Path) -> None:
    content = os.urandom(3 * PART)
    with range_server(content) as server:
        server.refuse_from = 2 * PART
        run_sync(tmp_path, server.job("big"))
        job = [one._asdict() for one in wanted(server, "big", url="")]
        assert run_sync(tmp_path, job)["lacking"] <= PART
    assert run_sync(tmp_path / cluster.FETCH_FOLDER, job)["lacking"] == 3 * PART
    spread = cluster.Spread([], [], 2)
    spread.unheard, spread.waiting = 0, [PART, 3 * PART]
    assert spread.choose([], 3 * PART) is None
    assert spread.choose([], PART)
