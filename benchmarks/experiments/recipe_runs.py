"""Runs a recipe: the dense model, the method's choice of heads, and what the model can do with them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

import sparse_heads as sh

from .recipe_models import Data, Limits, epoch, evaluate, fresh_model, load_data, on_device, optimise, steps_of

if TYPE_CHECKING:
    from .recipes import Recipe

RANDOM_DRAWS = 5


def run(
    recipe: Recipe, name: str, folder: Path | None, kept: Sequence[int] | None, recovery: int, limits: Limits, out: Path
) -> dict[str, Any]:
    """The recipe's results: what was run, and a row for every number of heads.

    kept: instead of the recipe's counts; recovery: steps of fine-tuning after heads were chosen by scores.
    """
    torch.manual_seed(limits.seed)
    data = load_data(recipe.task, folder, limits)
    model, steps = dense_model(recipe, data, limits, out)
    total = sh.attach(model).layers.num_heads
    sh.get_handle(model).detach()
    counts = kept or ([total // 2] if limits.tiny and recipe.kept != (None,) else recipe.kept)
    rows = [{"kept": total, "steps": steps, **evaluate(model, recipe.task, data)}] if recipe.dense else []
    if recipe.score is None:
        rows += by_gates(recipe, model, data, counts, limits)
    else:
        rows += by_scores(recipe, model, data, counts, recovery, limits)
    return {
        "recipe": name,
        "source": recipe.source,
        "dataset": str(folder) if folder else "/".join(recipe.task.dataset),
        "model": f"tiny random {recipe.task.family}" if limits.tiny else recipe.task.model,
        "heads": total,
        "steps limited to": limits.steps,
        "seed": limits.seed,
        "versions": {
            "sparse_heads": sh.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }


def dense_model(recipe: Recipe, data: Data, limits: Limits, out: Path) -> tuple[PreTrainedModel, int]:
    """The model that the choice of heads starts from, and the steps it trained; kept in `out` for other recipes."""
    model = fresh_model(recipe.task, data.tokenizer, limits).to(limits.device)
    if recipe.dense is None:
        return model, 0
    saved = out / f"dense-{recipe.task.dataset[-1].replace('/', '-')}-seed{limits.seed}"
    keep = not limits.tiny and limits.steps is None
    if keep and saved.is_dir():
        return type(model).from_pretrained(saved).to(limits.device), steps_of(recipe.dense, data, limits)
    steps = optimise(model, recipe.dense, data, limits)
    if keep:
        model.save_pretrained(saved)
    return model, steps


def by_gates(
    recipe: Recipe, dense: PreTrainedModel, data: Data, counts: Sequence[int | None], limits: Limits
) -> Iterator[dict[str, Any]]:
    """A row for every count: gates trained from the dense model, evaluated with the heads they keep."""
    steps = steps_of(recipe.gates, data, limits)
    for kept in counts:
        model = copy.deepcopy(dense)
        changes = {"seed": limits.seed}
        if kept is not None:
            changes["k"] = kept
        if hasattr(recipe.config, "anneal_steps"):  # a shorter training would end before the gates have settled
            changes["anneal_steps"] = min(recipe.config.anneal_steps, max(1, 2 * steps // 3))
        gates = sh.attach_gates(model, replace(recipe.config, **changes))
        optimise(model, recipe.gates, data, limits, gates)
        yield {"kept": gates.subset().count(), "steps": steps, **evaluate(model, recipe.task, data)}


def by_scores(
    recipe: Recipe, dense: PreTrainedModel, data: Data, counts: Sequence[int], recovery: int, limits: Limits
) -> Iterator[dict[str, Any]]:
    """A row for every count of one ranking, of several for random heads; a second one after recovery."""
    options = dict(recipe.score)
    limit = options.pop("batches", None)
    batches = on_device(epoch(data, recipe.dense, random.Random(limits.seed))[: limits.steps], limits.device)
    draws = RANDOM_DRAWS if options["method"] == "random" else 1
    handle = sh.attach(dense)
    for draw in range(draws):
        seeded = {"seed": limits.seed + draw} if options["method"] == "random" else {}
        data_free = options["method"] in ("random", "magnitude")
        scores = sh.score_heads(dense, None if data_free else batches[:limit], **options, **seeded)
        for kept in counts:
            subset = scores.top(kept)
            with handle.use_heads(subset):
                yield {"kept": kept, "draw": draw, "steps": 0, **evaluate(dense, recipe.task, data)}
            if recovery:
                model = copy.deepcopy(dense)
                sh.recover(model, subset, batches, steps=recovery, lr=recipe.dense.lr, seed=limits.seed)
                yield {"kept": kept, "draw": draw, "steps": recovery, **evaluate(model, recipe.task, data)}
