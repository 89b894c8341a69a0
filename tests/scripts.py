"""Writes each bash script of cluster.py to a file of its own, and prints their names, NUL-separated.

So that shellcheck can read them: `python -m tests.scripts | xargs -0 shellcheck`.
"""

from __future__ import annotations

import ast
import inspect
import sys
import tempfile
from pathlib import Path

import cluster


def find_scripts() -> dict[str, str]:
    """Return all bash scripts: constants that begin as one, or are run on nodes."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(cluster))) if isinstance(node, ast.Call)]
    runs = [call for call in calls if getattr(call.func, "id", "") in ("user_command", "root_command")]
    run = {call.args[1].id for call in runs if isinstance(call.args[1], ast.Name)}
    texts = {name: value for name, value in vars(cluster).items() if isinstance(value, str)}
    return {name: text for name, text in texts.items() if name in run or text.lstrip().startswith("set -")}


def main() -> None:
    """Write the scripts."""
    folder = Path(tempfile.mkdtemp(prefix="cluster-scripts-"))
    for name, text in find_scripts().items():
        path = folder / f"{name.lower()}.sh"
        path.write_text("#!/bin/bash\n" + text)
        sys.stdout.write(f"{path}\0")


if __name__ == "__main__":
    main()
