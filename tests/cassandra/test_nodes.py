"""Whole nodes that are lost and come back, and nodes that live with pins beside them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oracle
import pytest
from cassandra import ConsistencyLevel
from cassandra.concurrent import execute_concurrent_with_args
from cassandra.query import SimpleStatement
from drill import Drill, Score, contents, live
from nodes import Node, Ports, Setup, free_ports, until_all_see_all
from scene import Scene, pins, wait_for
from servers import Bucket, FileBucket

if TYPE_CHECKING:  # tests/cassandra has a conftest of its own
    from conftest import Daemon, Fleet, Run
    from faultproxy import FaultProxy

QUORUM = ConsistencyLevel.QUORUM
WRITES_A_SECOND = 300
Rows = dict[tuple[int, int], bytes]


# ------------------------------------------------------------------------------------------------------------
# Rows


def create_table(node: Node, keyspace: str, table: str = "t") -> None:
    node.cql(f"CREATE TABLE {keyspace}.{table} (k int, c int, v blob, PRIMARY KEY (k, c))")


def write(node: Node, keyspace: str, numbers: range, size: int = 100) -> Rows:
    """Write rows of random bytes, seven to a partition; return them."""
    written = {divmod(number, 7): os.urandom(size) for number in numbers}
    insert = node.session.prepare(f"INSERT INTO {keyspace}.t (k, c, v) VALUES (?, ?, ?)")
    insert.consistency_level = QUORUM
    rows = [(*key, value) for key, value in written.items()]
    execute_concurrent_with_args(node.session, insert, rows, concurrency=20)
    return written


def read(node: Node, keyspace: str) -> Rows:
    """Return all rows, after a look whether the counts of rows by partition agree with them."""
    rows, counts = (
        node.session.execute(SimpleStatement(query, consistency_level=QUORUM))
        for query in (f"SELECT k, c, v FROM {keyspace}.t", f"SELECT k, count(*) AS n FROM {keyspace}.t GROUP BY k")
    )
    found = {(row.k, row.c): row.v for row in rows}
    assert {row.k: row.n for row in counts} == Counter(k for k, _ in found)
    return found


def compare(score: Score, found: Rows, written: Rows) -> None:
    """Compare row by row."""
    differing = [key for key in found.keys() | written.keys() if found.get(key) != written.get(key)]
    score.compared += len(written)
    score.different += len(differing)
    assert not differing


# ------------------------------------------------------------------------------------------------------------
# Backups


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


def where_none_runs() -> list[str]:
    """Return what runs a command where it sees no Cassandra: on a machine with others, among processes of its own."""
    running = ""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            running += path.read_text(errors="replace")
    if "org.apache.cassandra.service.CassandraDaemon" not in running:
        return []
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("another Cassandra runs on this machine")
    return ["unshare", "--pid", "--fork", "--mount-proc"]


def errors(node: Node) -> list[str]:
    """Return what the node complained of."""
    return re.findall(r"^ERROR .*", (node.home / "log" / "system.log").read_text(), re.MULTILINE)


def lose_data(node: Node) -> None:
    """Put empty data directories in place of a node's, and take all that lies beside them."""
    for path in (*node.data, *(node.home / name for name in ("commitlog", "hints", "saved_caches", ".cassbackup"))):
        shutil.rmtree(path, ignore_errors=True)
    for path in node.data:
        path.mkdir()


# ------------------------------------------------------------------------------------------------------------
# Nodes that are lost


def test_f_a_node_whose_disks_are_lost_comes_back_as_itself(
    new_node: Callable[..., Node], scene: Scene, score: Score
) -> None:
    node = new_node(data_directories=2, incremental_backups=True)
    drill = Drill(node, scene, score)
    node.create_keyspace("ks")
    create_table(node, "ks")
    written = write(node, "ks", range(1000))
    drill.snapshot()
    written |= write(node, "ks", range(500, 1500))
    node.nodetool("flush")
    scene.once(*node.data, check=0)
    before = node.local()
    node.kill()
    lose_data(node)

    places = [word for path in node.data for word in ("--data-dir", f"{path}={path}")]
    with score.timing("restored_s"):
        options = (*drill.bucket, "--latest", "--in-place", "--same-node", *places)
        scene.run("restore", *options, check=0, within=where_none_runs())
    node.start()
    drill.count_objects()
    compare(score, read(node, "ks"), written)
    assert errors(node) == []
    after = node.local()
    assert (after.host_id, after.tokens) == (before.host_id, before.tokens)
    shutil.rmtree(scene.state)  # and it is backed up as before
    write(node, "ks", range(1400, 1600))
    Drill(node, scene, Score("")).snapshot("-t", "after")
    scene.run("verify", *drill.bucket, "--deep", check=0)
    assert oracle.problems(scene.bucket.objects(), "node1") == []


@pytest.fixture
def successors(fleet: Fleet) -> Iterator[list[Node]]:
    """Return a list; the nodes that a test puts into it are killed: one that stops waits for its neighbours."""
    nodes: list[Node] = []
    yield nodes
    for node in nodes:
        node.kill()


def other_nodes(home: Path, told: list[str]) -> list[Node]:
    """Return nodes at 127.0.0.4 and on, set up, but for the address, as the restores told."""
    addresses = [f"127.0.0.{number}" for number in range(4, 4 + len(told))]
    storage, native = free_ports(2, addresses)
    nodes = []
    for address, text, jmx in zip(addresses, told, free_ports(len(told)), strict=True):
        lines = dict(re.findall(r"^ +(\w+)[:=] ?(\S+)$", text, re.MULTILINE))
        assert (lines["auto_bootstrap"], lines["dc"], lines["rack"]) == ("false", "datacenter1", "rack1")
        tokens = lines["initial_token"]
        assert int(lines["num_tokens"]) == len(tokens.split(","))
        setup = Setup(address, initial_token=tokens, auto_bootstrap=False, seed=f"{addresses[0]}:{storage}")
        nodes.append(Node(home / address, setup, Ports(storage, native, jmx)))
    return nodes


def repair(node: Node, keyspace: str) -> None:
    """Repair incrementally, and wait until a table's SSTables say so: their Statistics.db are exchanged a bit later."""
    node.nodetool("repair", keyspace)
    data = list(node.table_directory(keyspace, "t").glob("*-Data.db"))
    assert data
    wait_for(lambda: not re.search(r"^Repaired at: 0\b", node.tool("sstablemetadata", *data).stdout, re.MULTILINE), 120)


def test_g_a_cluster_that_is_lost_comes_back_at_other_addresses(
    three_nodes: list[Node], fleet: Fleet, successors: list[Node], scene: Scene, score: Score
) -> None:
    names, tokens, written = ["db1", "db2", "db3"], [node.local().tokens for node in three_nodes], {}
    for keyspace, replication in (("three", 3), ("two", 2)):
        three_nodes[0].create_keyspace(keyspace, replication)
        create_table(three_nodes[0], keyspace)
        written[keyspace] = write(three_nodes[0], keyspace, range(1500))
    bucket = ("--bucket", scene.bucket.target)
    drills = [
        Drill(node, scene, score, "--name", name, "--state-dir", str(scene.at / name))
        for node, name in zip(three_nodes, names, strict=True)
    ]
    drills[0].snapshot("-t", "unrepaired", "three")
    unrepaired = live(three_nodes[0], "three.t", "Statistics.db")
    assert unrepaired
    repair(three_nodes[0], "three")
    for drill in drills:
        drill.snapshot("-t", "daily")
    repaired = live(three_nodes[0], "three.t", "Statistics.db")
    assert all(body != repaired[name] for name, body in unrepaired.items())
    at = datetime.fromtimestamp(time.time() + 1, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    listed = json.loads(scene.run("list", *bucket, "--json", check=0).stdout)["nodes"]
    for node in three_nodes:
        node.kill()
        shutil.rmtree(node.home)

    for tag, bodies in (("unrepaired", unrepaired), ("daily", repaired)):
        scene.run("restore", *bucket, "--node", "db1", "--tag", tag, "--into", scene.at / tag, check=0)
        assert contents([scene.at / tag / "three" / "t"], "Statistics.db") == bodies
    told = []
    for number, name in enumerate(names, start=4):
        data = scene.at / f"127.0.0.{number}" / "data"
        data.mkdir(parents=True)
        options = ("--node", name, "--at", at, "--in-place", "--new-node", "--data-dir", data)
        with score.timing("restored_s"):
            told.append(scene.run("restore", *bucket, *options, check=0, within=where_none_runs()).stdout)
    successors += other_nodes(scene.at, told)
    fleet.nodes += successors
    assert [",".join(node["tokens"]) for node in listed] == [node.setup.initial_token for node in successors]
    assert [node["snapshots"][-1]["tag"] for node in listed] == ["daily"] * 3
    for node in successors:
        node.start()
    until_all_see_all(successors)
    assert [node.local().tokens for node in successors] == tokens
    for node in successors:
        assert errors(node) == []
        for keyspace, rows in written.items():
            compare(score, read(node, keyspace), rows)
    found = [path for name in names for path in (scene.at / "bucket" / name).rglob("*") if path.is_file()]
    score.files, score.size = len(found), sum(path.stat().st_size for path in found)


# ------------------------------------------------------------------------------------------------------------
# Nodes beside which the program works


def tags(node: Node) -> set[str]:
    """Return the tags of what Cassandra takes for its snapshots."""
    lines = [line.split() for line in node.nodetool("listsnapshots").stdout.splitlines()]
    return {words[0] for words in lines if len(words) > 7 and words[0] != "Snapshot"}


def test_h_cassandra_restarts_beside_full_pin_directories_and_clears_its_own_snapshots_alone(
    new_node: Callable[..., Node], scene: Scene, rclone: Bucket, proxy: Callable[[Bucket], FaultProxy], score: Score
) -> None:
    node = new_node(data_directories=2, incremental_backups=True)
    beside, inside = node.home / ".cassbackup" / "data", node.data[1] / ".cassbackup" / "backups"
    beside.mkdir(parents=True)
    (beside.parent / "data2").write_text("so the pins of data2 must go inside it")
    store = proxy(rclone)
    scene.bucket, scene.environ = rclone, rclone.through(store.url)
    scene.start(*node.data)
    store.down()
    node.create_keyspace("ks")
    create_table(node, "ks")
    node.cql("CREATE INDEX by_v ON ks.t (v)")
    written = write(node, "ks", range(1000))
    node.nodetool("snapshot", "-t", "daily")
    node.nodetool("clearsnapshot", "-t", "daily")
    node.nodetool("snapshot", "-t", "weekly", "ks")
    taken = time.time()
    scene.daemon.wait_until(lambda: scene.page()["scanned"] > taken)
    held = {area: set(pins(area)) for area in (beside, inside)}
    for names in held.values():
        assert {name.rpartition("-")[2] for name in names} >= {"Data.db~", "TOC.txt~"}

    node.restart()
    assert tags(node) == {"weekly"}
    node.nodetool("clearsnapshot", "--all")
    assert tags(node) == set()
    assert all(names <= set(pins(area)) for area, names in held.items())
    compare(score, read(node, "ks"), written)
    scene.daemon.kill()
    store.up()
    with score.timing("listed_s"):
        scene.restart()
        scene.settled()
    objects = rclone.objects()
    listed = {(one.keyspace, one.tag) for one in oracle.complete(objects, "node1")}
    assert listed >= {("ks", "daily"), ("ks", "weekly"), ("system_schema", "daily")}
    assert oracle.problems(objects, "node1") == []
    sizes = [len(body) for key, body in objects.items() if key.startswith("node1/")]
    score.files, score.size = len(sizes), sum(sizes)


def load(node: Node, insert: Any, beside: Callable[[], object]) -> str:
    """Write at a fixed rate for some seconds, and until what runs beside it is done; return the 99th percentile.

    A write counts from when it is due, not from when it is sent: one that is held up holds up none behind it.
    """
    took: list[float] = []
    failed: list[object] = []
    other, began, number = threading.Thread(target=beside), time.monotonic(), 0
    other.start()
    while number < 8 * WRITES_A_SECOND or other.is_alive():
        due = began + number / WRITES_A_SECOND
        time.sleep(max(0.0, due - time.monotonic()))
        answer = node.session.execute_async(insert, (*divmod(number, 7), os.urandom(500)))
        answer.add_callbacks(lambda _, due=due: took.append(time.monotonic() - due), failed.append)
        number += 1
    other.join()
    answer.result()
    while len(took) + len(failed) < number:  # the driver gives up by itself
        time.sleep(0.05)
    assert not failed
    return f"{sorted(took)[int(0.99 * number)] * 1000:.0f} ms"


def test_h_writes_go_on_while_a_snapshot_is_taken_and_stored(
    new_node: Callable[..., Node], scene: Scene, score: Score
) -> None:
    node = new_node()
    node.create_keyspace("ks")
    create_table(node, "ks")
    create_table(node, "ks", "other")
    write(node, "ks", range(1500), size=50_000)
    node.nodetool("flush", "ks")
    insert = node.session.prepare("INSERT INTO ks.other (k, c, v) VALUES (?, ?, ?)")
    load(node, insert, lambda: None)  # warms up
    alone = load(node, insert, lambda: None)
    beside_it = load(node, insert, lambda: node.nodetool("snapshot", "-t", "first", "ks"))
    daemon = scene.start(*node.data, args=("--max-bandwidth", "50M", "--exclude-tag", "first"))
    os.setpriority(os.PRIO_PGRP, daemon.pid, 10)  # as the Debian package runs it

    def back_up() -> None:
        node.nodetool("snapshot", "-t", "second", "ks")
        with score.timing("listed_s"):
            scene.settled()

    stored = load(node, insert, back_up)
    assert daemon.is_running
    assert len(oracle.complete(scene.bucket.objects(), "node1")) == 2
    Drill(node, scene, score).count_objects()
    score.scenario += f": p99 {alone}; beside nodetool snapshot {beside_it}; and its upload {stored}"


# ------------------------------------------------------------------------------------------------------------
# Commit logs

ARCHIVING = """\
archive_command=/bin/ln %path {archive}/%name
restore_command={restore}
restore_directories={logs}
restore_point_in_time={moment}
precision=MICROSECONDS
"""


def archiving(home: Path, moment: str = "") -> dict[str, str]:
    """Return the file with which a node archives its commit logs, and takes back those in `logs` up to a moment."""
    restore = "/bin/cp -f %from %to" if moment else ""
    text = ARCHIVING.format(
        archive=home / "archive", restore=restore, logs=home / "logs" if moment else "", moment=moment
    )
    return {"commitlog_archiving.properties": text}


def test_j_archived_commit_logs_bring_back_what_was_written_up_to_a_moment(
    tmp_path: Path, new_node: Callable[..., Node], scene: Scene, score: Score
) -> None:
    home = tmp_path / "node"
    (home / "archive").mkdir(parents=True)
    node = new_node(files=archiving(home), yaml={"commitlog_segment_size": "1MiB"})
    drill = Drill(node, scene, score)
    node.create_keyspace("ks")
    create_table(node, "ks")
    written = write(node, "ks", range(1000))
    drill.snapshot("-t", "daily")
    scene.start(*node.data, home / "archive", args=("--include", r"/archive/CommitLog-[^/]*\.log$"))
    written |= write(node, "ks", range(500, 3000), size=1000)
    time.sleep(1.1)
    moment = datetime.now(timezone.utc).strftime("%Y:%m:%d %H:%M:%S")
    time.sleep(0.1)
    write(node, "ks", range(3000), size=1000)
    node.nodetool("drain")
    node.stop()
    drill.settled()
    scene.daemon.stop()
    lose_data(node)
    shutil.rmtree(home / "archive")

    with score.timing("restored_s"):
        options = (*drill.bucket, "--tag", "daily", "--in-place", "--same-node", "--data-dir", node.data[0])
        scene.run("restore", *options, check=0, within=where_none_runs())
        scene.run("restore", *drill.bucket, "--archive", home / "archive", "--into", home / "logs", check=0)
    (home / "archive").mkdir()
    node.setup = Setup(files=archiving(home, moment))
    node.start()
    assert errors(node) == []
    compare(score, read(node, "ks"), written)
    drill.count_objects()
