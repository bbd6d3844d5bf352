"""An S3 in memory that believes nobody: what a request declares is checked, and no key may get a second content.

moto takes a wrong Content-MD5, a wrong checksum and any key; this one answers 400 as S3 does, so a byte that was
flipped on the way is noticed where S3 would notice it. It is a `Bucket` of its own, in the process of the test.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import re
import threading
import time
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

from servers import Bucket, s3_environ

NAME = "bucket"


class Object(NamedTuple):
    """An object, or a part of an upload."""

    body: bytes
    etag: str
    crc32: str
    modified: float
    meta: Mapping[str, str]


@dataclass
class Upload:
    """A multipart upload under way."""

    key: str
    began: float
    meta: Mapping[str, str]
    parts: dict[int, Object] = field(default_factory=dict)


class Refused(Exception):
    """The request is answered with an error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


def base64_of(number: int) -> str:
    return base64.b64encode(number.to_bytes(4, "big")).decode()


def object_of(body: bytes, meta: Mapping[str, str]) -> Object:
    etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
    return Object(body, etag, base64_of(zlib.crc32(body)), time.time(), meta)


def iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(moment))


class StrictS3(Bucket):
    """The server and its one bucket, from `with` to its end."""

    scheme = "s3"

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.strict = self  # type: ignore[attr-defined]
        super().__init__(f"http://127.0.0.1:{self._server.server_address[1]}", NAME)
        self.store: dict[str, Object] = {}
        self.uploads: dict[str, Upload] = {}
        self.rewritten: list[str] = []  # P3: keys that were put twice with different bytes, whatever stood between
        self.page = 1000
        self.lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._contents: dict[str, str] = {}

    def __enter__(self) -> StrictS3:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def through(self, url: str) -> dict[str, str]:
        return s3_environ(url)

    # What a test may do behind the program's back.

    def tags(self) -> dict[str, str]:
        return {key: found.etag for key, found in self.store.items()}

    def get(self, key: str) -> bytes:
        return self.store[key].body

    def objects(self) -> dict[str, bytes]:
        return {key: found.body for key, found in sorted(self.store.items())}

    def put(self, key: str, body: bytes) -> None:
        self.store[key] = object_of(body, {})

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.store.pop(key, None)
            self._contents.pop(key, None)

    # What requests do.

    def write(self, key: str, new: Object, once: bool) -> None:
        """Store an object; a key that is taken is refused where the client asks for that."""
        with self.lock:
            if once and key in self.store:
                raise Refused(412, "PreconditionFailed")
            if self._contents.setdefault(key, new.crc32) != new.crc32:
                self.rewritten.append(key)
            self.store[key] = new

    def begin(self, key: str, meta: Mapping[str, str]) -> str:
        """Begin an upload and return its id."""
        name = f"upload{next(self._numbers)}"
        self.uploads[name] = Upload(key, time.time(), meta)
        return name

    def complete(self, name: str, document: bytes, headers: Mapping[str, str]) -> Object:
        """Put the named parts together."""
        upload = self.uploads.get(name)
        if not upload:
            raise Refused(404, "NoSuchUpload")
        root = ET.fromstring(document)
        named = [{re.sub("{.*}", "", one.tag): one.text or "" for one in part} for part in root]
        parts = [upload.parts.get(int(one["PartNumber"])) for one in named]
        for one, part in zip(named, parts, strict=True):
            if part is None or one["ETag"].strip('"') != part.etag.strip('"'):
                raise Refused(400, "InvalidPart")
            if one.get("ChecksumCRC32", part.crc32) != part.crc32:
                raise Refused(400, "InvalidPart")
        body = b"".join(part.body for part in parts if part)
        made = object_of(body, upload.meta)._replace(etag=f'"{hashlib.sha1(body).hexdigest()[:32]}-{len(parts)}"')
        if headers.get("x-amz-checksum-crc32", made.crc32) != made.crc32:
            raise Refused(400, "BadDigest")
        self.write(upload.key, made, headers.get("if-none-match") == "*")
        self.uploads.pop(name, None)
        return made


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    wbufsize = 65536

    def log_message(self, *_: object) -> None:
        """Stay silent: the proxy has the trace."""

    def do_GET(self) -> None:
        self._serve()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815 - http.server's names

    def _serve(self) -> None:
        strict: StrictS3 = self.server.strict  # type: ignore[attr-defined]
        parts = urlsplit(self.path)
        key = unquote(parts.path)[len(NAME) + 2 :]
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        try:
            if len(key.encode()) > 1024:
                raise Refused(400, "KeyTooLongError")
            self._check(headers, body)
            self._answer(strict, key, query, headers, body)
        except Refused as refusal:
            self._reply(refusal.status, f"<Error><Code>{refusal.code}</Code><Message>no</Message></Error>".encode())
        with contextlib.suppress(OSError):
            self.wfile.flush()

    @staticmethod
    def _check(headers: Mapping[str, str], body: bytes) -> None:
        """Hold a body against what its headers declare."""
        sha256 = headers.get("x-amz-content-sha256", "")
        if re.fullmatch("[0-9a-f]{64}", sha256) and hashlib.sha256(body).hexdigest() != sha256:
            raise Refused(400, "XAmzContentSHA256Mismatch")
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        if headers.get("content-md5", md5) != md5:
            raise Refused(400, "BadDigest")
        crc32 = base64_of(zlib.crc32(body))
        # That of a CompleteMultipartUpload is of the object, and of no body.
        if "x-amz-sdk-checksum-algorithm" in headers and headers.get("x-amz-checksum-crc32", crc32) != crc32:
            raise Refused(400, "BadDigest")

    def _answer(
        self, strict: StrictS3, key: str, query: dict[str, str], headers: Mapping[str, str], body: bytes
    ) -> None:
        meta = {name: value for name, value in headers.items() if name.startswith("x-amz-meta-")}
        match self.command:
            case "PUT" if "uploadId" in query:
                if query["uploadId"] not in strict.uploads:
                    raise Refused(404, "NoSuchUpload")
                made = object_of(body, {})
                strict.uploads[query["uploadId"]].parts[int(query["partNumber"])] = made
                self._reply(200, b"", {"ETag": made.etag, "x-amz-checksum-crc32": made.crc32})
            case "PUT":
                made = object_of(body, meta)
                strict.write(key, made, headers.get("if-none-match") == "*")
                self._reply(200, b"", {"ETag": made.etag, "x-amz-checksum-crc32": made.crc32})
            case "POST" if "uploads" in query:
                self._xml("InitiateMultipartUploadResult", f"<UploadId>{strict.begin(key, meta)}</UploadId>")
            case "POST" if "uploadId" in query:
                made = strict.complete(query["uploadId"], body, headers)
                self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(made.etag)}</ETag>")
            case "DELETE" if "uploadId" in query:
                strict.uploads.pop(query["uploadId"], None)
                self._reply(204)
            case "DELETE":
                strict.store.pop(key, None)
                self._reply(204)
            case _ if key and "uploadId" in query:
                self._xml("ListPartsResult", "".join(self._parts(strict, query["uploadId"])))
            case _ if key:
                self._read(strict, key, headers)
            case _ if "uploads" in query:
                some = [(name, one) for name, one in strict.uploads.items() if one.key.startswith(query["prefix"])]
                self._xml("ListMultipartUploadsResult", "".join(_upload_text(*one) for one in some))
            case _:
                self._xml("ListBucketResult", "".join(self._page(strict, query)))

    @staticmethod
    def _parts(strict: StrictS3, name: str) -> Iterator[str]:
        if name not in strict.uploads:
            raise Refused(404, "NoSuchUpload")
        for number, part in sorted(strict.uploads[name].parts.items()):
            about = f"<ETag>{escape(part.etag)}</ETag><Size>{len(part.body)}</Size>"
            about += f"<ChecksumCRC32>{part.crc32}</ChecksumCRC32>"
            yield f"<Part><PartNumber>{number}</PartNumber>{about}</Part>"

    @staticmethod
    def _page(strict: StrictS3, query: dict[str, str]) -> Iterator[str]:
        """Yield a page of a list: keys, or what they have in common up to the delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = max(query.get("continuation-token", ""), query.get("start-after", ""))
        entries: dict[str, Object | None] = {}
        for key, found in sorted(strict.store.items()):
            head, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            name, one = (prefix + head + mark, None) if mark else (key, found)
            if key.startswith(prefix) and name > after:
                entries.setdefault(name, one)
        names = sorted(entries)[: strict.page]
        is_truncated = len(names) < len(entries)
        yield f"<Name>{NAME}</Name><IsTruncated>{str(is_truncated).lower()}</IsTruncated>"
        if is_truncated:
            yield f"<NextContinuationToken>{escape(names[-1])}</NextContinuationToken>"
        for name in names:
            one = entries[name]
            if one is None:
                yield f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
                continue
            about = f"<Size>{len(one.body)}</Size><ETag>{escape(one.etag)}</ETag>"
            about += f"<LastModified>{iso(one.modified)}</LastModified>"
            yield f"<Contents><Key>{escape(name)}</Key>{about}</Contents>"

    def _read(self, strict: StrictS3, key: str, headers: Mapping[str, str]) -> None:
        found = strict.store.get(key)
        if not found:
            raise Refused(404, "NoSuchKey")
        about = {"ETag": found.etag, "Last-Modified": formatdate(found.modified, usegmt=True), **found.meta}
        about["x-amz-checksum-crc32"] = found.crc32
        body, status = found.body, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            start, end = int(match[1]), int(match[2] or len(body))
            if start >= len(body):
                raise Refused(416, "InvalidRange")
            about["Content-Range"] = f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"
            body, status = body[start : end + 1], 206
        self._reply(status, body, about)

    def _xml(self, name: str, inside: str) -> None:
        text = f'<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inside}</{name}>'
        self._reply(200, text.encode(), {"Content-Type": "application/xml"})

    def _reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("x-amz-request-id", "1")
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _upload_text(name: str, upload: Upload) -> str:
    about = f"<Key>{escape(upload.key)}</Key><Initiated>{iso(upload.began)}</Initiated>"
    return f"<Upload><UploadId>{name}</UploadId>{about}</Upload>"
