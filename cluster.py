#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.36,<2", "click>=8.1,<9", "paramiko>=5,<6"]
# ///
"""Creates a Mitsuba rendering cluster on Amazon EC2, and takes it down again.

The usual order is createNodes, install, start, status, syncData (only for data files that plugins read on the nodes),
terminateAll; --help tells more. Results go to stdout, progress and complaints to stderr. Exit codes: 0 done, 1
something failed (and is named), 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.

Nothing is remembered on this machine but the SSH key: the cluster's state is in EC2, in tags that are set by the very
calls that create things. So any machine with the credentials sees and ends the cluster, whatever happened to this one.

Words: a *node* is an EC2 instance of ours; a *group* is one cluster; a *server* is mtssrv on a node; the *head* is the
node that your Mitsuba talks to, and the others are its *workers*.

Rooms: Constants, Errors and output, Settings, AWS, SSH, Passing on, Command line, Guard, and then a chapter for
each part of the day: createNodes, install, start, up, render, status, syncData, terminateAll, Spot, Small commands.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import functools
import gc
import glob
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

MISSING = (
    "cluster.py needs {name}. On Debian and Ubuntu: sudo apt-get install -y python3-venv && python3 -m venv "
    "~/.mitsuba-cluster && ~/.mitsuba-cluster/bin/pip install boto3 click paramiko, and from then on: "
    "~/.mitsuba-cluster/bin/python cluster.py"
)
try:
    import click
except ImportError:
    sys.exit(MISSING.format(name="click"))

# What only some commands need is imported where they need it: it takes longer than all of --help.
if TYPE_CHECKING:
    import subprocess

    import paramiko

    Stream = socket.socket | paramiko.Channel  # what a handshake needs of either: sendall, recv, shutdown

HERE = Path(__file__).resolve().parent
T = TypeVar("T")
Client = Any  # boto3 makes its clients' classes at run time


# --- Constants ---------------------------------------------------------------
# What several rooms share: names that others rely on, and limits in seconds.

TAG_GROUP = "mitsuba-group"
TAG_ROLE = "mitsuba-role"
TAG_HOST_KEY = "mitsuba-host-key"
TAG_SIGNATURES = [f"mitsuba-signature-{part}" for part in range(1, 5)]  # of the group and host key, by the user's key
TAG_PRICE = "mitsuba-price"  # $ an hour, as it was at the launch
TAG_HOURS = "mitsuba-max-hours"
TAG_IDLE = "mitsuba-idle-minutes"
TAG_TREE = "mitsuba-tree"  # "yes": start links the group in two levels
SERVER_PORT = 7554  # mtssrv's own default
PASS_ON_PORT = 7555  # by which nodes pass packages and data on to each other; open inside the group only
GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # it becomes a tag, a folder and a security group
PUBLIC_ADDRESS_PRICE = 0.005  # $ an hour for a public IPv4 address, every region
ALIVE = ("pending", "running", "stopping", "stopped", "shutting-down")

POLL = 1.0  # between two polls of EC2, one call for all nodes
POLL_ERROR_LIMIT = 60  # of polls that fail in a row
ADDRESS_LIMIT = 5  # the look-up of this machine's public address
LOOK_LIMIT = 10  # for connecting to a node that may be frozen, only to ask it something
SYNC_LIMIT = 24 * 3600
MIB = 1 << 20
VERSION = "1.0.0"

RETRY_CODES = (
    "RequestLimitExceeded Throttling ThrottlingException InternalError InternalFailure Unavailable ServiceUnavailable "
    "502 503 504"
).split()
NEW_CODES = (  # of calls that name what was made a moment ago
    "InvalidGroup.NotFound InvalidSecurityGroupID.NotFound InvalidKeyPair.NotFound InvalidInstanceID.NotFound"
).split()


# --- Errors and output -------------------------------------------------------
# One error for the user, two for a node, one for SIGTERM; progress on stderr, results on stdout.


class ClusterError(click.ClickException):
    """Something that the user can mend: one line on stderr, and an exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(mask(printable_lines(message)))
        self.exit_code = exit_code  # type: ignore[misc]  # each error has its own

    def show(self, file: Any = None) -> None:
        note(self.message, "Error", "red")


class NodeError(Exception):
    """One node's step failed; the other nodes go on."""

    def __init__(self, message: str) -> None:
        super().__init__(mask(message))


class SilentNode(NodeError):
    """A node does not answer, or does not any more."""


class Terminated(BaseException):
    """SIGTERM has come; unwinds like Ctrl-C's KeyboardInterrupt."""


class Call:
    """How the user called this program: messages say what can be typed, and which file can be edited."""

    program = "./cluster.py"
    options: tuple[str, ...] = ()  # --config FILE, where it was given
    settings = "config.py"  # the file that is read


def command(name: str, *arguments: str) -> str:
    """Return a command line that the user can paste, whatever a tag says; the default group need not be named."""
    words = (shlex.quote(one) for one in arguments if one != "default")
    return " ".join([Call.program, *Call.options, name, *words])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" where WORD is nearly one of those that are KNOWN, else ""."""
    import difflib

    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def printable(text: str) -> str:
    """Replace what could steer the terminal: nodes and S3 are not trusted to be polite."""
    return "".join(char if char.isprintable() or char == "\t" else "�" for char in text)


def mask(text: str) -> str:
    """Replace what addresses in TEXT may hold of credentials: user:token@, and signed queries."""
    text = re.sub(r"(\w://)[^\s/@]*@", r"\1…@", text)
    return re.sub(r"(\w://[^\s?#'\"]*\?)[^\s#'\"]+", r"\1…", text)


def format_duration(seconds: float) -> str:
    """Return "42s", "12m", "3h05m" or "2d04h"."""
    minutes, left = divmod(int(max(0, seconds)), 60)  # less than 0 where clocks differ
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m" if minutes else f"{left}s"


def format_time(seconds: float) -> str:
    """Return "2026-11-30 21:05:09 (19:05:09 UTC)" for SECONDS after 1970: the time here, and UTC where that differs."""
    utc = datetime.fromtimestamp(seconds, timezone.utc)
    here = utc.astimezone()
    return f"{here:%F %T} ({utc:%T} UTC)" if here.utcoffset() else f"{utc:%F %T} UTC"


def format_count(count: float, noun: str) -> str:
    """Return "1 node", "3 nodes" or "2.5 hours"."""
    return f"{count:.10g} {noun}" if count == 1 else f"{count:.10g} {noun}s"


def format_exit(code: int) -> str:
    """Return "exit code 3", or that a signal ended the command."""
    return f"exit code {code}" if code >= 0 else "killed by a signal"


def format_size(size: float) -> str:
    """Return "12 B", "3.4 MB" … in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_money(dollars: float) -> str:
    """Return "$4.16", or "$0.0104" where cents would hide it."""
    return f"${dollars:.2f}" if dollars >= 0.1 or not dollars else f"${dollars:.4f}"


def visible(cell: str) -> int:
    """Return the width of a cell on the screen: colours take none."""
    return len(click.unstyle(cell))


def format_table(rows: Sequence[Sequence[str]], spare: Sequence[str] = (), width: int | None = None) -> str:
    """Align ROWS (the first is the header) in columns, within WIDTH or the terminal.

    Where that is too narrow, columns are left out in the order of SPARE ("…" is the common tail of names); where they
    still do not fit, each row becomes a block of lines.
    """
    width = terminal_width() if width is None else width
    for title in [*spare, None]:
        sizes = [max(map(visible, column)) for column in zip(*rows)]
        if sum(sizes) + 2 * (len(sizes) - 1) <= width:
            lines = ("  ".join(cell + " " * (size - visible(cell)) for cell, size in zip(row, sizes)) for row in rows)
            return "\n".join(line.rstrip() for line in lines)
        if title == "…":  # of the form ec2-203-0-113-1.compute-1.amazonaws.com
            rows = [[re.sub(r"(ec2-[\d-]+)\.[\w.-]+", r"\1…", cell) for cell in row] for row in rows]
        elif title in rows[0]:
            at = rows[0].index(title)
            rows = [[cell for i, cell in enumerate(row) if i != at] for row in rows]
    header, *body = rows
    blocks = [[row[0], *(f"{name.lower()} {cell}" for name, cell in zip(header[1:], row[1:]) if cell)] for row in body]
    return "\n".join("\n  ".join(lines) for lines in blocks)


def format_tail(output: str) -> str:
    """Return the last lines of a step's output, indented for its error message."""
    lines = [line for line in output.splitlines() if line.strip()][-8:]
    return "".join(f"\n    {printable(line)}" for line in lines)


def terminal_width() -> int:
    """Return the width for a table on stdout: unlimited in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def is_terminal(stream: Any = None) -> bool:
    """Tell whether what stands on a stream (stderr if none is named) can be drawn anew."""
    return bool((stream or sys.stderr).isatty() and os.environ.get("TERM") != "dumb")


def paint(text: str, err: bool = False, **style: Any) -> str:
    """Return TEXT, made printable, with click's colours for stdout (ERR: stderr) if wanted: https://no-color.org."""
    coloured = is_terminal(sys.stderr if err else sys.stdout) and not os.environ.get("NO_COLOR")
    return click.style(printable(text), **style) if coloured else printable(text)


OUTPUT = threading.RLock()  # held by whoever prints: lines of several threads never mix
DRAWN: list[str] = []  # the terminal's last lines, which the next output replaces


def draw(*lines: str) -> None:
    """Show LINES, cut to the terminal's width, until the next output; with none, only remove those that are shown."""
    with OUTPUT:
        if lines or DRAWN:  # one line is wiped with spaces, which every terminal knows
            wipe = f"\r\033[{len(DRAWN) - 1}A\033[J" if len(DRAWN) > 1 else f"\r{' ' * len(''.join(DRAWN))}\r"
            DRAWN[:] = [line[: shutil.get_terminal_size().columns - 1] for line in lines]
            click.echo(wipe + "\n".join(DRAWN), nl=False, err=True)


def printable_lines(text: str) -> str:
    """Make each line of TEXT printable."""
    return "\n".join(map(printable, text.split("\n")))


def put(text: str | bytes, err: bool = False) -> None:
    """Print what is printable or painted already, past the bar; any thread may."""
    with OUTPUT:
        draw()
        click.echo(text, nl=isinstance(text, str), err=err)


def note(text: str, title: str = "", colour: str = "") -> None:
    """Say something about the progress, on stderr; a TITLE in COLOUR says what it is, or of which node."""
    put((f"{paint(f'{title}:', err=True, fg=colour)} " if title else "") + printable_lines(mask(text)), err=True)


def result(text: str) -> None:
    """Print a result, on stdout."""
    put(printable_lines(text))


def warn(text: str) -> None:
    """Say what went wrong and can be done without."""
    note(text, "Warning", "yellow")


# --- Settings ----------------------------------------------------------------
# config.py: reading it and checking each value. Touches that file and nothing else.


def matches(pattern: str) -> Callable[[Any], bool]:
    """Return a check: a string that PATTERN matches as a whole."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def between(low: float, high: float, *kinds: type) -> Callable[[Any], bool]:
    """Return a check: a number from LOW to HIGH, of one of these KINDS (True is none)."""
    return lambda value: type(value) in kinds and low <= value <= high


def is_cidr(value: Any) -> bool:
    """Tell whether VALUE is empty or an IPv4 network."""
    import ipaddress

    with contextlib.suppress(ValueError):
        return isinstance(value, str) and (not value or bool(ipaddress.IPv4Network(value)))
    return False


def is_images(value: Any) -> bool:
    """Tell whether VALUE is a dict from regions to AMIs."""
    text = matches(r"ami-[0-9a-f]+")
    return isinstance(value, dict) and all(isinstance(key, str) and text(ami) for key, ami in value.items())


def setting(default: T, check: Callable[[Any], bool], expected: str) -> T:
    """Declare a setting: its DEFAULT where the file lacks it, the CHECK of its value, and in words what is EXPECTED."""
    return field(default_factory=lambda: default, metadata={"check": (check, expected)})


# mtssrv's unit hides or protects them, and their owner must not change.
SYSTEM_FOLDERS = (
    r"/(bin|boot|dev|etc|home|lib(32|64|x32)?|proc|root|run|sbin|sys|tmp|usr|var/(lock|run|tmp))(/|$)|/var(/lib)?$"
)


@dataclass(frozen=True)
class Settings:
    """The settings, under their names in config.py."""

    AWS_ACCESS_KEY_ID: str = setting("", matches(r"\w*"), 'an access key id such as "AKIA…", or ""')
    AWS_SECRET_ACCESS_KEY: str = setting("", matches(r"[\w/+=]*"), 'a secret access key, or ""')
    AWS_REGION: str = setting("us-east-1", matches(r"[a-z]+(-[a-z]+)+-\d+"), 'a region such as "us-east-1"')
    KEYPAIR_NAME: str = setting("mitsuba-key", matches(r"[ -~]{1,255}"), "a name of at most 255 ASCII characters")
    SSH_PRIVATE_KEY_FILE: str = setting("mitsuba-key.pem", matches(r"[^\0]+"), 'a path such as "mitsuba-key.pem"')
    SSH_USER: str = setting("ubuntu", matches(r"[a-z_][a-z0-9_.-]*"), 'a user name such as "ubuntu"')
    SSH_PORT: int = setting(22, between(1, 65535, int), "a port from 1 to 65535")
    AMI_IDS: dict[str, str] = setting(  # noqa: RUF009 - nobody changes it
        {}, is_images, 'a dict such as {"us-east-1": "ami-0123456789abcdef0"}'
    )
    UBUNTU_RELEASE: str = setting("24.04", matches(r"22\.04|24\.04|26\.04"), '"22.04", "24.04" or "26.04"')
    SUBNET_ID: str = setting("", matches(r"(subnet-[0-9a-f]+)?"), 'a subnet such as "subnet-0123abcd", or ""')
    PRIVATE_NODES: bool = setting(False, between(0, 1, bool), "True or False")
    CLIENT_CIDR: str = setting("", is_cidr, 'an IPv4 network such as "203.0.113.7/32", or ""')
    PUBLIC_SERVER_PORT: bool = setting(True, between(0, 1, bool), "True or False")
    ROOT_VOLUME_GB: int = setting(16, between(8, 16384, int), "a whole number from 8 to 16384")
    MAX_HOURS: float = setting(0, between(0, 8760, int, float), "hours, from 0 (no limit) to 8760")
    IDLE_MINUTES: float = setting(60, between(0, 525600, int, float), "minutes, from 0 (no limit) to 525600")
    PKG_REPOSITORY: str = setting(
        "deb https://www.mitsuba-renderer.org binary/",
        matches(r"(deb [^\n]+)?"),
        'an apt line such as "deb https://example.org/ubuntu ./", or ""',
    )
    MITSUBA_PACKAGE: str = setting(
        "",
        matches(r"(?!http://)[^\0\n]*?(#sha256=[0-9a-f]{64})?"),
        'a path or an https address, with "#sha256=" and 64 hex digits if you like, or ""',
    )
    DATA_DIR: str = setting(
        "/mnt",
        matches(rf"(?!{SYSTEM_FOLDERS})(/[\w.-]*[\w-][\w.-]*)+"),
        'an absolute path such as "/mnt", outside home, temporary and system folders, which mtssrv can\'t use',
    )
    S3_PATH: str = setting("", matches(r"(s3://[^/\s]+(/[^\0\n]*)?)?"), '"s3://bucket/prefix", or ""')
    folder: Path = HERE  # of the file: relative paths start there

    @property
    def key_file(self) -> Path:
        """Where the SSH private key lies."""
        return self.folder / Path(self.SSH_PRIVATE_KEY_FILE).expanduser()

    @property
    def package(self) -> tuple[str, str]:
        """What to install (a name, a path or an address) and its SHA-256, or ""."""
        source, _, digest = self.MITSUBA_PACKAGE.partition("#sha256=")
        return source or "mitsuba", digest

    @property
    def bucket(self) -> tuple[str, str]:
        """The bucket and the prefix of S3_PATH; ("", "") where it is not set."""
        bucket, _, prefix = self.S3_PATH.removeprefix("s3://").partition("/")
        return ("", "") if is_placeholder(bucket) else (bucket, prefix.strip("/"))


CHECKS = {one.name: one.metadata["check"] for one in fields(Settings) if one.metadata}
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
WIDEST_PREFIX = 8  # of a CLIENT_CIDR that port 7554 may be open to


def is_placeholder(value: str) -> bool:
    """Tell whether VALUE is empty, or all X as in the original's config.py."""
    return not value.strip("X")


def run_config(path: Path) -> dict[str, Any]:
    """Run a settings file and return its names."""
    import runpy

    if path.is_dir():
        raise ClusterError(f"{path} is a folder, no settings file; did you mean {path / 'config.py'}?")
    if not path.exists():
        raise ClusterError(f"there is no settings file {path}")
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # the file is the user's own code: whatever it raises is a mistake in it
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        hint = 'is there a value without quotes? name = "value"'  # not the error's text, which may hold a secret
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        elif isinstance(error, OSError):
            hint = str(error.strerror)
        elif isinstance(error, SystemExit):
            hint = "a settings file only sets names"
        where = f"{path.name}, line {lines[-1]}" if lines else path.name
        raise ClusterError(f"{where}: {type(error).__name__} ({hint})") from None


def load_settings(path: Path) -> Settings:
    """Read and check a settings file; ClusterError names the first value that is wrong."""
    values = {name: value for name, value in run_config(path).items() if name.isupper()}
    for name in values.keys() - CHECKS.keys():
        warn(f"{path.name} sets {name}, which is no setting{did_you_mean(name, CHECKS)}")
        del values[name]
    for name, (check, expected) in CHECKS.items():
        if name in values and not check(values[name]):
            shown = "(not shown)" if name in SECRETS else mask(repr(values[name]))
            raise ClusterError(f"{path.name}: {name} is {shown}; expected: {expected}")
    for name in SECRETS:
        if is_placeholder(values.get(name, "")):
            values[name] = ""
    settings = Settings(**values, folder=path.resolve().parent)
    if bool(settings.AWS_ACCESS_KEY_ID) != bool(settings.AWS_SECRET_ACCESS_KEY):
        raise ClusterError(f"{path.name}: set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or neither")
    if not settings.CLIENT_CIDR:
        return settings
    import ipaddress

    network = ipaddress.IPv4Network(settings.CLIENT_CIDR)
    if network.prefixlen < WIDEST_PREFIX and settings.PUBLIC_SERVER_PORT:
        raise ClusterError(
            f"{path.name}: CLIENT_CIDR {network} would open mtssrv, which has no password, to much of the world; set "
            "PUBLIC_SERVER_PORT = False and use the tunnel command"
        )
    return replace(settings, CLIENT_CIDR=str(network))  # EC2 takes ADDRESS/BITS only


# --- AWS ---------------------------------------------------------------------
# Clients, AWS's errors in words, records, look-ups, and who may connect. Touches AWS, never a node.

ADDRESS_URL = "https://checkip.amazonaws.com"
ADDRESS_VARIABLE = "MITSUBA_CLUSTER_ADDRESS_URL"
INSIDE_NETWORKS = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")  # RFC 1918 and (carriers') 6598
# What a rule may let in, as EC2's calls name it.
SOURCES = {
    "IpRanges": "CidrIp",
    "Ipv6Ranges": "CidrIpv6",
    "PrefixListIds": "PrefixListId",
    "UserIdGroupPairs": "GroupId",
}
NEW_LIMIT = 60  # for all of AWS to know what was just made
BUSY_LIMIT = 120  # for the answer to a launch or an end; 100 instances are refilled at 2 a second
BUSY_PAUSE = 10  # at most, between two tries
CLOCK_TOLERANCE = 240  # AWS refuses signatures that are 5 minutes off
DENIED_CODES = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "403"}
QUOTA_CODES = {"InstanceLimitExceeded", "VcpuLimitExceeded", "MaxSpotInstanceCountExceeded"}
S3_ACTIONS = {"HeadObject": "s3:GetObject", "HeadBucket": "s3:ListBucket"}  # calls whose errors have no text
SESSION_LOCK = threading.Lock()  # boto3's sessions are not safe for threads, their clients are


@functools.cache
def make_session(region: str, key: str, secret: str, token: str) -> Any:
    """Return the one boto3 session for these credentials (or boto3's own), ready: a code for MFA is asked for here."""
    import boto3
    from botocore.utils import JSONFileCache

    session = boto3.Session(key or None, secret or None, token or None, region_name=region)
    if not key:  # the credentials of a role, where the AWS CLI keeps and finds them, too
        assume_role = session._session.get_component("credential_provider").get_provider("assume-role")
        assume_role.cache = JSONFileCache(str(Path.home() / ".aws/cli/cache"))
    if credentials := session.get_credentials():
        credentials.get_frozen_credentials()
    return session


def open_client(
    settings: Settings, service: str, region: str = "", keys: tuple[str, ...] = (), endpoint: str = "", **options: Any
) -> Client:
    """Return a boto3 client with bounded patience.

    KEYS (id, secret, token) stand in the place of config.py's, ENDPOINT in that of AWS's own; OPTIONS are those of
    botocore's Config.
    """
    from botocore.config import Config

    defaults: dict[str, Any] = {
        "connect_timeout": 10,
        "read_timeout": 20,
        "retries": {"mode": "standard", "total_max_attempts": 5},
        "max_pool_connections": 64,
    }
    region = region or settings.AWS_REGION
    with SESSION_LOCK:
        gc.disable()  # AWS's models are a million objects that stay: 0.1 s of a start
        try:
            ids = keys or (settings.AWS_ACCESS_KEY_ID, settings.AWS_SECRET_ACCESS_KEY, "")
            session = make_session(settings.AWS_REGION, *ids)
            parts = session.get_available_partitions()
            known = {name for part in parts for name in session.get_available_regions("ec2", part)}
            if service == "ec2" and region not in known:
                title = "AWS_REGION " if region == settings.AWS_REGION else ""
                advice = did_you_mean(region, known) or "; see https://docs.aws.amazon.com/ec2"
                raise ClusterError(f"{title}{region!r} is no region that boto3 knows{advice}")
            config = Config(**(defaults | options))
            return session.client(service, region, endpoint_url=endpoint or None, config=config)
        finally:
            gc.freeze()
            gc.enable()


def answer_of(error: Exception) -> dict[str, Any]:
    """Return what AWS answered, of botocore's ClientError; of other errors {}."""
    return getattr(error, "response", None) or {}


def error_code(error: Exception) -> str:
    """Return AWS's code of a botocore error, or ""."""
    return str(answer_of(error).get("Error", {}).get("Code", ""))


def find_partition(region: str) -> tuple[str, str]:
    """Return the part of AWS in which REGION is (it has accounts of its own), and its region that is always enabled."""
    if region.startswith("cn-"):
        return "aws-cn", "cn-north-1"
    return ("aws-us-gov", "us-gov-west-1") if region.startswith("us-gov-") else ("aws", "us-east-1")


def persist(call: Callable[[], T], name: str = "", new: Container[str] = NEW_CODES) -> T:
    """Make a CALL until its answer is known: again where AWS does not know yet what was just made (the codes NEW).

    One that may be sent twice has a NAME: again, too, where its answer is lost or AWS is busy.
    https://docs.aws.amazon.com/ec2/latest/devguide/eventual-consistency.html
    """
    from botocore.exceptions import ClientError, HTTPClientError
    from botocore.parsers import ResponseParserError

    began, pause = time.monotonic(), POLL / 2
    while True:
        try:
            return call()
        except (ClientError, HTTPClientError, ResponseParserError) as error:
            code, gone = error_code(error), time.monotonic() - began
            busy = name and (code in RETRY_CODES or not isinstance(error, ClientError))
            if not (busy and gone < BUSY_LIMIT) and not (code in new and gone < NEW_LIMIT):
                raise
            if busy:
                note(f"{name}: {code or type(error).__name__}; trying again, the same request")
        time.sleep(pause)
        pause = min(2 * pause, BUSY_PAUSE)


def clock_problem(error: Exception) -> str:
    """Say so where this machine's clock differs from AWS's so much that no signature is good; else ""."""
    from email.utils import parsedate_to_datetime

    with contextlib.suppress(KeyError, TypeError, ValueError):
        theirs = parsedate_to_datetime(answer_of(error)["ResponseMetadata"]["HTTPHeaders"]["date"])
        ahead = (datetime.now(timezone.utc) - theirs).total_seconds()
        if abs(ahead) > CLOCK_TOLERANCE:
            way = "ahead" if ahead > 0 else "behind"
            return f"this machine's clock is {format_duration(abs(ahead))} {way} of AWS's, which so refuses it: set it"
    return ""


def explain(error: Exception) -> str:
    """Say in one line what an error of botocore's, or our own, means and what to do."""
    if isinstance(error, ClusterError):
        return error.message
    if problem := clock_problem(error):
        return problem
    code, kind = error_code(error), type(error).__name__
    action = getattr(error, "operation_name", "")
    text = printable(" ".join((answer_of(error).get("Error", {}).get("Message") or str(error)).split()))
    if kind == "S3UploadFailedError" and isinstance(error.__context__, Exception):
        return explain(error.__context__)  # boto3 wraps the real one in words of its own
    if kind in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
        return f"no AWS credentials: run `aws configure`, or see the top of {Call.settings} ({text})"
    if kind == "MissingDependencyException":
        add = f"{shlex.quote(sys.executable)} -m pip install 'botocore[crt]'"
        return f"your AWS profile was made by `aws login`, for which boto3 needs one more package: {add}"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"):
        return f"AWS can't be reached: {text} Is the network up?"
    if kind == "ResponseParserError":
        return "what answered is not AWS (no valid answer); is there a proxy or a login page in between?"
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired") or re.search("SSO|Login|Token|MFA", kind):
        way = "`aws login`" if "Login" in kind else "`aws sso login`, or this command again if it asked for an MFA code"
        return f"your AWS session has expired; renew it, e.g. with {way} ({code or text})"
    if code == "AuthFailure.ServiceLinkedRoleCreationNotPermitted":
        role = "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
        return f"your account lacks the role that spot nodes need; who may do so makes it once: {role}"
    region = code in ("AuthFailure", "OptInRequired", "UnrecognizedClientException")  # of one that is not enabled, too
    # RunInstances comes after calls that were granted: there they are about the image, and AWS's text names the cure.
    if action != "RunInstances" and (
        region or code in ("InvalidClientTokenId", "SignatureDoesNotMatch", "InvalidAccessKeyId")
    ):
        more = (
            f", or AWS_REGION: {command('regions')} lists the regions that are enabled for your account"
            if region
            else ""
        )
        return f"AWS refuses these credentials ({code}): check AWS_PROFILE, `aws configure`, or {Call.settings}{more}"
    if code in DENIED_CODES:
        found = re.search(r"not authorized to perform: (.+?)(\W+Encoded authorization failure message.*|\W*)$", text)
        denied = f"AWS denies {found[1] if found else S3_ACTIONS.get(action, action)}"
        if "explicit deny" in denied:
            return f"{denied}: a rule forbids it, whatever permissions you have; ask whoever made that rule"
        return f"{denied}: ask for that permission; {command('policy')} prints all that this tool needs"
    if code in QUOTA_CODES:
        return (
            f"your account's quota is used up: {text} Raise 'Running On-Demand Standard instances' (or 'All Standard "
            "Spot Instance Requests') at https://console.aws.amazon.com/servicequotas/"
        )
    if code in RETRY_CODES:
        return f"AWS is busy ({code} from {action}); try again in a minute"
    return f"AWS refused {action}: {text} ({code})" if code else text


@contextlib.contextmanager
def tolerate(*codes: str, loss: str = "") -> Iterator[None]:
    """Let AWS's errors with these CODES pass, all of them if none is named; warn of the LOSS where there is one."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        if codes and error_code(error) not in codes:
            raise
        if type(error).__name__ in ("NoCredentialsError", "ProfileNotFound"):
            raise  # since all calls fail so: one error says it
        if loss:
            warn(f"{loss}: {explain(error)}")


def side_by_side(*calls: Callable[[], Any], limit: int = 0) -> list[Any]:
    """Make calls, all or LIMIT of them at once; return their results in order, or raise the first error."""
    pool = concurrent.futures.ThreadPoolExecutor(limit or len(calls))
    try:
        return [future.result() for future in [pool.submit(call) for call in calls]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for the slowest


class Node(NamedTuple):
    """One EC2 instance of ours, as far as the tool cares."""

    id: str
    group: str
    type: str
    state: str
    launched: datetime
    zone: str = ""
    public_name: str = ""
    public_ip: str = ""
    private_ip: str = ""
    market: str = "on-demand"
    role: str | None = None
    host_key: str = ""
    signature: str = ""  # see is_ours
    price: float | None = None  # $ an hour
    max_hours: float | None = None
    idle_minutes: float | None = None
    tree: bool = False  # its group is linked in two levels
    spot_request: str = ""
    reason: str = ""  # why it ended, if not by the user
    token: str = ""  # its launch's ClientToken
    key_name: str = ""  # of the key pair that it was launched with
    security_groups: tuple[str, ...] = ()  # their names

    @property
    def is_inside(self) -> bool:
        """Whether it is in its group's security group: anybody may write a tag, but a security group keeps its name.

        EC2 tells none of a node that shuts down, which nothing needs protection from.
        """
        unknown = self.state == "shutting-down" and not self.security_groups
        return unknown or f"mitsuba-{self.group}" in self.security_groups

    @property
    def address(self) -> str:
        """Where to connect: the public address, else the private one."""
        return self.public_ip or self.private_ip

    @property
    def name(self) -> str:
        """What to print: the public name, else the address, else the id."""
        return self.public_name or self.address or self.id

    @property
    def short(self) -> str:
        """The last two numbers of the private address, as "4-17": it stays the same for a node's life."""
        return "-".join(self.private_ip.split(".")[-2:])

    @property
    def rate(self) -> float | None:
        """The $ an hour with its public address, where the price is known."""
        return None if self.price is None else self.price + (PUBLIC_ADDRESS_PRICE if self.public_ip else 0)

    @property
    def age(self) -> tuple[datetime, list[int], str]:
        """What sorts nodes from the oldest to the youngest; those of one launch by their addresses."""
        return self.launched, [int(part) for part in self.private_ip.split(".") if part], self.id


class InstanceType(NamedTuple):
    """What an instance type can do."""

    type: str
    architectures: tuple[str, ...]
    boot_modes: tuple[str, ...]
    virtualization: tuple[str, ...]
    cores: int
    encrypts: bool
    burstable: bool
    gbits: float = 0  # a second, that its first network card has at all times; 0: unknown
    tracks: int = 0  # seconds that its security groups remember a silent TCP connection; 0: not told


class SpotRequest(NamedTuple):
    """A spot request of ours."""

    id: str
    group: str
    state: str
    status: str
    max_price: float | None
    node_id: str


@dataclass(frozen=True)
class Rule:
    """One way into a security group; as in EC2, two are the same whatever the owner's description says."""

    protocol: str
    first: int | None  # port; None where the protocol has no ports
    last: int | None
    kind: str  # one of SOURCES
    source: str
    owner: str = field(default="", compare=False)

    @property
    def permission(self) -> dict[str, Any]:
        """The rule without its description, as EC2's calls take it."""
        ports = {} if self.first is None else {"FromPort": self.first, "ToPort": self.last}
        return {"IpProtocol": self.protocol} | ports | {self.kind: [{SOURCES[self.kind]: self.source}]}

    def __str__(self) -> str:
        """Say "tcp 22 from 192.0.2.7/32"."""
        protocol = "every protocol" if self.protocol == "-1" else self.protocol
        ports = "" if self.first is None else f" {self.first}" + (f"-{self.last}" if self.last != self.first else "")
        return f"{protocol}{ports} from {self.source}"


class SecurityGroup(NamedTuple):
    """The security group of one of our groups; made first, removed last."""

    id: str
    group: str
    name: str
    vpc: str
    rules: Sequence[Rule] = ()


def to_number(text: str | None) -> float | None:
    """Return a tag's number; None where it is none (anybody may edit tags)."""
    return float(text) if text and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text) else None


def read_tags(raw: dict[str, Any]) -> dict[str, str]:
    """Return the tags of a raw EC2 object; anybody in the account may have written them."""
    return {tag["Key"]: printable(tag["Value"]) for tag in raw.get("Tags", [])}


def to_node(raw: dict[str, Any]) -> Node:
    """Return a raw instance as a Node."""
    tags = read_tags(raw)
    reason = raw.get("StateReason", {})
    by_user = reason.get("Code", "") in ("", "Client.UserInitiatedShutdown")
    return Node(
        id=raw["InstanceId"],
        group=tags.get(TAG_GROUP, ""),
        type=raw.get("InstanceType", ""),
        state=raw["State"]["Name"],
        launched=raw.get("LaunchTime") or datetime.now(timezone.utc),
        zone=raw.get("Placement", {}).get("AvailabilityZone", ""),
        public_name=raw.get("PublicDnsName") or "",
        public_ip=raw.get("PublicIpAddress") or "",
        private_ip=raw.get("PrivateIpAddress") or "",
        market="spot" if raw.get("InstanceLifecycle") == "spot" else "on-demand",
        role=tags.get(TAG_ROLE) if tags.get(TAG_ROLE) in ("head", "worker") else None,
        host_key=tags.get(TAG_HOST_KEY, ""),
        signature="".join(tags.get(name, "") for name in TAG_SIGNATURES),
        price=to_number(tags.get(TAG_PRICE)),
        max_hours=to_number(tags.get(TAG_HOURS)),
        idle_minutes=to_number(tags.get(TAG_IDLE)),
        tree=tags.get(TAG_TREE) == "yes",
        spot_request=raw.get("SpotInstanceRequestId") or "",
        reason="" if by_user else printable(reason.get("Message", "")),
        token=raw.get("ClientToken") or "",
        key_name=raw.get("KeyName", ""),
        security_groups=tuple(one.get("GroupName", "") for one in raw.get("SecurityGroups", [])),
    )


def fetch_pages(ec2: Client, call: str, found: str, **arguments: Any) -> list[dict[str, Any]]:
    """Return what is FOUND (a JMESPath to a list) on all pages of a Describe call."""
    pages = ec2.get_paginator(call).paginate(**arguments, PaginationConfig={"PageSize": 1000})
    return [raw for raw in pages.search(found) if raw]


def our_filter(group: str | None) -> list[dict[str, Any]]:
    """Return the filter for what is ours: of one GROUP, or all."""
    return [{"Name": f"tag:{TAG_GROUP}", "Values": [group]}] if group else [{"Name": "tag-key", "Values": [TAG_GROUP]}]


def fetch_ours(ec2: Client, call: str, found: str, group: str | None) -> list[dict[str, Any]]:
    """Return what is FOUND of GROUP (None: of all groups); what others have tagged so as we never do is foreign."""
    return [
        raw
        for raw in fetch_pages(ec2, call, found, Filters=our_filter(group))
        for tag in raw.get("Tags", [])
        if tag["Key"] == TAG_GROUP and GROUP_NAME.fullmatch(tag["Value"])
    ]


def fetch_nodes(ec2: Client, group: str | None = None) -> list[Node]:
    """Return every node of GROUP (None: of all groups), the lately terminated too, oldest first."""
    found = fetch_ours(ec2, "describe_instances", "Reservations[].Instances[]", group)
    return sorted(map(to_node, found), key=lambda node: (node.launched, node.id))


def fetch_spot_requests(ec2: Client, group: str | None = None) -> list[SpotRequest]:
    """Return the spot requests of GROUP (None: of all groups)."""
    return [
        SpotRequest(
            id=raw["SpotInstanceRequestId"],
            group=read_tags(raw)[TAG_GROUP],
            state=raw.get("State", ""),
            status=raw.get("Status", {}).get("Code", ""),
            max_price=to_number(raw.get("SpotPrice")),
            node_id=raw.get("InstanceId") or "",
        )
        for raw in fetch_ours(ec2, "describe_spot_instance_requests", "SpotInstanceRequests[]", group)
    ]


def fetch_security_groups(ec2: Client, group: str | None = None) -> list[SecurityGroup]:
    """Return the security groups of GROUP (None: of all groups); anybody may write a tag, but names stay."""
    groups = []
    for raw in fetch_ours(ec2, "describe_security_groups", "SecurityGroups[]", group):
        rules = [
            Rule(one["IpProtocol"], one.get("FromPort"), one.get("ToPort"), kind, source[key], about)
            for one in raw.get("IpPermissions", [])
            for kind, key in SOURCES.items()
            for source in one.get(kind, [])
            for about in [printable(source.get("Description", ""))]
        ]
        group = read_tags(raw)[TAG_GROUP]
        groups.append(SecurityGroup(raw["GroupId"], group, raw.get("GroupName", ""), raw.get("VpcId", ""), rules))
    return [one for one in groups if one.name == f"mitsuba-{one.group}"]


def live(requests: Iterable[SpotRequest]) -> list[SpotRequest]:
    """Return those of REQUESTS that can still launch something, or have."""
    return [request for request in requests if request.state in ("open", "active")]


def spent(node: Node, now: datetime) -> float | None:
    """Return the $ that NODE has cost up to NOW; None where its price, or (EC2 does not tell) its end, is unknown."""
    if node.rate is None or node.state == "terminated":
        return None
    return node.rate * max(60.0, (now - node.launched).total_seconds()) / 3600  # EC2 bills 60 s at least


def totals(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return what NODES are and cost together, as `status --json` shows it; None where it is unknown.

    EC2 charges nothing for pending and shutting-down.
    """
    now = datetime.now(timezone.utc)
    rates = [node.rate for node in nodes if node.rate is not None and node.state in ("running", "stopping")]
    costs = [cost for node in nodes if (cost := spent(node, now)) is not None]
    return {
        "nodes": len(nodes),
        "hourly": round(sum(rates), 4) if rates else None,
        "cost": round(sum(costs), 4) if costs else None,
    }


def at_least(nodes: Iterable[Node]) -> str:
    """Return what stands before a cost of NODES: "at least " where the price of one is not known."""
    return "at least " if any(node.price is None for node in nodes) else ""


def format_cost(nodes: Sequence[Node]) -> str:
    """Return "$0.52/h, $1.04 so far" of NODES, as far as it is known."""
    known = totals(nodes)
    parts = [(known["hourly"], "/h"), (known["cost"], " so far")]
    return ", ".join(f"{at_least(nodes)}{format_money(value)}{what}" for value, what in parts if value is not None)


def tag_nodes(ec2: Client, nodes: Sequence[Node], name: str, value: str) -> None:
    """Set one tag of NODES."""
    ids = [node.id for node in nodes]
    for at in range(0, len(ids), 1000):  # AWS's limit for one call
        ec2.create_tags(Resources=ids[at : at + 1000], Tags=[{"Key": name, "Value": value}])


def fetch_instance_type(ec2: Client, name: str) -> InstanceType:
    """Return what an instance type can do; ClusterError where EC2 has no such type here."""
    types = []
    with tolerate("InvalidInstanceType", "InvalidParameterValue"):
        types = ec2.describe_instance_types(InstanceTypes=[name])["InstanceTypes"]
    if not types:
        offered = fetch_pages(ec2, "describe_instance_type_offerings", "InstanceTypeOfferings[]")
        near = did_you_mean(name, (offer["InstanceType"] for offer in offered))
        advice = near or "; see https://aws.amazon.com/ec2/instance-types/"
        raise ClusterError(f"{ec2.meta.region_name} has no instance type {name!r}{advice}")
    raw = types[0]
    network = raw.get("NetworkInfo", {})
    return InstanceType(
        type=name,
        architectures=tuple(raw.get("ProcessorInfo", {}).get("SupportedArchitectures", ())),
        boot_modes=tuple(raw.get("SupportedBootModes", ("legacy-bios",))),
        virtualization=tuple(raw.get("SupportedVirtualizationTypes", ("hvm",))),
        cores=raw.get("VCpuInfo", {}).get("DefaultVCpus", 0),
        encrypts=raw.get("EbsInfo", {}).get("EncryptionSupport") == "supported",
        burstable=raw.get("BurstablePerformanceSupported", False),
        gbits=network.get("NetworkCards", [{}])[0].get("BaselineBandwidthInGbps", 0),
        tracks=network.get("ConnectionTrackingConfiguration", {}).get("DefaultTcpEstablishedTimeout", 0),
    )


def fetch_spot_history(ec2: Client, instance_type: str, hours: float = 24) -> dict[str, list[tuple[datetime, float]]]:
    """Return zone -> [(time, $ an hour)], oldest first, of the last HOURS."""
    history = fetch_pages(
        ec2,
        "describe_spot_price_history",
        "SpotPriceHistory[]",
        InstanceTypes=[instance_type],
        ProductDescriptions=["Linux/UNIX"],
        StartTime=datetime.now(timezone.utc) - timedelta(hours=hours),
    )
    zones: dict[str, list[tuple[datetime, float]]] = {}
    for one in history:
        zones.setdefault(one["AvailabilityZone"], []).append((one["Timestamp"], float(one["SpotPrice"])))
    return {zone: sorted(prices) for zone, prices in sorted(zones.items())}


def fetch_regions(settings: Settings) -> list[str]:
    """Return the names of the regions that the account can use; the one of config.py need not be among them."""
    from botocore.exceptions import ClientError

    first = open_client(settings, "ec2", find_partition(settings.AWS_REGION)[1])
    try:
        found = first.describe_regions()["Regions"]
    except ClientError:  # a policy of the organization can close any region
        found = open_client(settings, "ec2").describe_regions()["Regions"]
    return sorted(one["RegionName"] for one in found)


def fetch_client_cidr(settings: Settings) -> str:
    """Return who may connect: CLIENT_CIDR, else this machine's public address as /32."""
    import ipaddress
    import urllib.request

    if settings.CLIENT_CIDR:
        return settings.CLIENT_CIDR
    url = os.environ.get(ADDRESS_VARIABLE, ADDRESS_URL)
    advice = f'set CLIENT_CIDR in {Call.settings}, e.g. "203.0.113.7/32"'
    try:
        with urllib.request.urlopen(url, timeout=ADDRESS_LIMIT) as answer:  # noqa: S310 - ours, or the user's own
            text = answer.read(100).decode("ascii", "replace").strip()
    except OSError as error:
        raise ClusterError(f"this machine's public address can't be looked up at {url} ({error}); {advice}") from error
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv4Address(text)
        if not any(address in ipaddress.IPv4Network(network) for network in INSIDE_NETWORKS):
            return f"{address}/32"
    raise ClusterError(f"{url} says this machine is at {text[:60]!r}, which is no public IPv4 address; {advice}")


def try_client_cidr(settings: Settings) -> str:
    """Return who may connect, or "" with a warning: a set-up cluster can do without the look-up."""
    try:
        return fetch_client_cidr(settings)
    except ClusterError as error:
        warn(error.message)
        return ""


def describe_rules(ec2: Client, group: SecurityGroup, rules: Sequence[Rule]) -> str:
    """Say what else RULES let into GROUP, and how to close it."""
    ways = ", ".join(f"{rule} ({rule.owner or 'no description'})" for rule in rules)
    permissions = shlex.quote(json.dumps([rule.permission for rule in rules]))
    close = f"aws ec2 revoke-security-group-ingress --region {ec2.meta.region_name} --group-id {group.id}"
    return f"security group {group.name} also lets in {ways}; to close that: {close} --ip-permissions {permissions}"


# --- SSH ---------------------------------------------------------------------
# The user's key, one connection a node, one step on every node. Touches the key file and the nodes.

TCP_LIMIT = 5  # one connection attempt
EXCHANGE_LIMIT = 30  # banner and key exchange: long under load
IDLE_POLL = 5  # between paramiko's polls of an idle connection; its 0.1 s costs half a core with 1000 nodes
BOOT_LIMIT = 600  # from the launch to an answering sshd
LOGIN_LIMIT = 60  # a node that should be up
REFUSED_PAUSE = 2  # between logins that are refused: OpenSSH 9.8 shuts out who fails often (PerSourcePenalties)
FIRST_KEY_LIMIT = 30  # for an image's own host key to give way to ours
STEP_LIMIT = 60  # a short remote command
CLOUD_INIT_LIMIT = 600
MARK_PATH = "/run/mitsuba-cluster/in-use"  # commands at work hold it open; touched, a node's idle time begins anew
SILENCE_LIMIT = 30  # of a running step: then the node's sshd must show that it is alive
LIVENESS_LIMIT = 30  # and has so long for it
SESSION_LIMIT = 5  # for sshd, which refuses one session more, to end the one before
OUTPUT_TAIL = 4000  # bytes of a step's output that are kept for its error message


def clean_environment() -> dict[str, str]:
    """Return the environment for child processes: without AWS credentials."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


@functools.cache
def read_fingerprint(path: Path) -> str:
    """Return the fingerprint of a key file, of an encrypted one too; "" where ssh-keygen can't tell it."""
    import subprocess

    if not shutil.which("ssh-keygen"):
        return ""
    words = ["ssh-keygen", "-l", "-E", "sha256", "-f", str(path)]
    done = subprocess.run(words, env=clean_environment(), capture_output=True, text=True, check=False)
    found = re.search(r"SHA256:\S+", done.stdout)
    return found[0] if found else ""


def from_agent(path: Path) -> paramiko.PKey | None:
    """Return the ssh-agent's key that a file holds the public half of, or encrypted."""
    import paramiko

    shown = read_fingerprint(path)
    held = paramiko.Agent().get_keys() if shown else ()
    key: paramiko.PKey | None = next((key for key in held if key.fingerprint == shown), None)
    if not key:
        return None
    signs, signing = key.sign_ssh_data, threading.Lock()

    def sign_alone(*what: Any) -> Any:
        with signing:  # the nodes' threads share one connection: each takes the next answer for its own
            return signs(*what)

    key.sign_ssh_data = sign_alone  # type: ignore[assignment,method-assign]
    return key


def has_key(path: Path) -> bool:
    """Tell whether a file is there and holds a key, or its public half: not the placeholder."""
    text = path.read_text("latin-1") if path.exists() else ""
    return "PRIVATE KEY" in text or bool(re.match(r"(ssh-\w+|ecdsa-\S+) [A-Za-z0-9+/=]+", text))


def load_identity(path: Path, may_ask: bool = True) -> paramiko.PKey:
    """Load the user's SSH key; ClusterError says what is wrong with the file."""
    import paramiko

    text = path.read_text("latin-1") if path.exists() else ""
    if not has_key(path):
        if not text or "placeholder" in text:
            raise ClusterError(
                f"there is no SSH key {path}: copy it from the machine that launched the nodes; for nodes of this "
                "machine's own, createNodes makes one (choose another KEYPAIR_NAME)"
            )
        raise ClusterError(f"{path} is no SSH private key: copy it from the machine that launched the nodes")
    is_private = "PRIVATE KEY" in text
    if is_private:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ClusterError(f"{path} can be read by other users: chmod 600 {path}")
        try:
            return paramiko.PKey.from_path(path)
        except (paramiko.PasswordRequiredException, TypeError):  # TypeError: cryptography's way to ask for one
            pass
        except (paramiko.SSHException, ValueError) as error:
            raise ClusterError(f"{path} can't be read as an SSH private key: {error}") from error
    if held := from_agent(path):
        return held
    if not is_private:
        raise ClusterError(f"{path} holds a public key only, and ssh-agent does not have its private half: ssh-add it")
    if not (may_ask and sys.stdin.isatty()):
        raise ClusterError(f"{path} is encrypted: ssh-add it, or run this at a terminal")
    passphrase = click.prompt(f"Passphrase of {path}", hide_input=True, err=True)
    try:
        # Bytes, whatever the annotation says: cryptography, which paramiko hands it to, takes nothing else.
        return paramiko.PKey.from_path(path, passphrase.encode())  # type: ignore[arg-type]
    except (paramiko.SSHException, ValueError) as error:
        raise ClusterError(f"{path} can't be unlocked: wrong passphrase?") from error


def public_line(key: paramiko.PKey) -> str:
    """Return a key's public half, as a line of authorized_keys has it."""
    return f"{key.get_name()} {key.get_base64()}"


def signed_text(group: str, host_key: str) -> bytes:
    """Return what the user's key signs for a launch; no SSH login has to sign such a text."""
    return f"mitsuba-cluster\ngroup {group}\nhost key {host_key}\n".encode()


@functools.cache
def is_signed(public: str, group: str, host_key: str, signature: str) -> bool:
    """Tell whether the key with this PUBLIC half made SIGNATURE; checked once for all nodes of a launch."""
    import base64

    import paramiko

    name, blob = public.split()[:2]
    with contextlib.suppress(ValueError, paramiko.SSHException):
        key = paramiko.PKey.from_type_string(name, base64.b64decode(blob))
        message = paramiko.Message(base64.b64decode(signature, validate=True))
        return bool(key.verify_ssh_sig(signed_text(group, host_key), message))
    return False


def is_ours(node: Node, identity: paramiko.PKey) -> bool:
    """Tell whether NODE was launched with the user's key: anybody in the account may write tags, but not sign them."""
    return is_signed(public_line(identity), node.group, node.host_key, node.signature)


def describe_owner(nodes: Sequence[Node], groups: Sequence[SecurityGroup]) -> str:
    """Return "key pair mitsuba-key, by me@laptop" of a group's NODES and security GROUPS."""
    marks = sorted({word for one in groups for rule in one.rules for word in rule.owner.split()[-1:]})
    keys = ", ".join(sorted({node.key_name or "none" for node in nodes}))
    return f"key pair {keys}{', by ' if marks else ''}{', '.join(marks)}"


def not_ours(node: Node) -> str:
    """Say why nothing connects to a NODE that is not ours, and what to do."""
    if node.signature:
        what = "or its tags were changed: use the SSH_PRIVATE_KEY_FILE that launched it, or another group"
    else:
        what = (
            f"as nodes of older versions (no signature): if it is yours, {command('terminateAll', node.group)} ends it"
        )
    return f"not launched with this key, {what}"


def first_line(text: str) -> str:
    """Return the first line of TEXT that says something."""
    return next((printable(line.strip()) for line in text.splitlines() if line.strip()), "")


def hide_from_git(path: Path) -> str:
    """Keep git from picking up what replaces a tracked placeholder; return why it still would, or ""."""
    import subprocess

    env = {name: value for name, value in clean_environment().items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        line = ["git", "-C", str(path.parent), *words, "--", path.name]
        return subprocess.run(line, env=env, capture_output=True, text=True, check=False)

    if not (shutil.which("git") and path.parent.is_dir()):
        return ""
    listed = git("ls-files", "-v")
    if listed.returncode:
        return "" if "not a git repository" in listed.stderr else first_line(listed.stderr)
    if not listed.stdout:
        return "" if git("check-ignore", "--quiet").returncode == 0 else "it is not in .gitignore"
    if listed.stdout.startswith("S"):  # skip-worktree holds
        return ""
    done = git("update-index", "--skip-worktree")
    return first_line(done.stderr) or format_exit(done.returncode) if done.returncode else ""


def user_command(name: str, script: str, *arguments: str) -> str:
    """Return the command line that runs a bash SCRIPT as the SSH user; NAME is its $0."""
    return shlex.join(["bash", "-c", script, name, *arguments])


def root_command(name: str, script: str, *arguments: str) -> str:
    """Return the command line that runs a bash SCRIPT as root."""
    return "sudo -n " + user_command(name, script, *arguments)


NODE_HEADER = '''"""A part of cluster.py, which wrote this."""
from __future__ import annotations
import concurrent.futures, contextlib, errno, glob, json, os, re, signal, socket, stat, subprocess, sys, threading, time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
'''


@functools.cache
def node_program(entry: Callable[[list[str]], object]) -> str:
    """Return a Python program for a node: ENTRY, and the functions, classes and CONSTANTS that it needs, to the letter.

    inspect.getsource finds a class only by parsing the whole file: 0.3 s each, before Python 3.13.
    """
    import symtable

    text = Path(__file__).read_text("utf-8")
    blocks = {name: f"{name} = {value!r}" for name, value in globals().items() if name.isupper()}
    blocks |= {found[1]: found[0] for found in re.finditer(r"^(?:def|class) (\w+)\b.*\n(?:(?:[ )].*)?\n)*", text, re.M)}
    needed = {entry.__name__}
    tables = [symtable.symtable(blocks[entry.__name__], "", "exec")]
    for table in tables:
        tables += table.get_children()
        used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        new = used & blocks.keys() - needed
        needed |= new
        tables += [symtable.symtable(blocks[name], "", "exec") for name in new]
    sources = [block for name, block in blocks.items() if name in needed]
    return "\n".join([NODE_HEADER, *sources, f"{entry.__name__}(sys.argv[1:])\n"])


class Unusable(NodeError):
    """A node answers, and can't be used."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What one step did on one node: a value, or an error in words."""

    node: Node
    value: T = None  # type: ignore[assignment]  # the step's own result, where it succeeded
    error: str = ""
    silent: bool = False  # it failed since the node does not answer

    @property
    def ok(self) -> bool:
        """Tell whether the step succeeded."""
        return not self.error


def fact(form: str, read: Callable[[str], Any] = str) -> Any:
    """Return a field of Facts: the FORM in which a node may say it, and what it is READ as."""
    return field(default=read(""), metadata={"form": form, "read": read})


@dataclass(frozen=True)
class Facts:
    """What a node says of itself, in strict forms: units and tables are made of it, and renderers can write to some of
    its sources.
    """

    cores: int = fact(r"[1-9][0-9]{0,4}", lambda text: int(text or 0))
    # Of Mitsuba: its version, SPECTRUM_SAMPLES, and 1 if of double precision; empty: not installed.
    build: str = fact(r"([0-9][0-9.]{0,30}[0-9] [0-9]{1,3} [01])?")
    role: str = fact(r"(head|worker)?")  # of its server; empty: none yet
    # Private addresses that the running head is linked to.
    linked: tuple[str, ...] = fact(r"([0-9]{1,3}(\.[0-9]{1,3}){3}( |$))*", lambda text: tuple(text.split()))
    relays: str = fact(r"(yes)?")  # it is a sub-head, maybe of no workers any more
    replaced: str = fact(r"(yes)?")  # install has replaced Mitsuba under the server, which wants a restart
    boot: str = fact(r"[0-9A-Za-z-]{0,64}")  # changes with each boot of the node
    started: str = fact(r"[0-9A-Za-z-]{0,64}")  # changes with each start of its server
    clock: str = fact(r"([0-9]{1,12}(\.[0-9]{1,9})?)?")  # seconds since 1970
    load: tuple[float, ...] = fact(r"([0-9]{1,6}\.[0-9]{1,3}( |$)){3}", lambda text: tuple(map(float, text.split())))
    memory_mb: tuple[int, ...] = fact(r"[0-9]{1,9} [0-9]{1,9}", lambda text: tuple(map(int, text.split())))  # used, all
    restarts: int = fact(r"[0-9]{0,9}", lambda text: int(text or 0))  # of its server by systemd, since it was started
    problem: str = fact(r".*", printable)  # what the server's log said last of an error, if it was restarted

    # What its guard says: all of it in seconds.
    idle: float | None = None  # since its last use; None: no guard is there
    idle_limit: float = 0  # after which it ends; 0: never
    clients: dict[str, tuple[float, float]] = field(default_factory=dict)  # address and port -> (connected, silent)

    @property
    def version(self) -> str:
        """The version of Mitsuba."""
        return self.build.partition(" ")[0]


# Prints NAME=VALUE lines; what a node has not is left out or empty. It reads only files that root alone can write.
FACTS = r"""
set -uo pipefail
echo "cores=$(nproc)"
echo "build=$(cat /var/lib/mitsuba-cluster/build 2> /dev/null)"
echo "role=$(cat /etc/mitsuba-cluster/role 2> /dev/null)"
echo "linked=$(tr '\n' ' ' 2> /dev/null < /run/mitsuba-cluster/linked)"
echo "relays=$(test ! -e /run/systemd/system/mtssrv.service.d/relay.conf || echo yes)"
echo "guard=$(cat /run/mitsuba-cluster/state.json 2> /dev/null)"
echo "boot=$(cat /proc/sys/kernel/random/boot_id)"
echo "started=$(systemctl show --property InvocationID --value mtssrv.service 2> /dev/null)"
echo "replaced=$(cat /run/mitsuba-cluster/replaced 2> /dev/null)"
echo "clock=$(date +%s.%N)"
echo "load=$(cut -d ' ' -f 1-3 /proc/loadavg)"
echo "memory_mb=$(free -m | awk '$1 == "Mem:" { print $3, $2 }')"
restarts=$(systemctl show --property NRestarts --value mtssrv.service 2> /dev/null)
echo "restarts=${restarts:-0}"
if [ "${restarts:-0}" != 0 ]; then
  # Backwards to the last error: the guard's handshakes alone make 120 lines a minute.
  log=$(timeout 2 journalctl --no-pager --quiet --output cat --reverse --unit mtssrv.service 2> /dev/null |
    grep -m 1 -iE 'error|exception|fail|cannot|could not' | cut -c 1-300)
  echo "problem=$log"
fi
"""


# $1: seconds. cloud-init exits with 2 after mere warnings; an image may have none at all.
WAIT_FOR_BOOT = r"""
set -euo pipefail
command -v cloud-init > /dev/null || exit 0
if grep -qs '"errors": \[\]' /run/cloud-init/result.json; then exit 0; fi  # half a second quicker than to ask
code=0
timeout "$1" cloud-init status --wait > /dev/null || code=$?
case $code in
  0 | 2) ;;
  124) echo "cloud-init did not end within $1 seconds"; exit 1 ;;
  *) cloud-init status --long; exit 1 ;;
esac
"""


@functools.cache
def connection_errors() -> tuple[type[Exception], ...]:
    """Return what paramiko raises where a connection breaks; its import takes long."""
    import paramiko

    return paramiko.SSHException, EOFError, OSError


class Remote:
    """A connected node: runs commands on it."""

    def __init__(self, node: Node, transport: paramiko.Transport) -> None:
        self.node = node
        self.transport = transport

    def run(
        self,
        line: str,
        limit: float | None = None,
        stdin: Iterable[bytes] = (),
        sink: Callable[[bytes], object] = lambda lines: None,
        keep: int = OUTPUT_TAIL,
    ) -> tuple[int, str]:
        """Run a command LINE; return (exit code, or -1: killed; the last KEEP bytes of its output, stderr merged in).

        SINK gets all of the output as it comes, in whole lines (unless they are of megabytes). NodeError after LIMIT
        seconds (None: STEP_LIMIT), when the node does not answer any more, or when the connection breaks.
        """
        deadline = time.monotonic() + (STEP_LIMIT if limit is None else limit)
        with self.session(line) as channel:
            self.feed(channel, stdin)
            tail = rest = b""
            try:
                while block := self.receive(channel, deadline):
                    tail = (tail + block)[-keep:]
                    rest += block
                    if end := rest.rfind(b"\n") + 1 or len(rest) // MIB * MIB:
                        sink(rest[:end])
                        rest = rest[end:]
            finally:
                if rest:
                    sink(rest)
            if not channel.status_event.wait(LIVENESS_LIMIT):
                raise TimeoutError
            code = channel.recv_exit_status()
            if code < 0 and not (channel.eof_received and self.transport.is_active()):
                raise EOFError("the node is gone")
            return code, tail.decode("utf-8", "replace")

    @contextlib.contextmanager
    def session(self, line: str) -> Iterator[paramiko.Channel]:
        """Start a command LINE, stderr merged into its output, and turn what breaks the body into a NodeError."""
        try:
            channel = self.open_session()
            try:
                channel.set_combine_stderr(True)
                channel.settimeout(SILENCE_LIMIT)
                with self.awaiting_reply():
                    channel.exec_command(line)
                yield channel
            finally:
                channel.close()
        except TimeoutError:
            raise SilentNode("does not answer any more") from None
        except connection_errors() as error:
            raise NodeError(f"the connection broke: {error or type(error).__name__}") from error

    def open_session(self) -> paramiko.Channel:
        """Open a session; sshd, which may allow few at once (MaxSessions), ends the one before a moment late."""
        import paramiko

        deadline = time.monotonic() + SESSION_LIMIT
        while True:
            try:
                return self.transport.open_session(timeout=LIVENESS_LIMIT)
            except paramiko.ChannelException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    @contextlib.contextmanager
    def awaiting_reply(self) -> Iterator[None]:
        """Give up the node if the body, in which paramiko itself would wait for ever for its reply, takes too long."""
        timer = threading.Timer(LIVENESS_LIMIT, self.transport.close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @staticmethod
    def feed(channel: paramiko.Channel, stdin: Iterable[bytes]) -> None:
        """Send a command its input, as far as it wants it: one that has ended says why in its output."""
        try:
            for block in stdin:
                channel.sendall(block)
            channel.shutdown_write()
        except TimeoutError:
            raise
        except OSError:
            pass

    def receive(self, channel: paramiko.Channel, deadline: float) -> bytes:
        """Return the next output, b"" at its end; a node that is silent must open another session to show its life."""
        import paramiko

        while (left := deadline - time.monotonic()) > 0:
            channel.settimeout(min(SILENCE_LIMIT, left))
            try:
                return channel.recv(1 << 17)
            except TimeoutError:
                try:
                    with self.awaiting_reply():  # its own limit does not count while another thread's write is stuck
                        self.transport.open_session(timeout=LIVENESS_LIMIT).close()
                except paramiko.ChannelException:
                    pass  # sshd allows one only, and shows its life by saying so
                except connection_errors():
                    raise TimeoutError from None
        raise NodeError("did not end within its time limit")

    def check(self, line: str, **options: Any) -> str:
        """Run a command LINE and return its output's end; NodeError with the last lines where it fails."""
        code, output = self.run(line, **options)
        if code:
            raise NodeError(f"{format_exit(code)}{format_tail(output)}")
        return output


def fetch_facts(remote: Remote) -> Facts:
    """Ask a node about itself."""
    output = remote.check(user_command("facts", FACTS), keep=MIB)  # a head names all of its workers
    pairs = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    said: dict[str, Any] = {}
    for one in fields(Facts):
        if one.metadata:
            text = pairs.get(one.name, "")
            if not re.fullmatch(one.metadata["form"], text):
                raise NodeError(f"reports {one.name!r} as {text[:60]!r}, which can't be")
            said[one.name] = one.metadata["read"](text)

    def seconds(value: Any) -> float:
        return min(1e9, max(0.0, float(value)))  # what can be shown, whatever it is

    try:
        guard = {"idle": None, "limit": 0, "clients": {}} | json.loads(pairs.get("guard") or "{}")
        return Facts(
            **said,
            idle=None if guard["idle"] is None else seconds(guard["idle"]),
            idle_limit=seconds(guard["limit"]),
            clients={printable(peer): (seconds(a), seconds(b)) for peer, (a, b) in guard["clients"].items()},
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        raise NodeError(f"says strange things about itself{format_tail(output)}") from None


def to_ssh_error(get_exception: Callable[[], Exception | None]) -> Exception | None:
    """Return what has ended a connection: paramiko hands on whatever a malformed packet raises."""
    import paramiko

    error = get_exception()
    known = error is None or isinstance(error, (paramiko.SSHException, EOFError, OSError))
    return error if known else paramiko.SSHException(f"malformed packet: {error!r}")


def connect(node: Node, settings: Settings, identity: paramiko.PKey) -> Remote:
    """Connect once: exchange keys, check the host key, log in."""
    import paramiko

    transport = None
    plain = socket.create_connection((node.address, settings.SSH_PORT), TCP_LIMIT)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # 0.05 of 0.66 s with 8 nodes
        transport = paramiko.Transport(plain)
        transport.get_exception = functools.partial(to_ssh_error, transport.get_exception)  # type: ignore[method-assign]
        transport.banner_timeout = transport.auth_timeout = EXCHANGE_LIMIT
        options = transport.get_security_options()
        # AES-GCM first: its check is native, the other ciphers' is in Python.
        options.ciphers = tuple(sorted(options.ciphers, key=lambda cipher: "gcm" not in cipher))
        transport.start_client(timeout=EXCHANGE_LIMIT)
        if public_line(transport.get_remote_server_key()) != node.host_key:
            raise Unusable(
                "shows another host key than the one it was launched with: something else answers at this address, "
                "or somebody is in between; nothing was sent to it"
            )
        try:
            transport.auth_publickey(settings.SSH_USER, identity)
        except paramiko.AuthenticationException as error:
            if not transport.is_active() or "timeout" in str(error):
                raise  # no refusal: paramiko calls a connection that breaks, or is slow, the same
            raise Unusable(f"refuses the key {settings.SSH_PRIVATE_KEY_FILE} for user {settings.SSH_USER}") from error
        transport.set_keepalive(15)
        plain.settimeout(IDLE_POLL)
        return Remote(node, transport)
    except BaseException:
        (transport or plain).close()
        raise


@contextlib.contextmanager
def ssh_command(node: Node, settings: Settings, *options: str) -> Iterator[list[str]]:
    """Make OpenSSH's command line for NODE, good inside the with block: it checks the host key, obeys no ssh_config."""
    import tempfile

    host = node.address if settings.SSH_PORT == 22 else f"[{node.address}]:{settings.SSH_PORT}"
    with tempfile.NamedTemporaryFile("w", prefix="mitsuba-known-hosts-") as known:
        known.write(f"{host} {node.host_key}\n")
        known.flush()
        given = {
            "UserKnownHostsFile": f'"{known.name}"',  # may have spaces
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
            "ServerAliveInterval": "15",
        }
        words = ["ssh", "-F", "none", "-p", str(settings.SSH_PORT), "-i", str(settings.key_file)]
        words += [word for key, value in given.items() for word in ("-o", f"{key}={value}")]
        yield [*words, *options, f"{settings.SSH_USER}@{node.address}"]


def open_remote(
    node: Node, settings: Settings, identity: paramiko.PKey, limit: float, first_boot: bool = False
) -> Remote:
    """Connect to a node, trying again for LIMIT seconds while it is silent, refuses or resets.

    A wrong host key or a refused login fails at once; at the FIRST_BOOT only after a while, since
    sshd may be up with the image's own keys before cloud-init has put ours in their place.
    """
    if not is_ours(node, identity):
        raise NodeError(not_ours(node))
    deadline = time.monotonic() + limit
    answered: float | None = None
    pause = 0.2
    while True:
        try:
            return connect(node, settings, identity)
        except Unusable:
            answered = answered or time.monotonic()
            pause = min(2 * pause, REFUSED_PAUSE)
            if not first_boot or time.monotonic() - answered > FIRST_KEY_LIMIT:
                raise
        except connection_errors() as error:
            if time.monotonic() > deadline:
                raise SilentNode(
                    f"port {settings.SSH_PORT} of {node.address} does not answer from here "
                    f"({error or type(error).__name__}); does the security group allow this machine's address, and "
                    "does the subnet route to the internet?"
                ) from error
        time.sleep(pause)


def raise_limits() -> None:
    """Allow as many open files as the system lets us: a node takes a few."""
    import logging
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    threading.stack_size(512 * 1024)  # a thousand nodes are two thousand threads
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # errors reach the user by us


class Progress:
    """What is being done: one line on a terminal that is drawn anew, in a pipe a line a minute.

    TOTAL nodes are counted; a bar shows SIZE bytes, whose number grows steadily. Any thread may feed it.
    """

    def __init__(self, label: str, total: int, say: Callable[[Outcome[Any]], str] | None = None, size: int = 0) -> None:
        self.label, self.total, self.say, self.size = label, total, say, size
        self.done = 0
        self.detail = ""
        self.steps: dict[str, str] = {}  # node id -> what it does now
        self.moved: dict[str, int] = collections.defaultdict(int)  # node id, or "all" -> bytes
        self.began = self.told = time.monotonic()

    def step(self, node: Node, text: str) -> None:
        """Note what NODE does now, in a word or two: "booting", "unpacking"."""
        with OUTPUT:
            self.steps[node.id] = text

    def describe(self) -> str:
        """Return what stands beside the bar: nodes, bytes, rate, time left, the nodes' steps, the time gone."""
        gone, moved = time.monotonic() - self.began, sum(self.moved.values())
        parts = [f"{self.done}/{self.total}"] if self.total else []
        if self.size:
            parts.append(f"{format_size(moved)} of {format_size(self.size)}")
            if moved and gone > 1:
                rate = moved / gone
                parts.append(f"{format_size(rate)}/s, {format_duration(max(0, self.size - moved) / rate)} left")
        steps = sorted(self.steps.values())
        parts += [self.detail] if self.detail else [f"{steps.count(step)} {step}" for step in dict.fromkeys(steps)]
        return ", ".join([*parts, format_duration(gone)])

    def redraw(self) -> None:
        """Draw the bar anew."""
        with OUTPUT:
            if is_terminal():
                filled = 20 * sum(self.moved.values()) // self.size if self.size else 0
                bar = f" [{'#' * filled:·<20}]" if 0 < filled < 20 else ""
                draw(f"{self.label}{bar}: {self.describe()}")
            elif time.monotonic() - self.told > 60:
                self.told = time.monotonic()
                note(f"{self.label}: {self.describe()}")

    def show(self, detail: str) -> None:
        """Show a detail beside the bar, in place of the nodes' steps."""
        self.detail = detail
        self.redraw()

    def finished(self, outcome: Outcome[Any]) -> None:
        """Count a node, and print its line: success to stdout, failure to stderr."""
        with OUTPUT:
            self.done += 1
            self.steps.pop(outcome.node.id, None)
            if outcome.error:
                note(outcome.error, outcome.node.name, "red")
            elif self.say and (line := self.say(outcome)):
                result(line)


class NodePool:
    """The connections to the nodes of one run; each step runs in a thread of its node's own.

    The threads are daemons, not a ThreadPoolExecutor's: the program's end must not wait for a node that is dead.
    """

    def __init__(self, settings: Settings, identity: paramiko.PKey) -> None:
        self.settings = settings
        self.identity = identity
        self.remotes: dict[str, Remote] = {}
        raise_limits()

    def submit(
        self,
        node: Node,
        step: Callable[[Remote], T],
        progress: Progress | None = None,
        limit: float | None = None,
        first_boot: bool = False,
    ) -> Future[Outcome[T]]:
        """Start STEP on NODE, connecting for at most LIMIT seconds; PROGRESS shows its outcome."""
        future: Future[Outcome[T]] = Future()

        def work() -> None:
            try:
                outcome = self.attempt(node, step, LOGIN_LIMIT if limit is None else limit, first_boot)
                if progress:
                    progress.finished(outcome)
                future.set_result(outcome)
            except BaseException as error:  # a bug: result() raises it in the main thread, with its traceback
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def attempt(self, node: Node, step: Callable[[Remote], T], limit: float, first_boot: bool) -> Outcome[T]:
        """Run STEP on NODE in this thread; its failure becomes an outcome."""
        try:
            remote = self.remotes.get(node.id)
            if not remote or not remote.transport.is_active():
                remote = open_remote(node, self.settings, self.identity, limit, first_boot)
                self.remotes[node.id] = remote
            return Outcome(node, step(remote))
        except (NodeError, ClusterError) as error:
            return Outcome(node, error=str(error), silent=isinstance(error, SilentNode))

    def each(
        self,
        nodes: Sequence[Node],
        step: Callable[[Remote], T],
        progress: Progress | None = None,
        limit: float | None = None,
    ) -> list[Outcome[T]]:
        """Run STEP on all NODES at once; return their outcomes in the order of NODES."""
        futures = [self.submit(node, step, progress, limit) for node in nodes]
        while concurrent.futures.wait(futures, 0.5).not_done:
            if progress:
                progress.redraw()
        return [future.result() for future in futures]


# --- Passing on --------------------------------------------------------------
# How files come to a folder of a node, from S3, from another node or from here: the programs that fetch and serve
# them there, and who fetches from whom. Touches one folder of each node.

RANGE_SIZE = 16 * MIB  # bytes that one request asks for
RANGE_STREAMS = 8  # requests, and files, at once
RANGE_TRIES = 6
RANGE_TIMEOUT = 30
FETCH_FOLDER = ".mitsuba-cluster"  # in the target folder: parts, the record of what is complete, a lock
OWN_FAULT = 507  # HTTP's code for a full disk
REPORT_LIMIT = 1 << 62  # no number in a node's report is larger
RECEIVERS = 2  # that a node serves at once
SERVE_SECONDS = 600  # then a node's program ends, whatever happens here; a next one goes on where it has ended
PEERS_TRIED = 2  # that failed a node; then it fetches from here
PEER_TRIES, PEER_TIMEOUT = 2, 10  # of a range from another node, which may have died
SPREAD_PATIENCE = 2  # seconds in which nodes say what they have, before anything is sent from here


class Wanted(NamedTuple):
    """A file that a node shall have, and where it gets it."""

    path: str  # below the target folder
    size: int
    mark: str  # what tells this content from another: its SHA-256, else its ETag
    digest: str  # SHA-256 or MD5 in hex, or "": then its size must do
    url: str  # "": there is no source yet; the node only says whether it lacks the file
    headers: dict[str, str]  # of each request


class FetchFailed(Exception):
    """A file can't be had; STATUS is HTTP's where its source refuses it, and OWN_FAULT where the node can't keep it."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


def open_below(folder: int, path: str) -> int:
    """Open the folder PATH below FOLDER (a descriptor), and make what is missing of it.

    OSError where a component is a link or not our own: its owner could put a link in its place.
    """
    here = os.dup(folder)
    try:
        for name in filter(None, path.split("/")):
            if name in (".", ".."):
                raise OSError(errno.EINVAL, "leads out of the folder")
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=here)
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
            if os.fstat(here).st_uid != os.geteuid():
                raise PermissionError(errno.EACCES, "belongs to another user", name)
    except OSError:
        os.close(here)
        raise
    return here


class Fetcher:
    """Runs on a node: fetches files into one folder, and records what is complete there."""

    def __init__(self, folder: str, tries: int = RANGE_TRIES, timeout: int = RANGE_TIMEOUT) -> None:
        import subprocess

        self.tries, self.timeout, self.name = tries, timeout, os.path.abspath(folder)
        self.folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.state = open_below(self.folder, FETCH_FOLDER)
        self.ranges = concurrent.futures.ThreadPoolExecutor(RANGE_STREAMS)
        self.counting = threading.Lock()
        self.bytes = {"moved": 0}  # and, once that is known, those that were "lacking"
        with contextlib.suppress(OSError):
            os.open(MARK_PATH, os.O_RDONLY)  # stays open: so the node's guard sees that a command is at work
            subprocess.run(["sudo", "-n", "touch", MARK_PATH], capture_output=True, check=False)  # or was, for a moment

    def open_state(self, name: str, flags: int) -> int:
        """Open one of our own files."""
        return os.open(name, flags | os.O_NOFOLLOW, 0o644, dir_fd=self.state)

    def load(self, name: str) -> Any:
        """Return what save has kept under NAME; None where there is nothing."""
        try:
            with open(name, opener=self.open_state) as file:
                return json.load(file)
        except (OSError, ValueError):
            return None

    def save(self, name: str, value: Any) -> None:
        """Keep VALUE under NAME, whole or not at all."""
        with open(name + ".new", "w", opener=self.open_state) as file:
            json.dump(value, file)
        os.replace(name + ".new", name, src_dir_fd=self.state, dst_dir_fd=self.state)

    @staticmethod
    def part_name(one: Wanted) -> str:
        """Return the name of a file while it is incomplete: a part of another content is no part of it."""
        import hashlib

        return hashlib.sha256((one.path + "\0" + one.mark).encode()).hexdigest()[:32] + ".part"

    def open_target(self, one: Wanted) -> tuple[int, str]:
        """Open the folder that a file belongs into; return it, and the file's name in it."""
        folder, _, name = one.path.rpartition("/")
        if name in ("", ".", "..") or one.path.split("/")[0] == FETCH_FOLDER:
            raise OSError(errno.EINVAL, "is not a name for a file")
        return open_below(self.folder, folder), name

    def entry(self, one: Wanted) -> list[Any]:
        """Return what the record says of a file that is complete; OSError where it is missing."""
        folder, name = self.open_target(one)
        try:
            now = os.stat(name, dir_fd=folder, follow_symlinks=False)
        finally:
            os.close(folder)
        return [one.mark, now.st_size, now.st_mtime_ns]

    def is_here(self, one: Wanted, record: dict[str, Any]) -> bool:
        """Tell whether a file is as its last transfer left it."""
        try:
            return bool(record.get(one.path) == self.entry(one))
        except OSError:
            return False

    def fetch_range(self, one: Wanted, part: int, begin: int, end: int) -> None:
        """Bring the bytes from BEGIN to END into the open PART; what came before an error is kept."""
        import http.client
        import urllib.error
        import urllib.request

        for attempt in range(self.tries):
            try:
                headers = one.headers | {"Range": f"bytes={begin}-{end - 1}"}
                request = urllib.request.Request(one.url, headers=headers)  # noqa: S310 - the tool wrote the address
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:  # noqa: S310
                    if answer.status != 206 and (begin, end) != (0, one.size):
                        raise FetchFailed("its source sends no ranges")
                    while begin < end:
                        block = answer.read(min(MIB, end - begin))
                        if not block:
                            raise ValueError("the transfer broke off")
                        while block:  # a disk that is nearly full takes less
                            written = os.pwrite(part, block, begin)
                            begin, block = begin + written, block[written:]
                            with self.counting:
                                self.bytes["moved"] += written
                return
            except urllib.error.HTTPError as error:
                if error.code in (400, 401, 403, 404, 412) or attempt == self.tries - 1:
                    cause = re.search(rb"<Code>(\w+)</Code>", error.read(4096))  # S3's own word for it
                    why = f"{error.code} {cause[1].decode()}" if cause else f"{error.code}"
                    text = "it has changed at its source meanwhile; run this again" if error.code == 412 else ""
                    raise FetchFailed(text or f"its source answers {why}", error.code) from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
                    raise
                if attempt == self.tries - 1:
                    raise FetchFailed(f"it can't be fetched: {getattr(error, 'reason', error)}") from None
            time.sleep(0.5 * 2**attempt)

    def fetch(self, one: Wanted) -> list[Any]:
        """Fetch one file, go on where an earlier try broke off, verify it and put it in its place."""
        import hashlib

        folder, target = self.open_target(one)
        part = self.part_name(one)
        tally = part + ".whole"  # how many ranges, from the beginning, have come
        digest = hashlib.sha256() if len(one.digest) == 64 else hashlib.md5(usedforsecurity=False)
        handle = self.open_state(part, os.O_RDWR | os.O_CREAT)
        whole = (self.load(tally) or 0) if os.fstat(handle).st_size == one.size else 0
        self.save(tally, whole)  # before the part gets its size: a stale one would vouch for what is not there
        os.truncate(handle, one.size)
        ranges = [(begin, min(begin + RANGE_SIZE, one.size)) for begin in range(0, one.size, RANGE_SIZE)]
        jobs = [self.ranges.submit(self.fetch_range, one, handle, *place) for place in ranges[whole:]]
        for number, (begin, end) in enumerate(ranges):
            if number >= whole:
                jobs[number - whole].result()
                self.save(tally, number + 1)
            for place in range(begin, end if one.digest else begin, MIB):  # while the next ranges come
                digest.update(os.pread(handle, min(MIB, end - place), place))
        os.close(handle)  # not after a failure: other ranges still write to it
        os.unlink(tally, dir_fd=self.state)
        if one.digest and digest.hexdigest() != one.digest:
            os.unlink(part, dir_fd=self.state)
            raise FetchFailed("its checksum is wrong after the transfer")
        os.replace(part, target, src_dir_fd=self.state, dst_dir_fd=folder)
        os.close(folder)
        return self.entry(one)

    def make_room(self, missing: Sequence[Wanted]) -> int:
        """Remove parts that nobody will complete; return the bytes that are MISSING, FetchFailed if they do not fit."""
        wanted, there = {self.part_name(one) for one in missing}, 0
        for name in os.listdir(self.state):
            if name in wanted:
                there += 512 * os.stat(name, dir_fd=self.state).st_blocks
            elif ".part" in name and name.removesuffix(".whole") not in wanted:
                os.unlink(name, dir_fd=self.state)
        disk = os.fstatvfs(self.folder)
        need, free = sum(one.size for one in missing) - there, disk.f_bavail * disk.f_frsize
        if need > free:
            raise FetchFailed(f"{format_size(need)} needed, {format_size(free)} free in {self.name}", OWN_FAULT)
        return need

    def fetch_all(self, wanted: Sequence[Wanted]) -> dict[str, int]:
        """Fetch those of WANTED that are not here and have a source; return what was done, as numbers."""
        import fcntl

        with open("lock", "w", opener=self.open_state) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a run that lost its connection, or somebody else's, goes first
            record = self.load("record.json")
            record = record if isinstance(record, dict) else {}
            missing = [one for one in wanted if not self.is_here(one, record)]
            self.bytes["lacking"] = self.make_room(missing)
            files, saved = concurrent.futures.ThreadPoolExecutor(RANGE_STREAMS), time.monotonic()
            jobs = {files.submit(self.fetch, one): one.path for one in missing if one.url}
            try:
                for job in concurrent.futures.as_completed(jobs):
                    record[jobs[job]] = job.result()
                    if time.monotonic() - saved > 1:
                        self.save("record.json", record)
                        saved = time.monotonic()
            except FetchFailed as error:
                raise FetchFailed(f"{jobs[job]}: {error}", error.status) from None
            except OSError as error:
                where = f"{error.filename}: " if error.filename in jobs[job].split("/") else ""
                raise FetchFailed(f"{jobs[job]}: {where}{error.strerror or error}", OWN_FAULT) from None
            finally:
                files.shutdown(wait=False, cancel_futures=True)
                self.ranges.shutdown(wait=False, cancel_futures=True)
                self.save("record.json", record)
            done = {"fetched": len(jobs), "present": len(wanted) - len(missing), "missing": len(missing) - len(jobs)}
            return done | self.bytes


def fetch_files(arguments: list[str]) -> None:
    """Run on a node: fetch the files that stdin lists, as JSON, into a folder.

    Writes a JSON line twice a second: {"moved": bytes, "lacking": bytes}, and at the end what fetch_all returns, or an
    "error".
    """
    printing = threading.Lock()

    def say(**report: Any) -> None:
        with printing:
            print(json.dumps(report), flush=True)

    def report() -> None:
        while True:
            time.sleep(0.5)
            say(**fetcher.bytes)

    os.umask(0o022)
    for name in [name for name in os.environ if name.lower() == "http_proxy"]:
        del os.environ[name]  # peers and this machine are asked by http, and directly; S3 by https
    wanted = [Wanted(**one) for one in json.load(sys.stdin)]
    try:
        fetcher = Fetcher(arguments[0], *map(int, arguments[1:]))
    except OSError as error:
        say(error=f"{arguments[0]} can't be written to ({error.strerror}); install prepares it")
        sys.exit(1)
    threading.Thread(target=report, daemon=True).start()
    try:
        say(**fetcher.fetch_all(wanted))
    except (FetchFailed, OSError) as error:
        if isinstance(error, OSError):
            error = FetchFailed(f"{error.filename or arguments[0]}: {error.strerror or error}", OWN_FAULT)
        say(error=str(error), status=error.status, **fetcher.bytes)
        os._exit(1)  # at once: other threads are in the midst of their ranges


def python_command(entry: Callable[[list[str]], object], *arguments: str) -> str:
    """Return the command line that runs a function of this file as the SSH user."""
    return shlex.join(["python3", "-I", "-c", node_program(entry), *arguments])


class Fetched(NamedTuple):
    """What a node reports when it has fetched files."""

    fetched: int
    present: int  # were there already
    missing: int  # have no source yet
    moved: int  # bytes
    lacking: int  # bytes that were not here before, not even from an earlier try


def read_report(line: bytes) -> dict[str, Any]:
    """Return a line of a node's report; {} where it is something else, NodeError where it makes no sense."""
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):  # an error message of Python's, say
        return {}
    if isinstance(report, dict) and all(
        isinstance(value, str) if name == "error" else between(0, REPORT_LIMIT, int)(value)
        for name, value in report.items()
    ):
        return report
    raise NodeError(f"sends a malformed report: {line[:80].decode('utf-8', 'replace')}")


@dataclass
class Delivery:
    """What comes to one node's FOLDER, in several tries; SHOW hears how many bytes have come, and of how many."""

    remote: Remote
    folder: str
    show: Callable[[int, int], object]
    moved: int = 0  # bytes
    status: int = 0  # of the FetchFailed by which the last try ended

    def fetch(self, wanted: Sequence[Wanted], *patience: int) -> Fetched:
        """Let the node fetch files, once more. PATIENCE: other tries of a range, and timeout."""
        before, self.status = self.moved, 0
        last: dict[str, Any] = {}

        def hear(lines: bytes) -> None:
            for line in lines.splitlines():
                last.update(read_report(line))
                if last.keys() >= {"moved", "lacking"}:
                    self.moved = before + last["moved"]
                    self.show(self.moved, before + last["lacking"])

        job = json.dumps([one._asdict() for one in wanted]).encode()  # by stdin: addresses show in no command line
        line = python_command(fetch_files, self.folder, *map(str, patience))
        code, output = self.remote.run(line, limit=SYNC_LIMIT, stdin=[job], sink=hear)
        if "error" in last:
            self.status = last.get("status", 0)
            raise NodeError(last["error"])
        if code or not last.keys() >= set(Fetched._fields):
            raise NodeError(f"{format_exit(code)}{format_tail(output)}")
        return Fetched(**{name: last[name] for name in Fetched._fields} | {"moved": self.moved})


class FileServer:
    """Answers whoever knows a token HTTP requests for ranges of files, by their numbers; runs on a node, and here."""

    def __init__(self, token: str, sizes: Sequence[int], paths: Sequence[str | Path]) -> None:
        self.token, self.sizes, self.paths = token, sizes, paths
        self.counting = threading.Lock()
        self.receivers: list[str] = []  # one for each request that is being answered

    def answer(self, stream: Stream, peer: str) -> None:
        """Answer one request, and close the STREAM."""
        with contextlib.closing(stream), contextlib.suppress(OSError, EOFError):  # a receiver that goes asks again
            stream.settimeout(RANGE_TIMEOUT)
            request = b""
            while b"\r\n\r\n" not in request and len(request) < 1 << 14:
                if not (block := stream.recv(4096)):
                    return
                request += block
            status, number, begin, end = self.judge(request)
            with self.counting:
                if status == 206 and peer not in self.receivers and len(set(self.receivers)) >= RECEIVERS:
                    status, end = 503, begin
                self.receivers.append(peer)
            try:
                head = f"HTTP/1.1 {status} -\r\nContent-Length: {end - begin}\r\nConnection: close\r\n\r\n"
                stream.sendall(head.encode())
                if status == 206:
                    with open(self.paths[number], "rb") as file:
                        while begin < end and (block := os.pread(file.fileno(), min(MIB, end - begin), begin)):
                            stream.sendall(block)
                            begin += len(block)
            finally:
                with self.counting:
                    self.receivers.remove(peer)

    def judge(self, request: bytes) -> tuple[int, int, int, int]:
        """Return (HTTP status, number of the file, first byte, end) for a REQUEST."""
        import hmac

        token = re.search(rb"\r\nauthorization: bearer (\w+)\r\n", request, re.I)
        if not (token and hmac.compare_digest(token[1], self.token.encode())):
            return 403, 0, 0, 0
        number = re.match(rb"GET /(\d{1,9}) ", request)
        span = re.search(rb"\r\nrange: bytes=(\d{1,18})-(\d{1,18})\r\n", request, re.I)
        if not number or int(number[1]) >= len(self.sizes):
            return 404, 0, 0, 0
        if not span or not int(span[1]) <= int(span[2]) < self.sizes[int(number[1])]:
            return 416, 0, 0, 0
        return 206, int(number[1]), int(span[1]), int(span[2]) + 1


def end_predecessor(address: str, port: str) -> None:
    """End the program that serves at this address for an earlier run, whose client may have lost its network."""
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        number = int(path.split("/")[2])
        with contextlib.suppress(OSError), open(path, "rb") as file:
            words = file.read().split(b"\0")
            ours = any(b"\nserve_files(" in word for word in words) and number != os.getpid()
            if ours and [address.encode(), port.encode(), b""] == words[-3:]:
                os.kill(number, signal.SIGKILL)


def serve_files(arguments: list[str]) -> None:
    """Run on a node: serve complete files of a folder at its private address, until stdin ends or time is up.

    The first line of stdin is a JSON object: token, seconds, and the files as Wanted.
    """
    import resource

    folder, address, port = arguments
    job = json.loads(sys.stdin.readline())
    wanted = [Wanted(**one) for one in job["wanted"]]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    fetcher, paths = Fetcher(folder), []
    record = fetcher.load("record.json") or {}
    for one in wanted:
        if not fetcher.is_here(one, record):
            sys.exit(f"{one.path} is not complete here")
        below, name = fetcher.open_target(one)  # opened now: what may stand there later is not served
        paths.append(f"/proc/self/fd/{os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=below)}")
        os.close(below)
    server = FileServer(job["token"], [one.size for one in wanted], paths)
    end_predecessor(address, port)
    for pause in (0.01, 0.1, 1, 0):  # its end may take a moment
        try:
            listener = socket.create_server((address, int(port)), backlog=64)
            break
        except OSError as error:
            if not pause:
                sys.exit(f"port {port} can't be had: {error.strerror}")
            time.sleep(pause)

    def accept() -> None:
        while True:
            stream, (peer, _) = listener.accept()
            threading.Thread(target=server.answer, args=(stream, peer), daemon=True).start()

    threading.Timer(job["seconds"], os._exit, [0]).start()
    threading.Thread(target=accept, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


@dataclass(eq=False)
class Source:
    """Who has the files: a node, whose program starts when the first receiver comes, or this machine."""

    remote: Remote | None = None
    folder: str = ""
    starting: threading.Lock = field(default_factory=threading.Lock)  # held while the node's program starts
    channel: paramiko.Channel | None = None
    session: contextlib.ExitStack | None = None  # its end closes the channel, and ends the program
    receivers: int = 0
    failures: int = 0

    @property
    def is_free(self) -> bool:
        """Tell whether one more node may fetch from here; this machine's uplink is scarce."""
        if not self.remote:
            return not self.receivers
        return self.receivers < RECEIVERS and self.failures < PEERS_TRIED and self.remote.transport.is_active()


class Spread:
    """Brings the same files to many nodes: once from here, and on from node to node.

    A node serves two others at once, so that the nodes that have the files triple from round to round.
    Nothing runs beside the nodes' own steps: a step waits for its source, fetches, and is a source itself.
    """

    def __init__(self, wanted: Sequence[Wanted], paths: Sequence[Path], nodes: int) -> None:
        import secrets

        self.wanted, self.paths = wanted, paths
        self.token = secrets.token_hex(16)
        self.changed = threading.Condition()
        self.here = Source()
        self.sources = [self.here]
        self.waiting: list[int] = []  # the bytes that waiting nodes lack
        self.unheard, self.until = nodes, 0.0  # nodes that have not said what they have, and how long that counts

    def hear(self) -> None:
        """Note that one more node has said what it has."""
        with self.changed:
            self.until = self.until or time.monotonic() + SPREAD_PATIENCE
            self.unheard -= 1
            self.changed.notify()

    def choose(self, tried: Sequence[Source], lacking: int = 0) -> Source | None:
        """Return the source for a node that has TRIED some in vain; None: wait. The caller holds the lock."""
        peers = [source for source in self.sources if source.remote and source.is_free and source not in tried]
        if len(tried) >= PEERS_TRIED:
            peers = []
        elif not peers:  # from here only where nobody has it, or will have it soon; who lacks least comes first
            all_heard = self.unheard <= 0 or time.monotonic() > self.until
            fetching = any(source.receivers for source in self.sources)
            if not all_heard or fetching or lacking > min(self.waiting, default=lacking):
                return None
        source = min(peers, key=lambda peer: peer.receivers, default=self.here)
        if not source.is_free:
            return None
        source.receivers += 1
        return source

    def take(self, tried: Sequence[Source], lacking: int) -> Source:
        """Wait for a source."""
        with self.changed:
            self.waiting.append(lacking)
            while not (source := self.choose(tried, lacking)):
                self.changed.wait(1)  # whoever was woken may have tried this source
            self.waiting.remove(lacking)
        return source

    def give_back(self, source: Source, failed: bool = False) -> None:
        """Let the next node have a SOURCE; one that failed twice is none any more."""
        with self.changed:
            source.receivers -= 1
            source.failures += failed
            self.changed.notify()

    @contextlib.contextmanager
    def address(self, source: Source, remote: Remote) -> Iterator[str]:
        """Yield the address at which REMOTE reaches a SOURCE: a node's private one, or a port that leads here."""
        if source.remote:
            with source.starting:
                if not source.channel or source.channel.exit_status_ready():
                    try:
                        self.begin(source, source.remote)
                    except SilentNode as error:  # the source's silence is not the receiver's
                        raise NodeError(f"{source.remote.node.name} {error}") from error
            yield f"http://{source.remote.node.private_ip}:{PASS_ON_PORT}"
            return
        server = FileServer(self.token, [one.size for one in self.wanted], self.paths)

        def accept(channel: paramiko.Channel, *_: object) -> None:
            threading.Thread(target=server.answer, args=(channel, ""), daemon=True).start()

        try:
            with remote.awaiting_reply():
                port = remote.transport.request_port_forward("127.0.0.1", 0, accept)
        except connection_errors() as error:
            raise NodeError(f"its sshd does not forward a port to this machine: {error}") from error
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(*connection_errors()), remote.awaiting_reply():
                remote.transport.cancel_port_forward("127.0.0.1", port)

    def begin(self, source: Source, remote: Remote) -> None:
        """Start a SOURCE's program, which serves the files."""
        job = {"token": self.token, "seconds": SERVE_SECONDS, "wanted": [one._asdict() for one in self.wanted]}
        line = python_command(serve_files, source.folder, remote.node.private_ip, str(PASS_ON_PORT))
        with contextlib.ExitStack() as stack:
            channel = stack.enter_context(remote.session(line))
            channel.sendall(json.dumps(job).encode() + b"\n")
            if (answer := channel.recv(4096)) != b"ready\n":
                raise NodeError(f"does not serve files: {answer.decode('utf-8', 'replace').strip()[-200:]}")
            source.channel, source.session = channel, stack.pop_all()

    def bring(self, delivery: Delivery) -> Fetched:
        """Bring the files to a node, as far as it lacks them."""
        remote = delivery.remote
        try:
            done = delivery.fetch(self.wanted)
        finally:
            self.hear()
        tried: list[Source] = []
        while done.missing:
            source, failed, channel = self.take(tried, done.lacking), False, None
            try:
                with self.address(source, remote) as url:
                    channel = source.channel
                    headers = {"Authorization": f"Bearer {self.token}"}
                    wanted = [
                        one._replace(url=f"{url}/{number}", headers=headers) for number, one in enumerate(self.wanted)
                    ]
                    patience = (PEER_TRIES, PEER_TIMEOUT) if source.remote else ()
                    done = delivery.fetch(wanted, *patience)
            except NodeError as error:
                own_fault = delivery.status == OWN_FAULT or isinstance(error, SilentNode)
                if own_fault or not source.remote or not remote.transport.is_active():
                    raise
                failed = not (channel and channel.exit_status_ready() and channel.recv_exit_status() == 0)  # 0: time up
                tried += [source] if failed else []
            finally:
                self.give_back(source, failed)
        with self.changed:
            self.sources.append(Source(remote, delivery.folder))
            self.changed.notify(RECEIVERS)
        return done


# --- Command line ------------------------------------------------------------
# The one error boundary, what a run holds, and what the commands share.

CONFIG_VARIABLE = "MITSUBA_CLUSTER_CONFIG"


def warn_of_secrets(path: Path, settings: Settings) -> None:
    """Keep git's hands off files with secrets, and say who else could read them."""
    if settings.AWS_SECRET_ACCESS_KEY:
        warn(f"{path.name} has a secret key in it; better: aws configure, or aws sso login")
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            warn(f"other users of this machine can read it: chmod 600 {path}")
    s3cfg = settings.folder / ".s3cfg"
    with_key = s3cfg.exists() and re.search(r"^\s*secret_key\s*=\s*\S", s3cfg.read_text("utf-8", "replace"), re.M)
    for secret in [path] * bool(settings.AWS_SECRET_ACCESS_KEY) + [s3cfg] * bool(with_key):
        if why := hide_from_git(secret):
            warn(f"git may pick up the secrets in {secret} ({why})")


def fingerprint(public: str) -> str:
    """Return the SHA256:… of a public key, as ssh-keygen -l does."""
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


class App:
    """What one run of the program holds: settings, clients, connections; each made when it is needed."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.left = ""  # what Ctrl-C leaves behind, for the one line that says so
        self.key_pairs: dict[Client, bool] = {}  # whether KEYPAIR_NAME is the user's key there

    @functools.cached_property
    def settings(self) -> Settings:
        if not self.config.exists() and self.config == default_config() != HERE / "config.py":
            offer_config(self.config)
        settings = load_settings(self.config)
        warn_of_secrets(self.config, settings)
        return settings

    @functools.cached_property
    def ec2(self) -> Client:
        return open_client(self.settings, "ec2")

    @functools.cached_property
    def identity(self) -> paramiko.PKey:
        """The user's SSH key; asks for its passphrase where it has one."""
        self.known_identity = found = load_identity(self.settings.key_file)
        return found

    @functools.cached_property
    def known_identity(self) -> paramiko.PKey | None:
        """The user's SSH key, or None where it can't be had without asking for a passphrase."""
        try:
            return load_identity(self.settings.key_file, may_ask=False)
        except ClusterError:
            return None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the user's SSH key, of a locked one too; "" where there is none."""
        known = self.known_identity
        return known.fingerprint if known else read_fingerprint(self.settings.key_file)

    @property
    def key_problem(self) -> str:
        """Why the key file does not tell which nodes are the user's; "" where it does."""
        if not self.fingerprint:
            try:
                load_identity(self.settings.key_file, may_ask=False)
            except ClusterError as error:
                return error.message
        return ""

    @functools.cached_property
    def rule_owner(self) -> str:
        """What marks a rule as this machine's; EC2 allows a few characters only."""
        import getpass

        who = re.sub(r"[^A-Za-z0-9._-]", "_", f"{getpass.getuser()}@{socket.gethostname()}")
        return f"mitsuba-cluster {self.fingerprint} {who}"[:255]

    @functools.cached_property
    def pool(self) -> NodePool:
        return NodePool(self.settings, self.identity)

    def explain(self, error: Exception) -> str:
        """Say in one line what a botocore error means, and what it leaves running."""
        return f"{explain(error).rstrip('.')}. {self.left}" if self.left else explain(error)

    def where(self, group: str) -> str:
        """Return "group 'default' (us-east-1)"."""
        return f"group {group!r} ({self.settings.AWS_REGION})"

    def awaits_address(self, node: Node) -> bool:
        """Tell whether EC2 has yet to tell NODE's public address, seconds after the private one."""
        boots = (datetime.now(timezone.utc) - node.launched).total_seconds() < BOOT_LIMIT
        return boots and not node.public_ip and not self.settings.PRIVATE_NODES

    def signed(self, nodes: Iterable[Node]) -> list[Node]:
        """Return those of NODES that were launched with the user's key, as far as no passphrase is asked for."""
        key = self.known_identity
        return [node for node in nodes if key and is_ours(node, key)]

    def has_key_pair(self, ec2: Client) -> bool:
        """Tell whether EC2's key pair KEYPAIR_NAME is the user's key, as far as that can be looked up."""
        if ec2 not in self.key_pairs:
            self.key_pairs[ec2] = False
            with tolerate():
                asked = {"KeyNames": [self.settings.KEYPAIR_NAME], "IncludePublicKey": True}
                keys = [pair.get("PublicKey") for pair in ec2.describe_key_pairs(**asked)["KeyPairs"]]
                self.key_pairs[ec2] = any(fingerprint(key) == self.fingerprint for key in keys if key)
        return self.key_pairs[ec2]

    def launched(self, nodes: Sequence[Node], ec2: Client | None = None) -> list[Node]:
        """Return those of NODES that the user launched, by the signature in their tags, or, since others could spoil
        it, by their key pair's name: that stays, but whoever may launch can name it. Enough to end, not to connect.
        """
        key, name = self.known_identity, self.settings.KEYPAIR_NAME
        return [
            node
            for node in nodes
            if (key and is_ours(node, key)) or (node.key_name == name and self.has_key_pair(ec2 or self.ec2))
        ]

    def check_owner(self, group: str, nodes: Sequence[Node], others: bool = False, ec2: Client | None = None) -> None:
        """Refuse GROUP where all of its NODES were launched with another key, unless OTHERS' nodes are meant, too."""
        ec2 = ec2 or self.ec2
        living = [node for node in nodes if node.is_inside and node.state in ALIVE]
        if others or not living or self.launched(living, ec2):
            return
        owner = describe_owner(living, fetch_security_groups(ec2, group))
        where = f"group {group!r} ({ec2.meta.region_name})"
        why = (
            f"{where} is somebody else's: its nodes were launched with another key ({owner}). If it is yours, copy "
            f"that key's file to {self.settings.key_file}"
        )
        try:
            if self.identity and self.launched(living, ec2):  # that asked for its passphrase
                return
        except ClusterError as error:
            why = f"{error.message}. So nothing tells whether {where} is yours ({owner})"
        raise ClusterError(
            f"{why}. Else name a group of your own, e.g. {command('createNodes', 'TYPE', 'COUNT', 'my-group')}; or, "
            "with createNodes, terminate and terminateAll, do it all the same with --others"
        )

    def ours(self, nodes: Sequence[Node]) -> list[Node]:
        """Return those of NODES that were launched with the user's key; name the others."""
        others: dict[str, list[str]] = {}
        for node in nodes:
            if not is_ours(node, self.identity):
                others.setdefault(not_ours(node), []).append(node.id)
        for reason, names in others.items():
            note(f"Left out: {', '.join(names)}: {reason}")
        return [node for node in nodes if is_ours(node, self.identity)]

    def running_groups(self, nodes: Sequence[Node], ec2: Client | None = None) -> dict[str, str]:
        """Return group -> "2 nodes, $1.05/h" of the user's that run, of NODES; everybody's without a key to tell."""
        mine = nodes if self.key_problem else self.launched(nodes, ec2)
        running = [node for node in mine if node.state in ("pending", "running") and node.is_inside]
        found = {}
        for name in sorted({node.group for node in running}):
            same = [node for node in running if node.group == name]
            found[name] = ", ".join(filter(None, [format_count(len(same), "node"), format_cost(same)]))
        return found

    def elsewhere(self, group: str | None) -> str:
        """Return what may be meant where nothing runs in GROUP: another group, swapped arguments, another region."""
        groups = self.running_groups(fetch_nodes(self.ec2))
        if not groups:
            return f"; {command('status', '--all-regions')} shows every region"
        words, other = sys.argv[1:], next((name for name in groups if name != group and name in sys.argv[1:]), "")
        places = {group: other, other: group or ""}
        swapped = shlex.join(places.get(word, word) for word in words)
        advice = f"; did you mean {Call.program} {swapped}?" if other else did_you_mean(group or "", groups) or "."
        return f"{advice} Running here: {', '.join(f'{name} ({about})' for name, about in groups.items())}"

    def sort_rules(self, group: SecurityGroup, cidr: str) -> tuple[list[Rule], list[Rule], list[Rule]]:
        """Return what GROUP has to let in and does not, this machine's rules for other addresses, and all others."""
        settings = self.settings
        ports = [settings.SSH_PORT, SERVER_PORT] if settings.PUBLIC_SERVER_PORT else [settings.SSH_PORT]
        wanted = [Rule("tcp", port, port, "IpRanges", cidr, self.rule_owner) for port in ports]
        wanted += [Rule("tcp", port, port, "UserIdGroupPairs", group.id) for port in (SERVER_PORT, PASS_ON_PORT)]
        others = [rule for rule in group.rules if rule not in wanted]
        older = Rule("-1", None, None, "UserIdGroupPairs", group.id)  # what older versions made for the nodes
        stale = [rule for rule in others if rule == older or rule.owner == self.rule_owner]
        return [rule for rule in wanted if rule not in group.rules], stale, [r for r in others if r not in stale]

    def warn_of_rules(self, groups: Sequence[SecurityGroup], cidr: str) -> None:
        """Name what security GROUPS let in beside this machine, at CIDR, and their own nodes."""
        for group in groups:
            if others := self.sort_rules(group, cidr)[2]:
                warn(describe_rules(self.ec2, group, others))

    def allow_access(self, groups: Sequence[SecurityGroup], cidr: str) -> None:
        """Let this machine, at CIDR ("": unknown), connect to the nodes in security GROUPS; then drop its old rules."""
        for group in groups if cidr else ():
            missing, stale, _ = self.sort_rules(group, cidr)
            for rule in missing:
                permission = rule.permission
                if rule.owner:
                    permission[rule.kind][0]["Description"] = rule.owner
                asked = {"GroupId": group.id, "IpPermissions": [permission]}
                with tolerate("InvalidPermission.Duplicate"):  # another machine was quicker
                    persist(functools.partial(self.ec2.authorize_security_group_ingress, **asked))
            for rule in stale:
                with tolerate("InvalidPermission.NotFound"):
                    self.ec2.revoke_security_group_ingress(GroupId=group.id, IpPermissions=[rule.permission])
            if any(rule.owner and rule.source != cidr for rule in stale):
                note(f"This machine's address has changed: the nodes' ports are open to {cidr} now")

    def open_group(self, group: str) -> list[Node]:
        """Return GROUP's running nodes that the user launched, to which this machine may connect from now on.

        The look-ups are made side by side; a set-up cluster can do without that of this machine's address.
        """
        ec2, where = self.ec2, self.where(group)
        self.left = f"The nodes of {where} keep running and cost money; {command('terminateAll', group)} ends them."
        nodes, groups, cidr, _ = side_by_side(
            lambda: fetch_nodes(ec2, group),
            lambda: fetch_security_groups(ec2, group),
            lambda: try_client_cidr(self.settings),
            lambda: importlib.import_module("paramiko"),  # a sixth of a second that AWS's answers take anyway
        )
        self.check_owner(group, nodes)
        running = [node for node in nodes if node.state == "running"]
        ready = self.ours([node for node in running if not self.awaits_address(node)])
        waiting = [node.id for node in nodes if node.state == "pending"]
        waiting += [node.id for node in running if self.awaits_address(node)]
        if waiting:
            pending = f"{format_count(len(waiting), 'node')} still pending (no public address yet), left out"
            note(f"{pending}: {', '.join(waiting)}")
        if not ready and waiting:
            raise ClusterError(f"no node of {where} can be reached yet; run this again in a minute")
        if not ready:
            again = f"{command('createNodes', 'TYPE', 'COUNT', group)} makes some"
            raise ClusterError(f"no running nodes in {where}; {again}{self.elsewhere(group)}")
        self.allow_access(groups, cidr)
        self.warn_of_rules(groups, cidr)
        return ready

    def in_all_regions(self, call: Callable[[Client], T], problems: list[str]) -> dict[str, T]:
        """CALL for every region, side by side, config.py's first; add to PROBLEMS those that refuse, in words."""
        from botocore.exceptions import BotoCoreError, ClientError

        home, found = self.settings.AWS_REGION, {}

        def ask(region: str) -> None:
            try:
                found[region] = call(self.ec2 if region == home else open_client(self.settings, "ec2", region))
            except (ClusterError, BotoCoreError, ClientError) as error:
                problems.append(f"{region}: {explain(error)}")

        side_by_side(*(functools.partial(ask, region) for region in fetch_regions(self.settings)))
        return {region: found[region] for region in sorted(found, key=lambda name: (name != home, name))}

    def report(self, outcomes: Sequence[Outcome[Any]], what: str) -> None:
        """End with a summary on stderr, and with exit code 1 if any node failed."""
        failed = [outcome for outcome in outcomes if not outcome.ok]
        if failed:
            good = f"{len(outcomes) - len(failed)} of {format_count(len(outcomes), 'node')}"
            raise ClusterError(f"{what} on {good}; failed: {', '.join(outcome.node.name for outcome in failed)}")
        note(f"{what} on {format_count(len(outcomes), 'node')}")


def on_terminate(*_: object) -> None:
    """Turn SIGTERM into an exception."""
    raise Terminated


@contextlib.contextmanager
def plain_usage() -> Iterator[None]:
    """Show click's errors of usage as our own, with what else could be meant; exit code 2."""
    try:
        yield
    except click.UsageError as error:
        ctx, text = error.ctx, error.format_message().rstrip(".")
        if unknown := re.match(r"No such command ['\"]([^'\"]*)['\"]", text):
            text = unknown[0] + did_you_mean(unknown[1], cli.commands)
        elif ctx and ctx.info_name == "runCommand" and not isinstance(error, click.MissingParameter):
            text += f"; quote the command, or put -- before it: {command('runCommand', '--', 'ls', '-la', '/mnt')}"
        elif ctx and ctx.info_name == "render" and isinstance(error, click.NoSuchOption):
            text += f"; Mitsuba's own options come after --: {command('render', 'SCENE', '--', '-p', '0')}"
        elif ctx and ctx.info_name == "render" and "does not exist" in text:
            text += "; a group's name comes after --group"
        if ctx:
            note(f"{ctx.get_usage()}\nTry {ctx.command_path} --help\n")
        raise ClusterError(text, 2) from None


DAY = "createNodes install start up status syncData render terminateAll".split()


class Tool(click.Group):
    """The boundary: known errors become one line and an exit code; the rest is a bug's traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Begin with the user's day, not with A."""
        return list(dict.fromkeys([*DAY, *self.commands]))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take --config from anywhere before a "--"."""
        end = args.index("--") if "--" in args else len(args)
        given, others = list[str](), list[str]()
        words = iter(args[:end])
        for word in words:
            (given if word.startswith("--config=") or word == "--config" else others).append(word)
            if word == "--config" and (value := next(words, None)) is not None:
                given.append(value)
        bare = given[-1:] == ["--config"]  # nothing after it: click says so, unless another word follows
        with plain_usage():
            return super().parse_args(ctx, given if bare else [*given, *others, *args[end:]])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Know createNodes by its old name, too; call the program in each command's example as the user does."""
        found = super().get_command(ctx, "createNodes" if cmd_name == "addNodes" else cmd_name)
        if found and found.epilog:
            found.epilog = found.epilog.replace("Example: ./cluster.py", f"Example: {Call.program}")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command inside the boundary."""
        signal.signal(signal.SIGTERM, on_terminate)
        app = ctx.obj = App(ctx.params["config"] or default_config())
        try:
            with plain_usage():
                return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort, Terminated) as error:
            note(f"Interrupted. {app.left}".strip())
            os._exit(143 if isinstance(error, Terminated) else 130)  # at once: threads may still wait for nodes
        except ModuleNotFoundError as error:
            raise ClusterError(MISSING.format(name=error.name)) from error
        except BrokenPipeError:
            os._exit(1)  # the reader of our output has gone
        except OSError as error:  # a file that can't be read, a disk that is full
            raise ClusterError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
        except Exception as error:
            if not type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
                raise
            raise ClusterError(app.explain(error)) from error
        finally:
            draw()


def log_folder(group: str) -> Path:
    """Return (and make) the folder for the logs of GROUP's nodes."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    folder = Path(base) / "mitsuba-cluster" / group
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def complete(ctx: click.Context, incomplete: str, ask: Callable[[Client], Iterable[str]]) -> list[Any]:
    """Return EC2's answer to a Tab, or nothing where it does not come within a second or two."""
    import io

    from click.shell_completion import CompletionItem

    # Whatever goes wrong: a Tab shows no errors and no warnings.
    with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
        settings = load_settings(ctx.find_root().params.get("config") or default_config())
        ec2 = open_client(settings, "ec2", connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1})
        return [CompletionItem(name) for name in sorted(set(ask(ec2))) if name.startswith(incomplete)]
    return []


class OwnWords(click.Command):
    """A command whose words after the first -- are not its own: it gets them as WORDS."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split before click parses, which swallows the --."""
        end = args.index("--") if "--" in args else len(args)
        ctx.params["words"] = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- WORDS…]"]


class GroupName(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A cluster's name."""

    name = "group"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the name: it becomes a tag, a folder and a security group."""
        if not GROUP_NAME.fullmatch(value):
            raise click.UsageError(f"{value!r} is no group name: letters, digits, '.', '_' and '-', at most 63", ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Complete the groups that exist."""
        return complete(ctx, incomplete, lambda ec2: [one.group for one in fetch_security_groups(ec2)])


def complete_nodes(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[Any]:
    """Complete short names, and "head"."""
    return complete(ctx, incomplete, lambda ec2: ["head", *(n.short for n in fetch_nodes(ec2) if n.state in ALIVE)])


class Number(click.ParamType):  # type: ignore[type-arg]
    """A number from LOW (ABOVE it) to HIGH, refused in words that name the argument."""

    name = "number"

    def __init__(self, low: float, high: float, whole: bool = False, above: bool = False) -> None:
        self.low, self.high, self.whole, self.above = low, high, whole, above

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        with contextlib.suppress(ValueError):
            number = (int if self.whole else float)(value)
            if self.low < number <= self.high or (number == self.low and not self.above):
                return number
        title = param.opts[0] if isinstance(param, click.Option) else param.name.upper() if param and param.name else ""
        kind = "a whole number" if self.whole else "a number"
        span = f"above {self.low:g}, at most" if self.above else f"from {self.low:g} to"
        first = (ctx.params.get("instance_type") if ctx else None) or ""
        swapped = ctx and first.isdigit() and re.fullmatch(r"[a-z][\w-]*\.[\w-]+", str(value))
        advice = f"; did you mean {command(ctx.info_name or '', value, first)}?" if ctx and swapped else ""
        if ctx and ctx.info_name == "addSpotNodes" and self.whole and re.fullmatch(r"\d*\.\d+", str(value)):
            advice = "; COUNT stands before MAXPRICE"
        raise click.UsageError(f"{title} must be {kind} {span} {self.high:g}, not {value!r}{advice}", ctx)


group_argument = click.argument("group", type=GroupName(), default="default", metavar="[GROUP]")


def default_config() -> Path:
    """Return the settings file if none is named: beside a clone's cluster.py; of an installed program the user's own.

    Never one of the working folder, which may be anybody's: the file is run as code.
    """
    if __name__ == "__main__":
        return HERE / "config.py"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mitsuba-cluster" / "config.py"


def offer_config(path: Path) -> None:
    """Where an installed program has no settings yet, offer to write the commented template to PATH."""
    from importlib import metadata

    if not sys.stdin.isatty():
        ways = "run this at a terminal to have one written there, or name one: --config FILE"
        raise ClusterError(f"there is no settings file {path}; {ways}")
    note(f"There is no settings file {path}")
    template = next(one for one in metadata.files("mitsuba-cluster") or [] if one.name == "config.py")
    click.confirm("Shall the template, with a comment for each setting, be written there?", abort=True, err=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Path(template.locate()).read_text("utf-8"), "utf-8")
    raise ClusterError(f"{path} is written: look it over, then run this again")


@click.group(cls=Tool, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", type=click.Path(path_type=Path), envvar=CONFIG_VARIABLE, help="Another settings file than config.py."
)
@click.version_option(VERSION, message="mitsuba-cluster %(version)s")
@click.pass_context
def cli(ctx: click.Context, config: Path | None) -> None:
    """Create a Mitsuba rendering cluster on Amazon EC2.

    \b
    The usual order:
      ./cluster.py createNodes c1.xlarge 8
      ./cluster.py install
      ./cluster.py start              the last line names the head node:
                                      give it to Mitsuba, port 7554
      ./cluster.py status
      ./cluster.py terminateAll       don't forget: running nodes cost money
    The first three in one: ./cluster.py up c1.xlarge 8

    GROUP names one of several independent clusters; it is "default" if you leave it out.
    """
    given = ctx.get_parameter_source("config") is click.core.ParameterSource.COMMANDLINE
    Call.options = ("--config", shlex.quote(str(config))) if given else ()
    path = ctx.obj.config
    Call.settings = path.name if path.parent == Path.cwd() else str(path)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


others_option = click.option("--others", is_flag=True, help="Also where the nodes were launched with another key.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
type_argument = click.argument("instance_type", metavar="TYPE")


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """Return NODES as they are shown: the head first, then by age."""
    return sorted(nodes, key=lambda node: (node.role != "head", node.age))


def find_node(app: App, name: str) -> Node:
    """Return our node that NAME means: "head", a short name, an address, or how its name or id begins.

    ClusterError where there is none, or more than one.
    """
    nodes = [node for node in fetch_nodes(app.ec2) if name and node.state in ALIVE]
    if name == "head":
        heads = [node for node in nodes if node.role == "head" and node.state == "running"]
        found = app.signed(heads) or heads
        found = [node for node in found if node.group == "default"] or found
    else:
        exact = [n for n in nodes if name in (n.id, n.public_name, n.public_ip, n.private_ip, n.short)]
        found = exact or [node for node in nodes if (node.id.startswith(name) or node.name.startswith(name))]
    if len(found) > 1:
        which = [f"{node.short} ({node.group}, {node.id})" for node in in_order(found)]
        more = f" or {len(which) - 3} more" if len(which) > 3 else ""
        raise ClusterError(f"{name!r} may be {', '.join(which[:3])}{more}: name one of them by its id")
    if not found:
        is_group = "that is a group; " if any(node.group == name for node in nodes) else ""
        raise ClusterError(
            f"no node {name!r} of this tool in {app.settings.AWS_REGION}; {is_group}see {command('status')}"
            if name != "head"
            else f"no head node in {app.settings.AWS_REGION}; {command('start')} makes one"
        )
    return found[0]


def find_head(app: App, group: str) -> Node:
    """Return GROUP's head node, launched with the user's key."""
    for node in fetch_nodes(app.ec2, group):
        if node.role == "head" and node.state == "running" and is_ours(node, app.identity):
            return node
    raise ClusterError(f"{app.where(group)} has no head node; {command('start', group)} makes one")


def format_nodes(nodes: Sequence[Node], wide: bool = False, more: Sequence[Sequence[str]] = ()) -> str:
    """Return the table of NODES, MORE columns (their titles first) after it; not WIDE: as the terminal is."""
    now = datetime.now(timezone.utc)
    rows = [["NODE", "NAME", "TYPE", "STATE", "UP", "ROLE", "MARKET", "PRIVATE", "$/H", "$", "ENDS IN", "ID"]]
    for node in nodes:
        cost = spent(node, now)
        left = node.launched + timedelta(hours=node.max_hours) - now if node.max_hours else None
        rows.append(
            [
                node.short,
                paint(node.name, bold=True) if node.role == "head" else node.name,
                node.type,
                paint(node.state, fg="green" if node.state == "running" else "yellow"),
                "" if node.state == "terminated" else format_duration((now - node.launched).total_seconds()),
                node.role or "",
                node.market,
                node.private_ip,
                format_money(node.price)[1:] if node.price is not None else "?",
                format_money(cost)[1:] if cost is not None else "?",
                format_duration(left.total_seconds()) if left else "",
                node.id,
            ]
        )
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    rows = [[*(row[i] for i in filled), *(column[at] for column in more)] for at, row in enumerate(rows)]
    market = [] if any(node.market == "spot" for node in nodes) else ["MARKET"]
    spare = ["PRIVATE", "ID", *market, "…", "$/H", "TYPE", "MARKET", "NAME", "ENDS IN"]
    return format_table(rows, spare, 10_000 if wide else None)


# --- Guard -------------------------------------------------------------------
# mtssrv's handshake, and the program that systemd runs on every node from its first boot: it keeps the head serving,
# links nodes that come back, and ends idle nodes (node_program sends its functions). All times are monotonic.

HELLO = b"\x1b\xcd"
REFUSAL = b"\x00\x0d"
QUIT = b"\x00\x0c"
ANSWER_BYTES = 256  # of what a server answers, at most: hello, its cores, its node's name
GUARD_TIMEOUT = 2.0  # seconds for one handshake
WATCH_PAUSE = 1.0  # seconds between two rounds of handshakes, and as many more as there are
WATCH_RATE = 200  # such numbers of servers: a thousand handshakes at once would take the head's spare cores
WATCH_SILENCE = 20.0  # seconds after which a server counts as lost, if it has
WATCH_MISSED = 3  # times not answered in a row: with thousands of servers a round takes that long
HANDSHAKE_BYTES = 32  # that a server gets by a handshake, at most; a client sends more
CLIENT_LOOK = 10  # seconds between two looks at the head's connections; one that both see is a client
JOIN_ANSWERS = 30  # seconds for which a node that comes back has answered before it is linked; doubles if it goes again
JOIN_QUIET = 60  # seconds without any client before that restart of the head
USE_LOOK = 60  # seconds over which it is judged whether a node is in use
BUSY_CORES = 0.05  # of one core, that mtssrv computes: less is its handshakes
LOGIN_BYTES = 100_000  # that an SSH connection moves in that time
LINK_BYTES = 1000  # and as many more for each worker: `systemLoad --watch` reads the list of them every few seconds
CLIENT_SILENCE = 240 * 60  # seconds: a sleeping laptop leaves its connection behind
RELAY = "relay-"  # what the name of a sub-head's server begins with: it links the workers of its branch
RELAY_LIMIT = 15  # seconds that a head waits for a sub-head that restarts; below systemd's TimeoutStartSec
RESTART_LIMIT = 3  # and for its workers: one may be restarted in the same second
HEAD_ASKED = 3  # times, a look apart, before a worker takes its head for gone
MOST_CORES = 32767  # that a server can announce: its handshake has 16 bits, with a sign, for them

PLAN_PATH = "/etc/mitsuba-cluster/plan.json"  # what start wants: role, build, own, head; of a head and of a sub-head
# also the workers with their cores, a head's are all of the tree; and a head's branches: sub-head -> its workers
IDLE_PATH = "/etc/mitsuba-cluster/idle-minutes"
LINKED_PATH = "/run/mitsuba-cluster/linked"  # the workers with which a head or sub-head was started
MEMORY_PATH = "/run/mitsuba-cluster/memory.json"
STATE_PATH = "/run/mitsuba-cluster/state.json"  # what status shows: the seconds of idleness, its limit, the clients


class AnotherBuild(Exception):
    """The server is a Mitsuba of another version, or with other spectrum samples or precision."""


def handshake(
    open_stream: Callable[[float], contextlib.AbstractContextManager[Stream]], build: str, limit: float
) -> tuple[int, str]:
    """Greet an mtssrv as another of this BUILD, and quit; return (its cores, its node's name). LIMIT: seconds in all.

    AnotherBuild where it refuses. The end is an ordinary one, read to the last byte (but of a server that talks on and
    on): a reset that comes before the server has accepted ends it, and its head with it.
    """
    version, samples, double = build.split()
    deadline = time.monotonic() + limit
    with open_stream(limit) as stream:

        def read(size: int) -> bytes:
            stream.settimeout(max(0.001, deadline - time.monotonic()))
            return stream.recv(size)

        stream.settimeout(limit)
        stream.sendall(HELLO + version.encode() + b"\0" + bytes([int(samples), int(double)]))
        answer = b""
        while len(answer) < 5 or not answer.endswith(b"\0"):  # hello, two bytes of cores, the name and its end
            byte = read(1)
            answer += byte
            if not byte:
                raise EOFError("the server closed the connection")
            if answer == REFUSAL:
                raise AnotherBuild
            if (len(answer) == 2 and answer != HELLO) or len(answer) > ANSWER_BYTES:
                raise ValueError("what answers is not mtssrv")
        with contextlib.suppress(OSError):
            stream.sendall(QUIT)
            stream.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline and read(ANSWER_BYTES):
                pass
        return int.from_bytes(answer[2:4], "big", signed=True), answer[4:-1].decode("utf-8", "replace")


class Answer(NamedTuple):
    """What came of a handshake."""

    alive: bool
    problem: str = ""  # why the server can't be linked
    relays: bool = False  # it is a sub-head, with workers of its own
    refuses: bool = False  # nothing listens there, as while it restarts


def ask_address(address: str, build: str, most_cores: int) -> Answer:
    """Shake hands with the server at ADDRESS, which may have so many cores."""
    try:
        cores, name = handshake(
            lambda limit: socket.create_connection((address, SERVER_PORT), limit), build, GUARD_TIMEOUT
        )
    except AnotherBuild:
        return Answer(True, "is another build of Mitsuba than this node's")
    except (OSError, EOFError, ValueError) as error:
        return Answer(False, f"does not answer: {error}", refuses=isinstance(error, ConnectionRefusedError))
    wrong = f"announces {cores} cores, and its node has {most_cores}" if not 0 < cores <= most_cores else ""
    return Answer(True, wrong, relays=name.startswith(RELAY) and not wrong)


def ask_all(addresses: dict[str, int], build: str) -> dict[str, Answer]:
    """Ask many servers, WATCH_RATE at once; ADDRESSES have the most cores of each."""
    with concurrent.futures.ThreadPoolExecutor(max(1, min(len(addresses), WATCH_RATE))) as pool:
        answers = pool.map(ask_address, addresses, [build] * len(addresses), addresses.values())
        return dict(zip(addresses, answers))


def read_file(path: str) -> str:
    """Return a plain file's text; "" where there is none, nor follow a link, wait for a FIFO, or read without end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, errors="replace") as file:
            return file.read(MIB) if stat.S_ISREG(os.fstat(handle).st_mode) else ""
    except OSError:
        return ""


def write_file(path: str, text: str) -> None:
    """Write a file that everybody may read, whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def pick_workers(plan: dict[str, Any], answers: dict[str, Answer]) -> list[str]:
    """Return whom to link of those that gave ANSWERS: each that can be, but for the workers of sub-heads that serve."""
    below = {one for head, workers in plan["branches"].items() if answers[head].relays for one in workers}
    return [one for one in plan["workers"] if not answers[one].problem and one not in below]


def ask_patiently(addresses: dict[str, int], build: str, limit: float) -> dict[str, Answer]:
    """Ask many servers, again for LIMIT seconds while some of them restart."""
    deadline = time.monotonic() + limit
    answers = ask_all(addresses, build)
    while any(one.refuses for one in answers.values()) and time.monotonic() < deadline:
        time.sleep(WATCH_PAUSE)
        answers = ask_all(addresses, build)
    return answers


def filter_workers(plan: dict[str, Any]) -> None:
    """Before each start of a head or sub-head: note those of its workers that answer, and name the others."""
    heads = {one: plan["workers"][one] for one in plan["branches"]}
    ask_patiently(heads, plan["build"], RELAY_LIMIT)
    answers = ask_patiently(plan["workers"], plan["build"], RESTART_LIMIT)
    for one, answer in answers.items():
        if answer.problem:
            print(f"{one} is left out: it {answer.problem}")
    write_file(LINKED_PATH, "".join(f"{one}\n" for one in pick_workers(plan, answers)))


class Links(NamedTuple):
    """What the head's guard knows of the servers."""

    linked: frozenset[str] = frozenset()
    missed: dict[str, list[float]] = {}  # noqa: RUF012 - nobody changes it; when each that must answer did not
    answering: dict[str, float] = {}  # noqa: RUF012 - since when each worker that is not linked does
    losses: dict[str, int] = {}  # noqa: RUF012 - how often a worker was linked and fell out
    named: frozenset[str] = frozenset()  # those that answer and can't be linked: named once


def renew_links(links: Links, now: float, own: str, linked: frozenset[str], answers: dict[str, Answer]) -> Links:
    """Carry LINKS on with one more round of ANSWERS."""
    return Links(
        linked,
        {one: [*links.missed.get(one, []), now] for one in (own, *linked) if not answers[one].alive},
        {one: links.answering.get(one, now) for one in answers.keys() - linked - {own} if not answers[one].problem},
        links.losses | {one: links.losses.get(one, 0) + 1 for one in links.linked - linked},
        frozenset(one for one, answer in answers.items() if answer.alive and answer.problem),
    )


def find_silent(links: Links, now: float) -> list[str]:
    """Return the servers that have been silent for too long: nothing else ends a render that one of them stalls."""
    missed = {one: times for one, times in links.missed.items() if len(times) >= WATCH_MISSED}
    return sorted(one for one, times in missed.items() if now - times[0] > WATCH_SILENCE)


def find_joining(links: Links, now: float, quiet: float) -> list[str]:
    """Return the workers to link now; QUIET: since when nobody has connected to the head."""
    if now - quiet < JOIN_QUIET:
        return []
    patience = {one: JOIN_ANSWERS * 2 ** links.losses.get(one, 0) for one in links.answering}
    return sorted(one for one, since in links.answering.items() if now - since >= patience[one])


def watch_ends() -> subprocess.Popen[bytes]:
    """Begin to note the connections to mtssrv that end: a short render comes and goes between two looks."""
    import subprocess

    words = ["stdbuf", "--output=L", "ss", "-HtniOE", f"sport = :{SERVER_PORT}"]
    ends = subprocess.Popen(words, stdout=subprocess.PIPE, bufsize=0)
    if ends.stdout:
        os.set_blocking(ends.stdout.fileno(), False)
    return ends


def has_left(ends: subprocess.Popen[bytes]) -> bool:
    """Tell whether a connection has ended, since this was asked last, that brought more than a handshake."""
    if not ends.stdout or ends.stdout.closed:
        return False
    text = ends.stdout.read()  # None: nothing new
    if text == b"":
        print(f"ss has ended ({ends.wait()}): short visits of clients are not noticed any more")
        ends.stdout.close()
    return any(int(count) > HANDSHAKE_BYTES for count in re.findall(rb"bytes_received:(\d+)", text or b""))


class Look(NamedTuple):
    """What one look at a node shows."""

    at: float
    computed: float  # seconds of a core that mtssrv.service has used
    left: bool  # of a head: a client has left since the look before
    servers: dict[str, float]  # of a head: peer -> seconds of silence, of the connections to mtssrv
    logins: dict[str, int]  # peer -> bytes moved, of those to sshd
    touched: dict[str, int]  # terminals and the mark: when each was last used


def read_connections(text: str) -> tuple[dict[str, float], dict[str, int]]:
    """Return mtssrv's connections (peer -> seconds of silence) and sshd's (peer -> bytes), from ss, which omits a 0."""
    servers, logins = {}, {}
    for line in text.splitlines():
        _, _, own, peer, *_ = line.split()
        found = {name: int(value) for name, value in re.findall(r"\b(\w+):(\d+)", line)}
        if own.endswith(f":{SERVER_PORT}"):
            servers[peer] = min(found.get("lastsnd", 0), found.get("lastrcv", 0)) / 1000
        elif '"sshd' in line:
            logins[peer] = found.get("bytes_acked", 0) + found.get("bytes_received", 0)
    return servers, logins


def is_below_sshd(process: str) -> bool:
    """Tell whether a process belongs to an SSH connection that still stands."""
    while process not in ("0", "1"):
        # "PID (NAME) STATE PARENT …", and NAME may hold anything
        name, _, rest = read_file(f"/proc/{process}/stat").partition("(")[2].rpartition(")")
        if name.startswith("sshd"):
            return True
        process = (rest.split() or ["", "0"])[1]
    return False


def is_held(path: str) -> bool:
    """Tell whether a command that somebody waits for holds PATH open."""
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == path and is_below_sshd(link.split("/")[2]):
                return True
    return False


def run_quietly(*words: str) -> str:
    """Run a program of the system's; return its output, "" where it fails or hangs."""
    import subprocess

    try:
        return subprocess.run(words, capture_output=True, timeout=30, check=False).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return ""


def take_look(ends: subprocess.Popen[bytes] | None) -> Look:
    """Look at this node; ENDS: of a head, see watch_ends. A command at work, which holds the mark, touches it so."""
    cpu = run_quietly("systemctl", "show", "-P", "CPUUsageNSec", "mtssrv.service").strip()
    servers, logins = read_connections(run_quietly("ss", "-HtinpO", "state", "established"))
    if is_held(MARK_PATH):
        os.utime(MARK_PATH)
    touched = {}
    for path in [MARK_PATH, *glob.glob("/dev/pts/[0-9]*")]:
        with contextlib.suppress(OSError):
            touched[path] = os.stat(path).st_atime_ns  # of a terminal: its input; its mtime is its output
    computed = int(cpu) / 1e9 if cpu.isdigit() else 0.0
    left = ends is not None and has_left(ends)
    return Look(time.monotonic(), computed, left, servers if ends else {}, logins, touched)


class Memory(NamedTuple):
    """What the guard keeps from look to look, and in /run over its own restarts."""

    at: float  # the last look
    base: Look  # against which use is judged
    used: float  # when the node was last used, and
    how: str  # by what
    quiet: float  # since when nobody has connected to mtssrv, as far as is known
    connections: dict[str, list[float]]  # to mtssrv: peer -> [when it was first seen, seconds of silence]


def find_clients(memory: Memory) -> dict[str, list[float]]:
    """Return the clients, peer -> seconds [connected, silent]: two looks have seen them, and a probe is short."""
    ages = {peer: [memory.at - since, silent] for peer, (since, silent) in memory.connections.items()}
    return {peer: age for peer, age in ages.items() if age[0] >= CLIENT_LOOK}


def find_use(base: Look, look: Look, silences: Iterable[float], workers: int) -> str:
    """Say by what a node was used between two looks, by clients with these SILENCES, too; "" if by nothing."""
    if look.computed - base.computed > BUSY_CORES * (look.at - base.at):
        return "mtssrv computed"
    if any(base.touched.get(path) != when for path, when in look.touched.items()):
        return "a terminal had input, or a command of cluster.py was at work"
    if any(look.at - silent > base.at for silent in silences):
        return "a client moved bytes"
    most = LOGIN_BYTES + LINK_BYTES * workers
    if any(count - base.logins.get(peer, 0) > most for peer, count in look.logins.items()):
        return "an SSH connection moved data"
    return ""


def remember(memory: Memory | None, look: Look, workers: int = 0) -> Memory:
    """Carry MEMORY on with one more LOOK."""
    if not memory:
        memory = Memory(look.at, look, look.at, "the node booted", look.at, {})
    seen = {peer: [memory.connections.get(peer, [look.at])[0], silent] for peer, silent in look.servers.items()}
    left = look.left or find_clients(memory).keys() - seen.keys()
    how = "a client left" if left else ""
    memory = memory._replace(at=look.at, quiet=look.at if seen or left else memory.quiet, connections=seen)
    if look.at - memory.base.at >= USE_LOOK:
        silences = [silent for _, silent in find_clients(memory).values()]
        how = find_use(memory.base, look, silences, workers) or how
        memory = memory._replace(base=look)
    return memory._replace(used=look.at, how=how) if how else memory


def is_idle(memory: Memory, limit: float) -> bool:
    """Tell whether a node has been unused for LIMIT seconds (0: there is no limit), or far longer under a client."""
    clients = find_clients(memory)
    patience = max(limit, CLIENT_SILENCE) if clients else limit
    arrived = clients.keys() != memory.connections.keys()  # somebody has, who may become a client
    return limit > 0 and memory.at - memory.used >= patience and not arrived


def restore_memory(text: str) -> Memory | None:
    """Return what an earlier guard of this boot knew; None where there is nothing of use."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        kept = json.loads(text)
        return Memory(**kept | {"base": Look(*kept["base"])})
    return None


def restart_head(why: str) -> None:
    """Restart the server of a head or sub-head; its filter then links all workers that answer."""
    print(f"restarts mtssrv {why}")
    run_quietly("systemctl", "restart", "mtssrv.service")


def keep_serving(plan: dict[str, Any], links: Links) -> Links:
    """Shake hands with all servers once, and restart the own one where that helps."""
    own, workers = plan["own"], plan["workers"]
    answers = ask_all({own: MOST_CORES} | workers, plan["build"])
    for one in workers:
        if answers[one].alive and answers[one].problem and one not in links.named:
            print(f"does not link {one}: it {answers[one].problem}")
    linked = frozenset(read_file(LINKED_PATH).split()) & workers.keys()
    # A sub-head links nobody anew: it does not know whether its head has a client, who would lose a render.
    wanted = {own, *linked, *(pick_workers(plan, answers) if plan["role"] == "head" else ())}
    seen = {one: answer for one, answer in answers.items() if one in wanted or answer.problem}
    links = renew_links(links, time.monotonic(), own, linked, seen)
    if not answers[own].alive and run_quietly("systemctl", "is-active", "mtssrv.service").strip() == "activating":
        return links._replace(missed={})  # its filter, which may wait for sub-heads, chooses anew whom to link
    if silent := find_silent(links, time.monotonic()):
        restart_head(f"since these are silent: {' '.join(silent)}")
        return links._replace(missed={})
    return links


def guard_node(arguments: list[str]) -> None:
    """Run as a program: `filter` before each start of a head's server, and without arguments for ever."""
    plan: dict[str, Any] = {}  # before the first start
    with contextlib.suppress(ValueError):
        plan = json.loads(read_file(PLAN_PATH))
    if arguments == ["filter"]:
        return filter_workers(plan)
    role, workers = plan.get("role", "node"), plan.get("workers", {})
    watches = role == "head" or workers  # a sub-head does, whose role is that of a worker
    limit = 60 * float(read_file(IDLE_PATH) or 0)
    links, refused = Links(), 0
    end = f"ends after {format_duration(limit)} without use" if limit else "never ends by itself"
    print(f"guards this {role}, which {end}")
    ends = watch_ends() if role == "head" else None
    with open(MARK_PATH, "a"):
        memory = remember(restore_memory(read_file(MEMORY_PATH)), take_look(ends))
    while True:
        if watches:
            links = keep_serving(plan, links)
        if not watches or time.monotonic() - memory.at >= CLIENT_LOOK:
            memory = remember(memory, take_look(ends), len(workers))
            if joining := find_joining(links, memory.at, memory.quiet):
                restart_head(f"to link {' '.join(joining)}")
                links = links._replace(missed={}, answering={})
            write_file(MEMORY_PATH, json.dumps(memory._asdict()))
            state = {"idle": memory.at - memory.used, "limit": limit, "clients": find_clients(memory)}
            write_file(STATE_PATH, json.dumps(state))
            if memory.at == memory.base.at:  # use is known up to now
                idle = is_idle(memory, limit)
                unused = f"unused for {format_duration(memory.at - memory.used)} (before that: {memory.how})"
                headless = idle and role == "worker" and not ask_address(plan["head"], plan["build"], MOST_CORES).alive
                refused = refused + 1 if headless else 0
                if headless:
                    print(f"{unused}, and the head {plan['head']} does not answer: {refused} of {HEAD_ASKED}")
                if (idle and role != "worker") or refused >= HEAD_ASKED:
                    print(f"ends this node: {unused}")
                    run_quietly("systemctl", "poweroff")
        time.sleep(WATCH_PAUSE + len(workers) / WATCH_RATE if watches else USE_LOOK)


GUARD_UNIT = """\
[Unit]
Description=Mitsuba cluster: keeps the head serving, links nodes that come back, ends idle nodes
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/bin/python3 -I -u /usr/local/lib/mitsuba-cluster/guard.py
SyslogIdentifier=mitsuba-guard
Restart=always
RestartSec=1
RuntimeDirectory=mitsuba-cluster
RuntimeDirectoryPreserve=yes
NoNewPrivileges=yes
ProtectHome=yes
ProtectSystem=strict
# Ubuntu 26.04's stdbuf writes there.
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""

# $1 the guard as base64 of gzip, $2 its unit, $3 minutes that a node may be idle. At every boot: later ones keep what
# start has put in its place.
GUARD_BOOT = r"""
set -eu
library=/usr/local/lib/mitsuba-cluster
if [ ! -e $library/guard.py ]; then
  mkdir -p $library /etc/mitsuba-cluster
  printf %s "$1" | base64 -d | gzip -d > $library/guard.py
  printf '%s\n' "$2" > /etc/systemd/system/mitsuba-guard.service
  echo "$3" > /etc/mitsuba-cluster/idle-minutes
  systemctl daemon-reload
  systemctl enable --quiet mitsuba-guard.service
fi
systemctl start --no-block mitsuba-guard.service
"""


def guard_at_boot(minutes: float) -> list[list[str]]:
    """Return the command that installs the guard at a node's first boot; none where no MINUTES of idleness end it."""
    import base64
    import gzip

    if not minutes:
        return []
    program = base64.b64encode(gzip.compress(node_program(guard_node).encode(), mtime=0)).decode()
    return [["bash", "-c", GUARD_BOOT, "guard", program, GUARD_UNIT, f"{minutes:g}"]]


# --- createNodes -------------------------------------------------------------
# Plan, access, launch, wait. Touches EC2, makes the user's key, and waits on the nodes for their boot.

# Release -> what the names of its images have for it and for their kind of disk; the gp3 images are younger than 22.04.
# https://documentation.ubuntu.com/aws/aws-how-to/instances/find-ubuntu-images/
UBUNTU = {"22.04": ("jammy", "gp2"), "24.04": ("noble", "gp3"), "26.04": ("resolute", "gp3")}
CANONICAL = {"aws": "099720109477", "aws-us-gov": "513442679011", "aws-cn": "837727238323"}  # partition -> owner
LAUNCH_BATCH = 100  # instances a RunInstances request: AWS prefers several such to one of 500
# botocore's patience for what is only said: a price, a quota.
QUICK: dict[str, Any] = {"connect_timeout": 3, "read_timeout": 5, "retries": {"total_max_attempts": 2}}
WORK_POLL = 5  # between two polls of EC2 while all nodes are at work
SURPLUS_PRICE = 0.05  # $ a vCPU-hour above the baseline of T3 and T3a (https://aws.amazon.com/ec2/pricing/on-demand/)

# What a type begins with -> its quota of vCPUs, on demand and spot; "" is all others: A, C, D, H, I, M, R, T, Z.
# https://docs.aws.amazon.com/ec2/latest/instancetypes/ec2-instance-quotas.html
QUOTAS = {
    "dl": ("L-6E869C2A", "L-85EED4F7"),
    "f": ("L-74FC7D96", "L-88CF9481"),
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "hpc": ("L-F7808C92", ""),
    "inf": ("L-1945791B", "L-B5D1601B"),
    "p": ("L-417A185B", "L-7212CCBC"),
    "trn": ("L-2C3B7624", "L-6B0D517C"),
    "vt": ("L-DB2E81BA", "L-3819A6DF"),
    "x": ("L-7295265B", "L-E3A00192"),
    "": ("L-1216C47A", "L-34B43A08"),
}
TAG_LENGTH = 256  # characters of a tag's value, AWS's limit; the signature of an RSA key needs several tags
TRACKED = 86400  # seconds that a node's security groups shall at least remember a silent TCP connection

# https://docs.aws.amazon.com/autoscaling/ec2/userguide/ts-as-instancelaunchfailure.html
KMS_HINT = (
    " (may you use the KMS key by which your account encrypts disks? kms:CreateGrant, kms:Decrypt, kms:DescribeKey, "
    "kms:GenerateDataKeyWithoutPlaintext and kms:ReEncrypt* are needed)"
)

CAPACITY_CODES = (
    "InsufficientInstanceCapacity InsufficientCapacity InsufficientHostCapacity InsufficientFreeAddressesInSubnet "
    "InsufficientVolumeCapacity UnfulfillableCapacity Unsupported SpotMaxPriceTooLow"
).split()


class Image(NamedTuple):
    """What matters of an AMI."""

    id: str
    architecture: str
    boot_mode: str
    virtualization: str
    root_device: str
    root_gb: int
    name: str
    other_devices: tuple[str, ...] = ()  # of its other EBS volumes


@dataclass(frozen=True)
class LaunchRequest:
    """What the user asked createNodes for: its arguments and options, under their names."""

    instance_type: str
    count: int
    group: str
    spot: bool = False
    max_price: float | None = None
    max_hours: float | None = None  # after which the nodes end themselves; 0: never; None: make_plan decides
    idle_minutes: float | None = None  # the same, without use
    without_mitsuba: bool = False
    others: bool = False  # even into somebody else's group
    dry_run: bool = False  # say more, make nothing


class Subnet(NamedTuple):
    """A place for nodes."""

    zone: str
    id: str
    vpc: str
    gives_addresses: bool  # public ones, unasked
    price: float | None = None  # $ an hour of a node there


class Plan(NamedTuple):
    """All that is known before a launch."""

    request: LaunchRequest
    type: InstanceType
    image: Image
    subnets: list[Subnet]  # in the order in which they are tried
    cidr: str  # who may connect
    present: Sequence[Node]  # that the group has already
    on_demand: float | None  # $ an hour; None: not known, or not needed
    spot: dict[str, float]  # zone -> $ an hour
    package: str  # where Mitsuba comes from; "" where that is not known
    quota: str | None  # of vCPUs; None: not asked for


# $1: seconds until the node's end, or 0. At every boot, as root, before anything else; fails if either part does.
# An image made of a node of ours has that node's units, plan and deadline: a new instance (cloud-init sets INSTANCE_ID)
# begins without them. Whoever runs on the node could read its user data, in which the host key is, or act with the
# node's role; so root alone may ask the metadata service. For the end the node's own clock decides, and a
# reboot changes nothing.
BOOT = r"""
set -u

forget_image() {
  local of=/etc/mitsuba-cluster/instance-id unit
  [ -n "${INSTANCE_ID:-}" ] && [ "$(cat $of 2> /dev/null)" != "$INSTANCE_ID" ] || return 0
  for unit in mtssrv.service mitsuba-guard.service mitsuba-deadline.timer mitsuba-deadline.service; do
    [ ! -e /etc/systemd/system/$unit ] || systemctl disable --now --no-block $unit
    rm -f /etc/systemd/system/$unit
  done
  rm -rf /etc/mitsuba-cluster /usr/local/lib/mitsuba-cluster
  systemctl daemon-reload
  mkdir -p ${of%/*}
  echo "$INSTANCE_ID" > $of
}

guard_metadata() {
  command -v nft > /dev/null || command -v iptables > /dev/null || return 0  # whoever uses the node warns of that
  nft -f - <<'RULES' || iptables -w -I OUTPUT -d 169.254.169.254 -m owner ! --uid-owner 0 -j REJECT
table inet mitsuba_metadata
delete table inet mitsuba_metadata
table inet mitsuba_metadata {
  chain output {
    type filter hook output priority 0;
    ip daddr 169.254.169.254 meta skuid != 0 reject
    ip6 daddr fd00:ec2::254 meta skuid != 0 reject
  }
}
RULES
}

set_deadline() (
  set -e
  [ "$1" != 0 ] || exit 0
  unit=/etc/systemd/system/mitsuba-deadline
  if [ ! -e $unit.timer ]; then
    at=$(date -u -d "@$(($(date +%s) + $1))" '+%Y-%m-%d %H:%M:%S UTC')
    printf '%s\n' '[Service]' 'Type=oneshot' 'ExecStart=systemctl poweroff' > $unit.service
    printf '%s\n' '[Timer]' "OnCalendar=$at" 'Persistent=true' 'AccuracySec=1s' \
      '[Install]' 'WantedBy=timers.target' > $unit.timer
    systemctl daemon-reload
    systemctl enable --quiet mitsuba-deadline.timer
  fi
  systemctl start --no-block mitsuba-deadline.timer
)

forget_image
guard_metadata
guarded=$?
set_deadline "$1"
exit $((guarded | $?))
"""

# As root: exit code 3 where the rules of BOOT for the metadata service are not there; says so where nothing can make
# them. Another code is sudo's.
CHECK_METADATA_RULES = """
command -v nft > /dev/null || command -v iptables > /dev/null || { echo "no firewall"; exit 0; }
nft list table inet mitsuba_metadata > /dev/null 2>&1 ||
  iptables -w -C OUTPUT -d 169.254.169.254 -m owner ! --uid-owner 0 -j REJECT 2> /dev/null || exit 3
"""


def fetch_subnets(ec2: Client, settings: Settings, instance_type: str) -> list[Subnet]:
    """Return the subnets of SUBNET_ID, else the default ones, wherever INSTANCE_TYPE can be launched, by zone."""
    default = [{"Name": "default-for-az", "Values": ["true"]}]
    wanted = {"SubnetIds": [settings.SUBNET_ID]} if settings.SUBNET_ID else {"Filters": default}
    kind = [{"Name": "instance-type", "Values": [instance_type]}]
    found, offerings = side_by_side(
        lambda: ec2.describe_subnets(**wanted)["Subnets"],
        lambda: ec2.describe_instance_type_offerings(LocationType="availability-zone", Filters=kind),
    )
    if not found:
        raise ClusterError(
            f"{ec2.meta.region_name} has no default VPC: make one with `aws ec2 create-default-vpc`, or set SUBNET_ID"
        )
    zones = {offer["Location"] for offer in offerings["InstanceTypeOfferings"]}
    subnets = [
        Subnet(raw["AvailabilityZone"], raw["SubnetId"], raw["VpcId"], raw.get("MapPublicIpOnLaunch", False))
        for raw in found
    ]
    fit = sorted(subnet for subnet in subnets if subnet.zone in zones)
    if not fit:
        here = f"in {subnets[0].zone}, where SUBNET_ID is" if settings.SUBNET_ID else f"in {ec2.meta.region_name}"
        there = f"; this region has it in {', '.join(sorted(zones))}" if zones else ""
        raise ClusterError(f"{instance_type} is not offered {here}{there}")
    return fit


def fetch_ubuntu(ec2: Client, ssm: Client, release: str) -> str:
    """Return the id of the newest image of Ubuntu's RELEASE: by Canonical's SSM parameter, else from EC2's list."""
    code_name, disk = UBUNTU[release]
    parameter = f"/aws/service/canonical/ubuntu/server/{release}/stable/current/amd64/hvm/ebs-{disk}/ami-id"
    with tolerate(loss="Ubuntu's image is taken from EC2's list"), tolerate("ParameterNotFound"):
        return str(ssm.get_parameter(Name=parameter)["Parameter"]["Value"])
    folder = "hvm-ssd" if disk == "gp2" else f"hvm-ssd-{disk}"
    named = [{"Name": "name", "Values": [f"ubuntu/images/{folder}/ubuntu-{code_name}-{release}-amd64-server-*"]}]
    owner = CANONICAL.get(ec2.meta.partition)
    images = ec2.describe_images(Owners=[owner], Filters=named)["Images"] if owner else []
    if not images:
        raise ClusterError(f"no image of Ubuntu {release} was found in {ec2.meta.region_name}; name one in AMI_IDS")
    return str(max(images, key=lambda image: image["CreationDate"])["ImageId"])


def fetch_image(ec2: Client, ssm: Client, settings: Settings) -> Image:
    """Return the image for the region: of AMI_IDS, else Ubuntu's."""
    chosen = settings.AMI_IDS.get(settings.AWS_REGION) or fetch_ubuntu(ec2, ssm, settings.UBUNTU_RELEASE)
    found = []
    with tolerate("InvalidAMIID.NotFound", "InvalidAMIID.Malformed", "InvalidAMIID.Unavailable"):
        found = ec2.describe_images(ImageIds=[chosen])["Images"]
    if not found:
        raise ClusterError(f"there is no image {chosen} in {settings.AWS_REGION}; see AMI_IDS")
    raw = found[0]
    root = raw.get("RootDeviceName", "/dev/sda1")
    disks = {disk.get("DeviceName"): disk.get("Ebs", {}) for disk in raw.get("BlockDeviceMappings", [])}
    return Image(
        id=chosen,
        architecture=raw.get("Architecture", ""),
        boot_mode=raw.get("BootMode", "legacy-bios"),
        virtualization=raw.get("VirtualizationType", "hvm"),
        root_device=root,
        root_gb=disks.get(root, {}).get("VolumeSize", 0),
        name=printable(raw.get("Name", "")),
        other_devices=tuple(device for device, ebs in disks.items() if ebs and device != root),
    )


def check_image(wanted: InstanceType, image: Image) -> None:
    """Refuse an image that can't boot on the instance type."""
    if image.architecture not in wanted.architectures:
        raise ClusterError(
            f"image {image.id} is for {image.architecture}, which {wanted.type} is not: choose another type (Mitsuba "
            "0.6 is an x86-64 program), or an image of your own in AMI_IDS"
        )
    if image.virtualization not in wanted.virtualization:
        raise ClusterError(f"image {image.id} ({image.virtualization}) can't boot on {wanted.type}; see AMI_IDS")
    modes = {"uefi-preferred": ("uefi", "legacy-bios")}.get(image.boot_mode, (image.boot_mode,))
    if not set(modes) & set(wanted.boot_modes):
        raise ClusterError(f"image {image.id} boots by {image.boot_mode} only, which {wanted.type} can't; see AMI_IDS")


def fetch_on_demand_price(settings: Settings, instance_type: str) -> float | None:
    """Return the $ an hour of a Linux instance; None where it can't be had.

    The Pricing API answers in us-east-1 for all regions but those of other partitions: accounts of GovCloud have none,
    China's speaks of yuan. https://docs.aws.amazon.com/awsaccountbilling/latest/aboutv2/price-changes.html
    """
    if find_partition(settings.AWS_REGION)[0] != "aws":
        return None
    wanted = {
        "instanceType": instance_type,
        "regionCode": settings.AWS_REGION,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
    with tolerate(loss="the price is unknown"), contextlib.suppress(KeyError, ValueError):
        pricing = open_client(settings, "pricing", "us-east-1", **QUICK)
        products = pricing.get_products(ServiceCode="AmazonEC2", Filters=filters)["PriceList"]
        terms = [term for product in products for term in json.loads(product)["terms"]["OnDemand"].values()]
        rates = [rate["pricePerUnit"]["USD"] for term in terms for rate in term["priceDimensions"].values()]
        return max(filter(None, map(float, rates)), default=None)
    return None


def fetch_spot_prices(ec2: Client, instance_type: str) -> dict[str, float]:
    """Return zone -> present $ an hour of a spot node, cheapest first; {} where that can't be had."""
    with tolerate(loss="spot prices are unknown"):
        now = {zone: prices[-1][1] for zone, prices in fetch_spot_history(ec2, instance_type, 1).items()}
        return dict(sorted(now.items(), key=lambda item: item[1]))
    return {}


def quota_code(instance_type: str, spot: bool) -> str:
    """Return Service Quotas' code for the vCPUs of an instance type; "" where there is none."""
    letters = re.sub("[^a-z].*", "", instance_type)
    return next(codes for prefix, codes in QUOTAS.items() if letters.startswith(prefix))[spot]


def fetch_quota(settings: Settings, instance_type: str, spot: bool) -> str:
    """Return the account's quota of vCPUs in words; "" where it can't be had."""
    with tolerate():
        quotas = open_client(settings, "service-quotas", **QUICK)
        quota = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=quota_code(instance_type, spot))["Quota"]
        return f"{quota['Value']:g} ({printable(quota['QuotaName'])})"
    return ""


def check_key_pair(app: App) -> None:
    """Refuse another key than the user's under KEYPAIR_NAME in EC2; InvalidKeyPair.NotFound where there is none."""
    name, path = app.settings.KEYPAIR_NAME, app.settings.key_file
    pair = app.ec2.describe_key_pairs(KeyNames=[name], IncludePublicKey=True)["KeyPairs"][0]
    has_file = has_key(path)
    if not has_file or pair.get("PublicKey", "").split()[:2] != public_line(app.identity).split()[:2]:
        missing = "" if has_file else f"there is no key in {path}, and "
        raise ClusterError(
            f"{missing}EC2 has another key under the name {name!r}: choose another KEYPAIR_NAME in {Call.settings}, or "
            f"copy that key's file from the machine that made it to {path}"
        )


def check_rules(app: App, group: SecurityGroup, cidr: str) -> list[Rule]:
    """Return what GROUP lets in for other machines with the user's key; refuse what others have added."""
    _, _, rules = app.sort_rules(group, cidr)
    key = app.rule_owner.rpartition(" ")[0]
    ours = [one for one in rules if one.owner.startswith(f"{key} ")]
    if [one for one in ours if one == Rule("tcp", one.first, one.first, "IpRanges", one.source)] != rules:
        raise ClusterError(f"nothing is launched: {describe_rules(app.ec2, group, rules)}")
    return rules


def make_plan(app: App, request: LaunchRequest) -> Plan:
    """Look up all that can be known before a launch, and refuse what can't work; a dry run asks for more prices."""
    settings, ec2 = app.settings, app.ec2
    app.left = "Nothing was launched."
    ssm = open_client(settings, "ssm")
    instance_type, image, subnets, cidr, before, on_demand, spot, package, quota = side_by_side(
        lambda: fetch_instance_type(ec2, request.instance_type),
        lambda: fetch_image(ec2, ssm, settings),
        lambda: fetch_subnets(ec2, settings, request.instance_type),
        lambda: fetch_client_cidr(settings),
        lambda: fetch_nodes(ec2, request.group),
        lambda: fetch_on_demand_price(settings, request.instance_type) if request.dry_run or not request.spot else None,
        lambda: fetch_spot_prices(ec2, request.instance_type) if request.dry_run or request.spot else {},
        lambda: check_package(settings, request.without_mitsuba),
        lambda: fetch_quota(settings, request.instance_type, request.spot) if request.dry_run else None,
    )
    app.check_owner(request.group, before, request.others)
    check_image(instance_type, image)
    subnets = [one._replace(price=spot.get(one.zone) if request.spot else on_demand) for one in subnets]
    subnets.sort(key=lambda one: (one.price is None, one.price or 0.0, one.zone))
    lowest = subnets[0].price
    if request.max_price is not None and lowest is not None and request.max_price < lowest:
        raise ClusterError(
            f"the spot price of {request.instance_type} is {format_money(lowest)} an hour now, above your maximum of "
            f"{format_money(request.max_price)}; see {command('spotPrices', request.instance_type)}"
        )
    if request.dry_run:  # what a launch would refuse or say once it begins to make what it needs
        with tolerate("InvalidKeyPair.NotFound"):
            check_key_pair(app)
        for group in fetch_security_groups(ec2, request.group):
            check_rules(app, group, cidr)
            app.warn_of_rules([group], cidr)
    present = [node for node in before if node.is_inside and node.state in ("pending", "running")]
    hours, idle = request.max_hours, request.idle_minutes
    if hours is None:  # a group's limit is meant for what is added to it, too
        hours = max((node.max_hours for node in present if node.max_hours), default=settings.MAX_HOURS)
    if idle is None:
        idle = max((node.idle_minutes for node in present if node.idle_minutes), default=settings.IDLE_MINUTES)
    request = replace(request, max_hours=hours, idle_minutes=idle)
    return Plan(request, instance_type, image, subnets, cidr, present, on_demand, spot, package, quota)


def describe(app: App, plan: Plan) -> Iterator[str]:
    """Yield, line by line, what a launch makes and what it costs: createNodes says it, --dry-run says nothing else."""
    request, settings, price = plan.request, app.settings, plan.subnets[0].price
    count, kind, cores = request.count, request.instance_type, plan.type.cores * request.count
    if plan.present:
        group = app.where(request.group)
        yield f"{group} has {format_count(len(plan.present), 'node')} already; adding {count} more"
    if price is None:
        warn(f"the price of {kind} could not be looked up; see https://aws.amazon.com/ec2/pricing/on-demand")
    else:
        addresses = 0 if settings.PRIVATE_NODES else count * PUBLIC_ADDRESS_PRICE
        more = f", and {format_money(addresses)} for public addresses" if addresses else ""
        day = format_money(24 * (count * price + addresses))
        yield f"{count} × {kind}: {format_money(count * price)} an hour{more}; {day} a day"
    if plan.spot:
        shown = ", ".join(f"{format_money(now)} in {zone}" for zone, now in plan.spot.items())
        beside = f"; on demand: {format_money(plan.on_demand)}" if plan.on_demand is not None else ""
        yield f"An hour of a spot node, now: {shown}{beside}"
    if plan.spot and find_partition(settings.AWS_REGION)[0] == "aws-cn":
        yield "Spot prices in China are in yuan (CNY), also where a $ is shown"
    if plan.type.burstable and kind.startswith("t2."):
        yield f"{kind} is burstable: after some minutes of full load it falls to a fraction of its speed"
    elif plan.type.burstable:
        most = f"up to {format_money(SURPLUS_PRICE * cores)} an hour more for all"
        yield f"{kind} is burstable: full load costs a surcharge, {most}; a c type has none"
    if request.max_price is not None:
        yield f"Each is launched only for at most {format_money(request.max_price)} an hour"
    zones = ", ".join(dict.fromkeys(subnet.zone for subnet in plan.subnets))
    yield f"Image: {plan.image.id} ({plan.image.name})"
    yield f"Zones, in the order in which they are tried: {zones}"
    if settings.PRIVATE_NODES:
        yield (
            "PRIVATE_NODES: they get no public address, so this machine must reach the private ones (by a VPN), "
            "and install needs a NAT gateway"
        )
    elif closed := [subnet.id for subnet in plan.subnets if not subnet.gives_addresses]:
        yield f"Without public addresses of its own: {', '.join(closed)}; the nodes ask for one each"
    ends = [format_count(request.max_hours, "hour")] if request.max_hours else []
    ends += [f"{format_count(request.idle_minutes, 'minute')} without use"] if request.idle_minutes else []
    for_ever = f"They run until {command('terminateAll', request.group)}; see --max-hours and --idle-minutes."
    yield f"Each ends itself after {', or '.join(ends)}." if ends else for_ever
    if plan.package:
        yield f"To be installed: {plan.package}"
    if plan.quota is not None:
        quota = plan.quota or "could not be looked up (servicequotas:GetServiceQuota)"
        each = f", {format_money(price / plan.type.cores)} an hour each" if price is not None and cores else ""
        yield f"vCPUs: {cores} asked{each}; your quota, for all your instances together: {quota}"


def write_secret(path: Path, text: str) -> None:
    """Write a file that only the user can read, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def make_ed25519() -> tuple[str, str]:
    """Return a new key: (private half as OpenSSH writes it, public half as one line)."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private.decode(), public.decode()


def ensure_key_file(path: Path) -> None:
    """Make the user's key where the file is missing or still the placeholder; never overwrite one."""
    import fcntl

    if has_key(path):
        return
    text = path.read_text("latin-1") if path.exists() else ""
    if text and "placeholder" not in text:
        raise ClusterError(f"{path} is no SSH private key; move it away, and createNodes makes one")
    if why := hide_from_git(path):
        raise ClusterError(
            f"git would pick up a key that is written to {path} ({why}): mend that, or let SSH_PRIVATE_KEY_FILE name a "
            "path outside of the repository"
        )
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # another run that makes one at this moment goes first
            if not has_key(path):
                write_secret(path, make_ed25519()[0])
                click.echo(f"Made a new SSH key: {path}", err=True)
        finally:
            os.close(folder)
    except OSError as error:
        raise ClusterError(
            f"the folder {path.parent} must be writable, since the new SSH key is kept there ({error.strerror}); "
            f"SSH_PRIVATE_KEY_FILE in {Call.settings} can name a file elsewhere"
        ) from error


def ensure_key(app: App) -> None:
    """Make the user's key where there is none, here or in EC2, and import it under KEYPAIR_NAME."""
    with tolerate("InvalidKeyPair.NotFound"):
        return check_key_pair(app)
    ensure_key_file(app.settings.key_file)
    tags = [{"ResourceType": "key-pair", "Tags": [{"Key": "mitsuba-key", "Value": app.identity.fingerprint}]}]
    pair = {"KeyName": app.settings.KEYPAIR_NAME, "PublicKeyMaterial": public_line(app.identity).encode()}
    with tolerate("InvalidKeyPair.Duplicate"):  # another run was quicker; with the same key?
        app.ec2.import_key_pair(**pair, TagSpecifications=tags)
        return None
    return persist(lambda: check_key_pair(app))


def ensure_security_group(ec2: Client, group: str, vpc: str) -> SecurityGroup:
    """Return GROUP's security group; make it, tagged, where it is missing."""
    name = f"mitsuba-{group}"
    tags = [{"ResourceType": "security-group", "Tags": [{"Key": TAG_GROUP, "Value": group}]}]
    about = {"GroupName": name, "Description": "Mitsuba rendering cluster", "VpcId": vpc, "TagSpecifications": tags}
    for _ in range(5):
        if existing := [one for one in fetch_security_groups(ec2, group) if one.vpc == vpc]:
            return existing[0]
        with tolerate("InvalidGroup.Duplicate"):  # another machine's, of a moment ago; a stranger's never shows our tag
            return SecurityGroup(ec2.create_security_group(**about)["GroupId"], group, name, vpc)
        time.sleep(POLL)
    raise ClusterError(f"a security group {name} that is not this tool's is in the way; rename it")


def make_user_data(private: str, public: str, max_hours: float, idle_minutes: float = 0, user: str = "ubuntu") -> str:
    """Return the nodes' cloud-config (JSON is YAML too): host key, metadata rules, deadline, guard.

    https://docs.cloud-init.io/en/latest/reference/modules.html#ssh and #bootcmd
    """
    config = {
        "ssh_keys": {"ed25519_private": private, "ed25519_public": public},
        "ssh_pwauth": False,
        "disable_root": user != "root",
        # One script for cloud-init, which sees its exit code: the guard ends an idle node even where BOOT fails.
        "bootcmd": [
            ["bash", "-c", BOOT, "boot", str(round(max_hours * 3600))],
            "booted=$?",
            *guard_at_boot(idle_minutes),
            "exit $((booted | $?))",
        ],
    }
    return "#cloud-config\n" + json.dumps(config)


def sign_launch(identity: paramiko.PKey, group: str, host_key: str) -> dict[str, str]:
    """Return the tags of nodes that the user's key (or ssh-agent) vouches for."""
    import base64

    import paramiko

    algorithm = "rsa-sha2-512" if public_line(identity).startswith("ssh-rsa ") else None
    try:
        signed = identity.sign_ssh_data(signed_text(group, host_key), algorithm)
    except paramiko.SSHException as error:
        raise ClusterError(f"ssh-agent does not sign with your key ({error})") from error
    text = base64.b64encode(signed if isinstance(signed, bytes) else signed.asbytes()).decode()
    parts = (text[at : at + TAG_LENGTH] for at in range(0, len(text), TAG_LENGTH))
    return dict(zip(TAG_SIGNATURES, parts))


def prepare(app: App, plan: Plan) -> dict[str, Any]:
    """Make what a launch needs: keys, security group, user data; return what all its RunInstances requests have."""
    settings, ec2, request = app.settings, app.ec2, plan.request
    ensure_key(app)
    group = ensure_security_group(ec2, request.group, plan.subnets[0].vpc)
    rules = check_rules(app, group, plan.cidr)
    if plan.present:  # another machine of the user's may be at work with them
        app.warn_of_rules([group], plan.cidr)
    elif rules:  # anybody may have written the user's mark, which is no secret
        with tolerate("InvalidPermission.NotFound"):
            ec2.revoke_security_group_ingress(GroupId=group.id, IpPermissions=[rule.permission for rule in rules])
        note(f"Security group {group.name} lets in no more: {', '.join(map(str, rules))}")
    app.allow_access([group], plan.cidr)
    private, public = make_ed25519()
    tags = {TAG_GROUP: request.group, TAG_HOST_KEY: public} | sign_launch(app.identity, request.group, public)
    tags |= {TAG_HOURS: f"{request.max_hours:g}"} if request.max_hours else {}
    tags |= {TAG_IDLE: f"{request.idle_minutes:g}"} if request.idle_minutes else {}
    size = max(settings.ROOT_VOLUME_GB, plan.image.root_gb)
    disk = {"VolumeSize": size, "VolumeType": "gp3", "DeleteOnTermination": True}
    interface = {"DeviceIndex": 0, "Groups": [group.id], "AssociatePublicIpAddress": not settings.PRIVATE_NODES}
    if plan.type.tracks and plan.type.tracks < TRACKED:  # else a head's links die between two renders
        interface["ConnectionTrackingSpecification"] = {"TcpEstablishedTimeout": TRACKED}
    parameters: dict[str, Any] = {
        "ImageId": plan.image.id,
        "InstanceType": request.instance_type,
        "KeyName": settings.KEYPAIR_NAME,
        "UserData": make_user_data(
            private, public, request.max_hours or 0, request.idle_minutes or 0, settings.SSH_USER
        ),
        "NetworkInterfaces": [interface],
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
        "BlockDeviceMappings": [
            {"DeviceName": plan.image.root_device, "Ebs": disk | ({"Encrypted": True} if plan.type.encrypts else {})},
            *({"DeviceName": device, "Ebs": {"DeleteOnTermination": True}} for device in plan.image.other_devices),
        ],
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": [{"Key": name, "Value": value} for name, value in tags.items()]}
            for kind in ["instance", "volume", *(["spot-instances-request"] if request.spot else [])]
        ],
    }
    if request.spot:
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        if request.max_price is not None:
            options["MaxPrice"] = f"{request.max_price:.6f}"
        parameters["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    return parameters


def in_subnet(parameters: dict[str, Any], subnet: Subnet) -> dict[str, Any]:
    """Return RunInstances' PARAMETERS for SUBNET, with the price there in a tag."""
    price = [] if subnet.price is None else [{"Key": TAG_PRICE, "Value": f"{subnet.price:.6f}"}]
    return parameters | {
        "NetworkInterfaces": [one | {"SubnetId": subnet.id} for one in parameters["NetworkInterfaces"]],
        "TagSpecifications": [one | {"Tags": one["Tags"] + price} for one in parameters["TagSpecifications"]],
    }


def launch_nodes(app: App, plan: Plan, parameters: dict[str, Any], token: str) -> tuple[list[Node], str]:
    """Launch what was ordered, zone after zone; return the nodes that exist and why they are fewer, or "".

    An error before the first node exists is raised; later ones become the reason. TOKEN begins all ClientTokens.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    request, nodes, why = plan.request, list[Node](), ""
    for subnet in plan.subnets:
        zone, asked = subnet.zone, in_subnet(parameters, subnet)
        try:
            while len(nodes) < request.count:
                size = min(request.count - len(nodes), LAUNCH_BATCH)
                # The same token in each try, so that EC2 launches once.
                asked |= {"MinCount": 1, "MaxCount": size, "ClientToken": token + os.urandom(8).hex()}
                got = persist(functools.partial(app.ec2.run_instances, **asked), "RunInstances")["Instances"]
                nodes += map(to_node, got)
                if len(got) < size:
                    why = f"{zone} had no more"
                    break
            if len(nodes) == request.count:
                return nodes, ""
            note(f"{zone} gave {len(nodes)} of {format_count(request.count, 'node')}")
        except (BotoCoreError, ClientError) as error:
            code, why = error_code(error), f"{zone}: {explain(error)}"
            if code in QUOTA_CODES and (quota := fetch_quota(app.settings, request.instance_type, request.spot)):
                note(f"{plan.type.cores * request.count} vCPUs asked, your quota is {quota}")
            if code not in CAPACITY_CODES:
                if nodes:
                    break
                if code and code not in RETRY_CODES:  # a plain refusal: nothing runs
                    app.left = ""
                raise
            dear = f"{zone} asks more than your maximum"
            what = dear if code == "SpotMaxPriceTooLow" else f"no capacity for {request.instance_type} in {zone}"
            note(f"{what} ({code}); trying the next zone")
    return nodes, why


@functools.cache
def warn_of_image() -> None:
    """Warn, once for all nodes, of an image that can't keep a node's programs from the metadata service."""
    warn("the nodes' image has neither nft nor iptables, so any program on a node can read its host key")


def check_metadata_rules(remote: Remote) -> None:
    """Refuse a node whose boot script could not keep its programs from the metadata service."""
    code, output = remote.run(root_command("check-metadata-rules", CHECK_METADATA_RULES))
    if "no firewall" in output:
        with OUTPUT:
            warn_of_image()
    elif code not in (0, 3) and "sudo" in output:
        raise NodeError(f"SSH_USER can't become root there without a password: {output.strip()}")
    elif code:
        raise NodeError(
            "its rules for the metadata service are missing, so any program on it could read its host key: "
            f"{command('terminate', remote.node.id)} ends it"
        )


def boot_step(remote: Remote) -> None:
    """Wait for the end of cloud-init."""
    remote.check(user_command("wait-for-boot", WAIT_FOR_BOOT, str(CLOUD_INIT_LIMIT)), limit=CLOUD_INIT_LIMIT + 30)
    check_metadata_rules(remote)


def decide(app: App, node: Node, future: Future[Outcome[T]] | None, elapsed: float) -> Outcome[T] | None:
    """Return how the wait for NODE has ended, ELAPSED seconds after the launch; None while it goes on."""
    if node.state in ("shutting-down", "terminated"):
        hint = KMS_HINT if node.reason.startswith("Client.InternalError") else ""
        return Outcome(node, error=f"EC2 ended it while it started: {node.reason or 'no reason given'}{hint}")
    if not future and elapsed > BOOT_LIMIT:
        return Outcome(node, error=f"got no address within {format_duration(BOOT_LIMIT)}")
    if not future or not future.done():
        return None
    outcome = replace(future.result(), node=node)
    if outcome.silent:
        with tolerate(loss=f"the console of {node.id} can't be read"):
            console = str(app.ec2.get_console_output(InstanceId=node.id).get("Output") or "")
            return replace(outcome, error=outcome.error + format_tail(console))
    return outcome


def await_nodes(
    app: App, group: str, nodes: Sequence[Node], step: Callable[[Remote], T], progress: Progress
) -> list[Outcome[T]]:
    """Run STEP on each node, by itself, once the node has the address that will be used, and answers.

    EC2 tells the private address at once, the public one seconds later, and shows new nodes late in its lists.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    waiting = {node.id: node for node in nodes}
    begun: dict[str, Future[Outcome[T]]] = {}
    done: dict[str, Outcome[T]] = {}
    began = good = time.monotonic()
    while waiting:
        seen: dict[str, Node] = {}
        try:
            boots = any(node.id not in begun or node.state == "pending" for node in waiting.values())
            if boots or time.monotonic() - good > WORK_POLL:
                seen = {node.id: node for node in fetch_nodes(app.ec2, group) if node.id in waiting}
                good = time.monotonic()
        except (BotoCoreError, ClientError):  # a poll that fails ends no launch
            if time.monotonic() - good > POLL_ERROR_LIMIT:
                raise
        waiting |= seen
        for node in seen.values():
            reachable = node.address and node.state in ("pending", "running") and not app.awaits_address(node)
            if reachable and node.id not in begun:
                young = (datetime.now(timezone.utc) - node.launched).total_seconds() < BOOT_LIMIT
                limit = BOOT_LIMIT if young else LOGIN_LIMIT
                begun[node.id] = app.pool.submit(node, step, limit=limit, first_boot=young)
                progress.step(node, "booting")
        running = sum(node.state == "running" for node in waiting.values()) + len(done)
        progress.show(f"{running} running")
        at_work = [begun[name] for name in waiting if name in begun]
        if at_work:
            concurrent.futures.wait(at_work, POLL if len(at_work) == len(waiting) else POLL / 3)
        else:
            time.sleep(POLL / 3)
        for node in list(waiting.values()):
            if outcome := decide(app, node, begun.get(node.id), time.monotonic() - began):
                done[node.id] = outcome
                del waiting[node.id]
                progress.finished(outcome)
    return [done[node.id] for node in nodes]


def launch_plan(app: App, plan: Plan, ways: str) -> tuple[list[Node], str, str]:
    """Launch a PLAN; return the nodes, why they are fewer than asked, or "", and how their ClientTokens begin.

    Ctrl-C says in WAYS what can be done with nodes that may be there.
    """
    request, token = plan.request, os.urandom(16).hex()
    parameters = prepare(app, plan)
    app.left = f"Nodes of {app.where(request.group)} may be running and cost money: {ways}."
    nodes, why = launch_nodes(app, plan, parameters, token)
    if not nodes:
        raise ClusterError(f"EC2 gave no {request.instance_type}: {why}")
    launched = f"{len(nodes)} of {format_count(request.count, 'node')} launched"
    late = "they cost money, and status may show them some seconds late"
    app.left = f"{launched} in {app.where(request.group)}; {late}: {ways}."
    note(f"{launched}; waiting until each answers")
    zones = {node.zone for node in (*plan.present, *nodes)}
    if len(zones) > 1:
        note(f"In {' and '.join(sorted(zones))}: traffic between zones costs $0.01 a GB in each direction")
    return nodes, why, token


def create(app: App, request: LaunchRequest) -> None:
    """Do what createNodes and addSpotNodes have in common."""
    plan = make_plan(app, request)
    for line in describe(app, plan):
        (result if request.dry_run else note)(line)
    if request.dry_run:
        return
    where = app.where(request.group)
    ways = (
        f"{command('install', request.group)} goes on with them ({command('createNodes')} would make more), "
        f"{command('status')} shows them, {command('terminateAll', request.group)} ends them"
    )
    started = time.monotonic()
    nodes, why, _ = launch_plan(app, plan, ways)
    outcomes = await_nodes(app, request.group, nodes, boot_step, Progress("Answering", len(nodes)))
    put(format_nodes(in_order(outcome.node for outcome in outcomes)))
    note(f"This took {format_duration(time.monotonic() - started)}.")
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if failed or why:
        good = f"{len(outcomes) - len(failed)} of {format_count(request.count, 'node')}"
        raise ClusterError(f"{good} ready in {where}{f' ({why})' if why else ''}; {ways}")
    note(f"{format_count(len(outcomes), 'node')} ready. Next: {command('install', request.group)}")


def launch_options(*own: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds what each launch can be asked for, and a command's OWN argument or option."""
    options = (
        type_argument,
        click.argument("count", type=Number(1, 5000, whole=True)),
        *own,
        group_argument,
        click.option(
            "--max-hours",
            type=Number(0, 8760),
            metavar="HOURS",
            help="Terminate the nodes automatically after so long; else as the group's others.",
        ),
        click.option(
            "--idle-minutes", type=Number(0, 525600), metavar="MINUTES", help="And after so long without use; 0: never."
        ),
        others_option,
        click.option("--without-mitsuba", is_flag=True, help="Launch even if install would find no Mitsuba."),
        click.option("--dry-run", is_flag=True, help="Only say what would be made, its price, and your quota."),
    )
    return lambda function: functools.reduce(lambda decorated, add: add(decorated), reversed(options), function)


spot_option = click.option("--spot", is_flag=True, help="Spot nodes: cheaper, and EC2 may take them back.")


@cli.command("createNodes", epilog="Example: ./cluster.py createNodes c1.xlarge 8")
@launch_options(spot_option)
@click.pass_obj
def create_nodes(app: App, /, **asked: Any) -> None:
    """Allocate COUNT nodes of TYPE and wait until each answers."""
    create(app, LaunchRequest(**asked))


@cli.command("addSpotNodes", epilog="Example: ./cluster.py addSpotNodes c1.xlarge 8 0.20")
@launch_options(click.argument("max_price", metavar="MAXPRICE", type=Number(0, 1000, above=True)))
@click.pass_obj
def add_spot_nodes(app: App, /, **asked: Any) -> None:
    """Like createNodes --spot, for at most MAXPRICE $ an hour."""
    create(app, LaunchRequest(**asked, spot=True))


# --- install -----------------------------------------------------------------
# Mitsuba's package: found, or packed from a build of this machine's, sent, installed. Touches the cache folder, the
# nodes, and the logs that are kept here. createNodes asks here what would be installed.

INSTALL_LIMIT = 1800
BUILD_LIMIT = 10  # seconds for mtssrv to greet; it takes milliseconds
GONE = (404, 410)  # HTTP's codes for what does not exist
PACKED_KEPT = 3  # packed builds in the cache folder
PACKAGE_FOLDER = ".mitsuba-package"  # on nodes, in the user's home

# Of a build's dist folder; mtsgui, mtsimport and python/ have no use on a node, and many libraries of their own.
PACKED = ("mtssrv", "mitsuba", "mtsutil", "*.so*", "plugins/**/*", "data/**/*", "lib/**/*")

# The glibc of each Ubuntu release (https://packages.ubuntu.com/libc6), and what brought the names that are no versions.
GLIBC = {"22.04": (2, 35), "24.04": (2, 39), "26.04": (2, 43)}
GLIBC_ABI = {
    "GLIBC_PRIVATE": (2, 0),
    "GLIBC_ABI_DT_RELR": (2, 36),
    "GLIBC_ABI_GNU2_TLS": (2, 42),
    "GLIBC_ABI_DT_X86_64_PLT": (2, 42),
}
GLIBC_LIBRARIES = frozenset(
    "ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libmvec.so.1 libpthread.so.0 libdl.so.2 librt.so.1 libresolv.so.2 "
    "libutil.so.1 libanl.so.1 libnsl.so.1 libBrokenLocale.so.1".split()
)

# What libgl1, libglu1-mesa, libx11-6 and libxxf86vm1 bring: here it may belong to this machine's graphics driver.
GRAPHICS_LIBRARIES = frozenset(
    "libGL.so.1 libGLX.so.0 libGLdispatch.so.0 libGLU.so.1 libX11.so.6 libXext.so.6 libXxf86vm.so.1 libxcb.so.1 "
    "libXau.so.6 libXdmcp.so.6".split()
)


# $1 SSH user, $2 data directory, $3 the package's SHA-256 (or empty), $4 what all this amounts to, $5 the program that
# learns the build, $6 instance type.
# Standard input, since both lines may hold a password: the apt line; and the package: a name in that
# repository, or else a file (from the user's home) or https address of a .deb, .tar.gz or shell script.
INSTALL = r"""
set -euo pipefail
umask 022
user=$1 data=$2 sha256=$3 recipe=$4 learn_build=$5 type=$6
if [ -e /run/mitsuba-cluster/in-use ]; then exec 9< /run/mitsuba-cluster/in-use; touch /run/mitsuba-cluster/in-use; fi
IFS= read -r repository
IFS= read -r package
state=/var/lib/mitsuba-cluster
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1

step() { echo "step: $1"; }

# By tee, which outlives its reader: a client that goes away would break apt's output, and with it dpkg's work.
apt() {
  apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -o Dpkg::Options::=--force-confold "$@" \
    < /dev/null 2>&1 | tee -p /dev/null
}

# What an installation that was cut off has left half-configured stops apt; where another one runs, apt waits for it.
apt_install() {
  dpkg --force-confold --configure -a < /dev/null 2>&1 | tee -p /dev/null || true
  apt install "$@"
}

# apt's own lock on its lists knows no time limit, so wait for it here; a mirror may fail once.
update() {
  local pause=1
  step 'package lists'
  until apt -o APT::Update::Error-Mode=any update; do
    pause=$((2 * pause))
    [ $pause -le 16 ] || { echo 'the package lists could not be fetched'; return 1; }
    echo "apt-get update failed; next try in $pause seconds"
    sleep $pause
  done
}

# A copy of root's own, so that nobody can change it between the check and the use.
fetch() {
  case $package in
    https://*)
      step downloading
      printf 'url = "%s"\n' "$package" | curl -fsSL --proto =https --retry 5 -o "$1" --config -
      ;;
    *)
      install -m 644 "$package" "$1"
      find "${package%/*}" -maxdepth 1 -type f ! -name "${package##*/}" -delete # older ones; this one is passed on
      ;;
  esac
  if [ -n "$sha256" ]; then echo "$sha256  $1" | sha256sum --check --strict; fi
}

# $1 folder: what the loader lacks for the programs and libraries there: libraries, and glibc's version names.
missing_libraries() {
  find "$1" -maxdepth 2 ! -path '*/python/*' -type f \( -name '*.so*' -o -name mtssrv -o -name mitsuba \) -print0 |
    LC_ALL=C LD_LIBRARY_PATH="$1:$1/lib" xargs -0 ldd 2>&1 |
    sed -nE "s/^\t(\S+) => not found.*/\1/p; s/.*: version .(\w+[0-9A-Z_.]*)' not found .*/\1/p" | sort -u || true
}

# $1 library: the package that has it, if apt knows one of the usual name (libpng16.so.16 is in libpng16-16,
# libboost_system.so.1.74.0 in libboost-system1.74.0, libxerces-c-3.2.so in libxerces-c3.2).
package_of() {
  name=$(sed -E 's/-([0-9.]+)\.so$/\1/; s/([0-9])\.so\./\1-/; s/\.so\.?//; y/_/-/; s/.*/\L&/' <<< "$1")
  for candidate in "$name" "${name}t64"; do
    if apt-cache show "$candidate" > /dev/null 2>&1; then
      echo " (Ubuntu package $candidate)"
      return
    fi
  done
}

check_libraries() {
  local missing name names=()
  missing=$(missing_libraries "$1")
  [ -n "$missing" ] || return 0
  update || true
  if grep -qE '^lib(GL|X)' <<< "$missing"; then
    apt_install --no-install-recommends libgl1 libglu1-mesa libx11-6 libxxf86vm1 || true
    missing=$(missing_libraries "$1")
  fi
  for name in $missing; do
    case $name in
      GLIBC_*) names+=("$name (of a newer glibc than this node's $(getconf GNU_LIBC_VERSION))") ;;
      *) names+=("$name$(package_of "$name")") ;;
    esac
  done
  [ ${#names[@]} != 0 ] || return 0
  printf -v missing '%s, ' "${names[@]}"
  echo "the package needs what this node lacks: ${missing%, }"
  return 1
}

# The new tree takes the old one's place as a whole, once it is known to be complete.
install_tree() {
  local fresh=$work/tree program
  step unpacking
  mkdir "$fresh"
  tar -xzf "$1" -C "$fresh" --no-same-owner --no-same-permissions
  program=$(cd "$fresh" && find . -type f -name mtssrv -perm -u+x -print -quit)
  [ -n "$program" ] || { echo 'there is no mtssrv in the package'; return 1; }
  check_libraries "$(dirname "$fresh/$program")"
  (flock 8; rm -rf /opt/mitsuba; mv "$fresh" /opt/mitsuba) 8> "$state/lock"
  folder=$(dirname "$(readlink -f "/opt/mitsuba/$program")")
  for name in mtssrv mitsuba; do
    printf '#!/bin/sh\nLD_LIBRARY_PATH="%s:%s/lib" exec "%s" "$@"\n' "$folder" "$folder" "$folder/$name" \
      > "/usr/local/bin/$name"
    chmod 755 "/usr/local/bin/$name"
  done
}

install_mitsuba() {
  rm -f /etc/apt/sources.list.d/mitsuba.list "$state/installed" "$state/build"
  case $package in
    *.tar.gz | *.tgz) fetch "$work/mitsuba.tar.gz"; install_tree "$work/mitsuba.tar.gz"; return ;;
    *.deb) fetch "$work/mitsuba.deb"; package=$work/mitsuba.deb ;;
    */*) fetch "$work/install.sh"; step unpacking; bash "$work/install.sh" < /dev/null; return ;;
    *) (umask 077; echo "$repository" > /etc/apt/sources.list.d/mitsuba.list) ;;
  esac
  update
  step unpacking
  apt_install --reinstall --allow-downgrades "$package"
  # What a package puts into /usr/bin must not stay behind the programs of an unpacked one.
  for name in mtssrv mitsuba; do
    if grep -qs '"/opt/mitsuba/' "/usr/local/bin/$name"; then rm "/usr/local/bin/$name"; fi
  done
  rm -rf /opt/mitsuba
}

# An NVMe instance store comes raw. Only a disk that EC2 itself calls one is formatted, and
# only if it bears no file system, no partition and no mount.
mount_instance_store() {
  for link in /dev/disk/by-id/nvme-Amazon_EC2_NVMe_Instance_Storage*; do
    [ -e "$link" ] || continue
    disk=$(readlink -f "$link")
    [ "$(lsblk --noheadings --raw --output NAME,MOUNTPOINT "$disk" | tr -d ' \n')" = "${disk##*/}" ] || continue
    [ -z "$(wipefs --no-act --noheadings "$disk")" ] || continue
    mkfs.ext4 -q -E nodiscard "$disk"
    mkdir -p "$data"
    mount "$disk" "$data"
    # By UUID: the names of NVMe disks change between boots.
    echo "UUID=$(blkid --match-tag UUID --output value "$disk") $data ext4 defaults,nofail 0 2" >> /etc/fstab
    return 0
  done
}

server_version() {
  (mtssrv -h 2>&1 || true) < /dev/null | grep -ioE 'version [0-9][0-9.]*[0-9]' | head -n 1 | cut -d ' ' -f 2
}

systemctl stop apt-daily.timer apt-daily-upgrade.timer 2> /dev/null || true
systemctl mask --quiet --runtime apt-daily.service apt-daily-upgrade.service 2> /dev/null || true
mkdir -p "$state"
find "$state" -maxdepth 1 -name 'work.*' -mmin +60 -exec rm -rf {} +
work=$(mktemp -d "$state/work.XXXXXX") # its own: an installation whose client has died may still run
trap 'rm -rf "$work"' EXIT
if [ "$(cat "$state/installed" 2> /dev/null)" != "$recipe" ] || [ -z "$(server_version)" ]; then
  install_mitsuba
  mkdir -p /run/mitsuba-cluster
  echo yes > /run/mitsuba-cluster/replaced
fi
getent passwd mitsuba > /dev/null ||
  useradd --system --user-group --home-dir "$data" --no-create-home --shell /usr/sbin/nologin mitsuba
mountpoint -q "$data" || mount_instance_store
mkdir -p "$data"
chown "$user:mitsuba" "$data"
chmod 3775 "$data"  # sticky: the server can't move away what the user put there
step checking
version=$(server_version) || true
if [ -z "$version" ]; then
  code=0
  echo 'mtssrv does not run on this node:'
  mtssrv -h < /dev/null || code=$?
  [ "$code" != 132 ] || echo "it was built for a newer processor than $type has: build it with -march=x86-64"
  exit 1
fi
cd "$work"  # for its log
build=$(python3 -I -c "$learn_build" "$version")
echo "$build" > "$state/build"
echo "$recipe" > "$state/installed"
echo "version $version"
"""


CHECK_PYTHON = "python3 -I -c 'import sys; sys.exit(sys.version_info < (3, 9))'"


def learn_build(arguments: list[str]) -> None:
    """Run on a node: print the build by which mtssrv greets other servers; a build answers its own greeting only.

    The greeting: 2 bytes, the version and a NUL byte, SPECTRUM_SAMPLES, and 1 if it is of double precision. A server
    that greets nobody is taken for the usual build of the version in ARGUMENTS: start's handshake shows whether it is.
    """
    import subprocess

    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    build = [arguments[0], 3, 0]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(BUILD_LIMIT)
        worker = f"127.0.0.1:{listener.getsockname()[1]}"
        server = subprocess.Popen(["mtssrv", "-q", "-p", "1", "-c", worker], **quiet)  # it serves only then
        with contextlib.suppress(OSError):
            stream, _ = listener.accept()
            stream.settimeout(BUILD_LIMIT)
            greeting, more = b"", b"-"
            while more and not (found := re.fullmatch(rb"..([0-9.]+)\0(.)(.)", greeting, re.S)):
                greeting += (more := stream.recv(64))
            if found:
                build = [found[1].decode(), *found[2], *found[3]]
        server.kill()
        server.wait()
    print(*build)


def digest_file(path: Path, kind: str, count: Callable[[int], None] = lambda size: None) -> str:
    """Return a file's digest in hex; COUNT hears of the bytes as they are read."""
    import hashlib

    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()


class Package(NamedTuple):
    """What install puts on the nodes."""

    title: str  # for the user
    source: str  # a name in PKG_REPOSITORY, an https address, or a path here
    sha256: str = ""
    is_file: bool = False  # one that is sent from here


def missing_parts(folder: Path) -> list[str]:
    """Return what FOLDER lacks of a build's dist folder."""
    parts = ("mtssrv", "mitsuba", "plugins", "data", "libmitsuba-*.so")
    return [name for name in parts if not any(folder.glob(name))]


def is_packable_here() -> bool:
    """Tell whether programs of this machine can run on the nodes."""
    return (os.uname().sysname, os.uname().machine) == ("Linux", "x86_64")


def run_tool(program: str, *words: str | Path, **environment: str) -> str:
    """Run a tool of the system on files here; return what it prints, in English, whatever its exit code."""
    import subprocess

    given = clean_environment() | {"LC_ALL": "C"} | environment
    try:
        return subprocess.run([program, *words], env=given, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        raise ClusterError(f"packing a build needs {program}; on Ubuntu: sudo apt-get install -y binutils") from None


def read_binaries(paths: Iterable[Path]) -> dict[str, tuple[set[str], set[str]]]:
    """Return program or library -> (libraries that it needs, names of glibc's versions), of those among PATHS."""
    _, *parts = re.split(r"^(.+):\s+file format (elf\S+)$", run_tool("objdump", "-p", *paths), flags=re.M)
    found = {}
    for path, kind, text in zip(parts[::3], parts[1::3], parts[2::3]):
        if kind != "elf64-x86-64":
            raise ClusterError(f"{path} is not for x86-64 Linux ({kind})")
        needed = set(re.findall(r"^\s+NEEDED\s+(.+)$", text, re.M))
        found[path] = needed, set(re.findall(r"^\s+0x\w+ 0x\w+ \d+ (GLIBC_\w+(?:\.\d+)*)$", text, re.M))
    return found


def find_libraries(folder: Path, files: dict[str, Path]) -> tuple[dict[str, Path], set[str]]:
    """Return the libraries that the build's FILES need besides, by name, and all names of glibc's versions."""
    binaries = read_binaries(files.values())
    search = [str(folder), str(folder / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    listed = run_tool("ldd", *binaries, LD_LIBRARY_PATH=":".join(filter(None, search)))
    found = {name: Path(path) for name, path in re.findall(r"^\t(\S+) => (/.+) \(0x\w+\)$", listed, re.M)}
    known = {Path(name).name for name in files if Path(name).parent.name in ("", "lib")}
    known |= GLIBC_LIBRARIES | GRAPHICS_LIBRARIES
    libraries: dict[str, Path] = {}
    versions: set[str] = set()
    while binaries:
        versions.update(*(named for _, named in binaries.values()))
        fresh = {name: path for path, (needed, _) in binaries.items() for name in needed - known - libraries.keys()}
        for name, path in fresh.items():
            if name not in found:
                raise ClusterError(f"{path} needs {name}, which this machine does not find (nor would a node)")
        libraries |= {name: found[name] for name in fresh}
        binaries = read_binaries(found[name] for name in fresh) if fresh else {}  # objdump without a name reads a.out
    return libraries, versions


def check_glibc(folder: Path, versions: Iterable[str], release: str) -> None:
    """Refuse a build that needs what the glibc of the nodes' Ubuntu RELEASE does not have."""

    def since(name: str) -> tuple[int, ...]:
        number = re.fullmatch(r"GLIBC_([\d.]+)", name)
        return tuple(map(int, number[1].split("."))) if number else GLIBC_ABI.get(name, (99,))

    lacking = {known: [name for name in versions if since(name) > glibc] for known, glibc in GLIBC.items()}
    if names := lacking[release]:
        fit = next((known for known, missing in lacking.items() if not missing), None)
        advice = f'set UBUNTU_RELEASE = "{fit}"' if fit else f"no Ubuntu release has it; build it on Ubuntu {release}"
        raise ClusterError(
            f"the build in {folder} needs {', '.join(sorted(names, key=since))} of a newer glibc than "
            f"Ubuntu {release} has: {advice}"
        )


def write_package(target: Path, files: dict[str, Path]) -> None:
    """Write FILES into a .tar.gz that depends on their names, modes and contents only; whole or not at all."""
    import gzip
    import tarfile

    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with (
            part.open("wb") as raw,
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for name, path in files.items():
                member = tarfile.TarInfo(f"mitsuba/{name}")
                member.size = path.stat().st_size
                member.mode = 0o755 if os.access(path, os.X_OK) else 0o644
                with path.open("rb") as file:
                    archive.addfile(member, file)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def pack_build(folder: Path, settings: Settings) -> Package:
    """Pack a build with all the libraries that it needs into the cache folder; ClusterError says why it can't be."""
    import hashlib

    if not is_packable_here():
        raise ClusterError(
            f"a build can be packed only on x86-64 Linux, as the nodes are; this is {os.uname().sysname} "
            f"{os.uname().machine}: set MITSUBA_PACKAGE to a .deb or .tar.gz that was built on Ubuntu"
        )
    if missing := missing_parts(folder):
        raise ClusterError(f"{folder} is not the dist folder of a Mitsuba build: it lacks {', '.join(missing)}")
    packed = sorted({path for pattern in PACKED for path in folder.glob(pattern) if path.is_file()})
    files = {path.relative_to(folder).as_posix(): path for path in packed}
    libraries, versions = find_libraries(folder, files)
    if settings.AWS_REGION not in settings.AMI_IDS:  # an image of the user's own is asked on the node
        check_glibc(folder, versions, settings.UBUNTU_RELEASE)
    count = format_count(len(files), "file")
    files |= {f"lib/{name}": path for name, path in sorted(libraries.items())}
    content = json.dumps(
        [(name, os.access(path, os.X_OK), digest_file(path, "sha256")) for name, path in files.items()]
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mitsuba-cluster"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"mitsuba-{hashlib.sha256(content.encode()).hexdigest()[:16]}.tar.gz"
    if target.exists():
        os.utime(target)
    else:
        note(f"Packing {folder} …")
        write_package(target, files)
        for old in sorted(cache.glob("mitsuba-*.tar.gz"), key=lambda path: path.stat().st_mtime)[:-PACKED_KEPT]:
            old.unlink(missing_ok=True)
    size = format_size(target.stat().st_size)
    title = f"the build in {folder} ({count} and the libraries that they need; {size})"
    return Package(title, str(target), digest_file(target, "sha256"), True)


def plan_package(settings: Settings) -> Package:
    """Return what is to be installed, packed where it is a build of this machine's; ClusterError where it can't be."""
    source, sha256 = settings.package
    program = shutil.which("mtssrv")
    own = Path(program).resolve().parent if program else None
    if source == "local":
        if not own:
            raise ClusterError('MITSUBA_PACKAGE is "local", but no mtssrv is on PATH; name your build\'s dist folder')
        return pack_build(own, settings)
    if not settings.MITSUBA_PACKAGE:
        # The user's own build is better than a repository that has nothing.
        is_unset = settings.PKG_REPOSITORY in ("", Settings().PKG_REPOSITORY)
        if is_unset and own and is_packable_here() and not missing_parts(own):
            return pack_build(own, settings)
        return Package(f"the package {source} of {settings.PKG_REPOSITORY}", source)
    if "://" in source:
        return Package(source, source, sha256)
    path = settings.folder / Path(source).expanduser()
    if path.is_dir():
        return pack_build(path, settings)
    if not path.is_file():
        raise ClusterError(f"MITSUBA_PACKAGE: there is no file {path}")
    found = digest_file(path, "sha256")
    if sha256 not in ("", found):
        raise ClusterError(f"MITSUBA_PACKAGE: the SHA-256 of {path} is {found}, not {sha256}")
    return Package(f"{path} ({format_size(path.stat().st_size)})", str(path), found, True)


def fetch_address(address: str, method: str = "GET") -> bytes:
    """Return what is at an ADDRESS with user:password@, which urllib by itself takes for a host's name."""
    import base64
    import urllib.parse
    import urllib.request

    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), method=method)  # noqa: S310 - the user's own
    if at:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    with urllib.request.urlopen(request, timeout=ADDRESS_LIMIT) as answer:  # noqa: S310
        return bytes(answer.read())


def index_has(apt_line: str, package: str) -> bool:
    """Tell whether an apt repository offers PACKAGE for amd64; OSError where its index can't be read."""
    import gzip
    import urllib.error

    found = re.fullmatch(r"deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s*(.*)", apt_line)
    if not found:
        raise ValueError("this is no apt line")
    base, suite, components = found[1].rstrip("/"), found[2], found[3].split()
    folders = [f"{base}/dists/{suite}/{component}/binary-amd64" for component in components]
    if suite.endswith("/"):
        folders = [f"{base}/{suite}".rstrip("/")]
    for folder in folders:
        try:  # it is there compressed, or plain, or both
            index = gzip.decompress(fetch_address(f"{folder}/Packages.gz"))
        except urllib.error.HTTPError as error:
            if error.code not in GONE:
                raise
            index = fetch_address(f"{folder}/Packages")
        if re.search(rf"^Package: {re.escape(package)}$".encode(), index, re.M):
            return True
    return False


def check_package(settings: Settings, without: bool) -> str:
    """Return what `install` will install, with a warning if in doubt; ClusterError if nothing, and not WITHOUT it.

    Another warning says how somebody in between could replace Mitsuba, which root installs.
    """
    import urllib.error
    import zlib

    title, is_certain, apt_line = "", True, settings.PKG_REPOSITORY
    try:
        package = plan_package(settings)
        title = package.title
        if "://" in package.source:
            if not package.sha256:
                warn("MITSUBA_PACKAGE has no #sha256=…: whoever can change that file becomes root on your nodes")
            fetch_address(package.source, "HEAD")
        elif not package.is_file:
            if re.match(r"deb\s+\[[^]]*trusted=yes[^]]*\]\s+http://(?!127\.|\S*\.internal[:/])", apt_line):
                warn("PKG_REPOSITORY is neither signed nor https: anybody on the way can replace it; use [signed-by=…]")
            if not index_has(apt_line, "mitsuba"):
                raise ClusterError(f"PKG_REPOSITORY ({apt_line}) has no package mitsuba")
        return title
    except ClusterError as error:
        doubt = error.message
    except (OSError, EOFError, ValueError, zlib.error) as error:
        is_certain = isinstance(error, urllib.error.HTTPError) and error.code in GONE
        doubt = f"{title} can't be read ({error})"
    if title:
        doubt += f"; set MITSUBA_PACKAGE or PKG_REPOSITORY in {Call.settings}"
    if is_certain and not without:
        raise ClusterError(f"install would fail: {doubt} (--without-mitsuba launches all the same)")
    warn(f"{doubt} before you run install" if title else doubt)
    return title


class Installation:
    """The installation of one package on so many NODES; STEP does it on one of them."""

    def __init__(self, settings: Settings, group: str, package: Package, nodes: int, progress: Progress) -> None:
        import hashlib

        self.logs, self.progress, source = log_folder(group), progress, package.source
        self.spread: Spread | None = None
        if package.is_file:  # it is passed on, into a folder in the user's home
            path, sha256 = Path(source), package.sha256
            source = f"{PACKAGE_FOLDER}/{sha256[:16]}-{re.sub(r'[^A-Za-z0-9._+~-]', '_', path.name)}"
            self.spread = Spread([Wanted(source, path.stat().st_size, sha256, sha256, "", {})], [path], nodes)
        recipe = json.dumps([settings.PKG_REPOSITORY, settings.MITSUBA_PACKAGE, package.sha256])
        digest = hashlib.sha256(recipe.encode()).hexdigest()  # the addresses may hold a password
        self.arguments = [settings.SSH_USER, settings.DATA_DIR, package.sha256, digest, node_program(learn_build)]
        self.lines = f"{settings.PKG_REPOSITORY}\n{source}\n".encode()

    def step(self, remote: Remote) -> str:
        """Install Mitsuba on one node; return its version."""
        path = self.logs / f"{remote.node.id}.install.log"
        try:
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as log:
                os.fchmod(log.fileno(), 0o600)  # one of an older version
                code, output = self.run(remote, log.write)
        except OSError as error:
            raise NodeError(f"its log {path} can't be written: {error.strerror}") from error
        version = re.search(r"^version (\S+)$", output, re.M)
        if code or not version:
            why = f"the installation failed ({format_exit(code)})"
            raise NodeError(f"{why}; the whole output: {path}{format_tail(output)}")
        return version[1]

    def run(self, remote: Remote, write: Callable[[bytes], object]) -> tuple[int, str]:
        """Run what a node's installation consists of; WRITE gets all that it says."""
        tell = functools.partial(self.progress.step, remote.node)

        def hear(lines: bytes) -> None:
            write(lines)
            for step in re.findall(rb"^step: (.{0,24})", lines, re.M):
                tell(printable(step.decode("utf-8", "replace")))

        def show(moved: int, whole: int) -> None:
            if moved:
                tell(f"sending {10 * moved // (whole or 1) * 10} %")

        tell("booting")
        wait = user_command("wait-for-boot", WAIT_FOR_BOOT, str(CLOUD_INIT_LIMIT))
        remote.run(wait, limit=CLOUD_INIT_LIMIT + STEP_LIMIT, sink=write)  # what failed in it may not matter
        if remote.run(user_command("check-python", CHECK_PYTHON))[0]:
            raise NodeError("has no Python 3.9 or newer, which this tool needs on its nodes: choose another image")
        check_metadata_rules(remote)
        if self.spread:
            tell("waiting")
            try:
                self.spread.bring(Delivery(remote, ".", show))
            except NodeError as error:
                raise type(error)(f"the package can't be brought to its home folder: {error}") from error
        line = root_command("install", INSTALL, *self.arguments, remote.node.type)
        return remote.run(line, limit=INSTALL_LIMIT, stdin=[self.lines], sink=hear)


@cli.command("install", epilog="Example: ./cluster.py install")
@group_argument
@click.pass_obj
def install(app: App, group: str) -> None:
    """Install Mitsuba and its dependencies on every node."""
    package = plan_package(app.settings)
    nodes = app.open_group(group)
    note(f"Installing {package.title}")
    progress = Progress("Installing", len(nodes), lambda outcome: f"{outcome.node.name}: Mitsuba {outcome.value}")
    installation = Installation(app.settings, group, package, len(nodes), progress)
    outcomes = app.pool.each(nodes, installation.step, progress)
    note(f"Each node's whole output: {installation.logs}")
    app.report(outcomes, "Installed")
    note(f"Next: {command('start', group)}")


# --- start -------------------------------------------------------------------
# The plan and the units that the nodes get, the links to the head; the tunnel. Touches the nodes, and tags their roles.

SERVER_LIMIT = 40  # seconds from starting a server to its handshake
LINK_LIMIT = 0.1  # more for each worker, to which a head connects one after the other
TREE_WORTH = 30  # workers for each Gbit/s of the head, from which on two levels are worth two cores a sub-head
SCENE_GBITS = 4  # of 500 MB
HANDSHAKE_LIMIT = 15  # a whole handshake; up to 0.35 s were seen in mid-render, more where hundreds are asked at once
PROHIBITED = 1  # why sshd opens no channel: SSH_OPEN_ADMINISTRATIVELY_PROHIBITED of RFC 4254
NOT_INSTALLED = "Mitsuba is not installed here; run install first"


def head_rank(node: Node) -> tuple[Any, ...]:
    """What sorts nodes by their fitness for a head: the one that was it, on-demand before spot, the oldest."""
    return node.role != "head", node.market == "spot", node.age


def plan_head(nodes: Sequence[Node]) -> Node:
    """Choose the head."""
    return min(nodes, key=head_rank)


def plan_branches(workers: Sequence[Node]) -> dict[str, list[str]]:
    """Return sub-head -> its workers, by private address, √N of √N each; none where a tree would save no sending."""
    order = [node.private_ip for node in sorted(workers, key=head_rank)]
    count = round(len(order) ** 0.5)
    return {head: order[count + i :: count] for i, head in enumerate(order[:count])} if len(order) > 3 else {}


def plan_head_cores(own: int) -> int:
    """Return how many of its OWN cores a head renders with: two stay free to relay."""
    return max(1, own - 2)


# $1 role, $2 the server's unit (empty: the server stays as it is), $3 the guard's unit, $4 the guard, $5 what makes a
# worker a sub-head. That does not outlast a boot: by then the head has linked its workers itself. A line of input: the
# guard's plan, since a big tree's is longer than the 128 KiB that an argument may have.
START_SERVER = r"""
set -euo pipefail
role=$1 server=$2 guard=$3 program=$4 relay=$5
IFS= read -r plan
units=/etc/systemd/system library=/usr/local/lib/mitsuba-cluster relays=/run/systemd/system/mtssrv.service.d
mkdir -p /etc/mitsuba-cluster $library /run/mitsuba-cluster
printf '%s\n' "$plan" > /etc/mitsuba-cluster/plan.json
printf '%s\n' "$program" > $library/guard.py
printf '%s\n' "$guard" > $units/mitsuba-guard.service
touch /run/mitsuba-cluster/in-use
if [ -n "$server" ]; then
  printf '%s\n' "$server" > $units/mtssrv.service
  rm -rf $relays /run/mitsuba-cluster/linked
  if [ -n "$relay" ]; then mkdir -p $relays; printf '%s\n' "$relay" > $relays/relay.conf; fi
fi
systemctl enable --quiet --no-reload mtssrv.service mitsuba-guard.service
systemctl daemon-reload
if [ -n "$server" ]; then
  rm -f /run/mitsuba-cluster/replaced
  systemctl restart mtssrv.service
fi
systemctl restart mitsuba-guard.service
echo "$role" > /etc/mitsuba-cluster/role
"""

# What the server said last, for an error message.
SERVER_LOG = "journalctl --no-pager --quiet --output cat --lines 20 --unit mtssrv.service"

# No network guard of systemd's own is relied on but for the metadata address; what may connect is the security
# group's business.
SERVER_UNIT = """\
[Unit]
Description=Mitsuba render server ({role})
Wants=network-online.target
After=network-online.target
RequiresMountsFor={data}
StartLimitIntervalSec=0

[Service]
User=mitsuba
Group=mitsuba
UMask=0002
SyslogIdentifier=mtssrv
WorkingDirectory={data}
ExecStart=/usr/bin/env mtssrv -i {address} -l {port}
Restart=always
RestartSec=1
TimeoutStopSec=2
NoNewPrivileges=yes
CapabilityBoundingSet=
PrivateTmp=yes
PrivateDevices=yes
ProtectHome=yes
ProtectSystem=strict
ReadWritePaths={data}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
IPAddressDeny=169.254.169.254 fd00:ec2::254

[Install]
WantedBy=multi-user.target
"""

# What makes it link workers. The filter runs as root, so that nothing of the renderer's can stand in the place of what
# it writes.
LINKS_UNIT = """
[Service]
ExecStartPre=+/usr/bin/python3 -I /usr/local/lib/mitsuba-cluster/guard.py filter
ExecStart=
ExecStart=/usr/bin/env mtssrv -i {address} -l {port} -n {name} -p {cores} -s {linked}
"""


class StartPlan(NamedTuple):
    """What start wants of every node."""

    head: Node
    data: str  # directory
    most: dict[str, int]  # private address -> the cores that the node's own server may announce, by its type
    guard: str  # the program
    gbits: float = 0  # a second that the head sends, where that is known
    client: str = ""  # the head has one, whom no restart may end
    linked: frozenset[str] = frozenset()  # private addresses of the workers that would serve it
    force: bool = False  # whatever client there is
    tree: bool = False  # link in two levels
    levels: bool = False  # in two now, or until now: a worker's line waits for its branch

    def guard_plan(
        self, role: str, own: str, build: str, workers: Iterable[str] = (), branches: dict[str, list[str]] | None = None
    ) -> dict[str, Any]:
        """Return the plan for a node's guard: WORKERS, each with the most cores that it may announce, and BRANCHES."""
        most = {one: self.most.get(one, MOST_CORES) for one in workers}
        for one, branch in (branches or {}).items():
            most[one] = min(MOST_CORES, most[one] + sum(self.most.get(worker, MOST_CORES) for worker in branch))
        plan = {"role": role, "build": build, "own": own, "head": self.head.private_ip}
        return plan | {"workers": most, "branches": branches or {}}


class Served(NamedTuple):
    """What a node's server offers after start."""

    facts: Facts
    cores: int
    action: str
    client: str = ""  # for whom start has left the head as it is


def ask_server(remote: Remote, build: str) -> int:
    """Return the cores that a node's server offers, asked from the node itself.

    NodeError where it does not answer, ClusterError if none can.
    """
    import paramiko

    if not build:
        raise NodeError(NOT_INSTALLED)
    target, source = (remote.node.private_ip, SERVER_PORT), ("127.0.0.1", 0)
    try:
        return handshake(
            lambda limit: remote.transport.open_channel("direct-tcpip", target, source, timeout=limit),
            build,
            HANDSHAKE_LIMIT,
        )[0]
    except AnotherBuild:
        raise NodeError("its mtssrv is another build of Mitsuba than what is installed there") from None
    except TimeoutError:
        raise NodeError("its mtssrv accepts connections, but stays silent") from None
    except ValueError as error:
        raise NodeError(str(error)) from None
    except connection_errors() as error:
        if isinstance(error, paramiko.ChannelException) and error.code == PROHIBITED:
            raise ClusterError(  # no NodeError: another try does not help
                "its sshd forbids forwarding (AllowTcpForwarding in /etc/ssh/sshd_config), which this tool needs"
            ) from None
        raise NodeError("its mtssrv does not answer") from error


def server_step(remote: Remote) -> tuple[Facts, int, str]:
    """Return what a node says of itself, the cores that its server offers, and, where it does not serve, why."""
    facts = fetch_facts(remote)
    try:
        return facts, ask_server(remote, facts.build), ""
    except NodeError as error:
        return facts, 0, str(error)


def find_offer(remote: Remote, facts: Facts, role: str) -> int:
    """Return the cores that a node's server of this ROLE offers; 0 where it has none that answers."""
    if facts.role == role:
        with contextlib.suppress(NodeError):
            return ask_server(remote, facts.build)
    return 0


def refused_mitsuba(version: str) -> str:
    """Say so where the mitsuba on this machine is of another VERSION than the nodes'; else ""."""
    import subprocess

    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        words = ["mitsuba", "-h"]
        done = subprocess.run(words, env=clean_environment(), capture_output=True, timeout=10, check=False)
        found = re.search(rb"version (\d[\d.]*\d)", done.stdout + done.stderr, re.I)
        if found and found[1].decode() != version:
            return f"the mitsuba on this machine is {found[1].decode()}, and the nodes' {version} will refuse it"
    return ""


def say_how_to_connect(app: App, head: Node, served: Served, branches: int) -> None:
    """Tell the user what to type into Mitsuba; the head's name comes last."""
    version, own = served.facts.version, served.facts.cores
    result(f"{head.name}: head, {format_count(served.cores, 'core')} in all, {served.action}")
    if relaying := own - plan_head_cores(own):
        too = f", and so does each of {format_count(branches, 'worker')} with workers of its own" if branches else ""
        note(f"The head keeps {relaying} of its own {format_count(own, 'core')} free to relay{too}")
    if problem := refused_mitsuba(version):
        warn(problem)
    if app.settings.PUBLIC_SERVER_PORT:
        result(f"In Mitsuba {version}: Tools, Settings, Network, Plus: direct connection, port {SERVER_PORT}")
        result(f"On the command line: mitsuba -c {head.name} scene.xml")
    else:
        result(
            f"Port {SERVER_PORT} is closed. Run {command('tunnel', head.group)} and connect Mitsuba {version} to "
            "localhost"
        )
    result(f"Head node: {head.name}")


def describe_client(facts: Facts, silent_for: float = float("inf")) -> str:
    """Return "client 203.0.113.9, silent for 41m" of the client of a head that moved bytes last.

    "" where there is none, or it has been SILENT_FOR longer. A worker's only client is its head, which may be gone.
    """
    if facts.role != "head" or not facts.clients:
        return ""
    silent, peer = min((silent, peer) for peer, (_, silent) in facts.clients.items())
    more = f" (and {len(facts.clients) - 1} more)" if len(facts.clients) > 1 else ""
    text = f"client {peer.rpartition(':')[0]}{more}, silent for {format_duration(silent)}"
    return text if silent <= silent_for else ""


def configure_node(remote: Remote, program: str, guard_plan: dict[str, Any], unit: str = "", relay: str = "") -> None:
    """Give a node's guard its PLAN, with which its idle time begins anew; with a UNIT (re)start its server, too."""
    line = root_command("start-server", START_SERVER, guard_plan["role"], unit, GUARD_UNIT, program, relay)
    remote.check(line, stdin=[json.dumps(guard_plan).encode() + b"\n"])


def look_step(remote: Remote) -> Facts:
    """Learn what a node is; NodeError where Mitsuba is missing."""
    facts = fetch_facts(remote)
    if not facts.build:
        raise NodeError(NOT_INSTALLED)
    return facts


def restart_server(
    plan: StartPlan, remote: Remote, facts: Facts, guard_plan: dict[str, Any], cores: int | None = None
) -> int:
    """(Re)start a node's server, which links the workers of its guard's plan, and wait until it answers.

    Return the cores that it offers, which are to be so many CORES if they are given.
    """
    role, own, workers = guard_plan["role"], guard_plan["own"], guard_plan["workers"]
    place = {"address": own, "port": SERVER_PORT}
    unit, links = SERVER_UNIT.format(role=role, data=plan.data, **place), ""
    if role == "head" or workers:
        name, used = "%H" if role == "head" else f"{RELAY}{own}", plan_head_cores(facts.cores)
        links = LINKS_UNIT.format(name=name, cores=used, linked=LINKED_PATH, **place)
    if role == "head":
        unit, links = unit + links, ""
    configure_node(remote, plan.guard, guard_plan, unit, links)
    deadline = time.monotonic() + SERVER_LIMIT + LINK_LIMIT * len(workers)
    while True:
        try:
            offered = ask_server(remote, facts.build)
            if cores in (None, offered):
                return offered
            problem = f"its mtssrv offers {format_count(offered, 'core')}, not {cores}"
        except NodeError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            log = remote.run(root_command("server-log", SERVER_LOG))[1]
            raise NodeError(f"{problem}{format_tail(log)}")
        time.sleep(0.1)


def worker_step(plan: StartPlan, remote: Remote) -> Served:
    """Make a worker serve, unless it does; a sub-head that serves goes on linking whom it links."""
    facts, own = look_step(remote), remote.node.private_ip
    cores = 0 if facts.replaced else find_offer(remote, facts, "worker")
    action = "serves already" if cores else "started"
    if cores:
        configure_node(remote, plan.guard, plan.guard_plan("worker", own, facts.build, facts.linked))
    elif plan.client and own in plan.linked:
        raise NodeError(f"its mtssrv needs a restart, which would end {plan.client}: start --force does it")
    else:
        facts = replace(facts, linked=(), relays="")
        cores = restart_server(plan, remote, facts, plan.guard_plan("worker", own, facts.build))
    most = max(facts.cores, plan.most.get(own, MOST_CORES))
    if not (0 < cores <= most or facts.relays):
        raise NodeError(f"its mtssrv announces {format_count(cores, 'core')}, and the node has {most}")
    return Served(facts, cores, action)


def link_step(
    plan: StartPlan, workers: Iterable[Outcome[Served]], branches: dict[str, list[str]], remote: Remote
) -> Served:
    """Make the head, or a worker, link its own of those WORKERS that serve, unless it does, or a client would lose it.

    A worker's own are those of its branch, the head's are those of none.
    """
    facts = fetch_facts(remote)  # since the first look minutes of installing and another link may have passed
    own, good = remote.node.private_ip, {one.node.private_ip: one for one in workers if one.ok}
    if mismatches := [one.node.name for one in good.values() if one.value.facts.build != facts.build]:
        raise NodeError(
            f"runs Mitsuba {facts.version}, and these run another build: {', '.join(mismatches)}; run install again"
        )
    if own == plan.head.private_ip:
        wanted = good.keys() - {one for branch in branches.values() for one in branch}
        guard_plan = plan.guard_plan("head", own, facts.build, good, branches)
    else:
        wanted = good.keys() & branches.get(own, ())
        guard_plan = plan.guard_plan("worker", own, facts.build, wanted)
    cores = None
    if wanted or own == plan.head.private_ip:
        cores = plan_head_cores(facts.cores) + sum(good[one].value.cores for one in wanted)
        if cores > MOST_CORES:
            raise NodeError(f"can't link {cores} cores: mtssrv counts to {MOST_CORES} only; use fewer nodes a group")
    offered, client = find_offer(remote, facts, guard_plan["role"]), describe_client(facts)
    if offered == cores and set(facts.linked) == wanted and not facts.replaced:
        configure_node(remote, plan.guard, guard_plan)
        return Served(facts, offered, "serves already")
    if offered and client and not plan.force:
        # A linked worker that SSH can't reach is still the guard's to watch.
        kept = {one: plan.most.get(one, MOST_CORES) for one in facts.linked} | guard_plan["workers"]
        configure_node(remote, plan.guard, guard_plan | {"workers": kept})
        return Served(facts, offered, "serves already", client)
    action = "restarted" if facts.role == "head" else "started"
    lost = ": a render that was running is lost" if client else ""
    cores = restart_server(plan, remote, facts, guard_plan, cores)
    return Served(replace(facts, linked=tuple(wanted)), cores, f"{action}{lost}")


def describe_server(outcome: Outcome[Served]) -> str:
    """Return the line of one worker in start's output."""
    served = outcome.value
    own = f"with {format_count(len(served.facts.linked), 'worker')} of its own, " if served.facts.linked else ""
    return f"{outcome.node.name}: worker, {format_count(served.cores, 'core')}, {own}{served.action}"


def plan_start(
    app: App, nodes: Sequence[Node], looked: Outcome[Facts] | None, tree: bool | None, force: bool = False
) -> StartPlan:
    """Return what every node's server needs; no restart may end the client of a head that was LOOKED at, but by FORCE.

    TREE: None to stay with what was chosen before.
    """
    head, was_tree = plan_head(nodes), any(node.tree for node in nodes)
    types: dict[str, InstanceType] = {}
    with tolerate(loss="the cores that servers announce are not checked"), contextlib.suppress(ClusterError):
        names = sorted({node.type for node in nodes})
        types = dict(zip(names, side_by_side(*(functools.partial(fetch_instance_type, app.ec2, one) for one in names))))
    most = {node.private_ip: types[node.type].cores or MOST_CORES for node in nodes if node.type in types}
    gbits = types[head.type].gbits if head.type in types else 0
    facts = looked.value if looked and looked.ok else Facts(0)
    client = "" if force else describe_client(facts)
    linked = frozenset(node.private_ip for node in nodes) if was_tree else frozenset(facts.linked)
    tree = was_tree if tree is None else tree
    program = node_program(guard_node)
    return StartPlan(head, app.settings.DATA_DIR, most, program, gbits, client, linked, force, tree, tree or was_tree)


def link_branches(
    app: App, plan: StartPlan, looked: Outcome[Facts], workers: Sequence[Outcome[Served]]
) -> tuple[dict[str, list[str]], Sequence[Outcome[Served]], str]:
    """Make the sub-heads of a tree link their workers, and former ones none, unless a client would lose its render.

    Return the branches that there are now, what has become of the WORKERS, and for which client other branches wait.
    """
    build = looked.value.build
    good = {one.node.private_ip: one for one in workers if one.ok and one.value.facts.build == build}
    now = {own: list(one.value.facts.linked) for own, one in good.items() if one.value.facts.relays}
    branches = plan_branches([one.node for one in good.values()]) if plan.tree else {}
    if not now and not branches:
        return {}, workers, ""
    (asked,) = app.pool.each([looked.node], fetch_facts)
    if asked.ok and not plan.force and (client := describe_client(asked.value)):
        same = {own: set(branch) for own, branch in now.items()} == {own: set(one) for own, one in branches.items()}
        return now, workers, "" if same else client
    if asked.ok and asked.value.role == "head":
        # First, since it loses its links to them, and its guard is to link nobody twice then.
        guard_plan = plan.guard_plan("head", looked.node.private_ip, build, good, branches)
        app.pool.each([looked.node], lambda remote: configure_node(remote, plan.guard, guard_plan))
    for some in (now.keys() - branches.keys(), branches.keys()):  # a former sub-head may be another's worker
        heads = [good[own].node for own in some]
        step = functools.partial(link_step, plan, list(good.values()), branches)
        good |= {one.node.private_ip: one for one in app.pool.each(heads, step, Progress("Linking", len(heads)))}
    branches = {own: branch for own, branch in branches.items() if good[own].ok}
    return branches, [good.get(one.node.private_ip, one) for one in workers], ""


def suggest_tree(plan: StartPlan, workers: int) -> None:
    """Name --tree where the head alone would send a big scene to its WORKERS for long."""
    if plan.gbits and not plan.tree and workers / plan.gbits >= TREE_WORTH:
        heads = round(workers**0.5)
        copies = (workers, heads + workers / heads)
        flat, tree = (format_duration(SCENE_GBITS * count / plan.gbits) for count in copies)
        note(
            f"A scene of 500 MB takes the head {flat} to send to {workers} workers at {plan.gbits:g} Gbit/s, and in "
            f"two levels about {tree}: {command('start', plan.head.group, '--tree')}"
        )


def explain_failed_head(head: Outcome[Any], failed: Sequence[str]) -> str:
    """Say what to do where the head does not serve."""
    group = head.node.group
    if head.error == NOT_INSTALLED:
        return f"Mitsuba is not installed on {', '.join(failed)}: {command('install', group)} comes first"
    ways = f"{command('terminate', head.node.id)}, then {command('start', group)}, makes another node the head"
    return f"the head node does not serve; failed: {', '.join(failed)}. If it stays so: {ways}"


def explain_waiting(plan: StartPlan, client: str, alone: int, other_branches: bool) -> str:
    """Say what waits for CLIENT to leave (ALONE workers without links, OTHER_BRANCHES, or the head), and what to do."""
    levels = ["--tree" if plan.tree else "--flat"] if other_branches else []
    again = command("start", plan.head.group, *levels)
    what, does, later = "the head waits to be restarted", "does that", f"{again} once it has left"
    if other_branches:
        what = "the nodes wait to be linked in another way"
    elif alone:  # the guard links nodes by itself, and does nothing else
        what = f"{format_count(alone, 'node')} {'waits' if alone == 1 else 'wait'} to be linked"
        does, later = "links them", "they join when it leaves"
    return f"{what}: {client}; {again} --force {does} now and ends that client, else {later}"


def link_group(app: App, plan: StartPlan, looked: Outcome[Facts], workers: Sequence[Outcome[Served]]) -> None:
    """Link the WORKERS that serve to the head, note the roles, and say how to connect; ClusterError for what failed."""
    head, waits_for = looked.node, ""  # it knows its public name by now
    own = {one.node.private_ip: one.value.facts.cores for one in workers if one.ok}  # which may exceed the types'
    most = {one: max(cores, plan.most.get(one, MOST_CORES)) for one, cores in own.items()}
    plan = plan._replace(most=plan.most | most)
    branches: dict[str, list[str]] = {}
    ready: Outcome[Any] = looked
    if looked.ok:
        branches, workers, waits_for = link_branches(app, plan, looked, workers)
    for one in workers if plan.levels else ():
        if one.ok:
            result(describe_server(one))
    if looked.ok:
        (ready,) = app.pool.each([head], functools.partial(link_step, plan, workers, branches), Progress("Linking", 1))
    good = [one.node for one in workers if one.ok]
    tag_nodes(app.ec2, [head] if ready.ok and head.role != "head" else [], TAG_ROLE, "head")
    tag_nodes(app.ec2, [node for node in good if node.role != "worker"], TAG_ROLE, "worker")
    if not waits_for:
        others = [node for node in (head, *(one.node for one in workers)) if node.tree != plan.tree]
        tag_nodes(app.ec2, others, TAG_TREE, "yes" if plan.tree else "no")
    failed = [one.node.name for one in [*workers, ready] if not one.ok]
    if not ready.ok:
        raise ClusterError(explain_failed_head(ready, failed))
    suggest_tree(plan, len(workers))
    say_how_to_connect(app, head, ready.value, len(branches))
    problems, client = [], waits_for or ready.value.client
    linked = {*ready.value.facts.linked, *(one for branch in branches.values() for one in branch)}
    alone = sum(node.private_ip not in linked for node in good) if client else 0
    if failed:
        count = len(workers) + 1
        serving = f"{count - len(failed) - alone} of {format_count(count, 'node')} serving"
        problems.append(f"{serving}; failed: {', '.join(failed)}")
    if client:
        problems.append(explain_waiting(plan, client, alone, bool(waits_for)))
    if problems:
        raise ClusterError("; ".join(problems))


def start_group(app: App, nodes: Sequence[Node], force: bool, tree: bool | None = None) -> None:
    """Make the servers of NODES serve, linked to one head; FORCE: even if the head's client is lost by it."""
    head = plan_head(nodes)
    others = [node for node in nodes if node.id != head.id]
    (looked,) = app.pool.each([head], look_step, Progress("Asking", 1))
    plan = plan_start(app, nodes, looked, tree, force)
    progress = Progress("Starting", len(others), None if plan.levels else describe_server)
    link_group(app, plan, looked, app.pool.each(others, functools.partial(worker_step, plan), progress))


tree_option = click.option(
    "--tree/--flat",
    default=None,
    help="Link the nodes in two levels, so that a scene goes out faster, or all to the head; kept for later runs.",
)


@cli.command("start", epilog="Example: ./cluster.py start")
@group_argument
@tree_option
@click.option("--force", is_flag=True, help="Restart the head even if a client is connected, who loses it.")
@click.pass_obj
def start(app: App, group: str, tree: bool | None, force: bool) -> None:
    """Start Mitsuba's servers; the last line names the head node."""
    start_group(app, app.open_group(group), force, tree)


@contextlib.contextmanager
def open_tunnel(head: Node, settings: Settings, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Forward a PORT of this machine to HEAD's server inside the with block; ClusterError where ssh can't."""
    import subprocess

    options = ["-N", "-L", f"127.0.0.1:{port}:{head.private_ip}:{SERVER_PORT}", "-o", "ExitOnForwardFailure=yes"]
    # ssh runs the local command once its port listens: nobody needs to connect to it to find that out.
    options += ["-o", "PermitLocalCommand=yes", "-o", "LocalCommand=echo listening"]
    with ssh_command(head, settings, *options) as words:
        ssh = subprocess.Popen(words, env=clean_environment() | {"SHELL": "/bin/sh"}, stdout=subprocess.PIPE)
        try:
            if not (ssh.stdout and ssh.stdout.readline()):
                raise ClusterError(f"{head.name}: ssh can't open the tunnel ({format_exit(ssh.wait())})")
            yield ssh
        finally:
            ssh.terminate()


@cli.command("tunnel", epilog="Example: ./cluster.py tunnel")
@group_argument
@click.option(
    "--port",
    type=Number(1, 65535, whole=True),
    metavar="PORT",
    default=SERVER_PORT,
    show_default=True,
    help="Local port.",
)
@click.pass_obj
def tunnel(app: App, group: str, port: int) -> None:
    """Forward localhost:7554 to the head's server over SSH."""
    app.open_group(group)
    head = find_head(app, group)
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        problem = f"port {port} of this machine is taken ({error.strerror}); choose another: --port"
        raise ClusterError(problem) from error
    app.left = f"The tunnel is closed. {app.left}"
    with open_tunnel(head, app.settings, port) as ssh:
        result(f"In Mitsuba: direct connection to localhost, port {port} (or: mitsuba -c localhost:{port} scene.xml)")
        note(f"Forwarding to {head.name} until Ctrl-C")
        code = ssh.wait()
    raise ClusterError(f"{head.name}: ssh ended ({format_exit(code)}); run {command('tunnel', group)} again")


# --- up ----------------------------------------------------------------------
# createNodes, install and start in one, with no barrier between nodes. Touches what they touch; ends only nodes of
# its own launch.

COUNT_POLLS = 60  # at most, until two agree
LIST_LAG = 5  # seconds after a launch until lists show all of it: users report 1 to 5
BOARD_LINES = 12  # of nodes, on a terminal: fewer than the smallest one has


class Board(Progress):
    """On a terminal a line a node with its present step, and one for the whole; in a pipe a line a step that ends."""

    def __init__(self, nodes: Sequence[Node], line: Callable[[Outcome[Any]], str], ended: Container[str] = ()) -> None:
        super().__init__("Up", len(nodes), line)
        self.ended = ended  # ids of nodes of which nothing is said any more
        self.steps = {node.id: "waiting for its address" for node in nodes}
        self.since = {node.id: (self.began, node.name) for node in nodes}

    def step(self, node: Node, text: str) -> None:
        """Note what NODE does now; one that has finished does nothing any more."""
        with OUTPUT:
            before = self.steps.get(node.id, text)
            if before != text:
                self.steps[node.id], self.since[node.id] = text, (time.monotonic(), node.name)
                if before == "booting" and not is_terminal():
                    note(f"{node.name}: has booted")
        self.redraw()

    def finished(self, outcome: Outcome[Any]) -> None:
        """Count a node, and print its line, unless this run has ended it again."""
        if outcome.node.id not in self.ended:
            return super().finished(outcome)
        with OUTPUT:
            self.total -= 1
            self.steps.pop(outcome.node.id, None)
            return None

    def redraw(self) -> None:
        """Draw the nodes that wait longest, as far as there is room, and the whole; in a pipe a line a minute."""
        if not is_terminal():
            return super().redraw()
        now, room = time.monotonic(), min(BOARD_LINES, shutil.get_terminal_size().lines - 3)
        with OUTPUT:
            waiting = sorted((*self.since[name], step) for name, step in self.steps.items())
            lines = [f"{name}: {step}, {format_duration(now - since)}" for since, name, step in waiting[:room]]
            steps = [step for _, _, step in waiting[room:]]
            more = "".join(f", {steps.count(step)} more {step}" for step in dict.fromkeys(steps))
            nodes = f"{self.done}/{format_count(self.total, 'node')}"
            return draw(*lines, f"Up: {nodes}{more}, {format_duration(now - self.began)}")


def poll_nodes(ec2: Client, group: str, known: Sequence[Node] = ()) -> list[Node]:
    """Return GROUP's nodes that run or will, oldest first, with those KNOWN that the list does not show yet."""
    listed = {node.id: node for node in fetch_nodes(ec2, group)}
    nodes = [node for node in listed.values() if node.is_inside and node.state in ("pending", "running")]
    unseen = [node for node in known if node.id not in listed]
    return sorted([*nodes, *unseen], key=lambda node: (node.launched, node.id))


def count_nodes(ec2: Client, group: str, known: Sequence[Node], lag: float = POLL) -> list[Node]:
    """Return GROUP's nodes when LAG seconds are over and two polls agree, of which the first is what was KNOWN."""
    nodes = list(known)
    for pause in (lag, *[POLL] * COUNT_POLLS):
        time.sleep(pause)
        before, nodes = nodes, poll_nodes(ec2, group, known)
        if {node.id for node in before} == {node.id for node in nodes}:
            break
    return nodes


def end_excess(ec2: Client, nodes: Sequence[Node], count: int, token: str, ended: set[str]) -> list[Node]:
    """Return the COUNT oldest of a group's NODES; end those of this launch, known by their TOKEN, that are more.

    Another up, or one that was killed a moment ago, may have launched nodes that no list showed yet. Each up
    ends nodes of its own only, and all of them sort alike, so that exactly COUNT remain. ENDED gets the ids.
    """
    if excess := [node for node in nodes[count:] if token and node.token.startswith(token)]:
        ended.update(node.id for node in excess)
        terminate_young(ec2, excess)
        note(f"{format_count(len(excess), 'node')} of this launch ended again: the group had others by then")
    return list(nodes[:count])


def find_or_launch(app: App, request: LaunchRequest, again: str) -> tuple[list[Node], str, str]:
    """Return the request's nodes, the missing ones launched, why they are fewer, and the token of the launch."""
    from botocore.exceptions import BotoCoreError, ClientError

    where, group, count = app.where(request.group), request.group, request.count
    tell = result if request.dry_run else note
    nodes, plan = poll_nodes(app.ec2, group), None
    if len(nodes) < count:
        nodes, plan = side_by_side(
            functools.partial(count_nodes, app.ec2, group, nodes), functools.partial(make_plan, app, request)
        )
    app.check_owner(group, nodes, request.others)
    if others := [node for node in nodes if node.type != request.instance_type]:
        types = ", ".join(sorted({node.type for node in others}))
        tell(f"{format_count(len(others), 'node')} of another type ({types}) in {where}: counted all the same")
    if not plan or len(nodes) >= count:
        more = f", more than {count}: none is ended" if len(nodes) > count else ""
        tell(f"{where} has {format_count(len(nodes), 'node')}{more}; none is created")
        return nodes, "", ""
    plan = plan._replace(request=replace(plan.request, count=count - len(nodes)), present=nodes)
    for line in describe(app, plan):
        tell(line)
    if request.dry_run:
        return [], "", ""
    ways = f"{again} goes on with them, {command('terminateAll', group)} ends them"
    try:
        launched, why, token = launch_plan(app, plan, ways)
    except (ClusterError, BotoCoreError, ClientError) as error:
        if not nodes:
            raise
        return nodes, explain(error), ""
    return [*nodes, *launched], why, token


def up_step(installation: Installation, plan: StartPlan, remote: Remote) -> Served:
    """Take one node from its boot to its server, whatever the others do; of the head only learn what it is."""
    version = installation.step(remote)
    if not is_terminal():
        note(f"{remote.node.name}: Mitsuba {version}")
    installation.progress.step(remote.node, "starting its server")
    return Served(look_step(remote), 0, "") if remote.node.id == plan.head.id else worker_step(plan, remote)


def bring_up(
    app: App, group: str, nodes: Sequence[Node], package: Package, tree: bool | None, ended: Container[str]
) -> tuple[StartPlan, list[Outcome[Served]]]:
    """Install and start what is missing on each of NODES; return the plan for the head's link, and their outcomes.

    Nothing is said of those that are ENDED meanwhile.
    """
    head = plan_head(nodes)
    looked = app.pool.each([head], look_step, limit=LOOK_LIMIT)[0] if head.role == "head" else None
    plan = plan_start(app, nodes, looked, tree)
    quiet = {node.id for node in nodes} if plan.levels else {head.id}  # their lines come when they are linked
    board = Board(nodes, lambda outcome: "" if outcome.node.id in quiet else describe_server(outcome), ended)
    # For one node: whoever comes first need not wait for the others.
    step = functools.partial(up_step, Installation(app.settings, group, package, 1, board), plan)
    return plan, await_nodes(app, group, nodes, step, board)


def link_up(app: App, plan: StartPlan, outcomes: Sequence[Outcome[Served]]) -> None:
    """Link the nodes that serve; ClusterError for what has failed. Any of them can be a new group's head."""
    head = next(outcome for outcome in outcomes if outcome.node.id == plan.head.id)
    workers = [outcome for outcome in outcomes if outcome is not head]
    good = [outcome.node for outcome in workers if outcome.ok]
    if head.ok or plan.head.role == "head" or not good:  # the head that the user knows is not replaced unasked
        looked = Outcome(head.node, head.value.facts) if head.ok else Outcome[Facts](head.node, error=head.error)
        return link_group(app, plan, looked, workers)
    start_group(app, good, force=False, tree=plan.tree)
    failed = ", ".join(outcome.node.name for outcome in outcomes if not outcome.ok)
    raise ClusterError(f"{len(good)} of {format_count(len(outcomes), 'node')} serving; failed: {failed}")


@cli.command("up", epilog="Example: ./cluster.py up c1.xlarge 8")
@launch_options(spot_option)
@tree_option
@click.pass_obj
def up(app: App, /, tree: bool | None, **asked: Any) -> None:
    """Create, install and start what GROUP lacks of COUNT nodes.

    Run it again to complete or mend the group, whatever became of the first run.
    """
    again = f"{Call.program} {shlex.join(sys.argv[1:])}"  # with its options, which a second run needs, too
    package = plan_package(app.settings)
    request = LaunchRequest(**asked)
    group, count = request.group, request.count
    nodes, why, token = find_or_launch(app, request, again)
    if request.dry_run:
        return
    app.left = f"{again} goes on; the nodes keep running and cost money until {command('terminateAll', group)}."
    if not token:  # as a launch does
        groups, cidr = fetch_security_groups(app.ec2, group), try_client_cidr(app.settings)
        app.allow_access(groups, cidr)
        app.warn_of_rules(groups, cidr)
    most, ended = max(count, len(nodes)), set[str]()

    def keep_count(count_all: Callable[[], list[Node]]) -> list[Node]:
        with tolerate(loss="the nodes could not be counted once more"):
            return end_excess(app.ec2, count_all(), most, token, ended)
        return nodes

    while True:
        if not (mine := app.ours(nodes)):
            raise ClusterError(f"no node of {app.where(group)} was launched with your SSH key")
        work: list[Callable[[], Any]] = [functools.partial(bring_up, app, group, mine, package, tree, ended)]
        if token:  # beside the work, which waits for no list
            late = functools.partial(count_nodes, app.ec2, group, nodes, LIST_LAG)
            work.append(functools.partial(keep_count, late))
        (plan, outcomes), *_ = side_by_side(*work)
        nodes = keep_count(functools.partial(poll_nodes, app.ec2, group, nodes))
        kept = {node.id for node in nodes if is_ours(node, app.identity)}
        if plan.head.id in kept and kept <= {outcome.node.id for outcome in outcomes}:
            break
    outcomes = [one for one in outcomes if one.node.id in kept or not (one.ok or one.node.id in ended)]
    try:
        link_up(app, plan, outcomes)
    except ClusterError as error:
        raise ClusterError(f"{error.message}; {again} tries again") from error
    if why or len(nodes) < count:
        has = f"the group has {len(nodes)} of {format_count(count, 'node')}{f' ({why})' if why else ''}"
        raise ClusterError(f"{has}; {again} makes the others")


# --- render ------------------------------------------------------------------
# This machine's own Mitsuba renders against the head, again and again until the picture is there. Runs
# programs and writes pictures here, asks the nodes, and ends the group where it is told to.

RENDER_POLL = 10  # seconds between two questions to the head beside a render
RENDER_SILENCE = 60  # seconds without its answer after which a render is lost: Mitsuba itself waits without end
HEAL_LIMIT = 900  # seconds for a head to serve (again): a reboot, a frozen worker, this machine's own network
HEAL_POLL = 2  # seconds between two polls of it
FROZEN_LIMIT = 300  # of a head's silence, longer than a reboot, after which another node takes its place
MOST_DEATHS = 2  # of the servers under one scene, with every node as it was
RENDER_TAIL = 1 << 14  # bytes of Mitsuba's output that are kept

# $1 since when
RENDER_LOG = 'journalctl --no-pager --quiet --output cat --lines 10000 --unit mtssrv.service --since "$1"'

# Texts of Mitsuba 0.6 (mitsuba.cpp, thread.cpp, renderjob.cpp, sched_remote.cpp): an exception, and those that
# only tell that the other side has gone (sstream.cpp).
MITSUBA_ERROR = re.compile(
    r'(?:critical|uncaught|caught) exception:? *"?(.+?)[".!]*(?: - cleaning up!.*)?$', re.I | re.M
)
CONNECTION_ERROR = re.compile(r"connection closed|connection error|error in \w+\(\)|invalid response", re.I)
PICTURES = (".exr", ".rgbe", ".pfm", ".png", ".jpg", ".m", ".npy")  # what its films write
UNFINISHED = "did not complete successfully"


class Attempt(NamedTuple):
    """How one run of Mitsuba ended."""

    code: int
    output: str  # the end of it
    ended: str = ""  # why the tool has ended it


def find_error(log: str) -> str:
    """Return the last error in what a Mitsuba program has said that is not about a connection, or ""."""
    found = [text for text in MITSUBA_ERROR.findall(log) if not CONNECTION_ERROR.search(text)]
    return printable(found[-1]) if found else ""


def has_restarted(facts: Facts, started: str) -> bool:
    """Tell whether a server has started anew since it STARTED; systemd may not tell for a moment ("")."""
    return "" not in (facts.started, started) and facts.started != started


def judge(
    attempt: Attempt, before: dict[str, Facts], after: dict[str, Facts | str], server_error: str
) -> tuple[str, str]:
    """Say why an attempt has failed, from what each node said BEFORE it, and what it says or is AFTER it.

    Returns what is to blame (the cluster: it is worth another try; a server; or the scene), and the reason.
    A head, or a sub-head, restarts without a worker that it has lost and with one that has come back; it does so too
    after its own death or a worker's, which a scene can cause.
    """
    lost = [f"{name} {facts}" for name, facts in after.items() if isinstance(facts, str)]
    now = {name: facts for name, facts in after.items() if isinstance(facts, Facts)}
    lost += [f"{name} has rebooted" for name in now if now[name].boot != before[name].boot]
    if lost or attempt.ended:
        return "cluster", ", ".join(lost) or attempt.ended
    died = [name for name in now if has_restarted(now[name], before[name].started)]
    heads = [name for name in died if now[name].role == "head" or before[name].relays]
    changed = [name for name in heads if now[name].linked != before[name].linked]
    if changed and died == heads:
        return "cluster", f"{changed[0]} was restarted to link other workers"
    if server_error or died:
        return "server", server_error or f"mtssrv died on {', '.join(died)}"
    if said := find_error(attempt.output):
        return "scene", f"Mitsuba refuses it: {said}"
    if attempt.code > 0:
        return "cluster", "the connection to the head broke"
    return "server", "Mitsuba wrote no whole picture" if not attempt.code else "this machine's mitsuba was killed"


class RenderCluster:
    """A group as its renders see it: they must outlive the user's session with AWS."""

    def __init__(self, app: App, group: str) -> None:
        self.app, self.group = app, group
        self.nodes = app.open_group(group)
        self.frozen: set[str] = set()  # ids of heads that were given up

    @property
    def running(self) -> list[Node]:
        """The nodes that run, as far as EC2 has told."""
        return [node for node in self.nodes if node.state == "running"]

    def refresh(self) -> None:
        """Ask EC2 about the nodes anew, and renew this machine's access to them, as far as AWS answers."""
        app, group = self.app, self.group
        with tolerate(), contextlib.suppress(ClusterError):
            found = [node for node in fetch_nodes(app.ec2, group) if node.id not in self.frozen]
            self.nodes = [node for node in found if is_ours(node, app.identity)]
            app.allow_access(fetch_security_groups(app.ec2, group), fetch_client_cidr(app.settings))

    def await_head(self) -> tuple[Node, Facts, int]:
        """Wait until the head serves; return it, what it says of itself, and its cores; NodeError if none does.

        A head that is gone, or frozen for good, is replaced as start does it.
        """
        began = time.monotonic()
        progress = Progress("Waiting for the head", 0)
        while True:
            waited, problem = time.monotonic() - began, "no node is left"
            if head := next((node for node in self.running if node.role == "head"), None):
                (outcome,) = self.app.pool.each([head], server_step, limit=LOOK_LIMIT)
                facts, cores, problem = outcome.value if outcome.ok else (Facts(0), 0, outcome.error)
                if not problem:
                    return head, facts, cores
                problem = f"{head.name}: {problem}"
                if outcome.silent and waited > FROZEN_LIMIT:
                    self.give_up(head)
            elif self.running:
                problem = "the head node is gone"
                note("The head node is gone: another node becomes the head")
                with tolerate(), contextlib.suppress(ClusterError):
                    start_group(self.app, self.running, force=False)
            if waited > HEAL_LIMIT or not self.running:
                raise NodeError(f"no head serves: {problem}")
            progress.show(problem.splitlines()[0])
            time.sleep(HEAL_POLL)
            self.refresh()

    def give_up(self, head: Node) -> None:
        """Let a silent HEAD be none any more, if any other node answers: else this machine's network is to blame."""
        if any(isinstance(facts, Facts) for facts in self.ask_nodes(self.running).values()):
            note(f"{head.name} is frozen; it costs money until {command('terminate', head.id)}")
            with tolerate():
                tag_nodes(self.app.ec2, [head], TAG_ROLE, "worker")
                self.frozen.add(head.id)

    def ask_nodes(self, nodes: Sequence[Node]) -> dict[str, Facts | str]:
        """Return, by name, what each of NODES says of itself, or what has become of it."""
        found: dict[str, Facts | str] = {node.id: f"is {node.state} {node.reason}".strip() for node in self.nodes}
        for outcome in self.app.pool.each(self.running, fetch_facts, limit=LOOK_LIMIT):
            found[outcome.node.id] = outcome.value if outcome.ok else "does not answer"
        return {node.name: found.get(node.id, "is gone") for node in nodes}  # EC2 knows no name of one that has ended

    def server_errors(self, before: dict[str, Facts]) -> str:
        """Return what servers have complained about in their logs since their nodes told BEFORE what time it was."""

        def step(remote: Remote) -> str:
            since = root_command("server-log", RENDER_LOG, f"@{before[remote.node.name].clock}")
            return find_error(remote.run(since, keep=MIB)[1])

        nodes = [node for node in self.running if node.name in before]
        outcomes = self.app.pool.each(nodes, step, limit=LOOK_LIMIT)
        return "; ".join(f"mtssrv on {o.node.name}: {o.value}" for o in outcomes if o.ok and o.value)


@contextlib.contextmanager
def mitsuba_address(app: App, head: Node, through_ssh: bool) -> Iterator[str]:
    """Yield what Mitsuba is to connect to: the head, or this end of a tunnel to it."""
    if not through_ssh and app.settings.PUBLIC_SERVER_PORT:
        yield head.address
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open_tunnel(head, app.settings, port):
        yield f"127.0.0.1:{port}"


def run_mitsuba(pool: NodePool, words: Sequence[str], head: Node, started: str) -> Attempt:
    """Run Mitsuba and show what it says; end it when the head is silent or has started again since STARTED."""
    import subprocess

    tail = bytearray()

    def show(output: Any) -> None:
        with output:
            while block := output.read(RENDER_TAIL):
                with contextlib.suppress(OSError):  # a reader that has gone must not stop Mitsuba
                    put(block, err=True)
                tail[:] = (tail + block)[-RENDER_TAIL:]

    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(
        ["mitsuba", *words], env=clean_environment(), bufsize=0, stdin=nothing, stdout=pipe, stderr=subprocess.STDOUT
    )
    reader = threading.Thread(target=show, args=(child.stdout,), daemon=True)
    reader.start()
    ended, heard = "", time.monotonic()
    try:
        while not ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(RENDER_POLL)
                break
            (outcome,) = pool.each([head], fetch_facts, limit=RENDER_POLL)
            if outcome.ok and has_restarted(outcome.value, started):
                break
            if outcome.ok:
                heard = time.monotonic()
            elif time.monotonic() - heard > RENDER_SILENCE:
                ended = f"{head.name} was silent for {format_duration(RENDER_SILENCE)}"
    finally:
        child.kill()
        code = child.wait()
        reader.join(1)
        if tail and not tail.endswith(b"\n"):
            with contextlib.suppress(OSError):
                note("")  # a progress bar has no end of line
    return Attempt(code, tail.decode("utf-8", "replace"), ended)


def render_scene(
    cluster: RenderCluster, scene: Path, target: Path, words: Sequence[str], tries: int, through_ssh: bool
) -> bool:
    """Render one scene, as often as it is worth it; return whether its picture is there."""
    import tempfile

    there = [picture for picture in map(target.with_suffix, PICTURES) if picture.exists()]
    if there and "-x" in words:  # Mitsuba itself would look into the new folder that it writes to
        result(f"{there[0]}: there already")
        return True
    deaths = 0
    for number in range(1, tries + 1):
        head, facts, cores = cluster.await_head()
        before = {name: one for name, one in cluster.ask_nodes(cluster.running).items() if isinstance(one, Facts)}
        nodes = [node for node in cluster.running if node.name in before]
        note(f"{scene}: rendering on {format_count(cores, 'core')}")
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            own = ["-o", f"{folder}/{target.name}", *words, str(scene)]
            try:
                with mitsuba_address(cluster.app, head, through_ssh) as address:
                    attempt = run_mitsuba(cluster.app.pool, ["-c", address, *own], head, facts.started)
            except ClusterError as error:
                attempt = Attempt(-1, "", error.message)
            took = format_duration(time.monotonic() - began)
            pictures = list(Path(folder).iterdir())
            if attempt.code == 0 and pictures and UNFINISHED not in attempt.output:
                for picture in pictures:
                    result(f"{picture.replace(target.parent / picture.name)}: rendered in {took}")
                return True
        cluster.refresh()
        cluster.await_head()
        blame, reason = judge(attempt, before, cluster.ask_nodes(nodes), cluster.server_errors(before))
        deaths += blame == "server"
        if blame == "scene" or deaths == MOST_DEATHS or number == tries:
            break
        note(f"{scene}: {took} lost: {reason}; trying again ({number + 1} of {tries})")
    note(f"{scene}: {took} lost: {reason}; given up")
    return False


@cli.command("render", cls=OwnWords, epilog="Example: ./cluster.py render scenes/*.xml --then-terminate -- -p 0")
@click.argument(
    "scenes", metavar="SCENE…", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("-o", "output", type=click.Path(path_type=Path), help="The picture, as Mitsuba's -o; of one scene.")
@click.option("--group", type=GroupName(), default="default", show_default=True)
@click.option("--tunnel", "through_ssh", is_flag=True, help="Through SSH, even where port 7554 is open.")
@click.option("--tries", type=Number(1, 1000, whole=True), default=5, show_default=True, help="Of each scene.")
@click.option("--then-terminate", is_flag=True, help="In the end, terminate the group.")
@click.pass_obj
def render(
    app: App, /, scenes: tuple[Path, ...], output: Path | None, group: str, then_terminate: bool, **options: Any
) -> None:
    """Render each SCENE with your mitsuba, again if nodes die.

    After -- come Mitsuba's own options; -x there skips a scene that has its picture.
    """
    if any(word.startswith("-o") for word in options["words"]) or (output and len(scenes) > 1):
        raise click.UsageError("-o comes before --, and with one scene only: Mitsuba would overwrite the picture")
    # The film puts its own extension in place of the last one.
    targets = [(output or scene.with_suffix(".exr")).absolute() for scene in scenes]
    whole = list(map(os.path.abspath, targets))
    if twice := [Path(target) for target in whole if whole.count(target) > 1]:
        raise click.UsageError(f"two scenes would write the same picture, {twice[0].with_suffix('')}")
    if not shutil.which("mitsuba"):
        raise ClusterError("there is no mitsuba on this machine's PATH, and it is what reads the scene")
    if refused := [target.parent for target in targets if not os.access(target.parent, os.W_OK)]:
        raise ClusterError(f"no picture can be written to {refused[0]}")
    cluster = RenderCluster(app, group)
    if not any(node.role == "head" for node in cluster.nodes):
        raise ClusterError(f"{app.where(group)} has no head node; {command('start', group)} makes one. {app.left}")
    app.left = f"Only the render has ended. {app.left}"
    missing, failure = list(scenes), None
    try:
        if problem := refused_mitsuba(cluster.await_head()[1].version):
            raise ClusterError(problem)
        for scene, target in zip(scenes, targets):
            if render_scene(cluster, scene, target, **options):
                missing.remove(scene)
    except NodeError as error:
        mend = f"{command('up', 'TYPE', 'COUNT', group)} makes new nodes"
        if cluster.running:
            mend = f"{command('terminate', 'NODE')}, then up, replaces a node that stays silent"
        note(f"Given up: {error}; {mend}")
    except Exception as error:  # whatever it is, the nodes must not run on unattended
        failure = error
    if then_terminate:
        terminate_in(app, app.ec2, group, others=False)
    if failure:
        raise failure
    if missing:
        raise ClusterError(f"{len(missing)} of {len(scenes)} pictures missing: {', '.join(map(str, missing))}")


# --- status ------------------------------------------------------------------
# What runs, since when, and what it costs. Touches AWS; the nodes only where they are to be asked.

ANSWER_LIMIT = 5  # for a node's whole answer to status
ANSWER_RATE = 50  # nodes that this machine can surely ask in a second
WATCH_SECONDS = 3  # between two polls of --watch
SERVER_WORDS = {  # colour, meaning
    "serving": ("green", "it renders"),
    "unlinked": ("yellow", "a worker that its head does not use"),
    "down": ("red", "mtssrv does not answer, or not as it should"),
    "silent": ("red", "the node itself does not answer"),
}


class GroupState(NamedTuple):
    """What there is of one group in a region; of the nodes that have ended only those that EC2 itself ended."""

    name: str
    region: str
    nodes: list[Node]
    requests: list[SpotRequest]
    security_groups: list[SecurityGroup]

    @property
    def present(self) -> list[Node]:
        """The nodes that are not terminated."""
        return [node for node in self.nodes if node.state in ALIVE]


def fetch_groups(group: str | None, ec2: Client) -> list[GroupState]:
    """Return what there is of GROUP (None: of all groups), by three calls side by side."""
    nodes, requests, security_groups, _ = side_by_side(
        lambda: in_order(node for node in fetch_nodes(ec2, group) if node.state in ALIVE or node.reason),
        lambda: fetch_spot_requests(ec2, group),
        lambda: fetch_security_groups(ec2, group),
        lambda: importlib.import_module("paramiko"),  # a sixth of a second that AWS's answers take anyway
    )
    present = [*(node for node in nodes if node.state in ALIVE), *live(requests), *security_groups]
    kinds = (nodes, requests, security_groups)
    return [
        GroupState(name, ec2.meta.region_name, *([one for one in kind if one.group == name] for kind in kinds))
        for name in sorted({one.group for one in present})
    ]


class Asked(NamedTuple):
    """What one node says of itself and its server: the fields of `status --servers --json`."""

    server: str  # one of SERVER_WORDS
    server_text: str  # the same as a sentence
    load: tuple[float, ...] | None = None
    server_cores: int | None = None
    idle: float | None = None  # seconds
    clients: Sequence[dict[str, Any]] = ()  # of a head: the Mitsubas that are connected to it
    restarts: int | None = None


def judge_server(outcome: Outcome[tuple[Facts, int, str]], above: dict[str, Node]) -> Asked:
    """Say in words and numbers what one node's server does, ABOVE which those are that link it."""
    if not outcome.ok:
        return Asked("silent" if outcome.silent else "down", outcome.error)
    node, (facts, cores, problem) = outcome.node, outcome.value
    over = above.get(node.private_ip)
    if problem:
        word, text = "down", problem
    elif facts.role == "worker" and not over:
        word, text = "unlinked", f"up but not linked: run {command('start', node.group)}"
    else:
        through = f", linked to {over.name}" if over and over.role != "head" else ""
        word, text = "serving", f"serves {format_count(cores, 'core')}{through}"
    parts = [text, f"load {' '.join(f'{value:g}' for value in facts.load)} on {format_count(facts.cores, 'core')}"]
    clients = facts.clients if facts.role == "head" else {}
    for peer, (connected, silent) in clients.items():
        address = peer.rpartition(":")[0]
        parts.append(f"client {address} for {format_duration(connected)}, silent for {format_duration(silent)}")
    if facts.idle is not None and facts.idle_limit:
        parts.append(f"idle for {format_duration(facts.idle)} of {format_duration(facts.idle_limit)}")
    if facts.restarts:
        parts.append(f"restarted {format_count(facts.restarts, 'time')}{facts.problem and f', after: {facts.problem}'}")
    listed = [{"address": peer, "connected": a, "silent": b} for peer, (a, b) in clients.items()]
    offered = None if problem else cores
    return Asked(word, "; ".join(parts), facts.load, offered, facts.idle, listed, facts.restarts)


def ask_briefly(app: App, nodes: Sequence[Node], step: Callable[[Remote], T]) -> list[Outcome[T]]:
    """Run STEP on those of NODES that run; one that does not answer within a few seconds is given up."""
    running = [node for node in nodes if node.state == "running"]
    futures = [app.pool.submit(node, step, limit=ANSWER_LIMIT) for node in running]
    progress = Progress("Asking", len(running))
    deadline = time.monotonic() + ANSWER_LIMIT + len(running) / ANSWER_RATE
    while (left := deadline - time.monotonic()) > 0 and progress.done < len(running):
        concurrent.futures.wait(futures, min(0.2, left))
        progress.done = sum(future.done() for future in futures)
        progress.redraw()
    late = f"frozen or cut off: no answer within {ANSWER_LIMIT} s"
    found = [future.result() if future.done() else Outcome(node, silent=True) for node, future in zip(running, futures)]
    return [replace(one, error=late) if one.silent else one for one in found]


def ask_servers(app: App, nodes: Sequence[Node]) -> dict[Node, Asked]:
    """Return what the servers of the running NODES say."""
    outcomes = ask_briefly(app, nodes, server_step)
    facts = {outcome.node: outcome.value[0] for outcome in outcomes if outcome.ok}
    above = {address: node for node, one in facts.items() if one.role == "head" for address in one.linked}
    # A sub-head's workers, unless the head links them itself; whom the head does not link, links nobody to it.
    for node in [node for node in facts if node.private_ip in above]:
        above = dict.fromkeys(facts[node].linked, node) | above
    return {outcome.node: judge_server(outcome, above) for outcome in outcomes}


def format_group(app: App, group: GroupState, wide: bool, asked: dict[Node, Asked] | None = None) -> str:
    """Return what `status` shows of one group; with what was ASKED of the nodes, as columns, where --watch has it."""
    nodes, present = group.nodes, group.present
    heading = f"Group {group.name} ({group.region}): {format_count(len(present), 'node')}"
    limits = sorted({node.idle_minutes for node in present if node.idle_minutes})
    idle = f"idle limit {' and '.join(f'{minutes:g}' for minutes in limits)} min" if limits else ""
    owner = describe_owner(present, group.security_groups) if present and not app.launched(present) else ""
    lines = [", ".join(filter(None, [heading, format_cost(present), idle, owner]))]
    more = []
    if asked is not None:
        known = [asked.get(node, Asked("", "")) for node in nodes]
        more = [
            ["SERVER", *(one.server and paint(one.server, fg=SERVER_WORDS[one.server][0]) for one in known)],
            ["LOAD", *(f"{one.load[0]:g}" if one.load else "" for one in known)],
            ["CLIENTS", *(str(len(one.clients)) if node.role == "head" else "" for node, one in zip(nodes, known))],
        ]
    if nodes:
        lines.append(format_nodes(nodes, wide, more))
    for node in nodes:
        if node.reason:
            lines.append(f"{node.name}: {node.state}: {printable(node.reason)}")
        elif app.known_identity and not is_ours(node, app.known_identity):
            lines.append(f"{node.name}: {not_ours(node)}")
    for request in live(group.requests):
        lines.append(f"Spot request {request.id}: {request.state} ({request.status}) {request.node_id}".rstrip())
    mine = app.signed(present) or present  # anybody may tag a head
    if heads := [node for node in mine if node.role == "head"]:
        lines.append(f"Head node: {paint(heads[0].name, bold=True)}")
    elif any(node.role == "worker" for node in mine):
        lines.append(f"The head node is gone: {command('start', group.name)} makes another node the head")
    if not present:
        lines.append(f"No nodes, but a security group is left: {command('terminateAll', group.name)} removes it")
    return "\n".join(lines)


def node_json(node: Node) -> dict[str, Any]:
    """Return a node as `status --json` shows it."""
    shown = node._asdict()
    del shown["token"]
    return shown | {
        "name": node.name,
        "short": node.short,
        "address": node.address,
        "launched": node.launched.isoformat().replace("+00:00", "Z"),
        "cost": totals([node])["cost"],
    }


def status_json(app: App, groups: Sequence[GroupState], asked: dict[Node, Asked], everywhere: bool) -> dict[str, Any]:
    """Return what `status --json` shows."""
    key, home = app.known_identity, app.settings.AWS_REGION
    regions: dict[str, dict[str, Any]] = {}
    for group in groups:
        regions.setdefault(group.region, {})[group.name] = {
            "nodes": [
                node_json(node)
                | {"launched_with_this_key": is_ours(node, key) if key else None}
                | (asked[node]._asdict() if node in asked else {})
                for node in group.nodes
            ],
            "spot_requests": [request._asdict() for request in group.requests],
            "head": next(
                (node.name for node in app.signed(group.present) or group.present if node.role == "head"), None
            ),
            "totals": totals(group.present),
        }
    shown = {"regions": regions} if everywhere else {"region": home, "groups": regions.get(home, {})}
    return shown | {"totals": totals([node for group in groups for node in group.present])}


def keep_showing(show: Callable[[], str]) -> NoReturn:
    """SHOW a text alone on the terminal, as far as it has room, every few seconds until Ctrl-C."""
    while True:
        text = f"{show()}\n\n{format_time(time.time())}; every {WATCH_SECONDS} s until Ctrl-C"
        if is_terminal(sys.stdout) and not os.environ.get("NO_COLOR"):
            height = shutil.get_terminal_size().lines - 1
            text = "\033[H\033[2J" + "\n".join(text.split("\n")[:height])
        put(text)
        time.sleep(WATCH_SECONDS)


@cli.command("status", epilog="Example: ./cluster.py status --watch")
@click.argument("group", type=GroupName(), required=False)
@json_option
@click.option(
    "--servers",
    is_flag=True,
    help="Ask each node, over SSH, for its load and its server. In --json the field server is then "
    f"{'; '.join(f'{word} ({meaning})' for word, (_, meaning) in SERVER_WORDS.items())}.",
)
@click.option("--watch", is_flag=True, help="Renew it, with the servers, every few seconds until Ctrl-C.")
@click.option("--wide", is_flag=True, help="Show all columns, however narrow the terminal is.")
@click.option("--all-regions", "everywhere", is_flag=True, help="Show every region of the account.")
@click.pass_obj
def show_status(
    app: App, /, group: str | None, as_json: bool, servers: bool, watch: bool, everywhere: bool, wide: bool
) -> None:
    """Show what is running, since when, and what it costs."""
    if as_json and watch:
        raise click.UsageError("--json shows one moment, and --watch goes on: choose one")
    if everywhere and (servers or watch):
        raise click.UsageError("--all-regions takes neither --servers nor --watch: name a region in config.py")
    home, problems = app.settings.AWS_REGION, list[str]()

    def nothing() -> str:
        where, advice = ("any region that answers", "") if everywhere else (home, app.elsewhere(group))
        return f"Nothing is running in {where}{f' in group {group!r}' if group else ''}{advice}"

    def watched() -> str:
        groups = fetch_groups(group, app.ec2)
        asked = ask_servers(app, [node for one in groups for node in one.nodes])
        return "\n\n".join(format_group(app, one, wide, asked) for one in groups) or nothing()

    if watch:
        keep_showing(watched)
    fetch = functools.partial(fetch_groups, group)
    regions = app.in_all_regions(fetch, problems) if everywhere else {home: fetch(app.ec2)}
    groups = [one for found in regions.values() for one in found]
    nodes = [node for one in groups for node in one.nodes]
    if as_json:
        asked = ask_servers(app, nodes) if servers else {}
        result(json.dumps(status_json(app, groups, asked, everywhere), indent=2))
    elif groups:
        for one in groups:
            put(format_group(app, one, wide))
        if len(groups) > 1 and (cost := format_cost(nodes)):
            result(f"All groups: {cost}")
        for node, said in (ask_servers(app, nodes) if servers else {}).items():
            put(f"{paint(node.name, fg=SERVER_WORDS[said.server][0])}: {printable_lines(said.server_text)}")
        guarded = [rules for one in groups if one.region == home for rules in one.security_groups]
        if guarded and app.known_identity:
            app.warn_of_rules(guarded, try_client_cidr(app.settings))
    else:
        note(nothing())
    if problems:
        raise ClusterError("; ".join(problems))


def format_loads(outcomes: Sequence[Outcome[Facts]]) -> str:
    """Return the nodes' loads as a table, the highest first, and below it which nodes do not answer."""
    rows = [["NODE", "NAME", "LOAD 1", "5", "15", "CORES", "MEMORY"]]
    for outcome in sorted((one for one in outcomes if one.ok), key=lambda one: one.value.load, reverse=True):
        facts = outcome.value
        used = " of ".join(format_size(value * MIB) for value in facts.memory_mb)
        load = (f"{value:.2f}" for value in facts.load)
        rows.append([outcome.node.short, outcome.node.name, *load, str(facts.cores), used])
    silent = [printable_lines(f"{outcome.node.name}: {outcome.error}") for outcome in outcomes if not outcome.ok]
    return "\n".join([format_table(rows, ["…"]), *silent])


@cli.command("systemLoad", epilog="Example: ./cluster.py systemLoad --watch")
@group_argument
@click.option("--watch", is_flag=True, help="Renew it every few seconds until Ctrl-C.")
@json_option
@click.pass_obj
def system_load(app: App, group: str, watch: bool, as_json: bool) -> None:
    """Show each node's load, cores and memory."""
    nodes = in_order(app.open_group(group))
    ask = functools.partial(ask_briefly, app, nodes, fetch_facts)
    if watch:
        keep_showing(lambda: format_loads(ask()))
    outcomes = ask()
    if as_json:
        fields = ("load", "cores", "memory_mb")
        shown = {
            one.node.name: {"error": one.error or None} | {name: getattr(one.value, name) for name in fields if one.ok}
            for one in outcomes
        }
        result(json.dumps(shown, indent=2))
    else:
        put(format_loads(outcomes))
    if bad := [outcome for outcome in outcomes if not outcome.ok]:
        raise ClusterError(f"{len(bad)} of {format_count(len(nodes), 'node')} did not answer")


# --- syncData ----------------------------------------------------------------
# S3, the user's files, and the step that brings them to the nodes. Touches S3 and the nodes' data folders.

PART_SIZE = 64 * MIB  # of an upload; S3 takes 10,000 parts, and boto3 enlarges them beyond that
ASK_ABOVE_FILES = 1000  # of a folder: it may not be the one that was meant
ASK_ABOVE_BYTES = 10**9
NEVER_SENT = {".aws", ".git", ".s3cfg", ".ssh"}
PRIVATE_KEY = re.compile(rb"\s*(-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File)")
SIGNED_SECONDS = (900, 7 * 24 * 3600)  # the shortest and (AWS's limit) the longest life of an address
READERS = 4  # files that are hashed at once
DIGEST_CALLS = 32  # of S3, at once
SLOWEST = 1_000_000  # bytes a second that a node is given time for


def plan_relative_path(key: str, prefix: str) -> str | None:
    """Return where an object goes below DATA_DIR; None where its key leads elsewhere or nowhere."""
    path = key[len(prefix) :].lstrip("/")
    parts = path.split("/")
    bad = any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    return None if bad or "\0" in path else path


def read_s3cfg(settings: Settings) -> dict[str, str]:
    """Return s3cmd's settings from .s3cfg beside config.py or cluster.py; {} where there is none."""
    import configparser

    path = next((path for path in (settings.folder / ".s3cfg", HERE / ".s3cfg") if path.exists()), None)
    if not path:
        return {}
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(path.read_text("utf-8", "replace"))
    except configparser.Error as error:
        raise ClusterError(f"{path} is no settings file of s3cmd: {str(error).splitlines()[0]}") from error
    return {name: value.strip() for name, value in parser.items("default")} if "default" in parser else {}


def open_s3(settings: Settings, region: str = "") -> Client:
    """Return an S3 client: credentials and endpoint of .s3cfg, else config.py's, else boto3's own."""
    s3cfg = read_s3cfg(settings)
    key, secret = s3cfg.get("access_key", ""), s3cfg.get("secret_key", "")
    if is_placeholder(key) or is_placeholder(secret):
        key, secret = settings.AWS_ACCESS_KEY_ID, settings.AWS_SECRET_ACCESS_KEY
    host, endpoint = s3cfg.get("host_base", ""), ""
    if host and not re.search(r"(^|\.)amazonaws\.com(\.cn)?$", host.split(":")[0]):
        endpoint = f"http{'' if s3cfg.get('use_https', 'True').lower() == 'false' else 's'}://{host}"
    elsewhere = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    checksums = "when_required" if elsewhere else "when_supported"  # AWS's buckets with Object Lock demand them
    return open_client(
        settings,
        "s3",
        region,
        (key, secret, s3cfg.get("access_token", "") if key else ""),
        endpoint,
        signature_version="s3v4",
        read_timeout=60,
        request_checksum_calculation=checksums,
        response_checksum_validation="when_required",  # else signed addresses would ask for one
        s3={"addressing_style": "path" if elsewhere else "virtual", "payload_signing_enabled": False},
    )


def open_bucket(settings: Settings) -> tuple[Client, str, str]:
    """Return (client for the bucket's own region, bucket, prefix) of S3_PATH."""
    from botocore.exceptions import ClientError

    bucket, prefix = settings.bucket
    s3 = open_s3(settings)
    try:
        answer = s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
        if error_code(error) == "404":
            raise ClusterError(f"there is no bucket {bucket!r}; make it with: aws s3 mb s3://{bucket}") from error
        if error_code(error) == "403":
            refusal = f"you may not use the bucket {bucket!r}: is it yours, and may you do s3:ListBucket there?"
            raise ClusterError(clock_problem(error) or refusal) from error
        if error_code(error) not in ("301", "400"):
            raise
    region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return (open_s3(settings, region) if region and region != settings.AWS_REGION else s3), bucket, prefix


def list_objects(s3: Client, bucket: str, prefix: str) -> dict[str, tuple[int, str]]:
    """Return key -> (size, ETag) of every object under PREFIX; folder markers left out."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    objects = [raw for page in pages for raw in page.get("Contents", [])]
    return {raw["Key"]: (raw["Size"], raw["ETag"].strip('"')) for raw in objects if not raw["Key"].endswith("/")}


def fetch_digest(s3: Client, bucket: str, key: str, etag: str) -> str:
    """Return the SHA-256 that our upload recorded with an object, else its ETag where that is an MD5, else "".

    The ETag of an object that is encrypted with SSE-KMS or SSE-C has an MD5's form and is none; that of a multipart
    upload has a "-": https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    head = s3.head_object(Bucket=bucket, Key=key)
    recorded = str(head.get("Metadata", {}).get("sha256", ""))
    if re.fullmatch(r"[0-9a-f]{64}", recorded):
        return recorded
    plain = head.get("ServerSideEncryption", "AES256") == "AES256" and not head.get("SSECustomerAlgorithm")
    return etag if plain and re.fullmatch(r"[0-9a-f]{32}", etag) else ""


def why_left_out(path: Path, top: Path, settings: Settings, config: Path) -> str:
    """Say why a file (or link) below TOP is never sent, or return ""."""
    real = Path(os.path.realpath(path))
    if NEVER_SENT & {path.name, *real.parts} or real in (config.resolve(), settings.key_file.resolve()):
        return "keys and settings are never sent"
    if path.is_symlink() and (real.is_dir() or not real.is_relative_to(top)):
        return "a link that leads out of the folder, or to a folder"
    if not real.is_file():
        return "not a file"
    with path.open("rb") as file:
        if PRIVATE_KEY.match(file.read(200)):
            return "a private key is never sent"
    try:
        path.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return ""


def plan_files(name: str, settings: Settings, config: Path) -> dict[str, Path]:
    """Return path below DATA_DIR -> file for a local file or folder NAME; {} where there is none.

    ClusterError where that would send what nobody can have meant: an unset variable makes NAME empty.
    """
    if not name.strip():
        raise ClusterError("NAME is empty: is a variable unset?")
    source, base = Path(name), os.path.basename(os.path.abspath(name))
    top = Path(os.path.realpath(source))
    if source.is_file():
        if why := why_left_out(source, top.parent, settings, config):
            raise ClusterError(f"{name}: {why}")
        return {base: source}
    if not source.is_dir():
        return {}
    dear = {
        "the tool's folder": HERE,
        "your home folder": Path.home(),
        "the SSH key's folder": settings.key_file.parent,
    }
    for what, home in dear.items():
        if home.resolve().is_relative_to(top):
            raise ClusterError(f"{name} is {what}, or contains it: nothing is sent; name a folder that holds data only")
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(source):
        not_entered = {one for one in folders if one in NEVER_SENT or Path(folder, one).is_symlink()}
        folders[:] = sorted(set(folders) - not_entered)
        for one in sorted([*not_entered, *names]):
            path = Path(folder, one)
            if why := why_left_out(path, top, settings, config):
                note(f"Left out: {path} ({why})")
            else:
                files[f"{base}/{path.relative_to(source).as_posix()}"] = path
    if not files:
        raise ClusterError(f"there is no file to send in {name}")
    return files


def confirm_size(name: str, files: dict[str, Path]) -> None:
    """Ask about a large folder; where nobody can be asked, refuse it."""
    size = sum(path.stat().st_size for path in files.values())
    if len(files) <= ASK_ABOVE_FILES and (size <= ASK_ABOVE_BYTES or Path(name).is_file()):
        return
    what = f"{name} has {format_count(len(files), 'file')}, {format_size(size)}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ClusterError(f"{what}; add --yes to send so much without being asked")
    if not click.confirm(f"{what}. Send all of it?", err=True):
        raise ClusterError("nothing was sent")


@contextlib.contextmanager
def counted(label: str, size: int) -> Iterator[Callable[..., None]]:
    """Show a bar of SIZE bytes while the body works; any thread may count bytes, also such as are only READ."""
    progress, lock, done, seen = Progress(label, 0, size=size), threading.Lock(), threading.Event(), 0

    def count(more: int, read: int = 0) -> None:
        nonlocal seen
        with lock:
            progress.moved["all"] += more
            seen += read

    def repaint() -> None:
        while not done.wait(0.2):
            progress.show(f"{format_size(seen)} checked" if 0 < seen < size else "")

    painter = threading.Thread(target=repaint, daemon=True)
    painter.start()
    try:
        yield count
    finally:
        done.set()
        painter.join()


def is_same(s3: Client, bucket: str, key: str, there: tuple[int, str] | None, path: Path, sha256: str) -> bool:
    """Tell whether the object is this very file: same size and SHA-256 (or MD5, if the ETag is one)."""
    if not there or there[0] != path.stat().st_size:
        return False
    digest = fetch_digest(s3, bucket, key, there[1])
    return digest == sha256 or (len(digest) == 32 and digest_file(path, "md5") == digest)


def upload(s3: Client, bucket: str, prefix: str, files: dict[str, Path]) -> None:
    """Send FILES as far as S3 lacks them, with a bar; while one is sent, the next is being hashed.

    In this thread: Ctrl-C then lets boto3 abort it, and no parts stay in S3 that cost money.
    """
    from boto3.s3.transfer import TransferConfig

    keys = {"/".join(filter(None, [prefix, path])): file for path, file in files.items()}
    there = list_objects(s3, bucket, os.path.commonprefix(list(keys)))  # noqa: RUF071 - keys are no paths
    transfer = TransferConfig(PART_SIZE, multipart_chunksize=PART_SIZE, max_concurrency=16)
    size, sent = sum(path.stat().st_size for path in files.values()), 0
    hasher = concurrent.futures.ThreadPoolExecutor(1)
    try:
        with counted("Uploading", size) as count:
            read = functools.partial(count, 0)
            hashes = hasher.map(lambda path: digest_file(path, "sha256", read), keys.values())
            for (key, path), sha256 in zip(keys.items(), hashes):
                if is_same(s3, bucket, key, there.get(key), path, sha256):
                    count(path.stat().st_size)
                    continue
                extra = {"Metadata": {"sha256": sha256}}
                s3.upload_file(str(path), bucket, key, ExtraArgs=extra, Config=transfer, Callback=count)
                sent += 1
    except OSError as error:
        raise ClusterError(f"{error.filename or 'a file'} can't be read: {error.strerror or error}") from error
    finally:
        hasher.shutdown(wait=False, cancel_futures=True)
    where = "/".join(filter(None, ["s3:/", bucket, prefix]))
    note(f"Uploaded {sent} of {format_count(len(keys), 'file')} to {where} ({len(keys) - sent} there already)")


def plan_objects(s3: Client, bucket: str, prefix: str, name: str) -> tuple[dict[str, Wanted], list[str]]:
    """Return what the nodes shall have, by its key: all under PREFIX/NAME…; and the keys that can't be files."""
    found = list_objects(s3, bucket, f"{prefix}/{name}" if prefix else name)
    paths = {key: plan_relative_path(key, prefix) for key in found}
    good = [key for key in found if paths[key] is not None]
    digests = side_by_side(
        *(functools.partial(fetch_digest, s3, bucket, key, found[key][1]) for key in good), limit=DIGEST_CALLS
    )
    objects = {}
    for key, digest in zip(good, digests):
        size, etag = found[key]
        objects[key] = Wanted(str(paths[key]), size, digest or etag, digest, "", {"If-Match": f'"{etag}"'})
    return objects, [key for key in found if paths[key] is None]


def sign(s3: Client, bucket: str, objects: dict[str, Wanted]) -> list[Wanted]:
    """Return the OBJECTS with signed addresses that live as short as may be."""
    shortest, longest = SIGNED_SECONDS
    seconds = int(min(longest, shortest + sum(one.size for one in objects.values()) / SLOWEST))

    def address(key: str) -> str:
        where = {"Bucket": bucket, "Key": key}
        return str(s3.generate_presigned_url("get_object", Params=where, ExpiresIn=seconds))

    return [one._replace(url=address(key)) for key, one in objects.items()]


def bring_from_s3(wanted: list[Wanted], sign_again: Callable[[], list[Wanted]], delivery: Delivery) -> Fetched:
    """Let a node fetch WANTED by signed addresses; they die with the session's credentials: boto3 may have new ones."""
    while True:
        before = delivery.moved
        try:
            return delivery.fetch(wanted)
        except NodeError as error:
            if "InvalidObjectState" in str(error):
                raise NodeError(f"{error}; the object is archived: restore it in S3, then run this again") from error
            if delivery.status not in (401, 403):
                raise
            if delivery.moved == before:
                raise NodeError(f"{error}; if your AWS session has expired, renew it and run this again") from error
            wanted = sign_again()


def sync_nodes(app: App, nodes: Sequence[Node], wanted: Sequence[Wanted], bring: Callable[[Delivery], Fetched]) -> None:
    """Let BRING bring the files to all NODES, with a bar, and report."""
    size = sum(one.size for one in wanted)
    note(f"{format_count(len(wanted), 'file')}, {format_size(size)}, for {format_count(len(nodes), 'node')}")
    progress = Progress("Fetching", len(nodes), lambda one: f"{one.node.name}: {one.value}", size * len(nodes))
    whole = {node.id: size for node in nodes}  # bytes that each lacks, as far as known

    def step(remote: Remote) -> str:
        def show(moved: int, of: int) -> None:
            progress.moved[remote.node.id], whole[remote.node.id] = moved, of
            progress.size = sum(whole.values())

        done = bring(Delivery(remote, app.settings.DATA_DIR, show))
        there = f"; {done.present} there already" if done.present else ""
        fetched = f"fetched {format_count(done.fetched, 'file')}, {format_size(done.moved)}{there}"
        return fetched if done.fetched else "has everything already"

    app.report(app.pool.each(nodes, step, progress), f"Synchronized to {app.settings.DATA_DIR}")


def read_files(files: dict[str, Path]) -> list[Wanted]:
    """Return FILES as what the nodes shall have, once all are hashed."""
    sizes = [path.stat().st_size for path in files.values()]
    with counted("Reading", sum(sizes)) as count:
        reads = (functools.partial(digest_file, path, "sha256", count) for path in files.values())
        digests = side_by_side(*reads, limit=READERS)
    return [Wanted(name, size, sha256, sha256, "", {}) for name, size, sha256 in zip(files, sizes, digests)]


def sync_by_s3(app: App, name: str, group: str, files: dict[str, Path]) -> None:
    """Upload FILES, and let every node fetch all objects under S3_PATH/NAME."""
    s3, bucket, prefix = open_bucket(app.settings)
    nodes = app.open_group(group)
    if files:
        upload(s3, bucket, prefix, files)
        name = os.path.basename(os.path.abspath(name))
    objects, refused = plan_objects(s3, bucket, prefix, name)
    for key in refused:
        note(f"Left out, since it can't be a file below {app.settings.DATA_DIR}: {key!r}")
    if not objects:
        raise ClusterError(
            f"there is no file {name!r} here, and nothing under {app.settings.S3_PATH.rstrip('/')}/{name} in S3"
        )
    for one in objects.values():
        if not one.digest:
            note(f"{one.path}: will be verified by its size, not by hash (it has none in S3)")
    if s3.meta.region_name != app.settings.AWS_REGION:
        size = format_size(len(nodes) * sum(one.size for one in objects.values()))
        warn(
            f"the bucket is in {s3.meta.region_name}, the nodes in {app.settings.AWS_REGION}: AWS bills what they "
            f"fetch, up to {size} in all, at $0.02 a GB (from some regions more)"
        )
    sign_all = functools.partial(sign, s3, bucket, objects)
    bring = functools.partial(bring_from_s3, sign_all(), sign_all)
    sync_nodes(app, nodes, list(objects.values()), bring)
    if refused:
        raise ClusterError(f"{format_count(len(refused), 'object')} left out")


@cli.command("syncData", epilog="Example: ./cluster.py syncData myHugeVolumeDataFile.vol")
@click.argument("name", type=click.Path())
@group_argument
@click.option("--yes", is_flag=True, help="Send a large folder without asking.")
@click.pass_obj
def sync_data(app: App, name: str, group: str, yes: bool) -> None:
    """Put data files on every node.

    NAME is a file or folder here. It is uploaded to S3_PATH, from where every node fetches it; or NAME is the beginning
    of names there, and every node gets all of those. Where S3_PATH is not set, NAME is sent to one node, and from there
    to the others.
    """
    files = plan_files(name, app.settings, app.config)
    if not yes:
        confirm_size(name, files)
    if app.settings.bucket[0]:
        sync_by_s3(app, name, group, files)
        return
    if not files:
        raise ClusterError(f"there is no file {name!r} here, and S3_PATH is not set in {Call.settings}")
    nodes = app.open_group(group)
    wanted = read_files(files)
    sync_nodes(app, nodes, wanted, Spread(wanted, list(files.values()), len(nodes)).bring)


# --- terminateAll ------------------------------------------------------------
# Ending groups and single nodes, and verifying it. Touches EC2, and asks a head whether it has a client.

TERMINATE_BATCH = 1000  # ids a TerminateInstances request, AWS's limit
ASK_LIMIT = 5  # seconds, for the head to say whether a client would lose its render
LAST_ASK_LIMIT = 2  # the same before a whole group ends, which waits for nobody
CLIENT_ACTIVE = 600  # seconds since a client last moved bytes
TERMINATE_LIMIT = 600  # until one more node has ended; 150 s are ordinary
HOLD_LIMIT = 300  # for the security group: ended nodes hold it a minute more, young ones before any list shows them
UNSEEN_LIMIT = 5  # for lists to show something of a group: what is new they show late


class Ended(NamedTuple):
    """What came of ending one group in one region."""

    nodes: list[Node]
    protected: list[Node]  # EC2 refuses to end them
    left: list[Node]  # that have the group's tag, and are not the user's to end
    cancelled: int  # spot requests
    removed: bool  # whether its security group was there to remove


def terminate_nodes(ec2: Client, nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """Start the end of NODES, a thousand a call; return those that are protected from it, and those not known (yet).

    For one id that it does not know (yet) EC2 ends none of a request, for a protected one none of its zone: such a
    request is sent again without those that the refusal names, in halves where it names none.
    https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_TerminateInstances.html
    """
    from botocore.exceptions import ClientError

    requests = [nodes[at : at + TERMINATE_BATCH] for at in range(0, len(nodes), TERMINATE_BATCH)]
    refused: dict[str, list[Node]] = {"OperationNotPermitted": [], "InvalidInstanceID.NotFound": []}
    while requests:
        request = requests.pop()
        end = functools.partial(ec2.terminate_instances, InstanceIds=[node.id for node in request])
        try:
            persist(end, "TerminateInstances", new=())
        except ClientError as error:
            if (code := error_code(error)) not in refused:
                raise
            named = re.findall(r"i-\w+", str(error))
            out = [node for node in request if node.id in named or len(request) == 1]
            rest = [node for node in request if node not in out]
            half = 0 if out else len(rest) // 2
            refused[code] += out
            requests += [part for part in (rest[:half], rest[half:]) if part]
    return refused["OperationNotPermitted"], refused["InvalidInstanceID.NotFound"]


def terminate_young(ec2: Client, nodes: Sequence[Node]) -> list[Node]:
    """Start the end of NODES, again for those that EC2 does not know yet; return those that are protected from it."""
    deadline = time.monotonic() + NEW_LIMIT
    protected: list[Node] = []
    while nodes:
        refused, nodes = terminate_nodes(ec2, nodes)
        protected += refused
        if nodes and time.monotonic() > deadline:
            names = ", ".join(node.id for node in nodes)
            raise ClusterError(f"EC2 does not know {names}, so they may run on; {command('status')} shows them")
        if nodes:
            time.sleep(POLL / 2)
    return protected


def fetch_all_requests(ec2: Client, nodes: Sequence[Node], group: str | None = None) -> list[SpotRequest]:
    """Return the spot requests of GROUP (None: of all), and those without our tag that NODES say they came by."""
    requests = fetch_spot_requests(ec2, group)
    known = {"", *(request.id for request in requests)}
    untagged = [node for node in nodes if node.spot_request not in known and node.state in ALIVE]
    return [*requests, *(SpotRequest(one.spot_request, one.group, "active", "", None, one.id) for one in untagged)]


def cancel_spot_requests(ec2: Client, requests: Sequence[SpotRequest]) -> list[str]:
    """Cancel the live ones of REQUESTS; return their ids."""
    ids = [request.id for request in live(requests)]
    if ids:
        ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=ids)
    return ids


def remove_security_group(ec2: Client, group: SecurityGroup) -> bool:
    """Delete a security group; return False while nodes (that no list may show yet) hold it."""
    with tolerate("DependencyViolation"):
        with tolerate("InvalidGroup.NotFound"):
            ec2.delete_security_group(GroupId=group.id)
        return True
    return False


def end_group(app: App, ec2: Client, group: str, others: bool) -> Ended | None:
    """End the user's nodes of GROUP (OTHERS: everybody's), then its security group; return once EC2 says so.

    The security group is the anchor: while it can't be deleted there are nodes that no list shows yet, so each poll
    ends whatever runs by then. None where there was nothing of the group; ClusterError where something remains.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    progress = Progress(f"Terminating in {ec2.meta.region_name}", 0)
    seen: dict[str, Node] = {}
    protected: dict[str, Node] = {}
    cancelled: list[str] = []
    before: set[str] | None = None  # ids of the nodes that had not ended at the last poll
    removed = False
    changed = good = time.monotonic()
    while True:
        try:
            listed = fetch_nodes(ec2, group)
            nodes = [node for node in listed if node.state in ALIVE]
            inside = [node for node in nodes if node.is_inside]
            targets = inside if others else app.launched(inside, ec2)
            running = [node for node in targets if node.id not in protected and node.state != "shutting-down"]
            protected |= {node.id: node for node in terminate_nodes(ec2, running)[0]}
            living = {node.id: node for node in targets if node.id not in protected}
            seen |= {name: node for name, node in living.items() if name not in seen or node.public_ip}
            if before is None:  # after the nodes' end, since nothing about spot requests may keep nodes alive
                with tolerate(loss="their spot requests are not cancelled"):
                    cancelled = cancel_spot_requests(ec2, fetch_all_requests(ec2, targets, group))
            if living.keys() != before:
                before, changed = set(living), time.monotonic()
            held = len(protected) + len(inside) > len(targets)
            groups = [] if living or held else fetch_security_groups(ec2, group)
            waiting = [one for one in groups if not remove_security_group(ec2, one)]
            removed |= len(waiting) < len(groups)
            good = time.monotonic()
        except (BotoCoreError, ResponseParserError, ClientError) as error:  # a poll that fails breaks nothing off
            late = before is None or time.monotonic() - good > POLL_ERROR_LIMIT
            if late or error_code(error) in DENIED_CODES:
                raise
            time.sleep(POLL)
            continue
        waited = time.monotonic() - changed
        something = bool(seen or groups or len(listed) > len(nodes))
        if not living and not waiting and (waited > UNSEEN_LIMIT or (something and not held)):
            left = [node for node in nodes if node not in targets]
            ended = Ended(list(seen.values()), list(protected.values()), left, len(cancelled), removed)
            return ended if something or nodes else None
        again = f"run {command('terminateAll', group)} again"
        if living and waited > TERMINATE_LIMIT:
            raise ClusterError(f"EC2 does not say terminated of {', '.join(living)} yet; {again}")
        if waiting and waited > HOLD_LIMIT:
            raise ClusterError(
                f"security group {waiting[0].id} is still in use by something that EC2 does not list as a node of "
                f"{group!r}; {again}, and look at it in the EC2 console"
            )
        held_up = "; the security group is still in use" if waiting else ""
        progress.show(f"{len(seen) - len(living)} of {format_count(len(seen), 'node')} ended{held_up}")
        time.sleep(POLL)


def protected_error(ec2: Client, nodes: Sequence[Node]) -> ClusterError:
    """Return the error that names NODES which EC2 refuses to end, and the way to end them."""
    unprotect = f"aws ec2 modify-instance-attribute --region {ec2.meta.region_name} --no-disable-api-termination"
    return ClusterError(
        f"protected from termination, so they run on and cost money: {', '.join(node.id for node in nodes)}. "
        f"For each: {unprotect} --instance-id ID; then {command('terminateAll', nodes[0].group)}"
    )


def terminate_in(app: App, ec2: Client, group: str, others: bool) -> bool:
    """Terminate GROUP in one region and say what was verified; return whether there was anything of it."""
    region, done = ec2.meta.region_name, end_group(app, ec2, group, others)
    if not done:
        return False
    for node in done.nodes:
        result(f"{node.name}: terminated")
    for node in done.left:
        why = "was launched with another key" if node.is_inside else f"is not in security group mitsuba-{group}"
        note(f"Left alone: {node.id} has the tag of group {group!r}, but {why}")
    said = f"{format_count(len(done.nodes), 'node')} terminated" if done.nodes else "No node was running"
    if done.cancelled:
        said += f", {format_count(done.cancelled, 'spot request')} cancelled"
    if done.protected:
        note(f"{said} in {region}")
        raise protected_error(ec2, done.protected)
    said += ", security group removed" if done.removed else ""
    said += "" if done.left else f": nothing of group {group!r} is left in {region}"
    cost = totals(done.nodes)["cost"]
    paid = f" They cost {at_least(done.nodes)}{format_money(cost)}." if cost is not None else ""
    note(f"{said}.{paid}")
    return True


class RegionState(NamedTuple):
    """What terminateAll finds in a region."""

    ec2: Client
    nodes: list[Node]  # not terminated, of all groups
    chosen: list[str]  # groups that are to end


def choose_groups(app: App, group: str | None, ec2: Client) -> RegionState:
    """Return what a region has. To end there is GROUP, or (None) each group with nodes of the user's, or left empty."""
    found, security_groups = side_by_side(lambda: fetch_nodes(ec2), lambda: fetch_security_groups(ec2))
    nodes = [node for node in found if node.state in ALIVE]
    taken = {node.group for node in nodes}
    if group:
        there = ec2 is app.ec2 or group in taken | {one.group for one in security_groups}  # here lists may lag
        return RegionState(ec2, nodes, [group] if there else [])
    mine = {node.group for node in app.launched(nodes, ec2) if node.is_inside}
    marked = {one.group for one in security_groups for rule in one.rules if app.fingerprint in rule.owner.split()}
    return RegionState(ec2, nodes, sorted(mine | (marked - taken)))


def ask_head(app: App, nodes: Sequence[Node], limit: float) -> Facts:
    """Return what the head of NODES says of itself; nothing where it can't be asked within LIMIT seconds."""
    for head in app.signed([node for node in nodes if node.role == "head" and node.state == "running"])[:1]:
        future = app.pool.submit(head, fetch_facts, limit=limit)
        concurrent.futures.wait([future], limit)
        if future.done() and future.result().ok:
            return future.result().value
    return Facts(0)


@cli.command("terminateAll", epilog="Example: ./cluster.py terminateAll")
@group_argument
@click.option("--all-groups", is_flag=True, help="End all groups that were launched with your key.")
@click.option("--all-regions", is_flag=True, help="Look in every region of the account.")
@others_option
@click.pass_context
def terminate_all(ctx: click.Context, group: str, all_groups: bool, all_regions: bool, others: bool) -> None:
    """Shut all nodes of the group down, and verify it."""
    from botocore.exceptions import BotoCoreError, ClientError

    app: App = ctx.obj
    if all_groups and ctx.get_parameter_source("group") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--all-groups ends all of your groups; name none beside it")
    options = [*(["--all-groups"] if all_groups else [group]), *(["--all-regions"] if all_regions else [])]
    app.left = f"Some nodes may still run; run {command('terminateAll', *options)} again."
    home = app.settings.AWS_REGION
    problems: list[str] = []
    found: list[str] = []

    def end(region: str, state: RegionState, name: str) -> None:
        nodes = [node for node in state.nodes if node.group == name]
        try:
            app.check_owner(name, nodes, others, state.ec2)
            client = describe_client(ask_head(app, nodes, LAST_ASK_LIMIT))
            found.extend([name] if terminate_in(app, state.ec2, name, others) else [])
            if client:
                note(f"{client}, was connected to the head of group {name!r}")
        except (ClusterError, BotoCoreError, ClientError) as error:
            problem = explain(error) if isinstance(error, ClusterError) else app.explain(error)
            problems.append(f"{region}: {problem}" if all_regions else problem)

    look = functools.partial(choose_groups, app, None if all_groups else group)
    regions = app.in_all_regions(look, problems) if all_regions else {home: look(app.ec2)}
    ends = [functools.partial(end, name, state, one) for name, state in regions.items() for one in state.chosen]
    if ends:
        side_by_side(*ends)  # no group waits for another's end
    for region, state in regions.items():
        where = f" in {region}" if region != home else ""
        for name, about in app.running_groups(state.nodes, state.ec2).items():
            if name not in state.chosen:
                note(f"Group {name} runs on{where}: {about}")
    if all_groups and app.key_problem and any(state.nodes for state in regions.values()):
        ways = f"end a group of yours with {command('terminateAll', 'GROUP', '--others')}"
        problems.append(f"{app.key_problem}. So nothing tells which groups are yours; {ways}")
    if not found and not problems:
        where = "any region" if all_regions else home
        advice = "" if all_regions else f"; {command('status', '--all-regions')} shows every region"
        if not all_groups:
            raise ClusterError(f"Nothing to terminate: group {group!r} does not exist in {where}{advice}")
        note(f"Nothing to terminate: you have no group in {where}{advice}")
    if problems:
        raise ClusterError("; ".join(problems))


@cli.command("terminate", epilog="Example: ./cluster.py terminate 4-17")
@click.argument("name", shell_complete=complete_nodes, metavar="NODE")
@others_option
@click.option("--force", is_flag=True, help="Even if a client's render is lost by it.")
@click.pass_obj
def terminate(app: App, name: str, others: bool, force: bool) -> None:
    """Shut one node down, by its name, address or instance id."""
    node = find_node(app, name)
    if not node.is_inside:
        raise ClusterError(f"{node.id} is not in security group mitsuba-{node.group}: this tool did not launch it")
    app.check_owner(node.group, [node], others)
    facts = Facts(0) if force else ask_head(app, fetch_nodes(app.ec2, node.group), ASK_LIMIT)
    client = describe_client(facts, CLIENT_ACTIVE)
    if client and (node.role == "head" or node.tree or node.private_ip in facts.linked):
        raise ClusterError(f"{client}, would lose its render; {command('terminate', name, '--force')} ends the node")
    app.left = f"{node.name} may still run; {command('status')} shows it."
    if protected := terminate_young(app.ec2, [node]):
        raise protected_error(app.ec2, protected)
    result(f"{node.name} ({node.id}) is being terminated")
    if node.role == "head":
        note(f"It was the head node: run {command('start', node.group)} to make another one the head")
    elif node.role == "worker":
        note("It was a worker: the head restarts without it within half a minute; a running render is lost")


# --- Spot --------------------------------------------------------------------
# Prices and requests. Touches EC2 only.


def format_plot(values: Sequence[float], width: int) -> str:
    """Return VALUES as a row of at most WIDTH little bars."""
    step = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + step] for i in range(0, len(values), step))]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (mean - low) / (high - low))] if high > low else "▄" for mean in means)


@cli.command("spotPrices", epilog="Example: ./cluster.py spotPrices c7a.2xlarge")
@type_argument
@json_option
@click.pass_obj
def spot_prices(app: App, instance_type: str, as_json: bool) -> None:
    """Show the last day's spot prices of TYPE, per zone."""
    history = fetch_spot_history(app.ec2, fetch_instance_type(app.ec2, instance_type).type)
    if as_json:
        return result(json.dumps({zone: [[t.isoformat(), p] for t, p in prices] for zone, prices in history.items()}))
    if not history:
        raise ClusterError(f"{app.settings.AWS_REGION} has no spot prices for {instance_type}")
    currency = "¥" if find_partition(app.settings.AWS_REGION)[0] == "aws-cn" else "$"
    rows = [["ZONE", "LOWEST", "MEAN", "NOW", "LAST DAY" if sys.stdout.isatty() else ""]]
    for zone, prices in history.items():
        values = [price for _, price in prices]
        figures = [min(values), sum(values) / len(values), values[-1]]
        plot = format_plot(values, 24) if sys.stdout.isatty() else ""
        rows.append([zone, *(f"{currency}{figure:.4f}" for figure in figures), plot])
    return result(format_table(rows))


def cancel_requests(app: App, name: str | None = None) -> None:
    """Cancel the spot request of this NAME (None: all that this tool made); say what that leaves running."""
    nodes = [node for node in fetch_nodes(app.ec2) if node.is_inside]
    requests = [one for one in fetch_all_requests(app.ec2, nodes) if name in (None, one.id)]
    if name is not None and not requests:
        raise ClusterError(f"no spot request {printable(name)!r} of this tool in {app.settings.AWS_REGION}")
    if name is not None and not live(requests):
        raise ClusterError(f"spot request {name} is {requests[0].state} already")
    cancelled = cancel_spot_requests(app.ec2, requests)
    for one in cancelled:
        result(f"Cancelled {one}")
    running = [request.node_id for request in requests if request.node_id and request.id in cancelled]
    if running:
        note(f"Their nodes keep running and cost money: {', '.join(running)}; terminate or terminateAll ends them")
    if not cancelled:
        note("No spot request is open")


@cli.command("cancelSpot", epilog="Example: ./cluster.py cancelSpot sir-0123abcd")
@click.argument("name", metavar="ID")
@click.pass_obj
def cancel_spot(app: App, name: str) -> None:
    """Cancel one spot request."""
    cancel_requests(app, name)


@cli.command("cancelAllSpot", epilog="Example: ./cluster.py cancelAllSpot")
@click.pass_obj
def cancel_all_spot(app: App) -> None:
    """Cancel all spot requests that this tool made."""
    cancel_requests(app)


# --- Small commands ----------------------------------------------------------
# login, runCommand, logs, regions, completion, extend, policy.


optional_node = click.argument("name", shell_complete=complete_nodes, metavar="[NODE]", default="head")


def open_node(app: App, name: str) -> Node:
    """Return the node that NAME means, to which this machine may connect from now on."""
    node = find_node(app, name)
    if not is_ours(node, app.identity):
        raise ClusterError(f"{node.name}: {not_ours(node)}")
    ready = {one.id: one for one in app.open_group(node.group)}
    if node.id not in ready:
        raise ClusterError(f"{node.id} can't be reached (it is {node.state}); see {command('status', node.group)}")
    return ready[node.id]


@cli.command("login", epilog="Example: ./cluster.py login 4-17")
@optional_node
@click.pass_obj
def login(app: App, name: str) -> None:
    """Open a shell on a node (the head, if none is named)."""
    import subprocess

    with ssh_command(open_node(app, name), app.settings) as words:
        code = subprocess.call(words, env=clean_environment())
    sys.exit(min(code, 255))


def show_lines(prefix: str, lines: bytes) -> None:
    """Print LINES with PREFIX in front of each; in a pipe their bytes as they are."""
    shown = [prefix.encode() + line for line in lines.removesuffix(b"\n").split(b"\n")]
    if sys.stdout.isatty():
        return result("\n".join(line.rstrip(b"\r").decode("utf-8", "replace") for line in shown))
    try:
        return put(b"\n".join([*shown, b""]))
    except BrokenPipeError:
        os._exit(1)  # as in the main thread: that nobody reads our output is no failure of the node's


def command_step(line: str, as_json: bool, prefixed: bool, remote: Remote) -> tuple[int, str]:
    """Run a command line on one node, as its shell reads it; print its output as it comes.

    For JSON return (exit code, the output's last megabyte) instead; else another code than 0 is an error.
    """
    # So the node's guard sees that a command is at work, or was for a moment.
    mark = f"if [ -e {MARK_PATH} ]; then exec 9< {MARK_PATH}; sudo -n touch {MARK_PATH}; fi"
    whole = user_command("run-command", f"{mark}; {line}")
    if as_json:
        return remote.run(whole, limit=SYNC_LIMIT, keep=MIB)
    show = functools.partial(show_lines, f"{remote.node.short}: " if prefixed else "")
    code, _ = remote.run(whole, limit=SYNC_LIMIT, sink=show)
    if code:
        raise NodeError(format_exit(code))
    return 0, ""


@cli.command("runCommand", cls=OwnWords, epilog="Example: ./cluster.py runCommand -- ls -la /mnt")
@click.argument("quoted", metavar='["CMD ARGS"] [GROUP]', nargs=-1)
@click.option("--group", "named", type=GroupName(), help="The group, where it is not named after the command.")
@json_option
@click.pass_context
def run_command(
    ctx: click.Context, quoted: tuple[str, ...], named: str | None, as_json: bool, words: tuple[str, ...]
) -> None:
    """Run a shell command on every node; show its output."""
    app: App = ctx.obj
    left = list(quoted)
    line = words[0] if len(words) == 1 else shlex.join(words) if words else left.pop(0) if left else ""
    group = GroupName().convert(named or (left.pop(0) if left else "default"), None, ctx)
    if left or not line:
        raise click.UsageError(f"unexpected {' '.join(left)!r}" if left else "no command is given", ctx)
    nodes = app.open_group(group)
    step = functools.partial(command_step, line, as_json, len(nodes) > 1)
    outcomes = app.pool.each(nodes, step, Progress("Running", len(nodes)))
    if as_json:
        fields = ("error", "code", "output")
        shown = {one.node.name: dict(zip(fields, (one.error or None, *(one.value or (None, ""))))) for one in outcomes}
        result(json.dumps(shown, indent=2))
    failed = [one.node.name for one in outcomes if not one.ok or one.value[0]]
    if failed:
        raise ClusterError(f"{len(failed)} of {format_count(len(nodes), 'node')} failed: {', '.join(failed)}")


# $1 how many lines are read, $2 where to go on (or empty), $3 how many are shown, as tail's -n; not the two that
# each handshake makes. Without --follow: that would run on when the user has left.
JOURNAL = r"""
set -o pipefail
journalctl --no-pager --quiet --output short-unix --show-cursor --lines "$1" ${2:+--after-cursor "$2"} \
  --unit mtssrv.service --unit mitsuba-guard.service |
  sed '/ Incoming connection from /d; / Closing connection to /d' | tail -n "$3"
"""


def journal_step(cursor: str, remote: Remote) -> tuple[str, str]:
    """Return (the journal's lines after CURSOR, the new cursor)."""
    read, shown = ("all", "+1") if cursor else ("100000", "201")  # the last line is the cursor
    output = remote.check(root_command("journal", JOURNAL, read, cursor, shown), keep=MIB)
    text, _, end = output.rpartition("-- cursor: ")
    return (text, end.strip()) if end and "\n" not in end.strip() else (output, cursor)


@cli.command("logs", epilog="Example: ./cluster.py logs head -f")
@optional_node
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--install", "installation", is_flag=True, help="Show the installation's log, which is kept here.")
@click.pass_obj
def show_logs(app: App, name: str, follow: bool, installation: bool) -> None:
    """Show what a node's server wrote (default: the head's)."""
    if installation:
        node = find_node(app, name)
        path = log_folder(node.group) / f"{node.id}.install.log"
        if not path.exists():
            raise ClusterError(f"there is no {path}: {node.name} was not installed from this machine")
        return put(printable_lines(path.read_text("utf-8", "replace").removesuffix("\n")))
    node, cursor = open_node(app, name), ""
    while True:
        outcome = app.pool.each([node], functools.partial(journal_step, cursor))[0]
        if not outcome.ok:
            raise ClusterError(f"{node.name}: {outcome.error}")
        text, cursor = outcome.value
        if text:
            show_lines("", re.sub(r"(?m)^(\d{10})\.\d+ \S+", lambda at: format_time(int(at[1])), text).encode())
        if not follow:
            return None
        time.sleep(1)


@cli.command("regions", epilog="Example: ./cluster.py regions")
@json_option
@click.pass_obj
def list_regions(app: App, as_json: bool) -> None:
    """List the regions; the one of the settings is marked."""
    found, ours = fetch_regions(app.settings), app.settings.AWS_REGION
    if as_json:
        return result(json.dumps({"region": ours, "regions": found}, indent=2))
    return result("\n".join(f"{'*' if region == ours else ' '} {region}" for region in found))


COMPLETE_VARIABLE = "_CLUSTER_PY_COMPLETE"
COMPLETIONS = {  # file; the line to add: zsh and fish must find the program on PATH
    "bash": ("~/.bashrc", 'PATH="$PATH":{folder}; eval "$({variable}=bash_source {name})"'),
    "zsh": ("~/.zshrc", 'PATH="$PATH":{folder}; eval "$({variable}=zsh_source {name})"'),
    "fish": ("~/.config/fish/config.fish", "set -a PATH {folder}; {variable}=fish_source {name} | source"),
}


@cli.command("completion", epilog="Example: ./cluster.py completion bash")
@click.argument("shell", type=click.Choice(list(COMPLETIONS)), metavar="[SHELL]", required=False)
def completion(shell: str | None) -> None:
    """Print the line that makes your shell's Tab work."""
    shell = shell or os.path.basename(os.environ.get("SHELL", ""))
    if shell not in COMPLETIONS:
        raise ClusterError(f"name your shell: {command('completion', 'bash')} (or zsh, or fish)")
    path, line = COMPLETIONS[shell]
    called = shlex.split(Call.program)[0]
    folder, name = map(shlex.quote, os.path.split(os.path.abspath(shutil.which(called) or called)))
    note(f"Add this line to {path}:")
    result(line.format(folder=folder, variable=COMPLETE_VARIABLE, name=name))


# $1: seconds to add to the deadline, if there is one. The idle time begins anew.
EXTEND = r"""
set -euo pipefail
unit=/etc/systemd/system/mitsuba-deadline
if [ -e /run/mitsuba-cluster/in-use ]; then touch /run/mitsuba-cluster/in-use; fi
if [ ! -e $unit.timer ]; then exit 0; fi
old=$(sed -n 's/^OnCalendar=//p' $unit.timer)
at=$(date -u -d "@$(($(date -u -d "$old" +%s) + $1))" '+%Y-%m-%d %H:%M:%S UTC')
sed -i "s/^OnCalendar=.*/OnCalendar=$at/" $unit.timer
systemctl daemon-reload
systemctl restart mitsuba-deadline.timer
date -d "$at" +%s
"""


def extend_step(hours: float, remote: Remote) -> str:
    """Move one node's own timer, and begin its idle time anew; return when it ends."""
    seconds = first_line(remote.check(root_command("extend", EXTEND, str(round(hours * 3600)))))
    if remote.node.max_hours and not seconds.isdigit():
        raise NodeError("has lost its time limit")
    ends = f"ends at {format_time(int(seconds))}" if seconds else "has no time limit"
    idle = remote.node.idle_minutes
    return f"{ends}, may be idle for {format_count(idle, 'minute')} from now on" if idle else ends


@cli.command("extend", epilog="Example: ./cluster.py extend 2.5")
@click.argument("hours", type=Number(0, 8760, above=True), metavar="HOURS")
@group_argument
@click.pass_obj
def extend(app: App, hours: float, group: str) -> None:
    """Give the nodes HOURS more; restart their idle time.

    Nodes without a time limit get none.
    """
    nodes = [node for node in app.open_group(group) if node.max_hours or node.idle_minutes]
    if not nodes:
        raise ClusterError(f"no running node of {app.where(group)} has a time limit")
    progress = Progress("Extending", len(nodes), lambda outcome: f"{outcome.node.name}: {outcome.value}")
    outcomes = app.pool.each(nodes, functools.partial(extend_step, hours), progress)
    moved = [outcome.node for outcome in outcomes if outcome.ok and outcome.node.max_hours]
    for before in {node.max_hours or 0 for node in moved}:
        same = [node for node in moved if node.max_hours == before]
        tag_nodes(app.ec2, same, TAG_HOURS, f"{before + hours:g}")
    app.report(outcomes, "Extended")


READS = (
    "DescribeImages DescribeInstanceTypeOfferings DescribeInstanceTypes DescribeInstances DescribeKeyPairs "
    "DescribeRegions DescribeSecurityGroups DescribeSpotInstanceRequests "
    "DescribeSpotPriceHistory DescribeSubnets"
)
CHANGES = (
    "RunInstances TerminateInstances GetConsoleOutput CancelSpotInstanceRequests CreateTags "
    "AuthorizeSecurityGroupIngress RevokeSecurityGroupIngress DeleteSecurityGroup"
)


def make_policy(partition: str, bucket: str) -> dict[str, Any]:
    """Return the IAM policy for all that this tool does; what it makes or changes must have the tool's tag.

    Resource types and keys: https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonec2.html
    Spot launches: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ExamplePolicies_EC2.html
    """

    def allow(name: str, actions: str, resources: list[str], condition: dict[str, Any] | None = None) -> dict[str, Any]:
        named = [one if ":" in one else f"ec2:{one}" for one in actions.split()]
        statement = {"Sid": name, "Effect": "Allow", "Action": named, "Resource": resources}
        return statement | ({"Condition": condition} if condition else {})

    def kinds(names: str) -> list[str]:
        return [f"{arn}:ec2:*:{'' if name == 'image' else '*'}:{name}/*" for name in names.split()]

    arn = f"arn:{partition}"
    made = "instance volume spot-instances-request security-group"
    new, ours = ({"Null": {f"aws:{tag}/{TAG_GROUP}": "false"}} for tag in ("RequestTag", "ResourceTag"))
    made_by = {"StringEquals": {"ec2:CreateAction": ["RunInstances", "CreateSecurityGroup", "ImportKeyPair"]}}
    launch = "RunInstances CreateSecurityGroup"
    return {
        "Version": "2012-10-17",
        "Statement": [
            allow("Read", READS, ["*"]),
            allow("ReadPriceAndQuota", "pricing:GetProducts servicequotas:GetServiceQuota", ["*"]),
            allow("FindUbuntu", "ssm:GetParameter", [f"{arn}:ssm:*::parameter/aws/service/canonical/*"]),
            allow("LaunchFrom", f"{launch} ImportKeyPair", kinds("image subnet network-interface key-pair vpc")),
            allow("LaunchWithTag", launch, kinds(made), new),
            allow("TagWhatIsBeingMade", "CreateTags", kinds(f"{made} key-pair"), made_by),
            allow("ChangeAndEndOnlyWhatIsOurs", CHANGES, kinds(made), ours),
            allow("AddRules", "AuthorizeSecurityGroupIngress", kinds("security-group-rule")),
            allow("FindData", "s3:ListBucket", [f"{arn}:s3:::{bucket}"]),
            allow("MoveData", "s3:GetObject s3:PutObject s3:AbortMultipartUpload", [f"{arn}:s3:::{bucket}/*"]),
        ],
    }


@cli.command("policy", epilog="Example: ./cluster.py policy > policy.json")
@click.pass_obj
def policy(app: App) -> None:
    """Print the IAM policy that your settings need."""
    region = app.settings.AWS_REGION
    result(json.dumps(make_policy(find_partition(region)[0], app.settings.bucket[0] or "YOUR-BUCKET"), indent=2))


# --- main --------------------------------------------------------------------


LIMITS_VARIABLE = "MITSUBA_CLUSTER_LIMITS"


def called_as(path: str) -> str:
    """Return how to call the program at PATH again: by its name where PATH finds it, else by its path."""
    name = os.path.basename(path)
    found = shutil.which(name)
    if found and os.path.realpath(found) == os.path.realpath(path):
        return shlex.quote(name)
    return shlex.quote(path if os.sep in path else f"./{path}")


def override_limits() -> None:
    """Replace limits by those of MITSUBA_CLUSTER_LIMITS, JSON from name to number: for this tool's own tests."""
    for name, value in json.loads(os.environ.get(LIMITS_VARIABLE) or "{}").items():
        if not isinstance(globals().get(name), (int, float)):
            raise ClusterError(f"{LIMITS_VARIABLE}: {name} is not a limit")
        globals()[name] = value


def main() -> None:
    """Run the tool."""
    override_limits()
    Call.program = called_as(sys.argv[0])
    completing = COMPLETE_VARIABLE in os.environ  # then the shell knows the program by its name
    cli(prog_name=os.path.basename(sys.argv[0]) if completing else Call.program, complete_var=COMPLETE_VARIABLE)


if __name__ == "__main__":
    main()
