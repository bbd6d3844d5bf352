"""Names: keys, quoting, moments of time, listings as JSON. Pure functions, so properties rather than examples."""

from __future__ import annotations

import json
import os
import re
import string
import unicodedata
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as some

from cassbackup import (
    KEY_BYTES,
    NAME_BYTES,
    Corrupt,
    Listing,
    Stamp,
    Stored,
    Unit,
    Usage,
    check_node,
    crc32_combine,
    dump_listing,
    later,
    listing_name,
    listings_of,
    load_listing,
    object_key,
    parse_listing_name,
    parse_pin_directory,
    pin_directory,
    quote,
    rfc3339,
    seconds_of,
    sstable_of,
    table_id_of,
    unit_of,
    unquote,
    utc,
    utc_of,
)

NODE = "node1"
NOT_IN_A_NAME = (b"/", b"\0")


def is_name(raw: bytes) -> bool:
    """Tell whether a directory can hold this name."""
    return not any(byte in raw for byte in NOT_IN_A_NAME) and raw not in (b".", b"..")


raw_names = some.one_of(
    some.binary(min_size=1, max_size=255),
    some.text(min_size=1, max_size=60).map(lambda text: text.encode("utf-8", "ignore")),
    some.text("%/2Ff~@.é\n", min_size=1, max_size=20).map(str.encode),
).filter(lambda raw: raw and is_name(raw))
names = raw_names.map(os.fsdecode)
paths = some.lists(names, min_size=1, max_size=12).map("/".join)
moments = some.integers(0, 4_102_444_800 * 10**6).map(lambda micros: micros / 1e6)  # up to the year 2100
stamps_of_time = moments.map(utc)

# ------------------------------------------------------------------------------------------------------------
# Quoting


@given(raw_names)
@example(b"\xff\xfe%41")
@example("é".encode())
@example(b"%C3%A9")
@example(b"nb-1-big-Data.db")
def test_every_name_that_a_file_system_can_hold_comes_back_from_its_quotation(raw: bytes) -> None:
    name = os.fsdecode(raw)
    assert os.fsencode(unquote(quote(name))) == raw
    assert unquote(quote(name, slash="%2F")) == name


@given(names)
def test_a_quotation_is_one_printable_line_of_utf8(name: str) -> None:
    assert quote(name).isprintable()
    quote(name).encode("utf-8")


@given(names, names)
def test_two_names_never_share_a_quotation(one: str, other: str) -> None:
    assert (quote(one) == quote(other)) == (one == other)


@given(paths)
def test_a_path_stays_a_path_or_becomes_one_component(path: str) -> None:
    assert quote(path).count("/") == path.count("/")
    assert "/" not in quote(path, slash="%2F")
    assert unquote(quote(path, slash="%2F")) == path


# ------------------------------------------------------------------------------------------------------------
# Keys


@given(paths, some.sampled_from([NODE, "n" * 200]))
def test_a_key_keeps_within_the_limits_of_every_store(path: str, node: str) -> None:
    key = object_key(node, "/" + path)
    assert len(key.encode()) <= KEY_BYTES
    assert all(0 < len(part.encode()) <= NAME_BYTES for part in key.split("/"))
    assert key.startswith(node + "/")
    assert not {".", ".."} & set(key.split("/"))


@given(paths, paths)
def test_two_paths_never_share_a_key(one: str, other: str) -> None:
    assert (object_key(NODE, "/" + one) == object_key(NODE, "/" + other)) == (one == other)


@pytest.mark.parametrize("length", [NAME_BYTES, NAME_BYTES + 1, 255])
def test_long_names_that_differ_in_their_last_letter_have_two_keys(length: int) -> None:
    one, other = (object_key(NODE, "/data/" + "x" * (length - 1) + last) for last in "ab")
    assert one != other


def test_long_paths_that_differ_in_their_first_directory_have_two_keys() -> None:
    rest = "/".join(["d" * 190] * 6)
    assert object_key(NODE, f"/one/{rest}") != object_key(NODE, f"/two/{rest}")


def test_names_that_only_look_alike_stay_two() -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert object_key(NODE, f"/data/{composed}") != object_key(NODE, f"/data/{decomposed}")
    assert unquote(quote(decomposed)) == decomposed


def test_a_plain_path_is_its_own_key() -> None:
    path = "/var/lib/cassandra/data/ks1/users-5a1c/snapshots/daily/nb-1-big-Data.db"
    assert object_key(NODE, path) == NODE + path


# ------------------------------------------------------------------------------------------------------------
# Pin directories and units


@given(some.one_of(some.just(""), paths), stamps_of_time)
def test_a_pin_records_its_own_origin(relative: str, since: str) -> None:
    name = pin_directory(relative, since)
    assert "/" not in name
    assert len(name.encode()) <= 255
    parsed = parse_pin_directory(name)
    assert parsed is not None
    assert parsed[1] == since
    if not parsed[0].startswith("%%"):  # hashed: a file beside the pins holds the name
        assert parsed[0] == relative


@given(paths, paths, stamps_of_time)
def test_two_source_directories_never_share_a_pin_directory(one: str, other: str, since: str) -> None:
    assert (pin_directory(one, since) == pin_directory(other, since)) == (one == other)


@given(paths, stamps_of_time)
def test_a_pin_directory_is_nothing_that_cassandra_would_trip_over_or_clear(relative: str, since: str) -> None:
    name = pin_directory(relative, since)
    assert not name.endswith((".db", "snapshots", "backups"))


@pytest.mark.parametrize("name", [".released~", "x", "x~20261121T202438Z", "~20261121T202438.123456Z", ""])
def test_what_is_no_pin_directory_is_not_read_as_one(name: str) -> None:
    assert parse_pin_directory(name) is None


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
def test_a_source_directory_tells_what_it_belongs_to(relative: str, kind: str, tag: str) -> None:
    unit = unit_of("/data", relative, "20261121T202438.123456Z")
    assert (unit.kind, unit.tag) == (kind, tag)


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
units = some.one_of(
    some.builds(Unit, some.just("snapshot"), words, words, names, stamps_of_time),
    some.builds(Unit, some.just("incremental"), words, words, some.just(""), stamps_of_time),
    some.builds(Unit, some.just("archive"), some.just(""), some.just(""), paths, stamps_of_time),
)


def same_listings(one: Unit, other: Unit) -> bool:
    """Tell whether two units are to be listed together."""
    keep = {"snapshot": "kind keyspace table tag since", "incremental": "kind keyspace table", "archive": "kind tag"}
    return all(getattr(one, name) == getattr(other, name) for name in keep[one.kind].split())


@given(units)
def test_no_node_is_the_beginning_of_another(unit: Unit) -> None:
    assert not listings_of("node10", unit).startswith(listings_of("node1", unit))
    assert not listings_of("node10", unit).startswith(("node1.listings/", "node1/"))
    assert not object_key("node10", "/var/x").startswith(("node1/", "node1.listings/", "node1.condemned/"))
    for name in ("node1.listings", "node1.condemned"):
        with pytest.raises(Usage):
            check_node(name)


@given(units, units)
@example(Unit("archive", "", "", "a/b", utc(1)), Unit("archive", "", "", "a%2Fb", utc(1)))
@example(Unit("incremental", "ks", "t", "", utc(1)), Unit("incremental", "ks2", "t", "", utc(1)))
@example(Unit("incremental", "ks", "t", "", utc(1)), Unit("incremental", "ks", "t2", "", utc(1)))
def test_two_units_never_share_the_place_of_their_listings(one: Unit, other: Unit) -> None:
    ours, theirs = listings_of(NODE, one), listings_of(NODE, other)
    if same_listings(one, other):
        assert ours == theirs
    else:
        assert not ours.startswith(theirs)


@pytest.mark.parametrize("word", ["archive", "tags", "heartbeat"])
def test_a_keyspace_may_be_called_like_a_folder_of_ours(word: str) -> None:
    """The daemon thins out what is below heartbeat/: a keyspace's listings must not stand there."""
    for unit in (Unit("incremental", word, "users-5a", "", utc(1)), Unit("snapshot", word, "users-5a", "t", utc(1))):
        assert not listings_of(NODE, unit).startswith(f"{NODE}.listings/{word}/")


# ------------------------------------------------------------------------------------------------------------
# Time


@given(stamps_of_time)
def test_a_moment_comes_back_from_every_spelling(stamp: str) -> None:
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z", stamp)
    assert utc(seconds_of(stamp)) == stamp
    assert utc_of(rfc3339(stamp)) == stamp


@given(stamps_of_time, stamps_of_time)
@example("20271231T235959.999999Z", "20271231T235959.999999Z")
def test_a_later_stamp_is_later_whatever_the_clock_does(stamp: str, newest: str) -> None:
    chosen = later(stamp, newest)
    assert chosen > newest
    assert seconds_of(chosen) > seconds_of(newest)
    if stamp > newest:
        assert chosen == stamp


def test_a_clock_that_stands_still_gives_rising_stamps() -> None:
    stamp = newest = utc(1_795_000_000.25)
    for _ in range(1000):
        following = later(stamp, newest)
        assert following > newest
        newest = following


@pytest.mark.parametrize("moment", ["", "now", "2026-11-21", "2026-13-21T20:24:38.123456Z", "2026-11-21T20:24:38Z"])
def test_what_is_no_moment_is_refused(moment: str) -> None:
    with pytest.raises(ValueError, match=r"does not match|must be in"):
        utc_of(moment)


# ------------------------------------------------------------------------------------------------------------
# CRC-32


@given(some.binary(max_size=300), some.binary(max_size=300))
def test_checksums_of_two_parts_make_the_checksum_of_the_whole(first: bytes, second: bytes) -> None:
    assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
    google_crc32c = pytest.importorskip("google_crc32c")
    castagnoli = crc32_combine(google_crc32c.value(first), google_crc32c.value(second), len(second), 0x82F63B78)
    assert castagnoli == google_crc32c.value(first + second)


@pytest.mark.parametrize("length", [0, 1, 8 << 20, (8 << 20) + 1, 300 << 30])
def test_checksums_of_large_parts_are_joined_too(length: int) -> None:
    zeros, left = 0, length  # crc of `length` zero bytes, by doubling
    square, size = zlib.crc32(b"\0"), 1
    while left:
        if left & 1:
            zeros = crc32_combine(zeros, square, size)
        square, size, left = crc32_combine(square, square, size), size * 2, left >> 1
    if length <= 16 << 20:
        assert zeros == zlib.crc32(bytes(length))
    assert crc32_combine(0, zeros, length) == zeros
    assert crc32_combine(zlib.crc32(b"abc"), 0, 0) == zlib.crc32(b"abc")


# ------------------------------------------------------------------------------------------------------------
# Listings

hex8 = some.integers(0, 2**32 - 1).map("{:08x}".format)
whole = some.integers(0, 2**63 - 1)
stamps = some.builds(Stamp, hex8, whole, whole, whole)
entries = some.builds(
    Stored,
    directory=paths.map("/".__add__),
    name=names,
    stamp=stamps,
    mode=some.integers(0, 0o7777),
    user=words,
    group=words,
    crc32=hex8,
    key=paths.map(quote),
    etag=some.text(max_size=40),
    crc32c=some.sampled_from(["", "AAAAAA=="]),
    seen=some.one_of(some.just(""), stamps_of_time),
)
listings = some.builds(
    Listing,
    node=some.just(NODE),
    unit=units,
    listed=stamps_of_time,
    complete=some.booleans(),
    files=some.lists(entries, max_size=4).map(tuple),
    missing=some.lists(names, max_size=3).map(tuple),
    lost=some.lists(names, max_size=3).map(tuple),
    replaces=some.lists(names.map(quote), max_size=3).map(tuple),
)


def by_path(listing: Listing) -> list[Stored]:
    return sorted(listing.files, key=lambda entry: (entry.directory, entry.name, entry.stamp))


def test_what_many_listings_tell_of_a_file_is_in_memory_once() -> None:
    """Prune reads all snapshots of a table at a time: tens of thousands of files, in dozens of listings."""
    stamp = Stamp("0badcafe0bad", 5, 6, 7)
    words = ("cassandra", "cassandra", "9f3c01aa", "node1/var/lib/nb-1-big-Data.db", '"etag"')
    then = "20261121T202438.123456Z"
    files = (Stored("/d", "a b", stamp, 0o640, *words),)
    listing = Listing(NODE, Unit("snapshot", "ks", "t", "daily", then), then, True, files)
    texts = dict[str, str]()
    (one,), (other,) = (load_listing(dump_listing(listing), texts).files for _ in range(2))
    for word in ("name", "user", "group", "crc32", "key", "etag"):
        assert getattr(one, word) is getattr(other, word), word
    assert one.stamp.area is other.stamp.area


@given(listings)
def test_a_listing_comes_back_as_it_was_written(listing: Listing) -> None:
    loaded = load_listing(dump_listing(listing))
    assert by_path(loaded) == by_path(listing)
    for name in ("node", "unit", "listed", "complete", "missing", "lost", "replaces"):
        assert getattr(loaded, name) == getattr(listing, name), name


@given(listings)
def test_the_name_of_a_listing_tells_what_list_needs(listing: Listing) -> None:
    told = parse_listing_name(listings_of(NODE, listing.unit) + listing_name(listing))
    assert told == (listing.listed, listing.state, len(listing.files), listing.size)


@pytest.mark.parametrize("key", ["owner.json", "heartbeat/20261121T202438.123456Z.json", "x-complete-1-2.json", ""])
def test_other_objects_are_not_taken_for_listings(key: str) -> None:
    assert parse_listing_name(f"{NODE}.listings/{key}") is None


ENTRY = Stored(
    "/data/ks/t-1/snapshots/daily", "nb-1-big-Data.db", Stamp("0badcafe", 7, 42, 1_795_000_000_123_456_789),
    0o640, "cassandra", "cassandra", "9f3c01aa", "node1/data/x", '"etag"',
)  # fmt: skip
LISTING = Listing(
    NODE, Unit("snapshot", "ks", "t-" + "1" * 32, "daily", utc(1_795_000_000)), utc(1_795_000_001), True,
    (ENTRY, replace(ENTRY, name="nb-1-big-TOC.txt")), ("a",), ("b",), ("c",),
)  # fmt: skip
BODY = dump_listing(LISTING)


def well_typed(listing: Listing) -> bool:
    """Tell whether whatever uses a listing can rely on its types and on what a listing may say."""
    unit = listing.unit
    texts = [listing.node, unit.keyspace, unit.table, unit.tag, unit.since, listing.listed]
    texts += [*listing.missing, *listing.lost, *listing.replaces]
    for entry in listing.files:
        texts += [entry.directory, entry.name, entry.user, entry.group, entry.crc32, entry.key, entry.etag, entry.seen]
    numbers = [number for entry in listing.files for number in (*entry.stamp[1:], entry.mode)]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int and number >= 0 for number in numbers)
        and unit.kind in ("snapshot", "incremental", "archive")
    )


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


@given(some.binary(max_size=200))
@example(b"")
@example(b"null")
@example(b"[]")
@example(b"0")
@example(b'"listing"')
@example(b"[" * 100_000)
@example(b'{"version": 1}')
def test_anything_else_is_a_corrupt_listing(body: bytes) -> None:
    with pytest.raises(Corrupt):
        load_listing(body)


PAGE: dict[str, Any] = json.loads(BODY)
[FOLDER] = PAGE["directories"]
ALWAYS = ["version", "node", "kind", "taking", "complete", "listed", "directories"]
OF_AN_ENTRY = ["name", "size", "mtime_ns", "stamp", "mode", "user", "group", "crc32", "key", "etag"]
WRONG = [None, True, 3, 1.5, ["x"], {"x": 1}, [[1]], "\0"]


def changed(change: dict[str, Any], entry: dict[str, Any] | None = None) -> bytes:
    """Return the listing's JSON with some values replaced, or removed where they are `...`."""
    page = json.loads(BODY)
    for target, changes in ((page, change), (page["directories"][FOLDER][0], entry or {})):
        target.update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            del target[name]
    return json.dumps(page).encode()


@pytest.mark.parametrize("name", ALWAYS)
def test_a_listing_without_what_every_listing_has_is_corrupt(name: str) -> None:
    with pytest.raises(Corrupt):
        load_listing(changed({name: ...}))


@pytest.mark.parametrize("name", OF_AN_ENTRY)
def test_an_entry_without_what_every_entry_has_is_corrupt(name: str) -> None:
    with pytest.raises(Corrupt):
        load_listing(changed({}, {name: ...}))


@pytest.mark.parametrize("name", [*ALWAYS, "keyspace", "table", "table_id", "tag", "missing", "lost", "replaces"])
def test_a_listing_with_a_value_of_a_wrong_type_is_corrupt(name: str) -> None:
    for wrong in WRONG:
        if type(wrong) is type(PAGE[name]):
            continue
        try:
            load_listing(changed({name: wrong}))
        except Corrupt:
            continue
        pytest.fail(f"{name} may be {wrong!r}")


@pytest.mark.parametrize("name", OF_AN_ENTRY)
def test_an_entry_with_a_value_of_a_wrong_type_is_corrupt(name: str) -> None:
    for wrong in WRONG:
        if type(wrong) is type(PAGE["directories"][FOLDER][0][name]):
            continue
        try:
            load_listing(changed({}, {name: wrong}))
        except Corrupt:
            continue
        pytest.fail(f"{name} may be {wrong!r}")


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ({"version": 2}, {}),
        ({"version": True}, {}),
        ({"kind": "full"}, {}),
        ({"taking": "yesterday"}, {}),
        ({"listed": "yesterday"}, {}),
        ({"complete": "yes"}, {}),
        ({}, {"size": 41}),
        ({}, {"mtime_ns": 1}),
        ({}, {"crc32": "9F3C01AA"}),
        ({}, {"crc32": "9f3c01aa\n"}),
        ({}, {"stamp": "0badcafe-7-2a"}),
        ({}, {"stamp": "0badcafe-7--2a-1"}),
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
    files = tuple(Stored(f"/{name}", name, *_rest(ENTRY)) for name in (one, other))
    listing = Listing(NODE, LISTING.unit, LISTING.listed, True, files)
    assert by_path(load_listing(dump_listing(listing))) == by_path(listing)


def _rest(entry: Stored) -> tuple[Any, ...]:
    return entry.stamp, entry.mode, entry.user, entry.group, entry.crc32, entry.key, entry.etag
