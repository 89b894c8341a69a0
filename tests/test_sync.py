"""syncData against two S3 servers: the exact one (moto's) and the fast one (localbucket)."""

from __future__ import annotations

import functools
import os
import pty
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from hypothesis import given
from hypothesis import strategies as st

import cluster
from tests.ranges import range_server, run_sync
from tests.support import LocalCloud, Result, impatience, interrupt, wait_until

pytestmark = pytest.mark.xdist_group("sync")  # two nodes serve them all

GROUP = "sync"


class Bucket:
    """One S3 server with a bucket, and the tool pointed at it."""

    def __init__(self, cloud: LocalCloud, kind: str) -> None:
        self.cloud, self.kind = cloud, kind
        given = cloud.environment()
        self.url = given["AWS_ENDPOINT_URL" if kind == "moto" else "AWS_ENDPOINT_URL_S3"]
        self.s3 = cloud.client("exact s3" if kind == "moto" else "s3")
        if kind == "moto":
            self.s3.create_bucket(Bucket="scenes")  # again is no error in us-east-1

    def sync(self, name: str, **settings: Any) -> Result:
        """Run syncData."""
        env = {"AWS_ENDPOINT_URL_S3": self.url}
        return self.cloud.cluster("syncData", name, GROUP, settings={"S3_PATH": "s3://scenes/data"} | settings, env=env)

    def on_nodes(self, path: str) -> list[bytes | None]:
        """Return a data file of each node; None where it is missing."""
        files = [self.cloud.where.nodes / node["id"] / "mnt" / path for node in self.cloud.nodes(GROUP)]
        return [file.read_bytes() if file.exists() else None for file in files]


@pytest.fixture(scope="module")
def two_nodes(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """A group of two nodes."""
    assert cloud.cluster("createNodes", "c1.xlarge", "2", GROUP).code == 0
    yield cloud
    cloud.end(GROUP)


@pytest.fixture(scope="module", params=["moto", "localbucket"])
def bucket(two_nodes: LocalCloud, request: pytest.FixtureRequest) -> Bucket:
    """Each of the two S3 servers in turn."""
    return Bucket(two_nodes, request.param)


def test_a_file_is_sent_once(bucket: Bucket, tmp_path: Path) -> None:
    data = tmp_path / f"cloud {bucket.kind}.vol"
    data.write_bytes(os.urandom(40 << 20))
    first = bucket.sync(str(data))
    assert first.code == 0, first.err
    assert "Uploaded 1 of 1 file to s3://scenes/data (0 there already)" in first.err
    assert first.out.count("fetched 1 file, 41.9 MB") == 2
    assert bucket.on_nodes(data.name) == 2 * [data.read_bytes()]
    second = bucket.sync(str(data))
    assert "Uploaded 0 of 1 file" in second.err
    assert second.out.count("has everything already") == 2
    data.write_bytes(os.urandom(1 << 20))
    third = bucket.sync(str(data))
    assert "Uploaded 1 of 1 file" in third.err
    assert bucket.on_nodes(data.name) == 2 * [data.read_bytes()]


def test_an_interrupted_upload_leaves_no_parts_that_cost_money(two_nodes: LocalCloud, tmp_path: Path) -> None:
    bucket = Bucket(two_nodes, "moto")
    data = tmp_path / "interrupted.vol"
    data.write_bytes(bytes(200 << 20))
    config = two_nodes.config({"S3_PATH": "s3://scenes/data"})
    env = two_nodes.environment(AWS_ENDPOINT_URL_S3=bucket.url, MITSUBA_CLUSTER_CONFIG=str(config))
    child = two_nodes.start(sys.executable, "cluster.py", "syncData", str(data), GROUP, env=env)
    wait_until(lambda: "Uploads" in bucket.s3.list_multipart_uploads(Bucket="scenes"))
    done = interrupt(child)
    assert done.code == 130, done.err
    assert "Interrupted." in done.last_line
    assert "Uploads" not in bucket.s3.list_multipart_uploads(Bucket="scenes")
    assert "Contents" not in bucket.s3.list_objects_v2(Bucket="scenes", Prefix="data/interrupted")


def test_a_prefix_brings_all_that_begins_so(bucket: Bucket) -> None:
    for name in ("smoke1.vol", "smoke/deep/2.vol", "other.vol"):
        bucket.s3.put_object(Bucket="scenes", Key=f"data/{bucket.kind}-{name}", Body=name.encode())
    done = bucket.sync(f"{bucket.kind}-smoke")
    assert done.code == 0, done.err
    assert bucket.on_nodes(f"{bucket.kind}-smoke1.vol") == 2 * [b"smoke1.vol"]
    assert bucket.on_nodes(f"{bucket.kind}-smoke/deep/2.vol") == 2 * [b"smoke/deep/2.vol"]
    assert bucket.on_nodes(f"{bucket.kind}-other.vol") == 2 * [None]


def test_an_empty_file(bucket: Bucket, tmp_path: Path) -> None:
    data = tmp_path / f"empty-{bucket.kind}"
    data.write_bytes(b"")
    done = bucket.sync(str(data))
    assert done.code == 0, done.err
    assert bucket.on_nodes(data.name) == [b"", b""]


def test_keys_that_are_no_paths_are_left_out(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "moto")
    good = ["-rf *", 'it\'s $(touch x); "y"', "naïve ☃", "tab\there"]
    for name in [*good, "x" * 300]:  # no stand-in takes a key with ".."; test_security.py has those
        bucket.s3.put_object(Bucket="scenes", Key=f"data/odd/{name}", Body=b"odd")
    done = bucket.sync("odd/")
    assert done.code == 1
    assert done.last_line == "Error: 1 object left out"
    assert "Traceback" not in done.err
    for name in good:
        assert bucket.on_nodes(f"odd/{name}") == [b"odd", b"odd"]


def test_a_damaged_transfer_is_refused_and_leaves_nothing(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "localbucket")
    wrong = {"sha256": "0" * 64}
    bucket.s3.put_object(Bucket="scenes", Key="data/damaged", Body=b"damaged", Metadata=wrong)
    done = bucket.sync("damaged")
    assert done.code == 1
    assert done.err.count("damaged: its checksum is wrong after the transfer") == 2
    assert bucket.on_nodes("damaged") == [None, None]
    assert not list(two_nodes.where.nodes.glob("*/mnt/.mitsuba-cluster/*.part*"))


PART = 16 << 20  # the nodes' program fetches such ranges


def test_what_came_before_a_failure_is_not_fetched_again(tmp_path: Path) -> None:
    content = os.urandom(3 * PART - 5)
    with range_server(content) as server:
        server.refuse_from = PART
        assert run_sync(tmp_path, server.job("big"))["error"] == "big: its source answers 404"
        assert not (tmp_path / "big").exists()
        server.starts, server.refuse_from = [], len(content)
        assert run_sync(tmp_path, server.job("big"))["fetched"] == 1
        assert sorted(server.starts) == [PART, 2 * PART]
    assert (tmp_path / "big").read_bytes() == content
    assert sorted(path.name for path in (tmp_path / ".mitsuba-cluster").iterdir()) == ["lock", "record.json"]


def test_a_stale_mark_vouches_for_nothing(tmp_path: Path) -> None:
    content = os.urandom(PART + 1)
    with range_server(content) as server:
        server.refuse_from = PART
        run_sync(tmp_path, server.job("big"))
        next((tmp_path / ".mitsuba-cluster").glob("*.part")).unlink()
        server.refuse_from = 0
        run_sync(tmp_path, server.job("big"))
        server.refuse_from = len(content)
        assert run_sync(tmp_path, server.job("big"))["fetched"] == 1
    assert (tmp_path / "big").read_bytes() == content


def test_an_object_that_changes_meanwhile(tmp_path: Path) -> None:
    with range_server(b"old") as server:
        server.refuse_from, server.code = 0, 412
        last = run_sync(tmp_path, server.job("scene/mesh.vol"))
    assert last["error"] == "scene/mesh.vol: it has changed at its source meanwhile; run this again"


def test_many_small_files(tmp_path: Path) -> None:
    names = [f"frames/{number:04}.png" for number in range(300)]
    with range_server(b"tiny") as server:
        assert run_sync(tmp_path, server.job(*names)) == {
            "moved": 1200,
            "fetched": 300,
            "present": 0,
            "missing": 0,
            "lacking": 1200,
        }
        (tmp_path / names[7]).write_bytes(b"edited")
        assert run_sync(tmp_path, server.job(*names)) == {
            "moved": 4,
            "fetched": 1,
            "present": 299,
            "missing": 0,
            "lacking": 4,
        }
    assert {(tmp_path / name).read_bytes() for name in names} == {b"tiny"}


def test_a_file_larger_than_the_free_space(tmp_path: Path) -> None:
    job = [cluster.Wanted("k", 1 << 60, "e", "", "http://127.0.0.1:1/", {})._asdict()]
    assert re.fullmatch(rf"[\d.]+ \wB needed, [\d.]+ \wB free in {tmp_path}", run_sync(tmp_path, job)["error"])
    assert not list(tmp_path.glob("k*"))


def test_a_bucket_of_somebody_else(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "moto")
    with two_nodes.faults({"kind": "denied", "service": "s3"}):
        done = bucket.sync("anything")
    assert done.code == 1, done.err
    assert "you may not use the bucket 'scenes'" in done.err


def test_a_bucket_in_another_region(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "moto")
    place = {"LocationConstraint": "eu-west-1"}
    bucket.s3.create_bucket(Bucket="european", CreateBucketConfiguration=place)
    bucket.s3.put_object(Bucket="european", Key="data/far.vol", Body=b"far")
    done = bucket.sync("far", S3_PATH="s3://european/data")
    assert done.code == 0, done.err
    assert bucket.on_nodes("far.vol") == [b"far", b"far"]
    assert "the bucket is in eu-west-1, the nodes in us-east-1: AWS bills what they fetch, up to 6 B in all" in done.err
    log = two_nodes.where.calls.read_text()
    assert "GET /european" in log


def test_no_address_shows_in_the_output(two_nodes: LocalCloud, tmp_path: Path) -> None:
    bucket = Bucket(two_nodes, "localbucket")
    data = tmp_path / "secret.vol"
    data.write_bytes(b"x" * 1000)
    done = bucket.sync(str(data))
    assert "X-Amz-Signature" not in done.out + done.err
    assert "Signature" not in done.out + done.err


def test_an_object_that_is_replaced_after_it_was_listed(two_nodes: LocalCloud, tmp_path: Path) -> None:
    s3 = two_nodes.client("s3")
    s3.put_object(Bucket="scenes", Key="data/replaced", Body=b"old")
    objects, _ = cluster.plan_objects(s3, "scenes", "data", "replaced")
    s3.put_object(Bucket="scenes", Key="data/replaced", Body=b"new")
    job = [one._asdict() for one in cluster.sign(s3, "scenes", objects)]
    assert run_sync(tmp_path, job)["error"] == "replaced: it has changed at its source meanwhile; run this again"
    assert not (tmp_path / "replaced").exists()


class Heads:
    """Stands for an S3 client that knows one object's head."""

    def __init__(self, **head: Any) -> None:
        self.head = head

    def head_object(self, **_: Any) -> dict[str, Any]:
        """Return the head."""
        return self.head


MD5, SHA256 = 32 * "a", 64 * "b"


@pytest.mark.parametrize(
    ("head", "etag", "digest"),
    [
        ({}, MD5, MD5),
        ({"ServerSideEncryption": "AES256"}, MD5, MD5),
        ({"ServerSideEncryption": "aws:kms"}, MD5, ""),
        ({"ServerSideEncryption": "aws:kms:dsse"}, MD5, ""),
        ({"SSECustomerAlgorithm": "AES256"}, MD5, ""),
        ({}, f"{MD5}-2", ""),
        ({"ServerSideEncryption": "aws:kms", "Metadata": {"sha256": SHA256}}, MD5, SHA256),
        ({"Metadata": {"sha256": "odd"}}, MD5, MD5),
    ],
)
def test_what_an_object_can_be_checked_by(head: dict[str, Any], etag: str, digest: str) -> None:
    assert cluster.fetch_digest(Heads(**head), "bucket", "key", etag) == digest


class NoBody:
    """What an answer without content brings."""

    def stream(self) -> list[bytes]:
        """Return nothing."""
        return []


@pytest.mark.parametrize(("endpoint", "sent"), [("", True), ("http://127.0.0.1:1", False)])
def test_aws_gets_a_checksum_and_other_endpoints_none(
    endpoint: str, sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket with Object Lock demands one: https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html"""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    settings = cluster.Settings(AWS_ACCESS_KEY_ID="AKIAEXAMPLE", AWS_SECRET_ACCESS_KEY="secret", folder=tmp_path)
    s3 = cluster.open_s3(settings)
    seen: dict[str, str] = {}

    def answer_ourselves(request: Any, **_: Any) -> Any:
        seen.update({name.lower(): str(value) for name, value in request.headers.items()})
        return AWSResponse(request.url, 200, {}, NoBody())

    s3.meta.events.register("before-send.s3.PutObject", answer_ourselves)
    s3.put_object(Bucket="scenes", Key="data/x", Body=b"x")
    assert any(name.startswith(("x-amz-checksum", "x-amz-trailer")) for name in seen) == sent


def test_names_in_s3_steer_no_terminal(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "moto")
    wrong = {"sha256": "0" * 64}
    bucket.s3.put_object(Bucket="scenes", Key="data/escape/\x1b]0;owned\x07", Body=b"x", Metadata=wrong)
    bucket.s3.put_object(Bucket="scenes", Key="data/escape/\x1b[2J" + 300 * "x", Body=b"x")
    done = bucket.sync("escape")
    assert done.code == 1
    assert "checksum is wrong" in done.err
    assert "Left out" in done.err
    assert "\x1b" not in done.out + done.err


def test_a_node_imports_nothing_from_its_folders(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "localbucket")
    bucket.s3.put_object(Bucket="scenes", Key="data/imported", Body=b"x")
    modules = [two_nodes.where.nodes / node["id"] / "home" / "json.py" for node in two_nodes.nodes(GROUP)]
    for module in modules:
        module.write_text("raise SystemExit('taken over')")
    done = bucket.sync("imported")
    for module in modules:
        module.unlink()
    assert done.code == 0, done.err


def test_without_a_bucket_it_goes_from_node_to_node(two_nodes: LocalCloud, tmp_path: Path) -> None:
    bucket = Bucket(two_nodes, "localbucket")
    folder = tmp_path / "volumes"
    folder.mkdir()
    (folder / "big.vol").write_bytes(os.urandom(PART + 1))
    (folder / "empty.vol").write_bytes(b"")
    sync = functools.partial(bucket.sync, str(folder), S3_PATH="")
    first = sync()
    assert first.code == 0, first.err
    assert first.out.count("fetched 2 files, 16.8 MB") == 2
    assert bucket.on_nodes("volumes/big.vol") == 2 * [(folder / "big.vol").read_bytes()]
    assert bucket.on_nodes("volumes/empty.vol") == [b"", b""]
    assert sync().out.count("has everything already") == 2
    node = two_nodes.nodes(GROUP)[0]
    (two_nodes.where.nodes / node["id"] / "mnt" / "volumes" / "big.vol").unlink()
    again = sync()
    assert again.code == 0, again.err
    assert f"{node['name']}: fetched 1 file, 16.8 MB; 1 there already" in again.out
    assert again.out.count("has everything already") == 1
    assert bucket.on_nodes("volumes/big.vol") == 2 * [(folder / "big.vol").read_bytes()]


# What nobody means to send


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "NAME is empty: is a variable unset?"),
        (" ", "NAME is empty: is a variable unset?"),
        (".", ". is the tool's folder, or contains it"),
        ("/", "/ is the tool's folder, or contains it"),
        ("HOME", "is your home folder, or contains it"),
        ("KEYS", "is the SSH key's folder, or contains it"),
        ("KEY", "keys and settings are never sent"),
        ("config.py", "keys and settings are never sent"),
        ("id", "a private key is never sent"),
        ("nothing", "there is no file to send in"),
    ],
)
def test_names_by_a_slip(cloud: LocalCloud, tmp_path: Path, name: str, why: str) -> None:
    keys = tmp_path / "keys"
    for folder in ("home", "keys", "nothing"):
        (tmp_path / folder).mkdir()
    for path, text in (("keys/key.pem", "no key yet"), ("id", "\n-----BEGIN RSA PRIVATE KEY-----\n")):
        (tmp_path / path).write_text(text)
    places = {"HOME": "home", "KEYS": "keys", "KEY": "keys/key.pem", "id": "id", "nothing": "nothing"}
    given = str(tmp_path / places[name]) if name in places else name
    env = {"HOME": str(tmp_path / "home")}
    config = {"SSH_PRIVATE_KEY_FILE": str(keys / "key.pem"), "S3_PATH": "s3://scenes/data"}
    if name == "config.py":
        given = str(cloud.config(config))
        env["MITSUBA_CLUSTER_CONFIG"] = given
    done = cloud.cluster("syncData", given, GROUP, settings=None if name == "config.py" else config, env=env)
    assert done.code == 1, done.out
    assert why in done.last_line


def test_keys_settings_and_links_stay_here(two_nodes: LocalCloud, tmp_path: Path) -> None:
    bucket = Bucket(two_nodes, "localbucket")
    scene, outside = tmp_path / "scene", tmp_path / "outside"
    for folder in (scene / "deep" / ".ssh", scene / ".git", scene / ".aws", outside):
        folder.mkdir(parents=True)
    secrets = {"deep/.ssh/id": "x", ".git/config": "x", ".aws/credentials": "x", ".s3cfg": "[default]\n"}
    for name, text in (
        secrets.items() | {"deep/old.pem": "-----BEGIN OPENSSH PRIVATE KEY-----", "good.vol": "1"}.items()
    ):
        (scene / name).write_text(text)
    (outside / "passwords").write_text("x")
    (scene / "out").symlink_to(outside / "passwords")
    (scene / "folder").symlink_to(outside)
    (scene / "loop").symlink_to("loop")
    (scene / "again.vol").symlink_to("good.vol")
    os.mkfifo(scene / "pipe")
    (scene / os.fsdecode(b"\xff")).write_text("x")
    config = scene / "settings.py"
    config.write_text((two_nodes.where.root / "config.py").read_text() + '\nS3_PATH = "s3://scenes/data"\n')
    done = two_nodes.cluster("--config", str(config), "syncData", str(scene), GROUP)
    assert done.code == 0, done.err
    left = ("deep/.ssh", ".git", ".aws", ".s3cfg", "deep/old.pem", "out", "folder", "loop", "pipe", "settings.py")
    for name in left:
        assert f"Left out: {scene / name} (" in done.err
    assert done.err.count("Left out: ") == len(left) + 1, done.err
    found = bucket.s3.list_objects_v2(Bucket="scenes", Prefix="data/scene/")["Contents"]
    assert sorted(one["Key"] for one in found) == ["data/scene/again.vol", "data/scene/good.vol"]
    assert bucket.on_nodes("scene/again.vol") == [b"1", b"1"]


def answer(cloud: LocalCloud, text: str, *words: str) -> Result:
    """Run the tool at a terminal whose user types TEXT when he is asked."""
    here, there = pty.openpty()
    env = cloud.environment(MITSUBA_CLUSTER_CONFIG=str(cloud.config({"S3_PATH": "s3://scenes/data"})))
    env |= impatience({"ASK_ABOVE_FILES": 2}) | {"NO_COLOR": "1"}
    with cloud.start(sys.executable, "cluster.py", *words, env=env, stdin=there, stderr=there) as child:
        os.close(there)
        shown = b""
        with suppress(OSError):  # the end of a pseudo-terminal is an error
            while block := os.read(here, 1 << 16):
                shown += block
                if text and b"[y/N]: " in shown:
                    os.write(here, text.encode())
                    text = ""
        assert child.stdout
        out = child.stdout.read()
    os.close(here)
    return Result(child.returncode, out, shown.decode().replace("\r", ""))


def test_a_large_folder_is_asked_about(two_nodes: LocalCloud, tmp_path: Path) -> None:
    bucket = Bucket(two_nodes, "localbucket")
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(bytes(1000))
    what = f"{folder} has 3 files, 3.0 kB"
    refused = answer(two_nodes, "n\n", "syncData", str(folder), GROUP)
    assert refused.code == 1, refused.err
    assert f"{what}. Send all of it? [y/N]" in refused.err
    assert refused.last_line == "Error: nothing was sent"
    config = {"S3_PATH": "s3://scenes/data"}
    limits: dict[str, float] = {"ASK_ABOVE_FILES": 2}
    piped = two_nodes.cluster("syncData", str(folder), GROUP, settings=config, limits=limits)
    assert piped.code == 1
    assert piped.last_line == f"Error: {what}; add --yes to send so much without being asked"
    assert bucket.on_nodes("frames/0.png") == [None, None]
    agreed = answer(two_nodes, "y\n", "syncData", str(folder), GROUP)
    assert agreed.code == 0, agreed.err
    told = two_nodes.cluster("syncData", str(folder), GROUP, "--yes", settings=config, limits=limits)
    assert told.code == 0, told.err
    assert told.out.count("has everything already") == 2


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
