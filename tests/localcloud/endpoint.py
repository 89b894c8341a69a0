"""The AWS endpoint: moto behind a front that counts, logs and spoils calls.

A fault is a rule, a JSON object: which calls it meets (`service`, `action`; `nth` counts
the matching calls from 1, or `rate` is a probability) and what it does (`kind`). Kinds:

    throttle, 500, 503, denied, expired   the error that AWS gives
    code:NAME                             an error 400 with that code
    html                                  an HTML page with status 502
    reset, hang, truncate                 the connection is reset, silent, cut in mid-answer
    lost                                  carried out, but the answer is lost (reset)
    kill-before, kill-after               signal `signal` (9) to the process in `pid_file`

`times` limits how often a rule strikes.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.localcloud import iam
from tests.localcloud.aws import error_response, price_list
from tests.localcloud.places import REGION

Environ = dict[str, Any]
Start = Callable[..., Any]
Application = Callable[[Environ, Start], Iterable[bytes]]

CONTROL = "/_localcloud/"
HANG_SECONDS = 3600
CLOCK_TOLERANCE = 300  # seconds
STATUS = {"UnauthorizedOperation": 403, "AuthFailure": 401}  # of refusals that are no plain 400
ERRORS = {
    "throttle": ("RequestLimitExceeded", "Request limit exceeded.", 503),
    "500": ("InternalError", "An internal error has occurred", 500),
    "503": ("Unavailable", "The server is overloaded and can't handle the request.", 503),
    "denied": ("UnauthorizedOperation", "You are not authorized to perform this operation.", 403),
    "expired": ("RequestExpired", "Request has expired.", 400),
}


@dataclass
class Fault:
    """One rule, as above."""

    kind: str
    service: str = "*"
    action: str = "*"
    nth: int = 0
    rate: float = 1.0
    times: int = 0
    pid_file: str = ""
    signal: int = signal.SIGKILL
    seen: int = 0
    struck: int = 0

    def strikes(self, service: str, action: str) -> bool:
        """Count a call; return whether the rule meets it."""
        if self.service not in ("*", service) or self.action not in ("*", action):
            return False
        self.seen += 1
        if self.times and self.struck >= self.times:
            return False
        hit = self.seen == self.nth if self.nth else random.random() < self.rate
        self.struck += hit
        return hit


@dataclass
class Front:
    """A WSGI application that stands before moto's."""

    moto: Application
    log: Path
    control: Callable[[str, Any], Any]  # (what, body) -> a JSON value
    tags_of: Callable[[str], dict[str, str]] = lambda _: {}  # of an EC2 resource, by its id
    refuse: Callable[[str, str, dict[str, str]], tuple[str, str] | None] = lambda *_: None  # region, action, parameters
    policy: dict[str, Any] | None = None  # IAM's; None: all is allowed
    faults: list[Fault] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: Environ, start: Start) -> Iterable[bytes]:
        """Answer one request."""
        if environ["PATH_INFO"].startswith(CONTROL):
            return self.answer_control(environ, start)
        body = read_body(environ)
        service, action = identify(environ, body)
        with self.lock:
            struck = [fault for fault in self.faults if fault.strikes(service, action)]
            self.counts[action] = self.counts.get(action, 0) + 1
        self.record(service=service, action=action, fault=",".join(fault.kind for fault in struck))
        if refused := self.forbidden(environ, service, action, body):
            return respond(start, *refused)
        if clock_is_wrong(environ):
            return respond(start, *error_response(*ERRORS["expired"]))
        for fault in struck:
            if (spoiled := self.spoil(fault, environ, start)) is not None:
                return spoiled
        if service == "ec2":
            parameters = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            if unknown := self.refuse(region_of(environ), action, parameters):
                self.record(action=action, refused=unknown[0])
                return respond(start, *error_response(*unknown, STATUS.get(unknown[0], 400)))
        return self.moto(environ, start)

    def forbidden(
        self, environ: Environ, service: str, action: str, body: bytes
    ) -> tuple[int, dict[str, str], str] | None:
        """Return IAM's refusal of a call; None where the policy, if there is one, allows it."""
        method, path = environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        if self.policy:
            for demand in iam.demands(service, action, method, path, body, self.tags_of):
                if not iam.allows(self.policy, demand):
                    self.record(denied=demand.action, resource=demand.resource)
                    status, headers, text = iam.refusal(service, demand)
                    return status, headers, "" if method == "HEAD" else text
        return None

    def record(self, **what: Any) -> None:
        """Append one line to the log of calls."""
        line = json.dumps({"time": round(time.time(), 3), **what})
        with self.lock, self.log.open("a") as log:
            log.write(line + "\n")

    def spoil(self, fault: Fault, environ: Environ, start: Start) -> Iterable[bytes] | None:
        """Carry out a fault; None lets the call go on."""
        if fault.kind in ERRORS or fault.kind.startswith("code:"):
            code, message, status = ERRORS.get(fault.kind) or (fault.kind[5:], "Injected by the local cloud.", 400)
            return respond(start, *error_response(code, message, status))
        if fault.kind == "html":
            return respond(start, 502, {"Content-Type": "text/html"}, "<html><h1>502 Bad Gateway</h1></html>")
        if fault.kind == "reset":
            return hang_up(environ)
        if fault.kind == "hang":
            time.sleep(HANG_SECONDS)
        if fault.kind == "kill-before":
            return kill(fault, environ)
        answer = b"".join(self.moto(environ, lambda *_: lambda _: None))
        if fault.kind == "truncate":
            start("200 OK", [("Content-Type", "text/xml"), ("Content-Length", str(len(answer)))])
            environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
            return [answer[: len(answer) // 2]]
        if fault.kind == "kill-after":
            return kill(fault, environ)
        return hang_up(environ)  # lost

    def answer_control(self, environ: Environ, start: Start) -> Iterable[bytes]:
        """Answer one of this cloud's own requests."""
        what = environ["PATH_INFO"][len(CONTROL) :]
        body = json.loads(read_body(environ) or b"null")
        if what == "faults":
            with self.lock:
                self.faults = [Fault(**rule) for rule in body]
            value: Any = len(self.faults)
        elif what == "policy":
            self.policy, value = body, "set"
        elif what == "counts":
            with self.lock:
                value, self.counts = self.counts, {}
        else:
            try:
                value = self.control(what, body)
            except (KeyError, ValueError) as error:
                return respond(start, 400, {"Content-Type": "text/plain"}, str(error))
        text = value if what == "address" else json.dumps(value)
        return respond(start, 200, {"Content-Type": "application/json"}, text + "\n")


def with_prices(moto: Application, quota: Callable[[str], str]) -> Application:
    """Return moto with a Pricing API and EC2's Service Quotas, which it lacks."""

    def answer(environ: Environ, start: Start) -> Iterable[bytes]:
        signed = environ.get("HTTP_AUTHORIZATION", "")
        if "/pricing/" not in signed and "/servicequotas/" not in signed:
            return moto(environ, start)
        asked = json.loads(environ["wsgi.input"].read())
        if "/pricing/" in signed:
            text = price_list(next(one["Value"] for one in asked["Filters"] if one["Field"] == "instanceType"))
        else:
            text = quota(asked["QuotaCode"])
        return respond(start, 200, {"Content-Type": "application/x-amz-json-1.1"}, text)

    return answer


def read_body(environ: Environ) -> bytes:
    """Return the request's body and leave it readable for moto; S3's bodies stay a stream."""
    if "s3" in environ.get("HTTP_AUTHORIZATION", "").split("/")[3:4]:
        return b""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)
    return bytes(body)


def identify(environ: Environ, body: bytes) -> tuple[str, str]:
    """Return (service, action) of an AWS request, from its signature and its body."""
    scope = re.search(r"Credential=[^/]+/\d+/[^/]+/([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
    service = scope[1] if scope else "s3"
    if target := environ.get("HTTP_X_AMZ_TARGET"):
        return service, target.split(".")[-1]
    if service == "s3":
        return service, f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
    return service, parse_qs(body.decode()).get("Action", ["?"])[0]


def region_of(environ: Environ) -> str:
    """Return the region for which a request was signed."""
    scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
    return scope[1] if scope else REGION


def clock_is_wrong(environ: Environ) -> bool:
    """Tell whether a request was signed by a clock that is more than five minutes off, as AWS does."""
    stamp = environ.get("HTTP_X_AMZ_DATE")
    signed = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc) if stamp else None
    return signed is not None and abs(signed.timestamp() - time.time()) > CLOCK_TOLERANCE


def respond(start: Start, status: int, headers: dict[str, str], text: str) -> Iterable[bytes]:
    """Send a whole response."""
    body = text.encode()
    start(f"{status} {'OK' if status < 400 else 'Error'}", [*headers.items(), ("Content-Length", str(len(body)))])
    return [body]


def hang_up(environ: Environ) -> Iterable[bytes]:
    """Reset the connection."""
    connection: socket.socket = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)  # close() alone would wait for werkzeug's own copies
    connection.close()
    raise ConnectionResetError("reset by a fault rule")


def kill(fault: Fault, environ: Environ) -> Iterable[bytes]:
    """Send the rule's signal to the process whose id is in its file, then reset the connection."""
    deadline = time.monotonic() + 10
    while not (os.path.exists(fault.pid_file) and Path(fault.pid_file).read_text()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody wrote {fault.pid_file}")
        time.sleep(0.01)
    os.kill(int(Path(fault.pid_file).read_text()), fault.signal)
    if fault.signal != signal.SIGKILL:
        time.sleep(HANG_SECONDS if fault.kind == "hang" else 0.2)
    return hang_up(environ)
