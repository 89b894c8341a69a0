"""install on real nodes: packages of every kind, and the user's own build."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.build import COMPILER, compile_c, make_build
from tests.localcloud.packages import build_stand_in
from tests.localcloud.places import HERE
from tests.support import LocalCloud, Result, ssh
from tests.test_package import NEWER

pytestmark = [pytest.mark.xdist_group("nspawn"), pytest.mark.skipif(not COMPILER, reason="needs gcc")]
GROUP = "own-build"


@pytest.fixture(scope="module")
def node(nodes: LocalCloud) -> Iterator[dict[str, Any]]:
    """One node, without Mitsuba."""
    made = nodes.cluster("createNodes", "c1.xlarge", "1", GROUP)
    assert made.code == 0, made.err
    yield nodes.nodes(GROUP)[0]
    assert nodes.cluster("terminateAll", GROUP).code == 0


def install(cloud: LocalCloud, package: Path, **env: str) -> Result:
    """Install a package on the node; its image is not known to have any particular glibc."""
    settings = {"MITSUBA_PACKAGE": str(package), "AMI_IDS": {"us-east-1": "ami-00000000"}}
    return cloud.cluster("install", GROUP, settings=settings, env={"XDG_CACHE_HOME": str(package.parent)} | env)


def test_a_build_serves_on_a_node_that_has_none_of_its_libraries(
    nodes: LocalCloud, node: dict[str, Any], tmp_path: Path
) -> None:
    dist = make_build(tmp_path, newer=NEWER)
    for program in ("mtssrv", "mitsuba"):
        script = dist / "data" / program
        script.write_text(script.read_text().replace('_SAMPLES", "3"', '_SAMPLES", "30"').replace('E", "0"', 'E", "1"'))
    done = install(nodes, dist, LD_LIBRARY_PATH=str(tmp_path / "search"))
    assert done.code == 0, done.err
    assert done.out == f"{node['name']}: Mitsuba 0.6.0\n"
    started = nodes.cluster("start", GROUP)
    assert started.code == 0, started.err
    client = (sys.executable, str(HERE / "mitsuba/mitsuba"), "-c", node["public_name"], "scene.xml")
    env = nodes.environment(MTSSRV_SAMPLES="30", MTSSRV_DOUBLE="1")
    offer = nodes.run(*client, env=env)
    assert "cores" in offer.out, offer.err
    assert "cores" not in nodes.run(*client).out, "the build's spectrum samples and precision are not its own"
    owners = ssh(nodes, node, "find /opt/mitsuba /usr/local/bin/mtssrv ! -user root -o -perm /go+w").out
    assert owners == "", "others could write what root runs"
    assert ssh(nodes, node, "ls .mitsuba-package | wc -l; ls -d /var/lib/mitsuba-cluster/work.*").out == "1\n"


def test_a_package_that_lacks_libraries_names_them(nodes: LocalCloud, node: dict[str, Any], tmp_path: Path) -> None:
    dist = make_build(tmp_path)
    for name, soname in (("known", "libsystemd-0.so"), ("unknown", "libFancy_stuff.so.3")):
        compile_c(tmp_path / soname, f"int {name};")
        compile_c(dist / f"plugins/{name}.so", "int plugin;", tmp_path / soname)
    (tmp_path / "versions").write_text("GLIBC_2.99 { global: future; };")
    script = f"-Wl,--version-script={tmp_path / 'versions'}"
    compile_c(tmp_path / "libc.so.6", "int future(void) { return 0; }", "-nostdlib", script)
    compile_c(dist / "plugins/new.so", "int future(void); int a(void) { return future(); }", tmp_path / "libc.so.6")
    package = tmp_path / "mitsuba.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        archive.add(dist, "mitsuba")
    look = "ls -d /opt/* /var/lib/mitsuba-cluster/work.* 2> /dev/null; cat /usr/local/bin/mtssrv"
    before = ssh(nodes, node, look).out
    done = install(nodes, package)
    assert done.code == 1
    lacking = next(line for line in done.err.splitlines() if "the package needs what this node lacks" in line)
    for name in ("libFancy_stuff.so.3", "libglass.so.2", "libspectrum.so.1"):
        assert f"{name}," in lacking or lacking.endswith(name)
    assert "libsystemd-0.so (Ubuntu package libsystemd0)" in lacking, "by the name alone: apt knows this one"
    assert "GLIBC_2.99 (of a newer glibc than this node's glibc" in lacking
    assert "libQt" not in lacking, "mtsgui is none of a node's programs"
    assert ssh(nodes, node, look).out == before, "half-installed"


def test_a_processor_that_is_too_old(nodes: LocalCloud, node: dict[str, Any], tmp_path: Path) -> None:
    dist = make_build(tmp_path, trap=True)
    done = install(nodes, dist, LD_LIBRARY_PATH=str(tmp_path / "search"))
    assert done.code == 1
    assert "it was built for a newer processor than c1.xlarge has: build it with -march=x86-64" in done.err
    assert ssh(nodes, node, "cat /var/lib/mitsuba-cluster/installed").out == "", "a failed installation counts as one"


def test_a_password_in_an_address_is_nowhere_to_be_read(nodes: LocalCloud, node: dict[str, Any]) -> None:
    line = str(nodes.ask("config")["PKG_REPOSITORY"]).replace("http://", "http://user:hunter2@")
    done = nodes.cluster("install", GROUP, settings={"PKG_REPOSITORY": line})
    assert done.code == 0, done.err
    log = nodes.where.root / f"state/mitsuba-cluster/{GROUP}/{node['id']}.install.log"
    assert "hunter2" not in done.out + done.err
    assert log.stat().st_mode & 0o777 == 0o600
    assert "hunter2" not in log.read_text()
    found = ssh(nodes, node, "sudo journalctl --no-pager | grep hunter2; grep -rl hunter2 /etc /var/lib 2> /dev/null")
    assert found.out == "", "the node shows the password to everybody"
    assert "hunter2" in ssh(nodes, node, "sudo cat /etc/apt/sources.list.d/mitsuba.list").out


def make_package(kind: str, folder: Path) -> Path:
    """Return the stand-in as a .deb, as a .tar.gz with its programs in a folder, or as a script that installs it."""
    if kind == "deb":
        return build_stand_in(folder)
    if kind == "tar.gz":
        path = folder / "mitsuba-0.6.0.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(HERE / "mitsuba", "mitsuba-0.6.0/dist")
        return path
    path = folder / "set up mitsuba.sh"
    server = base64.b64encode((HERE / "mitsuba" / "mtssrv").read_bytes()).decode()
    path.write_text(f"set -e\necho {server} | base64 -d > /usr/local/bin/mtssrv\nchmod 755 /usr/local/bin/mtssrv\n")
    return path


def test_packages_of_every_kind(nodes: LocalCloud, tmp_path: Path) -> None:
    group = "packages"
    assert nodes.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    (node,) = nodes.nodes(group)
    for kind in ("sh", "tar.gz", "deb"):
        path = make_package(kind, tmp_path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        done = nodes.cluster("install", group, settings={"MITSUBA_PACKAGE": f"{path}#sha256={digest}"})
        assert (done.code, done.out) == (0, f"{node['name']}: Mitsuba 0.6.0\n"), done.err
        where = ssh(nodes, node, "command -v mtssrv; sudo rm -f /usr/local/bin/mtssrv").out
        assert where == ("/usr/bin/mtssrv\n" if kind == "deb" else "/usr/local/bin/mtssrv\n")
    tree = tmp_path / "tree"  # of another build of the same version, after one that was cut off
    subprocess.run(["dpkg-deb", "--raw-extract", path, tree], check=True)
    (tree / "usr/bin/rebuilt").touch()
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, path], check=True)
    interrupted = ssh(nodes, node, "dpkg-query --status base-files | sudo tee /var/lib/dpkg/updates/0000")
    assert interrupted.code == 0, interrupted.err
    done = nodes.cluster("install", group, settings={"MITSUBA_PACKAGE": str(path)})
    assert (done.code, done.out) == (0, f"{node['name']}: Mitsuba 0.6.0\n"), done.err
    assert ssh(nodes, node, "ls /usr/bin/rebuilt").code == 0
    other = build_stand_in(tmp_path, "libboost-system1.65.1")  # what a package for Ubuntu 18.04 wants
    done = nodes.cluster("install", group, settings={"MITSUBA_PACKAGE": str(other)})
    assert done.code == 1, done.err
    assert "Depends: libboost-system1.65.1 but it is not installable" in done.err
    wrong = nodes.cluster("install", group, settings={"MITSUBA_PACKAGE": f"{path}#sha256={'0' * 64}"})
    assert wrong.code == 1
    assert f"MITSUBA_PACKAGE: the SHA-256 of {path} is " in wrong.last_line
    assert nodes.cluster("terminateAll", group).code == 0
