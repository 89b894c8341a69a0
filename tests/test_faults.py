"""Each command under each fault of the AWS endpoint: it succeeds, or ends in time with one clear line.

By default a seeded sample runs; all of it with `python -m pytest tests/test_faults.py --all-faults`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import LocalCloud

pytestmark = [pytest.mark.sweep, pytest.mark.xdist_group("faults")]  # two nodes serve them all

GROUP = "faults"
BOUND = 100  # seconds; the longest wait behind one fault is a silent endpoint's read time-out, tried again
COMMANDS = {
    "createNodes": ("c1.xlarge", "1", f"{GROUP}-more"),
    "install": (GROUP,),
    "start": (GROUP,),
    "status": (GROUP,),
    "syncData": ("DATA", GROUP),
    "runCommand": ("true", GROUP),
    "up": ("c1.xlarge", "2", GROUP),
    "terminateAll": (f"{GROUP}-more",),
}
KINDS = ("throttle", "500", "503", "reset", "html", "truncate", "code:InvalidInstanceID.NotFound", "expired", "denied")
S3_KINDS = ("500", "503", "reset", "html", "truncate", "expired")
RATES = (0.1, 0.5, 1.0)
LATER = ("up", "terminateAll")  # only with --all-faults: long cases
Case = tuple[str, str, str, float]  # command, service, kind of fault, rate (0: once, at the second call)
CASES: list[Case] = [
    (command, "ec2", kind, rate) for command in COMMANDS if command not in LATER for kind in KINDS for rate in RATES
]
CASES += [("syncData", "s3", kind, rate) for kind in S3_KINDS for rate in RATES]
CASES += [(command, "ec2", "hang", 0.0) for command in ("createNodes", "status", "runCommand")]
LATER_CASES: list[Case] = [(command, "ec2", kind, rate) for command in LATER for kind in KINDS for rate in RATES]
SAMPLE = 16


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the cases."""
    if "case" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-faults")
        chosen = CASES + LATER_CASES if everything else random.Random(7).sample(CASES, SAMPLE)
        metafunc.parametrize("case", chosen, ids=lambda case: "-".join(map(str, case)))


@pytest.fixture(scope="module")
def serving(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """A group of two nodes that serve."""
    for words in (("createNodes", "c1.xlarge", "2", GROUP), ("install", GROUP), ("start", GROUP)):
        assert cloud.cluster(*words).code == 0
    cloud.client("exact s3").create_bucket(Bucket="scenes")
    yield cloud
    cloud.end(GROUP)
    cloud.end(f"{GROUP}-more")


def exact_s3(cloud: LocalCloud) -> dict[str, str]:
    """Return what leads S3's calls through the front that spoils them."""
    return {"AWS_ENDPOINT_URL_S3": cloud.environment()["AWS_ENDPOINT_URL"]}


def test_fault(serving: LocalCloud, case: Case, tmp_path: Path) -> None:
    command, service, kind, rate = case
    data = tmp_path / "data"
    data.write_bytes(b"data" * 1000)
    if command == "terminateAll":
        with serving.options(pace="none"):
            assert serving.cluster("createNodes", "c1.xlarge", "1", f"{GROUP}-more").code == 0
    before = len(serving.ask("status"))
    words = [str(data) if word == "DATA" else word for word in COMMANDS[command]]
    start = time.monotonic()
    with serving.faults({"kind": kind, "service": service, "rate": rate, "nth": 0 if rate else 2}):
        done = serving.cluster(command, *words, env=exact_s3(serving) if service == "s3" else None)
    assert time.monotonic() - start < BOUND
    assert "Traceback" not in done.err, done.err
    assert done.code in (0, 1)
    if done.code:
        assert done.last_line.startswith(("Error: ", "Interrupted."))
    if kind in ("throttle", "500", "503", "hang") and rate <= 0.1:
        assert done.code == 0, done.err
    if command == "terminateAll" and not done.code:
        assert serving.truth(f"{GROUP}-more") == ([], 0)
    assert len(serving.ask("status")) - before <= (command == "createNodes")
    ended = serving.cluster("status", GROUP)
    assert ended.code == 0, ended.err
