"""The local cloud behaves as AWS where this tool depends on it."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from botocore.exceptions import ClientError

import cluster
from tests.localcloud import iam
from tests.localcloud.places import HERE
from tests.support import LocalCloud, free_port, wait_until


@pytest.fixture
def launch(cloud: LocalCloud) -> Iterator[dict[str, Any]]:
    """Parameters of a launch that would work, with a key pair and the tool's user data."""
    group = f"raw-{uuid.uuid4().hex[:6]}"
    ec2 = cloud.client("ec2")
    private, public = cluster.make_ed25519()
    tags = [{"Key": "mitsuba-group", "Value": group}]
    (subnet,) = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": ["us-east-1a"]}])["Subnets"]
    ec2.import_key_pair(KeyName=group, PublicKeyMaterial=public.encode())
    with cloud.options(pace="none"):
        made = ec2.create_security_group(
            GroupName=group, Description="raw", TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}]
        )
        yield {
            "ImageId": "ami-0a0e5d9c7acc336f1",
            "InstanceType": "t3.micro",
            "KeyName": group,
            "UserData": cluster.make_user_data(private, public, 0),
            "SubnetId": subnet["SubnetId"],
            "SecurityGroupIds": [made["GroupId"]],
            "MinCount": 1,
            "MaxCount": 2,
            "TagSpecifications": [{"ResourceType": "instance", "Tags": tags}],
        }
    cloud.end(group)
    ec2.delete_key_pair(KeyName=group)


def refusal(call: Any, **parameters: Any) -> str:
    """Return the error code of a call that AWS refuses."""
    with pytest.raises(ClientError) as caught:
        call(**parameters)
    return str(caught.value.response["Error"]["Code"])


def test_max_count_and_client_token(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    token = uuid.uuid4().hex
    first = ec2.run_instances(**launch, ClientToken=token)["Instances"]
    again = ec2.run_instances(**launch, ClientToken=token)["Instances"]
    assert len(first) == 2
    assert {one["InstanceId"] for one in first} == {one["InstanceId"] for one in again}
    assert refusal(ec2.run_instances, **(launch | {"MaxCount": 1}), ClientToken=token) == "IdempotentParameterMismatch"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"ImageId": "ami-00000000000000000"}, "InvalidAMIID.NotFound"),
        ({"InstanceType": "c9.huge"}, "InvalidInstanceType"),
        ({"KeyName": "nobody"}, "InvalidKeyPair.NotFound"),
        ({"MinCount": 3}, "InvalidParameterValue"),
        (
            {"TagSpecifications": [{"ResourceType": "spot-instances-request", "Tags": [{"Key": "a", "Value": "b"}]}]},
            "InvalidParameterCombination",
        ),
        (
            {"InstanceMarketOptions": {"MarketType": "spot"}, "InstanceInitiatedShutdownBehavior": "stop"},
            "InvalidParameterCombination",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_launches(cloud: LocalCloud, launch: dict[str, Any], change: dict[str, Any], code: str) -> None:
    assert refusal(cloud.client("ec2").run_instances, **(launch | change)) == code


def test_pages_are_of_instances(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    ec2.run_instances(**(launch | {"MaxCount": 7}))
    pages = ec2.get_paginator("describe_instances").paginate(PaginationConfig={"PageSize": 5})
    sizes = [sum(len(r["Instances"]) for r in page["Reservations"]) for page in pages]
    assert all(size == 5 for size in sizes[:-1])
    assert sizes[-1] <= 5


def test_states_and_a_security_group_in_use(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    (made,) = ec2.run_instances(**(launch | {"MaxCount": 1}))["Instances"]
    assert made["State"]["Name"] == "pending"

    def state() -> str:
        raw = ec2.describe_instances(InstanceIds=[made["InstanceId"]])["Reservations"][0]["Instances"][0]
        return str(raw["State"]["Name"])

    wait_until(lambda: state() == "running")
    assert refusal(ec2.delete_security_group, GroupId=launch["SecurityGroupIds"][0]) == "DependencyViolation"
    ended = ec2.terminate_instances(InstanceIds=[made["InstanceId"]])["TerminatingInstances"][0]
    assert (ended["PreviousState"]["Name"], ended["CurrentState"]["Name"]) == ("running", "shutting-down")
    assert instance(cloud, made["InstanceId"])["SecurityGroups"] == []
    wait_until(lambda: state() == "terminated")


def instance(cloud: LocalCloud, name: str) -> dict[str, Any]:
    """Return a raw instance, as DescribeInstances shows it."""
    found: dict[str, Any] = cloud.client("ec2").describe_instances(InstanceIds=[name])["Reservations"][0]
    return dict(found["Instances"][0])


def test_a_new_instance_is_unknown_for_a_while(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    (old, *_) = ec2.run_instances(**launch)["Instances"]
    with cloud.options(list_lag=1000):
        (new, *_) = ec2.run_instances(**launch)["Instances"]
        both = {"InstanceIds": [old["InstanceId"], new["InstanceId"]]}
        listed = [one["InstanceId"] for r in ec2.describe_instances()["Reservations"] for one in r["Instances"]]
        assert old["InstanceId"] in listed
        assert new["InstanceId"] not in listed
        assert refusal(ec2.describe_instances, InstanceIds=[new["InstanceId"]]) == "InvalidInstanceID.NotFound"
        tags = {"Tags": [{"Key": "a", "Value": "b"}]}
        assert refusal(ec2.create_tags, Resources=[new["InstanceId"]], **tags) == "InvalidInstanceID.NotFound"
        assert refusal(ec2.terminate_instances, **both) == "InvalidInstanceID.NotFound"
    assert instance(cloud, old["InstanceId"])["State"]["Name"] in ("pending", "running")
    assert len(ec2.terminate_instances(**both)["TerminatingInstances"]) == 2


def test_the_public_address_comes_late(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    with cloud.options(address_lag=1000):
        (made,) = cloud.client("ec2").run_instances(**(launch | {"MaxCount": 1}))["Instances"]
        wait_until(lambda: instance(cloud, made["InstanceId"])["State"]["Name"] == "running")
        late = instance(cloud, made["InstanceId"])
    assert not made.get("PublicIpAddress")
    assert not late.get("PublicIpAddress")
    shown = instance(cloud, made["InstanceId"])
    assert shown["PublicIpAddress"].startswith("127.")
    assert made["PrivateIpAddress"] == shown["PrivateIpAddress"] != shown["PublicIpAddress"]


def test_a_new_security_group_and_key_pair_are_unknown_for_a_while(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    with cloud.options(created_lag=1000):
        name = f"late-{launch['KeyName']}"
        made = ec2.create_security_group(GroupName=name, Description="late")["GroupId"]
        rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.1/32"}]}
        assert refusal(ec2.describe_security_groups, GroupIds=[made]) == "InvalidGroup.NotFound"
        add = ec2.authorize_security_group_ingress
        assert refusal(add, GroupId=made, IpPermissions=[rule]) == "InvalidGroup.NotFound"
        assert refusal(ec2.run_instances, **launch | {"SecurityGroupIds": [made]}) == "InvalidGroup.NotFound"
        ec2.create_key_pair(KeyName=name)
        ec2.import_key_pair(KeyName=f"{name}-2", PublicKeyMaterial=cluster.make_ed25519()[1].encode())
        assert refusal(ec2.describe_key_pairs, KeyNames=[f"{name}-2"]) == "InvalidKeyPair.NotFound"
    ec2.delete_security_group(GroupId=made)
    for key in (name, f"{name}-2"):
        ec2.delete_key_pair(KeyName=key)


def test_an_ended_instance_holds_its_security_group(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    with cloud.options(holding_lag=1000):
        (made,) = ec2.run_instances(**(launch | {"MaxCount": 1}))["Instances"]
        ec2.terminate_instances(InstanceIds=[made["InstanceId"]])
        wait_until(lambda: instance(cloud, made["InstanceId"])["State"]["Name"] == "terminated")
        assert refusal(ec2.delete_security_group, GroupId=launch["SecurityGroupIds"][0]) == "DependencyViolation"


def test_one_protected_instance_spares_its_zone(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    first, second = ec2.run_instances(**launch)["Instances"]
    (subnet,) = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": ["us-east-1b"]}])["Subnets"]
    elsewhere = launch | {"MaxCount": 1, "SubnetId": subnet["SubnetId"]}
    (other,) = ec2.run_instances(**elsewhere)["Instances"]
    ids = [one["InstanceId"] for one in (first, second, other)]
    ec2.modify_instance_attribute(InstanceId=ids[0], DisableApiTermination={"Value": True})
    assert refusal(ec2.terminate_instances, InstanceIds=ids) == "OperationNotPermitted"
    states = [instance(cloud, name)["State"]["Name"] for name in ids]
    assert [state in ("pending", "running") for state in states] == [True, True, False]
    ec2.modify_instance_attribute(InstanceId=ids[0], DisableApiTermination={"Value": False})
    ec2.terminate_instances(InstanceIds=ids)


def test_spot_below_the_price_of_a_zone(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    spot = {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.05"}}
    more = {"InstanceMarketOptions": spot, "InstanceInitiatedShutdownBehavior": "terminate"}
    run = cloud.client("ec2").run_instances
    assert refusal(run, **launch, **more) == "SpotMaxPriceTooLow"
    with cloud.options(spot_prices={"us-east-1a": 0.04}):
        assert len(run(**launch, **more)["Instances"]) == 2


@pytest.mark.parametrize("code", ["UnauthorizedOperation", "AuthFailure"])
def test_a_region_that_refuses(cloud: LocalCloud, code: str) -> None:
    with cloud.options(refusing_regions={"eu-west-1": code}):
        assert refusal(cloud.make_client("ec2", "eu-west-1").describe_instances) == code
        cloud.client("ec2").describe_instances(MaxResults=5)


def test_an_object_under_a_kms_key_has_no_md5(cloud: LocalCloud) -> None:
    s3 = cloud.client("s3")
    plain = s3.put_object(Bucket="scenes", Key="plain", Body=b"data")
    cloud.ask("encrypt", True)
    hidden = s3.put_object(Bucket="scenes", Key="hidden", Body=b"data")
    cloud.ask("encrypt", False)
    head = s3.head_object(Bucket="scenes", Key="hidden")
    assert plain["ETag"].strip('"') == hashlib.md5(b"data").hexdigest()
    assert len(hidden["ETag"]) == len(plain["ETag"])
    assert hidden["ETag"] == head["ETag"] != plain["ETag"]
    assert head["ServerSideEncryption"] == "aws:kms"
    assert "ServerSideEncryption" not in s3.head_object(Bucket="scenes", Key="plain")


def test_aborting_an_upload_is_an_action_of_its_own() -> None:
    demand = iam.s3_demand("DELETE", "/scenes/data/smoke.vol?uploadId=7")
    assert demand.action == "s3:AbortMultipartUpload"
    assert iam.s3_demand("DELETE", "/scenes/data/smoke.vol").action == "s3:DeleteObject"


def reset_at_once(port: int) -> None:
    """Connect and reset before the server can accept: it is stopped meanwhile by the caller."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_only_an_early_reset_ends_the_stand_in_server() -> None:
    port = free_port()
    words = [sys.executable, str(HERE / "mitsuba" / "mtssrv"), "-l", str(port), "-i", "127.0.0.1", "-p", "4"]
    with subprocess.Popen(words, cwd="/tmp", stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        while "Listening" not in (line := server.stdout.readline()):
            assert line

        def ask() -> int:
            return cluster.handshake(
                lambda limit: socket.create_connection(("127.0.0.1", port), limit), "0.6.0 3 0", 20
            )[0]

        late = socket.create_connection(("127.0.0.1", port))
        late.sendall(b"\x1b\xcd0.6.0\0\x03\0")
        assert late.recv(2) == b"\x1b\xcd"
        late.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        late.close()
        assert ask() == 4
        server.send_signal(signal.SIGSTOP)
        reset_at_once(port)
        server.send_signal(signal.SIGCONT)
        assert server.wait(60) == 0


def test_canonicals_parameters(cloud: LocalCloud) -> None:
    name = "/aws/service/canonical/ubuntu/server/22.04/stable/current/amd64/hvm/ebs-gp2/ami-id"
    image = cloud.client("ssm").get_parameter(Name=name)["Parameter"]["Value"]
    (shown,) = cloud.client("ec2").describe_images(ImageIds=[image])["Images"]
    assert (shown["Architecture"], shown["OwnerId"]) == ("x86_64", "099720109477")


def test_addresses_belong_to_nobody(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    cloud.client("ec2").run_instances(**launch)
    assert all(one["private"].startswith("127.") for one in cloud.ask("status").values())


def test_a_fault_that_is_none_lists_those_that_are(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    (made, *_) = cloud.client("ec2").run_instances(**launch)["Instances"]
    with pytest.raises(click.ClickException, match=r"process nodes know these faults: .*sshd-silent"):
        cloud.fault("nonsense", {"id": made["InstanceId"]})
    with pytest.raises(click.ClickException, match="no such node: i-nothing"):
        cloud.fault("mute", {"id": "i-nothing"})


GREETING = bytes.fromhex("1bcd302e362e30000300")  # of mitsuba-server's documentation: 0.6.0, single precision


ANSWER = bytes.fromhex("1bcd000469702d3137322d33312d302d3500")  # 4 cores, ip-172-31-0-5


@contextlib.contextmanager
def stand_in(folder: Path, *words: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the stand-in server in FOLDER."""
    command = [sys.executable, str(HERE / "mitsuba" / "mtssrv"), *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=os.environ | env, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()
            child.communicate()


def own_address() -> str:
    """Return a loopback address that no other test uses: there mtssrv's own port is free for sure."""
    return str(ipaddress.IPv4Address("127.128.0.0") + secrets.randbelow(1 << 22))


def ready(child: subprocess.Popen[bytes]) -> None:
    """Wait for the stand-in's ready line."""
    assert child.stdout
    while b"Listening on port" not in (line := child.stdout.readline()):
        assert line, "the stand-in ended"


def test_stand_in_answers_with_mitsubas_very_bytes(tmp_path: Path) -> None:
    address = own_address()
    with stand_in(tmp_path, "-p", "4", "-n", "ip-172-31-0-5", "-i", address) as server:
        ready(server)
        with socket.create_connection((address, cluster.SERVER_PORT), 5) as connection:
            connection.sendall(GREETING)
            assert connection.recv(100) == ANSWER
        with socket.create_connection((address, cluster.SERVER_PORT), 5) as connection:
            connection.sendall(GREETING[:-1] + b"\1")
            assert connection.recv(100) == bytes.fromhex("000d")
    assert "Listening on port" in (tmp_path / "mtssrv.ip-172-31-0-5.log").read_text()


def test_stand_in_head_dies_with_its_worker(tmp_path: Path) -> None:
    first, second = own_address(), own_address()
    with stand_in(tmp_path, "-i", first, "-n", "w", "-p", "3") as worker:
        ready(worker)
        with stand_in(tmp_path, "-i", second, "-n", "h", "-p", "1", "-c", first) as head:
            ready(head)
            with socket.create_connection((second, cluster.SERVER_PORT), 5) as connection:
                connection.sendall(GREETING)
                assert connection.recv(4)[2:] == b"\0\4"
            worker.kill()
            assert head.wait(10) == 255


def test_stand_in_fails_with_0_and_says_why(tmp_path: Path) -> None:
    with stand_in(tmp_path, "-c", own_address()) as head:
        out, err = head.communicate(timeout=10)
        assert head.returncode == 0
        assert b"Caught a critical exception" in err
        assert b"Listening" not in out
