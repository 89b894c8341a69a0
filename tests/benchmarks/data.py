"""A big file into S3, and from there to the nodes: this tool's ways, and the others'."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster
from tests.benchmarks import measure, peers
from tests.support import LocalCloud

BUCKET = "scenes"
NODES = 4
CURL = """
set -e
url=$1 size=$2 file=$3
quarter=$(((size + 3) / 4))
for part in 0 1 2 3; do
  curl -s -o "$file.$part" -r $((part * quarter))-$(((part + 1) * quarter - 1)) "$url" &
done
wait
"""


def make_file(path: Path, megabytes: int) -> Path:
    """Write a file that no transfer can compress."""
    with path.open("wb") as file:
        for _ in range(megabytes // 8):
            file.write(os.urandom(8 << 20))
    return path


def measure_uploads(cloud: LocalCloud, path: Path, rounds: int) -> dict[str, Any]:
    """Return tool -> figures for sending PATH to S3 anew each time."""
    env = cloud.environment(AWS_DEFAULT_REGION="us-east-1")
    url, bin_folder = env["AWS_ENDPOINT_URL_S3"], peers.environment()
    host = url.removeprefix("http://")
    s3 = cloud.client("s3")
    settings = cluster.Settings(S3_PATH=f"s3://{BUCKET}")
    config = cloud.config({"S3_PATH": f"s3://{BUCKET}"})
    ours = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cluster; from pathlib import Path\n"
        "settings = cluster.load_settings(Path(sys.argv[2])); s3, bucket, prefix = cluster.open_bucket(settings)\n"
        "cluster.upload(s3, bucket, prefix, {Path(sys.argv[3]).name: Path(sys.argv[3])})"
    )
    boto3 = (
        "import boto3, sys; from boto3.s3.transfer import TransferConfig; from botocore.config import Config\n"
        "s3 = boto3.client('s3', config=Config(max_pool_connections=64, request_checksum_calculation='when_required',"
        "s3={'payload_signing_enabled': False, 'addressing_style': 'path'}))\n"
        f"s3.upload_file(sys.argv[1], '{BUCKET}', 'boto3', Config=TransferConfig(64 << 20, 16, 64 << 20))"
    )
    s3cmd = ["s3cmd", "-q", "-c", "/dev/null", f"--host={host}", f"--host-bucket={host}", "--no-ssl", "--no-check-md5"]
    s3cmd += [f"--access_key={env['AWS_ACCESS_KEY_ID']}", f"--secret_key={env['AWS_SECRET_ACCESS_KEY']}"]
    project = str(Path(cluster.__file__).parent)
    lines = {
        "cluster.py": [sys.executable, "-c", ours, project, str(config), str(path)],
        "boto3 tuned": [sys.executable, "-c", boto3, str(path)],
        "s5cmd": [str(bin_folder / "s5cmd"), "--endpoint-url", url, "cp", str(path), f"s3://{BUCKET}/s5cmd"],
        "awscli": [str(bin_folder / "aws"), "--endpoint-url", url, "s3", "cp", str(path), f"s3://{BUCKET}/awscli"],
        "s3cmd": [*s3cmd, "put", str(path), f"s3://{BUCKET}/s3cmd"],
    }

    server = int(cloud.where.pid.read_text())

    def send(words: list[str]) -> measure.Sample:
        for key in s3.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            s3.delete_object(Bucket=BUCKET, Key=key["Key"])
        return measure.with_server(server, lambda: measure.run(words, env))

    things: dict[str, Callable[[], measure.Sample]] = {
        name: functools.partial(send, words) for name, words in lines.items()
    }
    things["SHA-256 alone"] = lambda: measure.timed(lambda: cluster.digest_file(path, "sha256"))
    assert settings.bucket[0] == BUCKET
    return figures(measure.interleaved(things, rounds))


def figures(found: dict[str, measure.Series]) -> dict[str, Any]:
    """Return name -> medians."""
    return {name: {"wall": one.wall, "cpu": one.cpu, "server": one.server} for name, one in found.items()}


def side_by_side(commands: list[tuple[list[str], bytes]]) -> None:
    """Run several programs at once, each with its input; RuntimeError where one fails."""
    children = []
    for words, text in commands:
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdin
        child.stdin.write(text)
        child.stdin.close()
        children.append(child)
    for child in children:
        assert child.stdout
        output = child.stdout.read()
        if child.wait() or b'"error"' in output:
            raise RuntimeError(output.decode()[-300:])
        child.stdout.close()


def measure_downloads(cloud: LocalCloud, path: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Return way -> figures for bringing one object to four nodes at once."""
    s3, size = cloud.client("s3"), path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    s3.upload_file(str(path), BUCKET, "big", ExtraArgs={"Metadata": {"sha256": digest}})
    etag = s3.head_object(Bucket=BUCKET, Key="big")["ETag"].strip('"')
    url = s3.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": "big"})
    env = cloud.environment()

    def fetch(way: str) -> measure.Sample:
        commands = []
        for number in range(NODES):
            target = folder / f"{way}-{number}"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            if way == "4 ranged curls":
                commands.append((["bash", "-c", CURL, "curl", url, str(size), str(target / "big")], b""))
            elif way == "s3cmd":
                host = env["AWS_ENDPOINT_URL_S3"].removeprefix("http://")
                words = ["s3cmd", "-q", "-c", "/dev/null", f"--host={host}", f"--host-bucket={host}", "--no-ssl"]
                words += [f"--access_key={env['AWS_ACCESS_KEY_ID']}", f"--secret_key={env['AWS_SECRET_ACCESS_KEY']}"]
                commands.append(([*words, "get", f"s3://{BUCKET}/big", str(target / "big")], b""))
            else:
                sha256 = digest if way == "cluster.py" else ""
                big = cluster.Wanted("big", size, etag, sha256, url, {"If-Match": f'"{etag}"'})
                program = [sys.executable, "-I", "-c", cluster.node_program(cluster.fetch_files), str(target)]
                commands.append((program, json.dumps([big._asdict()]).encode()))
        server = int(cloud.where.pid.read_text())
        return measure.with_server(server, lambda: measure.timed(lambda: side_by_side(commands)))

    ways = ("cluster.py", "cluster.py without hashing", "4 ranged curls", "s3cmd")
    things = {way: functools.partial(fetch, way) for way in ways}
    found = measure.interleaved(things, rounds)
    shutil.rmtree(folder)
    return figures(found)
