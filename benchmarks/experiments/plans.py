"""The methods that every study compares, as data, and the tables that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .study import FROZEN, SEEDS, TRAINED, Method, Table

DRAWS = 4  # of random heads a seed, so that chance costs the comparison little

# Four trials for every method that trains. DSP: the published rate first; the published runs on BERT anneal over two
# thirds of their steps.
DSP_TRIALS = (
    {"gate_lr": 0.5, "anneal": 2 / 3},
    {"gate_lr": 0.5, "anneal": 1.0},
    {"gate_lr": 0.2, "anneal": 1.0},
    {"gate_lr": 1.0, "anneal": 1.0},
)
STRAIGHT_THROUGH_TRIALS = tuple({"gate_lr": rate} for rate in (0.5, 0.1, 0.02, 0.005))
L0_TRIALS = (
    {"gate_lr": 0.1, "initial": "xavier"},
    {"gate_lr": 0.1, "initial": 2.0},
    {"gate_lr": 0.3, "initial": "xavier"},
    {"gate_lr": 0.3, "initial": 2.0},
)
# Where the weights train too, everyone tries the same four rates of the weights, and gates keep their published rates.
FINE_TUNING_RATES = (2e-5, 5e-5, 1e-4, 2e-4)

DSP = Method("DSP", "subset gates", {"estimator": "gumbel"}, DSP_TRIALS)
STRAIGHT_THROUGH = Method("straight-through", "subset gates", {"estimator": "ste"}, STRAIGHT_THROUGH_TRIALS)
L0 = Method("L0", "hard concrete", {}, L0_TRIALS)
JOINT = (
    Method("DSP", "subset gates", {"estimator": "gumbel", "gate_lr": 0.5, "anneal": 2 / 3}),
    Method("L0", "hard concrete", {"gate_lr": 0.1, "initial": 2.0}),
)
RANDOM = Method("random", "chance", {"draws": DRAWS})


def score(name: str, **settings: object) -> Method:
    """A method that ranks heads with `score_heads`; `settings` as `methods.scores_of` takes them."""
    return Method(name, "scores", {"score": settings})


ATTENTION_SCORES = (
    score("entropy", method="entropy"),
    score("sparsity", method="sparsity"),
    score("confidence", method="confidence"),
    score("redundancy", method="redundancy"),
    score("attention-guided", method="attention_guided"),
    score("attention-guided, reversed", method="attention_guided", sign=-1),
    score("attention-guided, no special tokens", method="attention_guided", needs=("special_tokens",)),
)


def label_free_scores(step: int) -> tuple[Method, ...]:
    """Scores that need no labels; the iterative one takes `step` heads at a time away."""
    projected = {"method": "michel_projected", "needs": ("seed",)}
    return (
        score("magnitude", method="magnitude"),
        *ATTENTION_SCORES,
        score("Michel, projected", **projected),
        score("Michel, projected, iterative", **projected, rescore_every=step),
        score("ablation", method="ablation"),
    )


def labelled_scores(step: int) -> tuple[Method, ...]:
    """As `label_free_scores`, with the loss of the labels."""
    return (
        score("magnitude", method="magnitude"),
        *ATTENTION_SCORES,
        score("Michel", method="michel", needs=("loss",)),
        score("Michel, iterative", method="michel", needs=("loss",), rescore_every=step),
        score("ablation", method="ablation", needs=("loss",)),
    )


def frozen_table(scores: Sequence[Method], counts: Mapping[int, int], steps: int) -> Table:
    """Weights stay: gates that train alone, chance and scores."""
    return Table(FROZEN, (DSP, STRAIGHT_THROUGH, L0, RANDOM, *scores), counts, steps)


def trained_table(
    scores: Sequence[Method], counts: Mapping[int, int], steps: int, rates: Sequence[float] = FINE_TUNING_RATES
) -> Table:
    """Weights train: with the gates, or after every score for as many steps, random heads included."""
    trials = tuple({"lr": rate} for rate in rates)
    methods = (*JOINT, Method("random", "chance", {"draws": 1}), *scores)
    return Table(TRAINED, tuple(replace(method, trials=trials) for method in methods), counts, steps)


def smoke_table(table: Table, steps: int, counts: Sequence[int]) -> Table:
    """The table for a smoke test: a few steps, one seed, two trials, the given counts."""
    methods = tuple(replace(method, trials=tuple(method.trials)[:2]) for method in table.methods)
    return replace(table, methods=methods, counts={count: count for count in counts}, steps=steps, seeds=SEEDS[:1])
