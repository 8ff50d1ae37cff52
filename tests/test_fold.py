"""Are gates that are folded refused where saving them would scale twice, and are weights rounded once?"""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, inputs

import sparse_heads as sh
from sparse_heads.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")


def folded(dtype=torch.float32):
    model = build("bert", dtype=dtype)
    gates = sh.attach_gates(model, sh.LayerwiseConfig(initial="xavier", warmup_steps=0))
    weights = [site.projections["output"].weight.detach().clone() for site in gates.handle.sites]
    scale = gates.scale()
    gates.fold()
    return model, gates, weights, scale


def test_what_would_scale_the_weights_again_is_not_saved(tmp_path):
    model, gates, *_ = folded()
    for save in (gates.state_dict, lambda: gates.save_pretrained(tmp_path)):
        with pytest.raises(UnsupportedError, match="save gates.subset"):
            save()
    assert not list(tmp_path.iterdir())
    copied, batch = copy.deepcopy(model), inputs(model)
    with torch.no_grad():
        assert torch.equal(copied(**batch)[0], model(**batch)[0])


def test_low_precision_is_rounded_once():
    _, gates, before, scale = folded(torch.bfloat16)
    for site, weight, factors in zip(gates.handle.sites, before, scale, strict=True):
        factors = torch.where(factors == 0, 1.0, factors).repeat_interleave(12)
        expected = (weight.float() * factors.float()).bfloat16()
        assert torch.equal(site.projections["output"].weight, expected)
