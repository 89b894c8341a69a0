"""Where the local cloud keeps its files, and the addresses that it gives out.

All addresses are loopback or exist only inside the cloud's network namespace. Public
ones come from the TEST-NET blocks (RFC 5737), which belong to nobody: whatever leaks
reaches no stranger.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent

ACCOUNT = "123456789012"
ACCESS_KEY = "LOCALCLOUD"
SECRET_KEY = "local-cloud-secret"
REGION = "us-east-1"

ROUTER = "172.31.0.1"  # the default VPC's first address, where AWS has its router too
RESOLVER = "172.31.0.2"
IMPOSTOR = "172.31.0.3"  # where a man in the middle has his own sshd
METADATA = "169.254.169.254"
PUBLIC_NETWORKS = ("203.0.113.0/24", "198.51.100.0/24")
CLIENT = "192.0.2.10"  # the address from which the user's machine reaches the nodes
STRANGER = "192.0.2.66"  # another internet host

EC2_PORT = 5000
S3_PORT = 9000
APT_PORT = 8000


@dataclass(frozen=True)
class Places:
    """The folder of one running cloud, and what lies in it."""

    root: Path

    @property
    def nodes(self) -> Path:
        """One folder a node."""
        return self.root / "nodes"

    @property
    def calls(self) -> Path:
        """Every call at the AWS endpoint, a JSON object a line."""
        return self.root / "calls.jsonl"

    @property
    def log(self) -> Path:
        """What the daemon has to say."""
        return self.root / "daemon.log"

    @property
    def apt(self) -> Path:
        """The local apt repository."""
        return self.root / "apt"

    @property
    def ready(self) -> Path:
        """Written when the cloud answers: its settings and environment, as JSON."""
        return self.root / "ready.json"

    @property
    def pid(self) -> Path:
        """The daemon's process id."""
        return self.root / "pid"

    @property
    def namespace(self) -> str:
        """The network namespace's name: one a folder, so that two clouds do not meet."""
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:6]
        return f"localcloud-{digest}"


def default_root() -> Path:
    """Return the folder that commands use when none is named."""
    named = os.environ.get("LOCALCLOUD")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"localcloud-{os.getuid()}"


def cache() -> Path:
    """Return the folder for what is worth keeping between runs (the nodes' image)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mitsuba-cluster"
