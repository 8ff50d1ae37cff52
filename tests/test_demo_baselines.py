"""What the demo compares with: copies that mask or hold only the kept heads agree with the attached model."""

from __future__ import annotations

import pytest
import torch
from models import build, inputs, masks, output

import sparse_heads as sh
from sparse_heads.demo.baselines import mask_only, projection_paths, repack, sharing_copy

WAYS = {
    "mask only": mask_only,
    "repacked": lambda model, subset: repack(model, subset, fused=False),
    "repacked, fused": lambda model, subset: repack(model, subset, fused=True),
}


@pytest.mark.parametrize(("name", "group"), [("bert", 1), ("distilbert", 1), ("llama", 1), ("gqa", 2)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", masks(3))
@torch.no_grad()
def test_baselines_agree_with_the_attached_model(name: str, group: int, way: str, which: str):
    model = build(name, dtype=torch.float64)
    model.config.use_cache = False
    plain = sharing_copy(model)
    handle = sh.attach(model)
    subset = sh.HeadSubset(masks(3, group=group)[which], handle.layers)
    batch = inputs(model)
    dense = output(plain, batch)
    copied = WAYS[way](plain, subset)
    with handle.use_heads(subset):
        torch.testing.assert_close(output(copied, batch), output(model, batch), rtol=1e-12, atol=1e-12)
    assert torch.equal(output(plain, batch), dense)


def test_copies_share_what_they_do_not_change():
    model = build("bert")
    handle = sh.attach(sharing_copy(model))
    subset = sh.HeadSubset(masks(3)["scattered"], handle.layers)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in mask_only(model, subset).parameters()} == shared
    packed = repack(model, subset, fused=False)
    own = {name for name, parameter in packed.named_parameters() if parameter.data_ptr() not in shared}
    assert own == {
        f"encoder.layer.{layer}.attention.{part}"
        for layer in range(3)
        for part in [f"self.{role}.{kind}" for role in ("query", "key", "value") for kind in ("weight", "bias")]
        + ["output.dense.weight"]
    }


def test_repacked_weights_are_smaller():
    model = build("bert")
    handle = sh.attach(sharing_copy(model))
    packed = repack(model, sh.HeadSubset(masks(3)["one head a layer"], handle.layers), fused=False)
    assert packed.encoder.layer[0].attention.self.query.weight.shape == (12, 48)
    assert packed.encoder.layer[0].attention.output.dense.weight.shape == (48, 12)


def test_paths_of_projections():
    assert projection_paths(build("bert"))[1] == {
        "query": "encoder.layer.1.attention.self.query",
        "key": "encoder.layer.1.attention.self.key",
        "value": "encoder.layer.1.attention.self.value",
        "output": "encoder.layer.1.attention.output.dense",
    }


def test_part_of_a_group_and_cross_attention_are_not_repacked():
    for name, mask in (("gqa", masks(3)["one head a layer"]), ("bert_cross", masks(6)["scattered"])):
        model = build(name)
        handle = sh.attach(sharing_copy(model))
        subset = sh.HeadSubset(mask, handle.layers)
        with pytest.raises(
            sh.errors.UnsupportedError, match="repack: wanted whole KV groups of a self-attention layer"
        ):
            repack(model, subset, fused=False)
