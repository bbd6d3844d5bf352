"""The judge: compares a bucket with what once stood on the node. It knows the documented layout, and nothing else.

    assert problems(bucket.objects(), "node1") == []              # P1 listed means restorable, P3 written once
    assert lost(node.history, bucket.objects(), "node1") == []    # P2 nothing is skipped
    assert rewritten(before, bucket.objects()) == []              # P3 between two moments
    assert untouched(tree_before, survey(node.root)) == []        # P5 the source is as it was

`objects` is key -> content of a whole bucket, `prefix` what comes before the node's name in its keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

from tree import Copy, History, Unit

Objects = Mapping[str, bytes]
VERSION = 2
UTC = r"\d{8}T\d{6}\.\d{6}Z"
NAME = rf"(?P<utc>{UTC})-(?P<state>complete|incomplete)-(?P<files>\d+)-(?P<bytes>\d+)\.json"
TABLE = r"(?P<keyspace>[^/]+)/(?P<table>[^/]+)"
LISTINGS = {
    "snapshot": re.compile(rf"{TABLE}/snapshots/(?P<tag>[^/]+)/(?P<life>{UTC})/{NAME}"),
    "incremental": re.compile(rf"{TABLE}/backups/{NAME}"),
    "archive": re.compile(rf"archive/(?P<directory>[^/]+)/{NAME}"),
}
DOCUMENTS = re.compile(rf"owner(\.{UTC})?\.json|node\.{UTC}\.json|tags/[^/]+/{UTC}\.json|(heartbeat|bad)/{UTC}\.json")
PENDING = re.compile(rf"{UTC}\.json")
FIELDS = {"version", "node", "kind", "keyspace", "table", "table_id", "tag", "life", "complete", "taken", "listed"}
FIELDS |= {"missing", "lost", "directories"}
ENTRY_FIELDS = {"name", "size", "mtime_ns", "inode", "mode", "user", "group", "crc32", "key", "etag"}
OTHER_CONTENT = re.compile(rf".+@(?P<crc32>[0-9a-f]{{8}})(\.{UTC})?")


class UnitKey(NamedTuple):
    """What listings add up to: one life of a table's snapshot, or all of a table's incrementals.

    Of an archive, `table` is the quoted directory.
    """

    kind: str
    keyspace: str
    table: str
    tag: str | None = None
    life: str | None = None


class Entry(NamedTuple):
    """One file of a listing: its path on the node, its object, and what that must hold."""

    path: str
    key: str
    size: int
    crc32: str


@dataclass
class Listing:
    """A listing as found in the bucket."""

    key: str
    utc: str
    state: str
    files: int
    bytes: int
    of: UnitKey
    document: dict[str, Any] = field(repr=False)
    entries: list[Entry] = field(repr=False)

    @property
    def lost(self) -> set[str]:
        """Return the names of the files that it says are gone for good."""
        return {plain(one) for one in self.document.get("lost", ())}


# ------------------------------------------------------------------------------------------------------------
# Reading a bucket


def plain(text: str) -> str:
    """Return a name or a directory as it is on the node."""
    return unquote(text, errors="surrogateescape")


def place(prefix: str) -> str:
    """Return a prefix as keys begin with it."""
    return f"{prefix.strip('/')}/" if prefix.strip("/") else ""


def listings(objects: Objects, node: str, prefix: str = "") -> list[Listing]:
    """Return the node's listings, oldest first; ValueError for a name or a text that is not a listing's."""
    found = []
    root = f"{place(prefix)}{node}.listings/"
    for key in sorted(key for key in objects if key.startswith(root)):
        below = key[len(root) :]
        match = next(((kind, m) for kind, rule in LISTINGS.items() if (m := rule.fullmatch(below))), None)
        if match:
            found.append(_parse(key, *match, objects[key]))
        elif not DOCUMENTS.fullmatch(below):
            raise ValueError(f"{key}: not the name of anything documented")
    return sorted(found, key=lambda listing: (listing.utc, listing.key))


def _parse(key: str, kind: str, match: re.Match[str], body: bytes) -> Listing:
    try:
        document = json.loads(body)
        entries = [
            Entry(f"{plain(directory)}/{plain(file['name'])}", file["key"], file["size"], file["crc32"])
            for directory, files in document["directories"].items()
            for file in files
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: {error!r}") from error
    named = match.groupdict()
    table = named.get("table", named.get("directory", ""))
    of = UnitKey(kind, named.get("keyspace", ""), table, named.get("tag"), named.get("life"))
    return Listing(key, named["utc"], named["state"], int(named["files"]), int(named["bytes"]), of, document, entries)


def documents(objects: Objects, node: str, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return what is no listing, by key: owner, ring, tags, heartbeats, marks, and what is pending deletion."""
    ours, pending = (f"{place(prefix)}{node}.{what}/" for what in ("listings", "pending-delete"))
    keys = [key for key in objects if key.startswith(ours) and DOCUMENTS.fullmatch(key[len(ours) :])]
    return {key: json.loads(objects[key]) for key in [*keys, *(key for key in objects if key.startswith(pending))]}


def listed_files(objects: Objects, node: str, prefix: str = "") -> dict[UnitKey, dict[str, tuple[int, str]]]:
    """Return what a restore can have: unit -> path -> (size, crc32); of the same name the later counts."""
    result: dict[UnitKey, dict[str, tuple[int, str]]] = {}
    for listing in listings(objects, node, prefix):
        files = result.setdefault(listing.of, {})
        files.update({entry.path: (entry.size, entry.crc32) for entry in listing.entries})
    return result


def complete(objects: Objects, node: str, prefix: str = "") -> set[UnitKey]:
    """Return the units that some listing of theirs calls complete."""
    return {found.of for found in listings(objects, node, prefix) if found.state == "complete"}


# ------------------------------------------------------------------------------------------------------------
# Judging it


def problems(objects: Objects, node: str, prefix: str = "") -> list[str]:
    """Return where the node's keys contradict themselves or the bucket; none may, at any moment."""
    try:
        found = listings(objects, node, prefix)
        others = documents(objects, node, prefix)
    except ValueError as error:
        return [str(error)]
    contents: dict[str, tuple[int, str]] = {}
    wrong = [
        f"{listing.key}: {problem}"
        for listing in found
        for problem in (*_contradictions(listing, node), *_absent(listing, objects, place(prefix), contents))
    ]
    return [*wrong, *_odd_documents(others, objects, place(prefix)), *_odd_names(objects, f"{place(prefix)}{node}/")]


def _contradictions(listing: Listing, node: str) -> Iterator[str]:
    """Yield where a listing's name and its text disagree."""
    document = listing.document
    lacking = FIELDS - set(document)
    if lacking:
        yield f"lacks {sorted(lacking)}"
        return
    said = (listing.files, listing.bytes)
    meant = (len(listing.entries), sum(entry.size for entry in listing.entries))
    if said != meant:
        yield f"its name says {said} files and bytes, its text {meant}"
    if (listing.state == "complete") != document["complete"]:
        yield f"its name says {listing.state}, its text complete: {document['complete']}"
    if document["complete"] and document["missing"]:
        yield f"complete, and lacks {document['missing']}"
    expected = {"version": VERSION, "node": node, "kind": listing.of.kind, "listed": listing.utc}
    if listing.of.kind == "snapshot":
        expected |= {"keyspace": listing.of.keyspace, "tag": listing.of.tag, "life": listing.of.life}
    for name, value in expected.items():
        # A name of ours that a keyspace has is escaped in keys; one too long for a key is hashed there.
        if document[name] != value and not str(value).startswith("%%"):
            yield f"its name says {name} {value}, its text {document[name]}"
    paths = [entry.path for entry in listing.entries]
    if len(set(paths)) != len(paths):
        yield "names a file twice"
    for files in document["directories"].values():
        yield from (f"{file}: lacks {sorted(ENTRY_FIELDS - set(file))}" for file in files if ENTRY_FIELDS - set(file))


def _absent(listing: Listing, objects: Objects, place: str, contents: dict[str, tuple[int, str]]) -> Iterator[str]:
    """Yield which files of a listing the bucket does not hold as listed (P1)."""
    for entry in listing.entries:
        key = place + entry.key
        if not entry.key.startswith(f"{listing.document['node']}/"):
            yield f"{entry.path}: {entry.key} is not this node's"
        if key not in objects:
            yield f"{entry.path}: no object {key}"
            continue
        if key not in contents:
            contents[key] = (len(objects[key]), f"{zlib.crc32(objects[key]):08x}")
        if contents[key] != (entry.size, entry.crc32):
            yield f"{entry.path}: listed as {(entry.size, entry.crc32)}, {key} holds {contents[key]}"


def _odd_documents(others: Mapping[str, dict[str, Any]], objects: Objects, place: str) -> Iterator[str]:
    """Yield what is wrong with documents that are no listings."""
    newest: dict[str, list[str]] = {}  # of each tag's records, only the last counts
    for key, document in sorted(others.items()):
        if document.get("version") != VERSION:
            yield f"{key}: version {document.get('version')}"
        if ".pending-delete/" in key and not PENDING.fullmatch(os.path.basename(key)):
            yield f"{key}: not the name of anything documented"
        if "/tags/" in key:
            newest[os.path.dirname(key)] = document.get("listings", [])
    for tag, named in newest.items():
        yield from (f"{tag}: names {key}, which is not there" for key in named if place + key not in objects)


def _odd_names(objects: Objects, root: str) -> Iterator[str]:
    """Yield the keys of files whose name says another content than they have (P3)."""
    for key, body in objects.items():
        match = OTHER_CONTENT.fullmatch(key) if key.startswith(root) else None
        if match and f"{zlib.crc32(body):08x}" != match["crc32"]:
            yield f"{key}: holds {zlib.crc32(body):08x}"


def rewritten(before: Objects, after: Objects) -> list[str]:
    """Return the keys whose bytes have changed between two moments; none may (P3)."""
    return sorted(key for key in before.keys() & after.keys() if before[key] != after[key])


class Lost(NamedTuple):
    """A file that once existed and that no listing of its kind has with that content."""

    unit: Unit
    path: str
    copy: Copy


def lost(history: History, objects: Objects, node: str, prefix: str = "") -> list[Lost]:
    """Return everything that existed and is in no listing of its kind (P2)."""
    found: set[tuple[str, str, str, str | None, str, int, str]] = set()
    for listing in listings(objects, node, prefix):
        unit = (listing.of.kind, listing.of.keyspace, listing.of.table, listing.of.tag)
        found.update((*unit, entry.path, entry.size, entry.crc32) for entry in listing.entries)
    return [
        Lost(unit, path, copy)
        for unit, path, copy in history.files()
        if (*unit, path, copy.size, copy.crc32) not in found
    ]


def told_lost(objects: Objects, node: str, prefix: str = "") -> set[str]:
    """Return the names of files that listings say are gone for good."""
    return {name for listing in listings(objects, node, prefix) for name in listing.lost}


# ------------------------------------------------------------------------------------------------------------
# The source


class Seen(NamedTuple):
    """What must stay as it was about a path; `sha1` is of a file's content, and empty for anything else."""

    mode: int
    owner: tuple[int, int]
    links: int
    mtime_ns: int
    sha1: str


def survey(root: str | os.PathLike[str], leave_out: Iterable[str] = (".cassbackup",)) -> dict[str, Seen]:
    """Describe everything below a directory, but for what has one of these names (and what is in it).

    Of directories only mode and owner count: others may come and go in them.
    """
    found: dict[str, Seen] = {}
    skipped = set(leave_out)
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            found[path] = _seen(path)
    return found


def _seen(path: str) -> Seen:
    status = os.lstat(path)
    owner = (status.st_uid, status.st_gid)
    if stat.S_ISDIR(status.st_mode):
        return Seen(status.st_mode, owner, 0, 0, "")
    sha1 = ""
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            sha1 = hashlib.sha1(file.read(), usedforsecurity=False).hexdigest()
    return Seen(status.st_mode, owner, status.st_nlink, status.st_mtime_ns, sha1)


def untouched(before: Mapping[str, Seen], after: Mapping[str, Seen]) -> list[str]:
    """Return how two surveys differ; a source that was only backed up has not changed at all (P5)."""
    gone = [f"{path}: gone" for path in sorted(before.keys() - after.keys())]
    come = [f"{path}: new" for path in sorted(after.keys() - before.keys())]
    changed = [
        f"{path}: {what} was {old}, is {new}"
        for path in sorted(before.keys() & after.keys())
        for what, old, new in zip(Seen._fields, before[path], after[path], strict=True)
        if old != new
    ]
    return gone + come + changed
