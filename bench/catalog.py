"""What a bucket of many listings costs those who read it: `list`, `verify --latest`, `restore --dry-run`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

from measure import NODE, Figure, Row, peak
from storm import Storm
from transfers import Bench, disk_of

UTC, FORMAT = re.compile(r"\d{8}T\d{6}\.\d{6}Z"), "%Y%m%dT%H%M%S.%fZ"
DAYS = 30  # of history


def bench_catalog(bench: Bench) -> Iterator[Row]:
    """Read a bucket of 300 tables: a snapshot a day, and between them what was flushed."""
    tables = max(2, int(300 * bench.scale))
    wanted = 500_000 if bench.full else int(50_000 * bench.scale)
    storm = Storm(bench.folder("data"), tables, 8, size=100)
    storm.seed()
    storm.snapshot("daily")
    storm.backups()
    bucket = bench.folder("bucket")
    bench.program.once(storm.root, bench.state(), f"file://{bucket}")
    total = _multiply(bucket / f"{NODE}.listings" / "storm", max(2, wanted // tables))
    os.sync()
    figures, beside = [], []
    for words in (
        ["list"],
        ["verify", "--latest"],
        ["restore", "--latest", "--dry-run", "--into", bench.scratch / "no"],
    ):
        cost = bench.program.run(*words, "--node", NODE, "--bucket", f"file://{bucket}")
        title = " ".join(str(word) for word in words if "/" not in str(word)).removesuffix(" --into")
        figures.append(Figure(f"`{title}`", cost.wall, "s", 30.0 if bench.full else None))
        figures.append(peak(cost.rss))
        beside.append(f"{title}: {cost.cpu:.1f} s CPU")
    work = f"a bucket with {total:,} listings of {tables} tables"
    yield Row(work, f"file://, {disk_of(bucket)}", tuple(figures), "; ".join(beside))


def _multiply(root: Path, each: int) -> int:
    """Make of each table's two real listings so many, older and older ones; they name the same objects."""
    total = 0
    for table in root.iterdir():
        for real in (*table.glob("snapshots/daily/*/*.json"), *table.glob("backups/*.json")):
            is_snapshot = real.parent.name != "backups"
            count = DAYS if is_snapshot else max(1, each - DAYS)
            text = real.read_text()
            for number in range(count):
                back = timedelta(days=DAYS * number / count)
                _write_older(table, real, text, back)
            total += count
    return total


def _write_older(table: Path, real: Path, text: str, back: timedelta) -> None:
    """Write a copy of a listing that is older by so much, in its name, its directory and its text."""

    def older(found: re.Match[str]) -> str:
        return (datetime.strptime(found[0], FORMAT) - back).strftime(FORMAT)  # noqa: DTZ007 - UTC, as it was

    # Keys and directories of the objects have no such time in them, so they stay.
    path = table / UTC.sub(older, str(real.relative_to(table)))
    if path != real:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(UTC.sub(older, text))
        # The store's time counts too: what was stored just now passes for a listing of now, and is read.
        listed = datetime.strptime(path.name[:23], FORMAT).replace(tzinfo=timezone.utc).timestamp()
        os.utime(path, (listed, listed))
