"""What a user sees: programs on a real pseudo-terminal, and the screen that they leave on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from dataclasses import dataclass
from typing import Any

from tests.support import LIMIT, LocalCloud, impatience

CODES = re.compile(r"\x1b\[(?P<arguments>[\d;?]*)(?P<name>[A-Za-z])|(?P<control>[\r\n\b])|(?P<text>[^\x1b\r\n\b]+)")


@dataclass(frozen=True)
class Seen:
    """What a program did on a terminal: its exit code, the bytes that it wrote, and the lines that they leave."""

    code: int
    raw: str
    lines: list[str]

    @property
    def text(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines)


def render(raw: str) -> list[str]:
    """Return the lines that RAW leaves on a terminal, those that have scrolled away too; a long one stays one."""
    lines, row, column = [""], 0, 0
    for code in CODES.finditer(raw):
        if text := code["text"]:
            for char in text:
                lines[row] = lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]
                column += 1
        elif code["control"] == "\n":
            row, column = row + 1, column
            lines += [""] * (row + 1 - len(lines))
        elif code["control"]:
            column = 0 if code["control"] == "\r" else max(0, column - 1)
        elif code["name"] == "K":
            lines[row] = lines[row][:column]
        elif code["name"] == "J" and code["arguments"] == "2":
            lines = [""] * (row + 1)
        elif code["name"] == "J":
            lines[row:] = [lines[row][:column]]
        elif code["name"] == "A":
            row -= int(code["arguments"] or 1)
        elif code["name"] == "H":
            row, column = 0, 0
    return [line.rstrip() for line in lines]


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, cloud: LocalCloud, *words: str, env: dict[str, str] | None = None, **changes: str) -> None:
        self.raw = b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        around = {
            name: value for name, value in (env or cloud.environment()).items() if name not in ("NO_COLOR", "COLUMNS")
        }
        around |= {"TERM": "xterm"} | impatience({"ANSWER_LIMIT": 30}) | changes
        ends: Any = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.child = cloud.start(*words, env=around, **ends)
        os.close(slave)

    def read(self, until: str = "", times: int = 1) -> bool:
        """Read until the screen has shown UNTIL so many TIMES; return False at the program's end."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if until and self.raw.decode("utf-8", "replace").count(until) >= times:
                return True
            if select.select([self.master], [], [], 1)[0]:
                try:
                    block = os.read(self.master, 1 << 16)
                except OSError:  # EIO: Linux's way to say that the other side is closed
                    return False
                if not block:
                    return False
                self.raw += block
        raise AssertionError(f"the program shows nothing new: {self.raw[-2000:]!r}")

    def end(self) -> Seen:
        """Read up to the program's end."""
        while self.read():
            pass
        os.close(self.master)
        raw = self.raw.decode("utf-8", "replace")
        return Seen(self.child.wait(LIMIT), raw, render(raw))


def show(cloud: LocalCloud, *words: str, **options: Any) -> Seen:
    """Run a program on a pseudo-terminal up to its end."""
    return Terminal(cloud, *words, **options).end()


def stop(terminal: Terminal, number: int) -> Seen:
    """Send a signal, and read up to the end."""
    os.kill(terminal.child.pid, number)
    return terminal.end()
