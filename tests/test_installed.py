"""The wheel: `mitsuba-cluster` as pipx and uv install it, away from the clone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.localcloud.places import PROJECT
from tests.screens import Terminal
from tests.support import LocalCloud


@dataclass(frozen=True)
class Installed:
    """An installed program, its user's home, and a folder that holds somebody else's config.py."""

    program: Path
    home: Path
    folder: Path
    env: dict[str, str]

    @property
    def config(self) -> Path:
        """The user's settings."""
        return self.home / ".config" / "mitsuba-cluster" / "config.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel in a copy, since setuptools writes into the folder that it builds; install it; return where."""
    root = tmp_path_factory.mktemp("wheel")
    source, prefix = root / "source", root / "prefix"
    source.mkdir()
    for name in ("cluster.py", "config.py", "pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(root), str(source)]
    subprocess.run(build, check=True)
    (built,) = root.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--prefix", str(prefix), str(built)], check=True)
    return prefix


@pytest.fixture
def installed(cloud: LocalCloud, wheel: Path, tmp_path: Path) -> Iterator[Installed]:
    """The program with a new user, in a folder with a config.py that must not be run."""
    (packages,) = wheel.glob("l*/python*/site-packages")
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    folder.mkdir()
    (folder / "config.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    changes = {"HOME": str(home), "PYTHONPATH": str(packages), "PATH": f"{wheel / 'bin'}:{os.environ['PATH']}"}
    env = cloud.environment(**changes)
    del env["MITSUBA_CLUSTER_CONFIG"]
    env.pop("XDG_CONFIG_HOME", None)
    yield Installed(wheel / "bin" / "mitsuba-cluster", home, folder, env)
    assert not (tmp_path / "was-run").exists()


def test_no_settings_yet(cloud: LocalCloud, installed: Installed) -> None:
    done = cloud.run("mitsuba-cluster", "status", env=installed.env, cwd=installed.folder, stdin=subprocess.DEVNULL)
    assert done.code == 1
    assert done.err == (
        f"Error: there is no settings file {installed.config}; run this at a terminal to have one written there, "
        "or name one: --config FILE\n"
    )
    shown = cloud.run("mitsuba-cluster", "--version", env=installed.env, cwd=installed.folder)
    assert shown.out.startswith("mitsuba-cluster ")


@pytest.mark.parametrize("answer", ["y", "n"])
def test_the_template_is_offered(cloud: LocalCloud, installed: Installed, answer: str) -> None:
    terminal = Terminal(cloud, "env", "-C", str(installed.folder), "mitsuba-cluster", "status", env=installed.env)
    assert terminal.read(until="be written there?")
    os.write(terminal.master, f"{answer}\n".encode())
    seen = terminal.end()
    assert seen.code == (1 if answer == "y" else 130)
    assert installed.config.exists() == (answer == "y")
    if answer == "y":
        assert installed.config.read_text() == (PROJECT / "config.py").read_text()
        assert f"{installed.config} is written: look it over, then run this again" in seen.text


def test_session(cloud: LocalCloud, installed: Installed, group: str) -> None:
    installed.config.parent.mkdir(parents=True)
    shutil.copy(cloud.where.root / "config.py", installed.config)
    for words in (["createNodes", "c1.xlarge", "1"], ["install"], ["start"], ["status"], ["terminateAll"]):
        done = cloud.run("mitsuba-cluster", *words, group, env=installed.env, cwd=installed.folder)
        assert done.code == 0, done.err
        if words[0] == "install":
            assert done.err.endswith(f"Next: mitsuba-cluster start {group}\n")


def test_inline_metadata_lists_what_pyproject_lists() -> None:
    inline = re.search(r"^# dependencies = (\[.*\])$", (PROJECT / "cluster.py").read_text(), re.M)
    project = re.search(r"^dependencies = (\[.*\])$", (PROJECT / "pyproject.toml").read_text(), re.M)
    assert inline
    assert project
    assert ast.literal_eval(inline[1]) == ast.literal_eval(project[1])
