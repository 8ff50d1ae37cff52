"""Run by test_triton_compile.py in a process without the interpreter; prints "done" in the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kernel_cases import meta
from kernel_compiler import compile_launch, identity, source, target_of

from sparse_heads._triton.launch import Launch
from sparse_heads._triton.primitives import dot

HOPPER, BLACKWELL, AMPERE = (9, 0), (10, 0), (8, 0)


@triton.jit
def product_kernel(
    left, right, output, bias, strides, size, one, odd, large, factor, flag, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    row, column = tl.arange(0, BLOCK), tl.arange(0, STEP)
    accumulator = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, size, STEP):
        tile = tl.load(left + row[:, None] * strides[0] + (first + column)[None, :] * strides[1])
        other = tl.load(right + row[None, :] * strides[0] + (first + column)[:, None] * strides[1])
        accumulator = dot(tile, other, accumulator, "ieee")
    if flag:
        accumulator = accumulator * factor + odd + one
    if bias is not None:
        accumulator += tl.load(bias + row)[None, :]
    tl.store(output + large + row[:, None] * BLOCK + row[None, :], accumulator.to(output.dtype.element_ty))


def launch(**changed) -> Launch:
    operands = meta(128, 512, dtype=torch.bfloat16)
    arguments = {
        "left": operands,
        "right": operands[:, 3:],
        "output": meta(128, 128, dtype=torch.float32),
        "bias": None,
        "strides": (512, 1),
        "size": 512,
        "one": 1,
        "odd": 513,
        "large": 1 << 33,
        "factor": 1.0,
        "flag": True,
        "BLOCK": 128,
        "STEP": 64,
        **changed,
    }
    return Launch(product_kernel, (1,), arguments, {"num_warps": 8, "num_stages": 3})


def specialisation() -> None:
    """Types by value; what is 1 or None is constant; what is divisible by 16, pointers too, is marked."""
    found, options = source(launch(), target_of(HOPPER))
    names = found.fn.arg_names
    types = dict(found.signature)
    assert types.pop("strides") == ("i32", "constexpr")
    assert types == {
        "left": "*bf16",
        "right": "*bf16",
        "output": "*fp32",
        "bias": "constexpr",
        "size": "i32",
        "one": "constexpr",
        "odd": "i32",
        "large": "i64",
        "factor": "fp32",
        "flag": "u1",
        "BLOCK": "constexpr",
        "STEP": "constexpr",
    }
    constants = {names[place[0]]: value for place, value in found.constants.items()}
    assert constants == {"bias": None, "strides": 1, "one": 1, "BLOCK": 128, "STEP": 64}
    marked = {names[place[0]] for place, mark in found.attrs.items() if ["tt.divisibility", 16] in mark}
    assert marked == {"left", "output", "strides", "size", "large"}, marked
    assert (options["num_warps"], options["num_stages"]) == (8, 3)
    assert identity(launch(), HOPPER) == identity(launch(size=1024), HOPPER)
    assert identity(launch(), HOPPER) != identity(launch(size=513), HOPPER) != identity(launch(size=513), AMPERE)


def what_is_read() -> None:
    """Each figure on a kernel where it is known."""
    aligned = launch(right=launch().arguments["left"])
    found = {capability: compile_launch(aligned, capability) for capability in (AMPERE, HOPPER, BLACKWELL)}
    assert [each.wgmma for each in found.values()] == [False, True, False]
    assert [each.tcgen05 for each in found.values()] == [False, False, True]
    assert all(each.asynchronous and each.local == each.local_instructions == 0 for each in found.values()), found
    # At least two stages of two operands.
    assert all(each.shared >= 2 * 2 * 128 * 64 * 2 for each in found.values()), found
    cramped = compile_launch(aligned._replace(options={**aligned.options, "maxnreg": 32}), AMPERE)
    assert cramped.registers <= 32 and cramped.local > 0 and cramped.local_instructions > 0, cramped


if __name__ == "__main__":
    specialisation()
    what_is_read()
    print("done", flush=True)
