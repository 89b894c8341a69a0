"""What AWS does late, and what it refuses meanwhile: a new thing is unknown to the other calls for a while.

A delay is a number of seconds, or a range from which each thing has its own. AWS documents no
figures: "real" holds what users report (see the README of the tests).
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable
from typing import Any

from tests.localcloud.places import ACCOUNT

Seconds = float | tuple[float, float]

PACES: dict[str, dict[str, Seconds]] = {
    "short": {
        "list_lag": (1, 3),  # until lists show a new instance, and calls know its id
        "address_lag": (1, 3),  # until an instance's public address is told
        "created_lag": (1, 2),  # until other calls know a new security group or key pair
        "ending_lag": (0.5, 1.5),  # from shutting-down to terminated
        "holding_lag": (1, 2),  # after that, while the network interface still holds the security group
    },
    "brief": {  # for sweeps of hundreds of runs
        "list_lag": (0.2, 0.6),
        "address_lag": (0.2, 0.6),
        "created_lag": (0.2, 0.4),
        "ending_lag": (0.1, 0.3),
        "holding_lag": (0.2, 0.4),
    },
    "real": {
        "list_lag": (1, 5),
        "address_lag": (2, 10),
        "created_lag": (1, 10),
        "ending_lag": (30, 150),
        "holding_lag": (10, 60),
    },
}
PACES["none"] = dict.fromkeys(PACES["short"], 0)

NAMES_INSTANCE = re.compile(r"(InstanceId|ResourceId)(\.\d+)?")
NAMES_GROUP = re.compile(r"(.+\.)?(Security)?GroupId(\.\d+)?")
NAMES_KEY = re.compile(r"KeyName(\.\d+)?")
MAKES_KEYS = ("ImportKeyPair", "CreateKeyPair", "DeleteKeyPair")
Refusal = tuple[str, str]  # code, message


def lag(options: Any, name: str, made: Any) -> float:
    """Return the seconds that a thing has of the delay NAME; always the same within its range."""
    delay: Seconds = getattr(options, name)
    low, high = delay if isinstance(delay, (list, tuple)) else (delay, delay)
    return low + random.Random(f"{name} {made.id}").random() * (high - low)


def note_birth(options: Any, made: Any) -> None:
    """Note when a thing was made, and with which delays: an option changes nothing for what was there before."""
    made.born = time.monotonic()
    made.lags = {name: lag(options, name, made) for name in PACES["none"]}


def is_late(options: Any, name: str, made: Any) -> bool:
    """Tell whether the delay NAME of a thing is not over; a shorter one, set meanwhile, ends it."""
    if not hasattr(made, "born"):
        return False
    return bool(time.monotonic() - made.born < min(made.lags[name], lag(options, name, made)))


def named(parameters: dict[str, str], pattern: re.Pattern[str]) -> list[str]:
    """Return the values of the parameters whose names match."""
    return [value for name, value in parameters.items() if pattern.fullmatch(name)]


def not_found(what: str, code: str, names: Iterable[str]) -> Refusal | None:
    """Return AWS's NotFound for NAMES; None where there are none."""
    text = ", ".join(names)
    if not text:
        return None
    many = "," in text
    return f"{code}.NotFound", f"The {what}{'s' if many else ''} '{text}' do{'' if many else 'es'} not exist"


def refuse(cloud: Any, region: str, action: str, parameters: dict[str, str]) -> Refusal | None:
    """Return what AWS says to an EC2 call that names what it does not know yet, or may not touch."""
    from moto.ec2.models import ec2_backends

    options, backend = cloud.options, ec2_backends[ACCOUNT][region]
    if code := options.refusing_regions.get(region):
        return code, REGION_REFUSALS.get(code, "Refused.").format(action=action)
    instances = {name: cloud.instances.get(name) for name in named(parameters, NAMES_INSTANCE) if name[:2] == "i-"}
    unknown = [
        name
        for name, one in instances.items()
        if not one or one.region_name != region or is_late(options, "list_lag", one) or name in options.forgotten
    ]
    groups = [backend.get_security_group_from_id(name) for name in named(parameters, NAMES_GROUP)]
    keys = [] if action in MAKES_KEYS else [backend.key_pairs.get(name) for name in named(parameters, NAMES_KEY)]
    late_groups = [one.id for one in groups if one and is_late(options, "created_lag", one)]
    late_keys = [one.key_name for one in keys if one and is_late(options, "created_lag", one)]
    return (
        not_found("instance ID", "InvalidInstanceID", unknown)
        or not_found("security group", "InvalidGroup", late_groups)
        or not_found("key pair", "InvalidKeyPair", late_keys)
        or (protect(list(instances.values())) if action == "TerminateInstances" else None)
    )


REGION_REFUSALS = {
    "UnauthorizedOperation": "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/"
    "researcher is not authorized to perform: ec2:{action} with an explicit deny in a service control policy",
    "AuthFailure": "AWS was not able to validate the provided access credentials",
}


def protect(instances: list[Any]) -> Refusal | None:
    """Refuse to end a protected instance, and those of its zone with it; end those of other zones, as AWS does.

    https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_TerminateInstances.html
    """
    protected = [one for one in instances if one.disable_api_termination in (True, "true")]
    if not protected:
        return None
    spared = {one.availability_zone for one in protected}
    for one in instances:
        if one.availability_zone not in spared:
            one.terminate()
    return (
        "OperationNotPermitted",
        f"The instance '{protected[0].id}' may not be terminated. Modify its 'disableApiTermination' instance "
        "attribute and try again.",
    )
