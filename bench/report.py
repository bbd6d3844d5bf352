"""The result, written after each row: JSON, a Markdown table with ratios first, a picture if matplotlib is there."""

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
axes.axvline(1, color="grey")
axes.set_yticks(range(len(rows)), [f"{row['work'].split(' (')[0]}, {row['server']}: {f['name']}" for row, f in rows])
axes.invert_yaxis()
axes.set_xlabel("multiple of theirs, and the range of the pairs; red misses its goal")
figure.savefig(sys.argv[2], dpi=100, bbox_inches="tight")
"""


def number(value: float) -> str:
    """Return a number with as many digits as mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def figure_text(figure: Figure) -> str:
    """Return a figure as the table shows it; bold where it misses its goal."""
    text = number(figure.value) + (figure.unit if figure.unit in ("×", "%") else f" {figure.unit}".rstrip())
    if not figure.is_met:
        text = f"**{text}**"
    if figure.spread:
        text += f" [{number(figure.spread[0])}–{number(figure.spread[1])}]"
    if figure.limit is not None:
        text += f" (goal {'≥' if figure.at_least else '≤'} {number(figure.limit)})"
    return f"{figure.name}: {text}"


def line(row: Row) -> str:
    """Return a row of the Markdown table."""
    return f"| {row.work} | {'<br>'.join(map(figure_text, row.figures))} | {row.server} | {row.beside} |"


class Report:
    """What was measured so far. A run that is broken off leaves what it had."""

    def __init__(self, out: Path, version: str, words: str) -> None:
        self.out, self.rows = out, list[tuple[str, Row]]()
        memory = int(Path("/proc/meminfo").read_text().split()[1]) // (1 << 20)
        versions = f"Linux {platform.release()}, Python {platform.python_version()}"
        self.about = {
            "measured": version,
            "command": f"python bench/bench.py {words}".strip(),
            "when": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "on": f"{os.cpu_count()} cores, {memory} GiB, {versions}",
            "load before": f"{os.getloadavg()[0]:.1f}",
        }

    def add(self, name: str, row: Row) -> None:
        """Print a row, and write all that there are."""
        self.rows.append((name, row))
        print(line(row).replace("<br>", "; "), flush=True)
        rows = []
        for key, one in self.rows:
            figures = [{**asdict(figure), "met": figure.is_met} for figure in one.figures]
            rows.append({"row": key, **asdict(one), "figures": figures})
        text = json.dumps({**self.about, "rows": rows}, indent=1, ensure_ascii=False)
        self.out.with_suffix(".json").write_text(text + "\n")
        about = "".join(f"{key}: {value}  \n" for key, value in self.about.items())
        table = "".join(f"{line(one)}\n" for _, one in self.rows)
        head = "| work | measured | server | beside it |\n|---|---|---|---|\n"
        self.out.with_suffix(".md").write_text(f"{about}\n{head}{table}")

    def plot(self) -> None:
        """Draw the ratios, where matplotlib is there; in a process of its own, since it takes memory."""
        argv = [sys.executable, "-c", PLOT, str(self.out.with_suffix(".json")), str(self.out.with_suffix(".png"))]
        if self.rows and subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode:
            print("no picture: it takes matplotlib", flush=True)
