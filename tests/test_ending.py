"""terminateAll and terminate: all that is the user's ends, nothing else does, and what remains is named."""

from __future__ import annotations

import functools
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

import cluster
from tests.support import LocalCloud, make_node, serve, wait_until


def create(cloud: LocalCloud, group: str, count: int = 1, settings: dict[str, Any] | None = None) -> list[str]:
    """Create COUNT nodes without AWS's delays; return their ids."""
    with cloud.options(pace="none"):
        made = cloud.cluster("createNodes", "c1.xlarge", str(count), group, settings=settings)
    assert made.code == 0, made.err
    return cloud.truth(group)[0]


def end_quickly(cloud: LocalCloud, *words: str, **options: Any) -> Any:
    """Run a command that ends nodes, without AWS's delays."""
    with cloud.options(pace="none"):
        return cloud.cluster(*words, **options)


def test_nodes_that_end_later_than_a_security_group_is_waited_for(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 2)
    with cloud.options(ending_lag=9, holding_lag=2):
        ended = cloud.cluster("terminateAll", group, limits={"HOLD_LIMIT": 8})
    assert ended.code == 0, ended.err
    assert ended.out.count(": terminated") == 2
    assert cloud.truth(group) == ([], 0)


def test_nodes_that_never_end_are_named(cloud: LocalCloud, group: str) -> None:
    (node,) = create(cloud, group)
    with cloud.options(ending_lag=60):
        assert cloud.cluster("terminate", node).code == 0
        ended = cloud.cluster("terminateAll", group, limits={"TERMINATE_LIMIT": 1, "HOLD_LIMIT": 1, "UNSEEN_LIMIT": 1})
    assert ended.code == 1
    assert f"EC2 does not say terminated of {node} yet" in ended.last_line
    assert "Left alone" not in ended.err


def test_a_security_group_that_is_never_let_go(cloud: LocalCloud, group: str) -> None:
    create(cloud, group)
    with cloud.options(ending_lag=0, holding_lag=30):
        ended = cloud.cluster("terminateAll", group, limits={"HOLD_LIMIT": 1})
    assert ended.code == 1
    assert "is still in use by something that EC2 does not list" in ended.last_line
    assert f"run ./cluster.py terminateAll {group} again" in ended.last_line


def test_one_unknown_id_spares_no_other_node(cloud: LocalCloud, group: str) -> None:
    first, *others = create(cloud, group, 3)
    with ThreadPoolExecutor(1) as pool:
        with cloud.options(forgotten=[first]):
            run = pool.submit(functools.partial(cloud.cluster, "terminateAll", group))
            states = functools.partial(cloud.ask, "truth", group)
            wait_until(lambda: {states()["instances"][name] for name in others} == {"terminated"})
            assert states()["instances"][first] == "running"
            assert not run.done()
        ended = run.result()
    assert ended.code == 0, ended.err
    assert ended.out.count(": terminated") == 3
    assert cloud.truth(group) == ([], 0)


def test_a_node_that_is_not_known_yet_is_not_said_to_end(cloud: LocalCloud, group: str) -> None:
    (node,) = create(cloud, group)
    with cloud.options(forgotten=[node]):
        refused = end_quickly(cloud, "terminate", node, limits={"NEW_LIMIT": 1})
    assert (refused.code, refused.out) == (1, "")
    assert f"EC2 does not know {node}, so they may run on" in refused.last_line


@pytest.mark.parametrize(
    ("action", "nth"), [("DescribeInstances", 3), ("DescribeSecurityGroups", 2), ("DeleteSecurityGroup", 1)]
)
def test_a_poll_that_fails_breaks_no_end_off(cloud: LocalCloud, group: str, action: str, nth: int) -> None:
    create(cloud, group)
    with cloud.faults({"kind": "code:RequestExpired", "action": action, "nth": nth}):
        ended = end_quickly(cloud, "terminateAll", group)
    assert ended.code == 0, ended.err
    assert cloud.truth(group) == ([], 0)


def test_ends_that_are_refused(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 2)
    with cloud.faults({"kind": "code:RequestExpired", "action": "TerminateInstances"}):
        ended = end_quickly(cloud, "terminateAll", group)
    assert ended.code == 1
    assert f"Some nodes may still run; run ./cluster.py terminateAll {group} again" in ended.last_line
    busy = {"kind": "code:RequestLimitExceeded", "action": "TerminateInstances", "times": 6}  # 5 tries of botocore's
    with cloud.faults(busy):
        ended = end_quickly(cloud, "terminateAll", group)
    assert ended.code == 0, ended.err
    assert "TerminateInstances: RequestLimitExceeded; trying again" in ended.err
    assert cloud.truth(group) == ([], 0)


def test_a_protected_node(cloud: LocalCloud, group: str) -> None:
    protected, _ = create(cloud, group, 2)
    change = cloud.client("ec2").modify_instance_attribute
    change(InstanceId=protected, DisableApiTermination={"Value": True})
    ended = end_quickly(cloud, "terminateAll", group, limits={"UNSEEN_LIMIT": 1})
    assert ended.code == 1
    assert f"protected from termination, so they run on and cost money: {protected}." in ended.last_line
    assert "modify-instance-attribute --region us-east-1 --no-disable-api-termination" in ended.last_line
    assert cloud.truth(group) == ([protected], 1)
    assert f"they run on and cost money: {protected}." in cloud.cluster("terminate", protected).last_line
    change(InstanceId=protected, DisableApiTermination={"Value": False})
    assert end_quickly(cloud, "terminateAll", group).code == 0
    assert cloud.truth(group) == ([], 0)


def test_trouble_with_spot_requests_keeps_no_node_alive(cloud: LocalCloud, group: str) -> None:
    with cloud.options(pace="none"):
        assert cloud.cluster("createNodes", "c1.xlarge", "1", group, "--spot").code == 0
        rules = [{"kind": "denied", "action": f"{verb}SpotInstanceRequests"} for verb in ("Describe", "Cancel")]
        with cloud.faults(*rules):
            ended = cloud.cluster("terminateAll", group)
    assert ended.code == 0, ended.err
    assert "Warning: their spot requests are not cancelled: " in ended.err
    assert cloud.truth(group) == ([], 0)


def test_only_nodes_in_the_groups_own_security_group_are_ended(cloud: LocalCloud, group: str) -> None:
    (node,) = create(cloud, group)
    ec2 = cloud.client("ec2")
    raw = ec2.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"][0]
    data = ec2.describe_instance_attribute(InstanceId=node, Attribute="userData")["UserData"]["Value"]
    same = {name: raw[name] for name in ("ImageId", "InstanceType", "KeyName", "SubnetId")}
    with cloud.options(pace="none"):
        (planted,) = ec2.run_instances(**same, UserData=decode(data), MinCount=1, MaxCount=1)["Instances"]
        name = planted["InstanceId"]
        ec2.create_tags(Resources=[name], Tags=[tag for tag in raw["Tags"] if not tag["Key"].startswith("aws:")])
        alone = cloud.cluster("terminate", name)
        ended = cloud.cluster("terminateAll", group)
    assert alone.code == 1, alone.err
    assert f"{name} is not in security group mitsuba-{group}" in alone.last_line
    assert ended.code == 0, ended.err
    assert ended.out.count(": terminated") == 1
    assert f"Left alone: {name} has the tag of group '{group}', but is not in security group" in ended.err
    assert cloud.truth(group) == ([name], 0)


def decode(text: str) -> str:
    """Return user data as RunInstances takes it."""
    import base64

    return base64.b64decode(text).decode()


def test_somebody_elses_group(cloud: LocalCloud, group: str) -> None:
    cluster.ensure_key_file(cloud.where.root / "key.pem")  # mine
    theirs = {"KEYPAIR_NAME": group, "SSH_PRIVATE_KEY_FILE": str(cloud.where.root / f"{group}.pem")}
    (node,) = create(cloud, group, 1, theirs)
    for words in (("createNodes", "c1.xlarge", "1"), ("start",), ("terminateAll",)):
        refused = cloud.cluster(*words, group)
        assert refused.code == 1, refused.err
        assert f"group '{group}' (us-east-1) is somebody else's" in refused.last_line
        assert f"key pair {group}, by " in refused.last_line
        assert "--others" in refused.last_line
    assert "is somebody else's" in cloud.cluster("terminate", node).last_line
    assert f", key pair {group}, by " in cloud.cluster("status", group).out.splitlines()[0]
    assert cloud.truth(group)[0] == [node]
    with cloud.options(pace="none"):
        assert cloud.cluster("createNodes", "c1.xlarge", "1", group, "--others").code == 0
        mine = cloud.cluster("terminateAll", group, limits={"UNSEEN_LIMIT": 1})
        assert mine.code == 0, mine.err
        assert f"Left alone: {node} has the tag of group '{group}', but was launched with another key" in mine.err
        assert cloud.truth(group) == ([node], 1)
        assert cloud.cluster("terminateAll", group, "--others").code == 0
    assert cloud.truth(group) == ([], 0)


@pytest.mark.parametrize("text", [None, "garbage\n"])
def test_without_a_key_nodes_are_named_and_can_be_ended(
    cloud: LocalCloud, group: str, tmp_path: Path, text: str | None
) -> None:
    nodes = create(cloud, group)
    path = tmp_path / "key.pem"
    if text:
        path.write_text(text)
    spoilt = {"SSH_PRIVATE_KEY_FILE": str(path)}
    why = f"{path} is no SSH private key" if text else f"there is no SSH key {path}"
    swept = end_quickly(cloud, "terminateAll", "--all-groups", settings=spoilt)
    assert swept.code == 1
    assert f"Group {group} runs on: 1 node" in swept.err
    assert swept.last_line.startswith(f"Error: {why}")
    assert "./cluster.py terminateAll GROUP --others" in swept.last_line
    for words in (("terminateAll", group), ("start", group)):
        refused = end_quickly(cloud, *words, settings=spoilt)
        assert refused.last_line.startswith(f"Error: {why}")
        assert "all the same with --others" in refused.last_line
        assert "Some nodes may still run" not in refused.last_line
    assert cloud.truth(group)[0] == nodes
    assert end_quickly(cloud, "terminateAll", group, "--others", settings=spoilt).code == 0
    assert cloud.truth(group) == ([], 0)


def test_a_locked_key_takes_nothing_of_others(cloud: LocalCloud, group: str, tmp_path: Path) -> None:
    (node,) = create(cloud, group)  # under KEYPAIR_NAME, which is not the locked key's
    path = tmp_path / "locked.pem"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(path)], check=True)
    ec2 = cloud.client("ec2")
    tags = [{"ResourceType": "security-group", "Tags": [{"Key": "mitsuba-group", "Value": f"{group}-empty"}]}]
    about = {"GroupName": f"mitsuba-{group}-empty", "Description": "-", "TagSpecifications": tags}
    with cloud.options(pace="none"):
        empty = ec2.create_security_group(**about)["GroupId"]
        source = [{"CidrIp": "192.0.2.1/32", "Description": "mitsuba-cluster SHA256:theirs them@there"}]
        rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": source}
        ec2.authorize_security_group_ingress(GroupId=empty, IpPermissions=[rule])
    locked = {"SSH_PRIVATE_KEY_FILE": str(path)}
    swept = end_quickly(cloud, "terminateAll", "--all-groups", settings=locked)
    assert "Nothing to terminate: you have no group in us-east-1; ./cluster.py status --all-regions" in swept.last_line
    assert "is encrypted" in end_quickly(cloud, "terminateAll", group, settings=locked).last_line
    assert cloud.truth(group)[0] == [node]
    assert cloud.truth(f"{group}-empty")[1] == 1
    cloud.end(f"{group}-empty")


def test_a_strangers_security_group_with_our_tag_stays(cloud: LocalCloud, group: str) -> None:
    ec2 = cloud.client("ec2")
    with cloud.options(pace="none"):
        made = ec2.create_security_group(GroupName=f"theirs-{group}", Description="-")["GroupId"]
        ec2.create_tags(Resources=[made], Tags=[{"Key": "mitsuba-group", "Value": group}])
        ended = cloud.cluster("terminateAll", group, limits={"UNSEEN_LIMIT": 0})
    assert "does not exist" in ended.last_line
    assert cloud.truth(group) == ([], 1)
    cloud.end(group)


def test_a_spoilt_signature_keeps_no_node_alive(cloud: LocalCloud, group: str) -> None:
    (node,) = create(cloud, group)
    cloud.client("ec2").create_tags(Resources=[node], Tags=[{"Key": "mitsuba-signature-1", "Value": "AAAA"}])
    ended = end_quickly(cloud, "terminateAll", group)
    assert ended.code == 0, ended.err
    assert cloud.truth(group) == ([], 0)


def test_other_groups_are_named_and_a_mistyped_one_fails(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 2)
    mistyped = end_quickly(cloud, "terminateAll", f"{group}-x", limits={"UNSEEN_LIMIT": 0})
    assert mistyped.code == 1
    assert f"Error: Nothing to terminate: group '{group}-x' does not exist in us-east-1; " in mistyped.last_line
    assert f"Group {group} runs on: 2 nodes, $1.05/h, $" in mistyped.err


def test_all_groups_in_all_regions_past_those_that_refuse(cloud: LocalCloud, group: str) -> None:
    key = {"KEYPAIR_NAME": group, "SSH_PRIVATE_KEY_FILE": str(cloud.where.root / f"{group}.pem")}
    first, second = f"{group}-1", f"{group}-2"
    create(cloud, first, 1, key)
    create(cloud, second, 1, key | {"AWS_REGION": "us-west-2"})
    codes = {"eu-west-1": "UnauthorizedOperation", "ap-south-1": "AuthFailure", "sa-east-1": "UnauthorizedOperation"}
    with cloud.options(refusing_regions=codes):
        shown = cloud.cluster("status", "--all-regions", "--json", settings=key)
        ended = end_quickly(cloud, "terminateAll", "--all-groups", "--all-regions", settings=key)
    for done in (shown, ended):
        assert done.code == 1
        assert all(f"{region}: " in done.last_line for region in codes)
        assert "eu-central-1" not in done.out + done.err
    regions = json.loads(shown.out)["regions"]
    assert next(iter(regions)) == "us-east-1"
    assert first in regions["us-east-1"]
    assert second in regions["us-west-2"]
    assert "explicit deny in a service control policy" in ended.last_line
    assert ended.out.count(": terminated") == 2
    assert f"nothing of group '{second}' is left in us-west-2" in ended.err
    assert cloud.truth(first) == cloud.truth(second) == ([], 0)


def test_every_group_is_asked_to_end_before_one_is_waited_for(cloud: LocalCloud, group: str) -> None:
    key = {"KEYPAIR_NAME": group, "SSH_PRIVATE_KEY_FILE": str(cloud.where.root / f"{group}.pem")}
    first, second = f"{group}-1", f"{group}-2"
    create(cloud, first, 1, key)
    create(cloud, second, 1, key)
    with cloud.options(ending_lag=60):
        limits = {"TERMINATE_LIMIT": 0, "POLL": 0.1}
        ended = cloud.cluster("terminateAll", "--all-groups", settings=key, limits=limits)
        states = [*cloud.ask("truth", first)["instances"].values(), *cloud.ask("truth", second)["instances"].values()]
    assert (ended.code, states) == (1, ["shutting-down"] * 2), ended.err
    cloud.end(first)
    cloud.end(second)


def test_all_groups_spares_those_of_others(cloud: LocalCloud, group: str) -> None:
    key = {"KEYPAIR_NAME": group, "SSH_PRIVATE_KEY_FILE": str(cloud.where.root / f"{group}.pem")}
    others = create(cloud, group)
    create(cloud, f"{group}-mine", 1, key)
    ended = end_quickly(cloud, "terminateAll", "--all-groups", settings=key)
    assert ended.code == 0, ended.err
    assert cloud.truth(f"{group}-mine") == ([], 0)
    assert cloud.truth(group)[0] == others
    usage = cloud.cluster("terminateAll", group, "--all-groups")
    assert usage.code == 2
    assert cloud.truth(group)[0] == others


def test_foreign_instances_are_never_touched(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    ec2 = cloud.client("ec2")
    key = ec2.describe_key_pairs()["KeyPairs"][0]["KeyName"]
    (own,) = cloud.nodes(group)
    data = ec2.describe_instance_attribute(InstanceId=own["id"], Attribute="userData")["UserData"]["Value"]
    image = ec2.describe_images(Owners=["099720109477"])["Images"][0]["ImageId"]
    foreign = ec2.run_instances(
        ImageId=image, InstanceType="t3.micro", MinCount=1, MaxCount=1, KeyName=key, UserData=decode(data)
    )["Instances"][0]["InstanceId"]
    refused = cloud.cluster("terminate", foreign)
    assert refused.code == 1, refused.err
    assert f"no node '{foreign}' of this tool" in refused.err
    assert cloud.cluster("terminateAll", group).code == 0
    state = ec2.describe_instances(InstanceIds=[foreign])["Reservations"][0]["Instances"][0]["State"]["Name"]
    ec2.terminate_instances(InstanceIds=[foreign])
    assert state == "running"


def test_terminate_one_node(cloud: LocalCloud, group: str) -> None:
    serve(cloud, group)
    worker = next(node for node in cloud.nodes(group) if node["role"] == "worker")
    done = cloud.cluster("terminate", worker["address"])
    assert done.code == 0
    assert "It was a worker" in done.err
    wait_until(lambda: [n["id"] for n in cloud.nodes(group) if n["state"] == "running"] != [worker["id"]])
    assert cloud.cluster("status", group, "--servers").code == 0


def test_a_request_ends_a_thousand_nodes_at_most() -> None:
    asked: list[int] = []

    class Ec2:
        """Ends all that it is asked to."""

        def terminate_instances(self, InstanceIds: list[str]) -> None:
            """Note how many."""
            asked.append(len(InstanceIds))

    nodes = [make_node(f"i-{number}") for number in range(2001)]
    assert cluster.terminate_nodes(Ec2(), nodes) == ([], [])
    assert sorted(asked) == [1, 1000, 1000]


@pytest.mark.parametrize(("names", "most"), [(True, 2), (False, 60)])
def test_unknown_ids_that_the_refusal_names_are_left_out_at_once(names: bool, most: int) -> None:
    unknown, calls = {f"i-{number}" for number in range(300, 600 if names else 302)}, list[int]()

    class Ec2:
        """Refuses a request with unknown ids, as EC2 does; by their names or without."""

        def terminate_instances(self, InstanceIds: list[str]) -> None:
            """Count the calls."""
            calls.append(len(InstanceIds))
            if found := sorted(unknown.intersection(InstanceIds)):
                text = f"The instance IDs '{', '.join(found)}' do not exist" if names else "Some do not exist"
                error = {"Code": "InvalidInstanceID.NotFound", "Message": text}
                raise ClientError({"Error": error}, "TerminateInstances")

    protected, left = cluster.terminate_nodes(Ec2(), [make_node(f"i-{number}") for number in range(1000)])
    assert (protected, {node.id for node in left}) == ([], unknown)
    assert len(calls) <= most
