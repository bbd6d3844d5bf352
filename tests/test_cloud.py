"""Which cloud is this, and what is this node called: against metadata services, kind and hostile ones."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some
from servers import FakeMetadata, free_port

import cassbackup
from cassbackup import (
    Cloud,
    Identity,
    Unreachable,
    Usage,
    check_node_name,
    detect_cloud,
    identify,
    load_identity,
    machine_id,
    save_identity,
)

Metadata = Callable[..., FakeMetadata]
LIMIT_S = 5.0
SLACK_S = 20.0  # of a machine that does other things too; whoever does not give up waits for ever


@pytest.fixture
def dmi(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that makes a file as the kernel has it, and returns its path."""

    def write(vendor: str) -> str:
        path = tmp_path / "sys_vendor"
        path.write_text(vendor + "\n")
        return str(path)

    return write


# ------------------------------------------------------------------------------------------------------------
# Detection


def test_aws_is_found_by_its_token(metadata: Metadata) -> None:
    fake = metadata("aws", "i-0123456789abcdef0", "eu-west-1b")
    assert detect_cloud(fake.environ) == Cloud("s3", "i-0123456789abcdef0", "eu-west-1")
    assert ("PUT", "/latest/api/token") in fake.requests


def test_gce_is_found_by_its_flavor(metadata: Metadata) -> None:
    fake = metadata("gce", "4567890123456789012", "europe-west1-b")
    assert detect_cloud(fake.environ) == Cloud("gs", "4567890123456789012", "europe-west1")


def test_where_both_answer_one_of_them_is_taken_whole(metadata: Metadata) -> None:
    fake = metadata("both", "12345", "eu-west-1b")
    found = detect_cloud(fake.environ)
    assert found in (Cloud("s3", "12345", "eu-west-1"), Cloud("gs", "12345", "eu-west"))


@pytest.mark.parametrize("vendor", ["QEMU", "Dell Inc.", "Xen", ""])
def test_off_cloud_is_what_dmi_says(dmi: Callable[[str], str], vendor: str) -> None:
    began = time.monotonic()
    assert detect_cloud({}, dmi(vendor)) is None
    assert time.monotonic() - began < 1  # nobody is asked


def test_an_older_instance_of_aws_says_so_by_its_bios(
    dmi: Callable[[str], str], metadata: Metadata, tmp_path: Path
) -> None:
    """Of I3 and D2, among others, Xen is the maker."""
    (tmp_path / "bios_version").write_text("4.11.amazon\n")
    with pytest.raises(Unreachable, match="this is Amazon EC2"):
        detect_cloud(metadata("none").environ, dmi("Xen"))
    (tmp_path / "bios_version").write_text("4.14\n")
    assert detect_cloud({}, dmi("Xen")) is None


@pytest.mark.parametrize("vendor", ["Amazon EC2", "Google"])
def test_on_a_cloud_silence_is_no_answer(dmi: Callable[[str], str], metadata: Metadata, vendor: str) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    deaf = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{nowhere}", "GCE_METADATA_HOST": nowhere}
    for environ in (metadata("none").environ, deaf):
        with pytest.raises(Unreachable, match=f"cannot determine the instance id: this is {vendor}.*--name"):
            detect_cloud(environ, dmi(vendor))
        assert detect_cloud(environ, dmi("QEMU")) is None
        assert detect_cloud(environ, dmi("QEMU") + "-absent") is None
    off = {"AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true"}
    assert detect_cloud(off, dmi(vendor)) is None


def test_services_that_never_answer_are_given_up_in_five_seconds(dmi: Callable[[str], str], metadata: Metadata) -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable):
        detect_cloud(metadata("both", mood="slow").environ, dmi("Google"))
    assert time.monotonic() - began < LIMIT_S + SLACK_S


class Dripping(BaseHTTPRequestHandler):
    """Answers with one byte in half a second, for ever: no single read ever times out."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        while not self.server.shut.wait(0.5):  # type: ignore[attr-defined]
            self.wfile.write(b"1")

    def do_PUT(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dripping() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.shut = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shut.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_an_answer_that_drips_is_given_up_and_holds_nobody_up(metadata: Metadata, dripping: str) -> None:
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{dripping}", "GCE_METADATA_HOST": dripping}
    began = time.monotonic()
    assert detect_cloud(environ, limit_s=1.0) is None
    fake = metadata("gce", "77", "us-east4-a")
    assert detect_cloud({**environ, "GCE_METADATA_HOST": fake.host}, limit_s=60.0) == Cloud("gs", "77", "us-east4")
    assert time.monotonic() - began < 1.0 + SLACK_S


def test_redirects_are_not_followed(metadata: Metadata) -> None:
    fake = metadata("both", mood="redirect")
    assert detect_cloud(fake.environ) is None
    assert fake.requests
    assert not [path for _, path in fake.requests if "redirected" in path]


def test_a_huge_answer_is_not_swallowed(metadata: Metadata) -> None:
    fake = metadata("both", mood="huge")
    before = peak_kib()
    assert detect_cloud(fake.environ) is None
    assert peak_kib() - before < 64 * 1024


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def test_junk_is_no_cloud_and_reaches_no_log(metadata: Metadata, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "cassbackup"):
        assert detect_cloud(metadata("both", mood="junk").environ) is None
    said = "".join(record.getMessage() for record in caplog.records if record.name == "cassbackup")
    assert said.isprintable()


@pytest.mark.parametrize("instance", ["", "i 1", "i-1\nx", "<html>", "x" * 5000])
def test_an_instance_id_that_is_none_is_no_answer(metadata: Metadata, instance: str) -> None:
    assert detect_cloud(metadata("both", instance).environ) is None


def test_gce_without_its_flavor_in_the_answer_is_not_gce(metadata: Metadata) -> None:
    """Anybody may listen at that address: EC2's fake answers there too, but without the header."""
    fake = metadata("aws")
    assert detect_cloud({**fake.environ, "AWS_EC2_METADATA_DISABLED": "true"}) is None


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_is_not_asked_where_we_are(metadata: Metadata, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    proxy, fake = metadata("aws", "i-of-the-proxy"), metadata("aws", "i-of-this-machine")
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, proxy.url)
    found = detect_cloud({**fake.environ, name: proxy.url})
    assert found is not None
    assert found.instance == "i-of-this-machine"
    assert proxy.requests == []


@pytest.mark.parametrize("switch", ["true", "TRUE"])
def test_the_clouds_own_switches_are_honoured(metadata: Metadata, switch: str) -> None:
    fake = metadata("both", "12345")
    off = {"AWS_EC2_METADATA_DISABLED": switch, "NO_GCE_CHECK": switch}
    assert detect_cloud({**fake.environ, **off}) is None
    assert fake.requests == []
    for name, scheme in (("AWS_EC2_METADATA_DISABLED", "gs"), ("NO_GCE_CHECK", "s3")):
        found = detect_cloud({**fake.environ, name: switch})
        assert found is not None
        assert found.scheme == scheme


# ------------------------------------------------------------------------------------------------------------
# Who this node is

AWS = Cloud("s3", "i-0123456789abcdef0", "eu-west-1")
MACHINE = "0123456789abcdef0123456789abcdef"
HERE = MACHINE[:12]


class Machine:
    """This machine as the tests want it: its names, its ids, its cloud."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fqdn, self.host, self.id = "db1.example.org", "db1", MACHINE
        self.cloud: Cloud | None = None
        self.deaf, self.asked = False, 0
        monkeypatch.setattr(socket, "getfqdn", lambda: self.fqdn)
        monkeypatch.setattr(socket, "gethostname", lambda: self.host)
        monkeypatch.setattr(cassbackup, "machine_id", lambda: self.id)
        monkeypatch.setattr(cassbackup, "detect_cloud", self.detect)

    def detect(self, _: object) -> Cloud | None:
        self.asked += 1
        if self.deaf:
            raise Unreachable("nobody answers")
        return self.cloud

    def identify(
        self, known: Identity | None = None, bucket: str = "s3://b", prefix: str = "", name: str = "", region: str = ""
    ) -> Identity:
        return identify(bucket, prefix, name, region, {}, known)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_on_a_cloud_a_node_is_its_host_and_its_instance(machine: Machine) -> None:
    machine.cloud = AWS
    node = "db1.example.org-i-0123456789abcdef0"
    assert machine.identify() == Identity(node, AWS.instance, "s3://b", "eu-west-1")
    assert machine.identify(bucket="b", prefix="/x/y/", region="eu-9").url == "s3://b/x/y"
    assert machine.identify(bucket="b", region="eu-9").region == "eu-9"


def test_who_is_to_store_must_have_a_name_and_who_reads_need_not(machine: Machine, tmp_path: Path) -> None:
    """Doctor asks as a daemon does: that one would end with exit 2."""
    machine.fqdn = machine.host = "localhost"
    options = cassbackup.BucketOptions({}, str(tmp_path), cassbackup.StoreOptions(), f"file://{tmp_path}")
    assert cassbackup.open_bucket(options).here == ""
    with pytest.raises(Usage, match="names no node"):
        cassbackup.open_bucket(options, new=True)


def test_off_cloud_a_node_is_its_host_and_the_beginning_of_its_machine_id(machine: Machine) -> None:
    machine.fqdn = "db1.example.org."
    assert machine.identify() == Identity(f"db1.example.org-{HERE}", HERE, "s3://b", "")


def test_another_host_name_is_the_same_node_and_another_instance_is_not(machine: Machine) -> None:
    for cloud, other in ((AWS, Cloud("s3", "i-2222", "eu-west-1")), (None, None)):
        machine.cloud, machine.fqdn, machine.id = cloud, "db1", MACHINE
        first = machine.identify()
        machine.fqdn = "db2"
        assert machine.identify(first) == first
        machine.cloud, machine.id = other, MACHINE[::-1]
        assert machine.identify(first).node == f"db2-{other.instance if other else MACHINE[::-1][:12]}"


def test_silence_changes_nothing(machine: Machine) -> None:
    machine.cloud = AWS
    first = machine.identify(bucket="b")
    machine.cloud = None  # where DMI cannot be read
    assert machine.identify(first, bucket="b") == first
    machine.deaf = True
    assert machine.identify(first, bucket="b") == first
    with pytest.raises(Unreachable):  # on a cloud the daemon pins, and waits for its name
        machine.identify()


def test_what_is_settled_is_not_asked_for(machine: Machine) -> None:
    first = machine.identify()
    machine.asked = 0
    assert machine.identify(first) == first
    assert machine.identify(name="chosen").node == "chosen"
    assert machine.asked == 0
    with pytest.raises(Usage, match="could be anywhere"):  # a bare name needs a cloud
        machine.identify(bucket="b", name="chosen")
    assert machine.asked == 1


def test_a_host_that_hosts_file_calls_localhost_first_keeps_its_name(machine: Machine) -> None:
    """Common in images and containers: 127.0.0.1 localhost db1. The host is called db1 all the same."""
    machine.fqdn = "localhost.localdomain"
    assert machine.identify().node == f"db1-{HERE}"


@pytest.mark.parametrize(
    "host", ["", " ", ".", "localhost", "-db1", "db/1", "../db1", "a b", "db\n1", "é", "x" * 255, "db%1", "db1\x1b[31m"]
)
def test_a_host_name_that_names_no_node_is_refused(machine: Machine, host: str) -> None:
    machine.fqdn = machine.host = host
    for machine.cloud in (AWS, None):
        with pytest.raises(Usage) as refused:
            machine.identify()
        assert refused.value.code == 2
        assert refused.value.hint


def test_without_any_id_a_node_has_no_name(machine: Machine) -> None:
    machine.id = ""
    why = "cannot determine the instance id: no metadata service and no /etc/machine-id: pass --name"
    with pytest.raises(Usage, match=why):
        machine.identify()
    assert machine.identify(name="n").node == "n"


def test_without_a_bucket_there_is_nothing_to_do(machine: Machine) -> None:
    with pytest.raises(Usage, match="BUCKET_NAME"):
        machine.identify(bucket="")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-x", "a/b", "a b", "a\nb", "a\n", "a\0", "é", "x" * 201, "a%b", "a*b", "node1.listings",
     "node1.pending-delete", "s3://x"],
)  # fmt: skip
def test_a_name_that_cannot_be_one_component_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(Usage) as refused:
        check_node_name(name)
    assert refused.value.code == 2


@given(some.text(max_size=220))
def test_a_name_is_refused_or_stays_as_it_is(name: str) -> None:
    with contextlib.suppress(Usage):
        assert check_node_name(name) == name
        assert 0 < len(name.encode()) <= 200
        assert "/" not in name


def test_an_identity_is_remembered_or_nothing_is(tmp_path: Path) -> None:
    path = str(tmp_path / "identity.json")
    assert load_identity(path) is None
    for identity in (Identity("n1", "i-1", "s3://b", "eu-west-1"), Identity("n2", "", "file:///d", "")):
        save_identity(path, identity)
        assert load_identity(path) == identity
    for junk in (b"", b"{}", b"[1]", b'{"version": 1}', b'{"version": 2, "node": 5}', b"\xff"):
        Path(path).write_bytes(junk)
        assert load_identity(path) is None
    assert machine_id() in ("", Path("/etc/machine-id").read_text().strip() if Path("/etc/machine-id").exists() else "")
