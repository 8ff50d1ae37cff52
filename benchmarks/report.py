"""The table and the plots of a result file: `python -m benchmarks.report benchmarks/results/cpu.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparse_heads._files import write_whole

from .figures import FIRST, WARM, Case, Estimate, Figure, Result, all_figures, best_repacked, estimate, speed, timed
from .plot import block_plot, model_plot

COMPARED = ("dense", "dense_fused", "mask_only", "slice")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shape_of(case: Case) -> str:
    """The input in words, for example `8x128` or `32x20 demo`."""
    return f"{case['batch']}x{case['tokens']} {case['label']}".strip()


def standing(found: Estimate) -> str:
    """How a speed relative to repacked stands to 1, by its whole interval."""
    return "slower" if found.high < 1 else "faster" if found.low > 1 else "even"


def median(case: Case, name: str) -> float:
    """Median time of a candidate in microseconds."""
    return case["candidates"][name]["median"]


def passport_text(result: Result) -> str:
    """Where, when and with what the numbers were taken."""
    machine, versions = result["machine"], result["versions"]
    flags = ", ".join(machine["flags"]) or "none listed"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_capability']} (flags: {flags})",
        machine["system"],
        ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; extension {result['cpu_extension']}",
        f"commit {result['commit'][:12]}{' with changes' if result['dirty'] else ''}, {result['date']}",
        f"float32, sdpa, {result['threads']} threads, {result['rounds']} rounds, {result['seconds']} s in all",
    ]
    if result["load"] and result["load"] > 1:
        lines.append(f"**The machine was busy when it started (load {result['load']}).**")
    if result["quick"]:
        lines.append("**A quick run: these numbers only show that it runs.**")
    return "\n".join(f"- {line}" for line in lines)


def limit_text(figure: Figure) -> str:
    """What was wanted."""
    return f"{'at least' if figure.at_least else 'at most'} {figure.limit:g}"


def figures_table(figures: list[Figure]) -> str:
    """Every figure with its interval and verdict."""
    rows = [
        [one.title, limit_text(one), str(one.found), one.where, "met" if one.met else "**missed**"] for one in figures
    ]
    return table(["figure", "wanted", "found [95 % interval]", "case", "verdict"], rows)


def block_table(cases: list[Case]) -> str:
    """One row a case: times of the limit, of ours and of `set_heads`, and everyone's speed relative to the limit."""
    rows = []
    for case in cases:
        ours, name = estimate(speed(case, WARM)), best_repacked(case)
        rows.append(
            [str(case["hidden"]), shape_of(case), str(case["kept_count"])]
            + [f"{median(case, name):.0f}{' fused' if name == 'repacked_fused' else ''}", f"{median(case, WARM):.0f}"]
            + [str(ours), standing(ours), f"{estimate(speed(case, FIRST)).value:.2f}"]
            + [f"{estimate(speed(case, other)).value:.2f}" for other in COMPARED]
            + [f"{median(case, 'set_heads'):.0f}"]
        )
    header = ["E", "B x T", "heads", "repacked us", "ours us", "ours [95 % interval]", "", "first call"]
    return table([*header, *COMPARED, "set_heads us"], rows)


def model_table(cases: list[Case]) -> str:
    """One row a case: milliseconds of everyone, the ceiling with attention free, and speed over dense."""
    names = (*COMPARED, "repacked", "repacked_fused", WARM, FIRST, "ceiling")
    rows = []
    for case in cases:
        dense = median(case, "dense")
        rows.append(
            [str(case["hidden"]), shape_of(case), f"{case['kept_count']} of {case['heads']}"]
            + [f"{median(case, name) / 1000:.2f}" for name in names]
            + [str(estimate(speed(case, WARM))), f"{dense / median(case, WARM):.2f}"]
            + [f"{dense / median(case, 'ceiling'):.2f}"]
        )
    header = ["E", "B x T", "heads", *(f"{name} ms" for name in names)]
    return table([*header, "ours over repacked", "ours over dense", "ceiling over dense"], rows)


def losses_text(cases: list[Case]) -> str:
    """In how many cases ours loses to the repacked and to the dense block; the latter by name."""
    slower = [case for case in cases if standing(estimate(speed(case, WARM))) == "slower"]
    behind = [case for case in cases if median(case, WARM) > min(median(case, "dense"), median(case, "dense_fused"))]
    text = f"Slower than the repacked block, by the whole interval: {len(slower)} of {len(cases)} cases. "
    names = ", ".join(f"`{case['name']}`" for case in behind) or "none"
    return text + f"Slower than the faster of the two dense blocks: {names}."


def markdown(result: Result, figures: list[Figure], stem: str) -> str:
    """The whole report."""
    parts = [f"# {result['suite']} suite", passport_text(result), "## Figures", figures_table(figures)]
    wrong = {case["name"]: case["wrong"] for case in result["cases"] if case["wrong"]}
    if wrong:
        listing = f"```\n{json.dumps(wrong, indent=1)}\n```"
        parts += ["## Wrong outputs: not timed, and their cases left out below", listing]
    if result["import"]["loads"]:
        parts.append(f"`import sparse_heads` loads {', '.join(result['import']['loads'])}.")
    if blocks := timed(result, "block"):
        text = "Speed relative to the repacked block, the faster of plain and fused: 1.00 is the limit."
        parts += ["## Attention block", text, losses_text(blocks), f"![]({stem}-block.png)", block_table(blocks)]
    if models := timed(result, "model"):
        text = "The ceiling is the same model with attention free of cost."
        parts += ["## Whole model", text, f"![]({stem}-model.png)", model_table(models)]
    return "\n\n".join(parts) + "\n"


def write(path: Path) -> str:
    """Write the report and the plots beside the result file; return the table of figures."""
    result = json.loads(path.read_text())
    figures = all_figures(result)
    contents = {path.with_suffix(".md"): markdown(result, figures, path.stem).encode()}
    for level, plot in (("block", block_plot), ("model", model_plot)):
        if cases := timed(result, level):
            contents[path.with_name(f"{path.stem}-{level}.png")] = plot(cases)
    write_whole(contents)
    return figures_table(figures)


def main(path: Annotated[Path, typer.Argument(help="a result file", exists=True, dir_okay=False)]) -> None:
    """Make the table and the plots again from a result file."""
    print(write(path))


if __name__ == "__main__":
    typer.run(main)
