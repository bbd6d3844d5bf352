"""SIGKILL at any moment, then a start: everything is listed in the end, nothing is sent twice, no pin is left."""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from conftest import Daemon, Run
from faultproxy import FaultProxy, assert_written_once, kill, writes
from scene import Scene, area_of, assert_no_pin_is_left, pins, wait_for
from servers import Bucket, FileBucket
from storm import Storm
from tree import Node


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


def assert_no_listing_is_superseded_by_a_worse_one(scene: Scene) -> None:
    """Fail if a later listing of one taking has fewer files, or is incomplete after a complete one."""
    for of in {found.of for found in scene.listings("snapshot")}:
        chain = [found for found in scene.listings("snapshot") if found.of == of]
        for before, after in itertools.pairwise(chain):
            assert {entry.path for entry in before.entries} <= {entry.path for entry in after.entries}
            assert (before.state, after.state) != ("complete", "incomplete")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thirty_kills_at_random_moments_under_churn_lose_nothing_p1(scene: Scene, node: Node) -> None:
    """P1: listed means restorable, also at the moment of death."""
    chance = random.Random(7)
    tables = [node.table("ks1", f"t{number}", indexes=["by_name"] * (number % 2)) for number in range(4)]
    scene.start(*node.data_dirs)
    for number in range(30):
        for table in chance.sample(tables, 2):
            table.flush(size=chance.choice([100, 20_000]))
        node.snapshot(f"tag{number % 5}", chance.sample(tables, 2)) if number < 5 else tables[0].rewrite_statistics()
        if number % 7 == 6:
            tables[1].compact()
        time.sleep(chance.uniform(0.0, 1.2))
        scene.daemon.kill()
        assert oracle.problems(scene.bucket.objects(), "node1") == []
        scene.daemon.start()
    scene.until_it_watches()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert_no_listing_is_superseded_by_a_worse_one(scene)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    assert_no_pin_is_left(area_of(node))
    bodies = Counter(body for key, body in scene.bucket.objects().items() if "-Data.db" in key)
    assert [count for count in bodies.values() if count > 1] == [], "the same SSTable was stored twice"


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.15, 0.4])
def test_a_kill_in_the_middle_of_a_release_loses_nothing_and_lists_nothing_worse(
    scene: Scene, tmp_path: Path, moment: float
) -> None:
    storm = Storm(tmp_path / "data", tables=80, components=8)
    storm.seed()
    scene.start(storm.root)
    storm.snapshot("daily")
    area = tmp_path / ".cassbackup"
    wait_for(lambda: len(scene.listings("snapshot")) >= 20)
    time.sleep(moment)
    scene.daemon.kill()
    assert oracle.problems(scene.bucket.objects(), "node1") == []
    storm.clear("daily")
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(storm.history)
    assert_no_listing_is_superseded_by_a_worse_one(scene)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    assert len(scene.listings("snapshot")) == 80
    assert_no_pin_is_left(area)
    assert list(pins(area)) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["before", "sent", "stored", "replied"])
@pytest.mark.parametrize("what", [r"^/[^/]+/node1/.*-Index\.db", r"\.listings/ks1"])
def test_a_kill_at_a_boundary_of_the_store_loses_nothing_and_sends_nothing_twice(
    scene: Scene, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy], what: str, stage: str
) -> None:
    between = proxy(moto)
    scene.bucket, scene.environ = moto, moto.through(between.url)
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    between.down()
    users.flush()
    node.snapshot("daily")
    scene.until_found(8 + 8 + 18)  # it is cleared below: what is not held by then is nobody's
    rule = between.on("PUT", what, kill(lambda: scene.daemon.pid, at=stage))  # type: ignore[arg-type]
    between.up()
    assert rule.acted.wait(120)
    scene.daemon.process.wait()
    assert oracle.problems(moto.objects(), "node1") == []
    node.clear("daily")
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert_written_once(between.trace)
    assert_no_pin_is_left(area_of(node))
    stored = Counter(
        (write.size, write.crc32)
        for write in writes(between.trace)
        if write.key.startswith("node1/") and "TOC.txt" not in write.key
    )
    assert [found for found, count in stored.items() if count > 2] == []
    assert not [key for key in scene.file_keys() if "@" in key]
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}


@pytest.mark.slow
def test_a_killed_upload_in_parts_goes_on_where_it_was(
    scene: Scene, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    between = proxy(moto)
    scene.bucket, scene.environ = moto, moto.through(between.url)
    users = node.table("ks1", "users")
    scene.start(*node.data_dirs, args=("--threads", "1"))  # moto answers 500 when it lists parts with a gap
    rule = between.on("PUT", r"partNumber=4", kill(lambda: scene.daemon.pid, at="before"))
    users.flush(size=50 << 20)
    assert rule.acted.wait(120)
    scene.daemon.process.wait()
    users.compact()
    scene.restart()
    scene.daemon.wait_until(lambda: scene.page()["pending"]["units"] == 0)
    scene.assert_all_is_listed(node.history)
    data = [event for event in between.trace if "partNumber=1" in event.path and event.stored == 200]
    assert len(data) <= 2
    assert_written_once(between.trace)
    assert_no_pin_is_left(area_of(node))


@pytest.mark.slow
@pytest.mark.parametrize("again", ["whole", "begun"])
def test_a_tag_cleared_and_taken_again_after_a_kill_is_not_taken_for_the_one_before(
    scene: Scene, node: Node, again: str
) -> None:
    """The kill came before manifest.json: only the names tell that these are two takings."""
    node.incremental = False
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--settle", "600"))
    users.sstables[0].link("snapshots/daily", node.history, users.unit("daily"))
    wait_for(lambda: scene.page()["counts"].get("found", 0) == 8)
    scene.daemon.kill()
    node.clear()
    users.compact()
    if again == "whole":
        node.snapshot("daily")
    else:
        users.sstables[0].link("snapshots/daily", node.history, users.unit("daily"))
    scene.daemon.command[scene.daemon.command.index("600")] = "1"
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    states = {found.of.taking: found.state for found in scene.listings("snapshot")}
    assert sorted(states.values()) == sorted(["incomplete", "complete" if again == "whole" else "incomplete"])
    assert_no_pin_is_left(area_of(node))


@pytest.mark.slow
def test_a_ledger_trimmed_while_a_tag_is_cleared_does_not_take_the_next_taking_for_it(scene: Scene, node: Node) -> None:
    """P4: nodetool clearsnapshot takes one file away after the other, and the trimming may come in between."""
    node.incremental = False
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    node.snapshot("daily")
    scene.settled()
    scene.daemon.stop()
    with contextlib.closing(sqlite3.connect(scene.state / "ledger.sqlite")) as db, db:
        db.execute("DELETE FROM facts WHERE name = 'trimmed'")
    scene.restart()
    for name in ("manifest.json", "schema.cql"):
        (users.directories()[0] / "snapshots" / "daily" / name).unlink()

    def trimmed() -> bool:
        with contextlib.closing(sqlite3.connect(scene.state / "ledger.sqlite")) as db:
            return bool(db.execute("SELECT * FROM facts WHERE name = 'trimmed'").fetchall())

    wait_for(trimmed)
    scene.daemon.kill()
    node.clear()
    node.snapshot("daily")
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert [found.state for found in scene.listings("snapshot")] == ["complete", "complete"]
    assert len({found.of.taking for found in scene.listings("snapshot")}) == 2
