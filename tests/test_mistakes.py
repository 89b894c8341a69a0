"""Every mistake: one clear line that says what to do, the right exit code, nothing left behind.

`python -m pytest tests/test_mistakes.py --mistakes` prints the table of them.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.localcloud.places import PROJECT
from tests.support import LocalCloud, Result, wait_until

CREATE = ("createNodes", "c1.xlarge", "1")


@dataclass(frozen=True)
class Mistake:
    """What is typed and set, and the line and code that it must give."""

    name: str
    words: tuple[str, ...]
    says: str
    code: int = 1
    settings: dict[str, Any] | None = None
    env: dict[str, str] = field(default_factory=dict)


MISTAKES = [
    Mistake("unknown type", ("createNodes", "c9.huge", "1"), "us-east-1 has no instance type 'c9.huge'"),
    Mistake("mistyped type", ("spotPrices", "c1.xlrage"), "no instance type 'c1.xlrage'; did you mean c1.xlarge?"),
    Mistake("count 0", ("createNodes", "c1.xlarge", "0"), "COUNT must be a whole number from 1 to 5000, not '0'", 2),
    Mistake(
        "count -1", ("createNodes", "c1.xlarge", "--", "-1"), "COUNT must be a whole number from 1 to 5000, not '-1'", 2
    ),
    Mistake("count x", ("createNodes", "c1.xlarge", "x"), "COUNT must be a whole number from 1 to 5000, not 'x'", 2),
    Mistake("no count", ("createNodes", "c1.xlarge"), "Missing argument 'COUNT'", 2),
    Mistake("unknown command", ("createNode",), "No such command 'createNode'; did you mean createNodes?", 2),
    Mistake("bad group", (*CREATE, "a/b"), "'a/b' is no group name", 2),
    Mistake("group like an option", ("status", "--", "-x"), "'-x' is no group name", 2),
    Mistake("not offered here", CREATE, "c1.xlarge is not offered in eu-central-1", 1, {"AWS_REGION": "eu-central-1"}),
    Mistake("arm64 type", ("createNodes", "c7g.large", "1"), "is for x86_64, which c7g.large is not"),
    Mistake(
        "uefi-only image",
        CREATE,
        "boots by uefi only, which c1.xlarge can't",
        settings={"AMI_IDS": {"us-east-1": "ami-0fedcba9876543210"}},
    ),
    Mistake(
        "arm64 image",
        CREATE,
        "is for arm64, which c1.xlarge is not",
        settings={"AMI_IDS": {"us-east-1": "ami-0123456789abcdef0"}},
    ),
    Mistake(
        "no such image",
        CREATE,
        "there is no image ami-0000",
        settings={"AMI_IDS": {"us-east-1": "ami-00000000000000000"}},
    ),
    Mistake(
        "no credentials",
        ("status",),
        "no AWS credentials: run `aws configure`",
        env={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
    ),
    Mistake("unknown profile", ("status",), "no AWS credentials", env={"AWS_PROFILE": "nobody"}),
    Mistake(
        "unknown region",
        ("status",),
        "'us-east-9' is no region that boto3 knows; did you mean us-east-",
        settings={"AWS_REGION": "us-east-9"},
    ),
    Mistake(
        "no nodes", ("install", "empty"), "no running nodes in group 'empty' (us-east-1); ./cluster.py createNodes"
    ),
    Mistake("no nodes to end", ("terminateAll", "empty"), "Nothing to terminate: group 'empty' does not exist"),
    Mistake("unknown node", ("terminate", "i-0123456789abcdef0"), "no node 'i-0123456789abcdef0' of this tool"),
    Mistake("malformed node", ("login", "; rm -rf /"), "no node '; rm -rf /' of this tool"),
    Mistake("no head", ("tunnel", "empty"), "no running nodes in group 'empty'"),
    Mistake("unknown request", ("cancelSpot", "sir-nothing"), "no spot request 'sir-nothing' of this tool"),
    Mistake("a request's name that is empty", ("cancelSpot", ""), "no spot request '' of this tool"),
    Mistake(
        "no such file, and no bucket",
        ("syncData", "x"),
        "there is no file 'x' here, and S3_PATH is not set in ",
        settings={"S3_PATH": "s3://XXXXXX"},
    ),
    Mistake(
        "no bucket", ("syncData", "x"), "there is no bucket 'nowhere-123'", settings={"S3_PATH": "s3://nowhere-123"}
    ),
    Mistake(
        "no settings file", ("--config", "/nowhere/config.py", "status"), "there is no settings file /nowhere/config.py"
    ),
    Mistake("no package file", CREATE, "MITSUBA_PACKAGE: there is no file", settings={"MITSUBA_PACKAGE": "gone.deb"}),
    Mistake(
        "address look-up fails",
        CREATE,
        "set CLIENT_CIDR in ",
        env={"MITSUBA_CLUSTER_ADDRESS_URL": "http://127.0.0.1:1/"},
    ),
    Mistake(
        "open to the world",
        CREATE,
        "would open mtssrv, which has no password, to much of the world",
        settings={"CLIENT_CIDR": "0.0.0.0/0"},
    ),
    Mistake(
        "half a credential", CREATE, "set both AWS_ACCESS_KEY_ID and", settings={"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE"}
    ),
]

WRONG_SETTINGS: dict[str, Any] = {
    "AWS_ACCESS_KEY_ID": "with space",
    "AWS_SECRET_ACCESS_KEY": 5,
    "AWS_REGION": "Virginia",
    "KEYPAIR_NAME": "",
    "SSH_PRIVATE_KEY_FILE": 7,
    "SSH_USER": "Big User",
    "SSH_PORT": "22",
    "AMI_IDS": ["ami-1"],
    "SUBNET_ID": "mine",
    "UBUNTU_RELEASE": "20.04",
    "PRIVATE_NODES": "no",
    "CLIENT_CIDR": "everyone",
    "PUBLIC_SERVER_PORT": "yes",
    "ROOT_VOLUME_GB": 1.5,
    "MAX_HOURS": -1,
    "PKG_REPOSITORY": "https://example.org",
    "MITSUBA_PACKAGE": "http://example.org/mitsuba.deb",
    "DATA_DIR": "mnt",
    "S3_PATH": "bucket/prefix",
}


def only_one_line(done: Result) -> str:
    """Return the line of a failed command, having seen that there is no traceback."""
    assert "Traceback" not in done.err, done.err
    return done.last_line


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "-"))
def test_mistake(cloud: LocalCloud, mistake: Mistake, request: pytest.FixtureRequest) -> None:
    before = len(cloud.ask("status"))
    key = {"SSH_PRIVATE_KEY_FILE": str(cloud.where.root / "never-made.pem")}
    done = cloud.cluster(*mistake.words, settings=key | (mistake.settings or {}), env=mistake.env)
    assert not (cloud.where.root / "never-made.pem").exists()
    line = only_one_line(done)
    assert mistake.says in line
    assert done.code == mistake.code
    assert done.out == ""
    request.node.user_properties.append(("mistake", (mistake.name, str(done.code), line)))
    assert len(cloud.ask("status")) == before


def test_a_launch_without_credentials_says_so_once(cloud: LocalCloud) -> None:
    done = cloud.cluster(*CREATE, "--dry-run", env={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""})
    assert done.code == 1
    assert done.err.count("no AWS credentials") == 1, done.err


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_setting(cloud: LocalCloud, name: str) -> None:
    done = cloud.cluster("status", settings={name: WRONG_SETTINGS[name]})
    shown = "(not shown)" if name.startswith("AWS_") and "KEY" in name else repr(WRONG_SETTINGS[name])
    assert re.fullmatch(rf"Error: config-\d+\.py: {name} is {re.escape(shown)}; expected: .+", only_one_line(done))
    assert done.code == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("AWS_REGION = 'us-east-1\n", "line 1: SyntaxError"),
        ("AWS_REGION = region\n", "line 1: NameError (is there a value without quotes?"),
        ("1 / 0\n", "line 1: ZeroDivisionError"),
        ("\nopen('/nowhere')\n", "config.py, line 2: FileNotFoundError (No such file or directory)"),
        ("raise SystemExit\n", "config.py, line 1: SystemExit (a settings file only sets names)"),
    ],
)
def test_broken_config(cloud: LocalCloud, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(text)
    done = cloud.cluster("--config", str(path), "status")
    assert done.code == 1, done.err
    assert says in only_one_line(done)


def test_advice_names_the_settings_file_that_was_given(cloud: LocalCloud) -> None:
    config = cloud.config({"MAX_HOURS": 1}).rename(cloud.where.root / "my config.py")
    done = cloud.cluster("--config", str(config), "start", "nowhere")
    assert f"; ./cluster.py --config '{config}' createNodes TYPE COUNT nowhere makes some" in only_one_line(done)


def test_unknown_setting_is_a_warning(cloud: LocalCloud) -> None:
    done = cloud.cluster("status", "nothing-here", settings={"AWS_REGON": "us-west-2"})
    assert done.code == 0, done.err
    assert "sets AWS_REGON, which is no setting; did you mean AWS_REGION?" in done.err


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("expired", "your AWS session has expired; renew it, e.g. with `aws sso login`"),
        ("code:AuthFailure", "AWS refuses these credentials (AuthFailure): check AWS_PROFILE, `aws configure`, or"),
        ("code:AuthFailure", "or AWS_REGION: ./cluster.py regions lists the regions that are enabled for your account"),
        ("denied", "AWS denies DescribeInstances: ask for that permission; ./cluster.py policy prints all that"),
        ("html", "AWS is busy (502 from DescribeInstances)"),
    ],
)
def test_refusals_of_aws(cloud: LocalCloud, fault: str, says: str) -> None:
    with cloud.faults({"kind": fault, "action": "DescribeInstances"}):
        done = cloud.cluster("status")
    assert done.code == 1, done.err
    assert says in only_one_line(done)


def test_output_to_a_full_disk(cloud: LocalCloud) -> None:
    with open("/dev/full", "w") as full:
        done = cloud.run("./cluster.py", "regions", stdout=full)
    assert done.code == 1, done.err
    assert "No space left on device" in only_one_line(done)


def make_folder(path: Path) -> None:
    """Put a folder where a file is."""
    path.unlink()
    path.mkdir()


KEY_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no key": (lambda path: path.write_text("hello"), "is no SSH private key"),
    "0640": (lambda path: path.chmod(0o640), "can be read by other users: chmod 600"),
    "0644": (lambda path: path.chmod(0o644), "can be read by other users: chmod 600"),
    "broken": (lambda path: path.write_text(path.read_text()[:120]), "can't be read as an SSH private key"),
    "a folder": (make_folder, "key.pem: Is a directory"),
}


@pytest.fixture(scope="module")
def one_node(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """A node for wrong keys to be tried on."""
    with cloud.options(pace="none"):
        assert cloud.cluster("createNodes", "c1.xlarge", "1", "key-file").code == 0
    yield cloud
    cloud.end("key-file")


@pytest.mark.parametrize("name", KEY_FILES)
def test_key_file(one_node: LocalCloud, tmp_path: Path, name: str) -> None:
    cloud = one_node
    spoil, says = KEY_FILES[name]
    path = tmp_path / "key.pem"
    shutil.copy(cloud.where.root / "key.pem", path)
    path.chmod(0o600)
    spoil(path)
    done = cloud.cluster("runCommand", "true", "key-file", settings={"SSH_PRIVATE_KEY_FILE": str(path)})
    assert done.code == 1, done.err
    assert says in only_one_line(done)


def test_encrypted_key_and_ssh_agent(cloud: LocalCloud, tmp_path: Path) -> None:
    group = "agent"
    assert cloud.cluster("createNodes", "c1.xlarge", "8", group).code == 0
    path = tmp_path / "key.pem"
    shutil.copy(cloud.where.root / "key.pem", path)
    path.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(path)], check=True)
    use = {"SSH_PRIVATE_KEY_FILE": str(path)}
    env = {"SSH_AUTH_SOCK": str(tmp_path / "agent")}
    run = functools.partial(cloud.cluster, "runCommand", "echo hi", group, settings=use, env=env)
    assert "is encrypted: ssh-add it, or run this at a terminal" in only_one_line(run())
    with subprocess.Popen(["ssh-agent", "-D", "-a", env["SSH_AUTH_SOCK"]], stdout=subprocess.DEVNULL) as agent:
        try:
            wait_until(lambda: Path(env["SSH_AUTH_SOCK"]).exists())
            subprocess.run(["ssh-add", "-q", str(cloud.where.root / "key.pem")], env=os.environ | env, check=True)
            listed = subprocess.run(["ssh-add", "-L"], env=os.environ | env, capture_output=True, text=True, check=True)
            for _ in range(2):
                done = run()
                assert (done.code, done.out.count(": hi\n")) == (0, 8), done.err
                path.write_text(listed.stdout)
        finally:
            agent.terminate()
    assert "ssh-agent does not have its private half" in only_one_line(run())
    cloud.end(group)


def test_key_pair_name_of_another_key(cloud: LocalCloud, tmp_path: Path) -> None:
    assert cloud.cluster(*CREATE, "first-key").code == 0
    other = {"SSH_PRIVATE_KEY_FILE": str(tmp_path / "other.pem")}
    done = cloud.cluster(*CREATE, "second-key", settings=other)
    cloud.end("first-key")
    assert "EC2 has another key under the name 'mitsuba-key': choose another KEYPAIR_NAME" in only_one_line(done)
    assert cloud.status("second-key") == {}


def test_s3cfg_that_is_no_ini_file(cloud: LocalCloud) -> None:
    path = cloud.where.root / ".s3cfg"
    path.write_text("access_key: but no section\n")
    try:
        done = cloud.cluster("syncData", "x")
    finally:
        path.unlink()
    assert "is no settings file of s3cmd" in only_one_line(done)


def test_no_default_vpc(cloud: LocalCloud) -> None:
    ec2 = cloud.make_client("ec2", "eu-west-1")
    for subnet in ec2.describe_subnets()["Subnets"]:
        ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    done = cloud.cluster(*CREATE, "no-vpc", settings={"AWS_REGION": "eu-west-1"})
    assert "eu-west-1 has no default VPC: make one with `aws ec2 create-default-vpc`" in only_one_line(done)
    assert done.code == 1


def test_prefix_that_matches_nothing(cloud: LocalCloud) -> None:
    assert cloud.cluster(*CREATE, "no-match").code == 0
    done = cloud.cluster("syncData", "nothing-like-this", "no-match")
    cloud.end("no-match")
    assert "there is no file 'nothing-like-this' here, and nothing under s3://scenes/data" in only_one_line(done)


@pytest.mark.parametrize("module", ["click", "boto3", "paramiko"])
def test_missing_dependency(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('no', name={module!r})\n")
    command = {"click": "--help", "boto3": "status", "paramiko": "install"}[module]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    probe = [sys.executable, "cluster.py", command]
    if module == "paramiko":  # needed only once nodes are found: import it as the SSH section does
        probe = [sys.executable, "-c", "import cluster, pathlib; cluster.load_identity(pathlib.Path('x'))"]
    done = subprocess.run(probe, cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    if module != "paramiko":
        assert f"cluster.py needs {module}." in done.stderr
        assert "python3 -m venv" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_taken_port(cloud: LocalCloud) -> None:
    group = "taken-port"
    for words in (CREATE, ("install",), ("start",)):
        assert cloud.cluster(*words, group).code == 0
    address = cloud.nodes(group)[0]["address"]
    assert address.startswith("127.")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = cloud.cluster("tunnel", group, "--port", port)
    cloud.end(group)
    assert f"port {port} of this machine is taken" in only_one_line(done)
