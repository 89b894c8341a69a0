"""A man in the middle: an sshd with a host key of its own, which lets everybody in and notes what they do."""

from __future__ import annotations

import asyncio
import functools
import threading
from pathlib import Path

import asyncssh


class Impostor(asyncssh.SSHServer):
    """Accepts any user with any key."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def begin_auth(self, username: str) -> bool:
        """Note the name of who comes; no proof is asked for."""
        note(self.log, f"user {username}")
        return False


def note(log: Path, text: str) -> None:
    """Append a line to the impostor's log."""
    with log.open("a") as file:
        file.write(text + "\n")


def serve(address: str, folder: Path) -> None:
    """Serve on port 22 of ADDRESS in the background; impostor.log and impostor.pub go to FOLDER."""
    log = folder / "impostor.log"
    log.touch()
    key = asyncssh.generate_private_key("ssh-ed25519")
    (folder / "impostor.pub").write_bytes(key.export_public_key("openssh"))
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def attend(process: asyncssh.SSHServerProcess[str]) -> None:
        note(log, f"command {process.command}")
        process.exit(0)

    async def listen() -> None:
        factory = functools.partial(Impostor, log)
        await asyncssh.listen(address, 22, server_factory=factory, server_host_keys=[key], process_factory=attend)

    asyncio.run_coroutine_threadsafe(listen(), loop).result(10)
