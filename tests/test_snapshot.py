"""`cassbackup snapshot`: a whole backup in one command, with a daemon at work or without one.

The nodetool here is a stand-in that takes and clears snapshots as Cassandra does, by hard links; tests/cassandra does
the same with the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import oracle
import pytest
from conftest import Daemon, Run
from faultproxy import Call, FaultProxy, kill
from scene import SETTLE, Scene, wait_for
from servers import Bucket, FileBucket
from tree import Node

pytestmark = pytest.mark.slow

NODETOOL = """
import json, os, pathlib, shutil, sys
data, calls, words = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
with calls.open("a") as file:
    print(*words, file=file)
tag = words[words.index("-t") + 1] if "-t" in words else ""
if words[0] == "snapshot":
    keyspaces = [word for word in words[3:] if not word.startswith("-") and not word[0].isdigit()]
    for table in sorted(path for path in data.glob("*/*") if path.is_dir()):
        folder = table / "snapshots" / tag
        if keyspaces and table.parent.name not in keyspaces:
            continue
        if folder.exists():
            sys.exit("nodetool: Snapshot " + tag + " already exists.")
        folder.mkdir(parents=True)
        files = [path for path in table.iterdir() if path.is_file()]
        for path in files:
            os.link(path, folder / path.name)
        names = [path.name for path in files if path.name.endswith("-Data.db")]
        (folder / "manifest.json").write_text(json.dumps({"files": names}))
        (folder / "schema.cql").write_text("CREATE TABLE IF NOT EXISTS x.y (z int PRIMARY KEY);")
elif words[0] == "clearsnapshot":
    for folder in data.glob("*/*/snapshots/" + tag):
        shutil.rmtree(folder)
elif words[0] == "info":
    print("ID                     : 0c9a5c3e-1111-2222-3333-444455556666")
    print("Data Center            : dc1\\nRack                   : r1")
    print("Token                  : -42\\nToken                  : 7")
elif words[0] == "describecluster":
    print("Cluster Information:\\n\\tName: Prod Cluster\\n\\tPartitioner: Murmur3Partitioner")
elif words[0] == "status":
    print("UN  10.0.0.7  1 MiB  2  100.0%  0c9a5c3e-1111-2222-3333-444455556666  r1")
elif words[0] == "version":
    print("ReleaseVersion: 5.0.6")
"""

ON_A_TERMINAL = """
import os, pty, sys
def read(fd):
    data = os.read(fd, 4096)
    with open(sys.argv[1], "ab") as screen:
        screen.write(data)
    return data
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[2:], read)))
"""
# What runs a command and copies what it shows into a file, whose name comes first.
TERMINAL = (sys.executable, "-c", ON_A_TERMINAL)
NO_TERMINAL = ("sh", "-c", 'screen="$1"; shift; exec "$@" 2>"$screen"', "sh")
SIZE = r"[\d.]+ \w+"


class Snapshots:
    """Runs `cassbackup snapshot` on a node, with a nodetool and a cqlsh that write down how they were called."""

    def __init__(self, scene: Scene, node: Node) -> None:
        self.scene, self.node, self.data = scene, node, node.data_dirs[0]
        self.calls_file = scene.at / "calls"
        (scene.at / "nodetool.py").write_text(NODETOOL)
        (scene.at / "cqlsh.py").write_text('print("WARNING: cqlsh was built against 5.0.0.\\nCREATE KEYSPACE ks1;")')
        self.nodetool = f"{sys.executable} {scene.at / 'nodetool.py'} {self.data} {self.calls_file}"
        self.cqlsh = f"{sys.executable} {scene.at / 'cqlsh.py'}"

    def __call__(
        self, *args: object, check: int | None = 0, within: Sequence[object] = ()
    ) -> subprocess.CompletedProcess[str]:
        options = ["--bucket", self.scene.bucket.target, "--state-dir", self.scene.state, "--name", "node1", *SETTLE]
        tools = ["--nodetool", self.nodetool, "--cqlsh", self.cqlsh, "--paths", self.data]
        words = ("snapshot", *tools, *options, *args)
        return self.scene.run(*words, check=check, env=self.scene.environ, within=[str(word) for word in within])

    def calls(self, verb: str) -> list[str]:
        """Return the calls of nodetool with this verb."""
        return [line for line in self.calls_file.read_text().splitlines() if line.split()[0] == verb]

    def on_disk(self) -> set[str]:
        """Return the tags of the snapshots that are there."""
        return {path.name for path in self.data.glob("*/*/snapshots/*")}

    def records(self, tag: str) -> list[dict[str, object]]:
        """Return the records of a tag, the oldest first."""
        objects = self.scene.bucket.objects()
        return [json.loads(objects[key]) for key in sorted(objects) if f"/tags/{tag}/" in key]


@pytest.fixture
def snapshots(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket, node: Node
) -> Snapshots:
    node.incremental = False
    for table in (node.table("ks1", "users"), node.table("ks1", "orders"), node.table("system", "local")):
        table.flush()
    return Snapshots(Scene(tmp_path, daemon, run_cassbackup, tmp_bucket), node)


def listed(snapshots: Snapshots, tag: str) -> set[str]:
    """Return the tables of which the tag is listed complete."""
    takings = oracle.complete(snapshots.scene.bucket.objects(), "node1")
    return {f"{taking.keyspace}/{taking.table}" for taking in takings if taking.tag == tag}


def tables(snapshots: Snapshots) -> set[str]:
    return {f"{table.keyspace}/{table.directory}" for table in snapshots.node.tables}


def test_without_a_daemon_the_command_stores_the_snapshot_and_clears_it(snapshots: Snapshots) -> None:
    done = snapshots("-t", "weekly")
    assert listed(snapshots, "weekly") == tables(snapshots)
    assert "weekly: 3 tables" in done.stdout
    assert snapshots.on_disk() == set()
    assert snapshots.calls("snapshot") == ["snapshot -t weekly"]


def test_with_a_daemon_the_command_waits_for_it(snapshots: Snapshots) -> None:
    snapshots.scene.start(snapshots.data)
    snapshots("-t", "weekly")
    assert listed(snapshots, "weekly") == tables(snapshots)
    assert snapshots.on_disk() == set()
    assert snapshots.scene.daemon.is_running
    snapshots("-t", "weekly")  # the same tag is a new taking
    assert len(snapshots.records("weekly")) == 2


def test_a_daemon_that_dies_meanwhile_leaves_the_work_to_the_command(
    snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    store = proxy(moto)
    snapshots.scene.bucket, snapshots.scene.environ = moto, moto.through(store.url)
    daemon = snapshots.scene.start(snapshots.data)
    death = store.on("PUT", r"orders.*-Data\.db", kill(lambda: daemon.pid))
    snapshots("-t", "weekly")
    assert death.acted.is_set()
    assert daemon.process.wait() == -signal.SIGKILL
    assert listed(snapshots, "weekly") == tables(snapshots)
    assert snapshots.on_disk() == set()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_waiting_shows_how_far_the_daemon_is_and_how_long_it_will_take(
    snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy], terminal: bool
) -> None:
    store, screen = proxy(moto), snapshots.scene.at / "screen"
    snapshots.scene.bucket, snapshots.scene.environ = moto, moto.through(store.url)
    snapshots.scene.start(snapshots.data)
    screen.touch()
    held = Call(lambda: wait_for(lambda: "to go" in screen.read_text(), 100), "before")
    store.on("PUT", r"orders.*-Data\.db", held, count=None)
    snapshots("-t", "weekly", within=(*(TERMINAL if terminal else NO_TERMINAL), screen))
    told = f"weekly: stored {SIZE} of {SIZE} [(]{SIZE}/s[)]"
    text = screen.read_bytes().decode()
    assert re.search(told + r", \d+ s to go" + (r"\r" if terminal else r"\n"), text)  # the next line goes over it
    assert re.search(told + r"\r?\n", text)


def test_a_restore_shows_on_a_terminal_how_far_it_is(snapshots: Snapshots) -> None:
    snapshots("-t", "weekly")
    screen = snapshots.scene.at / "screen"
    options = ("--bucket", snapshots.scene.bucket.target, "--tag", "weekly", "--into", snapshots.scene.at / "restored")
    snapshots.scene.run("restore", *options, check=0, within=[*TERMINAL, str(screen)])
    assert re.search(f"restored ({SIZE}) of \\1 [(]{SIZE}/s[)]\r?\n", screen.read_bytes().decode())


def test_the_tag_record_names_the_listings_the_schema_and_the_place_in_the_ring(snapshots: Snapshots) -> None:
    snapshots("-t", "weekly")
    (page,) = snapshots.records("weekly")
    assert set(page["listings"]) == {found.key for found in snapshots.scene.listings("snapshot")}  # type: ignore[call-overload]
    assert page["schema"] == "CREATE KEYSPACE ks1;\n"
    (about,) = json.loads(snapshots.scene.run("list", "--json", "--bucket", snapshots.scene.bucket.target).stdout)[
        "nodes"
    ]
    told = {name: about[name] for name in ("cluster", "dc", "rack", "addresses", "tokens")}
    assert told == {
        "cluster": "Prod Cluster",
        "dc": "dc1",
        "rack": "r1",
        "addresses": ["10.0.0.7"],
        "tokens": ["-42", "7"],
    }
    snapshots("-t", "again")
    assert (
        len([key for key in snapshots.scene.bucket.objects() if ".listings/node." in key]) == 1
    )  # nothing has changed


def test_a_missing_cqlsh_costs_the_schema_but_not_the_snapshot(snapshots: Snapshots) -> None:
    done = snapshots("-t", "weekly", "--cqlsh", "/nonexistent/cqlsh")
    assert "no schema" in done.stderr
    assert "schema" not in snapshots.records("weekly")[0]
    bucket = ("--bucket", snapshots.scene.bucket.target)
    assert "no schema kept" in snapshots.scene.run("list", *bucket, "--tag", "weekly", check=0).stdout
    snapshots("-t", "weekly")
    assert snapshots.scene.run("list", *bucket, "--tag", "weekly", check=0).stdout.count("no schema kept") == 1


def test_the_schema_is_asked_for_with_ids_and_dropped_columns_and_without_where_cqlsh_cannot(
    snapshots: Snapshots,
) -> None:
    snapshots.cqlsh = f"{sys.executable} -c 'import sys; print(sys.argv[2])'"
    snapshots("-t", "new")
    snapshots.cqlsh = f"{sys.executable} -c 'import sys; sys.exit(sys.argv[2].endswith(chr(83)) or print(sys.argv[2]))'"
    snapshots("-t", "old")
    (new,), (old,) = snapshots.records("new"), snapshots.records("old")
    assert (new["schema"], old["schema"]) == ("DESCRIBE SCHEMA WITH INTERNALS\n", "DESCRIBE SCHEMA\n")


def test_keyspaces_flags_and_keep_are_passed_on(snapshots: Snapshots) -> None:
    snapshots("ks1", "-t", "weekly", "--skip-flush", "--ttl", "1d", "--keep")
    assert snapshots.calls("snapshot") == ["snapshot -t weekly -sf --ttl 86400s ks1"]
    assert snapshots.calls("clearsnapshot") == []
    assert snapshots.on_disk() == {"weekly"}
    assert {table.partition("/")[0] for table in listed(snapshots, "weekly")} == {"ks1"}


def test_the_default_tag_is_the_minute_and_earlier_ones_of_ours_are_cleared_when_listed(snapshots: Snapshots) -> None:
    began = time.gmtime()
    snapshots("--keep")
    (first,) = snapshots.on_disk()
    minute = "cassbackup-%Y%m%dT%H%MZ"
    assert time.strftime(minute, began) <= first <= time.strftime(minute, time.gmtime())
    subprocess.run([*snapshots.nodetool.split(), "snapshot", "-t", "cassbackup-20200101T0000Z"], check=True)
    snapshots("-t", "weekly")
    assert snapshots.on_disk() == {"cassbackup-20200101T0000Z"}  # not listed before: it stays until the next time
    snapshots("-t", "monthly")
    assert snapshots.on_disk() == set()


def test_what_is_not_listed_whole_is_not_cleared(snapshots: Snapshots) -> None:
    broken = (
        (snapshots.scene.at / "nodetool.py")
        .read_text()
        .replace('{"files": names}', '{"files": [*names, "nb-9-big-Data.db"]}')
    )
    (snapshots.scene.at / "nodetool.py").write_text(broken)
    for start in (False, True):
        if start:
            snapshots.scene.start(snapshots.data, args=("--settle", "1", "--reconcile", "2"))
        done = snapshots("-t", f"weekly{start}", check=1)
        assert "not listed whole" in done.stderr
        assert f"weekly{start}" in snapshots.on_disk()
        assert snapshots.records(f"weekly{start}") == []


def test_a_daemon_with_another_store_name_or_filter_is_refused(snapshots: Snapshots) -> None:
    snapshots.scene.start(snapshots.data)
    for args in (("--bucket", "file:///nonexistent"), ("--name", "node2"), ("--exclude-keyspace", "ks1")):
        assert "the running daemon" in snapshots("-t", "weekly", *args, check=2).stderr
    assert not snapshots.calls_file.exists()


def test_below_the_free_space_floor_no_snapshot_is_taken(snapshots: Snapshots) -> None:
    disk = os.statvfs(snapshots.data)
    floor = f"{min(99.9, 100 * disk.f_bavail / disk.f_blocks + 5):.1f}%"
    assert "too little room" in snapshots("-t", "weekly", "--free-floor", floor, check=3).stderr
    assert not snapshots.calls_file.exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("-t", "a/b"), "tag"),
        (("-t", "weekly", "--nodetool", "/nonexistent/nodetool"), "--nodetool"),
        (("-t", "weekly", "--nodetool", "false"), "running"),
    ],
)
def test_bad_input_is_named_and_nothing_is_taken(snapshots: Snapshots, args: tuple[str, ...], said: str) -> None:
    done = snapshots(*args, check=None)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert snapshots.on_disk() == set()
