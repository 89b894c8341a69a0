"""EC2, its nodes and S3 on this machine, for trying the tool without an AWS account."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tests.localcloud.delays import PACES
from tests.localcloud.image import base_image
from tests.localcloud.packages import make_repository
from tests.localcloud.places import PROJECT, Places, default_root

TOOLS = ("systemd-nspawn", "mmdebstrap", "dnsmasq", "nft", "ip", "nsenter", "unshare", "dpkg-scanpackages")
START_LIMIT = 60  # seconds
STOP_LIMIT = 60  # seconds
ASK_LIMIT = 60  # seconds


def best_kind() -> str:
    """Return "nspawn" where this machine can boot real nodes, else "process"."""
    able = os.getuid() == 0 and all(shutil.which(tool) for tool in TOOLS) and Path("/etc/debian_version").exists()
    return "nspawn" if able else "process"


def ready(where: Places) -> dict[str, Any]:
    """Return what the running cloud wrote when it was ready."""
    if not where.ready.exists():
        raise click.ClickException("no cloud is running here; start one with: python -m tests.localcloud up")
    answer: dict[str, Any] = json.loads(where.ready.read_text())
    return answer


def environment(where: Places) -> dict[str, str]:
    """Return this process's environment, changed so that AWS means the local cloud."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    given: dict[str, str] = ready(where)["environment"]
    return kept | given


def inside(where: Places, words: list[str]) -> list[str]:
    """Return the command that runs WORDS where the nodes can be reached."""
    if ready(where)["kind"] == "process":
        return words
    resolver = where.root / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\n")
    script = f'mount --bind {resolver} /etc/resolv.conf && exec "$@"'
    enter = ["nsenter", f"--net=/run/netns/{where.namespace}", "unshare", "--mount", "--propagation", "private"]
    return [*enter, "sh", "-c", script, "sh", *words]


def ask(where: Places, what: str, body: Any = None) -> Any:
    """Send one request to the running cloud's control address."""
    cloud, text = ready(where), json.dumps(body)
    url = f"{cloud['environment']['AWS_ENDPOINT_URL']}/_localcloud/{what}"
    if cloud["kind"] == "process":
        try:
            with urllib.request.urlopen(url, text.encode(), ASK_LIMIT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise click.ClickException(error.read().decode()) from None
    words = [sys.executable, "-c", ASK, url, text, str(ASK_LIMIT)]
    done = subprocess.run(inside(where, words), capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


ASK = """  # from inside the namespace of real nodes
import sys, urllib.error, urllib.request
url, body, limit = sys.argv[1:]
try:
    print(urllib.request.urlopen(url, body.encode(), float(limit)).read().decode())
except urllib.error.HTTPError as error:
    sys.exit(error.read().decode())
"""


def bring_up(where: Places, kind: str, package: str | None = None) -> subprocess.Popen[bytes]:
    """Start a cloud in WHERE and wait until it answers; return its daemon."""
    if where.ready.exists():
        raise click.ClickException(f"a cloud is running in {where.root} already")
    where.root.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "tests.localcloud.daemon", str(where.root), kind]
    if kind == "nspawn":
        image = base_image(say)
        make_repository(where.apt, Path(package) if package else None, image, say)
        subprocess.run(["ip", "netns", "add", where.namespace], check=False, capture_output=True)
        unshare = ["unshare", "--mount", "--propagation", "private"]
        words = ["nsenter", f"--net=/run/netns/{where.namespace}", *unshare, *words, str(image)]
    with where.log.open("wb") as log:
        daemon = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=PROJECT
        )
    where.pid.write_text(str(daemon.pid))
    wait_until_ready(where, daemon)
    return daemon


def say(text: str) -> None:
    """Report progress."""
    click.echo(text, err=True)


def wait_until_ready(where: Places, daemon: subprocess.Popen[bytes]) -> None:
    """Wait until the daemon answers."""
    deadline = time.monotonic() + START_LIMIT
    while not where.ready.exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            take_down(where)
            words = where.log.read_text().strip().splitlines()[-1:]
            raise click.ClickException(f"the local cloud did not start; see {where.log}: {' '.join(words)}")
        time.sleep(0.05)


def take_down(where: Places) -> None:
    """Stop the cloud and all its nodes."""
    with suppress(OSError, ValueError):
        number = int(where.pid.read_text())
        os.kill(number, signal.SIGTERM)
        deadline = time.monotonic() + STOP_LIMIT
        while Path(f"/proc/{number}").exists() and time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(number, os.WNOHANG)
            time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", where.namespace], check=False, capture_output=True)
    for file in (where.ready, where.pid):
        file.unlink(missing_ok=True)


@click.group(help=__doc__)
@click.option("--root", type=click.Path(path_type=Path), help="The cloud's folder (default: one in /tmp).")
@click.pass_context
def main(context: click.Context, root: Path | None) -> None:
    """Hold the cloud's folder for the commands."""
    context.obj = Places((root or default_root()).resolve())


@main.command()
@click.option("--kind", type=click.Choice(["nspawn", "process"]), help="Kind of node (default: the best that works).")
@click.option("--package", type=click.Path(exists=True), help="A real mitsuba .deb in place of the stand-in.")
@click.option("--pace", type=click.Choice(list(PACES)), default="short", help="Of AWS's delays (default: short).")
@click.pass_obj
def up(where: Places, kind: str | None, package: str | None, pace: str) -> None:
    """Start the cloud."""
    bring_up(where, kind or best_kind(), package)
    ask(where, "options", {"pace": pace})
    click.echo(f"up: {ready(where)['kind']} nodes, folder {where.root}")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="CMD…")
@click.pass_obj
def run(where: Places, words: tuple[str, ...]) -> None:
    """Run a command inside the cloud: its addresses, names and credentials."""
    command = inside(where, list(words))
    os.execvpe(command[0], command, environment(where))


@main.command()
@click.pass_obj
def status(where: Places) -> None:
    """Show the nodes, with the seconds that each took to answer."""
    click.echo(json.dumps(ask(where, "status"), indent=1))


@main.command()
@click.argument("node")
@click.argument("seconds", type=float, default=120)
@click.pass_obj
def interrupt(where: Places, node: str, seconds: float) -> None:
    """Reclaim a spot NODE after SECONDS, with the notice that AWS gives."""
    click.echo(ask(where, "interrupt", {"node": node, "seconds": seconds}))


@main.command()
@click.argument("what")
@click.argument("node")
@click.pass_obj
def fault(where: Places, what: str, node: str) -> None:
    """Let WHAT go wrong with a NODE; an unknown WHAT lists what there is."""
    click.echo(ask(where, "fault", {"node": node, "what": what}))


@main.command()
@click.argument("count", type=int)
@click.pass_obj
def mirror(where: Places, count: int) -> None:
    """Let the next COUNT answers of the nodes' apt mirror be errors (-1: all)."""
    click.echo(ask(where, "mirror", count))


@main.command()
@click.argument("rules")
@click.pass_obj
def faults(where: Places, rules: str) -> None:
    """Spoil AWS calls by RULES, a JSON list (see endpoint.py); [] ends it."""
    click.echo(ask(where, "faults", json.loads(rules)))


@main.command()
@click.argument("file", type=click.File())
@click.pass_obj
def policy(where: Places, file: Any) -> None:
    """Let IAM decide on each AWS call by the policy in FILE ("null" in it: allow all)."""
    click.echo(ask(where, "policy", json.load(file)))


@main.command()
@click.argument("changes")
@click.pass_obj
def options(where: Places, changes: str) -> None:
    """Change options of EC2 by a JSON object: those of aws.Options, or {"pace": "real"}."""
    click.echo(json.dumps(ask(where, "options", json.loads(changes))))


@main.command()
@click.pass_obj
def down(where: Places) -> None:
    """Stop the cloud and all its nodes."""
    take_down(where)
    click.echo("down")


@main.command()
@click.option("--kind", type=click.Choice(["nspawn", "process"]), help="Kind of node (default: the best that works).")
@click.option("--nodes", default=3, show_default=True, help="How many nodes.")
@click.option("--package", type=click.Path(exists=True), help="A real mitsuba .deb in place of the stand-in.")
@click.pass_obj
def session(where: Places, kind: str | None, nodes: int, package: str | None) -> None:
    """Play the user's whole session, from createNodes to terminateAll."""
    from tests.localcloud.session import play

    kind = kind or best_kind()
    bring_up(where, kind, package)
    try:
        code = play(where, nodes)
    finally:
        take_down(where)
    sys.exit(code)


if __name__ == "__main__":
    main(prog_name="python -m tests.localcloud")
