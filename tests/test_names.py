"""Names: keys, quoting, moments of time, documents as JSON. Pure functions, so properties rather than examples."""

from __future__ import annotations

import json
import os
import re
import string
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as some

from cassbackup import (
    KEY_BYTES,
    NAME_BYTES,
    Clock,
    Corrupt,
    Fingerprint,
    Known,
    Listing,
    ObjectInfo,
    Stored,
    Unit,
    Usage,
    component,
    dump_document,
    dump_listing,
    hex32,
    is_utc,
    later,
    listing_info,
    listing_key,
    load_document,
    load_listing,
    object_key,
    parse_listing_name,
    quote,
    seconds_of,
    size_text,
    sstable_of,
    table_id_of,
    table_prefix,
    unit_of,
    unit_prefix,
    unquote,
    utc,
)

NODE = "node1"

raw_names = some.one_of(
    some.binary(min_size=1, max_size=40),
    some.text(min_size=1, max_size=20).map(lambda text: text.encode("utf-8", "ignore")),
    some.text("%/2Ff~@.é\n", min_size=1, max_size=20).map(str.encode),
).filter(lambda raw: raw not in (b"", b".", b"..") and not {*b"/\0"} & {*raw})
names = raw_names.map(os.fsdecode)
paths = some.lists(names, min_size=1, max_size=6).map("/".join)
moments = some.integers(0, 4_102_444_800 * 10**6).map(lambda micros: utc(micros / 1e6))  # up to the year 2100

# ------------------------------------------------------------------------------------------------------------
# Quoting


@given(raw_names)
@example(b"\xff\xfe%41")
@example("é".encode())
@example(b"%C3%A9")
@example(b"nb-1-big-Data.db")
@example(b"\xc3" * 255)
def test_every_name_that_a_file_system_can_hold_comes_back_from_its_quotation(raw: bytes) -> None:
    name = os.fsdecode(raw)
    assert os.fsencode(unquote(quote(name))) == raw
    assert unquote(quote(name, slash="%2F")) == name


@given(names, names)
def test_a_quotation_is_one_printable_line_of_utf8_and_of_one_name_alone(one: str, other: str) -> None:
    assert quote(one).isprintable()
    quote(one).encode("utf-8")
    assert (quote(one) == quote(other)) == (one == other)


@given(some.text())
@example("\ud800")
def test_no_text_of_a_damaged_document_keeps_quote_from_naming_it(text: str) -> None:
    assert quote(text).isprintable()


@given(paths)
def test_a_path_stays_a_path_or_becomes_one_component(path: str) -> None:
    assert quote(path).count("/") == path.count("/")
    assert "/" not in quote(path, slash="%2F")
    assert unquote(quote(path, slash="%2F")) == path


# ------------------------------------------------------------------------------------------------------------
# Keys


@given(paths, paths, some.sampled_from([NODE, "n" * 200]))
@example("/".join("x" * 255 for _ in range(12)), "é" * 127, NODE)
@example("/".join("é" * 100 for _ in range(12)), "x", "n" * 200)
def test_a_key_keeps_within_the_limits_of_every_store_and_is_of_one_path_alone(one: str, other: str, node: str) -> None:
    key = object_key(node, ("/" + one, "x"))
    assert len(key.encode()) <= KEY_BYTES
    assert all(0 < len(part.encode()) <= NAME_BYTES for part in key.split("/"))
    assert key.startswith(node + "/")
    assert not {".", ".."} & set(key.split("/"))
    assert (key == object_key(node, ("/" + other, "x"))) == (one == other)


@pytest.mark.parametrize("length", [NAME_BYTES, NAME_BYTES + 1, 255])
def test_long_names_that_differ_in_their_last_letter_have_two_keys(length: int) -> None:
    one, other = (object_key(NODE, ("/data", "x" * (length - 1) + last)) for last in "ab")
    assert one != other
    assert ("%%" in one) == (length > NAME_BYTES)
    assert component("x" * length) == one.rpartition("/")[2][:-1] + "x" or length > NAME_BYTES


def test_long_paths_that_differ_in_their_first_directory_have_two_keys() -> None:
    rest = "/".join(["d" * 190] * 6)
    assert object_key(NODE, (f"/one/{rest}", "x")) != object_key(NODE, (f"/two/{rest}", "x"))


def test_names_that_only_look_alike_stay_two() -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert object_key(NODE, ("/data", composed)) != object_key(NODE, ("/data", decomposed))
    assert unquote(quote(decomposed)) == decomposed


def test_a_plain_path_is_its_own_key() -> None:
    directory = "/var/lib/cassandra/data/ks1/users-5a1c/snapshots/daily"
    assert object_key(NODE, (directory, "nb-1-big-Data.db")) == f"{NODE}{directory}/nb-1-big-Data.db"


@pytest.mark.parametrize(
    ("relative", "kind", "tag"),
    [
        ("ks1/users-5a1c/snapshots/daily", "snapshot", "daily"),
        ("ks1/users-5a1c/snapshots/daily/.by_name", "snapshot", "daily"),
        ("ks1/users-5a1c/backups", "incremental", ""),
        ("ks1/users-5a1c/backups/.by_name", "incremental", ""),
        ("ks1/users-5a1c", "archive", "/data/ks1/users-5a1c"),
        ("commitlog_archive", "archive", "/data/commitlog_archive"),
        ("", "archive", "/data"),
    ],
)
def test_a_directory_tells_to_which_unit_it_belongs(relative: str, kind: str, tag: str) -> None:
    unit = unit_of("/data", relative, "20261121T202438.123456Z")
    assert (unit.kind, unit.tag, unit.life) == (kind, tag, "20261121T202438.123456Z")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("nb-1-big-Data.db", ("nb-1-big", "Data.db")),
        ("da-3gqx_0qvb_3t3xc2ljuwqdd3gk4x-bti-Rows.db", ("da-3gqx_0qvb_3t3xc2ljuwqdd3gk4x-bti", "Rows.db")),
        ("ks-users-ka-12-Data.db", ("ks-users-ka-12", "Data.db")),
        ("manifest.json", None),
        ("schema.cql", None),
    ],
)
def test_a_component_names_its_sstable(name: str, split: tuple[str, str] | None) -> None:
    assert sstable_of(name) == split


def test_a_table_directory_is_a_name_and_an_id() -> None:
    assert table_id_of("users-" + "5a" * 16) == ("users", "5a" * 16)
    assert table_id_of("users") == ("users", "")


# ------------------------------------------------------------------------------------------------------------
# Prefixes of listings

words = some.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=12)
keyspaces = words | some.sampled_from(["archive", "bad", "heartbeat", "tags"])
units = some.one_of(
    some.builds(Unit, some.just("snapshot"), keyspaces, words, names, moments),
    some.builds(Unit, some.just("incremental"), keyspaces, words, some.just(""), moments),
    some.builds(Unit, some.just("archive"), some.just(""), some.just(""), paths, moments),
)


def same_listings(one: Unit, other: Unit) -> bool:
    """Tell whether two units are to be listed together."""
    keep = {"snapshot": "kind keyspace table tag life", "incremental": "kind keyspace table", "archive": "kind tag"}
    return all(getattr(one, name) == getattr(other, name) for name in keep[one.kind].split())


@given(units)
def test_no_node_is_the_beginning_of_another(unit: Unit) -> None:
    assert not unit_prefix("node10", unit).startswith((unit_prefix("node1", unit), "node1.listings/", "node1/"))
    others = ("node1/", "node1.listings/", "node1.pending-delete/")
    assert not object_key("node10", ("/var", "x")).startswith(others)


@given(units, units)
@example(Unit("archive", tag="a/b"), Unit("archive", tag="a%2Fb"))
@example(Unit("incremental", "ks", "t"), Unit("incremental", "ks2", "t"))
@example(Unit("incremental", "ks", "t"), Unit("incremental", "ks", "t2"))
def test_two_units_never_share_the_place_of_their_listings(one: Unit, other: Unit) -> None:
    ours, theirs = unit_prefix(NODE, one), unit_prefix(NODE, other)
    if same_listings(one, other):
        assert ours == theirs
    else:
        assert not ours.startswith(theirs)


@given(units)
def test_all_listings_of_a_table_and_of_all_lives_of_a_tag_have_one_prefix(unit: Unit) -> None:
    prefix = unit_prefix(NODE, unit)
    if unit.kind != "archive":
        assert prefix.startswith(table_prefix(NODE, unit.keyspace, unit.table))
    if unit.kind == "snapshot":
        assert prefix == f"{unit_prefix(NODE, replace(unit, life=''))}{unit.life}/"


@pytest.mark.parametrize("word", ["archive", "bad", "heartbeat", "tags"])
def test_a_keyspace_may_be_called_like_a_folder_of_ours(word: str) -> None:
    """Prune deletes what is old below heartbeat/ and bad/: a keyspace's listings must not stand there."""
    for unit in (Unit("incremental", word, "users-5a"), Unit("snapshot", word, "users-5a", "t", utc(1))):
        assert unit_prefix(NODE, unit).startswith(f"{NODE}.listings/%%{word}/users-5a/")


@pytest.mark.parametrize("name", ["owner", "node", "%%tags"])
def test_no_other_keyspace_is_spelt_like_one_of_those(name: str) -> None:
    assert not unit_prefix(NODE, Unit("incremental", name, "t")).startswith(f"{NODE}.listings/%%tags/")


@pytest.mark.parametrize("table", ["t" * 222 + "-" + "5a" * 16, "t" * 300])
def test_a_name_that_a_file_system_can_hold_is_read_from_a_listings_key(table: str) -> None:
    """Of a table that was truncated, its tag tells so: hashed, it would tell nothing."""
    unit = Unit("snapshot", "k" * 222, table, f"truncated-1795970591634-{table[:222]}", utc(1))
    key = listing_key(Listing(NODE, unit, utc(1), utc(2), True, ()))
    found = listing_info(NODE, ObjectInfo(key, 1, "", 0.0))
    assert (found is not None and found.unit == unit) == (len(table) <= 255)
    assert all(len(part) <= 255 for part in key.split("/"))


# ------------------------------------------------------------------------------------------------------------
# Time


@given(moments)
def test_a_moment_comes_back_from_its_spelling(moment: str) -> None:
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z", moment)
    assert is_utc(moment)
    assert utc(seconds_of(moment)) == moment


@given(moments, moments)
@example("20271231T235959.999999Z", "20271231T235959.999999Z")
def test_a_later_moment_is_later_whatever_the_clock_does(moment: str, newest: str) -> None:
    chosen = later(moment, newest)
    assert chosen > newest
    assert seconds_of(chosen) > seconds_of(newest)
    if moment > newest:
        assert chosen == moment


def test_a_clock_only_goes_forward_even_where_that_of_the_system_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(), [1_795_000_000.25] * 1000 + [1_700_000_000.0, 1_795_000_001.0]
    monkeypatch.setattr("cassbackup.time.time", lambda: told.pop(0))
    ticks = [clock() for _ in range(len(told))]
    assert ticks == sorted(set(ticks))
    assert ticks[-1] == utc(1_795_000_001.0)


@pytest.mark.parametrize(
    "moment", ["", "now", "2026-11-21", "20261321T202438.123456Z", "20261121T202438Z", "20261121T202438.123456Z\n"]
)
def test_what_is_no_moment_is_refused(moment: str) -> None:
    assert not is_utc(moment)
    with pytest.raises(ValueError, match=r"is no time|month must be"):
        seconds_of(moment)


# ------------------------------------------------------------------------------------------------------------
# Listings

hex8 = some.integers(0, 2**32 - 1).map(hex32)
sizes = some.integers(0, 2**63 - 1)
fingerprints = some.builds(
    Fingerprint, some.integers(0, 2**64 - 1), sizes, some.integers(-(2**63), 2**63 - 1)
)  # fmt: skip
entries = some.builds(
    Stored,
    directory=paths.map("/".__add__),
    name=names,
    fingerprint=fingerprints,
    mode=some.integers(0, 0o7777),
    user=words,
    group=words,
    crc32=hex8,
    key=paths.map(quote),
    etag=some.text(max_size=40),
)
listings = some.builds(
    Listing,
    node=some.just(NODE),
    unit=units,
    taken=moments,
    listed=moments,
    complete=some.booleans(),
    files=some.lists(entries, max_size=4, unique_by=lambda entry: entry.path).map(tuple),
    missing=some.lists(names, max_size=3).map(tuple),
    lost=some.lists(names, max_size=3).map(tuple),
)


def by_path(listing: Listing[Any]) -> list[Known]:
    files = sorted(listing.files, key=lambda entry: entry.path)
    return [Known(*(getattr(entry, name) for name in Known.__match_args__)) for entry in files]


@given(listings)
@example(Listing(NODE, Unit("incremental", "ks", "users"), utc(1), utc(2), True, ()))
def test_a_listing_comes_back_as_it_was_written_as_what_is_only_known(listing: Listing[Stored]) -> None:
    loaded = load_listing(dump_listing(listing))
    assert by_path(loaded) == list(loaded.files) == by_path(listing)
    for name in ("node", "unit", "taken", "listed", "complete", "missing", "lost", "size"):
        assert getattr(loaded, name) == getattr(listing, name), name
    assert not any(isinstance(entry, Stored) for entry in loaded.files)


@given(listings)
def test_the_key_of_a_listing_tells_what_list_needs(listing: Listing[Stored]) -> None:
    key = listing_key(listing)
    assert key.startswith(unit_prefix(NODE, listing.unit))
    assert parse_listing_name(key) == (listing.listed, listing.complete, len(listing.files), listing.size)


@pytest.mark.parametrize(
    "key",
    [
        "owner.json",
        "node.20261121T202438.123456Z.json",
        "heartbeat/20261121T202438.123456Z.json",
        "x-complete-1-2.json",
        "20261321T202438.123456Z-complete-1-2.json",
        "20261121T202438.123456Z-rollup-1-2.json",
        "20261121T202438.123456Z-complete-1-2.json.tmp",
        "",
    ],
)
def test_other_objects_are_not_taken_for_listings(key: str) -> None:
    assert parse_listing_name(f"{NODE}.listings/{key}") is None


ENTRY = Stored(
    "/data/ks/t-1/snapshots/daily", "nb-1-big-Data.db", Fingerprint(7, 42, 1_795_000_000_123_456_789),
    0o640, "cassandra", "cassandra", "9f3c01aa", "node1/data/x", '"etag"',
)  # fmt: skip
LISTING = Listing(
    NODE, Unit("snapshot", "ks", "t-" + "1" * 32, "daily", utc(1_795_000_000)), utc(1_795_000_000), utc(1_795_000_001),
    True, (ENTRY, replace(ENTRY, name="nb-1-big-TOC.txt")), ("a",), ("b",),
)  # fmt: skip
BODY = dump_listing(LISTING)


def test_a_file_from_before_1970_can_be_listed() -> None:
    """`touch -d '1969-12-31 23:59:59'` on one file once made a listing that nobody could read."""
    old = replace(ENTRY, fingerprint=Fingerprint(7, 42, -1_000_000_000))
    assert load_listing(dump_listing(replace(LISTING, files=(old,)))).files[0].fingerprint.mtime_ns == -1_000_000_000


def well_typed(listing: Listing[Known]) -> bool:
    """Tell whether whatever uses a listing can rely on its types and on what a listing may say."""
    unit = listing.unit
    texts = [listing.node, unit.keyspace, unit.table, unit.tag, unit.life, listing.taken, listing.listed]
    texts += [*listing.missing, *(text for lost in listing.lost for text in lost)]
    numbers = []
    for entry in listing.files:
        texts += [entry.directory, entry.name, entry.user, entry.group, entry.crc32, entry.key, entry.etag]
        numbers += [*entry.fingerprint, entry.mode]
    good = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
    return good and unit.kind in ("snapshot", "incremental", "archive") and listing.complete in (True, False)


@given(some.integers(0, len(BODY) - 1))
def test_a_truncated_listing_is_corrupt(length: int) -> None:
    with pytest.raises(Corrupt):
        load_listing(BODY[:length])


@given(some.integers(0, len(BODY) - 1), some.integers(0, 255))
def test_a_listing_with_a_damaged_byte_is_corrupt_or_at_least_a_listing(place: int, byte: int) -> None:
    try:
        listing = load_listing(BODY[:place] + bytes([byte]) + BODY[place + 1 :])
    except Corrupt:
        return
    assert well_typed(listing)


ANYTHING = [b"", b"null", b"[]", b"0", b'"listing"', b"[" * 100_000, b'{"version": 2}', b"\xff", b'{"version": 1e999}']


@pytest.mark.parametrize("body", ANYTHING, ids=range(len(ANYTHING)))
def test_anything_else_is_corrupt(body: bytes) -> None:
    with pytest.raises(Corrupt):
        load_listing(body)
    if body != b'{"version": 2}':
        with pytest.raises(Corrupt, match=r"bad/x.json (cannot be read|has version)"):
            load_document("node1.listings/bad/x.json", body)


PAGE: dict[str, Any] = json.loads(BODY)
[FOLDER] = PAGE["directories"]
WRONG = [None, True, 3, 1.5, ["x"], {"x": 1}, [[1]], "\0", [{"name": "x"}]]


def changed(change: dict[str, Any], entry: dict[str, Any] | None = None) -> bytes:
    """Return the listing's JSON with some values replaced, or removed where they are `...`."""
    page = json.loads(BODY)
    for target, changes in ((page, change), (page["directories"][FOLDER][0], entry or {})):
        target.update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            del target[name]
    return json.dumps(page).encode()


@pytest.mark.parametrize("name", PAGE)
def test_a_listing_without_a_value_or_with_one_of_a_wrong_type_is_corrupt(name: str) -> None:
    for wrong in (..., *WRONG):
        if type(wrong) is type(PAGE[name]) or (name, wrong) == ("tag", None):  # so is written that there is none
            continue
        try:
            listing = load_listing(changed({name: wrong}))
        except Corrupt:
            continue
        pytest.fail(f"{name} may be {wrong!r}: {listing}")


@pytest.mark.parametrize("name", PAGE["directories"][FOLDER][0])
def test_an_entry_without_a_value_or_with_one_of_a_wrong_type_is_corrupt(name: str) -> None:
    for wrong in (..., *WRONG):
        if type(wrong) is not type(PAGE["directories"][FOLDER][0][name]):
            with pytest.raises(Corrupt):
                load_listing(changed({}, {name: wrong}))


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ({"version": 1}, {}),
        ({"version": True}, {}),
        ({"kind": "full"}, {}),
        ({"life": "yesterday"}, {}),
        ({"life": None}, {}),
        ({"taken": "yesterday"}, {}),
        ({"listed": "yesterday"}, {}),
        ({"complete": "yes"}, {}),
        ({}, {"size": -1}),
        ({}, {"size": 1 << 63}),
        ({}, {"inode": -1}),
        ({}, {"mtime_ns": 1 << 63}),
        ({}, {"crc32": "9F3C01AA"}),
        ({}, {"crc32": "9f3c01aa\n"}),
        ({}, {"mode": "rw"}),
        ({}, {"mode": "-1"}),
        ({}, {"name": ""}),
        ({}, {"name": ".."}),
        ({}, {"name": "a/b"}),
        ({}, {"name": "a%2Fb"}),
        ({}, {"name": "a%00b"}),
    ],
)
def test_what_we_would_not_have_written_is_corrupt(change: dict[str, Any], entry: dict[str, Any]) -> None:
    with pytest.raises(Corrupt):
        load_listing(changed(change, entry))


@given(names, names)
def test_the_directories_of_a_listing_keep_their_names(one: str, other: str) -> None:
    assume(one != other)
    files = tuple(replace(ENTRY, directory=f"/{name}", name=name) for name in (one, other))
    listing = replace(LISTING, files=files)
    assert by_path(load_listing(dump_listing(listing))) == by_path(listing)


# ------------------------------------------------------------------------------------------------------------
# Other documents


def test_a_document_of_version_1_is_refused_with_the_cure_and_a_newer_one_too() -> None:
    with pytest.raises(
        Usage, match=r"owner.json was written by cassbackup 0.1: use another bucket, or another --prefix"
    ):
        load_document("node1.listings/owner.json", b'{"version": 1, "id": "x"}')
    with pytest.raises(Corrupt, match="upgrade this one"):
        load_document("node1.listings/owner.json", b'{"version": 3}')
    body = dump_document(keys=["é"])
    assert load_document("x", body) == {"version": 2, "keys": ["é"]}


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (1 << 30, "1.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_a_size_for_people(size: int, text: str) -> None:
    assert size_text(size) == text
