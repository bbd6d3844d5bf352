"""The picture of `cassbackup report`: does it tell what a restore would have brought back, and can it be read?

A past is written into a bucket listing by listing, at moments that are chosen: the name of a listing tells when its
unit was found, the date of the object when it was listed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Daemon, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from scene import Scene
from servers import FileBucket
from test_choose import BEGIN, DAY, FIRST, HOUR, NODE, Story, Written, nb
from tree import Node

from cassbackup import (
    STATES,
    About,
    Chronicle,
    Head,
    Listing,
    Picture,
    Stamp,
    Stored,
    Stretch,
    Unit,
    dump_listing,
    duration_text,
    listing_name,
    listings_of,
    report_page,
    runs_of,
    seconds_of,
    utc,
)

MINUTE = 60.0


class Past:
    """Writes down what a daemon would have, seen from now: moments are seconds ago."""

    def __init__(self, root: Path, name: str = "db7-i-0a1b2c3d") -> None:
        self.root, self.name, self.now = root, name, time.time()
        self.bucket = FileBucket(root)

    def put(self, key: str, body: bytes, ago: float) -> None:
        self.bucket.put(key, body)
        os.utime(self.root / key, (self.now - ago, self.now - ago))

    def list(self, listing: Listing, ago: float) -> None:
        self.put(listings_of(self.name, listing.unit) + listing_name(listing), dump_listing(listing), ago)

    def node(self, **page: Any) -> None:
        self.put(f"{self.name}.listings/node.{utc(self.now)}.json", json.dumps({"version": 1, **page}).encode(), 0)

    def snapshot(
        self,
        keyspace: str,
        table: str,
        ago: float,
        took: float = 120,
        complete: bool = True,
        tag: str = "daily",
        seen: float | None = None,
    ) -> None:
        """List a table's snapshot that ended at a moment, was seen then or later, and was listed a while after."""
        seen = ago if seen is None else seen
        unit = Unit("snapshot", keyspace, table, tag, utc(self.now - seen))
        stamp = Stamp("aa", 1, 7, int((self.now - ago) * 1e9))
        directory = f"/data/{keyspace}/{table}/snapshots/{tag}"
        entry = Stored(directory, "manifest.json", stamp, 0o644, "u", "g", "00000000", f"{self.name}/x", "")
        missing = () if complete else ("nb-1-big-Data.db",)
        self.list(Listing(self.name, unit, utc(self.now - seen + took), complete, (entry,), missing), seen - took)

    def batch(
        self, keyspace: str, table: str, ago: float, took: float = 5, complete: bool = True, waited: float = 0.0
    ) -> None:
        """List a batch of incrementals: found at a moment, a while after its flush, and listed a while after."""
        unit = Unit("incremental", keyspace, table, "", utc(self.now - ago))
        stamp = Stamp("aa", 1, 7, int((self.now - ago - waited) * 1e9))
        name, directory = "nb-1-big-Data.db", f"/data/{keyspace}/{table}/backups"
        entry = Stored(directory, name, stamp, 0o644, "u", "g", "00000000", f"{self.name}/x", "")
        missing = () if complete else ("nb-1-big-TOC.txt",)
        self.list(Listing(self.name, unit, unit.since, complete, (entry,), missing), ago - took)

    def beat(self, ago: float, waiting: Mapping[str, float] | None = None) -> None:
        """Write a heartbeat; `waiting` says since how long ago incrementals of tables wait."""
        found = {table: self.now - since for table, since in (waiting or {}).items()}
        looked = f"{utc(self.now - ago - 30)}"
        stamp = f"{looked[:4]}-{looked[4:6]}-{looked[6:11]}:{looked[11:13]}:{looked[13:]}"
        page = {"version": 1, "listed_through": stamp, "looked": stamp, "oldest_incrementals": found}
        self.put(f"{self.name}.listings/heartbeat/{utc(self.now - ago)}.json", json.dumps(page).encode(), ago)


TABLES = {
    "shop": ("orders", "order_lines", "customers", "carts"),
    "billing": ("invoices", "events"),
    "metrics": ("raw", "rollup_1h"),
    "auth": ("sessions", "users"),
    "system": ("local", "size_estimates"),
}
ALL = [(keyspace, f"{table}-{zlib.crc32(table.encode()):032x}") for keyspace in TABLES for table in TABLES[keyspace]]


def dull(past: Past, days: float = 14, but: Collection[tuple[float, float]] = (), tables: Any = ALL) -> None:
    """A healthy node: a snapshot at night, incrementals every hour, and a heartbeat every quarter; but for outages."""

    def is_out(ago: float) -> bool:
        return any(end <= ago <= begin for begin, end in but)

    for number, (keyspace, table) in enumerate(tables):
        for ago in (day * DAY + 8 * HOUR + number for day in range(math.ceil(days))):
            if ago < days * DAY and not is_out(ago):
                past.snapshot(keyspace, table, ago)
        for ago in (hour * HOUR + 10 * MINUTE + number for hour in range(int(days * 24))):
            if not is_out(ago):
                past.batch(keyspace, table, ago)
        for begin, end in but:
            if end > 0:  # it comes back, and finds what was flushed
                past.batch(keyspace, table, end - 1, waited=(begin - end) / 2)
    for ago in (quarter * 900 + 200 for quarter in range(100)):
        if not is_out(ago):
            past.beat(ago)


def healthy(past: Past) -> None:
    dull(past, 16)


def outage(past: Past) -> None:
    """The daemon was away for thirty hours."""
    dull(past, 16, [(6 * DAY, 6 * DAY - 30 * HOUR)])


LEFT = ALL[6]


def left_behind(past: Past) -> None:
    """One table's incrementals wait for thirteen hours, and its snapshots of two nights are not whole."""
    dull(past, 16, tables=[table for table in ALL if table != LEFT])
    for day in range(16):
        past.snapshot(*LEFT, ago=day * DAY + 8 * HOUR + 6, complete=day > 1)
    for hour in range(13, 16 * 24):
        past.batch(*LEFT, ago=hour * HOUR + 10 * MINUTE)
    past.beat(100, {"/".join(LEFT): 13 * HOUR})


def never(past: Past) -> None:
    """A node that is new, and never finished a snapshot."""
    for number, (keyspace, table) in enumerate(ALL):
        for day in range(5 if number % 2 else 0):
            past.snapshot(keyspace, table, day * DAY + 8 * HOUR + number, complete=False)
        for hour in range(int(4.5 * 24)):
            past.batch(keyspace, table, hour * HOUR + 10 * MINUTE + number)
    past.beat(100)


@pytest.fixture
def past(tmp_path: Path) -> Past:
    return Past(tmp_path / "bucket")


@pytest.fixture
def report(past: Past, run_cassbackup: Run, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*args: object, check: int | None = 0, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
        options = ["--bucket", past.bucket.target, "--state-dir", tmp_path / "none", "--days", 14]
        return run_cassbackup("report", *options, *args, env=env, check=check)

    return run


Report = Callable[..., subprocess.CompletedProcess[str]]


def told(report: Report, *args: object) -> dict[str, dict[str, Any]]:
    """Return what --json says of each table."""
    page = json.loads(report("--json", *args).stdout)
    assert page["schema"] == 1
    return {table["table"].rpartition("-")[0]: table for node in page["nodes"] for table in node["tables"]}


def states(table: Mapping[str, Any]) -> list[str]:
    return [one["state"] for one in table["intervals"]]


# ------------------------------------------------------------------------------------------------------------
# How a table stands


def test_where_incrementals_come_any_moment_can_be_restored_and_the_loss_is_what_the_last_heartbeat_leaves(
    past: Past, report: Report
) -> None:
    healthy(past)
    tables = told(report)
    assert len(tables) == len(ALL)
    assert {tuple(states(table)) for table in tables.values()} == {("whole",)}
    elapsed = time.time() - past.now
    assert all(200 <= table["loss_s"] <= 200 + 31 + elapsed for table in tables.values())


def test_an_outage_is_told_as_not_known_and_the_chain_goes_on_behind_it(past: Past, report: Report) -> None:
    outage(past)
    table = told(report)["shop.orders"]
    assert states(table) == ["whole", "silent", "whole"]
    begin, end = (seconds_of(re.sub("[-:]", "", table["intervals"][1][word])) for word in ("from", "to"))
    assert abs(past.now - begin - 6 * DAY) < HOUR + 120
    assert abs(past.now - end - (6 * DAY - 30 * HOUR)) < 20 * MINUTE


def test_a_daemon_that_is_silent_now_is_told_first(past: Past, report: Report) -> None:
    dull(past, 5, [(5 * HOUR, -1)])
    page = json.loads(report("--json").stdout)["nodes"][0]
    assert "up to 5 h" in page["headline"] or "up to 6 h" in page["headline"]
    assert "to 12 of 12 tables" in page["headline"]
    assert {table["now"] for table in page["tables"]} == {"silent"}


def test_one_table_that_waits_does_not_touch_the_others(past: Past, report: Report) -> None:
    left_behind(past)
    page = json.loads(report("--json").stdout)["nodes"][0]
    assert page["unprotected"] == 1
    assert "to 1 of 12 tables" in page["headline"]
    tables = told(report)
    assert (tables["metrics.raw"]["now"], round(tables["metrics.raw"]["loss_s"] / HOUR)) == ("waiting", 13)
    assert states(tables["shop.orders"]) == ["whole"]


def test_snapshots_alone_are_points_and_one_that_does_not_come_is_missed(past: Past, report: Report) -> None:
    for day in range(2, 6):
        past.snapshot("ks", "daily-" + "1" * 32, day * DAY)
    for day in range(6):
        past.snapshot("ks", "other-" + "2" * 32, day * DAY + 3 * HOUR)
    tables = told(report)
    assert {*states(tables["ks.other"])} == {"absent", "none", "points"}
    assert states(tables["ks.daily"])[-2:] == ["points", "silent"]
    assert round(tables["ks.daily"]["loss_s"] / DAY, 2) == 2
    assert round(tables["ks.other"]["loss_s"] / HOUR, 1) == 3


def test_a_snapshot_that_was_found_late_reaches_to_its_end_and_not_to_when_it_was_found(
    past: Past, report: Report
) -> None:
    past.snapshot("ks", "users-" + "1" * 32, 30 * HOUR, seen=2 * HOUR)
    assert round(told(report)["ks.users"]["loss_s"] / HOUR, 1) == 30


def test_incrementals_that_were_off_for_a_while_break_the_chain_until_the_next_snapshot(
    past: Past, report: Report
) -> None:
    table = ("ks", "users-" + "1" * 32)
    past.snapshot(*table, ago=100 * HOUR)
    for hour in [*range(80, 100), *range(24, 60)]:
        past.batch(*table, ago=hour * HOUR)
    past.snapshot(*table, ago=30 * HOUR)
    assert states(told(report)["ks.users"])[2:] == ["whole", "points", "silent", "whole", "silent"]


@pytest.mark.parametrize("waiting", [[[1, 2]], {"ks1/users": math.nan}, {"ks1": {}}, 7, None, "users"])
def test_a_heartbeat_that_is_none_of_ours_spoils_no_picture(past: Past, report: Report, waiting: Any) -> None:
    dull(past, 2, tables=ALL[:1])
    page = {"looked": "2026-11-21T20:24:38.123456Z", "oldest_incrementals": waiting}
    past.put(f"{past.name}.listings/heartbeat/{utc(past.now)}.json", json.dumps(page).encode(), 0)
    assert told(report)["shop.orders"]["now"] == "whole"


def test_what_a_heartbeat_says_counts_until_a_later_listing(past: Past, report: Report) -> None:
    dull(past, 3)
    past.beat(190, {"/".join(ALL[0]): 3 * HOUR})
    assert told(report)["shop.orders"]["now"] == "waiting"
    past.batch(*ALL[0], ago=180, took=1)
    assert told(report)["shop.orders"]["now"] == "whole"


def test_a_table_that_was_truncated_has_nothing_older_to_lose(past: Past, report: Report) -> None:
    dull(past, 5, tables=ALL[1:])
    past.snapshot(*ALL[0], ago=30 * HOUR, tag=f"truncated-{int((past.now - 30 * HOUR) * 1000)}-orders", complete=False)
    assert states(told(report)["shop.orders"]) == ["absent", "none", "whole"]


def test_a_table_that_was_dropped_is_gone(past: Past, report: Report) -> None:
    dull(past, 5, tables=ALL[1:])
    past.snapshot(*ALL[0], ago=40 * HOUR)
    past.snapshot(*ALL[0], ago=30 * HOUR, tag=f"dropped-{int((past.now - 30 * HOUR) * 1000)}-orders")
    table = told(report)["shop.orders"]
    assert (states(table)[-2:], table["loss_s"]) == (["whole", "absent"], None)


def test_of_a_table_that_was_made_again_each_id_has_its_time(past: Past, report: Report) -> None:
    dull(past, 5, tables=ALL[1:])
    past.snapshot("shop", "orders-" + "a" * 32, ago=4 * DAY)
    past.snapshot("shop", "orders-" + "b" * 32, ago=1 * DAY)
    tables = json.loads(report("--json", "--table", "shop.orders").stdout)["nodes"][0]["tables"]
    assert [(table["now"], table["intervals"][-1]["state"]) for table in tables] == [("absent",) * 2, ("whole",) * 2]


def test_where_prune_has_been_the_roll_ups_tell_that_incrementals_came() -> None:
    story, users = Story(), FIRST
    for day in range(4):
        for hour in range(1, 24):
            story.backups(day * DAY + hour * HOUR, nb(day * 24 + hour, day * DAY + hour * HOUR))
        story.snapshot((day + 1) * DAY, nb(day * 24 + 23, day * DAY), tag=f"day{day}")
        story.roll_up((day + 1) * DAY + 60)
    store: Any = story.bucket
    for rolled in (False, True):
        if rolled:
            gone = [key for key in story.bucket.objects if "/backups/" in key and "rollup" not in key]
            assert len(gone) == 4 * 23
            for key in gone:
                del story.bucket.objects[key]
        picture = Chronicle(store, About(NODE), BEGIN, BEGIN + 4 * DAY + 120).picture([f"ks.{users}"], 2)
        ((_, parts),) = picture.lanes
        assert [part.state for part in parts][-1] == "whole", rolled
        assert sum(part.end - part.begin for part in parts if part.state == "whole") > 2.9 * DAY, rolled


@given(
    some.lists(some.tuples(some.integers(0, 1000), some.sampled_from([*STATES])), min_size=1, max_size=30),
    some.integers(1, 200),
)
def test_the_worst_that_falls_into_a_column_is_seen(cuts: list[tuple[int, str]], columns: int) -> None:
    moments = sorted({moment for moment, _ in cuts} | {0, 1000})
    kinds = [cuts[number % len(cuts)][1] for number in range(len(moments))]
    parts = [Stretch(a, b, kind, 1.0) for a, b, kind in zip(moments, moments[1:], kinds, strict=False)]
    runs = runs_of(parts, 0.0, 1000.0, columns)
    assert [run.first for run in runs] == [0, *(run.last for run in runs[:-1])]
    assert runs[-1].last == columns
    ranks = [*STATES]
    for part in parts:
        inside = [
            run
            for run in runs
            if run.first / columns * 1000 <= (part.begin + part.end) / 2 <= run.last / columns * 1000
        ]
        assert max(ranks.index(run.state) for run in inside) >= ranks.index(part.state)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "all of it"),
        (0, "0 s"),
        (45.2, "46 s"),
        (60, "1 min"),
        (600, "10 min"),
        (7800, "2 h 10 min"),
        (3600, "1 h"),
        (47 * 3600, "47 h"),
        (2 * 86400, "2 d"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations_are_told_as_people_tell_them(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


# ------------------------------------------------------------------------------------------------------------
# What is told, against what a restore would have brought back

LOCAL = "local-" + "9" * 32  # stands for the tables that Cassandra itself flushes every hour


class Life:
    """Two weeks of a table, on a node that may lose its daemon, its store or its incrementals for a while."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.story = Story()
        self.rows: dict[str, frozenset[int]] = {}  # of each SSTable what was flushed into it
        self.flushed: dict[int, float] = {}
        self.live: list[Written] = []
        self.deeds: list[tuple[float, Callable[[], object]]] = []  # what the daemon lists, and when
        trouble = self.chance.choice(["", "", "away", "down", "off", "never on", "all"])
        self.away = self.spans(HOUR, 40 * HOUR) if trouble in ("away", "all") else []
        self.down = self.spans(HOUR / 2, 20 * HOUR) if trouble in ("down", "all") else []
        self.off = self.spans(9 * HOUR, 60 * HOUR) if trouble == "off" else []
        self.off += [(-1.0, 99 * DAY)] if trouble == "never on" else []
        self.calm = not trouble

    def spans(self, least: float, most: float) -> list[tuple[float, float]]:
        begins = [self.chance.uniform(0, 6 * DAY), self.chance.uniform(9 * DAY, 11 * DAY)]
        return [(begin, begin + self.chance.uniform(least, most)) for begin in begins]

    def within(self, at: float, spans: list[tuple[float, float]]) -> float:
        """Return the end of the span in which a moment lies, else the moment."""
        return max([at, *(end + 1 for begin, end in spans if begin <= at < end)])

    def link(self, table: str, sstable: Written, at: float) -> None:
        if self.within(at, self.off) == at:
            found = self.within(at + 0.1, self.away)
            listed = found + self.chance.choice([2, 60, 800])
            listed = self.within(self.within(self.within(listed, self.down), self.away), self.down)
            self.deeds.append((listed, lambda: self.story.backups(found, sstable, table=table, listed=listed)))

    def take(self, at: float) -> None:
        sstables, complete, seen = tuple(self.live), self.chance.random() > 0.2, self.within(at, self.away)
        listed = self.within(seen + self.chance.choice([5, 600, 9000]), self.down)
        listed = self.within(self.within(listed, self.away), self.down)
        more: dict[str, Any] = {"complete": complete, "listed": listed, "seen": seen, "tag": f"day-{at:.0f}"}
        self.deeds.append((listed, lambda: self.story.snapshot(at, *sstables, **more)))

    def flush(self, number: int, at: float) -> None:
        self.live.append(nb(number, at))
        self.flushed[number], self.rows[self.live[-1].name] = at, frozenset([number])
        self.link(FIRST, self.live[-1], at)

    def compact(self, number: int, at: float) -> None:
        rows = frozenset[int]().union(*(self.rows[one.name] for one in self.live))
        self.live = [nb(number, at)]
        self.rows[self.live[0].name] = rows

    def pass_by(self) -> None:
        for hour in range(14 * 24):
            at = hour * HOUR + self.chance.uniform(0, 1500)
            self.link(LOCAL, nb(hour, hour * HOUR + 3000), hour * HOUR + 3000)
            if hour % 2 == 0 and self.chance.random() < 0.5:
                self.flush(2 * hour, at)
            if self.chance.random() < 0.05:
                self.compact(2 * hour + 1, at + 60)
            if hour % 24 == 2:
                self.take(hour * HOUR + 2000)
        for _, deed in sorted(self.deeds, key=lambda one: one[0]):
            deed()

    def picture(self, at: float, days: float = 14) -> Picture:
        store: Any = self.story.bucket
        return Chronicle(store, About(NODE), BEGIN + at - days * DAY, BEGIN + at).picture(["ks.users"], 2)

    def restored(self, at: float) -> tuple[bool, set[int]]:
        """Return what `restore --at` would have brought back then: from a snapshot? and which flushes."""
        known = Story()
        known.bucket.objects = {key: one for key, one in self.story.bucket.objects.items() if one[1] <= BEGIN + at}
        chosen = [one for one in known.chosen(at) if one.table == FIRST]
        names = [sstable.name for one in chosen for sstable in one.sstables]
        return any(one.base.listing for one in chosen), {row for name in names for row in self.rows[name]}

    def check(self, at: float, part: Stretch) -> None:
        based, rows = self.restored(at)
        since = at - 900 if part.state == "whole" else part.since - BEGIN
        assert based == (part.state not in ("none", "partial", "absent")), (at / HOUR, part)
        lost = {row: moment / HOUR for row, moment in self.flushed.items() if moment <= since and row not in rows}
        assert not (based and lost), (at / HOUR, part, since / HOUR, lost)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some.integers(0, 10**9))
def test_whatever_happened_a_restore_would_have_brought_back_what_the_picture_says(seed: int) -> None:
    life = Life(seed)
    life.pass_by()
    ((_, parts),) = life.picture(14 * DAY).lanes
    assert all(a.end == b.begin for a, b in itertools.pairwise(parts))
    for part in parts:
        for share in (0.02, 0.98) if part.end - part.begin > 1 else ():
            life.check(part.begin - BEGIN + share * (part.end - part.begin), part)
    for _ in range(5):
        at = life.chance.uniform(0, 14 * DAY)
        life.check(at, next(part for part in parts if part.begin <= BEGIN + at <= part.end))
    states = [part.state for part in parts]
    assert not life.calm or (states[-1] == "whole" and {*states} <= {"absent", "none", "partial", "whole"})


# ------------------------------------------------------------------------------------------------------------
# The page


SVG = "{http://www.w3.org/2000/svg}"


def page_of(report: Report, at: Path, *args: object) -> str:
    report("--out", at / "page.html", *args)
    assert sorted(path.name for path in at.glob("page.html*")) == ["page.html"]
    return (at / "page.html").read_text(encoding="utf-8")


def assert_harmless(page: str) -> ElementTree.Element:
    """Fail if the page is not well-formed, or runs or fetches anything."""
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    names = {element.tag.rpartition("}")[2].lower() for element in tree.iter()}
    assert not names & {"script", "iframe", "img", "image", "link", "object", "embed", "a", "use", "form", "base"}
    for element in tree.iter():
        assert not [name for name in element.attrib if name.lower().startswith("on") or "href" in name or name == "src"]
    assert not re.search(r"(?<!url\()[a-z]+://(?!www.w3.org/1999/xhtml)|@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    return tree


def test_a_real_bucket_becomes_one_well_formed_page(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket, node: Node
) -> None:
    scene = Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)
    users = node.table("ks1", "users")
    users.flush()
    scene.once(node.root / "data")
    node.snapshot("daily")
    scene.once(node.root / "data")
    users.flush()
    scene.once(node.root / "data")
    options = ("--bucket", tmp_bucket.target, "--state-dir", tmp_path / "none", "--days", 1)
    done = scene.run("report", *options, "--out", tmp_path / "page.html", check=0)
    assert done.stdout.startswith("If node1 died now: up to ")
    tree = assert_harmless((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "users" in [text.text for text in tree.iter() if text.tag.endswith("text")]
    document = json.loads(scene.run("report", *options, "--json", check=0).stdout)
    ((table,),) = [one["tables"] for one in document["nodes"]]
    assert (table["now"], table["loss_s"] < 900) == ("whole", True)
    assert scene.run("report", *options, "--out", "-", check=0).stdout.startswith("<!DOCTYPE html>")


HOSTILE = ["<script>alert(1)</script>", "\"onload='x'&amp;", "]]><!--", "a\x1b[2Jb\n", "\u202eevil", "\udcff"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_and_does_nothing(past: Past, report: Report, tmp_path: Path, name: str) -> None:
    past.node(cluster=name.replace("\udcff", ""))
    past.snapshot(f"k{name.replace('/', '')}", f"t{name.replace('/', '')}-" + "1" * 32, HOUR, tag=f"g{name}")
    past.snapshot("ks", "ok-" + "1" * 32, HOUR)
    page = page_of(report, tmp_path)
    tree = assert_harmless(page)
    words = {text for element in tree.iter() for text in (element.text or "",)}
    assert any(word.startswith("k") and word != "ks" for word in words)
    for text in (page, report("--terminal").stdout):
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)


def test_what_is_not_restorable_stands_in_the_table_and_the_picture_can_be_heard(
    past: Past, report: Report, tmp_path: Path
) -> None:
    left_behind(past)
    tree = assert_harmless(page_of(report, tmp_path))
    cells = [cell.text for cell in tree.iter() if cell.tag.endswith("td")]
    assert cells[:2] == ["metrics.raw", "found, but stored late"]
    (picture,) = (one for one in tree.iter() if one.get("role") == "img")
    assert str(picture.get("aria-label")).startswith(f"If {past.name} died now: up to 13 h")
    titles = [one.text for one in picture.iter() if one.tag.endswith("title")]
    assert any(
        re.fullmatch(r"metrics\.raw, .* to .*: found, but stored late, up to 13 h.* lost", t or "") for t in titles
    )


def test_several_nodes_are_sections_of_one_page(past: Past, report: Report, tmp_path: Path) -> None:
    past.snapshot("ks", "users-" + "1" * 32, HOUR)
    Past(past.root, "db8").snapshot("ks", "users-" + "1" * 32, 2 * HOUR)
    page = page_of(report, tmp_path)
    assert page.count("<section>") == page.count("died now") / 2 == 2
    assert page_of(report, tmp_path, "--node", "db8").count("<section>") == 1
    assert report("--terminal").stdout.count("died now") == 2


def test_nothing_that_is_meant_is_exit_1_and_no_days_are_exit_2(past: Past, report: Report) -> None:
    assert "nothing has been stored there" in report(check=1).stderr
    past.snapshot("ks", "users-" + "1" * 32, HOUR)
    assert "no table of" in report("--table", "other", check=1).stderr
    assert "--days 0" in report("--days", "0", check=2).stderr
    assert "no table of" in report("--at", "2001-01-01", check=1).stderr


def test_as_of_an_earlier_moment_only_what_was_there_counts(past: Past, report: Report) -> None:
    dull(past, 5, [(5 * HOUR, -1)])
    moment = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(past.now - 6 * HOUR))
    assert {table["now"] for table in told(report, "--at", moment).values()} == {"whole"}


class Memory:
    """A store with three hundred tables and ninety days of listings, which have names alone."""

    url = "memory:"

    def __init__(self, trouble: float) -> None:
        self.trouble, self.end = trouble, seconds_of("20261122T000000.000000Z")

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        chance = random.Random(1)
        for table in range(300 if prefix.endswith(".listings/") else 0):
            base = f"{NODE}.listings/keyspace{table // 25:02}/some_table_of_ours_{table}-{table:032x}"
            for hour in range(90 * 24 - table % 6, 0, -6):
                found, late = self.end - hour * HOUR + table, chance.random() < self.trouble / 20
                yield Head(f"{base}/backups/{utc(found)}-complete-8-100.json", 1, "", found + (30000 if late else 7))
            for day in range(90, 0, -1):
                taken, state = self.end - day * DAY + 7200, "in" * (chance.random() < self.trouble) + "complete"
                folder = f"{base}/snapshots/daily/{utc(taken + table)}"
                yield Head(f"{folder}/{utc(taken + 400)}-{state}-800-1000.json", 1, "", taken + 400)

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        yield b""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [0.0, 0.1])
def test_three_hundred_tables_and_ninety_days_take_less_than_200_kb(trouble: float) -> None:
    store: Any = Memory(trouble)
    picture = Chronicle(store, About(NODE), store.end - 90 * DAY, store.end).picture([], 2)
    page = report_page([picture])
    assert_harmless(page)
    assert len(picture.lanes) == 300
    assert len(page.encode()) < 200_000


# ------------------------------------------------------------------------------------------------------------
# The strip


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_strip_fits_the_terminal_and_its_states_differ_without_colour(
    past: Past, report: Report, width: int
) -> None:
    outage(past)
    env = {"COLUMNS": str(width), "PYTHONIOENCODING": "utf-8"}
    text = report("--terminal", env=env).stdout
    lines = text.splitlines()
    assert "\033" not in text
    assert all(len(line) <= width for line in lines[1:])
    (strip,) = (line for line in lines if line.startswith("shop.orders"))
    assert re.search("█+[?]+█+ [0-9]", strip)
    assert "? nothing heard: not known to be stored" in lines
    plain = report("--terminal", env={**env, "PYTHONIOENCODING": "ascii"}).stdout
    assert plain.isascii()
    assert re.search("#+[?]+#+ [0-9]", plain)


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_is_for_terminals_and_not_for_those_that_want_none(
    past: Past, tmp_path: Path, env: dict[str, str], coloured: bool
) -> None:
    healthy(past)
    program = Path(__file__).resolve().parents[1] / "cassbackup.py"
    words = [sys.executable, program, "report", "--terminal", "--bucket", past.bucket.target, "--state-dir", tmp_path]
    ours, theirs = os.openpty()
    clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(list(map(str, words)), stdout=theirs, env=clean | env) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                text += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.returncode == 0
    assert (b"\033[32m" in text) == coloured


# ------------------------------------------------------------------------------------------------------------
# In a real browser


class Shot(NamedTuple):
    """A screenshot: the colour of each pixel, row by row."""

    width: int
    height: int
    rows: list[bytes]
    size: int  # bytes of a pixel

    def at(self, x: int, y: int) -> str:
        """Return a colour as CSS writes it."""
        return "#" + self.rows[y][x * self.size : x * self.size + 3].hex()


def decode(png: bytes) -> Shot:
    """Read a PNG of 8 bits a channel, without interlacing (RFC 2083)."""
    at, data, head = 8, b"", b""
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        head, data = (body if kind == b"IHDR" else head), data + (body if kind == b"IDAT" else b"")
        at += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", head)
    assert depth == 8
    size = {2: 3, 6: 4}[colour]
    raw, before, rows, stride = zlib.decompress(data), bytes(width * size), list[bytes](), width * size
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for i in range(stride):
            left, up = (line[i - size] if i >= size else 0), before[i]
            corner = before[i - size] if i >= size else 0
            if kind == 4:
                guess = left + up - corner
                nearest = min((abs(guess - one), rank, one) for rank, one in enumerate((left, up, corner)))[2]
            else:
                nearest = (0, left, up, (left + up) // 2)[kind]
            line[i] = (line[i] + nearest) & 255
        before = bytes(line)
        rows.append(before)
    return Shot(width, height, rows, size)


def screenshot(page: Path, width: int, height: int, *flags: str) -> Shot:
    """Show a page in Chromium, headless."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not installed")
        pytest.skip("needs chromium")
    home = page.parent / f"browser-{width}-{len(flags)}"
    quiet = ["quic", "background-networking", "component-update", "sync", "gpu"]
    options = [*(f"--disable-{word}" for word in quiet), "--headless", "--no-sandbox", "--no-first-run", *flags]
    options += ["--hide-scrollbars", f"--user-data-dir={home}", f"--window-size={width},{height}"]
    shot = page.with_suffix(f".{width}.png")
    command = [chromium, *options, f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=250, env={**os.environ, "HOME": str(home)})
    return decode(shot.read_bytes())


DARK = "--blink-settings=preferredColorScheme=0"


def shown(past: Past, shot: Shot, page: str, tone: str, ago: float, table: str) -> str:
    """Return the state whose colour the browser shows for a table at a moment."""
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    (picture,) = (one for one in tree.iter() if one.get("role") == "img")
    ys = [int(str(one.get("y"))) for one in picture.iter() if one.text == table and one.get("class") == "end"]
    colours = {getattr(state, tone): name for name, state in STATES.items() if name != "absent"}
    left = (shot.width - 1100) // 2 + 200
    top = next(y for y in range(100, shot.height) if shot.at(left + 719, y) in colours) - 66  # of the first lane
    x = round(left + (14 * DAY - ago) / (14 * DAY) * 720)
    box = [shot.at(x + dx, top + ys[0] - 9 + dy) for dx in range(-3, 4) for dy in range(10)]
    found = {name for colour, name in colours.items() if box.count(colour) > len(box) / 6}
    return "/".join(sorted(found)) or "absent"


@pytest.mark.parametrize("tone", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (healthy, {("orders", 1): "whole", ("raw", 13): "whole", ("local", 6): "whole"}),
        (outage, {("orders", 7): "whole", ("orders", 5.4): "silent", ("raw", 5.4): "silent", ("orders", 4): "whole"}),
        (left_behind, {("raw", 1): "whole", ("raw", 0.3): "waiting", ("orders", 0.3): "whole"}),
        (never, {("orders", 2): "none", ("carts", 2): "partial", ("orders", 6): "absent", ("local", 2): "none"}),
    ],
)
def test_a_browser_shows_each_state_where_it_was(
    past: Past,
    report: Report,
    tmp_path: Path,
    history: Callable[[Past], None],
    expected: dict[tuple[str, float], str],
    tone: str,
) -> None:
    history(past)
    page = page_of(report, tmp_path)
    shot = screenshot(tmp_path / "page.html", 1148, 1000, *([DARK] if tone == "dark" else []))
    found = {key: shown(past, shot, page, tone, key[1] * DAY, key[0]) for key in expected}
    assert found == expected
    paper = {"light": "#ffffff", "dark": "#14181d"}[tone]
    assert all(shot.at(x, y) == paper for y in range(shot.height) for x in (2, 20, 1128, 1145))


def test_in_a_narrow_window_nothing_but_the_picture_is_cut(past: Past, report: Report, tmp_path: Path) -> None:
    left_behind(past)
    page_of(report, tmp_path)
    shot = screenshot(tmp_path / "page.html", 600, 1000)
    assert all(shot.at(x, y) == "#ffffff" for y in range(shot.height) for x in (5, 15, 580, 595))
    assert any(shot.at(575, y) == STATES["whole"].light for y in range(shot.height))
