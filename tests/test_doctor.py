"""What doctor finds before it goes wrong, and the cure that it names: on real trees, mounts, limits and servers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Daemon, Run
from faultproxy import XML, FaultProxy, Respond, s3_error
from scene import Scene, area_of, assert_no_pin_is_left, nobody, wait_for
from servers import Bucket, FakeMetadata, FileBucket
from tree import Node

Proxied = Callable[[Bucket], FaultProxy]
SHM = Path("/dev/shm")


class Finding(NamedTuple):
    """A line of what doctor says."""

    name: str
    result: str
    detail: str
    cure: str


class Findings(list[Finding]):
    """What one run found."""

    code = 0

    def of(self, name: str) -> list[Finding]:
        return [one for one in self if one.name == name]

    def one(self, name: str) -> Finding:
        (found,) = self.of(name)
        return found

    def results(self, *names: str) -> list[str]:
        return [self.one(name).result for name in names]

    def bad(self) -> list[str]:
        return [one.name for one in self if one.result == "bad"]


class Doctor:
    """The command, with what every run of it needs here."""

    def __init__(self, run: Run, node: Node, bucket: Bucket, state: Path) -> None:
        self.run, self.node, self.bucket, self.state = run, node, bucket, state
        self.environ: Mapping[str, str] = bucket.environ

    def __call__(
        self,
        *args: object,
        env: Mapping[str, str] | None = None,
        paths: Sequence[object] | None = None,
        within: Sequence[str] = (),
        name: str = "node1",
    ) -> Findings:
        given = self.node.data_dirs if paths is None else paths
        options = ["--state-dir", self.state, "--bucket", self.bucket.target, *(["--name", name] if name else [])]
        words = ["doctor", *given, "--json", *options, *args]
        done = self.run(*words, env={**self.environ, **(env or {})}, within=within)
        assert "Traceback" not in done.stderr, done.stderr
        page = json.loads(done.stdout)
        assert page["schema"] == 1
        found = Findings(Finding(**one) for one in page["checks"])
        found.code = done.returncode
        assert found.code == (3 if found.bad() else 0)
        assert [one for one in found if not one.cure and one.result in {"bad", "warning"}] == []
        return found


@pytest.fixture
def doctor(run_cassbackup: Run, node: Node, tmp_bucket: FileBucket, tmp_path: Path) -> Doctor:
    """Return doctor on a node with a flushed table and a snapshot, and a bucket that is a directory."""
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    return Doctor(run_cassbackup, node, tmp_bucket, tmp_path / "state")


@pytest.fixture
def in_s3(doctor: Doctor, moto: Bucket) -> Doctor:
    doctor.bucket, doctor.environ = moto, moto.environ
    return doctor


@pytest.fixture
def faulty(in_s3: Doctor, proxy: Proxied) -> FaultProxy:
    """Return a proxy that doctor's requests go through."""
    between = proxy(in_s3.bucket)
    in_s3.environ = in_s3.bucket.through(between.url)
    return between


@pytest.fixture
def scene(doctor: Doctor, tmp_path: Path, daemon: Callable[..., Daemon]) -> Scene:
    return Scene(tmp_path, daemon, doctor.run, doctor.bucket)


def namespace(script: str) -> list[str]:
    """Return words that run a command after a script, in a mount namespace of its own; skip where that cannot be."""
    if subprocess.run(["unshare", "-rum", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    return ["unshare", "-rum", "sh", "-c", f'{script} || exit 99; exec "$@"', "-"]


def everything(*roots: Path) -> dict[str, tuple[int, ...]]:
    """Return what stat tells of every file and directory, but for what reading and linking change."""
    paths = [path for root in roots for path in [root, *root.rglob("*")]]
    stats = [(path, path.lstat()) for path in paths]
    return {
        str(path): (s.st_ino, s.st_mode, s.st_nlink, s.st_size, s.st_mtime_ns * path.is_file()) for path, s in stats
    }


# ------------------------------------------------------------------------------------------------------------
# As a whole


def test_a_sound_node_is_sound_and_nothing_is_left_behind(doctor: Doctor, tmp_bucket: FileBucket) -> None:
    before = everything(doctor.node.root)
    found = doctor()
    assert (found.code, found.bad()) == (0, [])
    assert everything(doctor.node.root) == before
    assert not doctor.state.exists()
    assert tmp_bucket.keys() == []
    assert "(not made yet)" in found.one("link").detail
    assert str(doctor.node.root / ".cassbackup" / "data") in found.one("link").detail


def test_for_people_each_finding_is_a_line_and_its_cure_stands_below(doctor: Doctor) -> None:
    done = doctor.run("doctor", *doctor.node.data_dirs, "--state-dir", doctor.state, check=3)
    lines = done.stdout.splitlines()
    assert "bucket" in lines[0]
    assert "no bucket" in lines[0]
    assert lines[1] == "    set BUCKET_NAME in /etc/default/cassbackup, or pass --bucket"
    heads = [line for line in lines[:-1] if not line.startswith("    ")]
    assert len({re.search(" (ok|warning|bad|skipped) ", line).start() for line in heads}) == 1  # type: ignore[union-attr]
    assert " bad" in lines[-1]


@pytest.mark.parametrize("args", [["--no-such-option"], ["--threads", "0"], ["--config", "/no/such/file"]])
def test_arguments_that_cannot_be_read_are_exit_2(doctor: Doctor, args: list[str]) -> None:
    doctor.run("doctor", *args, check=2)


def test_before_anything_is_configured_it_says_what_to_set(doctor: Doctor, tmp_path: Path) -> None:
    found = json.loads(doctor.run("doctor", "--json", "--state-dir", tmp_path / "none", check=3).stdout)["checks"]
    bad = {one["name"]: one["cure"] for one in found if one["result"] == "bad"}
    assert "BUCKET_NAME" in bad["bucket"]
    assert not Path("/var/lib/cassandra/data/system").is_dir() or "data" in bad


@pytest.mark.slow
def test_as_root_nothing_is_put_before_the_owner_of_the_data_is_known(
    doctor: Doctor, tmp_path: Path, tmp_bucket: FileBucket
) -> None:
    """A directory that root has made in a bucket of files would shut the daemon out."""
    if os.geteuid():
        pytest.skip("needs root")
    before = sorted(Path(tmp_bucket.bucket).iterdir())
    found = doctor(paths=[tmp_path / "nothing"])
    assert (found.results("data", "rights"), found.of("put")) == (["bad", "skipped"], [])
    assert sorted(Path(tmp_bucket.bucket).iterdir()) == before


def test_a_relative_state_directory_is_taken_from_here(doctor: Doctor) -> None:
    assert doctor("--state-dir", "not-made-yet").one("state").result == "ok"


def test_it_stands_beside_a_running_daemon_and_does_not_disturb_it(doctor: Doctor, scene: Scene) -> None:
    """P5: do no harm."""
    scene.start(*doctor.node.data_dirs)
    scene.settled()
    assert_no_pin_is_left(area_of(doctor.node))  # what is released is unlinked a moment later
    wait_for(lambda: any("/heartbeat/" in key for key in doctor.bucket.keys()))  # noqa: SIM118 - a method of ours
    kept = [doctor.node.root / "data", doctor.state / "ledger.sqlite"]
    before = everything(*kept)
    found = doctor()
    assert found.bad() == []
    assert everything(*kept) == before
    assert "not made yet" not in found.one("link").detail
    assert found.results("owner", "heartbeat") == ["ok", "ok"]
    assert "belongs to this machine" in found.one("owner").detail
    assert scene.daemon.is_running
    doctor.node.tables[0].flush()
    scene.settled()
    scene.assert_all_is_listed(doctor.node.history)


def test_doctor_shows_no_secret(in_s3: Doctor) -> None:
    canary = "CANARYCANARYCANARY"
    words = ["doctor", *in_s3.node.data_dirs, "--bucket", in_s3.bucket.target, "-k", canary, "-s", canary]
    done = in_s3.run(*words, "--state-dir", in_s3.state, env=in_s3.environ, check=0)
    assert canary not in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------
# This machine


def as_nobody(doctor: Doctor, tmp_path: Path) -> list[str]:
    """Return words that run a command as nobody, to whom the tree is open."""
    words = nobody()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o755 != 0o755 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    return words


def test_another_user_than_the_owner_is_told_to_become_it(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor(within=as_nobody(doctor, tmp_path))
    assert "sudo -u root" in found.one("user").cure
    assert found.one("user").result in {"bad", "warning"}  # as fs.protected_hardlinks says
    assert found.one("link").result == "bad"
    assert "owner of the data" in found.one("link").cure
    assert found.one("state").result == "bad"
    assert "--state-dir" in found.one("state").cure
    (tmp_path / "empty").mkdir()
    assert doctor(paths=[tmp_path / "empty"], within=nobody()).one("link").result == "bad"


def test_root_looks_as_the_owner_that_the_daemon_becomes(doctor: Doctor, tmp_path: Path) -> None:
    if subprocess.run([*as_nobody(doctor, tmp_path), "test", "-r", os.__file__], check=False).returncode:
        pytest.skip("nobody else may read this Python")
    for path in [doctor.node.root, *doctor.node.root.rglob("*"), doctor.bucket.root]:  # type: ignore[attr-defined]
        os.chown(path, 65534, 65534)
    found = doctor()
    assert found.one("user").detail.startswith("nobody;")
    assert found.results("user", "link", "state", "put") == ["ok"] * 4


def test_pins_on_another_file_system_are_named_before_a_link_fails(doctor: Doctor, tmp_path: Path) -> None:
    if SHM.stat().st_dev == tmp_path.stat().st_dev or not os.access(SHM, os.W_OK):
        pytest.skip("needs two file systems")
    before = {*SHM.iterdir()}
    found = doctor("--pin-dir", SHM / "cassbackup-doctor")
    assert found.one("link").result == "bad"
    assert "cross-device" in found.one("link").detail
    assert "--pin-dir" in found.one("link").cure
    names = [path.name for path in SHM.iterdir() if path not in before]  # others have theirs there, too
    assert [name for name in names if name.startswith((".probe", "cassbackup-doctor"))] == []


SYSTEMCTL = """#!/bin/sh
echo LoadState=loaded
echo ProtectSystem=strict
echo "ReadWritePaths=-/var/lib/cassandra $ALLOWED"
"""


@pytest.fixture
def with_unit(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function that gives an environment in which systemd has the service, with these ReadWritePaths."""
    tool = tmp_path / "bin" / "systemctl"
    tool.parent.mkdir()
    tool.write_text(SYSTEMCTL)
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    return lambda *allowed: {"PATH": path, "ALLOWED": " ".join(map(str, allowed))}


def test_disks_that_the_service_may_not_write_to_are_named_with_the_drop_in(
    doctor: Doctor, tmp_path: Path, with_unit: Callable[..., dict[str, str]]
) -> None:
    disks, neighbour = [tmp_path / "disk1", tmp_path / "disk2"], tmp_path / "disk"
    for disk in disks:
        (disk / "data").mkdir(parents=True)
    paths = [disk / "data" for disk in disks]
    unit = doctor(paths=paths, env=with_unit(neighbour)).one("unit")
    assert unit.result == "bad"
    assert "systemctl edit cassbackup" in unit.cure
    wanted = ["[Service]", *(f"ReadWritePaths={path}" for path in sorted([tmp_path / "bucket", *disks]))]
    assert unit.cure.splitlines()[1:] == wanted
    assert doctor(paths=paths, env=with_unit(*disks, tmp_path / "bucket")).one("unit").result == "ok"


def test_data_alone_among_the_writable_paths_is_not_enough(
    doctor: Doctor, tmp_path: Path, with_unit: Callable[..., dict[str, str]]
) -> None:
    unit = doctor(env=with_unit(*doctor.node.data_dirs, tmp_path / "bucket")).one("unit")
    assert f"ReadWritePaths={doctor.node.root}" in unit.cure.splitlines()


def test_inotify_limits_below_what_is_needed_are_named_with_the_sysctl(doctor: Doctor, tmp_path: Path) -> None:
    low = tmp_path / "low"
    low.write_text("4\n")
    (doctor.node.tables[0].directories()[0] / ".by_name").mkdir()  # of a live table nothing is watched
    mounts = [f"mount --bind {low} /proc/sys/fs/inotify/{name}" for name in ("max_user_watches", "max_queued_events")]
    found = doctor(within=namespace(" && ".join(mounts)))
    assert found.results("watches", "events") == ["bad", "warning"]
    assert "fs.inotify.max_user_watches=1048576" in found.one("watches").cure
    assert "fs.inotify.max_queued_events=16384" in found.one("events").cure
    watched = int(found.one("watches").detail.split()[0])
    assert watched == 6  # data, keyspace, table, backups, snapshots, tag


def test_a_user_who_has_no_inotify_instance_left_is_told_which_limit_it_is(doctor: Doctor) -> None:
    found = doctor(within=namespace("echo 0 > /proc/sys/user/max_inotify_instances"))
    assert found.one("instances").result == "bad"
    assert "max_user_instances" in found.one("instances").cure


def test_few_descriptors_are_named(doctor: Doctor) -> None:
    found = doctor(within=["sh", "-c", 'ulimit -n 200; exec "$@"', "-"]).one("descriptors")
    assert (found.result, found.detail) == ("warning", "200 open files")
    assert "LimitNOFILE" in found.cure


def test_a_disk_below_the_floor_is_bad_and_one_near_it_a_warning(doctor: Doctor) -> None:
    below = doctor("--free-floor", "99.99%").one("disk")
    assert (below.result, "--free-floor" in below.cure) == ("bad", True)
    assert doctor("--max-pinned", "99.9%", "--free-floor", "0.01%").one("disk").result == "warning"


# ------------------------------------------------------------------------------------------------------------
# Cassandra


ETC = """
mkdir -p {at} && for one in passwd group hosts nsswitch.conf machine-id; do
[ ! -e /etc/$one ] || cp -a /etc/$one {at}/; done && mkdir {at}/cassandra && cp {yaml} {at}/cassandra/ &&
mount --bind {at} /etc
"""


def configured(tmp_path: Path, text: str) -> list[str]:
    """Return words that run a command where this is cassandra.yaml."""
    yaml = tmp_path / "cassandra.yaml"
    yaml.write_text(text)
    return namespace(ETC.format(at=tmp_path / "etc", yaml=yaml).strip())


def tool(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "nodetool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("yaml", "said", "result"),
    [
        ("incremental_backups: true\n", "running", "ok"),
        ("incremental_backups: true\n", "not running", "warning"),
        ("incremental_backups: false\n", "running", "warning"),  # until the next restart
        ("# incremental_backups: true\n", "not running", "warning"),
    ],
)
def test_incremental_backups_must_be_on_in_the_file_and_now(
    doctor: Doctor, tmp_path: Path, yaml: str, said: str, result: str
) -> None:
    nodetool = tool(tmp_path, f'[ "$1" = statusbackup ] && echo {said}')
    found = doctor("--nodetool", nodetool, within=configured(tmp_path, yaml))
    assert found.one("incrementals").result == result
    assert result == "ok" or "enablebackup" in found.one("incrementals").cure
    assert found.of("nodetool") == []


def test_without_auto_snapshot_a_dropped_table_is_gone(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor(within=configured(tmp_path, "auto_snapshot: false\nincremental_backups: true\n"))
    assert found.one("auto_snapshot").result == "warning"
    assert "auto_snapshot: true" in found.one("auto_snapshot").cure
    assert (found.one("nodetool").result, found.one("incrementals").result) == ("skipped", "ok")


@pytest.mark.slow
def test_a_nodetool_that_does_not_answer_is_not_waited_for(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor("--nodetool", tool(tmp_path, "exec sleep 100")).one("nodetool")
    assert (found.result, "did not answer" in found.detail) == ("skipped", True)


def test_backups_that_fill_the_disk_are_named_with_the_option_that_empties_them(doctor: Doctor, tmp_path: Path) -> None:
    for _ in range(3):
        doctor.node.table("ks1", "events").flush(size=200_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=8m tmpfs {disk} && cp -a {doctor.node.data_dirs[0]} {disk}/data"
    found = doctor(paths=[disk / "data"], within=namespace(mounted))
    assert found.one("backups/").result == "warning"
    assert "--delete-uploaded-incrementals" in found.one("backups/").cure


def test_a_linked_keyspace_of_which_nothing_would_be_stored_is_bad_unless_it_is_left_out(
    doctor: Doctor, tmp_path: Path
) -> None:
    assert "symlink" not in [found.name for found in doctor()]
    place = doctor.node.data_dirs[0] / "ks1"
    place.rename(tmp_path / "ks1")
    place.symlink_to(tmp_path / "ks1")
    found = doctor().one("symlink")
    assert (found.result, f"nothing behind {place} is stored" in found.detail) == ("bad", True)
    assert "symlink" not in [found.name for found in doctor("--exclude-keyspace", "ks1")]


def test_snapshots_that_nobody_cleared_are_named(doctor: Doctor) -> None:
    assert doctor().one("snapshots").result == "ok"
    tag = doctor.node.tables[0].directories()[0] / "snapshots" / "daily"
    old = time.time() - 8 * 86400
    os.utime(tag, (old, old))
    found = doctor().one("snapshots")
    assert (found.result, found.cure) == ("warning", "when it is listed: nodetool clearsnapshot -t daily")


def test_a_first_run_is_counted_each_file_once_and_only_what_is_to_be_stored(doctor: Doctor) -> None:
    node = doctor.node
    node.snapshot("weekly")  # more names of the same files
    stored = [path for path in node.root.rglob("*") if path.is_file() and {"snapshots", "backups"} & {*path.parts}]
    once = {path.stat().st_ino: path.stat().st_size for path in stored}
    found = doctor().one("first run")
    assert found.detail.startswith(f"{len(once)} files, ")
    assert f"{len(once) + 2 * 3} requests" in found.detail  # a listing is looked for and written: 2 tags and backups/
    assert doctor("--exclude-keyspace", "ks1").one("first run").detail.startswith("0 files, 0 B, 0 requests")
    node.table("ks1", "events").flush(size=700_000)
    slow = doctor("--max-bandwidth", "1").one("first run")
    assert (slow.result, "--max-bandwidth" in slow.cure) == ("warning", True)


# ------------------------------------------------------------------------------------------------------------
# The cloud


def test_the_cloud_and_the_nodes_name_are_told(
    doctor: Doctor, metadata: Callable[..., FakeMetadata], moto: Bucket
) -> None:
    fake = metadata("aws", instance_id="i-0abc")
    doctor.bucket = moto
    found = doctor(env={**moto.environ, **fake.environ}, name="")
    assert "s3 i-0abc eu-west-1" in found.one("cloud").detail
    assert found.one("cloud").detail.endswith("-i-0abc")
    assert found.one("credentials").detail == "from env"


def test_credentials_of_the_instances_role_are_told(
    doctor: Doctor, metadata: Callable[..., FakeMetadata], moto: Bucket
) -> None:
    reach = {name: value for name, value in moto.environ.items() if "KEY" not in name}
    doctor.bucket, doctor.environ = moto, reach
    found = doctor(env=metadata("aws").environ)
    assert (found.one("credentials").detail, found.bad()) == ("from iam-role", [])


def test_without_credentials_the_cure_is_named_once(in_s3: Doctor) -> None:
    in_s3.environ = {name: value for name, value in in_s3.environ.items() if "KEY" not in name}
    found = in_s3()
    assert found.bad() == ["credentials", "reach"]
    assert "AWS_ACCESS_KEY_ID" in found.one("credentials").cure
    assert found.one("bucket").result == "skipped"


@pytest.mark.parametrize(
    ("scopes", "result"),
    [
        (["devstorage.read_only", "logging.write"], "bad"),
        (["devstorage.read_write", "logging.write"], "ok"),
        (["cloud-platform"], "ok"),
        ([], "bad"),
    ],
)
def test_a_vm_whose_scopes_forbid_storage_is_told_what_to_do_and_that_it_must_be_stopped(
    doctor: Doctor, metadata: Callable[..., FakeMetadata], gcs: Bucket, scopes: list[str], result: str
) -> None:
    fake = metadata("gce", instance_id="42")
    fake.scopes = [f"https://www.googleapis.com/auth/{scope}" for scope in scopes]
    doctor.bucket = gcs
    found = doctor(env={**gcs.environ, **fake.environ}).one("scopes")
    assert found.result == result
    assert result == "ok" or ("--scopes=storage-rw" in found.cure and "stop the VM" in found.cure)


# ------------------------------------------------------------------------------------------------------------
# The bucket


def test_every_right_is_used_and_the_probe_is_gone_where_it_can_be(doctor: Doctor, bucket: Bucket) -> None:
    doctor.bucket, doctor.environ = bucket, bucket.environ
    found = doctor(*(["--prefix", "cluster1"] if bucket.scheme != "file" else []))
    rights = ("list", "put", "head", "get", "multipart", "unfinished", "delete")
    assert (found.results(*rights), found.bad()) == (["ok"] * len(rights), [])
    assert bucket.keys() == []


FORBIDDEN = {
    "list": ("GET", "list-type"),
    "put": ("PUT", r"node1\.doctor"),
    "head": ("HEAD", r"node1\.doctor"),
    "get": ("GET", r"node1\.doctor"),
    "multipart": ("POST", r"node1\.doctor\?uploads"),
}


@pytest.mark.slow
@pytest.mark.parametrize("right", FORBIDDEN)
def test_a_right_that_is_missing_is_the_one_that_is_named(in_s3: Doctor, faulty: FaultProxy, right: str) -> None:
    faulty.on(*FORBIDDEN[right], s3_error(403, "AccessDenied"), count=None)
    found = in_s3()
    assert set(found.bad()) - {"history"} == {right}  # what reads the listings needs some of them too
    assert "IAM policy" in found.one(right).cure


def test_without_the_right_to_find_unfinished_uploads_it_is_a_warning(in_s3: Doctor, faulty: FaultProxy) -> None:
    faulty.on("GET", r"\?(.*&)?uploads", s3_error(403, "AccessDenied"), count=None)
    found = in_s3()
    assert (found.one("unfinished").result, found.bad()) == ("warning", [])


def test_no_right_to_delete_is_good_and_the_probe_does_not_pile_up(in_s3: Doctor, faulty: FaultProxy) -> None:
    faulty.on("POST", r"\?delete", s3_error(403, "AccessDenied"), count=None)
    for _ in range(2):
        found = in_s3()
        assert (found.results("put", "delete"), found.bad()) == (["ok", "ok"], [])
        assert "good for a daemon" in found.one("delete").detail
        assert in_s3.bucket.keys() == ["node1.doctor"]
    assert [event.stored for event in faulty.trace if event.method == "PUT"] == [200, 412]


def test_gcs_says_in_its_own_words_that_the_probe_is_there(doctor: Doctor, gcs: Bucket, proxy: Proxied) -> None:
    """Without the right to delete, an upload to a key that is taken is refused so."""
    between = proxy(gcs)
    message = "sa does not have storage.objects.delete access to the Google Cloud Storage object."
    body = json.dumps({"error": {"code": 403, "message": message}}).encode()
    gcs.put("node1.doctor", b"cassbackup doctor\n")
    refused = between.on("POST", "uploadType=multipart", Respond(403, body, {"Content-Type": "application/json"}))
    doctor.bucket, doctor.environ = gcs, gcs.through(between.url)
    assert doctor().one("put").result == "ok"
    assert refused.acted.is_set()


@pytest.mark.parametrize("kind", ["moto", "gcs"])
def test_a_bucket_that_does_not_exist_is_said_once(doctor: Doctor, kind: str, request: pytest.FixtureRequest) -> None:
    bucket: Bucket = request.getfixturevalue(kind)
    doctor.environ = bucket.environ
    bucket.bucket = "no-such-bucket-here"
    doctor.bucket = bucket
    found = doctor()
    assert found.bad() == ["reach"]
    assert "BUCKET_NAME" in found.one("reach").cure


@pytest.mark.slow
def test_a_server_that_does_not_answer_ends_the_questions_to_the_bucket(in_s3: Doctor) -> None:
    found = in_s3("--endpoint-url", "http://127.0.0.1:9", env={"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"})
    assert found.bad() == ["reach"]
    assert found.one("bucket").result == "skipped"
    assert "--endpoint-url" in found.one("reach").cure


@pytest.mark.parametrize(("ahead", "result"), [(0, "ok"), (120, "warning"), (900, "bad")])
def test_a_clock_that_is_off_is_told(in_s3: Doctor, faulty: FaultProxy, ahead: int, result: str) -> None:
    empty = f"<ListBucketResult><Name>{in_s3.bucket.bucket}</Name><IsTruncated>false</IsTruncated></ListBucketResult>"
    headers = {"Content-Type": "application/xml", "Date": formatdate(time.time() - ahead, usegmt=True)}
    faulty.on("GET", "list-type", Respond(200, XML + empty.encode(), headers), count=None)
    found = in_s3().one("clock")
    assert found.result == result
    assert result == "ok" or "timesyncd" in found.cure


RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("bad", {"Filter": {"Prefix": ""}, "Expiration": {"Days": 30}}),
    "cluster": ("bad", {"Filter": {"Prefix": "cluster1/"}, "Expiration": {"Date": "2030-01-01T00:00:00Z"}}),
    "files": ("bad", {"Filter": {"Prefix": "cluster1/node1/var/"}, "Expiration": {"Days": 30}}),
    "listings": ("bad", {"Filter": {"Prefix": "cluster1/node1.list"}, "Expiration": {"Days": 30}}),
    "old spelling": ("bad", {"Prefix": "clu", "Expiration": {"Days": 30}}),
    "ice": ("warning", {"Filter": {"Prefix": ""}, "Transitions": [{"Days": 30, "StorageClass": "DEEP_ARCHIVE"}]}),
    "cool": ("ok", {"Filter": {"Prefix": ""}, "Transitions": [{"Days": 30, "StorageClass": "STANDARD_IA"}]}),
    "markers": ("ok", {"Filter": {"Prefix": ""}, "Expiration": {"ExpiredObjectDeleteMarker": True}}),
    "neighbour": ("", {"Filter": {"Prefix": "cluster1/node10/"}, "Expiration": {"Days": 30}}),
    "logs": ("", {"Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}),
    "tagged": ("", {"Filter": {"Tag": {"Key": "a", "Value": "b"}}, "Expiration": {"Days": 30}}),
    "off": ("", {"Filter": {"Prefix": ""}, "Expiration": {"Days": 30}, "Status": "Disabled"}),
}


def test_a_lifecycle_rule_that_deletes_or_archives_what_is_listed_is_named(in_s3: Doctor) -> None:
    client: Any = in_s3.bucket.client  # type: ignore[attr-defined]
    rules = {"Rules": [{"ID": name, "Status": "Enabled", **rule} for name, (_, rule) in RULES.items()]}
    client.put_bucket_lifecycle_configuration(Bucket=in_s3.bucket.bucket, LifecycleConfiguration=rules)
    found = in_s3("--prefix", "cluster1").of("lifecycle")
    assert {one.detail.split(": ")[0]: one.result for one in found} == {
        f"rule {name}": result for name, (result, _) in RULES.items() if result
    }
    assert all("must be thawed" in one.cure for one in found if one.result != "ok")


GCS_RULES: list[tuple[str, dict[str, Any]]] = [
    ("bad", {"action": {"type": "Delete"}, "condition": {"age": 30}}),
    ("bad", {"action": {"type": "Delete"}, "condition": {"age": 30, "matchesPrefix": ["logs/", "node1"]}}),
    ("", {"action": {"type": "Delete"}, "condition": {"age": 30, "matchesPrefix": ["logs/"]}}),
    ("ok", {"action": {"type": "Delete"}, "condition": {"numNewerVersions": 1}}),
    ("ok", {"action": {"type": "Delete"}, "condition": {"age": 1, "isLive": False}}),
    ("ok", {"action": {"type": "SetStorageClass", "storageClass": "ARCHIVE"}, "condition": {"age": 30}}),
]


def test_a_lifecycle_rule_of_gcs_that_deletes_what_is_listed_is_named(doctor: Doctor, gcs: Bucket) -> None:
    held: Any = gcs.client  # type: ignore[attr-defined]
    held.lifecycle_rules = [rule for _, rule in GCS_RULES]
    held.patch()
    doctor.bucket, doctor.environ = gcs, gcs.environ
    found = {one.detail.split(" (")[0]: one.result for one in doctor().of("lifecycle")}
    assert found == {f"rule {n}": result for n, (result, _) in enumerate(GCS_RULES, 1) if result}


def test_what_is_paid_for_and_of_no_use_is_a_warning_until_a_rule_takes_it(in_s3: Doctor) -> None:
    client: Any = in_s3.bucket.client  # type: ignore[attr-defined]
    name = in_s3.bucket.bucket
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    found = in_s3()
    assert found.results("uploads", "versioning") == ["warning", "warning"]
    assert "AbortIncompleteMultipartUpload" in found.one("uploads").cure
    assert "NoncurrentVersionExpiration" in found.one("versioning").cure
    rule = {"ID": "tidy up", "Status": "Enabled", "Filter": {"Prefix": ""}}
    rule |= {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}  # type: ignore[dict-item]
    rule |= {"NoncurrentVersionExpiration": {"NoncurrentDays": 7}}  # type: ignore[dict-item]
    client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [rule]})
    found = in_s3()
    assert found.results("uploads", "versioning", "lifecycle") == ["ok", "ok", "ok"]


def test_an_object_lock_is_told(in_s3: Doctor) -> None:
    client: Any = in_s3.bucket.client  # type: ignore[attr-defined]
    name = f"{in_s3.bucket.bucket}-locked"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    keep = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 30}}}
    client.put_object_lock_configuration(Bucket=name, ObjectLockConfiguration=keep)
    in_s3.bucket.bucket = name
    assert "object lock Days=30 Mode=COMPLIANCE" in in_s3().one("versioning").detail


@pytest.mark.parametrize("answer", [(403, "AccessDenied"), (501, "NotImplemented")])
def test_where_rules_cannot_be_read_it_says_which_right_is_wanted(
    in_s3: Doctor, faulty: FaultProxy, answer: tuple[int, str]
) -> None:
    faulty.on("GET", r"\?lifecycle", s3_error(*answer), count=None)
    found = in_s3()
    assert (found.one("lifecycle").result, found.bad()) == ("skipped", [])
    assert "s3:GetLifecycleConfiguration" in found.one("lifecycle").cure


def test_a_directory_that_is_not_mounted_is_not_made(doctor: Doctor, tmp_path: Path) -> None:
    doctor.bucket.bucket = str(tmp_path / "mnt")
    found = doctor()
    assert found.bad() == ["reach"]
    assert "mount" in found.one("reach").cure
    assert not (tmp_path / "mnt").exists()


def test_a_directory_on_the_disk_of_the_data_is_no_backup(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor().one("mount")
    assert (found.result, "mount another disk" in found.cure) == ("warning", True)
    if SHM.stat().st_dev != tmp_path.stat().st_dev and os.access(SHM, os.W_OK):
        doctor.bucket.bucket = str(SHM / f"cassbackup-{os.getpid()}")
        os.mkdir(doctor.bucket.bucket)
        try:
            assert doctor().one("mount").result == "ok"
        finally:
            shutil.rmtree(doctor.bucket.bucket)


def test_a_directory_too_small_for_what_is_there_is_named(doctor: Doctor, tmp_path: Path) -> None:
    doctor.node.table("ks1", "events").flush(size=2_000_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    doctor.bucket.bucket = str(disk)
    found = doctor(within=namespace(f"mount -t tmpfs -o size=1m tmpfs {disk}"))
    assert found.one("room").result == "bad"


# ------------------------------------------------------------------------------------------------------------
# This node in the bucket


def utc(days_ago: float) -> str:
    moment = datetime.now(timezone.utc) - timedelta(days=days_ago)
    return moment.strftime("%Y%m%dT%H%M%S.%fZ")


def put_old(bucket: FileBucket, key: str, days_ago: float) -> None:
    """Store an object that was stored so many days ago."""
    bucket.put(key, b'{"version": 1, "keys": []}')
    then = time.time() - days_ago * 86400
    os.utime(bucket.root / key, (then, then))


@pytest.mark.slow
def test_a_name_that_another_machine_owns_is_named_with_both_ways_out(doctor: Doctor, scene: Scene) -> None:
    scene.once(*doctor.node.data_dirs)
    assert "this machine" in doctor().one("owner").detail
    page = {"version": 1, "machine_id": "0123456789abcdef", "data_directories": ["/data"]}
    doctor.bucket.put("node1.listings/owner.json", json.dumps(page).encode())
    found = doctor().one("owner")
    assert (found.result, "--adopt" in found.cure, "--name" in found.cure) == ("bad", True, True)


def test_a_node_that_has_been_silent_is_told(doctor: Doctor, tmp_bucket: FileBucket) -> None:
    put_old(tmp_bucket, f"node1.listings/heartbeat/{utc(2)}.json", 2)
    found = doctor().one("heartbeat")
    assert (found.result, "no daemon runs here" in found.detail) == ("warning", True)
    assert "cassbackup status" in found.cure


def test_a_bucket_that_nobody_prunes_is_told(doctor: Doctor, tmp_bucket: FileBucket) -> None:
    table = "node1.listings/ks1/users-0123456789abcdef0123456789abcdef"
    put_old(tmp_bucket, f"{table}/snapshots/daily/{utc(40)}/{utc(40)}-complete-1-1.json", 40)
    found = doctor().one("prune")
    assert (found.result, "cassbackup-prune.timer" in found.cure) == ("warning", True)
    put_old(tmp_bucket, f"node1.condemned/{utc(35)}.json", 35)
    assert doctor().one("prune").result == "warning"
    put_old(tmp_bucket, f"node1.condemned/{utc(1)}.json", 1)
    assert doctor().one("prune").result == "ok"
