"""Prune errs on keeping: what stays as a pure function, the protocol without a lock as a model, the command.

P1 and P7, over random interleavings of prunes that die and daemons that publish: what is listed is there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from servers import FileBucket
from shelf import DAY, EPOCH, HOUR, KEYSPACE, NODE, TABLE, Door, Shelf, batch, body_of, entry_of, snapshot, unit_of

import cassbackup as cb
from cassbackup import Candidate, Listing, ObjectInfo, PruneOptions, Stored, Unit, utc

OTHER = "orders-" + "6b" * 16


# ------------------------------------------------------------------------------------------------------------
# What stays of a table


class Table:
    """Listings of one table, as prune reads them."""

    def __init__(self, *listings: Listing[Stored]) -> None:
        self.listings = {cb.listing_key(one): one for one in listings}
        infos = (cb.listing_info(NODE, ObjectInfo(key, 1, "", 0.0)) for key in sorted(self.listings))
        self.infos = [info for info in infos if info]
        self.bad: set[Unit] = set()

    def candidates(self) -> list[Candidate]:
        found = []
        for one in cb.snapshots_of(self.infos):
            newest = self.listings[one.newest.key]
            taken = cb.seconds_of(newest.taken)
            counts, good = one.complete and not cb.is_automatic(one.unit), one.unit not in self.bad
            found.append(Candidate(one.unit, one, taken, one.newest.when, counts, good, cb.end_of(newest)))
        return found

    def kept(self, now: float, **terms: Any) -> dict[Unit, str]:
        """Return what stays, and why."""
        options = PruneOptions(**terms)
        if options.tag:
            return cb.kept_but_tag(self.candidates(), options, partial(cb.is_meant, word=options.tag))
        return cb.kept_snapshots(self.candidates(), options, now)

    def kept_tags(self, now: float, **terms: Any) -> list[str]:
        return sorted(unit.tag for unit in self.kept(now, **terms))

    def gone(self, now: float, **terms: Any) -> set[str]:
        """Return the keys of listings that go."""
        kept = self.kept(now, **terms)
        window = cb.window_of(self.candidates(), kept)
        gone = set()
        for info in self.infos:
            if info.unit.kind == "snapshot" and info.unit not in kept:
                gone.add(info.key)
            if info.unit.kind == "incremental" and info.when < window - cb.DAY_S - cb._SLACK_S:
                gone.add(info.key)
        return gone

    def pruned(self, now: float, **terms: Any) -> Table:
        gone = self.gone(now, **terms)
        return Table(*(one for key, one in self.listings.items() if key not in gone))

    def batches(self) -> list[Listing[Stored]]:
        return [one for one in self.listings.values() if one.unit.kind == "incremental"]

    def base(self, at: float) -> cb.Base:
        def read(one: cb.Snapshot) -> Listing[Stored]:
            return self.listings[one.newest.key]

        return cb.choose_base(cb.snapshots_of(self.infos), at, read, lambda _: 0.0)


def days(*numbers: float) -> Table:
    """Return a table with a snapshot d<n> at noon of each of these days."""
    return Table(*(snapshot(f"d{number}", EPOCH + number * DAY + DAY / 2) for number in numbers))


def test_so_many_of_the_last_days_weeks_and_months_are_kept() -> None:
    table, now = days(*range(60)), EPOCH + 60 * DAY
    assert table.kept_tags(now, keep_last=2) == ["d58", "d59"]
    assert table.kept_tags(now, keep_within=2 * DAY) == ["d58", "d59"]
    assert table.kept_tags(now, keep_daily=3) == ["d57", "d58", "d59"]
    assert table.kept_tags(now, keep_weekly=3) == ["d45", "d52", "d59"]  # Sunday, Sunday, and 1 March
    assert table.kept_tags(now, keep_monthly=3) == ["d30", "d58", "d59"]


def test_snapshots_count_by_when_they_were_taken_not_by_when_they_were_listed_p7() -> None:
    """Found together, at the first start or after an outage, they are listed in the order of the upload."""
    found = EPOCH + 30 * DAY
    table = Table(
        snapshot("a-month-ago", EPOCH, listed=found + 9), snapshot("today", found, listed=found + 1),
        snapshot("yesterday", found - DAY, listed=found + 5),
    )  # fmt: skip
    assert table.kept_tags(found + 2 * DAY, keep_last=1) == ["today"]
    assert table.kept_tags(found + 2 * DAY, keep_daily=2) == ["today", "yesterday"]
    assert len(table.kept(found + DAY, keep_within=2 * DAY)) == 3  # nothing that was listed yesterday is old


def test_every_snapshot_that_stays_has_a_reason() -> None:
    table, now = days(*range(60)), EPOCH + 60 * DAY
    why = {unit.tag: text for unit, text in table.kept(now, keep_daily=2, keep_weekly=2, keep_monthly=2).items()}
    assert why == {
        "d59": "it is the newest good snapshot of the table",
        "d58": "--keep-daily",
        "d52": "--keep-weekly",
    }


def test_a_tag_goes_by_its_name_or_by_one_life_even_if_it_holds_an_at_sign() -> None:
    table = Table(*(snapshot(tag, EPOCH + day * DAY) for day, tag in enumerate(["a@b", "a", "a", "z"])))
    assert table.kept_tags(EPOCH + 9 * DAY, tag="a@b") == ["a", "a", "z"]
    assert table.kept_tags(EPOCH + 9 * DAY, tag="a") == ["a@b", "z"]
    assert table.kept_tags(EPOCH + 9 * DAY, tag=f"a@{utc(EPOCH + DAY)[:9]}") == ["a", "a@b", "z"]


def test_the_last_good_snapshot_of_a_table_is_never_let_go_however_old_p7() -> None:
    table = Table(snapshot("good", EPOCH), snapshot("half", EPOCH + DAY, complete=False))
    assert table.kept_tags(EPOCH + 900 * DAY, keep_within=HOUR) == ["good"]
    assert table.kept_tags(EPOCH + 900 * DAY, tag="good") == ["good", "half"]
    assert table.kept_tags(EPOCH, tag="good", force=True) == ["half"]
    assert Table(snapshot("half", EPOCH, complete=False)).kept_tags(EPOCH + 900 * DAY, keep_last=1) == ["half"]


def test_what_is_incomplete_or_taken_by_cassandra_itself_never_counts() -> None:
    ms = int((EPOCH + 2 * DAY) * 1000)
    tags = [f"dropped-{ms}-users", f"pre-scrub-{ms}", f"{ms}-compact-users", f"{ms}-upgrade-5.0-6.0"]
    others = [snapshot(tag, EPOCH + 2 * DAY) for tag in tags]
    half = snapshot("c", EPOCH + 3 * DAY, complete=False)
    table = Table(snapshot("a", EPOCH), snapshot("b", EPOCH + DAY), *others, half)
    assert set(table.kept_tags(EPOCH + 4 * DAY, keep_last=2)) == {"a", "b", "c", *tags}  # younger than 14 days
    assert set(table.kept_tags(EPOCH + 4 * DAY, keep_last=1, keep_within=HOUR)) == {"b", tags[0]}
    assert set(table.kept_tags(EPOCH + 40 * DAY, keep_last=2)) == {"a", "b", tags[0]}


def test_what_verify_has_marked_bad_is_not_the_last_good_one_and_no_mark_makes_anything_expire_p7() -> None:
    table, now = days(*range(10)), EPOCH + 10 * DAY
    table.bad = {one.unit for one in table.candidates() if one.unit.tag in ("d9", "d8", "d3")}
    assert table.kept_tags(now, keep_last=1) == ["d7", "d9"]  # d9 would have stayed
    assert table.kept_tags(now, keep_daily=3) == ["d5", "d6", "d7", "d8", "d9"]
    assert (
        table.kept(now, keep_last=1)[unit_of("d7", EPOCH + 7.5 * DAY)] == "it is the newest good snapshot of the table"
    )
    table.bad = {one.unit for one in table.candidates()}
    assert len(table.kept(now, keep_last=1)) == 10


@pytest.mark.parametrize(
    ("told", "left"),
    [
        (({1: "absent"}, {2: "size"}, {}), [0, 1, 2]),
        (({1: "absent"}, {2: "size"}, {1: "good"}, {}), [1, 2, 3]),
        (({1: "absent"}, {1: "good"}, {2: "size"}), [2]),
        (({1: "absent"}, {1: "good"}, {1: "checksum"}, {}), [2, 3]),
        (({9: "absent"}, {}), [1]),
        (({}, {}), [1]),
        ((), []),
    ],
)
def test_what_verify_wrote_goes_once_all_that_it_calls_bad_is_good_again_or_named_by_nothing(
    told: Sequence[dict[int, str]], left: list[int]
) -> None:
    shelf = filled("monday", "tuesday")
    keys = {day + 1: batch(EPOCH + day * DAY, f"nb-{day + 2}-big-Data.db").files[0].key for day in (0, 1, 8)}
    for number, marks in enumerate(told):
        found = [{"key": keys[one], "found": what, "at": ""} for one, what in marks.items()]
        shelf.put(f"{NODE}.listings/bad/{number}.json", cb.dump_document(keys=found))
    bad = cb.read_bad_keys(Door(shelf), NODE)  # type: ignore[arg-type]
    run(shelf, keep_last=2, confirm=True)
    assert [int(key.split("/")[-1][0]) for key in sorted(shelf.keys(f"{NODE}.listings/bad/"))] == left
    assert cb.read_bad_keys(Door(shelf), NODE) == bad - {keys[9]}  # type: ignore[arg-type]


def test_that_a_table_was_emptied_is_not_forgotten_while_an_older_snapshot_is_kept() -> None:
    tag = f"truncated-{int((EPOCH + DAY) * 1000)}-users"
    table = Table(snapshot("a", EPOCH), snapshot(tag, EPOCH + DAY))
    assert table.kept_tags(EPOCH + 90 * DAY, keep_last=1) == ["a", tag]
    table = Table(*table.listings.values(), snapshot("b", EPOCH + 3 * DAY))
    assert table.kept_tags(EPOCH + 90 * DAY, keep_last=1) == ["b"]
    table = Table(snapshot(tag, EPOCH + DAY), snapshot("b", EPOCH + DAY + HOUR))
    assert table.kept_tags(EPOCH + 90 * DAY, keep_last=1) == ["b", tag], "so far back a restore of b may reach"
    table = Table(snapshot("a", EPOCH), snapshot(tag, EPOCH + DAY), snapshot("c", EPOCH + 40 * DAY))
    assert table.kept_tags(EPOCH + 90 * DAY, keep_last=1, keep_monthly=9) == ["a", "c", tag], "a month's own, too"


def test_what_tells_that_a_table_was_emptied_does_not_go_by_its_tag_alone_p7() -> None:
    """It is as large as the table was, and without it a restore brings the truncated rows back."""
    tag = f"truncated-{int((EPOCH + DAY) * 1000)}-users"
    table = Table(snapshot("a", EPOCH), snapshot(tag, EPOCH + DAY))
    assert table.kept_tags(EPOCH + 2 * DAY, tag=tag) == ["a", tag]
    assert table.kept_tags(EPOCH + 2 * DAY, tag=tag, force=True) == ["a"]
    table = Table(snapshot(tag, EPOCH + DAY), snapshot("b", EPOCH + 3 * DAY))
    assert table.kept_tags(EPOCH + 4 * DAY, tag=tag) == ["b"], "no snapshot reaches back to it"
    table = Table(snapshot(tag, EPOCH + DAY))
    assert table.kept_tags(EPOCH + 4 * DAY, tag=tag) == [tag], "incrementals alone reach back to everything"
    assert table.kept_tags(EPOCH + 4 * DAY, tag=tag, force=True) == []


def test_a_snapshot_of_which_only_a_part_could_be_stored_again_is_not_the_last_good_one_p7(tmp_path: Path) -> None:
    """Its complete listing names what is marked bad; a later one has the rest. A restore adds them up."""
    shelf = Shelf()
    weekly = snapshot("weekly", EPOCH + DAY, [(f"nb-{number}-big-Data.db", EPOCH) for number in (2, 3)])
    shelf.add(snapshot("daily", EPOCH, [("nb-1-big-Data.db", EPOCH)]), weekly)
    first, second, *rest = weekly.files
    shelf.now = EPOCH + DAY + HOUR
    marks = [{"key": one.key, "found": "checksum", "at": utc(shelf.now)} for one in (first, second)]
    shelf.put(f"{NODE}.listings/bad/{utc(shelf.now)}.json", cb.dump_document(keys=marks))
    again = replace(first, key=f"{first.key}.again")
    shelf.put(again.key, body_of(again.name, EPOCH))
    part = replace(weekly, listed=utc(shelf.now), complete=False, files=(again, *rest), missing=(second.name,))
    shelf.put(cb.listing_key(part), cb.dump_listing(part))
    shelf.now = EPOCH + 3 * DAY
    bucket = cb.Bucket(cb.Patient(Door(shelf), 1.0), 1)
    (page,) = cb.list_(bucket, cb.ListOptions(node=NODE)).document["nodes"]
    assert [("bad" in one["state"], one["tag"]) for one in page["snapshots"]] == [(False, "daily"), (True, "weekly")]
    (lost,) = cb.report(bucket, cb.ReportOptions(node=NODE, out=str(tmp_path / "page"))).document["tables"]
    assert lost["loss_s"] == pytest.approx(3 * DAY, abs=90), "since the daily one"
    assert cb.prune(bucket, PruneOptions(node=NODE, keep_last=1, confirm=True)).code == cb.DONE
    assert sorted(set(shelf.tags())) == ["daily", "weekly"]


def test_snapshots_dated_by_a_clock_that_was_ahead_stay_and_take_no_place_of_those_taken_since_p7() -> None:
    table, now = days(1, 2, 3, 365, 366, 367), EPOCH + 4 * DAY
    for terms in ({"keep_last": 2}, {"keep_daily": 2}, {"keep_last": 1, "keep_weekly": 1}):
        assert {"d3", "d365", "d366", "d367"} <= set(table.kept_tags(now, **terms)), terms
    assert table.kept_tags(now, keep_last=2) == ["d2", "d3", "d365", "d366", "d367"]
    assert table.kept_tags(EPOCH + 400 * DAY, keep_last=2) == ["d366", "d367"]


def test_a_listing_of_backups_stays_while_any_kept_snapshot_reaches_it_and_one_of_unknown_files_by_its_age() -> None:
    at = EPOCH + 5 * DAY
    table = Table(
        snapshot("a", at),
        batch(at - 9 * DAY, "nb-1-big-Data.db", "nb-1-big-TOC.txt"), batch(at - 9 * DAY + 1, "sst.new"),
        batch(at + 60, "nb-2-big-Data.db"), batch(at + 61, "sst.newer"),
    )  # fmt: skip
    gone = [table.listings[key].files[0].name for key in sorted(table.gone(at + 9 * DAY, keep_last=1))]
    assert gone == ["nb-1-big-Data.db", "sst.new"]


def test_backups_stay_from_a_day_before_the_oldest_snapshot_that_is_kept_was_complete() -> None:
    """Cassandra may have begun it long before: only its manifest.json tells, which prune does not read."""
    at = EPOCH + 5 * DAY
    table = Table(
        snapshot("a", at), batch(at - 23 * HOUR, "nb-1-big-Data.db"), batch(at - 27 * HOUR, "nb-2-big-Data.db")
    )
    assert ["nb-2" in str(table.listings[key]) for key in table.gone(at + 9 * DAY, keep_last=1)] == [True]


def test_that_files_of_backups_were_lost_is_told_as_long_as_a_restore_may_want_them_however_old_those_beside_are() -> (
    None
):
    at = EPOCH + 5 * DAY
    old, young = (
        replace(batch(when, "nb-1-big-Data.db", mtime=EPOCH), complete=False, lost=("nb-9-big-Data.db",))
        for when in (at - 2 * DAY, at + HOUR)
    )
    table = Table(snapshot("a", at, [("nb-5-big-Data.db", EPOCH)]), old, young)
    assert table.gone(at + 9 * DAY, keep_last=1) == {cb.listing_key(old)}


def test_without_a_good_snapshot_everything_of_a_table_stays_p7() -> None:
    table = Table(snapshot("half", EPOCH, complete=False), batch(EPOCH, "nb-1-big-Data.db"))
    assert table.gone(EPOCH + 900 * DAY, keep_last=1) == set()


@given(some.data())
@settings(max_examples=100, deadline=None)
def test_a_restore_to_any_moment_from_a_kept_snapshot_chooses_the_same_before_and_after_p7(
    data: some.DataObject,
) -> None:
    """Incrementals go by the very function that a restore chooses them with."""
    hours = some.integers(0, 24 * 20)
    live: list[tuple[str, float]] = []
    listings: list[Listing[Stored]] = []
    for number, hour in enumerate(sorted(data.draw(some.lists(hours, min_size=1, max_size=25, unique=True)))):
        at = EPOCH + hour * HOUR
        match data.draw(some.sampled_from(["flush", "flush", "import", "snapshot", "snapshot", "truncate", "compact"])):
            case "flush":
                live.append((f"nb-{number}-big-Data.db", at))
                listings.append(batch(at, f"nb-{number}-big-Data.db"))
            case "import":
                live.append((f"nb-{number}-big-Data.db", EPOCH - DAY))
                listings.append(batch(at, f"nb-{number}-big-Data.db", mtime=EPOCH - DAY))
            case "compact":
                live = [(f"nb-{number}-big-Data.db", at)]
            case "snapshot":
                late = data.draw(some.sampled_from([0, 0, 3 * HOUR]))
                listings.append(snapshot(f"d{number}", at, live, listed=at + late))
            case _:
                listings.append(snapshot(f"truncated-{int(at * 1000)}-users", at, live))
                live = []
    before = Table(*listings)
    now = EPOCH + data.draw(some.integers(20, 60)) * DAY
    last, within = data.draw(some.integers(0, 3)), data.draw(some.sampled_from([0.0, 5 * DAY]))
    terms = {"keep_last": last, "keep_within": within, "keep_daily": 2}
    after = before.pruned(now, **terms)
    window = [unit for unit, why in before.kept(now, **terms).items() if why in cb._WINDOW]
    assert bool(window) == any(one.unit.tag.startswith("d") for one in before.infos)
    ends = [cb.seconds_of(unit.life) for unit in window]
    moments = [cb.seconds_of(one.taken) for one in after.listings.values()]
    for at in (at for moment in moments for at in (moment, moment + 5 * HOUR, now)):
        if window and at >= min(ends):
            base = after.base(at)
            chosen = [cb.choose_at(KEYSPACE, TABLE, base, side.batches(), at) for side in (before, after)]
            assert chosen[0].sstables == chosen[1].sstables


def restored(
    shelf: Shelf, at: float, turn: Callable[[], None] = lambda: None
) -> tuple[list[tuple[str, int]], list[str]]:
    """Return what a restore to a moment would bring, and what it lacks."""
    bucket = cb.Bucket(cb.Patient(Door(shelf, turn), 1.0), 1)
    page = cb.restore(bucket, cb.RestoreOptions(node=NODE, at=at, into="/nowhere", dry_run=True)).document
    return [(one["from"], one["sstables"]) for one in page["tables"]], page["lacking"]


def test_a_restore_to_a_moment_whose_flushes_prune_has_let_go_is_lacking_and_within_the_window_the_same_p7(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shelf = Shelf()
    shelf.add(snapshot("weekly", EPOCH), *(snapshot(f"d{day}", EPOCH + day * DAY) for day in (20, 21, 22)))
    shelf.add(*(batch(EPOCH + day * DAY + HOUR, f"nb-{day}-big-Data.db") for day in range(23)))
    shelf.now = EPOCH + 23 * DAY
    between, within = EPOCH + 10 * DAY, [EPOCH + 21 * DAY, EPOCH + 21.5 * DAY, shelf.now]
    before = {at: restored(shelf, at) for at in (between, *within)}
    assert not any(lacking for _, lacking in before.values())
    for days, oldest in ((3, 20), (2, 21), (2, 21)):
        shelf.now += HOUR
        run(shelf, keep_daily=days, keep_weekly=9, confirm=True, force=True)
        (document,) = documents(shelf, "listings/pruned")
        assert document["tables"] == {f"{KEYSPACE}/{TABLE}": EPOCH + oldest * DAY}
    assert "prune has let go what was flushed until" in "".join(restored(shelf, between)[1])
    assert restored(shelf, EPOCH)[1] == [], "of what was flushed since then, it wants nothing"
    for at in within:
        assert restored(shelf, at) == before[at]
    bucket: Any = cb.Bucket(cb.Patient(Door(shelf), 1.0), 1)
    caplog.clear()
    assert cb.verify(bucket, cb.VerifyOptions(node=NODE)).code == cb.list_(bucket, cb.ListOptions()).code == cb.DONE
    assert cb.view_bucket(bucket.store, NODE, None).bad == set()
    assert caplog.text == ""


def test_a_loss_that_prune_lets_go_is_lacking_as_before_and_an_index_made_since_takes_nothing_away_p7() -> None:
    shelf = Shelf()
    shelf.add(snapshot("monthly", EPOCH), snapshot("daily", EPOCH + 20 * DAY))
    lost = batch(EPOCH + 2 * DAY)
    shelf.add(replace(lost, complete=False, lost=("nb-9-big-Data.db",)))
    data, toc = (
        batch(EPOCH + DAY, name, mtime=at)
        for name, at in (("nb-1-big-Data.db", EPOCH), ("nb-1-big-TOC.txt", EPOCH + 22 * DAY))
    )
    shelf.add(replace(data, files=data.files + toc.files))
    shelf.now = EPOCH + 23 * DAY
    then, now = EPOCH + 3 * DAY, shelf.now
    assert [len(restored(shelf, at)[1]) for at in (then, now)] == [1, 0]
    run(shelf, keep_last=1, keep_monthly=3, confirm=True, force=True)
    assert [len(restored(shelf, at)[1]) for at in (then, now)] == [1, 0]


def test_an_import_with_old_times_that_prune_lets_go_is_lacking_until_the_snapshots_that_stay_p7() -> None:
    """Those have what was found in backups/ late, after an outage."""
    shelf, old, late = Shelf(), ("nb-1-big-Data.db", EPOCH - DAY), ("nb-2-big-Data.db", EPOCH - DAY)
    shelf.add(snapshot("weekly", EPOCH, [old]))
    shelf.add(*(snapshot(f"d{day}", EPOCH + day * DAY, [old, late]) for day in (20, 21, 22)))
    shelf.add(batch(EPOCH + 5 * DAY, "nb-5-big-Data.db", mtime=EPOCH - 50 * DAY))
    shelf.add(batch(EPOCH + 22.5 * DAY, late[0], mtime=late[1]))
    shelf.now = EPOCH + 23 * DAY
    moments = [EPOCH + day * DAY for day in (10, 21, 22.2)]
    assert [restored(shelf, at)[1] for at in moments] == [[], [], []]
    run(shelf, keep_daily=2, keep_weekly=9, confirm=True, force=True)
    assert [len(restored(shelf, at)[1]) for at in moments] == [1, 0, 0]
    (found_late,) = [key for key in shelf.named if "/backups/" in key]
    assert f"/backups/{utc(EPOCH + 22.5 * DAY)}" in found_late, "by when it was listed, not by its times"


def test_a_table_that_was_created_after_the_moment_lacks_nothing_whatever_prune_let_go_of_it() -> None:
    young = "young-a1c98000f40011f08000000000000009"  # of 18 January
    shelf, old = Shelf(), [("nb-1-big-Data.db", EPOCH - DAY)]
    shelf.add(*(snapshot(f"w{day}", EPOCH + day * DAY, old) for day in (0, 7, 14, 21, 28)))
    for day in (21, 28):
        shelf.add(snapshot(f"w{day}", EPOCH + day * DAY + 60, [("nb-1-big-Data.db", EPOCH + 18 * DAY)], table=young))
    shelf.add(batch(EPOCH + 18 * DAY, "nb-1-big-Data.db", table=young))
    shelf.now = EPOCH + 29 * DAY
    before = restored(shelf, EPOCH + 10 * DAY)
    assert before[1] == []
    run(shelf, keep_last=4, confirm=True, force=True)
    assert documents(shelf, "listings/pruned")[0]["tables"].keys() == {f"{KEYSPACE}/{young}"}
    assert restored(shelf, EPOCH + 10 * DAY) == before
    assert len(restored(shelf, EPOCH + 19 * DAY)[1]) == 1


# ------------------------------------------------------------------------------------------------------------
# The protocol: prunes and daemons, one operation of the store at a time, in any order


class Killed(Exception):
    """What a process that was killed sees of its store."""


class Actor(threading.Thread):
    """A process: it runs from one operation to the next when it is told to, and may be killed before any."""

    def __init__(self, shelf: Shelf, work: Callable[[Actor], object]) -> None:
        super().__init__(daemon=True)
        self.store: Any = Door(shelf, self.turn)
        self.shelf, self.work = shelf, work
        self.go, self.parked = threading.Lock(), threading.Lock()  # as semaphores of one, which are slower
        self.go.acquire()
        self.parked.acquire()
        self.killed, self.ended = False, False
        self.deadline, self.moved = math.inf, shelf.now
        self.error: BaseException | None = None
        self.start()
        self.parked.acquire()

    def turn(self) -> None:
        if not self.killed:
            self.parked.release()
            self.go.acquire()
        if self.killed:
            raise Killed

    def run(self) -> None:
        try:
            self.turn()
            self.work(self)
        except (Killed, cb.Fault):  # a Fault, as where another prune deleted what was about to be read, ends a run
            pass
        except BaseException as error:
            self.error = error
        self.ended, self.deadline = True, math.inf
        self.parked.release()

    def step(self, kill: bool = False) -> None:
        """Let it do one operation, or die before it."""
        self.killed, self.moved = kill, self.shelf.now
        self.go.release()
        assert self.parked.acquire(timeout=60), "it does something else than operations of the store"
        if self.error:
            raise self.error


class Daemon:
    """Flushes, snapshots and compactions of one table, stored and published as the real daemon does it.

    It publishes by view_bucket and confirm; what is gone or about to go it stores again under a new key.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.known: dict[str, tuple[Stored, float]] = {}  # the ledger: by content, confirmed at
        self.live: list[tuple[str, float]] = []
        self.flushed, self.newest = 0, utc(EPOCH)

    def clock(self) -> str:
        self.newest = cb.later(utc(self.actor.shelf.now), self.newest)
        return self.newest

    def live_on(self, actor: Actor) -> None:
        """Run for ever; a new process has its ledger, or lost it."""
        self.actor = actor
        if self.chance.random() < 0.3:
            self.known.clear()
        while True:
            what = self.chance.random()
            if what < 0.4 or not self.live:
                self.flushed += 1
                self.live.append((f"nb-{self.flushed}-big-Data.db", actor.shelf.now))
                self.publish(unit_of("", actor.shelf.now), self.live[-1:])
            else:
                now, tag = actor.shelf.now, self.chance.choice(["daily", "weekly", "by-hand"])
                # schema.cql is the same bytes each time, and so the same key.
                self.publish(unit_of(tag, now), [*self.live, ("manifest.json", now), ("schema.cql", EPOCH)])
            del self.live[:-4]  # compaction

    def publish(self, unit: Unit, files: Iterable[tuple[str, float]]) -> None:
        entries = [self.stored(unit, *file) for file in files]
        while True:
            if self.chance.random() < 0.3:
                self.actor.turn()  # some time goes by
            self.actor.deadline = self.actor.shelf.now + HOUR
            view = cb.view_bucket(self.actor.store, NODE, None)
            asked = {one.key for one, at in self.known.values() if self.actor.shelf.now - at < cb.CONFIRMED_S}
            stored, gone = cb.confirm(self.actor.store, entries, view.doomed, asked)
            again = [self.put(entry, [f"{entry.key.partition('@')[0]}@{self.clock()}"]) for entry in gone]
            listed = cb.Listing(NODE, unit, unit.life, self.clock(), True, (*stored, *again))
            self.actor.store.put(cb.listing_key(listed), cb.Body(cb.dump_listing(listed)))
            late = self.actor.shelf.now - view.read > cb.PUBLISH_LIMIT_S
            self.actor.deadline = math.inf
            for entry in stored:
                self.known[entry.crc32] = (entry, self.actor.shelf.now)
            entries = list(listed.files)
            if not late:
                return

    def stored(self, unit: Unit, name: str, mtime: float) -> Stored:
        """Store a file, unless it is known."""
        entry = entry_of(unit, name, mtime)
        if known := self.known.get(entry.crc32):
            return replace(entry, key=known[0].key, etag=known[0].etag)
        return self.put(entry, [entry.key.partition("@")[0], entry.key, f"{entry.key}.{self.clock()}"])

    def put(self, entry: Any, keys: Sequence[str]) -> Stored:
        for key in keys:
            with contextlib.suppress(cb.Conflict):
                self.actor.store.put(key, cb.Body(body_of(entry.name, entry.fingerprint.mtime_ns / 1e9)))
                break
        stored = cb.as_stored(replace(entry, key=key))
        self.known[entry.crc32] = (stored, self.actor.shelf.now)
        return stored


def prune_with(options: PruneOptions) -> Callable[[Actor], None]:
    """Return what a prune does."""

    def work(actor: Actor) -> None:
        pruning = cb.Pruning(cb.Bucket(actor.store, 1), NODE, options)
        pruning.plan()
        pruning.confirm()

    return work


def pass_time(chance: random.Random, shelf: Shelf, actors: Sequence[Actor]) -> None:
    """Let seconds or a day go by; nobody publishes for longer than an hour, or stands still in a prune for a day."""
    shelf.now += chance.choice([0, 0, 1, 20])
    if chance.random() < 0.05:
        jump = chance.choice([600.0, HOUR, 6 * HOUR, DAY - 60, DAY, DAY + 60, 31 * DAY])
        for actor in actors:
            while shelf.now + jump > actor.deadline - 60:
                actor.step()
        shelf.now += jump
    for actor in actors:
        while shelf.now > actor.deadline - 60:
            actor.step()


def play(seed: int, moves: int = 500) -> int:
    """Play one random history and return how many objects were deleted in it."""
    chance, shelf = random.Random(seed), Shelf()
    daemon = Daemon(chance)
    actors, awake = [Actor(shelf, daemon.live_on)], 0.5
    try:
        for _ in range(moves):
            pass_time(chance, shelf, actors)
            if len(actors) < 3 and chance.random() < 0.2:
                within = chance.choice([0, 0, HOUR])
                terms = {"keep_last": chance.randrange(2), "keep_within": within, "keep_daily": chance.randrange(2)}
                actors.append(Actor(shelf, prune_with(PruneOptions(**terms, force=True))))
            if chance.random() < 0.1:
                awake = chance.choice([0.02, 0.5])  # now and then the daemon hardly moves, while prunes come and go
            actor = actors[0] if chance.random() < awake else chance.choice(actors[1:] or actors)
            died = chance.random() < 0.01 or (actor is not actors[0] and shelf.now - actor.moved > DAY / 2)
            for _ in range(1 if died else chance.choice([1, 3, 30])):
                if not actor.ended:
                    actor.step(died)
            first = Actor(shelf, daemon.live_on) if actors[0].ended else actors[0]
            actors = [first, *(actor for actor in actors[1:] if not actor.ended)]
    finally:
        for actor in actors:
            if not actor.ended:
                actor.step(kill=True)
    return shelf.deleted


@pytest.mark.parametrize("seed", range(6))
def test_no_listing_that_is_there_ever_loses_an_object_whatever_dies_between_a_daemon_and_prunes(seed: int) -> None:
    """P1, P3 and P7: each step is a crash point, days go by, and two prunes may run at once.

    Nobody stands still for half a day between two steps of a prune.
    """
    assert play(seed) > 0


# ------------------------------------------------------------------------------------------------------------
# The command


def run(shelf: Shelf, node: str = NODE, **options: Any) -> cb.Answer:
    """Prune a shelf."""
    bucket: Any = cb.Bucket(Door(shelf), 2)  # type: ignore[arg-type]
    return cb.prune(bucket, PruneOptions(node=node, **options))


def filled(*tags: str) -> Shelf:
    """Return a shelf with a snapshot a day: each has an SSTable of its own, and one that all have."""
    shelf = Shelf()
    for day, tag in enumerate(tags):
        at = EPOCH + day * DAY
        files = [("nb-1-big-Data.db", EPOCH), (f"nb-{day + 2}-big-Data.db", at), ("schema.cql", at)]
        shelf.add(batch(at, f"nb-{day + 2}-big-Data.db"), snapshot(tag, at + HOUR, files))
    shelf.now = EPOCH + len(tags) * DAY
    return shelf


def documents(shelf: Shelf, folder: str) -> list[dict[str, Any]]:
    return [json.loads(shelf.objects[key][0]) for key in sorted(shelf.keys(f"{NODE}.{folder}/"))]


def test_nothing_is_deleted_without_confirm_and_the_last_line_says_so() -> None:
    shelf = filled("monday", "tuesday", "friday")
    before = dict(shelf.objects)
    for flags in ({}, {"dry_run": True}, {"dry_run": True, "confirm": True}):
        answer = run(shelf, keep_last=2, **flags)
        how = "leave out --dry-run" if "confirm" in flags else "pass --confirm"
        assert answer.text.splitlines()[-1] == f"nothing was deleted; {how} to do it"
        assert [one["tag"] for one in answer.document["nodes"][0]["snapshots"] if not one["stays"]] == ["monday"]
        assert (answer.code, answer.document["confirmed"]) == (cb.DONE, False)
    assert shelf.objects == before


def test_each_snapshot_is_told_with_a_reason_and_those_of_a_day_on_one_line() -> None:
    shelf = filled("daily", "daily", "daily")
    for day in range(3):
        shelf.add(snapshot("daily", EPOCH + day * DAY + HOUR, [("nb-7-big-Data.db", EPOCH)], table=OTHER))
    answer = run(shelf, keep_last=2)
    lines = [line.split() for line in answer.text.splitlines()[2:-1]]
    assert [" ".join(line) for line in lines] == [
        "20260101 daily 2 goes: no --keep option keeps it",
        "20260102 daily 2 stays: --keep-last",
        "20260103 daily 2 stays: it is the newest good snapshot of the table",
    ]
    told = answer.document["nodes"][0]["snapshots"][0]
    assert told.keys() == {"table", "tag", "life", "taken", "stays", "why"}


def test_objects_are_marked_by_one_run_and_deleted_by_another_a_day_later_p7() -> None:
    shelf = filled("monday", "tuesday", "friday")
    before = shelf.keys()
    page = run(shelf, keep_last=2, confirm=True).document["nodes"][0]
    assert (page["deleted"], page["refused"], shelf.tags()) == (0, {}, ["friday", "tuesday"])
    assert shelf.keys() == before
    (marks,) = documents(shelf, "pending-delete")
    assert (marks["version"], marks["deleted"], len(marks["keys"])) == (2, False, page["objects"])
    shelf.now += DAY - 60
    run(shelf, keep_last=2, confirm=True)
    assert shelf.keys() == before
    assert len(documents(shelf, "pending-delete")) == 1  # nothing is marked twice
    shelf.now += 120
    page = run(shelf, keep_last=2, confirm=True).document["nodes"][0]
    kept = set().union(*shelf.named.values())
    assert shelf.keys() == kept == before - set(marks["keys"])
    assert page["deleted"] == len(marks["keys"]) > 0
    (still,) = documents(shelf, "pending-delete")
    assert (still["deleted"], sorted(still["keys"])) == (True, sorted(marks["keys"]))
    shelf.now += DAY + 60
    run(shelf, keep_last=2, confirm=True)
    assert documents(shelf, "pending-delete") == []


def test_a_listing_that_came_after_the_plan_keeps_what_was_marked_long_ago_p7() -> None:
    shelf = filled("monday", "tuesday", "friday")
    run(shelf, keep_last=1, force=True, confirm=True)
    shelf.now += DAY + HOUR
    pruning = cb.Pruning(cb.Bucket(Door(shelf), 1), NODE, PruneOptions(keep_last=1))  # type: ignore[arg-type]
    pruning.plan()
    marked = {key for one in documents(shelf, "pending-delete") for key in one["keys"]}
    again = batch(shelf.now, "nb-2-big-Data.db", mtime=EPOCH)
    assert {entry.key for entry in again.files} <= marked
    shelf.add(again)
    pruning.confirm()
    assert marked & shelf.keys() == {entry.key for entry in again.files}


def test_what_a_daemon_listed_while_it_was_marked_stays_and_is_marked_no_longer_p7() -> None:
    """The daemon had read the marks just before they were written."""
    shelf = filled("monday", "tuesday", "friday")
    own = snapshot("monday", EPOCH + HOUR).files[0]
    run(shelf, keep_last=2, confirm=True)
    assert own.key in documents(shelf, "pending-delete")[0]["keys"]
    shelf.now += HOUR
    again = batch(shelf.now - HOUR / 2, "nb-9-big-Data.db")
    shelf.add(replace(again, files=(replace(own, directory=again.files[0].directory, name="nb-9-big-Data.db"),)))
    shelf.now += 2 * DAY
    page = run(shelf, keep_last=2, confirm=True).document["nodes"][0]
    assert own.key in shelf.objects
    assert page["deleted"] > 0
    assert [own.key in one["keys"] for one in documents(shelf, "pending-delete")] == [False]


def test_a_prune_that_stood_still_while_another_one_went_on_deletes_nothing_p7() -> None:
    """The other has deleted the objects, and a daemon may have stored others under their keys since."""
    shelf = filled("monday", "tuesday", "friday")
    run(shelf, keep_last=1, force=True, confirm=True)
    shelf.now += DAY + HOUR
    pruning = cb.Pruning(cb.Bucket(Door(shelf), 1), NODE, PruneOptions(keep_last=1))  # type: ignore[arg-type]
    pruning.plan()
    for _ in range(2):
        run(shelf, keep_last=1, confirm=True)
        shelf.now += DAY + HOUR
    body = snapshot("monday", EPOCH, [("nb-2-big-Data.db", EPOCH)]).files[0]
    shelf.put(body.key, b"stored again, and not listed yet")
    pruning.confirm()
    assert body.key in shelf.objects


def test_new_listings_are_looked_for_once_a_minute_not_before_each_thousand_objects() -> None:
    shelf = filled("monday")
    for number in range(40):
        shelf.put(f"{NODE}/d/{number}", b"")
    marks = cb.dump_document(keys=[f"{NODE}/d/{number}" for number in range(40)], deleted=False)
    shelf.put(f"{NODE}.pending-delete/{utc(shelf.now)}.json", marks)
    shelf.now += 2 * DAY
    door: Any = Door(shelf)
    pruning = cb.Pruning(cb.Bucket(door, 1), NODE, PruneOptions(keep_last=1))
    pruning.plan()
    door.asked.clear()
    cb._BATCH_KEYS, before = 4, cb._BATCH_KEYS  # type: ignore[misc]
    try:
        pruning.confirm()
    finally:
        cb._BATCH_KEYS = before  # type: ignore[misc]
    assert sum(line.startswith("delete node1/") for line in door.asked) == 40
    assert sum(line.startswith("head node1.pending-delete/2") for line in door.asked) == 10
    assert sum(line == f"list {NODE}.listings/" for line in door.asked) == 1


def test_what_no_listing_ever_named_goes_a_month_after_it_was_stored_by_the_same_marking() -> None:
    shelf = filled("monday", "tuesday")
    shelf.put(f"{NODE}/d/never-listed", b"of a daemon that died")
    shelf.put("node10/d/never-listed", b"of another node")
    for days_later, marked, left in ((0, 0, True), (29, 0, True), (3, 1, True), (2, 1, False)):
        shelf.now += days_later * DAY
        run(shelf, keep_last=2, confirm=True)
        assert (len(documents(shelf, "pending-delete")), f"{NODE}/d/never-listed" in shelf.objects) == (marked, left)
    assert "node10/d/never-listed" in shelf.objects


def damages(body: bytes) -> dict[str, bytes]:
    """Return a listing as it may come back from a bucket that was damaged."""
    page = json.loads(body)
    return {
        "empty": b"",
        "half": body[: len(body) // 2],
        "no JSON": b"\xff" + body,
        "a list": b"[]",
        "deep": b"[" * 100_000,
        "version": json.dumps({**page, "version": 3}).encode(),
        "node": json.dumps({**page, "node": "node2"}).encode(),
        "moved": json.dumps({**page, "tag": "saturday"}).encode(),
        "another node's keys": body.replace(b'"key":"node1/', b'"key":"node10/'),
    }


def test_any_document_that_cannot_be_read_ends_the_run_with_nothing_deleted_p7() -> None:
    shelf = filled("monday", "tuesday", "friday")
    key = next(key for key in shelf.named if "friday" in key)
    whole = shelf.objects[key]
    wrong = [(key, body) for body in damages(whole[0]).values()]
    for name, body in (
        ("listings/ks/unknown", b"?"),
        ("listings/tags/t/x.json", b"{"),
        ("listings/tags/t/x.json", b'{"version": 2, "tag": "t", "taken": "x", "listings": [{}]}'),
        ("listings/tags/t/x.json", b'{"version": 2, "tag": "t", "taken": "x", "listings": ["node1.listings/notes"]}'),
        ("listings/tags/t/x.json", b'{"version": 2, "tag": "t", "taken": "x", "listings": [], "pruned": [[]]}'),
        ("listings/bad/x.json", b"[]"),
        ("pending-delete/x.json", b'{"version": 2, "keys": ["node10/var"]}'),
        ("pending-delete/x.json", b'{"version": 2, "keys": 3}'),
    ):
        wrong.append((f"{NODE}.{name}", body))
    for place, body in wrong:
        shelf.objects[place] = (body, shelf.now)
        before = dict(shelf.objects)
        with pytest.raises(cb.Corrupt):
            run(shelf, keep_last=1, force=True, confirm=True)
        assert shelf.objects == before
        del shelf.objects[place]
        shelf.objects[key] = whole
    run(shelf, keep_last=1, force=True, confirm=True)
    assert shelf.tags() == ["friday"]


def test_a_doubt_about_one_node_keeps_everything_of_all() -> None:
    shelf = filled("monday", "tuesday", "friday")
    shelf.add(snapshot("other", EPOCH, node="node2"))
    shelf.objects["node2.listings/ks/unknown"] = (b"?", shelf.now)
    before = dict(shelf.objects)
    with pytest.raises(cb.Corrupt):
        run(shelf, "", all_nodes=True, keep_last=2, confirm=True)
    assert shelf.objects == before


def test_all_nodes_are_planned_once_each() -> None:
    shelf = filled("monday", "tuesday", "friday")
    shelf.add(snapshot("other", EPOCH, node="node2"))
    door: Any = Door(shelf)
    answer = cb.prune(cb.Bucket(door, 2), PruneOptions(all_nodes=True, keep_last=2, confirm=True))
    assert [node["node"] for node in answer.document["nodes"]] == ["node1", "node2"]
    reads = [line for line in door.asked if line.startswith("get ") and cb.parse_listing_name(line)]
    assert len(reads) == len(set(reads)) == 7
    assert shelf.tags() == ["friday", "other", "tuesday"]


def test_more_than_half_of_a_tables_or_a_nodes_snapshots_needs_force_p7() -> None:
    for tags, keep, doubted in ((4, 2, False), (4, 1, True), (3, 2, False), (3, 1, True), (2, 1, False)):
        shelf = filled(*(f"d{number}" for number in range(tags)))
        before = dict(shelf.objects)
        answer = run(shelf, keep_last=keep, confirm=True)
        assert (answer.code, shelf.objects == before) == ((cb.FAILED, True) if doubted else (cb.DONE, False)), (
            tags,
            keep,
        )
        if doubted:
            assert answer.text.splitlines()[-1] == "nothing was deleted; if that is meant, pass --force"
            assert f"{tags - keep} of {tags} complete snapshots of ks/{TABLE} of node1 would go" in answer.text
            assert run(shelf, keep_last=keep, confirm=True, force=True).code == cb.DONE
        assert len(shelf.tags()) == keep


def test_more_than_half_of_a_nodes_objects_needs_force_p7() -> None:
    shelf = Shelf()
    names = [(f"nb-{number}-big-Data.db", EPOCH) for number in range(30)]
    shelf.add(snapshot("large", EPOCH, names), snapshot("small", EPOCH + DAY, names[:2]))
    shelf.now = EPOCH + 2 * DAY
    answer = run(shelf, keep_last=1, confirm=True)
    assert answer.code == cb.FAILED
    assert "29 of 32 objects of node1 would go" in answer.text
    assert shelf.tags() == ["large", "small"]


def record(shelf: Shelf, tag: str, at: float, listings: Sequence[str], **more: Any) -> str:
    key = f"{NODE}.listings/tags/{tag}/{utc(at)}.json"
    taken = {"node": NODE, "tag": tag, "taken": utc(EPOCH), "schema": "CREATE", "ring": "UN"}
    shelf.put(key, cb.dump_document(**taken, listings=list(listings), **more))
    return key


def test_a_tag_goes_alone_and_its_record_with_the_last_listing_that_it_names() -> None:
    shelf = filled("monday", "tuesday", "friday")
    at = EPOCH + HOUR
    shelf.add(snapshot("monday", at, table=OTHER), snapshot("later", EPOCH + DAY, table=OTHER))
    monday = sorted(key for key in shelf.named if "/monday/" in key)
    friday = [key for key in shelf.named if "/friday/" in key]
    record(shelf, "monday", at, monday)
    kept = record(shelf, "friday", at, friday)
    shelf.put(f"{NODE}/d/never-listed", b"")
    shelf.now += 31 * DAY
    assert run(shelf, tag="monday", confirm=True).code == cb.DONE
    assert f"{NODE}/d/never-listed" not in documents(shelf, "pending-delete")[0]["keys"]
    assert shelf.tags() == ["friday", "later", "tuesday"]
    assert shelf.keys(f"{NODE}.listings/tags/") == {kept}
    assert all("/backups/" not in key or key in shelf.named for key in shelf.keys(f"{NODE}.listings/"))


def test_a_record_of_which_some_listings_go_is_written_anew_before_they_go() -> None:
    shelf = filled("monday", "tuesday", "friday")
    shelf.add(snapshot("monday", EPOCH + HOUR, table=OTHER))  # the last good one of that table
    going, staying = (
        next(key for key in shelf.named if f"{table}/snapshots/monday" in key) for table in (TABLE, OTHER)
    )
    old = record(shelf, "monday", EPOCH + HOUR, [going, staying], pruned=["earlier"])
    shelf.held[going] = "locked"
    assert run(shelf, keep_last=2, confirm=True).code == cb.FAILED
    (document,) = documents(shelf, "listings/tags/monday")
    assert (document["listings"], document["pruned"]) == ([staying], ["earlier", going])
    assert (document["schema"], document["ring"], document["tag"]) == ("CREATE", "UN", "monday")
    assert old not in shelf.objects
    # Where a run died between the two, the newer record counts; and one that names only what is gone goes.
    shelf.put(old, cb.dump_document(tag="monday", taken=document["taken"], listings=[going, staying]))
    (key,) = cb.tag_records(Door(shelf), NODE)  # type: ignore[arg-type]
    assert key != old
    over = record(shelf, "over", EPOCH + HOUR, [going.replace("/monday/", "/over/")])
    shelf.held.clear()
    run(shelf, keep_last=2, confirm=True)
    assert over not in shelf.objects


def meanwhile(fill: Callable[[], Shelf], **terms: Any) -> Iterator[tuple[Shelf, Callable[[], None]]]:
    """Yield a shelf anew, with what is to be called before each operation: a prune runs, each time one step later."""
    for step in itertools.count(1):
        shelf, steps = fill(), itertools.count(1)

        def turn(shelf: Shelf = shelf, steps: Iterator[int] = steps, step: int = step) -> None:
            if next(steps) == step:
                run(shelf, **terms, confirm=True, force=True)

        yield shelf, turn
        if next(steps) <= step:
            assert step > 8
            return


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_restore_never_lacks_in_silence_what_a_prune_lets_go_meanwhile_p7(is_cut: bool) -> None:
    """Nor, where an earlier one has cut the table, while what tells of that is replaced."""
    earlier, terms = EPOCH - DAY, {"keep_daily": 2, "keep_weekly": 9}

    def fill() -> Shelf:
        shelf = Shelf()
        shelf.add(snapshot("weekly", EPOCH), *(snapshot(f"d{day}", EPOCH + day * DAY) for day in (20, 21, 22)))
        shelf.add(*(batch(EPOCH + day * DAY + HOUR, f"nb-{day}-big-Data.db") for day in (5, 20)))
        shelf.now = EPOCH + 23 * DAY
        if is_cut:
            run(shelf, **terms, confirm=True)
            shelf.add(*(snapshot(f"d{day}", EPOCH + day * DAY) for day in (23, 24)))
            shelf.now = EPOCH + 24.5 * DAY
        else:
            other = {f"{KEYSPACE}/x": earlier}
            shelf.put(f"{NODE}.listings/pruned/{utc(earlier)}.json", cb.dump_document(tables=other))
        return shelf

    for shelf, turn in meanwhile(fill, **terms):
        with contextlib.suppress(cb.Missing):
            (found,), lacking = restored(shelf, EPOCH + 10 * DAY, turn)
            assert lacking or (found[1] == 1 and not is_cut)


def filled_of_two() -> Shelf:
    """Return a shelf with a record of monday: one of its two tables has nothing else."""
    shelf = filled("monday", "tuesday", "friday", "saturday")
    shelf.add(snapshot("monday", EPOCH + HOUR, table=OTHER))
    record(shelf, "monday", EPOCH + HOUR, sorted(key for key in shelf.named if "/monday/" in key))
    return shelf


def test_a_tag_never_lacks_a_table_in_silence_while_prune_writes_its_record_anew_p7() -> None:
    for shelf, turn in meanwhile(filled_of_two, keep_last=2):
        bucket = cb.Bucket(cb.Patient(Door(shelf, turn), 1.0), 1)
        with contextlib.suppress(cb.Missing):
            options = cb.RestoreOptions(node=NODE, tag="monday", into="/nowhere", dry_run=True)
            page = cb.restore(bucket, options).document
            assert page["lacking"] or len(page["tables"]) == 2


def test_verify_does_not_miss_what_a_prune_lets_go_meanwhile() -> None:
    for shelf, turn in meanwhile(filled_of_two, keep_last=2):
        bucket = cb.Bucket(cb.Patient(Door(shelf, turn), 1.0), 1)
        answer = cb.verify(bucket, cb.VerifyOptions(node=NODE))
        assert answer.code == cb.DONE, answer.text


def test_of_two_prunes_at_once_neither_forgets_what_the_other_has_let_go_of_backups_p7() -> None:
    shelf = filled("monday", "tuesday", "friday", "saturday")
    first, second = (
        cb.Pruning(cb.Bucket(Door(shelf), 1), NODE, PruneOptions(keep_last=keep))  # type: ignore[arg-type]
        for keep in (1, 2)
    )
    first.plan()
    second.plan()
    first.confirm()
    second.confirm()
    oldest = cb.moment_text(utc(EPOCH + 3 * DAY + HOUR))  # of those that the first of them keeps
    assert f"what was flushed until {oldest}" in str(restored(shelf, shelf.now - 3 * DAY)[1])
    shelf.add(snapshot("sunday", shelf.now))
    run(shelf, keep_last=1, confirm=True, force=True)
    (document,) = documents(shelf, "listings/pruned")
    assert document["tables"] == {f"{KEYSPACE}/{TABLE}": EPOCH + 4 * DAY}


def test_of_two_prunes_at_once_with_other_terms_a_record_tells_what_either_let_go_p7() -> None:
    shelf, third = filled_of_two(), "third-" + "7c" * 16
    shelf.add(*(snapshot(tag, EPOCH + hour * HOUR, table=third) for hour, tag in enumerate(["monday", "x", "y"], 1)))
    monday = sorted(key for key in shelf.named if "/monday/" in key)
    record(shelf, "monday", EPOCH + DAY, monday)
    one, two = (
        cb.Pruning(cb.Bucket(Door(shelf), 1), NODE, options)  # type: ignore[arg-type]
        for options in (PruneOptions(tag="monday"), PruneOptions(keep_last=3))
    )
    one.plan()
    two.plan()
    one.confirm()
    two.confirm()
    (left,) = [key for key in monday if key in shelf.named]
    assert OTHER in left
    bucket = cb.Bucket(cb.Patient(Door(shelf), 1.0), 1)
    assert cb.verify(bucket, cb.VerifyOptions(node=NODE)).code == cb.DONE
    run(shelf, keep_last=9, confirm=True)
    assert cb.verify(bucket, cb.VerifyOptions(node=NODE)).code == cb.DONE
    (document,) = documents(shelf, "listings/tags/monday")
    assert (document["listings"], sorted(document["pruned"])) == ([left], [key for key in monday if key != left])


def latest_lacks(shelf: Shelf) -> list[str]:
    """Return which listings a restore of everything misses."""
    return [what.split()[0] for what in restored(shelf, shelf.now)[1] if "is gone" in what]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("terms", [{"keep_last": 7}, {"keep_last": 2}, {"tag": "friday"}, {"tag": "saturday"}])
def test_a_listing_that_somebody_else_deleted_is_missed_after_prune_as_before_p7(
    terms: dict[str, Any], alone: bool
) -> None:
    shelf = filled("monday", "tuesday", "friday", "saturday")
    shelf.add(snapshot("friday", EPOCH + 2 * DAY + HOUR, table=OTHER))
    friday = sorted(key for key in shelf.named if "/friday/" in key)
    lost = next(key for key in friday if OTHER in key)
    named = {"tag": "friday", "taken": utc(EPOCH + 2 * DAY + HOUR), "listings": [lost] if alone else friday}
    shelf.put(f"{NODE}.listings/tags/friday/{utc(shelf.now)}.json", cb.dump_document(**named))
    shelf.objects.pop(lost)
    shelf.named.pop(lost)
    for _ in range(3):
        assert latest_lacks(shelf) == [lost]
        with contextlib.suppress(cb.Missing):
            run(shelf, **terms, confirm=True)
        shelf.now += HOUR
    shelf.add(snapshot("sunday", shelf.now, table=OTHER))
    shelf.add(snapshot("sunday", shelf.now))
    assert latest_lacks(shelf) == []


def test_a_record_that_goes_goes_before_the_listings_that_it_names() -> None:
    """Else who reads it in between would take them for somebody else's deletions."""
    shelf = filled("monday", "tuesday", "friday")
    gone = record(shelf, "monday", EPOCH + HOUR, [key for key in shelf.named if "/monday/" in key])
    door: Any = Door(shelf)
    cb.prune(cb.Bucket(door, 1), PruneOptions(node=NODE, keep_last=2, confirm=True))
    deleted = [line.removeprefix("delete ") for line in door.asked if line.startswith("delete ")]
    assert (deleted[0], any("/monday/2" in key and "complete" in key for key in deleted)) == (gone, True)


def test_a_tag_that_is_not_there_is_told_and_the_last_good_one_needs_force() -> None:
    shelf = filled("monday", "tuesday")
    with pytest.raises(cb.Missing, match="no snapshot is called 'mondya': there are monday, tuesday"):
        run(shelf, tag="mondya", confirm=True)
    answer = run(shelf, tag="tuesday", confirm=True)
    assert (answer.code, "only --force lets it go" in answer.text) == (cb.FAILED, True)
    assert shelf.tags() == ["monday", "tuesday"]
    shelf.forced = True
    run(shelf, tag="tuesday", confirm=True, force=True)
    assert shelf.tags() == ["monday"]


def test_a_time_means_all_tables_of_that_snapshot() -> None:
    shelf = filled("monday", "tuesday")
    files = [("nb-1-big-Data.db", EPOCH), ("schema.cql", EPOCH)]
    for day, tag in enumerate(("monday", "tuesday")):
        shelf.add(snapshot(tag, EPOCH + day * DAY + HOUR + 1, files, table="orders-" + "b" * 32))
    answer = run(shelf, tag=f"monday@{utc(EPOCH + HOUR)[:15]}")
    (node,) = answer.document["nodes"]
    assert [(one["tag"], one["stays"]) for one in node["snapshots"]] == [("monday", False), ("monday", False)]


def test_documents_that_tell_of_nothing_any_more_go_and_the_newest_stays() -> None:
    shelf = filled("monday", "tuesday", "friday")
    archive = replace(batch(EPOCH, "CommitLog-7-1.log"), unit=Unit("archive", tag="/d/archive"))
    shelf.add(archive)
    named = archive.files[0].key
    shelf.now = EPOCH + DAY / 2
    shelf.put(f"{NODE}.listings/heartbeat/{utc(shelf.now)}.json", b"{}")  # older than the oldest that stays
    shelf.put(f"{NODE}.listings/bad/1.json", cb.dump_document(keys=[{"key": "node1/x", "found": "absent", "at": ""}]))
    shelf.put(f"{NODE}.listings/bad/2.json", cb.dump_document(keys=[{"key": named, "found": "size", "at": ""}]))
    shelf.put(f"{NODE}.listings/bad/3.json", cb.dump_document(keys=[]))
    shelf.now = EPOCH + 3 * DAY
    for number in range(3):
        shelf.put(f"{NODE}.listings/node.{utc(EPOCH + number)}.json", cb.dump_document(cluster="c"))
        shelf.put(f"{NODE}.listings/heartbeat/{utc(shelf.now + number)}.json", b"{}")
    shelf.put(f"{NODE}.listings/owner.json", cb.dump_document(id="x"))
    run(shelf, keep_last=2, confirm=True)
    left = [key.partition(".listings/")[2] for key in shelf.keys(f"{NODE}.listings/") if key not in shelf.named]
    assert sorted(left) == [
        "bad/2.json",
        "bad/3.json",
        *(f"heartbeat/{utc(shelf.now + number)}.json" for number in range(3)),
        f"node.{utc(EPOCH + 2)}.json",
        "owner.json",
    ]


def test_archives_go_by_age_alone_and_only_if_an_age_is_given() -> None:
    shelf = filled("monday", "tuesday", "friday")
    log = batch(EPOCH, "CommitLog-7-1.log")
    (key,) = shelf.add(replace(log, unit=Unit("archive", tag="/d/archive")))
    shelf.now = EPOCH + 90 * DAY
    for terms, stays in (
        ({"keep_last": 3, "keep_daily": 9}, True),
        ({"keep_within": 91 * DAY}, True),
        ({"keep_within": DAY}, False),
    ):
        run(shelf, **terms, confirm=True, force=True)
        assert (key in shelf.objects) == stays


def test_a_node_is_retired_when_it_was_silent_for_thirty_days_and_no_other_is_touched() -> None:
    shelf = filled("monday", "tuesday")
    shelf.put(f"{NODE}.listings/owner.json", cb.dump_document(id="x"))
    pruned = cb.dump_document(tables={f"{KEYSPACE}/{TABLE}": EPOCH})
    shelf.put(f"{NODE}.listings/pruned/{utc(EPOCH)}.json", pruned)
    for key, (body, _) in list(shelf.objects.items()):
        for other in ("node10", "node1.example"):
            shelf.objects[other + key.removeprefix(NODE)] = (body, shelf.now)
    others = {key for key in shelf.objects if not key.startswith((f"{NODE}/", f"{NODE}.listings/"))}
    before = set(shelf.objects)
    shelf.now += 29 * DAY
    with pytest.raises(cb.Usage, match="30 days"):
        run(shelf, "", retire=NODE, confirm=True)
    shelf.now += 2 * DAY
    for folder in ("pruned", "tags/daily", "bad"):  # by a prune of all nodes, and a verify
        shelf.put(f"{NODE}.listings/{folder}/{utc(shelf.now)}.json", pruned)
    before = set(shelf.objects)
    with pytest.raises(cb.Missing, match=r"full name is needed here; there are node1.example, node1, node10"):
        run(shelf, "", retire="node", confirm=True)
    for wrong in ("node1/", "node1/var"):
        with pytest.raises(cb.Usage):
            run(shelf, "", retire=wrong, confirm=True)
    assert set(shelf.objects) == before
    shelf.forced = True
    for left in (True, False, False):
        assert run(shelf, "", retire=NODE, confirm=True).code == cb.DONE
        assert bool(shelf.keys()) == left
        shelf.now += DAY + HOUR
    assert set(shelf.objects) == others


@pytest.mark.parametrize("terms", [{}, {"force": True}, {"keep_last": 0}])
def test_what_to_keep_must_be_said(terms: dict[str, Any]) -> None:
    with pytest.raises(cb.Usage, match="at least 1"):
        run(Shelf(), **terms)


@pytest.mark.parametrize("terms", [{"keep_last": 1, "tag": "t"}, {"tag": "t", "retire": "n"}])
def test_two_kinds_of_prune_at_once_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(cb.Usage, match="you passed two"):
        run(Shelf(), **terms)


def test_what_the_store_would_not_delete_is_told_with_why_and_keeps_its_objects_p7() -> None:
    shelf = filled("monday", "tuesday", "friday")
    run(shelf, keep_last=2, confirm=True)
    shelf.now += DAY + HOUR
    tuesday = next(key for key in shelf.named if "tuesday" in key)
    shelf.held[tuesday] = "retained until 2026-12-24T01:02:03Z"
    before = shelf.keys()
    answer = run(shelf, keep_last=1, force=True, confirm=True)
    assert answer.code == cb.FAILED
    assert f"the store would not delete {tuesday}: retained until 2026-12-24T01:02:03Z" in answer.text
    assert shelf.keys() == before
    due = documents(shelf, "pending-delete")[0]["keys"][0]
    shelf.held = {due: "locked"}
    answer = run(shelf, keep_last=1, force=True, confirm=True)
    assert answer.document["nodes"][0]["refused"] == shelf.held
    assert [one["deleted"] for one in documents(shelf, "pending-delete")] == [False, False]  # it is tried again
    shelf.held.clear()
    assert run(shelf, keep_last=1, force=True, confirm=True).code == cb.DONE
    assert due not in shelf.objects


def test_a_mark_that_the_store_would_not_delete_holds_up_no_other_deletion() -> None:
    """Where a retention policy keeps what is young, some document of ours is refused each day."""
    shelf = filled("monday", "tuesday", "friday")
    run(shelf, keep_last=2, confirm=True)
    shelf.now += HOUR
    run(shelf, keep_last=1, force=True, confirm=True)
    marks = sorted(shelf.keys(f"{NODE}.pending-delete/"))
    due = {key for one in documents(shelf, "pending-delete") for key in one["keys"]}
    assert len(marks) == 2
    assert due <= shelf.keys()
    shelf.now += DAY + HOUR
    shelf.held[marks[0]] = "it is younger than the retention policy of the bucket"
    page = run(shelf, keep_last=1, force=True, confirm=True).document["nodes"][0]
    assert page["refused"] == shelf.held
    assert page["deleted"] == len(due)
    assert not due & shelf.keys()
    written = len(shelf.keys(f"{NODE}.pending-delete/"))
    shelf.now += DAY + HOUR  # what is refused is met again each day, and nothing comes of it
    assert run(shelf, keep_last=1, force=True, confirm=True).document["nodes"][0]["deleted"] == 0
    assert len(shelf.keys(f"{NODE}.pending-delete/")) <= written


def test_where_something_is_marked_bad_listings_are_read_side_by_side_all_the_same() -> None:
    shelf = Shelf()
    shelf.add(*(snapshot(f"t{day}", EPOCH + day * DAY, [("nb-1-big-Data.db", EPOCH)]) for day in range(4)))
    shelf.now = EPOCH + 9 * DAY
    mark = {"key": f"{NODE}/d/none", "found": "absent", "at": utc(shelf.now)}
    shelf.put(f"{NODE}.listings/bad/{utc(shelf.now)}.json", cb.dump_document(keys=[mark]))
    door, readers = Door(shelf), set[int]()
    note = door._note

    def slowly(operation: str, what: str) -> None:
        if operation == "get" and "/snapshots/" in what:
            readers.add(threading.get_ident())
            time.sleep(0.05)
        note(operation, what)

    door._note = slowly  # type: ignore[method-assign]
    bucket = cb.Bucket(cb.Patient(door, 1.0), 4)  # type: ignore[arg-type]
    cb.Pruning(bucket, NODE, PruneOptions(keep_last=9)).plan()
    assert threading.get_ident() not in readers


def test_memory_does_not_grow_with_what_stays() -> None:
    script = """
import resource, cassbackup
keys = cassbackup.KeySets()
begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for what in ("stays", "goes"):
    keys.add(what, ((f"node1/var/lib/cassandra/data/ks/users-5a1c/backups/nb-{n}", n) for n in range(60_000)))
keys.subtract("goes", "stays")
assert (keys.count("goes"), keys.size("goes"), keys.count("stays")) == (0, 0, 60_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 6 * 1024  # KiB; the keys have 13 MB


@pytest.mark.parametrize("name", ["with\na line feed", "of-a-\udcff-byte"])
def test_a_strange_name_that_somebody_put_there_is_one_key_p7(tmp_bucket: FileBucket, name: str) -> None:
    """It is no file of ours, but it lies below the node, and nothing names it."""
    shelf = filled("monday", "tuesday")
    for key, (body, _) in shelf.objects.items():
        tmp_bucket.put(key, body)
    tmp_bucket.put(f"{NODE}/{name}", b"x")
    os.utime(tmp_bucket.root / NODE / name, (EPOCH, EPOCH))
    bucket = cb.Bucket(cb.Patient(cb.open_store(tmp_bucket.target, cb.StoreOptions()), 1.0), 2)
    for _ in range(2):
        assert cb.prune(bucket, PruneOptions(node=NODE, keep_last=2, confirm=True)).code == cb.DONE
    (marks,) = [key for key in tmp_bucket.objects() if ".pending-delete/" in key]
    assert json.loads(tmp_bucket.get(marks))["keys"] == [f"{NODE}/{name}"]


def test_a_full_temporary_directory_ends_the_run_with_nothing_deleted_p7(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = filled("monday", "tuesday", "friday")
    for number in range(200):
        shelf.put(f"{NODE}/d/ks/{number:090}", b"")
    shelf.now += 40 * DAY
    before = dict(shelf.objects)
    plain = cb.KeySets.__init__

    def small(keys: cb.KeySets) -> None:
        plain(keys)
        keys._db.execute("PRAGMA max_page_count = 2")

    monkeypatch.setattr(cb.KeySets, "__init__", small)
    with pytest.raises(cb.Fault, match=r"the temporary file failed .* SQLITE_TMPDIR"):
        run(shelf, keep_last=2, confirm=True)
    assert shelf.objects == before


def test_a_plan_may_be_dropped_in_any_thread() -> None:
    plans = [cb.KeySets()]  # garbage collection runs where it likes
    thread = threading.Thread(target=plans.clear)
    thread.start()
    thread.join()  # what its end would raise is a warning here, and warnings are errors
    assert not plans
