"""The README says what the program says, and its commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cluster import make_policy
from tests.localcloud.places import PROJECT
from tests.readme import README, help_text
from tests.support import LocalCloud


def test_help_text_is_the_programs_own() -> None:
    assert help_text() in README.read_text(), "renew it: python -m tests.readme"


def indented_commands() -> list[list[str]]:
    """Return the ./cluster.py command lines of README's text, in their order."""
    text = re.sub(r"^```.*?^```", "", README.read_text(), flags=re.M | re.S)  # not of the blocks
    lines = re.findall(r"^    (\./cluster\.py .+)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_session_of_the_readme_runs(cloud: LocalCloud, tmp_path: Path) -> None:
    data = tmp_path / "myHugeVolumeDataFile.vol"
    data.write_bytes(b"v" * 100_000)
    commands = indented_commands()
    names = [words[1] for words in commands]
    assert names[:5] == ["createNodes", "install", "start", "status", "terminateAll"]
    for _, name, *words in commands:
        if name == "syncData":  # README tells of it after the end of its session
            assert cloud.cluster("createNodes", "c1.xlarge", "1").code == 0
            words = [str(data)]
        done = cloud.cluster(name, *words)
        assert done.code == 0, done.err
    cloud.cluster("terminateAll")


def test_files_and_actions_that_the_readme_names_exist() -> None:
    text = README.read_text()
    for path in re.findall(r"\]\((tests/[^)]+)\)", text):
        assert (PROJECT / path).exists()
    used = set(re.findall(r"ec2\.(\w+)\(", (PROJECT / "cluster.py").read_text()))
    used |= set(re.findall(r'fetch_pages\(\s*ec2,\s*"(\w+)"', (PROJECT / "cluster.py").read_text()))
    actions = {"".join(part.capitalize() for part in name.split("_")) for name in used - {"get_paginator"}}
    allowed = {action for statement in make_policy("aws", "")["Statement"] for action in statement["Action"]}
    assert {f"ec2:{action}" for action in actions} <= allowed
