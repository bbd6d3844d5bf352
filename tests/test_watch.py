"""P2, nothing is skipped silently: after a storm of links the set in the listings equals the set created."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from conftest import Daemon, Run
from scene import Scene, area_of, assert_no_pin_is_left, wait_for
from servers import FileBucket
from storm import Storm
from tree import Node

QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


@contextlib.contextmanager
def queue_of(events: int) -> Iterator[None]:
    """Have the inotify queues that are made inside hold only so many events."""
    before = QUEUE.read_text()
    try:
        QUEUE.write_text(str(events))
    except OSError as error:
        pytest.skip(f"{QUEUE} cannot be set: {error}")
    try:
        yield
    finally:
        QUEUE.write_text(before)


def assert_the_sets_are_equal(scene: Scene, storm: Storm) -> None:
    """Fail if anything created is not listed, or anything listed was never created (P2)."""
    scene.assert_all_is_listed(storm.history)
    listed = {entry.path for found in scene.listings() for entry in found.entries}
    assert listed == {path for _, path, _ in storm.history.files()}


def test_every_link_into_new_directories_is_listed_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=60, components=8)
    storm.root.mkdir()
    scene.start(storm.root)
    storm.seed()
    storm.snapshot("daily")
    storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)
    assert_no_pin_is_left(tmp_path / ".cassbackup")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_link_of_a_storm_over_2000_tables_is_listed_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=2000, components=8)
    storm.seed()
    scene.start(storm.root)
    storm.snapshot("daily")
    scene.settled(500)  # 22,000 objects, each with its fsync
    assert_the_sets_are_equal(scene, storm)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_storms_in_a_row_lose_nothing_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=150, components=8)
    storm.seed()
    scene.start(storm.root)
    for number in range(20):
        storm.snapshot(f"run{number}")
    scene.settled(500)
    assert_the_sets_are_equal(scene, storm)
    states = {found.state for found in scene.listings("snapshot")}
    assert states == {"complete"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_bursts_into_backups_that_exist_lose_nothing_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=20, components=16)
    storm.seed()
    scene.start(storm.root)
    storm.backups()
    for _ in range(19):
        storm = storm.wave()
        storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_storms_over_secondary_indexes_lose_nothing_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=60, components=8, indexes=3)
    storm.seed()
    scene.start(storm.root)
    for number in range(5):
        storm.snapshot(f"run{number}")
    storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_with_a_queue_of_64_events_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=100, components=8)
    with queue_of(64):
        storm.root.mkdir()
        scene.start(storm.root)
    storm.seed()  # flushes make events in the live tables' directories too
    for number in range(5):
        storm.snapshot(f"run{number}")
    storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [(60, 80), (300, 8)])
def test_a_snapshot_that_is_cleared_a_second_after_its_last_link_is_whole(
    scene: Scene, tmp_path: Path, shape: tuple[int, int]
) -> None:
    storm = Storm(tmp_path / "data", tables=shape[0], components=shape[1])
    storm.seed()
    scene.start(storm.root)
    storm.snapshot("daily", clear_after_ms=1000)
    scene.settled()
    assert_the_sets_are_equal(scene, storm)
    assert {found.state for found in scene.listings()} == {"complete"}
    assert_no_pin_is_left(tmp_path / ".cassbackup")


@pytest.mark.slow
def test_directories_that_are_renamed_moved_in_and_made_again_are_seen(
    scene: Scene, node: Node, tmp_path: Path
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    node.snapshot("daily")
    scene.settled()
    home = users.directories()[0]
    (home / "snapshots" / "daily").rename(home / "snapshots" / "renamed")
    whole = tmp_path / "elsewhere"
    shutil.copytree(home / "snapshots" / "renamed", whole)
    whole.rename(home / "snapshots" / "moved-in")
    shutil.rmtree(home / "backups")
    users.flush()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    states = {found.of.tag: found.state for found in scene.listings("snapshot")}
    assert states == {"daily": "complete", "renamed": "complete", "moved-in": "complete"}


def test_the_pin_area_itself_is_never_watched(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--pin-dir", node.data_dirs[0] / ".cassbackup" / "backups"))
    area = node.data_dirs[0] / ".cassbackup"
    node.snapshot("daily")
    scene.settled()
    ours = {os.stat(folder).st_ino for folder, _, _ in os.walk(area)}
    watched = watched_inodes(scene.daemon.pid)
    assert os.stat(users.directories()[0] / "backups").st_ino in watched
    assert not watched & ours
    listed = {entry.path for found in scene.listings() for entry in found.entries}
    assert not [path for path in listed if ".cassbackup" in path]
    assert scene.page()["counts"]["found"] == len(list(node.history.files()))


def watched_inodes(pid: int) -> set[int]:
    """Return the inode numbers that a process watches."""
    found = set()
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile; the one of inotify never is
            told = re.findall(r"^inotify .*?ino:([0-9a-f]+)", file.read_text(), re.M)
            found.update(int(number, 16) for number in told)
    return found


@pytest.mark.slow
def test_watches_of_cleared_snapshots_are_given_back(scene: Scene, node: Node) -> None:
    for number in range(10):
        node.table("ks1", f"t{number}").flush()
    scene.start(*node.data_dirs)
    scene.settled()
    before = len(watched_inodes(scene.daemon.pid))
    for number in range(5):
        node.snapshot(f"tag{number}")
        scene.settled()
        node.clear(f"tag{number}")
    wait_for(lambda: len(watched_inodes(scene.daemon.pid)) <= before + 10)  # snapshots/ of each table stays


@pytest.mark.slow
def test_the_tree_is_as_it_was_after_a_backup_p5(scene: Scene, node: Node) -> None:
    """P5: do no harm."""
    for name in ("users", "posts"):
        node.table("ks1", name, indexes=["by_name"]).flush()
    node.snapshot("daily")
    before = oracle.survey(node.root)
    scene.start(*node.data_dirs)
    scene.settled()
    assert_no_pin_is_left(area_of(node))
    assert scene.daemon.stop() == 0
    assert oracle.untouched(before, oracle.survey(node.root)) == []
