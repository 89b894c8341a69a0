"""AWS: whose credentials, its refusals in words, regions, and who may connect."""

from __future__ import annotations

import os
import pty
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

import cluster
from tests.localcloud.places import PROJECT
from tests.support import LocalCloud, create

USER = "User: arn:aws:iam::123456789012:user/x is not authorized to perform: ec2:RunInstances on resource: "
IMAGE = "arn:aws:ec2:us-east-1::image/ami-1"
BLOB = ". Encoded authorization failure message: " + "4vgAYX-s3cr3t_" * 20


def refusal(code: str, text: str, call: str = "RunInstances") -> ClientError:
    """Return an error as botocore raises it."""
    return ClientError({"Error": {"Code": code, "Message": text}}, call)


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (" with an explicit deny in a service control policy", "a rule forbids it, whatever permissions you have"),
        (" with an explicit deny in a permissions boundary", "a rule forbids it, whatever permissions you have"),
        (" because no identity-based policy allows the ec2:RunInstances action", "ask for that permission"),
    ],
)
def test_a_denial_keeps_the_cause_that_aws_names(cause: str, says: str) -> None:
    text = f"You are not authorized to perform this operation. {USER}{IMAGE}{cause}"
    for end in (BLOB, "", "."):
        said = cluster.explain(refusal("UnauthorizedOperation", text + end))
        assert said.startswith(f"AWS denies ec2:RunInstances on resource: {IMAGE}{cause}: {says}")
        assert "4vgAYX" not in said
        assert ("ask for that permission" in said) == ("explicit" not in cause)


def test_a_denial_without_a_text_names_the_action() -> None:
    assert "AWS denies s3:GetObject: " in cluster.explain(refusal("403", "Forbidden", "HeadObject"))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("OptInRequired", "accept terms and subscribe: visit https://aws.amazon.com/marketplace/pp?sku=1"),
        ("AuthFailure", "Not authorized for images: [ami-1]"),
    ],
)
def test_an_image_that_is_refused_is_no_matter_of_credentials(code: str, text: str) -> None:
    assert cluster.explain(refusal(code, text)) == f"AWS refused RunInstances: {text} ({code})"
    assert "AWS refuses these credentials" in cluster.explain(refusal(code, text, "DescribeInstances"))


def test_a_limit_of_instances_is_a_quota() -> None:
    text = "You have requested more instances than your current instance limit of 4 allows."
    assert cluster.explain(refusal("InstanceLimitExceeded", text)).startswith(
        f"your account's quota is used up: {text}"
    )


def test_a_profile_of_aws_login_needs_one_more_package(cloud: LocalCloud, tmp_path: Path) -> None:
    text = "[profile render]\nlogin_session = arn:aws:iam::123456789012:user/x\n"
    done = cloud.run(sys.executable, "cluster.py", "status", env=profile(cloud, tmp_path, text))
    assert done.code == 1
    assert "made by `aws login`, for which boto3 needs one more package: " in done.err
    assert done.err.strip().endswith("-m pip install 'botocore[crt]'")


MFA = """
[profile render]
role_arn = arn:aws:iam::123456789012:role/render
source_profile = person
mfa_serial = arn:aws:iam::123456789012:mfa/person
[profile person]
aws_access_key_id = AKIAIOSFODNN7EXAMPLE
aws_secret_access_key = secret
"""


def test_mfa_asks_once_and_the_next_command_not_at_all(cloud: LocalCloud, tmp_path: Path) -> None:
    """Several clients in several threads: one question; then the AWS CLI's own cache."""
    env = profile(cloud, tmp_path, MFA)
    words = [sys.executable, "cluster.py", "createNodes", "c9.huge", "1"]
    terminal, inner = pty.openpty()
    child = cloud.start(*words, env=env, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
    os.close(inner)
    said = b""
    while chunk := read(terminal):
        answered = said.count(b"Enter MFA code")
        said += chunk
        if said.count(b"Enter MFA code") > answered:
            os.write(terminal, b"123456\n")
    child.wait(60)
    os.close(terminal)
    assert said.count(b"Enter MFA code") == 1, said
    assert b"has no instance type 'c9.huge'" in said
    assert len(list((tmp_path / ".aws/cli/cache").iterdir())) == 1
    again = cloud.run(*words, env=env)
    assert "has no instance type 'c9.huge'" in again.last_line


def read(terminal: int) -> bytes:
    """Return what a terminal shows next; b"" at its end."""
    try:
        return os.read(terminal, 1000)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


def profile(cloud: LocalCloud, folder: Path, text: str) -> dict[str, str]:
    """Return an environment in which the profile `render` of an AWS configuration is all there is."""
    (folder / "config").write_text(text)
    env = cloud.environment(AWS_CONFIG_FILE=str(folder / "config"), AWS_PROFILE="render", HOME=str(folder))
    del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]
    return env


def test_a_region_that_the_account_has_not_enabled(cloud: LocalCloud) -> None:
    """`regions` works even then: it asks where every account may."""
    there = {"AWS_REGION": "eu-west-1"}
    with cloud.options(refusing_regions={"eu-west-1": "AuthFailure"}):
        refused = cloud.cluster("status", settings=there)
        listed = cloud.cluster("regions", settings=there)
    assert "or AWS_REGION: ./cluster.py regions lists the regions that are enabled" in refused.last_line
    assert listed.code == 0, listed.err
    assert "* eu-west-1\n" in listed.out


def test_a_region_that_boto3_does_not_know_spoils_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "fetch_regions", lambda _: ["us-east-1", "xx-new-1"])
    problems: list[str] = []
    found = cluster.App(PROJECT / "config.py").in_all_regions(lambda ec2: ec2.meta.region_name, problems)
    assert found == {"us-east-1": "us-east-1"}
    assert "xx-new-1: 'xx-new-1' is no region that boto3 knows" in problems[0]


def test_changed_address_replaces_only_our_own_rules(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    ec2 = cloud.client("ec2")
    found = ec2.describe_security_groups(Filters=[{"Name": "tag:mitsuba-group", "Values": [group]}])
    name = found["SecurityGroups"][0]["GroupId"]
    other = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
    other |= {"IpRanges": [{"CidrIp": "192.0.2.99/32", "Description": "mitsuba-cluster SHA256:other them@there"}]}
    ec2.authorize_security_group_ingress(GroupId=name, IpPermissions=[other])
    moved = cloud.cluster("runCommand", "true", group, settings={"CLIENT_CIDR": "192.0.2.77/32"})
    assert moved.code == 0, moved.err
    assert "address has changed: the nodes' ports are open to 192.0.2.77/32 now" in moved.err
    rules = ec2.describe_security_groups(GroupIds=[name])["SecurityGroups"][0]["IpPermissions"]
    cidrs = {source["CidrIp"] for rule in rules for source in rule["IpRanges"]}
    assert cidrs == {"192.0.2.77/32", "192.0.2.99/32"}
