"""The test for a real account, tried on the local cloud: its report, and that it ends all whatever happens."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from tests.support import LocalCloud, interrupt, wait_until

LIVE = (sys.executable, "-m", "tests.live", "--yes-this-costs-money")


def living(cloud: LocalCloud) -> int:
    """Return how many nodes live."""
    return sum(one["state"] != "terminated" for one in cloud.ask("status").values())


def test_the_session_and_its_report(cloud: LocalCloud, tmp_path: Path) -> None:
    before = living(cloud)
    done = cloud.run(*LIVE, "--output", str(tmp_path), "c1.xlarge", "2")
    assert done.code == 0, done.out + done.err
    facts = json.loads((tmp_path / "live.json").read_text())
    assert {name: step["code"] for name, step in facts["steps"].items()} == dict.fromkeys(
        ["createNodes", "install", "start", "syncData", "status", "terminateAll"], 0
    )
    for what in ("listed", "public address", "running"):
        assert facts[f"{what} after RunInstances"]["of"] == 2
    assert facts["terminated after TerminateInstances"]["of"] == 2
    assert facts["calls"]["RunInstances"] >= 1
    assert facts["image of Ubuntu 24.04"].startswith("ami-")
    assert "| public address after RunInstances | least " in (tmp_path / "live.md").read_text()
    assert "They cost $" in done.err
    assert living(cloud) == before


def test_ctrl_c_ends_everything(cloud: LocalCloud, tmp_path: Path) -> None:
    before = living(cloud)
    child = cloud.start(*LIVE, "--output", str(tmp_path), "c1.xlarge", "1")
    wait_until(lambda: living(cloud) > before, what="a node")
    done = interrupt(child, signal.SIGINT)
    assert done.code == 130, done.out + done.err
    assert living(cloud) == before


def test_it_wants_a_word_about_money(cloud: LocalCloud) -> None:
    refused = cloud.run(sys.executable, "-m", "tests.live")
    assert refused.code == 2, refused.err
    assert "--yes-this-costs-money" in refused.last_line
