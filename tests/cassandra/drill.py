"""A backup drill on a real node: the program at work beside it, what was written, and what came back."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nodes import Node
from scene import Scene

if TYPE_CHECKING:
    from subprocess import CompletedProcess


@dataclass
class Score:
    """What one scenario measured."""

    HEAD: ClassVar[str] = f"{'files':>7}{'bytes':>12}{'listed':>9}{'restored':>10}{'rows':>8}{'differ':>8}  scenario"

    scenario: str
    files: int = 0
    size: int = 0
    listed_s: float = 0.0
    restored_s: float = 0.0
    compared: int = 0
    different: int = 0

    def line(self) -> str:
        """Return a row below HEAD."""
        times = f"{self.listed_s:>7.1f} s{self.restored_s:>8.1f} s"
        return f"{self.files:>7}{self.size:>12}{times}{self.compared:>8}{self.different:>8}  {self.scenario}"

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the time that something takes to `listed_s` or `restored_s`."""
        began = time.monotonic()
        yield
        setattr(self, what, getattr(self, what) + time.monotonic() - began)

    def compare(self, found: Iterable[object], expected: Iterable[object]) -> None:
        """Compare rows, in whatever order they come."""
        got, wanted = Counter(found), Counter(expected)
        lacking, foreign = wanted - got, got - wanted
        self.compared += wanted.total()
        self.different += lacking.total() + foreign.total()
        assert got == wanted, f"lacking {lacking}, not written {foreign}"


class Drill:
    """A node, cassbackup beside it, and one bucket."""

    def __init__(self, node: Node, scene: Scene, score: Score, *filters: str) -> None:
        self.node, self.scene, self.score, self.filters = node, scene, score, filters
        self.bucket = ("--bucket", scene.bucket.target, "--node", "node1")

    def watch(self) -> None:
        """Start the daemon, and wait until it has looked everywhere once."""
        self.scene.start(*self.node.data, args=self.filters)

    def settled(self) -> None:
        """Wait until everything that was found is listed."""
        with self.score.timing("listed_s"):
            self.scene.settled()

    def snapshot(self, *args: object, check: int = 0) -> CompletedProcess[str]:
        """Run `cassbackup snapshot`."""
        tools = ["--nodetool", self.node.bin / "nodetool", "--cqlsh", self.node.bin / "cqlsh"]
        places = ["--state-dir", self.scene.state, "--bucket", self.scene.bucket.target, "--name", "node1"]
        paths = [word for path in self.node.data for word in ("--paths", path)]
        with self.score.timing("listed_s"):
            more = ["--max-bandwidth", "0", *self.filters]
            return self.scene.run("snapshot", *args, *tools, *places, *paths, *more, check=check, timeout=280)

    def restore(self, *args: object, into: Path, check: int | None = 0) -> CompletedProcess[str]:
        """Run `cassbackup restore` into a directory."""
        tool = ("--nodetool", self.node.bin / "nodetool")
        with self.score.timing("restored_s"):
            return self.scene.run("restore", *args, *self.bucket, *tool, "--into", into, check=check, timeout=280)

    def count_objects(self) -> None:
        """Note how many files were stored, and their bytes."""
        keys = self.scene.file_keys()
        self.score.files = len(keys)
        self.score.size = sum((Path(self.scene.bucket.bucket) / key).stat().st_size for key in keys)


def contents(directories: Iterable[Path], component: str) -> dict[str, bytes]:
    """Return name -> content of the SSTable components of a kind in some directories."""
    return {path.name: path.read_bytes() for directory in directories for path in directory.glob(f"*-{component}")}


def live(node: Node, table: str, component: str) -> dict[str, bytes]:
    """Return name -> content of the live components of a kind of a table `keyspace.table`."""
    return contents(node.table_directories(*table.split(".")), component)


def stored_digests(scene: Scene) -> dict[str, tuple[int, int]]:
    """Return key of each Data.db -> its CRC-32 as listed, and as its Digest.crc32 says it as stored."""
    found = {}
    for listing in scene.listings():
        keys = {entry.path: entry.key for entry in listing.entries}
        for entry in listing.entries:
            if entry.path.endswith("-Data.db"):
                digest = keys[entry.path.removesuffix("Data.db") + "Digest.crc32"]
                found[entry.key] = (int(entry.crc32, 16), int(scene.bucket.get(digest)))
    return found
