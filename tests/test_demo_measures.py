"""The demo's measures against values known beforehand: cosine, recall, interleaved times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sparse_heads.demo import speed
from sparse_heads.demo.quality import mean_cosine, nearest, neighbour_recall
from sparse_heads.demo.study import ceiling, kept_counts
from sparse_heads.layers import LayerInfo, Layers


def unit(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def test_mean_cosine():
    dense = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    turned = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    assert mean_cosine(turned, dense) == pytest.approx((0.6 - 1.0) / 2)


def test_a_sentence_is_not_its_own_neighbour():
    found = nearest(unit(30, 8, seed=0), count=10)
    assert found.shape == (30, 10)
    assert not (found == torch.arange(30)[:, None]).any()


def test_recall_against_sets():
    dense, other = unit(40, 8, seed=0), unit(40, 8, seed=1)
    wanted = [set(row.tolist()) for row in nearest(dense, 10)]
    found = [set(row.tolist()) for row in nearest(other, 10)]
    expected = sum(len(a & b) for a, b in zip(wanted, found, strict=True)) / 400
    assert neighbour_recall(other, dense) == pytest.approx(expected)
    assert neighbour_recall(dense, dense) == 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "counts"),
    [
        (12, 12, [72, 60, 48, 36, 24, 12]),
        (12, 3, [72, 60, 48, 36, 24, 12]),
        (8, 1, [48, 40, 32, 24, 16, 8]),
        (1, 1, [6, 5, 4, 3, 2, 1]),
    ],
)
def test_numbers_of_heads(heads: int, kv_heads: int, counts: list[int]):
    infos = [LayerInfo(f"{i}", "encoder", i, "self", heads, kv_heads, 4, 4) for i in range(6)]
    assert kept_counts(Layers(infos, "bert")) == counts


def test_few_heads_give_every_number_once():
    assert kept_counts(Layers([LayerInfo("0", "encoder", 0, "self", 4, 4, 4, 4)], "bert")) == [4, 3, 2, 1]


class Sleeper(nn.Module):
    """Sleeps `seconds`, and `inner` more in each of two modules that stand for attention."""

    def __init__(self, seconds: float, inner: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds
        self.parts = nn.ModuleList([Nap(inner), Nap(inner)])

    def forward(self, input_ids: Tensor) -> None:
        time.sleep(self.seconds)
        for part in self.parts:
            part(input_ids)


class Nap(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> None:
        time.sleep(self.seconds)


def stopwatch(model: Sleeper) -> speed.Stopwatch:
    return speed.Stopwatch(model, starts=model.parts, ends=model.parts)


BATCH = {"input_ids": torch.zeros(4, 3, dtype=torch.long)}


def test_a_stopwatch_tells_attention_from_the_rest():
    total, attention = stopwatch(Sleeper(0.02, 0.005)).time(BATCH)
    assert attention >= 10 and total >= 20 + attention


def test_a_stopwatch_leaves_no_hooks_behind_even_after_an_error():
    model = Sleeper(0, 0)
    with pytest.raises(TypeError):
        stopwatch(model).time({**BATCH, "unknown": None})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_race_times_everyone_under_its_own_context(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "MAXIMUM_ROUNDS", 4)
    entered = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append("in")
        yield

    quick, slow = Sleeper(0, 0), Sleeper(0.01, 0.002)
    contenders = [speed.Contender("quick", 3, stopwatch(quick), context), speed.Contender("slow", 2, stopwatch(slow))]
    first, second = speed.race(contenders, [BATCH, BATCH], seconds=60, seed=0)
    assert len(entered) == 5
    assert (first.label, first.kept, first.rounds, first.sentences) == ("quick", 3, 4, 8)
    assert second.model_milliseconds >= 28 and second.attention_milliseconds >= 8
    assert second.model_milliseconds_p20 <= second.model_milliseconds_p80
    assert second.sentences_per_second == pytest.approx(8000 / second.model_milliseconds)
    assert first.sentences_per_second > second.sentences_per_second


def test_a_race_out_of_time_still_runs_its_fewest_rounds():
    (timing,) = speed.race([speed.Contender("quick", 3, stopwatch(Sleeper(0, 0)))], [BATCH], seconds=0, seed=0)
    assert timing.rounds == speed.MINIMUM_ROUNDS


def test_the_ceiling_is_the_dense_model_without_its_attention():
    timing = speed.Timing("dense", 72, 3, 32, 320.0, 100.0, 36.0, 99.0, 101.0)
    assert ceiling([timing], 32) == pytest.approx(32 / 0.064)
