"""Engine C: a state machine does to a node, a daemon and a bucket whatever may happen to them, in any order.

After each step the bucket is true (P1, P3). Whenever all has settled, everything that the daemon could have held is
listed (P2), nothing is left pinned, and the source is as its owner left it (P5). What was cleared while no daemon ran
was nobody's to hold: it is not expected.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import oracle
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from oracle import Listing
from tree import Copy, History, Table, Unit

from faults.kit import ALL, PATIENCE_S, Process, Program, World, score
from faults.test_matrix import age

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
SHARDS = 8 if ALL else 1
EXAMPLES = 60 if ALL else 3
STEPS = 50 if ALL else 25
TAGS = st.sampled_from(["daily", "weekly"])
DAMAGES = st.sampled_from(["truncate", "flip", "zero", "delete", "lose state", "roll back", "junk log"])


class Model(RuleBasedStateMachine):
    """The node and the daemon; `expected` is what must be listed once all has settled."""

    program: Program
    at: Path

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Path(tempfile.mkdtemp(dir=self.at)), self.program)
        self.expected: History = self.world.node.history
        self.tables: list[Table] = []
        self.process: Process | None = None
        self.up = True
        self.old = self.world.at / "old-state"

    @initialize(number=st.integers(1, 3))
    def begin(self, number: int) -> None:
        self.tables = [self.world.node.table("ks1", f"t{one}", ["by_x"] * (one % 2)) for one in range(number)]
        self.start()
        # Who died before it remembered its bucket is new again, and would begin one below an empty mount point.
        self.world.until(lambda: "storing node=" in self.world.log(), "it has begun the bucket, and remembers that")

    # What Cassandra does.

    @rule(which=st.integers(0, 2), size=st.sampled_from([0, 10, 5000]))
    def write(self, which: int, size: int) -> None:
        self._table(which).flush(size=size)

    @rule(which=st.integers(0, 2))
    def compact(self, which: int) -> None:
        self._table(which).compact()

    @rule(which=st.integers(0, 2))
    def replace(self, which: int) -> None:
        self._table(which).rewrite_statistics()

    @rule(tag=TAGS, which=st.integers(0, 2))
    def snapshot(self, tag: str, which: int) -> None:
        table = self._table(which)
        if not any((folder / "snapshots" / tag).exists() for folder in table.directories()):
            table.snapshot(tag)

    @rule(tag=TAGS)
    def clear(self, tag: str) -> None:
        self._until_held(lambda unit: unit.tag == tag)
        self.world.node.clear(tag)

    @rule(tag=TAGS, which=st.integers(0, 2))
    def take_the_tag_again(self, tag: str, which: int) -> None:
        self.clear(tag)
        self._table(which).snapshot(tag)

    @rule(which=st.integers(0, 2))
    def begin_the_numbers_again(self, which: int) -> None:
        table = self._table(which)
        self._until_held(lambda unit: unit.kind == "incremental" and unit.table == table.directories()[0].name)
        for folder in table.directories():
            for path in [*folder.glob("backups/*.db"), *folder.glob("backups/*-*"), *folder.glob("backups/.*/*")]:
                path.unlink(missing_ok=True)
        table.compact()
        table.restart()

    # What becomes of the daemon.

    @precondition(lambda self: self.process)
    @rule(after=st.sampled_from([0, 0, 0.05, 0.3]))
    def kill(self, after: float) -> None:
        time.sleep(after)
        assert self.process
        self.process.kill()
        self.process = None

    @precondition(lambda self: self.process)
    @rule()
    def stop(self) -> None:
        assert self.process
        self.process.signal(signal.SIGTERM)
        code = self.process.wait()
        assert code == 0, f"SIGTERM: exit {code}"
        self.process = None

    @precondition(lambda self: not self.process)
    @rule()
    def start(self) -> None:
        self.process = self.world.watch()
        process = self.process
        self.world.until(lambda: self.world.status().get("pid") == process.pid or not process.poll(), "it starts")
        assert process.poll(), f"it ended: {self.world.log()[-2000:]}"

    @precondition(lambda self: not self.process)
    @rule(how=DAMAGES, number=st.integers(0, 1 << 20))
    def damage_the_ledger(self, how: str, number: int) -> None:
        state, ledger = self.world.state, self.world.state / "ledger.db"
        if how == "lose state":
            shutil.rmtree(state, ignore_errors=True)
        elif how == "roll back":
            if self.old.exists():
                shutil.rmtree(state, ignore_errors=True)
                shutil.copytree(self.old, state)
            elif state.exists():
                shutil.copytree(state, self.old, ignore=shutil.ignore_patterns("socket*"))
        elif ledger.exists():
            damage(ledger.with_name("ledger.db-wal") if how == "junk log" else ledger, how, number)

    # What becomes of the bucket.

    @precondition(lambda self: self.up)  # only on what the model itself did: the daemon's pace is not repeatable
    @rule()
    def store_down(self) -> None:
        os.rename(self._bucket, f"{self._bucket}.away")
        self.up = False

    @precondition(lambda self: not self.up)
    @rule()
    def store_up(self) -> None:
        # A put that was under way may have made directories for its key; files would hide the disk's.
        assert not [path for path in self._bucket.rglob("*") if path.is_file()], "stored on a disk that is not there"
        shutil.rmtree(self._bucket, ignore_errors=True)
        os.rename(f"{self._bucket}.away", self._bucket)
        self.up = True

    @precondition(lambda self: self.up and not self.process)
    @rule()
    def bucket_made_anew(self) -> None:
        """What is on disk, and what is pinned, is stored again; what was listed only there is gone."""
        pinned = self.world.held()
        for name in os.listdir(self._bucket):
            shutil.rmtree(self._bucket / name)
        (self._bucket / ".unfinished").mkdir()  # by which a disk that is mounted is told from one that is not
        self.world.before = {}
        self._expect_only(lambda unit, path, copy: (path, copy.size, copy.crc32) in pinned or copy_at(path) == copy)

    @precondition(lambda self: self.up)
    @rule(confirm=st.booleans(), later=st.booleans())
    def prune(self, confirm: bool, later: bool) -> None:
        before = self._listings()
        newest = last_good(before)
        args = ["prune", "--keep-last", "1", "--keep-within", "1h", *(["--confirm"] if confirm else [])]
        code = self.world.command(*args).wait()
        assert code in {0, 1}, self.world.log()[-2000:]
        if later:
            age(self.world)
        after = self._listings()
        later_ones = last_good(after)
        assert [one for one, taken in newest.items() if later_ones.get(one, "") < taken] == [], "P7"
        gone = {found.key for found in before} - {found.key for found in after}
        assert confirm or not gone
        left = {fact for found in after for fact in facts(found)}
        lost = {fact for found in before if found.key in gone for fact in facts(found)} - left
        self._expect_only(lambda unit, path, copy: (unit, path, copy.size, copy.crc32) not in lost)

    @precondition(lambda self: self.up)
    @rule()
    def verify(self) -> None:
        is_empty = not self._listings()
        code = self.world.command("verify", "--deep").wait()
        assert code == 0 or is_empty, f"verify: exit {code}: {self.world.log()[-2000:]}"

    @precondition(lambda self: self.up)
    @rule(tag=TAGS)
    def restore(self, tag: str) -> None:
        into = Path(tempfile.mkdtemp(dir=self.world.at))
        code = self.world.command("restore", "--tag", tag, "--into", into).wait()
        there = {Copy.of(path.read_bytes()) for path in into.rglob("*") if path.is_file()}
        assert {(one.size, one.crc32) for one in there} <= {
            (one.size, one.crc32) for found in self._listings() for one in found.entries
        }
        good = [one for one in self._listings() if one.of.tag == tag and one.state == "complete"]
        assert code or good, "P6: done, and there is no snapshot"
        shutil.rmtree(into)

    @precondition(lambda self: self.up and self.process)
    @rule()
    def settle(self) -> None:
        assert self.process
        self.world.settle(self.process)
        self._compare()

    # What must hold.

    def check(self) -> None:
        """P1 and P3, after each step."""
        if self.up:
            assert self.world.judge() == []

    def teardown(self) -> None:
        try:
            if not self.tables:
                return
            if not self.up:
                self.store_up()
            if self.process:
                self.kill(0)
            self.start()
            self.settle()
            wrong = unlike(self.world.node.root / "data")
            assert wrong == [], "P5"
        finally:
            if self.process:
                self.process.kill()
            shutil.rmtree(self.world.at)

    def _compare(self) -> None:
        wrong = self.world.judge(done=True)
        score(lost=sum("LOST" in one for one in wrong), false_done=bool(wrong))
        assert wrong == []

    @property
    def _bucket(self) -> Path:
        return self.world.at / "bucket"

    def _table(self, which: int) -> Table:
        return self.tables[which % len(self.tables)]

    def _listings(self) -> list[Listing]:
        return oracle.listings(self.world.bucket.objects(), "node1")

    def _until_held(self, is_meant: Callable[[Unit], bool]) -> None:
        """Wait until the daemon holds what will go; without one, expect only what is held."""

        deadline = time.monotonic() + PATIENCE_S
        while (
            gone := [one for one in self.world.unheld(self._listing_texts()) if is_meant(one.unit)]
        ) and self.process:
            assert time.monotonic() < deadline, f"P2: not held: {gone}"
            assert self.process.poll(), self.world.log()[-2000:]
            time.sleep(0.02)
        lost = set(gone)
        self._expect_only(lambda *one: oracle.Lost(*one) not in lost)

    def _listing_texts(self) -> dict[str, bytes]:
        """Return the listings, wherever the bucket is now."""
        bucket = self._bucket if self.up else Path(f"{self._bucket}.away")
        return {
            str(path.relative_to(bucket)): path.read_bytes() for path in bucket.glob("node1.listings/ks1/**/*.json")
        }

    def _expect_only(self, is_expected: Callable[[Unit, str, Copy], bool]) -> None:
        for unit, path, copy in list(self.expected.files()):
            if not is_expected(unit, path, copy):
                self.expected[unit][path].remove(copy)


def damage(path: Path, how: str, number: int) -> None:
    """Do to a file what a power cut or a bad disk may."""
    body = bytearray(path.read_bytes() if path.exists() else b"")
    if how == "truncate":
        del body[number % (len(body) + 1) :]
    elif how == "flip" and body:
        body[number % len(body)] ^= 1 << number % 8
    elif how == "zero":
        body = bytearray(len(body))
    elif how == "junk log":
        body = bytearray(random.Random(number).randbytes(5000))
    path.unlink(missing_ok=True)
    if how != "delete":
        path.write_bytes(body)


def copy_at(path: str) -> Copy | None:
    """Return what is at a path now."""
    with contextlib.suppress(OSError):
        return Copy.of(Path(path).read_bytes())
    return None


def facts(found: Listing) -> set[tuple[Unit, str, int, str]]:
    """Return what a listing says, as the history says it."""
    unit = Unit(found.of.kind, found.of.keyspace, found.of.table, found.of.tag)  # type: ignore[arg-type]
    return {(unit, entry.path, entry.size, entry.crc32) for entry in found.entries}


def last_good(listings: list[Listing]) -> dict[str, str]:
    """Return of each table when the newest of its complete snapshots was taken."""
    newest: dict[str, str] = {}
    for found in listings:
        if found.of.kind == "snapshot" and found.state == "complete":
            newest[found.of.table] = max(newest.get(found.of.table, ""), found.document["taken"])
    return newest


def unlike(root: Path) -> list[str]:
    """Return the files that have more names than the tree has: somebody keeps a link."""
    names: collections.Counter[int] = collections.Counter()
    links = {}
    for folder, _, files in os.walk(root):
        for name in files:
            info = os.stat(os.path.join(folder, name))
            names[info.st_ino] += 1
            links[info.st_ino] = (info.st_nlink, os.path.join(folder, name))
    return [f"{path}: {count} links" for inode, (count, path) in links.items() if count != names[inode]]


@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_happens_in_any_order_nothing_is_lost_row3_row6_row7_row19_row32(
    tmp_path: Path, program: Program, shard: int
) -> None:
    class Counted(Model):
        steps = 0

        def check_invariants(self, *args: object, **more: object) -> None:
            self.steps += 1
            self.check()
            super().check_invariants(*args, **more)  # type: ignore[misc]

        def teardown(self) -> None:
            score(model_steps=self.steps)
            super().teardown()

    Counted.program, Counted.at = program, tmp_path
    machine = seed(shard + 1)(Counted)
    how = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(machine, settings=how)
