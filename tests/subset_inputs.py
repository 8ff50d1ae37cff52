"""Layers, subsets and scores for the tests: a toy model, and hypothesis strategies for random ones."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sparse_heads.heads import HeadScores, HeadSubset, LayerInfo, Layers


def layer(index=0, kind="self", num_heads=4, num_kv_heads=2, name=None, **changes):
    fields = {"stack": "decoder", "head_dim": 8, "v_head_dim": 16} | changes
    return LayerInfo(
        name or f"block.{index}.{kind}",
        index=index,
        kind=kind,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **fields,
    )


# Two layers of 4 heads in 2 groups, one of 3 heads in 3 groups: column 3 of row 1 is padding.
LAYERS = Layers([layer(0), layer(0, "cross", 3, 3), layer(1)], "toy")


@st.composite
def layers(draw, max_layers=4):
    """Layers of both kinds with different head counts and group sizes."""
    infos = []
    for index in range(draw(st.integers(1, max_layers))):
        kind = draw(st.sampled_from(["self", "cross"]))
        groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        infos.append(LayerInfo(f"block.{index}.{kind}", "decoder", index, kind, groups * size, groups, 4, 8))
    return Layers(infos, draw(st.sampled_from(["bert", "llama"])), draw(st.sampled_from([None, "org/base"])))


@st.composite
def subsets(draw, shared_only=False):
    """Shared subsets, and unless `shared_only` ones with one to three requests."""
    described = draw(layers())
    shape = [len(described), described.max_heads]
    if not shared_only and draw(st.booleans()):
        shape = [draw(st.integers(1, 3)), *shape]
    size = torch.Size(shape).numel()
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)
    return HeadSubset(mask, described)


@st.composite
def scores(draw):
    """Scores with many ties and with infinities of one sign."""
    described = draw(layers())
    shape = [len(described), described.max_heads]
    size = torch.Size(shape).numel()
    infinity = draw(st.sampled_from([float("inf"), -float("inf")]))
    values = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 2.0, infinity])
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    tensor = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    return HeadScores(tensor, described)
