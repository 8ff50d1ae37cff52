"""Leave one head out, for every head: how much the outputs change, or the loss rises, without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import UnsupportedError, invalid
from ..layers import whole_number
from .batches import Batch, Loss, checked_loss, counted_tokens, examples_in, loss_of, outputs_of
from .prefix import Prefix, find_blocks


def ablation(handle: Any, batches: Iterable[Batch], loss: Loss | None = None, *, rows: int = 32) -> Tensor:
    """The effect of switching each head off by itself, all others on: float64 `[L, H]`, larger = the head does more.

    Without a loss: ||Y - Y_h||^2 / ||Y||^2 over an example's tokens that are no padding, mean over examples, where Y
    are the outputs (last hidden state, or logits) and Y_h those without head h. With `loss(model, batch)`, or the
    model's own where batches have labels: the loss without the head minus the loss with it, mean over examples; below
    0 where the model is better off without the head.

    What comes before the ablated head's way out runs once a batch: the outputs of the blocks before its own (elements
    of `nn.ModuleList`s; models without any share less), and its layer's attention or queries, keys and values, are kept
    and handed out again. Without a loss, `rows` examples run at a time, each without a head of its own; a loss is of a
    whole batch, so one head is off at a time.
    """
    rows = whole_number("rows", rows, 1)
    kept, ends = _shared_modules(handle)
    total = torch.zeros(len(handle.layers), handle.layers.max_heads, dtype=torch.float64)
    examples = 0
    kinds = set()
    with torch.no_grad(), _without_caches(handle.model):
        for batch in batches:
            if batch.get("past_key_values") is not None:
                raise invalid("batches", "no past_key_values for 'ablation', which runs a batch many times", "one")
            prefix = Prefix(kept, ends)
            with handle.use_heads(None), prefix.recording():
                output = handle.model(**batch) if loss is None else loss(handle.model, batch)
            value = output if loss is not None else getattr(output, "loss", None)
            kinds.add(value is None)
            if len(kinds) > 1:
                raise invalid("batches", "labels in all batches, or in none", "some of each")
            sweep = _Sweep(handle, batch, prefix, examples_in(batch))
            total += sweep.outputs(outputs_of(output), rows) if value is None else sweep.losses(value, loss)
            examples += sweep.examples
    return total / examples


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Forwards that are not told otherwise use no cache inside the `with` block: blocks that fill one must run."""
    config = getattr(model, "config", None)
    found = getattr(config, "use_cache", None)
    if found:
        config.use_cache = False
    try:
        yield
    finally:
        if found:
            config.use_cache = found


class _Sweep:
    """One batch, every head left out in turn."""

    def __init__(self, handle: Any, batch: Batch, prefix: Prefix, examples: int) -> None:
        self.handle = handle
        self.batch = batch
        self.prefix = prefix
        self.examples = examples

    def outputs(self, dense: Tensor, rows: int) -> Tensor:
        """The relative change of the outputs, summed over examples: float64 `[L, H]`."""
        if dense.shape[0] != self.examples:
            raise UnsupportedError(
                f"model: 'ablation' wanted outputs with a row for each of {self.examples} examples, got "
                f"{list(dense.shape)}; with loss= it takes any"
            )
        counted = counted_tokens(self.handle.model, self.batch, dense)
        norms = [_square(dense[row], counted, row) for row in range(self.examples)]
        total = torch.zeros(len(self.handle.layers), self.handle.layers.max_heads, dtype=torch.float64)
        for row, layer in enumerate(self.handle.layers):
            pairs = torch.cartesian_prod(torch.arange(layer.num_heads), torch.arange(self.examples))
            for heads, chosen in (part.unbind(1) for part in pairs.split(rows)):
                ablated = self._without(row, heads, chosen)
                for i, (head, example) in enumerate(zip(heads.tolist(), chosen.tolist(), strict=True)):
                    change = _square(ablated[i] - dense[example], counted, example)
                    total[row, head] += change / max(norms[example], torch.finfo(torch.float64).tiny)
        return total

    def _without(self, row: int, heads: Tensor, chosen: Tensor) -> Tensor:
        """The outputs of the `chosen` examples, int64 [R], each without its own of `heads`, int64 [R], of one layer."""
        mask = torch.ones(len(heads), self.handle.layers[row].num_heads, dtype=torch.bool)
        mask[torch.arange(len(heads)), heads] = False

        def expanded(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self.examples:
                return value
            return value.index_select(0, chosen.to(value.device))

        batch = tree_map(expanded, dict(self.batch))
        with self.handle.use_heads_in_layer(row, mask), self.prefix.handing_out(self._end(row), expanded):
            return outputs_of(self.handle.model(**batch))

    def losses(self, dense: Any, loss: Loss | None) -> Tensor:
        """The rise of the loss, times the number of examples: float64 `[L, H]`."""
        total = torch.zeros(len(self.handle.layers), self.handle.layers.max_heads, dtype=torch.float64)
        before = _finite(checked_loss(dense))
        for row, layer in enumerate(self.handle.layers):
            for head in range(layer.num_heads):
                mask = torch.arange(layer.num_heads)[None] != head
                with self.handle.use_heads_in_layer(row, mask), self.prefix.handing_out(self._end(row), Tensor.clone):
                    value = loss_of(self.handle.model, self.batch, loss)
                total[row, head] = (_finite(value) - before) * self.examples
        return total

    def _end(self, row: int) -> nn.Module:
        """Where forwards without one of the layer's heads begin to differ."""
        return self.handle.sites[row].projections["output"]


def _shared_modules(handle: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules whose outputs are kept, and the output projections."""
    kept = find_blocks(handle.model, [layer.name for layer in handle.layers])
    for site in handle.sites:
        within = any(module is site.projections["output"] for module in site.module.modules())
        if within or handle.core:  # an output projection of the core layout reads all heads
            kept += [site.projections[role] for role in ("query", "key", "value")]
        else:
            kept.append(site.module)
    return list(dict.fromkeys(kept)), [site.projections["output"] for site in handle.sites]


def _square(outputs: Tensor, counted: Tensor | None, example: int) -> float:
    """The squared norm of one example's outputs, `[T, ...]` or of any shape, without its padding."""
    if counted is not None:
        outputs = outputs[counted[example]]
    return float(torch.linalg.vector_norm(outputs, dtype=torch.float64)) ** 2


def _finite(value: Tensor) -> float:
    if not bool(value.isfinite()):
        raise invalid("loss", "a finite value", f"{value.item()}")
    return float(value)
