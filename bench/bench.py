"""Measure what the README claims. `make bench`, or `python bench/bench.py NAME ...` for some of them.

    pin       80,400 files of 200 tables at C speed: how long after the last link is the last one pinned, and how
              many are lost when the tag is cleared; beside it, in the same run, a watcher of Tablesnap's kind
    start     a start on 1,000,000 files that are listed already
    pending   peak memory with 1,000,000 files pending and the store down
    idle      CPU of a daemon that has nothing to do
    second    a second snapshot of unchanged tables, beside the first
    upload    a snapshot into a real S3 server on this machine, beside boto3's own upload_file on as many threads
    list      `cassbackup list` on 100,000 listings
    restore   a restore of large and of many small files, beside `cp` of the same objects and a sync

Nothing here is a test: times on a shared machine are read side by side, not as absolutes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

from storm import Storm  # noqa: E402

import cassbackup  # noqa: E402

ENVIRON = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true", "CASSBACKUP_MIN_FREE": "1%"}
TICK = os.sysconf("SC_CLK_TCK")


def row(name: str, **figures: object) -> None:
    """Print one result."""
    print(f"{name:34} " + "  ".join(f"{key}={value}" for key, value in figures.items()), flush=True)


@contextmanager
def folder() -> Iterator[Path]:
    """Return a directory beside the repository (a real disk, not a tmpfs), removed at the end."""
    path = Path(tempfile.mkdtemp(prefix=".bench-", dir=HERE))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def wait_for(reached: Callable[[], bool], limit_s: float = 300.0) -> float:
    """Wait until something is so, and return how long that took."""
    began = time.monotonic()
    while not reached() and time.monotonic() - began < limit_s:
        time.sleep(0.005)
    return time.monotonic() - began


class Pinning:
    """The watching and pinning half alone, and what it tells."""

    def __init__(self, data: Path, listed: Mapping[str, tuple[str, set[int]]]) -> None:
        self.disk = cassbackup.PinDirectory(str(data))
        self.disk.check()
        self.pinned, self.scanned = 0, 0.0
        self.pinner = cassbackup.Pinner([self.disk], cassbackup.Filters(), listed, 3600.0, self.hear)

    def hear(self, news: object) -> None:
        """Count the files that have been pinned."""
        if isinstance(news, cassbackup.Touched):
            self.pinned += news.files
        elif isinstance(news, cassbackup.PinnerState):
            self.scanned = news.scanned


@contextmanager
def pinning(data: Path, listed: Mapping[str, tuple[str, set[int]]] | None = None) -> Iterator[Pinning]:
    """Run the watching and pinning half alone."""
    running = Pinning(data, listed or {})
    running.pinner.start()
    try:
        wait_for(lambda: running.scanned > 0)
        yield running
    finally:
        running.pinner.stop()
        running.pinner.join()
        os.close(running.disk._lock)


def watch_as_tablesnap(data: Path, seen: set[str], stop: threading.Event) -> None:
    """Watch with pyinotify's own loop, recursively, adding watches as directories appear."""
    import pyinotify

    class Handler(pyinotify.ProcessEvent):  # type: ignore[misc]
        def process_default(self, event: pyinotify.Event) -> None:
            if os.path.splitext(event.pathname)[1]:  # synthetic events do not say what is a directory
                seen.add(event.pathname)

    manager = pyinotify.WatchManager()
    notifier = pyinotify.Notifier(manager, Handler(), timeout=100)
    manager.add_watch(str(data), pyinotify.IN_CREATE | pyinotify.IN_MOVED_TO, rec=True, auto_add=True)
    seen.add("")
    while not stop.is_set():
        if notifier.check_events():
            notifier.read_events()
            notifier.process_events()
    notifier.stop()


def bench_pin() -> None:
    """Pin a burst, twice: into new snapshot directories and into existing backups/."""
    for kind in ("snapshot", "backups"):
        for clear_ms in (None, 1000) if kind == "snapshot" else (None,):
            _pin_ours(kind, clear_ms)
            _pin_theirs(kind, clear_ms)


def _burst(storm: Storm, kind: str, clear_ms: int | None) -> int:
    """Let the C program make the links; nothing of it runs in this process, whose CPU is measured."""
    if kind == "backups":
        gust = storm._run("backups", ["-r", "0"])
    else:
        clear = [] if clear_ms is None else ["-c", str(clear_ms)]
        gust = storm._run("snapshot", ["-t", "2026-11-21T20:24:38.123Z", "-r", "0", *clear], "daily")
    return gust.links + gust.files


def _prepared(root: Path, kind: str) -> Storm:
    storm = Storm(root / "data", 200, 400)
    storm.seed()
    if kind == "snapshot":
        return storm
    storm.backups()
    return storm.wave()


def _pin_ours(kind: str, clear_ms: int | None) -> None:
    with folder() as root:
        storm = _prepared(root, kind)
        with pinning(storm.root) as running:
            running.pinner.idle.wait()
            before, cpu = running.pinned, resource.getrusage(resource.RUSAGE_SELF)
            files = _burst(storm, kind, clear_ms)
            lag = wait_for(lambda: running.pinned - before >= files, 20.0)
            after = resource.getrusage(resource.RUSAGE_SELF)
            lost = files - (running.pinned - before)
            used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
            row(_title("cassbackup", kind, clear_ms), files=files, lost=lost, lag_s=f"{lag:.2f}", cpu_s=f"{used:.2f}")


def _pin_theirs(kind: str, clear_ms: int | None) -> None:
    with folder() as root:
        storm = _prepared(root, kind)
        seen: set[str] = set()
        stop = threading.Event()
        thread = threading.Thread(target=watch_as_tablesnap, args=(storm.root, seen, stop))
        thread.start()
        wait_for(lambda: "" in seen)
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        files = _burst(storm, kind, clear_ms)
        lag = wait_for(lambda: len(seen) - 1 >= files, 10.0)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        lost = files - len(seen) + 1
        row(
            _title("pyinotify, as Tablesnap", kind, clear_ms),
            files=files,
            lost=lost,
            lag_s=f"{lag:.2f}",
            cpu_s=f"{used:.2f}",
        )
        stop.set()
        thread.join()


def _title(who: str, kind: str, clear_ms: int | None) -> str:
    return f"{who}, {kind}" + (f", cleared after {clear_ms} ms" if clear_ms is not None else "")


def million(root: Path) -> Storm:
    """Make 1,000,000 files in the snapshots of 1,250 tables."""
    storm = Storm(root / "data", 1250, 800)
    storm.seed()
    _burst(storm, "snapshot", None)
    return storm


def bench_start() -> None:
    """Scan a million files that the ledger says are listed."""
    with folder() as root:
        storm = million(root)
        listed, life = {}, cassbackup.utc(time.time())
        for tag in storm.root.glob("*/*/snapshots/daily"):
            files = {entry.name: cassbackup.Fingerprint.of(entry.stat()) for entry in os.scandir(tag)}
            listed[str(tag)] = (life, {cassbackup.mark_of(name, one) for name, one in files.items()})
        began = time.monotonic()
        with pinning(storm.root, listed) as running:
            took = time.monotonic() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            row("start on 1,002,500 listed files", seconds=f"{took:.1f}", pinned=running.pinned, peak_mib=peak)


@contextmanager
def daemon(
    root: Path, *options: str, bucket: str = "", environ: Mapping[str, str] = ENVIRON
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon as an operator would."""
    words = ["watch", str(root / "data"), "--state-dir", str(root / "state"), "--name", "bench"]
    words += ["--bucket", bucket or f"file://{root}/bucket", "--max-bandwidth", "0", *options]
    with open(root / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, str(HERE / "cassbackup.py"), *words], env=environ, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def status(root: Path, *words: str) -> dict[str, Any]:
    """Return what a daemon says of itself, {} where none answers yet."""
    command = [sys.executable, str(HERE / "cassbackup.py"), "status", "--json", "--state-dir", str(root / "state")]
    done = subprocess.run([*command, *words], check=False, env=ENVIRON, capture_output=True, text=True)
    page: dict[str, Any] = json.loads(done.stdout or "{}")
    return page


def until_scanned(root: Path) -> None:
    """Wait until a daemon has scanned everything once."""
    wait_for(lambda: status(root).get("scanned", 0) > 0)


def memory(pid: int, field: str) -> int:
    """Return a figure of /proc/PID/status in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition(field)[2].split()[0]) // 1024


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICK


def bench_pending() -> None:
    """Hold a million files for a store that is down."""
    with folder() as root:
        million(root)
        keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
        ENVIRON.update(keys)
        with daemon(root, "--endpoint-url", "http://127.0.0.1:9", "--region", "x", bucket="s3://down") as process:
            pins = root / ".cassbackup" / "data"
            took = wait_for(lambda: pins.exists() and len(list(pins.iterdir())) >= 1250, 120.0)
            time.sleep(20)
            count = sum(len(os.listdir(path)) for path in pins.iterdir() if path.is_dir())
            row("1,000,000 files pending", pinned=count, seconds=f"{took:.1f}", peak_mib=memory(process.pid, "VmHWM:"))


def bench_idle() -> None:
    """Do nothing for a minute, with 6,000 directories watched."""
    with folder() as root:
        storm = Storm(root / "data", 2000, 8)
        storm.seed()
        storm.backups()
        with daemon(root) as process:
            until_scanned(root)
            status(root, "--wait")
            time.sleep(70)  # the first reconciliation scans once more what had changed just before
            before = cpu_s(process.pid)
            time.sleep(60)
            used = cpu_s(process.pid) - before
            row("idle, 2,000 tables", cpu_percent=f"{used / 60 * 100:.3f}", rss_mib=memory(process.pid, "VmRSS:"))


def bench_second() -> None:
    """Back up two snapshots of the same SSTables."""
    with folder() as root:
        storm = Storm(root / "data", 100, 80, size=2000)
        storm.seed()
        with daemon(root) as process:
            until_scanned(root)
            for tag in ("first", "second"):
                cpu, began = cpu_s(process.pid), time.monotonic()
                gust = storm.snapshot(tag)
                listed = f"bench.listings/storm/*/snapshots/{tag}/*/*-complete-*.json"
                wait_for(lambda pattern=listed: len(list((root / "bucket").glob(pattern))) >= 100)
                files, took = gust.links + gust.files, time.monotonic() - began
                used = (cpu_s(process.pid) - cpu) / files * 1e6
                row(f"{tag} snapshot, file://", files=files, seconds=f"{took:.1f}", cpu_us_per_file=f"{used:.0f}")


THEIRS = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
import boto3
began, bucket, endpoint = time.monotonic(), sys.argv[1], sys.argv[2]
client = boto3.client("s3", endpoint_url=endpoint)
found = ((folder, names) for folder, _, names in os.walk(sys.argv[3]) if "/snapshots/" in folder)
paths = [os.path.join(folder, name) for folder, names in found for name in names]
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda path: client.upload_file(path, bucket, "theirs" + path), paths))
used = os.times()
print(len(paths), time.monotonic() - began, used.user + used.system)
"""


def bench_upload() -> None:
    """Store large and small files in moto, the slowest of all here: what counts is the CPU that it takes us."""
    from servers import MotoS3

    for name, tables, files, size in (("768 MiB", 1, 2, 64 * cassbackup.MIB), ("small files", 50, 10, 2000)):
        with folder() as root, MotoS3() as server:
            bucket = server.fresh()
            storm = Storm(root / "data", tables, 8 * files, size=size)
            storm.seed()
            storm.snapshot("daily")
            theirs = [sys.executable, "-c", THEIRS, bucket.bucket, server.url, str(root / "data" / "storm")]
            (root / "state").mkdir()
            began = time.monotonic()
            with daemon(root, "--once", bucket=bucket.target, environ={**ENVIRON, **bucket.environ}) as process:
                _, _, used = os.wait4(process.pid, 0)
            took, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
            told = subprocess.run(theirs, env={**ENVIRON, **bucket.environ}, check=True, capture_output=True, text=True)
            count, seconds, busy = told.stdout.split()
            figures = {"files": count, "seconds": f"{took:.1f}", "cpu_s": f"{cpu:.1f}"}
            row(f"upload of {name}", **figures, boto3_s=f"{float(seconds):.1f}", boto3_cpu_s=f"{float(busy):.1f}")


def command(root: Path, *words: str) -> tuple[float, float, int]:
    """Run a command on the bucket; return its seconds, CPU seconds and peak MiB."""
    argv = [sys.executable, str(HERE / "cassbackup.py"), *words, "--bucket", f"file://{root}/bucket"]
    began = time.monotonic()
    with subprocess.Popen(
        [*argv, "--state-dir", str(root / "none")], env=ENVIRON, stdout=subprocess.DEVNULL
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words}: exit {process.returncode}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024


def bench_list() -> None:
    """List a node of 100 tables with 100 tags, each taken ten times."""
    with folder() as root:
        for table in range(100):
            for tag in range(1000):
                life = f"202611{tag % 28 + 1:02d}T01{tag // 28:02d}00.{table:06d}Z"
                path = root / f"bucket/node1.listings/ks1/t{table}-{'a' * 32}/snapshots/daily{tag % 100}/{life}"
                path.mkdir(parents=True)
                (path / f"{life}-complete-8-1024.json").touch()
        seconds, cpu, peak = command(root, "list")
        row("list of 100,000 listings", seconds=f"{seconds:.1f}", cpu_s=f"{cpu:.1f}", peak_mib=peak)


def bench_restore() -> None:
    """Restore what a snapshot holds, and copy the same objects."""
    for name, tables, sstables, size in (
        ("1.5 GiB in 40 files", 5, 1, 52 * cassbackup.MIB),
        ("8,000 files", 100, 10, 2000),
    ):
        with folder() as root:
            storm = Storm(root / "data", tables, 8 * sstables, size=size)
            storm.seed()
            storm.snapshot("daily")
            (root / "state").mkdir()
            with daemon(root, "--once") as process:
                process.wait()
            seconds, cpu, peak = command(root, "restore", "--tag", "daily", "--into", str(root / "into"))
            began = time.monotonic()
            subprocess.run(["cp", "-r", root / "bucket" / "bench", root / "copy"], check=True)
            subprocess.run(["sync", "-f", root / "copy"], check=True)
            copied = time.monotonic() - began
            figures = {"seconds": f"{seconds:.1f}", "cp_s": f"{copied:.1f}", "times": f"{seconds / copied:.1f}"}
            row(f"restore of {name}", **figures, cpu_s=f"{cpu:.1f}", peak_mib=peak)


BENCHES = {
    "pin": bench_pin,
    "start": bench_start,
    "pending": bench_pending,
    "idle": bench_idle,
    "second": bench_second,
    "upload": bench_upload,
    "list": bench_list,
    "restore": bench_restore,
}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or BENCHES:
        BENCHES[chosen]()
