"""What a table is restored from: rules by example, and random histories of a table against a model of its rows.

Listings are read from a bucket in memory, through the code that reads them from a real one. A moment is counted in
seconds from the beginning of each story.
"""

from __future__ import annotations

import dataclasses
import json
import random
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from cassbackup import (
    Base,
    Chosen,
    Corrupt,
    Fingerprint,
    Known,
    Listing,
    ListingInfo,
    Missing,
    ObjectInfo,
    Placed,
    Reader,
    Snapshot,
    SSTable,
    Stored,
    Unit,
    base_on,
    choose_at,
    choose_table,
    choose_tag,
    dump_listing,
    emptied_at,
    group_snapshots,
    hex32,
    is_automatic,
    is_selected,
    later,
    listing_info,
    listing_key,
    listings_of,
    load_listing,
    newest_of_names,
    origin_of,
    place_sstables,
    read_listing,
    renamed,
    seconds_of,
    snapshots_of,
    sstable_of,
    sstables_of,
    table_folders,
    unit_prefix,
    utc,
)

NODE, HOME = "node1", "/var/lib/cassandra/data"
BEGIN = seconds_of("20261101T000000.000000Z")
HOUR, DAY = 3600.0, 86400.0
FIRST, SECOND = "users-" + "1" * 32, "users-" + "2" * 32
PARTS = ("Data.db", "Index.db", "TOC.txt")


def id_of(created: float, number: int) -> str:
    """Return the id that Cassandra gives a table: a version 1 UUID."""
    ticks = int((BEGIN + created) * 1e7) + 0x01B21DD213814000
    fields = (ticks & 0xFFFFFFFF, ticks >> 32 & 0xFFFF, ticks >> 48 | 0x1000, 0x80, 0, number)
    return uuid.UUID(fields=fields).hex


class Bucket:
    """A store in memory, as far as choosing asks one."""

    url = "memory:"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}

    def put(self, key: str, body: bytes, modified: float = BEGIN) -> ObjectInfo:
        assert key not in self.objects
        self.objects[key] = (body, modified)
        return self._info(key)

    def _info(self, key: str) -> ObjectInfo:
        body, modified = self.objects[key]
        return ObjectInfo(key, len(body), "", modified)

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if key not in self.objects:
            raise Missing(key)
        yield self.objects[key][0][start:end]

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return (self._info(key) for key in sorted(self.objects) if key.startswith(prefix) and key > after)

    def prefixes(self, prefix: str) -> Iterator[str]:
        below = (key.removeprefix(prefix) for key in sorted(self.objects) if key.startswith(prefix))
        return iter(dict.fromkeys(key.split("/")[0] for key in below if "/" in key))


@dataclass(frozen=True)
class Written:
    """An SSTable on the node."""

    name: str  # nb-1-big, of an index .idx/nb-1-big
    at: float  # when its Data.db was written
    content: int = 1
    parts: tuple[str, ...] = PARTS
    imported: float | None = None  # when an import wrote its Statistics.db anew
    home: str = HOME

    def entries(self, unit: Unit) -> Iterator[Stored]:
        """Yield what a listing says of it."""
        folder = "backups" if unit.kind == "incremental" else f"snapshots/{unit.tag}"
        below, _, name = self.name.rpartition("/")
        directory = str(PurePosixPath(self.home, unit.keyspace, unit.table, folder, below))
        times = dict.fromkeys(self.parts, self.at)
        if self.imported is not None:
            times["Statistics.db"] = self.imported
        for part, at in times.items():
            fingerprint = Fingerprint(1, 100 + self.content, round((BEGIN + at) * 1e9))
            key = f"{NODE}{directory}/{name}-{part}@{self.at}-{self.content}"
            yield Stored(directory, f"{name}-{part}", fingerprint, 0o644, "u", "g", hex32(self.content), key, "")


@dataclass
class Story:
    """What a daemon wrote down of one table. Each method is given moments in seconds from BEGIN."""

    bucket: Bucket = field(default_factory=Bucket)
    listed: str = ""  # the newest listing; no two have one UTC
    bad: frozenset[str] = frozenset()

    def snapshot(
        self,
        end: float,
        *sstables: Written,
        tag: str = "daily",
        table: str = FIRST,
        complete: bool = True,
        manifest: bool = True,
        created: Any = "",
        listed: float | None = None,
    ) -> Unit:
        """List a snapshot whose manifest.json was written at `end`."""
        unit = Unit("snapshot", "ks", table, tag, utc(BEGIN + end))
        entries = [entry for sstable in sstables for entry in sstable.entries(unit)]
        if manifest:
            created = iso(created) if isinstance(created, float) else created
            body = json.dumps({"files": [], **({} if created == "" else {"created_at": created})}).encode()
            directory = f"{HOME}/ks/{table}/snapshots/{tag}"
            fingerprint = Fingerprint(2, len(body), round((BEGIN + end) * 1e9))
            key, crc32 = f"{NODE}{directory}/manifest.json@{end}", hex32(zlib.crc32(body))
            entries.append(Stored(directory, "manifest.json", fingerprint, 0o644, "u", "g", crc32, key, ""))
            self.bucket.objects.setdefault(key, (body, BEGIN + end))
        self._list(unit, unit.life, entries, complete, (), end if listed is None else listed)
        return unit

    def backups(
        self,
        taken: float,
        *sstables: Written,
        table: str = FIRST,
        missing: Iterable[str] = (),
        lost: Iterable[str] = (),
        listed: float = 0.0,
    ) -> None:
        """List what of backups/ was found by a moment."""
        unit = Unit("incremental", "ks", table, life=utc(BEGIN))
        entries = [entry for sstable in sstables for entry in sstable.entries(unit)]
        complete = not missing and not lost
        self._list(unit, utc(BEGIN + taken), entries, complete, tuple(missing), max(taken, listed), tuple(lost))

    def _list(
        self,
        unit: Unit,
        taken: str,
        entries: list[Stored],
        complete: bool,
        missing: tuple[str, ...],
        listed: float,
        lost: tuple[str, ...] = (),
    ) -> None:
        if entries or lost:
            self.listed = later(utc(BEGIN + listed), self.listed or utc(0))
            listing = Listing(NODE, unit, taken, self.listed, complete, tuple(entries), missing, lost)
            self.bucket.put(listing_key(listing), dump_listing(listing), BEGIN + listed)

    @property
    def reader(self) -> Reader:
        """Return what reads the listings."""
        return Reader(self.bucket, 2, NODE, self.bad)  # type: ignore[arg-type]

    def chosen(self, at: float) -> list[Chosen]:
        """Return what `restore --at` chooses."""
        folders = table_folders(self.bucket, NODE)  # type: ignore[arg-type]
        tables = [choose_table(self.reader, BEGIN + at, folder) for folder in folders]
        return newest_of_names([one for one in tables if one], BEGIN + at)

    def names(self, at: float) -> list[str]:
        """Return the names of the SSTables that are restored."""
        return sorted(sstable.name for chosen in self.chosen(at) for sstable in chosen.sstables)

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots of all tables."""
        return snapshots_of(listings_of(self.bucket, NODE))  # type: ignore[arg-type]


def iso(at: float) -> str:
    """Return a moment as manifest.json spells it."""
    return datetime.fromtimestamp(BEGIN + at, timezone.utc).isoformat().replace("+00:00", "Z")


def places(chosen: Chosen) -> list[Placed]:
    """Return where the files of a table go."""
    return list(place_sstables(chosen, dict.fromkeys([HOME, "/data2"], "/into"), "ks/users"))


def nb(number: int, at: float, content: int = 1, **more: Any) -> Written:
    """Return an SSTable with a number."""
    return Written(f"nb-{number}-big", at, content, **more)


# ------------------------------------------------------------------------------------------------------------
# The base


def test_the_base_is_the_newest_whole_snapshot_that_had_ended_by_then() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0))
    story.snapshot(2 * DAY, nb(2, 1.5 * DAY))
    story.snapshot(3 * DAY, nb(3, 2.5 * DAY))
    assert story.names(2 * DAY - 1) == ["nb-1-big"]
    assert story.names(2 * DAY) == story.names(3 * DAY - 1) == ["nb-2-big"]
    assert story.names(99 * DAY) == ["nb-3-big"]


def test_a_snapshot_that_was_listed_late_is_a_base_for_when_it_was_taken() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0), listed=9 * DAY)
    story.snapshot(2 * DAY, nb(2, 1.5 * DAY), tag="other")
    assert story.names(1.5 * DAY) == ["nb-1-big"]
    assert story.names(3 * DAY) == ["nb-2-big"]


def test_an_incomplete_snapshot_is_never_a_base() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0))
    story.snapshot(2 * DAY, nb(2, 1.5 * DAY), complete=False)
    story.snapshot(2 * DAY + 60, nb(2, 1.5 * DAY), complete=False, manifest=False)
    assert story.names(3 * DAY) == ["nb-1-big"]


def test_what_was_flushed_after_the_moment_stays_out_though_its_batch_was_open_before() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0))
    story.backups(2 * DAY, nb(2, 2 * DAY), nb(3, 2 * DAY + 60), listed=2 * DAY + 60)
    assert story.names(2 * DAY + 30) == ["nb-1-big", "nb-2-big"]


@pytest.mark.parametrize("tag", ["RepairedDataMismatch-20261102", "DuplicateRows-20261102"])
def test_a_diagnostic_snapshot_of_some_ranges_is_never_a_base(tag: str) -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0), nb(2, 0))
    story.snapshot(2 * DAY, nb(2, 0), tag=tag)
    assert story.names(3 * DAY) == ["nb-1-big", "nb-2-big"]
    assert is_automatic(Unit("snapshot", "ks", FIRST, tag))


def test_without_a_snapshot_all_that_was_flushed_by_then_is_restored() -> None:
    story = Story()
    story.backups(10, nb(1, 10), nb(2, 20), nb(3, 30))
    assert story.names(20) == ["nb-1-big", "nb-2-big"]
    assert story.names(9) == []


# ------------------------------------------------------------------------------------------------------------
# Incrementals


def test_what_was_flushed_between_the_base_and_the_moment_is_added() -> None:
    story = Story()
    story.backups(1 * HOUR, nb(1, 1 * HOUR))
    story.snapshot(1 * DAY, nb(2, 2 * HOUR))
    story.backups(2 * DAY, nb(3, 2 * DAY))
    story.backups(3 * DAY, nb(4, 3 * DAY))
    assert story.names(2.5 * DAY) == ["nb-2-big", "nb-3-big"]
    assert [chosen.added for chosen in story.chosen(2.5 * DAY)] == [1]
    assert story.names(3 * DAY) == ["nb-2-big", "nb-3-big", "nb-4-big"]


@pytest.mark.parametrize(("created", "begin"), [("", DAY - 2 * HOUR), (DAY - 3 * HOUR, DAY - 4 * HOUR)])
def test_flushes_count_from_an_hour_before_the_snapshot_began(created: Any, begin: float) -> None:
    story = Story()
    story.backups(begin - 1, nb(1, begin - 1), nb(2, begin), listed=begin + 5)
    story.snapshot(DAY, nb(9, 1), created=created)
    assert story.names(2 * DAY) == ["nb-2-big", "nb-9-big"]


@pytest.mark.parametrize("created", [None, 7, [], "yesterday", "2026-11-01T23:00:00", "9999-12-31T23:59:59-23:59"])
def test_a_manifest_without_a_usable_created_at_began_an_hour_before_its_end(created: Any) -> None:
    story = Story()
    story.backups(DAY - 3 * HOUR, nb(1, DAY - 3 * HOUR), nb(2, DAY - 2 * HOUR), listed=DAY)
    story.snapshot(DAY, nb(9, 1), created=created)
    assert story.names(2 * DAY) == ["nb-2-big", "nb-9-big"]


def test_what_is_in_the_snapshot_and_in_backups_is_restored_once() -> None:
    story = Story()
    story.backups(DAY - 60, nb(1, DAY - 60))
    story.snapshot(DAY, nb(1, DAY - 60))
    assert story.names(2 * DAY) == ["nb-1-big"]
    assert [chosen.added for chosen in story.chosen(2 * DAY)] == [0]


def test_a_batch_that_stayed_open_for_an_outage_counts_for_all_that_it_holds() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0), created=1 * DAY, listed=2 * DAY)
    story.backups(0.5 * DAY, nb(2, 0.5 * DAY), nb(3, 1.5 * DAY), listed=2 * DAY)
    assert story.names(1.6 * DAY) == ["nb-1-big", "nb-3-big"]


def test_an_import_with_an_old_time_is_known_by_its_id() -> None:
    story = Story()
    story.backups(0, nb(1, 0))
    story.snapshot(1 * DAY, nb(2, 10))
    story.backups(2 * DAY, nb(3, -99 * DAY))
    assert story.names(1.5 * DAY) == ["nb-2-big"]
    assert story.names(3 * DAY) == ["nb-2-big", "nb-3-big"]


def test_an_import_is_dated_by_the_statistics_that_it_wrote_anew() -> None:
    story = Story()
    story.backups(1 * DAY, nb(1, -99 * DAY, imported=1 * DAY))  # no snapshot tells anything yet
    story.snapshot(2 * DAY, nb(1, -99 * DAY, imported=1 * DAY), tag=tag_of("truncated", 2 * DAY), complete=False)
    story.backups(3 * DAY, nb(1, -99 * DAY, imported=3 * DAY))  # under a number that came again
    assert [len(story.names(day * DAY)) for day in (0.5, 1.5, 2.5, 3.5)] == [0, 1, 0, 1]


def test_an_import_into_a_table_whose_snapshot_is_empty_is_restored() -> None:
    story = Story()
    story.snapshot(1 * DAY)
    story.backups(2 * DAY, nb(1, -99 * DAY))
    assert story.names(3 * DAY) == ["nb-1-big"]
    assert story.names(1.5 * DAY) == []


def test_an_id_that_was_given_before_the_numbers_began_anew_is_not_taken_for_an_import() -> None:
    story = Story()
    story.backups(1 * DAY, nb(49, 1 * DAY))
    story.backups(1 * DAY + 60, nb(50, 1 * DAY + 60))
    story.snapshot(2 * DAY, nb(51, 2 * DAY - 9), tag=tag_of("truncated", 2 * DAY))
    story.snapshot(3 * DAY, nb(1, 2.5 * DAY, 2))  # after a restart with an empty backups/
    assert story.names(4 * DAY) == ["nb-1-big"]


def test_uuid_ids_are_compared_by_their_time() -> None:
    story = Story()
    old, base, imported = (
        f"da-{id_}-bti" for id_ in ("3gz0_0000_a" + "0" * 17, "3gz1_" + "1" * 23, "3gz1_" + "2" * 23)
    )
    story.snapshot(1 * DAY, nb(7, 0), Written(base, 10))
    story.backups(2 * DAY, Written(imported, -DAY), Written(old, -DAY))
    assert story.names(3 * DAY) == sorted([base, imported, "nb-7-big"])


def test_names_from_before_cassandra_2_1_have_ids_too() -> None:
    story = Story()
    story.snapshot(1 * DAY, Written("ks-users-ka-2", 10), table="users")
    story.backups(2 * DAY, Written("ks-users-ka-3", -DAY), Written("ks-users-ka-1", -DAY), table="users")
    assert story.names(3 * DAY) == ["ks-users-ka-2", "ks-users-ka-3"]


def test_an_index_belongs_to_its_table() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(5, 0), Written(".by_name/nb-1-big", 0))
    story.backups(2 * DAY, nb(6, 2 * DAY), Written(".by_name/nb-2-big", 2 * DAY))
    (chosen,) = story.chosen(3 * DAY)
    names = {one.path.removeprefix("ks/users/") for one in places(chosen)}
    assert {".by_name/nb-1-big-Data.db", ".by_name/nb-2-big-Data.db", "nb-5-big-Data.db", "nb-6-big-Data.db"} <= names


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("lost", PARTS)
def test_an_sstable_that_lacks_a_component_is_left_out_and_named(based: bool, lost: str) -> None:
    story = Story()
    if based:
        story.snapshot(1 * DAY)
    story.backups(
        2 * DAY,
        nb(1, 2 * DAY, parts=tuple(part for part in PARTS if part != lost)),
        nb(2, 2 * DAY),
        missing=[f"nb-1-big-{lost}"],
    )
    (chosen,) = story.chosen(3 * DAY)
    assert [sstable.name for sstable in chosen.sstables] == ["nb-2-big"]
    assert len(chosen.lacking) == 1
    assert "nb-1-big" in chosen.lacking[0]


def test_an_sstable_whose_components_came_in_two_batches_is_whole() -> None:
    story = Story()
    story.backups(10, nb(1, 10, parts=PARTS[:2]), missing=["nb-1-big-TOC.txt"])
    story.backups(20, nb(1, 10))  # a listing that completes one repeats its earlier entries
    (chosen,) = story.chosen(30)
    assert [len(sstable.files) for sstable in chosen.sstables] == [3]
    assert not chosen.lacking


def test_an_sstable_that_backups_holds_in_part_is_no_trouble_if_the_snapshot_has_it_whole() -> None:
    story = Story()
    story.backups(DAY - 60, nb(1, DAY - 60, parts=PARTS[1:]), missing=["nb-1-big-Data.db"])
    story.snapshot(1 * DAY, nb(1, DAY - 60))
    (chosen,) = story.chosen(2 * DAY)
    assert not chosen.lacking


def test_two_sstables_with_one_generation_both_arrive_and_one_is_renamed() -> None:
    story = Story()
    story.backups(10, nb(1, 10, 1), nb(2, 10, 2), nb(3, 10, 3))
    story.backups(20, nb(1, 20, 4), nb(3, 20, 5))
    (chosen,) = story.chosen(30)
    placed = places(chosen)
    assert Counter(one.entry.crc32 for one in placed) == {hex32(content): 3 for content in range(1, 6)}
    assert len({one.path for one in placed}) == len(placed)
    assert {one.path.split("-")[1] for one in placed} == {"1", "2", "3", "4", "5"}


def test_a_component_that_is_marked_bad_counts_as_lacking_until_it_is_listed_again() -> None:
    story = Story()
    story.backups(10, nb(1, 10))
    story.bad = frozenset(entry.key for entry in nb(1, 10).entries(Unit("incremental", "ks", FIRST)))
    assert story.names(20) == []
    assert ["marked bad" in what for one in story.chosen(20) for what in one.lacking] == [True]
    story.backups(10, replace(nb(1, 10), home="/data2"))
    assert story.names(20) == ["nb-1-big"]
    assert [one.lacking for one in story.chosen(20)] == [()]


def test_a_snapshot_that_is_marked_bad_is_no_base() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0))
    unit = story.snapshot(2 * DAY, nb(2, 0))
    assert story.names(3 * DAY) == ["nb-2-big"]
    story.bad = frozenset(entry.key for entry in nb(2, 0).entries(unit))
    assert story.names(3 * DAY) == ["nb-1-big"]
    reader = story.reader
    (folder,) = table_folders(story.bucket, NODE)  # type: ignore[arg-type]
    choose_table(reader, BEGIN + 3 * DAY, folder)
    assert ["marked bad: nb-2-big-Data.db" in what for what in reader.lacking] == [True]


def test_a_table_whose_snapshots_are_all_torn_is_lacking_and_not_forgotten() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0), complete=False)
    ((told,),) = [one.lacking for one in story.chosen(2 * DAY)]
    assert told.startswith("none of its snapshots by then is whole: daily")
    assert story.chosen(0.5 * DAY) == [], "it was not there yet"


def test_a_listing_that_cannot_be_read_is_named_and_the_rest_is_restored() -> None:
    """Of a snapshot it is not even missed where another listing of the same life is complete."""
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0), complete=False)
    story.snapshot(1 * DAY, nb(1, 0))
    story.backups(2 * DAY, nb(2, 2 * DAY))
    keys = [key for key in story.bucket.objects if ".listings/" in key]
    story.bucket.objects[keys[0]] = (b"{", BEGIN)
    (folder,) = table_folders(story.bucket, NODE)  # type: ignore[arg-type]
    reader = story.reader
    chosen = choose_table(reader, BEGIN + 3 * DAY, folder)
    assert chosen
    assert ([one.name for one in chosen.sstables], reader.lacking) == (["nb-1-big", "nb-2-big"], [])
    story.bucket.objects[keys[2]] = (b"{", BEGIN + 2 * DAY)
    chosen = choose_table(reader, BEGIN + 3 * DAY, folder)
    assert chosen
    assert [one.name for one in chosen.sstables] == ["nb-1-big"]
    (told,) = reader.lacking
    assert keys[2] in told


def test_a_later_snapshot_that_cannot_be_read_is_no_lack_of_a_table_that_had_none_yet() -> None:
    story = Story()
    story.backups(1 * DAY, nb(1, 1 * DAY))
    story.snapshot(5 * DAY, nb(1, 1 * DAY))
    key = next(key for key in story.bucket.objects if "/snapshots/daily/" in key and ".listings/" in key)
    story.bucket.objects[key] = (b"{", BEGIN)
    (folder,) = table_folders(story.bucket, NODE)  # type: ignore[arg-type]
    reader = story.reader
    chosen = choose_table(reader, BEGIN + 2 * DAY, folder)
    assert chosen
    assert (len(chosen.sstables), reader.lacking) == (1, [])


def test_what_was_lost_of_backups_before_it_was_stored_is_named_by_what_it_may_have_been_part_of() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0))
    story.backups(3 * DAY, lost=["nb-7-big-Data.db"])
    assert [one.lacking for one in story.chosen(2 * DAY)] == [()]
    ((told,),) = [one.lacking for one in story.chosen(4 * DAY)]
    assert "nb-7-big-Data.db" in told
    story.snapshot(5 * DAY, nb(9, 4 * DAY))
    assert [one.lacking for one in story.chosen(6 * DAY)] == [()]


# ------------------------------------------------------------------------------------------------------------
# Truncate and drop


def tag_of(why: str, at: float) -> str:
    """Return the tag of an automatic snapshot."""
    return f"{why}-{int((BEGIN + at) * 1000)}-users"


@pytest.mark.parametrize("why", ["truncated", "dropped"])
@pytest.mark.parametrize("complete", [True, False])
def test_from_a_truncate_or_drop_on_the_table_is_empty_but_for_later_flushes(why: str, complete: bool) -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0))
    story.backups(1.5 * DAY, nb(2, 1.5 * DAY))
    story.snapshot(2 * DAY + 1, nb(1, 0), nb(2, 1.5 * DAY), tag=tag_of(why, 2 * DAY), complete=complete)
    story.backups(3 * DAY, nb(3, 3 * DAY))
    assert story.names(2 * DAY - 1) == ["nb-1-big", "nb-2-big"]
    assert story.names(2 * DAY) == []
    assert "empty since" in story.chosen(2 * DAY)[0].why
    assert story.names(4 * DAY) == ["nb-3-big"]


def test_a_flush_that_the_truncate_itself_made_does_not_come_back() -> None:
    story = Story()
    story.backups(DAY + 0.1, nb(1, DAY - 0.01))  # seen only after the moment in the tag
    story.snapshot(DAY + 1, nb(1, DAY - 0.01), tag=tag_of("truncated", DAY))
    assert story.names(2 * DAY) == []


def test_a_flush_that_the_drop_itself_made_does_not_come_back() -> None:
    """Cassandra names that snapshot first, and flushes then."""
    story = Story()
    story.snapshot(DAY + 2, nb(1, DAY + 1), tag=tag_of("dropped", DAY))
    story.backups(DAY + 3, nb(1, DAY + 1))
    assert story.names(DAY + 600) == []
    story.backups(2 * DAY, nb(2, 2 * DAY))  # made again WITH ID
    assert story.names(3 * DAY) == ["nb-2-big"]


def test_a_drop_whose_snapshot_was_found_late_empties_nothing_that_came_back_since() -> None:
    story = Story()
    found_late = {"complete": False, "manifest": False}  # so its life is when a daemon saw it first
    story.snapshot(9 * DAY, nb(1, 0), tag=tag_of("dropped", DAY), **found_late)  # type: ignore[arg-type]
    story.snapshot(2 * DAY, nb(5, 1.5 * DAY))  # made again WITH ID
    assert story.names(10 * DAY) == ["nb-5-big"]


def test_what_was_truncated_does_not_come_back_because_it_is_listed_once_more_p4() -> None:
    """By a daemon that lost its ledger, of files that Cassandra never deletes; prune has let the first listing go."""
    story = Story()
    story.snapshot(DAY, nb(1, 0), tag=tag_of("truncated", DAY))
    story.snapshot(2 * DAY, created=2 * DAY)
    story.backups(3 * DAY, nb(1, 0), nb(2, 2.5 * DAY))
    assert story.names(4 * DAY) == ["nb-2-big"]


def test_what_is_imported_after_a_truncate_is_restored() -> None:
    story = Story()
    story.snapshot(DAY, nb(1, 0), tag=tag_of("truncated", DAY))
    story.backups(2 * DAY, nb(2, -DAY))
    assert story.names(3 * DAY) == ["nb-2-big"]


def test_what_was_truncated_shortly_before_a_snapshot_does_not_come_back_with_it() -> None:
    story = Story()
    story.backups(DAY, nb(1, DAY))
    story.snapshot(DAY + 601, nb(1, DAY), tag=tag_of("truncated", DAY + 600))
    story.backups(DAY + 900, nb(2, DAY + 900))
    story.snapshot(DAY + 1200, nb(2, DAY + 900), created=DAY + 1200)
    assert story.names(2 * DAY) == ["nb-2-big"]


def test_a_truncated_snapshot_is_restored_by_its_tag() -> None:
    story = Story()
    unit = story.snapshot(DAY, nb(1, 0), tag=tag_of("truncated", DAY))
    listing = story.reader.read(story.snapshots()[0].listings)
    assert listing.unit == unit
    assert [sstable.name for sstable in choose_at("ks", FIRST, base_on(listing), ()).sstables] == ["nb-1-big"]


def test_from_the_drop_of_a_view_on_it_is_gone() -> None:
    """Cassandra 3.11 calls that snapshot <ms>-<view>; another table's name is a tag that somebody chose."""
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0))
    story.snapshot(2 * DAY, nb(1, 0), tag=f"{int((BEGIN + 2 * DAY) * 1000)}-groups")
    assert story.names(3 * DAY) == ["nb-1-big"]
    story.snapshot(3 * DAY, nb(1, 0), tag=f"{int((BEGIN + 2.5 * DAY) * 1000)}-users")
    assert story.names(4 * DAY) == ["nb-1-big"], "nothing was dropped then"
    story.snapshot(4 * DAY, nb(1, 0), tag=f"{int((BEGIN + 4 * DAY) * 1000)}-users")
    assert story.names(5 * DAY) == []


def test_one_table_id_is_restored_of_each_name() -> None:
    story = Story()
    story.backups(1 * DAY, nb(1, 1 * DAY))
    story.snapshot(2 * DAY, nb(1, 1 * DAY), tag=tag_of("dropped", 2 * DAY))
    story.backups(3 * DAY, nb(1, 3 * DAY), table=SECOND)
    assert [chosen.table for chosen in story.chosen(1 * DAY)] == [FIRST]
    assert [chosen.table for chosen in story.chosen(4 * DAY)] == [SECOND]


def test_a_table_that_was_dropped_made_again_and_filled_by_an_import_is_restored_as_it_is() -> None:
    story = Story()
    story.backups(1 * DAY, nb(1, 1 * DAY))
    story.snapshot(2 * DAY, nb(2, 1.5 * DAY), tag=tag_of("dropped", 2 * DAY))
    again = f"users-{id_of(2.7 * DAY, 2)}"
    story.backups(3 * DAY, nb(1, 1.5 * DAY), table=again)
    assert [(chosen.table, len(chosen.sstables)) for chosen in story.chosen(4 * DAY)] == [(again, 1)]
    assert story.names(2.5 * DAY) == []
    assert [(chosen.table, len(chosen.sstables)) for chosen in story.chosen(1.9 * DAY)] == [(FIRST, 1)]


def test_an_sstable_whose_name_we_do_not_know_is_named_and_not_left_out_in_silence() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0.5 * DAY), Written("nb-2-3-big", 0.5 * DAY, 2))
    story.backups(2 * DAY, nb(3, 2 * DAY, 3), Written("future", 2 * DAY, 4))
    (chosen,) = story.chosen(3 * DAY)
    assert [one.name for one in chosen.sstables] == ["nb-1-big", "nb-3-big"]
    assert [text.split()[1] for text in chosen.lacking] == ["nb-2-3-big-Data.db:", "future-Data.db:"]


def test_an_odd_name_that_came_later_is_no_lack_of_an_earlier_moment() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0.5 * DAY))
    story.backups(2 * DAY, Written("future", 2 * DAY, 4))
    (chosen,) = story.chosen(1.5 * DAY)
    assert chosen.lacking == ()


def test_a_table_is_not_restored_to_a_moment_before_it_was_created() -> None:
    """Its id tells when: else what was imported into it, with its old times, would stand for the table of that time."""
    story, tables = Story(), [f"users-{id_of(day * DAY, day)}" for day in (0, 2, 4)]
    story.snapshot(1 * DAY, nb(1, 0.5 * DAY), tag=tag_of("dropped", 1 * DAY), table=tables[0])
    story.backups(2.5 * DAY, nb(1, 2.5 * DAY, 2), table=tables[1])
    story.backups(5 * DAY, nb(1, 2.6 * DAY, 3), table=tables[2])
    assert [chosen.table for chosen in story.chosen(3 * DAY)] == [tables[1]]
    assert [chosen.table for chosen in story.chosen(6 * DAY)] == [tables[2]]


def test_a_table_that_was_made_again_and_not_heard_of_yet_is_not_restored_as_the_older_one() -> None:
    story, tables = Story(), [f"users-{id_of(day * DAY, day)}" for day in (0, 2)]
    story.snapshot(1 * DAY, nb(1, 0.5 * DAY), table=tables[0])
    story.snapshot(3 * DAY, nb(1, 2.9 * DAY, 2), table=tables[1])
    # Of one that is younger than the moment, but not in the bucket yet, there is nothing to restore.
    for at, there in ((0.5, []), (1.9, [tables[0]]), (2.5, []), (3, [tables[1]])):
        assert [one.table for one in story.chosen(at * DAY)] == there


def test_a_table_made_again_whose_flush_was_seen_late_is_the_living_one() -> None:
    story = Story()
    story.snapshot(2 * DAY, nb(2, 1.5 * DAY), tag=tag_of("dropped", 2 * DAY))
    story.backups(9 * DAY, nb(1, 3 * DAY), table=SECOND)  # the daemon had been stopped
    assert [chosen.table for chosen in story.chosen(4 * DAY)] == [SECOND]


@pytest.mark.parametrize(
    ("tag", "automatic", "emptied"),
    [
        ("truncated-1793491200123-users", True, 1793491200.123),
        ("dropped-1793491200123-users", True, 1793491200.123),
        ("pre-scrub-1793491200123", True, 0.0),
        ("1793491200123-compact-users", True, 0.0),
        ("1793491200123-upgrade-4.1.0-5.0.0", True, 0.0),
        ("1793491200123-users", True, 1793491200.123),  # of a view that was dropped, before 4.0
        ("1793491200123-groups", False, 0.0),
        ("202601010000-users", False, 0.0),  # somebody's own, with a date
        ("dropped-the-ball", False, 0.0),
        ("1793491200123", False, 0.0),  # nodetool's own default
        ("daily", False, 0.0),
        ("truncated-٣٣٣٣٣٣٣٣٣٣٣-users", False, 0.0),
    ],
)
def test_automatic_snapshots_are_told_by_their_tags(tag: str, automatic: bool, emptied: float) -> None:
    unit = Unit("snapshot", "ks", FIRST, tag)
    assert (is_automatic(unit), emptied_at(unit)) == (automatic, emptied)


# ------------------------------------------------------------------------------------------------------------
# Lives, tags, tables


def snapshot(table: str, tag: str, at: float, complete: bool = True) -> Snapshot:
    """Return a snapshot with one listing."""
    unit = Unit("snapshot", "ks", table, tag, utc(BEGIN + at))
    return Snapshot(unit, (ListingInfo("key", unit, utc(BEGIN + at + 5), complete, 1, 1, 1, BEGIN + at + 5),))


def test_listings_are_sorted_by_life_and_one_complete_one_is_enough() -> None:
    story = Story()
    story.snapshot(10, nb(1, 0), complete=False, listed=10)
    story.snapshot(10, nb(1, 0), listed=20)
    story.snapshot(DAY, nb(2, 0), complete=False)
    first, second = story.snapshots()
    assert (len(first.listings), first.complete, first.newest.complete) == (2, True, True)
    assert (len(second.listings), second.complete) == (1, False)
    assert story.reader.read(first.listings).complete


def test_tables_of_one_nodetool_snapshot_are_one_group() -> None:
    tables = ["a", "b", "c"]
    found = [snapshot(table, "daily", day * DAY + n) for day in (1, 2) for n, table in enumerate(tables)]
    found += [snapshot("a", "other", DAY + 1), snapshot("a", "often", 0), snapshot("b", "often", 1)]
    found += [snapshot("a", "often", 9)]
    random.Random(0).shuffle(found)
    told = [(group[0].unit.tag, "".join(one.unit.table for one in group)) for group in group_snapshots(found)]
    assert told == [("often", "ab"), ("often", "a"), ("daily", "abc"), ("other", "a"), ("daily", "abc")]


def test_a_tag_means_its_newest_life_unless_one_is_named() -> None:
    story = Story()
    for day, tag in ((1, "daily"), (2, "daily"), (3, "x@2026"), (4, "t" * 255)):
        story.snapshot(day * DAY, nb(day, 0), tag=tag)
        story.snapshot(day * DAY + 9, nb(day, 0), tag=tag, table=SECOND)
    folders = list(table_folders(story.bucket, NODE))  # type: ignore[arg-type]

    def chosen(word: str) -> list[tuple[str, str]]:
        return [(one.table, one.sstables[0].name) for one in choose_tag(story.reader, folders, word)]

    for word, day in (("daily", 2), ("daily@20261102T000000", 1), ("x@2026", 3), ("x@2026@2026", 3), ("t" * 255, 4)):
        assert chosen(word) == [(FIRST, f"nb-{day}-big"), (SECOND, f"nb-{day}-big")]
    for word in ("dayly", "daily@2025"):
        with pytest.raises(Missing, match="daily, "):
            chosen(word)


def test_a_table_that_the_newest_of_a_tag_lacks_is_named_unless_it_was_dropped_p6() -> None:
    """It may be the largest: what is still on its way is not listed yet."""
    story = Story()
    for table in (FIRST, SECOND):
        story.snapshot(1 * DAY, nb(1, 0), tag="daily", table=table)
    story.snapshot(2 * DAY, nb(2, 0), tag="daily")
    folders = list(table_folders(story.bucket, NODE))  # type: ignore[arg-type]
    reader = story.reader
    choose_tag(reader, folders, "daily")
    assert [SECOND in what for what in reader.lacking] == [True]
    reader.lacking.clear()
    story.snapshot(2.5 * DAY, nb(3, 0), tag="daily")
    choose_tag(reader, folders, "daily")
    assert [SECOND in what for what in reader.lacking] == [True], "two takings lack it"
    reader.lacking.clear()
    choose_tag(reader, folders, "daily@20261102")
    choose_tag(reader, folders, "daily@20261103")
    assert reader.lacking == [], "one that is named is what it is"
    story.snapshot(1.2 * DAY, nb(1, 0), tag=tag_of("truncated", 1.2 * DAY), table=SECOND)
    choose_tag(reader, folders, "daily")
    assert [SECOND in what for what in reader.lacking] == [True], "it is still there, with other rows"
    reader.lacking.clear()
    story.snapshot(1.5 * DAY, nb(1, 0), tag=tag_of("dropped", 1.5 * DAY), table=SECOND)
    choose_tag(reader, folders, "daily")
    assert reader.lacking == []


@pytest.mark.parametrize(
    ("words", "selected"),
    [
        ((), True),
        (("ks",), True),
        (("ks.users",), True),
        ((f"ks.{FIRST}",), True),
        (("k*",), True),
        (("other", "ks.use*"), True),
        (("ks.user",), False),
        (("users",), False),
        (("ks1",), False),
        ((f"ks.{SECOND}",), False),
    ],
)
def test_tables_are_selected_by_keyspace_name_or_id(words: tuple[str, ...], selected: bool) -> None:
    assert is_selected(Unit("incremental", "ks", FIRST), words) is selected


@pytest.mark.parametrize(
    ("name", "number", "new"),
    [
        ("nb-1-big", 7, "nb-7-big"),
        (".idx/nb-1-big", 7, ".idx/nb-7-big"),
        ("ks-users-ka-1", 7, "ks-users-ka-7"),
        ("da-3gab_cdef_" + "0" * 18 + "-bti", 7, "da-7-bti"),
    ],
)
def test_a_renamed_sstable_differs_in_its_generation_alone(name: str, number: int, new: str) -> None:
    assert renamed(name, number) == new


sstable_names = some.one_of(
    some.integers(1, 4).map(lambda number: f"nb-{number}-big"),
    some.integers(1, 4).map(lambda number: f".idx/nb-{number}-big"),
    some.integers(1, 4).map(lambda number: f"ks-users-ka-{number}"),
    some.integers(1, 4).map(lambda number: f"da-3g{number}z_0000_{'0' * 18}-bti"),
    some.just("nb-²-big"),
)


@settings(max_examples=40, deadline=None)
@given(some.lists(some.tuples(sstable_names, some.integers(0, 10**6)), max_size=12))
def test_every_file_that_was_chosen_gets_a_name_of_its_own(sstables: list[tuple[str, int]]) -> None:
    unit = Unit("incremental", "ks", FIRST)
    listings: list[Listing[Known]] = [
        Listing(NODE, unit, utc(BEGIN + at), utc(BEGIN), True, tuple(Written(name, at, n).entries(unit)))
        for n, (name, at) in enumerate(dict.fromkeys(sstables))
    ]
    tables = tuple(one for listing in listings for one in sstables_of(listing))
    placed = places(Chosen("ks", FIRST, tables, Base(), 0, None, ()))
    assert Counter(one.entry for one in placed) == Counter(e for listing in listings for e in listing.files)
    assert len({one.path for one in placed}) == len(placed)
    found: dict[str, set[str]] = {}
    for one in placed:
        folder, _, base = one.path.rpartition("/")
        split = sstable_of(base)
        assert split
        found.setdefault(f"{folder}/{split[0]}", set()).add(one.entry.crc32)
    assert all(len(crcs) == 1 for crcs in found.values())


# ------------------------------------------------------------------------------------------------------------
# Random histories against a model of the rows

Cells = dict[int, tuple[int, bool]]  # of each row the newest version, and whether that is a tombstone


def merged(parts: Iterable[Mapping[int, tuple[int, bool]]]) -> Cells:
    """Merge SSTables as Cassandra does: the last write wins."""
    cells: Cells = {}
    for part in parts:
        for row, cell in part.items():
            cells[row] = max(cell, cells.get(row, cell))
    return cells


def visible(parts: Iterable[Mapping[int, tuple[int, bool]]]) -> dict[int, int]:
    """Return what a SELECT would: of each row its version."""
    return {row: version for row, (version, gone) in merged(parts).items() if not gone}


@dataclass
class Model:
    """One table through its lives: its rows after each event, and beside it what the daemon writes down."""

    draw: Any
    uuids: bool
    created: bool  # manifests tell created_at, as from Cassandra 4.1 on
    story: Story = field(default_factory=Story)
    clock: float = 30 * DAY
    table: str = FIRST
    exists: bool = True
    live: list[Written] = field(default_factory=list)
    in_backups: set[int] = field(default_factory=set)
    generation: int = 0
    known_ids: bool = True  # can the id of an import tell that it is one?
    cells: dict[int, Cells] = field(default_factory=dict)  # of each content
    imported: dict[tuple[str, str, int], float] = field(default_factory=dict)  # table, name and content: when
    moments: list[tuple[float, dict[int, int]]] = field(default_factory=list)
    outage: bool = False
    waiting: list[tuple[str, float, list[Written]]] = field(default_factory=list)  # batches: table, opening, SSTables
    snapshots: list[tuple[float, tuple[Written, ...], str, str, bool, Any]] = field(default_factory=list)
    made: int = 0
    retired: list[Written] = field(default_factory=list)  # what an operator could import again

    def number(self) -> Any:
        self.made += 1
        return self.made

    def new(self, cells: Cells, at: float) -> Written:
        """Return a new SSTable with a new id."""
        self.generation += 1
        content = self.number()
        self.cells[content] = cells
        name = f"da-3g{self.made:02d}_0000_{'0' * 18}-bti" if self.uuids else f"nb-{self.generation}-big"
        return Written(name, at, content)

    def link(self, sstable: Written) -> None:
        """Link into backups/; the daemon sees it a moment later, in the batch that is open."""
        self.in_backups.add(self.generation)
        last = next((batch for batch in self.waiting if batch[0] == self.table), None)
        if last and sstable.name not in {one.name for one in last[2]}:
            last[2].append(sstable)
        else:
            self.waiting.append((self.table, self.clock + 0.05, [sstable]))

    def settle(self) -> None:
        """The daemon lists what waits, unless the store is away."""
        if self.outage:
            return
        for table, opened, sstables in self.waiting:
            self.story.backups(opened, *sstables, table=table, listed=self.clock + 1)
        for end, live, tag, table, complete, created in self.snapshots:
            self.story.snapshot(
                end,
                *live,
                tag=tag,
                table=table,
                complete=complete,
                manifest=complete or len(live) % 2 == 0,
                created=created,
                listed=self.clock + 2,
            )
        self.waiting, self.snapshots = [], []

    def flush(self) -> None:
        rows = self.draw(some.dictionaries(some.integers(0, 5), some.booleans(), min_size=1, max_size=3))
        sstable = self.new({row: (self.number(), gone) for row, gone in rows.items()}, self.clock)
        self.live.append(sstable)
        self.link(sstable)

    def compact(self) -> None:
        if self.live:
            self.retired += self.live
            self.live = [self.new(merged(self.cells[one.content] for one in self.live), self.clock)]

    def take(self, tag: str, complete: bool = True) -> None:
        began = self.clock
        self.clock += self.draw(some.sampled_from([0, 1, 30 * 60]))
        created = iso(began) if self.created else ""
        self.snapshots.append((self.clock, tuple(self.live), tag, self.table, complete, created))

    def snapshot(self) -> None:
        complete = self.draw(some.integers(0, 4)) > 0
        self.take(self.draw(some.sampled_from(["daily", "before"])), complete)
        self.known_ids = self.known_ids or complete

    def _empty(self, why: str) -> None:
        if self.draw(some.booleans()):
            self.flush()
        self.clock += 0.02  # before the daemon has seen that flush
        complete = self.draw(some.booleans())
        tag = tag_of(why, self.clock)
        if self.live or complete:
            self.snapshots.append((self.clock + 0.5, tuple(self.live), tag, self.table, complete, ""))
        self.known_ids = complete
        self.retired += self.live
        self.live = []

    def truncate(self) -> None:
        self._empty("truncated")

    def drop(self) -> None:
        self._empty("dropped")
        self.exists = False

    def create(self) -> None:
        self.table = f"users-{id_of(self.clock, self.number())}"
        # Of a table made anew no snapshot tells the ids: what was imported silently is not told from what was dropped.
        self.exists, self.generation, self.in_backups, self.known_ids = True, 0, set(), False

    def restart(self) -> None:
        """Restart with an empty backups/: numbers go on after what is live. A restart takes hours."""
        self.end_outage()
        self.clock += 3 * HOUR
        numbers = [SSTable("", one.name, "", ()).age[1] for one in self.live]
        if not self.uuids and max(numbers, default=0) < self.generation:
            self.generation, self.known_ids = max(numbers, default=0), False
        self.in_backups.clear()

    def bring_in(self) -> None:
        """Import an SSTable: of another cluster, or one that this table once had. Its Data.db keeps its time."""
        silent = self.draw(some.booleans())  # nodetool import --keep-level --keep-repaired
        if silent and not self.known_ids:  # numbers began anew, or were never told: nobody can tell what is an import
            return
        if silent:
            self.end_outage()  # a batch is dated by its opening
        if self.retired and self.draw(some.booleans()):
            old = self.draw(some.sampled_from(self.retired))
            sstable = replace(self.new(self.cells[old.content], old.at), content=old.content)
        else:
            sstable = self.new({self.draw(some.integers(0, 5)): (self.number(), False)}, self.draw(some.floats(0, DAY)))
        if silent:
            self.imported[self.table, sstable.name, sstable.content] = self.clock
        else:
            sstable = replace(sstable, imported=self.clock)
        self.live.append(sstable)
        self.link(sstable)

    def begin_outage(self) -> None:
        self.outage = True

    def end_outage(self) -> None:
        self.outage = False
        self.settle()

    def step(self) -> None:
        self.clock += self.draw(some.sampled_from([60.0, 600.0, 3000.0, 3 * HOUR, DAY, 5 * DAY]))
        there = ["flush"] * 5 + ["snapshot"] * 3 + ["compact", "truncate", "drop", "restart", "bring_in"]
        there += ["begin_outage", "end_outage"]
        getattr(self, self.draw(some.sampled_from(there if self.exists else ["create", "create", "end_outage"])))()
        self.settle()
        self.clock += 10
        self.moments.append((self.clock, visible(self.cells[one.content] for one in self.live)))

    def restored(self, at: float) -> dict[int, int]:
        """Return the rows that a restore brings back.

        What was imported later, with all its times as they were, and may as well have been flushed by then, is not
        told from a flush that was seen late: it may be there.
        """
        parts = []
        for chosen in self.story.chosen(at):
            for sstable in chosen.sstables:
                content = int(sstable.files[0].crc32, 16)
                imported = self.imported.get((chosen.table, sstable.name, content), 0.0)
                if imported <= at or chosen.base.start > sstable.written:
                    parts.append(self.cells[content])
        return visible(parts)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(some.data(), some.booleans(), some.booleans(), some.integers(1, 25))
def test_a_restore_to_any_moment_brings_back_the_rows_of_that_moment(
    data: Any, uuids: bool, created: bool, steps: int
) -> None:
    model = Model(data.draw, uuids, created)
    for _ in range(steps):
        model.step()
    model.end_outage()
    for at, rows in model.moments:
        assert model.restored(at) == rows, f"at {at}"


# ------------------------------------------------------------------------------------------------------------
# Hostile listings

TRUSTED = Unit("snapshot", "ks", FIRST, "daily", utc(BEGIN))


def entry_of(**changes: Any) -> Stored:
    """Return an entry of an honest snapshot, but for the changes."""
    return replace(next(nb(1, 0).entries(TRUSTED)), **changes)


def put(listing: Listing[Stored], body: bytes = b"", key: str = "") -> tuple[Bucket, ListingInfo]:
    """Put a listing into a bucket, perhaps with another body or under another key."""
    bucket = Bucket()
    info = listing_info(NODE, bucket.put(key or listing_key(listing), body or dump_listing(listing)))
    assert info
    return bucket, info


def honest(*files: Stored, **changes: Any) -> Listing[Stored]:
    """Return a listing of an honest snapshot, but for the changes."""
    listing = Listing(NODE, TRUSTED, TRUSTED.life, utc(BEGIN + 1), True, files or (entry_of(),))
    return replace(listing, **changes)


def read(bucket: Any, info: ListingInfo) -> Listing[Known]:
    """Read a listing as restore, verify and prune do."""
    return read_listing(bucket, NODE, info)


@pytest.mark.parametrize("table", [FIRST, "users"])
@pytest.mark.parametrize("kind", ["snapshot", "incremental"])
@pytest.mark.parametrize("folder", ["", ".idx/"])
@pytest.mark.parametrize("home", [HOME, "/", "/a b/snapshots/daily", f"/x/ks/{FIRST}/backups", "/mnt/\udcff"])
def test_a_file_goes_back_to_the_data_directory_that_it_came_from(
    table: str, kind: Any, folder: str, home: str
) -> None:
    unit = Unit(kind, "ks", table, "daily" if kind == "snapshot" else "", utc(BEGIN))
    (entry, *_) = Written(f"{folder}nb-1-big", 0, home=home).entries(unit)
    if home == "/":  # no data directory: Cassandra would have its keyspaces beside /etc
        with pytest.raises(Corrupt):
            origin_of(unit, entry)
    else:
        assert origin_of(unit, entry) == (home, folder)


TABLE_DIRECTORY = f"{HOME}/ks/{FIRST}/snapshots/daily"


@pytest.mark.parametrize(
    "changes",
    [
        {"directory": "/etc"},
        {"directory": ""},
        {"directory": TABLE_DIRECTORY.lstrip("/")},
        {"directory": f"{HOME}/../../../..{TABLE_DIRECTORY}"},
        {"directory": f"{TABLE_DIRECTORY}/../../../../../../../../etc"},
        {"directory": f"{TABLE_DIRECTORY}/."},
        {"directory": f"{TABLE_DIRECTORY}//.idx"},
        {"directory": f"{TABLE_DIRECTORY}/"},
        {"directory": f"{TABLE_DIRECTORY}x"},
        {"directory": f"{TABLE_DIRECTORY}/a\0b"},
        {"directory": f"{TABLE_DIRECTORY}/{'x' * 256}"},
        {"directory": f"/a\0b{TABLE_DIRECTORY}"},
        {"directory": TABLE_DIRECTORY.replace(FIRST, SECOND)},
        {"directory": TABLE_DIRECTORY.replace("/ks/", "/other/")},
        {"directory": f"{HOME}/ks/{FIRST}/backups"},
        {"name": ""},
        {"name": "."},
        {"name": ".."},
        {"name": "../nb-1-big-Data.db"},
        {"name": "/etc/passwd"},
        {"name": "nb-1-big-Data.db\0"},
        {"name": "nb-1-big-" + "x" * 247},
    ],
)
def test_an_entry_that_would_leave_its_table_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Corrupt):
        origin_of(TRUSTED, entry_of(**changes))
    with pytest.raises(Corrupt):
        sstables_of(read(*put(honest(entry_of(**changes)))))


def test_a_name_that_no_bytes_can_spell_is_refused() -> None:
    page = json.loads(dump_listing(honest()))
    page["directories"][TABLE_DIRECTORY][0]["name"] = "nb-1-big-\ud800.db"
    with pytest.raises(Corrupt):
        load_listing(json.dumps(page).encode())


pieces = some.one_of(
    some.sampled_from(["", ".", "..", "ks", FIRST, "snapshots", "daily", "backups", ".idx", "etc", "a\0b", "\udcff"]),
    some.text(max_size=4),
    some.just("x" * 256),
)


@settings(max_examples=150, deadline=None)
@given(
    some.lists(pieces, max_size=5).map("/".join),
    some.lists(pieces, max_size=5).map("/".join),
    some.one_of(pieces, some.just("nb-1-big-Data.db")),
)
def test_whatever_an_entry_says_it_stays_inside_its_table(before: str, after: str, name: str) -> None:
    directory = f"/{before}/ks/{FIRST}/snapshots/daily{after}"
    try:
        home, folder = origin_of(TRUSTED, entry_of(directory=directory, name=name))
    except Corrupt:
        return
    assert f"{home}/ks/{FIRST}/snapshots/daily/{folder}{name}" == f"{directory}/{name}"
    for part in f"{home}/{folder}{name}".split("/")[1:]:
        assert part not in ("", ".", "..")
        assert "\0" not in part
        assert len(part) <= 255


@pytest.mark.parametrize(
    "unit", [replace(TRUSTED, keyspace=".."), replace(TRUSTED, table=".."), replace(TRUSTED, keyspace="")]
)
def test_a_table_with_a_hostile_name_is_refused(unit: Unit) -> None:
    entry = next(nb(1, 0).entries(unit))
    with pytest.raises(Corrupt):
        origin_of(unit, entry)


@pytest.mark.parametrize(
    "key",
    [
        "node10/var/lib/a-Data.db",
        "node1",
        "node1.listings/ks/x.json",
        "/node1/a",
        "node1/../node10/a",
        "node1/./a",
        "node1//a",
        "node1/",
        "",
        "node1/a\ud800",
        "node1/a\0",
        "node1/a\n",
    ],
)
def test_a_key_outside_the_prefix_of_the_node_is_refused(key: str) -> None:
    with pytest.raises(Corrupt):
        read(*put(honest(entry_of(), entry_of(name="nb-1-big-TOC.txt", key=key))))


def test_an_honest_listing_is_read() -> None:
    listing = honest()
    expected = [replace(entry) for entry in listing.files]
    found = read(*put(listing))
    assert (found.unit, found.taken, found.complete) == (listing.unit, listing.taken, True)
    assert [dataclasses.asdict(entry) for entry in found.files] == [dataclasses.asdict(entry) for entry in expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"node": "node10"},
        {"listed": utc(BEGIN + 2)},
        {"complete": False},
        {"unit": replace(TRUSTED, table=SECOND)},
        {"unit": replace(TRUSTED, keyspace="other")},
        {"unit": replace(TRUSTED, tag="weekly")},
        {"unit": replace(TRUSTED, life=utc(BEGIN + 3))},
        {"unit": Unit("incremental", "ks", FIRST, "", utc(BEGIN))},
        {"files": ()},
    ],
)
def test_a_listing_that_does_not_say_what_its_key_says_is_refused(changes: dict[str, Any]) -> None:
    listing = honest()
    with pytest.raises(Corrupt):
        read(*put(listing, dump_listing(replace(listing, **changes)), listing_key(listing)))


def test_a_listing_larger_than_any_of_ours_is_refused_unread() -> None:
    bucket, info = put(honest())
    bucket.objects.clear()
    with pytest.raises(Corrupt, match="bytes"):
        read(bucket, info._replace(body=1 << 30))


@pytest.mark.parametrize(
    "name",
    [
        "ks/users-1/snapshots/daily/notes.txt",
        "ks/users-1/snapshots/daily/20261101T000000.000000Z-complete-1-1.json",
        "ks/users-1/backups/99999999T999999.999999Z-complete-1-1.json",
        f"ks/users-1/snapshots/daily/20261399T000000.000000Z/{utc(BEGIN)}-complete-1-1.json",
        "ks/users-1/backups/20261101T000000.000000Z-perfect-1-1.json",
        "stray",
        "",
    ],
)
def test_what_lies_among_the_listings_and_is_none_is_told(name: str) -> None:
    with pytest.raises(Corrupt):
        listing_info(NODE, ObjectInfo(f"{NODE}.listings/{name}", 1, "", 0.0))


@pytest.mark.parametrize(
    "name", ["owner.json", f"node.{utc(BEGIN)}.json", "heartbeat/x.json", "tags/daily/x.json", "pruned/x"]
)
def test_other_pages_among_the_listings_are_no_listings(name: str) -> None:
    assert listing_info(NODE, ObjectInfo(f"{NODE}.listings/{name}", 1, "", 0.0)) is None


@pytest.mark.parametrize(
    "keyspace", ["bad", "heartbeat", "pruned", "tags", "archive", "snapshots", "backups", "é", "a%b"]
)
def test_a_keyspace_called_like_a_folder_of_ours_is_read_as_what_it_is(keyspace: str) -> None:
    bucket: Any = Bucket()
    for unit in (replace(TRUSTED, keyspace=keyspace), Unit("incremental", keyspace, FIRST)):
        key = unit_prefix(NODE, unit) + f"{utc(BEGIN)}-complete-1-1.json"
        assert key.split("/")[1] not in {"archive", "bad", "heartbeat", "pruned", "tags"}
        info = listing_info(NODE, bucket.put(key, b"", BEGIN + 5))
        assert info
        assert (info.unit, info.when) == (unit, BEGIN + 5)
    (folder,) = table_folders(bucket, NODE, [keyspace])
    assert len(list(listings_of(bucket, NODE, folder=folder))) == 2


def test_the_listings_of_node1_are_not_those_of_node10() -> None:
    bucket: Any = Bucket()
    listing = honest(node="node10")
    bucket.put(listing_key(listing), dump_listing(listing))
    assert list(listings_of(bucket, "node1")) == []
    assert len(list(listings_of(bucket, "node10"))) == 1
