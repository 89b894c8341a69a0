"""createNodes where AWS is as slow, forgetful and dear as it is documented to be."""

from __future__ import annotations

import signal

from tests.support import LocalCloud, killed


def test_addresses_that_come_late(cloud: LocalCloud, group: str) -> None:
    with cloud.options(address_lag=6, list_lag=(0, 3)):
        made = cloud.cluster("createNodes", "c1.xlarge", "8", group)
    assert made.code == 0, made.err
    assert made.err.splitlines()[-1] == f"8 nodes ready. Next: ./cluster.py install {group}"
    shown = cloud.nodes(group)
    assert all(node["public_ip"] == node["address"] != node["private_ip"] for node in shown)


def test_a_new_security_group_and_key_that_are_not_known_yet(cloud: LocalCloud, group: str) -> None:
    settings = {"KEYPAIR_NAME": group, "SSH_PRIVATE_KEY_FILE": str(cloud.where.root / f"{group}.pem")}
    with cloud.options(created_lag=4):
        made = cloud.cluster("createNodes", "c1.xlarge", "1", group, settings=settings)
    assert made.code == 0, made.err
    assert "trying again" not in made.err


def test_a_security_group_that_never_becomes_known(cloud: LocalCloud, group: str) -> None:
    with cloud.options(created_lag=1000):
        made = cloud.cluster("createNodes", "c1.xlarge", "1", group, limits={"NEW_LIMIT": 1})
    assert made.code == 1
    assert "InvalidGroup.NotFound" in made.last_line
    assert cloud.truth(group)[0] == []


def test_killed_right_after_the_launch(cloud: LocalCloud, group: str) -> None:
    with cloud.options(list_lag=6):
        rule = {"kind": "kill-after", "action": "RunInstances"}
        assert killed(cloud, rule, "createNodes", "c1.xlarge", "3", group).code == -signal.SIGKILL
        assert len(cloud.truth(group)[0]) == 3
        ended = cloud.cluster("terminateAll", group)
    assert ended.code == 0, ended.err
    assert ended.out.count(": terminated") == 3
    assert cloud.truth(group) == ([], 0)


def test_spot_in_the_one_zone_that_is_cheap_enough(cloud: LocalCloud, group: str) -> None:
    with cloud.options(pace="none", spot_prices={"us-east-1c": 0.031}):
        made = cloud.cluster("addSpotNodes", "c1.xlarge", "2", "0.04", group)
    assert made.code == 0, made.err
    assert "2 × c1.xlarge: $0.0620 an hour" in made.err
    assert [(node["zone"], node["price"]) for node in cloud.nodes(group)] == [("us-east-1c", 0.031)] * 2
    assert "traffic between zones" not in made.err


def test_spot_goes_on_to_the_next_zone_and_each_node_has_the_price_of_its_own(cloud: LocalCloud, group: str) -> None:
    dear = {"spot_prices": {"us-east-1b": 0.02, "us-east-1d": 0.03}, "capacity": {"us-east-1b": 1}}
    with cloud.options(pace="none", **dear):
        made = cloud.cluster("createNodes", "c1.xlarge", "2", group, "--spot")
    assert made.code == 0, made.err
    assert sorted((node["zone"], node["price"]) for node in cloud.nodes(group)) == [
        ("us-east-1b", 0.02),
        ("us-east-1d", 0.03),
    ]


def test_a_zone_whose_price_has_risen_since_the_look_up(cloud: LocalCloud, group: str) -> None:
    rule = {"kind": "code:SpotMaxPriceTooLow", "action": "RunInstances", "nth": 1}
    with cloud.options(pace="none"), cloud.faults(rule):
        made = cloud.cluster("addSpotNodes", "c1.xlarge", "1", "0.2", group)
    assert made.code == 0, made.err
    assert "us-east-1a asks more than your maximum (SpotMaxPriceTooLow); trying the next zone" in made.err
    assert [node["zone"] for node in cloud.nodes(group)] == ["us-east-1b"]


def test_the_role_that_spot_nodes_need(cloud: LocalCloud, group: str) -> None:
    rule = {"kind": "code:AuthFailure.ServiceLinkedRoleCreationNotPermitted", "action": "RunInstances"}
    with cloud.options(pace="none"), cloud.faults(rule):
        made = cloud.cluster("createNodes", "c1.xlarge", "1", group, "--spot")
    assert made.code == 1
    assert "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com" in made.last_line


def test_a_request_is_sent_again_until_its_answer_is_known(cloud: LocalCloud, group: str) -> None:
    rule = {"kind": "lost", "action": "RunInstances", "times": 6}  # botocore gives up after five
    with cloud.options(pace="none"), cloud.faults(rule):
        made = cloud.cluster("createNodes", "c1.xlarge", "2", group)
    assert made.code == 0, made.err
    assert "trying again, the same request" in made.err
    assert len(cloud.truth(group)[0]) == 2
