"""The README's threats, each tried on real nodes: it fails; and it succeeds once its defence is off."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

import cluster
from tests.localcloud.places import CLIENT, STRANGER
from tests.ranges import RangeServer, run_sync
from tests.support import LocalCloud, reachable, ssh
from tests.test_security import BUCKET, Researcher, allowed, own_policy

pytestmark = pytest.mark.xdist_group("nspawn-faults")

GROUP = "attacked"
QUICK: dict[str, float] = {"FIRST_KEY_LIMIT": 2}
SESSION = (("createNodes", "c1.xlarge", "2", GROUP), ("install", GROUP), ("start", GROUP), ("status", "--servers"))


@contextmanager
def sampled() -> Iterator[set[str]]:
    """Collect what every process of this machine, its nodes' too, shows in /proc: command lines and environments."""
    seen: set[str] = set()
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            for name in ("cmdline", "environ"):
                for path in Path("/proc").glob(f"[0-9]*/{name}"):
                    try:
                        seen.add(path.read_text(errors="replace"))
                    except OSError:
                        continue

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def researcher(nodes: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Researcher:
    """The user, with the least rights and a credentials file."""
    return Researcher(nodes, tmp_path_factory.mktemp("attacked"))


@pytest.fixture(scope="module")
def attacked(researcher: Researcher) -> Iterator[tuple[LocalCloud, set[str]]]:
    """Two serving nodes with data, made under the least rights, and all that /proc showed meanwhile."""
    nodes = researcher.cloud
    bucket = f"import boto3; boto3.client('s3', 'us-east-1').create_bucket(Bucket='{BUCKET}')"
    url = researcher.env["AWS_ENDPOINT_URL_S3"]
    assert nodes.run(sys.executable, "-c", bucket, env=nodes.environment(AWS_ENDPOINT_URL_S3=url)).code == 0
    with allowed(nodes, own_policy()), sampled() as seen:
        for words in (*SESSION, ("syncData", str(researcher.data), GROUP), ("runCommand", "true", GROUP)):
            done = researcher.run(*words)
            assert done.code == 0, done.err
    yield nodes, seen
    nodes.cluster("terminateAll", GROUP)


@pytest.fixture
def cloud(attacked: tuple[LocalCloud, set[str]]) -> LocalCloud:
    """The cloud with the serving nodes."""
    return attacked[0]


def by_role(cloud: LocalCloud, role: str) -> dict[str, Any]:
    """Return the head, or a worker."""
    return next(node for node in cloud.nodes(GROUP) if node["role"] == role)


# Another internet host


def test_port_scan(cloud: LocalCloud) -> None:
    address = by_role(cloud, "head")["address"]
    assert reachable(cloud, CLIENT, address, 22, 7554) == "22 7554"
    assert reachable(cloud, STRANGER, address, *range(1, 1025), 7554) == ""
    open_to_all = {"CLIENT_CIDR": "0.0.0.0/0", "PUBLIC_SERVER_PORT": False}
    assert cloud.cluster("runCommand", "true", GROUP, settings=open_to_all).code == 0
    assert reachable(cloud, STRANGER, address, 22, 7554) == "22"
    assert cloud.cluster("runCommand", "true", GROUP).code == 0
    assert reachable(cloud, STRANGER, address, 22, 7554) == ""


# A man in the middle


def impostors_log(cloud: LocalCloud) -> str:
    """Return what the impostor has seen."""
    return (cloud.where.root / "impostor.log").read_text()


def test_man_in_the_middle_at_the_first_connection(nodes: LocalCloud) -> None:
    before = impostors_log(nodes)
    with nodes.options(launch_faults=["hijack"]):
        made = nodes.cluster("createNodes", "c1.xlarge", "1", "hijacked", limits=QUICK)
    assert made.code == 1, made.err
    assert "shows another host key than the one it was launched with" in made.err
    assert impostors_log(nodes) == before  # nobody even gave a name
    assert nodes.cluster("terminateAll", "hijacked").code == 0


def test_man_in_the_middle_later(cloud: LocalCloud) -> None:
    node, before = by_role(cloud, "worker"), impostors_log(cloud)
    cloud.fault("hijack", node)
    try:
        done = cloud.cluster("runCommand", "echo a secret", GROUP)
        assert f"{node['name']}: shows another host key than the one it was launched with" in done.err
        assert "Host key verification failed" in cloud.cluster("login", node["id"]).err
        assert impostors_log(cloud) == before
        line = (cloud.where.root / "impostor.pub").read_text().strip()
        retag(cloud, node, [{"Key": cluster.TAG_HOST_KEY, "Value": line}])
        assert "not launched with this key" in cloud.cluster("runCommand", "echo a secret", GROUP).err
        assert impostors_log(cloud) == before
        retag(cloud, node, cloud.signed(GROUP, line))
        assert cloud.cluster("runCommand", "echo a secret", GROUP).code == 0
        assert "a secret" in impostors_log(cloud)  # so the signed tag is what stood between
    finally:
        retag(cloud, node, cloud.signed(GROUP, node["host_key"]))
        cloud.fault("give-back", node)
    assert cloud.cluster("runCommand", "true", GROUP).code == 0


def retag(cloud: LocalCloud, node: dict[str, Any], tags: list[dict[str, str]]) -> None:
    """Change a node's tags."""
    program = f"import boto3; boto3.client('ec2', 'us-east-1').create_tags(Resources=['{node['id']}'], Tags={tags})"
    assert cloud.run(sys.executable, "-c", program).code == 0


# Processes on a node: the SSH user's, and a renderer that a malicious scene has taken over

USER_DATA = "http://169.254.169.254/latest/user-data"
TOKEN = "$(curl -s -m 3 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)"
ASK = f"curl -s -o /dev/null -m 3 -w '%{{http_code}}' -H \"X-aws-ec2-metadata-token: {TOKEN}\" {USER_DATA}"
AS_MITSUBA = "setpriv --reuid=mitsuba --regid=mitsuba --clear-groups"
IN_RENDERER = (  # in the server's cgroup and name spaces, with its rights
    "sudo sh -c 'echo $$ > /sys/fs/cgroup/system.slice/mtssrv.service/cgroup.procs; "
    f'exec nsenter -t $(systemctl show -P MainPID mtssrv) -m {AS_MITSUBA} --no-new-privs sh -c "$1"\' sh '
)


def in_renderer(cloud: LocalCloud, node: dict[str, Any], line: str) -> str:
    """Run a command line as the taken-over server would; return its output."""
    return ssh(cloud, node, IN_RENDERER + quote(line)).out


def test_metadata(cloud: LocalCloud) -> None:
    node = by_role(cloud, "worker")
    assert ssh(cloud, node, ASK).out == "000"
    assert ssh(cloud, node, f"sudo {AS_MITSUBA} sh -c {quote(ASK)}").out == "000"
    assert in_renderer(cloud, node, ASK) == "000"
    assert ssh(cloud, node, f"sudo sh -c {quote(ASK)}").out == "200"
    assert ssh(cloud, node, f"sudo curl -s -o /dev/null -m 3 -w '%{{http_code}}' {USER_DATA}").out == "401"  # no token
    assert ssh(cloud, node, "sudo nft delete table inet mitsuba_metadata").code == 0
    assert ssh(cloud, node, ASK).out == "200"
    assert in_renderer(cloud, node, ASK) == "000"  # the unit has a wall of its own
    refused = cloud.cluster("install", GROUP)
    assert refused.code == 1
    assert f"{node['name']}: its rules for the metadata service are missing" in refused.err
    assert ssh(cloud, node, f"sudo bash -c {quote(cluster.BOOT)} boot 0").code == 0
    assert ssh(cloud, node, ASK).out == "000"
    assert cloud.cluster("install", GROUP).code == 0


def test_a_renderer_that_is_taken_over(cloud: LocalCloud) -> None:
    node = by_role(cloud, "worker")
    ssh(cloud, node, "echo treasure > ~/treasure; chmod 755 ~; chmod 644 ~/treasure")
    assert "treasure" not in in_renderer(cloud, node, "cat /home/ubuntu/treasure")
    assert ssh(cloud, node, f"sudo {AS_MITSUBA} cat /home/ubuntu/treasure").out == "treasure\n"
    assert in_renderer(cloud, node, "touch /usr/x /etc/x /var/lib/x 2>&1").count("Read-only file system") == 3
    assert in_renderer(cloud, node, "touch /mnt/x && echo written") == "written\n"
    ssh(cloud, node, "touch /mnt/ours")
    assert in_renderer(cloud, node, "mv /mnt/ours /mnt/theirs && echo moved") == ""
    ssh(cloud, node, "sudo chmod -t /mnt")
    assert in_renderer(cloud, node, "mv /mnt/ours /mnt/theirs && echo moved") == "moved\n"
    keys = "cat /etc/ssh/ssh_host_ed25519_key /var/lib/cloud/instance/user-data.txt /var/lib/cloud/instance/obj.pkl"
    assert in_renderer(cloud, node, f"{keys} 2>&1").count("Permission denied") == 3
    assert in_renderer(cloud, node, "sudo -n true && echo root") == ""
    assert in_renderer(cloud, node, "grep CapEff /proc/self/status").split() == ["CapEff:", "0000000000000000"]


# A stolen node, and another user of this machine


def test_no_secret_shows_anywhere(attacked: tuple[LocalCloud, set[str]], researcher: Researcher) -> None:
    cloud, seen = attacked
    key = (cloud.where.root / "key.pem").read_text().splitlines()[3]  # of the private half
    secrets = {"AWS secret": researcher.secret, "signed address": "X-Amz-Signature", "SSH key": key}
    assert len(seen) > 100
    for what, secret in secrets.items():
        shown = [text for text in seen if secret in text]
        assert not shown, f"{what} in /proc: {shown[0][:200]!r}"
        places = [
            cloud.where.root / "state",
            *cloud.where.nodes.glob("*/upper"),
            *cloud.where.nodes.glob("*/console.log"),
        ]
        found = subprocess.run(["grep", "-rlsaF", "-e", secret, *places], capture_output=True, text=True, check=False)
        assert found.stdout == "", f"{what} in {found.stdout}"
    journal = ssh(cloud, by_role(cloud, "worker"), "sudo journalctl --no-pager").out
    assert "sudo" in journal
    assert not any(secret in journal for secret in secrets.values())
    with sampled() as careless:  # credentials in the environment instead of a file
        assert cloud.cluster("status", env={"AWS_SECRET_ACCESS_KEY": researcher.secret}).code == 0
    assert any(researcher.secret in text for text in careless)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_of_this_machine(nodes: LocalCloud) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        key = folder / "key.pem"
        cluster.ensure_key_file(key)
        steal = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", str(key)]
        assert subprocess.run(steal, capture_output=True, check=False).returncode == 1
        key.chmod(0o644)
        assert b"PRIVATE KEY" in subprocess.run(steal, capture_output=True, check=True).stdout
        with pytest.raises(cluster.ClusterError, match="can be read by other users: chmod 600"):
            cluster.load_identity(key)


# A malicious object name in S3


def test_object_name_that_leads_out(tmp_path: Path, small_s3: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    assert cluster.plan_relative_path("prefix/../outside", "prefix") is None
    assert "leads out of the folder" in run_sync(data, small_s3.job("../outside"))["error"]
    assert not (tmp_path / "outside").exists()
    careless = cluster.node_program(cluster.fetch_files).replace('if name in (".", ".."):', "if False:")
    monkeypatch.setattr(cluster, "node_program", lambda _: careless.replace("!= os.geteuid()", "is None"))
    assert run_sync(data, small_s3.job("../outside"))["fetched"] == 1
    assert (tmp_path / "outside").exists()
