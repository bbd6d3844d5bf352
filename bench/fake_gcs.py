"""A fake of Google Cloud Storage's JSON API for the bench: `fake_gcs.py PORT DIRECTORY`.

As GCS does, and unlike the emulators, it refuses to overwrite where `ifGenerationMatch=0`. It checks CRC-32C and
writes objects as files. It knows one bucket, and no sessions.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.parse
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c

ROOT = Path(sys.argv[2])
ABOUT: dict[str, dict[str, Any]] = {}  # by name, what GCS tells of an object


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_POST(self) -> None:
        """Take `uploadType=multipart`: JSON first, then the body."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        edge = b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        _, about, rest = body.split(edge, 2)
        told = json.loads(about.partition(b"\r\n\r\n")[2])
        content = rest.partition(b"\r\n\r\n")[2]
        content = content[: content.rindex(b"\r\n" + edge)]
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        name = told["name"]
        crc32c = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
        if told.get("crc32c", crc32c) != crc32c:
            return self.answer(400, {"error": {"code": 400, "message": "the crc32c does not match"}})
        if query.get("ifGenerationMatch") == ["0"] and name in ABOUT:
            return self.answer(412, {"error": {"code": 412, "message": "At least one pre-condition did not hold"}})
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        size, now = str(len(content)), "2026-11-28T20:00:00.000Z"
        ABOUT[name] = {**told, "bucket": "bench", "size": size, "crc32c": crc32c, "generation": "1", "updated": now}
        return self.answer(200, ABOUT[name])

    def do_GET(self) -> None:
        """Answer for one object, its bytes, or a list."""
        path, _, query = self.path.partition("?")
        name = urllib.parse.unquote(path.partition("/o/")[2])
        if not name:
            return self.answer(200, self.list(dict(urllib.parse.parse_qsl(query))))
        if name not in ABOUT:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: bench/{name}"}})
        if "alt=media" in query:
            return self.answer(200, (ROOT / name).read_bytes())
        return self.answer(200, ABOUT[name])

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter, items, prefixes = query.get("prefix", ""), query.get("delimiter"), [], set()
        for name in sorted(ABOUT):
            if name.startswith(prefix) and name >= query.get("startOffset", ""):
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                if found:
                    prefixes.add(prefix + head + found)
                else:
                    items.append(ABOUT[name])
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def answer(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response_only(status)
        self.send_header("Date", formatdate(usegmt=True))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    os.makedirs(ROOT, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    print("ready", flush=True)
    server.serve_forever()
