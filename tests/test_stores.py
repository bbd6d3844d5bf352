"""One contract for every store, and what the way to it may do: through a proxy that breaks things on purpose."""

from __future__ import annotations

import base64
import contextlib
import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import COMMAND_TIMEOUT_S, Authority
from faultproxy import (
    LOST_ACK,
    SLOW_DOWN,
    XML,
    Action,
    BlackHole,
    Cut,
    Drop,
    Event,
    FaultProxy,
    Flip,
    Respond,
    assert_written_once,
    count,
    s3_error,
    writes,
)
from servers import Bucket, FileBucket, S3Bucket, Service

from cassbackup import (
    Access,
    Budget,
    Conflict,
    Denied,
    Distrusted,
    Fault,
    Head,
    Missing,
    Part,
    Retrying,
    Stopped,
    Store,
    Throttled,
    Unreachable,
    Usage,
    open_store,
)

KEY = "node1/var/lib/cassandra/data/ks/t-1/backups/nb-1-big-Data.db"
BODY = b"what Cassandra wrote"
PART = 5 << 20  # the smallest that S3 takes
Proxied = Callable[[Bucket], FaultProxy]
Secured = Callable[..., FaultProxy]


def crc(body: bytes) -> int:
    return zlib.crc32(body)


def noise(size: int, seed: int = 1) -> bytes:
    """Return bytes that look like nothing else."""
    return random.Random(seed).randbytes(size)


class Clock:
    """A wait that takes no time, and remembers how long it would have been."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.waits: list[float] = []
        self.stop_after = stop_after

    def __call__(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return self.stop_after is not None and len(self.waits) > self.stop_after


class Opener:
    """Opens a bucket as a command would, with its environment, perhaps through a proxy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.clock = Clock()

    known: ClassVar[dict[tuple[object, ...], Store]] = {}  # clients take long to make

    def __call__(
        self,
        bucket: Bucket,
        url: str = "",
        prefix: str = "",
        patience: float | None = 20.0,
        access: Access = Access(),  # noqa: B008 - frozen
    ) -> Retrying:
        for name, value in (bucket.through(url) if url else bucket.environ).items():
            self.monkeypatch.setenv(name, value)
        what = (bucket.url, url, bucket.target, prefix, access)
        if what not in self.known:
            self.known[what] = open_store(f"{bucket.target}/{prefix}" if prefix else bucket.target, access)
        return Retrying(self.known[what], self.clock, patience, Budget(0))


@pytest.fixture(scope="module", params=["file", "rclone", "moto", "gcs"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """Return a bucket for all tests of this module; they run once for each kind of store."""
    if request.param == "file":
        return FileBucket(tmp_path_factory.mktemp("store") / "bucket")
    return request.getfixturevalue(f"{request.param}_server").fresh()


@pytest.fixture
def bucket(place: Bucket, opened: Opener) -> Bucket:
    """Return the same bucket, empty."""
    place.empty()
    store = opened(place)
    if isinstance(place, FileBucket):  # folders of the test before
        shutil.rmtree(place.root)
        (place.root / ".unfinished").mkdir(parents=True)
    for key, upload, _ in store.unfinished(""):
        store.abandon(key, upload)
    return place


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opener:
    return Opener(monkeypatch)


@pytest.fixture
def store(bucket: Bucket, opened: Opener) -> Retrying:
    return opened(bucket)


def put(store: Retrying, key: str, body: bytes = BODY) -> Head:
    return store.put(key, body, crc(body))


def read(store: Retrying, key: str, start: int = 0) -> bytes:
    return b"".join(store.get(key, start))


def keys(store: Retrying, prefix: str = "", after: str = "") -> list[str]:
    return [head.key for head in store.list(prefix, after)]


def cut(body: bytes) -> list[bytes]:
    return [body[start : start + PART] for start in range(0, len(body), PART)]


def send_part(store: Retrying, key: str, upload: str, number: int, piece: bytes) -> Part:
    return store.put_part(key, upload, number, (number - 1) * PART, piece, crc(piece))


def send(store: Retrying, key: str, body: bytes) -> tuple[str, list[Part]]:
    """Upload the parts of an object, without the end."""
    upload = store.begin(key, len(body))
    return upload, [send_part(store, key, upload, number, piece) for number, piece in enumerate(cut(body), 1)]


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

    def test_what_is_put_is_there(self, store: Retrying, bucket: Bucket) -> None:
        head = put(store, KEY)
        assert (head.key, head.size, head.crc32) == (KEY, len(BODY), f"{crc(BODY):08x}")
        found = store.head(KEY)
        assert found is not None
        assert (found.key, found.size, found.etag) == (KEY, len(BODY), head.etag)
        assert found.crc32 in ("", head.crc32)
        assert read(store, KEY) == BODY
        assert bucket.objects() == {KEY: BODY}
        assert abs(found.modified - time.time()) < 300
        assert abs(store.now() - time.time()) < 300

    def test_an_empty_file_is_an_object_like_others(self, store: Retrying, bucket: Bucket) -> None:
        assert put(store, KEY, b"").size == 0
        assert read(store, KEY) == b""
        assert put(store, KEY, b"").size == 0
        found = store.head(KEY)
        assert found is not None
        assert found.size == 0
        assert bucket.objects() == {KEY: b""}
        with pytest.raises(Conflict):
            put(store, KEY, b"x")

    def test_every_key_that_we_make_is_taken_as_it_is(self, store: Retrying, bucket: Bucket) -> None:
        odd = [key for key in ODD_KEYS if not (bucket.scheme == "gs" and "?" in key)]  # the emulator's mediaLink
        for key in odd:
            put(store, key, key.encode())
        assert sorted(bucket.keys()) == sorted(odd)
        assert sorted(keys(store)) == sorted(odd)
        for key in odd:
            assert keys(store, key[:-1]) == [key]
            assert keys(store, key, key[:-1]) == [key]
            assert read(store, key) == key.encode()
            assert store.head(key) is not None
            assert store.delete([key]) == {}
        assert keys(store) == []

    def test_what_is_absent_is_missing(self, store: Retrying) -> None:
        put(store, KEY)
        for absent in ("node1/absent", KEY + "x", KEY + "/below", KEY[:-1]):
            assert store.head(absent) is None
            with pytest.raises(Missing):
                read(store, absent)

    def test_a_folder_is_no_object(self, store: Retrying) -> None:
        put(store, KEY)
        assert store.head("node1/var") is None
        with pytest.raises(Missing):
            read(store, "node1/var")

    def test_a_body_is_read_from_any_place_on(self, store: Retrying) -> None:
        body = noise((2 << 20) + 17)
        put(store, KEY, body)
        for start in (0, 1, 1 << 20, (1 << 20) + 1, len(body) - 1):
            assert read(store, KEY, start) == body[start:]

    def test_a_body_is_read_from_one_place_to_another(self, store: Retrying) -> None:
        body, end = noise((2 << 20) + 17), (2 << 20) + 17
        put(store, KEY, body)
        for start, until in [(0, 0), (0, 1), (7, 7), (5, 1 << 20), (1 << 20, (1 << 20) + 1), (3, end), (end - 1, end)]:
            assert b"".join(store.get(KEY, start, until)) == body[start:until], (start, until)
        assert b"".join(store.get(KEY, end - 2, end + 100)) == body[-2:]

    def test_beyond_the_end_of_a_body_there_is_nothing(self, store: Retrying) -> None:
        put(store, KEY)
        put(store, "node1/empty", b"")
        for key, start in [(KEY, len(BODY)), (KEY, len(BODY) + 9), ("node1/empty", 0), ("node1/empty", 1)]:
            assert read(store, key, start) == b""
            assert b"".join(store.get(key, start, start + 5)) == b""

    def test_folders_are_what_comes_next_and_has_something_below(self, store: Retrying) -> None:
        for key in ("n1/a/b", "n1/a/c/d", "n1.listings/k/t", "n1/file", "n10/x", "top", "n1/é %2F/x", "n1/.idx/x"):
            put(store, key)
        assert sorted(store.folders("")) == ["n1", "n1.listings", "n10"]
        assert sorted(store.folders("n1/")) == [".idx", "a", "é %2F"]
        assert list(store.folders("n1/a/")) == ["c"]
        assert list(store.folders("none/")) == list(store.folders("n1/a/c/")) == []
        store.delete(["n10/x", "n1/a/c/d"])
        assert sorted(store.folders("")) == ["n1", "n1.listings"]
        assert list(store.folders("n1/a/")) == []

    def test_nothing_is_cold_that_can_be_read(self, store: Retrying) -> None:
        put(store, KEY)
        assert [head.cold for head in (store.head(KEY), *store.list(""))] == ["", ""]

    def test_keys_are_listed_in_their_order(self, store: Retrying) -> None:
        wanted = ["node1/a", "node1/a-b", "node1/a/b", "node1/a/b/c", "node1/a0", "node1/b", "node10/a", "node1.l/x"]
        wanted = [key for key in wanted if key not in ("node1/a", "node1/a/b")]  # a file store has no file in a file
        for key in random.Random(3).sample(wanted, len(wanted)):
            put(store, key, key.encode())
        assert keys(store) == sorted(wanted)
        assert [head.size for head in store.list("")] == [len(key) for key in sorted(wanted)]
        for prefix in ("node1", "node1/", "node1/a", "node1/a/", "node1.", "none", "node1/a/b/c", "node1/a/b/cd"):
            assert keys(store, prefix) == [key for key in sorted(wanted) if key.startswith(prefix)], prefix

    def test_a_list_goes_on_after_any_key(self, store: Retrying) -> None:
        wanted = sorted(["n/a-b", "n/a/b", "n/a/c", "n/a0", "n/b/c/d", "n/c"])
        for key in wanted:
            put(store, key)
        for after in [*wanted, "n/a", "n/a/", "n/a/bb", "n/b", "n/b/", "m", "n/z"]:
            assert keys(store, "n/", after) == [key for key in wanted if key > after], after

    def test_what_is_deleted_is_gone_and_may_be_deleted_again(self, store: Retrying) -> None:
        for key in ("n/a", "n/b/c", "n/b/d"):
            put(store, key)
        assert store.delete(["n/a", "n/b/c", "n/absent"]) == {}
        assert store.delete(["n/a"]) == {}
        assert keys(store) == ["n/b/d"]
        assert store.delete([]) == {}

    def test_the_same_bytes_may_be_put_twice(self, store: Retrying, bucket: Bucket) -> None:
        first, second = put(store, KEY), put(store, KEY)
        assert (first.etag, first.crc32) == (second.etag, second.crc32)
        assert bucket.objects() == {KEY: BODY}

    def test_p3_other_bytes_are_refused_and_the_first_stay(self, store: Retrying, bucket: Bucket) -> None:
        """P3 Written once: also where the server ignores If-None-Match."""
        put(store, KEY)
        for other in (b"other bytes", BODY[::-1], b""):
            with pytest.raises(Conflict):
                put(store, KEY, other)
            with pytest.raises(Conflict):
                store.put_now(KEY, other, crc(other))
        assert bucket.objects() == {KEY: BODY}

    def test_p3_the_first_put_after_a_restart_overwrites_nothing(
        self, store: Retrying, opened: Opener, bucket: Bucket
    ) -> None:
        """P3 Written once: nobody knows yet whether the server would refuse."""
        put(store, KEY)
        with pytest.raises(Conflict):
            put(opened(bucket), KEY, BODY[::-1])
        assert bucket.objects() == {KEY: BODY}

    def test_p3_objects_of_others_are_compared_byte_by_byte(self, store: Retrying, bucket: Bucket) -> None:
        """P3 Written once, never size alone: what somebody else put has no checksum of ours."""
        put(store, "first")
        bucket.put(KEY, BODY)
        assert put(store, KEY).size == len(BODY)
        bucket.put(KEY + "2", BODY[::-1])
        with pytest.raises(Conflict):
            put(store, KEY + "2")
        assert bucket.get(KEY + "2") == BODY[::-1]

    def test_prefixes_of_one_bucket_know_nothing_of_each_other(self, opened: Opener, bucket: Bucket) -> None:
        one, other = opened(bucket, prefix="back ups/a"), opened(bucket, prefix="back ups/ab")
        put(one, "k", b"1")
        put(other, "k", b"2")
        assert (keys(one), keys(other)) == (["k"], ["k"])
        assert (read(one, "k"), read(other, "k")) == (b"1", b"2")
        assert bucket.keys() == ["back ups/a/k", "back ups/ab/k"]


class TestParts:
    """Uploads in parts, which a later process goes on with."""

    def test_parts_become_one_object(self, store: Retrying, bucket: Bucket) -> None:
        body = noise(2 * PART + 12345)
        upload, parts = send(store, KEY, body)
        assert store.head(KEY) is None or store.ordered  # a resumable session ends with its last part
        head = store.finish(KEY, upload, parts, crc(body))
        assert (head.size, head.crc32) == (len(body), f"{crc(body):08x}")
        assert bucket.objects() == {KEY: body}
        assert put(store, "other").size
        assert sorted(keys(store)) == sorted([KEY, "other"])

    def test_what_has_ended_may_be_ended_again(self, store: Retrying, bucket: Bucket) -> None:
        body = noise(PART + 1)
        upload, parts = send(store, KEY, body)
        first = store.finish(KEY, upload, parts, crc(body))
        second = store.finish(KEY, upload, parts, crc(body))
        assert (first.etag, first.size) == (second.etag, second.size)
        assert bucket.objects() == {KEY: body}

    def test_another_process_goes_on_where_the_first_died(
        self, store: Retrying, opened: Opener, bucket: Bucket
    ) -> None:
        body = noise(2 * PART + 99)
        pieces = cut(body)
        upload = store.begin(KEY, len(body))
        send_part(store, KEY, upload, 1, pieces[0])

        later = opened(bucket)
        held, sent = later.parts(KEY, upload, PART), []
        assert set(held) == {1}
        parts = []
        for number, piece in enumerate(pieces, 1):
            known = held.get(number)
            part = known and later.match(KEY, upload, known, (number - 1) * PART, piece, crc(piece))
            sent += [] if part else [number]
            parts.append(part or send_part(later, KEY, upload, number, piece))
        assert sent == [2, 3]
        assert later.finish(KEY, upload, parts, crc(body)).size == len(body)
        assert bucket.objects() == {KEY: body}

    def test_parts_of_other_bytes_are_not_taken_for_ours(self, store: Retrying) -> None:
        if store.ordered:
            pytest.skip("a resumable session is compared when it ends")
        body = noise(PART)
        upload = store.begin(KEY, 2 * PART)
        send_part(store, KEY, upload, 1, body)
        held = store.parts(KEY, upload, PART)[1]
        assert store.match(KEY, upload, held, 0, noise(PART, 2), crc(noise(PART, 2))) is None
        assert store.match(KEY, upload, held, 0, body, crc(body)) is not None

    def test_p1_parts_that_are_not_what_was_sent_do_not_become_stored(self, store: Retrying, bucket: Bucket) -> None:
        """P1 Listed means restorable: the whole is compared with what its parts should be."""
        if not store.ordered:
            pytest.skip("each part is compared by itself")
        body = noise(PART + 1)
        upload, parts = send(store, KEY, body)
        wrong = [Part(part.number, part.size, f"{int(part.token, 16) ^ 1:08x}", part.crc32) for part in parts]
        with pytest.raises(Conflict):
            store.finish(KEY, upload, wrong, crc(body) ^ 1)

    def test_an_upload_may_be_abandoned_at_any_time(self, store: Retrying, bucket: Bucket) -> None:
        upload = store.begin(KEY, 2 * PART)
        part = send_part(store, KEY, upload, 1, noise(PART))
        store.abandon(KEY, upload)
        store.abandon(KEY, upload)
        assert store.head(KEY) is None
        assert list(store.unfinished("")) == []
        with pytest.raises(Fault):
            store.finish(KEY, upload, [part], part.crc32)
        assert bucket.objects() == {}

    def test_what_was_begun_and_not_ended_is_found(self, store: Retrying) -> None:
        if store.ordered:
            pytest.skip("GCS has no list of sessions")
        assert list(store.unfinished("")) == []
        upload = store.begin(KEY, 2 * PART)
        send_part(store, KEY, upload, 1, noise(PART))
        [(key, found, begun)] = store.unfinished("")
        assert key == KEY or store.url.startswith("file:")
        assert found == upload
        assert begun < time.time() + 300  # moto begins all of them in 2010
        assert keys(store) == []

    def test_p3_an_upload_that_ends_at_a_taken_key_is_refused(self, store: Retrying, bucket: Bucket) -> None:
        """P3 Written once. (Where GCS's precondition is ignored, the uploader's look before it begins must do.)"""
        if store.ordered:
            pytest.skip("the emulator ignores ifGenerationMatch")
        body = noise(PART + 1)
        upload, parts = send(store, KEY, body)
        bucket.put(KEY, BODY)
        with pytest.raises(Conflict):
            store.finish(KEY, upload, parts, crc(body))
        assert bucket.get(KEY) == BODY


@pytest.mark.slow
def test_a_list_has_as_many_pages_as_it_takes(store: Retrying, bucket: Bucket) -> None:
    many = [f"n/{number:05d}" for number in range(50 if bucket.scheme == "gs" else 1003)]  # the emulator has one page
    if isinstance(bucket, FileBucket):
        for key in many:
            bucket.put(key, b"x")
    else:
        threads = [threading.Thread(target=lambda some=many[n::4]: [bucket.put(key, b"x") for key in some])
                   for n in range(4)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert keys(store, "n/") == many
    assert keys(store, "n/", many[-4]) == many[-3:]
    assert list(itertools.islice(keys(store, "n/", many[0]), 2)) == many[1:3]
    assert "n" in store.folders("")  # rclone keeps folders of which nothing is left
    assert store.delete(many) == {}
    assert keys(store) == []


@pytest.mark.slow
def test_folders_have_as_many_pages_as_it_takes(moto: Bucket, opened: Opener) -> None:
    many = [f"{number:04d}.listings" for number in range(1003)]
    for folder in many:
        moto.put(f"{folder}/owner.json", b"{}")
    assert list(opened(moto).folders("")) == many


@pytest.mark.parametrize("kind", ["GLACIER", "DEEP_ARCHIVE", "STANDARD_IA", "GLACIER_IR"])
def test_what_must_be_thawed_is_cold_until_it_is_thawed(moto: S3Bucket, opened: Opener, kind: str) -> None:
    store, cold = opened(moto), kind if kind in ("GLACIER", "DEEP_ARCHIVE") else ""
    moto.client.put_object(Bucket=moto.bucket, Key=KEY, Body=BODY, StorageClass=kind)
    assert [head.cold for head in (store.head(KEY), *store.list(""))] == [cold, cold]
    if cold:
        with pytest.raises(Denied, match="thaw it"):
            read(opened(moto, patience=1.0), KEY)
        moto.client.restore_object(Bucket=moto.bucket, Key=KEY, RestoreRequest={"Days": 1})
        assert store.head(KEY).cold == ""
    assert read(store, KEY) == BODY


# ------------------------------------------------------------------------------------------------------------
# file://


def test_a_directory_holds_nothing_but_objects_when_all_is_done(tmp_bucket: FileBucket, opened: Opener) -> None:
    store = opened(tmp_bucket)
    put(store, KEY)
    put(store, KEY)
    body = noise(PART + 1)
    upload, parts = send(store, KEY + "2", body)
    store.finish(KEY + "2", upload, parts, crc(body))
    files = [path for path in tmp_bucket.root.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_bucket.root)) for path in files) == [KEY, KEY + "2"]


@pytest.mark.parametrize("key", ["../x", "n/../../x", "/etc/x", "n//x", "n/./x", "", ".unfinished/x"])
def test_no_key_leads_out_of_the_directory(tmp_bucket: FileBucket, opened: Opener, key: str) -> None:
    store, outside = opened(tmp_bucket), tmp_bucket.root.parent / "x"
    with pytest.raises(Fault):
        put(store, key)
    outside.write_bytes(b"not yours")
    with pytest.raises(Missing):
        read(store, key)
    with contextlib.suppress(Missing):
        store.delete([key])
    assert outside.read_bytes() == b"not yours"


def test_p3_a_file_store_without_attributes_compares_bytes(opened: Opener, tmp_bucket: FileBucket) -> None:
    """P3 Written once, on a mount that takes no extended attributes: they are removed here."""
    store = opened(tmp_bucket)
    put(store, KEY)
    with contextlib.suppress(OSError):  # this disk may be without
        os.removexattr(tmp_bucket.root / KEY, "user.crc32")
    assert store.head(KEY).crc32 == ""
    assert put(store, KEY).crc32 == f"{crc(BODY):08x}"
    with pytest.raises(Conflict):
        put(opened(tmp_bucket), KEY, BODY[::-1])


def test_p1_a_file_store_does_not_vouch_for_what_was_written_to_since(opened: Opener, tmp_bucket: FileBucket) -> None:
    """P1 Listed means restorable: the checksum kept beside a file says nothing of bytes that came later."""
    store, path = opened(tmp_bucket), tmp_bucket.root / KEY
    put(store, KEY)
    stored = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == stored:  # the clock of files may tick every 10 ms only
        path.write_bytes(BODY[::-1])
    assert store.head(KEY).crc32 == ""
    with pytest.raises(Conflict):
        store.same(KEY, len(BODY), crc(BODY))


@pytest.mark.parametrize("url", ["file://relative", "ftp://x", "s3://", "bucket", "", "gs:///x"])
def test_a_url_of_no_known_kind_is_wrong_usage(url: str) -> None:
    with pytest.raises(Usage) as refused:
        open_store(url)
    assert refused.value.code == 2
    assert refused.value.hint


@pytest.mark.parametrize(("url", "sdk"), [("file:///tmp", ""), ("s3://b", "boto3"), ("gs://b", "google.cloud.storage")])
def test_no_sdk_is_imported_before_a_store_needs_it(url: str, sdk: str, tmp_path: Path) -> None:
    code = """
        import json, sys
        import cassbackup
        before = [name for name in ("boto3", "botocore", "google.cloud.storage", "requests") if name in sys.modules]
        cassbackup.open_store(sys.argv[1].replace("/tmp", sys.argv[2]), cassbackup.Access(region="us-east-1"))
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
# Faults


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
def weak(moto: Bucket, faulty: FaultProxy, opened: Opener) -> Retrying:
    """Return moto behind the proxy; its refusal to overwrite is known already."""
    store = opened(moto, faulty.url)
    put(store, "first")
    return store


BURSTS: dict[str, Action] = {
    "500": s3_error(500, "InternalError"),
    "502": Respond(502, b"<html>bad gateway</html>"),
    "503": SLOW_DOWN,
    "503-plain": Respond(503),
    "429": s3_error(429, "TooManyRequests"),
    "408": s3_error(408, "RequestTimeout"),
    "409": s3_error(409, "OperationAborted"),
    "400-timeout": s3_error(400, "RequestTimeout"),
    "reset": Drop("before"),
    "reset-late": Drop("sent"),
    "cut-request": Cut("request", 7),
    "lost-ack": LOST_ACK,
}


@pytest.mark.parametrize("burst", BURSTS)
def test_a_burst_of_faults_ends_in_one_object(weak: Retrying, faulty: FaultProxy, moto: Bucket, burst: str) -> None:
    faulty.on("", "node1/", BURSTS[burst], count=4)
    assert put(weak, KEY).size == len(BODY)
    assert moto.objects() == {"first": BODY, KEY: BODY}
    assert_written_once(faulty.trace)
    assert keys(weak) == ["first", KEY]
    assert weak.trouble == ""


@pytest.mark.parametrize("burst", ["500", "503", "429", "reset", "lost-ack"])
def test_a_burst_of_faults_in_an_upload_in_parts_ends_in_one_object(
    weak: Retrying, faulty: FaultProxy, moto: Bucket, burst: str
) -> None:
    body = noise(PART + 1)
    for method, path in (("POST", r"\?uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId=")):
        faulty.on(method, path, BURSTS[burst], count=2)
    upload, parts = send(weak, KEY, body)
    weak.finish(KEY, upload, parts, crc(body))
    assert moto.objects() == {"first": BODY, KEY: body}
    if burst != "lost-ack":  # then the same end is sent again
        assert [write.key for write in writes(faulty.trace)].count(KEY) == 1
    assert_written_once(faulty.trace)


@pytest.mark.parametrize("burst", ["500", "503", "reset", "cut"])
def test_a_list_and_a_body_go_on_where_they_broke_off(
    weak: Retrying, faulty: FaultProxy, moto: Bucket, burst: str
) -> None:
    body = noise((3 << 20) + 5)
    put(weak, KEY, body)
    action = Cut("reply", (1 << 20) + 77) if burst == "cut" else BURSTS[burst]
    faulty.on("GET", "node1/", action, count=2)
    assert read(weak, KEY) == body
    gets = [event for event in faulty.trace if event.method == "GET" and event.key == KEY]
    assert len(gets) == 3
    faulty.heal()
    faulty.on("GET", "list-type", Cut("reply", 100) if burst == "cut" else action, count=2)
    assert keys(weak) == ["first", KEY]


@pytest.mark.parametrize("kind", ["moto", "rclone", "gcs"])
def test_a_cut_download_goes_on_from_every_store(
    kind: str, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener
) -> None:
    bucket = request.getfixturevalue(kind)
    faulty, body = proxy(bucket), noise((6 << 20) + 5)
    store = opened(bucket, faulty.url)
    put(store, KEY, body)
    faulty.on("GET", r"Data\.db", Cut("reply", (1 << 20) + 77), nth=1, count=2)
    assert read(store, KEY) == body


@pytest.mark.parametrize("kind", ["moto", "rclone", "gcs"])
@pytest.mark.parametrize("burst", ["503-plain", "reset", "lost-ack"])
def test_every_store_survives_a_burst(
    kind: str, burst: str, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener
) -> None:
    bucket = request.getfixturevalue(kind)
    faulty, body = proxy(bucket), noise(PART + 1)
    store = opened(bucket, faulty.url)
    for method in ("PUT", "POST"):
        faulty.on(method, "Data", BURSTS[burst], count=2)
    put(store, KEY)
    faulty.heal()
    upload = store.begin(KEY + "2", len(body))
    faulty.on("PUT", "", BURSTS[burst], count=2)
    parts = [send_part(store, KEY + "2", upload, number, piece) for number, piece in enumerate(cut(body), 1)]
    faulty.heal()
    faulty.on("", "", BURSTS[burst], count=2)
    store.finish(KEY + "2", upload, parts, crc(body))
    assert bucket.objects() == {KEY: BODY, KEY + "2": body}
    assert_written_once(faulty.trace)


def test_p3_a_lost_reply_is_a_success_and_one_object(weak: Retrying, faulty: FaultProxy, moto: Bucket) -> None:
    """P3 Written once: the repeated put is answered 412 although it was ours; it is compared."""
    faulty.on("PUT", "node1/", LOST_ACK)
    head = put(weak, KEY)
    assert head.etag
    assert [write.key for write in writes(faulty.trace)].count(KEY) == 1
    assert moto.objects() == {"first": BODY, KEY: BODY}


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_p3_a_lost_reply_to_the_end_of_an_upload_is_a_success(
    kind: str, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener
) -> None:
    """P3 Written once: the second try hears 404 NoSuchUpload."""
    bucket = request.getfixturevalue(kind)
    faulty, body = proxy(bucket), noise(PART + 1)
    store = opened(bucket, faulty.url)
    upload, parts = send(store, KEY, body)
    faulty.on("POST", "uploadId=", LOST_ACK)
    assert store.finish(KEY, upload, parts, crc(body)).size == len(body)
    assert bucket.objects() == {KEY: body}
    assert_written_once(faulty.trace)


def accepted(call: Callable[[], object]) -> bool:
    """Tell whether something came out as Stored."""
    try:
        call()
    except Fault:
        return False
    return True


@pytest.mark.parametrize("kind", ["moto", "rclone", "gcs"])
def test_p1_a_byte_flipped_on_the_way_is_never_stored(
    kind: str, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener
) -> None:
    """P1 Listed means restorable: also where the server checks nothing and repeats what it was told."""
    bucket = request.getfixturevalue(kind)
    faulty, body = proxy(bucket), noise(100_000)
    store = opened(bucket, faulty.url)
    put(store, "first")
    for method in ("PUT", "POST"):
        faulty.on(method, r"Data\.db", Flip(50_000))
    if accepted(lambda: put(store, KEY, body)):
        assert bucket.objects()[KEY] == body


@pytest.mark.parametrize("kind", ["moto", "rclone", "gcs"])
def test_p1_a_byte_flipped_in_a_part_is_never_stored(
    kind: str, request: pytest.FixtureRequest, proxy: Proxied, opened: Opener
) -> None:
    """P1 Listed means restorable: S3 itself would check the part's checksum; its imitations do not."""
    bucket = request.getfixturevalue(kind)
    faulty, body = proxy(bucket), noise(PART + 70_000)
    store = opened(bucket, faulty.url)
    faulty.on("PUT", "", Flip(50_000))

    def upload() -> None:
        number, parts = send(store, KEY, body)
        store.finish(KEY, number, parts, crc(body))

    if accepted(upload):
        assert bucket.objects()[KEY] == body


# ------------------------------------------------------------------------------------------------------------
# TLS


@pytest.mark.parametrize("kind", ["moto", "rclone", "gcs"])
def test_p1_a_byte_flipped_behind_tls_is_never_stored(
    kind: str, request: pytest.FixtureRequest, secured: Secured, authority: Authority, opened: Opener
) -> None:
    """P1 Listed means restorable: where TLS has ended, only checksums watch, and not every server tells of them."""
    bucket = request.getfixturevalue(kind)
    faulty, body = secured(bucket), noise(PART + 70_000)
    store = opened(bucket, faulty.url, access=Access(ca_file=str(authority.file)))
    put(store, "first")
    for method in ("PUT", "POST"):
        faulty.on(method, "Small", Flip(50_000))
    if kind != "moto" and accepted(lambda: put(store, "Small", body)):  # moto swears to a put that it has not checked
        assert bucket.objects()["Small"] == body
    faulty.heal()
    faulty.on("PUT", "", Flip(50_000))

    def upload() -> None:
        number, parts = send(store, KEY, body)
        store.finish(KEY, number, parts, crc(body))

    if accepted(upload):
        assert bucket.objects()[KEY] == body
    assert count(faulty.trace, "PUT") > 1


def test_p1_an_echo_of_the_checksum_is_proof_over_tls_alone(
    moto: Bucket, proxy: Proxied, secured: Secured, authority: Authority, opened: Opener
) -> None:
    """P1 Listed means restorable: S3 itself refuses what is not as its checksum says; nobody between can alter it."""
    for between, proven in ((proxy(moto), False), (secured(moto), True)):
        store = opened(moto, between.url, access=Access(ca_file=str(authority.file)))
        put(store, f"first {proven}")
        between.on("PUT", "Data", Flip(5))
        assert accepted(lambda store=store, key=f"{KEY} {proven}": put(store, key)) is proven
        assert count(between.trace, "GET", "Data") == 0


def test_p1_what_is_sent_over_tls_has_the_checksum_by_which_a_server_refuses_it(
    moto: Bucket, secured: Secured, authority: Authority, opened: Opener
) -> None:
    """P1 Listed means restorable: a refusal is no loss, the same bytes are sent again."""
    faulty, body = secured(moto), noise(PART + 7)
    store = opened(moto, faulty.url, access=Access(ca_file=str(authority.file)))
    faulty.on("PUT", "", s3_error(400, "BadDigest"), nth=3, count=2)
    put(store, "first")
    upload, parts = send(store, KEY, body)
    store.finish(KEY, upload, parts, crc(body))
    sent = [event for event in faulty.trace if event.method == "PUT"]
    assert [event.status for event in sent].count(400) == 2
    for event in filter(lambda event: event.stored, sent):  # of the others nobody has read the body
        assert event.headers["x-amz-checksum-crc32"] == base64.b64encode(event.crc32.to_bytes(4, "big")).decode()
    assert moto.objects() == {"first": BODY, KEY: body}


YESTERDAY = datetime.now(timezone.utc) - timedelta(days=1)
DISTRUST = {
    "without": ({}, "issuer", "--ca-file; trusted now: the usual CAs"),
    "wrong": ({}, "issuer", "--ca-file; trusted now: .*stranger.pem"),
    "another": ({"name": "storage.example"}, "match", "--endpoint-url"),
    "expired": ({"not_before": YESTERDAY - timedelta(days=9), "not_after": YESTERDAY}, "expired", "set the clock"),
}


@pytest.mark.parametrize("kind", ["moto", "gcs"])
@pytest.mark.parametrize("why", DISTRUST)
def test_a_certificate_that_is_not_trusted_is_named_with_its_cure_before_long(
    kind: str, why: str, request: pytest.FixtureRequest, secured: Secured, authority: Authority, stranger: Authority,
    opened: Opener,
) -> None:  # fmt: skip
    more, reason, cure = DISTRUST[why]
    bucket = request.getfixturevalue(kind)
    between = secured(bucket, **more)
    file = {"without": "", "wrong": str(stranger.file)}.get(why, str(authority.file))
    opened.clock, began = Clock(stop_after=20), time.monotonic()
    store = opened(bucket, between.url, patience=120.0, access=Access(ca_file=file))
    with pytest.raises(Distrusted, match=f"certificate of 127.0.0.1.* is not trusted .*{reason}.*: .*{cure}"):
        keys(store)
    assert len(opened.clock.waits) < 8
    assert len(opened.clock.waits) > 1 or time.monotonic() - began > 4  # asked again, but for five seconds only
    assert "is not trusted" in store.trouble
    assert between.trace == []


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
    wrong = opened(bucket, between.url, access=Access(ca_file=str(stranger.file)))
    with pytest.raises(Distrusted, match=r"stranger\.pem"):
        keys(wrong)
    monkeypatch.setenv(variable, str(stranger.file))
    right = opened(bucket, between.url, access=Access(ca_file=str(authority.file)))
    assert read(right, KEY) == BODY
    upload, parts = send(right, KEY + "2", BODY)
    right.finish(KEY + "2", upload, parts, crc(BODY))
    assert bucket.keys() == [KEY, KEY + "2"]


@pytest.mark.parametrize("kind", ["moto", "gcs"])
@pytest.mark.parametrize("named", ["--ca-file", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("what", ["absent", "a directory", "a key", "empty"])
def test_certificates_that_are_not_there_are_wrong_usage(
    kind: str, named: str, what: str, request: pytest.FixtureRequest, tmp_path: Path, secured: Secured,
    opened: Opener, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if (named, what) == ("REQUESTS_CA_BUNDLE", "a directory"):
        pytest.skip("requests can use one")
    bucket, file = request.getfixturevalue(kind), tmp_path / "ca.pem"
    between = secured(bucket)
    if what == "a directory":
        file.mkdir()
    elif what != "absent":
        file.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n" * (what == "a key"))
    if named == "REQUESTS_CA_BUNDLE":
        monkeypatch.setenv(named, str(file))
    with pytest.raises(Usage, match=f"{named} {file} cannot be used .*PEM") as refused:
        opened(bucket, between.url, access=Access(ca_file=str(file) if named == "--ca-file" else ""))
    assert refused.value.code == 2
    assert between.trace == []


# ------------------------------------------------------------------------------------------------------------
# Answers that are none


NO_ANSWERS: dict[str, Respond] = {
    "error-in-200": Respond(200, XML + b"<Error><Code>InternalError</Code><Message>x</Message></Error>"),
    "portal": Respond(200, b"<html><body>Please log in</body></html>", {"Content-Type": "text/html"}),
    "nothing": Respond(200),
    "cut-xml": Respond(200, XML + b"<ListBucketResult><Name>b</Name><Contents><Key>x"),
}
REQUESTS = {
    "put": ("PUT", "node1/"),
    "head": ("HEAD", "node1/"),
    "list": ("GET", "list-type"),
    "begin": ("POST", r"\?uploads"),
    "part": ("PUT", "partNumber"),
    "finish": ("POST", "uploadId"),
}


@pytest.mark.parametrize("answer", NO_ANSWERS)
@pytest.mark.parametrize("what", ["head", "list", "begin", "part"])
def test_an_answer_that_is_none_is_asked_for_again(
    weak: Retrying, faulty: FaultProxy, moto: Bucket, what: str, answer: str
) -> None:
    """200 with an error inside, or a captive portal's page, says nothing: not even that a bucket is empty."""
    faulty.on(*REQUESTS[what], NO_ANSWERS[answer], count=2)
    if what == "head":
        assert weak.head(KEY) is None
    elif what == "list":
        assert keys(weak) == ["first"]
    else:
        upload, parts = send(weak, KEY, BODY)
        weak.finish(KEY, upload, parts, crc(BODY))
        assert moto.get(KEY) == BODY


@pytest.mark.parametrize("answer", NO_ANSWERS)
@pytest.mark.parametrize("what", ["put", "finish"])
def test_p1_an_answer_that_is_none_is_no_success(
    weak: Retrying, faulty: FaultProxy, moto: Bucket, what: str, answer: str
) -> None:
    """P1 Listed means restorable: nothing was stored, so either it is sent again or the caller hears of it."""
    upload, parts = send(weak, KEY, BODY)
    faulty.on(*REQUESTS[what], NO_ANSWERS[answer], count=2)

    def store_it() -> None:
        put(weak, KEY) if what == "put" else weak.finish(KEY, upload, parts, crc(BODY))

    if not accepted(store_it):
        assert moto.keys() == ["first"]
        faulty.heal()
        store_it()
    assert moto.get(KEY) == BODY


@pytest.mark.slow
def test_a_black_hole_is_given_up_and_others_go_on_meanwhile(
    faulty: FaultProxy, moto: Bucket, opened: Opener, weak: Retrying
) -> None:
    hasty = opened(moto, faulty.url, patience=0.0, access=Access(threads=1))
    hasty._store._client.meta.config.read_timeout = 1  # nobody wants to wait a minute here
    hasty._store._client._endpoint.http_session._timeout._read = 1
    hasty._refuses = True  # it need not look first, which may take a second too
    swallowed = faulty.on("PUT", "hole", BlackHole(), count=None)
    fate: list[BaseException] = []

    def fall() -> None:
        try:
            put(hasty, "hole")
        except Fault as fault:
            fate.append(fault)

    falling = threading.Thread(target=fall, daemon=True)
    falling.start()
    put(weak, KEY)
    falling.join(100)
    assert [type(fault) for fault in fate] == [Unreachable]
    assert swallowed.hits >= 1


@pytest.mark.parametrize("kind", ["moto", "gcs"])
def test_no_request_waits_for_ever(kind: str, request: pytest.FixtureRequest, opened: Opener) -> None:
    store = opened(request.getfixturevalue(kind))._store
    if kind == "moto":
        config = store._client.meta.config
        assert (config.connect_timeout, config.read_timeout) <= (10, 60)
        assert config.retries["total_max_attempts"] == 1
    else:
        assert store._CALL["timeout"] <= (10, 60)
        assert store._CALL["retry"] is None


# ------------------------------------------------------------------------------------------------------------
# No


@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_a_command_that_is_denied_says_whose_policy_to_look_at(
    weak: Retrying, faulty: FaultProxy, opened: Opener, method: str
) -> None:
    faulty.on(method, "node1/", s3_error(403, "AccessDenied"), count=None)
    calls = {"PUT": lambda: put(weak, KEY), "GET": lambda: read(weak, KEY), "HEAD": lambda: weak.head(KEY)}
    with pytest.raises(Denied, match="IAM policy") as denied:
        calls[method]()
    assert denied.value.code == 1
    assert count(faulty.trace, method, "node1/") == 1  # asking again would change nothing
    assert opened.clock.waits == []


def test_a_daemon_asks_again_once_a_minute_until_it_may(moto: Bucket, faulty: FaultProxy, opened: Opener) -> None:
    store = opened(moto, faulty.url, patience=None)
    faulty.on("PUT", "node1/", s3_error(403, "AccessDenied"), count=5)
    put(store, KEY)
    assert len(opened.clock.waits) == 5
    assert all(wait >= 30 for wait in opened.clock.waits)
    assert store.trouble == ""


def test_without_the_right_to_delete_all_stays_and_is_said(weak: Retrying, faulty: FaultProxy, moto: Bucket) -> None:
    faulty.on("POST", r"\?delete", s3_error(403, "AccessDenied"), count=None)
    why = weak.delete(["first", "second"])
    assert set(why) == {"first", "second"}
    assert all("AccessDenied" in reason for reason in why.values())
    assert moto.keys() == ["first"]


def test_a_delete_that_fails_for_some_is_told_for_those(weak: Retrying, faulty: FaultProxy) -> None:
    error = b"<Error><Key>a</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
    faulty.on("POST", r"\?delete", Respond(200, XML + b"<DeleteResult>" + error + b"</DeleteResult>"))
    assert weak.delete(["a", "first"]) == {"a": "AccessDenied: no"}


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_a_bucket_that_does_not_exist_is_named_with_what_to_do(
    kind: str, request: pytest.FixtureRequest, opened: Opener
) -> None:
    bucket = copy.copy(request.getfixturevalue(kind))
    bucket.bucket = "no-such-place"
    store = opened(bucket)
    for call in (lambda: put(store, KEY), lambda: keys(store)):
        with pytest.raises(Denied, match="does not exist") as refused:
            call()
        assert "BUCKET_NAME" in refused.value.hint
    assert opened.clock.waits == []


def google_error(message: str, status: int = 404) -> Respond:
    body = json.dumps({"error": {"code": status, "message": message, "errors": [{"reason": "?"}]}})
    return Respond(status, body.encode(), {"Content-Type": "application/json"})


def test_gcs_tells_an_absent_object_from_an_absent_bucket(gcs: Bucket, proxy: Proxied, opened: Opener) -> None:
    """In Google's words, which the emulator has not; and a bucket may well be called my-bucket."""
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url)
    faulty.on("GET", r"Data\.db", google_error(f"No such object: my-bucket/{KEY}"), count=None)
    with pytest.raises(Missing):
        read(store, KEY)
    faulty.heal()
    faulty.on("", "", google_error("The specified bucket does not exist."), count=None)
    for call in (lambda: put(store, KEY), lambda: keys(store)):
        with pytest.raises(Denied, match="does not exist"):
            call()


def test_gcs_tells_who_may_not_delete_in_words_of_its_own_that_a_key_is_taken(
    gcs: Bucket, proxy: Proxied, opened: Opener
) -> None:
    """To write to a taken key is to overwrite it, which needs the right to delete; a daemon should not have it."""
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url)
    why = "sa does not have storage.objects.delete access to the Google Cloud Storage object."
    taken = faulty.on("POST", "", google_error(why, 403), nth=2, count=None)
    faulty.on("DELETE", "", google_error(why, 403))
    put(store, KEY)  # sent twice at first, to learn whether the server overwrites
    assert taken.acted.wait(100)
    put(store, KEY)
    with pytest.raises(Conflict):
        put(store, KEY, b"others")
    assert "storage.objects.delete" in store.delete([KEY])[KEY]


def test_a_put_that_looked_first_and_failed_is_still_the_same_trouble(
    moto: Bucket, proxy: Proxied, opened: Opener
) -> None:
    """Who may look and not put fails for ever: since the first attempt, and named once in the log."""
    faulty, since = proxy(moto), list[float]()
    faulty.on("PUT", "node1/", s3_error(403, "AccessDenied"), count=None)
    known = opened(moto, faulty.url)._store

    def wait(seconds: float) -> bool:
        since.append(store.failing_since)
        return len(since) > 9

    store = Retrying(known, wait, None, Budget(0))
    with pytest.raises(Stopped):
        put(store, KEY)
    failing = [moment for moment in since if moment]
    assert len(failing) > 2
    assert len(set(failing)) == 1


@pytest.mark.parametrize("code", ["PermanentRedirect", "AuthorizationHeaderMalformed"])
def test_a_bucket_in_another_region_is_named_with_what_to_do(weak: Retrying, faulty: FaultProxy, code: str) -> None:
    faulty.on("PUT", "node1/", s3_error(301 if code.startswith("P") else 400, code), count=None)
    with pytest.raises(Denied, match="REGION"):
        put(weak, KEY)


def test_a_wrong_clock_is_named(weak: Retrying, faulty: FaultProxy) -> None:
    faulty.on("PUT", "node1/", s3_error(403, "RequestTimeTooSkewed"), count=None)
    with pytest.raises(Denied, match="clock"):
        put(weak, KEY)


def test_without_credentials_the_cure_is_named(
    moto: Bucket, opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened(moto)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Denied, match="AWS_ACCESS_KEY_ID"):
        put(Retrying(open_store(moto.target), Clock(), 20.0, Budget(0)), KEY)


def test_a_secret_is_in_no_message_and_in_no_picture_of_the_settings() -> None:
    access = Access(access_key="AKIACANARY", secret_key="canary-secret")
    assert "CANARY" not in repr(access).upper()


# ------------------------------------------------------------------------------------------------------------
# Patience


def test_the_waits_grow_and_have_an_end(weak: Retrying, faulty: FaultProxy, opened: Opener) -> None:
    faulty.on("PUT", "node1/", s3_error(500, "InternalError"), count=None)
    with pytest.raises(Unreachable):
        put(weak, KEY)
    waits = opened.clock.waits
    assert len(waits) >= 5
    assert all(0.5 * base <= wait <= base for wait, base in zip(waits, [0.25 * 2**n for n in range(99)], strict=False))
    assert weak.trouble


def test_whoever_is_stopped_while_waiting_stops(moto: Bucket, faulty: FaultProxy, opened: Opener) -> None:
    store = opened(moto, faulty.url, patience=None)
    opened.clock.stop_after = 3
    faulty.on("PUT", "node1/", s3_error(500, "InternalError"), count=None)
    with pytest.raises(Stopped):
        put(store, KEY)
    assert count(faulty.trace, "PUT", "node1/") == 4


@pytest.mark.parametrize("answer", [SLOW_DOWN, s3_error(429, "TooManyRequests"), s3_error(400, "ThrottlingException")])
def test_throttling_slows_the_whole_pool(weak: Retrying, faulty: FaultProxy, opened: Opener, answer: Respond) -> None:
    """KMS and S3 ask for less: then every thread waits, not only the one that heard it."""
    faulty.on("PUT", "throttled", answer, count=None)
    with pytest.raises(Throttled):
        put(weak, "throttled")
    before = len(opened.clock.waits)
    put(weak, KEY)  # another file, which nobody refused
    assert len(opened.clock.waits) == before + 1
    assert 0 < opened.clock.waits[-1] <= 20


def test_other_faults_slow_nobody_else(weak: Retrying, faulty: FaultProxy, opened: Opener) -> None:
    faulty.on("PUT", "broken", s3_error(500, "InternalError"), count=None)
    with pytest.raises(Unreachable):
        put(weak, "broken")
    before = len(opened.clock.waits)
    put(weak, KEY)
    assert len(opened.clock.waits) == before


def test_a_listing_is_put_in_one_attempt(weak: Retrying, faulty: FaultProxy) -> None:
    faulty.on("PUT", "node1/", s3_error(500, "InternalError"))
    with pytest.raises(Unreachable):
        weak.put_now(KEY, BODY, crc(BODY))
    assert count(faulty.trace, "PUT", "node1/") == 1


# ------------------------------------------------------------------------------------------------------------
# Bandwidth


def test_without_a_limit_nobody_waits() -> None:
    budget = Budget(0)
    assert [budget.delay(1 << 40) for _ in range(3)] == [0.0] * 3


def test_all_threads_share_one_budget() -> None:
    """Whatever the threads do, the last of n blocks may go when the n - 1 before it are paid for."""
    budget, size, turns, delays = Budget(1000.0), 500, 25, []

    def spend() -> None:
        delays.extend(budget.delay(size) for _ in range(turns))

    began = time.monotonic()
    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    paid = (8 * turns - 1) * size / 1000.0
    assert paid - took - 0.01 <= max(delays) <= paid + 0.01
    assert len({round(delay, 1) for delay in delays}) > 8 * turns // 2  # one after the other, not all at once


def test_bytes_wait_for_their_budget_before_they_are_sent(tmp_bucket: FileBucket) -> None:
    clock = Clock()
    store = Retrying(open_store(tmp_bucket.target), clock, 20.0, Budget(1 << 10))
    put(store, "a", bytes(1 << 20))
    put(store, "b", bytes(1 << 20))
    upload = store.begin("c", 1 << 20)
    store.put_part("c", upload, 1, 0, bytes(1 << 20), crc(bytes(1 << 20)))
    assert clock.waits == [pytest.approx(1024, abs=120), pytest.approx(2048, abs=120)]  # less what the puts took


# ------------------------------------------------------------------------------------------------------------
# Encryption and storage classes


def sent(faulty: FaultProxy, method: str, path: str) -> Event:
    return next(event for event in faulty.trace if event.method == method and path in event.target)


ENCRYPTED = Access(sse="aws:kms", kms_key="arn:aws:kms:us-east-1:1:key/k", storage_class="STANDARD_IA")


def test_encryption_and_storage_class_arrive(moto: Bucket, faulty: FaultProxy, opened: Opener) -> None:
    store = opened(moto, faulty.url, access=ENCRYPTED)
    put(store, KEY, noise(128 << 10))
    store.begin(KEY + "2", 2 * PART)
    for event in (sent(faulty, "PUT", KEY), sent(faulty, "POST", "?uploads")):
        assert event.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert event.headers["x-amz-server-side-encryption-aws-kms-key-id"] == ENCRYPTED.kms_key
        assert event.headers["x-amz-server-side-encryption-bucket-key-enabled"] == "true"
        assert event.headers["x-amz-storage-class"] == "STANDARD_IA"


@pytest.mark.parametrize(
    "key",
    [
        "node1/data/ks/t-1/snapshots/daily/manifest.json",
        "node1/data/ks/t-1/snapshots/daily/schema.cql@0badcafe",
        "node1.listings/ks/t-1/backups/20261121T202438.123456Z-rollup-9999-99999999.json",
        "node1.condemned/20261121T202438.123456Z.json",
        "node1.doctor",
    ],
)
def test_what_is_read_before_a_restore_gets_no_storage_class(
    moto: Bucket, faulty: FaultProxy, opened: Opener, key: str
) -> None:
    """A daemon must read its listings, and a manifest.json; in GLACIER it could not."""
    put(opened(moto, faulty.url, access=ENCRYPTED), key, noise(200 << 10))
    headers = sent(faulty, "PUT", key).headers
    assert headers["x-amz-server-side-encryption"] == "aws:kms"
    assert "x-amz-storage-class" not in headers


def test_what_would_be_billed_as_if_it_were_larger_gets_no_storage_class(
    moto: Bucket, faulty: FaultProxy, opened: Opener
) -> None:
    put(opened(moto, faulty.url, access=ENCRYPTED), KEY, noise((128 << 10) - 1))
    assert "x-amz-storage-class" not in sent(faulty, "PUT", KEY).headers


def test_a_storage_class_that_there_is_not_is_named_with_the_setting(
    moto: Bucket, proxy: Proxied, opened: Opener
) -> None:
    between = proxy(moto)
    between.on("PUT", "", s3_error(400, "InvalidStorageClass"), count=None)
    with pytest.raises(Denied, match="correct --storage-class"):
        put(opened(moto, between.url, access=Access(storage_class="GALCIER")), KEY, noise(200 << 10))


def test_without_settings_the_bucket_decides(weak: Retrying, faulty: FaultProxy) -> None:
    put(weak, KEY)
    assert not [name for name in sent(faulty, "PUT", KEY).headers if "encryption" in name or "storage-class" in name]


def test_every_put_carries_its_checksum_and_its_condition(weak: Retrying, faulty: FaultProxy) -> None:
    put(weak, KEY)
    body = noise(PART + 1)
    upload, parts = send(weak, KEY + "2", body)
    weak.finish(KEY + "2", upload, parts, crc(body))
    assert sent(faulty, "PUT", KEY).headers["if-none-match"] == "*"
    assert sent(faulty, "PUT", KEY).headers["x-amz-checksum-crc32"]
    assert sent(faulty, "PUT", "partNumber=2").headers["x-amz-checksum-crc32"]
    assert sent(faulty, "POST", "?uploads").headers["x-amz-checksum-type"] == "FULL_OBJECT"
    end = sent(faulty, "POST", "uploadId=").headers
    assert (end["if-none-match"], end["x-amz-checksum-type"]) == ("*", "FULL_OBJECT")
    assert end["x-amz-checksum-crc32"]


def test_a_storage_class_and_a_key_arrive_at_gcs(gcs: Bucket, proxy: Proxied, opened: Opener) -> None:
    faulty = proxy(gcs)
    store = opened(gcs, faulty.url, access=Access(storage_class="NEARLINE", kms_key="projects/p/k"))
    put(store, KEY, noise(128 << 10))
    store.begin(KEY + "2", 2 * PART)
    posts = [event for event in faulty.trace if event.method == "POST"]
    assert len(posts) >= 2
    for event in posts:
        assert b"NEARLINE" in event.body
        assert event.query["kmsKeyName"] == "projects/p/k"
        assert event.query["ifGenerationMatch"] == "0"


# ------------------------------------------------------------------------------------------------------------
# A server that overwrites


def test_a_server_that_overwrites_is_found_out_and_said_so(
    rclone: Bucket, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    put(opened(rclone), KEY)
    assert "ignores If-None-Match" in caplog.text
