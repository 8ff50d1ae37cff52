"""A configuration of every gate method that twelve heads and a few steps show something of, and gates on a model."""

from __future__ import annotations

import torch
from models import build, inputs

import sparse_heads as sh

DSP = sh.DSPConfig(k=5, anneal_steps=4, start_temperature=10.0, end_temperature=1e-4)
STE = sh.DSPConfig(k=5, estimator="ste")
# spread out, so that some sampled gates are 0, some 1 and some between
HARD = sh.HardConcreteConfig(penalty=0.1, initial=0.0, initial_std=1.0)
LAYERWISE = sh.LayerwiseConfig(penalty=0.1, warmup_steps=0, initial="xavier")
CONFIGS = {"dsp": DSP, "ste": STE, "hard": HARD, "layerwise": LAYERWISE}


def gated(config=DSP, name="bert", dtype=torch.float64, **changes):
    model = build(name, dtype=dtype, **changes)
    return model, sh.attach_gates(model, config), inputs(model)
