"""What the command says to people: bad input, help, configuration, log lines, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, REPOSITORY, Authority, Daemon, Run, clean_environ
from faultproxy import FaultProxy, count
from scene import Scene, area_of, assert_no_pin_is_left, nobody
from servers import Bucket, FileBucket
from tree import Node


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


@pytest.fixture
def basics(tmp_path: Path) -> tuple[str, ...]:
    """Return the options that every run of `watch` needs here."""
    return ("--state-dir", str(tmp_path / "state"), "--name", "node1", "--once")


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return what was said, and fail if it was a traceback or nothing."""
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    return done.stderr


# ------------------------------------------------------------------------------------------------------------
# Arguments that cannot work: exit 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("watch", "/x", "--no-such-option"), "--no-such-option"),
        (("statsu",), "did you mean `cassbackup status`"),
        (("cofnig",), "did you mean `cassbackup config`"),
        (("data",), "A path contains a /"),
        (("watch", "/x", "--bucket", "ftp://b"), "of no known kind"),
        (("watch", "/x", "--bucket", "s3://"), "of no known kind"),
        (("watch", "/x", "--bucket", "file://relative"), "not absolute"),
        (("watch", "/x", "--bucket", "bare-name"), "neither AWS nor GCE answers"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--name", "a/b"), "node name 'a/b' cannot be used"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--name", "../up"), "cannot be used"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--threads", "0"), "--threads '0' cannot be read"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--threads", "many"), "--threads 'many' cannot be read"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--settle", "soon"), "write 90s, 15m, 26h or 7d"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--max-bandwidth", "fast"), "write 50M or 1.5G"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--max-pinned", "lots"), "write a part of the disk"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--since", "yesterday"), "--since 'yesterday' cannot be read"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--include", "("), "--include '(' cannot be read"),
        (("watch", "/x", "--bucket", "file:///tmp/b", "--sse", "rot13"), "write AES256 or aws:kms"),
        (("watch", "/x", "--bucket", "s3://b", "--sse", "AES256", "--kms-key", "k"), "does not go with"),
    ],
)
def test_arguments_that_cannot_work_are_named_and_end_with_exit_2(
    run_cassbackup: Run, node: Node, basics: tuple[str, ...], args: tuple[str, ...], said: str
) -> None:
    given = [str(node.data_dirs[0]) if word == "/x" else word for word in args]
    more = [word for word in basics if word not in given] if args[0] == "watch" else []
    if "--name" in given:
        more.remove("node1")
    done = run_cassbackup(*given, *more, check=2)
    assert said in complaint(done)


def test_without_a_bucket_it_prints_short_help_and_ends_with_exit_2(run_cassbackup: Run, tmp_path: Path) -> None:
    for args in ((), ("watch",), ("watch", "--state-dir", tmp_path)):
        said = complaint(run_cassbackup(*args, check=2))
        assert "usage: cassbackup" in said
        assert "BUCKET_NAME" in said
        assert len(said.splitlines()) < 12


@pytest.mark.parametrize("command", ["snapshot", "list", "restore"])
def test_without_a_bucket_a_command_asks_for_one_and_ends_with_exit_2(
    run_cassbackup: Run, node: Node, tmp_path: Path, command: str
) -> None:
    more = {"snapshot": ("--paths", node.data_dirs[0]), "list": (), "restore": ("--latest",)}[command]
    said = complaint(run_cassbackup(command, *more, "--state-dir", tmp_path, check=2))
    assert "no bucket" in said
    assert "set BUCKET_NAME" in said


def test_without_a_bucket_it_names_the_daemon_that_runs_here(scene: Scene, node: Node) -> None:
    scene.start(*node.data_dirs)
    done = scene.run("watch", "--state-dir", scene.state, check=2)
    assert f"pid {scene.daemon.pid}" in complaint(done)


@pytest.mark.parametrize("what", ["absent", "a file", "inside another"])
def test_a_path_that_is_no_data_directory_ends_with_exit_2(
    run_cassbackup: Run, tmp_path: Path, tmp_bucket: FileBucket, basics: tuple[str, ...], what: str
) -> None:
    path, paths = tmp_path / "data", [tmp_path / "data"]
    if what == "a file":
        path.touch()
    elif what == "inside another":
        (path / "inner").mkdir(parents=True)
        paths.append(path / "inner")
    done = run_cassbackup("watch", *paths, "--bucket", tmp_bucket.target, *basics, check=2)
    said = {"absent": "is not there", "a file": "is not a directory", "inside another": "is inside another directory"}
    assert f"{paths[-1]} {said[what]}" in complaint(done)


def as_nobody(script: Path, tmp_path: Path) -> list[str]:
    """Return a command that runs the program as a user without any rights; skip where that cannot be."""
    become = nobody()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o755 != 0o755 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    copy = tmp_path / "cassbackup.py"
    shutil.copy(script, copy)
    copy.chmod(0o644)
    return [*become, sys.executable, str(copy)]


def run_as_nobody(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    env, limit = clean_environ(home, {}), COMMAND_TIMEOUT_S
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit, env=env, cwd="/")


@pytest.mark.parametrize(
    ("locked", "said"),
    [
        ("data", "cannot be read"),
        ("state", "state directory"),
        ("pins", "no pin area"),
        ("bucket", "Permission denied"),
    ],
)
def test_what_may_not_be_read_or_written_is_named_with_exit_2(
    script: Path, tmp_path: Path, home: Path, locked: str, said: str
) -> None:
    command = as_nobody(script, tmp_path)
    root = tmp_path / "room"
    (root / "data").mkdir(parents=True)
    (root / "bucket").mkdir()
    (root / "state").mkdir()
    for folder in (root, root / "data", root / "bucket", root / "state"):
        os.chown(folder, 65534, 65534)
    if locked == "pins":
        for folder in (root, root / "data"):
            os.chown(folder, 0, 0)
    else:
        os.chown(root / locked, 0, 0)
        (root / locked).chmod(0o700 if locked == "data" else 0o755)
    options = ["--state-dir", str(root / "state"), "--bucket", f"file://{root}/bucket", "--name", "n", "--once"]
    done = run_as_nobody([*command, "watch", str(root / "data"), *options], home)
    assert done.returncode == 2, done.stderr
    assert said in complaint(done)


@pytest.mark.parametrize("kind", ["moto", "gcs"])
def test_a_bucket_that_is_not_there_is_named_with_exit_2(
    request: pytest.FixtureRequest, run_cassbackup: Run, node: Node, basics: tuple[str, ...], kind: str
) -> None:
    bucket: Bucket = request.getfixturevalue(kind)
    target = f"{bucket.scheme}://no-such-bucket-here"
    done = run_cassbackup("watch", *node.data_dirs, "--bucket", target, *basics, env=bucket.environ)
    assert "no-such-bucket-here" in complaint(done)
    assert done.returncode == 2


def test_wrong_credentials_are_named_with_exit_2(
    rclone: Bucket, run_cassbackup: Run, node: Node, basics: tuple[str, ...]
) -> None:
    env = {**rclone.environ, "AWS_ACCESS_KEY_ID": "WRONGWRONGWRONGWRONG"}
    done = run_cassbackup("watch", *node.data_dirs, "--bucket", rclone.target, *basics, env=env, check=2)
    assert "check the keys" in complaint(done)


def test_without_any_credentials_it_says_so_with_exit_2(
    rclone: Bucket, run_cassbackup: Run, node: Node, basics: tuple[str, ...]
) -> None:
    env = {name: value for name, value in rclone.environ.items() if "KEY" not in name}
    done = run_cassbackup("watch", *node.data_dirs, "--bucket", rclone.target, *basics, env=env, check=2)
    assert "credential" in complaint(done).lower()


@pytest.mark.slow
def test_a_node_that_belongs_to_another_machine_is_refused_unless_adopted(scene: Scene, node: Node) -> None:
    page = {"version": 1, "machine_id": "0123456789abcdef", "data_directories": ["/data"]}
    scene.bucket.put("node1.listings/owner.json", json.dumps(page).encode())
    node.table("ks1", "users").flush()
    done = scene.once(*node.data_dirs, check=2)
    assert "belongs to another machine" in complaint(done)
    assert "--adopt" in done.stderr
    assert scene.file_keys() == []
    scene.once(*node.data_dirs, args=("--adopt",))
    assert scene.file_keys() != []
    scene.once(*node.data_dirs)


def test_a_configuration_file_that_is_asked_for_and_not_there_is_exit_2(run_cassbackup: Run) -> None:
    done = run_cassbackup("config", "--config", "/no/such/file", check=2)
    assert "/no/such/file" in complaint(done)


def test_a_status_of_nobody_is_no_success(run_cassbackup: Run, tmp_path: Path) -> None:
    """P8: signals are true."""
    done = run_cassbackup("status", "--state-dir", tmp_path)
    assert done.returncode in {2, 3}
    assert "no daemon" in complaint(done)


# ------------------------------------------------------------------------------------------------------------
# TLS


@pytest.fixture(params=["moto", "gcs"])
def behind_tls(
    scene: Scene, request: pytest.FixtureRequest, secured: Callable[[Bucket], FaultProxy]
) -> tuple[Scene, FaultProxy]:
    """Return a scene whose bucket answers in TLS, and what stands before it."""
    scene.bucket = request.getfixturevalue(request.param)
    front = secured(scene.bucket)
    scene.environ = scene.bucket.through(front.url)
    return scene, front


def asked(scene: Scene, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a command on the bucket, where nobody knows this node; it has less time than its patience is long (120 s)."""
    options = ["--bucket", scene.bucket.target, "--state-dir", scene.at / "nobody"]
    return scene.run(*args, *options, env=scene.environ, timeout=100)


@pytest.mark.slow
def test_with_a_ca_file_all_is_stored_listed_verified_and_restored_over_tls(
    behind_tls: tuple[Scene, FaultProxy], node: Node, authority: Authority, tmp_path: Path
) -> None:
    scene, front = behind_tls
    trusting, users, into = ("--ca-file", authority.file), node.table("ks1", "users"), tmp_path / "restored"
    users.flush(size=9 << 20)
    node.snapshot("daily")
    scene.once(*node.data_dirs, args=trusting)
    scene.assert_all_is_listed(node.history)
    assert count(front.trace, "POST", r"\?uploads|uploadType=resumable") > 0
    assert "daily" in asked(scene, "list", "--node", "node1", *trusting).stdout
    assert asked(scene, "verify", "--deep", "--node", "node1", *trusting).returncode == 0
    assert asked(scene, "restore", "--node", "node1", "--tag", "daily", "--into", into, *trusting).returncode == 0
    (snapshot,) = users.directories()[0].glob("snapshots/daily")
    wanted = {path.name: path.read_bytes() for path in snapshot.iterdir()}
    assert {path.name: path.read_bytes() for path in (into / "ks1" / "users").iterdir()} == wanted


@pytest.mark.slow
def test_what_has_no_trusted_certificate_ends_each_command_before_long_and_says_what_to_do(
    behind_tls: tuple[Scene, FaultProxy], node: Node, stranger: Authority, tmp_path: Path
) -> None:
    scene, front = behind_tls
    node.table("ks1", "users").flush()
    trusting = ("--ca-file", str(stranger.file)) if scene.bucket.scheme == "gs" else ()
    daily = ("--tag", "daily", "--into", tmp_path / "restored")
    commands = (("list",), ("verify",), ("restore", *daily), ("doctor", *node.data_dirs, "--name", "node1", "--json"))
    with ThreadPoolExecutor() as pool:
        once = pool.submit(scene.once, *node.data_dirs, args=trusting, check=None)
        ends = [once.result(), *pool.map(lambda words: asked(scene, *words, *trusting), commands)]
    assert [done.returncode for done in ends] == [1, 1, 1, 1, 3]
    trusted = str(stranger.file) if trusting else "the usual CAs"
    for done in ends[:-1]:
        said = complaint(done).splitlines()
        assert "certificate of 127.0.0.1" in said[-2]
        assert "is not trusted (" in said[-2]
        assert f"with --ca-file; trusted now: {trusted}." in said[-1]
    (found,) = [one for one in json.loads(ends[-1].stdout)["checks"] if one["name"] == "reach"]
    assert (found["result"], trusted in found["cure"]) == ("bad", True)
    assert front.trace == []


def test_a_ca_file_without_certificates_is_exit_2_before_anything_is_done(
    behind_tls: tuple[Scene, FaultProxy], node: Node, tmp_path: Path
) -> None:
    scene, front = behind_tls
    node.table("ks1", "users").flush()
    empty = tmp_path / "empty.pem"
    empty.touch()
    for file in (tmp_path / "absent.pem", empty):
        trusting = ("--ca-file", file)
        for done in (scene.once(*node.data_dirs, args=trusting, check=None), asked(scene, "list", *trusting)):
            assert done.returncode == 2
            assert f"--ca-file {file} cannot be used" in complaint(done)
            assert "PEM" in done.stderr
    done = asked(scene, "doctor", *node.data_dirs, "--name", "node1", "--ca-file", empty)
    assert (done.returncode, f"--ca-file {empty} cannot be used" in done.stdout) == (3, True)
    assert front.trace == []
    assert_no_pin_is_left(area_of(node))


@pytest.mark.slow
def test_a_daemon_tells_of_a_certificate_and_goes_on_once_it_is_trusted(
    behind_tls: tuple[Scene, FaultProxy], node: Node, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """P2: what was found meanwhile waits, and is listed without a restart."""
    scene, front = behind_tls
    file = tmp_path / "ca.pem"
    shutil.copy(stranger.file, file)
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs, args=("--ca-file", file))
    scene.daemon.wait_until(lambda: scene.page()["trouble"])
    for said in (scene.page()["trouble"], scene.daemon.log()):
        assert re.search(f"is(%20| )not(%20| )trusted.*--ca-file.*{file}", said)
    done = scene.run("status", "--state-dir", scene.state, check=3)
    assert f"trusted now: {file}" in done.stdout
    assert front.trace == []
    shutil.copy(authority.file, file)
    page = scene.settled()
    assert page["trouble"] == ""
    scene.assert_all_is_listed(node.history)
    assert scene.daemon.log().count("is not trusted") < 9


# ------------------------------------------------------------------------------------------------------------
# Help, configuration, log


def test_help_and_version_need_no_sdk(script: Path, home: Path) -> None:
    lonely = [sys.executable, "-S", "-I", str(script)]  # no site-packages at all
    for args, said in (
        (["--help"], "usage: cassbackup"),
        (["--version"], "cassbackup "),
        (["watch", "--help"], "--bucket"),
        (["status", "--help"], "--max-lag"),
    ):
        env, limit = clean_environ(home, {}), COMMAND_TIMEOUT_S
        done = subprocess.run([*lonely, *args], check=True, capture_output=True, text=True, env=env, timeout=limit)
        assert said in done.stdout
        assert done.stderr == ""


def test_every_option_is_explained_with_its_variable(run_cassbackup: Run) -> None:
    for command in ("watch", "status"):
        text = " ".join(run_cassbackup(command, "--help", check=0).stdout.split())
        for option in set(re.findall(r"(--[a-z-]+)", text)) - {"--help", "--config", "--verbose", "--sse-kms-key-id"}:
            variable = {"--bucket": "BUCKET_NAME", "--region": "REGION"}.get(
                option, "CASSBACKUP_" + option[2:].upper().replace("-", "_")
            )
            assert f"[{variable}]" in text, option


def test_what_is_restored_or_deleted_is_never_chosen_by_the_environment(run_cassbackup: Run) -> None:
    for command, setting in {"restore": "CASSBACKUP_INTO", "prune": "CASSBACKUP_KEEP_LAST"}.items():
        text = " ".join(run_cassbackup(command, "--help", check=0).stdout.split())
        assert f"[{setting}]" in text
        for word in ("NODE", "TAG", "TABLE", "AT", "LATEST", "IN_PLACE", "CONFIRM", "FORCE", "RETIRE"):
            assert f"[CASSBACKUP_{word}]" not in text


def test_config_shows_each_value_and_a_flag_beats_environment_beats_file_beats_default(
    run_cassbackup: Run, tmp_path: Path
) -> None:
    file = tmp_path / "settings"
    file.write_text('# a comment\nBUCKET_NAME="s3://from-file"\nREGION=file-region\nCASSBACKUP_THREADS=3\n')
    env = {"REGION": "env-region", "CASSBACKUP_THREADS": "4", "CASSBACKUP_KEYSPACE": "ks1 ks2"}
    done = run_cassbackup("config", "--config", file, "--threads", "5", env=env, check=0)
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert shown["bucket"] == ["s3://from-file", "file"]
    assert shown["region"] == ["env-region", "environment"]
    assert shown["threads"] == ["5", "flag"]
    assert shown["settle"][-1] == "default"
    assert shown["keyspace"] == ["ks1", "ks2", "environment"]
    assert done.stderr == ""


@pytest.mark.slow
def test_a_secret_is_never_shown_or_logged(scene: Scene, node: Node) -> None:
    canary = "AKIACANARYCANARY"
    node.table("ks1", "users").flush()
    done = scene.run("config", "-k", canary, "-s", canary, check=0)
    assert canary not in done.stdout + done.stderr
    done = scene.once(*node.data_dirs, args=("-k", canary, "-s", canary, "-v"))
    assert canary not in done.stdout + done.stderr
    assert "use the environment or a role" in done.stderr


def test_each_event_is_one_line_whatever_a_file_is_called(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    backups = users.directories()[0] / "backups"
    backups.mkdir()
    os.mkfifo(os.fsencode(backups) + b"/two\nlines level=ERROR forged=\xff\x1b[31m")
    (backups / "new\nline.db").write_bytes(b"x")
    done = scene.once(*node.data_dirs, args=("-v",), check=None)
    rule = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (debug|info|warning|error|critical) [!-~ ]+")
    assert [line for line in done.stderr.splitlines() if not rule.fullmatch(line)] == []
    assert "two%0Alines" in done.stderr


@pytest.mark.slow
def test_lines_carry_priorities_where_journald_reads_them(
    script: Path, home: Path, tmp_path: Path, node: Node, tmp_bucket: FileBucket, basics: tuple[str, ...]
) -> None:
    users = node.table("ks1", "users")
    users.flush()
    os.mkfifo(users.directories()[0] / "backups" / "pipe.db")
    command = [sys.executable, str(script), "watch", *map(str, node.data_dirs), "--bucket", tmp_bucket.target, *basics]
    log = tmp_path / "journal"
    with log.open("wb") as stderr:
        found = os.fstat(stderr.fileno())
        env = clean_environ(home, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        subprocess.run([*command, "-k", "key"], check=True, env=env, stderr=stderr, timeout=COMMAND_TIMEOUT_S)
    lines = log.read_text().splitlines()
    assert {line[:3] for line in lines} == {"<6>", "<4>"}
    with log.open("wb") as stderr:  # another stream than the one that journald reads
        env = clean_environ(home, {"JOURNAL_STREAM": "1:1"})
        subprocess.run(command, check=True, env=env, stderr=stderr, timeout=COMMAND_TIMEOUT_S)
    assert not [line for line in log.read_text().splitlines() if line.startswith("<")]


def test_the_readme_names_every_option_and_its_variable(scene: Scene) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for command in ("watch", "status", "snapshot", "list", "verify", "restore", "prune", "doctor", "report"):
        said = scene.run(command, "--help", check=0).stdout
        named = set(re.findall(r"--[a-z][a-z-]+|CASSBACKUP_[A-Z_]+|BUCKET_NAME|REGION", said)) - {"--help"}
        assert [name for name in sorted(named) if name not in readme] == []
