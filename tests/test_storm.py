"""P2, nothing is skipped silently: after a storm of links the set in the listings equals the set created.

Each storm runs once in `make test`, and twenty times alone and twenty beside two busy processes in `make test-all`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Daemon, Run
from scene import Scene, assert_no_pin_is_left
from servers import FileBucket
from storm import Storm

QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
pytestmark = pytest.mark.timeout(600)


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
    """Fail if anything created is not listed, or anything listed was never created, or a snapshot is not complete."""
    scene.assert_all_is_listed(storm.history)
    listed = {entry.path for found in scene.listings() for entry in found.entries}
    assert listed == {path for _, path, _ in storm.history.files()}
    assert {found.state for found in scene.listings("snapshot")} <= {"complete"}


def test_a_storm_into_new_directories_is_listed_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=40, components=8)
    storm.root.mkdir()
    scene.start(storm.root)
    storm.seed()
    storm.snapshot("daily")
    storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)
    assert_no_pin_is_left(tmp_path / ".cassbackup")


@pytest.mark.slow
def test_a_storm_over_secondary_indexes_is_listed_p2(scene: Scene, tmp_path: Path, run_number: int) -> None:
    storm = Storm(tmp_path / "data", tables=50, components=8, indexes=3)
    storm.seed()
    scene.start(storm.root)
    storm.snapshot("daily")
    storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)


@pytest.mark.slow
def test_bursts_into_backups_that_exist_are_listed_p2(scene: Scene, tmp_path: Path, run_number: int) -> None:
    storm = Storm(tmp_path / "data", tables=20, components=16)
    storm.seed()
    scene.start(storm.root)
    storm.backups()
    for _ in range(5):
        storm = storm.wave()
        storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)


@pytest.mark.slow
def test_a_storm_with_a_queue_of_64_events_is_listed_p2(scene: Scene, tmp_path: Path, run_number: int) -> None:
    storm = Storm(tmp_path / "data", tables=100, components=8)
    with queue_of(64):
        storm.root.mkdir()
        scene.start(storm.root)
    storm.seed()  # flushes make events in the live tables' directories too
    storm.snapshot("daily")
    storm.backups()
    scene.settled()
    assert_the_sets_are_equal(scene, storm)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(60, 80), (300, 8)], ids=["few-large-tables", "many-small-tables"])
def test_a_snapshot_that_is_cleared_a_second_after_its_last_link_is_complete_p2(
    scene: Scene, tmp_path: Path, run_number: int, shape: tuple[int, int]
) -> None:
    storm = Storm(tmp_path / "data", tables=shape[0], components=shape[1])
    storm.seed()
    scene.start(storm.root)
    storm.snapshot("daily", clear_after_ms=1000)
    scene.settled(500)
    assert_the_sets_are_equal(scene, storm)
    assert_no_pin_is_left(tmp_path / ".cassbackup")


@pytest.mark.by_hand
def test_a_storm_over_2000_tables_is_listed_p2(scene: Scene, tmp_path: Path) -> None:
    storm = Storm(tmp_path / "data", tables=2000, components=8)
    storm.seed()
    scene.start(storm.root)
    storm.snapshot("daily")
    scene.settled(500)  # 22,000 objects, each with its fsync
    assert_the_sets_are_equal(scene, storm)
