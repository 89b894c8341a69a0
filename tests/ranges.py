"""An S3 of one content, and the nodes' half of syncData run against it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cluster


class RangeServer(ThreadingHTTPServer):
    """Serves one content under any name, range by range; can refuse those that start at or after a place."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), RangeHandler)
        self.content, self.refuse_from, self.code = content, len(content) + 1, 404
        self.starts: list[int] = []
        self.admit: Callable[[str, int], bool] = lambda path, start: True  # whether an address is still good

    def job(self, *names: str) -> list[dict[str, Any]]:
        """Return the nodes' job for objects with these NAMES, without a hash to check them by."""
        url = f"http://127.0.0.1:{self.server_address[1]}/"
        one = {"size": len(self.content), "mark": "e-1", "digest": "", "url": url, "headers": {"If-Match": '"e-1"'}}
        return [{"path": name} | one for name in names]


class RangeHandler(BaseHTTPRequestHandler):
    """Answers one request for a range."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Send the range."""
        assert isinstance(self.server, RangeServer)
        start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.starts.append(start)
        if start >= self.server.refuse_from:
            self.send_error(self.server.code)
            return
        if not self.server.admit(self.path, start):
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code></Error>")
            return
        if self.headers["If-Match"] != '"e-1"':
            self.send_error(412)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        self.wfile.write(self.server.content[start : end + 1])


@contextlib.contextmanager
def range_server(content: bytes) -> Iterator[RangeServer]:
    """Run a RangeServer for a while."""
    with RangeServer(content) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def run_sync(folder: Path, job: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the nodes' half of syncData in FOLDER; return its last report."""
    words = [sys.executable, "-I", "-c", cluster.node_program(cluster.fetch_files), str(folder)]
    done = subprocess.run(words, input=json.dumps(job), text=True, capture_output=True, check=False)
    assert not done.stderr
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last
