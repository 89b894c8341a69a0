"""Spot nodes: prices and requests."""

from __future__ import annotations

import json

from tests.support import LocalCloud


def test_spot_nodes(cloud: LocalCloud, group: str) -> None:
    refused = cloud.cluster("addSpotNodes", "c1.xlarge", "1", "0.01", group)
    assert refused.code == 1
    assert "the spot price of c1.xlarge is $0.0871 an hour now, above your maximum of $0.0100" in refused.err
    dry = cloud.cluster("addSpotNodes", "c1.xlarge", "2", "0.2", group, "--dry-run", "--without-mitsuba")
    assert dry.code == 0, dry.out + dry.err
    assert "2 × c1.xlarge" in dry.out
    assert "at most $0.20 an hour" in dry.out
    assert cloud.status(group) == {}
    made = cloud.cluster("addSpotNodes", "c1.xlarge", "2", "0.2", group)
    assert made.code == 0, made.err
    shown = cloud.status(group)
    assert [node["market"] for node in shown["nodes"]] == ["spot", "spot"]
    requests = [request["id"] for request in shown["spot_requests"]]
    cancelled = cloud.cluster("cancelSpot", requests[0])
    assert cancelled.out == f"Cancelled {requests[0]}\n"
    assert "keep running and cost money" in cancelled.err
    assert f"spot request {requests[0]} is cancelled already" in cloud.cluster("cancelSpot", requests[0]).err
    assert len(cloud.nodes(group)) == 2
    ended = cloud.cluster("terminateAll", group)
    assert "1 spot request cancelled" in ended.err


def test_a_request_without_its_tag_is_cancelled(cloud: LocalCloud, group: str) -> None:
    with cloud.options(pace="none"):
        assert cloud.cluster("createNodes", "c1.xlarge", "2", group, "--spot").code == 0
        requests = [request["id"] for request in cloud.status(group)["spot_requests"]]
        cloud.client("ec2").delete_tags(Resources=requests, Tags=[{"Key": "mitsuba-group"}])
        assert cloud.cluster("cancelSpot", requests[0]).out == f"Cancelled {requests[0]}\n"
        ended = cloud.cluster("terminateAll", group)
    assert "2 spot requests cancelled" in ended.err  # without its tag, nothing says that one is


def test_spot_prices(cloud: LocalCloud) -> None:
    shown = cloud.cluster("spotPrices", "c1.xlarge")
    assert shown.out.splitlines()[0].split() == ["ZONE", "LOWEST", "MEAN", "NOW"]
    assert "us-east-1a" in shown.out
    assert "us-east-1a" in json.loads(cloud.cluster("spotPrices", "c1.xlarge", "--json").out)
