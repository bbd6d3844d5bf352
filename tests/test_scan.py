"""Looking and taking hold: kinds of files, odd names, missing rights, full tables, and areas where link(2) fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import oracle
import pytest
from conftest import Daemon, Run, clean_environ
from faultproxy import FaultProxy
from scene import PATIENT, Scene, area_of, assert_no_pin_is_left, nobody, pins, wait_for
from servers import Bucket, FileBucket
from tree import Node, Table

import cassbackup

NOBODY = 65534
Within = Callable[..., Daemon]


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


@pytest.fixture
def within(scene: Scene, script: Path, home: Path) -> Iterator[Within]:
    """Return a function that starts the scene's daemon by way of another command, such as `unshare`."""
    started = []

    def start(wrapper: list[str], *paths: Path, args: tuple[object, ...] = ()) -> Daemon:
        options = ["--bucket", scene.bucket.target, "--state-dir", scene.state, "--name", "node1", *PATIENT, *args]
        command = [*wrapper, sys.executable, str(script), "watch", *map(str, paths), *map(str, options)]
        started.append(Daemon(command, clean_environ(home, scene.environ), scene.at / "wrapped.log"))
        scene.daemon = started[-1].start()
        return scene.until_it_watches()

    yield start
    for one in started:
        one.kill()


def as_nobody(scene: Scene, tmp_path: Path) -> list[str]:
    """Return a prefix that becomes nobody, for whom state directory, bucket and home are made."""
    become = nobody()
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    scene.state.mkdir()
    for folder in (scene.state, tmp_path / "bucket", tmp_path / "home"):
        os.chown(folder, NOBODY, NOBODY)
    return become


def give(root: Path, user: int) -> None:
    """Make a user the owner of a whole tree."""
    os.chown(root, user, user)
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            os.chown(os.path.join(folder, name), user, user, follow_symlinks=False)


def backups_of(table: Table) -> Path:
    """Return the backups/ of a table, made if need be."""
    folder = table.directories()[0] / "backups"
    folder.mkdir(exist_ok=True)
    return folder


def listed_names(scene: Scene) -> set[bytes]:
    """Return the names in all listings, as bytes."""
    return {unquote_to_bytes(entry.path).rpartition(b"/")[2] for found in scene.listings() for entry in found.entries}


# ------------------------------------------------------------------------------------------------------------
# Kinds and names


def test_what_is_no_regular_file_is_skipped_and_counted_and_never_hangs(
    scene: Scene, node: Node, tmp_path: Path
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    backups = backups_of(users)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "nb-7-big-Data.db").write_bytes(b"not yours")
    os.mkfifo(backups / "nb-2-big-Data.db")
    os.symlink(secret / "nb-7-big-Data.db", backups / "nb-3-big-Data.db")
    os.symlink(secret, backups / ".idx")
    os.symlink("nb-4-big-Data.db", backups / "nb-4-big-Data.db")
    os.symlink("/no/where", backups / "nb-5-big-Data.db")
    os.symlink(secret, users.directories()[0] / "snapshots")
    with socket.socket(socket.AF_UNIX) as listener:
        at = os.getcwd()
        os.chdir(backups)  # the path of a socket must be short
        listener.bind("nb-6-big-Data.db")
        os.chdir(at)
    count = 6
    if os.geteuid() == 0:
        os.mknod(backups / "nb-8-big-Data.db", 0o20600, os.makedev(1, 5))  # /dev/zero has no end
        count += 1
    (backups / "nb-9-big-Data.db").mkdir()
    scene.start(*node.data_dirs)
    page = scene.settled()
    assert page["counts"]["skipped_kind"] >= count
    scene.assert_all_is_listed(node.history)
    assert listed_names(scene) == {os.path.basename(path).encode() for _, path, _ in node.history.files()}
    assert b"not yours" not in scene.bucket.objects().values()
    for number in range(2, 7):
        assert f"nb-{number}-big-Data.db" in scene.daemon.log()


@pytest.mark.slow
def test_a_linked_keyspace_or_table_is_red_until_it_is_left_out_p2_p8(scene: Scene, node: Node, tmp_path: Path) -> None:
    """Cassandra follows such links (to another disk); we do not, and must not pass over them in silence."""
    users, posts = node.table("ks1", "users"), node.table("ks2", "posts")
    users.flush()
    posts.flush()
    data, home = node.data_dirs[0], users.directories()[0]
    (data / "ks2").rename(tmp_path / "ks2")
    (data / "ks2").symlink_to(tmp_path / "ks2")
    home.rename(tmp_path / home.name)
    home.symlink_to(tmp_path / home.name)
    (data / "notes").symlink_to(__file__)
    (data / "dangling").symlink_to("/no/where")
    done = scene.once(*node.data_dirs, check=3)
    assert done.stderr.count("symbolic link") == 2
    for place in (data / "ks2", home):
        assert f"path={place} " in done.stderr
    leave_out = ("--exclude-keyspace", "ks2", "--exclude-table", "ks1.users")
    assert "symbolic link" not in scene.once(*node.data_dirs, args=leave_out).stderr
    began = time.time()
    scene.start(*node.data_dirs, args=("--heartbeat", "1", "--reconcile", "3"))
    assert f"nothing is stored of {home}, and 1 more directories" in status_text_of(scene)
    wait_for(lambda: heartbeat_of(scene).get("oldest_incrementals"))
    late = heartbeat_of(scene)
    assert began - 1 < late["oldest_incrementals"].pop(f"ks1/{home.name}") < time.time()
    assert set(late["oldest_incrementals"]) == {"ks2"}
    wait_for(lambda: heartbeat_of(scene)["looked"] > late["looked"])
    later = heartbeat_of(scene)
    assert later["listed_through"] < later["looked"], "who reads the bucket must see it, too"
    for place, moved in ((data / "ks2", tmp_path / "ks2"), (home, tmp_path / home.name)):
        place.unlink()
        moved.rename(place)
    scene.settled()
    assert "nothing is stored" not in status_text_of(scene)
    scene.assert_all_is_listed(node.history)
    wait_for(lambda: heartbeat_of(scene)["listed_through"] > later["looked"])
    assert heartbeat_of(scene)["oldest_incrementals"] == {}


def heartbeat_of(scene: Scene) -> dict[str, Any]:
    """Return what the newest heartbeat says, {} before the first."""
    beats = [key for key in scene.bucket.keys() if ".listings/heartbeat/" in key]  # noqa: SIM118
    return dict(json.loads(scene.bucket.get(beats[-1]))) if beats else {}


def test_a_probe_that_a_killed_process_left_behind_is_no_reason_not_to_link(node: Node, tmp_path: Path) -> None:
    """In a container each start has the same pid."""
    node.table("ks1", "users").flush()
    probe = tmp_path / f".probe-{os.getpid()}"
    probe.write_text("")
    assert cassbackup.why_no_link(str(node.data_dirs[0]), str(tmp_path)) == ""
    assert not probe.exists()


def status_text_of(scene: Scene) -> str:
    """Return what `cassbackup status` says, red or not."""
    return scene.run("status", "--state-dir", scene.state, check=None).stdout


def test_a_directory_that_becomes_a_symlink_is_not_followed(scene: Scene, node: Node, tmp_path: Path) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scene.start(*node.data_dirs)
    scene.settled()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.db").write_bytes(b"not yours")
    backups = backups_of(users)
    backups.rename(tmp_path / "aside")
    os.symlink(outside, backups)
    scene.settled()
    assert b"not yours" not in scene.bucket.objects().values()
    assert scene.daemon.is_running


@pytest.mark.slow
def test_sparse_and_empty_files_are_stored_whole(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush(components=12, empty=["Filter.db"])
    sparse = backups_of(users) / "sparse.db"
    sparse.touch()
    os.truncate(sparse, 17_000_001)
    scene.once(*node.data_dirs)
    scene.assert_all_is_listed(node.history)
    (entry,) = (entry for found in scene.listings() for entry in found.entries if entry.path == str(sparse))
    assert scene.bucket.objects()[entry.key] == bytes(17_000_001)


NAMES = [
    b"new\nline-Data.db",
    b"\x01\x1b[31m\x7f.db",
    b"\xff\xfe not utf-8.db",
    "ünïcödé ∀ 漢.db".encode(),
    "e\u0301 twin.db".encode(),
    "\u00e9 twin.db".encode(),
    b"%41 percent.db",
    b"A percent.db",
    b"%%" + b"a" * 40,
    b"-leading dash",
    b"trailing space ",
    b"~",
    b"back~slash\\~",
    b"...",
    b"x" * 255,
    b"\xff" * 255,
    "漢".encode() * 85,
    b"y" * 230,
    b"y" * 231,
]


def test_every_name_that_a_file_system_can_hold_is_stored_and_listed(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    backups = os.fsencode(backups_of(users))
    snapshot = os.fsencode(users.directories()[0]) + b"/snapshots/tag \xff\n~%"
    os.makedirs(snapshot)
    for folder in (backups, snapshot):
        for name in NAMES:
            with open(os.path.join(folder, name), "wb") as file:
                file.write(folder + name)
    scene.once(*node.data_dirs, check=None)
    objects = scene.bucket.objects()
    assert oracle.problems(objects, "node1") == []
    found = {
        unquote_to_bytes(entry.path): objects[entry.key] for listing in scene.listings() for entry in listing.entries
    }
    wanted = {os.path.join(folder, name): folder + name for folder in (backups, snapshot) for name in NAMES}
    assert found == wanted
    assert_no_pin_is_left(node.root / ".cassbackup")


def test_a_path_too_long_for_a_name_in_the_pin_area_leaves_nothing_there(scene: Scene, node: Node) -> None:
    """It stands there under a hash, and another file says which: Cassandra's own tags are new ones each time."""
    table = node.table("k" * 48, "t" * 48)
    table.flush()
    scene.start(*node.data_dirs)
    for number in range(2):
        node.snapshot(f"truncated-{number}-{'t' * 48}")
    scene.settled()
    scene.assert_all_is_listed(node.history)
    wait_for(lambda: not list(area_of(node).glob("*/%%*")))


@pytest.mark.slow
def test_odd_names_survive_a_kill_between_pin_and_listing(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    scene.start(*node.data_dirs, args=("--settle", "600"))
    folder = os.fsencode(users.directories()[0]) + b"/snapshots/\xff\n"
    os.makedirs(folder)
    for name in NAMES:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(name)
    wait_for(lambda: scene.page()["counts"].get("found", 0) == len(NAMES))
    scene.daemon.kill()
    shutil.rmtree(folder)
    scene.daemon.command[scene.daemon.command.index("600")] = "1"
    scene.restart()
    scene.settled()
    assert listed_names(scene) == set(NAMES)
    assert oracle.problems(scene.bucket.objects(), "node1") == []


# ------------------------------------------------------------------------------------------------------------
# Rights and limits


@pytest.mark.slow
def test_a_directory_that_may_not_be_read_is_named_and_listed_once_it_may(
    scene: Scene, node: Node, within: Within, tmp_path: Path
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    wrapper = as_nobody(scene, tmp_path)
    give(node.root, NOBODY)
    locked = users.directories()[0] / "snapshots" / "daily"
    locked.chmod(0)
    within(wrapper, *node.data_dirs, args=("--reconcile", "1"))
    page = scene.settled()
    assert page["counts"]["refused"] >= 1
    assert str(locked) in scene.daemon.log()
    assert scene.listings("snapshot") == []
    assert page["behind"] != []
    locked.chmod(0o755)
    wait_for(lambda: scene.listings("snapshot"))
    scene.settled()
    scene.assert_all_is_listed(node.history)


def with_few_watches() -> list[str]:
    """Return a prefix that leaves a command ten watches; skip where that cannot be had."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    limit = "echo 10 >/proc/sys/user/max_inotify_watches"
    if os.system(f"unshare -Ur sh -c '{limit}' 2>/dev/null"):
        pytest.skip("needs user namespaces with a writable max_inotify_watches")
    return ["unshare", "-Ur", "sh", "-c", f'{limit} && exec "$@"', "sh"]


@pytest.mark.slow
def test_a_full_watch_table_is_named_with_its_sysctl_and_all_is_listed_all_the_same_p2(
    scene: Scene, node: Node, within: Within
) -> None:
    tables = [node.table("ks1", f"t{number}") for number in range(20)]
    within(with_few_watches(), *node.data_dirs)
    assert "fs.inotify.max_user_watches" in scene.daemon.log()
    for table in tables:
        table.flush()
    node.snapshot("daily")
    wait_for(lambda: oracle.lost(node.history, scene.bucket.objects(), "node1") == [])
    assert scene.settled()["counts"]["found_by_rescan"] > 0
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_who_waits_for_the_status_may_clear_also_where_no_event_tells_of_the_snapshot_p8(
    scene: Scene, node: Node, within: Within
) -> None:
    """nodetool snapshot && cassbackup status --wait && nodetool clearsnapshot, as the README has it."""
    tables = [node.table("ks1", f"t{number}") for number in range(20)]
    within(with_few_watches(), *node.data_dirs)
    for number in range(5):
        for table in tables:
            table.flush()
        node.snapshot(f"tag{number}")
        scene.settled()
        node.clear()
        for table in tables:
            table.compact()
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert {found.state for found in scene.listings("snapshot")} == {"complete"}


@pytest.fixture
def another_mount(tmp_path: Path) -> Iterator[Path]:
    """Return a directory on a file system other than that of tmp_path."""
    folder = Path("/dev/shm") / f"cassbackup-test-{os.getpid()}"
    if not folder.parent.is_dir() or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("/dev/shm is no other file system")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_where_links_cross_a_mount_files_are_held_open_or_read_in_place(
    scene: Scene, node: Node, another_mount: Path
) -> None:
    users = node.table("ks1", "users")
    for _ in range(40):  # 320 files: more than are held open
        users.flush()
    before = oracle.survey(node.root)
    scene.start(*node.data_dirs, args=("--pin-dir", another_mount))
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert oracle.untouched(before, oracle.survey(node.root)) == []
    assert "--pin-dir" in scene.daemon.log()
    node.snapshot("daily")
    page = scene.settled()
    scene.assert_all_is_listed(node.history)
    assert page["counts"]["unlinked"] >= 320
    assert_no_pin_is_left(another_mount)


@pytest.mark.slow
def test_files_held_open_outlive_the_clearing_of_their_snapshot(
    scene: Scene, node: Node, another_mount: Path, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    between = proxy(moto)
    scene.bucket, scene.environ = moto, moto.through(between.url)
    scene.start(*node.data_dirs, args=("--pin-dir", another_mount))
    scene.settled()
    between.down()
    users.compact()
    node.snapshot("daily")
    scene.until_found(18)
    assert scene.page()["counts"]["unlinked"] >= 18
    node.clear("daily")
    between.up()
    scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.slow
def test_a_pin_area_of_earlier_settings_where_files_wait_is_named(
    scene: Scene, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    """P2: nothing looks there any more, and what it holds may be held by nothing else."""
    between = proxy(moto)
    scene.bucket, scene.environ = moto, moto.through(between.url)
    scene.start(*node.data_dirs)
    between.down()
    node.table("ks1", "users").flush()
    wait_for(lambda: list(pins(area_of(node))))
    scene.daemon.stop()
    between.up()
    other = ("--pin-dir", node.root / "pins")
    named = f"not used any more area={area_of(node) / node.data_dirs[0].name}"
    assert named in scene.once(*node.data_dirs, args=other).stderr
    scene.once(*node.data_dirs)
    assert named not in scene.once(*node.data_dirs, args=other).stderr


def test_where_the_kernel_refuses_links_to_foreign_files_they_are_listed_all_the_same(
    scene: Scene, node: Node, within: Within, tmp_path: Path
) -> None:
    if Path("/proc/sys/fs/protected_hardlinks").read_text().strip() != "1":
        pytest.skip("fs.protected_hardlinks is off")
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    wrapper = as_nobody(scene, tmp_path)
    for folder in (node.root, *node.data_dirs):
        folder.chmod(0o777)
    before = oracle.survey(node.root)
    within(wrapper, *node.data_dirs)
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert "owner of the data" in scene.daemon.log()
    assert oracle.untouched(before, oracle.survey(node.root)) == []


def test_started_as_root_it_becomes_the_owner_of_the_data(
    scene: Scene, node: Node, within: Within, tmp_path: Path
) -> None:
    prefix = as_nobody(scene, tmp_path)
    python = os.path.join(sys.base_prefix, "lib")
    if subprocess.run([*prefix, "test", "-x", python], check=False).returncode:
        pytest.skip(f"nobody else may read {python}")
    node.table("ks1", "users").flush()
    give(node.root, NOBODY)
    within([], *node.data_dirs)
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert os.stat(f"/proc/{scene.daemon.pid}").st_uid == NOBODY


@pytest.mark.slow
def test_the_pins_go_inside_the_data_directory_where_nothing_may_be_made_beside_it(
    scene: Scene, node: Node, within: Within, tmp_path: Path
) -> None:
    node.table("ks1", "users").flush()
    wrapper = as_nobody(scene, tmp_path)
    give(node.data_dirs[0], NOBODY)
    within(wrapper, *node.data_dirs)
    scene.settled()
    scene.assert_all_is_listed(node.history)
    assert not (node.root / ".cassbackup").exists()
    area = node.data_dirs[0] / ".cassbackup" / "backups"
    assert area.is_dir()
    assert {name for _, _, names in os.walk(area) for name in names if name.endswith(".db")} == set()
    assert_no_pin_is_left(area)


# ------------------------------------------------------------------------------------------------------------
# What the operator wants stored


@pytest.mark.slow
def test_filters_leave_out_what_they_say_and_count_what_is_too_old(scene: Scene, node: Node) -> None:
    for keyspace, name in (("ks1", "users"), ("ks1", "cache"), ("ks2", "users"), ("system", "local")):
        node.table(keyspace, name).flush()
    node.snapshot("daily")
    node.snapshot("scratch-1")
    args = ("--exclude-keyspace", "ks2", "--exclude-table", "ks1.cache", "--exclude-tag", "scratch-*")
    scene.once(*node.data_dirs, args=args)
    found = {(listing.of.keyspace, listing.document["table"], listing.of.tag) for listing in scene.listings("snapshot")}
    assert found == {("ks1", "users", "daily"), ("system", "local", "daily")}
    scene.start(*node.data_dirs, args=("--since", "2038-01-01", "--state-dir", scene.at / "state"))
    assert scene.settled()["counts"]["skipped_since"] > 0


@pytest.mark.slow
def test_archive_directories_are_stored_when_they_are_asked_for(scene: Scene, node: Node, tmp_path: Path) -> None:
    logs = tmp_path / "commitlogs"
    logs.mkdir()
    scene.start(logs, args=("--include", r"CommitLog-.*\.log$", "--exclude", "CommitLog-9"))
    for number in (1, 2, 9):
        (logs / f"CommitLog-7-{number}.log").write_bytes(b"x" * number)
        (logs / f"CommitLog-{number}.log").write_bytes(b"y" * number)
    (logs / "notes.txt").write_bytes(b"no")
    wait_for(lambda: len(listed_names(scene)) >= 5)
    scene.settled()
    assert listed_names(scene) == {
        b"CommitLog-7-1.log",
        b"CommitLog-7-2.log",
        b"CommitLog-7-9.log",
        b"CommitLog-1.log",
        b"CommitLog-2.log",
    }
    assert json.loads(json.dumps(scene.listings("archive")[0].document))["kind"] == "archive"


# ------------------------------------------------------------------------------------------------------------
# Looking again costs little


@contextlib.contextmanager
def pinner_of(node: Node) -> Iterator[cassbackup.Pinner]:
    """Return a pinner that has looked everywhere, and does nothing by itself."""
    area, watcher = cassbackup.open_area(str(node.data_dirs[0])), cassbackup.Watcher()
    pinner = cassbackup.Pinner([area], watcher, cassbackup.Filters(), cassbackup.Clock(), lambda _: {}, lambda *_: None)
    try:
        yield pinner
    finally:
        watcher.close()
        area.close()


def test_directories_of_a_time_when_the_clock_was_ahead_are_not_looked_into_again_and_again(node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    with pinner_of(node) as pinner:
        pinner.look_everywhere()
        for folder, _, _ in os.walk(node.data_dirs[0]):
            os.utime(folder, (time.time() + 86400,) * 2)
        pinner.reconcile()
        before = pinner.beat
        pinner.reconcile()
        assert pinner.beat == before, "something was looked into, and nothing had changed"
        users.flush()
        pinner.reconcile()
        assert pinner.beat > before
        assert pinner.counts["found"] == sum(1 for _ in backups_of(users).iterdir())
