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
    <node>.listings/owner.json, node.json, tags/<tag>/<UTC>.json, heartbeat/<UTC>.json
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
    Metrics         what Prometheus is told
    Catalog         what the bucket has: listings by their names, takings, nodes
    Choose          what a table is restored from: pure functions
    Restore         plan first, then file by file
    Verify          is an object what a listing says
    Prune           what may go, and deleting it without a lock
    Doctor          what can go wrong, before it does: checks, and the cure
    Report          how much would be lost at each moment: a picture from listings
    Common ground   what commands share: settings, who we are, nodetool, how far it is
    On the node     the commands watch, status, config, snapshot, doctor
    On the bucket   the commands list, verify, restore, prune, report
    Command line    options, logging, main
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import glob
import grp
import hashlib
import heapq
import html
import itertools
import json
import keyword
import logging
import math
import mmap
import os
import pwd
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from importlib import metadata
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast, get_args

# ======================================================================================================
# Facts
# ======================================================================================================

__version__ = "0.1.0"

log = logging.getLogger("cassbackup")
T = TypeVar("T")
R = TypeVar("R")

DONE, FAILED, MISUSED, BEHIND = 0, 1, 2, 3  # exit codes; 130 and 143 are the signals'

MIB: Final = 1 << 20
PART_BYTES: Final = 8 * MIB  # a put, or a part of a multipart upload; S3 takes no part below 5 MiB
PART_COUNT: Final = 9_000  # S3 stops at 10,000 parts; larger files get larger parts

QUIET_S: Final = 0.3  # a file is read only when nobody has written to it for so long
PAUSE_S: Final = 2.0  # uploads wait for the pinner, but never longer than this at a time
RECONCILE_S: Final = 60.0
HEARTBEAT_S: Final = 900.0
HEARTBEATS_KEPT: Final = 100
KNOWN_S: Final = 7 * 86400.0  # how long the ledger knows the bytes that a table has no more: snapshots may wait
OWN_TAG: Final = "cassbackup-"  # of the snapshots that `cassbackup snapshot` takes: and the UTC to the minute
CONDEMNED_LOOK_S: Final = 60.0
FRESH_S: Final = 12 * 3600.0  # how long a confirmation by the store is good for; far less than prune's grace
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
    patience = math.inf  # seconds for which a command, which has its own, tries again

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}: {hint}" if hint else what)
        self.what, self.hint = what, hint


class Usage(Fault):
    """The arguments or the configuration cannot work as they are."""

    code = MISUSED


class Busy(Fault):
    """Another cassbackup holds the lock."""


class Denied(Fault):
    """The store says no: it does not know us, forbids it, or has no such bucket."""

    patience = 0.0


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


class Distrusted(Unreachable):
    """The server has no certificate that we trust; one of several servers behind a name may have."""

    patience = 5.0


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


Kind = Literal["snapshot", "incremental", "archive"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What becomes restorable at once: a table's snapshot, a batch of its incrementals, a batch of an archive."""

    kind: Kind
    keyspace: str
    table: str  # the directory's name, <table>-<id>
    tag: str  # of a snapshot; of an archive its directory
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
    cold: str = ""  # the storage class, where nothing can be read before it is thawed


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
_SSTABLE = re.compile(r"([^/]+-[a-z]{2}-\d+|[a-z]{2}-[^-]+-[a-z]+)-([^/]+)")  # until 2.1 <ks>-<table>-ka-1-Data.db
_TABLE = re.compile(r"(.+)-([0-9a-f]{32})")
_WORDS, _OPTIONAL_WORDS = ("user", "group", "crc32", "key", "etag"), ("crc32c", "seen")  # of a listing's entry


def _percent(char: str) -> str:
    how = "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass"  # the latter in no name of ours
    return urllib.parse.quote(char, errors=how)


def quote(name: str, slash: str = "/") -> str:
    """Spell a file system name so that it can be a key, a log value or a name in the pin area.

    What is not printable, what is not UTF-8 (it arrives as lone surrogates) and % become %XX, byte by byte.
    Reversible: unquote(quote(name)) == name for every name that a file system can hold.
    """
    if not _PLAIN.fullmatch(name):
        name = "".join(char if char.isprintable() and char != "%" else _percent(char) for char in name)
    return name.replace("/", slash)


def unquote(text: str) -> str:
    """Undo quote."""
    return urllib.parse.unquote(text, errors="surrogateescape")


def digest_name(text: str) -> str:
    """Return a name for what is too long to be a name. %% never comes out of quote."""
    return "%%" + hashlib.sha1(text.encode("utf-8", "surrogateescape")).hexdigest()


def _component(name: str, slash: str = "/") -> str:
    quoted = quote(name, slash)
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


def unit_of(root: str, relative: str, since: str) -> Unit:
    """Tell what a source directory, given below its data directory, belongs to; an archive is its absolute path."""
    match relative.split("/"):
        case [keyspace, table, "snapshots", tag, *_]:
            return Unit("snapshot", keyspace, table, tag, since)
        case [keyspace, table, "backups", *_]:
            return Unit("incremental", keyspace, table, "", since)
    return Unit("archive", "", "", os.path.normpath(os.path.join(root, relative)), since)


def pin_directory(relative: str, since: str) -> str:
    """Return the name in the pin area for a source directory: its path below the data directory, and since."""
    return f"{_component(relative or '.', slash='%2F')}~{since}"


def parse_pin_directory(name: str) -> tuple[str, str] | None:
    """Undo pin_directory, but for hashed names, which come back as they are."""
    match = _PIN_DIRECTORY.fullmatch(name)
    if not match:
        return None
    relative = match[1] if match[1].startswith("%%") else unquote(match[1])
    return ("" if relative == "." else relative), match[2]


def utc(seconds: float) -> str:
    """Return a moment as it stands in keys: 20261121T202438.123456Z."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


def rfc3339(stamp: str) -> str:
    """Return the same moment as it stands inside a listing: 2026-11-21T20:24:38.123456Z."""
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:11]}:{stamp[11:13]}:{stamp[13:]}"


def seconds_of(stamp: str) -> float:
    """Undo utc. Raises ValueError."""
    if not re.fullmatch(_UTC, stamp):
        raise ValueError(f"{stamp!r} does not match")
    return datetime.fromisoformat(rfc3339(stamp)[:-1] + "+00:00").timestamp()  # 20 times as fast as strptime


@functools.lru_cache(10_000)
def is_utc(stamp: str) -> bool:
    """Tell whether a text is a moment as it stands in keys."""
    with contextlib.suppress(ValueError):
        return seconds_of(stamp) >= 0
    return False


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
        return f"{node}.listings/archive/{_component(unit.tag, slash='%2F')}/"
    keyspace = _component(unit.keyspace)
    if keyspace in ("archive", "heartbeat", "tags"):  # folders of ours
        keyspace = f"%{ord(keyspace[0]):02X}{keyspace[1:]}"
    table = f"{node}.listings/{keyspace}/{_component(unit.table)}/"
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


def _dump_entry(entry: Stored) -> dict[str, Any]:
    page = {"name": quote(entry.name), "size": entry.stamp.size, "mtime_ns": entry.stamp.mtime_ns}
    page |= {"stamp": str(entry.stamp), "mode": f"{entry.mode:04o}"}
    page |= {word: getattr(entry, word) for word in _WORDS}
    return page | {word: getattr(entry, word) for word in _OPTIONAL_WORDS if getattr(entry, word)}


def dump_listing(listing: Listing) -> bytes:
    """Return a listing as JSON."""
    unit, (table, table_id) = listing.unit, table_id_of(listing.unit.table)
    directories: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(listing.files, key=lambda entry: (entry.directory, entry.name)):
        directories.setdefault(quote(entry.directory), []).append(_dump_entry(entry))
    page = {
        "version": 1,
        "node": listing.node,
        "kind": unit.kind,
        "keyspace": unit.keyspace,
        "table": table,
        "table_id": table_id,
        "tag" if unit.kind == "snapshot" else "directory": quote(unit.tag),
        "taking": unit.since,
        "complete": listing.complete,
        "taken": rfc3339(unit.since),
        "listed": rfc3339(listing.listed),
        "missing": list(map(quote, listing.missing)),
        "lost": list(map(quote, listing.lost)),
        "replaces": listing.replaces,
        "directories": directories,
    }
    return json.dumps(
        {key: value for key, value in page.items() if value not in ("", [], ())}, separators=(",", ":")
    ).encode()


def _typed(page: dict[str, Any], name: str, kind: type[T], *default: T) -> T:
    value = page[name] if name in page or not default else default[0]
    if type(value) is not kind:  # True is no int here
        raise TypeError(f"{name} is {value!r}")
    return value


def _load_entry(directory: str, page: dict[str, Any], texts: dict[str, str]) -> Stored:
    def once(text: str) -> str:
        return texts.setdefault(text, text)

    stamp, name = Stamp.parse(_typed(page, "stamp", str)), once(unquote(_typed(page, "name", str)))
    stamp, words = stamp._replace(area=once(stamp.area)), {word: once(_typed(page, word, str)) for word in _WORDS}
    words |= {word: _typed(page, word, str, "") for word in _OPTIONAL_WORDS}
    mode = _typed(page, "mode", str)
    same = (_typed(page, "size", int), _typed(page, "mtime_ns", int)) == (stamp.size, stamp.mtime_ns)
    good = 0 <= stamp.size < 1 << 63 > abs(stamp.mtime_ns) and (not words["seen"] or is_utc(words["seen"]))
    good = good and bool(re.fullmatch("[0-9a-f]{8}", words["crc32"]) and re.fullmatch("[0-7]{4,5}", mode))
    if not (same and good) or name in ("", ".", "..") or re.search("[/\0\ud800-\udc7f\udd00-\udfff]", name):
        raise ValueError(f"entry {name!r} is not one of ours")
    return Stored(directory, name, stamp, int(mode, 8), **words)


def load_listing(body: bytes, texts: dict[str, str] | None = None) -> Listing:
    """Read a listing. Raises Corrupt for anything that we would not have written.

    The same file is in many listings: those that are held together share `texts`, and hold each text once. (Not by
    sys.intern: what Python 3.12 interns is never let go.)
    """
    texts = {} if texts is None else texts
    try:
        page = json.loads(body)
        if _typed(page, "version", int) != 1:
            raise ValueError(f"version {page['version']!r}")
        table, table_id = (_typed(page, name, str, "") for name in ("table", "table_id"))
        tag = unquote(_typed(page, "tag", str, _typed(page, "directory", str, "")))
        kind, since = _typed(page, "kind", str), _typed(page, "taking", str)
        if kind not in get_args(Kind) or not is_utc(since):
            raise ValueError(f"{kind} of {since}")
        whole = f"{table}-{table_id}" if table_id else table
        unit = Unit(cast(Kind, kind), _typed(page, "keyspace", str, ""), whole, tag, since)
        files: list[Stored] = []
        for directory, entries in _typed(page, "directories", dict).items():
            files += [_load_entry(unquote(directory), entry, texts) for entry in entries]
        missing, lost, replaces = (_typed(page, name, list, []) for name in ("missing", "lost", "replaces"))
        if not all(isinstance(name, str) for name in (*missing, *lost, *replaces)):
            raise TypeError("a name is no text")
        told = (_typed(page, "node", str), unit, utc_of(_typed(page, "listed", str)), _typed(page, "complete", bool))
        return Listing(*told, tuple(files), tuple(map(unquote, missing)), tuple(map(unquote, lost)), tuple(replaces))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"listing cannot be read ({error!r})", "do not delete it; `cassbackup verify` names it") from None


def size_text(size: float) -> str:
    """Return a size for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


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


@dataclass(frozen=True, slots=True)
class Rule:
    """A lifecycle rule of a bucket, as far as it matters here."""

    name: str
    prefixes: tuple[str, ...]  # of keys in the bucket; "" is all of them
    does: frozenset[str]  # expire; archive (to where nothing is read before a thaw); abort uploads; trim old versions


P = ParamSpec("P")
At = TypeVar("At", int, str)  # how far a stream has come: an offset, or a key
Body = bytes | bytearray


class Store(Protocol):
    """A place for objects. Keys are relative to the store's prefix.

    Every method may raise Unreachable (try again), Denied, or Usage where the bucket is gone. put and finish
    create and never overwrite: they raise Conflict where the key is taken, if the server can tell.
    """

    url: str
    ordered: bool  # parts of one upload must be put in order, and the last one makes the object

    def put(self, key: str, body: Body, crc32: int) -> Head:
        """Store an object whole. The reply confirms size and checksum."""

    def begin(self, key: str, size: int) -> str:
        """Begin an upload in parts; return its id, which a later process can go on with."""

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        """Store part `number` (from 1), which begins at `offset`. Raises Missing where the upload is gone."""

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

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes from an offset on, up to another. Raises Missing."""

    def head(self, key: str) -> Head | None:
        """Return what the store knows of an object, None if there is none."""

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        """Yield the objects under a prefix in the order of their keys, those after a key where one is given."""

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the components that come next after a prefix ("" or ending in /) and have something below them."""

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete objects; return why for each that stayed. An absent one is no error."""

    def now(self) -> float:
        """Return the store's own time, as of its last reply."""


def _fsync(path: str, flags: int = os.O_DIRECTORY) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_span(file: Any, start: int, end: int | None) -> Iterator[bytes]:
    file.seek(start)
    while chunk := file.read(MIB if end is None else min(MIB, end - start)):
        start += len(chunk)
        yield chunk


class DirStore:
    """file://: a directory, perhaps an NFS mount. Key components are file names.

    The directory is made only for a new node. Later it must be there: below a mount point whose disk is not
    mounted we would fill another disk, perhaps Cassandra's.
    """

    ordered = False

    def __init__(self, root: str, new: bool) -> None:
        self.url = "file://" + root
        self._root, self._new = root, new
        self._uploads = os.path.join(root, ".unfinished")

    def put(self, key: str, body: Body, crc32: int) -> Head:
        upload = self.begin(key, len(body))
        try:
            with self._faults(), open(upload, "wb") as file:
                file.write(body)
            return self._commit(key, upload, crc32)
        finally:
            self.abandon(key, upload)

    def begin(self, key: str, size: int) -> str:
        name = f"{hashlib.sha1(key.encode()).hexdigest()}-{os.getpid()}-{random.getrandbits(48):012x}"
        upload = os.path.join(self._uploads, name)
        with self._faults():
            if self._new:
                os.makedirs(self._uploads, exist_ok=True)
            elif not os.path.isdir(self._uploads):
                raise Unreachable(f"{self.url} is not there any more", "mount it, or make its .unfinished/ again")
            open(upload, "xb").close()
        return upload

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        # Never O_CREAT: an upload that was swept away would come again with holes where its first parts were.
        with self._faults(), open(upload, "r+b", buffering=0) as file:
            view = memoryview(body)
            while view:
                written = os.pwrite(file.fileno(), view, offset)
                view, offset = view[written:], offset + written
            os.fdatasync(file.fileno())
        return Part(number, len(body), "", crc32)

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        with self._faults():
            size = os.stat(upload).st_size
        return {number: Part(number, part_bytes, "") for number in range(1, -(-size // part_bytes) + 1)}

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        with self._faults(), open(upload, "rb") as file:
            file.seek(offset)
            return Part(held.number, len(body), "", crc32) if file.read(len(body)) == body else None

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        head = self._commit(key, upload, crc32)
        self.abandon(key, upload)
        return head

    def abandon(self, key: str, upload: str) -> None:
        with contextlib.suppress(Missing), self._faults():
            os.unlink(upload)

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        with self._faults(), os.scandir(self._uploads) as entries:
            yield from ((entry.name, entry.path, entry.stat().st_mtime) for entry in entries)

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with self._faults(), open(self._path(key), "rb") as file:
            yield from _read_span(file, start, end)

    def head(self, key: str) -> Head | None:
        path, crc32 = self._path(key), ""
        try:
            with self._faults():
                info = os.stat(path)
        except Missing:
            return None
        if stat.S_ISDIR(info.st_mode):
            return None
        with contextlib.suppress(OSError):
            crc32, _, then = os.getxattr(path, "user.crc32").decode().partition(" ")
        crc32 = crc32 if crc32 and then == f"{info.st_mtime_ns:x}" else ""  # else somebody has written to it since
        return Head(key, info.st_size, f"{info.st_mtime_ns:x}", info.st_mtime, crc32)

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        return self._walk(prefix.rpartition("/")[0], prefix, after)

    def folders(self, prefix: str) -> Iterator[str]:
        with contextlib.suppress(Missing), self._faults(), os.scandir(os.path.join(self._root, prefix)) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name != ".unfinished")
            yield from (name for name in names if any(self.list(f"{prefix}{name}/")))

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

    def _commit(self, key: str, upload: str, crc32: int) -> Head:
        """Make a written file the object: durable first, visible then, the name durable last."""
        path = self._path(key)
        with self._faults():
            with contextlib.suppress(OSError):  # a file system without attributes: compared by reading back
                os.setxattr(upload, "user.crc32", f"{hex32(crc32)} {os.stat(upload).st_mtime_ns:x}".encode())
            _fsync(upload, 0)
            try:
                os.link(upload, path)  # refuses to overwrite, as rename would not
            except FileNotFoundError:
                self._make_folder(os.path.dirname(path))
                os.link(upload, path)
            _fsync(os.path.dirname(path))
        if head := self.head(key):
            return replace(head, crc32=hex32(crc32))
        raise Unreachable(f"{self.url}: {key} was stored and is gone again")

    def _make_folder(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        while folder != self._root:  # the directories that lead to a durable name must be durable too
            folder = os.path.dirname(folder)
            _fsync(folder)

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[Head]:
        try:
            with self._faults(), os.scandir(os.path.join(self._root, folder)) as entries:
                names = sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
        except Missing:
            return
        for name in names:
            key = f"{folder}/{name}" if folder else name
            if name == ".unfinished/" or not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            if name.endswith("/"):
                if key > after or after.startswith(key):
                    yield from self._walk(key[:-1], prefix, after)
            elif key > after and key.startswith(prefix) and (head := self.head(key)):
                yield head

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise Missing(f"{self.url}: {error}") from error
        except FileExistsError as error:
            raise Conflict(f"{self.url}: {error}") from error
        except PermissionError as error:
            raise Denied(f"{self.url}: {error}", "give the user access to read and write") from error
        except OSError as error:
            raise Unreachable(f"{self.url}: {error}", "check the disk or the mount") from error


class _ReplyClock:
    """A store's own time, as its last reply tells it; ours before the first."""

    def __init__(self) -> None:
        self._date = 0.0

    def note(self, reply: Any, *_: Any, **__: Any) -> None:
        if date := reply.headers.get("date"):
            self._date = parsedate_to_datetime(date).timestamp()

    def now(self) -> float:
        return self._date or time.time()


def _fault_of_status(status: int, what: str, hint: str) -> Fault:
    """Return the fault that an HTTP status stands for, where the error's name says no more."""
    if status in (401, 403):
        return Denied(what, hint)
    kinds: dict[int, type[Fault]] = {404: Missing, 410: Missing, 412: Conflict, 429: Throttled}
    return kinds.get(status, Unreachable)(what)  # 5xx, 408, 409, a 400 BadDigest, and 200 with an error inside


_DISTRUST = re.compile(r"certificate verify failed: (.+?)\.? \(_ssl|(hostname '.+?' doesn't match [^)]+)")


def _unanswered(url: str, error: Exception, hint: str, bundle: str) -> Unreachable:
    """Return the fault of a request without an answer; of a certificate that is not trusted, with the cure of that."""
    text = str(error)
    if not (found := _DISTRUST.search(text)):
        return Unreachable(f"{url}: {text}", hint)
    why, server = found[1] or found[2], re.search(r"(?:https://|host=')([^/']+)", text)
    cure = f"pass the certificate of its CA (PEM) with --ca-file; trusted now: {bundle or 'the usual CAs'}. "
    cure += "REQUESTS_CA_BUNDLE holds for whoever gives the credentials, too"
    if "match" in why:
        cure = "call the server by a name that its certificate has: see --endpoint-url"
    elif "expired" in why or "not yet" in why:
        cure = "renew it, or set the clock of this machine"
    return Distrusted(f"{url}: the certificate of {server[1] if server else 'its server'} is not trusted ({why})", cure)


def _check_bundle(verify: Any, ca_file: str) -> str:
    """Return where the certificates are that a client trusts, "" for the usual ones. Raises Usage if none are there."""
    import ssl

    bundle = ca_file or (verify if isinstance(verify, str) else "")
    if not bundle or (os.path.isdir(bundle) and not ca_file):
        return bundle
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(bundle)
    except OSError as error:  # ssl.SSLError is one
        name = "--ca-file" if ca_file else "AWS_CA_BUNDLE or REQUESTS_CA_BUNDLE"
        hint = "it must be a PEM file of certificates (BEGIN CERTIFICATE) that this user may read"
        raise Usage(f"{name} {bundle} cannot be used ({error.strerror})", hint) from None
    return bundle


def _base64_crc(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _crc32_of(chunks: Iterable[bytes]) -> int:
    return functools.reduce(lambda crc, chunk: zlib.crc32(chunk, crc), chunks, 0)


def _is_md5(etag: str, body: Body) -> bool:
    return etag.strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest()


def _add_headers(added: Mapping[str, str], params: dict[str, Any], **_: Any) -> None:
    params["headers"].update(added)


def class_of(access: Access, key: str, size: int) -> str:
    """Return the storage class of an object, "" for the bucket's own.

    Listings and manifest.json are read long before any restore, and what is below 128 KiB is billed as if it were
    that in S3's colder classes (Amazon S3 User Guide, "Understanding and managing Amazon S3 storage classes").
    """
    top, _, path = key.partition("/")
    ours = top.endswith((".listings", ".condemned")) or path.rpartition("/")[2].startswith((MANIFEST, SCHEMA))
    return access.storage_class if path and not ours and size >= 128 << 10 else ""


def _s3_encryption(access: Access) -> dict[str, Any]:
    kms = access.sse == "aws:kms"
    wanted = {
        "ServerSideEncryption": access.sse,
        "SSEKMSKeyId": access.kms_key if kms else "",
        "BucketKeyEnabled": kms,  # one KMS call for many objects, not one for each
    }
    return {name: value for name, value in wanted.items() if value}


def _cold(told: Mapping[str, Any]) -> str:
    """Return the storage class of what S3 can only give hours after RestoreObject, "" of all else."""
    kind = told.get("ArchiveStatus") or told.get("StorageClass", "")
    return str(kind) if kind in ("GLACIER", "DEEP_ARCHIVE", "ARCHIVE_ACCESS", "DEEP_ARCHIVE_ACCESS") else ""


_S3_THROTTLED = re.compile("SlowDown|Throttl|TooManyRequests|RequestLimitExceeded")


class S3Store:
    """s3://bucket[/prefix], through boto3. Works from boto3 1.26 on: newer headers are set by an event."""

    ordered = False

    def __init__(self, bucket: str, prefix: str, access: Access) -> None:
        try:
            import boto3
            from botocore.config import Config

            if "tcp_keepalive" not in Config.OPTION_DEFAULTS:  # Ubuntu 22.04
                raise ImportError(f"{boto3.__version__} is too old")
        except ImportError as error:
            hint = "pip install 'boto3>=1.26', or apt install python3-boto3"
            raise Usage(f"s3:// needs boto3 1.26 ({error})", hint) from None

        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket, self._prefix = bucket, prefix
        self._access, self._encryption = access, _s3_encryption(access)
        self._unproven = set[str]()  # uploads with a part of which neither checksum nor ETag told that it arrived
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
        self._plain = self._client.meta.endpoint_url.startswith("http:")
        self._bundle = _check_bundle(getattr(self._client._endpoint.http_session, "_verify", None), access.ca_file)
        clock, events = _ReplyClock(), self._client.meta.events
        self.now = clock.now
        events.register("after-call.s3", lambda http_response, **_: clock.note(http_response))
        once, full = {"If-None-Match": "*"}, {"x-amz-checksum-type": "FULL_OBJECT"}
        headers = {"PutObject": once, "CreateMultipartUpload": full, "CompleteMultipartUpload": once | full}
        for operation, added in headers.items():
            events.register(f"before-call.s3.{operation}", functools.partial(_add_headers, added))

    def put(self, key: str, body: Body, crc32: int) -> Head:
        sent, more = _base64_crc(crc32), {"Metadata": {"crc32": hex32(crc32)}, **self._kept(key, len(body))}
        more["ChecksumAlgorithm"] = "CRC32"  # said once more, or a bucket with object lock refuses
        reply = self._call("put_object", key, Body=body, ChecksumCRC32=sent, **more)
        told = self._arrived(key, reply, body, sent)
        if not told and _crc32_of(self.get(key)) != crc32:  # head would only repeat our own metadata: read it back
            raise self._damaged(key)
        return Head(key, len(body), reply.get("ETag", ""), self.now(), hex32(crc32))

    def begin(self, key: str, size: int) -> str:
        how = {"ChecksumAlgorithm": "CRC32", **self._kept(key, size)}
        reply = self._call("create_multipart_upload", key, "UploadId", **how)
        return str(reply["UploadId"])

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        sent, where = _base64_crc(crc32), {"UploadId": upload, "PartNumber": number}
        reply = self._call("upload_part", key, "ETag", Body=body, ChecksumCRC32=sent, **where)
        if not self._arrived(key, reply, body, sent):
            self._unproven.add(upload)
        return Part(number, len(body), reply["ETag"], crc32)

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        there = self._pages("list_parts", "Parts", Key=self._prefix + key, UploadId=upload)
        return {part["PartNumber"]: Part(part["PartNumber"], part["Size"], part["ETag"]) for part in there}

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        return replace(held, crc32=crc32) if held.size == len(body) and _is_md5(held.token, body) else None

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        chosen = [
            {"PartNumber": part.number, "ETag": part.token, "ChecksumCRC32": _base64_crc(part.crc32)} for part in parts
        ]
        sent = {"MultipartUpload": {"Parts": chosen}, "ChecksumCRC32": _base64_crc(crc32)}
        self._call("complete_multipart_upload", key, UploadId=upload, **sent)
        head, size = self.head(key), sum(part.size for part in parts)
        if head is None or head.size != size or head.crc32 not in ("", hex32(crc32)):
            raise self._damaged(key)
        if upload in self._unproven and not head.crc32 and _crc32_of(self.get(key)) != crc32:
            raise self._damaged(key)
        self._unproven.discard(upload)
        return replace(head, crc32=hex32(crc32))

    def abandon(self, key: str, upload: str) -> None:
        with contextlib.suppress(Missing):
            self._call("abort_multipart_upload", key, UploadId=upload)

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        for upload in self._pages("list_multipart_uploads", "Uploads", Prefix=self._prefix + prefix):
            yield upload["Key"].removeprefix(self._prefix), upload["UploadId"], upload["Initiated"].timestamp()

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        last = "" if end is None else end - 1
        wanted = {"Range": f"bytes={start}-{last}"} if start or end is not None else {}
        with self._faults(key):
            try:
                body = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **wanted)["Body"]
            except self._client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"].get("HTTPStatusCode") != 416:
                    raise
                return  # the object ends before
            yield from body.iter_chunks(MIB)

    def head(self, key: str) -> Head | None:
        try:
            reply = self._call("head_object", key, "ETag", ChecksumMode="ENABLED")
        except Missing:
            return None
        crc32 = next((value for name, value in reply["Metadata"].items() if name.lower() == "crc32"), "")
        if reply.get("ChecksumCRC32") and "-" not in reply["ChecksumCRC32"]:  # -N is a composite
            crc32 = base64.b64decode(reply["ChecksumCRC32"]).hex()  # the server's own, better than what we said
        cold = "" if 'ongoing-request="false"' in reply.get("Restore", "") else _cold(reply)  # else a thawed copy
        return Head(key, reply["ContentLength"], reply["ETag"], reply["LastModified"].timestamp(), crc32, cold=cold)

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        wanted = {"StartAfter": self._prefix + after} if after else {}
        for item in self._pages("list_objects_v2", "Contents", Prefix=self._prefix + prefix, **wanted):
            key = item["Key"].removeprefix(self._prefix)
            if key > after:  # not every server knows StartAfter
                yield Head(key, item["Size"], item["ETag"], item["LastModified"].timestamp(), cold=_cold(item))

    def folders(self, prefix: str) -> Iterator[str]:
        whole = self._prefix + prefix
        for item in self._pages("list_objects_v2", "CommonPrefixes", Prefix=whole, Delimiter="/"):
            yield item["Prefix"].removeprefix(whole).rstrip("/")

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        why = {}
        for first in range(0, len(keys), 1000):
            objects = [{"Key": self._prefix + key} for key in keys[first : first + 1000]]
            with self._faults(keys[first]):
                reply = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
            for error in reply.get("Errors", ()):
                why[error["Key"].removeprefix(self._prefix)] = f"{error['Code']}: {error.get('Message', '')}"
        return why

    def credentials(self) -> str:
        """Return where the credentials come from, "" where there are none."""
        found = self._client._request_signer._credentials
        return found.method if found else ""

    def _about(self, operation: str) -> Any:
        """Ask for a setting of the bucket. Raises Missing where it has none, Denied without a right of its own."""
        with self._faults("the bucket itself"):
            return getattr(self._client, operation)(Bucket=self._bucket)

    def rules(self) -> Iterator[Rule]:
        """Yield the lifecycle rules, but for those that go by tags: our objects have none."""
        found: dict[str, Any] = {}
        with contextlib.suppress(Missing):
            found = self._about("get_bucket_lifecycle_configuration")
        for rule in found.get("Rules", ()):
            chosen = rule.get("Filter", {}).get("And") or rule.get("Filter", {})
            if rule["Status"] != "Enabled" or "Tag" in chosen or chosen.get("Tags"):
                continue
            does = {
                "expire": {"Days", "Date"} & rule.get("Expiration", {}).keys(),
                "archive": any(map(_cold, rule.get("Transitions", ()))),
                "abort": "AbortIncompleteMultipartUpload" in rule,
                "trim": "NoncurrentVersionExpiration" in rule,
            }
            prefix = chosen.get("Prefix") or rule.get("Prefix") or ""
            yield Rule(rule.get("ID", "?"), (prefix,), frozenset(word for word, so in does.items() if so))

    def versions(self) -> str:
        """Return "" unless the bucket keeps versions; whether it does, and how long it locks them."""
        with contextlib.suppress(Missing, Denied):
            lock = self._about("get_object_lock_configuration")["ObjectLockConfiguration"]
            kept = lock.get("Rule", {}).get("DefaultRetention", {})
            return " ".join(["on, with object lock", *(f"{word}={kept[word]}" for word in sorted(kept))])
        return "on" if self._about("get_bucket_versioning").get("Status") == "Enabled" else ""

    def _kept(self, key: str, size: int) -> dict[str, Any]:
        """Return how an object is to be kept."""
        kind = class_of(self._access, key, size)
        return {**self._encryption, "StorageClass": kind} if kind else self._encryption

    def _arrived(self, key: str, reply: Mapping[str, Any], body: Body, crc32: str) -> bool:
        """Tell whether a reply proves the bytes: by an echo of their CRC-32, or by its ETag.

        Without TLS the ETag must, if it is an MD5: some servers only echo CRCs.
        """
        echoed, etag = reply.get("ChecksumCRC32") == crc32, reply.get("ETag", "")
        if (echoed and not self._plain) or _is_md5(etag, body):
            return True
        if self._plain and not self._encryption and re.fullmatch('"?[0-9a-f]{32}"?', etag):
            raise self._damaged(key)
        return echoed

    def _damaged(self, key: str) -> Corrupt:
        return Corrupt(f"{key} did not arrive as it was sent", "the server or the way to it is broken")

    def _call(self, operation: str, key: str, *told: str, **more: Any) -> Any:
        with self._faults(key):
            reply = getattr(self._client, operation)(Bucket=self._bucket, Key=self._prefix + key, **more)
        return self._answered(reply, *told)

    def _answered(self, reply: Any, *told: str) -> Any:
        """Return a reply if it tells what it must: a captive portal's page, or none, is no answer."""
        if missing := [name for name in told if name not in reply]:
            raise Unreachable(
                f"{self.url}: 200, but without {' '.join(missing)}", "is there a proxy or a portal between?"
            )
        return reply

    def _pages(self, operation: str, items: str, **more: Any) -> Iterator[Any]:
        with self._faults(more.get("Key") or more["Prefix"]):
            for page in self._client.get_paginator(operation).paginate(Bucket=self._bucket, **more):
                told = {"Contents": ("Name",), "CommonPrefixes": ("Name",), "Parts": ("UploadId",)}
                self._answered(page, *told.get(items, ()))
                yield from page.get(items, ())

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        from botocore import exceptions as aws

        try:
            yield
        except aws.ClientError as error:
            raise self._fault(key, error.response) from error
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.NoAuthTokenError) as error:
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the instance a role"
            raise Denied(f"no credentials for {self.url} ({error})", hint) from error
        except (aws.ParamValidationError, aws.InvalidConfigError, aws.NoRegionError) as error:
            raise Usage(f"{self.url}: {error}", "see REGION and --endpoint-url") from error
        except aws.BotoCoreError as error:
            hint = "check the network, REGION and --endpoint-url"
            raise _unanswered(self.url, error, hint, self._bundle) from error

    def _fault(self, key: str, response: dict[str, Any]) -> Fault:
        code, message = str(response["Error"].get("Code", "")), response["Error"].get("Message", "")
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        what = f"{self.url}: {code} for {key} ({message})"
        if code == "NoSuchBucket":
            return Denied(f"bucket {self._bucket} does not exist", "create it, or correct BUCKET_NAME and REGION")
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            where = response["Error"].get("Region") or response["Error"].get("Endpoint") or "another region"
            return Denied(f"bucket {self._bucket} is in {where}", "set REGION")
        if code == "RequestTimeTooSkewed":
            return Denied(what, "set the clock of this machine")
        if code == "InvalidStorageClass":
            return Denied(what, "correct --storage-class")
        if code == "InvalidObjectState":
            return Denied(what, "it is archived: thaw it first (restore-object)")
        if _S3_THROTTLED.search(code) or status == 503:
            return Throttled(what)
        return _fault_of_status(status, what, "check the keys and the IAM policy (README)")


def _crc32c(body: Body) -> str:
    import google_crc32c

    return hex32(google_crc32c.value(bytes(body)))


class GCSStore:
    """gs://bucket[/prefix], through google-cloud-storage. Large files travel in resumable sessions, part by part."""

    ordered = True
    _CALL: Final = MappingProxyType({"timeout": (10, 60), "retry": None})

    def __init__(self, bucket: str, prefix: str, access: Access) -> None:
        try:
            if sys.prefix == "/usr":  # Debian has no package of it: cassbackup-gcs brings a copy of its own
                sys.path.insert(0, "/usr/lib/cassbackup/vendor")
            from google.cloud import storage
        except ImportError as error:
            hint = "pip install google-cloud-storage, or install the package cassbackup-gcs"
            raise Usage(f"gs:// needs Google's client ({error})", hint) from None

        self.url = f"gs://{bucket}/{prefix}".rstrip("/")
        self._prefix, self._access, self._bundle = prefix, access, access.ca_file
        options = {"api_endpoint": access.endpoint_url} if access.endpoint_url else None
        with self._faults(""):
            self._client: Any = storage.Client(client_options=options)
        self._bucket = self._client.bucket(bucket)
        self._http: Any = self._client._http  # requests.Session; resumable sessions have no public door for parts
        known = self._http.merge_environment_settings("https://localhost", {}, None, None, None)["verify"]
        self._bundle = _check_bundle(known, access.ca_file)
        if access.ca_file:  # said with each request, or REQUESTS_CA_BUNDLE would win
            self._http.request = functools.partial(self._http.request, verify=access.ca_file)
        clock = _ReplyClock()
        self.now = clock.now
        self._http.hooks["response"].append(clock.note)

    def put(self, key: str, body: Body, crc32: int) -> Head:
        blob = self._blob(key, len(body))
        blob.metadata = {"crc32": hex32(crc32)}
        with self._faults(key, no_object=False):
            blob.upload_from_string(
                bytes(body), "application/octet-stream", if_generation_match=0, checksum="crc32c", **self._CALL
            )
        return replace(self._head(blob), crc32=hex32(crc32))

    def begin(self, key: str, size: int) -> str:
        with self._faults(key, no_object=False):
            url = self._blob(key, size).create_resumable_upload_session(
                "application/octet-stream", size, if_generation_match=0, checksum=None, **self._CALL
            )
        return f"{size} {url}"

    def put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        end = offset + len(body)
        try:
            there = self._session(key, upload, f"{offset}-{end - 1}", bytes(body))
        except Unreachable:
            there = self._session(key, upload, "*", b"")  # perhaps only the reply was lost
        if there < end:
            raise Unreachable(f"{self.url}: only a part of part {number} of {key} was taken")
        return Part(number, len(body), _crc32c(body), crc32)

    def parts(self, key: str, upload: str, part_bytes: int) -> dict[int, Part]:
        there, size = self._session(key, upload, "*", b""), int(upload.split(" ")[0])
        whole = there // part_bytes if there < size else -(-there // part_bytes)
        return {number: Part(number, part_bytes, "") for number in range(1, whole + 1)}

    def match(self, key: str, upload: str, held: Part, offset: int, body: Body, crc32: int) -> Part | None:
        return Part(held.number, len(body), _crc32c(body), crc32)  # finish compares the whole object's CRC-32C

    def finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        head, whole = self.head(key), 0
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

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with self._faults(key), self._blob(key).open("rb", chunk_size=4 * MIB, **self._CALL) as file:
            yield from _read_span(file, start, end)

    def head(self, key: str) -> Head | None:
        with self._faults(key):
            blob = self._bucket.get_blob(self._prefix + key, **self._CALL)
        return self._head(blob) if blob else None

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        wanted = {"start_offset": self._prefix + after} if after else {}
        with self._faults(prefix, no_object=False):
            blobs = self._client.list_blobs(self._bucket, prefix=self._prefix + prefix, **wanted, **self._CALL)
            yield from (head for head in map(self._head, blobs) if head.key > after)

    def folders(self, prefix: str) -> Iterator[str]:
        whole, found = self._prefix + prefix, set()
        with self._faults(prefix, no_object=False):
            blobs = self._client.list_blobs(self._bucket, prefix=whole, delimiter="/", **self._CALL)
            for page in blobs.pages:
                found |= set(page.prefixes)
        yield from (name.removeprefix(whole).rstrip("/") for name in sorted(found))

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        why = {}
        for key in keys:
            try:
                with contextlib.suppress(Missing), self._faults(key):
                    self._blob(key).delete(**self._CALL)
            except (Conflict, Denied) as fault:
                why[key] = fault.what
        return why

    def rules(self) -> Iterator[Rule]:
        """Yield the lifecycle rules. Raises Denied without storage.buckets.get. ARCHIVE can be read at once there."""
        for number, rule in enumerate(self._about().lifecycle_rules, 1):
            does, when = rule["action"]["type"], rule.get("condition", {})
            old = {"numNewerVersions", "daysSinceNoncurrentTime", "noncurrentTimeBefore"} & when.keys()
            trims = old or when.get("isLive") is False
            words = {"AbortIncompleteMultipartUpload": {"abort"}, "Delete": {"trim" if trims else "expire"}}
            yield Rule(f"{number} ({does})", tuple(when.get("matchesPrefix", ("",))), frozenset(words.get(does, ())))

    def versions(self) -> str:
        """Return "" unless the bucket keeps versions or a retention; what it keeps."""
        bucket = self._about()
        locked = f"retention={bucket.retention_period} s" * bool(bucket.retention_period)
        return " ".join(filter(None, ["on" * bucket.versioning_enabled, locked]))

    def _about(self) -> Any:
        with self._faults("the bucket itself", no_object=False):
            return self._client.get_bucket(self._bucket.name, **self._CALL)

    def _blob(self, key: str, size: int = 0) -> Any:
        blob = self._bucket.blob(self._prefix + key, kms_key_name=self._access.kms_key or None)
        if kind := class_of(self._access, key, size):
            blob.storage_class = kind
        return blob

    def _head(self, blob: Any) -> Head:
        key, crc32 = blob.name.removeprefix(self._prefix), (blob.metadata or {}).get("crc32", "")
        modified = blob.updated.timestamp() if blob.updated else self.now()
        return Head(key, int(blob.size or 0), str(blob.generation), modified, crc32, blob.crc32c or "")

    def _session(self, key: str, upload: str, span: str, body: bytes) -> int:
        """Send a span of a resumable session, * for none; return how many bytes the session has by now."""
        size, url = upload.split(" ", 1)
        headers = {"Content-Range": f"bytes {span}/{size}"}
        with self._faults(key):
            reply = self._http.put(url, data=body, headers=headers, timeout=(10, 60))
        if reply.status_code in (200, 201):
            return int(size)
        if reply.status_code != 308:
            raise self._fault(key, reply.status_code, reply.text[:200])
        there = reply.headers.get("Range", "")  # bytes=0-524287, or none at all
        return int(there.rpartition("-")[2]) + 1 if there else 0

    @contextlib.contextmanager
    def _faults(self, key: str, no_object: bool = True) -> Iterator[None]:
        """Translate; with no_object=False a 404 can only mean that there is no bucket."""
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError, TransportError
        from requests import RequestException

        try:
            yield
        except GoogleAPICallError as error:
            raise self._fault(key, int(error.code or 500), error.message, no_object) from error
        except (RequestException, TransportError) as error:
            raise _unanswered(self.url, error, "check the network and --endpoint-url", self._bundle) from error
        except GoogleAuthError as error:
            hint = "set GOOGLE_APPLICATION_CREDENTIALS, or give the instance a service account"
            raise Denied(f"no credentials for {self.url} ({error})", hint) from error

    def _fault(self, key: str, status: int, message: str, no_object: bool = True) -> Fault:
        # The word "bucket" alone says nothing: an absent object's message has the bucket's name in it.
        if status == 404 and (not no_object or "bucket does not exist" in message.lower()):
            return Denied(f"bucket {self._bucket.name} does not exist", "create it, or correct BUCKET_NAME")
        what = f"{self.url}: {status} for {key} ({message})"
        if status == 403 and "storage.objects.delete" in message:  # so a taken key looks to who may not overwrite it
            return Conflict(what)
        return _fault_of_status(status, what, "check the service account, its roles (README) and access scopes")


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


class Timed:
    """A store whose requests are timed and counted by operation; failed are those that will be tried again."""

    BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
    _STREAMS: Final = ("get", "list")  # timed until the first item is there
    _OPERATIONS: Final = ("put", "begin", "put_part", "finish", "head", "delete", *_STREAMS)

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self.requests = {name: [0] * (len(self.BUCKETS) + 1) for name in self._OPERATIONS}  # the first that fits
        self.seconds, self.failed = dict.fromkeys(self._OPERATIONS, 0.0), dict.fromkeys(self._OPERATIONS, 0)

    def __getattr__(self, name: str) -> Any:
        """Return what the store has, timed if it is a request."""
        found, ask = getattr(self._store, name), self._stream if name in self._STREAMS else self._ask
        return functools.partial(ask, name, found) if name in self._OPERATIONS else found

    def _stream(self, name: str, call: Callable[..., Iterator[T]], *args: Any) -> Iterator[T]:
        items = call(*args)
        yield from self._ask(name, lambda: [*itertools.islice(items, 1)])
        yield from items

    def _ask(self, name: str, call: Callable[..., T], *args: Any) -> T:
        began, failed = time.monotonic(), 0
        try:
            return call(*args)
        except (Unreachable, Denied):
            failed = 1
            raise
        finally:
            took = time.monotonic() - began
            with self._lock:
                self.requests[name][bisect.bisect_left(self.BUCKETS, took)] += 1
                self.seconds[name] += took
                self.failed[name] += failed


class Retrying:
    """A store that keeps trying, the only place that sleeps, and that never overwrites.

    `wait(seconds)` sleeps, and returns True when we are asked to stop. With patience None it never gives up, and
    retries Denied as well, since rights can be given without a restart.

    A lost reply looks like a taken key, and some servers take no notice of If-None-Match. So "taken" means: ask
    and compare; and the first put is sent twice, which tells whether the server refuses the second. put and finish
    raise Conflict only where the key has other content.
    """

    def __init__(self, store: Store, wait: Callable[[float], bool], patience: float | None, budget: Budget) -> None:
        self.timed = Timed(store)
        self._store = store = cast(Store, self.timed)
        self._wait, self._patience, self._budget = wait, patience, budget
        self._slow_until, self._inside = 0.0, threading.local()
        self._refuses: bool | None = None  # does the server refuse to overwrite?
        self.trouble, self.failing_since = "", 0.0  # what is wrong now, for status, and since when (time.time)
        self.url, self.ordered, self.now = store.url, store.ordered, store.now
        self.begin = self._retried(store.begin)
        self.parts = self._retried(store.parts)
        self.match = self._retried(store.match)
        self.abandon = self._retried(store.abandon)
        self.head = self._retried(store.head)
        self.put = self._retried(self.put_now)
        self.put_part = self._retried(self._put_part)
        self.finish = self._retried(self._finish)
        self.delete = self._retried(self._delete)
        self.folders = self._retried(self._folders)

    def put_now(self, key: str, body: Body, crc32: int) -> Head:
        """Put in one attempt: whoever writes a listing must look around before the next."""
        if not self._refuses and (head := self.same(key, len(body), crc32)):
            return head
        self._charge(body)
        try:
            head = self._store.put(key, body, crc32)
            if self._refuses is None:
                self._refuses = False
                head = self._store.put(key, body, crc32)  # the same bytes, so no harm is done if it is taken
                log.warning("store=%s overwrites: it ignores If-None-Match, so each key is looked up first", self.url)
            return head
        except Conflict:
            self._refuses = True
            if there := self.same(key, len(body), crc32):
                return there
            raise Unreachable(f"{key} was taken and is gone again") from None

    def pause(self, fault: Fault, tries: int) -> None:
        """Wait before another attempt at what failed so often, or raise the fault if that is too long."""
        self._bear(fault, tries, 2.0 ** min(tries, 30))

    def same(self, key: str, size: int, crc32: int) -> Head | None:
        """Return the object if there is one. Raises Conflict if it has other content: never size alone."""
        head = self.head(key)
        if head and head.size == size and not head.crc32:
            head = replace(head, crc32=hex32(_crc32_of(self.get(key))))
        if head and (head.size, head.crc32) != (size, hex32(crc32)):
            raise Conflict(f"{key} is taken by other content")
        return head

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """Yield uploads that were never finished. Without the right to ask there are none."""
        with contextlib.suppress(Denied, Missing):  # Missing: how rclone says that there are none
            yield from self._store.unfinished(prefix)

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes from an offset on, up to another, going on where it broke off."""

        def begin(at: int) -> Iterator[bytes]:
            return iter(()) if end is not None and at >= end else self._store.get(key, at, end)

        for chunk in self._stream(begin, start, lambda at, chunk: at + len(chunk)):
            self._charge(chunk)
            yield chunk

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        """Yield the objects under a prefix, going on where it broke off."""
        return self._stream(functools.partial(self._store.list, prefix), after, lambda _, head: head.key)

    def _folders(self, prefix: str) -> Sequence[str]:
        return [*self._store.folders(prefix)]

    def _put_part(self, key: str, upload: str, number: int, offset: int, body: Body, crc32: int) -> Part:
        self._charge(body)
        return self._store.put_part(key, upload, number, offset, body, crc32)

    def _finish(self, key: str, upload: str, parts: Sequence[Part], crc32: int) -> Head:
        size = sum(part.size for part in parts)
        # Ask first, even a server that refuses a second put: radosgw's CompleteMultipartUpload overwrites all the same.
        if not self.ordered and (head := self.same(key, size, crc32)):
            return head
        try:
            return self._store.finish(key, upload, parts, crc32)
        except (Conflict, Missing):  # Missing: perhaps the reply to the first try was lost
            if head := self.same(key, size, crc32):
                return head
            raise

    def _delete(self, keys: Sequence[str]) -> dict[str, str]:
        try:
            return self._store.delete(keys)
        except Denied as fault:  # without the right to delete all stay
            return dict.fromkeys(keys, fault.what)

    def _stream(self, begin: Callable[[At], Iterator[T]], at: At, beyond: Callable[[At, T], At]) -> Iterator[T]:
        items = begin(at)

        def advance() -> T | None:
            nonlocal items
            try:
                return next(items, None)
            except Fault:
                items = begin(at)
                raise

        advance_or_wait = self._retried(advance)
        while (item := advance_or_wait()) is not None:
            at = beyond(at, item)
            yield item

    def _retried(self, call: Callable[P, T]) -> Callable[P, T]:
        def retried(*args: P.args, **kwargs: P.kwargs) -> T:
            began, attempt = time.monotonic(), 0
            while True:
                self._sleep(self._slow_until - time.monotonic())
                self._inside.depth = outer = getattr(self._inside, "depth", 0) + 1
                try:
                    result = call(*args, **kwargs)
                    if outer == 1:  # a put that looks first has not succeeded when it has looked
                        self.trouble, self.failing_since = "", 0.0
                    return result
                except (Unreachable, Denied) as fault:
                    self._bear(fault, attempt, time.monotonic() - began)
                finally:
                    self._inside.depth = outer - 1
                attempt += 1

        return retried

    def _bear(self, fault: Fault, attempt: int, elapsed: float) -> None:
        """Wait before the next attempt, or raise the fault when patience has ended."""
        denied = isinstance(fault, Denied)
        longest = 60.0 if denied else min(60.0, 0.25 * 2 ** min(attempt, 8))  # 2 ** 1024 would not fit a float
        delay = longest * random.uniform(0.5, 1.0)
        if self._patience is not None and elapsed + delay > min(self._patience, fault.patience):
            raise fault
        if str(fault) != self.trouble:
            log.warning("store failed, trying again error=%s", quote(str(fault)))
        self.trouble, self.failing_since = str(fault), self.failing_since or time.time()
        if isinstance(fault, Throttled):  # all threads ask the same store: all of them slow down
            self._slow_until = max(self._slow_until, time.monotonic() + delay)
        self._sleep(delay)

    def _charge(self, body: Body) -> None:
        self._sleep(self._budget.delay(len(body)))

    def _sleep(self, seconds: float) -> None:
        if seconds > 0 and self._wait(seconds):
            raise Stopped("stopped")


def open_store(url: str, access: Access = Access(), new: bool = True) -> Store:
    """Open s3://bucket[/prefix], gs://bucket[/prefix] or file:///directory. SDKs are imported here, not before.

    A directory is made if `new`: nothing of ours has been there yet.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        if not rest.startswith("/"):
            raise Usage(f"bucket {url} is not absolute", "write file:///directory")
        return DirStore(os.path.normpath(rest), new)
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


def _ask(
    url: str,
    headers: Mapping[str, str],
    method: str = "GET",
    marked: Mapping[str, str] | None = None,
    shape: str = r"[A-Za-z0-9+/=_.:-]{1,1000}",
) -> str:
    """Return a short answer, "" where there is none; `marked` are headers that it must have."""
    import requests

    headers = {**headers, "Accept-Encoding": "identity"}
    with requests.Session() as session:
        session.trust_env = False  # a proxy would answer for its own machine
        # Two seconds, to connect as well: a lost SYN is sent again after one.
        reply = session.request(method, url, headers=headers, timeout=2, allow_redirects=False, stream=True)
        if reply.status_code != 200 or any(reply.headers.get(name) != value for name, value in (marked or {}).items()):
            return ""
        text = reply.raw.read(65536).decode("ascii", "replace").strip()
    return text if re.fullmatch(shape, text) else ""


def _ask_aws(environ: Mapping[str, str]) -> Cloud | None:
    host = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    base = host.rstrip("/") + "/latest/"
    token = _ask(base + "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
    headers = {"X-aws-ec2-metadata-token": token}
    instance = _ask(base + "meta-data/instance-id", headers) if token else ""
    return Cloud("s3", instance, _ask(base + "meta-data/placement/region", headers)) if instance else None


def _ask_gce(environ: Mapping[str, str]) -> Cloud | None:
    base = f"http://{environ.get('GCE_METADATA_HOST') or '169.254.169.254'}/computeMetadata/v1/instance/"
    headers = {"Metadata-Flavor": "Google"}  # also in the answer: anybody may listen at that address
    instance = _ask(base + "id", headers, marked=headers)
    zone = _ask(base + "zone", headers, marked=headers) if instance else ""  # projects/123/zones/europe-west1-b
    return Cloud("gs", instance, zone.rpartition("/")[2].rpartition("-")[0]) if instance else None


def ask_scopes(environ: Mapping[str, str]) -> list[str]:
    """Return the access scopes of this VM on GCE: what its service account can do is bounded by them."""
    base = f"http://{environ.get('GCE_METADATA_HOST') or '169.254.169.254'}/computeMetadata/v1/instance/"
    headers = {"Metadata-Flavor": "Google"}
    url = base + "service-accounts/default/scopes"
    return _ask(url, headers, marked=headers, shape=r"[A-Za-z0-9/_.:\s-]{1,9000}").split()


def _may_be_cloud() -> bool:
    """Read the machine's maker; absent (a container, Firecracker) means unknown, not no."""
    try:
        with open("/sys/class/dmi/id/sys_vendor", errors="replace") as file:
            return bool(re.search("amazon|xen|google|qemu|^$", file.read().strip().lower()))
    except OSError:
        return True


def detect_cloud(environ: Mapping[str, str], limit_s: float = 5.0) -> Cloud | None:
    """Ask the metadata services of AWS (IMDSv2) and GCE at once; None if neither answers within the limit.

    Their usual switches are honoured: AWS_EC2_METADATA_DISABLED, NO_GCE_CHECK, and the addresses
    AWS_EC2_METADATA_SERVICE_ENDPOINT and GCE_METADATA_HOST. Where DMI names a maker of real machines, nothing is sent.
    """
    switches = ((_ask_aws, "AWS_EC2_METADATA_DISABLED"), (_ask_gce, "NO_GCE_CHECK"))
    asked = [ask for ask, switch in switches if environ.get(switch, "").lower() != "true"]
    addresses = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST")
    if not asked or not (any(environ.get(name) for name in addresses) or _may_be_cloud()):
        return None
    answers: queue.SimpleQueue[Cloud | None] = queue.SimpleQueue()

    def answer(ask: Callable[[Mapping[str, str]], Cloud | None]) -> None:
        try:
            answers.put(ask(environ))
        except Exception as error:
            log.debug("metadata service did not answer error=%s", quote(repr(error)))
            answers.put(None)

    with contextlib.suppress(ImportError):  # each _ask will tell
        import requests  # noqa: F401 - from a cold disk this may take longer than the limit, which is for the network
    for ask in asked:
        threading.Thread(target=answer, args=(ask,), daemon=True).start()
    deadline = time.monotonic() + limit_s
    for _ in asked:
        with contextlib.suppress(queue.Empty):
            if cloud := answers.get(timeout=max(0.0, deadline - time.monotonic())):
                return cloud
    return None


def check_node(name: str) -> str:
    """Return a node's name if it can be one component of a key. Raises Usage."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}", name) or name.endswith((".listings", ".condemned")):
        raise Usage(f"node name {name!r} cannot be used in keys", "use letters, digits, - _ + and . (at most 200)")
    return name


def name_node(cloud: Cloud | None, host: str, machine_id: str) -> str:
    """Return <hostname>-<instance_id>; off cloud the first 12 digits of the machine id. Raises Usage."""
    host = host.strip().rstrip(".")
    if host in ("", "localhost", "localhost.localdomain"):
        raise Usage(f"host name {host!r} names no node", "set the host's name, or pass --name")
    instance = cloud.instance if cloud else machine_id[:12]
    if not instance:
        raise Usage("neither an instance id nor /etc/machine-id is to be had", "pass --name")
    return check_node(f"{host}-{instance}")


# ======================================================================================================
# Ledger
# ======================================================================================================


class Ledger:
    """A memory that may be lost: which stamps are stored under which key, and which names are listed.

    Every row carries a checksum over itself and over what it was written for (store and node): SQLite does not
    notice flipped bits, and a ledger of another bucket must not speak for this one. What does not check is not
    there. A ledger that cannot be written is done without. Once a day what no file has any more is forgotten, or it
    would grow for as long as the node lives.
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
        self._facts: dict[str, tuple[int, Mapping[str, str]]] = {}  # by prefix, as of so many changes
        self.broken = ""
        try:
            self._db = self._open()
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.OperationalError):  # else there is no room, or no right: it may be good
                aside = f"{path}.broken-{utc(time.time())}"
                log.warning("ledger cannot be read, starting a new one error=%s kept=%s", quote(str(error)), aside)
                for suffix in ("", "-wal", "-shm"):
                    with contextlib.suppress(OSError):
                        os.rename(path + suffix, aside + suffix)
            try:
                self._db = self._open()
            except sqlite3.Error as again:
                self._path = ":memory:"
                self._db = self._open()
                self._complain(again)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            db.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-4096;" + self._TABLES
            )
            db.execute("SELECT count(*) FROM facts").fetchone()
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _sum(self, row: Sequence[str]) -> int:
        return zlib.crc32("\0".join((self._scope, *row)).encode())

    def _checks(self, row: Sequence[Any]) -> bool:
        return all(isinstance(word, str) for word in row[:-1]) and row[-1] == self._sum(row[:-1])

    def _select(self, query: str, *args: str) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(query, args).fetchall()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                self._complain(error)
                return []

    def _read(self, table: str, where: str, *args: str) -> list[tuple[str, ...]]:
        """Return the rows that check, without their checksums."""
        rows = self._select(f"SELECT * FROM {table} WHERE {where}", *args)
        return [row[:-1] for row in rows if self._checks(row)]

    def _change(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Do a statement for each row, in one transaction."""
        with self._lock:
            try:
                self._db.execute("BEGIN")
                self._db.executemany(statement, rows)
                self._db.execute("COMMIT")
                self.broken = self.broken if self._path == ":memory:" else ""
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                self._complain(error)

    def _write(self, table: str, rows: Iterable[tuple[str, ...]]) -> None:
        """Write rows, each with its checksum."""
        if summed := [(*row, self._sum(row)) for row in rows]:
            self._change(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(summed[0]))})", summed)

    def _complain(self, error: Exception) -> None:
        if not self.broken:
            log.error("ledger failed, going on without it error=%s", quote(str(error)))
        self.broken = str(error)

    def knows(self, place: str, name: str, stamp: Stamp) -> tuple[str, ...] | None:
        """Return (key, etag, crc32, crc32c, run, checked) for bytes that were stored, else None."""
        rows = self._read("stored", "place = ? AND name = ? AND stamp = ?", place, quote(name), str(stamp))
        return tuple(json.loads(rows[0][3])) if rows else None

    def record(self, entries: Iterable[tuple[str, Stored]], run: str) -> None:
        """Remember what was stored or confirmed just now: (place, entry)."""
        now, rows = f"{time.time():.0f}", []
        for place, e in entries:
            found = json.dumps((e.key, e.etag, e.crc32, e.crc32c, run, now))
            rows.append((place, quote(e.name), str(e.stamp), found))
        self._write("stored", rows)

    def listed(self, directory: str) -> dict[str, dict[str, str]]:
        """Return what is listed of a directory: {taking or batch: {name: stamp}}."""
        listed: dict[str, dict[str, str]] = {}
        for _, since, names in self._read("listed", "directory = ?", quote(directory)):
            pairs = (line.split("\t") for line in names.split("\n") if line)
            listed[since] = {unquote(name): stamp for name, stamp in pairs}
        return listed

    def list(self, directory: str, since: str, names: Mapping[str, Stamp]) -> None:
        """Remember what a directory has in the bucket's listings."""
        lines = "\n".join(f"{quote(name)}\t{stamp}" for name, stamp in names.items())
        self._write("listed", [(quote(directory), since, lines)])

    def fact(self, name: str) -> str:
        """Return a remembered value, "" if there is none."""
        rows = self._read("facts", "name = ?", quote(name))
        return unquote(rows[0][1]) if rows else ""

    def remember(self, name: str, value: str) -> None:
        """Remember a value; "" is none."""
        if value:
            self._write("facts", [(quote(name), quote(value))])
        elif self.fact(name):
            self._change("DELETE FROM facts WHERE name = ?", [(quote(name),)])

    def facts(self, prefix: str) -> Mapping[str, str]:
        """Return the remembered values whose names begin with a prefix, by the rest of the name.

        Asked for every few seconds, of thousands of tables; so they are read again only when something was written.
        """
        changes = self._db.total_changes
        if self._facts.get(prefix, (-1, {}))[0] != changes:
            rows = self._read("facts", "name GLOB ?", quote(prefix) + "*")
            told = {unquote(name)[len(prefix) :]: unquote(value) for name, value in rows}
            self._facts[prefix] = changes if told else -1, told  # nothing may be that it could not be read
        return self._facts[prefix][1]

    def forget(self) -> None:
        """Forget everything."""
        for table in ("stored", "listed", "facts"):
            self._change(f"DELETE FROM {table}", [()])

    def trim_listed(self, names: Callable[[str], Collection[str] | None]) -> None:
        """Forget the names that their directory has no more (None: who knows), or that were listed again since."""
        for (directory,) in self._select("SELECT DISTINCT directory FROM listed"):
            rows = self._select("SELECT * FROM listed WHERE directory = ? ORDER BY since DESC", directory)
            if (listed := names(unquote(str(directory)))) is None:  # asked last: what comes meanwhile is in no row here
                continue
            there, gone, fewer = set(listed), [], []
            for row in rows:
                lines = row[2].split("\n") if self._checks(row) else []
                kept = {name: line for line in lines if (name := unquote(line.partition("\t")[0])) in there}
                there.difference_update(kept)  # -= would copy the set: here are as many rows as there were flushes
                if not kept:
                    gone.append(row[:3])
                elif len(kept) < len(lines):
                    text = "\n".join(kept.values())
                    fewer.append((text, self._sum((*row[:2], text)), *row[:3]))
            where = "WHERE directory = ? AND since = ? AND names = ?"  # and nothing that was written since
            self._change(f"DELETE FROM listed {where}", gone)
            self._change(f"UPDATE listed SET names = ?, sum = ? {where}", fewer)

    def trim_stored(self, alive: Callable[[str], Collection[str]], before: float) -> None:
        """Forget the stamps that were not confirmed since a time, but for those that their table still has."""
        alive, last = functools.lru_cache(1)(alive), ["", "", ""]
        page = "SELECT * FROM stored WHERE (place, name, stamp) > (?, ?, ?) ORDER BY place, name, stamp LIMIT 1000"
        while rows := self._select(page, *last):
            last = list(rows[-1][:3])
            old = [row for row in rows if not self._checks(row) or float(json.loads(row[3])[5]) < before]
            gone = [row[:4] for row in old if not self._checks(row) or row[2] not in alive(unquote(row[0]))]
            self._change("DELETE FROM stored WHERE place = ? AND name = ? AND stamp = ? AND found = ?", gone)

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

    Two races would lose a hint for ever. An event can arrive before add_watch has returned its descriptor: so arming
    and reading hold one lock. And a watch armed between a one-shot's event and its end dies with the old one: so
    IN_IGNORED is a hint too.
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
        self._news = threading.Condition()  # over watches and hints
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
        with self._news:
            wd = self._manager.add_watch(path, mask)[path]
            if wd >= 0:
                self._watched[wd] = (token, files)
        if wd < 0 and not self._full:
            hint = "raise it: sysctl fs.inotify.max_user_watches=1048576"
            log.warning("watch table is full, unwatched directories are looked at every few seconds hint=%s", hint)
        self._full = wd < 0
        return not self._full

    def hint(self, token: Any) -> None:
        """Give a hint ourselves."""
        self._tell({token: None})

    def hint_all(self) -> None:
        """Say that anything may have changed."""
        self._tell({}, everything=True)

    def _tell(self, dirty: Mapping[Any, None], everything: bool = False) -> None:
        with self._news:
            self._dirty.update(dirty)
            self._all |= everything
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
                events = os.read(fd, 256 * 1024)
                with self._news:
                    self._take(events)
        except Exception as error:
            log.exception("reading inotify failed")
            why = repr(error)
        with self._news:
            self._stopped = why
            self._news.notify()

    def _take(self, events: bytes) -> None:
        """Turn events into hints. The caller holds the lock."""
        names, offset = self._names, 0
        while offset < len(events):
            wd, mask, _, length = _EVENT.unpack_from(events, offset)
            offset += _EVENT.size + length
            if mask & names.IN_Q_OVERFLOW:
                log.warning("inotify queue overflowed, looking everywhere hint=raise fs.inotify.max_queued_events")
                self._all = True
                continue
            token, files = self._watched.get(wd, (None, False))
            if mask & names.IN_IGNORED:
                if self._watched.pop(wd, None):
                    self._manager.del_watch(wd)
            elif not files and not mask & names.IN_ISDIR:
                continue  # a flush or a compaction in a live table's directory
            if token is not None:
                self._dirty[token] = None
        self._news.notify()


# ======================================================================================================
# Scan and pin
# ======================================================================================================

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo must not hang us
_GET_VERSION: Final = 0x80087601  # FS_IOC_GETVERSION, ioctl_iflags(2): differs when an inode number is used again
_WARM_NAMES: Final = 100_000  # names kept in memory of directories looked into lately
_HELD_FILES: Final = 256
_LINK, _BY_PATH, _LOST = "", "@", "!"  # what stands behind the ~ of a name in the pin area


def _any_glob(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


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


def _lock(fd: int) -> None:
    deadline = time.monotonic() + 10.0
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as whoever only asks for the holder has it for a moment
        os.sched_yield()  # who asks may have been stopped with it


def lock_file(path: str) -> int:
    """Take the lock and write our pid into it; the lock goes with the process. Raises Busy with the holder's pid."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(fd)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Busy(f"another cassbackup (pid {holder}) holds {path}", "ask it with `cassbackup status`") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def write_whole(path: str, body: bytes, durable: bool = True, for_all: bool = False) -> None:
    """Write a small file so that it is there whole or not at all; `for_all` to read, whatever the umask."""
    how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC  # the directory may be another user's
    with open(os.open(f"{path}.tmp", how, 0o666), "wb") as file:
        file.write(body)
        if for_all:
            os.fchmod(file.fileno(), 0o644)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.rename(f"{path}.tmp", path)


def _true_name(directory: str, name: str) -> str:
    if not name.startswith("%%"):
        return name
    with open(os.path.join(directory, name + ".name"), "rb") as file:
        return os.fsdecode(file.read())


class Area:
    """The pin area of one data directory: hard links that mirror where they came from.

    <area>/ks1%2Fusers-5a1c%2Fsnapshots%2Fdaily~<taking>/nb-1-big-Data.db~ is the queue and its only record. A file
    that could not be linked is <name>~@<inode>, an empty file: it is read where it is. One that was given up is
    <name>~!<inode>. Names too long to mark stand under their hash, with a file <hash>.name beside them.
    """

    def __init__(self, root: str, path: str) -> None:
        self.root, self.path = root, path
        self.full = False  # beyond --max-pinned or the free-space floor: nothing more is linked
        self.held: dict[tuple[str, str, str], int] = {}  # (source directory, since, name): descriptor held for a link
        self.pending: dict[str, set[str]] = {}  # source directory: since of its pin directories
        self.by_since: dict[str, set[str]] = {}  # the other way round
        self._released, identity = os.path.join(path, ".released~"), os.path.join(path, "id")
        os.makedirs(self._released, 0o755, exist_ok=True)
        self._lock = lock_file(os.path.join(path, "lock"))
        if not os.path.exists(identity):
            write_whole(identity, f"{random.getrandbits(48):012x}".encode())
        with open(identity) as file:
            self.id = file.read()
        for parsed in filter(None, map(parse_pin_directory, os.listdir(path))):
            self._note(_true_name(path, parsed[0]), parsed[1])

    def _note(self, relative: str, since: str) -> None:
        self.pending.setdefault(relative, set()).add(since)
        self.by_since.setdefault(since, set()).add(relative)

    def source(self, relative: str) -> str:
        """Return the path of a source directory."""
        return os.path.normpath(os.path.join(self.root, relative))

    def make(self, relative: str, since: str) -> int:
        """Make the directory for the pins of a source directory, and open it."""
        name = pin_directory(relative, since)
        path = os.path.join(self.path, name)
        if name.startswith("%%") and since not in self.pending.get(relative, ()):
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
        write_whole(f"/proc/self/fd/{fd}/{short}.name", os.fsencode(name))
        return f"{short}~{how}"

    def marks(self, relative: str, since: str) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
        """Yield (name, how, entry) of a source directory's pins."""
        path = os.path.join(self.path, pin_directory(relative, since))
        try:
            entries = os.scandir(path)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                head, tilde, how = entry.name.rpartition("~")
                if tilde:
                    yield _true_name(path, head), how, entry

    def inodes(self, relative: str, sinces: Iterable[str]) -> dict[str, int]:
        """Return the inode of each name that is pinned. A pin keeps its number from being used again."""
        inodes = {}
        for since in sorted(sinces):
            for name, how, entry in self.marks(relative, since):
                number = int(how[1:], 16) if how else entry.inode()
                inodes[name] = 0 if how.startswith(_LOST) else number  # what was given up holds no number
        return inodes

    def read(self, relative: str, since: str) -> tuple[list[Pinned], list[str]]:
        """Return the pins of a source directory, and the names that are lost."""
        directory = self.source(relative)
        pins, lost = [], []
        for name, how, entry in self.marks(relative, since):
            path, held = entry.path, -1
            if how:
                path, held = os.path.join(directory, name), self.held.get((relative, since, name), -1)
            try:
                info = os.fstat(held) if held >= 0 else os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
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
            if stamp is False or (stamp and not how and Stamp.of(self.id, entry.stat(follow_symlinks=False)) != stamp):
                return False
        name = pin_directory(relative, since)
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(self.path, name), os.path.join(self._released, f"{name}.{time.time_ns()}"))
        for key in [key for key in self.held if key[:2] == (relative, since)]:
            os.close(self.held.pop(key))
        for index, one, other in ((self.pending, relative, since), (self.by_since, since, relative)):
            index[one].discard(other)
            if not index[one]:
                del index[one]
        if name.startswith("%%") and relative not in self.pending:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.path, name.rpartition("~")[0] + ".name"))
        return True

    def sweep(self) -> None:
        """Unlink what was released."""
        for name in os.listdir(self._released):
            shutil.rmtree(os.path.join(self._released, name), ignore_errors=True)

    def close(self) -> None:
        """Let the lock go."""
        os.close(self._lock)


def why_no_link(root: str, path: str) -> str:
    """Link some file of the data directory into the area, and remove the link; return what went wrong, if it did."""
    probe = os.path.join(path, f".probe-{os.getpid()}")
    files = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    with contextlib.suppress(OSError):  # of a process that was killed here; in a container all have one pid
        os.unlink(probe)
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


def area_paths(real: str, pin_dir: str) -> list[str]:
    """Return where a data directory's pin area may be, the best place first."""
    if pin_dir:
        return [os.path.join(os.path.abspath(pin_dir), quote(real, slash="%2F"))]
    return [
        os.path.join(os.path.dirname(real), ".cassbackup", os.path.basename(real)),
        os.path.join(real, ".cassbackup", "backups"),  # Cassandra's own walks skip a directory of this name
    ]


def open_area(root: str, pin_dir: str = "") -> Area:
    """Open a data directory's pin area: beside it, else inside, where link(2) works. Raises Usage, Busy."""
    real = os.path.realpath(root)
    candidates, problems = area_paths(real, pin_dir), []
    for path in candidates:
        try:
            os.makedirs(path, 0o755, exist_ok=True)
            problem = why_no_link(real, path)
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem:
            return Area(root, path)
        problems.append(f"{path}: {problem}")
    usable = [path for path in candidates if os.access(path, os.W_OK)]
    hint = "run as the owner of the data, with the pin area under the same mount, or pass --pin-dir"
    if not usable:
        raise Usage(f"no pin area for {root} ({'; '.join(problems)})", hint)
    log.error("cannot link, will hold open files or read in place problem=%s hint=%s", quote("; ".join(problems)), hint)
    return Area(root, usable[0])


def live_stamps(areas: Iterable[Area], place: str) -> set[str]:
    """Return the stamps of a table's own files and its indexes' (.idx/): what the next snapshot will have."""
    stamps: set[str] = set()
    for area in areas:
        home = os.path.join(area.root, place)
        for folder in (home, *glob.glob(os.path.join(glob.escape(home), ".*", ""))):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # a compaction was faster
                        if entry.is_file(follow_symlinks=False):
                            stamps.add(str(Stamp.of(area.id, entry.stat(follow_symlinks=False))))
    return stamps


def names_in(directory: str) -> list[str] | None:
    """Return what a directory has, nothing if it is gone; None if it cannot be read just now."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return None


def name_forgotten(area: Area) -> None:
    """Name in the log a pin area of earlier settings where files wait: nothing looks there any more."""
    for path in area_paths(os.path.realpath(area.root), ""):
        if path != area.path and os.path.isdir(path) and any(map(parse_pin_directory, os.listdir(path))):
            hint = "store them with cassbackup watch --once and the earlier settings (--pin-dir)"
            log.error("files wait in a pin area that is not used any more area=%s hint=%s", quote(path), hint)


@dataclass(slots=True, eq=False)
class Place:
    """A directory that is looked into, and what is known of it."""

    area: Area
    relative: str
    archive: bool  # are files outside snapshots/ and backups/ wanted at all
    path: str = ""
    tag: tuple[str, ...] = ()  # keyspace, table, "snapshots", tag
    files: bool = False
    archived: bool = False  # files here must be wanted by --include
    batch: tuple[str, str] = ("", "")  # what shares a batch: backups/ and its .idx
    life: tuple[int, int] | None = None  # inode and its generation
    mtime_ns: int = 0  # as of the last look; 0: look again
    since: str = ""
    pinned: dict[str, int] | None = None  # inode by name; None: not in memory
    listed: dict[str, str] | None = None  # stamp by name
    armed: bool = False
    refused: bool = False  # by the last look: something in it could not be pinned
    ready: float = 0.0  # not to be looked into again before this (monotonic)

    def __post_init__(self) -> None:
        parts = self.relative.split("/")
        snapshot, backups = parts[2:3] == ["snapshots"], parts[2:3] == ["backups"]
        self.path = self.area.source(self.relative)
        self.tag = tuple(parts[:4]) if snapshot and len(parts) >= 4 else ()
        self.files = bool(self.tag) or backups or (self.archive and not snapshot)
        self.archived = self.files and not self.tag and not backups
        self.batch = (self.area.root, "/".join(parts[:3]) if backups else self.relative)


def _generation(fd: int) -> int:
    """Return what tells two lives of one inode number apart; 0 where the file system does not say."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, _GET_VERSION, bytes(8))[:4], sys.byteorder)
    except OSError:
        return 0


class Pinner:
    """The one thread that arms, looks and links, and does nothing else.

    `listed(directory)` tells what the bucket lists of it, {since: {name: stamp}}; `touched(unit, files, delay)` is
    called when a unit has new pins. `gate` is closed while a directory is dirty.
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
        self.areas, self._watcher, self.filters, self._clock = areas, watcher, filters, clock
        self._listed, self._touched = listed, touched
        self.lock = threading.RLock()  # pinning, and releasing what is pinned
        self.gate = threading.Event()
        self.counts: Counter[str] = Counter()
        self.looked = 0.0  # when the last full look began (time.time)
        self.beat = time.monotonic()  # when it last got on
        self._places: dict[str, Place] = {}
        self._tables: dict[str, str] = {}  # of these, the directories of tables
        self._tags: dict[tuple[str, ...], set[Place]] = {}
        self._takings: dict[tuple[str, ...], str] = {}
        self._ended: set[tuple[str, ...]] = set()
        self._batches: dict[tuple[str, str], str] = {}
        self._warm: OrderedDict[Place, int] = OrderedDict()
        self._warm_names = 0  # the sum of them
        self._later: dict[Place, None] = {}
        self._refused: dict[str, float] = {}  # path of a directory: since when it cannot be looked into (time.time)
        self._unarmed = False  # some place has no watch: only looking again and again finds what is new there
        self._over = False

    def run(self, stop: threading.Event, reconcile_s: float) -> None:
        """Look wherever a hint points, until asked to stop. Raises Fault when the watcher has died."""
        try:
            self.look_everywhere()
            looked = time.monotonic()
            while not stop.is_set():
                self.beat = time.monotonic()
                due = looked + (min(2.0, reconcile_s) if self._unarmed else reconcile_s)
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
                    looked = time.monotonic()
        finally:
            self._over = True

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
        known = list(self._places.values())
        for area in self.areas:
            self._enter(area, "")  # and all that is below, at the start
        before = self.counts["found"]
        for place in known:
            if self._places.get(place.path) is place:
                self.look(place)
        self.counts["found_by_rescan"] += self.counts["found"] - before
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
        self._unarmed = any(not place.armed for place in self._places.values())
        self.looked = began

    def look_again(self, limit_s: float) -> None:
        """Have the pinning thread look for what came without a hint; wait for that, but never for long."""
        looked = threading.Event()
        for call in (self.reconcile, looked.set):
            self._watcher.hint(call)
        if looked.wait(limit_s):
            self.gate.wait(limit_s)

    def confirm(self, unit: Unit) -> bool:
        """Look afresh, in every data directory, at the path of a snapshot; False if a name vanished meanwhile.

        Called from other threads; the looking is done by the pinning thread. Raises Stopped when that has ended.
        """
        answers: list[bool] = []
        answered = threading.Event()

        def look() -> None:
            answers.append(self._sees_all_of(unit))
            answered.set()

        self._watcher.hint(look)
        while not answered.wait(1.0):
            if self._over:
                raise Stopped("the pinning thread has ended")
        return answers[0]

    def _sees_all_of(self, unit: Unit) -> bool:
        """Look at every place of a taking.

        A data directory that never had this tag counts as looked at. One that had it and has it no more does not:
        we cannot know what we missed.
        """
        tag = (unit.keyspace, unit.table, "snapshots", unit.tag)
        places = list(self._tags.get(tag, ()))
        looks = [self.look(place) for place in places]  # all of them, also after one that failed
        gone = any(self._places.get(place.path) is not place for place in places)
        held = {area for area in self.areas if unit.since in area.by_since}
        missed = gone or not held <= {place.area for place in places}
        return all(looks) and not missed and self._takings.get(tag) == unit.since

    def close_batch(self, unit: Unit) -> None:
        """Let new files go to the next batch. The caller holds the lock."""
        for base in [base for base, since in self._batches.items() if since == unit.since]:
            del self._batches[base]

    def postpone(self, area: Area, relative: str, since: str, names: Iterable[str], delay: float) -> None:
        """Move pins on to the next batch of their directory."""
        moved = set(names)
        with self.lock, contextlib.ExitStack() as stack:
            place = self._places.get(area.source(relative)) or Place(area, relative, True)
            following = self._since(place)
            if moved & area.inodes(relative, [following]).keys():
                following = self._since(place, apart=True)
            source = os.open(os.path.join(area.path, pin_directory(relative, since)), _OPEN_DIRECTORY)
            stack.callback(os.close, source)
            target = area.make(relative, following)
            stack.callback(os.close, target)
            stack.callback(
                self._touched, unit_of(area.root, relative, following), len(moved), delay
            )  # however far we get
            for name, how, entry in area.marks(relative, since):
                if name in moved:
                    os.rename(entry.name, area.mark(name, how, target), src_dir_fd=source, dst_dir_fd=target)
                    if held := area.held.pop((relative, since, name), None):
                        area.held[relative, following, name] = held

    def tables(self) -> list[str]:
        """Return the tables that have directories, as keyspace/table-id."""
        return sorted(set(self._tables.values()))

    def refused(self) -> dict[str, float]:
        """Return since when directories that are there cannot be looked into (time.time)."""
        return {path: since for path, since in sorted(self._refused.items()) if os.path.lexists(path)}

    def forget(self) -> None:
        """Take nothing for listed any more, and look everywhere again: the bucket is not what it was."""
        with self.lock:
            for place in self._places.values():
                place.listed, place.mtime_ns = None, 0
        self._watcher.hint_all()

    def released(self, area: Area, relative: str) -> None:
        """Note that pins of a source directory are gone. The caller holds the lock."""
        if place := self._places.get(area.source(relative)):
            place.pinned = place.listed = None

    def look(self, place: Place) -> bool:
        """Arm a place, look into it, pin what is new; False if something in it could not be pinned."""
        with self.lock:
            self.beat = time.monotonic()
            before = self.counts["vanished"] + self.counts["refused"]
            try:
                # The data directory itself may be a link.
                fd = os.open(place.path, _OPEN_DIRECTORY if place.relative else _OPEN_DIRECTORY & ~os.O_NOFOLLOW)
            except OSError as error:
                if place.relative and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    self._leave(place)
                    self._skip_link(place.area, place.relative)
                else:
                    place.armed, self._unarmed = False, True  # it may be back, or open to us, before the next hint
                    self._refuse(place, error)
                return False
            try:
                self._look_at(place, fd)
            except OSError as error:
                self._refuse(place, error)
            finally:
                os.close(fd)
            if place.files:
                self._cool_down(place)
            return self.counts["vanished"] + self.counts["refused"] == before

    def _look_at(self, place: Place, fd: int) -> None:
        began, info = time.monotonic(), os.fstat(fd)
        place.armed, place.refused = self._watcher.arm(place, fd, place.files), False
        self._unarmed |= not place.armed
        # Clocks of directories tick coarsely: what changed just now may change again without a trace.
        place.mtime_ns = info.st_mtime_ns if abs(time.time_ns() - info.st_mtime_ns) > 2e9 else 0
        if place.tag:
            self._recognize(place, (info.st_ino, _generation(fd)))
        if place.relative.count("/") == 1 and not place.files:  # a live table's directory may hold thousands
            for name in ("snapshots", "backups"):
                self._enter(place.area, f"{place.relative}/{name}")
        elif place.tag and info.st_mtime < self.filters.since:
            self.counts["skipped_since"] += 1
        else:
            self._sort(place, fd)
            rest = 0.0 if place.tag else 5 * min(0.2, time.monotonic() - began)
            place.ready = time.monotonic() + 0.01 + rest
        if not place.refused:
            self._refused.pop(place.path, None)

    def _sort(self, place: Place, fd: int) -> None:
        """Enter directories, pin new files, count what is neither."""
        pinned, listed = self._warm_up(place) if place.files else ({}, {})
        found = []
        with os.scandir(fd) as entries:
            for entry in entries:
                if pinned.get(entry.name) == entry.inode():  # our link holds the inode: the same number, the same file
                    continue
                if entry.is_dir(follow_symlinks=False):
                    self._enter(place.area, f"{place.relative}/{entry.name}".lstrip("/"))
                elif not place.files:
                    self._skip_link(place.area, f"{place.relative}/{entry.name}".lstrip("/"))
                elif not entry.is_file(follow_symlinks=False):
                    self.counts["skipped_kind"] += 1
                    log.info("not a regular file, skipped path=%s", quote(os.path.join(place.path, entry.name)))
                elif self._is_new(place, entry, listed):
                    found.append(entry)
        if place.tag and any(entry.name in pinned or self._replaced(entry, listed) for entry in found):
            self._renew(place)  # other inodes under the same names: the tag was taken again
            self._sort(place, fd)
        elif found:
            self._pin_all(place, fd, found, pinned)

    def _is_new(self, place: Place, entry: os.DirEntry[str], listed: Mapping[str, str]) -> bool:
        if place.archived and not self.filters.archived(os.path.join(place.path, entry.name)):
            return False
        since = 0.0 if place.tag else self.filters.since  # of a snapshot, its directory has been asked
        if entry.name not in listed and not since:
            return True
        try:
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            self.counts["vanished"] += 1
            return False
        if info.st_mtime < since:
            self.counts["skipped_since"] += 1
            return False
        # str(Stamp.of(...)), but three times as fast: at a start there may be a million names
        stamp = f"{place.area.id}-{info.st_ino:x}-{info.st_size:x}-{info.st_mtime_ns:x}"
        return listed.get(entry.name) != stamp

    def _replaced(self, entry: os.DirEntry[str], listed: Mapping[str, str]) -> bool:
        return entry.name in listed and Stamp.parse(listed[entry.name]).ino != entry.inode()

    def _pin_all(self, place: Place, fd: int, found: list[os.DirEntry[str]], pinned: dict[str, int]) -> None:
        since = self._since(place, apart=any(entry.name in pinned for entry in found))
        pins = place.area.make(place.relative, since)
        try:
            for entry in found:
                if self._pin(place, fd, pins, entry):
                    pinned[entry.name] = entry.inode()
        finally:
            os.close(pins)
            self.counts["found"] += len(found)
            self._touched(unit_of(place.area.root, place.relative, since), len(found), 0.0)

    def _pin(self, place: Place, fd: int, pins: int, entry: os.DirEntry[str]) -> bool:
        """Make the link; False if the file vanished before, or nothing can be written."""
        area, name, self.beat = place.area, entry.name, time.monotonic()
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
            self._hold(place, fd, name, error)
        try:
            marker = area.mark(name, f"{_BY_PATH}{entry.inode():x}", pins)
            os.close(os.open(marker, os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=pins))
        except OSError as error:  # without a mark nobody would ask for this file again
            self._refuse(place, error)
            return False
        return True

    def _hold(self, place: Place, fd: int, name: str, error: OSError) -> None:
        """Hold a file open that cannot be linked."""
        self.counts["unlinked"] += 1
        if self.counts["unlinked"] == 1:
            hint = "run as the owner of the data; keep the pin area under the same mount"
            log.error("link failed, holding files open error=%s hint=%s", error.strerror, hint)
        held, key = place.area.held, (place.relative, self._since(place), name)
        if key in held:  # of an earlier try, that ended without a mark
            os.close(held.pop(key))
        if len(held) < _HELD_FILES:
            with contextlib.suppress(OSError):
                held[key] = os.open(name, _OPEN_FILE, dir_fd=fd)

    def _warm_up(self, place: Place) -> tuple[dict[str, int], dict[str, str]]:
        """Return what is pinned and what is listed of a place, from memory if it was looked into lately."""
        since = self._since(place) if place.tag else ""
        if place.pinned is None:
            sinces = place.area.pending.get(place.relative, set())
            place.pinned = place.area.inodes(place.relative, sinces & {since} if since else sinces)
        if place.listed is None:
            listed, place.listed = self._listed(place.path), {}
            for one in [since] if since else sorted(listed):
                place.listed |= listed.get(one, {})
        return place.pinned, place.listed

    def _cool_down(self, place: Place) -> None:
        """Count the names in memory, also those just pinned; forget those of the places not looked into for longest."""
        names = len(place.pinned or ()) + len(place.listed or ())
        self._warm_names += names - self._warm.pop(place, 0)
        self._warm[place] = names
        while self._warm_names > _WARM_NAMES and len(self._warm) > 1:
            cold, names = self._warm.popitem(last=False)
            self._warm_names -= names
            cold.pinned = cold.listed = None

    def _since(self, place: Place, apart: bool = False) -> str:
        """Return the taking or the batch that new files of this place belong to.

        `apart` begins a new batch: its files have names that are pinned with other contents.
        """
        if not place.tag:
            if apart:
                self._batches.pop(place.batch, None)
            return self._batches.setdefault(place.batch, self._clock())
        if not place.since:
            if place.tag not in self._takings or place.tag in self._ended:
                self._takings[place.tag] = self._remembered_taking(place) or self._clock()
                self._ended.discard(place.tag)
            place.since = self._takings[place.tag]
        return place.since

    def _remembered_taking(self, place: Place) -> str:
        """Return the taking that pins or listings know of a tag, right after a start, if it still is that one.

        Only manifest.json can tell, wherever it is: SSTables are the same inodes in every snapshot. Where none is
        known, because we died before it was written, a file that is gone says that the tag was cleared.
        """
        if self.looked or place.tag in self._ended:
            return ""
        tag = "/".join(place.tag)
        listed = {area: self._listed(area.source(tag)) for area in self.areas}
        takings = {since for area in self.areas for since in (*area.pending.get(tag, ()), *listed[area])}
        since = max(takings | place.area.pending.get(place.relative, set()), default="")
        known, there = set(), set()
        for area in self.areas:
            pinned = area.inodes(tag, [since]).get(MANIFEST)
            stamp = listed[area].get(since, {}).get(MANIFEST)
            if pinned or stamp:
                known.add((area, pinned or Stamp.parse(str(stamp)).ino))
            with contextlib.suppress(OSError):
                info = os.lstat(os.path.join(area.source(tag), MANIFEST))
                there.add((area, info.st_ino if stamp in (None, str(Stamp.of(area.id, info))) else -1))
        pending = any(since in area.by_since for area in self.areas)
        same = known == there if known else (pending or not there) and self._has_all(tag, since, listed)
        if not same:
            return ""
        if place.path == place.area.source(tag):
            place.listed = listed[place.area].get(since, {})  # read once: at a start there may be a million names
        return since

    def _has_all(self, tag: str, since: str, listed: Mapping[Area, dict[str, dict[str, str]]]) -> bool:
        """Tell whether a tag still has every file that is pinned or listed of a taking."""
        for area in self.areas:
            inodes = {name: Stamp.parse(stamp).ino for name, stamp in listed[area].get(since, {}).items()}
            for name, inode in (inodes | area.inodes(tag, [since])).items():
                there = -1
                with contextlib.suppress(OSError):
                    there = os.lstat(os.path.join(area.source(tag), name)).st_ino
                if there < 0 or inode not in (0, there):  # 0: given up
                    return False
        return True

    def _is_current(self, place: Place) -> bool:
        """Tell whether a place of a tag is of its current taking, not of one that another of its places has ended."""
        return bool(place.since) and place.since == self._takings.get(place.tag)

    def _recognize(self, place: Place, life: tuple[int, int]) -> None:
        if place.life not in (None, life):
            if self._is_current(place):
                self._renew(place)
            place.since, place.pinned, place.listed = "", None, None
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
        if area.source(relative) in self._places:
            return
        parts, archive = relative.split("/") if relative else [], self.filters.include is not None
        deep = len(parts) > 2 and parts[2] not in ("snapshots", "backups")
        ours = bool(parts) and parts[-1].startswith(
            (".cassbackup", "lost+found")
        )  # ours, or fsck's, where data is a mount
        if ours or (deep and not archive) or not self.filters.directory(parts):
            return
        place = Place(area, relative, archive)
        self._places[place.path] = place
        if place.relative.count("/") == 1:
            self._tables[place.path] = place.relative
        if place.tag:
            self._tags.setdefault(place.tag, set()).add(place)
        self.look(place)

    def _leave(self, place: Place) -> None:
        """Forget a directory that is gone."""
        if self._places.get(place.path) is place:
            del self._places[place.path]
            self._tables.pop(place.path, None)
        self._warm_names -= self._warm.pop(place, 0)
        if place.tag:
            if self._is_current(place):
                self._ended.add(place.tag)
            self._tags.get(place.tag, set()).discard(place)
            if not self._tags.get(place.tag):
                for index in (self._tags, self._takings):
                    index.pop(place.tag, None)
                self._ended.discard(place.tag)

    def _skip_link(self, area: Area, relative: str) -> None:
        """Name a link to a directory that Cassandra may use: it is not followed, since no pin is on its disk."""
        path = area.source(relative)
        linked = path not in self._refused and os.path.islink(path) and os.path.isdir(path)
        if linked and self.filters.directory(relative.split("/")):
            self._refused[path] = time.time()
            self.counts["refused"] += 1
            hint = "move it to a data directory of its own; or leave it out: --exclude-keyspace, --exclude-table"
            log.error("symbolic link, nothing behind it is stored path=%s hint=%s", quote(path), hint)

    def _refuse(self, place: Place, error: OSError) -> None:
        """Count what cannot be done, and look again at the next reconciliation: the hint that brought us is used up."""
        place.mtime_ns, place.refused = 0, True
        self.counts["refused"] += 1
        if place.path not in self._refused:
            self._refused[place.path] = time.time()
            hint = "run as the owner of the data, with room on its disk"
            log.error("cannot look path=%s error=%s hint=%s", quote(place.path), error.strerror, hint)


# ======================================================================================================
# Upload
# ======================================================================================================

_DONTCACHE: Final = 0x80  # RWF_DONTCACHE, Linux 6.14: read without leaving the pages in the cache


def _cold_ranges(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges (offset, length) that are not in the page cache. `offset` is a multiple of the page size."""
    if not size or os.fstat(fd).st_size < offset + size:
        return []
    page = mmap.PAGESIZE
    resident = ctypes.create_string_buffer(-(-size // page))
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset) as window:
        first = ctypes.c_char.from_buffer(window)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(size), resident)
        del first  # or the window could not be closed
    if failed:
        return []
    cold = re.finditer(rb"\0+", bytes(byte & 1 for byte in resident.raw))
    return [(offset + run.start() * page, (run.end() - run.start()) * page) for run in cold]


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


@dataclass(slots=True)
class Sending:
    """A file on its way to the store: whole, or begun and then part by part."""

    pinned: Pinned
    key: str = ""
    urgent: bool = False
    look: bool = False  # ask whether it is there before it is sent
    future: Future[Head] = field(default_factory=Future)
    next: int = 0  # the part to be taken next; 0 is the beginning
    upload: str = ""
    held: dict[int, Part] = field(default_factory=dict)  # what an earlier process has sent
    parts: dict[int, Part] = field(default_factory=dict)

    @property
    def part_bytes(self) -> int:
        """Return the size of a part, the same in every process."""
        return max(PART_BYTES, -(-self.pinned.stamp.size // PART_COUNT // MIB) * MIB)

    @property
    def count(self) -> int:
        """Return how many parts there are; 0 for a file that is sent whole."""
        size = self.pinned.stamp.size
        return -(-size // self.part_bytes) if size > PART_BYTES else 0

    def read(self, number: int = 0) -> bytearray:
        """Return part `number`, 0 for the whole. Raises Corrupt if these are not the bytes that were pinned."""
        pinned, offset = self.pinned, max(0, number - 1) * self.part_bytes
        fd = pinned.held if pinned.held >= 0 else os.open(pinned.path, _OPEN_FILE)
        try:
            info = os.fstat(fd)
            body = read_quietly(fd, offset, max(0, min(self.part_bytes, info.st_size - offset)))
            if {Stamp.of(pinned.stamp.area, seen) for seen in (info, os.fstat(fd))} != {pinned.stamp}:
                raise Corrupt(f"{quote(pinned.path)} changed while it was read", "it is read again")
            return body
        finally:
            if fd != pinned.held:
                os.close(fd)

    def crc32(self) -> int:
        """Read it all."""
        return functools.reduce(lambda crc, n: zlib.crc32(self.read(n), crc), range(1, max(1, self.count) + 1), 0)


def _keys(key: str, crc32: int) -> tuple[str, ...]:
    """Return the keys for bytes that should be at `key`, where other content may have been written."""
    return key, f"{key}@{hex32(crc32)}", f"{key}@{hex32(crc32)}.{utc(time.time())}"


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
        lanes = itertools.product((True, False), (True, False))  # (urgent, large)
        self._lanes: dict[tuple[bool, bool], deque[Sending]] = {lane: deque() for lane in lanes}
        self._large_next = self._stopping = False
        self._busy: set[str] = set()  # uploads in parts that this process is at
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

    def end_forgotten(self, prefix: str, before: float) -> None:
        """End the uploads begun before a moment that nobody is at, nor will go on with."""
        for key, upload, begun in self._store.unfinished(prefix):
            if begun < before and upload not in self._busy and upload != self._resume(key):
                self._store.abandon(key, upload)

    def are_alive(self) -> bool:
        """Tell whether all threads live, and none keeps the queue from the others. What waits for the store lives."""
        with self._work:
            return all(thread.is_alive() for thread in self._threads)

    def stop(self, limit_s: float) -> None:
        """Take no more work; wait for the parts that are on their way."""
        with self._work:
            self._stopping = True
            for sending in itertools.chain(*self._lanes.values()):
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
                turns = itertools.product((True, False), (self._large_next, not self._large_next))
                lane = next((self._lanes[turn] for turn in turns if self._lanes[turn]), None)
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
                if head := self._send(sending, number):
                    sending.future.set_result(head)
            except InvalidStateError:
                pass  # another part has failed, or we are stopping
            except Exception as error:
                if not isinstance(error, (Fault, OSError)):
                    log.exception("upload failed path=%s", quote(sending.pinned.path))
                self._busy.discard(sending.upload)
                with contextlib.suppress(InvalidStateError):
                    sending.future.set_exception(error)

    def _send(self, sending: Sending, number: int) -> Head | None:
        """Send what was taken; return the object when nothing is left to send."""
        if not sending.count:
            return self._send_whole(sending)
        if number == 0:
            if head := self._begin(sending):
                return head
            self._queue(sending)
            return None
        part = self._send_part(sending, number)
        with self._work:  # only one thread must see that its part was the last
            sending.parts[number] = part
            last = len(sending.parts) == sending.count
        if last:
            return self._finish(sending)
        if self._store.ordered:
            self._queue(sending)
        return None

    def _count(self, files: int, size: int) -> None:
        with self._work:
            self.sent.update(files=files, bytes=size)

    def _send_whole(self, sending: Sending) -> Head:
        body = sending.read()
        crc32 = zlib.crc32(body)
        for key in _keys(sending.key, crc32):
            with contextlib.suppress(Conflict, Corrupt):  # Corrupt: it was damaged on its way, and stays so
                if sending.look and (head := self._store.same(key, len(body), crc32)):
                    return head
                head = self._store.put(key, body, crc32)
                self._count(1, len(body))
                return head
        raise Conflict(f"{sending.key} is taken, whatever is added to it")

    def _begin(self, sending: Sending) -> Head | None:
        """Begin an upload in parts or find an unfinished one; return the object if it is there already."""
        size = sending.pinned.stamp.size
        if self._store.head(sending.key):  # ask before 300 GB are sent, not after
            crc32 = sending.crc32()
            for sending.key in _keys(sending.key, crc32):  # noqa: B020 - the first that is free, or has these bytes
                with contextlib.suppress(Conflict):
                    if head := self._store.same(sending.key, size, crc32):
                        return head
                    break
        upload = self._resume(sending.key)
        if upload and upload not in self._busy:  # busy: another taking sends other bytes to this key just now
            self._busy.add(upload)
            with contextlib.suppress(Missing):
                sending.held = self._store.parts(sending.key, upload, sending.part_bytes)
                sending.upload = upload
        if not sending.upload:
            sending.upload = self._store.begin(sending.key, size)
            self._busy.add(sending.upload)
            self._begun(sending.key, sending.upload)
        return None

    def _send_part(self, sending: Sending, number: int) -> Part:
        body, where = sending.read(number), (sending.key, sending.upload)
        crc32, offset = zlib.crc32(body), (number - 1) * sending.part_bytes
        if (held := sending.held.get(number)) and (part := self._store.match(*where, held, offset, body, crc32)):
            return part
        part = self._store.put_part(*where, number, offset, body, crc32)
        self._count(0, len(body))
        return part

    def _finish(self, sending: Sending) -> Head:
        parts, crc32 = [sending.parts[number] for number in sorted(sending.parts)], 0
        for part in parts:
            crc32 = crc32_combine(crc32, part.crc32, part.size)
        try:
            head = self._store.finish(sending.key, sending.upload, parts, crc32)
        except (Conflict, Corrupt, Missing):  # it must begin anew; after any other fault this upload can go on
            self._begun(sending.key, "")
            raise
        self._begun(sending.key, "")
        self._busy.discard(sending.upload)
        self._count(1, 0)
        return replace(head, crc32=hex32(crc32))


# ======================================================================================================
# Publish
# ======================================================================================================

Path = tuple[str, str]  # directory, name
Named = dict[str, tuple[str, str, int, int]]  # keys of listings: (listed, state, files, bytes)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said of a unit: is it complete, what does it lack, what does not belong to it."""

    complete: bool
    missing: tuple[str, ...] = ()
    left_out: frozenset[Path] = frozenset()


def manifest_files(body: bytes) -> list[str] | None:
    """Return the Data.db files that a manifest.json names; None while Cassandra is still writing it."""
    try:
        return [str(name) for name in json.loads(body)["files"]]
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
    words = read(files[below[toc]]).decode("utf-8", "replace").split()
    wanted = [f"{sstable}-{word}" for word in words if not OPTIONAL_COMPONENT.fullmatch(word)]
    return [name for name in wanted if name not in below]


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


def judge_sstables(files: Mapping[Path, Stored], read: Callable[[Stored], bytes]) -> dict[tuple[str, ...], list[Path]]:
    """Return the SSTables of a batch that lack components: the names that are missing, and the files that are there."""
    below = {os.path.join(*path).lstrip("/"): path for path in files}
    sstables: dict[str, list[Path]] = {}
    for name, path in below.items():
        if prefix := _prefix_of(name):
            sstables.setdefault(prefix, []).append(path)
    judged = {tuple(_unfulfilled(name, below, files, read)): paths for name, paths in sstables.items()}
    return {missing: paths for missing, paths in judged.items() if missing}


def add_up(listings: Sequence[Listing]) -> Listing | None:
    """Add up listings of one unit: of each file the later entry, complete once any says so."""
    if not listings:
        return None
    files = {(entry.directory, entry.name): entry for listing in listings for entry in listing.files}
    return replace(listings[-1], files=tuple(files.values()), complete=any(listing.complete for listing in listings))


def heads_of(store: Retrying, keys: set[str]) -> dict[str, Head]:
    """Return what is there of these keys, by HEAD or by listing their folders: a page of a list tells a thousand."""
    folders = {key.rpartition("/")[0] + "/" for key in keys}
    if len(keys) > 3 * len(folders):
        return {head.key: head for folder in folders for head in store.list(folder) if head.key in keys}
    return {key: head for key in keys if (head := store.head(key))}


def old_heartbeats(store: Retrying, node: str) -> list[str]:
    """Return which heartbeats may go: not by their names, since some may be of a time when the clock was ahead."""
    beats = sorted(store.list(f"{node}.listings/heartbeat/"), key=lambda head: head.modified)
    return [head.key for head in beats[:-HEARTBEATS_KEPT]]


def load_condemned(node: str, key: str, body: bytes) -> tuple[frozenset[str], bool]:
    """Return the keys in a condemned file, and whether they are deleted already. Raises Corrupt."""
    try:
        page = json.loads(body)
        keys, deleted = frozenset(page["keys"]), page.get("deleted", False)
        if not all(one.startswith(f"{node}/") for one in keys):
            raise ValueError("it names what is not of this node")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{key} cannot be read ({error!r})", "nothing is deleted; look at it, or remove it") from None
    return keys, bool(deleted)


def _newest(named: Named) -> str:
    return max((listed for listed, *_ in named.values()), default="")


class Publisher:
    """Writes listings, after asking the store about everything that they name.

    `fresh(entry)` tells whether this process stored or confirmed an entry within the last day.
    """

    def __init__(self, store: Retrying, node: str, fresh: Callable[[Stored], bool]) -> None:
        self._store, self.node, self._fresh = store, node, fresh
        self._condemned: dict[str, frozenset[str]] = {}  # by the key of prune's file
        self._condemned_at = 0.0  # by the store's clock: a machine's own may stand still while it is suspended
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

    def _named(self, prefix: str, after: str = "") -> Named:
        keys = (head.key for head in self._store.list(prefix, after))
        return {key: parsed for key in keys if (parsed := parse_listing_name(key))}

    def known(self, unit: Unit, manifest: Stamp | None) -> tuple[Unit, Listing | None, str]:
        """Return what the bucket already lists of a unit: (the unit by its listed name, a listing, the newest UTC).

        A snapshot is recognized by the stamp of its manifest.json even when our own memory of it is lost; a batch
        by its opening, under which it is listed.
        """
        prefix = listings_of(self.node, unit)
        if unit.kind != "snapshot":
            named = self._named(prefix, prefix + unit.since[:-1])
            ours = [key for key in named if key.startswith(prefix + unit.since) and named[key][1] != "rollup"]
            return unit, add_up(self.read(ours)), _newest(named)
        above = prefix[: -len(unit.since) - 1]
        takings: dict[str, Named] = {}
        for key, parsed in self._named(above).items():
            takings.setdefault(key[len(above) :].split("/")[0], {})[key] = parsed
        written = utc(manifest.mtime_ns / 1e9) if manifest else "~"  # what was listed before that cannot name it
        for since in sorted(takings, reverse=True):
            newest = _newest(takings[since])
            if since == unit.since or newest >= written:
                listing = add_up(self.read(takings[since]))
                stamps = {entry.stamp for entry in listing.files if entry.name == MANIFEST} if listing else set()
                if since == unit.since or manifest in stamps:
                    return replace(unit, since=since), listing, newest
        return unit, None, ""

    def newest_of_table(self, unit: Unit) -> list[str]:
        """Return the keys of a table's incremental listings, but for replaced ones, and of its newest snapshot."""
        prefix = listings_of(self.node, unit)
        if unit.kind != "archive":
            prefix = "/".join(prefix.split("/")[:3]) + "/"
        named = self._named(prefix)
        snapshots = [key for key in named if key.startswith(prefix + "snapshots/")]
        batches = [key for key in named if key not in set(snapshots)]
        whole = [key for key in snapshots if named[key][1] == "complete"]
        rollups = self.read(key for key in batches if named[key][1] == "rollup")
        replaced = {name for listing in rollups for name in listing.replaces}
        newest = sorted(whole, key=named.__getitem__)[-1:]
        return [key for key in batches if key.rpartition("/")[2] not in replaced] + newest

    def publish(
        self, listing: Listing, again: Callable[[Stored], Stored | None], newest: str, clock: Callable[[], str]
    ) -> Listing:
        """Write a listing, once every key in it is known to be there and to stay.

        `again(entry)` stores an entry's file anew under a key never used before; None if we do not hold it any more:
        then it is not listed, but named as missing.
        """
        tries, written = 0, None
        prefix = listings_of(self.node, listing.unit)
        while True:
            began = self._store.now()
            files = self._checked(listing.files, again)
            if files == written:
                return listing
            if gone := {entry.name for entry in listing.files} - {entry.name for entry in files}:
                log.error("gone from the store and from this node, not listed any more files=%s", quote(" ".join(gone)))
                listing = replace(listing, complete=False, missing=(*listing.missing, *sorted(gone)))
            listing = replace(listing, files=files, listed=later(clock(), newest))
            body = dump_listing(listing)
            try:
                self._store.put_now(prefix + listing_name(listing), body, zlib.crc32(body))
            except (Unreachable, Denied) as fault:
                self._store.pause(fault, tries := tries + 1)
                continue
            except (Conflict, Corrupt) as fault:  # that name is taken for ever, by whatever is there
                log.warning("listing goes to another key error=%s", quote(str(fault)))
                newest = listing.listed
                continue
            if self._store.now() - began <= PUBLISH_LIMIT_S:
                return listing
            newest, written = listing.listed, files

    def _checked(self, entries: tuple[Stored, ...], again: Callable[[Stored], Stored | None]) -> tuple[Stored, ...]:
        condemned = self._read_condemned()
        bad = {entry.key for entry in entries if entry.key in condemned}
        bad |= self.absent([entry for entry in entries if entry.key not in bad and not self._fresh(entry)])
        checked = []
        for entry in entries:
            better = again(entry) if entry.key in bad else entry
            if better:
                checked.append(better)
        return tuple(checked)

    def absent(self, entries: Sequence[Stored]) -> set[str]:
        """Return the keys that are not there as recorded: same size and etag, or else the same content."""
        heads, bad = heads_of(self._store, {entry.key for entry in entries}), set()
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
            if abs((began := self._store.now()) - self._condemned_at) >= CONDEMNED_LOOK_S:
                condemned = {}
                for head in self._store.list(f"{self.node}.condemned/"):
                    with contextlib.suppress(Missing):  # deleted since; we ask for its keys after this
                        keys = self._condemned.get(head.key)
                        body = b"" if keys is not None else b"".join(self._store.get(head.key))
                        condemned[head.key] = load_condemned(self.node, head.key, body)[0] if keys is None else keys
                self._condemned, self._condemned_at = condemned, began
            return frozenset().union(*self._condemned.values())

    def roll_up(self, unit: Unit, before: str, clock: Callable[[], str]) -> Listing | None:
        """Write one listing for a table's older incremental listings, and name those that it replaces.

        The newest roll-up is taken in while it is not much larger than what came since, so that a file is written
        down again a logarithm of times, not each time.
        """
        batches = Unit("incremental", unit.keyspace, unit.table, "", before)
        named = self._named(listings_of(self.node, batches))
        newest = _newest({key: parsed for key, parsed in named.items() if parsed[1] == "rollup"})
        small = [key for key, parsed in named.items() if parsed[1] == "complete" and newest < parsed[0] < before]
        total = sum(named[key][2] for key in small)
        small += [key for key, parsed in named.items() if newest == parsed[0] and parsed[2] <= 2 * total]
        files: dict[tuple[str, str, Stamp], Stored] = {}
        names = []
        for key in sorted(small) if len(small) > 1 else ():
            for listing in self.read([key]):  # none, where it cannot be read: then it is not replaced either
                names.append(key.rpartition("/")[2])
                for entry in listing.files:
                    entry = replace(entry, seen=entry.seen or listing.unit.since)
                    files[entry.directory, entry.name, entry.stamp] = entry
        if len(names) < 2:
            return None
        rollup = Listing(self.node, batches, before, True, tuple(files.values()), replaces=tuple(names))

        def again(entry: Stored) -> Stored | None:
            raise Missing(f"{entry.key} is gone from the store")

        try:
            return self.publish(rollup, again, _newest(named), clock)
        except Missing as fault:
            log.warning("no roll-up, a listed file is gone error=%s hint=run cassbackup verify", quote(str(fault)))
            return None


# ======================================================================================================
# Daemon
# ======================================================================================================

_CARRIERS: Final = {True: 2, False: 8}  # units carried at once: urgent ones have carriers of their own
_WINDOW: Final = 1_000  # files of a unit that are queued for sending at once: a waiting file takes 2 KiB of memory


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

    def take(self) -> list[tuple[Unit, Waiting]]:
        """Return the oldest units that are due, as many as carriers are free; wait two seconds at most for one."""
        taken: list[tuple[Unit, Waiting]] = []
        with self.changed:
            now, wait = time.monotonic(), 2.0
            for urgent, carriers in _CARRIERS.items():
                lane = [item for item in self.units.items() if item[0].urgent == urgent]
                idle = [item for item in lane if not item[1].carried]
                due = [item for item in idle if item[1].due <= now]
                free = carriers - (len(lane) - len(idle))
                taken += heapq.nsmallest(free, due, key=lambda item: (item[1].found, item[0].since))
                if free and not due:
                    wait = min(wait, min((waiting.due - now for _, waiting in idle), default=wait))
            for _, waiting in taken:
                waiting.carried, waiting.again = True, False
            if not taken:
                self.changed.wait(wait)
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

    def waiting(self) -> list[Waiting]:
        """Return what waits, to be counted."""
        with self.changed:
            return list(self.units.values())

    def oldest(self, urgent: bool = False) -> dict[str, float]:
        """Return when the oldest waiting file was found, by keyspace/table-id; of archives by "/".

        With `urgent`, that of incrementals: what a snapshot has more of is stored in other ways.
        """
        oldest: dict[str, float] = {}
        with self.changed:
            for unit, waiting in self.units.items():
                table = f"{unit.keyspace}/{unit.table}"
                if unit.urgent or not urgent:
                    oldest[table] = min(waiting.found, oldest.get(table, waiting.found))
        return oldest


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator chose about carrying."""

    settle_s: float = 60.0
    full: bool = False
    delete_incrementals: bool = False


def _show(unit: Unit) -> str:
    """Return a unit for the log."""
    return quote("/".join(word for word in (unit.keyspace, unit.table, unit.kind, unit.tag, unit.since) if word))


@dataclass(slots=True)
class Load:
    """A unit being carried: what we hold of it, and how far that has got."""

    unit: Unit
    touched: float
    pins: dict[Path, Pinned]
    lost: set[Path]
    stored: dict[Path, Stored] = field(default_factory=dict)
    unread: dict[Path, OSError] = field(default_factory=dict)  # the disk says no
    grown: dict[Path, Pinned] = field(default_factory=dict)  # taken out of pins: see Carrier._take_grown
    begun: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return _show(self.unit)


def _source(area: Area, relative: str) -> str:
    return os.path.normpath(os.path.join(area.root, relative))


def _by_directory(items: Mapping[Path, T]) -> dict[str, dict[str, T]]:
    folders: dict[str, dict[str, T]] = {}
    for (directory, name), item in items.items():
        folders.setdefault(directory, {})[name] = item
    return folders


def _by_path(entries: Iterable[Stored]) -> dict[Path, Stored]:
    return {(entry.directory, entry.name): entry for entry in entries}


@functools.lru_cache(1000)
def _user(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


@functools.lru_cache(1000)
def _group(gid: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


def _entry(pin: Pinned, head: Head) -> Stored:
    owner = (pin.mode, _user(pin.uid), _group(pin.gid))
    return Stored(pin.directory, pin.name, pin.stamp, *owner, head.crc32, head.key, head.etag, head.crc32c)


@dataclass
class Carrier:
    """Carries one unit from its pins to its listing, and lets the pins go."""

    pinner: Pinner
    store: Retrying
    uploaders: Uploaders
    node: str
    ledger: Ledger
    clock: Clock
    policy: Policy
    counts: Counter[str] = field(default_factory=Counter)
    recovered: set[Unit] = field(default_factory=set)  # left by an earlier process: looked up before they are sent
    _learned: set[str] = field(default_factory=set)
    _sure: dict[Unit, Stamp] = field(default_factory=dict)  # looked at after this manifest.json: nothing had vanished
    _first_seen: dict[tuple[str, ...], float] = field(default_factory=dict)  # SSTables that lack components
    _sending: dict[tuple[str, str, Stamp], Future[Head]] = field(default_factory=dict)  # what is on its way is shared
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.publisher = Publisher(self.store, self.node, self._is_fresh)
        self._run = f"{random.getrandbits(64):x}"

    def carry(self, unit: Unit, waiting: Waiting) -> float | None:
        """Store and list a unit; None when it is done, else the seconds after which to carry it again."""
        if unit in self.recovered:
            return self._look_up(unit)
        if any((other.keyspace, other.table) == (unit.keyspace, unit.table) for other in self.recovered):
            return QUIET_S  # the same bytes may be there under the path of that unit
        with self.pinner.lock:
            self.pinner.close_batch(unit)
        load = Load(unit, waiting.touched, *self._read_pins(unit))
        waiting.files, waiting.size = len(load.pins), sum(pin.stamp.size for pin in load.pins.values())
        if unit.kind == "snapshot" and any(name == EPHEMERAL for _, name in load.pins):
            return self._skip_ephemeral(load)
        self._learn(unit)
        if unit.kind == "incremental":
            self._take_grown(load)
        self._store_all(load)
        delay = self._carry_snapshot(load) if unit.kind == "snapshot" else self._carry_batch(load)
        if load.unread and delay is not None:
            (directory, name), error = next(iter(load.unread.items()))
            what = f"{len(load.unread)} files cannot be read, {quote(f'{directory}/{name}')}: {error.strerror}"
            raise Fault(what, "the disk may be failing: what could be read is stored")
        return delay

    def _look_up(self, unit: Unit) -> float:
        """Ask which pins of an earlier process had been sent, before anything of their table is."""
        unknown = {self._key(pin): pin for pin in self._read_pins(unit)[0].values() if not self._known(pin)}
        folders = {key.rpartition("/")[0] + "/" for key in unknown}
        there = [head.key for folder in folders for head in self.store.list(folder) if head.key in unknown]
        futures = [(unknown[key], self.uploaders.send(unknown[key], key, True, True)) for key in there]
        for pin, future in futures:
            with contextlib.suppress(Corrupt, OSError):  # the carrying will tell
                self._record([_entry(pin, future.result())], self._run)
        self.recovered.discard(unit)
        return QUIET_S

    def everything_again(self) -> None:
        """Trust nothing that we remember of the bucket: it is not what it was."""
        self.ledger.forget()
        self._learned.clear()
        self._run = f"{random.getrandbits(64):x}"
        self.pinner.forget()

    # A table's snapshot

    def _carry_snapshot(self, load: Load) -> float | None:
        unit, settles = load.unit, load.touched + self.policy.settle_s
        if len(load.stored) + len(load.unread) < len(load.pins) and settles > load.begun:
            return QUIET_S  # what was too young to be sent when this began, however long the rest has taken
        settled_in = settles - time.monotonic()
        stamp = next((entry.stamp for entry in load.stored.values() if entry.name == MANIFEST), None)
        listed_as, before, newest = self.publisher.known(unit, stamp)
        files = _by_path(before.files if before else ()) | load.stored
        read = self._reader(load.pins)
        manifest = next((read(entry) for entry in files.values() if entry.name == MANIFEST), b"")
        final = manifest_files(manifest) is not None
        if final and json.loads(manifest).get("ephemeral") is True:
            return self._skip_ephemeral(load)
        if final and stamp and self._sure.get(unit) != stamp and self.pinner.confirm(unit):
            self._sure[unit] = stamp
        if self._read_pins(unit)[0].keys() != load.pins.keys():
            return QUIET_S  # more came while this was sent, perhaps to a store that was down
        sure = stamp is not None and self._sure.get(unit) == stamp
        verdict = judge_snapshot(files, manifest, sure, read)
        whole = before is not None and before.complete
        lost = load.lost - files.keys()
        lacking = {name for _, name in load.pins.keys() - files.keys()}
        complete = whole or (verdict.complete and not lost and not lacking)
        if complete and not unit.keyspace.startswith("system") and not any(name == SCHEMA for _, name in files):
            settled_in -= max(0.0, self.policy.settle_s - 2.0)  # schema.cql comes a moment later, or never
        elif complete:
            settled_in = 0.0
        if settled_in > 0:
            return settled_in
        kept = tuple(entry for path, entry in files.items() if path not in verdict.left_out)
        if verdict.left_out:
            log.info("not named by the manifest, left out unit=%s files=%d", load, len(verdict.left_out))
        missing = () if complete else tuple(sorted({*verdict.missing, *lacking}))
        names = tuple(sorted(name for _, name in lost))
        listing = Listing(self.node, listed_as, "", complete, kept, missing, names)
        told = before and before.complete >= complete and set(names) <= set(before.lost)
        if not (told and before and set(before.files) == set(kept)):
            self._publish(load, listing, newest)
        done = self._let_go(load, files)
        if done is None and complete:
            self.ledger.remember(f"complete:{unit.keyspace}/{unit.table}", f"{unit.tag}\t{unit.since}")
            if rollup := self.publisher.roll_up(unit, self.clock(), self.clock):
                log.info("rolled up unit=%s listings=%d files=%d", load, len(rollup.replaces), len(rollup.files))
        return done

    def _skip_ephemeral(self, load: Load) -> float | None:
        """Let go of a snapshot that a repair took for itself (ephemeral.snapshot, or "ephemeral": true)."""
        self.counts["skipped_ephemeral"] += 1
        log.info("repair's own snapshot, skipped unit=%s", load)
        return self._let_go(load, load.pins)

    # A batch of incrementals or of an archive

    def _carry_batch(self, load: Load) -> float | None:
        unit, pins, stored = load.unit, load.pins, load.stored
        _, before, newest = self.publisher.known(unit, None)
        listed = _by_path(before.files if before else ())
        if unit.kind == "incremental" and f"{unit.keyspace}/{unit.table}" in self._learned:
            listed |= self._learned_entries(stored)
        incomplete = judge_sstables(listed | stored, self._reader(pins))
        settled = [names for names in incomplete if self._has_settled(names)]
        late = {path for names, paths in incomplete.items() if names not in settled for path in paths} & pins.keys()
        late |= pins.keys() - stored.keys() - load.unread.keys()
        for directory, names in _by_directory(dict.fromkeys(late)).items():
            area, relative = next(item for item in self._directories(unit) if _source(*item) == directory)
            self.pinner.postpone(area, relative, unit.since, names, 2.0)
        files = {path: entry for path, entry in stored.items() if path not in late}
        lost = tuple(sorted(name for _, name in load.lost - listed.keys()))
        if lost or any(listed.get(path) != entry for path, entry in files.items()):
            missing = tuple(os.path.basename(name) for names in settled for name in names)
            entries = tuple((listed | files if before else files).values())
            complete = not missing and not lost
            self._publish(load, Listing(self.node, unit, "", complete, entries, missing, lost), newest)
        done = self._let_go(load, {**files, **load.grown})
        if done is None and self.policy.delete_incrementals and unit.kind == "incremental":
            self._delete_sources(files.keys() - set(itertools.chain(*incomplete.values())), files)
        return done

    def _take_grown(self, load: Load) -> None:
        """Take out each TOC.txt to which a new index was added, in place, after its SSTable had been listed.

        The index's files are not in backups/: what is listed is what is true of it (TOCComponent.appendTOC).
        """
        alone = [(folder, name) for folder, name in load.pins if name.endswith("-TOC.txt")]
        for folder, name in alone:
            data = name.removesuffix("TOC.txt") + "Data.db"
            if (folder, data) in load.pins:
                continue
            listed = [names for _, names in sorted(self.ledger.listed(folder).items()) if {name, data} <= names.keys()]
            pin = load.pins[folder, name]
            with contextlib.suppress(FileNotFoundError):
                there = Stamp.of(pin.stamp.area, os.lstat(os.path.join(folder, data)))
                if listed and str(there) == listed[-1][data] and Stamp.parse(listed[-1][name]).ino == pin.stamp.ino:
                    load.grown[folder, name] = load.pins.pop((folder, name))
                    log.info("grew after it was listed, which stands path=%s", quote(f"{folder}/{name}"))

    def _has_settled(self, missing: tuple[str, ...]) -> bool:
        """Tell whether an SSTable has lacked these components for the settle time."""
        now, limit = time.monotonic(), self.policy.settle_s
        first = self._first_seen.setdefault(missing, now)
        for one, seen in list(self._first_seen.items()):
            if now - seen > 10 * limit:  # listed long ago, or complete
                self._first_seen.pop(one, None)
        if now - first < limit:
            return False
        log.warning("will not become complete, listed as it is missing=%s", quote(" ".join(missing)))
        return True

    def _learned_entries(self, stored: Mapping[Path, Stored]) -> dict[Path, Stored]:
        """Return the entries that the table's listings, as just read, have with the same stamp."""
        names = {folder: self.ledger.listed(folder).values() for folder in _by_directory(stored)}
        return {
            path: entry
            for path, entry in stored.items()
            if any(listed.get(path[1]) == str(entry.stamp) for listed in names[path[0]])
        }

    def _delete_sources(self, paths: Iterable[Path], files: Mapping[Path, Stored]) -> None:
        """Delete from backups/ what is listed whole, after asking the store once more."""
        entries = {path: files[path] for path in paths}
        absent = self.publisher.absent(list(entries.values()))
        for path, entry in entries.items():
            source = os.path.join(*path)
            with contextlib.suppress(FileNotFoundError):
                if entry.key not in absent and Stamp.of(entry.stamp.area, os.lstat(source)) == entry.stamp:
                    os.unlink(source)
                    self.counts["deleted"] += 1

    # What both have in common: pins

    def _directories(self, unit: Unit) -> list[tuple[Area, str]]:
        """Return the pin directories of a unit: (area, source directory)."""
        with self.pinner.lock:
            found = [(area, relative) for area in self.pinner.areas for relative in area.by_since.get(unit.since, ())]
        return [(area, relative) for area, relative in found if unit_of(area.root, relative, unit.since) == unit]

    def _read_pins(self, unit: Unit) -> tuple[dict[Path, Pinned], set[Path]]:
        pins: dict[Path, Pinned] = {}
        lost: set[Path] = set()
        for area, relative in self._directories(unit):
            held, gone = area.read(relative, unit.since)
            pins.update({(pin.directory, pin.name): pin for pin in held})
            lost.update((_source(area, relative), name) for name in gone)
        return pins, lost - pins.keys()

    def _reader(self, pins: Mapping[Path, Pinned]) -> Callable[[Stored], bytes]:
        """Return a function that reads a small stored file, from its pin where there is one."""

        def read(entry: Stored) -> bytes:
            pin = pins.get((entry.directory, entry.name))
            if pin and pin.stamp == entry.stamp:
                return bytes(Sending(pin).read())
            return b"".join(self.store.get(entry.key))

        return read

    def _let_go(self, load: Load, files: Mapping[Path, Stored | Pinned]) -> float | None:
        """Remember what is listed, then release the pins; a delay if something came meanwhile, or was not stored."""
        unit, done = load.unit, True
        stamps: dict[Path, Stamp] = {path: file.stamp for path, file in files.items()}
        for directory, names in _by_directory(stamps).items():
            self.ledger.list(directory, unit.since, names)
        listed: dict[Path, Stamp | None] = {**dict.fromkeys(load.lost), **stamps}
        folders = _by_directory(listed)
        for area, relative in self._directories(unit):
            with self.pinner.lock:
                if area.release(relative, unit.since, folders.get(_source(area, relative), {})):
                    self.pinner.released(area, relative)
                else:
                    done = False
        if not done:
            return 2.0
        self._sure.pop(unit, None)
        return None

    # What both have in common: storing and listing

    def place(self, directory: str) -> str:
        """Return what a stamp is remembered for: the table's directory, whatever disk it is on."""
        for area in self.pinner.areas:
            if directory.startswith(area.root.rstrip("/") + "/"):
                return quote("/".join(directory[len(area.root) :].strip("/").split("/")[:2]))
        return quote(directory)

    def _known(self, file: Pinned | Stored) -> tuple[str, ...] | None:
        return self.ledger.knows(self.place(file.directory), file.name, file.stamp)

    def _is_fresh(self, entry: Stored) -> bool:
        known = self._known(entry)
        if not known or (known[0], known[4]) != (entry.key, self._run):
            return False
        return abs(time.time() - float(known[5])) < FRESH_S

    def _remembered(self, pin: Pinned) -> Stored | None:
        """Return the entry of bytes that are stored already, perhaps under the name of another snapshot."""
        known = self._known(pin)
        if not known or (self.policy.full and known[4] != self._run):
            return None
        key, etag, crc32, crc32c = known[:4]
        self.counts["reused"] += 1
        return _entry(pin, Head(key, pin.stamp.size, etag, 0.0, crc32, crc32c))

    def _record(self, entries: Iterable[Stored], run: str) -> None:
        self.ledger.record(((self.place(entry.directory), entry) for entry in entries), run)

    def _store_all(self, load: Load) -> None:
        """Store the pins that nobody writes to any more, if their stamps are not known to be stored."""
        now, unsent = time.time(), []
        for path, pin in load.pins.items():
            # longer where a file may be a copy that is still being made
            quiet_s = QUIET_S if load.unit.kind != "archive" or pin.links > 2 else 2.0
            if abs(now - pin.stamp.mtime_ns / 1e9) >= quiet_s:
                if entry := self._remembered(pin):
                    load.stored[path] = entry
                else:
                    unsent.append(path)
        for start in range(0, len(unsent), _WINDOW):
            self._send_window(load, unsent[start : start + _WINDOW])
        self._check_digests(load, set(unsent))

    def _send_window(self, load: Load, paths: Sequence[Path]) -> None:
        sent, run = {}, self._run
        futures = {path: self._send(load, load.pins[path]) for path in paths}
        for path, future in futures.items():
            try:
                sent[path] = _entry(load.pins[path], future.result())
            except (Corrupt, FileNotFoundError) as error:  # in place and changing, or read where it was and gone
                log.info("not stored yet path=%s error=%s", quote("/".join(path)), quote(str(error)))
            except OSError as error:
                load.unread[path] = error
        self._record(sent.values(), run)
        load.stored |= sent
        with self._lock:
            for path in paths:
                self._sending.pop(self._bytes_of(load.pins[path]), None)

    def _key(self, pin: Pinned) -> str:
        return object_key(self.node, os.path.join(pin.directory, pin.name))

    def _bytes_of(self, pin: Pinned) -> tuple[str, str, Stamp]:
        return self.place(pin.directory), pin.name, pin.stamp

    def _send(self, load: Load, pin: Pinned) -> Future[Head]:
        """Send a pin, or wait with another unit that is sending the very bytes: a snapshot follows on a flush."""
        bytes_of = self._bytes_of(pin)
        with self._lock:
            future = self._sending.get(bytes_of)
            if future and not (future.done() and (future.cancelled() or future.exception())):
                return future
            if entry := self._remembered(pin):  # since we asked last
                future = Future()
                future.set_result(Head(entry.key, pin.stamp.size, entry.etag, 0.0, entry.crc32, entry.crc32c))
                return future
            first = load.unit.urgent or pin.name in (MANIFEST, SCHEMA)
            future = self._sending[bytes_of] = self.uploaders.send(pin, self._key(pin), first, False)
            return future

    def _check_digests(self, load: Load, sent: set[Path]) -> None:
        """Hold each Data.db against Cassandra's own Digest.crc32, when either of them was sent.

        It is read again before anybody is alarmed; scrub can leave a stale digest (SSTableRewriter), so it is stored
        all the same.
        """
        for directory, name in [path for path in load.stored if path[1].endswith("-Data.db")]:
            path, beside = (directory, name), (directory, name.removesuffix("Data.db") + "Digest.crc32")
            if beside not in load.stored or sent.isdisjoint({path, beside}):
                continue
            text = bytes(Sending(load.pins[beside]).read()).strip()
            if not text.isdigit() or int(text) == int(load.stored[path].crc32, 16):
                continue
            if Sending(load.pins[path]).crc32() == int(text):
                load.stored[path] = self._store_again(load.pins[path])
                continue
            self.counts["digest_mismatch"] += 1
            hint = "the disk may be failing: run nodetool verify; a scrubbed SSTable may have a stale digest"
            log.error("Data.db is not what its Digest.crc32 says path=%s hint=%s", quote(f"{directory}/{name}"), hint)

    def _store_again(self, pin: Pinned) -> Stored:
        """Read and store a file anew, under a key never used before."""
        run, key = self._run, f"{self._key(pin)}@{self.clock()}"
        entry = _entry(pin, self.uploaders.send(pin, key, True, False).result())
        self._record([entry], run)
        return entry

    def _publish(self, load: Load, listing: Listing, newest: str) -> None:
        """Write a listing and remember it."""
        if not listing.files and not listing.lost:
            return

        def again(entry: Stored) -> Stored | None:
            pin = load.pins.get((entry.directory, entry.name))
            return self._store_again(pin) if pin and pin.stamp == entry.stamp else None

        unit, run = load.unit, self._run
        own_time = unit.kind == "snapshot" or newest >= unit.since  # else a batch is listed as of its opening
        listing = self.publisher.publish(listing, again, newest, self.clock if own_time else lambda: unit.since)
        self._record(listing.files, run)
        self.ledger.remember("newest", listings_of(self.node, listing.unit) + listing_name(listing))
        counted = {"listings": 1, "listed_files": len(listing.files), "lost": len(listing.lost)}
        self.counts.update(counted | {"incomplete": int(not listing.complete)})
        for directory, name in sorted(load.lost) if listing.lost else ():
            log.error("LOST before it was stored path=%s", quote(f"{directory}/{name}"))
        state = (listing.state, len(listing.files), listing.size, len(listing.missing), len(listing.lost))
        say = log.info if listing.complete and not listing.lost else log.warning
        say("listed unit=%s state=%s files=%d bytes=%d missing=%d lost=%d", load, *state)

    def _learn(self, unit: Unit) -> None:
        """Read a table's newest listings, once in the life of a ledger: what is stored and listed already."""
        place = f"{unit.keyspace}/{unit.table}" if unit.kind != "archive" else unit.tag
        if self.ledger.fact(f"learned:{quote(place)}"):
            return
        for listing in self.publisher.read(self.publisher.newest_of_table(unit)):
            self._record(listing.files, "")  # said by a listing, not by the store: it is asked before we list it
            stamps = {path: entry.stamp for path, entry in _by_path(listing.files).items()}
            for directory, names in _by_directory(stamps).items():
                self.ledger.list(directory, listing.unit.since, names)
            if listing.unit.kind == "snapshot" and listing.complete:
                self.ledger.remember(f"complete:{place}", f"{listing.unit.tag}\t{listing.unit.since}")
        self._learned.add(place)
        self.ledger.remember(f"learned:{quote(place)}", "1")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a disk our pins may hold alone, as parts of the whole (0.1 is 10 %)."""

    max_pinned: float = 0.1
    free_floor: float = 0.1


def _alone(area: Area, oldest: Iterable[str]) -> Iterator[tuple[str, os.DirEntry[str], int]]:
    """Yield (path of the file, pin, bytes) where nothing but our pin holds the bytes (st_nlink is 1)."""
    for since in oldest:
        for relative in sorted(area.by_since.get(since, ())):
            for name, how, entry in area.marks(relative, since):
                with contextlib.suppress(FileNotFoundError):
                    info = os.lstat(entry.path)
                    if not how and info.st_nlink == 1:
                        yield os.path.join(area.root, relative, name), entry, info.st_blocks * 512


def enforce(
    area: Area, limits: Limits, oldest: Sequence[str], lock: contextlib.AbstractContextManager[Any]
) -> tuple[int, list[str]]:
    """Bound what the pins keep on the disk that nothing else does.

    Beyond --max-pinned, or below the free-space floor, the oldest such pins are given up, and nothing is linked any
    more until there is room. Returns the bytes still held alone, and the paths that are lost.
    """
    disk = os.statvfs(area.path)
    room = (disk.f_bavail - limits.free_floor * disk.f_blocks) * disk.f_frsize
    allowed = limits.max_pinned * disk.f_blocks * disk.f_frsize
    held, lost = sum(size for _, _, size in _alone(area, oldest)), []
    for source, pin, size in _alone(area, oldest) if held > allowed or room < 0 else ():  # twice: they may be millions
        if held <= allowed and room >= 0:
            break
        with lock, contextlib.suppress(FileNotFoundError):
            inode = os.lstat(pin.path).st_ino
            with contextlib.suppress(OSError):  # the mark first, or a crash would make the loss silent
                os.close(os.open(pin.path + f"{_LOST}{inode:x}", os.O_CREAT | os.O_CLOEXEC, 0o644))
            os.unlink(pin.path)
            lost.append(source)
            held, room = held - size, room + size
    area.full = room < 0 or held > 0.9 * allowed
    return held, lost


@dataclass(frozen=True, slots=True)
class Timing:
    """How often the daemon does what no event asks for, in seconds."""

    reconcile_s: float = RECONCILE_S
    heartbeat_s: float = HEARTBEAT_S
    look_s: float = 3600.0
    status_s: float = 10.0
    trim_s: float = 86400.0


class Systemd:
    """What sd_notify(3) does: tell the service manager how it goes, where there is one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.listens = bool(address)
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(environ.get("WATCHDOG_USEC", 0)) / 1e6 if ours else 0.0

    def tell(self, *lines: str) -> None:
        """Send it, if it can be sent at once."""
        if self.listens:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)


@dataclass
class Daemon:
    """The one loop: units that are due go to carriers; time brings status, heartbeats, limits and a look at the bucket.

    All threads but the main one are daemons: whoever hangs in a request is left behind at the end, and a kill at
    any line loses nothing.
    """

    state_dir: str
    pinner: Pinner
    backlog: Backlog
    carrier: Carrier
    uploaders: Uploaders
    store: Retrying
    ledger: Ledger
    clock: Clock
    limits: Limits
    timing: Timing
    stop: threading.Event
    systemd: Systemd = field(default_factory=lambda: Systemd({}))
    metrics: Callable[[], float] | None = None  # a chore
    _failures: dict[Unit, str] = field(default_factory=dict)
    _began: float = field(default_factory=time.time)
    _claim: Callable[[], None] | None = None
    _fatal: int = 0
    _held_alone: int = 0
    _asked: int = 0
    _status_due: float = 0.0
    _trims: bool = True  # may we delete old heartbeats?
    _sent: deque[tuple[float, int]] = field(default_factory=lambda: deque([(time.monotonic(), 0)], maxlen=7))
    _told_due: float = 0.0
    _status_lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, once: bool, claim: Callable[[], None] | None, progress: Callable[[Mapping[str, Any]], None]) -> int:
        """Watch until asked to stop, or, once, until everything is listed. Returns the exit code.

        Nothing is stored before `claim` has succeeded, if there is one: the node's name might be somebody else's.
        """
        self._claim = claim
        self._recover()
        chores = (self._pin, self._enforce, self._tend, self._be_owner, self._look_at_bucket, self._beat, self._trim)
        for chore in (*chores, self.metrics) if self.metrics else chores:
            threading.Thread(target=self._repeat, args=(chore,), daemon=True).start()
        self.systemd.tell("READY=1")
        done = False
        while not done and not self.stop.is_set():
            self._tell_systemd()
            if self._claim:
                self.stop.wait(0.2)
            else:
                self.pinner.gate.wait(PAUSE_S)  # pinning comes first
                for unit, waiting in self.backlog.take():
                    threading.Thread(target=self._carry, args=(unit, waiting), daemon=True).start()
            if once:
                progress(self.status())
                done = self._is_done()
        self._finish()
        if self._fatal or (once and self._failures):
            return self._fatal or FAILED
        short = self.carrier.counts["incomplete"] + self.carrier.counts["lost"] + self.pinner.counts["refused"]
        return BEHIND if once and (short or not done) else DONE

    def _recover(self) -> None:
        """Queue what an earlier process left in the pin areas."""
        for area in self.pinner.areas:
            for since, relatives in area.by_since.items():
                for unit in {unit_of(area.root, relative, since) for relative in relatives}:
                    self.carrier.recovered.add(unit)
                    self.backlog.touch(unit, 0, QUIET_S)
                    self.backlog.units[unit].found = seconds_of(since)

    def _carry(self, unit: Unit, waiting: Waiting) -> None:
        delay: float | None = 30.0
        try:
            delay = self.carrier.carry(unit, waiting)
            self._failures.pop(unit, None)
        except (Stopped, CancelledError):
            pass
        except Exception as error:
            if not isinstance(error, (Fault, OSError)):
                log.exception("carrying failed unit=%s", _show(unit))
            log.error("not listed, will try again unit=%s error=%s", _show(unit), quote(str(error)))
            self._failures[unit] = str(error)
        finally:
            self.backlog.put_back(unit, delay)

    def _tell_systemd(self) -> None:
        """Tell the lag, and that we live: only while the pinner gets on and the uploaders can."""
        now, limit = time.monotonic(), self.systemd.watchdog_s
        if now < self._told_due or not self.systemd.listens:
            return
        self._told_due = now + min(10.0, limit / 2 or 10.0)
        page = self.status()
        lag = f"STATUS=lag {page['lag_s']:.0f} s, {page['pending']['files']} files pending"
        lines = [f"{lag}; {quote(page['trouble'])}" if page["trouble"] else lag]
        if limit and now - self.pinner.beat < limit and self.uploaders.are_alive():  # a beat may come after `now`
            lines.append("WATCHDOG=1")
        self.systemd.tell(*lines)

    def _is_done(self) -> bool:
        """Tell whether all is listed, but for what has been tried in vain."""
        if not (self.pinner.looked and self.pinner.gate.is_set()):  # asked first: what was found waits by then
            return False
        with self.backlog.changed:
            units = self.backlog.units.items()
            return all(unit in self._failures and not waiting.carried for unit, waiting in units)

    def _finish(self) -> None:
        """Take no more work, finish or abandon what is on its way; what is not listed stays pinned."""
        self.systemd.tell("STOPPING=1")
        self.stop.set()
        deadline = time.monotonic() + STOP_S - 10.0
        self.uploaders.stop(STOP_S - 15.0)
        with self.backlog.changed:
            units, left = self.backlog.units.values(), max(0.0, deadline - time.monotonic())
            self.backlog.changed.wait_for(lambda: not any(waiting.carried for waiting in units), left)
        with contextlib.suppress(OSError):
            for area in self.pinner.areas:
                area.sweep()
            self._write_status()
        if self.metrics:
            self.metrics()

    # Chores

    def _repeat(self, chore: Callable[[], float]) -> None:
        """Do a chore for ever; it returns the seconds until the next time."""
        pause = 0.0
        while not self.stop.wait(pause):
            try:
                pause = chore()
            except Stopped:
                return
            except Exception as error:  # also what nobody thought of: without its chores a daemon does harm
                unknown, name = not isinstance(error, (Fault, OSError, ValueError)), chore.__name__.strip("_")
                ends = isinstance(error, Usage) or chore == self._pin  # who sees nothing protects nothing
                then = "" if ends else ", will try again"
                log.error("%s failed%s error=%s", name, then, quote(str(error)), exc_info=unknown)
                if ends:
                    self._give_up(error)
                pause = 1.0

    def _give_up(self, error: Exception) -> None:
        log.critical("leaving error=%s", quote(str(error)))
        self._fatal = error.code if self._claim and isinstance(error, Fault) else FAILED
        self.stop.set()

    def _pin(self) -> float:
        self.pinner.run(self.stop, self.timing.reconcile_s)
        return 0.0

    def _enforce(self) -> float:
        began, oldest, total = time.monotonic(), sorted({unit.since for unit in list(self.backlog.units)}), 0
        hint = "the store was unreachable too long for --max-pinned and --free-floor; raise them or mend the store"
        for area in self.pinner.areas:
            held, lost = enforce(area, self.limits, oldest, self.pinner.lock)
            total += held
            for path in lost:
                with self.pinner.lock:
                    self.pinner.released(area, os.path.relpath(os.path.dirname(path), area.root))
                log.error("given up to keep the disk free, LOST path=%s hint=%s", quote(path), hint)
        self._held_alone = total
        return max(10.0, 20 * (time.monotonic() - began))  # a million pins take seconds: a twentieth of a core

    def _tend(self) -> float:
        """Unlink what was released, and write the status, at once where `cassbackup status` asks for it."""
        if self.pinner.gate.is_set():
            for area in self.pinner.areas:
                area.sweep()
        before, look = self._asked, 0
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(os.path.join(self.state_dir, "ask"))
            self._asked, look = info.st_mtime_ns, info.st_size
        if self._asked != before and look:
            self.pinner.look_again(1.0)
        if self._asked != before or time.monotonic() >= self._status_due:
            self._status_due = time.monotonic() + self.timing.status_s
            self._write_status()
        return 1.0

    def _be_owner(self) -> float:
        if self._claim:
            self._claim()
            self._claim = None
        return 3600.0

    def _look_at_bucket(self) -> float:
        """Look whether the bucket is what it was, and end uploads that nobody goes on with."""
        if self._claim:
            return 1.0
        newest = self.ledger.fact("newest")
        if newest and not self.store.head(newest):
            log.warning("the newest listing is gone, checking everything again key=%s", newest)
            self.carrier.everything_again()
        self.uploaders.end_forgotten(f"{self.carrier.node}/", self.store.now() - 86400)
        return self.timing.look_s

    def _trim(self) -> float:
        """Let the ledger forget what no file has any more, while nothing else is to be done."""
        due = float(self.ledger.fact("trimmed") or 0) + self.timing.trim_s - time.time()
        if 0 < due <= self.timing.trim_s or not self.pinner.gate.is_set():
            return min(max(5.0, due), 3600.0)
        if not all(os.path.isdir(area.path) for area in self.pinner.areas):
            return 3600.0  # a disk that is not mounted is not empty
        self.ledger.trim_listed(names_in)
        self.ledger.trim_stored(functools.partial(live_stamps, self.pinner.areas), time.time() - KNOWN_S)
        self._forget_dropped()
        self.ledger.remember("trimmed", f"{time.time():.0f}")
        return 3600.0

    def _forget_dropped(self) -> None:
        """Let the ledger forget the tables that are on no disk any more: some are dropped and made again each day."""
        for prefix in ("complete:", "learned:"):
            for place in list(self.ledger.facts(prefix)):
                paths = [area.source(path) for area in self.pinner.areas for path in {place, unquote(place)}]
                if all(names_in(path) == [] for path in paths):
                    self.ledger.remember(prefix + place, "")

    def _beat(self) -> float:
        """Write a heartbeat: all that was found by this moment is listed. A quiet table and a dead daemon differ."""
        looked, found = self.pinner.looked, [waiting.found for waiting in self.backlog.waiting()]
        if self._claim or not looked:
            return 1.0
        oldest = self.backlog.oldest(urgent=True)
        for path, since in self.pinner.refused().items():  # what is in it nobody knows
            table = unquote(self.carrier.place(path))
            oldest[table] = min(since, oldest.get(table, since))
            found.append(since)
        prefix, through = f"{self.carrier.node}.listings/heartbeat/", rfc3339(utc(min([looked, *found])))
        page = {"version": 1, "listed_through": through, "pending_units": len(found), "cassbackup": __version__}
        page |= {"looked": rfc3339(utc(looked)), "oldest_incrementals": oldest}
        body = json.dumps(page).encode()
        self.store.put(f"{prefix}{self.clock()}.json", body, zlib.crc32(body))
        if self._trims:  # a daemon need not have the right to delete: then prune does it
            old = old_heartbeats(self.store, self.carrier.node)[:1000]
            self._trims = not (old and self.store.delete(old))
        return self.timing.heartbeat_s

    def status(self) -> dict[str, Any]:
        """Return what `cassbackup status` shows."""
        looked, quiet = self.pinner.looked, self.pinner.gate.is_set()  # first: what they speak of waits by then
        waiting, now, sent = self.backlog.waiting(), time.time(), self.uploaders.sent
        since, before = self._sent[0]
        counts = {**self.pinner.counts, **self.carrier.counts}
        files, size = sum(one.files for one in waiting), sum(one.size for one in waiting)
        return {
            "schema": 1,
            "version": __version__,
            "pid": os.getpid(),
            "node": self.carrier.node,
            "store": self.store.url,
            "filters": str(self.pinner.filters),
            "started": self._began,
            "written": now,
            "looked": looked,
            "quiet": quiet,
            "lag_s": max(0.0, now - min((one.found for one in waiting), default=now)),
            "pending": {"units": len(waiting), "files": files, "bytes": size},
            "held_alone_bytes": self._held_alone,
            "full": any(area.full for area in self.pinner.areas),
            "refused": list(self.pinner.refused()),
            "sent": {"files": sent["files"], "bytes": sent["bytes"]},
            "rate": (sent["bytes"] - before) / max(1.0, time.monotonic() - since),  # bytes a second, over a minute
            "counts": {name: count for name, count in sorted(counts.items()) if count},
            "trouble": next(filter(None, [self.store.trouble, *self._failures.values(), self.ledger.broken]), ""),
            "newest_listing": self.ledger.fact("newest"),
        }

    def snapshots(self) -> dict[str, str]:
        """Return the newest whole snapshot of each table on disk, "" if there is none; a dropped table needs none."""
        known = {place: text.split("\t") for place, text in self.ledger.facts("complete:").items()}
        newest = {table: known.get(table, ["", ""]) for table in self.pinner.tables()}
        return {table: since for table, (tag, since) in newest.items() if not tag.startswith("dropped-")}

    def _write_status(self) -> None:
        with self._status_lock:
            page = json.dumps(self.status() | {"snapshots": self.snapshots()}).encode()
            write_whole(os.path.join(self.state_dir, "status.json"), page, durable=False)
            if time.monotonic() - self._sent[-1][0] > 9.0:
                self._sent.append((time.monotonic(), self.uploaders.sent["bytes"]))


# ======================================================================================================
# Metrics
# ======================================================================================================

# Name behind cassbackup_, where the status has it, and what it is; counters end in _total.
_NUMBERS: Final = (
    ("written_timestamp_seconds", "written", "When these numbers were taken."),
    ("lag_seconds", "lag_s", "Seconds since the oldest file was found that is not listed; 0: all is listed."),
    ("pending_units", "pending units", "Snapshots of tables and batches of incrementals that are not listed."),
    ("pending_files", "pending files", "Files in them."),
    ("pending_bytes", "pending bytes", "Bytes in them."),
    ("pinned_alone_bytes", "held_alone_bytes", "Disk space that only our pins hold."),
    ("pinned_alone_limit_bytes", "limit", "What --max-pinned allows of that."),
    ("pin_area_full", "full", "1: no file is linked any more, by --max-pinned or --free-floor."),
    ("failing", "trouble", "1: something fails, and is tried again; `cassbackup status` says what."),
    ("store_failing_since_timestamp_seconds", "failing_since", "When the store began to fail; 0: it does not."),
    ("found_files_total", "counts found", "Files found."),
    ("rescan_found_files_total", "counts found_by_rescan", "Files found by looking again, not by an event."),
    ("sent_files_total", "sent files", "Files sent."),
    ("sent_bytes_total", "sent bytes", "Bytes sent."),
    ("listings_total", "counts listings", "Listings written."),
    ("incomplete_listings_total", "counts incomplete", "Listings of what will not become complete."),
    ("lost_files_total", "counts lost", "Files that were pinned or seen, and gone before they were stored."),
    ("vanished_files_total", "counts vanished", "Files that were gone before they were pinned."),
    ("unlinked_files_total", "counts unlinked", "Files that could not be linked, and are read where they are."),
    ("refused_total", "counts refused", "Times that a directory could not be read, or a pin not made."),
    ("digest_mismatches_total", "counts digest_mismatch", "Data.db files that are not what their Digest.crc32 says."),
)


class Metrics:
    """Tells Prometheus what the status says, and how long the store takes. Between two scrapes it costs nothing.

    `listen` is [HOST]:PORT, `textfile` a file for node_exporter's textfile collector; both may be "". Raises Usage.
    """

    def __init__(self, listen: str, textfile: str) -> None:
        self.daemon: Daemon | None = None  # until it is there, only the version is known
        self._textfile, self._lock = textfile, threading.Lock()
        if listen or textfile:
            try:
                import prometheus_client.core
            except ImportError as error:
                hint = "apt install python3-prometheus-client, or pip install prometheus-client"
                raise Usage(f"prometheus_client cannot be imported ({error})", hint) from None
            self._client = prometheus_client
            self._registry = prometheus_client.CollectorRegistry()
            self._registry.register(self)
        folder = os.path.dirname(os.path.abspath(textfile))
        if textfile and not (textfile.endswith(".prom") and os.access(folder, os.W_OK)):
            hint = "its name must end in .prom, for node_exporter, and its directory be there and ours to write"
            raise Usage(f"--metrics-textfile {textfile} would be of no use", hint)
        if listen:
            self._serve(listen)

    def _serve(self, listen: str) -> None:
        answer = self._client.MetricsHandler.factory(self._registry)
        answer.timeout = 10.0  # for a client that says nothing
        host, _, port = listen.rpartition(":")

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

            def verify_request(self, request: Any, client_address: Any) -> bool:  # a crowd must not take our threads
                return sum("process_request" in one.name for one in threading.enumerate()) < 8

            def handle_error(self, request: Any, client_address: Any) -> None:
                log.info("scrape failed error=%s", quote(repr(sys.exc_info()[1])))

        try:
            found = socket.getaddrinfo(host.strip("[]") or "127.0.0.1", int(port), type=socket.SOCK_STREAM)[0]
            Server.address_family = found[0]
            server = Server(cast(Any, found[4]), answer)
        except OSError as error:
            raise Usage(f"--metrics-listen {listen}: {error.strerror}", "name a free port of this machine") from None
        log.info("metrics at http://%s:%d/metrics", host or "127.0.0.1", server.server_address[1])
        threading.Thread(target=server.serve_forever, args=(3600.0,), name="metrics", daemon=True).start()

    def write(self) -> float:
        """Write the textfile; return the seconds until the next time."""
        began = time.thread_time()
        try:
            with self._lock:
                page = self._client.generate_latest(self._registry)
                write_whole(self._textfile, page, durable=False, for_all=True)
        except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
            log.error("metrics are not written, will try again error=%s", quote(repr(error)))
        return min(60.0, max(10.0, 1000 * (time.thread_time() - began)))  # thousands of tables: a thousandth of a core

    def collect(self) -> Iterator[Any]:
        """Yield every metric; the library calls it for each scrape, from a thread of its own."""
        core = self._client.core
        yield core.InfoMetricFamily("cassbackup_build", "The version.", {"version": __version__})
        if daemon := self.daemon:
            disks = [os.statvfs(area.path) for area in daemon.pinner.areas]
            limit = daemon.limits.max_pinned * sum(disk.f_blocks * disk.f_frsize for disk in disks)
            page = daemon.status() | {"failing_since": daemon.store.failing_since, "limit": limit}
            for name, path, what in _NUMBERS:
                kind = core.CounterMetricFamily if name.endswith("_total") else core.GaugeMetricFamily
                value = functools.reduce(lambda at, word: at.get(word, 0), path.split(), cast(Any, page))
                yield kind(f"cassbackup_{name}", what, value=float(bool(value) if isinstance(value, str) else value))
            what = "When the oldest file was found that is not listed; none: all is."
            yield self._by_table("oldest_unlisted", what, daemon.backlog.oldest(), min)
            taken = {table: seconds_of(since) if since else 0.0 for table, since in daemon.snapshots().items()}
            yield self._by_table("last_snapshot", "When the newest whole snapshot was taken; 0: never.", taken, max)
            yield from self._of_store(daemon.store.timed)

    def _by_table(self, name: str, what: str, moments: Mapping[str, float], choose: Callable[..., float]) -> Any:
        chosen: dict[tuple[str, str], float] = {}  # a table that was dropped and made again has two directories
        for place, moment in moments.items():
            keyspace, _, table = place.partition("/")
            table = quote(table_id_of(table)[0])
            chosen[keyspace, table] = choose(moment, chosen.get((keyspace, table), moment))
        name, labels = f"cassbackup_table_{name}_timestamp_seconds", ("keyspace", "table")
        family = self._client.core.GaugeMetricFamily(name, what, labels=labels)
        for (keyspace, table), moment in chosen.items():
            family.add_metric((quote(keyspace), table), moment)
        return family

    def _of_store(self, timed: Timed) -> Iterator[Any]:
        core, label = self._client.core, ("operation",)
        name, what = "cassbackup_store_errors", "Requests that failed, and are repeated."
        errors = core.CounterMetricFamily(name, what, labels=label)
        name, what = "cassbackup_store_request_duration_seconds", "How long requests took, failed ones too."
        took = core.HistogramMetricFamily(name, what, labels=label)
        bounds = [*map(str, timed.BUCKETS), "+Inf"]
        for operation, counts in timed.requests.items():
            errors.add_metric((operation,), timed.failed[operation])
            buckets = [*zip(bounds, itertools.accumulate(counts), strict=True)]
            took.add_metric((operation,), buckets, timed.seconds[operation])
        yield from (errors, took)


# ======================================================================================================
# Catalog
# ======================================================================================================

_LISTING_BYTES: Final = 256 * MIB  # some 600,000 files; nothing larger is a listing of ours


Table = tuple[str, str]  # keyspace, and the table's directory


class Filed(NamedTuple):
    """A listing as its key tells, without reading it."""

    key: str
    unit: Unit  # its `since` only of a snapshot; names too long for a key are hashed
    listed: str
    state: str
    files: int
    size: int
    body: int  # bytes of JSON
    when: float  # listed, or stored if that is later: of two clocks the younger counts


@functools.lru_cache(1000)
def _shelf(folder: str) -> Unit | None:
    """Return what the listings in a folder below <node>.listings/ are of; None where there are none."""
    match [part if part.startswith("%%") else unquote(part) for part in folder.split("/")]:
        case [keyspace, table, "snapshots", tag, since] if is_utc(since):
            return Unit("snapshot", keyspace, table, tag, since)
        case [keyspace, table, "backups"]:
            return Unit("incremental", keyspace, table, "", "")
        case ["archive", directory]:
            return Unit("archive", "", "", directory, "")
    return None


def filed_as(node: str, head: Head) -> Filed | None:
    """Read a listing's key; None for owner.json, heartbeats and the like. Raises Corrupt for what is not ours."""
    folder, _, name = head.key.removeprefix(f"{node}.listings/").rpartition("/")
    if folder == "heartbeat" or folder.startswith("tags/") or (not folder and name.startswith(("owner.", "node."))):
        return None
    unit, told = _shelf(folder), parse_listing_name(name)
    if not unit or not told or not is_utc(told[0]):
        raise Corrupt(f"{head.key} is none of our listings", "nobody else should write below <node>.listings/")
    listed, state, files, size = told
    return Filed(head.key, unit, listed, state, files, size, head.size, max(seconds_of(listed), head.modified))


def warn_of(fault: Fault) -> None:
    """Name in the log what lies among the listings and cannot be read as one."""
    log.warning("left out error=%s", quote(str(fault)))


def filed_in(store: Retrying, node: str, strict: bool = False) -> Iterator[Filed]:
    """Yield a node's listings, table by table. What else lies among them the log names; or `strict` raises Corrupt."""
    for head in store.list(f"{node}.listings/"):
        try:
            if filed := filed_as(node, head):
                yield filed
        except Corrupt as fault:
            if strict:
                raise
            warn_of(fault)


def read_filed(store: Retrying, node: str, filed: Filed, texts: dict[str, str] | None = None) -> Listing:
    """Read a listing. Raises Corrupt unless it says what its key says, and every key in it is of this node."""
    if filed.body > _LISTING_BYTES:
        raise Corrupt(f"{filed.key} has {filed.body} bytes", "that is no listing of ours")
    listing = load_listing(b"".join(store.get(filed.key, 0, filed.body)), texts)
    if filed.key != listings_of(node, listing.unit) + listing_name(listing) or listing.node != node:
        raise Corrupt(f"{filed.key} does not say what its name says", "it was moved here or damaged")
    for entry in listing.files:
        good, parts = entry.key.startswith(f"{node}/") and entry.key.isprintable(), entry.key.split("/")
        if not good or {"", ".", ".."} & {*parts} or max(map(len, parts)) > 255:
            raise Corrupt(f"{filed.key} names {quote(entry.key)}", "that is no file of this node")
    return listing


@dataclass(frozen=True, slots=True)
class Taking:
    """One life of a tag's directory, of one table: its listings, the oldest first."""

    unit: Unit
    filed: tuple[Filed, ...]

    @property
    def newest(self) -> Filed:
        """Return the listing that was written last; it holds all that the others do."""
        return self.filed[-1]

    @property
    def complete(self) -> bool:
        """Tell whether any of the listings says so."""
        return any(filed.state == "complete" for filed in self.filed)


def takings_of(filed: Iterable[Filed]) -> list[Taking]:
    """Sort the listings of snapshots by taking."""
    takings: dict[Unit, list[Filed]] = {}
    for one in filed:
        if one.unit.kind == "snapshot":
            takings.setdefault(one.unit, []).append(one)
    return [Taking(unit, tuple(sorted(listings, key=lambda one: one.listed))) for unit, listings in takings.items()]


def backups_of(takings: Iterable[Taking]) -> list[list[Taking]]:
    """Put together the takings of all tables that one `nodetool snapshot` made, the oldest first.

    They have the tag, and come one after the other: a table that comes again, or an hour without any, begins
    another taking of the tag.
    """
    backups: list[list[Taking]] = []
    tables, until = set[Table](), 0.0
    for taking in sorted(takings, key=lambda taking: (taking.unit.tag, taking.unit.since)):
        table, since = (taking.unit.keyspace, taking.unit.table), seconds_of(taking.unit.since)
        if not backups or backups[-1][0].unit.tag != taking.unit.tag or table in tables or since > until:
            backups.append([])
            tables.clear()
        backups[-1].append(taking)
        tables.add(table)
        until = since + 3600
    return sorted(backups, key=lambda backup: backup[0].unit.since)


def is_meant(taking: Taking, word: str) -> bool:
    """Tell whether TAG, or TAG@<the beginning of its UTC>, means a taking; "" means all. A tag may hold an @ too."""
    unit, (tag, _, since) = taking.unit, word.rpartition("@")
    return word in ("", unit.tag) or (unit.tag == tag and unit.since.startswith(since))


def read_taking(store: Retrying, node: str, taking: Taking) -> Listing:
    """Read all listings of a taking and add them up."""
    whole = add_up([read_filed(store, node, filed) for filed in taking.filed])
    assert whole  # a taking has a listing
    return whole


def is_selected(unit: Unit, words: Sequence[str]) -> bool:
    """Tell whether one of ks, ks.table and ks.table-<id>, all of them globs, means this table; none means all."""
    table = unit.table
    names = (unit.keyspace, f"{unit.keyspace}.{table_id_of(table)[0]}", f"{unit.keyspace}.{table}")
    return not words or any(fnmatchcase(name, word) for name in names for word in words)


def read_page(store: Retrying, prefix: str) -> dict[str, Any]:
    """Return the newest of <prefix>.json and <prefix>.<UTC>.json, {} where there is none. Raises Corrupt."""
    keys = [head.key for head in store.list(f"{prefix}.")]
    newest = max(keys, key=lambda key: (len(key), key), default="")
    try:
        page = json.loads(b"".join(store.get(newest))) if newest else {}
        if not isinstance(page, dict):
            raise TypeError("it is no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise Corrupt(f"{newest} cannot be read ({error})", "it was damaged; put it right or delete it") from None
    return page


@dataclass(frozen=True, slots=True)
class About:
    """What the bucket tells of a node: its place in the ring (node.json), and when it was last heard of."""

    name: str
    heard: str = ""  # UTC of the newest heartbeat
    cluster: str = ""
    host_id: str = ""
    dc: str = ""
    rack: str = ""
    addresses: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


def about_node(store: Retrying, name: str) -> About:
    """Ask the bucket who a node is. Of a damaged node.json only the log tells: other nodes are none the worse."""
    page: dict[str, Any] = {}
    try:
        page = read_page(store, f"{name}.listings/node")
    except Corrupt as fault:
        warn_of(fault)
    beats = [head.key.rpartition("/")[2].removesuffix(".json") for head in store.list(f"{name}.listings/heartbeat/")]
    cluster, host_id, dc, rack = (str(page.get(word) or "") for word in ("cluster", "host_id", "dc", "rack"))
    lists = (page.get(word) for word in ("addresses", "tokens"))
    addresses, tokens = (tuple(map(str, texts if isinstance(texts, list) else ())) for texts in lists)
    heard = max(filter(is_utc, beats), default="")
    return About(name, heard, cluster, host_id, dc, rack, addresses, tokens)


def node_names(store: Retrying) -> list[str]:
    """Return the names of the nodes that have listings."""
    return [folder.removesuffix(".listings") for folder in store.folders("") if folder.endswith(".listings")]


def spread(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Do something with each item on so many threads; yield the results in order, and hold few of them."""
    pool, waiting = ThreadPoolExecutor(threads), deque[Future[R]]()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def find_heads(store: Retrying, keys: Iterable[str], threads: int) -> dict[str, Head]:
    """Return what is there of these keys, as heads_of, each folder on a thread."""
    folders: dict[str, set[str]] = {}
    for key in keys:
        folders.setdefault(key.rpartition("/")[0], set()).add(key)
    found = spread(functools.partial(heads_of, store), folders.values(), threads)
    return {key: head for heads in found for key, head in heads.items()}


def find_nodes(store: Retrying, word: str, cluster: str, threads: int) -> list[About]:
    """Return the nodes that a word means: a name, else any part of a name, host id or address; "" means all.

    Raises Missing, with near names.
    """
    names = node_names(store)
    nodes = list(spread(functools.partial(about_node, store), [word] if word in names else names, threads))
    found = [about for about in nodes if cluster in ("", about.cluster)]
    if word not in names:
        found = [about for about in found if any(word in t for t in (about.name, about.host_id, *about.addresses))]
    if not found:
        near = difflib.get_close_matches(word, names, 3, 0.3) or names[:5]
        near += [f"the cluster {name!r}" for name in sorted({about.cluster for about in nodes} - {""})] * bool(cluster)
        what = f"no node{f' {word!r}' * bool(word)} in {store.url}" + (f" of cluster {cluster!r}" if cluster else "")
        raise Missing(what, f"there are {', '.join(near)}" if near else "nothing has been stored there")
    return found


# ======================================================================================================
# Choose
# ======================================================================================================

_PARTIAL = re.compile(r"(RepairedDataMismatch|DuplicateRows)-\d{8}")  # of some ranges (DiagnosticSnapshotService)
_AUTOMATIC = re.compile(rf"(truncated|dropped|pre-scrub)-[0-9]+.*|[0-9]+-(compact|upgrade)-.*|{_PARTIAL.pattern}")
_EMPTIED = re.compile(r"(?:truncated|dropped)-([0-9]{10,15})-.*")
_NO_ID: Final = (-1, 0, "")  # older than any
_SLACK_S: Final = 3600.0  # between Cassandra's clock as it writes a file, and as it says when a snapshot began


def is_automatic(tag: str) -> bool:
    """Tell whether Cassandra took a snapshot by itself (ColumnFamilyStore, Keyspace.getTimestampedSnapshotName)."""
    return bool(_AUTOMATIC.fullmatch(tag))


def emptied_at(tag: str) -> float:
    """Return when the table was truncated or dropped right after this snapshot, in seconds; 0.0 for other tags."""
    match = _EMPTIED.fullmatch(tag)
    return int(match[1]) / 1000 if match else 0.0


def origin_of(unit: Unit, entry: Stored) -> tuple[str, str]:
    """Return an entry's data directory, and its folder below the table's directory: "" or .idx/.

    Raises Corrupt for what Cassandra cannot have written, since a listing comes from outside.
    """
    middle = f"/{unit.keyspace}/{unit.table}/" + (f"snapshots/{unit.tag}" if unit.kind == "snapshot" else "backups")
    home, found, tail = entry.directory.rpartition(middle)
    parts = [*home.split("/")[1:], unit.keyspace, unit.table, *tail.split("/")[1:], entry.name]
    parts.append(table_id_of(unit.table)[0])
    good = found and home.startswith("/") and tail[:1] in ("", "/") and entry.mode <= 0o777
    for part in parts:
        good = good and part not in ("", ".", "..") and not re.search("[/\0\ud800-\udc7f\udd00-\udfff]", part)
        good = good and len(os.fsencode(part)) <= 255
    if not good:
        what = f"a listing names {quote(entry.directory)}/{quote(entry.name)}"
        raise Corrupt(what, "no restore can put that anywhere")
    return home, "/".join([*tail.split("/")[1:], ""])


@dataclass(frozen=True, slots=True)
class SSTable:
    """An SSTable as listings know it."""

    home: str  # the data directory that it came from
    name: str  # nb-1-big, of an index .idx/nb-1-big
    seen: str  # UTC: when we first saw it, or the taking
    files: tuple[Stored, ...]
    lacking: tuple[str, ...] = ()  # components that its TOC.txt names

    @property
    def data(self) -> Stored | None:
        """Return Data.db, which never changes."""
        return next((entry for entry in self.files if entry.name.endswith("-Data.db")), None)

    @property
    def identity(self) -> tuple[str, int, int, str]:
        """Return what is the same in a snapshot and in backups/, and differs where a generation came again."""
        data = self.data
        return (self.name, data.stamp.size, data.stamp.mtime_ns, data.crc32) if data else (self.name, 0, 0, "")

    @property
    def written(self) -> float:
        """Return when it was flushed, or imported: that writes Statistics.db anew (SSTableImporter); in seconds."""
        telling = [entry for entry in self.files if entry.name.endswith(("-Data.db", "-Statistics.db"))]
        return max((entry.stamp.mtime_ns for entry in telling or self.files), default=0) / 1e9

    @property
    def age(self) -> tuple[int, int, str]:
        """Return what sorts SSTables of one table: numbers, and after them UUIDs, whose text sorts by time."""
        words = self.name.rpartition("/")[2].split("-")
        number = words[-1] if words[-1].isdecimal() else words[1]  # <ks>-<table>-ka-1 until 2.1
        return (0, int(number), "") if number.isdecimal() else (1, 0, number)


def sstables_of(listings: Iterable[Listing]) -> list[SSTable]:
    """Put the components of one table's listings together.

    Components of one name that came with different batches are one SSTable, unless both brought the same component:
    then a generation number was given twice.
    """
    found: dict[tuple[str, str, str], tuple[dict[str, Stored], set[str]]] = {}
    for listing in listings:
        for entry in listing.files:
            home, folder = origin_of(listing.unit, entry)
            if split := sstable_of(entry.name):
                place = (home, folder + split[0], entry.seen or listing.unit.since)
                files, missing = found.setdefault(place, ({}, set()))
                files[entry.name] = entry
                missing.update(name for name in (*listing.missing, *listing.lost) if name.startswith(split[0] + "-"))
    whole: list[tuple[tuple[str, str, str], dict[str, Stored], set[str]]] = []
    for place, (files, missing) in sorted(found.items()):
        if whole and whole[-1][0][:2] == place[:2] and not whole[-1][1].keys() & files.keys():
            whole[-1][1].update(files)
            whole[-1][2].update(missing)
        else:
            whole.append((place, files, missing))
    return [
        SSTable(*place, tuple(files.values()), tuple(sorted(missing - files.keys()))) for place, files, missing in whole
    ]


@dataclass(frozen=True, slots=True)
class Base:
    """What a restore to a moment begins with: a whole snapshot, or nothing, from a truncate on."""

    start: float = 0.0  # what was flushed since then may be lacking in it
    end: float = 0.0
    listing: Listing | None = None
    newest: tuple[int, int, str] | None = None  # the youngest id that was there, where that is known
    dropped: bool = False

    def adds(self, sstable: SSTable, before: float) -> bool:
        """Tell whether an SSTable of backups/ belongs to the table as it was at a moment.

        It was written since the base; or its id is younger than all of the base's, and it was seen since and in time:
        an import can keep all times as they were, and numbers can begin anew after a truncate.
        """
        if self.start <= sstable.written or sstable.written > before:
            return sstable.written <= before
        younger = self.newest is not None and "/" not in sstable.name and sstable.age > self.newest
        since = self.end if self.newest == _NO_ID else self.start
        return younger and since <= seconds_of(sstable.seen) <= before


def base_on(listing: Listing, created: float = 0.0) -> Base | None:
    """Return a snapshot as a base; `created` is its manifest's created_at in seconds, where it has one.

    None without a manifest.json, whose last change is the snapshot's end.
    """
    ends = [entry.stamp.mtime_ns / 1e9 for entry in listing.files if entry.name == MANIFEST]
    if not ends:
        return None
    newest = max((one.age for one in sstables_of([listing]) if "/" not in one.name), default=_NO_ID)
    begin = created if 0 < created <= max(ends) else max(ends) - 3600.0
    return Base(begin - _SLACK_S, max(ends), listing, newest)


def choose_base(takings: Sequence[Taking], before: float, read: Callable[[Taking], Base | None]) -> Base:
    """Return what a restore of one table to a moment begins with.

    The newest whole snapshot that had ended by then; none that Cassandra took before it emptied the table: from
    there on, the table is empty, and nothing older belongs to it, however soon a snapshot followed; the tag tells whole
    milliseconds, and what was flushed within that one is older. Snapshots are read only as far as they can be newer
    than what was found.
    """
    best, moment, emptied = Base(), 0.0, None
    for taking in takings:
        if moment < emptied_at(taking.unit.tag) <= before:
            moment, emptied = emptied_at(taking.unit.tag), taking
    for taking in sorted(takings, key=lambda taking: taking.newest.listed, reverse=True):
        if best.listing and seconds_of(taking.newest.listed) <= best.end:
            break
        if taking.complete and not emptied_at(taking.unit.tag) and not _PARTIAL.fullmatch(taking.unit.tag):
            base = read(taking)
            if base and best.end < base.end <= before:
                best = base
    after = moment + 0.001 if emptied else 0.0
    if emptied and moment > best.end:
        last = read(emptied) if emptied.complete else None
        return Base(after, moment, None, last.newest if last else None, emptied.unit.tag.startswith("dropped-"))
    return replace(best, start=max(best.start, after))


def unreplaced(batches: Sequence[Filed], read: Callable[[Filed], Listing]) -> list[Listing]:
    """Read the listings of incrementals, but for those that a roll-up replaces."""
    rollups = [read(filed) for filed in batches if filed.state == "rollup"]
    replaced = {name for listing in rollups for name in listing.replaces}
    others = [filed for filed in batches if filed.state != "rollup" and filed.key.rpartition("/")[2] not in replaced]
    return rollups + [read(filed) for filed in others]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one table is restored from, and why."""

    keyspace: str
    table: str  # the directory's name
    sstables: tuple[SSTable, ...]
    base: Base
    added: int = 0  # how many of the SSTables come from backups/
    others: tuple[tuple[str, Stored], ...] = ()  # (data directory, entry): schema.cql, manifest.json
    troubles: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Say what the table is restored from."""
        if listing := self.base.listing:
            state, tag = "" if listing.complete else "INCOMPLETE ", f"{quote(listing.unit.tag)}@{listing.unit.since}"
            text = f"{state}snapshot {tag}, taken {rfc3339(utc(self.base.end))}"
        elif self.base.end:
            text = f"empty since it was truncated or dropped at {rfc3339(utc(self.base.end))}"
        else:
            text = "no snapshot"
        return text + (f", and {self.added} SSTables of backups/" if self.added else "")


def _others(listing: Listing, names: Sequence[str]) -> tuple[tuple[str, Stored], ...]:
    return tuple((origin_of(listing.unit, entry)[0], entry) for entry in listing.files if entry.name in names)


def _left_out(listings: Iterable[Listing]) -> tuple[str, ...]:
    """Name each Data.db that is called as in no format we know: it is stored, and cannot be restored as an SSTable."""
    names = {entry.name for listing in listings for entry in listing.files if entry.name.endswith("-Data.db")}
    odd = sorted(name for name in names if not sstable_of(name))
    return tuple(f"{quote(name)} is called as no SSTable that we know, left out" for name in odd)


def choose_at(keyspace: str, table: str, base: Base, batches: Iterable[Listing], before: float) -> Chosen:
    """Choose the SSTables of one table as it was at a moment."""
    snapshot, batches = sstables_of([base.listing] if base.listing else []), list(batches)
    chosen = {one.identity: one for one in snapshot}
    there = {(entry.name, entry.crc32) for one in snapshot for entry in one.files}
    fitting = [one for one in sstables_of(batches) if one.identity not in chosen and base.adds(one, before)]
    added = {one.identity: one for one in fitting if one.data and not one.lacking}
    lost = [one for one in fitting if one.identity not in added]
    lost = [one for one in lost if any((entry.name, entry.crc32) not in there for entry in one.files)]
    troubles = tuple(f"{one.name} is not whole in backups/, left out" for one in lost)
    then = [listing for listing in batches if listing.unit.since <= utc(before)]
    troubles += _left_out([base.listing, *then] if base.listing else then)
    others = _others(base.listing, (SCHEMA,)) if base.listing else ()
    return Chosen(keyspace, table, tuple((chosen | added).values()), base, len(added), others, troubles)


def choose_taking(listing: Listing) -> Chosen:
    """Choose a snapshot alone, as it was."""
    base, unit = base_on(listing) or Base(0.0, seconds_of(listing.unit.since), listing), listing.unit
    lacks = quote(" ".join(sorted({*listing.missing, *listing.lost})))
    troubles = _left_out([listing])
    troubles += () if listing.complete else (f"its snapshot is not complete, it lacks {lacks}",)
    others = _others(listing, (SCHEMA, MANIFEST))
    unique = {one.identity: one for one in sstables_of([listing])}
    return Chosen(unit.keyspace, unit.table, tuple(unique.values()), base, 0, others, troubles)


# ======================================================================================================
# Restore
# ======================================================================================================

_RANGE_BYTES: Final = 64 * MIB  # what one thread fetches of a large file at a time


@dataclass(frozen=True, slots=True)
class Fetch:
    """A file to be restored: which object becomes which file."""

    entry: Stored
    keyspace: str
    table: str  # the directory's name
    home: str  # the data directory that it came from
    name: str  # below the table's directory; of another generation where two SSTables share a name


def renamed(name: str, generation: int) -> str:
    """Return an SSTable's name with another generation: nb-7-big."""
    folder, slash, name = name.rpartition("/")
    words = name.split("-")
    words[-1 if words[-1].isdecimal() else 1] = str(generation)
    return folder + slash + "-".join(words)


def fetches_of(chosen: Chosen) -> Iterator[Fetch]:
    """Yield the files of a table. Where a generation was given twice, the second SSTable gets a free one."""
    numbers = [sstable.age[1] for sstable in chosen.sstables]
    taken, free = set[str](), max(numbers, default=0)
    for sstable in chosen.sstables:
        name = sstable.name
        while name in taken:
            free += 1
            name = renamed(sstable.name, free)
        taken.add(name)
        folder = sstable.name.rpartition("/")[0]
        for entry in sstable.files:
            component = entry.name.removeprefix(sstable.name.removeprefix(folder).lstrip("/"))
            yield Fetch(entry, chosen.keyspace, chosen.table, sstable.home, name + component)
    names = set[str]()
    for home, entry in chosen.others:
        if entry.name not in names:  # of several data directories each may have its own copy
            names.add(entry.name)
            yield Fetch(entry, chosen.keyspace, chosen.table, home, entry.name)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a restore would do, all of it known before the first byte is written."""

    node: str
    moment: str  # what was asked for
    tables: tuple[Chosen, ...]
    fetches: tuple[Fetch, ...]
    troubles: tuple[str, ...]  # what will be lacking
    absent: tuple[str, ...] = ()  # keys that are not there as listed
    cold: tuple[str, ...] = ()  # keys that must be thawed first

    @property
    def size(self) -> int:
        """Return the bytes to fetch."""
        return sum(fetch.entry.stamp.size for fetch in self.fetches)


def look_up(store: Retrying, entries: Iterable[Stored], threads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys that are not there with the listed size, and those that must be thawed first."""
    sizes = {entry.key: entry.stamp.size for entry in entries}
    heads = find_heads(store, sizes, threads)
    absent = tuple(key for key, size in sizes.items() if key not in heads or heads[key].size != size)
    frozen = (key for key in sizes if key in heads and heads[key].cold)  # only HEAD tells what is thawed
    return absent, tuple(key for key in frozen if (head := store.head(key)) and head.cold)


@functools.lru_cache(1000)
def _owner(user: str, group: str) -> tuple[int, int]:
    """Return the ids of a user and a group, -1 for what this machine does not know."""
    uid = gid = -1
    with contextlib.suppress(KeyError, ValueError):
        uid = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    with contextlib.suppress(KeyError, ValueError):
        gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    return (uid if uid < 1 << 32 else -1), (gid if gid < 1 << 32 else -1)


@contextlib.contextmanager
def open_folder(root: str, parts: Sequence[str], owner: tuple[int, int]) -> Iterator[int]:
    """Open root/part/part, and make what is not there; nothing below the root may be a symbolic link."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
                if os.geteuid() == 0:
                    os.chown(part, *owner, dir_fd=fd, follow_symlinks=False)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


class Arriving:
    """A file on its way: written under another name, in ranges that may come in any order, until its CRC is right.

    What has the right bytes already is kept; what has others is never overwritten.
    """

    def __init__(self, store: Retrying, fetch: Fetch, root: str, path: str) -> None:
        self.fetch, self.path = fetch, os.path.join(root, path)
        self._store, self._root = store, root
        *self._folder, self._name = path.split("/")
        self._temporary = f".cassbackup-{hashlib.sha1(self._name.encode('utf-8', 'surrogateescape')).hexdigest()}"
        self._owner = _owner(fetch.entry.user, fetch.entry.group)
        self._crcs: dict[int, int] = {}
        self._lock = threading.Lock()

    def ranges(self) -> range:
        """Return where each range begins; an empty file has one as well."""
        return range(0, max(1, self.fetch.entry.stamp.size), _RANGE_BYTES)

    def check(self) -> int:
        """Return the bytes of a file that is there already. Raises Conflict if that is another one."""
        entry = self.fetch.entry
        with open_folder(self._root, self._folder, self._owner) as folder:
            fd = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            if size != entry.stamp.size or hex32(_crc32_of(_read_span(file, 0, None))) != entry.crc32:
                raise Conflict(f"{quote(self.path)} has other content", "move it away, or choose another --into")
        return size

    def receive(self, start: int) -> int:
        """Fetch the range that begins here; with the last of them the file is there. Returns its bytes."""
        size, crc32 = self.fetch.entry.stamp.size, 0
        end = min(start + _RANGE_BYTES, size)
        with open_folder(self._root, self._folder, self._owner) as folder:
            fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
            with open(fd, "wb") as file:
                file.seek(start)
                for chunk in self._store.get(self.fetch.entry.key, start, end):
                    crc32 = zlib.crc32(chunk, crc32)
                    file.write(chunk)
                at = file.tell()
            if at != end:
                raise Corrupt(f"{self.fetch.entry.key} ended at {at} of {size} bytes", "run cassbackup verify")
            with self._lock:
                self._crcs[start] = crc32
                last = len(self._crcs) == len(self.ranges())
            if last:
                self._commit(folder)
        return end - start

    def abandon(self) -> None:
        """Take away what came of a file that did not become one."""
        with contextlib.suppress(OSError), open_folder(self._root, self._folder, self._owner) as folder:
            os.unlink(self._temporary, dir_fd=folder)

    def _commit(self, folder: int) -> None:
        """Give the file its name if it is whole: bytes first, then owner, mode and time, durable before visible."""
        entry, crc32 = self.fetch.entry, 0
        for start in self.ranges():
            crc32 = crc32_combine(crc32, self._crcs[start], min(_RANGE_BYTES, entry.stamp.size - start))
        self._crcs.clear()
        if hex32(crc32) != entry.crc32:
            what = f"{entry.key} has CRC-32 {hex32(crc32)}, listed as {entry.crc32}"
            raise Corrupt(what, "run cassbackup verify --deep")
        with open(os.open(self._temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "rb+") as file:
            if os.geteuid() == 0:
                os.fchown(file.fileno(), *self._owner)
            os.fchmod(file.fileno(), entry.mode & 0o777)
            os.utime(file.fileno(), ns=(entry.stamp.mtime_ns, entry.stamp.mtime_ns))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.link(self._temporary, self._name, src_dir_fd=folder, dst_dir_fd=folder)  # refuses to overwrite
        os.unlink(self._temporary, dir_fd=folder)


Placed = tuple[Fetch, str, str]  # what, below which root, at which path there
Progress = Callable[[int], None]  # is told how many bytes are there by now


def place_staged(plan: Plan, into: str) -> list[Placed]:
    """Return where files go: <into>/<ks>/<table>/, as `nodetool import` and sstableloader take them, or <into>/."""
    tables, placed = dict[tuple[str, str], str](), list[Placed]()
    for fetch in plan.fetches:
        name = (fetch.keyspace, table_id_of(fetch.table)[0])
        if tables.setdefault(name, fetch.table) != fetch.table:
            raise Usage(f"two tables are called {'.'.join(name)}", f"choose one: --table {name[0]}.{fetch.table}")
        placed.append((fetch, into, "/".join(filter(None, (*name, fetch.name)))))
    return placed


def place_live(plan: Plan, homes: Mapping[str, str]) -> list[Placed]:
    """Return where files go in the data directories of a stopped node: to the one that they came from."""
    sstables = [fetch for fetch in plan.fetches if sstable_of(fetch.entry.name)]
    return [(fetch, homes[fetch.home], "/".join((fetch.keyspace, fetch.table, fetch.name))) for fetch in sstables]


def check_target(placed: Sequence[Placed]) -> None:
    """Refuse a target where a symbolic link, or no directory, stands where one is needed. Raises Usage."""
    for root, path in {(root, path.rpartition("/")[0]) for _, root, path in placed}:
        at = root
        for part in path.split("/"):
            at = os.path.join(at, part)
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.lstat(at).st_mode):
                    raise Usage(f"{quote(at)} is not a directory", "a restore follows no symbolic link: move it away")


def room_at(path: str) -> int:
    """Return how many bytes are free where a directory is, or is to be."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def check_space(placed: Sequence[Placed]) -> None:
    """Refuse to fill a disk. Raises Fault."""
    wanted: Counter[int] = Counter()
    roots: dict[int, str] = {}
    for fetch, root, path in placed:
        device = os.stat(root).st_dev
        roots[device] = root
        if not os.path.lexists(os.path.join(root, path)):
            wanted[device] += fetch.entry.stamp.size
    for device, size in wanted.items():
        if size > (free := room_at(roots[device])):
            what = f"{quote(roots[device])} has {size_text(free)} free, and {size_text(size)} are to be restored"
            raise Fault(what, "choose another --into, or fewer tables")


@contextlib.contextmanager
def only_restore(roots: Iterable[str]) -> Iterator[None]:
    """Hold the directories against another restore. Raises Busy."""
    with contextlib.ExitStack() as stack:
        for root in sorted(set(roots)):
            fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another restore writes to {quote(root)}", "wait for it") from None
        yield


def _attempt(store: Retrying, placed: Sequence[Placed], threads: int, progress: Progress) -> dict[str, Exception]:
    wrong: dict[str, tuple[Arriving, Exception]] = {}

    def jobs() -> Iterator[tuple[Arriving, int]]:
        for fetch, root, path in placed:
            arriving = Arriving(store, fetch, root, path)
            arriving.abandon()  # what an earlier run left may be another name of a file that is finished
            there = os.path.lexists(arriving.path)
            yield from ((arriving, start) for start in ((-1,) if there else arriving.ranges()))

    def work(job: tuple[Arriving, int]) -> tuple[Arriving, int, Exception | None]:
        arriving, start = job
        try:
            return arriving, arriving.check() if start < 0 else arriving.receive(start), None
        except (Corrupt, Missing, Conflict, OSError) as error:
            return arriving, 0, error

    done = 0
    for arriving, size, error in spread(work, jobs(), threads):
        if error:
            wrong[arriving.path] = (arriving, error)
        done += size
        progress(done)
    for arriving, _ in wrong.values():
        arriving.abandon()
    return {path: error for path, (_, error) in wrong.items()}


def receive_all(store: Retrying, placed: Sequence[Placed], threads: int, progress: Progress) -> dict[str, Exception]:
    """Restore files; return what went wrong, by path."""
    wrong = _attempt(store, placed, threads, progress)
    damaged = [one for one in placed if isinstance(wrong.get(os.path.join(*one[1:])), Corrupt)]
    if damaged:  # perhaps on its way: once more
        wrong = {path: error for path, error in wrong.items() if not isinstance(error, Corrupt)}
        wrong |= _attempt(store, damaged, threads, lambda size: None)
    folders = {root for _, root, _ in placed}
    for _, root, path in placed:
        parts = path.split("/")
        folders |= {os.path.join(root, *parts[:depth]) for depth in range(1, len(parts))}
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            _fsync(folder)
    return wrong


def tables_of(filed: Iterable[Filed], words: Sequence[str], exclude: Sequence[str]) -> dict[Table, list[Filed]]:
    """Sort the listings of the selected tables by table."""
    tables: dict[Table, list[Filed]] = {}
    for one in filed:
        meant = is_selected(one.unit, words) and not (exclude and is_selected(one.unit, exclude))
        if meant and one.unit.kind != "archive":
            tables.setdefault((one.unit.keyspace, one.unit.table), []).append(one)
    return tables


def choose_backup(takings: Iterable[Taking], word: str) -> list[Taking]:
    """Return what TAG, or TAG@<taking>, means: of all tables, the newest. Raises Missing."""
    backups = backups_of(takings)
    fitting = [backup for backup in backups if any(is_meant(taking, word) for taking in backup)]
    if not fitting:
        tags = sorted({backup[0].unit.tag for backup in backups})
        near = difflib.get_close_matches(word.partition("@")[0], tags, 3, 0.3) or tags[-3:]
        hint = f"there are {', '.join(near)}" if near else "`cassbackup list` shows what is"
        raise Missing(f"no snapshot {word!r}", hint)
    return max(fitting, key=lambda backup: (backup[0].unit.tag == word, backup[0].unit.since))


def created_of(store: Retrying, listing: Listing) -> float:
    """Return created_at of a snapshot's manifest.json in seconds (Cassandra 4.1, CASSANDRA-16789), 0.0 without."""
    for entry in listing.files:
        if entry.name == MANIFEST:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, ArithmeticError, Missing):
                created = json.loads(b"".join(store.get(entry.key)))["created_at"]
                return datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp()
    return 0.0


def choose_table(store: Retrying, node: str, table: Table, filed: Sequence[Filed], before: float) -> Chosen:
    """Read as many listings of a table as it takes, and choose what it is restored from."""

    def read(taking: Taking) -> Base | None:
        listing = read_taking(store, node, taking)
        return base_on(listing, created_of(store, listing))

    base = choose_base(takings_of(filed), before, read)
    batches = [one for one in filed if one.unit.kind == "incremental" and one.when >= base.start]
    return choose_at(*table, base, unreplaced(batches, functools.partial(read_filed, store, node, texts={})), before)


def schema_alone(store: Retrying, node: str, one: Chosen, filed: Sequence[Filed], before: float) -> Chosen:
    """Keep the schema of what was chosen: that of its base, else of the whole snapshot that is nearest in time."""
    others = tuple(other for other in one.others if other[1].name == SCHEMA)
    takings = [taking for taking in takings_of(filed) if taking.complete]
    if not others and takings:
        near = min(takings, key=lambda taking: abs(seconds_of(taking.newest.listed) - before))
        others = _others(read_taking(store, node, near), (SCHEMA,))
    return replace(one, sstables=(), troubles=(), others=others)


def born_at(table: str) -> float:
    """Return when a table was created, as its id tells: a version 1 UUID (TableId.generate). Else 0.0."""
    with contextlib.suppress(ValueError):
        told = uuid.UUID(table_id_of(table)[1])
        return (told.time - 0x01B21DD213814000) / 1e7 if told.version == 1 else 0.0
    return 0.0


def newest_of_names(tables: Iterable[Chosen], before: float) -> list[Chosen]:
    """Keep of each name the table that lived at a moment: one that was dropped and made again has two ids.

    That is the one with the newest unit by then, of those that were created by then. One that was dropped yields to
    the other, even if that has nothing but imports with old modification times; and neither yields to what was
    imported after the moment.
    """
    names: dict[tuple[str, str], list[Chosen]] = {}
    for one in tables:
        if one.base.end or one.sstables:
            names.setdefault((one.keyspace, table_id_of(one.table)[0]), []).append(one)
    drops = {name: max((one.base.end for one in same if one.base.dropped), default=0.0) for name, same in names.items()}

    def life(one: Chosen) -> tuple[bool, bool, bool, float]:
        drop = drops[one.keyspace, table_id_of(one.table)[0]]
        written = max((sstable.written for sstable in one.sstables), default=0.0)
        seen = one.base.end or any(sstable.seen <= utc(before) for sstable in one.sstables)
        there = bool(one.sstables or not one.base.dropped)
        return born_at(one.table) <= before, bool(seen or 0 < drop < written), there, max(one.base.end, written)

    return [max(same, key=life) for same in names.values()]


def make_plan(store: Retrying, node: str, moment: str, tables: Sequence[Chosen], threads: int) -> Plan:
    """Turn what was chosen into files, and look for every object. Raises Corrupt for a listing that lies."""
    fetches = tuple(fetch for chosen in tables for fetch in fetches_of(chosen))
    troubles = [f"{quote(one.keyspace)}.{quote(one.table)}: {trouble}" for one in tables for trouble in one.troubles]
    absent_and_cold = look_up(store, (fetch.entry for fetch in fetches), threads)
    return Plan(node, moment, tuple(tables), fetches, tuple(troubles), *absent_and_cold)


def plan_archive(store: Retrying, node: str, directory: str, threads: int) -> Plan:
    """Choose all files that were archived in a directory, of each name the newest. Raises Missing, Corrupt."""
    heads = store.list(listings_of(node, Unit("archive", "", "", directory, "")))
    filed = filter(None, (filed_as(node, head) for head in heads))
    listings = list(spread(functools.partial(read_filed, store, node), filed, threads))
    entries = {entry.name: entry for listing in listings for entry in listing.files}
    if not entries:
        raise Missing(f"{node} has no archive of {quote(directory)}", "`cassbackup list` names the directories")
    fetches = tuple(Fetch(entry, "", "", directory, name) for name, entry in entries.items())
    lost = sorted({name for listing in listings for name in listing.lost} - entries.keys())
    troubles = tuple(f"{quote(name)} was lost before it could be stored" for name in lost)
    moment = f"{rfc3339(utc(store.now()))}, archive {quote(directory)}"
    return Plan(node, moment, (), fetches, troubles, *look_up(store, entries.values(), threads))


# ======================================================================================================
# Verify
# ======================================================================================================


def trouble_of(entry: Stored, head: Head | None) -> str:
    """Return how an object differs from what a listing says of it, "" if it does not."""
    if head is None:
        return "is not there"
    if head.size != entry.stamp.size:
        return f"has {head.size} bytes, listed with {entry.stamp.size}"
    if head.crc32 and head.crc32 != entry.crc32:
        return f"has CRC-32 {head.crc32}, listed with {entry.crc32}"
    if head.crc32c and entry.crc32c and head.crc32c != entry.crc32c:
        return f"has CRC-32C {head.crc32c}, listed with {entry.crc32c}"
    return ""


def read_deeply(store: Retrying, entry: Stored) -> str:
    """Download an object; return how it differs from its listing, "" if it does not."""
    try:
        crc32, size = 0, 0
        for chunk in store.get(entry.key):
            crc32, size = zlib.crc32(chunk, crc32), size + len(chunk)
    except Missing:
        return "is not there"
    return trouble_of(entry, Head(entry.key, size, "", 0.0, hex32(crc32)))


def stale_digests(store: Retrying, listings: Iterable[Listing], unread: set[str]) -> Iterator[tuple[Stored, str]]:
    """Yield each Data.db whose content is not what Cassandra's own Digest.crc32 says, and what that says."""
    pairs: dict[tuple[str, str], tuple[Stored, Stored]] = {}
    for listing in listings:
        there = {(entry.directory, entry.seen, entry.name): entry for entry in listing.files}
        for (directory, seen, name), digest in there.items():
            data = there.get((directory, seen, name.removesuffix("Digest.crc32") + "Data.db"))
            if name.endswith("-Digest.crc32") and data and digest.stamp.size < 100:
                pairs[data.key, digest.key] = (data, digest)
    for data, digest in pairs.values():
        if digest.key not in unread:
            with contextlib.suppress(Missing):
                text = b"".join(store.get(digest.key)).decode("ascii", "replace").strip()
                if text != str(int(data.crc32, 16)):
                    yield data, text


# ======================================================================================================
# Prune
# ======================================================================================================

_GRACE_S: Final = 24 * 3600.0  # from condemning to deleting; a publication takes an hour at most
_AUTOMATIC_S: Final = 14 * 24 * 3600.0
_SILENT_S: Final = 30 * 24 * 3600.0  # a node that was heard of within this time is not retired


def hear_time(store: Retrying, node: str) -> float:
    """Return the store's time as of a fresh reply."""
    store.head(f"{node}.condemned/clock")
    return store.now()


def condemn(store: Retrying, node: str, keys: Iterable[str], deleted: bool = False) -> str:
    """Write down what must not be listed any more, and may be deleted when nothing names it; return the file's key.

    The daemon stores such a file anew when it lists it the next time.
    """
    body = json.dumps({"version": 1, "keys": sorted(keys), "deleted": deleted}).encode()
    key = f"{node}.condemned/{utc(hear_time(store, node) + random.random())}.json"  # S3 tells whole seconds
    store.put(key, body, zlib.crc32(body))
    return key


@dataclass(frozen=True, slots=True)
class Retention:
    """What is to be kept of each table's snapshots; durations in seconds, 0 for what was not asked for."""

    last: int = 0
    within: float = 0.0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    tag: str = ""  # one backup goes, TAG or TAG@<taking>, and nothing else
    force: bool = False


def _kept(takings: Sequence[Taking], retention: Retention, now: float) -> tuple[set[Unit], set[Unit]]:
    """Return a table's snapshots to be kept, and those of them from which on every moment can be restored."""
    good = [one for one in takings if one.complete and not is_automatic(one.unit.tag)]
    # What a clock that was ahead has dated is spared, and must not take the places of what was taken since.
    good = [one for one in good if one.newest.when <= now + _GRACE_S]
    good.sort(key=lambda one: one.newest.when, reverse=True)
    kept = good[: max(1, retention.last)]  # never the last good one
    kept += [one for one in good if now - one.newest.when <= retention.within]
    periods = []
    for count, period in ((retention.daily, "%Y%m%d"), (retention.weekly, "%G%V"), (retention.monthly, "%Y%m")):
        newest: dict[str, Taking] = {}
        for one in good:
            newest.setdefault(datetime.fromtimestamp(one.newest.when, timezone.utc).strftime(period), one)
        periods.append(list(newest.values())[:count])
    window = {one.unit for one in (*kept, *periods[0])}
    others = [one for one in takings if one not in good]
    spared = [one for one in others if not good or now - one.newest.when <= (retention.within or _AUTOMATIC_S)]
    return window | {one.unit for one in (*periods[1], *periods[2], *spared)}, window


def _chosen_by_tag(takings: Sequence[Taking], retention: Retention) -> set[Unit]:
    """Return the takings that --tag means, but for the last good one of the table."""
    meant = [one.unit for one in takings if is_meant(one, retention.tag)]
    chosen = {unit for unit in meant if unit.tag == retention.tag} or {*meant}
    good = [one for one in takings if one.complete and not is_automatic(one.unit.tag)]
    last = max(good, key=lambda one: one.newest.when, default=None)
    return chosen - {last.unit} if last and not retention.force else chosen


def expired_listings(
    filed: Sequence[Filed],
    listings: Mapping[str, Listing],
    bases: Mapping[Unit, Base | None],
    retention: Retention,
    now: float,
) -> set[str]:
    """Return the keys of one table's listings that are to go; `bases` has its complete snapshots.

    Incrementals go when no snapshot whose moments can be restored would add them, by the very rule of a restore. A
    listing that a roll-up replaces goes if every file of it is in the roll-up.
    """
    takings = takings_of(filed)
    if retention.tag:
        gone = _chosen_by_tag(takings, retention)
        return {one.key for taking in takings if taking.unit in gone for one in taking.filed}
    kept, window = _kept(takings, retention, now)
    oldest = min((base.end if base else 0.0 for unit, base in bases.items() if unit in window), default=0.0)
    # That a table was emptied is told by the snapshot that Cassandra took before: without it, the rows would be back.
    left = [one for one in takings if one.unit in kept or emptied_at(one.unit.tag) >= oldest > 0]
    expired = {one.key for taking in takings if taking not in left for one in taking.filed}
    if retention.within:
        expired |= {one.key for one in filed if one.unit.kind == "archive" and now - one.when > retention.within}
    ends = {base.end for one in left if (base := bases.get(one.unit))} | {emptied_at(one.unit.tag) for one in left}
    reached = [choose_base(left, end, lambda taking: bases[taking.unit]) for end in sorted(ends) if end >= oldest > 0]
    batches = [one for one in filed if one.unit.kind == "incremental"]
    wanted = {
        entry.key
        for sstable in sstables_of(unreplaced(batches, lambda one: listings[one.key]))
        if any(base.adds(sstable, math.inf) for base in reached)
        for entry in sstable.files
    }
    if reached:
        expired |= {one.key for one in batches if wanted.isdisjoint(entry.key for entry in listings[one.key].files)}
    by_name = {one.key.rpartition("/")[2]: one.key for one in batches}
    for one in batches:
        there = {(entry.directory, entry.name, entry.key) for entry in listings[one.key].files}
        for key in (by_name[name] for name in listings[one.key].replaces if name in by_name):
            if key != one.key and {(entry.directory, entry.name, entry.key) for entry in listings[key].files} <= there:
                expired.add(key)
    return expired


class Pruning:
    """Deletes what retention lets go of one node, without a lock: first condemned, deleted by a later run.

    Whatever stops it, nothing that a listing names is gone, and the next run goes on.
    """

    def __init__(self, store: Retrying, node: str) -> None:
        self._store, self._node = store, node
        self._known: set[str] = set()  # listings whose keys are among the named
        self._named: set[str] = set()  # keys that must stay
        self.listings: list[str] = []  # that go
        self.objects: dict[str, int] = {}  # their keys that nothing else names, and bytes
        self.refused: dict[str, str] = {}  # what the store would not delete, and why

    def plan(self, retention: Retention, threads: int) -> None:
        """Read every listing and decide. Raises Corrupt for any that cannot be read, before anything is deleted."""
        going: dict[str, int] = {}
        records = self._tag_records()  # before the listings: what they name, and no listing is there, is gone
        now = hear_time(self._store, self._node)
        there = filed_in(self._store, self._node, strict=True)
        for _, group in itertools.groupby(there, lambda one: (one.unit.keyspace, one.unit.table)):
            filed = list(group)
            read = spread(functools.partial(read_filed, self._store, self._node, texts={}), filed, threads)
            listings = {one.key: listing for one, listing in zip(filed, read, strict=True)}
            complete = [one for one in takings_of(filed) if one.complete]
            wholes = [add_up([listings[filed.key] for filed in one.filed]) for one in complete]
            bases = spread(self._base, wholes, threads)
            found = dict(zip((one.unit for one in complete), bases, strict=True))
            expired = expired_listings(filed, listings, found, retention, now)
            self.listings += sorted(expired)
            self._known |= listings.keys()
            for key, listing in listings.items():
                if key in expired:
                    going |= {entry.key: entry.stamp.size for entry in listing.files}
                else:
                    self._named |= {entry.key for entry in listing.files}
        staying = self._known - set(self.listings)
        self.listings += [key for key, named in records.items() if named and staying.isdisjoint(named)]
        self.objects = {key: size for key, size in going.items() if key not in self._named}
        share = len(self.objects) / max(1, len(self.objects) + len(self._named))
        if share > 0.5 and not retention.force:
            what = f"{len(self.objects)} objects of {self._node} would go, {share:.0%} of all that are listed"
            raise Fault(what, "nothing was deleted; if that is meant, pass --force")

    def _base(self, whole: Listing | None) -> Base | None:
        return base_on(whole, created_of(self._store, whole)) if whole else None

    def _tag_records(self) -> dict[str, list[str]]:
        """Return the records of tags, and the listings that each names."""
        records = [head.key for head in self._store.list(f"{self._node}.listings/tags/")]
        try:
            pages = {key: json.loads(b"".join(self._store.get(key))) for key in records}
            return {key: list(map(str, page.get("listings", ()))) for key, page in pages.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupt(f"a tag record of {self._node} cannot be read ({error})", "nothing is deleted") from None

    def plan_retirement(self) -> None:
        """Let everything of a node go. Raises Usage if it was heard of within the last 30 days."""
        now, newest = hear_time(self._store, self._node), 0.0
        for head in self._store.list(f"{self._node}.listings/"):
            self.listings.append(head.key)
            newest = max(newest, head.modified)
        if now - newest < _SILENT_S:
            what = f"{self._node} was heard of at {rfc3339(utc(newest))}"
            raise Usage(what, "a node is retired when it has been silent for 30 days; stop its daemon")
        self.objects = {head.key: head.size for head in self._store.list(f"{self._node}/")}
        if not (self.listings or self.objects or any(self._store.list(f"{self._node}.condemned/"))):
            raise Missing(f"no node {self._node!r} in {self._store.url}", "`cassbackup list` shows what is there")

    def confirm(self) -> int:
        """Condemn, delete the listings, and delete what was condemned a day ago; return how many objects went."""
        heads = self._store.list(f"{self._node}.condemned/")
        condemned = [(one, *load_condemned(self._node, one.key, b"".join(self._store.get(one.key)))) for one in heads]
        fresh = self.objects.keys() - set(itertools.chain(*(keys for _, keys, deleted in condemned if not deleted)))
        if fresh:
            condemn(self._store, self._node, fresh)
        self._delete(self.listings + old_heartbeats(self._store, self._node))
        if self.refused:  # a listing that stays names what would be deleted
            return 0
        now = hear_time(self._store, self._node)
        return sum(self._sweep(*one) for one in condemned if now - one[0].modified >= _GRACE_S)

    def _sweep(self, head: Head, keys: frozenset[str], deleted: bool) -> int:
        """Delete what a condemned file names and no listing does by now; and the file, when all of it is gone.

        A daemon may have asked for such an object a moment before, so that another file names it for one day more.
        """
        count, left = 0, [] if deleted else sorted(keys)
        while left and self._store.head(head.key):
            self._read_new()
            batch, left = left[:1000], left[1000:]
            count += self._delete([key for key in batch if key not in self._named])
        if not left and (deleted or not keys & (self._named | self.refused.keys())):
            if not deleted:
                condemn(self._store, self._node, keys, True)
            self._delete([head.key])
        return count

    def _read_new(self) -> None:
        """Read listings that were written since the last look: what they name stays."""
        for filed in filed_in(self._store, self._node, strict=True):
            if filed.key not in self._known:
                self._named |= {entry.key for entry in read_filed(self._store, self._node, filed).files}
                self._known.add(filed.key)

    def _delete(self, keys: Sequence[str]) -> int:
        why = self._store.delete(keys) if keys else {}
        self.refused |= why
        return len(keys) - len(why)


# ======================================================================================================
# Doctor
# ======================================================================================================

_OLD_TAG_S: Final = 7 * 86400.0
Result = Literal["ok", "warning", "bad", "skipped"]


class Finding(NamedTuple):
    """What a check found, and the cure where it is not ok."""

    name: str
    result: Result
    detail: str
    cure: str = ""


def judge(name: str, good: bool, detail: str, otherwise: Result, cure: str) -> Finding:
    """Return a finding: ok, or something else with its cure."""
    return Finding(name, "ok", detail) if good else Finding(name, otherwise, detail, cure)


def finding_of(name: str, error: Exception) -> Finding:
    """Return what a check ran into."""
    what, hint = (error.what, error.hint) if isinstance(error, Fault) else (str(error), "")
    return Finding(name, "bad", what, hint or "ask again, as the owner of the data")


@dataclass(slots=True)
class Survey:
    """What the daemon will find at its first look."""

    directories: int = 0  # each takes a watch
    files: int = 0  # a file with several names counts once
    size: int = 0
    requests: int = 0  # a put, or the parts with a beginning and an end; and two for each listing
    backups: Counter[int] = field(default_factory=Counter)  # bytes in backups/, by device
    tags: dict[str, float] = field(default_factory=dict)  # when the newest directory of a tag was changed
    linked: list[str] = field(default_factory=list)  # directories behind symbolic links, which are not followed
    _seen: set[tuple[int, int]] = field(default_factory=set)  # of files with several names

    def look(self, root: str, filters: Filters) -> None:
        """Walk a data directory as the daemon will."""
        for folder, folders, names in os.walk(root):
            parts = [] if folder == root else os.path.relpath(folder, root).split("/")
            kind, live = "".join(parts[2:3]), len(parts) == 2 and not filters.include
            wanted = [name for name in folders if not name.startswith((".cassbackup", "lost+found"))]
            wanted = [name for name in wanted if not live or name in ("snapshots", "backups")]
            folders[:] = [name for name in wanted if filters.directory([*parts, name])]
            self.linked += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
            if kind == "snapshots" and len(parts) == 4:
                with contextlib.suppress(FileNotFoundError):  # cleared meanwhile
                    self.tags[parts[3]] = max(self.tags.get(parts[3], 0.0), os.stat(folder).st_mtime)
            inside = kind == "backups" or (kind == "snapshots" and len(parts) > 3)
            paths = [path for name in names if filters.archived(path := os.path.join(folder, name)) or inside]
            self.directories, self.requests = self.directories + 1, self.requests + 2 * bool(paths)
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._count(os.lstat(path), kind == "backups")

    def _count(self, info: os.stat_result, incremental: bool) -> None:
        one = (info.st_dev, info.st_ino)
        if one in self._seen:
            return
        if info.st_nlink > 1:
            self._seen.add(one)
        self.files, self.size = self.files + 1, self.size + info.st_size
        self.requests += 1 if info.st_size <= PART_BYTES else 2 + -(-info.st_size // PART_BYTES)
        self.backups[info.st_dev] += info.st_blocks * 512 * incremental


@dataclass(frozen=True, slots=True)
class Case:
    """What is examined: the daemon's settings, and what was made of them."""

    settings: Any  # as the command line read them
    environ: Mapping[str, str]
    directories: Sequence[str]
    was_root: bool  # and has become the owner of the data
    yaml: str  # the text of cassandra.yaml
    nodetool: Callable[..., str]
    holder: str  # pid of the daemon, "" where none runs
    survey: Survey
    cloud: Cloud | None
    node: str
    machine: str  # its machine-id(5)
    store: Store

    @property
    def patient(self) -> Retrying:
        """Return the store for what may be tried again."""
        return Retrying(self.store, threading.Event().wait, 5.0, Budget(0.0))


def _kernel(name: str) -> int:
    with open(f"/proc/sys/fs/{name}") as file:
        return int(file.read())


def _nearest(path: str) -> str:
    """Return a path, or as much of it as there is."""
    return path if os.path.exists(path) else _nearest(os.path.dirname(path))


def check_versions(case: Case) -> Iterator[Finding]:
    """Tell what runs here; what is absent and needed, another check finds."""
    names = ("pyinotify", "requests", "boto3", "google-cloud-storage")
    found = {one.name: one.version for one in metadata.distributions() if one.name in names}
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("versions", "ok", " ".join(map(" ".join, [("Python", python), *sorted(found.items())])))


def check_data(case: Case) -> Iterator[Finding]:
    """Only the owner of a file may link it (fs.protected_hardlinks); and no pin may take the last of a disk."""
    floor, pinned = case.settings.free_floor, case.settings.max_pinned
    for root in case.directories:
        disk, info, me = os.statvfs(root), os.stat(root), os.geteuid()
        owner, free = _user(info.st_uid), disk.f_bavail / disk.f_blocks
        cure = f"fs.protected_hardlinks lets only the owner link: sudo -u {owner} cassbackup doctor"
        worse: Result = "bad" if _kernel("protected_hardlinks") else "warning"
        yield judge("user", me in (0, info.st_uid), f"{_user(me)}; {quote(root)} belongs to {owner}", worse, cure)
        detail = f"{quote(root)} has {free:.0%} free; pins may hold {pinned:.0%} alone, down to {floor:.0%} free"
        worse = "bad" if free < floor else "warning"
        cure = "make room (old snapshots, backups/), or lower --free-floor and --max-pinned"
        yield judge("disk", free >= floor + pinned, detail, worse, cure)
        share = case.survey.backups[info.st_dev] / (disk.f_blocks * disk.f_frsize)
        cure = "--delete-uploaded-incrementals: Cassandra itself never deletes them"
        yield judge("backups/", share <= 0.05, f"{share:.1%} of the disk", "warning", cure)
    for path in case.survey.linked:
        cure = "move it to a data directory of its own; or leave it out: --exclude-keyspace, --exclude-table"
        yield Finding("symlink", "bad", f"nothing behind {quote(path)} is stored: links are not followed", cure)


def check_links(case: Case) -> Iterator[Finding]:
    """Link a file into each pin area, or, where it is not made yet, into the directory that it will be made in."""
    for root in case.directories:
        problems = dict[str, str]()
        for path in area_paths(os.path.realpath(root), case.settings.pin_dir):
            at = _nearest(path)
            problems[path] = why_no_link(root, at) if os.access(at, os.W_OK) else f"{at} is not writable"
            if not problems[path]:
                yield Finding("link", "ok", f"{quote(root)} into {quote(path)}" + " (not made yet)" * (at != path))
                break
        else:
            cure = "run as the owner of the data; the pins on its mount (each ReadWritePaths= is one), or --pin-dir"
            detail = "; ".join(f"{quote(path)}: {problem}" for path, problem in problems.items())
            yield Finding("link", "bad", f"{quote(root)} into {detail}", cure)


def check_unit(case: Case) -> Iterator[Finding]:
    """Compare ReadWritePaths: the service writes below them alone, and links fail unless data and pins share one."""
    words = ["systemctl", "show", "cassbackup.service", "--property=LoadState,ProtectSystem,ReadWritePaths"]
    told = subprocess.run(words, check=False, capture_output=True, text=True).stdout if shutil.which(words[0]) else ""
    if "LoadState=loaded" not in told:
        yield Finding("unit", "skipped", "there is no cassbackup.service here")
        return
    allowed = re.findall(r"(?:^ReadWritePaths=|\s)[-+]*(/\S*)", told, re.M)
    areas = [(real, area_paths(real, case.settings.pin_dir)[0]) for real in map(os.path.realpath, case.directories)]
    needed = {os.path.commonpath(both) for both in areas} | {*([case.store.url[7:]] * isinstance(case.store, DirStore))}
    shut = [path for path in sorted(needed) if not any(f"{path}/".startswith(f"{one}/") for one in allowed)]
    cure = "systemctl edit cassbackup (and cassbackup-snapshot, cassbackup-prune); add\n[Service]"
    cure += "".join(f"\nReadWritePaths={path}" for path in shut)
    good = not shut or "ProtectSystem=strict" not in told
    yield judge("unit", good, f"cassbackup.service may {'not ' * bool(shut)}write where it must", "bad", cure)


def check_limits(case: Case) -> Iterator[Finding]:
    """Compare what the daemon needs of inotify(7), and of descriptors, with what the kernel gives."""
    try:
        Watcher().close()
    except OSError as error:
        yield Finding("instances", "bad", str(error), "sysctl fs.inotify.max_user_instances=1024; write it to sysctl.d")
    needed, watches = case.survey.directories, _kernel("inotify/max_user_watches")
    events = _kernel("inotify/max_queued_events")
    cure = f"sysctl fs.inotify.max_user_watches={max(1 << 20, 4 * needed)}; write it to sysctl.d"
    worse: Result = "bad" if needed > watches else "warning"
    yield judge("watches", needed <= 0.8 * watches, f"{needed} directories, max_user_watches {watches}", worse, cure)
    cure = "sysctl fs.inotify.max_queued_events=16384; write it to sysctl.d"
    yield judge("events", events >= 4096, f"max_queued_events {events}", "warning", cure)
    daemon = f"/proc/{case.holder}/limits"
    with open(daemon if os.path.exists(daemon) else "/proc/self/limits") as file:
        files = int(re.findall(r"^Max open files +(\d+)", file.read(), re.M)[0])
    cure = "LimitNOFILE=65536 in the unit, or ulimit -n 65536"
    yield judge("descriptors", files >= 2 * _HELD_FILES, f"{files} open files", "warning", cure)


def check_state(case: Case) -> Iterator[Finding]:
    """Only the daemon writes to the state directory; so the kernel is asked whether it could."""
    path = os.path.abspath(case.settings.state_dir)
    at = _nearest(path)
    may = os.path.isdir(at) and (case.was_root or os.access(at, os.W_OK | os.X_OK))
    detail = f"{quote(path)} is {'' if may else 'not '}writable" + " (not made yet)" * (at != path)
    yield judge("state", may, detail, "bad", "give it to the owner of the data, or pass --state-dir")


def check_cassandra(case: Case) -> Iterator[Finding]:
    """Between snapshots only incremental backups protect: cassandra.yaml says what will be, nodetool what is."""
    words = dict(re.findall(r"^(incremental_backups|auto_snapshot):\s*(\w+)", case.yaml, re.M))
    configured, running = words.get("incremental_backups") == "true", "unknown"
    try:
        running = "off" if "not running" in case.nodetool("statusbackup") else "on"
    except Fault as fault:
        yield Finding("nodetool", "skipped", fault.what, "pass --nodetool, or ask again when Cassandra runs")
    cure = "incremental_backups: true in cassandra.yaml, and nodetool enablebackup; else only snapshots protect"
    detail = f"{'on' if configured else 'off'} in cassandra.yaml{' (not found)' * (not case.yaml)}, {running} now"
    yield judge("incrementals", configured and running != "off", detail, "warning", cure)
    automatic = words.get("auto_snapshot", "true") == "true"
    cure = "auto_snapshot: true in cassandra.yaml: then DROP and TRUNCATE leave a snapshot"
    yield judge("auto_snapshot", automatic, "on" if automatic else "off", "warning", cure)
    old = sorted(tag for tag, changed in case.survey.tags.items() if time.time() - changed > _OLD_TAG_S)
    detail = f"{len(case.survey.tags)} tags on disk; older than a week: {quote(' '.join(old[:5])) or 'none'}"
    cure = "when it is listed: nodetool clearsnapshot -t " + quote("".join(old[:1]))
    yield judge("snapshots", not old, detail, "warning", cure)


def check_cost(case: Case) -> Iterator[Finding]:
    """Tell what a first run takes; later ones send only what is new."""
    one, rate = case.survey, case.settings.max_bandwidth
    days = one.size / rate / 86400 if rate else 0.0
    speed = f"{days:.1f} days at {size_text(rate)}/s" if rate else "no bandwidth limit"
    detail = f"{one.files} files, {size_text(one.size)}, {one.requests} requests, {speed}"
    yield judge("first run", days < 7, detail, "warning", "raise --max-bandwidth, or leave tables out")


def check_cloud(case: Case) -> Iterator[Finding]:
    """Tell where we are, and with whose rights."""
    where = " ".join(asdict(case.cloud).values()) if case.cloud else "neither AWS nor GCE answers"
    yield Finding("cloud", "ok", f"{where}; this node is {case.node}")
    if isinstance(case.store, S3Store):
        source, cure = case.store.credentials(), "give the instance a role, or set AWS_ACCESS_KEY_ID and its secret"
        yield judge("credentials", bool(source), f"from {source}" if source else "none", "bad", cure)
    given = case.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if isinstance(case.store, GCSStore) and case.cloud and case.cloud.scheme == "gs" and not given:
        scopes = {scope.rpartition("/")[2] for scope in ask_scopes(case.environ)}
        good = bool({"cloud-platform", "devstorage.read_write", "devstorage.full_control"} & scopes)
        cure = "stop the VM; gcloud compute instances set-service-account VM --scopes=storage-rw; start it"
        yield judge("scopes", good, " ".join(sorted(scopes)) or "none", "bad", cure)


def check_reach(case: Case) -> Iterator[Finding]:
    """Reach the bucket, and compare clocks: S3 refuses what is 15 minutes off."""
    if isinstance(case.store, DirStore):
        path, size = case.store.url[7:], case.survey.size
        if not os.path.isdir(path):
            raise Unreachable(f"{quote(path)} is not there", "mount or make it, or the daemon makes it on another disk")
        disk, device = os.statvfs(path), os.stat(path).st_dev
        free, apart = disk.f_bavail * disk.f_frsize, all(os.stat(root).st_dev != device for root in case.directories)
        detail = f"{size_text(free)} free, {size_text(size)} to store"
        yield judge("room", free > size, detail, "bad", "make room there")
        detail = "apart from the data" if apart else "on the disk of the data, and lost with it"
        yield judge("mount", apart, detail, "warning", "mount another disk or an NFS share there")
    try:
        any(case.patient.list(f"{case.node}.listings/owner"))
        yield Finding("list", "ok", f"{case.store.url} answers")
    except Denied as fault:
        if not re.search("AccessDenied|: 403 for ", fault.what):  # no such bucket, no credentials, another region
            raise Unreachable(fault.what, fault.hint) from fault
        yield finding_of("list", fault)
    ahead = time.time() - case.store.now()
    worse: Result = "bad" if abs(ahead) > 300 else "warning"
    cure = "have chrony or systemd-timesyncd set this clock"
    yield judge("clock", abs(ahead) < 60, f"{abs(ahead):.0f} s from the store's", worse, cure)


def check_rights(case: Case) -> Iterator[Finding]:
    """Use each right once, on one key that is always the same: nothing piles up where it cannot be deleted."""
    store, key, body = case.patient, f"{case.node}.doctor", b"cassbackup doctor\n"
    rights: dict[str, Callable[[], object]] = {
        "put": lambda: case.store.put(key, body, zlib.crc32(body)),
        "head": lambda: store.head(key),
        "get": lambda: list(store.get(key)),
        "multipart": lambda: store.abandon(key, store.begin(key, 2 * PART_BYTES)),
        "unfinished": lambda: any(case.store.unfinished(f"{case.node}/")),
    }
    for right, use in rights.items():
        try:
            use()
        except (Conflict, Missing):  # only who has the right is told that the key is taken, or is not there
            pass
        except Denied as fault:
            yield Finding(right, "warning" if right == "unfinished" else "bad", fault.what, fault.hint)
            continue
        yield Finding(right, "ok", key)
    kept = "no right to, which is good for a daemon; prune needs it, elsewhere"
    gone = "may delete; safer is a daemon that may not, and a prune elsewhere that may"
    yield Finding("delete", "ok", kept if store.delete([key]) else gone)


def check_rules(case: Case) -> Iterator[Finding]:
    """Look for rules of the bucket that delete or archive what we list, and for what is paid for and of no use."""
    if not isinstance(case.store, (S3Store, GCSStore)):
        return
    try:
        rules, versions = list(case.store.rules()), case.store.versions()
    except Fault as fault:  # no right to ask, or a server that knows no rules
        yield Finding("lifecycle", "skipped", fault.what, "s3:GetLifecycleConfiguration, storage.buckets.get show it")
        return
    prefix = case.store.url.split("/", 3)[3:]
    ours = ["/".join([*prefix, case.node + end]) for end in ("/", ".listings/", ".condemned/")]
    hit = [rule for rule in rules if any(k.startswith(p) or p.startswith(k) for k in ours for p in rule.prefixes)]
    for rule in hit:
        cure = "take these backups out of it: what goes is for prune to say, and what is archived must be thawed"
        detail = f"rule {rule.name}: {' and '.join(sorted(rule.does)) or 'no harm'}"
        good = not {"expire", "archive"} & rule.does
        yield judge("lifecycle", good, detail, "bad" if "expire" in rule.does else "warning", cure)
    does = {word for rule in hit for word in rule.does}
    aborted = "abort" in does or isinstance(case.store, GCSStore)  # where they end by themselves
    cure = "a rule AbortIncompleteMultipartUpload after 7 days: the parts of a node that is gone are paid for, unseen"
    yield judge("uploads", aborted, f"broken ones are {'' if aborted else 'not '}cleared", "warning", cure)
    cure = "a rule NoncurrentVersionExpiration; else what prune deletes is paid for ever"
    yield judge("versioning", not versions or "trim" in does, versions or "off", "warning", cure)


def check_history(case: Case) -> Iterator[Finding]:
    """One name, one machine; when it was heard of, and when a prune last found something to delete."""
    node, store, now = case.node, case.patient, case.store.now()
    owner = read_page(store, f"{node}.listings/owner").get("machine_id")
    ours = not case.machine or owner in (None, case.machine)
    detail = f"{node} is free" if not owner else f"{node} belongs to {'this' if ours else 'another'} machine"
    cure = "give this node another --name; or --adopt, if it is the same node, rebuilt around its disk"
    yield judge("owner", ours, detail, "bad", cure)
    if heard := about_node(store, node).heard:
        silent, cure = now - seconds_of(heard), "see cassbackup status and systemctl status cassbackup"
        detail, good = f"{silent / 60:.0f} minutes ago", silent < 3 * case.settings.heartbeat
        detail += "; no daemon runs here" * (not case.holder)
        yield judge("heartbeat", good, detail, "bad" if case.holder else "warning", cure)
    oldest = min((filed.when for filed in filed_in(store, node)), default=now)
    condemned = max((head.modified for head in store.list(f"{node}.condemned/")), default=0.0)
    last = f"{(now - condemned) / 86400:.0f} days ago" if condemned else "no trace of one"  # till the next, if it found
    detail = f"the oldest listing is {(now - oldest) / 86400:.0f} days old; the last prune: {last}"
    cure = "cassbackup prune, or enable cassbackup-prune.timer; nothing, if all of it is to be kept"
    yield judge("prune", max(oldest, condemned) > now - _SILENT_S, detail, "warning", cure)


HERE: Final = (
    *(check_versions, check_data, check_links, check_unit, check_limits),
    *(check_state, check_cassandra, check_cost),
)
THERE: Final = (check_cloud, check_reach, check_rights, check_rules, check_history)


def examine(case: Case, checks: Iterable[Callable[[Case], Iterator[Finding]]]) -> Iterator[Finding]:
    """Do checks. What one of them runs into is its finding; a bucket that does not answer ends them."""
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            yield from check(case)
        except (Fault, OSError, ValueError, ArithmeticError, LookupError) as error:
            yield finding_of(name, error)
            if isinstance(error, Unreachable):
                yield Finding("bucket", "skipped", "whatever else is to be asked of it")
                return


# ======================================================================================================
# Report
# ======================================================================================================

_LATE_S: Final = 900.0  # as `status --max-lag`: what was listed that soon after it was found was never in danger
_OLD_S: Final = 26 * 3600.0  # as `status --max-age`
_FLUSH_S: Final = 3 * 3600.0  # tables of `system` are flushed every hour (SystemKeyspace), and linked like all
_ROLLUP_BYTES: Final = 32 * MIB  # of roll-ups to be read where prune has deleted what they stand for
_LEFT: Final = 200  # where the chart begins, in pixels
_WIDTH: Final = 720  # of the chart
_RUNS: Final = 600  # pieces of all lanes, with titles; or so: a page of 300 tables is smaller than 200 kB


class State(NamedTuple):
    """How a table stands at a moment, and how that looks: here by a mark, there by a colour and a pattern."""

    name: str
    mark: str
    plain: str  # the mark in ASCII
    ansi: str  # the colour of the mark (SGR)
    light: str
    dark: str
    pattern: str  # a path in a square of 6 pixels
    text: str


STATES: Final = MappingProxyType(  # the worst last
    {
        state.name: state
        for state in (
            State("absent", " ", " ", "0", "#ffffff", "#14181d", "", "no such table"),
            State("whole", "█", "#", "32", "#2f8f6b", "#3fa57e", "", "any moment can be restored"),
            State("points", "▒", ":", "36", "#7fb2dd", "#4d83b3", "M3 1v2", "no incrementals: up to 26 h lost"),
            State("waiting", "!", "!", "33", "#e3a92f", "#d29a2a", "M0 6L6 0", "found, but stored late"),
            State("silent", "?", "?", "35", "#a9b2bd", "#6b7683", "M1 3h2", "nothing heard: not known to be stored"),
            State("partial", "x", "x", "31", "#d9734f", "#cc6a48", "M0 0L6 6M0 6L6 0", "only an incomplete snapshot"),
            State("none", "-", "-", "31", "#b3364a", "#c2475b", "M0 3h6", "no snapshot yet, at most incrementals"),
        )
    }
)
_RANKS: Final = MappingProxyType({name: rank for rank, name in enumerate(STATES)})


class Span(NamedTuple):
    """A part of a node's life: incrementals are at work (on), or are not (off), or nothing is heard (silent)."""

    begin: float
    end: float
    what: str


def life_of(
    signs: Iterable[float], flushes: Iterable[float], beats: Sequence[float], now: float, away: Callable[[Span], bool]
) -> list[Span]:
    """Return a node's life from its first sign to now.

    `signs` are moments at which it saw or wrote anything, `flushes` those of incrementals, `beats` heartbeats in order.
    A daemon that lives is not silent for three heartbeats, nor, where they are kept no more, for three hours. While it
    is, Cassandra links on, and `away` tells whether that was found when it came back. Else incrementals were at work
    only between two of them that are no more than three hours apart.
    """
    distances = sorted(later - earlier for earlier, later in itertools.pairwise(beats))
    pause = 3 * max(HEARTBEAT_S, distances[len(distances) // 2] if beats[1:] else 0.0)
    own, gaps = sorted(moment for moment in flushes if moment <= now), list[Span]()
    moments = sorted({*own, *beats, *(moment for moment in signs if moment <= now), now})
    for last, first in itertools.pairwise(moments):
        gap = Span(last, first, "silent")
        if first - last > (pause if beats and last >= beats[0] else _FLUSH_S):
            gaps += [gap] * (first - last <= _FLUSH_S or first == now or away(gap))
    ends, lengths = [gap.end for gap in gaps], [0.0, *itertools.accumulate(gap.end - gap.begin for gap in gaps)]

    def lived(moment: float) -> float:
        return moment - lengths[bisect.bisect_right(ends, moment)]

    edges = itertools.pairwise([moments[0], *own, now])
    life = [Span(a, b, "off") for a, b in edges if not own or lived(b) - lived(a) > _FLUSH_S]
    # What is found when it comes back waits a moment to be listed.
    life += [gap._replace(end=min(gap.end + _LATE_S, now)) for gap in gaps]
    whole, at = list[Span](), moments[0]
    for span in sorted(life):
        whole += [Span(at, span.begin, "on")] * (at < span.begin)
        whole += [span._replace(begin=max(at, span.begin))] * (at < span.end)
        at = max(at, span.end)
    return [*whole, Span(at, now, "on")] if at < now else whole


def flushed_since(found: float, life: Iterable[Span]) -> float:
    """Return from when on that may have been flushed which was found at a moment: who comes back finds much."""
    gaps = (gap for gap in life if gap.what == "silent" and gap.end - _LATE_S - 60 <= found < gap.end)
    return min((gap.begin for gap in gaps), default=found - RECONCILE_S)


class Late(NamedTuple):
    """Incrementals that were listed late, or (math.inf) never whole."""

    found: float
    flushed: float  # perhaps as early as that
    listed: float


class Point(NamedTuple):
    """What a snapshot is good for: all that was flushed by its end, from when it was listed on."""

    listed: float
    end: float
    what: str  # whole, incomplete, truncated or dropped


@dataclass(frozen=True, slots=True)
class Lane:
    """What the bucket tells of one table."""

    keyspace: str
    table: str  # the directory's name
    first: float  # when it was first seen
    last: float  # when another table of this name was first seen
    points: tuple[Point, ...]  # by when they were listed
    late: tuple[Late, ...] = ()  # by when they were found

    @property
    def name(self) -> str:
        """Return ks.table."""
        return f"{self.keyspace}.{table_id_of(self.table)[0]}"


class Stretch(NamedTuple):
    """How a table stood for a time. A restore would have brought back all that was flushed by `since`; 0.0: nothing."""

    begin: float
    end: float
    state: str
    since: float


def _stand(
    base: Point, waiting: Sequence[Late], life: Sequence[Span], offs: Sequence[Span], at: float
) -> tuple[str, float]:
    """Return the state of a table at a moment, and through when it could be restored: base, then incrementals.

    An incremental that was never linked is lost to all moments until the next snapshot; one that was found late, since
    the daemon was away, is not.
    """
    state, since = "whole", at
    broken = bisect.bisect_right(offs, base.end, key=lambda span: span.end)
    here = life[bisect.bisect_left(life, at, key=lambda span: span.begin) - 1]
    if broken < len(offs) and offs[broken].begin < at:
        since = max(base.end, offs[broken].begin if offs[broken] != life[0] else 0.0)  # it had a life before
        state = "points" if at - since < _OLD_S else "silent"
    elif here.what == "silent":
        state, since = "silent", max(base.end, here.begin)
    since = min([since, *(max(base.end, one.flushed) for one in waiting if one.found > base.end)])
    return ("waiting" if state == "whole" and at - since >= _LATE_S else state), since


def stretches_of(lane: Lane, life: Sequence[Span], begin: float, now: float) -> list[Stretch]:
    """Return how a table stood between two moments, one stretch after the other.

    At each of them only what was listed by then counts, so that `restore --at` brings back just that.
    """
    cuts = {begin, now, lane.first, lane.last, *itertools.chain(*((one.flushed + _LATE_S, *one) for one in lane.late))}
    for moment in (*(point.end for point in lane.points), *(span.begin for span in life)):
        cuts |= {moment, moment + _OLD_S}
    moments = sorted(moment for moment in cuts | {point.listed for point in lane.points} if begin <= moment <= now)
    points, late, seen = deque(lane.points), deque(lane.late), False
    offs = [span for span in life if span.what == "off"]
    base, waiting, stretches = Point(0.0, 0.0, ""), list[Late](), list[Stretch]()
    for first, end in itertools.pairwise(moments):
        at, state, since = (first + end) / 2, "absent", 0.0
        while points and points[0].listed <= at:
            point, seen = points.popleft(), True
            if point.what != "incomplete" and (point.end, point.what == "whole") >= (base.end, base.what == "whole"):
                base = point
        while late and late[0].found <= at:
            waiting.append(late.popleft())
        waiting = [one for one in waiting if one.listed > at]
        if lane.first <= at < lane.last and base.what != "dropped":
            state, since = _stand(base, waiting, life, offs, at) if base.end else ("partial" if seen else "none", 0.0)
        since = end if state == "whole" else since
        if stretches and stretches[-1].state == state and (state == "whole" or stretches[-1].since == since):
            stretches[-1] = stretches[-1]._replace(end=end, since=since)
        else:
            stretches.append(Stretch(first, end, state, since))
    return stretches


@dataclass(frozen=True, slots=True)
class Picture:
    """What the bucket tells of a node, table by table, from one moment to another."""

    about: About
    begin: float
    now: float
    sure: float  # all that was found by then is listed, or known to wait
    lanes: tuple[tuple[Lane, list[Stretch]], ...]
    backups: tuple[list[Taking], ...]

    def standing(self, *but: str) -> list[tuple[Lane, Stretch]]:
        """Return how each table stands at the end, but for those in some states."""
        return [(lane, parts[-1]) for lane, parts in self.lanes if parts[-1].state not in ("absent", *but)]

    def loss(self, last: Stretch) -> float | None:
        """Return how many seconds of a table's flushes would be lost at the end; None is all of them."""
        since = min(last.since, self.sure) if last.state == "whole" else last.since
        return max(0.0, self.now - since) if since else None


class Chronicle:
    """Reads what a node's listings are called, and few of them, and keeps what a picture needs.

    That grows with tables and their snapshots, not with incrementals: of most of these only the minute is kept.
    """

    def __init__(self, store: Retrying, about: About, begin: float, now: float) -> None:
        self._store, self._about, self._begin, self._now = store, about, begin, now
        self._signs, self._flushes = set[float](), set[float]()
        self._first: dict[Table, float] = {}
        self._newest: dict[Table, float] = {}  # when an incremental was listed
        self._late: dict[Table, list[tuple[float, float]]] = {}
        self._takings: dict[Table, list[Taking]] = {}
        self._rollups: list[Filed] = []
        self._earliest: dict[float, Filed] = {}  # incrementals, of each hour the first

    def picture(self, words: Sequence[str], threads: int) -> Picture:
        """Return the picture of the tables that are meant. Raises Missing if there are none."""
        filed = filed_in(self._store, self._about.name)
        for table, group in itertools.groupby(filed, lambda one: (one.unit.keyspace, one.unit.table)):
            self._read_table(table, group, words)
        beats, page = self._read_beats()
        self._read_rollups(threads)
        life = life_of(self._signs, self._flushes, beats, self._now, self._was_away)
        sure = max([moment for moment in (*self._signs, *self._flushes) if moment <= self._now], default=self._now)
        with contextlib.suppress(LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
            sure = self._read_waiting(page, beats[-1])
        lanes = [(lane, stretches_of(lane, life, self._begin, self._now)) for lane in self._lanes(life, threads)]
        lanes.sort(key=lambda one: (one[0].keyspace.startswith("system"), one[0].keyspace, one[0].table))
        shown = tuple(one for one in lanes if any(part.state != "absent" for part in one[1]))
        if not shown:
            raise Missing(f"no table of {self._about.name} is meant", "`cassbackup list` shows what there is")
        takings = [one for one in itertools.chain(*self._takings.values()) if not is_automatic(one.unit.tag)]
        backups = [one for one in backups_of(takings) if seconds_of(one[0].unit.since) >= self._begin]
        return Picture(self._about, self._begin, self._now, sure, shown, tuple(backups))

    def _sign(self, signs: set[float], begin: float, end: float) -> None:
        signs |= {begin // 60 * 60, min(-(-end // 60) * 60, max(end, self._now))}

    def _read_table(self, table: Table, group: Iterable[Filed], words: Sequence[str]) -> None:
        snapshots, batch = list[Filed](), False
        for one in group:
            found = seconds_of(one.listed)
            if found > self._now:
                continue
            if one.unit.kind == "snapshot":
                snapshots.append(one)
                self._sign(self._signs, seconds_of(one.unit.since), found)
            elif one.state == "rollup" or one.unit.kind == "archive":
                self._rollups += [one] * (not batch and one.state == "rollup")
                batch = False
                self._sign(self._signs, found, found)
            else:
                batch = batch or one.state == "complete"  # what is not is not rolled up
                self._sign(self._flushes, found, one.when)
                first = self._earliest.setdefault(found // 3600, one)
                self._earliest[found // 3600] = one if one.listed < first.listed else first
                self._newest[table] = max(one.when, self._newest.get(table, 0.0))
                listed = one.when if one.state == "complete" else math.inf
                if listed - found > _LATE_S and listed > self._begin:
                    self._late.setdefault(table, []).append((found, listed))
            if one.unit.kind != "archive" and is_selected(one.unit, words):
                moment = min(found, seconds_of(one.unit.since or one.listed))
                self._first[table] = min(moment, self._first.get(table, moment))
        takings = [one for one in takings_of(snapshots) if not _PARTIAL.fullmatch(one.unit.tag)]
        past = [one for one in takings if one.complete and seconds_of(one.newest.listed) < self._begin]
        base = max((one.unit.since for one in past if not emptied_at(one.unit.tag)), default="")
        gone = {one.unit for one in past if one.unit.since != base and not emptied_at(one.unit.tag)}
        if table in self._first:
            self._takings[table] = [one for one in takings if one.unit not in gone]

    def _read_beats(self) -> tuple[list[float], dict[str, Any]]:
        prefix = f"{self._about.name}.listings/heartbeat/"
        stamps = [head.key.removeprefix(prefix).removesuffix(".json") for head in self._store.list(prefix)]
        stamps = sorted(stamp for stamp in stamps if is_utc(stamp) and seconds_of(stamp) <= self._now)
        page: dict[str, Any] = {}
        try:
            page = read_page(self._store, prefix + stamps[-1]) if stamps else {}
        except (Corrupt, Missing) as fault:
            warn_of(fault)
        return list(map(seconds_of, stamps)), page

    def _read_waiting(self, page: Mapping[str, Any], beat: float) -> float:
        """Take in which incrementals waited at the newest heartbeat; return when the daemon had looked everywhere."""
        for place, found in dict(page["oldest_incrementals"]).items():
            keyspace, _, table = place.partition("/")
            listed = self._newest.get((keyspace, table), 0.0)
            if math.isfinite(found) and listed < beat:  # else it was listed since: the oldest goes first
                self._late.setdefault((keyspace, table), []).append((float(found), math.inf))
        return seconds_of(utc_of(page["looked"]))

    def _read_rollups(self, threads: int) -> None:
        """Learn from roll-ups, the small ones first, when incrementals came whose own listings are gone."""
        smallest = sorted(self._rollups, key=lambda one: one.body)
        total = itertools.accumulate(one.body for one in smallest)
        few = (one for one, size in zip(smallest, total, strict=True) if size <= _ROLLUP_BYTES)
        ask = functools.partial(self._ask, lambda listing: {one.seen for one in listing.files})
        for seen in spread(ask, few, threads):
            for moment in map(seconds_of, filter(None, seen or ())):
                self._sign(self._flushes, moment, moment)

    def _ask(self, about: Callable[[Listing], T], filed: Filed) -> T | None:
        """Read a listing for what it tells; of one that cannot be read only the log does."""
        try:
            return about(read_filed(self._store, self._about.name, filed))
        except (Corrupt, Missing) as fault:
            warn_of(fault)
            return None

    def _was_away(self, gap: Span) -> bool:
        """Tell whether the first that was found after a silence had been flushed while it lasted."""

        def is_late(listing: Listing) -> bool:
            limit = seconds_of(listing.unit.since) - 2 * RECONCILE_S
            return any(gap.begin - 60 <= one.written < limit for one in sstables_of([listing]))

        filed = self._earliest.get(gap.end // 3600) or self._earliest.get(gap.end // 3600 + 1)
        return bool(filed and self._ask(is_late, filed))

    def _delay(self, backup: Sequence[Taking]) -> float:
        """Return how long after its end a snapshot was first seen: of all its tables alike, by the smallest listing."""
        smallest = min(backup, key=lambda taking: taking.newest.body)
        base = self._ask(base_on, smallest.newest)
        delay = seconds_of(smallest.unit.since) - base.end if base else 0.0
        return delay if delay > RECONCILE_S else 0.0

    def _points(self, threads: int) -> Iterator[tuple[Unit, Point]]:
        takings = list(itertools.chain(*self._takings.values()))
        backups = backups_of(one for one in takings if one.complete and not emptied_at(one.unit.tag))
        delays = spread(self._delay, backups, threads)
        delayed = {taking.unit: delay for backup, delay in zip(backups, delays, strict=True) for taking in backup}
        for one in takings:
            end, listed = seconds_of(one.unit.since), seconds_of(one.filed[0].listed)
            if emptied := emptied_at(one.unit.tag):
                yield one.unit, Point(listed, emptied, one.unit.tag.partition("-")[0])
                continue
            yield one.unit, Point(listed, end, "incomplete")
            for whole in [filed.listed for filed in one.filed if filed.state == "complete"][:1]:
                yield one.unit, Point(seconds_of(whole), end - delayed[one.unit], "whole")

    def _lanes(self, life: Sequence[Span], threads: int) -> Iterator[Lane]:
        points: dict[Table, list[Point]] = {}
        for unit, point in self._points(threads):
            points.setdefault((unit.keyspace, unit.table), []).append(point)
        after: dict[tuple[str, str], float] = {}
        for table, first in sorted(self._first.items(), key=lambda item: -item[1]):
            name = (table[0], table_id_of(table[1])[0])
            late = (Late(found, flushed_since(found, life), end) for found, end in sorted(self._late.get(table, ())))
            yield Lane(*table, first, after.get(name, math.inf), tuple(sorted(points.get(table, ()))), tuple(late))
            after[name] = first


def duration_text(seconds: float | None) -> str:
    """Return a duration for people, rounded up: 2 h 10 min; None is all there is."""
    if seconds is None:
        return "all of it"
    if seconds <= 59:
        return f"{math.ceil(seconds)} s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    if hours < 48:
        return " ".join([f"{hours} h"] * bool(hours) + [f"{minutes} min"] * (minutes > 0 or not hours))
    return f"{hours // 24} d" + f" {hours % 24} h" * (hours % 24 > 0)


def moment_text(moment: float) -> str:
    """Return a moment for people, in UTC."""
    return rfc3339(utc(moment))[:16].replace("T", " ")


def headline(picture: Picture) -> str:
    """Say the one thing that matters: what would be lost if the node died now."""
    rows, behind = picture.standing(), picture.standing("whole", "partial", "none")
    bare, parts = picture.standing("whole", "points", "waiting", "silent"), list[str]()
    if len(rows) > len(bare):
        loss = max(picture.loss(last) or 0.0 for _, last in behind or picture.standing("partial", "none"))
        where = f" to {len(behind)} of {len(rows)} tables" if behind else ""
        parts.append(f"up to {duration_text(loss)} of flushed writes{where} would be lost")
    if bare:
        parts.append(f"{len(bare)} of {len(rows)} tables are without a whole snapshot")
    return f"If {quote(picture.about.name)} died now: {'; '.join(parts) or 'it has no table to lose'}"


class Run(NamedTuple):
    """Columns of a lane that look the same."""

    first: int
    last: int
    state: str
    parts: list[Stretch]


def runs_of(parts: Sequence[Stretch], begin: float, now: float, columns: int) -> list[Run]:
    """Draw a lane in so many columns: of what falls into a column the worst is seen."""
    drawn, scale = ["absent"] * columns, columns / (now - begin)
    spans = [(int((one.begin - begin) * scale), math.ceil((one.end - begin) * scale), one) for one in parts]
    for first, end, part in spans:
        for column in range(first, min(end, columns)):
            drawn[column] = max(drawn[column], part.state, key=_RANKS.__getitem__)
    runs, first = list[Run](), 0
    for state, group in itertools.groupby(drawn):
        last = first + len(list(group))
        runs.append(Run(first, last, state, [p for a, b, p in spans if a < last and b > first and p.state == state]))
        first = last
    return runs


def strip_text(picture: Picture, width: int, plain: bool, colour: bool) -> str:
    """Return the picture for a terminal of a width: a line for each table, whose end says what would be lost now."""
    names = [quote(lane.name) for lane, _ in picture.lanes]
    label = min(max(map(len, names)), max(12, width // 3))
    columns = max(10, width - label - 14)
    lines, used = [headline(picture)], set[str]()

    def drawn(state: State, count: int) -> str:
        text = (state.plain if plain else state.mark) * count
        return f"\033[{state.ansi}m{text}\033[0m" if colour and text.strip() else text

    for name, (_, parts) in zip(names, picture.lanes, strict=True):
        runs = runs_of(parts, picture.begin, picture.now, columns)
        used |= {run.state for run in runs}
        bar = "".join(drawn(STATES[run.state], run.last - run.first) for run in runs)
        loss = "" if parts[-1].state == "absent" else duration_text(picture.loss(parts[-1]))
        short = name if len(name) <= label else f"{name[: label - 2]}.."
        lines.append(f"{short:{label}} {bar} {loss}".rstrip())
    begin, now = moment_text(picture.begin), moment_text(picture.now)
    gap = columns - len(begin) - len(now)
    lines.append(" " * (label + 1) + (f"{begin}{' ' * gap}{now}" if gap > 0 else now[-columns:]))
    lines += [f"{drawn(one, 1)} {one.text}" for one in STATES.values() if one.name in used - {"absent"}]
    return "\n".join(lines)


def _e(text: str) -> str:
    """Spell a name so that a page shows it and does nothing else."""
    return html.escape(quote(text).replace("%25", "%"))


_STYLE: Final = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b242d;--soft:#5b6875;--line:#e4e8ec;LIGHT}
@media(prefers-color-scheme:dark){:root{--paper:#14181d;--ink:#e6eaee;--soft:#98a4b0;--line:#2a323a;DARK}}
body{margin:0 auto;padding:32px 24px 48px;max-width:1100px;background:var(--paper);color:var(--ink);
font:14px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{margin:0 0 6px;font-size:21px;line-height:1.3;font-weight:650;text-wrap:balance}
h2{margin:0 0 8px;font-size:15px;font-weight:650} p{margin:0 0 20px;color:var(--soft)} svg{display:block}
section+section{margin-top:56px;padding-top:40px;border-top:1px solid var(--line)} .wide{overflow-x:auto}
text{font-size:12px;fill:var(--ink)} .soft{fill:var(--soft)} .key{font-weight:650} .whole{fill:var(--whole)}
.end{text-anchor:end} .mid{text-anchor:middle} .grid{stroke:var(--line)}
.cut{stroke:var(--paper);stroke-width:1.5;fill:none} .ring{fill:var(--paper);stroke:var(--none);stroke-width:1.6}
ul{display:flex;flex-wrap:wrap;gap:4px 24px;margin:20px 0 28px;padding:0;list-style:none;color:var(--soft)}
li svg{display:inline-block;margin-right:8px;vertical-align:-2px} table{border-collapse:collapse;width:100%}
th,td{padding:6px 16px 6px 0;border-bottom:1px solid var(--line);text-align:left}
th{font-weight:400;color:var(--soft)} .num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
"""


def _style() -> str:
    light, dark = ("".join(f"--{one.name}:{one[tone]};" for one in STATES.values()) for tone in (4, 5))
    fills = (f".{one.name}{{fill:url(#p-{one.name})}}" for one in STATES.values() if one.pattern)
    return _STYLE.replace("LIGHT", light).replace("DARK", dark) + "\n".join(fills)


def _patterns() -> str:
    square = '<pattern id="p-{0}" width="6" height="6" patternUnits="userSpaceOnUse">'
    square += '<path d="M0 0h6v6h-6z" style="fill:var(--{0})"/><path class="cut" d="{1}"/></pattern>'
    drawn = "".join(square.format(one.name, one.pattern) for one in STATES.values() if one.pattern)
    return f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{drawn}</defs></svg>'


def _legend(states: Collection[str]) -> str:
    swatch = '<svg width="24" height="12" aria-hidden="true"><path class="{}" d="M0 0h24v12h-24z"/></svg>'
    shown = (one for one in STATES.values() if one.name in states and one.name != "absent")
    return "".join(f"<li>{swatch.format(one.name)}{one.text}</li>" for one in shown)


def _axis(picture: Picture, height: int) -> Iterator[str]:
    """Yield lines at full hours, days or weeks, ten of them at most."""
    span, hours = picture.now - picture.begin, (1, 3, 6, 12, 24, 48, 120, 240, 720, 2160, 8640)
    step = next((hour * 3600 for hour in hours if span / hour <= 9 * 3600), math.ceil(span / 9))
    for moment in range(math.ceil(picture.begin / step) * step, int(picture.now) + 1, step):
        x = f"{_LEFT + (moment - picture.begin) / span * _WIDTH:.1f}"
        text = datetime.fromtimestamp(moment, timezone.utc).strftime("%b %-d" if step % 86400 == 0 else "%H:%M")
        yield f'<path class="grid" d="M{x} 20V{height}"/><text class="soft mid" x="{x}" y="12">{text}</text>'


def _dots(picture: Picture) -> Iterator[str]:
    """Yield a mark for each snapshot, one in five pixels: a ring where it is not whole."""
    dots: dict[int, str] = {}
    for backup in picture.backups:
        moment, whole = seconds_of(backup[0].unit.since), all(taking.complete for taking in backup)
        x = int((moment - picture.begin) / (picture.now - picture.begin) * _WIDTH)
        text = f"{backup[0].unit.tag}, {moment_text(moment)}, {len(backup)} tables{', not whole' * (not whole)}"
        if x // 5 not in dots or not whole:
            place = f'class="{"whole" if whole else "ring"}" cx="{_LEFT + x}" cy="31" r="2.5"'
            dots[x // 5] = f"<circle {place}><title>{_e(text)}</title></circle>"
    yield from dots.values()


def _title(lane: Lane, run: Run) -> str:
    """Return what is shown where the pointer rests."""
    losses = [part.end - part.since for part in run.parts if part.since and part.state != "whole"]
    lost = f", up to {duration_text(max(losses))} lost" if losses else ""
    span = f"{moment_text(run.parts[0].begin)} to {moment_text(run.parts[-1].end)}"
    return f"<title>{_e(f'{lane.name}, {span}: {STATES[run.state].text}{lost}')}</title>"


def _lane(picture: Picture, lane: Lane, last: Stretch, runs: Sequence[Run], y: int, titles: bool) -> Iterator[str]:
    name, kind = table_id_of(lane.table)[0], ' class="key"' * (last.state != "whole")
    short = _e(name) if len(name) <= 28 else f"{_e(name[:27])}…<title>{_e(lane.name)}</title>"
    yield f'<text class="end" x="{_LEFT - 12}" y="{y + 10}">{short}</text>'
    scale = _WIDTH / runs[-1].last
    for run in runs:
        if run.state != "absent":
            width = f"{(run.last - run.first) * scale:g}"
            place = f"M{_LEFT + run.first * scale:g} {y}h{width}v12h-{width}z"
            yield f'<path class="{run.state}" d="{place}">{_title(lane, run) * titles}</path>'
    loss = "gone" if last.state == "absent" else duration_text(picture.loss(last))
    yield f'<text{kind} x="{_LEFT + _WIDTH + 12}" y="{y + 10}">{loss}</text>'


def _svg(picture: Picture) -> str:
    """Draw the lanes of a node, keyspace by keyspace; as coarsely as it takes for a page of bounded size."""
    columns, runs = _WIDTH, list[list[Run]]()
    while not runs or (columns >= 20 and sum(map(len, runs)) > 3 * _RUNS):
        runs = [runs_of(parts, picture.begin, picture.now, columns) for _, parts in picture.lanes]
        columns //= 2
    lines, y, keyspace = list[str](), 36, None
    for (lane, parts), drawn in zip(picture.lanes, runs, strict=True):
        if lane.keyspace != keyspace:
            keyspace, y = lane.keyspace, y + 30
            lines.append(f'<text class="key" x="0" y="{y - 6}">{_e(keyspace)}</text>')
        lines += _lane(picture, lane, parts[-1], drawn, y, sum(map(len, runs)) <= _RUNS)
        y += 18
    head = f'<text class="soft end" x="{_LEFT - 12}" y="35">snapshots</text>' * bool(picture.backups)
    head += f'<text class="soft" x="{_LEFT + _WIDTH + 12}" y="12">lost, if now</text>'
    size = f'width="{_LEFT + _WIDTH + 110}" height="{y + 6}"'
    label = f'role="img" aria-label="{_e(headline(picture))}"'
    return f"<svg {size} {label}>{''.join([*_axis(picture, y), head, *_dots(picture), *lines])}</svg>"


def _table(picture: Picture) -> str:
    """Return what is not restorable to any moment now, the worst first."""
    rows = sorted(picture.standing("whole"), key=lambda row: (-_RANKS[row[1].state], row[1].since, row[0].name))
    if not rows:
        return "<h2>Nothing is unprotected now</h2>"
    cells = "".join(
        f"<tr><td>{_e(lane.name)}</td><td>{STATES[last.state].text}</td>"
        f'<td class="num">{moment_text(last.since) if last.since else "–"}</td>'
        f'<td class="num">{duration_text(picture.loss(last))}</td></tr>'
        for lane, last in rows
    )
    head = '<th>table</th><th>why</th><th class="num">restorable to, UTC</th><th class="num">lost, if now</th>'
    return f'<h2>Unprotected now</h2><div class="wide"><table><tr>{head}</tr>{cells}</table></div>'


def report_page(pictures: Sequence[Picture]) -> str:
    """Return one page with all pictures: well-formed, without a script, and without anything from elsewhere."""
    sections = []
    for picture in pictures:
        about = f"cluster {picture.about.cluster}, " * bool(picture.about.cluster)
        about += f"{moment_text(picture.begin)} to {moment_text(picture.now)} UTC, as the bucket's listings tell it. "
        about += "At each moment: what would a restore have brought back, had the node died then? Flushed data alone: "
        about += "what was in memtables is in the commit log, which cassbackup stores with --include."
        states = {part.state for _, parts in picture.lanes for part in parts}
        body = f'<h1>{_e(headline(picture))}.</h1><p>{_e(about)}</p><div class="wide">{_svg(picture)}</div>'
        sections.append(f"<section>{body}<ul>{_legend(states)}</ul>{_table(picture)}</section>")
    title = f"cassbackup report: {', '.join(picture.about.name for picture in pictures)}"
    rule = "default-src 'none'; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"/><meta http-equiv="Content-Security-Policy" content="{rule}"/>'
    head += f'<meta name="viewport" content="width=device-width"/><title>{_e(title)}</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head>{head}<style>{_style()}</style></head>'
        f"<body>{_patterns()}{''.join(sections)}</body></html>\n"
    )


def report_document(picture: Picture) -> dict[str, Any]:
    """Return what JSON says of a node."""
    tables = []
    for lane, parts in picture.lanes:
        page: dict[str, Any] = {"table": f"{lane.keyspace}.{lane.table}", "now": parts[-1].state}
        page["loss_s"] = None if parts[-1].state == "absent" else picture.loss(parts[-1])
        page["intervals"] = [
            {"from": rfc3339(utc(one.begin)), "to": rfc3339(utc(one.end)), "state": one.state}
            | ({"restorable_to": rfc3339(utc(one.since))} if one.since and one.state != "whole" else {})
            for one in parts
        ]
        tables.append(page)
    told = {"name": picture.about.name, "cluster": picture.about.cluster, "headline": headline(picture)}
    moments = {"from": picture.begin, "to": picture.now, "sure_to": picture.sure}
    told |= {name: rfc3339(utc(moment)) for name, moment in moments.items()}
    return {**told, "unprotected": len(picture.standing("whole")), "tables": tables}


# ======================================================================================================
# Common ground
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


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are in which bucket: decided once, then remembered."""

    node: str
    instance: str
    url: str
    region: str


def yaml_list(text: str, key: str) -> list[str]:
    """Read one list of strings from a YAML file, in either of its spellings: - a on lines below, or [a, b]."""
    match = re.search(rf"^{key}:(.*(?:\n(?:[ \t\r#-].*)?)*)", text, re.M)
    block = re.sub(r"(^|\s)#.*", r"\1", match[1], flags=re.M).strip() if match else ""
    items = block.strip("[]").split(",") if block.startswith("[") else re.findall(r"^\s*-\s+(.*)$", block, re.M)
    return [name for item in items if (name := item.strip().strip("\"'"))]


def cassandra_yaml() -> str:
    """Return the text of cassandra.yaml, "" where there is none."""
    for path in ("/etc/cassandra/cassandra.yaml", "/etc/cassandra/conf/cassandra.yaml"):
        if os.path.exists(path):
            with open(path, errors="surrogateescape") as file:
                return file.read()
    return ""


def data_directories(paths: Sequence[str]) -> list[str]:
    """Return the directories to watch: as given, as cassandra.yaml says, or where Cassandra usually keeps its data."""
    found = list(paths) or yaml_list(cassandra_yaml(), "data_file_directories")
    found = found or [path for path in ("/var/lib/cassandra/data", "/data") if os.path.isdir(f"{path}/system")]
    if not found:
        raise Usage("no data directory found", "name it: cassbackup /var/lib/cassandra/data")
    found = list(dict.fromkeys(map(os.path.abspath, found)))
    for path in found:
        if not os.path.isdir(path):
            problem = "not a directory" if os.path.exists(path) else "not there"
            raise Usage(f"{quote(path)} is {problem}", "name a directory")
        if not os.access(path, os.R_OK | os.X_OK):
            raise Usage(f"{quote(path)} cannot be read", "run as the owner of the data (user cassandra)")
        if any(path != other and path.startswith(other.rstrip("/") + "/") for other in found):
            raise Usage(f"{quote(path)} is inside another directory to watch", "name only the outer one")
    return found


def open_state(path: str) -> None:
    """Make the state directory. Raises Usage."""
    probe = os.path.join(path, ".probe")
    try:
        os.makedirs(path, 0o755, exist_ok=True)
        write_whole(probe, b"")
        os.unlink(probe)
    except OSError as error:
        raise Usage(f"state directory {quote(path)} cannot be written ({error.strerror})", "pass --state-dir") from None


def become_owner(path: str, state_dir: str = "") -> None:
    """Become the owner of the data directory if we are root: links need it, and restores get the right owner."""
    info = os.stat(path)
    if os.geteuid() != 0 or info.st_uid == 0:
        return
    if state_dir:
        os.chown(state_dir, info.st_uid, info.st_gid)
    try:
        os.initgroups(pwd.getpwuid(info.st_uid).pw_name, info.st_gid)
    except KeyError:  # a user without a name, as in a container
        os.setgroups([])
    os.setgid(info.st_gid)
    os.setuid(info.st_uid)


def read_json(path: str) -> dict[str, Any]:
    """Return a JSON object from a file of ours, {} where there is none that can be read."""
    try:
        with open(path) as file:
            page = json.load(file)
    except (OSError, ValueError):
        return {}
    return page if isinstance(page, dict) else {}


def read_machine_id() -> str:
    """Return the id of this installation, machine-id(5); "" where there is none."""
    try:
        with open("/etc/machine-id") as file:
            return file.read().strip()
    except OSError:
        return ""


def host_name() -> str:
    """Return the fully qualified name, unless /etc/hosts calls this machine localhost first."""
    full = socket.getfqdn()
    return socket.gethostname() if full.startswith("localhost") else full


def url_of(settings: Settings, scheme: str) -> str:
    """Return the store's URL; a bucket's bare name needs the scheme of the cloud that we run in. Raises Usage."""
    bucket, prefix = settings.bucket, settings.prefix.strip("/")
    if "://" not in bucket:
        if scheme not in ("s3", "gs"):
            hint = f"write BUCKET_NAME=s3://{bucket}, gs://{bucket} or file:///directory"
            raise Usage("neither AWS nor GCE answers, so this bucket could be anywhere", hint)
        bucket = f"{scheme}://{bucket}"
    return f"{bucket.rstrip('/')}/{prefix}" if prefix else bucket


def identify(settings: Settings, environ: Mapping[str, str], known: Mapping[str, str]) -> Identity:
    """Decide the node's name and the store's URL.

    A changed host name with the same instance id keeps the name; a changed instance id is a new node; a failed
    detection changes nothing.
    """
    if not settings.bucket:
        raise Usage("no bucket", "set BUCKET_NAME in /etc/default/cassbackup, or pass --bucket")
    bare, machine_id = "://" not in settings.bucket, read_machine_id()
    settled = settings.name or known.get("instance") == machine_id[:12]  # off cloud, and still the same machine
    cloud = detect_cloud(environ) if bare or not settled else None
    instance = cloud.instance if cloud else known.get("instance", machine_id[:12])
    scheme = cloud.scheme if cloud else known.get("url", "").partition(":")[0]
    url = url_of(settings, scheme)
    if settings.name:
        node = check_node(settings.name)
    elif known.get("node") and known.get("instance") == instance:
        node = known["node"]
    else:
        node = name_node(cloud, host_name(), machine_id)
    return Identity(node, instance, url, settings.region or (cloud.region if cloud else known.get("region", "")))


def claim(store: Retrying, identity: Identity, areas: Sequence[Area], adopt: bool, memories: Iterable[str]) -> None:
    """Be the owner of the node's name in the bucket, or become it. Raises Usage where somebody else is."""
    prefix, owner = f"{identity.node}.listings/owner", read_machine_id() or areas[0].id
    page = read_page(store, prefix)
    ours = page.get("machine_id") == owner
    if page and not ours and not adopt:
        hint = "give this node another --name; or --adopt, if it is the same node, rebuilt around its disk"
        raise Usage(f"{identity.node} in {store.url} belongs to another machine ({page.get('machine_id')})", hint)
    if not ours:
        directories = [quote(area.root) for area in areas]
        body = json.dumps({"version": 1, "machine_id": owner, "data_directories": directories}).encode()
        store.put(f"{prefix}.{utc(time.time())}.json" if page else f"{prefix}.json", body, zlib.crc32(body))
    for path in memories:
        if read_json(path) != asdict(identity):  # on a full disk nothing can be written, and much must be stored
            write_whole(path, json.dumps(asdict(identity)).encode())


def try_claim(claim_name: Callable[[Retrying], None], store: Retrying, once: bool) -> bool:
    """Claim the node's name; False where that must wait, since the store is down. A refusal is a wrong setting."""
    try:
        claim_name(store)
    except Denied as fault:
        raise Usage(fault.what, fault.hint) from fault
    except Unreachable as fault:
        if once:
            raise
        log.error("store does not answer, watching all the same error=%s", quote(str(fault)))
        return False
    return True


def access_of(settings: Settings, region: str) -> Access:
    """Return how to talk to the store."""
    if settings.kms_key and settings.sse and settings.sse != "aws:kms":
        raise Usage(f"--kms-key does not go with --sse {settings.sse}", "use --sse aws:kms")
    if "flag" in (settings.all["access_key"].origin, settings.all["secret_key"].origin):
        log.warning("every user of this machine can read keys on a command line hint=use the environment or a role")
    encryption = (settings.sse or ("aws:kms" if settings.kms_key else ""), settings.kms_key, settings.storage_class)
    keys = (settings.access_key, settings.secret_key, settings.threads)
    return Access(region, settings.endpoint_url, settings.ca_file, *encryption, *keys)


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


def filters_of(settings: Settings) -> Filters:
    """Return what is to be stored."""
    globs = (settings.keyspace, settings.exclude_keyspace, settings.exclude_table, settings.exclude_tag)
    return Filters(*globs, settings.since, settings.include, settings.exclude)


class Nodetool:
    """Cassandra's own nodetool, as the operator calls it."""

    def __init__(self, command: str, timeout: float | None = None) -> None:
        self._command, self._timeout = shlex.split(command), timeout

    def __call__(self, *words: str) -> str:
        """Run a command of nodetool; return what it says. Raises Fault where it fails, or takes too long."""
        whole, timeout = [*self._command, *words], self._timeout
        try:
            done = subprocess.run(whole, check=False, capture_output=True, text=True, timeout=timeout)
        except OSError as error:
            raise Usage(f"{self._command[0]} cannot be run ({error.strerror})", "pass --nodetool") from None
        except subprocess.TimeoutExpired:
            raise Fault(f"{self._command[0]} {words[0]} did not answer in {timeout:.0f} s") from None
        if done.returncode:
            told = [line for line in f"{done.stderr}\n{done.stdout}".splitlines() if line.strip()]  # it uses either
            named = [line for line in told if line.startswith(("nodetool:", "error:"))] or told or ["it says nothing"]
            raise Fault(f"{self._command[0]} {' '.join(words)}: {quote(named[0])}", "is Cassandra running?")
        return done.stdout

    def _knows(self, *names: str) -> bool:
        with contextlib.suppress(Fault):
            self("tablestats", *names)
            return True
        return False

    def check(self, tables: Iterable[tuple[str, str]]) -> str:
        """Return Cassandra's version, after a look whether it answers and has these tables. Raises Fault, Missing."""
        version = self("version").partition(":")[2].strip()
        names = [".".join(table) for table in tables]  # each call is the start of a JVM
        absent = [] if self._knows(*names) else [name for name in names if not self._knows(name)]
        if absent:
            hint = "create them first; `cassbackup restore --schema-only` brings their schema"
            raise Missing(f"Cassandra has no table {', '.join(absent)}", hint)
        if "not running" not in self("statusbackup"):
            log.warning(
                "incremental backup is on: what is imported is linked into backups/ hint=nodetool disablebackup"
            )
        return version


def columns(rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Return a table for people."""
    texts = [[quote(str(cell)).replace("%25", "%") for cell in row] for row in rows]  # some are quoted already
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


def show_rate(what: str, total: int, shown: bool) -> Progress:
    """Return what tells how far a transfer of so many bytes (0: unknown) is, on a terminal or in the log."""
    began, said = time.monotonic(), [time.monotonic()]

    def show(done: int) -> None:
        now = time.monotonic()
        if now - said[0] < (0.2 if shown else 10.0) and (not total or done < total):
            return
        said[0], rate = now, done / max(0.001, now - began)
        eta = f", {(total - done) / rate:.0f} s to go" if rate and done < total else ""
        text = f"{what} {size_text(done)}{f' of {size_text(total)}' * bool(total)} ({size_text(rate)}/s){eta}"
        if shown:
            print(f"\033[K{text}", end="\n" if done >= total else "\r", file=sys.stderr, flush=True)
        else:
            log.info("%s", text)

    return show


# ======================================================================================================
# On the node
# ======================================================================================================


def assemble(settings: Settings, areas: Sequence[Area], node: str, store: Retrying, stop: threading.Event) -> Daemon:
    """Join the rooms."""
    ledger = Ledger(os.path.join(settings.state_dir, "ledger.sqlite"), f"{store.url} {node}")
    backlog, watcher, clock = Backlog(), Watcher(), Clock()
    pinner = Pinner(areas, watcher, filters_of(settings), clock, ledger.listed, backlog.touch)
    uploaders = Uploaders(
        store,
        settings.threads,
        pinner.gate,
        lambda key: ledger.fact(f"upload:{key}"),
        lambda key, upload: ledger.remember(f"upload:{key}", upload),
    )
    policy = Policy(settings.settle, settings.full, settings.delete_uploaded_incrementals)
    carrier = Carrier(pinner, store, uploaders, node, ledger, clock, policy)
    limits, timing = Limits(settings.max_pinned, settings.free_floor), Timing(settings.reconcile, settings.heartbeat)
    return Daemon(settings.state_dir, pinner, backlog, carrier, uploaders, store, ledger, clock, limits, timing, stop)


def show_progress(page: Mapping[str, Any]) -> None:
    """Write how far we are over the line that said it last; the next line of the log goes over it too."""
    sent, files = page["sent"], page["pending"]["files"]
    rate = sent["bytes"] / max(0.001, time.time() - page["started"])
    text = f"{sent['files']} files, {size_text(sent['bytes'])} sent ({size_text(rate)}/s), {files} to go"
    print(f"\033[K{text}", end="\r", file=sys.stderr, flush=True)


def open_disks(settings: Settings) -> list[Area]:
    """Open the state directory and the pin areas of all data directories. Raises Usage; Fault if it went well once."""
    try:
        directories = data_directories(settings.paths)
        open_state(settings.state_dir)
        become_owner(directories[0], settings.state_dir)
        lock_file(os.path.join(settings.state_dir, "lock"))
        return [open_area(path, settings.pin_dir) for path in directories]
    except Usage as fault:
        areas = [path for root in settings.paths for path in area_paths(os.path.realpath(root), settings.pin_dir)]
        if any(read_json(os.path.join(folder, "identity.json")) for folder in (settings.state_dir, *areas)):
            raise Fault(fault.what, fault.hint) from fault  # a disk that is away: whoever started us is to try again
        raise


def watch(settings: Settings, environ: Mapping[str, str]) -> int:
    """Watch, pin, store and list, until asked to stop; with --once until everything is listed."""
    state_dir, once, areas = settings.state_dir, settings.once, open_disks(settings)
    metrics = Metrics(settings.metrics_listen, settings.metrics_textfile)
    for area in areas:
        name_forgotten(area)
    memories = [os.path.join(folder, "identity.json") for folder in (state_dir, *(area.path for area in areas))]
    known = next(filter(None, map(read_json, memories)), {})
    identity = identify(settings, environ, known)
    stop, budget = stop_on_signals(), Budget(settings.max_bandwidth)
    worked = known.get("url") == identity.url
    raw = open_store(identity.url, access_of(settings, identity.region), new=not worked)
    store = Retrying(raw, stop.wait, 120.0 if once else None, budget)

    def claim_name(through: Retrying) -> None:
        claim(through, identity, areas, settings.adopt, memories)

    # A daemon that has worked here before pins first: a store that hangs must not cost what is cleared meanwhile.
    claimed = (once or not worked) and try_claim(claim_name, Retrying(raw, stop.wait, 5.0, budget), once)
    daemon = assemble(settings, areas, identity.node, store, stop)
    daemon.systemd, metrics.daemon = Systemd(environ), daemon
    daemon.metrics = metrics.write if settings.metrics_textfile else None
    paths = quote(" ".join(area.root for area in areas))
    log.info("watching node=%s store=%s paths=%s", identity.node, store.url, paths)
    shown = once and sys.stderr.isatty()
    claim_later = None if claimed else lambda: claim_name(store)
    code = daemon.run(once, claim_later, show_progress if shown else lambda page: None)
    if shown:
        show_progress(daemon.status())
        print(file=sys.stderr)
    return code


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


def ask_status(state_dir: str, waiter: threading.Event, look: bool = False) -> dict[str, Any]:
    """Return the daemon's status, as fresh as it can be had; with `look` it is to look for new files first."""
    asked, path = time.time(), os.path.join(state_dir, "ask")
    with contextlib.suppress(OSError), open(path, "w") as file:  # other users, who cannot write it, wait a little
        file.write("look" * look)
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
    if refused := page.get("refused"):  # absent while a daemon of an earlier version runs on
        others = f", and {len(refused) - 1} more directories" if len(refused) > 1 else ""
        why.append(f"nothing is stored of {quote(refused[0])}{others}: see the log")
    snapshots = sorted(page.get("snapshots", {}).items())
    never = [table for table, taken in snapshots if not taken]
    old = [table for table, taken in snapshots if taken and now - seconds_of(taken) > max_age]
    for tables, what in ((never, "no whole snapshot"), (old, f"no whole snapshot of the last {max_age / 3600:.0f} h")):
        if tables:
            others = f", and {len(tables) - 1} more tables" if len(tables) > 1 else ""
            why.append(f"{what} of {tables[0]}{others}")
    return why


def status_text(page: Mapping[str, Any], behind: Sequence[str]) -> str:
    """Return the status for people."""
    pending, sent, counts = page["pending"], page["sent"], page["counts"]
    rate = page.get("rate", 0.0)  # absent, too
    eta = f", at least {pending['bytes'] / rate:.0f} s to go" if pending["bytes"] and rate else ""
    lines = [
        f"node      {page['node']}",
        f"store     {page['store']}",
        f"pending   {pending['units']} units, {pending['files']} files, {size_text(pending['bytes'])}{eta}",
        f"lag       {page['lag_s']:.0f} s",
        f"sent      {sent['files']} files, {size_text(sent['bytes'])} since {rfc3339(utc(page['started']))[:19]}Z",
        f"listings  {counts.get('listings', 0)}, the newest {page['newest_listing'] or 'none'}",
        f"lost      {counts.get('lost', 0) + counts.get('vanished', 0)} files",
    ]
    return "\n".join(lines + [f"BEHIND    {why}" for why in behind])


def status(settings: Settings, environ: Mapping[str, str]) -> int:
    """Show how far behind the daemon is. Exit 3: behind, or nobody is at work."""
    waiter, began, looked = threading.Event(), time.time(), False
    while True:
        page = ask_status(settings.state_dir, waiter, settings.wait and not looked)
        holder, looked = holder_of(settings.state_dir), page["looked"] > began  # no hint may have told of the newest
        caught_up = looked and page.get("quiet") and not page["pending"]["units"]
        if not settings.wait or caught_up or not holder:
            break
        waiter.wait(0.5)
    behind = why_behind(page, holder, settings.max_lag, settings.max_age, time.time())
    print(json.dumps(page | {"behind": behind}) if settings.json else status_text(page, behind))
    return BEHIND if behind else DONE


def config(settings: Settings, environ: Mapping[str, str]) -> int:
    """Show each setting, its value and where it came from."""
    for name, setting in settings.all.items():
        value = setting.value
        if name in ("access_key", "secret_key") and value:
            value = "(hidden)"
        elif isinstance(value, re.Pattern):
            value = value.pattern
        elif isinstance(value, (list, tuple)):
            value = " ".join(value)
        print(f"{name.replace('_', '-'):30} {'' if value is None else value!s:40} {setting.origin}")
    return DONE


def ring_place(nodetool: Nodetool) -> dict[str, Any]:
    """Return what a successor needs to know of this node: cluster, host id, tokens, dc, rack, addresses."""
    info, cluster = nodetool("info", "-T"), nodetool("describecluster")

    def told(name: str, text: str) -> list[str]:
        return re.findall(rf"^\s*{name}\s*:\s*(.+?)\s*$", text, re.M)

    host_id = "".join(told("ID", info)[:1])
    rows = [line.split() for line in nodetool("status").splitlines() if host_id and host_id in line]
    page: dict[str, Any] = {"version": 1, "host_id": host_id, "addresses": [row[1] for row in rows]}
    page |= {"cluster": "".join(told("Name", cluster)[:1]), "partitioner": "".join(told("Partitioner", cluster)[:1])}
    page |= {"dc": "".join(told("Data Center", info)[:1]), "rack": "".join(told("Rack", info)[:1])}
    return page | {"tokens": told("Token", info), "cassandra": nodetool("version").partition(":")[2].strip()}


def tables_with_snapshot(directories: Sequence[str], tag: str, filters: Filters) -> set[Table]:
    """Return the tables that have a snapshot of this tag on disk which is to be stored."""
    tables = set()
    for root in directories:
        for keyspace in os.listdir(root):
            with contextlib.suppress(NotADirectoryError, FileNotFoundError):
                for table in os.listdir(os.path.join(root, keyspace)):
                    wanted = filters.directory([keyspace]) and filters.directory([keyspace, table])
                    if wanted and os.path.isdir(os.path.join(root, keyspace, table, "snapshots", tag)):
                        tables.add((keyspace, table))
    return tables


def snapshot_size(directories: Sequence[str], tag: str, table: Table) -> int:
    """Return the bytes of a table's snapshot on disk."""
    size = 0
    for root in directories:
        for folder, _, names in os.walk(os.path.join(root, *table, "snapshots", tag)):
            with contextlib.suppress(FileNotFoundError):  # cleared by somebody else, or by its --ttl
                size += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    return size


def listed_of(store: Retrying, node: str, table: Table, tag: str, since: str) -> str:
    """Return the key of a complete listing of a table's snapshot that was taken since then, "" if there is none."""
    prefix = listings_of(node, Unit("snapshot", *table, tag, "x"))[: -len("x/")]
    filed = (filed_as(node, head) for head in store.list(prefix, prefix + since[:-1]))
    return max((one.key for one in filed if one and one.state == "complete"), default="")


class SnapshotWait:
    """Waits until a snapshot is listed whole: by the daemon, or, where there is none, by storing it here."""

    def __init__(self, store: Retrying, identity: Identity, settings: Settings, tag: str, since: str) -> None:
        self._store, self._node, self._settings, self._tag, self._since = store, identity.node, settings, tag, since
        self.keys: dict[Table, str] = {}  # the listings, by table

    def check(self, tables: set[Table]) -> set[Table]:
        """Return the tables that are not listed complete."""
        asked = sorted(tables - self.keys.keys())
        find = functools.partial(listed_of, self._store, self._node, tag=self._tag, since=self._since)
        found = zip(asked, spread(find, asked, self._settings.threads), strict=True)
        self.keys |= {table: key for table, key in found if key}
        return tables - self.keys.keys()

    def wait(self, tables: Mapping[Table, int], store_here: Callable[[], int]) -> set[Table]:
        """Return which of these tables, given with their bytes, will not be listed complete."""
        began, said, waiter, total = time.time(), time.monotonic(), threading.Event(), sum(tables.values())
        show, first = show_rate(f"{self._tag}: stored", total, sys.stderr.isatty()), dict[str, Any]()
        while left := self.check(set(tables)):
            if not holder_of(self._settings.state_dir):
                with contextlib.suppress(Busy):  # a daemon was started just now
                    store_here()
                    return self.check(set(tables))
            page = ask_status(self._settings.state_dir, waiter)
            if page["looked"] > began and page["quiet"] and not page["pending"]["units"]:
                return self.check(set(tables))
            first = first or page
            listed, sent = total - sum(tables[table] for table in left), page["sent"]["bytes"] - first["sent"]["bytes"]
            show(max(0, min(max(listed, sent), total - 1)))  # a large table is listed late
            if page["trouble"] and time.monotonic() - said > 30:
                said = time.monotonic()
                log.warning("waiting tag=%s tables_left=%d trouble=%s", self._tag, len(left), quote(page["trouble"]))
            waiter.wait(min(10.0, 0.5 + len(tables) / 100))
        show(total)
        return set()


def agree_with_daemon(settings: Settings, identity: Identity, filters: Filters) -> None:
    """Refuse to wait for a daemon that stores elsewhere, or something else. Raises Usage."""
    if pid := holder_of(settings.state_dir):
        page = ask_status(settings.state_dir, threading.Event())
        ours = {"store": identity.url, "node": identity.node, "filters": str(filters)}
        for word, value in ours.items():
            if page.get(word) != value:
                what = f"the running daemon (pid {pid}) has {word} {page.get(word)}, and this command {value}"
                raise Usage(what, "give both the same settings, best in /etc/default/cassbackup")


def record_tag(
    store: Retrying, node: str, tag: str, since: str, keys: Iterable[str], nodetool: Nodetool, cqlsh: str
) -> None:
    """Write down what belongs together: the tag's listings, the schema, and the node's place in the ring."""
    place = ring_place(nodetool)
    if read_page(store, f"{node}.listings/node") != place:
        first = store.head(f"{node}.listings/node.json") is None
        body = json.dumps(place).encode()
        store.put(f"{node}.listings/node{'' if first else '.' + utc(time.time())}.json", body, zlib.crc32(body))
    page = {"version": 1, "node": node, "tag": tag, "taken": rfc3339(since), "listings": sorted(keys)}
    for words in ("DESCRIBE SCHEMA WITH INTERNALS", "DESCRIBE SCHEMA"):  # table ids, dropped columns: only since 4.0
        try:
            lines = Nodetool(cqlsh)("-e", words).splitlines(keepends=True)
            page["schema"] = "".join(line for line in lines if not line.startswith("WARNING:"))
            break
        except Fault as fault:
            told = quote(str(fault))
    else:
        log.warning("no schema is kept with this snapshot error=%s hint=pass --cqlsh", told)
    body = json.dumps(page | {"place": place}).encode()
    store.put(f"{node}.listings/tags/{quote(tag, slash='%2F')}/{utc(time.time())}.json", body, zlib.crc32(body))


def clear_listed(nodetool: Nodetool, directories: Sequence[str], waiting: Callable[[str], SnapshotWait]) -> None:
    """Clear earlier snapshots of ours that an earlier run could not, and that are listed by now."""
    pattern = f"{OWN_TAG}*"
    paths = [path for root in directories for path in glob.glob(f"{glob.escape(root)}/*/*/snapshots/{pattern}")]
    for tag in sorted({os.path.basename(path) for path in paths}):
        if not waiting(tag).check(tables_with_snapshot(directories, tag, Filters())):
            nodetool("clearsnapshot", "-t", tag)
            log.info("cleared an earlier snapshot tag=%s", tag)


def snapshot(settings: Settings, environ: Mapping[str, str]) -> int:
    """Take a snapshot, wait until it is listed whole, clear it. Exit 1: not whole, so it stays; 3: no room for one."""
    directories = data_directories(settings.paths)
    tag = settings.tag or f"{OWN_TAG}{utc(time.time())[:13]}Z"
    if not re.fullmatch(r"[\w.-]{1,200}", tag):
        raise Usage(f"tag {tag!r} is none that every Cassandra takes", "use letters, digits, - _ and .")
    open_state(settings.state_dir)
    known = read_json(os.path.join(settings.state_dir, "identity.json"))
    identity, filters = identify(settings, environ, known), filters_of(settings)
    agree_with_daemon(settings, identity, filters)
    for root in directories:
        disk = os.statvfs(root)
        if disk.f_bavail < settings.free_floor * disk.f_blocks:
            log.error("too little room for a snapshot path=%s hint=mend that first, or lower --free-floor", quote(root))
            return BEHIND
    access, nodetool = access_of(settings, identity.region), Nodetool(settings.nodetool)
    raw = open_store(identity.url, access, new=known.get("url") != identity.url)
    store = Retrying(raw, threading.Event().wait, 120.0, Budget(0.0))
    clear_listed(nodetool, directories, lambda old: SnapshotWait(store, identity, settings, old, utc(0)))
    since = utc(time.time())
    options = ["-sf"] if settings.skip_flush else []
    options += ["--ttl", f"{settings.ttl:.0f}s"] if settings.ttl else []
    nodetool("snapshot", "-t", tag, *options, *settings.keyspaces)
    tables = tables_with_snapshot(directories, tag, filters)
    if not tables:
        raise Fault(f"nodetool took the snapshot {tag}, but not below {' '.join(directories)}", "pass --paths")
    waiting = SnapshotWait(store, identity, settings, tag, since)
    here = Settings({**settings.all, "once": Setting(True, "flag"), "paths": Setting(tuple(directories), "flag")})
    sizes = {table: snapshot_size(directories, tag, table) for table in tables}
    if missing := waiting.wait(sizes, lambda: watch(here, environ)):
        names = ", ".join(f"{keyspace}.{table_id_of(table)[0]}" for keyspace, table in sorted(missing)[:9])
        what = f"{len(missing)} of {len(tables)} tables are not listed whole: {names}"
        raise Fault(what, f"snapshot {tag} stays on disk")
    record_tag(store, identity.node, tag, since, waiting.keys.values(), nodetool, settings.cqlsh)
    if not settings.keep:
        nodetool("clearsnapshot", "-t", tag)
    print(f"{tag}: {len(tables)} tables, listed whole in {store.url}")
    return DONE


def findings_text(found: Sequence[Finding]) -> str:
    """Return findings for people: a line for each, the cure below it."""
    lines = columns([(one.name, one.result, one.detail) for one in found]).splitlines()
    cures = ["".join(f"\n    {line}" for line in one.cure.splitlines()) for one in found]
    counts = Counter(one.result for one in found)
    return "\n".join([*map(str.__add__, lines, cures), ", ".join(f"{counts[word]} {word}" for word in sorted(counts))])


def doctor(settings: Settings, environ: Mapping[str, str]) -> int:
    """Say what can go wrong before it does, and the cure. Exit 3 where anything is bad; a warning is none."""
    found, directories, survey, node = list[Finding](), list[str](), Survey(), ""
    yaml, was_root, store = "", os.geteuid() == 0, cast("Store | None", None)
    try:
        yaml = cassandra_yaml()
        directories = data_directories(settings.paths)
        become_owner(directories[0])
        for path in directories:
            survey.look(path, filters_of(settings))
    except (Fault, OSError) as error:
        found.append(finding_of("data", error))
    try:
        areas = [path for root in directories for path in area_paths(os.path.realpath(root), settings.pin_dir)]
        memories = [read_json(os.path.join(path, "identity.json")) for path in (settings.state_dir, *areas)]
        known = next(filter(None, memories), {})
        identity = identify(settings, environ, known)
        node, access = identity.node, access_of(settings, identity.region)
        store = open_store(identity.url, access, new=known.get("url") != identity.url)
    except (Fault, OSError) as error:
        found.append(finding_of("bucket", error))
    cloud, holder = detect_cloud(environ), holder_of(settings.state_dir)
    here = (settings, environ, directories, was_root, yaml, Nodetool(settings.nodetool, 10.0), holder, survey)
    case = Case(*here, cloud, node, read_machine_id(), cast(Store, store))
    settled = bool(directories or os.geteuid())  # else what is put into a bucket of files would be root's
    found += examine(case, HERE + THERE * (store is not None and settled))
    if not settled:
        found.append(Finding("rights", "skipped", "not as root, before the data's owner is known", "name the data"))
    page = {"schema": 1, "checks": [one._asdict() for one in found]}
    print(json.dumps(page) if settings.json else findings_text(found))
    return BEHIND if any(one.result == "bad" for one in found) else DONE


# ======================================================================================================
# On the bucket
# ======================================================================================================


def open_bucket(settings: Settings, environ: Mapping[str, str]) -> Retrying:
    """Open the bucket for a command, which gives up after two minutes. Raises Usage."""
    known = read_json(os.path.join(settings.state_dir, "identity.json"))
    cloud, url = None, known.get("url", "")
    if settings.bucket:
        if "://" not in settings.bucket and not url:
            cloud = detect_cloud(environ)
        url = url_of(settings, cloud.scheme if cloud else url.partition(":")[0])
    if not url:
        raise Usage("no bucket", "set BUCKET_NAME, or pass --bucket")
    region = settings.region or (cloud.region if cloud else known.get("region", ""))
    raw = open_store(url, access_of(settings, region), new=False)
    return Retrying(raw, threading.Event().wait, 120.0, Budget(settings.max_bandwidth))


def meant_nodes(store: Retrying, settings: Settings) -> list[About]:
    """Return the nodes that --node means; else this machine's own, else all. Raises Missing."""
    names = node_names(store)
    own = read_json(os.path.join(settings.state_dir, "identity.json")).get("node", "")
    with contextlib.suppress(Usage):
        own = own if own in names else name_node(None, host_name(), read_machine_id())
    word = settings.node or (own if own in names else "")
    return find_nodes(store, word, settings.cluster, settings.threads)


def one_node(store: Retrying, settings: Settings) -> About:
    """Return the node that --node means; else this machine's own, else the only one. Raises Usage, Missing."""
    found = meant_nodes(store, settings)
    if len(found) > 1:
        raise Usage(f"{len(found)} nodes are meant", f"pass --node; there are {', '.join(a.name for a in found[:9])}")
    return found[0]


def _backup_page(backup: Sequence[Taking]) -> dict[str, Any]:
    """Return what JSON says of one backup, by the names of its listings."""
    lacking = [f"{taking.unit.keyspace}.{taking.unit.table}" for taking in backup if not taking.complete]
    return {
        "tag": backup[0].unit.tag,
        "taking": backup[0].unit.since,
        "taken": rfc3339(backup[0].unit.since),
        "ended": rfc3339(max(taking.unit.since for taking in backup)),
        "tables": len(backup),
        "files": sum(taking.newest.files for taking in backup),
        "bytes": sum(taking.newest.size for taking in backup),
        "complete": not lacking,
        "incomplete": lacking,
    }


def schema_of(store: Retrying, node: str, units: Collection[Unit]) -> str:
    """Return what DESCRIBE SCHEMA said when a snapshot was taken, "" where nobody asked. Raises Corrupt."""
    ours, tags = tuple(listings_of(node, unit) for unit in units), {unit.tag for unit in units}
    for tag in tags if len(tags) == 1 else ():
        for head in reversed([*store.list(f"{node}.listings/tags/{quote(tag, slash='%2F')}/")]):
            page = read_page(store, head.key.removesuffix(".json"))
            if page.get("schema") and any(str(name).startswith(ours) for name in page.get("listings", ())):
                return str(page["schema"])
    return ""


def _read_backup(store: Retrying, node: str, backup: Sequence[Taking], known: set[str], threads: int) -> dict[str, Any]:
    """Read the listings of a backup: what was sent for it, beyond the keys known before, and what is missing."""

    def read(taking: Taking) -> Listing | Fault:
        try:
            return read_taking(store, node, taking)
        except (Corrupt, Missing) as fault:
            return fault

    sent, missing, damaged = dict[str, int](), list[str](), list[str]()
    for listing in spread(read, backup, threads):
        if isinstance(listing, Fault):
            damaged.append(listing.what)
            continue
        for entry in listing.files:
            own = object_key(node, f"{entry.directory}/{entry.name}").split("@")[0]
            if entry.key.split("@")[0] == own and entry.key not in known:
                sent[entry.key] = entry.stamp.size
        missing += () if listing.complete else map(quote, (*listing.missing, *listing.lost))
        known |= {entry.key for entry in listing.files}
    schema = ""
    try:
        schema = schema_of(store, node, [taking.unit for taking in backup])
    except Corrupt as fault:
        damaged.append(fault.what)
    page = {"bytes_sent": sum(sent.values()), "missing": sorted(missing), "damaged": damaged}
    return page | {"schema_kept": bool(schema)}


def look_at_node(store: Retrying, settings: Settings, about: About) -> dict[str, Any]:
    """Return what JSON says of one node, by the names of its listings; with --tag they are read as well."""
    filed, last, batches = list[Filed](), about.heard, dict[str, list[str]]()
    for one in filed_in(store, about.name):
        last = max(last, one.listed)
        if is_selected(one.unit, settings.table):
            filed.append(one)
            if one.unit.kind != "snapshot" and not settings.tag:
                batches.setdefault(one.unit.tag or f"{one.unit.keyspace}.{one.unit.table}", []).append(one.listed)
    backups = [one for one in backups_of(takings_of(filed)) if any(is_meant(taking, settings.tag) for taking in one)]
    pages, known = list(map(_backup_page, backups)), set[str]()
    for page, backup in zip(pages, backups, strict=True) if settings.tag else ():
        page |= _read_backup(store, about.name, backup, known, settings.threads)
    incrementals = [
        {"table": table, "from": rfc3339(min(listed)), "to": rfc3339(max(listed)), "listings": len(listed)}
        for table, listed in sorted(batches.items())
    ]
    return asdict(about) | {
        "heard": rfc3339(about.heard) if about.heard else "",
        "last": rfc3339(last) if last else "",
        "silent_s": max(0.0, store.now() - seconds_of(last)) if last else None,
        "snapshots": pages,
        "incrementals": incrementals,
    }


def _continues(nodes: Sequence[About]) -> dict[str, str]:
    """Return, by name, the older node that a node continues: another instance with the same host id."""
    by_host: dict[str, list[str]] = {}
    for about in sorted(nodes, key=lambda about: about.heard):
        by_host.setdefault(about.host_id or about.name, []).append(about.name)
    return {new: old for names in by_host.values() for old, new in itertools.pairwise(names)}


def _tag_pages(pages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say of each tag that people took on which of the nodes its newest taking is not complete."""
    tags: dict[str, dict[str, bool]] = {}
    for page in pages:
        for backup in page["snapshots"]:
            if not is_automatic(backup["tag"]):
                tags.setdefault(backup["tag"], {})[page["name"]] = backup["complete"]
    found = []
    for tag, nodes in tags.items():
        missing = [page["name"] for page in pages if page["name"] not in nodes]
        incomplete = [name for name, complete in nodes.items() if not complete]
        whole = len(nodes) - len(incomplete)
        found.append({"tag": tag, "complete": whole, "nodes": len(pages), "incomplete": incomplete, "missing": missing})
    return found


def _tag_line(page: Mapping[str, Any]) -> str:
    lacking = [f", {what} {', '.join(page[what])}" for what in ("incomplete", "missing") if page[what]]
    return f"tag {quote(page['tag'])}: complete on {page['complete']} of {page['nodes']} nodes{''.join(lacking)}"


def _backup_row(page: Mapping[str, Any]) -> Sequence[object]:
    state = ["complete" if page["complete"] else f"INCOMPLETE: {' '.join(page['incomplete'])}"]
    state += [f"lacks {' '.join(page['missing'])}"] if page.get("missing") else []
    state += [f"DAMAGED: {what}" for what in page.get("damaged", ())]
    state += [f"{size_text(page['bytes_sent'])} sent for it"] if "bytes_sent" in page else []
    state += ["no schema kept"] if page.get("schema_kept") is False else []
    name, taken = f"{page['tag']}@{page['taking'][:15]}", f"{page['taken'][:19]}Z"
    return name, taken, page["tables"], page["files"], size_text(page["bytes"]), ", ".join(state)


def list_text(pages: Sequence[Mapping[str, Any]], older: Mapping[str, str], details: bool) -> str:
    """Return the list for people: a line for each node; with details, its snapshots and incrementals."""
    rows: list[Sequence[object]] = [("node", "cluster", "addresses", "last heard of", "")]
    for page in pages:
        silent = page["silent_s"]
        notes = [f"silent for {silent / 3600:.0f} h"] if silent is not None and silent > 3 * HEARTBEAT_S else []
        notes += [f"continues {older[page['name']]}"] if page["name"] in older else []
        last = f"{page['last'][:19]}Z" if page["last"] else "never"
        rows.append((page["name"], page["cluster"] or "-", " ".join(page["addresses"]) or "-", last, ", ".join(notes)))
    parts = [columns(rows)]
    for page in pages if details else ():
        rows = [(f"snapshots of {page['name']}", "taken", "tables", "files", "bytes", "")]
        rows += map(_backup_row, page["snapshots"])
        parts.append(columns(rows) if len(rows) > 1 else f"no snapshots of {page['name']}")
        rows = [(f"incrementals of {page['name']}", "from", "to")]
        rows += [(one["table"], f"{one['from'][:19]}Z", f"{one['to'][:19]}Z") for one in page["incrementals"]]
        parts += [columns(rows)] * (len(rows) > 1)
    return "\n\n".join([*parts, *["\n".join(map(_tag_line, _tag_pages(pages)))] * (len(pages) > 1)]).rstrip()


def _place(page: Mapping[str, Any], before: str) -> dict[str, Any]:
    """Return a node's place in the ring, and its newest complete snapshot as of a moment."""
    fit = [one for one in page["snapshots"] if one["complete"] and one["ended"] <= before]
    whole = [one for one in fit if not is_automatic(one["tag"])]
    place = {word: page[word] for word in ("name", "last", "cluster", "host_id", "dc", "rack", "addresses", "tokens")}
    return place | {"initial_token": ",".join(page["tokens"]), "snapshot": whole[-1] if whole else None}


def topology_text(places: Sequence[Mapping[str, Any]], older: Mapping[str, str], before: str) -> str:
    """Return, node by node, what a new cluster of the same shape needs: the place in the ring, and what to restore."""
    parts = [f"as of {before[:19]}Z"]
    for place in places:
        snapshot, name = "none", place["name"]
        if page := place["snapshot"]:
            snapshot = f"{page['tag']}@{page['taking'][:15]}, {page['tables']} tables, {size_text(page['bytes'])}"
        lines = [("node", name), *[("continues", older.get(name, ""))] * (name in older)]
        lines += [("addresses", " ".join(place["addresses"]) or "-"), ("host id", place["host_id"] or "-")]
        lines += [("dc, rack", f"{place['dc'] or '-'}, {place['rack'] or '-'}")]
        lines += [("newest complete snapshot", snapshot)]
        token = f"initial_token: {place['initial_token']}" if place["tokens"] else "# initial_token: not recorded"
        parts.append(f"{columns(lines)}\n{quote(token)}")
    return "\n\n".join(parts)


def _nothing_matches(store: Retrying, nodes: Sequence[About], settings: Settings) -> Missing:
    """Return the fault that names the prefix searched, and what comes near."""
    units = {one.unit for about in nodes for one in filed_in(store, about.name)}
    word, what = settings.tag, "tags"
    names = {unit.tag for unit in units if unit.kind == "snapshot" and is_selected(unit, settings.table)}
    if not word or not names:
        word, what = settings.table[0] if settings.table else "", "tables"
        names = {f"{unit.keyspace}.{table_id_of(unit.table)[0]}" for unit in units if unit.kind != "archive"}
    near = difflib.get_close_matches(word, sorted(names), 3, 0.3) or sorted(names)[-3:]
    where = f"{store.url}/{nodes[0].name if len(nodes) == 1 else '*'}.listings/"
    hint = f"there are the {what} {', '.join(map(quote, near))}" if near else "there are no snapshots"
    return Missing(f"nothing matches below {where}", hint)


def list_(settings: Settings, environ: Mapping[str, str]) -> int:
    """Show what the bucket has: nodes, snapshots, incrementals. Exit 1: nothing matches."""
    if settings.at and not settings.topology:
        raise Usage("--at is for --topology", "without it, list shows all that there is")
    store = open_bucket(settings, environ)
    nodes = find_nodes(store, settings.node, settings.cluster, settings.threads)
    pages = list(spread(functools.partial(look_at_node, store, settings), nodes, settings.threads))
    if (settings.tag or settings.table) and not any(page["snapshots"] or page["incrementals"] for page in pages):
        raise _nothing_matches(store, nodes, settings)
    older = _continues(find_nodes(store, "", "", settings.threads) if settings.node else nodes)
    older = {page["name"]: older[page["name"]] for page in pages if page["name"] in older}
    document: dict[str, Any] = {"schema": 1, "bucket": store.url, "continues": older}
    if settings.topology:
        before = rfc3339(utc(settings.at or store.now()))
        pages = [_place(page, before) for page in pages]
        document |= {"at": before, "nodes": pages}
        text = topology_text(pages, older, before)
    else:
        document |= {"nodes": pages, "tags": _tag_pages(pages)}
        text = list_text(pages, older, bool(settings.node or settings.tag or settings.table or len(pages) == 1))
    print(json.dumps(document) if settings.json else text)
    return DONE


def selected(store: Retrying, settings: Settings, node: str) -> list[Filed]:
    """Return the listings that --tag, --table and --latest mean. Raises Missing.

    The latest of a table are those of its newest whole snapshot, and of the incrementals since.
    """
    filed = [one for one in filed_in(store, node) if is_selected(one.unit, settings.table)]
    if settings.tag:
        chosen = {taking.unit for taking in choose_backup(takings_of(filed), settings.tag)}
        filed = [one for one in filed if one.unit in chosen]
    elif settings.latest:
        newest: dict[Table, Unit] = {}
        for taking in sorted(takings_of(filed), key=lambda taking: taking.newest.listed):
            if taking.complete and not is_automatic(taking.unit.tag):
                newest[taking.unit.keyspace, taking.unit.table] = taking.unit

        def is_latest(one: Filed) -> bool:
            base = newest.get((one.unit.keyspace, one.unit.table))
            if one.unit.kind == "snapshot":
                return one.unit == base
            return not base or (one.listed > base.since and one.state != "rollup")

        filed = list(filter(is_latest, filed))
    if not filed:
        raise Missing(f"no listing of {node} is meant", "`cassbackup list` shows what there is")
    return filed


def _label(unit: Unit) -> str:
    what = f"{unit.tag}@{unit.since}" if unit.kind == "snapshot" else unit.tag or "incrementals"
    return quote(f"{unit.keyspace}.{unit.table} {what}" if unit.table else f"archive {what}")


class Verification:
    """Compares objects with the listings that name them, a table at a time."""

    def __init__(self, store: Retrying, node: str, settings: Settings) -> None:
        self._store, self._node, self._threads, self._deep = store, node, settings.threads, settings.deep
        self._ask = bool(settings.tag or settings.latest or settings.table or settings.deep)
        self.how = "read whole" if settings.deep else "by checksum" if self._ask else "by size and ETag"
        self.count = self.size = 0
        self.bad: list[dict[str, Any]] = []  # key, what, spoils
        self.cold: list[str] = []
        self.stale: list[str] = []

    def check_table(self, filed: Iterable[Filed], progress: Progress) -> None:
        """Check everything that these listings name."""
        listings, texts = [], dict[str, str]()
        for one in filed:
            try:
                listings.append(read_filed(self._store, self._node, one, texts))
            except (Corrupt, Missing) as fault:
                self.bad.append({"key": one.key, "what": fault.what, "spoils": [_label(one.unit)]})
        named: dict[str, list[tuple[Stored, Unit]]] = {}
        for listing in listings:
            for entry in listing.files:
                named.setdefault(entry.key, []).append((entry, listing.unit))
        entries = [users[0][0] for users in named.values()]
        for entry, (what, cold) in zip(entries, self._look(entries), strict=True):
            users = named[entry.key]
            others = {(one.stamp.size, one.crc32) for one, _ in users} - {(entry.stamp.size, entry.crc32)}
            what = what or ("is listed with different contents" if others else "")
            if what:
                self.bad.append({"key": entry.key, "what": what, "spoils": sorted({_label(unit) for _, unit in users})})
            self.cold += [entry.key] if cold else []
            self.count, self.size = self.count + 1, self.size + entry.stamp.size
            progress(self.size)
        unread = {*self.cold, *(one["key"] for one in self.bad)}
        for data, told in stale_digests(self._store, listings, unread) if self._deep else ():
            self.stale.append(f"{data.key} has CRC-32 {int(data.crc32, 16)}, and its Digest.crc32 says {told}")

    def _look(self, entries: Sequence[Stored]) -> Iterator[tuple[str, str]]:
        """Yield (what is wrong, the storage class where it must be thawed) of each object.

        Where nothing was selected, only what looks odd in a list of the folder is asked for.
        """
        listed = () if self._ask else [entry.key for entry in entries]
        heads = find_heads(self._store, listed, self._threads)

        def look(entry: Stored) -> tuple[str, str]:
            head = heads.get(entry.key)
            if head and (head.size, head.etag, head.cold) == (entry.stamp.size, entry.etag, ""):
                return "", ""
            head = self._store.head(entry.key)
            trouble = trouble_of(entry, head)
            if trouble or not head or head.cold:
                return trouble, head.cold if head else ""
            untold = not (head.crc32 or head.crc32c) and head.etag != entry.etag
            return read_deeply(self._store, entry) if self._deep or untold else "", ""

        yield from spread(look, entries, self._threads)


def verify(settings: Settings, environ: Mapping[str, str]) -> int:
    """Compare the bucket with its listings. Exit 1: something is bad; 3: it must be thawed first, or looks odd."""
    store = open_bucket(settings, environ)
    about = one_node(store, settings)
    filed = selected(store, settings, about.name)
    checking = Verification(store, about.name, settings)
    progress = show_rate("checked", 0, False) if settings.deep else lambda size: None
    for _, group in itertools.groupby(filed, lambda one: (one.unit.keyspace, one.unit.table)):
        checking.check_table(group, progress)
    bad = {one["key"] for one in checking.bad if one["key"].startswith(f"{about.name}/")}
    condemned = condemn(store, about.name, bad) if settings.condemn and bad else ""
    page = {"schema": 1, "node": about.name, "objects": checking.count, "bytes": checking.size, "bad": checking.bad}
    page |= {"needs_thaw": checking.cold, "stale_digests": checking.stale, "condemned": condemned}
    lines = [f"BAD {one['key']} {one['what']}; it spoils {', '.join(one['spoils'])}" for one in checking.bad]
    lines += [f"needs thaw: {key}" for key in checking.cold]
    lines += [f"odd: {text} (a scrub can leave that)" for text in checking.stale]
    lines.append(f"{checking.count} objects, {size_text(checking.size)}, {checking.how}: {len(checking.bad)} bad")
    lines += [f"condemned in {condemned}: the daemon stores them again with the next listing"] * bool(condemned)
    print(json.dumps(page) if settings.json else "\n".join(lines))
    return FAILED if checking.bad else BEHIND if checking.cold or checking.stale else DONE


def plan_of(store: Retrying, node: str, settings: Settings) -> Plan:
    """Choose what to restore, and look for every object of it. Raises Missing, Corrupt, Usage."""
    exclude = settings.exclude_table
    exclude += ("system.local", "system.peers*") if settings.new_node else ()
    exclude += () if settings.table or settings.in_place else ("system", "system_*")  # those cannot be imported
    tables = tables_of(filed_in(store, node), settings.table, exclude)
    before = settings.at or store.now()
    if settings.tag:
        backup = choose_backup((taking for filed in tables.values() for taking in takings_of(filed)), settings.tag)
        read = spread(functools.partial(read_taking, store, node), backup, settings.threads)
        chosen, moment = list(map(choose_taking, read)), f"{quote(backup[0].unit.tag)}@{backup[0].unit.since}"
    else:
        moment = rfc3339(utc(before))

        def choose(item: tuple[Table, list[Filed]]) -> Chosen:
            return choose_table(store, node, *item, before)

        chosen = newest_of_names(spread(choose, tables.items(), settings.threads), before)
    if settings.schema_only:
        chosen = [schema_alone(store, node, one, tables[one.keyspace, one.table], before) for one in chosen]
    if not chosen:
        hint = "`cassbackup list` shows what there is; a TIME without a zone is UTC"
        raise Missing(f"nothing of {node} is there to restore for {moment}", hint)
    return make_plan(store, node, moment, chosen, settings.threads)


def notes_on(store: Retrying, plan: Plan, before: float) -> list[str]:
    """Return what an operator should know of a plan: how far the bucket reaches, and how old the data is.

    `before` is the moment that was asked for, 0.0 for a snapshot alone.
    """
    notes = []
    beats = [head.key for head in store.list(f"{plan.node}.listings/heartbeat/")]
    if beats and before:
        through = "a moment unknown (its heartbeat cannot be read)"
        with contextlib.suppress(Corrupt):
            through = str(read_page(store, beats[-1].removesuffix(".json")).get("listed_through", ""))
        if not through < "3" or through < rfc3339(utc(before)):
            notes.append(f"what {plan.node} found after {through} may not be in the bucket")
    if store.now() - (before or min(one.base.end for one in plan.tables)) > 10 * 86400:
        old = "older than 10 days (the default gc_grace_seconds)"
        notes.append(f"{old}: what was deleted since can come back on a live node")
    return notes


def plan_page(plan: Plan, notes: Sequence[str]) -> dict[str, Any]:
    """Return a plan as JSON."""
    tables = [
        {
            "table": f"{one.keyspace}.{one.table}",
            "from": one.why,
            "sstables": len(one.sstables),
            "incrementals": [sstable.name for sstable in one.sstables[len(one.sstables) - one.added :]],
        }
        for one in plan.tables
    ]
    page = {"schema": 1, "node": plan.node, "moment": plan.moment, "tables": tables, "files": len(plan.fetches)}
    page |= {"bytes": plan.size, "troubles": plan.troubles, "absent": plan.absent, "needs_thaw": plan.cold}
    return page | {"notes": list(notes)}


def plan_text(plan: Plan, notes: Sequence[str], where: str) -> str:
    """Return a plan for people."""
    rows = [("table", "SSTables", "from")]
    rows += [(quote(f"{one.keyspace}.{one.table}"), str(len(one.sstables)), one.why) for one in plan.tables]
    lines = [f"{plan.node} as of {plan.moment}, into {where}", *[columns(rows, "  ")] * bool(plan.tables)]
    lines.append(f"{len(plan.fetches)} files, {size_text(plan.size)}")
    lines += [f"lacking: {trouble}" for trouble in plan.troubles]
    lines += [f"not in the bucket as listed: {key}" for key in plan.absent[:20]]
    lines += [f"needs thaw: {key}" for key in plan.cold[:20]]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def cassandra_pids() -> list[str]:
    """Return the processes on this machine that are a Cassandra."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"org.apache.cassandra.service.CassandraDaemon" in file.read():
                pids.append(pid)
    return pids


def map_homes(homes: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Return where each data directory's files go: OLD=NEW, one for all, or as many as there were.

    Without a word on it, back to where cassandra.yaml has it too: a listing alone cannot name a place. Raises Usage.
    """
    pairs = dict(word.split("=", 1) for word in given if "=" in word)
    plain = [word for word in given if "=" not in word]
    mapped: dict[str, str] = {}
    with contextlib.suppress(Usage):
        mapped = {home: home for home in data_directories(()) if home in homes}
    if len(plain) in (1, len(homes)):
        mapped = dict(zip(homes, itertools.cycle(plain), strict=False))
    elif plain:
        raise Usage(f"{len(plain)} data directories for {len(homes)}", f"pass OLD=NEW for each of {' '.join(homes)}")
    if unknown := sorted(pairs.keys() - {*homes}):
        raise Usage(f"nothing came from {unknown[0]}", f"the backup has files of {' '.join(homes)}")
    mapped |= pairs
    for home in homes:
        if home not in mapped:
            raise Usage(f"{quote(home)} is no data directory of this node", f"pass --data-dir {quote(home)}=<here>")
    for home in mapped.values():
        if not os.path.isdir(home):
            raise Usage(f"data directory {quote(home)} is not there", "create it, or pass --data-dir OLD=NEW")
    return {home: os.path.abspath(target) for home, target in mapped.items()}


def strangers_in(plan: Plan, homes: Iterable[str], placed: Sequence[Placed]) -> dict[str, list[str]]:
    """Return the SSTables and transaction logs of the plan's tables that are not of the plan, by folder."""
    planned: dict[str, dict[str, Stamp]] = {}
    for home, one in itertools.product(homes, plan.tables):
        folder = os.path.join(home, one.keyspace, one.table)
        with contextlib.suppress(FileNotFoundError):
            indexes = [name for name in os.listdir(folder) if name.startswith(".")]
            planned |= {os.path.join(folder, name).rstrip("/"): {} for name in ("", *indexes)}
    for fetch, root, path in placed:
        folder, name = os.path.split(os.path.join(root, path))
        planned.setdefault(folder, {})[name] = fetch.entry.stamp
    strangers: dict[str, list[str]] = {}
    for folder, names in planned.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                info, stamp = entry.stat(follow_symlinks=False), names.get(entry.name)
                same = stamp and (info.st_size, info.st_mtime_ns) == (stamp.size, stamp.mtime_ns)
                if not same and (sstable_of(entry.name) or "_txn_" in entry.name):
                    strangers.setdefault(folder, []).append(entry.name)
    return strangers


def move_aside(strangers: Mapping[str, Sequence[str]]) -> None:
    """Put SSTables into a snapshot directory of their table, where Cassandra lets them be: nothing is deleted."""
    tag = f"aside-{utc(time.time())}"
    for folder, names in strangers.items():
        above, name = os.path.split(folder)
        table, index = (above, name) if name.startswith(".") else (folder, "")
        target = os.path.join(table, "snapshots", tag, index)
        os.makedirs(target, exist_ok=True)
        for name in names:
            os.rename(os.path.join(folder, name), os.path.join(target, name))
        log.info("moved aside files=%d to=%s", len(names), quote(target))


def _put_live(staged: str, keyspace: str, table: str) -> None:
    """Rename staged SSTables into the table's newest directory, under generations that are free there."""
    homes = [os.path.join(data, keyspace) for data in data_directories(())]
    found = [os.path.join(home, name) for home in homes if os.path.isdir(home) for name in os.listdir(home)]
    lives = [one for one in found if table_id_of(os.path.basename(one))[0] == table]
    live = max(lives, key=os.path.getmtime, default="")
    if not live:
        raise Missing(f"no directory of {keyspace}.{table}", "create the table first")
    names = [name for folder in (live, f"{live}/backups") if os.path.isdir(folder) for name in os.listdir(folder)]
    ages = [SSTable("", split[0], "", ()).age[1] for name in names if (split := sstable_of(name))]
    free, numbers = max(ages, default=0), dict[str, int]()
    for name in sorted(os.listdir(staged), key=lambda name: name.endswith("-Data.db")):  # Data.db last
        if split := sstable_of(name):
            number = numbers.setdefault(split[0], free + len(numbers) + 1)
            target = f"{renamed(split[0], number)}-{split[1]}"
            os.rename(os.path.join(staged, name), os.path.join(live, target))


def import_table(nodetool: Nodetool, version: str, into: str, name: tuple[str, str]) -> None:
    """Hand a staged table to Cassandra: nodetool import; before 4.0 into the live directory, and refresh."""
    staged = os.path.join(into, *name)
    if version.startswith(("2.", "3.")):
        _put_live(staged, *name)
        nodetool("refresh", *name)
    else:
        nodetool("import", *name, staged)
    if left := glob.glob("*-Data.db", root_dir=staged):  # it exits 0 for a path that it cannot parse
        raise Fault(f"nodetool import left {quote(left[0])} in {quote(staged)}", "see Cassandra's log")
    log.info("imported table=%s", ".".join(name))


def _write_new(path: str, body: bytes) -> dict[str, Exception]:
    """Write a file; an equal one is kept, and another one is not overwritten but returned as what went wrong."""
    temporary = os.path.join(os.path.dirname(path), f".cassbackup-{os.path.basename(path)}")
    with open(temporary, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        with open(path, "rb") as file:
            if file.read() != body:
                return {path: Conflict(f"{quote(path)} has other content", "move it away, or choose another --into")}
    finally:
        os.unlink(temporary)
    return {}


def write_schema(store: Retrying, plan: Plan, settings: Settings, into: str) -> dict[str, Exception]:
    """Write the schema: each table's schema.cql, and what DESCRIBE SCHEMA said when the tag was taken."""
    body = schema_of(store, plan.node, [one.base.listing.unit for one in plan.tables if one.base.listing]).encode()
    placed = [one for one in place_staged(plan, into) if one[0].entry.name == SCHEMA]
    paths = [os.path.join(into, path) for path in [SCHEMA] * bool(body) + [path for *_, path in placed]]
    if not paths:
        raise Missing("the backup has no schema", "choose another snapshot")
    check_target(placed)
    os.makedirs(into, exist_ok=True)
    with only_restore([into]):
        wrong = receive_all(store, placed, settings.threads, lambda size: None)
        wrong |= _write_new(paths[0], body) if body else {}
    log.info("schema paths=%s", quote(" ".join(path for path in paths if path not in wrong)))
    return wrong


def _restore_staged(store: Retrying, plan: Plan, settings: Settings, into: str) -> dict[str, Exception]:
    files = [fetch for fetch in plan.fetches if fetch.keyspace and sstable_of(fetch.entry.name)]
    tables = sorted({(fetch.keyspace, table_id_of(fetch.table)[0]) for fetch in files})
    os.makedirs(into, exist_ok=True)
    placed = place_staged(plan, into)
    check_target(placed)
    check_space(placed)
    nodetool = Nodetool(settings.nodetool)
    version = nodetool.check(tables) if settings.import_ else ""
    with only_restore([into]):
        wrong = receive_all(store, placed, settings.threads, show_rate("restored", plan.size, sys.stderr.isatty()))
    if settings.import_ and not wrong:
        jvms = min(4, os.cpu_count() or 1)  # each call is the start of one, and little else
        list(spread(functools.partial(import_table, nodetool, version, into), tables, jvms))
        for *_, path in placed:  # indexes, which Cassandra builds anew, and what is no SSTable
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(into, path))
    elif tables and not wrong:
        keyspace, table = map(quote, tables[0])
        log.info("next: nodetool import %s %s %s/%s/%s", keyspace, table, quote(into), keyspace, table)
    return wrong


def _restore_in_place(store: Retrying, plan: Plan, settings: Settings, about: About) -> dict[str, Exception]:
    if pids := cassandra_pids():
        raise Usage(f"Cassandra is running (pid {' '.join(pids)})", "stop it first: it would not see these files")
    homes = map_homes(sorted({fetch.home for fetch in plan.fetches}), settings.data_dir)
    placed = place_live(plan, homes)
    check_target(placed)
    check_space(placed)
    roots = {*homes.values()}
    with contextlib.suppress(Usage):  # of this node, unless its data directories are elsewhere
        roots |= {*data_directories(())} if not settings.data_dir else set()
    strangers = strangers_in(plan, sorted(roots), placed)
    if strangers and not settings.move_aside:
        folder, names = next(iter(strangers.items()))
        what = f"{quote(folder)} holds {quote(names[0])}, which is not of this backup"
        raise Usage(what, "--move-aside puts such SSTables into a snapshot directory of their table")
    with only_restore(homes.values()):
        move_aside(strangers)
        wrong = receive_all(store, placed, settings.threads, show_rate("restored", plan.size, sys.stderr.isatty()))
    above = os.path.dirname(next(iter(homes.values()), "/var/lib/cassandra/data"))
    text = f"before the start, empty commitlog, hints and saved_caches (usually in {above}): they would be replayed"
    if settings.new_node:
        tokens = ",".join(about.tokens) or "(node.json has none: take it from the old cassandra.yaml)"
        text += f"\nin cassandra.yaml:\n  num_tokens: {len(about.tokens) or '?'}\n  initial_token: {tokens}"
        text += f"\n  auto_bootstrap: false\nin the snitch's file:\n  dc={about.dc or '?'}\n  rack={about.rack or '?'}"
    print(text, file=sys.stderr if settings.json else sys.stdout)
    return wrong


def restore_directory(settings: Settings) -> str:
    """Return --into; else a directory beside the data, so that an import renames instead of copying."""
    if settings.into:
        return os.path.abspath(str(settings.into))
    with contextlib.suppress(Usage):
        return os.path.join(os.path.dirname(data_directories(())[0]), "cassbackup-restore")
    return os.path.abspath("cassbackup-restore")


def check_plan(plan: Plan, incomplete: bool) -> None:
    """Refuse a plan of which not all is there. Raises Fault."""
    if plan.cold:
        hint = "thaw them in the bucket first"
    elif plan.absent:
        hint = "`cassbackup verify` tells more; choose another snapshot"
    elif not incomplete and any(one.base.listing and not one.base.listing.complete for one in plan.tables):
        hint = "--incomplete restores what there is"
    else:
        return
    raise Fault("nothing was restored, since not all is there", hint)


def restore(settings: Settings, environ: Mapping[str, str]) -> int:
    """Bring back tables. Exit 1: something went wrong; 3: restored, but the backup itself lacks something."""
    if sum(map(bool, (settings.tag, settings.at, settings.latest, settings.archive))) != 1:
        raise Usage("what is to be restored?", "pass one of --tag TAG, --at TIME, --latest and --archive DIR")
    if settings.archive and (settings.in_place or settings.import_ or settings.schema_only or settings.table):
        raise Usage("an archive has no tables", "pass --archive and --into alone; Cassandra takes its files from there")
    if settings.in_place and settings.same_node == settings.new_node:
        hint = "a new node must not have the old one's identity"
        raise Usage("--in-place needs one of --same-node and --new-node", hint)
    store, into = open_bucket(settings, environ), restore_directory(settings)
    about = one_node(store, settings)
    if settings.archive:
        plan = plan_archive(store, about.name, os.path.normpath(settings.archive), settings.threads)
    else:
        plan = plan_of(store, about.name, settings)
    notes = notes_on(store, plan, 0.0 if settings.tag else settings.at or store.now())
    where = "the data directories" if settings.in_place else f"{into} ({size_text(room_at(into))} free)"
    print(json.dumps(plan_page(plan, notes)) if settings.json else plan_text(plan, notes, where))
    check_plan(plan, settings.incomplete or settings.schema_only)
    if settings.dry_run:
        return BEHIND if plan.troubles else DONE
    if settings.schema_only:
        wrong = write_schema(store, plan, settings, into)
    elif settings.in_place:
        wrong = _restore_in_place(store, plan, settings, about)
    else:
        wrong = _restore_staged(store, plan, settings, into)
    for path, error in sorted(wrong.items()):
        log.error("not restored path=%s error=%s", quote(path), quote(str(error)))
    return FAILED if wrong else BEHIND if plan.troubles else DONE


def prune_text(pages: Sequence[Mapping[str, Any]], confirmed: bool) -> str:
    """Return what prune did, or would do, for people."""
    lines = []
    for page in pages:
        gone = [key for key in page["listings"] if key not in page["refused"]]
        lines += [f"listing {'gone' if confirmed else 'to go'}: {key}" for key in gone]
        lines += [f"stays: {key} ({why})" for key, why in page["refused"].items()]
        what = f"{page['node']}: {len(gone)} listings, {page['objects']} objects, {size_text(page['bytes'])}"
        ending = f"{page['deleted']} condemned objects deleted" if confirmed else "to go"
        lines.append(f"{what}{' condemned, ' if confirmed else ' '}{ending}")
    ending = "objects are deleted by the first run that is a day younger than what condemned them"
    return "\n".join([*lines, ending if confirmed else "nothing was deleted; pass --confirm to do it"])


def prune(settings: Settings, environ: Mapping[str, str]) -> int:
    """Delete what retention lets go; without --confirm, say what would go."""
    terms = (settings.keep_last, settings.keep_within, settings.keep_daily, settings.keep_weekly, settings.keep_monthly)
    if bool(any(terms)) + bool(settings.tag) + bool(settings.retire) != 1:
        raise Usage("what is to go?", "pass --keep-last, -within, -daily, -weekly or -monthly; or --tag; or --retire")
    store, confirm = open_bucket(settings, environ), settings.confirm and not settings.dry_run
    if settings.retire:
        names = [check_node(settings.retire)]
    elif settings.all_nodes:
        names = [about.name for about in find_nodes(store, "", settings.cluster, settings.threads)]
    else:
        names = [one_node(store, settings).name]

    def planned(name: str) -> Pruning:
        pruning = Pruning(store, name)
        if settings.retire:
            pruning.plan_retirement()
        else:
            pruning.plan(Retention(*terms, settings.tag, settings.force), settings.threads)
        return pruning

    for name in names if confirm and len(names) > 1 else ():  # any doubt about one node, and nothing goes of any
        planned(name)
    pages, code = [], DONE
    for name in names:
        pruning = planned(name)
        gone = pruning.confirm() if confirm else 0
        code = max(code, FAILED if pruning.refused else DONE)
        page = {"node": name, "listings": pruning.listings, "objects": len(pruning.objects), "refused": pruning.refused}
        pages.append(page | {"bytes": sum(pruning.objects.values()), "deleted": gone})
    if settings.tag and not any(page["listings"] or page["deleted"] for page in pages):
        raise Missing(f"nothing of {settings.tag!r} may go", "is it a tag? The last good one of a table needs --force")
    page = {"schema": 1, "confirmed": confirm, "nodes": pages}
    print(json.dumps(page) if settings.json else prune_text(pages, confirm))
    return code


def report(settings: Settings, environ: Mapping[str, str]) -> int:
    """Draw how much would have been lost at each moment. Exit 0 whatever that is: `status` is there to alarm."""
    if settings.days < 1:
        raise Usage("--days 0 is no time", "pass a number of days from 1 on")
    store = open_bucket(settings, environ)
    now, pictures, empty = settings.at or store.now(), list[Picture](), None
    for about in meant_nodes(store, settings):
        try:
            chronicle = Chronicle(store, about, now - settings.days * 86400.0, now)
            pictures.append(chronicle.picture(settings.table, settings.threads))
        except Missing as fault:
            empty = fault
    if empty and not pictures:
        raise empty
    out = settings.out or ("" if settings.terminal or settings.json else "cassbackup-report.html")
    page = report_page(pictures) if out else ""
    if out not in ("", "-"):
        with open(f"{out}.tmp", "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(f"{out}.tmp", out)
    if settings.json:
        print(json.dumps({"schema": 1, "bucket": store.url, "nodes": list(map(report_document, pictures))}))
    elif settings.terminal:
        plain = "?" in "█▒".encode(sys.stdout.encoding, "replace").decode("latin-1")
        colour = sys.stdout.isatty() and not environ.get("NO_COLOR")
        width = shutil.get_terminal_size().columns
        text = "\n\n".join(strip_text(picture, width, plain, colour) for picture in pictures)
        print(text.encode("ascii", "replace").decode() if plain else text)
    else:
        print(page.rstrip() if out == "-" else "\n".join([*map(headline, pictures), f"the picture is in {out}"]))
    return DONE


# ======================================================================================================
# Command line
# ======================================================================================================


_EXAMPLES: Final = MappingProxyType(
    {
        "": "yes or no",
        "ADDR": "[HOST]:PORT, as :9810, 10.0.0.7:9810 or [::1]:9810",
        "COUNT": "a number from 1 to 256",
        "DURATION": "90s, 15m, 26h or 7d",
        "KIND": "AES256 or aws:kms",
        "NUMBER": "a whole number",
        "PART": "a part of the disk, as 10%",
        "RATE": "50M or 1.5G",
        "REGEX": "a regular expression",
        "TIME": "2026-11-21, 2026-11-21T20:24Z, or 20:24 for the last such moment",
    }
)


def _scaled(text: str, units: Mapping[str, float]) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z%]?)", text)
    if not match or match[2] not in units:
        raise ValueError(text)
    return float(match[1]) * units[match[2]]


def read_value(kind: str, text: str) -> Any:
    """Read a value as its metavar says. Raises ValueError."""
    word = text.strip().lower()
    match kind:
        case "" if word in ("yes", "on", "true", "1", "no", "off", "false", "0"):
            return word in ("yes", "on", "true", "1")
        case "ADDR" if re.fullmatch(r"(\[[^]]+]|[^][:]*):\d{1,5}", text) and int(text.rpartition(":")[2]) < 65536:
            return text
        case "COUNT" if 1 <= int(text) <= 256:
            return int(text)
        case "NUMBER" if text.isdigit():
            return int(text)
        case "DURATION":
            return _scaled(word, {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400})
        case "KIND" if text in ("AES256", "aws:kms"):
            return text
        case "PART" if (part := _scaled(word, {"%": 0.01})) < 1:
            return part
        case "RATE":  # 50M, 1.5GiB/s or a plain number of bytes
            word = word.removesuffix("/s").removesuffix("b").removesuffix("i")
            return _scaled(word, {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40})
        case "REGEX":
            return re.compile(text)
        case "TIME" if re.fullmatch(r"\d\d?:\d\d", word):
            today = seconds_of(f"{utc(time.time())[:9]}{word.replace(':', '').zfill(4)}00.000000Z")
            return today if today <= time.time() else today - 86400
        case "TIME":  # UTC without a zone
            moment = datetime.fromisoformat(word.upper().replace("Z", "+00:00"))
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        case _ if kind not in _EXAMPLES:
            return text
    raise ValueError(text)


@dataclass(frozen=True, slots=True)
class Option:
    """A setting: its flags, and with the same name its twin in the environment and in /etc/default/cassbackup."""

    flags: str  # the first one names it; without dashes it is what stands alone on the command line
    metavar: str  # what it is, and so how it is read; "" for a switch
    default: Any  # () where it can be given more than once
    help: str

    @property
    def key(self) -> str:
        """Return the name in Settings."""
        name = self.flags.split()[0].lstrip("-").replace("-", "_")
        return name + "_" * keyword.iskeyword(name)

    @property
    def variable(self) -> str:
        """Return the name of the environment variable, "" where there is none."""
        return {"bucket": "BUCKET_NAME", "region": "REGION"}.get(self.key, f"CASSBACKUP_{self.key.upper()}")

    def setting(self, given: str | list[str], origin: str) -> Setting:
        """Read what was given. Raises Usage."""
        if self.default == ():
            return Setting(tuple(given.split() if isinstance(given, str) else given), origin)
        try:
            return Setting(read_value(self.metavar, str(given)), origin)
        except (ValueError, re.error) as error:
            name = self.flags.split()[0] if origin == "flag" else self.variable
            raise Usage(f"{name} {given!r} cannot be read", f"write {_EXAMPLES.get(self.metavar, error)}") from None


@dataclass(frozen=True, slots=True)
class Asked(Option):
    """What is wanted this once: only a flag, since a node's environment must not choose what is deleted."""

    @property
    def variable(self) -> str:
        """Return that there is none."""
        return ""


_PATHS = Option("paths", "PATH", (), "data directories, with a / in each (default: as cassandra.yaml says)")
_STATE = Option("--state-dir", "DIR", "", "ledger, status and lock (/var/lib/cassbackup or ~/.local/state/cassbackup)")
_ACCESS = (
    Option("--bucket -b", "URL", "", "s3://bucket[/prefix], gs://bucket[/prefix], file:///dir or a name"),
    Option("--region", "NAME", "", "region of the bucket (default: that of this instance)"),
    Option("--prefix", "PATH", "", "put everything under this prefix; one for each cluster is a good habit"),
    Option("--endpoint-url", "URL", "", "talk to this server (or AWS_ENDPOINT_URL_S3, STORAGE_EMULATOR_HOST)"),
    Option("--ca-file", "FILE", "", "trust these certificates (or REQUESTS_CA_BUNDLE; AWS_CA_BUNDLE for S3)"),
    Option("--sse", "KIND", "", "S3 encryption: AES256, or aws:kms (always with a bucket key)"),
    Option("--kms-key --sse-kms-key-id", "KEY", "", "key for aws:kms, or a Cloud KMS key for gs://"),
    Option("--storage-class", "CLASS", "", "storage class of files from 128 KiB on; listings stay readable"),
    Option("--access-key -k", "KEY", "", "discouraged, as -k of tablesnap: use the environment or a role"),
    Option("--secret-key -s", "KEY", "", "discouraged, as -s of tablesnap"),
    Option("--threads -t", "COUNT", 8, "threads that send"),
)
_STORE = (
    *_ACCESS,
    Option("--name", "NODE", "", "call this node so, instead of <hostname>-<instance_id>"),
    Option("--max-bandwidth", "RATE", 50.0 * MIB, "bytes a second for the whole node, as 50M; 0 is no limit"),
)
_BUCKET = (*_ACCESS, Option("--max-bandwidth", "RATE", 0.0, "bytes a second, as 50M; 0 is no limit"), _STATE)
_NODE = (
    Asked("--node", "WORD", "", "a node: any unique part of its name, host id or address (default: this one)"),
    Asked("--cluster", "NAME", "", "only nodes of this cluster"),
    Asked("--json", "", False, "print JSON"),
)
_TABLES = Asked("--table", "KS[.TABLE]", (), "only these; also ks.table-<id>; globs work")
_TAG = Asked("--tag", "TAG", "", "this snapshot; TAG@<taking> where the tag was taken more than once")
_NODETOOL = Option("--nodetool", "CMD", "nodetool", "how to call nodetool, as 'nodetool -u me -pwf file'")
_AT = Asked("--at", "TIME", 0.0, "as of this moment: 2026-11-21T20:24Z, UTC without a zone, or HH:MM for the last such")
_LATEST = Asked("--latest", "", False, "the newest there is of each table")
_LIST = (_TAG, _TABLES, Asked("--topology", "", False, "for a new cluster: tokens, rack, newest snapshot"), _AT)
_VERIFY = (
    *(_TAG, _LATEST, _TABLES),
    Asked("--deep", "", False, "download everything and compare its bytes"),
    Asked("--condemn", "", False, "have the daemon store again what is bad"),
)
_RESTORE = (
    *(_TAG, _AT, _LATEST, _TABLES),
    Asked("--exclude-table --exclude", "KS[.TABLE]", (), "not these"),
    Asked("--dry-run", "", False, "only say what would be restored"),
    Asked("--archive", "DIR", "", "not tables, but the files that were archived there, as commit logs"),
    Option("--into", "DIR", "", "stage <DIR>/<ks>/<table>/ (default: cassbackup-restore/ beside the data)"),
    Asked("--import", "", False, "then hand each table to the running Cassandra (nodetool import)"),
    _NODETOOL,
    Asked("--schema-only", "", False, "only the schema"),
    Asked("--incomplete", "", False, "restore a snapshot that lacks files, as far as it goes"),
    Asked("--in-place", "", False, "into the data directories of a stopped node; all keyspaces"),
    Asked("--same-node", "", False, "in place: the node itself comes back, with its host id and tokens"),
    Asked("--new-node", "", False, "in place: another node takes its place; system.local and peers are left out"),
    Asked("--data-dir", "[OLD=]NEW", (), "in place: the data directory, or which one for which"),
    Asked("--move-aside", "", False, "in place: put SSTables that are in the way into a snapshot directory"),
)
_REPORT = (
    _TABLES,
    Asked("--days", "NUMBER", 30, "how far to look back"),
    _AT,
    Asked("--out", "FILE", "", "where the page goes (default: cassbackup-report.html); - is stdout"),
    Asked("--terminal", "", False, "draw it here"),
)
_PRUNE = (
    Option("--keep-last", "NUMBER", 0, "keep so many snapshots of each table"),
    Option("--keep-within", "DURATION", 0.0, "keep what is younger, as 30d; also Cassandra's own snapshots (else 14d)"),
    Option("--keep-daily", "NUMBER", 0, "keep the newest of so many days"),
    Option("--keep-weekly", "NUMBER", 0, "of so many weeks"),
    Option("--keep-monthly", "NUMBER", 0, "of so many months"),
    _TAG,
    Asked("--retire", "NODE", "", "everything of a node that has been silent for 30 days"),
    Asked("--all-nodes", "", False, "every node of the bucket, or of --cluster"),
    Asked("--force", "", False, "even more than half of a node's objects; even the last good snapshot of a table"),
    Asked("--confirm", "", False, "do it"),
    Asked("--dry-run", "", False, "only say what would go (so it is without --confirm)"),
)
_WHAT = (
    Option("--keyspace", "GLOB", (), "only these keyspaces (a restore needs those of the system too)"),
    Option("--exclude-keyspace", "GLOB", (), "not these keyspaces"),
    Option("--exclude-table", "KS.TABLE", (), "not these tables"),
    Option("--exclude-tag", "GLOB", (), "not the snapshots with these tags"),
    Option("--since", "TIME", 0.0, "only what is newer; UTC without a zone"),
    Option("--include -i", "REGEX", None, "archives: also files outside snapshots/ and backups/ at such paths"),
    Option("--exclude -e", "REGEX", None, "of those, not the ones at such paths"),
    Option("--full", "", False, "send everything, even what is stored under another snapshot"),
    Option("--delete-uploaded-incrementals", "", False, "delete an SSTable from backups/ once listed whole"),
)
_HERE = (
    _PATHS,
    _STATE,
    Option("--pin-dir", "DIR", "", "hold files here, on the data's mount (default: .cassbackup beside the data)"),
    Option("--max-pinned", "PART", 0.1, "how much of the disk the pins may hold alone, as 10%%"),
    Option("--free-floor", "PART", 0.1, "give pins up when less than this of the disk is free, as 10%%"),
    Option("--settle", "DURATION", 60.0, "how long to wait for what never becomes complete"),
    Option("--reconcile", "DURATION", RECONCILE_S, "how often to look without a hint"),
    Option("--heartbeat", "DURATION", HEARTBEAT_S, "how often to say in the bucket that we live"),
    Option("--adopt", "", False, "take a node's name over from another machine: rebuilt around its disk"),
    Option("--metrics-listen", "ADDR", "", "answer Prometheus at [HOST]:PORT (HOST: 127.0.0.1)"),
    Option("--metrics-textfile", "FILE", "", "write metrics for node_exporter's textfile collector to this .prom file"),
    Option("--once", "", False, "store and list what is there, then exit"),
)
_ASK = (
    _STATE,
    Option("--wait", "", False, "wait until everything that was found is listed"),
    Option("--max-lag", "DURATION", 900.0, "behind, when the oldest unlisted file was found longer ago"),
    Option("--max-age", "DURATION", 26 * 3600.0, "behind, when a table's newest whole snapshot is older"),
    Option("--json", "", False, "print JSON"),
)
_ALWAYS = (
    Option("--config", "FILE", "", "read settings from here (default: /etc/default/cassbackup)"),
    Option("--verbose -v", "", False, "say more in the log"),
)


class Command(NamedTuple):
    """What can be asked for: the function, a line of help, and the options by the heading they stand under."""

    run: Callable[[Settings, Mapping[str, str]], int]
    summary: str
    groups: tuple[tuple[str, tuple[Option, ...]], ...]


_SNAPSHOT = (
    Asked("keyspaces", "KEYSPACE", (), "only these (default: all)"),
    Asked("--tag -t", "TAG", "", "name of the snapshot (default: cassbackup-<UTC to the minute>)"),
    Asked("--keep", "", False, "do not clear the snapshot when it is listed"),
    Asked("--skip-flush", "", False, "take what is on disk, without a flush"),
    Option("--ttl", "DURATION", 0.0, "have Cassandra (4.1) clear it after this time in any case"),
    _NODETOOL,
    Option("--cqlsh", "CMD", "cqlsh", "how to call cqlsh, for DESCRIBE SCHEMA"),
)
_DOCTOR = (Asked("--json", "", False, "print JSON"), _NODETOOL)
_SNAPSHOT_STORE = tuple(replace(option, flags=option.flags.replace(" -t", "")) for option in _STORE)
_SNAPSHOT_HERE = tuple(replace(option, flags=option.flags.replace("paths", "--paths")) for option in _HERE)
_SNAPSHOT_GROUPS = (
    *(("snapshot", _SNAPSHOT), ("store", _SNAPSHOT_STORE), ("what to store", _WHAT)),
    *(("on this node", _SNAPSHOT_HERE), ("always", _ALWAYS)),
)
_DAEMON = (("store", _STORE), ("what to store", _WHAT), ("on this node", _HERE), ("always", _ALWAYS))
_WHERE = (("bucket", _BUCKET), ("node", _NODE))
_LAST = ("always", _ALWAYS)
COMMANDS: Final = MappingProxyType(
    {
        "watch": Command(watch, "watch and store (the default command)", _DAEMON),
        "snapshot": Command(snapshot, "take a snapshot, wait until it is listed whole, clear it", _SNAPSHOT_GROUPS),
        "list": Command(
            list_, "nodes, snapshots and incrementals in the bucket", (*_WHERE, ("what to show", _LIST), _LAST)
        ),
        "verify": Command(verify, "compare the bucket with its listings", (*_WHERE, ("what to check", _VERIFY), _LAST)),
        "restore": Command(restore, "bring back tables", (*_WHERE, ("what and where to", _RESTORE), _LAST)),
        "prune": Command(
            prune, "delete old backups; a dry run unless --confirm", (*_WHERE, ("what to keep", _PRUNE), _LAST)
        ),
        "report": Command(report, "how much would be lost: a picture", (*_WHERE, ("what to draw", _REPORT), _LAST)),
        "status": Command(status, "how far behind the daemon is; exit 3 when it is", (("status", _ASK + _ALWAYS),)),
        "doctor": Command(doctor, "what can go wrong, before it does, and the cure", (("doctor", _DOCTOR), *_DAEMON)),
        "config": Command(config, "each setting, its value and where it came from", _DAEMON),
    }
)


def _add_options(group: Any, options: Iterable[Option]) -> None:
    for option in options:
        text = f"{option.help} [{option.variable}]" if option.variable else option.help
        if not option.flags.startswith("-"):
            group.add_argument(option.key, nargs="*", metavar=option.metavar, help=text)
        elif not option.metavar:
            group.add_argument(*option.flags.split(), dest=option.key, action="store_const", const="yes", help=text)
        else:
            action = "append" if option.default == () else "store"
            more = {"dest": option.key, "metavar": option.metavar, "action": action}
            group.add_argument(*option.flags.split(), help=text, **more)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. What no flag gave is empty: it comes from elsewhere then."""
    parser = argparse.ArgumentParser(
        prog="cassbackup",
        usage="cassbackup [COMMAND] [OPTION ...] [PATH ...]",
        description="Back up Apache Cassandra: every file of snapshots/ and backups/, stored and listed.",
        epilog="Each option has the twin in brackets in the environment and in /etc/default/cassbackup. These are the"
        " options of watch; `cassbackup COMMAND --help` shows those of another command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cassbackup {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", prog="cassbackup")
    for name, command in COMMANDS.items():
        about = commands.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        about.usage = f"cassbackup {name} [OPTION ...]"
        for title, options in command.groups:
            _add_options(about.add_argument_group(title), options)
    for title, options in COMMANDS["watch"].groups:  # for --help alone: main puts a command first
        _add_options(parser.add_argument_group(title), [option for option in options if option is not _PATHS])
    return parser


def settle(
    options: Iterable[Option], flags: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, str]
) -> dict[str, Setting]:
    """Decide each setting: flag, else environment, else configuration file, else default. Raises Usage."""
    settled = {}
    for option in options:
        settled[option.key] = Setting(option.default, "default")
        texts = (flags.get(option.key), environ.get(option.variable), file.get(option.variable))
        for text, origin in zip(texts, ("flag", "environment", "file"), strict=True):
            if text:
                settled[option.key] = option.setting(text, origin)
                break
    return settled


def read_config(path: str) -> dict[str, str]:
    """Read KEY=value lines, as systemd and a shell read them; only the usual file may be absent. Raises Usage."""
    try:
        with open(path or "/etc/default/cassbackup", errors="surrogateescape") as file:
            pairs = [line.strip().removeprefix("export ").partition("=") for line in file]
    except OSError as error:
        if path:
            raise Usage(f"configuration {path} cannot be read ({error.strerror})", "correct --config") from None
        return {}
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


def set_up_log(verbose: bool, environ: Mapping[str, str]) -> None:
    """Log to stderr, an event a line; with journald's priorities where journald reads it."""
    info = os.fstat(sys.stderr.fileno())
    journal = environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"

    priorities = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = " | ".join(super().format(record).splitlines())
            if journal:
                return f"<{priorities.get(record.levelno, 5)}>{text}"
            return f"{rfc3339(utc(record.created))} {record.levelname.lower()} {text}"

    handler = logging.StreamHandler()
    handler.setFormatter(Line())
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written must not stop a backup


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return where state is kept if nobody says where; one that a daemon keeps there can be asked by all."""
    system = "/var/lib/cassbackup"
    own = os.path.join(environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "cassbackup")
    asking = os.path.exists(f"{system}/lock") and not os.path.exists(own)
    return system if os.geteuid() == 0 or os.access(system, os.W_OK) or asking else own


def _check_path(word: str) -> None:
    if "/" not in word:
        near = difflib.get_close_matches(word, COMMANDS, 1, 0.0)[0]
        raise Usage(f"unknown command {word!r}", f"did you mean `cassbackup {near}`? A path contains a /, as ./{word}")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return what the arguments say; options and paths alone mean watch. Raises Usage."""
    known = (*COMMANDS, "-h", "--help", "--version")
    if argv and argv[0] not in known and not argv[0].startswith("-"):
        _check_path(argv[0])
    arguments, unknown = parser.parse_known_args(argv if argv and argv[0] in known else ["watch", *argv])
    if unknown:
        flags = [flag for _, options in COMMANDS[arguments.command].groups for o in options for flag in o.flags.split()]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1, 0.0)[0]
        raise Usage(f"unknown option {unknown[0]!r}", f"did you mean {near}?")
    for word in getattr(arguments, "paths", None) or ():
        _check_path(word)
    return vars(arguments)


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a command. Raises Fault."""
    parser = build_parser()
    flags = parse(parser, argv)
    command = COMMANDS[flags["command"]]
    file = read_config(flags["config"] or environ.get("CASSBACKUP_CONFIG", ""))
    settled = settle((option for _, options in command.groups for option in options), flags, environ, file)
    if "state_dir" in settled and not settled["state_dir"].value:
        settled["state_dir"] = Setting(default_state_dir(environ), "default")
    settings = Settings(settled)
    set_up_log(settings.verbose, environ)
    if command.run is watch and not settings.bucket:
        if pid := holder_of(settings.state_dir):
            print(f"cassbackup is running (pid {pid}); ask it with `cassbackup status`", file=sys.stderr)
        parser.print_usage(sys.stderr)
        raise Usage("no bucket", "set BUCKET_NAME, or pass --bucket; `cassbackup --help` shows more")
    return command.run(settings, environ)


def use_credentials(environ: MutableMapping[str, str]) -> None:
    """Name to the SDKs the files that systemd handed us (LoadCredential=), unless others are named."""
    for variable, name in (("AWS_SHARED_CREDENTIALS_FILE", "aws"), ("GOOGLE_APPLICATION_CREDENTIALS", "gcs.json")):
        path = os.path.join(environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), name)
        if os.path.exists(path) and os.path.getsize(path) > 1:  # absent keys are an empty line
            environ.setdefault(variable, path)


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    use_credentials(os.environ)
    try:
        return run(argv, os.environ)
    except Fault as fault:
        print(f"cassbackup: {fault.what}" + (f"\n  {fault.hint}" if fault.hint else ""), file=sys.stderr)
        return fault.code
    except OSError as error:  # a full disk, a file of another user
        print(f"cassbackup: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130


def main_entry() -> None:
    """Run as a console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    main_entry()
