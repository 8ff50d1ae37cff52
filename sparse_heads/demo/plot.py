"""The demo's picture, made from its results alone: quality on the left, speed on the right, per request below."""

from __future__ import annotations

import io
import textwrap
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import DENSE, MASK_ONLY, REPACKED, SPARSE, cosines_of, quality_of, timed_labels, timing_of

# Okabe and Ito's colours, which readers with colour blindness can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777"
METHOD_STYLES = [(PURPLE, "*"), (BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (GREY, "D")]
SPEED_STYLES = {
    SPARSE: dict(color=BLUE, marker="o", linewidth=2.4, zorder=4),
    REPACKED: dict(color=ORANGE, marker="s", linewidth=1.4, linestyle="--", zorder=3),
    MASK_ONLY: dict(color=PURPLE, marker="^", linewidth=1.4, zorder=2),
    DENSE: dict(color="black", linewidth=1.4, zorder=1),
}


def results_picture(results: dict[str, Any]) -> bytes:
    """A PNG: four panels over the number of heads kept, two of the batch in which every sentence has its own."""
    figure = Figure(figsize=(12, 11.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(results["title"], fontsize=14, fontweight="bold")
    (cosine, speed), (recall, attention), (sentences, batch) = figure.subplots(3, 2)
    draw_quality(cosine, results, "cosine", "Embeddings: cosine to the dense model's")
    draw_quality(recall, results, "recall", "Search: the dense model's 10 nearest neighbours kept")
    draw_speed(speed, results, "sentences_per_second", "Whole model: sentences a second")
    speed.axhline(results["ceiling_sentences_per_second"], color=GREY, linestyle=":", label="ceiling: attention free")
    draw_speed(attention, results, "attention_milliseconds", "Attention blocks alone: milliseconds")
    attention.set_ylabel(f"ms for {results['timed_sentences']} sentences")
    speed.set_ylabel("sentences / s")
    cosine.set_ylabel("mean cosine")
    recall.set_ylabel("recall@10")
    draw_sentences(sentences, results["requests"])
    for axes in (cosine, speed, recall, attention, sentences):
        finish(axes, results)
    sentences.set_xlabel(f"heads of the sentence, of {results['heads']}")
    draw_batch(batch, results["requests"])
    cosine.legend(frameon=False, fontsize=9, loc="lower right")
    speed.legend(frameon=False, fontsize=9, loc="lower left")
    figure.supxlabel(textwrap.fill(results["caption"], 150), fontsize=9, color="#444444")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def draw_quality(axes: Axes, results: dict[str, Any], field: str, title: str) -> None:
    """One line a method; a method with several seeds gets its range as a band."""
    axes.set_title(title, loc="left", fontsize=11)
    for method, (color, marker) in zip(results["methods"], METHOD_STYLES, strict=True):
        values = [quality_of(results, method, kept, field) for kept in results["kept"]]
        seeds = len(values[-1])
        label = f"{method}, mean and range of {seeds}" if seeds > 1 else method
        axes.plot(results["kept"], [mean(numbers) for numbers in values], color=color, marker=marker, label=label)
        if seeds > 1:
            lowest, highest = [min(numbers) for numbers in values], [max(numbers) for numbers in values]
            axes.fill_between(results["kept"], lowest, highest, color=color, alpha=0.2, linewidth=0)


def draw_speed(axes: Axes, results: dict[str, Any], field: str, title: str) -> None:
    """One line a way to run the heads; the dense model is a level line."""
    axes.set_title(title, loc="left", fontsize=11)
    for label in timed_labels(results):
        values = [timing_of(results, label, kept)[field] for kept in results["kept"]]
        axes.plot(results["kept"], values, label=label, **SPEED_STYLES[label])


def draw_sentences(axes: Axes, requests: dict[str, Any]) -> None:
    """One dot a sentence at its own budget, and the mean of each budget."""
    axes.set_title("One batch, a budget a sentence: each sentence's cosine to dense", loc="left", fontsize=11)
    budgets = sorted(set(requests["budgets"]))
    axes.scatter(requests["budgets"], requests["cosines"], color=BLUE, alpha=0.45, linewidth=0, label="one sentence")
    axes.plot(budgets, [mean(cosines_of(requests, budget)) for budget in budgets], color=BLUE, label="mean")
    axes.set_ylabel("cosine")
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw_batch(axes: Axes, requests: dict[str, Any]) -> None:
    """One bar a way to run the batch: its attention blocks, then the rest of the model."""
    axes.set_title("The same batch: milliseconds", loc="left", fontsize=11)
    timings = requests["timings"]
    labels = [f"dense\n{timings[0]['kept']} heads each", f"own budgets\n{mean(requests['budgets']):.1f} on average"]
    totals = [timing["model_milliseconds"] for timing in timings]
    attention = [timing["attention_milliseconds"] for timing in timings]
    rest = [total - inner for total, inner in zip(totals, attention, strict=True)]
    bars = axes.barh(labels, attention, height=0.5, color=BLUE, label="attention blocks")
    axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    bars = axes.barh(labels, rest, height=0.5, left=attention, color="#cccccc", label="rest of the model")
    axes.bar_label(bars, fmt="%.1f", label_type="center")
    axes.bar_label(bars, labels=[f"{total:.1f}" for total in totals], padding=4, fontweight="bold")
    axes.set_xlim(0, 1.12 * max(totals))
    axes.set_ylim(2, -0.5)  # room for the legend below the two bars
    axes.set_xlabel(f"ms for {len(requests['budgets'])} sentences")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left", ncols=2)


def finish(axes: Axes, results: dict[str, Any]) -> None:
    """Ticks at the measured numbers of heads, and a light grid; no axis starts above zero."""
    axes.set_xticks(results["kept"])
    axes.set_xlabel(f"heads kept of {results['heads']}")
    axes.set_ylim(min(0, axes.dataLim.ymin), 1.05 * axes.dataLim.ymax)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
