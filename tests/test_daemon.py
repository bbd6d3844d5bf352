"""The daemon's life: stores that go away, lost memory, locks, signals, exit codes, limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
from conftest import Daemon, Run
from faultproxy import BlackHole, Call, Delay, FaultProxy, assert_written_once, s3_error
from scene import Scene, area_of, assert_no_pin_is_left, pins, wait_for
from servers import Bucket, FileBucket
from shelf import DAY, EPOCH, NODE, Door, Shelf, snapshot, unit_of
from tree import Node

import cassbackup
from cassbackup import (
    Backup,
    Changed,
    Fingerprint,
    Known,
    Ledger,
    Listing,
    Pinned,
    Stored,
    Throttled,
    Touched,
    Unit,
    Workers,
    utc,
)


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


@pytest.fixture
def between(scene: Scene, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]) -> FaultProxy:
    """Put the scene on S3, behind a proxy that can be taken down."""
    found = proxy(moto)
    scene.bucket, scene.environ = moto, moto.through(found.url)
    return found


def start_shortened(scene: Scene, node: Node, *args: object, **constants: float) -> None:
    """Start a daemon whose limits are shorter, once it has stored what there is: no test waits for minutes."""
    scene.start(*node.data_dirs, args=args)
    scene.settled()
    scene.daemon.stop()
    lines = ["import sys, cassbackup", *(f"cassbackup.{name} = {value}" for name, value in constants.items())]
    lines.append("sys.exit(cassbackup.main(sys.argv[1:]))")
    command = scene.daemon.command
    place = command.index("watch")
    command[place - 1 : place] = ["-c", "\n".join(lines)]
    scene.restart()


def newest_heartbeat(bucket: Bucket) -> dict[str, Any]:
    """Return what the last heartbeat says."""
    objects = bucket.objects()
    found: dict[str, Any] = json.loads(objects[max(key for key in objects if "/heartbeat/" in key)])
    return found


def kept(bucket: Bucket) -> dict[str, bytes]:
    """Return what must stay for ever: everything but heartbeats."""
    return {key: body for key, body in bucket.objects().items() if "/heartbeat/" not in key}


def assert_kept(before: dict[str, bytes], bucket: Bucket) -> None:
    """Fail if a key's bytes changed (P3)."""
    now = bucket.objects()
    assert {key: now.get(key) for key in before} == before


# ------------------------------------------------------------------------------------------------------------
# The store


@pytest.mark.slow
def test_a_store_that_is_down_for_a_while_costs_nothing_but_time(scene: Scene, node: Node, between: FaultProxy) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    between.down()
    for number in range(3):
        users.flush()
        node.snapshot(f"tag{number}")
        scene.until_found(len(list(node.history.files())))
        node.clear()
        users.compact()
    assert scene.page()["behind"] != []
    between.up()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    assert_written_once(between.trace)
    assert_no_pin_is_left(area_of(node))


def test_a_manifest_that_was_too_young_to_be_sent_makes_no_listing_incomplete_if_the_rest_takes_long(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    node.incremental = False  # else the bytes are in the store before the snapshot is taken
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--incomplete-after", "1s"))
    slow = between.on("PUT", "Data.db", Delay(3))
    node.snapshot("daily")
    (manifest,) = node.root.glob("data/*/*/snapshots/daily/manifest.json")
    soon = time.time() + 0.3  # when the daemon begins to send the files, it cannot know that this is written out
    os.utime(manifest, (soon, soon))
    scene.settled()
    assert slow.hits == 1
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}


def test_a_manifest_that_came_while_the_rest_was_sent_makes_no_listing_incomplete(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    node.incremental = False
    users = node.table("ks1", "users")
    sstable = users.flush()
    folder = sstable.home / "snapshots" / "daily"
    scene.start(*node.data_dirs, args=("--incomplete-after", "1s"))

    def take_the_rest() -> None:
        (folder / "manifest.json").write_text(json.dumps({"files": [f"{sstable.stem}-Data.db"]}))
        (folder / "schema.cql").write_text("CREATE TABLE ks1.users")
        scene.until_found(8 + 2)
        time.sleep(1.5)  # longer than what it settles in

    slow = between.on("PUT", "Data.db", Call(take_the_rest, "before"))
    sstable.link("snapshots/daily", node.history, users.unit("daily"))
    assert slow.acted.wait(120)
    scene.settled()
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["down", "hangs"])
def test_a_daemon_started_while_the_store_is_away_pins_before_any_answer_and_lists_later(
    scene: Scene, node: Node, between: FaultProxy, how: str
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    scene.daemon.kill()
    if how == "down":
        between.down()
    else:
        between.on("", "", BlackHole(), count=None)
    scene.restart()
    node.snapshot("daily")
    scene.until_found(10)
    if how == "hangs":
        assert not re.search("trying again|does not answer", scene.daemon.log()), "it waited for an answer, a minute"
    node.clear()
    users.compact()
    between.down()
    between.heal()
    between.up()
    scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_a_bucket_that_refuses_is_red_and_costs_nothing_once_the_right_has_come(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    between.on("", "", s3_error(403, "AccessDenied"), count=None)
    scene.start(*node.data_dirs)
    node.snapshot("daily")
    scene.until_found(8 + 10)
    node.clear()
    users.compact()
    wait_for(lambda: "AccessDenied" in " ".join(scene.page()["behind"]))
    between.heal()
    scene.settled()
    scene.assert_all_is_listed(node.history)


def test_a_daemon_whose_name_was_taken_over_meanwhile_ends_with_exit_2_and_stores_nothing(
    scene: Scene, node: Node
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    scene.daemon.kill()
    before = kept(scene.bucket)
    owner = {"version": 2, "id": "1234", "machine_id": "0123456789abcdef", "data_directories": ["/data"]}
    scene.bucket.put("node1.listings/owner.20991231T000000.000000Z.json", json.dumps(owner).encode())
    node.snapshot("daily")
    scene.daemon.start()
    assert scene.daemon.process.wait(120) == 2
    assert "belongs to another machine" in scene.daemon.log()
    assert "--adopt" in scene.daemon.log()
    assert kept(scene.bucket).keys() - before.keys() == {"node1.listings/owner.20991231T000000.000000Z.json"}


def test_a_run_that_has_listed_everything_tells_a_restore_up_to_when_p8(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    began = cassbackup.utc(time.time())
    scene.once(*node.data_dirs)
    assert newest_heartbeat(scene.bucket)["listed_through"] > began


def test_nothing_is_adopted_where_nobody_has_the_name_and_none_was_given(scene: Scene, node: Node) -> None:
    daemon = scene._launch(*node.data_dirs, bucket=scene.bucket, args=("--adopt", "--name", ""), env=scene.environ)
    assert daemon.process.wait(60) == 2
    assert "there to adopt" in daemon.log()
    assert kept(scene.bucket) == {}


@pytest.mark.slow
def test_a_bucket_directory_that_is_away_after_one_good_start_does_not_end_the_daemon(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    scene.daemon.kill()
    bucket = scene.at / "bucket"
    bucket.rename(scene.at / "away")
    bucket.write_text("not mounted")
    scene.restart()
    node.snapshot("daily")
    scene.until_found(10)
    node.clear()
    bucket.unlink()
    (scene.at / "away").rename(bucket)
    scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.parametrize("urgent", [True, False])
def test_a_store_that_asks_for_fewer_requests_is_asked_nothing_for_a_second(urgent: bool) -> None:
    async def waited() -> float:
        pinned = threading.Event()
        pinned.set()
        workers = Workers(pinned, 1, 60.0)
        workers.note("put", Throttled("503 SlowDown"))
        began = time.monotonic()
        asked = await workers.once("head", urgent, time.monotonic)
        await workers.finish(60.0)
        return asked - began

    assert asyncio.run(waited()) > 0.9


# ------------------------------------------------------------------------------------------------------------
# P4, the ledger is a cache


@pytest.mark.parametrize(
    ("name", "full", "is_stored"),
    [
        ("nb-1-big-Data.db", False, True),
        ("nb-1-big-TOC.txt", False, True),
        ("manifest.json", False, False),
        ("schema.cql", False, False),
        ("nb-1-big-Data.db", True, False),
    ],
)
def test_what_an_earlier_process_sent_is_sent_again_where_cassandra_wrote_in_place_or_if_asked_for(
    tmp_path: Path, name: str, full: bool, is_stored: bool
) -> None:
    unit, fingerprint = Unit("snapshot", "ks1", "users", "daily"), Fingerprint(1, 2, 3)
    entry = Stored("/d", name, fingerprint, 0o644, "c", "c", "00000001", f"node1/d/{name}", "etag")
    earlier = Ledger(str(tmp_path / "ledger.db"), "")
    earlier.record(unit.place, [("disk", entry)])
    earlier.close()
    ledger, options = Ledger(str(tmp_path / "ledger.db"), ""), SimpleNamespace(full=full)
    backup = Backup(options, None, None, ledger)  # type: ignore[arg-type]
    pin = Pinned("/d", name, fingerprint, 0o644, 0, 0, 1, f"/pins/{name}~", "disk")
    work: Any = SimpleNamespace(unit=unit, files={}, remembered={})
    assert backup._unsent(work, [pin]) == ([] if is_stored else [pin])
    ledger.close()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["deleted", "garbage", "zeroed", "rolled back"])
def test_local_memory_that_is_gone_costs_time_and_never_data_p4(scene: Scene, node: Node, damage: str) -> None:
    users = node.table("ks1", "users", indexes=["by_name"])
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    ledger = scene.state / "ledger.db"
    old = ledger.read_bytes()
    node.snapshot("monday")
    users.flush()
    scene.settled()
    scene.daemon.kill()
    before = kept(scene.bucket)
    if damage == "deleted":
        shutil.rmtree(scene.state)
    else:
        body = {"garbage": os.urandom(len(old)), "zeroed": bytes(len(old)), "rolled back": old}[damage]
        for path in scene.state.glob("ledger.db*"):
            path.unlink()
        ledger.write_bytes(body)
    users.flush()
    node.snapshot("tuesday")
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert_kept(before, scene.bucket)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    assert len({found.of for found in scene.listings("snapshot")}) == 2
    assert_no_pin_is_left(area_of(node))


def test_the_daemon_deletes_nothing_from_the_bucket(scene: Scene, node: Node) -> None:
    """A stolen node must not be able to, and the report reads a month of heartbeats."""
    prefix = "node1.listings/heartbeat/"
    old = {f"{prefix}20260101T000{number:03}.000000Z.json" for number in range(120)}
    for key in old:
        scene.bucket.put(key, b"{}")
    scene.start(*node.data_dirs, args=("--heartbeat", "1s"))
    wait_for(lambda: len([key for key in scene.bucket.objects() if key.startswith(prefix)]) > len(old) + 2)
    assert old <= set(scene.bucket.objects())


# ------------------------------------------------------------------------------------------------------------
# Locks and signals


def test_a_second_daemon_ends_with_exit_1_and_names_the_first(scene: Scene, node: Node, tmp_path: Path) -> None:
    node.table("ks1", "users").flush()
    first = scene.start(*node.data_dirs)
    done = scene.once(*node.data_dirs, check=1)
    assert f"pid {first.pid}" in done.stderr
    elsewhere = ("--state-dir", tmp_path / "other-state")  # the pin directory has a lock of its own
    done = scene.once(*node.data_dirs, args=elsewhere, check=1)
    assert f"pid {first.pid}" in done.stderr
    assert first.is_running
    first.kill()
    scene.once(*node.data_dirs)


@pytest.mark.slow
def test_sigterm_ends_the_daemon_in_good_order(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs)
    scene.settled()
    assert scene.daemon.stop() == 0
    assert "Traceback" not in scene.daemon.log()
    done = scene.run("status", "--json", "--state-dir", scene.state, check=3)
    assert "no daemon runs" in json.loads(done.stdout)["behind"][0]


@pytest.mark.slow
def test_sigterm_ends_the_daemon_before_systemd_would_kill_it_while_the_store_is_down(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    users = node.table("ks1", "users")
    scene.start(*node.data_dirs)
    between.down()
    for _ in range(3):
        users.flush(size=9_000_000)
    node.snapshot("daily")
    wait_for(lambda: scene.page()["pending"]["units"] >= 2)
    assert scene.daemon.stop() == 0
    between.up()
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_sigterm_ends_the_process_though_a_job_hangs(scene: Scene, node: Node, between: FaultProxy) -> None:
    users = node.table("ks1", "users")
    users.flush()
    start_shortened(scene, node, STOP_S=6.0)
    hangs = between.on("PUT", "", BlackHole(), count=None)
    users.flush()
    wait_for(lambda: hangs.hits)
    scene.daemon.process.terminate()
    assert scene.daemon.process.wait(40) == 0, "the store would hang for a minute"


@pytest.mark.slow
def test_keys_that_always_fail_keep_no_other_table_waiting(scene: Scene, node: Node, between: FaultProxy) -> None:
    bad, good = [node.table("ks1", f"bad{number}") for number in range(4)], node.table("ks1", "good")
    good.flush()
    start_shortened(scene, node, "--incomplete-after", "1s", _TURN_S=3.0, _RETRY_S=1.0)
    fails = between.on("PUT", r"/bad\d-.*-Statistics\.db", s3_error(502, "BadGateway"), count=None)
    for table in bad:
        table.flush()
    wait_for(lambda: fails.hits >= 4)
    good.flush()
    lost = oracle.lost
    wait_for(lambda: all("/bad" in item.path for item in lost(node.history, scene.bucket.objects(), "node1")))
    wait_for(lambda: len(scene.page()["failures"]) == 4)
    assert {name.split("-")[0] for name in scene.page()["failures"]} == {f"ks1/bad{number}" for number in range(4)}
    wait_for(lambda: scene.daemon.log().count("not listed, will try again") >= 12)
    states = [found.state for found in scene.listings("incremental")]
    assert set(states) == {"complete"}, "an outage lacks nothing"


def test_a_file_that_never_stands_still_is_told_and_is_listed_once_it_does(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    start_shortened(scene, node, _CHANGES=3)
    restless = users.flush().path("Statistics.db")
    stands_still = threading.Event()

    def touch() -> None:
        while not stands_still.wait(0.002):
            restless.touch()

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        wait_for(lambda: "changed while it was read" in str(scene.page().get("failures")))
    finally:
        stands_still.set()
        toucher.join()
    assert not scene.settled()["failures"]
    scene.assert_all_is_listed(node.history)


@pytest.mark.parametrize("steps", range(6))
def test_the_work_at_a_unit_ends_at_whatever_step_it_is_asked_to(steps: int) -> None:
    """It did not, of a hundred daemons that were stopped while they started, for three or four: wait_for."""

    async def end_soon() -> None:
        backup = Backup(None, None, None, None)  # type: ignore[arg-type]  # before all that they are for
        backup.touch(Touched(Unit("incremental", "ks1", "users"), None, "ks1/users", 1, time.time()))  # type: ignore[arg-type]
        for _ in range(steps):
            await asyncio.sleep(0)
        await asyncio.wait_for(backup.end(), 20)

    asyncio.run(end_soon())


# ------------------------------------------------------------------------------------------------------------
# P8, signals are true


@pytest.mark.slow
def test_once_ends_with_0_only_when_everything_is_listed_complete_p8(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs, check=0)
    scene.assert_all_is_listed(node.history)
    users.sstables[0].link("snapshots/broken", node.history, users.unit("broken"))
    scene.once(*node.data_dirs, check=3)
    scene.assert_all_is_listed(node.history)
    scene.once(*node.data_dirs, check=3)  # a cron job that is run again stores nothing, and nothing is better
    for path in scene.state.glob("ledger.db*"):
        path.unlink()
    scene.once(*node.data_dirs, check=3)
    node.snapshot("next")
    scene.once(*node.data_dirs, check=0)


def test_status_that_waits_is_red_where_what_it_waited_for_is_incomplete_p8(scene: Scene, node: Node) -> None:
    """`nodetool snapshot && cassbackup status --wait && nodetool clearsnapshot` must not clear the only whole copy."""
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--incomplete-after", "1s"))
    node.snapshot("daily")
    assert scene.settled()["behind"] == []
    users.sstables[0].link("snapshots/broken", node.history, users.unit("broken"))
    scene.until_found(len(list(node.history.files())))
    assert ["incomplete" in text for text in scene.settled()["behind"]] == [True]
    node.snapshot("next")
    scene.until_found(len(list(node.history.files())))
    assert scene.settled()["behind"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "patterns",
    [(r"/nb-1-big", r"/nb-1-big-Index"), (r"/manifest\.json|/nb-1-big-Data",), (r"/manifest\.json",)],
)
def test_a_snapshot_whose_files_were_refused_becomes_complete_after_a_restart_p1(
    scene: Scene, node: Node, between: FaultProxy, patterns: tuple[str, ...]
) -> None:
    """What was listed without them must not be another life than they are."""
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    for refused in patterns:
        between.on("PUT", refused, s3_error(403, "AccessDenied"), count=None)
        scene.once(*node.data_dirs, check=1)
        between.heal()
    scene.once(*node.data_dirs, check=0)
    found = scene.listings("snapshot")
    assert found[-1].state == "complete"
    assert len({one.document["life"] for one in found}) == 1


@pytest.mark.slow
def test_once_says_which_filter_matches_nothing_p8(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    done = scene.once(*node.data_dirs, args=("--keyspace", "ks1,ks2"), check=3)
    assert "a filter matches nothing filter=--keyspace ks1,ks2" in done.stderr


@pytest.mark.slow
def test_once_ends_with_1_when_the_store_refuses_p8(scene: Scene, node: Node, between: FaultProxy) -> None:
    users = node.table("ks1", "users")
    scene.once(*node.data_dirs, check=0)
    users.flush()
    between.on("PUT", r"-Data\.db", s3_error(403, "AccessDenied"), count=None)
    done = scene.once(*node.data_dirs, check=1)
    assert "AccessDenied" in done.stderr
    assert scene.listings() == []
    between.heal()
    scene.once(*node.data_dirs, check=0)
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_status_is_red_for_each_thing_that_is_wrong_p8(scene: Scene, node: Node, between: FaultProxy) -> None:
    users = node.table("ks1", "users")
    old = time.time() - 30 * 3600
    os.utime(users.flush().path("Data.db"), (old, old))  # younger data need not be in a snapshot yet
    scene.start(*node.data_dirs)
    status = ("status", "--state-dir", scene.state)
    scene.settled()
    wait_for(lambda: "no complete snapshot" in scene.run(*status).stdout)
    assert f"ks1/{users.directory}" in scene.run(*status, check=3).stdout
    node.snapshot("daily")
    scene.settled()
    assert "BEHIND" not in scene.run(*status, "--wait", check=0).stdout
    page = json.loads(scene.run(*status, "--json", check=0).stdout)
    assert (page["behind"], page["pending"]["units"]) == ([], 0)
    assert "--max-age" in scene.run(*status, "--max-age", "1ms", check=2).stderr
    time.sleep(1)
    assert "snapshot" in scene.run(*status, "--max-age", "1s", check=3).stdout
    between.down()
    users.flush()
    wait_for(lambda: scene.page()["pending"]["units"])
    time.sleep(1)
    assert "oldest unlisted file" in scene.run(*status, "--max-lag", "1s", check=3).stdout
    scene.daemon.kill()
    assert "no daemon runs" in scene.run(*status, check=3).stdout


@pytest.mark.by_hand
def test_status_tells_how_long_what_waits_will_take_at_the_speed_of_late(scene: Scene, node: Node) -> None:
    scene.start(*node.data_dirs, args=("--max-bandwidth", "2M"))
    node.table("ks1", "users").flush(size=40_000_000)
    told = ("status", "--state-dir", scene.state)
    wait_for(lambda: re.search(r"pending .*, at least [1-9]\d* s to go", scene.run(*told).stdout))
    assert "to go" not in scene.run(*told, "--wait").stdout


@pytest.mark.slow
def test_a_bucket_made_anew_under_a_running_daemon_gets_all_that_is_on_disk_again_p1(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--heartbeat", "1s"))
    node.snapshot("daily")
    scene.settled()
    owner = json.loads(scene.bucket.get("node1.listings/owner.json"))
    scene.bucket.empty()
    scene.bucket.put("node1.listings/owner.json", json.dumps({**owner, "id": "another life"}).encode())
    wait_for(lambda: oracle.lost(node.history, scene.bucket.objects(), "node1") == [])
    node.snapshot("after")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}


def test_what_an_earlier_daemon_listed_is_not_done_before_the_bucket_is_asked_p8(scene: Scene, node: Node) -> None:
    """Meanwhile the bucket may have been made anew: `status --wait` had said that all is listed, and nothing was."""
    node.table("ks1", "users").flush()
    scene.once(*node.data_dirs)
    bucket = Path(scene.bucket.target.removeprefix("file://"))
    shutil.rmtree(bucket)
    scene.start(*node.data_dirs)
    wait_for(lambda: scene.page()["errors"])  # it could not ask
    assert not scene.page()["quiet"]
    (bucket / ".unfinished").mkdir(parents=True)
    scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_an_sstable_that_is_kept_for_its_number_is_stored_in_the_next_bucket_before_it_is_deleted_p1(
    scene: Scene, node: Node
) -> None:
    """It is listed and pinned. In a bucket that is made anew it is neither, whatever we knew of it."""
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--heartbeat", "1s", "--delete-uploaded-incrementals"))
    scene.settled()
    owner = json.loads(scene.bucket.get("node1.listings/owner.json"))
    scene.bucket.empty()
    scene.bucket.put("node1.listings/owner.json", json.dumps({**owner, "id": "another life"}).encode())
    wait_for(lambda: "not the one that the ledger knows" in scene.daemon.log())
    scene.settled()
    scene.assert_all_is_listed(node.history)
    newer = users.flush()
    wait_for(lambda: len(list(users.directories()[0].glob("backups/*-Data.db"))) == 1)
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert list(users.directories()[0].glob(f"backups/{newer.stem}-Data.db"))


@pytest.mark.slow
def test_no_heartbeat_says_more_than_it_knows_before_what_was_there_is_listed_p8(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    """What a first scan finds was written long before; also where the bucket was made anew."""
    node.table("ks1", "users").flush()
    scene.once(*node.data_dirs)
    scene.bucket.empty()
    between.on("PUT", r"node1/", s3_error(503, "SlowDown"), count=None)
    scene.start(*node.data_dirs, args=("--heartbeat", "1s", "--reconcile", "1s"))

    def told() -> list[str]:
        beats = [key for key in scene.bucket.objects() if "/heartbeat/" in key]
        return [json.loads(scene.bucket.get(key))["listed_through"] for key in sorted(beats)]

    wait_for(lambda: len(told()) >= 3)
    assert set(told()) == {""}
    between.heal()
    scene.settled()
    wait_for(lambda: told()[-1] > "2026")


def test_a_schema_that_was_not_all_written_when_it_was_stored_is_stored_again_p1(scene: Scene, node: Node) -> None:
    """Cassandra opens schema.cql and writes it line by line, and may stand still in between."""
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    (schema,) = node.root.glob("data/*/*/snapshots/daily/schema.cql")
    text = schema.read_text()
    schema.write_text("")
    scene.start(*node.data_dirs)
    scene.settled()

    def sizes() -> set[int]:
        files = [entry for found in scene.listings("snapshot") for entry in found.entries]
        return {entry.size for entry in files if entry.path.endswith("schema.cql")}

    assert sizes() == {0}
    schema.write_text(text)
    wait_for(lambda: sizes() == {0, len(text)})
    scene.settled()
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    assert len({found.of for found in scene.listings("snapshot")}) == 1
    assert_no_pin_is_left(area_of(node))


def test_what_lost_its_pins_while_the_store_was_away_is_not_done_before_it_is_listed_p8(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--reconcile", "1s"))
    scene.settled()
    between.down()
    users.flush()
    scene.until_found(len(list(node.history.files())))
    for pin in pins(area_of(node)):
        os.unlink(pin)  # somebody needed room
    between.up()
    scene.settled()
    scene.assert_all_is_listed(node.history)


def test_what_no_manifest_names_is_named_in_the_log_p2(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    (folder,) = users.directories()
    (folder / "snapshots" / "daily" / "nb-9-big-Data.db").write_bytes(b"left over")
    done = scene.once(*node.data_dirs)
    assert re.search("not in its manifest.json, not listed path=.*nb-9-big-Data.db", done.stderr)


def test_once_stores_all_again_where_the_bucket_was_made_anew_p8(scene: Scene, node: Node) -> None:
    """What must be pinned for that is not pinned yet in the moment in which the bucket is known."""
    users = node.table("ks1", "users")
    for _ in range(200):
        users.flush(size=10)
    scene.once(*node.data_dirs)
    scene.bucket.empty()
    scene.once(*node.data_dirs)
    scene.assert_all_is_listed(node.history)


@pytest.mark.parametrize("option", ["--bucket", "--name"])
def test_what_is_listed_in_one_bucket_or_by_one_name_counts_for_no_other_p4(
    scene: Scene, node: Node, tmp_path: Path, option: str
) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    elsewhere = FileBucket(tmp_path / "elsewhere")
    other, bucket, name = elsewhere.target, elsewhere, "node1"
    if option == "--name":
        other, bucket, name = "node2", scene.bucket, "node2"
    for _ in range(2):  # there and back
        scene.once(*node.data_dirs)
        scene.once(*node.data_dirs, args=(option, other))
        node.table("ks1", f"t{len(node.tables)}").flush()
    scene.once(*node.data_dirs, args=(option, other))
    objects = bucket.objects()
    assert oracle.problems(objects, name) == []
    assert oracle.lost(node.history, objects, name) == []


@pytest.mark.slow
def test_a_listing_that_was_under_way_when_the_bucket_was_made_anew_does_not_count_p1(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    """What it names is not in the new bucket: whoever took it for listed would never store that again."""
    node.incremental = False
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs, args=("--heartbeat", "1s"))

    def make_anew() -> None:
        owner = json.loads(scene.bucket.get("node1.listings/owner.json"))
        scene.bucket.empty()
        scene.bucket.put("node1.listings/owner.json", json.dumps({**owner, "id": "another life"}).encode())
        wait_for(lambda: "not the one that the ledger knows" in scene.daemon.log())
        time.sleep(1.0)

    slow = between.on("PUT", r"listings/ks1/.*complete-", Call(make_anew, "before"))
    node.snapshot("daily")
    assert slow.acted.wait(120)

    def is_restorable() -> bool:
        objects = scene.bucket.objects()
        return all(entry.key in objects for entry in scene.listings("snapshot")[-1].entries)

    wait_for(lambda: scene.listings("snapshot") and is_restorable(), 60)


def test_a_machine_that_was_set_back_to_an_earlier_state_takes_no_word_of_then_for_true_p1(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    """Its own clocks tell nothing of the weeks in which prune, on another machine, went on."""
    node.incremental = False
    for name in ("members", "users"):
        node.table("ks1", name).flush()
    scene.start(*node.data_dirs)
    node.snapshot("monday")
    scene.settled()
    between.lead_s = 40 * 86400.0
    scene.bucket.delete(*(key for key in scene.file_keys() if key.endswith("-Data.db")))
    for table in node.tables:
        table.snapshot("tuesday")
        scene.settled(40)
    objects, found = scene.bucket.objects(), scene.listings("snapshot")[2:]
    assert [(one.of.tag, one.state) for one in found] == 2 * [("tuesday", "complete")]
    assert [entry.key for one in found for entry in one.entries if entry.key not in objects] == []


@pytest.mark.slow
def test_a_data_directory_that_goes_away_is_red_until_it_is_back_p8(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--reconcile", "1s", "--heartbeat", "1s"))
    assert scene.settled()["behind"] == []
    (data,) = node.data_dirs
    with scene.daemon.held_still():
        written = utc(time.time())
        late = users.directories()[0] / "backups" / users.flush().path("Index.db").name
        late = late.rename(node.root / late.name)
        away = data.rename(data.with_name("away"))
    wait_for(lambda: str(data) in " ".join(scene.page()["behind"]))
    since = utc(time.time())
    wait_for(lambda: newest_heartbeat(scene.bucket)["scanned"] > since)
    assert newest_heartbeat(scene.bucket)["listed_through"] < written, "nobody sees what is written to it"
    away.rename(data)
    wait_for(lambda: newest_heartbeat(scene.bucket)["pending_units"])
    assert newest_heartbeat(scene.bucket)["listed_through"] < written, "it was written before it was found"
    late.rename(users.directories()[0] / "backups" / late.name)
    wait_for(lambda: scene.page()["behind"] == [])
    wait_for(lambda: newest_heartbeat(scene.bucket)["listed_through"] > since)
    users.flush()
    scene.settled()
    scene.assert_all_is_listed(node.history)


def test_what_is_pinned_on_a_disk_that_goes_away_is_listed_as_soon_as_it_is_back_p8(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs, args=("--reconcile", "1s"))
    scene.settled()
    between.down()
    node.snapshot("daily")
    scene.until_found(8 + 10)
    node.clear()
    away = node.root.rename(node.root.with_name("away"))
    wait_for(lambda: "data directory away" in " ".join(scene.page()["behind"]))
    between.up()
    wait_for(lambda: "its pin directory is away" in " ".join(scene.page()["behind"]))
    away.rename(node.root)
    wait_for(lambda: not scene.page()["pending"]["units"], 30)  # it would be tried again after a minute anyhow
    assert scene.settled()["behind"] == []
    scene.assert_all_is_listed(node.history)
    assert_no_pin_is_left(area_of(node))


@pytest.mark.slow
def test_one_of_two_disks_that_is_away_with_its_pins_hides_nothing_of_the_other_p8(
    scene: Scene, tmp_path: Path
) -> None:
    first, second = (Node(tmp_path / name) for name in ("first", "second"))
    for node in (first, second):
        node.table("ks1", f"of_{node.root.name}").flush()
    scene.start(*second.data_dirs, *first.data_dirs, args=("--reconcile", "1s"))
    assert scene.settled()["behind"] == []
    wait_for(lambda: scene.page()["pinned_alone_limit_bytes"])
    of_both = scene.page()["pinned_alone_limit_bytes"]
    second.root.rename(tmp_path / "away")
    wait_for(lambda: "data directory away" in " ".join(scene.page()["behind"]))
    first.snapshot("daily")
    scene.until_found(sum(len(list(node.history.files())) for node in (first, second)))
    wait_for(lambda: 0 < scene.page()["pinned_alone_limit_bytes"] < of_both)
    scene.settled()
    scene.assert_all_is_listed(first.history)


def test_the_ledger_forgets_what_is_gone_and_nothing_that_is_on_a_disk_that_is_away(
    scene: Scene, tmp_path: Path
) -> None:
    first, second = (Node(tmp_path / name) for name in ("first", "second"))
    for node in (first, second):
        node.table("ks1", f"of_{node.root.name}").flush()
        node.snapshot("daily")
    scene.start(*first.data_dirs, *second.data_dirs)
    scene.settled()
    scene.daemon.stop()

    def listed() -> set[str]:
        with contextlib.closing(sqlite3.connect(scene.state / "ledger.db")) as ledger:
            return {directory for (directory,) in ledger.execute("SELECT directory FROM listed")}

    before = listed()
    first.clear("daily")
    second.root.rename(tmp_path / "away")
    scene.restart()
    gone = {path for path in before if "/first/" in path and "/snapshots/" in path}
    assert gone
    wait_for(lambda: not gone & listed())
    assert listed() == before - gone


@pytest.mark.slow
@pytest.mark.parametrize("filters", [("--keyspace", "ks1,ks2"), ("--exclude-table", "users")])
def test_a_filter_that_matches_nothing_is_red_p8(scene: Scene, node: Node, filters: tuple[str, ...]) -> None:
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs, args=filters)
    assert filters[1] in " ".join(scene.settled()["behind"])
    scene.daemon.stop()
    scene.once(*node.data_dirs, args=filters, check=3)


def test_what_waits_of_an_archive_that_is_empty_by_now_is_stored_at_the_next_start_p8(
    scene: Scene, between: FaultProxy, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    between.down()
    scene.start(logs, args=("--include", "/logs/"))
    (logs / "CommitLog-7-1.log").write_bytes(b"log")
    scene.until_found(1)
    scene.daemon.kill()
    (logs / "CommitLog-7-1.log").unlink()  # as its owner's cron does
    between.up()
    scene.once(logs, args=("--include", "/logs/"))
    assert [key for key in scene.bucket.objects() if key.endswith("/CommitLog-7-1.log")]


# ------------------------------------------------------------------------------------------------------------
# P5, do no harm: limits


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", str(place)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """Take all room of a disk."""
    with contextlib.suppress(OSError), (disk / "full").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["--max-pinned", "--min-free"])
def test_pins_give_way_before_cassandras_disk_is_full_and_losses_are_named_p5(
    scene: Scene, small_disk: Path, between: FaultProxy, limit: str
) -> None:
    node = Node(small_disk / "cassandra")
    node.incremental = False
    users = node.table("ks1", "users")
    share = {"--max-pinned": ("30%", "1%"), "--min-free": ("99%", "40%")}[limit]
    scene.start(*node.data_dirs, args=("--incomplete-after", "1s", "--max-pinned", share[0], "--min-free", share[1]))
    between.down()
    tags = []
    for number in range(9):
        users.flush(size=6_000_000)
        node.snapshot(f"tag{number}")
        tags.append(f"tag{number}")
        scene.until_found(len(list(node.history.files())))
        node.clear(tags[-1])
        for sstable in users.sstables:
            sstable.remove()
        users.sstables.clear()
    wait_for(lambda: "LOST" in scene.daemon.log())
    wait_for(lambda: "lost until the next complete snapshot" in " ".join(scene.page()["behind"]))
    assert scene.page()["lost_tables"] == [f"ks1/{users.directory}"]
    wait_for(lambda: (disk := os.statvfs(small_disk)).f_bavail / disk.f_blocks > 0.25)
    between.up()
    page = scene.settled()
    assert page["counts"]["lost"] == scene.daemon.log().count("LOST path=")
    assert oracle.problems(scene.bucket.objects(), "node1") == []
    missing = {item.path for item in oracle.lost(node.history, scene.bucket.objects(), "node1")}
    assert missing
    log = scene.daemon.log()
    assert [path for path in sorted(missing) if path not in log] == [], "lost without its name in the log (P2)"
    said = {os.path.basename(path) for found in scene.listings() for path in found.document["lost"]}
    assert {os.path.basename(path) for path in missing} <= said
    is_red = scene.page()["lost"] != []  # no: a snapshot that was taken later is complete
    assert scene.daemon.stop() == 0
    scene.once(*node.data_dirs, check=3 if is_red else 0)  # though it has nothing to do


@pytest.mark.slow
def test_a_disk_that_is_full_to_the_last_block_gives_pins_up_all_the_same(
    scene: Scene, small_disk: Path, between: FaultProxy
) -> None:
    node = Node(small_disk / "cassandra")
    node.incremental = False
    users = node.table("ks1", "users")
    limits = ("--incomplete-after", "1s", "--max-pinned", "99%", "--min-free", "1%")
    scene.start(*node.data_dirs, args=limits)
    between.down()
    users.flush(size=6_000_000)
    node.snapshot("daily")
    scene.until_found(len(list(node.history.files())))
    node.clear("daily")
    users.sstables[0].remove()
    fill(small_disk)
    wait_for(lambda: "LOST" in scene.daemon.log())
    wait_for(lambda: os.statvfs(small_disk).f_bavail > 1000)
    scene.daemon.kill()
    fill(small_disk)
    scene.restart()  # there is no room to write the names of what is lost once more


def test_the_newest_sstable_of_a_table_stays_in_backups_though_a_backlog_is_listed_newest_first() -> None:
    unit = Unit("incremental", "ks1", "users")
    options: Any = SimpleNamespace(delete_uploaded_incrementals=True)
    backup = Backup(options, None, None, None)  # type: ignore[arg-type]

    def deleted(generation: int) -> list[str]:
        name = f"nb-{generation}-big-Data.db"
        pin = Pinned("/backups", name, Fingerprint(generation, 1, generation), 0, 0, 0, 1, f"/pins/{name}~", "disk")
        work: Any = SimpleNamespace(unit=unit, pins={pin.path: pin}, files={pin.path: None}, bucket="")
        return [name for _, name in backup._deletable(work)]

    assert [deleted(9), deleted(3), deleted(10)] == [[], ["nb-3-big-Data.db"], ["nb-9-big-Data.db"]]
    backup.bucket = "made anew while they were judged"
    with pytest.raises(Changed):
        deleted(11)
    assert not any("nb-11-" in name for kept in backup._kept.values() for _, name in kept), "it would not be stored"


def test_a_loss_is_told_until_a_snapshot_taken_since_is_complete_p8(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"), "")
    backup = Backup(None, None, None, ledger)  # type: ignore[arg-type]
    unit = Unit("snapshot", "ks1", "users", "daily", backup.clock())
    before: Listing[Known] = Listing("node1", unit, backup.clock(), backup.clock(), True, ())
    backup.note_lost(unit, "/data/ks1/users/backups", ["nb-7-big-Data.db"])
    backup._note_snapshot(before)  # it came late, and was taken earlier
    assert list(ledger.facts("lost:")) == ["ks1/users"]
    backup._note_snapshot(replace(before, taken=backup.clock()))
    assert ledger.facts("lost:") == {}
    ledger.remember("lost:ks1/users", utc(time.time() + 365 * DAY))
    backup._note_snapshot(replace(before, taken=backup.clock()))
    assert ledger.facts("lost:") == {}, "the clock was ahead when it was lost"
    ledger.close()


def test_of_an_archive_or_a_table_that_is_gone_a_loss_is_told_for_a_day_as_no_snapshot_comes_p8(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"), "")
    daemon: Any = SimpleNamespace(_backup=SimpleNamespace(ledger=ledger))
    places = ["/d/archive", "ks1/dropped-1", "ks1/users-1"]
    for hours, told in ((0, places), (23, places), (25, places[2:])):
        for place in places:
            ledger.remember(f"lost:{place}", utc(time.time() - hours * 3600))
        assert cassbackup.Daemon._lost(daemon, ["ks1/users-1"]) == told
    ledger.close()


def test_what_compaction_wrote_anew_is_as_old_as_it_was_and_an_empty_table_needs_no_snapshot_p8(tmp_path: Path) -> None:
    ledger, node, now = Ledger(str(tmp_path / "ledger.db"), ""), Node(tmp_path / "cassandra"), time.time()
    users = node.table("ks1", "users")
    place = f"ks1/{users.directory}"

    def oldest(absent: str = "") -> float | None:
        async def find() -> float | None:
            async def on_disk(what: Callable[..., Any], *args: Any) -> Any:
                return what(*args)

            scanned = asyncio.Event()
            scanned.set()
            state = SimpleNamespace(tables={place}, absent=absent)
            backup = SimpleNamespace(ledger=ledger, scanned=scanned)
            daemon: Any = SimpleNamespace(_backup=backup, _state=state, _roots=node.data_dirs, _on_disk=on_disk)
            finding = asyncio.create_task(cassbackup.Daemon._find_oldest(daemon))
            while not finding.done() and not hasattr(daemon, "_oldest"):
                await asyncio.sleep(0)
            finding.cancel()  # it rests
            found: dict[str, float] = daemon._oldest
            return found.get(place)

        return asyncio.run(find())

    assert oldest() is None
    os.utime(users.flush().path("Data.db"), (now - 30 * 3600, now - 30 * 3600))
    assert oldest() == pytest.approx(now - 30 * 3600)
    users.compact()
    assert min(one.path("Data.db").stat().st_mtime for one in users.sstables) > now - 60
    assert oldest() == pytest.approx(now - 30 * 3600)
    users.truncate()
    assert oldest(absent="a disk") == pytest.approx(now - 30 * 3600), "it may have some"
    assert oldest() is None
    users.flush()
    assert oldest() == pytest.approx(now, abs=60)
    ledger.close()


def test_an_incomplete_snapshot_is_told_until_a_complete_one_that_was_taken_since_p8(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"), "")
    backup = Backup(None, None, None, ledger)  # type: ignore[arg-type]
    first, second, third, fourth = (backup.clock() for _ in range(4))

    def note(taken: str, complete: bool, tag: str = "daily") -> bool:
        unit = Unit("snapshot", "ks1", "users", tag, taken)
        backup._note_snapshot(Listing("node1", unit, taken, backup.clock(), complete, ()))
        return bool(ledger.facts("incomplete:"))

    assert note(second, True) is False
    assert note(first, False) is False, "it waited for the rest, and a complete one was taken meanwhile"
    assert note(third, False) is True
    assert note(first, False) is True
    assert note(second, True) is True, "that was taken before"
    assert note(third, True) is False, "the rest has come"
    assert note(fourth, False, "dropped-1795292678000-users") is False, "no other comes"
    ledger.close()


@pytest.mark.parametrize("complete", [True, False])
def test_a_snapshot_that_is_dated_by_a_clock_that_was_ahead_hides_none_that_is_taken_since_p8(
    tmp_path: Path, complete: bool
) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"), "")
    backup = Backup(None, None, None, ledger)  # type: ignore[arg-type]

    def note(taken: str, complete: bool, tag: str = "daily") -> tuple[str, str]:
        unit = Unit("snapshot", "ks1", "users", tag, taken)
        backup._note_snapshot(Listing("node1", unit, taken, backup.clock(), complete, ()))
        return ledger.fact("complete:ks1/users"), ledger.fact("incomplete:ks1/users")

    ahead, first, second, third = utc(time.time() + 365 * DAY), *(backup.clock() for _ in range(3))
    note(ahead, complete)
    assert note(first, False)[1] == first
    assert note(second, True) == (f"{second}\tdaily", "")
    for complete in (True, False):
        assert note(third, complete, "RepairedDataMismatch-20261102") == (f"{second}\tdaily", ""), "of some ranges"
    ledger.close()


@pytest.mark.parametrize(
    ("taken", "complete", "incomplete"),
    [
        (("monday", "tuesday?"), "monday", True),
        (("monday", "tuesday?", "RepairedDataMismatch-20261102"), "monday", True),
        (("monday", "tuesday?", "RepairedDataMismatch-20261102?"), "monday", True),
        (("monday?", "tuesday"), "tuesday", False),
        (("monday?",), "", True),
        ((), "", False),
    ],
)
def test_a_daemon_whose_ledger_was_lost_learns_from_the_bucket_whether_the_newest_snapshot_is_complete_p8(
    tmp_path: Path, taken: tuple[str, ...], complete: str, incomplete: bool
) -> None:
    shelf = Shelf()
    for day, tag in enumerate(taken):
        shelf.add(snapshot(tag.strip("?"), EPOCH + day * DAY, complete="?" not in tag))
    ledger, unit = Ledger(str(tmp_path / "ledger.db"), ""), unit_of("", EPOCH)

    async def learn() -> None:
        async def work_at(_what: str, _urgent: bool, job: Callable[..., Any], *args: Any) -> Any:
            return job(*args)

        workers: Any = SimpleNamespace(run=work_at)
        backup = Backup(None, None, workers, ledger)  # type: ignore[arg-type]
        backup.store, backup.node = Door(shelf), NODE
        waiting = SimpleNamespace(disk_of=lambda _: "disk")
        work: Any = SimpleNamespace(unit=unit, bucket="", waiting=waiting)
        await backup._learn_snapshot(work)

    asyncio.run(learn())
    assert ledger.fact(f"complete:{unit.place}").partition("\t")[2] == complete
    assert bool(ledger.fact(f"incomplete:{unit.place}")) == incomplete
    ledger.close()


@pytest.mark.slow
def test_status_is_red_while_a_full_disk_takes_neither_link_nor_mark_and_all_is_listed_once_it_does_p8(
    scene: Scene, small_disk: Path
) -> None:
    def inodes(count: int) -> None:
        subprocess.run(["mount", "-o", f"remount,nr_inodes={count}", str(small_disk)], check=True)

    node = Node(small_disk / "cassandra")
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--reconcile", "1s", "--min-free", "1%"))
    node.snapshot("daily")
    assert scene.settled()["behind"] == []
    assert_no_pin_is_left(area_of(node))  # or they would make room below
    with scene.daemon.held_still():
        users.flush()
        disk = os.statvfs(small_disk)
        inodes(disk.f_files - disk.f_ffree + 1)  # for the directory of the pins, and none of them
    wait_for(lambda: scene.page()["counts"].get("refused", 0) >= 8)
    for _ in range(12):  # whatever it is trying just now
        assert f"not stored, see the log: {users.directories()[0]}/backups" in " ".join(scene.page()["behind"])
    inodes(10_000)
    wait_for(lambda: len(scene.listings("incremental")) > 1)
    assert scene.settled()["behind"] == []
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_a_daemon_that_starts_on_a_full_disk_stores_what_is_there(scene: Scene, small_disk: Path) -> None:
    """Only what is stored can be let go of: a full disk is no reason to wait."""
    node = Node(small_disk / "cassandra")
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--min-free", "1%"))
    scene.settled()
    scene.daemon.kill()
    users.flush()
    node.snapshot("daily")
    fill(small_disk)
    scene.restart()
    wait_for(lambda: any(found.state == "complete" for found in scene.listings("snapshot")))
    scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.parametrize("away", ["data", "state"])
def test_a_disk_that_is_away_at_a_later_start_is_no_wrong_usage_so_systemd_tries_again(
    scene: Scene, node: Node, away: str
) -> None:
    """Exit 2 would be the end (RestartPreventExitStatus=2), also when the disk has come back."""
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    scene.daemon.kill()
    place = {"data": node.data_dirs[0], "state": scene.state}[away]
    aside = place.rename(place.with_name("aside"))
    if away == "state":  # else it would be made anew
        place.write_text("not a directory")
    scene.daemon.start()
    assert scene.daemon.process.wait(120) == 1
    place.unlink(missing_ok=True)
    aside.rename(place)
    users.flush()
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)


# ------------------------------------------------------------------------------------------------------------
# A bucket that was made anew, and does not take us


def make_anew_and_refuse(scene: Scene, between: FaultProxy) -> None:
    """Empty the bucket, and refuse what makes the name ours again; nothing can be stored either."""
    wait_for(lambda: "put" in scene.page()["errors"])  # it has its name, and tries
    between.on("PUT", r"owner\.", s3_error(403, "AccessDenied"), count=None)
    scene.bucket.empty()
    wait_for(lambda: "the bucket was made anew" in scene.daemon.log())


@pytest.mark.slow
def test_what_waits_is_told_while_the_name_cannot_be_claimed_again_p8(
    scene: Scene, node: Node, between: FaultProxy
) -> None:
    node.table("ks1", "users").flush()
    start_shortened(scene, node, "--heartbeat", "1s", _VIEW_S=1.0)
    between.on("PUT", r"node1/", s3_error(503, "SlowDown"), count=None)
    node.snapshot("daily")
    wait_for(lambda: ["daily", "ks1"] in scene.page()["tags"])
    make_anew_and_refuse(scene, between)
    wait_for(lambda: "claim" in scene.page()["errors"])
    page = scene.page()
    assert page["pending"]["units"]
    assert page["lag_s"] > 0
    assert ["daily", "ks1"] in page["tags"]


@pytest.mark.slow
def test_pins_give_way_while_the_name_cannot_be_claimed_again_p5(
    scene: Scene, small_disk: Path, between: FaultProxy
) -> None:
    node = Node(small_disk / "cassandra")
    node.incremental = False
    users = node.table("ks1", "users")
    users.flush(size=10)
    limits = ("--max-pinned", "30%", "--min-free", "1%")
    start_shortened(scene, node, "--heartbeat", "1s", *limits, _VIEW_S=1.0)
    between.on("PUT", r"node1/", s3_error(503, "SlowDown"), count=None)
    for number in range(2):  # 12 MB before the bucket was made anew, and 12 MB since, of 64 MB
        for _ in range(2):
            users.flush(size=6_000_000)
        node.snapshot(f"tag{number}")
        scene.until_found(len(list(node.history.files())) - 1)
        wait_for(lambda: scene.page()["pending"]["units"])
        node.clear(f"tag{number}")
        for sstable in users.sstables:
            sstable.remove()
        users.sstables.clear()
        if number == 0:
            make_anew_and_refuse(scene, between)
    wait_for(lambda: "LOST" in scene.daemon.log(), 60)


def test_a_daemon_that_adopted_its_name_claims_it_again_where_the_bucket_was_made_anew(
    scene: Scene, node: Node
) -> None:
    node.table("ks1", "users").flush()
    scene.once(*node.data_dirs, args=("--name", ""))
    start_shortened(scene, node, "--heartbeat", "1s", "--adopt", "--name", "", _VIEW_S=1.0)
    before = scene.bucket.objects().keys()
    scene.bucket.empty()
    (owner,) = (key for key in before if key.endswith("/owner.json"))
    wait_for(lambda: owner in scene.bucket.objects() or not scene.daemon.is_running)
    scene.settled()


@pytest.mark.slow
def test_a_put_that_was_under_way_when_the_bucket_was_made_anew_overwrites_nothing_p3(
    scene: Scene, node: Node, rclone: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    """This server overwrites. What is written in place has other content by the time that it is sent again."""
    found = proxy(rclone)
    scene.bucket, scene.environ = rclone, rclone.through(found.url)
    node.incremental = False
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs, args=("--heartbeat", "1s"))
    scene.settled()

    def make_anew() -> None:
        owner = json.loads(scene.bucket.get("node1.listings/owner.json"))
        scene.bucket.empty()
        scene.bucket.put("node1.listings/owner.json", json.dumps({**owner, "id": "another life"}).encode())
        wait_for(lambda: "the bucket was made anew" in scene.daemon.log())
        (schema,) = node.root.glob("data/*/*/snapshots/daily/schema.cql")
        schema.write_text(schema.read_text() + "-- and the rest of it\n")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: scene.listings("snapshot"), 10)

    slow = found.on("PUT", r"daily/schema\.cql", Call(make_anew, "before"))
    node.snapshot("daily")
    assert slow.acted.wait(120)
    scene.settled()
    assert oracle.problems(scene.bucket.objects(), "node1") == []


def test_who_asks_while_a_daemon_ends_is_not_told_that_all_is_listed_p8(tmp_path: Path) -> None:
    async def run() -> None:
        backup = Backup(None, None, None, Ledger(str(tmp_path / "ledger.db"), ""))  # type: ignore[arg-type]
        disk: Any = object()
        backup.touch(Touched(Unit("snapshot", "ks1", "users", "daily"), disk, "", 1, 0.0))
        ended = asyncio.ensure_future(backup.end())
        while not ended.done():
            assert backup.units
            await asyncio.sleep(0)
        assert backup.units
        backup.ledger.close()

    asyncio.run(run())
