#!/usr/bin/env python3
"""cassbackup: back up Apache Cassandra, file by file, as Cassandra writes it.

One process runs on every node. It watches Cassandra's data directories, takes hold of every file that appears
under snapshots/ and backups/ before anybody can delete it, stores it in S3, Google Cloud Storage or a directory,
and then writes a listing into the same bucket: what can be restored from there.

              watch, scan, link                        decide                          send, fetch
    kernel ─────────▶ pinner ── "this is new" ──▶ loop ────────── jobs ──────▶ workers ─────▶ store
   (inotify)             ◀── "look again", "let go" ──┘ ◀──────── results ────────┘

* The pinner, one thread, arms watches, scans directories, links files and unlinks its links. It knows no store.
* The loop, asyncio on the main thread, owns every decision and all state. One coroutine takes a unit from its
  pins to its listing. The ledger, in SQLite, is used here and nowhere else.
* Workers, a bounded pool, make the calls that block. They take values and return values.

How a file travels
    hint ──▶ Found ──▶ Pinned ──▶ Stored ──▶ Listing
    watch    scan      link(2)    upload     publish

    A hint is the name of a directory that may have changed: an event, an overflow, the start, a timer. It proves
    nothing, and a lost one costs seconds, not files. Watch first, then scan: what comes between is seen by one.
    Pinned is a hard link of our own: from here clearsnapshot and compaction can no longer take the bytes away. The
    pins are the queue: a restart begins with them and needs nothing else.
    Stored is what the store has confirmed, size and checksum. What the ledger or a listing says is only Known.
    A Listing is the commit. It is written last, and then the pins go.

Promises
    P1  Listed means restorable: a listing names only objects that the store had confirmed before it was written.
    P2  Nothing is skipped silently: every regular file that appears in a watched place is listed, or counted as
        pending, lost or refused, with its name in the log.
    P3  Written once: no key's bytes ever change.
    P4  The ledger is a cache: losing, corrupting or rolling back local state costs time, never data, never a
        false "done".
    P5  Do no harm: no watched file is modified, renamed or deleted (but by --delete-uploaded-incrementals);
        disk, memory, CPU and bandwidth are bounded; Cassandra's page cache is left as found.
    P6  Restore stays inside its target and tells the truth: atomic per file, checksum first, resumable.
    P7  Prune errs on keeping: on any doubt it deletes nothing and says why.
    P8  Signals are true: exit 0 means that everything asked for was done and verified. A daemon that protects
        nothing is red, not idle.

In the bucket (UTC is 20261121T202438.123456Z; every key is written once)
    <node>/var/lib/cassandra/data/ks/users-5a1c/snapshots/daily/nb-1-big-Data.db       a file, at its path
    <node>/.../nb-1-big-Data.db@9f3c01aa                                 same path, other content (its CRC-32)
    <node>.listings/ks/users-5a1c/snapshots/daily/<life>/<UTC>-complete-<files>-<bytes>.json
    <node>.listings/ks/users-5a1c/backups/<UTC>-complete-<files>-<bytes>.json
    <node>.listings/archive/<quoted directory>/<UTC>-complete-<files>-<bytes>.json
    <node>.listings/owner.json, owner.<UTC>.json, node.<UTC>.json, tags/<tag>/<UTC>.json
    <node>.listings/heartbeat/<UTC>.json, bad/<UTC>.json, pruned/<UTC>.json
    <node>.pending-delete/<UTC>.json                                     what prune is about to delete

Contents
    Constants       version, limits, exit codes, the log
    Errors          what can go wrong, by what to do about it
    Types           what travels: Fingerprint, Unit, Pinned, Known, Stored, Listing
    Names           keys, quoting, times, listings as JSON: pure functions
    Stores          file://, s3://, gs:// behind one protocol; retry; the rate limit
    Cloud           which cloud is this, and what is this node called
    Cassandra       its nodetool, its cassandra.yaml, its data directories
    Ledger          SQLite: a cache that may be lost
    Pinner          inotify, scanning, linking, letting go
    Upload          reading a pinned file without disturbing the page cache, and sending it
    Publish         is a unit complete; confirming what it names; writing its listing
    Daemon          the loop: units, periodic tasks, limits, socket, systemd, metrics
    Catalog         what the bucket has: nodes, snapshots, listings
    Choose          what a table is restored from: pure functions
    Restore         the command: plan first, then file by file
    Verify          the command: is every object what its listing says
    Prune           the command: what may go, and deleting it without a lock
    Doctor          the command: ten checks, and the cure of each
    Report          the command: restorability over time, as a picture
    Commands        status, snapshot, list
    Command line    options, settings, exit codes, main
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import contextlib
import difflib
import errno
import fcntl
import functools
import glob
import grp
import hashlib
import hmac
import html
import http.client
import io
import itertools
import json
import logging
import math
import mmap
import operator
import os
import pwd
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import weakref
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from typing import Any, Final, Generic, Literal, NamedTuple, Protocol, TypeVar, cast

# ======================================================================================================
# Constants
# ======================================================================================================

__version__ = "1.0.0"

log = logging.getLogger("cassbackup")
T = TypeVar("T")
R = TypeVar("R")

DONE, FAILED, MISUSED, BEHIND = 0, 1, 2, 3  # exit codes; 130 and 143 are the signals'

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

FORMAT: Final = 2  # "version" of every JSON document in the bucket; 0.1 wrote 1
QUIET_S: Final = 0.3  # a file that is written in place is final when nobody has written to it for so long
PAUSE_S: Final = 2.0  # jobs wait while the pinner is busy, but never longer than this at a time
CONFIRMED_S: Final = 12 * 3600.0  # how long the store's word for an object is good; far less than prune's grace
PUBLISH_LIMIT_S: Final = 3600.0  # a publication that takes longer asks again: prune marks a key DAY_S before it goes
DAY_S: Final = 24 * 3600.0
STOP_S: Final = 30.0  # what is under way at SIGTERM may take so long to end

KEY_BYTES: Final = 900  # S3 and GCS end a key at 1,024 bytes; room for the prefix and @crc32.<UTC>
NAME_MAX: Final = 255  # bytes of a name in a file system, and so of what file:// can hold
NAME_BYTES: Final = 200  # a file's name in a key: @<crc32>.<UTC> may follow

# Cassandra's own (SchemaConstants); anybody may call one of his system_something.
SYSTEM_KEYSPACES: Final = (
    "system",
    "system_schema",
    "system_auth",
    "system_distributed",
    "system_traces",
    "system_cluster_metadata",
    "system_views",
    "system_virtual_schema",
)
# Written into a snapshot's directory by Cassandra itself: TableSnapshot.java, SnapshotManifest.java.
MANIFEST, SCHEMA, EPHEMERAL = "manifest.json", "schema.cql", "ephemeral.snapshot"
# Cassandra opens these two and writes them afterwards: a scan in between sees an empty file, and its mtime may not
# change any more.
IN_PLACE: Final = (MANIFEST, SCHEMA)
# Components that a TOC.txt may name without there being a file: SSTableFormat's optional ones, and those of indexes,
# which Cassandra adds to TOC.txt after the links were made (SASI, SAI).
OPTIONAL_COMPONENT = re.compile(r"Filter\.db|Summary\.db|Digest\..*|CRC\.db|SI_.*|SAI.*")
# Without which Cassandra opens no SSTable of a format: BigFormat, BtiFormat.
NEEDED_COMPONENTS: Final = {
    "big": ("Data.db", "Index.db", "Statistics.db"),
    "bti": ("Data.db", "Partitions.db", "Rows.db", "Statistics.db"),
}


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
    """The arguments or the configuration cannot work as they are. Never for what may pass by itself."""

    code = MISUSED


class Busy(Fault):
    """Another cassbackup holds the lock."""


class Denied(Fault):
    """The store refuses for good: a right, an option, a bucket that is not there, a feature that it lacks."""


class Missing(Fault):
    """There is no such object, node, snapshot or table."""


class Conflict(Fault):
    """The key is taken: written once means that it stays as it is."""


class Corrupt(Fault):
    """Bytes are not what they were said to be."""


class Changed(Fault):
    """A file changed while it was read. It is read again later."""


class Unreachable(Fault):
    """The store did not answer, or answered that it cannot now. Trying again helps."""


class Throttled(Unreachable):
    """The store asks for fewer requests."""


class Unmounted(Unreachable):
    """A directory is not there: a file:// store's, or of the data. A daemon waits for its disk; a command says so."""


# ======================================================================================================
# Types
# ======================================================================================================

Kind = Literal["snapshot", "incremental", "archive"]
FilePath = tuple[str, str]  # a file: its directory, its name


class Fingerprint(NamedTuple):
    """Which bytes a file has, without reading it. Never ctime: link(2) changes that. Unique on one disk only."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> Fingerprint:
        """Return the fingerprint of what stat(2) told."""
        return cls(info.st_ino, info.st_size, info.st_mtime_ns)

    @property
    def written(self) -> float:
        """Return the mtime in seconds since 1970."""
        return max(0, self.mtime_ns) / 1e9


FileBytes = tuple[FilePath, Fingerprint]  # a file, and which bytes it has


@dataclass(frozen=True, slots=True)
class Unit:
    """What becomes restorable at once: a table's snapshot, what is new in its backups/, an archived directory."""

    kind: Kind
    keyspace: str = ""
    table: str = ""  # the directory's name, <table>-<id>
    tag: str = ""  # of a snapshot; of an archive its directory
    # A tag can be taken, cleared and taken again. Each time is a life of it, named by a UTC; no listing has two. A pin
    # directory has lives, too. "" where it plays no part.
    life: str = ""

    @property
    def urgent(self) -> bool:
        """Tell whether it goes first: nothing else holds what an incremental holds."""
        return self.kind != "snapshot"

    @property
    def place(self) -> str:
        """Return the table as keyspace/table-id; of an archive its directory."""
        return f"{self.keyspace}/{self.table}" if self.table else self.tag


@dataclass(frozen=True, slots=True)
class File:
    """A file of Cassandra's: where it has it, and which bytes these are."""

    directory: str
    name: str
    fingerprint: Fingerprint
    mode: int

    @property
    def path(self) -> FilePath:
        """Return the file as its directory and name."""
        return self.directory, self.name

    @property
    def size(self) -> int:
        """Return its bytes."""
        return self.fingerprint.size


@dataclass(frozen=True, slots=True)
class Pinned(File):
    """A file whose bytes we hold by a link of our own."""

    uid: int
    gid: int
    links: int
    pin: str  # path of our link
    disk: str  # the pin directory's random id: inode numbers of two disks must not be confused


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What the store says of an object."""

    key: str
    size: int
    etag: str  # the store's own name for these bytes: S3's ETag, GCS's generation, "" where there is none
    modified: float  # seconds since 1970, by the store's clock
    crc32: str = ""  # eight hex digits; "" where the store cannot tell
    archived: str = ""  # the storage class, where nothing can be read before a thaw (S3 RestoreObject)
    encryption: str = ""  # as S3's HEAD tells it, in the words of --sse


@dataclass(frozen=True, slots=True)
class Known(File):
    """A file as the ledger or a listing tells: an object that should be there."""

    user: str
    group: str
    crc32: str  # eight hex digits
    key: str
    etag: str


@dataclass(frozen=True, slots=True)
class Stored(Known):
    """A file that the store itself has confirmed: by its reply to a put, or by `confirm`."""


Entry = TypeVar("Entry", bound=Known, covariant=True)


@dataclass(frozen=True, slots=True)
class Listing(Generic[Entry]):
    """What can be restored of one unit. Only a Listing[Stored] is written; what is read is a Listing[Known]."""

    node: str
    unit: Unit
    taken: str  # UTC: when Cassandra took the snapshot; of incrementals, when they had been found
    listed: str  # UTC
    complete: bool
    files: tuple[Entry, ...]
    missing: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()  # given up to keep the disk free

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def lacks(self) -> list[str]:
        """Return the names of the files that it should have and has not, without their directories."""
        return sorted({name.rpartition("/")[2] for name in (*self.missing, *self.lost)})


# ======================================================================================================
# Names
# ======================================================================================================

_UTC = r"\d{8}T\d{6}\.\d{6}Z"
_LISTING_NAME = re.compile(rf"({_UTC})-(complete|incomplete)-(\d+)-(\d+)\.json")
_SSTABLE_NAME = re.compile(r"([^/]+-[a-z]{2}-\d+|[a-z]{2}-[^-]+-[a-z]+)-([^/]+)")  # until 2.1 <ks>-<table>-ka-1-Data.db
_TABLE_NAME = re.compile(r"(.+)-([0-9a-f]{32})")
_OUR_FOLDERS: Final = frozenset({"archive", "bad", "heartbeat", "pruned", "tags"})  # below <node>.listings/


def _percent(char: str) -> str:
    # A lone surrogate below dc80 is no byte of a file's name: surrogatepass keeps quote from failing on it.
    how = "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass"
    return urllib.parse.quote(char, errors=how)


def quote(name: str, slash: str = "/") -> str:
    """Spell a file system name so that it can be a key, a log value or a name in a pin directory.

    What is not printable, what is not UTF-8 (it arrives as lone surrogates) and % become %XX, byte by byte.
    Reversible: unquote(quote(name)) == name for every name that a file system can hold.
    """
    if not name.isprintable() or "%" in name:
        letters = [char if char.isprintable() and char != "%" else _percent(char) for char in name]
        name = "".join(letters)
    return name.replace("/", slash)


def unquote(text: str) -> str:
    """Undo quote."""
    return urllib.parse.unquote(text, errors="surrogateescape")


def label(unit: Unit) -> str:
    """Return a unit as it stands in the log and in the status."""
    words = (unit.keyspace, unit.table, unit.kind, unit.tag, unit.life)
    return quote("/".join(word for word in words if word))


def hash_name(text: str) -> str:
    """Return a name that stands for one that is too long: 40 hex digits."""
    return hashlib.sha1(text.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()


def component(name: str, slash: str = "/", most: int = NAME_BYTES) -> str:
    """Return a name as a component of a key. Too long, it is hashed; quote never begins a name with %%."""
    quoted = quote(name, slash)
    if len(quoted.encode()) <= most:
        return quoted
    return "%%" + hash_name(name)


@functools.lru_cache(1000)
def _folder_key(node: str, directory: str) -> str:
    # Kept: the files of a directory come together, and only their names differ.
    return "/".join([node, *(component(part) for part in directory.split("/") if part)])


def object_key(node: str, path: FilePath) -> str:
    """Return the key of a file: node + its absolute path. What is too long for a store is hashed."""
    directory, name = path
    key = f"{_folder_key(node, directory)}/{component(name)}"
    if len(key.encode()) <= KEY_BYTES:
        return key
    return f"{node}/%%{hash_name(os.path.join(directory, name))}"


def sstable_of(name: str) -> tuple[str, str] | None:
    """Split a component's name: nb-1-big-Data.db is (nb-1-big, Data.db). None for what is no component."""
    match = _SSTABLE_NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def table_id_of(table: str) -> tuple[str, str]:
    """Split a table directory's name: users-5a1c... is (users, 5a1c...). Before Cassandra 2.1 there was no id."""
    match = _TABLE_NAME.fullmatch(table)
    return (match[1], match[2]) if match else (table, "")


def unit_of(root: str, relative: str, life: str) -> Unit:
    """Tell to which unit a directory belongs, given below its data directory. An archive is its absolute path."""
    match relative.split("/"):
        case [keyspace, table, "snapshots", tag, *_]:
            return Unit("snapshot", keyspace, table, tag, life)
        case [keyspace, table, "backups", *_]:
            return Unit("incremental", keyspace, table, "", life)
    return Unit("archive", tag=os.path.normpath(os.path.join(root, relative)), life=life)


def utc(seconds: float) -> str:
    """Return a moment, in seconds since 1970, as it stands in keys: 20261121T202438.123456Z."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


def seconds_of(moment: str) -> float:
    """Undo utc. Raises ValueError."""
    if not re.fullmatch(_UTC, moment):
        raise ValueError(f"{moment!r} is no time like 20261121T202438.123456Z")
    day = f"{moment[:4]}-{moment[4:6]}-{moment[6:8]}"
    clock = f"{moment[9:11]}:{moment[11:13]}:{moment[13:-1]}"
    return datetime.fromisoformat(f"{day}T{clock}+00:00").timestamp()  # 20 times as fast as strptime


_YEAR_10000: Final = 253402300799.0  # nearly: datetime rounds to microseconds, and has no such year


@functools.lru_cache(10_000)
def is_utc(text: str) -> bool:
    """Tell whether a text is a moment as it stands in keys."""
    try:
        return 0 <= seconds_of(text) < _YEAR_10000
    except ValueError:
        return False


def later(moment: str, than: str) -> str:
    """Return the moment, or the first one after the other where the clock has gone back."""
    if moment > than:
        return moment
    return utc(seconds_of(than) + 2e-6)


class Clock:
    """Moments that only go forward, whatever the system's clock does meanwhile: the loop's."""

    def __init__(self) -> None:
        self._newest = utc(0)

    def __call__(self) -> str:
        """Return now as UTC, or the first moment after the newest one."""
        self._newest = later(utc(time.time()), self._newest)
        return self._newest


def table_prefix(node: str, keyspace: str, table: str) -> str:
    """Return the prefix of all listings of a table. Who reads a listing's key must find the true names in it."""
    first = component(keyspace, most=NAME_MAX)
    if keyspace in _OUR_FOLDERS:
        first = "%%" + keyspace  # prune deletes what is old in heartbeat/ and bad/
    return f"{node}.listings/{first}/{component(table, most=NAME_MAX)}/"


def unit_prefix(node: str, unit: Unit) -> str:
    """Return the prefix of the listings of a unit; of a snapshot without its life, that of all lives of the tag."""
    if unit.kind == "archive":
        return f"{node}.listings/archive/{component(unit.tag, slash='%2F')}/"
    table = table_prefix(node, unit.keyspace, unit.table)
    if unit.kind == "incremental":
        return table + "backups/"
    tag = f"{table}snapshots/{component(unit.tag, most=NAME_MAX)}/"
    return f"{tag}{unit.life}/" if unit.life else tag


def listing_key(listing: Listing[Known]) -> str:
    """Return the key under which a listing is stored."""
    state = "complete" if listing.complete else "incomplete"
    name = f"{listing.listed}-{state}-{len(listing.files)}-{listing.size}.json"
    return unit_prefix(listing.node, listing.unit) + name


def parse_listing_name(key: str) -> tuple[str, bool, int, int] | None:
    """Return when it was listed, whether complete, files and bytes, as a listing's key tells; None for another key."""
    match = _LISTING_NAME.fullmatch(key.rpartition("/")[2])
    if not match or not is_utc(match[1]):
        return None
    return match[1], match[2] == "complete", int(match[3]), int(match[4])


_NO_NAME = re.compile("[/\0\ud800-\udc7f\udd00-\udfff]")
_MODE = re.compile("[0-7]{4,5}")
_CRC32 = re.compile("[0-9a-f]{8}")
_ENTRY_TEXTS: Final = ("user", "group", "crc32", "key", "etag")  # what of an entry JSON has as it is


def _dump_entry(entry: Stored) -> dict[str, Any]:
    file = entry.fingerprint._asdict()
    texts = {word: getattr(entry, word) for word in _ENTRY_TEXTS}
    return {"name": quote(entry.name), **file, "mode": f"{entry.mode:04o}", **texts}


def dump_document(**values: Any) -> bytes:
    """Return a JSON object of ours, with its version."""
    return json.dumps({"version": FORMAT, **values}, separators=(",", ":")).encode()


def dump_listing(listing: Listing[Stored]) -> bytes:
    """Return a listing as JSON."""
    unit = listing.unit
    table, table_id = table_id_of(unit.table)
    directories: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(listing.files, key=lambda entry: entry.path):
        directories.setdefault(quote(entry.directory), []).append(_dump_entry(entry))
    return dump_document(
        node=listing.node,
        kind=unit.kind,
        keyspace=quote(unit.keyspace),
        table=quote(table),
        table_id=table_id,
        tag=quote(unit.tag) or None,
        life=unit.life or None,
        complete=listing.complete,
        taken=listing.taken,
        listed=listing.listed,
        missing=[quote(name) for name in listing.missing],
        lost=[quote(name) for name in listing.lost],
        directories=directories,
    )


def typed(document: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return a value of a JSON object. Raises KeyError, TypeError; True is no int here."""
    value = document[name]
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}")
    return value


def _load_entry(directory: str, document: Mapping[str, Any]) -> Known:
    name = unquote(typed(document, "name", str))
    file = Fingerprint(*(typed(document, word, int) for word in Fingerprint._fields))
    mode = typed(document, "mode", str)
    texts = {word: typed(document, word, str) for word in _ENTRY_TEXTS}
    is_file = name not in ("", ".", "..") and not _NO_NAME.search(name)
    # SQLite and utime(2) take no more than 64 bits.
    is_file = is_file and 0 <= file.inode < 1 << 64 and 0 <= file.size < 1 << 63
    is_file = is_file and -(1 << 63) <= file.mtime_ns < 1 << 63
    if not is_file or not _MODE.fullmatch(mode) or not _CRC32.fullmatch(texts["crc32"]):
        raise ValueError(f"{name!r} is no file with {file}, mode {mode!r} and CRC-32 {texts['crc32']!r}")
    return Known(directory, name, file, int(mode, 8), **texts)


def _load_unit(document: Mapping[str, Any]) -> Unit:
    kind = typed(document, "kind", str)
    table = unquote(typed(document, "table", str))
    table_id = typed(document, "table_id", str)
    if table_id:
        table = f"{table}-{table_id}"
    tag = document["tag"] or ""
    life = document["life"] or ""
    if kind not in ("snapshot", "incremental", "archive"):
        raise ValueError(f"kind is {kind!r}")
    if not isinstance(life, str) or (kind == "snapshot" and not is_utc(life)):
        raise ValueError(f"life is {life!r}")
    keyspace = unquote(typed(document, "keyspace", str))
    return Unit(cast(Kind, kind), keyspace, table, unquote(tag), life)


def load_listing(body: bytes) -> Listing[Known]:
    """Read a listing. Raises Corrupt for anything that we would not have written."""
    try:
        document = json.loads(body)
        if typed(document, "version", int) != FORMAT:
            raise ValueError(f"version is {document['version']!r}")
        files: list[Known] = []
        for directory, entries in typed(document, "directories", dict).items():
            files += [_load_entry(unquote(directory), entry) for entry in entries]
        taken, listed = typed(document, "taken", str), typed(document, "listed", str)
        if not is_utc(taken) or not is_utc(listed):
            raise ValueError(f"taken is {taken!r}, listed is {listed!r}")
        return Listing(
            node=typed(document, "node", str),
            unit=_load_unit(document),
            taken=taken,
            listed=listed,
            complete=typed(document, "complete", bool),
            files=tuple(files),
            missing=tuple(map(unquote, typed(document, "missing", list))),
            lost=tuple(map(unquote, typed(document, "lost", list))),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"the listing cannot be read ({error!r})", "keep it; `cassbackup verify` names it") from None


def load_document(key: str, body: bytes) -> dict[str, Any]:
    """Read any other JSON object of ours. Raises Corrupt, and Usage for one that 0.1 wrote."""
    try:
        document = json.loads(body)
        version = typed(document, "version", int)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"{quote(key)} cannot be read ({error!r})", "it was damaged; put it right or delete it") from None
    if version == 1:
        raise Usage(f"{quote(key)} was written by cassbackup 0.1", "use another bucket, or another --prefix")
    if version != FORMAT:
        raise Corrupt(f"{quote(key)} has version {version}", "a newer cassbackup wrote it: upgrade this one")
    return cast(dict[str, Any], document)


def size_text(size: float) -> str:
    """Return a size for people: 1.5 GiB."""
    if size < KIB:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def moment_text(moment: str) -> str:
    """Return a moment for people: 2026-11-21 20:24."""
    if not moment:
        return "never"
    whole = datetime.fromtimestamp(seconds_of(moment), timezone.utc)
    return whole.strftime("%Y-%m-%d %H:%MZ")


# Snapshots of some token ranges only (Cassandra's DiagnosticSnapshotService): never what a table was.
_DIAGNOSTIC = re.compile(r"(RepairedDataMismatch|DuplicateRows)-\d{8}")
_AUTOMATIC = re.compile(rf"(truncated|dropped|pre-scrub)-[0-9]+.*|[0-9]+-(compact|upgrade)-.*|{_DIAGNOSTIC.pattern}")
_EMPTIED = re.compile("(?:truncated|dropped)-([0-9]{10,15})-.*")
_VIEW_DROPPED = re.compile("([0-9]{13})-(.+)")
_SLACK_S: Final = 3600.0  # between Cassandra's clock as it writes a file, and as it says when a snapshot began


def emptied_at(unit: Unit) -> float:
    """Return when the table was truncated or dropped, right after this snapshot, in seconds; 0.0 for other tags."""
    match = _EMPTIED.fullmatch(unit.tag)
    if match:
        return int(match[1]) / 1000
    # Cassandra 3.11 calls the snapshot of a view that is dropped <ms>-<view>, without a word in front. Somebody may
    # call one of his own like that, with a date.
    view = _VIEW_DROPPED.fullmatch(unit.tag)
    if not view or view[2] != table_id_of(unit.table)[0]:
        return 0.0
    dropped = int(view[1]) / 1000
    is_then = not unit.life or abs(seconds_of(unit.life) - dropped) < _SLACK_S
    return dropped if is_then else 0.0


def credible(moment: str, now: float) -> str:
    """Return when something was taken, "" for a moment in the future: Cassandra's clock was wrong."""
    return moment if moment <= utc(now + _SLACK_S) else ""


def is_drop(unit: Unit) -> bool:
    """Tell whether Cassandra took a snapshot because the table was dropped."""
    return emptied_at(unit) > 0 and not unit.tag.startswith("truncated-")


def is_partial(unit: Unit) -> bool:
    """Tell whether Cassandra took a snapshot of some token ranges only, to look into a mismatch."""
    return _DIAGNOSTIC.fullmatch(unit.tag) is not None


def is_automatic(unit: Unit) -> bool:
    """Tell whether Cassandra took a snapshot by itself (ColumnFamilyStore, Keyspace.getTimestampedSnapshotName)."""
    return emptied_at(unit) > 0 or _AUTOMATIC.fullmatch(unit.tag) is not None


def any_glob(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def hex32(crc: int) -> str:
    """Return a CRC-32 as it stands in listings and keys: eight hex digits."""
    return f"{crc & 0xFFFFFFFF:08x}"


# ======================================================================================================
# Stores
# ======================================================================================================

PART_BYTES: Final = 8 * MIB  # what is larger travels in parts; S3 takes parts from 5 MiB on
SENT_BYTES: Final = 256 * KIB  # of a body at a time
LARGE_BODIES: Final = 4  # so many of more than 1 MiB are in memory at once, of parts and of other objects
PART_PATIENCE_S: Final = 30.0  # a part is tried again for so long: to begin anew is to read the whole file anew
JOINED_BYTES: Final = 64 * KIB  # a smaller body is sent together with its head
CONNECT_S, ANSWER_S = 10.0, 60.0  # nothing waits longer for a connection, for an answer

Piece = bytes | bytearray | memoryview
PutResult = ObjectInfo | Fault | OSError
Headers = dict[str, str]


class Source(Protocol):
    """What is put. It is read piece by piece, perhaps twice, perhaps by several threads at once."""

    @property
    def size(self) -> int:
        """Return how many bytes there are."""

    def read(self, start: int, end: int) -> Piece:
        """Return exactly these bytes. Raises Changed, OSError."""


def pieces(source: Source) -> Iterator[Piece]:
    """Yield all that a source has, a megabyte at a time."""
    for start in range(0, source.size, MIB):
        yield source.read(start, min(start + MIB, source.size))


def crc32_of(body: Iterable[Piece]) -> str:
    """Return the CRC-32 of all these bytes as it stands in listings."""
    crc = 0
    for piece in body:
        crc = zlib.crc32(piece, crc)
    return hex32(crc)


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes in memory, as a Source."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, end: int) -> bytes:
        return self.data[start:end]


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to talk to a store: everything but its URL."""

    region: str = ""
    endpoint_url: str = ""
    ca_file: str = ""  # PEM
    sse: str = ""  # "", AES256 or aws:kms
    kms_key: str = ""
    storage_class: str = ""  # of files from 128 KiB on
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    threads: int = 8  # that call at once
    max_bandwidth: float = 0.0  # bytes a second, in both directions; 0 is no limit


class RateLimit:
    """Bytes a second over all threads. It owns the only lock of this program."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._free_at, self._lock = bytes_per_s, 0.0, threading.Lock()

    def take(self, size: int) -> None:
        """Wait until so many bytes may travel, that is until those before them are paid for."""
        if not self._rate:
            return
        with self._lock:
            begin = max(time.monotonic(), self._free_at)
            self._free_at = begin + size / self._rate
        time.sleep(max(0.0, begin - time.monotonic()))


class Store(Protocol):
    """A place for objects. Keys are relative to the store's prefix; iterators ask when they are first read.

    Every method may raise Unreachable (try again), Throttled (and less often) and Denied (somebody must act).
    """

    url: str

    def put(self, key: str, source: Source) -> ObjectInfo:
        """Create an object, checked by its CRC-32. Raises Conflict if there is one, and what the source raises."""

    def look_no_more(self) -> None:
        """Send each put without a look whether the key is free: who writes it a second time writes the same."""
        return  # file:// does not look

    def put_all(self, items: Sequence[tuple[str, Source]]) -> list[PutResult]:
        """Create small objects; return what became of each."""
        results: list[PutResult] = []
        for key, source in items:
            try:
                results.append(self.put(key, source))
            except Unreachable as fault:  # each of the others would wait a minute to hear the same
                return results + [fault] * (len(items) - len(results))
            except (Fault, OSError) as error:
                results.append(error)
        return results

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes from an offset on, up to another. Raises Missing."""

    def head(self, key: str) -> ObjectInfo | None:
        """Return what the store knows of an object, None if there is none."""

    def holds(self, info: ObjectInfo, source: Source, crc32: str) -> bool:
        """Tell whether an object has the bytes of a source, of which it has the size."""
        # Some servers, and file://, know no CRC-32 and can only give us the bytes.
        return crc32 == (info.crc32 or crc32_of(self.get(info.key)))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix in the order of their keys, those after a key where one is given."""

    def prefixes(self, prefix: str) -> Sequence[str]:
        """Return the components that come next after a prefix ("" or ending in /) and have something below them."""

    def delete(self, key: str) -> None:
        """Delete an object. An absent one is no error. Raises Denied, Conflict: it stays."""

    def abandon_uploads(self, before: float, below: str = "") -> int:
        """End uploads in parts that began before a moment of the store's time; return how many.

        `below`: only of keys that begin so; file:// does not know whose they are.
        """
        return 0

    def now(self) -> float:
        """Return the store's own time, by its last reply."""
        return time.time()


def read_object(store: Store, key: str) -> bytes:
    """Return a small object. Raises Missing."""
    return b"".join(store.get(key))


def pauses(patience_s: float) -> Iterator[float]:
    """Yield how long to wait before each further try: twice as long each time, a minute at most, with jitter.

    Patience is counted from the first failure on, and ends the iterator; math.inf never does.
    """
    began = time.monotonic()
    for failures in itertools.count():
        longest = min(60.0, 0.25 * 2 ** min(failures, 8))
        wait = longest * random.uniform(0.5, 1.0)
        if time.monotonic() - began + wait > patience_s:
            return
        yield wait


def _pause(waits: Iterator[float], fault: Unreachable) -> None:
    """Sleep, or raise the fault where patience has ended, or where a person must mount a disk or correct a path."""
    wait = next(waits, None)
    if wait is None or isinstance(fault, Unmounted):
        raise fault
    if wait > 2:  # many threads hear of the same outage, and a short one is nobody's business
        log.warning("store does not answer, trying again error=%s", quote(str(fault)))
    time.sleep(wait)


def insist(call: Callable[[], T], patience_s: float) -> T:
    """Call until the store answers, sleeping in this thread."""
    waits = pauses(patience_s)
    while True:
        try:
            return call()
        except Unreachable as fault:
            _pause(waits, fault)


class Patient(Store):
    """A Store for commands: each call is tried again for a while; streams go on where they broke off."""

    def __init__(self, store: Store, patience_s: float) -> None:
        self.url = store.url
        self._store, self._patience_s = store, patience_s

    def put(self, key: str, source: Source) -> ObjectInfo:
        try:
            return insist(lambda: self._store.put(key, source), self._patience_s)
        except Conflict:
            info = self.head(key)
            if not info or info.size != source.size or not self.holds(info, source, crc32_of(pieces(source))):
                raise
            return info  # an earlier try of ours came through, and its reply was lost

    def look_no_more(self) -> None:
        self._store.look_no_more()

    def holds(self, info: ObjectInfo, source: Source, crc32: str) -> bool:
        return insist(lambda: self._store.holds(info, source, crc32), self._patience_s)

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        waits = pauses(self._patience_s)
        while True:
            try:
                for piece in self._store.get(key, start, end):
                    yield piece
                    start += len(piece)
                    waits = pauses(self._patience_s)
                return
            except Unreachable as fault:
                _pause(waits, fault)

    def head(self, key: str) -> ObjectInfo | None:
        return insist(lambda: self._store.head(key), self._patience_s)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        waits = pauses(self._patience_s)
        while True:
            try:
                for info in self._store.list(prefix, after):
                    yield info
                    after = info.key
                    waits = pauses(self._patience_s)
                return
            except Unreachable as fault:
                _pause(waits, fault)

    def prefixes(self, prefix: str) -> Sequence[str]:
        return insist(lambda: self._store.prefixes(prefix), self._patience_s)

    def delete(self, key: str) -> None:
        insist(lambda: self._store.delete(key), self._patience_s)

    def now(self) -> float:
        return self._store.now()


# ---- file://


class FileStore(Store):
    """file://: a directory, perhaps an NFS mount. Key components are file names.

    The directory is made only for a new node. Later it must be there: below a mount point whose disk is not
    mounted we would fill another disk, perhaps Cassandra's.
    """

    def __init__(self, root: str, new: bool, options: StoreOptions) -> None:
        self.url = "file://" + root
        self._root, self._new, self._syncs_folders = root, new, True
        self._unfinished = os.path.join(root, ".unfinished")
        self._rate = RateLimit(options.max_bandwidth)

    def put(self, key: str, source: Source) -> ObjectInfo:
        [result] = self.put_all([(key, source)])
        if isinstance(result, ObjectInfo):
            return result
        raise result

    def put_all(self, items: Sequence[tuple[str, Source]]) -> list[PutResult]:
        """Store a group: its bytes are durable first, visible then, its names durable last.

        Each step is made for all before the next, since the kernel's journal then commits many files at once.
        """
        with self._faults():
            if self._new:
                os.makedirs(self._unfinished, exist_ok=True)
            self._check_there()
        synced = set[str]()
        results: list[Any] = [None] * len(items)
        files = [self._in_steps(key, source, synced) for key, source in items]
        for _ in ("written", "durable", "visible", "durable by its name"):
            for number, file in enumerate(files):
                try:
                    results[number] = results[number] or next(file)
                except (Fault, OSError) as error:
                    results[number] = error
                    if isinstance(error, Missing):  # not the directory of a key, but the whole disk has gone
                        self._check_there()
        for file in files:
            next(file, None)  # removes its temporary name
        self._new = False
        return results

    def _check_there(self) -> None:
        if not os.path.isdir(self._unfinished):
            raise Unmounted(f"{self.url} is not there any more", "mount it, or make its .unfinished/ again")

    def _in_steps(self, key: str, source: Source, synced: set[str]) -> Iterator[ObjectInfo | None]:
        """Store one file. At each `yield` the files of a group wait for each other: see put_all."""
        path = self._path(key)
        number = random.getrandbits(64)
        temporary = f"{self._unfinished}/{os.getpid()}-{number:016x}"
        with self._faults():
            file = open(temporary, "xb", buffering=0)  # noqa: SIM115 - it is closed at the end, as it is unlinked
        try:
            crc32 = self._copy(source, file)
            with self._faults():
                info = os.fstat(file.fileno())
                # So the kernel begins to write, and nobody waits for it yet.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                yield None  # written
                os.fsync(file.fileno())
                yield None  # durable
            folders = self._link(temporary, path)
            yield None  # visible
            with self._faults():
                for folder in folders - synced:
                    self._sync_folder(folder)
            synced |= folders
            yield ObjectInfo(key, info.st_size, f"{info.st_mtime_ns:x}", info.st_mtime, crc32)
        finally:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def _copy(self, source: Source, file: Any) -> str:
        """Write all bytes; return their CRC-32."""
        crc32 = 0
        for piece in pieces(source):
            crc32 = zlib.crc32(piece, crc32)
            self._rate.take(len(piece))
            left = memoryview(piece)
            with self._faults():
                while left:
                    left = left[file.write(left) :]
        return hex32(crc32)

    def _link(self, temporary: str, path: str) -> set[str]:
        """Make a durable file visible; return the directories that must be durable, or its name is not."""
        folder = os.path.dirname(path)
        folders = {folder}
        with self._faults():
            try:
                os.link(temporary, path)  # refuses to overwrite, as rename would not
            except FileNotFoundError:
                self._check_there()  # what is made at an empty mount point would pass for the disk
                os.makedirs(folder, exist_ok=True)
                os.link(temporary, path)
                folders = self._folders_to(path)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV):
                    hint = "this file system has no hard links, which file:// needs"
                    raise Denied(f"{self.url}: {error}", hint) from error
                raise
        return folders

    def _folders_to(self, path: str) -> set[str]:
        """Return the directories that a name hangs on, the root too."""
        folders = set[str]()
        while path != self._root:
            path = os.path.dirname(path)
            folders.add(path)
        return folders

    def _sync_folder(self, folder: str) -> None:
        if not self._syncs_folders:
            return
        fd = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
                raise
            self._syncs_folders = False  # CIFS and some FUSE file systems have no fsync of directories
            log.warning("directories cannot be synced, a power cut may lose names store=%s", self.url)
        finally:
            os.close(fd)

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with self._faults(), open(self._path(key), "rb", buffering=0) as file:
            file.seek(start)
            last = sys.maxsize if end is None else end
            while piece := file.read(min(MIB, last - start)):
                self._rate.take(len(piece))
                start += len(piece)
                yield piece

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._faults():
                info = os.stat(self._path(key))
        except Missing:
            self._check_mounted()
            return None
        if not stat.S_ISREG(info.st_mode):
            return None
        return ObjectInfo(key, info.st_size, f"{info.st_mtime_ns:x}", info.st_mtime)

    def holds(self, info: ObjectInfo, source: Source, crc32: str) -> bool:
        """Tell whether a file has these bytes, and see to it that its name lasts: who linked it may have died since."""
        if not super().holds(info, source, crc32):
            return False
        with self._faults():
            for folder in self._folders_to(self._path(info.key)):
                self._sync_folder(folder)
        return True

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        for name in self._names(folder):
            key = f"{folder}/{name}" if folder else name
            if not key.startswith(prefix):
                continue
            if name.endswith("/"):
                if key > after or after.startswith(key):
                    yield from self.list(key, after)
            elif key > after and (info := self.head(key)):
                yield info

    def _names(self, folder: str) -> Sequence[str]:
        """Return what is in a directory in the order of keys; a directory ends in /."""
        names: Sequence[str] = ()
        path = os.path.join(self._root, folder)
        with contextlib.suppress(Missing), self._faults(), os.scandir(path) as entries:
            names = sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
        if not names:
            self._check_mounted()
        # NFS itself makes .nfs files of what is deleted while somebody reads it.
        return [name for name in names if not re.fullmatch(r"\.unfinished/|\.nfs[0-9a-f]{16,}", name)]

    def prefixes(self, prefix: str) -> Sequence[str]:
        folders = [name for name in self._names(prefix.rstrip("/")) if name.endswith("/")]
        return [name[:-1] for name in folders if any(self.list(prefix + name))]

    def delete(self, key: str) -> None:
        with contextlib.suppress(Missing), self._faults():
            os.unlink(self._path(key))

    def abandon_uploads(self, before: float, below: str = "") -> int:
        """Delete temporary files to which nobody has written since: other nodes may use the same directory."""
        old: list[str] = []
        with contextlib.suppress(Missing), self._faults(), os.scandir(self._unfinished) as entries:
            old += [entry.path for entry in entries if entry.stat().st_mtime < before]
            for path in old:
                os.unlink(path)
        return len(old)

    def _path(self, key: str) -> str:
        odd = {"", ".", ".."} & set(key.split("/"))
        if odd or key.startswith(".unfinished"):
            raise Missing(f"no object {quote(key)}", "a key is a relative path")
        return os.path.join(self._root, key)

    def _check_mounted(self) -> None:
        """Tell an absent object from an absent disk: an empty mount point says nothing."""
        if self._new:
            return
        if not os.path.isdir(self._root):
            what = f"the directory {self._root} does not exist"
        elif not os.listdir(self._root):
            what = f"the directory {self._root} is empty"
        else:
            return
        raise Unmounted(what, "its disk is not mounted, or --bucket names a place where no node has stored yet")

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


# ---- what S3 and GCS have in common


def _times(one: int, other: int) -> int:
    """Return the product of two polynomials modulo that of CRC-32, bits reversed."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = (other >> 1) ^ (0xEDB88320 if other & 1 else 0)
    return product


@functools.lru_cache(1000)
def _x_to_the(exponent: int) -> int:
    if not exponent:
        return 1 << 31
    half = _x_to_the(exponent // 2)
    square = _times(half, half)
    return _times(square, 1 << 30) if exponent % 2 else square


def crc32_combine(first: int, second: int, second_size: int) -> int:
    """Return the CRC-32 of two pieces put together, as zlib's crc32_combine does."""
    return _times(_x_to_the(8 * second_size), first) ^ second


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _base64_crc(crc: int) -> str:
    return _base64(crc.to_bytes(4, "big"))


def _md5(data: Piece) -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def class_of(options: StoreOptions, key: str, size: int) -> str:
    """Return the storage class of an object, "" for the bucket's own.

    Listings and manifest.json are read long before any restore, and S3's colder classes bill what is below 128 KiB
    as if it were that (Amazon S3 User Guide, "Understanding and managing Amazon S3 storage classes").
    """
    node, _, path = key.partition("/")
    name = path.rpartition("/")[2]
    is_ours = not path or node.endswith((".listings", ".pending-delete"))
    if is_ours or name.startswith((MANIFEST, SCHEMA)) or size < 128 * KIB:
        return ""
    return options.storage_class


def unanswered(url: str, error: BaseException, cure: str = "") -> Fault:
    """Return the fault of a request that nobody answered: Denied where no second try can mend it.

    `cure` is what to do where it was never sent, for want of credentials.
    """
    text = str(error).strip() or repr(error)
    if text.startswith("(") and isinstance(error.args[0], str):
        text = error.args[0]  # google-auth tells what happened, and then the server's answer, which says it again
    cause = str(error.__context__ or "")
    if cause not in text:
        text += f" {cause}"
    text = text.encode("unicode_escape").decode()
    if re.search(r"WRONG_VERSION_NUMBER|x15\\+x03", text):  # plain HTTP came, or the alert of who expects TLS
        return Denied(f"{url}: {text}", "the scheme looks wrong: write http:// or https:// as the server speaks it")
    if re.search("certificate verify failed|certificate is not valid|doesn't match", text):
        hint = "pass the certificate of its CA (PEM) with --ca-file; check --endpoint-url and this machine's clock"
        return Denied(f"{url}: its certificate is not trusted ({text})", hint)
    if "Invalid header value" in text:  # and do not repeat it: it has the key
        return Denied(f"{url}: these credentials cannot be sent", "a key ends with a line end")
    if cure:
        return Denied(f"no credentials for {url} ({text})", cure)
    return Unreachable(f"{url}: {text}", "check the network, REGION and --endpoint-url")


def tls_context(bundle: str) -> ssl.SSLContext:
    """Return what to trust: a file of certificates, else what the SDKs trust. Raises Usage."""
    import certifi

    try:
        context = ssl.create_default_context(cafile=bundle or certifi.where())
    except OSError as error:  # ssl.SSLError is one
        hint = "--ca-file, AWS_CA_BUNDLE or REQUESTS_CA_BUNDLE must be a PEM file that this user may read"
        raise Usage(f"the certificates in {bundle} cannot be used ({error.strerror})", hint) from None
    # Python 3.13 refuses CAs without a key identifier, as many companies have them; the SDKs do not.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


_HEAD_LINES: Final = 200


class Reply(http.client.HTTPResponse):
    """A reply as http.client reads it, but for its head: the library's way takes seven times the CPU, half of a put."""

    def begin(self) -> None:
        """Read the head. Its names are in lower case; of two headers of one name the first counts."""
        status = 100
        while status < 200:  # before its reply a server, or something between, may say others (RFC 9110, 15.2)
            lines: list[bytes] = []
            while not lines or lines[-1].strip():
                lines.append(self.fp.readline(64 * KIB + 1))
                if not lines[-1].endswith(b"\n"):
                    raise http.client.HTTPException(f"a reply ends in its head, after {lines[-1][:80]!r}")
                # What is no HTTP has no blank line to end with: we would wait for one, or read for ever.
                if not lines[0].startswith(b"HTTP/1."):
                    raise http.client.HTTPException(f"no reply of HTTP, but {lines[0][:80]!r}")
                if len(lines) > _HEAD_LINES:
                    raise http.client.HTTPException(f"a head of more than {_HEAD_LINES} lines")
            version, code, *_ = lines[0].split(None, 2)
            status = int(code)
        headers: Headers = {}
        for line in lines[1:-1]:
            name, _, value = line.decode("latin-1").partition(":")
            headers.setdefault(name.lower(), value.strip())
        self.status, self.headers = status, cast(Any, headers)
        self.chunked, self.chunk_left = headers.get("transfer-encoding", "").lower() == "chunked", None
        length = "0" if status in (204, 304) else headers.get("content-length", "")
        self.length = int(length) if length.isdecimal() and not self.chunked else None
        is_kept = version == b"HTTP/1.1" and headers.get("connection", "keep-alive").lower() == "keep-alive"
        self.will_close = not is_kept or (self.length is None and not self.chunked)


class Wire:
    """HTTP requests over kept connections: an SDK takes four times the CPU for a small file."""

    def __init__(self, origin: str, bundle: str) -> None:
        from urllib.request import getproxies, proxy_bypass

        address, proxies = urllib.parse.urlsplit(origin), getproxies()
        self._origin = origin
        # Else http.client takes the end of an IPv6 address for a port.
        self._host, self._port = str(address.hostname), address.port or (443 if address.scheme == "https" else 80)
        self._common = {"host": address.netloc.rpartition("@")[2], "accept-encoding": "identity"}
        self._context = tls_context(bundle) if address.scheme == "https" else None
        self._idle = deque[socket.socket]()  # the last used is taken first, so few are kept
        self._proxy: tuple[str, int] | None = None
        self._to_proxy: Headers = {}
        found = proxies.get(address.scheme, proxies.get("all"))
        if found and not proxy_bypass(self._common["host"]):  # NO_PROXY may name the port
            proxy = urllib.parse.urlsplit(found if "://" in found else f"http://{found}")
            if not proxy.hostname:
                raise ValueError("a proxy without a host")
            self._proxy = (proxy.hostname, proxy.port or 80)
            if proxy.username:
                who = urllib.parse.unquote(f"{proxy.username}:{proxy.password}")
                self._to_proxy["proxy-authorization"] = "Basic " + _base64(who.encode())

    @contextlib.contextmanager
    def ask(self, method: str, target: str, headers: Headers, body: Sequence[Piece]) -> Iterator[Any]:
        """Yield the reply (status, headers, read). Raises Unreachable, also while it is read, and Denied."""
        connection = None
        try:
            connection, reply = self._exchange(method, self._request(method, target, headers, body))
            yield reply
            if reply.isclosed() and not reply.will_close:
                self._idle.append(connection)
                connection = None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise unanswered(self._origin, error) from error
        finally:
            if connection:
                reply.close()  # it holds the socket open, too
                connection.close()

    def _request(self, method: str, target: str, headers: Headers, body: Sequence[Piece]) -> Sequence[Piece]:
        """Return what to send, a small body in one piece with its head: one system call, one record of TLS."""
        headers = {**self._common, **headers}
        size = sum(map(len, body))
        if method not in ("GET", "HEAD"):
            headers["content-length"] = str(size)
        if self._proxy and not self._context:
            target = self._origin + target
            headers.update(self._to_proxy)
        lines = [f"{method} {target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""])
        if len(head.splitlines()) != len(lines) + 1:
            raise ValueError("Invalid header value")
        pieces = [head.encode("latin-1"), *body]
        return [b"".join(pieces)] if size < JOINED_BYTES else pieces

    def _exchange(self, *request: Any) -> tuple[socket.socket, Reply]:
        kept = self._kept_connection()
        if kept:
            with contextlib.suppress(ConnectionError, ssl.SSLError, http.client.HTTPException):
                # Servers close a kept connection between two requests: that says nothing, and we ask once more.
                return self._send(kept, *request)
        return self._send(self._open(), *request)

    def _kept_connection(self) -> socket.socket | None:
        """Return a connection on which nothing has come since its last reply: that would not be the reply to us."""
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                poll = select.poll()
                poll.register(connection, select.POLLIN)
                if not poll.poll(0):
                    return connection
                connection.close()
        return None

    def _open(self) -> socket.socket:
        host, port = self._host, self._port
        if self._proxy:
            host, port = self._proxy
        if not self._context:
            connection = http.client.HTTPConnection(host, port, CONNECT_S)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_S, context=self._context)
            if self._proxy:
                connection.set_tunnel(self._host, self._port, self._to_proxy)
        connection.connect()
        opened: socket.socket = connection.sock
        opened.settimeout(ANSWER_S)
        return opened

    def _send(self, connection: socket.socket, method: str, request: Sequence[Piece]) -> tuple[socket.socket, Reply]:
        reply = Reply(connection, method=method)
        try:
            # A server that answers before it has taken all, and hangs up, says why in its answer.
            with contextlib.suppress(ConnectionError):
                for piece in request:
                    # The time limit of a socket is for the whole of a sendall: on a slow link too long for a part.
                    view = memoryview(piece)
                    for start in range(0, len(view), SENT_BYTES):
                        connection.sendall(view[start : start + SENT_BYTES])
            reply.begin()
            return connection, reply
        except BaseException:
            reply.close()
            connection.close()
            raise


def wire_to(origin: str, bundle: str) -> Wire:
    """Return the way to a server. Raises Usage where the environment names a proxy that is none."""
    try:
        return Wire(origin, bundle)
    except ValueError:  # it may show the proxy's password
        hint = "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: http://host:port"
        raise Usage("the proxy that the environment names cannot be used", hint) from None


def _tag(text: str, name: str) -> str:
    """Return what an element of XML holds, "" where there is none."""
    found = re.search(f"<{name}>([^<]*)</{name}>", text)
    return html.unescape(found[1]) if found else ""


@functools.lru_cache(4)
def _moment(date: str) -> float:
    """Return the time of a Date, which is the same for all replies of a second."""
    return parsedate_to_datetime(date).timestamp()


class _Unknown(Denied):
    """The server does not know a header or a request of ours."""


# What an answer stands for: the first that is found in "<status> <code> <message>".
_ANSWERS: Final[tuple[tuple[str, type[Fault], str], ...]] = (
    ("NoSuchBucket|bucket does not exist", Denied, "create the bucket, or correct BUCKET_NAME and REGION"),
    ("^30|AuthorizationHeaderMalformed|IllegalLocation", Denied, "the bucket is in another region: set REGION"),
    # GCS says 403 to a node that may create and not overwrite, which takes the right to delete.
    ("^412|^403 .*storage.objects.delete", Conflict, ""),
    ("NoSuchKey|NoSuchUpload|No such object", Missing, ""),
    ("^429|^503|SlowDown|Throttl|TooManyRequests|RequestLimitExceeded", Throttled, ""),
    ("KMS|kms:", Denied, "check --kms-key, the state of this key and the right to use it"),
    ("RequestTimeTooSkewed", Denied, "set the clock of this machine"),
    ("InvalidObjectState", Denied, "it is archived: thaw it first (restore-object)"),
    ("^507|Quota|StorageFull", Unreachable, "the store is full"),
    ("^413", Denied, "something between takes no body of this size: raise its limit"),
    ("BadDigest|RequestTimeout|IncompleteBody|Mismatch|^400 .*crc32c", Unreachable, ""),
    ("^20", Unreachable, "is there a proxy or a portal between?"),
    ("^(408|409|410|5(?!01))", Unreachable, ""),  # 410: GCS has lost the upload
    ("^404", Denied, "is this the right kind of server? Check --endpoint-url and the keys"),
    ("^40[13]|ExpiredToken|InvalidToken|TokenRefresh", Denied, "check the keys and their rights: man 7 cassbackup"),
    ("(?i)^(501|405)|if-none-match|checksum|content-md5", _Unknown, "check {}"),
)


class _Remote(Store):
    """What S3 and GCS have in common: writing once, whatever the server makes of our condition; memory; time."""

    _wire: Wire
    _put_body: Callable[[str, Piece], ObjectInfo]
    _put_large: Callable[[str, Source], ObjectInfo]
    _target: Callable[[str], str]  # of GET
    _authorize: Callable[[str, str, Headers, Sequence[Piece]], None]  # adds headers
    _faults: Callable[..., contextlib.AbstractContextManager[None]]  # translates what the SDK raises

    def __init__(self, url: str, prefix: str, options: StoreOptions) -> None:
        self.url = url
        self._prefix, self._options = prefix, options
        self._rate = RateLimit(options.max_bandwidth)
        sent = [f"--storage-class {options.storage_class}"] if options.storage_class else []
        sent += [f"--sse {options.sse}"] if options.sse else []
        self._sent = " and ".join(sent) or "--endpoint-url, and its scheme"
        self._date = ("", 0.0)  # of the last reply, and time.monotonic() then
        self._refuses: bool | None = None  # does the server refuse to overwrite? The first put finds out
        # First come, first served: neither memory nor time of the others goes to one who has many.
        self._large_bodies = ThreadPoolExecutor(LARGE_BODIES, "body")

    def put(self, key: str, source: Source) -> ObjectInfo:
        # Is the key free? A large file must not be sent in vain; and this server may be one that overwrites.
        is_large = source.size > PART_BYTES
        if is_large or not self._refuses:
            self._check_free(key)
        if is_large:
            return self._put_large(key, source)
        put = functools.partial(self._put_small, key, source)
        info = put() if source.size <= MIB else self._large_bodies.submit(put).result()
        if self._refuses:
            return info
        there = self.head(key)
        if not there or there.size != info.size or there.crc32 not in ("", info.crc32):
            raise Conflict(f"{quote(key)} was taken by other content meanwhile")
        return replace(there, crc32=info.crc32)

    def look_no_more(self) -> None:
        self._refuses = True

    def _mixed_up(self, key: str) -> Unreachable:
        what = f"{self.url}: the reply to the put of {quote(key)} is of other bytes"
        return Unreachable(what, "does a proxy or a gateway mix replies up?")

    def _put_small(self, key: str, source: Source) -> ObjectInfo:
        body = source.read(0, source.size)
        self._rate.take(len(body))
        info = self._put_body(key, body)
        if self._refuses is None:
            # The same bytes once more do no harm: a server that takes them would overwrite others, too.
            try:
                self._put_body(key, body)
                self._refuses = False
                log.warning("store overwrites, so each key is asked for before and after store=%s", self.url)
            except Conflict:
                self._refuses = True
        return info

    def _unreadable(self, error: Exception) -> Unreachable:
        what = f"{self.url}: an answer cannot be read ({error})"
        return Unreachable(what, "is this the right kind of server? Is there a proxy or a portal between?")

    def _check_free(self, key: str) -> None:
        if self.head(key):
            raise Conflict(f"{quote(key)} is taken")

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if end is not None and end <= start:
            return
        headers = {}
        if start or end is not None:
            last = "" if end is None else end - 1
            headers["range"] = f"bytes={start}-{last}"
        with self._ask("GET", self._target(key), headers) as reply:
            if reply.status == 416:  # the object ends before
                return
            if reply.status not in (200, 206):
                raise self._refusal(key, reply, reply.read(64 * KIB), is_object=True)
            if headers and "content-range" not in reply.headers:
                raise Denied(f"{self.url} takes no notice of Range", "use another server")
            left = int(reply.headers.get("content-length", -1))
            while piece := reply.read(MIB):
                self._rate.take(len(piece))
                left -= len(piece)
                yield piece
            if left > 0:
                raise Unreachable(f"{self.url}: {quote(key)} broke off {left} bytes early")

    def now(self) -> float:
        date, then = self._date
        with contextlib.suppress(ValueError, OverflowError):  # none yet; or what stands between has spoilt it
            return _moment(date) + time.monotonic() - then
        return time.time()

    def _note(self, reply: Any, *_: Any, **__: Any) -> None:
        """Take the time from a reply."""
        self._date = (reply.headers.get("date"), time.monotonic())

    @contextlib.contextmanager
    def _ask(self, method: str, target: str, headers: Headers, body: Sequence[Piece] = ()) -> Iterator[Any]:
        """Yield the reply to a request that we make ourselves."""
        headers = dict(headers)
        with self._faults():
            self._authorize(method, target, headers, body)
        with self._wire.ask(method, target, headers, body) as reply:
            self._note(reply)
            yield reply

    def _in_order(self, infos: Iterable[ObjectInfo], after: str) -> Iterator[ObjectInfo]:
        """Pass a list on. Raises Denied where it is none: what is out of order may as well lack something."""
        before = ""
        for info in infos:
            if info.key <= before:
                what = f"{self.url} lists {quote(info.key)} after {quote(before)}"
                raise Denied(what, "its lists are out of order, so they cannot be relied on: use another server")
            before = info.key
            if info.key > after:  # not every server knows where to begin
                yield info

    def _refusal(self, key: str, reply: Any, body: bytes, is_object: bool = False) -> Fault:
        """Return the fault that a reply stands for, in XML as S3 tells it or in JSON as GCS does."""
        text = body.decode("utf-8", "replace")
        message = _tag(text, "Message")
        if not message:
            found = re.search(r'"message":\s*"([^"]*)"', text)
            message = found[1] if found else text[:200] or http.client.responses.get(reply.status, "")
        if reply.status == 301 and "x-amz-bucket-region" in reply.headers:
            message += f", it is in {reply.headers['x-amz-bucket-region']}"
        return self._fault(key, reply.status, _tag(text, "Code"), message, is_object)

    def _fault(self, key: str, status: int, code: str, message: str, is_object: bool = False) -> Fault:
        text = f"{status} {code} {message.replace(key, '')}"
        if status == 404 and is_object:  # of anything else it may as well be an ingress that speaks
            text += " NoSuchKey"
        subject = quote(key) or "the bucket"
        what = f"{self.url}: {status} {code} for {subject} ({message})"
        for pattern, kind, hint in _ANSWERS:
            if re.search(pattern, text):
                return kind(what, hint.format(self._sent))
        return Denied(what, f"check {self._sent}")


# ---- s3://


@functools.lru_cache(4)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for word in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    return key


def sign(method: str, target: str, headers: Headers, who: Any, region: str) -> None:
    """Sign a request by AWS Signature Version 4. Its headers, in lower case, have host, date and body's hash.

    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
    """
    if who.token:
        headers["x-amz-security-token"] = who.token
    path, _, query = target.partition("?")
    names = sorted(headers)
    signed = ";".join(names)
    lines = [method, path, query]
    lines += [f"{name}:{headers[name]}" for name in names]
    lines += ["", signed, headers["x-amz-content-sha256"]]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    moment = headers["x-amz-date"]
    day = moment[:8]
    scope = f"{day}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
    key = _signing_key(who.secret_key, day, region)
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    credential = f"AWS4-HMAC-SHA256 Credential={who.access_key}/{scope}"
    headers["authorization"] = f"{credential}, SignedHeaders={signed}, Signature={signature}"


def _iso(moment: str) -> float:
    """Return a time of S3's, in ISO 8601. How many digits its seconds have is the server's own affair."""
    zone = re.search(r"[+-]\d\d:\d\d$", moment)
    return datetime.fromisoformat(moment[:19] + (zone[0] if zone else "+00:00")).timestamp()


def _fields(element: Any) -> dict[str, str]:
    """Return what the elements right below one hold, by their names without XML's namespace."""
    return {child.tag.rpartition("}")[2]: child.text or "" for child in element}


def _archived(storage_class: str) -> str:
    """Return a storage class if nothing can be read of it before a thaw."""
    return storage_class if re.fullmatch("GLACIER|(DEEP_)?ARCHIVE(_ACCESS)?", storage_class) else ""


_CREDENTIALS: Final = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the instance a role"


class _Shown(Exception):
    """Its argument is where botocore was about to send a request."""


def _show(request: Any, **_: Any) -> None:
    # A presigned URL would be simpler, but it goes to the global endpoint: that serves no region opened since 2019.
    raise _Shown(request.url)


class _Part(NamedTuple):
    """What S3 has taken of a large file."""

    crc32: int
    size: int
    etag: str


class S3Store(_Remote):
    """s3://bucket[/prefix]: boto3 says where the bucket is and who we are; requests travel over Wire, signed by us."""

    def __init__(self, bucket: str, prefix: str, options: StoreOptions) -> None:
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"), prefix, options)
        self._bucket = bucket
        self._checks: bool | None = None  # does the server check bodies by their CRC-32? The first put finds out
        self._lists_uploads = True
        self._encrypts = True  # as --sse says, until a reply tells otherwise
        name = "x-amz-server-side-encryption"
        self._kept = {name: options.sse} if options.sse else {}
        if options.sse == "aws:kms":
            self._kept[f"{name}-bucket-key-enabled"] = "true"  # one KMS call for many objects
            if options.kms_key:
                self._kept[f"{name}-aws-kms-key-id"] = options.kms_key
        self._connect()

    def _connect(self) -> None:
        """Find the bucket's address and what gives credentials; nothing is sent to the store. Raises Usage."""
        try:
            import boto3
            import botocore.session
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            hint = "pip install boto3, or apt install python3-boto3"
            raise Usage(f"s3:// needs boto3 ({error})", hint) from None
        options = self._options
        try:
            core = botocore.session.get_session()
            endpoint = options.endpoint_url
            if not endpoint and not core.get_config_variable("ignore_configured_endpoint_urls"):
                # botocore reads these by itself since 1.31; Debian 12 has an older one, which would go to AWS.
                endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
            core.get_component("credential_provider")  # made now: later two threads might make it at once
            keys = (options.access_key or None, options.secret_key or None)
            self._session = boto3.session.Session(*keys, region_name=options.region or None, botocore_session=core)
            bundle = options.ca_file or core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
            # A client reads 12 MB of S3's API. It has a session of its own, and both are freed with this call.
            session = boto3.session.Session("-", "-", region_name=options.region or None)
            client = session.client("s3", endpoint_url=endpoint or None)
            client.meta.events.register("before-send.s3", _show)
            client.head_object(Bucket=self._bucket, Key="KEY")
        except _Shown as shown:
            found = urllib.parse.urlsplit(str(shown.args[0]))
        except (BotoCoreError, ValueError) as error:
            hint = "correct the bucket's name, --endpoint-url, AWS_PROFILE or ~/.aws/config"
            if "Invalid endpoint" in str(error):
                hint = "write http:// or https:// before AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL"
            raise Usage(f"{self.url}: {error}", hint) from error
        self._host, self._base = found.netloc, found.path.removesuffix("KEY")
        self._is_secure = found.scheme == "https"
        self._region = str(client.meta.region_name).replace("aws-global", "us-east-1")
        self._wire = wire_to(f"{found.scheme}://{found.netloc}", bundle or "")

    def _credentials(self) -> Any:
        from botocore.exceptions import NoCredentialsError

        found = self._session.get_credentials()
        if not found:
            raise NoCredentialsError
        keys = found.get_frozen_credentials()
        # Secrets are often files that an editor has ended with a line end. With it S3 says only: wrong signature.
        for name, key in (("AWS_ACCESS_KEY_ID", keys.access_key), ("AWS_SECRET_ACCESS_KEY", keys.secret_key)):
            if not key or key != key.strip() or not key.isascii():
                problem = "ends with a line end or a blank, or is not ASCII" if key else "is absent"
                raise Denied(f"{self.url}: the credentials cannot be used: {name} {problem}", "correct it")
        return keys

    def _target(self, key: str | None, query: dict[str, str] | None = None) -> str:
        """Return the path of an object, or of the bucket where it is None, and what is asked about it."""
        path = self._base
        if key is not None:
            path += urllib.parse.quote(self._prefix + key)
        if query:
            path += "?" + urllib.parse.urlencode(sorted(query.items()), quote_via=urllib.parse.quote)
        return path

    def _tell(
        self, method: str, key: str | None, query: dict[str, str], headers: Headers | None = None, body: bytes = b""
    ) -> tuple[Headers, Any]:
        """Send a request that S3 answers in XML; return the headers of its answer and the first element."""
        from xml.etree import ElementTree

        with self._ask(method, self._target(key, query), headers or {}, [body]) as reply:
            text = reply.read().strip()  # blanks come first while it puts parts together
        if reply.status != 200:
            raise self._refusal(key or "", reply, text)
        try:
            answer = ElementTree.fromstring(text)
        except (ElementTree.ParseError, LookupError) as error:  # LookupError: an encoding that Python does not know
            raise self._unreadable(error) from error
        if answer.tag.endswith("Error"):  # CompleteMultipartUpload says 200 before it knows
            told = _fields(answer)
            raise self._fault(key or "", 500, told.get("Code", ""), told.get("Message", ""))
        return reply.headers, answer

    # bodies

    def _authorize(self, method: str, target: str, headers: Headers, body: Sequence[Piece]) -> None:
        headers["host"] = self._host
        headers["x-amz-date"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        headers["x-amz-content-sha256"] = "UNSIGNED-PAYLOAD"
        if not self._is_secure:
            digest = hashlib.sha256()
            for piece in body:
                digest.update(piece)
            headers["x-amz-content-sha256"] = digest.hexdigest()
        sign(method, target, headers, self._credentials(), self._region)

    def _send(self, key: str, target: str, headers: Headers, body: Piece, crc32: int) -> Headers:
        """PUT a body with what the server checks it by; return the headers of the reply."""
        headers, ours = dict(headers), _base64_crc(crc32)
        if self._checks is not False:
            headers["x-amz-checksum-crc32"] = ours
            headers["x-amz-sdk-checksum-algorithm"] = "CRC32"  # said once more, or a bucket with object lock refuses
        if self._checks is not True:
            headers["content-md5"] = _base64(_md5(body).digest())
        with self._ask("PUT", target, headers, [body]) as reply:
            text = reply.read()
            told: Headers = reply.headers
            if told.get("x-amz-checksum-crc32", ours) != ours:
                raise self._mixed_up(key)
        if reply.status != 200 or text or not told.get("etag"):  # of a put S3 says all in the head
            raise self._refusal(key, reply, text)
        repeats = "x-amz-checksum-crc32" in told  # as a server does that has checked it
        if not repeats and self._checks is not False:
            log.warning("store knows no CRC-32, Content-MD5 is sent instead store=%s", self.url)
        self._checks = repeats
        return told

    def put(self, key: str, source: Source) -> ObjectInfo:
        """Put. A header that the server does not know is left out from then on."""
        if not self._encrypts:
            raise self._not_encrypted()
        refuses, checks = self._refuses, self._checks  # by these we have sent; others may find out meanwhile
        try:
            return super().put(key, source)
        except _Unknown as fault:
            told = fault.what.removeprefix(self.url).replace(quote(key), "").lower()
            if refuses is not False and "checksum" not in told:
                header, self._refuses = "if-none-match", False
            elif checks is not False:
                header, self._checks = "checksum", False
            else:
                raise  # so it was something else, perhaps an option
        log.warning("store refuses a header, it is left out store=%s header=%s", self.url, header)
        return self.put(key, source)

    def _put_body(self, key: str, body: Piece) -> ObjectInfo:
        crc32 = zlib.crc32(body)
        headers = {**self._kept, "x-amz-meta-crc32": hex32(crc32)}
        if kind := class_of(self._options, key, len(body)):
            headers["x-amz-storage-class"] = kind
        if self._refuses is not False:
            headers["if-none-match"] = "*"
        told = self._send(key, self._target(key), headers, body, crc32)
        self._check_encryption(told.get("x-amz-server-side-encryption"))
        etag = told["etag"].strip('"')
        return ObjectInfo(key, len(body), etag, self.now(), hex32(crc32))

    def _not_encrypted(self) -> Denied:
        what = f"{self.url} takes --sse {self._options.sse} and does not do it"
        return Denied(what, "leave --sse out, or use another server")

    def _check_encryption(self, done: str | None) -> None:
        """Raise Denied where --sse was not done. Then nothing more is sent: at the next try it would be there."""
        if self._options.sse and done != self._options.sse:
            self._encrypts = False
            raise self._not_encrypted()

    def holds(self, info: ObjectInfo, source: Source, crc32: str) -> bool:
        """Tell whether an object has these bytes, encrypted as ours are."""
        return super().holds(info, source, crc32) and self._options.sse in ("", info.encryption)

    def _put_large(self, key: str, source: Source) -> ObjectInfo:
        """Send a file in parts, going on with what an earlier process has left. S3 takes at most 10,000 parts."""
        step = max(PART_BYTES, -(-source.size // (9000 * MIB)) * MIB)
        with self._faults():
            upload, held = self._find_upload(key, source.size, step)
        upload = upload or self._begin(key, source.size)

        def send(start: int) -> _Part:
            number = start // step + 1
            body = source.read(start, min(start + step, source.size))
            return self._send_part(key, upload, number, body, held.get(number))

        try:
            return self._complete(key, upload, self._send_parts(send, range(0, source.size, step)))
        except (Changed, Conflict):  # nobody will go on with it
            self._abort(key, upload)
            raise
        except Missing as fault:
            raise Unreachable(fault.what, "the upload is gone, and begins anew") from fault
        except Denied as fault:
            if re.search("InvalidPart|EntityTooSmall", fault.what):  # nobody can ever complete it
                self._abort(key, upload)
            raise

    def _find_upload(self, key: str, size: int, step: int) -> tuple[str, dict[int, dict[str, str]]]:
        """Return the newest upload of this key whose parts are as long as ours would be, and its parts by number."""
        for upload in sorted(self._uploads(key), key=lambda one: one["Initiated"], reverse=True):
            if upload["Key"] != self._prefix + key:  # it only begins like ours
                continue
            which = {"uploadId": upload["UploadId"]}
            try:
                found = self._listed("Part", key, which, {"part-number-marker": "NextPartNumberMarker"})
                held = {int(part["PartNumber"]): part for part in found}
            except Missing:  # it has ended, and is listed all the same
                continue
            ours = {number: min(step, size - (number - 1) * step) for number in held}
            if all(int(part["Size"]) == ours[number] for number, part in held.items()):
                return upload["UploadId"], held
        return "", {}

    def _uploads(self, prefix: str) -> Iterator[dict[str, str]]:
        marks = {"key-marker": "NextKeyMarker", "upload-id-marker": "NextUploadIdMarker"}
        whole = self._prefix + prefix
        try:
            for upload in self._listed("Upload", None, {"uploads": "", "prefix": whole}, marks):
                if upload["Key"].startswith(whole):  # a server that takes no notice of prefix= lists everybody's
                    yield upload
        except Missing:  # rclone's way to say that there are none
            return
        except _Unknown:
            if self._lists_uploads:
                log.warning("store lists no uploads, so none is gone on with or ended store=%s", self.url)
            self._lists_uploads = False

    def _begin(self, key: str, size: int) -> str:
        headers = dict(self._kept)
        if self._checks is not False:
            headers.update({"x-amz-checksum-algorithm": "CRC32", "x-amz-checksum-type": "FULL_OBJECT"})
        if kind := class_of(self._options, key, size):
            headers["x-amz-storage-class"] = kind
        told, answer = self._tell("POST", key, {"uploads": ""}, headers)
        upload = _fields(answer).get("UploadId")
        if not upload:
            raise self._no_answer("UploadId")
        try:
            self._check_encryption(told.get("x-amz-server-side-encryption"))
        except Denied:  # a later process must not go on with it
            self._abort(key, upload)
            raise
        return upload

    def _abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(Fault):
            self._delete(key, {"uploadId": upload})

    def _send_parts(self, send: Callable[[int], _Part], starts: Iterable[int]) -> list[_Part]:
        """Send all parts, some at once. After a fault no further part is begun."""
        futures: list[Future[_Part]] = []
        try:
            for start in starts:
                if len(futures) >= LARGE_BODIES:  # no more of one file wait for their turn
                    futures[-LARGE_BODIES].result()
                futures.append(self._large_bodies.submit(send, start))
            return [future.result() for future in futures]
        finally:
            for future in futures:
                if not future.cancel():
                    future.exception()  # waits for what has begun: it reads the source

    def _send_part(self, key: str, upload: str, number: int, body: Piece, held: Mapping[str, str] | None) -> _Part:
        """Send a part unless it is held already; return its CRC-32, size and ETag."""
        crc32 = zlib.crc32(body)
        if held:
            # A server that knows no CRC-32 has the MD5 as ETag.
            etag = held.get("ETag", "")
            theirs = held.get("ChecksumCRC32") or etag.strip('"')
            if etag and theirs in (_base64_crc(crc32), _md5(body).hexdigest()):
                return _Part(crc32, len(body), etag)
        target = self._target(key, {"partNumber": str(number), "uploadId": upload})

        def send() -> Headers:
            self._rate.take(len(body))
            return self._send(key, target, {}, body, crc32)

        told = insist(send, PART_PATIENCE_S)
        return _Part(crc32, len(body), told["etag"])

    def _complete(self, key: str, upload: str, sent: Sequence[_Part]) -> ObjectInfo:
        crc32 = total = 0
        said = ["<CompleteMultipartUpload>"]
        for number, part in enumerate(sent, 1):
            crc32 = crc32_combine(crc32, part.crc32, part.size)
            total += part.size
            said.append(f"<Part><PartNumber>{number}</PartNumber><ETag>{html.escape(part.etag)}</ETag>")
            if self._checks is not False:
                said.append(f"<ChecksumCRC32>{_base64_crc(part.crc32)}</ChecksumCRC32>")
            said.append("</Part>")
        said.append("</CompleteMultipartUpload>")
        headers: Headers = {}
        if self._checks is not False:
            headers.update({"x-amz-checksum-crc32": _base64_crc(crc32), "x-amz-checksum-type": "FULL_OBJECT"})
        if self._refuses is not False:
            headers["if-none-match"] = "*"
        if not self._refuses:
            self._check_free(key)
        with contextlib.suppress(Missing):  # perhaps the reply to an earlier try was lost, and the upload has ended
            self._tell("POST", key, {"uploadId": upload}, headers, "".join(said).encode())
        info = self.head(key)
        if info is None:
            raise Unreachable(f"{self.url}: the upload of {quote(key)} is gone", "it begins anew")
        if info.size != total or info.crc32 not in ("", hex32(crc32)):
            raise Corrupt(f"{quote(key)} did not arrive as it was sent", "the server or the way to it is broken")
        if self._options.sse not in ("", info.encryption):  # the upload was begun before --sse was set
            raise Conflict(f"{quote(key)} was uploaded without --sse", "it is stored anew, under another key")
        return replace(info, crc32=hex32(crc32))

    # what is there

    def head(self, key: str) -> ObjectInfo | None:
        with self._ask("HEAD", self._target(key), {"x-amz-checksum-mode": "ENABLED"}) as reply:
            reply.read()
        if reply.status == 404:
            return None
        if reply.status != 200:
            raise self._refusal(key, reply, b"")
        told: Headers = reply.headers
        if told.keys().isdisjoint(("etag", "x-amz-request-id")) or "content-length" not in told:
            raise self._no_answer("ETag or no size")
        with self._faults():
            crc32 = told.get("x-amz-meta-crc32", "")
            theirs = told.get("x-amz-checksum-crc32", "-")
            if "-" not in theirs:  # -N is a composite
                crc32 = base64.b64decode(theirs).hex()  # the server's own, better than what we said
            modified = _moment(told["last-modified"]) if "last-modified" in told else self.now()
            archived = _archived(told.get("x-amz-archive-status") or told.get("x-amz-storage-class", ""))
            if 'ongoing-request="false"' in told.get("x-amz-restore", ""):
                archived = ""  # there is a thawed copy
            size, etag = int(told["content-length"]), told.get("etag", "").strip('"')
            return ObjectInfo(key, size, etag, modified, crc32, archived, told.get("x-amz-server-side-encryption", ""))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        with self._faults():
            found = self._objects("Contents", prefix, {"start-after": self._prefix + after} if after else {})
            yield from self._in_order(map(self._info, found), after)

    def _info(self, told: Mapping[str, str]) -> ObjectInfo:
        """Return what a list says of an object, which is never its CRC-32."""
        modified = _iso(told["LastModified"]) if "LastModified" in told else self.now()
        etag, archived = told.get("ETag", "").strip('"'), _archived(told.get("StorageClass", ""))
        key = told["Key"].removeprefix(self._prefix)
        return ObjectInfo(key, int(told["Size"]), etag, modified, archived=archived)

    def prefixes(self, prefix: str) -> Sequence[str]:
        with self._faults():
            found = self._objects("CommonPrefixes", prefix, {"delimiter": "/"})
            return [told["Prefix"].removeprefix(self._prefix + prefix).rstrip("/") for told in found]

    def _objects(self, kind: str, prefix: str, more: dict[str, str]) -> Iterator[dict[str, str]]:
        which = {"list-type": "2", "encoding-type": "url", "prefix": self._prefix + prefix, **more}
        return self._listed(kind, None, which, {"continuation-token": "NextContinuationToken"})

    def _listed(
        self, kind: str, key: str | None, which: dict[str, str], marks: Mapping[str, str]
    ) -> Iterator[dict[str, str]]:
        """Yield the elements of a kind, page by page.

        `marks`: the parameters that ask for the next page, and the elements of this one that tell their values.
        """
        # An upload or a part that is not listed is only sent anew; an object would pass for deleted.
        must_be_whole = "list-type" in which
        while True:
            _, page = self._tell("GET", key, which)
            about = _fields(page)
            if must_be_whole and "Name" not in about:
                raise self._no_answer("Name")
            plain = urllib.parse.unquote_plus if about.get("EncodingType") == "url" else str
            for element in page:
                if element.tag.rpartition("}")[2] == kind:
                    told = _fields(element)
                    for name in told.keys() & {"Key", "Prefix"}:
                        told[name] = plain(told[name])
                    yield told
            if about.get("IsTruncated") != "true":
                return
            marked = {name: about[element] for name, element in marks.items() if about.get(element)}
            if marked.items() <= which.items():
                if not must_be_whole:
                    return
                raise Denied(f"{self.url} cuts its lists short", "it does not know ListObjectsV2: use another server")
            which = {name: value for name, value in which.items() if name not in marks} | marked

    def delete(self, key: str) -> None:
        # One by one: not every server knows batches of S3's kind, and GCS has none.
        self._delete(key, {})

    def _delete(self, key: str, query: Headers) -> None:
        with self._ask("DELETE", self._target(key, query), {}) as reply:
            text = reply.read()
        if reply.status == 204:  # a portal's page is no deletion
            return
        fault = self._refusal(key, reply, text)
        # S3 never says 404 for the key; who does without its NoSuchKey may as well be an ingress.
        if not isinstance(fault, Missing):
            raise fault

    def abandon_uploads(self, before: float, below: str = "") -> int:
        # Others may have uploads in this bucket.
        with self._faults():
            old = [one for one in self._uploads(below) if _iso(one["Initiated"]) < before]
        for upload in old:
            self._delete(upload["Key"].removeprefix(self._prefix), {"uploadId": upload["UploadId"]})
        return len(old)

    def _no_answer(self, what: str) -> Unreachable:
        return Unreachable(f"{self.url}: 200, but no {what}", "is there a proxy or a portal between?")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        from botocore import exceptions as aws
        from botocore.parsers import ResponseParserError

        try:
            yield
        except aws.ClientError as error:
            told = error.response.get("Error", {})  # of who gives the credentials
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            raise self._fault("", status, str(told.get("Code", "")), told.get("Message", "")) from error
        except (aws.HTTPClientError, aws.ConnectionError) as error:
            raise unanswered(self.url, error) from error
        except (aws.CredentialRetrievalError, aws.MetadataRetrievalError) as error:
            # The store has answered before: whoever gives the credentials is away for a while.
            raise unanswered(self.url, error, "" if self._date[0] else _CREDENTIALS) from error
        except (KeyError, ValueError, OverflowError, ResponseParserError) as error:  # of sizes, times and names in it
            raise self._unreadable(error) from error
        except (aws.BotoCoreError, OSError) as error:  # OSError: a token file that cannot be read
            raise unanswered(self.url, error, _CREDENTIALS) from error


# ---- gs://


class GCSStore(_Remote):
    """gs://bucket[/prefix]: google-cloud-storage for all that is rare; bodies travel over Wire."""

    def __init__(self, bucket: str, prefix: str, options: StoreOptions) -> None:
        super().__init__(f"gs://{bucket}/{prefix}".rstrip("/"), prefix, options)
        # For its traces the SDK would read the bucket's settings, in threads that try for two minutes.
        os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"
        try:
            if sys.prefix == "/usr":  # Debian has no package of it: cassbackup-gcs brings a copy of its own
                sys.path.insert(0, "/usr/lib/cassbackup/vendor")
            import google_crc32c
            from google.auth.transport.requests import Request
            from google.cloud import storage
        except ImportError as error:
            hint = "pip install google-cloud-storage, or install the package cassbackup-gcs"
            raise Usage(f"gs:// needs Google's client ({error})", hint) from None
        endpoint = {"api_endpoint": options.endpoint_url} if options.endpoint_url else None
        with self._faults():  # objects need no project, but the client insists
            self._client = storage.Client(project="none", client_options=endpoint)
        self._bucket, self._extend = self._client.bucket(bucket), google_crc32c.extend
        session = self._client._http
        bundle = options.ca_file or os.environ.get("REQUESTS_CA_BUNDLE", "")
        if options.ca_file:  # said with each request, or REQUESTS_CA_BUNDLE would win
            session.request = functools.partial(session.request, verify=options.ca_file)
        session.hooks["response"].append(self._note)
        self._credentials, self._request = self._client._credentials, Request(session)
        self._origin = self._client.api_endpoint.rstrip("/")
        self._wire = wire_to(self._origin, bundle)
        self._limits = {"timeout": (CONNECT_S, ANSWER_S), "retry": None}

    def _target(self, key: str) -> str:
        name = urllib.parse.quote(self._prefix + key, "")
        return f"/download/storage/v1/b/{self._bucket.name}/o/{name}?alt=media"

    def _authorize(self, method: str, target: str, headers: Headers, body: Sequence[Piece]) -> None:
        self._credentials.before_request(self._request, method, self._origin + target, headers)

    def _crc32c(self, body: Piece, crc: int = 0) -> int:
        """Return the CRC-32C of these bytes, or of others and these after them."""
        for start in range(0, len(body), MIB):  # the library takes bytes alone, and a copy of all would be large
            crc = self._extend(crc, bytes(body[start : start + MIB]))
        return crc

    def _begin(self, key: str, kind: str, size: int, about: dict[str, Any]) -> tuple[str, bytes]:
        """Return where an upload is sent to, and what GCS must know of the object."""
        query = {"uploadType": kind, "ifGenerationMatch": "0"}
        if self._options.kms_key:
            query["kmsKeyName"] = self._options.kms_key
        target = f"/upload/storage/v1/b/{self._bucket.name}/o?{urllib.parse.urlencode(query)}"
        about = {"name": self._prefix + key, **about}
        if storage_class := class_of(self._options, key, size):
            about["storageClass"] = storage_class
        return target, json.dumps(about).encode()

    def _send(self, key: str, method: str, target: str, headers: Headers, *body: Piece) -> tuple[Any, Any]:
        """Send a request; return the reply and what it tells. A session that has not all answers 308."""
        with self._ask(method, target, headers, body) as reply:
            text = reply.read()
            told = json.loads(text) if text and reply.status in (200, 201) else {}
        if reply.status not in (200, 201, 308):
            raise self._refusal(key, reply, text)
        return reply, told

    def _put_body(self, key: str, body: Piece) -> ObjectInfo:
        crc32 = hex32(zlib.crc32(body))
        about = {
            "metadata": {"crc32": crc32},
            "crc32c": _base64_crc(self._crc32c(body)),  # GCS refuses what is not as it says
        }
        target, head = self._begin(key, "multipart", len(body), about)
        edge = f"--{random.getrandbits(128):032x}".encode()
        head = edge + b"\r\nContent-Type: application/json\r\n\r\n" + head + b"\r\n"
        head += edge + b"\r\nContent-Type: application/octet-stream\r\n\r\n"
        headers = {"content-type": f"multipart/related; boundary={edge[2:].decode()}"}
        end = b"\r\n" + edge + b"--\r\n"
        reply, told = self._send(key, "POST", target, headers, head, body, end)
        if "generation" not in told:
            raise self._refusal(key, reply, b"")
        if told.get("crc32c", about["crc32c"]) != about["crc32c"]:
            raise self._mixed_up(key)
        return ObjectInfo(key, len(body), str(told["generation"]), self.now(), crc32)

    def _put_large(self, key: str, source: Source) -> ObjectInfo:
        """Send a file in one resumable session, in order. GCS refuses its end if its CRC-32C is another."""
        target, about = self._begin(key, "resumable", source.size, {})
        reply, _ = self._send(key, "POST", target, {"content-type": "application/json"}, about)
        if "location" not in reply.headers:
            raise self._refusal(key, reply, b"")
        session = urllib.parse.urlsplit(reply.headers["location"])
        target = f"{session.path}?{session.query}"
        crc32 = crc32c = 0

        def send(start: int) -> Any:
            nonlocal crc32, crc32c
            end = min(start + PART_BYTES, source.size)
            body = source.read(start, end)
            crc32 = zlib.crc32(body, crc32)
            crc32c = self._crc32c(body, crc32c)
            headers = {"content-range": f"bytes {start}-{end - 1}/{source.size}"}
            if end == source.size:
                headers["x-goog-hash"] = f"crc32c={_base64_crc(crc32c)}"
            return insist(functools.partial(self._send_part, key, target, headers, body), PART_PATIENCE_S)

        told: Any = {}
        for start in range(0, source.size, PART_BYTES):
            told = self._large_bodies.submit(send, start).result()
        if told.get("crc32c") != _base64_crc(crc32c):
            raise Corrupt(f"{quote(key)} did not arrive as it was sent", "the way to the store is broken")
        return ObjectInfo(key, source.size, str(told["generation"]), self.now(), hex32(crc32))

    def _send_part(self, key: str, target: str, headers: Headers, body: Piece) -> Any:
        """Send a part, of which GCS passes over what it has; return what it tells at the end of all parts."""
        self._rate.take(len(body))
        reply, told = self._send(key, "PUT", target, headers, body)
        span = headers["content-range"].partition("/")[0]
        last = span.rpartition("-")[2]
        if not told and reply.headers.get("range") != f"bytes=0-{last}":
            raise Unreachable(f"{self.url}: not all of a part of {quote(key)} has arrived", "it is sent again")
        return told

    def head(self, key: str) -> ObjectInfo | None:
        with self._faults(key):
            blob = self._bucket.get_blob(self._prefix + key, **self._limits)
            return self._info(blob) if blob else None

    def holds(self, info: ObjectInfo, source: Source, crc32: str) -> bool:
        if info.crc32:
            return info.crc32 == crc32
        # A session cannot tell a CRC-32 that is known at its end. CRC-32C is what GCS itself knows of every object.
        with self._faults(info.key):
            blob = self._bucket.get_blob(self._prefix + info.key, **self._limits)
            theirs = blob.crc32c if blob else ""
        crc32c = 0
        for piece in pieces(source):
            crc32c = self._crc32c(piece, crc32c)
        return bool(theirs == _base64_crc(crc32c))

    def _info(self, blob: Any) -> ObjectInfo:
        key = blob.name.removeprefix(self._prefix)
        crc32 = (blob.metadata or {}).get("crc32", "")
        modified = blob.updated.timestamp() if blob.updated else self.now()
        return ObjectInfo(key, int(blob.size), str(blob.generation), modified, crc32)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        more = {"start_offset": self._prefix + after} if after else {}
        whole = self._prefix + prefix
        with self._faults():
            pages = self._pages(prefix=whole, **more)
            yield from self._in_order((self._info(blob) for page in pages for blob in page), after)

    def _pages(self, **which: str) -> Iterator[Any]:
        for page in self._client.list_blobs(self._bucket, **which, **self._limits).pages:
            if page.raw_page.get("kind") != "storage#objects":  # else any JSON would pass for an empty list
                raise Unreachable(f"{self.url}: 200, but no list", "is there a proxy or a portal between?")
            yield page

    def prefixes(self, prefix: str) -> Sequence[str]:
        whole = self._prefix + prefix
        with self._faults():
            found = {name for page in self._pages(prefix=whole, delimiter="/") for name in page.prefixes}
        return [name.removeprefix(whole).rstrip("/") for name in sorted(found)]

    def delete(self, key: str) -> None:
        with contextlib.suppress(Missing), self._faults(key, is_object=True):
            self._bucket.blob(self._prefix + key).delete(**self._limits)

    # GCS has no list of sessions, and drops them by itself after a week: there are no uploads to abandon.

    @contextlib.contextmanager
    def _faults(self, key: str = "", is_object: bool = False) -> Iterator[None]:
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError, TransportError
        from requests import RequestException

        try:
            yield
        except GoogleAPICallError as error:
            raise self._fault(key, int(error.code or 500), "", error.message, is_object) from error
        except (RequestException, TransportError) as error:
            raise unanswered(self.url, error) from error
        except GoogleAuthError as error:
            cure = "set GOOGLE_APPLICATION_CREDENTIALS, or give the instance a service account"
            if getattr(error, "retryable", False):  # whoever gives tokens is away for a while
                cure = ""
            raise unanswered(self.url, error, cure) from error
        except (AttributeError, TypeError, ValueError) as error:  # the SDK takes any JSON for what it has asked for
            raise self._unreadable(error) from error


def open_store(url: str, options: StoreOptions, new: bool = True) -> Store:
    """Open s3://bucket[/prefix], gs://bucket[/prefix] or file:///directory. SDKs are imported here, not before.

    `new`: nothing of ours has been there yet, so a directory may be made. Raises Usage.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        if not rest.startswith("/"):
            raise Usage(f"bucket {url} is not absolute", "write file:///directory")
        return FileStore(os.path.normpath(rest), new, options)
    bucket, _, prefix = rest.partition("/")
    if scheme not in ("s3", "gs") or not bucket:
        raise Usage(f"bucket {url} is of no known kind", "write s3://bucket, gs://bucket or file:///directory")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket):
        raise Usage(
            f"{bucket!r} is no bucket's name", "write the name alone; of an access point its alias, not its ARN"
        )
    if options.endpoint_url and not re.match("https?://", options.endpoint_url):
        raise Usage(f"endpoint {options.endpoint_url} has no scheme", f"write http://{options.endpoint_url}")
    if prefix := prefix.strip("/"):
        prefix += "/"
    kind = S3Store if scheme == "s3" else GCSStore
    return kind(bucket, prefix, options)


# ======================================================================================================
# Cloud
# ======================================================================================================

DMI_VENDOR: Final = "/sys/class/dmi/id/sys_vendor"  # who made this machine; not readable in some containers


@dataclass(frozen=True, slots=True)
class Cloud:
    """Where we run, as the metadata service says."""

    scheme: str  # s3 or gs
    instance: str
    region: str


def _ask_metadata(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """Return a short answer, "" where there is none."""
    import requests

    with requests.Session() as session:
        session.trust_env = False  # a proxy would answer for its own machine
        headers = {**headers, "Accept-Encoding": "identity"}
        reply = session.request(method, url, headers=headers, timeout=2, allow_redirects=False, stream=True)
        text = reply.raw.read(4096).decode("ascii", "replace").strip()
    if reply.headers.get("Metadata-Flavor") != headers.get("Metadata-Flavor"):
        return ""  # anybody may listen at that address
    if reply.status_code != 200 or not re.fullmatch(r"[A-Za-z0-9+/=_.:-]{1,1000}", text):
        return ""
    return text


def _ask_aws(endpoint: str) -> Cloud | None:
    base = (endpoint or "http://169.254.169.254").rstrip("/") + "/latest/"
    token = _ask_metadata(base + "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
    headers = {"X-aws-ec2-metadata-token": token}
    instance = _ask_metadata(base + "meta-data/instance-id", headers) if token else ""
    if not instance:
        return None
    return Cloud("s3", instance, _ask_metadata(base + "meta-data/placement/region", headers))


def _ask_gce(host: str) -> Cloud | None:
    base = f"http://{host or '169.254.169.254'}/computeMetadata/v1/instance/"
    headers = {"Metadata-Flavor": "Google"}
    instance = _ask_metadata(base + "id", headers)
    if not instance:
        return None
    zone = _ask_metadata(base + "zone", headers)  # projects/123/zones/europe-west1-b
    return Cloud("gs", instance, zone.rpartition("/")[2].rpartition("-")[0])


_CLOUDS: Final = (  # as DMI calls its maker, how to ask, the SDKs' own switch and address
    ("Amazon EC2", _ask_aws, "AWS_EC2_METADATA_DISABLED", "AWS_EC2_METADATA_SERVICE_ENDPOINT"),
    ("Google", _ask_gce, "NO_GCE_CHECK", "GCE_METADATA_HOST"),
)


def detect_cloud(environ: Mapping[str, str], dmi: str = DMI_VENDOR, limit_s: float = 5.0) -> Cloud | None:
    """Ask the metadata services of AWS (IMDSv2) and GCE at once. None: off cloud, by DMI or, without it, by silence.

    Raises Unreachable where DMI names a cloud and nobody answers: silence is no proof of another machine.
    """
    vendor = None
    with contextlib.suppress(OSError), open(dmi, errors="replace") as file:
        vendor = file.read().strip()
    if vendor == "Xen":  # older instances of AWS (I3, D2) say so; their BIOS's version is 4.11.amazon
        with contextlib.suppress(OSError), open(f"{os.path.dirname(dmi)}/bios_version", errors="replace") as file:
            if "amazon" in file.read():
                vendor = "Amazon EC2"
    answers = queue.SimpleQueue[Cloud | None]()
    asked: list[str] = []

    def ask(how: Callable[[str], Cloud | None], address: str) -> None:
        try:
            answers.put(how(address))
        except Exception as error:  # requests has many, and a thread must not die in silence
            log.debug("metadata service did not answer error=%s", quote(repr(error)))
            answers.put(None)

    for maker, how, switch, address in _CLOUDS:
        is_wanted = vendor in (None, maker) or environ.get(address)
        if is_wanted and environ.get(switch, "").lower() != "true":
            asked.append(maker)
            # A daemon: an answer that drips for ever holds nobody up.
            threading.Thread(target=ask, args=(how, environ.get(address, "")), daemon=True).start()
    deadline = time.monotonic() + limit_s
    for _ in asked:
        with contextlib.suppress(queue.Empty):
            if cloud := answers.get(timeout=max(0.0, deadline - time.monotonic())):
                return cloud
    if vendor in asked:
        what = f"cannot determine the instance id: this is {vendor}, and no metadata service answers"
        hint = "let this process reach 169.254.169.254, or pass --name and a bucket with s3:// or gs://"
        raise Unreachable(what, hint)
    return None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is and where it stores: decided once and remembered."""

    node: str
    instance: str
    url: str
    region: str


def machine_id() -> str:
    """Return the id of this installation, machine-id(5); "" where there is none."""
    with contextlib.suppress(OSError), open("/etc/machine-id") as file:
        return file.read().strip()
    return ""


def check_node_name(name: str) -> str:
    """Return a node's name if it can be one component of a key. Raises Usage."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}", name) or name.endswith((".listings", ".pending-delete")):
        raise Usage(f"node name {name!r} cannot be used in keys", "use letters, digits, - _ + and . (at most 200)")
    return name


def _name_node(instance: str) -> str:
    """Return <hostname>-<instance_id>. Raises Usage."""
    host = socket.getfqdn().strip().rstrip(".")
    if host.startswith("localhost"):  # /etc/hosts may call it so first
        host = socket.gethostname()
    if host in ("", "localhost", "localhost.localdomain"):
        raise Usage(f"host name {host!r} names no node", "set the host's name, or pass --name")
    if not instance:
        raise Usage("cannot determine the instance id: no metadata service and no /etc/machine-id", "pass --name")
    return check_node_name(f"{host}-{instance}")


def identify(
    bucket: str, prefix: str, name: str, region: str, environ: Mapping[str, str], known: Identity | None
) -> Identity:
    """Decide the node's name and the store's URL. Raises Usage, and Unreachable where the cloud is to be waited for.

    Another host name is the same node, another instance id another one, and silence changes nothing.
    """
    if not bucket:
        raise Usage("no bucket", "set BUCKET_NAME in /etc/default/cassbackup, or pass --bucket")
    known = known or Identity("", "", "", "")
    instance, cloud = machine_id()[:12], None
    is_bare = "://" not in bucket
    is_named = name or (instance and instance == known.instance)
    if is_bare or not is_named:
        try:
            cloud = detect_cloud(environ)
        except Unreachable:
            if not known.node:
                raise
    if cloud:
        instance = cloud.instance
    elif not re.fullmatch("([0-9a-f]{12})?", known.instance):
        instance = known.instance  # a cloud gave it
    if is_bare:
        scheme = cloud.scheme if cloud else known.url.partition("://")[0]
        if scheme not in ("s3", "gs"):
            hint = f"write BUCKET_NAME=s3://{bucket}, gs://{bucket} or file:///directory"
            raise Usage("this machine is neither AWS's nor Google's, so this bucket could be anywhere", hint)
        bucket = f"{scheme}://{bucket}"
    if name:
        check_node_name(name)
    elif known.node and known.instance == instance:
        name = known.node
    url = "/".join(part for part in (bucket.rstrip("/"), prefix.strip("/")) if part)
    if not region:
        region = cloud.region if cloud else known.region
    return Identity(name or _name_node(instance), instance, url, region)


def load_identity(path: str) -> Identity | None:
    """Return what was remembered, None where nothing was that can be read."""
    try:
        with open(path, "rb") as file:
            document = load_document(path, file.read())
        return Identity(*(typed(document, one.name, str) for one in fields(Identity)))
    except (OSError, Fault, KeyError, TypeError):
        return None


def write_file(path: str, body: bytes, durable: bool = True) -> None:
    """Write a small file so that it is there as a whole or not at all; if `durable`, after a power cut too."""
    # The directory may be another user's: O_NOFOLLOW, so that no link has us overwrite what it points to.
    how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(f"{path}.tmp", how, 0o644), "wb") as file:
        os.fchmod(file.fileno(), 0o644)  # whatever the umask is
        file.write(body)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.rename(f"{path}.tmp", path)
    if durable:
        directory = os.open(os.path.dirname(path) or ".", os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def save_identity(path: str, identity: Identity) -> None:
    """Remember it, or fail and leave what was there. Raises OSError."""
    write_file(path, dump_document(**asdict(identity)))


# ======================================================================================================
# Cassandra
# ======================================================================================================

_YAMLS: Final = ("/etc/cassandra/cassandra.yaml", "/etc/cassandra/conf/cassandra.yaml")


class Nodetool:
    """Cassandra's own nodetool, or its cqlsh, as the operator calls it."""

    def __init__(self, command: str, timeout_s: float | None = None) -> None:
        self._command, self._timeout_s = shlex.split(command), timeout_s

    def __call__(self, *words: str) -> str:
        """Run a command of nodetool; return what it says. Raises Fault where it fails, or takes too long."""
        name, command = self._command[0], [*self._command, *words]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, encoding="utf-8", errors="replace", timeout=self._timeout_s
            )
        except OSError as error:
            raise Usage(f"{name} cannot be run ({error.strerror})", "pass its path: --nodetool, --cqlsh") from None
        except subprocess.TimeoutExpired:
            what = f"{name} {words[0]} did not answer in {self._timeout_s:.0f} s"
            raise Fault(what, "is Cassandra up and answering? `nodetool status` should take a second") from None
        if not done.returncode:
            return done.stdout
        # It complains on either stream, and the JVM's warnings come first.
        lines = ["it says nothing", *filter(str.strip, f"{done.stderr}\n{done.stdout}".splitlines())]
        told = [line for line in lines if line.startswith(("nodetool:", "error:"))]
        why = told[0] if told else lines[-1]
        asked = " ".join([name, *words])
        raise Fault(f"{asked}: {quote(why)}", "is Cassandra running?")

    def version(self) -> str:
        """Return Cassandra's version, as 4.1.3; "" where the answer tells none."""
        match = re.search(r"^ReleaseVersion:\s*(\S+)", self("version"), re.M)
        return match[1] if match else ""

    def incremental_backup(self) -> bool:
        """Tell whether Cassandra links what it flushes, and what it imports, into backups/."""
        return re.search(r"^running\s*$", self("statusbackup"), re.M) is not None


def cassandra_pids() -> list[str]:
    """Return the processes on this machine that are a Cassandra."""
    pids = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"org.apache.cassandra.service.CassandraDaemon" in file.read():
                pids.append(pid)
    return pids


def yaml_texts(text: str, key: str) -> list[str]:
    """Read one text or a list of them from a YAML file: key: a, key: [a, b], or - a on lines below."""
    text = re.sub(r"(^|[ \t])#.*", "", text, flags=re.M)
    match = re.search(rf"^{key}:[ \t]*(?:\[([^\]]*)\]|(\S.*)|((?:\s*-[ \t].*)*))", text, re.M)
    if not match:
        return []
    listed, alone, below = match.groups(default="")
    items = [*listed.split(","), alone, *re.findall(r"^\s*-\s(.*)", below, re.M)]
    return [name for item in items if (name := item.strip().strip("\"'"))]


def configured_directories() -> list[str]:
    """Return the data directories that cassandra.yaml names. Raises Usage where it names that of system tables alone.

    Since 4.0 Cassandra may keep its own tables, and with them host id, tokens and schema, on a disk of their own
    (CASSANDRA-14793).
    """
    for path in _YAMLS:
        if os.path.exists(path):
            with open(path, errors="surrogateescape") as file:
                text = file.read()
            data = yaml_texts(text, "data_file_directories")
            system = yaml_texts(text, "local_system_data_file_directory")
            if system and not data:  # then Cassandra has its data below its own home
                raise Usage(f"{path} names no data_file_directories", "name all data directories as PATHs")
            return data + system
    return []


def data_directories(paths: Sequence[str] = ()) -> list[str]:
    """Return the data directories: as given, as cassandra.yaml says, or where Cassandra usually has them.

    They need not be there: a disk may be mounted late. Raises Usage where none is named, or one lies in another.
    """
    found = list(paths) or configured_directories()
    if not found:
        usual = ("/var/lib/cassandra/data", "/data")
        found = [path for path in usual if os.path.isdir(f"{path}/system")]
    if not found:
        raise Usage("no data directory found", "name it: cassbackup /var/lib/cassandra/data")
    found = list(dict.fromkeys(map(os.path.abspath, found)))
    for path in found:
        if any(path.startswith(other.rstrip("/") + "/") for other in found):
            raise Usage(f"{quote(path)} is inside another data directory", "name only the outer one")
    return found


def tables_in(root: str) -> Iterator[str]:
    """Yield the tables of a data directory, as keyspace/table-id."""
    return ("/".join(path.split("/")[-3:-1]) for path in glob.iglob(f"{glob.escape(root)}/*/*-*/"))


# ======================================================================================================
# Ledger
# ======================================================================================================

_LEDGER_TABLES: Final = """
    PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-4096;
    CREATE TABLE IF NOT EXISTS stored (bytes PRIMARY KEY, key, etag, crc32, run, confirmed, sum) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS listed (directory, life, listed, marks, sum, PRIMARY KEY (directory, life, listed))
        WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS facts (name PRIMARY KEY, value, sum) WITHOUT ROWID;
"""
# UnicodeDecodeError: Python reads the names of columns, and what SQLite has to say of them.
_LEDGER_FAILURES: Final = (sqlite3.DatabaseError, UnicodeDecodeError)
_ASK, _WRITE = 500, 100  # rows at a time; until 3.32 SQLite took no more than 999 parameters


def _name_bytes(quoted_place: str, name: str, disk: str, fingerprint: Fingerprint) -> str:
    inode, size, mtime_ns = fingerprint
    return f"{quoted_place}/{quote(name)} {disk}-{inode:x}-{size:x}-{mtime_ns:x}"


class Remembered(NamedTuple):
    """Where some bytes are stored, and who was told so by the store, and when."""

    key: str
    etag: str
    crc32: str
    run: str  # Ledger._run; "" where it is hearsay
    confirmed: float  # by Ledger.now


class Ledger:
    """A cache that may be lost: which bytes are stored under which key, and what is listed of each directory.

    SQLite does not notice a flipped bit, and a ledger of another bucket must not speak for this one. So every row
    carries a checksum over itself, the bucket and node (`scope`) and the life of the bucket; a row that does not
    check is not there. A ledger that cannot be read or written is done without: `broken` says why.
    """

    def __init__(self, path: str, scope: str) -> None:
        self._path, self._scope = path, scope
        self._tries = iter([path] * 3)  # a disk that damages every file must not keep us here for ever
        self._epoch = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._run = f"{random.getrandbits(64):x}"  # this process, since it last had doubts
        self.broken = self.bucket = ""
        self._db = self._open()
        # The id in owner.json. Where the ledger knows none, no other row checks either.
        self.bucket = self.fact("bucket")

    def _open(self) -> sqlite3.Connection:
        for path in self._tries:
            try:
                return self._connect(path)
            except _LEDGER_FAILURES as error:
                self._note(error)
        self._path = ":memory:"
        return self._connect(self._path)

    @staticmethod
    def _connect(path: str) -> sqlite3.Connection:
        db = sqlite3.connect(path)
        # As os.fsdecode, but faster: else one damaged letter would hide every row that is read with it.
        db.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")
        try:
            db.executescript(_LEDGER_TABLES)
        except _LEDGER_FAILURES:
            db.close()
            raise
        return db

    def _note(self, error: Exception) -> bool:
        """Say that the ledger fails. Return whether its file is damaged, and moved aside for that."""
        if isinstance(error, sqlite3.ProgrammingError):
            raise error  # it was used in another thread than the loop's
        if not self.broken:
            log.error("ledger failed, going on without it error=%s", quote(str(error)))
        self.broken = str(error)
        # What SQLite says where there is no room, no right, a disk that fails. Then the file may be good.
        if re.search("unable to open|readonly|disk is full|disk I/O|locked", self.broken):
            return False
        log.warning("ledger is damaged, beginning a new one kept=%s", quote(f"{self._path}.broken"))
        for suffix in ("-wal", "-shm", ""):  # the log first: left alone, it would be played into the new file
            with contextlib.suppress(OSError):
                os.replace(self._path + suffix, f"{self._path}.broken{suffix}")
        return True

    def _fail(self, error: Exception) -> None:
        if self._note(error):
            self._db.close()
            self._db = self._open()
            self.forget(self.bucket)

    def now(self) -> float:
        """Return now as time.time() does, but it never goes back: an old word must not become a fresh one."""
        return self._epoch + time.clock_gettime(time.CLOCK_BOOTTIME)

    def _sum(self, row: tuple[object, ...]) -> int:
        return zlib.crc32(repr((self._scope, self.bucket, row)).encode())

    def _select(self, query: str, *args: str) -> list[tuple[Any, ...]]:
        """Return the rows that check, without their checksums."""
        try:
            rows = self._db.execute(query, args).fetchall()
        except _LEDGER_FAILURES as error:
            self._fail(error)
            return []
        return [tuple(row) for *row, checksum in rows if checksum == self._sum(tuple(row))]

    def _change(self, statement: str, *args: object) -> None:
        """Do a statement, in a transaction of its own."""
        try:
            with self._db:
                self._db.execute(statement, args)
        except _LEDGER_FAILURES as error:
            self._fail(error)
            return
        if self._path != ":memory:":
            self.broken = ""

    def _write(self, table: str, rows: Sequence[tuple[object, ...]]) -> None:
        # Many with one statement: around each SQLite lets other threads run, and then we wait for our turn.
        for start in range(0, len(rows), _WRITE):
            summed = [(*row, self._sum(row)) for row in rows[start : start + _WRITE]]
            marks = ", ".join("?" * len(summed[0]))
            places = ", ".join([f"({marks})"] * len(summed))
            self._change(f"INSERT OR REPLACE INTO {table} VALUES {places}", *itertools.chain(*summed))

    def lookup(self, place: str, pins: Iterable[Pinned]) -> dict[FileBytes, Remembered]:
        """Return what is remembered of the bytes of these files of a table, wherever they were stored from."""
        where = quote(place)
        names = {(pin.path, pin.fingerprint): _name_bytes(where, pin.name, pin.disk, pin.fingerprint) for pin in pins}
        asked = list(names.values())
        found: dict[str, Remembered] = {}
        for start in range(0, len(asked), _ASK):
            some = asked[start : start + _ASK]
            marks = ", ".join("?" * len(some))
            for row in self._select(f"SELECT * FROM stored WHERE bytes IN ({marks})", *some):
                found[row[0]] = Remembered(*row[1:])
        return {file: found[name] for file, name in names.items() if name in found}

    def record(self, place: str, entries: Iterable[tuple[str, Known]]) -> dict[FileBytes, Remembered]:
        """Remember files and their disks: a Stored as this process has it from the store, a Known as hearsay."""
        rows = []
        told = {}
        where = quote(place)
        for disk, entry in entries:
            run = self._run if isinstance(entry, Stored) else ""
            one = Remembered(entry.key, entry.etag, entry.crc32, run, self.now())
            told[entry.path, entry.fingerprint] = one
            rows.append((_name_bytes(where, entry.name, disk, entry.fingerprint), *one))
        self._write("stored", rows)
        return told

    def is_fresh(self, one: Remembered) -> bool:
        """Tell whether the store itself has told this very process, a short while ago."""
        return one.run == self._run and self.now() < one.confirmed + CONFIRMED_S

    def doubt(self) -> None:
        """Take what the store has told this process for hearsay: every key is asked for again."""
        self._run = f"{random.getrandbits(64):x}"

    def trim(self, before: float) -> None:
        """Forget the bytes that nobody has stored, confirmed or listed since a moment."""
        self._change("DELETE FROM stored WHERE confirmed < ?", before)

    def add_listed(self, life: str, listed: str, marks: Mapping[str, Collection[int]]) -> None:
        """Remember what a listing has of each directory, as 64-bit marks."""
        rows = [(quote(directory), life, listed, array("Q", some).tobytes()) for directory, some in marks.items()]
        self._write("listed", rows)

    def listed(self) -> dict[str, tuple[str, array[int]]]:
        """Return {directory: (its newest life, the marks of what is listed of that)}."""
        found: dict[str, tuple[str, array[int]]] = {}
        for quoted, life, _, blob in self._select("SELECT * FROM listed ORDER BY life"):
            directory = unquote(quoted)
            if directory not in found or found[directory][0] != life:
                found[directory] = (life, array("Q"))
            found[directory][1].frombytes(blob)
        return found

    def replace_listed(self, directory: str, life: str, until: str, marks: Collection[int]) -> None:
        """Remember these marks in place of all that was listed of a directory until a moment (UTC)."""
        self._change("DELETE FROM listed WHERE directory = ? AND listed <= ?", quote(directory), until)
        self.add_listed(life, until, {directory: marks})

    def forget_directory(self, directory: str) -> None:
        """Forget what is listed of a directory: it is gone."""
        self._change("DELETE FROM listed WHERE directory = ?", quote(directory))

    def fact(self, name: str) -> str:
        """Return a remembered value, "" if there is none."""
        return self.facts(name).get("", "")

    def facts(self, prefix: str) -> dict[str, str]:
        """Return the remembered values whose names begin with a prefix, by the rest of the name."""
        first = quote(prefix)
        rows = self._select("SELECT * FROM facts WHERE name BETWEEN ? AND ?", first, f"{first}\U0010ffff")
        return {unquote(name[len(first) :]): unquote(value) for name, value in rows}

    def remember(self, name: str, value: str) -> None:
        """Remember a value; "" is none."""
        if value:
            self._write("facts", [(quote(name), quote(value))])
        else:
            self._change("DELETE FROM facts WHERE name = ?", quote(name))

    def forget(self, bucket: str) -> None:
        """Forget everything: from now on the ledger is of another life of the bucket."""
        # What a full disk keeps us from deleting does not check any more.
        for table in ("stored", "listed", "facts"):
            self._change(f"DELETE FROM {table}")
        # This row belongs to the scope alone, or nobody could read it at the next start.
        self.bucket = ""
        self.remember("bucket", bucket)
        self.bucket = bucket

    def close(self) -> None:
        """Close the file."""
        self._db.close()


# ======================================================================================================
# Pinner
# ======================================================================================================

_OPEN_DIRECTORY: Final = os.O_DIRECTORY | os.O_NOFOLLOW
# link(2): not from here, not by you, not at all; and a directory in which you may make nothing.
_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EACCES)
_EVENT: Final = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, length of the name; inotify(7)
_NEVER_SCANNED: Final = (".cassbackup", "lost+found")  # ours; and fsck's, where the data directory is a mount
_EMPTY: Final = "it is empty"
_MAY_LINK: Final = "run as the owner of the data, with room on its disk: see df and df -i"
_UNLINK: Final = "make it a data directory of its own, or leave it out: --exclude-keyspace, --exclude-table"
_STEP: Final = 200  # unlinks at a time; then what is to be pinned comes first
_SOON_S: Final = 0.05  # a scan that is due so soon means: not idle
_UNWATCHED_S: Final = 2.0  # how often directories are scanned that inotify has no room for
_STATE_S: Final = 5.0  # how often the pinner gives a sign of life


def lock_file(path: str) -> int:
    """Take a lock and write our pid into its file; it goes with the process. Raises Busy with the holder's pid."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Busy(f"another cassbackup (pid {holder}) holds {path}", "ask it with `cassbackup status`") from None
    with contextlib.suppress(OSError):  # a full disk may have no room for it, and the lock is what counts
        size = os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        os.ftruncate(fd, size)
    return fd


def mark_of(name: str, fingerprint: Fingerprint) -> int:
    """Return 64 bits that stand for a listed file: what is done is remembered without its name.

    TOC.txt counts by its inode alone: when an index is built Cassandra appends to it, and so to every snapshot's link
    to it.
    """
    inode, size, mtime_ns = fingerprint
    if name.endswith("TOC.txt"):
        size = mtime_ns = 0
    text = f"{name}\0{inode:x}.{size:x}.{mtime_ns:x}"
    told = text.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(told, digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mark_there(entry: os.DirEntry[str]) -> int:
    """Return the mark of a scanned file; 0, which no file has, if it has vanished since."""
    try:
        return mark_of(entry.name, Fingerprint.of(entry.stat(follow_symlinks=False)))
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class Filters:
    """What the operator wants stored. Globs; `include` and `exclude` are regular expressions on the whole path."""

    keyspace: tuple[str, ...] = ()
    exclude_keyspace: tuple[str, ...] = ()
    exclude_table: tuple[str, ...] = ()  # keyspace.table
    exclude_tag: tuple[str, ...] = ()
    include: re.Pattern[str] | None = None  # archives: without it only snapshots/ and backups/ are scanned
    exclude: re.Pattern[str] | None = None
    only_tag: str = ""  # nothing but snapshots/<only_tag>

    def wants_directory(self, relative: str) -> bool:
        """Tell whether a directory, given by its path below the data directory, is scanned."""
        parts = relative.split("/")
        if parts[-1] in _NEVER_SCANNED or any_glob(parts[0], self.exclude_keyspace):
            return False
        if self.keyspace and not any_glob(parts[0], self.keyspace):
            return False
        if len(parts) > 1:
            table = table_id_of(parts[1])[0]
            if any_glob(f"{parts[0]}.{table}", self.exclude_table):
                return False
        if len(parts) < 3 or parts[2:] == ["snapshots"]:
            return True
        if parts[2] == "snapshots":
            return parts[3] == self.only_tag if self.only_tag else not any_glob(parts[3], self.exclude_tag)
        return not self.only_tag and (parts[2] == "backups" or self.include is not None)

    def wants_file(self, path: str) -> bool:
        """Tell whether a file outside snapshots/ and backups/ is wanted."""
        return not self.only_tag and self._includes(path)

    def _includes(self, path: str) -> bool:
        return bool(self.include and self.include.search(path)) and not (self.exclude and self.exclude.search(path))

    def is_archive(self, root: str, roots: Iterable[str]) -> bool:
        """Tell whether a data directory has, or may have, archived files: it may be empty, and without tables."""
        # Archives are empty most of the time, so what lies in them tells nothing: only the pattern does. It fits a
        # commit log there, or has the path written out, perhaps escaped, before names of another kind.
        spelt = self.include.pattern.replace("\\", "") if self.include else ""
        told = [path for path in roots if f"{path}/" in spelt or self._includes(f"{path}/CommitLog-7-1.log")]
        if told:
            return root in told
        return self.include is not None  # archived files have other names, as .gz: nothing can be told

    def unmatched(self, names: Collection[str]) -> Iterator[str]:
        """Yield the filters that fit none of the keyspaces and ks.tables there are. Tags come and go: not theirs."""
        given = {
            "keyspace": self.keyspace,
            "exclude-keyspace": self.exclude_keyspace,
            "exclude-table": self.exclude_table,
        }
        for option, patterns in given.items():
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    yield f"--{option} {pattern}"


def _short(name: str, suffix: str) -> str:
    """Return a name and its suffix, or #<hash> and the suffix where that would be more than NAME_MAX, 255 bytes."""
    if name.startswith("#") or len(os.fsencode(name + suffix)) > 255:
        name = "#" + hash_name(name)
    return name + suffix


def _keep_name(pins: str, short: str, name: str) -> None:
    """Write down in a directory of pins what a #<hash> there stands for, before anything is linked under it."""
    path = f"{pins}/{short}.name"
    if not os.path.exists(path):
        write_file(path, os.fsencode(name))


def _read_name(path: str) -> str:
    with open(path, "rb") as file:
        return os.fsdecode(file.read())


def user_name(uid: int) -> str:
    """Return a user's name; in a container he may have a number alone."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _prove_link(root: str, path: str) -> None:
    """Link some file of the data directory into the pin directory, and unlink it again. Raises OSError.

    st_dev does not tell: two bind mounts of one file system have the same, and link(2) fails from one to the other.
    """
    probe = os.path.join(path, "probe~")
    problem: OSError | None = None
    with contextlib.suppress(FileNotFoundError):
        os.unlink(probe)  # of a process that was killed here
    if os.stat(root).st_dev != os.stat(path).st_dev:  # all that can be said where there is no file yet
        problem = OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    # fs.protected_hardlinks allows us links to files of our own: they prove nothing about Cassandra's.
    folders = ((folder, names) for folder, _, names in os.walk(root) if ".cassbackup" not in folder)
    files = (os.path.join(folder, name) for folder, names in folders for name in names)
    for file in itertools.islice(files, 20):
        try:
            os.link(file, probe, follow_symlinks=False)
            os.unlink(probe)
            return
        except FileNotFoundError:
            continue  # a compaction was faster
        except OSError as error:  # perhaps of this file alone: it may be another user's, or have 65,000 links
            problem = error
    if problem:
        raise problem


class PinDirectory:
    """The pins of one data directory: hard links, in a directory for each source directory and life.

        <path>/ks1%2Fusers-5a1c%2Fsnapshots%2Fdaily~<life>/nb-1-big-Data.db~

    Cassandra does not start over a strange name in .db, and clears what is called snapshots: no name of ours is such.
    What would be too long is called #<hash>; then a file #<hash>.name beside the pins tells the true name. A file
    `lost` names what was given up.

    It is made closed, with path and id "", and opened by `check` when the data directory is there. From then on
    `read`, `lost` and what only names a path may be called by any thread, all else by the pinner alone.
    """

    def __init__(self, root: str, pin_dir: str = "") -> None:
        self.root = os.path.abspath(root)
        self.path = self.id = ""
        self.inode = self._device = self._lock = -1
        self._pin_dir = pin_dir

    def source(self, relative: str) -> str:
        """Return the path of a source directory."""
        return f"{self.root}/{relative}" if relative else self.root

    def directory(self, relative: str, life: str) -> str:
        """Return the path of the directory for the pins of a source directory."""
        return f"{self.path}/{_short(quote(relative, slash='%2F'), f'~{life}')}"

    def candidates(self) -> list[str]:
        """Return where the pins may be, the best place first."""
        real = os.path.realpath(self.root)
        if self._pin_dir:
            return [os.path.join(os.path.realpath(self._pin_dir), quote(real, slash="%2F"))]
        # Cassandra never looks beside its data directory, and its walks pass over a directory called backups.
        above, name = os.path.split(real)
        beside = os.path.join(above, ".cassbackup", name)
        inside = os.path.join(real, ".cassbackup", "backups")
        # Best is where we have been before: pins may wait there, and its id is part of what the ledger knows.
        return sorted((beside, inside), key=lambda path: not os.path.exists(f"{path}/id"))

    def check(self, may_be_empty: bool = False) -> str:
        """Return why nothing of the data directory can be pinned, "" if it can. Raises Usage, Busy.

        `may_be_empty`: as an archive, of which pins may wait though nothing lies there any more.
        """
        try:
            info = os.stat(self.root)
            with os.scandir(self.root) as entries:
                is_empty = all(entry.name in _NEVER_SCANNED for entry in entries)
        except PermissionError:  # it may be the place where a disk is mounted late
            return f"user {user_name(os.geteuid())} may not read it: run as the owner of the data"
        except OSError as error:
            return str(error.strerror)
        if self._device not in (-1, info.st_dev):
            return "it is on another file system than before"
        if is_empty and not (may_be_empty and self._has_pins()):
            return _EMPTY
        why = "" if self.path else self._open(user_name(info.st_uid))
        if not why:
            self._device = info.st_dev
        return why

    def _has_pins(self) -> bool:
        for path in [self.path] if self.path else self.candidates():
            with contextlib.suppress(OSError):
                if any(is_utc(name.rpartition("~")[2]) for name in os.listdir(path)):
                    return True
        return False

    def _open(self, owner: str) -> str:
        """Open the first pin directory that can be had. What every place refuses for good is a wrong configuration."""
        problems: dict[str, OSError] = {}
        for path in self.candidates():
            try:
                self._take(path)
                return ""
            except OSError as error:
                problems[path] = error
        each = [f"{quote(path)}: {error.strerror}" for path, error in problems.items()]
        said = "; ".join(each)
        user = user_name(os.geteuid())
        text = f"user {user} cannot link files of {quote(self.root)} into pins ({said})"
        if any(error.errno == errno.EROFS for error in problems.values()):
            text += "; under systemd each disk needs its ReadWritePaths=: systemctl edit cassbackup"
        if all(error.errno in _NO_LINK for error in problems.values()):
            raise Usage(text, f"run as {owner}, who owns the data, with the pins on the same mount: --pin-dir")
        return text

    def _take(self, path: str) -> None:
        """Make a pin directory ours. Raises OSError, Busy."""
        if os.path.realpath(path) != path:
            raise OSError(errno.ELOOP, "a symbolic link leads there; remove it")
        os.makedirs(path, 0o755, exist_ok=True)
        info = os.stat(path)
        if info.st_uid not in (os.geteuid(), os.stat(self.root).st_uid):
            raise OSError(
                errno.EACCES, f"it belongs to user {user_name(info.st_uid)}; give it to the owner of the data"
            )
        lock, identity = lock_file(f"{path}/lock"), f"{path}/id"
        try:
            _prove_link(os.path.realpath(self.root), path)
            if not os.path.exists(identity):
                write_file(identity, os.urandom(6).hex().encode())
            self.id = _read_name(identity)
        except OSError:
            os.close(lock)
            raise
        self.path, self.inode, self._lock = path, info.st_ino, lock

    def make(self, relative: str, life: str) -> int:
        """Make the directory for the pins of a source directory if it is not there, and open it."""
        path = self.directory(relative, life)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
        short = os.path.basename(path).rpartition("~")[0]
        if short.startswith("#"):
            _keep_name(path, short, quote(relative, slash="%2F"))
        return os.open(path, _OPEN_DIRECTORY)

    def pending(self) -> list[tuple[str, str]]:
        """Return (life, source directory) of each directory that holds something. Empty ones, of a crash, go."""
        found = []
        for name in os.listdir(self.path):
            path = f"{self.path}/{name}"
            short, _, life = name.rpartition("~")
            if is_utc(life) and self.tidy(path):
                if short.startswith("#"):
                    short = _read_name(f"{path}/{short}.name")
                relative = unquote(short)
                # A kill amid giving up leaves names that are lost and pinned: they are not lost.
                names = self.lost(relative, life)
                lost = [name for name in names if not os.path.lexists(f"{path}/{_short(name, '~')}")]
                with contextlib.suppress(OSError):  # a full disk has no room for that: only we can make some
                    self.write_lost(relative, life, lost)
                found.append((life, relative))
        return sorted(found)

    def tidy(self, path: str) -> int:
        """Return how much a pin directory holds, its pins and `lost`; remove it if that is nothing."""
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            return 0
        left = sum(not name.endswith((".name", ".tmp")) for name in names)
        if not left:
            for name in names:
                os.unlink(f"{path}/{name}")
            os.rmdir(path)
        return left

    def pins(self, relative: str, life: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield the pins of a source directory as they are now, and the name of what each is of."""
        path = self.directory(relative, life)
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.endswith("~"):
                    continue
                name = entry.name[:-1]
                if name.startswith("#"):
                    try:
                        name = _read_name(f"{path}/{name}.name")
                    except FileNotFoundError:  # somebody removed it: a scan finds no pin of the file, and makes it anew
                        continue
                yield name, entry

    def read(self, relative: str, life: str) -> dict[FilePath, Pinned]:
        """Return the pins of a source directory with all that is known of them."""
        source = self.source(relative)
        files: dict[FilePath, Pinned] = {}
        for name, entry in self.pins(relative, life):
            with contextlib.suppress(FileNotFoundError):  # let go meanwhile
                info = entry.stat(follow_symlinks=False)
                who = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_nlink)
                files[source, name] = Pinned(source, name, Fingerprint.of(info), *who, entry.path, self.id)
        return files

    def lost(self, relative: str, life: str) -> list[str]:
        """Return the names of what was given up of a source directory, and is not yet listed as lost."""
        try:
            text = _read_name(f"{self.directory(relative, life)}/lost")
        except FileNotFoundError:
            return []
        return [unquote(line) for line in text.splitlines()]

    def write_lost(self, relative: str, life: str, names: Collection[str]) -> None:
        """Say durably which names are given up."""
        path = f"{self.directory(relative, life)}/lost"
        if names:
            lines = [quote(name) for name in sorted(names)]
            write_file(path, "\n".join(lines).encode())
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@dataclass(frozen=True, slots=True)
class Touched:
    """To the loop: a source directory has new pins of a unit; or, with files 0, pins that must be looked at again."""

    unit: Unit
    disk: PinDirectory
    relative: str
    files: int  # new ones
    found: float  # seconds since 1970
    in_place: tuple[FileBytes, ...] = ()  # those of the new ones that Cassandra writes in place, as they were pinned


@dataclass(frozen=True, slots=True)
class PinnerState:
    """To the loop: how the pinner is. Also its sign of life."""

    # When the last full scan began, seconds since 1970; 0 before the first has ended, of all or since `forget`.
    scanned: float
    counts: Mapping[str, int]  # found, found_by_rescan, vanished, refused, skipped, deleted
    refused: frozenset[str]  # directories in which something cannot be pinned
    tables: frozenset[str]  # ks/table-id
    absent: Mapping[str, str]  # data directories of which nothing can be pinned, and why
    unmatched: tuple[str, ...]  # filters that fit nothing


@dataclass(slots=True, eq=False)
class Place:
    """A directory that is scanned, and what the pinner knows of it."""

    disk: PinDirectory
    relative: str
    path: str
    unit: Unit  # without its life: with the other places of this unit, on all disks, it shares one
    has_files: bool  # else it is watched for new directories alone
    life: str = ""  # of the pins that wait, and of a tag also of what is listed; "" where there is none
    pins: Counter[str] = field(default_factory=Counter)  # how many we have linked and not let go, by life
    listed: array[int] = field(default_factory=lambda: array("Q"))  # marks of what is listed, and pinned no more
    held: int = -1  # a descriptor of the very directory, while it has pins: see Pinner._may_go_on
    wd: int = -1  # inotify's watch; -1 where it has no room
    inode: int = 0
    mtime_ns: int = 0  # as of the last scan; 0: scan again at the next reconciliation
    ready: float = 0.0  # not to be scanned again before this (monotonic)

    @property
    def is_tag(self) -> bool:
        """Tell whether it is of a snapshot."""
        return self.unit.kind == "snapshot"

    @property
    def is_table(self) -> bool:
        """Tell whether it is a table's own directory."""
        return self.relative.count("/") == 1

    def pinned(self) -> dict[str, int]:
        """Return the inodes of what is pinned, as far as it counts for a scan, by name.

        The disk is asked each time: a million names in memory would be 200 MB.
        """
        inodes: dict[str, int] = {}
        for life in [self.life] if self.is_tag else self.pins:
            inodes |= {name: entry.inode() for name, entry in self.disk.pins(self.relative, life)}
        return inodes


@dataclass(slots=True)
class Group:
    """The places that share a life: those of a tag, or of a table's backups/, in all data directories."""

    places: set[Place] = field(default_factory=set)
    life: str = ""  # what a place joins that finds something; "" where the next one begins a new life


class Inotify:
    """inotify(7): in which directories something may have changed.

    pyinotify gives the descriptor, the watches and the constants. Its Notifier is not used: it costs more than the
    pinning, drops events that arrive before it knows the watch, and dies of a name that is not UTF-8.
    """

    def __init__(self) -> None:
        try:
            import pyinotify
        except ImportError as error:
            raise Usage(f"pyinotify cannot be imported ({error})", "pip install pyinotify pyasyncore") from None
        self._names = pyinotify
        self._calls = pyinotify.INotifyWrapper.create()
        self._places: dict[int, Place] = {}
        self._warned = False
        self.fd: int = self._calls.inotify_init()  # -1 where it has no room; then no watch can be had either

    def arm(self, place: Place, fd: int) -> None:
        """Watch the directory open at fd; place.wd is -1 where there is no room.

        A directory of files gives one event (IN_ONESHOT), and is armed again before each scan: a burst of 80,000
        links is some hundred events, and the kernel's queue does not overflow.
        """
        mask = self._names.IN_CREATE | self._names.IN_MOVED_TO | self._names.IN_ONLYDIR
        if place.has_files:
            mask |= self._names.IN_CLOSE_WRITE | self._names.IN_ONESHOT
        # By the descriptor: it is the very directory that is scanned, and pyinotify cannot spell every name.
        wd = self._calls.inotify_add_watch(self.fd, f"/proc/self/fd/{fd}", mask)
        if wd != place.wd:
            self.disarm(place)
        place.wd = wd
        if wd >= 0:
            self._places[wd] = place
        elif not self._warned:
            self._warned = True
            hint = "sysctl fs.inotify.max_user_watches=1048576 fs.inotify.max_user_instances=1024"
            log.warning("inotify has no room, directories are scanned every few seconds hint=%s", hint)

    def disarm(self, place: Place) -> None:
        """End the watch of a directory that is gone, or no longer the one at its path."""
        if self._places.get(place.wd) is place:
            del self._places[place.wd]
            self._calls.inotify_rm_watch(self.fd, place.wd)

    def read(self) -> Iterator[Place]:
        """Yield the directories that may have changed."""
        events, at = os.read(self.fd, 256 * KIB), 0
        while at < len(events):
            wd, mask, _, length = _EVENT.unpack_from(events, at)
            at += _EVENT.size + length
            place = self._places.get(wd)
            if mask & self._names.IN_Q_OVERFLOW:
                log.warning("inotify lost events, scanning everything hint=raise fs.inotify.max_queued_events")
                yield from list(self._places.values())
            elif place and mask & self._names.IN_IGNORED:
                # The end of a one-shot, or of the directory. Where we armed again between the event and this end, we
                # armed the old watch, and it has died just now. So this is a hint like any other.
                del self._places[wd]
                yield place
            elif place and (place.has_files or mask & self._names.IN_ISDIR):
                yield place  # else it is a flush or a compaction in a live table's directory


class _Sorted(NamedTuple):
    """The entries of a directory of files."""

    found: list[os.DirEntry[str]]  # what is new
    folders: list[tuple[str, int]]  # name, inode
    seen: set[int]  # marks of what is listed
    replaced: bool  # a name has another inode than its pin
    unchanged: bool  # all that is pinned or listed is there


class Pinner(threading.Thread):
    """The one thread that watches, scans, links and unlinks. Nobody else touches a pin, so there is no lock.

    `listed` is {source directory: (life, marks of what is listed of it)}, as an earlier process left it. `post` is
    called by this thread with what the loop should know: Touched, PinnerState, and the error that ends it.
    """

    def __init__(
        self,
        disks: Sequence[PinDirectory],
        filters: Filters,
        listed: Mapping[str, tuple[str, array[int]]],
        reconcile_s: float,
        post: Callable[[object], None],
    ) -> None:
        super().__init__(name="pinner", daemon=True)
        self.idle = threading.Event()  # nothing is waiting to be pinned
        self._disks, self._filters, self._reconcile_s, self._post = disks, filters, reconcile_s, post
        self._inotify = Inotify()
        self._wake = os.eventfd(0)
        self._poll = select.poll()
        for fd in (self._wake, self._inotify.fd):
            if fd >= 0:
                self._poll.register(fd, select.POLLIN)
        self._requests: deque[tuple[Future[Any], Callable[[], object]]] = deque()
        self._stopping = self._over = False
        self._places: dict[str, Place] = {}
        self._groups: dict[Unit, Group] = {}
        self._dirty: dict[Place, None] = {}  # to be scanned
        self._newest_life = utc(0)
        self._pins: dict[str, set[tuple[PinDirectory, str]]] = {}  # source directories that have pins, by life
        self._may_hold = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2  # so many descriptors of places
        self._listed = dict(listed)  # of directories that no scan has come to, as of a disk that is away
        self._opened: set[PinDirectory] = set()
        self._counts: Counter[str] = Counter()
        self._unlinked = 0
        self._refused = set[str]()
        self._absent: dict[str, str] = {}
        self._named: set[str] = set()  # paths that the log has named
        self._names: set[str] = set()  # keyspaces and ks.tables that were seen
        self._scanned = self._reported = 0.0

    # From other threads

    def ask(self, do: Callable[..., T], *args: object) -> Future[T]:
        """Have this thread do something, as in `ask(pinner.scan_tag, unit)`; the answer comes with the Future."""
        future: Future[T] = Future()
        self._requests.append((future, functools.partial(do, *args)))
        os.eventfd_write(self._wake, 1)
        if self._over:
            self._turn_away()
        return future

    def stop(self) -> None:
        """Have the thread end; what is pinned stays pinned."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def _turn_away(self) -> None:
        while self._requests:
            future, _ = self._requests.popleft()
            if not future.done():
                future.set_exception(Fault("the pinner has ended"))

    # The thread

    def run(self) -> None:
        """Scan everything, then whatever a hint points at, until asked to stop."""
        try:
            for disk in self._disks:
                self._is_there(disk)  # what is known of all of them, before the first is scanned
            for disk in self._disks:
                self._place(disk, "")
            self._work()
        except Exception as error:
            log.exception("pinner failed")
            self._post(error)
        self._over = True
        self._turn_away()

    def _work(self) -> None:
        due = 0.0
        while not self._stopping:
            if time.monotonic() >= due:
                self.reconcile()
                unwatched = any(place.wd < 0 for place in self._places.values())
                due = time.monotonic() + (min(_UNWATCHED_S, self._reconcile_s) if unwatched else self._reconcile_s)
            self._pin_new(due)
            while self._requests:
                self._answer(*self._requests[0])
                self._requests.popleft()  # an error above leaves it to _turn_away

    def _answer(self, future: Future[Any], do: Callable[[], object]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(do())
            except OSError as error:
                future.set_exception(error)

    def _pin_new(self, until: float) -> None:
        """Wait for events, until a moment (monotonic) at the latest, and pin what they point at."""
        now = time.monotonic()
        next_scan = min((place.ready for place in self._dirty), default=math.inf)
        # Before the poll: said after it, the jobs would stand still until the next event.
        if next_scan > now + _SOON_S and not self.idle.is_set():
            self.idle.set()
            self._report()
        wait_s = max(0.0, min(next_scan, until, self._reported + _STATE_S) - now)
        for fd, _ in self._poll.poll(1000 * wait_s):
            if fd == self._wake:
                os.eventfd_read(fd)
            else:
                self._dirty.update(dict.fromkeys(self._inotify.read()))
        for place in [place for place in self._dirty if place.ready <= time.monotonic()]:
            self._scan(place)
        self._report_if_late()

    def _report_if_late(self) -> None:
        if time.monotonic() >= self._reported + _STATE_S:
            self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        tables = frozenset(place.relative for place in self._places.values() if place.is_table)
        unmatched = tuple(self._filters.unmatched(self._names)) if self._scanned else ()
        told = (dict(self._counts), frozenset(self._refused), tables, dict(self._absent), unmatched)
        self._post(PinnerState(self._scanned, *told))

    # Which directories are scanned

    def _has_changed(self, place: Place) -> bool:
        if place.relative and place.disk.root in self._absent:
            return False
        try:
            return os.lstat(place.path).st_mtime_ns != place.mtime_ns
        except OSError:
            return True

    def _enter(self, disk: PinDirectory, relative: str, inode: int) -> None:
        """Begin to scan a directory; or scan it again where another has come in its place.

        While we hold a directory's descriptor, its removal does not end its watch: what contains it must tell.
        """
        known = self._places.get(disk.source(relative))
        if known:
            if known.inode != inode:
                self._dirty[known] = None
            return
        parts = relative.split("/")
        if len(parts) == 1:
            self._names.add(relative)
        elif len(parts) == 2:
            keyspace, table = parts
            self._names.add(f"{keyspace}.{table_id_of(table)[0]}")
        if inode != disk.inode and self._filters.wants_directory(relative):
            self._scan(self._place(disk, relative))

    def _place(self, disk: PinDirectory, relative: str) -> Place:
        path = disk.source(relative)
        if path not in self._places:
            unit = unit_of(disk.root, relative, "")
            has_files = unit.kind != "archive"
            if self._filters.include and relative.split("/")[2:] != ["snapshots"]:
                has_files = True  # an archive, or what --include may find in one
            place = self._places[path] = Place(disk, relative, path, unit, has_files)
            if has_files:
                self._groups.setdefault(unit, Group()).places.add(place)
        return self._places[path]

    def _leave(self, place: Place) -> None:
        """Forget a directory that is gone."""
        del self._places[place.path]
        self._inotify.disarm(place)
        self._release(place)
        if not place.has_files:
            return
        group = self._groups[place.unit]
        group.places.discard(place)
        # A directory of the life is gone: nothing joins it any more. The others go on while they are held.
        if place.life == group.life:
            group.life = ""
        if not group.places:
            del self._groups[place.unit]

    def _release(self, place: Place) -> None:
        if place.held >= 0:
            os.close(place.held)
            place.held = -1
            self._may_hold += 1

    def _is_there(self, disk: PinDirectory) -> bool:
        """Tell whether a data directory is there; begin with it when it has come."""
        ours = [place.path for place in self._places.values() if place.disk is disk and place.is_table]
        had_tables = any(table_id_of(os.path.basename(path))[1] for path in ours)
        is_archive = self._filters.is_archive(disk.root, [other.root for other in self._disks])
        may_be_empty = is_archive and not had_tables
        try:
            why = disk.check(may_be_empty)
        except Fault as fault:
            why = str(fault)
        if why == _EMPTY and may_be_empty:
            self._absent.pop(disk.root, None)
            return False
        if not why and not is_archive and not had_tables and not any(tables_in(disk.root)):
            why = "it has no tables: name the directory above the keyspaces"  # as Cassandra's own always has
        if not why and disk not in self._opened:
            try:
                self._recover(disk)
                self._opened.add(disk)
            except OSError as error:
                why = f"what is pinned of it cannot be read ({error.strerror})"
        if why:
            if disk.root not in self._absent:
                log.error("data directory is absent path=%s error=%s", quote(disk.root), quote(why))
            self._absent[disk.root] = why
            return False
        if self._absent.pop(disk.root, None):
            log.warning("data directory is there path=%s", quote(disk.root))
            self._tell_all_pinned([disk])  # whose units wait for it
        return True

    def _recover(self, disk: PinDirectory) -> None:
        """Take up what an earlier process left of a data directory. The scan tells what of it is still there."""
        ours = [path for path in self._listed if f"{path}/".startswith(f"{disk.root}/")]
        for directory in ours:
            life, marks = self._listed[directory]
            place = self._resume(disk, directory[len(disk.root) + 1 :], life)
            if place:
                place.listed = marks
                del self._listed[directory]
        for life, relative in disk.pending():
            self._pins.setdefault(life, set()).add((disk, relative))
            self._tell_pinned(disk, relative, life)
            place = self._resume(disk, relative, life)
            if place:
                pins = disk.read(relative, life).values()
                place.pins[life] = len(pins)
                left = {mark_of(pin.name, pin.fingerprint) for pin in pins}  # listed, and not let go before the end
                place.listed = array("Q", set(place.listed) - left)

    def _tell_pinned(self, disk: PinDirectory, relative: str, life: str) -> None:
        found = min(seconds_of(life), time.time())  # a clock that was once ahead has named lives in the future
        self._post(Touched(unit_of(disk.root, relative, life), disk, relative, 0, found))

    def _tell_all_pinned(self, disks: Collection[PinDirectory]) -> None:
        for life, homes in self._pins.items():
            for disk, relative in homes:
                if disk in disks:
                    self._tell_pinned(disk, relative, life)

    def _resume(self, disk: PinDirectory, relative: str, life: str) -> Place | None:
        """Return the place in which a life goes on, if it does. What is listed of backups/ has no life.

        A tag is in one life at a time: older ones are sealed. In backups/ whatever waits counts as pinned.
        """
        self._newest_life = max(life, self._newest_life)
        if relative and not self._filters.wants_directory(relative):
            return None
        place = self._place(disk, relative)
        group = self._groups.get(place.unit)
        if not group:
            return None  # an archive that is no longer wanted
        if place.is_tag and life < group.life:
            return None
        if place.is_tag and life > group.life:
            self._end_life(group, group.life)
        if life:
            place.life = group.life = life
        return place

    # Scanning

    def reconcile(self) -> None:
        """Scan the directories that changed without a hint, or may have; and those that a hint named meanwhile."""
        began, before = time.time(), self._counts["found"]
        for place in list(self._places.values()):
            if self._has_changed(place):
                self._scan(place)
        while self._dirty:
            self._scan(next(iter(self._dirty)))
        if self._scanned:
            self._counts["found_by_rescan"] += self._counts["found"] - before
        self._refused = {path for path in self._refused if os.path.lexists(path)}
        self._scanned = began
        self._report()

    def _scan(self, place: Place) -> None:
        """Watch a directory, scan it, and pin what is new. Watch first: what comes between is seen by one of both."""
        self.idle.clear()
        self._dirty.pop(place, None)
        self._report_if_late()
        if self._places.get(place.path) is not place:
            return
        place.mtime_ns = 0  # to be scanned again, also where its disk is away; a scan that ends well sets it
        if place.relative and place.disk.root in self._absent:
            return
        began = time.monotonic()
        try:
            # The data directory itself may be reached through a link.
            fd = os.open(place.path, _OPEN_DIRECTORY if place.relative else _OPEN_DIRECTORY & ~os.O_NOFOLLOW)
        except OSError as error:
            if place.relative and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self._refuse(place.path, place.path, str(error.strerror))
            elif self._is_there(place.disk) and place.relative:
                self._leave(place)
            return
        try:
            self._scan_open(place, fd)
        except OSError as error:
            self._refuse(place.path, place.path, str(error.strerror))
        finally:
            os.close(fd)
        # Links into backups/ come one by one for long: a large directory is not scanned for each of them.
        rest = 0.0 if place.is_tag else 5 * min(0.2, time.monotonic() - began)
        place.ready = time.monotonic() + 0.01 + rest

    def _scan_open(self, place: Place, fd: int) -> None:
        self._inotify.arm(place, fd)
        info, refused = os.fstat(fd), self._counts["refused"]
        place.inode = info.st_ino
        if not place.relative and not self._is_there(place.disk):
            return
        if place.has_files:
            self._scan_files(place, fd)
        else:
            self._scan_folders(place, fd)
        if self._counts["refused"] == refused:
            self._refused.discard(place.path)
            # The kernel's clock for mtimes ticks coarsely: what changed just now may change again without a trace.
            if abs(time.time_ns() - info.st_mtime_ns) > 2e9:
                place.mtime_ns = info.st_mtime_ns

    def _scan_folders(self, place: Place, fd: int) -> None:
        # A live table's directory may hold thousands of files.
        for name in ("snapshots", "backups") if place.is_table else os.listdir(fd):
            relative = f"{place.relative}/{name}" if place.relative else name
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    self._enter(place.disk, relative, info.st_ino)
                elif stat.S_ISLNK(info.st_mode) and os.path.isdir(place.disk.source(relative)):
                    self._pass_over(place, name)

    def _pass_over(self, place: Place, name: str) -> None:
        """Name a link to a directory. Cassandra follows it. We do not: what is behind it may be on another disk."""
        relative = f"{place.relative}/{name}" if place.relative else name
        if not self._filters.wants_directory(relative):
            return
        path = place.disk.source(relative)
        tables = (table_id_of(table)[1] for table in tables_in(place.disk.root))
        if self._filters.include is None or any(tables):
            self._refuse(path, path, "symbolic link, nothing behind it is stored", _UNLINK)
        else:
            self._skip(path)  # in an archive

    def _scan_files(self, place: Place, fd: int) -> None:
        entries = self._sort(place, fd)
        if entries.found and not self._may_go_on(place, fd, entries):
            self._end_life(self._groups[place.unit], place.life)
            entries = self._sort(place, fd)
        if not place.is_tag:
            place.listed = array("Q", entries.seen)  # what was deleted from backups/ need not be remembered
        if entries.found:  # else what is missing is being cleared
            self._pin(place, fd, entries.found)
        for name, inode in entries.folders:  # of an index; after its table, whose life it joins
            self._enter(place.disk, f"{place.relative}/{name}" if place.relative else name, inode)

    def _sort(self, place: Place, where: int | str) -> _Sorted:
        """Compare a directory, given by a descriptor or by its path, with what is known of it."""
        found, folders, seen, still_pinned, replaced = [], [], set(), 0, False
        pinned, listed, is_archive = place.pinned(), set(place.listed), place.unit.kind == "archive"
        with os.scandir(where) as entries:
            for entry in entries:
                inode = pinned.get(entry.name)
                if inode == entry.inode():  # our link holds the number: it is the same file
                    still_pinned += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append((entry.name, entry.inode()))
                elif is_archive and entry.is_symlink() and os.path.isdir(f"{place.path}/{entry.name}"):
                    self._pass_over(place, entry.name)
                elif not entry.is_file(follow_symlinks=False):
                    self._skip(f"{place.path}/{entry.name}")
                elif is_archive and not self._filters.wants_file(f"{place.path}/{entry.name}"):
                    continue
                elif listed and (mark := mark_there(entry)) in listed:
                    seen.add(mark)
                else:
                    found.append(entry)
                    replaced = replaced or inode is not None
        # Counted by what we have linked: somebody may have removed a pin and its name.
        unchanged = still_pinned == place.pins[place.life] and len(seen) == len(listed)
        return _Sorted(found, folders, seen, replaced, unchanged)

    # Which life

    def _may_go_on(self, place: Place, fd: int, entries: _Sorted) -> bool:
        """Tell whether what was found belongs to the life that a directory is in. Asked only when something was.

        A name with another file than the one that we hold ends any life. A snapshot's directory that we hold open
        since its first pin goes on as long as it is that very directory: names may be missing, for this scan may fall
        into a clear. Where none is held, after a restart or when all was let go, all of the life must be there.
        """
        if entries.replaced:
            return False
        if not place.is_tag or not place.life:
            return True
        if place.held >= 0:
            return os.path.sameopenfile(place.held, fd)
        group = self._groups[place.unit]
        return place.life == group.life and self._life_is_intact(group)

    def _life_is_intact(self, group: Group) -> bool:
        """Tell whether all directories of a life are what they were."""
        return all(self._is_intact(place) for place in group.places if place.life == group.life)

    def _is_intact(self, place: Place) -> bool:
        if place.held < 0:
            return self._has_all_names(place)
        try:
            info = os.fstat(place.held)
            return info.st_nlink > 0 and os.lstat(place.path).st_ino == info.st_ino
        except OSError:
            return False

    def _has_all_names(self, place: Place) -> bool:
        """Tell whether all that was pinned of a directory still has its name there: nobody is clearing it."""
        try:
            return self._sort(place, place.path).unchanged
        except OSError:
            return False

    def _end_life(self, group: Group, life: str) -> None:
        """Seal a life in all data directories. Its pins wait for the loop; what comes now begins another life.

        In backups/ what is pinned still counts as pinned. A tag was taken again: there everything is pinned again.
        """
        if group.life == life:
            group.life = ""
        for place in group.places:
            if place.life == life:
                place.life = ""
                if place.is_tag:
                    self._release(place)
                    place.listed = array("Q")
                    self._dirty[place] = None

    def _join(self, place: Place) -> str:
        """Return the life that a directory joins: that of its group, or a new one."""
        group = self._groups[place.unit]
        if group.life and place.is_tag and not self._life_is_intact(group):
            self._end_life(group, group.life)
        if not group.life:
            group.life = self._newest_life = later(utc(time.time()), self._newest_life)
        return group.life

    # Pinning

    def _pin(self, place: Place, fd: int, found: Sequence[os.DirEntry[str]]) -> None:
        place.life = place.life or self._join(place)
        pins = place.disk.make(place.relative, place.life)
        self._pins.setdefault(place.life, set()).add((place.disk, place.relative))
        linked = 0
        in_place: list[FileBytes] = []
        try:
            for entry in found:
                pin = _short(entry.name, "~")
                try:
                    if pin.startswith("#"):
                        _keep_name(f"/proc/self/fd/{pins}", pin[:-1], entry.name)
                    os.link(entry.name, pin, src_dir_fd=fd, dst_dir_fd=pins, follow_symlinks=False)
                    linked += 1
                    if entry.name in IN_PLACE:
                        in_place.append(((place.path, entry.name), Fingerprint.of(os.stat(pin, dir_fd=pins))))
                except FileNotFoundError:
                    self._counts["vanished"] += 1
                    log.warning("vanished before it was pinned path=%s", quote(f"{place.path}/{entry.name}"))
                except OSError as error:
                    self._refuse(place.path, f"{place.path}/{entry.name}", str(error.strerror))
        finally:
            os.close(pins)
        if not linked:
            self._close_pins(place.disk, place.relative, place.life)
            return
        place.pins[place.life] += linked
        self._counts["found"] += linked
        unit = replace(place.unit, life=place.life)
        self._post(Touched(unit, place.disk, place.relative, linked, time.time(), tuple(in_place)))
        if place.is_tag:
            self._pin_manifests_again(place)
            if place.held < 0 and self._may_hold > 0:
                place.held = os.dup(fd)  # the scan closes its own
                self._may_hold -= 1

    def _pin_manifests_again(self, place: Place) -> None:
        """Have a snapshot's manifest.json pinned that was let go: it names the life of what came now."""
        for one in self._groups[place.unit].places:
            with contextlib.suppress(OSError):
                if one.listed and one.life == place.life:
                    mark = mark_of(MANIFEST, Fingerprint.of(os.lstat(f"{one.path}/{MANIFEST}")))
                    if mark in one.listed:
                        one.listed = array("Q", set(one.listed) - {mark})  # two listings may have it
                        self._dirty[one] = None

    def _skip(self, path: str) -> None:
        if path not in self._named:
            self._named.add(path)
            self._counts["skipped"] += 1
            log.info("not a regular file, skipped path=%s", quote(path))

    def _refuse(self, directory: str, path: str, why: str, hint: str = _MAY_LINK) -> None:
        """Name what cannot be pinned now. It is tried again at each reconciliation: the hint is used up."""
        self._counts["refused"] += 1
        self._refused.add(directory)
        if path not in self._named:
            self._named.add(path)
            log.error("cannot pin path=%s error=%s hint=%s", quote(path), why, hint)

    # What the loop has done by `ask`

    def scan_tag(self, unit: Unit) -> bool:
        """Scan a tag in every data directory; tell whether nothing was missed, and all of this life is still there."""
        missed = self._counts["vanished"] + self._counts["refused"]
        relative = f"{unit.keyspace}/{unit.table}/snapshots/{unit.tag}"
        if self._filters.wants_directory(relative):
            for disk in self._disks:
                if os.path.isdir(disk.source(relative)):
                    self._place(disk, relative)
        group = self._groups.get(replace(unit, life=""), Group())
        for place in list(group.places):
            self._scan(place)
        # One that had the tag and has it no more has ended the life: what was missed there nobody knows.
        if group.life != unit.life or self._absent:
            return False
        if self._counts["vanished"] + self._counts["refused"] != missed:
            return False
        return all(self._has_all_names(place) for place in group.places if place.life == unit.life)

    def let_go(
        self,
        unit: Unit,
        files: Mapping[FilePath, Fingerprint],
        lost: Collection[FilePath],
        delete: Collection[FilePath],
        kept: Collection[FilePath],
    ) -> int:
        """Unlink the pins of files that are listed, if they still are these; return how much is left of the unit.

        `lost` is listed as lost. Of what is to `delete`, and in backups/, the name that Cassandra gave it goes too.
        `kept` stays pinned, and is not counted.
        """
        homes = list(self._pins.get(unit.life, ()))
        pins = {disk.source(relative): disk.directory(relative, unit.life) for disk, relative in homes}
        # manifest.json goes last: as long as there are pins, it tells which life they are of.
        for path in sorted(files, key=lambda path: path[1] == MANIFEST):
            source, name = path
            if name == MANIFEST and self._others_wait(pins.values()):
                continue
            if source in pins:
                with contextlib.suppress(FileNotFoundError):
                    pin = f"{pins[source]}/{_short(name, '~')}"
                    self._let_go_of(unit, path, files[path], pin, delete)
        left = 0
        for disk, relative in homes:
            if lost:
                # What was given up since the pins were read is in no listing yet: its names must stay.
                source = disk.source(relative)
                names = [name for name in disk.lost(relative, unit.life) if (source, name) not in lost]
                disk.write_lost(relative, unit.life, names)
            left += self._close_pins(disk, relative, unit.life)
        for source, name in kept:
            if source in pins and os.path.lexists(f"{pins[source]}/{_short(name, '~')}"):
                left -= 1
        return left

    def _others_wait(self, directories: Iterable[str]) -> bool:
        """Tell whether anything but manifest.json is pinned in these. A later start could not tell its life without."""
        for directory in directories:
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(directory):
                    if name.endswith("~") and name != f"{MANIFEST}~":
                        return True
        return False

    def _let_go_of(
        self, unit: Unit, path: FilePath, fingerprint: Fingerprint, pin: str, delete: Collection[FilePath]
    ) -> None:
        info = os.lstat(pin)
        if Fingerprint.of(info) != fingerprint:
            return  # it changed since it was read: it goes round again
        if path in delete and unit.kind == "incremental":
            self._delete_source(os.path.join(*path), info)
        os.unlink(pin)
        source, name = path
        place = self._places.get(source)
        if place:
            place.pins[unit.life] -= 1
            if place.life == unit.life or not place.is_tag:  # else it is in another life by now
                place.listed.append(mark_of(name, fingerprint))
        self._pin_between()

    def _delete_source(self, path: str, pin: os.stat_result) -> None:
        """Unlink a file of backups/ by its own name, if that still is the file that we hold."""
        try:
            if os.path.samestat(os.lstat(path), pin):
                os.unlink(path)
                self._counts["deleted"] += 1
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cannot delete path=%s error=%s", quote(path), error.strerror)

    def _pin_between(self) -> None:
        """After every so many unlinks, pin what has come meanwhile."""
        self._unlinked += 1
        if self._unlinked % _STEP == 0:
            self._pin_new(0.0)

    def _close_pins(self, disk: PinDirectory, relative: str, life: str) -> int:
        """Return how much is left of a pin directory; close it if that is nothing."""
        left = disk.tidy(disk.directory(relative, life))
        if left or not os.path.exists(f"{disk.path}/id"):  # else the disk of the pins is away, with what it holds
            return left or sys.maxsize  # nobody knows how much
        homes = self._pins.get(life, set())
        homes.discard((disk, relative))
        if not homes:
            self._pins.pop(life, None)
        place = self._places.get(disk.source(relative))
        if place and place.pins.pop(life, 0) > 0:
            log.error("somebody removed pins, what is still there is pinned again path=%s", quote(place.path))
            self._dirty[place] = None
        if place and place.life == life:
            self._release(place)
            if not place.is_tag:
                place.life = self._groups[place.unit].life = ""
        return 0

    def give_up(self, disk: PinDirectory, relative: str, life: str, links: Mapping[str, int]) -> tuple[str, ...]:
        """Unlink pins that have no other links than so many of ours; return which names are lost by that."""
        folder = disk.directory(relative, life)
        pins = {name: f"{folder}/{_short(name, '~')}" for name in links}
        alone: dict[str, os.stat_result] = {}
        for name, pin in pins.items():
            with contextlib.suppress(FileNotFoundError):
                info = os.lstat(pin)
                if info.st_nlink <= links[name]:
                    alone[name] = info
        if alone:
            names = {*disk.lost(relative, life), *alone}
            try:
                disk.write_lost(relative, life, names)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # To write names needs room, so the largest pin goes first. The log has its name, should it fail again.
                largest = max(alone, key=lambda name: alone[name].st_size)
                path = quote(f"{disk.source(relative)}/{largest}")
                log.error("LOST, the disk is too full to note it first path=%s", path)
                os.unlink(pins[largest])
                try:
                    disk.write_lost(relative, life, names)
                except OSError:  # somebody took the room at once: this one is lost, and the others are not
                    alone = {largest: alone[largest]}
        for name in alone:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(pins[name])
            place = self._places.get(disk.source(relative))
            if place:
                place.pins[life] -= 1
                self._dirty[place] = None
            self._pin_between()
        return tuple(alone)

    def listed(self) -> dict[str, array[int]]:
        """Return the marks of what is listed of each directory that is there, or whose disk is away."""
        known = {path: marks for path, (_, marks) in self._listed.items()}
        known.update((place.path, place.listed[:]) for place in self._places.values())
        return known

    def forget(self) -> None:
        """Pin whatever is there: nothing is listed any more."""
        self._listed.clear()
        for place in self._places.values():
            place.listed = array("Q")
            self._dirty[place] = None
        self._tell_all_pinned(self._disks)  # what was listed, and is pinned all the same
        self._scanned = 0.0
        self._report()
        # Before we answer: whoever takes us for idle must find all of it pinned.
        self.reconcile()


# ======================================================================================================
# Upload
# ======================================================================================================

_DONTCACHE: Final = 0x80  # RWF_DONTCACHE, Linux 6.14: the kernel drops again what this read brought in
_WAYS: Final = (  # flags of preadv2(2), and status of the descriptor
    (_DONTCACHE, 0),
    (0, os.O_DIRECT),  # past the cache
    (0, 0),  # tmpfs and its like have no disk below their cache
)
_UNABLE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def read_quietly(fd: int, start: int, end: int) -> memoryview:
    """Read a range of a file, and leave the page cache as Cassandra filled it. Raises Changed where the file ends.

    POSIX_FADV_DONTNEED after a plain read would drop from the cache what Cassandra has there, too.
    """
    skipped = start % mmap.PAGESIZE
    pages = (skipped + end - start) // mmap.PAGESIZE + 1
    # O_DIRECT wants whole pages. And what is mapped goes back to the kernel with the last view of it, where malloc
    # would keep megabytes for every thread.
    window = mmap.mmap(-1, pages * mmap.PAGESIZE, mmap.MAP_PRIVATE)
    got = 0
    for flags, status in _WAYS:
        try:
            if not flags:  # else it is as it was opened
                fcntl.fcntl(fd, fcntl.F_SETFL, status)
            got = os.preadv(fd, [window], start - skipped, flags)
            break
        except OSError as error:
            if error.errno not in _UNABLE or (flags, status) == _WAYS[-1]:
                raise
    if got < skipped + end - start:
        if os.fstat(fd).st_size >= end:  # before a bad block a buffered read gives what it has, and no error
            raise OSError(errno.EIO, f"the disk gives {got - skipped} bytes from {start} on, and no more")
        raise Changed(f"the file ends before byte {end}", "it is read again")
    return memoryview(window)[skipped : skipped + end - start]


@dataclass(frozen=True, slots=True)
class PinnedSource:
    """A pinned file, to be put into a store."""

    pinned: Pinned

    @property
    def size(self) -> int:
        """Return the bytes of the file as it was pinned."""
        return self.pinned.size

    def read(self, start: int, end: int) -> memoryview:
        """Read a range. Raises Changed if these are not the bytes that were pinned; OSError if the disk refuses."""
        # Not open(): each system call lets another thread run, and to get back costs more than the call.
        fd = os.open(self.pinned.pin, os.O_RDONLY)
        try:
            body = read_quietly(fd, start, end)
            # Cassandra appends to TOC.txt and writes manifest.json in place: only now is it sure what was read.
            if Fingerprint.of(os.fstat(fd)) != self.pinned.fingerprint:
                raise Changed(f"{quote(self.pinned.pin)} changed while it was read", "it is read again")
        finally:
            os.close(fd)
        return body


@functools.lru_cache(1000)
def _owner(uid: int, gid: int) -> tuple[str, str]:
    group = str(gid)
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(gid).gr_name
    return user_name(uid), group


def known_of(pin: Pinned, key: str, etag: str, crc32: str) -> Known:
    """Return a pinned file as one that is said to be stored."""
    user, group = _owner(pin.uid, pin.gid)
    return Known(pin.directory, pin.name, pin.fingerprint, pin.mode, user, group, crc32, key, etag)


_values_of = operator.attrgetter(*(one.name for one in fields(Known)))


def as_stored(known: Known) -> Stored:
    # Only `send` and `confirm` may say so: the store itself has just told them.
    return Stored(*_values_of(known))


def _find_place(store: Store, pin: Pinned, key: str, moment: str) -> ObjectInfo:
    """Store a file whose key is taken. What is there may be these very bytes: then a reply of the store was lost."""
    source = PinnedSource(pin)
    crc32 = crc32_of(pieces(source))
    for candidate in (key, f"{key}@{crc32}", f"{key}@{crc32}.{moment}"):
        info = store.head(candidate)
        if not info:
            with contextlib.suppress(Conflict):
                return store.put(candidate, source)
        elif info.size == source.size and store.holds(info, source, crc32):
            return replace(info, crc32=crc32)
    raise Conflict(f"{quote(key)} is taken, whatever is added to it", "nobody but cassbackup should write there")


Sent = Stored | Fault | OSError


def send(store: Store, files: Sequence[tuple[Pinned, str]], moment: str) -> list[Sent]:
    """Store pinned files under their keys; return of each what became of it. A fault of one costs no other.

    `moment` is a UTC of which no key was made before: it makes a new one where other content has the key.
    """
    results: list[Sent] = []
    puts = store.put_all([(key, PinnedSource(pin)) for pin, key in files])
    for (pin, key), put in zip(files, puts, strict=True):
        try:
            if isinstance(put, Conflict):
                put = _find_place(store, pin, key, moment)
            if not isinstance(put, ObjectInfo):
                raise put
            results.append(as_stored(known_of(pin, put.key, put.etag, put.crc32)))
        except (Fault, OSError) as error:
            results.append(error)
    return results


def send_one(store: Store, pin: Pinned, key: str, moment: str) -> Stored:
    """Store one pinned file. Raises what stood in the way."""
    [result] = send(store, [(pin, key)], moment)
    if isinstance(result, Stored):
        return result
    raise result


def check_digest(store: Store, data: Pinned, digest: Pinned, stored: Known, moment: str) -> Known | None:
    """Hold a Data.db against its Digest.crc32: Cassandra writes the CRC-32 of the whole file there, in decimal.

    Return what is stored, after another reading where the two differ; None where they go on differing.
    """
    body = PinnedSource(digest).read(0, min(20, digest.size))
    text = bytes(body).strip()
    crc32 = hex32(int(text)) if text.isdigit() else stored.crc32
    if crc32 == stored.crc32:
        return stored
    # Scrub can leave a stale digest behind (SSTableRewriter), so the caller warns, and lists it all the same.
    if crc32_of(pieces(PinnedSource(data))) != crc32:
        return None
    again = send_one(store, data, f"{stored.key}@{moment}", moment)
    return again if again.crc32 == crc32 else None


# ======================================================================================================
# Publish
# ======================================================================================================

PinMap = Mapping[FilePath, Pinned]
ReadFile = Callable[[FilePath], bytes]
_INDEX_IN_TAG = re.compile(r"/snapshots/[^/]+/(\.[^/]+)\Z")

# ---- is it complete: pure functions


def _read_manifest(body: bytes) -> dict[str, Any] | None:
    """Return what a manifest.json says, as "files" its Data.db files; None while Cassandra is still writing it."""
    try:
        manifest = dict(json.loads(body))
        manifest["files"] = [str(name) for name in manifest["files"]]
    except (ValueError, KeyError, TypeError):
        return None
    return manifest


def manifest_time(files: Iterable[File]) -> str:
    """Return the UTC at which Cassandra wrote manifest.json, the first if there are several; "" if there is none."""
    written = [file.fingerprint.written for file in files if file.name == MANIFEST]
    return utc(min(written)) if written else ""


def sstable_in(name: str) -> str:
    """Return nb-1-big, or .idx/nb-1-big, of a component's name; "" for what is no component."""
    folder, slash, base = name.rpartition("/")
    split = sstable_of(base)
    return f"{folder}{slash}{split[0]}" if split else ""


def sstable_at(path: FilePath) -> str:
    """Return the path of the SSTable that a file is of; "" for another file."""
    return sstable_in(os.path.join(*path))


def _needed(sstable: str) -> tuple[str, ...]:
    kind = sstable.rpartition("-")[2]
    if kind.isdigit():  # ks-t-ka-12: before Cassandra 2.2 no name told the format
        kind = "big"
    return NEEDED_COMPONENTS.get(kind, ("Data.db",))  # of another format its TOC.txt tells


def _has_checksums(sstable: str, names: Collection[str]) -> bool:
    """Tell whether CompressionInfo.db is there, as of a compressed table, or CRC.db, as of any other."""
    return f"{sstable}-CompressionInfo.db" in names or f"{sstable}-CRC.db" in names


def _unfulfilled(sstable: str, names: Mapping[str, FilePath], read: ReadFile) -> list[str]:
    """Return what an SSTable lacks: of what its own TOC.txt names, and of what must be there anyway."""
    words = {"TOC.txt", *_needed(sstable)}
    toc = f"{sstable}-TOC.txt"
    told = read(names[toc]).decode("utf-8", "replace").split() if toc in names else []
    words.update(told)
    if not told and not _has_checksums(sstable, names):  # none, or empty after a power cut
        words.add("CompressionInfo.db")
    needed = {f"{sstable}-{word}" for word in words if not OPTIONAL_COMPONENT.fullmatch(word)}
    return sorted(needed - names.keys())


def lacks_toc_alone(missing: Sequence[str]) -> bool:
    """Tell whether Cassandra can open an SSTable, for only its TOC.txt is missing.

    A node that gets an SSTable whole from another one (bootstrap, repair, sstableloader) gets no TOC.txt with it, and
    makes one when it next starts (SSTableZeroCopyWriter, TOCComponent.loadOrCreate).
    """
    return len(missing) == 1 and missing[0].endswith("-TOC.txt")


class Verdict(NamedTuple):
    """What may be said of a snapshot."""

    missing: list[str]
    strays: frozenset[FilePath]  # these files are not of it
    ephemeral: bool  # a repair took it for itself (CASSANDRA-12404)


def judge_snapshot(files: Collection[FilePath], read: ReadFile, scanned: bool) -> Verdict:
    """Tell whether a table's snapshot is complete.

    Cassandra writes manifest.json after the last link of a table, and it names every Data.db (TableSnapshot,
    SnapshotManifest). `scanned`: a scan of all data directories, begun after it was final, missed nothing. Else, when
    the tag is cleared already, and for an SSTable with neither CompressionInfo.db nor CRC.db, its TOC.txt decides.
    """
    told = [_read_manifest(read(path)) for path in files if path[1] == MANIFEST]
    manifests = [one for one in told if one is not None]
    ephemeral = any(name == EPHEMERAL for _, name in files)
    if any(one.get("ephemeral") is True for one in manifests):
        ephemeral = True
    if not manifests or len(manifests) < len(told):
        return Verdict([MANIFEST], frozenset(), ephemeral)
    named: set[str] = {name for one in manifests for name in one["files"]}
    names = {}
    for path in files:
        directory, name = path
        index = _INDEX_IN_TAG.search(directory)
        if index:
            name = f"{index[1]}/{name}"  # manifest.json spells it .idx/nb-1-big-Data.db
        names[name] = path
    missing = named - names.keys()
    for name in named & names.keys():
        sstable = name.removesuffix("-Data.db")
        # Whatever a scan said: a clear that was broken off may have left but a part of an SSTable.
        missing.update({f"{sstable}-{word}" for word in _needed(sstable)} - names.keys())
        if not scanned or not _has_checksums(sstable, names):
            lacks = _unfulfilled(sstable, names, read)
            if not lacks_toc_alone(lacks):
                missing.update(lacks)
    ours = {"", *map(sstable_in, named)}
    strays = frozenset(path for name, path in names.items() if sstable_in(name) not in ours)
    return Verdict(sorted(missing), strays, ephemeral)


def judge_incrementals(files: Collection[FilePath], read: ReadFile) -> dict[str, list[str]]:
    """Return what the SSTables among these files lack, where they lack something: {path of SSTable: paths}."""
    names = {os.path.join(*path): path for path in files}
    sstables = {sstable_at(path) for path in files} - {""}
    return {sstable: missing for sstable in sstables if (missing := _unfulfilled(sstable, names, read))}


# ---- what the bucket says


def newest_document(store: Store, prefix: str) -> dict[str, Any]:
    """Return the newest of <prefix>json and <prefix><UTC>.json, {} where there is none. Raises Corrupt, Usage."""
    keys = [info.key for info in store.list(prefix)]
    if not keys:
        return {}
    newest = max(keys, key=lambda key: (len(key), key))  # owner.json comes before owner.<UTC>.json
    return load_document(newest, read_object(store, newest))


def read_documents(store: Store, folder: str) -> Iterator[tuple[ObjectInfo, dict[str, Any]]]:
    """Yield the JSON objects in a folder, in the order of their keys. Raises Corrupt, Usage."""
    after = ""
    is_whole = False
    while not is_whole:
        is_whole = True
        for info in store.list(folder, after):
            after = info.key
            try:
                document = load_document(info.key, read_object(store, info.key))
            except Missing:  # deleted since the list: what was written in its place before that comes after it
                is_whole = False
                break
            yield info, document


def check_owner(owner: Mapping[str, Any], machine: str, what: str) -> None:
    """Raise Usage if a node's name in the bucket is another machine's. `owner`: its owner.json, {} before the first."""
    theirs = owner.get("machine_id")
    if owner and theirs != machine:
        hint = "give this node another --name; or --adopt, if it is the same node on a new machine"
        raise Usage(f"{what} belongs to another machine ({theirs})", hint)


def pending_keys(node: str, key: str, document: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys that one of prune's pending-delete files names. Raises Corrupt."""
    keys = document.get("keys")
    if isinstance(keys, list):
        texts = [one for one in keys if isinstance(one, str) and not _NO_NAME.search(one.replace("/", ""))]
        ours = [one for one in texts if one.startswith(f"{node}/")]
        if len(ours) == len(keys):
            return frozenset(ours)
    raise Corrupt(f"{quote(key)} names what is not of this node", "nothing is deleted; look at it, or remove it")


def read_bad_keys(store: Store, node: str) -> frozenset[str]:
    """Return the keys that verify --repair has found bad. A later file lifts a mark by naming the key good."""
    found: dict[str, str] = {}
    for info, document in read_documents(store, f"{node}.listings/bad/"):
        try:
            for mark in document["keys"]:
                found[typed(mark, "key", str)] = typed(mark, "found", str)
        except (KeyError, TypeError) as error:
            raise Corrupt(f"{quote(info.key)} cannot be read ({error!r})", "put it right or delete it") from None
    return frozenset(key for key, what in found.items() if what != "good")


@dataclass(frozen=True, slots=True)
class BucketView:
    """What a publication must know of the bucket. One reading serves a minute."""

    read: float  # when this reading began, by the store's clock
    owner: str  # the random id in owner.json, "" where it is absent: which life of the bucket this is
    bad: frozenset[str]
    verified: float  # when verify --repair last looked, in seconds since 1970; 0: never
    doomed: frozenset[str]  # what no listing may name: what is bad, and what prune deletes, or has just deleted
    sources: Sequence[ObjectInfo]  # from which all this was read


def view_bucket(store: Store, node: str, before: BucketView | None) -> BucketView:
    """Read who owns the node's name, what prune is about to delete, and what is marked bad."""
    began = store.now()
    marks = list(store.list(f"{node}.listings/bad/"))
    sources = list(store.list(f"{node}.pending-delete/"))
    sources += store.list(f"{node}.listings/owner.")
    sources += marks
    if before and before.sources == sources:  # each is written once, and may be long
        return replace(before, read=began)
    bad = doomed = read_bad_keys(store, node)
    for info, document in read_documents(store, f"{node}.pending-delete/"):
        doomed |= pending_keys(node, info.key, document)
    owner = newest_document(store, f"{node}.listings/owner.")
    verified = max((mark.modified for mark in marks), default=0.0)
    return BucketView(began, str(owner.get("id", "")), bad, verified, doomed, sources)


# ---- from Known to Stored


def by_folder(keys: Iterable[str]) -> dict[str, set[str]]:
    """Sort keys by their folders, which end in a slash."""
    folders: dict[str, set[str]] = {}
    for key in keys:
        folders.setdefault(key.rpartition("/")[0] + "/", set()).add(key)
    return folders


def find_infos(store: Store, folder: str, wanted: set[str]) -> dict[str, ObjectInfo]:
    """Return what is there of these keys of one folder, by a LIST from the first of them to the last, or by HEAD."""
    found: dict[str, ObjectInfo] = {}
    if len(wanted) > 3:
        last = max(wanted)
        # A page of a list tells a thousand keys. But backups/ may hold a year of them, so there is a limit.
        listed = store.list(folder, after=min(wanted)[:-1])
        for info in itertools.islice(listed, 1_000 + 10 * len(wanted)):
            if info.key > last:
                break
            if info.key in wanted:
                found[info.key] = info
    for key in wanted - found.keys():
        asked = store.head(key)
        if asked:
            found[key] = asked
    return found


class Finding(NamedTuple):
    """What is wrong with an object or a listing."""

    found: str  # good, absent, size, checksum, failed, denied or archived; of a listing unreadable, or gone
    what: str  # the same in words


_GOOD: Final = Finding("good", "")


def _compare(entry: Known, info: ObjectInfo | None) -> Finding:
    size = entry.size
    if not info:
        return Finding("absent", "is not there")
    if info.size != size:
        return Finding("size", f"has {info.size} bytes, listed with {size}")
    if info.crc32 and info.crc32 != entry.crc32:
        return Finding("checksum", f"has CRC-32 {info.crc32}, listed with {entry.crc32}")
    return _GOOD


def check_object(store: Store, entry: Known, info: ObjectInfo | None, deep: bool = False) -> Finding:
    """Compare an object with its entry. `info` is what LIST or HEAD told; `deep` downloads it."""
    is_same = info is not None and info.etag == entry.etag != ""
    if info and not is_same:
        # Another ETag under a key that is written once: an operator has copied the bucket, or encrypted it anew. The
        # checksum decides, which a LIST does not tell.
        info = store.head(entry.key)
    finding = _compare(entry, info)
    if not info or finding != _GOOD:
        return finding
    if (is_same or info.crc32) and not deep:
        return _GOOD
    try:
        return _compare(entry, replace(info, crc32=crc32_of(store.get(entry.key))))
    except Missing:
        return _compare(entry, None)


def confirm(
    store: Store, entries: Collection[Known], doomed: frozenset[str], asked: Collection[str] = ()
) -> tuple[list[Stored], list[Known]]:
    """Ask the store for what is only known: return what it has as recorded, and what is gone, or doomed.

    `asked` are the keys for which this process has had the store's word within the last twelve hours, in this life
    of the bucket. This is the only way from Known to Stored.
    """
    certain = set(asked) - doomed
    open_keys = {entry.key for entry in entries} - certain - doomed
    infos: dict[str, ObjectInfo] = {}
    for folder, keys in by_folder(open_keys).items():
        infos |= find_infos(store, folder, keys)
    stored: list[Stored] = []
    gone: list[Known] = []
    for entry in entries:
        if entry.key in certain or check_object(store, entry, infos.get(entry.key)) == _GOOD:
            stored.append(as_stored(entry))
        else:
            gone.append(entry)
    return stored, gone


# ---- what is listed already


def _is_component(part: str) -> bool:
    return part not in ("", ".", "..") and part.isprintable() and len(part.encode()) < 256


@functools.lru_cache(1000)
def _is_folder_of(node: str, folder: str) -> bool:
    # Kept: a listing names thousands of files in few folders.
    parts = folder.split("/")
    return parts[0] == node and all(map(_is_component, parts))


def _is_file_of(node: str, key: str) -> bool:
    folder, _, name = key.rpartition("/")
    return _is_folder_of(node, folder) and _is_component(name)


def check_listing(node: str, key: str, body: bytes) -> Listing[Known]:
    """Read a listing. Raises Corrupt unless it says what its key says, and names only objects of this node."""
    try:
        listing = load_listing(body)
    except Corrupt as fault:
        raise Corrupt(f"{quote(key)}: {fault.what}", fault.hint) from None
    if listing_key(listing) != key or listing.node != node:
        raise Corrupt(f"{quote(key)} does not say what its name says", "it was moved here or damaged")
    for entry in listing.files:
        if not _is_file_of(node, entry.key) or not entry.etag.isprintable():
            raise Corrupt(f"{quote(key)} names the object {quote(entry.key)}", "that is no file of this node")
    return listing


def _listing_keys(store: Store, prefix: str, after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, after) if parse_listing_name(info.key)]


def _read_listings(store: Store, node: str, keys: Iterable[str]) -> list[Listing[Known]]:
    """Read listings, the oldest first. One that cannot be read is named in the log, and does not count."""
    listings = []
    for key in sorted(keys):
        try:
            listings.append(check_listing(node, key, read_object(store, key)))
        except (Corrupt, Missing) as fault:
            log.error("listing does not count key=%s error=%s", quote(key), quote(str(fault)))
    return listings


def add_up(listings: Sequence[Listing[Known]]) -> Listing[Known] | None:
    """Add up listings of one unit, the oldest first: of each file the later entry, complete once any says so."""
    if not listings:
        return None
    files: dict[FilePath, Known] = {}
    for listing in listings:
        files.update((entry.path, entry) for entry in listing.files)
    complete = any(listing.complete for listing in listings)
    return replace(listings[-1], files=tuple(files.values()), complete=complete)


def bytes_of(files: Iterable[File]) -> set[FileBytes]:
    """Return of files where they are, and which bytes they are."""
    return {(file.path, file.fingerprint) for file in files}


class Before(NamedTuple):
    """What the bucket lists of a snapshot already."""

    listing: Listing[Known]  # its listings added up, but for what is gone or doomed; without files where it has none
    covered: bool  # a complete listing of another life has every file of this one


def listed_snapshot(store: Store, node: str, view: BucketView, unit: Unit, pins: PinMap) -> Before:
    """Return what the bucket lists of the life of a tag that these pins are of, and what that life is called.

    Only manifest.json tells one life from another: the SSTables are the same inodes in every snapshot. So it is the
    life whose listing has our manifest, or the one that is called like our pin directories, listed before its
    manifest came. Where there is none, it gets the name of the manifest's mtime, which survives the loss of all memory.
    """
    whole_tag = replace(unit, life="")
    folders = by_folder(_listing_keys(store, unit_prefix(node, whole_tag)))
    new = replace(unit, life=manifest_time(pins.values()) or unit.life)
    own = unit_prefix(node, unit)
    named = unit_prefix(node, new)
    # A process that had lost its memory may have listed it under a third name: the newest are asked, too.
    candidates = [own, named, *sorted(folders)[-3:]]
    ours = bytes_of(pins.values())
    manifests = bytes_of(pin for pin in pins.values() if pin.name == MANIFEST)
    covered = False
    for folder in dict.fromkeys(candidates):
        listing = add_up(_read_listings(store, node, folders.get(folder, ())))
        if not listing:
            continue
        theirs = bytes_of(listing.files)
        stored, gone = confirm(store, listing.files, view.doomed)
        is_ours = folder == own or bool(manifests & theirs)
        if folder == named and not any(entry.name == MANIFEST for entry in listing.files):
            is_ours = True  # its manifest.json, after which it is called, was refused then
        if is_ours:
            complete = listing.complete and not gone
            return Before(replace(listing, files=tuple(stored), complete=complete), False)
        if listing.complete and ours <= theirs and not gone:
            covered = True
    return Before(Listing(node, new, "", "", False, ()), covered)


def listed_incrementals(
    store: Store, node: str, view: BucketView, unit: Unit, pins: PinMap
) -> tuple[list[Listing[Known]], list[Stored]]:
    """Return the listings that may name pinned files of backups/, or of an archive; and which files they do name."""
    prefix = unit_prefix(node, unit)
    # A file is listed after it was written.
    oldest = min((pin.fingerprint.written for pin in pins.values()), default=0.0)
    keys = _listing_keys(store, prefix, after=prefix + utc(oldest))
    listings = _read_listings(store, node, keys)
    ours = bytes_of(pins.values())
    entries = itertools.chain.from_iterable(listing.files for listing in listings)
    found = {entry.path: entry for entry in entries if (entry.path, entry.fingerprint) in ours}
    stored, _ = confirm(store, found.values(), view.doomed)
    return listings, stored


def newest_snapshots(store: Store, node: str, unit: Unit) -> list[Listing[Known]]:
    """Return the newest complete snapshot of a table, and the newest one after it that is incomplete, if any.

    One of some token ranges is neither.
    """
    prefix = table_prefix(node, unit.keyspace, unit.table)
    there = _listing_keys(store, f"{prefix}snapshots/")
    keys = [key for key in there if not is_partial(Unit("snapshot", tag=key.split("/")[-3]))]
    keys.sort(key=os.path.basename)  # it begins with the UTC
    complete = [key for key in keys if "-complete-" in os.path.basename(key)]
    later = keys[keys.index(complete[-1]) + 1 :] if complete else keys
    return _read_listings(store, node, complete[-1:]) + _read_listings(store, node, later[-1:])


# ---- the commit


def publish(
    store: Store, view: BucketView, draft: Listing[Known], pins: PinMap, asked: Collection[str], moment: str
) -> Listing[Stored]:
    """Confirm every key, store again what is gone, write the listing.

    Prune marks a key a day before it deletes it: who reads the marks, asks for the keys and writes the listing within
    an hour names no key that then goes. Where the store does not answer, the caller repeats all of it, with a new
    view and a new `draft.listed`. `moment`, of which no key was made before, stays: a large file that took more than
    an hour is there at the second try.
    """
    stored, gone = confirm(store, draft.files, view.doomed, asked)
    missing: list[str] = []
    for entry in gone:
        pin = pins.get(entry.path)
        if pin and pin.fingerprint == entry.fingerprint:
            key = object_key(draft.node, pin.path)
            stored.append(send_one(store, pin, f"{key}@{moment}", moment))
        else:
            log.error("gone from the store and from this node, not listed path=%s", quote("/".join(entry.path)))
            missing.append(entry.name)
    complete = draft.complete and not missing
    all_missing = (*draft.missing, *missing)
    confirmed = replace(draft, complete=complete, files=tuple(stored), missing=all_missing)
    listing = cast(Listing[Stored], confirmed)
    key = listing_key(listing)
    body = dump_listing(listing)
    check_listing(draft.node, key, body)  # what we could not read again must not be written
    store.put(key, Body(body))
    if store.now() - view.read > PUBLISH_LIMIT_S:
        raise Unreachable("publishing a listing took more than an hour", "it is done again: prune may have run")
    return listing


# ======================================================================================================
# Daemon
# ======================================================================================================

_BATCH_FILES: Final = 16  # small files that one job takes along: a hop to a worker costs as much as a quarter of a put
_BATCH_BYTES: Final = 4 * MIB
_ROUND_FILES: Final = 1_000  # incrementals are listed in rounds of so many files,
_ROUND_BYTES: Final = 4 * GIB  # or so many bytes, so that the first of a great backlog are listed soon
_RETRY_S: Final = 60.0  # a unit that was refused is tried again after this time, then after twice the time
_RETRY_MOST_S: Final = 900.0
_CHANGES: Final = 30  # a file that has changed at so many tries will not stand still
_TURN_S: Final = 900.0  # so long files are tried at a store that does not take them; then others have their turn
_VIEW_S: Final = 60.0
_DURATIONS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds; buckets of a histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions(Filters):
    """What the operator chose for the daemon. Times are in seconds; parts of a disk are such as 0.1."""

    bucket: str
    store: StoreOptions
    paths: tuple[str, ...] = ()
    state_dir: str = "/var/lib/cassbackup"
    pin_dir: str = ""
    prefix: str = ""
    name: str = ""
    full: bool = False
    delete_uploaded_incrementals: bool = False
    max_pinned: float = 0.1
    min_free: float = 0.05
    incomplete_after: float = 60.0
    reconcile: float = 60.0
    heartbeat: float = 900.0
    adopt: bool = False
    once: bool = False
    metrics_listen: str = ""
    metrics_textfile: str = ""
    problems: tuple[str, ...] = ()  # settings that are wrong, but not so that nothing could be backed up


@dataclass(slots=True)
class Operation:
    """How the jobs of one kind go, and what went wrong last."""

    durations: list[int] = field(default_factory=lambda: [0] * (len(_DURATIONS) + 1))  # how many took so long
    seconds: float = 0.0  # how long all of them took
    failed: int = 0
    error: str = ""  # "" when the last one succeeded
    since: float = 0.0  # when it began to fail, seconds since 1970


class Workers:
    """Threads for the calls that block. A job takes values and returns a value; the loop awaits it.

    Urgent jobs have two threads of their own. A job that failed because the store did not answer is tried again, and
    waits for that without a thread. What went wrong last is kept for each operation: a LIST that works must not hide a
    put that fails.
    """

    def __init__(self, idle: threading.Event, threads: int, patience_s: float) -> None:
        self._idle, self._patience_s = idle, patience_s
        self._pools = {True: ThreadPoolExecutor(2, "urgent"), False: ThreadPoolExecutor(threads, "bulk")}
        # Snapshots' pins are read on one thread: each stat(2) lets another run, and many would take turns, not read.
        self._pins = ThreadPoolExecutor(1, "local")
        # Few jobs wait in a pool's own queue, so that what is urgent or older is never behind many.
        self._slots = {True: asyncio.Semaphore(4), False: asyncio.Semaphore(threads + 4)}
        self._hold_until = 0.0
        self._said = -math.inf
        self._running = 0
        self._stopping = False
        self.operations: dict[str, Operation] = {}

    async def once(self, operation: str, urgent: bool, job: Callable[..., T], *args: Any) -> T:
        """Do a job on a thread, one time."""
        async with self._slots[urgent]:
            await self._pinning_first()
            if self._stopping:
                raise asyncio.CancelledError
            began = time.monotonic()
            self._running += 1
            pool = self._pools[urgent]
            if operation == "pins" and not urgent:
                pool = self._pins
            try:
                return await asyncio.get_running_loop().run_in_executor(pool, job, *args)
            finally:
                self._running -= 1
                taken = time.monotonic() - began
                one = self.operations.setdefault(operation, Operation())
                one.seconds += taken
                one.durations[bisect.bisect_left(_DURATIONS, taken)] += 1

    async def run(self, operation: str, urgent: bool, job: Callable[..., T], *args: Any) -> T:
        """Do a job on a thread, again and again while the store does not answer."""
        return await self.retry(operation, functools.partial(self.once, operation, urgent, job, *args))

    async def retry(self, operation: str, attempt: Callable[[], Awaitable[T]], most_s: float = math.inf) -> T:
        """Await an attempt, again and again while the store does not answer; sleep between tries without a thread.

        A daemon waits until a disk is mounted; a command says at once that it is not.
        """
        waits = pauses(min(most_s, self._patience_s))
        is_command = self._patience_s < math.inf
        while True:
            try:
                result = await attempt()
            except (Unreachable, Denied) as fault:
                self.note(operation, fault)
                if isinstance(fault, Denied) or (is_command and isinstance(fault, Unmounted)):
                    raise
                wait = next(waits, None)
                if wait is None:
                    raise
                await asyncio.sleep(wait)
            else:
                self.note(operation, None)
                return result

    async def _pinning_first(self) -> None:
        """Wait while there is something to pin, but for two seconds at most.

        Jobs beside the pinner take the processor away from it: then clearsnapshot is faster than our links.
        """
        until = time.monotonic() + PAUSE_S
        while not self._idle.is_set() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        while time.monotonic() < self._hold_until:
            await asyncio.sleep(0.1)

    def note(self, operation: str, error: Exception | None) -> None:
        """Keep what an operation came to: an error, or None where it succeeded."""
        one = self.operations.setdefault(operation, Operation())
        if error is None:
            if one.error:
                log.info("works again operation=%s", operation)
            one.error = ""
            return
        if not one.error:
            one.since = time.time()
        one.error = str(error) or repr(error)
        one.failed += 1
        now = time.monotonic()
        if isinstance(error, Throttled):
            self._hold_until = now + 1.0
        if now - self._said > 60.0:  # an outage fails every job there is: one line a minute tells as much
            self._said = now
            log.error("failed operation=%s error=%s", operation, quote(one.error))

    def failing(self) -> dict[str, Operation]:
        """Return the operations that fail."""
        return {name: one for name, one in self.operations.items() if one.error}

    async def finish(self, limit_s: float) -> None:
        """Begin no job any more; wait for those under way, but not for ever."""
        self._stopping = True
        until = time.monotonic() + limit_s
        while self._running and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for pool in (*self._pools.values(), self._pins):
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True, eq=False)
class Waiting:
    """A unit that is not listed yet. The pins on the disk are the truth; this is what we know of them."""

    found: float  # when its first file was found, seconds since 1970
    doubtful: bool  # the bucket may list some of it: it was begun before this process had scanned everything
    touched: float = 0.0  # when its newest file was found, monotonic
    refused: bool = False  # tried in vain, and not because the store is away
    files: int = 0
    size: int = 0
    directories: set[tuple[PinDirectory, str]] = field(default_factory=set)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    _since: dict[Any, float] = field(default_factory=dict)

    def still_seen(self, states: Iterable[T]) -> dict[T, float]:
        """Return since when each of these states has been seen without a break, monotonic. Forget all others."""
        now = time.monotonic()
        self._since = {state: self._since.get(state, now) for state in states}
        return self._since

    def note(self, news: Touched) -> None:
        """Note new pins."""
        self.directories.add((news.disk, news.relative))
        self.touched = time.monotonic()
        self._since.update(dict.fromkeys(news.in_place, self.touched))
        self.files += news.files
        self.refused = False
        self.news.set()

    def disk_of(self, directory: str) -> str:
        """Return the id of the disk that a directory is on, "" if it is on none of ours."""
        for disk, _ in self.directories:
            if directory.startswith(disk.root.rstrip("/") + "/"):
                return disk.id
        return ""


@dataclass(slots=True)
class Round:
    """One go at a unit: its pins, and how far storing them has got."""

    unit: Unit
    waiting: Waiting
    bucket: str  # the life of the bucket in which it began
    began: str  # UTC: when the pins had been read
    pins: dict[FilePath, Pinned]
    lost: tuple[FilePath, ...]  # what had been given up by then; the listing names it
    remembered: dict[FileBytes, Remembered] = field(default_factory=dict)  # what the ledger says of them
    files: dict[FilePath, Known] = field(default_factory=dict)  # stored, or known to be
    failed: dict[FilePath, Exception] = field(default_factory=dict)
    delete: dict[FilePath, Fingerprint] = field(default_factory=dict)  # listed, and to go from backups/ with its pin


def _batches_of(pins: Iterable[Pinned]) -> Iterator[list[Pinned]]:
    """Yield what one job takes along: a large file alone, small ones together.

    manifest.json and its kin come first, then the largest: a large one begun last would be waited for alone.
    """
    batch: list[Pinned] = []
    size = 0
    for pin in sorted(pins, key=lambda pin: (pin.name not in IN_PLACE, -pin.size)):
        if batch and (len(batch) >= _BATCH_FILES or size + pin.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(pin)
        size += pin.size
    if batch:
        yield batch


def _sstables_of(pins: Iterable[Pinned]) -> list[list[Pinned]]:
    """Sort pins by SSTable, the newest SSTable first; another file stands by itself."""
    sstables: dict[str, list[Pinned]] = {}
    for pin in pins:
        sstables.setdefault(sstable_at(pin.path) or pin.pin, []).append(pin)
    return sorted(sstables.values(), key=lambda some: max(pin.fingerprint.written for pin in some), reverse=True)


def _round_of(pins: Iterable[Pinned]) -> list[Pinned]:
    """Return what of a great backlog is listed next: SSTables with all that they have, the newest first."""
    chosen: list[Pinned] = []
    size = 0
    for some in _sstables_of(pins):
        size += sum(pin.size for pin in some)
        if chosen and (len(chosen) + len(some) > _ROUND_FILES or size > _ROUND_BYTES):
            break
        chosen += some
    return chosen


def _read_small(store: Store, pins: PinMap, files: Mapping[FilePath, Known], path: FilePath) -> bytes:
    """Read a small stored file, from its pin where there is one."""
    pin = pins.get(path)
    if pin and pin.fingerprint == files[path].fingerprint:
        return bytes(PinnedSource(pin).read(0, pin.size))
    return read_object(store, files[path].key)


def _read_pins(
    directories: Iterable[tuple[PinDirectory, str]], life: str
) -> tuple[dict[FilePath, Pinned], tuple[FilePath, ...]]:
    """Return the pins of a unit, and what was given up of it."""
    files: dict[FilePath, Pinned] = {}
    lost: list[FilePath] = []
    for disk, relative in directories:
        files.update(disk.read(relative, life))
        lost += [(disk.source(relative), name) for name in disk.lost(relative, life)]
    return files, tuple(lost)


def _pin_paths(directories: Iterable[tuple[PinDirectory, str]], life: str) -> set[str]:
    """Return the paths of the pins that are there: what `_read_pins` would find, without a stat(2) of each."""
    paths: set[str] = set()
    for disk, relative in directories:
        folder = disk.directory(relative, life)
        with contextlib.suppress(FileNotFoundError):
            paths.update(f"{folder}/{name}" for name in os.listdir(folder) if name.endswith("~"))
    return paths


def _beside(folders: Mapping[str, str], sstables: Collection[str]) -> list[Pinned]:
    """Return the files of these SSTables that Cassandra's own directories have, as what a pin of theirs would be.

    `folders`: these directories, and the id of the disk of each.
    """
    found = []
    prefixes = tuple(f"{os.path.basename(sstable)}-" for sstable in sstables)  # backups/ may hold a year of files
    for directory, disk in folders.items():
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(prefixes) and sstable_in(entry.path) in sstables:
                    info = entry.stat(follow_symlinks=False)
                    who = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_nlink)
                    found.append(Pinned(directory, entry.name, Fingerprint.of(info), *who, entry.path, disk))
    return found


def _check_digests(
    store: Store, pins: PinMap, files: Mapping[FilePath, Known], moment: str
) -> dict[FilePath, Known | None]:
    """Hold each Data.db against its Digest.crc32, if either was just stored; return what differs from `files`."""
    found: dict[FilePath, Known | None] = {}
    for path, entry in files.items():
        directory, name = path
        beside = (directory, name.removesuffix("Data.db") + "Digest.crc32")
        if not name.endswith("-Data.db") or beside not in files:
            continue
        if isinstance(entry, Stored) or isinstance(files[beside], Stored):
            checked = check_digest(store, pins[path], pins[beside], entry, moment)
            if checked != entry:
                found[path] = checked
    return found


class Backup:
    """Takes every unit from its pins to its listing. All of it runs on the loop."""

    def __init__(self, options: WatchOptions, pinner: Pinner, workers: Workers, ledger: Ledger) -> None:
        self._options, self._pinner, self._workers = options, pinner, workers
        self.ledger = ledger
        self.clock = Clock()
        self.connected = asyncio.Event()  # the node's name is ours: from here on something may be stored
        self.disconnected = asyncio.Event()  # the bucket was made anew: the name must be claimed again
        self.store: Store
        self.node = ""
        self.bucket = ""  # the id in owner.json
        self.units: dict[Unit, Waiting] = {}
        self.failures: dict[Unit, str] = {}
        self.counts: Counter[str] = Counter()
        self.sent: Counter[str] = Counter(files=0, bytes=0)
        self.scanned = asyncio.Event()  # all that an earlier process left pinned has been told
        self.last_view: BucketView | None = None
        self._viewed = 0.0  # when that was read, by CLOCK_BOOTTIME
        self._epoch = math.inf  # what the store's clock said when CLOCK_BOOTTIME was 0
        self._absent_since = math.inf  # since when owner.json is not there
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = {True: asyncio.Semaphore(4), False: asyncio.Semaphore(8)}  # units at work at a time
        self._under_way: dict[object, asyncio.Future[None]] = {}  # bytes, and keys, that are being put
        self._kept: dict[Unit, dict[FilePath, Fingerprint]] = {}  # listed, but not let go: see _deletable

    def _check_clocks(self) -> None:
        """Doubt the store's words where this machine stood still, with all of its clocks. Raises Unreachable.

        A virtual machine does when it is suspended, or reverted to an earlier state. Prune goes on elsewhere.
        """
        epoch = self.store.now() - time.clock_gettime(time.CLOCK_BOOTTIME)
        jump, self._epoch = epoch - self._epoch, epoch
        if jump > PUBLISH_LIMIT_S:
            self.last_view = None
            self.ledger.doubt()
            raise Unreachable(f"this machine's clocks stood still for {jump:.0f} s", "everything is asked for again")

    def forget(self) -> None:
        """Forget what is stored and listed: the bucket is another one."""
        self.ledger.forget(self.bucket)
        self._kept.clear()

    # A unit comes, and goes

    def touch(self, news: Touched) -> None:
        """Note that a unit has new pins; see to it that somebody works at it."""
        waiting = self.units.get(news.unit)
        if not waiting:
            waiting = self.units[news.unit] = Waiting(news.found, doubtful=not self.scanned.is_set())
            task = asyncio.get_running_loop().create_task(self._process(news.unit, waiting))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        waiting.note(news)

    async def _process(self, unit: Unit, waiting: Waiting) -> None:
        """Back a unit up, round after round, until nothing of it is left."""
        delay: float | None = QUIET_S
        pause = _RETRY_S
        changes = 0
        while delay is not None or waiting.news.is_set():
            await self._until_due(waiting, delay or 0.0)
            await self.connected.wait()
            async with self._turns[unit.urgent]:
                waiting.news.clear()
                waiting.refused = False
                try:
                    delay = await self._back_up(unit, waiting)
                    self.failures.pop(unit, None)
                    pause = _RETRY_S
                    changes = 0
                except Changed as fault:
                    changes += 1
                    if changes in (1, _CHANGES):
                        log.info("not listed yet unit=%s error=%s", label(unit), quote(str(fault)))
                    if changes >= _CHANGES:
                        self.failures[unit] = str(fault)
                    delay = min(float(changes), 60.0)
                except Exception as error:
                    unforeseen = not isinstance(error, (Fault, OSError))
                    self.failures[unit] = str(error) or repr(error)
                    waiting.refused = not isinstance(error, Unreachable)
                    words = (label(unit), quote(self.failures[unit]))
                    log.error("not listed, will try again unit=%s error=%s", *words, exc_info=unforeseen)
                    delay = pause
                    if not isinstance(error, Unreachable):  # that may end at any moment
                        pause = min(2 * pause, _RETRY_MOST_S)
        del self.units[unit]

    async def _until_due(self, waiting: Waiting, delay: float) -> None:
        """Wait so long, or until there is news; then until nothing has come for a moment."""
        # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with news.
        timer = asyncio.get_running_loop().call_later(delay, waiting.news.set)
        try:
            await waiting.news.wait()
        finally:
            timer.cancel()
        until = time.monotonic() + 5.0
        while time.monotonic() < min(until, waiting.touched + QUIET_S):
            await asyncio.sleep(QUIET_S / 3)

    async def _back_up(self, unit: Unit, waiting: Waiting) -> float | None:
        """Store and list what there is of a unit; None when it is done, else the seconds until the next time."""
        directories = sorted(waiting.directories, key=lambda one: one[1])
        pins, lost = await self._workers.once("pins", unit.urgent, _read_pins, directories, unit.life)
        work = Round(unit, waiting, self.bucket, self.clock(), pins, lost)
        for path, fingerprint in self._kept.get(unit, {}).items():
            if path in work.pins and work.pins[path].fingerprint == fingerprint:
                del work.pins[path]
        waiting.files = len(work.pins)
        waiting.size = sum(pin.size for pin in work.pins.values())
        if not work.pins and not work.lost:
            # It may still count pins that somebody removed; or their disk is away.
            left = await self.ask(self._pinner.let_go, unit, {}, (), (), self._kept.get(unit, {}))
            if left > 0 and not waiting.news.is_set():  # else something was pinned meanwhile
                raise Fault("its pin directory is away", "it is stored when that is back; if it was removed, restart")
            return None
        if unit.kind == "snapshot":
            return await self._back_up_snapshot(work)
        return await self._back_up_incrementals(work)

    def _young(self, work: Round) -> set[FilePath]:
        """Return the files, written in place, that have not stood still long enough. No clock of a disk is asked."""
        is_archive = work.unit.kind == "archive"
        quiet_s = 2.0 if is_archive else QUIET_S
        in_place = [pin for pin in work.pins.values() if is_archive or pin.name in IN_PLACE]
        since = work.waiting.still_seen(bytes_of(in_place))
        now = time.monotonic()
        return {path for (path, _), moment in since.items() if now - moment < quiet_s}

    # A table's snapshot

    async def _back_up_snapshot(self, work: Round) -> float | None:
        unit = work.unit
        await self._learn_snapshot(work)
        young = self._young(work)
        await self._store(work, [pin for path, pin in work.pins.items() if path not in young])
        if young:
            return QUIET_S
        before = await self._look_up(listed_snapshot, work)
        files = {entry.path: entry for entry in before.listing.files} | work.files
        has_manifest = any(name == MANIFEST for _, name in files)
        scanned = has_manifest and await self.ask(self._pinner.scan_tag, unit)
        # This also tells whether the disk of the pins went away meanwhile.
        there = await self._workers.once("pins", False, _pin_paths, list(work.waiting.directories), unit.life)
        if there != {pin.pin for pin in work.pins.values()}:
            return QUIET_S  # more has come while this was sent
        verdict = await self._judge(work, files, judge_snapshot, scanned)
        self._check_bucket(work)
        if verdict.ephemeral:
            self.counts["skipped_ephemeral"] += 1
            log.info("a repair's own snapshot, skipped unit=%s", label(unit))
            return await self._let_go(work)
        lost = [path for path in work.lost if path not in files]
        missing = {*verdict.missing, *(name for _, name in work.failed)}
        complete = before.listing.complete or not (missing or lost)
        rest = self._patience_left(work, files, complete)
        if rest > 0:
            return rest
        if complete or not before.covered:
            kept = [entry for path, entry in files.items() if path not in verdict.strays]
            taken = manifest_time(kept) or before.listing.unit.life
            lost_names = tuple(name for _, name in sorted(lost))
            lacks = () if complete else tuple(sorted(missing))
            listing = Listing(self.node, before.listing.unit, taken, "", complete, tuple(kept), lacks, lost_names)
            for path in sorted(verdict.strays & work.pins.keys()):
                log.warning("not in its manifest.json, not listed path=%s", quote("/".join(path)))
            if self._adds(listing, before.listing):
                listing = await self._publish(listing, work)
            self._note_snapshot(listing)
        return await self._let_go(work)

    def _patience_left(self, work: Round, files: Collection[FilePath], complete: bool) -> float:
        """Return for how many seconds a snapshot may still become more than it is."""
        patience = self._options.incomplete_after
        if complete:
            # Cassandra writes schema.cql after manifest.json, and of system tables never.
            names = {name for _, name in files}
            has_schema = SCHEMA in names or work.unit.keyspace.startswith("system")
            patience = 0.0 if has_schema else 2.0
        return work.waiting.touched + patience - time.monotonic()

    @staticmethod
    def _adds(draft: Listing[Known], before: Listing[Known]) -> bool:
        """Tell whether a listing would say more than what is listed already."""
        if draft.complete and not before.complete:
            return True
        new_files = bytes_of(draft.files) - bytes_of(before.files)
        new_losses = set(draft.lost) - set(before.lost)
        return bool(new_files or new_losses)

    def _note_snapshot(self, listing: Listing[Known]) -> None:
        """Remember whether a snapshot is complete: `status` asks for it."""
        if is_partial(listing.unit):
            return  # it never is what the table was
        place, now = listing.unit.place, time.time()
        newest, _, _ = self.ledger.fact(f"complete:{place}").partition("\t")
        newest = credible(newest, now)
        incomplete = credible(self.ledger.fact(f"incomplete:{place}"), now)
        lost = credible(self.ledger.fact(f"lost:{place}"), now)
        if not listing.complete:
            if listing.taken > max(newest, incomplete) and not is_drop(listing.unit):  # of which no other comes
                self.ledger.remember(f"incomplete:{place}", listing.taken)
            return
        if listing.taken >= incomplete:
            self.ledger.remember(f"incomplete:{place}", "")
        if listing.taken >= newest:
            self.ledger.remember(f"complete:{place}", f"{listing.taken}\t{listing.unit.tag}")
        if listing.taken > lost:  # an earlier snapshot has not what was lost since
            self.ledger.remember(f"lost:{place}", "")

    # Incrementals, and archives

    async def _back_up_incrementals(self, work: Round) -> float | None:
        unit, pins = work.unit, work.pins
        listed = await self._listed_already(work)
        young = self._young(work) if unit.kind == "archive" else set()
        fresh = [pin for path, pin in pins.items() if path not in listed and path not in young]
        chosen = _round_of(fresh)
        await self._store(work, chosen)
        late: set[str] = set()
        missing: list[str] = []
        if unit.kind == "incremental":
            late, missing = await self._lacking(work)
        entries = {path: entry for path, entry in work.files.items() if sstable_at(path) not in late}
        if entries or work.lost:
            complete = not missing and not work.lost
            unit = replace(unit, life="")  # in backups/ all lives are listed alike
            files, lost = tuple(entries.values()), tuple(name for _, name in sorted(work.lost))
            draft = Listing(self.node, unit, work.began, "", complete, files, tuple(sorted(missing)), lost)
            await self._publish(draft, work)
        work.files = {path: entry for path, entry in entries.items() if path in pins} | listed
        if not missing:
            work.delete = self._deletable(work)
        if await self._let_go(work) is None:
            return None
        if len(chosen) < len(fresh):
            return 0.0
        return 2.0 if late else QUIET_S

    async def _lacking(self, work: Round) -> tuple[set[str], list[str]]:
        """Return the SSTables that may become complete yet, and the names that the others lack."""
        lacking = await self._judge(work, work.files, judge_incrementals)
        if lacking:
            await self._add_earlier(work, lacking)
            lacking = await self._judge(work, work.files, judge_incrementals)
        since = work.waiting.still_seen(lacking)
        late: set[str] = set()
        missing: list[str] = []
        for sstable, names in lacking.items():
            if time.monotonic() - since[sstable] < self._options.incomplete_after:
                late.add(sstable)
            elif not lacks_toc_alone(names):  # Cassandra may have stood still among its links: it had its time
                missing += map(os.path.basename, names)
        return late, missing

    async def _add_earlier(self, work: Round, sstables: Collection[str]) -> None:
        """Add to a round what is stored already of these SSTables: the listing that completes one repeats it."""
        folders = {folder: work.waiting.disk_of(folder) for folder in map(os.path.dirname, sstables)}
        beside = await self._workers.once("pins", True, _beside, folders, sstables)
        remembered = self.ledger.lookup(work.unit.place, beside)
        for pin in beside:
            found = remembered.get((pin.path, pin.fingerprint))
            if found and pin.path not in work.files:
                work.files[pin.path] = known_of(pin, found.key, found.etag, found.crc32)

    async def _listed_already(self, work: Round) -> dict[FilePath, Known]:
        """Return what of these pins the bucket lists already.

        Only a process that ended between a listing and the letting go leaves such pins, or a ledger that was lost. So
        the bucket is asked for what an earlier process may have listed, and not at each flush.
        """
        fact = f"learned:{work.unit.place}:{work.unit.kind}"
        if not work.waiting.doubtful and self.ledger.fact(fact):
            return {}
        listings, listed = await self._look_up(listed_incrementals, work)
        self._check_bucket(work)
        for listing in listings:
            self._record(work, listing.files)
        await self._learn_snapshot(work)
        self.ledger.remember(fact, "1")
        work.waiting.doubtful = False
        return {entry.path: entry for entry in listed}

    def _deletable(self, work: Round) -> dict[FilePath, Fingerprint]:
        """Return what may go from backups/, by --delete-uploaded-incrementals.

        The newest SSTable of a table stays, with its pins, until a newer one has come: else Cassandra could begin
        again to count its generations, and the same names would come with other content.
        """
        self._check_bucket(work)  # what is kept is listed in this bucket
        listed = [pin for path, pin in work.pins.items() if path in work.files]
        if not self._options.delete_uploaded_incrementals or work.unit.kind != "incremental" or not listed:
            return {}
        kept = self._kept.get(work.unit, {})
        newest = _sstables_of(listed)[0]
        written = max(pin.fingerprint.written for pin in newest)
        if any(fingerprint.written >= written for fingerprint in kept.values()):
            return dict(bytes_of(listed))  # a backlog is listed newest first
        released = dict(bytes_of(listed)) | kept
        self._kept[work.unit] = dict(bytes_of(newest))
        for pin in newest:
            del released[pin.path]
        return released

    # What both have in common

    async def ask(self, do: Callable[..., T], *args: object) -> T:
        """Have the pinner do something in its own thread; return its answer."""
        return await asyncio.wrap_future(self._pinner.ask(do, *args))

    async def _look_up(self, job: Callable[..., T], work: Round) -> T:
        """Ask the bucket what it lists of a unit; what is gone, bad or about to be deleted does not count."""

        async def attempt() -> T:
            args = (self.store, self.node, await self.view(), work.unit, work.pins)
            return await self._workers.once("list", work.unit.urgent, job, *args)

        return await self._workers.retry("list", attempt)

    async def _judge(self, work: Round, files: Mapping[FilePath, Known], job: Callable[..., T], *args: Any) -> T:
        read = functools.partial(_read_small, self.store, work.pins, files)
        return await self._workers.run("get", work.unit.urgent, job, files, read, *args)

    async def _learn_snapshot(self, work: Round) -> None:
        """Read the newest snapshots of a table, once in the life of a ledger: their bytes need no sending."""
        unit = work.unit
        fact = f"learned:{unit.place}:snapshot"
        if unit.kind == "archive" or self.ledger.fact(fact):
            return
        newest = await self._workers.run("list", unit.urgent, newest_snapshots, self.store, self.node, unit)
        self._check_bucket(work)
        for listing in newest:
            self._record(work, listing.files)
            self._note_snapshot(listing)
        self.ledger.remember(fact, "1")

    def _record(self, work: Round, entries: Iterable[Known]) -> None:
        disks = [(work.waiting.disk_of(entry.directory), entry) for entry in entries]
        self.ledger.record(work.unit.place, disks)

    async def _store(self, work: Round, pins: Sequence[Pinned]) -> None:
        """Store what is not known to be stored. A file that is refused costs no other."""
        unsent = self._unsent(work, pins)
        if not unsent:
            return
        batches = _batches_of(unsent)
        # Sixteen senders share the batches: enough to keep every worker busy, few enough for little memory.
        await asyncio.gather(*(self._send_batches(work, batches) for _ in range(16)))
        await self._check_digests(work)
        for error in work.failed.values():
            if isinstance(error, Changed):
                raise error  # judged without this file, a unit could pass for complete
            if isinstance(error, Unreachable) and not self._options.once:
                raise error  # an outage is no reason to list a unit without this file

    async def _check_digests(self, work: Round) -> None:
        """Hold each Data.db that was sent against its Digest.crc32. Before a round ends: the next knows of none."""
        args = (self.store, work.pins, dict(work.files), self.clock())
        for path, entry in (await self._workers.run("put", work.unit.urgent, _check_digests, *args)).items():
            if isinstance(entry, Stored):
                work.files[path] = entry
                self._remember_stored(work, [entry])
                continue
            self.counts["digest_mismatch"] += 1
            hint = "the disk may be failing: run nodetool verify; a scrubbed SSTable may have a stale digest"
            log.error("Data.db is not what its Digest.crc32 says path=%s hint=%s", quote("/".join(path)), hint)

    def _unsent(self, work: Round, pins: Sequence[Pinned]) -> list[Pinned]:
        """Return the pins whose bytes are not known to be stored, perhaps under the path of another snapshot."""
        unknown = [pin for pin in pins if (pin.path, pin.fingerprint) not in work.remembered]
        work.remembered.update(self.ledger.lookup(work.unit.place, unknown))
        return [pin for pin in pins if not self._is_stored(work, pin)]

    def _is_stored(self, work: Round, pin: Pinned) -> bool:
        found = work.remembered.get((pin.path, pin.fingerprint))
        if not found:
            return False
        # TOC.txt is no such file: it only grows, so its size tells.
        is_sent_again = self._options.full or pin.name in IN_PLACE
        if is_sent_again and not self.ledger.is_fresh(found):
            return False
        work.files[pin.path] = known_of(pin, found.key, found.etag, found.crc32)
        self.counts["reused"] += 1
        return True

    def _remember_stored(self, work: Round, entries: Sequence[Stored]) -> None:
        """Remember what the store has just confirmed: at once, for a crash. What we forget is sent a second time."""
        self._check_bucket(work)
        rows = [(work.pins[entry.path].disk, entry) for entry in entries]
        work.remembered.update(self.ledger.record(work.unit.place, rows))

    async def _send_batches(self, work: Round, batches: Iterator[list[Pinned]]) -> None:
        for batch in batches:
            # Of each of these keys, and of these bytes, there is one put at a time.
            names: list[object] = [object_key(self.node, pin.path) for pin in batch]
            names += [(work.unit.place, pin.name, pin.disk, pin.fingerprint) for pin in batch]
            # Another unit may be sending these very bytes: a snapshot follows on a flush. Or other bytes to this key:
            # where a server cannot put conditionally, only one of us may look and put at a time.
            while busy := {self._under_way[name] for name in names if name in self._under_way}:
                await asyncio.wait(busy)
            batch = self._unsent(work, batch)  # whoever was sending them may have ended before our turn came
            if batch:
                await self._send(work, batch, names)

    async def _send(self, work: Round, pins: list[Pinned], names: list[object]) -> None:
        """Send files until each is stored or refused; remember at once what is stored."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way.update(dict.fromkeys(names, done))
        left = pins

        async def attempt() -> None:
            nonlocal left
            files = [(pin, object_key(self.node, pin.path)) for pin in left]
            # A file that takes minutes must not hold one of the threads that flushes and heartbeats wait for.
            is_urgent = work.unit.urgent and sum(pin.size for pin in left) < GIB
            results = await self._workers.once("put", is_urgent, send, self.store, files, self.clock())
            self._take_results(work, left, results)
            # Of some the store has not said anything.
            left = [pin for pin in left if isinstance(work.failed.get(pin.path), Unreachable)]
            if left:
                raise work.failed[left[0].path]

        try:
            with contextlib.suppress(Unreachable):  # one key that always fails must not hold its turn for ever
                await self._workers.retry("put", attempt, _TURN_S)
        finally:
            for name in names:
                self._under_way.pop(name, None)
            done.set_result(None)

    def _take_results(self, work: Round, pins: Sequence[Pinned], results: Sequence[Sent]) -> None:
        stored = []
        for pin, result in zip(pins, results, strict=True):
            work.failed.pop(pin.path, None)
            if isinstance(result, Stored):
                work.files[pin.path] = result
                stored.append(result)
                self.sent.update(files=1, bytes=pin.size)
            else:
                work.failed[pin.path] = result
        self._remember_stored(work, stored)

    async def view(self, good_for_s: float = _VIEW_S) -> BucketView:
        """Return what a publication must know of the bucket. Raises Unreachable where it is not ours."""
        await self.connected.wait()
        # CLOCK_BOOTTIME goes on while the machine sleeps: what was read before that is old.
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self.last_view and now - self._viewed < good_for_s:
            return self.last_view
        view = await self._workers.once("list", True, view_bucket, self.store, self.node, self.last_view)
        if view.owner and view.owner == self.bucket:
            self.last_view, self._viewed, self._absent_since = view, now, math.inf
            return view
        if not view.owner:
            self._absent_since = min(self._absent_since, now)
            if now - self._absent_since < _VIEW_S:
                raise Unreachable("owner.json is not in the bucket any more", "nothing is listed until that is clear")
        if self.connected.is_set():  # else another unit has found it out
            log.warning("the bucket was made anew, storing and listing everything again store=%s", self.store.url)
            self.last_view, self._absent_since = None, math.inf
            self.connected.clear()
            self.disconnected.set()
        raise Changed("the bucket was made anew", "everything is stored again")

    def _check_bucket(self, work: Round) -> None:
        """Raise Changed where the bucket was made anew since a round began: nothing that it was told is true there."""
        if work.bucket != self.bucket:
            raise Changed("the bucket was made anew", "everything is stored again")

    async def _publish(self, draft: Listing[Known], work: Round) -> Listing[Stored]:
        """Write a listing and remember it."""
        unit, pins, moment = draft.unit, work.pins, self.clock()

        async def attempt() -> Listing[Stored]:
            self._check_clocks()
            view = await self.view()
            self._check_bucket(work)
            # Asked at each try: tries may go on for days, and an old word is no word.
            asked = self._fresh_keys(draft, work)
            named = replace(draft, listed=self.clock())
            args = (self.store, view, named, pins, asked, moment)
            listing = await self._workers.once("list", unit.urgent, publish, *args)
            confirmed = [entry for entry in listing.files if entry.key not in asked and entry.path in pins]
            self._remember_stored(work, confirmed)
            return listing

        listing = await self._workers.retry("publish", attempt)
        files, missing, lost = len(listing.files), len(listing.missing), len(listing.lost)
        self.ledger.remember("newest", listing_key(listing))
        self.counts.update(listings=1, listed_files=files)
        if lost and not self.ledger.fact(f"lost:{unit.place}"):
            self.ledger.remember(f"lost:{unit.place}", self.clock())
        if not listing.complete:
            self.counts["incomplete"] += 1
        level, state = (logging.INFO, "complete") if listing.complete else (logging.WARNING, "incomplete")
        words = (label(unit), state, files, listing.size, missing, lost)
        log.log(level, "listed unit=%s state=%s files=%d bytes=%d missing=%d lost=%d", *words)
        return listing

    def _fresh_keys(self, listing: Listing[Known], work: Round) -> set[str]:
        """Return the keys for which this process has had the store's word lately."""
        fresh = set()
        for entry in listing.files:
            found = work.remembered.get((entry.path, entry.fingerprint))
            if found and found.key == entry.key and self.ledger.is_fresh(found):
                fresh.add(entry.key)
        return fresh

    async def _let_go(self, work: Round) -> float | None:
        """Have the pins of what is listed unlinked; return as _back_up. Raises what a file was refused for."""
        self._check_bucket(work)
        marks: dict[str, set[int]] = {}
        for entry in work.files.values():
            marks.setdefault(entry.directory, set()).add(mark_of(entry.name, entry.fingerprint))
        # In backups/ all lives count alike, so there they have one name.
        life = work.unit.life if work.unit.kind == "snapshot" else ""
        self.ledger.add_listed(life, self.clock(), marks)
        kept = self._kept.get(work.unit, {})
        files = {path: entry.fingerprint for path, entry in work.files.items() if path not in kept}
        files |= work.delete
        left = await self.ask(self._pinner.let_go, work.unit, files, work.lost, frozenset(work.delete), kept)
        if work.failed:
            path, error = next(iter(work.failed.items()))
            name = quote(os.path.join(*path))
            what = f"{len(work.failed)} files are refused, {name}: {error}"
            raise Fault(what, "what could be stored is stored; the rest is tried again")
        return None if left <= 0 else QUIET_S

    # What the daemon asks

    def note_lost(self, unit: Unit, directory: str, names: Iterable[str]) -> None:
        """Name the files that were given up; their unit is listed with them under `lost`."""
        hint = "the store was unreachable too long for --max-pinned and --min-free: mend the store, or raise them"
        for name in names:
            log.error("given up to keep the disk free, LOST path=%s hint=%s", quote(f"{directory}/{name}"), hint)
            self.counts["lost"] += 1
            self.ledger.remember(f"lost:{unit.place}", self.clock())

    def is_done(self) -> bool:
        """Tell whether all is listed, but for what has been tried in vain."""
        return all(unit in self.failures for unit in self.units)

    async def end(self) -> None:
        """End the work at all units: what is not listed stays pinned for the next start."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def alone_in(disk: PinDirectory, relative: str, life: str, alone: Collection[Fingerprint]) -> dict[str, Pinned]:
    """Return the pins of a source directory whose bytes only pins hold, by name; `alone` as `held_alone` tells it."""
    pins = disk.read(relative, life).values()
    return {pin.name: pin for pin in pins if pin.links == 1 or pin.fingerprint in alone}


def held_alone(disk: PinDirectory, directories: Collection[tuple[Unit, str]]) -> tuple[int, frozenset[Fingerprint]]:
    """Return how many bytes only pins hold, and the files of which that are several pins.

    Two snapshots of one SSTable are two pins of the same inode. What is alone stays so: there is no name to link.
    """
    inodes = array("Q")
    for unit, relative in directories:
        pins = disk.read(relative, unit.life).values()
        inodes.extend(pin.fingerprint.inode for pin in pins if pin.links > 1)
    twice = {inode for inode, next_one in itertools.pairwise(sorted(inodes)) if inode == next_one}
    held, count, most = 0, Counter[Fingerprint](), Counter[Fingerprint]()
    for unit, relative in directories:
        for pin in disk.read(relative, unit.life).values():
            if pin.links == 1:
                held += pin.size
            elif pin.fingerprint.inode in twice:
                count[pin.fingerprint] += 1
                most[pin.fingerprint] = max(most[pin.fingerprint], pin.links)
    alone = frozenset(file for file, links in most.items() if links == count[file])
    return held + sum(file.size for file in alone), alone


def tell_manager(environ: Mapping[str, str], line: str) -> None:
    """Tell the service manager, where there is one, how it goes, if it can be told at once: sd_notify(3)."""
    address = environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(line.encode(), socket.MSG_DONTWAIT, address)


# Metric behind cassbackup_, where the status has it, and what it is. Counters end in _total.
_METRICS: Final = (
    ("written_timestamp_seconds", "now", "When these numbers were taken."),
    ("started_timestamp_seconds", "started", "When the daemon was started."),
    ("last_scan_timestamp_seconds", "scanned", "When the last full scan that has ended began; 0: none has ended."),
    ("lag_seconds", "lag_s", "Seconds since the oldest file was found that is not listed; 0: all is listed."),
    ("pending_units", "pending units", "Snapshots and incrementals of tables, and archives, that are not listed."),
    ("pending_files", "pending files", "Files in them."),
    ("pending_bytes", "pending bytes", "Bytes in them."),
    ("pinned_alone_bytes", "pinned_alone_bytes", "Disk space that only our pins hold."),
    ("pinned_alone_limit_bytes", "pinned_alone_limit_bytes", "What --max-pinned allows of that."),
    ("failing", "failing", "1: something fails, and is tried again; `cassbackup status` says what."),
    ("store_failing_since_timestamp_seconds", "failing_since", "When the store began to fail; 0: it does not."),
    ("found_files_total", "counts found", "Files found."),
    ("rescan_found_files_total", "counts found_by_rescan", "Files found by a timer's scan, not by an event."),
    ("sent_files_total", "sent files", "Files sent."),
    ("sent_bytes_total", "sent bytes", "Bytes sent."),
    ("listings_total", "counts listings", "Listings written."),
    ("incomplete_listings_total", "counts incomplete", "Listings of what will not become complete."),
    ("lost_files_total", "counts lost", "Files that were pinned and had to be given up before they were stored."),
    ("lost_tables", "lost_tables", "Tables with lost files, and no complete snapshot since."),
    ("vanished_files_total", "counts vanished", "Files that were gone before they were pinned."),
    ("refused_total", "counts refused", "Times that a directory could not be scanned, or a file not linked."),
    ("digest_mismatches_total", "counts digest_mismatch", "Data.db files that are not what their Digest.crc32 says."),
    ("data_directories_absent", "absent", "Data directories that are gone, empty, or on another disk than before."),
    ("filters_unmatched", "unmatched", "Filters that match no keyspace and no table."),
    ("settings_wrong", "problems", "Settings that are misspelt or cannot be read, and so count for nothing."),
    ("refused_directories", "refused", "Directories in which something cannot be stored; see the log."),
    ("bad_objects", "bad_objects", "Objects that `verify --repair` found bad, and that are not stored again."),
    ("last_verify_timestamp_seconds", "last_verify", "When `verify --repair` last wrote down what it found; 0: never."),
)


class Metrics:
    """Shows the status to Prometheus. prometheus_client calls collect from a thread of its own, at each scrape."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        import prometheus_client.core

        self._client, self._status = prometheus_client, status
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)

    def serve(self, listen: str) -> None:
        """Answer at [HOST]:PORT. Raises OSError where that is taken."""
        import wsgiref.simple_server

        # A client that says nothing would hold a thread and a descriptor for ever; in the end a pin would get none.
        wsgiref.simple_server.WSGIRequestHandler.timeout = 5.0
        host, _, port = listen.rpartition(":")
        self._client.start_http_server(int(port), host.strip("[]") or "127.0.0.1", self._registry)

    def write(self, path: str) -> None:
        """Write the file that node_exporter's textfile collector reads."""
        self._client.write_to_textfile(path, self._registry)

    def collect(self) -> Iterator[Any]:
        """Yield every metric."""
        core = self._client.core
        yield core.InfoMetricFamily("cassbackup_build", "The version.", {"version": __version__})
        status = self._status()
        for name, path, what in _METRICS:
            value: Any = status
            for word in path.split():
                value = value.get(word, 0)
            if isinstance(value, (list, dict)):
                value = len(value)
            kind = core.CounterMetricFamily if name.endswith("_total") else core.GaugeMetricFamily
            yield kind(f"cassbackup_{name}", what, value=float(value))
        what = "When the oldest file was found that is not listed; none: all is."
        yield self._by_table("oldest_unlisted", what, status["oldest"], min)
        what = "When the newest complete snapshot was taken; 0: never."
        moments = {}
        for place, table in status["tables"].items():
            if table["oldest_data"] is not None:  # what is empty, or dropped, needs none
                moments[place] = seconds_of(table["taken"]) if table["taken"] else 0.0
        yield self._by_table("last_snapshot", what, moments, max)
        yield from self._of_store(status["operations"])

    def _by_table(self, name: str, what: str, moments: Mapping[str, float], choose: Callable[..., float]) -> Any:
        chosen: dict[tuple[str, str], float] = {}  # a table that was dropped and made again has two directories
        for place, moment in moments.items():
            keyspace, _, table = place.partition("/")
            labels = (quote(keyspace), quote(table_id_of(table)[0]))
            chosen[labels] = choose(moment, chosen.get(labels, moment))
        name = f"cassbackup_table_{name}_timestamp_seconds"
        family = self._client.core.GaugeMetricFamily(name, what, labels=("keyspace", "table"))
        for labels, moment in chosen.items():
            family.add_metric(labels, moment)
        return family

    def _of_store(self, operations: Mapping[str, Any]) -> Iterator[Any]:
        core = self._client.core
        label = ("operation",)
        errors = core.CounterMetricFamily("cassbackup_store_errors", "Tries that failed.", labels=label)
        name, what = "cassbackup_store_request_duration_seconds", "How long jobs took, failed ones too."
        took = core.HistogramMetricFamily(name, what, labels=label)
        bounds = [*map(str, _DURATIONS), "+Inf"]
        for operation, one in operations.items():
            errors.add_metric((operation,), one["failed"])
            buckets = list(zip(bounds, itertools.accumulate(one["durations"]), strict=True))
            took.add_metric((operation,), buckets, one["seconds"])
        yield errors
        yield took


@contextlib.contextmanager
def _socket_of(state_dir: str) -> Iterator[str]:
    """Give the path of a daemon's socket, short enough: it ends at 107 bytes (unix(7)), a state directory need not."""
    fd = os.open(state_dir, os.O_PATH | os.O_DIRECTORY)
    try:
        folder = state_dir if len(os.fsencode(state_dir)) <= 90 else f"/proc/self/fd/{fd}"
        yield f"{folder}/socket"
    finally:
        os.close(fd)


def _holder(state_dir: str) -> str:
    """Return the pid of the daemon that holds a state directory, "" where there is none."""
    try:
        fd = os.open(os.path.join(state_dir, "lock"), os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(fd)


def _ask_once(state_dir: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    with _socket_of(state_dir) as path, socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(timeout_s)
        asker.connect(path)
        asker.sendall(json.dumps(request).encode() + b"\n")
        with asker.makefile("rb") as reply:
            line = reply.readline()
    if not line.endswith(b"\n"):
        raise ConnectionResetError("the daemon ended before it had answered")
    document = json.loads(line)
    if "error" in document:
        kind = Denied if document.get("denied") else Fault
        raise kind(str(document["error"]), str(document.get("hint", "")))
    return cast(dict[str, Any], document)


def ask_daemon(state_dir: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Ask the daemon through its socket; return its reply. Raises Missing where no daemon runs, Fault for a refusal."""
    until = time.monotonic() + 60.0
    while True:
        try:
            return _ask_once(state_dir, request, timeout_s)
        except (FileNotFoundError, ConnectionError):
            holder = _holder(state_dir)
        except OSError as error:
            raise Fault(f"the daemon of {quote(state_dir)} does not answer ({error})", "look into its log") from None
        if not holder:
            raise Missing(f"no daemon runs with {quote(state_dir)}", "start cassbackup, or pass its --state-dir")
        if time.monotonic() > until:
            raise Fault(f"the daemon (pid {holder}) holds {quote(state_dir)} and does not answer", "look into its log")
        time.sleep(0.2)


def _oldest_of(units: Mapping[Unit, Waiting]) -> dict[str, float]:
    """Return of each table when the oldest file was found that is not listed, seconds since 1970."""
    oldest: dict[str, float] = {}
    for unit, waiting in units.items():
        oldest[unit.place] = min(waiting.found, oldest.get(unit.place, waiting.found))
    return oldest


def oldest_data(roots: Sequence[str], places: Iterable[str]) -> dict[str, float]:
    """Return when the oldest Data.db of each table was written, seconds since 1970; none where there is none."""
    oldest: dict[str, float] = {}
    for place in places:
        for root in roots:
            with contextlib.suppress(OSError), os.scandir(os.path.join(root, place)) as entries:
                for entry in entries:
                    if entry.name.endswith("-Data.db"):
                        written = entry.stat(follow_symlinks=False).st_mtime
                        oldest[place] = min(written, oldest.get(place, written))
    return oldest


class Daemon:
    """The loop: listens to the pinner, sees to the bucket, and tells how it goes."""

    def __init__(self, options: WatchOptions, environ: Mapping[str, str], disks: Sequence[PinDirectory]) -> None:
        self._options, self._environ, self._disks = options, environ, disks
        self._roots = [disk.root for disk in disks]
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[object] = asyncio.Queue()
        # Of a disk that is not there yet the pin directory is not known.
        folders = [options.state_dir, *(disk.path for disk in disks if disk.path)]
        self._memories = [os.path.join(folder, "identity.json") for folder in folders]
        self._known = next(filter(None, map(load_identity, self._memories)), None)
        ledger = self._open_ledger(self._known)
        self._pinner = Pinner(disks, options, ledger.listed(), options.reconcile, self._post)
        patience = 120.0 if options.once else math.inf
        self._workers = Workers(self._pinner.idle, options.store.threads, patience)
        self._local = ThreadPoolExecutor(1, "local")
        self._backup = Backup(options, self._pinner, self._workers, ledger)
        self._state = PinnerState(0.0, {}, frozenset(), frozenset(), {}, ())
        self._blind = 0.0  # when something was last not seen
        self._first_scan = math.inf  # when the first scan ended that saw every data directory
        self._alive = time.monotonic()  # when the pinner last said something
        self._stop = asyncio.Event()
        self._code = DONE
        self._held, self._allowed = 0, 0.0
        self._began = time.time()
        self._speeds = deque([(time.monotonic(), 0)], maxlen=7)
        self._metrics: Metrics | None = None
        self._oldest: dict[str, float] = {}

    def _open_ledger(self, identity: Identity | None) -> Ledger:
        """Open the ledger; what it has of another bucket or node does not count."""
        scope = f"{identity.node} {identity.url}" if identity else ""
        return Ledger(os.path.join(self._options.state_dir, "ledger.db"), scope)

    async def run(self) -> int:
        """Watch until asked to stop, or, once, until everything is listed. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled, number)
        self._loop.add_signal_handler(signal.SIGHUP, log.info, "SIGHUP changes nothing; restart to read settings again")
        self._pinner.start()
        server = await self._open_socket()
        work = [self._follow_pinner(), self._connect(), self._tell_systemd()]
        for seconds, task in (
            (10.0, self._keep_limits),
            (self._options.heartbeat, self._heartbeat),
            (86400.0, self._trim),
            (60.0, self._show_metrics),
            (10.0, self._find_oldest),
        ):
            work.append(self._repeat(seconds, task))
        if self._options.once:
            work.append(self._end_when_done())
        tasks = [self._loop.create_task(one) for one in work]
        for one in tasks:
            one.add_done_callback(self._ended)
        tell_manager(self._environ, "READY=1")
        await self._stop.wait()
        tell_manager(self._environ, "STOPPING=1")
        server.close()
        code = self._exit_code()
        # Nothing more is begun; what is under way may end. What is not listed stays pinned for the next start.
        for one in tasks:
            one.cancel()
        await self._workers.finish(STOP_S - 5.0)
        await self._backup.end()
        self._local.shutdown(wait=False, cancel_futures=True)
        self._pinner.stop()
        self._backup.ledger.close()
        return code

    async def _on_disk(self, job: Callable[..., T], *args: Any) -> T:
        """Do what asks only this machine's disks, on a thread that no store which hangs can hold."""
        return await self._loop.run_in_executor(self._local, job, *args)

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            os._exit(128 + number)
        log.info("ending signal=%s", signal.Signals(number).name)
        if self._options.once:
            self._code = 128 + number  # a command that is interrupted has not done what was asked for
        self._stop.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Leave where a part of us has ended by an error: a daemon that does half of its work protects nothing."""
        error = None if task.cancelled() else task.exception()
        if not error:
            return
        unforeseen = None if isinstance(error, (Fault, OSError)) else error
        log.critical("leaving error=%s", quote(str(error) or repr(error)), exc_info=unforeseen)
        self._code = error.code if isinstance(error, Fault) else FAILED
        self._stop.set()

    def _exit_code(self) -> int:
        if self._code or not self._options.once:
            return self._code
        backup, state = self._backup, self._state
        for text in state.unmatched:
            log.error("a filter matches nothing filter=%s", quote(text))
        for text in self._options.problems:
            log.error("a setting is wrong error=%s", quote(text))
        if backup.failures:
            return FAILED
        if backup.counts["incomplete"] or backup.units:
            return BEHIND
        return BEHIND if any(self._unprotected(self._tables()).values()) else DONE

    # What the pinner tells

    def _post(self, message: object) -> None:
        """Take a message from the pinner's thread. After the loop's end nobody listens any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.put_nowait, message)

    async def _follow_pinner(self) -> None:
        while True:
            news = await self._news.get()
            if isinstance(news, Touched):
                self._backup.touch(news)
            elif isinstance(news, PinnerState):
                self._state, self._alive = news, time.monotonic()
                if news.scanned:
                    self._backup.scanned.set()
                if news.absent or news.refused:
                    self._blind = time.time()
                if not news.scanned or news.absent or news.refused:  # what the scan after that finds may be old
                    self._first_scan = math.inf
                elif news.scanned > self._blind:
                    self._first_scan = min(self._first_scan, time.time())
            elif isinstance(news, Exception):
                raise Fault(f"the pinner failed ({news!r})", "restart")

    # The bucket: whose it is, and whether it is what it was

    async def _connect(self) -> None:
        """Make the node's name ours, however long that takes, and again when the bucket was made anew.

        Nothing is stored before, but everything is pinned.
        """
        pause = 2.0
        while True:
            try:
                await self._find_bucket()
                self._workers.note("connect", None)
                pause = 2.0
                self._backup.disconnected.clear()
                self._backup.connected.set()
                await self._backup.disconnected.wait()
            except (Fault, OSError) as error:
                self._workers.note("connect", error)
                if self._options.once or isinstance(error, Usage):
                    raise
                # A right that is missing may come: a role of a new machine, a bucket that is made after its nodes.
                await asyncio.sleep(pause)
                pause = min(2 * pause, 60.0)

    async def _find_bucket(self) -> None:
        """Find out who we are, open the store, and claim the node's name in it."""
        options, backup, known = self._options, self._backup, self._known
        given = (options.bucket, options.prefix, options.name, options.store.region, self._environ, known)
        identity = await self._workers.run("identify", True, identify, *given)
        is_new = known is None or known.url != identity.url
        store_options = replace(options.store, region=identity.region)
        backup.store = await self._workers.once("connect", True, open_store, identity.url, store_options, is_new)
        backup.node = identity.node
        if known is None or (known.node, known.url) != (identity.node, identity.url):
            backup.ledger.close()
            backup.ledger = self._open_ledger(identity)
        await self._workers.retry("claim", self._claim)
        self._known = identity
        for path in self._memories:
            with contextlib.suppress(OSError):  # on a full disk nothing can be written, and much must be stored
                save_identity(path, identity)
        log.info("storing node=%s bucket=%s", identity.node, identity.url)

    async def _claim(self) -> None:
        """Be the owner of the node's name in the bucket, or become it. Raises Usage where somebody else is."""
        backup, ledger = self._backup, self._backup.ledger
        folder = f"{backup.node}.listings"
        machine = machine_id() or self._disks[0].id
        if not machine:
            what = "there is no /etc/machine-id, and the first data directory is not there"
            raise Unmounted(what, "without either, nothing tells this machine from another")
        owner = await self._workers.once("claim", True, newest_document, backup.store, f"{folder}/owner.")
        bucket = str(owner.get("id") or f"{random.getrandbits(64):016x}")
        if self._options.adopt and not (owner or ledger.bucket or self._options.name):
            raise Usage(f"no node {backup.node} is there to adopt", "pass the old node, as `list` shows it, as --name")
        if not self._options.adopt:
            check_owner(owner, machine, f"{backup.node} in {backup.store.url}")
        if owner.get("machine_id") != machine:
            key = f"{folder}/owner.json"
            if owner:
                key = f"{folder}/owner.{backup.clock()}.json"
            directories = [quote(disk.root) for disk in self._disks]
            body = dump_document(id=bucket, machine_id=machine, data_directories=directories)
            await self._workers.once("claim", True, backup.store.put, key, Body(body))
        backup.bucket = bucket  # from here on nothing counts that was sent to another
        if ledger.bucket == bucket:
            return
        if ledger.bucket:
            log.warning("the bucket is not the one that the ledger knows, storing and listing everything again")
        backup.forget()
        await backup.ask(self._pinner.forget)

    # What time brings

    async def _repeat(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """Do something for ever. What fails is told, and done less often until it works again."""
        name = work.__name__.strip("_")
        pause = 1.0
        while True:
            try:
                await work()
                self._workers.note(name, None)
                await asyncio.sleep(seconds)
                pause = 1.0
            except Usage:
                raise
            except Exception as error:
                if not isinstance(error, (Fault, OSError)):
                    log.exception("a periodic task failed task=%s", name)
                self._workers.note(name, error)
                pause = min(2 * pause, seconds, 600.0)
                await asyncio.sleep(pause)

    async def _keep_limits(self) -> None:
        """Give pins up, the oldest first, where they alone hold more of a disk than they may."""
        began = time.monotonic()
        self._speeds.append((began, self._backup.sent["bytes"]))
        directories: dict[PinDirectory, list[tuple[Unit, str]]] = {}
        for unit in sorted(self._backup.units, key=lambda unit: unit.life):
            for disk, relative in self._backup.units[unit].directories:
                directories.setdefault(disk, []).append((unit, relative))
        held = size = 0
        away: OSError | None = None
        for disk in self._disks:
            if not disk.path:
                continue
            try:
                usage = await self._on_disk(shutil.disk_usage, disk.path)
                size += usage.total
                held += await self._keep_limits_of(disk, directories.get(disk, []), usage.total, usage.free)
            except OSError as error:  # it is away; the others must not fill up for that
                away = error
        self._held, self._allowed = held, self._options.max_pinned * size
        if away:
            raise away
        await asyncio.sleep(20 * (time.monotonic() - began))  # a million pins take seconds: a twentieth of a core

    async def _keep_limits_of(
        self, disk: PinDirectory, directories: Collection[tuple[Unit, str]], size: int, free: int
    ) -> int:
        """Give up what a disk must have back; return how many bytes our pins alone held."""
        held, shared = await self._on_disk(held_alone, disk, directories)
        # What exceeds --max-pinned; or what --min-free lacks, but only if our pins are more than a tenth of what is
        # free: to give up a few would not help a disk that others have filled.
        over = held - int(self._options.max_pinned * size)
        if held > free / 10:
            over = max(over, int(self._options.min_free * size) - free)
        over = min(over, held)
        for unit, relative in directories:
            if over <= 0:
                break
            pins = await self._on_disk(alone_in, disk, relative, unit.life, shared)
            links = {name: pin.links for name, pin in pins.items()}
            given_up = await self._backup.ask(self._pinner.give_up, disk, relative, unit.life, links)
            gone = Counter((pins[name].fingerprint, links[name]) for name in given_up)
            over -= sum(file.size for (file, had), count in gone.items() if had == count)  # else others of ours have it
            self._backup.note_lost(unit, disk.source(relative), given_up)
        return held

    async def _heartbeat(self) -> None:
        """Say in the bucket that all that was found by a moment is listed: a quiet table and a dead daemon differ."""
        await self._backup.scanned.wait()
        await self._backup.view(0.0)  # nothing is said in a bucket that is not ours
        scanned, units = self._state.scanned, self._backup.units
        oldest = _oldest_of({unit: waiting for unit, waiting in units.items() if unit.urgent})
        body = dump_document(
            listed_through=self._listed_through(),
            scanned=utc(scanned),
            pending_units=len(units),
            oldest_incrementals={quote(place): utc(moment) for place, moment in oldest.items()},
            cassbackup=__version__,
        )
        key = f"{self._backup.node}.listings/heartbeat/{self._backup.clock()}.json"
        await self._workers.once("heartbeat", True, self._backup.store.put, key, Body(body))

    def _listed_through(self) -> str:
        """Return the UTC until which all that Cassandra wrote is listed; "" where nobody knows.

        What a first scan finds was written long before. Until that is listed, it is what the last heartbeat said.
        """
        ledger, state = self._backup.ledger, self._state
        oldest = min((one.found for one in self._backup.units.values()), default=math.inf)
        if oldest > self._first_scan:
            ledger.remember("through", utc(min(state.scanned, oldest)))
        return ledger.fact("through")

    async def _trim(self) -> None:
        """Let the ledger forget what no file has any more; end multipart uploads that nobody goes on with."""
        await self._backup.scanned.wait()  # now the pinner knows what is there
        await self._backup.connected.wait()
        store, ledger = self._backup.store, self._backup.ledger
        ledger.trim(time.time() - 35 * 86400)
        now = self._backup.clock()
        there = await self._backup.ask(self._pinner.listed)
        for directory, (life, marks) in ledger.listed().items():
            if directory not in there:
                ledger.forget_directory(directory)
            elif not life:  # a snapshot goes as a whole, but from backups/ files go one by one
                ledger.replace_listed(directory, life, now, set(marks).intersection(there[directory]))
        ours = f"{self._backup.node}/"
        await self._workers.once("trim", True, store.abandon_uploads, store.now() - 7 * 86400, ours)

    async def _find_oldest(self) -> None:
        await self._backup.scanned.wait()
        places = sorted(self._state.tables)
        began = time.monotonic()
        oldest = await self._on_disk(oldest_data, self._roots, places)
        # Compaction writes what is old to new files: a table has data since its oldest file that we have ever seen,
        # for as long as it has any.
        ledger = self._backup.ledger
        before = ledger.facts("data:")
        for place, written in oldest.items():
            if place not in before or written < seconds_of(before[place]):
                ledger.remember(f"data:{place}", utc(written))
        if not self._state.absent:
            for place in before.keys() - oldest.keys():
                ledger.remember(f"data:{place}", "")
        self._oldest = {place: seconds_of(since) for place, since in ledger.facts("data:").items()}
        # Thousands of tables take a tenth of a second: a thousandth of a core. What is asked of it is a day old.
        await asyncio.sleep(min(300.0, 1000 * (time.monotonic() - began)))

    async def _tell_systemd(self) -> None:
        """Tell the lag, and that we live: only while the pinner does too."""
        pid = str(os.getpid())
        limit = 0.0  # no watchdog, or one of another process
        if self._environ.get("WATCHDOG_PID", pid) == pid:
            limit = int(self._environ.get("WATCHDOG_USEC", 0)) / 1e6
        while True:
            files = sum(one.files for one in self._backup.units.values())
            line = f"STATUS=lag {self._lag():.0f} s, {files} files pending"
            wrong = list(self._failures().values())
            wrong += [one.error for one in self._workers.failing().values()]
            if wrong:
                line += f"; {quote(wrong[0])}"
            tell_manager(self._environ, line)
            if limit and time.monotonic() - self._alive < limit:
                tell_manager(self._environ, "WATCHDOG=1")
            await asyncio.sleep(min(10.0, limit / 2 or 10.0))

    async def _show_metrics(self) -> None:
        """Begin to answer Prometheus, where that is wanted; write the textfile. What fails is red and tried again."""
        options = self._options
        if not options.metrics_listen and not options.metrics_textfile:
            return
        try:
            if not self._metrics:
                metrics = Metrics(self._status_from_thread)
                if options.metrics_listen:
                    metrics.serve(options.metrics_listen)
                self._metrics = metrics
            if options.metrics_textfile:
                await self._on_disk(self._metrics.write, options.metrics_textfile)
        except ImportError as error:
            hint = "apt install python3-prometheus-client, or pip install prometheus-client"
            raise Fault(f"prometheus_client cannot be imported ({error})", hint) from None
        except OSError as error:
            raise Fault(f"metrics cannot be shown ({error})", "the backup goes on without them") from None

    def _status_from_thread(self) -> dict[str, Any]:
        """Return the status to a thread of prometheus_client's: the loop makes it."""

        async def ask() -> dict[str, Any]:
            return self.status()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(10.0)

    async def _end_when_done(self) -> None:
        """End a run of --once when all that its first scan found is listed, or has failed."""
        await self._backup.scanned.wait()
        await self._backup.connected.wait()
        while not (self._pinner.idle.is_set() and self._news.empty() and self._backup.is_done()):
            await asyncio.sleep(0.05)
        if not self._code and not self._backup.failures:
            await self._workers.retry("heartbeat", self._heartbeat)
        with contextlib.suppress(Fault):  # told already, and no reason to fail
            await self._show_metrics()
        self._stop.set()

    # What others ask

    async def _open_socket(self) -> asyncio.Server:
        """Listen to `cassbackup status` and its kin. A socket that is there is of a dead daemon: we have the lock."""
        state_dir = self._options.state_dir
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(state_dir, "socket"))
        with _socket_of(state_dir) as path:
            server = await asyncio.start_unix_server(self._answer, path, limit=64 * KIB)
        os.chmod(os.path.join(state_dir, "socket"), 0o666)
        return server

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request: a line of JSON for a line of JSON."""
        try:
            line = await asyncio.wait_for(reader.readline(), 5.0)
            peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            reply = await self._reply(json.loads(line), struct.unpack("3i", peer)[1])
        except Exception as error:  # anybody may ask anything; and as we end, the ledger is closed
            log.debug("a request was not answered", exc_info=True)
            reply = {"error": repr(error)}
            if isinstance(error, Fault):
                reply = {"error": error.what, "hint": error.hint, "denied": isinstance(error, Denied)}
        with contextlib.suppress(OSError):
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _reply(self, request: Mapping[str, Any], uid: int) -> dict[str, Any]:
        do = request["do"]
        if do == "status":
            return self.status()
        if uid not in (0, os.geteuid()):
            raise Denied(f"user {uid} may ask for the status, and for nothing else", "run this as root or cassandra")
        if do == "scan":
            await self._backup.ask(self._pinner.reconcile)
            return self.status()
        raise Fault(f"there is no request {do!r}")

    def _tables(self) -> dict[str, dict[str, Any]]:
        """Return of each table when its newest complete snapshot was taken, and since when it has data."""
        complete, now = self._backup.ledger.facts("complete:"), time.time()
        tables = {}
        for place in sorted(self._state.tables):
            taken, _, tag = complete.get(place, "").partition("\t")
            if not tag.startswith("dropped-"):  # a dropped table needs no snapshot any more
                tables[place] = {"taken": credible(taken, now) or None, "oldest_data": self._oldest.get(place)}
        return tables

    def status(self) -> dict[str, Any]:
        """Return what `cassbackup status` shows."""
        state, backup, now, tables = self._state, self._backup, time.time(), self._tables()
        # Asked first: what the pinner has found waits in the queue or as a unit by the time that it is idle. And only
        # the bucket itself tells whether what the ledger calls listed is there.
        idle = self._pinner.idle.is_set() and self._news.empty()
        quiet = idle and backup.connected.is_set()
        waiting, oldest = backup.units.values(), _oldest_of(backup.units)
        failing, failures = self._workers.failing(), self._failures()
        since, before = self._speeds[0]
        view = backup.last_view
        return {
            "version": __version__,
            "pid": os.getpid(),
            "node": backup.node,
            "bucket": backup.store.url if backup.node else self._options.bucket,
            "started": self._began,
            "now": now,
            "scanned": state.scanned,
            "reconcile_s": self._options.reconcile,
            "quiet": quiet,
            "lag_s": self._lag(),
            "oldest": oldest,
            "tags": sorted({(unit.tag, unit.keyspace) for unit, one in backup.units.items() if not one.refused}),
            "pending": {
                "units": len(waiting),
                "files": sum(one.files for one in waiting),
                "bytes": sum(one.size for one in waiting),
            },
            "pinned_alone_bytes": self._held,
            "pinned_alone_limit_bytes": self._allowed,
            **self._unprotected(tables),
            "sent": dict(backup.sent),
            "rate": (backup.sent["bytes"] - before) / max(1.0, time.monotonic() - since),
            "counts": {**state.counts, **backup.counts},
            "failing": bool(failing or failures),
            "failing_since": min((one.since for one in failing.values()), default=0.0),
            "errors": {name: {"error": one.error, "since": one.since} for name, one in failing.items()},
            "failures": failures,
            "tables": tables,
            "operations": {name: asdict(one) for name, one in self._workers.operations.items()},
            "bad_objects": len(view.bad) if view else 0,
            "last_verify": view.verified if view else 0.0,
            "newest_listing": backup.ledger.fact("newest"),
        }

    def _unprotected(self, tables: Collection[str]) -> dict[str, Any]:
        """Return what is not stored, and will not be by itself: any of it makes --once end with 3.

        `tables`: those that are neither gone nor dropped.
        """
        state = self._state
        return {
            "refused": sorted(state.refused),
            "absent": dict(state.absent),
            "unmatched": list(state.unmatched),
            "problems": list(self._options.problems),
            "lost": self._lost(tables),
            "lost_tables": self._with_fact("lost:", tables),
            "incomplete": self._with_fact("incomplete:", tables),
        }

    def _lost(self, tables: Collection[str]) -> list[str]:
        """Return what has lost files. Of an archive, or a dropped table, no snapshot comes: it is told for a day."""
        lost, yesterday = self._backup.ledger.facts("lost:"), utc(time.time() - DAY_S)
        return sorted(place for place, at in lost.items() if place in tables or at > yesterday)

    def _with_fact(self, prefix: str, tables: Collection[str]) -> list[str]:
        facts = self._backup.ledger.facts(prefix)
        return [place for place in tables if place in facts]

    def _lag(self) -> float:
        """Return for how many seconds the oldest file has waited that is not listed."""
        now = time.time()
        oldest = min((one.found for one in self._backup.units.values()), default=now)
        return max(0.0, now - oldest)

    def _failures(self) -> dict[str, str]:
        failures = {label(unit): text for unit, text in self._backup.failures.items()}
        if self._backup.ledger.broken:
            failures["ledger"] = self._backup.ledger.broken
        return failures


def _open_state(path: str, user: int) -> None:
    """Make and try the state directory of a daemon that is, or becomes, this user. Raises Usage."""
    try:
        os.makedirs(path, 0o755, exist_ok=True)
        if os.path.islink(path) or os.stat(path).st_uid not in (0, user):
            raise Usage(f"state directory {quote(path)} is a link, or another user's", "pass --state-dir")
        write_file(os.path.join(path, ".probe"), b"", durable=False)
        os.unlink(os.path.join(path, ".probe"))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # pins take no space: on a full disk much must be stored
        raise Usage(f"state directory {quote(path)} cannot be written ({error.strerror})", "pass --state-dir") from None


def _user_for(path: str) -> tuple[int, int]:
    """Return the user and group to run as: link(2) works for the owner of the data (fs.protected_hardlinks)."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    try:
        info = os.stat(path)
    except OSError as error:
        raise Fault(f"{quote(path)}: {error.strerror}", "correct the path, or mount its disk") from None
    return info.st_uid, info.st_gid


def _become(user: int, group: int, state_dir: str) -> None:
    if user == os.geteuid():
        return
    os.chown(state_dir, user, group)
    try:
        os.initgroups(pwd.getpwuid(user).pw_name, group)
    except KeyError:  # a user without a name, as in a container
        os.setgroups([])
    os.setgid(group)
    os.setuid(user)


def _open_disks(options: WatchOptions) -> list[PinDirectory]:
    """Open the state directory and the pin directories. Raises Usage; Fault where it has worked before."""
    try:
        directories = data_directories(options.paths)
        for path in directories:
            if f"{options.bucket}/".startswith(f"file://{path}/"):
                hint = "choose a directory that is no part of Cassandra's data"
                raise Usage(f"the bucket {options.bucket} is inside a data directory", hint)
        user, group = _user_for(directories[0])
        _open_state(options.state_dir, user)
        _become(user, group, options.state_dir)
        try:
            lock_file(os.path.join(options.state_dir, "lock"))
        except PermissionError as error:
            raise Fault(str(error), f"chown -R {user}:{group} {quote(options.state_dir)}") from None
        disks = [PinDirectory(path, options.pin_dir) for path in directories]
        for disk in disks:
            disk.check()
        return disks
    except Usage as fault:
        folders = [options.state_dir]
        for path in options.paths:
            folders += PinDirectory(path, options.pin_dir).candidates()
        if any(load_identity(os.path.join(folder, "identity.json")) for folder in folders):
            # It has worked before. A disk is mounted late, or a right comes back: exit 1, so that systemd tries again.
            raise Fault(fault.what, fault.hint) from fault
        raise


def watch(options: WatchOptions, environ: Mapping[str, str]) -> int:
    """Watch, pin, store and list, until asked to stop; with --once until everything is listed. Return the exit code."""
    if not options.bucket:
        raise Usage("no bucket", "set BUCKET_NAME in /etc/default/cassbackup, or pass --bucket")
    disks = _open_disks(options)
    log.info("watching paths=%s", quote(" ".join(disk.root for disk in disks)))

    async def run() -> int:
        return await Daemon(options, environ, disks).run()

    code = asyncio.run(run())
    pools = [thread for thread in threading.enumerate() if thread.name.startswith(("urgent", "bulk", "local"))]
    for thread in pools:
        thread.join(0.1)  # one that has nothing to do ends by itself
    if any(thread.is_alive() for thread in pools):
        log.warning("leaving though a job is under way")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # else the interpreter would wait for it: for ever where a disk or a store hangs
    return code


# ======================================================================================================
# Catalog
# ======================================================================================================

_LISTING_BYTES: Final = 256 * MIB  # some 600,000 files; nothing larger is a listing of ours


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a command has of a bucket. `here` is this machine's node, "" where it has none."""

    store: Patient
    threads: int
    here: str = ""


@dataclass(frozen=True, slots=True)
class BucketOptions:
    """Which bucket a command uses. Without one it is the bucket that the daemon of this machine has used."""

    environ: Mapping[str, str]
    state_dir: str
    store: StoreOptions
    bucket: str = ""
    prefix: str = ""
    name: str = ""


def open_bucket(options: BucketOptions, patience_s: float = 60.0, new: bool = False) -> Bucket:
    """Open the bucket for a command; `new`: for a node that may have stored nothing yet. Raises Usage, Unreachable."""
    known = load_identity(os.path.join(options.state_dir, "identity.json"))
    bucket, prefix = options.bucket, options.prefix
    if known and not bucket:
        bucket, prefix = known.url, ""
    try:
        identity = identify(bucket, prefix, options.name, options.store.region, options.environ, known)
    except Fault:
        if "://" not in bucket or options.name or new:
            raise
        # A machine that cannot say who it is may still read a bucket whose URL is complete.
        identity = Identity("", "", f"{bucket}/{prefix}".rstrip("/"), options.store.region)
    store_options = replace(options.store, region=identity.region)
    store = open_store(identity.url, store_options, new=new and not known)
    return Bucket(Patient(store, patience_s), options.store.threads, identity.node)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command returns: its exit code, and what is printed, as JSON or as text."""

    code: int
    document: dict[str, Any]
    text: str


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """Which nodes a command is about."""

    node: str = ""
    cluster: str = ""
    all_nodes: bool = False


class ListingInfo(NamedTuple):
    """A listing as its key tells, without reading it."""

    key: str
    unit: Unit  # its life only of a snapshot; a name that was too long for a key is its hash
    listed: str
    complete: bool
    files: int
    size: int
    body: int  # bytes of JSON; 0 where a record alone tells of it
    when: float  # listed, or stored if that is later: of two clocks the younger counts


def _read_component(part: str) -> str:
    if not part.startswith("%%"):
        return unquote(part)
    return part[2:] if part[2:] in _OUR_FOLDERS else part


@functools.lru_cache(1000)
def _unit_of_folder(folder: str) -> Unit | None:
    first, *rest = folder.split("/")
    names = [_read_component(part) for part in rest]
    if first == "archive":
        return Unit("archive", tag=names[0]) if len(names) == 1 else None
    match names:
        case [table, "snapshots", tag, life] if is_utc(life):
            return Unit("snapshot", _read_component(first), table, tag, life)
        case [table, "backups"]:
            return Unit("incremental", _read_component(first), table)
    return None


def listing_info(node: str, info: ObjectInfo) -> ListingInfo | None:
    """Read a listing's key; None for owner.json, tag records and the like. Raises Corrupt for what is not ours."""
    folder, _, name = info.key.removeprefix(f"{node}.listings/").rpartition("/")
    if folder in ("heartbeat", "bad", "pruned") or folder.startswith("tags/"):
        return None
    if not folder and name.startswith(("owner.", "node.")):
        return None
    unit = _unit_of_folder(folder)
    told = parse_listing_name(name)
    if not unit or not told:
        raise Corrupt(f"{quote(info.key)} is not a listing", "nobody else should write below <node>.listings/")
    when = max(seconds_of(told[0]), info.modified)
    return ListingInfo(info.key, unit, *told, info.size, when)


def listings_of(store: Patient, node: str, strict: bool = False, folder: str = "") -> Iterator[ListingInfo]:
    """Yield a node's listings, or those in one folder, table by table.

    What else lies among them is named in the log; with `strict` it raises Corrupt.
    """
    for info in store.list(f"{node}.listings/{folder}"):
        try:
            found = listing_info(node, info)
        except Corrupt as fault:
            if strict:
                raise
            log.warning("skipped key=%s error=%s", quote(info.key), quote(fault.what))
            continue
        if found:
            yield found


def is_selected(unit: Unit, words: Sequence[str]) -> bool:
    """Tell whether one of ks, ks.table and ks.table-<id>, all of them globs, means this table; none means all."""
    name, _ = table_id_of(unit.table)
    called = (unit.keyspace, f"{unit.keyspace}.{name}", f"{unit.keyspace}.{unit.table}")
    return not words or any(any_glob(one, words) for one in called)


def is_chosen(unit: Unit, words: Sequence[str], exclude: Sequence[str]) -> bool:
    """Tell whether a table is selected, and not excluded."""
    is_excluded = bool(exclude) and is_selected(unit, exclude)
    return is_selected(unit, words) and not is_excluded


def table_folders(store: Patient, node: str, words: Sequence[str] = (), exclude: Sequence[str] = ()) -> Iterator[str]:
    """Yield the folder of each selected table, as `listings_of` takes it: <keyspace>/<table>/.

    So a command can go on table by table, and holds the listings of one only: a node may have 500,000.
    """
    root = f"{node}.listings/"
    for keyspace in store.prefixes(root):
        if keyspace in _OUR_FOLDERS:
            continue
        for table in store.prefixes(f"{root}{keyspace}/"):
            unit = Unit("snapshot", _read_component(keyspace), _read_component(table))
            if is_chosen(unit, words, exclude):
                yield f"{keyspace}/{table}/"


def read_listing(store: Patient, node: str, info: ListingInfo) -> Listing[Known]:
    """Read a listing. Raises Corrupt as `check_listing` does, and Missing."""
    if info.body > _LISTING_BYTES:
        raise Corrupt(f"{quote(info.key)} has {info.body} bytes", "that is no listing of ours")
    return check_listing(node, info.key, read_object(store, info.key))


def names_bad(store: Patient, node: str, bad: Collection[str], infos: Iterable[ListingInfo]) -> bool:
    """Tell whether listings of one unit, added up, name what is marked bad. Where nothing is, none is read."""
    if not bad:
        return False
    try:
        whole = add_up([read_listing(store, node, info) for info in infos])
    except (Corrupt, Missing) as fault:
        log.warning("cannot read listing error=%s", quote(str(fault)))
        return True
    return whole is not None and any(entry.key in bad for entry in whole.files)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One life of a tag of one table, with its listings, the oldest first."""

    unit: Unit
    listings: tuple[ListingInfo, ...]

    @property
    def newest(self) -> ListingInfo:
        """Return the listing that was written last."""
        return self.listings[-1]

    @property
    def complete(self) -> bool:
        """Tell whether any of the listings says so."""
        return any(info.complete for info in self.listings)


def snapshots_of(listings: Iterable[ListingInfo]) -> list[Snapshot]:
    """Sort the listings of snapshots by table, tag and life."""
    found: dict[Unit, list[ListingInfo]] = {}
    for info in listings:
        if info.unit.kind == "snapshot":
            found.setdefault(info.unit, []).append(info)
    snapshots = []
    for unit, infos in found.items():
        infos.sort(key=lambda info: info.listed)
        snapshots.append(Snapshot(unit, tuple(infos)))
    return snapshots


def group_snapshots(snapshots: Iterable[Snapshot]) -> list[list[Snapshot]]:
    """Put together the snapshots of all tables that one `nodetool snapshot` took, the oldest first.

    nodetool goes from table to table. One that comes again, or an hour without any, begins another life of the tag.
    """
    groups: list[list[Snapshot]] = []
    tables: set[str] = set()
    tag, until = "", 0.0
    for snapshot in sorted(snapshots, key=lambda snapshot: (snapshot.unit.tag, snapshot.unit.life)):
        unit = snapshot.unit
        began = seconds_of(unit.life)
        if unit.tag != tag or unit.place in tables or began > until:
            groups.append([])
            tables.clear()
        groups[-1].append(snapshot)
        tables.add(unit.place)
        tag, until = unit.tag, began + 3600
    return sorted(groups, key=lambda group: group[0].unit.life)


def is_meant(snapshot: Snapshot, word: str) -> bool:
    """Tell whether TAG, or TAG@<the beginning of its UTC>, means a snapshot; "" means all. A tag may hold an @ too."""
    unit = snapshot.unit
    if word in ("", unit.tag) or component(word, "%2F", NAME_MAX) == unit.tag:
        return True
    tag, _, life = word.rpartition("@")
    return unit.tag == tag and unit.life.startswith(life)


def moment_of(key: str) -> str:
    """Return the UTC in a key like <folder>/<UTC>.json."""
    return key.rpartition("/")[2].removesuffix(".json")


def put_dated(store: Patient, folder: str, document: Mapping[str, Any]) -> str:
    """Store a document as <folder>/<UTC>.json, later than all that are there; return its key."""
    moments = [moment_of(info.key) for info in store.list(f"{folder}/")]
    newest = max(filter(is_utc, moments), default=utc(0))
    # S3 tells whole seconds, and two commands may run at once.
    now = utc(store.now() + random.random())
    key = f"{folder}/{later(now, newest)}.json"
    store.put(key, Body(dump_document(**document)))
    return key


def tag_records(store: Patient, node: str) -> dict[str, dict[str, Any]]:
    """Return the tag records by their keys, of each life of a tag the newest. Raises Corrupt."""
    records: dict[str, dict[str, Any]] = {}
    newest: dict[tuple[str, str], str] = {}  # the key of each life's record
    for info, document in read_documents(store, f"{node}.listings/tags/"):
        record = {"pruned": [], **document}
        try:
            life = typed(record, "tag", str), typed(record, "taken", str)
            listings, pruned = typed(record, "listings", list), typed(record, "pruned", list)
            if not all(isinstance(key, str) for key in listings + pruned):
                raise TypeError("it names what is no key")
            for key in listings:
                listing_info(node, ObjectInfo(key, 0, "", 0.0))  # Corrupt unless it is of a listing
        except (KeyError, TypeError, Corrupt) as error:
            raise Corrupt(f"{quote(info.key)} cannot be read ({error!r})", "put it right or delete it") from None
        # Prune writes a record anew, and then deletes the old one; where it died in between, both are there.
        if life in newest:
            pruned += [key for key in records.pop(newest[life])["pruned"] if key not in pruned]
            record["listings"] = [key for key in listings if key not in pruned]
        newest[life] = info.key
        records[info.key] = record
    return records


def recorded_listings(store: Patient, node: str, pruned: bool = False) -> list[ListingInfo]:
    """Return the listings that tag records name, also those that prune has deleted if `pruned`. Raises Corrupt."""
    keys = list[str]()
    for record in tag_records(store, node).values():
        keys += record["listings"] + (record["pruned"] if pruned else [])
    infos = [listing_info(node, ObjectInfo(key, 0, "", 0.0)) for key in keys]
    return [info for info in infos if info]


def meaning_of(store: Patient, node: str, word: str) -> Callable[[Snapshot], bool]:
    """Return what tells whether a snapshot is meant by TAG, or by TAG@TIME: all that one `nodetool snapshot` took.

    It goes from table to table, so their times differ by seconds.
    """
    if "@" not in word:
        return functools.partial(is_meant, word=word)
    meant = set[Unit]()
    infos = {info.key: info for info in itertools.chain(recorded_listings(store, node), listings_of(store, node))}
    for group in group_snapshots(snapshots_of(infos.values())):
        if any(is_meant(one, word) for one in group):
            meant.update(one.unit for one in group)
    return lambda snapshot: snapshot.unit in meant


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What the bucket tells of a node: its name, and its place in the ring (node.<UTC>.json)."""

    name: str
    cluster: str = ""
    host_id: str = ""
    dc: str = ""
    rack: str = ""
    addresses: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    def is_called(self, word: str) -> bool:
        """Tell whether a word (not "") means this node: its name, also without the instance, host id, an address."""
        before_last = self.name.rpartition("-")[0]
        host = re.sub("-i-[^-]*$", "", self.name)  # AWS' instance ids have a "-" themselves: db1-i-0abc
        return word in {self.name, before_last, host, self.host_id, *self.addresses}


def node_info(store: Patient, name: str) -> NodeInfo:
    """Ask the bucket who a node is. Raises Usage where 0.1 wrote its listings; a damaged document is only logged."""
    try:
        newest_document(store, f"{name}.listings/owner.")
        place = newest_document(store, f"{name}.listings/node.")
        names = ("cluster", "host_id", "dc", "rack")
        words = {word: str(place.get(word) or "") for word in names}
        addresses = tuple(map(str, place.get("addresses") or ()))
        tokens = tuple(map(str, place.get("tokens") or ()))
        return NodeInfo(name, **words, addresses=addresses, tokens=tokens)
    except (Corrupt, TypeError) as fault:
        log.warning("skipped what tells the place in the ring node=%s error=%s", quote(name), quote(str(fault)))
        return NodeInfo(name)


def node_names(store: Patient) -> list[str]:
    """Return the names of the nodes that have listings."""
    folders = store.prefixes("")
    return [folder.removesuffix(".listings") for folder in folders if folder.endswith(".listings")]


def spread(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Do something with each item on so many threads; yield the results in order, and hold few of them."""
    if threads == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def some_of(names: Sequence[str]) -> str:
    """Return at most twenty names for a message, or that there are none."""
    return quote(", ".join(names[:20])) or "none"


def _table_name(folder: str) -> str:
    keyspace, table, _ = folder.split("/")
    return f"{_read_component(keyspace)}.{_read_component(table)}"


def check_tables(store: Patient, nodes: Sequence[str], words: Sequence[str]) -> None:
    """Raise Missing where a word means no table of any of these nodes: that others do must not hide its typo."""
    for word in words:
        if any(next(table_folders(store, node, (word,)), "") for node in nodes):
            continue
        recorded = [info for node in nodes for info in recorded_listings(store, node, pruned=True)]
        if not any(is_selected(info.unit, (word,)) for info in recorded):  # of a table that has no listing any more
            names = {_table_name(folder) for node in nodes for folder in table_folders(store, node)}
            raise Missing(f"no table {word}", f"there are {some_of(sorted(names))}; put globs in quotes")


def _no_node(store: Patient, names: Sequence[str], choice: NodeChoice) -> Missing:
    what = "no node"
    if choice.node:
        what += f" {choice.node!r}"
    if choice.cluster:
        what += f" of cluster {choice.cluster!r}"
    hint = f"there are {some_of(names)}"
    prefixes = [] if names else list(store.prefixes(""))
    if prefixes:
        hint += f"; is a --prefix lacking? There are {some_of(prefixes)}"
    return Missing(f"{what} in {store.url}", hint)


def choose_nodes(bucket: Bucket, choice: NodeChoice) -> list[NodeInfo]:
    """Return the one node that is meant; with `all_nodes` each that is. Without a word it is that of this machine.

    A word is a whole name, a name up to its last "-", a host id or an address, never a part of one: db1 is not db10.
    Raises Missing, which names what there is, and Usage where several are meant and one is needed.
    """
    names = node_names(bucket.store)
    word = choice.node
    if bucket.here in names and not (word or choice.cluster or choice.all_nodes):
        word = bucket.here
    asked = [word] if word in names else names
    found = []
    for node in spread(functools.partial(node_info, bucket.store), asked, bucket.threads):
        is_named = not word or node.is_called(word)
        if is_named and choice.cluster in ("", node.cluster):
            found.append(node)
    if not found:
        raise _no_node(bucket.store, names, choice)
    if len(found) > 1 and not choice.all_nodes:
        there = some_of([node.name for node in found])
        raise Usage(f"{len(found)} nodes match, and one is needed", f"pass the whole name as --node; there are {there}")
    return found


def pruned_until(store: Patient, node: str) -> dict[str, float]:
    """Return of each table when the newest file of backups/ was written that prune has let go. Raises Corrupt."""
    until: dict[str, float] = {}
    for info, document in read_documents(store, f"{node}.listings/pruned/"):  # of two prunes at once there are two
        try:
            for place, moment in document["tables"].items():
                until[place] = max(float(moment), until.get(place, 0.0))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise Corrupt(f"{quote(info.key)} is damaged: {error!r}", "delete it") from None
    return until


def find_objects(store: Patient, keys: Iterable[str], threads: int) -> dict[str, ObjectInfo]:
    """Return what is there of these keys, each folder on a thread. LIST tells neither a CRC-32 nor a thaw."""
    found: dict[str, ObjectInfo] = {}
    for infos in spread(lambda folder: find_infos(store, *folder), by_folder(keys).items(), threads):
        found.update(infos)
    return found


def columns(rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Return a table for people."""
    # Some names are quoted already: %25 would be their % again.
    texts = [[quote(str(cell)).replace("%25", "%") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in texts]
    return "\n".join(lines)


# ======================================================================================================
# Choose
# ======================================================================================================

# missing: a listing should have it, and never saw it. lost: given up to keep the disk free. gone: somebody deleted it
# from the bucket. lacking: what a restore cannot bring, for one of these reasons.

# An absolute path whose parts are names: none is empty, "." or "..", or holds what no file system can spell.
_PLAIN_PATH = re.compile(r"(/(?!\.{1,2}(/|$))[^/\0\ud800-\udc7f\udd00-\udfff]{1,255})+")
_UUID_EPOCH: Final = 0x01B21DD213814000  # 1970 in the ticks of a version 1 UUID: 100 ns since 1582

Age = tuple[int, int, str]
_NO_AGE: Final = (-1, 0, "")  # older than any


def origin_of(unit: Unit, entry: Known) -> tuple[str, str]:
    """Return an entry's data directory, and its folder below the table's directory: "" or .idx/.

    Raises Corrupt for what Cassandra cannot have written: a listing comes from outside, and becomes paths here.
    """
    where = "backups"
    if unit.kind == "snapshot":
        where = f"snapshots/{unit.tag}"
    table = f"/{unit.keyspace}/{unit.table}/{where}"
    home, _, below = entry.directory.rpartition(table)
    is_inside = home != "" and below[:1] in ("", "/")
    path = f"{entry.directory}/{entry.name}"
    name, _ = table_id_of(unit.table)  # a part of the path that a file is staged under
    is_plain = _PLAIN_PATH.fullmatch(f"{path}/{name}")
    if not is_inside or not is_plain:
        raise Corrupt(f"a listing names {quote(path)}", "a restore cannot put that anywhere")
    if not below:
        return home, ""
    return home, f"{below[1:]}/"


def generation_at(words: Sequence[str]) -> int:
    """Return which word of an SSTable's name is its generation: nb-1-big, until 2.1 <ks>-<table>-ka-1."""
    return -1 if words[-1].isdecimal() else 1


@dataclass(frozen=True, slots=True)
class SSTable:
    """An SSTable as one listing knows it."""

    home: str  # the data directory that it came from
    name: str  # nb-1-big, of an index .idx/nb-1-big
    seen: str  # UTC: when its pins were read, or the snapshot was taken
    files: tuple[Known, ...]
    complete: bool = True  # Cassandra can open it

    @property
    def identity(self) -> tuple[object, ...]:
        """Return what is the same in a snapshot and in backups/, and differs where a number was given again."""
        for entry in self.files:
            if entry.name.endswith("-Data.db"):  # it never changes
                return (self.name, entry.size, entry.fingerprint.mtime_ns, entry.crc32)
        return (self.name,)

    @property
    def written(self) -> float:
        """Return when it was flushed or imported, in seconds: an import writes Statistics.db (SSTableImporter)."""
        telling = [entry for entry in self.files if entry.name.endswith(("-Data.db", "-Statistics.db"))]
        return max(entry.fingerprint.written for entry in telling or self.files)

    @property
    def age(self) -> Age:
        """Return what sorts SSTables of one table: numbers, and after them UUIDs, whose text sorts by time."""
        words = os.path.basename(self.name).split("-")
        number = words[generation_at(words)]
        if number.isdecimal():
            return 0, int(number), ""
        return 1, 0, number


def sstables_of(listing: Listing[Known]) -> list[SSTable]:
    """Return the SSTables of a listing, which has all components of one that it completes. Raises Corrupt."""
    found: dict[tuple[str, str], dict[str, Known]] = {}
    for entry in listing.files:
        split = sstable_of(entry.name)
        home, folder = origin_of(listing.unit, entry)
        if split:
            components = found.setdefault((home, folder + split[0]), {})
            components[entry.name] = entry
    sstables = []
    lacking = listing.lacks
    for (home, name), components in found.items():
        first = os.path.basename(name) + "-"
        lacks = any(one.startswith(first) and one not in components for one in lacking)
        complete = f"{first}Data.db" in components and not lacks
        sstables.append(SSTable(home, name, listing.taken, tuple(components.values()), complete))
    return sstables


@dataclass(frozen=True, slots=True)
class Base:
    """What a restore to a moment begins with: a complete snapshot, or nothing, from a truncate on."""

    start: float = 0.0  # what was flushed since then may be lacking in it
    end: float = 0.0
    listing: Listing[Known] | None = None
    newest: Age | None = None  # the youngest that was there, where that is known
    dropped: bool = False
    gone: frozenset[object] = frozenset()  # what was there when it was emptied, if the base is empty

    def adds(self, sstable: SSTable, before: float) -> bool:
        """Tell whether an SSTable of backups/ belongs to the table as it was at a moment.

        | written          | its id                  | first seen          | added                                  |
        |------------------|-------------------------|---------------------|----------------------------------------|
        | after the moment |                         |                     | no                                     |
        | since the base   |                         |                     | yes: a flush that it may lack          |
        | before the base  | not younger             |                     | no: it was in there, or compacted away |
        | before the base  | younger than all of its | between base and    | yes: an import that kept its old times |
        |                  |                         | moment              |                                        |
        """
        if sstable.written > before:
            return False
        if sstable.written >= self.start:
            return True
        if self.newest is None or "/" in sstable.name or sstable.age <= self.newest:
            return False
        if sstable.identity in self.gone:  # listed once more, by a daemon that had lost its ledger
            return False
        # Numbers can begin anew after a truncate and a restart, and any is younger than those of an empty base.
        since = self.end if self.newest == _NO_AGE else self.start
        return since <= seconds_of(sstable.seen) <= before


def end_of(listing: Listing[Known]) -> float:
    """Return when a snapshot was complete, in seconds: the last change of manifest.json, else when its life began."""
    ends = [entry.fingerprint.written for entry in listing.files if entry.name == MANIFEST]
    return max(ends, default=seconds_of(listing.unit.life))


def base_on(listing: Listing[Known], created: float = 0.0) -> Base:
    """Return a snapshot as a base. `created` is created_at of its manifest in seconds, 0.0 where it has none."""
    end = end_of(listing)
    start = end - 3600.0
    if 0 < created <= end:
        start = created  # links may be throttled (nodetool setsnapshotthrottle): then a snapshot takes hours
    newest = _NO_AGE
    for one in sstables_of(listing):
        if "/" not in one.name:  # an index counts its own numbers
            newest = max(newest, one.age)
    return Base(start - _SLACK_S, end, listing, newest)


def last_emptied(
    snapshots: Iterable[Snapshot], before: float, read: Callable[[Snapshot], Listing[Known]]
) -> tuple[float, Snapshot | None]:
    """Return when a table was emptied last before a moment, and the snapshot that tells so."""
    emptied, last = 0.0, None
    for one in snapshots:
        moment = emptied_at(one.unit)
        if moment > before:
            continue
        if is_drop(one.unit) and one.complete:
            # DROP TABLE names the snapshot first and flushes after: what it flushed is in it, and younger than the tag.
            moment = max(moment, end_of(read(one)))
        if moment > emptied:
            emptied, last = moment, one
    return emptied, last


def choose_base(
    snapshots: Sequence[Snapshot],
    before: float,
    read: Callable[[Snapshot], Listing[Known]],
    created: Callable[[Listing[Known]], float],
) -> Base:
    """Return what a restore of one table to a moment begins with.

    That is the newest complete snapshot that had ended by then, but none that ended before the table was emptied:
    from there on nothing older belongs to it, however soon a snapshot followed. The tag tells whole milliseconds, and
    what was flushed within that one is older.
    """
    emptied, last = last_emptied(snapshots, before, read)
    best: Listing[Known] | None = None
    end = emptied
    for one in sorted(snapshots, key=lambda one: one.newest.listed, reverse=True):
        if seconds_of(one.newest.listed) <= end:
            break  # it had ended when it was listed
        is_whole = one.complete and not emptied_at(one.unit) and not is_partial(one.unit)
        if not is_whole or seconds_of(one.unit.life) - _SLACK_S > before:
            continue
        listing = read(one)
        if listing.complete and end < end_of(listing) <= before:
            best, end = listing, end_of(listing)
    if best:
        base = base_on(best, created(best))
        gone = frozenset[object]()
        if last and last.complete and base.newest == _NO_AGE:
            gone = frozenset(one.identity for one in sstables_of(read(last)))
        return replace(base, start=max(base.start, emptied + 0.001), gone=gone)
    if not last:
        return Base()
    newest = None
    if last.complete:
        listing = read(last)
        newest = base_on(listing).newest if listing.complete else None
    return Base(emptied + 0.001, emptied, newest=newest, dropped=is_drop(last.unit))


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one table is restored from, and why."""

    keyspace: str
    table: str  # the directory's name
    sstables: tuple[SSTable, ...]
    base: Base
    added: int  # how many of the SSTables come from backups/: the last ones
    schema: Known | None  # schema.cql
    lacking: tuple[str, ...]  # what should be restored and cannot

    @property
    def called(self) -> tuple[str, str]:
        """Return keyspace and table, as an operator calls it: without its id."""
        name, _ = table_id_of(self.table)
        return self.keyspace, name

    def __str__(self) -> str:
        return f"{quote(self.keyspace)}.{quote(self.table)}"

    @property
    def why(self) -> str:
        """Say what the table is restored from."""
        text = "no snapshot"
        listing = self.base.listing
        if listing:
            state = "" if listing.complete else "INCOMPLETE "
            snapshot = f"{quote(listing.unit.tag)}@{listing.unit.life}"
            text = f"{state}snapshot {snapshot}, ended {utc(self.base.end)}"
        elif self.base.end:
            text = f"empty since it was truncated or dropped at {utc(self.base.end)}"
        if self.added:
            text += f", and {self.added} SSTables of backups/"
        return text


def schema_in(listing: Listing[Known]) -> Known | None:
    """Return the schema.cql of a snapshot; each of several data directories may have the same one."""
    return next((entry for entry in listing.files if entry.name == SCHEMA), None)


def _lacks(listing: Listing[Known], before: float) -> Iterator[str]:
    """Yield what a listing lacks of a table as it was at a moment, but for single components of backups/."""
    if listing.unit.kind == "snapshot" and not listing.complete:
        names = " ".join(listing.lacks) or "files that nothing names"
        yield f"its snapshot is not complete: it lacks {quote(names)}"
    if listing.unit.kind == "incremental" and listing.lost:
        # When its files were written nobody knows any more, but hardly any was long before they were found.
        found = seconds_of(listing.taken)
        if found - _SLACK_S <= before:
            names = some_of(listing.lost)
            yield f"{len(listing.lost)} files of backups/ were lost before they were stored: {names}"
    for entry in listing.files:
        is_odd = entry.name.endswith("-Data.db") and not sstable_of(entry.name)
        if is_odd and entry.fingerprint.written <= before:
            yield f"skipping {quote(entry.name)}: not an SSTable name"


def choose_at(
    keyspace: str,
    table: str,
    base: Base,
    batches: Iterable[Listing[Known]],
    before: float = math.inf,
    bad: Collection[str] = (),
) -> Chosen:
    """Choose the SSTables of a table as it was at a moment, from its base and its listings of backups/.

    Of a busy table there are many listings, so they are read one by one and none is held. `bad` are marked keys.
    """
    chosen: dict[tuple[object, ...], SSTable] = {}
    lacking: list[str] = []
    if base.listing:
        lacking += _lacks(base.listing, before)
        chosen = {one.identity: one for one in sstables_of(base.listing) if one.complete}
    of_base = len(chosen)
    broken: list[SSTable] = []
    for batch in batches:
        lacking += _lacks(batch, before)
        for one in sstables_of(batch):
            if not base.adds(one, before):
                continue
            if one.complete and not any(entry.key in bad for entry in one.files):
                chosen.setdefault(one.identity, one)
            else:
                broken.append(one)
    there = {(entry.name, entry.crc32) for one in chosen.values() for entry in one.files}
    for one in broken:
        if any((entry.name, entry.crc32) not in there for entry in one.files):
            lacking.append(f"skipping {quote(one.name)} of backups/: it lacks a component, or one is marked bad")
    schema = schema_in(base.listing) if base.listing else None
    added = len(chosen) - of_base
    files = tuple(chosen.values())
    once_each = tuple(dict.fromkeys(lacking))
    return Chosen(keyspace, table, files, base, added, schema, once_each)


def created_at(table: str) -> float:
    """Return when a table was created, as its id tells: a version 1 UUID (TableId.generate). Else 0.0."""
    told = table_id_of(table)[1]
    if told[12:13] != "1":
        return 0.0
    digits = told[13:16] + told[8:12] + told[:8]
    ticks = int(digits, 16)
    return (ticks - _UUID_EPOCH) / 1e7


def newest_of_names(tables: Iterable[Chosen], before: float) -> list[Chosen]:
    """Keep of each name the table that lived at a moment: one that was dropped and made again has two ids."""

    def claim(one: Chosen) -> tuple[bool, bool, float]:
        """Return what speaks for a table, the strongest first."""
        created = created_at(one.table)
        # schema.cql gives a table the id that it had: dropped, it may have come back.
        is_there = not one.base.dropped or len(one.sstables) > 0
        newest = max([one.base.end, created, *(sstable.written for sstable in one.sstables)])
        return created <= before, is_there, newest

    living: dict[tuple[str, str], Chosen] = {}
    for one in tables:
        was_created = 0.0 < created_at(one.table) <= before
        if was_created or one.base.end or one.sstables or one.lacking:  # else nothing was heard of it by then
            rival = living.setdefault(one.called, one)
            living[one.called] = max(rival, one, key=claim)
    # Of one that was created only, nothing is in the bucket.
    return [one for one in living.values() if one.base.end or one.sstables or one.lacking]


# ======================================================================================================
# Restore
# ======================================================================================================

_RANGE_BYTES: Final = 64 * MIB  # what one thread fetches of a large file at a time
_OLD_S: Final = 10 * 86400.0  # the default of gc_grace_seconds: tombstones older than that may be gone


@dataclass(frozen=True, slots=True)
class RestoreOptions(NodeChoice):
    """What is restored, and where to."""

    tag: str = ""
    at: float = 0.0  # seconds since 1970
    latest: bool = False
    archive: str = ""
    table: tuple[str, ...] = ()
    exclude_table: tuple[str, ...] = ()
    into: str = ""
    dry_run: bool = False
    incomplete: bool = False
    schema_only: bool = False
    import_: bool = False
    nodetool: str = "nodetool"
    in_place: bool = False
    same_node: bool = False
    new_node: bool = False
    data_dir: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------
# One file


class Placed(NamedTuple):
    """Which object becomes which file."""

    entry: Known
    root: str
    path: str  # below the root

    @property
    def whole_path(self) -> str:
        """Return the file's absolute path."""
        return os.path.join(self.root, self.path)


@functools.lru_cache(1000)
def _owner_ids(user: str, group: str) -> tuple[int, int]:
    """Return the ids of a user and a group, -1 for what this machine does not know."""
    uid = gid = -1
    with contextlib.suppress(KeyError, ValueError):
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    with contextlib.suppress(KeyError, ValueError):
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    if max(uid, gid) >= 1 << 32:
        return -1, -1
    return uid, gid


@contextlib.contextmanager
def open_folder(placed: Placed) -> Iterator[int]:
    """Open a file's directory, and make what is not there; nothing below the root may be a symbolic link."""
    fd = os.open(placed.root, os.O_DIRECTORY)
    owner = _owner_ids(placed.entry.user, placed.entry.group)
    how = os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        for part in placed.path.split("/")[:-1]:
            try:
                below = os.open(part, how, dir_fd=fd)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another thread was faster
                    os.mkdir(part, 0o755, dir_fd=fd)
                    os.fsync(fd)
                below = os.open(part, how, dir_fd=fd)
            os.close(fd)
            fd = below
            if os.geteuid() == 0 and os.fstat(fd).st_uid == 0:  # a run that was killed may have made it, too
                os.fchown(fd, *owner)
        yield fd
    finally:
        os.close(fd)


def _is_restored(name: str, entry: Known, folder: int) -> bool:
    """Tell whether a file is there already. Raises Conflict if it is another one, which is never overwritten."""
    try:
        # O_NONBLOCK: it may be a fifo, to which nobody ever writes.
        fd = os.open(name, os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return False
    try:
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_size == entry.size:
            pieces = iter(lambda: os.read(fd, MIB), b"")
            if crc32_of(pieces) == entry.crc32:
                return True
    finally:
        os.close(fd)
    raise Conflict(f"{quote(name)} has other content", "move it away, or restore to an empty directory")


def _fetch_range(store: Patient, entry: Known, fd: int, start: int) -> tuple[int, int]:
    """Fetch one range of an object into a file; return the range's CRC-32 and size."""
    at = start
    end = min(start + _RANGE_BYTES, entry.size)
    crc32 = 0
    for chunk in store.get(entry.key, start, end):
        crc32 = zlib.crc32(chunk, crc32)
        if os.pwrite(fd, chunk, at) < len(chunk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        at += len(chunk)
    if at != end:
        raise Corrupt(f"{entry.key} ended at byte {at} of {entry.size}", "run cassbackup verify")
    return crc32, end - start


def _fetch(store: Patient, entry: Known, fd: int, threads: int) -> None:
    """Fetch an object into an empty file; then owner, mode and time, and all of it durable. Raises Corrupt."""
    starts = range(0, max(1, entry.size), _RANGE_BYTES)
    work = functools.partial(_fetch_range, store, entry, fd)
    whole = 0
    for crc32, size in spread(work, starts, threads):  # the first fault ends all: the rest of 300 GB need not come
        whole = crc32_combine(whole, crc32, size)
    if hex32(whole) != entry.crc32:
        what = f"{entry.key} has CRC-32 {hex32(whole)}, listed as {entry.crc32}"
        raise Corrupt(what, "run cassbackup verify --deep")
    if os.geteuid() == 0:
        os.fchown(fd, *_owner_ids(entry.user, entry.group))
    mtime_ns = entry.fingerprint.mtime_ns
    os.fchmod(fd, entry.mode & 0o777)
    os.utime(fd, ns=(mtime_ns, mtime_ns))
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _fetch_then_link(store: Patient, entry: Known, folder: int, name: str, threads: int) -> None:
    """Fetch a file under another name; it gets its own by link(2), which never overwrites. Raises Corrupt, OSError."""
    temporary = f".cassbackup-{hash_name(name)}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=folder)  # left by a run that was killed; the lock keeps others out
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        _fetch(store, entry, fd, threads)
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(fd)
        os.unlink(temporary, dir_fd=folder)


def receive(store: Patient, threads: int, placed: Placed) -> str:
    """Restore a file, unless it is there; return what went wrong, or ""."""
    entry, name = placed.entry, os.path.basename(placed.path)
    try:
        with open_folder(placed) as folder:
            if _is_restored(name, entry, folder):
                return ""
            try:
                _fetch_then_link(store, entry, folder, name, threads)
            except Corrupt:  # what was damaged on its way comes right the second time
                _fetch_then_link(store, entry, folder, name, threads)
    except (Corrupt, Missing, Conflict, OSError) as error:
        return str(error)
    return ""


def receive_all(bucket: Bucket, files: Sequence[Placed]) -> dict[str, str]:
    """Restore files, large ones one after the other with all threads; return what went wrong, by path."""
    large = [one for one in files if one.entry.size > _RANGE_BYTES]
    small = [one for one in files if one.entry.size <= _RANGE_BYTES]
    of_large = map(functools.partial(receive, bucket.store, bucket.threads), large)
    of_small = spread(functools.partial(receive, bucket.store, 1), small, bucket.threads)
    wrong: dict[str, str] = {}
    done, said = 0, time.monotonic()
    for placed, why in zip(large + small, itertools.chain(of_large, of_small), strict=True):
        done += placed.entry.size
        if why:
            path = placed.whole_path
            wrong[path] = why
            log.error("not restored path=%s error=%s", quote(path), quote(why))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            log.info("restoring done=%s", quote(size_text(done)))
    if wrong:
        return wrong
    # The bytes of all files are durable, and now their names, too.
    folders = {os.path.dirname(one.whole_path): one for one in files}
    for one in folders.values():
        with open_folder(one) as folder:
            os.fsync(folder)
    return {}


# ------------------------------------------------------------------------------------------------------
# What is restored


# What reading created_at may raise: it is absent, archived, or not what Cassandra writes.
_NO_MOMENT: Final = (Missing, Denied, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def _table_folder(path: str) -> str:
    """Return the folder of a table's listings out of a path in it."""
    return "/".join([*path.split("/")[:2], ""])


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads a node's listings as far as they can be read, those of snapshots without what is marked bad."""

    store: Patient
    threads: int
    node: str
    bad: frozenset[str]
    # What tag records name, by the folder of its table: who tries to read one that is gone finds it lacking.
    recorded: Mapping[str, Sequence[ListingInfo]] = field(default_factory=dict)
    # What cannot be read, or was lost. Several threads append to it: that a list takes at once, without a lock.
    lacking: list[str] = field(default_factory=list)

    def listings(self, folder: str) -> list[ListingInfo]:
        """Return what is listed in a folder, or recorded to be."""
        found = {info.key: info for info in self.recorded.get(_table_folder(folder), ())}
        found.update((info.key, info) for info in listings_of(self.store, self.node, folder=folder))
        return [found[key] for key in sorted(found)]

    def read(self, infos: Sequence[ListingInfo]) -> Listing[Known]:
        """Add up listings of one unit. One that cannot be read is lacking, unless the others are complete."""
        listings: list[Listing[Known]] = []
        faults: list[str] = []
        for info in infos:
            try:
                listing = read_listing(self.store, self.node, info)
                if info.unit.kind != "archive":
                    sstables_of(listing)  # Corrupt where its paths lie
                listings.append(listing)
            except Missing:
                faults.append(f"{quote(info.key)} is gone, by prune or somebody else: --exclude-table leaves it out")
            except Corrupt as fault:
                log.warning("cannot read listing error=%s", quote(str(fault)))
                faults.append(str(fault))
        newest = infos[-1]
        nothing: Listing[Known] = Listing(self.node, newest.unit, newest.listed, newest.listed, False, ())
        whole = add_up(listings) or nothing
        if newest.unit.kind == "snapshot":
            good = tuple(entry for entry in whole.files if entry.key not in self.bad)
            if len(good) < len(whole.files):
                missing = [entry.name for entry in whole.files if entry.key in self.bad]
                whole = replace(whole, complete=False, files=good, missing=(*whole.missing, *missing))
                faults.append(f"{label(newest.unit)}: marked bad: {some_of(missing)}")
        if not whole.complete:
            self.lacking.extend(faults)
        return whole

    def created(self, listing: Listing[Known]) -> float:
        """Return created_at of a snapshot's manifest.json in seconds (Cassandra 4.1, CASSANDRA-16789), 0.0 without."""
        for entry in listing.files:
            if entry.name == MANIFEST:
                with contextlib.suppress(*_NO_MOMENT):
                    created = json.loads(read_object(self.store, entry.key))["created_at"]
                    return datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp()
        return 0.0


def nearest_schema(reader: Reader, snapshots: Iterable[Snapshot], before: float) -> Known | None:
    """Return the schema.cql of a snapshot near a moment at which a table had no base: it was truncated, or is young.

    Only a few are looked into: the snapshots of system tables never have one.
    """
    nearest = sorted(snapshots, key=lambda one: abs(seconds_of(one.unit.life) - before))
    aside = replace(reader, lacking=[])  # no row is lacking where one of these cannot be read
    for snapshot in nearest[:3]:
        schema = schema_in(aside.read(snapshot.listings))
        if schema:
            return schema
    return None


def choose_table(reader: Reader, before: float, folder: str) -> Chosen | None:
    """Choose what a table was at a moment; only the listings that this takes are read."""
    infos = reader.listings(folder)
    if not infos:
        return None
    snapshots = snapshots_of(infos)

    def read(snapshot: Snapshot) -> Listing[Known]:
        return reader.read(snapshot.listings)

    base = choose_base(snapshots, before, read, reader.created)
    # What was listed before the base began had been written by then.
    flushed = [one for one in infos if one.unit.kind == "incremental"]
    since = [[one] for one in flushed if one.when >= base.start]
    batches = spread(reader.read, since, reader.threads)
    unit = infos[0].unit
    chosen = choose_at(unit.keyspace, unit.table, base, batches, before, reader.bad)
    if base.listing:
        return chosen
    chosen = replace(chosen, schema=nearest_schema(reader, snapshots, before))
    torn = [one.unit.tag for one in snapshots if not is_automatic(one.unit) and seconds_of(one.unit.life) <= before]
    if base.end or not torn:
        return chosen
    what = f"none of its snapshots by then is whole: {some_of(torn)}; --tag restores what one has"
    return replace(chosen, lacking=(*chosen.lacking, what))


def less_pruned(one: Chosen, pruned: Mapping[str, float], before: float) -> Chosen:
    """Note as lacking what prune may have let go of backups/ between the base of a table and a moment."""
    cut = pruned.get(f"{one.keyspace}/{one.table}", 0.0)
    if one.base.end >= min(cut, before) or created_at(one.table) > before:
        return one
    what = f"prune has let go what was flushed until {moment_text(utc(cut))}; --tag restores a snapshot as it is"
    return replace(one, lacking=(*one.lacking, what))


def choose_moment(reader: Reader, folders: Sequence[str], before: float) -> list[Chosen]:
    """Choose what each table was at a moment. Raises Missing, which names the first moment that there is."""
    # Few tables at once, so that the threads are enough to read the listings of each side by side.
    at_once = max(1, min(4, len(folders)))
    of_each = replace(reader, threads=max(1, reader.threads // at_once))
    found = list(spread(functools.partial(choose_table, of_each, before), folders, at_once))
    pruned = pruned_until(reader.store, reader.node)  # it may run just now: it tells so before it deletes a listing
    tables = newest_of_names([less_pruned(one, pruned, before) for one in found if one], before)
    if tables or reader.lacking:
        return tables
    first = "yet to come"
    for folder in folders:
        for info in reader.listings(folder):
            first = min(first, info.unit.life or info.listed)
    raise Missing(f"nothing had been backed up by {utc(before)}", f"the first moment is {first}")


def choose_tag(reader: Reader, folders: Sequence[str], word: str) -> list[Chosen]:
    """Choose what TAG, or TAG@TIME, means: of all tables the newest such snapshot. Raises Missing, with the tags."""
    found = spread(reader.listings, [f"{folder}snapshots/" for folder in folders], reader.threads)
    taken = group_snapshots(snapshots_of(itertools.chain(*found)))
    groups = [group for group in taken if any(is_meant(one, word) for one in group)]
    # A tag may look like TAG@TIME itself: it comes first.
    exact = [group for group in groups if group[0].unit.tag == word]
    if not groups:
        tags = {group[0].unit.tag for group in taken}
        raise Missing(f"no snapshot {word!r}", f"there are {some_of(sorted(tags))}")
    *earlier, newest = exact or groups
    here = {one.unit.place for one in newest}
    # What a record alone tells of has no body: it is gone.
    before = {one.unit.place: one for group in earlier for one in group if one.newest.body}
    drops = [one.unit for group in taken for one in group if is_drop(one.unit)]
    dropped = {unit.place: seconds_of(unit.life) for unit in drops}
    for place, one in before.items():
        # A table is listed when it is stored: that of a large one may be under way yet.
        if place not in here and dropped.get(place, 0.0) < seconds_of(one.unit.life):
            what = f"{place}: {quote(one.unit.tag)}@{one.unit.life} has it, and the newest has not"
            reader.lacking.append(f"{what}; if it was dropped, leave it out: --exclude-table")
    tables = []
    for listing in spread(reader.read, [one.listings for one in newest], reader.threads):
        unit, base = listing.unit, base_on(listing)
        tables.append(choose_at(unit.keyspace, unit.table, base, ()))
    return tables


def choose(reader: Reader, options: RestoreOptions, before: float) -> list[Chosen]:
    """Choose what of the selected tables is restored. Raises Missing, which names what there is."""
    check_tables(reader.store, [reader.node], [*options.table, *options.exclude_table])
    exclude = options.exclude_table
    if options.new_node:
        exclude += ("system.local", "system.peers*")
    if not options.table and not options.in_place:
        exclude += SYSTEM_KEYSPACES  # Cassandra imports none of these
    told: list[ListingInfo] = []
    try:
        told = recorded_listings(reader.store, reader.node, pruned=options.tag != "")
    except Corrupt as fault:
        reader.lacking.append(f"whether a listing is gone cannot be told: {fault}")
    recorded: dict[str, list[ListingInfo]] = {}
    for info in told:
        if is_chosen(info.unit, options.table, exclude):
            folder = _table_folder(info.key.removeprefix(f"{reader.node}.listings/"))
            recorded.setdefault(folder, []).append(info)
    reader = replace(reader, recorded=recorded)
    folders = list(table_folders(reader.store, reader.node, options.table, exclude))
    folders += sorted(recorded.keys() - set(folders))
    if not folders:
        hint = "name one with --table, or take all with --table '*'"
        raise Missing("no table is left but those of the system, or excluded ones", hint)
    tables = choose_tag(reader, folders, options.tag) if options.tag else choose_moment(reader, folders, before)
    units = [Unit("snapshot", one.keyspace, one.table) for one in tables]
    for word in options.table:
        if not any(is_selected(unit, (word,)) for unit in units):
            raise Missing(f"{word} has nothing of what was asked for", "leave it out, or choose another --tag or --at")
    return tables


def choose_archive(reader: Reader, directory: str) -> Iterable[Known]:
    """Choose what was archived in a directory, of each name the newest."""
    folder = unit_prefix("", Unit("archive", tag=directory)).removeprefix(".listings/")
    infos = [[info] for info in listings_of(reader.store, reader.node, folder=folder)]
    newest: dict[str, Known] = {}  # the bad ones too: an older one would pass for it
    for listing in spread(reader.read, infos, reader.threads):
        newest.update((entry.name, entry) for entry in listing.files)
        reader.lacking.extend(f"{quote(name)} was lost before it was stored" for name in listing.lost)
    if not newest:
        raise Missing(f"{reader.node} has no archive of {quote(directory)}", "`cassbackup list` names the directories")
    bad = sorted(name for name, entry in newest.items() if entry.key in reader.bad)
    reader.lacking.extend(f"{quote(name)} is marked bad" for name in bad)
    return [entry for entry in newest.values() if entry.key not in reader.bad]


# ------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True, slots=True)
class Plan:
    """What a restore would do, all of it known before the first byte is written."""

    node: NodeInfo
    moment: str  # what was asked for
    where: str
    tables: Sequence[Chosen]
    files: Sequence[Placed]
    lacking: Sequence[str]  # what should be restored and cannot, for people
    absent: Sequence[str]  # keys that are not there as listed
    archived: Sequence[str]  # keys that must be thawed first
    notes: Sequence[str]

    @property
    def size(self) -> int:
        """Return the bytes to fetch."""
        return sum(one.entry.size for one in self.files)

    def refusal(self, incomplete: bool) -> str:
        """Say why nothing is restored; "" where nothing speaks against it."""
        if self.archived:
            return f"{len(self.archived)} objects are archived: thaw them in the bucket first (S3 RestoreObject)"
        if self.absent:
            hint = "`cassbackup verify --repair` marks them bad, then --incomplete restores the rest"
            return f"{len(self.absent)} objects are not there as listed: {hint}"
        if self.lacking and not incomplete:
            return "the backup is not complete: --incomplete restores what there is"
        return ""

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        tables = []
        for one in self.tables:
            count = len(one.sstables)
            tables.append({"table": str(one), "from": one.why, "sstables": count, "incrementals": one.added})
        return {
            "schema": 1,
            "node": self.node.name,
            "moment": self.moment,
            "where": self.where,
            "tables": tables,
            "files": len(self.files),
            "bytes": self.size,
            "lacking": self.lacking,
            "absent": self.absent,
            "needs_thaw": self.archived,
            "notes": self.notes,
        }

    def text(self) -> str:
        """Return the plan for people."""
        rows = [("table", "SSTables", "from")]
        rows += [(str(one), str(len(one.sstables)), one.why) for one in self.tables]
        lines = [
            f"{self.node.name} as of {self.moment}, into {quote(self.where)}",
            columns(rows, "  "),
            f"{len(self.files)} files, {size_text(self.size)}",
        ]
        lines += [f"lacking: {what}" for what in self.lacking]
        lines += [f"not in the bucket as listed: {key}" for key in self.absent[:20]]
        lines += [f"needs thaw: {key}" for key in self.archived[:20]]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def renamed(name: str, generation: int) -> str:
    """Return an SSTable's name with another generation: nb-7-big."""
    folder, slash, name = name.rpartition("/")
    words = name.split("-")
    words[generation_at(words)] = str(generation)
    return folder + slash + "-".join(words)


def place_sstables(one: Chosen, roots: Mapping[str, str], folder: str) -> Iterator[Placed]:
    """Yield the files of a table. Where a generation was given twice, the second SSTable gets a free one."""
    names: set[str] = set()
    free = max((sstable.age[1] for sstable in one.sstables), default=0)
    for sstable in one.sstables:
        name = sstable.name
        while name in names:
            free += 1
            name = renamed(sstable.name, free)
        names.add(name)
        own = len(os.path.basename(sstable.name))
        for entry in sstable.files:
            component = entry.name[own:]
            yield Placed(entry, roots[sstable.home], f"{folder}/{name}{component}")


def place_staged(tables: Sequence[Chosen], into: str) -> Iterator[Placed]:
    """Yield where files go: <into>/<ks>/<table>/, as `nodetool import` and sstableloader take them. Raises Usage."""
    folders: dict[str, str] = {}
    for one in tables:
        folder = "/".join(one.called)
        if folders.setdefault(folder, one.table) != one.table:
            name = ".".join(one.called)
            raise Usage(f"two tables are called {name}", f"choose one: --table {one.keyspace}.{one.table}")
        roots = {sstable.home: into for sstable in one.sstables}
        yield from place_sstables(one, roots, folder)
        if one.schema:
            yield Placed(one.schema, into, f"{folder}/{SCHEMA}")


def place_live(tables: Sequence[Chosen], given: Sequence[str]) -> Iterator[Placed]:
    """Yield where files go in the data directories of a stopped node. Raises Usage.

    `given` are --data-dir: OLD=NEW, or one for all. Without a word, files go back to where this machine's
    cassandra.yaml has their data directory too: a listing alone cannot name a place.
    """
    roots = {} if given else {path: path for path in data_directories()}
    for word in given:
        old, _, new = word.rpartition("=")
        if not new or old in roots:
            raise Usage(f"--data-dir {word!r} names no directory, or one twice", "write OLD=NEW, or one NEW for all")
        roots[old] = os.path.abspath(new)
    for_all = roots.get("", "")
    for one in tables:
        for home in {sstable.home for sstable in one.sstables}:
            root = roots.setdefault(home, for_all)
            if not os.path.isdir(root):
                hint = f"create it, or pass --data-dir {quote(home)}=<here>"
                raise Usage(f"{quote(root or home)} is no data directory of this node", hint)
        yield from place_sstables(one, roots, f"{one.keyspace}/{one.table}")


def notes_on(reader: Reader, tables: Sequence[Chosen], moment: float) -> Iterator[str]:
    """Yield what an operator should know of a restore to a moment, or (0.0) of one that has no moment."""
    now = reader.store.now()
    bare = [str(one) for one in tables if one.sstables and not one.base.end]
    if bare:
        yield f"no snapshot by then; only what backups/ had is restored: {some_of(bare)}"
    through = ""
    with contextlib.suppress(Corrupt):
        beat = newest_document(reader.store, f"{reader.node}.listings/heartbeat/")
        through = str(beat.get("listed_through", ""))
    if moment and through < utc(moment):
        yield f"what {reader.node} found after {through or 'its start'} may not be in the bucket"
    oldest = moment or min((one.base.end for one in tables), default=now)
    if moment and is_utc(through):  # --latest of a node that is dead for long brings no more than that
        oldest = min(oldest, seconds_of(through))
    if now - oldest > _OLD_S:
        yield "older than 10 days (the default gc_grace_seconds): what was deleted since can come back on a live node"


def find_lacking(bucket: Bucket, placed: Sequence[Placed]) -> tuple[list[str], list[str]]:
    """Return the keys that are not there with the listed size, and those that must be thawed first."""
    sizes = {one.entry.key: one.entry.size for one in placed}
    found = find_objects(bucket.store, sizes, bucket.threads)
    absent, archived = [], []
    for key, size in sizes.items():
        info = found.get(key)
        if not info or info.size != size:
            absent.append(key)
        elif info.archived:
            info = bucket.store.head(key)  # only HEAD tells what is thawed
            if info and info.archived:
                archived.append(key)
    return absent, archived


def described_schema(store: Patient, node: str, tables: Iterable[Chosen]) -> bytes:
    """Return what DESCRIBE SCHEMA said when the newest snapshot of these was taken; nothing where nobody asked.

    Raises Corrupt.
    """
    bases = [one.base.listing for one in tables if one.base.listing]
    if not bases:
        return b""
    unit = max(bases, key=lambda listing: listing.taken).unit
    tag = component(unit.tag, "%2F")
    for _, record in read_documents(store, f"{node}.listings/tags/{tag}/"):
        listings = " ".join(map(str, record.get("listings") or ()))
        if unit_prefix(node, unit) in listings:
            return str(record.get("schema", "")).encode()
    return b""


def make_plan(bucket: Bucket, node: NodeInfo, options: RestoreOptions, into: str) -> Plan:
    """Choose what to restore and where to, and look for every object of it. Raises Missing, Usage, Corrupt."""
    now = bucket.store.now()
    at = options.at or now
    if at > now + 60:
        raise Usage(f"{utc(at)} is in the future", f"it is {utc(now)} by the store's clock")
    before = options.at or now + _SLACK_S  # the node's clock may be ahead
    bad = read_bad_keys(bucket.store, node.name)
    reader = Reader(bucket.store, bucket.threads, node.name, bad)
    moment = utc(at)
    where = into
    tables: list[Chosen] = []
    if options.archive:
        moment = f"archive {quote(options.archive)}"
        archived = choose_archive(reader, os.path.normpath(options.archive))
        placed = [Placed(entry, into, entry.name) for entry in archived]
    else:
        if options.tag:
            moment = f"snapshot {quote(options.tag)}"
        tables = choose(reader, options, before)
        if options.schema_only:
            tables = [replace(one, sstables=(), added=0, lacking=()) for one in tables]
        if options.in_place:
            where = "the data directories"
            placed = list(place_live(tables, options.data_dir))
        else:
            placed = list(place_staged(tables, into))
    lacking = sorted(reader.lacking)
    for one in tables:
        lacking += [f"{one}: {what}" for what in one.lacking]
    absent, frozen = find_lacking(bucket, placed)
    is_moment = options.at > 0 or options.latest
    notes = list(notes_on(reader, tables, at if is_moment else 0.0))
    if options.schema_only:
        bare = [f"{one}: no schema.cql" for one in tables if not one.schema]
        if described_schema(bucket.store, node.name, tables):
            notes += bare
        else:
            lacking += bare
    if options.archive:
        others = map(unquote, bucket.store.prefixes(f"{node.name}.listings/archive/"))
        below = [other for other in others if other.startswith(os.path.normpath(options.archive) + "/")]
        notes.extend(f"{quote(other)} is an archive of its own: restore it, too" for other in below)
    is_all = not (options.table or options.in_place or options.archive)
    if is_all and "system_auth" in bucket.store.prefixes(f"{node.name}.listings/"):
        notes.append("system_auth, which has roles and grants, is left out; --table system_auth takes it")
    return Plan(node, moment, where, tables, placed, lacking, absent, frozen, notes)


# ------------------------------------------------------------------------------------------------------
# The target


def restore_directory(into: str) -> str:
    """Return --into; else a directory beside the data, so that an import renames instead of copying."""
    if into:
        return os.path.abspath(into)
    with contextlib.suppress(Usage):
        return os.path.join(os.path.dirname(data_directories()[0]), "cassbackup-restore")
    return os.path.abspath("cassbackup-restore")


def make_target(into: str) -> None:
    """Make the directory to restore to. Raises Usage where Cassandra reads it, or we may not write to it."""
    live: list[str] = []
    with contextlib.suppress(Usage):
        live = [os.path.realpath(path) for path in data_directories()]
    above = os.path.realpath(into)
    while above != os.path.dirname(above):
        # Cassandra keeps its own tables there, with their ids in their names.
        tables = glob.glob(f"{glob.escape(above)}/system/*-{'?' * 32}")
        if above in live or tables:
            raise Usage(f"{quote(into)} is in the data directory {quote(above)}", "choose another --into")
        above = os.path.dirname(above)
    try:
        mask = os.umask(0o022)  # sudo may come with one of 077, and Cassandra must read what it imports
        try:
            os.makedirs(into, exist_ok=True)
        finally:
            os.umask(mask)
        if not os.access(into, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        what = f"user id {os.geteuid()} cannot write to {quote(into)} ({error.strerror})"
        raise Usage(what, "choose another --into, or run as another user") from None


def check_target(top: str, placed: Sequence[Placed]) -> None:
    """Refuse a directory that holds anything but what an earlier run of this restore left. Raises Usage."""
    planned = {one.whole_path: one.entry.size for one in placed}
    is_staged = any(one.root == top for one in placed)
    for folder, folders, names in os.walk(top):
        names += [name for name in folders if os.path.islink(os.path.join(folder, name))]
        if folder == top and not is_staged:  # there these are keyspaces
            folders[:] = [name for name in folders if name not in ("snapshots", "backups")]
        for name in names:
            path = os.path.join(folder, name)
            info = os.lstat(path)
            if name.startswith(".cassbackup-"):
                os.unlink(path)  # of a run that was killed; perhaps another name of a file that it finished
            elif path == os.path.join(top, SCHEMA):
                continue  # what --schema-only has written there, to be loaded before the tables come
            elif not stat.S_ISREG(info.st_mode) or info.st_size != planned.get(path):
                hint = "use an empty directory, or repeat the restore that began there (--at its moment)"
                raise Usage(f"{quote(path)} is not of this restore", hint)


def check_space(placed: Sequence[Placed]) -> None:
    """Refuse to fill a disk. Raises Fault."""
    coming: dict[str, list[int]] = {}
    roots: dict[int, str] = {}  # a disk may have several
    for one in placed:
        if not os.path.lexists(one.whole_path):
            root = roots.setdefault(os.stat(one.root).st_dev, one.root)
            coming.setdefault(root, []).append(one.entry.size)
    for root, sizes in coming.items():
        count, size = len(sizes), sum(sizes)
        disk = os.statvfs(root)
        free = disk.f_bavail * disk.f_frsize
        is_full = disk.f_files > 0 and count > disk.f_favail  # some file systems count no inodes
        if size > free or is_full:
            what = f"{count} files of {size_text(size)} in all do not fit into {quote(root)}"
            raise Fault(what, f"it has room for {disk.f_favail} files and {size_text(free)}")


def receive_safely(bucket: Bucket, tops: Iterable[str], files: Sequence[Placed]) -> dict[str, str]:
    """Restore files; `tops` are directories that must hold nothing else. Keeps other restores out. Raises Busy."""
    with contextlib.ExitStack() as stack:
        for root in sorted({one.root for one in files}):
            fd = os.open(root, os.O_DIRECTORY)
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another restore writes to {quote(root)}", "wait for it") from None
        for top in tops:
            check_target(top, files)
        check_space(files)
        return receive_all(bucket, files)


# ------------------------------------------------------------------------------------------------------
# The command


def check_import(nodetool: Nodetool, tables: Sequence[tuple[str, str]]) -> None:
    """Refuse what Cassandra could not import: before 4.0 anything, later tables that it lacks."""
    version = nodetool.version()
    if version.startswith(("1.", "2.", "3.")):
        hint = "leave out --import and use sstableloader; or restore --in-place on a stopped node"
        raise Usage(f"Cassandra {version} cannot import SSTables, 4.0 is the first that can", hint)
    names = [".".join(table) for table in tables]
    try:
        nodetool("tablestats", *names)
    except Fault as fault:  # it names what it does not know
        hint = "create what is lacking; `cassbackup restore --schema-only` brings the schema"
        raise Missing(fault.what, hint) from None


def import_table(nodetool: Nodetool, into: str, table: tuple[str, str]) -> None:
    """Hand a staged table to Cassandra, and take away what it does not import: indexes, schema.cql."""
    staged = os.path.join(into, *table)
    nodetool("import", *table, staged)
    for name in os.listdir(staged):
        if name.endswith("-Data.db"):  # nodetool exits 0 for a path that it cannot parse
            raise Fault(f"nodetool import left {quote(name)} in {quote(staged)}", "see Cassandra's log")
    shutil.rmtree(staged)
    log.info("imported table=%s", quote(".".join(table)))


def restore_staged(bucket: Bucket, plan: Plan, options: RestoreOptions) -> dict[str, str]:
    """Restore to a directory, and import from there."""
    tables = sorted(one.called for one in plan.tables if one.sstables)
    nodetool = Nodetool(options.nodetool)
    if options.import_ and tables:
        check_import(nodetool, tables)
    make_target(plan.where)
    wrong = receive_safely(bucket, [plan.where], plan.files)
    if options.import_ and not wrong:
        work = functools.partial(import_table, nodetool, plan.where)
        list(spread(work, tables, 4))  # each is the start of a JVM, and little else
    return wrong


def write_new(path: str, body: bytes) -> None:
    """Write a file; an equal one is kept. Raises Conflict if there is another one."""
    temporary = os.path.join(os.path.dirname(path), ".cassbackup-new")
    write_file(temporary, body)
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
    os.unlink(temporary)
    with open(path, "rb") as file:
        if file.read() != body:
            raise Conflict(f"{quote(path)} has other content", "move it away, or choose another --into")


def restore_schema(bucket: Bucket, plan: Plan) -> dict[str, str]:
    """Write each table's schema.cql, and above them, as schema.cql, what DESCRIBE SCHEMA said."""
    body = described_schema(bucket.store, plan.node.name, plan.tables)
    if not body and not plan.files:
        raise Missing("the backup has no schema", "choose another snapshot")
    make_target(plan.where)
    if body:
        write_new(os.path.join(plan.where, SCHEMA), body)
    return receive_safely(bucket, [], plan.files)  # an earlier run may have staged the tables there


def _is_left_by_drop(path: str) -> bool:
    """Tell whether a table's directory is what a drop leaves of it; an empty one is a new table's."""
    names = set(os.listdir(path))
    return bool(names) and names <= {"snapshots", "backups"}


def check_table_ids(roots: Iterable[str], tables: Iterable[Chosen]) -> None:
    """Refuse tables that Cassandra has here under another id: it would not read their directories. Raises Usage."""
    called = {one.called: one for one in tables}
    there: dict[tuple[str, str], set[str]] = {}
    for root in roots:
        for place in tables_in(root):
            keyspace, directory = place.split("/")
            name, _ = table_id_of(directory)
            if (keyspace, name) in called and not _is_left_by_drop(f"{root}/{place}"):
                there.setdefault((keyspace, name), set()).add(directory)
    for which, directories in there.items():
        if called[which].table not in directories:
            hint = "make it again WITH ID (--schema-only tells how), or leave --in-place out and import it"
            ids = quote(", ".join(sorted(directories)))
            raise Usage(f"{called[which]} has another id here: {ids}", hint)


def restore_in_place(bucket: Bucket, plan: Plan, options: RestoreOptions) -> dict[str, str]:
    """Restore into the data directories of a stopped node, in which the tables are empty. Raises Usage."""
    pids = cassandra_pids()
    if pids:
        raise Usage(f"Cassandra is running (pid {' '.join(pids)})", "stop it first: it would not see these files")
    roots = {one.root for one in plan.files}
    # What lies in a data directory that gets no file is read by Cassandra all the same.
    roots.update(os.path.abspath(word.rpartition("=")[2]) for word in options.data_dir)
    with contextlib.suppress(Usage):
        live = set(data_directories())
        if not options.data_dir or roots & live:
            roots |= live
    if not any(one.keyspace == "system_schema" for one in plan.tables):  # with which the ids come back, too
        check_table_ids(roots, plan.tables)
    tops = []
    for root in sorted(roots):
        tops += [os.path.join(root, one.keyspace, one.table) for one in plan.tables]
    wrong = receive_safely(bucket, tops, plan.files)
    pids = cassandra_pids()
    if pids:
        what = f"Cassandra was started meanwhile (pid {' '.join(pids)}), and has seen a part of these files"
        raise Fault(what, "stop it, empty the directories of these tables, and restore again")
    return wrong


def advice(plan: Plan, options: RestoreOptions) -> str:
    """Say what is to be done next."""
    node = plan.node
    if options.in_place:
        lines = ["before the start, empty commitlog, hints and saved_caches: they would be replayed"]
        if options.new_node:
            tokens = "  num_tokens, initial_token, dc and rack: the old node's, which the bucket does not tell"
            if node.tokens:
                tokens = f"  num_tokens: {len(node.tokens)}\n  initial_token: {','.join(node.tokens)}"
            lines.append(f"in cassandra.yaml:\n{tokens}\n  auto_bootstrap: false")
            if node.dc:
                lines.append(f"in the snitch's file:\n  dc={node.dc}\n  rack={node.rack}")
        lines.append("then: cassbackup snapshot; until then a restore would begin where this one did")
        lines.append("restore that snapshot by --tag: --at and --latest may add older rows")
        return "\n".join(lines)
    lines = []
    if options.import_:
        lines.append("next: cassbackup snapshot; no backup has what was imported")
    for one in plan.tables:
        if one.sstables and not options.import_:
            staged = os.path.join(plan.where, *one.called)
            lines.append(quote(f"next: nodetool import {' '.join(one.called)} {staged}"))
    return "\n".join(lines)


def check_options(options: RestoreOptions) -> None:
    """Refuse options that do not fit together. Raises Usage."""
    ways = {"--tag": options.tag, "--at": options.at, "--latest": options.latest, "--archive": options.archive}
    given = [name for name, value in ways.items() if value]
    if not given:
        raise Usage("what is to be restored?", f"pass one of {', '.join(ways)}")
    if len(given) > 1:
        raise Usage(f"you passed {' and '.join(given)}", "pass one of them")
    modes = {"--in-place": options.in_place, "--import": options.import_, "--schema-only": options.schema_only}
    chosen = [name for name, value in modes.items() if value]
    if options.archive and (chosen or options.table):
        raise Usage("an archive has no tables", "pass --archive and --into alone; Cassandra takes its files from there")
    if len(chosen) > 1:
        raise Usage(f"you passed {' and '.join(chosen)}", "pass one of them")
    if options.in_place and options.same_node == options.new_node:
        hint = "a new node must not have the old one's identity"
        raise Usage("--in-place needs one of --same-node and --new-node", hint)
    if options.in_place and options.into:
        raise Usage("--into does not go with --in-place", "--data-dir says where the files go")
    if not options.in_place and (options.same_node or options.new_node or options.data_dir):
        raise Usage("--same-node, --new-node and --data-dir are for --in-place", "pass that too, or leave them out")


def restore(bucket: Bucket, options: RestoreOptions) -> Answer:
    """Bring back tables. Exit 1: something went wrong; 3: restored, but the backup itself lacks something."""
    check_options(options)
    [node] = choose_nodes(bucket, options)
    plan = make_plan(bucket, node, options, restore_directory(options.into))
    document, text = plan.document(), plan.text()
    refusal = plan.refusal(options.incomplete or options.schema_only)
    if refusal:
        log.error("nothing was restored: %s", refusal)
        return Answer(FAILED, {**document, "refused": refusal}, text)
    code = BEHIND if plan.lacking else DONE
    if options.dry_run:
        return Answer(code, document, text)
    for one in plan.tables:
        log.info("restoring table=%s sstables=%d from=%s", one, len(one.sstables), quote(one.why))
    for what in (*plan.lacking, *plan.notes):
        log.warning("%s", what)
    if options.schema_only:
        wrong = restore_schema(bucket, plan)
    elif options.in_place:
        wrong = restore_in_place(bucket, plan, options)
    else:
        wrong = restore_staged(bucket, plan, options)
    document["failed"] = wrong
    files, size = len(plan.files), size_text(plan.size)
    if wrong:
        failed = f"{len(wrong)} of {files} files were not restored: run it again"
        hint = "where that does not help, `cassbackup verify --deep --repair` marks what is bad, and then --incomplete"
        return Answer(FAILED, document, f"{failed}; {hint} leaves it out")
    done = f"restored {node.name} as of {plan.moment}: {files} files, {size}"
    return Answer(code, document, f"{done}\n{advice(plan, options)}".rstrip())


# ======================================================================================================
# Verify
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class VerifyOptions(NodeChoice):
    """What is verified: everything that the chosen nodes have listed, or only this."""

    tag: str = ""
    latest: bool = False
    table: tuple[str, ...] = ()
    deep: bool = False
    repair: bool = False


class Verification:
    """Compares the objects of a node with the listings that name them. It holds the listings of one table."""

    def __init__(self, bucket: Bucket, node: str, options: VerifyOptions) -> None:
        self._store, self._threads = bucket.store, bucket.threads
        self._node, self._options = node, options
        self._marked = read_bad_keys(self._store, node)
        self._is_meant = meaning_of(self._store, node, options.tag)
        self._findings: list[dict[str, Any]] = []  # what is bad, archived, or good though it is marked bad
        self._incomplete: list[str] = []  # what of --tag is not listed complete
        self._listings = self._objects = self._size = 0

    def run(self) -> dict[str, Any]:
        """Check all that is meant, a table at a time. Return what --json prints, {} where nothing is meant."""
        # Read before the listings: prune writes a record anew before it deletes a listing.
        recorded = {info.key: info for info in recorded_listings(self._store, self._node)}
        there = listings_of(self._store, self._node)
        for _, group in itertools.groupby(there, lambda info: info.unit.place):
            infos = list(group)
            for info in infos:
                recorded.pop(info.key, None)
            self._check_table(infos)
        still = {info.key for info in recorded_listings(self._store, self._node)} if recorded else set()
        for key, info in sorted(recorded.items()):
            if key in still and self._select([info]):
                self._listings += 1
                self._note(key, Finding("gone", "is gone, and prune did not delete it"), [info], False)
        if not self._listings:
            return {}
        return {
            "node": self._node,
            "objects": self._objects,
            "bytes": self._size,
            "bad": [one for one in self._findings if one["found"] not in ("good", "archived")],
            "needs_thaw": [one["key"] for one in self._findings if one["found"] == "archived"],
            "incomplete": self._incomplete,
            "marked": self._mark() if self._options.repair else "",
        }

    def _note(self, key: str, finding: Finding, users: Sequence[ListingInfo], on_disk: bool) -> None:
        spoils = sorted({label(info.unit) for info in users})
        self._findings.append({"key": key, **finding._asdict(), "spoils": spoils, "on_disk": on_disk})

    def _select(self, infos: Sequence[ListingInfo]) -> list[ListingInfo]:
        """Return the listings of a table that are meant; the latest are the newest snapshot, and what came since."""
        tag = self._options.tag
        infos = [info for info in infos if is_selected(info.unit, self._options.table)]
        snapshots = snapshots_of(infos)
        if tag:
            meant = [one for one in snapshots if self._is_meant(one)]
            self._incomplete += [label(one.unit) for one in meant[-1:] if not one.complete]
            return [info for one in meant for info in one.listings]
        if not self._options.latest:
            return infos
        lives = [one.unit.life for one in snapshots if one.complete and not is_automatic(one.unit)]
        newest = max((credible(life, self._store.now()) for life in lives), default="")
        began = utc(seconds_of(newest) - DAY_S) if newest else ""  # a restore adds what was flushed since it began
        taken = [info for info in infos if info.unit.life >= newest and info.unit.kind == "snapshot"]
        others = [info for info in infos if info.listed >= began and info.unit.kind != "snapshot"]
        return taken + others

    def _read(self, info: ListingInfo) -> Listing[Known] | Fault:
        try:
            return read_listing(self._store, self._node, info)
        except (Corrupt, Missing) as fault:
            return fault

    def _check(self, there: Mapping[str, ObjectInfo], entry: Known) -> Finding:
        # A mark may come from reading it whole (--deep): only another such reading may lift it.
        deep = self._options.deep or entry.key in self._marked
        try:
            info = there.get(entry.key)
            if info and info.archived:
                info = self._store.head(entry.key)  # only HEAD tells what S3 has thawed
            if info and info.archived and _compare(entry, info) == _GOOD:
                return Finding("archived", f"is in {info.archived}")
            return check_object(self._store, entry, info, deep)
        except Throttled:
            raise
        except (Denied, Unreachable) as fault:
            any(self._store.list(f"{self._node}.listings/owner"))  # raises where all of the store is away, or denied
            found = "denied" if isinstance(fault, Denied) else "failed"
            return Finding(found, f"cannot be read: {fault.what}")

    def _is_in_a_record(self, info: ListingInfo) -> bool:
        return info.key in {one.key for one in recorded_listings(self._store, self._node)}

    def _check_table(self, infos: Sequence[ListingInfo]) -> None:
        selected = self._select(infos)
        self._listings += len(selected)
        # Two listings that tell different things of one key cannot both be right, so each is checked.
        named: dict[tuple[str, int, str], tuple[Known, list[ListingInfo]]] = {}
        for info, listing in zip(selected, spread(self._read, selected, self._threads), strict=True):
            if isinstance(listing, Missing) and not self._is_in_a_record(info):
                continue  # prune has let it go since
            if isinstance(listing, Fault):
                self._note(info.key, Finding("unreadable", listing.what), [info], False)
                continue
            for entry in listing.files:
                content = (entry.key, entry.size, entry.crc32)
                _, users = named.setdefault(content, (entry, []))
                users.append(info)
        entries = [entry for entry, _ in named.values()]
        there = find_objects(self._store, [entry.key for entry in entries], self._threads)
        newest = max((one.newest.listed for one in snapshots_of(infos) if one.complete), default="")
        findings = spread(functools.partial(self._check, there), entries, self._threads)
        for (entry, users), finding in zip(named.values(), findings, strict=True):
            if finding.found == "absent" and not any(self._store.head(info.key) for info in users):
                continue  # prune has let it go since its listings were read
            self._objects += 1
            self._size += entry.size
            if finding != _GOOD or entry.key in self._marked:
                # What neither the newest snapshot names nor a later listing, compaction has deleted.
                self._note(entry.key, finding, users, any(info.listed >= newest for info in users))

    def _mark(self) -> str:
        """Write down what is bad, so that the daemon stores it again; return the key of that document.

        Where nothing is bad it is written all the same, for it tells when the node was verified; but not for --tag or
        --table, or where something cannot be read, which is no object that could be stored again.
        """
        at = utc(self._store.now())
        # Two listings may tell different things of one key. If it is not good by both, its mark stays.
        bad = {one["key"] for one in self._findings if one["found"] != "good"}
        marks = []
        for one in self._findings:
            is_lifted = one["found"] == "good" and one["key"] not in bad
            if is_lifted or one["found"] in ("absent", "size", "checksum", "failed"):
                marks.append({"key": one["key"], "found": one["found"], "at": at})
        unread = any(one["found"] in ("gone", "unreadable", "denied") for one in self._findings)
        if not marks and (unread or self._options.tag or self._options.table):
            return ""
        return put_dated(self._store, f"{self._node}.listings/bad", {"keys": marks})


def _verify_text(node: Mapping[str, Any], deep: bool) -> str:
    lines = []
    for one in node["bad"]:
        line = f"BAD {one['key']} {one['what']}"
        line += f"; it spoils {', '.join(one['spoils'])}"
        if not one["on_disk"]:
            line += "; the node has it no longer"
        lines.append(line)
    lines += [f"needs thaw: {key}" for key in node["needs_thaw"]]
    lines += [f"listed incomplete: {unit}" for unit in node["incomplete"]]
    how = "read whole" if deep else "by size and checksum"
    found = f"{node['objects']} objects, {size_text(node['bytes'])}, {how}"
    lines.append(f"{node['node']}: {found}: {len(node['bad'])} bad")
    if node["marked"] and node["bad"]:
        lines.append(f"marked in {node['marked']}: the daemon stores again what is bad when it next finds it")
    return "\n".join(lines)


def verify(bucket: Bucket, options: VerifyOptions) -> Answer:
    """Compare the bucket with its listings.

    Exit 1: something is bad; 3: something must be thawed first, a snapshot of --tag is incomplete, or a node has
    nothing of what was asked for.
    """
    if options.tag and options.latest:
        raise Usage("you passed --tag and --latest", "pass one of them")
    chosen = choose_nodes(bucket, options)
    check_tables(bucket.store, [node.name for node in chosen], options.table)
    pages = {node.name: Verification(bucket, node.name, options).run() for node in chosen}
    nodes = [page for page in pages.values() if page]
    empty = [name for name, page in pages.items() if not page]
    if not nodes:
        raise Missing("no listing matches", "`cassbackup list` shows what there is")
    code = DONE
    if empty or any(node["needs_thaw"] or node["incomplete"] for node in nodes):
        code = BEHIND
    if any(node["bad"] for node in nodes):
        code = FAILED
    lines = [_verify_text(node, options.deep) for node in nodes]
    lines += [f"{name}: no listing matches" for name in empty]
    return Answer(code, {"schema": 1, "bucket": bucket.store.url, "nodes": nodes, "empty": empty}, "\n".join(lines))


# ======================================================================================================
# Prune
# ======================================================================================================

_AUTOMATIC_S: Final = 14 * DAY_S  # snapshots that Cassandra took by itself, or that are incomplete
_SILENT_S: Final = 30 * DAY_S  # what nobody has listed since never will be; who is silent so long may be retired
_SKEW_S: Final = 3600.0  # the clocks of a store's machines may differ
_FILE_KEYS: Final = 100_000  # in one file below <node>.pending-delete/
_BATCH_KEYS: Final = 1000  # before so many go, a sweep looks once more


@dataclass(frozen=True, slots=True)
class PruneOptions(NodeChoice):
    """What stays of each table (durations in seconds), or what goes: a tag, or a node."""

    keep_last: int = 0
    keep_within: float = 0.0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    tag: str = ""
    retire: str = ""
    force: bool = False
    confirm: bool = False
    dry_run: bool = False


# What stays of a table --------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A snapshot of a table, and what decides whether it stays."""

    unit: Unit
    snapshot: Snapshot
    taken: float  # when Cassandra took it
    when: float  # when it was listed, by the younger of two clocks
    counts: bool  # complete, and not Cassandra's own: one of those of which the --keep options keep so many
    good: bool  # nothing that its listings, added up, name is marked bad
    end: float  # when it was complete
    objects: Sequence[tuple[str, int]] = ()  # key and size of all that its listings name


# Why a snapshot stays. From the oldest that stays for one of these on, every moment can be restored.
_NEWEST = "it is the newest good snapshot of the table"
_TELLS_EMPTIED = "a restore reaches across it, and nothing else tells that the table was emptied"
_WINDOW: Final = frozenset({_NEWEST, "--keep-last", "--keep-within", "--keep-daily"})


def _kept_by_options(ranked: Sequence[Candidate], options: PruneOptions, now: float) -> dict[Unit, str]:
    """Return what the --keep options keep of these, the newest first, and which of them does."""
    kept = {one.unit: "--keep-last" for one in ranked[: options.keep_last]}
    for one in ranked:
        if now - one.when <= options.keep_within:
            kept.setdefault(one.unit, "--keep-within")
    periods = (
        ("--keep-daily", options.keep_daily, "%Y%m%d"),
        ("--keep-weekly", options.keep_weekly, "%G%V"),
        ("--keep-monthly", options.keep_monthly, "%Y%m"),
    )
    for why, count, period in periods:
        newest: dict[str, Unit] = {}
        for one in ranked:
            moment = datetime.fromtimestamp(one.taken, timezone.utc)
            newest.setdefault(moment.strftime(period), one.unit)
        for unit in itertools.islice(newest.values(), count):
            kept.setdefault(unit, why)
    return kept


def tells_emptied(unit: Unit, oldest: float) -> bool:
    """Tell whether a restore from the oldest kept snapshot needs this one of Cassandra's, or rows would be back.

    That a table was truncated or dropped is told by nothing else. And a restore reaches back before its snapshot.
    """
    emptied = emptied_at(unit)
    return emptied > 0 and emptied >= oldest - DAY_S


def kept_snapshots(found: Sequence[Candidate], options: PruneOptions, now: float) -> dict[Unit, str]:
    """Return which snapshots of a table stay, and why; what is not among them goes.

    Rank and period go by when Cassandra took a snapshot; whether it is old enough to go, by when it was listed.
    """
    dated = [one for one in found if max(one.taken, one.when) <= now + DAY_S]
    ranked = [one for one in dated if one.counts]
    ranked.sort(key=lambda one: one.taken, reverse=True)
    good = [one for one in ranked if one.good]
    if not good:
        return {one.unit: "the table has no good snapshot" for one in found}
    kept = {good[0].unit: _NEWEST}
    # A mark makes nothing expire: a bad snapshot stays where it would have stayed, and takes no place of a good one.
    for places in (good, ranked):
        for unit, why in _kept_by_options(places, options, now).items():
            kept.setdefault(unit, why)
    oldest = min(one.end for one in ranked if one.unit in kept)
    for one in found:
        if one not in dated:
            kept[one.unit] = "it is dated after today"
        elif not one.counts and now - one.when <= (options.keep_within or _AUTOMATIC_S):
            kept[one.unit] = "incomplete, or Cassandra's own; too young to go"
        elif tells_emptied(one.unit, oldest):
            kept[one.unit] = _TELLS_EMPTIED
    return kept


def kept_but_tag(
    found: Sequence[Candidate], options: PruneOptions, means: Callable[[Snapshot], bool]
) -> dict[Unit, str]:
    """Return which snapshots of a table stay when --tag goes, and why; "" where the tag does not mean them."""
    kept = {one.unit: "" for one in found if not means(one.snapshot)}
    if options.force:
        return kept
    good = [one for one in found if one.counts and one.good]
    if good:
        newest = max(good, key=lambda one: one.taken)
        kept.setdefault(newest.unit, f"{_NEWEST}: only --force lets it go")
    # Where no snapshot stays, a restore begins with nothing and takes every incremental.
    oldest = min((one.end for one in found if one.counts and one.unit in kept), default=0.0)
    for one in found:
        if tells_emptied(one.unit, oldest):
            kept.setdefault(one.unit, f"{_TELLS_EMPTIED}: only --force lets it go")
    return kept


def window_of(found: Sequence[Candidate], kept: Mapping[Unit, str]) -> float:
    """Return when the snapshot ended from which on every moment can be restored; 0.0 where there is none."""
    return min((one.end for one in found if kept.get(one.unit) in _WINDOW), default=0.0)


# What goes of a node ----------------------------------------------------------------------------------


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield so many items at a time."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


# What a key is to a run of prune. An object may be of several of these.
_EXPIRES: Final = "listing, or another document, that goes"
_REMAINS: Final = "listing that stays"
_NAMED: Final = "object that a listing names which stays"
_GOES: Final = "object that is to be marked"
_MARKED: Final = "object that is marked already"
_DELETED: Final = "object that is deleted already, and marked for one more day"


class KeySets:
    """Sets of keys in a temporary file: a node may have ten million objects, and memory is Cassandra's.

    SQLite holds 2 MiB of it in memory. The file has no name, and ends with the process. It lies in SQLITE_TMPDIR, in
    /var/tmp or in /tmp, and has 160 bytes for each key.
    """

    def __init__(self) -> None:
        # A plan is dropped wherever prune ends, and garbage collection runs in any thread.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._db.close)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE keys (what, key, size, PRIMARY KEY (what, key)) WITHOUT ROWID")
        self._db.execute("BEGIN")  # and never a COMMIT: nobody will read this file

    def add(self, what: str, objects: Iterable[tuple[str, int]]) -> None:
        """Add keys, with the sizes of their objects, to a set."""
        # In a bucket that is a directory, somebody's file may have a name that is no UTF-8: as bytes it is one.
        rows = ((what, key.encode("utf-8", "surrogateescape"), size) for key, size in objects)
        self._db.executemany("INSERT OR IGNORE INTO keys VALUES (?, ?, ?)", rows)

    def has(self, what: str, key: str) -> bool:
        """Tell whether a key is in a set."""
        row = (what, key.encode("utf-8", "surrogateescape"))
        return self._db.execute("SELECT 1 FROM keys WHERE what = ? AND key = ?", row).fetchone() is not None

    def each(self, what: str) -> Iterator[str]:
        """Yield the keys of a set in their order."""
        for (key,) in self._db.execute("SELECT key FROM keys WHERE what = ? ORDER BY key", (what,)):
            yield key.decode("utf-8", "surrogateescape")

    def count(self, what: str) -> int:
        """Return how many keys a set has."""
        return int(self._db.execute("SELECT count(*) FROM keys WHERE what = ?", (what,)).fetchone()[0])

    def size(self, what: str) -> int:
        """Return how many bytes the objects of a set have."""
        return int(self._db.execute("SELECT total(size) FROM keys WHERE what = ?", (what,)).fetchone()[0])

    def subtract(self, what: str, other: str) -> None:
        """Take out of a set what another one has."""
        in_other = "EXISTS (SELECT 1 FROM keys WHERE what = ? AND key = mine.key)"
        self._db.execute(f"DELETE FROM keys AS mine WHERE what = ? AND {in_other}", (what, other))


class Pruning:
    """Lets go what is not kept of one node, without a lock: `plan` reads and decides, `confirm` does it.

    Objects are marked by one run and deleted by another, a day later. A daemon lists no object that is marked, and
    what it lists it has asked for within the hour before. So whatever stops a run, nothing that a listing names goes.
    """

    def __init__(self, bucket: Bucket, node: str, options: PruneOptions) -> None:
        self._store, self._threads = bucket.store, bucket.threads
        self.node, self._options = node, options
        self._is_meant = meaning_of(self._store, node, options.tag)
        self.snapshots: list[dict[str, Any]] = []  # what becomes of each
        self.tags = set[str]()  # of all snapshots
        self.doubts: list[str] = []  # why nothing is deleted without --force
        self.refused: dict[str, str] = {}  # what the store would not delete, and why
        self._deleted = 0
        self._keys = KeySets()
        self._due: list[str] = []  # files of marks that are a day old: each is the name of a set, too
        self._records: list[tuple[str, dict[str, Any]]] = []  # tag records to be written anew: folder, document
        self._obsolete: list[str] = []  # tag records, and what else tells of listings, that go
        self._pruned_documents = [info.key for info in self._list(".listings/pruned/")]
        self._was_cut = pruned_until(self._store, node)  # what they tell
        self._pruned_until = dict(self._was_cut)  # with what goes of backups/ now
        self._began = 0.0  # the listings are read from then on
        self._listed_since = set[str]()  # listings that came after the plan was made
        self._last_look = -math.inf

    def _list(self, folder: str) -> Iterator[ObjectInfo]:
        return self._store.list(self.node + folder)

    # Deciding

    def plan(self) -> None:
        """Decide what goes. Raises Corrupt for whatever cannot be read; of a node that is retired, Usage, Missing."""
        self._read_marks()
        self._began = self._store.now()
        if self._options.retire:
            self._plan_retirement()
        else:
            self._plan_listings()
        self._keys.subtract(_GOES, _MARKED)
        if not self._options.retire:
            going = self._keys.count(_GOES)
            self._doubt_half(going, going + self._keys.count(_NAMED), f"objects of {self.node}")

    def _read_marks(self) -> None:
        for info, document in read_documents(self._store, f"{self.node}.pending-delete/"):
            keys = [(key, 0) for key in pending_keys(self.node, info.key, document)]
            self._keys.add(_MARKED, keys)
            if document.get("deleted"):
                self._keys.add(_DELETED, keys)
            if self._store.now() - info.modified < DAY_S:
                continue
            if document.get("deleted"):
                self._expire(info.key)
            else:
                self._keys.add(info.key, keys)
                self._due.append(info.key)

    def _expire(self, *keys: str) -> None:
        self._keys.add(_EXPIRES, ((key, 0) for key in keys))

    def _plan_retirement(self) -> None:
        """Let everything of the node go, if nothing was heard of it for 30 days."""
        heard = 0.0
        # Verify and prune write these, wherever they run.
        others = tuple(f"{self.node}.listings/{name}/" for name in ("bad", "pruned", "tags"))
        for what, folder in ((_EXPIRES, ".listings/"), (_GOES, "/")):
            for info in self._list(folder):
                if not info.key.startswith(others):
                    heard = max(heard, info.modified)
                self._keys.add(what, [(info.key, info.size)])
        if self._began - heard < _SILENT_S:
            what = f"{self.node} was heard of at {utc(heard)}"
            raise Usage(what, "a node is retired when it has been silent for 30 days; stop its daemon")
        if not heard and not self._keys.count(_MARKED):
            what = f"no node {self.node!r} in {self._store.url}"
            raise Missing(what, f"the full name is needed here; there are {some_of(node_names(self._store))}")

    def _plan_listings(self) -> None:
        """Decide what goes, a table at a time."""
        # Read before the listings: what one of these names, and is no listing then, is gone.
        tags = {info.key for info in self._list(".listings/tags/")}
        records = tag_records(self._store, self.node)
        doubles = sorted(tags - records.keys())  # a prune that died, or another one at once, has written it anew
        self._obsolete += doubles
        marks = list(read_documents(self._store, f"{self.node}.listings/bad/"))
        bad = read_bad_keys(self._store, self.node)
        there = listings_of(self._store, self.node, strict=True)
        for _, group in itertools.groupby(there, lambda info: info.unit.place):
            self._plan_table(list(group), bad)
        oldest = min((one["taken"] for one in self.snapshots if one["stays"]), default="")
        for key, record in records.items():
            is_double = any(one.startswith(f"{key.rpartition('/')[0]}/") for one in doubles)
            self._plan_record(key, record, "" if self._options.tag else oldest, is_double)
        if not self._options.tag:
            self._plan_rest(oldest)
        self._plan_marks(marks)
        self._keys.subtract(_GOES, _NAMED)

    def _plan_table(self, infos: Sequence[ListingInfo], bad: frozenset[str]) -> None:
        found = list(self._candidates(infos, bad))
        if self._options.tag:
            kept = kept_but_tag(found, self._options, self._is_meant)
        else:
            kept = kept_snapshots(found, self._options, self._began)
        for one in found:
            self._note(one.unit in kept, one.snapshot.listings, one.objects)
        window = window_of(found, kept)
        others = [info for info in infos if info.unit.kind != "snapshot"]
        read = functools.partial(read_listing, self._store, self.node)
        for info, listing in zip(others, spread(read, others, self._threads), strict=True):
            objects = [(entry.key, entry.size) for entry in listing.files]
            stays = self._stays(info, window)
            self._note(stays, [info], objects)
            if not stays and info.unit.kind == "incremental":
                self._pruned_until[info.unit.place] = max(window, self._pruned_until.get(info.unit.place, 0.0))
        self._tell(found, kept)

    def _note(self, stays: bool, listings: Iterable[ListingInfo], objects: Iterable[tuple[str, int]]) -> None:
        self._keys.add(_REMAINS if stays else _EXPIRES, ((info.key, 0) for info in listings))
        self._keys.add(_NAMED if stays else _GOES, objects)

    def _candidates(self, infos: Sequence[ListingInfo], bad: frozenset[str]) -> Iterator[Candidate]:
        def read(snapshot: Snapshot) -> list[Listing[Known]]:
            return [read_listing(self._store, self.node, info) for info in snapshot.listings]

        snapshots = snapshots_of(infos)
        objects: dict[str, tuple[str, int]] = {}  # what many snapshots name is in memory once
        for snapshot, listings in zip(snapshots, spread(read, snapshots, self._threads), strict=True):
            named = []
            for entry in itertools.chain(*(listing.files for listing in listings)):
                pair = (entry.key, entry.size)
                named.append(objects.setdefault(entry.key, pair))
            newest = listings[-1]
            whole = cast(Listing[Known], add_up(listings))  # what a restore of it would want
            yield Candidate(
                unit=snapshot.unit,
                snapshot=snapshot,
                taken=seconds_of(newest.taken),
                when=snapshot.newest.when,
                counts=snapshot.complete and not is_automatic(snapshot.unit),
                good=bad.isdisjoint(entry.key for entry in whole.files),
                end=end_of(whole),
                objects=named,
            )

    def _stays(self, info: ListingInfo, window: float) -> bool:
        if info.unit.kind == "incremental":
            return info.when >= window - DAY_S - _SLACK_S  # when a snapshot began its manifest tells; no day before
        within = self._options.keep_within  # an archive goes by nothing else
        return not within or self._began - info.when <= within

    def _tell(self, found: Sequence[Candidate], kept: Mapping[Unit, str]) -> None:
        self.tags.update(one.unit.tag for one in found)
        for one in found:
            stays = one.unit in kept
            if stays:
                why = kept[one.unit]
            elif self._options.tag:
                why = "--tag"
            elif one.counts:
                why = "no --keep option keeps it"
            else:
                why = "it is incomplete or Cassandra's own, and old"
            if why:
                unit, taken = one.unit, utc(one.taken)
                told = {"table": unit.place, "tag": unit.tag, "life": unit.life, "taken": taken}
                self.snapshots.append({**told, "stays": stays, "why": why})
        counted = [one.unit for one in found if one.counts]
        going = [unit for unit in counted if unit not in kept]
        # Of two, one at most goes, the last good one stays; so no more than half of those of a node go either.
        if len(counted) >= 3:
            what = f"complete snapshots of {counted[0].place} of {self.node}"
            self._doubt_half(len(going), len(counted), what)

    def _doubt_half(self, going: int, there: int, what: str) -> None:
        if 2 * going > there and not self._options.force:
            self.doubts.append(f"{going} of {there} {what} would go")

    def _plan_record(self, key: str, record: dict[str, Any], oldest: str, is_double: bool) -> None:
        """Have a tag record of which some listings go written anew, and let one go that names none which stays.

        What it names, and somebody else has deleted, nothing else tells of: that stays until it is older than `oldest`.
        """
        listings: list[str] = record["listings"]
        expired = [one for one in listings if self._keys.has(_EXPIRES, one)]
        left = [one for one in listings if one not in expired]
        if record["taken"] < oldest and not any(self._keys.has(_REMAINS, one) for one in left):
            left = []
        if expired or is_double or not left:
            self._obsolete.append(key)
        if left and (expired or is_double):
            anew = {**record, "listings": left, "pruned": record["pruned"] + expired}
            self._records.append((key.rpartition("/")[0], anew))

    def _plan_rest(self, oldest: str) -> None:
        """Let go objects that no listing ever named, and documents that tell of nothing any more."""
        old = (info for info in self._list("/") if self._began - info.modified > _SILENT_S)
        self._keys.add(_GOES, ((info.key, info.size) for info in old))
        beats = [info.key for info in self._list(".listings/heartbeat/") if utc(info.modified) < oldest]
        nodes = [info.key for info in self._list(".listings/node.")]
        self._expire(*beats, *nodes[:-1])

    def _plan_marks(self, marks: Sequence[tuple[ObjectInfo, dict[str, Any]]]) -> None:
        """Let go the oldest of what verify has written, up to the first that still tells of a bad object."""
        decided = set[str]()  # what a later one tells of
        first = len(marks) - 1  # the newest tells when the node was verified
        for number in range(len(marks) - 1, -1, -1):
            found = {mark["key"]: mark["found"] for mark in marks[number][1]["keys"]}
            for key in found.keys() - decided:
                if found[key] != "good" and self._keys.has(_NAMED, key):
                    first = number
            decided |= found.keys()
        self._expire(*(info.key for info, _ in marks[: max(first, 0)]))

    # Doing

    def confirm(self) -> None:
        """Mark objects, delete listings, and delete what was marked a day ago."""
        for keys in in_batches(self._keys.each(_GOES), _FILE_KEYS):
            put_dated(self._store, f"{self.node}.pending-delete", {"keys": keys, "deleted": False})
        for folder, record in self._records:
            put_dated(self._store, folder, record)
        if self._pruned_until != self._was_cut:
            self._obsolete += self._pruned_documents
            put_dated(self._store, f"{self.node}.listings/pruned", {"tables": self._pruned_until})
        # Before the listings: a record that names a listing which is gone is for somebody else's deletions.
        for keys in in_batches(self._obsolete, _BATCH_KEYS):
            self._delete(keys)
        for keys in in_batches(self._keys.each(_EXPIRES), _BATCH_KEYS):
            self._delete(keys)
        if any(map(parse_listing_name, self.refused)):
            return  # a listing that stays names what would be deleted; no other document does
        for file in self._due:
            self._sweep(file)

    def _sweep(self, file: str) -> None:
        """Delete what was marked a day ago and no listing names, then the marks.

        A daemon may have asked for such an object a moment before it went. So its mark stays one more day.
        """
        gone: list[str] = []
        refused_before = len(self.refused)
        for batch in in_batches(self._keys.each(file), _BATCH_KEYS):
            if not self._store.head(file):
                return  # another prune has deleted these, and a daemon may use the keys again
            self._read_new_listings()
            # A mark that the store would not delete is met again at each run, and its objects are gone.
            keys = [key for key in batch if not self._keys.has(_NAMED, key) and not self._keys.has(_DELETED, key)]
            self._deleted += self._delete(keys)
            gone += keys
        if len(self.refused) > refused_before:
            return
        if gone:
            put_dated(self._store, f"{self.node}.pending-delete", {"keys": gone, "deleted": True})
        self._delete([file])

    def _read_new_listings(self) -> None:
        """Read the listings that came since the others were read: what they name stays. One LIST serves a minute."""
        if self._store.now() - self._last_look < 60:
            return
        self._last_look = self._store.now()
        for info in listings_of(self._store, self.node, strict=True):
            if info.when >= self._began - _SKEW_S and info.key not in self._listed_since:
                self._listed_since.add(info.key)
                named = read_listing(self._store, self.node, info).files
                self._keys.add(_NAMED, ((entry.key, entry.size) for entry in named))

    def _delete(self, keys: Sequence[str]) -> int:
        reasons = spread(self._why_it_stays, keys, self._threads)
        refused = {key: why for key, why in zip(keys, reasons, strict=True) if why}
        self.refused.update(refused)
        return len(keys) - len(refused)

    def _why_it_stays(self, key: str) -> str:
        """Delete an object. Return why it is still there, if it is."""
        try:
            self._store.delete(key)
        except (Conflict, Denied) as fault:
            return fault.what
        return ""

    def document(self) -> dict[str, Any]:
        """Return what goes and what stays, as --json prints it."""
        return {
            "node": self.node,
            "snapshots": self.snapshots,
            "listings": self._keys.count(_EXPIRES),
            "objects": self._keys.count(_GOES),
            "bytes": self._keys.size(_GOES),
            "deleted": self._deleted,
            "refused": self.refused,
            "doubts": self.doubts,
        }


def _prune_text(node: Mapping[str, Any], confirmed: bool) -> str:
    """Return what becomes of a node's snapshots, those of a tag and a day on one line."""
    tables: Counter[tuple[str, str, str]] = Counter()
    for one in sorted(node["snapshots"], key=lambda one: one["taken"]):
        day = one["taken"][:8]
        verdict = "stays: " if one["stays"] else "goes: "
        tables[day, one["tag"], verdict + one["why"]] += 1
    rows = [(day, tag, count, why) for (day, tag, why), count in tables.items()]
    objects = f"{node['objects']} objects, {size_text(node['bytes'])}"
    documents = f"{node['node']}: {node['listings']} listings, also of backups/, and heartbeats"
    text = f"{documents}; {objects}: would go"
    if confirmed:
        text = f"{documents}: deleted; {objects}: marked"
        text += f"; {node['deleted']} objects deleted that were marked a day ago"
    if rows:
        text += "\n" + columns([("taken", "tag", "tables", ""), *rows], "  ")
    for key, why in node["refused"].items():
        text += f"\n  the store would not delete {key}: {why}"
    return text


def _prune_nodes(bucket: Bucket, names: Sequence[str], options: PruneOptions) -> Answer:
    plans = [Pruning(bucket, name, options) for name in names]
    # All are planned before anything is deleted: any doubt about one node, and nothing goes of any.
    for plan in plans:
        plan.plan()
    if options.tag and not any(plan.snapshots for plan in plans):
        tags = sorted(set[str]().union(*(plan.tags for plan in plans)))
        raise Missing(f"no snapshot is called {options.tag!r}", f"there are {some_of(tags)}")
    doubts = [doubt for plan in plans for doubt in plan.doubts]
    confirmed = options.confirm and not options.dry_run and not doubts
    if confirmed:
        for plan in plans:
            plan.confirm()
    nodes = [plan.document() for plan in plans]
    lines = [_prune_text(node, confirmed) for node in nodes]
    if doubts:
        lines += [*doubts[:20], "nothing was deleted; if that is meant, pass --force"]
    elif confirmed:
        lines.append("what is marked is deleted by the first prune that runs a day later")
    else:
        what = "leave out --dry-run" if options.confirm else "pass --confirm"
        lines.append(f"nothing was deleted; {what} to do it")
    code = FAILED if doubts or any(plan.refused for plan in plans) else DONE
    if options.tag and any(one["stays"] for node in nodes for one in node["snapshots"]):
        code = FAILED
    document = {"schema": 1, "bucket": bucket.store.url, "confirmed": confirmed, "nodes": nodes}
    return Answer(code, document, "\n".join(lines))


def prune(bucket: Bucket, options: PruneOptions) -> Answer:
    """Delete what is not kept; without --confirm, only say what would go. Exit 1: a doubt, or something stayed."""
    counts = (options.keep_last, options.keep_daily, options.keep_weekly, options.keep_monthly)
    keeps = any(counts) or options.keep_within > 0
    asked = [keeps, options.tag != "", options.retire != ""]
    if asked.count(True) > 1:
        raise Usage("you passed two of --keep-..., --tag and --retire", "each is a prune of its own: pass one of them")
    if not any(asked):
        hint = "pass --keep-last (at least 1), -within, -daily, -weekly or -monthly; or else --tag, or --retire"
        raise Usage("say what to keep", hint)
    if options.retire:
        names = [check_node_name(options.retire)]
    else:
        names = [node.name for node in choose_nodes(bucket, options)]
    try:
        return _prune_nodes(bucket, names, options)
    except sqlite3.Error as error:
        raise Fault(f"the temporary file failed ({error})", "free some of /var/tmp, or set SQLITE_TMPDIR") from None


# ======================================================================================================
# Doctor
# ======================================================================================================


@dataclass(frozen=True, slots=True)
class DoctorOptions(BucketOptions):
    """What is checked."""

    paths: tuple[str, ...] = ()
    pin_dir: str = ""
    nodetool: str = "nodetool"
    metrics_listen: str = ""
    filters: Filters = field(default_factory=Filters)
    problems: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # settings that are no defaults, and where each stands


# Each check returns what is well, or raises a Fault: what is wrong, and the cure.


def _check_user(options: DoctorOptions) -> str:
    # Only the owner of a file may link it (fs.protected_hardlinks). As root we go on as the daemon does.
    for root in data_directories(options.paths):
        me, info = os.geteuid(), os.stat(root)
        if me not in (0, info.st_uid):
            cure = f"sudo -u '#{info.st_uid}' cassbackup doctor"
            raise Fault(f"{quote(root)} belongs to user {info.st_uid}, this is user {me}", cure)
        if me == 0:
            os.setegid(info.st_gid)
            os.seteuid(info.st_uid)
    return f"user {os.geteuid()} owns the data"


def _check_data(options: DoctorOptions) -> str:
    roots = data_directories(options.paths)
    named = {os.path.realpath(path) for path in roots}
    with contextlib.suppress(Usage):
        for path in configured_directories():
            if os.path.realpath(path) not in named:
                raise Fault(f"{quote(path)} of cassandra.yaml is not backed up", "name it as a PATH, too")
    names = set[str]()
    count = 0
    for root in roots:
        tables = list(tables_in(root))
        if not tables and options.filters.is_archive(root, roots):
            continue
        if not tables:
            where = f"{root}/data" if "data" in os.listdir(root) else "the directory above the keyspaces"
            raise Fault(f"{quote(root)} has no tables", f"name {where}")
        count += len(tables)
        for place in tables:
            keyspace, table = place.split("/")
            for one in (f"{root}/{keyspace}", f"{root}/{place}"):
                if os.path.islink(one):
                    raise Fault(f"{quote(one)} is a link, and links are not followed", "name its target as a PATH, too")
            names |= {keyspace, f"{keyspace}.{table_id_of(table)[0]}"}
    unmatched = ", ".join(options.filters.unmatched(names))
    if unmatched:
        raise Fault(f"no table fits {unmatched}", "one name or glob for each option; in a file, blanks between")
    return f"{count} tables"


def _check_link(options: DoctorOptions) -> str:
    pins = []
    for root in data_directories(options.paths):
        problems = []
        for path in PinDirectory(root, options.pin_dir).candidates():
            there = path
            while not os.path.exists(there):
                there = os.path.dirname(there)
            try:
                _prove_link(os.path.realpath(root), there)
            except OSError as error:
                problems.append(f"{quote(path)} ({error.strerror})")
            else:
                pins.append(quote(path))
                break
        else:
            cure = "run as the owner of the data, with the pins on its mount (each ReadWritePaths= is one): --pin-dir"
            raise Fault(f"no link can be made from {quote(root)} into {', '.join(problems)}", cure)
    return f"pins into {', '.join(pins)}"


def _check_inotify(options: DoctorOptions) -> str:
    inotify = Inotify()
    if inotify.fd < 0:
        raise Fault("this user has no inotify instance left", "sysctl fs.inotify.max_user_instances=1024")
    os.close(inotify.fd)
    needed = 0
    for root in data_directories(options.paths):
        for below in ("*", "*/*", "*/*/*", "*/*/snapshots/*"):
            needed += len(glob.glob(f"{glob.escape(root)}/{below}/"))
    with open("/proc/sys/fs/inotify/max_user_watches") as file:
        watches = int(file.read())
    if needed > 0.8 * watches:
        cure = f"sysctl fs.inotify.max_user_watches={max(1 << 20, 4 * needed)}, and a line in /etc/sysctl.d"
        raise Fault(f"{needed} directories, and only {watches} watches", cure)
    return f"{needed} directories, max_user_watches {watches}"


def _check_settings(options: DoctorOptions) -> str:
    if options.problems:
        raise Fault("; ".join(options.problems), "correct it, then restart cassbackup")
    return ", ".join(options.origins) or "all are defaults"


def _check_cloud(options: DoctorOptions) -> str:
    cloud, node = detect_cloud(options.environ), open_bucket(options, new=True).here
    where = "neither AWS nor Google Cloud"
    if cloud:
        where = f"{cloud.scheme} {cloud.region} {cloud.instance}"
    return f"{where}; this node is {node}"


def _check_bucket(options: DoctorOptions) -> str:
    if not options.bucket:  # a command takes the one that the node last stored in, the daemon does not
        raise Usage("no bucket", "set BUCKET_NAME in /etc/default/cassbackup, or pass --bucket")
    # Each right is used once, on one key that is always the same: nothing piles up where it cannot be deleted.
    bucket = open_bucket(options, 5.0, new=True)
    store, key = bucket.store, f"{bucket.here}.doctor"
    store.look_no_more()  # else HEAD says that the key is taken, also to who may not put
    problems, cures = list[str](), dict[str, bool]()
    rights: dict[str, Callable[[], object]] = {
        "put": lambda: store.put(key, Body(b"cassbackup doctor\n")),
        "head": lambda: store.head(key),
        "get": lambda: list(store.get(key)),
        "list": lambda: any(store.list(f"{bucket.here}.listings/owner")),
    }
    for right, use in rights.items():
        try:
            use()
        except (Conflict, Missing):  # only who has the right is told that
            continue
        except (Denied, Unreachable) as fault:
            problems.append(f"{right}: {fault.what}")
            cures[fault.hint] = True
    if problems:
        with contextlib.suppress(Fault):  # what was refused after it had arrived would pass for good the next time
            store.delete(key)
        raise Fault("; ".join(problems), "; ".join(cures))
    kept = "may delete"
    try:
        store.delete(key)
    except (Conflict, Denied):
        kept = "may not delete, which is good for a daemon"
    ahead = abs(time.time() - store.now())
    if ahead > 60:
        raise Fault(
            f"this clock is {ahead:.0f} s from the store's", "have chrony set it: S3 refuses what is 15 min off"
        )
    if machine_id():
        owner = newest_document(store, f"{bucket.here}.listings/owner.")
        check_owner(owner, machine_id(), f"{bucket.here} in {store.url}")
    return f"{store.url}: put, head, get, list; {kept}"


def _check_incrementals(options: DoctorOptions) -> str:
    if not Nodetool(options.nodetool, 10.0).incremental_backup():
        cure = "nodetool enablebackup, and incremental_backups: true in cassandra.yaml; else only snapshots protect"
        raise Fault("incremental backups are off", cure)
    return "on"


def _check_timers(_: DoctorOptions) -> str:
    for timer in ("cassbackup-snapshot.timer", "cassbackup-prune.timer"):
        asked = ["systemctl", "is-enabled", timer]
        if subprocess.run(asked, check=False, capture_output=True, timeout=10.0).returncode:
            raise Fault(f"{timer} is not enabled", f"systemctl enable --now {timer}, or run that by a cron of yours")
    return "snapshots and prune are enabled"


def _check_metrics(options: DoctorOptions) -> str:
    if not options.metrics_listen:
        return "--metrics-listen is not set"
    host, port = options.metrics_listen.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), 2.0).close()
    except OSError as error:
        raise Fault(f"{options.metrics_listen} does not answer ({error})", "start cassbackup; see its log") from None
    return f"{options.metrics_listen} answers"


# A node without the last three is backed up all the same.
_CHECKS: Final[Mapping[str, Callable[[DoctorOptions], str]]] = {
    "user": _check_user,
    "data": _check_data,
    "link": _check_link,
    "inotify": _check_inotify,
    "settings": _check_settings,
    "cloud": _check_cloud,
    "bucket": _check_bucket,
    "incrementals": _check_incrementals,
    "timers": _check_timers,
    "metrics": _check_metrics,
}
_WARNINGS: Final = ("incrementals", "timers", "metrics")


def doctor(options: DoctorOptions) -> Answer:
    """Check the set-up, and say how to fix it. Exit 3 where anything is bad; a warning is none."""
    checks = []
    for name, check in _CHECKS.items():
        result, detail, cure = "ok", "", ""
        try:
            detail = check(options)
        except Exception as error:
            log.debug("check failed name=%s", name, exc_info=True)
            result = "warning" if name in _WARNINGS else "bad"
            detail = error.what if isinstance(error, Fault) else str(error)
            cure = getattr(error, "hint", "") or "correct that first"
        checks.append({"name": name, "result": result, "detail": detail, "cure": cure})
    rows = [[one["name"], one["result"], one["detail"]] for one in checks]
    lines = columns(rows).splitlines()
    text = ""
    for line, one in zip(lines, checks, strict=True):
        text += line + "\n"
        if one["cure"]:
            text += f"    {one['cure']}\n"
    is_bad = any(one["result"] == "bad" for one in checks)
    return Answer(BEHIND if is_bad else DONE, {"checks": checks}, text.rstrip("\n"))


# ======================================================================================================
# Report
# ======================================================================================================

_GREEN_S: Final = 900.0  # as `status --max-lag`
_YELLOW_S: Final = 26 * 3600.0  # as `status --max-age`
_BEAT_GAP_S: Final = 3 * 900.0  # a daemon says every quarter of an hour that it lives
_FLUSH_GAP_S: Final = 3 * 3600.0  # Cassandra flushes its own tables every hour (SystemKeyspace)
_COLUMNS: Final = 240  # of a lane
_LANES: Final = 5000  # tables that are drawn; where there are more, the worst ones of each node
_PAGE: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>cassbackup report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/><style>
:root {{color-scheme: light dark}} body {{margin: 32px auto; width: 94%; font: 14px/1.5 sans-serif}}
h1 {{font-size: 20px}} summary {{cursor: pointer; margin-top: 8px; font-weight: bold}}
summary span::before {{content: "\\25B8\\00A0"}} [open] summary span::before {{content: "\\25BE\\00A0"}}
.lane {{display: grid; grid-template-columns: 28% auto 7em; gap: 12px; align-items: center}}
span {{overflow: hidden; text-overflow: ellipsis; white-space: nowrap}} div span {{padding-left: 2em}}
svg {{width: 100%; height: 14px; fill: currentColor; shape-rendering: crispEdges}} text {{font-size: 12px}}
i {{display: inline-block; width: 14px; height: 14px; margin: 0 6px 0 16px; background: currentColor}}
.ok {{color: #2f8f6b}} .late {{color: #e8bd4f}} .old {{color: #d9643f}} .none {{color: #8f2740}}
@media (prefers-color-scheme: dark) {{.none {{color: #ff5c8a}}}}
</style></head><body><h1>{title}</h1><p>{about}</p>
<div class="lane"><span></span><svg><text y="11">{begin}</text><text y="11" x="50%" text-anchor="middle">{middle}</text>
<text y="11" x="100%" text-anchor="end">{end}</text></svg></div>
{nodes}<p>So much of what Cassandra had flushed would have been lost at each moment:
<i class="ok"></i>up to 15 min <i class="late"></i>up to 26 h <i class="old"></i>more
<i class="none"></i>everything</p></body></html>
"""
_LANE: Final = """<{} class="lane"><span>{}</span>
<svg viewBox="0 0 240 1" preserveAspectRatio="none">{}</svg><div>{}</div></{}>
"""
_RECT: Final = '<rect class="{}" x="{}" width="{}" height="1"><title>up to {} lost</title></rect>'


@dataclass(frozen=True, slots=True)
class ReportOptions(NodeChoice):
    """What the picture shows."""

    table: tuple[str, ...] = ()
    days: int = 30
    out: str = "cassbackup-report.html"


class Past(NamedTuple):
    """What the listings of a table tell."""

    first: float  # when it was first heard of
    gone: float  # when it was dropped
    bases: list[tuple[float, float]]  # when each snapshot was listed, in order, and how far a restore came then
    spoilt: list[float]  # when incrementals were listed incomplete, with losses or, since the newest snapshot, bad


def _past_of(infos: Sequence[ListingInfo], is_bad: Callable[[Sequence[ListingInfo]], bool]) -> Past:
    # A clock that was ahead may have named a life of tomorrow.
    first = min(min(info.when, seconds_of(info.unit.life or info.listed)) for info in infos)
    gone = math.inf
    points: list[tuple[float, float]] = []
    for snapshot in snapshots_of(infos):
        emptied = emptied_at(snapshot.unit)
        if is_drop(snapshot.unit):
            gone = emptied
        elif snapshot.complete and not is_partial(snapshot.unit) and not is_bad(snapshot.listings):
            listed = min(info.when for info in snapshot.listings if info.complete)
            # After a truncate there is nothing older that could be missed.
            points.append((listed, min(listed, emptied or seconds_of(snapshot.unit.life))))
    if any(end > gone for _, end in points):
        gone = math.inf  # it was brought back, with its old id
    bases = []
    reach = 0.0
    for listed, end in sorted(points):
        reach = max(reach, end)
        bases.append((listed, reach))
    spoilt = []
    for info in infos:
        if info.unit.kind != "incremental":
            continue
        # Those before the newest snapshot are not read: there may be hundreds of thousands.
        is_spoilt = not info.complete
        if bases and info.when > reach:
            is_spoilt = is_spoilt or is_bad([info])
        if is_spoilt:
            spoilt.append(info.when)
    return Past(first, gone, bases, spoilt)


def _read_waiting(store: Patient, key: str) -> dict[str, float] | None:
    """Return which tables had incrementals that were not listed yet, and when the oldest had been found.

    None where a heartbeat does not tell that.
    """
    try:
        oldest = load_document(key, read_object(store, key))["oldest_incrementals"]
        return {unquote(place): seconds_of(found) for place, found in oldest.items()}
    except (Corrupt, Missing, Usage, LookupError, TypeError, ValueError, AttributeError) as error:
        log.warning("skipped key=%s error=%s", quote(key), quote(str(error)))
        return None


def _gaps(moments: Iterable[float], now: float, limit: float) -> list[tuple[float, float]]:
    """Return where nothing happened for longer than the limit, up to now."""
    pairs = itertools.pairwise([*sorted(moments), now])
    return [(begin, end) for begin, end in pairs if end - begin > limit]


class History:
    """What the bucket tells of a node. It grows with snapshots and minutes, not with incrementals."""

    def __init__(self, bucket: Bucket, node: str, begin: float, now: float, words: Sequence[str]) -> None:
        self.tables: dict[str, Past] = {}
        signs, flushes = set[float](), set[float]()
        is_bad = functools.partial(names_bad, bucket.store, node, read_bad_keys(bucket.store, node))
        for place, group in itertools.groupby(listings_of(bucket.store, node), lambda info: info.unit.place):
            infos = [info for info in group if info.unit.kind != "archive"]
            signs.update(info.when // 60 * 60 for info in infos)
            flushes.update(info.when // 60 * 60 for info in infos if info.unit.kind == "incremental")
            if infos and is_selected(infos[0].unit, words):
                self.tables[place] = _past_of(infos, is_bad)
        beats: dict[float, str] = {}
        prefix = f"{node}.listings/heartbeat/"
        # From somewhat earlier on: else the daemon would seem to have been silent just before the picture begins.
        for info in bucket.store.list(prefix, after=prefix + utc(begin - _BEAT_GAP_S)):
            told = info.key.removeprefix(prefix).removesuffix(".json")
            if is_utc(told):
                beats[seconds_of(told)] = info.key
        signs.update(beats)
        # That the daemon lived, a heartbeat's key tells. What waited then is read of some, the last one among them.
        every = 1 + len(beats) // _COLUMNS
        newest_first = sorted(beats, reverse=True)
        chosen = sorted(newest_first[::every])
        read = functools.partial(_read_waiting, bucket.store)
        told_of = zip(chosen, spread(read, [beats[moment] for moment in chosen], bucket.threads), strict=True)
        self._waiting = {moment: waiting for moment, waiting in told_of if waiting is not None}
        self._beats = list(self._waiting)
        self.first = min(signs, default=now)
        if not self.tables and not words:
            self.tables["(nothing is listed yet)"] = Past(self.first, math.inf, [], [])
        self._silences = _gaps(signs, now, _BEAT_GAP_S)
        self._holes = [(0.0, now)]  # where incremental backups were off
        if flushes:
            # What Cassandra links while no daemon runs is found when it comes back: that breaks no chain.
            moments = {self.first, *flushes, *itertools.chain.from_iterable(self._silences)}
            self._holes = [gap for gap in _gaps(moments, now, _FLUSH_GAP_S) if gap not in self._silences]

    def loss(self, place: str, at: float) -> float:
        """Return how many seconds of flushed writes had been lost if the node had died; inf: all; -1: no such table."""
        past = self.tables[place]
        if not past.first <= at < past.gone:
            return -1.0
        known = bisect.bisect_right(past.bases, (at, math.inf))
        if not known:
            return math.inf
        base = past.bases[known - 1][1]
        # Spoilt until the next snapshot: the key of a later listing does not tell whether it completed these SSTables.
        since = min((moment for moment in past.spoilt if base < moment <= at), default=at)
        for begin, end in self._silences:
            if begin < at <= end:
                since = min(since, begin)
        for begin, end in self._holes:
            if begin < at and base < end:
                since = min(since, begin)
        if self._beats:
            # The next heartbeat tells what was waiting; after the last one, that does.
            following = min(bisect.bisect_left(self._beats, at), len(self._beats) - 1)
            since = min(since, self._waiting[self._beats[following]].get(place, at))
        return max(0.0, at - max(base, since))

    def losses(self, place: str, begin: float, now: float) -> list[float]:
        """Return the worst loss in each column; the last one is that of now."""
        step = (now - begin) / _COLUMNS
        worst = [self.loss(place, begin + step * column) for column in range(1, _COLUMNS)]
        for _, end in self._silences:  # some are shorter than a column
            column = math.ceil((end - begin) / step) - 1
            if 0 <= column < _COLUMNS - 1:
                worst[column] = max(worst[column], self.loss(place, end))
        return [*worst, self.loss(place, now)]


def loss_text(loss: float) -> str:
    """Return a loss for people, rounded up."""
    if loss < 0:
        return "dropped"
    if loss == math.inf:
        return "everything"
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if loss >= 2 * seconds:
            return f"{math.ceil(loss / seconds)} {unit}"
    return f"{math.ceil(loss)} s"


def _colour(loss: float) -> str:
    if loss < 0:
        return ""
    if loss <= _GREEN_S:
        return "ok"
    if loss <= _YELLOW_S:
        return "late"
    return "none" if loss == math.inf else "old"


class Lane(NamedTuple):
    """A line of the picture: a table, or a node with the worst of all its tables."""

    name: str
    losses: list[float]  # the worst of each column; the last one is that of now
    tables: list[Lane]


def _worst_first(lanes: Iterable[Lane]) -> list[Lane]:
    return sorted(lanes, key=lambda lane: (-lane.losses[-1], lane.name))


def _node_lane(name: str, history: History, begin: float, now: float) -> Lane:
    tables = []
    for place in history.tables:
        table = table_id_of(place)[0].replace("/", ".", 1)
        tables.append(Lane(table, history.losses(place, begin, now), []))
    columns_of_all = zip(*(table.losses for table in tables), strict=True)
    worst = [max(column) for column in columns_of_all]
    return Lane(name, worst, _worst_first(tables))


def _draw_lane(lane: Lane, tag: str) -> str:
    rects = ""
    x = 0
    for colour, group in itertools.groupby(lane.losses, _colour):
        losses = list(group)
        if colour:
            rects += _RECT.format(colour, x, len(losses), loss_text(max(losses)))
        x += len(losses)
    name = html.escape(quote(lane.name))
    now = loss_text(lane.losses[-1])
    return _LANE.format(tag, name, rects, now, tag)


def _draw_node(node: Lane, count: int) -> str:
    tables = [_draw_lane(table, "div") for table in node.tables[:count]]
    more = len(node.tables) - len(tables)
    if more:
        tables.append(f'<div class="lane"><span>and {more} tables that would lose no more</span></div>\n')
    return f"<details>{_draw_lane(node, 'summary')}{''.join(tables)}</details>\n"


def _write_page(out: str, page: str) -> None:
    try:
        write_file(out, page.encode())
    except OSError as error:
        user = os.geteuid()
        what = f"user id {user} cannot write {quote(out)} ({error.strerror})"
        raise Fault(what, "choose another --out, or run as another user") from None


def report(bucket: Bucket, options: ReportOptions) -> Answer:
    """Draw how much would have been lost at each moment. Exit 0 whatever that is: `status` is there to alarm."""
    now = bucket.store.now()
    begin = now - options.days * 86400.0
    histories = {}
    names = [node.name for node in choose_nodes(bucket, replace(options, all_nodes=True))]
    check_tables(bucket.store, names, options.table)
    for name in names:
        history = History(bucket, name, begin, now, options.table)
        if history.tables:
            histories[name] = history
    if not histories:
        raise Missing("no table matches", "`cassbackup list` shows what there is; put globs in quotes")
    first = min(history.first for history in histories.values())
    begin = max(begin, first - 60.0)
    lanes = [_node_lane(name, history, begin, now) for name, history in histories.items()]
    nodes = _worst_first(lanes)
    tables: list[dict[str, Any]] = []
    late = 0
    for node in nodes:
        for table in node.tables:
            loss = table.losses[-1]
            late += loss > _GREEN_S
            loss_s = loss if loss < math.inf else None
            tables.append({"node": node.name, "table": table.name, "loss_s": loss_s})
    worst = nodes[0]
    loss_now = loss_text(worst.losses[-1])
    title = f"If a node died now, the worst loss would be {loss_now} ({worst.name})"
    where = f"on {len(nodes)} nodes of {bucket.store.url}"
    about = f"{late} of {len(tables)} tables would lose more than 15 min, {where}"
    page = _PAGE.format(
        title=html.escape(quote(title)),
        about=html.escape(quote(about)),
        begin=moment_text(utc(begin)),
        middle=moment_text(utc((begin + now) / 2)),
        end=moment_text(utc(now)),
        nodes="".join(_draw_node(node, _LANES // len(nodes)) for node in nodes),
    )
    text = page
    if options.out != "-":
        text = f"{title}\n{about}\nThe picture is in {options.out}"
        _write_page(options.out, page)
    document = {"schema": 1, "bucket": bucket.store.url, "title": title, "about": about, "tables": tables}
    return Answer(DONE, document, text)


# ======================================================================================================
# Commands
# ======================================================================================================

_LEFT_OUT: Final = "Do filters leave something out? Are --paths the daemon's?"
_OWN_TAG: Final = "cassbackup-"  # of a snapshot for which nobody chose a tag


def tell(what: str, names: Sequence[str]) -> str:
    """Return what is wrong with so many things, of which one is named."""
    if len(names) == 1:
        return f"{what}: {names[0]}"
    return f"{what}: {names[0]} and {len(names) - 1} more"


# Status -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StatusOptions:
    """What `status` is asked. Times are in seconds."""

    state_dir: str
    wait: bool
    max_lag: float
    max_age: float


def _is_late(table: Mapping[str, Any], oldest: float) -> bool:
    """Tell whether a table has no snapshot that is young enough. What was written since needs none yet."""
    if table["oldest_data"] is None or table["oldest_data"] >= oldest:
        return False
    return not table["taken"] or seconds_of(table["taken"]) < oldest


def why_behind(document: Mapping[str, Any], options: StatusOptions) -> list[str]:
    """Return what is wrong; nothing if all is well."""
    oldest = document["now"] - options.max_age
    late = [place for place, table in document["tables"].items() if _is_late(table, oldest)]
    wrong = {
        "data directory away": [f"{directory} ({why})" for directory, why in document["absent"].items()],
        "lost until the next complete snapshot": document["lost"],
        "listed incomplete until the next complete snapshot": document["incomplete"],
        "not stored, see the log": document["refused"],
        "found bad in the bucket by verify": [f"{document['bad_objects']} objects"] if document["bad_objects"] else [],
        "failing": [f"{what} ({error['error']})" for what, error in document["errors"].items()],
        "not stored": [f"{unit} ({why})" for unit, why in document["failures"].items()],
        "no complete snapshot within --max-age": late,
        "filter that matches nothing": document["unmatched"],
        "settings": document["problems"],
    }
    why = [tell(what, names) for what, names in wrong.items() if names]
    silent = document["now"] - max(document["scanned"], document["started"])
    if silent > max(options.max_lag, 2 * document["reconcile_s"]):
        why.append(f"no scan of everything has ended for {silent:.0f} s: do its disks hang?")
    if document["lag_s"] > options.max_lag:
        why.append(f"the oldest unlisted file was found {document['lag_s']:.0f} s ago (see --max-lag)")
    return why


def _status_text(document: Mapping[str, Any]) -> str:
    pending, sent, rate = document["pending"], document["sent"], document["rate"]
    size = size_text(pending["bytes"])
    backlog = f"{pending['units']} units, {pending['files']} files, {size}"
    if rate and pending["bytes"]:
        backlog += f", at least {pending['bytes'] / rate:.0f} s to go"
    started = moment_text(utc(document["started"]))
    rows = [
        ("node", document["node"]),
        ("bucket", document["bucket"]),
        ("pending", backlog),
        ("lag", f"{document['lag_s']:.0f} s"),
        ("sent", f"{sent['files']} files, {size_text(sent['bytes'])} since {started}"),
        ("newest listing", document["newest_listing"] or "none"),
    ]
    rows += [("BEHIND", why) for why in document["behind"]]
    return columns(rows)


def status(options: StatusOptions) -> Answer:
    """Show how far behind the daemon is. Exit 3: behind, or nobody is at work."""
    began = time.time()
    said = list[str]()
    try:
        with contextlib.suppress(Denied):  # who may not ask for a scan waits for the next one
            if options.wait:
                ask_daemon(options.state_dir, {"do": "scan"}, 3600.0)
        while True:
            document = ask_daemon(options.state_dir, {"do": "status"}, 30.0)
            is_done = document["scanned"] >= began and document["quiet"] and not document["pending"]["units"]
            if is_done or not options.wait:
                break
            why = why_behind(document, options)
            if why and not said:
                log.warning("waiting, but the daemon is behind error=%s", quote("; ".join(why)))
            said = said or why
            time.sleep(0.5)
    except Missing as fault:
        return Answer(BEHIND, {"behind": [str(fault)]}, f"BEHIND  {fault}")
    document["behind"] = why_behind(document, options)
    return Answer(BEHIND if document["behind"] else DONE, document, _status_text(document))


# Snapshot ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SnapshotOptions(BucketOptions):
    """What `snapshot` takes, and how."""

    paths: tuple[str, ...] = ()
    keyspaces: tuple[str, ...] = ()
    tag: str = ""
    keep: bool = False
    skip_flush: bool = False
    ttl: float = 0.0  # seconds
    nodetool: str = "nodetool"
    cqlsh: str = "cqlsh"
    filters: Filters = field(default_factory=Filters)  # what they leave out is not waited for


def wanted_tables(options: SnapshotOptions, roots: Iterable[str]) -> list[str]:
    """Return the tables that are to be stored, as keyspace/table-id."""
    # Not tables_in: what Cassandra made before 2.1 has a directory without an id, to this day.
    there = {"/".join(path.split("/")[-3:-1]) for root in roots for path in glob.iglob(f"{glob.escape(root)}/*/*/")}
    wanted = sorted(filter(options.filters.wants_directory, there))
    return [place for place in wanted if not options.keyspaces or place.split("/")[0] in options.keyspaces]


def manifests_of(options: SnapshotOptions, tag: str) -> list[str]:
    """Return the path of each manifest.json that is on disk, and is to be stored. The tag may be a glob."""
    roots = data_directories(options.paths)
    found = []
    for place in wanted_tables(options, roots):
        for root in roots:
            found += glob.glob(f"{glob.escape(f'{root}/{place}')}/snapshots/{tag}/{MANIFEST}")
    return found


def check_taken(options: SnapshotOptions, tag: str, manifests: Collection[str]) -> None:
    """Refuse a tag that some tables lack: a `nodetool snapshot` that was broken off leaves it so. Raises Fault."""
    roots = data_directories(options.paths)
    taken = {"/".join(path.split("/")[-5:-3]) for path in manifests}
    began = min((os.stat(path).st_mtime for path in manifests), default=0.0)
    there = [place for place in wanted_tables(options, roots) if created_at(place) <= began]  # not one made since
    bare = [place for place in there if place not in taken and oldest_data(roots, [place])]
    if taken and bare:
        hint = f"it was broken off: nodetool clearsnapshot -t {tag}, and run this again"
        raise Fault(tell(f"{len(bare)} tables have SSTables and no manifest.json of {tag}", bare), hint)


def listing_of(bucket: Bucket, bad: frozenset[str], manifest: str) -> str:
    """Return the key of a good listing that has the manifest.json that is at this path now, "" if there is none."""
    fingerprint = Fingerprint.of(os.stat(manifest))
    folders = manifest.split("/")[-5:-1]
    unit = unit_of("/", "/".join(folders), "")
    keys = _listing_keys(bucket.store, unit_prefix(bucket.here, unit))
    for listing in _read_listings(bucket.store, bucket.here, keys):
        is_good = listing.complete and not any(entry.key in bad for entry in listing.files)
        for entry in listing.files:
            if is_good and entry.name == MANIFEST and entry.fingerprint == fingerprint:
                return listing_key(listing)
    return ""


def find_listings(bucket: Bucket, manifests: Sequence[str]) -> list[str]:
    """Return a complete listing for each manifest.json. Raises Fault where one has none."""
    bad = read_bad_keys(bucket.store, bucket.here)  # the daemon hears of a mark within a minute
    work = functools.partial(listing_of, bucket, bad)
    found = dict(zip(manifests, spread(work, manifests, bucket.threads), strict=True))
    if not found:
        raise Fault("no manifest.json of the snapshot is on disk", f"Did somebody clear it? {_LEFT_OUT}")
    left = [path for path, key in found.items() if not key]
    if left:
        hint = "`cassbackup status` says why; what was marked bad just now needs another snapshot, in a minute"
        raise Fault(tell(f"{len(left)} of {len(found)} tables are not listed complete and good", left), hint)
    return sorted(set(found.values()))  # one for all data directories


def _place_in_ring(nodetool: Nodetool, ring: str) -> dict[str, Any]:
    """Return what a successor needs to know of this node."""
    text = nodetool("info", "-T") + nodetool("describecluster")
    place: dict[str, Any] = {"cassandra": nodetool.version()}
    words = {"host_id": "ID", "dc": "Data Center", "rack": "Rack", "cluster": "Name", "partitioner": "Partitioner"}
    for name, word in words.items():
        match = re.search(rf"^\s*{word}\s*:\s*(.+?)\s*$", text, re.M)
        place[name] = match[1] if match else ""
    place["tokens"] = re.findall(r"^Token\s*:\s*(\S+)", text, re.M)
    place["addresses"] = re.findall(rf"^[UD][NLJM]\s+(\S+) .*{place['host_id']}", ring, re.M)
    return place


def describe_schema(cqlsh: str) -> str:
    """Return what cqlsh tells of the schema, "" where it does not."""
    said = ""
    for words in ("DESCRIBE SCHEMA WITH INTERNALS", "DESCRIBE SCHEMA"):  # table ids, dropped columns: only since 4.0
        try:
            lines = Nodetool(cqlsh)("-e", words).splitlines(keepends=True)
            return "".join(line for line in lines if not line.startswith("WARNING:"))
        except Fault as fault:
            said = str(fault)
    log.warning("no schema is kept with this snapshot error=%s", quote(said))
    return ""


def record_tag(bucket: Bucket, tag: str, keys: Sequence[str], nodetool: Nodetool, cqlsh: str) -> None:
    """Write down what belongs together: the tag's listings, the schema, the ring, and this node's place in it."""
    prefix = f"{bucket.here}.listings"
    ring = nodetool("status")
    place = _place_in_ring(nodetool, ring)
    if newest_document(bucket.store, f"{prefix}/node.") != {"version": FORMAT, **place}:
        body = Body(dump_document(**place))
        bucket.store.put(f"{prefix}/node.{utc(time.time())}.json", body)
    record = {
        "node": bucket.here,
        "tag": quote(tag),
        "taken": min(key.split("/")[-2] for key in keys),  # the oldest life
        "listings": keys,
        "schema": describe_schema(cqlsh),
        "ring": ring,
    }
    put_dated(bucket.store, f"{prefix}/tags/{component(tag, '%2F')}", record)


def _is_done_by_daemon(options: SnapshotOptions, tag: str) -> bool:
    """Wait until a daemon has done with a tag, listed or not. False: no daemon runs, or it has ended. Raises Denied."""
    try:
        began = ask_daemon(options.state_dir, {"do": "scan"}, 3600.0)["scanned"]
        while True:
            document = ask_daemon(options.state_dir, {"do": "status"}, 60.0)
            at_work = {keyspace for one, keyspace in document["tags"] if one == tag}
            if options.keyspaces:
                at_work &= {*options.keyspaces}
            if document["scanned"] >= began and document["quiet"] and not at_work:
                return True
            time.sleep(0.5)
    except Missing:
        return False


def _store_tag(options: SnapshotOptions, tag: str) -> None:
    """Have the daemon store a tag; where none runs, a process of our own."""
    if _is_done_by_daemon(options, tag):
        return
    words = [sys.executable, __file__, "watch", "--once", "--only-tag", tag, *data_directories(options.paths)]
    code = subprocess.run(words, env=options.environ, check=False).returncode
    # A daemon that was started meanwhile has the lock, and the work.
    if code not in (DONE, BEHIND) and not _is_done_by_daemon(options, tag):
        raise Fault(f"`cassbackup watch --once` ended with exit code {code}", "it said why")


def _agree_with_daemon(options: SnapshotOptions, bucket: Bucket) -> None:
    """Refuse to wait for a daemon that stores elsewhere. Raises Usage."""
    try:
        daemon = ask_daemon(options.state_dir, {"do": "status"}, 60.0)
    except Missing:
        return
    theirs = f"{daemon['node']} in {daemon['bucket']}"
    ours = f"{bucket.here} in {bucket.store.url}"
    if daemon["node"] and theirs != ours:
        what = f"the running daemon (pid {daemon['pid']}) stores {theirs}, and this command {ours}"
        raise Usage(what, "give both the same settings")


def _take(nodetool: Nodetool, options: SnapshotOptions, tag: str) -> bool:
    """Take a snapshot. Return False where one of that tag is there already."""
    words = ["-t", tag]
    if options.skip_flush:
        words.append("-sf")
    if options.ttl:
        words += ["--ttl", f"{options.ttl:.0f}s"]
    try:
        nodetool("snapshot", *words, *options.keyspaces)
    except Fault as fault:
        if "already exists" not in fault.what:
            raise
        log.info("going on with the snapshot that is there tag=%s", tag)
        return False
    return True


def _clear_earlier(bucket: Bucket, options: SnapshotOptions, nodetool: Nodetool) -> None:
    """Clear snapshots of ours that an earlier run could not clear, and that are listed by now."""
    options = replace(options, keyspaces=())  # a tag is cleared in all of them
    manifests = manifests_of(options, f"{_OWN_TAG}{'[0-9]' * 8}T{'[0-9]' * 4}Z")
    tags = {path.split("/")[-2] for path in manifests}
    for tag in sorted(tags):
        with contextlib.suppress(Fault, OSError):  # it may go at any moment: Cassandra's own TTL, another run
            find_listings(bucket, manifests_of(options, tag))
            nodetool("clearsnapshot", "-t", tag)


def snapshot(options: SnapshotOptions) -> Answer:
    """Take a snapshot, wait until it is listed complete, clear it. Exit 1: not complete, so it stays."""
    nodetool = Nodetool(options.nodetool)
    minute = utc(time.time())[:13]
    tag = options.tag or f"{_OWN_TAG}{minute}Z"
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,199}", tag) or tag in (".", ".."):
        raise Usage(f"tag {tag!r} is none that every Cassandra takes", "use letters, digits, _ . and -, no - in front")
    for keyspace in options.keyspaces:
        if "/" in keyspace:
            raise Usage(f"{quote(keyspace)} is no keyspace", "data directories go to --paths")
        if not options.filters.wants_directory(keyspace):
            raise Usage(f"the settings leave {keyspace} out", "see CASSBACKUP_KEYSPACE and CASSBACKUP_EXCLUDE_KEYSPACE")
    bucket = open_bucket(options)
    _agree_with_daemon(options, bucket)
    _clear_earlier(bucket, options, nodetool)
    is_new = _take(nodetool, options, tag)
    try:
        _store_tag(options, tag)
        manifests = manifests_of(options, tag)
        check_taken(options, tag, manifests)
        keys = find_listings(bucket, manifests)
        records = () if is_new else tag_records(bucket.store, bucket.here).values()
        if any(set(keys) <= set(record["listings"]) for record in records):
            hint = f"nodetool clearsnapshot -t {tag}, or pass another --tag"
            raise Fault(f"{tag} was taken and stored by an earlier run, and none was taken now", hint)
        record_tag(bucket, tag, keys, nodetool, options.cqlsh)
    except BaseException:
        log.warning("the snapshot stays on disk tag=%s hint=run this again, or: nodetool clearsnapshot -t %s", tag, tag)
        raise
    if not options.keep:
        nodetool("clearsnapshot", "-t", tag, *options.keyspaces)  # another's may have a snapshot of this name
    text = f"{tag}: {len(keys)} tables, listed complete in {bucket.store.url}"
    return Answer(DONE, {"tag": tag, "tables": len(keys), "listings": keys}, text)


# List -------------------------------------------------------------------------------------------------

_GONE: Final = "gone, but not by prune"


@dataclass(frozen=True, slots=True)
class ListOptions(NodeChoice):
    """What `list` shows."""

    tag: str = ""
    table: tuple[str, ...] = ()


def _describe(group: Sequence[Snapshot], marks: Mapping[str, str]) -> dict[str, Any]:
    """Return what JSON says of one snapshot of all tables. `marks` tells what is wrong with listings, by key."""
    unit = group[0].unit
    newest = [one.newest for one in group]
    wrong: dict[str, list[str]] = {}
    for one in group:
        mark = marks.get(one.newest.key, "" if one.complete else "incomplete")
        if mark:
            wrong.setdefault(mark, []).append(one.unit.place)
    states = [tell(f"{len(places)} of {len(group)} tables {mark}", places) for mark, places in wrong.items()]
    return {
        "tag": unit.tag,
        "life": unit.life,
        "tables": len(group),
        "files": sum(info.files for info in newest),
        "bytes": sum(info.size for info in newest),
        "state": "; ".join(states) or "complete",
        "wrong": wrong,
    }


def _list_node(bucket: Bucket, options: ListOptions, node: NodeInfo) -> dict[str, Any]:
    """Return what JSON says of a node. Of incrementals only first and last are kept: there may be 500,000 listings."""
    marks: dict[str, str] = {}  # of listings that are not as they were recorded
    for record in tag_records(bucket.store, node.name).values():
        marks.update(dict.fromkeys(record["listings"], _GONE))
        marks.update(dict.fromkeys(record["pruned"], "pruned"))
    is_tag = meaning_of(bucket.store, node.name, options.tag)

    def is_wanted(info: ListingInfo) -> bool:
        return is_selected(info.unit, options.table) and is_tag(Snapshot(info.unit, (info,)))

    found: list[ListingInfo] = []
    covered: dict[str, tuple[str, str]] = {}
    last = ""
    for beat in bucket.store.list(f"{node.name}.listings/heartbeat/"):
        told = moment_of(beat.key)
        if is_utc(told):
            last = max(last, min(told, utc(beat.modified)))  # the node's clock may have been ahead
    for info in listings_of(bucket.store, node.name):
        marks.pop(info.key, None)
        last = max(last, info.listed)
        if not is_wanted(info):
            continue
        if info.unit.kind == "snapshot":
            found.append(info)
        else:
            first, _ = covered.get(info.unit.place, (info.listed, ""))
            covered[info.unit.place] = first, info.listed  # LIST is in order of time
    for key in marks:
        recorded = listing_info(node.name, ObjectInfo(key, 0, "", 0.0))
        if recorded and is_wanted(recorded):
            found.append(recorded)
    snapshots = snapshots_of(found)
    bad = read_bad_keys(bucket.store, node.name)
    for one in snapshots:
        if one.newest.key not in marks and names_bad(bucket.store, node.name, bad, one.listings):
            marks[one.newest.key] = "bad"
    groups = [_describe(group, marks) for group in group_snapshots(snapshots)]
    return {**asdict(node), "last": last, "snapshots": groups, "incrementals": covered}


def _node_text(page: Mapping[str, Any]) -> str:
    node = page["name"]
    head = (f"snapshots of {node}", "taken", "tables", "files", "bytes", "")
    taken: list[Sequence[object]] = [head]
    for one in page["snapshots"]:
        name = f"{one['tag']}@{one['life'][:15]}"
        when = moment_text(one["life"])
        size = size_text(one["bytes"])
        taken.append((name, when, one["tables"], one["files"], size, one["state"]))
    covered = [(f"incrementals of {node}", "from", "to")]
    for place, (first, newest) in page["incrementals"].items():
        covered.append((place, moment_text(first), moment_text(newest)))
    return f"{columns(taken)}\n\n{columns(covered)}"


def list_(bucket: Bucket, options: ListOptions) -> Answer:
    """Show what the bucket has: nodes, snapshots, incrementals. Exit 1: nothing matches; 3: something bad or gone."""
    nodes = choose_nodes(bucket, replace(options, all_nodes=True))
    check_tables(bucket.store, [node.name for node in nodes], options.table)
    pages = list(spread(functools.partial(_list_node, bucket, options), nodes, bucket.threads))
    rows: list[Sequence[str]] = [("node", "cluster", "addresses", "last heard of", "newest snapshot")]
    found, bad = 0, list[str]()
    for page in pages:
        found += len(page["snapshots"]) + len(page["incrementals"])
        newest = "none"
        wrong = {word for one in page["snapshots"] for word in one["wrong"]}
        if wrong & {"bad", _GONE}:
            bad.append(f"{page['name']} has snapshots that are bad or gone: cassbackup list --node {page['name']}")
        for one in page["snapshots"]:
            if not is_automatic(Unit("snapshot", tag=one["tag"])):
                newest = f"{one['tag']} {one['state']}"
        addresses = " ".join(page["addresses"])
        last = moment_text(page["last"])
        rows.append((page["name"], page["cluster"], addresses, last, newest))
    if not found and (options.tag or options.table):
        raise Missing("nothing matches", "`cassbackup list` alone shows what there is; put globs in quotes")
    parts = [columns(rows)]
    if len(pages) == 1 or options.node or options.table:
        parts += map(_node_text, pages)
    elif bad:
        parts.append("\n".join(bad))
    return Answer(BEHIND if bad else DONE, {"bucket": bucket.store.url, "nodes": pages}, "\n\n".join(parts))


# ======================================================================================================
# Command line
# ======================================================================================================

SETTINGS: Final = "/etc/default/cassbackup"
KEY_FILES: Final = "/etc/cassbackup"

# What can be written for a value, by its metavar. Any other metavar stands for a text.
_EXAMPLES: Final = {
    "": "yes or no",
    "ADDR": "[HOST]:PORT, as :9810, 10.0.0.7:9810 or [::1]:9810",
    "BUCKET": "s3://bucket[/prefix], gs://bucket[/prefix], file:///directory, or a bucket's bare name",
    "CMD": "a command with its options, as 'nodetool -u me -pwf file'",
    "COUNT": "a number from 1 to 256",
    "DURATION": "a number with its unit, as 90s, 15m, 26h or 20d",
    "KIND": "AES256 or aws:kms",
    "NUMBER": "a number from 1 to 9999",
    "PART": "a part of the disk, as 10%",
    "RATE": "50M or 1.5G",
    "REGEX": "a regular expression",
    "TIME": "2026-11-21, 2026-11-21T20:24Z, or 20:24 for the last such moment",
}
_UNSET: Final = {"": False, "DURATION": 0.0, "NUMBER": 0, "REGEX": None, "TIME": 0.0}


def _scaled(text: str, units: Mapping[str, float]) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z%]*)", text)
    if not match or match[2] not in units:
        raise ValueError(text)
    return float(match[1]) * units[match[2]]


def _read_time(text: str) -> float:
    if re.fullmatch(r"\d\d?:\d\d", text):
        day = utc(time.time())[:9]
        clock = text.replace(":", "").zfill(4)
        today = seconds_of(f"{day}{clock}00.000000Z")
        return today if today <= time.time() else today - 86400
    moment = datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    if not is_utc(utc(seconds)):  # before 1970
        raise ValueError(text)
    return seconds


def read_value(metavar: str, text: str) -> Any:
    """Read a value as its metavar says. Raises ValueError."""
    word = text.strip().lower()
    match metavar:
        case "" if word in ("yes", "on", "true", "1", "no", "off", "false", "0"):
            return word in ("yes", "on", "true", "1")
        case "ADDR" if re.fullmatch(r"(\[[^]]+]|[^][:]*):\d{1,5}", text) and int(text.rpartition(":")[2]) < 65536:
            return text
        case "BUCKET" if "://" in text or not re.search("[/:]", text):
            return text
        case "CMD" if shlex.split(text):
            return text
        case "COUNT" if 1 <= int(text) <= 256:
            return int(text)
        case "NUMBER" if 1 <= int(text) <= 9999:
            return int(text)
        case "DURATION":
            return _scaled(word, {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400})
        case "KIND" if text in ("AES256", "aws:kms"):
            return text
        case "PART" if (part := _scaled(word, {"%": 0.01})) < 1:
            return part
        case "RATE":  # 50MB/s and 50 MiB too
            word = word.removesuffix("/s").removesuffix("b").removesuffix("i")
            return _scaled(word, {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB})
        case "REGEX":
            return re.compile(text)
        case "TIME":
            return _read_time(word)
        case _ if metavar not in _EXAMPLES:
            return text
    raise ValueError(text)


class Option(NamedTuple):
    """An option. Unless `twin` is False it has one of its name in the environment and in /etc/default/cassbackup."""

    flags: str  # the first one names it; PATH and KEYSPACE, which stand alone, have no dashes
    metavar: str  # what it is, and so how it is read; "" for a switch
    default: Any  # as it would be written; () where the option may be given more than once
    help: str
    twin: bool = True

    @property
    def key(self) -> str:
        """Return the name of its field in a command's options."""
        name = self.flags.split()[0].lstrip("-").replace("-", "_")
        return "import_" if name == "import" else name

    @property
    def variable(self) -> str:
        """Return the name of its twin, "" where it has none."""
        if not self.twin:
            return ""
        usual = f"CASSBACKUP_{self.key.upper()}"
        return {"bucket": "BUCKET_NAME", "region": "REGION"}.get(self.key, usual)

    def read(self, given: Any, place: str) -> Any:
        """Read what was given. Raises Usage."""
        if self.default == ():
            return tuple(given.split() if isinstance(given, str) else given)
        text = given or self.default
        if not text:
            return _UNSET.get(self.metavar, "")
        try:
            return read_value(self.metavar, text)
        except (ValueError, OverflowError, re.error):
            name = f"{self.variable} ({place})"
            if place == "flag":
                name = self.flags.split()[0]
            raise Usage(f"{name} {given!r} cannot be read", f"write {_EXAMPLES[self.metavar]}") from None


def flag_only(flags: str, metavar: str, default: Any, text: str) -> Option:
    """Return an option without a twin: a node's settings must not choose what is restored, deleted or taken over."""
    return Option(flags, metavar, default, text, twin=False)


_NODETOOL = Option("--nodetool", "CMD", "nodetool", "how to call nodetool, as 'nodetool -u me -pwf file'")
_JSON = flag_only("--json", "", "", "print one JSON document")
_TAG = flag_only("--tag", "TAG", "", "this snapshot; TAG@TIME where the tag was taken more than once")
_TABLES = flag_only("--table", "KS[.TABLE]", (), "only these; also ks.table-<id>; globs in quotes, as 'shop.*'")
_LATEST = flag_only("--latest", "", "", "the newest there is of each table")
_ALL = flag_only("--all-nodes", "", "", "every node of the bucket, or of --cluster")
_PATHS = Option("paths", "PATH", (), "data directories, with a / in each (default: as cassandra.yaml says)")
_INCLUDE = Option("--include -i", "REGEX", "", "archives: also files outside snapshots/ and backups/ at such paths")
_PIN_DIR = Option("--pin-dir", "DIR", "", "hold files here, on the data's mount (default: .cassbackup beside the data)")
_LISTEN = Option("--metrics-listen", "ADDR", "", "answer Prometheus at [HOST]:PORT (HOST: 127.0.0.1)")
_STATE = Option("--state-dir", "DIR", "", "ledger, socket, lock (default: /var/lib/cassbackup or ~/.local/state/...)")
_NAME = Option("--name", "NODE", "", "call this node so, instead of <hostname>-<instance_id>")
_THREADS = Option("--threads -t", "COUNT", "8", "threads that talk to the store")
_UNLIMITED = Option("--max-bandwidth", "RATE", "0", "bytes a second, as 50M; 0 is no limit")
_LIMITED = _UNLIMITED._replace(default="50M")
_BUCKET = (
    Option("--bucket -b", "BUCKET", "", _EXAMPLES["BUCKET"]),
    Option("--prefix", "PREFIX", "", "put everything under this prefix; one for each cluster is a good habit"),
    Option("--region", "NAME", "", "region of the bucket (default: that of this instance)"),
    Option("--endpoint-url", "URL", "", "talk to this server (or AWS_ENDPOINT_URL_S3, STORAGE_EMULATOR_HOST)"),
    Option("--ca-file", "FILE", "", "trust these certificates (or REQUESTS_CA_BUNDLE; AWS_CA_BUNDLE for S3)"),
    Option("--access-key -k", "KEY", "", "all users can read it on a command line: use the environment or a role"),
    Option("--secret-key -s", "KEY", "", "its secret; likewise"),
    _STATE,
)
_ENCRYPT = (
    Option("--sse", "KIND", "", "S3 encryption: AES256, or aws:kms (always with a bucket key)"),
    Option("--kms-key --sse-kms-key-id", "KEY", "", "key for aws:kms, or a Cloud KMS key for gs://"),
)
_STORING = (
    *(_NAME, _LIMITED, *_ENCRYPT),
    Option("--storage-class", "CLASS", "", "storage class of files from 128 KiB on; listings stay readable"),
)
_FILTERS = (
    Option("--keyspace", "GLOB", (), "only these keyspaces (a restore needs those of the system too)"),
    Option("--exclude-keyspace", "GLOB", (), "not these keyspaces"),
    Option("--exclude-table", "KS.TABLE", (), "not these tables"),
)
_NODES = (
    flag_only("--node", "NODE", "", "a name, a host id or an address (default: this node; of list and report: all)"),
    flag_only("--cluster", "NAME", "", "only nodes of this cluster"),
)
_WATCH = (
    _PATHS,
    flag_only("--once", "", "", "store and list what is there, then exit"),
    flag_only("--adopt", "", "", "take a node's name over from another machine: rebuilt around its disk"),
    flag_only("--full", "", "", "send everything, even what is stored under another snapshot"),
    Option("--exclude-tag", "GLOB", (), "not the snapshots with these tags"),
    _INCLUDE,
    Option("--exclude -e", "REGEX", "", "of those, not the ones at such paths"),
    Option("--delete-uploaded-incrementals", "", "", "delete an SSTable from backups/ once listed complete"),
    _PIN_DIR,
    Option("--max-pinned", "PART", "10%", "how much of the disk the pins may hold alone"),
    Option("--min-free", "PART", "5%", "give pins up when less than this of the disk is free"),
    Option("--incomplete-after", "DURATION", "60s", "list what never becomes complete after this time"),
    Option("--reconcile", "DURATION", "1m", "how often to scan without a hint"),
    Option("--heartbeat", "DURATION", "15m", "how often to say in the bucket that we live"),
    _LISTEN,
    Option("--metrics-textfile", "FILE", "", "write metrics for node_exporter's textfile collector to this .prom file"),
    _THREADS,
    flag_only("--only-tag", "TAG", "", ""),  # for `snapshot` where no daemon runs
)
_SNAPSHOT = (
    flag_only("keyspaces", "KEYSPACE", (), "only these (default: all)"),
    flag_only("--tag -t", "TAG", "", "name of the snapshot (default: cassbackup-<UTC to the minute>)"),
    flag_only("--keep", "", "", "do not clear it when it is listed; under a --tag of yours, or the next run does"),
    flag_only("--skip-flush", "", "", "take what is on disk, without a flush"),
    Option("--ttl", "DURATION", "", "have Cassandra (4.1) clear it after this time in any case"),
    _NODETOOL,
    Option("--cqlsh", "CMD", "cqlsh", "how to call cqlsh, for DESCRIBE SCHEMA"),
    _PATHS._replace(flags="--paths"),
    _JSON,
)
_STATUS = (
    flag_only("--wait", "", "", "wait until everything that was found is listed"),
    Option("--max-lag", "DURATION", "15m", "behind, when the oldest unlisted file was found longer ago"),
    Option("--max-age", "DURATION", "26h", "behind, when a table's newest complete snapshot is older"),
    *(_STATE, _JSON),
)
_RESTORE = (
    *(_TAG, _LATEST),
    flag_only(
        "--at", "TIME", "", "as of this moment: 2026-11-21T20:24Z, UTC without a zone, or HH:MM for the last such"
    ),
    _TABLES,
    flag_only("--exclude-table --exclude", "KS[.TABLE]", (), "not these"),
    flag_only("--dry-run", "", "", "only say what would be restored"),
    Option("--into", "DIR", "", "stage <DIR>/<ks>/<table>/ (default: cassbackup-restore/ beside the data)"),
    flag_only("--import", "", "", "then hand each table to the running Cassandra (nodetool import)"),
    _NODETOOL,
    flag_only("--schema-only", "", "", "only the schema"),
    flag_only("--archive", "DIR", "", "not tables, but the files that were archived there, as commit logs"),
    flag_only("--incomplete", "", "", "restore what there is, though something is missing"),
    flag_only("--in-place", "", "", "into the data directories of a stopped node; all keyspaces"),
    flag_only("--same-node", "", "", "in place: the node itself comes back, with its host id and tokens"),
    flag_only("--new-node", "", "", "in place: another node takes its place; system.local and peers are left out"),
    flag_only("--data-dir", "[OLD=]NEW", (), "in place: the data directory, or which one for which"),
    *(_THREADS, _UNLIMITED, _JSON),
)
_PRUNE = (
    Option("--keep-last", "NUMBER", "", "keep so many snapshots of each table"),
    Option("--keep-within", "DURATION", "", "keep what is younger, as 30d; also Cassandra's own snapshots (else 14d)"),
    Option("--keep-daily", "NUMBER", "", "keep the newest of so many days"),
    Option("--keep-weekly", "NUMBER", "", "keep the newest of so many weeks"),
    Option("--keep-monthly", "NUMBER", "", "keep the newest of so many months"),
    _TAG,
    flag_only("--retire", "NODE", "", "everything of a node that has been silent for 30 days"),
    flag_only("--force", "", "", "even more than half of what there is; even the last good snapshot of a table"),
    flag_only("--confirm", "", "", "delete; else it is only said what would go"),
    flag_only("--dry-run", "", "", "as without --confirm"),
    *(_ALL, *_ENCRYPT, _THREADS, _JSON),
)
_VERIFY = (
    *(_TAG, _LATEST, _TABLES),
    flag_only("--deep", "", "", "download everything and compare its bytes"),
    flag_only("--repair", "", "", "have the daemon store again what is bad"),
    *(_ALL, *_ENCRYPT, _THREADS, _UNLIMITED, _JSON),
)
_REPORT = (
    _TABLES,
    flag_only("--days", "NUMBER", "30", "how far to look back"),
    flag_only("--out", "FILE", "cassbackup-report.html", "where the page goes; - is stdout"),
    *(_THREADS, _JSON),
)
_TRIED = (_PIN_DIR._replace(help=""), _LISTEN._replace(help=""), _INCLUDE._replace(help=""))  # the daemon's
_DOCTOR = (_PATHS, _NODETOOL, _NAME, *_ENCRYPT, _JSON, *_TRIED)
_LIST = (_TAG, _TABLES, _THREADS, _JSON)
_COMMON = (
    Option("--config", "FILE", "", f"read settings from here (default: {SETTINGS})"),
    Option("--verbose -v", "", "", "say more in the log"),
)


class Command(NamedTuple):
    """What can be asked for. Its options stand by the heading of their group; those without a help are not shown."""

    run: Callable[..., Any]
    fields: type
    example: str
    groups: tuple[tuple[str, tuple[Option, ...]], ...]

    @property
    def summary(self) -> str:
        """Return what it does, in a line."""
        return (self.run.__doc__ or "").partition(".")[0]

    @property
    def options(self) -> tuple[Option, ...]:
        """Return the options of all groups."""
        return tuple(option for _, options in self.groups for option in options)


_ALWAYS = (("bucket", _BUCKET), ("always", _COMMON))
_WHERE = (("which nodes", _NODES), *_ALWAYS)
_CHOICE = ("what to store", _FILTERS)
_STORE = (_CHOICE, ("storing", _STORING), *_ALWAYS)
COMMANDS: Final = {
    "watch": Command(watch, WatchOptions, "watch /data1 /data2", (("watch", _WATCH), *_STORE)),
    "snapshot": Command(snapshot, SnapshotOptions, "snapshot -t upgrade shop", (("snapshot", _SNAPSHOT), *_STORE)),
    "status": Command(status, StatusOptions, "status --wait --max-age 7d", (("status", _STATUS), ("always", _COMMON))),
    "list": Command(list_, ListOptions, "list --node db7 --table 'shop.*'", (("list", _LIST), *_WHERE)),
    "verify": Command(verify, VerifyOptions, "verify --latest --deep", (("verify", _VERIFY), *_WHERE)),
    "restore": Command(restore, RestoreOptions, "restore --at 20:24 --dry-run", (("restore", _RESTORE), *_WHERE)),
    "prune": Command(prune, PruneOptions, "prune --keep-daily 14 --keep-monthly 12", (("prune", _PRUNE), *_WHERE)),
    "report": Command(report, ReportOptions, "report --days 7 --out backups.html", (("report", _REPORT), *_WHERE)),
    "doctor": Command(doctor, DoctorOptions, "doctor", (("doctor", _DOCTOR), _CHOICE, *_ALWAYS)),
}
VARIABLES: Final = {one.variable: one for command in COMMANDS.values() for one in command.options if one.variable}


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    text = option.help
    if option.default:
        text += f" (default: {option.default})"
    if option.variable:
        text += f" [{option.variable}]"
    shown = text.replace("%", "%%") if option.help else argparse.SUPPRESS
    more: dict[str, Any] = {"help": shown}
    if not option.flags.startswith("-"):
        group.add_argument(option.key, nargs="*", metavar=option.metavar, **more)
        return
    if not option.metavar:
        more |= {"action": "store_const", "const": "yes"}
    else:
        more |= {"action": "append" if option.default == () else "store", "metavar": option.metavar}
    group.add_argument(*option.flags.split(), dest=option.key, **more)


def build_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command. What no flag gave is absent: it comes from elsewhere then."""
    command = COMMANDS[name]
    alone = [option for option in command.options if not option.flags.startswith("-")]
    words = [f"[{option.metavar} ...]" for option in alone]
    parser = argparse.ArgumentParser(
        usage=" ".join(["cassbackup", name, "[OPTION ...]", *words]),
        description=f"{command.summary}.",
        epilog=f"Example: cassbackup {command.example}",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34, width=118),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
    )
    for title, options in command.groups:
        group = parser.add_argument_group(title)
        for option in options:
            _add_option(group, option)
    group.add_argument("--help", "-h", action="help", help="show this")
    return parser


def overview() -> str:
    """Return what `cassbackup --help` shows."""
    rows = [(name, command.summary) for name, command in COMMANDS.items()]
    commands = columns(rows, "  ")
    return f"""usage: cassbackup [COMMAND] [OPTION ...] [PATH ...]

Back up Apache Cassandra: every file of snapshots/ and backups/, stored and listed. Without a command: watch.

{commands}

`cassbackup COMMAND --help` shows the options of a command, its defaults and an example. An option wins over its
variable in the environment, that over {SETTINGS}, that over the default."""


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command, "" where there is none, and the other words. Options may stand before it."""
    options = [option for command in COMMANDS.values() for option in command.options]
    valued = {flag for option in options if option.metavar for flag in option.flags.split()}
    words, at = list(argv), 0
    # The first word that is neither a flag nor the value of one. What takes a value does so in every command.
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] in valued else 1
    if at < len(words) and words[at] in COMMANDS:
        return words.pop(at), words
    return "", words


def parse(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return what the flags say, as it was written. Raises Usage."""
    hint = f"`cassbackup {name} --help` shows the options"
    if any(word.endswith("=--") for word in words):
        raise Usage("-- is no value", hint)  # argparse would drop it, until Python 3.13
    try:
        # Intermixed: a PATH may stand between two flags.
        found, unknown = build_parser(name).parse_known_intermixed_args(words)
    except argparse.ArgumentError as error:
        raise Usage(str(error).removeprefix("argument "), hint) from None
    for word in unknown:
        if word.startswith("-"):
            raise Usage(f"{name} has no option {word}", hint)
        raise Usage(f"{name} does not take {word!r}", f"{hint}; put globs in quotes, or the shell replaces them")
    for word in getattr(found, "paths", ()) if name == "watch" else ():
        if word in COMMANDS:
            raise Usage(f"{word} is a command", f"write it first: cassbackup {word} ...")
        if "/" not in word:  # a misspelt command must not start a daemon
            near = " or ".join(difflib.get_close_matches(word, COMMANDS, 2)) or "--help"
            raise Usage(f"there is no command {word!r}", f"try `cassbackup {near}`; a path contains a /, as ./{word}")
    return vars(found)


# Settings ---------------------------------------------------------------------------------------------

# A daemon does not guess which directories, tables or bucket somebody meant. What else is misspelt makes it red.
_VITAL: Final = {
    "paths",
    "bucket",
    "prefix",
    "name",
    "include",
    "exclude",
    "exclude_tag",
    *(one.key for one in _FILTERS),
}


class Problem(NamedTuple):
    """A setting that is not understood, and the option that was probably meant."""

    text: str
    near: Option | None


def near_option(text: str) -> Option | None:
    """Return the option whose variable is named, or nearly, by one of the words."""
    known = {variable.removeprefix("CASSBACKUP_"): option for variable, option in VARIABLES.items()}
    for word in re.findall(r"\w+", text):
        for near in difflib.get_close_matches(word.removeprefix("CASSBACKUP_"), known, 1, 0.8):
            return known[near]
    return None


def misspelt(names: Iterable[str]) -> Iterator[Problem]:
    """Yield what looks like a setting of ours, and is none."""
    for name in names:
        if name in VARIABLES:
            continue
        near = near_option(name)
        if near and (name.startswith("CASSBACKUP_") or near.key in ("bucket", "region")):
            yield Problem(f"there is no setting {name}, did you mean {near.variable}?", near)
        elif name.startswith("CASSBACKUP_"):
            yield Problem(f"there is no setting {name}", None)


def read_settings(text: str) -> tuple[dict[str, str], list[Problem]]:
    """Read NAME=value lines as systemd reads an EnvironmentFile. What it would leave out is a problem."""
    found, problems = dict[str, str](), list[Problem]()
    for line in re.findall(r"^[ \t]*[#;].*\\\r?$", text, re.MULTILINE):
        # Up to version 253 such a comment goes on in the next line, as it does here; later ones read that line.
        problems.append(Problem(f"whether the line after {line.strip()!r} counts depends on systemd's version", None))
    for line in re.sub(r"\\\r?\n", "", text).splitlines():
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or name.startswith(("#", ";")):
            continue
        try:
            if not equals or "\0" in value or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(line)
            line.encode()  # systemd takes nothing from a file that has a value in another encoding
            # Quotes count where a value begins with one; else they are part of it, and a # always is.
            is_quoted = value.startswith(("'", '"'))
            if re.fullmatch(r'"([^"\\]|\\.)*"', value):  # where a $ may be escaped, too
                found[name] = re.sub(r'\\(["\\$`])', r"\1", value[1:-1])
            elif is_quoted:
                found[name] = "".join(shlex.split(value))
            else:
                found[name] = re.sub(r"\\(.)", r"\1", value)
        except ValueError:
            problems.append(Problem(f"systemd does not read {line.strip()!r} as NAME=value", near_option(line)))
    return found, [*problems, *misspelt(found)]


def load_settings(path: str) -> tuple[dict[str, str], list[Problem]]:
    """Read the settings file. Only the usual one may be absent."""
    where = path or SETTINGS
    try:
        with open(where, errors="surrogateescape") as file:
            found, problems = read_settings(file.read())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path:
            return {}, []
        text = f"{where} cannot be read by user {os.geteuid()} ({error.strerror})"
        return {}, [Problem(text, VARIABLES["BUCKET_NAME"])]
    return found, [Problem(f"{where}: {problem.text}", problem.near) for problem in problems]


def judge_settings(name: str, problems: Iterable[Problem], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return what is wrong with the settings and does not end this command. Raises Usage for what does."""
    wrong = list(problems)
    for problem in misspelt(environ):
        if problem.near:
            wrong.append(problem)
        else:  # Kubernetes sets CASSBACKUP_SERVICE_HOST and its like for a service of that name
            log.warning("ignored environment=%s", quote(problem.text))
    for problem in wrong:
        is_vital = problem.near is not None and problem.near.key in _VITAL
        if name != "doctor" and (is_vital or name != "watch"):
            raise Usage(problem.text, "correct it; `cassbackup doctor` shows what is set, and where")
    return tuple(problem.text for problem in wrong)


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return where state is kept if nobody says where; one that a daemon keeps there can be asked by all."""
    system = "/var/lib/cassbackup"
    home = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    own = os.path.join(home, "cassbackup")
    if os.geteuid() == 0 or os.access(system, os.W_OK):
        return system
    is_asking = os.path.exists(f"{system}/lock") and not os.path.exists(own)
    return system if is_asking else own


def use_key_files(bucket: str, environ: MutableMapping[str, str]) -> None:
    """Name the service's key files to the SDKs, unless other keys are named. Raises Usage where we may not read one."""
    for scheme, name, variable, others in (
        ("s3", "aws", "AWS_SHARED_CREDENTIALS_FILE", {"AWS_ACCESS_KEY_ID", "AWS_PROFILE", "CASSBACKUP_ACCESS_KEY"}),
        ("gs", "gcs.json", "GOOGLE_APPLICATION_CREDENTIALS", {"STORAGE_EMULATOR_HOST"}),
    ):
        is_elsewhere = "://" in bucket and not bucket.startswith(f"{scheme}://")
        if is_elsewhere or environ.keys() & {variable, *others}:
            continue
        path = os.path.join(KEY_FILES, name)
        try:
            open(path, "rb").close()
        except PermissionError:
            hint = f"run this as root or cassandra, or set {variable}"
            raise Usage(f"{path} cannot be read by user {os.geteuid()}", hint) from None
        except OSError:  # there is none
            continue
        environ[variable] = path


def settle(name: str, flags: Mapping[str, Any], environ: MutableMapping[str, str]) -> dict[str, Any]:
    """Return a command's settings by key: flag, else environment, else file, else default. Raises Usage.

    Flags become variables too, for the process that `snapshot` may start.
    """
    path = flags.get("config") or environ.get("CASSBACKUP_CONFIG", "")
    file, problems = load_settings(path)
    values: dict[str, Any] = {"problems": judge_settings(name, problems, environ)}
    given: dict[str, tuple[Any, str]] = {}  # by variable: what, and where
    for variable, option in VARIABLES.items():
        for place, settings in (("file", file), ("environment", environ)):
            if variable in settings:  # an empty one overrules, too, and means the default
                given[variable] = settings[variable], place
        if option.key in flags:
            words = flags[option.key]
            given[variable] = words, "flag"
            environ[variable] = words if isinstance(words, str) else " ".join(words)
    origins = [f"{variable} ({place})" for variable, (_, place) in given.items()]
    values["origins"] = tuple(origins)
    # A setting of another command is not read here: a mistake in --keep-last must not keep `status` from its work.
    for option in COMMANDS[name].options:
        text, place = given.get(option.variable, (option.default, "default"))
        is_for_timer = option.key.startswith("keep_") and flags.keys() & {"tag", "retire"}
        if is_for_timer or (option.key == "into" and "in_place" in flags):
            text, place = option.default, "default"  # the settings speak of the usual prune and restore, not of this
        if option.key in flags:
            text, place = flags[option.key], "flag"
            if text == "" and (not option.twin or option.key in ("bucket", "into", "config")):
                raise Usage(f"{option.flags.split()[0]} is empty", "is a variable of the shell not set?")
        values[option.key] = option.read(text, place)
    for variable in file.keys() - VARIABLES.keys():  # AWS_*, GOOGLE_*, *_PROXY: for the SDKs
        environ.setdefault(variable, file[variable])
    values["state_dir"] = values["state_dir"] or default_state_dir(environ)
    if values.get("kms_key"):
        if values["sse"] == "AES256":
            raise Usage("--kms-key does not go with --sse AES256", "use --sse aws:kms, or neither")
        values["sse"] = "aws:kms"
    return values


def fill(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a command's options from settings, by the names of its fields."""
    names = [one.name for one in fields(cast(Any, cls))]
    return cls(**{name: values[name] for name in names if name in values})


# Log and exit codes -----------------------------------------------------------------------------------


class Line(logging.Formatter):
    """Spells an event as one line, whatever names it has; for journald with the priority that it reads."""

    def __init__(self, is_journal: bool) -> None:
        super().__init__()
        self._is_journal = is_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = " | ".join(super().format(record).splitlines())
        if self._is_journal:
            priorities = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}
            return f"<{priorities.get(record.levelno, 3)}>{text}"
        moment = datetime.fromtimestamp(record.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return f"{moment} {record.levelname.lower()} {text}"


def set_up_log(environ: Mapping[str, str]) -> None:
    """Log to stderr."""
    info = os.fstat(sys.stderr.fileno())
    handler = logging.StreamHandler()
    is_journal = environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"
    handler.setFormatter(Line(is_journal))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written must not stop a backup


def run(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Run a command, and print its answer. Raises Fault."""
    if len(argv) < 3:  # help, help restore, restore help
        argv = ["--help" if word == "help" else word for word in argv]
    name, words = find_command(argv)
    if not name and {"-h", "--help"} & {*words}:
        print(overview())
        return DONE
    if words == ["--version"]:
        print(f"cassbackup {__version__}")
        return DONE
    name = name or "watch"
    command, flags = COMMANDS[name], parse(name, words)
    set_up_log(environ)
    values = settle(name, flags, environ)
    if values["verbose"]:
        log.setLevel(logging.DEBUG)
    if flags.keys() & {"access_key", "secret_key"}:
        log.warning("every user of this machine can read keys on a command line hint=use the environment or a role")
    if name != "status":
        use_key_files(values["bucket"], environ)
    values |= {"store": fill(StoreOptions, values), "filters": fill(Filters, values), "environ": environ}
    options: Any = fill(command.fields, values)
    if name == "watch":
        return int(command.run(options, environ))
    if issubclass(command.fields, NodeChoice):  # what needs a bucket, and no more of this machine
        answer = command.run(open_bucket(fill(BucketOptions, values)), options)
    else:
        answer = command.run(options)
    print(json.dumps(answer.document) if values["json"] else answer.text)
    return int(answer.code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program, by default with the words of this process; return its exit code."""
    for name in ("stdout", "stderr"):
        if not getattr(sys, name):  # whoever started us closed it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")  # a terminal may not spell UTF-8
    try:
        code = run(sys.argv[1:] if argv is None else argv, os.environ)
        sys.stdout.flush()
        return code
    except Fault as fault:
        print(f"cassbackup: {fault.what}", file=sys.stderr)
        if fault.hint:
            print(f"  {fault.hint}", file=sys.stderr)
        return fault.code
    except OSError as error:
        # What the buffer still has would fail once more as the interpreter ends, which then exits with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read us has enough
            return 128 + signal.SIGPIPE
        print(f"cassbackup: {error}", file=sys.stderr)  # a full disk, a file of another user
        return FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
