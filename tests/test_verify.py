"""What `cassbackup verify` finds in a bucket that is not what its listings say, and what it says about it."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import oracle
import pytest
from conftest import Daemon, Run
from scene import Scene
from servers import FileBucket, S3Bucket
from tree import Node, Table

MODES = ((), ("--tag", "monday"), ("--deep",))


class Bench(Scene):
    """A scene whose bucket is verified."""

    def verify(self, *args: object, check: int | None = 0, node: str = "node1") -> dict[str, Any]:
        """Return what --json says, which is one document and all that is on stdout."""
        found: dict[str, Any] = json.loads(self.verify_text("--json", *args, check=check, node=node))
        assert (found["schema"], found["node"]) == (1, node)
        return found

    def verify_text(self, *args: object, check: int | None = 0, node: str = "node1") -> str:
        options = ["--bucket", self.bucket.target, "--state-dir", self.at / "nobody", "--node", node]
        return self.run("verify", *args, *options, env=self.environ, check=check).stdout

    def key(self, ending: str) -> str:
        """Return the one file's key that ends so."""
        (found,) = (key for key in self.file_keys() if key.endswith(ending))
        return found

    def flip(self, key: str) -> None:
        """Give an object other bytes of the same length."""
        body = self.bucket.get(key)
        self.bucket.put(key, body[:-1] + bytes([body[-1] ^ 1]))


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Bench:
    return Bench(tmp_path, daemon, run_cassbackup, tmp_bucket)


@pytest.fixture(params=["tmp_bucket", "moto", "gcs", pytest.param("rclone", marks=pytest.mark.slow)])
def anywhere(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, request: pytest.FixtureRequest
) -> Bench:
    """Return a scene on each kind of store."""
    return Bench(tmp_path, daemon, run_cassbackup, request.getfixturevalue(request.param))


def two_days(scene: Scene, node: Node, sstables: int = 2) -> Table:
    """Store two snapshots of one table and its incrementals; everything is in both."""
    users = node.table("ks1", "users")
    for _ in range(sstables):
        users.flush()
    node.snapshot("monday")
    node.snapshot("tuesday")
    scene.once(*node.data_dirs)
    return users


def listing_of(scene: Scene, tag: str) -> oracle.Listing:
    """Return the one listing of a tag."""
    (found,) = (found for found in scene.listings("snapshot") if found.of.tag == tag)
    return found


def bad_of(page: dict[str, Any]) -> dict[str, str]:
    return {one["key"]: one["what"] for one in page["bad"]}


# ------------------------------------------------------------------------------------------------------------
# Objects


@pytest.mark.slow
def test_every_damage_is_named_with_the_snapshots_that_it_spoils(anywhere: Bench, node: Node) -> None:
    """Absent, truncated, emptied, flipped, swapped: and neither Statistics.db nor Summary.db is exempt."""
    users = two_days(anywhere, node)  # 2 * 8 components, manifest.json and schema.cql
    bucket, wanted = anywhere.bucket, dict[str, str]()
    clean = anywhere.verify()
    assert clean["bad"] == clean["needs_thaw"] == clean["stale_digests"] == []
    assert clean["objects"] == len({entry.key for listing in anywhere.listings() for entry in listing.entries})
    assert clean["bytes"] == sum(len(bucket.get(key)) for key in anywhere.file_keys())
    assert anywhere.verify("--tag", "monday", "--deep") == clean | {"objects": 18, "bytes": ANY}
    for name, body in (("1-big-Index.db", None), ("1-big-Filter.db", b"short"), ("2-big-Filter.db", b"")):
        key = anywhere.key(name)
        wanted[key] = "is not there" if body is None else f"has {len(body)} bytes"
        if body is None:
            bucket.delete(key)
        else:
            bucket.put(key, body)
    for name in ("2-big-Data.db", "2-big-Summary.db"):
        wanted[anywhere.key(name)] = "has CRC"
        anywhere.flip(anywhere.key(name))
    one, other = anywhere.key("1-big-Statistics.db"), anywhere.key("2-big-Statistics.db")
    first, second = bucket.get(one), bucket.get(other)
    bucket.put(one, second)
    bucket.put(other, first)
    wanted |= {one: "has CRC", other: "has CRC"}
    for args in MODES:
        page = anywhere.verify(*args, check=1)
        told = bad_of(page)
        assert told.keys() == wanted.keys(), args
        assert [key for key, what in wanted.items() if not told[key].startswith(what)] == [], told
    tags = {label.split("@")[0] for bad in anywhere.verify(check=1)["bad"] for label in bad["spoils"]}
    assert tags == {f"ks1.{users.directory} {what}" for what in ("incrementals", "monday", "tuesday")}
    text = anywhere.verify_text("--tag", "monday", check=1)
    assert f"BAD {one} has CRC" in text
    assert text.endswith(", by checksum: 7 bad\n")


def test_bytes_that_rot_where_they_lie_are_found_by_a_file_store_too(scene: Bench, node: Node) -> None:
    """Written into the file itself: its size and the checksum kept beside it are as they were."""
    two_days(scene, node)
    key = scene.key("1-big-Data.db")
    path = Path(scene.bucket.target.removeprefix("file://")) / key
    info, body = path.stat(), scene.bucket.get(key)
    path.write_bytes(body[::-1])
    for args in MODES:
        assert list(bad_of(scene.verify(*args, check=1))) == [key], args
    if "user.crc32" not in os.listxattr(path):
        pytest.skip("this disk keeps no checksum beside a file")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # a disk that rots tells nobody when
    assert scene.verify("--tag", "monday")["bad"] == []
    assert list(bad_of(scene.verify("--deep", check=1))) == [key]


@pytest.mark.slow
def test_only_what_was_selected_is_checked(scene: Bench, node: Node) -> None:
    users, logs = node.table("ks1", "users"), node.table("ks2", "logs")
    for table in (users, logs):
        table.flush()
        table.snapshot("monday")
    node.incremental = False
    scene.once(*node.data_dirs)
    users.flush()
    node.snapshot("tuesday")
    scene.once(*node.data_dirs)
    scene.bucket.delete(scene.key("users-" + users.id + "/snapshots/tuesday/nb-2-big-Index.db"))
    for args, code in (
        ((), 1),
        (("--tag", "monday"), 0),
        (("--tag", "tuesday"), 1),
        (("--tag", "tuesday", "--table", "ks2"), 0),
        (("--table", "ks1.users"), 1),
        (("--table", "ks2.*", "--deep"), 0),
        (("--latest",), 1),
    ):
        assert scene.verify(*args, check=code)["objects"] > 0, args


def test_one_node_is_never_taken_for_another(scene: Bench, node: Node) -> None:
    two_days(scene, node)
    for key, body in scene.bucket.objects().items():
        if key.startswith("node1"):
            scene.bucket.put(key.replace("node1", "node10", 1), body.replace(b'"node1', b'"node10'))
    scene.bucket.delete(scene.key("1-big-Data.db").replace("node1", "node10", 1))
    assert scene.verify()["bad"] == []
    assert len(scene.verify("--tag", "monday", node="node10", check=1)["bad"]) == 1
    done = scene.run("verify", "--bucket", scene.bucket.target, "--state-dir", scene.at / "nobody", check=2)
    assert "2 nodes are meant" in done.stderr


@pytest.mark.parametrize("args", [("--tag", "mondya"), ("--table", "ks1.no"), ("--latest", "--table", "no")])
def test_where_nothing_is_meant_nothing_is_said_to_be_good(scene: Bench, node: Node, args: tuple[str, ...]) -> None:
    two_days(scene, node)
    assert scene.verify_text(*args, check=1) == ""


# ------------------------------------------------------------------------------------------------------------
# Listings


def test_a_damaged_listing_is_bad_and_the_others_are_checked(scene: Bench, node: Node) -> None:
    two_days(scene, node)
    monday = listing_of(scene, "monday")
    body, swapped = scene.bucket.get(monday.key), scene.bucket.get(listing_of(scene, "tuesday").key)
    for damaged in (
        b"",
        body[:-1],
        b"[]",
        swapped,
        body.replace(b"node1/", b"nodeX/", 1),
        body.replace(b"nb-1", b"../1"),
    ):
        scene.bucket.put(monday.key, damaged)
        page = scene.verify(check=1)
        assert list(bad_of(page)) == [monday.key], damaged[:40]
        assert page["bad"][0]["spoils"] == [f"ks1.{node.tables[0].directory} monday@{monday.of.taking}"]
        assert page["objects"] > 0
    scene.verify("--tag", "tuesday")


def test_a_key_that_is_listed_with_different_contents_is_bad(scene: Bench, node: Node) -> None:
    two_days(scene, node)
    listing = listing_of(scene, "monday")
    page = json.loads(scene.bucket.get(listing.key))
    (entries,) = page["directories"].values()
    one, other = (entry for entry in entries if entry["name"].endswith("Statistics.db"))
    other["key"] = one["key"]
    scene.bucket.put(listing.key, json.dumps(page).encode())
    assert bad_of(scene.verify("--tag", "monday", check=1)) == {one["key"]: "is listed with different contents"}


def test_what_is_no_listing_is_named_in_the_log_and_the_rest_is_checked(scene: Bench, node: Node) -> None:
    two_days(scene, node)
    scene.bucket.put("node1.listings/ks1/readme.txt", b"hello")
    done = scene.run("verify", "--bucket", scene.bucket.target, "--state-dir", scene.at / "nobody", check=0)
    assert "node1.listings/ks1/readme.txt is none of our listings" in done.stderr
    assert done.stdout.endswith(": 0 bad\n")


@pytest.mark.slow
def test_archives_are_verified_as_well(scene: Bench, node: Node) -> None:
    two_days(scene, node)
    logs = node.data_dirs[0] / "archive"
    logs.mkdir()
    (logs / "CommitLog-7-1.log").write_bytes(b"committed")
    scene.once(*node.data_dirs, args=("--include", "/archive/"))
    assert scene.verify("--deep")["bad"] == []
    scene.flip(scene.key("CommitLog-7-1.log"))
    (bad,) = scene.verify("--deep", check=1)["bad"]
    assert bad["spoils"] == [f"archive {logs}"]


# ------------------------------------------------------------------------------------------------------------
# Odd, but not bad: exit 3


def test_a_digest_that_is_stale_is_named_once(scene: Bench, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush().write("Digest.crc32", b"123456789")
    users.flush()
    for tag in ("monday", "tuesday"):
        node.snapshot(tag)
    scene.once(*node.data_dirs, check=None)
    assert scene.verify("--tag", "monday")["stale_digests"] == []
    page = scene.verify("--deep", check=3)
    assert page["bad"] == []
    (text,) = page["stale_digests"]
    assert "/nb-1-big-Data.db" in text
    assert text.endswith("Digest.crc32 says 123456789")
    assert "\nodd: " in "\n" + scene.verify_text("--deep", "--tag", "monday", check=3)


@pytest.mark.slow
def test_a_daemon_that_stores_into_glacier_still_reads_what_it_must_and_sends_nothing_twice(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, moto: S3Bucket, node: Node
) -> None:
    scene, users = Bench(tmp_path, daemon, run_cassbackup, moto), node.table("ks1", "users")
    for tag in ("monday", "tuesday"):
        users.flush(size=200_000)
        node.snapshot(tag)
        scene.once(*node.data_dirs, args=("--storage-class", "GLACIER"))
        shutil.rmtree(scene.state)  # what is known must be read from the bucket
    page = scene.verify(check=3)
    assert page["bad"] == []
    assert sum("-Data.db" in key for key in moto.keys()) == 2  # noqa: SIM118
    command = ("list", "--json", "--node", "node1", "--bucket", moto.target, "--state-dir", tmp_path / "nobody")
    (told,) = json.loads(scene.run(*command, env=moto.environ, check=0).stdout)["nodes"]
    assert [(one["tag"], one["complete"], one["files"]) for one in told["snapshots"]] == [
        ("monday", True, 8 + 2),
        ("tuesday", True, 16 + 2),
    ]
    batches = [key for key in moto.keys() if "/backups/2" in key and "-rollup-" not in key]  # noqa: SIM118
    assert len(batches) == 2  # and a roll-up of both, if the second was listed before the snapshot beside it
    assert [one["listings"] for one in told["incrementals"]] in ([2], [3])
    assert sorted(os.path.basename(key) for key in page["needs_thaw"]) == ["nb-1-big-Data.db", "nb-2-big-Data.db"]


@pytest.mark.parametrize("kind", [pytest.param("GLACIER", marks=pytest.mark.slow), "DEEP_ARCHIVE"])
def test_what_is_archived_needs_to_be_thawed_before_anything_is_restored(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, moto: S3Bucket, node: Node, kind: str
) -> None:
    scene = Bench(tmp_path, daemon, run_cassbackup, moto)
    two_days(scene, node)
    key, place = scene.key("1-big-Digest.crc32"), {"Bucket": moto.bucket, "Key": scene.key("1-big-Digest.crc32")}
    moto.client.copy_object(**place, CopySource=place, StorageClass=kind, MetadataDirective="COPY")
    for args in MODES:
        page = scene.verify(*args, check=3)
        assert (page["needs_thaw"], page["bad"], page["stale_digests"]) == ([key], [], []), args
    assert f"needs thaw: {key}" in scene.verify_text(check=3)
    restore = (
        "restore",
        "--bucket",
        moto.target,
        "--node",
        "node1",
        "--state-dir",
        tmp_path / "nobody",
        "--tag",
        "monday",
    )
    done = run_cassbackup(*restore, "--into", tmp_path / "into", env=moto.environ)
    assert done.returncode in (1, 3)
    assert f"needs thaw: {key}" in done.stdout
    assert not (tmp_path / "into").exists()
    moto.client.restore_object(**place, RestoreRequest={"Days": 1})
    assert scene.verify()["needs_thaw"] == []
    run_cassbackup(*restore, "--into", tmp_path / "into", env=moto.environ, check=0)


# ------------------------------------------------------------------------------------------------------------
# And then


@pytest.mark.slow
def test_what_is_condemned_is_stored_again_under_another_key(anywhere: Bench, node: Node) -> None:
    users = two_days(anywhere, node)
    bad = [anywhere.key("1-big-Data.db"), anywhere.key("2-big-Summary.db")]
    anywhere.bucket.delete(bad[0])
    anywhere.flip(bad[1])
    assert anywhere.verify(check=1)["condemned"] == ""
    assert not [key for key in anywhere.bucket.tags() if key.startswith("node1.condemned/")]
    page = anywhere.verify("--tag", "monday", "--condemn", check=1)
    told = json.loads(anywhere.bucket.get(page["condemned"]))
    assert page["condemned"].startswith("node1.condemned/2")
    assert (told["version"], told["keys"]) == (1, sorted(bad))
    node.snapshot("wednesday")
    anywhere.once(*node.data_dirs)
    newest = listing_of(anywhere, "wednesday")
    assert newest.state == "complete"
    assert not {entry.key for entry in newest.entries} & set(bad)
    assert len(newest.entries) == 8 * len(users.sstables) + 2
    assert anywhere.verify("--latest")["bad"] == []
    assert anywhere.verify("--tag", "wednesday", "--deep", "--condemn")["condemned"] == ""
    assert sorted(bad_of(anywhere.verify(check=1))) == sorted(bad)  # each was stored by either of two snapshots


def test_deleting_uploaded_incrementals_makes_no_listing_and_no_restore_incomplete(scene: Bench, node: Node) -> None:
    """Snapshot, flushes, another run in between, and the whole node lost: all of it comes back."""
    users = node.table("ks1", "users", indexes=["by_name"])
    users.flush()
    node.snapshot("daily")
    for _ in range(2):
        users.flush()
        scene.once(*node.data_dirs, args=("--delete-uploaded-incrementals",))
        assert not list(node.root.rglob("backups/**/*-Data.db"))
    scene.assert_all_is_listed(node.history)
    assert {found.state for found in scene.listings()} <= {"complete", "rollup"}
    live = {
        os.path.relpath(path, folder): f"{zlib.crc32(path.read_bytes()):08x}"
        for folder in users.directories()
        for path in folder.rglob("nb-*")
        if not {"snapshots", "backups"} & set(path.parts)
    }
    shutil.rmtree(node.root)
    assert scene.verify("--deep")["bad"] == []
    into = scene.at / "into"
    options = ["--bucket", scene.bucket.target, "--node", "node1", "--state-dir", scene.at / "nobody"]
    scene.run("restore", "--latest", "--into", into, *options, check=0)
    back = {
        os.path.relpath(path, into / "ks1" / "users"): f"{zlib.crc32(path.read_bytes()):08x}"
        for path in (into / "ks1" / "users").rglob("nb-*")
    }
    assert len(live) == 3 * 2 * 8
    assert {name: back.get(name) for name in live} == live
