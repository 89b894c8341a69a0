"""The local cloud behaves as AWS where this tool depends on it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import click
import pytest
from botocore.exceptions import ClientError

from tests.support import LocalCloud, wait_until


@pytest.fixture
def launch(cloud: LocalCloud) -> Iterator[dict[str, Any]]:
    """Parameters of a launch that would work, with a key pair and the tool's user data."""
    group = f"raw-{uuid.uuid4().hex[:6]}"
    assert cloud.cluster("createNodes", "t3.micro", "1", group).code == 0
    ec2 = cloud.client("ec2")
    name = cloud.nodes(group)[0]["id"]
    data = ec2.describe_instance_attribute(InstanceId=name, Attribute="userData")["UserData"]["Value"]
    raw = ec2.describe_instances(InstanceIds=[name])["Reservations"][0]["Instances"][0]
    import base64

    yield {
        "ImageId": raw["ImageId"],
        "InstanceType": "t3.micro",
        "KeyName": raw["KeyName"],
        "UserData": base64.b64decode(data).decode(),
        "SubnetId": raw["SubnetId"],
        "SecurityGroupIds": [raw["SecurityGroups"][0]["GroupId"]],
        "MinCount": 1,
        "MaxCount": 2,
        "TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "mitsuba-group", "Value": group}]}],
    }
    cloud.end(group)


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
    wait_until(lambda: state() == "terminated")


def test_canonicals_parameters(cloud: LocalCloud) -> None:
    name = "/aws/service/canonical/ubuntu/server/22.04/stable/current/amd64/hvm/ebs-gp2/ami-id"
    image = cloud.client("ssm").get_parameter(Name=name)["Parameter"]["Value"]
    (shown,) = cloud.client("ec2").describe_images(ImageIds=[image])["Images"]
    assert (shown["Architecture"], shown["OwnerId"]) == ("x86_64", "099720109477")


def test_addresses_belong_to_nobody(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    cloud.client("ec2").run_instances(**launch)
    assert all(one["private"].startswith("127.") for one in cloud.ask("status").values())


def test_a_fault_that_is_none_lists_those_that_are(cloud: LocalCloud, launch: dict[str, Any]) -> None:
    group = launch["TagSpecifications"][0]["Tags"][0]["Value"]
    with pytest.raises(click.ClickException, match=r"process nodes know these faults: .*sshd-silent"):
        cloud.fault("nonsense", cloud.nodes(group)[0])
    with pytest.raises(click.ClickException, match="no such node: i-nothing"):
        cloud.fault("mute", {"id": "i-nothing"})
