"""Plots of a result file: blocks as curves over the kept heads, whole models as bars."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .figures import FIRST, LOWEST_BLOCK_SPEED, WARM, Case, estimate, speed

# Okabe and Ito's colours, which readers with colour blindness can tell apart.
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#000000", "linestyle": "--"},
    "dense_fused": {"color": "#777777", "linestyle": "--"},
    "mask_only": {"color": "#CC79A7", "linestyle": ":"},
    "slice": {"color": "#E69F00", "linestyle": "-."},
    FIRST: {"color": "#56B4E9", "marker": "o", "markersize": 3},
}
OURS, LIMIT, LOSS = "#0072B2", "#009E73", "#D55E00"


def block_plot(cases: list[Case]) -> bytes:
    """PNG: speed relative to the repacked block over kept heads, a panel per shape; ringed where ours is slower."""
    shapes = list(dict.fromkeys((case["batch"], case["tokens"]) for case in cases))
    sizes = list(dict.fromkeys(case["hidden"] for case in cases))
    figure = Figure(figsize=(2.9 * len(shapes), 3.4 * len(sizes) + 0.6), dpi=110, layout="constrained")
    panels = figure.subplots(len(sizes), len(shapes), sharex=True, sharey=True, squeeze=False)
    for row, hidden in zip(panels, sizes, strict=True):
        for axes, (batch, tokens) in zip(row, shapes, strict=True):
            panel = [one for one in cases if (one["hidden"], one["batch"], one["tokens"]) == (hidden, batch, tokens)]
            draw_block(axes, panel)
            axes.set_title(f"E {hidden}, B x T {batch} x {tokens}", fontsize=9)
        row[0].set_ylabel("speed relative to repacked")
    for axes in panels[-1]:
        axes.set_xlabel("heads kept")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return png(figure)


def draw_block(axes: Axes, cases: list[Case]) -> None:
    """One panel: everyone's median, ours with its interval."""
    cases = sorted(cases, key=lambda case: case["kept_count"])
    heads = [case["kept_count"] for case in cases]
    for name, style in STYLES.items():
        axes.plot(heads, [estimate(speed(case, name)).value for case in cases], label=name, linewidth=1.1, **style)
    ours = [estimate(speed(case, WARM)) for case in cases]
    errors = [[one.value - one.low for one in ours], [one.high - one.value for one in ours]]
    values = [one.value for one in ours]
    axes.errorbar(heads, values, yerr=errors, label="ours", color=OURS, marker="o", linewidth=2.2, capsize=2)
    losing = [(count, one.value) for count, one in zip(heads, ours, strict=True) if one.high < 1]
    axes.plot(*zip(*losing, strict=True) if losing else ((), ()), "o", color=LOSS, markersize=9, fillstyle="none")
    axes.axhline(1, color=LIMIT, linewidth=1.4, label="repacked")
    lowest = f"{LOWEST_BLOCK_SPEED}: lowest wanted"
    axes.axhline(LOWEST_BLOCK_SPEED, color=LIMIT, linewidth=0.8, linestyle=":", label=lowest)
    axes.set_xticks(heads)
    axes.set_ylim(0, 1.7)


def model_plot(cases: list[Case]) -> bytes:
    """PNG: latency of the whole model relative to the dense one, a group of bars per case."""
    names = ("mask_only", "slice", "repacked", "repacked_fused", WARM, FIRST, "ceiling")
    colors = ("#CC79A7", "#E69F00", LIMIT, "#88CCAA", OURS, "#56B4E9", "#BBBBBB")
    figure = Figure(figsize=(max(8, 1.35 * len(cases)), 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, (name, color) in enumerate(zip(names, colors, strict=True)):
        heights = [case["candidates"][name]["median"] / case["candidates"]["dense"]["median"] for case in cases]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, heights, width, label=name, color=color)
    labels = [
        f"E {case['hidden']}\n{case['batch']}x{case['tokens']} {case['label']}\n{case['kept_count']}/{case['heads']}"
        for case in cases
    ]
    axes.set_xticks(range(len(cases)), labels, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("latency of the whole model over dense")
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    return png(figure)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
