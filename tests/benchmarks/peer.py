"""Runs one command on many hosts by another library: peer.py LIBRARY COMMAND PORT USER KEY [HOST…].

Run by the peers' own Python (requirements.txt); without hosts it only imports the library.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import Any


def asyncssh(command: str, port: int, user: str, key: str, hosts: list[str], **options: Any) -> None:
    """All at once in one event loop, asyncssh's defaults but for OPTIONS."""
    library = importlib.import_module("asyncssh")
    known = library.read_private_key(key)

    async def one(host: str) -> None:
        arguments = {"username": user, "client_keys": [known], "known_hosts": None, "agent_path": None}
        async with library.connect(host, port, **arguments, **options) as connection:
            await connection.run(command, check=True)

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, hosts))

    asyncio.run(all_of_them())


def asyncssh_tuned(command: str, port: int, user: str, key: str, hosts: list[str]) -> None:
    """With the quickest algorithms, and no configuration file to read."""
    quick = {"encryption_algs": ["aes128-gcm@openssh.com"], "kex_algs": ["curve25519-sha256"], "config": None}
    asyncssh(command, port, user, key, hosts, **quick, compression_algs=["none"])


def fabric(command: str, port: int, user: str, key: str, hosts: list[str]) -> None:
    """A thread a host."""
    library = importlib.import_module("fabric")
    if hosts:
        group = library.ThreadingGroup(*hosts, user=user, port=port, connect_kwargs={"key_filename": key})
        group.run(command, hide=True)


def paramiko(command: str, port: int, user: str, key: str, hosts: list[str]) -> None:
    """Paramiko as its documentation shows it, a thread a host."""
    library = importlib.import_module("paramiko")
    threads = importlib.import_module("concurrent.futures")

    def one(host: str) -> None:
        client = library.SSHClient()
        client.set_missing_host_key_policy(library.AutoAddPolicy())
        client.connect(host, port, user, key_filename=key, allow_agent=False, look_for_keys=False)
        _, stdout, _ = client.exec_command(command)
        assert stdout.channel.recv_exit_status() == 0
        client.close()

    with threads.ThreadPoolExecutor(max(1, len(hosts))) as pool:
        list(pool.map(one, hosts))


def parallel_ssh(command: str, port: int, user: str, key: str, hosts: list[str]) -> None:
    """libssh2 in gevent's greenlets."""
    library = importlib.import_module("pssh.clients")
    if hosts:
        client = library.ParallelSSHClient(hosts, user=user, port=port, pkey=key, pool_size=len(hosts))
        for output in client.run_command(command):
            list(output.stdout)
            assert output.exit_code == 0


LIBRARIES = {one.__name__: one for one in (asyncssh, asyncssh_tuned, fabric, paramiko, parallel_ssh)}

if __name__ == "__main__":
    name, line, number, login, path, *addresses = sys.argv[1:]
    LIBRARIES[name](line, int(number), login, path, addresses)
