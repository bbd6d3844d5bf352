"""Whole processes, measured: wall clock, CPU of all cores, and peak memory of each. Nothing is imported from them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MB = 1_000_000
NODE = "bench"  # what our daemon is called in every bucket


@dataclass(frozen=True)
class Cost:
    """What a process took, with all that it started."""

    wall: float
    cpu: float
    rss: float  # MB, at its peak


@dataclass(frozen=True)
class Figure:
    """One number of a row; `limit` is what issue 11 asks for, at most (or at least)."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    at_least: bool = False
    spread: tuple[float, float] | None = None

    @property
    def is_met(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Row:
    """What was measured of one work: figures that count, and the absolute ones beside them."""

    work: str
    server: str
    figures: tuple[Figure, ...]
    beside: str = ""


class Failed(RuntimeError):
    """A process did not do what it was started for."""


def run(argv: Sequence[str], environ: Mapping[str, str], exits: Sequence[int] = (0,)) -> Cost:
    """Run a process to its end."""
    with open(Path(environ["BENCH_LOG"]), "w+b") as log:
        began = time.monotonic()
        process = subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in exits:
            log.seek(0)
            said = log.read().decode(errors="replace")
            raise Failed(f"{' '.join(argv[:8])} ...: exit {process.returncode}\n{said[-2000:]}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / MB)


@dataclass(frozen=True)
class Program:
    """Ours: a tree that holds cassbackup.py. Its console script imports it, so its bytecode is cached; so do we."""

    tree: Path
    environ: Mapping[str, str]

    def argv(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "cassbackup", *map(str, words)]

    def version(self) -> str:
        """Return what it calls itself; its bytecode is cached from then on."""
        told = subprocess.run(self.argv("--version"), env=self.environ, check=True, capture_output=True, text=True)
        return told.stdout.strip()

    def run(self, *words: object, more: Mapping[str, str] | None = None) -> Cost:
        return run(self.argv(*words), {**self.environ, **(more or {})})

    def once(self, data: Path, state: Path, bucket: str, more: Mapping[str, str] | None = None) -> Cost:
        """Back up what there is. The state directory is new, so nothing is known beforehand."""
        return self.run(*watching(data, state, bucket), "--once", more=more)

    @contextmanager
    def daemon(
        self, data: Path, state: Path, bucket: str, *words: object, more: Mapping[str, str] | None = None
    ) -> Iterator[int]:
        """Run the daemon; yield its process id."""
        argv = self.argv(*watching(data, state, bucket), *words)
        with open(state / "log", "wb") as log:
            process = subprocess.Popen(argv, env={**self.environ, **(more or {})}, stdout=log, stderr=log)
            try:
                yield process.pid
            finally:
                process.terminate()
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def until_listed(self, state: Path) -> None:
        """Wait until a daemon has listed all that it found. Exit 3 only says that something is old."""
        run(self.argv("status", "--wait", "--state-dir", state), self.environ, exits=(0, 3))

    def until_scanned(self, state: Path) -> None:
        """Wait until a daemon has scanned everything once."""
        asked = self.argv("status", "--json", "--state-dir", state)
        for _ in range(600):
            done = subprocess.run(asked, env=self.environ, check=False, capture_output=True, text=True)
            if '"scanned": 0' not in done.stdout and '"scanned"' in done.stdout:
                return
            time.sleep(0.5)
        raise Failed(f"the daemon never scanned; its log is {state}/log")


def watching(data: Path, state: Path, bucket: str) -> list[object]:
    """Return the words with which the daemon is started here: no limit of bandwidth, a disk that may be nearly full."""
    state.mkdir(parents=True, exist_ok=True)
    limits = ["--max-bandwidth", "0", "--min-free", "1%", "--max-pinned", "90%"]
    return ["watch", data, "--state-dir", state, "--name", NODE, "--bucket", bucket, *limits]


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of another process, which the kernel counts in nanoseconds."""
    return time.clock_gettime((~pid << 3) | 2)


def peak_of(pid: int, field: str = "VmHWM") -> float:
    """Return a figure of /proc/<pid>/status, in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) * 1024 / MB


def in_turn(number: int, ours: Callable[[int], Cost], theirs: Callable[[int], Cost]) -> tuple[Cost, Cost]:
    """Run both, one right after the other; every other time theirs goes first."""
    if number % 2:
        second = theirs(number)
        return ours(number), second
    first = ours(number)
    return first, theirs(number)


def ratio(name: str, pairs: Sequence[tuple[float, float]], limit: float | None = None) -> Figure:
    """Return the median of the pairs' ratios."""
    ratios = [mine / other for mine, other in pairs]
    return Figure(name, statistics.median(ratios), "×", limit, spread=(min(ratios), max(ratios)))


def peak(rss: float) -> Figure:
    return Figure("peak RSS", rss, "MB", 120.0)


def absolute(name: str, costs: Sequence[Cost]) -> str:
    """Return the median and the range, for the reader who wants to know what the ratios are of."""
    walls, cpus = sorted(cost.wall for cost in costs), [cost.cpu for cost in costs]
    return (
        f"{name} {statistics.median(walls):.1f} s [{walls[0]:.1f}–{walls[-1]:.1f}],"
        f" {statistics.median(cpus):.1f} s CPU, {max(cost.rss for cost in costs):.0f} MB"
    )
