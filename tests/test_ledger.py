"""The ledger, a memory that may be lost: P4, losing or corrupting it costs time, never data, never a false "done"."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cassbackup import Ledger, Stamp, Stored, live_stamps, open_area, quote

SCOPE = "s3://bucket/prefix node1"
RUN = "run-1"
ROWS = 60
Open = Callable[..., Ledger]


def entry(number: int, name: str = "") -> Stored:
    """Return a stored file like no other."""
    stamp = Stamp("0badcafe", number, number * 7, 1_795_000_000_000_000_000 + number)
    name = name or f"nb-{number}-big-Data.db"
    return Stored("/d", name, stamp, 0o644, "cassandra", "cassandra", f"{number:08x}", f"node1/d/{name}", f'"{number}"')


def told(found: Stored) -> tuple[str, ...]:
    """Return what the ledger must say of a file, but for the time."""
    return found.key, found.etag, found.crc32, found.crc32c, RUN


def directory(number: int) -> str:
    return f"/data/ks/table{number}/backups"


def listed(number: int) -> dict[str, Stamp]:
    return {entry(n).name: entry(n).stamp for n in range(number, number + 3)}


def fill(ledger: Ledger, rows: int = ROWS) -> None:
    """Write rows of every kind."""
    ledger.record((("place", entry(number)) for number in range(rows)), RUN)
    for number in range(rows // 10):
        ledger.list(directory(number), "20261121T202438.123456Z", listed(number))
        ledger.remember(f"upload:node1/key{number}", f"id-{number}")


def lies(ledger: Ledger, rows: int = ROWS) -> list[str]:
    """Return what a ledger says that `fill` did not write; what it has forgotten is no lie."""
    found = []
    for number in range(rows):
        known = ledger.knows("place", entry(number).name, entry(number).stamp)
        if known is not None and known[:-1] != told(entry(number)):
            found.append(f"stored: {known}")
    for number in range(rows // 10):
        true = {"20261121T202438.123456Z": {name: str(stamp) for name, stamp in listed(number).items()}}
        if ledger.listed(directory(number)) not in ({}, true):
            found.append(f"listed: {ledger.listed(directory(number))}")
        if ledger.fact(f"upload:node1/key{number}") not in ("", f"id-{number}"):
            found.append(f"fact: {ledger.fact(f'upload:node1/key{number}')}")
    facts = {f"node1/key{number}": f"id-{number}" for number in range(rows // 10)}
    found += [f"facts: {item}" for item in ledger.facts("upload:").items() if item not in facts.items()]
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


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
    known = ledger.knows("place", entry(7).name, entry(7).stamp)
    assert known is not None
    assert known[:-1] == told(entry(7))
    assert ledger.listed(directory(3)) == {
        "20261121T202438.123456Z": {name: str(stamp) for name, stamp in listed(3).items()}
    }
    assert ledger.fact("upload:node1/key3") == "id-3"
    assert len(ledger.facts("upload:")) == ROWS // 10
    assert lies(ledger) == []


def test_another_stamp_name_or_place_is_not_known(opened: Open) -> None:
    ledger = opened()
    ledger.record([("place", entry(7))], RUN)
    stamp = entry(7).stamp
    assert ledger.knows("elsewhere", entry(7).name, stamp) is None
    assert ledger.knows("place", "other.db", stamp) is None
    for other in (stamp._replace(area="1"), stamp._replace(ino=8), stamp._replace(size=1), stamp._replace(mtime_ns=1)):
        assert ledger.knows("place", entry(7).name, other) is None


@pytest.mark.parametrize("raw", [b"\xff\xfe.db", "é\n\t.db".encode(), b"a%0Ab", b"tab\there", b"line\nbreak"])
def test_names_of_any_bytes_are_remembered(opened: Open, raw: bytes) -> None:
    name, ledger = os.fsdecode(raw), opened()
    odd = entry(1, name)
    ledger.record([("place", odd)], RUN)
    ledger.list(f"/d/{name}", "since", {name: odd.stamp})
    assert ledger.knows("place", name, odd.stamp) is not None
    assert ledger.listed(f"/d/{name}") == {"since": {name: str(odd.stamp)}}
    assert not ledger.broken


def test_a_directory_of_which_nothing_is_listed_is_remembered_as_such(opened: Open) -> None:
    ledger = opened()
    ledger.list("/d", "since", {})
    assert ledger.listed("/d") in ({}, {"since": {}})


def test_what_is_forgotten_is_gone(opened: Open) -> None:
    ledger = opened()
    fill(ledger)
    ledger.remember("upload:node1/key3", "")
    assert ledger.fact("upload:node1/key3") == ""
    assert ledger.fact("upload:node1/key4") == "id-4"
    ledger.forget()
    assert ledger.listed(directory(4)) == {}
    assert ledger.knows("place", entry(7).name, entry(7).stamp) is None
    assert ledger.facts("") == {}


@pytest.mark.parametrize("scope", ["s3://bucket/prefix node2", "s3://bucket/prefix2 node1", "gs://bucket/prefix node1"])
def test_a_ledger_of_another_bucket_or_node_says_nothing(written: Path, opened: Open, scope: str) -> None:
    """P4: a bucket that was changed gets everything, whatever was stored in the one before."""
    ledger = opened(scope)
    assert all(ledger.knows("place", entry(n).name, entry(n).stamp) is None for n in range(ROWS))
    assert all(ledger.listed(directory(n)) == {} for n in range(ROWS // 10))
    assert ledger.facts("upload:") == {}
    assert ledger.fact("upload:node1/key3") == ""


# ------------------------------------------------------------------------------------------------------------
# Damage


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Return a directory that is in memory where there is a tmpfs: SQLite syncs whenever a ledger is closed."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_p4_flipped_bits_never_make_the_ledger_say_what_was_not_written(written: Path, memory: Path) -> None:
    """P4 The ledger is a hint: SQLite's own check does not notice half of these."""
    whole, rng = written.read_bytes(), random.Random(1)
    for number in range(600):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path = memory / f"flip{number}" / "ledger.sqlite"
        path.parent.mkdir()
        path.write_bytes(damaged)
        ledger = Ledger(str(path), SCOPE)
        assert lies(ledger) == [], f"flip {number}"
        ledger.record([("place", entry(ROWS + 1))], RUN)
        ledger.close()
        shutil.rmtree(path.parent)


@pytest.mark.parametrize("table", ["stored", "listed", "facts"])
@pytest.mark.parametrize("value", ["x'ff00'", "NULL", "5", "1.5", "char(0)"])
def test_p4_a_value_of_another_type_is_not_there(written: Path, opened: Open, table: str, value: str) -> None:
    column = {"stored": "found", "listed": "names", "facts": "value"}[table]
    with contextlib.closing(sqlite3.connect(written)) as db, db:
        db.execute(f"UPDATE {table} SET {column} = {value}")
    ledger = opened()
    assert lies(ledger) == []
    assert ledger.facts("upload:") == {} or table != "facts"


def test_p4_a_row_moved_to_another_name_is_not_there(written: Path, opened: Open) -> None:
    with contextlib.closing(sqlite3.connect(written)) as db, db:
        db.execute("UPDATE stored SET name = 'nb-9999-big-Data.db', stamp = ? WHERE name = ?",
                   (str(entry(9999).stamp), entry(7).name))  # fmt: skip
    assert opened().knows("place", entry(9999).name, entry(9999).stamp) is None


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


DAMAGES = [zeroed, truncated, emptied, garbled, half_zeroed, of_another_program]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_p4_a_damaged_file_costs_the_memory_and_nothing_else(
    written: Path, opened: Open, damage: Callable[[Path], None]
) -> None:
    damage(written)
    ledger = opened()
    assert lies(ledger) == []
    ledger.remember("x", "y")
    ledger.trim_listed(lambda _: listed(3))
    ledger.trim_stored(lambda _: [str(entry(7).stamp)], 0.0)
    ledger.close()
    again = opened()
    assert lies(again) == []


@pytest.mark.parametrize("damage", [zeroed, garbled], ids=lambda damage: damage.__name__)
def test_p4_a_file_that_is_no_database_is_moved_aside_and_a_new_one_begun(
    written: Path, opened: Open, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(written)
    ledger = opened()
    ledger.remember("x", "y")
    assert ledger.fact("x") == "y"
    assert not ledger.broken
    if damage is garbled:  # SQLite takes a file of zeros for a new one
        assert list(written.parent.glob("ledger.sqlite.broken-*"))
        assert "kept=" in caplog.text


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
# It does not grow with the years


def rows_in(path: Path) -> dict[str, int]:
    """Return how many rows each table of a ledger's file has."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("stored", "listed")}


def test_a_tag_that_is_taken_again_for_years_takes_one_row(opened: Open, path: Path) -> None:
    ledger = opened()
    for day in range(100):
        ledger.list("/d", f"20261121T{day:06d}.000000Z", listed(0) | {"manifest.json": entry(day).stamp})
    ledger.trim_listed(lambda _: [*listed(0), "manifest.json"])
    assert rows_in(path)["listed"] == 1
    newest = {name: str(stamp) for name, stamp in (listed(0) | {"manifest.json": entry(99).stamp}).items()}
    assert ledger.listed("/d") == {"20261121T000099.000000Z": newest}


def test_names_that_their_directory_has_no_more_are_forgotten(opened: Open, path: Path) -> None:
    ledger = opened()
    fill(ledger)
    gone, left = sorted(listed(4))[0], sorted(listed(4))[1:]
    there = {directory(4): left, directory(5): [*listed(5), "another"]}
    ledger.trim_listed(lambda folder: there.get(folder, []))
    assert rows_in(path)["listed"] == 2
    assert [sorted(names) for names in ledger.listed(directory(4)).values()] == [left], gone
    assert [sorted(names) for names in ledger.listed(directory(5)).values()] == [sorted(listed(5))]


def test_of_a_directory_that_cannot_be_read_nothing_is_forgotten(opened: Open, path: Path) -> None:
    ledger = opened()
    fill(ledger)
    before = ledger.listed(directory(3))
    ledger.trim_listed(lambda _: None)
    assert ledger.listed(directory(3)) == before != {}
    assert rows_in(path)["listed"] == ROWS // 10


def test_what_is_listed_while_a_directory_is_looked_into_is_kept_and_nobody_waits(opened: Open) -> None:
    """A million names take seconds, and the pinner asks this ledger."""
    ledger, since = opened(), "20261121T202438.123456Z"
    ledger.list("/d", since, listed(0))

    def slow_look(_: str) -> list[str]:
        lister = threading.Thread(target=ledger.list, args=("/d", since, listed(0) | listed(1)), daemon=True)
        lister.start()
        lister.join(100)
        assert not lister.is_alive(), "the ledger is locked while a directory is looked into"
        return []

    ledger.trim_listed(slow_look)
    assert ledger.listed("/d")[since].keys() == listed(0).keys() | listed(1).keys()


def test_a_directory_with_the_flushes_of_a_year_takes_a_moment(opened: Open, path: Path) -> None:
    """Each of them has a row; what one row costs must not grow with the directory."""
    ledger = opened()
    rows = [[f"nb-{flush}-big-{number}.db" for number in range(8)] for flush in range(8760)]
    lines = ["\n".join(f"{name}\t{entry(1).stamp}" for name in names) for names in rows]
    ledger._write("listed", [("/d", f"20261121T{flush:06}.000000Z", line) for flush, line in enumerate(lines)])
    began = time.thread_time()
    ledger.trim_listed(lambda _: [name for names in rows for name in names])
    assert time.thread_time() - began < 4
    assert rows_in(path)["listed"] == len(rows)


@pytest.mark.parametrize("odd", [5, 2.5])
def test_a_row_whose_directory_is_no_text_is_forgotten(opened: Open, path: Path, odd: object) -> None:
    ledger = opened()
    fill(ledger)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(
            "DROP TABLE listed;"
            "CREATE TABLE listed (directory, since, names, sum, PRIMARY KEY (directory, since)) WITHOUT ROWID;"
        )
        db.execute("INSERT INTO listed VALUES (?, 'since', 'names', 1)", (odd,))
        db.commit()
    ledger.trim_listed(lambda _: [])
    assert rows_in(path)["listed"] == 0


@pytest.mark.parametrize("raw", [b"nb-1-big-Data.db", "größe\t\n".encode(), b"\xff\xfe"])
def test_names_of_any_bytes_survive_when_others_are_forgotten(opened: Open, raw: bytes) -> None:
    ledger, name = opened(), os.fsdecode(raw)
    ledger.list("/d", "20261121T202438.123456Z", {name: entry(1).stamp, "gone": entry(2).stamp})
    ledger.trim_listed(lambda _: [name])
    assert ledger.listed("/d") == {"20261121T202438.123456Z": {name: str(entry(1).stamp)}}


def test_stamps_go_when_they_are_old_and_their_table_has_them_no_more(opened: Open, path: Path) -> None:
    """Over many pages, and asked for each table's files once."""
    ledger, asked = opened(), []
    names = [(f"ks/{number // 1500}", entry(number)) for number in range(4500)]
    ledger.record(names, RUN)
    left = {str(entry(number).stamp) for number in range(0, 4500, 1000)}

    def alive(place: str) -> set[str]:
        asked.append(place)
        return left

    ledger.trim_stored(alive, time.time() - 60)
    assert asked == []
    assert rows_in(path)["stored"] == 4500, "confirmed a moment ago"
    ledger.trim_stored(alive, time.time() + 60)
    assert asked == ["ks/0", "ks/1", "ks/2"]
    assert rows_in(path)["stored"] == len(left)
    assert all(ledger.knows(place, one.name, one.stamp) for place, one in names if str(one.stamp) in left)


def test_what_a_table_still_has_is_told_while_a_compaction_takes_other_files_away(tmp_path: Path) -> None:
    home = tmp_path / "data" / "ks" / "t"
    home.mkdir(parents=True)
    for number in range(300):
        (home / f"nb-{number}-big-Data.db").touch()
    area, over = open_area(str(tmp_path / "data")), threading.Event()

    def compact() -> None:
        while not over.is_set():
            for number in range(1000, 1100):
                (home / f"nb-{number}-big-Data.db").touch()
            for number in range(1000, 1100):
                (home / f"nb-{number}-big-Data.db").unlink()

    stays = {str(Stamp.of(area.id, (home / f"nb-{number}-big-Data.db").stat())) for number in range(300)}
    compactor = threading.Thread(target=compact)
    compactor.start()
    try:
        assert [looks for looks in range(300) if not stays <= live_stamps([area], "ks/t")] == []
    finally:
        over.set()
        compactor.join()
        area.close()


def test_rows_of_another_bucket_are_forgotten(written: Path, opened: Open) -> None:
    ledger = opened("s3://bucket/prefix node2")
    ledger.trim_listed(lambda folder: [name for n in range(ROWS // 10) for name in listed(n) if folder == directory(n)])
    ledger.trim_stored(lambda _: [str(entry(number).stamp) for number in range(ROWS)], 0.0)
    assert rows_in(written) == {"stored": 0, "listed": 0}


# ------------------------------------------------------------------------------------------------------------
# No place to write


def works_without_memory(ledger: Ledger) -> bool:
    """Call everything; nothing may raise."""
    fill(ledger, 20)
    ledger.forget()
    ledger.trim_listed(lambda _: [])
    ledger.trim_stored(lambda _: [], 0.0)
    return lies(ledger, 20) == [] and ledger.broken != ""


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """Give up root's rights, if there are any, in a directory that may only be read."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield place
        finally:
            os.seteuid(user)
            place.chmod(0o755)


def test_p4_in_a_directory_that_cannot_be_written_it_is_done_without(as_nobody: Path) -> None:
    ledger = Ledger(str(as_nobody / "ledger.sqlite"), SCOPE)
    assert works_without_memory(ledger)
    ledger.close()


def test_p4_a_ledger_that_may_only_be_read_is_done_without(as_nobody: Path) -> None:
    user = os.geteuid()
    if user == 65534:
        os.seteuid(0)
    as_nobody.chmod(0o755)
    first = Ledger(str(as_nobody / "ledger.sqlite"), SCOPE)
    fill(first, 20)
    first.close()
    (as_nobody / "ledger.sqlite").chmod(0o444)
    as_nobody.chmod(0o555)
    os.seteuid(user)
    ledger = Ledger(str(as_nobody / "ledger.sqlite"), SCOPE)
    ledger.remember("x", "y")
    assert lies(ledger, 20) == []
    ledger.close()


def on_a_small_disk(code: str) -> str:
    """Run a few lines where /mnt is a disk of 300 KB of our own."""
    start = f"""
        import sys; sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}
        import os, test_ledger as t
        from cassbackup import Ledger
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
        ledger = Ledger("/mnt/ledger.sqlite", t.SCOPE)
        t.fill(ledger, 20)
        with open("/mnt/full", "wb", 0) as file:
            try:
                while True: file.write(b"x" * 1024)
            except OSError: pass
        for turn in range(20):
            ledger.record([("place", t.entry(1000 * turn + n)) for n in range(50)], t.RUN)
        assert ledger.broken, "not full"
        assert t.lies(ledger, 20) == []
        assert ledger.knows("place", t.entry(7).name, t.entry(7).stamp)
        os.unlink("/mnt/full")
        ledger.remember("x", "y")
        assert (ledger.fact("x"), ledger.broken) == ("y", "")
        print("fine")
    """)
    assert "fine" in said, said


def test_p4_a_disk_that_is_full_at_the_start_is_gone_on_with() -> None:
    said = on_a_small_disk("""
        with open("/mnt/full", "wb", 0) as file:
            try:
                while True: file.write(b"x" * 1024)
            except OSError: pass
        ledger = Ledger("/mnt/ledger.sqlite", t.SCOPE)
        assert t.works_without_memory(ledger)
        print("fine")
    """)
    assert "fine" in said, said


def test_p4_a_good_ledger_is_not_moved_aside_because_its_disk_is_full() -> None:
    said = on_a_small_disk("""
        ledger = Ledger("/mnt/ledger.sqlite", t.SCOPE)
        t.fill(ledger, 20)
        ledger.close()
        with open("/mnt/full", "wb", 0) as file:
            try:
                while True: file.write(b"x" * 1024)
            except OSError: pass
        ledger = Ledger("/mnt/ledger.sqlite", t.SCOPE)
        ledger.record([("place", t.entry(1000 + n)) for n in range(500)], t.RUN)
        assert ledger.broken, "not full"
        ledger.close()
        os.unlink("/mnt/full")
        assert [name for name in os.listdir("/mnt") if "broken" in name] == []
        ledger = Ledger("/mnt/ledger.sqlite", t.SCOPE)
        assert ledger.knows("place", t.entry(7).name, t.entry(7).stamp)
        print("fine")
    """)
    assert "fine" in said, said


def test_quoted_names_are_what_stands_in_the_file(opened: Open, path: Path) -> None:
    """Whoever reads the file with sqlite3 sees one line for each row."""
    ledger = opened()
    ledger.list("/d/a\nb", "since", {"x\ny": entry(1).stamp})
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT directory FROM listed").fetchall() == [(quote("/d/a\nb"),)]
