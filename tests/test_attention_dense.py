"""Does attention on a GPU's kept heads take PyTorch's kernels in the measured order, or leave the choice to it?"""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from sparse_heads.ops.attention import dense, sdpa
from sparse_heads.ops.attention.reference import attention_reference
from sparse_heads.testing import assert_close_to_reference, random_attention_inputs

ROWS = [
    {"head_dim": 64, "causal": True, "group": 1, "tokens": 512, "forward": ["flash"], "training": ["cudnn", "flash"]},
    {"head_dim": 64, "causal": True, "group": 1, "tokens": 8192, "forward": ["cudnn"], "training": ["flash"]},
    {"head_dim": 64, "causal": True, "group": 4, "tokens": 512, "forward": ["efficient"], "training": []},
    {"head_dim": 128, "causal": True, "group": 1, "tokens": 512, "forward": ["efficient"], "training": ["cudnn"]},
    {"head_dim": 64, "causal": False, "group": 1, "tokens": 512, "forward": ["cudnn"], "training": ["cudnn"]},
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"a device": {"rows": [{**row, "dtype": "bfloat16"} for row in ROWS]}}))
    monkeypatch.setattr(dense, "TABLE", path)
    dense.measured.cache_clear()
    yield
    dense.measured.cache_clear()


def ranked(
    heads=4, kv_heads=4, keys=512, head_dim=64, causal=True, training=False, dtype=torch.bfloat16, name="a device"
):
    query = torch.empty(1, heads, 7, head_dim, dtype=dtype)
    found = dense.ranked_kernels(name, query, torch.empty(1, kv_heads, keys, head_dim, dtype=dtype), causal, training)
    assert found is None or found.pop() == SDPBackend.MATH
    names = {kernel: name for name, kernel in dense.KERNELS.items()}
    return found and [names[kernel] for kernel in found]


def test_the_measured_order_comes_first(table):
    assert ranked() == ["flash"]
    assert ranked(training=True) == ["cudnn", "flash"]
    assert ranked(causal=False) == ["cudnn"]
    assert ranked(dtype=torch.float16) == ["flash"]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [({"keys": 2000}, "flash"), ({"keys": 2100}, "cudnn"), ({"keys": 10**6}, "cudnn"), ({"head_dim": 256}, "efficient"),
     ({"head_dim": 80}, "flash"), ({"kv_heads": 1}, "efficient"), ({"heads": 32, "kv_heads": 1}, "efficient")],
    ids=str,
)  # fmt: skip
def test_other_shapes_take_the_nearest(shape, wanted, table):
    assert ranked(**shape) == [wanted]


def test_what_was_not_measured_is_left_to_pytorch(table):
    assert ranked(name="another device") is None and ranked(dtype=torch.float32) is None
    assert ranked(kv_heads=1, training=True) is None  # where no kernel was right


def test_without_a_table_pytorch_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "TABLE", tmp_path / "none.json")
    dense.measured.cache_clear()
    assert ranked() is None
    dense.measured.cache_clear()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_last_queries_of_longer_sequences(kv_heads):
    inputs = [tensor.detach() for tensor in random_attention_inputs(2, 4, kv_heads, 5, 17, 16)]
    options = {"gate": None, "attn_mask": None, "span": (-1, 0), "scale": 0.3, "softcap": None, "sinks": None}
    eager, exact = (
        attention_reference(*(each.to(dtype) for each in inputs), None, **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close_to_reference(sdpa._attend_last_queries(*inputs, 0.3), eager, exact)


def test_kernels_are_asked_for_in_order(table, monkeypatch):
    """On a CUDA device, which is stood in for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda kernels, set_priority: (kernels, set_priority))

    class Cuda:
        device, dtype, requires_grad = torch.device("cuda", 0), torch.bfloat16, False
        shape = torch.Size([1, 4, 512, 64])

    assert sdpa._fastest_kernel(Cuda(), Cuda(), True) == ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], True)


@pytest.mark.parametrize(("batch", "heads", "expected"), [(2, 4, True), (2, 0, False), (0, 4, False)])
def test_no_head_and_no_request_are_nothing_for_a_gpu(batch, heads, expected):
    """Whose kernels count the heads that share keys."""
    with FakeTensorMode():
        assert sdpa._on_gpu(torch.empty(batch, heads, 5, 16, device="cuda")) is expected
        assert not sdpa._on_gpu(torch.empty(batch, heads, 5, 16))
