"""The whole program over servers that are not made for tests: `make test-servers`.

tests/test_stores.py runs its contract suite over them too. What needs a fault proxy, or runs everywhere, is there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from conftest import REAL, Authority, Daemon, Run
from faultproxy import FaultProxy, kill
from scene import IMPATIENT, Scene, note
from servers import Bucket
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
