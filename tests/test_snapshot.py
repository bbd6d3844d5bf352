"""`cassbackup snapshot`: a whole backup in one command, with a daemon at work or without one.

The nodetool here is a stand-in that takes and clears snapshots as Cassandra does, by hard links; tests/cassandra does
the same with the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from conftest import Daemon, Run
from faultproxy import BlackHole, FaultProxy, kill, s3_error
from scene import Scene, wait_for
from servers import Bucket, FileBucket
from shelf import Door, Shelf
from tree import Node

import cassbackup
from cassbackup import describe_schema

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
    for keyspace in words[3:] or ["*"]:
        for folder in data.glob(keyspace + "/*/snapshots/" + tag):
            shutil.rmtree(folder)
elif words[0] == "info":
    print("ID                     : 0c9a5c3e-1111-2222-3333-444455556666")
    print("Data Center            : dc1\\nRack                   : r1")
    print("Token                  : -42\\nToken                  : 7")
elif words[0] == "describecluster":
    print("Cluster Information:\\n\\tName: Prod Cluster\\n\\tPartitioner: Murmur3Partitioner")
elif words[0] == "status":
    print("Datacenter: dc1\\nUN  10.0.0.7  1 MiB  2  100.0%  0c9a5c3e-1111-2222-3333-444455556666  r1")
    print("UN  10.0.0.8  1 MiB  2  100.0%  0c9a5c3e-9999-2222-3333-444455556666  r1")
elif words[0] == "version":
    print("WARN  10:00:00,123 noise of the JVM\\nReleaseVersion: 5.0.6")
"""


class Snapshots:
    """Runs `cassbackup snapshot` on a node, with a nodetool and a cqlsh that write down how they were called."""

    def __init__(self, scene: Scene, node: Node) -> None:
        self.scene, self.node, self.data = scene, node, node.data_dirs[0]
        self.calls_file = scene.at / "calls"
        (scene.at / "nodetool.py").write_text(NODETOOL)
        (scene.at / "cqlsh.py").write_text('print("WARNING: cqlsh was built against 5.0.0.\\nCREATE KEYSPACE ks1;")')
        self.nodetool = f"{sys.executable} {scene.at / 'nodetool.py'} {self.data} {self.calls_file}"
        self.cqlsh = f"{sys.executable} {scene.at / 'cqlsh.py'}"
        (scene.at / "settings").write_text("CASSBACKUP_INCOMPLETE_AFTER=1s\n")

    def __call__(self, *args: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        options = ["--bucket", self.scene.bucket.target, "--state-dir", self.scene.state, "--name", "node1"]
        tools = ["--nodetool", self.nodetool, "--cqlsh", self.cqlsh, "--paths", self.data]
        tools += ["--config", self.scene.at / "settings"]
        return self.scene.run("snapshot", *tools, *options, *args, check=check, env=self.scene.environ)

    def calls(self, verb: str) -> list[str]:
        """Return the calls of nodetool with this verb."""
        return [line for line in self.calls_file.read_text().splitlines() if line.split()[0] == verb]

    def on_disk(self) -> set[str]:
        """Return the tags of the snapshots that are there."""
        return {path.name for path in self.data.glob("*/*/snapshots/*")}

    def records(self, tag: str) -> list[dict[str, Any]]:
        """Return the records of a tag, the oldest first."""
        objects = self.scene.bucket.objects()
        return [json.loads(objects[key]) for key in sorted(objects) if f"/tags/{tag}/" in key]

    def listed(self, tag: str) -> set[str]:
        """Return the tables of which the tag is listed complete."""
        found = oracle.complete(self.scene.bucket.objects(), "node1")
        return {f"{one.keyspace}/{one.table}" for one in found if one.tag == tag}

    @property
    def tables(self) -> set[str]:
        return {f"{table.keyspace}/{table.directory}" for table in self.node.tables}


@pytest.fixture
def snapshots(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket, node: Node
) -> Snapshots:
    for table in (node.table("ks1", "users"), node.table("ks1", "orders"), node.table("system", "local")):
        table.flush()
    return Snapshots(Scene(tmp_path, daemon, run_cassbackup, tmp_bucket), node)


def test_without_a_daemon_the_command_stores_the_snapshot_records_and_clears_it(snapshots: Snapshots) -> None:
    done = snapshots("-t", "weekly")
    assert snapshots.listed("weekly") == snapshots.tables
    assert f"weekly: 3 tables, listed complete in {snapshots.scene.bucket.target}\n" in done.stdout
    assert snapshots.on_disk() == set()
    assert snapshots.calls("snapshot") == ["snapshot -t weekly"]
    assert snapshots.scene.listings("incremental") == []  # the daemon's work, not this command's
    (record,) = snapshots.records("weekly")
    listings = snapshots.scene.listings("snapshot")
    assert record["listings"] == sorted(one.key for one in listings)
    assert record["taken"] == min(key.split("/")[-2] for key in record["listings"])
    assert record["schema"] == "CREATE KEYSPACE ks1;\n"
    assert "UN  10.0.0.8 " in record["ring"]  # the whole ring, for who builds a new one
    where = ("--bucket", snapshots.scene.bucket.target)
    (page,) = json.loads(snapshots.scene.run("list", "--json", *where, check=0).stdout)["nodes"]
    told = [page[word] for word in ("cluster", "dc", "rack", "addresses", "tokens", "host_id")]
    assert told == ["Prod Cluster", "dc1", "r1", ["10.0.0.7"], ["-42", "7"], "0c9a5c3e-1111-2222-3333-444455556666"]
    snapshots("-t", "again")
    nodes = [key for key in snapshots.scene.bucket.objects() if ".listings/node." in key]
    assert len(nodes) == 1  # nothing has changed


def test_with_a_daemon_the_command_waits_for_it(snapshots: Snapshots) -> None:
    snapshots.scene.start(snapshots.data)
    snapshots("-t", "weekly")
    assert snapshots.listed("weekly") == snapshots.tables
    assert snapshots.on_disk() == set()
    assert snapshots.scene.daemon.is_running
    snapshots("-t", "weekly")  # the same tag is a new life
    assert len(snapshots.records("weekly")) == 2


def test_a_daemon_answers_what_a_snapshot_waits_for_while_its_store_hangs(
    snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    store = proxy(moto)
    snapshots.scene.bucket, snapshots.scene.environ = moto, moto.through(store.url)
    snapshots.scene.start(snapshots.data)
    snapshots.scene.settled()
    hangs = store.on("PUT", r"/backups/", BlackHole(), count=None)
    for table in snapshots.node.tables:
        table.flush()
    wait_for(lambda: hangs.hits >= 2)  # as many threads as urgent jobs have
    reply = cassbackup.ask_daemon(str(snapshots.scene.state), {"do": "scan"}, 20.0)
    assert "error" not in reply
    store.down()  # no test need wait for the end of that


def test_a_tag_that_was_taken_and_stored_before_is_no_new_snapshot(snapshots: Snapshots) -> None:
    snapshots("-t", "daily", "--keep")
    snapshots.node.tables[0].flush()
    done = snapshots("-t", "daily", "--keep", check=1)
    assert "daily was taken and stored by an earlier run" in done.stderr
    assert "nodetool clearsnapshot -t daily" in done.stderr


def test_a_snapshot_that_names_what_was_marked_bad_just_now_stays_on_disk(snapshots: Snapshots) -> None:
    snapshots.scene.start(snapshots.data)
    snapshots("-t", "weekly")
    bad = next(key for key in snapshots.scene.file_keys() if key.endswith("-Data.db"))
    document = {"keys": [{"key": bad, "found": "checksum", "at": "20261121T000000.000000Z"}]}
    snapshots.scene.bucket.put("node1.listings/bad/20261121T000000.000000Z.json", cassbackup.dump_document(**document))
    done = snapshots("-t", "again", check=1)
    assert "1 of 3 tables are not listed complete and good" in done.stderr
    assert snapshots.on_disk() == {"again"}


def test_a_daemon_that_dies_meanwhile_leaves_the_work_to_the_command(
    snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    for backups in snapshots.data.glob("*/*/backups"):
        shutil.rmtree(backups)  # else these bytes may be stored before the snapshot is taken
    store = proxy(moto)
    snapshots.scene.bucket, snapshots.scene.environ = moto, moto.through(store.url)
    daemon = snapshots.scene.start(snapshots.data)
    death = store.on("PUT", r"orders.*-Data\.db", kill(lambda: daemon.pid))
    snapshots("-t", "weekly")
    assert death.acted.is_set()
    assert daemon.process.wait() == -signal.SIGKILL
    assert snapshots.listed("weekly") == snapshots.tables
    assert snapshots.on_disk() == set()


@pytest.mark.parametrize("with_daemon", [False, True])
def test_what_is_not_listed_complete_stays_and_the_next_run_goes_on_with_it(
    snapshots: Snapshots, with_daemon: bool
) -> None:
    good = (snapshots.scene.at / "nodetool.py").read_text()
    broken = good.replace('{"files": names}', '{"files": [*names, "nb-9-big-Data.db"]}')
    (snapshots.scene.at / "nodetool.py").write_text(broken)
    if with_daemon:
        snapshots.scene.start(snapshots.data, args=("--incomplete-after", "1s", "--reconcile", "2s"))
    done = snapshots("-t", "weekly", check=1)
    assert "tables are not listed complete" in done.stderr
    assert "nodetool clearsnapshot -t weekly" in done.stderr  # it is on disk, and costs room
    assert snapshots.on_disk() == {"weekly"}
    assert snapshots.records("weekly") == []
    for path in snapshots.data.glob("*/*/snapshots/weekly/manifest.json"):  # Cassandra has written it after all
        names = [name for name in json.loads(path.read_text())["files"] if name != "nb-9-big-Data.db"]
        path.write_text(json.dumps({"files": names}))
    (snapshots.scene.at / "nodetool.py").write_text(good)
    done = snapshots("-t", "weekly")
    assert "going on with the snapshot that is there" in done.stderr
    assert snapshots.listed("weekly") == snapshots.tables
    assert snapshots.on_disk() == set()


def test_the_schema_is_asked_for_with_ids_and_dropped_columns_and_without_where_cqlsh_cannot() -> None:
    assert (
        describe_schema(f"{sys.executable} -c 'import sys; print(sys.argv[2])'") == "DESCRIBE SCHEMA WITH INTERNALS\n"
    )
    old = f"{sys.executable} -c 'import sys; sys.exit(sys.argv[2].endswith(chr(83)) or print(sys.argv[2]))'"
    assert describe_schema(old) == "DESCRIBE SCHEMA\n"


def test_a_missing_cqlsh_costs_the_schema_but_not_the_snapshot(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cassbackup.log, "propagate", True)
    assert describe_schema("/nonexistent/cqlsh") == ""
    assert "no schema is kept with this snapshot" in caplog.text


def test_keyspaces_flags_and_keep_are_passed_on(snapshots: Snapshots) -> None:
    snapshots("ks1", "-t", "weekly", "--skip-flush", "--ttl", "1d", "--keep")
    assert snapshots.calls("snapshot") == ["snapshot -t weekly -sf --ttl 86400s ks1"]
    assert snapshots.calls("clearsnapshot") == []
    assert snapshots.on_disk() == {"weekly"}
    assert {table.partition("/")[0] for table in snapshots.listed("weekly")} == {"ks1"}


def test_the_default_tag_is_the_minute_and_earlier_ones_of_ours_are_cleared_when_listed(snapshots: Snapshots) -> None:
    began = time.gmtime()
    snapshots("--keep")
    (first,) = snapshots.on_disk()
    minute = "cassbackup-%Y%m%dT%H%MZ"
    assert time.strftime(minute, began) <= first <= time.strftime(minute, time.gmtime())
    old = "cassbackup-20200101T0000Z"
    subprocess.run([*snapshots.nodetool.split(), "snapshot", "-t", old], check=True)
    snapshots("-t", "cassbackup-mine", "--keep")
    assert snapshots.on_disk() == {old, "cassbackup-mine"}
    snapshots("-t", "weekly")
    assert snapshots.on_disk() == {old, "cassbackup-mine"}  # not listed, and nobody's default: they stay


def test_an_earlier_snapshot_that_goes_while_it_is_looked_for_stops_no_run(tmp_path: Path, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("cassbackup-20200101T0000Z")
    door: Any = Door(Shelf(), node.clear)
    paths = tuple(map(str, node.data_dirs))
    options = cassbackup.SnapshotOptions({}, str(tmp_path), cassbackup.StoreOptions(), paths=paths)
    cassbackup._clear_earlier(
        cassbackup.Bucket(cassbackup.Patient(door, 1.0), 1, "node1"), options, cassbackup.Nodetool("false")
    )
    assert len(door.asked) == 1


def test_a_tag_that_nodetool_has_taken_of_some_tables_only_is_no_snapshot_of_all_p8(snapshots: Snapshots) -> None:
    """It was broken off. The next run finds the tag there, and goes on with it."""
    users, orders, _ = snapshots.node.tables
    snapshots.node.snapshot("weekly", [users])
    done = snapshots("-t", "weekly", check=1)
    assert f"ks1/{orders.directory}" in done.stderr
    assert "clearsnapshot -t weekly" in done.stderr
    assert snapshots.on_disk() == {"weekly"}
    assert snapshots.records("weekly") == []
    snapshots.node.clear("weekly")
    snapshots("-t", "weekly")
    assert snapshots.listed("weekly") == snapshots.tables


def test_a_table_that_was_created_since_the_snapshot_is_no_part_of_it(snapshots: Snapshots) -> None:
    """It may take hours to store one."""
    snapshots.node.snapshot("weekly")
    visits = snapshots.node.table("ks1", "visits")
    for folder in visits.directories():
        folder.rename(folder.with_name(f"visits-{uuid.uuid1().hex}"))
    (next(snapshots.data.glob("ks1/visits-*")) / "nb-1-big-Data.db").write_bytes(b"flushed")
    snapshots("-t", "weekly")
    assert {table.split("-")[0] for table in snapshots.listed("weekly")} == {"ks1/users", "ks1/orders", "system/local"}


def test_a_table_from_before_cassandra_2_1_is_part_of_a_snapshot(snapshots: Snapshots) -> None:
    """Its directory has no id, to this day."""
    old = next(snapshots.data.glob("ks1/users-*"))
    old.rename(old.with_name("users"))
    snapshots("-t", "weekly")
    assert "ks1/users" in snapshots.listed("weekly")
    assert any("/ks1/users/" in key for key in snapshots.records("weekly")[0]["listings"])
    assert snapshots.on_disk() == set()


def test_a_snapshot_of_some_keyspaces_clears_no_other_of_its_name(snapshots: Snapshots) -> None:
    other = snapshots.node.tables[2]
    snapshots.node.snapshot("weekly", [other])
    snapshots("ks1", "-t", "weekly")
    assert [path.parents[1].name for path in snapshots.data.glob("*/*/snapshots/weekly")] == [other.directory]


def refuse(snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy], table: int) -> None:
    """Have the store refuse a table's first Data.db for good, with a daemon at work, and a snapshot of it taken."""
    for backups in snapshots.data.glob("*/*/backups"):
        shutil.rmtree(backups)  # else these bytes may be stored before the snapshot is taken
    store, directory = proxy(moto), snapshots.node.tables[table].directory
    snapshots.scene.bucket, snapshots.scene.environ = moto, moto.through(store.url)
    store.on("PUT", rf"/{re.escape(directory)}/.*-1-big-Data\.db", s3_error(403, "AccessDenied"), count=None)
    snapshots.scene.start(snapshots.data, args=("--incomplete-after", "1s"))
    snapshots.node.snapshot("weekly", [snapshots.node.tables[table]])
    wait_for(lambda: "are refused" in str(snapshots.scene.page().get("failures")))


def ends(snapshots: Snapshots, *args: object, check: int) -> str:
    """Run the command; let it not wait for ever: without the daemon it does the work itself, and would be red."""
    timer = threading.Timer(40.0, snapshots.scene.daemon.kill)
    timer.start()
    said = snapshots(*args, check=check).stderr
    timer.cancel()
    assert snapshots.scene.daemon.is_running, "it waited for what never ends"
    return said


def test_a_snapshot_of_some_keyspaces_waits_for_no_other_of_its_name(
    snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    refuse(snapshots, moto, proxy, table=2)
    ends(snapshots, "ks1", "-t", "weekly", check=0)
    assert {table.partition("/")[0] for table in snapshots.listed("weekly")} == {"ks1"}


def test_a_snapshot_waits_for_no_earlier_one_of_its_tag_of_which_a_file_is_refused(
    snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    refuse(snapshots, moto, proxy, table=0)
    snapshots.node.clear("weekly")
    snapshots.node.tables[0].compact()  # only our pin has what is refused
    ends(snapshots, "-t", "weekly", check=0)
    assert snapshots.listed("weekly") == snapshots.tables


def test_a_snapshot_of_which_a_file_is_refused_for_good_ends_red_p8(
    snapshots: Snapshots, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    refuse(snapshots, moto, proxy, table=0)
    snapshots.node.clear("weekly")
    said = ends(snapshots, "-t", "weekly", check=1)
    assert "1 of 3 tables are not listed complete and good" in said
    assert snapshots.on_disk() == {"weekly"}


def test_a_clock_that_is_set_back_meanwhile_keeps_no_snapshot_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    page = {"scanned": time.time() - 3600.0, "quiet": True, "tags": []}  # by the clock as it is after that
    monkeypatch.setattr(cassbackup, "ask_daemon", lambda *_: page)
    monkeypatch.setattr(cassbackup.time, "sleep", lambda _: pytest.fail("it waits for an hour"))
    options: Any = cassbackup.SnapshotOptions({}, "/state", cassbackup.StoreOptions())
    assert cassbackup._is_done_by_daemon(options, "weekly")


def test_tables_that_a_filter_leaves_out_are_not_waited_for(snapshots: Snapshots) -> None:
    snapshots("-t", "weekly", "--exclude-keyspace", "system", "--exclude-table", "ks1.orders")
    assert {table.split("-")[0] for table in snapshots.listed("weekly")} == {"ks1/users"}
    assert snapshots.on_disk() == set()


def test_a_daemon_that_stores_elsewhere_is_not_waited_for(snapshots: Snapshots) -> None:
    snapshots.scene.start(snapshots.data)
    for args in (("--bucket", f"file://{snapshots.scene.at}/other"), ("--name", "node2")):
        assert "the running daemon" in snapshots("-t", "weekly", *args, check=2).stderr
    assert not snapshots.calls_file.exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("-t", "a/b"), "tag"),
        (("-t", ".."), "tag"),
        (("-t", "weekly", "ks1", "system", "--exclude-keyspace", "sys*"), "the settings leave system out"),
        (("/var/lib/cassandra/data",), "is no keyspace\n  data directories go to --paths"),
        (("-t", "weekly", "--nodetool", "sh -c 'printf \\\\377 >&2; exit 1'"), "running"),
        (("-t", "weekly", "--nodetool", "/nonexistent/nodetool"), "--nodetool"),
        (("-t", "weekly", "--nodetool", "false"), "running"),
    ],
)
def test_bad_input_is_named_and_nothing_is_taken(snapshots: Snapshots, args: tuple[str, ...], said: str) -> None:
    done = snapshots(*args, check=None)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert snapshots.on_disk() == set()
