r"""An HTTP/1.1 proxy that breaks things on purpose, in front of any plain HTTP store; to clients it may speak TLS.

    with FaultProxy(bucket.url) as proxy:
        proxy.on("PUT", r"-Data\.db", SLOW_DOWN, nth=3, count=2)
        proxy.on("PUT", r"\.listings/", kill(daemon.pid, at="stored"))
        ...                                     # run cassbackup with bucket.through(proxy.url)
        assert_written_once(proxy.trace)

A request passes five stages, and an action may act at each: *before* (its head was read, nothing was
forwarded), *middle* (part of its body was forwarded), *sent* (all of it was), *stored* (the store's answer is
here, the client has seen nothing of it), *replied*. The first active rule that matches a request acts on it;
every rule that matches counts.

Each request has its own connection to the store and the client's is kept alive. The proxy answers
`Expect: 100-continue` itself, once it wants the body. Every request leaves an `Event` in the trace.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import signal
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Stage = Literal["before", "middle", "sent", "stored", "replied"]
Body = Literal["request", "reply"]
BLOCK = 64 << 10
KEPT_BODY = 64 << 10
KEPT_HEADERS = re.compile(r"content-|x-amz-(?!security)|x-goog-|if-|range$|expect$")


class Hangup(Exception):
    """The client or the store went away in the middle of a message."""


class Cutoff(Exception):
    """An action wants both connections reset."""


class Answered(Exception):
    """An action has answered the client; `keep` says whether its connection can be used again."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep


# ------------------------------------------------------------------------------------------------------------
# The trace


@dataclass
class Event:
    """One request: what the client sent (before any flip), what the store answered, what the client heard.

    `size`, `crc32` and `sha1` are of the content: without chunk framing, of a multipart/related body the
    media part. The store's answer is `stored`, the client's `status`; None where there was none.
    """

    number: int
    method: str
    path: str
    headers: dict[str, str]
    began: float
    key: str = ""
    fault: str = ""
    stored: int | None = None
    status: int | None = None
    size: int = 0
    crc32: int = 0
    sha1: str = ""
    body: bytes = b""
    ended: float = 0.0

    @property
    def query(self) -> dict[str, str]:
        """Return the last value of each query parameter."""
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query, True).items()}

    @property
    def target(self) -> str:
        """Return what rules look at: path and query, unquoted, and the key where it stands in neither."""
        plain = unquote(self.path)
        return plain if self.key in plain else f"{plain} {self.key}"

    @property
    def carries_content(self) -> bool:
        """Tell whether the body is an object's content or a piece of it."""
        in_one_request = self.query.get("uploadType") in {"media", "multipart"}
        return bool(self.key) and (self.method == "PUT" or in_one_request)


def key_of(path: str, body: bytes = b"") -> str:
    """Return the key of the object that a request is about, "" where it is about none or does not say."""
    parts = urlsplit(path)
    in_gcs = re.match(r"/(?:upload/|download/)?storage/v1/(?:b/[^/]+/o(?:/(.*))?$)?", parts.path)
    if not in_gcs:
        return unquote("/".join(parts.path.split("/")[2:]))
    with contextlib.suppress(ValueError, KeyError):
        query = parse_qs(parts.query)
        return unquote(in_gcs[1] or "") or query.get("name", [""])[0] or str(json.loads(body)["name"])
    return ""


Pieces = dict[int, tuple[int, int]]  # of one upload: part number or offset -> size, crc32


class Write(NamedTuple):
    """One object that the store confirmed, however many requests it took."""

    key: str
    size: int
    crc32: int
    number: int


def writes(trace: Iterable[Event]) -> Iterator[Write]:
    """Yield what was written: single puts, S3 multipart uploads and GCS resumable uploads as one each."""
    pieces: dict[str, Pieces] = defaultdict(dict)
    for event in trace:
        query = event.query
        upload = query.get("uploadId") or query.get("upload_id", "")
        if event.stored is None or event.stored >= 400:
            continue
        if event.method == "PUT" and upload:
            place = query.get("partNumber") or _offset(event)
            if place:
                pieces[upload][int(place)] = (event.size, event.crc32)
            if "upload_id" in query and event.stored in {200, 201}:
                yield Write(event.key, *joined(pieces[upload]), event.number)
        elif event.method == "POST" and "uploadId" in query:
            yield Write(event.key, *joined(pieces[upload]), event.number)
        elif event.carries_content:
            yield Write(event.key, event.size, event.crc32, event.number)


def _offset(event: Event) -> str:
    """Return where a piece of a resumable upload begins; "" if the request only asks how far it got."""
    found = re.match(r"bytes (\d+)-", event.headers.get("content-range", "bytes 0-"))
    return found[1] if found else ""


def assert_written_once(trace: Iterable[Event]) -> None:
    """Fail if the bytes of any key ever changed (the same bytes may be written again)."""
    first: dict[str, Write] = {}
    for write in writes(trace):
        before = first.setdefault(write.key, write)
        assert write[1:3] == before[1:3], f"other bytes under the same key: {before}, then {write}"


def count(trace: Iterable[Event], method: str = "", path: str = "") -> int:
    """Return how many requests a rule for this method and path would match."""
    return sum(method in {"", event.method} and bool(re.search(path, event.target)) for event in trace)


def bytes_sent(trace: Iterable[Event]) -> dict[str, int]:
    """Return how many bytes of content were sent for each key, in vain or not."""
    total: dict[str, int] = defaultdict(int)
    for event in trace:
        if event.carries_content:
            total[event.key] += event.size
    return dict(total)


def joined(pieces: Pieces) -> tuple[int, int]:
    """Return size and CRC-32 of the pieces put together in the order of their numbers."""
    size = crc = 0
    for _, (more, other) in sorted(pieces.items()):
        size, crc = size + more, _times(_power(8 * more), crc) ^ other
    return size, crc


def _times(a: int, b: int) -> int:
    """Return the product of two polynomials modulo that of CRC-32, both bit-reversed."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (0xEDB88320 if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=1000)
def _power(exponent: int) -> int:
    """Return x**exponent modulo the polynomial of CRC-32, bit-reversed."""
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result


# ------------------------------------------------------------------------------------------------------------
# Messages


@dataclass
class Head:
    """The start line and headers of a request or a reply."""

    start: str
    headers: list[tuple[str, str]]

    def get(self, name: str) -> str:
        """Return a header's value in its own case, "" without it."""
        return next((value for found, value in self.headers if found.lower() == name), "")

    def without(self, *names: str) -> Head:
        """Return a copy that lacks some headers."""
        return Head(self.start, [(name, value) for name, value in self.headers if name.lower() not in names])

    def dump(self) -> bytes:
        """Return the bytes on the wire, blank line included."""
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    @property
    def is_chunked(self) -> bool:
        """Tell whether the body comes in HTTP chunks."""
        return "chunked" in self.get("transfer-encoding").lower()


class Peer:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")

    def read_head(self) -> Head | None:
        """Read a message's head; None if the other side closed in good order."""
        start = self.file.readline(BLOCK)
        if not start:
            return None
        headers = []
        while (line := self.file.readline(BLOCK).rstrip(b"\r\n")) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers.append((name, value.strip()))
        return Head(start.decode("latin-1").rstrip("\r\n"), headers)

    def peek_metadata(self) -> bytes:
        """Return the JSON at the start of the body that is to come; it stays unread."""
        found = re.search(rb"\{.*?\}", self.file.peek(), re.DOTALL)
        return found[0] if found else b""

    def close(self, abruptly: bool = False) -> None:
        """Close with a FIN, or with an RST."""
        with contextlib.suppress(OSError):
            if abruptly:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.file.close()  # the socket stays open as long as a file of it does
            self.sock.close()


def read_body(file: io.BufferedIOBase, head: Head, until_eof: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """Yield a message's body as (bytes on the wire, bytes of content) in small blocks."""
    if head.is_chunked:
        yield from read_chunks(file)
    elif head.get("content-length"):
        yield from ((block, block) for block in read_exactly(file, int(head.get("content-length"))))
    elif until_eof:
        yield from ((block, block) for block in iter(lambda: file.read1(BLOCK), b""))


def read_chunks(file: io.BufferedIOBase) -> Iterator[tuple[bytes, bytes]]:
    """Yield (wire, content) of a chunked body up to the end of its trailers; aws-chunked is formed alike."""
    size = -1
    while size != 0:
        line = file.readline(BLOCK)
        if not line.endswith(b"\n"):
            raise Hangup
        yield line, b""
        size = int(line.split(b";")[0], 16)
        yield from ((block, block) for block in read_exactly(file, size))
        if size:
            yield file.readline(BLOCK), b""
    while (line := file.readline(BLOCK)).strip():
        yield line, b""
    yield line, b""


def read_exactly(file: io.BufferedIOBase, size: int) -> Iterator[bytes]:
    """Yield exactly this many bytes in small blocks."""
    while size:
        block = file.read1(min(size, BLOCK))
        if not block:
            raise Hangup
        size -= len(block)
        yield block


class Content:
    """Collects what the client sent, and tells what it is once it is complete."""

    def __init__(self, method: str, head: Head) -> None:
        self.kind = head.get("content-type")
        self.is_framed = "aws-chunked" in head.get("content-encoding")
        self.is_kept = self.is_framed or method == "POST"
        self.kept = bytearray()
        self.sha1 = hashlib.sha1(usedforsecurity=False)
        self.crc32 = self.size = 0

    def add(self, block: bytes) -> None:
        """Take the next bytes of the content."""
        if self.is_kept:
            self.kept += block
        else:
            self._digest(block)

    def _digest(self, block: bytes) -> None:
        self.sha1.update(block)
        self.crc32 = zlib.crc32(block, self.crc32)
        self.size += len(block)

    def describe(self, event: Event) -> None:
        """Write size, checksums and a small body into the event."""
        kept = bytes(self.kept)
        if self.is_framed:
            kept = b"".join(content for _, content in read_chunks(io.BytesIO(kept)))
        if "boundary=" in self.kind and self.kind.startswith("multipart/related"):
            boundary = b"--" + self.kind.split("boundary=")[1].strip('"').encode()
            _, about, media, *_ = kept.split(boundary)
            event.body = about.partition(b"\r\n\r\n")[2]
            kept = media.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        elif event.method == "POST":
            event.body = kept[:KEPT_BODY]
        if self.is_kept:
            self._digest(kept)
        event.key = event.key or key_of(event.path, event.body)
        event.size, event.crc32, event.sha1 = self.size, self.crc32, self.sha1.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Actions


XML = b'<?xml version="1.0" encoding="UTF-8"?>\n'


class Action:
    """Does nothing; an action overrides where it acts."""

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        """Act when the exchange reaches a stage ("middle" is for `carry` to find)."""

    def carry(self, what: Body, block: bytes, offset: int, exchange: Exchange) -> bytes:
        """Return what to pass on for a block of a body, which starts at `offset` on the wire."""
        return block


@dataclass
class Respond(Action):
    """Answer in the store's place; the request never gets there."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        if stage != "before":
            return
        keep = not exchange.head.get("expect")
        if keep:
            exchange.swallow_body()
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        headers["Connection"] = "keep-alive" if keep else "close"  # a body that nobody asked for stays unread
        exchange.reply(Head(f"HTTP/1.1 {self.status} Injected", list(headers.items())))
        exchange.client.sock.sendall(b"" if exchange.event.method == "HEAD" else self.body)
        raise Answered(keep)


def s3_error(status: int, code: str, message: str = "injected") -> Respond:
    """Return an answer with the XML body of an S3 error."""
    xml = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Respond(status, XML + xml.encode(), {"Content-Type": "application/xml"})


SLOW_DOWN = s3_error(503, "SlowDown", "Please reduce your request rate.")


@dataclass
class Delay(Action):
    """Wait at a stage."""

    seconds: float
    at: Stage = "before"

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        if stage == self.at:
            exchange.closing.wait(self.seconds)


@dataclass
class Throttle(Action):
    """Pass the bodies of request and reply on at so many bytes a second."""

    rate: float

    def carry(self, what: Body, block: bytes, offset: int, exchange: Exchange) -> bytes:
        exchange.closing.wait(len(block) / self.rate)
        return block


@dataclass
class Drop(Action):
    """Reset the client's connection at a stage."""

    at: Stage

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        if stage == self.at:
            raise Cutoff


LOST_ACK = Drop("stored")


@dataclass
class Cut(Action):
    """Pass on the first `size` bytes of a body (or all of a shorter one), then reset the client's connection."""

    what: Body
    size: int

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        if stage == ("sent" if self.what == "request" else "replied"):
            raise Cutoff

    def carry(self, what: Body, block: bytes, offset: int, exchange: Exchange) -> bytes:
        if what == self.what and offset + len(block) >= self.size:
            exchange.receiver(what).sock.sendall(block[: self.size - offset])
            raise Cutoff
        return block


class BlackHole(Action):
    """Read nothing more and never answer, until the proxy goes down."""

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        exchange.closing.wait()
        raise Cutoff


@dataclass
class Flip(Action):
    """Flip one bit of the request's or the reply's body, at this offset."""

    at: int
    what: Body = "request"

    def carry(self, what: Body, block: bytes, offset: int, exchange: Exchange) -> bytes:
        place = self.at - offset
        if what != self.what or not 0 <= place < len(block):
            return block
        return block[:place] + bytes([block[place] ^ 1]) + block[place + 1 :]


@dataclass
class Call(Action):
    """Call a function at a stage, then go on: it may kill, pause, or change files at exactly that moment.

    "middle" is when `after` bytes of the body have been forwarded, or the end of a shorter body.
    """

    function: Callable[[], object]
    at: Stage
    after: int = 1

    def reach(self, stage: Stage, exchange: Exchange) -> None:
        if stage == self.at or (stage, self.at) == ("sent", "middle"):
            self._call_once(exchange)

    def carry(self, what: Body, block: bytes, offset: int, exchange: Exchange) -> bytes:
        if what == "reply" or self.at != "middle" or offset + len(block) < self.after or exchange.called:
            return block
        exchange.receiver(what).sock.sendall(block[: self.after - offset])
        self._call_once(exchange)
        return block[self.after - offset :]

    def _call_once(self, exchange: Exchange) -> None:
        if not exchange.called:
            exchange.called = True
            self.function()


def kill(pid: int | Callable[[], int], at: Stage = "before", after: int = 1) -> Call:
    """Return an action that sends SIGKILL to a process (asked for at that moment if a function is given)."""
    return Call(lambda: os.kill(pid() if callable(pid) else pid, signal.SIGKILL), at, after)


@dataclass
class Rule:
    """An action for the `nth` request that matches, and the `count - 1` after it (None: for ever)."""

    method: str
    path: re.Pattern[str]
    action: Action
    nth: int = 1
    count: int | None = 1
    hits: int = 0
    acted: threading.Event = field(default_factory=threading.Event)

    def applies(self, event: Event) -> bool:
        """Count the request if it matches, and tell whether the action is due."""
        if self.method not in {"", event.method} or not self.path.search(event.target):
            return False
        self.hits += 1
        return self.hits >= self.nth and (self.count is None or self.hits < self.nth + self.count)


# ------------------------------------------------------------------------------------------------------------
# The proxy


class FaultProxy:
    """The proxy itself: listens on `url` while it is up, and keeps the trace and the rules."""

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        address = urlsplit(upstream)
        self.upstream = (str(address.hostname), int(address.port or 80))
        self.tls = tls
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._trace: list[Event] = []
        self.uploads: dict[str, str] = {}  # GCS resumable upload: key
        self.lead_s = 0.0  # so far ahead is the store's clock, by the Date of its replies
        self._sockets: set[socket.socket] = set()
        self._listener = self._listen(0)
        self._port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._port}"

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=128)
        threading.Thread(target=self._accept, args=(listener, self.closing), daemon=True).start()
        return listener

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def trace(self) -> list[Event]:
        """Return the requests so far, in the order of their arrival."""
        with self._lock:
            return list(self._trace)

    def on(self, method: str, path: str, action: Action, nth: int = 1, count: int | None = 1) -> Rule:
        """Add a rule: "" is any method; `path` is a regular expression, searched in the event's `target`."""
        rule = Rule(method, re.compile(path), action, nth, count)
        with self._lock:
            self._rules.append(rule)
        return rule

    def heal(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules.clear()

    def down(self) -> None:
        """Refuse new connections and reset those that are open, black holes included."""
        with self._lock:
            self.closing.set()
            sockets = [self._listener, *self._sockets]
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)  # wakes its thread, which resets it
        self._listener.close()

    def up(self) -> None:
        """Listen again, on the same port."""
        self.closing = threading.Event()
        self._listener = self._listen(self._port)

    def _accept(self, listener: socket.socket, closing: threading.Event) -> None:
        while not closing.is_set():
            with contextlib.suppress(OSError):
                sock, _ = listener.accept()
                threading.Thread(target=self._serve, args=(sock, closing), daemon=True).start()

    def _serve(self, sock: socket.socket, closing: threading.Event) -> None:
        """Serve one client connection, request by request."""
        if self.tls:
            try:
                sock = self.tls.wrap_socket(sock, server_side=True)
            except OSError:  # it does not trust us
                return
        client, abruptly = Peer(sock), False
        with self._watched(sock):
            try:
                while (head := client.read_head()) and not closing.is_set() and self._exchange(client, head):
                    pass
            except (Cutoff, Hangup, OSError, ValueError):
                abruptly = True
            client.close(abruptly or closing.is_set())

    @contextlib.contextmanager
    def _watched(self, sock: socket.socket) -> Iterator[None]:
        """Let `down` wake whoever waits on this socket."""
        with self._lock:
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def _exchange(self, client: Peer, head: Head) -> bool:
        method, path, _ = head.start.split(" ", 2)
        names_inside = method == "POST" and "uploadType=" in path and head.get("content-length") != "0"
        peeked = client.peek_metadata() if names_inside else b""
        with self._lock:
            event = Event(len(self._trace), method, path, _kept_headers(head), time.monotonic())
            event.key = key_of(path, peeked) or self.uploads.get(event.query.get("upload_id", ""), "")
            self._trace.append(event)
            due = [rule for rule in self._rules if rule.applies(event)]
        action = due[0].action if due else Action()
        event.fault = type(action).__name__ if due else ""
        try:
            return Exchange(self, client, head, event, action).run()
        finally:
            event.ended = time.monotonic()
            if due:
                due[0].acted.set()

    @contextlib.contextmanager
    def connected(self) -> Iterator[Peer]:
        """Yield a new connection to the store."""
        store = Peer(socket.create_connection(self.upstream, 60))
        try:
            with self._watched(store.sock):
                yield store
        finally:
            store.close()


class Exchange:
    """One request and its reply on their way through the stages."""

    def __init__(self, proxy: FaultProxy, client: Peer, head: Head, event: Event, action: Action) -> None:
        self.proxy = proxy
        self.closing = proxy.closing
        self.client = client
        self.store: Peer
        self.head = head
        self.event = event
        self.action = action
        self.called = False

    def run(self) -> bool:
        """Take the request through its stages; tell whether the client's connection can be used again."""
        try:
            self.action.reach("before", self)
            with self.proxy.connected() as self.store:
                self._forward_request()
                self.action.reach("sent", self)
                keep = self._forward_reply()
        except Answered as answer:
            keep = answer.keep
        self.action.reach("replied", self)
        return keep

    def receiver(self, what: Body) -> Peer:
        """Return the side to which a body goes."""
        return self.store if what == "request" else self.client

    def swallow_body(self) -> None:
        """Read the request's body and forward none of it."""
        for _ in self._request_body():
            pass

    def reply(self, head: Head) -> None:
        """Send the client a reply's head."""
        self.event.status = int(head.start.split(" ")[1])  # first: who has the reply may look at the trace
        self.client.sock.sendall(head.dump())

    def _request_body(self) -> Iterator[bytes]:
        """Yield the request's body as on the wire; once it is complete, describe its content in the event."""
        if self.head.get("expect"):
            self.client.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        content = Content(self.event.method, self.head)
        for wire, payload in read_body(self.client.file, self.head):
            content.add(payload)
            self.event.size = content.size
            yield wire
        content.describe(self.event)

    def _forward_request(self) -> None:
        forwarded = self.head.without("expect", "connection", "keep-alive")
        forwarded.headers.append(("Connection", "close"))
        self.store.sock.sendall(forwarded.dump())
        self._carry("request", self._request_body())

    def _forward_reply(self) -> bool:
        head = self.store.read_head()
        while head and head.start.split(" ")[1] == "100":
            head = self.store.read_head()
        if head is None:
            raise Hangup
        self.event.stored = int(head.start.split(" ")[1])
        self._note_upload(head.get("location"))
        self.action.reach("stored", self)
        has_body = self.event.method != "HEAD" and self.event.stored not in {204, 304}
        is_framed = head.is_chunked or head.get("content-length") != "" or not has_body
        keep = is_framed and self.head.get("connection").lower() != "close" and "HTTP/1.1" in self.head.start
        passed = head.without("connection", "keep-alive")
        passed.start = "HTTP/1.1 " + head.start.split(" ", 1)[1]
        passed.headers.append(("Connection", "keep-alive" if keep else "close"))
        if self.proxy.lead_s:
            passed = passed.without("date")
            passed.headers.append(("Date", formatdate(time.time() + self.proxy.lead_s, usegmt=True)))
        body: Iterable[bytes] = ()
        if has_body:
            body = (wire for wire, _ in read_body(self.store.file, head, until_eof=True))
        if self.proxy.tls:
            passed, body = self._with_links_back(passed, body)
        self.reply(passed)
        self._carry("reply", body)
        return keep

    def _with_links_back(self, head: Head, body: Iterable[bytes]) -> tuple[Head, Iterable[bytes]]:
        """Let links lead here again: a store that was called by http says http, in Location and in JSON."""
        here, there = self.proxy.url, self.proxy.url.replace("https:", "http:")
        head.headers = [(name, value.replace(there, here)) for name, value in head.headers]
        if "json" not in head.get("content-type"):
            return head, body
        whole = b"".join(body).replace(there.encode(), here.encode())
        head = head.without("content-length")
        head.headers.append(("Content-Length", str(len(whole))))
        return head, [whole]

    def _note_upload(self, location: str) -> None:
        """Remember which object a GCS resumable upload is for: only its first request says so."""
        upload = parse_qs(urlsplit(location).query).get("upload_id")
        if upload:
            self.proxy.uploads[upload[0]] = self.event.key

    def _carry(self, what: Body, blocks: Iterable[bytes]) -> None:
        offset = 0
        for block in blocks:
            self.receiver(what).sock.sendall(self.action.carry(what, block, offset, self))
            offset += len(block)


def _kept_headers(head: Head) -> dict[str, str]:
    """Return the headers that a test may want to see, by lower-case name; never a secret."""
    found = {name.lower(): value for name, value in head.headers}
    return {name: value for name, value in found.items() if KEPT_HEADERS.match(name)}
