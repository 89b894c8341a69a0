"""Writes each remote script of cluster.py to a file of its own, and prints their names, NUL-separated.

So that shellcheck can read them: `python -m tests.scripts | xargs -0 shellcheck`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import cluster

SCRIPTS = ("BOOT", "CHECK_GUARD", "EXTEND", "WAIT_FOR_BOOT", "FACTS", "INSTALL", "START_SERVER")


def main() -> None:
    """Write the scripts."""
    folder = Path(tempfile.mkdtemp(prefix="cluster-scripts-"))
    for name in SCRIPTS:
        path = folder / f"{name.lower()}.sh"
        path.write_text("#!/bin/bash\n" + getattr(cluster, name))
        sys.stdout.write(f"{path}\0")


if __name__ == "__main__":
    main()
