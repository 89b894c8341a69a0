"""The user's session, from createNodes to terminateAll, with every command and its real output."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import click

from tests.localcloud.__main__ import environment, inside, ready
from tests.localcloud.places import HERE, PROJECT, Places

SHORT_WAY = "And the short way:"


def play(where: Places, nodes: int) -> int:
    """Play the session on the cloud in WHERE; return 0, or the exit code of the first command that failed."""
    data = where.root / "smoke.vol"
    data.write_bytes(os.urandom(16 << 20))
    scene = where.root / "scene.xml"
    scene.write_text('<scene version="0.6.0"><float name="seconds" value="1"/></scene>\n')
    head = ""
    client = str(HERE / "mitsuba" / "mitsuba")
    for words in (
        ["./cluster.py", "createNodes", "c1.xlarge", str(nodes)],
        ["./cluster.py", "install"],
        ["./cluster.py", "start"],
        ["mitsuba", "-c", "HEAD", str(scene)],
        ["./cluster.py", "status"],
        ["./cluster.py", "syncData", str(data)],
        ["./cluster.py", "terminateAll"],
        ["./cluster.py", "status"],
        ["./cluster.py", "up", "c1.xlarge", str(nodes)],
        ["./cluster.py", "render", str(scene), "--then-terminate"],
    ):
        if words[0] == "mitsuba":
            words[2] = head
        if words[1] == "up":
            click.secho(f"{SHORT_WAY}\n", bold=True)
        click.secho(f"$ {shlex.join(words)}", bold=True)
        program = {"./cluster.py": [sys.executable, "cluster.py"], "mitsuba": [sys.executable, client]}[words[0]]
        code, output = run(where, [*program, *words[1:]])
        if words[1] == "start":
            head = output.splitlines()[-1].removeprefix("Head node: ")
        if code:
            return code
        click.echo()
    click.echo(f"The whole session went well, on {ready(where)['kind']} nodes.")
    return 0


def run(where: Places, words: list[str]) -> tuple[int, str]:
    """Run a command inside the cloud, showing its output; return its exit code and output."""
    child = subprocess.Popen(
        inside(where, words),
        env=environment(where) | {"PATH": f"{HERE / 'mitsuba'}:{os.environ['PATH']}"},
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout
    output = ""
    for line in child.stdout:
        output += line
        click.echo(line, nl=False)
    return child.wait(), output
