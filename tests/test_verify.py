"""What `cassbackup verify` finds in a bucket that is not what its listings say, and what it says about it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faultproxy import s3_error
from servers import Bucket, FileBucket, S3Bucket
from shelf import DAY, EPOCH, HOUR, NODE, TABLE, Door, Shelf, batch, body_of, snapshot

import cassbackup as cb
from cassbackup import Answer, Fingerprint, Listing, Stored, Unit, VerifyOptions, utc

OTHER = "orders-" + "6b" * 16
MODES: tuple[dict[str, Any], ...] = ({}, {"tag": "monday"}, {"deep": True})


class Bench:
    """A bucket of any kind that is verified."""

    def __init__(self, bucket: Bucket, store: cb.Store) -> None:
        self.bucket, self.store = bucket, store
        bucket.is_touched = True  # some of what is listed here is false

    def add(self, *listings: Listing[Stored]) -> list[str]:
        """Store listings and what they name; return their keys."""
        keys = []
        for listing in listings:
            files = []
            for entry in listing.files:
                if not (info := self.store.head(entry.key)):
                    body = body_of(entry.name, entry.fingerprint.mtime_ns / 1e9)
                    info = self.store.put(entry.key, cb.Body(body))
                files.append(replace(entry, etag=info.etag))
            listing = replace(listing, files=tuple(files))
            keys.append(cb.listing_key(listing))
            self.store.put(keys[-1], cb.Body(cb.dump_listing(listing)))
        return keys

    def verify(self, node: str = NODE, **options: Any) -> Answer:
        bucket = cb.Bucket(cb.Patient(self.store, 5.0), 4)
        return cb.verify(bucket, VerifyOptions(node=node, **options))

    def bad(self, **options: Any) -> dict[str, dict[str, Any]]:
        """Return what is bad by its key."""
        answer = self.verify(**options)
        (node,) = answer.document["nodes"]
        is_behind = node["needs_thaw"] or node["incomplete"] or answer.document["empty"]
        assert answer.code == (cb.FAILED if node["bad"] else cb.BEHIND if is_behind else cb.DONE)
        return {one["key"]: one for one in node["bad"]}

    def path(self, key: str) -> Path:
        """Return an object of a file:// bucket as a file."""
        return Path(self.bucket.target.removeprefix("file://")) / key

    def rot(self, key: str, body: bytes) -> None:
        """Change a file of a file:// bucket where it lies: a disk that rots tells nobody when."""
        path = self.path(key)
        info = path.stat()
        path.write_bytes(body)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

    def flip(self, key: str) -> None:
        """Give an object other bytes of the same length."""
        body = self.bucket.get(key)
        self.bucket.put(key, body[:-1] + bytes([body[-1] ^ 1]))

    def marks(self) -> list[tuple[str, str]]:
        """Return what the newest file of marks says."""
        newest = max(key for key in self.bucket.objects() if ".listings/bad/" in key)
        document = json.loads(self.bucket.get(newest))
        assert document["version"] == 2
        assert all(cb.is_utc(one["at"]) for one in document["keys"])
        return sorted((one["key"], one["found"]) for one in document["keys"])


def opened(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    return Bench(bucket, cb.open_store(bucket.target, cb.StoreOptions()))


@pytest.fixture
def bench(tmp_bucket: FileBucket, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return opened(tmp_bucket, monkeypatch)


@pytest.fixture(params=["tmp_bucket", "moto", "gcs", pytest.param("rclone", marks=pytest.mark.slow)])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a bench on each kind of store."""
    return opened(request.getfixturevalue(request.param), monkeypatch)


FILES = tuple((f"nb-{number}-big-{part}.db", EPOCH) for number in (1, 2) for part in ("Data", "Statistics", "Summary"))
DAYS = {"monday": 0, "tuesday": 1, "wednesday": 2}


def snapshots(*tags: str, table: str = TABLE, node: str = NODE) -> list[Listing[Stored]]:
    """Return a snapshot a day, of the same SSTables."""
    return [snapshot(tag, EPOCH + DAYS[tag] * DAY, FILES, table=table, node=node) for tag in tags]


def key_of(name: str, listing: Listing[Stored]) -> str:
    (key,) = (entry.key for entry in listing.files if entry.name == name)
    return key


# ------------------------------------------------------------------------------------------------------------
# Objects


def test_every_damage_is_named_with_the_snapshots_that_it_spoils(anywhere: Bench) -> None:
    """Absent, truncated, emptied, flipped, swapped: and neither Statistics.db nor Summary.db is exempt."""
    listings = snapshots("monday", "tuesday")
    anywhere.add(*listings, batch(EPOCH, *(name for name, _ in FILES)))
    answer = anywhere.verify()
    (clean,) = answer.document["nodes"]
    assert (answer.code, clean["objects"], clean["bad"], clean["marked"]) == (cb.DONE, 8, [], "")
    assert clean["bytes"] == sum(
        len(body) for key, body in anywhere.bucket.objects().items() if key.startswith("node1/")
    )
    assert answer.text == f"node1: 8 objects, {clean['bytes']} B, by size and checksum: 0 bad"
    keys = [entry.key for entry in listings[0].files[:6]]
    anywhere.bucket.delete(keys[0])
    anywhere.bucket.put(keys[1], b"short")
    anywhere.bucket.put(keys[2], b"")
    anywhere.flip(keys[3])
    one, other = anywhere.bucket.get(keys[4]), anywhere.bucket.get(keys[5])
    anywhere.bucket.put(keys[4], other)
    anywhere.bucket.put(keys[5], one)
    damages = ["absent", "size", "size", "checksum", "size", "size"]
    for options in MODES:
        bad = anywhere.bad(**options)
        assert [bad[key]["found"] for key in keys] == damages, options
        assert len(bad) == 6
    units = [f"ks/{TABLE}/incremental", *(f"ks/{TABLE}/snapshot/{one.unit.tag}/{one.unit.life}" for one in listings)]
    assert list(anywhere.bad()[keys[0]]["spoils"]) == units
    text = anywhere.verify(tag="monday").text
    assert f"BAD {keys[3]} has CRC-32 " in text
    assert f"; it spoils ks/{TABLE}/snapshot/monday/" in text
    assert text.endswith(", by size and checksum: 6 bad")


def test_bytes_that_rot_where_they_lie_are_found_by_a_file_store_too(bench: Bench) -> None:
    """Written into the file itself: its size and the checksum kept beside it are as they were."""
    (monday,) = snapshots("monday")
    bench.add(monday)
    key = monday.files[0].key
    bench.rot(key, bench.bucket.get(key)[::-1])
    assert bench.bad(tag="monday") == {}
    assert bench.bad(deep=True)[key]["found"] == "checksum"
    os.utime(bench.path(key))  # whoever writes there leaves a trace
    for options in MODES:
        assert list(bench.bad(**options)) == [key], options


def test_what_list_spells_otherwise_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers give a + back as a blank; and GCS's composed objects have no CRC-32, so they are read."""
    shelf = Shelf()
    (monday,) = snapshots("monday")
    shelf.add(monday)
    door: Any = Door(shelf)
    plain = door.list
    monkeypatch.setattr(
        door,
        "list",
        lambda prefix, after="": (replace(one, key=one.key.replace("Data", "D ta")) for one in plain(prefix, after)),
    )
    bucket = cb.Bucket(door, 2)
    assert cb.verify(bucket, VerifyOptions(node=NODE)).code == cb.DONE
    monkeypatch.setattr(door, "_info", lambda key: replace(Door._info(door, key), crc32="", etag="generation"))
    door.asked.clear()
    assert cb.verify(bucket, VerifyOptions(node=NODE)).code == cb.DONE
    assert sum(line.startswith("get node1/") for line in door.asked) == 7
    key = monday.files[0].key
    shelf.objects[key] = (shelf.objects[key][0][::-1], EPOCH)
    assert cb.verify(bucket, VerifyOptions(node=NODE)).code == cb.FAILED


def test_only_what_was_selected_is_checked(bench: Bench) -> None:
    (monday,) = snapshots("monday")
    own = snapshot("tuesday", EPOCH + DAY, [*FILES, ("nb-9-big-Data.db", EPOCH)])
    bench.add(monday, own, batch(EPOCH - HOUR, "nb-8-big-Data.db"), batch(EPOCH + 2 * DAY, "nb-10-big-Data.db"))
    bench.add(*snapshots("monday", table=OTHER))
    bench.bucket.delete(key_of("nb-9-big-Data.db", own))
    counts = {}
    for name, options, is_bad in (
        ("all", {}, True),
        ("monday", {"tag": "monday"}, False),
        ("tuesday", {"tag": "tuesday"}, True),
        ("life", {"tag": f"tuesday@{utc(EPOCH + DAY)[:8]}"}, True),
        ("table", {"table": ("ks.users",)}, True),
        ("tag and table", {"tag": "monday", "table": (f"ks.{OTHER}",), "deep": True}, False),
        ("latest", {"latest": True, "table": ("ks.users",)}, True),
        ("latest of the other", {"latest": True, "table": ("*.orders*",)}, False),
    ):
        answer = bench.verify(**options)
        assert answer.code == (cb.FAILED if is_bad else cb.DONE), name
        counts[name] = answer.document["nodes"][0]["objects"]
    assert counts == {
        "all": 18, "monday": 14, "tuesday": 8, "life": 8, "table": 11, "tag and table": 7, "latest": 9,
        "latest of the other": 7,
    }  # fmt: skip


def test_the_latest_are_also_the_flushes_that_a_restore_adds_to_the_newest_snapshot_as_it_began_before_it_ended(
    bench: Bench,
) -> None:
    (tuesday,), earlier = snapshots("tuesday"), batch(EPOCH - HOUR, "nb-7-big-Data.db")
    flushed = batch(EPOCH + DAY - HOUR / 2, "nb-8-big-Data.db")
    bench.add(*snapshots("monday"), tuesday, earlier, flushed)
    for one in (earlier, flushed):
        bench.bucket.delete(one.files[0].key)
    assert list(bench.bad(latest=True)) == [flushed.files[0].key]


def test_a_snapshot_dated_by_a_clock_that_was_ahead_is_not_all_that_is_latest(bench: Bench) -> None:
    now = bench.store.now()
    bench.add(snapshot("early", now - 2 * DAY, FILES[:1]), snapshot("ahead", now + 300 * DAY, listed=now - 3 * DAY))
    newest = snapshot("newest", now - DAY, FILES[1:])
    bench.add(newest)
    bench.bucket.delete(newest.files[0].key)
    assert list(bench.bad(latest=True)) == [newest.files[0].key]


def test_a_time_means_all_tables_of_that_snapshot(bench: Bench) -> None:
    bench.add(snapshot("monday", EPOCH, FILES), snapshot("monday", EPOCH + 1, FILES, table=OTHER))
    (whole,) = bench.verify(tag="monday").document["nodes"]
    (page,) = bench.verify(tag=f"monday@{utc(EPOCH)[:15]}").document["nodes"]
    assert page["objects"] == whole["objects"]


def test_the_newest_and_a_tag_are_not_asked_for_at_once(bench: Bench) -> None:
    with pytest.raises(cb.Usage, match="you passed --tag and --latest"):
        bench.verify(tag="monday", latest=True)


def test_one_node_is_never_taken_for_another_and_all_of_them_are_checked_if_asked_for(bench: Bench) -> None:
    bench.add(*snapshots("monday"))
    (other,) = snapshots("monday", node="node10")
    bench.add(other)
    bench.bucket.delete(other.files[0].key)
    assert bench.bad() == {}
    assert list(bench.bad(node="node10")) == [other.files[0].key]
    with pytest.raises(cb.Usage, match="2 nodes match"):
        bench.verify(node="")
    answer = bench.verify(node="", all_nodes=True)
    assert answer.code == cb.FAILED
    assert [(node["node"], len(node["bad"])) for node in answer.document["nodes"]] == [("node1", 0), ("node10", 1)]


@pytest.mark.parametrize("options", [{"tag": "mondya"}, {"table": ("ks1.no",)}, {"latest": True, "table": ("no",)}])
def test_where_nothing_is_meant_nothing_is_said_to_be_good(bench: Bench, options: dict[str, Any]) -> None:
    bench.add(*snapshots("monday"))
    with pytest.raises(cb.Missing, match=r"no listing matches|no table (ks1.)?no: there are ks"):
        bench.verify(**options)


def test_a_node_of_which_nothing_is_left_and_a_tag_that_is_incomplete_are_not_passed_over(bench: Bench) -> None:
    bench.add(*snapshots("monday"))
    bench.bucket.put("node2.listings/owner.json", cb.dump_document(id="1", machine_id="2"))
    answer = bench.verify(node="", all_nodes=True)
    assert (answer.code, answer.document["empty"]) == (cb.BEHIND, ["node2"])
    assert answer.text.endswith("\nnode2: no listing matches")
    (tuesday,) = snapshots("tuesday")
    bench.add(replace(tuesday, complete=False, missing=("nb-3-big-Data.db",)))
    assert bench.verify().code == cb.DONE
    answer = bench.verify(tag="tuesday")
    assert answer.code == cb.BEHIND
    assert f"listed incomplete: ks/{TABLE}/snapshot/tuesday/" in answer.text
    bench.add(snapshot("tuesday", EPOCH + 2 * DAY, FILES))
    assert bench.verify(tag="tuesday").code == cb.DONE, "it was taken again"


def test_an_object_that_cannot_be_read_hides_no_other(moto: S3Bucket, proxy: Any, monkeypatch: Any) -> None:
    (monday,) = snapshots("monday")
    opened(moto, monkeypatch).add(monday)
    denied, failing, absent = (entry.key for entry in monday.files[:3])
    moto.delete(absent)
    between = proxy(moto)
    between.on("GET", denied, s3_error(403, "AccessDenied"), count=None)
    between.on("GET", failing, s3_error(500, "InternalError"), count=None)
    for name, value in moto.through(between.url).items():
        monkeypatch.setenv(name, value)
    bench = Bench(moto, cb.open_store(moto.target, cb.StoreOptions()))
    bad = bench.bad(deep=True, repair=True)
    assert {key: one["found"] for key, one in bad.items()} == {denied: "denied", failing: "failed", absent: "absent"}
    assert cb.read_bad_keys(bench.store, NODE) == {failing, absent}
    between.down()
    with pytest.raises(cb.Unreachable):
        bench.verify(deep=True)


class Pruned(cb.Patient):
    """A store from which prune deletes a listing, and all that it names, when the first GET of something comes."""

    def __init__(self, bench: Bench, victims: list[str], at: str) -> None:
        super().__init__(bench.store, 5.0)
        self.bench, self.victims, self.at = bench, victims, at

    def get(self, key: str, *args: Any) -> Any:
        if key.startswith(self.at):
            while self.victims:
                self.bench.bucket.delete(self.victims.pop())
        return super().get(key, *args)


@pytest.mark.parametrize("at", ["node1.listings/ks/", "node1/"])
def test_what_prune_lets_go_meanwhile_is_not_bad(bench: Bench, at: str) -> None:
    old, new = snapshots("monday")[0], snapshots("tuesday", table=OTHER)[0]
    bench.add(new)
    victims = [*bench.add(old), *(entry.key for entry in old.files)]
    store = Pruned(bench, victims, at)
    answer = cb.verify(cb.Bucket(store, 1), VerifyOptions(node=NODE, deep=True))
    assert (answer.code, store.victims) == (cb.DONE, [])


# ------------------------------------------------------------------------------------------------------------
# Listings


def test_a_damaged_listing_is_bad_and_the_others_are_checked(bench: Bench) -> None:
    monday, tuesday = snapshots("monday", "tuesday")
    key, other = bench.add(monday, tuesday)
    body = bench.bucket.get(key)
    for damaged in (
        b"",
        body[:-1],
        b"[]",
        bench.bucket.get(other),
        body.replace(b'"key":"node1/', b'"key":"nodeX/', 1),
        body.replace(b'"name":"nb-1', b'"name":"..%2F1', 1),
    ):
        bench.bucket.put(key, damaged)
        (node,) = bench.verify().document["nodes"]
        (bad,) = node["bad"]
        assert (bad["key"], bad["found"]) == (key, "unreadable"), damaged[:40]
        assert bad["spoils"] == [f"ks/{TABLE}/snapshot/monday/{monday.unit.life}"]
        assert node["objects"] == 7
    assert bench.bad(tag="tuesday") == {}


def test_a_key_that_is_listed_with_different_contents_is_bad(bench: Bench) -> None:
    (monday,) = snapshots("monday")
    one, other, *rest = monday.files
    bench.add(monday)
    bench.add(replace(monday, listed=utc(EPOCH + 1), files=(one, replace(other, key=one.key, etag="other"), *rest)))
    (bad,) = bench.bad().values()
    assert (bad["key"], bad["found"]) == (one.key, "size")


def test_what_is_no_listing_is_named_in_the_log_and_the_rest_is_checked(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.add(*snapshots("monday"))
    bench.bucket.put("node1.listings/ks1/readme.txt", b"hello")
    assert bench.bad() == {}
    assert "node1.listings/ks1/readme.txt" in caplog.text


def test_archives_are_verified_as_well(bench: Bench) -> None:
    log = replace(batch(EPOCH, "CommitLog-7-1.log"), unit=Unit("archive", tag="/d/archive"))
    bench.add(log)
    assert bench.bad(deep=True) == {}
    bench.flip(log.files[0].key)
    assert bench.bad()[log.files[0].key]["spoils"] == ["archive//d/archive"]


def record(bench: Bench, at: str, tag: str, listings: list[str], **more: Any) -> None:
    taken = {"node": NODE, "tag": tag, "taken": utc(EPOCH), "listings": listings}
    bench.bucket.put(f"node1.listings/tags/{tag}/{at}.json", cb.dump_document(**taken, **more))


def test_a_listing_that_is_gone_although_the_tag_record_names_it_is_bad_unless_prune_deleted_it(bench: Bench) -> None:
    monday, other = snapshots("monday")[0], snapshots("monday", table=OTHER)[0]
    keys = bench.add(monday, other)
    record(bench, utc(EPOCH), "monday", keys)
    bench.bucket.delete(keys[0])
    bad = bench.bad()
    assert {key: (one["found"], one["on_disk"]) for key, one in bad.items()} == {keys[0]: ("gone", False)}
    assert list(bench.bad(tag="monday")) == [keys[0]]
    assert bench.bad(table=("ks.orders",)) == {}
    record(bench, utc(EPOCH + 1), "monday", keys[1:], pruned=keys[:1])
    assert bench.bad() == {}
    bench.bucket.put("node1.listings/tags/monday/x.json", b"{}")
    with pytest.raises(cb.Corrupt, match=r"tags/monday/x.json"):
        bench.verify()


# ------------------------------------------------------------------------------------------------------------
# Archived classes: exit 3


@pytest.mark.parametrize("kind", ["GLACIER", pytest.param("DEEP_ARCHIVE", marks=pytest.mark.slow)])
def test_what_is_archived_needs_to_be_thawed_before_it_can_be_read(
    moto: S3Bucket, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bench, (monday,) = opened(moto, monkeypatch), snapshots("monday")
    bench.add(monday)
    key = monday.files[0].key
    place = {"Bucket": moto.bucket, "Key": key}
    moto.client.copy_object(**place, CopySource=place, StorageClass=kind, MetadataDirective="COPY")
    for options in MODES:
        answer = bench.verify(**options)
        (node,) = answer.document["nodes"]
        assert (answer.code, node["needs_thaw"], node["bad"]) == (cb.BEHIND, [key], []), options
        assert f"needs thaw: {key}" in answer.text
    moto.client.restore_object(**place, RestoreRequest={"Days": 1})
    assert bench.verify().code == cb.DONE


def test_what_is_archived_with_another_checksum_is_bad_before_it_is_thawed(
    moto: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, (monday,) = opened(moto, monkeypatch), snapshots("monday")
    bench.add(monday)
    key = monday.files[0].key
    body = bench.bucket.get(key)[:-1] + b"!"
    place = {"Bucket": moto.bucket, "Key": key, "StorageClass": "GLACIER"}
    moto.client.put_object(**place, Body=body, ChecksumAlgorithm="CRC32")
    assert {name: one["found"] for name, one in bench.bad().items()} == {key: "checksum"}


# ------------------------------------------------------------------------------------------------------------
# Repair


def test_what_is_bad_is_marked_only_if_asked_for_and_a_later_run_lifts_the_mark(bench: Bench) -> None:
    listings = snapshots("monday", "tuesday", "wednesday")
    bench.add(*listings)
    keys = [entry.key for entry in listings[0].files[:3]]
    bench.bucket.delete(keys[0])
    bench.flip(keys[1])
    whole = bench.bucket.get(keys[2])
    bench.bucket.put(keys[2], b"short")
    assert bench.verify().document["nodes"][0]["marked"] == ""
    assert not [key for key in bench.bucket.objects() if "/bad/" in key]
    answer = bench.verify(repair=True)
    assert answer.code == cb.FAILED
    assert answer.document["nodes"][0]["marked"].startswith("node1.listings/bad/2")
    assert "the daemon stores again what is bad" in answer.text
    assert bench.marks() == sorted(zip(keys, ("absent", "checksum", "size"), strict=True))
    assert cb.read_bad_keys(bench.store, NODE) == set(keys)
    bench.bucket.put(keys[2], whole)
    bench.verify(tag="tuesday", repair=True)
    assert (keys[2], "good") in bench.marks()
    assert cb.read_bad_keys(bench.store, NODE) == set(keys[:2])
    bench.verify(tag="tuesday", repair=True)
    assert (keys[2], "good") not in bench.marks()  # it is told once


def test_what_a_whole_reading_found_bad_only_a_whole_reading_finds_good(bench: Bench) -> None:
    """The weekly timer compares sizes and checksums; bytes that rot on a disk change neither."""
    (monday,) = snapshots("monday")
    bench.add(monday)
    key = monday.files[0].key
    body = bench.bucket.get(key)
    for content in (body[::-1], body):
        bench.rot(key, content)
        bench.verify(deep=content != body, repair=True)
        for _ in range(2):
            assert bench.verify(repair=True).code == (cb.FAILED if content != body else cb.DONE)
        assert cb.read_bad_keys(bench.store, NODE) == ({key} if content != body else set())


def test_a_key_that_is_listed_with_different_contents_stays_marked(bench: Bench) -> None:
    (monday,) = snapshots("monday")
    one, other, *rest = monday.files
    bench.add(replace(monday, listed=utc(EPOCH + 2)))
    bench.add(replace(monday, listed=utc(EPOCH + 1), files=(replace(other, key=one.key, etag="other"), *rest)))
    for _ in range(2):
        assert bench.verify(repair=True).code == cb.FAILED
        assert cb.read_bad_keys(bench.store, NODE) == {one.key}


def test_who_looks_at_a_part_does_not_say_that_the_node_was_verified(bench: Bench) -> None:
    bench.add(*snapshots("monday"))
    assert bench.verify(tag="monday", repair=True).document["nodes"][0]["marked"] == ""
    assert cb.view_bucket(bench.store, NODE, None).verified == 0


def test_a_repair_that_finds_nothing_still_says_when_it_looked(bench: Bench) -> None:
    bench.add(*snapshots("monday"))
    assert bench.verify(repair=True).code == cb.DONE
    assert bench.marks() == []
    assert cb.view_bucket(bench.store, NODE, None).verified > EPOCH


@pytest.mark.parametrize("found", ["gone", "unreadable", "denied"])
def test_a_repair_that_could_not_read_everything_marks_nothing_and_does_not_say_that_the_node_was_verified(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    keys = bench.add(*snapshots("monday", "tuesday"))
    if found == "gone":
        record(bench, utc(EPOCH), "monday", keys[:1])
        bench.bucket.delete(keys[0])
    elif found == "unreadable":
        bench.bucket.put(keys[0], b"{")
    else:
        monkeypatch.setattr(cb, "check_object", refuse)
    answer = bench.verify(repair=True)
    assert (answer.code, {one["found"] for one in answer.document["nodes"][0]["bad"]}) == (cb.FAILED, {found})
    assert "marked in" not in answer.text
    assert cb.view_bucket(bench.store, NODE, None).verified == 0


def refuse(*args: object) -> None:
    raise cb.Denied("403 AccessDenied", "")


def test_a_weekly_timer_leaves_its_trace_for_the_metrics(bench: Bench) -> None:
    """`verify --latest --repair` tells when it looked, marks what is bad, and lifts the mark when it is good again."""
    listings = snapshots("monday", "tuesday")
    bench.add(*listings, batch(EPOCH + DAY, "nb-9-big-Data.db"))
    key = listings[1].files[0].key
    whole = bench.bucket.get(key)
    for body, marks in ((whole, []), (b"short", [(key, "size")]), (whole, [(key, "good")]), (whole, [])):
        bench.bucket.put(key, body)
        answer = bench.verify(latest=True, repair=True)
        assert answer.code == (cb.FAILED if body != whole else cb.DONE)
        assert bench.marks() == marks
        view = cb.view_bucket(bench.store, NODE, None)
        assert view.bad == ({key} if body != whole else set())
        assert view.verified >= bench.store.now() - 60


def test_it_is_told_which_of_the_bad_objects_the_node_has_no_longer_as_far_as_the_bucket_tells(bench: Bench) -> None:
    """What the newest snapshot lacks, and no later listing names, compaction has deleted."""
    old = snapshot("monday", EPOCH, FILES[:3])
    new = snapshot("tuesday", EPOCH + DAY, FILES[3:])
    since = batch(EPOCH + 2 * DAY, "nb-7-big-Data.db")
    bench.add(old, new, since, batch(EPOCH - DAY, "nb-0-big-Data.db"))
    keys = [key_of("nb-1-big-Data.db", old), key_of("nb-2-big-Data.db", new), key_of("nb-7-big-Data.db", since)]
    for key in keys:
        bench.bucket.delete(key)
    assert [bench.bad()[key]["on_disk"] for key in keys] == [False, True, True]
    text = bench.verify().text
    assert text.count("; the node has it no longer") == 1
    assert [bench.bad(tag="monday")[key]["on_disk"] for key in keys[:1]] == [False]


def test_a_document_is_later_than_all_that_are_there_though_the_store_tells_whole_seconds() -> None:
    door: Any = Door(Shelf())
    keys = [cb.put_dated(door, "node1.listings/bad", {"keys": []}) for _ in range(20)]
    assert keys == sorted(set(keys))
    assert cb.is_utc(keys[0].removeprefix("node1.listings/bad/").removesuffix(".json"))


def test_one_table_at_a_time_is_held() -> None:
    """However many listings a node has: each table is asked for before the next one's listings are read."""
    shelf = Shelf()
    tables = [f"t{number}-{'6b' * 16}" for number in range(5)]
    for table in tables:
        shelf.add(*snapshots("monday", "tuesday", table=table))
    door: Any = Door(shelf)
    cb.verify(cb.Bucket(door, 1), VerifyOptions(node=NODE))
    told = [line.split("/ks/")[1].split("/")[0] for line in door.asked if "/ks/" in line]
    order = [table for number, table in enumerate(told) if table != told[number - 1]]
    assert order == tables
    assert sum(line.startswith("get node1.listings/ks/") for line in door.asked) == 10


def test_a_file_from_before_1970_is_no_trouble(bench: Bench) -> None:
    (monday,) = snapshots("monday")
    old = replace(monday.files[0], fingerprint=Fingerprint(7, monday.files[0].fingerprint.size, -1_000_000_000))
    bench.add(monday)
    bench.add(replace(monday, listed=utc(EPOCH + 1), files=(old, *monday.files[1:])))
    assert bench.bad() == {}
