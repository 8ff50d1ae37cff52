"""A table of a result file, as Markdown beside it and short on the screen."""

from __future__ import annotations

import json
from pathlib import Path

from sparse_heads._files import write_whole

from ..report import figures_table
from ..tables import table
from .figures import Case, Result, all_figures


def session_text(session: dict) -> str:
    """Where, when and with what one run was taken."""
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    device, *clocks = (
        ", ".join(f"{name} {value}" for name, value in session[key].items())
        for key in ("device", "as_found", "after_ceilings")
    )
    ceilings = session["ceilings"]
    rates = f"{ceilings['operations_per_second'] / 1e12:.1f} TFLOP/s in a matrix product"
    rates += f", {ceilings['bytes_per_second'] / 1e12:.2f} TB/s in a copy, {1e6 * ceilings['launch_seconds']:.1f} µs a"
    commit = f"{session['commit'][:12]}{' with changes' if session['dirty'] else ''}"
    found = f"as found: {clocks[0]}; after the ceilings: {clocks[1]}"
    lines = [device, found, f"{versions}; commit {commit}, {session['date']}", f"{rates} launch"]
    return "\n".join(f"- {line}" for line in lines)


def case_table(cases: list[Case]) -> str:
    """Median milliseconds with the 20th and 80th percentile, a row a contender."""
    rows = []
    for case in cases:
        operations = sum(part["operations"] for part in case["work"].values())
        for name, found in sorted(case["candidates"].items(), key=lambda item: item[1]["median"]):
            times = "{:.3f} [{:.3f}, {:.3f}]".format(*(found[key] / 1e3 for key in ("median", "p20", "p80")))
            rate = "" if name.startswith("part_") else f"{operations / found['median'] / 1e6:.1f}"
            rows.append([case["name"], name, times, rate])
        for kind in ("wrong", "failed"):
            rows += [[case["name"], name, f"**{kind}**: {clean(reason)}", ""] for name, reason in case[kind].items()]
    return table(["case", "contender", "ms [20, 80 %]", "TFLOP/s of active work"], rows)


def clean(reason: str) -> str:
    """A reason that fits a cell."""
    return " ".join(reason.split()).replace("|", "/")[:160]


def not_timed(cases: list[Case]) -> str:
    """How many contenders were wrong or failed, by name."""
    counts: dict[str, int] = {}
    for case in cases:
        for kind in ("wrong", "failed"):
            for name in case[kind]:
                counts[f"{name} {kind}"] = counts.get(f"{name} {kind}", 0) + 1
    return ", ".join(f"{name} in {count}" for name, count in sorted(counts.items())) or "none"


def write(path: Path) -> str:
    """Write the report beside the result file; return the short table."""
    result: Result = json.loads(path.read_text())
    figures = figures_table(all_figures(result))
    smoke = any(session["smoke"] for session in result["sessions"])
    notes = [f"{len(result['cases'])} cases, {len(result['left'])} left", f"not timed: {not_timed(result['cases'])}"]
    if smoke:
        notes.insert(0, "**Smoke on a CPU: these numbers only show that the suite runs.**")
    parts = [f"# GPU: {result['suite']}", *map(session_text, result["sessions"]), *notes, "## Figures", figures]
    if result["left"]:
        parts += ["## Left out, the time was over", "\n".join(f"- {name}" for name in result["left"])]
    parts += ["## Cases", case_table(result["cases"])]
    write_whole({path.with_suffix(".md"): ("\n\n".join(parts) + "\n").encode()})
    return "\n".join([figures, *notes])
