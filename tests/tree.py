"""A stand-in for a Cassandra node: it fills a data directory as Cassandra does, link by link, in its order.

    node = Node(tmp_path, data_dirs=2)
    users = node.table("ks1", "users", indexes=["by_name"])
    users.flush()                      # an SSTable, linked into backups/ if node.incremental
    node.snapshot("daily")             # per table: links, then manifest.json, then schema.cql
    users.compact()
    node.clear("daily")

`node.history` keeps what ever stood in a snapshots/ or backups/ directory, for the oracle to compare.
Contents are random and come again with the same seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, NamedTuple

Format = Literal["big", "bti"]
WITHOUT_SCHEMA = {"system", "system_schema", "system_auth", "system_distributed", "system_traces"}
VERSIONS: dict[Format, str] = {"big": "nb", "bti": "da"}
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
# In the order in which a smaller SSTable keeps them.
COMPONENTS: dict[Format, tuple[str, ...]] = {
    "big": (
        "Data.db",
        "TOC.txt",
        "Digest.crc32",
        "Statistics.db",
        "Index.db",
        "Summary.db",
        "Filter.db",
        "CompressionInfo.db",
    ),
    "bti": (
        "Data.db",
        "TOC.txt",
        "Digest.crc32",
        "Statistics.db",
        "Partitions.db",
        "Rows.db",
        "Filter.db",
        "CompressionInfo.db",
    ),
}


class Copy(NamedTuple):
    """A file's content, as listings speak of it."""

    size: int
    crc32: str
    sha1: str

    @classmethod
    def of(cls, body: bytes) -> Copy:
        """Describe these bytes."""
        return cls(len(body), f"{zlib.crc32(body):08x}", hashlib.sha1(body, usedforsecurity=False).hexdigest())


class Unit(NamedTuple):
    """A table's snapshot, or its incrementals; `table` is the name of its directory."""

    kind: Literal["snapshot", "incremental", "archive"]
    keyspace: str
    table: str
    tag: str | None = None


class History(dict[Unit, dict[str, list[Copy]]]):
    """Every file that ever stood in a unit: unit -> source path -> its contents, oldest first."""

    def add(self, unit: Unit, path: Path | str, copy: Copy) -> None:
        """Record that a file with this content appeared."""
        copies = self.setdefault(unit, {}).setdefault(str(path), [])
        if copy not in copies:
            copies.append(copy)

    def files(self) -> Iterator[tuple[Unit, str, Copy]]:
        """Yield (unit, path, copy) for everything."""
        for unit, paths in self.items():
            for path, copies in paths.items():
                yield from ((unit, path, copy) for copy in copies)


@dataclass
class SSTable:
    """One live SSTable of a family, in the table's directory `home` of one data directory."""

    home: Path
    family: str
    stem: str
    components: dict[str, Copy]

    def path(self, component: str) -> Path:
        """Return the path of a component."""
        return self.home / self.family / f"{self.stem}-{component}"

    def write(self, component: str, body: bytes) -> None:
        """Write a component under a temporary name and rename it."""
        path = self.path(component)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(body)
        temporary.replace(path)
        self.components[component] = Copy.of(body)

    def link(self, below: str, history: History, unit: Unit | None) -> None:
        """Hard-link every component into a directory below `home`; record it if it counts for a unit."""
        folder = self.home / below / self.family
        folder.mkdir(parents=True, exist_ok=True)
        for component, copy in self.components.items():
            target = folder / f"{self.stem}-{component}"
            os.link(self.path(component), target)
            if unit:
                history.add(unit, target, copy)

    def remove(self) -> None:
        """Delete the live files."""
        for component in self.components:
            self.path(component).unlink()


class Table:
    """A table and its live SSTables; a family is the table itself ("") or an index of it (".by_name")."""

    def __init__(self, node: Node, keyspace: str, name: str, indexes: Iterable[str]) -> None:
        self.node = node
        self.keyspace = keyspace
        self.name = name
        self.id = f"{node.random.getrandbits(128):032x}"
        self.families: dict[str, list[SSTable]] = {"": [], **{f".{index}": [] for index in indexes}}
        self.generations = dict.fromkeys(self.families, 0)
        for folder in self.directories():
            for family in self.families:
                (folder / family).mkdir(parents=True)

    @property
    def directory(self) -> str:
        """Return the name of the table's directory."""
        return f"{self.name}-{self.id}"

    @property
    def sstables(self) -> list[SSTable]:
        """Return the live SSTables of the table itself."""
        return self.families[""]

    def directories(self) -> list[Path]:
        """Return the table's directory in every data directory."""
        return [data / self.keyspace / self.directory for data in self.node.data_dirs]

    def unit(self, tag: str | None = None) -> Unit:
        """Return what the history knows this table's snapshot (or, without a tag, its incrementals) by."""
        return Unit("snapshot" if tag is not None else "incremental", self.keyspace, self.directory, tag)

    def flush(self, components: int = 8, size: int = 2048, empty: Iterable[str] = ()) -> SSTable:
        """Write an SSTable (and one for each index), link it into backups/ if the node does that; return it.

        More than eight components are those of a storage-attached index; those in `empty` get zero bytes.
        """
        for family in self.families:
            sstable = self._create(family, components, size, set(empty))
            if self.node.incremental:
                sstable.link("backups", self.node.history, self.unit())
        return self.sstables[-1]

    def compact(self) -> SSTable | None:
        """Replace the live SSTables by one that holds them all; compaction never links into backups/."""
        for family, old in self.families.items():
            if old:
                components = max(len(sstable.components) for sstable in old)
                size = sum(sstable.components["Data.db"].size for sstable in old)
                self.families[family] = []
                self._create(family, components, size, set())
                for sstable in old:
                    sstable.remove()
        return self.sstables[-1] if self.sstables else None

    def rewrite_statistics(self) -> None:
        """Give every live SSTable a new Statistics.db: a new inode under the same name."""
        for sstable in self.sstables:
            sstable.write("Statistics.db", self.node.random.randbytes(component_size("Statistics.db", 0)))

    def truncate(self) -> str:
        """Take the automatic snapshot, drop all live SSTables, and return the snapshot's tag."""
        return self._let_go("truncated")

    def drop(self) -> str:
        """Drop the table: an automatic snapshot stays, and so do backups/; return the snapshot's tag."""
        tag = self._let_go("dropped")
        self.node.tables.remove(self)
        return tag

    def _let_go(self, why: str) -> str:
        tag = f"{why}-{time.time_ns() // 1_000_000}-{self.name}"
        self.snapshot(tag)
        for family, old in self.families.items():
            self.families[family] = []
            for sstable in old:
                sstable.remove()
        return tag

    def snapshot(self, tag: str, ephemeral: bool = False) -> None:
        """Link all SSTables into snapshots/<tag>, then write manifest.json, then schema.cql.

        Both go into one data directory each, picked at random, wherever the SSTables are. A repair's own
        (ephemeral) snapshot is not recorded: nobody has to save it.
        """
        unit = None if ephemeral else self.unit(tag)
        for sstables in self.families.values():
            for sstable in sstables:
                sstable.link(f"snapshots/{tag}", self.node.history, unit)
        self._write_in_place(tag, "manifest.json", self._manifest(ephemeral), unit)
        if self.keyspace not in WITHOUT_SCHEMA:
            self._write_in_place(tag, "schema.cql", self._schema(), unit)

    def _manifest(self, ephemeral: bool) -> bytes:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        live = (sstable for sstables in self.families.values() for sstable in sstables)
        files = [os.path.join(sstable.family, f"{sstable.stem}-Data.db") for sstable in live]
        about = {"files": files, "created_at": now, "expires_at": None, "ephemeral": ephemeral}
        return json.dumps(about, indent=2).encode()

    def _schema(self) -> bytes:
        table = f"{self.keyspace}.{self.name}"
        lines = [
            f"CREATE TABLE IF NOT EXISTS {table} (",
            "    key text PRIMARY KEY,",
            "    value blob",
            f") WITH ID = {uuid.UUID(self.id)};",
            *(f"CREATE INDEX IF NOT EXISTS {name[1:]} ON {table} (value);" for name in self.families if name),
        ]
        return "".join(f"{line}\n" for line in lines).encode()

    def _write_in_place(self, tag: str, name: str, body: bytes, unit: Unit | None) -> None:
        folder = self.node.random.choice(self.directories()) / "snapshots" / tag
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
        if unit:
            self.node.history.add(unit, folder / name, Copy.of(body))

    def _create(self, family: str, count: int, size: int, empty: set[str]) -> SSTable:
        """Write one SSTable, TOC.txt last, into any data directory."""
        node = self.node
        home = node.random.choice(self.directories())
        stem = f"{VERSIONS[node.format]}-{self._next_id(family)}-{node.format}"
        sstable = SSTable(home, family, stem, {})
        names = component_names(node.format, count)
        for name in (name for name in names if name not in {"TOC.txt", "Digest.crc32"}):
            length = 0 if name in empty else component_size(name, size)
            sstable.write(name, node.random.randbytes(length))
        if "Digest.crc32" in names:
            sstable.write("Digest.crc32", str(int(sstable.components["Data.db"].crc32, 16)).encode())
        sstable.write("TOC.txt", "".join(f"{name}\n" for name in names).encode())
        self.families[family].append(sstable)
        return sstable

    def _next_id(self, family: str) -> str:
        self.generations[family] += 1
        number = self.generations[family]
        if not self.node.uuid_ids:
            return str(number)
        tail = "".join(self.node.random.choices(DIGITS, k=22))
        return f"3g{DIGITS[number // 36 % 36]}{DIGITS[number % 36]}_{tail[:4]}_{tail[4:]}"

    def restart(self) -> None:
        """Number the next SSTable after the highest that is live or in backups/, as a restarted node does."""
        if self.node.uuid_ids:
            return
        for family in self.families:
            names = [name for folder in self.directories() for name in _names(folder / family)]
            names += [name for folder in self.directories() for name in _names(folder / "backups" / family)]
            found = (re.match(r"[a-z]+-(\d+)-", name) for name in names)
            self.generations[family] = max((int(match[1]) for match in found if match), default=0)


class Node:
    """A node with its data directories, its tables, and the history of what it linked where."""

    def __init__(
        self,
        root: Path,
        data_dirs: int = 1,
        *,
        seed: int = 0,
        incremental: bool = True,
        fmt: Format = "big",
        uuid_ids: bool = False,
    ) -> None:
        names = ["data"] if data_dirs == 1 else [f"data{number + 1}" for number in range(data_dirs)]
        self.root = root
        self.data_dirs = [root / name for name in names]
        self.incremental = incremental
        self.format: Format = fmt
        self.uuid_ids = uuid_ids
        self.random = random.Random(seed)
        self.history = History()
        self.tables: list[Table] = []
        for folder in self.data_dirs:
            folder.mkdir(parents=True)

    def table(self, keyspace: str, name: str, indexes: Iterable[str] = ()) -> Table:
        """Create a table, with a directory in every data directory."""
        table = Table(self, keyspace, name, indexes)
        self.tables.append(table)
        return table

    def snapshot(self, tag: str, tables: Iterable[Table] | None = None, ephemeral: bool = False) -> None:
        """Take a snapshot of some tables or of all, one after the other."""
        for table in list(self.tables if tables is None else tables):
            table.snapshot(tag, ephemeral)

    def clear(self, tag: str = "*") -> None:
        """Remove a tag's directories, or those of every tag, as `nodetool clearsnapshot` does."""
        for data in self.data_dirs:
            for folder in data.glob(f"*/*/snapshots/{tag}"):
                shutil.rmtree(folder)

    def truncate(self, table: Table) -> str:
        """Truncate a table and return the tag of its automatic snapshot."""
        return table.truncate()

    def restart(self) -> None:
        """Restart the node: SSTables are numbered on from what is live or in backups/."""
        for table in self.tables:
            table.restart()


def component_names(fmt: Format, count: int) -> tuple[str, ...]:
    """Return the names of so many components; those after the eighth are of a storage-attached index."""
    if count < 3:
        raise ValueError("an SSTable has at least Data.db, TOC.txt and Digest.crc32")
    more = ("SAI+aa+GroupComplete.db", *(f"SAI+aa+index{number}+TermsData.db" for number in range(count - 9)))
    return (*COMPONENTS[fmt], *more)[:count]


def component_size(name: str, data: int) -> int:
    """Return the size of a component beside so many bytes of Data.db; some are empty in real life too."""
    if name == "Rows.db" or name.endswith("Complete.db"):
        return 0
    sizes = {"Data.db": data, "Statistics.db": 512, "Summary.db": 47, "CompressionInfo.db": 47 + data // 2048}
    return sizes.get(name, 8 + data // 20)


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(folder)
    return []
