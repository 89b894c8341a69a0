"""syncData against two S3 servers: the exact one (moto's) and the fast one (localbucket)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cluster
from tests.ranges import range_server, run_sync
from tests.support import LocalCloud, Result, interrupt, wait_until

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
    assert "Uploaded 1 of 1 file to s3://scenes" in first.err
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
    assert (done.code, "Interrupted." in done.last_line) == (130, True), done.err
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
    for name in [*good, "x" * 300]:  # no stand-in takes a key with ".."; test_units.py has those
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
        assert run_sync(tmp_path, server.job(*names)) == {"moved": 1200, "fetched": 300, "present": 0, "missing": 0}
        (tmp_path / names[7]).write_bytes(b"edited")
        assert run_sync(tmp_path, server.job(*names)) == {"moved": 4, "fetched": 1, "present": 299, "missing": 0}
    assert {(tmp_path / name).read_bytes() for name in names} == {b"tiny"}


def test_a_file_larger_than_the_free_space(tmp_path: Path) -> None:
    job = [cluster.Wanted("k", 1 << 60, "e", "", "http://127.0.0.1:1/", {})._asdict()]
    assert re.fullmatch(r"\d+ MB are needed, \d+ MB are free", run_sync(tmp_path, job)["error"])
    assert not list(tmp_path.glob("k*"))


def test_a_bucket_of_somebody_else(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "moto")
    with two_nodes.faults({"kind": "denied", "service": "s3"}):
        done = bucket.sync("anything")
    assert (done.code, "you may not use the bucket 'scenes'" in done.err) == (1, True), done.err


def test_a_bucket_in_another_region(two_nodes: LocalCloud) -> None:
    bucket = Bucket(two_nodes, "moto")
    place = {"LocationConstraint": "eu-west-1"}
    bucket.s3.create_bucket(Bucket="european", CreateBucketConfiguration=place)
    bucket.s3.put_object(Bucket="european", Key="data/far.vol", Body=b"far")
    done = bucket.sync("far", S3_PATH="s3://european/data")
    assert done.code == 0, done.err
    assert bucket.on_nodes("far.vol") == [b"far", b"far"]
    log = two_nodes.where.calls.read_text()
    assert "GET /european" in log


def test_no_address_shows_in_the_output(two_nodes: LocalCloud, tmp_path: Path) -> None:
    bucket = Bucket(two_nodes, "localbucket")
    data = tmp_path / "secret.vol"
    data.write_bytes(b"x" * 1000)
    done = bucket.sync(str(data))
    assert "X-Amz-Signature" not in done.out + done.err
    assert "Signature" not in done.out + done.err
