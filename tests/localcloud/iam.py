"""IAM in front of the endpoint: a policy decides on each call, as AWS's would, with AWS's refusals.

Knows what this tool's policy needs: Allow statements with Action, Resource and Condition
(StringEquals, Null), the dependent action ec2:CreateTags of calls that tag what they create
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/supported-iam-actions-tagging.html), tags
of the resources that a call names, those that it gives to what it makes, and S3's actions, which
differ from its calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qs

from tests.localcloud.places import ACCOUNT, REGION

USER = f"arn:aws:iam::{ACCOUNT}:user/researcher"
KINDS = {"i": "instance", "sg": "security-group", "sir": "spot-instances-request", "vol": "volume", "key": "key-pair"}
KINDS |= {"ami": "image", "subnet": "subnet", "vpc": "vpc"}
# Parameters that name resources, but not the peers in a rule (IpPermissions.1.Groups.1.GroupId).
NAMING = re.compile(
    r"(^|^NetworkInterface\.\d+\.)(ImageId|SubnetId|VpcId|InstanceId|(Security)?GroupId|ResourceId|SpotInstanceRequestId)"
    r"(\.\d+)?$"
)
MAKES = {  # what a call makes (or, of a key pair, names): each of it must be allowed, too
    "RunInstances": "instance volume network-interface key-pair",
    "CreateSecurityGroup": "security-group",
    "ImportKeyPair": "key-pair",
    "AuthorizeSecurityGroupIngress": "security-group-rule",
}
S3_ACTIONS = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "POST": "s3:PutObject"}


@dataclass(frozen=True)
class Demand:
    """One thing that a call must be allowed: an action on a resource, with its condition keys."""

    action: str
    resource: str = "*"
    context: dict[str, str] = field(default_factory=dict)


def as_list(value: Any) -> list[Any]:
    """Return a policy's value as a list: IAM allows one item without brackets."""
    return value if isinstance(value, list) else [value]


def condition_holds(condition: dict[str, dict[str, Any]], context: dict[str, str]) -> bool:
    """Tell whether every key of a Condition block matches."""
    for operator, keys in condition.items():
        for key, wanted in keys.items():
            if operator == "Null":
                good = (key in context) == (str(as_list(wanted)[0]).lower() == "false")
            elif operator == "StringEquals":
                good = context.get(key) in as_list(wanted)
            else:
                raise ValueError(f"the local cloud does not know the condition operator {operator}")
            if not good:
                return False
    return True


def allows(policy: dict[str, Any], demand: Demand) -> bool:
    """Tell whether a policy allows a demand."""
    return any(
        statement["Effect"] == "Allow"
        and any(fnmatchcase(demand.action.lower(), pattern.lower()) for pattern in as_list(statement["Action"]))
        and any(fnmatchcase(demand.resource, pattern) for pattern in as_list(statement["Resource"]))
        and condition_holds(statement.get("Condition", {}), demand.context)
        for statement in policy["Statement"]
    )


def ec2_demands(action: str, body: bytes, tags_of: Callable[[str], dict[str, str]]) -> Iterator[Demand]:
    """Yield what an EC2 call demands: its action for each resource that it names or makes, and CreateTags."""
    parameters = {name: values[0] for name, values in parse_qs(body.decode()).items()}
    named = [value for name, value in parameters.items() if NAMING.search(name)]
    given = {
        kind: {
            f"aws:RequestTag/{value}": parameters[f"{name.removesuffix('Key')}Value"]
            for name, value in parameters.items()
            if re.fullmatch(rf"{specification.removesuffix('ResourceType')}Tag\.\d+\.Key", name)
        }
        for specification, kind in parameters.items()
        if re.fullmatch(r"TagSpecification\.\d+\.ResourceType", specification)
    }
    if action.startswith("Describe"):
        yield Demand(f"ec2:{action}")
        return
    for name in named:
        account = "" if name.startswith("ami-") else ACCOUNT
        arn = f"arn:aws:ec2:{REGION}:{account}:{KINDS.get(name.split('-')[0], 'other')}/{name}"
        tags = {f"aws:ResourceTag/{key}": value for key, value in tags_of(name).items()}
        yield Demand(f"ec2:{action}", arn, tags)
    makes = MAKES.get(action, "").split() + (["spot-instances-request"] if b"MarketType=spot" in body else [])
    for kind in makes:
        yield Demand(f"ec2:{action}", f"arn:aws:ec2:{REGION}:{ACCOUNT}:{kind}/*", given.get(kind, {}))
    for kind in given:
        yield Demand("ec2:CreateTags", f"arn:aws:ec2:{REGION}:{ACCOUNT}:{kind}/*", {"ec2:CreateAction": action})


def s3_demand(method: str, target: str) -> Demand:
    """Return what an S3 call demands."""
    path, _, query = target.partition("?")
    bucket, _, key = path.lstrip("/").partition("/")
    if not key:
        return Demand("s3:CreateBucket" if method == "PUT" else "s3:ListBucket", f"arn:aws:s3:::{bucket}")
    if method == "DELETE" and "uploadId=" in query:
        return Demand("s3:AbortMultipartUpload", f"arn:aws:s3:::{bucket}/{key}")
    return Demand(S3_ACTIONS.get(method, f"s3:{method.title()}Object"), f"arn:aws:s3:::{bucket}/{key}")


def demands(
    service: str, action: str, method: str, path: str, body: bytes, tags_of: Callable[[str], dict[str, str]]
) -> Iterable[Demand]:
    """Return all that a call demands."""
    if service == "ec2":
        return ec2_demands(action, body, tags_of)
    if service == "s3":
        return [s3_demand(method, path)]
    if service == "ssm":
        name = json.loads(body).get("Name", "")
        return [Demand(f"ssm:{action}", f"arn:aws:ssm:{REGION}::parameter{name}")]
    return [Demand(f"{service}:{action}")]


def refusal(service: str, demand: Demand) -> tuple[int, dict[str, str], str]:
    """Return AWS's refusal of a demand, in the service's own form."""
    text = (
        f"User: {USER} is not authorized to perform: {demand.action} on resource: {demand.resource} "
        f"because no identity-based policy allows the {demand.action} action"
    )
    if service == "ec2":
        from tests.localcloud.aws import error_response

        return error_response("UnauthorizedOperation", f"You are not authorized to perform this operation. {text}", 403)
    if service == "s3":
        body = f"<Error><Code>AccessDenied</Code><Message>{text}</Message></Error>"
        return 403, {"Content-Type": "application/xml"}, body
    body = json.dumps({"__type": "AccessDeniedException", "Message": text})
    return 400, {"Content-Type": "application/x-amz-json-1.1"}, body
