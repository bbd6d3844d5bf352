"""What becomes restorable when: listings, reuse, completeness, and what happens when the bucket is not what it was."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from conftest import Daemon, Run
from faultproxy import FaultProxy, assert_written_once, bytes_sent
from scene import Scene, area_of, assert_no_pin_is_left, pins, wait_for
from servers import Bucket, FileBucket
from tree import Copy, Node


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


def contents(bucket: Bucket) -> dict[str, bytes]:
    """Return what is stored, but for the heartbeats."""
    return {key: body for key, body in bucket.objects().items() if "/heartbeat/" not in key}


def assert_keys_kept(before: dict[str, bytes], bucket: Bucket) -> None:
    """Fail if a key that was there has other bytes, or is gone (P3)."""
    now = bucket.objects()
    assert {key: now.get(key) for key in before} == before


# ------------------------------------------------------------------------------------------------------------
# Snapshots


def test_a_second_snapshot_of_unchanged_tables_sends_only_what_cassandra_wrote_anew(scene: Scene, node: Node) -> None:
    users, local = node.table("ks1", "users", indexes=["by_name"]), node.table("system", "local")
    for table in (users, local):
        table.flush()
    scene.start(*node.data_dirs)
    node.snapshot("monday")
    scene.settled()
    before = set(scene.file_keys())
    node.snapshot("tuesday")
    scene.settled()
    new = sorted(set(scene.file_keys()) - before)
    assert [os.path.basename(key) for key in new] == ["manifest.json", "schema.cql", "manifest.json"]
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}
    scene.assert_all_is_listed(node.history)
    assert_no_pin_is_left(area_of(node))


@pytest.mark.slow
def test_a_flush_and_a_snapshot_at_once_as_nodetool_makes_them_send_the_bytes_once(scene: Scene, node: Node) -> None:
    tables = [node.table("ks1", f"t{number}") for number in range(5)]
    scene.start(*node.data_dirs, args=("--max-bandwidth", "4M"))
    for table in tables:
        table.flush(size=2_000_000)
        table.snapshot("daily")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    bodies = [body for key, body in scene.bucket.objects().items() if "-Data.db" in key]
    assert (len(bodies), len(set(bodies))) == (5, 5)


@pytest.mark.slow
def test_one_tag_taken_twice_while_the_store_is_down_becomes_two_whole_takings(
    scene: Scene, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    between = proxy(moto)
    scene.bucket, scene.environ = moto, moto.through(between.url)
    scene.start(*node.data_dirs)
    scene.settled()
    between.down()
    node.snapshot("daily")
    scene.until_found(8 + 10)
    node.clear("daily")
    users.compact()
    users.flush()
    node.snapshot("daily")
    scene.until_found(8 + 10 + 8 + 18)
    node.clear("daily")
    between.up()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    lives = {found.of.life: found for found in scene.listings("snapshot")}
    assert len(lives) == 2
    assert {found.state for found in lives.values()} == {"complete"}
    assert_written_once(between.trace)


@pytest.mark.slow
def test_a_tag_cleared_and_taken_again_at_once_is_two_takings(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    node.snapshot("daily")
    scene.settled()
    node.clear("daily")
    node.snapshot("daily")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert [found.state for found in scene.listings("snapshot")] == ["complete", "complete"]
    assert len({found.of.life for found in scene.listings("snapshot")}) == 2


def test_a_snapshot_over_several_data_directories_is_one_unit_wherever_its_manifest_is(
    scene: Scene, tmp_path: Path
) -> None:
    node = Node(tmp_path / "many", data_dirs=3, seed=5)
    users = node.table("ks1", "users", indexes=["by_name"])
    for _ in range(6):
        users.flush()
    scene.start(*node.data_dirs)
    node.snapshot("daily")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    (listing,) = scene.listings("snapshot")
    assert listing.state == "complete"
    assert len(listing.document["directories"]) > 1
    assert sum(entry.path.endswith("/manifest.json") for entry in listing.entries) == 1


@pytest.mark.slow
def test_a_snapshot_without_a_manifest_is_listed_incomplete_after_a_while(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--incomplete-after", "5s"))
    users.sstables[0].link("snapshots/broken", node.history, users.unit("broken"))
    scene.settled()
    scene.assert_all_is_listed(node.history)
    (listing,) = scene.listings("snapshot")
    assert (listing.state, listing.document["missing"]) == ("incomplete", ["manifest.json"])


@pytest.mark.slow
def test_a_listing_is_completed_by_a_manifest_that_comes_late(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs, args=("--incomplete-after", "5s"))
    users.sstables[0].link("snapshots/daily", node.history, users.unit("daily"))
    scene.settled()
    folder = users.directories()[0] / "snapshots" / "daily"
    manifest = json.dumps({"files": [f"{users.sstables[0].stem}-Data.db"]}).encode()
    (folder / "manifest.json").write_bytes(manifest)
    node.history.add(users.unit("daily"), folder / "manifest.json", Copy.of(manifest))
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert [found.state for found in scene.listings("snapshot")] == ["incomplete", "complete"]
    assert len({found.of for found in scene.listings("snapshot")}) == 1


def copy_back(scene: Scene, node: Node, users: Any) -> None:
    """Have an old snapshot found while it is copied back (cp -a, for more than a minute): its manifest comes last."""
    folder = users.directories()[0] / "snapshots" / "old"
    scene.once(*node.data_dirs, check=3)
    (folder / "schema.cql").write_bytes(b"CREATE TABLE")
    stem = next(folder.glob("*-Data.db")).name
    (folder / "manifest.json").write_text(json.dumps({"files": [stem]}))
    os.utime(folder / "manifest.json", (time.time() - 30 * 86400,) * 2)
    scene.once(*node.data_dirs, check=None)
    assert [found.state for found in scene.listings("snapshot") if found.of.tag == "old"] == ["incomplete", "complete"]


def test_an_old_snapshot_whose_manifest_comes_late_is_no_newer_than_that_p6_p7(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush().link("snapshots/old", node.history, users.unit("old"))
    users.flush()
    node.snapshot("daily")
    manifest = users.directories()[0] / "snapshots" / "daily" / "manifest.json"
    os.utime(manifest, (time.time() - 86400,) * 2)
    copy_back(scene, node, users)
    bucket = ("--bucket", scene.bucket.target, "--node", "node1", "--state-dir", scene.at / "none")
    assert "snapshot daily@" in scene.run("restore", "--latest", "--dry-run", *bucket).stdout
    plan = json.loads(scene.run("prune", "--keep-last", "1", "--json", *bucket).stdout)
    assert {one["tag"]: one["stays"] for one in plan["nodes"][0]["snapshots"]} == {"daily": True, "old": False}


def test_rows_that_were_truncated_do_not_come_back_with_an_older_snapshot_whose_manifest_comes_late_p6(
    scene: Scene, node: Node
) -> None:
    users = node.table("ks1", "users")
    users.flush().link("snapshots/old", node.history, users.unit("old"))
    node.truncate(users)
    copy_back(scene, node, users)
    bucket = ("--bucket", scene.bucket.target, "--node", "node1", "--state-dir", scene.at / "none")
    assert "empty since" in scene.run("restore", "--latest", "--dry-run", *bucket).stdout


@pytest.mark.slow
def test_sstables_that_the_manifest_does_not_name_stay_out_of_the_snapshot(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    named = users.flush()
    stray = users.flush()
    users.sstables.remove(stray)
    stray.link("snapshots/daily", node.history, None)
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    (listing,) = scene.listings("snapshot")
    assert listing.state == "complete"
    names = {os.path.basename(entry.path) for entry in listing.entries} - {"manifest.json", "schema.cql"}
    assert names == {f"{named.stem}-{component}" for component in named.components}


@pytest.mark.slow
def test_a_repairs_own_snapshots_are_skipped_and_counted(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    node.snapshot("by-manifest", ephemeral=True)
    node.snapshot("by-marker", [])
    users.sstables[0].link("snapshots/by-marker", node.history, None)
    (users.directories()[0] / "snapshots" / "by-marker" / "ephemeral.snapshot").touch()
    wait_for(lambda: scene.settled()["counts"].get("skipped_ephemeral", 0) >= 2)
    assert scene.listings("snapshot") == []
    assert_no_pin_is_left(area_of(node))


def test_a_second_snapshot_of_the_same_sstables_sends_only_what_is_its_own(scene: Scene, node: Node) -> None:
    node.table("ks1", "users", indexes=["by_name"]).flush()
    scene.start(*node.data_dirs)
    node.snapshot("before")
    scene.settled()
    before = set(scene.file_keys())
    scene.daemon.stop()  # the store's word is half a day good, and to this very process; a snapshot is taken daily
    scene.restart()
    node.snapshot("after")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert sorted(os.path.basename(key) for key in set(scene.file_keys()) - before) == ["manifest.json", "schema.cql"]


@pytest.mark.slow
def test_toc_that_grows_in_place_is_stored_again_and_listed_as_it_is(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    sstable = users.flush()
    scene.start(*node.data_dirs)
    node.snapshot("before")
    scene.settled()
    before = contents(scene.bucket)
    with sstable.path("TOC.txt").open("a") as toc:
        toc.write("SAI+aa+GroupMeta.db\n")
    sstable.components["TOC.txt"] = Copy.of(sstable.path("TOC.txt").read_bytes())
    node.snapshot("after")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert_keys_kept(before, scene.bucket)
    found = scene.listings("snapshot")
    assert {one.state for one in found} == {"complete"}
    assert len({one.of for one in found}) == 2


@pytest.mark.slow
def test_an_index_that_is_added_later_makes_no_incremental_incomplete_p8(scene: Scene, node: Node) -> None:
    """CREATE INDEX appends to TOC.txt in place, and backups/ has the same file, but not the index's."""
    users = node.table("ks1", "users")
    sstable = users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    with sstable.path("TOC.txt").open("a") as toc:
        toc.write("SAI+aa+GroupMeta.db\n")
    users.flush()
    counts = scene.settled()["counts"]
    assert counts.get("incomplete", 0) == 0
    assert {one.state for one in scene.listings("incremental")} == {"complete"}
    assert_no_pin_is_left(area_of(node))


@pytest.mark.slow
def test_statistics_that_are_replaced_between_two_snapshots_are_stored_in_both_versions(
    scene: Scene, node: Node
) -> None:
    users = node.table("ks1", "users")
    sstable = users.flush()
    scene.start(*node.data_dirs)
    node.snapshot("before")
    scene.settled()
    old, before = sstable.components["Statistics.db"], contents(scene.bucket)
    users.rewrite_statistics()
    node.snapshot("after")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert_keys_kept(before, scene.bucket)
    stored = {Copy.of(body) for key, body in scene.bucket.objects().items() if "Statistics.db" in key}
    assert {old, sstable.components["Statistics.db"]} <= stored


# ------------------------------------------------------------------------------------------------------------
# Incrementals


@pytest.mark.slow
def test_a_generation_that_comes_again_with_other_content_gets_a_key_of_its_own(scene: Scene, node: Node) -> None:
    """P3: written once."""
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    before = contents(scene.bucket)
    users.truncate()
    shutil.rmtree(users.directories()[0] / "backups")
    node.restart()
    again = users.flush()
    assert again.stem == "nb-1-big"
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert_keys_kept(before, scene.bucket)
    keys = [key for key in scene.file_keys() if "/backups/" in key and "nb-1-big-Data.db" in key]
    assert len(keys) == 2


@pytest.mark.slow
def test_an_inode_number_that_comes_again_is_not_taken_for_the_same_bytes(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    scene.start(*node.data_dirs, args=("--incomplete-after", "1s"))
    backups = users.directories()[0] / "backups"
    for number in range(5):  # ext4 gives a freed inode away at once
        path = backups / "nb-1-big-Data.db"
        backups.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(bytes([number]) * 100)
        os.utime(path, ns=(1, 1_700_000_000_000_000_000 + number))
        node.history.add(users.unit(), path, Copy.of(path.read_bytes()))
        scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_an_incremental_that_lacks_a_component_is_listed_incomplete_after_a_while(scene: Scene, node: Node) -> None:
    node.incremental = False
    users = node.table("ks1", "users")
    whole, broken = users.flush(), users.flush()
    del broken.components["Statistics.db"]
    scene.start(*node.data_dirs, args=("--incomplete-after", "5s"))
    for sstable in (whole, broken):
        sstable.link("backups", node.history, users.unit())
    scene.settled()
    scene.assert_all_is_listed(node.history)
    incomplete = [found for found in scene.listings("incremental") if found.state == "incomplete"]
    assert incomplete
    assert all("nb-2-big-Statistics.db" in "".join(found.document["missing"]) for found in incomplete)
    complete = [found for found in scene.listings("incremental") if found.state == "complete"]
    assert {os.path.basename(e.path).split("-big")[0] for found in complete for e in found.entries} == {"nb-1"}


@pytest.mark.slow
def test_a_component_that_comes_late_completes_its_incremental(scene: Scene, node: Node) -> None:
    node.incremental = False
    users = node.table("ks1", "users")
    sstable = users.flush()
    late = sstable.components.pop("Statistics.db")
    scene.start(*node.data_dirs, args=("--incomplete-after", "60s"))
    sstable.link("backups", node.history, users.unit())
    wait_for(lambda: scene.page()["sent"]["files"] >= 7)
    path = users.directories()[0] / "backups" / f"{sstable.stem}-Statistics.db"
    os.link(sstable.path("Statistics.db"), path)
    node.history.add(users.unit(), path, late)
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert {found.state for found in scene.listings("incremental")} == {"complete"}


@pytest.mark.slow
def test_a_component_that_comes_after_its_incremental_was_listed_incomplete_completes_it(
    scene: Scene, node: Node
) -> None:
    """The listing that completes it repeats what was listed before; the bytes are not sent again."""
    node.incremental = False
    users = node.table("ks1", "users")
    sstable = users.flush()
    late = sstable.components.pop("Statistics.db")
    scene.start(*node.data_dirs, args=("--incomplete-after", "3s"))
    sstable.link("backups", node.history, users.unit())
    wait_for(lambda: [found for found in scene.listings("incremental") if found.state == "incomplete"])
    scene.settled()
    sent = scene.page()["sent"]["files"]
    path = users.directories()[0] / "backups" / f"{sstable.stem}-Statistics.db"
    os.link(sstable.path("Statistics.db"), path)
    node.history.add(users.unit(), path, late)
    scene.settled()
    assert scene.page()["sent"]["files"] == sent + 1
    [complete] = [found for found in scene.listings("incremental") if found.state == "complete"]
    assert len(complete.entries) == len(sstable.components) + 1
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_an_archived_file_that_is_still_being_written_is_sent_once_it_stands_still(
    scene: Scene, node: Node, tmp_path: Path
) -> None:
    node.table("ks1", "users").flush()
    logs = tmp_path / "commitlog"
    logs.mkdir()
    (logs / "CommitLog-7-1.log").write_bytes(b"an older one")
    scene.start(*node.data_dirs, logs, args=("--include", r"CommitLog-.*\.log$"))
    with open(logs / "CommitLog-7-2.log", "wb", buffering=0) as file:
        for _ in range(20):
            file.write(b"a mutation\n")
            time.sleep(0.2)
    scene.settled()
    sent = [key for key in scene.file_keys() if "CommitLog-7-2.log" in key]
    assert [len(scene.bucket.objects()[key]) for key in sent] == [20 * 11]


@pytest.mark.slow
def test_only_incrementals_that_are_listed_complete_are_deleted_and_only_if_asked_for(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    whole = users.flush()
    node.incremental = False
    broken = users.flush()
    del broken.components["Statistics.db"]
    broken.link("backups", node.history, users.unit())
    node.snapshot("daily")
    before = oracle.survey(node.root)
    scene.once(*node.data_dirs, check=3)
    assert oracle.untouched(before, oracle.survey(node.root)) == []
    scene.start(*node.data_dirs, args=("--delete-uploaded-incrementals",))
    backups = users.directories()[0] / "backups"
    users.flush().link("backups", node.history, users.unit())
    scene.settled()
    assert list(backups.glob("nb-3-*")), "the newest stays: else Cassandra could count its generations again"
    users.flush().link("backups", node.history, users.unit())
    wait_for(lambda: not list(backups.glob("nb-3-*")))
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert list(backups.glob("nb-4-*"))
    assert len(list(backups.glob(f"{broken.stem}-*"))) == 7
    assert all(sstable.path("Data.db").exists() for sstable in (whole, broken))


@pytest.mark.slow
def test_links_of_an_sstable_that_come_late_make_it_neither_torn_nor_deleted_before(scene: Scene, node: Node) -> None:
    """Cassandra may stand still between two links, for a collection of garbage."""
    users = node.table("ks1", "users")
    scene.start(*node.data_dirs, args=("--delete-uploaded-incrementals", "--incomplete-after", "60s"))
    node.incremental = False
    sstable = users.flush()
    backups = users.directories()[0] / "backups"
    backups.mkdir(exist_ok=True)
    late = ("TOC.txt", "Filter.db")
    for component in sstable.components.keys() - set(late):
        os.link(sstable.path(component), backups / sstable.path(component).name)
    wait_for(lambda: len(scene.file_keys()) == len(sstable.components) - len(late))
    for component in late:
        os.link(sstable.path(component), backups / sstable.path(component).name)
    node.incremental = True
    users.flush()
    wait_for(lambda: not list(backups.glob(f"{sstable.stem}-*")))
    (listing,) = scene.listings("incremental")
    assert listing.state == "complete"
    assert len([entry for entry in listing.entries if sstable.stem in entry.path]) == len(sstable.components)


@pytest.mark.slow
def test_a_torn_sstable_is_listed_though_somebody_removed_the_pins_of_the_one_that_is_kept_p2(
    scene: Scene, node: Node
) -> None:
    """Of the pins that are left those of the kept SSTable do not count; what is gone of them is no other file's."""
    users = node.table("ks1", "users")
    scene.start(*node.data_dirs, args=("--delete-uploaded-incrementals", "--incomplete-after", "2s"))
    users.flush()
    scene.settled()
    for pin in pins(area_of(node)):
        os.unlink(pin)
    node.incremental = False
    torn = users.flush()
    backups = users.directories()[0] / "backups"
    for component in ("Data.db", "Digest.crc32"):
        os.link(torn.path(component), backups / torn.path(component).name)
    wait_for(lambda: [one.state for one in scene.listings("incremental")][-1:] == ["incomplete"])


# ------------------------------------------------------------------------------------------------------------
# The bucket is not what it was


@pytest.mark.slow
def test_keys_pending_deletion_are_stored_again_under_keys_never_used_before(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    node.incremental = False
    node.snapshot("monday")
    scene.once(*node.data_dirs)
    before = contents(scene.bucket)
    doomed = [key for key in scene.file_keys() if "manifest" not in key and "schema" not in key]
    body = json.dumps({"version": 2, "keys": doomed, "deleted": False}).encode()
    scene.bucket.put("node1.pending-delete/20260101T000000.000000Z.json", body)
    node.snapshot("tuesday")
    scene.once(*node.data_dirs)
    scene.assert_all_is_listed(node.history)
    newest = scene.listings("snapshot")[-1]
    assert newest.of.tag == "tuesday"
    assert newest.state == "complete"
    assert not {entry.key for entry in newest.entries} & set(doomed)
    assert_keys_kept(before, scene.bucket)


@pytest.mark.slow
def test_an_object_deleted_behind_the_back_is_stored_again_for_the_next_listing(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    node.incremental = False
    node.snapshot("monday")
    scene.once(*node.data_dirs)
    gone = [key for key in scene.file_keys() if key.endswith("Data.db")]
    scene.bucket.delete(*gone)
    node.snapshot("tuesday")
    scene.once(*node.data_dirs)
    objects = scene.bucket.objects()
    newest = scene.listings("snapshot")[-1]
    assert (newest.of.tag, newest.state) == ("tuesday", "complete")
    assert {entry.key for entry in newest.entries} <= set(objects)
    assert not {entry.key for entry in newest.entries} & set(gone)


@pytest.mark.slow
def test_a_bucket_that_was_emptied_gets_all_that_is_on_disk_again(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users", indexes=["by_name"])
    for _ in range(3):
        users.flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    scene.bucket.empty()
    scene.start(*node.data_dirs)
    wait_for(lambda: oracle.lost(node.history, scene.bucket.objects(), "node1") == [])
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert_no_pin_is_left(area_of(node))


def test_data_that_contradicts_its_digest_is_stored_with_a_loud_warning_and_a_count(scene: Scene, node: Node) -> None:
    node.incremental = False
    users = node.table("ks1", "users")
    sstable = users.flush()
    sstable.write("Digest.crc32", b"12345")
    scene.start(*node.data_dirs)
    node.snapshot("daily")
    page = scene.settled()
    scene.assert_all_is_listed(node.history)
    assert page["counts"]["digest_mismatch"] == 1
    (loud,) = (line for line in scene.daemon.log().splitlines() if "Digest.crc32" in line)
    assert " error " in loud
    assert f"{sstable.stem}-Data.db" in loud


@pytest.mark.slow
def test_data_whose_digest_comes_later_is_held_against_it_all_the_same(scene: Scene, node: Node) -> None:
    node.incremental = False
    users = node.table("ks1", "users")
    sstable = users.flush()
    sstable.write("Digest.crc32", b"12345")
    late = sstable.components.pop("Digest.crc32")
    scene.start(*node.data_dirs, args=("--incomplete-after", "60s"))
    del sstable.components["Statistics.db"]
    sstable.link("backups", node.history, users.unit())
    wait_for(lambda: scene.page()["sent"]["files"] >= 6)
    backups = users.directories()[0] / "backups"
    for name in ("Digest.crc32", "Statistics.db"):
        os.link(sstable.path(name), backups / f"{sstable.stem}-{name}")
    node.history.add(users.unit(), backups / f"{sstable.stem}-Digest.crc32", late)
    page = scene.settled()
    scene.assert_all_is_listed(node.history)
    assert page["counts"].get("digest_mismatch") == 1


@pytest.mark.slow
def test_a_heartbeat_says_that_the_daemon_lives_and_through_when_all_is_listed(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs, args=("--heartbeat", "1s", "--reconcile", "1s"))
    scene.settled()

    def beats() -> list[str]:
        return [key for key in scene.bucket.keys() if "/heartbeat/" in key]  # noqa: SIM118 - a method of ours

    wait_for(lambda: len(beats()) >= 3)
    pages = [json.loads(scene.bucket.get(key)) for key in beats()]
    assert pages[-1]["pending_units"] == 0
    assert pages[-1]["listed_through"] > pages[0]["listed_through"]


@pytest.mark.slow
def test_one_table_twice_on_a_real_store_sends_each_files_bytes_once(
    scene: Scene, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    users = node.table("ks1", "users")
    between = proxy(moto)
    scene.bucket, scene.environ = moto, moto.through(between.url)
    scene.start(*node.data_dirs)
    users.flush(size=20_000_000)
    scene.settled()
    sent = sum(bytes_sent(between.trace).values())
    node.snapshot("monday")
    node.snapshot("tuesday")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    more = {key for key, size in bytes_sent(between.trace).items() if "/snapshots/" in key and key.startswith("node1/")}
    assert {os.path.basename(key) for key in more} == {"manifest.json", "schema.cql"}
    assert sum(bytes_sent(between.trace).values()) < sent + 100_000
    assert_written_once(between.trace)
