"""Files of subsets and scores: what a round trip keeps, what a crash leaves, what is refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import tempfile

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from subset_inputs import LAYERS, layer, scores, subsets

from sparse_heads.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
from sparse_heads.heads import HeadScores, HeadSubset, Layers

MASK = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1]]).bool()
SUBSET = HeadSubset(MASK, LAYERS)
SCORES = HeadScores(torch.tensor([[4.0, 1.0, -math.inf, 3.0], [1.0, 5.0, 2.0, 0.0], [0.0, 0.1, math.inf, 6.0]]), LAYERS)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@settings(max_examples=30, deadline=None)
@given(st.one_of(subsets(), scores()))
def test_a_round_trip_keeps_everything(value):
    with tempfile.TemporaryDirectory() as directory:
        value.save_pretrained(directory)
        assert type(value).from_pretrained(directory) == value


def test_subset_and_scores_share_a_directory_and_save_makes_it(tmp_path):
    directory = tmp_path / "new" / "one"
    SUBSET.save_pretrained(str(directory))
    SCORES.save_pretrained(directory)
    assert sorted(contents(directory)) == [
        "head_scores.safetensors",
        "head_scores_config.json",
        "heads.safetensors",
        "heads_config.json",
    ]
    assert HeadSubset.from_pretrained(str(directory)) == SUBSET and HeadScores.from_pretrained(directory) == SCORES


def test_the_description_is_in_the_metadata_and_readable_beside_it(tmp_path):
    subset = HeadSubset(MASK, Layers(LAYERS, "toy", "org/base"))
    subset.save_pretrained(tmp_path)
    with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["description"])
        assert file.get_tensor("mask").tolist() == MASK.int().tolist()
    assert (description["schema_version"], description["kind"]) == (1, "subset")
    assert (description["model_type"], description["base_model"]) == ("toy", "org/base")
    assert description["layers"][1] == {
        "name": "block.0.cross",
        "stack": "decoder",
        "index": 0,
        "kind": "cross",
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_dim": 8,
        "v_head_dim": 16,
        "uses": 1,
    }
    readable = json.loads((tmp_path / "heads_config.json").read_text())
    assert readable["kept"] == {"block.0.self": [0], "block.0.cross": [1, 2], "block.1.self": [0, 1, 3]}
    assert description.items() <= readable.items() and "only heads.safetensors is read back" in readable["note"]


def test_readable_copies_of_per_request_subsets_and_of_scores(tmp_path):
    HeadSubset(torch.stack([MASK, ~MASK]), LAYERS).save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "heads_config.json").read_text())["kept"]
    assert kept == [
        {"block.0.self": [0], "block.0.cross": [1, 2], "block.1.self": [0, 1, 3]},
        {"block.0.self": [1, 2, 3], "block.0.cross": [0], "block.1.self": [2]},
    ]
    SCORES.save_pretrained(tmp_path)
    readable = json.loads((tmp_path / "head_scores_config.json").read_text(), parse_constant=pytest.fail)
    assert readable["scores"]["block.0.self"] == [4.0, 1.0, "-inf", 3.0]
    assert readable["scores"]["block.0.cross"] == [1.0, 5.0, 2.0]


def test_the_json_copy_is_not_read(tmp_path):
    SUBSET.save_pretrained(tmp_path)
    (tmp_path / "heads_config.json").write_text("not json")
    assert HeadSubset.from_pretrained(tmp_path) == SUBSET


def test_rows_are_found_by_key_in_a_model_with_another_order(tmp_path):
    SUBSET.save_pretrained(tmp_path)
    shuffled = Layers([layer(1, name="x"), layer(0, "cross", 3, 3, name="y"), layer(0, name="z")], "toy")
    assert HeadSubset.from_pretrained(tmp_path).remap(shuffled).kept() == {"x": [0, 1, 3], "y": [1, 2], "z": [0]}


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_whole_files_only(tmp_path, monkeypatch, function, failing_call):
    old, new = SUBSET, HeadSubset(~MASK, LAYERS)
    old.save_pretrained(tmp_path)
    before = contents(tmp_path)
    real, calls = getattr(os, function), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == failing_call:
            raise OSError("disk full")
        return real(*arguments)

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(OSError, match="disk full"):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    # only after the first rename is the new subset there, and then all of it
    renamed = function == "replace" and failing_call == 2
    assert HeadSubset.from_pretrained(tmp_path) == (new if renamed else old)
    assert contents(tmp_path).keys() == before.keys()
    assert renamed or contents(tmp_path) == before


def test_saved_files_have_the_permissions_of_ordinary_files(tmp_path):
    SUBSET.save_pretrained(tmp_path)
    (tmp_path / "ordinary").write_text("")
    assert (tmp_path / "heads.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"directory: wanted a directory, got the file '.*file'"):
        SUBSET.save_pretrained(tmp_path / "file")
    with pytest.raises(InvalidTypeError, match="directory: wanted a str or a path, got int 3"):
        SUBSET.save_pretrained(3)


@pytest.mark.parametrize("kind, filename", [(HeadSubset, "heads.safetensors"), (HeadScores, "head_scores.safetensors")])
def test_a_missing_file_is_named(tmp_path, kind, filename):
    wanted = rf"directory: wanted a directory or a Hub repository that holds {filename}, got "
    with pytest.raises(InvalidArgumentError, match=wanted + "'.*', which has no such file"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match=wanted + "'.*missing', which does not exist"):
        kind.from_pretrained(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match=wanted + "the file '.*file'"):
        kind.from_pretrained(tmp_path / "file")
    with pytest.raises(InvalidTypeError, match="directory: wanted a str or a path, got NoneType None"):
        kind.from_pretrained(None)


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    SUBSET.save_pretrained(tmp_path)
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert HeadSubset.from_pretrained("org/half-the-heads") == SUBSET
    assert asked == [("org/half-the-heads", "heads.safetensors")]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no network"),
        EntryNotFoundError("no such entry"),
        HFValidationError("a bad name"),
    ],
)
def test_what_the_hub_refuses_is_passed_on(monkeypatch, error):
    def download(repository, filename):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InvalidArgumentError, match=f"got 'org/none', which is no directory; the Hub says: {error}"):
        HeadSubset.from_pretrained("org/none")


def description(**changes):
    layers = [{**vars(info)} for info in LAYERS]
    known = {"schema_version": 1, "kind": "subset", "model_type": "toy", "base_model": None, "layers": layers}
    return known | changes


def with_layer(**changes):
    layers = description()["layers"]
    return description(layers=[*layers[:2], layers[2] | changes])


def without_field(field):
    layers = description()["layers"]
    del layers[2][field]
    return description(layers=layers)


@pytest.mark.parametrize(
    "described, message",
    [
        ([1], "description: wanted a JSON object, got list"),
        (description(schema_version=2), "schema_version: wanted 1, all that this library can read, got int 2"),
        (description(schema_version=True), "schema_version: wanted 1, .* got bool True"),
        (description(schema_version=None), "schema_version: wanted 1, .* got NoneType None"),
        (description(kind="scores"), "kind: wanted 'subset', got str 'scores'"),
        (description(model_type=7), "model_type: wanted a str, got int 7"),
        (description(base_model=[]), "base_model: wanted a str or None"),
        (description(layers={}), "layers: wanted a list, got dict"),
        (description(layers=[]), "layers: wanted at least one layer"),
        (description(layers=["block"] * 3), r"layers: wanted entries with exactly \['head_dim', .* got str 'block'"),
        (description(layers=[*description()["layers"][:2]] * 2), "layers: wanted every name once"),
        (with_layer(index=0), "layers: wanted every key once"),
        (with_layer(extra=1), "layers: wanted entries with exactly"),
        (without_field("uses"), "layers: wanted entries with exactly"),
        (with_layer(num_heads=-4), "LayerInfo.num_heads: wanted at least 1, got int -4"),
        (with_layer(num_heads="4"), "LayerInfo.num_heads: wanted an int, got str '4'"),
        (with_layer(num_heads=math.nan), "LayerInfo.num_heads: wanted an int, got float nan"),
        (with_layer(num_heads=10**15), r"mask: wanted shape \[..., 3, 1000000000000000\] .* got \[3, 4\]"),
        (with_layer(num_kv_heads=10**15), "LayerInfo.num_kv_heads: wanted a divisor of num_heads 4"),
        (with_layer(kind=[]), "LayerInfo.kind: wanted a str"),
        (description(layers=description()["layers"][:2]), r"mask: wanted shape \[..., 2, 4\] .* got \[3, 4\]"),
    ],
)
def test_hostile_descriptions_are_refused(tmp_path, described, message):
    data = save({"mask": MASK.to(torch.uint8)}, {"description": json.dumps(described)})
    (tmp_path / "heads.safetensors").write_bytes(data)
    with pytest.raises(FileFormatError, match=f"heads.safetensors: {message}"):
        HeadSubset.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "description: wanted JSON, got Expecting value"),
        ('{"schema_version": 1', "description: wanted JSON"),
        ("[" * 100_000, "description: wanted JSON"),
        ('{"schema_version": 1' + "0" * 5000 + "}", "description: wanted JSON|schema_version: wanted 1"),
    ],
)
def test_descriptions_that_are_no_json_are_refused(tmp_path, text, message):
    (tmp_path / "heads.safetensors").write_bytes(save({"mask": MASK.to(torch.uint8)}, {"description": text}))
    with pytest.raises(FileFormatError, match=f"heads.safetensors: ({message})"):
        HeadSubset.from_pretrained(tmp_path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_missing_metadata_is_refused(tmp_path, metadata):
    (tmp_path / "heads.safetensors").write_bytes(save({"mask": MASK.to(torch.uint8)}, metadata))
    with pytest.raises(FileFormatError, match=r"heads.safetensors: metadata: wanted a 'description', got only \["):
        HeadSubset.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, r"tensors: wanted one, named 'mask', got 0: \[\]"),
        ({"scores": MASK.byte()}, r"tensors: wanted one, named 'mask', got 1: \['scores'\]"),
        ({"mask": MASK.byte(), "more": MASK.byte()}, r"tensors: wanted one, named 'mask', got 2: \['mask', 'more'\]"),
        ({"mask": MASK.float()}, "mask: wanted dtype U8, got F32"),
        (
            {"mask": MASK.byte()[0]},
            r"mask: wanted shape \[..., 3, 4\] with \(2, 3\) dimensions, as described, got \[4\]",
        ),
        ({"mask": MASK.byte().T.contiguous()}, r"mask: wanted shape .* got \[4, 3\]"),
        ({"mask": MASK.byte().new_zeros(0, 3, 4)}, r"mask: wanted shape .* got \[0, 3, 4\]"),
        ({"mask": MASK.byte().new_zeros(1, 1, 3, 4)}, r"mask: wanted shape .* got \[1, 1, 3, 4\]"),
        ({"mask": MASK.byte() * 3}, "mask: wanted zeros and ones, got a 3"),
    ],
)
def test_hostile_tensors_are_refused(tmp_path, tensors, message):
    (tmp_path / "heads.safetensors").write_bytes(save(tensors, {"description": json.dumps(description())}))
    with pytest.raises(FileFormatError, match=f"heads.safetensors: {message}"):
        HeadSubset.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(3, 4).half(), "scores: wanted dtype F32 or F64, got F16"),
        (torch.zeros(2, 3, 4), r"scores: wanted shape .* got \[2, 3, 4\]"),
        (torch.full((3, 4), math.nan), "tensor: wanted no NaN, got one for head 0 of layer 'block.0.self'"),
    ],
)
def test_hostile_scores_are_refused(tmp_path, tensor, message):
    metadata = {"description": json.dumps(description(kind="scores"))}
    (tmp_path / "head_scores.safetensors").write_bytes(save({"scores": tensor}, metadata))
    with pytest.raises(FileFormatError, match=f"head_scores.safetensors: {message}"):
        HeadScores.from_pretrained(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        (5).to_bytes(8, "little") + b"[1,2]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        pickle.dumps(Bomb()),
    ],
)
def test_garbage_is_refused_and_never_unpickled(tmp_path, data):
    (tmp_path / "heads.safetensors").write_bytes(data)
    with pytest.raises(FileFormatError, match=r"heads.safetensors: not a whole safetensors file: "):
        HeadSubset.from_pretrained(tmp_path)


def test_truncated_files_are_refused(tmp_path):
    SUBSET.save_pretrained(tmp_path)
    path = tmp_path / "heads.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"not a whole safetensors file"):
            HeadSubset.from_pretrained(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_byte_gives_a_subset_or_a_format_error(data):
    with tempfile.TemporaryDirectory() as directory:
        SUBSET.save_pretrained(directory)
        path = os.path.join(directory, "heads.safetensors")
        with open(path, "r+b") as file:
            size = os.path.getsize(path)
            file.seek(data.draw(st.integers(0, size - 1)))
            file.write(bytes([data.draw(st.integers(0, 255))]))
        try:
            assert isinstance(HeadSubset.from_pretrained(directory), HeadSubset)
        except FileFormatError as error:
            assert "heads.safetensors" in str(error)
