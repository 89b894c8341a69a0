"""The user's own build: what is packed, what is refused before it costs anything."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cluster
from tests.build import COMPILER, make_build
from tests.localcloud.places import HERE
from tests.readme import README
from tests.support import LocalCloud

OWN_IMAGE = {"us-east-1": "ami-0123456789abcdef0"}  # whose glibc is not known here
NEWER = tuple(map(int, (platform.libc_ver()[1] or "0").split("."))) >= (2, 36)
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs gcc")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build's dist folder; tests only read it."""
    return make_build(tmp_path_factory.mktemp("build"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Path) -> Path:
    """An empty cache folder; and what the build's own user has in the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build.parent / "search"))
    return tmp_path / "cache/mitsuba-cluster"


def plan(source: Path | str, **changes: Any) -> cluster.Package:
    """Return what would be installed for a MITSUBA_PACKAGE."""
    return cluster.plan_package(cluster.Settings(MITSUBA_PACKAGE=str(source), AMI_IDS=OWN_IMAGE, **changes))


@needs_compiler
def test_a_build_is_packed_with_its_libraries_and_nothing_else(build: Path, cache: Path) -> None:
    package = plan(build)
    with tarfile.open(package.source) as archive:
        names = {member.name.removeprefix("mitsuba/"): member for member in archive}
    top = {"mtssrv", "mitsuba", "libmitsuba-core.so", "plugins/glass.so", "data/mtssrv", "data/mitsuba"}
    assert names.keys() == top | {"lib/libspectrum.so.1", "lib/libglass.so.2"}
    assert (names["mtssrv"].mode, names["mtssrv"].uid, names["mtssrv"].mtime) == (0o755, 0, 0)
    assert f"the build in {build} (6 files and the libraries that they need" in package.title
    assert package.sha256 == cluster.digest_file(Path(package.source), "sha256")


@needs_compiler
def test_a_build_that_is_packed_by_hand_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_build(tmp_path / "made")
    command = re.search(r"^ +(mkdir -p dist/lib; (?:.*\n)*?.*tar czf mitsuba\.tar\.gz dist)$", README.read_text(), re.M)
    assert command, "README has the way for macOS"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "made/search"))
    subprocess.run(["bash", "-c", command[1]], cwd=tmp_path / "made", check=True)
    subprocess.run(["tar", "xzf", "made/mitsuba.tar.gz"], cwd=tmp_path, check=True)
    shutil.rmtree(tmp_path / "made")
    assert {path.name for path in (tmp_path / "dist/lib").iterdir()} == {"libspectrum.so.1", "libglass.so.2"}
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/dist:{tmp_path}/dist/lib")
    for name in ("mtssrv", "plugins/glass.so"):
        listed = subprocess.run(["ldd", tmp_path / "dist" / name], capture_output=True, text=True, check=True).stdout
        assert "not found" not in listed


@needs_compiler
def test_packed_again_it_is_the_same_to_the_byte(build: Path, cache: Path) -> None:
    first = plan(build)
    Path(first.source).unlink()
    os.utime(build / "mtssrv")
    again = plan(build)
    assert (again.source, again.sha256) == (first.source, first.sha256)
    made = Path(again.source).stat().st_ino
    assert plan(build) == again
    assert Path(again.source).stat().st_ino == made, "what is in the cache was packed again"


@needs_compiler
def test_what_is_packed_runs_without_the_build(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = make_build(tmp_path / "moved")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(dist.parent / "search"))
    package = plan(dist)
    shutil.rmtree(tmp_path / "moved")
    with tarfile.open(package.source) as archive:
        archive.extractall(tmp_path)
    tree = tmp_path / "mitsuba"
    env = {"LD_LIBRARY_PATH": f"{tree}:{tree}/lib"}
    done = subprocess.run([tree / "mtssrv", "-h"], env=env, text=True, capture_output=True, check=False)
    assert "Mitsuba version 0.6.0" in done.stdout, done.stderr


@needs_compiler
def test_the_build_on_path_is_local(build: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mtssrv").symlink_to(build / "mtssrv")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    packed = plan(build)
    assert plan("local") == packed
    assert plan("") == packed, "an empty MITSUBA_PACKAGE and the shipped PKG_REPOSITORY mean the user's own build"
    assert plan("", PKG_REPOSITORY="deb https://example.org/ubuntu ./").source == "mitsuba"
    monkeypatch.setattr(cluster, "is_packable_here", lambda: False)
    assert plan("").source == "mitsuba"


def no_plugins(dist: Path) -> None:
    """Take away two parts."""
    shutil.rmtree(dist / "plugins")
    (dist / "libmitsuba-core.so").unlink()


def no_library(dist: Path) -> None:
    """Take away a plugin's library."""
    (dist.parent / "search/libglass.so.2").unlink()


def foreign(dist: Path) -> None:
    """Turn a plugin into one for another processor (e_machine; see elf(5))."""
    path = dist / "plugins/glass.so"
    data = bytearray(path.read_bytes())
    data[18:20] = (183).to_bytes(2, "little")
    path.write_bytes(data)


@needs_compiler
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_plugins, "is not the dist folder of a Mitsuba build: it lacks plugins, libmitsuba-*.so"),
        (no_library, "plugins/glass.so needs libglass.so.2, which this machine does not find"),
        (foreign, "plugins/glass.so is not for x86-64 Linux"),
    ],
    ids=["parts", "library", "processor"],
)
def test_a_build_that_can_not_run_is_refused(
    spoil: Callable[[Path], None], message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist = make_build(tmp_path / "spoilt")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(dist.parent / "search"))
    spoil(dist)
    with pytest.raises(cluster.ClusterError, match=r"build|needs|not for") as refused:
        plan(dist)
    assert message in str(refused.value)
    assert not list(cache.glob("*")), "something half-packed is left"


def test_local_without_a_build_and_a_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(cluster.ClusterError, match=r"no mtssrv is on PATH"):
        plan("local")
    (tmp_path / "mitsuba.deb").write_text("")
    with pytest.raises(cluster.ClusterError, match=r"the SHA-256 of .*/mitsuba.deb is e3b0c442.*, not 0000"):
        plan(f"{tmp_path / 'mitsuba.deb'}#sha256={'0' * 64}")


def test_on_another_system_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Darwin", "mac", "23", "v", "arm64")))
    with pytest.raises(cluster.ClusterError, match=r"this is Darwin arm64: set MITSUBA_PACKAGE to a .deb or .tar.gz"):
        plan(HERE)


@pytest.mark.parametrize(
    ("versions", "release", "message"),
    [
        ({"GLIBC_2.2.5", "GLIBC_2.9", "GLIBC_2.35", "GLIBC_PRIVATE"}, "22.04", ""),
        ({"GLIBC_2.35", "GLIBC_2.36"}, "22.04", 'needs GLIBC_2.36 of a newer .* set UBUNTU_RELEASE = "24.04"'),
        ({"GLIBC_2.34", "GLIBC_ABI_DT_RELR"}, "22.04", 'GLIBC_ABI_DT_RELR .* set UBUNTU_RELEASE = "24.04"'),
        ({"GLIBC_2.36", "GLIBC_ABI_DT_RELR"}, "24.04", ""),
        ({"GLIBC_2.43"}, "24.04", 'set UBUNTU_RELEASE = "26.04"'),
        ({"GLIBC_2.99"}, "24.04", "no Ubuntu release has it"),
        ({"GLIBC_ABI_FUTURE"}, "26.04", "GLIBC_ABI_FUTURE .* no Ubuntu release has it"),
    ],
)
def test_glibc_versions_are_compared_as_sets(versions: set[str], release: str, message: str) -> None:
    if not message:
        cluster.check_glibc(HERE, versions, release)
        return
    with pytest.raises(cluster.ClusterError, match=message):
        cluster.check_glibc(HERE, versions, release)


def ubuntu(cloud: LocalCloud) -> str:
    """Return the id of an image that c1.xlarge boots."""
    named = [{"Name": "name", "Values": ["ubuntu/images/*amd64*"]}]
    return str(cloud.client("ec2").describe_images(Filters=named)["Images"][0]["ImageId"])


@needs_compiler
@pytest.mark.skipif(not NEWER, reason="this machine's glibc is not newer than Ubuntu 22.04's")
def test_too_new_a_build_ends_create_nodes_before_it_costs_anything(
    cloud: LocalCloud, group: str, tmp_path: Path
) -> None:
    dist = make_build(tmp_path, newer=True)
    env = {"LD_LIBRARY_PATH": str(tmp_path / "search"), "XDG_CACHE_HOME": str(tmp_path)}
    words = ("createNodes", "c1.xlarge", "1", group)
    old = {"MITSUBA_PACKAGE": str(dist), "UBUNTU_RELEASE": "22.04"}
    done = cloud.cluster(*words, settings=old, env=env)
    assert done.code == 1
    assert f"the build in {dist} needs GLIBC_2.36" in done.last_line
    assert "of a newer glibc than Ubuntu 22.04 has: set UBUNTU_RELEASE = " in done.last_line
    assert cloud.nodes(group) == []
    settings = {"MITSUBA_PACKAGE": str(dist), "AMI_IDS": {"us-east-1": ubuntu(cloud)}}
    done = cloud.cluster(*words, settings=settings, env=env)
    assert done.code == 0, done.err
    assert f"To be installed: the build in {dist} (6 files and the libraries" in done.err
    done = cloud.cluster("install", group, settings=settings, env=env)
    assert done.code == 0, done.err


def learn_build(folder: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Learn the build of the mtssrv in FOLDER."""
    words = [sys.executable, "-I", "-c", cluster.node_program.__wrapped__(cluster.learn_build), "0.6.0"]
    env = {"PATH": f"{folder}:{os.environ['PATH']}"} | env
    return subprocess.run(words, env=env, cwd=cwd, text=True, capture_output=True, check=False)


def test_a_build_says_itself_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert learn_build(HERE / "mitsuba", tmp_path).stdout == "0.6.0 3 0\n"
    assert learn_build(HERE / "mitsuba", tmp_path, MTSSRV_SAMPLES="30", MTSSRV_DOUBLE="1").stdout == "0.6.0 30 1\n"
    monkeypatch.setattr(cluster, "BUILD_LIMIT", 1)
    (tmp_path / "mtssrv").symlink_to(shutil.which("true") or "")
    assert learn_build(tmp_path, tmp_path).stdout == "0.6.0 3 0\n"  # it greets nobody: the usual build


@pytest.mark.parametrize(("version", "code"), [("(3, 8, 10)", 1), ("(3, 9, 0)", 0), ("", 127)])
def test_a_python_that_is_too_old_or_missing(tmp_path: Path, version: str, code: int) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "")
    if version:
        fake = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
        (tmp_path / "python3").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{fake}' \"$3\"\n")
        (tmp_path / "python3").chmod(0o755)
    words = shlex.split(cluster.user_command("check-python", cluster.CHECK_PYTHON))
    done = subprocess.run(words, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
