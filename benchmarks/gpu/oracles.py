"""The correctness gate: float64 on a slice of the case, and the same slice done eagerly in the case's precision.

Attention is compared whole for some (request, key/value head) pairs, outputs and gradients; blocks and projections in
some rows of the output, and in a short case, which the runner adds, whole with all gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import GpuCase
from .inputs import Inputs
from .measure import Outputs

# Root mean square and largest error, as multiples of the eager computation's: other kernels round at other places, and
# on few values both are a lottery. The tests hold ours to less.
MEAN_FACTOR, LARGEST_FACTOR = 4.0, 8.0
CHUNK = 1 << 26  # scores held at a time
ROWS = 64
SHORT_TOKENS = 256


def check_close(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Fail unless the errors of `actual` are those that its precision allows."""
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, wanted {list(exact.shape)}")
    if not actual.isfinite().all():
        raise AssertionError(f"{name}: {int((~actual.isfinite()).sum())} of {actual.numel()} values are not finite")
    if actual.numel() == 0:
        return
    rounding = torch.finfo(eager.dtype).eps
    error, allowed = actual.double() - exact, eager.double() - exact
    for measure, factor, of in (("mean square", MEAN_FACTOR, _mean), ("largest", LARGEST_FACTOR, _largest)):
        found, limit = of(error), factor * of(allowed) + rounding * of(exact)
        if not found <= limit:
            raise AssertionError(f"{name}: {measure} error {found:.3g}, allowed {limit:.3g} (values {of(exact):.3g})")


def check_gate(name: str, actual: Tensor, exact: Tensor, allowance: Tensor) -> None:
    """Fail unless each of these few sums is as close as its own terms allow."""
    if not ((actual.double() - exact).abs() <= allowance).all():
        raise AssertionError(f"{name}: {actual.tolist()}, wanted {exact.tolist()}, allowed {allowance.tolist()}")


def gate_allowance(squares: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Every term is rounded once or twice, by independent errors, and then their sum. squares: of the terms, summed."""
    return (torch.finfo(dtype).eps * (4 * squares.sqrt() + gradient.abs())).double()


def _mean(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


class AttentionOracle:
    """Outputs [B, H, T, D] and gradients of some active pairs; zeros for every head that is off."""

    def __init__(self, case: GpuCase, inputs: Inputs, mask: Tensor) -> None:
        self.case, self.inputs = case, inputs
        self.mask = mask.expand(case.batch, case.heads)
        groups = self.mask.unflatten(1, (case.kv_heads, case.group)).any(-1).nonzero().tolist()
        # The last ones, where a work list ends, and the first where that takes no long time.
        self.pairs = groups[-1:] + (groups[:1] if case.tokens <= 4096 and len(groups) > 1 else [])
        self.expected = {}

    def check(self, outputs: Outputs) -> None:
        """Raise AssertionError unless they are right."""
        self._check_zeros(outputs)
        for request, kv_head in self.pairs:
            exact, eager = (self._pair(request, kv_head, dtype) for dtype in (torch.float64, self.case.torch_dtype))
            heads = slice(kv_head * self.case.group, (kv_head + 1) * self.case.group)
            places = {"output": heads, "query": heads, "key": kv_head, "value": kv_head, "gate": heads}
            for name, tensor in outputs.items():
                found = tensor[request, places[name]]
                if name == "gate":
                    check_gate(f"gate of request {request}", found, exact[name], eager["gate allowance"])
                else:
                    check_close(f"{name} of request {request}", found, eager[name], exact[name])

    def _check_zeros(self, outputs: Outputs) -> None:
        groups = self.mask.unflatten(1, (self.case.kv_heads, self.case.group)).any(-1)
        for name, tensor in outputs.items():
            off = ~(groups if name in ("key", "value") else self.mask)
            if (tensor[off] != 0).any():
                raise AssertionError(f"{name}: not zero where heads are off")

    def _pair(self, request: int, kv_head: int, dtype: torch.dtype) -> dict[str, Tensor]:
        key = (request, kv_head, dtype)
        if key not in self.expected:
            group = self.case.group
            heads = slice(kv_head * group, (kv_head + 1) * group)
            given = self.inputs
            gate = None if given.gate is None else given.gate[request, heads]
            tensors = (given.query[request, heads], given.key[request, kv_head], given.value[request, kv_head])
            grad = None if self.case.direction == "forward" else given.grad[request, heads].detach()
            self.expected[key] = attention_pair(
                *(one.detach() for one in tensors), grad, gate, self.mask[request, heads], dtype
            )
        return self.expected[key]


def attention_pair(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor | None,
    gate: Tensor | None,
    mask: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Causal attention of one key/value head [T, D] and its query heads [g, T, D], with gradients where `grad` is.

    Matrix products and probabilities in `dtype`, the softmax in float32 or wider, chunk by chunk of the queries.
    """
    wide = torch.promote_types(dtype, torch.float32)
    heads, tokens, head_dim = query.shape
    scale = head_dim**-0.5
    key, value = key.to(dtype), value.to(dtype)
    output = torch.zeros_like(query, dtype=wide)
    grads = {"query": torch.zeros_like(output), "key": torch.zeros_like(key, dtype=wide)}
    grads |= {"value": torch.zeros_like(grads["key"]), "gate": output.new_zeros(heads)}
    squares = output.new_zeros(heads)
    rows = max(1, CHUNK // tokens)
    for head in mask.nonzero().flatten().tolist():
        weight = 1.0 if gate is None else gate[head].detach().to(wide)
        for first in range(0, tokens, rows):
            last = min(tokens, first + rows)
            q = query[head, first:last].to(dtype)
            hidden = torch.arange(first, last, device=q.device)[:, None] < torch.arange(tokens, device=q.device)
            scores = (q @ key.T).to(wide).mul_(scale).masked_fill_(hidden, -math.inf)
            p = scores.softmax(-1)
            plain = p.to(dtype) @ value
            output[head, first:last] = (plain.to(wide) * weight).to(dtype).to(wide)
            if grad is None:
                continue
            up = grad[head, first:last].to(wide)
            gated = (up * weight).to(dtype)
            grads["gate"][head] += (up * plain.to(wide)).sum()
            squares[head] += (up * plain.to(wide)).square().sum()
            dp = (gated @ value.T).to(wide)
            ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(dtype)
            grads["query"][head, first:last] = (ds @ key).to(wide)
            grads["key"] += (ds.T @ q).to(wide)
            grads["value"] += (p.to(dtype).T @ gated).to(wide)
    found = {"output": output} | (grads if grad is not None else {})
    allowance = gate_allowance(squares, grads["gate"], dtype)
    return {name: tensor.to(dtype) for name, tensor in found.items()} | {"gate allowance": allowance}


class LayerOracle:
    """Blocks and projections: in a short case everything, otherwise some rows of the first and the last request."""

    def __init__(self, case: GpuCase, inputs: Inputs, mask: Tensor) -> None:
        self.case, self.inputs, self.mask = case, inputs, mask
        self.whole = case.tokens <= SHORT_TOKENS
        generator = torch.Generator().manual_seed(case.tokens)
        chosen = torch.randperm(case.tokens, generator=generator)[:ROWS].sort().values
        self.rows = (torch.arange(case.tokens) if self.whole else chosen).to(mask.device)
        self.requests = list(range(case.batch)) if self.whole else sorted({0, case.batch - 1})
        self.expected = {}

    def check(self, outputs: Outputs) -> None:
        """Raise AssertionError unless they are right."""
        exact, eager = self._outputs(torch.float64), self._outputs(self.case.torch_dtype)
        for name, tensor in outputs.items():
            if name == "output":
                tensor = tensor[self.requests].index_select(-2, self.rows)
            if name == "gate" and name in exact:
                check_gate(name, tensor, exact[name], eager["gate allowance"])
            elif name in exact:
                check_close(name, tensor, eager[name], exact[name])

    def _outputs(self, dtype: torch.dtype) -> Outputs:
        if dtype not in self.expected:
            self.expected[dtype] = self._compute(dtype)
        return self.expected[dtype]

    def _compute(self, dtype: torch.dtype) -> Outputs:
        leaves = {
            name: tensor.detach().to(torch.promote_types(dtype, tensor.dtype) if name == "gate" else dtype)
            for name, tensor in self.inputs.leaves(self.case).items()
        }
        wanted = self.whole and self.case.direction != "forward"
        if "gate" in leaves:
            # One for every value, whose gradients are the terms of the gate's own.
            sizes = (self.case.tokens, self.case.head_dim) if wanted else (1, 1)
            gate = leaves["gate"].expand(self.case.batch, self.case.heads)
            leaves["gate"] = gate[..., None, None].expand(*gate.shape, *sizes).clone()
        leaves = {name: tensor.requires_grad_(wanted) for name, tensor in leaves.items()}
        parts = [plain_layer(self.case, leaves, self.mask, request, self.rows) for request in self.requests]
        output = torch.stack(parts)
        if not wanted:
            return {"output": output}
        grad = self.inputs.grad_of(self.case).to(dtype)
        found = dict(zip(leaves, torch.autograd.grad(output, tuple(leaves.values()), grad), strict=True))
        if "gate" in leaves:
            shape = self.inputs.gate.shape
            squares = found["gate"].square().sum((2, 3)).sum_to_size(shape)
            found["gate"] = found["gate"].sum((2, 3)).sum_to_size(shape)
            found["gate allowance"] = gate_allowance(squares, found["gate"], dtype)
        return {"output": output.detach(), **found}


def plain_layer(case: GpuCase, leaves: dict[str, Tensor], mask: Tensor, request: int, rows: Tensor) -> Tensor:
    """What a block or projection gives for one request in some rows, in plain operators: [rows, E] or [heads, rows, D].

    Heads that are off are multiplied by 0; a gate is [B, H, 1 or T, 1 or D]; "in" gives query, key and value heads side
    by side.
    """
    kept = mask.expand(case.batch, case.heads)[request]
    groups = kept.unflatten(0, (case.kv_heads, case.group)).any(-1)
    factor = kept[:, None, None] if "gate" not in leaves else kept[:, None, None] * leaves["gate"][request]
    if case.level == "out":
        heads = leaves["heads"][request].index_select(-2, rows)
        return _join(heads * factor.to(heads.dtype)) @ leaves["out_weight"].T
    x = leaves["x"][request]
    query = _split(x.index_select(0, rows) @ leaves["query_weight"].T, case.heads) * kept[:, None, None]
    if case.level == "in":
        x = x.index_select(0, rows)
    key, value = (
        _split(x @ leaves[name].T, case.kv_heads) * groups[:, None, None] for name in ("key_weight", "value_weight")
    )
    if case.level == "in":
        return torch.cat([query, key, value])
    key, value = (one.repeat_interleave(case.group, 0) for one in (key, value))
    hidden = rows[:, None] < torch.arange(case.tokens, device=rows.device)
    scores = (query @ key.transpose(1, 2) * case.head_dim**-0.5).to(torch.promote_types(x.dtype, torch.float32))
    p = scores.masked_fill(hidden, -math.inf).softmax(-1).to(x.dtype)
    return F.linear(_join(p @ value * factor.to(x.dtype)), leaves["out_weight"])


def _split(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)


def _join(heads: Tensor) -> Tensor:
    return heads.transpose(0, 1).flatten(1)
