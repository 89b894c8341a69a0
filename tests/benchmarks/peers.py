"""The other tools: their environment, and the command lines that do the same as ours."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.localcloud.places import cache

HERE = Path(__file__).resolve().parent
PROGRAMS = ("pdsh", "clush", "s3cmd", "/usr/sbin/sshd")  # of the packages pdsh, clustershell, s3cmd, openssh-server
QUICK = "-c aes128-gcm@openssh.com -o KexAlgorithms=curve25519-sha256"
LIBRARIES = ("asyncssh", "asyncssh_tuned", "fabric", "paramiko", "parallel_ssh")


def environment() -> Path:
    """Return the bin folder of the peers' Python environment; make it where it is missing."""
    wanted = HERE / "requirements.txt"
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()[:10]
    folder = cache() / f"peers-{digest}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/pip"), "install", "--quiet", "-r", str(wanted)], check=True)
        (folder / "complete").touch()
    return folder / "bin"


def missing() -> list[str]:
    """Return the programs that apt must bring first."""
    return [name for name in PROGRAMS if not shutil.which(name)]


@dataclass(frozen=True)
class Hosts:
    """Where to run a command, and as whom."""

    addresses: Sequence[str]
    port: int
    user: str
    key: str

    @property
    def ssh(self) -> str:
        """The options that every ssh needs here."""
        return (
            f"-p {self.port} -i {self.key} -l {self.user} -o IdentitiesOnly=yes -o BatchMode=yes -o LogLevel=ERROR "
            "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -F /dev/null"
        )


def command_lines(hosts: Hosts, command: str, bin_folder: Path) -> dict[str, list[str]]:
    """Return tool -> the words that run COMMAND on all HOSTS."""
    names, count = ",".join(hosts.addresses), str(len(hosts.addresses))
    python = str(bin_folder / "python")
    login = [str(hosts.port), hosts.user, hosts.key]
    lines = {name: [python, str(HERE / "peer.py"), name, command, *login, *hosts.addresses] for name in LIBRARIES}
    pdsh, clush = ["pdsh", "-S", "-R", "ssh", "-w", names], ["clush", "-S", "-q", "-w", names]
    lines["pdsh"] = ["env", f"PDSH_SSH_ARGS_APPEND={hosts.ssh}", *pdsh, command]
    lines["pdsh tuned"] = ["env", f"PDSH_SSH_ARGS_APPEND={hosts.ssh} {QUICK}", *pdsh, "-f", count, command]
    lines["clush"] = [*clush, "-o", hosts.ssh, command]
    lines["clush tuned"] = [*clush, "-f", count, "-o", f"{hosts.ssh} {QUICK}", command]
    ansible = ["env", f"ANSIBLE_SSH_ARGS={hosts.ssh} -o ControlMaster=no", "ANSIBLE_HOST_KEY_CHECKING=False"]
    ansible += ["ANSIBLE_PYTHON_INTERPRETER=/usr/bin/python3", str(bin_folder / "ansible"), "all", "-i", f"{names},"]
    lines["ansible raw"] = [*ansible, "-m", "raw", "-a", command, "-f", count]
    loop = f"for h in {' '.join(hosts.addresses)}; do ssh {hosts.ssh} $h {shlex.quote(command)} & done; wait"
    lines["ssh loop"] = ["bash", "-c", loop]
    return lines


def no_ops(bin_folder: Path) -> dict[str, list[str]]:
    """Return tool -> the words that make it start and do nothing."""
    python = str(bin_folder / "python")
    lines = {name: [python, str(HERE / "peer.py"), name, "true", "0", "", os.devnull] for name in LIBRARIES}
    for name in ("asyncssh", "asyncssh_tuned"):  # they read the key first: import only
        lines[name] = [python, "-c", "import asyncssh"]
    lines["paramiko"] = [python, "-c", "import paramiko"]
    lines |= {"pdsh": ["pdsh", "-V"], "pdsh tuned": ["pdsh", "-V"]}
    lines |= {"clush": ["clush", "--version"], "clush tuned": ["clush", "--version"]}
    return lines | {"ansible raw": [str(bin_folder / "ansible"), "--version"], "ssh loop": ["ssh", "-V"]}
