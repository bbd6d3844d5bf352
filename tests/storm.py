"""Bursts of hard links far faster than Cassandra's own: by storm.c, or in Python where there is no cc.

    storm = Storm(tmp_path / "data", tables=200, components=400)
    storm.seed()                                        # the live SSTables
    storm.snapshot("daily", clear_after_ms=1000)        # 80,000 links, then the whole tag is cleared
    storm.wave().backups()                              # new SSTables, linked into the existing backups/

`storm.history` says what appeared where, like that of a `tree.Node`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from tree import COMPONENTS, Copy, History, Unit

HERE = Path(__file__).resolve().parent
KEYSPACE = "storm"
NAMES = COMPONENTS["big"]


@lru_cache(maxsize=1)
def compiled(source: Path, *flags: str, cache: Path = HERE / ".build") -> Path | None:
    """Compile a C file, unless that was done already, and return what came of it; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return None
    program = cache / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        cache.mkdir(exist_ok=True)
        (cache / ".gitignore").write_text("*\n")
        fresh = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O2", *flags, "-o", str(fresh), str(source)], check=True)
        fresh.replace(program)
    return program


class Throttle:
    """Holds whoever counts too fast."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.counted = 0
        self.started = time.monotonic()

    def count(self) -> None:
        """Count one, and sleep until it was due (a rate of 0 is no limit)."""
        self.counted += 1
        if self.rate:
            time.sleep(max(0.0, self.started + self.counted / self.rate - time.monotonic()))


@dataclass(frozen=True)
class Gust:
    """What one command of the storm did: links made, other files written, seconds without any clearing."""

    links: int
    files: int
    seconds: float


@dataclass(frozen=True)
class Storm:
    """Tables of `components` (a multiple of 8) files below `root`; each index of a table is one SSTable more.

    `size` is in bytes per component, `first` the number of the first SSTable. Without a `program` everything
    is done in Python.
    """

    root: Path
    tables: int
    components: int
    indexes: int = 0
    size: int = 0
    first: int = 1
    program: Path | None = field(default_factory=lambda: compiled(HERE / "storm.c"))
    history: History = field(default_factory=History)

    @property
    def sstables(self) -> int:
        """Return the number of SSTables in each table, without those of its indexes."""
        return self.components // len(NAMES)

    def wave(self) -> Storm:
        """Make new live SSTables in the same tables, numbered on, and return the storm of those."""
        following = replace(self, first=self.first + self.sstables)
        following.seed()
        return following

    def seed(self) -> Gust:
        """Make the live SSTables."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self._run("seed") if self.program else self._timed(self._seed_table)

    def snapshot(self, tag: str, clear_after_ms: int | None = None, each: bool = False, rate: int = 0) -> Gust:
        """Snapshot every table, at no more than `rate` links a second.

        With `clear_after_ms` the tag is cleared so long after the last link; with `each`, every table's so
        long after that table is done.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        for number in self._numbers():
            self._record(self._unit(number, tag), f"snapshots/{tag}", number)
            for name, body in self._in_place(number, now).items():
                path = self._table(number) / "snapshots" / tag / name
                self.history.add(self._unit(number, tag), path, Copy.of(body))
        if self.program:
            clear = [] if clear_after_ms is None else ["-c", str(clear_after_ms), *(["-e"] if each else [])]
            return self._run("snapshot", ["-t", now, "-r", str(rate), *clear], tag)
        return self._snapshot_in_python(tag, now, clear_after_ms, each, rate)

    def backups(self, rate: int = 0) -> Gust:
        """Link every SSTable into the backups/ of its table."""
        for number in self._numbers():
            self._record(self._unit(number), "backups", number)
        if self.program:
            return self._run("backups", ["-r", str(rate)])
        throttle = Throttle(rate)
        return self._timed(lambda number: self._link(number, "backups", throttle))

    def clear(self, tag: str, delay_ms: int = 0) -> None:
        """Remove every table's directory of a tag, after a while."""
        if self.program:
            command = [str(self.program), "clear", str(self.root), tag, "-c", str(delay_ms)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        else:
            time.sleep(delay_ms / 1000)
            for folder in self.root.glob(f"*/*/snapshots/{tag}"):
                shutil.rmtree(folder)

    def _run(self, command: str, options: Sequence[str] = (), *tag: str) -> Gust:
        shape = ["-i", str(self.indexes), "-b", str(self.size), "-g", str(self.first)]
        what = [command, str(self.root), str(self.tables), str(self.components), *tag]
        done = subprocess.run([str(self.program), *what, *shape, *options], check=True, capture_output=True, text=True)
        said = dict(word.split("=") for word in done.stdout.split())
        return Gust(int(said["links"]), int(said["files"]), float(said["seconds"]))

    # What there is to link, by name and content: the same rules as in storm.c.

    def _numbers(self) -> range:
        return range(1, self.tables + 1)

    def _table(self, number: int) -> Path:
        return self.root / KEYSPACE / f"t{number:05d}-{number:032x}"

    def _unit(self, number: int, tag: str | None = None) -> Unit:
        return Unit("snapshot" if tag else "incremental", KEYSPACE, self._table(number).name, tag)

    def _families(self) -> Iterator[tuple[int, str, range]]:
        """Yield (number, directory, numbers of SSTables) for the table itself and each of its indexes."""
        yield 0, "", range(self.first, self.first + self.sstables)
        for family in range(1, self.indexes + 1):
            yield family, f".idx{family}", range(self.first, self.first + 1)

    def _files(self, number: int) -> Iterator[tuple[str, bytes]]:
        """Yield (path below the table's directory, content) for each component of a table."""
        for family, folder, generations in self._families():
            for generation in generations:
                for component in NAMES:
                    path = os.path.join(folder, f"nb-{generation}-big-{component}")
                    yield path, self._content(number, family, generation, component)

    def _content(self, number: int, family: int, generation: int, component: str) -> bytes:
        if component == "TOC.txt":
            return "".join(f"{name}\n" for name in NAMES).encode()
        if component == "Digest.crc32":
            return str(zlib.crc32(self._content(number, family, generation, "Data.db"))).encode()
        line = f"{number} {family} {generation} {component}\n".encode()
        return (line * (self.size // len(line) + 1))[: self.size]

    def _in_place(self, number: int, created_at: str) -> dict[str, bytes]:
        """Return what a snapshot writes beside its links, in its order."""
        data = [
            os.path.join(folder, f"nb-{generation}-big-Data.db")
            for _, folder, generations in self._families()
            for generation in generations
        ]
        files = ",".join(f'"{name}"' for name in data)
        manifest = f'{{"files":[{files}],"created_at":"{created_at}","expires_at":null,"ephemeral":false}}'
        schema = (
            f"CREATE TABLE IF NOT EXISTS {KEYSPACE}.t{number:05d} (key text PRIMARY KEY, value blob) "
            f"WITH ID = {uuid.UUID(int=number)};\n"
        )
        return {"manifest.json": manifest.encode(), "schema.cql": schema.encode()}

    def _record(self, unit: Unit, below: str, number: int) -> None:
        table = str(self._table(number))
        for path, body in self._files(number):
            self.history.add(unit, f"{table}/{below}/{path}", Copy.of(body))

    # The fallback.

    def _timed(self, work: Callable[[int], tuple[int, int]]) -> Gust:
        """Do something for each table, which returns its links and its files."""
        started = time.monotonic()
        done = [work(number) for number in self._numbers()]
        links, files = (sum(column) for column in zip(*done, strict=True))
        return Gust(links, files, time.monotonic() - started)

    def _seed_table(self, number: int) -> tuple[int, int]:
        table, made = self._table(number), 0
        for path, body in self._files(number):
            (table / path).parent.mkdir(parents=True, exist_ok=True)
            (table / path).write_bytes(body)
            made += 1
        return 0, made

    def _link(self, number: int, below: str, throttle: Throttle) -> tuple[int, int]:
        table, made = self._table(number), 0
        for _, folder, _ in self._families():
            (table / below / folder).mkdir(parents=True, exist_ok=True)
        for path, _ in self._files(number):
            os.link(table / path, table / below / path)
            throttle.count()
            made += 1
        return made, 0

    def _snapshot_in_python(self, tag: str, created_at: str, clear_after_ms: int | None, each: bool, rate: int) -> Gust:
        throttle = Throttle(rate)

        def one(number: int) -> tuple[int, int]:
            links, _ = self._link(number, f"snapshots/{tag}", throttle)
            target = self._table(number) / "snapshots" / tag
            for name, body in self._in_place(number, created_at).items():
                (target / name).write_bytes(body)
            if each and clear_after_ms is not None:
                time.sleep(clear_after_ms / 1000)
                shutil.rmtree(target)
            return links, 2

        gust = self._timed(one)
        if clear_after_ms is not None and not each:
            self.clear(tag, clear_after_ms)
        return gust
