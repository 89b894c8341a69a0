"""createNodes before it launches: what it looks up, says, and refuses before any cost is incurred."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import paramiko
import pytest
from botocore.exceptions import ClientError

import cluster
from tests.support import LocalCloud, free_port
from tests.test_units import node

CREATE = ("createNodes", "c1.xlarge", "2")


def security_groups(cloud: LocalCloud, group: str) -> list[Any]:
    """Return the security groups of GROUP, past the tool."""
    ours = [{"Name": "tag:mitsuba-group", "Values": [group]}]
    return list(cloud.client("ec2").describe_security_groups(Filters=ours)["SecurityGroups"])


def test_a_dry_run_says_what_a_launch_says_and_makes_nothing(cloud: LocalCloud, group: str) -> None:
    key = {"SSH_PRIVATE_KEY_FILE": str(cloud.where.root / "never-made.pem"), "KEYPAIR_NAME": group}
    dry = cloud.cluster(*CREATE, group, "--dry-run", settings=key)
    assert (dry.code, dry.err) == (0, "")
    assert not (cloud.where.root / "never-made.pem").exists()
    assert security_groups(cloud, group) == []
    assert "2 × c1.xlarge: $1.04 an hour, and $0.0100 for public addresses; $25.20 a day\n" in dry.out
    assert "An hour of a spot node, now: $0.0871 in us-east-1a, " in dry.out
    assert "; on demand: $0.52\n" in dry.out
    assert "Zones, in the order in which they are tried: us-east-1a, us-east-1b, " in dry.out
    assert "vCPUs: 16 asked; your quota, for all your instances together: 1152 (Running On-Demand Standard" in dry.out
    assert "\nTo be installed: the package mitsuba of deb [trusted=yes] http://127.0.0.1:" in dry.out
    made = cloud.cluster(*CREATE, group)
    assert made.code == 0, made.err
    own = [line for line in dry.out.splitlines() if not line.startswith(("An hour of a spot node", "vCPUs: "))]
    assert made.err.splitlines()[: len(own)] == own


def test_a_dry_run_foresees_a_key_of_the_same_name(cloud: LocalCloud, group: str) -> None:
    other = cluster.make_ed25519()[1].encode()
    with cloud.options(pace="none"):
        cloud.client("ec2").import_key_pair(KeyName=group, PublicKeyMaterial=other)
        dry = cloud.cluster(*CREATE, group, "--dry-run", settings={"KEYPAIR_NAME": group})
    cloud.client("ec2").delete_key_pair(KeyName=group)
    assert (dry.code, dry.out) == (1, "")
    assert f"EC2 has another key under the name '{group}': choose another KEYPAIR_NAME" in dry.last_line


def test_a_dry_run_of_spot_nodes_asks_for_their_quota(cloud: LocalCloud) -> None:
    with cloud.options(vcpu_limit=5):
        dry = cloud.cluster(*CREATE, "--spot", "--dry-run")
    assert "vCPUs: 16 asked; your quota, for all your instances together: 5 (All Standard" in dry.out


def test_a_quota_that_cannot_be_had_is_no_obstacle(cloud: LocalCloud) -> None:
    with cloud.faults({"kind": "hang", "service": "servicequotas"}):
        dry = cloud.cluster(*CREATE, "--dry-run")
    assert (dry.code, "quota, for all your instances together: could not be looked up" in dry.out) == (0, True)


@pytest.mark.parametrize(
    ("machine", "spot", "code"),
    [
        ("c1.xlarge", False, "L-1216C47A"),
        ("c7i-flex.large", True, "L-34B43A08"),
        ("is4gen.large", False, "L-1216C47A"),
        ("inf1.xlarge", False, "L-1945791B"),
        ("gr6.4xlarge", True, "L-3819A6DF"),
        ("x2iedn.xlarge", False, "L-7295265B"),
        ("d3.xlarge", False, "L-1216C47A"),
        ("trn1.2xlarge", True, "L-6B0D517C"),
        ("hpc7a.12xlarge", True, ""),
    ],
)
def test_the_quota_of_a_type(machine: str, spot: bool, code: str) -> None:
    assert cluster.quota_code(machine, spot) == code


def test_quota_that_is_used_up(cloud: LocalCloud, group: str) -> None:
    with cloud.options(vcpu_limit=5):
        made = cloud.cluster(*CREATE, group)
    assert "\n16 vCPUs asked, your quota is 5 (Running On-Demand Standard" in made.err
    assert (made.code, "quota is used up" in made.last_line) == (1, True)


def test_quota_that_is_used_up_half_way(cloud: LocalCloud, group: str) -> None:
    with cloud.options(vcpu_limit=8, pace="none"):
        made = cloud.cluster(*CREATE, group, limits={"LAUNCH_BATCH": 1})
    assert "\n16 vCPUs asked, your quota is 8 (Running On-Demand Standard" in made.err
    assert made.code == 1
    assert "1 of 2 nodes are ready" in made.last_line
    assert "quota is used up" in made.last_line
    assert "Raise 'Running On-Demand Standard instances'" in made.last_line


@pytest.mark.parametrize(
    ("partition", "owner"), [("aws", "099720109477"), ("aws-cn", "837727238323"), ("aws-us-gov", "513442679011")]
)
def test_canonical_has_an_account_in_each_partition(partition: str, owner: str) -> None:
    image = {"ImageId": "ami-1", "CreationDate": "2026-01-01"}
    ec2 = MagicMock()
    ec2.describe_images.return_value = {"Images": [image]}
    ec2.meta.partition = partition
    assert cluster.fetch_ubuntu(ec2, no_parameter(), "24.04") == "ami-1"
    assert ec2.describe_images.call_args.kwargs["Owners"] == [owner]


def test_a_partition_without_known_images() -> None:
    ec2 = MagicMock()
    ec2.meta.partition, ec2.meta.region_name = "aws-eusc", "eusc-de-east-1"
    with pytest.raises(cluster.ClusterError, match="was found in eusc-de-east-1; name one in AMI_IDS"):
        cluster.fetch_ubuntu(ec2, no_parameter(), "24.04")


def no_parameter() -> MagicMock:
    """Return an SSM client that knows no image."""
    unknown = ClientError({"Error": {"Code": "ParameterNotFound", "Message": "no"}}, "GetParameter")
    return MagicMock(get_parameter=MagicMock(side_effect=unknown))


@pytest.mark.parametrize("region", ["us-gov-west-1", "cn-north-1"])
def test_prices_of_other_partitions_are_not_asked_for(monkeypatch: pytest.MonkeyPatch, region: str) -> None:
    monkeypatch.setattr(cluster, "open_client", None)
    assert cluster.fetch_on_demand_price(cluster.Settings(AWS_REGION=region), "c5.large") is None


@contextmanager
def repository(status: int, body: bytes = b"") -> Iterator[str]:
    """Serve an apt repository whose every file is BODY; yield its apt line."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer; only the plain index has what BODY says."""
            self.send_response(status if self.path.endswith("Packages") else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"deb http://127.0.0.1:{server.server_address[1]} ./"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b"Package: mitsuba-docs\nVersion: 1\n", "has no package mitsuba"),
        (404, b"", "can't be read (HTTP Error 404"),
    ],
)
def test_no_launch_where_install_proves_to_find_nothing(
    cloud: LocalCloud, group: str, status: int, body: bytes, says: str
) -> None:
    with repository(status, body) as line:
        for words in ((), ("--dry-run",)):
            refused = cloud.cluster(*CREATE, group, *words, settings={"PKG_REPOSITORY": line})
            assert refused.code == 1
            assert refused.last_line.startswith("Error: install would fail: ")
            assert says in refused.last_line
            assert "; set MITSUBA_PACKAGE or PKG_REPOSITORY in " in refused.last_line
            assert refused.last_line.endswith("(--without-mitsuba launches all the same)")
        assert security_groups(cloud, group) == []
        made = cloud.cluster(*CREATE, group, "--without-mitsuba", settings={"PKG_REPOSITORY": line})
    assert made.code == 0, made.err
    assert re.search(f"Warning: .*{re.escape(line)}.* before you run install", made.err)


@pytest.mark.parametrize("status", [403, 500])
def test_where_it_could_not_look_it_warns_and_goes_on(cloud: LocalCloud, status: int) -> None:
    with repository(status) as line:
        dry = cloud.cluster(*CREATE, "--dry-run", settings={"PKG_REPOSITORY": line})
    assert dry.code == 0, dry.err
    assert f"Warning: the package mitsuba of {line} can't be read (HTTP Error {status}" in dry.err
    gone = f"deb http://127.0.0.1:{free_port()} ./"
    dry = cloud.cluster(*CREATE, "--dry-run", settings={"PKG_REPOSITORY": gone})
    assert (dry.code, f"Warning: the package mitsuba of {gone} can't be read" in dry.err) == (0, True)


def test_burstable_types_cost_more_than_their_price(cloud: LocalCloud) -> None:
    dry = cloud.cluster("createNodes", "t3.micro", "4", "--dry-run")
    assert "t3.micro is burstable: full load costs a surcharge, up to $0.40 an hour more for all; a c type" in dry.out
    assert "t2.micro is burstable: after some" in cloud.cluster("createNodes", "t2.micro", "4", "--dry-run").out
    assert "burstable" not in cloud.cluster("createNodes", "c5.large", "4", "--dry-run").out


@pytest.mark.parametrize(("release", "name"), [("22.04", "jammy"), ("24.04", "noble"), ("26.04", "resolute")])
def test_release_of_ubuntu(cloud: LocalCloud, release: str, name: str) -> None:
    """By Canonical's parameter, and from EC2's list where that can't be had."""
    says = f"ubuntu-{name}-{release}-amd64-server-"
    use = {"UBUNTU_RELEASE": release}
    assert says in cloud.cluster(*CREATE, "--dry-run", settings=use).out
    with cloud.faults({"kind": "code:AccessDeniedException", "service": "ssm"}):
        dry = cloud.cluster(*CREATE, "--dry-run", settings=use)
    assert says in dry.out
    assert "Warning: Ubuntu's image is taken from EC2's list" in dry.err


def public_address(cloud: LocalCloud, group: str) -> Any:
    """Return the public address of GROUP's one node, past the tool."""
    ours = [{"Name": "tag:mitsuba-group", "Values": [group]}]
    (found,) = cloud.client("ec2").describe_instances(Filters=ours)["Reservations"]
    return found["Instances"][0].get("PublicIpAddress")


def test_a_subnet_that_gives_no_public_addresses(cloud: LocalCloud, group: str) -> None:
    ec2 = cloud.client("ec2")
    subnet = ec2.describe_subnets(Filters=[{"Name": "default-for-az", "Values": ["true"]}])["Subnets"][0]["SubnetId"]
    ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": False})
    try:
        made = cloud.cluster("createNodes", "c1.xlarge", "1", group, settings={"SUBNET_ID": subnet})
    finally:
        ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    assert made.code == 0, made.err
    assert f"Without public addresses of its own: {subnet}; the nodes ask for one each" in made.err
    assert public_address(cloud, group)


def test_private_nodes(cloud: LocalCloud, group: str) -> None:
    """They have no public address; whether this machine reaches the private one is the user's affair."""
    private = {"PRIVATE_NODES": True}
    made = cloud.cluster("createNodes", "c1.xlarge", "1", group, settings=private, limits={"BOOT_LIMIT": 3})
    assert "c1.xlarge: $0.52 an hour; $12.48 a day\n" in made.err
    assert "PRIVATE_NODES: they get no public address, so this machine must reach the private ones" in made.err
    assert public_address(cloud, group) is None


def test_logins_that_are_refused_come_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSH shuts out who fails often: a node in its first boot is not asked five times a second."""
    pauses: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    def refuse(*_: Any) -> None:
        raise paramiko.AuthenticationException("refused")

    monkeypatch.setattr(cluster, "connect", refuse)
    monkeypatch.setattr(cluster, "is_ours", lambda *_: True)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    with pytest.raises(cluster.NodeError, match="refuses the key"):
        cluster.open_remote(node("i-1"), cluster.Settings(), None, 600, first_boot=True)  # type: ignore[arg-type]
    assert max(pauses) == 2
    assert len(pauses) < 22


# Keys, money, and what is left behind


def test_a_second_computer_without_the_key(cloud: LocalCloud, group: str, tmp_path: Path) -> None:
    """It makes no key that would fit nothing, and says both ways out."""
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    key = tmp_path / "key.pem"
    for words, says in (
        (("createNodes", "c1.xlarge", "1", f"{group}-2"), ", or copy that key's file from the machine that made it to"),
        (
            ("runCommand", "true", group),
            f"If it is yours, copy that key's file to {key}. Else name a group of your own",
        ),
    ):
        refused = cloud.cluster(*words, settings={"SSH_PRIVATE_KEY_FILE": str(key)})
        assert (refused.code, says in refused.last_line) == (1, True), refused.err
        assert not key.exists()
    own = {"SSH_PRIVATE_KEY_FILE": str(key), "KEYPAIR_NAME": group}
    made = cloud.cluster("createNodes", "c1.xlarge", "1", f"{group}-2", settings=own)
    assert made.code == 0, made.err
    cloud.client("ec2").delete_key_pair(KeyName=group)
    cloud.end(f"{group}-2")


def test_a_folder_that_takes_no_key(cloud: LocalCloud, group: str) -> None:
    settings = {"SSH_PRIVATE_KEY_FILE": "/proc/self/key.pem", "KEYPAIR_NAME": group}  # not even root writes there
    refused = cloud.cluster("createNodes", "c1.xlarge", "1", group, settings=settings)
    assert refused.code == 1
    assert "the folder /proc/self must be writable, since the new SSH key is kept there" in refused.last_line
    assert cloud.nodes(group) == []


def test_costs_that_lack_a_price_say_at_least(cloud: LocalCloud, group: str) -> None:
    assert cloud.cluster("createNodes", "c1.xlarge", "2", group).code == 0
    assert "at least" not in cloud.cluster("status", group).out
    first = cloud.nodes(group)[0]["id"]
    cloud.client("ec2").delete_tags(Resources=[first], Tags=[{"Key": "mitsuba-price"}])
    assert re.search(r"at least \$0\.5\d an hour, at least \$\d", cloud.cluster("status", group).out)
    ended = cloud.cluster("terminateAll", group)
    assert re.search(r"cost at least \$0\.0", ended.err)


def test_a_launch_that_leaves_nodes_says_how_to_go_on(cloud: LocalCloud, group: str) -> None:
    with cloud.options(launch_faults=["kms"]):
        made = cloud.cluster(*CREATE, group)
    assert made.code == 1
    assert (
        "EC2 ended it while it started: Client.InternalError: Client error on launch (may you use the KMS" in made.err
    )
    goes_on = f"./cluster.py install {group} goes on with them (./cluster.py createNodes would make more)"
    assert goes_on in made.last_line
