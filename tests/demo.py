"""`make demo`: cassbackup at its main job, on a generated Cassandra data directory and a file:// bucket.

Two snapshots are taken and cleared a second later, while incrementals arrive. Then the listings in the bucket, and
the bytes behind them, are compared with everything that had existed; the last snapshot is restored into an empty
directory and compared; and one byte in the bucket is changed, which `cassbackup verify` must find.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
from tree import Copy, Node

HERE = Path(__file__).resolve().parent.parent
MODULE = HERE / "cassbackup.py"
ROOT = HERE / ".demo"
BUCKET = ROOT / "bucket"
DATA = ROOT / "cassandra" / "data"
RESTORED = ROOT / "restored"
NODE = "demo-node"
ENVIRON = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("CASSBACKUP_", "AWS_"))},
    "BUCKET_NAME": f"file://{BUCKET}",
    "CASSBACKUP_NAME": NODE,
    "CASSBACKUP_STATE_DIR": str(ROOT / "state"),
    # A demo may run on a disk that is nearly full.
    "CASSBACKUP_MIN_FREE": "1%",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
}


def say(text: str) -> None:
    """Print a step."""
    print(f"\n== {text}", flush=True)


def run(*words: str) -> int:
    """Run a cassbackup command, show it and its output; return its exit code."""
    print(f"$ cassbackup {shlex.join(words)}", flush=True)
    command = [sys.executable, str(MODULE), *words]
    done = subprocess.run(command, check=False, env=ENVIRON, capture_output=True, text=True, cwd=HERE)
    print(done.stdout + done.stderr, end="", flush=True)
    return done.returncode


def status(*words: str) -> dict[str, Any]:
    """Return the daemon's own account; with --wait, once everything that it found is listed."""
    command = [sys.executable, str(MODULE), "status", "--json", *words]
    done = subprocess.run(command, check=False, env=ENVIRON, capture_output=True, text=True, timeout=600)
    page: dict[str, Any] = json.loads(done.stdout or "{}")
    return page


@contextmanager
def daemon() -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon, with its log in a file; end it with SIGTERM."""
    print(f"$ BUCKET_NAME=file://$PWD/{BUCKET.relative_to(HERE)} cassbackup {DATA.relative_to(HERE)} &", flush=True)
    with open(ROOT / "cassbackup.log", "wb") as log:
        process = subprocess.Popen([sys.executable, str(MODULE), "watch", str(DATA)], env=ENVIRON, stderr=log)
        try:
            while not status().get("scanned"):
                if process.poll() is not None:
                    sys.exit((ROOT / "cassbackup.log").read_text())
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def build() -> Node:
    """Make a data directory with two keyspaces, an index, large and empty files."""
    node = Node(DATA.parent, incremental=False)
    users, events = node.table("shop", "users", indexes=["users_by_name"]), node.table("shop", "events")
    for table, sstables, size in (
        (users, 6, 400_000),
        (events, 12, 100_000),
        (node.table("system", "local"), 3, 2_000),
    ):
        for _ in range(sstables):
            table.flush(size=size)
    events.flush(size=24_000_000)
    node.incremental = True
    return node


def snapshot(node: Node, tag: str) -> None:
    """Take a snapshot and clear it as soon as a `nodetool clearsnapshot` could: a JVM takes a second to start."""
    node.snapshot(tag)
    time.sleep(1.0)
    node.clear(tag)
    print(f"$ nodetool snapshot -t {tag} && nodetool clearsnapshot -t {tag}", flush=True)


def compare(node: Node) -> int:
    """Compare the bucket with all that had existed; return how many files are lost, or not what they were."""
    objects = {str(path.relative_to(BUCKET)): path.read_bytes() for path in BUCKET.rglob("*") if path.is_file()}
    existed = list(node.history.files())
    lost, problems = oracle.lost(node.history, objects, NODE), oracle.problems(objects, NODE)
    print(f"files that had existed in snapshots/ and backups/: {len(existed)}")
    print(f"listings in the bucket:                            {len(oracle.listings(objects, NODE))}")
    print(f"lost:                                              {len(lost)}")
    print(f"listed, but absent or with other bytes:            {len(problems)}")
    for problem in [*lost, *problems][:10]:
        print(f"  {problem}")
    return len(lost) + len(problems)


def restored(node: Node, tag: str) -> int:
    """Compare what was restored with the snapshot as it had been; return how many files differ."""
    wanted = {
        "/".join([unit.keyspace, unit.table.rpartition("-")[0], path.partition(f"/snapshots/{tag}/")[2]]): copy
        for unit, path, copy in node.history.files()
        if unit.tag == tag and not path.endswith("/manifest.json")  # it is of the snapshot, not of the table
    }
    found = {str(path.relative_to(RESTORED)): path.read_bytes() for path in RESTORED.rglob("*") if path.is_file()}
    wrong = [name for name in wanted.keys() | found.keys() if Copy.of(found.get(name, b"")) != wanted.get(name)]
    print(f"files of that snapshot: {len(wanted)}; restored, byte by byte the same: {len(wanted) - len(wrong)}")
    return len(wrong)


def tamper() -> None:
    """Change one byte of one Data.db in the bucket, and no date."""
    victim = max((BUCKET / NODE).rglob("*-Data.db"), key=lambda path: path.stat().st_size)
    before = victim.stat()
    with victim.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    print(f"one bit changed: {victim.relative_to(HERE)}")


def main() -> int:
    """Run the demo; exit 0 if nothing was lost, the restore is right, and the damage was found."""
    shutil.rmtree(ROOT, ignore_errors=True)
    say("a Cassandra data directory is generated")
    node = build()
    before = oracle.survey(DATA)
    print(
        f"{sum(1 for path in before if Path(path).suffix)} files in {len(node.tables)} tables"
        f" below {DATA.relative_to(HERE)}"
    )
    with daemon():
        say("a snapshot is taken, and cleared at once")
        snapshot(node, "monday")
        first = status("--wait")
        print(f"sent: {first['sent']['files']} files, {first['sent']['bytes']:,} bytes")
        say("Cassandra flushes, and links each new SSTable into backups/")
        for table in node.tables[:2]:
            table.flush(size=200_000)
        second = status("--wait")
        print(f"sent: {second['sent']['files'] - first['sent']['files']} files more")
        say("the next snapshot, cleared at once: what is stored already is not sent again")
        snapshot(node, "tuesday")
        third = status("--wait")
        sent = third["sent"]["files"] - second["sent"]["files"]
        print(
            f"sent: {sent} files; listed without sending: "
            f"{third['counts']['listed_files'] - second['counts']['listed_files'] - sent}"
        )
        say("how it stands")
        run("status", "--max-age", "1h")
    say("the bucket, compared with everything that had existed")
    wrong = compare(node)
    say("what there is to restore, from the bucket alone")
    run("list")
    say("is every object what its listing says? then back with it, into an empty directory")
    wrong += run("verify", "--latest", "--deep")
    wrong += run("restore", "--tag", "tuesday", "--table", "*", "--into", str(RESTORED.relative_to(HERE)))
    wrong += restored(node, "tuesday")
    say("somebody tampers with the bucket")
    tamper()
    wrong += run("verify", "--latest", "--deep") != 1
    print(
        f"\nHave a look: {BUCKET.relative_to(HERE)},"
        f" and the daemon's log in {(ROOT / 'cassbackup.log').relative_to(HERE)}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
