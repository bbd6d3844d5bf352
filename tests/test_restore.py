"""P6: restore stays inside its target and tells the truth: round trips, deaths, damage, hostile listings, Cassandra."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
from conftest import COMMAND_TIMEOUT_S, Daemon, Run, clean_environ
from faultproxy import Call, Cut, FaultProxy, Flip, count
from scene import Scene, wait_for
from servers import Bucket, FileBucket, kill_group, tethered
from tree import Copy, Node, Table

Json = dict[str, Any]
Change = Callable[[Json], object]
MIB = 1 << 20
SCRIPT = Path(__file__).resolve().parents[1] / "cassbackup.py"


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "restored"


def arguments(scene: Scene, *args: object) -> list[str]:
    """Return what restores from this bucket on a machine that knows nothing but the bucket."""
    options = ["--bucket", scene.bucket.target, "--state-dir", scene.at / "other-state"]
    return list(map(str, ["restore", *args, *options]))


def restore(scene: Scene, *args: object, check: int | None = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run `restore`; no end of it is ever a traceback."""
    done = scene.run(*arguments(scene, *args), env=scene.environ, check=None, **more)
    assert "Traceback" not in done.stderr
    assert check in {None, done.returncode}, done.stdout + done.stderr
    return done


def restore_in_place(scene: Scene, *args: object, check: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `restore --in-place` where no Cassandra runs: in a world of processes of its own, if that can be."""
    if "--data-dir" not in args:
        owner = json.loads(scene.bucket.objects()["node1.listings/owner.json"])
        args += tuple(word for path in owner["data_directories"] for word in ("--data-dir", f"{path}={path}"))
    command = [sys.executable, str(SCRIPT), *arguments(scene, "--tag", "daily", "--in-place", *args)]
    if apart := own_processes():
        command = [*apart, *command]
    elif cassandras():
        pytest.skip("a Cassandra runs on this machine")
    environ = clean_environ(scene.at / "home", scene.environ)
    done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    assert "Traceback" not in done.stderr
    assert done.returncode == check, done.stdout + done.stderr
    return done


@functools.cache
def own_processes() -> list[str]:
    """Return words that run a command among no other processes; none where that cannot be."""
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    can = shutil.which(words[0]) and not subprocess.run([*words, "true"], check=False, capture_output=True).returncode
    return words if can else []


def cassandras() -> list[Path]:
    """Return the processes that are a Cassandra, or are called so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] * (b"CassandraDaemon" in path.read_bytes())
    return found


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def staged(node: Node, tag: str) -> dict[str, bytes]:
    """Return what a staged restore of this tag must bring, as long as the tag stands on the node."""
    found = {}
    for data in node.data_dirs:
        for folder in data.glob("*/*/snapshots/*"):
            if folder.name == tag and folder.parts[-4] != "system":
                below = f"{folder.parts[-4]}/{folder.parts[-3][:-33]}"
                found.update({f"{below}/{name}": body for name, body in tree(folder).items()})
    return found


def live(node: Node) -> dict[str, bytes]:
    """Return the live SSTables of all data directories."""
    return {
        f"{data.name}/{name}": body
        for data in node.data_dirs
        for name, body in tree(data).items()
        if "/snapshots/" not in name and "/backups/" not in name
    }


def data_keys(bucket: Bucket) -> list[str]:
    """Return the keys of all Data.db."""
    return [key for key in bucket.keys() if key.endswith("-Data.db")]  # noqa: SIM118 - a method of ours


def damage(bucket: Bucket, key: str) -> None:
    """Flip a bit of an object, whose size stays."""
    body = bytearray(bucket.get(key))
    body[len(body) // 2] ^= 1
    bucket.put(key, bytes(body))


def fill(node: Node) -> dict[str, bytes]:
    """Take the snapshot `daily` of ks1.users and ks1.groups; return what a staged restore must bring."""
    for name in ("users", "groups"):
        node.table("ks1", name).flush()
    node.snapshot("daily")
    return staged(node, "daily")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Return a bucket with the snapshot `daily`, and what is in that."""
    at = tmp_path_factory.mktemp("filled")
    files = fill(Node(at / "cassandra"))
    options = ["--bucket", f"file://{at}/bucket", "--state-dir", f"{at}/state", "--name", "node1", "--once"]
    command = [sys.executable, str(SCRIPT), "watch", f"{at}/cassandra/data", *options]
    subprocess.run(command, check=True, env=clean_environ(at, {}), capture_output=True)
    return at / "bucket", files


@pytest.fixture
def daily(scene: Scene, filled: tuple[Path, dict[str, bytes]]) -> Scene:
    """Return a bucket with the snapshot `daily`, whose node is gone."""
    shutil.copytree(filled[0], scene.bucket.bucket, dirs_exist_ok=True)
    scene.expected = filled[1]  # type: ignore[attr-defined]
    return scene


def expected(scene: Scene) -> dict[str, bytes]:
    """Return the files of the snapshot that `daily` took."""
    found: dict[str, bytes] = scene.expected  # type: ignore[attr-defined]
    return found


# ------------------------------------------------------------------------------------------------------------
# Round trips


def test_a_snapshot_comes_back_byte_for_byte_from_every_store_p6(
    scene: Scene, tmp_path: Path, bucket: Bucket, into: Path
) -> None:
    """P6: several data directories, indexes, files without a byte, tables without a file, a tag with odd letters."""
    scene.bucket, scene.environ = bucket, bucket.environ
    node, tag = Node(tmp_path / "many", data_dirs=3, fmt="bti"), "été@home~1 +x"
    tag += "" if bucket.scheme == "gs" else " 100%"  # the emulator's own link to such an object leads nowhere
    users = node.table("ks1", "users", indexes=["by_name", "by_age"])
    for number in range(4):
        users.flush(components=8 + number, empty=["Rows.db"])
    node.table("ks2", "without_a_file")
    node.table("system", "local").flush()
    node.snapshot(tag)
    scene.once(*node.data_dirs)
    restore(scene, "--tag", tag, "--into", into)
    assert tree(into) == staged(node, tag)
    assert len(tree(into)) == (8 + 9 + 10 + 11) * 3 + 2 + 2
    assert b"" in tree(into).values()


@pytest.mark.slow
def test_of_two_takings_of_one_tag_each_comes_back_as_it_was(scene: Scene, node: Node, into: Path) -> None:
    users = node.table("ks1", "users")
    versions = []
    for _ in range(2):
        users.flush()
        users.compact()
        node.snapshot("daily")
        versions.append(staged(node, "daily"))
        scene.once(*node.data_dirs)
        node.clear("daily")
        scene.once(*node.data_dirs)
    takings = sorted({found.of.taking or "" for found in scene.listings("snapshot")})
    assert len(takings) == 2
    for number, taking in enumerate(takings):
        restore(scene, "--tag", f"daily@{taking}", "--into", into / str(number))
        assert tree(into / str(number)) == versions[number]
    restore(scene, "--tag", "daily", "--into", into / "newest")
    assert tree(into / "newest") == versions[1]
    assert restore(scene, "--tag", "daily@1999", "--into", into / "none", check=1).stderr.count("no snapshot") == 1


def test_what_was_flushed_after_the_snapshot_comes_back_too_with_its_indexes(
    scene: Scene, tmp_path: Path, into: Path
) -> None:
    node = Node(tmp_path / "two", data_dirs=2)
    users = node.table("ks1", "users", indexes=["by_name"])
    users.flush()
    node.snapshot("daily")
    users.flush()
    scene.once(*node.data_dirs)
    wanted = {name.split("/", 3)[3]: body for name, body in live(node).items()}
    restore(scene, "--latest", "--into", into)
    found = tree(into / "ks1" / "users")
    assert {name: body for name, body in found.items() if name != "schema.cql"} == wanted
    assert {name.rpartition("/")[0] for name in found} == {"", ".by_name"}


def test_a_generation_that_was_given_twice_comes_back_under_two(scene: Scene, node: Node, into: Path) -> None:
    """After a truncate and a restart with an empty backups/ Cassandra numbers from 1 again."""
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    first, second = users.sstables[0].path("Data.db").read_bytes(), b"other content" * 100
    for path in node.root.glob("data/ks1/users-*/backups/*"):
        path.unlink()
    users.generations[""] = 0
    users.families[""] = []
    for path in users.directories()[0].glob("nb-*"):
        path.unlink()
    users.flush()
    again = users.directories()[0] / "backups" / "nb-1-big-Data.db"
    assert again.read_bytes() not in {first, second}
    second = again.read_bytes()
    scene.once(*node.data_dirs)
    restore(scene, "--latest", "--into", into)
    found = {path.name: path.read_bytes() for path in (into / "ks1" / "users").glob("nb-*")}
    assert {found["nb-1-big-Data.db"], found["nb-2-big-Data.db"]} == {first, second}
    assert len(found) == 16
    for number in (1, 2):  # each set is of one SSTable
        digest = f"{int(found[f'nb-{number}-big-Digest.crc32']):08x}"
        assert digest == Copy.of(found[f"nb-{number}-big-Data.db"]).crc32


def test_only_the_selected_tables_come_back_and_none_of_the_system_s(daily: Scene, into: Path) -> None:
    restore(daily, "--tag", "daily", "--table", "ks1.users", "--into", into)
    assert {name for name in tree(into) if not name.startswith("ks1/users/")} == set()
    restore(daily, "--tag", "daily", "--exclude", "ks1.users", "--into", into / "rest")
    assert {name.split("/")[1] for name in tree(into / "rest")} == {"groups"}


def test_two_tables_of_one_name_are_never_staged_into_one_directory(scene: Scene, node: Node, into: Path) -> None:
    """A table that was dropped and made again has two ids; a tag can hold both."""
    for _ in range(2):
        node.table("ks1", "users").flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    done = restore(scene, "--tag", "daily", "--into", into, check=2)
    assert "two tables are called ks1.users" in done.stderr
    assert not tree(into)
    restore(scene, "--tag", "daily", "--table", f"ks1.{node.tables[0].directory}", "--into", into)
    assert node.tables[0].sstables[0].path("Data.db").read_bytes() in tree(into).values()


@pytest.mark.slow
def test_a_large_file_comes_back_whole_in_ranges(scene: Scene, node: Node, into: Path) -> None:
    users = node.table("ks1", "users")
    sstable = users.flush()
    chance, size = random.Random(3), 130 * MIB + 12_345
    with sstable.path("Data.db").open("r+b") as file:
        file.truncate(size)
        for _ in range(40):
            file.seek(chance.randrange(size - 1000))
            file.write(chance.randbytes(1000))
    body = sstable.path("Data.db").read_bytes()
    sstable.path("Digest.crc32").write_text(str(int(Copy.of(body).crc32, 16)))
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    restore(scene, "--tag", "daily", "--into", into)
    assert tree(into) == staged(node, "daily")


# ------------------------------------------------------------------------------------------------------------
# Each file: as it was, or not at all


def test_mode_time_and_owner_come_back_as_listed(scene: Scene, node: Node, into: Path) -> None:
    sstable = node.table("ks1", "users").flush()
    os.chmod(sstable.path("Data.db"), 0o640)
    os.chmod(sstable.path("TOC.txt"), 0o400)
    owner = (12_345, 54_321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for component in sstable.components:
        os.chown(sstable.path(component), *owner)
    os.utime(sstable.path("Index.db"), ns=(10**18 + 1, 10**18 + 1))
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    restore(scene, "--tag", "daily", "--into", into)
    for path in (into / "ks1" / "users").glob("nb-*"):
        was, now = os.stat(sstable.home / path.name), os.stat(path)
        assert (now.st_mode, now.st_mtime_ns, now.st_uid, now.st_gid) == (was.st_mode, was.st_mtime_ns, *owner)
    assert os.stat(into / "ks1" / "users").st_uid == owner[0]


def test_a_damaged_object_becomes_no_file_and_the_others_are_there(daily: Scene, into: Path) -> None:
    bad = data_keys(daily.bucket)[0]
    damage(daily.bucket, bad)
    done = restore(daily, "--tag", "daily", "--into", into, check=1)
    assert bad in done.stderr
    lost = expected(daily).keys() - tree(into).keys()
    assert {name.rpartition("/")[2] for name in lost} == {"nb-1-big-Data.db"}
    assert tree(into).items() < expected(daily).items()


def test_nothing_is_written_when_an_object_is_absent_or_has_another_size(daily: Scene, into: Path) -> None:
    first, second = data_keys(daily.bucket)
    daily.bucket.delete(first)
    daily.bucket.put(second, daily.bucket.get(second) + b"!")
    for more in ((), ("--dry-run",)):
        done = restore(daily, "--tag", "daily", "--into", into, *more, check=1)
        assert first in done.stdout
        assert second in done.stdout
        assert not into.exists()


def test_what_is_there_already_is_kept_and_what_is_another_file_is_never_overwritten(daily: Scene, into: Path) -> None:
    restore(daily, "--tag", "daily", "--into", into)
    users = into / "ks1" / "users"
    before = oracle.survey(into)
    inodes = {path: path.stat().st_ino for path in users.iterdir()}
    restore(daily, "--tag", "daily", "--into", into)
    assert oracle.untouched(before, oracle.survey(into)) == []
    assert {path: path.stat().st_ino for path in users.iterdir()} == inodes
    ours, gone = users / "nb-1-big-Index.db", users / "nb-1-big-Data.db"
    ours.write_bytes(b"o" * ours.stat().st_size)
    gone.unlink()
    (users / "nb-1-big-TOC.txt").unlink()
    (users / "nb-1-big-TOC.txt").symlink_to("/etc/hostname")
    (users / "nb-1-big-Filter.db").unlink()
    os.mkfifo(users / "nb-1-big-Filter.db")
    done = restore(daily, "--tag", "daily", "--into", into, check=1)
    assert re.findall(r"not restored path=\S*-big-(\S+)", done.stderr) == ["Filter.db", "Index.db", "TOC.txt"]
    assert set(ours.read_bytes()) == {ord("o")}
    assert (users / "nb-1-big-TOC.txt").is_symlink()
    assert gone.read_bytes() == expected(daily)["ks1/users/nb-1-big-Data.db"]


def test_a_pipe_is_not_taken_for_an_empty_file(scene: Scene, node: Node, into: Path) -> None:
    node.table("ks1", "users").flush(empty=["Filter.db"])
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    (into / "ks1" / "users").mkdir(parents=True)
    os.mkfifo(into / "ks1" / "users" / "nb-1-big-Filter.db")
    assert "Filter.db" in restore(scene, "--tag", "daily", "--into", into, check=1).stderr


@pytest.mark.slow
def test_a_file_that_is_moved_away_is_never_written_to_again(scene: Scene, node: Node, into: Path) -> None:
    """Killed between its two names a file has both; what comes next under the other must not reach into it."""
    users = node.table("ks1", "users")
    users.flush(size=5000)
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    restore(scene, "--tag", "daily", "--into", into)
    file = into / "ks1" / "users" / "nb-1-big-Data.db"
    body = file.read_bytes()
    left = file.with_name(temporary_name(scene, into, file.name))
    os.link(file, left)
    file.rename(file.with_name("mine"))
    users.sstables[0].path("Data.db").unlink()
    users.sstables[0].write("Data.db", bytes(reversed(body)))
    node.snapshot("other")
    scene.once(*node.data_dirs, args=("--full",))
    file.with_name("manifest.json").unlink()
    restore(scene, "--tag", "other", "--into", into, check=None)
    assert file.with_name("mine").read_bytes() == body
    assert file.read_bytes() == bytes(reversed(body))
    assert not left.exists()


def temporary_name(scene: Scene, into: Path, name: str) -> str:
    """Return the name under which a file arrives, which is its own for each name."""
    import cassbackup

    entry = cassbackup.Stored("/d", name, cassbackup.Stamp("a", 1, 0, 0), 0o644, "0", "0", "00000000", "k", "e")
    fetch = cassbackup.Fetch(entry, "ks1", "users", "/d", name)
    arriving = cassbackup.Arriving(None, fetch, str(into), f"ks1/users/{name}")  # type: ignore[arg-type]
    return arriving._temporary


def slowly(scene: Scene, into: Path, rate: str) -> subprocess.Popen[bytes]:
    """Start a restore with so many bytes a second."""
    command = [sys.executable, str(SCRIPT), *arguments(scene, "--tag", "daily", "--into", into)]
    command += ["--max-bandwidth", rate]
    environ = clean_environ(scene.at / "home", scene.environ)
    quiet = subprocess.DEVNULL
    return subprocess.Popen(tethered(command), env=environ, stdout=quiet, stderr=quiet, start_new_session=True)


def assert_nothing_partial(scene: Scene, into: Path) -> None:
    """Fail if a file that is no temporary one is not as it must be."""
    finished = {name: body for name, body in tree(into).items() if "/.cassbackup-" not in name}
    assert finished.items() <= expected(scene).items()


def test_of_two_restores_at_once_the_second_is_refused_and_one_that_was_killed_goes_on(
    scene: Scene, node: Node, into: Path
) -> None:
    node.table("ks1", "users").flush(size=3 * MIB)
    node.snapshot("daily")
    scene.expected = staged(node, "daily")  # type: ignore[attr-defined]
    scene.once(*node.data_dirs)
    first = slowly(scene, into, "20K")  # two minutes: the second may take long to start
    wait_for(lambda: any(into.rglob(".cassbackup-*")))
    done = restore(scene, "--tag", "daily", "--into", into, check=1)
    assert "another restore" in done.stderr
    assert first.poll() is None
    kill_group(first)
    assert_nothing_partial(scene, into)
    restore(scene, "--tag", "daily", "--into", into)
    assert tree(into) == expected(scene)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_restore_killed_fifty_times_is_finished_by_the_last_and_leaves_no_partial_file(
    scene: Scene, node: Node, into: Path
) -> None:
    """P6: whatever has its name is whole, at each moment of death."""
    for number in range(12):
        node.table("ks1", f"t{number}", indexes=["by_name"]).flush(size=random.Random(number).choice([100, 400_000]))
    node.snapshot("daily")
    scene.expected = staged(node, "daily")  # type: ignore[attr-defined]
    scene.once(*node.data_dirs)
    chance, alive = random.Random(11), 0
    for _ in range(50):
        for path in into.rglob("*"):
            if path.is_file() and chance.random() < 0.5:  # so that there is something to do, 50 times
                path.unlink()
        before = set(into.rglob("*"))
        running = slowly(scene, into, chance.choice(["0", "500K", "4M"]))
        wait_for(lambda: set(into.rglob("*")) != before or running.poll() is not None)  # noqa: B023 - done at once
        time.sleep(chance.uniform(0.0, 0.1))
        alive += running.poll() is None
        kill_group(running)
        assert_nothing_partial(scene, into)
    assert alive > 5
    restore(scene, "--tag", "daily", "--into", into)
    assert tree(into) == expected(scene)


# ------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Cut("reply", 2 * MIB), Flip(2 * MIB, "reply")])
def test_a_reply_that_is_cut_off_or_altered_on_its_way_is_fetched_once_more(
    scene: Scene, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy], into: Path, fault: Any
) -> None:
    node.table("ks1", "users").flush(size=5 * MIB)
    node.snapshot("daily")
    scene.bucket, scene.environ = moto, moto.environ
    scene.once(*node.data_dirs)
    between = proxy(moto)
    scene.environ = moto.through(between.url)
    rule = between.on("GET", r"-Data\.db", fault)
    restore(scene, "--tag", "daily", "--into", into)
    assert rule.acted.is_set()
    assert count(between.trace, "GET", r"-Data\.db") == 2
    assert tree(into) == staged(node, "daily")


@pytest.mark.slow
def test_what_somebody_puts_there_while_a_file_is_fetched_is_not_overwritten(
    scene: Scene, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy], into: Path
) -> None:
    """P6: the name is given by link(2), which refuses; rename(2) would take the other file away."""
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    scene.bucket, scene.environ = moto, moto.environ
    scene.once(*node.data_dirs)
    theirs = into / "ks1" / "users" / "nb-1-big-Data.db"

    def put() -> None:
        theirs.parent.mkdir(parents=True, exist_ok=True)
        theirs.write_bytes(b"theirs")

    between = proxy(moto)
    scene.environ = moto.through(between.url)
    between.on("GET", r"-Data\.db", Call(put, "before"))
    done = restore(scene, "--tag", "daily", "--into", into, check=1)
    assert theirs.read_bytes() == b"theirs"
    assert "nb-1-big-Data.db" in done.stderr
    assert not list(theirs.parent.glob(".cassbackup-*"))


# ------------------------------------------------------------------------------------------------------------
# Listings that we did not write


def listing_of(scene: Scene, table: str = "users") -> tuple[str, Json]:
    """Return key and text of the listing of a table's snapshot."""
    found = [found for found in scene.listings("snapshot") if found.of.table.startswith(f"{table}-")]
    return found[-1].key, found[-1].document


def tamper(scene: Scene, change: Change, found: tuple[str, Json] | None = None) -> None:
    """Change a listing, or that of ks1.users, and its name so that it agrees."""
    key, page = found or listing_of(scene)
    change(page)
    name = key.rpartition("/")[2]
    with contextlib.suppress(Exception):
        sizes = [entry["size"] for entries in page["directories"].values() for entry in entries]
        name = "-".join([*name.split("-")[:2], str(len(sizes)), f"{sum(sizes)}.json"])
    scene.bucket.delete(key)
    scene.bucket.put(f"{key.rpartition('/')[0]}/{name}", json.dumps(page).encode())


def entry_with(**words: Any) -> Change:
    """Return what changes an entry of a listing."""

    def change(page: Json) -> None:
        every = [entry for entries in page["directories"].values() for entry in entries]
        entry = next((entry for entry in every if "Data.db" in entry["name"]), every[0])
        for word, value in words.items():
            entry[word] = value(entry[word]) if callable(value) else value
        if not {"size", "mtime_ns"} & words.keys():
            return
        area, ino = entry["stamp"].split("-")[:2]
        with contextlib.suppress(TypeError, ValueError):
            entry["stamp"] = f"{area}-{ino}-{entry['size']:x}-{entry['mtime_ns']:x}"

    return change


def moved(change: Callable[[str], str]) -> Change:
    """Return what moves the entries of a listing into another directory."""
    return lambda page: page.update(directories={change(name): files for name, files in page["directories"].items()})


HOSTILE: dict[str, Change] = {
    "name ../": entry_with(name="../../../evil-Data.db"),
    "name quoted ../": entry_with(name="%2e%2e%2fnb-1-big-Data.db"),
    "name absolute": entry_with(name="/tmp/nb-1-big-Data.db"),
    "name NUL": entry_with(name="nb-1-big-\0Data.db"),
    "name quoted NUL": entry_with(name="nb-1-big-%00Data.db"),
    "name empty": entry_with(name=""),
    "name ..": entry_with(name=".."),
    "name huge": entry_with(name="nb-1-big-" + "D" * 300),
    "name number": entry_with(name=7),
    "name lone surrogate": entry_with(name="nb-1-big-\ud800Data.db"),
    "directory ../": moved(lambda name: name + "/../../../../.."),
    "directory .": moved(lambda name: name + "/./x"),
    "directory //": moved(lambda name: name + "//x"),
    "directory relative": moved(lambda name: name[1:]),
    "directory elsewhere": moved(lambda name: "/etc/cron.d"),
    "directory of another tag": moved(lambda name: name + "2"),
    "directory of another table": moved(lambda name: name.replace("/users-", "/groups-")),
    "directory from above": moved(lambda name: "/var/../etc" + name),
    "directory NUL": moved(lambda name: "/x%00y" + name),
    "directory huge": moved(lambda name: name + "/" + "x" * 300),
    "key of node10": entry_with(key=lambda key: key.replace("node1/", "node10/", 1)),
    "key ../": entry_with(key="node1/../node2/x"),
    "key of a listing": entry_with(key="node1.listings/owner.json"),
    "key NUL": entry_with(key="node1/a\0b"),
    "key huge": entry_with(key="node1/" + "x" * 5000),
    "key lone surrogate": entry_with(key="node1/\udcff"),
    "key none": entry_with(key=None),
    "mode setuid": entry_with(mode="4755"),
    "mode setgid": entry_with(mode="2755"),
    "mode words": entry_with(mode="rwx"),
    "mode number": entry_with(mode=420),
    "size text": entry_with(size="2048"),
    "size yes": entry_with(size=True),
    "size negative": entry_with(size=-1),
    "size beyond all disks": entry_with(size=1 << 70),
    "time beyond all years": entry_with(mtime_ns=1 << 90),
    "crc32": entry_with(crc32="../"),
    "seen": entry_with(seen="yesterday"),
    "version 2": lambda page: page.update(version=2),
    "version yes": lambda page: page.update(version=True),
    "no version": lambda page: page.pop("version"),
    "directories a list": lambda page: page.update(directories=[]),
    "entries a text": lambda page: page.update(directories=dict.fromkeys(page["directories"], "x")),
    "complete no bool": lambda page: page.update(complete="yes"),
    "another node": lambda page: page.update(node="node10"),
    "another table": lambda page: page.update(table="groups"),
    "files none": lambda page: page.update(missing="none"),
}


@pytest.fixture
def assert_refused(daily: Scene, into: Path) -> Callable[[], str]:
    """Return a function that fails unless the restore is refused before anything is written anywhere."""

    def refused() -> str:
        before = oracle.survey(daily.at, leave_out=())
        done = restore(daily, "--tag", "daily", "--into", into, check=1)
        assert oracle.untouched(before, oracle.survey(daily.at, leave_out=())) == []
        assert not into.exists()
        return done.stderr

    return refused


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_listing_is_refused_whole_before_anything_is_written(
    daily: Scene, assert_refused: Callable[[], str], what: str
) -> None:
    tamper(daily, HOSTILE[what])
    assert assert_refused().startswith("cassbackup: ")


@pytest.fixture
def logs(scene: Scene, tmp_path: Path) -> Path:
    """Return a directory of commit logs that was archived in two goes."""
    found = tmp_path / "archive"
    found.mkdir()
    for number in range(1, 4):
        (found / f"CommitLog-7-{number}.log").write_bytes(b"%d" % number * 9 * number)
        os.utime(found / f"CommitLog-7-{number}.log", (number, number))
        if number != 1:
            scene.once(found, args=("--include", "/archive/"))
    return found


def test_archived_files_come_back_whole_and_over_nothing(scene: Scene, logs: Path, into: Path) -> None:
    restore(scene, "--archive", f"{logs}/", "--into", into)
    assert tree(into) == tree(logs)
    assert {path.stat().st_mtime for path in into.iterdir()} == {1, 2, 3}
    (into / "CommitLog-7-1.log").unlink()
    (into / "CommitLog-7-2.log").write_bytes(b"mine")
    assert "CommitLog-7-2.log has other content" in restore(scene, "--archive", logs, "--into", into, check=1).stderr
    assert tree(into) == {**tree(logs), "CommitLog-7-2.log": b"mine"}


def test_what_was_lost_before_it_could_be_archived_is_named(scene: Scene, logs: Path, into: Path) -> None:
    listing = scene.listings("archive")[-1]
    lost = ["CommitLog-7-1.log", "CommitLog-7-9%1B.log"]  # the first is listed elsewhere
    tamper(scene, lambda page: page.update(lost=lost), (listing.key, listing.document))
    told = restore(scene, "--archive", logs, "--into", into, check=3).stdout
    assert re.findall("lacking: (.*)", told) == ["CommitLog-7-9%1B.log was lost before it could be stored"]
    assert tree(into) == tree(logs)


def test_a_directory_that_was_not_archived_and_options_for_tables_are_refused(
    scene: Scene, logs: Path, into: Path
) -> None:
    assert "has no archive of" in restore(scene, "--archive", logs.parent, "--into", into, check=1).stderr
    for option in ("--import", "--schema-only", "--table=ks1", "--latest"):
        restore(scene, "--archive", logs, "--into", into, option, check=2)
    assert not into.exists()


@pytest.mark.parametrize("what", [what for what in HOSTILE if what.startswith(("name", "key of", "key ../"))])
def test_a_hostile_listing_of_an_archive_writes_nothing_outside(
    scene: Scene, logs: Path, into: Path, what: str
) -> None:
    listing = scene.listings("archive")[-1]
    tamper(scene, HOSTILE[what], (listing.key, listing.document))
    before = oracle.survey(scene.at, leave_out=("restored",))
    restore(scene, "--archive", logs, "--into", into, check=1)
    assert oracle.untouched(before, oracle.survey(scene.at, leave_out=("restored",))) == []
    assert tree(into).keys() < tree(logs).keys()


@pytest.mark.slow
def test_a_listing_of_a_gigabyte_is_refused_unread(daily: Scene, assert_refused: Callable[[], str]) -> None:
    key, _ = listing_of(daily)
    with open(f"{daily.bucket.bucket}/{key}", "r+b") as file:
        file.truncate(1 << 30)
    assert "bytes" in assert_refused()


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"version": 1}', b"\xff\xfe", b'"1"'])
def test_a_listing_that_is_none_is_refused(daily: Scene, assert_refused: Callable[[], str], text: bytes) -> None:
    key, _ = listing_of(daily)
    daily.bucket.put(key, text)
    assert "listing" in assert_refused()


def test_a_listing_under_another_name_is_refused(daily: Scene, assert_refused: Callable[[], str]) -> None:
    key, page = listing_of(daily)
    daily.bucket.put(key.replace("-complete-", "-complete-1"), json.dumps(page).encode())
    assert "does not say what its name says" in assert_refused()


@pytest.mark.parametrize("name", ["..-" + "a" * 32, ".-" + "a" * 32, ".."])
def test_a_table_whose_name_leads_elsewhere_is_refused(
    daily: Scene, assert_refused: Callable[[], str], name: str
) -> None:
    key, page = listing_of(daily)
    old = f"{page['table']}-{page['table_id']}"
    page.pop("table_id")
    page["table"] = name
    page["directories"] = {text.replace(old, name): files for text, files in page["directories"].items()}
    daily.bucket.delete(key)
    if name == "..":  # no file can have such a key: it is taken for what it leads to
        pytest.skip("only a store without directories can hold this key")
    daily.bucket.put(key.replace(old, name), json.dumps(page).encode())
    assert_refused()


def test_names_that_no_terminal_should_see_are_quoted(daily: Scene, into: Path) -> None:
    key, page = listing_of(daily)
    old, name = f"{page['table']}-{page['table_id']}", "a\x1b[31m\udcff-" + "a" * 32
    page |= {"table": name[:-33], "table_id": "a" * 32}
    quoted = name.replace("\x1b", "%1B").replace("\udcff", "%FF")
    page["directories"] = {text.replace(old, quoted): files for text, files in page["directories"].items()}
    daily.bucket.put(key.replace(old, quoted), json.dumps(page).encode())
    done = restore(daily, "--tag", "daily", "--into", into)
    assert "\x1b" not in done.stdout + done.stderr
    assert quoted in done.stdout


@pytest.mark.parametrize("owner", ["9" * 30, "a\0b", "²", "-5", "nobody-knows-me", str((1 << 32) - 1)])
def test_an_owner_whom_this_machine_cannot_have_is_left_out(daily: Scene, into: Path, owner: str) -> None:
    tamper(daily, entry_with(user=owner, group=owner))
    restore(daily, "--tag", "daily", "--into", into)
    assert tree(into) == expected(daily)


@pytest.mark.parametrize("place", ["ks1", "ks1/users"])
@pytest.mark.parametrize("what", ["link", "file"])
def test_a_target_with_a_symbolic_link_or_a_file_on_the_way_is_refused(
    daily: Scene, into: Path, tmp_path: Path, place: str, what: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (into / place).parent.mkdir(parents=True)
    (into / place).symlink_to(elsewhere) if what == "link" else (into / place).write_text("")
    before = oracle.survey(into)
    restore(daily, "--tag", "daily", "--into", into, check=2)
    assert oracle.untouched(before, oracle.survey(into)) == []
    assert not list(elsewhere.iterdir())


# ------------------------------------------------------------------------------------------------------------
# The plan, and what the exit code says


def test_a_dry_run_says_what_would_come_and_writes_nothing(daily: Scene, into: Path) -> None:
    done = restore(daily, "--tag", "daily", "--into", into, "--dry-run")
    assert not into.exists()
    assert "ks1.users-" in done.stdout
    assert f"{len(expected(daily))} files" in done.stdout
    assert "free" in done.stdout
    page = json.loads(restore(daily, "--tag", "daily", "--into", into, "--dry-run", "--json").stdout)
    assert page["files"] == len(expected(daily))
    assert page["bytes"] == sum(map(len, expected(daily).values()))
    assert (page["schema"], page["node"], page["absent"], page["troubles"]) == (1, "node1", [], [])
    assert {table["sstables"] for table in page["tables"]} == {1}


def test_json_is_one_document_whatever_is_done(daily: Scene, into: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for more in ((), ("--schema-only",)):
        done = restore(daily, "--tag", "daily", "--into", into, "--json", *more)
        assert json.loads(done.stdout)["node"] == "node1"
    done = restore_in_place(daily, "--json", "--new-node", "--data-dir", tmp_path / "new")
    assert json.loads(done.stdout)["node"] == "node1"
    assert "initial_token" in done.stderr


def test_without_into_a_directory_of_its_own_is_made(daily: Scene, tmp_path: Path) -> None:
    if any(map(os.path.exists, ("/etc/cassandra", "/var/lib/cassandra/data", "/data"))):
        pytest.skip("there is a Cassandra on this machine")
    restore(daily, "--tag", "daily", cwd=tmp_path)
    assert tree(tmp_path / "cassbackup-restore") == expected(daily)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((), 2),
        (("--tag", "daily", "--latest"), 2),
        (("--at", "no time"), 2),
        (("--tag", "daily", "--in-place"), 2),
        (("--tag", "daily", "--in-place", "--same-node", "--new-node"), 2),
        (("--tag", "dialy"), 1),
        (("--tag", "daily", "--table", "ks9"), 1),
        (("--at", "2001-01-01"), 1),
        (("--tag", "daily", "--node", "node7"), 1),
    ],
)
def test_what_cannot_be_done_is_said_with_its_exit_code(
    daily: Scene, into: Path, args: tuple[str, ...], code: int
) -> None:
    assert restore(daily, *args, "--into", into, check=code).stderr.startswith("cassbackup: ")
    assert not into.exists()


def test_a_snapshot_that_lacks_files_comes_back_only_when_asked_and_with_exit_3(
    scene: Scene, node: Node, into: Path
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    users.flush()
    node.snapshot("daily")
    for path in node.root.glob("data/ks1/users-*/snapshots/daily/nb-2-big-*"):
        path.unlink()
    scene.once(*node.data_dirs, check=None)
    done = restore(scene, "--tag", "daily", "--into", into, check=1)
    assert "INCOMPLETE" in done.stdout
    assert not into.exists()
    done = restore(scene, "--tag", "daily", "--into", into, "--incomplete", check=3)
    assert "nb-2-big-Data.db" in done.stdout
    assert tree(into) == staged(node, "daily")


def test_an_old_snapshot_is_restored_with_a_word_on_what_was_deleted_since(
    scene: Scene, node: Node, into: Path
) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    long_ago = time.time() - 20 * 86400
    for path in node.root.glob("data/ks1/*/snapshots/daily/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created_at": None}))
        os.utime(path, (long_ago, long_ago))
    scene.once(*node.data_dirs)
    assert "gc_grace" in restore(scene, "--tag", "daily", "--into", into, "--dry-run").stdout


def test_a_damaged_heartbeat_does_not_keep_the_data_away(daily: Scene, into: Path) -> None:
    for number, text in enumerate([b"\xff{", b"[]", b'{"listed_through": 1}']):
        daily.bucket.put(f"node1.listings/heartbeat/20990101T00000{number}.000000Z.json", text)
        assert "heartbeat" in restore(daily, "--latest", "--into", into).stdout
        assert tree(into).items() <= expected(daily).items()


def test_a_disk_that_is_too_small_is_not_filled(daily: Scene, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        done = restore(daily, "--tag", "daily", "--into", small, check=1)
        assert "free" in done.stderr
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------------------------------------------------
# The schema


def put_tag_record(scene: Scene, stamp: str, schema: str, listings: list[str]) -> None:
    """Store what `cassbackup snapshot` writes of a tag."""
    page = {"version": 1, "tag": "daily", "listings": listings, "schema": schema}
    scene.bucket.put(f"node1.listings/tags/daily/{stamp}.json", json.dumps(page).encode())


def test_the_schema_alone_comes_from_the_snapshot_s_own_files(daily: Scene, into: Path) -> None:
    daily.bucket.delete(*data_keys(daily.bucket))  # it needs no SSTables
    restore(daily, "--tag", "daily", "--into", into, "--schema-only")
    assert tree(into) == {name: body for name, body in expected(daily).items() if name.endswith("schema.cql")}
    restore(daily, "--tag", "daily", "--into", into, "--schema-only")
    mine = into / "ks1" / "users" / "schema.cql"
    mine.write_text("mine")
    restore(daily, "--tag", "daily", "--into", into, "--schema-only", check=1)
    assert mine.read_text() == "mine"


def test_the_schema_of_a_moment_without_a_snapshot_is_that_of_the_nearest(scene: Scene, node: Node, into: Path) -> None:
    """Cassandra takes one when it truncates or drops a table; the base of a later moment is empty all the same."""
    users = node.table("ks1", "users")
    users.flush()
    users.truncate()
    users.flush()
    scene.once(*node.data_dirs)
    restore(scene, "--latest", "--into", into, "--schema-only")
    assert list(tree(into)) == ["ks1/users/schema.cql"]


def test_a_damaged_schema_is_no_schema(daily: Scene, into: Path) -> None:
    bad = next(key for key in daily.bucket.objects() if "/users-" in key and key.endswith("/schema.cql"))
    damage(daily.bucket, bad)
    restore(daily, "--tag", "daily", "--into", into, "--schema-only", check=1)
    assert sorted(tree(into)) == ["ks1/groups/schema.cql"]


def test_the_schema_that_the_cluster_described_comes_too_and_never_overwrites(daily: Scene, into: Path) -> None:
    keys = [found.key for found in daily.listings("snapshot")]
    put_tag_record(daily, "20261121T000000.000000Z", "CREATE KEYSPACE ks1 …;", keys)
    put_tag_record(daily, "20261122T000000.000000Z", "of another taking", [keys[0].replace("/daily/2", "/daily/1")])
    done = restore(daily, "--tag", "daily", "--into", into, "--schema-only")
    own = {name: body for name, body in expected(daily).items() if name.endswith("schema.cql")}
    assert tree(into) == own | {"schema.cql": "CREATE KEYSPACE ks1 …;".encode()}
    assert str(into / "schema.cql") in done.stderr
    restore(daily, "--tag", "daily", "--into", into, "--schema-only")
    (into / "schema.cql").write_text("mine")
    restore(daily, "--tag", "daily", "--into", into, "--schema-only", check=1)
    assert (into / "schema.cql").read_text() == "mine"


def test_a_tag_record_that_cannot_be_read_is_named(daily: Scene, into: Path) -> None:
    daily.bucket.put("node1.listings/tags/daily/20261121T000000.000000Z.json", b"{")
    assert "tags/daily" in restore(daily, "--tag", "daily", "--into", into, "--schema-only", check=1).stderr


# ------------------------------------------------------------------------------------------------------------
# In place: a stopped node


@pytest.fixture
def stopped(scene: Scene, tmp_path: Path) -> tuple[Scene, Node]:
    """Return a node of two data directories, whose snapshot `daily` is stored, with system tables."""
    node = Node(tmp_path / "lost", data_dirs=2, seed=4)
    for keyspace, name in [("ks1", "users"), ("system", "local"), ("system", "peers_v2"), ("system_schema", "tables")]:
        table = node.table(keyspace, name, indexes=["by_name"] if keyspace == "ks1" else [])
        for _ in range(4):
            table.flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    return scene, node


@contextlib.contextmanager
def empty(node: Node) -> Iterator[dict[str, bytes]]:
    """Take the data directories away, put empty ones in their place, and yield what was live."""
    was = live(node)
    for data in node.data_dirs:
        shutil.rmtree(data)
        data.mkdir()
    yield was


def test_in_place_each_file_comes_back_to_its_own_data_directory(stopped: tuple[Scene, Node]) -> None:
    scene, node = stopped
    with empty(node) as was:
        done = restore_in_place(scene, "--same-node")
        assert live(node) == was
        assert {name.split("/")[0] for name in was} == {"data1", "data2"}
        assert "commitlog" in done.stdout
        before = oracle.survey(node.root)
        restore_in_place(scene, "--same-node")
        assert oracle.untouched(before, oracle.survey(node.root)) == []


def test_a_new_node_gets_the_tokens_but_not_the_identity_of_the_old_one(stopped: tuple[Scene, Node]) -> None:
    scene, node = stopped
    about = {"version": 1, "cluster": "c", "host_id": "h", "dc": "dc7", "rack": "r9", "addresses": ["10.0.0.1"]}
    page = json.dumps(about | {"tokens": ["-9", "42"]}).encode()
    scene.bucket.put("node1.listings/node.20261121T000000.000000Z.json", page)
    with empty(node) as was:
        done = restore_in_place(scene, "--new-node")
        kept = {name for name in was if "/system/local" not in name and "/system/peers" not in name}
        assert live(node).keys() == kept
    for line in ("initial_token: -9,42", "num_tokens: 2", "auto_bootstrap: false", "dc=dc7", "rack=r9"):
        assert line in done.stdout


def test_data_directories_are_mapped_as_told(stopped: tuple[Scene, Node], tmp_path: Path) -> None:
    scene, node = stopped
    one, two = (tmp_path / name for name in ("one", "two"))
    one.mkdir()
    two.mkdir()
    args = ("--same-node",)
    first, second = node.data_dirs
    wanted = {name.split("/", 1)[1]: body for name, body in live(node).items() if "/users-" in name}
    restore_in_place(scene, *args, "--data-dir", f"{first}={two}", "--data-dir", f"{second}={one}")
    found = {f"data1/{name}": body for name, body in tree(two).items()}
    assert found | {f"data2/{name}": body for name, body in tree(one).items()} == live(node)
    for path in (one, two):
        shutil.rmtree(path)
        path.mkdir()
    restore_in_place(scene, *args, "--table", "ks1", "--data-dir", one)
    assert tree(one) == wanted
    wrong: list[tuple[object, ...]] = [(one, two, one), (f"{first}={tmp_path / 'none'}",), (f"{first}x={one}",)]
    for given in wrong:
        flags = [word for path in given for word in ("--data-dir", path)]
        restore_in_place(scene, *args, *flags, check=2)


def test_in_place_a_listing_alone_cannot_name_where_files_go(stopped: tuple[Scene, Node]) -> None:
    scene, node = stopped
    done = restore_in_place(scene, "--same-node", "--data-dir", f"{node.data_dirs[0]}={node.data_dirs[0]}", check=2)
    assert f"--data-dir {node.data_dirs[1]}=" in done.stderr


@pytest.mark.slow  # and so never beside tests/cassandra, which would take this for a node
def test_in_place_nothing_is_done_while_cassandra_runs(stopped: tuple[Scene, Node]) -> None:
    scene, node = stopped
    code = "import os, sys; os.execvp('sleep', ['org.apache.cassandra.service.CassandraDaemon', '250'])"
    with empty(node), subprocess.Popen([sys.executable, "-c", code]) as cassandra:
        try:
            cmdline = Path(f"/proc/{cassandra.pid}/cmdline")
            wait_for(lambda: cmdline.read_bytes().startswith(b"org.apache"))
            done = restore(scene, "--tag", "daily", "--in-place", "--same-node", check=2)
            assert str(cassandra.pid) in done.stderr
            assert live(node) == {}
        finally:
            cassandra.kill()


def strangers_of(table: Table) -> list[Path]:
    """Return where an SSTable that is of no backup could stand: in a table's directories, and in an index's."""
    first, *others = table.directories()
    return [folder / "nb-99-big-Data.db" for folder in (first / ".by_name", first, *others)]


def test_in_place_what_stands_where_the_plan_has_nothing_is_a_stranger_too(scene: Scene, tmp_path: Path) -> None:
    """A table that was empty comes back empty, and one that had all files on one disk has none on the other."""
    node = Node(tmp_path / "two", data_dirs=2)
    node.table("ks1", "groups").flush()
    users = node.table("ks1", "users")
    users.flush()
    while len({sstable.home for table in node.tables for sstable in table.sstables}) < 2:
        node.tables[0].flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    other = next(folder for folder in users.directories() if folder != users.sstables[0].home)
    (other / "nb-99-big-Data.db").write_bytes(b"stranger")
    done = restore_in_place(scene, "--same-node", check=2)
    assert str(other) in done.stderr
    restore_in_place(scene, "--same-node", "--move-aside")
    assert [path.parent.parent.name for path in other.rglob("nb-99-*")] == ["snapshots"]


def test_in_place_an_sstable_that_is_of_no_backup_is_refused_or_moved_aside(stopped: tuple[Scene, Node]) -> None:
    scene, node = stopped
    users = node.tables[0]
    with empty(node) as was:
        args = ("--same-node",)
        for stranger in strangers_of(users):
            stranger.parent.mkdir(parents=True, exist_ok=True)
            stranger.write_bytes(b"stranger")
            restore_in_place(scene, *args, check=2)
            assert list(live(node).values()) == [b"stranger"]
            stranger.unlink()
        for stranger in strangers_of(users):
            stranger.write_bytes(b"stranger")
        restore_in_place(scene, *args, "--move-aside")
        assert live(node) == was
        aside = [str(path) for path in node.root.rglob("nb-99-big-Data.db")]
        assert sorted(re.sub(".*/aside-[^/]*/", "", path) for path in aside) == [
            ".by_name/nb-99-big-Data.db",
            *["nb-99-big-Data.db"] * 2,
        ]


def test_in_place_a_directory_above_that_begins_with_a_dot_is_no_index(scene: Scene, tmp_path: Path) -> None:
    node = Node(tmp_path / ".ccm" / "node1")
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    with empty(node) as was:
        folder = users.directories()[0]
        folder.mkdir(parents=True)
        (folder / "nb-99-big-Data.db").write_bytes(b"stranger")
        restore_in_place(scene, "--same-node", "--move-aside")
        assert live(node) == was
        assert len(list(folder.glob("snapshots/aside-*/nb-99-big-Data.db"))) == 1


# ------------------------------------------------------------------------------------------------------------
# Import into a running Cassandra

NODETOOL = """#!/bin/sh
[ "$1" = -u ] && shift 2
echo "$@" >> "{calls}"
case "$*" in
{faults}
esac
case "$1" in
version) echo "ReleaseVersion: {version}" ;;
statusbackup) echo "running" ;;
import) rm "$4"/*-big-[!S]* ;;
esac
"""


@pytest.fixture
def nodetool(tmp_path: Path) -> Callable[..., tuple[Path, Callable[[], list[str]]]]:
    """Return a function that makes a nodetool: of a version, with commands that fail; and what it was asked."""

    def make(version: str = "4.1.3", *faults: str) -> tuple[Path, Callable[[], list[str]]]:
        calls, path = tmp_path / "calls", tmp_path / "nodetool"
        lines = "".join(
            f'{fault.replace(" ", "*")}*) echo "error: {fault} went wrong" >&2; exit 1 ;;\n' for fault in faults
        )
        path.write_text(NODETOOL.format(calls=calls, version=version, faults=lines))
        path.chmod(0o755)
        return path, lambda: calls.read_text().splitlines() if calls.exists() else []

    return make


def test_an_import_asks_first_and_then_hands_over_each_table(
    daily: Scene, into: Path, nodetool: Callable[..., Any]
) -> None:
    tool, calls = nodetool()
    done = restore(daily, "--tag", "daily", "--into", into, "--import", "--nodetool", f"{tool} -u me")
    asked = ["version", "tablestats ks1.groups ks1.users", "statusbackup"]
    assert calls()[:3] == asked
    assert sorted(calls()[3:]) == [f"import ks1 {name} {into}/ks1/{name}" for name in ("groups", "users")]
    assert "disablebackup" in done.stderr
    assert tree(into) == {}  # nor what an import does not take


@pytest.mark.parametrize("fault", ["version", "tablestats ks1.users"])
def test_nothing_is_fetched_when_cassandra_cannot_take_it(
    daily: Scene, into: Path, nodetool: Callable[..., Any], fault: str
) -> None:
    tool, calls = nodetool("4.1.3", fault)
    done = restore(daily, "--tag", "daily", "--into", into, "--import", "--nodetool", tool, check=1)
    assert ("has no table ks1.users\n" if "users" in fault else "went wrong") in done.stderr
    assert tree(into) == {}
    assert [call for call in calls() if call.startswith("import")] == []


def test_an_import_that_fails_is_no_success_and_can_be_run_again(
    daily: Scene, into: Path, nodetool: Callable[..., Any]
) -> None:
    tool, _ = nodetool("4.1.3", "import ks1 users")
    args = ("--tag", "daily", "--into", into, "--import", "--nodetool", tool)
    assert "went wrong" in restore(daily, *args, check=1).stderr
    assert "ks1/users/nb-1-big-Data.db" in tree(into)
    tool, calls = nodetool()
    restore(daily, *args)
    assert f"import ks1 users {into}/ks1/users" in calls()
    assert tree(into) == {}


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core takes one JVM at a time")
def test_tables_are_imported_side_by_side_since_each_is_the_start_of_a_jvm(
    daily: Scene, into: Path, tmp_path: Path, nodetool: Callable[..., Any]
) -> None:
    tool, _ = nodetool()
    both = tmp_path / "both"
    both.mkdir()
    waits = f"""case $1 in import)
        touch {both}/$3
        for _ in $(seq 300); do [ $(ls {both} | wc -l) = 2 ] && break; sleep 0.1; done
        [ $(ls {both} | wc -l) = 2 ] || {{ echo "error: alone" >&2; exit 1; }}
    esac
    """
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\n{waits}\nexec {tool} "$@"\n')
    slow.chmod(0o755)
    restore(daily, "--tag", "daily", "--into", into, "--import", "--nodetool", slow)
    assert sorted(path.name for path in both.iterdir()) == ["groups", "users"]


def test_nothing_is_imported_of_a_restore_that_lacks_a_file(
    daily: Scene, into: Path, nodetool: Callable[..., Any]
) -> None:
    damage(daily.bucket, data_keys(daily.bucket)[0])
    tool, calls = nodetool()
    restore(daily, "--tag", "daily", "--into", into, "--import", "--nodetool", tool, check=1)
    assert [call for call in calls() if call.startswith("import")] == []


def test_a_table_without_sstables_needs_no_import(
    scene: Scene, node: Node, into: Path, nodetool: Callable[..., Any]
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    users.truncate()
    node.table("ks1", "groups").flush()
    node.snapshot("daily", [node.tables[1]])
    scene.once(*node.data_dirs)
    tool, calls = nodetool()
    restore(scene, "--latest", "--into", into, "--import", "--nodetool", tool)
    assert [call for call in calls() if call.startswith("import")] == [f"import ks1 groups {into}/ks1/groups"]
    restore(scene, "--latest", "--table", "ks1.users", "--into", into)


def test_a_nodetool_that_is_not_there_is_a_wrong_setting(daily: Scene, into: Path) -> None:
    done = restore(daily, "--tag", "daily", "--into", into, "--import", "--nodetool", "/no/such/tool", check=2)
    assert "--nodetool" in done.stderr
    assert tree(into) == {}


# A /var/lib of its own, in which Cassandra's data directory is; what became of it is copied out.
OWN_MACHINE = """
mount -t tmpfs tmpfs /var/lib && mkdir /var/lib/cassandra && cp -a "$1" /var/lib/cassandra/data || exit 99
out=$2; shift 2; "$@"; code=$?
cp -a /var/lib/cassandra "$out"; exit $code
"""


def test_before_cassandra_4_files_go_into_the_live_directory_and_are_refreshed(
    scene: Scene, node: Node, nodetool: Callable[..., Any]
) -> None:
    """Under free generations: nothing there is overwritten, and none is used that stands in backups/."""
    node.table("system", "local").flush()
    fill(node)
    scene.once(*node.data_dirs)
    tool, calls = nodetool("3.11.19")
    out, before = scene.at / "out", live(node)
    command = ["unshare", "-m", "sh", "-c", OWN_MACHINE, "-", node.data_dirs[0], out, sys.executable, SCRIPT]
    command += arguments(scene, "--tag", "daily", "--import", "--nodetool", tool)
    environ = clean_environ(scene.at / "home", {})
    words = [*map(str, command)]
    done = subprocess.run(words, check=False, env=environ, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if not out.exists():
        pytest.skip("only root can have a /var/lib of its own")
    assert done.returncode == 0, done.stderr
    assert sorted(calls()[-2:]) == ["refresh ks1 groups", "refresh ks1 users"]  # at once, so in any order
    found = tree(out)
    assert {name: body for name, body in found.items() if name in before} == before
    for table in node.tables[1:]:
        for component in table.sstables[0].components:
            body = table.sstables[0].path(component).read_bytes()
            assert found[f"data/ks1/{table.directory}/nb-2-big-{component}"] == body
