"""P6: restore stays inside its target and tells the truth: round trips, deaths, damage, hostile listings, Cassandra.

The bucket is filled as a daemon fills it, from a stand-in for a node, and `restore` is called as the command line
calls it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
from tree import Copy, Node

import cassbackup
from cassbackup import (
    BEHIND,
    DONE,
    FAILED,
    MISUSED,
    Answer,
    Body,
    Conflict,
    Corrupt,
    Fault,
    Fingerprint,
    Known,
    Listing,
    Missing,
    NodeInfo,
    Nodetool,
    Patient,
    Placed,
    RestoreOptions,
    Stored,
    StoreOptions,
    Unit,
    Usage,
    dump_document,
    dump_listing,
    listing_key,
    object_key,
    open_folder,
    open_store,
    utc,
)

Json = dict[str, Any]
Change = Callable[[Json], object]
ROOT = Path(__file__).resolve().parents[1]


class Shelf:
    """A bucket with the backup of one node, node1, and what restores from it."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.store = Patient(open_store(f"file://{at}", StoreOptions()), 1.0)
        self.clock = cassbackup.Clock()

    def put(self, key: str, body: bytes) -> str:
        """Store an object under its key, or under another one where that is taken by other bytes."""
        crc32 = Copy.of(body).crc32
        for name in (key, f"{key}@{crc32}"):
            with contextlib.suppress(Conflict):
                self.store.put(name, Body(body))
            if (self.at / name).read_bytes() == body:
                return name
        raise AssertionError(key)

    def entries(self, folder: Path) -> Iterator[Stored]:
        """Store the files below a directory, and yield what a listing says of them."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                info, body = path.stat(), path.read_bytes()
                file = (str(path.parent), path.name)
                key = self.put(object_key("node1", file), body)
                owner, group, crc32 = str(info.st_uid), str(info.st_gid), Copy.of(body).crc32
                yield Stored(*file, Fingerprint.of(info), info.st_mode & 0o7777, owner, group, crc32, key, "")

    def put_listing(self, unit: Unit, folders: list[Path], taken: str = "", **more: Any) -> str:
        """List what is in these directories; return the listing's key."""
        files = tuple(entry for folder in folders for entry in self.entries(folder))
        now = self.clock()
        listing = Listing("node1", unit, taken or now, now, not more.get("missing"), files, **more)
        self.store.put(listing_key(listing), Body(dump_listing(listing)))
        return listing_key(listing)

    def keep(self, node: Node, tag: str = "", **more: Any) -> list[str]:
        """List the snapshots of this tag, or what is in backups/, of all tables."""
        below = f"snapshots/{tag}" if tag else "backups"
        keys = []
        for place in sorted({path.relative_to(data) for data in node.data_dirs for path in data.glob("*/*")}):
            folders = [data / place / below for data in node.data_dirs if (data / place / below).is_dir()]
            manifests = [folder / "manifest.json" for folder in folders if (folder / "manifest.json").exists()]
            life = utc(min((path.stat().st_mtime for path in manifests), default=time.time()))
            keyspace, table = place.parts
            unit = Unit("snapshot" if tag else "incremental", keyspace, table, tag, life)
            if folders:
                keys.append(self.put_listing(unit, folders, life if tag else "", **more))
        return keys

    def document(self, name: str, **values: Any) -> None:
        """Store node.json and the like."""
        self.store.put(f"node1.listings/{name}", Body(dump_document(**values)))

    def restore(self, **options: Any) -> Answer:
        """Restore on a machine that knows nothing but the bucket. Both forms of the answer can be printed."""
        if "into" in options:
            options["into"] = str(options["into"])
        answer = cassbackup.restore(cassbackup.Bucket(self.store, 4), RestoreOptions(**options))
        json.dumps(answer.document)
        return answer

    def data_keys(self) -> list[str]:
        """Return the keys of all Data.db."""
        return [info.key for info in self.store.list("node1/") if info.key.endswith("-Data.db")]

    def damage(self, key: str) -> None:
        """Flip a bit of an object, whose size stays."""
        body = bytearray((self.at / key).read_bytes())
        body[len(body) // 2] ^= 1
        (self.at / key).write_bytes(body)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "bucket")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "cassandra")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "restored"


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def staged(node: Node, tag: str) -> dict[str, bytes]:
    """Return what a staged restore of this tag must bring, as long as the tag stands on the node."""
    found = {}
    for data in node.data_dirs:
        for folder in data.glob("*/*/snapshots/*"):
            if folder.name == tag and folder.parts[-4] != "system":
                below = f"{folder.parts[-4]}/{folder.parts[-3][:-33]}"
                found.update({f"{below}/{name}": body for name, body in tree(folder).items()})
    return {name: body for name, body in found.items() if not name.endswith("/manifest.json")}


def live(node: Node) -> dict[str, bytes]:
    """Return the live SSTables of all data directories."""
    return {
        f"{data.name}/{name}": body
        for data in node.data_dirs
        for name, body in tree(data).items()
        if "/snapshots/" not in name and "/backups/" not in name
    }


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Return a bucket with the snapshot `daily` of ks1.users and ks1.groups, and what is in that."""
    at = tmp_path_factory.mktemp("filled")
    node = Node(at / "cassandra")
    for name in ("users", "groups"):
        node.table("ks1", name).flush()
    node.snapshot("daily")
    Shelf(at / "bucket").keep(node, "daily")
    return at / "bucket", staged(node, "daily")


@pytest.fixture
def daily(shelf: Shelf, filled: tuple[Path, dict[str, bytes]]) -> Shelf:
    """Return a bucket with the snapshot `daily`, whose node is gone."""
    shutil.copytree(filled[0], shelf.at, dirs_exist_ok=True)
    return shelf


@pytest.fixture
def expected(filled: tuple[Path, dict[str, bytes]]) -> dict[str, bytes]:
    """Return the files of the snapshot that `daily` took."""
    return dict(filled[1])


# ------------------------------------------------------------------------------------------------------------
# Round trips


def test_a_snapshot_comes_back_byte_for_byte_p6(shelf: Shelf, tmp_path: Path, into: Path) -> None:
    """P6: several data directories, indexes, files without a byte, tables without a file, a tag with odd letters."""
    node, tag = Node(tmp_path / "many", data_dirs=3, fmt="bti"), "été@home~1 +x 100%"
    users = node.table("ks1", "users", indexes=["by_name", "by_age"])
    for number in range(4):
        users.flush(components=8 + number, empty=["Rows.db"])
    node.table("ks2", "without_a_file")
    node.table("system", "local").flush()
    node.snapshot(tag)
    shelf.keep(node, tag)
    answer = shelf.restore(tag=tag, into=into)
    assert answer.code == DONE
    assert tree(into) == staged(node, tag)
    assert len(tree(into)) == (8 + 9 + 10 + 11) * 3 + 2
    assert b"" in tree(into).values()
    assert f"next: nodetool import ks1 users {into}/ks1/users" in answer.text


def test_of_two_lives_of_one_tag_each_comes_back_as_it_was(shelf: Shelf, node: Node, into: Path) -> None:
    users = node.table("ks1", "users")
    versions, lives = [], []
    for _ in range(2):
        users.flush()
        users.compact()
        node.snapshot("daily")
        versions.append(staged(node, "daily"))
        lives.append(shelf.keep(node, "daily")[0].split("/")[-2])
        node.clear("daily")
    for number, life in enumerate(lives):
        assert shelf.restore(tag=f"daily@{life}", into=into / str(number)).code == DONE
        assert tree(into / str(number)) == versions[number]
    shelf.restore(tag="daily", into=into / "newest")
    assert tree(into / "newest") == versions[1]
    with pytest.raises(Missing, match="no snapshot"):
        shelf.restore(tag="daily@1999", into=into / "none")


def test_a_table_whose_listing_is_gone_is_lacking_and_not_forgotten_p6(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    paths = [listing_of(daily, table)[0] for table in ("users", "groups")]
    keys = [str(path.relative_to(daily.at)) for path in paths]
    daily.document("tags/daily/20261121T000000.000000Z.json", tag="daily", taken=keys[0].split("/")[-2], listings=keys)
    assert daily.restore(tag="daily", into=into / "whole").code == DONE
    paths[1].unlink()
    assert daily.restore(tag="daily", table=("ks1.users",), into=into / "users").code == DONE  # nobody asks for groups
    answer = daily.restore(tag="daily", into=into / "all")
    assert answer.code == FAILED
    assert keys[1] in answer.text
    assert "lacking: ks1.groups-" in answer.text
    assert not (into / "all").exists()
    assert daily.restore(tag="daily", into=into / "all", incomplete=True).code == BEHIND
    assert tree(into / "all") == {name: body for name, body in expected.items() if "/groups/" not in name}


def test_a_table_that_prune_has_let_go_of_a_tag_is_lacking_in_it(daily: Shelf, into: Path) -> None:
    paths = [listing_of(daily, table)[0] for table in ("users", "groups")]
    users, groups = (str(path.relative_to(daily.at)) for path in paths)
    record = {"tag": "daily", "taken": users.split("/")[-2], "listings": [users], "pruned": [groups]}
    daily.document("tags/daily/20261121T000000.000000Z.json", **record)
    paths[1].unlink()
    answer = daily.restore(tag="daily", into=into)
    assert (answer.code, f"lacking: {groups} is gone" in answer.text) == (FAILED, True)
    for options in ({"tag": "daily", "exclude_table": ("ks1.groups",)}, {"latest": True}):
        assert daily.restore(**options, into=into / str(len(options))).code == DONE, options


def test_a_later_snapshot_whose_listing_is_gone_is_lacking_in_a_restore_to_a_moment(daily: Shelf, into: Path) -> None:
    key = str(listing_of(daily)[0].relative_to(daily.at))
    life = utc(time.time() + 1)
    gone = key.replace(key.split("/")[-2], life)
    record = {"tag": "daily", "taken": life, "listings": [gone]}
    daily.document("tags/daily/20261121T000000.000000Z.json", **record)
    answer = daily.restore(latest=True, into=into, dry_run=True)
    assert (answer.code, f"lacking: {gone} is gone" in answer.text) == (FAILED, True)
    shutil.move(daily.at / "node1.listings/ks1", daily.at / "aside")
    answer = daily.restore(latest=True, into=into, dry_run=True)
    assert (answer.code, f"lacking: {gone} is gone" in answer.text) == (FAILED, True)
    shutil.move(daily.at / "aside", daily.at / "node1.listings/ks1")
    (daily.at / "node1.listings/tags/daily/20261121T000000.000000Z.json").write_text("{")
    answer = daily.restore(latest=True, into=into, dry_run=True)
    assert (answer.code, "whether a listing is gone cannot be told" in answer.text) == (FAILED, True)


def test_a_table_that_is_named_and_not_in_the_tag_is_no_success(shelf: Shelf, node: Node, into: Path) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("monday")
    node.table("ks1", "logs").flush()
    node.snapshot("tuesday")
    shelf.keep(node, "monday")
    shelf.keep(node, "tuesday")
    assert shelf.restore(tag="monday", table=("ks1.*",), into=into).code == DONE
    with pytest.raises(Missing, match=r"ks1\.logs has nothing of what was asked for"):
        shelf.restore(tag="monday", table=("ks1.users", "ks1.logs"), into=into / "other")


def test_what_is_marked_bad_in_an_archive_is_lacking(shelf: Shelf, tmp_path: Path, into: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for number in (1, 2, 3):
        (archive / f"CommitLog-7-{number}.log").write_bytes(b"log" * number)
    shelf.put_listing(Unit("archive", tag=str(archive)), [archive])
    bad = object_key("node1", (str(archive), "CommitLog-7-2.log"))
    mark = {"key": bad, "found": "absent", "at": "20261121T000000.000000Z"}
    shelf.document("bad/20261121T000000.000000Z.json", keys=[mark])
    answer = shelf.restore(archive=str(archive), into=into, dry_run=True)
    assert (answer.code, "lacking: CommitLog-7-2.log is marked bad" in answer.text) == (FAILED, True)


def test_of_an_archived_file_whose_newest_content_is_bad_no_older_one_comes_back(
    shelf: Shelf, tmp_path: Path, into: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    unit, file = Unit("archive", tag=str(archive)), archive / "cassandra.yaml"
    file.write_text("first")
    shelf.put_listing(unit, [archive])
    file.write_text("second content")
    entry = replace(next(iter(shelf.entries(archive))), key=f"node1{archive}/cassandra.yaml@2")
    now = shelf.clock()
    newest = Listing("node1", unit, now, now, True, (entry,))
    shelf.store.put(listing_key(newest), Body(dump_listing(newest)))
    bad = entry.key
    shelf.document("bad/20261121T000000.000000Z.json", keys=[{"key": bad, "found": "checksum", "at": "2"}])
    answer = shelf.restore(archive=str(archive), into=into, dry_run=True)
    assert (answer.code, "lacking: cassandra.yaml is marked bad" in answer.text) == (FAILED, True)
    answer = shelf.restore(archive=str(archive), into=into, incomplete=True)
    assert (answer.code, tree(into)) == (BEHIND, {})


def test_without_a_snapshot_it_is_told_that_there_may_have_been_more(shelf: Shelf, node: Node, into: Path) -> None:
    node.table("ks1", "users").flush()
    shelf.keep(node)
    note = r"note: no snapshot by then; only what backups/ had is restored: ks1\.users-"
    assert re.search(note, shelf.restore(latest=True, into=into, dry_run=True).text)


def test_what_is_next_is_told_of_each_table(daily: Shelf, into: Path) -> None:
    lines = daily.restore(tag="daily", into=into).text.splitlines()[1:]
    assert sorted(lines) == [f"next: nodetool import ks1 {name} {into}/ks1/{name}" for name in ("groups", "users")]


def test_what_was_flushed_after_the_snapshot_comes_back_too_with_its_indexes(
    shelf: Shelf, tmp_path: Path, into: Path
) -> None:
    node = Node(tmp_path / "two", data_dirs=2)
    users = node.table("ks1", "users", indexes=["by_name"])
    users.flush()
    node.snapshot("daily")
    users.flush()
    shelf.keep(node, "daily")
    shelf.keep(node)
    wanted = {name.split("/", 3)[3]: body for name, body in live(node).items()}
    answer = shelf.restore(latest=True, into=into)
    assert "and 2 SSTables of backups/" in answer.document["tables"][0]["from"]
    found = tree(into / "ks1" / "users")
    assert {name: body for name, body in found.items() if name != "schema.cql"} == wanted
    assert {name.rpartition("/")[0] for name in found} == {"", ".by_name"}


def test_a_generation_that_was_given_twice_comes_back_under_two(shelf: Shelf, node: Node, into: Path) -> None:
    """After a truncate and a restart with an empty backups/ Cassandra numbers from 1 again."""
    users = node.table("ks1", "users")
    bodies = []
    for _ in range(2):
        users.flush()
        bodies.append(users.sstables[0].path("Data.db").read_bytes())
        shelf.keep(node)
        users.generations[""] = 0
        users.families[""] = []
        for path in [*node.root.rglob("nb-*")]:
            path.unlink()
    shelf.restore(latest=True, into=into)
    found = {path.name: path.read_bytes() for path in (into / "ks1" / "users").glob("nb-*")}
    assert {found["nb-1-big-Data.db"], found["nb-2-big-Data.db"]} == {*bodies}
    assert len(found) == 16
    for number in (1, 2):  # each set is of one SSTable
        digest = f"{int(found[f'nb-{number}-big-Digest.crc32']):08x}"
        assert digest == Copy.of(found[f"nb-{number}-big-Data.db"]).crc32


def test_only_the_selected_tables_come_back(daily: Shelf, into: Path) -> None:
    daily.restore(tag="daily", table=("ks1.users",), into=into)
    assert {name for name in tree(into) if not name.startswith("ks1/users/")} == set()
    daily.restore(tag="daily", exclude_table=("ks1.users",), into=into / "rest")
    assert {name.split("/")[1] for name in tree(into / "rest")} == {"groups"}


def test_two_tables_of_one_name_are_never_staged_into_one_directory(shelf: Shelf, node: Node, into: Path) -> None:
    """A table that was dropped and made again has two ids; a tag can hold both."""
    for _ in range(2):
        node.table("ks1", "users").flush()
    node.snapshot("daily")
    shelf.keep(node, "daily")
    with pytest.raises(Usage, match=r"two tables are called ks1\.users"):
        shelf.restore(tag="daily", into=into)
    assert not into.exists()
    shelf.restore(tag="daily", table=(f"ks1.{node.tables[0].directory}",), into=into)
    assert node.tables[0].sstables[0].path("Data.db").read_bytes() in tree(into).values()


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cassbackup, "_RANGE_BYTES", 1000)


def test_a_large_file_comes_in_ranges(shelf: Shelf, node: Node, into: Path, ranges: None) -> None:
    for size in (999, 1000, 1001, 3000, 12_345):
        node.table("ks1", f"t{size}").flush(size=size)
    node.snapshot("daily")
    shelf.keep(node, "daily")
    assert shelf.restore(tag="daily", into=into).code == DONE
    assert tree(into) == staged(node, "daily")


def test_the_first_fault_ends_all_ranges_of_a_file(
    shelf: Shelf, node: Node, into: Path, ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.table("ks1", "users").flush(size=500_000)
    node.snapshot("daily")
    shelf.keep(node, "daily")
    asked: list[int] = []
    fetch = Patient.get

    def get(self: Patient, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        asked.append(start)
        yield from iter([b"short"]) if key.endswith("-Data.db") else fetch(self, key, start, end)

    monkeypatch.setattr(Patient, "get", get)
    assert shelf.restore(tag="daily", into=into).code == FAILED
    assert len(asked) < 100  # of 2 * 500
    assert not list(into.rglob(".cassbackup-*"))


# ------------------------------------------------------------------------------------------------------------
# Each file: as it was, or not at all


def test_mode_time_and_owner_come_back_as_listed(shelf: Shelf, node: Node, into: Path) -> None:
    sstable = node.table("ks1", "users").flush()
    os.chmod(sstable.path("Data.db"), 0o640)
    os.chmod(sstable.path("TOC.txt"), 0o400)
    owner = (12_345, 54_321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for name in sstable.components:
        os.chown(sstable.path(name), *owner)
    os.chmod(sstable.path("Filter.db"), 0o6640)  # as chmod -R g+s leaves it: a restore sets no such bits
    os.utime(sstable.path("Index.db"), ns=(10**18 + 1, 10**18 + 1))
    node.snapshot("daily")
    shelf.keep(node, "daily")
    shelf.restore(tag="daily", into=into)
    for path in (into / "ks1" / "users").glob("nb-*"):
        was, now = os.stat(sstable.home / path.name), os.stat(path)
        assert stat.S_IMODE(now.st_mode) == was.st_mode & 0o777
        assert (now.st_mtime_ns, now.st_uid, now.st_gid) == (was.st_mtime_ns, *owner)
    assert os.stat(into / "ks1" / "users").st_uid in (owner[0], os.geteuid())


def test_a_damaged_object_becomes_no_file_and_the_others_are_there(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    bad = daily.data_keys()[0]
    daily.damage(bad)
    answer = daily.restore(tag="daily", into=into)
    assert answer.code == FAILED
    ((path, why),) = answer.document["failed"].items()
    assert bad in why
    assert {str(into / name) for name in expected.keys() - tree(into).keys()} == {path}
    assert tree(into).items() < expected.items()


def test_what_was_damaged_on_its_way_is_fetched_once_more(
    daily: Shelf, into: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    get, damaged = Patient.get, set[str]()

    def flip(self: Patient, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        first = key not in damaged and key.endswith("-Data.db")
        damaged.add(key)
        yield from (bytes(len(piece)) if first else piece for piece in get(self, key, start, end))

    monkeypatch.setattr(Patient, "get", flip)
    assert daily.restore(tag="daily", into=into).code == DONE
    assert tree(into) == expected


def test_nothing_is_written_when_an_object_is_absent_or_has_another_size(daily: Shelf, into: Path) -> None:
    first, second = daily.data_keys()
    (daily.at / first).unlink()
    with (daily.at / second).open("ab") as file:
        file.write(b"!")
    for dry_run in (False, True):
        answer = daily.restore(tag="daily", into=into, dry_run=dry_run)
        assert answer.code == FAILED
        assert set(answer.document["absent"]) == {first, second}
        assert first in answer.text
        assert not into.exists()


def test_without_what_is_marked_bad_the_other_sstables_come_when_asked(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    """Of an SSTable that lacks a component nothing comes: Cassandra could not open it."""
    bad = next(info.key for info in daily.store.list("node1/") if "/users-" in info.key and "Index.db" in info.key)
    (daily.at / bad).unlink()
    marks = [{"key": bad, "found": "absent", "at": "20261121T000000.000000Z"}]
    daily.document("bad/20261121T000000.000000Z.json", keys=marks)
    answer = daily.restore(tag="daily", into=into)
    assert (answer.code, "nb-1-big-Index.db" in answer.text) == (FAILED, True)
    assert daily.restore(tag="daily", into=into, incomplete=True).code == BEHIND
    assert tree(into) == {name: body for name, body in expected.items() if not name.startswith("ks1/users/nb-")}
    shutil.rmtree(into)
    daily.document("bad/20261122T000000.000000Z.json", keys=[{**marks[0], "found": "good"}])
    assert daily.restore(tag="daily", into=into).document["absent"] == [bad]


def test_what_is_there_already_is_kept_and_another_file_is_never_overwritten(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    daily.restore(tag="daily", into=into)
    users = into / "ks1" / "users"
    before = oracle.survey(into)
    inodes = {path: path.stat().st_ino for path in users.iterdir()}
    assert daily.restore(tag="daily", into=into).code == DONE
    assert oracle.untouched(before, oracle.survey(into)) == []
    assert {path: path.stat().st_ino for path in users.iterdir()} == inodes
    ours, gone = users / "nb-1-big-Index.db", users / "nb-1-big-Data.db"
    ours.write_bytes(b"o" * ours.stat().st_size)
    gone.unlink()
    answer = daily.restore(tag="daily", into=into)
    assert answer.code == FAILED
    assert list(answer.document["failed"]) == [str(ours)]
    assert set(ours.read_bytes()) == {ord("o")}
    assert gone.read_bytes() == expected["ks1/users/nb-1-big-Data.db"]


def test_what_appears_there_while_a_file_is_fetched_is_not_overwritten(
    daily: Shelf, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P6: the name is given by link(2), which refuses; rename(2) would take the other file away."""
    get, theirs = Patient.get, into / "ks1" / "users" / "nb-1-big-Data.db"

    def put(self: Patient, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if "/users-" in key and key.endswith("-Data.db"):
            theirs.write_bytes(b"theirs")
        yield from get(self, key, start, end)

    monkeypatch.setattr(Patient, "get", put)
    answer = daily.restore(tag="daily", into=into)
    assert list(answer.document["failed"]) == [str(theirs)]
    assert theirs.read_bytes() == b"theirs"
    assert not list(into.rglob(".cassbackup-*"))


@pytest.mark.parametrize("what", ["link", "fifo", "directory"])
def test_what_is_no_file_is_not_taken_for_one(shelf: Shelf, node: Node, into: Path, what: str) -> None:
    node.table("ks1", "users").flush(empty=["Filter.db"])
    node.snapshot("daily")
    shelf.keep(node, "daily")
    path = into / "ks1" / "users" / "nb-1-big-Filter.db"
    path.parent.mkdir(parents=True)
    if what == "link":
        path.symlink_to("/dev/null")
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    if what == "directory":
        assert list(shelf.restore(tag="daily", into=into).document["failed"]) == [str(path)]
    else:
        with pytest.raises(Usage, match=r"Filter\.db"):
            shelf.restore(tag="daily", into=into)


def test_a_file_that_is_moved_away_is_never_written_to_again(shelf: Shelf, node: Node, into: Path) -> None:
    """Killed between its two names a file has both; what comes next under the other must not reach into it."""
    users = node.table("ks1", "users")
    users.flush(size=5000)
    node.snapshot("daily")
    shelf.keep(node, "daily")
    shelf.restore(tag="daily", into=into)
    file = into / "ks1" / "users" / "nb-1-big-Data.db"
    body = file.read_bytes()
    left = file.with_name(f".cassbackup-{cassbackup.hash_name(file.name)}")
    os.link(file, left)
    file.rename(into.parent / "mine")
    users.sstables[0].path("Data.db").unlink()
    users.sstables[0].write("Data.db", bytes(reversed(body)))
    node.snapshot("other")
    shelf.keep(node, "other")
    shelf.restore(tag="other", into=into)
    assert (into.parent / "mine").read_bytes() == body
    assert file.read_bytes() == bytes(reversed(body))
    assert not left.exists()


def test_of_two_restores_at_once_the_second_is_refused(daily: Shelf, into: Path) -> None:
    into.mkdir()
    fd = os.open(into, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(Fault, match="another restore"):
        daily.restore(tag="daily", into=into)
    os.close(fd)
    assert not tree(into)


KILLED = """
import sys, cassbackup as c
bucket = c.Bucket(c.Patient(c.open_store("file://" + sys.argv[1], c.StoreOptions()), 1.0), 4)
c.restore(bucket, c.RestoreOptions(tag="daily", into=sys.argv[2]))
"""


@pytest.mark.slow
def test_a_restore_that_is_killed_again_and_again_leaves_no_partial_file_p6(
    shelf: Shelf, node: Node, into: Path
) -> None:
    """P6: whatever has its name is complete, at each moment of death."""
    for number in range(12):
        size = random.Random(number).choice([100, 400_000])
        node.table("ks1", f"t{number}", indexes=["by_name"]).flush(size=size)
    node.snapshot("daily")
    shelf.keep(node, "daily")
    wanted = staged(node, "daily")
    chance, alive = random.Random(11), 0
    for _ in range(12):
        for path in into.rglob("*"):
            if path.is_file() and chance.random() < 0.5:  # so that there is something to do each time
                path.unlink()
        before = set(into.rglob("*"))
        command = [sys.executable, "-c", KILLED, str(shelf.at), str(into)]
        running = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        while running.poll() is None and set(into.rglob("*")) == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.1))
        alive += running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
        finished = {name: body for name, body in tree(into).items() if "/.cassbackup-" not in name}
        assert finished.items() <= wanted.items()
    assert alive > 3
    assert shelf.restore(tag="daily", into=into).code == DONE
    assert tree(into) == wanted


# ------------------------------------------------------------------------------------------------------------
# Listings that we did not write


def listing_of(shelf: Shelf, table: str = "users") -> tuple[Path, Json]:
    """Return path and text of the listing of a table's snapshot."""
    (path,) = shelf.at.glob(f"node1.listings/ks1/{table}-*/snapshots/*/*/*.json")
    return path, json.loads(path.read_bytes())


def tamper(shelf: Shelf, change: Change, found: tuple[Path, Json] | None = None) -> None:
    """Change a listing, or that of ks1.users, and its name so that it agrees."""
    path, document = found or listing_of(shelf)
    change(document)
    name = path.name
    with contextlib.suppress(Exception):
        sizes = [entry["size"] for entries in document["directories"].values() for entry in entries]
        name = "-".join([*path.name.split("-")[:2], str(len(sizes)), f"{sum(sizes)}.json"])
    path.unlink()
    path.with_name(name).write_text(json.dumps(document))


def entry_with(**words: Any) -> Change:
    """Return what changes an entry of a listing."""

    def change(document: Json) -> None:
        every = [entry for entries in document["directories"].values() for entry in entries]
        entry = next((entry for entry in every if "Data.db" in entry["name"]), every[0])
        for word, value in words.items():
            entry[word] = value(entry[word]) if callable(value) else value

    return change


def moved(change: Callable[[str], str]) -> Change:
    """Return what moves the entries of a listing into another directory."""
    return lambda page: page.update(directories={change(name): files for name, files in page["directories"].items()})


HOSTILE: dict[str, Change] = {
    "name ../": entry_with(name="../../../evil-Data.db"),
    "name quoted ../": entry_with(name="%2e%2e%2fnb-1-big-Data.db"),
    "name absolute": entry_with(name="/tmp/nb-1-big-Data.db"),
    "name quoted NUL": entry_with(name="nb-1-big-%00Data.db"),
    "name empty": entry_with(name=""),
    "name ..": entry_with(name=".."),
    "name huge": entry_with(name="nb-1-big-" + "D" * 300),
    "name number": entry_with(name=7),
    "name lone surrogate": entry_with(name="nb-1-big-\ud800Data.db"),
    "directory ../": moved(lambda name: name + "/../../../../.."),
    "directory .": moved(lambda name: name + "/./x"),
    "directory //": moved(lambda name: name + "//x"),
    "directory relative": moved(lambda name: name[1:]),
    "directory elsewhere": moved(lambda name: "/etc/cron.d"),
    "directory of another tag": moved(lambda name: name + "2"),
    "directory of another table": moved(lambda name: name.replace("/users-", "/groups-")),
    "directory from above": moved(lambda name: "/var/../etc" + name),
    "directory NUL": moved(lambda name: "/x%00y" + name),
    "directory lone surrogate": moved(lambda name: "/x\ud800y" + name),
    "directory huge": moved(lambda name: name + "/" + "x" * 300),
    "key of node10": entry_with(key=lambda key: key.replace("node1/", "node10/", 1)),
    "key ../": entry_with(key="node1/../node2/x"),
    "key of a listing": entry_with(key="node1.listings/owner.json"),
    "key NUL": entry_with(key="node1/a\0b"),
    "key huge": entry_with(key="node1/" + "x" * 5000),
    "key lone surrogate": entry_with(key="node1/\udcff"),
    "key none": entry_with(key=None),
    "mode words": entry_with(mode="rwx"),
    "size text": entry_with(size="2048"),
    "size negative": entry_with(size=-1),
    "size beyond all disks": entry_with(size=1 << 70),
    "time beyond all years": entry_with(mtime_ns=1 << 90),
    "crc32": entry_with(crc32="../"),
    "version 1": lambda page: page.update(version=1),
    "no version": lambda page: page.pop("version"),
    "directories a list": lambda page: page.update(directories=[]),
    "entries a text": lambda page: page.update(directories=dict.fromkeys(page["directories"], "x")),
    "complete no bool": lambda page: page.update(complete="yes"),
    "another node": lambda page: page.update(node="node10"),
    "another table": lambda page: page.update(table="groups"),
}


@pytest.fixture
def assert_refused(daily: Shelf, into: Path) -> Callable[[], None]:
    """Return a function that fails unless the restore is refused before anything is written anywhere."""

    def refused() -> None:
        before = oracle.survey(daily.at.parent, leave_out=())
        try:
            assert daily.restore(tag="daily", into=into).code == FAILED
        except Corrupt:
            pass
        assert oracle.untouched(before, oracle.survey(daily.at.parent, leave_out=())) == []
        assert not into.exists()

    return refused


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_listing_is_refused_before_anything_is_written(
    daily: Shelf, assert_refused: Callable[[], None], what: str
) -> None:
    tamper(daily, HOSTILE[what])
    assert_refused()


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"version": 2}', b"\xff\xfe", b'"1"'])
def test_a_listing_that_is_none_is_refused(daily: Shelf, assert_refused: Callable[[], None], text: bytes) -> None:
    listing_of(daily)[0].write_bytes(text)
    assert_refused()


def test_a_listing_that_cannot_be_read_is_named_and_the_rest_comes_when_asked(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    path, _ = listing_of(daily)
    path.write_bytes(b"{")
    answer = daily.restore(tag="daily", into=into)
    assert path.name in answer.text
    assert "--incomplete" in answer.document["refused"]
    assert daily.restore(tag="daily", into=into, incomplete=True).code == BEHIND
    assert tree(into) == {name: body for name, body in expected.items() if name.startswith("ks1/groups/")}


def test_an_unreadable_listing_is_not_missed_where_another_of_its_life_is_complete(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    path, _ = listing_of(daily)
    path.with_name(path.name.replace("20", "19", 1).replace("complete", "incomplete")).write_bytes(b"{")
    for options in ({"tag": "daily"}, {"latest": True}):
        assert daily.restore(into=into, **options).code == DONE
        assert tree(into) == expected


def test_names_that_no_terminal_should_see_are_quoted(daily: Shelf, into: Path) -> None:
    path, document = listing_of(daily)
    old, name = f"{document['table']}-{document['table_id']}", "a\x1b[31m\udcff-" + "a" * 32
    quoted = name.replace("\x1b", "%1B").replace("\udcff", "%FF")
    document |= {"table": quoted[:-33], "table_id": "a" * 32}
    document["directories"] = {text.replace(old, quoted): files for text, files in document["directories"].items()}
    daily.put(str(path.relative_to(daily.at)).replace(old, quoted), json.dumps(document).encode())
    answer = daily.restore(tag="daily", into=into, dry_run=True)
    assert "\x1b" not in answer.text
    assert quoted in answer.text


@pytest.mark.parametrize("owner", ["9" * 30, "a\0b", "²", "-5", "nobody-knows-me", str((1 << 32) - 1)])
def test_an_owner_whom_this_machine_cannot_have_is_left_out(
    daily: Shelf, into: Path, expected: dict[str, bytes], owner: str
) -> None:
    tamper(daily, entry_with(user=owner, group=owner))
    assert daily.restore(tag="daily", into=into).code == DONE
    assert tree(into) == expected


# ------------------------------------------------------------------------------------------------------------
# Archives


@pytest.fixture
def logs(shelf: Shelf, tmp_path: Path) -> Path:
    """Return a directory of commit logs that was archived in two goes."""
    found = tmp_path / "archive"
    found.mkdir()
    for number in range(1, 4):
        (found / f"CommitLog-7-{number}.log").write_bytes(b"%d" % number * 9 * number)
        os.utime(found / f"CommitLog-7-{number}.log", (number, number))
        if number != 1:
            shelf.put_listing(Unit("archive", tag=str(found)), [found])
    return found


def test_archived_files_come_back_and_over_nothing(shelf: Shelf, logs: Path, into: Path) -> None:
    assert shelf.restore(archive=f"{logs}/", into=into).code == DONE
    assert tree(into) == tree(logs)
    assert {path.stat().st_mtime for path in into.iterdir()} == {1, 2, 3}
    (into / "CommitLog-7-1.log").unlink()
    (into / "CommitLog-7-2.log").write_bytes(b"m" * 18)
    assert "has other content" in str(shelf.restore(archive=str(logs), into=into).document["failed"])
    assert tree(into) == {**tree(logs), "CommitLog-7-2.log": b"m" * 18}


def test_a_directory_below_an_archive_is_told_to_be_one_of_its_own(shelf: Shelf, logs: Path, into: Path) -> None:
    for name in (f"{logs}/deep er", f"{logs}-other"):
        Path(name).mkdir()
        (Path(name) / "CommitLog-7-9.log").write_bytes(b"9")
        shelf.put_listing(Unit("archive", tag=name), [Path(name)])
    answer = shelf.restore(archive=f"{logs}/", into=into, dry_run=True)
    notes = [line for line in answer.text.splitlines() if "archive of its own" in line]
    assert notes == [f"note: {logs}/deep er is an archive of its own: restore it, too"]


def test_what_was_lost_before_it_could_be_archived_is_named(shelf: Shelf, logs: Path, into: Path) -> None:
    shelf.put_listing(Unit("archive", tag=str(logs)), [], lost=("CommitLog-7-9\x1b.log",))
    answer = shelf.restore(archive=str(logs), into=into, incomplete=True)
    assert answer.code == BEHIND
    assert answer.document["lacking"] == ["CommitLog-7-9%1B.log was lost before it was stored"]
    assert tree(into) == tree(logs)


@pytest.mark.parametrize("what", [what for what in HOSTILE if what.startswith(("name", "key of", "key ../"))])
def test_a_hostile_listing_of_an_archive_writes_nothing_outside(
    shelf: Shelf, logs: Path, into: Path, what: str
) -> None:
    path = max(shelf.at.glob("node1.listings/archive/*/*.json"))
    tamper(shelf, HOSTILE[what], (path, json.loads(path.read_bytes())))
    before = oracle.survey(shelf.at.parent, leave_out=("restored",))
    shelf.restore(archive=str(logs), into=into, incomplete=True)
    assert oracle.untouched(before, oracle.survey(shelf.at.parent, leave_out=("restored",))) == []
    assert tree(into).keys() <= tree(logs).keys()


# ------------------------------------------------------------------------------------------------------------
# The plan, and what is said


def test_a_dry_run_says_what_would_come_and_writes_nothing(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    answer = daily.restore(tag="daily", into=into, dry_run=True)
    assert (answer.code, into.exists()) == (DONE, False)
    assert f"{len(expected)} files" in answer.text
    assert "ks1.users-" in answer.text
    document = answer.document
    assert (document["files"], document["bytes"]) == (len(expected), sum(map(len, expected.values())))
    assert (document["node"], document["absent"], document["lacking"]) == ("node1", [], [])
    assert {table["sstables"] for table in document["tables"]} == {1}


def test_without_into_a_directory_of_its_own_is_made(
    daily: Shelf, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cassbackup, "data_directories", lambda: [str(tmp_path / "data")])
    daily.restore(tag="daily")
    assert tree(tmp_path / "cassbackup-restore") == expected


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ({}, MISUSED, "what is to be restored"),
        ({"tag": "daily", "latest": True}, MISUSED, "you passed --tag and --latest"),
        ({"tag": "daily", "at": 5.0}, MISUSED, "you passed --tag and --at"),
        ({"archive": "/x", "table": ("ks1",)}, MISUSED, "no tables"),
        ({"tag": "daily", "in_place": True}, MISUSED, "--same-node"),
        ({"tag": "daily", "in_place": True, "same_node": True, "new_node": True}, MISUSED, "--same-node"),
        ({"tag": "daily", "same_node": True}, MISUSED, "--in-place"),
        ({"at": 9e9}, MISUSED, "future"),
        ({"at": 1e9}, FAILED, r"by 2001.*the first moment is 20[2-9]\d"),
        ({"tag": "dialy"}, FAILED, "no snapshot 'dialy': there are daily"),
        ({"tag": "dialy", "table": ("ks1.users",)}, FAILED, "no snapshot 'dialy': there are daily"),
        ({"tag": "daily", "table": ("ks1.user",)}, FAILED, r"no table ks1\.user.*there are ks1\.groups-.*ks1\.users-"),
        ({"latest": True, "table": ("ks9",)}, FAILED, "no table ks9"),
        ({"latest": True, "table": ("ks1.users", "ks9.*")}, FAILED, r"no table ks9\.\*"),
        ({"latest": True, "exclude_table": ("ks1.usr",)}, FAILED, r"no table ks1\.usr"),
        ({"tag": "daily", "node": "node"}, FAILED, "no node 'node' .*node1"),
        ({"archive": "/no/such"}, FAILED, "no archive of /no/such"),
    ],
)
def test_what_cannot_be_done_is_said(daily: Shelf, into: Path, options: Json, code: int, told: str) -> None:
    with pytest.raises(Fault, match=told) as caught:
        daily.restore(into=into, **options)
    assert caught.value.code == code
    assert not into.exists()


def test_of_cassandras_own_keyspaces_none_is_staged_unless_named_and_of_its_roles_that_is_told(
    shelf: Shelf, node: Node, into: Path
) -> None:
    for keyspace in ("system", "system_auth", "system_foo"):  # the last is somebody's own
        node.table(keyspace, "roles").flush()
    node.snapshot("daily")
    shelf.keep(node, "daily")
    told = "system_auth, which has roles and grants, is left out; --table system_auth takes it"
    for options in ({"tag": "daily"}, {"latest": True}):
        answer = shelf.restore(into=into / "all", **options)
        assert (answer.code, told in answer.document["notes"], os.listdir(into / "all")) == (DONE, True, ["system_foo"])
    answer = shelf.restore(tag="daily", table=("system_auth",), into=into / "roles")
    assert (answer.code, told in answer.document["notes"], os.listdir(into / "roles")) == (DONE, False, ["system_auth"])


def test_a_snapshot_that_lacks_files_comes_back_only_when_asked_and_with_exit_3(
    shelf: Shelf, node: Node, into: Path
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    users.flush()
    node.snapshot("daily")
    for path in node.root.glob("data/ks1/users-*/snapshots/daily/nb-2-big-*"):
        path.unlink()
    shelf.keep(node, "daily", missing=("nb-2-big-Data.db",))
    answer = shelf.restore(tag="daily", into=into)
    assert answer.code == FAILED
    assert "INCOMPLETE" in answer.text
    assert not into.exists()
    answer = shelf.restore(tag="daily", into=into, incomplete=True)
    assert answer.code == BEHIND
    assert "nb-2-big-Data.db" in str(answer.document["lacking"])
    assert tree(into) == staged(node, "daily")


def test_archived_objects_are_named_before_the_first_byte(
    daily: Shelf, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, head, cold = cassbackup.find_objects, Patient.head, daily.data_keys()[0]

    def archived(info: Any) -> Any:
        return replace(info, archived="GLACIER") if info.key == cold else info

    def found(*args: Any) -> Any:
        return {key: archived(info) for key, info in find(*args).items()}

    monkeypatch.setattr(cassbackup, "find_objects", found)
    assert daily.restore(tag="daily", into=into / "thawed").code == DONE  # only HEAD tells
    monkeypatch.setattr(Patient, "head", lambda self, key: archived(head(self, key)))
    answer = daily.restore(tag="daily", into=into / "frozen", incomplete=True)
    assert (answer.code, answer.document["needs_thaw"]) == (FAILED, [cold])
    assert not (into / "frozen").exists()


def test_an_old_snapshot_is_restored_with_a_word_on_what_was_deleted_since(
    shelf: Shelf, node: Node, into: Path
) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    long_ago = time.time() - 20 * 86400
    for path in node.root.glob("data/ks1/*/snapshots/daily/manifest.json"):
        os.utime(path, (long_ago, long_ago))
    shelf.keep(node, "daily")
    assert "gc_grace" in shelf.restore(tag="daily", into=into, dry_run=True).text


def test_how_far_the_bucket_reaches_is_told_and_a_damaged_heartbeat_does_no_harm(daily: Shelf, into: Path) -> None:
    daily.document("heartbeat/20261121T000000.000000Z.json", listed_through="20261120T000000.000000Z")
    said = daily.restore(latest=True, into=into, dry_run=True).text
    assert "found after 20261120T000000" in said
    assert "gc_grace" in said, "the latest of a node that died long ago is old"
    daily.document("heartbeat/20261122T000000.000000Z.json", listed_through="20991120T000000.000000Z")
    said = daily.restore(latest=True, into=into, dry_run=True).text
    assert "found after" not in said
    assert "gc_grace" not in said
    daily.put("node1.listings/heartbeat/20991121T000000.000000Z.json", b"\xff{")
    assert daily.restore(latest=True, into=into).code == DONE


# ------------------------------------------------------------------------------------------------------------
# The target


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_disk_that_is_too_small_is_not_filled(
    daily: Shelf, into: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real = os.statvfs("/")
    words = {name: getattr(real, name) for name in ("f_frsize", "f_bavail", "f_files", "f_favail")}
    words |= {"f_bavail": 1} if what == "bytes" else {"f_files": 100, "f_favail": 3}
    monkeypatch.setattr(os, "statvfs", lambda path: type("Disk", (), words))
    with pytest.raises(Fault, match="do not fit"):
        daily.restore(tag="daily", into=into)
    assert not tree(into)


def test_two_directories_on_one_disk_share_its_room(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    large = Fingerprint(1, int(disk.f_bavail * disk.f_frsize * 0.7), 1)
    entry = Known("/d", "nb-1-big-Data.db", large, 0o644, "", "", "00000000", "node1/d", "")
    roots = [tmp_path / name for name in ("data1", "data2")]
    for root in roots:
        root.mkdir()
    placed = [Placed(entry, str(root), "ks1/users/nb-1-big-Data.db") for root in roots]
    cassbackup.check_space(placed[:1])
    with pytest.raises(Fault, match=r"2 files of .* do not fit"):
        cassbackup.check_space(placed)


def test_a_live_data_directory_is_no_target(daily: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "some/data"
    (data / "system" / ("local-" + "a" * 32)).mkdir(parents=True)
    for target in (data, data / "new" / "er"):
        with pytest.raises(Usage, match="is in the data directory"):
            daily.restore(tag="daily", into=target)
    other = tmp_path / "empty"
    monkeypatch.setattr(cassbackup, "data_directories", lambda: [str(other)])
    with pytest.raises(Usage, match="is in the data directory"):
        daily.restore(tag="daily", into=other)
    assert [path.name for path in data.iterdir()] == ["system"]


def test_a_directory_with_other_things_is_no_target(daily: Shelf, into: Path) -> None:
    (into / "ks1" / "users").mkdir(parents=True)
    for path in (
        into / "notes.txt",
        into / "ks1" / "users" / "nb-9-big-Data.db",
        into / "ks1" / "users" / "nb-1-big-Data.db",
    ):
        path.write_bytes(b"theirs")
        with pytest.raises(Usage, match=re.escape(f"{path} is not of this restore")):
            daily.restore(tag="daily", into=into)
        path.unlink()
    assert not tree(into)
    assert daily.restore(tag="daily", into=into).code == DONE


@pytest.mark.parametrize("place", ["ks1", "ks1/users"])
@pytest.mark.parametrize("what", ["link", "file"])
def test_a_target_with_a_symbolic_link_or_a_file_on_the_way_is_refused(
    daily: Shelf, into: Path, tmp_path: Path, place: str, what: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (into / place).parent.mkdir(parents=True)
    (into / place).symlink_to(elsewhere) if what == "link" else (into / place).write_text("")
    before = oracle.survey(into)
    with pytest.raises(Usage):
        daily.restore(tag="daily", into=into)
    assert oracle.untouched(before, oracle.survey(into)) == []
    assert not list(elsewhere.iterdir())


def test_a_target_that_leads_into_the_data_directory_by_a_link_is_refused(
    daily: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "ks").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "ks")
    monkeypatch.setattr(cassbackup, "data_directories", lambda: [str(tmp_path / "data")])
    with pytest.raises(Usage, match="is in the data directory"):
        daily.restore(tag="daily", into=tmp_path / "link")
    assert not tree(tmp_path / "data")


def test_a_link_that_comes_while_a_restore_runs_is_not_followed_p6(shelf: Shelf, into: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("")
    (into / "ks1").mkdir(parents=True)
    (into / "ks1" / "users").symlink_to(elsewhere)
    placed = Placed(next(shelf.entries(elsewhere)), str(into), "ks1/users/file")
    with pytest.raises(OSError, match="users"), open_folder(placed):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_directory_that_a_killed_run_has_made_gets_its_owner(shelf: Shelf, into: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.chown(tmp_path / "file", 12345, 23456)
    (entry,) = (one for one in shelf.entries(tmp_path) if one.name == "file")
    (into / "ks1").mkdir(parents=True)
    with open_folder(Placed(entry, str(into), "ks1/users/file")):
        pass
    owners = [(path.stat().st_uid, path.stat().st_gid) for path in (into / "ks1", into / "ks1" / "users")]
    assert owners == [(12345, 23456)] * 2
    assert into.stat().st_uid == 0


def test_a_target_that_is_made_can_be_read_by_cassandra_whatever_the_umask_is(daily: Shelf, into: Path) -> None:
    before = os.umask(0o077)
    try:
        daily.restore(tag="daily", into=into / "deeper")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (into, into / "deeper")] == [0o755] * 2


def test_a_staged_keyspace_that_is_called_backups_is_looked_into(shelf: Shelf, node: Node, into: Path) -> None:
    node.table("backups", "users").flush()
    node.snapshot("daily")
    shelf.keep(node, "daily")
    stranger = into / "backups" / "users" / "nb-99-big-Data.db"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"theirs")
    with pytest.raises(Usage, match=re.escape(f"{stranger} is not of this restore")):
        shelf.restore(tag="daily", into=into)
    stranger.unlink()
    assert shelf.restore(tag="daily", into=into).code == DONE


def test_a_target_that_may_not_be_written_names_user_and_directory(daily: Shelf, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in ("/proc/nowhere", tmp_path / "file" / "below"):
        with pytest.raises(Usage, match=f"user id {os.geteuid()} cannot write to {target}"):
            daily.restore(tag="daily", into=target)


# ------------------------------------------------------------------------------------------------------------
# The schema


def test_the_schema_alone_comes_from_the_snapshot_s_own_files(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    for key in daily.data_keys():
        (daily.at / key).unlink()  # it needs no SSTables
    own = {name: body for name, body in expected.items() if name.endswith("schema.cql")}
    for _ in range(2):
        assert daily.restore(tag="daily", into=into, schema_only=True).code == DONE
        assert tree(into) == own
    mine = into / "ks1" / "users" / "schema.cql"
    mine.unlink()
    (mine.parent / f".cassbackup-{cassbackup.hash_name('schema.cql')}").write_text("of a run that was killed")
    assert daily.restore(tag="daily", into=into, schema_only=True).code == DONE
    assert tree(into) == own
    mine.write_text("mine")
    assert daily.restore(tag="daily", into=into, schema_only=True).code == FAILED
    assert mine.read_text() == "mine"


def test_a_table_whose_schema_nobody_has_is_lacking_where_the_schema_is_asked_for_p8(
    shelf: Shelf, node: Node, into: Path
) -> None:
    for name in ("users", "groups"):
        node.table("ks1", name).flush()
    node.snapshot("daily")
    next(node.root.glob("data/ks1/users-*/snapshots/daily/schema.cql")).unlink()
    shelf.keep(node, "daily")
    answer = shelf.restore(tag="daily", into=into, schema_only=True)
    assert answer.code == BEHIND
    assert [name for name in tree(into) if "/users/" in name] == []
    keys = [str(listing_of(shelf, "groups")[0].relative_to(shelf.at))]
    record = {"node": "node1", "tag": "daily", "ring": "", "taken": keys[0].split("/")[-2], "listings": keys}
    shelf.document("tags/daily/20261121T000000.000000Z.json", schema="CREATE KEYSPACE ks1 …;", **record)
    assert shelf.restore(tag="daily", into=into, schema_only=True).code == DONE


def test_the_schema_that_the_cluster_described_comes_too_and_never_overwrites(
    daily: Shelf, into: Path, expected: dict[str, bytes]
) -> None:
    keys = [str(listing_of(daily, table)[0].relative_to(daily.at)) for table in ("users", "groups")]
    record = {"node": "node1", "tag": "daily", "ring": "", "taken": keys[0].split("/")[-2]}
    daily.document("tags/daily/20261121T000000.000000Z.json", schema="CREATE KEYSPACE ks1 …;", listings=keys, **record)
    daily.document(
        "tags/daily/20261122T000000.000000Z.json",
        schema="of another life",
        listings=[],
        pruned=[keys[0].replace("/daily/202", "/daily/201")],
        **{**record, "taken": "20261120T000000.000000Z"},
    )
    own = {name: body for name, body in expected.items() if name.endswith("schema.cql")}
    for _ in range(2):
        daily.restore(tag="daily", into=into, schema_only=True)
        assert tree(into) == own | {"schema.cql": "CREATE KEYSPACE ks1 …;".encode()}
    assert daily.restore(tag="daily", into=into).code == DONE  # the tables may follow into the same directory
    (into / "schema.cql").write_text("mine")
    with pytest.raises(Conflict):
        daily.restore(tag="daily", into=into, schema_only=True)
    assert (into / "schema.cql").read_text() == "mine"


def test_a_tag_record_that_cannot_be_read_is_named(daily: Shelf, into: Path) -> None:
    daily.put("node1.listings/tags/daily/20261121T000000.000000Z.json", b"{")
    with pytest.raises(Corrupt, match="tags/daily"):
        daily.restore(tag="daily", into=into, schema_only=True)


def test_the_schema_that_was_described_for_an_older_snapshot_does_not_pass_for_that_of_this_one_p6(
    shelf: Shelf, node: Node, into: Path
) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("weekly")
    keys = shelf.keep(node, "weekly")
    record = {"node": "node1", "tag": "weekly", "ring": "", "taken": keys[0].split("/")[-2]}
    daily = {"schema": "CREATE TABLE ks1.users, and no other", "listings": keys}
    shelf.document("tags/weekly/20261121T000000.000000Z.json", **record, **daily)
    node.table("ks1", "groups").flush()
    node.snapshot("daily")  # by nodetool: nobody asked for the schema
    shelf.keep(node, "daily")
    assert shelf.restore(tag="daily", into=into, schema_only=True).code == DONE
    assert sorted(tree(into)) == ["ks1/groups/schema.cql", "ks1/users/schema.cql"]


def test_a_tag_record_that_cannot_be_read_keeps_no_other_tags_schema_from_coming(daily: Shelf, into: Path) -> None:
    daily.put("node1.listings/tags/weekly/20261121T000000.000000Z.json", b"{")
    assert daily.restore(tag="daily", into=into, schema_only=True).code == BEHIND
    assert "ks1/users/schema.cql" in tree(into)


def test_the_schema_of_a_table_that_was_truncated_since_its_snapshots_comes_too_p8(
    shelf: Shelf, node: Node, into: Path
) -> None:
    users = node.table("ks1", "users")
    for table in (users, node.table("ks1", "groups")):
        table.flush()
    node.snapshot("daily")
    shelf.keep(node, "daily")
    shelf.keep(node, node.truncate(users))
    users.flush()
    shelf.keep(node)
    assert shelf.restore(latest=True, into=into, schema_only=True).code == DONE
    assert sorted(tree(into)) == ["ks1/groups/schema.cql", "ks1/users/schema.cql"]


# ------------------------------------------------------------------------------------------------------------
# In place: a stopped node


@pytest.fixture
def stopped(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Shelf, Node]:
    """Return a node of two data directories, whose snapshot `daily` is stored, with system tables."""
    node = Node(tmp_path / "lost", data_dirs=2, seed=4)
    for keyspace, name in [("ks1", "users"), ("system", "local"), ("system", "peers_v2"), ("system_schema", "tables")]:
        table = node.table(keyspace, name, indexes=["by_name"] if keyspace == "ks1" else [])
        for _ in range(4):
            table.flush()
    node.snapshot("daily")
    shelf.keep(node, "daily")
    monkeypatch.setattr(cassbackup, "cassandra_pids", list)
    monkeypatch.setattr(cassbackup, "data_directories", lambda: [str(path) for path in node.data_dirs])
    return shelf, node


@contextlib.contextmanager
def empty(node: Node) -> Iterator[dict[str, bytes]]:
    """Take the data directories away, put empty ones in their place, and yield what was live."""
    was = live(node)
    for data in node.data_dirs:
        shutil.rmtree(data)
        data.mkdir()
    yield was


def in_place(shelf: Shelf, **options: Any) -> Answer:
    """Restore in place."""
    return shelf.restore(tag="daily", in_place=True, **options)


def test_in_place_each_file_comes_back_to_its_own_data_directory(stopped: tuple[Shelf, Node]) -> None:
    shelf, node = stopped
    with empty(node) as was:
        answer = in_place(shelf, same_node=True)
        assert (answer.code, live(node)) == (DONE, was)
        assert {name.split("/")[0] for name in was} == {"data1", "data2"}
        assert "commitlog" in answer.text
        before = oracle.survey(node.root)
        assert in_place(shelf, same_node=True).code == DONE
        assert oracle.untouched(before, oracle.survey(node.root)) == []


def test_a_new_node_gets_the_tokens_but_not_the_identity_of_the_old_one(stopped: tuple[Shelf, Node]) -> None:
    shelf, node = stopped
    about = {"cluster": "c", "host_id": "h", "dc": "dc7", "rack": "r9", "addresses": ["10.0.0.1"]}
    shelf.document("node.20261121T000000.000000Z.json", tokens=["-9", "42"], **about)
    with empty(node) as was:
        answer = in_place(shelf, new_node=True, node="10.0.0.1")
        kept = {name for name in was if "/system/local" not in name and "/system/peers" not in name}
        assert live(node).keys() == kept
    for line in ("initial_token: -9,42", "num_tokens: 2", "auto_bootstrap: false", "dc=dc7", "rack=r9"):
        assert line in answer.text


def test_data_directories_are_mapped_as_told(stopped: tuple[Shelf, Node], tmp_path: Path) -> None:
    shelf, node = stopped
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = node.data_dirs
    wanted = {name.split("/", 1)[1]: body for name, body in live(node).items() if "/users-" in name}
    for given in ((f"{first}={tmp_path / 'none'}",), (f"{first}x={first}",), (str(one),)):
        with pytest.raises(Usage, match="--data-dir"):
            in_place(shelf, same_node=True, data_dir=given)
    one.mkdir()
    two.mkdir()
    in_place(shelf, same_node=True, data_dir=(f"{first}={two}", f"{second}={one}"))
    found = {f"data1/{name}": body for name, body in tree(two).items()}
    assert found | {f"data2/{name}": body for name, body in tree(one).items()} == live(node)
    for path in (one, two):
        shutil.rmtree(path)
        path.mkdir()
    in_place(shelf, same_node=True, table=("ks1",), data_dir=(str(one),))
    assert tree(one) == wanted


def test_in_place_the_target_is_said_once_and_is_a_name(stopped: tuple[Shelf, Node], tmp_path: Path) -> None:
    shelf, node = stopped
    with pytest.raises(Usage, match="--into does not go with --in-place"):
        in_place(shelf, same_node=True, into=tmp_path / "other")
    for given in (("",), (f"{node.data_dirs[0]}=",), ("/old=/new", "/old=/newer"), ("/new", "/newer")):
        with pytest.raises(Usage, match="names no directory, or one twice"):
            in_place(shelf, same_node=True, data_dir=given)


def test_in_place_a_table_that_has_another_id_here_is_refused(stopped: tuple[Shelf, Node]) -> None:
    """Cassandra would never look into the directory of the old id."""
    shelf, node = stopped
    with empty(node):
        (node.data_dirs[0] / "ks1" / ("users-" + "9a" * 16)).mkdir(parents=True)
        with pytest.raises(Usage, match=r"ks1\.users-.* has another id here: users-9a9a"):
            in_place(shelf, same_node=True, table=("ks1",))
        assert live(node) == {}
        assert in_place(shelf, same_node=True).code == DONE, "the schema comes, too"


def test_in_place_what_a_drop_has_left_of_an_older_table_stands_in_nobodys_way(stopped: tuple[Shelf, Node]) -> None:
    shelf, node = stopped
    with empty(node) as was:
        for left in ("snapshots", "backups"):
            (node.data_dirs[0] / "ks1" / ("users-" + "9a" * 16) / left).mkdir(parents=True)
        assert in_place(shelf, same_node=True, table=("ks1",)).code == DONE
        assert live(node) == {name: body for name, body in was.items() if "/users-" in name}


def test_in_place_what_lies_in_another_data_directory_is_seen(stopped: tuple[Shelf, Node], tmp_path: Path) -> None:
    shelf, node = stopped
    first, second = node.data_dirs
    other = tmp_path / "other"
    stranger = other / "ks1" / node.tables[0].directory / "nb-99-big-Data.db"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"stranger")
    with empty(node), pytest.raises(Usage, match="nb-99-big-Data"):
        in_place(shelf, same_node=True, data_dir=(f"{first}={first}", f"{second}={second}", f"/gone={other}"))


def test_in_place_what_lies_in_a_data_directory_that_is_not_named_is_seen(stopped: tuple[Shelf, Node]) -> None:
    shelf, node = stopped
    first, second = node.data_dirs
    with empty(node):
        stranger = second / "ks1" / node.tables[0].directory / "nb-99-big-Data.db"
        stranger.parent.mkdir(parents=True)
        stranger.write_bytes(b"stranger")
        with pytest.raises(Usage, match="nb-99-big-Data"):
            in_place(shelf, same_node=True, data_dir=(str(first),))
        assert list(live(node).values()) == [b"stranger"]


def test_in_place_an_sstable_that_is_of_no_backup_is_refused(stopped: tuple[Shelf, Node]) -> None:
    shelf, node = stopped
    folders = node.tables[0].directories()
    with empty(node):
        for folder in (folders[0], folders[1], folders[0] / ".by_name"):
            stranger = folder / "nb-99-big-Data.db"
            stranger.parent.mkdir(parents=True, exist_ok=True)
            stranger.write_bytes(b"stranger")
            with pytest.raises(Usage, match="nb-99-big-Data"):
                in_place(shelf, same_node=True)
            assert list(live(node).values()) == [b"stranger"]
            stranger.unlink()
        kept = folders[0] / "snapshots" / "old" / "nb-1-big-Data.db"
        kept.parent.mkdir(parents=True)
        kept.write_bytes(b"old")
        assert in_place(shelf, same_node=True).code == DONE


def test_in_place_a_running_cassandra_is_not_touched(
    stopped: tuple[Shelf, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, node = stopped
    monkeypatch.setattr(cassbackup, "cassandra_pids", lambda: ["4711"])
    with empty(node), pytest.raises(Usage, match=r"Cassandra is running .*4711"):
        in_place(shelf, same_node=True)


def test_in_place_a_cassandra_that_starts_meanwhile_is_no_success(
    stopped: tuple[Shelf, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, node = stopped
    with empty(node) as was:
        monkeypatch.setattr(cassbackup, "cassandra_pids", lambda: ["4711"] if live(node) else [])
        with pytest.raises(Fault, match=r"Cassandra was started meanwhile \(pid 4711\)") as found:
            in_place(shelf, same_node=True)
        assert (found.value.code, live(node)) == (FAILED, was)


# ------------------------------------------------------------------------------------------------------------
# Import into a running Cassandra

NODETOOL = """#!/bin/sh
echo "OpenJDK 64-Bit Server VM warning: Option UseConcMarkSweepGC was deprecated"
[ "$1" = -u ] && shift 2
echo "$@" >> "{calls}"
case "$*" in
{faults}
esac
case "$1" in
version) echo "ReleaseVersion: {version}" ;;
statusbackup) echo "running" ;;
import) rm "$4"/*-big-[!S]* ;;
esac
"""


@pytest.fixture
def nodetool(tmp_path: Path) -> Callable[..., tuple[Path, Callable[[], list[str]]]]:
    """Return a function that makes a nodetool: of a version, with commands that fail; and what it was asked."""

    def make(version: str = "4.1.3", *faults: str) -> tuple[Path, Callable[[], list[str]]]:
        calls, path = tmp_path / "calls", tmp_path / "nodetool"
        lines = "".join(
            f'{fault.replace(" ", "*")}*) echo "error: {fault} went wrong" >&2; exit 1 ;;\n' for fault in faults
        )
        path.write_text(NODETOOL.format(calls=calls, version=version, faults=lines))
        path.chmod(0o755)
        return path, lambda: calls.read_text().splitlines() if calls.exists() else []

    return make


def test_an_import_asks_first_and_then_hands_over_each_table(
    daily: Shelf, into: Path, nodetool: Callable[..., Any]
) -> None:
    tool, calls = nodetool()
    answer = daily.restore(tag="daily", into=into, import_=True, nodetool=f"{tool} -u me")
    assert answer.code == DONE
    assert "next: cassbackup snapshot" in answer.text, "no backup has what is back"
    assert calls()[:2] == ["version", "tablestats ks1.groups ks1.users"]
    assert sorted(calls()[2:]) == [f"import ks1 {name} {into}/ks1/{name}" for name in ("groups", "users")]
    assert tree(into) == {}  # nor what an import does not take


@pytest.mark.parametrize(
    ("version", "fault", "told"),
    [
        ("4.1.3", "version", "error: version went wrong"),
        ("4.1.3", "tablestats ks1.groups ks1.users", r"went wrong: create what is lacking"),
        ("3.11.19", "nothing", "3.11.19 cannot import"),
    ],
)
def test_nothing_is_fetched_when_cassandra_cannot_take_it(
    daily: Shelf, into: Path, nodetool: Callable[..., Any], version: str, fault: str, told: str
) -> None:
    tool, calls = nodetool(version, fault)
    with pytest.raises(Fault, match=told):
        daily.restore(tag="daily", into=into, import_=True, nodetool=str(tool))
    assert tree(into) == {}
    assert [call for call in calls() if call.startswith("import")] == []


def test_an_import_that_fails_is_no_success_and_can_be_run_again(
    daily: Shelf, into: Path, nodetool: Callable[..., Any]
) -> None:
    tool, _ = nodetool("4.1.3", "import ks1 users")
    with pytest.raises(Fault, match="went wrong"):
        daily.restore(tag="daily", into=into, import_=True, nodetool=str(tool))
    assert "ks1/users/nb-1-big-Data.db" in tree(into)
    tool, calls = nodetool()
    assert daily.restore(tag="daily", into=into, import_=True, nodetool=str(tool)).code == DONE
    assert f"import ks1 users {into}/ks1/users" in calls()
    assert tree(into) == {}


def test_nothing_is_imported_of_a_restore_that_lacks_a_file(
    daily: Shelf, into: Path, nodetool: Callable[..., Any]
) -> None:
    daily.damage(daily.data_keys()[0])
    tool, calls = nodetool()
    assert daily.restore(tag="daily", into=into, import_=True, nodetool=str(tool)).code == FAILED
    assert [call for call in calls() if call.startswith("import")] == []


def test_a_table_without_sstables_needs_no_import(
    shelf: Shelf, node: Node, into: Path, nodetool: Callable[..., Any]
) -> None:
    node.table("ks1", "users")
    node.table("ks1", "groups").flush()
    node.snapshot("daily")
    shelf.keep(node, "daily")
    tool, calls = nodetool()
    shelf.restore(tag="daily", into=into, import_=True, nodetool=str(tool))
    assert [call for call in calls() if call.startswith("import")] == [f"import ks1 groups {into}/ks1/groups"]


def test_what_nodetool_says_among_the_warnings_of_the_jvm_is_understood(nodetool: Callable[..., Any]) -> None:
    tool, _ = nodetool("5.0.6", "info")
    asked = Nodetool(f"{tool}")
    assert (asked.version(), asked.incremental_backup()) == ("5.0.6", True)
    with pytest.raises(Fault, match="error: info went wrong"):
        asked("info")
    with pytest.raises(Usage, match="--nodetool"):
        Nodetool("/no/such/tool")("version")
    with pytest.raises(Fault, match="did not answer"):
        Nodetool("sh -c 'sleep 9'", 0.05)("version")


# ------------------------------------------------------------------------------------------------------------
# Which node


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("db1-i-0abc", ["db1-i-0abc"]),
        ("db1", ["db1-i-0abc"]),
        ("db10", ["db10-7777"]),
        ("10.0.0.2", ["db10-7777"]),
        ("8d5e", ["db10-7777"]),
        ("", ["db1-i-0abc", "db10-7777"]),
        ("db", []),
        ("db1-", []),
        ("10.0.0", []),
    ],
)
def test_a_node_is_meant_by_its_name_host_id_or_address_never_by_a_part(
    shelf: Shelf, word: str, found: list[str]
) -> None:
    shelf.store.put("db1-i-0abc.listings/owner.json", Body(dump_document(id="x")))
    about = {"host_id": "8d5e", "addresses": ["10.0.0.2"], "cluster": "blue", "tokens": ["1"]}
    shelf.store.put("db10-7777.listings/node.20261121T000000.000000Z.json", Body(dump_document(**about)))
    bucket = cassbackup.Bucket(shelf.store, 2)
    if found:
        choice = cassbackup.NodeChoice(word, all_nodes=True)
        assert [node.name for node in cassbackup.choose_nodes(bucket, choice)] == found
    else:
        with pytest.raises(Missing, match="db1-i-0abc, db10-7777"):
            cassbackup.choose_nodes(bucket, cassbackup.NodeChoice(word))
    here = cassbackup.Bucket(shelf.store, 2, here="db10-7777")
    (node,) = cassbackup.choose_nodes(here, cassbackup.NodeChoice())
    assert node == NodeInfo("db10-7777", "blue", "8d5e", "", "", ("10.0.0.2",), ("1",))


def test_a_bucket_of_version_0_1_is_refused(daily: Shelf, into: Path) -> None:
    daily.put("node1.listings/owner.json", b'{"version": 1}')
    with pytest.raises(Usage, match=r"0\.1"):
        daily.restore(tag="daily", into=into)
