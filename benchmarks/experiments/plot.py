"""Plots of a study: the primary metric over the heads kept, a panel per test split."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev

from matplotlib.figure import Figure

from ..plot import png
from .summary import Line

# Okabe and Ito's colours for the methods that train, a pale one and a marker each for scores.
TRAINABLE = {"DSP": "#0072B2", "straight-through": "#E69F00", "L0, top k": "#D55E00", "L0": "#D55E00"}
CHANCE = {"random": "#000000"}
SCORE_COLORS = ("#009E73", "#56B4E9", "#CC79A7", "#999999")
MARKERS = "sv^D<>pXh*P"


def table_plot(lines: Sequence[Line], splits: Sequence[str], metric: str, title: str) -> bytes:
    """PNG: mean and standard deviation over seeds; labels that miss the count are at the mean count they reach."""
    figure = Figure(figsize=(6.2 * len(splits), 6.4), dpi=110, layout="constrained")
    figure.suptitle(title)
    labels = list(dict.fromkeys(line.label for line in lines))
    panels = figure.subplots(1, len(splits), squeeze=False, sharey=True)[0]
    for axes, split in zip(panels, splits, strict=True):
        for index, label in enumerate(labels):
            drawn = sorted((line for line in lines if line.label == label), key=lambda line: line.count)
            values = [list(line.values(split, metric).values()) for line in drawn]
            axes.errorbar(
                [line.count for line in drawn],
                [mean(numbers) for numbers in values],
                yerr=[pstdev(numbers) for numbers in values],
                label=label,
                capsize=2,
                **style(label, index, all(line.exact for line in drawn)),
            )
        axes.set_title(split)
        axes.set_xlabel("heads kept")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(metric)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return png(figure)


def style(label: str, index: int, exact: bool) -> dict[str, object]:
    """How a label is drawn: thick if it trains, dashed if it misses the count."""
    known = {**TRAINABLE, **CHANCE}
    return {
        "color": known.get(label, SCORE_COLORS[index % len(SCORE_COLORS)]),
        "marker": "o" if label in known else MARKERS[index % len(MARKERS)],
        "linewidth": 2.4 if label in TRAINABLE else 1.1,
        "linestyle": "-" if exact else "--",
        "markersize": 5,
    }
