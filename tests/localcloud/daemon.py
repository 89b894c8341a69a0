"""The process behind a running cloud: endpoint, metadata, S3, apt, names, and the nodes.

Started by `python -m tests.localcloud up` (with the nspawn kind inside a network namespace
and a private mount namespace of its own). Ends on SIGTERM and takes all nodes with it.
"""

from __future__ import annotations

import functools
import http.server
import ipaddress
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.localcloud import aws, delays, endpoint, impostor, metadata, nspawn, places, process, s3
from tests.localcloud.places import ACCESS_KEY, CLIENT, METADATA, PUBLIC_NETWORKS, REGION, RESOLVER, ROUTER, SECRET_KEY
from tests.localcloud.process import ProcessNetwork

BUCKET = "scenes"


def public_addresses() -> Iterator[str]:
    """Yield the public addresses that nodes get, in order."""
    return (str(host) for network in PUBLIC_NETWORKS for host in ipaddress.ip_network(network).hosts())


class QuietServer(http.server.ThreadingHTTPServer):
    """An HTTP server with room for a hundred nodes booting at once."""

    daemon_threads = True
    request_queue_size = 256


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word; or, as a failing mirror does, an error."""

    failures = 0  # how many more answers are errors; -1: all

    def do_GET(self) -> None:
        """Answer, or fail while a fault says so."""
        if QuietFiles.failures:
            QuietFiles.failures -= QuietFiles.failures > 0
            return self.send_error(503)
        return super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Daemon:
    """One running cloud."""

    def __init__(self, where: places.Places, kind: str, image: Path) -> None:
        self.where, self.kind, self.image = where, kind, image
        self.children: list[subprocess.Popen[bytes]] = []
        self.config: dict[str, Any] = {"S3_PATH": f"s3://{BUCKET}/data", "AWS_REGION": REGION}
        self.environment: dict[str, str] = {}
        aws.prepare_environment(where.root)
        self.cloud = self.nspawn_cloud() if kind == "nspawn" else self.process_cloud()
        aws.mend(self.cloud)

    # The two kinds of node

    def nspawn_cloud(self) -> aws.Cloud:
        """Prepare what real nodes need: network, apt, names, metadata."""
        nspawn.set_up_network()
        nspawn.set_up_cgroups()
        impostor.serve(places.IMPOSTOR, self.where.root)
        for folder in ("hosts.public", "hosts.vpc"):
            (self.where.root / folder).mkdir(exist_ok=True)
        self.serve_names("127.0.0.1", "hosts.public")
        self.serve_names(RESOLVER, "hosts.vpc")
        files = functools.partial(QuietFiles, directory=str(self.where.apt))
        self.serve_http((ROUTER, places.APT_PORT), files)
        self.serve_http((METADATA, 80), metadata.make_handler(self.instance_at))
        self.config["PKG_REPOSITORY"] = f"deb [trusted=yes] http://apt.localcloud.internal:{places.APT_PORT} ./"

        def make_node(instance: Any) -> aws.Node:
            node = nspawn.NspawnNode(
                instance.id, instance.private_ip, self.where.nodes / instance.id, self.image, instance.node_exited
            )
            node.set_rules(aws.firewall_rules(instance, self.cloud.instances))
            self.name_instance(instance)
            return node

        return aws.Cloud(make_node, public_addresses(), None, public_names=True)

    def process_cloud(self) -> aws.Cloud:
        """Prepare process nodes: a loopback network of SSH listeners."""
        network = ProcessNetwork(self.where.nodes)
        self.config |= {"SSH_PORT": network.port, "PKG_REPOSITORY": network.repository(self.where.apt)}
        return aws.Cloud(network.make_node, network.addresses(0), network.addresses(1), public_names=False)

    # Services

    def serve_http(self, address: tuple[str, int], handler: Any) -> None:
        """Serve in the background."""
        threading.Thread(target=QuietServer(address, handler).serve_forever, daemon=True).start()

    def serve_names(self, address: str, folder: str) -> None:
        """Run a DNS server that knows the files of FOLDER and this cloud's own names."""
        names = [f"--host-record={name}.localcloud.internal,{ROUTER}" for name in ("apt", "s3", "aws")]
        self.children.append(
            subprocess.Popen(
                ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]
                + ["--bind-interfaces", f"--listen-address={address}", "--except-interface=none"]
                + [f"--hostsdir={self.where.root / folder}", "--pid-file=", "--user=root", "--local-ttl=0", *names]
            )
        )

    def name_instance(self, instance: Any) -> None:
        """Let DNS answer for a new instance: public names outside, private ones inside."""
        public, private = instance.future_public_name, instance.private_dns_name
        lines = {"hosts.public": f"{instance.nics[0].public_ip} {public}\n" if public else ""}
        lines["hosts.vpc"] = f"{instance.private_ip} {private} {public or ''}\n"
        for folder, line in lines.items():
            part = self.where.root / f"{instance.id}.part"
            part.write_text(line)
            part.rename(self.where.root / folder / instance.id)

    def instance_at(self, private_ip: str) -> Any:
        """Return the instance with a private address, or None."""
        alive = (i for i in self.cloud.instances.values() if i.private_ip == private_ip and i.state != "terminated")
        return next(alive, None)

    def refresh_firewalls(self) -> None:
        """Keep each node's rules equal to its security groups, for ever."""
        while True:
            for instance in list(self.cloud.instances.values()):
                if instance.state in aws.ALIVE:
                    with suppress(RuntimeError):
                        instance.node.set_rules(aws.firewall_rules(instance, self.cloud.instances))
            time.sleep(0.2)

    def serve_aws(self) -> None:
        """Start the endpoint and S3; note the settings and the environment that lead to them."""
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any) -> None:
                """Say nothing: the front keeps its own log."""

        inside = self.kind == "nspawn"
        quota = functools.partial(aws.quota, self.cloud)
        moto = endpoint.with_prices(DomainDispatcherApplication(create_backend_app), quota)
        refuse = functools.partial(delays.refuse, self.cloud)
        front = endpoint.Front(moto, self.where.calls, self.control, aws.tags_of, refuse)
        address = "0.0.0.0" if inside else "127.0.0.1"
        server = make_server(address, places.EC2_PORT if inside else 0, front, threaded=True, request_handler=Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        s3_port = s3.serve(address, places.S3_PORT if inside else 0, self.where.root / "s3", front.record)
        host = "aws.localcloud.internal" if inside else "127.0.0.1"
        s3_host = "s3.localcloud.internal" if inside else "127.0.0.1"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{server.port}",
            "AWS_ENDPOINT_URL_S3": f"http://{s3_host}:{s3_port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "MITSUBA_CLUSTER_ADDRESS_URL": f"http://{host}:{server.port}{endpoint.CONTROL}address",
            "MITSUBA_CLUSTER_CONFIG": str(self.where.root / "config.py"),
            "XDG_STATE_HOME": str(self.where.root / "state"),
        }
        (self.where.root / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)

    def control(self, what: str, body: Any) -> Any:
        """Do one of the things that a person can ask of this cloud."""
        if what == "address":
            return CLIENT
        if what == "status":
            return {name: self.describe(instance) for name, instance in self.cloud.instances.items()}
        if what == "options":
            changes = delays.PACES[body.pop("pace")] if "pace" in body else {}
            for name, value in (changes | body).items():
                setattr(self.cloud.options, name, value)
            return vars(self.cloud.options)
        if what == "wipe":
            return aws.wipe(self.cloud, body)
        if what == "truth":
            return aws.truth(self.cloud, body)
        if what == "config":
            return self.config
        if what == "port":
            return self.config.get("SSH_PORT", 22)
        if what == "encrypt":
            s3.Handler.keys = body
            return body
        if what == "stall":
            s3.Handler.stalled = body
            return body
        if what == "mirror":
            QuietFiles.failures = int(body)
            return body
        instance = self.find(body["node"])
        if what == "interrupt":
            instance.interrupt(float(body["seconds"]))
        elif what == "fault":
            self.spoil(instance.node, body["what"])
        else:
            raise ValueError(f"unknown request: {what}")
        return instance.id

    def spoil(self, node: aws.Node, what: str) -> None:
        """Make WHAT go wrong with a node."""
        known = process.FAULTS if self.kind == "process" else nspawn.FAULTS
        if what not in known:
            raise ValueError(f"{self.kind} nodes know these faults: {', '.join(known)}")
        node.fault(what)

    def find(self, name: str) -> Any:
        """Return the instance that NAME (id, address or public name) means."""
        for one in self.cloud.instances.values():
            if name in (one.id, one.private_ip, one.nics[0].public_ip, one.future_public_name):
                return one
        raise ValueError(f"no such node: {name}")

    def describe(self, instance: Any) -> dict[str, Any]:
        """Return one node as `status` shows it; boot: seconds from launch to sshd's answer."""
        node = instance.node
        boot = round(node.answered - instance.born, 2) if node.answered else None
        shown = {"state": instance.state, "private": instance.private_ip, "public": node.public_ip, "boot": boot}
        return shown | {"received": getattr(node, "received", 0)}

    # Life

    def run(self) -> None:
        """Serve until SIGTERM."""
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        self.serve_aws()
        write_config(
            self.where.root / "config.py", self.config | {"SSH_PRIVATE_KEY_FILE": str(self.where.root / "key.pem")}
        )
        if self.kind == "nspawn":
            threading.Thread(target=self.refresh_firewalls, daemon=True).start()
        part = self.where.ready.with_suffix(".part")  # whoever waits for the file must not read half of it
        part.write_text(json.dumps({"kind": self.kind, "environment": self.environment}))
        part.replace(self.where.ready)
        stop.wait()
        ends = [threading.Thread(target=i.node.stop, args=(0,)) for i in list(self.cloud.instances.values())]
        for end in ends:
            end.start()
        for end in ends:
            end.join(20)
        for child in self.children:
            child.terminate()


def write_config(path: Path, settings: dict[str, Any]) -> None:
    """Write SETTINGS as a config.py."""
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))


def main() -> None:
    """Run a cloud: daemon.py ROOT KIND [IMAGE]."""
    root, kind, *image = sys.argv[1:]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    where = places.Places(Path(root))
    shutil.rmtree(where.nodes, ignore_errors=True)
    where.nodes.mkdir(parents=True)
    Daemon(where, kind, Path(*image)).run()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
