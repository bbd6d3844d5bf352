"""Uploading: reading without a trace in the page cache, and a pool in which large and small files take turns."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import random
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest
from faultproxy import Call, FaultProxy, assert_written_once, count, s3_error, writes
from servers import Bucket, Service

from cassbackup import (
    PART_BYTES,
    Access,
    Budget,
    Corrupt,
    Denied,
    Head,
    Pinned,
    Retrying,
    Stamp,
    Store,
    Uploaders,
    open_store,
    read_quietly,
)

LIMIT_S = 100.0  # for what hangs
PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# ------------------------------------------------------------------------------------------------------------
# Reading


def cached(path: Path) -> list[bool]:
    """Tell of each page of a file whether it is in the page cache, by mincore(2)."""
    size = path.stat().st_size
    resident = ctypes.create_string_buffer(-(-size // PAGE))
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as window,
    ):
        first = ctypes.c_char.from_buffer(window)
        assert ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(size), resident) == 0
        del first
    return [bool(byte & 1) for byte in resident.raw]


def make(path: Path, size: int = SIZE, warm: range = range(0)) -> bytes:
    """Write a file that is on the disk and, but for some pages, not in the page cache."""
    body = noise(size)
    path.write_bytes(body)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for page in warm:
            os.pread(fd, PAGE, page * PAGE)
    finally:
        os.close(fd)
    if cached(path) != [page in warm for page in range(-(-size // PAGE))]:
        pytest.skip("this file system keeps everything in memory")
    return body


def quietly(path: Path, offset: int = 0, size: int = SIZE) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return bytes(read_quietly(fd, offset, size))
    finally:
        os.close(fd)


PREADV2 = {"x86_64": 327, "aarch64": 286}
DONTCACHE = 0x80


def refuse_dontcache(code: int) -> None:
    """Make the kernel refuse preadv2(RWF_DONTCACHE) to this thread for good, as an older one would: seccomp(2)."""
    load, equal, has, give = 0x20, 0x15, 0x45, 0x06
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in [
            (load, 0, 0, 0),  # the number of the call
            (equal, 0, 3, PREADV2[platform.machine()]),
            (load, 0, 0, 16 + 8 * 5),  # its sixth argument
            (has, 0, 1, DONTCACHE),
            (give, 0, 0, 0x00050000 | code),  # SECCOMP_RET_ERRNO
            (give, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        ]
    )
    code_of = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code_of)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    arguments = [ctypes.c_ulong(number) for number in (1, 0, 0, 0)]
    if prctl(38, *arguments) or prctl(22, ctypes.c_ulong(2), head, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), "no seccomp here")


def on_an_old_kernel(call: Callable[[], Any], code: int = errno.EOPNOTSUPP) -> Any:
    """Call in a thread of its own that the kernel refuses RWF_DONTCACHE."""
    if platform.machine() not in PREADV2:
        pytest.skip("the number of preadv2 is not known here")
    result: Future[Any] = Future()

    def run() -> None:
        try:
            refuse_dontcache(code)
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run).start()
    try:
        return result.result(LIMIT_S)
    except OSError as error:
        if "no seccomp" in str(error):
            pytest.skip(str(error))
        raise


def directly(call: Callable[[], Any], code: int = 0) -> Any:
    return call()


KERNELS = pytest.mark.parametrize("kernel", [directly, on_an_old_kernel], ids=["this-kernel", "old-kernel"])


def test_the_old_kernel_refuses(tmp_path: Path) -> None:
    """Otherwise the tests of the other way would be tests of this one."""
    make(tmp_path / "f")

    def read() -> int:
        with (tmp_path / "f").open("rb") as file:
            try:
                return os.preadv(file.fileno(), [bytearray(10)], 0, DONTCACHE)
            except OSError as error:
                return -error.errno

    assert on_an_old_kernel(read, errno.EXDEV) == -errno.EXDEV


@KERNELS
@pytest.mark.parametrize("warm", [range(0), range(SIZE // PAGE), range(8, 24), range(0, 64, 2), range(63, 64)], ids=str)
def test_the_page_cache_is_left_as_it_was_found(tmp_path: Path, kernel: Callable[..., Any], warm: range) -> None:
    """P5 Do no harm: what Cassandra has there stays, what it has not does not come."""
    body = make(tmp_path / "f", warm=warm)
    before = cached(tmp_path / "f")
    assert kernel(lambda: quietly(tmp_path / "f")) == body
    assert cached(tmp_path / "f") == before


@KERNELS
@pytest.mark.parametrize(("offset", "size"), [(8 * PAGE, 8 * PAGE), (60 * PAGE, 4 * PAGE)])
def test_a_part_is_read_and_leaves_no_trace(tmp_path: Path, kernel: Callable[..., Any], offset: int, size: int) -> None:
    """P5 Do no harm: nor does reading ahead bring what was not asked for."""
    body = make(tmp_path / "f", warm=range(10, 12))
    before = cached(tmp_path / "f")
    assert kernel(lambda: quietly(tmp_path / "f", offset, size)) == body[offset : offset + size]
    assert cached(tmp_path / "f") == before


@KERNELS
def test_a_part_in_the_middle_leaves_its_neighbours_alone(tmp_path: Path, kernel: Callable[..., Any]) -> None:
    body = make(tmp_path / "f", 4 << 20)
    assert kernel(lambda: quietly(tmp_path / "f", 1 << 20, 1 << 20)) == body[1 << 20 : 2 << 20]
    assert cached(tmp_path / "f").count(True) == 0


@KERNELS
def test_a_file_read_part_by_part_leaves_no_trace(tmp_path: Path, kernel: Callable[..., Any]) -> None:
    body, part = make(tmp_path / "f", 4 << 20), 1 << 20
    for start in range(0, 4 << 20, part):
        assert kernel(lambda start=start: quietly(tmp_path / "f", start, part)) == body[start : start + part]
    assert not any(cached(tmp_path / "f"))


@KERNELS
def test_a_file_that_ends_within_a_page_leaves_no_trace(tmp_path: Path, kernel: Callable[..., Any]) -> None:
    body = make(tmp_path / "f", SIZE + 100)
    assert kernel(lambda: quietly(tmp_path / "f", 0, SIZE + 100)) == body
    assert not any(cached(tmp_path / "f"))


@KERNELS
def test_an_empty_file_is_read(tmp_path: Path, kernel: Callable[..., Any]) -> None:
    (tmp_path / "f").write_bytes(b"")
    assert kernel(lambda: quietly(tmp_path / "f", 0, 0)) == b""


@KERNELS
@pytest.mark.parametrize("left", [0, 100, PAGE, SIZE - 1])
def test_a_file_that_became_shorter_is_refused(tmp_path: Path, kernel: Callable[..., Any], left: int) -> None:
    make(tmp_path / "f")
    os.truncate(tmp_path / "f", left)
    with pytest.raises(Corrupt, match="changed while"):
        kernel(lambda: quietly(tmp_path / "f"))


@KERNELS
def test_a_file_in_memory_is_read(kernel: Callable[..., Any], tmp_path: Path) -> None:
    """On tmpfs, which may know nothing of RWF_DONTCACHE."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no tmpfs")
    path = shm / f"cassbackup-test-{os.getpid()}"
    try:
        path.write_bytes(noise(SIZE))
        assert kernel(lambda: quietly(path)) == noise(SIZE)
    finally:
        path.unlink()


@pytest.mark.parametrize("code", [errno.EIO, errno.EPERM])
def test_other_refusals_are_errors(tmp_path: Path, code: int) -> None:
    make(tmp_path / "f")
    with pytest.raises(OSError, match=os.strerror(code)):
        on_an_old_kernel(lambda: quietly(tmp_path / "f"), code)


# ------------------------------------------------------------------------------------------------------------
# The pool


class Patient(threading.Event):
    """A gate that lets nobody pass before it is open, however long the disk takes to make the files behind it."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(LIMIT_S)


class Bench:
    """Pinned files, a bucket behind a proxy, and uploaders between them."""

    known: ClassVar[dict[tuple[object, ...], Store]] = {}  # clients take long to make

    def __init__(self, bucket: Bucket, faulty: FaultProxy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (bucket.through(faulty.url) if faulty else bucket.environ).items():
            monkeypatch.setenv(name, value)
        self.bucket, self.faulty, self.folder = bucket, faulty, folder
        self.gate = threading.Event()
        self.uploads: dict[str, str] = {}  # key: what the ledger would say
        self.pools: list[Uploaders] = []

    def pool(self, threads: int = 1) -> Uploaders:
        """Start uploaders, as a process does when it begins."""
        what = (self.faulty and self.faulty.url, self.bucket.target)
        if what not in self.known:
            self.known[what] = open_store(self.bucket.target, Access())
        store = Retrying(self.known[what], lambda seconds: False, 20.0, Budget(0))
        pool = Uploaders(store, threads, self.gate, lambda key: self.uploads.get(key, ""), self.uploads.__setitem__)
        self.pools.append(pool)
        return pool

    def pin(self, name: str, body: bytes) -> Pinned:
        path = self.folder / name
        path.write_bytes(body)
        info = path.stat()
        stamp = Stamp.of("area", info)
        return Pinned("/d", name, str(path), stamp, 0o644, info.st_uid, info.st_gid, info.st_nlink)

    def send(self, pool: Uploaders, name: str, body: bytes, urgent: bool = False, look: bool = False) -> Future[Head]:
        return pool.send(self.pin(name, body), f"node1/{name}", urgent, look)


@pytest.fixture(scope="module")
def lane(moto_server: Service) -> Iterator[tuple[Bucket, FaultProxy]]:
    bucket = moto_server.fresh()
    with FaultProxy(bucket.url) as proxy:
        yield bucket, proxy


@pytest.fixture
def bench(lane: tuple[Bucket, FaultProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bucket, faulty = lane
    bucket.empty()
    faulty.heal()
    faulty._trace.clear()
    one = Bench(bucket, faulty, tmp_path, monkeypatch)
    yield one
    one.gate.set()
    for pool in one.pools:
        pool.stop(LIMIT_S)


def order(faulty: FaultProxy) -> list[str]:
    """Return what was sent, in order: the names of small files, and name#part of large ones."""
    found: list[str] = []
    for event in faulty.trace:
        name = event.key.removeprefix("node1/")
        if event.method == "PUT" and "partNumber" in event.query:
            found.append(f"{name}#{event.query['partNumber']}")
        elif event.method == "PUT" and name not in found:  # the first put of a process is sent twice
            found.append(name)
    return found


def test_a_file_goes_up_whole_and_its_checksum_is_known(bench: Bench) -> None:
    bench.gate.set()
    head = bench.send(bench.pool(), "a", b"body").result(LIMIT_S)
    assert (head.key, head.size, head.crc32) == ("node1/a", 4, f"{zlib.crc32(b'body'):08x}")
    assert bench.bucket.objects() == {"node1/a": b"body"}


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES])
def test_files_of_any_size_go_up(bench: Bench, size: int) -> None:
    bench.gate.set()
    body = noise(size)
    assert bench.send(bench.pool(2), "a", body).result(LIMIT_S).crc32 == f"{zlib.crc32(body):08x}"
    assert bench.bucket.objects() == {"node1/a": body}
    parts = len([name for name in order(bench.faulty) if "#" in name])
    assert parts == (-(-size // PART_BYTES) if size > PART_BYTES else 0)


def test_every_store_takes_large_and_small_files_at_once(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where parts must keep their order as well."""
    bench = Bench(bucket, None, tmp_path / "pins", monkeypatch)  # type: ignore[arg-type]
    (tmp_path / "pins").mkdir()
    bench.gate.set()
    bodies = {f"small{n}": noise(1000 + n, n) for n in range(6)} | {"large": noise(2 * PART_BYTES + 5)}
    pool = bench.pool(4)
    heads = [bench.send(pool, name, body) for name, body in bodies.items()]
    assert [head.result(LIMIT_S).size for head in heads] == [len(body) for body in bodies.values()]
    assert bucket.objects() == {f"node1/{name}": body for name, body in bodies.items()}
    assert pool.sent["files"] == 7
    pool.stop(LIMIT_S)


def test_what_is_urgent_overtakes_what_is_calm(bench: Bench) -> None:
    bench.gate = Patient()
    pool = bench.pool()
    futures = [bench.send(pool, "first", b"1")]  # the thread has it, and waits at the gate
    futures += [bench.send(pool, f"calm{n}", b"c") for n in range(3)]
    futures += [bench.send(pool, f"urgent{n}", b"u", urgent=True) for n in range(3)]
    bench.gate.set()
    for future in futures:
        future.result(LIMIT_S)
    sent = order(bench.faulty)
    rest = sent[1:] if sent[0] == "first" else sent
    assert [name[:-1] for name in rest if name != "first"] == ["urgent"] * 3 + ["calm"] * 3


def test_an_urgent_file_waits_for_a_part_and_not_for_the_large_file(bench: Bench) -> None:
    pool = bench.pool()
    bench.gate.set()
    futures: list[Future[Head]] = []
    begun = bench.faulty.on(
        "PUT", "partNumber=1", Call(lambda: futures.append(bench.send(pool, "urgent", b"u", urgent=True)), "before")
    )
    bench.send(pool, "large", noise(2 * PART_BYTES + 1)).result(LIMIT_S)
    assert begun.hits == 1
    futures[0].result(LIMIT_S)
    assert order(bench.faulty) == ["large#1", "urgent", "large#2", "large#3"]


def test_a_large_file_and_small_ones_take_turns(bench: Bench) -> None:
    bench.gate = Patient()
    pool = bench.pool()
    futures = [bench.send(pool, "first", b"1"), bench.send(pool, "large", noise(3 * PART_BYTES + 1))]
    futures += [bench.send(pool, f"small{n}", b"s") for n in range(6)]
    bench.gate.set()
    for future in futures:
        future.result(LIMIT_S)
    kinds = "".join("L" if "#" in name else "s" for name in order(bench.faulty) if name != "first")
    assert kinds.count("L") == 4
    assert "ss" in kinds or kinds.count("s") == 6
    assert "LL" not in kinds.rstrip("L")
    assert "sss" not in kinds.rstrip("s")


def test_parts_of_one_file_go_up_side_by_side(bench: Bench) -> None:
    bench.gate.set()
    both = threading.Barrier(2)
    bench.faulty.on("PUT", "partNumber=1&", Call(lambda: both.wait(LIMIT_S), "before"))
    bench.faulty.on("PUT", "partNumber=2&", Call(lambda: both.wait(LIMIT_S), "before"))
    bench.send(bench.pool(2), "large", noise(2 * PART_BYTES)).result(LIMIT_S)
    assert not both.broken


def test_uploads_pause_while_files_are_pinned_but_never_for_long(bench: Bench) -> None:
    """The gate is closed all the time here: each piece of work waits its two seconds, no more."""
    assert bench.send(bench.pool(), "a", b"x").result(20).size == 1


def test_a_file_that_changed_since_it_was_pinned_is_refused(bench: Bench) -> None:
    """P1 Listed means restorable: what is listed as one stamp are not another's bytes."""
    bench.gate.set()
    pool = bench.pool()
    for change in (b"other bytes", b"longer" * 100, b""):
        pinned = bench.pin("a", b"first bytes")
        Path(pinned.path).write_bytes(change)
        os.utime(pinned.path, ns=(0, 0))  # the clock of files may tick every 10 ms only
        with pytest.raises(Corrupt, match="changed while it was read"):
            pool.send(pinned, "node1/a", False, False).result(LIMIT_S)
    assert bench.bucket.objects() == {}


def test_a_large_file_that_changes_between_its_parts_is_refused(bench: Bench) -> None:
    """P1 Listed means restorable: never the beginning of one version and the end of another."""
    bench.gate.set()
    pinned = bench.pin("a", noise(2 * PART_BYTES + 1))

    def change() -> None:
        with open(pinned.path, "r+b") as file:
            file.write(b"other")

    bench.faulty.on("PUT", "partNumber=1", Call(change, "before"))
    with pytest.raises(Corrupt, match="changed while it was read"):
        bench.pool().send(pinned, "node1/a", False, False).result(LIMIT_S)
    assert bench.bucket.objects() == {}


def test_a_file_that_is_gone_is_an_error_of_that_file_alone(bench: Bench) -> None:
    bench.gate.set()
    pool, pinned = bench.pool(), bench.pin("a", b"x")
    os.unlink(pinned.path)
    with pytest.raises(FileNotFoundError):
        pool.send(pinned, "node1/a", False, False).result(LIMIT_S)
    assert bench.send(pool, "b", b"x").result(LIMIT_S).size == 1


# ------------------------------------------------------------------------------------------------------------
# Again


def parts_sent(faulty: FaultProxy, since: int) -> list[str]:
    return [event.query["partNumber"] for event in faulty.trace[since:] if "partNumber" in event.query]


def test_the_parts_that_are_there_are_not_sent_again(bench: Bench) -> None:
    bench.gate.set()
    body = noise(2 * PART_BYTES + 1)
    bench.faulty.on("PUT", "partNumber=3", s3_error(403, "AccessDenied"))
    with pytest.raises(Denied):
        bench.send(bench.pool(), "large", body).result(LIMIT_S)
    seen = len(bench.faulty.trace)
    assert bench.send(bench.pool(), "large", body).result(LIMIT_S).size == len(body)
    assert parts_sent(bench.faulty, seen) == ["3"]
    assert count(bench.faulty.trace, "POST", r"\?uploads") == 1
    assert bench.bucket.objects() == {"node1/large": body}


def test_nor_are_they_when_only_the_end_failed(bench: Bench) -> None:
    bench.gate.set()
    body = noise(PART_BYTES + 1)
    bench.faulty.on("POST", "uploadId=", s3_error(403, "AccessDenied"))
    with pytest.raises(Denied):
        bench.send(bench.pool(), "large", body).result(LIMIT_S)
    seen = len(bench.faulty.trace)
    bench.send(bench.pool(), "large", body).result(LIMIT_S)
    assert parts_sent(bench.faulty, seen) == []


def test_an_upload_that_is_gone_is_begun_anew(bench: Bench) -> None:
    bench.gate.set()
    body = noise(PART_BYTES + 1)
    bench.uploads["node1/large"] = "no-such-upload"
    assert bench.send(bench.pool(), "large", body).result(LIMIT_S).size == len(body)
    assert bench.bucket.objects() == {"node1/large": body}


def test_only_uploads_are_ended_that_nobody_is_at_nor_will_go_on_with(bench: Bench) -> None:
    """Whatever the ledger says: it may have forgotten what is on its way. node10 is another node."""
    bench.gate.set()
    body, pool = noise(2 * PART_BYTES + 1), bench.pool()
    store = bench.known[bench.faulty.url, bench.bucket.target]
    ids = {key: store.begin(key, SIZE) for key in ("node1/forgotten", "node1/known", "node1/other", "node10/x")}
    bench.uploads |= {"node1/known": ids["node1/known"], "node1/other": "another"}

    def forget() -> None:
        bench.uploads.pop("node1/large")
        pool.end_forgotten("node1/", store.now() + 60)

    pool.end_forgotten("node1/", 0.0)
    assert {key for key, *_ in store.unfinished("")} >= ids.keys(), "too young"
    bench.faulty.on("PUT", "partNumber=2", Call(forget, at="before"))
    assert bench.send(pool, "large", body).result(LIMIT_S).size == len(body)
    assert {key for key, *_ in store.unfinished("")} == {"node1/known", "node10/x"}
    assert count(bench.faulty.trace, "POST", r"large\?uploads") == 1


def test_parts_of_another_content_are_sent_again(bench: Bench) -> None:
    """P3 and P1: an unfinished upload of the file's earlier content does not mix with the new one."""
    bench.gate.set()
    body = noise(2 * PART_BYTES)
    bench.faulty.on("PUT", "partNumber=2", s3_error(403, "AccessDenied"))
    with pytest.raises(Denied):
        bench.send(bench.pool(), "large", body).result(LIMIT_S)
    body = noise(2 * PART_BYTES, 2)
    assert bench.send(bench.pool(), "large", body).result(LIMIT_S).crc32 == f"{zlib.crc32(body):08x}"
    assert bench.bucket.objects() == {"node1/large": body}


@pytest.mark.parametrize("size", [1000, PART_BYTES + 1], ids=["small", "large"])
def test_p3_other_content_at_the_same_path_gets_a_key_of_its_own(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """P3 Written once: on every store, also those that would overwrite."""
    (tmp_path / "pins").mkdir()
    bench = Bench(bucket, None, tmp_path / "pins", monkeypatch)  # type: ignore[arg-type]
    bench.gate.set()
    bodies = [noise(size, seed) for seed in range(2)]
    keys = []
    for body in [*bodies, bodies[0], bodies[1]]:
        pool = bench.pool()  # after a restart each time
        keys.append(bench.send(pool, "a", body).result(LIMIT_S).key)
        pool.stop(LIMIT_S)
    other = f"node1/a@{zlib.crc32(bodies[1]):08x}"
    assert bucket.objects() == {"node1/a": bodies[0], other: bodies[1]}
    assert keys == ["node1/a", other, "node1/a", other]


def test_what_is_looked_for_and_there_is_not_sent(bench: Bench) -> None:
    bench.gate.set()
    for body in (noise(1000), noise(PART_BYTES + 1)):
        bench.bucket.empty()
        bench.send(bench.pool(), "a", body).result(LIMIT_S)
        seen = len(bench.faulty.trace)
        assert bench.send(bench.pool(), "a", body, look=True).result(LIMIT_S).size == len(body)
        assert [event.method for event in bench.faulty.trace[seen:] if event.carries_content] == []
    assert_written_once(write for write in bench.faulty.trace if write.size == 1000)
    assert len(list(writes(bench.faulty.trace))) >= 2


def test_whoever_stops_gets_no_more_work(bench: Bench) -> None:
    stopped, pool = threading.Event(), bench.pool()
    bench.gate.set()
    bench.faulty.on("PUT", "f0", Call(lambda: stopped.wait(LIMIT_S), "before"))  # the one thread is at it so long
    futures = [bench.send(pool, f"f{n}", b"x") for n in range(5)]
    pool.stop(0.0)
    stopped.set()
    pool.stop(LIMIT_S)
    assert bench.send(pool, "late", b"x").cancelled()
    assert sum(future.cancelled() for future in futures) >= 4
