"""Writes into README.md what the program itself says: `python -m tests.readme [TRANSCRIPT]`.

The table of commands comes from their help; TRANSCRIPT is a file with the output of tests/session.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

import cluster
from tests.localcloud.places import PROJECT
from tests.localcloud.session import SHORT_WAY

README = PROJECT / "README.md"


def help_text() -> str:
    """Return the commands as a table: how each is called, and the first line of its help."""
    rows = ["| command | what it does |", "|---|---|"]
    for name in cluster.cli.list_commands(click.Context(cluster.cli)):
        command = cluster.cli.commands[name]
        context = click.Context(command, info_name=name)
        words = [word for word in command.collect_usage_pieces(context) if word != "[OPTIONS]"]
        if not command.hidden:
            rows.append(f"| `{' '.join([name, *words])}` | {command.get_short_help_str(200)} |")
    return "\n".join(rows)


def replace_block(text: str, name: str, block: str) -> str:
    """Return TEXT with BLOCK between the markers of NAME."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)"
    return re.sub(pattern, lambda found: found[1] + block + "\n" + found[2], text, flags=re.S)


def transcript_block(text: str) -> str:
    """Return a session's output as a code block; without what says little on paper."""
    shown = (
        "$ ./cluster.py createNodes",
        "$ ./cluster.py start",
        "$ ./cluster.py status",
        "$ ./cluster.py terminateAll",
    )
    text = re.sub(r"^(Image|Zones).*\n", "", text.split(SHORT_WAY)[0], flags=re.M)
    text = re.sub(r"(Made a new SSH key: ).*", r"\1mitsuba-key.pem", text)
    kept: dict[str, str] = {}  # command -> its first block
    for block in re.split(r"\n(?=\$ )", text):
        if block.startswith(shown):
            kept.setdefault(block.split("\n")[0], block.strip())
    return (
        "What that looks like, at 80 columns, on three small nodes of the local stand-in:\n\n```\n"
        + "\n".join(kept.values())
        + "\n```"
    )


def main() -> None:
    """Renew README.md."""
    text = replace_block(README.read_text(), "help", help_text())
    if len(sys.argv) > 1:
        text = replace_block(text, "transcript", transcript_block(Path(sys.argv[1]).read_text()))
    README.write_text(text)


if __name__ == "__main__":
    main()
