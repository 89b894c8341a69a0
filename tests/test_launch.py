"""createNodes: what it refuses before any cost is incurred, how it launches, what an interrupt leaves."""

from __future__ import annotations

import http.server
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from botocore.exceptions import ClientError

import cluster
from tests.support import LocalCloud, create, free_port, interrupt, killed, make_node, serve, wait_until

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
    assert "vCPUs: 16 asked, $0.0650 an hour each; your quota, for all your instances together: 1152 (Run" in dry.out
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
    assert "; your quota, for all your instances together: 5 (All Standard" in dry.out


def test_a_quota_that_cannot_be_had_is_no_obstacle(cloud: LocalCloud) -> None:
    with cloud.faults({"kind": "hang", "service": "servicequotas"}):
        dry = cloud.cluster(*CREATE, "--dry-run")
    assert dry.code == 0, dry.err
    assert "quota, for all your instances together: could not be looked up" in dry.out


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
    assert made.code == 1, made.err
    assert "quota is used up" in made.last_line


def test_quota_that_is_used_up_half_way(cloud: LocalCloud, group: str) -> None:
    rule = {"kind": "code:VcpuLimitExceeded", "action": "RunInstances", "nth": 2}
    with cloud.options(pace="none"), cloud.faults(rule):
        made = cloud.cluster(*CREATE, group, limits={"LAUNCH_BATCH": 1})
    assert "\n16 vCPUs asked, your quota is 1152 (Running On-Demand Standard" in made.err
    assert made.code == 1
    assert "1 of 2 nodes ready" in made.last_line
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
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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
    assert dry.code == 0, dry.err
    assert f"Warning: the package mitsuba of {gone} can't be read" in dry.err


def test_burstable_types_cost_more_than_their_price(cloud: LocalCloud) -> None:
    dry = cloud.cluster("createNodes", "t3.micro", "4", "--dry-run")
    assert "t3.micro is burstable: full load costs a surcharge, up to $0.40 an hour more for all; a c type" in dry.out
    assert "t2.micro is burstable: after some" in cloud.cluster("createNodes", "t2.micro", "4", "--dry-run").out
    assert "burstable" not in cloud.cluster("createNodes", "c5.large", "4", "--dry-run").out


def test_a_price_that_is_unknown_is_a_warning(cloud: LocalCloud) -> None:
    dry = cloud.cluster("createNodes", "c7a.2xlarge", "4", "--dry-run")
    assert "Warning: the price of c7a.2xlarge could not be looked up; see https://" in dry.err


def test_a_failure_before_the_launch_says_that_nothing_was_launched(cloud: LocalCloud, group: str) -> None:
    with cloud.faults({"kind": "denied", "action": "DescribeSubnets"}):
        made = cloud.cluster("createNodes", "c1.xlarge", "1", group)
    assert made.last_line.endswith(". Nothing was launched."), made.err


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


def test_a_node_is_not_tried_at_its_private_address_before_it_has_its_public_one(cloud: LocalCloud, group: str) -> None:
    with cloud.options(pace="none"), cloud.options(address_lag=1000):
        rule = {"kind": "kill-after", "action": "RunInstances"}
        assert killed(cloud, rule, "createNodes", "c1.xlarge", "1", group).code == -signal.SIGKILL
        (node,) = wait_until(lambda: [one for one in cloud.nodes(group) if one["state"] == "running"])
        refused = cloud.cluster("runCommand", "true", group)
    assert (refused.code, node["public_ip"]) == (1, "")
    assert f"1 node still pending (no public address yet), left out: {node['id']}\n" in refused.err
    assert "can be reached yet; run this again in a minute" in refused.last_line


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
        raise cluster.Unusable("refuses the key")

    monkeypatch.setattr(cluster, "connect", refuse)
    monkeypatch.setattr(cluster, "is_ours", lambda *_: True)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    with pytest.raises(cluster.NodeError, match="refuses the key"):
        cluster.open_remote(make_node("i-1"), cluster.Settings(), None, 600, first_boot=True)  # type: ignore[arg-type]
    assert max(pauses) == 2
    assert len(pauses) < 22


# Keys, money, and what is left behind


def test_a_second_computer_without_the_key(cloud: LocalCloud, group: str, tmp_path: Path) -> None:
    """It makes no key that would fit nothing, and says both ways out."""
    assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
    key = tmp_path / "key.pem"
    for words, says in (
        (("createNodes", "c1.xlarge", "1", f"{group}-2"), ", or copy that key's file from the machine that made it to"),
        (("runCommand", "true", group), f"there is no SSH key {key}: copy it from the machine that launched"),
    ):
        refused = cloud.cluster(*words, settings={"SSH_PRIVATE_KEY_FILE": str(key)})
        assert refused.code == 1, refused.err
        assert says in refused.last_line
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
    assert re.search(r"at least \$0\.5\d/h, at least \$\d", cloud.cluster("status", group).out)
    ended = cloud.cluster("terminateAll", group)
    assert re.search(r"security group removed: nothing .* They cost at least \$0\.0", ended.err)
    again = cloud.cluster("terminateAll", group)
    assert f"No node was running: nothing of group '{group}' is left" in again.err, again.err


def test_a_launch_that_leaves_nodes_says_how_to_go_on(cloud: LocalCloud, group: str) -> None:
    with cloud.options(launch_faults=["kms"]):
        made = cloud.cluster(*CREATE, group)
    assert made.code == 1
    assert (
        "EC2 ended it while it started: Client.InternalError: Client error on launch (may you use the KMS" in made.err
    )
    goes_on = f"./cluster.py install {group} goes on with them (./cluster.py createNodes would make more)"
    assert goes_on in made.last_line


def test_a_new_security_group_that_stays_unknown_is_not_waited_for_as_a_lost_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ec2:
        """Knows no security group."""

        def run_instances(self) -> None:
            """Refuse."""
            raise ClientError({"Error": {"Code": "InvalidGroup.NotFound", "Message": "no"}}, "RunInstances")

    monkeypatch.setattr(cluster, "NEW_LIMIT", -1)
    with pytest.raises(ClientError):
        cluster.persist(Ec2().run_instances, "RunInstances")


class Ec2:
    """Answers RunInstances with all that is asked, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def run_instances(self, **parameters: Any) -> dict[str, Any]:
        """Return so many instances."""
        first = sum(one["MaxCount"] for one in self.requests)
        self.requests.append(parameters)
        names = [f"i-{number}" for number in range(first, first + parameters["MaxCount"])]
        launched = datetime.now(timezone.utc)
        return {
            "Instances": [{"InstanceId": name, "State": {"Name": "pending"}, "LaunchTime": launched} for name in names]
        }


def plan(count: int) -> cluster.Plan:
    """Return a plan for COUNT nodes that lacks nothing."""
    kind = cluster.InstanceType("c1.xlarge", ("x86_64",), ("legacy-bios",), ("hvm",), 8, True, False)
    image = cluster.Image("ami-1", "x86_64", "legacy-bios", "hvm", "/dev/sda1", 8, "ubuntu")
    subnets = [cluster.Subnet("us-east-1a", "subnet-1", "vpc-1", True)]
    request = cluster.LaunchRequest("c1.xlarge", count, "default")
    return cluster.Plan(request, kind, image, subnets, "192.0.2.1/32", [], None, {}, "", None)


def test_a_launch_goes_out_in_requests_of_a_hundred_with_tokens_of_their_own() -> None:
    ec2 = Ec2()
    app: Any = SimpleNamespace(ec2=ec2)
    nodes, why = cluster.launch_nodes(app, plan(250), {"NetworkInterfaces": [{}], "TagSpecifications": []}, "token")
    assert len(nodes) == 250, why
    assert [one["MaxCount"] for one in ec2.requests] == [100, 100, 50]
    assert len({one["ClientToken"] for one in ec2.requests}) == 3


@pytest.mark.parametrize("code", ["InsufficientVolumeCapacity", "UnfulfillableCapacity"])
def test_a_zone_that_has_no_volumes_or_spot_nodes_left_is_passed_over(code: str) -> None:
    class Full(Ec2):
        """Has nothing in its first zone."""

        def run_instances(self, **parameters: Any) -> dict[str, Any]:
            """Refuse there."""
            if parameters["NetworkInterfaces"][0]["SubnetId"] == "subnet-1":
                raise ClientError({"Error": {"Code": code, "Message": "none"}}, "RunInstances")
            return super().run_instances(**parameters)

    whole = plan(2)
    other = cluster.Subnet("us-east-1b", "subnet-2", "vpc-1", True)
    app: Any = SimpleNamespace(ec2=Full())
    parameters: dict[str, Any] = {"NetworkInterfaces": [{}], "TagSpecifications": []}
    nodes, why = cluster.launch_nodes(app, whole._replace(subnets=[*whole.subnets, other]), parameters, "token")
    assert len(nodes) == 2, why


def prepared(monkeypatch: pytest.MonkeyPatch, whole: cluster.Plan | None = None, **request: Any) -> dict[str, Any]:
    """Return what a request for one node asks EC2 for, where no key and no security group must be made."""
    for name in ("ensure_key", "check_rules"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    monkeypatch.setattr(cluster, "ensure_security_group", lambda *_: cluster.SecurityGroup("sg-1", "g", "n", "vpc-1"))
    monkeypatch.setattr(cluster, "sign_launch", lambda *_: {})
    app: Any = MagicMock(ec2=Ec2(), settings=cluster.Settings())
    whole = whole or plan(1)
    return cluster.prepare(app, whole._replace(request=replace(whole.request, max_hours=1.5, **request)))


def test_nodes_give_their_metadata_to_sessions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prepared(monkeypatch)
    assert asked["MetadataOptions"]["HttpTokens"] == "required"
    assert asked["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert asked["InstanceInitiatedShutdownBehavior"] == "terminate"


def test_disks_are_encrypted_and_go_with_their_nodes_and_all_of_it_has_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prepared(monkeypatch)
    (disk,) = asked["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] is True
    assert disk["Ebs"]["DeleteOnTermination"] is True
    assert [one["ResourceType"] for one in asked["TagSpecifications"]] == ["instance", "volume"]
    assert "InstanceMarketOptions" not in asked


def test_two_first_runs_at_once_make_one_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, both = tmp_path / "key.pem", threading.Barrier(2, timeout=60)
    monkeypatch.setattr(cluster, "hide_from_git", lambda path: both.wait() and "")  # both have found no key by then
    written: list[str] = []
    write = cluster.write_secret

    def note_and_write(path: Path, text: str) -> None:
        written.append(text)
        write(path, text)

    monkeypatch.setattr(cluster, "write_secret", note_and_write)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cluster.ensure_key_file, [key, key]))
    assert written == [key.read_text()]


def test_other_disks_of_an_image_go_with_their_nodes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    disks = [
        {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 8}},
        {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 100, "DeleteOnTermination": False}},
        {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"},
    ]
    ec2 = MagicMock()
    raw = {"ImageId": "ami-1", "RootDeviceName": "/dev/sda1", "BlockDeviceMappings": disks}
    ec2.describe_images.return_value = {"Images": [raw]}
    image = cluster.fetch_image(ec2, MagicMock(), cluster.Settings())
    _, *others = prepared(monkeypatch, plan(1)._replace(image=image))["BlockDeviceMappings"]
    assert others == [{"DeviceName": "/dev/sdf", "Ebs": {"DeleteOnTermination": True}}]


@pytest.mark.parametrize(("told", "asked"), [(350, 86400), (432000, None), (None, None)])
def test_a_heads_silent_links_are_remembered_for_a_day(
    monkeypatch: pytest.MonkeyPatch, told: int | None, asked: int | None
) -> None:
    tracking = {} if told is None else {"ConnectionTrackingConfiguration": {"DefaultTcpEstablishedTimeout": told}}
    types = {"InstanceTypes": [{"NetworkInfo": {"NetworkCards": [{}], **tracking}}]}
    ec2: Any = SimpleNamespace(describe_instance_types=lambda **_: types)
    (interface,) = prepared(monkeypatch, plan(1)._replace(type=cluster.fetch_instance_type(ec2, "c8i.large")))[
        "NetworkInterfaces"
    ]
    assert interface.get("ConnectionTrackingSpecification") == (asked and {"TcpEstablishedTimeout": asked})


def test_a_spot_request_is_for_one_node_and_its_price_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prepared(monkeypatch, spot=True, max_price=0.0871234)
    once = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate", "MaxPrice": "0.087123"}
    assert asked["InstanceMarketOptions"] == {"MarketType": "spot", "SpotOptions": once}
    kinds = [one["ResourceType"] for one in asked["TagSpecifications"]]
    assert kinds == ["instance", "volume", "spot-instances-request"]


def test_nobody_logs_in_by_a_password_and_the_deadline_is_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(prepared(monkeypatch)["UserData"].removeprefix("#cloud-config\n"))
    assert config["ssh_pwauth"] is False
    assert config["disable_root"] is True
    assert '"disable_root": false' in cluster.make_user_data("private", "public", 0, 0, "root")
    assert config["bootcmd"][0][-1] == "5400"


@pytest.mark.parametrize(
    ("shown", "expected"), [(["0.0000000000", "0.5200000000", "0.1300000000"], 0.52), (["0"], None)]
)
def test_a_price_is_the_dearest_that_aws_lists_and_never_zero(
    shown: list[str], expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS lists reserved and free dimensions beside the ordinary one: a cluster must not look cheaper than it is."""
    terms = {str(i): {"priceDimensions": {"x": {"pricePerUnit": {"USD": usd}}}} for i, usd in enumerate(shown)}

    class Pricing:
        def get_products(self, **_: Any) -> dict[str, Any]:
            return {"PriceList": [json.dumps({"terms": {"OnDemand": terms}})]}

    monkeypatch.setattr(cluster, "open_client", lambda *_, **__: Pricing())
    assert cluster.fetch_on_demand_price(cluster.Settings(), "c1.xlarge") == expected


def test_creating_again_adds_and_keeps_the_head(cloud: LocalCloud, group: str) -> None:
    serve(cloud, group)
    head = next(node["id"] for node in cloud.nodes(group) if node["role"] == "head")
    more = cloud.cluster("createNodes", "c1.xlarge", "1", group)
    assert f"group '{group}' (us-east-1) has 2 nodes already; adding 1 more" in more.err
    assert cloud.cluster("install", group).code == 0
    started = cloud.cluster("start", group)
    assert ": head, 10 cores in all, restarted\n" in started.out  # no client, so no render was lost
    assert started.out.count("serves already") == 1
    assert [node["id"] for node in cloud.nodes(group) if node["role"] == "head"] == [head]
    again = cloud.cluster("start", group)
    assert (again.code, again.out.count("serves already")) == (0, 3)


def test_no_capacity_moves_to_the_next_zone(cloud: LocalCloud, group: str) -> None:
    with cloud.options(capacity={"us-east-1a": 0, "us-east-1b": 1}):
        made = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert made.code == 0, made.err
    assert "no capacity for c1.xlarge in us-east-1a (InsufficientInstanceCapacity)" in made.err
    assert sorted(node["zone"] for node in cloud.nodes(group)) == ["us-east-1b", "us-east-1c", "us-east-1c"]
    assert made.err.count("In us-east-1b and us-east-1c: traffic between zones costs $0.01 a GB in each direct") == 1
    with cloud.options(capacity={"us-east-1a": 0, "us-east-1b": 0}):  # one zone, but not the others' only one
        more = cloud.cluster("createNodes", "c1.xlarge", "1", group)
    assert more.err.count("In us-east-1b and us-east-1c: traffic between zones costs") == 1


def test_fewer_nodes_than_asked(cloud: LocalCloud, group: str) -> None:
    zones = {f"us-east-1{letter}": 0 for letter in "abcdef"}
    with cloud.options(capacity=zones | {"us-east-1b": 2}):
        made = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert made.code == 1
    assert "2 of 3 nodes ready" in made.last_line
    assert len(cloud.nodes(group)) == 2


def test_quota(cloud: LocalCloud, group: str) -> None:
    with cloud.options(vcpu_limit=1):
        made = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert made.code == 1
    assert "quota is used up" in made.last_line
    assert "servicequotas" in made.last_line


def test_a_lost_answer_launches_once(cloud: LocalCloud, group: str) -> None:
    with cloud.faults({"kind": "lost", "action": "RunInstances", "nth": 1}):
        made = cloud.cluster("createNodes", "c1.xlarge", "2", group)
    assert made.code == 0, made.err
    assert len(cloud.truth(group)[0]) == 2


def test_instances_that_lists_show_late(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    before = cloud.ask("status").keys()
    with cloud.options(list_lag=8.0):
        child = cloud.start(sys.executable, "cluster.py", "createNodes", "c1.xlarge", "2", group)
        wait_until(lambda: [s["state"] for i, s in cloud.ask("status").items() if i not in before] == ["running"] * 2)
        child.kill()
        child.communicate()
        ended = cloud.cluster("terminateAll", group)
    assert ended.code == 0, ended.err
    assert ended.out.count(": terminated") == 3
    assert cloud.status(group) == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_create(cloud: LocalCloud, group: str, number: int, code: int) -> None:
    with cloud.options(list_lag=30.0):
        child = cloud.start(sys.executable, "cluster.py", "createNodes", "c1.xlarge", "1", group)
        assert child.stderr
        while "waiting until each answers" not in (line := child.stderr.readline()):
            assert line
        done = interrupt(child, number)
    assert done.code == code
    assert len(done.err.strip().splitlines()) == 1
    launched = f"Interrupted. 1 of 1 node launched in group '{group}' (us-east-1)"
    assert f"{launched}; they cost money, and status may show them some seconds late: " in done.err
    assert f"./cluster.py terminateAll {group} ends them" in done.err


def test_time_limit_is_tagged_and_moved(cloud: LocalCloud, group: str) -> None:
    made = cloud.cluster("createNodes", "c1.xlarge", "1", group, "--max-hours", "2.5")
    assert "Each ends itself after 2.5 hours, or 60 minutes without use." in made.err
    assert cloud.nodes(group)[0]["max_hours"] == 2.5
    assert "idle limit 60 min" in cloud.cluster("status", group).out
    said = cloud.cluster("extend", "1", group, env={"TZ": "EST5"})
    assert said.code == 0, said.err
    assert "ends at 2027-01-15 03:00:00 (08:00:00 UTC), may be idle for 60 minutes" in said.out
    assert cloud.nodes(group)[0]["max_hours"] == 3.5

    more = cloud.cluster("createNodes", "c1.xlarge", "1", group, "--idle-minutes", "90", "--dry-run")
    assert "Each ends itself after 3.5 hours, or 90 minutes without use." in more.out, more.err
