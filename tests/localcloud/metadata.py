"""The metadata service at 169.254.169.254, as a node sees it (IMDSv2, user data, public key)."""

from __future__ import annotations

import base64
import http.server
import json
import secrets
from collections.abc import Callable
from typing import Any, ClassVar

TOKEN_HEADER = "X-aws-ec2-metadata-token"
Tree = dict[str, Any]


def metadata_tree(instance: Any) -> Tree:
    """Return what /latest/meta-data/ holds for a moto instance, folders as dicts."""
    mac = instance.nics[0].mac_address
    interface = {"device-number": "0", "local-ipv4s": instance.private_ip, "mac": mac}
    tree: Tree = {
        "ami-id": instance.image_id,
        "ami-launch-index": str(instance.ami_launch_index),
        "hostname": instance.private_dns_name,
        "instance-id": instance.id,
        "instance-life-cycle": instance.lifecycle or "on-demand",
        "instance-type": instance.instance_type,
        "local-hostname": instance.private_dns_name,
        "local-ipv4": instance.private_ip,
        "mac": mac,
        "network": {"interfaces": {"macs": {mac: interface}}},
        "placement": {"availability-zone": instance.availability_zone, "region": instance.region_name},
        "security-groups": "\n".join(group.name for group in instance.held_groups),
        "services": {"domain": "amazonaws.com", "partition": "aws"},
    }
    if instance.public_ip:
        tree |= {"public-ipv4": instance.public_ip, "public-hostname": instance.public_dns_name}
    if key := instance.ec2_backend.key_pairs.get(instance.key_name):
        text = key.material_public
        tree["public-keys"] = {"0": {"openssh-key": text.decode() if isinstance(text, bytes) else text}}
    if instance.interrupted_at:
        action = {"action": "terminate", "time": instance.interrupted_at}
        tree["spot"] = {"instance-action": json.dumps(action), "termination-time": instance.interrupted_at}
    return tree


def look_up(instance: Any, path: list[str]) -> str | None:
    """Return the text at PATH (below the version) as the service gives it; None: not there."""
    if not path:
        return "dynamic\nmeta-data\nuser-data"
    if path == ["user-data"]:
        return base64.b64decode(str(instance.user_data)).decode() if instance.user_data else None
    if path == ["dynamic", "instance-identity", "document"]:
        return json.dumps({"instanceId": instance.id, "region": instance.region_name})
    if path[0] != "meta-data":
        return None
    tree: Any = metadata_tree(instance)
    if path[1:] == ["public-keys"]:
        return f"0={instance.key_name}" if "public-keys" in tree else None
    for name in path[1:]:
        tree = tree.get(name) if isinstance(tree, dict) else None
        if tree is None:
            return None
    if isinstance(tree, dict):
        return "\n".join(f"{name}/" if isinstance(value, dict) else name for name, value in tree.items())
    return str(tree)


def make_handler(find_instance: Callable[[str], Any]) -> type[http.server.BaseHTTPRequestHandler]:
    """Return a request handler; FIND_INSTANCE gives the instance behind a private address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        tokens: ClassVar[set[str]] = set()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: boots ask hundreds of times."""

        def do_PUT(self) -> None:
            """Hand out a session token (IMDSv2)."""
            token = secrets.token_urlsafe(32)
            self.tokens.add(token)
            self.answer(200 if self.path == "/latest/api/token" else 404, token)

        def do_GET(self) -> None:
            """Answer a look-up."""
            instance = find_instance(self.client_address[0])
            if instance is None:
                self.answer(404, "")
                return
            # cloud-init takes this place for no EC2 and asks without a token: they are
            # demanded only from the moment at which sshd answers.
            strict = instance.metadata_options.http_tokens == "required" and instance.node.answered
            if strict and self.headers.get(TOKEN_HEADER) not in self.tokens:
                self.answer(401, "")
                return
            path = [part for part in self.path.split("?")[0].split("/") if part]
            text = look_up(instance, path[1:])
            self.answer(404 if text is None else 200, text or "")

        def answer(self, code: int, text: str) -> None:
            """Send a whole response."""
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
