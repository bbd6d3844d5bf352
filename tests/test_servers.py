"""The whole program over servers that are not made for tests: `make test-servers`.

tests/test_stores.py runs its contract suite over them too. What needs a fault proxy, or runs everywhere, is there.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from botocore.exceptions import ClientError
from conftest import REAL, Authority, Daemon, Run
from faultproxy import FaultProxy, kill
from scene import IMPATIENT, Scene, note, wait_for
from servers import Bucket, S3Bucket, Versity
from tree import Node

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(600)]
# What S3, GCS and a POSIX file system all can hold; backslashes come back changed from some.
ODD = [
    "with blanks",
    "percent%25%",
    "pipe|star*quote'\"",
    "é-日本語",
    "plus+eq=&?#;",
    b"\xff\xfe-not-utf8".decode(errors="surrogateescape"),
]


@pytest.fixture(params=REAL)
def bucket(request: pytest.FixtureRequest) -> Bucket:
    found: Bucket = request.getfixturevalue(f"{request.param}_server").fresh()
    return found


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, bucket: Bucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, bucket)


def command(scene: Scene, *words: object, check: int | None = 0) -> str:
    """Run a command on the scene's bucket; return what it prints."""
    where = ("--bucket", scene.bucket.target, "--node", "node1")
    return scene.run(*words, *where, env=scene.environ, check=check, timeout=280).stdout


def large(node: Node, megabytes: int = 64) -> Path:
    """Flush an SSTable whose Data.db goes up in parts."""
    table = node.table("ks1", "large")
    sstable = table.flush()
    sstable.write("Data.db", random.Random(1).randbytes(megabytes << 20))
    return sstable.path("Data.db")


def test_a_backup_with_odd_names_and_large_files_comes_back_byte_by_byte(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users", indexes=["by_name"])
    for _ in range(3):
        users.flush()
    large(node)
    node.snapshot("daily")
    for name in ODD:
        path = Path(node.data_dirs[0]) / "ks1" / users.directory / "snapshots" / "daily" / name
        path.write_bytes(name.encode(errors="surrogateescape"))
        note(node.history, node, users, "daily", path)
    scene.once(*node.data_dirs)
    scene.assert_all_is_listed(node.history)
    assert "0 bad" in command(scene, "verify", "--latest", "--deep")
    into = scene.at / "restored"
    command(scene, "restore", "--tag", "daily", "--table", "*", "--into", into)
    for sstable in users.sstables:
        for component in sstable.components:
            back = into / "ks1" / "users" / sstable.path(component).relative_to(sstable.home)
            assert back.read_bytes() == sstable.path(component).read_bytes()


def test_a_kill_amid_an_upload_in_parts_costs_no_part_twice_and_no_file(
    scene: Scene, node: Node, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    large(node)
    node.snapshot("daily")
    lane = proxy(scene.bucket)
    scene.environ = scene.bucket.through(lane.url)
    is_part = r"partNumber=4" if scene.bucket.scheme == "s3" else r"upload_id="
    rule = lane.on("PUT", is_part, kill(lambda: scene.daemon.pid, at="before"))
    scene.start(*node.data_dirs)
    assert rule.acted.wait(120)
    scene.daemon.process.wait()
    scene.restart()
    scene.settled()
    scene.assert_all_is_listed(node.history)


def test_a_list_of_many_pages_and_a_prune_of_as_many_objects(scene: Scene, node: Node) -> None:
    node.incremental = False
    table = node.table("ks1", "users")
    for day in range(3):
        for _ in range(100):
            table.flush()
        node.snapshot(f"day{day}")
        table.compact()  # nothing of it is in the next snapshot
    scene.once(*node.data_dirs)
    scene.assert_all_is_listed(node.history)
    assert len(scene.file_keys()) > 2000
    told = json.loads(command(scene, "prune", "--keep-last", "1", "--confirm", "--force", "--json"))
    [page] = told["nodes"]
    assert page["objects"] > 1500
    assert page["refused"] == {}
    assert oracle.problems(scene.bucket.objects(), "node1") == []
    assert "0 bad" in command(scene, "verify")


def test_a_bucket_that_keeps_versions_is_backed_up_listed_and_pruned(scene: Scene, node: Node) -> None:
    if scene.bucket.scheme != "s3":
        pytest.skip("versions are asked for as S3 does")
    scene.bucket.client.put_bucket_versioning(  # type: ignore[attr-defined]
        Bucket=scene.bucket.bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    table = node.table("ks1", "users")
    for tag in ("one", "two", "three"):
        table.flush()
        node.snapshot(tag)
    scene.once(*node.data_dirs)
    scene.assert_all_is_listed(node.history)
    command(scene, "prune", "--tag", "one", "--confirm", "--force")
    assert "one@" not in command(scene, "list", "--tag", "t*", check=None)
    assert "0 bad" in command(scene, "verify")


def test_over_tls_with_a_ca_of_the_house(
    scene: Scene, node: Node, authority: Authority, secured: Callable[..., FaultProxy]
) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    lane = secured(scene.bucket)
    scene.environ = scene.bucket.through(lane.url)
    options = ("--bucket", scene.bucket.target, "--state-dir", scene.state, "--name", "node1", *IMPATIENT)
    done = scene.run("watch", *node.data_dirs, "--once", *options, env=scene.environ, timeout=280)
    assert done.returncode == 1
    assert "--ca-file" in done.stderr
    scene.once(*node.data_dirs, args=("--ca-file", authority.file))
    scene.assert_all_is_listed(node.history)


@pytest.fixture(params=["COMPLIANCE", "GOVERNANCE"])
def locked(request: pytest.FixtureRequest, versity_server: Versity) -> S3Bucket:
    """Return a bucket that locks each version for a day: on this server from the rule on, not from the PUT."""
    bucket = versity_server.fresh()
    lock = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": request.param, "Days": 1}}}
    bucket.client.put_bucket_versioning(Bucket=bucket.bucket, VersioningConfiguration={"Status": "Enabled"})
    bucket.client.put_object_lock_configuration(Bucket=bucket.bucket, ObjectLockConfiguration=lock)
    return bucket


@pytest.fixture
def vault(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, locked: S3Bucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, locked)


def versions(bucket: S3Bucket, kind: str = "Versions") -> list[dict[str, Any]]:
    """Return all versions of all objects, or their delete markers."""
    pages = bucket.client.get_paginator("list_object_versions").paginate(Bucket=bucket.bucket)
    return [found for page in pages for found in page.get(kind, ())]


def assert_all_is_kept(scene: Scene, node: Node, tag: str) -> None:
    """Fail unless every object is good, and the snapshot comes back byte by byte."""
    assert " 0 bad" in command(scene, "verify", "--deep")
    command(scene, "restore", "--tag", tag, "--table", "*", "--into", scene.at / tag)
    files = list(Path(node.data_dirs[0]).glob(f"ks1/*/snapshots/{tag}/nb-*"))
    assert len(files) >= 16  # of two SSTables
    for path in files:
        table = path.parts[-4].partition("-")[0]
        assert (scene.at / tag / "ks1" / table / path.name).read_bytes() == path.read_bytes()


def test_under_a_default_lock_each_key_has_one_version_and_each_body_its_checksum(
    vault: Scene, locked: S3Bucket, node: Node, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    """AWS refuses a body without a checksum there; this server takes it, so the trace is asked."""
    users, lane = node.table("ks1", "users"), proxy(locked)
    large(node, 9)
    vault.environ = locked.through(lane.url)
    for _ in range(2):  # the second manifest.json has the name of the first
        users.flush()
        node.clear("daily")
        node.snapshot("daily")
        vault.once(*node.data_dirs)
    vault.assert_all_is_listed(node.history)
    bodies = [event for event in lane.trace if event.carries_content]
    assert {"1", "2"} <= {event.query.get("partNumber") for event in bodies}
    assert all(event.headers.keys() & {"content-md5", "x-amz-sdk-checksum-algorithm"} for event in bodies)
    assert 412 in {event.stored for event in bodies}, "an overwrite is refused"
    assert sorted(one["Key"] for one in versions(locked)) == locked.keys()
    assert any("manifest.json@" in key for key in locked.keys())  # noqa: SIM118 - a method of ours


def test_what_prune_deletes_under_a_default_lock_is_gone_until_the_delete_markers_are(
    vault: Scene, locked: S3Bucket, node: Node, versity_server: Versity
) -> None:
    node.incremental = False
    users = node.table("ks1", "users")
    large(node, 9)  # both snapshots name it
    for tag in ("one", "two"):
        users.flush()
        node.snapshot(tag)
        users.compact()
    vault.once(*node.data_dirs)
    prune = ("prune", "--keep-last", "1", "--confirm", "--json")
    wait_for(lambda: "goes" in command(vault, *prune[:3]))  # the store's clock may only tell whole seconds
    assert json.loads(command(vault, *prune))["nodes"][0]["refused"] == {}
    for mark in (versity_server.root / "data" / locked.bucket / "node1.pending-delete").iterdir():
        os.utime(mark, (0, 0))  # a day later
    assert json.loads(command(vault, *prune))["nodes"][0]["deleted"] >= 8
    assert "one@" not in command(vault, "list")
    assert_all_is_kept(vault, node, "two")
    markers = versions(locked, "DeleteMarkers")
    behind = [one for one in versions(locked) if not one["IsLatest"]]
    assert {one["Key"] for one in behind} == {one["Key"] for one in markers}
    for one in behind:
        with pytest.raises(ClientError, match="protected by object lock"):
            locked.client.delete_object(Bucket=locked.bucket, Key=one["Key"], VersionId=one["VersionId"])
    for one in markers:
        locked.client.delete_object(Bucket=locked.bucket, Key=one["Key"], VersionId=one["VersionId"])
    assert "one@" in command(vault, "list")
    assert_all_is_kept(vault, node, "one")
