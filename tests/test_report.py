"""What the report says would be lost, of buckets whose past is known, and the page that it draws."""

from __future__ import annotations

import json
import math
import os
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, Run
from scene import Scene
from servers import FileBucket
from tree import Node

import cassbackup
from cassbackup import (
    Answer,
    Bucket,
    Fault,
    History,
    Missing,
    Patient,
    ReportOptions,
    StoreOptions,
    component,
    loss_text,
    open_store,
    report,
    utc,
)

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
USERS = f"ks1/users-{'a' * 32}"


class Past:
    """A bucket whose past is made up: moments are given in seconds before now, the older first."""

    def __init__(self, root: Path) -> None:
        self.bucket, self.now = FileBucket(root / "bucket"), time.time()
        self.out = root / "report.html"

    def put(self, name: str, ago: float, document: object = None) -> None:
        """Store something that the store dates back, too."""
        body = b"" if document is None else json.dumps({"version": 2, **document}).encode()  # type: ignore[dict-item]
        self.bucket.put(name, body)
        os.utime(self.bucket.root / name, (self.now - ago, self.now - ago))

    def snapshot(self, ago: float, listed: float = 0.0, *, place: str = USERS, tag: str = "daily", **more: str) -> None:
        """A snapshot that ended so long ago, and was listed a moment later, or at another time."""
        node, state = more.get("node", "node1"), more.get("state", "complete")
        listed = listed or ago - 2
        life = utc(self.now - ago)
        name = f"{place}/snapshots/{component(tag)}/{life}/{utc(self.now - listed)}-{state}-10-2048.json"
        self.put(f"{node}.listings/{name}", listed)

    def flushes(
        self, begin: float, end: float, *, place: str = USERS, every: float = HOUR, node: str = "node1", state: str = ""
    ) -> None:
        """Incrementals that came every hour."""
        while begin >= end:
            name = f"{place}/backups/{utc(self.now - begin)}-{state or 'complete'}-8-1024.json"
            self.put(f"{node}.listings/{name}", begin)
            begin -= every

    def beats(self, begin: float, end: float, node: str = "node1", **waiting: float) -> None:
        """Heartbeats, every quarter of an hour; in the last one of them these tables wait since so long ago."""
        while begin >= end:
            last = begin - 15 * MINUTE < end
            oldest = {USERS: utc(self.now - waiting["users"])} if last and waiting else {}
            self.put(f"{node}.listings/heartbeat/{utc(self.now - begin)}.json", begin, {"oldest_incrementals": oldest})
            begin -= 15 * MINUTE

    def open(self) -> Bucket:
        return Bucket(Patient(open_store(self.bucket.target, StoreOptions()), 1.0), 4)

    def loss(self, ago: float = 0.0, place: str = USERS, node: str = "node1") -> float:
        """Return what would have been lost so long ago."""
        history = History(self.open(), node, self.now - 30 * DAY, self.now, ())
        return history.loss(place, self.now - ago)

    def report(self, **options: Any) -> Answer:
        return report(self.open(), ReportOptions(**{"out": str(self.out), **options}))


@pytest.fixture
def past(tmp_path: Path) -> Past:
    return Past(tmp_path)


def about(seconds: float) -> object:
    return pytest.approx(seconds, abs=90)


# ------------------------------------------------------------------------------------------------------------
# What would be lost


def test_two_minutes_after_the_first_snapshot_two_minutes_would_be_lost(past: Past) -> None:
    past.snapshot(2 * MINUTE)
    past.beats(3 * MINUTE, 3 * MINUTE)
    assert past.loss() == about(2 * MINUTE)
    answer = past.report()
    assert "the worst loss would be " in answer.text
    assert "0 of 1 tables would lose more than 15 min" in answer.text


def test_where_incrementals_come_nothing_is_lost_but_what_waits(past: Past) -> None:
    past.snapshot(2 * DAY)
    past.flushes(2 * DAY, 10 * MINUTE)
    past.beats(2 * DAY, 5 * MINUTE)
    for ago in (0, 5 * HOUR, DAY):
        assert past.loss(ago) == 0
    past.beats(4 * MINUTE, 3 * MINUTE, users=3 * HOUR)  # its oldest incremental was found three hours ago
    assert past.loss() == about(3 * HOUR)
    assert past.loss(2 * HOUR) == 0  # the heartbeat of that time knew of nothing


@pytest.mark.parametrize("how", ["incomplete", "marked bad"])
def test_incrementals_that_cannot_be_restored_break_the_chain_until_the_next_snapshot(past: Past, how: str) -> None:
    past.beats(2 * DAY, 5 * MINUTE)
    past.snapshot(2 * DAY)
    past.flushes(2 * DAY, 10 * MINUTE)
    past.flushes(3 * HOUR, 3 * HOUR, state=how.partition(" ")[0].replace("marked", "complete"))
    assert past.loss(4 * HOUR) == 0
    if how == "marked bad":
        assert past.loss() == 0
        past.put(f"node1.listings/bad/{utc(past.now)}.json", 0, {"keys": [{"key": "node1/x", "found": "absent"}]})
        assert past.loss() > DAY, "of these listings nothing can be read at all"
        return
    assert past.loss() == about(3 * HOUR)
    past.snapshot(HOUR)
    assert past.loss() == 0


def test_a_clock_that_was_ahead_makes_no_table_a_dropped_one(past: Past) -> None:
    past.beats(DAY, 5 * MINUTE)
    past.snapshot(-2 * HOUR, 30 * MINUTE)
    assert past.loss() == about(30 * MINUTE)


def test_a_snapshot_of_some_token_ranges_protects_nothing(past: Past) -> None:
    past.beats(DAY, 5 * MINUTE)
    past.snapshot(HOUR, tag="RepairedDataMismatch-20261129")
    assert past.loss() == math.inf


def test_of_a_daemon_that_is_silent_nothing_is_known_since(past: Past) -> None:
    past.snapshot(2 * DAY)
    past.flushes(2 * DAY, 5 * HOUR)
    past.beats(2 * DAY, 5 * HOUR)
    assert past.loss() == about(5 * HOUR)
    assert past.loss(6 * HOUR) == 0


def test_an_outage_ends_when_the_daemon_comes_back_and_breaks_no_chain(past: Past) -> None:
    past.snapshot(2 * DAY)
    for begin, end in ((2 * DAY, 10 * HOUR), (4 * HOUR, 5 * MINUTE)):
        past.flushes(begin, end)
        past.beats(begin, end)
    assert past.loss(5 * HOUR) == about(5 * HOUR)
    assert past.loss(3 * HOUR) == 0


def test_snapshots_alone_are_points(past: Past) -> None:
    past.beats(3 * DAY, 5 * MINUTE)
    past.snapshot(2 * DAY)
    past.snapshot(1 * DAY)
    assert past.loss() == about(DAY)
    assert past.loss(DAY + HOUR) == about(DAY - HOUR)


def test_incrementals_that_were_off_for_a_while_break_the_chain_until_the_next_snapshot(past: Past) -> None:
    past.beats(3 * DAY, 5 * MINUTE)
    past.snapshot(3 * DAY)
    past.flushes(3 * DAY, 2 * DAY)
    past.flushes(1 * DAY, 10 * MINUTE)
    past.snapshot(12 * HOUR)
    assert past.loss(2 * DAY + 2 * HOUR) == 0
    assert past.loss(DAY) == about(DAY)
    assert past.loss(13 * HOUR) == about(2 * DAY - 13 * HOUR)  # what was flushed meanwhile is nowhere
    assert past.loss(11 * HOUR) == 0


def test_a_snapshot_counts_from_when_it_was_listed_and_up_to_its_end(past: Past) -> None:
    past.beats(DAY, 5 * MINUTE)
    past.snapshot(5 * HOUR, 3 * HOUR)
    assert past.loss(4 * HOUR) == math.inf
    assert past.loss(2 * HOUR) == about(3 * HOUR)


def test_a_table_without_a_complete_snapshot_would_be_lost(past: Past) -> None:
    past.beats(HOUR, 5 * MINUTE)
    past.snapshot(HOUR, state="incomplete")
    assert past.loss() == math.inf
    past.flushes(HOUR, 10 * MINUTE, place="ks1/logs-1")
    assert past.loss(place="ks1/logs-1") == math.inf
    assert "everything" in past.report().text


def test_a_table_that_was_truncated_has_nothing_older_to_lose_and_a_dropped_one_nothing_at_all(past: Past) -> None:
    past.beats(3 * DAY, 5 * MINUTE)
    past.snapshot(2 * DAY)
    emptied = int((past.now - HOUR) * 1000)
    past.snapshot(HOUR, tag=f"truncated-{emptied}-users")
    assert past.loss() == about(HOUR)
    logs = f"ks1/logs-{'b' * 32}"
    past.snapshot(2 * DAY, place=logs)
    past.snapshot(HOUR, place=logs, tag=f"dropped-{emptied}-logs")
    assert (past.loss(place=logs), past.loss(2 * HOUR, logs)) == (-1, about(2 * DAY - 2 * HOUR))
    assert past.loss(3 * DAY, logs) == -1  # it was not there yet
    past.snapshot(HOUR / 2, place=logs)
    assert past.loss(place=logs) == about(HOUR / 2), "it was brought back, with its old id"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"version": 2}', b'{"version": 2, "oldest_incrementals": {"a": 5}}'])
def test_a_heartbeat_that_is_none_of_ours_spoils_no_picture(past: Past, body: bytes) -> None:
    past.snapshot(HOUR)
    past.bucket.put(f"node1.listings/heartbeat/{utc(past.now - 60)}.json", body)
    assert past.loss() == about(HOUR)


def test_a_damaged_heartbeat_says_nothing_and_the_one_before_does(past: Past) -> None:
    past.snapshot(5 * DAY)
    past.flushes(5 * DAY, 10 * MINUTE)
    past.beats(DAY, 20 * MINUTE, users=3 * DAY)
    past.bucket.put(f"node1.listings/heartbeat/{utc(past.now - 60)}.json", b"")
    assert past.loss() == about(3 * DAY)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.2, "60 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (2 * DAY, "2 d"),
        (math.inf, "everything"),
    ],
)
def test_durations_are_told_as_people_tell_them(seconds: float, text: str) -> None:
    assert loss_text(seconds) == text


# ------------------------------------------------------------------------------------------------------------
# The page


def picture(page: str) -> ET.Element:
    """Return the page as XML; it must be well-formed, and hold nothing but itself."""
    root = ET.fromstring(page.replace("<!DOCTYPE html>\n", ""))
    assert {element.tag for element in root.iter()} & {"script", "link", "img", "a", "image"} == set()
    assert "default-src 'none'" in page
    assert "color-scheme: light dark" in page
    return root


Row = tuple[str, str]  # the name of a lane, and what it would lose now


def row(lane: ET.Element) -> Row:
    return str(lane[0].text), str(lane[-1].text)


def nodes(page: str) -> dict[Row, list[Row]]:
    """Return the line of each node, and the lines of its tables that it opens into."""
    return {row(one[0]): [row(table) for table in one[1:]] for one in picture(page).iter("details")}


def colours(page: str) -> dict[str, list[str]]:
    """Return the colours of each lane from left to right."""
    lanes = [one for one in picture(page).iter() if one.get("class") == "lane" and one[0].text]
    return {row(lane)[0]: [str(rect.get("class")) for rect in lane.iter("rect")] for lane in lanes}


def test_all_nodes_stand_on_one_page_the_worst_first_and_each_opens_into_its_tables(past: Past) -> None:
    past.beats(2 * DAY, 5 * MINUTE)
    past.flushes(2 * DAY, 10 * MINUTE)
    past.snapshot(2 * DAY)
    past.snapshot(2 * DAY, place=f"ks1/logs-{'b' * 32}", state="incomplete")
    past.beats(2 * DAY, 30 * HOUR, node="node2")
    past.snapshot(40 * HOUR - MINUTE, node="node2")
    answer = past.report()
    page = past.out.read_text(encoding="utf-8")
    assert list(nodes(page).items()) == [
        (("node1", "everything"), [("ks1.logs", "everything"), ("ks1.users", "0 s")]),
        (("node2", "40 h"), [("ks1.users", "40 h")]),
    ]
    assert "2 of 3 tables would lose more than 15 min, on 2 nodes" in answer.text
    assert f"The picture is in {past.out}" in answer.text
    assert [one["loss_s"] for one in answer.document["tables"]] == [None, 0, about(40 * HOUR)]
    (table,) = past.report(node="node2", table=("ks1.users",)).document["tables"]
    assert (table["node"], table["table"]) == ("node2", "ks1.users")
    assert colours(page)["node1"] == ["none"]
    assert colours(page)["node2"] == ["ok", "late", "old"]


@pytest.mark.parametrize("age", [10 * MINUTE, DAY, 40 * DAY])
def test_a_sound_node_is_green_from_its_first_minutes_to_its_last_month(past: Past, age: float) -> None:
    """The keys of a month's heartbeats are enough to tell that the daemon never was silent."""
    past.beats(age, MINUTE)
    past.snapshot(age - MINUTE)
    past.flushes(age - MINUTE, 0, every=170 * MINUTE)
    past.snapshot(2 * MINUTE)
    past.report()
    page = past.out.read_text(encoding="utf-8")
    assert nodes(page) == {("node1", "0 s"): [("ks1.users", "0 s")]}
    assert [one for one in colours(page)["ks1.users"] if one != "none"] == ["ok"]


def test_the_newest_heartbeat_of_many_is_the_one_that_tells_what_waits_now(past: Past) -> None:
    past.snapshot(20 * DAY)
    past.flushes(20 * DAY, 10 * MINUTE, every=2 * HOUR)
    past.beats(20 * DAY, 6 * MINUTE)
    for ago in (5 * MINUTE, 4 * MINUTE, 3 * MINUTE):  # whatever every nth of them is
        past.beats(ago, ago, users=2 * HOUR)
        assert past.loss() == about(2 * HOUR)


def test_a_node_that_has_listed_nothing_yet_would_lose_everything(past: Past) -> None:
    """Its first snapshot is on its way, or its daemon has no data."""
    past.beats(DAY, 5 * MINUTE)
    past.snapshot(2 * MINUTE, node="node2")
    answer = past.report(all_nodes=True)
    page = past.out.read_text(encoding="utf-8")
    assert nodes(page)["node1", "everything"] == [("(nothing is listed yet)", "everything")]
    assert colours(page)["node1"] == ["none"]
    assert "1 of 2 tables" in answer.text
    assert len(past.report(all_nodes=True, table=("ks1.users",)).document["tables"]) == 1


def test_a_hostile_name_is_shown_and_does_nothing(past: Past) -> None:
    past.snapshot(HOUR, place="ks1/<script>alert(1)<%2Fscript>&amp;-1")
    page = past.report(out="-").text
    assert "<script" not in page
    ((table,),) = nodes(page).values()
    assert table[0] == "ks1.<script>alert(1)</script>&amp;-1"


def test_the_page_begins_with_the_nodes_first_sign(past: Past) -> None:
    past.snapshot(HOUR)
    past.beats(HOUR, 5 * MINUTE)
    past.report()
    (lane,) = [
        one for one in picture(past.out.read_text(encoding="utf-8")).iter("div") if one.get("class") and one[0].text
    ]
    assert sum(int(str(rect.get("width"))) for rect in lane.iter("rect")) > 0.9 * 240


def test_a_large_cluster_is_a_page_of_bounded_size(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        past.snapshot(2 * DAY - number, place=f"ks1/table{number}-{number:032x}")
        past.snapshot(3 * DAY, place=f"ks1/table{number}-{number:032x}", node="node2")
    monkeypatch.setattr(cassbackup, "_LANES", 100)
    past.report(days=90)
    page = past.out.read_text(encoding="utf-8")
    assert [len(tables) for tables in nodes(page).values() if tables] == [51, 51]
    assert page.count("and 10 tables that would lose no more") == 2


def test_a_snapshot_that_names_what_is_marked_bad_protects_nothing(past: Past) -> None:
    past.snapshot(HOUR)
    assert past.report().document["tables"][0]["loss_s"] is not None
    past.put(f"node1.listings/bad/{utc(past.now)}.json", 0, {"keys": [{"key": "node1/x", "found": "absent"}]})
    assert past.report().document["tables"][0]["loss_s"] is None  # nor does a listing that cannot be read


def test_what_cannot_be_drawn_is_told(past: Past, tmp_path: Path) -> None:
    past.snapshot(HOUR)
    with pytest.raises(Missing, match=r"no table ks1\.user"):
        past.report(table=("ks1.user",))
    with pytest.raises(Fault, match=r"cannot write .*absent.*--out"):
        past.report(out=str(tmp_path / "absent" / "report.html"))


@pytest.mark.slow
def test_a_real_bucket_becomes_a_page(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket, node: Node
) -> None:
    scene = Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    page = scene.run("report", "--bucket", tmp_bucket.target, "--out", "-", check=0).stdout
    ((_, ((name, _),)),) = nodes(page).items()
    assert name == "ks1.users"
    assert not (tmp_path / "cassbackup-report.html").exists()
