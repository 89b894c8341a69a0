"""Writes into README.md what the program itself says: `python -m tests.readme [TRANSCRIPT]`.

The help text comes from --help; TRANSCRIPT is a file with the output of tests/session.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

import cluster
from tests.localcloud.places import PROJECT
from tests.localcloud.session import SHORT_WAY

README = PROJECT / "README.md"


def help_text() -> str:
    """Return --help of the program and of each command, as a code block."""
    as_run: dict[str, Any] = {**cluster.cli.context_settings} | {"terminal_width": 100, "max_content_width": 100}
    context = click.Context(cluster.cli, info_name="./cluster.py", **as_run)
    texts = [cluster.cli.get_help(context)]
    for name, command in cluster.cli.commands.items():
        if not command.hidden:
            inner = click.Context(command, info_name=name, parent=context, terminal_width=100)
            lines = command.get_help(inner).splitlines()
            texts.append("\n".join(line for line in lines if "--help" not in line and line != "Options:").rstrip())
    return "```\n" + "\n\n\n".join(texts) + "\n```"


def replace_block(text: str, name: str, block: str) -> str:
    """Return TEXT with BLOCK between the markers of NAME."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)"
    return re.sub(pattern, lambda found: found[1] + block + "\n" + found[2], text, flags=re.S)


def transcript_block(text: str) -> str:
    """Return a session's output, without its short way, as a code block that fits the page."""
    text = text.split(SHORT_WAY)[0]
    kept = [line.rstrip() for line in text.splitlines() if not line.startswith(("building", "The whole", "making"))]
    return (
        "What that looks like, on three small nodes of the local stand-in:\n\n```\n" + "\n".join(kept).strip() + "\n```"
    )


def main() -> None:
    """Renew README.md."""
    text = replace_block(README.read_text(), "help", help_text())
    if len(sys.argv) > 1:
        text = replace_block(text, "transcript", transcript_block(Path(sys.argv[1]).read_text()))
    README.write_text(text)


if __name__ == "__main__":
    main()
