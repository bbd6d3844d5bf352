"""The pinner alone, on real directories, real inotify and real links: what it pins, whose life that is, how it lets go.

desk = start(*node.data_dirs)         # a Pinner at work
node.snapshot("daily")
desk.until_pinned(node)               # by its own hints; desk.scan() asks for a full scan instead
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pyinotify
import pytest
from storm import Storm
from tree import Copy, History, Node, Table

import cassbackup
from cassbackup import (
    Filters,
    Fingerprint,
    PinDirectory,
    Pinned,
    Pinner,
    PinnerState,
    Touched,
    Unit,
    mark_of,
)

T = TypeVar("T")
Start = Callable[..., "Desk"]
Listed = dict[str, tuple[str, "array[int]"]]
PATIENCE_S = 60.0


def opened(root: str, pin_dir: str = "") -> PinDirectory:
    """Open a data directory's pin directory."""
    disk = PinDirectory(root, pin_dir)
    disk.check()
    return disk


class Desk:
    """A pinner at work, what it has said, and what it holds. While `freeze` is entered it stands still."""

    def __init__(self, *roots: Path, listed: Listed | None = None, pin_dir: str = "", **filters: Any) -> None:
        self.disks = [opened(str(root), pin_dir) for root in roots]
        self.news: list[Any] = []
        self._said = threading.Condition()
        self._frozen, self._standing = threading.Lock(), threading.Event()
        self.pinner = Pinner(self.disks, Filters(**filters), listed or {}, 600.0, self._hear)
        self.pinner.start()

    def _hear(self, message: object) -> None:
        with self._said:
            self.news.append(message)
            self._said.notify_all()
        if self._frozen.locked():
            self._standing.set()
        with self._frozen:
            pass

    @contextlib.contextmanager
    def freeze(self) -> Iterator[None]:
        """Have the pinner stand still: it waits for the end of something that it says."""
        self._standing.clear()
        with self._frozen:
            asked = self.pinner.ask(self.pinner.reconcile)
            assert self._standing.wait(PATIENCE_S)
            yield
        with contextlib.suppress(cassbackup.Fault):  # it has ended
            asked.result(PATIENCE_S)

    def wait(self, predicate: Callable[[], object]) -> None:
        """Wait until what was said makes something true."""
        with self._said:
            assert self._said.wait_for(lambda: bool(predicate()), PATIENCE_S), self.news[-3:]

    def said(self, kind: type[Any]) -> list[Any]:
        """Return the messages of a kind."""
        return [message for message in self.news if isinstance(message, kind)]

    @property
    def state(self) -> PinnerState:
        """Return what was last said of the pinner's state."""
        last: PinnerState = self.said(PinnerState)[-1]
        return last

    def ask(self, do: Callable[..., T], *args: object) -> T:
        """Have the pinner do something and return the answer."""
        return self.pinner.ask(do, *args).result(PATIENCE_S)

    def scan_tag(self, unit: Unit) -> bool:
        """Have a tag scanned; tell whether nothing was missed."""
        return self.ask(self.pinner.scan_tag, unit)

    def scan(self) -> Desk:
        """Have everything scanned."""
        self.ask(self.pinner.reconcile)
        return self

    def lose_hints(self) -> None:
        """Have it learn nothing from inotify any more."""
        self.pinner._inotify.read = lambda: iter(())  # type: ignore[method-assign]

    def units(self) -> dict[Unit, dict[tuple[str, str], Pinned]]:
        """Return the pins of each unit."""
        found: dict[Unit, dict[tuple[str, str], Pinned]] = {}
        for disk in self.disks:
            for relative, life in pin_directories(disk):
                unit = cassbackup.unit_of(disk.root, relative, life)
                found.setdefault(unit, {}).update(disk.read(relative, life))
        return dict(sorted(found.items(), key=lambda item: item[0].life))

    def lives(self, tag: str) -> list[Unit]:
        """Return the lives of a tag that have pins, oldest first."""
        return [unit for unit in self.units() if unit.tag == tag]

    def copies(self) -> dict[str, list[Copy]]:
        """Return the contents that are pinned of each path."""
        found: dict[str, list[Copy]] = {}
        for pins in self.units().values():
            for path, pin in pins.items():
                found.setdefault("/".join(path), []).append(Copy.of(Path(pin.pin).read_bytes()))
        return found

    def until_pinned(self, history: History) -> None:
        """Wait until everything that ever was anywhere is pinned, without asking for a scan."""
        wanted = {(path, copy) for _, path, copy in history.files()}
        self.wait(lambda: {(path, copy) for path, copies in self.copies().items() for copy in copies} >= wanted)
        self.assert_pinned(history)

    def assert_pinned(self, history: History) -> None:
        """Fail unless all that ever was anywhere, and nothing else, is pinned."""
        copies = self.copies()
        assert copies.keys() == {path for _, path, _ in history.files()}
        for _, path, copy in history.files():
            assert copy in copies[path], path

    def let_go(self, unit: Unit, lost: bool = True, delete: frozenset[tuple[str, str]] = frozenset()) -> int:
        """Have the pins of a unit let go, as after its listing; return what is left."""
        files = {path: pin.fingerprint for path, pin in self.units().get(unit, {}).items()}
        return self.ask(self.pinner.let_go, unit, files, self.lost(unit) if lost else (), delete, ())

    def lost(self, unit: Unit) -> list[tuple[str, str]]:
        """Return what was given up of a unit."""
        found: list[tuple[str, str]] = []
        for disk in self.disks:
            for relative, life in pin_directories(disk):
                if life == unit.life:
                    found += [(disk.source(relative), name) for name in disk.lost(relative, life)]
        return found

    def let_all_go(self) -> Listed:
        """Have all pins let go; return what a ledger would remember."""
        listed: Listed = {}
        for unit, pins in self.units().items():
            for (directory, name), pin in pins.items():
                marks = listed.setdefault(directory, (unit.life, array("Q")))[1]
                marks.append(mark_of(name, pin.fingerprint))
            assert self.let_go(unit) == 0
        return listed

    def end(self) -> None:
        """Stop the pinner, and leave everything to the next one."""
        if self.pinner.is_alive():
            self.pinner.stop()
            self.pinner.join(PATIENCE_S)
            assert not self.said(Exception)
        for fd in (self.pinner._inotify.fd, *(place.held for place in self.pinner._places.values())):
            if fd >= 0:
                os.close(fd)
        self.pinner._inotify.fd, self.pinner._places = -1, {}
        for disk in self.disks:
            if disk.path:
                os.close(disk._lock)
                disk.path = ""


def pin_directories(disk: PinDirectory) -> list[tuple[str, str]]:
    """Return (source directory, life) as `pending` does, without tidying up beside the pinner."""
    found = []
    for name in sorted(os.listdir(disk.path)) if disk.path else ():
        quoted, _, life = name.rpartition("~")
        if cassbackup.is_utc(life):
            origin = Path(disk.path, name, f"{quoted}.name")
            true = os.fsdecode(origin.read_bytes()) if origin.exists() else quoted
            found.append((cassbackup.unquote(true), life))
    return found


@pytest.fixture
def start() -> Iterator[Start]:
    desks = []

    def begin(*roots: Path, **more: Any) -> Desk:
        desks.append(Desk(*roots, **more))
        return desks[-1].scan()

    yield begin
    for desk in desks:
        desk.end()


@pytest.fixture
def users(node: Node) -> Table:
    """A table with an SSTable, so that the data directory is not empty."""
    table = node.table("ks1", "users")
    table.flush()
    return table


def tag_of(table: Table, tag: str = "daily") -> Path:
    """Return a table's snapshot in the first data directory."""
    return table.directories()[0] / "snapshots" / tag


# ------------------------------------------------------------------------------------------------------------
# What appears is pinned


def test_every_file_is_pinned_by_hints_alone_p2(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    posts = node.table("ks2", "posts", indexes=["by_name"])
    for _ in range(3):
        users.flush()
        posts.flush()
    node.snapshot("daily")
    node.snapshot("weekly")
    desk.until_pinned(node.history)
    assert desk.state.counts["found_by_rescan"] == 0
    assert desk.state.tables == {f"{table.keyspace}/{table.directory}" for table in node.tables}


def test_what_is_there_at_the_start_is_pinned(node: Node, users: Table, start: Start) -> None:
    node.snapshot("daily")
    start(*node.data_dirs).assert_pinned(node.history)


def test_pinned_bytes_outlive_their_clearing(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    node.snapshot("daily")
    desk.scan()
    node.clear("daily")
    users.compact()
    desk.scan().assert_pinned(node.history)
    (pin,) = {pin.links for pins in desk.units().values() for path, pin in pins.items() if "manifest" in path[1]}
    assert pin == 1


def test_one_snapshot_is_one_life_over_all_data_directories_and_indexes(tmp_path: Path, start: Start) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=3)
    users = node.table("ks1", "users", indexes=["by_name"])
    for _ in range(5):
        users.flush()
    desk = start(*node.data_dirs)
    node.snapshot("daily")
    desk.until_pinned(node.history)
    assert len(desk.lives("daily")) == 1
    assert [unit.kind for unit in desk.units()] == ["incremental", "snapshot"]


def test_what_comes_while_a_directory_rests_is_pinned_after_its_rest(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    for _ in range(30):
        users.flush()
    desk.until_pinned(node.history)


def test_directories_moved_in_and_renamed_are_seen(node: Node, users: Table, tmp_path: Path, start: Start) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    shutil.copytree(tag_of(users), tmp_path / "copy")
    (tmp_path / "copy").rename(tag_of(users, "moved-in"))
    tag_of(users).rename(tag_of(users, "renamed"))
    desk.wait(lambda: {"moved-in", "renamed"} <= {news.unit.tag for news in desk.said(Touched)})
    for tag in ("moved-in", "renamed"):
        (unit,) = desk.lives(tag)
        assert len(desk.units()[unit]) == 10


def test_a_directory_made_again_is_watched_again(node: Node, users: Table, start: Start) -> None:
    """We hold the old one open: its end gives no event of its own."""
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    node.clear("daily")
    users.compact()
    for _ in range(3):
        node.snapshot("daily")
        desk.wait(lambda: desk.said(Touched)[-1].unit.tag == "daily")
        desk.wait(desk.pinner.idle.is_set)
        users.flush()
        desk.until_pinned(node.history)
        node.clear("daily")


def test_each_descriptor_that_is_held_is_of_its_own_directory(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second close of one would close what another thread has opened meanwhile: bytes would go into its file."""
    first, second = (tmp_path / disk / "data" / "ks" / ("t-" + "a" * 32) / "snapshots" / "daily" for disk in "ab")
    for folder in (first, second, *(second / f".index{number}" for number in range(3))):
        folder.mkdir(parents=True)
        (folder / "nb-1-big-Data.db").write_text(folder.name)
    link = os.link

    def clear_meanwhile(name: Any, pin: Any, **more: Any) -> None:
        link(name, pin, **more)
        source = more.get("src_dir_fd")
        if source and os.readlink(f"/proc/self/fd/{source}") == str(second):
            shutil.rmtree(first, ignore_errors=True)  # as clearsnapshot does, disk by disk

    monkeypatch.setattr(os, "link", clear_meanwhile)
    desk = start(tmp_path / "a" / "data", tmp_path / "b" / "data")
    assert not first.exists()
    assert desk.state.refused == set()
    held = {place.path: place.held for place in desk.pinner._places.values() if place.held >= 0}
    assert str(second) in held
    assert {path: os.readlink(f"/proc/self/fd/{fd}") for path, fd in held.items()} == {path: path for path in held}


def test_watches_and_descriptors_of_what_is_gone_are_given_back(
    node: Node, users: Table, tmp_path: Path, start: Start
) -> None:
    desk = start(*node.data_dirs)
    before, files_before = len(watches()), len(os.listdir("/proc/self/fd"))
    for number in range(20):
        for then in ("is taken again", "is moved away", "is cleared"):
            node.snapshot(f"tag{number}")
            desk.scan()
            if then == "is cleared":
                node.clear()
            else:
                tag_of(users, f"tag{number}").rename(tmp_path / f"{number} {then}")
            if then == "is moved away":
                desk.scan()
    desk.scan()
    assert len(watches()) <= before + 1  # snapshots/ stays
    assert len(os.listdir("/proc/self/fd")) <= files_before
    assert not [path for path in desk.ask(desk.pinner.listed) if "/tag" in path]


def test_a_watch_that_ends_by_itself_is_armed_again(node: Node, users: Table, start: Start) -> None:
    """As one does that we armed between its one event and its end."""
    desk = start(*node.data_dirs)
    inotify, backups = desk.pinner._inotify, users.directories()[0] / "backups"
    desk.wait(desk.pinner.idle.is_set)
    inotify._calls.inotify_rm_watch(inotify.fd, desk.pinner._places[str(backups)].wd)
    users.flush()
    desk.until_pinned(node.history)


def watches() -> list[int]:
    """Return the inodes that this process watches."""
    found: list[int] = []
    for file in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += (int(number, 16) for number in re.findall(r"^inotify .*?ino:([0-9a-f]+)", file.read_text(), re.M))
    return found


def test_the_pin_directory_itself_is_never_scanned(node: Node, users: Table, start: Start) -> None:
    data = node.data_dirs[0]
    for pin_dir in (data / ".cassbackup" / "backups", data / "pins"):
        desk = start(data, pin_dir=str(pin_dir), include=re.compile("nb-"))
        node.snapshot(pin_dir.name)
        desk.scan()
        ours = {os.stat(folder).st_ino for folder, _, _ in os.walk(desk.disks[0].path)}
        assert not ours & set(watches())
        assert not [path for path in desk.copies() if str(pin_dir) in path]
        desk.end()


def test_hints_may_get_lost_a_reconciliation_finds_what_changed(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    desk.lose_hints()
    users.flush()
    node.snapshot("daily")
    desk.scan().assert_pinned(node.history)
    assert desk.state.counts["found_by_rescan"] == 26


def test_reconciliation_leaves_unchanged_directories_alone(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    for when in (1e9, time.time() + 86400):  # also those of a time when the clock was ahead
        for folder, _, _ in os.walk(node.data_dirs[0]):
            os.utime(folder, (when, when))
        desk.scan()
        scans = {path: place.ready for path, place in desk.pinner._places.items()}
        desk.scan()
        assert scans == {path: place.ready for path, place in desk.pinner._places.items()}


def test_a_change_in_the_same_tick_of_the_clock_as_a_scan_is_found(node: Node, users: Table, start: Start) -> None:
    """The kernel's clock for mtimes ticks every few milliseconds: the directory looks unchanged."""
    desk = start(*node.data_dirs)
    desk.lose_hints()
    backups = users.directories()[0] / "backups"
    desk.scan()
    before = backups.stat()
    users.flush()
    os.utime(backups, ns=(before.st_atime_ns, before.st_mtime_ns))
    desk.scan().assert_pinned(node.history)


def test_what_vanishes_before_it_is_pinned_is_named_and_leaves_nothing_behind_p2(
    node: Node, users: Table, start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = start(*node.data_dirs)
    link = os.link

    def clear_first(source: str, target: str, **where: Any) -> None:
        if source == "gone":
            os.unlink(source, dir_fd=where["src_dir_fd"])
        link(source, target, **where)

    monkeypatch.setattr(os, "link", clear_first)
    tag_of(users).mkdir(parents=True)
    (tag_of(users) / "gone").touch()
    desk.scan()
    assert f"vanished before it was pinned path={tag_of(users) / 'gone'}\n" in caplog.text
    assert desk.state.counts["vanished"] == 1
    assert desk.lives("daily") == []
    (tag_of(users) / "stays").touch()
    (unit,) = desk.scan().lives("daily")
    desk.lose_hints()
    (tag_of(users) / "gone").touch()
    assert not desk.scan_tag(unit), "something was missed"
    assert desk.scan_tag(unit)


@contextlib.contextmanager
def queue_of(events: int) -> Iterator[None]:
    """Have the inotify queues that are made inside hold only so many events."""
    setting = Path("/proc/sys/fs/inotify/max_queued_events")
    before = setting.read_text()
    try:
        setting.write_text(str(events))
    except OSError as error:
        pytest.skip(f"{setting} cannot be set: {error}")
    try:
        yield
    finally:
        setting.write_text(before)


def test_an_overflow_of_the_queue_has_everything_scanned(
    node: Node, users: Table, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with queue_of(16):
        desk = start(*node.data_dirs)
    with desk.freeze():
        for number in range(40):
            node.table(f"ks{number}", "other").flush()
            os.utime(node.data_dirs[0], (1e9, 1e9))  # no reconciliation would look there
            (node.data_dirs[0] / "noise").mkdir()
            (node.data_dirs[0] / "noise").rmdir()
        users.flush()
    desk.until_pinned(node.history)
    assert "inotify lost events" in caplog.text


def test_without_room_for_watches_directories_are_scanned_every_two_seconds(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, logging, pathlib, test_pinner as t
        logging.basicConfig()
        node = t.Node(pathlib.Path({str(tmp_path)!r}))
        tables = [node.table("ks1", f"t{{number}}") for number in range(20)]
        tables[0].flush()
        desk = t.Desk(*node.data_dirs).scan()
        for table in tables:
            table.flush()
        node.snapshot("daily")
        desk.until_pinned(node.history)
        desk.end()
    """)
    few = 'echo 10 >/proc/sys/user/max_inotify_watches && exec "$@"'
    if subprocess.run(["unshare", "-Ur", "sh", "-c", few, "sh", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs user namespaces with a writable max_inotify_watches")
    paths = os.pathsep.join(sys.path)
    command = ["unshare", "-Ur", "sh", "-c", few, "sh", sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sysctl fs.inotify.max_user_watches") == 1


# ------------------------------------------------------------------------------------------------------------
# Kinds, names, filters


def test_what_is_no_regular_file_is_named_once_and_never_hangs(
    node: Node, users: Table, tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backups = users.directories()[0] / "backups"
    os.mkfifo(backups / "nb-12-big-Data.db")
    (backups / "nb-13-big-Data.db").symlink_to(users.sstables[0].path("Data.db"))
    (backups / ".idx").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        at = os.getcwd()
        os.chdir(backups)  # the path of a socket must be short
        listener.bind("nb-16-big-Data.db")
        os.chdir(at)
    (backups / "nb-19-big-Data.db").mkdir()
    desk = start(*node.data_dirs)
    users.flush()
    desk.scan().assert_pinned(node.history)
    assert desk.state.counts["skipped"] == 4
    for name in ("nb-12-big-Data.db", "nb-13-big-Data.db", ".idx", "nb-16-big-Data.db"):
        assert caplog.text.count(f"skipped path={backups / name}\n") == 1


@pytest.mark.parametrize("beside", ["", "/commitlog/", "CommitLog-"])
def test_a_linked_keyspace_or_table_is_red_until_it_is_mended_or_left_out_p8(
    node: Node, users: Table, tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture, beside: str
) -> None:
    """Cassandra follows such links, to another disk. `beside`: archived commit logs are stored as well, by this."""
    paths, include = list(node.data_dirs), None
    if beside:
        paths, include = [*paths, tmp_path / "commitlog"], re.compile(beside)
        (tmp_path / "commitlog").mkdir()
        (tmp_path / "commitlog" / "newest").symlink_to(tmp_path)
    posts, home = node.table("ks2", "posts"), users.directories()[0]
    posts.flush()
    (node.data_dirs[0] / "ks2").rename(tmp_path / "ks2")
    (node.data_dirs[0] / "ks2").symlink_to(tmp_path / "ks2")
    home.rename(tmp_path / "home")
    home.symlink_to(tmp_path / "home")
    (node.data_dirs[0] / "dangling").symlink_to("/no/where")
    (node.data_dirs[0] / "loop").symlink_to("loop")
    desk = start(*paths, include=include).scan()
    assert set(desk.state.refused) == {str(home), str(node.data_dirs[0] / "ks2")}
    assert caplog.text.count("symbolic link, nothing behind it is stored") == 2
    assert desk.copies() == {}
    home.unlink()
    (tmp_path / "home").rename(home)
    (node.data_dirs[0] / "ks2").unlink()
    (tmp_path / "ks2").rename(node.data_dirs[0] / "ks2")
    desk.scan().assert_pinned(node.history)
    assert desk.state.refused == set()


def test_a_directory_that_becomes_a_symlink_is_not_followed(
    node: Node, users: Table, tmp_path: Path, start: Start
) -> None:
    desk = start(*node.data_dirs)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.db").write_bytes(b"not yours")
    backups = users.directories()[0] / "backups"
    backups.rename(tmp_path / "aside")
    backups.symlink_to(outside)
    assert not [path for path in desk.scan().copies() if "secret" in path]
    assert list(desk.state.refused) == [str(backups)]


NAMES = [
    b"new\nline-Data.db",
    b"\x01\x1b[31m\x7f.db",
    b"\xff\xfe not utf-8.db",
    "ünïcödé ∀ 漢.db".encode(),
    b"%41 percent.db",
    b"A percent.db",
    b"#" + b"a" * 40,
    b"#" + b"a" * 40 + b".name",
    b"path",
    b"lost",
    b"-leading dash",
    b"trailing space ",
    b"~",
    b"...",
    b"x" * 255,
    b"x" * 254,
    b"\xff" * 255,
    "漢".encode() * 85,
]


def test_every_name_that_a_file_system_can_hold_is_pinned_recovered_and_let_go(
    node: Node, users: Table, start: Start
) -> None:
    users.sstables[0].path("Data.db")
    home = os.fsencode(users.directories()[0])
    long = b"/snapshots/" + b"t" * 48 + b"\xff" * 48  # with its table's, more than a name in the pin directory may be
    folders = [home + b"/backups", home + b"/snapshots/tag \xff\n~%", home + long, home + b"/backups/#idx"]
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
        for name in NAMES:
            Path(os.fsdecode(os.path.join(folder, name))).write_bytes(folder + name)
    wanted = {os.fsdecode(folder + b"/" + name): Copy.of(folder + name) for folder in folders for name in NAMES}
    wanted.update({path: copy for _, path, copy in node.history.files()})
    desk = start(*node.data_dirs)
    assert desk.copies() == {path: [copy] for path, copy in wanted.items()}
    ours = [name for _, folders, names in os.walk(desk.disks[0].path) for name in (*folders, *names)]
    assert not [name for name in ours if name.endswith(".db") or name == "snapshots"]
    desk.end()
    desk = start(*node.data_dirs)
    assert desk.copies() == {path: [copy] for path, copy in wanted.items()}, "nothing is pinned twice"
    desk.let_all_go()
    assert sorted(os.listdir(desk.disks[0].path)) == ["id", "lock"]


def test_filters_leave_out_what_they_say_and_those_that_fit_nothing_are_named(node: Node, start: Start) -> None:
    for keyspace, name in (("ks1", "users"), ("ks1", "cache"), ("ks2", "users"), ("system", "local")):
        node.table(keyspace, name).flush()
    node.snapshot("daily")
    node.snapshot("scratch-1")
    keyspaces, tables = ("ks*", "shop,metrics"), ("ks1.cache", "users")
    more = {"exclude_keyspace": ("ks2", "ks9"), "exclude_table": tables, "exclude_tag": ("scratch-*", "none")}
    desk = start(*node.data_dirs, keyspace=keyspaces, **more)
    assert {(unit.keyspace, unit.table[:6], unit.tag) for unit in desk.units()} == {
        ("ks1", "users-", "daily"),
        ("ks1", "users-", ""),
    }
    assert desk.state.unmatched == ("--keyspace shop,metrics", "--exclude-keyspace ks9", "--exclude-table users")


def test_only_one_tag_is_pinned_where_only_that_is_asked_for(node: Node, users: Table, start: Start) -> None:
    node.snapshot("daily")
    node.snapshot("weekly")
    assert {unit.tag for unit in start(*node.data_dirs, only_tag="daily").units()} == {"daily"}


@pytest.mark.parametrize("where", ["newest", "CommitLog-7-1.log/x", "/", "/no/where"])
def test_a_link_in_an_archive_keeps_nothing_there_from_being_pinned(tmp_path: Path, start: Start, where: str) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "CommitLog-7-1.log").write_bytes(b"log")
    (logs / "newest").symlink_to(where)
    desk = start(logs, include=re.compile("/logs/"))
    (logs / "CommitLog-7-2.log").write_bytes(b"log")
    assert set(desk.scan().copies()) == {str(logs / f"CommitLog-7-{number}.log") for number in (1, 2)}
    assert desk.state.refused == set()


def test_archived_files_are_pinned_however_they_come(tmp_path: Path, start: Start) -> None:
    logs = tmp_path / "logs"
    (logs / "deeper").mkdir(parents=True)
    desk = start(logs, include=re.compile(r"CommitLog-.*\.log$"), exclude=re.compile("CommitLog-9"))
    assert desk.state.absent == {}, "an empty archive is nothing to worry about"
    logs.rename(tmp_path / "aside")
    assert desk.scan().state.absent.keys() == {str(logs)}
    (tmp_path / "aside").rename(logs)
    (logs / "deeper").rmdir()
    assert desk.scan().state.absent == {}
    (logs / "2026" / "11").mkdir(parents=True)
    desk.scan()
    shutil.rmtree(logs / "2026")
    assert desk.scan().state.absent == {}, "its directories were no tables"
    (logs / "deeper").mkdir()
    desk.scan()
    (tmp_path / "moved").write_bytes(b"moved")
    (tmp_path / "moved").rename(logs / "CommitLog-1.log")
    (tmp_path / "linked").write_bytes(b"linked")
    os.link(tmp_path / "linked", logs / "deeper" / "CommitLog-2.log")
    (logs / "CommitLog-3.log").write_bytes(b"written")
    (logs / "CommitLog-9.log").write_bytes(b"excluded")
    (logs / "notes.txt").write_bytes(b"no")
    desk.wait(lambda: sum(news.files for news in desk.said(Touched)) >= 3)
    wanted = {"CommitLog-1.log": b"moved", "deeper/CommitLog-2.log": b"linked", "CommitLog-3.log": b"written"}
    assert desk.copies() == {str(logs / name): [Copy.of(body)] for name, body in wanted.items()}
    assert {unit.tag for unit in desk.units()} == {str(logs), str(logs / "deeper")}
    desk.let_all_go()
    with (logs / "CommitLog-3.log").open("ab") as file:
        file.write(b", and again")
    desk.wait(lambda: sum(news.files for news in desk.said(Touched)) > 3)
    assert desk.copies() == {str(logs / "CommitLog-3.log"): [Copy.of(b"written, and again")]}


def test_beside_an_archive_a_data_directory_without_tables_is_told(tmp_path: Path, start: Start) -> None:
    roots = [tmp_path / name for name in ("archive", "data", "other")]
    for root in roots:
        root.mkdir()
    (roots[2] / "commitlog").mkdir()
    desk = start(*roots, include=re.compile("/archive/"))
    assert desk.state.absent.keys() == {str(root) for root in roots[1:]}


def test_an_archive_that_is_emptied_during_the_start_is_nothing_to_worry_about(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log, said = tmp_path / "logs" / "CommitLog-7-1.log", list[Any]()
    log.write_bytes(b"log")
    disk = opened(str(tmp_path / "logs"))
    log.unlink()
    pinner = Pinner([disk], Filters(include=re.compile("/logs/")), {}, 600.0, said.append)
    pinner.start()
    pinner.idle.wait(PATIENCE_S)
    pinner.stop()
    pinner.join()
    states = [one for one in said if isinstance(one, PinnerState)]
    assert [state.absent for state in states if state.scanned][-1] == {}
    os.close(disk._lock)


def test_of_two_archives_each_may_have_files_of_its_own_names(tmp_path: Path, start: Start) -> None:
    roots = [tmp_path / name for name in ("commitlog", "fql", "data")]
    for root in roots:
        root.mkdir()
    (roots[1] / "1.cq4").write_bytes(b"query")
    desk = start(*roots, include=re.compile(rf"/commitlog/|{re.escape(str(roots[1]))}/.*\.cq4$"))
    assert desk.state.absent.keys() == {str(roots[2])}
    assert [path for path in desk.copies() if "/fql/" in path] == [f"{roots[1]}/1.cq4"]


@pytest.mark.parametrize("include", ["/archive/", r"\.log\.gz$"])
def test_an_archive_is_one_however_its_files_are_called_and_for_who_stores_one_tag_too(
    tmp_path: Path, node: Node, start: Start, include: str
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    node.table("ks1", "users").flush()
    for names in ((), ("CommitLog-7-1.log.gz",)):
        for name in names:
            (archive / name).write_bytes(b"log")
        for tag, found in (("daily", ()), ("", names)):
            desk = start(*node.data_dirs, archive, include=re.compile(include), only_tag=tag)
            pinned = [path for path in desk.copies() if path.startswith(f"{archive}/")]
            assert (desk.state.absent, pinned) == ({}, [f"{archive}/{name}" for name in found])
            desk.end()


# ------------------------------------------------------------------------------------------------------------
# Which life of a tag


def retake(node: Node, tag: str = "daily") -> None:
    """Clear a tag and take it again, of the same SSTables: only manifest.json and schema.cql are new."""
    node.clear(tag)
    node.snapshot(tag)


def test_a_tag_that_is_taken_again_is_another_life(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    for _ in range(3):
        retake(node)
        desk.scan()
    first, second, third = (desk.units()[unit] for unit in desk.lives("daily"))
    assert first.keys() == second.keys() == third.keys()
    manifests = {pins[str(tag_of(users)), "manifest.json"].fingerprint for pins in (first, second, third)}
    assert len(manifests) == 3


def test_a_scan_that_falls_into_a_clear_ends_no_life(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    node.snapshot("daily")
    desk.scan()
    with desk.freeze():
        for name in sorted(os.listdir(tag_of(users)))[:5]:
            (tag_of(users) / name).unlink()
        (tag_of(users) / "late").write_bytes(b"of the same snapshot")
    (life,) = desk.scan().lives("daily")
    assert len(desk.units()[life]) == 11


def test_without_descriptors_to_hold_the_names_tell_which_life_it_is(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    desk.pinner._may_hold = 0
    node.snapshot("daily")
    desk.scan()
    (tag_of(users) / "late").touch()
    assert len(desk.scan().lives("daily")) == 1
    retake(node)
    first, second = (desk.units()[unit] for unit in desk.scan().lives("daily"))
    assert len(first) == len(second) + 1 == 11


@pytest.mark.parametrize("first", [0, 1])
def test_a_tag_taken_again_is_another_life_in_all_data_directories_p1(tmp_path: Path, start: Start, first: int) -> None:
    """Whichever of its directories is scanned first: two manifest.json must never be in one listing."""
    node = Node(tmp_path / "cassandra", data_dirs=2)
    users = node.table("ks1", "users", indexes=["by_name"])
    for _ in range(6):
        users.flush()
    roots = node.data_dirs if first == 0 else node.data_dirs[::-1]
    desk = start(*roots)
    for _ in range(4):
        with desk.freeze():
            retake(node)
        desk.scan()
        for unit in desk.lives("daily"):
            assert sum(name == "manifest.json" for _, name in desk.units()[unit]) == 1
    assert len(desk.lives("daily")) == 4
    assert len({len(desk.units()[unit]) for unit in desk.lives("daily")}) == 1


def test_a_directory_joins_no_life_of_which_another_directory_is_gone(tmp_path: Path, start: Start) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=2)
    users = node.table("ks1", "users")
    users.flush()
    one, two = (home / "snapshots" / "daily" for home in users.directories())
    desk = start(*node.data_dirs)
    one.mkdir(parents=True)
    (one / "old").write_bytes(b"old")
    desk.scan()
    with desk.freeze():  # cleared and taken again: the first thing that is seen of it is in the other directory
        shutil.rmtree(one)
        two.mkdir(parents=True)
        (two / "new").write_bytes(b"new")
        one.mkdir()
        desk.pinner._dirty.clear()
    desk.scan()
    (one / "newer").write_bytes(b"newer")
    old, new = desk.scan().lives("daily")
    assert set(desk.units()[old]) == {(str(one), "old")}
    assert set(desk.units()[new]) == {(str(two), "new"), (str(one), "newer")}


def test_after_a_restart_a_life_goes_on_if_all_of_it_is_there(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    node.snapshot("daily")
    (life,) = desk.scan().lives("daily")
    desk.end()
    (tag_of(users) / "late").write_bytes(b"while nobody looked")
    desk = start(*node.data_dirs)
    assert desk.lives("daily") == [life]
    assert len(desk.units()[life]) == 11
    recovered = [news for news in desk.said(Touched) if not news.files]
    assert {news.unit for news in recovered} == set(desk.units())
    assert desk.news.index(recovered[-1]) < next(n for n, one in enumerate(desk.news) if getattr(one, "scanned", 0))


def test_after_a_restart_a_life_has_ended_if_some_of_it_is_not_there(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    node.snapshot("daily")
    (old,) = desk.scan().lives("daily")
    pins = desk.units()[old]
    desk.end()
    (tag_of(users) / "manifest.json").unlink()
    (tag_of(users) / "late").write_bytes(b"of another snapshot")
    desk = start(*node.data_dirs)
    assert desk.lives("daily")[0] == old
    assert desk.units()[old].keys() == pins.keys(), "what is sealed stays pinned"
    assert len(desk.units()[desk.lives("daily")[1]]) == 10
    assert not desk.scan_tag(old)


def test_after_a_restart_all_data_directories_have_a_say_in_whether_a_life_goes_on_p1(
    tmp_path: Path, start: Start
) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=2)
    users = node.table("ks1", "users")
    users.flush()
    one, two = (home / "snapshots" / "daily" for home in users.directories())
    for folder, name in ((one, "manifest.json"), (two, "nb-1-big-Data.db")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"old")
    desk = start(*node.data_dirs)
    desk.end()
    shutil.rmtree(two)  # and the tag is taken again
    (one / "new").write_bytes(b"new")
    desk = start(*node.data_dirs)
    old, new = desk.lives("daily")
    assert set(desk.units()[old]) == {(str(one), "manifest.json"), (str(two), "nb-1-big-Data.db")}
    assert set(desk.units()[new]) == {(str(one), "manifest.json"), (str(one), "new")}


def test_after_a_restart_the_newest_life_is_the_open_one_whatever_is_sealed_beside_it(
    tmp_path: Path, start: Start
) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=2)
    users = node.table("ks1", "users")
    users.flush()
    one, two = (home / "snapshots" / "daily" for home in users.directories())
    for root in node.data_dirs:
        (root / "ks1" / "keep").touch()
    for folder in (one, two):
        folder.mkdir(parents=True)
        (folder / "old").write_bytes(b"old")
    desk = start(*node.data_dirs)
    node.clear()
    one.mkdir()
    (one / "new").write_bytes(b"new")
    old, new = desk.scan().lives("daily")
    desk.end()
    (one / "late").write_bytes(b"late")
    desk = start(*node.data_dirs)
    assert desk.lives("daily") == [old, new]
    assert set(desk.units()[new]) == {(str(one), "new"), (str(one), "late")}


def test_what_is_listed_is_not_pinned_again(node: Node, users: Table, start: Start) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    listed = desk.let_all_go()
    for folder, _, _ in os.walk(node.data_dirs[0]):
        os.utime(folder)
    assert desk.scan().units() == {}
    desk.end()
    toc = users.sstables[0].path("TOC.txt")
    with toc.open("a") as file:
        file.write("SAI+aa+GroupComplete.db\n")  # Cassandra builds an index: the snapshot's TOC.txt grows too
    desk = start(*node.data_dirs, listed=listed)
    assert desk.units() == {}
    assert desk.ask(desk.pinner.listed).keys() >= listed.keys()


@pytest.mark.parametrize("restart", [False, True])
def test_what_comes_late_joins_the_listed_life_and_brings_its_manifest(
    tmp_path: Path, start: Start, restart: bool
) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=2)
    users = node.table("ks1", "users", indexes=["by_name"])
    users.flush()
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    (life,) = desk.lives("daily")
    listed = desk.let_all_go()
    if restart:
        desk.end()
        desk = start(*node.data_dirs, listed=listed)
    (index,) = (folder for home in users.directories() for folder in home.glob("snapshots/daily/.by_name"))
    (index / "late").write_bytes(b"late")
    assert desk.scan().lives("daily") == [life]
    assert {name for _, name in desk.units()[life]} == {"late", "manifest.json"}


@pytest.mark.parametrize("restart", [False, True])
def test_a_tag_taken_again_after_its_listing_is_another_life(
    node: Node, users: Table, start: Start, restart: bool
) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    (old,) = desk.lives("daily")
    listed = desk.let_all_go()
    if restart:
        desk.end()
        retake(node)
        desk = start(*node.data_dirs, listed=listed)
    else:
        with desk.freeze():
            retake(node)
        desk.scan()
    (new,) = desk.lives("daily")
    assert new.life > old.life
    assert len(desk.units()[new]) == 10


def test_a_name_replaced_in_backups_begins_another_life_and_pins_nothing_twice(
    node: Node, users: Table, start: Start
) -> None:
    """The generations came again: after TRUNCATE, a restart and an emptied backups/."""
    desk = start(*node.data_dirs)
    folder = users.directories()[0] / "backups"
    data = folder / "nb-1-big-Data.db"
    data.unlink()
    data.write_bytes(b"other bytes")
    old, new = desk.scan().units().values()
    assert len(old) == 8
    assert set(new) == {(str(folder), data.name)}
    users.flush()
    assert len(desk.scan().units()) == 2
    desk.let_all_go()
    assert desk.scan().units() == {}


def test_backups_forget_what_was_deleted_there(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    desk.let_all_go()
    backups = users.directories()[0] / "backups"
    assert len(desk.ask(desk.pinner.listed)[str(backups)]) == 8
    for file in backups.iterdir():
        file.unlink()
    desk.scan()
    assert not desk.ask(desk.pinner.listed)[str(backups)]


# ------------------------------------------------------------------------------------------------------------
# Letting go


def test_a_pin_that_changed_or_came_meanwhile_stays(node: Node, users: Table, start: Start) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    (unit,) = desk.lives("daily")
    files = {path: pin.fingerprint for path, pin in desk.units()[unit].items()}
    with (tag_of(users) / "schema.cql").open("a") as file:
        file.write("-- more")
    (tag_of(users) / "late").write_bytes(b"late")
    desk.scan()
    assert desk.ask(desk.pinner.let_go, unit, files, (), (), ()) == 3
    assert {name for _, name in desk.units()[unit]} == {"schema.cql", "late", "manifest.json"}
    assert desk.let_go(unit) == 0
    assert desk.scan().lives("daily") == []


def test_manifest_json_and_its_directory_go_last(tmp_path: Path, start: Start) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=2)
    users = node.table("ks1", "users", indexes=["by_name"])
    for _ in range(4):
        users.flush()
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    (unit,) = desk.lives("daily")
    seen = Deletions(desk)
    assert desk.let_go(unit) == 0
    order = seen.read()
    assert len(order) == 4 * 8 * 2 + 2
    assert order[-1] == "manifest.json~"


class Deletions:
    """The order in which pins are unlinked."""

    def __init__(self, desk: Desk) -> None:
        self._calls = pyinotify.INotifyWrapper.create()
        self._fd = self._calls.inotify_init()
        for disk in desk.disks:
            for relative, life in pin_directories(disk):
                self._calls.inotify_add_watch(self._fd, disk.directory(relative, life), pyinotify.IN_DELETE)

    def read(self) -> list[str]:
        events, found = os.read(self._fd, 1 << 20), []
        os.close(self._fd)
        while events:
            length = int.from_bytes(events[12:16], sys.byteorder)
            found.append(events[16 : 16 + length].rstrip(b"\0").decode())
            events = events[16 + length :]
        return [name for name in found if name.endswith("~")]


def test_pinning_comes_before_letting_go(node: Node, users: Table, start: Start) -> None:
    folder = tag_of(users, "large")
    folder.mkdir(parents=True)
    for number in range(1000):
        (folder / f"nb-{number}-big-Data.db").touch()
    desk = start(*node.data_dirs)
    (unit,) = desk.lives("large")
    files = {path: pin.fingerprint for path, pin in desk.units()[unit].items()}
    with desk.freeze():
        future: Future[int] = desk.pinner.ask(desk.pinner.let_go, unit, files, (), (), ())
        node.snapshot("daily")
        desk.news.clear()
        threading.Thread(target=future.result).start()
        done = len(desk.news)
    assert future.result(PATIENCE_S) == 0
    desk.wait(lambda: any(news.unit.tag == "daily" for news in desk.said(Touched)))
    assert done == 0


def test_deleting_sources_stays_in_backups_and_needs_the_very_file(node: Node, users: Table, start: Start) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    desk.lose_hints()
    backups = users.directories()[0] / "backups"
    replaced = backups / "nb-1-big-Statistics.db"
    replaced.rename(backups / "aside")
    replaced.write_bytes(b"another file")
    (incremental,) = (unit for unit in desk.units() if unit.kind == "incremental")
    for unit, pins in desk.units().items():
        desk.let_go(unit, delete=frozenset(pins))
    assert incremental not in desk.units()
    assert replaced.read_bytes() == b"another file"
    assert sorted(file.name for file in backups.iterdir()) == ["aside", "nb-1-big-Statistics.db"]
    assert len(os.listdir(tag_of(users))) == 10
    assert desk.scan().state.counts["deleted"] == 7


def test_only_bytes_that_nobody_else_holds_are_given_up_and_a_restart_knows_it(
    node: Node, users: Table, start: Start
) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    (unit,) = desk.lives("daily")
    node.clear("daily")
    pins, disk = desk.units()[unit], desk.disks[0]
    names = {name: 1 for _, name in pins}
    relative = str(tag_of(users).relative_to(node.data_dirs[0]))
    given_up = desk.ask(desk.pinner.give_up, disk, relative, unit.life, names)
    assert sorted(given_up) == ["manifest.json", "schema.cql"], "the others are still live SSTables"
    assert len(desk.units()[unit]) == 8
    lost = Path(disk.directory(relative, unit.life), "lost")
    desk.end()
    lost.write_text(lost.read_text() + "\nnb-1-big-Data.db")  # as after a kill amid giving up
    desk = start(*node.data_dirs)
    assert set(desk.disks[0].lost(relative, unit.life)) == set(given_up)
    assert desk.let_go(unit, lost=False) == 1
    assert unit in desk.units(), "pending until it is listed as lost"
    assert desk.let_go(unit, lost=True) == 0
    assert unit not in desk.units()


def test_bytes_that_two_pins_of_ours_hold_and_nobody_else_can_be_given_up_p5(
    node: Node, users: Table, start: Start
) -> None:
    """Two snapshots of one SSTable, both cleared while the store is away."""
    node.incremental = False
    users.flush()
    for tag in ("monday", "tuesday"):
        node.snapshot(tag)
    desk = start(*node.data_dirs)
    disk = desk.disks[0]
    places = [(unit, str(tag_of(users, unit.tag).relative_to(node.data_dirs[0]))) for unit in desk.units() if unit.tag]
    node.clear("monday")
    node.clear("tuesday")

    def alone(shared: frozenset[Fingerprint]) -> list[dict[str, Pinned]]:
        return [cassbackup.alone_in(disk, relative, unit.life, shared) for unit, relative in places]

    held, shared = cassbackup.held_alone(disk, places)
    assert [set(pins) for pins in alone(shared)] == [{"manifest.json", "schema.cql"}] * 2, "the SSTables are live"
    assert held == sum(pin.size for pins in alone(shared) for pin in pins.values())
    users.sstables[1].remove()
    more, shared = cassbackup.held_alone(disk, places)
    links = [{name: pin.links for name, pin in pins.items() if name.startswith("nb-2")} for pins in alone(shared)]
    assert [set(some.values()) for some in links] == [{2}, {2}]
    assert more - held == sum(pin.size for name, pin in alone(shared)[0].items() if name.startswith("nb-2"))
    for (unit, relative), some in zip(places, links, strict=True):
        given_up = desk.ask(desk.pinner.give_up, disk, relative, unit.life, some)
        assert sorted(given_up) == sorted(some)


def test_what_is_let_go_while_it_is_looked_at_makes_nothing_that_is_live_count_as_ours_alone_p2(
    node: Node, users: Table, start: Start
) -> None:
    """As when an outage ends, and the disk is still too full."""
    node.incremental = False
    users.flush()
    for tag in ("monday", "tuesday"):
        node.snapshot(tag)
    desk = start(*node.data_dirs)
    disk = desk.disks[0]
    units = [unit for unit in desk.units() if unit.tag]
    places = [(unit, str(tag_of(users, unit.tag).relative_to(node.data_dirs[0]))) for unit in units]
    node.clear()
    _, shared = cassbackup.held_alone(disk, places)
    assert desk.let_go(units[1]) == 0
    (unit, relative), _ = places
    assert set(cassbackup.alone_in(disk, relative, unit.life, shared)) == {"manifest.json", "schema.cql"}


def test_pins_of_a_clock_that_was_ahead_are_not_found_in_the_future(node: Node, users: Table, start: Start) -> None:
    """Else nothing would lag, and heartbeats would call all listed."""
    desk = start(*node.data_dirs)
    pins = Path(desk.disks[0].path)
    desk.end()
    for path in pins.glob("*~*"):
        path.rename(path.with_name(path.name.rpartition("~")[0] + "~" + cassbackup.utc(time.time() + 1e8)))
    found = [news.found for news in start(*node.data_dirs).said(Touched)]
    assert found
    assert max(found) <= time.time()


def test_what_is_given_up_after_the_pins_were_read_stays_named_until_it_is_listed_too_p2(
    node: Node, users: Table, start: Start
) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    (unit,) = desk.lives("daily")
    node.clear("daily")
    disk, relative = desk.disks[0], str(tag_of(users).relative_to(node.data_dirs[0]))
    for name in ("manifest.json", "schema.cql"):
        read = [(disk.source(relative), name) for name in disk.lost(relative, unit.life)]
        desk.ask(desk.pinner.give_up, disk, relative, unit.life, {name: 1})
    assert [name for _, name in read] == ["manifest.json"]
    desk.ask(desk.pinner.let_go, unit, {}, read, (), ())
    assert disk.lost(relative, unit.life) == ["schema.cql"]


def test_what_was_given_up_and_is_still_there_is_pinned_again(node: Node, users: Table, start: Start) -> None:
    folder = users.directories()[0] / "backups"
    desk = start(*node.data_dirs)
    (unit,) = desk.units()
    relative = str(folder.relative_to(node.data_dirs[0]))
    alone = folder / "alone"
    alone.write_bytes(b"alone")
    desk.scan()
    alone.unlink()
    names = {"alone": 1, "nb-1-big-Data.db": 1}
    assert desk.ask(desk.pinner.give_up, desk.disks[0], relative, unit.life, names) == ("alone",)
    alone.write_bytes(b"it came again")
    assert desk.scan().copies()[str(alone)] == [Copy.of(b"it came again")]
    assert set(desk.units()) == {unit}


def test_everything_is_pinned_again_when_nothing_is_listed_any_more(node: Node, users: Table, start: Start) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    desk.let_all_go()
    assert desk.scan().units() == {}
    desk.ask(desk.pinner.forget)
    desk.scan().assert_pinned(node.history)


def test_a_kill_at_any_unlink_leaves_what_the_next_start_ends(node: Node, users: Table, start: Start) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    (unit,) = desk.lives("daily")
    pins = desk.units()[unit]
    desk.end()
    listed = {str(tag_of(users)): (unit.life, {mark_of(name, pin.fingerprint) for (_, name), pin in pins.items()})}
    for path in list(pins)[:4]:
        os.unlink(pins[path].pin)  # listed, and half let go
    (tag_of(users) / "late").touch()
    desk = start(*node.data_dirs, listed=listed)
    assert desk.lives("daily") == [unit]
    assert len(desk.units()[unit].keys() - pins.keys()) == 1
    assert desk.let_go(unit) == 0
    assert desk.scan().lives("daily") == []


# ------------------------------------------------------------------------------------------------------------
# What the loop asks, and what it is told


def test_a_fresh_scan_of_a_tag_tells_whether_anything_can_have_been_missed(tmp_path: Path, start: Start) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=2)
    users = node.table("ks1", "users")
    for _ in range(6):
        users.flush()
    desk = start(*node.data_dirs)
    node.snapshot("daily")
    desk.scan()
    (unit,) = desk.lives("daily")
    one, two = (home / "snapshots" / "daily" for home in users.directories())
    (two / "late").touch()
    assert desk.scan_tag(unit)
    assert (str(two), "late") in desk.units()[unit], "what the scan finds is pinned"
    (two / "late").unlink()
    assert not desk.scan_tag(unit), "somebody is clearing it: what else is gone, who knows?"
    shutil.rmtree(two)
    assert not desk.scan_tag(unit), "there was something, and there is no more"
    shutil.rmtree(one)
    node.snapshot("daily")
    assert not desk.scan_tag(unit), "it is another life"
    assert desk.scan_tag(desk.lives("daily")[-1])
    node.data_dirs[1].rename(tmp_path / "away")
    assert not desk.scan_tag(desk.lives("daily")[-1]), "a disk is away"


def test_it_is_idle_only_while_nothing_waits_to_be_pinned(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    desk.wait(desk.pinner.idle.is_set)
    idle, post = [], desk.pinner._post

    def hear(message: object) -> None:
        if isinstance(message, Touched):
            idle.append(desk.pinner.idle.is_set())
        post(message)

    desk.pinner._post = hear  # type: ignore[method-assign]
    node.snapshot("daily")
    users.flush()
    desk.until_pinned(node.history)
    assert True not in idle
    desk.wait(desk.pinner.idle.is_set)


def test_requests_that_nobody_waits_for_any_more_are_passed_over(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    with desk.freeze():
        assert desk.pinner.ask(desk.pinner.reconcile).cancel()
    desk.scan()


def test_after_its_end_requests_fail(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    desk.end()
    with pytest.raises(cassbackup.Fault, match="ended"):
        desk.scan()


def test_an_error_that_nobody_foresaw_is_told(
    node: Node, users: Table, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    desk = start(*node.data_dirs)
    with desk.freeze():
        desk.pinner._sort = lambda *_: 1 / 0  # type: ignore[assignment,method-assign]
        users.flush()
        asked = [desk.pinner.ask(desk.pinner.reconcile) for _ in range(2)]
    desk.wait(lambda: desk.said(Exception))
    for one in asked:
        with pytest.raises(cassbackup.Fault, match="ended"):
            one.result(PATIENCE_S)
    assert "Traceback" in caplog.text
    desk.news = [news for news in desk.news if not isinstance(news, Exception)]


def test_a_sign_of_life_comes_every_five_seconds(node: Node, users: Table, start: Start) -> None:
    desk = start(*node.data_dirs)
    desk.wait(desk.pinner.idle.is_set)
    said = len(desk.said(PinnerState))
    desk.wait(lambda: len(desk.said(PinnerState)) > said)


# ------------------------------------------------------------------------------------------------------------
# Disks


def test_a_data_directory_that_goes_is_red_and_comes_back_by_itself(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(tmp_path / "cassandra", data_dirs=2)
    for _ in range(8):
        node.table("ks1", f"t{len(node.tables)}").flush()
    desk = start(*node.data_dirs)
    listed = desk.let_all_go()
    away, here = tmp_path / "away", node.data_dirs[1]
    here.rename(away)
    assert desk.scan().state.absent == {str(here): "No such file or directory"}
    here.mkdir()
    assert desk.scan().state.absent == {str(here): "it is empty"}
    here.rmdir()
    away.rename(here)
    for table in node.tables:
        table.flush()
    node.snapshot("daily")
    assert desk.scan().state.absent == {}
    assert desk.ask(desk.pinner.listed).keys() >= listed.keys(), "nothing is gone with its disk"
    wanted = [path for _, path, _ in node.history.files() if "nb-1-" not in path or "snapshots" in path]
    assert desk.copies().keys() == set(wanted), "what was listed before is listed still"
    assert caplog.text.count("data directory is absent") == 1


@pytest.mark.parametrize("wrong", ["too high", "too deep"])
def test_a_directory_without_tables_is_not_taken_for_data_p8(
    start: Callable[..., Desk], tmp_path: Path, wrong: str
) -> None:
    node = Node(tmp_path / "cassandra")
    node.table("ks1", "users").flush()
    data = node.data_dirs[0].parent if wrong == "too high" else node.data_dirs[0] / "ks1"
    desk = start(data)
    assert desk.scan().state.absent == {str(data): "it has no tables: name the directory above the keyspaces"}


def test_a_data_directory_that_is_mounted_late_is_taken_up_when_it_comes(
    node: Node, users: Table, tmp_path: Path, start: Start
) -> None:
    data = node.data_dirs[0]
    desk = start(data)
    pins = desk.units()
    desk.end()
    data.rename(tmp_path / "unmounted")
    data.mkdir()
    desk = start(data)
    assert desk.disks[0].path == ""
    assert desk.state.absent == {str(data): "it is empty"}
    data.rmdir()
    (tmp_path / "unmounted").rename(data)
    node.snapshot("daily")
    desk.scan().assert_pinned(node.history)
    assert desk.units().keys() >= pins.keys()
    assert desk.state.absent == {}


def test_what_is_forgotten_while_its_disk_is_away_is_pinned_when_it_is_back(
    node: Node, users: Table, tmp_path: Path, start: Start
) -> None:
    """The bucket was made anew meanwhile. Nothing on the disk has another mtime than before."""
    node.snapshot("daily")
    data = node.data_dirs[0]
    for folder, _, _ in os.walk(data):
        os.utime(folder, (1e9, 1e9))
    desk = start(data)
    desk.let_all_go()
    data.rename(tmp_path / "away")
    assert desk.scan().state.absent
    desk.ask(desk.pinner.forget)
    (tmp_path / "away").rename(data)
    desk.scan().assert_pinned(node.history)


def test_what_an_earlier_process_left_is_taken_up_though_the_disk_fails_once(
    node: Node, users: Table, tmp_path: Path, start: Start
) -> None:
    data, relative, life = node.data_dirs[0], f"ks1/{'u' * 300}-{'a' * 32}/backups", cassbackup.utc(1e9)
    desk = start(data)
    pins = Path(desk.disks[0].path, f"#0123~{life}")
    desk.end()
    pins.mkdir()
    (pins / "nb-1-big-Data.db~").write_bytes(b"pinned")
    data.rename(tmp_path / "unmounted")
    data.mkdir()
    desk = start(data)
    data.rmdir()
    (tmp_path / "unmounted").rename(data)
    desk.scan()  # where this pin is from cannot be read
    (pins / "#0123.name").write_text(cassbackup.quote(relative, slash="%2F"))
    desk.scan()
    assert life in {news.unit.life for news in desk.said(Touched)}


@pytest.mark.parametrize("rest", [0, 3])
def test_what_lost_its_pin_behind_our_back_is_pinned_again(
    node: Node, users: Table, start: Start, caplog: pytest.LogCaptureFixture, rest: int
) -> None:
    node.snapshot("daily")
    desk = start(*node.data_dirs)
    listed = desk.let_all_go()
    assert "somebody removed pins" not in caplog.text
    desk.ask(desk.pinner.forget)
    units = desk.units()
    gone = set()
    for pins in units.values():
        for path in sorted(pins)[rest:]:
            os.unlink(pins[path].pin)  # somebody needed room
            gone.add("/".join(path))
    for unit in units:
        assert desk.let_go(unit) == 0
    assert caplog.text.count("somebody removed pins") == len(listed)
    assert desk.scan().copies().keys() >= gone


def test_pins_that_are_away_with_their_disk_were_removed_by_nobody(
    node: Node, users: Table, tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    desk = start(*node.data_dirs)
    units = desk.units()
    node.root.rename(tmp_path / "away")
    for unit in units:
        desk.ask(desk.pinner.let_go, unit, {}, (), (), ())
    assert "somebody removed pins" not in caplog.text
    (tmp_path / "away").rename(node.root)
    desk.scan().assert_pinned(node.history)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that mounts a tmpfs."""
    mounted = []

    def do(path: Path, options: str = "size=1m") -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "cassbackup-test", str(path)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        mounted.append(path)

    yield do
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_another_file_system_at_its_path_is_not_the_data_directory(
    node: Node, users: Table, start: Start, mount: Callable[..., None]
) -> None:
    desk = start(*node.data_dirs)
    mount(node.data_dirs[0])
    (node.data_dirs[0] / "ks1" / "users" / "backups").mkdir(parents=True)
    (node.data_dirs[0] / "ks1" / "users" / "backups" / "nb-1-big-Data.db").touch()
    assert "another file system" in desk.scan().state.absent[str(node.data_dirs[0])]
    desk.assert_pinned(node.history)


def test_an_archive_whose_disk_went_away_is_not_taken_for_an_empty_one_p8(
    tmp_path: Path, start: Start, mount: Callable[..., None]
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "CommitLog-7-1.log").write_bytes(b"log")
    desk = start(logs, include=re.compile("/logs/"))
    assert desk.state.absent == {}
    mount(logs)
    assert "another file system" in desk.scan().state.absent[str(logs)]


def test_pins_that_cannot_be_read_at_the_start_cost_no_other_data_directory(
    node: Node, users: Table, tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    other = Node(tmp_path / "other")
    other.table("ks2", "posts").flush()
    long = users.directories()[0] / "backups" / f"{'x' * 252}.db"
    long.touch()
    desk = start(*node.data_dirs, *other.data_dirs)
    [told] = Path(desk.disks[0].path).glob("*/#*.name")
    desk.end()
    told.rename(tmp_path / "told")
    told.mkdir()
    other.tables[0].flush()
    desk = start(*node.data_dirs, *other.data_dirs)
    assert "what is pinned of it cannot be read" in desk.scan().state.absent[str(node.data_dirs[0])]
    assert {news.disk for news in desk.said(Touched) if news.files} == {desk.disks[1]}
    told.rmdir()
    (tmp_path / "told").rename(told)
    assert desk.scan().state.absent == {}
    assert str(long) in desk.copies()


def test_what_came_late_to_a_tag_that_was_listed_twice_joins_its_life_after_a_restart(
    node: Node, users: Table, start: Start
) -> None:
    node.snapshot("daily")
    desk, folder = start(*node.data_dirs), tag_of(users)
    listed: Listed = {}
    for number in (7, 8):
        [unit] = desk.lives("daily")
        for (directory, name), pin in desk.units()[unit].items():
            marks = listed.setdefault(directory, (unit.life, array("Q")))[1]
            marks.append(mark_of(name, pin.fingerprint))
        assert desk.let_go(unit) == 0
        (folder / f"nb-{number}-big-Data.db").write_bytes(b"late")
        desk.scan()
    [unit] = desk.lives("daily")
    assert desk.let_go(unit) == 0
    desk.end()
    (folder / "nb-9-big-Data.db").write_bytes(b"later")
    desk = start(*node.data_dirs, listed=listed)
    found = {name for pins in desk.units().values() for directory, name in pins if directory == str(folder)}
    assert desk.lives("daily") == [unit]
    assert "manifest.json" in found


def test_a_name_that_is_pinned_still_may_be_given_again_in_a_backups_that_was_made_anew(
    tmp_path: Path, start: Start
) -> None:
    """Each data directory has its own, and all of them share a life."""
    node = Node(tmp_path / "cassandra", data_dirs=2)
    one, two = (folder / "backups" for folder in node.table("ks1", "users").directories())
    for folder, name in ((one, "nb-1-big-Data.db"), (two, "nb-2-big-Data.db")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"old")
    desk = start(*node.data_dirs)
    shutil.rmtree(one)
    desk.scan()
    one.mkdir()
    (one / "nb-1-big-Data.db").write_bytes(b"new")
    assert set(desk.scan().copies()[str(one / "nb-1-big-Data.db")]) == {Copy.of(b"old"), Copy.of(b"new")}
    assert desk.state.refused == set()


def test_what_a_long_pin_is_called_is_written_down_again_where_somebody_removed_it(
    node: Node, users: Table, start: Start
) -> None:
    backups = users.directories()[0] / "backups"
    long = backups / f"{'x' * 252}.db"
    long.write_bytes(b"flushed")
    desk = start(*node.data_dirs)
    [told] = Path(desk.disks[0].path).glob("*/#*.name")
    told.unlink()
    assert str(long) not in desk.copies()
    (backups / "more.db").touch()
    for _ in range(2):
        desk.scan()
    assert desk.copies()[str(long)] == [Copy.of(b"flushed")]
    assert desk.state.refused == set()


def test_where_a_full_disk_stays_full_one_file_is_given_up_and_told_at_a_time_p2(
    tmp_path: Path, start: Start, mount: Callable[..., None]
) -> None:
    """To note what is lost takes room, and somebody else may be faster."""
    (tmp_path / "cassandra").mkdir()
    mount(tmp_path / "cassandra")
    node = Node(tmp_path / "cassandra")
    users = node.table("ks1", "users")
    users.flush()
    desk = start(*node.data_dirs)
    disk, backups = desk.disks[0], users.directories()[0] / "backups"
    [(unit, pins)] = desk.units().items()
    users.sstables[0].remove()
    shutil.rmtree(backups)
    with contextlib.ExitStack() as held:
        for pin in pins.values():
            held.enter_context(open(pin.pin, "rb"))  # so its bytes stay
        with contextlib.suppress(OSError), (node.root / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        give_up = (desk.pinner.give_up, disk, str(backups.relative_to(node.data_dirs[0])), unit.life)
        links = {name: 1 for _, name in pins}
        [first] = desk.ask(*give_up, links)
        assert first == max(pins.values(), key=lambda pin: pin.size).name
        assert len(desk.units()[unit]) == 7
    (node.root / "ballast").unlink()
    assert sorted([first, *desk.ask(*give_up, links)]) == sorted(links)


def test_what_cannot_be_linked_now_is_named_and_tried_again(
    tmp_path: Path, start: Start, mount: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """On a tmpfs each link takes an inode."""
    (tmp_path / "cassandra").mkdir()
    mount(tmp_path / "cassandra", "size=10m,nr_inodes=60")
    node = Node(tmp_path / "cassandra")
    users = node.table("ks1", "users")
    users.flush()
    desk = start(*node.data_dirs)
    ballast = node.root / "ballast"
    ballast.mkdir()
    with contextlib.suppress(OSError):
        for number in range(100):
            (ballast / f"{number}").touch()
    for name in ("0", "1", "2", "3"):
        (ballast / name).unlink()
    folder = users.directories()[0] / "backups"
    for name in ("a", "b"):
        (folder / name).touch()
        desk.scan()
    ballast.joinpath("4").rename(folder / "c")
    for _ in range(2):
        desk.scan()
    assert str(folder / "c") not in desk.copies()
    assert list(desk.state.refused) == [str(folder)]
    assert caplog.text.count(f"cannot pin path={folder / 'c'} error=No space left on device") == 1
    (unit,) = desk.units()
    shutil.rmtree(ballast)
    assert str(folder / "c") in desk.scan().copies()
    assert desk.state.refused == set()
    assert set(desk.units()) == {unit}


def test_where_no_link_is_possible_the_cure_is_told(node: Node, users: Table) -> None:
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(node.root).st_dev:
        pytest.skip("/dev/shm is no other file system")
    other = f"/dev/shm/cassbackup-test-{os.getpid()}"
    try:
        with pytest.raises(cassbackup.Usage, match=r"Invalid cross-device link.*--pin-dir"):
            opened(str(node.data_dirs[0]), other)
    finally:
        shutil.rmtree(other)


def test_the_pins_are_beside_the_data_or_inside_and_stay_where_they_are(node: Node, users: Table) -> None:
    data = node.data_dirs[0]
    blocker = node.root / ".cassbackup"
    blocker.write_text("nothing can be made here")
    disk = opened(str(data))
    assert disk.path == str(data / ".cassbackup" / "backups")
    os.close(disk._lock)
    blocker.unlink()
    again = opened(str(data))
    assert (again.path, again.id) == (disk.path, disk.id)
    os.close(again._lock)
    shutil.rmtree(data / ".cassbackup")
    disk = opened(str(data))
    assert disk.path == str(blocker / "data")
    os.close(disk._lock)
    link = node.root / "link"
    link.symlink_to(data)
    disk = opened(str(link))
    assert (disk.path, disk.root) == (str(blocker / "data"), str(link))
    os.close(disk._lock)


def test_a_pin_directory_of_somebody_else_or_behind_a_link_is_not_used(
    node: Node, users: Table, tmp_path: Path, start: Start
) -> None:
    data = node.data_dirs[0]
    (tmp_path / "trap").mkdir()
    (node.root / ".cassbackup").symlink_to(tmp_path / "trap")
    inside = data / ".cassbackup" / "backups"
    inside.mkdir(parents=True)
    if os.geteuid():
        pytest.skip("needs root to give a directory away")
    os.chown(inside, 4711, 4711)
    desk = start(data)
    (why,) = desk.state.absent.values()
    assert "a symbolic link leads there" in why
    assert "it belongs to user 4711" in why
    assert not list((tmp_path / "trap").rglob("lock"))
    os.chown(inside, 0, 0)
    desk.scan().assert_pinned(node.history)


def checked_by_nobody(root: Path) -> str:
    """Return what a user who owns nothing of the data is told at the start."""
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable]
    source = Path(cassbackup.__file__).read_text().partition('if __name__ == "__main__":')[0]
    script = f"{source}\ntry: print(PinDirectory({str(root)!r}).check())\nexcept Usage as u: print('Usage', u)"
    if os.geteuid() or subprocess.run([*become, "-c", "import pyinotify"], check=False, capture_output=True).returncode:
        pytest.skip("needs root, and a Python that nobody may run")
    for folder in root.parents:
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    return subprocess.run([*become, "-"], input=script, check=True, capture_output=True, text=True).stdout


def test_links_to_our_own_files_prove_nothing_about_cassandras(node: Node, users: Table) -> None:
    """fs.protected_hardlinks lets nobody link what is somebody else's."""
    for folder in (node.data_dirs[0], node.root):
        folder.chmod(0o777)
    said = checked_by_nobody(node.data_dirs[0])
    assert said.startswith("Usage")
    assert said.count("Operation not permitted") == 2


def test_who_may_make_no_pin_directory_is_told_so_and_whose_data_it_is(node: Node, users: Table) -> None:
    """It passes by itself as little as a missing link does: exit 2 on a first start."""
    data = node.data_dirs[0]
    data.chmod(0o755)
    said = checked_by_nobody(data)
    assert said.startswith("Usage user nobody cannot link ")
    assert said.count("Permission denied") == 2
    assert "run as root, who owns the data" in said
    data.chmod(0o700)
    assert checked_by_nobody(data).startswith("user nobody may not read it"), "a disk may be mounted there late"


def test_two_daemons_never_share_a_pin_directory(node: Node, users: Table, start: Start) -> None:
    start(*node.data_dirs)
    with pytest.raises(cassbackup.Busy, match=f"pid {os.getpid()}"):
        opened(str(node.data_dirs[0]))


def test_the_proof_of_a_link_needs_one_file_that_may_be_linked(node: Node, users: Table, tmp_path: Path) -> None:
    """A file may have 65,000 links, or be another's; and what a killed process left must not be in the way."""
    (tmp_path / "probe~").touch()
    os.mkfifo(node.data_dirs[0] / "first")
    cassbackup._prove_link(str(node.data_dirs[0]), str(tmp_path))
    assert not (tmp_path / "probe~").exists()


def test_marks_are_the_same_for_ever() -> None:
    """The ledger keeps them."""
    fingerprint = Fingerprint(17, 4096, 1_700_000_000_000_000_000)
    assert mark_of("nb-1-big-Data.db", fingerprint) == 1161500001170743927
    assert mark_of("nb-1-big-TOC.txt", fingerprint) == mark_of("nb-1-big-TOC.txt", Fingerprint(17, 1, 2))
    assert mark_of("nb-1-big-Data.db", fingerprint) != mark_of("nb-1-big-Data.db", Fingerprint(17, 1, 2))


# ------------------------------------------------------------------------------------------------------------
# Storms


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(60, 80), (400, 8)])
def test_a_snapshot_that_is_cleared_a_second_after_its_last_link_is_complete(
    tmp_path: Path, start: Start, shape: tuple[int, int]
) -> None:
    storm = Storm(tmp_path / "data", tables=shape[0], components=shape[1])
    storm.seed()
    desk = start(storm.root)
    storm.snapshot("daily", clear_after_ms=1000)
    desk.scan().assert_pinned(storm.history)
    assert len(desk.units()) == shape[0]


@pytest.mark.slow
def test_storms_lose_nothing_p2(tmp_path: Path, start: Start) -> None:
    storm = Storm(tmp_path / "data", tables=60, components=8, indexes=2)
    storm.seed()
    with queue_of(64):
        desk = start(storm.root)
    storm.backups()
    for number in range(10):
        storm = storm.wave()
        storm.snapshot(f"run{number}")
        storm.backups()
    wanted = sum(1 for _ in storm.history.files())
    desk.wait(lambda: sum(news.files for news in desk.said(Touched)) >= wanted)
    desk.assert_pinned(storm.history)
