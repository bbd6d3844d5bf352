"""What the command says to people: bad input, help, settings, log lines, exit codes."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND_TIMEOUT_S, REPOSITORY, Authority, Daemon, Run, clean_environ
from faultproxy import FaultProxy, count
from scene import Scene, nobody
from servers import Bucket, FileBucket
from tree import Node

import cassbackup
from cassbackup import (
    COMMANDS,
    StatusOptions,
    build_parser,
    find_command,
    parse,
    read_settings,
    read_value,
    why_behind,
)


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs the program in this process; what it says is (exit code, stdout, stderr)."""
    for name in [name for name in os.environ if name.startswith(("CASSBACKUP_", "BUCKET", "REGION"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(cassbackup, "SETTINGS", str(tmp_path / "settings"))
    monkeypatch.setattr(cassbackup, "KEY_FILES", str(tmp_path / "keys"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(cassbackup, "default_state_dir", lambda environ: str(tmp_path / "state"))
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            code = cassbackup.main([str(word) for word in argv])
        except SystemExit as end:  # argparse, after --help
            code = int(end.code or 0)
        return (code, *capfd.readouterr())

    return run


def complaint(done: tuple[int, str, str], code: int = 2) -> str:
    """Return what was said, and fail unless it is a sentence with this exit code."""
    assert done[0] == code, done
    assert done[1] == ""
    assert done[2].startswith("cassbackup: ")
    assert "Traceback" not in done[2]
    return done[2]


# ------------------------------------------------------------------------------------------------------------
# Arguments that cannot work: exit 2, and what to write


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("watch /x --no-such-option", "watch has no option --no-such-option"),
        ("list --nod db1", "list has no option --nod\n  `cassbackup list --help` shows the options"),
        ("verify --since 2026-11-21", "verify has no option --since\n  `cassbackup verify --help`"),
        ("statsu", "there is no command 'statsu'\n  try `cassbackup status`; a path contains a /, as ./statsu"),
        ("data", "a path contains a /, as ./data"),
        ("status extra", "status does not take 'extra'"),
        ("-vb file:///b list", "list is a command\n  write it first: cassbackup list ..."),
        ("prune --keep-last 3 --cluster=", "--cluster is empty\n  is a variable of the shell not set?"),
        ("list --bucket=", "--bucket is empty"),
        ("restore --latest --into=", "--into is empty"),
        ("restore --latest --table LICENSE Makefile", "put globs in quotes"),
        ("watch /x --bucket", "--bucket/-b: expected one argument"),
        ("list --bucket s3//b", "write s3://bucket[/prefix], gs://bucket[/prefix], file:///directory, or"),
        ("list --bucket /tmp/b", "write s3://bucket[/prefix], gs://bucket[/prefix], file:///directory, or"),
        ("list --bucket s3:b", "write s3://bucket[/prefix], gs://bucket[/prefix], file:///directory, or"),
        ("list --bucket ftp://b", "of no known kind"),
        ("list --bucket s3://", "of no known kind"),
        ("list --bucket file://relative", "not absolute"),
        ("list --bucket bare-name", "could be anywhere"),
        ("list --bucket s3://b --endpoint-url minio:9000", "write http://minio:9000"),
        ("watch /x --bucket file:///tmp/b --threads 0", "--threads '0' cannot be read\n  write a number from 1 to 256"),
        ("watch /x --threads many", "write a number from 1 to 256"),
        ("snapshot --nodetool nodetool'", "write a command with its options"),
        ("watch /x --name=--", "-- is no value"),
        ("report --days 10000000", "write a number from 1 to 9999"),
        ("restore --at 1969-12-31", "write 2026-11-21"),
        ("watch /x --incomplete-after 60", "write a number with its unit, as 90s, 15m, 26h or 20d"),
        ("prune --keep-within 20", "--keep-within '20' cannot be read\n  write a number with its unit"),
        ("status --max-age 26", "with its unit"),
        ("watch /x --max-bandwidth fast", "write 50M or 1.5G"),
        ("watch /x --max-pinned lots", "write a part of the disk"),
        ("watch /x --include (", "write a regular expression"),
        ("watch /x --include a{99999999999}", "write a regular expression"),
        ("watch /x --sse rot13", "write AES256 or aws:kms"),
        ("watch /x --metrics-listen 9108", "write [HOST]:PORT"),
        ("restore --at yesterday", "--at 'yesterday' cannot be read\n  write 2026-11-21"),
        ("list --bucket s3://b --ca-file /no/such.pem", "certificates in /no/such.pem cannot be used"),
        ("prune --bucket s3://b --sse AES256 --kms-key k --keep-last 3", "does not go with"),
    ],
)
def test_arguments_that_cannot_work_are_named_with_what_to_write(cli: Any, line: str, said: str) -> None:
    assert said in complaint(cli(*line.split()))


@pytest.mark.parametrize("line", ["", "watch", "snapshot", "list", "verify", "restore --latest", "prune --keep-last 3"])
def test_without_a_bucket_each_command_tells_the_two_ways_to_set_it(cli: Any, node: Node, line: str) -> None:
    where = {"": [node.data_dirs[0]], "watch": [node.data_dirs[0]], "snapshot": ["--paths", node.data_dirs[0]]}
    said = complaint(cli(*line.split(), *where.get(line, [])))
    assert said == "cassbackup: no bucket\n  set BUCKET_NAME in /etc/default/cassbackup, or pass --bucket\n"


def test_what_the_timers_prune_keeps_does_not_stand_in_the_way_of_another_prune(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASSBACKUP_KEEP_LAST", "3")
    where = ("--bucket", f"file://{tmp_path}")
    assert "no node" in cli("prune", "--tag", "x", *where)[2]
    assert "you passed two of --keep-" in complaint(cli("prune", "--tag", "x", "--keep-last", "2", *where))


def test_where_the_settings_restore_to_does_not_stand_in_the_way_of_a_restore_in_place(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASSBACKUP_INTO", f"{tmp_path}/into")
    line = ("restore", "--latest", "--in-place", "--same-node", "--bucket", f"file://{tmp_path}", "--node", "db1")
    assert "--into" not in complaint(cli(*line), 1)
    assert "--into does not go with --in-place" in complaint(cli(*line, "--into", f"{tmp_path}/into"))


def test_a_bucket_inside_the_data_is_refused_before_anything_is_made_there(cli: Any, node: Node) -> None:
    [data] = node.data_dirs
    said = complaint(cli("watch", data, "--bucket", f"file://{data}/bucket"))
    assert "is inside a data directory\n  choose a directory that is no part of Cassandra's data" in said
    assert not (data / "bucket").exists()


@pytest.mark.parametrize(
    ("metavar", "text", "value"),
    [
        ("DURATION", "90s", 90),
        ("DURATION", "1.5 h", 5400),
        ("DURATION", "20d", 20 * 86400),
        ("RATE", "50M", 50 << 20),
        ("RATE", "50MB/s", 50 << 20),
        ("RATE", "50 MiB", 50 << 20),
        ("RATE", "1.5g", 3 << 29),
        ("RATE", "0", 0),
        ("PART", "5%", 0.05),
        ("TIME", "2026-11-21", 1795219200),
        ("TIME", "2026-11-21T20:24Z", 1795292640),
        ("TIME", "2026-11-21T21:24+01:00", 1795292640),
        ("ADDR", "[::1]:9810", "[::1]:9810"),
        ("", "Yes", True),
        ("", "off", False),
    ],
)
def test_values_are_read_as_people_write_them(metavar: str, text: str, value: object) -> None:
    assert read_value(metavar, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("metavar", "text"), [("DURATION", "1y"), ("DURATION", "30 days"), ("PART", "10"), ("PART", "100%"), ("RATE", "-1")]
)
def test_what_could_mean_two_things_is_refused(metavar: str, text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read_value(metavar, text)


# ------------------------------------------------------------------------------------------------------------
# Help


def test_options_may_stand_before_the_command() -> None:
    assert find_command(["-v", "list", "--json"]) == ("list", ["-v", "--json"])
    assert find_command(["--bucket", "list", "restore"]) == ("restore", ["--bucket", "list"])
    assert find_command(["--bucket=x", "status"]) == ("status", ["--bucket=x"])
    assert find_command(["--once", "/data"]) == ("", ["--once", "/data"])
    assert parse("watch", ["/a", "--once", "/b"])["paths"] == ["/a", "/b"]


def test_help_is_shown_for_help_too(cli: Any) -> None:
    for line in ("--help", "help", "-h"):
        code, told, said = cli(*line.split())
        assert (code, said) == (0, "")
        assert told.startswith("usage: cassbackup [COMMAND]")
        assert [name for name in COMMANDS if f"\n  {name} " not in told] == []
    for line in ("restore help", "restore --help", "help restore", "-h restore"):
        code, told, said = cli(*line.split())
        assert (code, said, told.split("\n")[0]) == (0, "", "usage: cassbackup restore [OPTION ...]"), line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_commands_own_options_first_their_defaults_and_an_example(name: str) -> None:
    text = build_parser(name).format_help()
    assert f"\n{name}:\n" in text.split("\nbucket:")[0]
    assert f"Example: cassbackup {name}" in text
    words = " ".join(text.split())
    for option in COMMANDS[name].options:
        if not option.help:  # for our own use
            assert f"{option.flags} " not in words
            continue
        assert option.variable in words
        if option.default and isinstance(option.default, str):
            assert f"(default: {option.default})" in words


def test_an_option_takes_a_value_in_each_command_or_in_none() -> None:
    """Else nobody could tell where the command stands."""
    arity: dict[str, set[bool]] = {}
    for command in COMMANDS.values():
        for option in command.options:
            for flag in option.flags.split():
                arity.setdefault(flag, set()).add(bool(option.metavar))
    assert [flag for flag, found in arity.items() if len(found) > 1] == []


def test_every_option_reaches_its_command() -> None:
    """A field that no option fills keeps its default for ever; an option without a field does nothing."""
    elsewhere = {"config", "verbose", "json", "bucket", "prefix", "name", "state_dir"}
    store = set(cassbackup.StoreOptions.__dataclass_fields__)
    for name, command in COMMANDS.items():
        fields = set(command.fields.__dataclass_fields__)
        filters = set(cassbackup.Filters.__dataclass_fields__) if "filters" in fields else set()
        given = {option.key for option in command.options}
        assert given - fields - elsewhere - store - filters == set(), name
        ours = {"store", "filters", "environ", "problems", "origins", "all_nodes"}
        assert fields - given - ours == set(), name


def test_nothing_that_is_chosen_for_once_has_a_variable() -> None:
    once = (
        "adopt once full wait confirm force tag table node cluster at latest dry_run in_place retire repair deep json"
    )
    for command in COMMANDS.values():
        assert [option.key for option in command.options if option.key in once.split() and option.variable] == []


def test_help_and_version_need_no_package(script: Path, home: Path) -> None:
    lonely = [sys.executable, "-S", "-I", str(script)]  # no site-packages at all
    for args, said in ((["--help"], "usage: cassbackup"), (["--version"], "cassbackup 1."), (["list", "-h"], "--tag")):
        env, limit = clean_environ(home, {}), COMMAND_TIMEOUT_S
        done = subprocess.run([*lonely, *args], check=True, capture_output=True, text=True, env=env, timeout=limit)
        assert said in done.stdout
        assert done.stderr == ""


def test_the_readme_names_every_command() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"cassbackup {name}" not in readme and name != "watch"] == []


# ------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=b\n", {"A": "b"}),
        ("# A=c\n ; A=d\nA = b  \n", {"A": "b"}),
        ('A=\'b c\'\nB="d \\"e\\""\n', {"A": "b c", "B": 'd "e"'}),
        ("A=b # c\n", {"A": "b # c"}),
        ("A=b\\\nc\nB=d", {"A": "bc", "B": "d"}),
        ("A=nodetool -pw 'x y'\r\nB=\n", {"A": "nodetool -pw 'x y'", "B": ""}),
        ("A=b=c\n", {"A": "b=c"}),
        ('A="a\\$b\\\\\\x"\n', {"A": "a$b\\\\x"}),
    ],
)
def test_the_settings_file_is_read_as_systemd_reads_it(text: str, found: dict[str, str]) -> None:
    assert read_settings(text) == (found, [])


@pytest.mark.parametrize(
    "line",
    ["export BUCKET_NAME=s3://b", "BUCKET_NAME s3://b", "BUCKET_NAME='s3://b", "BUKET_NAME=b"],
)
def test_a_line_that_systemd_would_not_read_stops_a_command_and_a_daemon_whose_bucket_is_in_doubt(
    cli: Any, tmp_path: Path, line: str
) -> None:
    (tmp_path / "settings").write_text(line + "\n")
    for command in ("list", "watch", "status"):
        said = complaint(cli(command))
        assert line in said or "BUKET_NAME is not" in said or "did you mean BUCKET_NAME?" in said
        assert str(tmp_path / "settings") in said


def test_a_line_that_systemd_reads_otherwise_or_not_at_all_is_named(cli: Any, tmp_path: Path) -> None:
    for text, said in (
        ("# a note \\\nBUCKET_NAME=file:///b\n", "depends on systemd"),
        ("A=M\udcfcller\n", "not read"),
        ("\ufeffA=b", "not read"),
    ):
        (tmp_path / "settings").write_text(text, errors="surrogateescape")
        assert said in complaint(cli("list"))


def problems_of(monkeypatch: pytest.MonkeyPatch, cli: Any, *args: object) -> list[str]:
    """Return what a daemon that was started so is told of its settings."""
    told: list[tuple[str, ...]] = []

    def watch(options: cassbackup.WatchOptions, environ: object) -> int:
        """Watch."""
        told.append(options.problems)
        return 0

    monkeypatch.setitem(COMMANDS, "watch", COMMANDS["watch"]._replace(run=watch))
    assert cli("watch", "/data", *args)[0] == 0
    return list(told[0])


def test_a_daemon_goes_on_without_a_misspelt_setting_and_is_told(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings"
    settings.write_text("BUCKET_NAME=file:///b\nCASSBACKUP_TREADS=4\nexport CASSBACKUP_HEARTBEAT=5m\n")
    told = problems_of(monkeypatch, cli)
    assert told[0].endswith("systemd does not read 'export CASSBACKUP_HEARTBEAT=5m' as NAME=value")
    assert told[1].endswith("there is no setting CASSBACKUP_TREADS, did you mean CASSBACKUP_THREADS?")
    assert "CASSBACKUP_TREADS" in complaint(cli("list")) or "HEARTBEAT" in complaint(cli("list"))


@pytest.mark.parametrize("name", ["CASSBACKUP_EXCLUDE_TABEL", "CASSBACKUP_PATH", "CASSBACKUP_PREFIXX"])
def test_a_daemon_does_not_guess_what_it_is_to_store(cli: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "settings").write_text(f"BUCKET_NAME=file:///b\n{name}=x\n")
    assert f"there is no setting {name}" in complaint(cli("watch", "/data"))


def test_kubernetes_may_set_variables_that_begin_like_ours(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CASSBACKUP_SERVICE_HOST", "CASSBACKUP_PORT_9108_TCP_ADDR"):
        os.environ[name] = "10.0.0.1"
    assert problems_of(monkeypatch, cli, "--bucket", "file:///b") == []
    os.environ["CASSBACKUP_TREADS"] = "4"
    assert "did you mean CASSBACKUP_THREADS?" in problems_of(monkeypatch, cli, "--bucket", "file:///b")[0]
    assert "did you mean CASSBACKUP_THREADS?" in cli("list", "--bucket", "file:///b")[2]


def settled(monkeypatch: pytest.MonkeyPatch, cli: Any, *args: object) -> cassbackup.WatchOptions:
    found: list[cassbackup.WatchOptions] = []

    def watch(options: cassbackup.WatchOptions, environ: object) -> int:
        """Watch."""
        found.append(options)
        return 0

    monkeypatch.setitem(COMMANDS, "watch", COMMANDS["watch"]._replace(run=watch))
    done = cli("watch", "/data", *args)
    assert done[0] == 0, done
    return found[0]


def test_a_flag_beats_the_environment_that_the_file_and_that_the_default(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other"
    file.write_text('# a comment\nBUCKET_NAME="s3://from-file"\nREGION=file-region\nCASSBACKUP_THREADS=3\nAWS_X=1\n')
    os.environ.update(REGION="env-region", CASSBACKUP_THREADS="4", CASSBACKUP_KEYSPACE="ks1 ks2", AWS_Y="env")
    options = settled(
        monkeypatch, cli, "--config", file, "--threads", "5", "--exclude-tag", "a", "--exclude-tag", "b c"
    )
    assert (options.bucket, options.store.region, options.store.threads) == ("s3://from-file", "env-region", 5)
    assert (options.keyspace, options.exclude_tag) == (("ks1", "ks2"), ("a", "b c"))
    assert (options.min_free, options.max_pinned, options.incomplete_after) == (0.05, 0.1, 60)
    assert options.store.max_bandwidth == 50 << 20
    assert (os.environ["AWS_X"], os.environ["AWS_Y"]) == ("1", "env")
    assert settled(monkeypatch, cli, "--keyspace", "x").keyspace == ("x",)
    # `snapshot --prefix ""` may start a process, which gets its flags by the environment.
    file.write_text("BUCKET_NAME=s3://from-file\nCASSBACKUP_PREFIX=from-file\n")
    assert settled(monkeypatch, cli, "--config", file).prefix == "from-file"
    os.environ["CASSBACKUP_PREFIX"] = ""
    assert settled(monkeypatch, cli, "--config", file).prefix == ""


def test_a_settings_file_that_is_named_must_be_there(cli: Any) -> None:
    assert "/no/such/file cannot be read" in complaint(cli("status", "--config", "/no/such/file"))


def as_nobody(script: Path, tmp_path: Path) -> list[str]:
    """Return a command that runs the program as a user without any rights; skip where that cannot be."""
    become = nobody()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o755 != 0o755 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    copy = tmp_path / script.name
    shutil.copy(script, copy)
    copy.chmod(0o644)
    return [*become, sys.executable, str(copy)]


def run_as_nobody(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    env, limit = clean_environ(home, {}), COMMAND_TIMEOUT_S
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit, env=env, cwd="/")


@pytest.mark.parametrize(
    ("locked", "said"), [("settings", "cannot be read by user 65534"), ("state", "state directory")]
)
def test_what_may_not_be_read_or_written_is_named_with_exit_2(
    script: Path, tmp_path: Path, home: Path, locked: str, said: str
) -> None:
    command, root = as_nobody(script, tmp_path), tmp_path / "room"
    for folder in ("data/ks/t-1", "bucket", "state"):
        (root / folder).mkdir(parents=True)
    (root / "data/ks/t-1/nb-1-big-Data.db").touch()
    (root / "settings").touch()
    for path in [root, *root.rglob("*")]:
        os.chown(path, 65534, 65534)
    os.chown(root / locked, 0, 0)
    (root / locked).chmod(0o600 if locked == "settings" else 0o755)
    options = ["--state-dir", f"{root}/state", "--bucket", f"file://{root}/bucket", "--name", "n", "--once"]
    done = run_as_nobody([*command, "--config", f"{root}/settings", "watch", f"{root}/data", *options], home)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_state_directory_that_root_has_used_once_is_told_with_its_cure(
    script: Path, tmp_path: Path, home: Path
) -> None:
    command, root = as_nobody(script, tmp_path), tmp_path / "room"
    for folder in ("data/ks/t-1", "state"):
        (root / folder).mkdir(parents=True)
    for path in [root, *root.rglob("*")]:
        os.chown(path, 65534, 65534)
    (root / "state/lock").touch()
    done = run_as_nobody([*command, "watch", f"{root}/data", "--state-dir", f"{root}/state", "-b", "s3://b"], home)
    assert (done.returncode, "chown -R 65534:65534" in done.stderr) == (1, True), done.stderr


def test_a_node_that_nothing_tells_from_another_claims_no_name(
    run_cassbackup: Run, node: Node, tmp_path: Path, tmp_bucket: FileBucket
) -> None:
    """A container has no machine id, and may start before Cassandra has made its first data directory."""
    node.table("ks1", "users").flush()
    hide = 'mount --bind /dev/null /etc/machine-id || exit 99; exec "$@"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", hide, "-", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    aside, where = tmp_path / "aside", node.data_dirs[0]
    options = ("--once", "--name", "n", "--state-dir", tmp_path / "state", "--bucket", tmp_bucket.target)

    def watch(code: int) -> str:
        return run_cassbackup(
            "watch", where, *options, check=code, within=["unshare", "-rm", "sh", "-c", hide, "-"]
        ).stderr

    where.rename(aside)
    where.mkdir()
    assert "no /etc/machine-id" in watch(1)
    assert list(tmp_bucket.keys()) == []
    where.rmdir()
    aside.rename(where)
    watch(0)
    where.rename(aside)
    where.mkdir()
    assert "no /etc/machine-id" in watch(1)


@pytest.mark.parametrize("whose", ["a link", "another user's"])
def test_a_state_directory_of_somebody_else_or_behind_a_link_is_not_used(
    cli: Any, node: Node, tmp_path: Path, whose: str
) -> None:
    node.table("ks1", "users").flush()
    state, place = tmp_path / "state", tmp_path / "place"
    place.mkdir()
    if whose == "a link":
        state.symlink_to(place)
    else:
        if os.geteuid():
            pytest.skip("needs root to give a directory away")
        state.mkdir()
        os.chown(state, 4711, 4711)
    line = ("watch", *node.data_dirs, "--once", "--bucket", f"file://{tmp_path}/bucket", "--name", "n")
    assert "is a link, or another user's" in complaint(cli(*line))
    assert list(place.iterdir()) == []


def test_the_services_key_file_is_used_unless_another_is_named(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/aws").write_text("[default]\n")
    settled(monkeypatch, cli, "--bucket", "gs://b")
    assert "AWS_SHARED_CREDENTIALS_FILE" not in os.environ
    settled(monkeypatch, cli, "--bucket", "s3://b")
    assert os.environ["AWS_SHARED_CREDENTIALS_FILE"] == f"{tmp_path}/keys/aws"
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ
    os.environ.update(AWS_SHARED_CREDENTIALS_FILE="/mine")
    settled(monkeypatch, cli, "--bucket", "s3://b")
    assert os.environ["AWS_SHARED_CREDENTIALS_FILE"] == "/mine"
    del os.environ["AWS_SHARED_CREDENTIALS_FILE"]
    settled(monkeypatch, cli, "--bucket", "s3://b", "-k", "mine", "-s", "secret")
    assert "AWS_SHARED_CREDENTIALS_FILE" not in os.environ


# ------------------------------------------------------------------------------------------------------------
# Whatever somebody writes: a sentence, never a traceback

BAD: dict[str, list[str]] = {  # by metavar: what no option of this kind takes
    "ADDR": ["9108", ":99999", "[::1:9108", ":", "host:port"],
    "BUCKET": ["s3//b", "/tmp/b", "ftp://b", "s3://", "file://relative", "://", "file:/tmp/b"],
    "CMD": ["'", " ", 'nodetool "'],
    "COUNT": ["0", "257", "-1", "many", "1.5", "9" * 5000],
    "DURATION": ["60", "1y", "-5m", "30 days", "1e9d", "9" * 500 + "d", "m"],
    "KIND": ["rot13", "aes256"],
    "NUMBER": ["0", "-3", "1.5", "seven", "9" * 30],
    "PART": ["10", "100%", "-1%", "%"],
    "RATE": ["fast", "-1", "50X", "9" * 500],
    "REGEX": ["(", "*", "[a", "a{2,1}", "(?P<", "a{99999999999}"],
    "TIME": ["yesterday", "25:00", "2026-02-30", "9999-12-31T23:59-14:00", "0001-01-01", "20:24:xx"],
}
GOOD: dict[str, list[str]] = {
    "ADDR": [":9108", "[::1]:9108"],
    "COUNT": ["1", "8"],
    "DURATION": ["90s", "1.5h", "0d", "99999d"],
    "KIND": ["AES256", "aws:kms"],
    "NUMBER": ["1", "30", "9999"],
    "PART": ["5%", "0%"],
    "RATE": ["0", "50M", "1.5 GiB"],
    "REGEX": ["commitlog", "", "a|b"],
    "TIME": ["2026-11-21T20:24Z", "20:24", "1970-01-01", "9999-12-31"],
}
TEXTS = [
    *(
        "",
        " ",
        "x",
        "a b",
        "é",
        "\udcff\udc80",
        "%s%n%",
        "../../x",
        "-",
        "--",
        "'",
        '"x',
        "\\",
        "$(id)",
        "\x1b[2J",
        "a\nb",
    ),
    *("[", "*", "{}", "0", "x" * 5000, "/dev/null/x", "/", ".", "http://127.0.0.1:1", "daily@", "@", "ks.t.u", "node1"),
]
LINES = [
    *("export A=b", "=", "A", "1A=b", "A='", 'A="x', "CASSBACKUP_TREADS=1", "CASSBACKUP_=", "BUKET_NAME=x", "# x", ";"),
    *("A=\0b", "CASSBACKUP_PREFIX=\0", "\0", "\udcff=\udcfe", "CASSBACKUP_SERVICE_HOST=x", "A = b # c", "\x85"),
]


class Mess:
    """One call of the program as nobody should write it: words, environment, settings file."""

    def __init__(self, chance: random.Random, name: str, environ: dict[str, str]) -> None:
        self.chance, self.name = chance, name
        self.words, self.environ, self.lines = list[str](), dict(environ), list[str]()
        self.is_bad = chance.random() < 0.5  # one thing at least is wrong, so that nothing but exit 2 will do
        options = [one for one in COMMANDS[name].options if one.key not in ("config", "into", "data_dir")]
        chance.shuffle(options)
        if self.is_bad:
            wrong = next(one for one in options if one.metavar in BAD)
            options.remove(wrong)
            self.give(wrong, chance.choice(BAD[wrong.metavar]))
        for option in options[: chance.randrange(5)]:
            if option.metavar != "BUCKET":
                self.give(option, chance.choice(GOOD.get(option.metavar, TEXTS if option.metavar else ["yes"])))
        self.lines += chance.sample(LINES, chance.choice([0, 0, 0, 1, 3]))
        chance.shuffle(self.lines)
        if chance.random() < 0.1:
            self.words.insert(chance.randrange(len(self.words) + 1), chance.choice(["--no-such", "-Z", *TEXTS]))
        self.words.insert(0, name)

    def give(self, option: cassbackup.Option, text: str) -> None:
        """Write a value for an option as a flag, into the environment or into the file."""
        places = ["flag", "environment", "file"] if option.variable and text else ["flag"]
        place = self.chance.choice(places)
        if place == "environment":
            self.environ[option.variable] = text
        elif place == "file" and not set("'\"\\\n") & set(text) and option.variable not in self.environ:
            self.lines.append(f"{option.variable}={text}")
        elif not option.flags.startswith("-"):
            self.words.append(text)
        elif option.metavar:
            self.words.append(f"{option.flags.split()[0]}={text}")
        else:
            self.words.append(option.flags.split()[0])


@pytest.fixture
def harmless(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Keep a mess from doing more than to be read, and return the environment of each."""
    patient = cassbackup.Patient

    def watch(options: cassbackup.WatchOptions, environ: dict[str, str]) -> int:
        """Watch."""
        cassbackup.data_directories(options.paths)
        cassbackup.identify(options.bucket, options.prefix, options.name, options.store.region, environ, None)
        cassbackup.open_store(options.bucket, options.store, new=True)
        return 0

    def doctor(options: cassbackup.DoctorOptions) -> cassbackup.Answer:
        """Check."""
        cassbackup.open_bucket(options, new=True)
        return cassbackup.Answer(0, {}, "")

    monkeypatch.setattr(cassbackup, "detect_cloud", lambda environ: None)
    monkeypatch.setattr(cassbackup, "Patient", lambda store, patience_s: patient(store, 0.0))
    for name, stand_in in (("watch", watch), ("doctor", doctor)):
        monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(run=stand_in))
    (tmp_path / "a/b/c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b/c")
    files = {"owner.json": b'{"version": 2, "id": "x"}', "heartbeat/20261101T010000.000000Z.json": b"{}"}
    for folder in ("ks/t-1/snapshots/daily/20261101T010000.000000Z", "ks/t-1/backups"):
        files[f"{folder}/20261101T010000.000000Z-complete-10-2048.json"] = b"{}"
    for name, body in files.items():
        path = tmp_path / "bucket/node1.listings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "BUCKET_NAME": f"file://{tmp_path}/bucket",
        "CASSBACKUP_NAME": "node1",
        "CASSBACKUP_INTO": "into",
        "CASSBACKUP_NODETOOL": "/nonexistent/nodetool",
        "CASSBACKUP_CONFIG": str(tmp_path / "settings"),
    }


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.by_hand) for seed in range(2, 12))])
def test_whatever_is_written_ends_with_a_sentence_and_what_is_wrong_with_exit_2_p8(
    cli: Any, harmless: dict[str, str], tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        mess = Mess(chance, chance.choice(list(COMMANDS)), harmless)
        (tmp_path / "settings").write_text("\n".join(mess.lines), errors="surrogateescape")
        os.environ.clear()
        os.environ.update(mess.environ)
        told = f"{mess.words} {mess.environ} {mess.lines}"
        try:
            code, shown, said = cli(*mess.words)
        except Exception as error:
            raise AssertionError(told) from error
        assert code in ((2,) if mess.is_bad else (0, 1, 2, 3)), (told, shown, said)
        assert "Traceback" not in said, (told, said)
        assert code == 0 or shown or "cassbackup: " in said, told
        assert code != 2 or not shown, told


# ------------------------------------------------------------------------------------------------------------
# The end of a command


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), BrokenPipeError(), KeyboardInterrupt()])
def test_no_error_of_the_machine_is_a_traceback(
    cli: Any, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def run(argv: object, environ: object) -> int:
        raise raised

    monkeypatch.setattr(cassbackup, "run", run)
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    code, told, said = cli("list")
    assert (code, told) == ({OSError: 1, BrokenPipeError: 141, KeyboardInterrupt: 130}[type(raised)], "")
    assert said == ("cassbackup: [Errno 28] No space left on device\n" if type(raised) is OSError else "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_whoever_starts_us_has_closed_is_no_reason_to_fail(
    scene: Scene, node: Node, script: Path, home: Path, closed: str
) -> None:
    node.table("ks1", "users").flush()
    scene.once(*node.data_dirs)
    words = [sys.executable, str(script), "list", "--bucket", scene.bucket.target]
    line = f"{shlex.join(words)} {closed}"
    assert subprocess.run(["sh", "-c", line], env={"HOME": str(home)}, check=False).returncode == 0


def test_a_reader_that_has_enough_is_told_nothing(scene: Scene, script: Path, home: Path) -> None:
    scene.bucket.put("node1.listings/owner.json", b'{"version": 2}')
    command = f"{sys.executable} {script} list --json --bucket {scene.bucket.target} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=clean_environ(home, {}), check=False
    )
    assert (done.returncode in (0, 141), done.stderr) == (True, "")
    command = f"{sys.executable} {script} --help > /dev/full"
    buffered = clean_environ(home, {"PYTHONUNBUFFERED": ""})  # then the rest fails once more at the interpreter's end
    full = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, env=buffered)
    assert (full.returncode, "No space left" in full.stderr, "Traceback" in full.stderr) == (1, True, False)


def test_a_terminal_that_cannot_spell_a_name_is_no_reason_to_fail(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("наш-снимок")
    scene.once(*node.data_dirs)
    done = scene.run("list", "--bucket", scene.bucket.target, env={"PYTHONIOENCODING": "ascii"}, check=0)
    assert r"\u043d\u0430\u0448-" in done.stdout


def test_a_status_of_nobody_is_no_success(cli: Any, tmp_path: Path) -> None:
    """P8: signals are true."""
    code, told, said = cli("status", "--state-dir", tmp_path, "--json")
    assert (code, said) == (3, "")
    assert "no daemon runs" in json.loads(told)["behind"][0]


NOW = 1_795_292_640.0
WELL: dict[str, Any] = {
    "now": NOW,
    "lag_s": 3.0,
    "started": NOW - 7200,
    "scanned": NOW - 60,
    "reconcile_s": 60.0,
    "absent": {},
    "lost": [],
    "incomplete": [],
    "refused": [],
    "bad_objects": 0,
    "errors": {},
    "failures": {},
    "unmatched": [],
    "problems": [],
    "tables": {
        "ks1/users-1": {"taken": cassbackup.utc(NOW - 3600), "oldest_data": NOW - 90 * 86400},
        "ks1/new-2": {"taken": None, "oldest_data": NOW - 3600},  # there was nothing to take a snapshot of
        "ks1/empty-3": {"taken": None, "oldest_data": None},
    },
}


def test_a_daemon_that_is_well_is_not_behind() -> None:
    assert why_behind(WELL, StatusOptions("", False, 900.0, 26 * 3600.0)) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lag_s": 1000.0}, "the oldest unlisted file was found 1000 s ago (see --max-lag)"),
        ({"scanned": NOW - 1000}, "no scan of everything has ended for 1000 s"),
        ({"absent": {"/data": "it is empty"}}, "data directory away: /data (it is empty)"),
        ({"lost": ["a", "b", "c"]}, "lost until the next complete snapshot: a and 2 more"),
        ({"incomplete": ["ks1/users-1"]}, "listed incomplete until the next complete snapshot: ks1/users-1"),
        ({"refused": ["/data/x"]}, "not stored, see the log: /data/x"),
        ({"bad_objects": 2}, "found bad in the bucket by verify: 2 objects"),
        ({"errors": {"put": {"error": "403", "since": NOW}}}, "failing: put (403)"),
        ({"failures": {"ks1/users": "too large"}}, "not stored: ks1/users (too large)"),
        ({"unmatched": ["--keyspace shop,x"]}, "filter that matches nothing: --keyspace shop,x"),
        ({"problems": ["there is no setting X"]}, "settings: there is no setting X"),
        ({"tables": {"k/t": {"taken": None, "oldest_data": NOW - 27 * 3600}}}, "no complete snapshot within"),
        (
            {"tables": {"k/t": {"taken": cassbackup.utc(NOW - 27 * 3600), "oldest_data": NOW - 99 * 3600}}},
            "no complete snapshot within --max-age: k/t",
        ),
    ],
)
def test_whatever_is_wrong_with_a_daemon_is_behind_and_named(wrong: dict[str, Any], said: str) -> None:
    """P8: a daemon that protects nothing is red, not idle."""
    (why,) = why_behind({**WELL, **wrong}, StatusOptions("", False, 900.0, 26 * 3600.0))
    assert why.startswith(said)


def test_a_reply_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    """As of a daemon that is killed while it tells of thousands of tables."""
    lock = cassbackup.lock_file(f"{tmp_path}/lock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/socket")
        listener.listen()
        replies = [b"", b'{"lag_s": 1', b'{"lag_s": 1}', b'{"lag_s": 12}\n']

        def answer() -> None:
            for reply in replies:
                asker, _ = listener.accept()
                with asker:
                    asker.recv(1000)
                    asker.sendall(reply)

        daemon = threading.Thread(target=answer)
        daemon.start()
        assert cassbackup.ask_daemon(str(tmp_path), {"do": "status"}, 20.0) == {"lag_s": 12}
        daemon.join()
    os.close(lock)


def test_status_waits_until_what_is_there_is_listed(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs)
    node.snapshot("daily")
    done = scene.run("status", "--wait", "--state-dir", scene.state, check=0)
    assert scene.listings("snapshot") != []
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (told["node"], told["bucket"]) == ("node1", scene.bucket.target)
    assert told["pending"].startswith("0 units, 0 files, 0 B")


@pytest.mark.slow
def test_a_secret_is_never_shown_or_logged(scene: Scene, node: Node) -> None:
    canary = "AKIACANARYCANARY"
    node.table("ks1", "users").flush()
    secret = ("-k", canary, "-s", canary)
    done = scene.run("doctor", *node.data_dirs, *secret, "--bucket", scene.bucket.target, "--name", "node1")
    assert canary not in done.stdout + done.stderr
    done = scene.once(*node.data_dirs, args=(*secret, "-v"))
    assert canary not in done.stdout + done.stderr
    assert "every user of this machine can read keys" in done.stderr


def test_each_event_is_one_line_whatever_a_file_is_called(scene: Scene, node: Node) -> None:
    backups = node.table("ks1", "users").directories()[0] / "backups"
    backups.mkdir()
    os.mkfifo(os.fsencode(backups) + b"/two\nlines level=ERROR forged=\xff\x1b[31m")
    (backups / "new\nline.db").write_bytes(b"x")
    done = scene.once(*node.data_dirs, args=("-v",), check=None)
    rule = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (debug|info|warning|error|critical) [!-~ ]+")
    assert [line for line in done.stderr.splitlines() if not rule.fullmatch(line)] == []
    assert "two%0Alines" in done.stderr


@pytest.mark.slow
def test_lines_carry_priorities_where_journald_reads_them(
    script: Path, home: Path, tmp_path: Path, node: Node, tmp_bucket: FileBucket
) -> None:
    node.table("ks1", "users").flush()
    options = ["--bucket", tmp_bucket.target, "--state-dir", str(tmp_path / "state"), "--name", "node1", "--once"]
    command = [sys.executable, str(script), "watch", *map(str, node.data_dirs), *options, "-k", "key", "-s", "secret"]
    log = tmp_path / "journal"
    for stream, marked in (("{0.st_dev}:{0.st_ino}", True), ("1:1", False)):
        with log.open("wb") as stderr:
            env = clean_environ(home, {"JOURNAL_STREAM": stream.format(os.fstat(stderr.fileno()))})
            subprocess.run(command, check=True, env=env, stderr=stderr, timeout=COMMAND_TIMEOUT_S)
        starts = {line[:3] for line in log.read_text().splitlines()}
        assert starts == {"<6>", "<4>"} if marked else not {one for one in starts if one.startswith("<")}


# ------------------------------------------------------------------------------------------------------------
# Stores that cannot be used


@pytest.mark.parametrize("kind", ["moto", "gcs"])
def test_a_bucket_that_is_not_there_is_named(request: pytest.FixtureRequest, run_cassbackup: Run, kind: str) -> None:
    bucket: Bucket = request.getfixturevalue(kind)
    done = run_cassbackup("list", "--bucket", f"{bucket.scheme}://no-such-bucket-here", env=bucket.environ, check=1)
    assert "no-such-bucket-here" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_credentials_and_none_are_told_apart(rclone: Bucket, run_cassbackup: Run) -> None:
    wrong = {**rclone.environ, "AWS_ACCESS_KEY_ID": "WRONGWRONGWRONGWRONG"}
    assert "check the keys" in run_cassbackup("list", "--bucket", rclone.target, env=wrong, check=1).stderr
    none = {name: value for name, value in rclone.environ.items() if "KEY" not in name}
    assert "credential" in run_cassbackup("list", "--bucket", rclone.target, env=none, check=1).stderr.lower()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moto", "gcs"])
def test_with_a_ca_file_all_is_stored_listed_verified_and_restored_over_tls(
    request: pytest.FixtureRequest,
    scene: Scene,
    node: Node,
    secured: Callable[[Bucket], FaultProxy],
    authority: Authority,
    stranger: Authority,
    kind: str,
) -> None:
    scene.bucket = request.getfixturevalue(kind)
    front = secured(scene.bucket)
    scene.environ = scene.bucket.through(front.url)
    trusting, users, into = ("--ca-file", authority.file), node.table("ks1", "users"), scene.at / "restored"
    users.flush(size=9 << 20)
    node.snapshot("daily")
    scene.once(*node.data_dirs, args=trusting)
    scene.assert_all_is_listed(node.history)
    assert count(front.trace, "POST", r"\?uploads|uploadType=resumable") > 0
    where = ("--bucket", scene.bucket.target, "--node", "node1", "--state-dir", scene.at / "none")
    for command in (("list",), ("verify", "--deep"), ("restore", "--tag", "daily", "--into", into)):
        scene.run(*command, *where, *trusting, env=scene.environ, check=0)
    before = len(front.trace)
    strange = ("--ca-file", stranger.file) if kind == "gs" else ()
    done = scene.run("list", *where, *strange, env=scene.environ, check=1, timeout=100)
    assert "certificate" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(front.trace) == before
