"""The demo from end to end on a tiny model: its files, numbers, table and the subset that it leaves."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from demo_encoder import save_encoder, sentences
from rich.console import Console
from transformers import AutoModel

import sparse_heads as sh
from sparse_heads.demo import run
from sparse_heads.demo.study import Sizes

SIZES = Sizes(
    calibration=20, learning=24, learning_steps=3, held_out=36, random_draws=2, timed_batches=2, timing_seconds=0
)
METHODS = ["dsp", "michel_projected", "entropy", "magnitude", "random"]
KEPT = [12, 10, 8, 6, 4, 2]


def demo(folder: Path, name: str = "bert", seed: int = 0) -> tuple[str, dict]:
    """The printed text and the numbers of a demo on the tiny model `name`; everything lies in `folder`."""
    torch.set_num_threads(1)
    text = folder / "text.txt"
    text.write_text("\n".join(sentences(80)), encoding="utf-8")
    console = Console(file=io.StringIO(), width=80)
    model = save_encoder(folder / name, name)
    run.run_demo(str(model), text, "cpu", folder / "out", seed, SIZES, console)
    return console.file.getvalue(), json.loads((folder / "out" / "demo.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """The folder, the printed text and the numbers of one demo."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, *demo(folder)


def test_everything_lies_where_the_demo_says(finished: tuple[Path, str, dict]):
    folder, printed, results = finished
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {"demo.json", "demo.png", "scores", "subset"}
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(out / name) in printed for name in ("demo.json", "demo.png", "scores", "subset"))
    handle = sh.attach(AutoModel.from_pretrained(folder / "bert"))
    handle.set_heads(sh.HeadSubset.from_pretrained(out / "subset"))
    assert handle.subset.count() == results["heads"] // 2 == 6
    assert sh.HeadScores.from_pretrained(out / "scores").top(6) == handle.subset


def test_the_numbers_are_complete_and_in_the_table(finished: tuple[Path, str, dict]):
    _, printed, results = finished
    assert results["kept"] == KEPT and results["methods"] == METHODS
    quality = {(row["method"], row["kept"], row["draw"]): row for row in results["quality"]}
    assert set(quality) == {(m, k, d) for m in METHODS for k in KEPT for d in range(2 if m == "random" else 1)}
    assert all(quality[m, 12, 0]["cosine"] == pytest.approx(1) and quality[m, 12, 0]["recall"] == 1 for m in METHODS)
    assert all(-1 <= row["cosine"] <= 1 and 0 <= row["recall"] <= 1 for row in results["quality"])
    assert quality["random", 4, 0]["cosine"] != quality["random", 4, 1]["cosine"]
    timed = {(row["label"], row["kept"]) for row in results["timings"]}
    assert timed == {("dense", 12)} | {(way, k) for way in ("sparse heads", "repacked", "mask only") for k in KEPT}
    assert all(0 < row["attention_milliseconds"] < row["model_milliseconds"] for row in results["timings"])
    cells = printed.split()
    assert f"{quality['entropy', 6, 0]['cosine']:.3f}" in cells
    assert f"{results['ceiling_sentences_per_second']:.0f}" in cells
    assert "…" not in printed
    assert "float32" in printed and "medians of 3 interleaved rounds" in " ".join(cells)


def test_the_batch_with_budgets_ends_the_demo(finished: tuple[Path, str, dict]):
    _, printed, results = finished
    requests = results["requests"]
    assert requests["budgets"] == (KEPT[::-1] * 6)[:32]
    assert len(requests["cosines"]) == 32 and requests["largest_difference"] <= 1e-5
    dense, own = requests["timings"]
    assert (dense["label"], dense["kept"], own["label"]) == ("dense", 12, "own budgets")
    assert all(0 < timing["attention_milliseconds"] < timing["model_milliseconds"] for timing in (dense, own))
    words = " ".join(printed[printed.index("One batch of 32 held-out sentences") :].split())
    four = [cosine for budget, cosine in zip(requests["budgets"], requests["cosines"], strict=True) if budget == 4]
    assert f" {sum(four) / len(four):.3f} " in words and f" {min(four):.3f} " in words
    times = [timing[part] for timing in (dense, own) for part in ("attention_milliseconds", "model_milliseconds")]
    assert all(f" {milliseconds:.1f} " in words for milliseconds in times)
    attention, model = times[0] / times[2], times[1] / times[3]
    assert f"times as fast {attention:.2f} {model:.2f} {model:.2f} " in words
    assert f"largest difference {requests['largest_difference']:.0e}." in words


def test_the_same_seed_gives_the_same_quality(finished: tuple[Path, str, dict], tmp_path: Path):
    first = finished[2]["quality"]
    assert demo(tmp_path)[1]["quality"] == first
    assert demo(tmp_path, seed=1)[1]["quality"] != first


def test_quality_is_that_of_the_subset(finished: tuple[Path, str, dict]):
    """Recomputed with the output projection's columns zeroed by hand."""
    folder, _, results = finished
    texts = run.file_sentences(folder / "text.txt", seed=0).held_out[:36]
    loaded = run.load_encoder(str(folder / "bert"), "cpu")
    batches, order = loaded.batches(texts)
    dense = loaded.embed(batches, order)
    mask = sh.HeadSubset.from_pretrained(folder / "out" / "subset").mask
    with torch.no_grad():
        for row, layer in zip(mask, loaded.model.encoder.layer, strict=True):
            layer.attention.output.dense.weight.unflatten(1, (4, 12))[:, ~row] = 0
    cosine = (loaded.embed(batches, order) * dense).sum(-1).mean().item()
    reported = [row["cosine"] for row in results["quality"] if row["method"] == "dsp" and row["kept"] == 6]
    assert reported == [pytest.approx(cosine, abs=1e-5)]


def test_grouped_queries_are_kept_in_whole_groups(tmp_path: Path):
    _, results = demo(tmp_path, "gqa")
    assert results["kept"] == KEPT
    subset = sh.HeadSubset.from_pretrained(tmp_path / "out" / "subset")
    assert torch.equal(subset.round_to_groups("up").mask, subset.mask)


def test_a_model_that_cannot_be_repacked_is_shown_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def repack(*arguments: object) -> None:
        raise sh.errors.UnsupportedError("repack: wanted something else")

    monkeypatch.setattr("sparse_heads.demo.study.repack", repack)
    printed, results = demo(tmp_path)
    assert {row["label"] for row in results["timings"]} == {"sparse heads", "mask only", "dense"}
    assert "no repacked model (repack: wanted something else)" in " ".join(printed.split())


def test_an_output_folder_that_cannot_be_is_an_error_before_any_work(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="--out: wanted a folder that can be written, got"):
        run.run_demo("nothing", None, "cpu", tmp_path / "file" / "out", 0, SIZES, Console(file=io.StringIO()))


def test_a_run_that_fails_leaves_the_last_results_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text("before")
    monkeypatch.setattr(run, "results_picture", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo(tmp_path)
    assert (tmp_path / "out" / "demo.json").read_text() == "before"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo.json", "scores", "subset"}
