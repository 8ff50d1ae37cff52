"""Reading and writing values with a row a layer: one safetensors file that counts, and a JSON copy for people.

The safetensors file holds one tensor, and in its metadata under "description" a JSON object that says what the rows
are. Files appear under their name only when whole; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ._version import __version__
from .errors import FileFormatError, InvalidArgumentError, InvalidTypeError, describe, invalid, invalid_type
from .layers import LayerInfo, Layers

SCHEMA_VERSION = 1
Built = TypeVar("Built")


@dataclass(frozen=True)
class FileKind:
    """One kind of saved object, and its two files."""

    name: str
    weights_file: str
    config_file: str


@dataclass(frozen=True)
class TensorKind(FileKind):
    """One that is a single tensor, with the dtypes and ranks that it may have.

    columns: the dimension of the tensor, from the end, that has the heads; the one before it has the layers.
    """

    tensor: str
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    columns: int = -1


_FLOATS = ("F32", "F64")
SUBSET = TensorKind("subset", "heads.safetensors", "heads_config.json", "mask", ("U8",), (2, 3))
SCORES = TensorKind("scores", "head_scores.safetensors", "head_scores_config.json", "scores", _FLOATS, (2,))
MEANS = TensorKind("means", "head_means.safetensors", "head_means_config.json", "means", _FLOATS, (3,), columns=-2)

GATES = FileKind("gates", "gates.safetensors", "gates_config.json")


def save_files(
    directory: str | os.PathLike, kind: TensorKind, tensor: torch.Tensor, layers: Layers, copy: dict
) -> None:
    """Write `tensor` and the description of `layers` to the two files of `kind`; `copy` is added to the JSON one.

    Makes `directory` where it is missing. Raises InvalidArgumentError when it is a file.
    """
    save_tensors(directory, kind, {kind.tensor: tensor}, layers, {}, copy)


def save_tensors(
    directory: str | os.PathLike,
    kind: FileKind,
    tensors: Mapping[str, torch.Tensor],
    layers: Layers,
    details: dict,
    copy: dict,
) -> None:
    """As `save_files` for several tensors; `details` is added to the description that is read back."""
    directory = _path(directory)
    if directory.exists() and not directory.is_dir():
        raise invalid("directory", "a directory", f"the file {str(directory)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind.name,
        "model_type": layers.model_type,
        "base_model": layers.base_model,
        "library_version": __version__,
        "layers": [asdict(info) for info in layers],
        **details,
    }
    note = f"A copy for people: only {kind.weights_file} is read back."
    text = json.dumps({"note": note, **description, **copy}, indent=2, allow_nan=False)
    write_whole(
        {
            directory / kind.weights_file: save(dict(tensors), {"description": json.dumps(description)}),
            directory / kind.config_file: text.encode() + b"\n",
        }
    )


def load_files(source: str | os.PathLike, kind: TensorKind, build: Callable[[torch.Tensor, Layers], Built]) -> Built:
    """`build(tensor, layers)` with what a directory or a Hugging Face Hub repository holds.

    Raises InvalidArgumentError when there is no such file, FileFormatError when it is not what `save_files` writes or
    `build` refuses it.
    """
    return _load(source, kind, lambda file, description: build(*_read_tensor(file, description, kind)))


def load_tensors(source: str | os.PathLike, kind: FileKind) -> tuple[dict[str, torch.Tensor], dict, Layers]:
    """The tensors, the description and its layers that `save_tensors` wrote; sources and errors as for `load_files`."""

    def read(file: safe_open, description: dict) -> tuple[dict[str, torch.Tensor], dict, Layers]:
        return {name: file.get_tensor(name) for name in file.keys()}, description, _parse_layers(description)

    return _load(source, kind, read)


def _load(source: str | os.PathLike, kind: FileKind, read: Callable[[safe_open, dict], Built]) -> Built:
    path = _find(source, kind)
    try:
        with safe_open(path, framework="pt") as file:
            return read(file, _parse_description(file, kind))
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: not a whole safetensors file: {error}") from error
    except (InvalidArgumentError, InvalidTypeError) as error:
        raise FileFormatError(f"{path}: {error}") from error


def write_whole(contents: dict[Path, bytes]) -> None:
    """Write every file under a temporary name in its directory, then rename all: no reader sees a part of one."""
    temporary = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in contents}
    try:
        for path, data in contents.items():
            with open(temporary[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)


def _path(directory: object) -> Path:
    if not isinstance(directory, (str, os.PathLike)):
        raise invalid_type("directory", "a str or a path", directory)
    return Path(directory)


def _find(source: str | os.PathLike, kind: FileKind) -> Path:
    directory = _path(source)
    wanted = f"a directory or a Hub repository that holds {kind.weights_file}"
    if directory.is_dir():
        path = directory / kind.weights_file
        if not path.is_file():
            raise invalid("directory", wanted, f"{str(directory)!r}, which has no such file")
        return path
    if directory.exists():
        raise invalid("directory", wanted, f"the file {str(directory)!r}")
    if not isinstance(source, str):
        raise invalid("directory", wanted, f"{str(directory)!r}, which does not exist")
    return _download(source, kind.weights_file, wanted)


def _download(repository: str, filename: str, wanted: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except (HFValidationError, EntryNotFoundError, OSError) as error:
        raise invalid("directory", wanted, f"{repository!r}, which is no directory; the Hub says: {error}") from error


def _read_tensor(file: safe_open, description: dict, kind: TensorKind) -> tuple[torch.Tensor, Layers]:
    names = sorted(file.keys())
    if names != [kind.tensor]:
        raise invalid("tensors", f"one, named {kind.tensor!r}", f"{len(names)}: {names[:5]}")
    layers = _parse_layers(description)
    # dtype and shape are compared before anything of that size is made
    stored = file.get_slice(kind.tensor)
    dtype, shape = stored.get_dtype(), list(stored.get_shape())
    if dtype not in kind.dtypes:
        raise invalid_type(kind.tensor, f"dtype {' or '.join(kind.dtypes)}", dtype)
    rows, heads = len(layers), layers.max_heads
    if len(shape) not in kind.ranks or [shape[kind.columns - 1], shape[kind.columns]] != [rows, heads] or 0 in shape:
        after = ", ..." if kind.columns < -1 else ""
        wanted = f"shape [..., {rows}, {heads}{after}] with {kind.ranks} dimensions, as described"
        raise invalid(kind.tensor, wanted, str(shape))
    return file.get_tensor(kind.tensor), layers


def _parse_description(file: safe_open, kind: FileKind) -> dict:
    header = file.metadata() or {}
    if "description" not in header:
        raise invalid("metadata", "a 'description'", f"only {sorted(header)[:5]}")
    try:
        description = json.loads(header["description"])
    except (ValueError, RecursionError) as error:
        raise invalid("description", "JSON", str(error)) from error
    if not isinstance(description, dict):
        raise invalid_type("description", "a JSON object", describe(description))
    version = description.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise invalid("schema_version", f"{SCHEMA_VERSION}, all that this library can read", describe(version))
    if description.get("kind") != kind.name:
        raise invalid("kind", repr(kind.name), describe(description.get("kind")))
    return description


def _parse_layers(description: dict) -> Layers:
    entries = description.get("layers")
    if not isinstance(entries, list):
        raise invalid_type("layers", "a list", describe(entries))
    wanted = {field.name for field in fields(LayerInfo)}
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != wanted:
            raise invalid("layers", f"entries with exactly {sorted(wanted)}", describe(entry))
    infos = [LayerInfo(**entry) for entry in entries]
    return Layers(infos, description.get("model_type"), description.get("base_model"))
