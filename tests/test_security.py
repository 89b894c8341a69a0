"""Who gets in, on process nodes: IAM's policy of the README, addresses, nodes made by hand.

The attacks on real nodes are in test_attacks.py.
"""

from __future__ import annotations

import copy
import http.server
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

import cluster
from tests.localcloud.places import ACCESS_KEY, ROUTER
from tests.support import LocalCloud, Result, make_node, wait_until

GROUP = "least"
BUCKET = "least-bucket"
SPOT = f"{GROUP}-spot"
UNUSED = ("s3:AbortMultipartUpload",)  # only of an upload that breaks off


def own_policy() -> dict[str, Any]:
    """Return the IAM policy that the tool prints, for this test's bucket."""
    return cluster.make_policy("aws", BUCKET)


def actions_of(policy: dict[str, Any]) -> list[tuple[int, str]]:
    """Return (number of the statement, action) of all that a policy allows and that the session below needs."""
    pairs = [(number, action) for number, one in enumerate(policy["Statement"]) for action in one["Action"]]
    return [(number, action) for number, action in pairs if action not in UNUSED]


def without(policy: dict[str, Any], number: int, action: str) -> dict[str, Any]:
    """Return POLICY without one action of one statement."""
    changed = copy.deepcopy(policy)
    changed["Statement"][number]["Action"].remove(action)
    return changed


@contextmanager
def allowed(cloud: LocalCloud, policy: dict[str, Any]) -> Iterator[None]:
    """Let IAM decide by POLICY for a while."""
    cloud.ask("policy", policy)
    try:
        yield
    finally:
        cloud.ask("policy", None)


class Researcher:
    """Runs the tool with credentials from a shared credentials file, and S3 behind the same IAM."""

    def __init__(self, cloud: LocalCloud, folder: Path) -> None:
        self.cloud = cloud
        self.data = folder / "smoke.vol"
        self.data.write_bytes(b"smoke" * 1000)
        path = folder / "credentials"
        self.secret = secrets.token_hex(20)  # this user's alone, so that a search for it finds no other test
        path.write_text(f"[render]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {self.secret}\n")
        self.env = {"AWS_SHARED_CREDENTIALS_FILE": str(path), "AWS_PROFILE": "render"}
        url = cloud.environment()["AWS_ENDPOINT_URL"]
        # By address: moto takes the first part of a name for the bucket's.
        self.env["AWS_ENDPOINT_URL_S3"] = url.replace("aws.localcloud.internal", ROUTER)

    def run(self, *words: str, settings: dict[str, Any] | None = None) -> Result:
        """Run the tool."""
        env = self.cloud.environment(**self.env)
        del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]
        env["MITSUBA_CLUSTER_CONFIG"] = str(self.cloud.config({"S3_PATH": f"s3://{BUCKET}"} | (settings or {})))
        return self.cloud.run(sys.executable, "cluster.py", *words, env=env)

    def session(self) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Yield every command that a user may type, in an order in which all work, with settings."""
        yield ["createNodes", "c1.xlarge", "1", GROUP, "--dry-run"], {}
        yield ["createNodes", "c1.xlarge", "1", GROUP], {}
        for words in (["regions"], ["install", GROUP], ["start", GROUP], ["status"]):
            yield words, {}
        yield ["syncData", str(self.data), GROUP], {}
        yield ["runCommand", "true", GROUP], {"CLIENT_CIDR": "192.0.2.99/32"}  # the address has changed
        yield ["spotPrices", "c1.xlarge"], {}
        yield ["createNodes", "c1.xlarge", "1", SPOT, "--spot"], {}
        yield ["cancelAllSpot"], {}
        for group in (GROUP, SPOT):
            yield ["terminateAll", group], {}


@pytest.fixture(scope="module")
def researcher(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Researcher]:
    """The user with the least rights; the key pair exists from the first test on."""
    cloud.client("exact s3").create_bucket(Bucket=BUCKET)
    yield Researcher(cloud, tmp_path_factory.mktemp("least"))
    for group in (GROUP, SPOT):
        cloud.end(group)


def test_the_session_with_the_least_rights(researcher: Researcher) -> None:
    researcher.cloud.client("ec2").delete_key_pair(KeyName="mitsuba-key")
    with allowed(researcher.cloud, own_policy()):
        for words, settings in researcher.session():
            done = researcher.run(*words, settings=settings)
            assert done.code == 0, f"{words}: {done.err}"
            assert "AWS denies" not in done.err


@pytest.mark.sweep
@pytest.mark.parametrize(("number", "action"), actions_of(own_policy()), ids=lambda value: str(value).split(":")[-1])
def test_each_right_is_needed(researcher: Researcher, number: int, action: str) -> None:
    """Take one right away: some command of the session says so, by the action's name."""
    cloud = researcher.cloud
    cloud.client("ec2").delete_key_pair(KeyName="mitsuba-key")
    said: list[str] = []
    with allowed(cloud, without(own_policy(), number, action)), cloud.options(launch_faults=faults_for(action)):
        for words, settings in researcher.session():
            done = researcher.run(*words, settings=settings) if action != "ec2:GetConsoleOutput" else quick(researcher)
            assert "Traceback" not in done.err
            said += [line for line in [*done.err.splitlines(), *done.out.splitlines()] if action in line]
            if said:
                break
    for group in (GROUP, SPOT):
        cloud.end(group)
    cloud.client("exact s3").delete_object(Bucket=BUCKET, Key="smoke.vol")
    assert said, f"nothing needs {action}"
    assert re.search("AWS denies|may you do|could not be looked up", said[0]), said[0]


def faults_for(action: str) -> list[str]:
    """Return what must go wrong for an action to be needed: a console is read only of a dead node."""
    return ["sshd-refuses"] if action == "ec2:GetConsoleOutput" else []


def quick(researcher: Researcher) -> Result:
    """Create a node that does not answer, and give it up soon."""
    return researcher.cloud.cluster("createNodes", "c1.xlarge", "1", GROUP, limits={"BOOT_LIMIT": 2})


def test_foreign_things_are_out_of_reach_of_the_policy(researcher: Researcher, group: str) -> None:
    """Even past the tool, these rights end nothing that lacks its tag."""
    cloud = researcher.cloud
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    ec2 = cloud.client("ec2")
    (node,) = cloud.nodes(group)
    ec2.delete_tags(Resources=[node["id"]], Tags=[{"Key": "mitsuba-group"}])
    with allowed(cloud, own_policy()), pytest.raises(ec2.exceptions.ClientError, match="ec2:TerminateInstances"):
        ec2.terminate_instances(InstanceIds=[node["id"]])
    ec2.create_tags(Resources=[node["id"]], Tags=[{"Key": "mitsuba-group", "Value": group}])


@contextmanager
def address_service(answer: str) -> Iterator[str]:
    """Serve an address look-up that says ANSWER."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Say it."""
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize("answer", ["2001:db8::7", "100.64.7.7", "10.1.2.3", "<html>log in</html>", ""])
def test_an_address_that_cannot_be_let_in(cloud: LocalCloud, answer: str) -> None:
    with address_service(answer) as url:
        done = cloud.cluster("createNodes", "c1.xlarge", "1", "nobody", env={"MITSUBA_CLUSTER_ADDRESS_URL": url})
    assert done.code == 1
    says = f"says this machine is at {answer!r}, which is no public IPv4 address; set CLIENT_CIDR in "
    assert says in done.last_line


def test_this_machines_address_alone_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with address_service("198.51.100.7\n") as url:
        monkeypatch.setenv("MITSUBA_CLUSTER_ADDRESS_URL", url)
        assert cluster.fetch_client_cidr(cluster.Settings()) == "198.51.100.7/32"


# Nodes that others have tagged


def plant(cloud: LocalCloud, group: str, like: str, **tags: str) -> tuple[str, str]:
    """Launch an instance past the tool, tagged as a node of GROUP; return its id and its host key."""
    ec2 = cloud.client("ec2")
    model = ec2.describe_instances(InstanceIds=[like])["Reservations"][0]["Instances"][0]
    private, public = cluster.make_ed25519()
    known = {"mitsuba-group": group, "mitsuba-host-key": public} | tags
    kept = {name: model[name] for name in ("ImageId", "InstanceType", "KeyName", "SubnetId")}
    about = {"ResourceType": "instance", "Tags": [{"Key": name, "Value": value} for name, value in known.items()]}
    data = cluster.make_user_data(private, public, 0)
    made = ec2.run_instances(MinCount=1, MaxCount=1, UserData=data, TagSpecifications=[about], **kept)
    name = str(made["Instances"][0]["InstanceId"])
    wait_until(lambda: cloud.ask_state(name) == "running")
    return name, public


def test_a_planted_instance(cloud: LocalCloud, group: str) -> None:
    """It has all tags and really answers, but no signature, or that of another node."""
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    (own,) = cloud.nodes(group)
    ec2 = cloud.client("ec2")
    described = ec2.describe_instances(InstanceIds=[own["id"]])["Reservations"][0]["Instances"][0]
    copied = {tag["Key"]: tag["Value"] for tag in described["Tags"] if "signature" in tag["Key"]}
    assert copied
    bare, key = plant(cloud, group, own["id"], **{"mitsuba-role": "head"})
    copy, _ = plant(cloud, group, own["id"], **copied)
    assert "Head node:" not in cloud.cluster("status", group).out
    assert cloud.cluster("tunnel", group).last_line.startswith(f"Error: group '{group}' (us-east-1) has no head node;")
    for words in (["runCommand", "echo $NODE", group], ["install", group], ["start", group]):
        done = cloud.cluster(*words)
        assert done.code == 0, done.err
        assert f"Left out: {bare}: not launched with this key, as nodes of older versions" in done.err
        assert f"Left out: {copy}: not launched with this key" in done.err
    assert done.out.endswith(f"Head node: {own['name']}\n")
    shown = {node["id"]: node["launched_with_this_key"] for node in cloud.status(group)["nodes"]}
    assert shown == {own["id"]: True, bare: False, copy: False}
    assert cloud.cluster("status", group).out.count(": not launched with this key") == 2
    refused = cloud.cluster("login", bare)
    assert refused.code == 1
    assert ": not launched with this key" in refused.last_line
    ec2.create_tags(Resources=[bare], Tags=cloud.signed(group, key))
    reached = cloud.cluster("runCommand", "echo $NODE", group)
    assert len(reached.out.splitlines()) == 2, reached.err  # so the signature is what stood between


def test_a_host_key_that_is_changed_during_the_launch(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    (node,) = cloud.nodes(group)
    cloud.client("ec2").create_tags(
        Resources=[node["id"]], Tags=[{"Key": "mitsuba-host-key", "Value": "ssh-ed25519 A"}]
    )
    identity = cluster.load_identity(cloud.where.root / "key.pem")
    seen = cluster.Node(node["id"], group, "", "running", datetime.now(timezone.utc), host_key="ssh-ed25519 A")
    with pytest.raises(cluster.NodeError, match="not launched with this key"):
        cluster.open_remote(seen, cluster.Settings(), identity, 1, first_boot=True)


def test_an_rsa_key_in_the_agent_signs(cloud: LocalCloud, tmp_path: Path) -> None:
    """The signature of an RSA key needs two tags; the file has the public half only."""
    group, path, agent = "signed-by-rsa", tmp_path / "key", tmp_path / "agent"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(path)], check=True)
    use = {"SSH_PRIVATE_KEY_FILE": f"{path}.pub", "KEYPAIR_NAME": "rsa-of-the-agent"}
    env = {"SSH_AUTH_SOCK": str(agent)}
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(agent)], stdout=subprocess.DEVNULL) as running:
        try:
            wait_until(agent.exists)
            subprocess.run(["ssh-add", "-q", str(path)], env=os.environ | env, check=True)
            made = cloud.cluster("createNodes", "c1.xlarge", "1", group, settings=use, env=env)
            assert made.code == 0, made.err
            done = cloud.cluster("runCommand", "echo hi", group, settings=use, env=env)
            assert done.out.splitlines()[-1] == "hi", done.err
            other = cloud.cluster("runCommand", "echo hi", group)
            assert other.code == 1
            assert "launched with another key" in other.err
        finally:
            running.terminate()
            cloud.end(group)


@pytest.mark.parametrize("signature", ["", "no base64!", "AAAA", "////", "AAAAC3NzaC1lZDI1NTE5AAAAQP//", "AAAAA" * 50])
def test_a_signature_that_is_none(tmp_path: Path, signature: str) -> None:
    cluster.ensure_key_file(tmp_path / "key")
    identity = cluster.load_identity(tmp_path / "key")
    assert not cluster.is_signed(cluster.public_line(identity), "default", "ssh-ed25519 AAAA", signature)


def test_a_signature_is_for_one_group_and_one_host_key(tmp_path: Path) -> None:
    cluster.ensure_key_file(tmp_path / "key")
    identity = cluster.load_identity(tmp_path / "key")
    signature = "".join(cluster.sign_launch(identity, "default", "ssh-ed25519 AAAA").values())
    assert cluster.is_signed(cluster.public_line(identity), "default", "ssh-ed25519 AAAA", signature)
    assert not cluster.is_signed(cluster.public_line(identity), "other", "ssh-ed25519 AAAA", signature)
    assert not cluster.is_signed(cluster.public_line(identity), "default", "ssh-ed25519 BBBB", signature)


# Security groups that others have changed


def permission(protocol: str, cidr: str, about: str = "", **ports: int) -> dict[str, Any]:
    """Return one rule as EC2's calls take it."""
    return {
        "IpProtocol": protocol,
        "IpRanges": [{"CidrIp": cidr, "Description": about} if about else {"CidrIp": cidr}],
    } | ports


def ingress(cloud: LocalCloud, group: str) -> set[tuple[str, int | None, str]]:
    """Return (protocol, port, source) of all that the group of this name lets in; "itself" for its own nodes."""
    named = [{"Name": "group-name", "Values": [f"mitsuba-{group}"]}]
    rules = set()
    for raw in cloud.client("ec2").describe_security_groups(Filters=named)["SecurityGroups"]:
        for one in raw["IpPermissions"]:
            sources = [source["CidrIp"] for source in one["IpRanges"]]
            sources += ["itself" for pair in one["UserIdGroupPairs"] if pair["GroupId"] == raw["GroupId"]]
            rules |= {(one["IpProtocol"], one.get("FromPort"), source) for source in sources}
    return rules


def make_group(cloud: LocalCloud, group: str, name: str) -> str:
    """Make a security group past the tool, tagged as GROUP's; return its id."""
    tags = [{"ResourceType": "security-group", "Tags": [{"Key": "mitsuba-group", "Value": group}]}]
    ec2 = cloud.client("ec2")
    network = ec2.describe_subnets(Filters=[{"Name": "default-for-az", "Values": ["true"]}])["Subnets"][0]["VpcId"]
    made = ec2.create_security_group(GroupName=name, Description="x", VpcId=network, TagSpecifications=tags)
    return str(made["GroupId"])


def test_a_planted_security_group(cloud: LocalCloud, group: str) -> None:
    ec2 = cloud.client("ec2")
    planted = make_group(cloud, group, f"mitsuba-{group}")
    make_group(cloud, group, "of-another-name")
    everything = [permission("-1", "0.0.0.0/0")]
    cluster.persist(lambda: ec2.authorize_security_group_ingress(GroupId=planted, IpPermissions=everything))
    wait_until(lambda: ingress(cloud, group))
    for words in (("--dry-run",), ()):
        refused = cloud.cluster("createNodes", "c1.xlarge", "1", group, *words)
        assert refused.code == 1
        assert "lets in every protocol from 0.0.0.0/0 (no description)" in refused.last_line
    assert cloud.nodes(group) == []
    advice = shlex.split(refused.last_line.split("to close that: ")[1])
    assert advice[:3] == ["aws", "ec2", "revoke-security-group-ingress"]
    ec2.revoke_security_group_ingress(GroupId=planted, IpPermissions=json.loads(advice[-1]))  # as it would
    made = cloud.cluster("createNodes", "c1.xlarge", "1", group)
    assert made.code == 0, made.err
    here = ec2.describe_instances(InstanceIds=[cloud.nodes(group)[0]["id"]])["Reservations"][0]["Instances"][0]
    assert [one["GroupId"] for one in here["SecurityGroups"]] == [planted]
    opened = {(port, source) for _, port, source in ingress(cloud, group)}
    assert {port for port, source in opened if source == "itself"} == {7554, 7555}
    ports = {port for port, source in opened if source != "itself"}
    assert 7554 in ports
    assert len(ports) == 2, ports  # and sshd's


def test_a_rule_with_a_forged_mark_does_not_outlive_the_launch(cloud: LocalCloud, group: str) -> None:
    """The mark is no secret; where no node runs, no other machine of the user's needs its rule."""
    planted = make_group(cloud, group, f"mitsuba-{group}")
    key = cloud.where.root / "key.pem"
    cluster.ensure_key_file(key)
    mark = f"mitsuba-cluster {cluster.load_identity(key).fingerprint} me@elsewhere"
    rule = permission("tcp", "0.0.0.0/0", mark, FromPort=22, ToPort=22)
    ec2 = cloud.client("ec2")
    cluster.persist(lambda: ec2.authorize_security_group_ingress(GroupId=planted, IpPermissions=[rule]))
    wait_until(lambda: ingress(cloud, group))
    dry = cloud.cluster("createNodes", "c1.xlarge", "1", group, "--dry-run")
    assert dry.code == 0, dry.err
    assert f"also lets in tcp 22 from 0.0.0.0/0 ({mark})" in dry.err
    made = cloud.cluster("createNodes", "c1.xlarge", "1", group)
    assert made.code == 0, made.err
    assert f"Security group mitsuba-{group} lets in no more: tcp 22 from 0.0.0.0/0\n" in made.err
    assert ("tcp", 22, "0.0.0.0/0") not in ingress(cloud, group)


def test_rules_that_others_added_later(cloud: LocalCloud, group: str) -> None:
    """Strangers' rules and this key's for old addresses are named; those of older versions go."""
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    before = ingress(cloud, group)
    ec2 = cloud.client("ec2")
    (name,) = {
        one["GroupId"]
        for one in ec2.describe_security_groups()["SecurityGroups"]
        if one["GroupName"] == f"mitsuba-{group}"
    }
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": name}]}
    mark = f"mitsuba-cluster {cluster.load_identity(cloud.where.root / 'key.pem').fingerprint} me@old-laptop"
    old = permission("tcp", "192.0.2.99/32", mark, FromPort=22, ToPort=22)
    for one in (inside, old):
        ec2.authorize_security_group_ingress(GroupId=name, IpPermissions=[one])
    says = f"also lets in tcp 22 from 192.0.2.99/32 ({mark}); to close that: aws ec2"
    for words in (["runCommand", "true", group], ["status", group], ["createNodes", "c1.xlarge", "1", group]):
        done = cloud.cluster(*words)
        assert done.code == 0, done.err
        assert says in done.err
    assert ingress(cloud, group) == before | {("tcp", 22, "192.0.2.99/32")}
    ec2.authorize_security_group_ingress(
        GroupId=name, IpPermissions=[permission("udp", "192.0.2.98/32", FromPort=1, ToPort=9)]
    )
    assert "udp 1-9 from 192.0.2.98/32 (no description)" in cloud.cluster("runCommand", "true", group).err
    assert "udp 1-9 from 192.0.2.98/32" in cloud.cluster("createNodes", "c1.xlarge", "1", group).last_line


# What tags say


def test_a_group_whose_name_is_a_command(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    (own,) = cloud.nodes(group)
    evil = "x;touch pwned|sh"
    name, _ = plant(cloud, evil, own["id"])
    try:
        for words in (["status"], ["status", "--json"]):
            shown = cloud.cluster(*words)
            assert shown.code == 0, shown.err
            assert "pwned" not in shown.out + shown.err
            assert name not in shown.out
    finally:
        cloud.client("ec2").terminate_instances(InstanceIds=[name])
    assert cluster.command("terminateAll", evil).endswith(" terminateAll 'x;touch pwned|sh'")


# What this machine gives away


def git(folder: Path, *words: str) -> str:
    """Run git in a folder; return what it says."""
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with a tracked placeholder."""
    (tmp_path / "key.pem").write_text("a placeholder\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "key.pem")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


def picked_up(folder: Path) -> bool:
    """Tell whether git would commit a private key of FOLDER."""
    git(folder, "add", "--all")
    return "PRIVATE KEY" in git(folder, "diff", "--cached")


def test_git_does_not_pick_a_key_up(clone: Path) -> None:
    cluster.ensure_key_file(clone / "key.pem")
    assert not picked_up(clone)
    git(clone, "update-index", "--no-skip-worktree", "key.pem")
    assert picked_up(clone)


def test_a_key_in_a_folder_of_another_repository(clone: Path) -> None:
    (clone / "tool").mkdir()
    path = clone / "tool" / "key.pem"
    with pytest.raises(cluster.ClusterError, match=r"git would pick up a key.*it is not in \.gitignore.*outside"):
        cluster.ensure_key_file(path)
    assert not path.exists()
    (clone / ".gitignore").write_text("tool/*.pem\n")
    cluster.ensure_key_file(path)
    assert not picked_up(clone)
    (clone / ".gitignore").unlink()
    assert picked_up(clone)


def test_a_locked_index(clone: Path) -> None:
    (clone / ".git" / "index.lock").touch()
    with pytest.raises(cluster.ClusterError, match=r"git would pick up a key.*index\.lock"):
        cluster.ensure_key_file(clone / "key.pem")
    assert (clone / "key.pem").read_text() == "a placeholder\n"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a repository away")
def test_a_repository_of_somebody_else(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(clone))  # whose settings call no folder safe
    for path in (clone, *clone.rglob("*")):
        os.chown(path, 65534, 65534)
    monkeypatch.delenv("SUDO_UID", raising=False)
    with pytest.raises(cluster.ClusterError, match=r"git would pick up a key.*dubious ownership"):
        cluster.ensure_key_file(clone / "key.pem")
    assert (clone / "key.pem").read_text() == "a placeholder\n"


def test_ssh_obeys_no_settings_of_the_user(tmp_path: Path) -> None:
    evil = {
        "ForwardAgent": "yes",
        "ControlPath": "/tmp/%h",
        "VerifyHostKeyDNS": "yes",
        "KnownHostsCommand": "/bin/echo",
    }
    path = tmp_path / "ssh_config"
    path.write_text("".join(f"{name} {value}\n" for name, value in evil.items()))
    node = cluster.Node(
        "i-1", "default", "", "running", datetime.now(timezone.utc), public_ip="192.0.2.7", host_key="x y"
    )

    def shown(*words: str) -> set[str]:
        done = subprocess.run([words[0], "-G", *words[1:]], capture_output=True, text=True, check=True)
        lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
        return {name for name in evil if [name.lower(), evil[name].replace("%h", "192.0.2.7")] in lines}

    with cluster.ssh_command(node, cluster.Settings()) as words:
        assert shown(*words) == set()
        told = subprocess.run([words[0], "-G", *words[1:]], capture_output=True, text=True, check=True).stdout
        for line in ("stricthostkeychecking true", "globalknownhostsfile /dev/null", "identitiesonly yes"):
            assert f"\n{line}\n" in told
        assert shown(*[str(path) if word == "none" else word for word in words]) >= {
            "ForwardAgent",
            "KnownHostsCommand",
        }


def test_the_programs_that_are_run_here_get_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    for name in ("git", "ssh-keygen"):
        (tmp_path / name).write_text(f"#!/bin/sh\nenv > '{tmp_path}/{name}.env'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster.hide_from_git(tmp_path / "key.pem")
    cluster.read_fingerprint(tmp_path / "key.pem")
    for name in ("git", "ssh-keygen"):
        seen = (tmp_path / f"{name}.env").read_text()
        assert "PATH=" in seen
        assert "topsecret" not in seen


SIGNED = "https://me:hunter2@example.org/m.deb?X-Amz-Signature=5ec4e7&X-Amz-Date=1#sha256=0"


def test_addresses_lose_their_credentials() -> None:
    assert cluster.mask(f"fetching {SIGNED}: no") == "fetching https://…@example.org/m.deb?…#sha256=0: no"
    assert (
        cluster.mask("deb http://u:p@127.0.0.1:1/a ./, 'https://x/?a=b'")
        == "deb http://…@127.0.0.1:1/a ./, 'https://x/?…'"
    )
    assert cluster.mask("a@b: what? no") == "a@b: what? no"
    assert str(cluster.SilentNode(SIGNED)) == cluster.ClusterError(SIGNED).message == cluster.mask(SIGNED)


@pytest.mark.parametrize(
    "settings",
    [
        {"MITSUBA_PACKAGE": "https://me:hunter2@127.0.0.1:1/m.deb?X-Amz-Signature=5ec4e7"},
        {"PKG_REPOSITORY": "deb http://me:hunter2@127.0.0.1:1/?X-Amz-Signature=5ec4e7 ./"},
        {"MITSUBA_PACKAGE": "http://me:hunter2@127.0.0.1/m.deb?X-Amz-Signature=5ec4e7"},  # refused
    ],
)
def test_no_message_shows_them(cloud: LocalCloud, settings: dict[str, str]) -> None:
    no_key = {"SSH_PRIVATE_KEY_FILE": __file__}  # the last thing that is checked
    done = cloud.cluster("createNodes", "c1.xlarge", "1", "masked", settings=settings | no_key)
    assert done.code == 1
    assert "127.0.0.1" in done.err
    assert "hunter2" not in done.err
    assert "5ec4e7" not in done.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("AWS_SECRET_ACCESS_KEY = wJalrXUtnFEMI/K7MDENG", "line 2: NameError (is there a value without quotes?"),
        ("AWS_SECRET_ACCESS_KEY = 'wJalrXUtnFEMI", "line 2: SyntaxError"),
        ("raise ValueError('wJalrXUtnFEMI')", "line 2: ValueError"),
    ],
)
def test_a_secret_without_quotes(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(cluster.ClusterError, match=re.escape(says)) as raised:
        cluster.load_settings(path)
    assert "wJalr" not in raised.value.message


@pytest.mark.parametrize(
    ("cidr", "network"),
    [("203.0.113.7", "203.0.113.7/32"), ("10.0.0.0/255.0.0.0", "10.0.0.0/8"), ("203.0.113.7/32",) * 2, ("", "")],
)
def test_a_network_is_named_as_ec2_takes_it(tmp_path: Path, cidr: str, network: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(f'CLIENT_CIDR = "{cidr}"\n')
    found = cluster.load_settings(path).CLIENT_CIDR
    assert found == network


@pytest.mark.parametrize(("cidr", "good"), [("0.0.0.0/1", False), ("64.0.0.0/7", False), ("10.0.0.0/8", True)])
def test_half_the_world_is_not_let_in(tmp_path: Path, cidr: str, good: bool) -> None:
    path = tmp_path / "config.py"
    path.write_text(f'CLIENT_CIDR = "{cidr}"\n')
    with nullcontext() if good else pytest.raises(cluster.ClusterError, match="much of the world"):
        cluster.load_settings(path)
    path.write_text(f'CLIENT_CIDR = "{cidr}"\nPUBLIC_SERVER_PORT = False\n')
    cluster.load_settings(path)


@pytest.mark.parametrize(
    ("broken", "seconds"), [("nft iptables", "0"), ("nft iptables", "60"), ("date", "60"), ("", "0")]
)
def test_the_boot_script_fails_if_a_part_does(tmp_path: Path, broken: str, seconds: str) -> None:
    for name in ("nft", "iptables", "date", "systemctl"):
        fails = name in broken.split() or name == "date"  # no date: nothing is written below /etc
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/ran\nexit {int(fails)}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", cluster.BOOT, "boot", seconds], env=env, check=False)
    assert (done.returncode != 0) == bool(broken)
    assert ("date" in (tmp_path / "ran").read_text().split()) == (seconds != "0")  # even without the guard


def test_an_image_of_a_node_brings_nothing_of_it_along(tmp_path: Path) -> None:
    """The old deadline would end the new node, the old guard and server would act as the old node's."""
    units, own = tmp_path / "etc/systemd/system", tmp_path / "etc/mitsuba-cluster"
    library = tmp_path / "usr/local/lib/mitsuba-cluster"
    (tmp_path / "bin").mkdir()
    old = [units / name for name in ("mtssrv.service", "mitsuba-guard.service", "mitsuba-deadline.timer")]
    old += [own / "plan.json", own / "role", library / "guard.py"]
    (tmp_path / "bin/systemctl").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/ran\n")
    (tmp_path / "bin/nft").write_text("#!/bin/sh\n")
    for name in ("systemctl", "nft"):
        (tmp_path / "bin" / name).chmod(0o755)
    script = cluster.BOOT.replace("/etc/", f"{tmp_path}/etc/").replace("/usr/local/", f"{tmp_path}/usr/local/")

    def boot(instance: str) -> list[str]:
        """Write the old node's files, boot; return those that are left."""
        for path in old:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("old")
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "INSTANCE_ID": instance}
        subprocess.run(["bash", "-c", script, "boot", "60"], env=env, check=True)
        return [path.name for path in old if path.exists() and path.read_text() == "old"]

    assert boot("i-1") == []
    assert "OnCalendar" in (units / "mitsuba-deadline.timer").read_text()
    ran = (tmp_path / "ran").read_text()
    assert all(f"disable --now --no-block {path.name}" in ran for path in old[:3])
    assert boot("i-1") == [path.name for path in old]  # a reboot: these are the node's own
    assert boot("i-2") == []


@pytest.mark.parametrize(("fails", "code"), [("none", 0), ("boot", 1), ("guard", 1)])
def test_cloud_init_sees_a_boot_script_that_fails(tmp_path: Path, fails: str, code: int) -> None:
    """It makes one shell script of all commands: a list becomes quoted words, a string stands as it is."""
    config = json.loads(cluster.make_user_data("private", "public", 0, 60).removeprefix("#cloud-config\n"))
    lines = [line if isinstance(line, str) else shlex.join(line) for line in config["bootcmd"]]
    (tmp_path / "bash").write_text(f"#!/bin/sh\necho $3 >> {tmp_path}/ran\n[ $3 != $FAILS ]\n")
    (tmp_path / "bash").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAILS": fails}
    assert subprocess.run(["sh", "-c", "\n".join(lines)], env=env, check=False).returncode == code
    assert (tmp_path / "ran").read_text().split() == ["boot", "guard"]  # the idle end is promised in any case


def test_an_image_without_a_firewall_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(script: str) -> tuple[int, str]:
        words = [str(shutil.which("bash")), "-c", script, "boot", "0"]
        done = subprocess.run(words, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run(cluster.BOOT) == (0, "")
    remote: Any = SimpleNamespace(run=lambda _: run(cluster.CHECK_METADATA_RULES))
    cluster.warn_of_image.cache_clear()
    for _ in range(2):
        cluster.check_metadata_rules(remote)
    (line,) = capsys.readouterr().err.splitlines()
    assert "image has neither nft nor iptables, so any program on a node can read its host key" in line


@pytest.mark.parametrize("said", ["sudo: a password is required\n", "bash: line 1: sudo: command not found\n"])
def test_a_user_who_is_not_root_is_no_missing_rule(said: str) -> None:
    remote: Any = SimpleNamespace(run=lambda _: (1, said))
    with pytest.raises(cluster.NodeError, match=f"SSH_USER can't become root there without a password: {said.strip()}"):
        cluster.check_metadata_rules(remote)


@pytest.mark.parametrize(("code", "refused"), [(0, False), (3, True)])
def test_what_sudo_only_warns_of_is_no_refusal(code: int, refused: bool) -> None:
    said = "sudo: unable to resolve host ip-10-0-0-5: Name or service not known\n"
    remote: Any = SimpleNamespace(run=lambda _: (code, said), node=make_node("i-1", 1))
    missing = pytest.raises(cluster.NodeError, match="rules for the metadata service are missing")
    with missing if refused else nullcontext():
        cluster.check_metadata_rules(remote)


def test_an_odd_answer_about_key_pairs_is_no_key_of_the_users(tmp_path: Path) -> None:
    app = cluster.App(tmp_path / "config.py")
    app.settings = cluster.Settings()
    ec2 = MagicMock()
    for pairs in ([], [{"KeyName": "mitsuba-key"}], [{"PublicKey": ""}]):
        app.key_pairs.clear()
        ec2.describe_key_pairs.return_value = {"KeyPairs": pairs}
        assert not app.has_key_pair(ec2)


def test_a_port_that_is_closed_is_no_change_of_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = cluster.App(tmp_path / "config.py")
    app.settings, app.ec2, app.rule_owner = cluster.Settings(PUBLIC_SERVER_PORT=False), MagicMock(), "me"
    rules = [cluster.Rule("tcp", port, port, "IpRanges", "192.0.2.7/32", "me") for port in (22, 7554)]
    app.allow_access([cluster.SecurityGroup("sg-1", "default", "mitsuba-default", "vpc-1", rules)], "192.0.2.7/32")
    closed = app.ec2.revoke_security_group_ingress.call_args.kwargs["IpPermissions"]
    assert [one["FromPort"] for one in closed] == [7554]
    assert capsys.readouterr().err == ""


def test_a_node_without_its_guard_is_refused(cloud: LocalCloud, group: str) -> None:
    with cloud.options(launch_faults=["check-metadata-rules-fails"]):
        made = cloud.cluster("createNodes", "c1.xlarge", "1", group)
    assert made.code == 1
    assert "its rules for the metadata service are missing" in made.err
    assert "its rules for the metadata service are missing" in cloud.cluster("install", group).err
    (node,) = cloud.nodes(group)
    cloud.fault("heal", node)
    assert cloud.cluster("install", group).code == 0
    (log,) = (cloud.where.root / "state").glob(f"**/{node['id']}.install.log")
    assert log.stat().st_mode & 0o777 == 0o600


# What nodes say

GOOD = {"cores": "4", "build": "0.6.0 3 0", "role": "head", "linked": "10.0.0.1 10.0.0.2 ", "load": "0.42 0.31 0.12"}
GOOD |= {"memory_mb": "612 7168"}


class Saying(cluster.Remote):
    """A node that says what it is told to."""

    def __init__(self, **facts: str | None) -> None:
        self.output = "".join(f"{name}={value}\n" for name, value in (GOOD | facts).items() if value is not None)

    def check(self, line: str, **options: Any) -> str:
        """Say it."""
        return self.output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cores", "0"),
        ("cores", "null"),
        ("cores", None),
        ("build", "0.6\x1b[2J 3 0"),
        ("build", "0.6.0 3 0; reboot"),
        ("role", "king"),
        ("linked", "10.0.0.1;reboot"),
        ("load", "1e400 0 0"),
        ("load", "nan 0.1 0.1"),
        ("load", "0.1"),
        ("load", None),
        ("memory_mb", "1"),
        ("memory_mb", "-1 5"),
        ("clock", "1e400"),
        ("boot", "x y"),
    ],
)
def test_a_malformed_report(name: str, value: str | None) -> None:
    assert cluster.fetch_facts(Saying()).cores == 4
    with pytest.raises(cluster.NodeError, match=f"reports '{name}' as"):
        cluster.fetch_facts(Saying(**{name: value}))


def test_errors_do_not_steer_the_terminal() -> None:
    assert cluster.ClusterError("a\x1b]0;b\n    c\r").message == "a�]0;b\n    c�"


# Which node is meant


def test_a_name_that_means_no_node_or_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two networks may have the same private address; "" is what an unset variable says."""
    when = datetime.now(timezone.utc)
    nodes = [cluster.Node(f"i-{one}", "default", "", "running", when, private_ip="10.0.0.7") for one in "ab"]
    nodes.append(cluster.Node("i-c", "default", "", "running", when))
    monkeypatch.setattr(cluster, "fetch_nodes", lambda *_: nodes)
    app = cluster.App(tmp_path / "config.py")
    app.config.write_text("")
    vars(app)["ec2"] = None
    assert cluster.find_node(app, "i-a").id == "i-a"
    with pytest.raises(cluster.ClusterError, match="no node '' of this tool"):
        cluster.find_node(app, "")
    with pytest.raises(cluster.ClusterError, match=r"'10\.0\.0\.7' may be .*i-a.* .*i-b.*: name one"):
        cluster.find_node(app, "10.0.0.7")
