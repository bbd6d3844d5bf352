"""What a table is restored from: rules by example, and random histories of a table against a model of its rows.

Listings are read from a bucket in memory, through the code that reads them from a real one. A moment is counted in
seconds from the beginning of each story.
"""

from __future__ import annotations

import json
import random
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from cassbackup import (
    Chosen,
    Corrupt,
    Fetch,
    Filed,
    Head,
    Listing,
    Missing,
    Publisher,
    SSTable,
    Stamp,
    Stored,
    Taking,
    Unit,
    backups_of,
    choose_backup,
    choose_table,
    choose_taking,
    dump_listing,
    emptied_at,
    fetches_of,
    filed_as,
    filed_in,
    hex32,
    is_automatic,
    is_selected,
    listing_name,
    listings_of,
    load_listing,
    newest_of_names,
    origin_of,
    read_filed,
    read_taking,
    renamed,
    rfc3339,
    seconds_of,
    sstable_of,
    sstables_of,
    tables_of,
    takings_of,
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
    """A store in memory, as far as choosing and publishing ask one."""

    url = "memory:"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.clock = BEGIN

    def now(self) -> float:
        return self.clock

    def put_now(self, key: str, body: bytes, crc32: int) -> Head:
        assert key not in self.objects
        self.objects[key] = (bytes(body), self.clock)
        return self._head(key)

    def _head(self, key: str) -> Head:
        body, modified = self.objects[key]
        return Head(key, len(body), "", modified)

    def head(self, key: str) -> Head | None:
        return self._head(key) if key in self.objects else None

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if key not in self.objects:
            raise Missing(key)
        yield self.objects[key][0][start:end]

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        return (self._head(key) for key in sorted(self.objects) if key.startswith(prefix) and key > after)


@dataclass(frozen=True)
class Written:
    """An SSTable on the node."""

    name: str  # nb-1-big, of an index .idx/nb-1-big
    at: float  # when its Data.db was written
    content: int = 1
    parts: tuple[str, ...] = PARTS
    imported: float | None = None  # when an import wrote its Statistics.db anew
    home: str = HOME

    def entries(self, unit: Unit, seen: str = "") -> Iterator[Stored]:
        """Yield what a listing says of it."""
        folder = "backups" if unit.kind == "incremental" else f"snapshots/{unit.tag}"
        below, _, name = self.name.rpartition("/")
        directory = str(PurePosixPath(self.home, unit.keyspace, unit.table, folder, below))
        times = dict.fromkeys(self.parts, self.at)
        if self.imported is not None:
            times["Statistics.db"] = self.imported
        for part, at in times.items():
            stamp = Stamp("aa", 1, 100 + self.content, round((BEGIN + at) * 1e9))
            key = f"{NODE}{directory}/{name}-{part}@{self.at}-{self.content}"
            yield Stored(directory, f"{name}-{part}", stamp, 0o644, "u", "g", hex32(self.content), key, "", seen=seen)


@dataclass
class Story:
    """What a daemon wrote down of one table. Each method is given moments in seconds from BEGIN."""

    bucket: Bucket = field(default_factory=Bucket)
    publisher: Publisher = field(init=False)

    def __post_init__(self) -> None:
        self.publisher = Publisher(self.bucket, NODE, lambda entry: True)  # type: ignore[arg-type]

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
        seen: float | None = None,
    ) -> Unit:
        """List a snapshot whose manifest.json was written at `end`, and which was first seen then or later."""
        unit = Unit("snapshot", "ks", table, tag, utc(BEGIN + (end if seen is None else seen)))
        entries = [entry for sstable in sstables for entry in sstable.entries(unit)]
        if manifest:
            created = rfc3339(utc(BEGIN + created)) if isinstance(created, float) else created
            body = json.dumps({"files": [], **({} if created == "" else {"created_at": created})}).encode()
            directory = f"{HOME}/ks/{table}/snapshots/{tag}"
            stamp = Stamp("aa", 2, len(body), round((BEGIN + end) * 1e9))
            key = f"{NODE}{directory}/manifest.json@{end}"
            entries.append(Stored(directory, "manifest.json", stamp, 0o644, "u", "g", hex32(zlib.crc32(body)), key, ""))
            self.bucket.objects.setdefault(key, (body, BEGIN + end))
        self._list(Listing(NODE, unit, "", complete, tuple(entries)), end if listed is None else listed)
        return unit

    def backups(
        self, opened: float, *sstables: Written, table: str = FIRST, missing: Iterable[str] = (), listed: float = 0.0
    ) -> None:
        """List a batch of backups/ that was opened at a moment."""
        unit = Unit("incremental", "ks", table, "", utc(BEGIN + opened))
        entries = tuple(entry for sstable in sstables for entry in sstable.entries(unit))
        self._list(Listing(NODE, unit, "", not missing, entries, tuple(missing)), max(opened, listed))

    def _list(self, listing: Listing, listed: float) -> None:
        """Write a listing as the daemon does: a batch is listed as of its opening, unless a later one was."""
        if not listing.files:
            return
        self.bucket.clock = max(self.bucket.clock, BEGIN + listed)
        unit, (_, _, newest) = listing.unit, self.publisher.known(listing.unit, None)
        own_time = unit.kind == "snapshot" or newest >= unit.since
        clock = (lambda: utc(self.bucket.clock)) if own_time else (lambda: unit.since)
        self.publisher.publish(listing, lambda entry: entry, newest, clock)

    def roll_up(self, at: float, table: str = FIRST) -> Listing | None:
        """Write a roll-up, as the daemon does after a snapshot."""
        self.bucket.clock = max(self.bucket.clock, BEGIN + at)
        unit, now = Unit("snapshot", "ks", table, "daily", ""), utc(self.bucket.clock)
        return self.publisher.roll_up(unit, now, lambda: now)

    def chosen(self, at: float) -> list[Chosen]:
        """Return what `restore --at` chooses."""
        store: Any = self.bucket
        tables = tables_of(filed_in(store, NODE), (), ())
        chosen = [choose_table(store, NODE, item, filed, BEGIN + at) for item, filed in tables.items()]
        return newest_of_names(chosen, BEGIN + at)

    def names(self, at: float) -> list[str]:
        """Return the names of the SSTables that are restored."""
        return sorted(sstable.name for chosen in self.chosen(at) for sstable in chosen.sstables)


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
    assert is_automatic(tag)


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
    assert story.roll_up(3 * DAY)
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
    names = {fetch.name for fetch in fetches_of(chosen)}
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
    assert len(chosen.troubles) == 1
    assert "nb-1-big" in chosen.troubles[0]


def test_an_sstable_whose_components_came_in_two_batches_is_whole() -> None:
    story = Story()
    story.backups(10, nb(1, 10, parts=PARTS[:2]), missing=["nb-1-big-TOC.txt"])
    story.backups(20, nb(1, 10, parts=PARTS[2:]))
    (chosen,) = story.chosen(30)
    assert [len(sstable.files) for sstable in chosen.sstables] == [3]
    assert not chosen.troubles


def test_an_sstable_that_backups_holds_in_part_is_no_trouble_if_the_snapshot_has_it_whole() -> None:
    story = Story()
    story.backups(DAY - 60, nb(1, DAY - 60, parts=PARTS[1:]), missing=["nb-1-big-Data.db"])
    story.snapshot(1 * DAY, nb(1, DAY - 60))
    (chosen,) = story.chosen(2 * DAY)
    assert not chosen.troubles


def test_two_sstables_with_one_generation_both_arrive_and_one_is_renamed() -> None:
    story = Story()
    story.backups(10, nb(1, 10, 1), nb(2, 10, 2), nb(3, 10, 3))
    story.backups(20, nb(1, 20, 4), nb(3, 20, 5))
    (chosen,) = story.chosen(30)
    fetches = list(fetches_of(chosen))
    assert Counter(fetch.entry.crc32 for fetch in fetches) == {hex32(content): 3 for content in range(1, 6)}
    assert len({fetch.name for fetch in fetches}) == len(fetches)
    assert {fetch.name.split("-")[1] for fetch in fetches} == {"1", "2", "3", "4", "5"}


def test_a_roll_up_stands_for_the_batches_that_it_replaces() -> None:
    story = Story()
    for number in range(1, 6):
        story.backups(number * 10, nb(number, number * 10))
    rollup = story.roll_up(100)
    assert rollup
    assert len(rollup.replaces) == 5
    before = story.names(30)
    for key in [key for key in story.bucket.objects if key.rpartition("/")[2] in rollup.replaces]:
        del story.bucket.objects[key]
    assert story.names(30) == before == ["nb-1-big", "nb-2-big", "nb-3-big"]


def test_a_roll_up_keeps_two_sstables_of_one_generation_apart() -> None:
    story = Story()
    story.backups(10, nb(1, 10, 1))
    story.backups(20, nb(1, 20, 2))
    assert story.roll_up(100)
    assert story.names(10) == ["nb-1-big"]
    assert story.names(30) == ["nb-1-big", "nb-1-big"]


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
    store: Any = story.bucket
    (taking,) = choose_backup(takings_of(filed_in(store, NODE)), unit.tag)
    assert [sstable.name for sstable in choose_taking(read_taking(store, NODE, taking)).sstables] == ["nb-1-big"]


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
    story.backups(3 * DAY, nb(1, 1.5 * DAY), table=SECOND)
    assert [(chosen.table, len(chosen.sstables)) for chosen in story.chosen(4 * DAY)] == [(SECOND, 1)]
    assert story.names(2.5 * DAY) == []
    assert [(chosen.table, len(chosen.sstables)) for chosen in story.chosen(1.9 * DAY)] == [(FIRST, 1)]


def test_an_sstable_whose_name_we_do_not_know_is_named_and_not_left_out_in_silence() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0.5 * DAY), Written("nb-2-3-big", 0.5 * DAY, 2))
    story.backups(2 * DAY, nb(3, 2 * DAY, 3), Written("future", 2 * DAY, 4))
    (chosen,) = story.chosen(3 * DAY)
    assert [one.name for one in chosen.sstables] == ["nb-1-big", "nb-3-big"]
    assert [trouble.split()[0] for trouble in chosen.troubles] == ["future-Data.db", "nb-2-3-big-Data.db"]


def test_an_odd_name_that_came_later_is_no_lack_of_an_earlier_moment() -> None:
    story = Story()
    story.snapshot(1 * DAY, nb(1, 0.5 * DAY))
    story.backups(2 * DAY, Written("future", 2 * DAY, 4))
    (chosen,) = story.chosen(1.5 * DAY)
    assert chosen.troubles == ()


def test_a_table_is_not_restored_to_a_moment_before_it_was_created() -> None:
    """Its id tells when: else what was imported into it, with its old times, would stand for the table of that time."""
    story, tables = Story(), [f"users-{id_of(day * DAY, day)}" for day in (0, 2, 4)]
    story.snapshot(1 * DAY, nb(1, 0.5 * DAY), tag=tag_of("dropped", 1 * DAY), table=tables[0])
    story.backups(2.5 * DAY, nb(1, 2.5 * DAY, 2), table=tables[1])
    story.backups(5 * DAY, nb(1, 2.6 * DAY, 3), table=tables[2])
    assert [chosen.table for chosen in story.chosen(3 * DAY)] == [tables[1]]
    assert [chosen.table for chosen in story.chosen(6 * DAY)] == [tables[2]]


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
        ("dropped-the-ball", False, 0.0),
        ("1793491200123", False, 0.0),  # nodetool's own default
        ("daily", False, 0.0),
        ("truncated-٣٣٣٣٣٣٣٣٣٣٣-users", False, 0.0),
    ],
)
def test_automatic_snapshots_are_told_by_their_tags(tag: str, automatic: bool, emptied: float) -> None:
    assert (is_automatic(tag), emptied_at(tag)) == (automatic, emptied)


# ------------------------------------------------------------------------------------------------------------
# Takings, tags, tables


def taking(table: str, tag: str, at: float, state: str = "complete") -> Taking:
    """Return a taking with one listing."""
    unit = Unit("snapshot", "ks", table, tag, utc(BEGIN + at))
    return Taking(unit, (Filed("key", unit, utc(BEGIN + at + 5), state, 1, 1, 1, BEGIN + at + 5),))


def test_listings_are_sorted_by_taking_and_one_complete_one_is_enough() -> None:
    story = Story()
    story.snapshot(10, nb(1, 0), complete=False, listed=10)
    story.snapshot(10, nb(1, 0), listed=20)
    story.snapshot(DAY, nb(2, 0), complete=False)
    store: Any = story.bucket
    first, second = takings_of(filed_in(store, NODE))
    assert (len(first.filed), first.complete, first.newest.state) == (2, True, "complete")
    assert (len(second.filed), second.complete) == (1, False)
    assert read_taking(store, NODE, first).complete


def test_tables_of_one_nodetool_snapshot_are_one_backup() -> None:
    tables = ["a", "b", "c"]
    takings = [taking(table, "daily", day * DAY + n) for day in (1, 2) for n, table in enumerate(tables)]
    takings += [
        taking("a", "other", DAY + 1),
        taking("a", "often", 0),
        taking("b", "often", 1),
        taking("a", "often", 9),
    ]
    random.Random(0).shuffle(takings)
    told = [(backup[0].unit.tag, "".join(one.unit.table for one in backup)) for backup in backups_of(takings)]
    assert told == [("often", "ab"), ("often", "a"), ("daily", "abc"), ("other", "a"), ("daily", "abc")]


def test_a_tag_means_its_newest_taking_unless_one_is_named() -> None:
    takings = [taking("a", "daily", DAY), taking("a", "daily", 2 * DAY), taking("a", "x@2026", 3 * DAY)]
    assert choose_backup(takings, "daily")[0].unit.since == utc(BEGIN + 2 * DAY)
    assert choose_backup(takings, "daily@20261102")[0].unit.since == utc(BEGIN + DAY)
    assert choose_backup(takings, "x@2026")[0].unit.tag == "x@2026"
    with pytest.raises(Missing, match="daily"):
        choose_backup(takings, "dayly")
    with pytest.raises(Missing):
        choose_backup(takings, "daily@2025")
    with pytest.raises(Missing):
        choose_backup([], "daily")


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
    assert is_selected(Unit("incremental", "ks", FIRST, "", ""), words) is selected


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


@given(some.lists(some.tuples(sstable_names, some.integers(0, 10**6)), max_size=12))
def test_every_file_that_was_chosen_gets_a_name_of_its_own(sstables: list[tuple[str, int]]) -> None:
    unit = Unit("incremental", "ks", FIRST, "", utc(BEGIN))
    listings = [
        Listing(NODE, replace(unit, since=utc(BEGIN + at)), "", True, tuple(Written(name, at, n).entries(unit)))
        for n, (name, at) in enumerate(dict.fromkeys(sstables))
    ]
    chosen = Chosen("ks", FIRST, tuple(sstables_of(listings)), choose_taking(listings[0]).base) if listings else None
    fetches: list[Fetch] = list(fetches_of(chosen)) if chosen else []
    assert Counter(fetch.entry for fetch in fetches) == Counter(e for listing in listings for e in listing.files)
    assert len({fetch.name for fetch in fetches}) == len(fetches)
    whole: dict[str, set[str]] = {}
    for fetch in fetches:
        folder, _, base = fetch.name.rpartition("/")
        split = sstable_of(base)
        assert split
        whole.setdefault(f"{folder}/{split[0]}", set()).add(fetch.entry.crc32)
    assert all(len(crcs) == 1 for crcs in whole.values())


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
        for end, sstables, tag, table, complete, created in self.snapshots:
            self.story.snapshot(
                end,
                *sstables,
                tag=tag,
                table=table,
                complete=complete,
                manifest=complete or len(sstables) % 2 == 0,
                created=created,
                listed=self.clock + 2,
            )
            if complete:
                self.story.roll_up(self.clock + 3, table)
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
        created = rfc3339(utc(BEGIN + began)) if self.created else ""
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


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
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


def filed_of(listing: Listing, body: bytes = b"", key: str = "", modified: float = BEGIN) -> tuple[Bucket, Filed]:
    """Put a listing into a bucket, perhaps with another body or under another key."""
    bucket = Bucket()
    key = key or listings_of(NODE, listing.unit) + listing_name(listing)
    bucket.clock = modified
    head = bucket.put_now(key, body or dump_listing(listing), 0)
    filed = filed_as(NODE, head)
    assert filed
    return bucket, filed


def honest(*files: Stored, **changes: Any) -> Listing:
    """Return a listing of an honest snapshot, but for the changes."""
    return replace(Listing(NODE, TRUSTED, utc(BEGIN + 1), True, files or (entry_of(),)), **changes)


def read(bucket: Any, filed: Filed) -> Listing:
    """Read a listing as restore, verify and prune do."""
    return read_filed(bucket, NODE, filed)


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
        {"directory": f"{TABLE_DIRECTORY}/{'é' * 128}"},
        {"directory": f"/a\0b{TABLE_DIRECTORY}"},
        {"directory": TABLE_DIRECTORY.replace(FIRST, SECOND)},
        {"directory": TABLE_DIRECTORY.replace("/ks/", "/other/")},
        {"directory": f"{HOME}/ks/{FIRST}/backups"},
        {"name": ""},
        {"name": "."},
        {"name": ".."},
        {"name": "../nb-1-big-Data.db"},
        {"name": "/etc/passwd"},
        {"name": "a/nb-1-big-Data.db"},
        {"name": "nb-1-big-Data.db\0"},
        {"name": "nb-1-big-" + "x" * 247},
        {"mode": 0o4755},
        {"mode": 0o2755},
        {"mode": 0o1777},
        {"mode": 0o10644},
    ],
)
def test_an_entry_that_would_leave_its_table_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Corrupt):
        origin_of(TRUSTED, entry_of(**changes))
    bucket, filed = filed_of(honest(entry_of(**changes)))
    with pytest.raises(Corrupt):
        sstables_of([read(bucket, filed)])


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


@settings(max_examples=500)
@given(
    some.lists(pieces, max_size=5).map("/".join),
    some.lists(pieces, max_size=5).map("/".join),
    some.one_of(pieces, some.just("nb-1-big-Data.db")),
    some.sampled_from([0o644, 0o4755]),
)
def test_whatever_an_entry_says_it_stays_inside_its_table(before: str, after: str, name: str, mode: int) -> None:
    directory = f"/{before}/ks/{FIRST}/snapshots/daily{after}"
    try:
        home, folder = origin_of(TRUSTED, entry_of(directory=directory, name=name, mode=mode))
    except Corrupt:
        return
    assert f"{home}/ks/{FIRST}/snapshots/daily/{folder}{name}" == f"{directory}/{name}"
    assert mode == 0o644
    for part in f"{home}/{folder}{name}".split("/")[1:]:
        assert part not in ("", ".", "..")
        assert "\0" not in part
        assert len(part.encode("utf-8", "surrogateescape")) <= 255


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
    bucket, filed = filed_of(honest(entry_of(), entry_of(name="nb-1-big-TOC.txt", key=key)))
    with pytest.raises(Corrupt):
        read(bucket, filed)


def test_an_honest_listing_is_read() -> None:
    listing = honest()
    assert read(*filed_of(listing)) == listing


@pytest.mark.parametrize(
    "changes",
    [
        {"node": "node10"},
        {"listed": utc(BEGIN + 2)},
        {"complete": False},
        {"unit": replace(TRUSTED, table=SECOND)},
        {"unit": replace(TRUSTED, keyspace="other")},
        {"unit": replace(TRUSTED, tag="weekly")},
        {"unit": replace(TRUSTED, since=utc(BEGIN + 3))},
        {"unit": Unit("incremental", "ks", FIRST, "", utc(BEGIN))},
        {"replaces": ("other.json",)},
        {"files": ()},
    ],
)
def test_a_listing_that_does_not_say_what_its_key_says_is_refused(changes: dict[str, Any]) -> None:
    listing = honest()
    key = listings_of(NODE, listing.unit) + listing_name(listing)
    with pytest.raises(Corrupt):
        read(*filed_of(listing, dump_listing(replace(listing, **changes)), key))


def test_a_listing_larger_than_any_of_ours_is_refused_unread() -> None:
    bucket, filed = filed_of(honest())
    bucket.objects.clear()
    with pytest.raises(Corrupt, match="bytes"):
        read(bucket, filed._replace(body=1 << 30))


@pytest.mark.parametrize(
    "changes",
    [
        {"seen": "yesterday"},
        {"seen": "20261399T000000.000000Z"},
        {"mode": "abcd"},
        {"mode": 420},
        {"size": -1, "stamp": "aa-1--1-0"},
        {"mtime_ns": 10**30, "stamp": f"aa-1-65-{10**30:x}"},
        {"mtime_ns": -(10**30), "stamp": f"aa-1-65--{10**30:x}"},
        {"mtime_ns": True},
        {"crc32": "xyz"},
        {"crc32": None},
        {"name": "%2E%2E"},
        {"name": "a%2Fb"},
        {"name": "a%00"},
        {"user": ["root"]},
        {"key": 7},
    ],
)
def test_an_entry_with_a_wrong_value_is_refused(changes: dict[str, Any]) -> None:
    page = json.loads(dump_listing(honest()))
    (entries,) = page["directories"].values()
    entries[0] |= changes
    with pytest.raises(Corrupt):
        load_listing(json.dumps(page).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": "1"},
        {"version": True},
        {"kind": "other"},
        {"taking": "20261399T000000.000000Z"},
        {"listed": "2026-13-99T00:00:00.000000Z"},
        {"listed": None},
        {"complete": "yes"},
        {"directories": []},
        {"directories": {"/x": [7]}},
        {"missing": [7]},
        {"replaces": "x"},
    ],
)
def test_a_page_with_a_wrong_value_is_refused(changes: dict[str, Any]) -> None:
    page = json.loads(dump_listing(honest())) | changes
    with pytest.raises(Corrupt):
        load_listing(json.dumps(page).encode())


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_listing_is_refused(body: bytes) -> None:
    with pytest.raises(Corrupt):
        load_listing(body)


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
        filed_as(NODE, Head(f"{NODE}.listings/{name}", 1, "", 0.0))


@pytest.mark.parametrize("name", ["owner.json", f"node.{utc(BEGIN)}.json", "heartbeat/x.json", "tags/daily/x.json"])
def test_other_pages_among_the_listings_are_no_listings(name: str) -> None:
    assert filed_as(NODE, Head(f"{NODE}.listings/{name}", 1, "", 0.0)) is None


@pytest.mark.parametrize("keyspace", ["heartbeat", "tags", "archive", "snapshots", "backups", "é", "a%b"])
def test_a_keyspace_called_like_a_folder_of_ours_is_filed_as_what_it_is(keyspace: str) -> None:
    for unit in (replace(TRUSTED, keyspace=keyspace), Unit("incremental", keyspace, FIRST, "", "")):
        key = listings_of(NODE, unit) + f"{utc(BEGIN)}-complete-1-1.json"
        filed = filed_as(NODE, Head(key, 1, "", BEGIN + 5))
        assert filed
        assert (filed.unit, filed.when) == (unit, BEGIN + 5)


def test_the_listings_of_node1_are_not_those_of_node10() -> None:
    story = Story()
    story.publisher.node = "node10"
    listing = honest(node="node10")
    story.bucket.put_now(listings_of("node10", listing.unit) + listing_name(listing), dump_listing(listing), 0)
    store: Any = story.bucket
    assert list(filed_in(store, "node1")) == []
    assert len(list(filed_in(store, "node10"))) == 1
