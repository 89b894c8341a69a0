"""What the user sees: screens on a real terminal of 80 columns, words of errors, names of nodes, logs, completion."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import cluster
from tests.localcloud.places import PROJECT
from tests.screens import Terminal, render, show, stop
from tests.support import LocalCloud, impatience, make_node

GROUP = "screens"
SCREENS = PROJECT / "tests" / "screens.txt"
PROGRAM = (sys.executable, "cluster.py")

pytestmark = pytest.mark.xdist_group("screens")  # they share three nodes


@pytest.fixture(scope="module")
def serving(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """Three nodes that serve."""
    for words in (("createNodes", "c1.xlarge", "3", GROUP), ("install", GROUP), ("start", GROUP)):
        done = cloud.cluster(*words)
        assert done.code == 0, done.err
    yield cloud
    cloud.end(GROUP)


def in_own_words(cloud: LocalCloud, lines: list[str]) -> str:
    """Return a screen without what differs from run to run; the lines of nodes that work side by side in order."""
    text = "\n".join(lines).replace(str(cloud.where.root), "ROOT")
    text = re.sub(r"\b(\d+s|\d+m|\dh\d\dm)\b", "9s", text)
    text = re.sub(r"\b0\.\d\d+\b", "0.99", text)
    text = re.sub(r"^Made a new SSH key: .*\n", "", text, flags=re.M)  # only a cloud's first test does
    text = re.sub(r"  +", "  ", text)
    text = re.sub(r"http://127\.0\.0\.1:\d+", "http://MIRROR", text)  # no node's address, wherever theirs begin
    text = re.sub(r"\b(127\.[\d.]+):\d+\b", r"\1", text)
    parts = re.split(r"((?:^127\.[\d.]+: (?!head).*\n)+)", text + "\n", flags=re.M)

    def in_order(part: str) -> str:  # .9 before .10
        return "".join(sorted(part.splitlines(True), key=lambda line: list(map(int, line.split(":")[0].split(".")))))

    return "".join(in_order(part) if i % 2 else part for i, part in enumerate(parts)).strip()


def in_own_addresses(text: str) -> str:
    """Return TEXT with addresses and short names that begin at 1, in the order of the real ones: a cloud counts all."""
    for pattern, form in ((r"\b127\.\d+\.(\d+)\.(\d+)\b", "127.10.0.{}"), (r"^(\d+)-(\d+)\b", "128-{}")):
        order = sorted({tuple(map(int, one)) for one in re.findall(pattern, text, re.M)})
        numbers = {one: form.format(number) for number, one in enumerate(order, 1)}
        text = re.sub(pattern, lambda found, at=numbers: at[int(found[1]), int(found[2])], text, flags=re.M)  # type: ignore[misc]
    return text


def test_screens(cloud: LocalCloud) -> None:
    """The session at 80x24 is what tests/screens.txt shows; to renew it, delete that file and look at the new one."""
    data = cloud.where.root / "smoke.vol"
    data.write_bytes(b"v" * 1_200_000)
    patience = impatience({"ANSWER_LIMIT": 15, "EXCHANGE_LIMIT": 15})  # a slow machine: healthy nodes take long
    screens = []
    cloud.end("default")
    for words in (
        ["createNodes", "c1.xlarge", "3"],
        ["install"],
        ["start"],
        ["status"],
        ["status", "--servers"],
        ["syncData", str(data)],
        ["terminateAll"],
    ):
        if "--servers" in words:
            cloud.fault("sshd-silent", cloud.nodes("default")[-1])
        with cloud.options(pace="none"):  # so the nodes are launched in the order of their addresses
            seen = show(cloud, *PROGRAM, *words, **patience)
        if "--servers" in words:
            cloud.fault("heal", cloud.nodes("default")[-1])
        assert seen.code == 0, seen.raw
        assert all(len(line) <= 80 for line in seen.lines if "c1.xlarge  running" in line)
        name = " ".join(words).replace(str(data), "smoke.vol")
        screens.append(f"$ ./cluster.py {name}\n{in_own_words(cloud, seen.lines)}\n")
    with cloud.options(pace="none", launch_faults=["", "sshd-silent", ""]):
        terminal = Terminal(cloud, *PROGRAM, "up", "c1.xlarge", "3", env=cloud.environment(), **patience)
        terminal.read(until="Up: 2/3 nodes", times=2)
        whole, _, _ = terminal.raw.decode().rpartition("\r\x1b[1A")  # the last frame may lack its end
        cloud.fault("heal", cloud.nodes("default")[1])
        seen = terminal.end()
    assert seen.code == 0, seen.raw
    screens.append(f"$ ./cluster.py up c1.xlarge 3\n{in_own_words(cloud, seen.lines)}\n")
    screens.append(f"While the second node boots:\n{in_own_words(cloud, render(whole))}\n")
    cloud.end("default")
    text = in_own_addresses("\n".join(screens))
    if not SCREENS.exists():
        SCREENS.write_text(text)
    assert text == SCREENS.read_text()


def test_eight_nodes_fit_into_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        make_node(
            f"i-0123456789abcdef{i}",
            i,
            public_name=f"ec2-203-0-113-{i}.eu-central-1.compute.amazonaws.com",
            public_ip=f"203.0.113.{i}",
            private_ip=f"172.31.4.{i}",
            price=0.52,
            role="head" if i == 3 else "worker",
        )
        for i in range(10, 18)
    ]
    monkeypatch.setattr(cluster, "terminal_width", lambda: 80)
    lines = cluster.format_nodes(nodes).splitlines()
    assert len(lines) == 9
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("4-10  ec2-203-0-113-10…  c1.xlarge  running")
    assert "i-0123456789abcdef10" in cluster.format_nodes(nodes, wide=True)
    limited = [node._replace(max_hours=1e6) for node in nodes]
    watched = [[title, *["idle"] * 8] for title in ("SERVER", "LOAD", "CLIENTS")]
    titles = cluster.format_nodes(limited, more=watched).splitlines()[0].split()
    assert "ENDS" in titles
    assert "NAME" not in titles


def test_the_head_is_first_then_the_oldest() -> None:
    old, tenth, ninth = (
        make_node("i-1", 0),
        make_node("i-2", 5, private_ip="10.0.0.10"),
        make_node("i-3", 5, private_ip="10.0.0.9"),
    )
    head = make_node("i-4", 9, role="head")
    assert cluster.in_order([tenth, ninth, head, old]) == [head, old, ninth, tenth]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "xterm")])
def test_colours_only_where_they_are_wanted(serving: LocalCloud, name: str, value: str) -> None:
    seen = show(serving, *PROGRAM, "status", GROUP, "--servers", **{name: value})
    assert seen.code == 0, seen.raw
    assert ("\x1b[" in seen.raw) == (value == "xterm")
    assert re.search(r"^\d+-\d+  127\.\S+  c1\.xlarge  running  .*head", seen.text, re.M)


def test_errors_are_red_on_a_terminal(cloud: LocalCloud) -> None:
    seen = show(cloud, *PROGRAM, "install", "empty")
    assert "\x1b[31mError:\x1b[0m no running nodes in group 'empty'" in seen.raw


def test_status_json(serving: LocalCloud) -> None:
    shown = json.loads(serving.cluster("status", GROUP, "--servers", "--json").out)
    group = shown["groups"][GROUP]
    head = group["nodes"][0]
    assert (head["role"], head["name"], head["server"], head["clients"]) == ("head", group["head"], "serving", [])
    assert head["server_text"].startswith(f"serves {head['server_cores']} cores; load 0.42 0.31 0.12 on 4 cores")
    assert group["totals"]["nodes"] == shown["totals"]["nodes"] == 3
    assert group["totals"]["hourly"] == pytest.approx(3 * 0.525)
    status = cluster.cli.get_command(click.Context(cluster.cli), "status")
    assert status
    said = " ".join(status.get_help(click.Context(status)).split())
    assert all(f"{word} ({meaning})" in said for word, (_, meaning) in cluster.SERVER_WORDS.items())
    load = json.loads(serving.cluster("systemLoad", GROUP, "--json").out)
    assert load[head["name"]] == {"error": None, "load": [0.42, 0.31, 0.12], "cores": 4, "memory_mb": [612, 7168]}
    assert json.loads(serving.cluster("regions", "--json").out)["region"] == "us-east-1"


def test_status_watch_shows_servers_and_clients(serving: LocalCloud) -> None:
    terminal = Terminal(serving, *PROGRAM, "status", GROUP, "--watch")
    assert terminal.read(until="until Ctrl-C", times=2)
    seen = stop(terminal, signal.SIGINT)
    assert seen.code == 130
    assert re.search(r"SERVER +LOAD +CLIENTS", seen.text)
    assert re.search(r"head .* serving +0\.42 +0$", seen.text, re.M)


def test_a_frozen_node_holds_nothing_back(serving: LocalCloud) -> None:
    frozen = serving.nodes(GROUP)[-1]
    serving.fault("sshd-silent", frozen)
    shown = serving.cluster("status", GROUP, "--servers", limits={"ANSWER_LIMIT": 10})
    serving.fault("heal", frozen)
    assert cluster.ANSWER_LIMIT == 5
    assert shown.out.startswith(f"Group {GROUP}")
    assert f"{frozen['name']}: frozen or cut off: no answer within 10 s\n" in shown.out
    assert shown.out.count(": serves ") == 2
    assert shown.code == 0


@pytest.mark.parametrize("how", ["short", "head", "beginning"])
def test_nodes_go_by_short_names(serving: LocalCloud, how: str) -> None:
    head = next(node for node in serving.nodes(GROUP) if node["role"] == "head")
    assert head["short"] == "-".join(head["private_ip"].split(".")[-2:])
    name = {"short": head["short"], "head": "head", "beginning": head["id"][:-2]}[how]
    shown = serving.cluster("logs", name, env={"TZ": "EST5"})
    line = "2027-01-15 03:00:00 (08:00:00 UTC) mtssrv[1]: Listening on port 7554"
    assert (shown.code, shown.out.splitlines()[0]) == (0, line), shown.err


def test_a_name_that_means_several_nodes(serving: LocalCloud) -> None:
    refused = serving.cluster("terminate", "i-")
    assert refused.code == 1
    assert refused.last_line.startswith("Error: 'i-' may be ")
    assert refused.last_line.endswith(": name one of them by its id")
    assert serving.cluster("terminate", "").code == 1
    assert len(serving.nodes(GROUP)) == 3


def test_logs_go_on(serving: LocalCloud) -> None:
    node = serving.nodes(GROUP)[1]
    terminal = Terminal(serving, *PROGRAM, "logs", node["short"], "-f")
    assert terminal.read(until="Listening on port 7554")
    serving.fault("server-lacks-file", node)
    assert terminal.read(until="smoke.vol: unable to open the file")
    assert stop(terminal, signal.SIGINT).code == 130
    shown = serving.cluster("status", GROUP, "--servers").out
    assert "restarted 1 time, after: ERROR: smoke.vol: unable to open the file" in shown
    installed = serving.cluster("logs", node["short"], "--install")
    assert installed.code == 0, installed.err
    assert "version 0.6.0\n" in installed.out


def test_words_after_two_dashes_are_the_command(serving: LocalCloud) -> None:
    done = serving.cluster("runCommand", "--group", GROUP, "--", "printf", "%s\n", "a  b", "--config")
    assert done.code == 0, done.err
    shorts = [node["short"] for node in serving.nodes(GROUP)]
    assert sorted(done.out.splitlines()) == sorted(
        f"{short}: {word}" for short in shorts for word in ("a  b", "--config")
    )
    quoted = serving.cluster("runCommand", "--", "echo $((6*7))", env={})
    assert quoted.code == 1  # there is no group default
    assert "no running nodes in group 'default'" in quoted.last_line


def test_output_comes_as_it_is_written(serving: LocalCloud, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    wait = f"echo first; while [ ! -e {seen} ]; do sleep 0.1; done; echo second; exit 3"
    child = serving.start(*PROGRAM, "runCommand", wait, GROUP)
    assert child.stdout
    assert child.stderr
    assert child.stdout.readline().endswith(": first\n")
    seen.touch()
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out.count(": second\n")) == (1, 3)
    assert err.count(": exit code 3\n") == 3


WORDS = [
    (("createNodes", "c1.xlarge", "eight"), "COUNT must be a whole number from 1 to 5000, not 'eight'", 2),
    (("addSpotNodes", "c1.xlarge", "0.2", "1"), "not '0.2'; COUNT stands before MAXPRICE", 2),
    (("createNodes", "2", "c1.xlarge"), "not 'c1.xlarge'; did you mean ./cluster.py createNodes c1.xlarge 2?", 2),
    (("addSpotNodes", "c1.xlarge", "2", "cheap"), "MAX_PRICE must be a number above 0, at most 1000, not 'cheap'", 2),
    (("tunnel", "--port", "x"), "--port must be a whole number from 1 to 65535, not 'x'", 2),
    (("runCommand", "ls", "-la", "/mnt"), "quote the command, or put -- before it", 2),
    (("runCommand", "ls", "/mnt"), "quote the command, or put -- before it", 2),
    (("runCommand",), "no command is given", 2),
    (("statsu",), "No such command 'statsu'; did you mean status?", 2),
    (("status", "--config", "."), ". is a folder, no settings file; did you mean config.py?", 1),
    (("status", "--config"), "Option '--config' requires an argument", 2),
    (("--config", "/nowhere/a", "status", "--config", "/nowhere/b"), "there is no settings file /nowhere/b", 1),
]


@pytest.mark.parametrize(("words", "says", "code"), WORDS, ids=[" ".join(words) for words, *_ in WORDS])
def test_errors_in_peoples_words(words: tuple[str, ...], says: str, code: int) -> None:
    done = subprocess.run([*PROGRAM, *words], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert says in done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (code, "")


def test_text_without_quotes_names_its_line(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("SSH_PORT = 22\nAWS_REGION = us-east-1\n")
    done = subprocess.run(
        [*PROGRAM, "status", "--config", str(config)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert "Error: config.py, line 2: NameError (is there a value without quotes?" in done.stderr


def test_messages_name_the_program_and_the_settings_as_they_were_called(cloud: LocalCloud, tmp_path: Path) -> None:
    link = tmp_path / "mitsuba-nodes"
    link.symlink_to(PROJECT / "cluster.py")
    config = cloud.config({"S3_PATH": ""})
    words = [str(link), "install", "nowhere", "--config", str(config)]
    called = {
        str(link): words,
        "./mitsuba-nodes": ["sh", "-c", f"cd {tmp_path} && ./mitsuba-nodes install nowhere --config {config}"],
        "mitsuba-nodes": ["mitsuba-nodes", *words[1:]],
    }
    for name, typed in called.items():
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} if name == "mitsuba-nodes" else {}
        environment = cloud.environment(**path)
        done = subprocess.run(typed, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        assert f"; {name} --config {config} createNodes TYPE COUNT nowhere makes some" in done.stderr
    unset = cloud.cluster("syncData", "x", "--config", str(config))
    assert f"S3_PATH is not set in {config}" in unset.last_line


def complete(cloud: LocalCloud, typed: str, **more: str) -> set[str]:
    """Return what bash would be offered for TYPED."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - (not typed.endswith(" ")))}
    env = cloud.environment(_CLUSTER_PY_COMPLETE="bash_complete", **words, **more)
    done = subprocess.run(PROGRAM, cwd=PROJECT, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_completion_knows_groups_nodes_and_files(serving: LocalCloud) -> None:
    node = serving.nodes(GROUP)[0]
    assert f"plain,{GROUP}" in complete(serving, "cluster.py install scr")
    unknown = str(serving.config({"MAX_HOUR": 1}))  # a setting that does not exist
    assert f"plain,{GROUP}" in complete(serving, "cluster.py install scr", MITSUBA_CLUSTER_CONFIG=unknown)
    assert {"plain,head", f"plain,{node['short']}"} <= complete(serving, "cluster.py login ")
    assert complete(serving, "cluster.py syncData pyp") == {"file,pyp"}
    assert complete(serving, "cluster.py stat") == {"plain,status"}


SHELLS = {  # begin, what asks the shell, and what it must say
    "bash": ("", "complete -p cluster.py", "-F _clusterpy_completion cluster.py"),
    "zsh": (
        "autoload -Uz compinit; compinit -D; ",
        "echo $+commands[cluster.py] $+functions[_clusterpy_completion]",
        "1 1",
    ),
    "fish": ("", "complete -C './cluster.py stat'", "status"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_the_line_to_add(shell: str, tmp_path: Path) -> None:
    run = functools.partial(subprocess.run, cwd=PROJECT, capture_output=True, text=True, check=True)
    line = run([*PROGRAM, "completion", shell]).stdout.strip()
    assert line.count(str(PROJECT)) == 1
    assert f"_CLUSTER_PY_COMPLETE={shell}_source cluster.py" in line
    if shutil.which(shell):
        begin, ask, says = SHELLS[shell]
        env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        assert says in run([shell, "-c", f"{begin}{line}; {ask}"], env=env).stdout


def test_version_is_pyprojects() -> None:
    text = (PROJECT / "pyproject.toml").read_text()
    assert f'version = "{cluster.VERSION}"' in text or 'dynamic = ["version"]' in text
    done: Any = subprocess.run([*PROGRAM, "--version"], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == f"mitsuba-cluster {cluster.VERSION}\n"


@pytest.mark.parametrize("name", cluster.cli.commands)
def test_each_commands_help_has_an_example(name: str) -> None:
    context = click.Context(cluster.cli)
    command = cluster.cli.get_command(context, name)
    assert command
    assert re.search(rf"^ +Example: ./cluster.py {name}\b", command.get_help(click.Context(command)), re.M) or (
        command.hidden
    )


def test_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 260
