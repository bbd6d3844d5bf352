"""The test kit itself: a tool that breaks and judges things has to be right before what it judges."""

from __future__ import annotations

import http.client
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import oracle
import pytest
from conftest import REPOSITORY, Daemon, Run
from faultproxy import (
    LOST_ACK,
    SLOW_DOWN,
    Action,
    BlackHole,
    Call,
    Cut,
    Drop,
    FaultProxy,
    Flip,
    assert_written_once,
    bytes_sent,
    count,
    joined,
    writes,
)
from faults.test_mutants import MUTANTS
from scene import wait_for
from servers import Bucket, FakeMetadata, FileBucket
from storm import HERE, Gust, Storm, compiled
from tree import Copy, History, Node, Unit, component_names

LIMIT_S = 100.0  # for what hangs

# ------------------------------------------------------------------------------------------------------------
# tree.py


def read(path: str | Path) -> Copy:
    return Copy.of(Path(path).read_bytes())


def test_an_sstable_has_a_toc_and_a_digest_that_are_true(node: Node) -> None:
    for components in (3, 8, 12):
        sstable = node.table("ks1", f"users{components}").flush(components=components)
        toc = sstable.path("TOC.txt").read_text().splitlines()
        assert set(toc) == set(sstable.components) == set(component_names("big", components))
        assert len(toc) == components
        digest = sstable.path("Digest.crc32").read_bytes()
        assert digest == str(zlib.crc32(sstable.path("Data.db").read_bytes())).encode()
        assert sstable.stem == "nb-1-big"


def test_a_flush_is_linked_into_backups_and_a_compaction_is_not(node: Node) -> None:
    table = node.table("ks1", "users", indexes=["by_name"])
    table.flush()
    table.flush()
    table.compact()
    (home,) = table.directories()
    assert len(list((home / "backups").glob("nb-[12]-big-*"))) == 16
    assert len(list((home / "backups/.by_name").glob("nb-[12]-big-*"))) == 16
    assert not list((home / "backups").rglob("nb-3-*"))
    assert {path.name for path in home.glob("nb-*-Data.db")} == {"nb-3-big-Data.db"}
    assert (home / "backups/nb-1-big-Data.db").stat().st_nlink == 1
    assert len(node.history[table.unit()]) == 32


def test_a_snapshot_is_links_a_manifest_and_a_schema(node: Node) -> None:
    table = node.table("ks1", "users", indexes=["by_name"])
    empty, system = node.table("ks1", "empty"), node.table("system", "local")
    table.flush()
    node.snapshot("daily")
    (tag,) = [folder / "snapshots/daily" for folder in table.directories()]
    manifest = json.loads((tag / "manifest.json").read_text())
    assert manifest["files"] == ["nb-1-big-Data.db", ".by_name/nb-1-big-Data.db"]
    assert manifest["ephemeral"] is False
    assert manifest["expires_at"] is None
    assert (tag / "nb-1-big-Data.db").samefile(table.sstables[0].path("Data.db"))
    assert f"{table.id[:8]}-" in (tag / "schema.cql").read_text()
    assert {Path(path).name for path in node.history[empty.unit("daily")]} == {"manifest.json", "schema.cql"}
    assert {Path(path).name for path in node.history[system.unit("daily")]} == {"manifest.json"}


def test_the_history_is_what_stands_on_disk_until_it_is_cleared(node: Node) -> None:
    for name in ("users", "events"):
        node.table("ks1", name, indexes=["by_name"]).flush()
    node.snapshot("daily")
    node.snapshot("weekly", tables=node.tables[:1])
    node.tables[1].drop()
    everything = [path for path in node.root.rglob("*") if {"snapshots", "backups"} & set(path.parts)]
    assert {path for _, path, _ in node.history.files()} == {str(path) for path in everything if path.is_file()}
    assert all(read(path) == copy for _, path, copy in node.history.files())
    node.clear("daily")
    assert not list(node.root.rglob("daily"))
    assert list(node.root.rglob("weekly"))


# ------------------------------------------------------------------------------------------------------------
# storm.py

programs = pytest.mark.parametrize("program", [compiled(HERE / "storm.c"), None], ids=["c", "python"])


@programs
def test_a_storm_makes_what_its_history_says(tmp_path: Path, program: Path | None) -> None:
    storm = Storm(tmp_path, tables=3, components=16, indexes=1, size=40, program=program)
    assert counts(storm.seed()) == (0, 72)
    assert counts(storm.snapshot("daily")) == (72, 6)
    assert counts(storm.backups()) == (72, 0)
    wave = storm.wave()
    assert counts(wave.backups(rate=100_000)) == (72, 0)
    assert len(list(storm.history.files())) == 72 + 6 + 72 + 72
    assert all(read(path) == copy for _, path, copy in storm.history.files())
    (digest,) = tmp_path.glob("storm/t00001-*/nb-2-big-Digest.crc32")
    assert digest.read_bytes() == str(zlib.crc32(digest.with_name("nb-2-big-Data.db").read_bytes())).encode()
    assert digest.with_name("nb-2-big-TOC.txt").read_text().split() == list(component_names("big", 8))


def counts(gust: Gust) -> tuple[int, int]:
    return gust.links, gust.files


@programs
def test_a_storm_clears_its_tag(tmp_path: Path, program: Path | None) -> None:
    storm = Storm(tmp_path, tables=3, components=8, program=program)
    storm.seed()
    storm.snapshot("after", clear_after_ms=10)
    storm.snapshot("each", clear_after_ms=1, each=True)
    storm.snapshot("stays")
    assert not [path for tag in ("after", "each") for path in tmp_path.rglob(tag)]
    assert len(list(tmp_path.rglob("stays"))) == 3
    storm.clear("stays", delay_ms=1)
    assert not list(tmp_path.rglob("stays"))


# ------------------------------------------------------------------------------------------------------------
# faultproxy.py


class Upstream(ThreadingHTTPServer):
    """A store of the simplest kind: PUT, GET, HEAD and DELETE of a path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UpstreamHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: dict[str, bytes] = {}

    def handle_error(self, *_: object) -> None:
        """Stay silent: the proxy hangs up on purpose."""


class UpstreamHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_PUT(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if len(body) < int(self.headers["Content-Length"]):
                return
        self.server.bodies[self.path] = body
        self.answer(200)

    def do_POST(self) -> None:
        self.do_PUT()

    def do_GET(self) -> None:
        if self.headers.get("If-None-Match"):
            self.answer(304)
        elif self.path in self.server.bodies:
            self.answer(200, self.server.bodies[self.path])
        else:
            self.answer(404, b"no")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.server.bodies.pop(self.path, None)
        self.answer(204)

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        if status not in {204, 304}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def faulty(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy(upstream.url) as proxy:
        yield proxy


Ask = Callable[..., tuple[int, bytes]]


@pytest.fixture
def ask(faulty: FaultProxy) -> Iterator[Ask]:
    """Return a function that sends one request over a connection that is kept alive."""
    connection = http.client.HTTPConnection(urlsplit(faulty.url).netloc, timeout=LIMIT_S)

    def request(method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, named)  # type: ignore[arg-type]
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise

    yield request
    connection.close()


GONE = (ConnectionError, http.client.HTTPException)


def test_the_proxy_passes_everything_on_and_traces_it(upstream: Upstream, faulty: FaultProxy, ask: Ask) -> None:
    assert ask("PUT", "/b/k", b"abc", x_amz_meta="1", Authorization="secret") == (200, b"")
    assert ask("GET", "/b/k") == (200, b"abc")
    assert ask("GET", "/b?list-type=2") == (404, b"no")
    assert ask("HEAD", "/b/k") == (200, b"")
    assert ask("GET", "/b/k", If_None_Match="*") == (304, b"")
    assert ask("DELETE", "/b/k") == (204, b"")
    assert ask("GET", "/b/k") == (404, b"no")
    assert [event.stored for event in faulty.trace] == [200, 200, 404, 200, 304, 204, 404]
    put = faulty.trace[0]
    assert (put.key, put.size, put.crc32, put.status) == ("k", 3, zlib.crc32(b"abc"), 200)
    assert put.sha1 == Copy.of(b"abc").sha1
    assert put.headers["x-amz-meta"] == "1"
    assert "authorization" not in put.headers
    assert [event.key for event in faulty.trace].count("") == count(faulty.trace, "GET", r"\?list") == 1


def test_the_proxy_understands_chunks(upstream: Upstream, faulty: FaultProxy, ask: Ask) -> None:
    assert ask("PUT", "/b/k", iter([b"ab" * 50_000, b"c"])) == (200, b"")
    assert upstream.bodies["/b/k"] == b"ab" * 50_000 + b"c"
    framed = b"3;chunk-signature=0\r\nabc\r\n1\r\nd\r\n0;chunk-signature=0\r\nx-amz-checksum-crc32:x\r\n\r\n"
    ask("PUT", "/b/framed", framed, Content_Encoding="aws-chunked")
    ask("PUT", "/b/twice", iter([framed[:7], framed[7:]]), Content_Encoding="aws-chunked")
    assert [(event.key, event.size) for event in faulty.trace] == [
        ("k", 100_001),
        ("framed", 4),
        ("twice", 4),
    ]
    assert {event.sha1 for event in faulty.trace[1:]} == {Copy.of(b"abcd").sha1}
    assert upstream.bodies["/b/framed"] == framed


def test_a_rule_counts_what_it_matches(faulty: FaultProxy, ask: Ask) -> None:
    rule = faulty.on("PUT", "k$", SLOW_DOWN, nth=2, count=2)
    assert [ask("PUT", "/b/k", b"x")[0] for _ in range(5)] == [200, 503, 503, 200, 200]
    assert (ask("PUT", "/b/other", b"x")[0], rule.hits, rule.acted.is_set()) == (200, 5, True)
    assert faulty.trace[1].stored is None
    assert (faulty.trace[1].fault, faulty.trace[1].size) == ("Respond", 1)
    faulty.on("", "", SLOW_DOWN, count=None)
    assert b"<Code>SlowDown</Code>" in ask("GET", "/b/k")[1]
    assert ask("HEAD", "/b/k") == (503, b"")
    faulty.heal()
    assert ask("HEAD", "/b/k") == (200, b"")


@pytest.mark.parametrize(
    ("action", "arrives"),
    [
        (Drop("before"), False),
        (LOST_ACK, True),
        (Cut("request", 0), False),
        (Cut("request", 50_000), False),
        (Cut("request", 99_999), False),
        (Cut("request", 1 << 30), None),  # the store has it all, and may or may not take it
    ],
    ids=repr,
)
def test_a_lost_request(upstream: Upstream, faulty: FaultProxy, ask: Ask, action: Action, arrives: bool | None) -> None:
    faulty.on("PUT", "", action)
    with pytest.raises(GONE):
        ask("PUT", "/b/k", b"x" * 100_000)
    assert arrives is None or ("/b/k" in upstream.bodies) is arrives
    event = faulty.trace[0]
    assert (event.status, event.stored) == (None, 200 if arrives else None)
    assert ask("PUT", "/b/k", b"x" * 100_000) == (200, b"")
    assert_written_once(faulty.trace)


@pytest.mark.parametrize("size", [0, 1, 50_000, 99_999])
def test_a_reply_can_be_cut(faulty: FaultProxy, ask: Ask, size: int) -> None:
    ask("PUT", "/b/k", b"x" * 100_000)
    faulty.on("GET", "", Cut("reply", size))
    with pytest.raises(GONE):
        ask("GET", "/b/k")
    assert len(ask("GET", "/b/k")[1]) == 100_000


def test_a_bit_can_be_flipped_either_way(upstream: Upstream, faulty: FaultProxy, ask: Ask) -> None:
    faulty.on("PUT", "", Flip(2))
    ask("PUT", "/b/k", b"aaaa")
    assert upstream.bodies["/b/k"] == b"aa`a"
    assert faulty.trace[0].crc32 == zlib.crc32(b"aaaa")
    faulty.on("GET", "", Flip(0, "reply"))
    assert ask("GET", "/b/k")[1] == b"`a`a"


def test_a_black_hole_swallows_until_the_proxy_goes_down(faulty: FaultProxy) -> None:
    rule = faulty.on("GET", "", BlackHole(), count=None)
    connection = http.client.HTTPConnection(urlsplit(faulty.url).netloc, timeout=0.3)
    connection.request("GET", "/b/k")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()
    connection.timeout = LIMIT_S
    connection.request("GET", "/b/k")
    wait_for(lambda: rule.hits == 2)
    faulty.down()
    with pytest.raises(GONE):
        connection.getresponse()
    connection.close()


def test_the_proxy_goes_down_and_comes_up_on_its_port(faulty: FaultProxy, ask: Ask) -> None:
    assert ask("PUT", "/b/k", b"x")[0] == 200
    for _ in range(3):
        faulty.down()
        for _ in range(2):
            with pytest.raises(GONE):
                ask("GET", "/b/k")
        faulty.up()
        assert ask("GET", "/b/k") == (200, b"x")


@pytest.mark.parametrize("stage", ["before", "middle", "sent", "stored", "replied"])
@pytest.mark.parametrize("body", [b"", b"x" * 200_000], ids=["empty", "large"])
def test_something_happens_at_a_stage(
    upstream: Upstream, faulty: FaultProxy, ask: Ask, stage: str, body: bytes
) -> None:
    seen: list[bool] = []
    rule = faulty.on("PUT", "", Call(lambda: seen.append("/b/k" in upstream.bodies), stage, after=100_000))  # type: ignore[arg-type]
    assert ask("PUT", "/b/k", body) == (200, b"")
    assert rule.acted.wait(LIMIT_S)
    assert len(seen) == 1
    if stage != "sent" and body:
        assert seen == [stage in {"stored", "replied"}]
    assert upstream.bodies["/b/k"] == body


def test_writing_twice_is_noticed_only_if_the_bytes_differ(faulty: FaultProxy, ask: Ask) -> None:
    for body in (b"abc", b"abc"):
        ask("PUT", "/b/k", body)
    ask("PUT", "/b/k2", b"abd")
    assert_written_once(faulty.trace)
    ask("DELETE", "/b/k")
    ask("PUT", "/b/k", b"abd")
    with pytest.raises(AssertionError, match="'k'"):
        assert_written_once(faulty.trace)
    assert bytes_sent(faulty.trace) == {"k": 9, "k2": 3}


def test_an_upload_in_parts_is_one_write(faulty: FaultProxy, ask: Ask) -> None:
    for number, body in ((2, b"world"), (1, b"xxxxx"), (1, b"hello ")):
        ask("PUT", f"/b/k?partNumber={number}&uploadId=U", body)
    ask("POST", "/b/k?uploadId=U", b"<CompleteMultipartUpload/>")
    ask("PUT", "/b/k", b"hello world")
    first, second = writes(faulty.trace)
    assert first[:3] == second[:3] == ("k", 11, zlib.crc32(b"hello world"))


def test_checksums_can_be_joined() -> None:
    pieces = [os.urandom(size) for size in (0, 1, 1000, 0, 70_000)]
    described = {number: (len(piece), zlib.crc32(piece)) for number, piece in enumerate(pieces)}
    whole = b"".join(pieces)
    assert joined(described) == (len(whole), zlib.crc32(whole))


# ------------------------------------------------------------------------------------------------------------
# servers.py

KEYS = {
    "n/a.db": b"x" * 1000,
    "n/a.db@9f3c01aa": b"",
    "n/é %0A+b": b"y",
    "n.listings/archive/%2Fx/1.json": b"{}",
}


def test_every_bucket_keeps_what_is_put_into_it(bucket: Bucket) -> None:
    for key, body in KEYS.items():
        bucket.put(key, body)
    assert bucket.objects() == bucket.objects() == KEYS
    bucket.put("n/a.db", b"z")
    assert bucket.objects()["n/a.db"] == bucket.get("n/a.db") == b"z"
    bucket.delete("n/a.db")
    assert "n/a.db" not in bucket.keys()  # noqa: SIM118 - a bucket is no dict
    bucket.empty()
    assert bucket.objects() == {}


def fetch(url: str, method: str, path: str, limit_s: float = LIMIT_S, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=limit_s)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        answer = connection.getresponse()
        return answer.status, answer.read(1000)
    finally:
        connection.close()


def test_ec2_metadata_needs_a_token(metadata: Callable[..., FakeMetadata]) -> None:
    fake = metadata(instance_id="i-42", zone="us-west-2c")
    assert fetch(fake.url, "GET", "/latest/meta-data/instance-id")[0] == 401
    assert fetch(fake.url, "PUT", "/latest/api/token")[0] == 400
    status, token = fetch(fake.url, "PUT", "/latest/api/token", X_aws_ec2_metadata_token_ttl_seconds="60")
    assert status == 200
    header = {"X_aws_ec2_metadata_token": token.decode()}
    assert fetch(fake.url, "GET", "/latest/meta-data/instance-id", **header) == (200, b"i-42")
    assert fetch(fake.url, "GET", "/latest/meta-data/placement/region", **header) == (200, b"us-west-2")
    assert fetch(fake.url, "GET", "/computeMetadata/v1/instance/id", Metadata_Flavor="Google")[0] == 404
    assert ("PUT", "/latest/api/token") in fake.requests


def test_gce_metadata_needs_its_flavor(metadata: Callable[..., FakeMetadata]) -> None:
    fake = metadata(cloud="gce", instance_id="4242")
    assert fake.region == "europe-west1"
    assert fetch(fake.url, "GET", "/computeMetadata/v1/instance/id")[0] == 403
    assert fetch(fake.url, "GET", "/computeMetadata/v1/instance/id", Metadata_Flavor="Google") == (
        200,
        b"4242",
    )
    status, zone = fetch(fake.url, "GET", "/computeMetadata/v1/instance/zone", Metadata_Flavor="Google")
    assert (status, zone.rpartition(b"/")[2]) == (200, b"europe-west1-b")
    assert fetch(fake.url, "PUT", "/latest/api/token", X_aws_ec2_metadata_token_ttl_seconds="60")[0] == 404


# ------------------------------------------------------------------------------------------------------------
# oracle.py

MOMENTS = [f"20261121T2024{second:02d}.000000Z" for second in range(60)]
Entries = list[tuple[str, str, Copy]]


def document(**values: object) -> bytes:
    return json.dumps({"version": 2, **values}).encode()


def listing(unit: Unit, entries: Entries, moment: str = MOMENTS[1], lost: tuple[str, ...] = ()) -> tuple[str, bytes]:
    """Return key and text of a listing; `lost` are names."""
    directories: dict[str, list[dict[str, object]]] = {}
    for path, key, copy in entries:
        folder, _, name = path.rpartition("/")
        about = {"mtime_ns": 1, "inode": 2, "mode": "0640", "user": "cassandra", "group": "cassandra", "etag": ""}
        file = {"name": name, "key": key, "size": copy.size, "crc32": copy.crc32, **about}
        directories.setdefault(folder, []).append(file)
    below = f"snapshots/{unit.tag}/{MOMENTS[0]}" if unit.tag else "backups"
    table, _, table_id = unit.table.partition("-")
    text = document(
        node="node1",
        kind=unit.kind,
        keyspace=unit.keyspace,
        table=table,
        table_id=table_id,
        tag=unit.tag,
        life=MOMENTS[0] if unit.tag else None,
        complete=True,
        taken=MOMENTS[0],
        listed=moment,
        missing=[],
        lost=lost,
        directories=directories,
    )
    name = f"{moment}-complete-{len(entries)}-{sum(copy.size for *_, copy in entries)}.json"
    return f"node1.listings/{unit.keyspace}/{unit.table}/{below}/{name}", text


def backed_up(history: History) -> dict[str, bytes]:
    """Return the bucket of a perfect backup: every unit in one listing, every file under its path."""
    objects = {
        "node1.listings/owner.json": document(node="node1"),
        f"node1.listings/heartbeat/{MOMENTS[0]}.json": document(),
        f"node1.pending-delete/{MOMENTS[0]}.json": document(keys=[]),
    }
    for unit, paths in history.items():
        entries: Entries = []
        for path, copies in paths.items():
            for number, copy in enumerate(copies):
                key = f"node1{path}" + (f"@{copy.crc32}" if number else "")
                objects[key] = Path(path).read_bytes()
                entries.append((path, key, copy))
        objects.update([listing(unit, entries)])
    named = [key for key in objects if "/snapshots/daily/2026" in key]
    return {**objects, f"node1.listings/tags/daily/{MOMENTS[2]}.json": document(listings=named)}


@pytest.fixture
def small(node: Node) -> Node:
    """Return a node with a snapshot and incrementals of one table."""
    node.table("ks1", "users", indexes=["by_name"]).flush()
    node.snapshot("daily")
    return node


def test_the_oracle_is_content_with_a_perfect_backup(small: Node) -> None:
    objects = backed_up(small.history)
    assert oracle.problems(objects, "node1") == []
    assert oracle.lost(small.history, objects, "node1") == []
    listed = oracle.listed_files(objects, "node1")
    assert {(unit.kind, unit.tag): len(files) for unit, files in listed.items()} == {
        ("snapshot", "daily"): 18,
        ("incremental", None): 16,
    }
    assert oracle.complete(objects, "node1") == set(listed)
    below = {f"some/prefix/{key}": body for key, body in objects.items()}
    assert oracle.problems(below, "node1", "some/prefix") == oracle.problems(below, "node", "some/prefix") == []
    assert oracle.lost(small.history, below, "node1", "some/prefix/") == []
    assert oracle.listed_files(objects, "node") == {}


def test_the_oracle_sees_a_loss_and_what_was_told_of_it(small: Node) -> None:
    objects = backed_up(small.history)
    unit = small.tables[0].unit()
    key = next(key for key in objects if "/backups/2026" in key)
    del objects[key]
    assert {found.unit for found in oracle.lost(small.history, objects, "node1")} == {unit}
    assert len(oracle.lost(small.history, objects, "node1")) == 16
    assert oracle.problems(objects, "node1") == []
    objects.update([listing(unit, [], lost=("nb-1-big-Data.db",))])
    assert oracle.told_lost(objects, "node1") == {"nb-1-big-Data.db"}


def test_the_oracle_sees_a_second_content_that_was_lost(small: Node) -> None:
    objects = backed_up(small.history)
    unit = small.tables[0].unit()
    path = next(iter(small.history[unit]))
    small.history.add(unit, path, Copy.of(b"other"))
    assert [found[1:] for found in oracle.lost(small.history, objects, "node1")] == [(path, Copy.of(b"other"))]


@pytest.mark.parametrize("harm", ["absent", "shorter", "flipped"])
def test_the_oracle_sees_a_harmed_object(small: Node, harm: str) -> None:
    objects = backed_up(small.history)
    before = dict(objects)
    key = next(key for key in objects if key.endswith("-Data.db"))
    body = objects.pop(key)
    if harm != "absent":
        objects[key] = body[:-1] + (bytes([body[-1] ^ 1]) if harm == "flipped" else b"")
    (problem,) = oracle.problems(objects, "node1")
    assert key in problem
    assert oracle.rewritten(before, objects) == ([] if harm == "absent" else [key])
    assert oracle.lost(small.history, objects, "node1") == []  # it is listed; that the listing lies is the problem


HARMS: dict[str, Callable[[str, bytes], tuple[str, bytes]]] = {
    "its state": lambda key, body: (key.replace("-complete-", "-incomplete-"), body),
    "its count": lambda key, body: (key.replace("-18-", "-17-"), body),
    "its tag": lambda key, body: (key.replace("/daily/", "/weekly/"), body),
    "its version": lambda key, body: (key, body.replace(b'"version": 2', b'"version": 1')),
    "its node": lambda key, body: (key, body.replace(b'"node": "node1"', b'"node": "node2"')),
    "its text": lambda key, body: (key, body[:-1]),
    "its form": lambda key, body: (key, b"{}"),
    "its name": lambda key, body: (key.replace("-18-", "_18_"), body),
}


@pytest.mark.parametrize("harm", HARMS)
def test_the_oracle_sees_a_listing_that_lies(small: Node, harm: str) -> None:
    objects = backed_up(small.history)
    objects = {key: body for key, body in objects.items() if "/tags/" not in key}
    key = next(key for key in objects if "/snapshots/daily/2026" in key)
    changed, body = HARMS[harm](key, objects.pop(key))
    objects[changed] = body
    assert changed in oracle.problems(objects, "node1")[0]


def test_the_oracle_sees_a_tag_record_that_names_what_is_gone_and_a_key_that_says_other_bytes(small: Node) -> None:
    objects = backed_up(small.history)
    tag = f"node1.listings/tags/daily/{MOMENTS[3]}.json"
    objects |= {tag: document(listings=["node1.listings/x"]), "node1/d/1@0badcafe": b"other"}
    record, name = oracle.problems(objects, "node1")
    assert "node1.listings/x" in record
    assert "node1/d/1@0badcafe" in name


def test_listings_of_one_unit_add_up(small: Node) -> None:
    unit = small.tables[0].unit()
    a, b = Copy.of(b"a"), Copy.of(b"b")
    key = f"node1/d/1@{b.crc32}"
    objects = {"node1/d/1": b"a", key: b"b", "node1/d/2": b"a"}
    first = listing(unit, [("/d/1", "node1/d/1", a), ("/d/2", "node1/d/2", a)])
    objects.update([first, listing(unit, [("/d/1", key, b)], MOMENTS[2])])
    (files,) = oracle.listed_files(objects, "node1").values()
    assert files == {"/d/1": (1, b.crc32), "/d/2": (1, a.crc32)}
    history = History()
    for path, copy in (("/d/1", a), ("/d/1", b), ("/d/2", a)):
        history.add(unit, path, copy)
    assert oracle.lost(history, objects, "node1") == []
    assert oracle.problems(objects, "node1") == []


def test_an_untouched_tree_has_not_changed(small: Node) -> None:
    before = oracle.survey(small.root)
    pins = small.data_dirs[0] / ".cassbackup"
    pins.mkdir()
    assert oracle.untouched(before, oracle.survey(small.root)) == []
    data = small.tables[0].sstables[0].path("Data.db")
    (pins / "pin").hardlink_to(data)
    changed = oracle.untouched(before, oracle.survey(small.root))
    assert {change.rpartition(": ")[2] for change in changed} == {"links was 3, is 4"}
    (pins / "pin").unlink()
    os.utime(data, (0, 0))
    data.chmod(0o600)
    (small.root / "new").touch()
    changed = oracle.untouched(before, oracle.survey(small.root))
    assert sum(": mtime_ns was" in change for change in changed) == 3  # the file by each of its names
    assert sum(": mode was" in change for change in changed) == 3
    assert sum(change.endswith(": new") for change in changed) == 1


# ------------------------------------------------------------------------------------------------------------
# conftest.py

STAND_IN = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(json.dumps({"argv": sys.argv[1:], "environ": dict(os.environ)}), flush=True)
if sys.argv[1] == "watch":
    time.sleep(1000)
sys.exit(3)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a program that shows how it was called, in the place of cassbackup."""
    path = tmp_path_factory.mktemp("script") / "standin.py"
    path.write_text(STAND_IN)
    return path


def test_commands_run_in_a_clean_environment(
    run_cassbackup: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_PROFILE", "BUCKET_NAME", "REGION", "CASSBACKUP_NAME", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, "the developer's")
    done = run_cassbackup("list", tmp_path, "--json", env={"BUCKET_NAME": "b"}, check=3)
    said = json.loads(done.stdout)
    assert said["argv"] == ["list", str(tmp_path), "--json"]
    assert "the developer's" not in said["environ"].values()
    assert {said["environ"][name] for name in ("AWS_EC2_METADATA_DISABLED", "NO_GCE_CHECK")} == {"true"}
    assert said["environ"]["BUCKET_NAME"] == "b"
    assert said["environ"]["HOME"] == str(tmp_path / "home")
    with pytest.raises(pytest.fail.Exception, match="exit 3, not 0"):
        run_cassbackup("list", check=0)


def test_a_daemon_can_be_stopped_killed_and_started_again(
    daemon: Callable[..., Daemon], tmp_bucket: FileBucket, tmp_path: Path
) -> None:
    one = daemon(tmp_path, bucket=tmp_bucket, args=("--once",), env={"X": "1"})
    one.wait_until(lambda: one.log().endswith("\n"))
    said = json.loads(one.log())
    options = ["--state-dir", str(tmp_path / "state"), "--bucket", tmp_bucket.target, "--name", "node1"]
    assert said["argv"] == ["watch", str(tmp_path), *options, "--once"]
    assert said["environ"]["X"] == "1"
    first = one.pid
    one.kill()
    with pytest.raises(pytest.fail.Exception, match="ended with -9"):
        one.wait_until(lambda: False)
    one.start()
    assert one.pid != first
    one.wait_until(lambda: one.log().count("argv") == 2)
    with pytest.raises(pytest.fail.Exception, match="not within"):
        one.wait_until(lambda: False, timeout=0.1)
    assert one.stop() == 0
    assert not one.is_running


def test_each_mutant_finds_its_place_in_the_program() -> None:
    text = (REPOSITORY / "cassbackup.py").read_text()
    assert {name: text.count(mutant.before) for name, mutant in MUTANTS.items()} == dict.fromkeys(MUTANTS, 1)
