"""Process nodes: SSH listeners on 127.x.y.z, a thousand on one machine, without root.

The SSH protocol, the host key from the user data and the user's key are real; so are
commands of an ordinary user, which run in the node's own folder, and mtssrv's handshake.
A step that would run as root never touches the host: it is acted out by the table ACTS.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import http.server
import ipaddress
import json
import os
import secrets
import shlex
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh

from cluster import Answer, pick_workers
from tests.localcloud.packages import CONTROL

CORES = 4
VERSION = "0.6.0"
SERVER_PORT = 7554
HELLO, REFUSAL, QUIT = b"\x1b\xcd", b"\x00\x0d", b"\x00\x0c"
RESTART = 1.0  # seconds, as RestartSec= of the real unit
RENDER, DONE = b"\x00\x01", b"\x00\x02"  # between the stand-ins, see mitsuba/mtssrv
STEPS = (
    "wait-for-boot",
    "check-metadata-rules",
    "check-python",
    "install",
    "start-server",
    "sync",
    "serve",
)  # that a fault can spoil


class ProcessNetwork:
    """The loopback addresses of one cloud's nodes, and the event loop that serves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.second, self.claim = claim_addresses()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def addresses(self, half: int) -> Iterator[str]:
        """Yield the nodes' addresses, N this cloud's own: public ones from 127.N.0.1, private from 127.N.128.1."""
        network = ipaddress.ip_network(f"127.{self.second}.{128 * half}.0/17")
        return (str(host) for host in network.hosts() if not str(host).endswith(".255.254"))

    def make_node(self, instance: Any) -> ProcessNode:
        """Return the node behind an instance."""
        return ProcessNode(self, instance)

    def repository(self, folder: Path) -> str:
        """Serve an apt index that offers mitsuba; return its apt line."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Packages").write_text(CONTROL.format(depends="python3"))

        class Files(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"deb [trusted=yes] http://127.0.0.1:{server.server_address[1]} ./"


def claim_addresses() -> tuple[int, socket.socket]:
    """Return an N for 127.N.x.y that no other cloud of this machine has, and the socket that holds it."""
    for second in range(10, 250):
        try:
            return second, socket.create_server((f"127.{second}.255.254", SERVER_PORT))
        except OSError:
            continue
    raise RuntimeError("240 clouds are running on this machine already")


class ProcessNode:
    """One listener, with the folder that stands for its disk."""

    def __init__(self, network: ProcessNetwork, instance: Any) -> None:
        self.network, self.instance = network, instance
        self.public_ip: str | None = None
        self.answered: float | None = None
        self.folder = network.folder / instance.id
        self.cores = CORES
        self.role = ""
        self.plan: dict[str, Any] = {}  # what start wants of its guard
        self.links = False  # its server is a head's or a sub-head's
        self.linked: list[str] = []  # the workers that its server is linked to
        self.guard: dict[str, Any] = {}  # what the guard of a real node would say of itself
        self.boot = secrets.token_hex(16)
        self.started = ""  # the present start of the server's unit
        self.clients: set[asyncio.StreamWriter] = set()
        self.journal: list[tuple[float, str]] = []  # the server's complaints, each with its time
        self.installed = self.replaced = ""  # what was installed, and what replaced it under a running server
        self.deadline: float | None = None
        self.restarts, self.problem = 0, ""  # of its server
        self.listener: asyncssh.SSHAcceptor | None = None
        self.impostor: asyncio.Server | None = None  # what answers in sshd's place
        self.server: asyncio.Server | None = None
        self.connections: set[asyncssh.SSHServerConnection] = set()
        self.received = 0  # bytes, over SSH
        self.forwards, self.most_sessions = True, 10  # sshd's AllowTcpForwarding and MaxSessions
        self.trouble: dict[str, str] = {}  # a step's name, or "server" -> what goes wrong with it

    @property
    def address(self) -> str:
        """Where sshd listens: as on AWS the private address can't be reached from outside, if there is a public one."""
        return self.public_ip or str(self.instance.private_ip)

    # What the cloud asks of a node

    def start(self, public_ip: str | None) -> None:
        """Listen with the host key of the user data."""
        self.public_ip = public_ip
        (self.folder / "home").mkdir(parents=True, exist_ok=True)
        self.call(self._listen())
        self.answered = time.monotonic()

    def fault(self, what: str) -> None:
        """Make something go wrong; see FAULTS."""
        self.call(FAULTS[what](self))

    def stop(self, grace: float = 6) -> None:
        """Stop listening and drop all connections."""
        self.call(self._close())

    def reboot(self) -> None:
        """Drop everything and come back."""
        self.call(self._close())
        self.boot = secrets.token_hex(16)
        self.call(self._listen())
        if self.role:
            self.links = self.role == "head"  # a sub-head comes back as a worker
            self.call(self.serve())

    async def drop(self) -> None:
        """Drop every connection without a word."""
        for connection in list(self.connections):
            connection.abort()

    async def replace_sshd(self, answer: Callable[[asyncio.StreamWriter], object]) -> None:
        """Let something else than sshd answer at its port."""
        assert self.listener

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answer(writer)
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()

        self.listener.close()
        await self.listener.wait_closed()
        await self.drop()
        self.impostor = await asyncio.start_server(greet, self.address, self.network.port)

    async def heal(self) -> None:
        """Undo all faults."""
        self.trouble.clear()
        self.cores, self.forwards, self.most_sessions = CORES, True, 10
        if self.impostor:
            self.impostor.close()
            self.impostor = None
        if not (self.listener and self.listener.get_port()):
            await self._listen()

    def console(self) -> str:
        """Return what a process node writes to its console: nothing."""
        return ""

    def set_rules(self, rules: str) -> None:
        """Ignore the rules: loopback has no firewall here."""

    def call(self, work: Awaitable[Any]) -> Any:
        """Run a coroutine on the network's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.network.loop).result(30)  # type: ignore[arg-type]

    # SSH

    async def _listen(self) -> None:
        config = self.user_data()
        key = asyncssh.import_private_key(config["ssh_keys"]["ed25519_private"])
        pair = self.instance.ec2_backend.key_pairs[self.instance.key_name]
        public = pair.material_public
        line = public.decode() if isinstance(public, bytes) else public
        self.listener = await asyncssh.listen(
            self.address,
            self.network.port,
            server_factory=functools.partial(SshServer, self),
            server_host_keys=[key],
            authorized_client_keys=asyncssh.import_authorized_keys(line),
            process_factory=self.attend,
            encoding=None,
            allow_scp=False,
            sftp_factory=None,
            login_timeout=120,
            tcp_keepalive=False,
        )

    def user_data(self) -> dict[str, Any]:
        """Return the cloud-config."""
        text = base64.b64decode(str(self.instance.user_data)).decode()
        config: dict[str, Any] = json.loads(text.removeprefix("#cloud-config\n"))
        return config

    async def _close(self) -> None:
        for one in (self.listener, self.impostor):
            if one:
                one.close()
        self.listener = self.impostor = None
        await self.lose_server()
        await self.drop()

    async def attend(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        """Run one command of a session."""
        words = shlex.split(process.command or "")
        root = words[:2] == ["sudo", "-n"]
        words = words[2:] if root else words
        script = words[3] if words[:2] == ["bash", "-c"] and len(words) > 3 else ""
        if words[:3] == ["python3", "-I", "-c"]:
            script = "serve" if "\nserve_files(" in words[3] else "sync"
        step = script
        act = ACTS.get(script)
        try:
            if step in self.trouble:
                process.stdout.write(b"the last words of a step that goes wrong\n")
                code = await self.go_wrong(self.trouble[step])
            elif act:
                given = [(await process.stdin.readline()).decode()] if act is start_server else []
                code, output = await act(self, words[4:] + given)
                process.stdout.write(output.encode())
            elif root:
                code = 1
                process.stderr.write(b"a process node acts out no such root step\n")
            else:
                code = await self.run(process, words)
            process.exit(code)
        except (OSError, asyncssh.Error) as error:
            process.stderr.write(f"{error}\n".encode())
            process.exit(255)

    async def go_wrong(self, how: str) -> int:
        """Spoil a step that has begun; return its exit code."""
        if how == "dies":
            self.instance.terminate("Server.InternalError", "Server.InternalError: Internal error on launch")
        if how == "drops":
            await self.drop()
        return 1

    async def run(self, process: asyncssh.SSHServerProcess[bytes], words: list[str]) -> int:
        """Run an ordinary command for real, in the node's folder and with a clean environment."""
        if words[:3] == ["python3", "-I", "-c"] and len(words) > 4:
            words[4] = str(self.data(words[4]))  # the folder into which a node fetches files
        elif not process.command:
            words = ["bash"]  # a login
        elif words[:2] != ["bash", "-c"]:
            words = ["bash", "-c", process.command]
        home = str(self.folder / "home")
        child = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=home,
            env={"PATH": os.environ["PATH"], "HOME": home, "NODE": self.address},
        )
        feeding = asyncio.ensure_future(feed(process, child))
        assert child.stdout
        while block := await child.stdout.read(1 << 16):
            process.stdout.write(block)
            await process.stdout.drain()
        feeding.cancel()
        return await child.wait()

    def data(self, directory: str) -> Path:
        """Return the node's own folder for an absolute directory of its disk."""
        path: Path = self.folder / directory.lstrip("/")
        path.mkdir(parents=True, exist_ok=True)
        return path

    # mtssrv

    async def serve(self) -> None:
        """Start (or restart) a server of this node's role; a head's links those workers that answer."""
        self.end_server()
        nodes = {node.instance.private_ip: node for node in self.known(self.network) if node.server}
        plan = {"workers": {}} | self.plan
        found = dict.fromkeys(plan["workers"], Answer(False, "is gone"))
        for one in found.keys() & nodes.keys():
            wrong = "announces too many cores" if nodes[one].offered() > plan["workers"][one] else ""
            found[one] = Answer(True, wrong, relays=nodes[one].relays and not wrong)
        self.linked = pick_workers(plan, found) if self.links else []
        self.started = secrets.token_hex(16)
        if self.trouble.get("server") == "exits":
            return
        addresses = sorted({self.instance.private_ip, self.address})
        self.server = await asyncio.start_server(self.greet, addresses, SERVER_PORT)

    @property
    def relays(self) -> bool:
        """Tell whether its server is a sub-head's."""
        return self.links and self.role == "worker"

    def end_server(self) -> None:
        """End the server, and with it what its clients render."""
        if self.server:
            self.server.close()
        self.server = None
        for writer in list(self.clients):
            writer.transport.abort()

    async def lose_server(self) -> None:
        """End the server; heads that were linked to it die of that, and start again without it."""
        self.end_server()
        await self.restart_heads()

    async def restart_heads(self) -> None:
        """Let those start again that were linked to this node, a sub-head before its own head."""
        for node in self.known(self.network):
            if node.server and self.instance.private_ip in node.linked:
                await node.serve()
                await node.restart_heads()

    async def render(self, job: dict[str, str], client: asyncio.StreamReader) -> bool:
        """Let a job's time pass, unless the server is frozen; return False where the picture is lost."""
        data = job.get("data", "")
        if data and not (self.data("/mnt") / data).exists():
            text = f'WARN  [StreamBackend] Uncaught exception "The file "{data}" could not be found!" - cleaning up!'
            self.journal.append((time.time(), text))
            return False
        end, start = time.monotonic() + float(job.get("seconds", 0)), self.started
        until = self.data("/mnt") / job.get("until", "")
        while time.monotonic() < end or not until.exists() or self.trouble.get("server") == "silent":
            await asyncio.sleep(0.05)
            if client.at_eof() or self.started != start:
                return False
        return True

    def offered(self) -> int:
        """Return the cores that this node's server announces."""
        if self.trouble.get("server") == "greedy":
            return 9000
        if not self.links:
            return self.cores
        nodes = {node.instance.private_ip: node for node in ProcessNode.known(self.network)}
        return max(1, self.cores - 2) + sum(nodes[one].offered() for one in self.linked if one in nodes)

    @staticmethod
    def known(network: ProcessNetwork) -> list[ProcessNode]:
        """Return the nodes of a network."""
        return [node for node in NODES if node.network is network]

    async def greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Do mtssrv's half of the handshake, and render."""
        try:
            writer.get_extra_info("socket").getpeername()
        except OSError:  # a reset before the server had accepted it: the real one ends by it, and is restarted
            await self.lose_server()
            asyncio.get_running_loop().call_later(RESTART, lambda: asyncio.ensure_future(self.serve()))
            return
        self.clients.add(writer)
        try:
            if self.trouble.get("server") == "silent":
                await reader.read()
            hello = await reader.readexactly(2)
            version = (await reader.readuntil(b"\0"))[:-1]
            flavour = await reader.readexactly(2)
            known = VERSION.encode() if self.trouble.get("server") != "another" else b"0.5.0"
            if (hello, version, flavour) != (HELLO, known, b"\x03\x00"):
                writer.write(REFUSAL)
            else:
                name = f"ip-{self.instance.private_ip.replace('.', '-')}"
                writer.write(HELLO + self.offered().to_bytes(2, "big") + name.encode() + b"\0")
                await writer.drain()
                while await reader.readexactly(2) == RENDER:
                    number, size = struct.unpack(">II", await reader.readexactly(8))
                    job = json.loads(await reader.readexactly(size))
                    await reader.readexactly(int(job.get("bytes", 0)))
                    if not await self.render(job, reader):
                        break
                    writer.write(DONE + struct.pack(">I", number))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.clients.discard(writer)
            writer.close()


async def feed(process: asyncssh.SSHServerProcess[bytes], child: asyncio.subprocess.Process) -> None:
    """Hand the session's input to a child up to its end."""
    assert child.stdin
    with contextlib.suppress(OSError, asyncssh.Error):
        while block := await process.stdin.read(1 << 16):
            child.stdin.write(block)
            await child.stdin.drain()
    child.stdin.close()


NODES: list[ProcessNode] = []


class SshServer(asyncssh.SSHServer):
    """Allows forwarding and sessions as its node's sshd_config does."""

    def __init__(self, node: ProcessNode) -> None:
        self.node = node

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """Note a connection, so that it can be dropped."""
        self.connection = conn
        self.node.connections.add(conn)
        receive = conn.data_received

        def count(data: bytes, datatype: int | None = None) -> None:
            self.node.received += len(data)
            receive(data, datatype)

        conn.data_received = count  # type: ignore[method-assign]
        open_session = conn._process_session_open

        def open_few(packet: Any) -> Any:
            if len(conn._channels) >= self.node.most_sessions:
                raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "open failed")
            return open_session(packet)

        conn._process_session_open = open_few  # type: ignore[method-assign]

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.node.connections.discard(self.connection)

    async def begin_auth(self, username: str) -> bool:
        """Ask for the user's key, unless this login goes wrong, once."""
        how = self.node.trouble.pop("login", "")
        if how == "drops":
            self.connection.abort()
        elif how == "hangs":
            await asyncio.sleep(1000)
        return True

    def server_requested(self, listen_host: str, listen_port: int) -> bool:
        """Let the tool serve files to the node."""
        return self.node.forwards

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        """Let the probe and the tunnel through."""
        if not self.node.forwards:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed")
        return True


Act = Callable[[ProcessNode, list[str]], Awaitable[tuple[int, str]]]


async def wait_for_boot(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """There is no cloud-init to wait for."""
    return 0, ""


async def check_metadata_rules(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """There is no metadata service to guard."""
    return 0, ""


async def facts(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """Tell what the node pretends to be."""
    build = f"{VERSION} 3 0" if node.installed else ""
    linked = " ".join(node.linked)
    return 0, (
        f"cores={node.cores}\nbuild={build}\nrole={node.role}\nlinked={linked}\n"
        f"relays={'yes' if node.relays else ''}\n"
        f"replaced={node.replaced}\nboot={node.boot}\nstarted={node.started}\nclock={time.time()}\n"
        f"load=0.42 0.31 0.12\nmemory_mb=612 7168\nrestarts={node.restarts}\nproblem={node.problem}\n"
        f"guard={json.dumps(node.guard) if node.guard else ''}\n"
    )


async def install(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """Pretend to have installed the package."""
    node.replaced, node.installed = "yes" if node.installed != arguments[3] else node.replaced, arguments[3]
    node.data(arguments[1])
    return 0, f"(a process node: nothing was installed)\nversion {VERSION}\n"


async def start_server(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """Start the handshake server in the given role."""
    if not node.installed:
        return 1, "Mitsuba is not installed here; run install first\n"
    role, unit, plan = arguments[0], arguments[1], json.loads(arguments[5])
    node.role, node.plan = role, plan
    if unit:
        node.replaced, node.links = "", role == "head" or bool(arguments[4])
        if node not in NODES:
            NODES.append(node)
        await node.serve()
        await node.restart_heads()
    return 0, ""


async def server_log(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """Tell what the server has to complain about; it logs nothing else."""
    since = float(arguments[0].removeprefix("@")) if arguments else 0
    return 0, "".join(f"{text}\n" for at, text in node.journal if at >= since) or "(a process node has no journal)\n"


async def journal(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """Return the lines of a made-up journal after the cursor, which is their number."""
    seen = int(arguments[1] or 0)
    events = [(1_800_000_000.0, "Listening on port 7554"), *node.journal]
    lines = [f"{at:.6f} node mtssrv[1]: {text}\n" for at, text in events]
    return 0, "".join(lines[seen:]) + (f"-- cursor: {len(lines)}\n" if lines[seen:] else "")


async def lack_file(node: ProcessNode) -> None:
    """Let the server have been restarted for want of a data file."""
    node.restarts, node.problem = 1, "ERROR: smoke.vol: unable to open the file"
    node.journal.append((time.time(), node.problem))


async def extend(node: ProcessNode, arguments: list[str]) -> tuple[int, str]:
    """Move the deadline that the user data set."""
    return 0, "1800000000\n"


def reset(writer: asyncio.StreamWriter) -> None:
    """Reset a connection at once."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def mute(node: ProcessNode) -> None:
    """Read nothing more on any connection, and say nothing: a link that is gone, seen from here."""
    for connection in node.connections:
        connection._transport.pause_reading()  # type: ignore[union-attr]  # asyncssh has no public way


async def seat_client(node: ProcessNode) -> None:
    """Let the guard see a client, which has been silent for a while."""
    clients = {"203.0.113.9:40000": [3000, 2465], "203.0.113.9:40001": [100, 70.5]}
    node.guard = {"idle": 70, "used": "a client moved bytes", "limit": 3600, "clients": clients}


async def dismiss_client(node: ProcessNode) -> None:
    """Let the guard see it go."""
    node.guard = node.guard | {"clients": {}}


async def stop_server(node: ProcessNode) -> None:
    """End the server, as if it had died for good."""
    await node.lose_server()


async def cut_clients(node: ProcessNode) -> None:
    """Cut the connections of the server's clients, and nothing else."""
    for writer in list(node.clients):
        writer.transport.abort()


async def forbid_forwarding(node: ProcessNode) -> None:
    """Let sshd_config have AllowTcpForwarding no."""
    node.forwards = False


async def allow_one_session(node: ProcessNode) -> None:
    """Let sshd_config have MaxSessions 1."""
    node.most_sessions = 1


async def grow(node: ProcessNode) -> None:
    """Let the node have more cores than any instance type of the tests."""
    node.cores = 100


async def refuse(node: ProcessNode) -> None:
    """Close sshd's port."""
    await node.replace_sshd(lambda _: None)
    assert node.impostor
    node.impostor.close()


def trouble(step: str, how: str) -> Callable[[ProcessNode], Awaitable[None]]:
    """Return the fault that spoils one step of a node."""

    async def spoil(node: ProcessNode) -> None:
        node.trouble[step] = how

    return spoil


# What can go wrong with a node, for `python -m tests.localcloud fault WHAT NODE`.
FAULTS: dict[str, Callable[[ProcessNode], Awaitable[None]]] = {
    "heal": ProcessNode.heal,
    "drop": ProcessNode.drop,
    "mute": mute,
    "client-comes": seat_client,
    "client-goes": dismiss_client,
    "server-gone": stop_server,
    "server-lacks-file": lack_file,
    "server-restarts": ProcessNode.serve,
    "clients-cut": cut_clients,
    "many-cores": grow,
    "one-session": allow_one_session,
    "no-forwarding": forbid_forwarding,
    "sshd-refuses": refuse,
    "sshd-resets": lambda node: node.replace_sshd(reset),
    "sshd-silent": lambda node: node.replace_sshd(lambda _: None),
    "sshd-garbage": lambda node: node.replace_sshd(lambda writer: writer.write(bytes(range(256)) * 64)),
    **{f"{step}-{how}": trouble(step, how) for step in STEPS for how in ("fails", "drops", "dies")},
    **{f"login-{how}": trouble("login", how) for how in ("drops", "hangs")},
    **{f"server-{how}": trouble("server", how) for how in ("silent", "another", "exits", "greedy")},
}

# What is acted out instead of run, by the script's $0; all else of root's is refused.
ACTS: dict[str, Act] = {
    "wait-for-boot": wait_for_boot,
    "check-metadata-rules": check_metadata_rules,
    "facts": facts,
    "install": install,
    "start-server": start_server,
    "server-log": server_log,
    "journal": journal,
    "extend": extend,
}
