"""Which cloud is this, and what is this node called: against metadata services, kind and hostile ones."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Run, clean_environ
from hypothesis import given
from hypothesis import strategies as some
from servers import Bucket, FakeMetadata, FileBucket, free_port
from tree import Node

from cassbackup import Cloud, Usage, check_node, detect_cloud, name_node

Metadata = Callable[..., FakeMetadata]
LIMIT_S = 5.0
SLACK_S = 20.0  # of a machine that does other things too; whoever does not give up waits for ever

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


def test_where_neither_answers_there_is_no_cloud(metadata: Metadata) -> None:
    assert detect_cloud(metadata("none").environ) is None


def test_where_nobody_listens_there_is_no_cloud() -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{nowhere}", "GCE_METADATA_HOST": nowhere}
    assert detect_cloud(environ) is None


def test_services_that_never_answer_are_given_up_in_five_seconds(metadata: Metadata) -> None:
    began = time.monotonic()
    assert detect_cloud(metadata("both", mood="slow").environ) is None
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


def test_an_answer_that_drips_is_given_up_within_the_limit(dripping: str) -> None:
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{dripping}", "GCE_METADATA_HOST": dripping}
    began = time.monotonic()
    assert detect_cloud(environ, 1.0) is None
    assert time.monotonic() - began < 1.0 + SLACK_S


def test_one_cloud_is_found_while_the_other_says_nothing_whole(metadata: Metadata, dripping: str) -> None:
    fake = metadata("gce", "77", "us-east4-a")
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{dripping}", "GCE_METADATA_HOST": fake.host}
    began = time.monotonic()
    assert detect_cloud(environ, 60.0) == Cloud("gs", "77", "us-east4")
    assert time.monotonic() - began < SLACK_S


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


@pytest.mark.parametrize("instance", ["", "i 1", "i-1\nx", "../../x", "i-1/x", "<html>", "x" * 5000])
def test_an_instance_id_that_is_none_is_refused(metadata: Metadata, instance: str) -> None:
    found = detect_cloud(metadata("both", instance).environ)
    if found:  # what is a word but no good name is refused when the node is named
        with pytest.raises(Usage):
            name_node(found, "db1", "")


def test_gce_without_its_flavor_in_the_answer_is_not_gce(metadata: Metadata) -> None:
    """Anybody may listen at that address: EC2's fake answers there too, but without the header."""
    fake = metadata("aws")
    assert detect_cloud({**fake.environ, "AWS_EC2_METADATA_DISABLED": "true"}) is None


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_a_proxy_is_not_asked_where_we_are(metadata: Metadata, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    proxy, fake = metadata("aws", "i-of-the-proxy"), metadata("aws", "i-of-this-machine")
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, proxy.url)
    found = detect_cloud({**fake.environ, name: proxy.url})
    assert found is not None
    assert found.instance == "i-of-this-machine"
    assert proxy.requests == []


@pytest.mark.parametrize("switch", ["true", "True", "TRUE"])
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
# Names

AWS = Cloud("s3", "i-0123456789abcdef0", "eu-west-1")
MACHINE = "0123456789abcdef0123456789abcdef"


def test_a_node_is_its_host_and_its_instance() -> None:
    assert name_node(AWS, "db1.example.org", MACHINE) == "db1.example.org-i-0123456789abcdef0"


def test_off_cloud_a_node_is_its_host_and_the_beginning_of_its_machine_id() -> None:
    assert name_node(None, "db1.example.org.", MACHINE + "\n") == "db1.example.org-0123456789ab"


@pytest.mark.parametrize(
    "host",
    ["", " ", ".", "localhost", "localhost.", "localhost.localdomain", "-db1", "db/1", "../db1", "a b", "db\n1", "é",
     "x" * 255, "db1\0", "db%1", "db1\x1b[31m"],
)  # fmt: skip
def test_a_host_name_that_names_no_node_is_refused(host: str) -> None:
    for cloud in (AWS, None):
        with pytest.raises(Usage) as refused:
            name_node(cloud, host, MACHINE)
        assert refused.value.code == 2
        assert refused.value.hint


def test_without_any_id_a_node_has_no_name() -> None:
    with pytest.raises(Usage, match="--name"):
        name_node(None, "db1", "")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-x", "a/b", "a b", "a\nb", "a\n", "a\0", "é", "x" * 201, "x" * 255, "a%b", "a*b", "node1.listings",
     "node1.condemned", "s3://x"],
)  # fmt: skip
def test_a_name_that_cannot_be_one_component_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(Usage) as refused:
        check_node(name)
    assert refused.value.code == 2


@given(some.text(max_size=220))
def test_a_name_is_refused_or_stays_as_it_is(name: str) -> None:
    with contextlib.suppress(Usage):
        assert check_node(name) == name
        assert 0 < len(name.encode()) <= 200
        assert "/" not in name


# ------------------------------------------------------------------------------------------------------------
# Identity: decided once, then remembered


Once = Callable[..., int]


@pytest.fixture
def once(script: Path, home: Path, node: Node, tmp_bucket: FileBucket, tmp_path: Path) -> Once:
    """Return a function that runs `watch --once` on a host of some name and returns the exit code."""
    if subprocess.run(["unshare", "-rum", "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no namespaces here, so the host keeps its name")
    table, hosts = node.table("ks1", "users"), tmp_path / "hosts"

    def run(environ: dict[str, str], *more: str, host: str = "db1", address: str = "127.0.1.1 {}") -> int:
        table.flush()
        hosts.write_text(f"127.0.0.1 localhost\n{address.format(host)}\n")
        arguments = [*map(str, node.data_dirs), "--bucket", tmp_bucket.target, "--state-dir", str(tmp_path / "state")]
        command = shlex.join([sys.executable, str(script), "watch", "--once", *arguments, *more])
        named = f"hostname {host} && mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec {command}"
        done = subprocess.run(
            ["unshare", "-rum", "sh", "-c", named],
            check=False, env=clean_environ(home, environ), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
        print(done.stderr)
        return done.returncode

    return run


def nodes_of(bucket: Bucket) -> set[str]:
    """Return the names of the nodes that have listings in a bucket."""
    return {key.split(".listings/")[0] for key in bucket.tags() if ".listings/" in key}


@pytest.mark.slow
def test_a_failed_detection_changes_nothing(once: Once, metadata: Metadata, tmp_bucket: FileBucket) -> None:
    fake = metadata("aws", "i-1111")
    assert once(fake.environ) == 0
    assert nodes_of(tmp_bucket) == {"db1-i-1111"}
    fake.cloud = "none"
    assert once(fake.environ) == 0
    assert nodes_of(tmp_bucket) == {"db1-i-1111"}


@pytest.mark.slow
def test_another_host_name_is_the_same_node_and_another_instance_is_not(
    once: Once, metadata: Metadata, tmp_bucket: FileBucket
) -> None:
    fake = metadata("aws", "i-1111")
    assert once(fake.environ) == 0
    assert once(fake.environ, host="db2") == 0
    assert nodes_of(tmp_bucket) == {"db1-i-1111"}
    fake.instance_id = "i-2222"
    assert once(fake.environ, host="db2") == 0
    assert nodes_of(tmp_bucket) == {"db1-i-1111", "db2-i-2222"}


def test_a_host_that_hosts_file_calls_localhost_first_keeps_its_name(
    once: Once, metadata: Metadata, tmp_bucket: FileBucket
) -> None:
    """Common in images and containers: 127.0.0.1 localhost db1. The host is called db1 all the same."""
    assert once(metadata("aws", "i-1111").environ, address="127.0.0.1 localhost {}") == 0
    assert nodes_of(tmp_bucket) == {"db1-i-1111"}


@pytest.mark.slow
def test_a_given_name_needs_no_detection(once: Once, metadata: Metadata, tmp_bucket: FileBucket) -> None:
    fake = metadata("aws", "i-1111")
    assert once(fake.environ, "--name", "chosen") == 0
    assert nodes_of(tmp_bucket) == {"chosen"}


def test_a_host_called_localhost_needs_a_name(once: Once, metadata: Metadata) -> None:
    assert once(metadata("aws", "i-1111").environ, host="localhost", address="# {}") == 2


@pytest.mark.parametrize("name", ["a/b", "", "..", "a\nb", "x" * 255])
def test_a_bad_name_is_wrong_usage(run_cassbackup: Run, node: Node, tmp_bucket: FileBucket, name: str) -> None:
    node.table("ks1", "users")
    options = ["--once", "--bucket", tmp_bucket.target, "--name", name, "--state-dir", tmp_bucket.root.parent / "state"]
    done = run_cassbackup("watch", *node.data_dirs, *options)
    if name:
        assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert name not in nodes_of(tmp_bucket) or name == "a"
