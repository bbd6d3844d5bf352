"""The judge: compares a bucket with what once stood on the node; it knows the documented layout, no more.

    assert problems(bucket.objects(), "node1") == []              # listed means restorable
    assert lost(node.history, bucket.objects(), "node1") == []    # nothing is missing
    assert untouched(before, survey(node.root)) == []             # the source is as it was

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
UTC = r"\d{8}T\d{6}\.\d{6}Z"
NAME = rf"(?P<utc>{UTC})-(?P<state>complete|incomplete|rollup)-(?P<files>\d+)-(?P<bytes>\d+)\.json"
LISTINGS = {
    "snapshot": re.compile(rf"(?P<keyspace>[^/]+)/(?P<table>[^/]+)/snapshots/(?P<tag>[^/]+)/(?P<taking>[^/]+)/{NAME}"),
    "incremental": re.compile(rf"(?P<keyspace>[^/]+)/(?P<table>[^/]+)/backups/{NAME}"),
    "archive": re.compile(rf"archive/(?P<directory>[^/]+)/{NAME}"),
}
NOT_LISTINGS = re.compile(r"(owner|node)\.json|(tags|heartbeat)/.+")


class Taking(NamedTuple):
    """What listings add up to: one taking of a table's snapshot, or all of a table's incrementals.

    Of an archive, `table` is the quoted directory.
    """

    kind: str
    keyspace: str
    table: str
    tag: str | None = None
    taking: str | None = None


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
    of: Taking
    document: dict[str, Any] = field(repr=False)
    entries: list[Entry] = field(repr=False)


# ------------------------------------------------------------------------------------------------------------
# Reading a bucket


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
        elif not NOT_LISTINGS.fullmatch(below):
            raise ValueError(f"{key}: not the name of anything documented")
    return sorted(found, key=lambda listing: (listing.utc, listing.key))


def _parse(key: str, kind: str, match: re.Match[str], body: bytes) -> Listing:
    try:
        document = json.loads(body)
        entries = [
            Entry(f"{directory}/{file['name']}", file["key"], file["size"], file["crc32"])
            for directory, files in document["directories"].items()
            for file in files
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: {error!r}") from error
    named = match.groupdict()
    of = Taking(
        kind,
        named.get("keyspace", ""),
        named.get("table", named.get("directory", "")),
        named.get("tag"),
        named.get("taking"),
    )
    size = (int(named["files"]), int(named["bytes"]))
    return Listing(key, named["utc"], named["state"], *size, of, document, entries)


def current(found: Iterable[Listing]) -> list[Listing]:
    """Leave out the incremental listings that a roll-up replaces: those that its "replaces" names by key."""
    found = list(found)
    replaced = {
        (listing.of, os.path.basename(name)) for listing in found for name in listing.document.get("replaces", ())
    }
    return [listing for listing in found if (listing.of, os.path.basename(listing.key)) not in replaced]


def listed_files(objects: Objects, node: str, prefix: str = "") -> dict[Taking, dict[str, tuple[int, str]]]:
    """Return what a restore can have: taking -> path -> (size, crc32); of the same name the later counts."""
    result: dict[Taking, dict[str, tuple[int, str]]] = {}
    for listing in current(listings(objects, node, prefix)):
        files = result.setdefault(listing.of, {})
        files.update({entry.path: (entry.size, entry.crc32) for entry in listing.entries})
    return result


def complete(objects: Objects, node: str, prefix: str = "") -> set[Taking]:
    """Return the takings that some listing of theirs calls complete."""
    return {found.of for found in listings(objects, node, prefix) if found.state == "complete"}


# ------------------------------------------------------------------------------------------------------------
# Judging it


def problems(objects: Objects, node: str, prefix: str = "") -> list[str]:
    """Return where the listings contradict themselves or the bucket; none may, at any moment."""
    try:
        found = listings(objects, node, prefix)
    except ValueError as error:
        return [str(error)]
    contents: dict[str, tuple[int, str]] = {}
    return [
        f"{listing.key}: {wrong}"
        for listing in found
        for wrong in (*_contradictions(listing), *_absent(listing, objects, place(prefix), contents))
    ]


def _contradictions(listing: Listing) -> Iterator[str]:
    """Yield where a listing's name and its text disagree."""
    document = listing.document
    missing = {"version", "node", "kind", "complete", "listed"} - set(document)
    if missing:
        yield f"lacks {sorted(missing)}"
        return
    said = (listing.files, listing.bytes)
    meant = (len(listing.entries), sum(entry.size for entry in listing.entries))
    if said != meant:
        yield f"its name says {said} files and bytes, its text {meant}"
    if listing.state != "rollup" and (listing.state == "complete") != document["complete"]:
        yield f"its name says {listing.state}, its text complete: {document['complete']}"
    if (listing.state == "rollup") != bool(document.get("replaces")):
        yield f"its name says {listing.state}, its text replaces {document.get('replaces')}"
    expected = {"keyspace": listing.of.keyspace, "tag": listing.of.tag, "taking": listing.of.taking}
    if listing.of.kind != "archive":
        expected["kind"] = listing.of.kind
    for name, value in expected.items():
        if value and document.get(name) not in {value, unquote(value)}:
            yield f"its name says {name} {value}, its text {document.get(name)}"


def _absent(listing: Listing, objects: Objects, place: str, contents: dict[str, tuple[int, str]]) -> Iterator[str]:
    """Yield which files of a listing the bucket does not hold as listed."""
    for entry in listing.entries:
        key = place + entry.key
        if key not in objects:
            yield f"{entry.path}: no object {key}"
            continue
        if key not in contents:
            contents[key] = (len(objects[key]), f"{zlib.crc32(objects[key]):08x}")
        if contents[key] != (entry.size, entry.crc32):
            yield f"{entry.path}: listed as {(entry.size, entry.crc32)}, {key} holds {contents[key]}"


class Lost(NamedTuple):
    """A file that once existed and that no listing of its kind has with that content."""

    unit: Unit
    path: str
    copy: Copy


def lost(history: History, objects: Objects, node: str, prefix: str = "") -> list[Lost]:
    """Return everything that existed and is in no listing of its kind."""
    found: set[tuple[str, str, str, str | None, str, int, str]] = set()
    for listing in current(listings(objects, node, prefix)):
        unit = (listing.of.kind, listing.of.keyspace, listing.of.table, listing.of.tag)
        found.update((*unit, entry.path, entry.size, entry.crc32) for entry in listing.entries)
    return [
        Lost(unit, path, copy)
        for unit, path, copy in history.files()
        if (*unit, path, copy.size, copy.crc32) not in found
    ]


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
    """Return how two surveys differ; a source that was only backed up has not changed at all."""
    gone = [f"{path}: gone" for path in sorted(before.keys() - after.keys())]
    come = [f"{path}: new" for path in sorted(after.keys() - before.keys())]
    changed = [
        f"{path}: {what} was {old}, is {new}"
        for path in sorted(before.keys() & after.keys())
        for what, old, new in zip(Seen._fields, before[path], after[path], strict=True)
        if old != new
    ]
    return gone + come + changed
