"""The demo's measurements: scores of the heads, quality of the subsets they choose, and speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from ..errors import UnsupportedError
from ..heads import HeadScores, HeadSubset, Layers
from ..integrations.transformers.scoring import score_heads
from .baselines import mask_only, projection_paths, repack
from .encoder import Batch, Encoder
from .learning import learned_scores
from .quality import mean_cosine, neighbour_recall
from .report import DENSE, LEARNED, MASK_ONLY, RANDOM, REPACKED, SPARSE
from .speed import Contender, Stopwatch, Timing, race

if TYPE_CHECKING:
    from ..integrations.transformers.handle import Handle

PARTS = 6
AllScores = dict[str, list[HeadScores]]


@dataclass(frozen=True)
class Sizes:
    """How much the demo measures: sentences, steps of training, random draws, timed batches and seconds of timing."""

    calibration: int
    learning: int
    learning_steps: int
    held_out: int
    random_draws: int
    timed_batches: int
    timing_seconds: float


FULL = Sizes(
    calibration=192, learning=1600, learning_steps=300, held_out=384, random_draws=4, timed_batches=3, timing_seconds=70
)
QUICK = Sizes(
    calibration=64, learning=160, learning_steps=20, held_out=256, random_draws=2, timed_batches=2, timing_seconds=10
)


def kept_counts(layers: Layers) -> list[int]:
    """Numbers of heads to keep: all, then five, four, three, two and one sixth, in whole KV groups."""
    group = max(layer.group_size for layer in layers)
    groups = layers.num_heads / group
    return sorted({group * max(1, round(groups * part / PARTS)) for part in range(1, PARTS + 1)}, reverse=True)


def score_all(encoder: Encoder, sentences: Sequence[str], sizes: Sizes, kept: int, seed: int) -> AllScores:
    """Scores by every method, the learned one for `kept` heads; the random one several times, with other seeds."""
    model = encoder.model
    batches, _ = encoder.batches(sentences[: sizes.calibration])
    return {
        LEARNED: [learned_scores(encoder, sentences[: sizes.learning], kept, sizes.learning_steps, seed)],
        "michel_projected": [score_heads(model, batches, "michel_projected", seed=seed)],
        "entropy": [score_heads(model, batches, "entropy")],
        "magnitude": [score_heads(model, None, "magnitude")],
        RANDOM: [score_heads(model, None, RANDOM, seed=seed + draw) for draw in range(sizes.random_draws)],
    }


def measure_quality(
    encoder: Encoder, handle: Handle, scores: AllScores, sentences: Sequence[str]
) -> list[dict[str, Any]]:
    """Cosine and recall@10 of every method and number of heads against the dense embeddings; one row per draw."""
    batches, order = encoder.batches(sentences)
    dense = encoder.embed(batches, order)
    counts = kept_counts(handle.layers)
    cases = [(method, kept, draw) for method, drawn in scores.items() for kept in counts for draw in range(len(drawn))]
    rows = []
    for method, kept, draw in bar(cases, "embedding"):
        embeddings = dense
        if kept < handle.layers.num_heads:
            with handle.use_heads(scores[method][draw].top(kept, groups=True)):
                embeddings = encoder.embed(batches, order)
        cosine, recall = mean_cosine(embeddings, dense), neighbour_recall(embeddings, dense)
        rows.append({"method": method, "kept": kept, "draw": draw, "cosine": cosine, "recall": recall})
    return rows


def stopwatch(model: nn.Module, layers: Sequence[Any], paths: Sequence[dict[str, str]]) -> Stopwatch:
    """A stopwatch on a model whose attention layers are `layers`, with output projections at `paths`."""
    starts = [model.get_submodule(layer.name) for layer in layers]
    return Stopwatch(model, starts, [model.get_submodule(each["output"]) for each in paths])


def measure_speed(
    plain: nn.Module, handle: Handle, scores: HeadScores, batches: Sequence[Batch], sizes: Sizes, seed: int
) -> tuple[list[Timing], str]:
    """Timings of every number of heads, kept by the library, repacked and masked, and of the plain model; and a note.

    The note says how the repacked models run, or why there are none.
    """
    paths = projection_paths(plain)
    watch = partial(stopwatch, layers=handle.layers, paths=paths)
    places = [(2 * place + 1) * len(batches) // (2 * sizes.timed_batches) for place in range(sizes.timed_batches)]
    timed = [batches[place] for place in sorted(set(places))]
    ours = watch(handle.model)
    contenders = [Contender(DENSE, handle.layers.num_heads, watch(plain))]
    note = "repacked: q, k, v fused where faster"
    for kept in bar(kept_counts(handle.layers), "repacking"):
        subset = scores.top(kept, groups=True)
        contenders.append(Contender(SPARSE, kept, ours, partial(handle.use_heads, subset)))
        contenders.append(Contender(MASK_ONLY, kept, watch(mask_only(plain, subset))))
        try:
            contenders.append(faster_repacked(plain, subset, watch, timed[len(timed) // 2]))
        except UnsupportedError as error:
            note = f"no repacked model ({error})"
    return race(contenders, timed, sizes.timing_seconds, seed), note


def bar(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Iterate with a progress bar where standard error is a terminal."""
    return tqdm(items, desc=title, leave=False, disable=None)


def faster_repacked(plain: nn.Module, subset: HeadSubset, watch: Any, batch: Batch) -> Contender:
    """The repacked model with q, k and v fused or apart, whichever ran one batch faster in a short race."""
    rivals = [Contender(REPACKED, subset.count(), watch(repack(plain, subset, fused))) for fused in (False, True)]
    times = [timing.model_milliseconds for timing in race(rivals, [batch], seconds=0, seed=0)]
    return rivals[times.index(min(times))]


def ceiling(timings: Sequence[Timing], sentences: int) -> float:
    """Sentences per second of the dense model if its attention blocks took no time."""
    dense = next(timing for timing in timings if timing.label == DENSE)
    return 1000 * sentences / (dense.model_milliseconds - dense.attention_milliseconds)
