"""Engine D: a soak. Churn and random faults, then a moment of calm, again and again. Rows 3, 23, 36 and 51.

At each calm everything is listed within PATIENCE_S; memory, descriptors, threads, pins and the ledger do not grow with
time. SOAK_MINUTES says how long; `make test` does not soak.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
from conftest import REPOSITORY, Daemon, clean_environ
from faultproxy import LOST_ACK, SLOW_DOWN, Action, Cut, Delay, Drop, FaultProxy, Flip, Throttle, s3_error
from servers import FileBucket
from tree import Node, Table

from faults.kit import ALL, Process, Program, World, score
from faults.s3 import StrictS3

MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(int(MINUTES * 60) + 900)]
THREADS = 3 + 1 + 2 + 8 + 4  # loop, pinner and local disk; pins, urgent, bulk and large bodies
CALM_S = 12.0  # between two moments of calm
FAULTS: list[Callable[[], Action]] = [
    lambda: SLOW_DOWN,
    lambda: s3_error(500, "InternalError"),
    lambda: LOST_ACK,
    lambda: Drop("before"),
    lambda: Cut("request", 20),
    lambda: Cut("reply", 20),
    lambda: Flip(3),
    lambda: Delay(0.3),
    lambda: Throttle(20_000),
]


class Use(NamedTuple):
    """What a process uses, at a moment of calm."""

    rss_kib: int
    descriptors: int
    threads: int
    watches: int
    ledger: int


def use_of(process: Process, world: World) -> Use:
    """Ask the kernel."""
    proc = Path(f"/proc/{process.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    watches = sum(
        (proc / "fdinfo" / fd.name).read_text().count("inotify wd:") for fd in (proc / "fd").iterdir() if is_inotify(fd)
    )
    ledger = sum(path.stat().st_size for path in world.state.glob("ledger.db*"))
    return Use(int(status["VmRSS"].split()[0]), len(os.listdir(proc / "fd")), int(status["Threads"]), watches, ledger)


def is_inotify(fd: Path) -> bool:
    """Tell whether a descriptor is an inotify queue."""
    try:
        return "inotify" in os.readlink(fd)
    except OSError:
        return False


def churn(world: World, tables: list[Table], chance: random.Random) -> None:
    """Do something that Cassandra does."""
    table = chance.choice(tables)
    match chance.randrange(6):
        case 0 | 1:
            table.flush(size=chance.choice([50, 5_000, 100_000]))
        case 2:
            table.compact()
        case 3:
            table.rewrite_statistics()
        case 4:
            tag = f"tag{chance.randrange(3)}"
            if not any((folder / "snapshots" / tag).exists() for folder in table.directories()):
                table.snapshot(tag)
        case 5:  # only what the daemon holds may go
            if not world.unheld(world.bucket.objects()):
                world.node.clear(f"tag{chance.randrange(3)}")
                for folder in table.directories():  # an operator tidies backups/, where nothing else does
                    for path in [*folder.glob("backups/*-*"), *folder.glob("backups/.*/*")]:
                        path.unlink()


@pytest.mark.parametrize("path", ["event", "scan"])
def test_a_flush_is_listed_within_seconds_row15(tmp_path: Path, home: Path, tmp_bucket: FileBucket, path: str) -> None:
    """The lag from the last link to the listing, with inotify and without: the scorecard tells it."""
    within = without_inotify() if path == "scan" else []
    node, lags = Node(tmp_path / "node"), []
    table = node.table("ks1", "users")
    args = ["watch", *node.data_dirs, "--bucket", tmp_bucket.target, "--state-dir", tmp_path / "state"]
    command = [sys.executable, str(REPOSITORY / "cassbackup.py"), *map(str, args), "--name", "node1"]
    daemon = Daemon([*within, *command], clean_environ(home, {}), tmp_path / "log").start()
    try:
        daemon.wait_until(lambda: "storing node=" in daemon.log())
        for _ in range(40 if ALL else 5):
            time.sleep(random.Random(len(lags)).uniform(0, 1))
            table.flush(size=1000)
            began = time.monotonic()
            daemon.wait_until(lambda: not oracle.lost(node.history, tmp_bucket.objects(), "node1"), 60)
            lags.append(time.monotonic() - began)
        assert ("inotify has no room" in daemon.log()) == (path == "scan")
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    assert oracle.problems(tmp_bucket.objects(), "node1") == []
    score(**{f"lag_{path}": lags})


def without_inotify() -> list[str]:
    """Return what runs a command in a user namespace that has no inotify."""
    within = ["unshare", "-Ur", "sh", "-c", 'echo 0 >/proc/sys/user/max_inotify_instances && exec "$@"', "sh"]
    if subprocess.run([*within, "true"], check=False, capture_output=True).returncode:
        pytest.skip("not run: needs user namespaces with a writable max_inotify_instances")
    return within


def slope(values: list[int]) -> float:
    """Return by which part of itself a value grows from the first third of a soak to the last."""
    third = len(values) // 3
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    return last / first - 1 if first else 0.0


@pytest.mark.skipif(not MINUTES, reason="some minutes: make soak, or make test-faults")
def test_a_soak_under_faults_converges_at_each_calm_and_grows_nowhere_row51(tmp_path: Path, program: Program) -> None:
    chance = random.Random(os.environ.get("SOAK_SEED", "1"))
    uses: list[Use] = []
    began = time.monotonic()
    with StrictS3() as bucket, FaultProxy(bucket.url) as proxy:
        world = World(tmp_path / "world", program, bucket)
        world.environ = bucket.through(proxy.url)
        tables = [world.node.table("ks1", f"t{number}", ["by_x"] * (number % 2)) for number in range(4)]
        process = world.watch("--reconcile", "10s")
        world.until(world.status, "it answers")
        while time.monotonic() - began < MINUTES * 60:
            until = time.monotonic() + CALM_S
            while time.monotonic() < until:
                churn(world, tables, chance)
                if chance.random() < 0.3:
                    rule = chance.choice(["PUT", "PUT", "GET", "HEAD", "POST", ""])
                    proxy.on(rule, "", chance.choice(FAULTS)(), count=chance.choice([1, 2, 5]))
                if chance.random() < 0.02:
                    proxy.down()
                    time.sleep(chance.uniform(0.1, 2))
                    proxy.up()
                time.sleep(chance.uniform(0.02, 0.3))
            proxy.heal()
            world.settle(process, 200)  # a throttled body is given up after a minute, and sent again
            wrong = world.judge(done=True)
            score(lost=sum("LOST" in one for one in wrong), false_done=bool(wrong))
            assert wrong == []
            uses.append(use_of(process, world))
        assert process.poll()
        process.kill()
    minutes = (time.monotonic() - began) / 60
    score(soak_minutes=minutes)
    if minutes >= 2:
        of_all = dict(zip(Use._fields, zip(*uses, strict=True), strict=True))
        grown = {name: slope(list(values)) for name, values in of_all.items()}
        # Of twenty descriptors: each of some ten workers keeps a connection, once a fault has made it open one.
        limits = {"rss_kib": 0.25, "descriptors": 0.6, "watches": 0.6, "ledger": 1.5}
        assert [f"{name}: {of_all[name]}" for name, limit in limits.items() if grown[name] > limit] == []
        assert max(of_all["threads"]) <= THREADS, "a pool has a thread once it has needed it, and no more than it may"
