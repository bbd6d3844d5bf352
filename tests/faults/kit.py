"""What the engines share: a small world (a node, a bucket, state) and processes of the shipped program in it.

    with Program(script) as program:
        world = World(tmp_path, program, bucket)
        world.populate()
        process = world.watch(once=True, env={"BOUNDARY_KILL": "17"})
        assert world.judge() == []          # at the moment of death
        assert world.once() == 0
        assert world.judge(done=True) == [] # and when everything is said to be done

FAULTS is unset in `make test`, where each engine runs a spread sample; `all` in `make test-faults`.
SCORE names a file to which each engine adds what it did, a line of JSON at a time: `make scorecard` adds it up.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import oracle
import pytest
from conftest import REPOSITORY, clean_environ
from scene import IMPATIENT, pins
from servers import Bucket, FileBucket
from storm import compiled
from tree import Copy, Node

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
PATIENCE_S = 60.0  # "converges" means within this time
KILLED = -signal.SIGKILL
ALL = os.environ.get("FAULTS") == "all"
WIDTH = 8  # cases at a time: most of each is waiting


def score(**numbers: float | list[float]) -> None:
    """Add to the scorecard."""
    if os.environ.get("SCORE"):
        with open(os.environ["SCORE"], "a") as file:
            file.write(json.dumps(numbers) + "\n")


def sample(items: Sequence[T], some: int) -> list[T]:
    """Return everything, or where only a sample is wanted so many, spread evenly."""
    if ALL or len(items) <= some:
        return list(items)
    return [items[number * len(items) // some] for number in range(some)]


def run_all(cases: Sequence[T], run: Callable[[T], list[str]]) -> list[str]:
    """Run cases beside each other; return what was wrong, each with its case."""

    def one(case: T) -> list[str]:
        try:
            return [f"{case}: {problem}" for problem in run(case)]
        except Exception as error:
            return [f"{case}: {error!r}"]

    with ThreadPoolExecutor(WIDTH) as pool:
        found = [problem for problems in pool.map(one, cases) for problem in problems]
    score(lost=sum(": LOST " in problem for problem in found), false_done=sum("FALSE DONE" in one for one in found))
    return found


def shim() -> str:
    """Return the shim that finds boundaries; where there is no C compiler it is reported as not run."""
    library = compiled(HERE / "boundaries.c", "-shared", "-fPIC", "-ldl")
    if not library:
        pytest.skip("not run: no C compiler for the shim that finds boundaries")
    return str(library)


class Program:
    """The shipped program (or a mutant of it) in a process that forks others; see zygote.py."""

    def __init__(self, script: Path = REPOSITORY / "cassbackup.py", preload: str = "") -> None:
        self.script, self._preload = script, preload
        self._folder = tempfile.TemporaryDirectory(prefix="cb-")  # the path of a Unix socket has 107 bytes

    def __enter__(self) -> Program:
        path = os.path.join(self._folder.name, "s")
        env = {**clean_environ(Path(self._folder.name), {}), "PYTHONDONTWRITEBYTECODE": "1"}
        if self._preload:
            env["LD_PRELOAD"] = self._preload
        command = [sys.executable, "-W", "ignore", str(HERE / "zygote.py"), str(self.script), path]
        self._zygote = subprocess.Popen(command, env=env)
        deadline = time.monotonic() + 60
        while not os.path.exists(path):
            assert self._zygote.poll() is None, "the program cannot be imported"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._zygote.kill()
        self._zygote.wait()
        self._folder.cleanup()

    def start(self, args: Iterable[object], env: Mapping[str, str], at: Path) -> Process:
        """Start a process whose output is below `at`."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(os.path.join(self._folder.name, "s"))
        environ = clean_environ(at, env)
        out = tempfile.mktemp(prefix="out-", dir=at)
        request = {"args": [str(arg) for arg in args], "env": environ, "log": str(at / "log"), "out": out}
        client.sendall(json.dumps(request).encode() + b"\n")
        return Process(client, Path(out), at / "log")


class Process:
    """A process of the program."""

    def __init__(self, client: socket.socket, out: Path, log: Path) -> None:
        self._client, self._file = client, client.makefile("rb")
        self._out, self._log = out, log
        self.pid = int(self._file.readline())
        self._code: int | None = None

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Return the exit code, negative for a signal; fail, and kill it, if it takes too long."""
        if self._code is None:
            self._client.settimeout(timeout)
            try:
                self._code = int(self._file.readline())
            except TimeoutError:
                self.signal(signal.SIGKILL)
                raise AssertionError(
                    f"still running after {timeout:.0f} s; the log ends:\n{self.log()[-3000:]}"
                ) from None
            self._file.close()
            self._client.close()
        return self._code

    def poll(self) -> bool:
        """Tell whether it still runs."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, 0)
            return self._code is None
        return False

    def signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def out(self) -> str:
        """Return what it printed."""
        return self._out.read_text(errors="surrogateescape")

    def log(self) -> str:
        """Return what it logged, and those before it."""
        return self._log.read_text(errors="replace")


class World:
    """A small node, its bucket, and everything that a process of the program keeps, below one directory."""

    def __init__(self, at: Path, program: Program, bucket: Bucket | None = None, *, seed: int = 0) -> None:
        self.at, self.program = at, program
        at.mkdir(parents=True, exist_ok=True)
        self.node = Node(at / "node", seed=seed)
        self.bucket = bucket or FileBucket(at / "bucket")
        self.environ: Mapping[str, str] = self.bucket.environ
        self.state = at / "state"
        self.before: dict[str, bytes] = {}
        self.told: set[str] = set()  # names that were given up, or refused

    def populate(self, data: int = 300) -> None:
        """Make two tables, one with an index; flush both, take a snapshot of one."""
        users = self.node.table("ks1", "users", indexes=["by_name"])
        events = self.node.table("ks1", "events")
        users.flush(size=data)
        events.flush(size=100)
        self.node.snapshot("daily", [users])

    def args(self, *more: object) -> list[object]:
        """Return the options of every command here."""
        return ["--bucket", self.bucket.target, "--state-dir", self.state, *more]

    def watch(self, *more: object, env: Mapping[str, str] | None = None, name: str = "node1") -> Process:
        """Start a daemon, or a run with --once."""
        args = ["watch", *self.node.data_dirs, *self.args("--name", name, *IMPATIENT, *more)]
        return self.program.start(args, {**self.environ, **(env or {})}, self.at)

    def once(self, *more: object, env: Mapping[str, str] | None = None) -> int:
        """Run --once to its end and return the exit code."""
        return self.watch("--once", *more, env=env).wait()

    def command(self, *args: object, env: Mapping[str, str] | None = None) -> Process:
        """Start a command that needs only the bucket, or only the state directory."""
        name, *more = args
        own = ["--state-dir", self.state] if name == "status" else [*self.args(), "--node", "node1"]
        return self.program.start([name, *more, *own], {**self.environ, **(env or {})}, self.at)

    def status(self) -> dict[str, Any]:
        """Return what a daemon says of itself, {} where none answers."""
        try:
            return self.ask("status", 10)
        except OSError:
            return {}

    def ask(self, what: str, timeout: float) -> dict[str, Any]:
        """Ask the daemon, and return its answer. Raises OSError."""
        fd = os.open(self.state, os.O_PATH)  # the path of a socket has 107 bytes, ours may have more
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(timeout)
                client.connect(f"/proc/self/fd/{fd}/socket")
                client.sendall(json.dumps({"do": what}).encode() + b"\n")
                found: dict[str, Any] = json.loads(client.makefile("rb").readline() or b"{}")
                return found
        finally:
            os.close(fd)

    def until(self, predicate: Callable[[], object], what: str, timeout: float = PATIENCE_S) -> None:
        """Wait until something is true."""
        deadline = time.monotonic() + timeout
        while not predicate():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout:.0f} s: {what}; the log ends:\n{self.log()[-3000:]}")
            time.sleep(0.02)

    def settle(self, process: Process, timeout: float = PATIENCE_S) -> None:
        """Have the daemon scan everything, and wait until all that it found is listed."""
        self.until(lambda: self.status().get("pid") == process.pid or not process.poll(), "it answers", timeout)
        self.ask("scan", timeout)
        self.until(self.is_settled, "all is listed", timeout)

    def is_settled(self) -> bool:
        """Tell whether the daemon says that nothing waits."""
        page = self.status()
        return bool(page) and page["scanned"] > 0 and page["quiet"] and not page["pending"]["units"]

    def log(self) -> str:
        """Return what was logged so far."""
        path = self.at / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def area(self) -> Path:
        """Return the pin directory."""
        return self.node.root / ".cassbackup"

    def pinned(self) -> list[str]:
        """Return the pins that there are."""
        return list(pins(self.area))

    def held(self) -> set[tuple[str, int, str]]:
        """Return path, size and CRC-32 of each file that is pinned: <quoted directory>~<life>/<name>~."""
        found = set()
        for pin in self.pinned():
            folder, name = os.path.split(pin)
            relative = oracle.plain(os.path.basename(folder).rpartition("~")[0])
            with contextlib.suppress(FileNotFoundError):  # let go meanwhile
                copy = Copy.of(Path(pin).read_bytes())
                path = self.node.data_dirs[0] / relative / oracle.plain(name.removesuffix("~"))
                found.add((str(path), copy.size, copy.crc32))
        return found

    def unheld(self, listings: Mapping[str, bytes]) -> list[oracle.Lost]:
        """Return every file that ever was and is neither pinned nor in one of these listings."""
        held = self.held()  # first: what is let go meanwhile is listed
        lost = oracle.lost(self.node.history, listings, "node1")
        return [one for one in lost if (one.path, one.copy.size, one.copy.crc32) not in held]

    def judge(self, *, done: bool = False) -> list[str]:
        """Return what is wrong with the bucket now; with `done`, also what is lost or left behind."""
        objects = self.bucket.objects()
        found = oracle.problems(objects, "node1")
        found += [f"{key}: rewritten" for key in oracle.rewritten(self.before, objects)]
        found += [f"{key}: two contents were put" for key in getattr(self.bucket, "rewritten", ())]
        self.before = objects
        if done and not found:
            told = oracle.told_lost(objects, "node1") | self.told
            lost = [one for one in oracle.lost(self.node.history, objects, "node1") if Path(one.path).name not in told]
            found += [f"LOST {one}" for one in lost]
            found += [f"{pin}: a pin is left" for pin in self.pinned()]
        return found
