"""The result, written after each row: JSON, one Markdown table with ratios first, and a picture if matplotlib is there."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from measure import Figure, Row

PLOT = """
import json, sys, matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
rows = [(row, f) for row in json.load(open(sys.argv[1]))["rows"] for f in row["figures"] if f["unit"] == "\\u00d7"]
figure, axes = pyplot.subplots(figsize=(10, 1 + 0.3 * len(rows)))
for place, (row, f) in enumerate(rows):
    axes.barh(place, f["value"], color="tab:blue" if f["met"] else "tab:red")
    axes.plot(f["spread"], [place, place], color="black")
    if f["limit"]:
        axes.plot([f["limit"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
axes.axvline(1, color="grey")
axes.set_yticks(range(len(rows)), [f"{row['work'].split(' (')[0]}, {row['server']}: {f['name']}" for row, f in rows])
axes.invert_yaxis()
axes.set_xlabel("multiple of theirs; black: range of the pairs, and the goal")
figure.savefig(sys.argv[2], dpi=100, bbox_inches="tight")
"""


def number(value: float) -> str:
    """Return a number with as many digits as mean something."""
    if value == int(value) and abs(value) >= 10 or value == 0:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def figure_text(figure: Figure) -> str:
    """Return a figure as the table shows it; bold where it misses its goal."""
    text = number(figure.value) + (figure.unit if figure.unit in ("×", "%") else f" {figure.unit}".rstrip())
    if not figure.is_met:
        text = f"**{text}**"
    if figure.spread:
        text += f" [{number(figure.spread[0])}–{number(figure.spread[1])}]"
    return f"{text} {figure.name}" if figure.unit == "×" else f"{figure.name} {text}"


def goal_text(figure: Figure) -> str:
    if figure.limit is None:
        return ""
    return ("≥ " if figure.at_least else "≤ ") + number(figure.limit)


def line(row: Row) -> str:
    """Return a row of the Markdown table."""
    figures = "<br>".join(figure_text(figure) for figure in row.figures)
    goals = "<br>".join(goal_text(figure) for figure in row.figures)
    return f"| {row.work} | {figures} | {goals} | {row.server} | {row.beside} |"


class Report:
    """What was measured so far. A run that is broken off leaves what it had."""

    def __init__(self, out: Path, version: str, words: str) -> None:
        self.out = out
        memory = int(Path("/proc/meminfo").read_text().split()[1]) // (1 << 20)
        self.about = {
            "cassbackup": version,
            "command": f"python bench/bench.py {words}".strip(),
            "when": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "machine": f"{os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}, Python {platform.python_version()}",
            "load before": os.getloadavg()[0],
        }
        self.rows: list[tuple[str, Row]] = []

    def add(self, name: str, row: Row) -> None:
        """Print a row, and write all that there are."""
        self.rows.append((name, row))
        print(line(row).replace("<br>", "; "), flush=True)
        document = {**self.about, "rows": [{"row": name, **self._as_json(row)} for name, row in self.rows]}
        self.out.with_suffix(".json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        head = "| work | measured | goal | server | beside it |\n|---|---|---|---|---|\n"
        about = "".join(f"{key}: {value}  \n" for key, value in self.about.items())
        table = "".join(f"{line(row)}\n" for _, row in self.rows)
        self.out.with_suffix(".md").write_text(f"{about}\n{head}{table}")

    def _as_json(self, row: Row) -> dict[str, object]:
        figures = [{**asdict(figure), "met": figure.is_met} for figure in row.figures]
        return {**asdict(row), "figures": figures}

    def plot(self) -> None:
        """Draw the ratios, where matplotlib is there; in a process of its own, since it takes memory."""
        argv = [sys.executable, "-c", PLOT, str(self.out.with_suffix(".json")), str(self.out.with_suffix(".png"))]
        if self.rows and subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode:
            print("no picture: pip install matplotlib", flush=True)
