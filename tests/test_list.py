"""What `cassbackup list` shows of a bucket: nodes, snapshots, incrementals, and what of them is bad or gone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, Run
from scene import Scene
from servers import FileBucket
from tree import Node

import cassbackup
from cassbackup import (
    Answer,
    Bucket,
    Fault,
    ListOptions,
    Missing,
    Patient,
    PruneOptions,
    RestoreOptions,
    StoreOptions,
    VerifyOptions,
    list_,
    open_store,
    prune,
    restore,
    utc,
    verify,
)

T1, T2, T3 = (f"20261101T0{hour}0000.000000Z" for hour in (1, 2, 3))
HOST = "8d5ed9f4-7764-4dbd-bad8-43fddce94b7c"
USERS, LOGS = "users-" + "a" * 32, "logs-" + "b" * 32
GONE = "gone, but not by prune"


class Shelf:
    """A bucket with listings that have a name and no content: mostly `list` needs no more."""

    def __init__(self, bucket: FileBucket) -> None:
        self.bucket = bucket

    def put(self, node: str, name: str, document: object = None) -> None:
        body = b"" if document is None else json.dumps({"version": 2, **document}).encode()  # type: ignore[dict-item]
        self.bucket.put(f"{node}.listings/{name}", body)

    def node(self, name: str, **document: object) -> None:
        """Store a node's place in the ring, and a heartbeat at the third hour."""
        self.put(name, f"node.{T1}.json", document)
        self.put(name, f"heartbeat/{T3}.json", {})

    def snapshot(self, node: str, tag: str, life: str, *tables: str, state: str = "complete") -> list[str]:
        """Store listings; return their keys."""
        places = tables or (f"ks1/{USERS}", f"ks1/{LOGS}")
        names = [f"{table}/snapshots/{tag}/{life}/{life}-{state}-10-2048.json" for table in places]
        for name in names:
            self.put(node, name)
        return [f"{node}.listings/{name}" for name in names]

    def record(self, node: str, tag: str, life: str, listings: Sequence[str], **more: object) -> None:
        document = {"node": node, "tag": tag, "taken": life, "listings": listings, "schema": "", "ring": "", **more}
        self.put(node, f"tags/{tag}/{life}.json", document)

    def list(self, **options: Any) -> Answer:
        store = Patient(open_store(self.bucket.target, StoreOptions()), 1.0)
        return list_(Bucket(store, 4), ListOptions(**options))

    def snapshots(self, **options: Any) -> list[dict[str, Any]]:
        (page,) = self.list(**options).document["nodes"]
        found: list[dict[str, Any]] = page["snapshots"]
        return found

    def names(self, **options: Any) -> list[str]:
        return [page["name"] for page in self.list(**options).document["nodes"]]


@pytest.fixture
def shelf(tmp_bucket: FileBucket) -> Shelf:
    return Shelf(tmp_bucket)


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


# ------------------------------------------------------------------------------------------------------------
# Nodes


def test_a_node_is_meant_by_its_whole_name_host_id_or_address_and_by_no_part(shelf: Shelf) -> None:
    shelf.node("db1-i-0a", cluster="blue", host_id=HOST, addresses=["10.0.0.1"], tokens=["-42", "7"])
    shelf.node("db10-i-0b", cluster="blue", host_id="ffff", addresses=["10.0.0.2"])
    shelf.node("other-i-0c", cluster="red", addresses=["10.0.7.1", "1.2.3.4"])
    assert shelf.names() == ["db1-i-0a", "db10-i-0b", "other-i-0c"]
    for word in ("db1-i-0a", "db1", HOST, "10.0.0.1"):
        assert shelf.names(node=word) == ["db1-i-0a"]
    for word in ("db", "db1-", HOST[:13], "10.0.0"):
        with pytest.raises(Missing, match="there are db1-i-0a, db10-i-0b, other-i-0c"):
            shelf.list(node=word)
    assert shelf.names(cluster="blue") == ["db1-i-0a", "db10-i-0b"]
    lines = shelf.list().text.splitlines()
    assert [line.split()[:3] for line in lines[1:4:2]] == [
        ["db1-i-0a", "blue", "10.0.0.1"],
        ["other-i-0c", "red", "10.0.7.1"],
    ]
    assert "  2026-11-01 03:00Z  " in lines[1]
    assert shelf.list(node="db1").document["nodes"][0]["tokens"] == ("-42", "7")


def test_the_last_that_was_heard_is_a_heartbeat_or_a_listing(shelf: Shelf) -> None:
    shelf.node("silent")
    shelf.snapshot("listed", "daily", T2)
    shelf.put("fresh", "owner.json", {})
    assert {page["name"]: page["last"] for page in shelf.list().document["nodes"]} == {
        "silent": T3,
        "listed": T2,
        "fresh": "",
    }
    assert " never " in next(line for line in shelf.list().text.splitlines() if line.startswith("fresh"))


def test_a_clock_that_was_ahead_makes_no_silent_node_look_alive(shelf: Shelf) -> None:
    shelf.put("db1", "heartbeat/20991231T000000.000000Z.json", {})
    [page] = shelf.list().document["nodes"]
    assert page["last"] < "2099", "the store's clock tells when it was put"


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
    for options in ({}, {"tag": "daily"}):
        answer = shelf.list(**options)
        states = [line.split("  ")[-1] for line in answer.text.splitlines()[1:5]]
        assert states == ["daily complete", "none", f"daily 1 of 2 tables incomplete: ks1/{USERS}", "daily complete"]


def test_a_snapshot_is_one_life_of_a_tag_of_all_tables_in_the_order_in_which_cassandra_took_them(shelf: Shelf) -> None:
    shelf.snapshot("node1", "daily", T2)
    shelf.snapshot("node1", "daily", T1)
    shelf.snapshot("node1", "weekly", T1, f"ks1/{USERS}")
    found = [(one["tag"], one["life"], one["tables"], one["files"], one["bytes"]) for one in shelf.snapshots()]
    assert found == [("daily", T1, 2, 20, 4096), ("weekly", T1, 1, 10, 2048), ("daily", T2, 2, 20, 4096)]
    assert "\ndaily@20261101T010000   2026-11-01 01:00Z  2       20     4.0 KiB  complete\n" in shelf.list().text
    assert [one["life"] for one in shelf.snapshots(tag="daily@20261101T02")] == [T2]  # as restore takes it


def test_incrementals_are_covered_from_the_first_listing_to_the_last(shelf: Shelf) -> None:
    for moment in (T2, T1, T3):
        shelf.put("node1", f"ks1/{USERS}/backups/{moment}-complete-8-1024.json")
    shelf.put("node1", f"archive/%2Fvar%2Fcommitlogs/{T1}-complete-3-96.json")
    answer = shelf.list()
    covered = {f"ks1/{USERS}": (T1, T3), "/var/commitlogs": (T1, T1)}
    assert answer.document["nodes"][0]["incrementals"] == covered
    assert f"ks1/{USERS}  2026-11-01 01:00Z  2026-11-01 03:00Z" in answer.text


@pytest.mark.parametrize("word", ["ks1", "ks1.users", f"ks1.{USERS}", "*.users", "ks?.us*"])
def test_a_table_is_meant_by_keyspace_name_id_or_glob(shelf: Shelf, word: str) -> None:
    shelf.snapshot("node1", "daily", T1, f"ks1/{USERS}", f"system/local-{'c' * 32}")
    shelf.put("node1", f"ks1/{USERS}/backups/{T1}-complete-8-1024.json")
    page = shelf.list(table=(word,)).document["nodes"][0]
    assert [one["tables"] for one in page["snapshots"]] == [1]
    assert list(page["incrementals"]) == [f"ks1/{USERS}"]


# ------------------------------------------------------------------------------------------------------------
# What is not as it should be


def test_what_prune_has_taken_of_a_tag_is_told_and_is_no_alarm(shelf: Shelf) -> None:
    users, logs = shelf.snapshot("node1", "daily", T1)
    shelf.record("node1", "daily", T1, [users], pruned=[logs])
    (shelf.bucket.root / logs).unlink()
    answer = shelf.list()
    assert answer.code == 0
    assert f"1 of 2 tables pruned: ks1/{LOGS}" in answer.text
    assert shelf.snapshots()[0]["wrong"] == {"pruned": [f"ks1/{LOGS}"]}


def test_a_listing_that_is_gone_without_prune_is_red(shelf: Shelf) -> None:
    users, logs = shelf.snapshot("node1", "daily", T1)
    shelf.record("node1", "daily", T1, [users, logs])
    assert shelf.list().code == 0
    (shelf.bucket.root / logs).unlink()
    answer = shelf.list()
    assert (answer.code, f"1 of 2 tables {GONE}: ks1/{LOGS}" in answer.text) == (3, True)
    assert shelf.list(table=("ks1.users",)).code == 0  # nobody asked for the other
    (shelf.bucket.root / users).unlink()  # now nothing but the record tells of this tag
    answer = shelf.list()
    assert (answer.code, f"2 of 2 tables {GONE}" in answer.text) == (3, True)
    assert (shelf.snapshots()[0]["tag"], shelf.snapshots()[0]["life"]) == ("daily", T1)


def test_of_many_nodes_the_one_that_makes_it_red_is_named_and_cassandras_own_snapshot_is_no_newest(
    shelf: Shelf,
) -> None:
    users, logs = shelf.snapshot("node1", "daily", T1)
    shelf.snapshot("node1", "dropped-1795971600229-users", T2, f"ks1/{USERS}")
    shelf.snapshot("node2", "daily", T1)
    answer = shelf.list()
    assert (answer.code, "daily complete" in answer.text, "dropped-" in answer.text) == (0, True, False)
    shelf.record("node1", "daily", T1, [users, logs])
    (shelf.bucket.root / logs).unlink()
    answer = shelf.list()
    assert (answer.code, "cassbackup list --node node1" in answer.text) == (3, True)
    assert "--node node2" not in answer.text


def test_a_newer_record_of_the_same_life_replaces_the_older_one(shelf: Shelf) -> None:
    users, logs = shelf.snapshot("node1", "daily", T1)
    shelf.record("node1", "daily", T1, [users, logs])
    record = {"node": "node1", "tag": "daily", "taken": T1, "listings": [users], "pruned": [logs]}
    shelf.put("node1", f"tags/daily/{T2}.json", record)
    (shelf.bucket.root / logs).unlink()
    assert (shelf.list().code, shelf.snapshots()[0]["state"]) == (0, f"1 of 2 tables pruned: ks1/{LOGS}")


def test_a_snapshot_that_names_a_bad_object_is_red(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    shelf = Shelf(scene.bucket)  # type: ignore[arg-type]
    assert shelf.list().code == 0
    key = next(key for key in scene.file_keys() if "snapshots/daily" in key)
    shelf.put("node1", f"bad/{T1}.json", {"keys": [{"key": key, "found": "absent", "at": T1}]})
    answer = shelf.list()
    assert (answer.code, "1 of 1 tables bad: ks1/users-" in answer.text) == (3, True)
    shelf.put("node1", f"bad/{T2}.json", {"keys": [{"key": key, "found": "good", "at": T2}]})
    assert shelf.list().code == 0


def test_a_time_means_all_tables_of_that_snapshot(shelf: Shelf) -> None:
    second = f"{T1[:14]}9.000000Z"
    shelf.snapshot("node1", "daily", T1, f"ks1/{USERS}")
    shelf.snapshot("node1", "daily", second, f"ks1/{LOGS}")
    assert [one["tables"] for one in shelf.snapshots(tag=f"daily@{T1[:15]}")] == [2]


ODD: list[tuple[str, object]] = [
    (f"tags/daily/{T1}.json", {"tag": "daily", "taken": T1, "listings": [5]}),
    (f"tags/daily/{T1}.json", {"tag": "daily", "taken": T1, "listings": None}),
    (f"tags/daily/{T1}.json", {"tag": "daily", "taken": T1, "listings": ["foo"]}),
    (f"bad/{T1}.json", {"keys": [{"key": 5, "found": "absent"}]}),
    (f"bad/{T1}.json", {"keys": [{"key": "node1/x"}]}),
    ("heartbeat/.keep", {}),
    (f"ks1/{USERS}/incremental/99991231T235959.999999Z-complete-1-1.json", {}),
]


@pytest.mark.parametrize(("name", "document"), ODD, ids=[f"{number}" for number in range(len(ODD))])
def test_no_document_that_somebody_wrote_ends_a_command_but_with_a_sentence(
    shelf: Shelf, tmp_path: Path, name: str, document: object
) -> None:
    shelf.snapshot("node1", "daily", T1)
    shelf.put("node1", name, document)
    bucket = Bucket(Patient(open_store(shelf.bucket.target, StoreOptions()), 1.0), 4)
    shelf.bucket.is_touched = True
    for work in (
        lambda: list_(bucket, ListOptions()),
        lambda: verify(bucket, VerifyOptions(node="node1")),
        lambda: restore(bucket, RestoreOptions(node="node1", tag="daily", into=str(tmp_path / "x"), dry_run=True)),
        lambda: restore(bucket, RestoreOptions(node="node1", latest=True, into=str(tmp_path / "x"), dry_run=True)),
        lambda: prune(bucket, PruneOptions(node="node1", keep_last=1)),
    ):
        with contextlib.suppress(Fault):
            work()


def test_a_listing_that_cannot_be_read_is_red_and_the_others_are_shown(scene: Scene, node: Node) -> None:
    for name in ("users", "logs"):
        node.table("ks1", name).flush()
    node.snapshot("daily")
    scene.once(*node.data_dirs)
    shelf = Shelf(scene.bucket)  # type: ignore[arg-type]
    shelf.put("node1", f"bad/{T1}.json", {"keys": [{"key": "node1/x", "found": "absent", "at": T1}]})
    damaged = next(key for key in scene.bucket.objects() if "/users-" in key and "/snapshots/daily/" in key)
    (shelf.bucket.root / damaged).write_text("{")
    answer = shelf.list()
    assert (answer.code, "1 of 2 tables bad: ks1/users-" in answer.text) == (3, True)


def test_odd_names_are_shown_so_that_a_terminal_survives_them(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("da\x1b[2Jily\n100%")
    scene.once(*node.data_dirs)
    shelf = Shelf(scene.bucket)  # type: ignore[arg-type]
    shelf.put("node1", f"node.{T1}.json", {"cluster": "c\x1b[1m", "addresses": ["\udc80"]})
    text = shelf.list().text
    assert "\x1b" not in text
    assert "da%1B[2Jily%0A100%@2" in text
    assert shelf.snapshots()[0]["tag"] == "da\x1b[2Jily\n100%"


def test_no_name_of_a_keyspace_is_taken_for_a_folder_of_ours(scene: Scene, node: Node) -> None:
    names = ("archive", "bad", "heartbeat", "node", "owner", "tags")
    tables = [node.table(name, name) for name in names]
    for table in tables:
        table.flush()
    node.snapshot("tags")
    scene.once(*node.data_dirs)
    shelf = Shelf(scene.bucket)  # type: ignore[arg-type]
    assert [(one["tag"], one["tables"]) for one in shelf.snapshots()] == [("tags", len(names))]
    covered = shelf.list().document["nodes"][0]["incrementals"]
    assert sorted(covered) == [f"{table.keyspace}/{table.directory}" for table in tables]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tag": "dayly"}, "`cassbackup list` alone shows what there is; put globs in quotes"),
        ({"table": ("ks1.user",)}, r"no table ks1.user: there are ks1.users-\w+; put globs in quotes"),
        ({"table": ("ks1.users", "no"), "tag": "daily"}, "no table no: there are"),
    ],
)
def test_what_matches_nothing_is_told_with_what_there_is(shelf: Shelf, options: dict[str, Any], said: str) -> None:
    shelf.snapshot("node1", "daily", T1, f"ks1/{USERS}")
    with pytest.raises(Missing, match=said):
        shelf.list(**options)


def test_an_empty_bucket_says_so(shelf: Shelf) -> None:
    (shelf.bucket.root).mkdir(exist_ok=True)
    shelf.bucket.put("readme.txt", b"")
    with pytest.raises(Missing, match=r"no node in file://.*: there are none"):
        shelf.list()


def test_a_bucket_whose_nodes_are_below_a_prefix_says_which_prefixes_there_are(shelf: Shelf) -> None:
    shelf.node("prod/eu/node1")
    shelf.node("test/node1")
    with pytest.raises(Missing, match=r"there are none; is a --prefix lacking\? There are prod, test"):
        shelf.list()


def test_what_is_no_listing_is_named_in_the_log_and_the_rest_is_shown(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.node("node1")
    shelf.snapshot("node1", "daily", T1)
    foreign = ["readme.txt", f"ks1/{USERS}/snapshots/daily/{T1}/notes.json", f"ks1/{USERS}/{T1}-complete-1-1.json"]
    for name in foreign:
        shelf.put("node1", name)
    shelf.put("node2", f"node.{utc(0)}.json")  # empty
    shelf.put("node3", f"node.{utc(0)}.json", {"addresses": None, "tokens": "none", "dc": 5})
    monkeypatch.setattr(cassbackup.log, "propagate", True)
    assert shelf.names() == ["node1", "node2", "node3"]
    assert shelf.snapshots(node="node1")[0]["tables"] == 2
    assert [name for name in foreign if name not in caplog.text] == []
