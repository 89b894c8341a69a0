"""Killed or interrupted at every EC2 call: whatever exists is shown by status and ended by terminateAll."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support import LocalCloud, Result, killed, wait_until

pytestmark = pytest.mark.sweep

LANES = 6  # the calls of a sweep are dealt out to so many tests, which run side by side


@pytest.fixture(autouse=True)
def brief(cloud: LocalCloud) -> Iterator[None]:
    """Shorten AWS's delays: a sweep runs hundreds of commands."""
    with cloud.options(pace="brief"):
        yield


def killed_at(cloud: LocalCloud, call: int, kind: str, number: int, *words: str) -> Result:
    """Run the tool, with a signal at its k-th call, before or after it is carried out."""
    return killed(cloud, {"kind": kind, "service": "*", "nth": call, "signal": number}, *words)


def sweep(lane: int) -> Iterator[int]:
    """Yield the calls of one lane: 1, 7, 13 … for the first of six."""
    yield from range(lane + 1, 100, LANES)


def shown(cloud: LocalCloud, group: str) -> set[str]:
    """Return the nodes of GROUP that status shows and that still cost money, or may."""
    return {node["id"] for node in cloud.nodes(group) if node["state"] != "terminated"}


def see_and_end(cloud: LocalCloud, group: str, look: bool) -> None:
    """See all that exists in status, as soon as lists show it (if LOOK), and nothing left after terminateAll."""
    if look:  # both are asked again and again: a node that shuts down ends between two questions
        wait_until(lambda: shown(cloud, group) == set(cloud.truth(group)[0]))
    living, security_groups = cloud.truth(group)
    if look:
        assert bool(cloud.status(group)) == bool(living or security_groups)
    ended = cloud.cluster("terminateAll", group, limits={"UNSEEN_LIMIT": 1})
    assert ended.code == 0 or not (living or security_groups), ended.err
    assert cloud.truth(group) == ([], 0)


@pytest.mark.parametrize("lane", range(LANES))
@pytest.mark.parametrize("kind", ["kill-before", "kill-after"])
def test_create_killed_at_every_call(cloud: LocalCloud, kind: str, lane: int) -> None:
    for call in sweep(lane):
        group = f"{kind}-{call}"
        done = killed_at(cloud, call, kind, signal.SIGKILL, "createNodes", "c1.xlarge", "1", group)
        if done.code == 0:
            assert call > 12, "createNodes makes more calls than that: it was not killed"
            see_and_end(cloud, group, look=True)
            break
        assert done.code == -signal.SIGKILL
        if call % 3 == 0:
            again = cloud.cluster("createNodes", "c1.xlarge", "1", group)
            assert again.code == 0, again.err
        see_and_end(cloud, group, look=call % 2 == 0)


@pytest.mark.parametrize("kind", ["kill-before", "kill-after"])
def test_terminate_killed_at_every_call(cloud: LocalCloud, kind: str) -> None:
    for call in range(1, 100):
        group = f"end-{kind}-{call}"
        assert cloud.cluster("createNodes", "c1.xlarge", "1", group).code == 0
        done = killed_at(cloud, call, kind, signal.SIGKILL, "terminateAll", group)
        see_and_end(cloud, group, look=call % 2 == 0)
        if done.code == 0:
            assert call > 4
            break


@pytest.mark.parametrize("lane", range(LANES))
def test_create_interrupted_at_every_call(cloud: LocalCloud, lane: int) -> None:
    for call in sweep(lane):
        group = f"interrupt-{call}"
        done = killed_at(cloud, call, "kill-after", signal.SIGINT, "createNodes", "c1.xlarge", "1", group)
        if done.code == 0:
            break
        assert done.code == 130, done.err
        assert done.last_line.startswith("Interrupted.")
        living, _ = cloud.truth(group)
        if living:
            assert f"./cluster.py terminateAll {group} ends them" in done.last_line
        see_and_end(cloud, group, look=call % 2 == 0)
