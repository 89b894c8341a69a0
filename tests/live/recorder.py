"""Runs cluster.py and writes down each answer of AWS: `python -m tests.live.recorder FILE COMMAND…`.

A line is a JSON object: time, action, HTTP status, AWS's code ("" where all is well). What botocore
resends by itself is there, too.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from typing import Any

import boto3

from tests.localcloud.places import PROJECT


def main() -> None:
    """Run the tool with the words after FILE."""
    path, *words = sys.argv[1:]

    def record(event_name: str, parsed_response: Any = None, exception: Any = None, **_: Any) -> None:
        answer = parsed_response or {}
        code = answer.get("Error", {}).get("Code", "") or (type(exception).__name__ if exception else "")
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        line = {"time": time.time(), "action": event_name.split(".")[-1], "status": status, "code": str(code)}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    plain = boto3.Session.__init__

    def initialize(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        self.events.register("response-received", record)

    boto3.Session.__init__ = initialize
    sys.argv = ["./cluster.py", *words]
    runpy.run_path(str(PROJECT / "cluster.py"), run_name="__main__")


if __name__ == "__main__":
    main()
