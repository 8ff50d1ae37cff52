"""The records of a model against the oracle; shared by the tests of `handle.record`."""

from __future__ import annotations

import torch
from attention_oracle import ByHand, probabilities, visible_keys
from models import build, inputs, masked_copy

PLAIN = ("entropy", "sparsity", "confidence", "redundancy", "position_mass")
CAUSAL = ("llama", "llama_lm", "gqa", "bert_cross")
CLOSE = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
# Llama's eager attention has single precision, whatever the model's, and NaN at left padding in a double one.
ROUNDED = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
SPECIAL = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14)


def by_hand(name, layers, batches, mask=None, special=(), model=None):
    """A `ByHand` a layer: of the eager model, or its copy with heads off; for a mask `[B, L, H]` a row at a time."""
    model = build(name, "eager", torch.float64) if model is None else model
    found = [ByHand(layer.num_heads) for layer in layers]
    for batch in batches:
        rows = len(batch["input_ids"])
        alone = mask is not None and mask.dim() == 3
        for part in [slice(row, row + 1) for row in range(rows)] if alone else [slice(None)]:
            own = mask[part][0] if alone else mask
            oracle = model if own is None else masked_copy(model, layers, own)
            piece = {key: value[part] for key, value in batch.items()}
            attentions = probabilities(oracle, piece)
            is_special = torch.isin(piece["input_ids"], torch.tensor(special, dtype=torch.long))
            counted = piece["attention_mask"].bool() & ~is_special
            for row, layer in enumerate(layers):
                on = None if own is None else own[row, : layer.num_heads].expand(len(counted), -1)
                visible = visible_keys(piece, layer.kind, name in CAUSAL)
                found[row].add(
                    attentions[layer.kind, layer.index], visible, counted, is_special if special else None, on
                )
    return found


def assert_equals(record, found, names=PLAIN):
    for row, (layer, each) in enumerate(zip(record.layers, found, strict=True)):
        for name in names:
            if name == "position_mass" and layer.kind == "cross":
                assert record.statistics[name][row].isnan().all()
                continue
            close = ROUNDED if record.layers.model_type == "llama" else CLOSE
            torch.testing.assert_close(record.statistics[name][row], each.mean(name), **close)
            assert record.statistics[name].dtype == torch.float64
        if each.weights.any():
            assert record.count[row] == each.count


def two_batches(model, side="right"):
    batches = [inputs(model), inputs(model, rows=2, length=4)]
    if side == "left":
        batches = [batch | {"attention_mask": batch["attention_mask"].flip(1)} for batch in batches]
    return batches
