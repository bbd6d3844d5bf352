"""A store in memory whose time a test moves, and listings to put into it.

It holds the promises against whoever uses it: no key is written twice, a listing names only what is there, and what
a listing names is never deleted.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import cassbackup as cb
from cassbackup import Fingerprint, Listing, ObjectInfo, Stored, Unit, utc

HOUR, DAY = 3600.0, 86400.0
NODE, KEYSPACE, TABLE = "node1", "ks", "users-" + "5a" * 16
EPOCH = cb.seconds_of("20260101T000000.000000Z")  # a Thursday


def unit_of(tag: str, at: float, table: str = TABLE) -> Unit:
    """Return the unit of a snapshot, or without a tag of backups/."""
    return Unit("snapshot" if tag else "incremental", KEYSPACE, table, tag, utc(at))


def body_of(name: str, mtime: float) -> bytes:
    """Return the bytes of a file."""
    return f"{name} of {mtime}".encode()


def entry_of(unit: Unit, name: str, mtime: float, node: str = NODE) -> Stored:
    """Return an entry as a daemon of one data directory would list it: the same file is the same object."""
    below = f"snapshots/{unit.tag}" if unit.kind == "snapshot" else "backups"
    directory = f"/d/{unit.keyspace}/{unit.table}/{below}"
    body = body_of(name, mtime)
    crc32 = cb.hex32(zlib.crc32(body))
    key = f"{node}/d/{unit.keyspace}/{unit.table}/{'backups' if name.endswith('.db') else below}/{name}@{crc32}"
    return Stored(directory, name, Fingerprint(7, len(body), int(mtime * 1e9)), 0o644, "c", "c", crc32, key, crc32)


def snapshot(
    tag: str,
    at: float,
    files: Sequence[tuple[str, float]] = (),
    complete: bool = True,
    listed: float = 0.0,
    table: str = TABLE,
    node: str = NODE,
) -> Listing[Stored]:
    """Return the listing of a snapshot that Cassandra took at a moment."""
    unit = unit_of(tag, at, table)
    entries = [entry_of(unit, *file, node) for file in (*files, ("manifest.json", at))]
    return Listing(node, unit, utc(at), utc(listed or at), complete, tuple(entries))


def batch(at: float, *names: str, mtime: float = 0.0, table: str = TABLE) -> Listing[Stored]:
    """Return a listing of backups/: files that were flushed at a moment."""
    unit = unit_of("", at, table)
    return Listing(NODE, unit, utc(at), utc(at), True, tuple(entry_of(unit, name, mtime or at) for name in names))


class Shelf:
    """The objects of a store."""

    def __init__(self) -> None:
        self.now = EPOCH
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.named: dict[str, frozenset[str]] = {}
        self.held: dict[str, str] = {}  # what cannot be deleted, and why
        self.deleted = 0
        self.forced = False  # even the last good snapshot of a table may go

    def put(self, key: str, body: bytes) -> None:
        """Store an object."""
        assert key not in self.objects, f"P3: {key} is overwritten"
        self.objects[key] = (body, self.now)
        if ".listings/" in key and cb.parse_listing_name(key):
            files = cb.load_listing(body).files
            self.named[key] = frozenset(entry.key for entry in files)
            for entry in files:
                there = zlib.crc32(self.objects[entry.key][0]) if entry.key in self.objects else None
                assert there == int(entry.crc32, 16), f"P1: {key} lists what is not there: {entry.key}"

    def delete(self, key: str) -> None:
        """Delete an object."""
        named_by = [listing for listing, named in self.named.items() if key in named]
        assert not named_by, f"P1: {key} is deleted, and named by {named_by}"
        if self.named.pop(key, None) and "-complete-" in key and "/snapshots/" in key:
            table = key.partition("/snapshots/")[0]
            left = [other for other in self.named if "-complete-" in other and f"{table}/snapshots/" in other]
            assert left or self.forced, f"P7: {key} was the last good one"
        self.deleted += self.objects.pop(key, None) is not None and key.startswith(f"{NODE}/")

    def add(self, *listings: Listing[Stored]) -> list[str]:
        """Store listings and what they name, each when it was listed; return their keys."""
        keys = []
        for listing in listings:
            now, self.now = self.now, cb.seconds_of(listing.listed)
            for entry in listing.files:
                if entry.key not in self.objects:
                    self.put(entry.key, body_of(entry.name, entry.fingerprint.mtime_ns / 1e9))
            keys.append(cb.listing_key(listing))
            self.put(keys[-1], cb.dump_listing(listing))
            self.now = now
        return keys

    def keys(self, prefix: str = f"{NODE}/") -> set[str]:
        """Return the keys that begin so."""
        return {key for key in self.objects if key.startswith(prefix)}

    def tags(self) -> list[str]:
        """Return the tags of the snapshots that are listed."""
        return sorted({key.split("/snapshots/")[1].split("/")[0] for key in self.named if "/snapshots/" in key})


class Door:
    """A shelf as one process sees it: cb.Store. Before each operation it waits for its turn."""

    url = "memory://shelf"

    def __init__(self, shelf: Shelf, turn: Callable[[], None] = lambda: None) -> None:
        self.shelf, self.turn = shelf, turn
        self.asked: list[str] = []  # the operations, and what they were asked

    def now(self) -> float:
        return self.shelf.now

    def put(self, key: str, source: Any) -> ObjectInfo:
        self._note("put", key)
        if key in self.shelf.objects:
            raise cb.Conflict(key)
        self.shelf.put(key, bytes(source.read(0, source.size)))
        return self._info(key)

    def head(self, key: str) -> ObjectInfo | None:
        self._note("head", key)
        return self._info(key) if key in self.shelf.objects else None

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        self._note("get", key)
        if key not in self.shelf.objects:
            raise cb.Missing(key)
        yield self.shelf.objects[key][0][start:end]

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """Yield pages of nine, between which things come and go. No CRC-32, as on S3."""
        while True:
            self._note("list", prefix)
            page = sorted(key for key in self.shelf.objects if key.startswith(prefix) and key > after)[:9]
            yield from [replace(self._info(key), crc32="") for key in page]
            if len(page) < 9:
                return
            after = page[-1]

    def prefixes(self, prefix: str) -> Iterator[str]:
        self._note("prefixes", prefix)
        below = [key.removeprefix(prefix) for key in self.shelf.keys(prefix)]
        yield from sorted({key.split("/")[0] for key in below if "/" in key})

    def delete(self, key: str) -> None:
        if key in self.shelf.held:
            raise cb.Denied(self.shelf.held[key])
        self._note("delete", key)
        self.shelf.delete(key)

    def _note(self, operation: str, what: str) -> None:
        self.turn()
        self.asked.append(f"{operation} {what}")

    def _info(self, key: str) -> ObjectInfo:
        body, modified = self.shelf.objects[key]
        crc32 = cb.hex32(zlib.crc32(body))
        return ObjectInfo(key, len(body), crc32, modified, crc32)
