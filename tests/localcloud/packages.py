"""The local apt repository: a mitsuba_*.deb of the stand-ins, or a real package in its place."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.localcloud.places import HERE

CONTROL = """Package: mitsuba
Version: 0.6.0-1
Architecture: all
Maintainer: local cloud <nobody@example.org>
Depends: {depends}
Description: stand-in for Mitsuba's render server and client
"""


def build_stand_in(target: Path, depends: str = "python3") -> Path:
    """Pack the stand-in server and client as a .deb in the folder TARGET; return its path."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(CONTROL.format(depends=depends))
        (tree / "usr/bin").mkdir(parents=True)
        for program in ("mtssrv", "mitsuba"):
            shutil.copy(HERE / "mitsuba" / program, tree / "usr/bin" / program)
            (tree / "usr/bin" / program).chmod(0o755)
        tree.chmod(0o755)
        package = target / "mitsuba_0.6.0-1_all.deb"
        run("dpkg-deb", "--root-owner-group", "--build", str(tree), str(package))
    return package


def make_repository(folder: Path, package: Path | None, image: Path, say: Callable[[str], None]) -> None:
    """Fill FOLDER with PACKAGE and what it depends on (or with the stand-in), and index it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if package:
        say(f"fetching what {package.name} depends on")
        shutil.copy(package, folder)
        fetch_dependencies(package, image, folder)
    else:
        build_stand_in(folder)
    index = run("dpkg-scanpackages", "--multiversion", ".", cwd=folder)
    (folder / "Packages").write_text(index)


def fetch_dependencies(package: Path, image: Path, folder: Path) -> None:
    """Download into FOLDER what PACKAGE needs beyond the nodes' IMAGE, from the host's own mirror.

    Runs apt inside a throw-away overlay of the image: the host's packages stay as they are.
    """
    with tempfile.TemporaryDirectory() as scratch:
        upper, work, root = (Path(scratch) / name for name in ("upper", "work", "root"))
        for path in (upper, work, root):
            path.mkdir()
        options = f"lowerdir={image},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "overlay", "-o", options, str(root))
        try:
            copy_apt_settings(root)
            shutil.copy(package, root / "package.deb")
            run("chroot", str(root), "apt-get", "update", "-qq")
            run("chroot", str(root), "apt-get", "install", "-qq", "--download-only", "-y", "/package.deb")
            for archive in (root / "var/cache/apt/archives").glob("*.deb"):
                shutil.copy(archive, folder)
        finally:
            run("umount", "-l", str(root))


def copy_apt_settings(root: Path) -> None:
    """Let apt inside ROOT use the host's mirrors and resolver."""
    shutil.copytree("/etc/apt", root / "etc/apt", dirs_exist_ok=True, symlinks=True)
    shutil.copytree("/usr/share/keyrings", root / "usr/share/keyrings", dirs_exist_ok=True)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")


def run(*words: str, cwd: Path | None = None) -> str:
    """Run a program and return its stdout; RuntimeError with its complaint where it fails."""
    done = subprocess.run(words, cwd=cwd, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout
