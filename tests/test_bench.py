"""The bench, at a tenth of its size: that it runs, compares what arrived, and tells it in both forms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, clean_environ


@pytest.mark.by_hand
def test_a_quick_bench_writes_its_figures_as_json_and_as_a_table(tmp_path: Path) -> None:
    words = ["--quick", "--pairs", "1", "--scratch", str(tmp_path), "--out", str(tmp_path / "result")]
    command = [sys.executable, str(REPOSITORY / "bench" / "bench.py"), "file", "start", *words]
    done = subprocess.run(
        command, check=False, env=clean_environ(tmp_path, {}), capture_output=True, text=True, timeout=250
    )

    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "result.json").read_text())
    assert [row["row"] for row in document["rows"]] == ["file", "start"]
    assert all(figure["value"] > 0 for row in document["rows"] for figure in row["figures"])
    table = (tmp_path / "result.md").read_text()
    assert "| backup of 820 small files |" in table
    assert "| start on 10,050 listed files |" in table
    assert not list(tmp_path.glob(".bench-*")), "it leaves its files behind"
