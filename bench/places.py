"""Where it is stored: S3 servers on a free port of this machine, with and without TLS; their objects are files."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from measure import Failed
from servers import (
    ACCESS_KEY,
    REGION,
    SECRET_KEY,
    NotInstalled,
    built,
    free_port,
    kill_group,
    rclone_binary,
    s3_environ,
    tethered,
)

BUCKET = "bench"
# Variables that are nobody's business here: with PYTHONDONTWRITEBYTECODE each of our starts would compile the module.
FOREIGN = ("CASSBACKUP_", "AWS_", "RCLONE_", "PYTHON")


@dataclass(frozen=True)
class Server:
    """A running S3 server. `files` is the directory behind its one bucket."""

    name: str
    url: str
    ca_file: str
    files: Path

    @property
    def environ(self) -> dict[str, str]:
        """Return what ours, s5cmd, rclone and boto3 need to reach it."""
        trust = dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), self.ca_file)
        return {**s3_environ(self.url), "AWS_REGION": REGION, **(trust if self.ca_file else {})}


def versitygw() -> str:
    """Return the program that make has built, "" where there is no Go."""
    with suppress(NotInstalled):
        return built("versitygw")
    return ""


def kinds() -> list[tuple[str, bool]]:
    """Return which servers there are, as (kind, with TLS), the one that is most like S3 first."""
    if versitygw():
        return [("versitygw", True), ("versitygw", False), ("rclone", False)]
    return [("rclone", True), ("rclone", False)]


def room_for(needed: int, scratch: Path) -> Path:
    """Return where a server keeps so many bytes: in memory if there is enough, so that no disk is measured."""
    memory = Path("/dev/shm")
    with suppress(OSError):
        free = os.statvfs(memory)
        available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
        if min(free.f_bavail * free.f_frsize, available // 2) > needed:
            return memory
    return scratch


@contextmanager
def serve(kind: str, tls: bool, place: Path, needed: int) -> Iterator[Server]:
    """Run a server with an empty bucket."""
    room = room_for(needed, place)
    root = room / f"cassbackup-bench-{os.getpid()}-{kind}-{tls}"
    (root / BUCKET).mkdir(parents=True)
    port, where = free_port(), "in memory" if room != place else "on disk"
    pem = _certificates(place) if tls else ("", "", "")
    name = {"versitygw": "versitygw", "rclone": "rclone serve s3"}[kind]
    argv = _command(kind, port, root, pem[1:])
    with open(place / f"{kind}.log", "wb") as log:
        process = subprocess.Popen(tethered(argv), stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(port, process, place / f"{kind}.log")
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        yield Server(f"{name}, {'TLS' if tls else 'plain http'}, {where}", url, pem[0], root / BUCKET)
    finally:
        kill_group(process)
        shutil.rmtree(root, ignore_errors=True)


def _command(kind: str, port: int, root: Path, pem: Sequence[str]) -> list[str]:
    address = f"127.0.0.1:{port}"
    certificate = ["--cert", pem[0], "--key", pem[1]] if pem[0] else []
    if kind == "rclone":
        options = ["--config", os.devnull, "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", *certificate]
        return [rclone_binary(), "serve", "s3", *options, "--addr", address, str(root)]
    keys = ["--access", ACCESS_KEY, "--secret", SECRET_KEY]
    return [versitygw(), *keys, *certificate, "--port", address, "--keep-alive", "--quiet", "posix", str(root)]


def _certificates(place: Path) -> tuple[str, str, str]:
    """Return the files of a CA of our own, of a certificate for 127.0.0.1, and of its key."""
    made = tuple(str(place / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    if not os.path.exists(made[0]):
        script = (
            "import sys, trustme; ca = trustme.CA(); one = ca.issue_cert('127.0.0.1');"
            " ca.cert_pem.write_to_path(sys.argv[1]); one.private_key_pem.write_to_path(sys.argv[3]);"
            " one.cert_chain_pems[0].write_to_path(sys.argv[2])"
        )
        # In a process of its own: what this one imports would count as memory of those that it starts.
        subprocess.run([sys.executable, "-c", script, *made], check=True)
    return made[0], made[1], made[2]


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(400):
        if process.poll() is not None:
            break
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise Failed(f"the server does not answer: {log.read_text()[-1000:]}")


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which nobody's settings decide what is measured."""
    mine = {name: value for name, value in environ.items() if not name.startswith(FOREIGN)}
    for name in ("BUCKET_NAME", "REGION", "SSL_CERT_DIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        mine.pop(name, None)
    return {**mine, "AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true", "AWS_CONFIG_FILE": os.devnull}
