"""The table of rows is whole: each row is there, and each test that it names is, too."""

from __future__ import annotations

from faults.rows import ROWS, is_of
from faults.scorecard import all_tests


def test_every_row_names_all_tests() -> None:
    tests = all_tests()
    assert list(ROWS) == list(range(1, 52))
    patterns = {(number, pattern) for number, row in ROWS.items() for pattern in row.tests}
    assert [one for one in sorted(patterns) if not any(is_of(one[1], test) for test in tests)] == []
