"""Fixtures: buckets of every kind, a stand-in node, a fault proxy, and the program under test as a process.

Nothing here imports cassbackup: its commands and its daemon run as an operator would run them, in an
environment that holds nothing of the developer's cloud accounts and leads to no metadata service.
"""

from __future__ import annotations

import contextlib
import os
import py_compile
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import oracle
import pytest
from faultproxy import FaultProxy
from servers import (
    Bucket,
    ClosingVersity,
    FakeGcs,
    FakeMetadata,
    FileBucket,
    GcsEmulator,
    MotoS3,
    NotInstalled,
    RcloneS3,
    Service,
    Versity,
    Weed,
    kill_group,
    tethered,
)
from tree import Node

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND_TIMEOUT_S = 280.0
NO_METADATA = {"AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true"}
FOREIGN = re.compile(
    r"(AWS|BOTO|CASSBACKUP|CLOUDSDK|GCE|GCLOUD|GOOGLE|STORAGE)_.*|BUCKET_NAME|REGION|NO_GCE_CHECK"
    r"|(https?|all|no)_proxy|(REQUESTS|CURL)_CA_BUNDLE|NOTIFY_SOCKET|WATCHDOG_.*",
    re.IGNORECASE,
)


def clean_environ(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Return an environment that names no cloud, no account and no proxy, but for what `more` adds."""
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
    return {**kept, **NO_METADATA, "HOME": str(home), "PYTHONUNBUFFERED": "1", **more}


def pytest_configure() -> None:
    """Keep the test process itself off proxies and off the real metadata services.

    With CI set, hypothesis draws the same examples each time: what it finds by chance is for people to look at. It
    never holds a stalled machine against a test.
    """
    os.environ.update(NO_METADATA, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.register_profile("patient", patient)
    hypothesis.settings.register_profile("ci", patient, derandomize=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "patient")


# ------------------------------------------------------------------------------------------------------------
# Storms and kills: once in `make test`, forty times in `make test-all`

TIMES = 20
ALONE = [(False, number) for number in range(1, TIMES + 1)]
BUSY = [(True, number) for number in range(1, TIMES + 1)]
RUNS = [
    pytest.param(ALONE[0], id="once"),
    *(pytest.param(run, id=f"again{run[1]}", marks=pytest.mark.by_hand) for run in ALONE[1:]),
    *(pytest.param(run, id=f"busy{run[1]}", marks=pytest.mark.by_hand) for run in BUSY),
]
BURN = """
import hashlib, os, sys
with open(sys.argv[1], "wb", 0) as file:
    while True:
        block = os.urandom(1 << 20)
        for _ in range(20):
            hashlib.sha512(block).digest()
        file.write(block)
        os.fsync(file)
        if file.tell() > 64 << 20:
            file.seek(0)
"""


@pytest.fixture(params=RUNS)
def run_number(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Return which run of a storm or a kill this is, and keep cores and disk busy meanwhile where it is to be so."""
    is_busy, number = request.param
    files = [tmp_path / f"busy{one}" for one in range(2 if is_busy else 0)]
    commands = [tethered([sys.executable, "-c", BURN, str(file)]) for file in files]
    burning = [subprocess.Popen(command, start_new_session=True) for command in commands]
    yield int(number)
    for process in burning:
        kill_group(process)


# ------------------------------------------------------------------------------------------------------------
# Stores


def running(service: Service) -> Iterator[Service]:
    """Yield a service while it runs; skip the tests that need it where it is not installed."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(service)
        except NotInstalled as missing:
            pytest.skip(str(missing))
        yield service


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from running(RcloneS3(tmp_path_factory.mktemp("rclone")))


@pytest.fixture(scope="session")
def moto_server() -> Iterator[Service]:
    yield from running(MotoS3())


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Service]:
    yield from running(GcsEmulator())


@pytest.fixture(scope="session")
def versity_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from running(Versity(tmp_path_factory.mktemp("versity")))


@pytest.fixture(scope="session")
def closing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from running(ClosingVersity(tmp_path_factory.mktemp("versity")))


@pytest.fixture(scope="session")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from running(Weed(tmp_path_factory.mktemp("weed")))


@pytest.fixture(scope="session")
def fakegcs_server() -> Iterator[Service]:
    yield from running(FakeGcs())


# What only `make test-servers` runs.
REAL = [pytest.param(name, marks=pytest.mark.real_server) for name in ("versity", "closing", "weed", "fakegcs")]


@pytest.fixture
def tmp_bucket(tmp_path: Path) -> FileBucket:
    return FileBucket(tmp_path / "bucket")


@pytest.fixture
def rclone(rclone_server: Service) -> Bucket:
    return rclone_server.fresh()


@pytest.fixture
def moto(moto_server: Service) -> Bucket:
    return moto_server.fresh()


@pytest.fixture
def gcs(gcs_server: Service) -> Bucket:
    return gcs_server.fresh()


@pytest.fixture(params=["tmp_bucket", "rclone", "moto", "gcs"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """Return an empty bucket; the test runs once for each kind of store."""
    found: Bucket = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy() -> Iterator[Callable[[Bucket], FaultProxy]]:
    """Return a function that puts a fault proxy in front of a bucket's store."""
    with contextlib.ExitStack() as stack:
        yield lambda bucket: stack.enter_context(FaultProxy(bucket.url))


class Authority:
    """A CA of our own; `file` is its certificate."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._ca = pytest.importorskip("trustme").CA()
        self._ca.cert_pem.write_to_path(str(file))

    def context(self, name: str, **more: Any) -> ssl.SSLContext:
        """Return what a server of this name speaks TLS with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(name, **more).configure_cert(context)
        return context


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca") / "ca.pem")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return a CA that has signed nothing of ours."""
    return Authority(tmp_path_factory.mktemp("ca") / "stranger.pem")


@pytest.fixture
def secured(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FaultProxy]]:
    """Return a function that puts a fault proxy in front of a bucket's store that speaks TLS."""
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)

    def start(bucket: Bucket, name: str = "127.0.0.1", **more: Any) -> FaultProxy:
        return stack.enter_context(FaultProxy(bucket.url, authority.context(name, **more)))

    with contextlib.ExitStack() as stack:
        yield start


@pytest.fixture
def metadata() -> Iterator[Callable[..., FakeMetadata]]:
    """Return a function that starts a fake metadata service, with the arguments of `FakeMetadata`."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **more: stack.enter_context(FakeMetadata(*args, **more))


@pytest.fixture(autouse=True)
def judged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the oracle judge, after every test, each bucket in which the test itself changed nothing: P1 and P3."""
    yield
    for bucket in [found for found in request.node.funcargs.values() if isinstance(found, Bucket)]:
        if bucket.is_touched:
            continue
        roots = {key.rpartition(".listings/")[0] for key in bucket.keys() if ".listings/" in key}  # noqa: SIM118
        objects = bucket.objects() if roots else {}
        for prefix, node in (os.path.split(root) for root in roots):
            assert oracle.problems(objects, node, prefix) == []


# ------------------------------------------------------------------------------------------------------------
# The node and the program


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "cassandra")


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program under test, compiled as pip and dpkg compile it: Python would do it again at each start."""
    folder = tmp_path_factory.mktemp("script")
    folder.chmod(0o755)  # for tests that give up their rights
    compiled = folder / "cassbackup.pyc"
    py_compile.compile(str(REPOSITORY / "cassbackup.py"), str(compiled), doraise=True)
    return compiled


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return an empty home directory."""
    path = tmp_path / "home"
    path.mkdir()
    return path


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_cassbackup(script: Path, home: Path) -> Run:
    """Return a function that runs one command to its end.

    `check` is the exit code that it must have, if any; `within` are the words of a command that runs it.
    """

    def run(
        *args: object,
        env: Mapping[str, str] | None = None,
        check: int | None = None,
        within: Sequence[str] = (),
        **more: Any,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*within, sys.executable, str(script), *map(str, args)],
            check=False,
            env=clean_environ(home, env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            **{"timeout": COMMAND_TIMEOUT_S, **more},
        )
        if check is not None and done.returncode != check:
            pytest.fail(f"{args}: exit {done.returncode}, not {check}\n{done.stdout}\n{done.stderr}")
        return done

    return run


class Daemon:
    """A `cassbackup watch` process, which may die and be started again."""

    def __init__(self, command: list[str], environ: Mapping[str, str], log: Path) -> None:
        self.command = command
        self.environ = dict(environ)
        self.log_file = log
        self.process: subprocess.Popen[bytes]

    def start(self) -> Daemon:
        """Start the process, once more after its end if need be."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                tethered(self.command),
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """Return the id of the process last started."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Tell whether the process lives."""
        return self.process.poll() is None

    def log(self) -> str:
        """Return all that was logged, by every process started."""
        return self.log_file.read_text(errors="replace")

    def wait_until(self, predicate: Callable[[], object], timeout: float = 120, *, dead_is_fine: bool = False) -> None:
        """Wait until something is true; if it takes too long or the daemon dies, fail with the log's end."""
        deadline = time.monotonic() + timeout
        while not predicate():
            if not self.is_running and not dead_is_fine:
                pytest.fail(f"the daemon ended with {self.process.returncode}:\n{self.log()[-3000:]}")
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout} s; the log ends:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        kill_group(self.process)

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """Stop the process for a while; the kernel has stopped every thread of it when the block begins."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        yield
        os.kill(self.pid, signal.SIGCONT)

    def stop(self, timeout: float = 60) -> int:
        """Send SIGTERM and return the exit code; systemd waits for so long (TimeoutStopSec)."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there {timeout} s after SIGTERM; the log ends:\n{self.log()[-3000:]}")


@pytest.fixture
def daemon(script: Path, home: Path, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Return a function that starts a daemon on some paths; a bucket or name of None is for the daemon to find."""
    started: list[Daemon] = []

    def start(
        *paths: object,
        bucket: Bucket | str | None,
        env: Mapping[str, str] | None = None,
        args: tuple[object, ...] = (),
        name: str | None = "node1",
        state_dir: Path | None = None,
    ) -> Daemon:
        target = bucket.target if isinstance(bucket, Bucket) else bucket
        reaching = bucket.environ if isinstance(bucket, Bucket) else {}
        options: list[object] = ["--state-dir", state_dir or tmp_path / "state"]
        options += ["--bucket", target] if target else []
        options += ["--name", name] if name else []
        command = [sys.executable, str(script), *map(str, ["watch", *paths, *options, *args])]
        log = tmp_path / f"daemon-{len(started)}.log"
        started.append(Daemon(command, clean_environ(home, {**reaching, **(env or {})}), log))
        return started[-1].start()

    yield start
    for one in started:
        one.kill()
