"""What systemd is told, over a real datagram socket, and what its units run and skip."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, Daemon, Run
from faultproxy import FaultProxy
from scene import Scene, wait_for
from servers import Bucket, FileBucket
from tree import Node

WATCHDOG_S = 4.0


class Manager:
    """Stands for systemd: a bound socket, and all that was said to it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.said: list[str] = []

    def hear(self, seconds: float) -> list[str]:
        """Return the lines of the next datagram, [] where none comes for so long."""
        self.socket.settimeout(seconds)
        try:
            lines = self.socket.recv(65536).decode().splitlines()
        except TimeoutError:
            return []
        self.said += lines
        return lines

    def until(self, line: str) -> None:
        """Listen until a line is said that begins so."""
        wait_for(lambda: any(said.startswith(line) for said in self.hear(1)))


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Manager, str]]:
    name = f"cassbackup-test-{os.getpid()}-{tmp_path.name}"
    one = Manager(f"\0{name}" if request.param == "abstract" else str(tmp_path / "notify"))
    with one.socket:
        yield one, f"@{name}" if request.param == "abstract" else str(tmp_path / "notify")


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


@pytest.fixture
def heard(scene: Scene, tmp_path: Path) -> Iterator[Manager]:
    """Have the scene's daemons watched by a manager that wants to hear of them every few seconds."""
    manager = Manager(str(tmp_path / "notify"))
    watched = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": f"{WATCHDOG_S * 1e6:.0f}"}
    scene.environ = {**scene.environ, **watched}
    with manager.socket:
        yield manager


def start(scene: Scene, node: Node) -> None:
    """Start a daemon whose pinner says once a second that it lives."""
    scene.start(*node.data_dirs, args=("--reconcile", "1s"))


FREEZE = """
import ctypes, os, sys
libc, pid = ctypes.CDLL(None), int(sys.argv[1])
libc.ptrace.argtypes = [ctypes.c_long] * 4
for thread in map(int, os.listdir(f"/proc/{pid}/task")):
    for request in (0x4206, 0x4207):  # PTRACE_SEIZE, PTRACE_INTERRUPT
        if thread != pid and libc.ptrace(request, thread, 0, 0):
            sys.exit(1)
print("frozen", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def all_frozen_but_the_main_thread(pid: int) -> Iterator[None]:
    """Stop every other thread where it is, as a lock or a dead disk would. They go on when their tracer ends."""
    command = [sys.executable, "-c", FREEZE, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline() != "frozen\n":
            pytest.skip("ptrace is not allowed here")
        try:
            yield
        finally:
            tracer.communicate()


def test_it_says_ready_and_its_lag_and_that_it_stops(scene: Scene, node: Node, manager: tuple[Manager, str]) -> None:
    systemd, address = manager
    scene.environ = {"NOTIFY_SOCKET": address}
    scene.start(*node.data_dirs)
    systemd.until("READY=1")
    systemd.until("STATUS=lag 0 s, 0 files pending")
    assert scene.daemon.stop() == 0
    systemd.until("STOPPING=1")
    assert [line for line in systemd.said if line.startswith("WATCHDOG")] == [], "nobody asked for it"


@pytest.mark.slow
def test_it_is_ready_though_the_store_is_down_and_says_so(
    scene: Scene, heard: Manager, node: Node, moto: Bucket, proxy: Callable[[Bucket], FaultProxy]
) -> None:
    between = proxy(moto)
    scene.bucket, scene.environ = moto, {**scene.environ, **moto.through(between.url)}
    start(scene, node)
    scene.daemon.kill()
    between.down()
    node.table("ks1", "users").flush()
    while heard.hear(0.1):  # what was said while the store was up
        pass
    scene.restart()
    heard.until("READY=1")
    heard.until("STATUS=lag 1")
    for _ in range(3):  # waiting for a store that is down is progress
        heard.until("WATCHDOG=1")


@pytest.mark.slow
def test_the_watchdog_hears_nothing_more_when_the_threads_hang_and_the_loop_goes_on(
    scene: Scene, heard: Manager, node: Node
) -> None:
    start(scene, node)

    def goes_on() -> bool:
        heard.until("WATCHDOG=1")
        with all_frozen_but_the_main_thread(scene.daemon.pid):
            wait_for(lambda: "WATCHDOG=1" not in [line for _ in range(4) for line in heard.hear(WATCHDOG_S)], 100)
            return any(line.startswith("STATUS=") for line in heard.hear(10))

    wait_for(goes_on)  # else it is a death that was seen: a thread was stopped where it held what the loop needs


def test_a_watchdog_meant_for_another_process_is_not_answered(scene: Scene, heard: Manager, node: Node) -> None:
    scene.environ = {**scene.environ, "WATCHDOG_PID": "1"}
    start(scene, node)
    heard.until("READY=1")
    heard.until("STATUS=")
    assert "WATCHDOG=1" not in heard.said


def test_a_manager_that_is_gone_is_no_reason_to_stop(scene: Scene, heard: Manager, node: Node, tmp_path: Path) -> None:
    (tmp_path / "notify").unlink()
    node.table("ks1", "users").flush()
    start(scene, node)
    scene.settled()
    scene.assert_all_is_listed(node.history)


UNITS = {unit.name.removeprefix("cassbackup."): unit for unit in (REPOSITORY / "debian").glob("*.service")}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        (None, False),
        ("#BUCKET_NAME=s3://bucket\nREGION=x\n#CASSBACKUP_KEEP_LAST=\n", False),
        ("export BUCKET_NAME=s3://bucket\nCASSBACKUP_KEEP_LAST=3\n", True),  # wrong, and the program says so
        ("BUCKET_NAME=s3://bucket\n", None),
        ("BUCKET_NAME=s3://bucket\nCASSBACKUP_KEEP_LAST=\n", None),
        ("BUCKET_NAME=s3://bucket\nCASSBACKUP_KEEP_WITHIN=30d\n", True),
    ],
    ids=["absent", "commented", "exported", "no-policy", "empty-policy", "set"],
)
def test_a_unit_is_skipped_only_where_nothing_is_set(
    unit: str, settings: str | None, runs: bool | None, tmp_path: Path
) -> None:
    """None is for prune alone, which needs a policy too."""
    file = tmp_path / "default"
    if settings is not None:
        file.write_text(settings)
    conditions = re.findall(r"^ExecCondition=/bin/sh -c '(.*)'$", UNITS[unit].read_text(), re.MULTILINE)
    assert conditions
    done = [
        subprocess.run(
            ["/bin/sh", "-c", condition.replace("/etc/default/cassbackup", str(file))],
            env={"PATH": os.environ["PATH"]},
            check=False,
            capture_output=True,
            text=True,
        )
        for condition in conditions
    ]
    expected = "prune" not in unit if runs is None else runs
    assert all(one.returncode == 0 for one in done) == expected
    said = "".join(one.stdout for one in done)
    assert expected or "BUCKET_NAME is not set" in said or "so nothing is deleted" in said


@pytest.mark.parametrize("unit", UNITS)
def test_the_commands_of_the_units_are_understood(unit: str, run_cassbackup: Run, tmp_path: Path) -> None:
    """They get as far as the data, the bucket or nodetool, which are not there."""
    command = re.findall(r"^ExecStart=/usr/bin/cassbackup (.*)$", UNITS[unit].read_text(), re.MULTILINE)[0]
    environ = {"BUCKET_NAME": f"file://{tmp_path}/none", "CASSBACKUP_PATHS": f"{tmp_path}/data"}
    environ |= {"CASSBACKUP_KEEP_LAST": "1", "CASSBACKUP_STATE_DIR": str(tmp_path / "state")}
    done = run_cassbackup(*command.split(), env=environ)
    assert done.returncode in {1, 2}
    assert str(tmp_path) in done.stderr or "nodetool cannot be run" in done.stderr
    assert "Traceback" not in done.stderr
