"""The demo's tables, made from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.table import Table

SPARSE, REPACKED, MASK_ONLY, DENSE = "sparse heads", "repacked", "mask only", "dense"
OWN_BUDGETS = "own budgets"
LEARNED, RANDOM = "dsp", "random"


def quality_of(results: dict[str, Any], method: str, kept: int, field: str) -> list[float]:
    """The values of `field` ("cosine" or "recall") for one method and number of heads; one value per seed."""
    return [row[field] for row in results["quality"] if row["method"] == method and row["kept"] == kept]


def timing_of(results: dict[str, Any], label: str, kept: int) -> dict[str, Any]:
    """The timing of one way to run `kept` heads; the dense model's is the same for every number."""
    found = [row for row in results["timings"] if row["label"] == label and (row["kept"] == kept or label == DENSE)]
    return found[0]


def results_table(results: dict[str, Any]) -> Table:
    """One table: quality and speed in rows, numbers of heads kept in columns; fits 80 characters."""
    table = Table(title=results["title"], caption=results["caption"], box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("heads kept", no_wrap=True)
    for kept in results["kept"]:
        table.add_column(f"{kept}", justify="right", no_wrap=True)
    for field, title in (("cosine", "cosine to dense"), ("recall", "neighbours kept, recall@10")):
        add_quality(table, results, field, title)
    add_rows(
        table,
        "whole model, sentences/s",
        [(label, speed_cells(results, label)) for label in timed_labels(results)]
        + [("ceiling: attention free", [f"{results['ceiling_sentences_per_second']:.0f}"] * len(results["kept"]))],
    )
    add_rows(
        table,
        f"attention, ms/{results['timed_sentences']} sentences",
        [(label, attention_cells(results, label)) for label in timed_labels(results)],
    )
    return table


def add_quality(table: Table, results: dict[str, Any], field: str, title: str) -> None:
    """Rows of one measure: every method, the random one as mean and standard deviation over its seeds."""
    rows: list[tuple[str, Iterable[str]]] = []
    for method in results["methods"]:
        values = [quality_of(results, method, kept, field) for kept in results["kept"]]
        seeds = len(values[-1])
        rows.append((f"{method}, mean of {seeds}" if seeds > 1 else method, cells(values, mean)))
        if seeds > 1:
            rows.append(("  standard deviation", cells(values, stdev)))
    add_rows(table, title, rows)


def cells(values: Iterable[list[float]], reduce: Callable[[list[float]], float]) -> list[str]:
    """One number a count of heads, reduced over the draws."""
    return [f"{reduce(numbers):.3f}" for numbers in values]


def add_rows(table: Table, title: str, rows: Iterable[tuple[str, Iterable[str]]]) -> None:
    """A headed block of rows with a rule below."""
    table.add_row(f"[bold]{title}[/bold]")
    for label, numbers in rows:
        table.add_row(f"  {label}", *numbers)
    table.add_section()


def timed_labels(results: dict[str, Any]) -> list[str]:
    """The ways that were timed, the library's first."""
    timed = {row["label"] for row in results["timings"]}
    return [label for label in (SPARSE, REPACKED, MASK_ONLY, DENSE) if label in timed]


def speed_cells(results: dict[str, Any], label: str) -> list[str]:
    """Sentences per second at every count of heads."""
    return [f"{timing_of(results, label, kept)['sentences_per_second']:.0f}" for kept in results["kept"]]


def attention_cells(results: dict[str, Any], label: str) -> list[str]:
    """Milliseconds in the attention blocks at every count of heads."""
    return [f"{timing_of(results, label, kept)['attention_milliseconds']:.1f}" for kept in results["kept"]]


def requests_quality_table(results: dict[str, Any]) -> Table:
    """The batch in which every sentence has its own budget: how close each budget stays to dense."""
    requests = results["requests"]
    found = sorted(set(requests["budgets"]), reverse=True)
    cosines = [cosines_of(requests, budget) for budget in found]
    title = f"One batch of {len(requests['budgets'])} held-out sentences, each with its own budget of heads"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("heads of a sentence", no_wrap=True)
    for budget in found:
        table.add_column(f"{budget}", justify="right", no_wrap=True)
    table.add_row("sentences", *(f"{len(numbers)}" for numbers in cosines))
    table.add_row("cosine to dense, mean", *cells(cosines, mean))
    table.add_row("cosine to dense, lowest", *cells(cosines, min))
    return table


def cosines_of(requests: dict[str, Any], budget: int) -> list[float]:
    """Cosines to dense of the sentences with this budget."""
    pairs = zip(requests["budgets"], requests["cosines"], strict=True)
    return [cosine for own, cosine in pairs if own == budget]


def requests_speed_table(results: dict[str, Any]) -> Table:
    """The same batch through the dense model and with the budgets: times, and how many times faster."""
    requests = results["requests"]
    dense, own = requests["timings"]
    caption = (
        f"{len(requests['budgets'])} sentences of {requests['tokens']} tokens with padding, medians of "
        f"{own['rounds']} interleaved rounds. Each sentence gets the embedding that it gets alone under its own "
        f"budget, to rounding: largest difference {requests['largest_difference']:.0e}."
    )
    table = Table(caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("this batch", no_wrap=True)
    for title in ("mean heads", "attention ms", "whole model ms", "sentences/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for timing, heads in ((dense, results["heads"]), (own, mean(requests["budgets"]))):
        milliseconds = (f"{timing[field]:.1f}" for field in ("attention_milliseconds", "model_milliseconds"))
        table.add_row(timing["label"], f"{heads:.1f}", *milliseconds, f"{timing['sentences_per_second']:.0f}")
    attention, model = (dense[field] / own[field] for field in ("attention_milliseconds", "model_milliseconds"))
    table.add_section()
    table.add_row("times as fast", "", f"{attention:.2f}", f"{model:.2f}", f"{model:.2f}")
    return table
