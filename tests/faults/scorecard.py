"""What `make scorecard` runs, and how it tells what became of it.

python -m faults.scorecard tests              the tests that the rows name, for pytest
python -m faults.scorecard show JUNIT SCORE   the scorecard of a run
"""

from __future__ import annotations

import ast
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from faults.rows import ROWS, is_of

REPOSITORY = Path(__file__).resolve().parents[2]


def all_tests() -> list[str]:
    """Return every test as tests/x.py::test_name, or tests/x.py::TestClass::test_name."""
    found = []
    for path in sorted((REPOSITORY / "tests").glob("**/test_*.py")):
        scopes = [("", ast.parse(path.read_text()).body)]
        scopes += [(f"{node.name}::", node.body) for node in scopes[0][1] if isinstance(node, ast.ClassDef)]
        for scope, body in scopes:
            names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
            found += [f"{path.relative_to(REPOSITORY)}::{scope}{name}" for name in names if name.startswith("test_")]
    return found


def named_tests() -> list[str]:
    """Return the engines, and every other test that a row names."""
    patterns = {pattern for row in ROWS.values() for pattern in row.tests}
    others = [test for test in all_tests() if any(is_of(pattern, test) for pattern in patterns)]
    return ["tests/faults", *(test for test in others if not test.startswith("tests/faults"))]


def results(junit: Path) -> dict[str, tuple[str, str]]:
    """Return of each test of a run: passed, failed or skipped, and why."""
    found = {}
    for case in ET.parse(junit).iter("testcase"):
        module, _, scope = case.get("classname", "").removeprefix("tests.").partition(".Test")
        file = f"tests/{module.replace('.', '/')}.py"
        name = f"Test{scope}::{case.get('name')}" if scope else case.get("name")
        state, why = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                state = "failed"
            elif child.tag == "skipped" and state == "passed":
                state, why = "skipped", child.get("message", "")
        found[f"{file}::{name}"] = (state, why)
    return found


def row_states(found: dict[str, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """Return of each row: holds, fails or not run, and why."""
    states = {}
    for number, row in ROWS.items():
        each = [[(test, *found[test]) for test in found if is_of(pattern, test)] for pattern in row.tests]
        failed = [test for some in each for test, state, _ in some if state == "failed"]
        skipped = [why for some in each for _, state, why in some if state == "skipped"]
        absent = [pattern for pattern, some in zip(row.tests, each, strict=True) if not some]
        if failed:
            states[number] = ("FAILS", failed[0])
        elif skipped or absent:
            states[number] = ("not run", (skipped or absent)[0])
        else:
            states[number] = ("holds", "")
    return states


def percentile(values: list[float], part: float) -> float:
    """Return the value below which so many per cent lie; nan where there are none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part / 100))] if values else float("nan")


def lines(junit: Path, scores: Path) -> Iterator[str]:
    """Yield the scorecard."""
    states = row_states(results(junit))
    noted = [json.loads(line) for line in scores.read_text().splitlines()]

    def total(name: str) -> float:
        return sum(one.get(name, 0) for one in noted)

    def lag(name: str) -> str:
        values = [value for one in noted for value in one.get(name, ())]
        return f"{percentile(values, 50):.1f} s / {percentile(values, 99):.1f} s"

    yield f"rows that hold                 {sum(state == 'holds' for state, _ in states.values())} of {len(states)}"
    yield f"kill points tried / survived   {total('kill_points'):.0f} / {total('kill_points_survived'):.0f}"
    yield f"fault cases                    {total('fault_cases'):.0f}"
    yield f"model steps                    {total('model_steps'):.0f}"
    yield f"soak                           {total('soak_minutes'):.0f} min"
    yield f"mutants caught                 {total('mutants'):.0f} of 20"
    yield f"files lost                     {total('lost'):.0f}"
    yield f'false "done"                   {total("false_done"):.0f}'
    yield f"lag by event, p50 / p99        {lag('lag_event')}"
    yield f"lag by scan alone, p50 / p99   {lag('lag_scan')}"
    for number, (state, why) in states.items():
        if state != "holds":
            yield f"row {number:2} {state}: {ROWS[number].fault} ({why})"


def main() -> None:
    """Do what is asked for."""
    if sys.argv[1] == "tests":
        print("\n".join(named_tests()))
    else:
        print("\n".join(lines(Path(sys.argv[2]), Path(sys.argv[3]))))


if __name__ == "__main__":
    main()
