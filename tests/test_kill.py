"""SIGKILL at any moment, then a start: everything is listed in the end, nothing is sent twice, no pin is left.

At every boundary, one by one, processes are killed in faults/test_matrix.py.

Each kill runs once in `make test`, and twenty times alone and twenty beside two busy processes in `make test-all`.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from conftest import Daemon, Run
from faultproxy import FaultProxy, assert_written_once, kill
from scene import Scene, area_of, assert_no_pin_is_left, wait_for
from servers import Bucket, FileBucket
from storm import Storm
from tree import Node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


def assert_no_listing_is_superseded_by_a_worse_one(scene: Scene) -> None:
    """Fail if a later listing of one life has fewer files, or is incomplete after a complete one."""
    for of in {found.of for found in scene.listings("snapshot")}:
        chain = [found for found in scene.listings("snapshot") if found.of == of]
        for before, after in itertools.pairwise(chain):
            assert {entry.path for entry in before.entries} <= {entry.path for entry in after.entries}
            assert (before.state, after.state) != ("complete", "incomplete")


class Memory:
    """The state directory of a daemon that is dead, and what may happen to it: P4."""

    def __init__(self, state: Path, chance: random.Random) -> None:
        self.state, self.chance = state, chance
        self.old = state.with_name("old-state")

    def harm(self) -> None:
        """Leave it as it is, keep a copy of it, put the copy back in its place, or take it away."""
        what = self.chance.choice(["nothing", "copy", "roll back", "lose"])
        if what == "copy" and self.state.exists():  # a daemon may have died before it made one
            shutil.rmtree(self.old, ignore_errors=True)
            shutil.copytree(self.state, self.old, ignore=shutil.ignore_patterns("socket*"))
        elif what == "lose" or (what == "roll back" and self.old.exists()):
            shutil.rmtree(self.state, ignore_errors=True)
            if what == "roll back":
                shutil.copytree(self.old, self.state)


def test_kills_at_random_moments_under_churn_lose_nothing_p1_p3_p4(scene: Scene, node: Node, run_number: int) -> None:
    """P1, P3 and P4, at the moment of death and after it, whatever becomes of the state directory."""
    chance = random.Random(run_number)
    memory = Memory(scene.state, chance)
    tables = [node.table("ks1", f"t{number}", indexes=["by_name"] * (number % 2)) for number in range(4)]
    scene.start(*node.data_dirs)
    before: dict[str, bytes] = {}
    for number in range(10):
        for table in chance.sample(tables, 2):
            table.flush(size=chance.choice([100, 20_000]))
        if number == 6:
            scene.until_it_watches()
            scene.settled()
            node.clear("tag0")
        if number in {0, 3, 6}:
            node.snapshot(f"tag{number % 6}", chance.sample(tables, 2))  # tag0 is taken again
        else:
            chance.choice(tables).rewrite_statistics()
        time.sleep(chance.uniform(0.0, 1.2))
        scene.daemon.kill()
        objects = scene.bucket.objects()
        assert oracle.problems(objects, "node1") == []
        assert oracle.rewritten(before, objects) == []
        before = objects
        memory.harm()
        scene.daemon.start()
    scene.until_it_watches()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert oracle.rewritten(before, scene.bucket.objects()) == []
    assert_no_listing_is_superseded_by_a_worse_one(scene)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    assert_no_pin_is_left(area_of(node))


def test_a_kill_while_pins_are_let_go_loses_nothing_and_lists_nothing_worse(
    scene: Scene, tmp_path: Path, run_number: int
) -> None:
    storm = Storm(tmp_path / "data", tables=60, components=8)
    storm.seed()
    scene.start(storm.root)
    storm.snapshot("daily")
    wait_for(lambda: len(scene.listings("snapshot")) >= 15)
    time.sleep(random.Random(run_number).uniform(0.0, 0.4))
    scene.daemon.kill()
    assert oracle.problems(scene.bucket.objects(), "node1") == []
    storm.clear("daily")
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(storm.history)
    assert_no_listing_is_superseded_by_a_worse_one(scene)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    assert len(scene.listings("snapshot")) == 60
    assert_no_pin_is_left(tmp_path / ".cassbackup")


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
    scene.settled()
    scene.assert_all_is_listed(node.history)
    data = [event for event in between.trace if "partNumber=1" in event.path and event.stored == 200]
    assert len(data) <= 2
    assert_written_once(between.trace)
    assert_no_pin_is_left(area_of(node))


@pytest.mark.parametrize("again", ["complete", "begun"])
def test_a_tag_cleared_and_taken_again_after_a_kill_is_not_taken_for_the_one_before(
    scene: Scene, node: Node, again: str
) -> None:
    """The kill came before manifest.json: only the names tell that these are two lives."""
    node.incremental = False
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--incomplete-after", "600s"))
    users.sstables[0].link("snapshots/daily", node.history, users.unit("daily"))
    scene.until_found(8)
    scene.daemon.kill()
    node.clear()
    users.compact()
    if again == "complete":
        node.snapshot("daily")
    else:
        users.sstables[0].link("snapshots/daily", node.history, users.unit("daily"))
    scene.daemon.command[scene.daemon.command.index("600s")] = "1s"
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    states = {found.of.life: found.state for found in scene.listings("snapshot")}
    assert sorted(states.values()) == sorted(["incomplete", "complete" if again == "complete" else "incomplete"])
    assert_no_pin_is_left(area_of(node))
