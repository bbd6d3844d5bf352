"""What Apache Cassandra really does, of that which cassbackup relies on."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from nodes import Node

COMPRESSIONS = {
    "lz4": "{'class': 'LZ4Compressor'}",
    "zstd": "{'class': 'ZstdCompressor'}",
    "plain": "{'enabled': 'false'}",
}

# For what does not depend on the format of the SSTables.
ON_BIG = pytest.mark.parametrize("sstables", ["big"], indirect=True)


def names(directory: Path) -> set[str]:
    """Return the names in a directory; none if it is not there."""
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def components(directory: Path) -> dict[str, int]:
    """Return name -> inode of the SSTable files directly in a directory."""
    pattern = re.compile(r"[a-z]{2}-[^-]+-(big|bti)-.+")
    return {path.name: path.stat().st_ino for path in directory.iterdir() if pattern.fullmatch(path.name)}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


def fill(node: Node, keyspace: str, table: str = "t", rows: int = 100, more: str = "") -> dict[int, str]:
    """Create a table, write rows, flush it, and return the rows."""
    node.cql(f"CREATE TABLE {keyspace}.{table} (k int PRIMARY KEY, v text) {more}")
    written = {k: f"value {k} " * 20 for k in range(rows)}
    for row in written.items():
        node.cql(f"INSERT INTO {keyspace}.{table} (k, v) VALUES (%s, %s)", row)
    node.nodetool("flush", keyspace, table)
    return written


def rows(node: Node, keyspace: str, table: str = "t") -> dict[int, str]:
    """Return the rows of a table that `fill` made."""
    return {row.k: row.v for row in node.cql(f"SELECT k, v FROM {keyspace}.{table}")}


# ------------------------------------------------------------------------------------------------------------
# Snapshots


def test_a_snapshot_is_links_then_the_manifest_then_the_schema(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    taken = table / "snapshots" / "tag"

    assert components(taken) == components(table)
    assert names(taken) - components(taken).keys() == {"manifest.json", "schema.cql"}
    linked = max((taken / name).stat().st_ctime_ns for name in components(taken))  # link(2) changes the ctime
    assert linked <= (taken / "manifest.json").stat().st_mtime_ns <= (taken / "schema.cql").stat().st_mtime_ns


@ON_BIG
def test_a_manifest_names_the_data_files_and_when_the_snapshot_began(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace, "one")
    fill(cassandra, keyspace, "two")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    taken = {name: cassandra.table_directory(keyspace, name) / "snapshots" / "tag" for name in ("one", "two")}
    manifests = {name: json.loads((path / "manifest.json").read_text()) for name, path in taken.items()}

    for name, manifest in manifests.items():
        assert set(manifest["files"]) == {path.name for path in taken[name].glob("*-Data.db")}
        assert manifest["expires_at"] is None
        assert manifest["ephemeral"] is False
    assert len({manifest["created_at"] for manifest in manifests.values()}) == 1


@ON_BIG
def test_a_schema_names_the_table_with_its_id_but_not_the_keyspace(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    schema = (table / "snapshots" / "tag" / "schema.cql").read_text()
    assert f"CREATE TABLE IF NOT EXISTS {keyspace}.t" in schema
    assert f"ID = {cassandra.table_ids(keyspace)['t']}" in schema
    assert cassandra.table_ids(keyspace)["t"].replace("-", "") == table.name.rpartition("-")[2]
    assert "CREATE KEYSPACE" not in schema


@ON_BIG
def test_a_snapshot_of_a_table_without_sstables_has_a_manifest_and_a_schema(cassandra: Node, keyspace: str) -> None:
    cassandra.cql(f"CREATE TABLE {keyspace}.t (k int PRIMARY KEY)")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    taken = cassandra.table_directory(keyspace, "t") / "snapshots" / "tag"
    assert names(taken) == {"manifest.json", "schema.cql"}
    assert json.loads((taken / "manifest.json").read_text())["files"] == []


def test_a_snapshot_of_everything_gives_each_table_a_manifest_and_users_tables_a_schema(cassandra: Node) -> None:
    cassandra.nodetool("snapshot", "-t", "everything")
    taken = [path for data in cassandra.data for path in data.glob("*/*/snapshots/everything")]
    assert taken
    for path in taken:
        keyspace = path.relative_to(cassandra.data[0]).parts[0]
        assert "manifest.json" in names(path)
        assert ("schema.cql" in names(path)) is not keyspace.startswith("system")
    cassandra.nodetool("clearsnapshot", "-t", "everything")


def test_a_secondary_index_lies_in_a_hidden_directory_of_the_snapshot(cassandra: Node, keyspace: str) -> None:
    cassandra.cql(f"CREATE TABLE {keyspace}.t (k int PRIMARY KEY, v text)")
    cassandra.cql(f"CREATE INDEX by_v ON {keyspace}.t (v)")
    cassandra.cql(f"INSERT INTO {keyspace}.t (k, v) VALUES (1, 'one')")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    taken = cassandra.table_directory(keyspace, "t") / "snapshots" / "tag"
    manifest = json.loads((taken / "manifest.json").read_text())
    assert {path.name for path in taken.glob("*-Data.db")} < set(manifest["files"])
    assert {f".by_v/{path.name}" for path in (taken / ".by_v").glob("*-Data.db")} < set(manifest["files"])
    assert names(taken / ".by_v") == components(taken / ".by_v").keys()


def test_the_files_of_a_storage_attached_index_lie_beside_their_sstable(cassandra: Node, keyspace: str) -> None:
    cassandra.cql(f"CREATE TABLE {keyspace}.t (k int PRIMARY KEY, v text)")
    cassandra.cql(f"CREATE INDEX by_v ON {keyspace}.t (v) USING 'sai'")
    cassandra.cql(f"INSERT INTO {keyspace}.t (k, v) VALUES (1, 'one')")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    taken = cassandra.table_directory(keyspace, "t") / "snapshots" / "tag"
    attached = {name.split("-", 3)[3] for name in components(taken) if "-SAI+" in name}
    assert {name for name in attached if name.endswith("Complete.db")}
    (contents,) = taken.glob("*-TOC.txt")
    assert attached <= set(contents.read_text().split())


@ON_BIG
def test_a_tag_is_taken_once_until_it_is_cleared(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    again = cassandra.nodetool("snapshot", "-t", "tag", keyspace, check=2)
    assert "Snapshot tag already exists" in again.stderr
    cassandra.nodetool("clearsnapshot", "-t", "tag")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)


@ON_BIG
def test_clearsnapshot_takes_one_tag_and_no_live_file(cassandra: Node, keyspace: str) -> None:
    written = fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    live = components(table)
    cassandra.nodetool("snapshot", "-t", "goes", keyspace)
    cassandra.nodetool("snapshot", "-t", "stays", keyspace)
    cassandra.nodetool("clearsnapshot", "-t", "goes")
    assert names(table / "snapshots") == {"stays"}
    assert components(table / "snapshots" / "stays") == components(table) == live
    assert rows(cassandra, keyspace) == written
    cassandra.nodetool("clearsnapshot", "-t", "never-was")  # exit 0


def test_truncate_makes_a_snapshot_of_its_own(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    live = components(table)
    cassandra.cql(f"TRUNCATE {keyspace}.t")
    (taken,) = (table / "snapshots").iterdir()
    assert re.fullmatch(r"truncated-\d{13}-t", taken.name)
    assert components(taken) == live
    assert {"manifest.json", "schema.cql"} < names(taken)
    assert rows(cassandra, keyspace) == {}


@ON_BIG
def test_drop_table_leaves_its_directory_with_a_snapshot(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    cassandra.cql(f"DROP TABLE {keyspace}.t")
    (taken,) = (table / "snapshots").iterdir()
    assert re.fullmatch(r"dropped-\d{13}-t", taken.name)
    assert {"manifest.json", "schema.cql"} < names(taken)


# ------------------------------------------------------------------------------------------------------------
# Incremental backups


def test_a_flush_is_linked_into_backups_and_a_compaction_is_not(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    first = components(table)
    assert components(table / "backups") == first

    cassandra.cql(f"INSERT INTO {keyspace}.t (k, v) VALUES (1, 'newer')")
    cassandra.nodetool("flush", keyspace)
    flushed = components(table)
    assert first.keys() < flushed.keys()
    cassandra.nodetool("compact", keyspace)
    assert components(table / "backups") == flushed
    assert not components(table).keys() & flushed.keys()


@ON_BIG
def test_statusbackup_says_whether_flushes_are_linked(cassandra: Node, keyspace: str) -> None:
    assert cassandra.nodetool("statusbackup").stdout == "running\n"
    cassandra.nodetool("disablebackup")
    try:
        assert cassandra.nodetool("statusbackup").stdout == "not running\n"
        fill(cassandra, keyspace)
        assert not (cassandra.table_directory(keyspace, "t") / "backups").exists()
    finally:
        cassandra.nodetool("enablebackup")


# ------------------------------------------------------------------------------------------------------------
# SSTables


def test_names_say_version_id_and_format(cassandra: Node, keyspace: str, sstables: str) -> None:
    fill(cassandra, keyspace)
    (data,) = cassandra.table_directory(keyspace, "t").glob("*-Data.db")
    pattern = {"big": r"nb-\d+-big-Data\.db", "bti": r"da-\w{4}_\w{4}_\w{18}-bti-Data\.db"}
    assert re.fullmatch(pattern[sstables], data.name)


def test_the_table_of_contents_names_every_component(cassandra: Node, keyspace: str, sstables: str) -> None:
    for name, compression in COMPRESSIONS.items():
        fill(cassandra, keyspace, name, more=f"WITH compression = {compression}")
        table = cassandra.table_directory(keyspace, name)
        (contents,) = table.glob("*-TOC.txt")
        index = {"big": {"Index.db", "Summary.db"}, "bti": {"Partitions.db", "Rows.db"}}[sstables]
        checks = {"CRC.db"} if name == "plain" else {"CompressionInfo.db"}
        expected = {"Data.db", "Filter.db", "Statistics.db", "Digest.crc32", "TOC.txt"} | index | checks
        assert set(contents.read_text().split()) == expected
        assert {found.split("-", 3)[3] for found in components(table)} == expected


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_digest_is_the_crc32_of_the_data_file(cassandra: Node, keyspace: str, compression: str) -> None:
    fill(cassandra, keyspace, rows=500, more=f"WITH compression = {COMPRESSIONS[compression]}")
    (data,) = cassandra.table_directory(keyspace, "t").glob("*-Data.db")
    digest = data.with_name(data.name.replace("-Data.db", "-Digest.crc32"))
    assert digest.read_text() == str(zlib.crc32(data.read_bytes()))


# ------------------------------------------------------------------------------------------------------------
# nodetool import


@pytest.mark.parametrize("put", [os.link, shutil.copyfile])
def test_import_moves_sstables_out_of_a_directory_named_for_the_table(
    cassandra: Node, keyspace: str, tmp_path: Path, put: Callable[[Path, Path], object]
) -> None:
    written = fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    taken = components(table / "snapshots" / "tag")
    cassandra.cql(f"TRUNCATE {keyspace}.t")

    staged = tmp_path / "any" / keyspace / "t"
    staged.mkdir(parents=True)
    for name in taken:
        put(table / "snapshots" / "tag" / name, staged / name)
    cassandra.nodetool("import", keyspace, "t", staged)

    assert rows(cassandra, keyspace) == written
    assert names(staged) == set()
    assert components(table / "snapshots" / "tag") == taken


def test_import_does_not_mind_what_else_lies_in_a_snapshot(cassandra: Node, keyspace: str, tmp_path: Path) -> None:
    cassandra.cql(f"CREATE TABLE {keyspace}.t (k int PRIMARY KEY, v text)")
    cassandra.cql(f"CREATE INDEX by_v ON {keyspace}.t (v)")
    for k in range(50):
        cassandra.cql(f"INSERT INTO {keyspace}.t (k, v) VALUES (%s, %s)", (k, f"v{k % 5}"))
    cassandra.nodetool("snapshot", "-t", "tag", keyspace)
    taken = cassandra.table_directory(keyspace, "t") / "snapshots" / "tag"
    cassandra.cql(f"TRUNCATE {keyspace}.t")

    staged = tmp_path / keyspace / "t"
    shutil.copytree(taken, staged)
    cassandra.nodetool("import", keyspace, "t", staged)

    assert rows(cassandra, keyspace) == {k: f"v{k % 5}" for k in range(50)}
    assert len(cassandra.cql(f"SELECT k FROM {keyspace}.t WHERE v = 'v3'")) == 10
    assert names(staged) == {".by_v", "manifest.json", "schema.cql"}
    assert components(staged / ".by_v")


def test_an_import_is_linked_into_backups_under_a_new_name(cassandra: Node, keyspace: str, tmp_path: Path) -> None:
    fill(cassandra, keyspace)
    table = cassandra.table_directory(keyspace, "t")
    staged = tmp_path / keyspace / "t"
    shutil.copytree(table / "backups", staged)
    before = names(table / "backups")
    cassandra.nodetool("import", keyspace, "t", staged)
    added = names(table / "backups") - before
    assert len(added) == len(before)


@pytest.mark.parametrize("place", ["a-b/t", "a.b/t", "ks/t-1", "ks/t.u"])
@ON_BIG
def test_import_from_a_path_that_names_no_table_takes_nothing_and_is_exit_0(
    cassandra: Node, keyspace: str, tmp_path: Path, place: str
) -> None:
    fill(cassandra, keyspace)
    shutil.copytree(cassandra.table_directory(keyspace, "t") / "backups", tmp_path / place)
    before = components(tmp_path / place)
    cassandra.nodetool("import", keyspace, "t", tmp_path / place)
    assert components(tmp_path / place) == before


def test_import_leaves_a_damaged_sstable_where_it_was_and_is_exit_1(
    cassandra: Node, keyspace: str, tmp_path: Path
) -> None:
    written = fill(cassandra, keyspace)
    staged = tmp_path / keyspace / "t"
    shutil.copytree(cassandra.table_directory(keyspace, "t") / "backups", staged)
    (data,) = staged.glob("*-Data.db")
    flip(data)
    before = components(staged)
    said = cassandra.nodetool("import", keyspace, "t", staged, check=1).stderr
    assert said.split("\n")[:2] == ["Some directories failed to import, check server logs for details:", str(staged)]
    assert components(staged) == before
    assert rows(cassandra, keyspace) == written


@ON_BIG
def test_import_into_no_table_is_exit_1_and_from_no_directory_exit_2(
    cassandra: Node, keyspace: str, tmp_path: Path
) -> None:
    fill(cassandra, keyspace)
    said = cassandra.nodetool("import", keyspace, "nosuch", tmp_path, check=1).stderr
    assert f"ColumnFamilyStore for {keyspace}/nosuch not found." in said
    said = cassandra.nodetool("import", keyspace, "t", tmp_path / "nosuch", check=2).stderr
    assert f"Directory {tmp_path}/nosuch does not exist" in said


# ------------------------------------------------------------------------------------------------------------
# What nodetool and CQL say


@ON_BIG
def test_snapshot_says_its_tag_but_no_table_and_listsnapshots_each_table(cassandra: Node, keyspace: str) -> None:
    for table in ("one", "two"):
        cassandra.cql(f"CREATE TABLE {keyspace}.{table} (k int PRIMARY KEY)")
    said = cassandra.nodetool("snapshot", "-t", "listed", keyspace).stdout.splitlines()
    assert said == [
        f"Requested creating snapshot(s) for [{keyspace}] with snapshot name [listed] and options {{skipFlush=false}}",
        "Snapshot directory: listed",
    ]
    listed = [line.split()[:3] for line in cassandra.nodetool("listsnapshots").stdout.splitlines()]
    assert sorted(line for line in listed if line[:1] == ["listed"]) == [
        ["listed", keyspace, "one"],
        ["listed", keyspace, "two"],
    ]


@ON_BIG
def test_a_snapshot_of_no_keyspace_is_exit_1_and_says_so_on_stdout(cassandra: Node) -> None:
    said = cassandra.nodetool("snapshot", "-t", "tag", "nosuch", check=1)
    assert "nodetool: Keyspace nosuch does not exist\n" in said.stdout
    assert said.stderr == ""


@ON_BIG
def test_tablestats_is_exit_0_for_a_table_and_1_for_none(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    found = cassandra.nodetool("tablestats", f"{keyspace}.t")
    assert f"Keyspace: {keyspace}\n" in found.stdout
    assert "\t\tTable: t\n" in found.stdout
    missing = cassandra.nodetool("tablestats", f"{keyspace}.nosuch", check=1)
    assert f"nodetool: Unknown tables: [nosuch] in keyspace: {keyspace}" in missing.stdout
    missing = cassandra.nodetool("tablestats", "nosuch.t", check=1)
    assert "nodetool: Unknown keyspace: nosuch" in missing.stdout


@ON_BIG
def test_version_is_one_line(cassandra: Node) -> None:
    assert re.fullmatch(r"ReleaseVersion: 5\.0\.\d+\n", cassandra.nodetool("version").stdout)


@ON_BIG
def test_nodetool_info_and_system_local_agree_about_the_node(cassandra: Node) -> None:
    said = cassandra.nodetool("info", "-T").stdout
    local = cassandra.local()

    def value(name: str) -> list[str]:
        return re.findall(rf"^{name} *: (.*)$", said, re.MULTILINE)

    assert value("ID") == [str(local.host_id)]
    assert set(value("Token")) == set(local.tokens)
    assert value("Data Center") == [local.data_center] == ["datacenter1"]
    assert value("Rack") == [local.rack] == ["rack1"]
    assert local.cluster_name == cassandra.setup.cluster_name
    assert local.cluster_name not in said
    assert f"Name: {local.cluster_name}\n" in cassandra.nodetool("describecluster").stdout


@ON_BIG
def test_cqlsh_describes_the_schema(cassandra: Node, keyspace: str) -> None:
    fill(cassandra, keyspace)
    said = cassandra.tool("cqlsh", "-e", "DESCRIBE SCHEMA").stdout
    assert f"CREATE KEYSPACE {keyspace} " in said
    assert f"CREATE TABLE {keyspace}.t " in said
    assert "system_auth" not in said


# ------------------------------------------------------------------------------------------------------------
# Nodes of a test's own


def test_nodetool_on_a_stopped_node_is_exit_1(new_node: Callable[..., Node]) -> None:
    node = new_node()
    node.stop()
    said = node.nodetool("snapshot", "-t", "tag", check=1)
    assert "Failed to connect" in said.stderr


def test_a_restarted_node_is_the_same_with_the_same_rows(new_node: Callable[..., Node]) -> None:
    node = new_node()
    node.create_keyspace("ks")
    written = fill(node, "ks")
    before = node.local()
    node.restart()
    after = node.local()
    assert (after.host_id, after.tokens) == (before.host_id, before.tokens)
    assert rows(node, "ks") == written


def test_a_node_takes_the_tokens_that_it_is_given(new_node: Callable[..., Node]) -> None:
    tokens = ["-6148914691236517206", "0", "6148914691236517204"]
    node = new_node(initial_token=",".join(tokens), auto_bootstrap=False)
    assert set(node.local().tokens) == set(tokens)


def test_with_two_data_directories_each_flush_is_split_but_manifest_and_schema_are_not(
    new_node: Callable[..., Node],
) -> None:
    node = new_node(data_directories=2)
    node.create_keyspace("ks")
    tables = [f"t{number}" for number in range(6)]
    for table in tables:
        fill(node, "ks", table)
    node.nodetool("snapshot", "-t", "tag", "ks")
    for table in tables:
        taken = [path / "snapshots" / "tag" for path in node.table_directories("ks", table)]
        assert len(taken) == 2
        assert all(components(path) for path in taken)
        (manifest,) = (path / "manifest.json" for path in taken if "manifest.json" in names(path))
        held = {data.name for path in taken for data in path.glob("*-Data.db")}
        assert set(json.loads(manifest.read_text())["files"]) == held
        assert [name for path in taken for name in names(path)].count("schema.cql") == 1


def test_three_nodes_are_one_cluster(three_nodes: list[Node]) -> None:
    first = three_nodes[0]
    first.create_keyspace("ks", replication=3)
    written = fill(first, "ks")
    for node in three_nodes:
        assert rows(node, "ks") == written
    for node in three_nodes[1:]:
        node.nodetool("flush", "ks")
    assert all(components(node.table_directory("ks", "t")) for node in three_nodes)
    assert len({node.local().host_id for node in three_nodes}) == 3
