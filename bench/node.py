"""The daemon beside a busy and beside an idle Cassandra: the second snapshot, a storm of links, nothing at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import data as made
from measure import NODE, Failed, Figure, Row, cpu_of, peak, peak_of
from places import BUCKET, kinds, serve
from storm import Storm
from transfers import Bench, disk_of

UPSTREAM = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}


def scaled(number: int, bench: Bench) -> int:
    return max(2, int(number * bench.scale))


def bench_second(bench: Bench) -> Iterator[Row]:
    """Take a snapshot of tables that have not changed since the last; a daemon is running."""
    storm = Storm(bench.folder("data"), scaled(350, bench), 80, size=100)
    storm.seed()
    kind, tls = kinds()[0]
    with serve(kind, tls, bench.folder("server"), 1 << 28) as server:
        state = bench.state()
        with bench.program.daemon(storm.root, state, f"s3://{BUCKET}/second", more=server.environ) as pid:
            bench.program.until_scanned(state)
            storm.snapshot("first")
            bench.program.until_listed(state)
            time.sleep(2)
            cpu = cpu_of(pid)
            gust = storm.snapshot("second")
            end, files = time.time(), gust.links + gust.files
            time.sleep(4)  # a `status` beside it would take one of two cores
            bench.program.until_listed(state)
            used = cpu_of(pid) - cpu
            node = server.files / "second"
            listings = list(node.glob(f"{NODE}.listings/storm/*/snapshots/second/*/*-complete-*.json"))
            if len(listings) != storm.tables:
                raise Failed(f"{len(listings)} listings for {storm.tables} tables")
            own = ("manifest.json", "schema.cql")
            sent = [path for path in (node / NODE).rglob("snapshots/second/*") if not path.name.endswith(own)]
            figures = (
                Figure("listed after the last link", max(path.stat().st_mtime for path in listings) - end, "s", 2.0),
                Figure("CPU", used / files * 1e6, "µs a file", 100.0),
                Figure("components sent again", len(sent), "", 0.0),
                peak(peak_of(pid)),
            )
    yield Row(f"unchanged second snapshot, {files:,} files of {storm.tables} tables", server.name, figures)


def bench_storm(bench: Bench) -> Iterator[Row]:
    """Link 80,400 files, clear them a second later, while 2.4 GB are on their way; then once more with no store."""
    root = bench.folder("data")
    storm = Storm(root, scaled(200, bench), 400)
    storm.seed()
    beside = made.mixed(bench.scale)
    made.make_snapshots(root, beside)
    kind, tls = kinds()[0]
    with serve(kind, tls, bench.folder("server"), int(3e9 * bench.scale)) as server:
        state = bench.state()
        with bench.program.daemon(root, state, f"s3://{BUCKET}/storm", more=server.environ) as pid:
            bench.program.until_scanned(state)
            busy = _storm(storm, root, "busy", pid)
    state = bench.state()
    with bench.program.daemon(root, state, "s3://down", "--region", "x", more=UPSTREAM) as pid:
        bench.program.until_scanned(state)
        quiet = _storm(storm, root, "quiet", pid)
    work = f"{storm.tables * 402:,} links, cleared after 1 s"
    yield Row(f"{work}, while others are sent ({beside})", server.name, tuple(busy[:2]))  # the CPU is of both
    yield Row(f"{work}, the store down", "none", tuple(quiet))


def _storm(storm: Storm, root: Path, tag: str, pid: int) -> list[Figure]:
    cpu, began = cpu_of(pid), time.time()
    gust = storm._run("snapshot", ["-t", "2026-11-21T20:24:38.123Z", "-r", "0", "-c", "1000"], tag)
    end, files = began + gust.seconds, gust.links + gust.files
    time.sleep(5)
    used = cpu_of(pid) - cpu
    pins = list((root.parent / ".cassbackup").glob(f"**/storm%2F*snapshots%2F{tag}~*"))
    held = sum(len(os.listdir(path)) for path in pins)
    lag = max(path.stat().st_mtime for path in pins) - end  # a directory's mtime is that of its last link
    return [
        Figure("lost", files - held, "", 0.0),
        Figure("last file pinned after the last link", max(0.0, lag), "s", 2.0),
        Figure("CPU", used / files * 1e6, "µs a file", 15.0),
        peak(peak_of(pid)),
    ]


def bench_idle(bench: Bench) -> Iterator[Row]:
    """Watch 2,000 tables in which nothing happens."""
    storm = Storm(bench.folder("data"), scaled(2000, bench), 8)
    storm.seed()
    storm.backups()
    kind, tls = kinds()[0]
    with serve(kind, tls, bench.folder("server"), 1 << 28) as server:
        state = bench.state()
        with bench.program.daemon(storm.root, state, f"s3://{BUCKET}/idle", more=server.environ) as pid:
            bench.program.until_scanned(state)
            bench.program.until_listed(state)
            time.sleep(65)  # the first reconciliation scans once more what had changed just before
            cpu, began = cpu_of(pid), time.monotonic()
            time.sleep(60)  # the next one is in it
            share = (cpu_of(pid) - cpu) / (time.monotonic() - began) * 100
            figures = (Figure("CPU", share, "%", 0.1), Figure("RSS", peak_of(pid, "VmRSS"), "MB", 60.0))
            beside = f"peak while it stored them: {peak_of(pid):.0f} MB"
    yield Row(f"idle with {storm.tables:,} tables", server.name, figures, beside)


def _seed(root: Path, tables: int) -> int:
    storm = Storm(root, tables, 400)
    storm.seed()
    gust = storm.snapshot("daily")
    return gust.links + gust.files


def _many(bench: Bench) -> tuple[Path, int, int]:
    """Make a snapshot of so many files that a start has something to do; a million with --full.

    Return the data directory, the tables and the files.
    """
    root, tables = bench.folder("data"), 2500 if bench.full else scaled(250, bench)
    # Elsewhere: what a storm remembers is 500 MB, and the peak of a process begins with the memory of its parent.
    with ProcessPoolExecutor(1) as other:
        return root, tables, other.submit(_seed, root, tables).result()


def bench_start(bench: Bench) -> Iterator[Row]:
    """Start on files that are all listed: once to list them, then twice with nothing to do."""
    root, _, files = _many(bench)
    state, bucket = bench.state(), f"file://{bench.folder('bucket')}"
    first = bench.program.once(root, state, bucket)
    again = [bench.program.once(root, state, bucket) for _ in range(2)]
    limit = 10.0 if bench.full else None
    figures = (
        Figure("start, scan and end", max(cost.wall for cost in again), "s", limit),
        Figure("CPU", max(cost.cpu for cost in again) / files * 1e6, "µs a file"),
        peak(max(cost.rss for cost in again)),
    )
    beside = (
        f"the first run, which stored and listed them: {first.wall:.0f} s, {first.cpu:.0f} s CPU, {first.rss:.0f} MB"
    )
    yield Row(f"start on {files:,} listed files", f"file://, {disk_of(root)}", figures, beside)


def bench_pending(bench: Bench) -> Iterator[Row]:
    """Hold many files for a store that is down."""
    root, tables, files = _many(bench)
    state, began = bench.state(), time.time()
    pins = root.parent / ".cassbackup"
    with bench.program.daemon(root, state, "s3://down", "--region", "x", more=UPSTREAM) as pid:
        held: list[Path] = []
        while len(held) < tables or time.time() - max(path.stat().st_mtime for path in held) < 5:
            if time.time() - began > 300:
                raise Failed(f"after 300 s {len(held)} of {tables} tables are pinned; see {state}/log")
            time.sleep(1)
            held = list(pins.glob("**/*snapshots%2Fdaily~*"))
        count = sum(len(os.listdir(path)) for path in held)
        last = max(path.stat().st_mtime for path in held)
        figures = (
            Figure("not pinned", files - count, "", 0.0),
            Figure("all pinned after the start", last - began, "s"),
            peak(peak_of(pid)),
        )
    yield Row(f"{files:,} files pending, the store down", "none", figures, f"{len(held):,} pin directories")
