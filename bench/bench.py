"""Measure what the README claims: `make bench`, or `python bench/bench.py [ROW ...] [--quick] [--full]`.

    small, mixed, large   backup and restore on S3 servers of this machine, beside s5cmd (and rclone, boto3)
    gcs                   small files by Google Cloud Storage's protocol, beside its own client
    file                  small files into a directory, beside `cp -r` and a sync
    second                a second snapshot of unchanged tables
    storm                 80,400 links that are cleared after a second, while uploads run
    idle                  a daemon that has nothing to do
    start, pending        a start on many files that are all listed; many files and no store
    catalog               list, verify --latest and restore --dry-run on a bucket of many listings
    neighbour             what a reader and a writer on the same disk notice

Whole processes of the command-line interface, never what is inside. Pairs are interleaved; a ratio is the median of
the pairs' own. What arrived is compared byte for byte. Figures go to bench/result.json and bench/result.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tests"))

import catalog  # noqa: E402
import neighbour  # noqa: E402
import node  # noqa: E402
import report  # noqa: E402
import transfers  # noqa: E402
from measure import Program  # noqa: E402
from places import clean  # noqa: E402

ROWS = {
    "small": lambda bench: transfers.bench_s3(bench, "small"),
    "mixed": lambda bench: transfers.bench_s3(bench, "mixed"),
    "large": lambda bench: transfers.bench_s3(bench, "large"),
    "gcs": transfers.bench_gcs,
    "file": transfers.bench_file,
    "second": node.bench_second,
    "storm": node.bench_storm,
    "idle": node.bench_idle,
    "start": node.bench_start,
    "pending": node.bench_pending,
    "catalog": catalog.bench_catalog,
    "neighbour": neighbour.bench_neighbour,
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[*ROWS, []], help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, and two pairs")
    parser.add_argument("--full", action="store_true", help="a million files, 500,000 listings, 4 × 1 GiB: hours")
    parser.add_argument("--pairs", type=int, help="so many pairs at most (default: 5)")
    parser.add_argument("--tree", type=Path, default=HERE, help="measure the cassbackup.py of this directory")
    parser.add_argument("--scratch", type=Path, default=HERE, help="work below this directory, on a real disk")
    parser.add_argument("--out", type=Path, default=HERE / "bench" / "result", help="without .json, .md, .png")
    return parser.parse_args()


def main() -> int:
    """Run the rows one after the other; exit 1 if one could not be measured."""
    options, failed = parsed(), 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out, tree, below = options.out.resolve(), options.tree.resolve(), options.scratch.resolve()
    os.chdir(tree)  # Python looks there first for cassbackup.py
    scratch = Path(tempfile.mkdtemp(prefix=".bench-", dir=below))
    environ = {**clean(os.environ), "PYTHONPATH": str(tree), "BENCH_LOG": str(scratch / "log")}
    bench = transfers.Bench(
        Program(tree, environ),
        scratch,
        scale=0.1 if options.quick else 1.0,
        full=options.full,
        pairs=options.pairs or (2 if options.quick else 5),
    )
    result = report.Report(out, bench.program.version(), " ".join(sys.argv[1:]))
    try:
        for name in options.rows or ROWS:
            began = time.monotonic()
            try:
                for row in ROWS[name](bench):
                    result.add(name, row)
            except Exception as error:  # the other rows are worth having
                failed += 1
                print(f"{name}: not measured: {error!r}\n{error}", file=sys.stderr, flush=True)
            print(f"({name}: {time.monotonic() - began:.0f} s)", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result.plot()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
