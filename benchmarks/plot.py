"""Plots of a result file: blocks as curves over the kept heads or their share, everything else as bars."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .figures import ALONE, FIRST, LOWEST_BLOCK_SPEED, SDPA, WARM, Case, estimate, fastest, speed

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


def requests_plot(cases: list[Case]) -> bytes:
    """PNG: speed over the dense block over the share of (request, head) pairs that run, a panel per shape."""
    shapes = list(dict.fromkeys((case["hidden"], case["batch"], case["tokens"]) for case in cases))
    columns = min(4, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.4 * rows + 0.6), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axes, (hidden, batch, tokens) in zip(panels, shapes, strict=False):
        draw_requests(
            axes, [one for one in cases if (one["hidden"], one["batch"], one["tokens"]) == (hidden, batch, tokens)]
        )
        axes.set_title(f"E {hidden}, B x T {batch} x {tokens}", fontsize=9)
        axes.set_ylabel("speed over the dense block")
        axes.set_xlabel("share of heads on")
    for axes in panels[len(shapes) :]:
        axes.remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * columns, frameon=False)
    return png(figure)


def draw_requests(axes: Axes, cases: list[Case]) -> None:
    """One panel: curves over independent heads, up to all on; markers for heads chosen in another way."""
    cases = sorted(cases, key=lambda case: case["kept_count"])
    curve = [case for case in cases if case["label"] in ("independent", "all")]
    shares = [case["kept_count"] / case["heads"] for case in curve]
    for name in ("dense_fused", "mask_only", FIRST):
        values = [estimate(speed(case, name, ["dense"])).value for case in curve]
        axes.plot(shares, values, label=name, linewidth=1.1, **STYLES[name])
    alone = [estimate(speed(case, fastest(case, ALONE), ["dense"])).value for case in curve]
    axes.plot(shares, alone, label="each alone, repacked", color=LIMIT, linewidth=1.4)
    ours = [estimate(speed(case, WARM, ["dense"])) for case in curve]
    values = [one.value for one in ours]
    errors = [[one.value - one.low for one in ours], [one.high - one.value for one in ours]]
    axes.errorbar(shares, values, yerr=errors, label="ours", color=OURS, marker="o", linewidth=2.2, capsize=2)
    for label, marker in (("equal", "*"), ("nested", "D")):
        others = [case for case in cases if case["label"] == label]
        places = [case["kept_count"] / case["heads"] for case in others]
        values = [estimate(speed(case, WARM, ["dense"])).value for case in others]
        axes.plot(places, values, marker, label=f"ours, {label}", color=LOSS, markersize=7, fillstyle="none")
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(bottom=0)


def gqa_plot(cases: list[Case]) -> bytes:
    """PNG: speed relative to PyTorch's SDPA with all heads on, a group of bars per case."""
    figure = Figure(figsize=(max(8, 1.35 * len(cases)), 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    bars = {"all_on": "#000000", "no_mask": "#777777", "sliced": "#E69F00", "alone": LIMIT, WARM: OURS}
    width = 0.8 / len(bars)
    for index, (name, color) in enumerate(bars.items()):
        found = [estimate(speed(case, name, SDPA)) for case in cases]
        heights = [one.value for one in found]
        errors = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
        places = [place + (index - (len(bars) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, heights, width, yerr=errors, label=name, color=color, error_kw={"linewidth": 0.8})
    heads = [f"{case['num_heads']}/{case['kv_heads']} of {case['head_dim']}" for case in cases]
    labels = [
        f"{each}\n{case['batch']}x{case['tokens']}\n{case['label']}" for each, case in zip(heads, cases, strict=True)
    ]
    axes.set_xticks(range(len(cases)), labels, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("speed over the faster SDPA, all heads on")
    figure.legend(loc="outside upper center", ncols=len(bars), frameon=False)
    return png(figure)


def decode_plot(cases: list[Case]) -> bytes:
    """PNG: bandwidth over the bytes that are needed, relative to a plain read, a group of bars per case."""
    figure = Figure(figsize=(max(8, 1.35 * len(cases)), 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    bars = {"sdpa": "#777777", "all_on": "#000000", WARM: OURS}
    width = 0.8 / len(bars)
    for index, (name, color) in enumerate(bars.items()):
        parts = [case["kept_bytes"] / case["all_bytes"] if name == WARM else 1.0 for case in cases]
        heights = [part * estimate(speed(case, name, ["read"])).value for case, part in zip(cases, parts, strict=True)]
        places = [place + (index - (len(bars) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, heights, width, label=name, color=color)
    labels = [case["name"].removeprefix("decode-").replace("-", "\n") for case in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("bandwidth over that of a plain read")
    figure.legend(loc="outside upper center", ncols=len(bars), frameon=False)
    return png(figure)


def generate_plot(cases: list[Case]) -> bytes:
    """PNG: milliseconds per new token, prompt included, and the part of attention in it; a panel per case."""
    figure = Figure(figsize=(5.2 * len(cases), 4.6), dpi=110, layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        found = {name: one["median"] / 1000 / case["new_tokens"] for name, one in case["candidates"].items()}
        names = [name for name in found if "_attention" not in name]
        decode, prefill = ([found[f"{name}_attention_{phase}"] for name in names] for phase in ("decode", "prefill"))
        attention = [sum(pair) for pair in zip(decode, prefill, strict=True)]
        rest = [found[name] - part for name, part in zip(names, attention, strict=True)]
        axes.bar(names, decode, label="attention, decoding", color=OURS)
        axes.bar(names, prefill, bottom=decode, label="attention, prompt", color="#56B4E9")
        axes.bar(names, rest, bottom=attention, label="everything else", color="#BBBBBB")
        axes.tick_params(axis="x", labelrotation=30, labelsize=8)
        axes.set_title(f"batch {case['batch']}, prompt {case['tokens']}, {case['new_tokens']} new tokens", fontsize=9)
        axes.set_ylabel("ms per new token")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


def gates_plot(cases: list[Case]) -> bytes:
    """PNG: time over the dense step, or over as many dense forwards as heads, a bar per case and candidate."""
    bars = [(case, name) for case in cases for name in (WARM, f"{WARM}_loss") if name in case["candidates"]]
    found = [estimate(1 / speed(case, name, ["dense"])) for case, name in bars]
    heights = [one.value for one in found]
    errors = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
    figure = Figure(figsize=(max(8, 1.2 * len(bars)), 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(bars)), heights, 0.6, yerr=errors, color=OURS, error_kw={"linewidth": 0.8})
    labels = [
        f"{case['label']}{name.removeprefix(WARM).replace('_', ', ')}\nE {case['hidden']}, {case['layers']} layers\n"
        f"feed-forward {case['feed_forward']}\n{case['batch']}x{case['tokens']}"
        for case, name in bars
    ]
    axes.set_xticks(range(len(bars)), labels, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("time over dense")
    return png(figure)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
