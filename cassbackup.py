#!/usr/bin/env python3
"""cassbackup: back up Apache Cassandra, file by file, as Cassandra writes it.

One process runs on every node. It watches Cassandra's data directories, takes hold of every file that appears
under snapshots/ and backups/ before anybody can delete it, stores it in S3, Google Cloud Storage or a
directory, and then writes down, in the same bucket, what can be restored.

    hint ----> Found ----> Pinned ----> Stored ----> Listing
    watch      scan        link(2)      upload       publish

* A hint is the name of a directory that may have changed. inotify gives hints, and so do an overflow, a watch
  that could not be set, the start and a timer. A hint is never a proof: a lost one costs seconds, not files.
* Found is a regular file, seen by looking into a directory after its watch was set (watch first, then look).
* Pinned is a hard link of our own. From here clearsnapshot and compaction can no longer take the bytes away.
  The pins are the queue: a restart begins with them and needs nothing else.
* Stored is what the store has confirmed: size and checksum. Only the store's answer makes a Stored.
* A Listing names Stored files only. It is written last, and then the pins go.

Promises
    P1  Listed means restorable: a listing names only objects that the store confirmed before it was written.
    P2  Nothing is skipped silently: what appears in a watched place is listed, or counted and named in the log.
    P3  Written once: no key's bytes ever change.
    P4  The ledger is a hint: losing or corrupting local state costs time, never data, never a false "done".
    P5  Do no harm: no watched file is modified, renamed or deleted (but by --delete-uploaded-incrementals);
        disk, memory, CPU and bandwidth are bounded; Cassandra's page cache is left as found.
    P6  Restore stays inside its target and tells the truth.
    P7  Prune errs on keeping.
    P8  Signals are true: exit 0 means that everything asked for was done; what protects nothing is red.

In the bucket (UTC is 20261121T202438.123456Z; every key is written once)
    <node>/var/lib/cassandra/data/ks/users-5a1c/snapshots/daily/nb-1-big-Data.db         a file, at its path
    <node>/.../nb-1-big-Data.db@9f3c01aa                                   same path, other content (its CRC-32)
    <node>.listings/ks/users-5a1c/snapshots/daily/<taking>/<UTC>-complete-<files>-<bytes>.json
    <node>.listings/ks/users-5a1c/backups/<UTC>-complete-<files>-<bytes>.json
    <node>.listings/owner.json, heartbeat/<UTC>.json
    <node>.condemned/<UTC>.json                                      what prune is about to delete

Why this order. A file is stored before the listing that names it, or the listing would lie. The listing is
written before the ledger says so, or a crash would leave a file that nobody lists. The pin goes last, or there
would be a moment in which the bytes are neither ours nor listed.

Contents
    Facts           constants: version, limits, exit codes, the log
    Errors          what can go wrong, by what to do about it
    Things          what travels: Stamp, Unit, Pinned, Stored, Listing
    Names           keys, quoting, stamps of time, listings as JSON: pure functions
    Stores          file://, s3://, gs:// behind one protocol; write-once, retry
    Cloud           which cloud is this, and what is this node called
    Ledger          SQLite: a memory that may be lost
    Watch           inotify through pyinotify: hints
    Scan and pin    looking, and taking hold
    Upload          a pool whose unit of work is a part
    Publish         what is complete, and writing the listing
    Daemon          the one loop that joins them
    Commands        watch, status, config
    Command line    options, logging, main

"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import grp
import hashlib
import heapq
import itertools
import json
import logging
import mmap
import os
import pwd
import queue
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

# ======================================================================================================
# Facts
# ======================================================================================================

__version__ = "0.1.0"

log = logging.getLogger("cassbackup")

DONE, FAILED, MISUSED, BEHIND = 0, 1, 2, 3  # exit codes; 130 and 143 are the signals'

MIB: Final = 1 << 20
PART_BYTES: Final = 8 * MIB  # a put, or a part of a multipart upload; S3 takes no part below 5 MiB
PART_COUNT: Final = 9_000  # S3 stops at 10,000 parts; larger files get larger parts
LISTING_LIMIT: Final = 1 << 30  # a listing beyond this is not one of ours

QUIET_S: Final = 0.3  # a file is read only when nobody has written to it for so long
PAUSE_S: Final = 2.0  # uploads wait for the pinner, but never longer than this at a time
RECONCILE_S: Final = 60.0
HEARTBEAT_S: Final = 900.0
HEARTBEATS_KEPT: Final = 100
CONDEMNED_LOOK_S: Final = 60.0
FRESH_S: Final = 24 * 3600.0  # how long a confirmation by the store is good for
PUBLISH_LIMIT_S: Final = 3600.0  # prune's grace is a day; a publication that takes an hour looks again
STOP_S: Final = 30.0

KEY_BYTES: Final = 900  # S3 and GCS end a key at 1,024 bytes; room for the prefix and @crc32.<UTC>
NAME_BYTES: Final = 200  # a component of a key, so that file:// can hold it too (NAME_MAX is 255)

MANIFEST, SCHEMA, EPHEMERAL = "manifest.json", "schema.cql", "ephemeral.snapshot"
# Components that Cassandra's TOC.txt may name without there being a file: SSTableFormat's optional ones,
# and index files, which are added to TOC.txt after the links were made (SASI, SAI).
OPTIONAL_COMPONENT = re.compile(r"Filter\.db|Summary\.db|Digest\..*|CRC\.db|SI_.*|SAI.*")


# ======================================================================================================
# Errors
# ======================================================================================================


class Fault(Exception):
    """Something that a person or a retry can mend: what happened, and what to do about it."""

    code = FAILED

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}: {hint}" if hint else what)
        self.what, self.hint = what, hint


class Usage(Fault):
    """The arguments or the configuration cannot work as they are."""

    code = MISUSED


class Busy(Fault):
    """Another cassbackup holds the lock."""


class Denied(Fault):
    """The store knows us and says no, or does not know us."""


class Missing(Fault):
    """There is no such object, upload or bucket."""


class Conflict(Fault):
    """The key is taken: written once means that it stays as it is."""


class Corrupt(Fault):
    """Bytes are not what they were said to be."""


class Unreachable(Fault):
    """The store did not answer, or answered that it cannot now."""


class Throttled(Unreachable):
    """The store asks for less."""


class Stopped(Fault):
    """We were asked to stop while waiting."""


# ======================================================================================================
# Things
# ======================================================================================================


class Stamp(NamedTuple):
    """Which bytes a file is, without reading it. Never ctime: link(2) changes that."""

    area: str  # id of the pin area, so that inode numbers of two disks differ
    ino: int
    size: int
    mtime_ns: int

    def __str__(self) -> str:
        return f"{self.area}-{self.ino:x}-{self.size:x}-{self.mtime_ns:x}"

    @classmethod
    def of(cls, area: str, info: os.stat_result) -> Stamp:
        """Return the stamp of what stat(2) told."""
        return cls(area, info.st_ino, info.st_size, info.st_mtime_ns)

    @classmethod
    def parse(cls, text: str) -> Stamp:
        """Read a stamp as a listing spells it. Raises ValueError."""
        area, ino, size, mtime_ns = text.split("-")
        return cls(area, int(ino, 16), int(size, 16), int(mtime_ns, 16))


@dataclass(frozen=True, slots=True)
class Unit:
    """What becomes restorable at once: a table's snapshot, a batch of its incrementals, a batch of an archive."""

    kind: Literal["snapshot", "incremental", "archive"]
    keyspace: str
    table: str  # the directory's name, <table>-<id>
    tag: str  # of a snapshot; the directory below the data directory of an archive
    since: str  # UTC: the taking of a snapshot, the opening of a batch

    @property
    def urgent(self) -> bool:
        """Incrementals go first: nothing else holds what they hold."""
        return self.kind != "snapshot"


@dataclass(frozen=True, slots=True)
class Pinned:
    """A file whose bytes we hold, or (path outside the pin area) could not link and will read where it is."""

    directory: str  # the source directory
    name: str
    path: str  # what to open
    stamp: Stamp
    mode: int
    uid: int
    gid: int
    links: int
    held: int = -1  # a descriptor held instead of a link


@dataclass(frozen=True, slots=True)
class Head:
    """What the store says of an object."""

    key: str
    size: int
    etag: str  # the store's own name for these bytes: S3's ETag, GCS's generation
    modified: float  # seconds, by the store's clock
    crc32: str = ""  # eight hex digits, where the store can tell
    crc32c: str = ""  # GCS, base64


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an object that the store has taken."""

    number: int  # from 1
    size: int
    token: str  # what the store wants back to finish
    crc32: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that the store has confirmed; an entry of a listing."""

    directory: str
    name: str
    stamp: Stamp
    mode: int
    user: str
    group: str
    crc32: str
    key: str
    etag: str
    crc32c: str = ""
    seen: str = ""  # in a roll-up: when the batch it came from was opened


@dataclass(frozen=True, slots=True)
class Listing:
    """What can be restored: files of one unit, each of them stored."""

    node: str
    unit: Unit
    listed: str  # UTC
    complete: bool
    files: tuple[Stored, ...]
    missing: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()  # a roll-up: names of the listings that it stands for

    @property
    def state(self) -> str:
        """Return the word for the listing's name."""
        return "rollup" if self.replaces else "complete" if self.complete else "incomplete"

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(entry.stamp.size for entry in self.files)


# ======================================================================================================
# Names
# ======================================================================================================

_PLAIN = re.compile(r"[ !-$&-~]*")  # printable ASCII but %
_UTC = r"\d{8}T\d{6}\.\d{6}Z"
_PIN_DIRECTORY = re.compile(rf"(.+)~({_UTC})")
_LISTING_NAME = re.compile(rf"({_UTC})-(complete|incomplete|rollup)-(\d+)-(\d+)\.json")
_SSTABLE = re.compile(r"([a-z]{2}-[^-]+-[a-z]+|[^/]+-[a-z]{2}-\d+)-([^/]+)")
_TABLE = re.compile(r"(.+)-([0-9a-f]{32})")


def quote(name: str, slash: str = "/") -> str:
    """Spell a file system name so that it can be a key, a log value or a name in the pin area.

    What is not printable, what is not UTF-8 (it arrives as lone surrogates) and % become %XX, byte by byte.
    Reversible: unquote(quote(name)) == name for every name that a file system can hold.
    """
    if _PLAIN.fullmatch(name):
        return name if slash == "/" else name.replace("/", slash)
    return "".join(slash if char == "/" else _quote_char(char) for char in name)


def _quote_char(char: str) -> str:
    if char.isprintable() and char != "%":
        return char
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


def unquote(text: str) -> str:
    """Undo quote."""
    if "%" not in text:
        return text
    raw = text.encode("utf-8", "surrogateescape")
    raw = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), raw)
    return raw.decode("utf-8", "surrogateescape")


def digest_name(text: str) -> str:
    """Return a name for what is too long to be a name. %% never comes out of quote."""
    return "%%" + hashlib.sha1(text.encode("utf-8", "surrogateescape")).hexdigest()


def _component(name: str) -> str:
    quoted = quote(name)
    return quoted if len(quoted.encode()) <= NAME_BYTES else digest_name(name)


def object_key(node: str, path: str) -> str:
    """Return the key of the file at an absolute path: node + path. What is too long is hashed."""
    key = node + "/" + "/".join(_component(part) for part in path.split("/") if part)
    if len(key.encode()) <= KEY_BYTES:
        return key
    return f"{node}/{digest_name(path)}"


def sstable_of(name: str) -> tuple[str, str] | None:
    """Split a component's name: nb-1-big-Data.db is (nb-1-big, Data.db). None for what is no component."""
    match = _SSTABLE.fullmatch(name)
    return (match[1], match[2]) if match else None


def table_id_of(table: str) -> tuple[str, str]:
    """Split a table directory's name. Before Cassandra 2.1 there was no id."""
    match = _TABLE.fullmatch(table)
    return (match[1], match[2]) if match else (table, "")


def unit_of(relative: str, since: str) -> Unit:
    """Tell what a source directory, given below its data directory, belongs to."""
    parts = relative.split("/")
    if len(parts) >= 4 and parts[2] == "snapshots":
        return Unit("snapshot", parts[0], parts[1], parts[3], since)
    if len(parts) >= 3 and parts[2] == "backups":
        return Unit("incremental", parts[0], parts[1], "", since)
    return Unit("archive", "", "", relative, since)


def pin_directory(relative: str, since: str) -> str:
    """Return the name in the pin area for a source directory: its path below the data directory, and since."""
    quoted = quote(relative or ".", slash="%2F")
    if len(quoted.encode()) > NAME_BYTES:
        quoted = digest_name(relative)
    return f"{quoted}~{since}"


def parse_pin_directory(name: str) -> tuple[str, str] | None:
    """Undo pin_directory, but for hashed names, which come back as they are."""
    match = _PIN_DIRECTORY.fullmatch(name)
    if not match:
        return None
    return ("" if match[1] == "." else match[1] if match[1].startswith("%%") else unquote(match[1])), match[2]


def utc(seconds: float) -> str:
    """Return a moment as it stands in keys: 20261121T202438.123456Z."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


def seconds_of(stamp: str) -> float:
    """Undo utc. Raises ValueError."""
    return datetime.strptime(stamp, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=timezone.utc).timestamp()


def rfc3339(stamp: str) -> str:
    """Return the same moment as it stands inside a listing: 2026-11-21T20:24:38.123456Z."""
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:11]}:{stamp[11:13]}:{stamp[13:]}"


def utc_of(moment: str) -> str:
    """Undo rfc3339. Raises ValueError."""
    stamp = re.sub("[-:]", "", moment)
    seconds_of(stamp)
    return stamp


def later(stamp: str, than: str) -> str:
    """Return the stamp, or the first moment after the other where the clock has gone back."""
    return stamp if stamp > than else utc(seconds_of(than) + 2e-6)


def listings_of(node: str, unit: Unit) -> str:
    """Return the prefix of the listings of a unit; of an incremental, of all batches of its table."""
    if unit.kind == "archive":
        return f"{node}.listings/archive/{_component(unit.tag.replace('/', '%2F') or '.')}/"
    table = f"{node}.listings/{_component(unit.keyspace)}/{_component(unit.table)}/"
    if unit.kind == "incremental":
        return table + "backups/"
    return f"{table}snapshots/{_component(unit.tag)}/{unit.since}/"


def listing_name(listing: Listing) -> str:
    """Return the last component of a listing's key; `list` needs no more than this."""
    return f"{listing.listed}-{listing.state}-{len(listing.files)}-{listing.size}.json"


def parse_listing_name(key: str) -> tuple[str, str, int, int] | None:
    """Return (listed, state, files, bytes) of a listing's key, None for another key."""
    match = _LISTING_NAME.fullmatch(key.rsplit("/", 1)[-1])
    return (match[1], match[2], int(match[3]), int(match[4])) if match else None


def dump_listing(listing: Listing) -> bytes:
    """Return a listing as JSON."""
    unit = listing.unit
    directories: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(listing.files, key=lambda entry: (entry.directory, entry.name)):
        directories.setdefault(quote(entry.directory), []).append(_dump_entry(entry))
    page = {
        "version": 1,
        "node": listing.node,
        "kind": unit.kind,
        "keyspace": unit.keyspace,
        "table": table_id_of(unit.table)[0],
        "table_id": table_id_of(unit.table)[1],
        "tag" if unit.kind == "snapshot" else "directory": quote(unit.tag),
        "taking": unit.since,
        "complete": listing.complete,
        "taken": rfc3339(unit.since),
        "listed": rfc3339(listing.listed),
        "missing": [quote(name) for name in listing.missing],
        "lost": [quote(name) for name in listing.lost],
        "replaces": list(listing.replaces),
        "directories": directories,
    }
    page = {key: value for key, value in page.items() if value not in ("", [])}
    return json.dumps(page, separators=(",", ":")).encode()


def _dump_entry(entry: Stored) -> dict[str, Any]:
    page: dict[str, Any] = {
        "name": quote(entry.name),
        "size": entry.stamp.size,
        "mtime_ns": entry.stamp.mtime_ns,
        "stamp": str(entry.stamp),
        "mode": f"{entry.mode:04o}",
        "user": entry.user,
        "group": entry.group,
        "crc32": entry.crc32,
        "key": entry.key,
        "etag": entry.etag,
    }
    optional = {"crc32c": entry.crc32c, "seen": entry.seen}
    return page | {key: value for key, value in optional.items() if value}


def load_listing(body: bytes) -> Listing:
    """Read a listing. Raises Corrupt for anything that we would not have written."""
    try:
        page = json.loads(body)
        if page["version"] != 1:
            raise ValueError(f"version {page['version']!r}")
        table = page.get("table", "") + (f"-{page['table_id']}" if page.get("table_id") else "")
        tag = unquote(page.get("tag", page.get("directory", "")))
        unit = Unit(page["kind"], page.get("keyspace", ""), table, tag, page["taking"])
        files = tuple(
            _load_entry(unquote(directory), entry)
            for directory, entries in page["directories"].items()
            for entry in entries
        )
        names = {key: tuple(map(unquote, page.get(key, ()))) for key in ("missing", "lost", "replaces")}
        return Listing(page["node"], unit, utc_of(page["listed"]), page["complete"] is True, files, **names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"listing cannot be read ({error!r})", "do not delete it; `cassbackup verify` names it") from None


def _load_entry(directory: str, page: dict[str, Any]) -> Stored:
    stamp = Stamp.parse(page["stamp"])
    if page["size"] != stamp.size or not re.fullmatch("[0-9a-f]{8}", page["crc32"]):
        raise ValueError(f"entry {page['name']!r} contradicts itself")
    mode, words = int(page["mode"], 8), [page[key] for key in ("user", "group", "crc32", "key", "etag")]
    optional = {key: page.get(key, "") for key in ("crc32c", "seen")}
    if not all(isinstance(word, str) for word in (*words, *optional.values())):
        raise TypeError(f"entry {page['name']!r} has a wrong type")
    return Stored(directory, unquote(page["name"]), stamp, mode, *words, **optional)


def crc32_combine(first: int, second: int, length: int, polynomial: int = 0xEDB88320) -> int:
    """Return the CRC of two blocks of bytes in a row, the second of them `length` bytes long.

    As zlib's crc32_combine, by multiplication in GF(2)[x] modulo the polynomial (0x82F63B78 is CRC-32C).
    """

    def times(a: int, b: int) -> int:
        product = 0
        while a:
            if a & 0x80000000:
                product ^= b
            a = a << 1 & 0xFFFFFFFF
            b = b >> 1 ^ (polynomial if b & 1 else 0)
        return product

    power, square = 0x80000000, 1 << 23  # x^0 and x^8, the highest coefficient in the lowest bit
    while length:
        if length & 1:
            power = times(square, power)
        square = times(square, square)
        length >>= 1
    return times(power, first) ^ second


def hex32(crc: int) -> str:
    """Return a CRC-32 as it stands in listings and keys."""
    return f"{crc & 0xFFFFFFFF:08x}"


# ======================================================================================================
# Stores
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class Access:
    """How to talk to a store: everything but its URL."""

    region: str = ""
    endpoint_url: str = ""
    ca_file: str = ""
    sse: str = ""  # "", AES256 or aws:kms
    kms_key: str = ""
    storage_class: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    threads: int = 8


T = TypeVar("T")
Body = bytes | bytearray


class Store(Protocol):
    """A place for objects. Keys are relative to the store's prefix.

    Every method may raise Unreachable (try again), Denied, or Missing where the bucket is gone. put and finish
    create and never overwrite: they raise Conflict where the key is taken, if the server can tell.
    """

    url: str
    ordered: bool  # parts of one upload must be put in order, one at a time

    def put(self, key: str, body: Body, crc32: int) -> Head:
        """Store an object whole. The reply confirms size and checksum."""

    def begin(self, key: str, size: int) -> str:
        """Begin an upload in parts; return its id, which a later process can go on with."""

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        """Store part `number` (from 1), which begins at `offset`."""

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        """Tell which parts of an upload the store may have. Raises Missing where the upload is gone."""

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        """Return the held part if it has these bytes, else None."""

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        """Make the parts an object. Raises Missing where the upload is gone, perhaps because it was finished."""

    def abandon(self, key: str, upload: str) -> None:
        """Give an upload up; an absent one is no error."""

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """Yield (key, upload, begun) of uploads that were never finished."""

    def get(self, key: str, start: int = 0) -> Iterator[bytes]:
        """Yield an object's bytes from an offset on. Raises Missing."""

    def head(self, key: str) -> Head | None:
        """Return what the store knows of an object, None if there is none."""

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        """Yield the objects under a prefix in the order of their keys, those after a key where one is given."""

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete objects; return why for each that stayed. An absent one is no error."""

    def now(self) -> float:
        """Return the store's own time, as of its last reply."""


class DirStore:
    """file://: a directory, perhaps an NFS mount. Key components are file names."""

    ordered = False

    def __init__(self, root: str) -> None:
        self.url = "file://" + root
        self._root = root
        self._parts = os.path.join(root, ".unfinished")
        with self._faults():
            os.makedirs(self._parts, exist_ok=True)

    def put(self, key: str, body: Body, crc32: int) -> Head:
        with self._faults():
            upload = self.begin(key, len(body))
            try:
                with open(upload, "wb") as file:
                    file.write(body)
                return self._commit(upload, key, crc32)
            finally:
                self.abandon(key, upload)

    def begin(self, key: str, size: int) -> str:
        with self._faults():
            os.makedirs(self._parts, exist_ok=True)
            name = f"{hashlib.sha1(key.encode()).hexdigest()}-{os.getpid()}-{random.getrandbits(48):012x}"
            return os.path.join(self._parts, name)

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        with self._faults():
            fd = os.open(upload, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                view = memoryview(body)
                while view:
                    written = os.pwrite(fd, view, offset)
                    view, offset = view[written:], offset + written
                os.fdatasync(fd)
            finally:
                os.close(fd)
        return Part(number, len(body), "", crc32)

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        try:
            size = os.stat(upload).st_size
        except FileNotFoundError:
            raise Missing(f"upload of {key} is gone") from None
        return {number: Part(number, part_bytes, "") for number in range(1, -(-size // part_bytes) + 1)}

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        with self._faults(), open(upload, "rb") as file:
            file.seek(offset)
            return Part(held.number, len(body), "", crc32) if file.read(len(body)) == body else None

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        with self._faults():
            if not os.path.exists(upload):
                raise Missing(f"upload of {key} is gone")
            head = self._commit(upload, key, crc32)
            self.abandon(key, upload)
            return head

    def abandon(self, key: str, upload: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(upload)

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        with os.scandir(self._parts) as entries:
            yield from ((entry.name, entry.path, entry.stat().st_mtime) for entry in entries)

    def get(self, key: str, start: int = 0) -> Iterator[bytes]:
        try:
            with open(self._path(key), "rb") as file:
                file.seek(start)
                yield from iter(lambda: file.read(MIB), b"")
        except (FileNotFoundError, NotADirectoryError):
            raise Missing(f"no object {key}") from None

    def head(self, key: str) -> Head | None:
        path = self._path(key)
        try:
            return self._head(key, path, os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        yield from self._walk(prefix.rpartition("/")[0], prefix, after)

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        why = {}
        for key in keys:
            try:
                os.unlink(self._path(key))
            except FileNotFoundError:
                continue
            except OSError as error:
                why[key] = str(error)
        return why

    def now(self) -> float:
        return time.time()

    def _path(self, key: str) -> str:
        if any(part in ("", ".", "..") for part in key.split("/")) or key.startswith(".unfinished"):
            raise Missing(f"no object {key!r}", "a key is a relative path")
        return os.path.join(self._root, key)

    def _commit(self, upload: str, key: str, crc32: int) -> Head:
        """Make a written file the object: durable first, visible then, the name durable last."""
        fd = os.open(upload, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without attributes: compared by reading back
                os.setxattr(fd, "user.crc32", hex32(crc32).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        path = self._path(key)
        try:
            self._link(upload, path)
        except FileExistsError:
            raise Conflict(f"{key} is taken") from None
        _fsync_directory(os.path.dirname(path))
        return self._head(key, path, os.stat(path))

    def _link(self, upload: str, path: str) -> None:
        try:
            os.link(upload, path)  # refuses to overwrite, as rename would not
        except FileNotFoundError:
            folder = os.path.dirname(path)
            os.makedirs(folder, exist_ok=True)
            os.link(upload, path)
            while folder != self._root:  # the directories that lead to a durable name must be durable too
                folder = os.path.dirname(folder)
                _fsync_directory(folder)

    def _head(self, key: str, path: str, info: os.stat_result) -> Head:
        crc32 = ""
        with contextlib.suppress(OSError):
            crc32 = os.getxattr(path, "user.crc32").decode()
        return Head(key, info.st_size, f"{info.st_mtime_ns:x}", info.st_mtime, crc32)

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[Head]:
        try:
            with os.scandir(os.path.join(self._root, folder)) as scan:
                entries = sorted((entry.name + "/" * entry.is_dir(), entry) for entry in scan)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in entries:
            key = f"{folder}/{name}" if folder else name
            if name == ".unfinished/" or not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            if name.endswith("/"):
                if key > after or after.startswith(key):
                    yield from self._walk(key[:-1], prefix, after)
            elif key > after and key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    yield self._head(key, entry.path, entry.stat())

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise Denied(f"cannot write to {self.url} ({error.strerror})", "give the user write access") from error
        except OSError as error:
            raise Unreachable(f"{self.url}: {error}", "check the disk or the mount") from error


def _fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class S3Store:
    """s3://bucket[/prefix], through boto3. Works from boto3 1.26 on: newer headers are set by an event."""

    ordered = False
    _ONCE: Final = MappingProxyType({"If-None-Match": "*"})

    def __init__(self, bucket: str, prefix: str, access: Access) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise Usage(f"s3:// needs boto3 ({error})", "pip install boto3, or apt install python3-boto3") from None

        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket, self._prefix, self._date = bucket, prefix, 0.0
        options: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},  # Retrying does it, for all stores alike
            "connect_timeout": 10,
            "read_timeout": 60,
            "tcp_keepalive": True,
            "max_pool_connections": access.threads + 16,
        }
        # We send CRC-32 ourselves; what SDKs add on their own breaks servers that only resemble S3.
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if name in Config.OPTION_DEFAULTS:
                options[name] = "when_required"
        self._client: Any = boto3.session.Session().client(
            "s3",
            region_name=access.region or None,
            endpoint_url=access.endpoint_url or None,
            verify=access.ca_file or None,
            aws_access_key_id=access.access_key or None,
            aws_secret_access_key=access.secret_key or None,
            config=Config(**options),
        )
        self._encryption = _s3_encryption(access)
        on = self._client.meta.events.register
        on("before-call.s3.PutObject", lambda params, **_: params["headers"].update(self._ONCE))
        full = {"x-amz-checksum-type": "FULL_OBJECT"}
        on("before-call.s3.CreateMultipartUpload", lambda params, **_: params["headers"].update(full))
        on("before-call.s3.CompleteMultipartUpload", lambda params, **_: params["headers"].update(full | self._ONCE))
        on("after-call.s3", self._note_date)

    def put(self, key: str, body: Body, crc32: int) -> Head:
        sent = _base64_crc(crc32)
        with self._faults(key):
            reply = self._client.put_object(
                **self._at(key),
                Body=body,
                ChecksumCRC32=sent,
                Metadata={"crc32": hex32(crc32)},
                **self._encryption,
            )
        etag = reply.get("ETag", "")
        if reply.get("ChecksumCRC32") == sent or etag.strip('"') == hashlib.md5(body).hexdigest():
            return Head(key, len(body), etag, self.now(), hex32(crc32))
        return self._confirmed(key, len(body), crc32)

    def begin(self, key: str, size: int) -> str:
        with self._faults(key):
            reply = self._client.create_multipart_upload(**self._at(key), ChecksumAlgorithm="CRC32", **self._encryption)
        return str(reply["UploadId"])

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        with self._faults(key):
            reply = self._client.upload_part(
                **self._at(key), UploadId=upload, PartNumber=number, Body=body, ChecksumCRC32=_base64_crc(crc32)
            )
        return Part(number, len(body), reply["ETag"], crc32)

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        pages = self._client.get_paginator("list_parts").paginate(**self._at(key), UploadId=upload)
        with self._faults(key):
            parts = [part for page in pages for part in page.get("Parts", ())]
        return {part["PartNumber"]: Part(part["PartNumber"], part["Size"], part["ETag"]) for part in parts}

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        same = held.size == len(body) and held.token.strip('"') == hashlib.md5(body).hexdigest()
        return replace(held, crc32=crc32) if same else None

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        chosen = [
            {"PartNumber": part.number, "ETag": part.token, "ChecksumCRC32": _base64_crc(part.crc32)} for part in parts
        ]
        with self._faults(key):
            self._client.complete_multipart_upload(
                **self._at(key),
                UploadId=upload,
                MultipartUpload={"Parts": chosen},
                ChecksumCRC32=_base64_crc(crc32),
            )
        return self._confirmed(key, sum(part.size for part in parts), crc32)

    def abandon(self, key: str, upload: str) -> None:
        with contextlib.suppress(Missing), self._faults(key):
            self._client.abort_multipart_upload(**self._at(key), UploadId=upload)

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self._faults(prefix):
            for page in pages:
                for upload in page.get("Uploads", ()):
                    yield upload["Key"][len(self._prefix) :], upload["UploadId"], upload["Initiated"].timestamp()

    def get(self, key: str, start: int = 0) -> Iterator[bytes]:
        wanted = {"Range": f"bytes={start}-"} if start else {}
        with self._faults(key):
            yield from self._client.get_object(**self._at(key), **wanted)["Body"].iter_chunks(MIB)

    def head(self, key: str) -> Head | None:
        try:
            with self._faults(key):
                reply = self._client.head_object(**self._at(key), ChecksumMode="ENABLED")
        except Missing:
            return None
        crc32 = next((value for name, value in reply["Metadata"].items() if name.lower() == "crc32"), "")
        if not crc32 and reply.get("ChecksumCRC32") and "-" not in reply["ChecksumCRC32"]:  # -N is a composite
            crc32 = base64.b64decode(reply["ChecksumCRC32"]).hex()
        return Head(key, reply["ContentLength"], reply["ETag"], reply["LastModified"].timestamp(), crc32)

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        wanted = {"StartAfter": self._prefix + after} if after else {}
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix, **wanted
        )
        with self._faults(prefix):
            for page in pages:
                for item in page.get("Contents", ()):
                    key = item["Key"][len(self._prefix) :]
                    if key > after:  # not every server knows StartAfter
                        yield Head(key, item["Size"], item["ETag"], item["LastModified"].timestamp())

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        why = {}
        for first in range(0, len(keys), 1000):
            objects = [{"Key": self._prefix + key} for key in keys[first : first + 1000]]
            with self._faults(keys[first]):
                reply = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
            for error in reply.get("Errors", ()):
                why[error["Key"][len(self._prefix) :]] = f"{error['Code']}: {error.get('Message', '')}"
        return why

    def now(self) -> float:
        return self._date or time.time()

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _note_date(self, http_response: Any, **_: Any) -> None:
        if date := http_response.headers.get("date"):
            self._date = parsedate_to_datetime(date).timestamp()

    def _confirmed(self, key: str, size: int, crc32: int) -> Head:
        head = self.head(key)
        if not head or head.size != size or head.crc32 not in ("", hex32(crc32)):
            raise Corrupt(f"{key} did not arrive as it was sent ({head})", "the server or the way to it is broken")
        return replace(head, crc32=hex32(crc32))

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        from botocore import exceptions

        denied = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.NoAuthTokenError)
        wrong = (exceptions.ParamValidationError, exceptions.InvalidConfigError, exceptions.NoRegionError)
        try:
            yield
        except exceptions.ClientError as error:
            raise self._fault(key, error.response) from error
        except denied as error:
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the instance a role"
            raise Denied(f"no credentials for {self.url} ({error})", hint) from error
        except wrong as error:
            raise Usage(f"{self.url}: {error}", "see REGION and --endpoint-url") from error
        except exceptions.BotoCoreError as error:
            raise Unreachable(f"{self.url}: {error}", "check the network, REGION and --endpoint-url") from error

    def _fault(self, key: str, response: dict[str, Any]) -> Fault:
        code = str(response["Error"].get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        what = f"{self.url}: {code} for {key} ({response['Error'].get('Message', '')})"
        if code == "NoSuchBucket":
            return Usage(f"bucket {self._bucket} does not exist", "create it, or correct BUCKET_NAME and REGION")
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            where = response["Error"].get("Region") or response["Error"].get("Endpoint") or "another region"
            return Usage(f"bucket {self._bucket} is in {where}", "set REGION")
        if code == "RequestTimeTooSkewed":
            return Denied(what, "set the clock of this machine")
        if _S3_THROTTLED.search(code) or status in (429, 503):
            return Throttled(what)
        return _fault_of_status(status, key, what, "check the keys and the IAM policy (README)")


_S3_THROTTLED = re.compile("SlowDown|Throttl|TooManyRequests|RequestLimitExceeded")


def _fault_of_status(status: int, key: str, what: str, hint: str) -> Fault:
    """Return the fault that an HTTP status stands for, where the error's name says no more."""
    if status in (404, 410):
        return Missing(what)
    if status == 412:
        return Conflict(f"{key} is taken")
    if status == 429:
        return Throttled(what)
    if status in (401, 403):
        return Denied(what, hint)
    return Unreachable(what)  # 5xx, 408, 409, a 400 BadDigest, and 200 with an error inside


def _s3_encryption(access: Access) -> dict[str, Any]:
    wanted: dict[str, Any] = {"StorageClass": access.storage_class} if access.storage_class else {}
    if access.sse:
        wanted["ServerSideEncryption"] = access.sse
    if access.sse == "aws:kms":
        wanted["BucketKeyEnabled"] = True  # one KMS call for many objects, not one for each
        if access.kms_key:
            wanted["SSEKMSKeyId"] = access.kms_key
    return wanted


def _base64_crc(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


class GCSStore:
    """gs://bucket[/prefix], through google-cloud-storage. Large files travel in resumable sessions, part by part."""

    ordered = True

    def __init__(self, bucket: str, prefix: str, access: Access) -> None:
        try:
            from google.cloud import storage
        except ImportError as error:
            hint = "pip install google-cloud-storage, or install the package cassbackup-gcs"
            raise Usage(f"gs:// needs Google's client ({error})", hint) from None
        self.url = f"gs://{bucket}/{prefix}".rstrip("/")
        self._prefix, self._access, self._date = prefix, access, 0.0
        options = {"api_endpoint": access.endpoint_url} if access.endpoint_url else None
        with self._faults(""):
            self._client: Any = storage.Client(client_options=options)
        self._bucket = self._client.bucket(bucket)
        self._http: Any = self._client._http  # requests.Session; resumable sessions have no public door for parts
        if access.ca_file:
            self._http.verify = access.ca_file
        self._http.hooks["response"].append(self._note_date)

    def put(self, key: str, body: Body, crc32: int) -> Head:
        blob = self._new(key)
        blob.metadata = {"crc32": hex32(crc32)}
        with self._faults(key):
            blob.upload_from_string(
                bytes(body), "application/octet-stream", if_generation_match=0, checksum="crc32c", **self._CALL
            )
        return self._head(key, blob)

    def begin(self, key: str, size: int) -> str:
        with self._faults(key):
            url = self._new(key).create_resumable_upload_session(
                "application/octet-stream", size, if_generation_match=0, checksum=None, **self._CALL
            )
        return f"{size} {url}"

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        size, url = upload.split(" ", 1)
        headers = {"Content-Range": f"bytes {offset}-{offset + len(body) - 1}/{size}"}
        with self._faults(key):
            reply = self._http.put(url, data=bytes(body), headers=headers, timeout=(10, 60))
            self._check(key, reply, (200, 201, 308))
        if reply.status_code == 308 and _resumed_at(reply) < offset + len(body):
            raise Unreachable(f"{self.url}: only a part of part {number} of {key} was taken")
        return Part(number, len(body), _crc32c(body), crc32)

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        size, url = upload.split(" ", 1)
        with self._faults(key):
            reply = self._http.put(url, headers={"Content-Range": f"bytes */{size}"}, timeout=(10, 60))
            self._check(key, reply, (200, 201, 308))
        there = int(size) if reply.status_code != 308 else _resumed_at(reply)
        whole = there // part_bytes if there < int(size) else -(-there // part_bytes)
        return {number: Part(number, part_bytes, "") for number in range(1, whole + 1)}

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        return Part(held.number, len(body), _crc32c(body), crc32)  # finish compares the whole object's CRC-32C

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        head = self.head(key)
        whole = 0
        for part in parts:
            whole = crc32_combine(whole, int(part.token, 16), part.size, 0x82F63B78)
        if head is None:
            raise Missing(f"upload of {key} is gone")
        if head.crc32c != _base64_crc(whole):
            raise Conflict(f"{key} is taken")
        return replace(head, crc32=hex32(crc32))

    def abandon(self, key: str, upload: str) -> None:
        with contextlib.suppress(Missing), self._faults(key):
            self._http.delete(upload.split(" ", 1)[1], timeout=(10, 60))

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        return iter(())  # GCS has no list of sessions, and drops them by itself after a week

    def get(self, key: str, start: int = 0) -> Iterator[bytes]:
        with self._faults(key), self._blob(key).open("rb", chunk_size=4 * MIB, **self._CALL) as file:
            file.seek(start)
            yield from iter(lambda: file.read(MIB), b"")

    def head(self, key: str) -> Head | None:
        with self._faults(key):
            blob = self._bucket.get_blob(self._prefix + key, **self._CALL)
        return self._head(key, blob) if blob else None

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        wanted = {"start_offset": self._prefix + after} if after else {}
        with self._faults(prefix):
            for blob in self._client.list_blobs(self._bucket, prefix=self._prefix + prefix, **wanted, **self._CALL):
                key = blob.name[len(self._prefix) :]
                if key > after:
                    yield self._head(key, blob)

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        why = {}
        for key in keys:
            try:
                with contextlib.suppress(Missing), self._faults(key):
                    self._blob(key).delete(**self._CALL)
            except Denied as fault:
                why[key] = fault.what
        return why

    def now(self) -> float:
        return self._date or time.time()

    _CALL: Final = MappingProxyType({"timeout": (10, 60), "retry": None})

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(self._prefix + key)

    def _new(self, key: str) -> Any:
        blob = self._bucket.blob(self._prefix + key, kms_key_name=self._access.kms_key or None)
        if self._access.storage_class:
            blob.storage_class = self._access.storage_class
        return blob

    def _head(self, key: str, blob: Any) -> Head:
        crc32 = (blob.metadata or {}).get("crc32", "")
        modified = blob.updated.timestamp() if blob.updated else self.now()
        return Head(key, int(blob.size or 0), str(blob.generation), modified, crc32, blob.crc32c or "")

    def _note_date(self, reply: Any, *_: Any, **__: Any) -> None:
        if date := reply.headers.get("date"):
            self._date = parsedate_to_datetime(date).timestamp()

    def _check(self, key: str, reply: Any, good: tuple[int, ...]) -> None:
        if reply.status_code not in good:
            raise self._fault(key, reply.status_code, reply.text[:200])

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
        from requests import RequestException

        try:
            yield
        except GoogleAPICallError as error:
            raise self._fault(key, int(error.code or 500), error.message) from error
        except (RequestException, TransportError) as error:
            raise Unreachable(f"{self.url}: {error}", "check the network and --endpoint-url") from error
        except (DefaultCredentialsError, GoogleAuthError) as error:
            hint = "set GOOGLE_APPLICATION_CREDENTIALS, or give the instance a service account"
            raise Denied(f"no credentials for {self.url} ({error})", hint) from error

    def _fault(self, key: str, status: int, message: str) -> Fault:
        what = f"{self.url}: {status} for {key} ({message})"
        if status == 404 and "bucket" in message.lower():
            return Usage(f"bucket {self._bucket.name} does not exist", "create it, or correct BUCKET_NAME")
        return _fault_of_status(status, key, what, "check the service account, its roles (README) and access scopes")


def _resumed_at(reply: Any) -> int:
    """Return how many bytes a resumable session has: Range: bytes=0-524287, or none at all."""
    return int(reply.headers["Range"].rpartition("-")[2]) + 1 if "Range" in reply.headers else 0


def _crc32c(body: Body) -> str:
    import google_crc32c

    return hex32(google_crc32c.value(bytes(body)))


class Budget:
    """Bytes a second for the whole node, over all threads and stores. 0 is no limit."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at, self._lock = rate, 0.0, threading.Lock()

    def delay(self, size: int) -> float:
        """Take `size` bytes; return how many seconds to wait before sending them."""
        if not self._rate:
            return 0.0
        with self._lock:
            begin = max(time.monotonic(), self._free_at)
            self._free_at = begin + size / self._rate
        return begin - time.monotonic()


class Retrying:
    """A store that keeps trying, the only place that sleeps, and that never overwrites.

    `wait(seconds)` sleeps, and returns True when we are asked to stop. With patience None it never gives up, and
    retries Denied as well, since rights can be given without a restart.

    A lost reply looks like a taken key, and some servers take no notice of If-None-Match. So "taken" means: ask
    and compare; and the first put is sent twice, which tells whether the server refuses the second.
    """

    def __init__(self, store: Store, wait: Callable[[float], bool], patience: float | None, budget: Budget) -> None:
        self._store, self._wait, self._patience, self._budget = store, wait, patience, budget
        self._slow_until = 0.0
        self._refuses: bool | None = None  # does the server refuse to overwrite?
        self.url, self.ordered, self.now = store.url, store.ordered, store.now
        self.trouble = ""  # what is wrong now, for status

    def put(self, key: str, body: Body, crc32: int) -> Head:
        """Store an object, or find that it is there. Raises Conflict where the key has other content."""
        return self._try(self._put, key, body, crc32)

    def put_now(self, key: str, body: Body, crc32: int) -> Head:
        """Put in one attempt: whoever writes a listing must look around before the next."""
        return self._put(key, body, crc32)

    def pause(self, fault: Fault, tries: int) -> None:
        """Wait before another attempt at what failed so often, or raise the fault if that is too long."""
        self._bear(fault, tries, 2.0**tries)

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        """See Store."""
        put = self._store.put_part
        return self._try(lambda: self._charged(len(body), put, key, upload, number, offset, body, crc32))

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        """Make the parts an object, or find that it is there. Raises Conflict where the key has other content."""
        return self._try(self._finish, key, upload, parts, crc32)

    def same(self, key: str, size: int, crc32: int) -> Head | None:
        """Return the object if there is one. Raises Conflict if it has other content: never size alone."""
        head = self.head(key)
        if head is None:
            return None
        if head.size == size and not head.crc32:
            head = replace(
                head, crc32=hex32(functools.reduce(lambda crc, chunk: zlib.crc32(chunk, crc), self.get(key), 0))
            )
        if (head.size, head.crc32) != (size, hex32(crc32)):
            raise Conflict(f"{key} is taken by other content")
        return head

    def begin(self, key: str, size: int) -> str:
        """See Store."""
        return self._try(self._store.begin, key, size)

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        """See Store."""
        return self._try(self._store.parts, key, upload, part_bytes)

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        """See Store."""
        return self._try(self._store.match, key, upload, held, offset, body, crc32)

    def abandon(self, key: str, upload: str) -> None:
        """See Store."""
        return self._try(self._store.abandon, key, upload)

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """See Store. Without the right to ask there are none."""
        with contextlib.suppress(Denied, Missing):  # Missing: how rclone says that there are none
            yield from self._store.unfinished(prefix)

    def get(self, key: str, start: int = 0) -> Iterator[bytes]:
        """See Store. Goes on where it broke off."""
        for chunk in self._stream(lambda: self._store.get(key, start)):
            start += len(chunk)
            yield chunk

    def head(self, key: str) -> Head | None:
        """See Store."""
        return self._try(self._store.head, key)

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        """See Store. Goes on where it broke off."""
        for head in self._stream(lambda: self._store.list(prefix, after)):
            after = head.key
            yield head

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """See Store. Without the right to delete all stay."""

        def attempt() -> dict[str, str]:
            try:
                return self._store.delete(keys)
            except Denied as fault:
                return dict.fromkeys(keys, fault.what)

        return self._try(attempt)

    def _put(self, key: str, body: Body, crc32: int) -> Head:
        if self._refuses is False and (head := self.same(key, len(body), crc32)):
            return head
        try:
            head = self._charged(len(body), self._store.put, key, body, crc32)
            if self._refuses is None:
                self._refuses = False
                self._store.put(key, body, crc32)  # the same bytes, so no harm is done if it is taken
                log.warning("store=%s overwrites: it ignores If-None-Match, so each key is looked up first", self.url)
        except Conflict:
            self._refuses = True
            if there := self.same(key, len(body), crc32):
                return there
            raise Unreachable(f"{key} was taken and is gone again") from None
        return head

    def _finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        size = sum(part.size for part in parts)
        if not self._refuses and (head := self.same(key, size, crc32)):
            return head
        try:
            return self._store.finish(key, upload, parts, crc32)
        except (Conflict, Missing):  # Missing: perhaps the reply to the first try was lost
            if head := self.same(key, size, crc32):
                return head
            raise

    def _charged(self, size: int, call: Callable[..., T], *args: Any) -> T:
        if (delay := self._budget.delay(size)) > 0 and self._wait(delay):
            raise Stopped("stopped")
        return call(*args)

    def _stream(self, restart: Callable[[], Iterator[T]]) -> Iterator[T]:
        items = restart()

        def advance() -> T | None:
            nonlocal items
            try:
                return next(items, None)
            except Fault:
                items = restart()
                raise

        while (item := self._try(advance)) is not None:
            yield item

    def _try(self, call: Callable[..., T], *args: Any) -> T:
        began = time.monotonic()
        for attempt in itertools.count():
            if (slow := self._slow_until - time.monotonic()) > 0 and self._wait(slow):
                raise Stopped("stopped")
            try:
                result = call(*args)
                self.trouble = ""
                return result
            except (Unreachable, Denied) as fault:
                self._bear(fault, attempt, time.monotonic() - began)
        raise AssertionError("unreachable")

    def _bear(self, fault: Fault, attempt: int, elapsed: float) -> None:
        """Wait before the next attempt, or raise the fault when patience has ended."""
        patience = self._patience if not isinstance(fault, Denied) or self._patience is None else 0.0
        delay = min(60.0, 0.25 * 2**attempt if isinstance(fault, Unreachable) else 60.0) * random.uniform(0.5, 1.0)
        if patience is not None and elapsed + delay > patience:
            raise fault
        if str(fault) != self.trouble:
            log.warning("store failed, trying again error=%s", quote(str(fault)))
        self.trouble = str(fault)
        if isinstance(fault, Throttled):  # all threads ask the same store: all of them slow down
            self._slow_until = max(self._slow_until, time.monotonic() + delay)
        if self._wait(delay):
            raise Stopped("stopped") from fault


def open_store(url: str, access: Access = Access()) -> Store:  # noqa: B008 - frozen
    """Open s3://bucket[/prefix], gs://bucket[/prefix] or file:///directory. SDKs are imported here, not before."""
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        if not rest.startswith("/"):
            raise Usage(f"bucket {url} is not absolute", "write file:///directory")
        return DirStore(os.path.normpath(rest))
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
    if scheme not in ("s3", "gs") or not bucket:
        raise Usage(f"bucket {url} is of no known kind", "write s3://bucket, gs://bucket or file:///directory")
    return S3Store(bucket, prefix, access) if scheme == "s3" else GCSStore(bucket, prefix, access)


# ======================================================================================================
# Cloud
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class Cloud:
    """Where we run, as the metadata service says."""

    scheme: str  # s3 or gs
    instance: str
    region: str


def detect_cloud(environ: Mapping[str, str], limit_s: float = 5.0) -> Cloud | None:
    """Ask the metadata services of AWS (IMDSv2) and GCE at once; None if neither answers within the limit.

    They are asked directly (a proxy would answer for its own machine), without following redirects and reading
    64 KiB at most. Their usual switches are honoured: AWS_EC2_METADATA_DISABLED, NO_GCE_CHECK, and the addresses
    AWS_EC2_METADATA_SERVICE_ENDPOINT and GCE_METADATA_HOST. Where DMI names a maker of real machines, nothing is sent.
    """
    answers: queue.SimpleQueue[Cloud | None] = queue.SimpleQueue()
    asked = [
        ask
        for ask, switch in ((_ask_aws, "AWS_EC2_METADATA_DISABLED"), (_ask_gce, "NO_GCE_CHECK"))
        if environ.get(switch, "").lower() != "true"
    ]
    if not any(name in environ for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST")):
        asked = asked if _may_be_cloud() else []

    def answer(ask: Callable[[Mapping[str, str]], Cloud | None]) -> None:
        try:
            answers.put(ask(environ))
        except Exception as error:
            log.debug("metadata service did not answer error=%s", quote(repr(error)))
            answers.put(None)

    for ask in asked:
        threading.Thread(target=answer, args=(ask,), daemon=True).start()
    deadline = time.monotonic() + limit_s
    for _ in asked:
        with contextlib.suppress(queue.Empty):
            if cloud := answers.get(timeout=max(0.0, deadline - time.monotonic())):
                return cloud
    return None


def _may_be_cloud() -> bool:
    """Read the machine's maker; absent (a container, Firecracker) means unknown, not no."""
    try:
        with open("/sys/class/dmi/id/sys_vendor") as file:
            return bool(re.search("amazon|xen|google|qemu|^$", file.read().strip().lower()))
    except OSError:
        return True


def _ask_aws(environ: Mapping[str, str]) -> Cloud | None:
    base = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/") + "/latest/"
    token = _ask(base + "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
    if not token:
        return None
    headers = {"X-aws-ec2-metadata-token": token}
    instance = _ask(base + "meta-data/instance-id", headers)
    region = _ask(base + "meta-data/placement/region", headers)
    return Cloud("s3", instance, region) if instance else None


def _ask_gce(environ: Mapping[str, str]) -> Cloud | None:
    base = f"http://{environ.get('GCE_METADATA_HOST', '169.254.169.254')}/computeMetadata/v1/instance/"
    headers = {"Metadata-Flavor": "Google"}  # also in the answer: anybody may listen at that address
    instance = _ask(base + "id", headers, marked=headers)
    zone = _ask(base + "zone", headers, marked=headers)  # projects/123/zones/europe-west1-b
    return Cloud("gs", instance, zone.rpartition("/")[2].rpartition("-")[0]) if instance else None


def _ask(url: str, headers: Mapping[str, str], method: str = "GET", marked: Mapping[str, str] | None = None) -> str:
    import requests

    with requests.Session() as session:
        session.trust_env = False
        reply = session.request(method, url, headers=headers, timeout=(1, 2), allow_redirects=False, stream=True)
        if reply.status_code != 200 or any(reply.headers.get(name) != value for name, value in (marked or {}).items()):
            return ""
        text = reply.raw.read(65536, decode_content=True).decode("ascii", "replace").strip()
    return text if re.fullmatch(r"[A-Za-z0-9+/=_.:-]{1,1000}", text) else ""


def name_node(cloud: Cloud | None, host: str, machine_id: str) -> str:
    """Return <hostname>-<instance_id>; off cloud the first 12 digits of the machine id. Raises Usage."""
    host = host.strip().rstrip(".")
    if host in ("", "localhost", "localhost.localdomain") or host.startswith("-"):
        raise Usage(f"host name {host!r} names no node", "set the host's name, or pass --name")
    instance = cloud.instance if cloud else machine_id[:12]
    if not instance:
        raise Usage("neither an instance id nor /etc/machine-id is to be had", "pass --name")
    return check_node(f"{host}-{instance}")


def check_node(name: str) -> str:
    """Return a node's name if it can be one component of a key. Raises Usage."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}", name) or re.search(r"\.(listings|condemned)$", name):
        raise Usage(f"node name {name!r} cannot be used in keys", "use letters, digits, - _ + and . (at most 200)")
    return name


# ======================================================================================================
# Ledger
# ======================================================================================================


class Ledger:
    """A memory that may be lost: which stamps are stored under which key, and which names are listed.

    Every row carries a checksum over itself and over what it was written for (store and node): SQLite does not
    notice flipped bits, and a ledger of another bucket must not speak for this one. What does not check is not
    there. A ledger that cannot be written is done without.
    """

    _TABLES = """
        CREATE TABLE IF NOT EXISTS stored (place TEXT, name TEXT, stamp TEXT, found TEXT, sum INT,
                                           PRIMARY KEY (place, name, stamp)) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS listed (directory TEXT, since TEXT, names TEXT, sum INT,
                                           PRIMARY KEY (directory, since)) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT, sum INT) WITHOUT ROWID;
    """

    def __init__(self, path: str, scope: str) -> None:
        self._path, self._scope, self._lock = path, scope, threading.RLock()
        self.broken = ""
        try:
            self._db = self._open()
        except sqlite3.Error as error:
            aside = f"{path}.broken-{utc(time.time())}"
            log.warning("ledger cannot be read, starting a new one error=%s kept=%s", quote(str(error)), aside)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path + suffix, aside + suffix)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-4096;" + self._TABLES)
        db.execute("SELECT count(*) FROM facts").fetchone()
        return db

    def _sum(self, *row: str) -> int:
        return zlib.crc32("\0".join((self._scope, *row)).encode())

    def _read(self, sql: str, *args: str) -> list[tuple[str, ...]]:
        """Return the rows that check, without their checksums."""
        with self._lock:
            try:
                rows = self._db.execute(sql, args).fetchall()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                self._complain(error)
                return []
        return [row[:-1] for row in rows if self._checks(args, row)]

    def _checks(self, args: tuple[str, ...], row: tuple[Any, ...]) -> bool:
        return all(isinstance(word, str) for word in row[:-1]) and row[-1] == self._sum(*args, *row[:-1])

    def _write(self, sql: str, rows: Iterable[tuple[str, ...]]) -> None:
        """Run the statement for each row, with its checksum, in one transaction."""
        with self._lock:
            try:
                self._db.execute("BEGIN")
                self._db.executemany(sql, [(*row, self._sum(*row)) for row in rows])
                self._db.execute("COMMIT")
                self.broken = ""
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self.broken:
            log.error("ledger failed, going on without it error=%s", quote(str(error)))
        self.broken = str(error)

    def knows(self, place: str, name: str, stamp: Stamp) -> tuple[str, ...] | None:
        """Return (key, etag, crc32, crc32c, run, checked) for bytes that were stored, else None."""
        sql = "SELECT found, sum FROM stored WHERE place = ? AND name = ? AND stamp = ?"
        rows = self._read(sql, place, quote(name), str(stamp))
        return tuple(json.loads(rows[0][0])) if rows else None

    def record(self, entries: Iterable[tuple[str, Stored]], run: str) -> None:
        """Remember what was stored or confirmed just now: (place, entry)."""
        now = f"{time.time():.0f}"
        rows = (
            (place, quote(e.name), str(e.stamp), json.dumps((e.key, e.etag, e.crc32, e.crc32c, run, now)))
            for place, e in entries
        )
        self._write("INSERT OR REPLACE INTO stored VALUES (?, ?, ?, ?, ?)", rows)

    def listed(self, directory: str) -> dict[str, dict[str, str]]:
        """Return what is listed of a directory: {taking or batch: {name: stamp}}."""
        rows = self._read("SELECT since, names, sum FROM listed WHERE directory = ?", quote(directory))
        split = (tuple(line.split("\t") for line in names.split("\n")) for _, names in rows)
        return {row[0]: {unquote(name): stamp for name, stamp in lines} for row, lines in zip(rows, split, strict=True)}

    def list(self, directory: str, since: str, names: Mapping[str, Stamp]) -> None:
        """Remember what a directory has in the bucket's listings."""
        lines = "\n".join(f"{quote(name)}\t{stamp}" for name, stamp in names.items())
        self._write("INSERT OR REPLACE INTO listed VALUES (?, ?, ?, ?)", [(quote(directory), since, lines)])

    def fact(self, name: str) -> str:
        """Return a remembered value, "" if there is none."""
        rows = self._read("SELECT value, sum FROM facts WHERE name = ?", name)
        return rows[0][0] if rows else ""

    def remember(self, name: str, value: str) -> None:
        """Remember a value."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", [(name, value)])

    def facts(self, prefix: str) -> dict[str, str]:
        """Return the remembered values whose names begin with a prefix, by the rest of the name."""
        with self._lock:
            try:
                rows = self._db.execute("SELECT * FROM facts WHERE name GLOB ?", (prefix + "*",)).fetchall()
            except sqlite3.Error as error:
                self._complain(error)
                return {}
        return {name[len(prefix) :]: value for name, value, checksum in rows if checksum == self._sum(name, value)}

    def forget(self, directory: str = "") -> None:
        """Forget a directory's listed names; without one, everything."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            if directory:
                self._db.execute("DELETE FROM listed WHERE directory = ?", (quote(directory),))
            else:
                for table in ("stored", "listed", "facts"):
                    self._db.execute(f"DELETE FROM {table}")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


# ======================================================================================================
# Watch
# ======================================================================================================

_EVENT = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, length of the name; inotify(7)


class Watcher:
    """inotify, as hints: arm() a directory, and hints() tells which of the armed may have changed.

    pyinotify gives the descriptor, the watches and the constants. Its Notifier is not used: it costs more than the
    pinning, drops events that arrive before it knows the watch, and dies of a name that is not UTF-8.

    File directories are armed once (IN_ONESHOT): one event, then silence until they are armed again, which is done
    before each look. So a burst of 80,000 links is some hundred events, and the kernel's queue does not overflow.

    Two races would lose a hint for ever. An event can arrive before add_watch has returned its descriptor: so both
    sides hold one lock, and the reader looks again under it. And a watch armed between a one-shot's event and its
    end dies with the old one: so IN_IGNORED is a hint too.
    """

    def __init__(self) -> None:
        try:
            import pyinotify
        except ImportError as error:
            raise Usage(f"pyinotify cannot be imported ({error})", "pip install pyinotify pyasyncore") from None
        pyinotify.log.setLevel(logging.CRITICAL)  # it reports every directory that vanished as an error
        self._names = pyinotify
        self._manager = pyinotify.WatchManager()
        self._watched: dict[int, tuple[Any, bool]] = {}  # wd: (token, is it a file directory)
        self._dirty: dict[Any, None] = {}
        self._all = False
        self._full = False
        self._stopped: str | None = None
        self._lock = threading.Lock()  # watches
        self._news = threading.Condition()  # hints
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._read_forever, name="watch", daemon=True)
        self._thread.start()

    def arm(self, token: Any, fd: int, files: bool) -> bool:
        """Watch the directory open at fd; False where the watch table is full. Hints will name the token."""
        names = self._names
        mask = names.IN_CREATE | names.IN_MOVED_TO | names.IN_ONLYDIR
        if files:
            mask |= names.IN_CLOSE_WRITE | names.IN_ONESHOT
        path = f"/proc/self/fd/{fd}"  # the very directory that is looked into; and pyinotify cannot spell every name
        with self._lock:
            wd = self._manager.add_watch(path, mask)[path]
            if wd >= 0:
                self._watched[wd] = (token, files)
                self._full = False
                return True
        if not self._full:
            hint = "raise it: sysctl fs.inotify.max_user_watches=1048576"
            log.warning("watch table is full, unwatched directories are looked at every few seconds hint=%s", hint)
        self._full = True
        return False

    def hint(self, token: Any) -> None:
        """Give a hint ourselves."""
        with self._news:
            self._dirty[token] = None
            self._news.notify()

    def hint_all(self) -> None:
        """Say that anything may have changed."""
        with self._news:
            self._all = True
            self._news.notify()

    def hints(self, timeout: float) -> tuple[list[Any], bool]:
        """Wait for hints; return the directories that may have changed, and whether all may have.

        Raises Fault when the reader has died: silence must not look like quiet.
        """
        with self._news:
            if not (self._dirty or self._all or self._stopped is not None):
                self._news.wait(timeout)
            if self._stopped:
                raise Fault(f"reading inotify failed ({self._stopped})", "restart")
            dirty, everything = list(self._dirty), self._all
            self._dirty, self._all = {}, False
            return dirty, everything

    def close(self) -> None:
        """Stop reading."""
        os.write(self._wake[1], b"x")
        self._thread.join()
        self._manager.close()
        for fd in self._wake:
            os.close(fd)

    def _read_forever(self) -> None:
        why = ""
        try:
            fd, poll = self._manager.get_fd(), select.poll()
            poll.register(fd, select.POLLIN)
            poll.register(self._wake[0], select.POLLIN)
            while not any(ready == self._wake[0] for ready, _ in poll.poll()):
                self._take(os.read(fd, 256 * 1024))
        except Exception as error:
            log.exception("reading inotify failed")
            why = repr(error)
        with self._news:
            self._stopped = why
            self._news.notify()

    def _take(self, events: bytes) -> None:
        names, offset, everything = self._names, 0, False
        dirty: dict[Any, None] = {}
        while offset < len(events):
            wd, mask, _, length = _EVENT.unpack_from(events, offset)
            offset += _EVENT.size + length
            if mask & names.IN_Q_OVERFLOW:
                log.warning("inotify queue overflowed, looking everywhere hint=raise fs.inotify.max_queued_events")
                everything = True
                continue
            token, files = self._watched.get(wd) or self._look_again(wd)
            if mask & names.IN_IGNORED:
                self._drop(wd)
            elif not files and not mask & names.IN_ISDIR:
                continue  # a flush or a compaction in a live table's directory
            if token is not None:
                dirty[token] = None
        with self._news:
            self._dirty.update(dirty)
            self._all |= everything
            self._news.notify()

    def _look_again(self, wd: int) -> tuple[Any, bool]:
        with self._lock:
            return self._watched.get(wd, (None, False))

    def _drop(self, wd: int) -> None:
        with self._lock:
            if self._watched.pop(wd, None):
                self._manager.del_watch(wd)


# ======================================================================================================
# Scan and pin
# ======================================================================================================

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo must not hang us
_GET_VERSION: Final = 0x80087601  # FS_IOC_GETVERSION, ioctl_iflags(2): differs when an inode number is used again
_WARM_NAMES: Final = 200_000  # names kept in memory of directories looked into lately
_HELD_FILES: Final = 256
_LINK, _BY_PATH, _LOST = "", "@", "!"  # what stands behind the ~ of a name in the pin area


@dataclass(frozen=True, slots=True)
class Filters:
    """What the operator wants stored. Globs, but for include and exclude (regular expressions on the whole path)."""

    keyspaces: tuple[str, ...] = ()
    exclude_keyspaces: tuple[str, ...] = ()
    exclude_tables: tuple[str, ...] = ()  # ks.table
    exclude_tags: tuple[str, ...] = ()
    since: float = 0.0
    include: re.Pattern[str] | None = None  # archives: without it only snapshots/ and backups/ are looked into
    exclude: re.Pattern[str] | None = None

    def directory(self, parts: Sequence[str]) -> bool:
        """Tell whether a directory, given by its path below the data directory, is wanted."""
        match parts:
            case [keyspace]:
                wanted = not self.keyspaces or _any_glob(keyspace, self.keyspaces)
                return wanted and not _any_glob(keyspace, self.exclude_keyspaces)
            case [keyspace, table]:
                return not _any_glob(f"{keyspace}.{table_id_of(table)[0]}", self.exclude_tables)
            case [_, _, "snapshots", tag]:
                return not _any_glob(tag, self.exclude_tags)
        return True

    def archived(self, path: str) -> bool:
        """Tell whether a file outside snapshots/ and backups/ is wanted."""
        return bool(self.include and self.include.search(path) and not (self.exclude and self.exclude.search(path)))


def _any_glob(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


class Area:
    """The pin area of one data directory: hard links that mirror where they came from.

    <area>/ks1%2Fusers-5a1c%2Fsnapshots%2Fdaily~<taking>/nb-1-big-Data.db~ is the queue and its only record. A file
    that could not be linked is <name>~@<inode>, an empty file: it is read where it is. One that was given up is
    <name>~!<inode>. Names too long to mark stand under their hash, with a file <hash>.name beside them.
    """

    def __init__(self, root: str, path: str) -> None:
        self.root, self.path = root, path
        self.full = False  # beyond --max-pinned or the free-space floor: nothing more is linked
        self.held: dict[tuple[str, str], int] = {}  # descriptors instead of links
        self.pending: dict[str, set[str]] = {}  # source directory: since of its pin directories
        self.by_since: dict[str, set[str]] = {}  # the other way round
        os.makedirs(os.path.join(path, ".released~"), 0o755, exist_ok=True)
        self._lock = lock_file(os.path.join(path, "lock"))
        self.id = self._remembered("id", f"{random.getrandbits(48):012x}")
        for name in os.listdir(path):
            if parsed := self.parse(name):
                self._note(*parsed)

    def _note(self, relative: str, since: str) -> None:
        self.pending.setdefault(relative, set()).add(since)
        self.by_since.setdefault(since, set()).add(relative)

    def _remembered(self, name: str, new: str) -> str:
        path = os.path.join(self.path, name)
        if not os.path.exists(path):
            write_whole(path, new.encode())
        with open(path) as file:
            return file.read()

    def parse(self, name: str) -> tuple[str, str] | None:
        """Return (source directory below the data directory, since) of a directory of the area."""
        parsed = parse_pin_directory(name)
        return (self._true_name(self.path, parsed[0]), parsed[1]) if parsed else None

    def _true_name(self, directory: str, name: str) -> str:
        if not name.startswith("%%"):
            return name
        with open(os.path.join(directory, name + ".name"), "rb") as file:
            return os.fsdecode(file.read())

    def make(self, relative: str, since: str) -> int:
        """Make the directory for the pins of a source directory, and open it."""
        name = pin_directory(relative, since)
        path = os.path.join(self.path, name)
        if since not in self.pending.get(relative, ()):
            if name.startswith("%%"):
                write_whole(os.path.join(self.path, name.rpartition("~")[0] + ".name"), os.fsencode(relative))
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o755)
            self._note(relative, since)
        return os.open(path, _OPEN_DIRECTORY)

    def mark(self, name: str, how: str, fd: int) -> str:
        """Return a file's name in the pin directory open at fd; beyond NAME_MAX it is written down beside it."""
        if len(os.fsencode(name)) <= 230 and not name.startswith("%%"):
            return f"{name}~{how}"
        short = digest_name(name)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(short + ".name", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd))
        write_whole(f"/proc/self/fd/{fd}/{short}.name", os.fsencode(name))
        return f"{short}~{how}"

    def marks(self, relative: str, since: str) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
        """Yield (name, how, entry) of a source directory's pins."""
        path = os.path.join(self.path, pin_directory(relative, since))
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                head, tilde, how = entry.name.rpartition("~")
                if tilde:
                    yield self._true_name(path, head), how, entry

    def inodes(self, relative: str, sinces: Iterable[str]) -> dict[str, int]:
        """Return the inode of each name that is pinned. A pin keeps its number from being used again."""
        return {
            name: int(how[1:], 16) if how else entry.inode()
            for since in sinces
            for name, how, entry in self.marks(relative, since)
        }

    def read(self, relative: str, since: str) -> tuple[list[Pinned], list[str]]:
        """Return the pins of a source directory, and the names that are lost."""
        directory = os.path.normpath(os.path.join(self.root, relative))
        pins, lost = [], []
        for name, how, entry in self.marks(relative, since):
            path, held = entry.path, -1
            if how:
                path, held = os.path.join(directory, name), self.held.get((entry.path.rpartition("/")[0], name), -1)
            try:
                info = os.fstat(held) if held >= 0 else os.lstat(path)
            except FileNotFoundError:
                info = None
            if info is None or how.startswith(_LOST) or (how and f"{info.st_ino:x}" != how[1:]):
                lost.append(name)
                continue
            who = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_nlink)
            pins.append(Pinned(directory, name, path, Stamp.of(self.id, info), *who, held))
        return pins, lost

    def release(self, relative: str, since: str, listed: Mapping[str, Stamp | None]) -> bool:
        """Let go of a source directory's pins, by one rename; False if one of them is not what was listed.

        `listed` gives the stamp of each name, None where any will do. The caller holds the pinning lock.
        """
        for name, how, entry in self.marks(relative, since):
            stamp = listed.get(name, False)
            if stamp is False or (stamp and not how and Stamp.of(self.id, entry.stat()) != stamp):
                return False
        name = pin_directory(relative, since)
        for key in [key for key in self.held if key[0] == os.path.join(self.path, name)]:
            os.close(self.held.pop(key))
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(self.path, name), os.path.join(self.path, ".released~", f"{name}.{time.time_ns()}"))
        for index, one, other in ((self.pending, relative, since), (self.by_since, since, relative)):
            index[one].discard(other)
            if not index[one]:
                del index[one]
        return True

    def sweep(self) -> None:
        """Unlink what was released."""
        released = os.path.join(self.path, ".released~")
        for name in os.listdir(released):
            shutil.rmtree(os.path.join(released, name), ignore_errors=True)

    def close(self) -> None:
        """Let the lock go."""
        os.close(self._lock)


def lock_file(path: str) -> int:
    """Take the lock and write our pid into it; the lock goes with the process. Raises Busy with the holder's pid."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Busy(f"another cassbackup (pid {holder}) holds {path}", "ask it with `cassbackup status`") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def write_whole(path: str, body: bytes, durable: bool = True) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(body)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.rename(temporary, path)


def open_area(root: str, pin_dir: str = "") -> Area:
    """Open a data directory's pin area: beside it, else inside, where link(2) works. Raises Usage, Busy."""
    real = os.path.realpath(root)
    candidates = [
        os.path.join(os.path.dirname(real), ".cassbackup", os.path.basename(real)),
        os.path.join(real, ".cassbackup", "backups"),  # Cassandra's own walks skip a directory of this name
    ]
    if pin_dir:
        candidates = [os.path.join(os.path.abspath(pin_dir), quote(real, slash="%2F"))]
    problems = []
    for path in candidates:
        try:
            os.makedirs(path, 0o755, exist_ok=True)
            problem = why_no_link(real, path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if not problem:
            return Area(root, path)
        problems.append(f"{path}: {problem}")
    usable = [path for path in candidates if os.access(path, os.W_OK)]
    hint = "run as the owner of the data, with the pin area under the same mount, or pass --pin-dir"
    if not usable:
        raise Usage(f"no pin area for {root} ({'; '.join(problems)})", hint)
    log.error("cannot link, will hold open files or read in place problem=%s hint=%s", quote("; ".join(problems)), hint)
    return Area(root, usable[0])


def why_no_link(root: str, path: str) -> str:
    """Link some file of the data directory into the area, and remove the link; return what went wrong, if it did."""
    probe = os.path.join(path, f".probe-{os.getpid()}")
    files = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    for file in itertools.islice(files, 20):
        try:
            os.link(file, probe, follow_symlinks=False)
            os.unlink(probe)
            return ""
        except FileNotFoundError:
            continue  # a compaction was faster
        except OSError as error:
            return str(error.strerror)
    return "" if os.stat(root).st_dev == os.stat(path).st_dev else "another file system"


class Place:
    """A directory that is looked into, and what is known of it."""

    __slots__ = (
        "area",
        "relative",
        "path",
        "tag",
        "files",
        "life",
        "mtime_ns",
        "since",
        "pinned",
        "listed",
        "armed",
        "ready",
    )

    def __init__(self, area: Area, relative: str, archive: bool) -> None:
        parts = relative.split("/") if relative else []
        self.area, self.relative = area, relative
        self.path = os.path.normpath(os.path.join(area.root, relative))
        snapshot = len(parts) >= 4 and parts[2] == "snapshots"
        self.tag = tuple(parts[:4]) if snapshot else ()  # keyspace, table, "snapshots", tag
        self.files = snapshot or (len(parts) >= 3 and parts[2] == "backups") or (archive and parts[2:] != ["snapshots"])
        self.life: tuple[int, int] | None = None  # inode and its generation
        self.mtime_ns = 0
        self.since = ""
        self.pinned: dict[str, int] | None = None  # inode by name; None: not in memory
        self.listed: dict[str, str] | None = None  # stamp by name
        self.armed = False
        self.ready = 0.0  # not to be looked into again before this (monotonic)


class Pinner:
    """The one thread that arms, looks and links, and does nothing else.

    `listed(directory)` tells what the bucket lists of it, {since: {name: stamp}}; `touched(unit, files, delay)` is called
    when a unit has new pins. `gate` is closed while a directory is dirty.
    """

    def __init__(
        self,
        areas: Sequence[Area],
        watcher: Watcher,
        filters: Filters,
        clock: Callable[[], str],
        listed: Callable[[str], dict[str, dict[str, str]]],
        touched: Callable[[Unit, int, float], None],
    ) -> None:
        self.areas, self._watcher, self._filters, self._clock = areas, watcher, filters, clock
        self._listed, self._touched = listed, touched
        self.lock = threading.RLock()  # pinning, and releasing what is pinned
        self.gate = threading.Event()
        self.counts: Counter[str] = Counter()
        self.looked = 0.0  # when the last full look began (time.time)
        self._places: dict[str, Place] = {}
        self._tags: dict[tuple[str, ...], set[Place]] = {}
        self._takings: dict[tuple[str, ...], str] = {}
        self._ended: set[tuple[str, ...]] = set()
        self._batches: dict[tuple[str, str], str] = {}
        self._warm: OrderedDict[Place, int] = OrderedDict()
        self._later: dict[Place, None] = {}
        self._refused: set[str] = set()

    def run(self, stop: threading.Event, reconcile_s: float) -> None:
        """Look wherever a hint points, until asked to stop. Raises Fault when the watcher has died."""
        self.look_everywhere()
        due = time.monotonic() + reconcile_s
        while not stop.is_set():
            busy = self._later or not self.gate.is_set()
            dirty, everything = self._watcher.hints(0.02 if busy else max(0.0, min(30.0, due - time.monotonic())))
            if dirty or everything or self._later:
                self.gate.clear()
            else:
                self.gate.set()
            if everything:
                self.look_everywhere()
            self._follow([*self._later, *dirty])
            if time.monotonic() >= due:
                self.reconcile()
                unarmed = any(not place.armed for place in self._places.values())
                due = time.monotonic() + (min(2.0, reconcile_s) if unarmed else reconcile_s)

    def _follow(self, hints: Iterable[Any]) -> None:
        """Look into each place that is hinted at, a little later where it has just been looked into."""
        self._later, now = {}, time.monotonic()
        for hint in dict.fromkeys(hints):
            if not isinstance(hint, Place):
                hint()
            elif hint.ready > now:
                self._later[hint] = None
            elif self._places.get(hint.path) is hint:
                self.look(hint)

    def look_everywhere(self) -> None:
        """Look into every directory there is."""
        began = time.time()
        for area in self.areas:
            self._enter(area, "")
        for place in list(self._places.values()):
            if self._places.get(place.path) is place:
                self.look(place)
        self.looked = began

    def reconcile(self) -> None:
        """Look into the directories that changed without a hint, or may have."""
        began = time.time()
        for place in list(self._places.values()):
            try:
                changed = os.lstat(place.path).st_mtime_ns != place.mtime_ns
            except OSError:
                changed = True
            if changed and self._places.get(place.path) is place:
                before = self.counts["found"]
                self.look(place)
                self.counts["found_by_rescan"] += self.counts["found"] - before
        self.looked = began

    def confirm(self, unit: Unit) -> bool:
        """Look afresh, in every data directory, at the path of a snapshot; False if a name vanished meanwhile.

        Called from other threads; the looking is done by the pinning thread. A data directory that never had this
        tag counts as looked at. One that had it and has it no more does not: we cannot know what we missed.
        """
        answer: Future[bool] = Future()

        def look() -> None:
            tag = (unit.keyspace, unit.table, "snapshots", unit.tag)
            places = list(self._tags.get(tag, ()))
            sure = all([self.look(place) for place in places])
            gone = any(self._places.get(place.path) is not place for place in places)
            held = {area for area in self.areas if unit.since in area.by_since}
            seen = {place.area for place in places}
            answer.set_result(sure and not gone and held <= seen and self._takings.get(tag) == unit.since)

        self._watcher.hint(look)
        return answer.result(timeout=600)

    def close_batch(self, unit: Unit) -> None:
        """Let new files go to the next batch. The caller holds the lock."""
        for base in [base for base, since in self._batches.items() if since == unit.since]:
            del self._batches[base]

    def postpone(self, area: Area, relative: str, since: str, names: Iterable[str], delay: float) -> None:
        """Move pins on to the next batch of their directory."""
        with self.lock:
            place = self._places.get(os.path.normpath(os.path.join(area.root, relative))) or Place(area, relative, True)
            following = self._since(place)
            source = os.open(os.path.join(area.path, pin_directory(relative, since)), _OPEN_DIRECTORY)
            target = area.make(relative, following)
            try:
                moved = set(names)
                for name, how, entry in area.marks(relative, since):
                    if name in moved:
                        os.rename(entry.name, area.mark(name, how, target), src_dir_fd=source, dst_dir_fd=target)
            finally:
                os.close(source)
                os.close(target)
        self._touched(unit_of(relative, following), len(moved), delay)

    def tables(self) -> list[str]:
        """Return the tables that have directories, as keyspace/table-id."""
        return sorted({place.relative for place in list(self._places.values()) if place.relative.count("/") == 1})

    def forget(self) -> None:
        """Take nothing for listed any more, and look everywhere again: the bucket is not what it was."""
        with self.lock:
            for place in self._places.values():
                place.listed, place.mtime_ns = None, 0
        self._watcher.hint_all()

    def released(self, area: Area, relative: str) -> None:
        """Note that pins of a source directory are gone. The caller holds the lock."""
        if place := self._places.get(os.path.normpath(os.path.join(area.root, relative))):
            place.pinned = place.listed = None

    def look(self, place: Place) -> bool:
        """Arm a place, look into it, pin what is new; False if something vanished before it was pinned."""
        try:
            fd = os.open(place.path, _OPEN_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self._leave(place)
            else:
                self._refuse(place.path, error)
            return False
        try:
            with self.lock:
                before = self.counts["vanished"]
                self._look_at(place, fd)
                return self.counts["vanished"] == before
        finally:
            os.close(fd)

    def _look_at(self, place: Place, fd: int) -> None:
        began, info = time.monotonic(), os.fstat(fd)
        place.armed = self._watcher.arm(place, fd, place.files)
        # Clocks of directories tick coarsely: what changed just now may change again without a trace.
        place.mtime_ns = info.st_mtime_ns if time.time_ns() - info.st_mtime_ns > 2e9 else 0
        if place.tag:
            self._recognize(place, (info.st_ino, _generation(fd)))
        if place.relative.count("/") == 1 and not place.files:  # a live table's directory may hold thousands
            for name in ("snapshots", "backups"):
                self._enter(place.area, f"{place.relative}/{name}")
            return
        if place.tag and info.st_mtime < self._filters.since:
            self.counts["skipped_since"] += 1
            return
        with os.scandir(fd) as entries:
            self._sort(place, fd, entries)
        place.ready = time.monotonic() + 0.01 + 5 * min(0.2, time.monotonic() - began) * (not place.tag)

    def _sort(self, place: Place, fd: int, entries: Iterable[os.DirEntry[str]]) -> None:
        """Enter directories, pin new files, count what is neither."""
        pinned, listed = self._warm_up(place) if place.files else ({}, {})
        found = []
        for entry in entries:
            if pinned.get(entry.name) == entry.inode():  # our link holds the inode: the same number is the same file
                continue
            if entry.is_dir(follow_symlinks=False):
                self._enter(place.area, f"{place.relative}/{entry.name}".lstrip("/"))
            elif not entry.is_file(follow_symlinks=False):
                self._skip(place, entry.name)
            elif place.files and self._is_new(place, entry, listed):
                found.append(entry)
        if place.tag and any(entry.name in pinned or self._replaced(entry, listed) for entry in found):
            self._renew(place)  # other inodes under the same names: the tag was taken again
            with os.scandir(fd) as again:
                return self._sort(place, fd, again)
        if found:
            self._pin_all(place, fd, found, pinned)

    def _is_new(self, place: Place, entry: os.DirEntry[str], listed: Mapping[str, str]) -> bool:
        archive = not place.tag and "/backups" not in f"/{place.relative}"
        if archive and not self._filters.archived(os.path.join(place.path, entry.name)):
            return False
        if entry.name not in listed and not (self._filters.since and not place.tag):
            return True
        try:
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            self.counts["vanished"] += 1
            return False
        if not place.tag and info.st_mtime < self._filters.since:
            self.counts["skipped_since"] += 1
            return False
        return listed.get(entry.name) != str(Stamp.of(place.area.id, info))

    def _replaced(self, entry: os.DirEntry[str], listed: Mapping[str, str]) -> bool:
        return entry.name in listed and Stamp.parse(listed[entry.name]).ino != entry.inode()

    def _pin_all(self, place: Place, fd: int, found: list[os.DirEntry[str]], pinned: dict[str, int]) -> None:
        if not place.tag and any(entry.name in pinned for entry in found):
            self._batches.pop(self._batch_of(place), None)  # one name, two contents: two batches
        since = self._since(place)
        pins = place.area.make(place.relative, since)
        try:
            for entry in found:
                if self._pin(place, fd, pins, entry):
                    pinned[entry.name] = entry.inode()
        finally:
            os.close(pins)
        self.counts["found"] += len(found)
        self._touched(unit_of(place.relative, since), len(found), 0.0)

    def _pin(self, place: Place, fd: int, pins: int, entry: os.DirEntry[str]) -> bool:
        """Make the link; False if the file vanished before."""
        area, name = place.area, entry.name
        try:
            if not area.full:
                os.link(name, area.mark(name, _LINK, pins), src_dir_fd=fd, dst_dir_fd=pins, follow_symlinks=False)
                return True
        except FileNotFoundError:
            self.counts["vanished"] += 1
            log.warning("vanished before it was pinned path=%s", quote(os.path.join(place.path, name)))
            return False
        except FileExistsError:
            return True
        except OSError as error:
            self._hold(place, fd, entry, error)
        marker = area.mark(name, f"{_BY_PATH}{entry.inode():x}", pins)
        with contextlib.suppress(OSError):
            os.close(os.open(marker, os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=pins))
        return True

    def _hold(self, place: Place, fd: int, entry: os.DirEntry[str], error: OSError) -> None:
        """Hold a file open that cannot be linked."""
        self.counts["unlinked"] += 1
        if self.counts["unlinked"] == 1:
            hint = "run as the owner of the data; keep the pin area under the same mount"
            log.error("link failed, holding files open error=%s hint=%s", error.strerror, hint)
        area = place.area
        if len(area.held) < _HELD_FILES:
            with contextlib.suppress(OSError):
                key = (os.path.join(area.path, pin_directory(place.relative, self._since(place))), entry.name)
                area.held[key] = os.open(entry.name, _OPEN_FILE, dir_fd=fd)

    def _warm_up(self, place: Place) -> tuple[dict[str, int], dict[str, str]]:
        """Return what is pinned and what is listed of a place, from memory if it was looked into lately."""
        since = self._since(place) if place.tag else ""
        if place.pinned is None or place.listed is None:
            sinces = place.area.pending.get(place.relative, set())
            place.pinned = place.area.inodes(place.relative, sinces & {since} if since else sinces)
            listed = self._listed(place.path)
            place.listed = (
                listed.get(since, {}) if since else {k: v for key in sorted(listed) for k, v in listed[key].items()}
            )
        self._warm[place] = len(place.pinned) + len(place.listed)
        self._warm.move_to_end(place)
        while sum(self._warm.values()) > _WARM_NAMES and len(self._warm) > 1:
            cold, _ = self._warm.popitem(last=False)
            cold.pinned = cold.listed = None
        return place.pinned, place.listed

    def _batch_of(self, place: Place) -> tuple[str, str]:
        parts = place.relative.split("/")
        return place.area.root, "/".join(parts[:3]) if parts[2:3] == ["backups"] else place.relative

    def _since(self, place: Place) -> str:
        """Return the taking or the batch that a new file of this place belongs to."""
        if not place.tag:
            return self._batches.setdefault(self._batch_of(place), self._clock())
        if not place.since:
            if place.tag not in self._takings or place.tag in self._ended:
                self._takings[place.tag] = self._remembered_taking(place) or self._clock()
                self._ended.discard(place.tag)
            place.since = self._takings[place.tag]
        return place.since

    def _remembered_taking(self, place: Place) -> str:
        """Return the taking that pins or listings know of a tag, right after a start, if it still is that one.

        Only manifest.json can tell, wherever it is: SSTables are the same inodes in every snapshot.
        """
        if self.looked or place.tag in self._ended:
            return ""
        tag = "/".join(place.tag)
        roots = [(area, os.path.normpath(os.path.join(area.root, tag))) for area in self.areas]
        listed = {path: self._listed(path) for _, path in roots}
        takings = {since for area, path in roots for since in (*area.pending.get(tag, ()), *listed[path])}
        since = max(takings | place.area.pending.get(place.relative, set()), default="")
        known, there = set(), set()
        for area, path in roots:
            pinned = area.inodes(tag, [since]).get(MANIFEST) if since in area.pending.get(tag, ()) else None
            stamp = listed[path].get(since, {}).get(MANIFEST)
            known |= {(path, pinned or Stamp.parse(str(stamp)).ino)} if pinned or stamp else set()
            with contextlib.suppress(OSError):
                info = os.lstat(os.path.join(path, MANIFEST))
                same = stamp in (None, str(Stamp.of(area.id, info)))
                there.add((path, info.st_ino if same else -1))
        return since if not known or known == there else ""

    def _recognize(self, place: Place, life: tuple[int, int]) -> None:
        if place.life not in (None, life):
            self._renew(place)
        place.life = life

    def _renew(self, place: Place) -> None:
        """Begin a new taking of a tag, for all its directories."""
        self._takings[place.tag] = self._clock()
        self._ended.discard(place.tag)
        for other in self._tags.get(place.tag, ()):
            other.since, other.pinned, other.listed = "", None, None
            self._watcher.hint(other)

    def _enter(self, area: Area, relative: str) -> None:
        """Look into a directory that is not known yet."""
        path = os.path.normpath(os.path.join(area.root, relative))
        parts = relative.split("/") if relative else []
        archive = self._filters.include is not None
        deep = len(parts) > 2 and parts[2] not in ("snapshots", "backups")
        if path in self._places or (deep and not archive) or not self._filters.directory(parts):
            return
        if parts and parts[-1].startswith(".cassbackup"):
            return
        place = self._places[path] = Place(area, relative, archive)
        if place.tag:
            self._tags.setdefault(place.tag, set()).add(place)
        self.look(place)

    def _leave(self, place: Place) -> None:
        """Forget a directory that is gone."""
        if not place.relative:
            place.mtime_ns = 0
            return self._refuse(place.path, FileNotFoundError(errno.ENOENT, "the data directory is gone"))
        if self._places.get(place.path) is place:
            del self._places[place.path]
        self._warm.pop(place, None)
        if place.tag:
            self._ended.add(place.tag)
            self._tags.get(place.tag, set()).discard(place)
            if not self._tags.get(place.tag):
                for index in (self._tags, self._takings):
                    index.pop(place.tag, None)
                self._ended.discard(place.tag)

    def _refuse(self, path: str, error: OSError) -> None:
        self.counts["refused"] += 1
        if path not in self._refused:
            self._refused.add(path)
            log.error("cannot look path=%s error=%s hint=run as the owner of the data", quote(path), error.strerror)

    def _skip(self, place: Place, name: str) -> None:
        if place.files:
            self.counts["skipped_kind"] += 1
            log.info("not a regular file, skipped path=%s", quote(os.path.join(place.path, name)))


def _generation(fd: int) -> int:
    """Return what tells two lives of one inode number apart; 0 where the file system does not say."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, _GET_VERSION, bytes(8))[:4], sys.byteorder)
    except OSError:
        return 0


# ======================================================================================================
# Upload
# ======================================================================================================

_DONTCACHE: Final = 0x80  # RWF_DONTCACHE, Linux 6.14: read without leaving the pages in the cache


def read_quietly(fd: int, offset: int, size: int) -> bytearray:
    """Read a range and leave the page cache as it was: what Cassandra has there stays, what it has not does not come.

    Where the kernel cannot do it by itself, mincore(2) tells which pages were there before, and the others are
    dropped after the read. A blind POSIX_FADV_DONTNEED would evict Cassandra's hot pages.
    """
    body = bytearray(size)
    try:
        got = os.preadv(fd, [body], offset, _DONTCACHE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        cold = _cold_ranges(fd, offset, size)
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_RANDOM)  # read ahead would warm the next range
        got = os.preadv(fd, [body], offset)
        for start, length in cold:
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    if got != size:
        raise Corrupt(f"read {got} of {size} bytes at {offset}", "the file changed while it was read")
    return body


def _cold_ranges(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges (offset, length) that are not in the page cache. `offset` is a multiple of the page size."""
    if not size:
        return []
    page = mmap.PAGESIZE
    resident = ctypes.create_string_buffer(-(-size // page))
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset) as window:
        first = ctypes.c_char.from_buffer(window)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(size), resident)
        del first  # or the window could not be closed
    if failed:
        return []
    cold = re.finditer(rb"[\x00\x02\x04\x06]+", bytes(byte & 1 for byte in resident.raw))
    return [(offset + run.start() * page, (run.end() - run.start()) * page) for run in cold]


def _keys(key: str, crc32: int) -> tuple[str, ...]:
    """Return the keys for bytes that should be at `key`, where other content may have been written."""
    return key, f"{key}@{hex32(crc32)}", f"{key}@{hex32(crc32)}.{utc(time.time())}"


class Sending:
    """A file on its way to the store: whole, or begun and then part by part."""

    __slots__ = ("pinned", "key", "urgent", "look", "future", "part_bytes", "count", "next", "upload", "held", "parts")

    def __init__(self, pinned: Pinned, key: str, urgent: bool, look: bool) -> None:
        self.pinned, self.key, self.urgent, self.look = pinned, key, urgent, look
        self.future: Future[Head] = Future()
        size = pinned.stamp.size
        self.part_bytes = max(PART_BYTES, -(-size // PART_COUNT // MIB) * MIB)
        self.count = -(-size // self.part_bytes) if size > PART_BYTES else 0  # 0: whole
        self.next = 0  # the part to be taken next; 0 is the beginning
        self.upload = ""
        self.held: dict[int, Part] = {}  # what an earlier process has sent
        self.parts: dict[int, Part] = {}

    def read(self, number: int) -> bytearray:
        """Return part `number`, 0 for the whole. Raises Corrupt if these are not the bytes that were pinned."""
        pinned, offset = self.pinned, max(0, number - 1) * self.part_bytes
        fd = pinned.held if pinned.held >= 0 else os.open(pinned.path, _OPEN_FILE)
        try:
            body = read_quietly(fd, offset, min(self.part_bytes, pinned.stamp.size - offset))
            if Stamp.of(pinned.stamp.area, os.fstat(fd)) != pinned.stamp:
                raise Corrupt(f"{quote(pinned.path)} changed while it was read", "it is read again")
            return body
        finally:
            if fd != pinned.held:
                os.close(fd)


class Uploaders:
    """A pool of threads whose unit of work is a part, so that one huge file and many small ones share it.

    Urgent files go first; among equals, parts and small files take turns. `resume(key)` returns the id of an
    upload that an earlier process began, `begun(key, upload)` is told of a new one.
    """

    def __init__(
        self,
        store: Retrying,
        threads: int,
        gate: threading.Event,
        resume: Callable[[str], str],
        begun: Callable[[str, str], None],
    ) -> None:
        self._store, self._gate, self._resume, self._begun = store, gate, resume, begun
        self._lanes: dict[tuple[bool, bool], deque[Sending]] = {
            (urgent, large): deque() for urgent in (True, False) for large in (True, False)
        }
        self._large_next = False
        self._stopping = False
        self._work = threading.Condition()
        self.sent: Counter[str] = Counter()  # files, bytes
        self._threads = [threading.Thread(target=self._run, name=f"upload-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def send(self, pinned: Pinned, key: str, urgent: bool, look: bool) -> Future[Head]:
        """Store a pinned file under a key. The future may raise any Fault, Conflict where the key is taken."""
        sending = Sending(pinned, key, urgent, look)
        self._queue(sending)
        return sending.future

    def stop(self, limit_s: float) -> None:
        """Take no more work; wait for the parts that are on their way."""
        with self._work:
            self._stopping = True
            for lane in self._lanes.values():
                for sending in lane:
                    sending.future.cancel()
            self._work.notify_all()
        deadline = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _queue(self, sending: Sending) -> None:
        with self._work:
            if self._stopping:
                sending.future.cancel()
            self._lanes[sending.urgent, sending.count > 0].append(sending)
            self._work.notify()

    def _take(self) -> tuple[Sending, int] | None:
        """Wait for work; return a file and which part of it, None when stopping."""
        with self._work:
            while not self._stopping:
                lanes = [
                    (urgent, large) for urgent in (True, False) for large in (self._large_next, not self._large_next)
                ]
                lane = next((self._lanes[choice] for choice in lanes if self._lanes[choice]), None)
                if lane is None:
                    self._work.wait()
                    continue
                self._large_next = not self._large_next
                sending = lane.popleft()
                if sending.future.done():
                    continue
                number, sending.next = sending.next, sending.next + 1
                if 0 < number < sending.count and not self._store.ordered:
                    lane.append(sending)  # another thread may take the next part meanwhile
                    self._work.notify()
                return sending, number
        return None

    def _run(self) -> None:
        while task := self._take():
            sending, number = task
            self._gate.wait(PAUSE_S)
            try:
                self._send(sending, number)
            except Exception as error:
                if not isinstance(error, (Fault, OSError)):
                    log.exception("upload failed path=%s", quote(sending.pinned.path))
                with contextlib.suppress(InvalidStateError):
                    sending.future.set_exception(error)

    def _send(self, sending: Sending, number: int) -> None:
        if not sending.count:
            self._done(sending, self._send_whole(sending))
        elif number == 0:
            if head := self._begin(sending):
                return self._done(sending, head)
            self._queue(sending)
        else:
            sending.parts[number] = self._send_part(sending, number)
            if len(sending.parts) == sending.count:
                self._done(sending, self._finish(sending))
            elif self._store.ordered:
                self._queue(sending)

    def _done(self, sending: Sending, head: Head) -> None:
        with contextlib.suppress(InvalidStateError):
            sending.future.set_result(head)

    def _send_whole(self, sending: Sending) -> Head:
        body = sending.read(0)
        crc32 = zlib.crc32(body)
        for key in _keys(sending.key, crc32):
            with contextlib.suppress(Conflict):
                if sending.look and (head := self._store.same(key, len(body), crc32)):
                    return head
                head = self._store.put(key, body, crc32)
                self.sent.update(files=1, bytes=len(body))
                return head
        raise Conflict(f"{sending.key} is taken, whatever is added to it")

    def _begin(self, sending: Sending) -> Head | None:
        """Begin an upload in parts or find an unfinished one; return the object if it is there already."""
        if self._store.head(sending.key):  # ask before 300 GB are sent, not after
            size, crc32 = sending.pinned.stamp.size, 0
            for number in range(1, sending.count + 1):
                crc32 = zlib.crc32(sending.read(number), crc32)
            for sending.key in _keys(sending.key, crc32):  # noqa: B020 - the first that is free, or has these bytes
                with contextlib.suppress(Conflict):
                    if head := self._store.same(sending.key, size, crc32):
                        return head
                    break
        if upload := self._resume(sending.key):
            with contextlib.suppress(Missing):
                sending.held = self._store.parts(sending.key, upload, sending.part_bytes)
                sending.upload = upload
        if not sending.upload:
            sending.upload = self._store.begin(sending.key, sending.pinned.stamp.size)
            self._begun(sending.key, sending.upload)
        return None

    def _send_part(self, sending: Sending, number: int) -> Part:
        body, where = sending.read(number), (sending.key, sending.upload)
        crc32, offset = zlib.crc32(body), (number - 1) * sending.part_bytes
        if (held := sending.held.get(number)) and (part := self._store.match(*where, held, offset, body, crc32)):
            return part
        part = self._store.put_part(*where, number, offset, body, crc32)
        self.sent.update(bytes=len(body))
        return part

    def _finish(self, sending: Sending) -> Head:
        parts, crc32 = [sending.parts[number] for number in sorted(sending.parts)], 0
        for part in parts:
            crc32 = crc32_combine(crc32, part.crc32, part.size)
        try:
            head = self._store.finish(sending.key, sending.upload, parts, crc32)
        finally:
            self._begun(sending.key, "")
        self.sent.update(files=1)
        return replace(head, crc32=hex32(crc32))


# ======================================================================================================
# Publish
# ======================================================================================================

Path = tuple[str, str]  # directory, name


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said of a unit: is it complete, what does it lack, what does not belong to it."""

    complete: bool
    missing: tuple[str, ...] = ()
    left_out: frozenset[Path] = frozenset()


def judge_snapshot(
    files: Mapping[Path, Stored], manifest: bytes | None, sure: bool, read: Callable[[Stored], bytes]
) -> Verdict:
    """Tell whether a table's snapshot is whole.

    Cassandra writes manifest.json after the last link of a table, and it names every Data.db. `sure` says that a
    look at the directories, begun after that, missed nothing; else each TOC.txt must be fulfilled.
    """
    named = manifest_files(manifest) if manifest is not None else None
    if named is None:
        return Verdict(False, (MANIFEST,))
    below = {_below_tag(path): path for path in files}
    missing = [name for name in named if name not in below]
    sstables = {name.removesuffix("-Data.db") for name in named}
    if not sure:
        for name in sorted(sstables - {name.removesuffix("-Data.db") for name in missing}):
            missing += _unfulfilled(name, below, files, read)
    stray = {below[name] for name in below if (prefix := _prefix_of(name)) and prefix not in sstables}
    return Verdict(not missing, tuple(sorted(missing)), frozenset(stray))


def manifest_files(body: bytes) -> list[str] | None:
    """Return the Data.db files that a manifest.json names; None while Cassandra is still writing it."""
    try:
        names = json.loads(body)["files"]
        return [str(name) for name in names]
    except (ValueError, KeyError, TypeError):
        return None


def _below_tag(path: Path) -> str:
    """Return a file's name below snapshots/<tag>, as manifest.json spells it: .idx/nb-1-big-Data.db."""
    return "/".join([*path[0].rsplit("/snapshots/", 1)[1].split("/")[1:], path[1]])


def _prefix_of(name: str) -> str:
    """Return nb-1-big, or .idx/nb-1-big, of a component's name; "" for what is no component."""
    folder, _, base = name.rpartition("/")
    split = sstable_of(base)
    return f"{folder}/{split[0]}".lstrip("/") if split else ""


def _unfulfilled(
    sstable: str, below: Mapping[str, Path], files: Mapping[Path, Stored], read: Callable[[Stored], bytes]
) -> list[str]:
    """Return the components that an SSTable's own TOC.txt names and that are not there."""
    toc = f"{sstable}-TOC.txt"
    if toc not in below:
        return [toc]
    wanted = read(files[below[toc]]).decode("utf-8", "replace").split()
    return [
        f"{sstable}-{name}"
        for name in wanted
        if f"{sstable}-{name}" not in below and not OPTIONAL_COMPONENT.fullmatch(name)
    ]


def judge_sstables(files: Mapping[Path, Stored], read: Callable[[Stored], bytes]) -> dict[tuple[str, ...], list[Path]]:
    """Return the SSTables of a batch that lack components: the names that are missing, and the files that are there."""
    below = {os.path.join(*path).lstrip("/"): path for path in files}
    sstables: dict[str, list[Path]] = {}
    for name, path in below.items():
        if prefix := _prefix_of(name):
            sstables.setdefault(prefix, []).append(path)
    judged = {tuple(_unfulfilled(name, below, files, read)): paths for name, paths in sstables.items()}
    return {missing: paths for missing, paths in judged.items() if missing}


class Publisher:
    """Writes listings, after asking the store about everything that they name.

    `fresh(entry)` tells whether this process stored or confirmed an entry within the last day.
    """

    def __init__(self, store: Retrying, node: str, fresh: Callable[[Stored], bool]) -> None:
        self._store, self.node, self._fresh = store, node, fresh
        self._condemned: dict[str, frozenset[str]] = {}  # by the key of prune's file
        self._condemned_at = -CONDEMNED_LOOK_S
        self._lock = threading.Lock()

    def read(self, keys: Iterable[str]) -> list[Listing]:
        """Read listings. One that cannot be read is named in the log, and does not count."""
        listings = []
        for key in keys:
            try:
                listings.append(load_listing(b"".join(self._store.get(key))))
            except (Corrupt, Missing) as fault:
                log.error("listing does not count key=%s error=%s", key, quote(str(fault)))
        return listings

    def known(self, unit: Unit, manifest: Stamp | None) -> tuple[Unit, Listing | None, str]:
        """Return what the bucket already lists of a unit: (the unit by its listed name, a listing, the newest UTC).

        A snapshot is recognized by the stamp of its manifest.json even when our own memory of it is lost; a batch
        by its opening, under which it is listed.
        """
        prefix = listings_of(self.node, unit)
        if unit.kind != "snapshot":
            keys = [
                head.key for head in self._store.list(prefix, prefix + unit.since[:-1]) if parse_listing_name(head.key)
            ]
            ours = [key for key in keys if key.startswith(prefix + unit.since) and "-rollup-" not in key]
            return unit, self._sum(self.read(ours)), _newest(keys)
        takings: dict[str, list[str]] = {}
        above = prefix[: -len(unit.since) - 1]
        for head in self._store.list(above):
            if parse_listing_name(head.key):
                takings.setdefault(head.key[len(above) :].split("/")[0], []).append(head.key)
        for since in sorted(takings, reverse=True):
            if since == unit.since or manifest:
                listing = self._sum(self.read(takings[since]))
                stamps = {entry.stamp for entry in listing.files if entry.name == MANIFEST} if listing else set()
                if since == unit.since or manifest in stamps:
                    return replace(unit, since=since), listing, _newest(takings[since])
        return unit, None, ""

    def newest_of_table(self, unit: Unit) -> list[str]:
        """Return the keys of a table's incremental listings, but for replaced ones, and of its newest whole snapshot."""
        prefix = listings_of(self.node, unit)
        if unit.kind != "archive":
            prefix = "/".join(prefix.split("/")[:3]) + "/"
        named = [(parsed, head.key) for head in self._store.list(prefix) if (parsed := parse_listing_name(head.key))]
        snapshots = [
            item for item in named if item[1][len(prefix) :].startswith("snapshots/") and item[0][1] == "complete"
        ]
        batches = [key for _, key in named if not key[len(prefix) :].startswith("snapshots/")]
        rollups = self.read(key for key in batches if "-rollup-" in key)
        replaced = {name for listing in rollups for name in listing.replaces}
        newest = [max(snapshots)[1]] if snapshots else []
        return [key for key in batches if key.rpartition("/")[2] not in replaced] + newest

    def _sum(self, listings: Sequence[Listing]) -> Listing | None:
        """Add up listings of one unit: of each file the later entry, complete once any says so."""
        if not listings:
            return None
        files = {(entry.directory, entry.name): entry for listing in listings for entry in listing.files}
        return replace(
            listings[-1], files=tuple(files.values()), complete=any(listing.complete for listing in listings)
        )

    def publish(
        self, listing: Listing, again: Callable[[Stored], Stored | None], newest: str, clock: Callable[[], str]
    ) -> Listing:
        """Write a listing, once every key in it is known to be there and to stay.

        `again(entry)` stores an entry's file anew under a key never used before; None if we do not hold it any more.
        Raises Missing where a file is gone from the store and cannot be stored again.
        """
        tries = 0
        while True:
            began = self._store.now()
            listing = replace(listing, files=self._checked(listing.files, again), listed=later(clock(), newest))
            body = dump_listing(listing)
            try:
                self._store.put_now(
                    listings_of(self.node, listing.unit) + listing_name(listing), body, zlib.crc32(body)
                )
            except (Unreachable, Denied) as fault:
                self._store.pause(fault, tries := tries + 1)
                continue
            newest = listing.listed
            if self._store.now() - began <= PUBLISH_LIMIT_S:
                return listing
            checked = self._checked(listing.files, again)
            if checked == listing.files:
                return listing

    def _checked(self, entries: tuple[Stored, ...], again: Callable[[Stored], Stored | None]) -> tuple[Stored, ...]:
        condemned = self._read_condemned()
        bad = {entry.key for entry in entries if entry.key in condemned}
        bad |= self.absent([entry for entry in entries if entry.key not in bad and not self._fresh(entry)])
        checked = []
        for entry in entries:
            better = again(entry) if entry.key in bad else entry
            if better is None:
                raise Missing(f"{entry.key} is gone from the store, and its file from this node")
            checked.append(better)
        return tuple(checked)

    def absent(self, entries: Sequence[Stored]) -> set[str]:
        """Return the keys that are not there as recorded: same size and etag, or else the same content."""
        heads: dict[str, Head] = {}
        folders = {entry.key.rpartition("/")[0] + "/" for entry in entries}
        if len(entries) > 3 * len(folders):  # a page of a list tells a thousand
            heads = {head.key: head for folder in folders for head in self._store.list(folder)}
        bad = set()
        for entry in entries:
            head = heads.get(entry.key)
            if head and (head.size, head.etag) == (entry.stamp.size, entry.etag):
                continue
            try:
                if not self._store.same(entry.key, entry.stamp.size, int(entry.crc32, 16)):
                    bad.add(entry.key)
            except Conflict:
                bad.add(entry.key)
        return bad

    def _read_condemned(self) -> frozenset[str]:
        """Return the keys that prune is about to delete. One look serves a minute."""
        with self._lock:
            if time.monotonic() - self._condemned_at >= CONDEMNED_LOOK_S:
                there = [head.key for head in self._store.list(f"{self.node}.condemned/")]
                for key in there:
                    if key not in self._condemned:
                        self._condemned[key] = frozenset(json.loads(b"".join(self._store.get(key)))["keys"])
                self._condemned = {key: self._condemned[key] for key in there}
                self._condemned_at = time.monotonic()
            return frozenset().union(*self._condemned.values())

    def roll_up(self, unit: Unit, before: str, clock: Callable[[], str]) -> Listing | None:
        """Write one listing for a table's older incremental listings, and name those that it replaces.

        The newest roll-up is taken in while it is not much larger than what came since, so that a file is written
        down again a logarithm of times, not each time.
        """
        batches = Unit("incremental", unit.keyspace, unit.table, "", before)
        prefix = listings_of(self.node, batches)
        named = [(head.key, parsed) for head in self._store.list(prefix) if (parsed := parse_listing_name(head.key))]
        newest = max((parsed[0] for _, parsed in named if parsed[1] == "rollup"), default="")
        small = [(key, parsed[2]) for key, parsed in named if parsed[1] == "complete" and newest < parsed[0] < before]
        total = sum(files for _, files in small)
        small += [(key, parsed[2]) for key, parsed in named if newest == parsed[0] and parsed[2] <= 2 * total]
        if len(small) < 2:
            return None
        files = {}
        for listing in self.read(key for key, _ in sorted(small)):
            for entry in listing.files:
                files[entry.directory, entry.name, entry.stamp] = replace(entry, seen=entry.seen or listing.unit.since)
        names = tuple(sorted(key.rpartition("/")[2] for key, _ in small))
        rollup = Listing(self.node, batches, before, True, tuple(files.values()), replaces=names)
        try:
            return self.publish(rollup, lambda entry: None, _newest([key for key, _ in named]), clock)
        except Missing as fault:
            log.warning("no roll-up, a listed file is gone error=%s hint=run cassbackup verify", quote(str(fault)))
            return None


def _newest(keys: Iterable[str]) -> str:
    return max((parsed[0] for key in keys if (parsed := parse_listing_name(key))), default="")


# ======================================================================================================
# Daemon
# ======================================================================================================


class Clock:
    """UTC stamps that only go forward, whatever the system's clock does while we run."""

    def __init__(self) -> None:
        self._newest, self._lock = utc(0), threading.Lock()

    def __call__(self) -> str:
        """Return now, or the first moment after the newest stamp."""
        with self._lock:
            self._newest = later(utc(time.time()), self._newest)
            return self._newest


@dataclass(slots=True)
class Waiting:
    """A unit that is not listed yet."""

    found: float  # when its first file was seen (time.time)
    due: float  # when it should be carried (monotonic)
    touched: float  # when its newest file was seen (monotonic)
    files: int = 0
    size: int = 0
    carried: bool = False  # somebody is at it
    again: bool = False  # something came while it was being carried


class Backlog:
    """The units that wait to be stored and listed. The pins on disk are the truth; this is their order."""

    def __init__(self) -> None:
        self.units: dict[Unit, Waiting] = {}
        self.changed = threading.Condition()

    def touch(self, unit: Unit, files: int, delay: float) -> None:
        """Note that a unit has something new, which need not be looked at before the delay is over."""
        now = time.monotonic()
        with self.changed:
            due = now + (delay or (3 if unit.urgent else 1) * QUIET_S)
            waiting = self.units.setdefault(unit, Waiting(time.time(), due, now))
            waiting.touched, waiting.again, waiting.files = now, True, waiting.files + files
            waiting.due = min(waiting.due, due)
            self.changed.notify_all()

    def take(self, urgent: bool, count: int) -> list[tuple[Unit, Waiting]]:
        """Return the oldest units that are due, for carrying."""
        now = time.monotonic()
        with self.changed:
            due = [
                item
                for item in self.units.items()
                if item[0].urgent == urgent and not item[1].carried and item[1].due <= now
            ]
            taken = heapq.nsmallest(count, due, key=lambda item: (item[1].found, item[0].since))
            for _, waiting in taken:
                waiting.carried, waiting.again = True, False
            return taken

    def put_back(self, unit: Unit, delay: float | None) -> None:
        """End a carrying: the unit is listed (None), or wants to be carried again after a delay."""
        with self.changed:
            waiting = self.units[unit]
            waiting.carried = False
            if delay is None and not waiting.again:
                del self.units[unit]
            else:
                waiting.due = time.monotonic() + (QUIET_S if waiting.again else delay or 0.0)
            self.changed.notify_all()

    def wait(self, free: Mapping[bool, int]) -> None:
        """Wait, a second at most, until a unit is due for which there is a free carrier."""
        with self.changed:
            soon = (waiting.due for unit, waiting in self.units.items() if free[unit.urgent] and not waiting.carried)
            self.changed.wait(min(1.0, max(0.0, min(soon, default=3600.0) - time.monotonic())))


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator chose about carrying."""

    settle_s: float = 60.0
    full: bool = False
    delete_incrementals: bool = False


class Carrier:
    """Carries one unit from its pins to its listing, and lets the pins go."""

    def __init__(
        self,
        pinner: Pinner,
        store: Retrying,
        uploaders: Uploaders,
        node: str,
        ledger: Ledger,
        clock: Clock,
        policy: Policy,
    ) -> None:
        self._pinner, self._store, self._uploaders, self._ledger = pinner, store, uploaders, ledger
        self._clock, self._policy = clock, policy
        self.publisher = Publisher(store, node, self._is_fresh)
        self.counts: Counter[str] = Counter()
        self.recovered: set[Unit] = set()  # left by an earlier process: asked for before they are sent
        self._run = f"{random.getrandbits(64):x}"
        self._learned: set[str] = set()
        self._sure: dict[Unit, Stamp] = {}  # looked at after this manifest.json, and nothing had vanished
        self._first_seen: dict[tuple[str, ...], float] = {}  # SSTables that lack components

    def carry(self, unit: Unit, waiting: Waiting) -> float | None:
        """Store and list a unit; None when it is done, else the seconds after which to carry it again."""
        with self._pinner.lock:
            self._pinner.close_batch(unit)
        pins, lost = self._read_pins(unit)
        waiting.files, waiting.size = len(pins), sum(pin.stamp.size for pin in pins.values())
        if any(pin.name == EPHEMERAL for pin in pins.values()):
            return self._skip_ephemeral(unit, pins)
        self._learn(unit)
        now = time.time()
        quiet = {
            path: pin for path, pin in pins.items() if abs(now - pin.stamp.mtime_ns / 1e9) >= self._quiet_s(unit, pin)
        }
        stored = self._store_all(unit, quiet)
        if unit.kind == "snapshot":
            return self._carry_snapshot(unit, waiting, pins, stored, lost)
        return self._carry_batch(unit, pins, stored, lost)

    def everything_again(self) -> None:
        """The bucket is not what it was: trust nothing that we remember of it."""
        self._ledger.forget()
        self._learned.clear()
        self._run = f"{random.getrandbits(64):x}"
        self._pinner.forget()

    # A table's snapshot

    def _carry_snapshot(
        self, unit: Unit, waiting: Waiting, pins: dict[Path, Pinned], stored: dict[Path, Stored], lost: list[str]
    ) -> float | None:
        stamp = next((entry.stamp for entry in stored.values() if entry.name == MANIFEST), None)
        listed_as, before, newest = self.publisher.known(unit, stamp)
        files = {(entry.directory, entry.name): entry for entry in before.files} if before else {}
        files |= stored
        manifest = self._read_manifest(files, pins)
        if manifest and json.loads(manifest).get("ephemeral") is True:
            return self._skip_ephemeral(unit, pins)
        if manifest and stamp and self._sure.get(unit) != stamp:
            if self._pinner.confirm(unit):
                self._sure[unit] = stamp
            if self._read_pins(unit)[0].keys() != pins.keys():
                return 0.0
        settled = time.monotonic() - waiting.touched >= self._policy.settle_s
        if len(stored) < len(pins) and not settled:
            return QUIET_S
        verdict = judge_snapshot(files, manifest, self._sure.get(unit) == stamp is not None, self._reader(pins))
        complete = verdict.complete or bool(before and before.complete)
        wait = self._settle_wait(unit, waiting, complete, files, pins)
        if wait > 0:
            return wait
        kept = tuple(entry for path, entry in files.items() if path not in verdict.left_out)
        if verdict.left_out:
            log.info("not named by the manifest, left out unit=%s files=%d", _show(unit), len(verdict.left_out))
        listing = Listing(
            self.publisher.node, listed_as, "", complete, kept, verdict.missing if not complete else (), tuple(lost)
        )
        if not (before and before.complete >= complete and set(before.files) == set(kept)):
            self._publish(unit, listing, newest, pins)
        done = self._let_go(unit, files, lost)
        if done is None:
            self._sure.pop(unit, None)
            if complete:
                self._ledger.remember(f"complete:{unit.keyspace}/{unit.table}", f"{unit.tag}\t{unit.since}")
                self._roll_up(unit)
        return done

    def _settle_wait(
        self, unit: Unit, waiting: Waiting, complete: bool, files: Mapping[Path, Stored], pins: Mapping[Path, Pinned]
    ) -> float:
        """Return how long to wait for what may still come: schema.cql a moment, what is missing until it settles."""
        elapsed = time.monotonic() - waiting.touched
        if not complete:
            return self._policy.settle_s - elapsed
        schema = unit.keyspace.startswith("system") or any(name == SCHEMA for _, name in files)
        return 0.0 if schema else min(2.0, self._policy.settle_s) - elapsed

    def _skip_ephemeral(self, unit: Unit, pins: Mapping[Path, Pinned]) -> float | None:
        """Let go of a snapshot that a repair took for itself (ephemeral.snapshot, or "ephemeral": true)."""
        self.counts["skipped_ephemeral"] += 1
        log.info("repair's own snapshot, skipped unit=%s", _show(unit))
        for directory in {path[0] for path in pins}:
            names = {pin.name: pin.stamp for path, pin in pins.items() if path[0] == directory}
            self._ledger.list(directory, unit.since, names)
        return self._release(unit, {path: pin.stamp for path, pin in pins.items()}, [])

    def _read_manifest(self, files: Mapping[Path, Stored], pins: Mapping[Path, Pinned]) -> bytes | None:
        """Return manifest.json, if it is stored and whole."""
        for path, entry in files.items():
            if entry.name == MANIFEST:
                body = self._reader(pins)(entry)
                return body if manifest_files(body) is not None else None
        return None

    def _roll_up(self, unit: Unit) -> None:
        rollup = self.publisher.roll_up(unit, self._clock(), self._clock)
        if rollup:
            log.info(
                "rolled up unit=%s listings=%d files=%d", _show(rollup.unit), len(rollup.replaces), len(rollup.files)
            )

    # A batch of incrementals or of an archive

    def _carry_batch(
        self, unit: Unit, pins: dict[Path, Pinned], stored: dict[Path, Stored], lost: list[str]
    ) -> float | None:
        _, before, newest = self.publisher.known(unit, None)
        listed = {(entry.directory, entry.name): entry for entry in before.files} if before else {}
        if unit.kind == "incremental" and f"{unit.keyspace}/{unit.table}" in self._learned:
            listed |= self._learned_entries(stored)
        incomplete = judge_sstables(listed | stored, self._reader(pins))
        waiting = [path for missing, paths in incomplete.items() if not self._has_settled(missing) for path in paths]
        late = {path for path in pins if path not in stored} | {path for path in waiting if path in pins}
        if late:
            self._postpone(unit, [pins[path] for path in late], 2.0)
        files = {path: entry for path, entry in stored.items() if path not in late}
        missing = tuple(os.path.basename(name) for names in incomplete if self._has_settled(names) for name in names)
        if any(listed.get(path) != entry for path, entry in files.items()):
            everything = tuple((listed | files).values()) if before else tuple(files.values())
            self._publish(
                unit,
                Listing(self.publisher.node, unit, "", not missing, everything, missing, tuple(lost)),
                newest,
                pins,
            )
        done = self._let_go(unit, files, lost)
        if done is None and self._policy.delete_incrementals and unit.kind == "incremental":
            broken = {path for paths in incomplete.values() for path in paths}
            self._delete_sources({path: entry for path, entry in files.items() if path not in broken})
        return done

    def _has_settled(self, missing: tuple[str, ...]) -> bool:
        """Tell whether an SSTable has lacked these components for the settle time."""
        first = self._first_seen.setdefault(missing, time.monotonic())
        if time.monotonic() - first < self._policy.settle_s:
            return False
        log.warning("will not become complete, listed as it is missing=%s", quote(" ".join(missing)))
        return True

    def _postpone(self, unit: Unit, pins: Iterable[Pinned], delay: float) -> None:
        by_directory: dict[str, list[str]] = {}
        for pin in pins:
            by_directory.setdefault(pin.directory, []).append(pin.name)
        for area, relative in self._directories(unit):
            if names := by_directory.get(os.path.normpath(os.path.join(area.root, relative))):
                self._pinner.postpone(area, relative, unit.since, names, delay)

    def _delete_sources(self, files: Mapping[Path, Stored]) -> None:
        """Delete from backups/ what is listed whole, after asking the store once more."""
        absent = self.publisher.absent(list(files.values()))
        for path, entry in files.items():
            source = os.path.join(*path)
            with contextlib.suppress(FileNotFoundError):
                if entry.key not in absent and Stamp.of(entry.stamp.area, os.lstat(source)) == entry.stamp:
                    os.unlink(source)
                    self.counts["deleted"] += 1

    # What both have in common

    def _directories(self, unit: Unit) -> list[tuple[Area, str]]:
        """Return the pin directories of a unit: (area, source directory)."""
        with self._pinner.lock:
            found = [(area, relative) for area in self._pinner.areas for relative in area.by_since.get(unit.since, ())]
        return [(area, relative) for area, relative in found if unit_of(relative, unit.since) == unit]

    def _read_pins(self, unit: Unit) -> tuple[dict[Path, Pinned], list[str]]:
        pins, lost = {}, []
        for area, relative in self._directories(unit):
            held, gone = area.read(relative, unit.since)
            pins.update({(pin.directory, pin.name): pin for pin in held})
            lost += gone
        return pins, lost

    def _place(self, directory: str) -> str:
        """Return what a stamp is remembered for: the table's directory, whatever disk it is on."""
        for area in self._pinner.areas:
            if directory.startswith(area.root.rstrip("/") + "/"):
                return quote("/".join(directory[len(area.root) :].strip("/").split("/")[:2]))
        return quote(directory)

    def _quiet_s(self, unit: Unit, pin: Pinned) -> float:
        """Return how long nobody must have written: longer where a file may be a copy that is still being made."""
        return QUIET_S if unit.kind != "archive" or pin.links > 2 else 2.0

    def _is_fresh(self, entry: Stored) -> bool:
        known = self._ledger.knows(self._place(entry.directory), entry.name, entry.stamp)
        return bool(
            known and (known[0], known[4]) == (entry.key, self._run) and time.time() - float(known[5]) < FRESH_S
        )

    def _reader(self, pins: Mapping[Path, Pinned]) -> Callable[[Stored], bytes]:
        """Return a function that reads a small stored file, from its pin where there is one."""

        def read(entry: Stored) -> bytes:
            pin = pins.get((entry.directory, entry.name))
            if pin and pin.stamp == entry.stamp:
                return bytes(Sending(pin, "", False, False).read(0))
            return b"".join(self._store.get(entry.key))

        return read

    def _store_all(self, unit: Unit, pins: Mapping[Path, Pinned]) -> dict[Path, Stored]:
        """Return the entries of the pins that are stored: sent now, or known by their stamps."""
        stored: dict[Path, Stored] = {}
        futures: dict[Path, Future[Head]] = {}
        for path, pin in pins.items():
            if entry := self._remembered(pin):
                stored[path] = entry
            else:
                first = unit.urgent or pin.name in (MANIFEST, SCHEMA)
                key = object_key(self.publisher.node, os.path.join(*path))
                futures[path] = self._uploaders.send(pin, key, first, unit in self.recovered)
        sent = {}
        for path, future in futures.items():
            try:
                sent[path] = _entry(pins[path], future.result())
            except (Corrupt, FileNotFoundError) as error:  # in place and changing, or read where it was and gone
                log.info("not stored yet path=%s error=%s", quote(pins[path].path), quote(str(error)))
        self._check_digests(sent, pins)
        self._record(sent.values())
        return stored | sent

    def _remembered(self, pin: Pinned) -> Stored | None:
        """Return the entry of bytes that are stored already, perhaps under the name of another snapshot."""
        known = self._ledger.knows(self._place(pin.directory), pin.name, pin.stamp)
        if not known or (self._policy.full and known[4] != self._run):
            return None
        key, etag, crc32, crc32c = known[:4]
        self.counts["reused"] += 1
        return _entry(pin, Head(key, pin.stamp.size, etag, 0.0, crc32, crc32c))

    def _record(self, entries: Iterable[Stored]) -> None:
        self._ledger.record(((self._place(entry.directory), entry) for entry in entries), self._run)

    def _check_digests(self, sent: dict[Path, Stored], pins: Mapping[Path, Pinned]) -> None:
        """Hold each Data.db that was sent against Cassandra's own Digest.crc32.

        It is read again before anybody is alarmed; scrub can leave a stale digest (SSTableRewriter), so it is stored
        all the same.
        """
        for (directory, name), entry in list(sent.items()):
            digest = pins.get((directory, name.removesuffix("Data.db") + "Digest.crc32"))
            if not name.endswith("-Data.db") or not digest:
                continue
            text = bytes(Sending(digest, "", False, False).read(0)).strip()
            if not text.isdigit() or int(text) == int(entry.crc32, 16):
                continue
            again = self._store_again(pins[directory, name])
            if int(again.crc32, 16) == int(text):
                sent[directory, name] = again
                continue
            self.counts["digest_mismatch"] += 1
            hint = "the disk may be failing: run nodetool verify; a scrubbed SSTable may have a stale digest"
            log.error("Data.db is not what its Digest.crc32 says path=%s hint=%s", quote(f"{directory}/{name}"), hint)

    def _store_again(self, pin: Pinned) -> Stored:
        """Read and store a file anew, under a key never used before."""
        key = f"{object_key(self.publisher.node, os.path.join(pin.directory, pin.name))}@{self._clock()}"
        entry = _entry(pin, self._uploaders.send(pin, key, True, False).result())
        self._record([entry])
        return entry

    def _publish(self, unit: Unit, listing: Listing, newest: str, pins: Mapping[Path, Pinned]) -> None:
        """Write a listing and remember it."""
        if not listing.files and not listing.lost:
            return

        def again(entry: Stored) -> Stored | None:
            pin = pins.get((entry.directory, entry.name))
            return self._store_again(pin) if pin and pin.stamp == entry.stamp else None

        clock = self._clock if listing.unit.kind == "snapshot" or newest >= unit.since else lambda: unit.since
        listing = self.publisher.publish(listing, again, newest, clock)
        self._record(listing.files)
        self._ledger.remember("newest", listings_of(self.publisher.node, listing.unit) + listing_name(listing))
        counted = {"listings": 1, "listed_files": len(listing.files), "lost": len(listing.lost)}
        self.counts.update(counted | {"incomplete": int(not listing.complete)})
        state = (listing.state, len(listing.files), listing.size, len(listing.missing), len(listing.lost))
        say = log.info if listing.complete and not listing.lost else log.warning
        say("listed unit=%s state=%s files=%d bytes=%d missing=%d lost=%d", _show(listing.unit), *state)

    def _let_go(self, unit: Unit, files: Mapping[Path, Stored], lost: Iterable[str]) -> float | None:
        """Remember what is listed, then release the pins; 0 if something came meanwhile."""
        names: dict[str, dict[str, Stamp]] = {}
        for (directory, name), entry in files.items():
            names.setdefault(directory, {})[name] = entry.stamp
        for directory, stamps in names.items():
            self._ledger.list(directory, unit.since, stamps)
        return self._release(unit, {path: entry.stamp for path, entry in files.items()}, lost)

    def _release(self, unit: Unit, stamps: Mapping[Path, Stamp], lost: Iterable[str]) -> float | None:
        done = True
        for area, relative in self._directories(unit):
            directory = os.path.normpath(os.path.join(area.root, relative))
            listed: dict[str, Stamp | None] = {
                name: stamp for (where, name), stamp in stamps.items() if where == directory
            }
            listed.update(dict.fromkeys(lost))
            with self._pinner.lock:
                if area.release(relative, unit.since, listed):
                    self._pinner.released(area, relative)
                else:
                    done = False
        self.recovered.discard(unit)
        return None if done else 0.0

    def _learn(self, unit: Unit) -> None:
        """Read a table's newest listings, once in the life of a ledger: what is stored and listed already."""
        place = f"{unit.keyspace}/{unit.table}" if unit.kind != "archive" else unit.tag
        if self._ledger.fact(f"learned:{quote(place)}"):
            return
        keys = self.publisher.newest_of_table(unit)
        for listing in self.publisher.read(keys):
            self._record(listing.files)
            names: dict[str, dict[str, Stamp]] = {}
            for entry in listing.files:
                names.setdefault(entry.directory, {})[entry.name] = entry.stamp
            for directory, stamps in names.items():
                self._ledger.list(directory, listing.unit.since, stamps)
            if listing.unit.kind == "snapshot" and listing.complete:
                self._ledger.remember(f"complete:{place}", f"{listing.unit.tag}\t{listing.unit.since}")
        self._learned.add(place)
        self._ledger.remember(f"learned:{quote(place)}", "1")

    def _learned_entries(self, stored: Mapping[Path, Stored]) -> dict[Path, Stored]:
        """Return the entries that the table's listings, as just read, have with the same stamp."""
        listed = {directory: self._ledger.listed(directory) for directory in {path[0] for path in stored}}
        return {
            path: entry
            for path, entry in stored.items()
            if any(names.get(path[1]) == str(entry.stamp) for names in listed[path[0]].values())
        }


def _entry(pin: Pinned, head: Head) -> Stored:
    owner = (pin.mode, _user(pin.uid), _group(pin.gid))
    return Stored(pin.directory, pin.name, pin.stamp, *owner, head.crc32, head.key, head.etag, head.crc32c)


@functools.lru_cache(1000)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@functools.lru_cache(1000)
def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _show(unit: Unit) -> str:
    """Return a unit for the log."""
    return quote("/".join(word for word in (unit.keyspace, unit.table, unit.kind, unit.tag, unit.since) if word))


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a disk our pins may hold alone, as parts of the whole (0.1 is 10 %)."""

    max_pinned: float = 0.1
    free_floor: float = 0.1


def enforce(
    area: Area, limits: Limits, oldest: Sequence[str], lock: contextlib.AbstractContextManager[Any]
) -> tuple[int, list[str]]:
    """Bound what the pins keep on the disk that nothing else does (st_nlink is 1).

    Beyond --max-pinned, or below the free-space floor, the oldest such pins are given up, and nothing is linked any
    more until there is room. Returns the bytes still held alone, and the paths that are lost.
    """
    disk = os.statvfs(area.path)
    room = (disk.f_bavail - limits.free_floor * disk.f_blocks) * disk.f_frsize
    allowed = limits.max_pinned * disk.f_blocks * disk.f_frsize
    marks = (
        (relative, name, how, entry)
        for since in oldest
        for relative in sorted(area.by_since.get(since, ()))
        for name, how, entry in area.marks(relative, since)
    )
    alone = []
    for relative, name, how, entry in marks:
        with contextlib.suppress(FileNotFoundError):
            if not how and (info := entry.stat(follow_symlinks=False)).st_nlink == 1:
                alone.append((os.path.join(area.root, relative, name), entry.path, info))
    held = sum(info.st_blocks * 512 for _, _, info in alone)
    lost = []
    for source, pin, info in alone:
        if held <= allowed and room >= 0:
            break
        with lock, contextlib.suppress(FileNotFoundError):
            os.unlink(pin)
            os.close(os.open(pin + f"{_LOST}{info.st_ino:x}", os.O_CREAT | os.O_CLOEXEC, 0o644))
            lost.append(source)
        held, room = held - info.st_blocks * 512, room + info.st_blocks * 512
    area.full = room < 0 or held > 0.9 * allowed
    return held, lost


@dataclass(frozen=True, slots=True)
class Timing:
    """How often the daemon does what no event asks for, in seconds."""

    reconcile_s: float = RECONCILE_S
    heartbeat_s: float = HEARTBEAT_S
    look_s: float = 3600.0
    status_s: float = 10.0


_FULL_HINT: Final = "the store was unreachable too long for --max-pinned and --free-floor; raise them or mend the store"


class Daemon:
    """The one loop: units that are due go to carriers; time brings status, heartbeats, limits and a look at the bucket."""

    def __init__(
        self,
        state_dir: str,
        pinner: Pinner,
        backlog: Backlog,
        carrier: Carrier,
        uploaders: Uploaders,
        store: Retrying,
        ledger: Ledger,
        clock: Clock,
        limits: Limits,
        timing: Timing,
        stop: threading.Event,
    ) -> None:
        self._state_dir, self._pinner, self._backlog, self._carrier = state_dir, pinner, backlog, carrier
        self._uploaders, self._store, self._ledger, self._clock = uploaders, store, ledger, clock
        self._limits, self._timing, self._stop = limits, timing, stop
        self._failures: dict[Unit, str] = {}
        self._began = time.time()
        self._fatal = ""
        self._claim: Callable[[], None] | None = None
        self._held_alone = 0
        self._lanes = {True: ThreadPoolExecutor(2, "urgent"), False: ThreadPoolExecutor(8, "carry")}
        self._free = {True: 2, False: 8}

    def run(self, once: bool, claim: Callable[[], None] | None, progress: Callable[[Mapping[str, Any]], None]) -> int:
        """Watch until asked to stop, or, once, until everything is listed. Returns the exit code.

        Nothing is stored before `claim` has succeeded, if there is one: the node's name might be somebody else's.
        """
        self._claim = claim
        self._recover()
        threads = [threading.Thread(target=work, daemon=True) for work in (self._pin, self._tend, self._talk)]
        for thread in threads:
            thread.start()
        try:
            while not self._stop.is_set() and not (once and self._idle()):
                self._dispatch()
                progress(self.status())
                self._backlog.wait(self._free)
        finally:
            self._finish(threads)
        return self._code(once)

    def _recover(self) -> None:
        """Queue what an earlier process left in the pin areas."""
        for area in self._pinner.areas:
            for relative, sinces in area.pending.items():
                for since in sinces:
                    unit = unit_of(relative, since)
                    self._carrier.recovered.add(unit)
                    self._backlog.touch(unit, 0, QUIET_S)
                    self._backlog.units[unit].found = seconds_of(since)

    def _dispatch(self) -> None:
        """Give the oldest due units to free carriers. Incrementals have carriers of their own."""
        if self._claim:
            return
        for urgent in (True, False):
            for unit, waiting in self._backlog.take(urgent, self._free[urgent]):
                self._free[urgent] -= 1
                self._lanes[urgent].submit(self._carry, unit, waiting)

    def _carry(self, unit: Unit, waiting: Waiting) -> None:
        delay: float | None = 30.0
        try:
            self._pinner.gate.wait(PAUSE_S)
            delay = self._carrier.carry(unit, waiting)
            self._failures.pop(unit, None)
        except (Stopped, CancelledError):
            pass
        except Exception as error:
            if not isinstance(error, (Fault, OSError)):
                log.exception("carrying failed unit=%s", _show(unit))
            log.error("not listed, will try again unit=%s error=%s", _show(unit), quote(str(error)))
            self._failures[unit] = str(error)
        finally:
            self._free[unit.urgent] += 1
            self._backlog.put_back(unit, delay)

    def _pin(self) -> None:
        try:
            self._pinner.run(self._stop, self._timing.reconcile_s)
        except Exception as error:
            log.exception("pinning failed")
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.critical("leaving error=%s", quote(str(error)))
        self._fatal = str(error)
        self._stop.set()

    def _tend(self) -> None:
        """Do what belongs to the disk: unlink released pins, keep within limits, write the status."""
        due, asked, ask = 0.0, 0, os.path.join(self._state_dir, "ask")
        while not self._stop.wait(0.5):
            try:
                if self._pinner.gate.is_set():
                    for area in self._pinner.areas:
                        area.sweep()
                with contextlib.suppress(FileNotFoundError):
                    due, asked = due * (asked == (now := os.stat(ask).st_mtime_ns)), now
                if time.monotonic() >= due:
                    self._enforce()
                    self._write_status()
                    due = time.monotonic() + self._timing.status_s
            except OSError as error:
                log.error("tending failed error=%s", quote(str(error)))

    def _enforce(self) -> None:
        oldest = sorted({unit.since for unit in list(self._backlog.units)})
        self._held_alone = 0
        for area in self._pinner.areas:
            held, lost = enforce(area, self._limits, oldest, self._pinner.lock)
            self._held_alone += held
            for path in lost:
                log.error("given up to keep the disk free, LOST path=%s hint=%s", quote(path), _FULL_HINT)

    def _talk(self) -> None:
        """Do what belongs to the bucket, whenever it is time: look that it is still ours, say that we live."""
        looked = beat = -1e9
        while not self._stop.wait(1.0):
            try:
                if self._claim:
                    self._claim()
                    self._claim = None
                if time.monotonic() - looked >= self._timing.look_s:
                    self._look_at_bucket()
                    looked = time.monotonic()
                if time.monotonic() - beat >= self._timing.heartbeat_s:
                    self._beat()
                    beat = time.monotonic()
            except Usage as fault:
                self._give_up(fault)
            except (Fault, CancelledError) as fault:
                log.error("talking to the store failed error=%s", quote(str(fault)))

    def _look_at_bucket(self) -> None:
        newest, node = self._ledger.fact("newest"), self._carrier.publisher.node
        if newest and not self._store.head(newest):
            log.warning("the newest listing is gone, checking everything again key=%s", newest)
            self._carrier.everything_again()
        for key, upload, begun in self._store.unfinished(node + "/"):
            if begun < self._store.now() - 86400:
                self._store.abandon(key, upload)

    def _beat(self) -> None:
        """Write a heartbeat: all that was found by this moment is listed. A quiet table and a dead daemon differ."""
        with self._backlog.changed:
            found = [waiting.found for waiting in self._backlog.units.values()]
        through, prefix = min(found, default=time.time()), f"{self._carrier.publisher.node}.listings/heartbeat/"
        page = {
            "version": 1,
            "listed_through": rfc3339(utc(through)),
            "pending_units": len(found),
            "cassbackup": __version__,
        }
        body = json.dumps(page).encode()
        self._store.put(f"{prefix}{self._clock()}.json", body, zlib.crc32(body))
        old = [head.key for head in self._store.list(prefix)][:-HEARTBEATS_KEPT]
        if old:
            self._store.delete(old)  # a daemon need not have the right to delete: then they stay

    def status(self) -> dict[str, Any]:
        """Return what `cassbackup status` shows."""
        with self._backlog.changed:
            waiting = list(self._backlog.units.values())
        oldest = min((one.found for one in waiting), default=0.0)
        sent, pinned = self._uploaders.sent, self._pinner.counts
        return {
            "schema": 1,
            "version": __version__,
            "pid": os.getpid(),
            "node": self._carrier.publisher.node,
            "store": self._store.url,
            "started": self._began,
            "written": time.time(),
            "looked": self._pinner.looked,
            "quiet": self._pinner.gate.is_set(),
            "lag_s": max(0.0, time.time() - oldest) if oldest else 0.0,
            "pending": {
                "units": len(waiting),
                "files": sum(w.files for w in waiting),
                "bytes": sum(w.size for w in waiting),
            },
            "held_alone_bytes": self._held_alone,
            "full": any(area.full for area in self._pinner.areas),
            "sent": {"files": sent["files"], "bytes": sent["bytes"]},
            "counts": dict(sorted((pinned + self._carrier.counts).items())),
            "trouble": self._store.trouble or next(iter(self._failures.values()), "") or self._ledger.broken,
            "newest_listing": self._ledger.fact("newest"),
        }

    def _write_status(self) -> None:
        page = self.status() | {"snapshots": self._newest_snapshots()}
        write_whole(os.path.join(self._state_dir, "status.json"), json.dumps(page).encode(), durable=False)

    def _newest_snapshots(self) -> dict[str, str]:
        """Return the newest whole snapshot of each table on disk, "" for none; a dropped table needs none."""
        known = {place: text.split("\t") for place, text in self._ledger.facts("complete:").items()}
        newest = {table: known.get(table, ["", ""]) for table in self._pinner.tables()}
        return {table: taken for table, (tag, taken) in newest.items() if not tag.startswith("dropped-")}

    def _idle(self) -> bool:
        return bool(self._pinner.looked and self._pinner.gate.is_set() and not self._backlog.units) or bool(
            self._failures
        )

    def _finish(self, threads: Sequence[threading.Thread]) -> None:
        """Stop taking work, finish or abandon what is on its way. What is not listed stays pinned for the next start."""
        self._stop.set()
        self._uploaders.stop(STOP_S)
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + 5.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            self._write_status()

    def _code(self, once: bool) -> int:
        if self._fatal or (once and self._failures):
            return FAILED
        incomplete = self._carrier.counts["incomplete"] + self._carrier.counts["lost"] + self._pinner.counts["refused"]
        return BEHIND if once and (incomplete or self._backlog.units) else DONE


# ======================================================================================================
# Commands
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it came from."""

    value: Any
    origin: str  # flag, environment, file or default


class Settings:
    """All settings of a run, by name."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.all = settings

    def __getattr__(self, name: str) -> Any:
        return self.all[name].value


def data_directories(paths: Sequence[str], etc: str = "/etc/cassandra") -> list[str]:
    """Return the directories to watch: as given, as cassandra.yaml says, or where Cassandra usually keeps its data."""
    found = list(paths)
    for yaml in (f"{etc}/cassandra.yaml", f"{etc}/conf/cassandra.yaml"):
        if not found and os.path.exists(yaml):
            with open(yaml) as file:
                found = yaml_list(file.read(), "data_file_directories")
    if not found:
        found = [path for path in ("/var/lib/cassandra/data", "/data") if os.path.isdir(f"{path}/system")]
    if not found:
        raise Usage("no data directory found", "name it: cassbackup /var/lib/cassandra/data")
    found = [os.path.abspath(path) for path in dict.fromkeys(found)]
    for path in found:
        if not os.path.isdir(path):
            raise Usage(f"{path} is {'not a directory' if os.path.exists(path) else 'not there'}", "name a directory")
        if not os.access(path, os.R_OK | os.X_OK):
            raise Usage(f"{path} cannot be read", "run as the owner of the data (user cassandra)")
        if any(path != other and path.startswith(other.rstrip("/") + "/") for other in found):
            raise Usage(f"{path} is inside another directory to watch", "name only the outer one")
    return found


def yaml_list(text: str, key: str) -> list[str]:
    """Read one list of strings from a YAML file, in either of its spellings: - a on lines below, or [a, b]."""
    match = re.search(
        rf"^{key}:[ \t]*(\[[^\]]*\]|(?:[ \t]*(?:#.*)?\n)+(?:[ \t]*-[ \t].*(?:\n|\Z)|[ \t]*#.*\n)+)", text, re.M
    )
    if not match:
        return []
    items = (
        match[1].strip("[]").split(",")
        if match[1].startswith("[")
        else re.findall(r"^[ \t]*-[ \t]+(.*)$", match[1], re.M)
    )
    return [re.sub(r"\s+#.*", "", item).strip().strip("\"'") for item in items if item.strip()]


def become_owner(path: str, state_dir: str) -> None:
    """Started as root, become the owner of the data directory: links need it, and restores get the right owner."""
    info = os.stat(path)
    if os.geteuid() != 0 or info.st_uid == 0:
        return
    os.chown(state_dir, info.st_uid, info.st_gid)
    os.initgroups(_user(info.st_uid), info.st_gid) if not _user(info.st_uid).isdigit() else os.setgroups([])
    os.setgid(info.st_gid)
    os.setuid(info.st_uid)


def read_json(path: str) -> dict[str, Any]:
    """Return a JSON object from a file of ours, {} where there is none that can be read."""
    try:
        with open(path) as file:
            page = json.load(file)
        return page if isinstance(page, dict) else {}
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are in which bucket: decided once, then remembered."""

    node: str
    instance: str
    url: str
    region: str


def identify(settings: Settings, environ: Mapping[str, str], known: Mapping[str, str]) -> Identity:
    """Decide the node's name and the store's URL.

    A changed host name with the same instance id keeps the name; a changed instance id is a new node; a failed
    detection changes nothing.
    """
    machine_id = read_machine_id()
    bare = "://" not in settings.bucket
    settled = settings.name or known.get("instance") == machine_id[:12]  # off cloud, and still the same machine
    cloud = detect_cloud(environ) if not settled or (bare and not known) or (bare and not settings.region) else None
    instance = cloud.instance if cloud else known.get("instance", machine_id[:12])
    node = known.get("node", "") if known.get("instance") == instance else ""
    node = check_node(settings.name) if settings.name else node or name_node(cloud, socket.getfqdn(), machine_id)
    scheme = cloud.scheme if cloud else known.get("scheme", "")
    if bare and not scheme:
        hint = f"write BUCKET_NAME=s3://{settings.bucket}, gs://{settings.bucket} or file:///directory"
        raise Usage("neither AWS nor GCE answers, so this bucket could be anywhere", hint)
    url = f"{scheme}://{settings.bucket}" if bare else settings.bucket
    url = f"{url.rstrip('/')}/{settings.prefix.strip('/')}" if settings.prefix.strip("/") else url
    return Identity(node, instance, url, settings.region or (cloud.region if cloud else known.get("region", "")))


def read_machine_id() -> str:
    """Return the id of this installation, machine-id(5); "" where there is none."""
    try:
        with open("/etc/machine-id") as file:
            return file.read().strip()
    except OSError:
        return ""


def claim(
    store: Retrying, identity: Identity, directories: Sequence[str], areas: Sequence[Area], adopt: bool, clock: Clock
) -> None:
    """Be the owner of the node's name in the bucket, or become it. Raises Usage where somebody else is."""
    prefix = f"{identity.node}.listings/owner"
    owner = read_machine_id() or areas[0].id
    keys = [head.key for head in store.list(prefix)]
    newest = max(keys, key=lambda key: (len(key), key), default="")  # owner.json, then owner.<UTC>.json
    page = json.loads(b"".join(store.get(newest))) if newest else {}
    if page.get("machine_id") == owner:
        return
    if page and not adopt:
        hint = "give this node another --name; or --adopt, if it is the same node, rebuilt around its disk"
        raise Usage(f"{identity.node} in {store.url} belongs to another machine ({page.get('machine_id')})", hint)
    body = json.dumps({"version": 1, "machine_id": owner, "data_directories": list(map(quote, directories))}).encode()
    store.put(f"{prefix}.{clock()}.json" if page else f"{prefix}.json", body, zlib.crc32(body))


def open_state(path: str) -> str:
    """Make the state directory. Raises Usage."""
    try:
        os.makedirs(path, 0o755, exist_ok=True)
        write_whole(os.path.join(path, ".probe"), b"")
        os.unlink(os.path.join(path, ".probe"))
    except OSError as error:
        raise Usage(f"state directory {path} cannot be written ({error.strerror})", "pass --state-dir") from None
    return path


def access_of(settings: Settings, identity: Identity) -> Access:
    """Return how to talk to the store."""
    if settings.kms_key and settings.sse and settings.sse != "aws:kms":
        raise Usage(f"--kms-key does not go with --sse {settings.sse}", "use --sse aws:kms")
    if settings.access_key or settings.secret_key:
        log.warning(
            "keys on the command line can be read by every user of this machine hint=use the environment or a role"
        )
    encryption = (settings.sse or ("aws:kms" if settings.kms_key else ""), settings.kms_key, settings.storage_class)
    keys = (settings.access_key, settings.secret_key, settings.threads)
    return Access(identity.region, settings.endpoint_url, settings.ca_file, *encryption, *keys)


def watch(settings: Settings, environ: Mapping[str, str]) -> int:
    """Watch, pin, store and list, until asked to stop; with --once until everything is listed."""
    directories = data_directories(settings.paths)
    state_dir = open_state(settings.state_dir)
    become_owner(directories[0], state_dir)
    lock_file(os.path.join(state_dir, "lock"))
    areas = [open_area(path, settings.pin_dir) for path in directories]
    memories = [os.path.join(folder, "identity.json") for folder in (state_dir, *(area.path for area in areas))]
    known = next((page for page in map(read_json, memories) if page), {})
    identity = identify(settings, environ, known)
    stop = stop_on_signals()
    raw, budget, clock = (
        open_store(identity.url, access_of(settings, identity)),
        Budget(settings.max_bandwidth),
        Clock(),
    )
    store = Retrying(raw, stop.wait, 120.0 if settings.once else None, budget)

    def claim_name(through: Retrying) -> None:
        claim(through, identity, directories, areas, settings.adopt, clock)
        for path in memories:
            write_whole(
                path, json.dumps({**dataclasses.asdict(identity), "scheme": identity.url.partition(":")[0]}).encode()
            )

    claimed = try_claim(
        claim_name, Retrying(raw, stop.wait, 5.0, budget), known.get("url") == identity.url, settings.once
    )
    daemon = assemble(settings, state_dir, areas, identity.node, store, clock, stop)
    return daemon.run(settings.once, None if claimed else lambda: claim_name(store), progress_line(settings))


def stop_on_signals() -> threading.Event:
    """Return the event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return stop


def try_claim(claim_name: Callable[[Retrying], None], store: Retrying, worked: bool, once: bool) -> bool:
    """Claim the node's name; False where that must wait, since the store is down or has refused us only now.

    Only at a first start is a refusal a mistake in the configuration.
    """
    try:
        claim_name(store)
        return True
    except Denied as fault:
        if not worked or once:
            raise Usage(fault.what, fault.hint) from fault
        log.error("denied, watching all the same error=%s", quote(str(fault)))
    except Unreachable as fault:
        if once:
            raise
        log.error("store does not answer, watching all the same error=%s", quote(str(fault)))
    return False


def assemble(
    settings: Settings,
    state_dir: str,
    areas: Sequence[Area],
    node: str,
    store: Retrying,
    clock: Clock,
    stop: threading.Event,
) -> Daemon:
    """Join the rooms."""
    ledger = Ledger(os.path.join(state_dir, "ledger.sqlite"), f"{store.url} {node}")
    backlog, watcher = Backlog(), Watcher()
    pinner = Pinner(areas, watcher, filters_of(settings), clock, ledger.listed, backlog.touch)
    uploaders = Uploaders(
        store, settings.threads, pinner.gate, functools.partial(_resume, ledger), functools.partial(_begun, ledger)
    )
    policy = Policy(settings.settle, settings.full, settings.delete_uploaded_incrementals)
    carrier = Carrier(pinner, store, uploaders, node, ledger, clock, policy)
    limits, timing = Limits(settings.max_pinned, settings.free_floor), Timing(settings.reconcile, settings.heartbeat)
    log.info("watching node=%s store=%s paths=%s", node, store.url, quote(" ".join(area.root for area in areas)))
    return Daemon(state_dir, pinner, backlog, carrier, uploaders, store, ledger, clock, limits, timing, stop)


def _resume(ledger: Ledger, key: str) -> str:
    return ledger.fact(f"upload:{key}")


def _begun(ledger: Ledger, key: str, upload: str) -> None:
    ledger.remember(f"upload:{key}", upload)


def filters_of(settings: Settings) -> Filters:
    """Return what the operator wants stored."""
    keyspaces = (tuple(settings.keyspace), tuple(settings.exclude_keyspace))
    patterns = [re.compile(text) if text else None for text in (settings.include, settings.exclude)]
    return Filters(*keyspaces, tuple(settings.exclude_table), tuple(settings.exclude_tag), settings.since, *patterns)


def progress_line(settings: Settings) -> Callable[[Mapping[str, Any]], None]:
    """Return what shows how far --once is: a line that is written over, on a terminal."""
    if not (settings.once and sys.stderr.isatty()):
        return lambda status: None

    def show(status: Mapping[str, Any]) -> None:
        sent, pending = status["sent"], status["pending"]
        rate = sent["bytes"] / max(0.001, time.time() - status["started"])
        text = f"{sent['files']} files, {size_text(sent['bytes'])} sent ({size_text(rate)}/s), {pending['files']} to go"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return show


def size_text(size: float) -> str:
    """Return a size for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def holder_of(state_dir: str) -> str:
    """Return the pid of the daemon that holds a state directory, "" where there is none."""
    try:
        fd = os.open(os.path.join(state_dir, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(fd)


def status(settings: Settings, environ: Mapping[str, str]) -> int:
    """Show how far behind the daemon is. Exit 3: behind, or nobody is at work."""
    waiter = threading.Event()
    while True:
        page = ask_status(settings.state_dir, waiter)
        behind = why_behind(page, holder_of(settings.state_dir), settings.max_lag, settings.max_age, time.time())
        caught_up = page.get("quiet") and not page["pending"]["units"]
        if not settings.wait or caught_up or not holder_of(settings.state_dir):
            break
        waiter.wait(0.5)
    if settings.json:
        print(json.dumps(page | {"behind": behind}))
    else:
        print(status_text(page, behind))
    return BEHIND if behind else DONE


def ask_status(state_dir: str, waiter: threading.Event) -> dict[str, Any]:
    """Return the daemon's status, as fresh as it can be had."""
    asked, path = time.time(), os.path.join(state_dir, "ask")
    with contextlib.suppress(OSError), open(path, "w"):  # the daemon looks at this file; other users wait a little
        pass
    for _ in range(60):
        page = read_json(os.path.join(state_dir, "status.json"))
        if page.get("written", 0.0) > asked or not holder_of(state_dir):
            break
        waiter.wait(0.2)
    if not page:
        raise Usage(f"no daemon has written a status to {state_dir}", "start cassbackup, or pass its --state-dir")
    return page


def why_behind(page: Mapping[str, Any], holder: str, max_lag: float, max_age: float, now: float) -> list[str]:
    """Return what is wrong, worst first; nothing if all is well."""
    why = [] if holder else ["no daemon is running"]
    if page["lag_s"] > max_lag:
        why.append(f"the oldest unlisted file was found {page['lag_s']:.0f} s ago (--max-lag {max_lag:.0f})")
    if page["trouble"]:
        why.append(page["trouble"])
    if page["full"]:
        why.append("the pin area is full: files are read where they are, and can vanish")
    snapshots = page.get("snapshots", {})
    never = sorted(table for table, taken in snapshots.items() if not taken)
    old = sorted(table for table, taken in snapshots.items() if taken and now - seconds_of(taken) > max_age)
    for tables, what in (
        (never, "was never backed up by a whole snapshot"),
        (old, f"has no whole snapshot of the last {max_age / 3600:.0f} h"),
    ):
        if tables:
            why.append(f"{tables[0]}{f' and {len(tables) - 1} more tables' * (len(tables) > 1)} {what}")
    return why


def status_text(page: Mapping[str, Any], behind: Sequence[str]) -> str:
    """Return the status for people."""
    pending, sent = page["pending"], page["sent"]
    rate = sent["bytes"] / max(1.0, page["written"] - page["started"])
    eta = f", about {pending['bytes'] / rate:.0f} s to go" if pending["bytes"] and rate else ""
    lines = [
        f"node      {page['node']}",
        f"store     {page['store']}",
        f"pending   {pending['units']} units, {pending['files']} files, {size_text(pending['bytes'])}{eta}",
        f"lag       {page['lag_s']:.0f} s",
        f"sent      {sent['files']} files, {size_text(sent['bytes'])} since {rfc3339(utc(page['started']))[:19]}Z",
        f"listings  {page['counts'].get('listings', 0)}, the newest {page['newest_listing'] or 'none'}",
        f"lost      {page['counts'].get('lost', 0) + page['counts'].get('vanished', 0)} files",
        *(f"BEHIND    {why}" for why in behind),
    ]
    return "\n".join(lines)


def config(settings: Settings, environ: Mapping[str, str]) -> int:
    """Show each setting, its value and where it came from."""
    for name, setting in settings.all.items():
        value = "(hidden)" if name in ("access_key", "secret_key") and setting.value else setting.value
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name.replace('_', '-'):30} {shown!s:40} {setting.origin}")
    return DONE


# ======================================================================================================
# Command line
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class Option:
    """A setting: --name, its twin in the environment and in /etc/default/cassbackup, how to read it."""

    name: str
    metavar: str  # "" for a switch
    default: Any
    help: str
    read: Callable[[str], Any] = str
    many: bool = False
    short: str = ""
    env: str = ""

    @property
    def variable(self) -> str:
        """Return the name of the environment variable."""
        return self.env or "CASSBACKUP_" + self.name.upper().replace("-", "_")

    @property
    def key(self) -> str:
        """Return the name in Settings."""
        return self.name.replace("-", "_")


def read_size(text: str) -> float:
    """Read 50M, 1.5GiB or a plain number of bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?(?:/s)?", text.strip().lower())
    if not match:
        raise ValueError("write a size as 50M or 1.5G")
    return float(match[1]) * float(1 << 10 * " kmgt".index(match[2] or " "))


def read_duration(text: str) -> float:
    """Read 90, 90s, 15m, 26h or 7d as seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if not match:
        raise ValueError("write a duration as 90s, 15m, 26h or 7d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def read_part(text: str) -> float:
    """Read 10% as 0.1. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)\s*%", text.strip())
    if not match:
        raise ValueError("write a part of the disk as 10%")
    return float(match[1]) / 100


def read_time(text: str) -> float:
    """Read 2026-11-21, 2026-11-21T20:24 or with a zone; UTC without one. Raises ValueError."""
    moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def read_count(text: str) -> int:
    """Read a number from 1 to 256. Raises ValueError."""
    if not text.strip().isdigit() or not 1 <= int(text) <= 256:
        raise ValueError("write a number from 1 to 256")
    return int(text)


def read_regex(text: str) -> str:
    """Check a regular expression. Raises ValueError."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(str(error)) from None
    return text


def read_switch(text: str) -> bool:
    """Read yes or no. Raises ValueError."""
    if text.strip().lower() not in ("1", "yes", "true", "on", "0", "no", "false", "off", ""):
        raise ValueError("write yes or no")
    return text.strip().lower() in ("1", "yes", "true", "on")


def read_sse(text: str) -> str:
    """Check a kind of server-side encryption. Raises ValueError."""
    if text not in ("", "AES256", "aws:kms"):
        raise ValueError("write AES256 or aws:kms")
    return text


_STORE = (
    Option(
        "bucket",
        "URL",
        "",
        "s3://bucket[/prefix], gs://bucket[/prefix] or file:///directory; a bare name asks which cloud this is",
        env="BUCKET_NAME",
        short="b",
    ),
    Option("region", "NAME", "", "region of the bucket (default: that of this instance)", env="REGION"),
    Option("prefix", "PATH", "", "put everything under this prefix; one for each cluster is a good habit"),
    Option("name", "NODE", "", "call this node so, instead of <hostname>-<instance_id>"),
    Option("endpoint-url", "URL", "", "talk to this server (AWS_ENDPOINT_URL_S3 and STORAGE_EMULATOR_HOST work too)"),
    Option("ca-file", "FILE", "", "trust these certificates (AWS_CA_BUNDLE works too)"),
    Option("sse", "KIND", "", "S3 server-side encryption: AES256, or aws:kms (always with a bucket key)", read_sse),
    Option("kms-key", "KEY", "", "key for aws:kms (also --sse-kms-key-id), or a Cloud KMS key for gs://"),
    Option("storage-class", "CLASS", "", "storage class of what is stored"),
    Option("access-key", "KEY", "", "discouraged, as -k of tablesnap: use the environment or a role", short="k"),
    Option("secret-key", "KEY", "", "discouraged, as -s of tablesnap", short="s"),
    Option("threads", "N", 8, "threads that send", read_count, short="t"),
    Option("max-bandwidth", "RATE", 50.0 * MIB, "bytes a second for the whole node, as 50M; 0 is no limit", read_size),
)
_WHAT = (
    Option("keyspace", "GLOB", [], "only these keyspaces (system keyspaces too are needed for a restore)", many=True),
    Option("exclude-keyspace", "GLOB", [], "not these keyspaces", many=True),
    Option("exclude-table", "KS.TABLE", [], "not these tables", many=True),
    Option("exclude-tag", "GLOB", [], "not the snapshots with these tags", many=True),
    Option("since", "TIME", 0.0, "only what is newer; UTC without a zone", read_time),
    Option(
        "include",
        "REGEX",
        "",
        "also files outside snapshots/ and backups/ whose path matches: archives",
        read_regex,
        short="i",
    ),
    Option("exclude", "REGEX", "", "of those, not the ones whose path matches", read_regex, short="e"),
    Option("full", "", False, "send everything, even what is stored under another snapshot"),
    Option("delete-uploaded-incrementals", "", False, "delete an SSTable from backups/ once it is listed whole"),
)
_HERE = (
    Option(
        "state-dir", "DIR", "", "ledger, status and lock (default: /var/lib/cassbackup, or ~/.local/state/cassbackup)"
    ),
    Option(
        "pin-dir",
        "DIR",
        "",
        "hold files here (default: .cassbackup beside each data directory); same mount as the data",
    ),
    Option("max-pinned", "PART", 0.1, "how much of the disk the pins may hold alone, as 10%%", read_part),
    Option("free-floor", "PART", 0.1, "give pins up when less than this of the disk is free, as 10%%", read_part),
    Option("settle", "TIME", 60.0, "how long to wait for what never becomes complete", read_duration),
    Option("reconcile", "TIME", RECONCILE_S, "how often to look without a hint", read_duration),
    Option("heartbeat", "TIME", HEARTBEAT_S, "how often to say in the bucket that we live", read_duration),
    Option("adopt", "", False, "take over a node's name from another machine: a node rebuilt around its disk"),
    Option("once", "", False, "store and list what is there, then exit"),
)
_ASK = (
    Option("wait", "", False, "wait until everything that was found is listed"),
    Option("max-lag", "TIME", 900.0, "behind, when the oldest unlisted file was found longer ago", read_duration),
    Option("max-age", "TIME", 26 * 3600.0, "behind, when a table's newest whole snapshot is older", read_duration),
    Option("json", "", False, "print JSON"),
)
_STATE = tuple(option for option in _HERE if option.name == "state-dir")
COMMANDS: Final = MappingProxyType(
    {
        "watch": (
            watch,
            "watch and store (the default command)",
            {"store": _STORE, "what to store": _WHAT, "on this node": _HERE},
        ),
        "status": (status, "how far behind the daemon is; exit 3 when it is", {"status": _STATE + _ASK}),
        "config": (
            config,
            "each setting, its value and where it came from",
            {"store": _STORE, "what to store": _WHAT, "on this node": _HERE},
        ),
    }
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. Values stay None where no flag was given: they come from elsewhere then."""
    parser = argparse.ArgumentParser(
        prog="cassbackup",
        description="Back up Apache Cassandra: every file of snapshots/ and backups/, stored and listed.",
        epilog="Every option has a twin in the environment and in /etc/default/cassbackup: --max-lag is CASSBACKUP_MAX_LAG; "
        "--bucket is BUCKET_NAME, --region is REGION. `cassbackup COMMAND --help` shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"cassbackup {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (run, summary, groups) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument(
            "--config", metavar="FILE", help="read settings from here (default: /etc/default/cassbackup)"
        )
        command.add_argument("-v", "--verbose", action="store_true", help="say more in the log")
        for title, options in groups.items():
            _add_options(command.add_argument_group(title), options)
        if name != "status":
            command.add_argument(
                "paths", nargs="*", metavar="PATH", help="data directories (default: as cassandra.yaml says)"
            )
    return parser


def _add_options(group: Any, options: Iterable[Option]) -> None:
    for option in options:
        flags = [f"-{option.short}"] * bool(option.short) + [f"--{option.name}"]
        flags += ["--sse-kms-key-id"] * (option.name == "kms-key")
        text = f"{option.help} [{option.variable}]"
        if not option.metavar:
            group.add_argument(*flags, dest=option.key, action="store_const", const="yes", help=text)
        else:
            action = "append" if option.many else "store"
            group.add_argument(*flags, dest=option.key, metavar=option.metavar, action=action, help=text)


def settle(
    options: Iterable[Option], flags: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, str]
) -> dict[str, Setting]:
    """Decide each setting: flag, else environment, else configuration file, else default. Raises Usage."""
    settled = {}
    for option in options:
        sources = (
            (flags.get(option.key), "flag"),
            (environ.get(option.variable), "environment"),
            (file.get(option.variable), "file"),
        )
        given, origin = next(((text, origin) for text, origin in sources if text), (None, "default"))
        settled[option.key] = Setting(option.default if given is None else _read(option, given, origin), origin)
    return settled


def _read(option: Option, given: str | list[str], origin: str) -> Any:
    read = option.read if option.metavar else read_switch
    try:
        if option.many:
            return given if isinstance(given, list) else given.split()
        return read(str(given))
    except ValueError as error:
        name = f"--{option.name}" if origin == "flag" else option.variable
        raise Usage(f"{name} {given!r} cannot be read", str(error)) from None


def read_config(path: str, must: bool) -> dict[str, str]:
    """Read plain KEY=value lines, as systemd and a shell read them. Raises Usage."""
    try:
        with open(path) as file:
            lines = [line.strip().removeprefix("export ") for line in file]
    except OSError as error:
        if must:
            raise Usage(f"configuration {path} cannot be read ({error.strerror})", "correct --config") from None
        return {}
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, value in pairs}


def set_up_log(verbose: bool, environ: Mapping[str, str]) -> None:
    """Log to stderr, an event a line; with journald's priorities where journald reads it."""
    info = os.fstat(sys.stderr.fileno())
    journal = environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            level = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}.get(record.levelno, 5)
            text = super().format(record).replace("\n", " | ")
            return (
                f"<{level}>{text}" if journal else f"{rfc3339(utc(record.created))} {record.levelname.lower()} {text}"
            )

    handler = logging.StreamHandler()
    handler.setFormatter(Line())
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written must not stop a backup


def insert_command(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the command spelled out: options and paths alone mean watch. Raises Usage."""
    if not argv or argv[0] in COMMANDS or argv[0] in ("-h", "--help", "--version"):
        return list(argv) or ["watch"]
    if argv[0].startswith("-") or "/" in argv[0]:
        return ["watch", *argv]
    near = difflib.get_close_matches(argv[0], COMMANDS, 1, 0.0)
    raise Usage(f"unknown command {argv[0]!r}", f"did you mean {near[0]!r}? A path contains a /")


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return where state is kept if nobody says where."""
    system = "/var/lib/cassbackup"
    if os.geteuid() == 0 or os.access(system, os.W_OK):
        return system
    return os.path.join(environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "cassbackup")


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    try:
        parser, environ = build_parser(), os.environ
        arguments = parser.parse_args(insert_command(argv))
        set_up_log(arguments.verbose, environ)
        file = read_config(arguments.config or "/etc/default/cassbackup", bool(arguments.config))
        options = [option for options in COMMANDS[arguments.command][2].values() for option in options]
        settled = settle(options, vars(arguments), environ, file)
        settled["paths"] = Setting(
            getattr(arguments, "paths", []), "flag" if getattr(arguments, "paths", []) else "default"
        )
        if not settled["state_dir"].value:
            settled["state_dir"] = Setting(default_state_dir(environ), "default")
        settings = Settings(settled)
        if arguments.run is watch and not settings.bucket:
            return explain(parser, settings.state_dir)
        return int(arguments.run(settings, environ))
    except Fault as fault:
        print(f"cassbackup: {fault.what}" + f"\n  {fault.hint}" * bool(fault.hint), file=sys.stderr)
        return fault.code


def explain(parser: argparse.ArgumentParser, state_dir: str) -> int:
    """Say what is missing, and whether a daemon is at work already."""
    if pid := holder_of(state_dir):
        print(f"cassbackup is running (pid {pid}); ask it with `cassbackup status`", file=sys.stderr)
    parser.print_usage(sys.stderr)
    print("cassbackup: no bucket\n  set BUCKET_NAME, or pass --bucket; `cassbackup --help` shows more", file=sys.stderr)
    return MISUSED


def main_entry() -> None:
    """Run as a console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    main_entry()
