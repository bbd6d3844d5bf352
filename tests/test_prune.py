"""Prune errs on keeping: retention as a pure function, the protocol without a lock as a model, the command on buckets.

P1 and P7, over random interleavings of prunes that die and daemons that publish: what is listed is there.
"""

from __future__ import annotations

import json
import math
import random
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import cassbackup as cb
from cassbackup import Filed, Head, Listing, Publisher, Pruning, Retention, Retrying, Stamp, Stored, Taking, Unit, utc

HOUR, DAY = 3600.0, 86400.0
NODE, KEYSPACE, TABLE = "node1", "ks", "users-" + "5a" * 16
EPOCH = cb.seconds_of("20260101T000000.000000Z")  # a Thursday


def unit_of(tag: str, since: float) -> Unit:
    """Return the unit of a snapshot, or without a tag of a batch."""
    return Unit("snapshot" if tag else "incremental", KEYSPACE, TABLE, tag, utc(since))


def entry_of(unit: Unit, name: str, mtime: float, crc32: int = 1, seen: str = "", inode: int = 7) -> Stored:
    """Return an entry as a daemon of one data directory would list it."""
    folder = f"/d/{KEYSPACE}/{TABLE}/" + (f"snapshots/{unit.tag}" if unit.kind == "snapshot" else "backups")
    stamp = Stamp("area", inode, 10, int(mtime * 1e9))
    return Stored(folder, name, stamp, 0o644, "c", "c", cb.hex32(crc32), f"{NODE}{folder}/{name}", "etag", seen=seen)


# ------------------------------------------------------------------------------------------------------------
# The protocol: prunes and daemons, one operation of the store at a time, in any order


class Killed(Exception):
    """What a process that was killed sees of its store."""


class Shelf:
    """The objects of a store whose time the test moves, and what must never be untrue of them."""

    def __init__(self) -> None:
        self.now = EPOCH
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.ever: dict[str, bytes] = {}
        self.named: dict[str, frozenset[str]] = {}
        self.deleted = 0

    def put(self, key: str, body: bytes) -> None:
        assert self.ever.setdefault(key, body) == body, f"P3: {key} has other bytes"
        self.objects[key] = (body, self.now)
        if ".listings/" in key:
            self.named[key] = frozenset(entry.key for entry in cb.load_listing(body).files)
            assert not self.named[key] - self.objects.keys(), f"P1: {key} lists what is not there"

    def delete(self, key: str) -> None:
        named_by = [listing for listing, named in self.named.items() if key in named]
        assert not named_by, f"P1: {key} is deleted, and named by {named_by}"
        if self.named.pop(key, None) and "-complete-" in key and "/snapshots/" in key:
            assert any("-complete-" in other for other in self.named if "/snapshots/" in other), "P7: the last good one"
        self.deleted += self.objects.pop(key, None) is not None and key.startswith(f"{NODE}/")


class Door:
    """The store as one process sees it; each operation waits for its turn."""

    url, ordered = "memory://", False
    begin = put_part = parts = match = finish = abandon = None

    def __init__(self, shelf: Shelf, turn: Callable[[], None]) -> None:
        self.shelf, self.turn = shelf, turn

    def now(self) -> float:
        return self.shelf.now

    def put(self, key: str, body: bytes, crc32: int) -> Head:
        self.turn()
        if key in self.shelf.objects:
            raise cb.Conflict(key)
        self.shelf.put(key, bytes(body))
        return self._head(key)

    def head(self, key: str) -> Head | None:
        self.turn()
        return self._head(key) if key in self.shelf.objects else None

    def get(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        self.turn()
        if key not in self.shelf.objects:
            raise cb.Missing(key)
        yield self.shelf.objects[key][0][start:end]

    def list(self, prefix: str, after: str = "") -> Iterator[Head]:
        """Yield pages of three, between which things come and go."""
        while True:
            self.turn()
            page = sorted(key for key in self.shelf.objects if key.startswith(prefix) and key > after)[:3]
            yield from [self._head(key) for key in page]
            if len(page) < 3:
                return
            after = page[-1]

    def folders(self, prefix: str) -> Iterator[str]:
        raise NotImplementedError

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        for key in keys:
            self.turn()
            self.shelf.delete(key)
        return {}

    def _head(self, key: str) -> Head:
        body, modified = self.shelf.objects[key]
        crc32 = cb.hex32(zlib.crc32(body))
        return Head(key, len(body), crc32, modified, crc32)


class Actor(threading.Thread):
    """A process: it runs from one operation to the next when it is told to, and may be killed before any."""

    def __init__(self, shelf: Shelf, work: Callable[[Actor], object]) -> None:
        super().__init__(daemon=True)
        self.store = Retrying(Door(shelf, self._turn), lambda _: False, 0.0, cb.Budget(0))  # type: ignore[arg-type]
        self.shelf, self.work = shelf, work
        self.go, self.parked = threading.Semaphore(0), threading.Semaphore(0)
        self.killed, self.ended = False, False
        self.deadline, self.moved = math.inf, shelf.now
        self.error: BaseException | None = None
        self.start()
        self.parked.acquire()

    def _turn(self) -> None:
        if not self.killed:
            self.parked.release()
            self.go.acquire()
        if self.killed:
            raise Killed

    def run(self) -> None:
        try:
            self._turn()
            self.work(self)
        except (Killed, cb.Missing):  # Missing: another prune deleted what was about to be read; that ends a run
            pass
        except BaseException as error:  # noqa: BLE001 - for the test to raise
            self.error = error
        self.ended = True
        self.parked.release()

    def step(self, kill: bool = False) -> None:
        """Let it do one operation, or die before it."""
        self.killed, self.moved = kill, self.shelf.now
        self.go.release()
        self.parked.acquire()
        if self.error:
            raise self.error


class Daemon:
    """Flushes, snapshots and compactions of one table, stored and published as the real daemon does it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.known: dict[tuple[str, Stamp], tuple[Stored, float]] = {}  # the ledger: entry, confirmed at
        self.live: list[tuple[str, float]] = []
        self.flushed, self.newest = 0, utc(EPOCH)

    def clock(self) -> str:
        self.newest = cb.later(utc(self.actor.shelf.now), self.newest)
        return self.newest

    def live_on(self, actor: Actor) -> None:
        """Run for ever; a new process has its ledger, or lost it."""
        self.actor = actor
        if self.chance.random() < 0.3:
            self.known.clear()
        self.publisher = Publisher(actor.store, NODE, self.is_fresh)
        while True:
            what = self.chance.random()
            if what < 0.5 or not self.live:
                self.flushed += 1
                self.live.append((f"nb-{self.flushed}-big-Data.db", actor.shelf.now))
                self.publish(unit_of("", actor.shelf.now), self.live[-1:])
            elif what < 0.8:
                self.snapshot(self.chance.choice(["daily", "weekly", "by-hand"]))
            else:
                del self.live[: self.chance.randrange(3)]

    def snapshot(self, tag: str) -> None:
        now = self.actor.shelf.now
        self.publish(unit_of(tag, now), [*self.live, ("manifest.json", now), ("schema.cql", now)])
        self.publisher.roll_up(unit_of(tag, now), self.clock(), self.clock)

    def publish(self, unit: Unit, files: Iterable[tuple[str, float]]) -> None:
        entries = tuple(self.stored(unit, *file) for file in files)
        if self.chance.random() < 0.3:
            self.actor._turn()  # some time goes by
        self.actor.deadline = self.actor.shelf.now + HOUR
        listing = self.publisher.publish(Listing(NODE, unit, "", True, entries), self.again, "", self.clock)
        self.actor.deadline = math.inf
        for entry in listing.files:
            self.record(entry)

    def stored(self, unit: Unit, name: str, mtime: float) -> Stored:
        """Store a file, unless its stamp is known; schema.cql is the same bytes each time, and has a new stamp."""
        body = b"CREATE" if name == "schema.cql" else f"{name} of {mtime}".encode()
        if name == "manifest.json":
            body = json.dumps({"files": [one for one, _ in self.live], "at": mtime}).encode()
        entry = entry_of(unit, name, mtime, zlib.crc32(body))
        entry = replace(entry, stamp=entry.stamp._replace(size=len(body)), etag=entry.crc32)
        if known := self.known.get((name, entry.stamp)):
            return replace(entry, key=known[0].key)
        return self.put(entry, body, (entry.key, f"{entry.key}@{entry.crc32}"))

    def put(self, entry: Stored, body: bytes, keys: Sequence[str]) -> Stored:
        try:
            self.actor.store.put(keys[0], body, zlib.crc32(body))
        except cb.Conflict:
            return self.put(entry, body, keys[1:])
        return self.record(replace(entry, key=keys[0]))

    def again(self, entry: Stored) -> Stored | None:
        body = next(body for key, body in self.actor.shelf.ever.items() if key == entry.key)
        return self.put(entry, body, [f"{entry.key.partition('@')[0]}@{self.clock()}"])

    def record(self, entry: Stored) -> Stored:
        self.known[entry.name, entry.stamp] = (entry, self.actor.shelf.now)
        return entry

    def is_fresh(self, entry: Stored) -> bool:
        known = self.known.get((entry.name, entry.stamp))
        return bool(known and known[0].key == entry.key and self.actor.shelf.now - known[1] < cb.FRESH_S)


def prune_with(retention: Retention) -> Callable[[Actor], None]:
    """Return what a prune does."""

    def work(actor: Actor) -> None:
        pruning = Pruning(actor.store, NODE)
        pruning.plan(retention, 1)
        pruning.confirm()

    return work


def pass_time(chance: random.Random, shelf: Shelf, actors: Sequence[Actor]) -> None:
    """Let seconds or a day go by; nobody publishes for longer than an hour, or stands still in a prune for a day."""
    shelf.now += chance.choice([0, 0, 1, 20])
    if chance.random() < 0.03:
        jump = chance.choice([600.0, HOUR, 6 * HOUR, DAY - 60, DAY, DAY + 60])
        for actor in actors:
            while shelf.now + jump > actor.deadline - 60:
                actor.step()
        shelf.now += jump
    for actor in actors:
        while shelf.now > actor.deadline - 60:
            actor.step()


def play(seed: int, moves: int = 1500) -> int:
    """Play one random history and return how many objects were deleted in it."""
    chance, shelf = random.Random(seed), Shelf()
    daemon = Daemon(chance)
    actors = [Actor(shelf, daemon.live_on)]
    try:
        for _ in range(moves):
            pass_time(chance, shelf, actors)
            if len(actors) < 3 and chance.random() < 0.03:
                terms = Retention(chance.randrange(2), chance.choice([0, HOUR, DAY]), chance.randrange(3), force=True)
                actors.append(Actor(shelf, prune_with(terms)))
            actor = chance.choice(actors)
            actor.step(kill=chance.random() < 0.003 or (actor is not actors[0] and shelf.now - actor.moved > DAY / 2))
            actors = [actor for actor in actors if not actor.ended]
            if daemon.actor.ended:
                actors.insert(0, Actor(shelf, daemon.live_on))
    finally:
        for actor in actors:
            if not actor.ended:
                actor.step(kill=True)
    return shelf.deleted


@pytest.mark.parametrize("seed", range(30))
def test_no_listing_that_is_there_ever_loses_an_object_whatever_dies_between_a_daemon_and_prunes(seed: int) -> None:
    """P1, P3 and P7: each step is a crash point, days go by, and two prunes may run at once."""
    assert play(seed) > 0
