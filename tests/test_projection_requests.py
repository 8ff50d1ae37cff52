"""Does a request of a batch get the same bits whatever the others' masks, and nothing from heads that it masks?"""

from __future__ import annotations

import pytest
import torch
from projection_inputs import PER_REQUEST, draw, draw_masks, draw_weights, group_mask

import sparse_heads as sh
from sparse_heads.errors import UnsupportedError
from sparse_heads.ops.projection import operators_per_request

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Elsewhere torch's own products run, which may round otherwise for another number of rows or another alignment.
with_kernels = pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="needs the AVX-512 kernels"
)

HEADS, KV_HEADS, HEAD_DIM, WIDTH, BATCH = 6, 3, 20, 50, 5
NEIGHBOURS = 100


class Block:
    """An in-projection of three weights and an output projection, of inputs for `BATCH` requests."""

    def __init__(self, tokens: int, dtype: torch.dtype = torch.float32) -> None:
        counts = (HEADS, KV_HEADS, KV_HEADS)
        self.x = draw(BATCH, tokens, WIDTH, dtype=dtype)
        self.weights = draw_weights([(count * HEAD_DIM, WIDTH) for count in counts], dtype)
        self.biases = [draw(count * HEAD_DIM, seed=20 + count, dtype=dtype) for count in counts]
        self.heads = draw(BATCH, tokens, HEADS, HEAD_DIM, seed=1, dtype=dtype).transpose(1, 2)
        (self.out_weight,) = draw_weights([(WIDTH, HEADS * HEAD_DIM)], dtype, seed=30)

    def run(self, mask: torch.Tensor, requests: slice = slice(None)) -> list[torch.Tensor]:
        """Queries, keys, values and the output projection of some requests, under their masks or a shared one."""
        x, heads = self.x[requests], self.heads[requests]
        projected = sh.in_projection(x, self.weights, self.biases, mask, head_dim=HEAD_DIM, backend="cpu")
        return [*projected, sh.out_projection(heads, self.out_weight, None, mask, backend="cpu")]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [*((tokens, torch.float32) for tokens in (1, 7, 8, 9, 16, 17, 33, 128)), (5, torch.bfloat16), (17, torch.float64)],
    ids=str,
)
def test_other_requests_masks_change_no_bit(tokens, dtype):
    block, own = Block(tokens, dtype), PER_REQUEST[0]
    masks = draw_masks(NEIGHBOURS * BATCH, HEADS).view(NEIGHBOURS, BATCH, HEADS)
    # Also neighbours that share the request's heads, all its work, or nothing.
    masks[0], masks[1], masks[2] = own, True, False
    masks[:, 2] = own
    first = [output[2] for output in block.run(masks[0])]
    for mask in masks[1:]:
        assert all_equal([output[2] for output in block.run(mask)], first)


@with_kernels
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 33, 128])
def test_a_request_alone_gets_the_bits_that_it_gets_in_a_batch(tokens):
    block, mask = Block(tokens), draw_masks(BATCH, HEADS)
    together = block.run(mask)
    for request in range(BATCH):
        part = slice(request, request + 1)
        assert all_equal([output[part] for output in together], block.run(mask[part], part))


@with_kernels
@pytest.mark.parametrize("tokens", [9, 17, 33, 128])
def test_equal_masks_give_the_bits_of_a_shared_one(tokens):
    block, mask = Block(tokens), PER_REQUEST[0]
    *wide, output = block.run(mask.expand(BATCH, HEADS))
    *compact, shared_output = block.run(mask)
    for each, expected in zip(wide, compact, strict=True):
        assert torch.equal(each[:, group_mask(mask, each.shape[1])], expected)
    assert torch.equal(output, shared_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
def test_masked_heads_are_exact_zeros(tokens, dtype):
    for mask in (draw_masks(BATCH, HEADS), torch.zeros(BATCH, HEADS, dtype=torch.bool)):
        *projected, output = Block(tokens, dtype).run(mask)
        for heads in projected:
            runs = group_mask(mask, heads.shape[1])
            assert (heads[~runs] == 0).all() and (heads[runs] != 0).any((1, 2)).all()
        assert (output[~mask.any(1)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize("scattered", [False, True], ids=["neighbours", "scattered requests"])
def test_gradients_of_masked_heads_are_not_read(scattered, tokens, dtype):
    """What comes back for (request, head) pairs that are off may be anything."""
    block = Block(tokens, dtype)
    mask = PER_REQUEST[[0, 3, 0, 2, 0]] if scattered else PER_REQUEST[[0, 0, 1, 3, 3]]
    masks = [mask, group_mask(mask, KV_HEADS), group_mask(mask, KV_HEADS)]
    tensors = [block.x, *block.weights, *block.biases]
    results = []
    for poison in (0.0, torch.nan):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = operators_per_request.in_projection(leaves[0], leaves[1:4], leaves[4:], masks, HEAD_DIM)
        gradients = [
            draw(*output.shape, seed=i, dtype=dtype).masked_fill(
                ~each.repeat_interleave(HEAD_DIM, 1).unsqueeze(1), poison
            )
            for i, (output, each) in enumerate(zip(outputs, masks, strict=True))
        ]
        results.append(torch.autograd.grad(outputs, leaves, gradients))
    assert all_equal(*results) and all(gradient.isfinite().all() for gradient in results[0])


def test_a_second_derivative_raises():
    mask = PER_REQUEST[:2, :2]
    x, (weight,) = draw(2, 3, 4).requires_grad_(), draw_weights([(4, 4)])
    (heads,) = (sh.in_projection(x, weight, None, mask, head_dim=2, backend="cpu"),)
    (gradient,) = torch.autograd.grad(heads.square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"no second derivative under a mask \[B, H\]; use backend='reference'"):
        gradient.sum().backward()
    weight.requires_grad_()
    output = sh.out_projection(heads.detach(), weight, None, mask, backend="cpu")
    (gradient,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"no second derivative under a mask \[B, H\]; use backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("gate", [None, draw(BATCH, HEADS, dtype=torch.float32)], ids=["no gate", "gate"])
def test_heads_in_any_order_of_memory_give_the_same_bits(gate):
    """`[B, H, T, D]` side by side in memory, as attention functions may leave them: only kept heads are copied."""
    block, mask = Block(9), draw_masks(BATCH, HEADS)
    poisoned = block.heads.contiguous().masked_fill(~mask[..., None, None], torch.nan)
    results = []
    for heads in (block.heads, poisoned):
        heads = heads.clone(memory_format=torch.preserve_format).requires_grad_()
        leaves = [heads] if gate is None else [heads, gate.clone().requires_grad_()]
        output = sh.out_projection(heads, block.out_weight, None, mask, gate=leaves[-1] if gate is not None else None)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all_equal(*results)
