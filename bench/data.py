"""What is backed up: snapshots of generated tables. And the proof that it arrived."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Failed

TAG = "daily"
PIECE = 8 << 20


@dataclass(frozen=True)
class Shape:
    """How many SSTables of which size; each has seven components, each table two files more."""

    name: str
    tables: int
    sizes: Sequence[int]  # of the Data.db

    @property
    def files(self) -> int:
        return 7 * len(self.sizes) + 2 * self.tables

    def __str__(self) -> str:
        total = sum(size for one in self.sizes for size in parts_of(one).values())
        return f"{self.files:,} files in {self.tables} tables, {total / 1e6:,.0f} MB"


def small(scale: float) -> Shape:
    """86 MB in 4,495 files: many tables that are nearly empty, as every cluster has."""
    chance = random.Random(1)
    sizes = [chance.randrange(20_000, 204_000) for _ in range(int(625 * scale))]
    return Shape("small files", max(2, int(60 * scale)), sizes)


def mixed(scale: float) -> Shape:
    """2.4 GB in 300 SSTables, whose sizes spread as compaction spreads them."""
    chance = random.Random(2)
    sizes = [chance.lognormvariate(0, 1.7) for _ in range(300)]
    factor = 2.2e9 * scale / sum(sizes)
    return Shape("mixed SSTables", 60, [int(size * factor) + 1 for size in sizes])


def large(each: int) -> Shape:
    """Four large SSTables."""
    return Shape(f"4 × {each >> 20} MiB", 1, [each] * 4)


def parts_of(size: int) -> dict[str, int]:
    """Return the sizes of an SSTable's components beside a Data.db of this size."""
    return {
        "Data.db": size,
        "Index.db": min(size // 8, 4 << 20) + 64,
        "Filter.db": min(size // 64, 1 << 20) + 16,
        "Statistics.db": 5_000 + size % 4_000,
        "Summary.db": min(size // 512, 1 << 16) + 40,
    }


def make_snapshots(data: Path, shape: Shape) -> None:
    """Write a snapshot of each table, as Cassandra leaves it: links, whose live files compaction has removed since."""
    block, chance = os.urandom(2 * PIECE), random.Random(3)
    made: dict[Path, list[str]] = {}
    for number in range(shape.tables):
        folder = data / "ks" / f"t{number:05d}-{number:032x}" / "snapshots" / TAG
        folder.mkdir(parents=True)
        made[folder] = []
    for number, size in enumerate(shape.sizes):
        folder = list(made)[number % shape.tables]
        stem = f"nb-{number + 1}-big-"
        made[folder].append(f"{stem}Data.db")
        for component, length in parts_of(size).items():
            crc32 = _write(folder / (stem + component), length, block, chance)
            if component == "Data.db":
                (folder / f"{stem}Digest.crc32").write_text(str(crc32))
        toc = [*parts_of(size), "Digest.crc32", "TOC.txt"]
        (folder / f"{stem}TOC.txt").write_text("".join(f"{name}\n" for name in toc))
    for folder, names in made.items():
        (folder / "manifest.json").write_text(json.dumps({"files": names, "created_at": "2026-11-21T20:24:38.000Z"}))
        (folder / "schema.cql").write_text(f"CREATE TABLE ks.{folder.parts[-3].partition('-')[0]} (k int PRIMARY KEY)")
    os.sync()  # or the kernel writes all this while the first run is measured


def _write(path: Path, length: int, block: bytes, chance: random.Random) -> int:
    """Write so many bytes that do not compress; return their CRC-32."""
    crc32 = 0
    with open(path, "wb", buffering=0) as file:
        for start in range(0, length, PIECE):
            at = chance.randrange(PIECE)
            piece = memoryview(block)[at : at + min(PIECE, length - start)]
            crc32 = zlib.crc32(piece, crc32)
            file.write(piece)
    return crc32


def files_of(data: Path) -> Iterator[Path]:
    """Yield each file of the snapshots."""
    for folder, _, names in os.walk(data):
        for name in names:
            yield Path(folder, name)


def check_copied(data: Path, copy: Path) -> None:
    """Compare every file with the one at the same path below a copy of the directory."""
    for path in files_of(data):
        _check_same(path, copy / path.relative_to(data))


def check_restored(data: Path, into: Path) -> None:
    """Compare every file with <into>/<keyspace>/<table>/<name>; a manifest.json is the snapshot's, not the table's."""
    for path in files_of(data):
        if path.name != "manifest.json":
            table = path.parts[-4].partition("-")[0]
            _check_same(path, into / path.parts[-5] / table / path.name)


def _check_same(one: Path, other: Path) -> None:
    with open(one, "rb", buffering=0) as wanted, open(other, "rb", buffering=0) as found:
        while piece := wanted.read(1 << 20):
            if found.read(1 << 20) != piece:
                raise Failed(f"{other} is not what {one} is")
        if found.read(1):
            raise Failed(f"{other} is longer than {one}")
