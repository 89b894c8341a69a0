"""runCommand and login."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support import LocalCloud, create


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


def test_a_pipe_that_closes_is_no_nodes_failure(cloud: LocalCloud, group: str) -> None:
    create(cloud, group)
    done = cloud.run("sh", "-c", f"{sys.executable} cluster.py runCommand 'seq 1000000' {group} | head -n 1")
    assert done.out.endswith(": 1\n"), done.out
    assert done.err == ""


def test_login_and_a_wrong_host_key(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    node = cloud.nodes(group)[0]
    env = cloud.environment()
    good = cloud.start(sys.executable, "cluster.py", "login", node["id"], stdin=subprocess.PIPE, env=env)
    out, err = good.communicate("echo hello from $NODE\n", timeout=60)
    assert f"hello from {node['address']}" in out, err
    line = node["host_key"][:-1] + ("A" if node["host_key"][-1] != "A" else "B")  # nearly the same one
    cloud.client("ec2").create_tags(Resources=[node["id"]], Tags=cloud.signed(group, line))
    refused = cloud.cluster("runCommand", "true", group)
    assert refused.code == 1
    assert "shows another host key than the one it was launched with" in refused.err
    ssh = cloud.run(sys.executable, "cluster.py", "login", node["id"], stdin=subprocess.DEVNULL)
    assert ssh.code == 255
    assert "Host key verification failed" in ssh.err


def test_a_node_that_can_not_be_reached_is_not_tried(cloud: LocalCloud, group: str) -> None:
    create(cloud, group)
    assert "; that is a group; see ./cluster.py status" in cloud.cluster("logs", group).last_line
    ending = cloud.nodes(group)[0]["id"]
    with cloud.options(ending_lag=600):
        cloud.client("ec2").terminate_instances(InstanceIds=[ending])
        for command in ("login", "logs"):
            refused = cloud.cluster(command, ending)
            says = f"Error: {ending} can't be reached (it is shutting-down); see ./cluster.py status {group}"
            assert (refused.code, refused.last_line) == (1, says)


def test_status_looks_this_machines_address_up_only_where_it_is_used(cloud: LocalCloud, group: str) -> None:
    create(cloud, group, 1)
    nobody = {"MITSUBA_CLUSTER_ADDRESS_URL": "http://127.0.0.1:1/"}
    for words in (("status", "--json", group), ("status", f"{group}-nowhere")):
        assert "Warning" not in cloud.cluster(*words, env=nobody).err
    assert "Warning: this machine's public address" in cloud.cluster("status", group, env=nobody).err
