"""What scoring and training read from a batch, and from what a model makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import invalid, invalid_type

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


def examples_in(batch: Batch) -> int:
    """B, the rows of the batch."""
    return max(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1)


def token_mask(model: nn.Module, batch: Batch, stack: str) -> Tensor | None:
    """What the batch says of the padding of one stack's tokens, "encoder" or "decoder"; None where it says nothing."""
    two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return batch.get("decoder_attention_mask" if two_stacks and stack == "decoder" else "attention_mask")


def outputs_of(output: Any) -> Tensor:
    """The outputs `[B, T, ...]` or `[B, ...]` of a forward: the last hidden state, else the logits."""
    for name in ("last_hidden_state", "logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise invalid_type("model", "an output with last_hidden_state or logits", output)


def counted_tokens(model: nn.Module, batch: Batch, outputs: Tensor) -> Tensor | None:
    """Bool `[B, T]`, False at padding, for outputs that are one a token; else None: everything counts."""
    mask = token_mask(model, batch, "decoder")
    if mask is None or outputs.dim() != 3 or outputs.shape[:2] != mask.shape:
        return None
    return mask.to(outputs.device) != 0


def loss_of(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    """The scalar `loss(model, batch)`, or the model's own where `loss` is None.

    Raises InvalidArgumentError where the model gives none, InvalidTypeError for anything but a scalar tensor.
    """
    value = getattr(model(**batch), "loss", None) if loss is None else loss(model, batch)
    if value is None:
        raise invalid("batches", "labels, so that the model gives a loss, or loss=", f"keys {sorted(batch)}")
    return checked_loss(value)


def checked_loss(value: Any) -> Tensor:
    """`value`; raises InvalidTypeError unless it is a scalar tensor."""
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise invalid_type("loss", "a function that gives a scalar tensor", value)
    return value
