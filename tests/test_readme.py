"""The README: its restore drill run as it stands there, its length, its contents.

Its commands are extracted from the fenced blocks marked `sh`. Only names of this world are put in for those of the
README: the bucket, the moment, and a directory for /var/lib/cassandra. What stands on PATH for nodetool, cqlsh,
systemctl and sudo writes down how it was called; nodetool takes the files of an import, as Cassandra's does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, REPOSITORY, Daemon, Run, clean_environ
from scene import Scene
from servers import FileBucket
from tree import Copy, Node

README = REPOSITORY / "README.md"
NODE_NAME = "db7-i-0abc"
TOOLS = {
    # sudo -u cassandra ..., which leaves nothing of the environment but what the stand-ins need
    "sudo": 'shift 2\nexec env -i PATH="$PATH" HOME="$HOME" TAKEN="$TAKEN" CALLS="$CALLS" NO_GCE_CHECK=true "$@"',
    "systemctl": "",
    "cqlsh": 'test -s "$2"',
    "nodetool": """case $1 in
        version) echo ReleaseVersion: 4.1.3;;
        statusbackup) echo not running;;
        import) mkdir -p "$TAKEN/$2/$3" && mv "$4"/* "$TAKEN/$2/$3/";;
    esac""",
}


def blocks(title: str) -> list[str]:
    """Return the blocks of shell commands below a heading of the README, down to the next heading."""
    text = README.read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    found: list[str] = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no commands below {title!r}"
    return found


@dataclass
class Drill:
    """A machine with a bucket and an empty /var/lib/cassandra, on which blocks of the README are run."""

    root: Path
    scene: Scene
    at: float = 0.0

    @property
    def cassandra(self) -> Path:
        """Return what stands for /var/lib/cassandra."""
        return self.root / "new" / "cassandra"

    def run(self, title: str) -> str:
        """Run the commands below a heading, after those of the drill's beginning; return what was said."""
        moment = datetime.fromtimestamp(self.at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        script = "\n".join(["set -e", *blocks("Restore drill"), *blocks(title)])
        script = script.replace("s3://my-bucket/cluster1", self.scene.bucket.target)
        script = script.replace("/var/lib/cassandra", str(self.cassandra))
        script = re.sub(r"^AT=\S+", f"AT={moment}", script, flags=re.MULTILINE)
        env = clean_environ(self.root, {"TAKEN": str(self.root / "taken"), "CALLS": str(self.root / "calls")})
        env["PATH"] = f"{self.root / 'bin'}:{env['PATH']}"
        words, limit = ["bash", "-c", script], COMMAND_TIMEOUT_S
        done = subprocess.run(words, check=False, env=env, capture_output=True, text=True, timeout=limit)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def calls(self) -> list[str]:
        """Return how the tools were called."""
        return (self.root / "calls").read_text().splitlines()


@pytest.fixture
def drill(
    tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket, script: Path
) -> Drill:
    found = Drill(tmp_path, Scene(tmp_path, daemon, run_cassbackup, tmp_bucket))
    (found.cassandra / "data").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    tools = TOOLS | {"cassbackup": f'exec {sys.executable} {script} "$@"'}
    for name, body in tools.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> "$CALLS"\n{body}\n')
        path.chmod(0o755)
    return found


def back_up(drill: Drill, node: Node) -> None:
    """Store what there is, under the node's name of the README."""
    drill.scene.once(node.root / "data", args=("--name", NODE_NAME))


def contents(root: Path) -> dict[str, Copy]:
    """Return the files below a directory but for what is no SSTable."""
    files = [path for path in root.rglob("*-*") if path.is_file() and "snapshots" not in path.parts]
    return {str(path.relative_to(root)): Copy.of(path.read_bytes()) for path in files if "backups" not in path.parts}


def next_second() -> float:
    """Return a whole second that lies after all that was done and before all that will be."""
    time.sleep(1.1)
    moment = time.time() // 1
    time.sleep(1.1)
    return moment


def test_it_can_be_read_in_one_sitting_and_lists_what_it_contains() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 350
    assert [line for line in lines if len(line) > 120] == []
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    contents = " ".join(lines).partition("**Contents:**")[2].partition("## ")[0]
    assert re.findall(r"\[([^]]+)\]\(#", contents) == headings
    assert re.findall(r"\(#([^)]+)\)", contents) == [name.lower().replace(" ", "-") for name in headings]


@pytest.mark.slow
def test_a_table_that_was_dropped_comes_back_as_the_readme_says(drill: Drill, node: Node) -> None:
    users = node.table("shop", "users")
    users.flush()
    node.snapshot("daily")
    users.flush()
    live = contents(users.directories()[0])
    back_up(drill, node)
    drill.at = next_second()
    users.flush()
    users.drop()
    back_up(drill, node)
    drill.run("One table was dropped, truncated or ruined, and the cluster is up")
    assert contents(drill.root / "taken" / "shop" / "users") == live
    staged = f"{drill.cassandra}/restore/shop/users"
    assert drill.calls().index("nodetool disablebackup") < drill.calls().index(f"nodetool import shop users {staged}")
    assert f"cqlsh -f {staged}/schema.cql" in drill.calls()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "same"),
    [
        ("One node was lost, and comes back with its own name and address", True),
        ("The whole cluster was lost, and comes back on other machines", False),
    ],
)
def test_a_lost_node_comes_back_as_the_readme_says(drill: Drill, node: Node, title: str, same: bool) -> None:
    users, local = node.table("shop", "users", indexes=["by_name"]), node.table("system", "local")
    for table in (users, local, node.table("system_schema", "tables")):
        table.flush()
    live = contents(node.root / "data")
    node.snapshot("daily")
    users.flush()
    node.restart()
    live = contents(node.root / "data")
    back_up(drill, node)
    drill.at = next_second()
    if same:  # the old disk is gone, and the new one is mounted at the same place
        shutil.rmtree(node.root)
        drill.cassandra.rmdir() if not os.listdir(drill.cassandra) else shutil.rmtree(drill.cassandra)
        (node.root / "data").mkdir(parents=True)
        drill.cassandra.symlink_to(node.root)
    said = drill.run(title)
    wanted = {name: copy for name, copy in live.items() if same or not name.startswith("system/local-")}
    assert contents(drill.cassandra / "data") == wanted
    assert "systemctl start cassandra" in drill.calls()
    assert same or "auto_bootstrap: false" in said
