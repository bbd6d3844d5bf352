"""Rows that no engine and no other test has: each by its number in rows.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
from conftest import REPOSITORY, Run, clean_environ
from faultproxy import Delay, FaultProxy, Throttle, s3_error
from scene import nobody, note
from servers import FileBucket
from tree import Node

import cassbackup
from faults.kit import ALL, Process, Program, World, run_all, sample, score
from faults.s3 import StrictS3
from faults.test_matrix import recorded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def world(tmp_path: Path, program: Program) -> World:
    return World(tmp_path / "world", program)


class Remote(NamedTuple):
    """A world before an S3, and the proxy between."""

    world: World
    proxy: FaultProxy


@pytest.fixture
def remote(tmp_path: Path, program: Program) -> Iterator[Remote]:
    with StrictS3() as bucket, FaultProxy(bucket.url) as proxy:
        world = World(tmp_path / "remote", program, bucket)
        world.environ = bucket.through(proxy.url)
        yield Remote(world, proxy)


def start(world: World, *more: object) -> Process:
    """Start a daemon and wait until it answers."""
    process = world.watch(*more)
    world.until(lambda: world.status().get("pid") == process.pid, "it answers")
    return process


# ------------------------------------------------------------------------------------------------------------
# Crash


@pytest.mark.skipif(not ALL, reason="it waits for the end of slow uploads: only in make test-faults")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_amid_an_upload_ends_it_in_good_order_and_a_second_one_at_once_row4(
    remote: Remote, number: signal.Signals
) -> None:
    world, proxy = remote
    rule = proxy.on("PUT", r"/bucket/node1/", Delay(3.0, "sent"), count=None)
    process = start(world)
    world.populate()
    world.until(lambda: rule.hits, "an upload is under way")
    process.signal(number)
    time.sleep(0.3)
    assert process.poll(), "what is under way may end"
    process.signal(number)
    assert process.wait(2) == 128 + number
    assert world.judge() == []
    process = start(world)
    world.until(lambda: rule.hits > 8, "it goes on")
    process.signal(number)
    assert process.wait(35) == 0
    proxy.heal()
    assert world.once() == 0
    assert world.judge(done=True) == []


def test_without_memory_it_ends_without_a_false_done_and_the_next_run_stores_all_row5(
    tmp_path: Path, program: Program, run_cassbackup: Run
) -> None:
    if not shutil.which("prlimit"):
        pytest.skip("not run: no prlimit")

    hung = []

    def run(mib: int) -> list[str]:
        world = World(tmp_path / f"{mib}", program)
        world.populate(20_000_000)
        args = ["watch", "--once", *world.node.data_dirs, *world.args("--name", "node1")]
        try:
            code = run_cassbackup(*args, within=("prlimit", f"--as={mib << 20}"), timeout=150).returncode
        except subprocess.TimeoutExpired:
            hung.append(mib)
            code = -signal.SIGKILL
        problems = world.judge(done=code == 0)
        problems += ["FALSE DONE"] * bool(problems and code == 0)
        again = world.once()
        return problems + [f"exit {again}"] * bool(again) + world.judge(done=True)

    cases = sample(range(40, 440, 20), 4)
    assert run_all(cases, run) == []
    # CPython waits for ever for a thread that had no memory to say that it has begun (gh-140746): once in some hundred
    # runs. Of a daemon systemd's watchdog makes an end.
    assert len(hung) <= 1, hung
    score(fault_cases=len(cases))


# ------------------------------------------------------------------------------------------------------------
# Ledger and local disk


def test_a_ledger_of_another_bucket_is_not_believed_and_all_files_reach_the_new_one_row8(world: World) -> None:
    world.populate()
    assert world.once() == 0
    world.bucket, world.before = FileBucket(world.at / "other"), {}
    assert world.once() == 0
    assert world.judge(done=True) == []


@pytest.mark.parametrize(("component", "code"), [("Data.db", 3), ("TOC.txt", 0), ("Statistics.db", 3)])
def test_an_sstable_of_which_one_file_could_not_be_pinned_becomes_complete_once_it_can_row22(
    world: World, component: str, code: int
) -> None:
    """Without Data.db at first: only when the earlier TOC.txt is looked up is it known what else there should be."""
    sstable = world.node.table("ks1", "users").flush()
    late = sstable.home / "backups" / f"{sstable.stem}-{component}"
    late.unlink()
    assert world.once() == code
    os.link(sstable.path(component), late)
    assert world.once() == 0
    states = {found.state for found in oracle.listings(world.bucket.objects(), "node1")}
    assert states == ({"incomplete", "complete"} if code else {"complete"}), "Cassandra needs no TOC.txt"
    assert world.judge(done=True) == []


class DiskFault(NamedTuple):
    """The n-th boundary, and all of its kind after it, fail with an error."""

    what: str
    number: int
    error: str


def test_a_local_disk_that_fails_makes_no_false_done_and_all_is_stored_once_it_works_row9_row22(
    tmp_path: Path, shimmed: Program
) -> None:
    def scene(case: DiskFault | None, act: Callable[[World], list[str]]) -> list[str]:
        with StrictS3() as bucket:
            world = World(tmp_path / (f"{case.what}-{case.number}-{case.error}" if case else "first"), shimmed, bucket)
            world.populate()
            found = act(world)
            shutil.rmtree(world.at)
            return found

    names: list[str] = []

    def record(world: World) -> list[str]:
        log = world.at / "boundaries"
        assert world.once(env={"BOUNDARY_LOG": str(log)}) == 0
        names.extend(line.split()[0] for line in log.read_text().splitlines())
        assert len(recorded(log)) == len(names)
        return world.judge(done=True)

    assert scene(None, record) == []
    cases = []
    for what, errors in (
        ("link", ("ENOSPC", "EMLINK", "EROFS", "EIO")),
        ("unlink", ("EIO", "EROFS")),
        ("rename", ("ENOSPC", "EIO")),
        ("mkdir", ("ENOSPC", "EROFS")),
        ("fsync", ("EIO", "ENOSPC")),
        ("ledger", ("ENOSPC", "EIO", "EROFS")),
    ):
        places = [number + 1 for number, name in enumerate(names) if name == what]
        some = {places[0], places[len(places) // 2], places[-1]}
        cases += [DiskFault(what, number, error) for number in sorted(some) for error in errors]

    def run(case: DiskFault) -> list[str]:
        def fail(world: World) -> list[str]:
            code = world.once(env={"BOUNDARY_FAIL": f"{case.number}:{getattr(errno, case.error)}"})
            problems = [one for one in world.judge(done=code == 0) if not one.endswith("a pin is left")]
            problems += ["FALSE DONE"] * bool(problems and code == 0)
            again = world.once()
            return problems + [f"exit {again}: {world.log()[-900:]}"] * bool(again) + world.judge(done=True)

        return scene(case, fail)

    some = sample(cases, 8)
    problems = run_all(some, run)
    score(fault_cases=len(some))
    assert problems == []


# ------------------------------------------------------------------------------------------------------------
# Store, network, time


def test_what_is_not_listed_yet_stays_pinned_and_outlives_its_clearing_and_a_kill_row17(remote: Remote) -> None:
    world, proxy = remote
    rule = proxy.on("PUT", r"\.listings/ks1", s3_error(500, "InternalError"), count=None)
    process = start(world)
    world.populate()
    world.until(lambda: rule.hits >= 5, "listings are tried")
    assert world.unheld(world.bucket.objects()) == []
    world.node.clear()
    process.kill()
    proxy.heal()
    assert world.once() == 0
    assert world.judge(done=True) == []


@pytest.mark.parametrize("ahead_s", [-1200, 1200, -40 * 86400, 13 * 365 * 86400])
def test_a_clock_that_is_wrong_and_put_right_loses_nothing_row34(
    tmp_path: Path, shimmed: Program, ahead_s: int
) -> None:
    world = World(tmp_path / "world", shimmed)
    world.populate()
    assert world.once(env={"BOUNDARY_CLOCK": str(ahead_s)}) == 0
    assert world.judge(done=True) == []
    world.node.clear()
    for table in world.node.tables:
        table.flush(size=200)
    world.node.snapshot("weekly")
    assert world.once() == 0
    assert world.judge(done=True) == []
    assert world.command("verify", "--deep").wait() == 0
    for tag in ("daily", "weekly"):
        assert world.command("restore", "--tag", tag, "--into", world.at / tag).wait() == 0
    assert world.command("prune", "--keep-last", "1", "--confirm").wait() in {0, 1}
    assert world.judge() == []


def test_a_clock_that_the_store_refuses_is_named_row34(remote: Remote) -> None:
    world, proxy = remote
    world.populate()
    proxy.on("PUT", "", s3_error(403, "RequestTimeTooSkewed", "The difference is too large."), count=None)
    assert world.once() == 1
    assert "set the clock of this machine" in world.log()
    proxy.heal()
    assert world.once() == 0
    assert world.judge(done=True) == []


def test_a_slow_network_costs_no_memory_and_trips_nothing_row36(remote: Remote) -> None:
    world, proxy = remote
    process = start(world)
    table = world.node.table("ks1", "users")
    proxy.on("PUT", "", Throttle(4_000_000), count=None)
    for _ in range(6):
        table.flush(size=12_000_000)
    most = 0
    world.until(lambda: world.status()["pending"]["units"], "it has begun")
    while not world.is_settled():
        assert process.poll(), world.log()[-2000:]
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max(most, int(status.split("VmRSS:")[1].split()[0]))
        time.sleep(0.2)
    process.kill()
    assert most < 200 << 10  # KiB: the program with boto3 is 60 MiB, five parts under way are 40
    assert world.judge(done=True) == []


@pytest.mark.parametrize("size", [0, 1])
def test_a_disk_that_goes_amid_a_put_gets_nothing_at_its_mount_point_and_is_waited_for_row32(
    tmp_path: Path, size: int
) -> None:
    class Going:
        """A source during whose reading, or asking for its size, the disk goes."""

        @property
        def size(self) -> int:
            if not size and root.exists():
                root.rename(tmp_path / "away")
            return 5

        def read(self, start: int, end: int) -> bytes:
            if root.exists():
                root.rename(tmp_path / "away")
            return b"12345"[start:end]

    root = tmp_path / "bucket"
    store = cassbackup.open_store(f"file://{root}", cassbackup.StoreOptions())
    store.put("node1/first", cassbackup.Body(b"x"))
    with pytest.raises(cassbackup.Unreachable, match="not there any more"):
        store.put("node1/a/b", Going())
    assert not root.exists()


def test_no_heartbeat_speaks_of_what_was_not_scanned_yet_p8(tmp_path: Path, shimmed: Program) -> None:
    with StrictS3() as bucket:
        world = World(tmp_path / "world", shimmed, bucket)
        world.populate()
        assert world.once() == 0
        known = set(bucket.store)
        world.node.snapshot("weekly")  # at a first start the pinner is waited for anyway
        began = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
        assert world.once(env={"BOUNDARY_SLEEP": "500"}) == 0  # jobs give way to the pinner for 2 s each: this is more
        beats = [
            json.loads(body) for key, body in bucket.objects().items() if "/heartbeat/" in key and key not in known
        ]
    assert beats != []
    assert [beat for beat in beats if beat["scanned"] < began] == []
    assert max(beat["listed_through"] for beat in beats) > began


# ------------------------------------------------------------------------------------------------------------
# Names and kinds


def test_what_may_not_be_read_is_red_and_stored_once_it_may_row41(
    tmp_path: Path, home: Path, run_cassbackup: Run
) -> None:
    become = nobody()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder not in (Path("/"), Path("/tmp")):
            folder.chmod(folder.stat().st_mode | 0o711)
    node = Node(tmp_path / "node")
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    closed = users.directories()[0] / "snapshots" / "daily"
    for place in ("bucket", "state"):
        (tmp_path / place).mkdir()
    subprocess.run(["chown", "-R", "65534:65534", node.root, tmp_path / "bucket", tmp_path / "state", home], check=True)
    args = ["watch", "--once", *node.data_dirs, "--bucket", f"file://{tmp_path}/bucket"]
    args += ["--state-dir", tmp_path / "state", "--name", "node1", "--incomplete-after", "1s"]
    bucket = FileBucket(tmp_path / "bucket")
    closed.chmod(0)
    done = run_cassbackup(*args, within=become)
    closed.chmod(0o755)
    assert done.returncode in {1, 3}, done.stderr
    assert "snapshots/daily" in done.stderr
    assert oracle.problems(bucket.objects(), "node1") == []
    run_cassbackup(*args, within=become, check=0)
    assert oracle.lost(node.history, bucket.objects(), "node1") == []


@pytest.mark.skipif(not ALL, reason="100,000 files: only in make test-faults")
def test_a_hundred_thousand_files_in_a_directory_are_pinned_within_a_minute_in_little_memory_row42(
    world: World,
) -> None:
    users = world.node.table("ks1", "users")
    users.flush()
    backups = users.directories()[0] / "backups"
    for number in range(100_000 // 8):
        for component in ("Data.db", "TOC.txt", *[f"{one}.db" for one in range(6)]):
            (backups / f"nb-{number + 10}-big-{component}").write_bytes(b"")
    began = time.monotonic()
    process = start(world)
    world.until(lambda: world.status()["scanned"], "all is pinned", 60)
    took = time.monotonic() - began
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.kill()
    assert took < 60
    assert int(status.split("VmHWM:")[1].split()[0]) < 300 << 10


# ------------------------------------------------------------------------------------------------------------
# Secrets and logs

CANARY = "AKIA7CANARY7CANARY7X"


def test_a_secret_is_in_no_output_no_file_and_no_argument_of_a_child_row49(remote: Remote) -> None:
    world, proxy = remote
    world.environ = {**world.environ, "AWS_ACCESS_KEY_ID": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    world.populate()
    proxy.on("PUT", "", s3_error(500, "InternalError"), nth=3, count=4)
    process = start(world, "-v")
    world.settle(process)
    said = repr(world.status())
    for proc in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said += proc.read_text(errors="replace")
        except OSError:
            continue
    process.kill()
    into = world.at / "into"
    for command in (["list", "--json"], ["verify", "-v"], ["restore", "--tag", "daily", "--into", into, "-v"]):
        running = world.command(*command)
        assert running.wait() == 0
        said += running.out()
    proxy.on("", "", s3_error(403, "InvalidAccessKeyId"), count=None)
    running = world.command("verify", "-v")
    assert running.wait() == 1
    said += running.out() + world.log()
    kept = [path for path in world.at.rglob("*") if path.is_file()]
    found = [path for path in kept if CANARY.encode() in path.read_bytes()]
    assert (CANARY in said, found) == (False, [])
    assert [key for key, body in world.bucket.objects().items() if CANARY.encode() in body] == []


def test_a_log_that_nobody_reads_any_more_ends_no_daemon_row50(
    tmp_path: Path, home: Path, node: Node, tmp_bucket: FileBucket
) -> None:
    args = ["watch", *node.data_dirs, "--bucket", tmp_bucket.target, "--state-dir", tmp_path / "state"]
    command = [sys.executable, str(REPOSITORY / "cassbackup.py"), *map(str, args), "--name", "node1", "-v"]
    read, write = os.pipe()
    process = subprocess.Popen(command, env=clean_environ(home, {}), stdin=subprocess.DEVNULL, stderr=write)
    os.close(read)
    os.close(write)
    try:
        users = node.table("ks1", "users")
        odd = users.directories()[0] / "backups" / "odd\nname.db"
        users.flush()
        odd.write_bytes(b"x")
        note(node.history, node, users, None, odd)
        deadline = time.monotonic() + 60
        while oracle.lost(node.history, tmp_bucket.objects(), "node1") and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert oracle.lost(node.history, tmp_bucket.objects(), "node1") == []


# What ruff's port of bandit finds, and why it is as it should be.
KNOWN = {
    "S103": "the status socket is for anyone; what else it does is refused to other users",
    "S311": "jitter, and ids that are no secrets",
    "S314": "what the store answers, as boto3 reads it; expat knows the bombs of XML by itself since 2.4.1",
    "S603": "nodetool and systemctl, by a list of arguments",
    "S607": "systemctl, by PATH",
    "S608": "three names of tables that stand beside the statement",
}


def test_bandit_finds_nothing_new() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "S", "--ignore", ",".join(KNOWN), "cassbackup.py"]
    if subprocess.run([*command[:3], "--version"], check=False, capture_output=True).returncode:
        pytest.skip("not run: no ruff here")
    done = subprocess.run([*command, "--isolated"], check=False, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout
