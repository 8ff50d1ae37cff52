"""The table and the plots of a result file: `python -m benchmarks.report benchmarks/results/block.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sparse_heads._files import write_whole

from .figures import Case, Figure, Result, all_figures, timed
from .plot import block_plot, decode_plot, gates_plot, generate_plot, gqa_plot, model_plot, requests_plot
from .tables import (
    block_losses,
    block_table,
    decode_losses,
    decode_table,
    gates_table,
    generate_table,
    gqa_losses,
    gqa_table,
    model_table,
    requests_losses,
    requests_table,
    table,
)


@dataclass(frozen=True)
class Section:
    """How the cases of a level are shown. text: what the numbers are; losses: where ours loses."""

    title: str
    text: str
    plot: Callable[[list[Case]], bytes]
    table: Callable[[list[Case]], str]
    losses: Callable[[list[Case]], str] | None = None


SECTIONS = {
    "block": Section(
        "Attention block",
        "Speed relative to the repacked block, the faster of plain and fused: 1.00 is the limit.",
        block_plot,
        block_table,
        block_losses,
    ),
    "model": Section(
        "Whole model", "The ceiling is the same model with attention free of cost.", model_plot, model_table
    ),
    "requests": Section(
        "Attention block, a subset for every request",
        "Alone: every request by itself (batch 1) on its own repacked block, the faster of plain and fused, summed "
        "over the batch. Shared: the same heads as one subset for all, where all requests have the same. First call: "
        "right after `set_heads`, which is not in it. Relative speeds: above 1 is faster.",
        requests_plot,
        requests_table,
        requests_losses,
    ),
    "gqa": Section(
        "Attention with grouped queries",
        "`sparse_heads.attention` by itself, causal; heads are query heads / key-value heads of a size. `groups`: "
        "half of the groups off, other ones in each request; `scattered`: half of the query heads off, and no whole "
        "group. All on: the same operator with a mask that keeps all. Sliced: a loop over requests that gathers the "
        "kept heads and runs SDPA; alone: the same without the time of gathering. Relative speeds: above 1 is faster.",
        gqa_plot,
        gqa_table,
        gqa_losses,
    ),
    "decode": Section(
        "Decoding",
        "`sparse_heads.attention_decode` by itself, one new position a request; heads are query heads / key-value "
        "heads of a size. Bandwidths are over the bytes of the cache that the heads that are on need; read: the sum of "
        "an array of as many bytes as all heads need. SDPA: all heads, on caches without pages, with a mask where "
        "lengths are uneven. Relative speeds: above 1 is faster.",
        decode_plot,
        decode_table,
        decode_losses,
    ),
    "generate": Section(
        "Greedy generation",
        "Attention: time inside the attention modules, of all layers and tokens. Mask-only: zeros for the columns of "
        "the output projection that read a head that is off. ours_requests: a random half of the heads for each "
        "request. Every candidate's tokens equal those of the zeroed columns in float64. Above 1 is faster.",
        generate_plot,
        generate_table,
    ),
    "gates": Section(
        "Learning and scoring heads",
        "`joint`, `pipelined`: a step of training under differentiable subset pruning to half of the heads, with "
        "trained and with frozen weights; dense: the same step without gates (with frozen weights a backward pass that "
        "ends where that of the gates does, before the first output projection). `zeros`: hard-concrete gates, three "
        "quarters of them 0, all weights trained. `sweep`: ablation scores of every head, without and with a loss; "
        "dense: a forward of the same rows for each head.",
        gates_plot,
        gates_table,
    ),
}


def passport_text(result: Result) -> str:
    """Where, when and with what the numbers were taken."""
    machine, versions = result["machine"], result["versions"]
    flags = ", ".join(machine["flags"]) or "none listed"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_capability']} (flags: {flags})",
        machine["system"],
        ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; extension {result['cpu_extension']}",
        f"commit {result['commit'][:12]}{' with changes' if result['dirty'] else ''}, {result['date']}",
        f"float32, sdpa, {result['threads']} threads, {rounds_text(result)} rounds, {result['seconds']} s in all",
    ]
    if result["load"] and result["load"] > 1:
        lines.append(f"**The machine was busy when it started (load {result['load']}).**")
    if result["quick"]:
        lines.append("**A quick run: these numbers only show that it runs.**")
    return "\n".join(f"- {line}" for line in lines)


def rounds_text(result: Result) -> str:
    """The rounds of the cases; a run that was resumed may have used other ones."""
    rounds = sorted({len(spread["samples"]) for case in result["cases"] for spread in case["candidates"].values()})
    return " or ".join(map(str, rounds)) or str(result["rounds"])


def limit_text(figure: Figure) -> str:
    """What was wanted."""
    return f"{'at least' if figure.at_least else 'at most'} {figure.limit:g}"


def figures_table(figures: list[Figure]) -> str:
    """Every figure with its interval and verdict."""
    if not figures:
        return "None of the timed cases has a figure to reach."
    rows = [
        [one.title, limit_text(one), str(one.found), one.where, "met" if one.met else "**missed**"] for one in figures
    ]
    return table(["figure", "wanted", "found [95 % interval]", "case", "verdict"], rows)


def markdown(result: Result, figures: list[Figure], stem: str) -> str:
    """The whole report."""
    parts = [f"# {result['suite']} suite", passport_text(result), "## Figures", figures_table(figures)]
    wrong = {case["name"]: case["wrong"] for case in result["cases"] if case["wrong"]}
    if wrong:
        listing = f"```\n{json.dumps(wrong, indent=1)}\n```"
        parts += ["## Wrong outputs: not timed, and their cases left out below", listing]
    if loads := result.get("import", {}).get("loads"):
        parts.append(f"`import sparse_heads` loads {', '.join(loads)}.")
    for level, section in SECTIONS.items():
        if cases := timed(result, level):
            parts += [f"## {section.title}", section.text]
            if section.losses is not None:
                parts.append(section.losses(cases))
            parts += [f"![]({stem}-{level}.png)", section.table(cases)]
    return "\n\n".join(parts) + "\n"


def write(path: Path) -> str:
    """Write the report and the plots beside the result file; return the table of figures."""
    result = json.loads(path.read_text())
    figures = all_figures(result)
    contents = {path.with_suffix(".md"): markdown(result, figures, path.stem).encode()}
    for level, section in SECTIONS.items():
        if cases := timed(result, level):
            contents[path.with_name(f"{path.stem}-{level}.png")] = section.plot(cases)
    write_whole(contents)
    return figures_table(figures)


def main(path: Annotated[Path, typer.Argument(help="a result file", exists=True, dir_okay=False)]) -> None:
    """Make the table and the plots again from a result file."""
    print(write(path))


if __name__ == "__main__":
    typer.run(main)
