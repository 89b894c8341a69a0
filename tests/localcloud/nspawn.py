"""Real nodes: systemd-nspawn --boot on an overlay of one image, one network namespace a node.

Runs as root inside the cloud's own network and mount namespaces (daemon.py arranges that).
The network is EC2's in small: private addresses on one bridge, public ones translated to
them, security groups as nftables rules in each node's namespace.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shlex import quote

from tests.localcloud.places import CLIENT, IMPOSTOR, METADATA, PUBLIC_NETWORKS, RESOLVER, ROUTER, STRANGER

CLONE_NEWNET = 0x40000000
REBOOT_EXIT = 133  # systemd-nspawn's exit code when the container asks for a reboot
MTU = 9001  # the same on both ends of every pair: a mismatch stalls large transfers
CGROUPS = Path("/sys/fs/cgroup/localcloud")
OVERLAY_FOLDERS = ("upper", "work", "root")

TRANSLATION = """table ip localcloud {
  map public { type ipv4_addr : ipv4_addr; }
  map private { type ipv4_addr : ipv4_addr; }
  chain prerouting { type nat hook prerouting priority -100; dnat to ip daddr map @public; }
  chain output { type nat hook output priority -100; dnat to ip daddr map @public; }
  chain postrouting {
    type nat hook postrouting priority 100;
    ct status dnat ip saddr 172.31.0.0/16 snat to ip saddr map @private;
  }
  chain outside {
    type filter hook output priority 0;
    ip daddr 172.31.0.0/16 ip daddr != {ours} ct state new ct status ! dnat drop
  }
}"""


def command(*words: str, check: bool = True, stdin: str | None = None) -> str:
    """Run a program of the host and return its stdout."""
    done = subprocess.run(words, check=False, input=stdin, text=True, capture_output=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def ip(lines: list[str], namespace: str | None = None) -> None:
    """Run a batch of ip(8) commands, in NAMESPACE if one is named."""
    inside = ["-n", namespace] if namespace else []
    command("ip", *inside, "-batch", "-", stdin="\n".join(lines))


def nft(rules: str, namespace: str | None = None) -> None:
    """Load nftables rules, in NAMESPACE if one is named."""
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    command(*inside, "nft", "-f", "-", stdin=rules)


def set_up_network() -> None:
    """Make the bridge, the router, the metadata address, and the client's and stranger's addresses."""
    ip(
        [
            "link set lo up",
            *(f"addr add {address}/32 dev lo" for address in (METADATA, CLIENT, STRANGER)),
            # An address of its own: else it takes a port's, and changes it when nodes come and go,
            # and the other nodes' idea of the router is stale for half a minute.
            "link add bridge address 02:00:ac:1f:00:01 type bridge",
            f"addr add {ROUTER}/16 dev bridge",
            f"addr add {RESOLVER}/16 dev bridge",
            f"addr add {IMPOSTOR}/16 dev bridge",
            f"link set bridge mtu {MTU} up",
            *(f"route add {network} dev bridge src {CLIENT}" for network in PUBLIC_NETWORKS),
        ]
    )
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    nft(TRANSLATION.replace("{ours}", f"{{ {ROUTER}, {RESOLVER}, {IMPOSTOR} }}"))  # the rest is private


def set_up_cgroups() -> None:
    """Give the nodes a pure cgroup2 view, in our own mount namespace only.

    A host with cgroup v1 or the hybrid layout keeps its own.
    """
    if command("stat", "-fc", "%T", "/sys/fs/cgroup").strip() != "cgroup2fs":
        command("umount", "-l", "/sys/fs/cgroup")
        command("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    CGROUPS.mkdir(exist_ok=True)
    # Each systemd holds about five inotify instances as uid 0: the default 128 ends at 20 nodes.
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text()) < 4096:
        limit.write_text("4096")


class NspawnNode:
    """One node: a booted systemd with its own disk, addresses and security group."""

    def __init__(
        self, instance_id: str, private_ip: str, folder: Path, image: Path, on_exit: Callable[[], None]
    ) -> None:
        self.id = instance_id
        self.private_ip = private_ip
        self.public_ip: str | None = None
        self.folder = folder
        self.image = image
        self.on_exit = on_exit
        self.launched = time.monotonic()
        self.answered: float | None = None  # when sshd first answered, by time.monotonic()
        self._wanted = True
        self._rules = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._link = "v" + instance_id[-10:]
        self._cgroup = CGROUPS / instance_id
        self._lock = threading.Lock()

    # Life

    def start(self, public_ip: str | None) -> None:
        """Mount the disk, plug in the network, boot."""
        with self._lock:
            if not self._wanted:
                return
            self._mount()
            self._plug_in(public_ip)
            self._boot()

    def stop(self, grace: float = 6) -> None:
        """Shut down (at most GRACE seconds), then take everything away."""
        with self._lock:
            self._wanted = False
            process = self._process
            if process and process.poll() is None:
                if grace:
                    process.terminate()  # nspawn hands this on as a power-off
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(grace)
                self._kill_cgroup()
                process.kill()
                process.wait()
            self._take_away()

    def fault(self, what: str) -> None:
        """Make something go wrong; see FAULTS."""
        FAULTS[what](self)

    def inside(self, script: str) -> None:
        """Run a script as root inside the node."""
        assert self._process
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        leader = children.read_text().split()[0]
        command("nsenter", "-t", leader, "-a", "bash", "-c", script, check=False)

    def hijack(self) -> None:
        """Lead the node's public address to the impostor's sshd (impostor.py)."""
        self._lead_to(IMPOSTOR)

    def give_back(self) -> None:
        """Undo hijack()."""
        self._lead_to(self.private_ip)

    def _lead_to(self, address: str) -> None:
        nft(
            f"delete element ip localcloud public {{ {self.public_ip} }}\n"
            f"add element ip localcloud public {{ {self.public_ip} : {address} }}"
        )

    def reboot(self) -> None:
        """Reboot the running system."""
        self.inside("systemctl reboot")

    def crash(self) -> None:
        """End every process of the node at once, as a failing host does."""
        self._kill_cgroup()

    def configure(self, config: str) -> None:
        """Add to cloud-init's configuration; for a node that has only begun to boot."""
        path = self.folder / "root/etc/cloud/cloud.cfg.d/99_fault.cfg"
        path.write_text(config)

    def freeze(self) -> None:
        """Stop every process of the node without ending it."""
        (self._cgroup / "cgroup.freeze").write_text("1")

    def thaw(self) -> None:
        """Undo freeze()."""
        (self._cgroup / "cgroup.freeze").write_text("0")

    def cut(self) -> None:
        """Unplug the node's network."""
        ip([f"link set {self._link} down"])

    def plug(self) -> None:
        """Undo cut()."""
        ip([f"link set {self._link} up"])

    def console(self) -> str:
        """Return the last 64 KB of what the node wrote to its console."""
        with suppress(OSError):
            return (self.folder / "console.log").read_text(errors="replace")[-65536:]
        return ""

    def set_rules(self, rules: str) -> None:
        """Make RULES (nftables) the node's security group."""
        if rules != self._rules:
            self._rules = rules
            if Path("/run/netns", self.id).exists():
                nft(rules, self.id)

    # Parts

    def _mount(self) -> None:
        for name in OVERLAY_FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        upper, work, root = (self.folder / name for name in OVERLAY_FOLDERS)
        options = f"lowerdir={self.image},upperdir={upper},workdir={work}"
        command("mount", "-t", "overlay", "overlay", "-o", options, str(root))

    def _plug_in(self, public_ip: str | None) -> None:
        ip([f"netns add {self.id}"])
        ip(
            [
                f"link add {self._link} type veth peer name eth0 netns {self.id}",
                f"link set {self._link} mtu {MTU} master bridge up",
            ]
        )
        ip(
            [
                "link set lo up",
                f"addr add {self.private_ip}/20 dev eth0",
                f"link set eth0 mtu {MTU} up",
                f"route add {ROUTER} dev eth0",
                f"route add default via {ROUTER}",
            ],
            self.id,
        )
        if self._rules:
            nft(self._rules, self.id)
        if public_ip:
            nft(
                f"add element ip localcloud public {{ {public_ip} : {self.private_ip} }}\n"
                f"add element ip localcloud private {{ {self.private_ip} : {public_ip} }}"
            )
            self.public_ip = public_ip

    def _boot(self) -> None:
        self._cgroup.mkdir(exist_ok=True)

        def enter_cgroup() -> None:
            (self._cgroup / "cgroup.procs").write_text("0")

        with (self.folder / "console.log").open("ab") as console:
            self._process = subprocess.Popen(
                ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"]
                + ["--console=read-only", "--resolv-conf=off", "--timezone=off", "--link-journal=no"]
                + [f"--network-namespace-path=/run/netns/{self.id}", f"--machine={self.id}"]
                + [f"--hostname=ip-{self.private_ip.replace('.', '-')}"]
                + ["--directory", str(self.folder / "root")]
                # IPAddressDeny= and nft inside the node do nothing without these.
                + ["--capability=CAP_NET_ADMIN,CAP_BPF,CAP_PERFMON", "--system-call-filter=bpf"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=enter_cgroup,  # before any other thread's work: it writes one file
                start_new_session=True,
            )
        threading.Thread(target=self._wait, args=(self._process,), daemon=True).start()
        threading.Thread(target=self._watch_for_ssh, daemon=True).start()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        with self._lock:
            if not self._wanted:
                return
            self._kill_cgroup()
            if code == REBOOT_EXIT:
                self.answered = None
                self._boot()
                return
            self._wanted = False
            self._take_away()
        self.on_exit()

    def _watch_for_ssh(self) -> None:
        """Note when sshd answers, seen from inside: AWS's status checks pass no security group."""
        with suppress(OSError), open(f"/run/netns/{self.id}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                return
        while self._wanted and not self.answered:
            with suppress(OSError), socket.create_connection(("127.0.0.1", 22), 1) as connection:
                if connection.recv(4) == b"SSH-":
                    self.answered = time.monotonic()
            time.sleep(0.05)

    def _kill_cgroup(self) -> None:
        with suppress(OSError):
            (self._cgroup / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + 5
        while self._cgroup.exists() and time.monotonic() < deadline:
            for folder, _, _ in os.walk(self._cgroup, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)
            time.sleep(0.02)

    def _take_away(self) -> None:
        self._kill_cgroup()
        if self.public_ip:
            nft(
                f"delete element ip localcloud public {{ {self.public_ip} }}\n"
                f"delete element ip localcloud private {{ {self.private_ip} }}"
            )
            self.public_ip = None
        command("ip", "netns", "del", self.id, check=False)
        command("ip", "link", "del", self._link, check=False)
        command("umount", "-l", str(self.folder / "root"), check=False)
        for name in OVERLAY_FOLDERS[:2]:
            shutil.rmtree(self.folder / name, ignore_errors=True)


HOLD_LOCK = """
import fcntl, time
file = open("/var/lib/dpkg/lock-frontend", "w")
fcntl.lockf(file, fcntl.LOCK_EX)
time.sleep(15)
"""
STAND_IN = """
import socket, time
server = socket.create_server(("", 22))
while True:
    connection, _ = server.accept()
    connection.sendall({greeting!r})
    {then}
"""


def script(text: str) -> Callable[[NspawnNode], None]:
    """Return the fault that a script inside the node makes."""
    return lambda node: node.inside(text)


def impostor(greeting: bytes, then: str) -> Callable[[NspawnNode], None]:
    """Return the fault that lets another program answer in sshd's place."""
    program = STAND_IN.format(greeting=greeting, then=then)
    return script(
        f"systemctl stop ssh.socket ssh.service; pkill sshd; systemd-run -q --unit=impostor python3 -c {quote(program)}"
    )


KEEP = "globals().setdefault('kept', []).append(connection)"

# What can go wrong with a node, for `python -m tests.localcloud fault WHAT NODE`.
FAULTS: dict[str, Callable[[NspawnNode], None]] = {
    "freeze": NspawnNode.freeze,
    "thaw": NspawnNode.thaw,
    "cut": NspawnNode.cut,
    "plug": NspawnNode.plug,
    "hijack": NspawnNode.hijack,
    "give-back": NspawnNode.give_back,
    "reboot": NspawnNode.reboot,
    "crash": NspawnNode.crash,
    "sshd-refuses": script("systemctl stop ssh.socket ssh.service; pkill sshd"),
    "sshd-silent": impostor(b"", KEEP),
    "sshd-garbage": impostor(bytes(range(256)) * 64, KEEP),
    "sshd-closes": impostor(b"", "connection.close()"),
    "dpkg-locked": script(f"systemd-run -q python3 -c {quote(HOLD_LOCK)}; sleep 0.5"),
    "data-disk-full": script("mount -t tmpfs -o size=1m none /mnt && chown ubuntu /mnt; head -c 1m /dev/zero > /mnt/x"),
    "disk-healed": script("umount /var/cache/apt/archives; umount /mnt"),
    "system-disk-full": script(
        "mount -t tmpfs -o size=64k none /var/cache/apt/archives; mkdir /var/cache/apt/archives/partial; "
        "head -c 64k /dev/zero > /var/cache/apt/archives/full"
    ),
    # For launch_faults: the node has only begun to boot.
    "cloud-init-fails": lambda node: node.configure("runcmd: [[sh, -c, 'echo this user script fails; exit 1']]\n"),
    "cloud-init-hangs": lambda node: node.configure("runcmd: [[sleep, infinity]]\n"),
}
