"""What studies on generated sentences share: their batches, splits and contexts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .base_models import Training, trained_model, weights_digest
from .study import Batch, Context, Metrics, Sealed
from .words import SPECIAL, different, in_batches

BATCH_SIZE, BASE_BATCH_SIZE, HELD_OUT_BATCH_SIZE = 32, 64, 256
BASE_SEED, DEVELOPMENT_SEED, TEST_SEED = 10_000, 10_001, 10_002  # no study runs that many seeds
SMOKE_BASE = Training(steps=20)


@dataclass(frozen=True)
class Generated:
    """A task whose examples come without end from a generator, and whose dense model is trained from scratch.

    pairs(split, seed): the examples. as_batch: some of them as the model's forward takes them. fresh: an untrained
    model, which `base` trains. held_out, smoke_held_out: examples of the development and of the test split.
    """

    name: str
    pairs: Callable[[str, int], Iterator[Any]]
    as_batch: Callable[[Sequence[Any]], dict[str, Tensor]]
    fresh: Callable[[], PreTrainedModel]
    base: Training
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module, Any], Metrics]
    held_out: int
    smoke_held_out: int

    def prepare(self, seed: int, smoke: bool) -> Context:
        """One seed: other examples to train and calibrate on; the model and the held-out examples stay."""
        train = list(islice(self.batches("train", seed, BATCH_SIZE), 8 if smoke else 400))
        count = self.smoke_held_out if smoke else self.held_out
        training = SMOKE_BASE if smoke else self.base
        model = self.dense(training)
        return Context(
            model=model,
            train=train,
            calibration=random.Random(seed).sample(train, min(8, len(train))),
            loss=self.loss,
            score_loss=self.loss,
            evaluate=self.evaluate,
            development=self.split("development", DEVELOPMENT_SEED, count),
            tests=Sealed({"test": self.split("test", TEST_SEED, count)}),
            special_tokens=range(len(SPECIAL)),
            facts={"weights": f"trained from scratch, {weights_digest(model)}", "training steps": training.steps},
        )

    def dense(self, training: Training) -> PreTrainedModel:
        """The trained model, from the user's cache where it is there."""
        return trained_model(self.name, self.fresh, lambda: self.batches("train", BASE_SEED, BASE_BATCH_SIZE), training)

    def batches(self, split: str, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a split without end."""
        return map(self.as_batch, in_batches(self.pairs(split, seed), size))

    def split(self, name: str, seed: int, count: int) -> list[dict[str, Tensor]]:
        """Batches of the first `count` different examples of a split."""
        return list(map(self.as_batch, in_batches(different(self.pairs(name, seed), count), HELD_OUT_BATCH_SIZE)))
