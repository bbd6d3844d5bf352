"""What doctor finds before it goes wrong, and the cure that it names: on real trees, mounts, limits and servers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from pathlib import Path

import pytest
from conftest import Daemon, Run
from faultproxy import FaultProxy, Respond, s3_error
from scene import Scene, area_of
from servers import Bucket, FakeMetadata, FileBucket
from tree import Node

from cassbackup import dump_document, machine_id

Proxied = Callable[[Bucket], FaultProxy]
Found = dict[str, dict[str, str]]
NAMES = ["user", "data", "link", "inotify", "settings", "cloud", "bucket", "incrementals", "timers", "metrics"]


class Doctor:
    """The command, with what every run of it needs here."""

    def __init__(self, run: Run, node: Node, bucket: Bucket, at: Path) -> None:
        self.run, self.node, self.bucket, self.state = run, node, bucket, at / "state"
        self.environ: Mapping[str, str] = bucket.environ
        self.nodetool = at / "nodetool"
        self.says("running")

    def says(self, words: str) -> None:
        """Let nodetool say something."""
        self.nodetool.write_text(f"#!/bin/sh\necho {words}\n")
        self.nodetool.chmod(0o755)

    def __call__(
        self,
        *args: object,
        env: Mapping[str, str] | None = None,
        paths: Sequence[object] | None = None,
        within: Sequence[str] = (),
    ) -> Found:
        """Return what was found, by the name of the check. Exit 3 tells that something is bad, and each has a cure."""
        given = self.node.data_dirs if paths is None else paths
        options = ["--state-dir", self.state, "--bucket", self.bucket.target, "--name", "node1"]
        words = ["doctor", *given, "--json", "--nodetool", self.nodetool, *options, *args]
        done = self.run(*words, env={**self.environ, **(env or {})}, within=within)
        assert "Traceback" not in done.stderr, done.stderr
        checks = json.loads(done.stdout)["checks"]
        assert [one["name"] for one in checks] == NAMES
        bad = [one for one in checks if one["result"] == "bad"]
        assert done.returncode == (3 if bad else 0)
        assert [one for one in checks if (one["result"] == "ok") is bool(one["cure"])] == []
        return {one["name"]: one for one in checks}


@pytest.fixture
def doctor(run_cassbackup: Run, node: Node, tmp_bucket: FileBucket, tmp_path: Path) -> Doctor:
    """Return doctor on a node with a flushed table and a snapshot, and a bucket that is a directory."""
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    return Doctor(run_cassbackup, node, tmp_bucket, tmp_path)


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


def namespace(script: str) -> list[str]:
    """Return words that run a command after a script, in a mount namespace of its own; skip where that cannot be."""
    if subprocess.run(["unshare", "-rum", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    return ["unshare", "-rum", "sh", "-c", f'{script} || exit 99; exec "$@"', "-"]


def everything(root: Path) -> dict[str, tuple[int, ...]]:
    """Return what stat tells of every file and directory, but for what reading and linking change."""
    stats = [(path, path.lstat()) for path in [root, *root.rglob("*")]]
    return {str(path): (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns * path.is_file()) for path, s in stats}


def test_a_sound_node_is_sound_and_nothing_is_left_behind(doctor: Doctor, tmp_bucket: FileBucket) -> None:
    before = everything(doctor.node.root)
    found = doctor()
    assert [name for name in NAMES if found[name]["result"] == "bad"] == []
    assert everything(doctor.node.root) == before
    assert not doctor.state.exists()
    assert list(tmp_bucket.keys()) == []
    assert found["link"]["detail"] == f"pins into {area_of(doctor.node)}/data"
    assert found["bucket"]["detail"] == f"{tmp_bucket.target}: put, head, get, list; may delete"
    assert "BUCKET_NAME (flag)" in found["settings"]["detail"]


def test_for_people_each_check_is_a_line_and_its_cure_stands_below(doctor: Doctor) -> None:
    """Before anything is configured, too: doctor is what people run first."""
    done = doctor.run("doctor", "--state-dir", doctor.state, "--nodetool", "/nonexistent", check=3)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("    ")] == NAMES
    assert lines[0].startswith("user          bad")
    assert lines[1] == "    name it: cassbackup /var/lib/cassandra/data"
    assert "    set BUCKET_NAME in /etc/default/cassbackup, or pass --bucket" in lines
    assert "    pass its path: --nodetool, --cqlsh" in lines
    assert done.stderr == ""


def test_it_stands_beside_a_running_daemon(
    doctor: Doctor, tmp_path: Path, daemon: Callable[..., Daemon], tmp_bucket: FileBucket
) -> None:
    scene = Scene(tmp_path, daemon, doctor.run, tmp_bucket)
    scene.start(*doctor.node.data_dirs)
    assert [one for one in doctor().values() if one["result"] == "bad"] == []
    assert scene.settled()["pending"]["units"] == 0


def test_another_user_than_the_owner_is_told_to_become_it(doctor: Doctor) -> None:
    data = doctor.node.data_dirs[0]
    within = namespace("true")  # there, what belongs to nobody belongs to somebody else, and we seem to be root
    os.chown(data, 65534, 65534)
    found = doctor(within=[*within[:1], "-U", "--map-user=1000", *within[2:]])
    assert found["user"]["result"] == "bad"
    assert found["user"]["cure"].startswith("sudo -u '#65534' ")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_looks_as_the_owner_that_the_daemon_becomes(doctor: Doctor) -> None:
    """What is put into a directory as root could not be written to by the daemon."""
    for path in [doctor.node.root, *doctor.node.root.rglob("*"), Path(doctor.bucket.target[len("file://") :])]:
        os.chown(path, 12345, 12345)
    for path in (doctor.node.root.parent, *doctor.node.root.parent.parents):
        if path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    found = doctor()
    assert found["user"]["detail"] == "user 12345 owns the data"
    assert found["bucket"]["result"] == "ok"
    root = doctor.node.root.parent / "bucket"
    assert {path.stat().st_uid for path in root.rglob("*")} <= {12345}
    other = doctor.node.root.parent / "other"
    (other / "ks1" / "posts-1").mkdir(parents=True)
    found = doctor(paths=[*doctor.node.data_dirs, other])
    assert f"{other} belongs to user 0, this is user 12345" in found["user"]["detail"]


@pytest.mark.parametrize(
    ("path", "what", "cure"),
    [
        ("{root}", "has no tables", "name {root}/data"),
        ("{root}/data/ks1", "has no tables", "name the directory above the keyspaces"),
        ("/no/such", "No such file or directory", "correct that first"),
    ],
)
def test_a_path_too_high_or_too_deep_is_told_before_it_protects_nothing(
    doctor: Doctor, path: str, what: str, cure: str
) -> None:
    found = doctor(paths=[path.format(root=doctor.node.root)])["data"]
    assert (found["result"], what in found["detail"]) == ("bad", True)
    assert found["cure"] == cure.format(root=doctor.node.root)


@pytest.mark.parametrize("include", ["/archive/", r"\.log\.gz$"])
def test_an_archive_among_the_paths_needs_no_tables_but_must_be_there(
    doctor: Doctor, tmp_path: Path, include: str
) -> None:
    paths = [*doctor.node.data_dirs, tmp_path / "archive"]
    assert doctor("--include", include, paths=paths)["link"]["result"] == "bad"
    paths[-1].mkdir()
    found = doctor("--include", include, paths=paths)
    assert [name for name in NAMES if found[name]["result"] == "bad"] == []
    assert found["data"]["detail"] == "1 tables"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--keyspace", "ks1,system"), "--keyspace ks1,system"),
        (("--exclude-table", "users"), "--exclude-table users"),
        (("--keyspace", "ks?", "--exclude-keyspace", "sytem"), "--exclude-keyspace sytem"),
    ],
)
def test_a_filter_that_matches_nothing_is_bad(doctor: Doctor, args: tuple[str, ...], named: str) -> None:
    found = doctor(*args)["data"]
    assert (found["result"], found["detail"]) == ("bad", f"no table fits {named}")


def test_a_linked_keyspace_of_which_nothing_would_be_stored_is_bad(doctor: Doctor, tmp_path: Path) -> None:
    data = doctor.node.data_dirs[0]
    (data / "ks1").rename(tmp_path / "elsewhere")
    (data / "ks1").symlink_to(tmp_path / "elsewhere")
    found = doctor()["data"]
    assert (found["result"], f"{data}/ks1 is a link" in found["detail"]) == ("bad", True)


def test_pins_on_another_file_system_are_named_before_a_link_fails(doctor: Doctor) -> None:
    found = doctor("--state-dir", doctor.state, env={"CASSBACKUP_PIN_DIR": "/dev/shm/cassbackup-pins"})["link"]
    assert (found["result"], "(Invalid cross-device link)" in found["detail"]) == ("bad", True)
    assert "--pin-dir" in found["cure"]
    assert not Path("/dev/shm/cassbackup-pins").exists()


def test_inotify_limits_below_what_is_needed_are_named_with_the_sysctl(doctor: Doctor, tmp_path: Path) -> None:
    limit = tmp_path / "max_user_watches"
    limit.write_text("5\n")
    within = namespace(f"mount --bind {limit} /proc/sys/fs/inotify/max_user_watches")
    found = doctor(within=within)["inotify"]
    assert (found["result"], "and only 5 watches" in found["detail"]) == ("bad", True)
    assert found["cure"].startswith("sysctl fs.inotify.max_user_watches=1048576")


def test_misspelt_settings_are_bad_and_where_each_stands_is_told(doctor: Doctor, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text("CASSBACKUP_TREADS=4\nexport X=1\n")
    found = doctor("--config", settings)["settings"]
    assert (found["result"], f"{settings}: there is no setting CASSBACKUP_TREADS" in found["detail"]) == ("bad", True)
    assert "'export X=1'" in found["detail"]
    settings.write_text("CASSBACKUP_THREADS=4\n")
    found = doctor("--config", settings, "--region", "x", env={"CASSBACKUP_PREFIX": "p"})["settings"]
    told = ("CASSBACKUP_THREADS (file)", "REGION (flag)", "CASSBACKUP_PREFIX (environment)")
    assert [one for one in told if one not in found["detail"]] == []
    settings.chmod(0)
    if os.geteuid():
        assert "cannot be read" in doctor("--config", settings)["settings"]["detail"]


def test_the_cloud_and_the_nodes_name_are_told(doctor: Doctor, metadata: Callable[..., FakeMetadata]) -> None:
    service = metadata()
    environ = {**service.environ, "AWS_EC2_METADATA_DISABLED": "", "NO_GCE_CHECK": ""}
    found = doctor(env=environ)["cloud"]
    assert found["result"] == "ok"
    assert "this node is node1" in found["detail"]
    assert "not on" not in found["detail"]


@pytest.mark.parametrize(
    ("method", "where", "named"),
    [
        ("PUT", "node1.doctor", ["put"]),
        ("HEAD", "node1.doctor", ["head"]),
        ("GET", "node1.doctor", ["get"]),
        ("GET", "list-type", ["list"]),
    ],
)
def test_a_right_that_is_missing_is_the_one_that_is_named(
    in_s3: Doctor, faulty: FaultProxy, method: str, where: str, named: list[str]
) -> None:
    faulty.on(method, where, s3_error(403, "AccessDenied"), count=None)
    found = in_s3()["bucket"]
    assert found["result"] == "bad"
    assert re.findall(r"\b(\w+): s3://", found["detail"]) == named
    assert "rights" in found["cure"]


@pytest.mark.parametrize(("status", "code", "cure"), [(507, "XMinioStorageFull", "full"), (400, "KMS.Disabled", "key")])
def test_one_question_without_an_answer_hides_no_other(
    in_s3: Doctor, faulty: FaultProxy, status: int, code: str, cure: str
) -> None:
    faulty.on("PUT", "node1.doctor", s3_error(status, code), count=None)
    faulty.on("GET", "list-type", s3_error(403, "AccessDenied"), count=None)
    found = in_s3()["bucket"]
    assert code in found["detail"]
    assert "; list: " in found["detail"]
    assert cure in found["cure"]
    assert "rights" in found["cure"]


def test_what_is_refused_after_it_has_arrived_is_refused_the_next_time_too(in_s3: Doctor, faulty: FaultProxy) -> None:
    in_s3.bucket.put("node1.doctor", b"arrived")
    faulty.on("GET", "list-type", s3_error(403, "AccessDenied"), count=None)
    assert in_s3()["bucket"]["result"] == "bad"
    assert list(in_s3.bucket.keys()) == []


def test_no_right_to_delete_is_good_and_the_probe_does_not_pile_up(in_s3: Doctor, faulty: FaultProxy) -> None:
    faulty.on("DELETE", "node1.doctor", s3_error(403, "AccessDenied"), count=None)
    for _ in range(2):
        found = in_s3()["bucket"]
        assert (found["result"], "may not delete, which is good for a daemon" in found["detail"]) == ("ok", True)
    assert list(in_s3.bucket.keys()) == ["node1.doctor"]
    faulty.on("PUT", "node1.doctor", s3_error(403, "AccessDenied"), count=None)
    assert in_s3()["bucket"]["detail"].startswith("put: "), "that the key is taken says HEAD, too"


@pytest.mark.skipif(not machine_id(), reason="this machine has no machine-id")
def test_a_name_that_belongs_to_another_machine_is_bad_before_the_daemon_refuses_it(doctor: Doctor) -> None:
    """A cloned disk, or a replaced machine."""
    doctor.bucket.put("node1.listings/owner.json", dump_document(id="1", machine_id="other"))
    found = doctor()["bucket"]
    assert (found["result"], "--adopt" in found["cure"]) == ("bad", True)
    assert "belongs to another machine (other)" in found["detail"]


def test_a_bucket_that_does_not_exist_and_one_that_does_not_answer_are_told(in_s3: Doctor) -> None:
    found = in_s3("--bucket", "s3://no-such-bucket-here")["bucket"]
    assert (found["result"], "no-such-bucket-here" in found["detail"]) == ("bad", True)
    began = time.monotonic()
    found = in_s3(env=in_s3.bucket.through("http://127.0.0.1:9"))["bucket"]
    assert found["result"] == "bad"
    assert time.monotonic() - began < 60


def test_a_clock_that_is_off_is_told(in_s3: Doctor, faulty: FaultProxy) -> None:
    ahead = {"Date": formatdate(time.time() + 400, usegmt=True)}
    refused = s3_error(403, "AccessDenied").body
    faulty.on("DELETE", r"node1\.doctor", Respond(403, refused, ahead), count=None)  # the last thing that it asks
    found = in_s3()["bucket"]
    assert (found["result"], "from the store's" in found["detail"]) == ("bad", True)
    assert "chrony" in found["cure"]


@pytest.mark.parametrize(("said", "result"), [("running", "ok"), ("not running", "warning")])
def test_incremental_backups_that_are_off_are_a_warning(doctor: Doctor, said: str, result: str) -> None:
    doctor.says(said)
    assert doctor()["incrementals"]["result"] == result


def test_a_nodetool_that_does_not_answer_is_not_waited_for(doctor: Doctor) -> None:
    doctor.nodetool.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(100)\n")
    found = doctor()["incrementals"]
    assert (found["result"], "did not answer in 10 s" in found["detail"]) == ("warning", True)


def test_the_metrics_port_is_asked(doctor: Doctor) -> None:
    environ = {"CASSBACKUP_METRICS_LISTEN": "127.0.0.1:9"}
    assert doctor(env=environ)["metrics"]["result"] == "warning"
    assert doctor()["metrics"]["detail"] == "--metrics-listen is not set"
