"""The commands on process nodes: arguments in; stdout, stderr, exit code and EC2's state out."""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.localcloud.places import PROJECT
from tests.support import LocalCloud, interrupt, wait_until

COMMANDS = (
    "createNodes install start status syncData terminateAll addSpotNodes tunnel up render systemLoad terminate "
    "spotPrices cancelSpot cancelAllSpot login runCommand logs regions completion extend policy"
).split()


def create(cloud: LocalCloud, group: str, count: int = 2) -> None:
    """Create COUNT nodes and see it succeed."""
    made = cloud.cluster("createNodes", "c1.xlarge", str(count), group)
    assert made.code == 0, made.err


def serve(cloud: LocalCloud, group: str, count: int = 2) -> None:
    """Create COUNT nodes with running servers."""
    create(cloud, group, count)
    for command in ("install", "start"):
        done = cloud.cluster(command, group)
        assert done.code == 0, done.err


def test_overview_lists_the_commands_in_the_users_order(cloud: LocalCloud) -> None:
    plain, asked = cloud.cluster(), cloud.cluster("--help")
    assert plain.code == asked.code == 0
    assert plain.out == asked.out
    assert re.findall(r"^  (\w+)  ", plain.out.split("Commands:")[1], re.M) == COMMANDS


@pytest.mark.parametrize("words", [[], ["--help"], ["createNodes", "--help"]])
def test_help_imports_neither_boto3_nor_paramiko(words: list[str]) -> None:
    run = [sys.executable, "-X", "importtime", "cluster.py", *words]
    done = subprocess.run(run, cwd=PROJECT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"boto3", "botocore", "paramiko"}


def test_session(cloud: LocalCloud, group: str, tmp_path: Path) -> None:
    created = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert created.code == 0, created.err
    assert "3 × c1.xlarge: $1.56 an hour, and $0.0150 for public addresses" in created.err
    assert created.out.count("c1.xlarge") == 3
    assert created.err.splitlines()[-1] == f"3 nodes ready. Next: ./cluster.py install {group}"

    installed = cloud.cluster("install", group)
    assert (installed.code, installed.out.count(": Mitsuba 0.6.0\n")) == (0, 3)
    ids = {node["id"] for node in cloud.nodes(group)}
    logs = cloud.where.root / "state" / "mitsuba-cluster" / group
    assert {path.name for path in logs.iterdir()} == {f"{name}.install.log" for name in ids}
    assert all("version 0.6.0" in path.read_text() for path in logs.iterdir())

    started = cloud.cluster("start", group)
    assert started.code == 0, started.err
    shown = cloud.nodes(group)
    head = next(node for node in shown if node["role"] == "head")
    assert started.out.splitlines()[-1] == f"Head node: {head['name']}"
    assert "10 cores in all" in started.out  # 4 + 4 of the workers, 4 - 2 of the head
    assert sorted(node["role"] for node in shown) == ["head", "worker", "worker"]

    data = tmp_path / "smoke.vol"
    data.write_bytes(b"smoke" * 100_000)
    synced = cloud.cluster("syncData", str(data), group)
    assert synced.code == 0, synced.err
    for name in ids:
        assert (cloud.where.nodes / name / "mnt" / "smoke.vol").read_bytes() == data.read_bytes()

    ended = cloud.cluster("terminateAll", group)
    assert (ended.code, ended.out.count(": terminated\n")) == (0, 3)
    assert cloud.status(group) == {}


def test_status_json(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    shown = json.loads(cloud.cluster("status", "--json").out)
    assert shown["region"] == "us-east-1"
    assert shown["groups"][group]["spot_requests"] == []
    (node,) = shown["groups"][group]["nodes"]
    assert node["state"] == "running"
    assert node["address"] == node["name"] == node["public_ip"] != node["private_ip"]
    assert (node["type"], node["market"], node["role"]) == ("c1.xlarge", "on-demand", None)
    assert node["price"] == pytest.approx(0.52)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", node["launched"])


def test_creating_again_adds_and_keeps_the_head(cloud: LocalCloud, group: str) -> None:
    serve(cloud, group)
    head = next(node["id"] for node in cloud.nodes(group) if node["role"] == "head")
    more = cloud.cluster("createNodes", "c1.xlarge", "1", group)
    assert f"group '{group}' (us-east-1) has 2 nodes already; adding 1 more" in more.err
    assert cloud.cluster("install", group).code == 0
    started = cloud.cluster("start", group)
    assert "restarted: a render that was running is lost" in started.out
    assert started.out.count("serves already") == 1
    assert [node["id"] for node in cloud.nodes(group) if node["role"] == "head"] == [head]
    again = cloud.cluster("start", group)
    assert (again.code, again.out.count("serves already")) == (0, 3)


def test_calls_do_not_grow_with_the_number_of_nodes(cloud: LocalCloud, group: str) -> None:
    counts = []
    for size in (3, 9):
        create(cloud, group, size)
        commands = ("status", "install", "start", "terminateAll")
        *steps, ended = (cloud.calls(functools.partial(cloud.cluster, one, group)) for one in commands)
        counts.append([*steps, {name: count for name, count in ended.items() if name not in POLLS}])
    assert counts[0] == counts[1]
    assert counts[0][0] == {"DescribeInstances": 1, "DescribeSpotInstanceRequests": 1, "DescribeSecurityGroups": 1}


POLLS = ("DescribeInstances", "DescribeSecurityGroups", "DeleteSecurityGroup", "TerminateInstances")


def test_foreign_instances_are_never_touched(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    ec2 = cloud.client("ec2")
    key = ec2.describe_key_pairs()["KeyPairs"][0]["KeyName"]
    data = ec2.describe_instance_attribute(InstanceId=cloud.nodes(group)[0]["id"], Attribute="userData")
    image = ec2.describe_images(Owners=["099720109477"])["Images"][0]["ImageId"]
    foreign = ec2.run_instances(
        ImageId=image, InstanceType="t3.micro", MinCount=1, MaxCount=1, KeyName=key, UserData=decode(data)
    )["Instances"][0]["InstanceId"]
    refused = cloud.cluster("terminate", foreign)
    assert (refused.code, f"no node '{foreign}' of this tool" in refused.err) == (1, True)
    assert cloud.cluster("terminateAll", group).code == 0
    state = ec2.describe_instances(InstanceIds=[foreign])["Reservations"][0]["Instances"][0]["State"]["Name"]
    ec2.terminate_instances(InstanceIds=[foreign])
    assert state == "running"


def decode(attribute: dict[str, dict[str, str]]) -> str:
    """Return the user data of a DescribeInstanceAttribute answer."""
    import base64

    return base64.b64decode(attribute["UserData"]["Value"]).decode()


def test_run_command_keeps_the_shells_meaning(cloud: LocalCloud, group: str) -> None:
    create(cloud, group)
    done = cloud.cluster("runCommand", """echo "it's $((6*7))"; printf '%s|' a 'b c' | tr '|' ';'""", group)
    assert done.code == 0
    assert sorted(line.split(": ")[1] for line in done.out.splitlines()) == ["a;b c;"] * 2 + ["it's 42"] * 2
    failed = cloud.cluster("runCommand", "exit 3", group, "--json")
    assert failed.code == 1
    assert [one["code"] for one in json.loads(failed.out).values()] == [3, 3]


def test_run_command_with_huge_output(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    done = cloud.run(
        "sh", "-c", f"{sys.executable} cluster.py runCommand 'head -c 100000000 /dev/zero' {group} | wc -c"
    )
    assert int(done.out) > 100_000_000


def test_spot_nodes(cloud: LocalCloud, group: str) -> None:
    refused = cloud.cluster("addSpotNodes", "c1.xlarge", "1", "0.01", group)
    assert refused.code == 1
    assert "the spot price of c1.xlarge is $0.0871 an hour now, above your maximum of $0.0100" in refused.err
    dry = cloud.cluster("addSpotNodes", "c1.xlarge", "2", "0.2", group, "--dry-run", "--without-mitsuba")
    assert (dry.code, "2 × c1.xlarge" in dry.out) == (0, True), dry.out + dry.err
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


def test_spot_prices(cloud: LocalCloud) -> None:
    shown = cloud.cluster("spotPrices", "c1.xlarge")
    assert shown.out.splitlines()[0].split() == ["ZONE", "LOWEST", "MEAN", "NOW"]
    assert "us-east-1a" in shown.out
    assert "us-east-1a" in json.loads(cloud.cluster("spotPrices", "c1.xlarge", "--json").out)


def test_no_capacity_moves_to_the_next_zone(cloud: LocalCloud, group: str) -> None:
    with cloud.options(capacity={"us-east-1a": 0, "us-east-1b": 1}):
        made = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert made.code == 0, made.err
    assert "no capacity for c1.xlarge in us-east-1a (InsufficientInstanceCapacity)" in made.err
    assert sorted(node["zone"] for node in cloud.nodes(group)) == ["us-east-1b", "us-east-1c", "us-east-1c"]


def test_fewer_nodes_than_asked(cloud: LocalCloud, group: str) -> None:
    zones = {f"us-east-1{letter}": 0 for letter in "abcdef"}
    with cloud.options(capacity=zones | {"us-east-1b": 2}):
        made = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert made.code == 1
    assert "2 of 3 nodes ready" in made.last_line
    assert len(cloud.nodes(group)) == 2


def test_quota(cloud: LocalCloud, group: str) -> None:
    with cloud.options(vcpu_limit=1):
        made = cloud.cluster("createNodes", "c1.xlarge", "3", group)
    assert made.code == 1
    assert "quota is used up" in made.last_line
    assert "servicequotas" in made.last_line


def test_a_lost_answer_launches_once(cloud: LocalCloud, group: str) -> None:
    with cloud.faults({"kind": "lost", "action": "RunInstances", "nth": 1}):
        made = cloud.cluster("createNodes", "c1.xlarge", "2", group)
    assert made.code == 0, made.err
    assert len(cloud.truth(group)[0]) == 2


def test_instances_that_lists_show_late(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    with cloud.options(list_lag=8.0):
        child = cloud.start(sys.executable, "cluster.py", "createNodes", "c1.xlarge", "2", group)
        wait_until(lambda: len([s for s in cloud.ask("status").values() if s["state"] == "running"]) >= 3)
        child.kill()
        child.communicate()
        ended = cloud.cluster("terminateAll", group)
    assert ended.code == 0, ended.err
    assert ended.out.count(": terminated") == 3
    assert cloud.status(group) == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_create(cloud: LocalCloud, group: str, number: int, code: int) -> None:
    with cloud.options(list_lag=30.0):
        child = cloud.start(sys.executable, "cluster.py", "createNodes", "c1.xlarge", "1", group)
        assert child.stderr
        while "waiting until each answers" not in (line := child.stderr.readline()):
            assert line
        done = interrupt(child, number)
    assert done.code == code
    assert len(done.err.strip().splitlines()) == 1
    assert f"Interrupted. Nodes of group '{group}' (us-east-1) may be running and cost money" in done.err
    assert f"./cluster.py terminateAll {group} ends them" in done.err


def test_terminate_one_node(cloud: LocalCloud, group: str) -> None:
    serve(cloud, group)
    worker = next(node for node in cloud.nodes(group) if node["role"] == "worker")
    done = cloud.cluster("terminate", worker["address"])
    assert done.code == 0
    assert "It was a worker" in done.err
    wait_until(lambda: [n["id"] for n in cloud.nodes(group) if n["state"] == "running"] != [worker["id"]])
    assert cloud.cluster("status", group, "--servers").code == 0


def test_regions_and_system_load(cloud: LocalCloud, group: str) -> None:
    assert "* us-east-1\n" in cloud.cluster("regions").out
    create(cloud, group)
    shown = cloud.cluster("systemLoad", group)
    assert shown.out.splitlines()[0].split() == ["NODE", "NAME", "LOAD", "1", "5", "15", "CORES", "MEMORY"]
    assert shown.out.count("  0.42 ") == 2


def test_closed_port_means_tunnel(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    closed = {"PUBLIC_SERVER_PORT": False}
    for command in ("install", "start"):
        done = cloud.cluster(command, group, settings=closed)
        assert done.code == 0, done.err
    assert f"Port 7554 is closed. Run ./cluster.py tunnel {group}" in done.out
    found = cloud.client("ec2").describe_security_groups(Filters=[{"Name": "tag:mitsuba-group", "Values": [group]}])
    ports = {rule.get("FromPort") for rule in found["SecurityGroups"][0]["IpPermissions"] if rule["IpRanges"]}
    assert 7554 not in ports


def test_time_limit_is_tagged_and_moved(cloud: LocalCloud, group: str) -> None:
    made = cloud.cluster("createNodes", "c1.xlarge", "1", group, "--max-hours", "2.5")
    assert "Each ends itself after 2.5 hours, or 60 minutes without use." in made.err
    assert cloud.nodes(group)[0]["max_hours"] == 2.5
    assert "idle limit 60 min" in cloud.cluster("status", group).out
    said = cloud.cluster("extend", "1", group, env={"TZ": "EST5"})
    assert (said.code, "ends at 2027-01-15 03:00:00 (08:00:00 UTC), may be idle for 60 minutes" in said.out) == (
        0,
        True,
    )
    assert cloud.nodes(group)[0]["max_hours"] == 3.5


def test_login_and_a_wrong_host_key(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    node = cloud.nodes(group)[0]
    env = cloud.environment()
    good = cloud.start(sys.executable, "cluster.py", "login", node["id"], stdin=subprocess.PIPE, env=env)
    out, err = good.communicate("echo hello from $NODE\n", timeout=60)
    assert f"hello from {node['address']}" in out, err
    line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHVWX"
    cloud.client("ec2").create_tags(Resources=[node["id"]], Tags=cloud.signed(group, line))
    refused = cloud.cluster("runCommand", "true", group)
    assert refused.code == 1
    assert "shows another host key than the one it was launched with" in refused.err
    ssh = cloud.run(sys.executable, "cluster.py", "login", node["id"], stdin=subprocess.DEVNULL)
    assert ssh.code == 255
    assert "Host key verification failed" in ssh.err


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
