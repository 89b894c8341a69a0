"""Who gets in, on process nodes: IAM's policy of the README, addresses, nodes made by hand.

The attacks on real nodes are in test_attacks.py.
"""

from __future__ import annotations

import copy
import http.server
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import cluster
from tests.localcloud.places import ACCESS_KEY, ROUTER
from tests.support import LocalCloud, Result, wait_until

GROUP = "least"
BUCKET = "least-bucket"
SPOT = f"{GROUP}-spot"
UNUSED = ("s3:AbortMultipartUpload", "servicequotas:GetServiceQuota")  # of an upload that breaks off; of --dry-run


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
            said += [line for line in done.err.splitlines() if action in line]
            if said:
                break
    for group in (GROUP, SPOT):
        cloud.end(group)
    cloud.client("exact s3").delete_object(Bucket=BUCKET, Key="smoke.vol")
    assert said, f"nothing needs {action}"
    assert "AWS denies" in said[0] or "may you do" in said[0], said[0]


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
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize("answer", ["2001:db8::7", "100.64.7.7", "10.1.2.3", "<html>log in</html>", ""])
def test_an_address_that_cannot_be_let_in(cloud: LocalCloud, answer: str) -> None:
    with address_service(answer) as url:
        done = cloud.cluster("createNodes", "c1.xlarge", "1", "nobody", env={"MITSUBA_CLUSTER_ADDRESS_URL": url})
    assert done.code == 1
    says = f"says this machine is at {answer!r}, which is no public IPv4 address; set CLIENT_CIDR in config.py"
    assert says in done.last_line


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
    for words in (["runCommand", "echo $NODE", group], ["install", group], ["start", group]):
        done = cloud.cluster(*words)
        assert done.code == 0, done.err
        assert f"Left out: {bare}: not launched with this key: it has no signature" in done.err
        assert f"Left out: {copy}: not launched with this key" in done.err
    assert done.out.endswith(f"Head node: {own['name']}\n")
    shown = {node["id"]: node["launched_with_this_key"] for node in cloud.nodes(group)}
    assert shown == {own["id"]: True, bare: False, copy: False}
    assert cloud.cluster("status", group).out.count(": not launched with this key") == 2
    refused = cloud.cluster("login", bare)
    assert refused.code == 1
    assert ": not launched with this key" in refused.last_line
    ec2.create_tags(Resources=[bare], Tags=cloud.signed(group, key))
    reached = cloud.cluster("runCommand", "echo $NODE", group)
    assert reached.out.count("--- ") == 2, reached.err  # so the signature is what stood between


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
            assert done.out.endswith("\nhi\n"), done.err
            other = cloud.cluster("runCommand", "echo hi", group)
            assert other.code == 1
            assert "not launched with this key (SSH_PRIVATE_KEY_FILE)" in other.err
        finally:
            running.terminate()
            cloud.end(group)


@pytest.mark.parametrize("signature", ["", "no base64!", "AAAA", "////", "AAAAC3NzaC1lZDI1NTE5AAAAQP//", "AAAAA" * 50])
def test_a_signature_that_is_none(tmp_path: Path, signature: str) -> None:
    cluster.ensure_key_file(tmp_path / "key")
    identity = cluster.load_identity(tmp_path / "key")
    assert not cluster.is_signed(identity.public, "default", "ssh-ed25519 AAAA", signature)


def test_a_signature_is_for_one_group_and_one_host_key(tmp_path: Path) -> None:
    cluster.ensure_key_file(tmp_path / "key")
    identity = cluster.load_identity(tmp_path / "key")
    signature = "".join(cluster.sign_launch(identity, "default", "ssh-ed25519 AAAA").values())
    assert cluster.is_signed(identity.public, "default", "ssh-ed25519 AAAA", signature)
    assert not cluster.is_signed(identity.public, "other", "ssh-ed25519 AAAA", signature)
    assert not cluster.is_signed(identity.public, "default", "ssh-ed25519 BBBB", signature)
