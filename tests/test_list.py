"""What `cassbackup list` shows of a bucket: nodes, snapshots, incrementals, and what a new cluster needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, Run, clean_environ
from scene import Scene
from servers import Bucket, FileBucket
from tree import Node

T1, T2, T3 = (f"20261101T0{hour}0000.000000Z" for hour in (1, 2, 3))
HOST = "8d5ed9f4-7764-4dbd-bad8-43fddce94b7c"
USERS, LOGS = "users-" + "a" * 32, "logs-" + "b" * 32


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


class Shelf:
    """A bucket with listings that have a name and no content: `list` must need no more."""

    def __init__(self, bucket: Bucket, run: Run, at: Path) -> None:
        self.bucket, self.run, self.state = bucket, run, at / "nobody"

    def put(self, node: str, name: str, page: object = None) -> None:
        self.bucket.put(f"{node}.listings/{name}", b"" if page is None else json.dumps(page).encode())

    def node(self, name: str, **page: object) -> None:
        """Store a node.json, and a heartbeat at the third hour."""
        self.put(name, "node.json", {"version": 1, **page})
        self.put(name, f"heartbeat/{T3}.json", {})

    def snapshot(self, node: str, tag: str, taking: str, *tables: str, state: str = "complete") -> None:
        for table in tables or (f"ks1/{USERS}", f"ks1/{LOGS}"):
            self.put(node, f"{table}/snapshots/{tag}/{taking}/{taking}-{state}-10-2048.json")

    def backups(self, node: str, *stamps: str) -> None:
        for stamp in stamps:
            self.put(node, f"ks1/{USERS}/backups/{stamp}-complete-8-1024.json")

    def list(self, *args: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        options = ["--bucket", self.bucket.target, "--state-dir", self.state]
        return self.run("list", *args, *options, env=self.bucket.environ, check=check)

    def page(self, *args: object) -> dict[str, Any]:
        """Return what --json says, which is one document and all that is on stdout."""
        found: dict[str, Any] = json.loads(self.list("--json", *args).stdout)
        assert found["schema"] == 1
        return found

    def names(self, *args: object) -> list[str]:
        return [page["name"] for page in self.page(*args)["nodes"]]


@pytest.fixture
def shelf(tmp_bucket: FileBucket, run_cassbackup: Run, tmp_path: Path) -> Shelf:
    return Shelf(tmp_bucket, run_cassbackup, tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Nodes


def test_a_node_is_meant_by_any_part_of_its_name_host_id_or_address(shelf: Shelf) -> None:
    shelf.node("node1", cluster="blue", host_id=HOST, addresses=["10.0.0.1"])
    shelf.node("node10", cluster="blue", host_id="ffff", addresses=["10.0.0.2"])
    shelf.node("other2", cluster="red", host_id="eeee", addresses=["10.0.7.1", "1.2.3.4"])
    assert shelf.names() == ["node1", "node10", "other2"]
    assert shelf.names("--node", "node1") == ["node1"]  # a whole name means that node alone
    assert shelf.names("--node", "node") == ["node1", "node10"]
    assert shelf.names("--node", HOST[:13]) == ["node1"]
    assert shelf.names("--node", "1.2.3") == ["other2"]
    assert shelf.names("--cluster", "blue") == ["node1", "node10"]
    assert shelf.names("--cluster", "red", "--node", "2") == ["other2"]
    text = shelf.list().stdout
    assert [line.split()[:3] for line in text.splitlines()[1:4]] == [
        ["node1", "blue", "10.0.0.1"],
        ["node10", "blue", "10.0.0.2"],
        ["other2", "red", "10.0.7.1"],
    ]


def test_of_several_node_files_the_newest_counts(shelf: Shelf) -> None:
    shelf.node("node1", cluster="old")
    for stamp, cluster in ((T1, "older"), (T3, "newest"), (T2, "newer")):
        shelf.put("node1", f"node.{stamp}.json", {"version": 1, "cluster": cluster})
    assert shelf.page()["nodes"][0]["cluster"] == "newest"


def test_silence_is_counted_from_the_last_that_was_heard(shelf: Shelf) -> None:
    shelf.node("silent")
    shelf.snapshot("listed", "daily", T2)
    shelf.put("fresh", "owner.json", {})
    silent, listed, fresh = (
        next(p for p in shelf.page()["nodes"] if p["name"] == n) for n in ("silent", "listed", "fresh")
    )
    assert silent["last"] == "2026-11-01T03:00:00.000000Z"
    assert listed["last"] == "2026-11-01T02:00:00.000000Z"
    assert round(listed["silent_s"] - silent["silent_s"], -2) == 3600
    assert (fresh["last"], fresh["silent_s"]) == ("", None)
    lines = shelf.list().stdout.splitlines()
    assert "2026-11-01T03:00:00Z  silent for" in next(line for line in lines if line.startswith("silent"))
    assert next(line for line in lines if line.startswith("fresh")).endswith("never")


def test_a_new_instance_continues_the_node_with_its_host_id(shelf: Shelf) -> None:
    shelf.node("a-new", host_id=HOST)
    shelf.put("z-old", "node.json", {"host_id": HOST})
    shelf.put("z-old", f"heartbeat/{T1}.json", {})
    shelf.node("b-other", host_id="ffff")
    for which in ((), ("--node", "a-new"), ("--node", HOST), ("--topology",)):
        assert shelf.page(*which)["continues"] == {"a-new": "z-old"}, which
    for which in ((), ("--node", "a-new")):
        line = next(line for line in shelf.list(*which).stdout.splitlines() if line.startswith("a-new"))
        assert line.endswith("continues z-old")
    assert shelf.page("--node", "z-old")["continues"] == {}


# ------------------------------------------------------------------------------------------------------------
# Snapshots and incrementals


def test_a_node_that_lacks_the_tag_counts_among_those_that_should_have_it(shelf: Shelf) -> None:
    for name in ("node1", "node2", "node3", "node4"):
        shelf.node(name)
    shelf.snapshot("node1", "daily", T1)
    shelf.snapshot("node3", "daily", T1, f"ks1/{LOGS}")
    shelf.snapshot("node3", "daily", T1, f"ks1/{USERS}", state="incomplete")
    shelf.snapshot("node4", "daily", T1, state="incomplete")
    shelf.snapshot("node4", "daily", T2)
    shelf.snapshot("node4", "truncated-1795313351458-users", T2)  # no tag that a person took
    wanted = "tag daily: complete on 2 of 4 nodes, incomplete node3, missing node2"
    for args in ((), ("--tag", "daily")):
        assert [line for line in shelf.list(*args).stdout.splitlines() if line.startswith("tag ")] == [wanted]
    (told,) = shelf.page("--tag", "daily")["tags"]
    assert told == {"tag": "daily", "complete": 2, "nodes": 4, "incomplete": ["node3"], "missing": ["node2"]}


def test_a_backup_is_one_taking_of_all_tables(shelf: Shelf) -> None:
    shelf.snapshot("node1", "daily", T1)
    shelf.snapshot("node1", "daily", T2)
    shelf.snapshot("node1", "weekly", T1, f"ks1/{USERS}")
    snapshots = shelf.page()["nodes"][0]["snapshots"]
    assert [(one["tag"], one["taking"], one["tables"], one["files"], one["bytes"]) for one in snapshots] == [
        ("daily", T1, 2, 20, 4096),
        ("weekly", T1, 1, 10, 2048),
        ("daily", T2, 2, 20, 4096),
    ]
    text = shelf.list().stdout
    assert "daily@20261101T010000   2026-11-01T01:00:00Z  2       20     4.0 KiB  complete" in text
    handle = shelf.page("--tag", "daily@20261101T02")["nodes"][0]["snapshots"]  # as restore takes it
    assert [one["taking"] for one in handle] == [T2]


def test_incrementals_are_covered_from_the_first_listing_to_the_last(shelf: Shelf) -> None:
    shelf.backups("node1", T2, T1, T3)
    (covered,) = shelf.page()["nodes"][0]["incrementals"]
    assert covered == {
        "table": f"ks1.{USERS}",
        "from": "2026-11-01T01:00:00.000000Z",
        "to": "2026-11-01T03:00:00.000000Z",
        "listings": 3,
    }
    assert f"ks1.{USERS}  2026-11-01T01:00:00Z  2026-11-01T03:00:00Z" in shelf.list().stdout


@pytest.mark.parametrize("word", ["ks1", "ks1.users", f"ks1.{USERS}", "*.users", "ks?.us*"])
def test_a_table_is_meant_by_keyspace_name_id_or_glob(shelf: Shelf, word: str) -> None:
    shelf.snapshot("node1", "daily", T1, f"ks1/{USERS}", f"system/local-{'c' * 32}")
    shelf.backups("node1", T1)
    page = shelf.page("--table", word)["nodes"][0]
    assert [one["tables"] for one in page["snapshots"]] == [1]
    assert [one["table"] for one in page["incrementals"]] == [f"ks1.{USERS}"]
    assert shelf.page("--table", "system")["nodes"][0]["incrementals"] == []


def test_with_its_tag_a_snapshot_says_what_was_sent_for_it_and_what_it_lacks(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    node.incremental = False
    users.flush(size=50_000)
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    node.clear("daily")
    users.flush(size=3_000)
    node.snapshot("daily")
    users.sstables[0].link("snapshots/broken", node.history, None)
    (users.directories()[0] / "snapshots/broken/manifest.json").write_text(
        '{"files": ["nb-1-big-Data.db", "gone-Data.db"]}'
    )
    scene.once(*node.data_dirs, check=3)
    shelf = Shelf(scene.bucket, scene.run, scene.at)
    first, second = shelf.page("--tag", "daily")["nodes"][0]["snapshots"]
    assert first["bytes_sent"] == first["bytes"] > 50_000
    assert 3_000 < second["bytes_sent"] < 10_000 < second["bytes"]
    assert (second["complete"], second["missing"], second["damaged"]) == (True, [], [])
    (broken,) = shelf.page("--tag", "broken")["nodes"][0]["snapshots"]
    assert (broken["complete"], broken["missing"]) == (False, ["gone-Data.db"])
    assert f"INCOMPLETE: ks1.{users.directory}, lacks gone-Data.db" in shelf.list("--tag", "broken").stdout


@pytest.mark.parametrize("keyspace", ["owner", "node", "heartbeat", "archive", "tags"])
def test_no_name_of_a_keyspace_is_taken_for_a_folder_of_ours(scene: Scene, node: Node, keyspace: str) -> None:
    table = node.table(keyspace, keyspace)
    table.flush()
    node.snapshot(keyspace)
    scene.once(*node.data_dirs)
    done = Shelf(scene.bucket, scene.run, scene.at).list("--json", "--table", keyspace)
    (page,) = json.loads(done.stdout)["nodes"]
    assert [(one["tag"], one["tables"]) for one in page["snapshots"]] == [(keyspace, 1)]
    assert [one["table"] for one in page["incrementals"]] == [f"{keyspace}.{table.directory}"]
    assert done.stderr == ""


def test_odd_names_are_shown_so_that_a_terminal_survives_them(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("da\x1b[2Jily\n100%")
    scene.once(*node.data_dirs)
    shelf = Shelf(scene.bucket, scene.run, scene.at)
    shelf.put("node1", "node.json", {"cluster": "c\x1b[1m", "addresses": ["\udc80"]})
    text = shelf.list().stdout
    assert "\x1b" not in text
    assert "da%1B[2Jily%0A100%@2" in text
    assert shelf.page()["nodes"][0]["snapshots"][0]["tag"] == "da\x1b[2Jily\n100%"


def test_archives_are_shown_by_their_directory(shelf: Shelf) -> None:
    shelf.put("node1", f"archive/%2Fvar%2Fcommitlogs/{T1}-complete-3-96.json")
    assert [one["table"] for one in shelf.page()["nodes"][0]["incrementals"]] == ["/var/commitlogs"]


# ------------------------------------------------------------------------------------------------------------
# Topology


def test_a_new_cluster_is_told_each_place_in_the_ring_and_what_to_restore(shelf: Shelf) -> None:
    shelf.node(
        "node1", host_id=HOST, dc="dc1", rack="r2", addresses=["10.0.0.1"], tokens=["-9223372036854775808", "42"]
    )
    shelf.node("node2")
    shelf.snapshot("node1", "daily", T1)
    shelf.snapshot("node1", "daily", T2)
    shelf.snapshot("node1", "dropped-1795313351458-users", T2)
    shelf.snapshot("node1", "broken", T2, state="incomplete")
    shelf.snapshot("node1", "later", T3)
    text = shelf.list("--topology", "--at", "2026-11-01T02:30").stdout
    assert text.startswith("as of 2026-11-01T02:30:00Z\n")
    first, second = text.split("\n\n")[1:]
    assert "\ninitial_token: -9223372036854775808,42" in first
    assert "daily@20261101T020000, 2 tables, 4.0 KiB" in first
    assert all(word in first for word in (HOST, "dc1, r2", "10.0.0.1"))
    assert "newest complete snapshot  none" in second
    assert "\ninitial_token" not in second
    one, other = shelf.page("--topology", "--at", "2026-11-01T02:30")["nodes"]
    assert (one["initial_token"], one["snapshot"]["taking"], one["snapshot"]["bytes"]) == (
        "-9223372036854775808,42",
        T2,
        4096,
    )
    assert other["snapshot"] is None
    assert shelf.page("--topology")["nodes"][0]["snapshot"]["tag"] == "later"
    assert shelf.page("--topology", "--at", "2026-11-01")["nodes"][0]["snapshot"] is None


def test_a_moment_without_topology_is_wrong_usage(shelf: Shelf) -> None:
    shelf.node("node1")
    assert "--at is for --topology" in shelf.list("--at", "03:00", check=2).stderr


# ------------------------------------------------------------------------------------------------------------
# What is not as it should be


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--node", "nodw1"), ("no node 'nodw1' in file://", "there are node1")),
        (("--cluster", "bleu"), ("of cluster 'bleu'", "the cluster 'blue'")),
        (("--tag", "dayly"), ("/*.listings/", "there are the tags daily")),
        (("--node", "node1", "--tag", "dayly"), ("/node1.listings/", "there are the tags daily")),
        (("--table", "ks1.user"), ("/*.listings/", "there are the tables ks1.users")),
        (("--table", "no.table", "--tag", "daily"), ("/*.listings/", "there are the tables ks1.users")),
    ],
)
def test_where_nothing_matches_the_prefix_and_near_names_are_told(
    shelf: Shelf, args: tuple[str, ...], said: tuple[str, ...]
) -> None:
    shelf.node("node1", cluster="blue")
    shelf.node("node2", cluster="blue")
    shelf.snapshot("node1", "daily", T1, f"ks1/{USERS}")
    done = shelf.list(*args, check=1)
    assert done.stdout == ""
    assert all(words in done.stderr for words in said), done.stderr


@pytest.mark.parametrize("args", [(), ("--json",), ("--node", "x"), ("--topology",)])
def test_an_empty_bucket_says_so(shelf: Shelf, args: tuple[str, ...]) -> None:
    done = shelf.list(*args, check=1)
    assert done.stdout == ""
    assert "nothing has been stored there" in done.stderr


def test_what_is_no_listing_is_named_in_the_log_and_the_rest_is_shown(shelf: Shelf) -> None:
    shelf.node("node1")
    shelf.snapshot("node1", "daily", T1)
    foreign = [
        "readme.txt",
        f"ks1/{USERS}/snapshots/daily/{T1}/notes.json",
        f"ks1/{USERS}/snapshots/daily/20261399T999999.000000Z/{T1}-complete-1-1.json",
        f"ks1/{USERS}/backups/20261399T999999.000000Z-complete-1-1.json",
        f"ks1/{USERS}/{T1}-complete-1-1.json",
    ]
    for name in foreign:
        shelf.put("node1", name)
    shelf.put("node2", "node.json")  # empty
    shelf.put("node3", "node.json", {"addresses": None, "tokens": "none", "dc": 5})
    shelf.put("node4", "node.json", ["no object"])
    done = shelf.list("--json")
    pages = {page["name"]: page for page in json.loads(done.stdout)["nodes"]}
    assert [len(page["snapshots"]) for page in pages.values()] == [1, 0, 0, 0]
    assert pages["node1"]["snapshots"][0]["tables"] == 2
    for name in (*(f"node1.listings/{name}" for name in foreign), "node2.listings/node", "node4.listings/node"):
        assert name in done.stderr, name


def test_a_listing_that_cannot_be_read_is_shown_as_damaged(scene: Scene, node: Node) -> None:
    for name in ("users", "logs"):
        node.table("ks1", name).flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    key = scene.listings("snapshot")[0].key
    scene.bucket.put(key, scene.bucket.get(key)[:-9])
    shelf = Shelf(scene.bucket, scene.run, scene.at)
    (snapshot,) = shelf.page("--tag", "daily")["nodes"][0]["snapshots"]
    assert len(snapshot["damaged"]) == 1
    assert snapshot["bytes_sent"] > 0
    assert "DAMAGED: listing cannot be read" in shelf.list("--tag", "daily").stdout
    assert shelf.list().returncode == 0


# ------------------------------------------------------------------------------------------------------------
# Every store, and many listings


def test_every_store_shows_the_same(bucket: Bucket, run_cassbackup: Run, tmp_path: Path) -> None:
    shelf = Shelf(bucket, run_cassbackup, tmp_path)
    shelf.node("node1", cluster="blue", host_id=HOST, tokens=["1"])
    shelf.snapshot("node1", "daily", T1)
    shelf.backups("node1", T1, T2)
    shelf.put("node10", "owner.json", {})
    bucket.put(f"node1/var/lib/cassandra/data/ks1/{USERS}/backups/nb-1-big-Data.db", b"no listing")
    assert shelf.names() == ["node1", "node10"]
    page = shelf.page("--node", "node1")["nodes"][0]
    assert (page["cluster"], page["last"]) == ("blue", "2026-11-01T03:00:00.000000Z")
    assert [(one["tables"], one["complete"]) for one in page["snapshots"]] == [(2, True)]
    assert [one["listings"] for one in page["incrementals"]] == [2]


@pytest.mark.slow
def test_more_listings_than_a_page_of_s3_holds_are_all_listed(
    moto: Bucket, run_cassbackup: Run, tmp_path: Path
) -> None:
    shelf = Shelf(moto, run_cassbackup, tmp_path)
    for number in range(1_050):
        shelf.backups("node1", f"20261101T000000.{number:06d}Z")
    (covered,) = shelf.page()["nodes"][0]["incrementals"]
    assert (covered["listings"], covered["to"]) == (1_050, "2026-11-01T00:00:00.001049Z")


@pytest.mark.slow
def test_a_hundred_thousand_listings_are_listed_by_their_names_in_bounded_memory(
    tmp_bucket: FileBucket, script: Path, home: Path
) -> None:
    """The bodies are empty, and an audit hook ends the program as soon as it opens one of them."""
    for table in range(100):
        for tag in range(100):
            taking = f"202611{tag % 28 + 1:02d}T{tag // 28:02d}0000.{table:06d}Z"
            folder = tmp_bucket.root / f"node1.listings/ks1/t{table}-{'a' * 32}/snapshots/daily{tag}/{taking}"
            folder.mkdir(parents=True)
            for number in range(10):
                (folder / f"{taking[:-7]}{number:06d}Z-complete-8-1024.json").touch()
    watcher = [
        "import runpy, sys",
        "opened = lambda event, args: event == 'open' and '-complete-' in str(args[0]) and sys.exit('body read')",
        "sys.addaudithook(opened)",
        "sys.argv = sys.argv[1:]",
        "try: runpy.run_path(sys.argv[0], run_name='__main__')",
        "finally: print(*[line for line in open('/proc/self/status') if line[:6] == 'VmHWM:'], file=sys.stderr)",
    ]
    command = [sys.executable, "-c", "\n".join(watcher), str(script), "list", "--json"]
    command += ["--bucket", tmp_bucket.target, "--state-dir", str(home)]
    done = subprocess.run(command, env=clean_environ(home, {}), capture_output=True, text=True, check=True)
    (page,) = json.loads(done.stdout)["nodes"]
    assert len(page["snapshots"]) == 100
    assert {one["tables"] for one in page["snapshots"]} == {100}
    assert int(done.stderr.split()[-2]) < 250_000  # KiB
