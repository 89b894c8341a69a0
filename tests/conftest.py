"""Two local clouds: process nodes for every test that they can carry, nspawn for what only root proves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.localcloud.__main__ import best_kind, bring_up, take_down
from tests.localcloud.places import Places
from tests.ranges import RangeServer, range_server
from tests.support import LocalCloud

NSPAWN = best_kind() == "nspawn"


def pytest_configure() -> None:
    """Let Ctrl-C reach the programs that the tests start: a shell's background job is deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the tests on real nodes, the longest chain; leave them out without root."""
    for item in items:
        if on_nodes(item) and not NSPAWN:
            item.add_marker(pytest.mark.skip(reason="needs root on Debian or Ubuntu, and nspawn"))
    if config.getoption("--fast"):
        items[:] = [item for item in items if not on_nodes(item) and not item.get_closest_marker("sweep")]
    items.sort(key=lambda item: not on_nodes(item))


def on_nodes(item: pytest.Item) -> bool:
    """Tell whether a test needs real nodes."""
    return "nodes" in getattr(item, "fixturenames", ())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --fast, --all-faults, --rounds and --mistakes."""
    parser.addoption("--fast", action="store_true", help="leave out the sweeps and the tests on real nodes")
    parser.addoption("--all-faults", action="store_true", help="run every case of the fault sweep")
    parser.addoption("--rounds", type=int, default=2, help="of the soak")
    parser.addoption("--mistakes", action="store_true", help="print the table of mistakes and their lines")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of mistakes, as the tests have seen them."""
    if config.getoption("--mistakes"):
        reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
        rows = sorted(tuple(value) for report in reports for name, value in report.user_properties if name == "mistake")
        for what, code, line in rows:
            terminalreporter.write_line(f"| {what} | {code} | {line} |")


def running(root: Path, kind: str) -> Iterator[LocalCloud]:
    """Run a cloud in ROOT."""
    where = Places(root)
    daemon = bring_up(where, kind)
    yield LocalCloud(where, kind)
    take_down(where)
    daemon.wait()


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """A cloud of process nodes, one for each worker."""
    yield from running(tmp_path_factory.mktemp("process"), "process")


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """A cloud of real nodes."""
    yield from running(tmp_path_factory.mktemp("nspawn"), "nspawn")


@pytest.fixture
def group(cloud: LocalCloud, request: pytest.FixtureRequest) -> Iterator[str]:
    """A group of this test's own, ended afterwards."""
    name = request.node.name.split("[")[0].replace("test_", "")[:60]
    yield name
    cloud.end(name)


@pytest.fixture
def small_s3() -> Iterator[RangeServer]:
    """An S3 whose objects all say "data"."""
    with range_server(b"data") as server:
        yield server
