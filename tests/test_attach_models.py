"""Which other transformers models run exactly by structure alone, and which are refused before they run."""

from __future__ import annotations

import copy

import pytest
import torch
from models import randomised
from transformers import CONFIG_MAPPING, AutoModel

import sparse_heads as sh
from sparse_heads.errors import SparseHeadsError

_SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "attention_dropout": 0.0,
    "attn_implementation": "eager",
}
_TEXT = _SHAPE | {"vocab_size": 61, "max_position_embeddings": 40, "pad_token_id": 0}
_DECODER = _TEXT | {"num_key_value_heads": 4, "head_dim": 12}
_VISION = _SHAPE | {"image_size": 32, "patch_size": 16}
ENCODERS = [
    "bert-generation",
    "camembert",
    "data2vec-text",
    "ernie",
    "eurobert",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
]
DECODERS = ["cohere", "gemma", "gemma2", "glm", "granite", "mistral", "olmo", "qwen2", "qwen3", "smollm3"]
DECODERS += ["starcoder2"]
VISION = ["beit", "deit", "vit"]
SUPPORTED = {name: _TEXT for name in ENCODERS} | {name: _DECODER for name in DECODERS}
SUPPORTED |= {name: _VISION for name in VISION}

# What their attention depends on beside the kept heads' own projections.
REFUSED = {
    "big_bird": ("num_attention_heads", _TEXT),
    "megatron-bert": ("all_head_size", _TEXT),
    "pixtral": ("num_heads", _VISION | {"head_dim": 12}),
    "bitnet": (r"attn_sub_norm.weight \[48\]", _DECODER),
    "cohere": (r"q_norm.weight \[4, 12\]", _DECODER | {"use_qk_norm": True}),
    "diffllama": (r"lambda_q1 \[12\]", _DECODER),
    "gpt_oss": (r"sinks \[64\]", None),
    "olmo2": (r"q_norm.weight \[48\]", _DECODER),
    "olmo3": (r"q_norm.weight \[48\]", _DECODER),
    "t5": "no attention layer in t5.*append a Family",
    "albert": "output projection of encoder.*append a Family",
    "whisper": "num_heads",
    "gpt2": "no attention layer in gpt2.*append a Family",
    "modernbert": "no attention layer in modernbert.*append a Family",
}


def make(name, settings):
    with torch.device("meta" if settings is None else "cpu"):
        return AutoModel.from_config(CONFIG_MAPPING[name](**settings or {}))


@pytest.mark.parametrize("name", SUPPORTED)
def test_models_that_run_by_structure(name):
    model = randomised(make(name, SUPPORTED[name]), torch.float64)
    plain = copy.deepcopy(model)
    batch = {"input_ids": torch.randint(5, 61, (2, 7)), "use_cache": False}
    if name in VISION:
        batch = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    handle = sh.attach(model)
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    handle.set_heads(mask)
    names = {module: path for path, module in model.named_modules()}
    for row, site in zip(mask, handle.sites, strict=True):
        weight = plain.get_submodule(names[site.projections["output"]]).weight
        with torch.no_grad():
            weight.unflatten(1, (4, 12))[:, ~row] = 0
    actual, expected = model(**batch)[0], plain(**batch)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    handle.detach()
    assert not torch.allclose(model(**batch)[0], expected)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name):
    message, settings = REFUSED[name] if isinstance(REFUSED[name], tuple) else (REFUSED[name], None)
    model = make(name, settings)
    with pytest.raises(SparseHeadsError, match=message):
        sh.attach(model)
    assert sh.get_handle(model) is None
