"""What a careless change would break unseen: each test here fails on one deliberate fault in cluster.py."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster

SETTINGS = cluster.Settings()


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
    return cluster.Plan(request, kind, image, subnets, "192.0.2.1/32", 0, None, {}, "", 0, 0, None)


def test_a_launch_goes_out_in_requests_of_a_hundred_with_tokens_of_their_own() -> None:
    ec2 = Ec2()
    app: Any = SimpleNamespace(ec2=ec2)
    nodes, why = cluster.launch_nodes(app, plan(250), {"NetworkInterfaces": [{}], "TagSpecifications": []}, "token")
    assert len(nodes) == 250, why
    assert [one["MaxCount"] for one in ec2.requests] == [100, 100, 50]
    assert len({one["ClientToken"] for one in ec2.requests}) == 3


def test_nodes_give_their_metadata_to_sessions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ensure_key", "check_rules", "repair_rules", "rule_owner"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    monkeypatch.setattr(cluster, "ensure_security_group", lambda *_: cluster.SecurityGroup("sg-1", "g", "n", "vpc-1"))
    monkeypatch.setattr(cluster, "sign_launch", lambda *_: {})
    app: Any = SimpleNamespace(ec2=Ec2(), settings=SETTINGS, identity=None)
    asked = cluster.prepare(app, plan(1))
    assert asked["MetadataOptions"]["HttpTokens"] == "required"
    assert asked["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert asked["InstanceInitiatedShutdownBehavior"] == "terminate"


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
    assert cluster.fetch_on_demand_price(SETTINGS, "c1.xlarge") == expected


def test_a_key_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        seen.append(f"{os.fstat(handle).st_size} bytes synced")
        sync(handle)

    def rename(*names: Path) -> None:
        seen.append("renamed")
        real_rename(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    cluster.write_secret(tmp_path / "key.pem", "secret")
    assert seen[:2] == ["6 bytes synced", "renamed"]
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_step_over_its_limit_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that goes on and on: its end must not be taken for the step's."""

    class Channel:
        def settimeout(self, _: float) -> None:
            pass

        def recv(self, _: int) -> bytes:
            return b"still at it\n"

    remote = cluster.Remote(None, None, "ubuntu")  # type: ignore[arg-type]
    assert remote.receive(Channel(), time.monotonic() + 60) == b"still at it\n"  # type: ignore[arg-type]
    with pytest.raises(cluster.NodeError, match="did not end within its time limit"):
        remote.receive(Channel(), time.monotonic() - 1)  # type: ignore[arg-type]
