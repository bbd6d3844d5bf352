"""A stage for whole runs: a bucket, a daemon that may die and come back, and what can be asked of both.

scene.start(node.root / "data")         # the program, on real inotify and real hard links
scene.settled()                         # `status --wait`: everything found is listed
scene.assert_all_is_listed(node.history)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oracle
import pytest
from oracle import Listing
from servers import Bucket
from tree import Copy, History, Node

if TYPE_CHECKING:  # tests/cassandra has a conftest of its own
    from conftest import Daemon, Run

IMPATIENT = ("--incomplete-after", "1s", "--max-bandwidth", "0")  # where all is there already
# Of a daemon: a test, or its disk, that stalls between two links makes no snapshot that Cassandra has left unfinished.
PATIENT = ("--incomplete-after", "20s", "--max-bandwidth", "0")


def nobody() -> list[str]:
    """Return what makes a command somebody else's; skip where that cannot be, or cannot read this Python."""
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv to become somebody else")
    if subprocess.run([*become, sys.executable, "-c", "import pyinotify"], check=False, capture_output=True).returncode:
        pytest.skip(f"nobody else may read {sys.executable}")
    return become


def wait_for(predicate: Callable[[], object], timeout: float = 120.0) -> None:
    """Wait until something is true, and fail if it does not become so."""
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


class Scene:
    """One bucket and the daemons that fill it; `at` holds state directory, logs and everything else."""

    def __init__(self, at: Path, daemon: Callable[..., Daemon], run: Run, bucket: Bucket) -> None:
        self.at, self.bucket, self.run = at, bucket, run
        self._launch = daemon
        self.environ: Mapping[str, str] = bucket.environ
        self.daemon: Daemon

    @property
    def state(self) -> Path:
        """Return the state directory."""
        return self.at / "state"

    def start(self, *paths: object, args: tuple[object, ...] = ()) -> Daemon:
        """Start a daemon and wait until it has scanned everything once; who wants incomplete listings soon says so."""
        self.daemon = self._launch(*paths, bucket=self.bucket, args=(*PATIENT, *args), env=self.environ)
        return self.until_it_watches()

    def restart(self) -> Daemon:
        """Start the daemon again after its end."""
        self.daemon.start()
        return self.until_it_watches()

    def until_it_watches(self) -> Daemon:
        """Wait until the daemon last started has scanned everything."""

        def has_scanned() -> bool:
            page = self.page()
            return page.get("pid") == self.daemon.pid and page["scanned"] > 0

        self.daemon.wait_until(has_scanned)
        return self.daemon

    def once(
        self, *paths: object, args: tuple[object, ...] = (), check: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run `--once`."""
        options = ["--bucket", self.bucket.target, "--state-dir", self.state, "--name", "node1", *IMPATIENT, *args]
        return self.run("watch", *paths, "--once", *options, env=self.environ, check=check)

    def page(self) -> dict[str, Any]:
        """Return what `status --json` says at the moment, {} before there is anything to say."""
        done = self.run("status", "--json", "--state-dir", self.state)
        found: dict[str, Any] = json.loads(done.stdout or "{}")
        return found

    def until_found(self, files: int) -> None:
        """Wait until the daemon last started has found so many files, which may go then: the store may be away."""
        wait_for(lambda: self.page()["counts"].get("found", 0) >= files)

    def settled(self, timeout: float = 280) -> dict[str, Any]:
        """Wait until everything that was found is listed, and return the status."""
        done = self.run("status", "--wait", "--json", "--state-dir", self.state, timeout=timeout)
        assert self.daemon.is_running, self.daemon.log()[-3000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def listings(self, kind: str = "") -> list[Listing]:
        """Return the bucket's listings, oldest first."""
        return [found for found in oracle.listings(self.bucket.objects(), "node1") if kind in {"", found.of.kind}]

    def assert_all_is_listed(self, history: History) -> None:
        """Fail unless every file that ever was in its unit is listed, and every listing is true."""
        objects = self.bucket.objects()
        assert oracle.problems(objects, "node1") == []
        assert oracle.lost(history, objects, "node1") == []

    def file_keys(self) -> list[str]:
        """Return the keys under which files were stored."""
        return [key for key in self.bucket.keys() if key.startswith("node1/")]  # noqa: SIM118 - a method of ours


def assert_no_pin_is_left(*areas: Path) -> None:
    """Fail if a pin directory keeps anything; what was let go may take a moment to be unlinked."""
    wait_for(lambda: not list(pins(*areas)))


def pins(*areas: Path) -> Iterator[str]:
    """Yield the files of pin directories whose names mark them as pins."""
    for area in areas:
        for folder, _, names in os.walk(area):
            yield from (os.path.join(folder, name) for name in names if "~" in name)


def area_of(node: Node) -> Path:
    """Return the pin directory of a node's data directories."""
    return node.root / ".cassbackup"


def note(history: History, node: Node, table: Any, tag: str | None, path: Path) -> None:
    """Record a file that was made by hand in a table's snapshot or backups/."""
    history.add(table.unit(tag), path, Copy.of(path.read_bytes()))
