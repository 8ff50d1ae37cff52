"""Models that studies train from scratch: once, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sparse_heads._native import cache_directory

Batches = Callable[[], Iterator[Mapping[str, Tensor]]]  # without end, the same at every call


@dataclass(frozen=True)
class Training:
    """AdamW with one cycle of the learning rate: warm-up over a tenth of the steps, then down to nothing."""

    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


def trained_model(
    name: str, fresh: Callable[[], PreTrainedModel], batches: Batches, training: Training
) -> PreTrainedModel:
    """The model that `fresh` builds, trained on `batches`, in eval mode; read from the cache when it is there.

    The file's name has a digest of the configuration, the training and the first batch.
    """
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = fresh()
        path = _path(name, model, batches, training)
        if path.exists():
            load_model(model, path)
        else:
            train(model, batches(), training, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            save_model(model, str(unfinished))
            unfinished.replace(path)
    return model.eval()


def weights_digest(model: nn.Module) -> str:
    """A short name for the weights of a model, so that cells of two of them are not mixed."""
    digest = hashlib.blake2b(digest_size=8)
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(model: PreTrainedModel, batches: Iterator[Mapping[str, Tensor]], training: Training, name: str) -> None:
    """Minimise the model's own loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.steps, pct_start=0.1
    )
    progress = tqdm(islice(batches, training.steps), f"training {name}", training.steps, disable=None)
    for batch in progress:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _path(name: str, model: PreTrainedModel, batches: Batches, training: Training) -> Path:
    config = {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"}
    digest = hashlib.blake2b(json.dumps([config, asdict(training)], sort_keys=True).encode(), digest_size=8)
    for key, tensor in sorted(next(batches()).items()):
        digest.update(f"{key} {list(tensor.shape)} {tensor.tolist()}".encode())
    return cache_directory() / "experiments" / f"{name}-{digest.hexdigest()}.safetensors"
