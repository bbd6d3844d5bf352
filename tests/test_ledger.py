"""The ledger, a memory that may be lost: P4, losing or corrupting it costs time, never data, never a false "done"."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cassbackup import CONFIRMED_S, Fingerprint, Known, Ledger, Pinned, Remembered, Stored, mark_of, quote

SCOPE = "node1 s3://bucket/prefix"
ROWS = 40
LIFE, LATER_LIFE = "20261121T202438.123456Z", "20261122T000000.000000Z"
Open = Callable[..., Ledger]


def entry(number: int, name: str = "", kind: type[Known] = Stored) -> Known:
    """Return a file like no other."""
    fingerprint = Fingerprint(number, number * 7, 1_795_000_000_000_000_000 + number)
    name = name or f"nb-{number}-big-Data.db"
    crc32 = f"{number:08x}"
    key = f"node1/d/{quote(name)}"
    return kind("/d", name, fingerprint, 0o644, "cassandra", "cassandra", crc32, key, f'"{number}"')


def directory(number: int) -> str:
    return f"/data/ks/table{number}/backups"


def marks(number: int) -> set[int]:
    return {mark_of(entry(n).name, entry(n).fingerprint) for n in range(number, number + 3)}


def on_disk(*entries: Known) -> list[tuple[str, Known]]:
    return [("disk1", one) for one in entries]


def pin_of(one: Known, disk: str = "disk1") -> Pinned:
    return Pinned(one.directory, one.name, one.fingerprint, one.mode, 0, 0, 1, "", disk)


def remembered(ledger: Ledger, one: Known, place: str = "place", disk: str = "disk1") -> Remembered | None:
    return ledger.lookup(place, [pin_of(one, disk)]).get((one.path, one.fingerprint))


def look(ledger: Ledger, one: Known, place: str = "place", disk: str = "disk1") -> tuple[str, str, str] | None:
    found = remembered(ledger, one, place, disk)
    return found[:3] if found else None


def is_fresh(ledger: Ledger, one: Known) -> bool:
    found = remembered(ledger, one)
    return found is not None and ledger.is_fresh(found)


def fill(ledger: Ledger, rows: int = ROWS) -> None:
    """Write rows of every kind."""
    if not ledger.bucket:
        ledger.forget("id-of-the-bucket")
    ledger.record("place", on_disk(*[entry(number) for number in range(rows)]))
    for number in range(rows // 10):
        ledger.add_listed("", LIFE, {directory(number): marks(number)})
        ledger.remember(f"complete:ks/table{number}", f"taken {number}")


def listed(ledger: Ledger) -> dict[str, tuple[str, set[int]]]:
    """Return what is listed; a mark that is remembered twice counts once."""
    return {folder: (life, set(marks)) for folder, (life, marks) in ledger.listed().items()}


def lies(ledger: Ledger, rows: int = ROWS) -> list[str]:
    """Return what a ledger says that `fill` did not write; what it has forgotten is no lie."""
    found = []
    for number in range(rows):
        one = entry(number)
        if look(ledger, one) not in (None, (one.key, one.etag, one.crc32)):
            found.append(f"stored: {look(ledger, one)}")
    true = {directory(number): ("", marks(number)) for number in range(rows // 10)}
    found += [f"listed: {item}" for item in listed(ledger).items() if item not in true.items()]
    facts = {f"ks/table{number}": f"taken {number}" for number in range(rows // 10)}
    found += [f"fact: {item}" for item in ledger.facts("complete:").items() if item not in facts.items()]
    if ledger.bucket not in ("", "id-of-the-bucket"):
        found.append(f"bucket: {ledger.bucket}")
    return found


def knows_nothing(ledger: Ledger) -> bool:
    return not listed(ledger) and not ledger.facts("") and not any(look(ledger, entry(n)) for n in range(ROWS))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """Return a function that opens the ledger; it is closed in the end."""
    with contextlib.ExitStack() as stack:

        def start(scope: str = SCOPE, at: Path = path) -> Ledger:
            ledger = Ledger(str(at), scope)
            stack.callback(ledger.close)
            return ledger

        yield start


@pytest.fixture
def written(path: Path) -> Path:
    """Return the file of a ledger that was filled and closed, everything in the one file."""
    ledger = Ledger(str(path), SCOPE)
    fill(ledger)
    ledger.close()
    assert not path.with_name(path.name + "-wal").exists()
    return path


# ------------------------------------------------------------------------------------------------------------
# Memory


def test_what_was_written_is_known_after_a_restart(written: Path, opened: Open) -> None:
    ledger = opened()
    one = entry(7)
    assert look(ledger, one) == (one.key, one.etag, one.crc32)
    assert listed(ledger)[directory(3)] == ("", marks(3))
    assert ledger.fact("complete:ks/table3") == "taken 3"
    assert ledger.facts("complete:ks/") == {f"table{number}": f"taken {number}" for number in range(ROWS // 10)}
    assert (ledger.bucket, lies(ledger), ledger.broken) == ("id-of-the-bucket", [], "")


def test_other_bytes_of_that_name_or_on_another_disk_are_not_known(opened: Open) -> None:
    ledger, one = opened(), entry(7)
    ledger.record("place", on_disk(one))
    assert not look(ledger, one, place="elsewhere")
    assert not look(ledger, one, disk="disk2")
    for change in ({"inode": 8}, {"size": 1}, {"mtime_ns": 1}):
        assert not look(ledger, replace(one, fingerprint=one.fingerprint._replace(**change)))
    assert not look(ledger, replace(one, name="other.db"))


def test_many_files_are_looked_up_at_once_each_by_its_own_bytes(opened: Open) -> None:
    ledger = opened()
    ledger.record("place", on_disk(*[entry(number) for number in range(0, 2400, 2)]))
    found = ledger.lookup("place", [pin_of(entry(number)) for number in range(2400)])
    assert {path: one.key for (path, _), one in found.items()} == {
        entry(number).path: entry(number).key for number in range(0, 2400, 2)
    }
    assert ledger.lookup("place", []) == {}


@pytest.mark.parametrize("raw", [b"\xff\xfe.db", "é\n\t.db".encode(), b"a%0Ab", b"tab\there", b"~\xf4\x8f\xbf\xbf"])
def test_names_of_any_bytes_are_remembered(opened: Open, raw: bytes) -> None:
    name, ledger = os.fsdecode(raw), opened()
    odd = entry(1, name)
    ledger.record(name, on_disk(odd))
    ledger.add_listed(LIFE, LIFE, {f"/d/{name}": {1, 1 << 63}})
    ledger.remember(f"complete:{name}", name)
    assert look(ledger, odd, place=name)
    assert listed(ledger) == {f"/d/{name}": (LIFE, {1, 1 << 63})}
    assert ledger.facts("complete:") == {name: name}
    assert not ledger.broken


def test_a_fact_is_not_that_of_a_longer_name(opened: Open) -> None:
    ledger = opened()
    ledger.remember("lost:ks/table10", "1")
    assert ledger.fact("lost:ks/table1") == ""
    ledger.remember("lost:ks/table1", "2")
    ledger.remember("lost:ks/table10", "")
    assert ledger.facts("lost:") == {"ks/table1": "2"}


def test_of_a_tag_only_the_newest_life_counts_and_all_of_its_listings(opened: Open) -> None:
    ledger = opened()
    ledger.add_listed(LATER_LIFE, "3", {"/d": {3}})
    ledger.add_listed(LIFE, "1", {"/d": {1, 2}, "/d/.idx": {9}})
    ledger.add_listed(LATER_LIFE, "4", {"/d": {4}})
    assert listed(ledger) == {"/d": (LATER_LIFE, {3, 4}), "/d/.idx": (LIFE, {9})}


def test_marks_of_files_that_are_gone_go_and_those_listed_meanwhile_stay(opened: Open) -> None:
    ledger = opened()
    for number in range(100):
        ledger.add_listed("", f"{number:03}", {"/d": {number}, "/other": {number}})
    ledger.add_listed("", "200", {"/d": {200}})
    ledger.replace_listed("/d", "", "150", range(50, 60))
    assert listed(ledger) == {"/d": ("", {*range(50, 60), 200}), "/other": ("", {*range(100)})}
    assert ledger._db.execute("SELECT count(*) FROM listed WHERE directory = '/d'").fetchone() == (2,)


def test_a_directory_that_is_gone_is_forgotten_and_its_neighbour_is_not(opened: Open) -> None:
    ledger = opened()
    for folder in ("/d", "/d1"):
        ledger.add_listed(LIFE, LIFE, {folder: {1}})
    ledger.forget_directory("/d")
    assert listed(ledger) == {"/d1": (LIFE, {1})}


def test_bytes_that_nobody_spoke_of_for_long_are_forgotten(opened: Open) -> None:
    ledger = opened()
    fill(ledger)
    ledger.trim(time.time() - 60)
    assert look(ledger, entry(7))
    ledger.trim(time.time() + 60)
    assert not look(ledger, entry(7))
    assert listed(ledger)


# ------------------------------------------------------------------------------------------------------------
# Fresh: the store's own word, of this process, of the last twelve hours


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets time pass, also while the machine sleeps."""
    real, passed = time.clock_gettime, [0.0]
    monkeypatch.setattr(time, "clock_gettime", lambda which: real(which) + passed[0])
    return lambda seconds: passed.append(passed.pop() + seconds)


def test_only_what_this_process_stored_within_twelve_hours_is_fresh(opened: Open, clock: Callable[..., None]) -> None:
    """P1: the rest is asked for again."""
    ledger = opened()
    ledger.record("place", on_disk(entry(1), entry(2, kind=Known)))
    assert is_fresh(ledger, entry(1))
    assert not is_fresh(ledger, entry(2)), "a listing said so, not the store"
    clock(CONFIRMED_S - 60)
    assert is_fresh(ledger, entry(1))
    clock(120)
    assert look(ledger, entry(1))
    assert not is_fresh(ledger, entry(1))


def test_p1_a_clock_that_goes_back_makes_no_old_word_fresh(opened: Open, clock: Callable[..., None]) -> None:
    ledger = opened()
    ledger.record("place", on_disk(entry(1)))
    clock(CONFIRMED_S + 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        assert not is_fresh(ledger, entry(1))


def test_p1_what_an_earlier_process_stored_is_known_and_not_fresh(written: Path, opened: Open) -> None:
    assert look(opened(), entry(1))
    assert not is_fresh(opened(), entry(1))


# ------------------------------------------------------------------------------------------------------------
# Another bucket, another life of it


@pytest.mark.parametrize(
    "scope", ["", "node2 s3://bucket/prefix", "node1 s3://bucket/prefix2", "node1 gs://bucket/prefix"]
)
def test_p4_a_ledger_of_another_bucket_or_node_says_nothing(written: Path, opened: Open, scope: str) -> None:
    ledger = opened(scope)
    assert ledger.bucket == ""
    assert knows_nothing(ledger)


def test_p4_a_bucket_that_was_made_anew_forgets_all(written: Path, opened: Open) -> None:
    ledger = opened()
    ledger.record("place", on_disk(entry(1)))
    ledger.forget("another-id")
    assert look(ledger, entry(1)) is None
    assert (listed(ledger), ledger.facts("complete:")) == ({}, {})
    ledger.record("place", on_disk(entry(1)))
    ledger.close()
    again = opened()
    assert again.bucket == "another-id"
    assert look(again, entry(1))
    assert lies(again) == ["bucket: another-id"]


@pytest.mark.parametrize(("refused", "bucket"), [("DELETE", "another-id"), ("INSERT", "")])
def test_p4_what_could_not_be_deleted_of_the_life_before_is_not_believed(
    written: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, refused: str, bucket: str
) -> None:
    """As on a full disk, which takes one statement and not the other."""
    change = Ledger._change

    def refuse(self: Ledger, statement: str, *args: Any) -> None:
        if not statement.startswith(refused):
            change(self, statement, *args)

    ledger = opened()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_change", refuse)
        ledger.forget("another-id")
    assert knows_nothing(ledger)
    ledger.close()
    again = opened()
    assert again.bucket == bucket
    assert knows_nothing(again)


def test_p4_without_the_id_of_the_bucket_nothing_is_known(written: Path, opened: Open) -> None:
    with contextlib.closing(sqlite3.connect(written)) as db, db:
        db.execute("UPDATE facts SET value = 'x' WHERE name = 'bucket'")
    ledger = opened()
    assert ledger.bucket == ""
    assert not listed(ledger)


def test_p4_a_ledger_that_was_rolled_back_says_what_was_true_then(written: Path, opened: Open, tmp_path: Path) -> None:
    shutil.copy(written, tmp_path / "old")
    ledger = opened()
    ledger.record("place", on_disk(entry(1000)))
    ledger.close()
    shutil.copy(tmp_path / "old", written)
    again = opened()
    assert look(again, entry(1000)) is None
    assert lies(again) == []
    assert not is_fresh(again, entry(1))


# ------------------------------------------------------------------------------------------------------------
# Damage


def test_p4_flipped_bits_never_make_the_ledger_say_what_was_not_written(written: Path) -> None:
    """Every byte range gets its flips. SQLite's own check does not notice half of them."""
    whole, rng, healed = written.read_bytes(), random.Random(1), 0
    shm = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else written.parent
    folder = shm / f"cassbackup-test-{os.getpid()}"
    step = len(whole) // 200
    for start in range(0, len(whole), step):
        damaged = bytearray(whole)
        damaged[min(start + rng.randrange(step), len(whole) - 1)] ^= 1 << rng.randrange(8)
        folder.mkdir()
        try:
            path = folder / "ledger.db"
            path.write_bytes(damaged)
            for _ in range(2):
                ledger = Ledger(str(path), SCOPE)
                assert lies(ledger) == [], f"flip in {start}"
                # Some damage is found by a write only, some by the next, some by reading. What puts the keys of a page
                # into another order is not found, and hides some rows: these files are sent once more.
                for _ in range(4):
                    for place in ("a", "place", "z"):
                        ledger.record(place, on_disk(entry(ROWS + 1)))
                    found = [look(ledger, entry(ROWS + 1), place) for place in ("a", "place", "z")]
                assert any(found), f"flip in {start}: nothing can be written any more"
                assert not ledger.broken, f"flip in {start}"
                ledger.close()
            healed += (folder / "ledger.db.broken").exists()
        finally:
            shutil.rmtree(folder)
    assert healed


@pytest.mark.parametrize("change", ["key = x'ff00'", "etag = 5", "crc32 = NULL", "confirmed = 'soon'", "run = 1.5"])
def test_p4_a_row_that_was_changed_is_not_there(written: Path, opened: Open, change: str) -> None:
    with contextlib.closing(sqlite3.connect(written)) as db, db:
        db.execute(f"UPDATE stored SET {change} WHERE bytes LIKE '%nb-7-%'")
        db.execute("UPDATE listed SET marks = CAST(x'ff' AS TEXT) WHERE directory = ?", (directory(1),))
        db.execute("UPDATE facts SET value = x'ff' WHERE name = 'complete:ks/table2'")
    ledger = opened()
    assert lies(ledger) == []
    assert (look(ledger, entry(7)), ledger.fact("complete:ks/table2")) == (None, "")
    assert directory(1) not in listed(ledger)
    assert look(ledger, entry(8))
    assert listed(ledger)[directory(2)] == ("", marks(2))


def test_p4_a_row_moved_to_another_name_is_not_there(written: Path, opened: Open) -> None:
    with contextlib.closing(sqlite3.connect(written)) as db, db:
        [(seven,)] = db.execute("SELECT bytes FROM stored WHERE bytes LIKE '%nb-7-%'").fetchall()
        moved = seven.replace("nb-7-", "nb-9999-")
        db.execute("UPDATE stored SET bytes = ? WHERE bytes = ?", (moved, seven))
        db.execute("UPDATE listed SET directory = '/elsewhere' WHERE directory = ?", (directory(1),))
    ledger = opened()
    assert look(ledger, replace(entry(7), name="nb-9999-big-Data.db")) is None
    assert "/elsewhere" not in listed(ledger)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def garbled(path: Path) -> None:
    path.write_bytes(random.Random(2).randbytes(path.stat().st_size))


def half_zeroed(path: Path) -> None:
    """As after a power cut: the size is there, the pages are not."""
    size = path.stat().st_size
    os.truncate(path, 4096)
    os.truncate(path, size)


def of_another_program(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE stored (a, b)")


def misspelt(path: Path) -> None:
    """A bit of a column's name has flipped, and it is no text any more."""
    path.write_bytes(path.read_bytes().replace(b"confirmed", b"\xe3onfirmed"))


DAMAGES = [zeroed, truncated, emptied, garbled, half_zeroed, of_another_program, misspelt]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_p4_a_damaged_file_costs_the_memory_and_nothing_else(
    written: Path, opened: Open, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(written)
    ledger = opened()
    assert lies(ledger) == []
    fill(ledger)
    fill(ledger)  # some damage is found by the first write only
    assert (lies(ledger), ledger.broken) == ([], "")
    assert look(ledger, entry(7))
    assert listed(ledger)[directory(3)] == ("", marks(3))
    ledger.close()
    again = opened()
    assert (lies(again), again.bucket, again.broken) == ([], "id-of-the-bucket", "")
    assert look(again, entry(7))
    if damage in (garbled, truncated, of_another_program, misspelt):
        assert written.with_name("ledger.db.broken").exists()
        assert "kept=" in caplog.text


def test_p4_a_file_that_is_damaged_while_the_daemon_runs_is_replaced(written: Path, opened: Open) -> None:
    ledger = opened()
    garbled(written)
    ledger._db.execute("PRAGMA shrink_memory")
    fill(ledger, 400)
    fill(ledger, 400)
    assert (lies(ledger, 400), ledger.broken) == ([], "")
    assert look(ledger, entry(7))


def test_p4_a_disk_that_damages_every_file_keeps_nobody_for_ever(
    path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Ledger._connect

    def damage(where: str) -> sqlite3.Connection:
        if where != ":memory:":
            raise sqlite3.DatabaseError("database disk image is malformed")
        return connect(where)

    monkeypatch.setattr(Ledger, "_connect", staticmethod(damage))
    ledger = opened()
    fill(ledger)
    assert lies(ledger) == []
    assert "malformed" in ledger.broken


def test_another_thread_may_not_use_it(written: Path, opened: Open) -> None:
    ledger = opened()
    with ThreadPoolExecutor(1) as pool, pytest.raises(sqlite3.ProgrammingError):
        pool.submit(ledger.listed).result()
    assert listed(ledger)
    assert not written.with_name("ledger.db.broken").exists()


def test_p4_a_lost_wal_costs_rows_and_never_makes_one(path: Path, opened: Open, tmp_path: Path) -> None:
    """As after a power cut: everything since the last checkpoint was in the -wal."""
    rng = random.Random(3)
    fill(opened())
    wal = path.with_name(path.name + "-wal").read_bytes()
    assert wal
    for number, damage in enumerate(["gone", "cut", "zeros", "flip"] * 5):
        place = tmp_path / f"wal{number}"
        place.mkdir()
        shutil.copy(path, place / path.name)
        cut, flipped = rng.randrange(len(wal)), bytearray(wal)
        flipped[cut] ^= 1 << rng.randrange(8)
        left = {"gone": b"", "cut": wal[:cut], "zeros": bytes(len(wal)), "flip": bytes(flipped)}[damage]
        (place / (path.name + "-wal")).write_bytes(left)
        assert lies(opened(at=place / path.name)) == [], damage


# ------------------------------------------------------------------------------------------------------------
# No place to write


def works_without_memory(ledger: Ledger) -> bool:
    """Call everything; nothing may raise."""
    fill(ledger, 20)
    ledger.forget("x")
    ledger.replace_listed("/d", "", LIFE, [1])
    ledger.forget_directory("/d")
    ledger.trim(0.0)
    return lies(ledger, 20) == ["bucket: x"] and ledger.broken != ""


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[Path]:
    """Give up root's rights, if there are any, beside a ledger in a directory that may only be read."""
    place = tmp_path / "state"
    place.mkdir()
    ledger = Ledger(str(place / "ledger.db"), SCOPE)
    fill(ledger)
    ledger.close()
    for folder in (tmp_path, *tmp_path.parents[:3]):
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o055)
    (place / "ledger.db").chmod(0o444)
    place.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield place
    finally:
        os.seteuid(user)
        place.chmod(0o755)


@pytest.mark.parametrize("name", ["ledger.db", "new.db"])
def test_p4_in_a_directory_that_cannot_be_written_it_is_done_without(as_nobody: Path, name: str) -> None:
    ledger = Ledger(str(as_nobody / name), SCOPE)
    assert lies(ledger) == []
    assert works_without_memory(ledger)
    ledger.close()


def on_a_small_disk(code: str) -> str:
    """Run a few lines where /mnt is a disk of 300 KB of our own."""
    start = f"""
        import sys; sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}
        import os, test_ledger as t
        from cassbackup import Ledger

        def fill_disk():
            with open("/mnt/full", "wb", 0) as file:
                try:
                    while True: file.write(b"x" * 1024)
                except OSError: pass
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=300k none /mnt && exec "$0" -c "$1"', sys.executable,
         textwrap.dedent(start) + textwrap.dedent(code)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr)
    return done.stdout + done.stderr[-1500:]


def test_p4_a_disk_that_fills_up_costs_new_rows_only() -> None:
    said = on_a_small_disk("""
        ledger = Ledger("/mnt/ledger.db", t.SCOPE)
        t.fill(ledger, 20)
        fill_disk()
        for turn in range(20):
            ledger.record("place", t.on_disk(*[t.entry(1000 * turn + n) for n in range(50)]))
        assert ledger.broken, "not full"
        assert t.lies(ledger, 20) == []
        assert t.look(ledger, t.entry(7))
        os.unlink("/mnt/full")
        ledger.remember("x", "y")
        assert (ledger.fact("x"), ledger.broken) == ("y", "")
        print("fine")
    """)
    assert "fine" in said, said


def test_p4_a_disk_that_is_full_at_the_start_is_gone_on_with() -> None:
    said = on_a_small_disk("""
        fill_disk()
        ledger = Ledger("/mnt/ledger.db", t.SCOPE)
        assert t.works_without_memory(ledger)
        print("fine")
    """)
    assert "fine" in said, said


def test_p4_a_good_ledger_is_not_moved_aside_because_its_disk_is_full() -> None:
    said = on_a_small_disk("""
        ledger = Ledger("/mnt/ledger.db", t.SCOPE)
        t.fill(ledger, 20)
        ledger.close()
        fill_disk()
        ledger = Ledger("/mnt/ledger.db", t.SCOPE)
        ledger.record("place", t.on_disk(*[t.entry(1000 + n) for n in range(500)]))
        assert ledger.broken, "not full"
        ledger.close()
        os.unlink("/mnt/full")
        assert [name for name in os.listdir("/mnt") if "broken" in name] == []
        ledger = Ledger("/mnt/ledger.db", t.SCOPE)
        assert t.look(ledger, t.entry(7))
        print("fine")
    """)
    assert "fine" in said, said


def test_quoted_names_are_what_stands_in_the_file(opened: Open, path: Path) -> None:
    """Whoever reads the file with sqlite3 sees one line for each row."""
    ledger = opened()
    ledger.add_listed(LIFE, LIFE, {"/d/a\nb": {1}})
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT directory FROM listed").fetchall() == [(quote("/d/a\nb"),)]
