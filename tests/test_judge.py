"""What may be listed: is a unit complete, is every object there, which life is it, and the commit itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cassbackup import (
    MANIFEST,
    SCHEMA,
    Body,
    BucketView,
    Changed,
    Corrupt,
    Fingerprint,
    Known,
    Listing,
    ObjectInfo,
    Pinned,
    Source,
    Stored,
    StoreOptions,
    Unit,
    Unreachable,
    add_up,
    as_stored,
    check_listing,
    confirm,
    dump_document,
    dump_listing,
    hex32,
    judge_incrementals,
    judge_snapshot,
    known_of,
    lacks_toc_alone,
    listed_incrementals,
    listed_snapshot,
    listing_key,
    newest_document,
    newest_snapshots,
    object_key,
    open_store,
    publish,
    read_bad_keys,
    read_object,
    send_one,
    sstable_in,
    utc,
    view_bucket,
)

NODE = "node1"
TABLE = "users-5a1c395ab8a511efa66dd5ba1d8d3a9f"
BIG = ("CRC.db", "Data.db", "Digest.crc32", "Filter.db", "Index.db", "Statistics.db", "Summary.db", "TOC.txt")
BTI = ("Data.db", "Filter.db", "Partitions.db", "Rows.db", "Statistics.db", "TOC.txt")
T0 = 1_795_000_000  # some second of 2026
LIFE = utc(T0)


class Recording:
    """A store that tells what it was asked for, and can be made to misbehave."""

    def __init__(self, folder: Path) -> None:
        self._store = open_store(f"file://{folder}", StoreOptions())
        self.url = self._store.url
        self.asked: Counter[str] = Counter()
        self.log: list[str] = []
        self.heads: dict[str, ObjectInfo | None] = {}  # what is told in place of the truth
        self.clock = 1_795_000_000.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._store, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            self.asked[name] += 1
            self.log.append(f"{name} {args[0] if args and isinstance(args[0], str) else ''}")
            return call(*args, **kwargs)

        return asked

    def put_all(self, items: list[tuple[str, Source]]) -> Any:
        self.log += [f"put {key}" for key, _ in items]
        return self._store.put_all(items)

    def head(self, key: str) -> ObjectInfo | None:
        self.asked["head"] += 1
        return self.heads[key] if key in self.heads else self._store.head(key)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self.asked["list"] += 1
        for info in self._store.list(prefix, after):
            told = self.heads.get(info.key, info)
            if told:
                yield told

    def now(self) -> float:
        return self.clock

    def objects(self) -> dict[str, bytes]:
        return {info.key: read_object(self._store, info.key) for info in self._store.list("")}

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._store.delete(key)


class Scene:
    """A data directory with hard links as pins, and a bucket."""

    def __init__(self, folder: Path) -> None:
        self.data, self.pinned = folder / "data" / "ks" / TABLE, folder / "pins"
        self.pinned.mkdir()
        self.store: Any = Recording(folder / "bucket")
        self.put_json("owner.json", id="life-of-the-bucket", machine_id="m")

    def put_json(self, name: str, **values: Any) -> str:
        folder = "listings"
        if "keys" in values and not name.startswith("bad/"):
            folder = "pending-delete"
        self.store._store.put(f"{NODE}.{folder}/{name}", Body(dump_document(**values)))
        return f"{NODE}.{folder}/{name}"

    def write(self, place: str, name: str, body: bytes, mtime: float = T0) -> Path:
        path = self.data / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        os.utime(path, ns=(int(mtime * 1e9), int(mtime * 1e9)))
        return path

    def flush(
        self, place: str, sstable: str = "nb-1-big", components: Iterable[str] = BIG, toc: Iterable[str] = ()
    ) -> None:
        """Write an SSTable, as Cassandra would."""
        components = list(components)
        for component in components:
            body = f"{place}/{sstable}-{component}".encode()
            if component == "TOC.txt":
                body = "\n".join(toc or components).encode()
            self.write(place, f"{sstable}-{component}", body)

    def manifest(self, tag: str, *names: str, mtime: float = T0 + 1) -> None:
        self.write(f"snapshots/{tag}", MANIFEST, json.dumps({"files": names}).encode(), mtime)

    def pins(self, place: str = "") -> dict[tuple[str, str], Pinned]:
        """Pin whatever is below a directory."""
        found = {}
        for folder, _, names in os.walk(self.data / place):
            for name in names:
                info = os.lstat(f"{folder}/{name}")
                pin = self.pinned / f"{info.st_ino}-{info.st_mtime_ns}"
                if not pin.exists():
                    os.link(f"{folder}/{name}", pin)
                who = (0o640, info.st_uid, info.st_gid, 2)
                found[folder, name] = Pinned(folder, name, Fingerprint.of(info), *who, str(pin), "disk1")
        return found

    def send(self, pins: Mapping[tuple[str, str], Pinned]) -> list[Stored]:
        return [send_one(self.store, pin, object_key(NODE, path), utc(T0)) for path, pin in pins.items()]

    def view(self, before: BucketView | None = None) -> BucketView:
        return view_bucket(self.store, NODE, before)

    def draft(
        self, unit: Unit, entries: Iterable[Known], listed: float = T0 + 10, complete: bool = True
    ) -> Listing[Known]:
        return Listing(NODE, unit, utc(T0), utc(listed), complete, tuple(entries))

    def publish(
        self, draft: Listing[Known], pins: Mapping[tuple[str, str], Pinned] | None = None, asked: Iterable[str] = ()
    ) -> Listing[Stored]:
        return publish(self.store, self.view(), draft, pins or {}, set(asked), utc(T0 + 77))

    def listings(self) -> list[Listing[Known]]:
        found = []
        for key, body in self.store.objects().items():
            if "complete-" in key:
                found.append(check_listing(NODE, key, body))
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


SNAPSHOT = Unit("snapshot", "ks", TABLE, "daily", LIFE)
BACKUPS = Unit("incremental", "ks", TABLE)


def read(path: tuple[str, str]) -> bytes:
    return Path(*path).read_bytes()


# ------------------------------------------------------------------------------------------------------------
# Is a snapshot complete


def verdict(scene: Scene, tag: str = "daily", scanned: bool = False) -> tuple[list[str], list[str]]:
    """Return what a snapshot lacks, and what is not of it."""
    found = judge_snapshot(list(scene.pins(f"snapshots/{tag}")), read, scanned)
    return found.missing, sorted(os.path.join(*path).rpartition(f"/{tag}/")[2] for path in found.strays)


@pytest.mark.parametrize("tag", ["daily", "snapshots", ".x", "backups"])
def test_a_snapshot_with_all_that_its_manifest_names_is_complete(scene: Scene, tag: str) -> None:
    scene.flush(f"snapshots/{tag}")
    scene.flush(f"snapshots/{tag}/.idx", "nb-7-big")
    scene.flush(f"snapshots/{tag}", "da-3gxx_0abc_1defg2hijklmnopqrs-bti", BTI)
    scene.write(f"snapshots/{tag}", SCHEMA, b"CREATE TABLE")
    names = ("nb-1-big-Data.db", "da-3gxx_0abc_1defg2hijklmnopqrs-bti-Data.db", ".idx/nb-7-big-Data.db")
    scene.manifest(tag, *names)
    assert verdict(scene, tag) == verdict(scene, tag, scanned=True) == ([], [])


def test_an_empty_table_has_a_complete_snapshot_and_one_without_manifest_has_none(scene: Scene) -> None:
    scene.manifest("daily")
    assert verdict(scene) == ([], [])
    scene.flush("snapshots/bare")
    assert verdict(scene, "bare", scanned=True) == ([MANIFEST], [])


@pytest.mark.parametrize(
    "body", [b"", b'{"files": ["nb-1-big', b"[]", b'{"other": 1}', b'{"files": null}', b"\xff", b"7"]
)
def test_a_manifest_that_is_still_being_written_says_nothing(scene: Scene, body: bytes) -> None:
    scene.flush("snapshots/daily")
    scene.write("snapshots/daily", MANIFEST, body)
    assert verdict(scene, scanned=True) == ([MANIFEST], [])


def test_manifests_of_two_data_directories_count_together(scene: Scene, tmp_path: Path) -> None:
    scene.flush("snapshots/daily")
    scene.manifest("daily", "nb-1-big-Data.db")
    other = tmp_path / MANIFEST
    files = [*scene.pins("snapshots/daily"), (str(tmp_path), MANIFEST)]
    other.write_text(json.dumps({"files": ["nb-2-big-Data.db"]}))
    assert judge_snapshot(files, read, True).missing == ["nb-2-big-Data.db"]
    other.write_text("")
    assert judge_snapshot(files, read, True).missing == [MANIFEST]


@pytest.mark.parametrize("scanned", [False, True])
def test_a_data_file_that_the_manifest_names_must_be_there(scene: Scene, scanned: bool) -> None:
    scene.flush("snapshots/daily")
    scene.flush("snapshots/daily/.idx", components=[name for name in BIG if name != "Data.db"])
    scene.manifest("daily", "nb-1-big-Data.db", "nb-2-big-Data.db", ".idx/nb-1-big-Data.db")
    assert verdict(scene, scanned=scanned)[0] == [".idx/nb-1-big-Data.db", "nb-2-big-Data.db"]


@pytest.mark.parametrize("component", [*BIG, "CompressionInfo.db"])
def test_once_the_tag_is_cleared_the_toc_decides(scene: Scene, component: str) -> None:
    """Every component counts then but for optional ones; a scan that missed nothing needs what Cassandra needs."""
    big = [name for name in BIG if name != "CRC.db"] + ["CompressionInfo.db"]
    scene.flush("snapshots/daily", components=[name for name in big if name != component], toc=[*big, "SAI+aa+Meta.db"])
    scene.manifest("daily", "nb-1-big-Data.db")
    optional = component in ("CRC.db", "Digest.crc32", "Filter.db", "Summary.db")
    assert verdict(scene)[0] == ([] if optional or component == "TOC.txt" else [f"nb-1-big-{component}"])
    # A clear that was broken off leaves a part.
    is_needed = component in ("Data.db", "Index.db", "Statistics.db", "CompressionInfo.db")
    assert verdict(scene, scanned=True)[0] == ([f"nb-1-big-{component}"] if is_needed else [])


def test_what_the_manifest_does_not_name_is_not_of_the_snapshot(scene: Scene) -> None:
    scene.flush("snapshots/daily")
    scene.flush("snapshots/daily", "nb-2-big", ["Data.db", "TOC.txt"])
    scene.flush("snapshots/daily/.idx", "nb-1-big", ["Data.db"])
    scene.write("snapshots/daily", "notes.txt", b"")
    scene.write("snapshots/daily", SCHEMA, b"")
    scene.manifest("daily", "nb-1-big-Data.db")
    assert verdict(scene) == ([], [".idx/nb-1-big-Data.db", "nb-2-big-Data.db", "nb-2-big-TOC.txt"])


@pytest.mark.parametrize(
    ("name", "sstable"),
    [
        ("nb-1-big-Data.db", "nb-1-big"),
        (".idx/nb-1-big-TOC.txt", ".idx/nb-1-big"),
        ("/d/ks/t/backups/ks-t-ka-12-Data.db", "/d/ks/t/backups/ks-t-ka-12"),
        ("da-3gxx_0abc_1defg2hijklmnopqrs-bti-SAI+aa+Meta.db", "da-3gxx_0abc_1defg2hijklmnopqrs-bti"),
        (MANIFEST, ""),
        ("/d/nb-1-big-x/" + SCHEMA, ""),
    ],
)
def test_to_which_sstable_a_component_belongs(name: str, sstable: str) -> None:
    assert sstable_in(name) == sstable


# ------------------------------------------------------------------------------------------------------------
# Are incrementals complete


def lacking(scene: Scene) -> dict[str, list[str]]:
    found = judge_incrementals(list(scene.pins("backups")), read)
    root = f"{scene.data}/backups/"
    return {name.removeprefix(root): [missing.removeprefix(root) for missing in names] for name, names in found.items()}


def test_each_sstable_of_backups_is_judged_by_itself(scene: Scene) -> None:
    scene.flush("backups", "nb-1-big")
    scene.flush("backups", "nb-10-big", [name for name in BIG if name != "Statistics.db"], toc=BIG)
    scene.flush("backups", "nb-2-big", ["Data.db", "Index.db"])
    scene.flush("backups/.idx", "nb-1-big", ["TOC.txt"], toc=["TOC.txt", "Data.db", "Filter.db"])
    scene.write("backups", "stray.tmp", b"")
    assert lacking(scene) == {
        "nb-10-big": ["nb-10-big-Statistics.db"],
        "nb-2-big": [f"nb-2-big-{one}" for one in ("CompressionInfo.db", "Statistics.db", "TOC.txt")],
        ".idx/nb-1-big": [f".idx/nb-1-big-{one}" for one in ("Data.db", "Index.db", "Statistics.db")],
    }


@pytest.mark.parametrize("toc", [b"", b"\n"])
def test_a_toc_that_a_power_cut_left_empty_makes_nothing_whole(scene: Scene, toc: bytes) -> None:
    scene.flush("backups", "nb-1-big", ["Data.db"])
    scene.write("backups", "nb-1-big-TOC.txt", toc)
    assert lacking(scene) == {
        "nb-1-big": [f"nb-1-big-{one}" for one in ("CompressionInfo.db", "Index.db", "Statistics.db")]
    }


@pytest.mark.parametrize(
    ("sstable", "components", "lacks"),
    [
        ("nb-1-big", "Data.db Index.db Statistics.db CompressionInfo.db", ""),
        ("nb-1-big", "Data.db Index.db Statistics.db CRC.db", ""),
        ("nb-1-big", "Data.db Index.db Statistics.db Summary.db Filter.db", "CompressionInfo.db"),
        ("nb-1-big", "Data.db CRC.db", "Index.db Statistics.db"),
        ("da-1-bti", "Data.db Partitions.db Rows.db Statistics.db CompressionInfo.db", ""),
        ("da-1-bti", "Data.db Partitions.db Statistics.db CompressionInfo.db", "Rows.db"),
        ("ks-t-ka-1", "Data.db Statistics.db CompressionInfo.db", "Index.db"),
        ("xx-1-new", "Data.db CompressionInfo.db", ""),
    ],
)
def test_an_sstable_that_was_streamed_without_a_toc_needs_what_cassandra_could_not_open_it_without(
    scene: Scene, sstable: str, components: str, lacks: str
) -> None:
    scene.flush("backups", sstable, components.split())
    names = sorted(f"{sstable}-{component}" for component in [*lacks.split(), "TOC.txt"])
    assert lacking(scene) == {sstable: names}
    assert lacks_toc_alone(names) == (not lacks)
    scene.flush("snapshots/daily", sstable, components.split())
    scene.manifest("daily", f"{sstable}-Data.db")
    assert verdict(scene)[0] == (names if lacks else [])


def test_a_toc_that_grew_for_an_index_asks_for_nothing_more(scene: Scene) -> None:
    scene.flush("backups", toc=[*BIG, "SI_by_name.db", "SAI+aa+GroupMeta.db", "Digest.sha1"])
    assert lacking(scene) == {}


# ------------------------------------------------------------------------------------------------------------
# From Known to Stored


def as_known(entry: Known, **changes: Any) -> Known:
    return replace(Known(*[getattr(entry, name) for name in Known.__dataclass_fields__]), **changes)


@pytest.fixture
def stored(scene: Scene) -> list[Stored]:
    scene.flush("backups")
    return scene.send(scene.pins("backups"))


def test_p1_what_is_there_as_recorded_becomes_stored(scene: Scene, stored: list[Stored]) -> None:
    known = [as_known(entry) for entry in stored]
    assert confirm(scene.store, known, frozenset()) == (stored, [])
    assert scene.store.asked["head"] == 0, "one LIST tells it"


def test_p1_what_is_absent_or_has_another_size_is_gone(scene: Scene, stored: list[Stored]) -> None:
    scene.store.delete(stored[0].key)
    known = [as_known(stored[0])]
    known.append(as_known(stored[1], fingerprint=stored[1].fingerprint._replace(size=99)))
    known.append(as_known(stored[2], key=f"{NODE}/elsewhere/x"))
    known.append(as_known(stored[3]))
    assert confirm(scene.store, known, frozenset()) == ([stored[3]], known[:3])


@pytest.mark.parametrize("tells", [True, False])
def test_p1_under_another_etag_the_checksum_decides(scene: Scene, stored: list[Stored], tells: bool) -> None:
    """An operator has copied the bucket; some servers know no CRC-32, and their bytes are read."""
    for entry in stored:
        info = scene.store._store.head(entry.key)
        scene.store.heads[entry.key] = replace(info, etag="other", crc32=entry.crc32 if tells else "")
    bad = as_known(stored[1], crc32="00000000")
    found, gone = confirm(scene.store, [as_known(stored[0]), bad], frozenset())
    assert (found, gone) == ([stored[0]], [bad])
    assert scene.store.asked["get"] == (0 if tells else 2)


def test_p1_a_key_that_is_doomed_is_gone_whoever_has_spoken_for_it(scene: Scene, stored: list[Stored]) -> None:
    doomed = frozenset({stored[0].key})
    found, gone = confirm(scene.store, stored, doomed, [entry.key for entry in stored])
    assert (found, gone) == (stored[1:], [stored[0]])


def test_what_was_asked_lately_is_not_asked_again(scene: Scene, stored: list[Stored]) -> None:
    scene.store.asked.clear()
    assert confirm(scene.store, stored, frozenset(), [entry.key for entry in stored]) == (stored, [])
    assert not scene.store.asked
    confirm(scene.store, stored, frozenset(), [entry.key for entry in stored[2:]])
    assert scene.store.asked == {"head": 2}


def test_p1_a_stored_of_yesterday_is_asked_for_again(scene: Scene, stored: list[Stored]) -> None:
    """A publication may be tried for days, while prune deletes what its first try knew."""
    scene.store.delete(stored[0].key)
    assert confirm(scene.store, stored, frozenset()) == (stored[1:], [stored[0]])


def test_a_folder_with_a_year_of_backups_is_not_listed_to_its_end(scene: Scene) -> None:
    names = [f"{number:05}" for number in range(40)]
    for name in names:
        scene.store.put(f"{NODE}/b/{name}", Body(b"x"))
    listed = []
    real = scene.store.list

    def count(prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        for info in real(prefix, after):
            listed.append(info.key)
            yield info

    scene.store.list = count
    entry = Known("/d", "f", Fingerprint(1, 1, 1), 0o644, "u", "g", hex32(0x8CDC1683), "", "")
    known = [replace(entry, key=f"{NODE}/b/{name}") for name in names[10:15]]
    found, gone = confirm(scene.store, known, frozenset())
    assert ([one.key for one in found], gone) == ([one.key for one in known], [])
    assert [key.rpartition("/")[2] for key in listed] == names[10:16]


# ------------------------------------------------------------------------------------------------------------
# What the bucket says


def test_a_view_tells_whose_bucket_it_is_and_what_must_not_be_named(scene: Scene) -> None:
    first = scene.view()
    assert (first.owner, first.doomed, first.verified) == ("life-of-the-bucket", frozenset(), 0.0)
    scene.put_json("20261121T000000.000000Z.json", keys=[f"{NODE}/a"])
    scene.put_json("20261122T000000.000000Z.json", keys=[f"{NODE}/b"], deleted=True)
    scene.put_json("bad/20261121T000000.000000Z.json", keys=[{"key": f"{NODE}/c", "found": "size", "at": ""}])
    view = scene.view(first)
    assert (view.doomed, view.bad) == ({f"{NODE}/{name}" for name in "abc"}, {f"{NODE}/c"})
    assert view.verified > 0
    scene.put_json("bad/20261122T000000.000000Z.json", keys=[{"key": f"{NODE}/c", "found": "good", "at": ""}])
    assert scene.view(view).bad == frozenset()


def test_a_view_reads_only_what_is_new(scene: Scene) -> None:
    key = scene.put_json("20261121T000000.000000Z.json", keys=[f"{NODE}/a"])
    view = scene.view()
    scene.store.asked.clear()
    scene.store.clock += 60
    assert scene.view(view) == replace(view, read=view.read + 60)
    assert "get" not in scene.store.asked
    scene.store.delete(key, f"{NODE}.listings/owner.json")
    again = scene.view(view)
    assert (again.owner, again.doomed) == ("", frozenset())


def test_a_bucket_that_was_made_anew_within_a_minute_has_another_owner(scene: Scene) -> None:
    view = scene.view()
    scene.store.delete(f"{NODE}.listings/owner.json")
    scene.put_json("owner.json", id="another-life-bucket", machine_id="m")
    assert scene.view(view).owner == "another-life-bucket"


def test_the_newest_document_counts_whatever_else_begins_like_it(scene: Scene) -> None:
    assert newest_document(scene.store, f"{NODE}.listings/node.") == {}
    for name, value in (
        ("owner.20261121T000000.000000Z", "2"),
        ("owner.20261122T000000.000000Z", "3"),
        ("owners", "4"),
    ):
        scene.put_json(f"{name}.json", id=value)
    assert newest_document(scene.store, f"{NODE}.listings/owner.")["id"] == "3"


@pytest.mark.parametrize("keys", [None, "x", ["node2/a"], ["node10/a"], [1], ["node1"], {"node1/a": 1}])
def test_p7_marks_of_another_node_stop_everything(scene: Scene, keys: object) -> None:
    scene.store.put(f"{NODE}.pending-delete/x.json", Body(dump_document(keys=keys)))
    with pytest.raises(Corrupt):
        scene.view()


@pytest.mark.parametrize("keys", [None, "x", [1], [{"key": "a"}], [{"key": [], "found": "size"}]])
def test_marks_that_cannot_be_read_are_corrupt(scene: Scene, keys: object) -> None:
    scene.store.put(f"{NODE}.listings/bad/x.json", Body(dump_document(keys=keys)))
    with pytest.raises(Corrupt):
        read_bad_keys(scene.store, NODE)


# ------------------------------------------------------------------------------------------------------------
# What is listed already


def snapshot(scene: Scene) -> tuple[dict[tuple[str, str], Pinned], list[Stored]]:
    scene.flush("snapshots/daily")
    scene.manifest("daily", "nb-1-big-Data.db")
    pins = scene.pins("snapshots/daily")
    return pins, scene.send(pins)


def before(scene: Scene, pins: Mapping[tuple[str, str], Pinned], life: str = LIFE) -> Any:
    return listed_snapshot(scene.store, NODE, scene.view(), replace(SNAPSHOT, life=life), pins)


def nothing(life: str, covered: bool = False) -> tuple[Listing[Known], bool]:
    return Listing(NODE, replace(SNAPSHOT, life=life), "", "", False, ()), covered


def test_a_snapshot_that_nobody_listed_is_called_after_its_manifest(scene: Scene) -> None:
    pins, _ = snapshot(scene)
    assert before(scene, pins) == nothing(utc(T0 + 1))
    without = {path: pin for path, pin in pins.items() if path[1] != MANIFEST}
    assert before(scene, without) == nothing(LIFE)


def test_a_snapshot_is_recognized_by_its_manifest_when_all_memory_is_lost(scene: Scene) -> None:
    """Under whatever name it is listed, and whatever our pin directory is called."""
    pins, entries = snapshot(scene)
    for life in (utc(T0 + 1), utc(T0 + 500)):
        scene.publish(scene.draft(replace(SNAPSHOT, life=life), entries), pins)
        found = before(scene, pins, utc(T0 + 900))
        assert found.listing.unit.life == life
        assert {entry.path for entry in found.listing.files} == set(pins)
        assert found.listing.complete
        scene.store.delete(*[key for key in scene.store.objects() if "-complete-" in key])


def test_what_was_listed_before_its_manifest_came_keeps_its_name(scene: Scene) -> None:
    pins, entries = snapshot(scene)
    first = [entry for entry in entries if entry.name != MANIFEST]
    scene.publish(scene.draft(SNAPSHOT, first, complete=False), pins)
    found = before(scene, pins)
    assert (found.listing.unit.life, found.listing.complete, found.covered) == (LIFE, False, False)
    scene.publish(scene.draft(SNAPSHOT, entries, listed=T0 + 20), pins)
    found = before(scene, pins)
    assert (found.listing.unit.life, found.listing.complete) == (LIFE, True)
    assert len(found.listing.files) == len(pins)


def test_a_tag_that_was_taken_again_is_another_life_though_its_sstables_are_the_same(scene: Scene) -> None:
    pins, entries = snapshot(scene)
    scene.publish(scene.draft(replace(SNAPSHOT, life=utc(T0 + 1)), entries), pins)
    os.unlink(scene.data / "snapshots/daily" / MANIFEST)
    scene.manifest("daily", "nb-1-big-Data.db", mtime=T0 + 3600)
    again = scene.pins("snapshots/daily")
    assert before(scene, again, utc(T0 + 3600)) == nothing(utc(T0 + 3600))


def test_a_remnant_whose_files_are_all_in_a_complete_listing_is_covered(scene: Scene) -> None:
    pins, entries = snapshot(scene)
    scene.publish(scene.draft(replace(SNAPSHOT, life=utc(T0 + 1)), entries), pins)
    remnant = {path: pin for path, pin in pins.items() if path[1] != MANIFEST}
    assert before(scene, remnant, utc(T0 + 900)) == nothing(utc(T0 + 900), covered=True)
    scene.store.delete(entries[0].key)
    assert before(scene, remnant, utc(T0 + 900)).covered is False, "one of these objects is gone"


@pytest.mark.parametrize("how", ["absent", "pending", "bad"])
def test_an_entry_whose_object_is_gone_or_doomed_counts_as_not_listed(scene: Scene, how: str) -> None:
    """So that it is stored and listed again, as `verify --repair` promises."""
    pins, entries = snapshot(scene)
    life = utc(T0 + 1)
    scene.publish(scene.draft(replace(SNAPSHOT, life=life), entries), pins)
    key = entries[0].key
    if how == "absent":
        scene.store.delete(key)
    elif how == "pending":
        scene.put_json("20261121T000000.000000Z.json", keys=[key])
    else:
        scene.put_json("bad/20261121T000000.000000Z.json", keys=[{"key": key, "found": "checksum", "at": ""}])
    found = before(scene, pins)
    assert (found.listing.unit.life, found.listing.complete) == (life, False)
    assert {entry.key for entry in found.listing.files} == {entry.key for entry in entries[1:]}
    listing = scene.publish(scene.draft(replace(SNAPSHOT, life=life), entries, listed=T0 + 20), pins)
    assert (listing.complete, len(listing.files)) == (True, len(pins))
    assert before(scene, pins).listing.complete


def test_incrementals_that_an_earlier_process_listed_are_recognized(scene: Scene) -> None:
    old = scene.write("backups", "nb-1-big-Data.db", b"old", mtime=T0 - 1000)
    new = scene.write("backups", "nb-2-big-Data.db", b"new", mtime=T0)
    scene.write("backups", "nb-3-big-Data.db", b"late", mtime=T0)
    pins = scene.pins("backups")
    entries = {entry.name: entry for entry in scene.send(pins)}
    scene.publish(scene.draft(BACKUPS, [entries[old.name]], listed=T0 - 900))
    scene.publish(scene.draft(BACKUPS, [entries[new.name]], listed=T0 + 1))
    listings, listed = listed_incrementals(scene.store, NODE, scene.view(), BACKUPS, pins)
    assert len(listings) == 2
    assert {entry.name for entry in listed} == {old.name, new.name}
    fewer = {path: pin for path, pin in pins.items() if path[1] != old.name}
    listings, listed = listed_incrementals(scene.store, NODE, scene.view(), BACKUPS, fewer)
    assert (len(listings), [entry.name for entry in listed]) == (1, [new.name]), "a listing is younger than its files"
    scene.store.delete(entries[new.name].key)
    assert listed_incrementals(scene.store, NODE, scene.view(), BACKUPS, pins)[1] == [entries[old.name]]
    os.utime(old, ns=(1, 1))  # a generation that came again
    assert listed_incrementals(scene.store, NODE, scene.view(), BACKUPS, scene.pins("backups"))[1] == []


def test_the_newest_complete_snapshot_of_a_table_is_found_and_what_is_incomplete_since(scene: Scene) -> None:
    assert newest_snapshots(scene.store, NODE, BACKUPS) == []
    pins, entries = snapshot(scene)
    told = []
    for tag, complete in (("y", False), ("z", True), ("a", True), ("b", False), ("x", False)):
        listed = T0 + 10 * len(told)
        scene.publish(scene.draft(replace(SNAPSHOT, tag=tag), entries, listed, complete), pins)
        told.append([one.unit.tag for one in newest_snapshots(scene.store, NODE, BACKUPS)])
    assert told == [["y"], ["z"], ["a"], ["a", "b"], ["a", "x"]]


def damaged(scene: Scene, change: Callable[[bytes], bytes]) -> tuple[str, bytes]:
    _, entries = snapshot(scene)
    draft = scene.draft(SNAPSHOT, entries)
    listing: Any = replace(draft, files=tuple(entries))
    return listing_key(listing), change(dump_listing(listing))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"{", b""),
        (b'"node":"node1"', b'"node":"node2"'),
        (b'"key":"node1/', b'"key":"node2/'),
        (b'"key":"node1/', b'"key":"node1/../node2/'),
        (b'"key":"node1/', b'"key":"node1//'),
        (b'"key":"node1/', b'"key":"node1/\\n'),
        (b'"key":"node1/', b'"key":"node1/\\ud800'),
        (b'"etag":"', b'"etag":"\\t'),
        (b'"key":"node1/', b'"key":"node1/' + b"x" * 256),
        (b'"tag":"daily"', b'"tag":"other"'),
        (b'"complete":true', b'"complete":false'),
    ],
)
def test_p1_a_listing_that_is_not_what_its_key_says_does_not_count(scene: Scene, old: bytes, new: bytes) -> None:
    key, body = damaged(scene, lambda body: body.replace(old, new, 1))
    with pytest.raises(Corrupt):
        check_listing(NODE, key, body)
    scene.store.put(key, Body(body))
    assert before(scene, scene.pins("snapshots/daily")).listing.files == ()
    assert newest_snapshots(scene.store, NODE, BACKUPS) == []


def test_of_listings_of_one_unit_the_later_entry_counts_and_any_completes(scene: Scene) -> None:
    _, entries = snapshot(scene)
    first = scene.draft(SNAPSHOT, [as_known(entry, key=f"{NODE}/old") for entry in entries[:3]])
    second = scene.draft(SNAPSHOT, entries[1:], listed=T0 + 20, complete=False)
    both = add_up([first, second])
    assert both
    assert (both.complete, both.listed, len(both.files)) == (True, second.listed, len(entries))
    assert [entry.path for entry in both.files if entry.key == f"{NODE}/old"] == [entries[0].path]
    assert add_up([]) is None


# ------------------------------------------------------------------------------------------------------------
# The commit


def test_p1_a_listing_is_put_last_and_says_what_was_drafted(scene: Scene) -> None:
    pins, entries = snapshot(scene)
    draft = scene.draft(SNAPSHOT, [as_known(entry) for entry in entries])
    listing = scene.publish(draft, pins)
    assert listing == replace(draft, files=tuple(entries))
    assert scene.listings() == [replace(draft, files=tuple(sorted(draft.files, key=lambda entry: entry.path)))]
    assert scene.store.log[-1] == f"put {listing_key(listing)}"


def test_p3_what_is_doomed_is_stored_again_under_a_key_never_used_before(scene: Scene) -> None:
    pins, entries = snapshot(scene)
    scene.put_json("20261121T000000.000000Z.json", keys=[entries[0].key], deleted=False)
    scene.put_json("bad/20261121T000000.000000Z.json", keys=[{"key": entries[1].key, "found": "size", "at": ""}])
    scene.store.delete(entries[2].key)
    old = scene.store.objects()
    draft = scene.draft(SNAPSHOT, entries)
    listing = scene.publish(draft, pins, asked=[entry.key for entry in entries[:2]])
    assert listing.complete
    assert {entry.path: entry.fingerprint for entry in listing.files} == {e.path: e.fingerprint for e in entries}
    renamed = {entry.key for entry in listing.files} - {entry.key for entry in entries}
    assert renamed == {f"{entry.key}@{utc(T0 + 77)}" for entry in entries[:3]}
    objects = scene.store.objects()
    assert {key: objects[key] for key in old} == old
    assert all(objects[f"{entry.key}@{utc(T0 + 77)}"] == read(entry.path) for entry in entries[:3])
    assert scene.store.log[-1].startswith(f"put {NODE}.listings/"), "the listing comes last"


def test_p2_what_is_gone_everywhere_is_named_as_missing(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Its pin is of other bytes by now, or there is none."""
    pins, entries = snapshot(scene)
    for entry in entries[:2]:
        scene.store.delete(entry.key)
    del pins[entries[0].path]
    other = pins[entries[1].path]
    pins[entries[1].path] = replace(other, fingerprint=other.fingerprint._replace(inode=1))
    listing = scene.publish(scene.draft(SNAPSHOT, entries), pins)
    assert listing.files == tuple(entries[2:])
    assert (listing.complete, listing.missing) == (False, (entries[0].name, entries[1].name))
    assert all(entry.name in caplog.text for entry in entries[:2])
    assert scene.listings()[0].missing == listing.missing


def test_p1_a_file_that_changes_while_it_is_stored_again_is_not_listed(scene: Scene) -> None:
    pins, entries = snapshot(scene)
    scene.store.delete(entries[0].key)
    os.truncate(pins[entries[0].path].pin, 1)
    with pytest.raises(Changed):
        scene.publish(scene.draft(SNAPSHOT, entries), pins)
    assert scene.listings() == []


def test_p1_what_we_could_not_read_again_is_not_written(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    pins, entries = snapshot(scene)

    def misspelt(listing: Any) -> bytes:
        return dump_listing(listing).replace(b'"crc32":"', b'"crc32":"x')

    monkeypatch.setattr("cassbackup.dump_listing", misspelt)
    with pytest.raises(Corrupt):
        scene.publish(scene.draft(SNAPSHOT, entries), pins)
    assert scene.listings() == []


def test_p1_a_publication_of_more_than_an_hour_is_done_again(scene: Scene) -> None:
    """Prune may have marked, and a day later deleted, what this one had asked for."""
    pins, entries = snapshot(scene)
    view = scene.view()
    scene.store.clock += 3601
    scene.store.delete(entries[0].key)
    with pytest.raises(Unreachable, match="hour"):
        publish(scene.store, view, scene.draft(SNAPSHOT, entries), pins, set(), utc(T0 + 77))
    again = scene.store.objects()
    listing = scene.publish(scene.draft(SNAPSHOT, entries, listed=T0 + 20), pins)
    assert len(scene.listings()) == 2
    assert listing.complete
    assert scene.store.objects() == {**again, listing_key(listing): dump_listing(listing)}, "sent twice"


def test_a_file_that_is_known_of_its_pin_is_called_by_its_key(scene: Scene) -> None:
    pins, entries = snapshot(scene)
    for entry in entries:
        known = known_of(pins[entry.path], entry.key, entry.etag, entry.crc32)
        assert type(known) is Known
        assert as_stored(known) == entry
