"""Engine A: SIGKILL at every boundary, once each. Rows 1, 2, 17, 46 and 47.

Boundaries on disk are the calls that change it, counted by boundaries.c; those at the store are the stages of each
request, counted by the fault proxy. At the moment of death the bucket must be true (P1, P3). Then, where all was held,
Cassandra clears its snapshots, and the next run must end with 0, list everything and leave no pin.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
from faultproxy import Event, FaultProxy, Stage, kill

from faults.kit import KILLED, Process, Program, World, run_all, sample, score
from faults.s3 import StrictS3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STAGES: tuple[Stage, ...] = ("before", "middle", "sent", "stored", "replied")
SOME = 6  # points of each matrix in `make test`
DAY = 25 * 3600.0


class Point(NamedTuple):
    """A boundary: a number among those on disk, or of a request and a stage of it."""

    number: int
    stage: Stage | None = None


def points_of(trace: list[Event]) -> list[Point]:
    """Return the boundaries of a recorded run; a request without a body has no middle."""
    return [Point(event.number + 1, stage) for event in trace for stage in STAGES if event.size or stage != "middle"]


def recorded(log: Path) -> list[Point]:
    """Return the boundaries that the shim has noted."""
    return [Point(number + 1) for number in range(len(log.read_text().splitlines()))]


def examine(name: str, points: list[Point], problems: list[str], killed: int) -> None:
    """Add to the scorecard, and fail if anything was wrong."""
    score(kill_points=killed, kill_points_survived=killed - len({text.split(":")[0] for text in problems}))
    assert killed >= len(points) * 0.7, f"{name}: only {killed} of {len(points)} were reached"
    assert problems == []


# ------------------------------------------------------------------------------------------------------------
# The daemon


def converges(world: World) -> list[str]:
    """Return what is wrong at the moment of death, and after the next run."""
    problems = world.judge()
    if not world.unheld(world.bucket.objects()):
        world.node.clear()
    again = world.once()
    problems += world.judge(done=True)
    if again:
        problems.append(f"exit {again}: {world.log()[-2000:]}")
    elif any("LOST" in problem for problem in problems):
        problems.append("FALSE DONE")
    return problems


def test_a_daemon_killed_at_any_boundary_on_disk_loses_nothing_row2(tmp_path: Path, shimmed: Program) -> None:
    def start(number: int, env: dict[str, str]) -> tuple[World, int]:
        world = World(tmp_path / f"{number}", shimmed)
        world.populate()
        return world, world.once(env=env)

    log = tmp_path / "boundaries"
    assert start(0, {"BOUNDARY_LOG": str(log)})[0].judge(done=True) == []
    points = sample(recorded(log), SOME)
    killed: list[Point] = []

    def run(point: Point) -> list[str]:
        world, code = start(point.number, {"BOUNDARY_KILL": str(point.number)})
        if code == KILLED:
            killed.append(point)
        problems = converges(world)
        shutil.rmtree(world.at)
        return problems

    problems = run_all(points, run)
    examine("daemon on disk", points, problems, len(killed))


@contextlib.contextmanager
def stage_set(at: Path, program: Program, point: Point | None) -> Iterator[tuple[World, FaultProxy, list[Process]]]:
    """Yield a world before an S3, and the proxy between that kills the process in the list at a point."""
    with StrictS3() as bucket, FaultProxy(bucket.url) as proxy:
        world = World(at, program, bucket)
        world.environ = bucket.through(proxy.url)
        processes: list[Process] = []
        if point:
            proxy.on("", "", kill(lambda: processes[-1].pid, point.stage or "before"), nth=point.number)
        yield world, proxy, processes
        shutil.rmtree(at)


def test_a_daemon_killed_at_any_request_loses_nothing_row1_row17(tmp_path: Path, program: Program) -> None:
    with stage_set(tmp_path / "first", program, None) as (world, proxy, _):
        world.populate(9 << 20)
        assert world.once() == 0
        points = sample(points_of(proxy.trace), SOME)
    killed: list[Point] = []

    def run(point: Point) -> list[str]:
        with stage_set(tmp_path / f"{point.number}-{point.stage}", program, point) as (world, proxy, processes):
            world.populate(9 << 20)
            processes.append(world.watch("--once"))
            if processes[-1].wait() == KILLED:
                killed.append(point)
            proxy.heal()
            problems = converges(world)
            twice = [key for key in world.bucket.keys() if "@" in key and key.startswith("node1/")]  # noqa: SIM118
            return problems + [f"{key}: sent under a second key" for key in twice]

    problems = run_all(points, run)
    examine("daemon at the store", points, problems, len(killed))


# ------------------------------------------------------------------------------------------------------------
# Restore


def partial(world: World, into: Path) -> list[str]:
    """Return the files under a final name whose bytes are of no file that ever was."""
    known = {(copy.size, copy.sha1) for _, _, copy in world.node.history.files()}
    found = oracle.survey(into, leave_out=())
    return [
        f"{path}: partial"
        for path, seen in found.items()
        if seen.sha1 and "/.cassbackup-" not in path and (os.path.getsize(path), seen.sha1) not in known
    ]


def restored(world: World, into: Path) -> list[str]:
    """Return the files of the snapshot that did not come back, and what else lies there."""
    files = [(path, copy) for unit, path, copy in world.node.history.files() if unit.tag == "daily"]
    wanted = sorted(copy.sha1 for path, copy in files if not path.endswith("manifest.json"))
    found = oracle.survey(into, leave_out=())
    there = sorted(seen.sha1 for seen in found.values() if seen.sha1)
    lacking = [one for one in wanted if one not in there]
    left = [path for path in found if "/.cassbackup-" in path]
    return [f"{len(lacking)} files did not come back"] * bool(lacking) + [f"{path}: left" for path in left]


def test_a_restore_killed_at_any_boundary_on_disk_leaves_no_partial_file_row46(
    tmp_path: Path, shimmed: Program
) -> None:
    world = World(tmp_path / "world", shimmed)
    world.populate()
    assert world.once() == 0
    outside = oracle.survey(world.node.root)

    def restore(into: Path, env: dict[str, str]) -> int:
        return world.command("restore", "--tag", "daily", "--into", into, env=env).wait()

    log = tmp_path / "boundaries"
    assert restore(tmp_path / "first", {"BOUNDARY_LOG": str(log)}) == 0
    points = sample(recorded(log), SOME)
    killed: list[Point] = []

    def run(point: Point) -> list[str]:
        into = tmp_path / f"into{point.number}"
        if restore(into, {"BOUNDARY_KILL": str(point.number)}) == KILLED:
            killed.append(point)
        problems = partial(world, into) if into.exists() else []
        code = restore(into, {})
        return problems + [f"exit {code}"] * bool(code) + restored(world, into)

    problems = run_all(points, run)
    assert oracle.untouched(outside, oracle.survey(world.node.root)) == []
    examine("restore on disk", points, problems, len(killed))


def test_a_restore_killed_at_any_request_goes_on_where_it_was_row46(tmp_path: Path, program: Program) -> None:
    with stage_set(tmp_path / "first", program, None) as (world, proxy, _):
        world.populate()
        assert world.once() == 0
        before = len(proxy.trace)

        def restore(into: Path) -> Process:
            return world.command("restore", "--tag", "daily", "--into", into)

        assert restore(tmp_path / "into").wait() == 0
        trace = proxy.trace[before:]
        for number, event in enumerate(trace):
            event.number = number
        points = sample(points_of(trace), SOME)
        killed: list[Point] = []

        def run(point: Point) -> list[str]:
            into, running = tmp_path / f"{point.number}-{point.stage}", []
            with FaultProxy(world.bucket.url) as between:
                action = kill(lambda: running[-1].pid, point.stage or "before")
                between.on("", "", action, nth=point.number)
                env = world.bucket.through(between.url)
                running.append(world.command("restore", "--tag", "daily", "--into", into, env=env))
                if running[-1].wait() == KILLED:
                    killed.append(point)
            problems = partial(world, into) if into.exists() else []
            code = restore(into).wait()
            return problems + [f"exit {code}"] * bool(code) + restored(world, into)

        problems = run_all(points, run)
        examine("restore at the store", points, problems, len(killed))


# ------------------------------------------------------------------------------------------------------------
# Prune


def three_days(world: World) -> None:
    """Fill a world's bucket with three snapshots that share some files."""
    users = world.node.table("ks1", "users")
    world.node.incremental = False
    for tag in ("one", "two", "three"):
        users.flush(size=500)
        world.node.snapshot(tag)
        assert world.once() == 0
        users.compact()
        world.node.clear()


def age(world: World) -> None:
    """Let a day pass for all marks that are there."""
    then = time.time() - DAY
    for path in (world.at / "bucket").glob("node1.pending-delete/*.json"):
        os.utime(path, (then, then))
    for key, found in getattr(world.bucket, "store", {}).items():
        if ".pending-delete/" in key:
            world.bucket.store[key] = found._replace(modified=then)  # type: ignore[attr-defined]


def prune(world: World, env: dict[str, str] | None = None) -> Process:
    return world.command("prune", "--keep-last", "2", "--confirm", env=env)


def pruned(world: World) -> list[str]:
    """Finish what a killed prune began; return what is wrong at its death and at the end."""
    problems = world.judge()
    for _ in range(3):
        code = prune(world).wait()
        problems += [f"exit {code}: {world.log()[-1000:]}"] * bool(code) + world.judge()
        age(world)
    if problems:
        return problems
    objects = world.bucket.objects()
    tags = {str(found.of.tag) for found in oracle.listings(objects, "node1")}
    problems += [f"tags {sorted(tags)}"] * (tags != {"two", "three"})
    named = {entry.key for found in oracle.listings(objects, "node1") for entry in found.entries}
    return problems + [f"{key}: nobody names it" for key in objects if key.startswith("node1/") and key not in named]


@pytest.mark.parametrize("later", [False, True], ids=["marking", "deleting"])
def test_a_prune_killed_at_any_boundary_on_disk_deletes_nothing_that_is_named_row47(
    tmp_path: Path, shimmed: Program, later: bool
) -> None:
    template = World(tmp_path / "world", shimmed)
    three_days(template)
    if later:
        assert prune(template).wait() == 0
    killed: list[Point] = []

    def start(name: str, env: dict[str, str]) -> tuple[World, int]:
        world = World(tmp_path / name, shimmed)
        shutil.copytree(template.at / "bucket", world.at / "bucket", dirs_exist_ok=True)
        age(world)
        return world, prune(world, env).wait()

    log = tmp_path / "boundaries"
    start("first", {"BOUNDARY_LOG": str(log)})
    points = sample(recorded(log), SOME)

    def run(point: Point) -> list[str]:
        world, code = start(f"{point.number}", {"BOUNDARY_KILL": str(point.number)})
        if code == KILLED:
            killed.append(point)
        return pruned(world)

    problems = run_all(points, run)
    examine("prune on disk", points, problems, len(killed))


@pytest.mark.parametrize("later", [False, True], ids=["marking", "deleting"])
def test_a_prune_killed_at_any_request_deletes_nothing_that_is_named_row47(
    tmp_path: Path, program: Program, later: bool
) -> None:
    with stage_set(tmp_path / "template", program, None) as (template, proxy, _):
        three_days(template)
        if later:
            assert prune(template).wait() == 0
            age(template)
        objects = dict(template.bucket.store)  # type: ignore[attr-defined]
        before = len(proxy.trace)
        assert prune(template).wait() == 0
        trace = proxy.trace[before:]
    for number, event in enumerate(trace):
        event.number = number
    points, killed = sample(points_of(trace), SOME), list[Point]()

    def run(point: Point) -> list[str]:
        with stage_set(tmp_path / f"{point.number}-{point.stage}", program, point) as (world, proxy, processes):
            world.bucket.store.update(objects)  # type: ignore[attr-defined]
            processes.append(prune(world))
            if processes[-1].wait() == KILLED:
                killed.append(point)
            proxy.heal()
            return pruned(world)

    problems = run_all(points, run)
    examine("prune at the store", points, problems, len(killed))
