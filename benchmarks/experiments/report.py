"""Tables and plots of a study from its cells alone: `python -m benchmarks.experiments.report STUDY`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from sparse_heads._files import write_whole

from ..tables import table
from .cells import RESULTS, Store, judged
from .plot import table_plot
from .study import Study, load_study
from .summary import Comparison, Line, best_other, comparisons, difference_of, lines_of, spread

TITLES = {"frozen": "Frozen weights", "trained": "Trained weights"}


def write(study: Study, store: Store, smoke: bool = False) -> str:
    """Write `STUDY.md` and a plot a table beside the folder of cells; the text."""
    contents = store.all()
    lines = lines_of(contents)
    compared = comparisons(lines, study.claim.method, study.tests, study.primary)
    tables = [name for name in TITLES if any(line.table == name for line in lines)]
    pictures = {name: store.folder.with_name(f"{store.folder.name}-{name}.png") for name in tables}
    parts = [f"# {study.title}", *(["**A smoke run: it claims nothing.**"] if smoke else [])]
    parts.append(claim_text(study, contents, lines))
    for name in tables:
        chosen = [line for line in lines if line.table == name]
        parts += [f"## {TITLES[name]}", f"![{name}]({pictures[name].name})", losses_text(compared, name)]
        parts.append(dense_text(study, contents, name))
        parts += [section(study, chosen, compared, kept) for kept in dict.fromkeys(line.kept for line in chosen)]
    parts += [
        failures_text(contents),
        "## Trials",
        trials_table(study, contents),
        "## Passport",
        passport_text(contents),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    files = {store.folder.with_suffix(".md"): text.encode()}
    for name in tables:
        drawn = [line for line in lines if line.table == name]
        files[pictures[name]] = table_plot(drawn, study.tests, study.primary, f"{study.title}\n{TITLES[name]}")
    write_whole(files)
    return text


def claim_text(study: Study, contents: Sequence[dict[str, Any]], lines: Sequence[Line]) -> str:
    """What became of the primary claim."""
    claim, metric = study.claim, study.primary
    found = best_other(lines, claim, metric)
    said = f"Primary claim, fixed before the runs: {claim.method} keeps more {metric} than the best other method at "
    said += f"{claim.kept} heads, {claim.table} weights, split `{claim.test}`. "
    if found is None:
        return said + "Not decided: its cells have not run."
    ours, other = found
    difference = difference_of(ours, other, claim.test, metric)
    wanted = len(study.table(claim.table).seeds)
    missing = unfinished(study, contents)
    if difference.seeds < wanted:
        said += f"**Unfinished: {difference.seeds} of {wanted} seeds.** "
    if missing:
        said += f"**Not all rivals are there yet: {', '.join(missing)}.** "
    verdict = "holds" if difference.low > 0 else "fails: it is behind" if difference.high < 0 else "is not shown"
    if missing or difference.seeds < wanted:
        verdict = "is not decided before all cells have run"
    said += f"The best other by the development split is {other.label}: difference {difference}, "
    return said + f"p {difference.p:.2g}, ahead in {difference.ahead} of {difference.seeds} seeds. The claim {verdict}."


def unfinished(study: Study, contents: Sequence[dict[str, Any]]) -> list[str]:
    """The methods that lack a seed at the claim's count, any of which may be the best other one."""
    table, kept = study.table(study.claim.table), study.claim.kept
    final = [one for one in contents if one["trial"] is None and one["results"]]
    ran = {(one["table"], one["method"], one["kept"], one["seed"]) for one in final}
    names = (method.name for method in table.methods)
    return [name for name in names if any((table.name, name, kept, seed) not in ran for seed in table.seeds)]


def losses_text(compared: Sequence[Comparison], name: str) -> str:
    """Where the claimed method is not ahead by its whole interval."""
    own = [one for one in compared if one.table == name]
    texts = []
    for standing in ("behind", "even"):
        found = [f"{one.label} at {one.kept} ({one.split})" for one in own if one.standing == standing]
        texts.append(f"{standing.capitalize()} ({len(found)} of {len(own)} comparisons): {'; '.join(found) or 'none'}.")
    return " ".join(texts) if own else ""


def dense_text(study: Study, contents: Sequence[dict[str, Any]], name: str) -> str:
    """What all heads give: the mark that every row is read against."""
    dense = next(one["dense"] for one in contents if one["table"] == name and one["trial"] is None)
    splits = [
        f"{split}: " + ", ".join(f"{metric} {value:.3f}" for metric, value in dense[split].items())
        for split in study.tests
    ]
    return f"With all heads, before any training: {'; '.join(splits)}."


def failures_text(contents: Sequence[dict[str, Any]]) -> str:
    """The cells whose method broke, and how."""
    failed = [one for one in contents if "failed" in one]
    named = (
        f"{one['table']}, {one['method']}, {one['kept']} heads, seed {one['seed']}: {one['failed']}" for one in failed
    )
    return f"Runs that broke ({len(failed)} cells): {'; '.join(named)}." if failed else ""


def section(study: Study, lines: Sequence[Line], compared: Sequence[Comparison], kept: int) -> str:
    """The tables of one count, a test split each."""
    own = [line for line in lines if line.kept == kept]
    texts = [f"### {kept} heads"]
    for split in study.tests:
        known = {one.label: one for one in compared if (one.table, one.kept, one.split) == (own[0].table, kept, split)}
        texts += [f"Split `{split}`:", count_table(study, own, known, split)]
    return "\n\n".join(texts)


def count_table(study: Study, lines: Sequence[Line], compared: dict[str, Comparison], split: str) -> str:
    """One row a label, best first."""
    metrics = list(lines[0].metrics[split])
    ranked = sorted(lines, key=lambda line: -mean(line.values(split, study.primary).values()))
    rows = []
    for line in ranked:
        seeds = line.values(split, study.primary)
        row = [line.label, f"{line.count:g}", str(line.trials), str(line.steps), f"{line.seconds:.0f}", str(len(seeds))]
        row += [spread(line.values(split, metric).values()) for metric in metrics]
        one = compared.get(line.label)
        if one is None:
            row += ["", "", "", ""]
        else:
            found = one.difference
            row += [str(found), f"{one.adjusted:.2g}", f"{found.ahead} of {found.seeds}", one.standing]
        rows.append(row)
    header = ["method", "heads", "trials", "optimiser steps", "seconds", "seeds", *metrics]
    header += [f"{study.claim.method} minus it [95 % interval]", "p, Holm", "seeds ahead", ""]
    return table(header, rows)


def trials_table(study: Study, contents: Sequence[dict[str, Any]]) -> str:
    """Every trial on the development split; the settings of the best of its method and count went to the final runs."""
    rows = []
    for content in contents:
        if content["trial"] is not None:
            method = study.table(content["table"], content["smoke"]).method(content["method"])
            tried = ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in method.trials[content["trial"]].items()
            )
            value = judged(content, study.primary)
            rows.append([content["table"], content["method"], str(content["kept"]), tried, f"{value:.4f}"])
    return table(["table", "method", "heads", "settings", f"development {study.primary}"], rows) if rows else "None."


def passport_text(contents: Sequence[dict[str, Any]]) -> str:
    """Where, with what and how long the cells ran."""
    if not contents:
        return "No cells."
    hours = sum(content["seconds"] for content in contents) / 3600
    machines = dict.fromkeys(f"{one['machine']['cpu']}, {one['threads']} threads" for one in contents)
    versions = dict.fromkeys(", ".join(f"{key} {value}" for key, value in one["versions"].items()) for one in contents)
    commits = dict.fromkeys(one["commit"][:12] + ("-dirty" if one["dirty"] else "") for one in contents)
    return (
        f"{len(contents)} cells, {hours:.2f} hours; {'; '.join(machines)}; {'; '.join(versions)}; "
        f"commits {', '.join(commits)}; from {min(one['date'] for one in contents)} to "
        f"{max(one['date'] for one in contents)}."
    )


def main(
    study: Annotated[str, typer.Argument(help="the study's name")],
    out: Annotated[Path, typer.Option(help="folder that holds the study's folder of cells")] = RESULTS,
) -> None:
    """Write a study's tables and plots from the cells that are there."""
    print(write(load_study(study), Store(out / study)))


if __name__ == "__main__":
    typer.run(main)
