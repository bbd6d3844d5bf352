"""Engine B: every kind of fault at every operation, at the first, a middle and the last request, once, thrice, or until
somebody mends it. Rows 24 to 29, and 31.

Whatever happens the bucket stays true, exit 0 means that all is listed (or restored), and one run after the fault has
ended puts all right.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from faultproxy import (
    LOST_ACK,
    SLOW_DOWN,
    Action,
    BlackHole,
    Cut,
    Drop,
    FaultProxy,
    Flip,
    Respond,
    Rule,
    count,
    s3_error,
)

from faults.kit import Process, Program, World, run_all, sample, score
from faults.s3 import Object, StrictS3
from faults.test_matrix import age, partial, prune, pruned, restored, three_days

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SOME = 5  # cases of each kind in `make test`
FOREVER_S = 1.2  # until somebody mends it

KINDS: dict[str, Callable[[], Action]] = {
    "500": lambda: s3_error(500, "InternalError"),
    "503": lambda: SLOW_DOWN,
    "403": lambda: s3_error(403, "AccessDenied"),
    "408": lambda: s3_error(408, "RequestTimeout"),
    "portal": lambda: Respond(200, b"<html>please log in</html>", {"Content-Type": "text/html"}),
    "reset": lambda: Drop("before"),
    "cut-request": lambda: Cut("request", 10),
    "cut-reply": lambda: Cut("reply", 10),
    "black-hole": BlackHole,
    "lost-ack": lambda: LOST_ACK,
    "flip": lambda: Flip(5),
    "flip-reply": lambda: Flip(5, "reply"),
}


class Operation(NamedTuple):
    """What is broken, in which scene; `path` is searched in path, query and key."""

    scene: str
    method: str
    path: str


OPERATIONS = {
    "put": Operation("small", "PUT", r"^/bucket/node1/"),
    "listing": Operation("small", "PUT", r"\.listings/ks1/"),
    "owner": Operation("small", "PUT", r"/owner"),
    "head": Operation("small", "HEAD", ""),
    "list": Operation("small", "GET", "list-type=2"),
    "get": Operation("small", "GET", r"^/bucket/node1"),
    "create": Operation("large", "POST", r"\?uploads"),
    "part": Operation("large", "PUT", "partNumber="),
    "complete": Operation("large", "POST", "uploadId="),
    "restore-list": Operation("restore", "GET", "list-type=2"),
    "restore-get": Operation("restore", "GET", r"^/bucket/node1/"),
    "prune-list": Operation("prune", "GET", "list-type=2"),
    "prune-get": Operation("prune", "GET", r"^/bucket/node1"),
    "prune-mark": Operation("prune", "PUT", r"\.pending-delete/"),
    "prune-delete": Operation("prune", "DELETE", ""),
}
# Over plain HTTP nothing tells that a bit of a list or of a JSON has flipped: only bodies of files carry checksums.
CHECKED = {"flip": {"put", "listing", "owner", "part"}, "flip-reply": {"restore-get"}}


class Case(NamedTuple):
    """One cell of the product."""

    kind: str
    operation: str
    nth: int
    count: int | None


class Stage(NamedTuple):
    """What the cases of a scene begin with: objects, and how many requests of each operation there are."""

    objects: dict[str, Object]
    totals: dict[str, int]


@contextlib.contextmanager
def scene_of(
    name: str, at: Path, program: Program, objects: dict[str, Object]
) -> Iterator[tuple[World, FaultProxy, Callable[[], Process]]]:
    """Yield a world, the proxy before its store, and what starts the process whose requests are broken."""
    with StrictS3() as bucket, FaultProxy(bucket.url) as proxy:
        world = World(at, program, bucket)
        if name != "prune":
            world.populate(9 << 20 if name == "large" else 300)
        bucket.store.update(objects)
        world.environ = bucket.through(proxy.url)
        starts: dict[str, Callable[[], Process]] = {
            "small": lambda: world.watch("--once"),
            "large": lambda: world.watch("--once"),
            "restore": lambda: world.command("restore", "--tag", "daily", "--into", at / "into"),
            "prune": lambda: prune(world),
        }
        yield world, proxy, starts[name]
        shutil.rmtree(at)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, program: Program) -> dict[str, Stage]:
    """Return each scene as a run without faults makes it."""
    at, found = tmp_path_factory.mktemp("stages"), {}
    for scene in {operation.scene for operation in OPERATIONS.values()}:
        with StrictS3() as bucket:
            world = World(at / "before" / scene, program, bucket)
            if scene == "prune":
                three_days(world)
                assert prune(world).wait() == 0
                age(world)
            if scene == "restore":
                world.populate()
                assert world.once() == 0
            objects = dict(bucket.store)
        with scene_of(scene, at / scene, program, objects) as (_, proxy, start):
            assert start().wait() == 0
            totals = {name: count(proxy.trace, one.method, one.path) for name, one in OPERATIONS.items()}
        found[scene] = Stage(objects, totals)
    return found


def judge(scene: str, world: World, start: Callable[[], Process], code: int) -> list[str]:
    """Return what is wrong after the process that met the fault, and after another one without."""
    into = world.at / "into"
    if scene == "prune":
        return pruned(world)
    if scene == "restore":
        problems = partial(world, into) if into.exists() else []
        if code == 0 and restored(world, into):
            problems.append("FALSE DONE")
        again = start().wait()
        return problems + [f"exit {again}"] * bool(again) + restored(world, into)
    problems = world.judge(done=code == 0)
    if code == 0:
        return problems + ["FALSE DONE"] * bool(problems)
    again = world.once()
    return problems + [f"exit {again}: {world.log()[-2000:]}"] * bool(again) + world.judge(done=True)


def cases_of(kind: str, stages: dict[str, Stage]) -> Iterator[Case]:
    """Yield the cases of a kind."""
    for name in CHECKED.get(kind, OPERATIONS):
        total = stages[OPERATIONS[name].scene].totals[name]
        assert total, f"{name}: no such request"
        places = sorted({1, (total + 1) // 2, total})
        yield from (Case(kind, name, *one) for one in itertools.product(places, (1, 3, None)))


def meet(process: Process, proxy: FaultProxy, rule: Rule, *, lasts: bool) -> int:
    """Let a process meet the fault; mend what lasts, after a while; return its exit code."""
    deadline = time.monotonic() + 10
    while lasts and process.poll() and rule.hits < rule.nth and time.monotonic() < deadline:
        time.sleep(0.02)
    if lasts:
        time.sleep(FOREVER_S)
        proxy.heal()
    if isinstance(rule.action, BlackHole):  # else it would hold the connection for a minute
        proxy.down()
        proxy.up()
    code = process.wait(150)
    proxy.heal()
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_store_or_the_network_costs_only_time_row24_to_row29(
    tmp_path: Path, program: Program, stages: dict[str, Stage], kind: str
) -> None:
    met: list[Case] = []

    def run(case: Case) -> list[str]:
        operation = OPERATIONS[case.operation]
        at = tmp_path / f"{case.operation}-{case.nth}-{case.count}"
        with scene_of(operation.scene, at, program, stages[operation.scene].objects) as (world, proxy, start):
            rule = proxy.on(operation.method, operation.path, KINDS[kind](), case.nth, case.count)
            code = meet(start(), proxy, rule, lasts=case.count is None or kind == "black-hole")
            if rule.hits >= rule.nth:
                met.append(case)
            return judge(operation.scene, world, start, code)

    problems = run_all(sample(list(cases_of(kind, stages)), SOME), run)
    score(fault_cases=len(met))
    assert problems == []
