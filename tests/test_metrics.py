"""Metrics: what a scrape and the textfile say, that they never stop a backup, and the alerts that are shipped."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, Daemon, Run
from prometheus_client.parser import text_string_to_metric_families
from scene import IMPATIENT, Scene, wait_for
from servers import FileBucket, free_port
from tree import Node

import cassbackup

ALERTS = REPOSITORY / "debian" / "alerts.yml"
DASHBOARD = REPOSITORY / "debian" / "grafana-dashboard.json"
HANDBOOK = REPOSITORY / "debian" / "handbook.md"
Numbers = dict[tuple[str, str], float]  # (name, its labels' values in the order of their names): value
TAKEN = "cassbackup_table_last_snapshot_timestamp_seconds"


@pytest.fixture
def scene(tmp_path: Path, daemon: Callable[..., Daemon], run_cassbackup: Run, tmp_bucket: FileBucket) -> Scene:
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


def read(page: str) -> Numbers:
    """Parse a page of metrics; fail if a series is there twice."""
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    keys = [(one.name, " ".join(one.labels[name] for name in sorted(one.labels))) for one in samples]
    assert len(keys) == len(set(keys))
    return {key: one.value for key, one in zip(keys, samples, strict=True)}


class Scraped:
    """A daemon whose metrics are asked for."""

    def __init__(self, scene: Scene, node: Node, *args: object, host: str = "127.0.0.1") -> None:
        port = free_port()
        self.url = f"http://{host}:{port}/metrics"
        self.daemon = scene.start(*node.data_dirs, args=("--metrics-listen", f"{host}:{port}", *args))
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            return bool(self())
        except OSError:  # the port is opened once the node's name is clear
            return False

    def __call__(self) -> Numbers:
        with urllib.request.urlopen(self.url, timeout=100) as reply:
            return read(reply.read().decode())


# ------------------------------------------------------------------------------------------------------------
# What a scrape says


def test_a_scrape_says_what_the_status_says_and_its_counters_grow(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scrape = Scraped(scene, node)
    node.snapshot("daily")
    page = scene.settled()
    first = scrape()
    assert first["cassbackup_build_info", page["version"]] == 1
    for name, value in {
        "sent_files_total": page["sent"]["files"],
        "sent_bytes_total": page["sent"]["bytes"],
        "found_files_total": page["counts"]["found"],
        "listings_total": page["counts"]["listings"],
        "lost_files_total": 0,
        "pending_files": 0,
        "lag_seconds": 0,
        "failing": 0,
        "data_directories_absent": 0,
        "filters_unmatched": 0,
        "refused_directories": 0,
        "bad_objects": 0,
        "last_verify_timestamp_seconds": 0,
        "store_failing_since_timestamp_seconds": 0,
    }.items():
        assert (name, first[f"cassbackup_{name}", ""]) == (name, value)
    assert page["started"] < first[TAKEN, "ks1 users"] < first["cassbackup_written_timestamp_seconds", ""]
    assert not [labels for name, labels in first if "oldest_unlisted" in name]
    puts = first["cassbackup_store_request_duration_seconds_count", "put"]
    assert first["cassbackup_store_request_duration_seconds_bucket", "+Inf put"] == puts > 0
    assert first["cassbackup_store_request_duration_seconds_sum", "put"] > 0
    users.flush()
    scene.settled()
    later = scrape()
    for name in ("cassbackup_sent_files_total", "cassbackup_found_files_total", "cassbackup_listings_total"):
        assert later[name, ""] > first[name, ""]
    assert later["cassbackup_store_request_duration_seconds_count", "put"] > puts


def test_every_table_has_one_series_whatever_it_is_called(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    node.snapshot("daily")
    users.directories()[0].with_name("users-" + "ab" * 16).mkdir()  # dropped without a snapshot, and made again
    odd = os.fsencode(node.data_dirs[0]) + b'/odd"\\\n\xff/t\xc3\xa9-' + b"cd" * 16
    os.makedirs(odd)
    Path(os.fsdecode(odd), "nb-1-big-Data.db").touch()
    node.table("ks1", "empty")  # which needs no snapshot
    scrape = Scraped(scene, node)
    wait_for(lambda: any(name == TAKEN for name, _ in scrape()))
    scene.settled()
    series = {labels: value for (name, labels), value in scrape().items() if name == TAKEN}
    assert set(series) == {"ks1 users", 'odd"\\%0A%FF té'}
    assert series["ks1 users"] > 0


def test_a_store_that_is_away_shows_at_once_and_no_scrape_fails_meanwhile_p8(scene: Scene, node: Node) -> None:
    users = node.table("ks1", "users")
    users.flush()
    scrape = Scraped(scene, node)
    scene.settled()
    bucket = scene.at / "bucket"
    bucket.rename(scene.at / "away")
    bucket.write_text("not mounted")
    users.flush()
    unlisted = ("cassbackup_table_oldest_unlisted_timestamp_seconds", "ks1 users")
    wait_for(lambda: unlisted in scrape() and scrape()["cassbackup_lag_seconds", ""] > 0)
    wait_for(lambda: scrape()["cassbackup_failing", ""] == 1)
    away = scrape()
    assert [name for (name, _), value in away.items() if name == "cassbackup_store_errors_total" and value]
    since = away["cassbackup_store_failing_since_timestamp_seconds", ""]
    assert scene.page()["started"] < since < away["cassbackup_written_timestamp_seconds", ""]
    assert away["cassbackup_pending_units", ""] > 0
    bucket.unlink()
    (scene.at / "away").rename(bucket)
    scene.settled()
    assert unlisted not in scrape()
    wait_for(lambda: scrape()["cassbackup_failing", ""] == 0)
    assert scrape()["cassbackup_store_failing_since_timestamp_seconds", ""] == 0


def test_a_data_directory_that_is_gone_and_a_filter_that_matches_nothing_show_p8(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    scrape = Scraped(scene, node, "--exclude-keyspace", "shpo", "--reconcile", "1s")
    wait_for(lambda: scrape()["cassbackup_filters_unmatched", ""] == 1)
    node.data_dirs[0].rename(node.root / "off")
    wait_for(lambda: scrape()["cassbackup_data_directories_absent", ""] == 1)


def test_an_address_of_ipv6_works(scene: Scene, node: Node) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    assert Scraped(scene, node, host="[::1]")()["cassbackup_failing", ""] == 0


# ------------------------------------------------------------------------------------------------------------
# The textfile


def textfile_of_once(scene: Scene, node: Node) -> Path:
    """Run --once, and return the textfile that it left."""
    path = scene.at / "cassbackup.prom"
    options = ["--bucket", scene.bucket.target, "--state-dir", scene.state, "--name", "node1", *IMPATIENT]
    scene.run("watch", *node.data_dirs, "--once", *options, "--metrics-textfile", str(path), check=0)
    return path


def test_once_leaves_a_textfile_that_says_what_it_did(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    node.snapshot("daily")
    found = read(textfile_of_once(scene, node).read_text())
    assert found["cassbackup_sent_files_total", ""] == len(scene.file_keys())
    assert found[TAKEN, "ks1 users"] > 0
    assert not [name for name, _ in found if not name.startswith("cassbackup_")]  # node_exporter has its own process_*
    assert [one.name for one in scene.at.glob("cassbackup.prom*")] == ["cassbackup.prom"]


# ------------------------------------------------------------------------------------------------------------
# What cannot be shown is red, and the backup goes on


def errors(scene: Scene) -> str:
    return json.dumps(scene.page()["errors"])


def test_a_port_that_is_taken_is_red_and_tried_again_and_files_are_stored_meanwhile_p8(
    scene: Scene, node: Node
) -> None:
    node.table("ks1", "users").flush()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        scene.start(*node.data_dirs, args=("--metrics-listen", f":{port}"))
        scene.daemon.wait_until(lambda: "Address already in use" in errors(scene))
        scene.settled()
        scene.assert_all_is_listed(node.history)
    scene.daemon.wait_until(lambda: "Address already in use" not in errors(scene))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=100) as reply:
        assert read(reply.read().decode())["cassbackup_failing", ""] == 0


def test_who_connects_and_says_nothing_is_not_waited_for(scene: Scene, node: Node) -> None:
    """Each would keep a thread and a descriptor, until there is none left for a pin."""
    node.table("ks1", "users").flush()
    scraped = Scraped(scene, node)
    place = urllib.parse.urlsplit(scraped.url)
    with socket.create_connection((str(place.hostname), int(place.port or 0))) as silent:
        silent.settimeout(60)
        assert silent.recv(1) == b""
    assert scraped()


def test_a_textfile_that_cannot_be_written_for_a_while_is_red_and_written_later_p8(scene: Scene, node: Node) -> None:
    folder = scene.at / "textfiles"
    path = folder / "cassbackup.prom"
    node.table("ks1", "users").flush()
    scraped = Scraped(scene, node, "--metrics-textfile", path)
    scene.daemon.wait_until(lambda: str(folder) in errors(scene))
    assert scraped()["cassbackup_failing", ""] == 1, "who scrapes is told, though nobody can write that file"
    scene.settled()
    folder.mkdir()
    scene.daemon.wait_until(path.exists)
    assert read(path.read_text())["cassbackup_pending_units", ""] == 0


def test_without_the_library_the_cure_is_named_and_files_are_stored_p8(scene: Scene, node: Node) -> None:
    stub = scene.at / "without"
    stub.mkdir()
    (stub / "prometheus_client.py").write_text('raise ImportError("No module named prometheus_client")\n')
    scene.environ = {"PYTHONPATH": str(stub)}
    node.table("ks1", "users").flush()
    scene.start(*node.data_dirs, args=("--metrics-listen", ":0"))
    scene.daemon.wait_until(lambda: "apt install python3-prometheus-client" in errors(scene))
    scene.settled()
    scene.assert_all_is_listed(node.history)


@pytest.mark.parametrize("address", ["9810", "localhost", ":http", "::1:9810", "[::1]", ":65536", "a:b:1"])
def test_an_address_that_cannot_be_read_is_named(scene: Scene, node: Node, address: str) -> None:
    options = ("--bucket", scene.bucket.target, "--name", "node1", "--state-dir", scene.state)
    done = scene.run("watch", *node.data_dirs, "--once", *options, "--metrics-listen", address, check=2)
    assert f"--metrics-listen {address!r} cannot be read" in done.stderr
    assert "[HOST]:PORT" in done.stderr


# ------------------------------------------------------------------------------------------------------------
# The alerts, and what is said of them


def promtool(*args: object) -> subprocess.CompletedProcess[str]:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (apt-get install prometheus)")
    return subprocess.run(["promtool", *map(str, args)], check=False, capture_output=True, text=True, timeout=240)


def alerts() -> dict[str, str]:
    """Return the text of each alert."""
    parts = re.split(r"- alert: (\w+)\n", ALERTS.read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def names_in(path: Path) -> set[str]:
    """Return the metrics that a file names."""
    return {name for name in re.findall(r"cassbackup_[a-z]\w+", path.read_text(encoding="utf-8")) if name[-1] != "_"}


def test_what_alerts_dashboard_and_readme_name_exists(scene: Scene, node: Node) -> None:
    node.table("ks1", "users").flush()
    families = [*text_string_to_metric_families(textfile_of_once(scene, node).read_text())]
    names = {sample.name for family in families for sample in family.samples}
    names |= {family.name + "_total" * (family.type == "counter") for family in families}  # also those without a series
    assert len(names_in(ALERTS)) > 10
    assert names_in(ALERTS) - names == set()
    assert names_in(DASHBOARD) - names == set()
    assert names_in(REPOSITORY / "README.md") - names == set()


def test_the_handbook_explains_every_metric_and_every_alert() -> None:
    handbook = HANDBOOK.read_text(encoding="utf-8")
    explained = set(re.findall(r"`([a-z_]+)`", handbook.partition("# METRICS")[2].partition("# ALERTS")[0]))
    shipped = {name.removeprefix("cassbackup_") for name in names_in(ALERTS) | names_in(DASHBOARD)}
    assert {name.removesuffix("_bucket") for name in shipped} - explained == set()
    assert {name for name, *_ in cassbackup._METRICS} - explained == set()
    assert [alert for alert in alerts() if f"**{alert}**" not in handbook] == []


def test_every_alert_says_what_to_do() -> None:
    assert len(alerts()) == 11
    for text in alerts().values():
        assert re.search(r"severity: (warning|critical)\n", text)
        assert re.search(r"summary: \"[^\"]+\$labels.instance", text)
        assert re.search(r"description: \"[^\"]{80,}\"", text)


def test_promtool_finds_nothing_wrong_with_the_alerts_and_the_textfile(scene: Scene, node: Node) -> None:
    checked = promtool("check", "rules", ALERTS)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    node.table("ks1", "users").flush()
    page = textfile_of_once(scene, node).read_text()
    done = subprocess.run(["promtool", "check", "metrics"], check=False, input=page, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_promtool_understands_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions)]
    file = tmp_path / "rules.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr


LABELS = {"up": 'job="cassbackup"', "cassbackup_build_info": 'version="1"', TAKEN: 'keyspace="k",table="t"'}
HEALTHY = {  # thirty hours, a value every three minutes
    "up": "1+0x600",
    "cassbackup_build_info": "1+0x600",
    "cassbackup_written_timestamp_seconds": "0+180x600",
    "cassbackup_started_timestamp_seconds": "1+0x600",
    "cassbackup_last_scan_timestamp_seconds": "0+180x600",
    "cassbackup_settings_wrong": "0+0x600",
    "cassbackup_lost_tables": "0+0x600",
    "cassbackup_lag_seconds": "100+0x600",
    TAKEN: "0+180x600",
    "cassbackup_failing": "0+0x600",
    "cassbackup_pinned_alone_bytes": "10+0x600",
    "cassbackup_pinned_alone_limit_bytes": "100+0x600",
    "cassbackup_data_directories_absent": "0+0x600",
    "cassbackup_filters_unmatched": "0+0x600",
    "cassbackup_refused_directories": "0+0x600",
    "cassbackup_bad_objects": "0+0x600",
    "cassbackup_last_verify_timestamp_seconds": "0+180x600",
    "cassbackup_digest_mismatches_total": "3+0x600",
    "cassbackup_lost_files_total": "3+0x600",
    "cassbackup_vanished_files_total": "3+0x600",
}
SICK = [
    ("", {}),
    ("CassbackupAbsent", {"up": "0+0x600"}),
    ("CassbackupAbsent", {"cassbackup_written_timestamp_seconds": "0+180x580 104400+0x20"}),
    ("CassbackupAbsent", {"cassbackup_build_info": "1+0x400"}),
    ("CassbackupAbsent", {"cassbackup_started_timestamp_seconds": "0+180x600"}),  # each of them lives for minutes
    ("", {"cassbackup_started_timestamp_seconds": "1+0x590 106200+0x10"}),
    ("CassbackupBehind", {"cassbackup_lag_seconds": "0+3x600"}),
    ("CassbackupNoRecentSnapshot", {TAKEN: "1+0x600"}),
    ("CassbackupNeverSnapshotted", {TAKEN: "0+0x600"}),
    ("", {TAKEN: "_x500 0+0x100"}),  # made only hours ago
    ("CassbackupFailing", {"cassbackup_failing": "0+0x580 1+0x20"}),
    ("", {"cassbackup_failing": "0+0x598 1+0x2"}),
    ("CassbackupProtectsLess", {"cassbackup_data_directories_absent": "1+0x600"}),
    ("CassbackupProtectsLess", {"cassbackup_filters_unmatched": "2+0x600"}),
    ("CassbackupProtectsLess", {"cassbackup_refused_directories": "1+0x600"}),
    ("CassbackupProtectsLess", {"cassbackup_settings_wrong": "1+0x600"}),
    ("CassbackupProtectsLess", {"cassbackup_last_scan_timestamp_seconds": "0+180x550 99000+0x50"}),
    ("CassbackupPinsFilling", {"cassbackup_pinned_alone_bytes": "60+0x600"}),
    ("CassbackupBadObjects", {"cassbackup_bad_objects": "0+0x598 1+0x2"}),
    ("CassbackupVerifyOverdue", {"cassbackup_last_verify_timestamp_seconds": "-900000+0x600"}),
    ("CassbackupDigestMismatch", {"cassbackup_digest_mismatches_total": "3+0x580 4+0x20"}),
    ("CassbackupFilesLost", {"cassbackup_lost_files_total": "3+0x580 4+0x20"}),
    ("CassbackupFilesLost", {"cassbackup_vanished_files_total": "3+0x580 4+0x20"}),
    ("CassbackupFilesLost", {"cassbackup_lost_tables": "1+0x600"}),
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
