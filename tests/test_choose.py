"""What a table is restored from: rules by example, and random histories of a table against a model of its rows.

Listings are read from a bucket in memory, through the code that reads them from a real one. A moment is counted in
seconds from the beginning of each story.
"""

from __future__ import annotations

import itertools
import json
import random
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
    choose_taking,
    choose_table,
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
    home: str = HOME

    def entries(self, unit: Unit, seen: str = "") -> Iterator[Stored]:
        """Yield what a listing says of it."""
        folder = "backups" if unit.kind == "incremental" else f"snapshots/{unit.tag}"
        below, _, name = self.name.rpartition("/")
        directory = str(PurePosixPath(self.home, unit.keyspace, unit.table, folder, below))
        for part in self.parts:
            stamp = Stamp("aa", 1, 100 + self.content, round((BEGIN + self.at) * 1e9))
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
        created: Any = "",
        listed: float | None = None,
    ) -> Unit:
        """List a snapshot whose manifest.json was written at `end`."""
        unit = Unit("snapshot", "ks", table, tag, utc(BEGIN + end))
        entries = [entry for sstable in sstables for entry in sstable.entries(unit)]
        if complete:
            created = rfc3339(utc(BEGIN + created)) if isinstance(created, float) else created
            body = json.dumps({"files": [], **({} if created == "" else {"created_at": created})}).encode()
            directory = f"{HOME}/ks/{table}/snapshots/{tag}"
            stamp = Stamp("aa", 2, len(body), round((BEGIN + end) * 1e9))
            key = f"{NODE}{directory}/manifest.json@{end}"
            entries.append(
                Stored(directory, "manifest.json", stamp, 0o644, "u", "g", hex32(zlib.crc32(body)), key, "")
            )
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
    assert story.names(3 * DAY) == ["nb-1-big"]


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
    old, base, imported = (f"da-{id_}-bti" for id_ in ("3gz0_0000_a" + "0" * 17, "3gz1_" + "1" * 23, "3gz1_" + "2" * 23))
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
    takings += [taking("a", "other", DAY + 1), taking("a", "often", 0), taking("b", "often", 1), taking("a", "often", 9)]
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
    assert renamed(SSTable(HOME, name, "", ()), number) == new


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
