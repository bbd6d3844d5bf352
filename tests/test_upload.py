"""Uploading: reading without a trace in the page cache, and sending without ever changing a key's bytes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import random
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cassbackup import (
    Body,
    Changed,
    Conflict,
    Denied,
    FileStore,
    Fingerprint,
    ObjectInfo,
    Pinned,
    PinnedSource,
    Stored,
    StoreOptions,
    check_digest,
    crc32_of,
    hex32,
    open_store,
    pieces,
    read_object,
    read_quietly,
    send,
    send_one,
)

LIMIT_S = 100.0  # for what hangs
PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE
MOMENT = "20261121T202438.123456Z"


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def crc32(body: bytes) -> str:
    return hex32(zlib.crc32(body))


# ------------------------------------------------------------------------------------------------------------
# Reading


def cached(path: Path) -> int:
    """Return how many pages of a file are in the page cache."""
    done = subprocess.run(["fincore", "-bnro", "RES", str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout) // PAGE


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
    if cached(path) != len(warm):
        pytest.skip("this file system keeps everything in memory")
    return body


def quietly(path: Path, start: int = 0, end: int = SIZE) -> bytes:
    with path.open("rb") as file:
        return bytes(read_quietly(file.fileno(), start, end))


PREADV2 = {"x86_64": 327, "aarch64": 286}
FCNTL = {"x86_64": 72, "aarch64": 25}
DONTCACHE = 0x80


def refuse(calls: Sequence[tuple[int, int, int, int]]) -> None:
    """Make the kernel refuse some calls to this thread for good: (number, of which argument, which bits, errno).

    As an older kernel refuses preadv2(RWF_DONTCACHE), and some file systems O_DIRECT: seccomp(2).
    """
    load, equal, has, give = 0x20, 0x15, 0x45, 0x06
    program = []
    for number, argument, bits, code in calls:
        program += [
            (load, 0, 0, 0),  # the number of the call
            (equal, 0, 3, number),
            (load, 0, 0, 16 + 8 * argument),
            (has, 0, 1, bits),
            (give, 0, 0, 0x00050000 | code),  # SECCOMP_RET_ERRNO
        ]
    program.append((give, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    code_of = ctypes.create_string_buffer(packed, len(packed))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(packed) // 8, ctypes.addressof(code_of)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    arguments = [ctypes.c_ulong(number) for number in (1, 0, 0, 0)]
    if prctl(38, *arguments) or prctl(22, ctypes.c_ulong(2), head, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), "no seccomp here")


def in_a_thread(call: Callable[[], Any], *refused: tuple[int, int, int, int]) -> Any:
    """Call in a thread of its own, to which the kernel refuses something."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            refuse(refused)
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


def on_an_old_kernel(call: Callable[[], Any], code: int = errno.EOPNOTSUPP) -> Any:
    if platform.machine() not in PREADV2:
        pytest.skip("the number of preadv2 is not known here")
    return in_a_thread(call, (PREADV2[platform.machine()], 5, DONTCACHE, code))


def on_a_disk_without_direct_reads(call: Callable[[], Any]) -> Any:
    if platform.machine() not in PREADV2:
        pytest.skip("the number of preadv2 is not known here")
    machine = platform.machine()
    dontcache = (PREADV2[machine], 5, DONTCACHE, errno.EOPNOTSUPP)
    return in_a_thread(call, dontcache, (FCNTL[machine], 2, os.O_DIRECT, errno.EINVAL))


def directly(call: Callable[[], Any]) -> Any:
    return call()


KERNELS = pytest.mark.parametrize("kernel", [directly, on_an_old_kernel], ids=["this-kernel", "old-kernel"])
ANYWHERE = pytest.mark.parametrize(
    "kernel", [directly, on_an_old_kernel, on_a_disk_without_direct_reads], ids=["this-kernel", "old-kernel", "plain"]
)


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
def test_p5_the_page_cache_is_left_as_it_was_found(tmp_path: Path, kernel: Callable[..., Any], warm: range) -> None:
    """What Cassandra has there stays, what it has not does not come: on a cold, a half cached and a warm file."""
    body = make(tmp_path / "f", warm=warm)
    assert kernel(lambda: quietly(tmp_path / "f")) == body
    assert cached(tmp_path / "f") == len(warm)


@KERNELS
@pytest.mark.parametrize("span", [(8 * PAGE, 16 * PAGE), (60 * PAGE, 64 * PAGE)], ids=str)
def test_p5_a_part_is_read_and_leaves_no_trace(
    tmp_path: Path, kernel: Callable[..., Any], span: tuple[int, int]
) -> None:
    """Nor does reading ahead bring what was not asked for."""
    body = make(tmp_path / "f", warm=range(30, 32))
    assert kernel(lambda: quietly(tmp_path / "f", *span)) == body[slice(*span)]
    assert cached(tmp_path / "f") == 2


@KERNELS
def test_p5_a_file_read_part_by_part_leaves_no_trace(tmp_path: Path, kernel: Callable[..., Any]) -> None:
    body, part = make(tmp_path / "f", (4 << 20) + 100), 1 << 20
    for start in range(0, len(body), part):
        end = min(start + part, len(body))
        assert kernel(lambda span=(start, end): quietly(tmp_path / "f", *span)) == body[start:end]
    assert cached(tmp_path / "f") == 0


@ANYWHERE
def test_an_empty_file_is_read(tmp_path: Path, kernel: Callable[..., Any]) -> None:
    (tmp_path / "f").write_bytes(b"")
    assert kernel(lambda: quietly(tmp_path / "f", 0, 0)) == b""


@ANYWHERE
@pytest.mark.parametrize("left", [0, 100, PAGE, SIZE - 1])
def test_a_file_that_became_shorter_has_changed(tmp_path: Path, kernel: Callable[..., Any], left: int) -> None:
    make(tmp_path / "f")
    os.truncate(tmp_path / "f", left)
    for start in (0, SIZE - PAGE, SIZE - 10):
        if left < SIZE - 1 or start == 0:
            with pytest.raises(Changed):
                kernel(lambda start=start: quietly(tmp_path / "f", start))


@ANYWHERE
@pytest.mark.parametrize("span", [(0, SIZE), (100, 200), (SIZE - 10, SIZE)], ids=str)
def test_bytes_are_the_right_ones_wherever_they_are(
    tmp_path: Path, kernel: Callable[..., Any], span: tuple[int, int]
) -> None:
    """On a disk, and on tmpfs, which has none below its cache."""
    places = [tmp_path / "f"]
    if os.access("/dev/shm", os.W_OK):
        places.append(Path("/dev/shm") / f"cassbackup-test-{os.getpid()}")
    for path in places:
        path.write_bytes(noise(SIZE))
        try:
            assert kernel(lambda path=path: quietly(path, *span)) == noise(SIZE)[slice(*span)]
        finally:
            path.unlink()


@ANYWHERE
def test_p5_memory_goes_back_as_soon_as_nobody_looks_at_it(tmp_path: Path, kernel: Callable[..., Any]) -> None:
    """P5 Do no harm: malloc would keep some megabytes for every thread that has ever read a part."""
    part = 8 << 20
    (tmp_path / "f").write_bytes(bytes(part))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    def read_all() -> list[int]:
        grown = []
        with (tmp_path / "f").open("rb") as file:
            for _ in range(4):
                before = resident()
                body = read_quietly(file.fileno(), 1, part)
                grown.append(resident() - before)
                assert len(body) == part - 1
                del body
                grown.append(resident() - before)
        return grown

    grown = kernel(read_all)
    for held, dropped in zip(grown[::2], grown[1::2], strict=True):
        assert held < part + (2 << 20)  # there is one copy of it
        assert dropped < 2 << 20


@pytest.mark.parametrize("code", [errno.EIO, errno.EPERM])
def test_other_refusals_are_errors(tmp_path: Path, code: int) -> None:
    make(tmp_path / "f")
    with pytest.raises(OSError, match=os.strerror(code)):
        on_an_old_kernel(lambda: quietly(tmp_path / "f"), code)


# ------------------------------------------------------------------------------------------------------------
# A pinned file


class Bench:
    """A file:// store, and a directory with files as if they were pins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pins"
        self.folder.mkdir()
        store = open_store(f"file://{folder}/bucket", StoreOptions())
        assert isinstance(store, FileStore)
        self.store: Any = store

    def pin(self, name: str, body: bytes) -> Pinned:
        path = self.folder / f"{name}~"
        path.write_bytes(body)
        info = path.stat()
        return Pinned("/d", name, Fingerprint.of(info), 0o640, info.st_uid, 12345, info.st_nlink, str(path), "disk1")

    def objects(self) -> dict[str, bytes]:
        return {info.key: read_object(self.store, info.key) for info in self.store.list("")}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def grown(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"SAI+aa+GroupMeta.db\n")


def shrunk(path: str) -> None:
    os.truncate(path, 3)


def rewritten(path: str) -> None:
    """As long as before, within one tick of the kernel's clock perhaps; it is its mtime that tells."""
    with open(path, "r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(1, 1))


def replaced(path: str) -> None:
    os.rename(path, path + ".old")
    with open(path, "wb") as file:
        file.write(b"bytes")


CHANGES = pytest.mark.parametrize("change", [grown, shrunk, rewritten, replaced], ids=lambda change: change.__name__)


@CHANGES
def test_a_file_that_changed_since_it_was_pinned_is_not_stored(bench: Bench, change: Callable[[str], None]) -> None:
    changed, good = bench.pin("nb-1-big-TOC.txt", b"bytes"), bench.pin("nb-1-big-Data.db", b"good")
    change(changed.pin)
    with pytest.raises(Changed):
        PinnedSource(changed).read(0, 5)
    results = send(bench.store, [(changed, "n/toc"), (good, "n/data")], MOMENT)
    assert isinstance(results[0], Changed)
    assert isinstance(results[1], Stored)
    assert bench.objects() == {"n/data": b"good"}


def test_reading_a_pin_leaves_no_descriptor_open_p5(bench: Bench) -> None:
    good, changed = bench.pin("nb-1-big-Data.db", b"good"), bench.pin("nb-1-big-TOC.txt", b"bytes")
    grown(changed.pin)
    before = os.listdir("/proc/self/fd")
    PinnedSource(good).read(0, 4)
    with pytest.raises(Changed):
        PinnedSource(changed).read(0, 5)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_grows_while_it_is_read_has_changed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = bench.pin("nb-1-big-TOC.txt", b"bytes")

    def read(fd: int, start: int, end: int) -> memoryview:
        body = read_quietly(fd, start, end)
        grown(pin.pin)
        return body

    monkeypatch.setattr("cassbackup.read_quietly", read)
    with pytest.raises(Changed):
        PinnedSource(pin).read(0, 5)


def test_a_pin_is_read_in_any_parts(bench: Bench) -> None:
    body = noise((17 << 20) + 5)
    source = PinnedSource(bench.pin("f", body))
    assert source.size == len(body)
    assert source.read(7, 70_000) == body[7:70_000]
    assert crc32_of(pieces(source)) == crc32(body)


# ------------------------------------------------------------------------------------------------------------
# Sending


def test_what_was_stored_is_told_with_all_that_a_restore_needs(bench: Bench) -> None:
    pin = bench.pin("nb-1-big-Data.db", b"bytes")
    [stored] = send(bench.store, [(pin, "n/key")], MOMENT)
    assert isinstance(stored, Stored)
    assert (stored.path, stored.fingerprint, stored.mode) == (("/d", "nb-1-big-Data.db"), pin.fingerprint, 0o640)
    assert (stored.key, stored.crc32, stored.etag) == ("n/key", crc32(b"bytes"), bench.store.head("n/key").etag)
    assert (stored.user, stored.group) == ("root" if os.geteuid() == 0 else stored.user, "12345")


@pytest.mark.parametrize("size", [0, 1, (8 << 20) + 1])
def test_files_of_any_size_are_stored(bench: Bench, size: int) -> None:
    body = noise(size)
    assert send_one(bench.store, bench.pin("f", body), "n/f", MOMENT).crc32 == crc32(body)
    assert bench.objects() == {"n/f": body}


def test_p3_other_content_at_the_key_stays_and_ours_gets_a_key_of_its_own(bench: Bench) -> None:
    """Written once: a generation that came again, or a file of another node by that name."""
    bench.store.put("n/f", Body(b"older"))
    bench.store.put(f"n/g@{crc32(b'newer')}", Body(b"a collision"))
    bench.store.put("n/g", Body(b"newes"))
    keys = [send_one(bench.store, bench.pin("f", b"newer"), key, MOMENT).key for key in ("n/f", "n/g")]
    assert keys == [f"n/f@{crc32(b'newer')}", f"n/g@{crc32(b'newer')}.{MOMENT}"]
    objects = bench.objects()
    assert [objects.pop(key) for key in keys] == [b"newer", b"newer"]
    assert sorted(objects.values()) == [b"a collision", b"newes", b"older"]


def test_the_same_content_at_the_key_is_recognized_and_not_stored_twice(bench: Bench) -> None:
    """A reply was lost, or the ledger."""
    pin = bench.pin("f", b"bytes")
    first = send_one(bench.store, pin, "n/f", MOMENT)
    assert send_one(bench.store, pin, "n/f", MOMENT) == first
    bench.store.put("n/g", Body(b"other"))
    second = send_one(bench.store, pin, "n/g", MOMENT)
    assert send_one(bench.store, pin, "n/g", MOMENT) == second
    assert sorted(bench.objects()) == ["n/f", "n/g", f"n/g@{crc32(b'bytes')}"]


@pytest.mark.parametrize("there", [b"bytes", b"other"])
def test_where_the_store_knows_no_checksum_the_bytes_decide(bench: Bench, there: bytes) -> None:
    """As older servers, and directories."""
    head = bench.store.head

    def forgetful(key: str) -> ObjectInfo | None:
        info = head(key)
        return info and ObjectInfo(info.key, info.size, info.etag, info.modified)

    bench.store.head = forgetful
    bench.store.put("n/f", Body(there))
    stored = send_one(bench.store, bench.pin("f", b"bytes"), "n/f", MOMENT)
    assert stored.key == ("n/f" if there == b"bytes" else f"n/f@{crc32(b'bytes')}")
    assert stored.crc32 == crc32(b"bytes")


def test_a_refused_file_costs_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = [bench.pin(f"f{number}", noise(10, number)) for number in range(6)]
    bench.store.put("n/f1", Body(b"taken"))
    bench.store.put("n/f3", Body(b"taken"))
    os.unlink(pins[2].pin)
    grown(pins[3].pin)
    put = bench.store.put

    def refuse_beside(key: str, source: Any) -> ObjectInfo:
        if "@" in key:
            raise Denied("no")
        info: ObjectInfo = put(key, source)
        return info

    monkeypatch.setattr(bench.store, "put", refuse_beside)
    results = send(bench.store, [(pin, f"n/{pin.name}") for pin in pins], MOMENT)
    kinds = [type(result) for result in results]
    assert kinds == [Stored, Denied, FileNotFoundError, Changed, Stored, Stored]


def test_somebody_who_takes_every_key_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = bench.pin("f", b"bytes")
    for key in ("n/f", f"n/f@{crc32(b'bytes')}", f"n/f@{crc32(b'bytes')}.{MOMENT}"):
        bench.store.put(key, Body(b"other"))
    with pytest.raises(Conflict, match="nobody but cassbackup"):
        send_one(bench.store, pin, "n/f", MOMENT)


# ------------------------------------------------------------------------------------------------------------
# Cassandra's own checksum


def held_against(bench: Bench, digest: bytes, told: bytes = b"bytes") -> tuple[Stored | None, Stored]:
    data = bench.pin("nb-1-big-Data.db", b"bytes")
    stored = send_one(bench.store, bench.pin("as-it-was-read", told), "n/data", MOMENT)
    return check_digest(bench.store, data, bench.pin("nb-1-big-Digest.crc32", digest), stored, MOMENT), stored


@pytest.mark.parametrize("digest", [b"%d", b" %d\n", b"", b"adler", b"sha1  x" * 9])
def test_a_file_that_is_what_its_digest_says_stays_as_it_is_stored(bench: Bench, digest: bytes) -> None:
    """So does one whose digest says nothing: before 2.1 it was another sum."""
    if b"%" in digest:
        digest %= zlib.crc32(b"bytes")
    found, stored = held_against(bench, digest)
    assert found == stored
    assert len(bench.objects()) == 1


def test_a_file_that_goes_on_contradicting_its_digest_is_told_to_the_caller(bench: Bench) -> None:
    found, _ = held_against(bench, b"12345")
    assert found is None
    assert bench.objects() == {"n/data": b"bytes"}


def test_a_file_that_is_read_wrongly_a_second_time_is_told_to_the_caller(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is failing gives now these bytes, now those."""
    put = bench.store.put_all

    def put_all(items: Sequence[tuple[str, Any]]) -> list[Any]:
        return [replace(found, crc32="00000000") for found in put(items)]

    data, digest = bench.pin("nb-1-big-Data.db", b"bytes"), b"%d" % zlib.crc32(b"bytes")
    stored = send_one(bench.store, bench.pin("as-it-was-read", b"bitez"), "n/data", MOMENT)
    monkeypatch.setattr(bench.store, "put_all", put_all)
    assert check_digest(bench.store, data, bench.pin("nb-1-big-Digest.crc32", digest), stored, MOMENT) is None


def test_a_file_that_was_read_wrongly_is_stored_again_under_another_key(bench: Bench) -> None:
    found, stored = held_against(bench, b"%d" % zlib.crc32(b"bytes"), told=b"bitez")
    assert found
    assert (found.key, found.crc32) == (f"{stored.key}@{MOMENT}", crc32(b"bytes"))
    assert bench.objects() == {"n/data": b"bitez", found.key: b"bytes"}
