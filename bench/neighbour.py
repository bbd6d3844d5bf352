"""What a database on the same disk notices. Run as a program, it is that database: `neighbour.py DIRECTORY`.

A reader takes 4 KiB from a random place of a file, past the page cache; a writer appends 4 KiB and syncs, as a commit
log does. Both rest between two calls. It ends when its standard input does, and prints how long the calls took.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE, PAUSE_S = 4096, 0.004


def work(call: Callable[[], object], stop: threading.Event, took: list[float]) -> None:
    while not stop.is_set():
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
        time.sleep(PAUSE_S)


def open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system that has no such thing
        return os.open(path, os.O_RDONLY)


def percentiles(took: list[float]) -> list[float]:
    """Return p50 and p99 in milliseconds."""
    hundredths = statistics.quantiles(took, n=100)
    return [round(hundredths[49] * 1000, 3), round(hundredths[98] * 1000, 3)]


def main(folder: Path) -> None:
    """Read and write until nobody listens any more."""
    read_from = open_direct(folder / "sstable")
    size = os.fstat(read_from).st_size
    log = os.open(folder / "commitlog", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    buffer, page, stop = mmap.mmap(-1, PAGE), b"x" * PAGE, threading.Event()
    reads: list[float] = []
    writes: list[float] = []

    def read() -> None:
        os.preadv(read_from, [buffer], random.randrange(size // PAGE) * PAGE)

    def write() -> None:
        os.write(log, page)
        os.fdatasync(log)

    threads = [
        threading.Thread(target=work, args=(call, stop, took)) for call, took in ((read, reads), (write, writes))
    ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"calls": len(reads), "reader": percentiles(reads), "writer": percentiles(writes)}))


def beside(folder: Path, doing: Callable[[], object]) -> dict[str, Any]:
    """Return what the neighbour noticed while something was done."""
    argv = [sys.executable, str(Path(__file__)), str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        doing()
        said, _ = process.communicate()
    return dict(json.loads(said))


def bench_neighbour(bench: Any) -> Iterator[Any]:
    """Let it run alone, beside our backup of cold files, and beside s5cmd's."""
    import data as made
    from measure import Figure, Row
    from places import BUCKET, kinds, serve
    from transfers import Contest

    data, folder = bench.folder("data"), bench.folder("neighbour")
    each = (1 << 30) if bench.full else int((512 << 20) * bench.scale)
    made.make_snapshots(data, made.large(each))
    (folder / "sstable").write_bytes(os.urandom(1 << 20) * max(16, int(1024 * bench.scale)))
    kind, tls = kinds()[0]
    with serve(kind, tls, bench.folder("server"), 10 * each) as server:
        contest = Contest(bench, server, data)
        where = f"s3://{BUCKET}/"

        def ours(bandwidth: str) -> None:
            words = ["--max-bandwidth", bandwidth, "--once"]
            state = bench.state()
            watched = ["watch", data, "--state-dir", state, "--name", "bench", "--min-free", "1%"]
            bench.program.run(*watched, "--bucket", f"{where}{bandwidth}", *words, more=server.environ)

        works: dict[str, Callable[[], object]] = {
            "alone": lambda: time.sleep(20 * bench.scale),
            "beside ours at 50 MiB/s, the default": lambda: ours("50M"),
            "beside ours without a limit": lambda: ours("0"),
            "beside s5cmd": lambda: contest.theirs(f"{data}/", f"{where}theirs/"),
        }
        for title, doing in works.items():
            forget(data)
            told = beside(folder, doing)
            names = ("reader p50", "reader p99", "writer p50", "writer p99")
            values = [*told["reader"], *told["writer"]]
            figures = [Figure(name, value, "ms") for name, value in zip(names, values, strict=True)]
            yield Row(
                f"a neighbour {title}, 4 × {each >> 20} MiB", server.name, tuple(figures), f"{told['calls']} reads"
            )


def forget(data: Path) -> None:
    """Take the files out of the page cache, so that a backup must read the disk as the neighbour does."""
    os.sync()
    for folder, _, names in os.walk(data):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
