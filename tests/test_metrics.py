"""Metrics: what a scrape and the textfile say, what ends with exit 2, and the alerts that are shipped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, Daemon, Run
from prometheus_client.parser import text_string_to_metric_families
from scene import SETTLE, Scene, wait_for
from servers import FileBucket
from tree import Node

import cassbackup

ALERTS = REPOSITORY / "debian" / "alerts.yml"
Numbers = dict[tuple[str, str], float]  # (name, its labels' values in the order of their names): value


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


def read(page: str) -> Numbers:
    """Parse a page of metrics; fail if a series is there twice."""
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    keys = [(one.name, " ".join(one.labels[name] for name in sorted(one.labels))) for one in samples]
    assert len(keys) == len(set(keys))
    return {key: one.value for key, one in zip(keys, samples, strict=True)}


def scrape(daemon: Daemon) -> Numbers:
    """Ask the daemon last started, at the port that its log names."""
    urls = re.findall(r"metrics at (http://\S+)", daemon.log())
    with urllib.request.urlopen(urls[-1], timeout=100) as reply:
        return read(reply.read().decode())


def start(scene: Scene, node: Node, *args: object) -> Daemon:
    return scene.start(*node.data_dirs, args=("--metrics-listen", ":0", *args))


# ------------------------------------------------------------------------------------------------------------
# What a scrape says


def test_a_scrape_says_what_the_status_says_and_its_counters_grow(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    daemon = start(scene, node)
    node.snapshot("daily")
    page = scene.settled()
    first = scrape(daemon)
    assert first["cassbackup_build_info", cassbackup.__version__] == 1
    for name, value in {
        "sent_files_total": page["sent"]["files"],
        "sent_bytes_total": page["sent"]["bytes"],
        "found_files_total": page["counts"]["found"],
        "listings_total": page["counts"]["listings"],
        "lost_files_total": 0,
        "pending_files": 0,
        "lag_seconds": 0,
        "failing": 0,
        "pin_area_full": 0,
        "store_failing_since_timestamp_seconds": 0,
    }.items():
        assert (name, first[f"cassbackup_{name}", ""]) == (name, value)
    taken = first["cassbackup_table_last_snapshot_timestamp_seconds", "ks1 users"]
    assert page["started"] < taken < first["cassbackup_written_timestamp_seconds", ""]
    assert not [labels for name, labels in first if "oldest_unlisted" in name]
    puts = first["cassbackup_store_request_duration_seconds_count", "put"]
    assert puts >= page["sent"]["files"]
    assert first["cassbackup_store_request_duration_seconds_bucket", "+Inf put"] == puts
    assert first["cassbackup_store_request_duration_seconds_sum", "put"] > 0
    users.flush()
    scene.settled()
    later = scrape(daemon)
    for name in ("cassbackup_sent_files_total", "cassbackup_found_files_total", "cassbackup_listings_total"):
        assert later[name, ""] > first[name, ""]
    assert later["cassbackup_store_request_duration_seconds_count", "put"] > puts


def test_every_table_has_one_series_whatever_it_is_called(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    old = node.table("ks1", "users").directories()[0]
    again = old.with_name("users-" + "ab" * 16)  # dropped without a snapshot, and made again
    again.mkdir()
    os.makedirs(os.fsencode(node.data_dirs[0]) + b'/odd"\\\n\xff/t\xc3\xa9-' + b"cd" * 16)
    daemon = start(scene, node)
    scene.settled()
    found = {labels for name, labels in scrape(daemon) if name == "cassbackup_table_last_snapshot_timestamp_seconds"}
    assert found == {"ks1 users", 'odd"\\%0A%FF té'}
    assert scrape(daemon)["cassbackup_table_last_snapshot_timestamp_seconds", "ks1 users"] > 0


def test_a_store_that_is_away_shows_at_once_and_no_scrape_fails_meanwhile(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    start(scene, node)
    scene.settled()
    scene.daemon.kill()
    bucket = scene.at / "bucket"
    bucket.rename(scene.at / "away")
    bucket.write_text("not mounted")
    daemon = scene.daemon.start()
    daemon.wait_until(lambda: daemon.log().count("metrics at ") == 2)
    assert scrape(daemon)["cassbackup_build_info", cassbackup.__version__] == 1  # while it asks for the node's owner
    scene.until_it_watches()
    users.flush()
    unlisted = ("cassbackup_table_oldest_unlisted_timestamp_seconds", "ks1 users")
    wait_for(lambda: unlisted in scrape(daemon) and scrape(daemon)["cassbackup_lag_seconds", ""] > 0)
    wait_for(lambda: [name for (name, _), value in scrape(daemon).items() if "store_errors_total" in name and value])
    away = scrape(daemon)
    assert away["cassbackup_failing", ""] == 1
    since = away["cassbackup_store_failing_since_timestamp_seconds", ""]
    assert scene.page()["started"] < since < away["cassbackup_written_timestamp_seconds", ""]
    assert away["cassbackup_pending_units", ""] > 0
    bucket.unlink()
    (scene.at / "away").rename(bucket)
    scene.settled()
    back = scrape(daemon)
    assert unlisted not in back
    assert (back["cassbackup_failing", ""], back["cassbackup_store_failing_since_timestamp_seconds", ""]) == (0, 0)


def test_a_client_that_hangs_or_leaves_disturbs_neither_the_next_scrape_nor_the_log(scene: Scene, node: Node) -> None:
    daemon = start(scene, node)
    port = int(re.findall(r"metrics at http://127.0.0.1:(\d+)", daemon.log())[0])
    with socket.create_connection(("127.0.0.1", port)) as silent, socket.create_connection(("127.0.0.1", port)) as gone:
        silent.sendall(b"GET /metrics")
        gone.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close(2) resets
        gone.close()
        assert scrape(daemon)["cassbackup_failing", ""] == 0
    assert "Traceback" not in daemon.log()


def test_a_crowd_of_clients_takes_few_threads(scene: Scene, node: Node) -> None:
    daemon = start(scene, node)
    port = int(re.findall(r"metrics at http://127.0.0.1:(\d+)", daemon.log())[0])
    before = len(list(Path(f"/proc/{daemon.pid}/task").iterdir()))
    with contextlib.ExitStack() as crowd:
        for _ in range(30):  # six at a time, and a second between, where the daemon is slow to accept them
            crowd.enter_context(socket.create_connection(("127.0.0.1", port)))
        refused = socket.create_connection(("127.0.0.1", port), timeout=8)  # who has a thread is let wait for 10 s
        crowd.enter_context(refused)
        assert refused.recv(1) == b""
        assert len(list(Path(f"/proc/{daemon.pid}/task").iterdir())) < before + 20

    def is_served() -> bool:
        with contextlib.suppress(OSError):  # refused, while the threads have not seen yet that their clients are gone
            return scrape(daemon)["cassbackup_failing", ""] == 0
        return False

    wait_for(is_served)


def test_what_is_found_without_a_hint_is_counted(node: Node, tmp_path: Path) -> None:
    users = node.table("ks1", "users")
    users.flush()
    area = cassbackup.open_area(str(node.data_dirs[0]), str(tmp_path / "pins"))
    watcher = cassbackup.Watcher()
    pinner = cassbackup.Pinner([area], watcher, cassbackup.Filters(), cassbackup.Clock(), lambda _: {}, lambda *_: None)
    try:
        pinner.look_everywhere()
        at_start = pinner.counts["found"]
        assert (at_start > 0, pinner.counts["found_by_rescan"]) == (True, 0)
        users.flush()
        pinner.look_everywhere()  # as after an overflow
        assert pinner.counts["found_by_rescan"] == pinner.counts["found"] - at_start > 0
    finally:
        watcher.close()
        area.close()


# ------------------------------------------------------------------------------------------------------------
# The textfile


def textfile_of_once(scene: Scene, node: Node) -> Path:
    """Run --once under a strict umask, and return the textfile that it left."""
    path = scene.at / "cassbackup.prom"
    options = ["--bucket", scene.bucket.target, "--state-dir", scene.state, "--name", "node1", *SETTLE]
    within = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
    options += ["--metrics-listen", ":0", "--metrics-textfile", str(path)]
    scene.run("watch", *node.data_dirs, "--once", *options, within=within, check=0)
    return path


def test_once_leaves_a_textfile_that_everybody_may_read(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    path = textfile_of_once(scene, node)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    found = read(path.read_text())
    assert found["cassbackup_sent_files_total", ""] == len(scene.file_keys())
    assert found["cassbackup_table_last_snapshot_timestamp_seconds", "ks1 users"] > 0
    assert not [name for name, _ in found if not name.startswith("cassbackup_")]  # node_exporter has its own process_*
    assert [one.name for one in scene.at.glob("cassbackup.prom*")] == ["cassbackup.prom"]


@pytest.mark.slow
def test_a_textfile_that_cannot_be_written_for_a_while_is_named_and_written_later(scene: Scene, node: Node) -> None:
    folder = scene.at / "textfiles"
    folder.mkdir()
    path = folder / "cassbackup.prom"
    daemon = scene.start(*node.data_dirs, args=("--metrics-textfile", path))
    wait_for(path.exists)
    shutil.rmtree(folder)
    daemon.wait_until(lambda: "metrics are not written" in daemon.log())
    folder.mkdir()
    daemon.wait_until(path.exists)
    assert read(path.read_text())["cassbackup_failing", ""] == 0


# ------------------------------------------------------------------------------------------------------------
# What ends with exit 2


@pytest.fixture
def taken() -> Iterator[str]:
    """Return an address at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f":{server.getsockname()[1]}"


def refused(scene: Scene, node: Node, *args: object, **more: object) -> str:
    done = scene.run(
        "watch", *node.data_dirs, "--once", "--bucket", scene.bucket.target, "--name", "node1",
        "--state-dir", scene.state, *args, check=2, **more,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_link_planted_beside_the_textfile_is_not_followed(tmp_path: Path) -> None:
    """P5: the directory may be another user's, and an SSTable what the link leads to."""
    precious = tmp_path / "nb-1-big-Data.db"
    precious.write_bytes(b"rows")
    (tmp_path / "x.prom.tmp").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic"):
        cassbackup.write_whole(str(tmp_path / "x.prom"), b"metrics", durable=False)
    assert precious.read_bytes() == b"rows"


@pytest.mark.parametrize("address", ["9810", "localhost", ":http", "::1:9810", "[::1]", ":65536", "a:b:1"])
def test_an_address_that_cannot_be_read_is_named(scene: Scene, node: Node, address: str) -> None:
    assert f"--metrics-listen {address!r} cannot be read: write [HOST]:PORT" in refused(
        scene, node, "--metrics-listen", address
    ).replace("\n  ", ": ")


def test_an_address_that_is_taken_or_elsewhere_is_named(scene: Scene, node: Node, taken: str) -> None:
    assert f"--metrics-listen {taken}: Address already in use" in refused(scene, node, "--metrics-listen", taken)
    assert "--metrics-listen 192.0.2.1:9810: " in refused(scene, node, "--metrics-listen", "192.0.2.1:9810")


def test_a_textfile_that_node_exporter_would_not_read_is_named(scene: Scene, node: Node) -> None:
    for path in (scene.at / "nowhere" / "cassbackup.prom", scene.at / "cassbackup.txt"):
        assert str(path) in refused(scene, node, "--metrics-textfile", path)


def test_without_the_library_metrics_are_refused_with_what_to_install_and_the_rest_works(
    scene: Scene, node: Node
) -> None:
    stub = scene.at / "without"
    stub.mkdir()
    (stub / "prometheus_client.py").write_text('raise ImportError("No module named prometheus_client")\n')
    env = {"PYTHONPATH": str(stub)}
    for option in (("--metrics-listen", ":0"), ("--metrics-textfile", scene.at / "cassbackup.prom")):
        said = refused(scene, node, *option, env=env)
        assert "apt install python3-prometheus-client" in said
        assert "pip install prometheus-client" in said
    scene.environ = env
    scene.once(*node.data_dirs)


def test_an_address_of_ipv6_works(scene: Scene, node: Node) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    daemon = scene.start(*node.data_dirs, args=("--metrics-listen", "[::1]:0"))
    assert scrape(daemon)["cassbackup_failing", ""] == 0


# ------------------------------------------------------------------------------------------------------------
# The alerts, and what the README says of them


def promtool(*args: object) -> subprocess.CompletedProcess[str]:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (apt-get install prometheus)")
    return subprocess.run(["promtool", *map(str, args)], check=False, capture_output=True, text=True, timeout=60)


def alerts() -> dict[str, str]:
    """Return the text of each alert."""
    parts = re.split(r"- alert: (\w+)\n", ALERTS.read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_metric_is_in_the_readme_and_what_alerts_name_exists(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    families = [*text_string_to_metric_families(textfile_of_once(scene, node).read_text())]
    names = {sample.name for family in families for sample in family.samples}
    names |= {family.name for family in families}  # also of those without a series just now
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"cassbackup_\w+", ALERTS.read_text(encoding="utf-8")) if name[-1] != "_"}
    assert len(named) > 10
    assert named - names == set()
    families_named = {family.name + "_total" * (family.type == "counter") for family in families}
    assert [name for name in sorted(families_named) if f"`{name}" not in readme] == []
    assert [alert for alert in alerts() if alert not in readme] == []


def test_every_alert_says_what_to_do() -> None:
    assert len(alerts()) == 8
    for text in alerts().values():
        assert re.search(r"severity: (warning|critical)\n", text)
        assert re.search(r"summary: \"[^\"]+\$labels.instance", text)
        assert re.search(r"description: \"[^\"]{80,}\"", text)


def test_promtool_finds_nothing_wrong_with_the_alerts_and_the_textfile(scene: Scene, node: Node) -> None:
    checked = promtool("check", "rules", ALERTS)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    page = textfile_of_once(scene, node).read_text()
    done = subprocess.run(["promtool", "check", "metrics"], check=False, input=page, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


SNAPSHOT = "cassbackup_table_last_snapshot_timestamp_seconds"
LABELS = {"up": 'job="cassbackup"', "cassbackup_build_info": 'version="1"', SNAPSHOT: 'keyspace="k",table="t"'}
HEALTHY = {  # thirty hours, a value every three minutes
    "up": "1+0x600",
    "cassbackup_build_info": "1+0x600",
    "cassbackup_written_timestamp_seconds": "0+180x600",
    "cassbackup_lag_seconds": "100+0x600",
    SNAPSHOT: "0+180x600",
    "cassbackup_failing": "0+0x600",
    "cassbackup_pinned_alone_bytes": "10+0x600",
    "cassbackup_pinned_alone_limit_bytes": "100+0x600",
    "cassbackup_pin_area_full": "0+0x600",
    "cassbackup_digest_mismatches_total": "3+0x600",
    "cassbackup_lost_files_total": "3+0x600",
    "cassbackup_vanished_files_total": "3+0x600",
}
SICK = [
    ("", {}),
    ("CassbackupAbsent", {"up": "0+0x600"}),
    ("CassbackupAbsent", {"cassbackup_written_timestamp_seconds": "0+180x580 104400+0x20"}),
    ("CassbackupAbsent", {"cassbackup_build_info": "1+0x400"}),
    ("CassbackupBehind", {"cassbackup_lag_seconds": "0+3x600"}),
    ("CassbackupNoRecentSnapshot", {SNAPSHOT: "1+0x600"}),
    ("CassbackupNeverSnapshotted", {SNAPSHOT: "0+0x600"}),
    ("", {SNAPSHOT: "_x500 0+0x100"}),  # made only hours ago
    ("CassbackupFailing", {"cassbackup_failing": "0+0x580 1+0x20"}),
    ("", {"cassbackup_failing": "0+0x598 1+0x2"}),
    ("CassbackupPinAreaFilling", {"cassbackup_pinned_alone_bytes": "60+0x600"}),
    ("CassbackupPinAreaFilling", {"cassbackup_pin_area_full": "1+0x600"}),
    ("CassbackupDigestMismatch", {"cassbackup_digest_mismatches_total": "3+0x580 4+0x20"}),
    ("CassbackupFilesLost", {"cassbackup_lost_files_total": "3+0x580 4+0x20"}),
    ("CassbackupFilesLost", {"cassbackup_vanished_files_total": "3+0x580 4+0x20"}),
    ("", {"cassbackup_lost_files_total": "3+0x60 4+0x540"}),  # more than a day ago
]


def case(alert: str, changed: dict[str, str]) -> dict[str, object]:
    """Return a test for promtool: what Prometheus saw of one node, and the one alert that fires then, if any."""
    seen = [
        {"series": f'{name}{{instance="db7",{LABELS.get(name, "")}}}', "values": values}
        for name, values in (HEALTHY | changed).items()
    ]
    fires = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "30h",
        "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
    }
    return {"interval": "3m", "input_series": seen, "promql_expr_test": [fires]}


def test_each_alert_fires_for_what_it_is_for_and_a_healthy_node_is_quiet(tmp_path: Path) -> None:
    assert {alert for alert, _ in SICK if alert} == set(alerts())
    file = tmp_path / "tests.yml"  # JSON is YAML
    tests = [case(alert, changed) for alert, changed in SICK]
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "5m", "tests": tests}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
