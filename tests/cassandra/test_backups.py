"""What is backed up from a real node, and restored, gives the same answers to the same queries."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
from cassandra.concurrent import execute_concurrent_with_args
from drill import Drill, Score, contents, live, stored_digests
from jars import OLDER
from nodes import Node
from scene import Scene
from test_facts import COMPRESSIONS, ON_BIG, fill, flip, rows
from test_nodes import lose_data, where_none_runs

ON_ALL = pytest.mark.parametrize("sstables", ["big", "bti", OLDER], indirect=True)


@pytest.fixture
def drill(cassandra: Node, keyspace: str, scene: Scene, score: Score) -> Drill:
    """Return a drill on one keyspace of the shared node."""
    return Drill(cassandra, scene, score, "--keyspace", keyspace)


def now() -> str:
    """Return this moment as `--at` takes it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


# ------------------------------------------------------------------------------------------------------------
# One table


@ON_ALL
def test_a_snapshot_cleared_at_once_comes_back_by_its_tag_and_so_does_what_another_node_streams(
    drill: Drill, cassandra: Node, keyspace: str, tmp_path: Path
) -> None:
    drill.watch()
    written = fill(cassandra, keyspace, rows=2000)
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    cassandra.nodetool("clearsnapshot", "-t", "tag", keyspace)
    drill.settled()

    cassandra.cql(f"TRUNCATE {keyspace}.t")
    assert rows(cassandra, keyspace) == {}
    drill.restore("--tag", "tag", "--import", into=tmp_path / "imported")
    drill.score.compare(rows(cassandra, keyspace).items(), written.items())

    cassandra.cql(f"TRUNCATE {keyspace}.t")
    drill.restore("--tag", "tag", into=tmp_path / "staged")
    with drill.score.timing("restored_s"):
        cassandra.tool("sstableloader", tmp_path / "staged" / keyspace / "t")
    drill.score.compare(rows(cassandra, keyspace).items(), written.items())

    drill.settled()  # Cassandra takes the files whole, and makes no TOC.txt
    streamed = now()
    cassandra.cql(f"TRUNCATE {keyspace}.t")
    drill.restore("--at", streamed, "--import", into=tmp_path / "streamed")
    drill.score.compare(rows(cassandra, keyspace).items(), written.items())
    drill.count_objects()


@ON_BIG
def test_b_each_moment_gives_the_rows_that_were_flushed_by_then(
    drill: Drill, cassandra: Node, keyspace: str, tmp_path: Path
) -> None:
    drill.watch()
    flushed: dict[str, dict[int, str]] = {}  # moment -> the rows
    written = fill(cassandra, keyspace, rows=100)
    flushed[now()] = dict(written)
    for k in range(50, 150):
        cassandra.cql(f"INSERT INTO {keyspace}.t (k, v) VALUES (%s, 'second')", (k,))
    cassandra.cql(f"DELETE FROM {keyspace}.t WHERE k = 0")
    flushed[now()] = dict(written)  # as before: nothing of it is flushed
    cassandra.nodetool("flush", keyspace)
    written = {k: v for k, v in written.items() if 0 < k < 50} | dict.fromkeys(range(50, 150), "second")
    flushed[now()] = written
    cassandra.cql(f"TRUNCATE {keyspace}.t")
    flushed[now()] = {}
    cassandra.cql(f"INSERT INTO {keyspace}.t (k, v) VALUES (7, 'after')")
    cassandra.nodetool("flush", keyspace)
    flushed[now()] = {7: "after"}
    cassandra.cql(f"INSERT INTO {keyspace}.t (k, v) VALUES (8, 'never flushed before the end')")
    table = cassandra.table_directory(keyspace, "t")
    cassandra.cql(f"DROP KEYSPACE {keyspace}")
    drill.settled()

    drill.restore("--at", max(flushed), "--schema-only", "--table", keyspace, into=tmp_path / "schema")
    cassandra.create_keyspace(keyspace)
    cassandra.tool("cqlsh", "-f", tmp_path / "schema" / keyspace / "t" / "schema.cql")
    assert cassandra.table_directory(keyspace, "t") == table
    for moment, expected in flushed.items():
        assert rows(cassandra, keyspace) == {}
        drill.restore("--at", moment, "--import", into=tmp_path / "restored")
        drill.score.compare(rows(cassandra, keyspace).items(), expected.items())
        cassandra.cql(f"TRUNCATE {keyspace}.t")
    drill.count_objects()


def test_i_a_flipped_byte_in_a_live_file_is_noticed_when_it_is_stored(
    drill: Drill, cassandra: Node, keyspace: str
) -> None:
    fill(cassandra, keyspace, rows=500)
    (data,) = cassandra.table_directory(keyspace, "t").glob("*-Data.db")
    flip(data)
    drill.watch()
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    drill.settled()
    drill.count_objects()
    told = re.findall("Data.db is not what its Digest.crc32 says path=([^ ]*)", drill.scene.daemon.log())
    assert told
    assert set(told) <= {f"{data.parent}/{place}/{data.name}" for place in ("backups", "snapshots/tag")}
    drill.scene.run("verify", "--tag", "tag", "--deep", *drill.bucket, check=0)  # what was read is what is stored


# ------------------------------------------------------------------------------------------------------------
# All kinds of tables

SCHEMA = """
CREATE TABLE ks.lz4 (k int, c int, s text STATIC, v text, PRIMARY KEY (k, c)) WITH compression = LZ4;
CREATE TABLE ks.zstd (k int, c int, s text STATIC, v text, PRIMARY KEY (k, c)) WITH compression = ZSTD;
CREATE TABLE ks.plain (k int, c int, s text STATIC, v text, PRIMARY KEY (k, c)) WITH compression = PLAIN;
CREATE TABLE ks.empty (k int PRIMARY KEY);
CREATE TABLE ks.counts (k int PRIMARY KEY, n counter);
CREATE TYPE ks.address (street text, zip int);
CREATE TABLE ks.types (k int PRIMARY KEY, a address, l list<text>, s set<int>, m map<text, int>,
    f frozen<list<frozen<address>>>, t tuple<int, text>, b blob, gone text);
CREATE TABLE ks.indexed (k int PRIMARY KEY, city text);
CREATE INDEX by_city ON ks.indexed (city);
CREATE MATERIALIZED VIEW ks.of_city AS SELECT * FROM ks.indexed
    WHERE city IS NOT NULL AND k IS NOT NULL PRIMARY KEY (city, k);
CREATE TABLE ks.attached (k int PRIMARY KEY, city text, age int);
CREATE INDEX attached_city ON ks.attached (city) USING 'sai';
CREATE INDEX attached_age ON ks.attached (age) USING 'sai';
"""
FIRST = """
UPDATE ks.counts SET n = n + 5 WHERE k = ?;
INSERT INTO ks.types (k, a, l, s, m, f, t, b, gone) VALUES (?, {street: 'main', zip: 1}, ['x', 'y'], {1, 2},
    {'one': 1}, [{street: 'side', zip: 1}], (1, 'two'), 0xcafe, 'column');
INSERT INTO ks.indexed (k, city) VALUES (?, 'Rome');
INSERT INTO ks.attached (k, age, city) VALUES (?, 30, 'Rome');
"""
THEN = """
UPDATE ks.counts SET n = n + 1000 WHERE k = 7;
UPDATE ks.types SET a.zip = 99, l = l + ['z'], s = s - {1}, m['two'] = 2 WHERE k = 7;
UPDATE ks.types USING TTL 86400 SET b = 0xbeef WHERE k = 8;
DELETE t FROM ks.types WHERE k = 9;
ALTER TABLE ks.types DROP gone;
DELETE FROM ks.indexed WHERE k = 3;
UPDATE ks.indexed SET city = 'Oslo' WHERE k = 2;
DELETE FROM ks.attached WHERE k = 3;
UPDATE ks.attached SET city = 'Oslo', age = 31 WHERE k = 2;
"""
QUERIES = """
SELECT * FROM ks.empty;
SELECT * FROM ks.counts;
SELECT * FROM ks.types;
SELECT k, writetime(b), writetime(t) FROM ks.types;
SELECT * FROM ks.indexed;
SELECT * FROM ks.attached;
SELECT * FROM ks.of_city WHERE city = 'Rome';
SELECT * FROM ks.of_city WHERE city = 'Oslo';
SELECT k FROM ks.indexed WHERE city = 'Rome';
SELECT k FROM ks.indexed WHERE city = 'Oslo';
SELECT k FROM ks.attached WHERE city = 'Rome';
SELECT k FROM ks.attached WHERE city = 'Oslo';
SELECT k FROM ks.attached WHERE age > 30;
"""
Rows = Counter[tuple[object, ...]]


def statements(text: str, node: Node, keyspace: str) -> list[str]:
    """Return CQL for a keyspace, one statement each; an older Cassandra has no storage-attached indexes."""
    for name, compression in COMPRESSIONS.items():
        text = text.replace(f"= {name.upper()};", f"= {compression};")
    every = text.replace("ks.", f"{keyspace}.").strip().split(";\n")
    return [one for one in every if one and not (node.setup.version == OLDER and ".attached" in one)]


def write_wide(node: Node, table: str) -> Rows:
    """Write some wide partitions, then delete in all ways that there are; return the rows and their counts."""
    insert = node.session.prepare(f"INSERT INTO {table} (k, c, v) VALUES (?, ?, ?)")
    written = {(k, c): f"{k} {c} " * 20 for k in range(4) for c in range(1000)}
    execute_concurrent_with_args(node.session, insert, [(k, c, v) for (k, c), v in written.items()])
    for k in range(5):
        node.cql(f"INSERT INTO {table} (k, s) VALUES ({k}, 'static {k}')")
    node.nodetool("flush", *table.split("."))
    for what in ("k = 1", "k = 2 AND c = 5", "k = 3 AND c >= 100 AND c < 900"):
        node.cql(f"DELETE FROM {table} WHERE {what}")
    left = {
        (k, c): v for (k, c), v in written.items() if k == 0 or (k == 2 and c != 5) or (k == 3 and not 100 <= c < 900)
    }
    found = [(k, c, f"static {k}", v) for (k, c), v in left.items()] + [(4, None, "static 4", None)]
    return Counter(found) + Counter([(0, 1000), (2, 999), (3, 200), (4, 1)])


def wide_rows(node: Node, table: str) -> Rows:
    """Return what `write_wide` has written as far as it is there."""
    queries = (f"SELECT k, c, s, v FROM {table}", f"SELECT k, count(*) FROM {table} GROUP BY k")
    return Counter(tuple(row) for query in queries for row in node.cql(query))


def answers(node: Node, keyspace: str) -> Rows:
    """Return the rows that answer QUERIES."""
    return Counter((query, repr(row)) for query in statements(QUERIES, node, keyspace) for row in node.cql(query))


@ON_ALL
def test_c_tables_of_all_kinds_come_back_with_their_schema(
    drill: Drill, cassandra: Node, keyspace: str, tmp_path: Path
) -> None:
    for statement in statements(SCHEMA, cassandra, keyspace):
        cassandra.cql(statement)
    for statement in statements(FIRST, cassandra, keyspace):
        execute_concurrent_with_args(
            cassandra.session, cassandra.session.prepare(statement), [(k,) for k in range(300)]
        )
    wide = {f"{keyspace}.{name}": write_wide(cassandra, f"{keyspace}.{name}") for name in COMPRESSIONS}
    cassandra.nodetool("flush", keyspace)
    for statement in statements(THEN, cassandra, keyspace):
        cassandra.cql(statement)
    expected = answers(cassandra, keyspace)
    assert sum(expected.values()) > 1500
    drill.snapshot("-t", "all", keyspace)
    digests = stored_digests(drill.scene)
    assert len(digests) >= 2 * len(wide) + 5
    assert all(listed == told for listed, told in digests.values())

    cassandra.cql(f"DROP KEYSPACE {keyspace}")
    restored = tmp_path / "restored"
    drill.restore("--tag", "all", "--schema-only", into=restored)
    cassandra.tool("cqlsh", "-f", restored / "schema.cql", check=None)  # other keyspaces are there, and it says so
    drill.restore("--tag", "all", "--import", into=restored)
    drill.score.compare(answers(cassandra, keyspace).elements(), expected.elements())
    for table, written in wide.items():
        drill.score.compare(wide_rows(cassandra, table).elements(), written.elements())
    drill.count_objects()


# ------------------------------------------------------------------------------------------------------------
# Many tables, many SSTables, two data directories, and files that are replaced

SMALL = [f"small.t{number}" for number in range(300)]
LARGE = ("large.many", "large.leveled", "large.again")
FLUSHES = 100  # each writes an SSTable into either data directory
MEMTABLES = {"skiplist": {"class_name": "SkipListMemtable"}, "trie": {"class_name": "TrieMemtable"}}
SETUP = {
    "data_directories": 2,
    "incremental_backups": True,
    "jvm": ("-Dcassandra.test.flush_local_schema_changes=false",),  # no flush after each CREATE TABLE
    # A memtable takes 1 MiB of the heap at its first row, unless it is unslabbed.
    "yaml": {"memtable": {"configurations": MEMTABLES}, "memtable_allocation_type": "unslabbed_heap_buffers"},
}
NO_COMPACTION = "WITH compaction = {'class': 'SizeTieredCompactionStrategy', 'enabled': 'false'}"
LEVELS = "WITH compaction = {'class': 'LeveledCompactionStrategy', 'sstable_size_in_mb': 1}"
Written = dict[str, dict[int, str]]  # keyspace.table -> its rows


def write(node: Node, table: str, number: int, fresh: dict[int, str]) -> dict[int, str]:
    """Write rows, and flush them as an ALTER TABLE does that changes the kind of memtable: without a nodetool.

    Neither that nor `nodetool snapshot` waits for such a flush to end: `nodetool flush` does.
    `number` must be even the first time, then odd, and so on.
    """
    insert = node.session.prepare(f"INSERT INTO {table} (k, v) VALUES (?, ?)")
    execute_concurrent_with_args(node.session, insert, list(fresh.items()))
    node.cql(f"ALTER TABLE {table} WITH memtable = '{[*MEMTABLES][number % 2]}'")
    return fresh


def write_many(node: Node) -> Written:
    """Make 300 small tables, and some of many SSTables."""
    node.create_keyspace("small")
    node.create_keyspace("large")
    node.session.cluster.schema_metadata_enabled = False  # in the driver, which reads it anew after each change
    for table, how in [*((table, "") for table in SMALL), *zip(LARGE, (NO_COMPACTION, LEVELS, ""), strict=True)]:
        node.cql(f"CREATE TABLE {table} (k int PRIMARY KEY, v text) {how}")
    for table in SMALL:
        node.session.execute_async(f"INSERT INTO {table} (k, v) VALUES (1, '{table}')")
    many, leveled, again = {}, {}, write(node, "large.again", 0, {k: f"before {k}" for k in range(200)})
    for number in range(FLUSHES):
        many |= write(node, "large.many", number, {k: f"{k} of {number}" for k in range(5 * number, 5 * number + 50)})
    for number in range(6):
        leveled |= write(node, "large.leveled", number, {k: f"{k} of {number} " * 50 for k in range(500)})
    node.nodetool("flush", "large")
    return {table: {1: table} for table in SMALL} | dict(zip(LARGE, (many, leveled, again), strict=True))


def compare(score: Score, node: Node, written: Written) -> None:
    """Compare all rows of some tables."""
    for table, expected in written.items():
        score.compare(rows(node, *table.split(".")).items(), expected.items())


def use_names_again(node: Node) -> None:
    """Have the node give generation numbers of large.again a second time, and say that large.many was repaired."""
    node.stop()
    for home in node.table_directories("large", "again"):
        shutil.rmtree(home / "backups")
    data = [path for home in node.table_directories("large", "many") for path in home.glob("*-Data.db")]
    node.tool("sstablerepairedset", "--really-set", "--is-repaired", *data)  # as incremental repair does it
    node.start()


def test_d_e_many_files_in_two_directories_and_names_that_come_again(
    new_node: Callable[..., Node], scene: Scene, score: Score, tmp_path: Path
) -> None:
    node = new_node(**SETUP)
    drill = Drill(node, scene, score)
    first = write_many(node)
    drill.watch()
    drill.snapshot("-t", "first", "large")
    before = {table: live(node, table, "Statistics.db") for table in ("large.many", "large.again")}
    assert len(before["large.many"]) == 2 * FLUSHES

    fresh = write(node, "large.leveled", 6, {k: f"{k} at last" for k in range(300)})
    node.nodetool("compact", "large", "leveled")
    node.cql("TRUNCATE large.again")
    drill.settled()
    use_names_again(node)
    again = write(node, "large.again", 1, {k: f"after {k}" for k in range(100)})
    node.nodetool("flush", "large")
    second = {**first, "large.leveled": first["large.leveled"] | fresh, "large.again": again}
    drill.snapshot("-t", "second")
    after = {table: live(node, table, "Statistics.db") for table in before}
    for table, bodies in before.items():
        assert bodies.keys() == after[table].keys()
        assert all(body != after[table][name] for name, body in bodies.items())

    scene.daemon.stop()
    node.stop()
    lose_data(node)
    places = [word for path in node.data for word in ("--data-dir", f"{path}={path}")]
    with score.timing("restored_s"):
        options = (*drill.bucket, "--tag", "second", "--in-place", "--same-node", *places)
        scene.run("restore", *options, check=0, within=where_none_runs())
    assert {table: live(node, table, "Statistics.db") for table in after} == after
    node.start()
    compare(score, node, second)

    for table in LARGE:
        node.cql(f"TRUNCATE {table}")
    staged = tmp_path / "staged"
    drill.restore("--tag", "first", into=staged)
    for table, bodies in before.items():
        assert contents([staged.joinpath(*table.split("."))], "Statistics.db") == bodies
    drill.restore("--tag", "first", "--import", into=staged)
    compare(score, node, {table: first[table] for table in LARGE})
    drill.count_objects()
