"""The user's session, from createNodes to terminateAll, with every command and its real output."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import suppress

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
    """Run a command inside the cloud on a plain terminal of 80 columns, showing its output; return code and output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    plain = environment(where) | {"TERM": "dumb", "PATH": f"{HERE / 'mitsuba'}:{os.environ['PATH']}"}
    child = subprocess.Popen(inside(where, words), env=plain, cwd=PROJECT, stdout=slave, stderr=slave)
    os.close(slave)
    output = b""
    with os.fdopen(master, "rb", 0) as terminal, suppress(OSError):  # EIO: all is read
        while block := terminal.read(1 << 16):
            output += block
            click.echo(block.replace(b"\r\n", b"\n"), nl=False)
    return child.wait(), output.decode()
