"""S3 with real throughput: localbucket, taught user metadata, If-Match and multipart ETags.

moto's S3, at the AWS endpoint, is the other one: exact in meaning, slow and in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import localbucket

Record = Callable[..., None]


def user_metadata(headers: Any) -> dict[str, str]:
    """Return the x-amz-meta-* headers of a request."""
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith("x-amz-meta-")}


class Handler(localbucket.S3Handler):
    """One S3 request; what a file system can't hold is kept in memory, by path."""

    disable_nagle_algorithm = True
    record: Record = staticmethod(lambda **_: None)
    metadata: ClassVar[dict[Path, dict[str, str]]] = {}
    pending: ClassVar[dict[str, dict[str, str]]] = {}  # of multipart uploads, by upload id
    keys: ClassVar[bool] = False  # the bucket encrypts by a KMS key
    stalled: ClassVar[bool] = False  # all but the first bytes of an object wait
    sent = 0
    parts: Sequence[Path] = ()  # of the multipart upload that is being completed

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: send_response records each request."""

    def _dispatch(self, action: Any) -> None:
        self.sent, self.parts = 0, ()
        super()._dispatch(action)
        self.record(service="s3", action=f"{self.command} {self.path.split('?')[0]}", bytes=self.sent)

    def _send_file(
        self, status: HTTPStatus, file: BinaryIO, start: int, length: int, headers: dict[str, str], include_body: bool
    ) -> None:
        path = Path(str(file.name))
        wanted = self.headers.get("If-Match")
        if wanted and not localbucket.etag_matches(wanted, localbucket.object_etag(path)):
            raise self._precondition_failed_error()
        self._send_headers(status, length, headers | self.metadata.get(path, {}))
        if include_body:
            while self.stalled and start:
                time.sleep(0.05)
            self.wfile.flush()
            self.sent += self.connection.sendfile(file, start, length) if length else 0

    def _write_object(self, bucket: str, key: str, write: Any) -> str:
        if self.parts:
            write = self._join_parts
        etag = str(super()._write_object(bucket, key, write))
        target = self._object_path(bucket, key)
        copied = self.headers.get("x-amz-copy-source")
        if copied and self.headers.get("x-amz-metadata-directive", "COPY") == "COPY":
            self.metadata[target] = self.metadata.get(self._copy_source(), {})
        else:
            self.metadata[target] = user_metadata(self.headers)
        return self._encrypt(target) or etag

    def _encrypt(self, target: Path) -> str:
        """Return the ETag of an object under a KMS key, which looks like an MD5 and is none; "" without a key."""
        if not (self.keys or self.headers.get("x-amz-server-side-encryption") == "aws:kms"):
            return ""
        etag = secrets.token_hex(16)
        localbucket.remember_etag(target, etag)
        self.metadata[target] = self.metadata[target] | {"x-amz-server-side-encryption": "aws:kms"}
        return etag

    def _create_multipart_upload(self, bucket: str, key: str) -> None:
        before = set((self.data_root / localbucket.UPLOADS_DIR).glob("*"))
        super()._create_multipart_upload(bucket, key)
        for folder in set((self.data_root / localbucket.UPLOADS_DIR).glob("*")) - before:
            self.pending.setdefault(folder.name, user_metadata(self.headers))

    def _join_parts(self, file: BinaryIO) -> str:
        """Join the parts in the kernel; no digest of the whole is wanted, since S3 gives none either."""
        for part in self.parts:
            with part.open("rb") as source:
                while os.sendfile(file.fileno(), source.fileno(), None, 1 << 30):
                    pass
        return ""

    def _complete_multipart_upload(self, bucket: str, key: str, body: bytes) -> None:
        digests = [bytes.fromhex(text) for text in re.findall(r"([0-9a-f]{32})", body.decode())]
        folder = self._upload_dir(bucket, key)
        self.parts = [folder / f"{int(text):05d}" for text in re.findall(r"<PartNumber>(\d+)<", body.decode())]
        super()._complete_multipart_upload(bucket, key, body)
        target = self._object_path(bucket, key)
        self.metadata[target] = self.pending.pop(self.query["uploadId"], {})
        etag = f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
        localbucket.remember_etag(target, etag)
        if self.keys:
            self.metadata[target] = self.metadata[target] | {"x-amz-server-side-encryption": "aws:kms"}


class Server(ThreadingHTTPServer):
    """Serves many ranges at once."""

    daemon_threads = True
    request_queue_size = 256


def serve(address: str, port: int, folder: Path, record: Record) -> int:
    """Serve FOLDER in the background; return the port."""
    folder.mkdir(parents=True, exist_ok=True)
    Handler.data_root = folder.resolve()
    Handler.record = staticmethod(record)
    server = Server((address, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])
