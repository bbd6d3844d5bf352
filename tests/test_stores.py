"""One contract for every store, and what the way to it may do: through a proxy that breaks things on purpose."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import errno
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import COMMAND_TIMEOUT_S, REAL, Authority
from faultproxy import (
    LOST_ACK,
    SLOW_DOWN,
    XML,
    Action,
    BlackHole,
    Cut,
    Drop,
    Event,
    Exchange,
    FaultProxy,
    Flip,
    Respond,
    Stage,
    assert_written_once,
    count,
    s3_error,
)
from hypothesis import given
from hypothesis import strategies as some
from servers import ACCESS_KEY, SECRET_KEY, Bucket, FileBucket, S3Bucket, Service, WeedBucket

import cassbackup
from cassbackup import (
    Body,
    Changed,
    Conflict,
    Corrupt,
    Denied,
    Fault,
    Missing,
    ObjectInfo,
    Patient,
    RateLimit,
    Source,
    Store,
    StoreOptions,
    Throttled,
    Unreachable,
    Usage,
    crc32_combine,
    listing_info,
    open_store,
    pauses,
    read_listing,
    read_object,
    sign,
    unanswered,
)

KEY = "node1/var/lib/cassandra/data/ks/t-1/backups/nb-1-big-Data.db"
BODY = b"what Cassandra wrote"
PART_BYTES = 5 << 20  # the smallest that S3 takes
LARGE = 2 * PART_BYTES + 12345  # three parts
Proxied = Callable[[Bucket], FaultProxy]
Secured = Callable[..., FaultProxy]


def crc(body: bytes) -> str:
    return f"{zlib.crc32(body):08x}"


@functools.cache
def noise(size: int, seed: int = 1) -> bytes:
    """Return bytes that look like nothing else."""
    return random.Random(seed).randbytes(size)


class Opener:
    """Opens a bucket as a command would, with its environment, perhaps through a proxy.

    A store that was opened before is used again, unless it must know nothing: an SDK's client takes long to make.
    """

    known: ClassVar[dict[tuple[object, ...], Store]] = {}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, bucket: Bucket, url: str = "", prefix: str = "", fresh: bool = False, **options: Any) -> Store:
        for name, value in (bucket.through(url) if url else bucket.environ).items():
            self.monkeypatch.setenv(name, value)
        target = f"{bucket.target}/{prefix}" if prefix else bucket.target
        if fresh or bucket.scheme == "file":
            return open_store(target, StoreOptions(**options))
        what = (bucket.url, url, target, *sorted(options.items()))
        if what not in self.known:
            self.known[what] = open_store(target, StoreOptions(**options))
        return self.known[what]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cassbackup, "PART_BYTES", PART_BYTES)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opener:
    return Opener(monkeypatch)


@pytest.fixture(scope="module", params=["file", "rclone", "moto", "gcs", *REAL])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """Return a bucket for all tests of this module; they run once for each kind of store."""
    if request.param == "file":
        return FileBucket(tmp_path_factory.mktemp("store") / "bucket")
    return request.getfixturevalue(f"{request.param}_server").fresh()


@pytest.fixture
def bucket(place: Bucket) -> Bucket:
    """Return the same bucket, empty."""
    place.empty()
    if isinstance(place, FileBucket):  # folders of the test before
        shutil.rmtree(place.root)
        place.root.mkdir()
    return place


@pytest.fixture
def store(bucket: Bucket, opened: Opener) -> Store:
    return opened(bucket)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return how long was slept, which takes no time here."""
    slept: list[float] = []
    monkeypatch.setattr(cassbackup, "time", SimpleNamespace(**{**vars(time), "sleep": slept.append}))
    return slept


def put(store: Store, key: str, body: bytes = BODY) -> ObjectInfo:
    return store.put(key, Body(body))


def read(store: Store, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(store.get(key, start, end))


def keys(store: Store, prefix: str = "", after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, after)]


def accepted(call: Callable[[], object]) -> bool:
    """Tell whether something came out as stored."""
    try:
        call()
    except Fault:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------
# The contract

ODD_KEYS = [
    "node1/a b/c  d",
    "node1/%2F/%25%0A/100%",
    "node1/nb-1-big-Data.db@9f3c01aa",
    "node1/a+b=c&d?e#f;g,h:i!j$k(l)m*n[o]{p}|q~r^s`t",
    "node1/'single' \"double\" \\back",
    "node1/é/e\u0301/日本語/🦊",
    "node1/.idx/-dash/~tilde",
    "node1/" + "/".join(["x" * 200] * 4),
    "node1/" + "é" * 100,
]


class TestEveryStore:
    """What the rest of the program relies on, whichever store it is."""

    def test_what_is_put_is_there(self, store: Store, bucket: Bucket) -> None:
        info = put(store, KEY)
        assert (info.key, info.size, info.crc32, info.archived) == (KEY, len(BODY), crc(BODY), "")
        found = store.head(KEY)
        assert found is not None
        assert (found.key, found.size, found.etag) == (KEY, len(BODY), info.etag)
        assert found.crc32 == ("" if bucket.scheme == "file" else info.crc32)
        assert [(one.size, one.etag, one.archived) for one in store.list("")] == [(len(BODY), info.etag, "")]
        assert read_object(store, KEY) == BODY
        assert bucket.objects() == {KEY: BODY}
        assert abs(found.modified - time.time()) < 300
        assert abs(store.now() - time.time()) < 300

    def test_an_empty_file_is_an_object_like_others(self, store: Store, bucket: Bucket) -> None:
        assert put(store, KEY, b"").crc32 == "00000000"
        assert read(store, KEY) == b""
        found = store.head(KEY)
        assert found is not None
        assert found.size == 0
        assert bucket.objects() == {KEY: b""}

    def test_every_key_that_we_make_is_taken_as_it_is(self, store: Store, bucket: Bucket) -> None:
        for key in ODD_KEYS:
            put(store, key, key.encode())
        assert sorted(bucket.keys()) == sorted(ODD_KEYS)
        assert sorted(keys(store)) == sorted(ODD_KEYS)
        for key in ODD_KEYS:
            assert keys(store, key[:-1]) == [key]
            assert keys(store, key, key[:-1]) == [key]
            assert store.head(key) is not None
            if bucket.scheme != "gs" or not {"?", "%"} & set(key):  # the emulator unquotes twice
                assert read(store, key) == key.encode()
            store.delete(key)
        assert keys(store) == []

    def test_what_is_absent_is_missing(self, store: Store) -> None:
        put(store, KEY)
        for absent in ("node1/absent", KEY + "x", KEY + "/below", KEY[:-1], "node1/var"):
            assert store.head(absent) is None
            with pytest.raises(Missing):
                read(store, absent)

    def test_a_listing_that_a_record_names_and_that_is_gone_is_missing(self, store: Store) -> None:
        key = "node1.listings/ks/users-1/backups/20261130T000000.000000Z-complete-1-1.json"
        recorded = listing_info("node1", ObjectInfo(key, 0, "", 0.0))
        assert recorded
        with pytest.raises(Missing):
            read_listing(Patient(store, 0), "node1", recorded)

    def test_a_body_is_read_from_one_place_to_another(self, store: Store) -> None:
        body, end = noise((2 << 20) + 17), (2 << 20) + 17
        put(store, KEY, body)
        put(store, "node1/empty", b"")
        for start, until in [(0, 0), (0, 1), (7, 7), (5, 1 << 20), (1 << 20, (1 << 20) + 1), (3, end), (end - 1, end)]:
            assert read(store, KEY, start, until) == body[start:until], (start, until)
        for start in (0, 1, 1 << 20, end - 1, end, end + 9):
            assert read(store, KEY, start) == body[start:], start
        assert read(store, KEY, end - 2, end + 100) == body[-2:]
        assert read(store, "node1/empty", 0) == read(store, "node1/empty", 1) == b""

    def test_prefixes_are_what_comes_next_and_has_something_below(self, store: Store) -> None:
        for key in ("n1/a/b", "n1/a/c/d", "n1.listings/k/t", "n1/file", "n10/x", "top", "n1/é %2F/x", "n1/.idx/x"):
            put(store, key)
        assert sorted(store.prefixes("")) == ["n1", "n1.listings", "n10"]
        assert sorted(store.prefixes("n1/")) == [".idx", "a", "é %2F"]
        assert list(store.prefixes("n1/a/")) == ["c"]
        assert list(store.prefixes("none/")) == list(store.prefixes("n1/a/c/")) == []

    def test_a_prefix_below_which_nothing_is_left_is_none(self, store: Store, bucket: Bucket) -> None:
        for key in ("n1/x", "n10/x", "n2/a/b"):
            put(store, key)
        for key in ("n10/x", "n2/a/b"):
            store.delete(key)
        left = {"n2", "n10"} if isinstance(bucket, WeedBucket) else set()  # for two minutes: nobody relies on it
        assert set(store.prefixes("")) - left == {"n1"}

    def test_keys_are_listed_in_their_order_from_any_key_on(self, store: Store) -> None:
        wanted = sorted(["n/a-b", "n/a/b", "n/a/c", "n/a0", "n/b/c/d", "n/c", "n.l/x", "n0/a"])
        for key in random.Random(3).sample(wanted, len(wanted)):
            put(store, key, key.encode())
        assert [(info.key, info.size) for info in store.list("")] == [(key, len(key)) for key in wanted]
        for prefix in ("n", "n/", "n/a", "n/a/", "n.", "none", "n/b/c/d", "n/b/c/de"):
            assert keys(store, prefix) == [key for key in wanted if key.startswith(prefix)], prefix
        for after in [*wanted, "n/a", "n/a/", "n/a/bb", "n/b", "n/b/", "m", "n/z"]:
            assert keys(store, "n/", after) == [key for key in wanted if key > after and key.startswith("n/")], after

    def test_what_is_deleted_is_gone_and_may_be_deleted_again(self, store: Store) -> None:
        for key in ("n/a", "n/b/c", "n/b/d"):
            put(store, key)
        for key in ("n/a", "n/b/c", "n/absent", "n/a"):
            store.delete(key)
        assert keys(store) == ["n/b/d"]

    def test_p3_a_taken_key_is_refused_and_its_bytes_stay(self, store: Store, opened: Opener, bucket: Bucket) -> None:
        """P3 Written once: also by a new process, also where the server ignores If-None-Match."""
        put(store, KEY)
        other = opened(bucket, fresh=True)
        for body in (BODY, b"other bytes", b"", noise(LARGE)):
            for one in (store, other):
                with pytest.raises(Conflict):
                    put(one, KEY, body)
        assert bucket.objects() == {KEY: BODY}

    def test_each_of_a_group_has_a_result_of_its_own(self, store: Store, bucket: Bucket) -> None:
        class Failing(Body):
            def read(self, start: int, end: int) -> bytes:
                raise self.data

        put(store, "n/taken")
        sources: dict[str, Source] = {
            "n/a": Body(b"a"),
            "n/taken": Body(b"b"),
            "n/gone": Failing(FileNotFoundError("gone")),
            "n/x/changed": Failing(Changed("it grew")),
            "n/x/c": Body(b""),
        }
        Failing.size = 5
        results = store.put_all([*sources.items()])
        assert [type(one) for one in results] == [ObjectInfo, Conflict, FileNotFoundError, Changed, ObjectInfo]
        assert bucket.objects() == {"n/a": b"a", "n/taken": BODY, "n/x/c": b""}

    def test_a_large_file_becomes_one_object(self, store: Store, bucket: Bucket) -> None:
        body = noise(LARGE)
        info = put(store, KEY, body)
        assert (info.size, info.crc32) == (len(body), crc(body))
        found = store.head(KEY)
        assert found is not None
        assert (found.size, found.etag) == (info.size, info.etag)
        assert found.crc32 in ("", info.crc32)
        assert bucket.objects() == {KEY: body}
        assert read(store, KEY) == body
        assert store.abandon_uploads(time.time() + 999) == 0

    def test_a_large_file_that_changes_leaves_nothing(self, store: Store, bucket: Bucket) -> None:
        class Changing(Body):
            def read(self, start: int, end: int) -> bytes:
                if start >= PART_BYTES:
                    raise Changed("it grew")
                return self.data[start:end]

        with pytest.raises(Changed):
            store.put(KEY, Changing(noise(LARGE)))
        assert store.head(KEY) is None
        assert bucket.objects() == {}
        assert store.abandon_uploads(time.time() + 999) == 0

    def test_prefixes_of_one_bucket_know_nothing_of_each_other(self, opened: Opener, bucket: Bucket) -> None:
        one, other = opened(bucket, prefix="back ups/a"), opened(bucket, prefix="back ups/ab")
        put(one, "k", b"1")
        put(other, "k", b"2")
        assert (keys(one), keys(other)) == (["k"], ["k"])
        assert (read(one, "k"), read(other, "k")) == (b"1", b"2")
        assert bucket.keys() == ["back ups/a/k", "back ups/ab/k"]


@pytest.mark.slow
def test_a_list_has_as_many_pages_as_it_takes(store: Store, bucket: Bucket) -> None:
    many = [f"n/{number:05d}" for number in range(50 if bucket.scheme == "gs" else 1003)]  # the emulator has one page
    store._refuses = True  # type: ignore[attr-defined]  # it need not look first
    store.put_all([(key, Body(b"x")) for key in many])
    assert keys(store, "n/") == many
    assert keys(store, "n/", many[-4]) == many[-3:]
    assert list(itertools.islice(store.list("n/", many[0]), 0, 2))[1].key == many[2]
    assert "n" in store.prefixes("")  # rclone keeps folders of which nothing is left
    for key in many:
        store.delete(key)
    assert keys(store) == []


# ------------------------------------------------------------------------------------------------------------
# file://


@pytest.fixture
def local(tmp_bucket: FileBucket) -> Store:
    return open_store(tmp_bucket.target, StoreOptions())


def test_a_directory_holds_nothing_but_objects_when_all_is_done(tmp_bucket: FileBucket, local: Store) -> None:
    put(local, KEY)
    local.put_all([(KEY, Body(b"taken")), (KEY + "2", Body(noise(LARGE)))])
    files = [path for path in tmp_bucket.root.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_bucket.root)) for path in files) == [KEY, KEY + "2"]


@pytest.mark.parametrize("key", ["../x", "n/../../x", "/etc/x", "n//x", "n/./x", "", ".unfinished/x"])
def test_no_key_leads_out_of_the_directory(tmp_bucket: FileBucket, local: Store, key: str) -> None:
    outside = tmp_bucket.root.parent / "x"
    outside.write_bytes(b"not yours")
    with pytest.raises(Fault):
        put(local, key)
    with pytest.raises(Missing):
        read(local, key)
    assert local.head(key) is None
    local.delete(key)
    assert outside.read_bytes() == b"not yours"


def test_a_group_is_durable_together(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes first, then all names, then each directory once: a journal commits many files in one go."""
    done: list[str] = []

    def note(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *args: Any) -> Any:
            is_folder = what == "fsync" and os.path.isdir(f"/proc/self/fd/{path}")
            done.append("folder" if is_folder else what)
            return call(path, *args)

        return noted

    monkeypatch.setattr(os, "fsync", note("fsync", os.fsync))
    monkeypatch.setattr(os, "link", note("link", os.link))
    put(local, "n/first")
    done.clear()
    local.put_all([(f"n/{number}", Body(b"x")) for number in range(5)])
    assert [(what, len([*some])) for what, some in itertools.groupby(done)] == [
        ("fsync", 5),
        ("link", 5),
        ("folder", 1),
    ]


def test_p1_a_file_store_does_not_vouch_for_what_was_written_to_since(tmp_bucket: FileBucket, local: Store) -> None:
    """P1 Listed means restorable: what was known of a file says nothing of bytes that came later."""
    path = tmp_bucket.root / KEY
    stored = put(local, KEY)
    while path.stat().st_mtime_ns == int(stored.etag, 16):  # the clock of files may tick every 10 ms only
        path.write_bytes(BODY[::-1])
    found = local.head(KEY)
    assert found is not None
    assert found.etag != stored.etag
    assert not local.holds(found, Body(BODY), crc(BODY))
    assert local.holds(found, Body(BODY[::-1]), crc(BODY[::-1]))


def test_what_is_swept_away_while_it_is_written_does_not_come_again(tmp_bucket: FileBucket, local: Store) -> None:
    class Swept(Body):
        def read(self, start: int, end: int) -> bytes:
            if start:
                local.abandon_uploads(time.time() + 9)
            return self.data[start:end]

    with pytest.raises(Fault):
        local.put(KEY, Swept(noise(3 << 20)))
    assert tmp_bucket.objects() == {}
    assert local.abandon_uploads(time.time() + 9) == 0


def test_uploads_that_somebody_writes_to_are_not_abandoned(tmp_bucket: FileBucket, local: Store) -> None:
    put(local, KEY)
    for name, age in (("old", 9), ("new", 0)):
        file = tmp_bucket.root / ".unfinished" / name
        file.write_bytes(b"x")
        os.utime(file, (time.time() - age, time.time() - age))
    assert local.abandon_uploads(time.time() - 5) == 1
    assert os.listdir(tmp_bucket.root / ".unfinished") == ["new"]


def test_p1_an_absent_disk_is_no_empty_store(tmp_bucket: FileBucket, local: Store) -> None:
    """P1 Listed means restorable: below an empty mount point nothing is stored, and nothing is said to be absent."""
    put(local, KEY)
    again = open_store(tmp_bucket.target, StoreOptions(), new=False)
    shutil.rmtree(tmp_bucket.root)

    def ask(store: Store) -> None:
        calls = (lambda: put(store, KEY), lambda: store.head(KEY), lambda: keys(store), lambda: keys(store, "n/"))
        for call in calls:
            with pytest.raises(Unreachable, match="mount"):
                call()

    for store in (local, again):
        ask(store)
    tmp_bucket.root.mkdir()
    for store in (local, again):
        ask(store)
    assert list(tmp_bucket.root.iterdir()) == []


def test_a_directory_that_does_not_exist_is_named_with_both_reasons(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/nowhere", StoreOptions(), new=False)
    for ask in (lambda: keys(store), lambda: store.prefixes(""), lambda: store.head(KEY)):
        with pytest.raises(Unreachable, match=r"nowhere does not exist: .*not mounted.*no node has stored"):
            ask()


def run_with_patience(patience_s: float, attempt: Callable[[], Any], note: Callable[[Any], None]) -> Any:
    """Let a daemon's workers, or with some patience those of --once, try something until the store answers."""
    workers = cassbackup.Workers(threading.Event(), 1, patience_s)
    workers.note = lambda _, fault: note(fault)  # type: ignore[method-assign]
    return asyncio.run(workers.retry("attempt", attempt))


def test_a_command_does_not_wait_for_a_disk_and_a_daemon_does(tmp_path: Path, naps: list[float]) -> None:
    store = open_store(f"file://{tmp_path}/nowhere", StoreOptions(), new=False)
    for ask in (lambda: [*Patient(store, 60.0).list("")], lambda: Patient(store, 60.0).prefixes("")):
        with pytest.raises(Unreachable, match="does not exist"):
            ask()
    assert naps == []
    tries: list[Fault | None] = []

    async def attempt() -> list[str]:
        if len(tries) == 1:
            Path(tmp_path / "nowhere").mkdir()
            Path(tmp_path / "nowhere" / "x").write_bytes(b"")
        return keys(store)

    assert run_with_patience(math.inf, attempt, tries.append) == ["x"]
    shutil.rmtree(tmp_path / "nowhere")
    with pytest.raises(Unreachable, match="does not exist"):
        run_with_patience(60.0, attempt, tries.append)  # of --once


def test_a_file_system_without_hard_links_is_named(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
        monkeypatch.setattr(os, "link", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, "no")))
        with pytest.raises(Denied, match="no hard links"):
            put(local, KEY)


def test_a_file_system_that_cannot_sync_directories_is_used_and_said_once(
    local: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    for key in ("n/a", "n/b", "m/c"):
        put(local, key)
    assert caplog.text.count("directories cannot be synced") == 1
    assert keys(local) == ["m/c", "n/a", "n/b"]


def test_what_nfs_makes_of_deleted_files_is_passed_over(tmp_bucket: FileBucket, local: Store) -> None:
    put(local, "n/a")
    (tmp_bucket.root / "n" / ".nfs000000000a0b0c0d00000001").write_bytes(b"x")
    assert keys(local) == ["n/a"]


# ------------------------------------------------------------------------------------------------------------
# Opening


@pytest.mark.parametrize(
    "url", ["file://relative", "ftp://x", "s3://", "bucket", "", "gs:///x", "s3://a b", "gs://a b", "s3://b?region=x"]
)
def test_a_url_of_no_known_kind_is_wrong_usage(url: str) -> None:
    with pytest.raises(Usage) as refused:
        open_store(url, StoreOptions(region="us-east-1"))
    assert refused.value.code == 2
    assert refused.value.hint


def test_an_access_point_is_named_by_its_alias() -> None:
    with pytest.raises(Usage, match=r"no bucket's name: .*alias, not its ARN"):
        open_store("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/ap1", StoreOptions(region="eu-west-1"))


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket"])
def test_an_endpoint_without_a_scheme_is_wrong_usage(url: str) -> None:
    with pytest.raises(Usage, match="write http://minio:9000"):
        open_store(url, StoreOptions(endpoint_url="minio:9000"))


@pytest.mark.parametrize(
    "proxy", ["http://[x", "proxy:port", "http://", "http://me:s3/cret@proxy:1", "http://:s3/cret@"]
)
def test_a_proxy_that_is_none_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(Usage, match="HTTPS_PROXY") as told:
        open_store("s3://bucket", StoreOptions(region="eu-west-1"))
    assert "s3" not in str(told.value).replace("s3://", "")
    assert told.value.__cause__ is None


def test_a_key_without_its_secret_is_named(moto: Bucket, opened: Opener) -> None:
    with pytest.raises(Denied, match="AWS_SECRET_ACCESS_KEY is absent"):
        put(opened(moto, fresh=True, access_key="x"), KEY)


def test_an_endpoint_without_a_scheme_in_the_environment_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    with pytest.raises(Usage, match="http:// or https:// before AWS_ENDPOINT_URL_S3"):
        open_store("s3://bucket", StoreOptions())


def test_a_profile_that_there_is_not_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_PROFILE", "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Usage, match="AWS_PROFILE"):
        open_store("s3://bucket", StoreOptions())


def test_without_credentials_the_cure_is_named_and_they_may_come_later(
    moto: Bucket, opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fresh instance gets its role when it gets it."""
    for name in (*moto.environ, "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store(moto.target, StoreOptions(region="us-east-1", endpoint_url=moto.url))
    for ask in (lambda: put(store, KEY), lambda: keys(store), lambda: read(store, KEY)):
        with pytest.raises(Denied, match="AWS_ACCESS_KEY_ID"):
            ask()
    for name, value in moto.environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        f"[default]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key={SECRET_KEY}\n"
    )
    put(store, KEY)
    assert keys(store) == [KEY]


def test_what_googles_library_says_twice_is_said_once() -> None:
    """It raises what happened together with the server's answer."""
    error = RuntimeError("token server: 'gone'", {"error": "token server: 'gone'"})
    for cure in ("", "set it"):
        assert str(unanswered("gs://b", error, cure)).count("token server") == 1


@pytest.mark.parametrize(
    "keys_", [("CANARY\n", "x"), ("CANARY\r", "x"), ("x", "CANARY\n"), ("x", " CANARY"), ("\u200bCANARY", "x")]
)
def test_a_key_that_ends_with_a_line_end_is_named_and_not_shown(
    moto: Bucket, opened: Opener, keys_: tuple[str, str]
) -> None:
    store = opened(moto, fresh=True, access_key=keys_[0], secret_key=keys_[1])
    named = "AWS_ACCESS_KEY_ID" if "CANARY" in keys_[0] else "AWS_SECRET_ACCESS_KEY"
    for ask in (lambda: put(store, KEY), lambda: read(store, KEY), lambda: keys(store)):
        with pytest.raises(Denied, match=f"{named} ends with a line end") as refused:
            ask()
        assert "CANARY" not in str(refused.value)
    assert "CANARY" not in repr(StoreOptions(access_key="CANARY", secret_key="CANARY"))


@pytest.mark.parametrize(
    ("region", "name", "place"),
    [
        ("eu-west-1", "bucket", "https://bucket.s3.eu-west-1.amazonaws.com/"),
        ("eu-west-1", "with.dots", "https://s3.eu-west-1.amazonaws.com/with.dots/"),
        ("ap-east-1", "bucket", "https://bucket.s3.ap-east-1.amazonaws.com/"),
        ("cn-north-1", "bucket", "https://bucket.s3.cn-north-1.amazonaws.com.cn/"),
        ("us-gov-west-1", "bucket", "https://bucket.s3.us-gov-west-1.amazonaws.com/"),
    ],
)
def test_a_bucket_is_asked_for_in_its_own_region(region: str, name: str, place: str) -> None:
    """The global endpoint answers 400 for each region since 2019, and 307 for a bucket's first hours in any other."""
    store = open_store(f"s3://{name}", StoreOptions(region=region, access_key="a", secret_key="b"))
    assert store._wire._origin + store._base == place  # type: ignore[attr-defined]


def test_an_endpoint_of_the_environment_is_used_unless_it_is_to_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether boto3 knows these variables or is too old for them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = StoreOptions(region="eu-west-1", access_key="a", secret_key="b")
    assert open_store("s3://b", options)._wire._origin == "http://127.0.0.1:9"  # type: ignore[attr-defined]
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert "amazonaws" in open_store("s3://b", options)._wire._origin  # type: ignore[attr-defined]


@pytest.mark.parametrize(("url", "sdk"), [("file:///tmp", ""), ("s3://b", "boto3"), ("gs://b", "google.cloud.storage")])
def test_no_sdk_is_imported_before_a_store_needs_it(url: str, sdk: str, tmp_path: Path) -> None:
    code = """
        import json, sys
        import cassbackup
        before = [name for name in ("boto3", "botocore", "google.cloud.storage", "requests") if name in sys.modules]
        cassbackup.open_store(sys.argv[1].replace("/tmp", sys.argv[2]), cassbackup.StoreOptions(region="us-east-1"))
        after = [name for name in ("boto3", "google.cloud.storage") if name in sys.modules]
        print(json.dumps([before, after]))
    """
    environ = {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1", "GOOGLE_CLOUD_PROJECT": "x", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), url, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S,
        env={"PYTHONPATH": ":".join(sys.path), **environ},
    )  # fmt: skip
    assert json.loads(done.stdout) == [[], [sdk] if sdk else []]


# ------------------------------------------------------------------------------------------------------------
# The thin path

WORDS = some.text("abcXYZ019-_.~/", min_size=1, max_size=20)


@given(
    method=some.sampled_from(["PUT", "GET", "POST"]),
    path=some.text(min_size=1, max_size=40).filter(lambda text: text.encode("utf-8", "replace").decode() == text),
    query=some.dictionaries(some.sampled_from(["partNumber", "uploadId", "uploads"]), WORDS),
    headers=some.dictionaries(some.sampled_from(["range", "x-amz-meta-crc32", "if-none-match", "content-md5"]), WORDS),
    secret=WORDS, token=some.none() | WORDS, region=some.sampled_from(["us-east-1", "eu-west-1"]), body=some.binary(),
)  # fmt: skip
def test_the_signature_is_the_sdks(method, path, query, headers, secret, token, region, body) -> None:  # type: ignore[no-untyped-def]
    """Byte by byte that of botocore, for any request."""
    from urllib.parse import quote, urlencode

    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    who = Credentials("AKIA", secret, token)
    target = "/bucket/" + quote(path)
    if query:
        target += "?" + urlencode(sorted(query.items()), quote_via=quote, safe="-_.~")
    request = AWSRequest(method, "https://host.example:9000" + target, dict(headers), body)
    request.context["payload_signing_enabled"] = True
    S3SigV4Auth(who, "s3", region).add_auth(request)
    ours = {**headers, "host": "host.example:9000", "x-amz-date": request.context["timestamp"]}
    ours["x-amz-content-sha256"] = request.headers["X-Amz-Content-SHA256"]
    sign(method, target, ours, who.get_frozen_credentials(), region)
    assert ours["authorization"] == request.headers["Authorization"]


def test_a_signing_key_is_not_kept_over_midnight() -> None:
    who, signatures = SimpleNamespace(access_key="A", secret_key="S", token=None), []
    for moment in ("20261121T235959Z", "20261122T000000Z"):
        headers = {"host": "h", "x-amz-date": moment, "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
        sign("PUT", "/x", headers, who, "us-east-1")
        signatures.append(headers["authorization"])
    assert "20261121/us-east-1" in signatures[0]
    assert "20261122/us-east-1" in signatures[1]


@given(some.binary(max_size=100), some.binary(max_size=100))
def test_checksums_of_pieces_make_that_of_the_whole(first: bytes, second: bytes) -> None:
    assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@pytest.fixture(scope="module")
def lane(moto_server: Service) -> Iterator[tuple[Bucket, FaultProxy]]:
    bucket = moto_server.fresh()
    with FaultProxy(bucket.url) as proxy:
        yield bucket, proxy


@pytest.fixture
def moto(lane: tuple[Bucket, FaultProxy]) -> Bucket:
    """Return the bucket behind the proxy, empty."""
    lane[0].empty()
    return lane[0]


@pytest.fixture
def faulty(lane: tuple[Bucket, FaultProxy]) -> FaultProxy:
    """Return the proxy, without rules and without memory."""
    lane[1].heal()
    lane[1]._trace.clear()
    return lane[1]


@pytest.fixture
def weak(moto: Bucket, faulty: FaultProxy, opened: Opener) -> Store:
    """Return moto behind the proxy; its refusal to overwrite is known already."""
    store = opened(moto, faulty.url)
    put(store, "first")
    faulty._trace.clear()
    return store


def test_one_connection_serves_many_requests(weak: Store, faulty: FaultProxy) -> None:
    weak.put_all([(f"n/{number}", Body(BODY)) for number in range(5)])
    assert count(faulty.trace) == 5
    assert len(weak._wire._idle) == 1  # type: ignore[attr-defined]


def test_a_kept_connection_that_the_server_has_closed_is_opened_again(weak: Store, faulty: FaultProxy) -> None:
    faulty.down()
    faulty.up()
    put(weak, KEY)
    assert count(faulty.trace) == 1


def test_a_connection_that_breaks_is_tried_once_more_and_no_more(weak: Store, faulty: FaultProxy) -> None:
    faulty.on("PUT", "node1/", Drop("before"), count=None)
    with pytest.raises(Unreachable):
        put(weak, KEY)
    assert count(faulty.trace, "PUT") == 2  # the kept one, and a fresh one
    with pytest.raises(Unreachable):
        put(weak, KEY)
    assert count(faulty.trace, "PUT") == 3


def serve(*answer: bytes) -> str:
    """Answer each connection to a port with some bytes, piece by piece, whatever it asks; return the URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                peer.recv(65536)
                for number, piece in enumerate(answer):
                    time.sleep(0.05 if number else 0)
                    peer.sendall(piece)
                peer.close()

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_answer_before_the_body_was_read_is_heard(moto: Bucket, opened: Opener) -> None:
    body = b"<Error><Code>EntityTooLarge</Code></Error>"
    url = serve(b"HTTP/1.1 413 no\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    store = opened(moto, url)
    store._refuses = True  # type: ignore[attr-defined]
    with pytest.raises(Denied, match=r"EntityTooLarge.*body of this size"):
        put(store, KEY, noise(4 << 20))


@pytest.mark.parametrize("head", [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_an_interim_and_a_chunked_reply_are_read(moto: Bucket, opened: Opener, head: bytes) -> None:
    store = opened(
        moto, serve(head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: x\r\n\r\n")
    )
    assert read(store, KEY) == b"abcde"


REPLIES = {
    "plain": [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde"],
    "in two": [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", b"cde"],
    "cut in its head": [b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 5\r\n\r\nabcde"],
    "no space, any case": [b"HTTP/1.1 200 OK\r\ncoNTent-length:5\r\n\r\nabcde"],
    "two lengths": [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 3\r\n\r\nabcde"],
    "after an early hint": [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", b"HTTP/1.1 200 OK\r\n"
                            b"Content-Length: 5\r\n\r\nabcde"],
    "with an early hint": [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n"
                           b"Content-Length: 5\r\n\r\nabcde"],
    "more than told": [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcdefgh"],
    "folded": [b"HTTP/1.1 200 OK\r\nX: y\r\n Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde"],
    "bare line ends": [b"HTTP/1.1 200 OK\nContent-Length: 5\n\nabcde"],
    "no length": [b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nabcde"],
    "no headers": [b"HTTP/1.1 200 OK\r\n\r\nabcde"],
    "1.0": [b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nabcde"],
    "closing": [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nabcde"],
    "chunked all the same": [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
                             b"5\r\nabcde\r\n0\r\n\r\n"],
    "long": [b"HTTP/1.1 200 OK\r\n" + b"X: %b\r\n" % bytes(60000).replace(b"\0", b"x") * 3
             + b"Content-Length: 5\r\n\r\nabcde"],
}  # fmt: skip


def test_p1_a_reply_of_gcs_that_names_other_bytes_stores_nothing(gcs: Bucket, opened: Opener) -> None:
    body = json.dumps({"generation": "1", "crc32c": "AAAAAA=="}).encode()
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    store = opened(gcs, serve(reply), fresh=True)
    store._refuses = True  # type: ignore[attr-defined]
    with pytest.raises(Unreachable, match="other bytes"):
        put(store, KEY, b"ours")


def test_a_name_that_another_process_linked_is_made_durable_before_it_counts_p1(
    tmp_bucket: FileBucket, local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one may have died before it was."""
    info = put(local, KEY, b"bytes")
    synced = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert local.holds(info, Body(b"bytes"), info.crc32)
    root = tmp_bucket.target.removeprefix("file://")
    folder = os.path.dirname(f"{root}/{KEY}")
    assert {root, folder, os.path.dirname(folder)} <= set(synced)
    synced.clear()
    assert not local.holds(info, Body(b"other"), crc(b"other"))


@pytest.mark.parametrize("late", [True, False])
def test_p1_a_reply_that_is_not_to_this_put_stores_nothing(moto: Bucket, opened: Opener, late: bool) -> None:
    """One that comes unasked is lying on a kept connection, or names other bytes than were sent."""
    ok = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nx-amz-checksum-crc32: %b\r\nContent-Length: 0\r\n\r\n'
    listener, peers = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()

    def answer(peer: socket.socket) -> None:
        sums = []
        with contextlib.suppress(OSError, IndexError):
            while True:
                head = peer.recv(65536)
                sums.append(re.findall(rb"x-amz-checksum-crc32: (\S+)", head)[0])
                peer.sendall(ok % sums[0])
                if late and len(sums) == 1:
                    time.sleep(0.05)
                    peer.sendall(ok % sums[0])

    def accept() -> None:
        while True:
            peers.append(listener.accept()[0])
            threading.Thread(target=answer, args=(peers[-1],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    store = opened(moto, f"http://127.0.0.1:{listener.getsockname()[1]}")
    store._refuses = True  # type: ignore[attr-defined]
    put(store, KEY, b"one")
    time.sleep(0.2)  # until what is not asked for has come
    if late:
        put(store, KEY, b"another")
        assert len(peers) == 2, "over a connection on which nothing lies"
        return
    with pytest.raises(Unreachable, match="other bytes"):
        put(store, KEY, b"another")


@pytest.mark.parametrize("shape", REPLIES)
def test_a_reply_of_any_shape_is_read_and_the_next_one_too(moto: Bucket, opened: Opener, shape: str) -> None:
    store = opened(moto, serve(*REPLIES[shape]))
    for _ in range(2):
        assert read(store, KEY) == b"abcde"


def test_a_head_is_read_without_a_body_whatever_length_it_tells(moto: Bucket, opened: Opener) -> None:
    """S3 says of an absent object that chunks follow, and none does."""
    store = opened(moto, serve(b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n"))
    assert [store.head(KEY), store.head(KEY)] == [None, None]
    store = opened(moto, serve(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 7\r\n\r\n'))
    for _ in range(2):
        info = store.head(KEY)
        assert info
        assert (info.size, info.etag) == (7, "e")


NEVER = b"Last-Modified: Mon, 01 Jan 9999999999 00:00:00 GMT\r\n"


@pytest.mark.parametrize("told", [b"", b"Content-Length: x\r\n", b"Content-Length: 7\r\n" + NEVER])
def test_a_head_that_does_not_tell_what_an_object_is_is_no_answer(moto: Bucket, opened: Opener, told: bytes) -> None:
    store = opened(moto, serve(b'HTTP/1.1 200 OK\r\nETag: "e"\r\n' + told + b"\r\n"))
    with pytest.raises(Unreachable, match="a proxy or a portal between"):
        store.head(KEY)


@pytest.mark.parametrize("date", [b"", b"Date: soon\r\n", b"Date: Mon, 01 Jan 9999999999 00:00:00 GMT\r\n"])
def test_a_reply_without_a_date_that_can_be_read_leaves_us_our_own_clock(
    moto: Bucket, opened: Opener, date: bytes
) -> None:
    store = opened(moto, serve(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 7\r\n' + date + b"\r\n"))
    info = store.head(KEY)
    assert info
    for moment in (info.modified, store.now()):
        assert abs(moment - time.time()) < 60


def test_a_refusal_without_a_body_is_told_in_words(moto: Bucket, opened: Opener) -> None:
    with pytest.raises(Denied, match=r"403 .*Forbidden.*check the keys and their rights"):
        opened(moto, serve(b"HTTP/1.1 403 no\r\nContent-Length: 0\r\n\r\n")).head(KEY)
    moved = b"HTTP/1.1 301 no\r\nX-Amz-Bucket-Region: eu-west-1\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(Denied, match=r"it is in eu-west-1.*set REGION"):
        opened(moto, serve(moved)).head(KEY)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nServer: x\r\n", b"\r\n\r\n", b"hello\n\n"])
def test_what_ends_before_the_body_is_no_empty_object_p1(moto: Bucket, opened: Opener, head: bytes) -> None:
    """An empty listing would pass for a corrupt one, an empty file for a bad one."""
    with pytest.raises(Unreachable):
        read(opened(moto, serve(head)), KEY)


def chatter(first: bytes, more: bytes) -> str:
    """Say something to whoever connects, then go on for eight seconds, or be silent for so long; return the URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as peer:
            peer.sendall(first)
            until = time.monotonic() + 8.0
            while time.monotonic() < until:
                peer.sendall(1000 * more)
                time.sleep(0.0 if more else 0.1)

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("first", "more"),
    [(b"220 mail ESMTP\r\n", b""), (b"J\0\0\0\n8.0.36\0", b""), (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")],
)
def test_of_what_is_no_reply_no_end_is_waited_for_p5(moto: Bucket, opened: Opener, first: bytes, more: bytes) -> None:
    """A mail server waits for us to speak; a head without an end would fill the memory."""
    store, began = opened(moto, chatter(first, more)), time.monotonic()
    with pytest.raises(Unreachable, match=r"no reply of HTTP|more than 200 lines"):
        read(store, KEY)
    assert time.monotonic() - began < 4.0


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nServ", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"])
def test_a_reply_that_breaks_off_leaves_no_connection_behind_p5(moto: Bucket, opened: Opener, answer: bytes) -> None:
    """Not while its error is kept either, as those of a unit are until it is tried again."""
    url = serve(answer)
    store, kept = opened(moto, url), []
    for _ in range(3):
        with pytest.raises(Unreachable) as raised:
            read(store, KEY)
        kept.append(raised)
    peer = f"{int(url.rpartition(':')[2]):04X}"
    waiting = [line.split()[2:4] for line in Path("/proc/net/tcp").read_text().splitlines()]
    close_wait = "08"  # the server has hung up, and we have not
    assert [where for where, state in waiting if where.endswith(f":{peer}") and state == close_wait] == []


def test_a_reply_that_ends_early_is_unreachable(moto: Bucket, opened: Opener) -> None:
    head = b"HTTP/1.1 %b\r\nETag: x\r\nContent-Length: 7\r\n\r\nabc"
    with pytest.raises(Unreachable, match="broke off 4 bytes early"):
        read(opened(moto, serve(head % b"200 OK")), KEY)
    with pytest.raises(Unreachable, match="IncompleteRead"):
        opened(moto, serve(head % b"200 OK"))._put_body(KEY, BODY)  # type: ignore[attr-defined]


def test_a_small_body_is_sent_with_its_head_and_a_large_one_is_not_copied(moto: Bucket, opened: Opener) -> None:
    wire = opened(moto)._wire  # type: ignore[attr-defined]
    (small,) = wire._request("PUT", "/x", {"a": "b"}, [BODY])
    assert small.endswith(b"\r\na: b\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)
    large = noise(1 << 20)
    assert wire._request("PUT", "/x", {}, [large])[1] is large
    assert b"content-length" not in wire._request("GET", "/x", {}, ())[0]
    for name, value in (("a", "b\n"), ("a", "b\r"), ("a\r\nb", "c")):
        with pytest.raises(ValueError, match="Invalid header value"):
            wire._request("GET", "/x", {name: value}, ())


def test_what_is_read_halfway_disturbs_nobody(weak: Store, moto: Bucket) -> None:
    moto.put(KEY, noise(3 << 20))
    first, second = weak.get(KEY), weak.get(KEY)
    start = next(first), next(second)
    assert keys(weak) == ["first", KEY]
    first.close()  # type: ignore[attr-defined]
    assert start[1] + b"".join(second) == noise(3 << 20)
    assert read(weak, "first") == BODY


@pytest.mark.parametrize("kind", ["moto", "gcs"])
def test_the_way_leads_through_a_proxy(
    kind: str, request: pytest.FixtureRequest, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of plain HTTP it is asked for the whole URL, with its password."""
    bucket = request.getfixturevalue(kind)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    with FaultProxy(bucket.url) as proxy:
        address = proxy.url.removeprefix("http://")
        monkeypatch.setenv("http_proxy", f"http://us%20er:pass@{address}")
        elsewhere = bucket.url.replace("127.0.0.1", "127.0.0.99")  # where nobody listens
        store = opened(bucket, elsewhere, fresh=True)
        assert store._wire._to_proxy == {"proxy-authorization": "Basic " + base64.b64encode(b"us er:pass").decode()}  # type: ignore[attr-defined]
        proxy.on("", "", Absolute(elsewhere), count=None)
        put(store, KEY)
        assert read(store, KEY) == BODY
        assert all(event.path.startswith(elsewhere) for event in proxy.trace)
    monkeypatch.delenv("http_proxy")
    assert bucket.objects() == {KEY: BODY}


def test_no_proxy_may_name_a_port(moto: Bucket, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, moto.url.removeprefix("http://"))
    store = opened(moto, fresh=True)
    put(store, KEY)
    assert read(store, KEY) == BODY


def test_tls_leads_through_a_tunnel(
    moto: Bucket, secured: Secured, authority: Authority, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    between = secured(moto, "127.0.0.99")
    target = ("127.0.0.1", int(between.url.rpartition(":")[2]))
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)

    def run() -> None:
        while True:
            peer, _ = listener.accept()
            asked.append(peer.recv(65536).split(b"\r\n")[0])
            peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            store = socket.create_connection(target)
            for pair in ((peer, store), (store, peer)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
    store = opened(moto, "https://127.0.0.99:443", fresh=True, ca_file=str(authority.file))
    put(store, KEY, noise(3 << 20))
    assert read(store, KEY) == noise(3 << 20)
    assert set(asked) == {b"CONNECT 127.0.0.99:443 HTTP/1.0"} or b"CONNECT 127.0.0.99:443 HTTP/1.1" in asked


# ------------------------------------------------------------------------------------------------------------
# Large files


def refuse_part(faulty: FaultProxy, number: int) -> None:
    faulty.on("PUT", f"partNumber={number}", s3_error(403, "AccessDenied"), count=None)


def parts_sent(faulty: FaultProxy) -> list[str]:
    return sorted(
        event.query["partNumber"] for event in faulty.trace if event.query.get("partNumber") and event.method == "PUT"
    )


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_another_process_goes_on_where_the_first_died(
    kind: str, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener
) -> None:
    """What is there is compared with our bytes first: the second part is of other ones."""
    bucket, body = request.getfixturevalue(kind), noise(LARGE)
    faulty = proxy(bucket)
    refuse_part(faulty, 3)
    with pytest.raises(Denied):
        put(opened(bucket, faulty.url, fresh=True), KEY, body)
    assert parts_sent(faulty) == ["1", "2", "3"]
    faulty.heal()
    faulty._trace.clear()
    if kind == "moto":  # rclone lets nobody replace a part
        body = body[:PART_BYTES] + bytes(9) + body[PART_BYTES + 9 :]
    assert put(opened(bucket, faulty.url, fresh=True), KEY, body).crc32 == crc(body)
    assert parts_sent(faulty) == (["2", "3"] if kind == "moto" else ["3"])
    assert bucket.objects() == {KEY: body}


def test_one_large_file_leaves_others_their_turn(weak: Store, moto: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incremental of two megabytes must not wait until a file of 300 GB is stored."""
    monkeypatch.setattr(cassbackup, "PART_BYTES", 2 << 20)
    started, parts = threading.Event(), list[int]()

    class Slow(Body):
        def read(self, start: int, end: int) -> bytes:
            parts.append(start)
            started.set()
            time.sleep(0.1)
            return bytes(end - start)

        size = 64 << 20  # type: ignore[assignment]

    def send() -> None:
        with contextlib.suppress(Fault):  # S3 takes no parts as small as these
            weak.put(KEY, Slow(b""))

    sending = threading.Thread(target=send)
    sending.start()
    assert started.wait(60)
    put(weak, "second", noise(3 << 19))
    assert len(parts) < 32
    sending.join(100)
    assert moto.get("second") == noise(3 << 19)
    weak.abandon_uploads(time.time() + 999)


def test_parts_of_a_file_of_another_size_are_left_alone(moto: Bucket, faulty: FaultProxy, opened: Opener) -> None:
    store = opened(moto, faulty.url)
    refuse_part(faulty, 2)
    with pytest.raises(Denied):
        put(store, KEY, noise(PART_BYTES + 7))
    faulty.heal()
    put(store, KEY, noise(PART_BYTES + 9)[: PART_BYTES + 8])
    assert moto.get(KEY) == noise(PART_BYTES + 9)[: PART_BYTES + 8]


def test_an_upload_that_is_listed_though_it_has_ended_is_passed_over(
    moto: Bucket, faulty: FaultProxy, opened: Opener
) -> None:
    """As MinIO does for a while, and Ceph."""
    store = opened(moto, faulty.url)
    refuse_part(faulty, 2)
    with pytest.raises(Denied):
        put(store, KEY, noise(LARGE))
    faulty.heal()
    faulty.on("GET", "uploadId=", s3_error(404, "NoSuchUpload"), count=None)
    put(store, KEY, noise(LARGE))
    assert moto.get(KEY) == noise(LARGE)


@pytest.mark.parametrize("code", ["InvalidPart", "EntityTooSmall"])
def test_an_upload_that_can_never_be_completed_begins_anew(
    moto: S3Bucket, faulty: FaultProxy, opened: Opener, code: str
) -> None:
    store = opened(moto, faulty.url)
    faulty.on("POST", "uploadId=", s3_error(400, code))
    with pytest.raises(Denied):
        put(store, KEY, noise(LARGE))
    assert "Uploads" not in moto.client.list_multipart_uploads(Bucket=moto.bucket)
    put(store, KEY, noise(LARGE))
    assert moto.get(KEY) == noise(LARGE)


@pytest.mark.parametrize(("size", "crc32"), [(LARGE - 1, ""), (LARGE, "AAAAAA==")])
def test_a_large_file_that_the_store_has_otherwise_is_not_stored_p1(
    weak: Store, faulty: FaultProxy, size: int, crc32: str
) -> None:
    told = {"ETag": '"e"', "Content-Length": str(size), **({"x-amz-checksum-crc32": crc32} if crc32 else {})}
    faulty.on("HEAD", r"Data\.db", Respond(200, headers=told), nth=2)  # the first asks whether the key is free
    with pytest.raises(Corrupt, match="did not arrive as it was sent"):
        put(weak, KEY, noise(LARGE))


def test_an_error_inside_a_success_is_told_in_its_words(weak: Store, faulty: FaultProxy) -> None:
    """CompleteMultipartUpload says 200 before it knows."""
    faulty.on("POST", "uploadId=", s3_error(200, "InternalError"))
    with pytest.raises(Unreachable, match="InternalError"):
        put(weak, KEY, noise(LARGE))


def uploads(*items: str, more: str = "") -> Respond:
    """Return a list of uploads as some servers write it: without the bucket's name."""
    found = [f"<Upload><Key>{key}</Key><UploadId>u</UploadId><Initiated>{EARLY}</Initiated></Upload>" for key in items]
    return Respond(
        200, XML + f"<ListMultipartUploadsResult>{more}{''.join(found)}</ListMultipartUploadsResult>".encode()
    )


EARLY = "2026-01-01T02:00:00.123+02:00"  # midnight, as a server says it that has no UTC


def test_nobody_elses_upload_is_ended_and_no_bucket_deleted_p7(
    moto: Bucket, faulty: FaultProxy, opened: Opener
) -> None:
    """Some servers take no notice of `prefix`; and an upload may have the name of the folder that is ours."""
    store = opened(moto, faulty.url, prefix="a")
    faulty.on("GET", "uploads=", uploads("a/", "foreign/x", "a/node10/x"), count=None)
    faulty.on("DELETE", "", Respond(204), count=None)
    assert store.abandon_uploads(time.time(), "node1/") == 0
    assert store.abandon_uploads(time.time()) == 2
    bucket = moto.target.removeprefix("s3:/")
    ended = [event.path for event in faulty.trace if event.method == "DELETE"]
    assert ended == [f"{bucket}/a/?uploadId=u", f"{bucket}/a/node10/x?uploadId=u"]


def test_the_age_of_an_upload_is_right_in_any_time_zone(weak: Store, faulty: FaultProxy) -> None:
    midnight = cassbackup.seconds_of("20260101T000000.000000Z")
    faulty.on("GET", "uploads=", uploads("node1/x"), count=None)
    faulty.on("DELETE", "", Respond(204), count=None)
    assert weak.abandon_uploads(midnight - 1, "node1/") == 0
    assert weak.abandon_uploads(midnight + 1, "node1/") == 1


@pytest.mark.parametrize("more", ["", "<IsTruncated>true</IsTruncated>"])
def test_a_list_of_uploads_that_is_odd_costs_no_large_file(weak: Store, faulty: FaultProxy, more: str) -> None:
    faulty.on("GET", "uploads=", uploads("other", more=more), count=None)
    assert put(weak, KEY, noise(LARGE)).size == LARGE


def test_uploads_are_abandoned_by_their_age(weak: Store, moto: S3Bucket) -> None:
    moto.client.create_multipart_upload(Bucket=moto.bucket, Key=KEY)
    assert weak.abandon_uploads(time.time() + 999, "node10/") == 0  # it is not that node's
    assert weak.abandon_uploads(1.0) == 0
    assert weak.abandon_uploads(time.time() + 999) == 1
    assert weak.abandon_uploads(time.time() + 999) == 0


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_p3_an_upload_that_ends_at_a_taken_key_is_refused(
    kind: str, request: pytest.FixtureRequest, opened: Opener
) -> None:
    """P3 Written once: somebody takes the key while the parts are on their way."""
    bucket = request.getfixturevalue(kind)

    class Taken(Body):
        def read(self, start: int, end: int) -> bytes:
            if not start:
                bucket.put(KEY, BODY)
            return self.data[start:end]

    with pytest.raises(Conflict):
        opened(bucket).put(KEY, Taken(noise(LARGE)))
    assert bucket.objects() == {KEY: BODY}
    assert not bucket.client.list_multipart_uploads(Bucket=bucket.bucket).get("Uploads") if kind == "moto" else True


@pytest.mark.parametrize("kind", ["moto", "rclone"])
@pytest.mark.parametrize("size", [20, LARGE])
def test_a_lost_reply_to_a_put_of_a_command_is_a_success(
    kind: str, size: int, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener, naps: list[float]
) -> None:
    """The second try finds the key taken, by the same bytes."""
    bucket, body = request.getfixturevalue(kind), noise(size)
    faulty = proxy(bucket)
    store = Patient(opened(bucket, faulty.url), 20.0)
    put(store, "first")  # which looks what the server knows
    faulty.on("POST" if size == LARGE else "PUT", "uploadId=" if size == LARGE else "backups", LOST_ACK)
    assert put(store, KEY, body).size == len(body)
    bucket.delete("first")
    with pytest.raises(Conflict):
        put(store, KEY, body[::-1])
    assert bucket.objects() == {KEY: body}
    assert_written_once(faulty.trace)


# ------------------------------------------------------------------------------------------------------------
# Faults

BURSTS: dict[str, Action] = {
    "500": s3_error(500, "InternalError"),
    "502": Respond(502, b"<html>bad gateway</html>"),
    "503": SLOW_DOWN,
    "503-plain": Respond(503),
    "429": s3_error(429, "TooManyRequests"),
    "408": s3_error(408, "RequestTimeout"),
    "409": s3_error(409, "ConditionalRequestConflict"),
    "400-timeout": s3_error(400, "RequestTimeout"),
    "400-digest": s3_error(400, "BadDigest"),
    "error-in-200": Respond(200, XML + b"<Error><Code>InternalError</Code><Message>x</Message></Error>"),
    "portal": Respond(200, b"<html><body>Please log in</body></html>", {"Content-Type": "text/html"}),
    "page": Respond(200, b"OK", {"ETag": 'W/"2-nOO9QiTIwXgNtWtBJezz8kv3SLc"'}),  # as many frameworks answer
    "nothing": Respond(200),
    "reset": Drop("before"),
    "reset-late": Drop("sent"),
    "cut-request": Cut("request", 7),
    "lost-ack": LOST_ACK,
}


@pytest.mark.parametrize("burst", BURSTS)
def test_a_burst_of_faults_ends_in_one_object(
    moto: Bucket, faulty: FaultProxy, weak: Store, naps: list[float], burst: str
) -> None:
    store = Patient(weak, 60.0)
    faulty.on("", "node1/", BURSTS[burst], count=4)
    with contextlib.suppress(Conflict):  # after a lost reply the key is taken, by ourselves
        put(store, KEY)
    found = store.head(KEY)
    assert found is not None
    assert (found.size, found.crc32) == (len(BODY), crc(BODY))
    assert moto.objects() == {"first": BODY, KEY: BODY}
    assert_written_once(faulty.trace)
    assert naps


@pytest.mark.parametrize("burst", ["500", "503", "portal", "nothing", "reset", "lost-ack"])
def test_a_burst_of_faults_in_a_large_upload_ends_in_one_object(
    weak: Store, faulty: FaultProxy, moto: Bucket, naps: list[float], burst: str
) -> None:
    for method, path in (("POST", r"\?uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId=")):
        faulty.on(method, path, BURSTS[burst], count=2)
    with contextlib.suppress(Conflict):
        put(Patient(weak, 60.0), KEY, noise(LARGE))
    assert moto.objects() == {"first": BODY, KEY: noise(LARGE)}
    assert_written_once(faulty.trace)


@pytest.mark.parametrize("kind", ["moto", "rclone", "gcs"])
@pytest.mark.parametrize("burst", ["503-plain", "reset", "lost-ack"])
def test_every_store_survives_a_burst(
    kind: str, burst: str, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener, naps: list[float]
) -> None:
    bucket = request.getfixturevalue(kind)
    faulty = proxy(bucket)
    store = Patient(opened(bucket, faulty.url), 60.0)
    large = (
        BODY if (kind, burst) == ("gcs", "lost-ack") else noise(LARGE)
    )  # GCS ignores what it has; the emulator does not
    for key, body in ((KEY, BODY), (KEY + "2", large)):
        for method in ("PUT", "POST"):
            faulty.on(method, "", BURSTS[burst], count=2)
        with contextlib.suppress(Conflict):
            put(store, key, body)
        faulty.heal()
    assert bucket.objects() == {KEY: BODY, KEY + "2": large}
    assert_written_once(faulty.trace)


@pytest.mark.parametrize("kind", ["moto", "rclone", "gcs"])
@pytest.mark.parametrize("fault", [Cut("reply", (1 << 20) + 77), SLOW_DOWN])
def test_a_body_goes_on_where_it_broke_off(
    kind: str, fault: Action, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener, naps: list[float]
) -> None:
    bucket, body = request.getfixturevalue(kind), noise((6 << 20) + 5)
    faulty = proxy(bucket)
    bucket.put(KEY, body)
    faulty.on("GET", r"Data\.db", fault, count=2)
    assert read(Patient(opened(bucket, faulty.url), 60.0), KEY) == body
    assert count(faulty.trace, "GET", r"Data\.db") == 3


@pytest.mark.parametrize("fault", [Cut("reply", 100), SLOW_DOWN, Respond(200), BURSTS["portal"]])
def test_a_list_goes_on_where_it_broke_off(weak: Store, faulty: FaultProxy, naps: list[float], fault: Action) -> None:
    """200 with something else inside says nothing: not even that a bucket is empty."""
    put(weak, KEY)
    faulty.on("GET", "list-type", fault, count=2)
    assert keys(Patient(weak, 60.0)) == ["first", KEY]
    faulty.on("GET", "list-type", fault, count=2)
    assert [*Patient(weak, 60.0).prefixes("")] == ["node1"]


@pytest.mark.parametrize("kind", ["rclone", "gcs"])
@pytest.mark.parametrize("size", [100_000, LARGE])
def test_p1_a_byte_flipped_on_the_way_is_never_stored(
    kind: str, size: int, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener, naps: list[float]
) -> None:
    """P1 Listed means restorable: a server checks CRC-32, CRC-32C or, where it knows neither, Content-MD5."""
    bucket = request.getfixturevalue(kind)
    faulty = proxy(bucket)
    store = opened(bucket, faulty.url)
    for method in ("PUT", "POST"):
        faulty.on(method, "Data|upload_id", Flip(50_000))
    if accepted(lambda: put(store, KEY, noise(size))):
        assert bucket.objects()[KEY] == noise(size)


@pytest.mark.slow
def test_a_black_hole_is_given_up_and_others_go_on_meanwhile(
    faulty: FaultProxy, moto: Bucket, opened: Opener, weak: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cassbackup, "ANSWER_S", 1.0)
    hasty = opened(moto, faulty.url, fresh=True)
    hasty._refuses = True  # type: ignore[attr-defined]
    swallowed = faulty.on("PUT", "hole", BlackHole(), count=None)
    fate: list[object] = []
    falling = threading.Thread(target=lambda: fate.extend(hasty.put_all([("hole", Body(BODY)), ("hole2", Body(BODY))])))
    falling.start()
    put(weak, KEY)
    falling.join(100)
    assert [type(one) for one in fate] == [Unreachable, Unreachable]
    assert swallowed.hits == 1  # nobody waits a minute for each file of a group


# ------------------------------------------------------------------------------------------------------------
# No

ANSWERS = [
    (403, "AccessDenied", Denied, "check the keys and their rights"),
    (403, "RequestTimeTooSkewed", Denied, "clock"),
    (400, "ExpiredToken", Denied, "check the keys"),
    (400, "KMS.DisabledException", Denied, "--kms-key"),
    (400, "KMS.NotFoundException", Denied, "--kms-key"),
    (404, "XAdminUserNotFound", Denied, "--endpoint-url"),
    (404, "NoSuchBucket", Denied, "BUCKET_NAME"),
    (400, "AuthorizationHeaderMalformed", Denied, "set REGION"),
    (307, "TemporaryRedirect", Denied, "set REGION"),
    (400, "InvalidStorageClass", Denied, "--storage-class GALCIER"),
    (400, "InvalidArgument", Denied, "--storage-class GALCIER"),
    (403, "QuotaExceeded", Unreachable, "full"),
    (507, "XMinioStorageFull", Unreachable, "full"),
    (410, "Gone", Unreachable, ""),  # GCS says so of an upload that it has lost
    (400, "ThrottlingException", Throttled, ""),
    (429, "RateLimitExceeded", Throttled, ""),
    (503, "ServiceUnavailable", Throttled, ""),
    (503, "SlowDown", Throttled, ""),
]


@pytest.mark.parametrize(("status", "code", "kind", "hint"), ANSWERS)
def test_a_refusal_is_named_with_its_cure(
    faulty: FaultProxy, moto: Bucket, opened: Opener, status: int, code: str, kind: type[Fault], hint: str
) -> None:
    store = opened(moto, faulty.url, storage_class="GALCIER")
    store._refuses = True  # type: ignore[attr-defined]
    faulty.on("PUT", "node1/", s3_error(status, code), count=None)
    with pytest.raises(kind, match=code) as refused:
        put(store, KEY, noise(200 << 10))
    assert hint in refused.value.hint
    assert type(refused.value) is kind
    assert refused.value.code == 1
    assert count(faulty.trace, "PUT", "node1/") == 1


def test_only_an_object_that_was_asked_for_is_missing(weak: Store, faulty: FaultProxy) -> None:
    """An ingress answers 404 to anything."""
    page = Respond(404, b"404 page not found", {"Content-Type": "text/plain"})
    faulty.on("", "", page, count=None)
    assert weak.head(KEY) is None
    with pytest.raises(Missing):
        read(weak, KEY)
    for ask in (lambda: keys(weak), lambda: put(weak, KEY), lambda: [*weak.prefixes("")]):
        with pytest.raises(Denied, match=r"404.*--endpoint-url"):
            ask()


def test_without_the_right_to_delete_it_stays_and_is_said(weak: Store, faulty: FaultProxy, moto: Bucket) -> None:
    faulty.on("DELETE", "first", s3_error(403, "AccessDenied"))
    with pytest.raises(Denied, match="AccessDenied"):
        weak.delete("first")
    assert moto.keys() == ["first"]


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_a_bucket_that_does_not_exist_is_named_with_what_to_do(
    kind: str, request: pytest.FixtureRequest, opened: Opener
) -> None:
    bucket = copy.copy(request.getfixturevalue(kind))
    bucket.bucket = "no-such-place"
    store = opened(bucket)
    for ask in (lambda: put(store, KEY), lambda: keys(store), lambda: read(store, KEY)):
        with pytest.raises(Denied, match=r"NoSuchBucket.*BUCKET_NAME"):
            ask()


def test_a_bucket_in_another_region_is_named_with_its_region(weak: Store, faulty: FaultProxy) -> None:
    error = b"<Error><Code>PermanentRedirect</Code><Message>Go there.</Message></Error>"
    faulty.on("", "node1/", Respond(301, error, {"x-amz-bucket-region": "eu-west-9"}), count=None)
    for ask in (lambda: put(weak, KEY), lambda: read(weak, KEY)):
        with pytest.raises(Denied, match=r"eu-west-9.*set REGION"):
            ask()


@pytest.mark.parametrize("kind", ["GLACIER", "DEEP_ARCHIVE", "STANDARD_IA", "GLACIER_IR"])
def test_what_must_be_thawed_is_archived_until_it_is_thawed(moto: S3Bucket, opened: Opener, kind: str) -> None:
    store, archived = opened(moto), kind if kind in ("GLACIER", "DEEP_ARCHIVE") else ""
    moto.client.put_object(Bucket=moto.bucket, Key=KEY, Body=BODY, StorageClass=kind)
    assert [info.archived for info in (store.head(KEY), *store.list("")) if info] == [archived, archived]
    if archived:
        with pytest.raises(Denied, match="thaw it"):
            read(store, KEY)
        moto.client.restore_object(Bucket=moto.bucket, Key=KEY, RestoreRequest={"Days": 1})
        found = store.head(KEY)
        assert found is not None
        assert found.archived == ""
    assert read(store, KEY) == BODY


# ------------------------------------------------------------------------------------------------------------
# Servers that only resemble S3


class Without(Action):
    """Refuses requests that have a header, as a server that does not know it."""

    def __init__(
        self, header: str, status: int, message: str = "A header you provided implies what is not there"
    ) -> None:
        self.header = re.compile(header, re.IGNORECASE)
        self.answer = s3_error(status, "NotImplemented" if status == 501 else "InvalidArgument", message)

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        if any(self.header.match(name) for name, _ in exchange.head.headers):
            self.answer.reach(stage, exchange)


class Absolute(Action):
    """Does what an HTTP proxy does with the whole URL of a request."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        assert exchange.head.get("proxy-authorization")
        exchange.head.start = exchange.head.start.replace(self.origin, "")


QUIRKS = {
    "condition": Without("if-none-match", 501),
    "condition-400": Without("if-none-match", 400, "If-None-Match is not supported"),
    "checksum": Without("x-amz-(checksum-crc|sdk-checksum)", 501, "x-amz-checksum-crc32"),
    "checksum-400": Without("x-amz-(checksum-crc|sdk-checksum)", 400, "Unsupported header x-amz-checksum-crc32"),
    "both": Without("if-none-match|x-amz-(checksum-crc|sdk-checksum)", 501),
}


@pytest.mark.parametrize("quirk", QUIRKS)
@pytest.mark.parametrize("size", [20, LARGE])
def test_a_header_that_the_server_does_not_know_is_left_out(
    moto: Bucket, faulty: FaultProxy, opened: Opener, caplog: pytest.LogCaptureFixture, quirk: str, size: int
) -> None:
    faulty.on("", "", QUIRKS[quirk], count=None)
    store = opened(moto, faulty.url, fresh=True)
    bodies = {f"{KEY}{number}": noise(size, number) for number in (1, 2)}
    for key, body in bodies.items():
        assert put(store, key, body).crc32 == crc(body)
    for body in (BODY, noise(LARGE)):
        with pytest.raises(Conflict):
            put(store, KEY + "1", body)
    store.delete("none")
    assert moto.objects() == bodies
    if size == 20:
        assert caplog.text.count("refuses a header") == (2 if quirk == "both" else 1)


@pytest.mark.parametrize("quirk", ["condition", "checksum"])
def test_of_two_puts_that_are_refused_at_once_neither_blames_another_header(
    moto: Bucket, faulty: FaultProxy, opened: Opener, caplog: pytest.LogCaptureFixture, quirk: str
) -> None:
    """Also where the bucket's own name reads like a header."""
    store = opened(moto, faulty.url, prefix="checksums", fresh=True)
    both, first = threading.Barrier(2), {"a", "b"}

    class Together(Action):
        def reach(self, stage: Stage, exchange: Exchange) -> None:
            name = exchange.head.start.split()[1][-1]
            if name in first:
                first.remove(name)
                both.wait(60.0)
            QUIRKS[quirk].reach(stage, exchange)

    faulty.on("PUT", "", Together(), count=None)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: put(store, name), "ab"))
    put(store, "c")
    assert (store._checks, store._refuses) == (quirk == "condition", quirk == "checksum")  # type: ignore[attr-defined]
    assert set(moto.objects()) == {f"checksums/{name}" for name in "abc"}


def test_p1_a_server_that_no_longer_checks_a_crc32_is_sent_an_md5(
    moto: Bucket, faulty: FaultProxy, opened: Opener
) -> None:
    """P1 Listed means restorable: behind one address there may be servers of two kinds."""
    store = opened(moto, faulty.url, fresh=True)
    put(store, "first")
    assert sent(faulty, "PUT", "first").headers["content-md5"], "nobody knows yet what the server checks"
    faulty.on("PUT", KEY + "1", Respond(200, b"", {"ETag": '"x"'}))
    put(store, KEY + "1")
    put(store, KEY + "2")
    assert sent(faulty, "PUT", KEY + "2").headers["content-md5"]


def test_a_refused_option_is_not_taken_for_a_header(faulty: FaultProxy, moto: Bucket, opened: Opener) -> None:
    """501 may be for --sse as well: it is named, and the next put asks with everything again."""
    faulty.on("PUT", "", Without("x-amz-server-side-encryption", 501), count=None)
    with pytest.raises(Denied, match="--sse aws:kms"):
        put(opened(moto, faulty.url, sse="aws:kms", fresh=True), KEY)
    assert moto.objects() == {}


@pytest.mark.parametrize("size", [20, LARGE])
def test_an_option_that_is_accepted_and_not_done_is_named(rclone: Bucket, opened: Opener, size: int) -> None:
    store = opened(rclone, sse="AES256", fresh=True)
    for _ in range(2):  # not even when what was refused is there already, or begun
        with pytest.raises(Denied, match="--sse AES256"):
            put(store, KEY, noise(size))
    assert opened(rclone).abandon_uploads(time.time() + 999) == 0


def test_an_upload_that_was_begun_without_sse_does_not_count(moto: Bucket, faulty: FaultProxy, opened: Opener) -> None:
    refuse_part(faulty, 3)
    with pytest.raises(Denied):
        put(opened(moto, faulty.url, fresh=True), KEY, noise(LARGE))
    faulty.heal()
    with pytest.raises(Conflict, match="without --sse"):
        put(opened(moto, faulty.url, fresh=True, sse="aws:kms"), KEY, noise(LARGE))


def test_an_object_that_is_not_encrypted_as_ours_are_is_not_ours(moto: Bucket, opened: Opener) -> None:
    body = noise(20)
    info = put(opened(moto), KEY, body)
    assert opened(moto).holds(info, Body(body), info.crc32)
    assert not opened(moto, sse="aws:kms").holds(info, Body(body), info.crc32)


def test_a_server_that_overwrites_is_found_out_and_said_once(
    rclone: Bucket, opened: Opener, proxy: Proxied, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = proxy(rclone)
    store = opened(rclone, faulty.url, fresh=True)
    faulty.on("PUT", "", Drop("before"), nth=2)  # a fault at the probe decides nothing
    put(store, KEY)
    for number in range(3):
        put(store, f"{KEY}{number}")
    assert caplog.text.count("overwrites") == 1
    with pytest.raises(Conflict):
        put(store, KEY, BODY[::-1])


def test_a_server_that_refuses_is_asked_no_more_than_once_for_each_object(faulty: FaultProxy, weak: Store) -> None:
    for number in range(5):
        put(weak, f"{KEY}{number}")
    assert count(faulty.trace) == 5


def listing(*items: str, more: str = "") -> Respond:
    contents = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in items)
    return Respond(200, XML + f"<ListBucketResult><Name>b</Name>{more}{contents}</ListBucketResult>".encode())


ENDLESS = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"


@pytest.mark.parametrize(
    "odd",
    [
        "<Size>many</Size>",
        "<LastModified>2026-01-01T00:00:00Z</LastModified>",
        "<Size>1</Size><LastModified>yesterday</LastModified>",
    ],
)
def test_a_list_that_cannot_be_read_is_no_traceback(weak: Store, faulty: FaultProxy, odd: str) -> None:
    answer = f"<ListBucketResult><Name>b</Name><Contents><Key>a</Key>{odd}</Contents></ListBucketResult>"
    faulty.on("GET", "list-type", Respond(200, XML + answer.encode()))
    with pytest.raises(Unreachable, match="cannot be read"):
        keys(weak)


@pytest.mark.parametrize("status", [200, 203])
@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html><meta charset=utf-8>&nbsp;<br>",
        b"<html><body>Sign in</body></html>",
        b"<ListPartsResult><Bucket>b</Bucket><Key>k</Key></ListPartsResult>",  # a reply to another question
        b'<?xml version="1.0" encoding="x-nobodys"?><ListBucketResult><Name>b</Name></ListBucketResult>',
    ],
)
def test_a_page_that_is_no_list_of_objects_is_no_empty_list(
    weak: Store, faulty: FaultProxy, status: int, page: bytes
) -> None:
    faulty.on("GET", "list-type", Respond(status, page), count=None)
    for ask in (lambda: keys(weak), lambda: weak.prefixes("")):
        with pytest.raises(Unreachable):
            ask()


def test_a_list_that_is_cut_short_or_out_of_order_is_no_list(weak: Store, faulty: FaultProxy) -> None:
    for answer, trait in (
        (listing("a", "b", more="<IsTruncated>true</IsTruncated>"), "ListObjectsV2"),
        (listing("a", "c", "b"), "out of order"),
        (listing("a", "a"), "out of order"),
    ):
        faulty.on("GET", "list-type", answer)
        with pytest.raises(Denied, match=trait):
            keys(weak)
        faulty.heal()
    faulty.on("GET", "list-type", listing(more=ENDLESS), count=None)
    for ask in (lambda: keys(weak), lambda: weak.prefixes("")):
        with pytest.raises(Denied, match="ListObjectsV2"):
            ask()
    faulty.heal()
    faulty.on("GET", "list-type", listing("a", "b"))
    assert [(info.key, info.etag) for info in weak.list("")] == [("a", ""), ("b", "")]  # an absent ETag is none


def test_a_server_that_lists_no_uploads_is_used_all_the_same(
    weak: Store, faulty: FaultProxy, moto: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    faulty.on("GET", "uploads=", s3_error(501, "NotImplemented"), count=None)
    put(weak, KEY, noise(LARGE))
    assert weak.abandon_uploads(time.time() + 9) == 0
    assert weak.abandon_uploads(time.time() + 9) == 0
    assert caplog.text.count("lists no uploads") == 1
    assert moto.get(KEY) == noise(LARGE)


def test_a_server_that_ignores_range_is_named(weak: Store, faulty: FaultProxy) -> None:
    faulty.on("GET", "node1/", Respond(200, b"all of it"))
    with pytest.raises(Denied, match="Range"):
        read(weak, KEY, 3)


@pytest.mark.parametrize("page", [b"<html>default backend - 404</html>", b""])
def test_an_ingress_that_has_no_way_to_the_store_deletes_nothing_p8(
    weak: Store, faulty: FaultProxy, page: bytes
) -> None:
    faulty.on("DELETE", "first", Respond(404, page))
    with pytest.raises(Denied, match="404"):
        weak.delete("first")
    faulty.on("DELETE", "first", s3_error(404, "NoSuchKey"))
    weak.delete("first")  # as some servers say where S3 says 204


def test_a_portals_page_is_no_deletion(weak: Store, faulty: FaultProxy) -> None:
    faulty.on("DELETE", "first", BURSTS["portal"])
    with pytest.raises(Unreachable, match="is there a proxy or a portal between"):
        weak.delete("first")


# ------------------------------------------------------------------------------------------------------------
# Google Cloud Storage


def google_error(message: str, status: int = 404) -> Respond:
    body = json.dumps({"error": {"code": status, "message": message, "errors": [{"reason": "?"}]}})
    return Respond(status, body.encode(), {"Content-Type": "application/json"})


def test_gcs_tells_an_absent_object_from_an_absent_bucket(gcs: Bucket, proxy: Proxied, opened: Opener) -> None:
    """In Google's words, which the emulator has not; and a bucket may well be called my-bucket."""
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url)
    faulty.on("GET", r"Data\.db", google_error(f"No such object: my-bucket/{KEY}"), count=None)
    assert store.head(KEY) is None
    with pytest.raises(Missing):
        read(store, KEY)
    faulty.heal()
    faulty.on("", "", google_error("The specified bucket does not exist."), count=None)
    for ask in (lambda: keys(store), lambda: read(store, KEY), lambda: store._put_body(KEY, BODY)):  # type: ignore[attr-defined]
        with pytest.raises(Denied, match="does not exist"):
            ask()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"status": "ok"}'])
def test_json_that_is_no_answer_to_a_question_of_ours_is_neither_an_empty_bucket_nor_a_traceback(
    gcs: Bucket, proxy: Proxied, opened: Opener, body: bytes
) -> None:
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url)
    faulty.on("GET", "", Respond(200, body), count=None)
    for ask in (lambda: keys(store), lambda: store.prefixes(""), lambda: store.head(KEY)):
        with pytest.raises(Unreachable, match="a proxy or a portal between"):
            ask()


def test_googles_client_asks_for_nothing_by_itself(gcs: Bucket, proxy: Proxied, opened: Opener) -> None:
    """A node may have no right to read the bucket's settings, and who waits for them is one thread more."""
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url)
    assert store.head(KEY) is None
    for thread in threading.enumerate():
        if "_fetch_background" in thread.name:
            thread.join()
    assert [event.path for event in faulty.trace if "/o/" not in event.path] == []


def test_gcs_tells_who_may_not_delete_in_words_of_its_own_that_a_key_is_taken(
    gcs: Bucket, proxy: Proxied, opened: Opener
) -> None:
    """To write to a taken key is to overwrite it, which needs the right to delete; a daemon should not have it."""
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url)
    why = "sa does not have storage.objects.delete access to the Google Cloud Storage object."
    faulty.on("POST", "", google_error(why, 403), nth=2, count=None)
    faulty.on("DELETE", "", google_error(why, 403))
    put(store, KEY)  # sent twice at first, to learn whether the server overwrites
    with pytest.raises(Conflict):
        put(store, KEY)
    with pytest.raises(Conflict, match=r"storage\.objects\.delete"):
        store.delete(KEY)


def test_gcs_tells_whose_bytes_a_large_object_has_without_a_download(
    gcs: Bucket, proxy: Proxied, opened: Opener
) -> None:
    """Its CRC-32 is known when a session ends, too late to be kept with it; GCS knows the CRC-32C of everything."""
    faulty, body = proxy(gcs), noise(LARGE)
    store = opened(gcs, faulty.url)
    put(store, KEY, body)
    put(store, KEY + "2", BODY)
    for key, ours in ((KEY, body), (KEY + "2", BODY)):
        found = store.head(key)
        assert found is not None
        assert store.holds(found, Body(ours), crc(ours))
        assert not store.holds(found, Body(ours[::-1]), crc(ours[::-1]))
    assert not [event for event in faulty.trace if event.query.get("alt") == "media"]


@pytest.mark.parametrize("size", [128 << 10, LARGE])
def test_conditions_classes_and_keys_arrive_at_gcs(gcs: Bucket, proxy: Proxied, opened: Opener, size: int) -> None:
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url, storage_class="NEARLINE", kms_key="projects/p/k")
    put(store, KEY, noise(size))
    post = sent(faulty, "POST", "upload")
    assert b"NEARLINE" in post.body
    assert post.query["kmsKeyName"] == "projects/p/k"
    assert post.query["ifGenerationMatch"] == "0"


# ------------------------------------------------------------------------------------------------------------
# TLS

YESTERDAY = datetime.now(timezone.utc) - timedelta(days=1)
DISTRUST: dict[str, dict[str, Any]] = {
    "without": {},
    "wrong": {},
    "another": {"name": "storage.example"},
    "expired": {"not_before": YESTERDAY - timedelta(days=9), "not_after": YESTERDAY},
}


@pytest.mark.parametrize("kind", ["moto", "gcs"])
@pytest.mark.parametrize("why", DISTRUST)
def test_a_certificate_that_is_not_trusted_is_named_with_its_cure(
    kind: str, why: str, request: pytest.FixtureRequest, secured: Secured, authority: Authority, stranger: Authority,
    opened: Opener,
) -> None:  # fmt: skip
    bucket = request.getfixturevalue(kind)
    between = secured(bucket, **DISTRUST[why])
    file = {"without": "", "wrong": str(stranger.file)}.get(why, str(authority.file))
    store = opened(bucket, between.url, ca_file=file)
    for ask in (lambda: keys(store), lambda: read(store, KEY)):
        with pytest.raises(Denied, match=r"not trusted.*--ca-file") as refused:
            ask()
        assert str(refused.value).count("_ssl.c") <= 1  # the reason is told once
    assert between.trace == []


def test_a_certificate_that_stands_between_us_and_our_credentials_is_named_once(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They may come from a server, too: STS, single sign-on, a container's agent."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    why = "SSL validation failed for https://sts.example certificate verify failed: self-signed certificate"
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(f"[default]\ncredential_process = sh -c 'echo {why} >&2; exit 1'\n")
    store = open_store("s3://bucket", StoreOptions(region="us-east-1", endpoint_url="http://127.0.0.1:1"))
    for ask in (lambda: keys(store), lambda: read(store, KEY)):
        with pytest.raises(Denied, match=r"not trusted.*sts\.example.*--ca-file") as refused:
            ask()
        assert str(refused.value).count("verify failed") == 1
        assert "no credentials" not in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "variable"), [("moto", "AWS_CA_BUNDLE"), ("moto", "REQUESTS_CA_BUNDLE"), ("gcs", "REQUESTS_CA_BUNDLE")]
)
def test_what_the_environment_trusts_is_trusted_but_ca_file_wins(
    kind: str, variable: str, request: pytest.FixtureRequest, secured: Secured, authority: Authority,
    stranger: Authority, opened: Opener, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bucket = request.getfixturevalue(kind)
    between = secured(bucket)
    monkeypatch.setenv(variable, str(authority.file))
    put(opened(bucket, between.url), KEY)
    with pytest.raises(Denied, match="not trusted"):
        keys(opened(bucket, between.url, ca_file=str(stranger.file)))
    monkeypatch.setenv(variable, str(stranger.file))
    right = opened(bucket, between.url, ca_file=str(authority.file))
    assert read(right, KEY) == BODY
    put(right, KEY + "2", noise(LARGE))
    assert bucket.keys() == [KEY, KEY + "2"]


@pytest.mark.parametrize("kind", ["moto", "gcs"])
@pytest.mark.parametrize("named", ["--ca-file", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("what", ["absent", "a directory", "a key", "empty"])
def test_certificates_that_are_not_there_are_wrong_usage(
    kind: str, named: str, what: str, request: pytest.FixtureRequest, tmp_path: Path, opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bucket, file = request.getfixturevalue(kind), tmp_path / "ca.pem"
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    if what == "a directory":
        file.mkdir()
    elif what != "absent":
        file.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n" * (what == "a key"))
    if named == "REQUESTS_CA_BUNDLE":
        monkeypatch.setenv(named, str(file))
    with pytest.raises(Usage, match=f"{named}.*PEM") as refused:
        opened(bucket, "https://127.0.0.1:1", fresh=True, ca_file=str(file) if named == "--ca-file" else "")
    assert refused.value.code == 2
    assert str(file) in refused.value.what


def test_p1_what_is_sent_over_tls_has_the_checksum_by_which_a_server_refuses_it(
    moto: Bucket, secured: Secured, authority: Authority, opened: Opener
) -> None:
    """P1 Listed means restorable: nothing else watches where TLS has ended."""
    faulty = secured(moto)
    store = opened(moto, faulty.url, ca_file=str(authority.file))
    put(store, "first")
    put(store, KEY, noise(LARGE))
    puts = [event for event in faulty.trace if event.method == "PUT"]
    assert len(puts) == 5
    for event in puts:
        assert event.headers["x-amz-checksum-crc32"] == base64.b64encode(event.crc32.to_bytes(4, "big")).decode()
        assert event.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"


@pytest.mark.parametrize("kind", ["moto", "gcs"])
@pytest.mark.parametrize("wrong", ["http", "https"])
def test_a_wrong_scheme_is_named(
    kind: str, wrong: str, request: pytest.FixtureRequest, secured: Secured, opened: Opener
) -> None:
    bucket = request.getfixturevalue(kind)
    url = secured(bucket).url.replace("https", "http") if wrong == "http" else bucket.url.replace("http", "https")
    if wrong == "http":  # a Python server hangs up; others send what is here: a TLS alert
        url = serve(b"\x15\x03\x03\x00\x02\x02\x46")
    store = opened(bucket, url)
    for ask in (lambda: keys(store), lambda: read(store, KEY)):
        with pytest.raises(Denied, match="scheme looks wrong"):
            ask()


# ------------------------------------------------------------------------------------------------------------
# Encryption, storage classes, what travels along


def sent(faulty: FaultProxy, method: str, path: str) -> Event:
    return next(event for event in faulty.trace if event.method == method and re.search(path, event.target))


KMS = "arn:aws:kms:us-east-1:1:key/k"
ENCRYPTED = {"sse": "aws:kms", "kms_key": KMS, "storage_class": "STANDARD_IA"}


def test_encryption_and_storage_class_arrive(moto: Bucket, faulty: FaultProxy, opened: Opener) -> None:
    store = opened(moto, faulty.url, **ENCRYPTED)
    put(store, KEY, noise(128 << 10))
    put(store, KEY + "2", noise(LARGE))
    for event in (sent(faulty, "PUT", KEY), sent(faulty, "POST", r"\?uploads")):
        assert event.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert event.headers["x-amz-server-side-encryption-aws-kms-key-id"] == KMS
        assert event.headers["x-amz-server-side-encryption-bucket-key-enabled"] == "true"
        assert event.headers["x-amz-storage-class"] == "STANDARD_IA"


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("node1/data/ks/t-1/snapshots/daily/manifest.json", 200 << 10),
        ("node1/data/ks/t-1/snapshots/daily/schema.cql@0badcafe", 200 << 10),
        ("node1.listings/ks/t-1/backups/20261121T202438.123456Z-complete-9999-99999999.json", 200 << 10),
        ("node1.pending-delete/20261121T202438.123456Z.json", 200 << 10),
        ("node1.doctor", 200 << 10),
        (KEY, (128 << 10) - 1),  # would be billed as if it were larger
    ],
)
def test_what_is_read_before_a_restore_gets_no_storage_class(
    moto: Bucket, faulty: FaultProxy, opened: Opener, key: str, size: int
) -> None:
    put(opened(moto, faulty.url, **ENCRYPTED), key, noise(size))
    headers = sent(faulty, "PUT", key).headers
    assert headers["x-amz-server-side-encryption"] == "aws:kms"
    assert "x-amz-storage-class" not in headers


def test_every_put_carries_its_checksum_and_its_condition(weak: Store, faulty: FaultProxy) -> None:
    put(weak, KEY)
    put(weak, KEY + "2", noise(LARGE))
    plain = sent(faulty, "PUT", KEY).headers
    assert plain["if-none-match"] == "*"
    assert plain["x-amz-checksum-crc32"]
    assert plain["x-amz-meta-crc32"] == crc(BODY)
    assert not [name for name in plain if "encryption" in name or "storage-class" in name or "md5" in name]
    assert sent(faulty, "PUT", "partNumber=2").headers["x-amz-checksum-crc32"]
    assert sent(faulty, "POST", r"\?uploads").headers["x-amz-checksum-type"] == "FULL_OBJECT"
    end = sent(faulty, "POST", "uploadId=").headers
    assert (end["if-none-match"], end["x-amz-checksum-type"]) == ("*", "FULL_OBJECT")
    assert base64.b64decode(end["x-amz-checksum-crc32"]).hex() == crc(noise(LARGE))


# ------------------------------------------------------------------------------------------------------------
# Patience and bandwidth


def test_the_pauses_grow_and_have_an_end() -> None:
    waits = [*itertools.islice(pauses(math.inf), 20)]
    assert all(
        0.5 * longest <= wait <= longest for wait, longest in zip(waits, [0.25 * 2**n for n in range(8)], strict=False)
    )
    assert max(waits) <= 60
    assert [*pauses(0.0)] == []
    assert 1 <= len([*pauses(0.3)]) < 1e6


def test_a_command_gives_up_when_its_patience_ends(weak: Store, faulty: FaultProxy, naps: list[float]) -> None:
    faulty.on("PUT", "node1/", s3_error(500, "InternalError"), count=None)
    with pytest.raises(Unreachable):
        put(Patient(weak, 0.0), KEY)
    assert naps == []
    assert count(faulty.trace, "PUT", "node1/") == 1


def test_retry_asks_again_for_what_may_pass_and_tells_of_each_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    fate: list[Fault | None] = [Unreachable("a"), Throttled("b"), None, Denied("c"), Conflict("d"), Corrupt("e")]
    told: list[str] = []

    async def attempt() -> str:
        fault = fate.pop(0)
        if fault:
            raise fault
        return "done"

    def run(patience: float) -> str:
        return run_with_patience(patience, attempt, lambda fault: told.append(str(fault)))

    assert run(math.inf) == "done"
    for kind in (Denied, Conflict, Corrupt):
        with pytest.raises(kind):
            run(math.inf)
    assert told == ["a", "b", "None", "c"]
    assert len(slept) == 2
    fate.append(Unreachable("f"))
    with pytest.raises(Unreachable):
        run(0.0)


def test_all_threads_share_one_rate() -> None:
    limit, threads = RateLimit(1_000_000.0), []
    began = time.monotonic()
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: [limit.take(5000) for _ in range(25)]))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert 0.95 <= time.monotonic() - began < 1.5
    assert RateLimit(0.0).take(1 << 40) is None


@pytest.mark.parametrize("kind", ["tmp_bucket", "moto", "gcs"])
def test_bytes_wait_for_their_turn_in_both_directions(
    kind: str, request: pytest.FixtureRequest, opened: Opener, naps: list[float]
) -> None:
    store = opened(request.getfixturevalue(kind), max_bandwidth=1024.0)
    for key, size in (("a", 1 << 20), ("b", LARGE)):
        put(store, key, noise(size))
    before = max(naps)
    assert before == pytest.approx(LARGE / 1024, rel=0.6)
    for _ in range(2):
        read(store, "a")
    assert max(naps) > before + 900
