"""The table of rows is whole: each row is there, and each test that it names is, too."""

from __future__ import annotations

import subprocess
import sys

from faults.rows import ROWS, is_of
from faults.scorecard import REPOSITORY, all_tests, named_tests


def test_every_row_names_all_tests() -> None:
    tests = all_tests()
    assert list(ROWS) == list(range(1, 52))
    patterns = {(number, pattern) for number, row in ROWS.items() for pattern in row.tests}
    assert [one for one in sorted(patterns) if not any(is_of(one[1], test) for test in tests)] == []


def test_pytest_finds_each_test_that_is_run_for_the_scorecard() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *named_tests()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
