"""The demo from beginning to end."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .._files import write_whole
from ..environment import environment
from ..errors import SparseHeadsError, invalid
from ..heads import HeadScores, HeadSubset
from ..integrations.transformers.attach import attach
from ..integrations.transformers.handle import Handle
from .baselines import sharing_copy
from .encoder import BATCH_SIZE, Encoder, load_encoder
from .per_request import measure_requests
from .plot import results_picture
from .report import LEARNED, requests_quality_table, requests_speed_table, results_table
from .study import Sizes, ceiling, kept_counts, measure_quality, measure_speed, score_all
from .text import Sentences, file_sentences, standard_library_sentences


def run_demo(model: str, text: Path | None, device: str, out: Path, seed: int, sizes: Sizes, console: Console) -> None:
    """Score a model's heads, show what subsets of them cost and keep, and leave scores and a subset ready for use.

    Writes demo.json, demo.png, scores/ and subset/ into the folder `out`, each whole or not at all.
    """
    began = time.perf_counter()
    out = writable_folder(out)
    with console.status("compiling the extension, the first time"):
        machine = dict(environment())
    console.print(f"projections of kept heads: {machine['backend auto, projections']}", highlight=False)
    with console.status("reading text, loading the model"):
        sentences = file_sentences(text, seed) if text else standard_library_sentences(seed)
        encoder = load_encoder(model, device)
    console.print(f"text:  {sentences.source}\nmodel: {encoder.source}", highlight=False, soft_wrap=True)
    results, handle, scores = measure(encoder, sentences, seed, sizes, console)
    subset = scores.top(results["learned_for"], groups=True)
    results |= {
        "title": f"{Path(model).name} with fewer of its {results['heads']} heads",
        "model": model,
        "weights": encoder.source,
        "text": sentences.source,
        "environment": machine,
    }
    scores.save_pretrained(out / "scores")
    subset.save_pretrained(out / "subset")
    check_saved(encoder, handle, subset, out / "subset", sentences.held_out[: sizes.held_out])
    results["seconds"] = time.perf_counter() - began
    content = json.dumps(results, indent=2, allow_nan=False).encode() + b"\n"
    write_whole({out / "demo.json": content, out / "demo.png": results_picture(results)})
    for table in (results_table, requests_quality_table, requests_speed_table):
        console.print(table(results))
        console.print()
    console.print(closing_words(out, subset, results), highlight=False, soft_wrap=True)


def measure(
    encoder: Encoder, sentences: Sentences, seed: int, sizes: Sizes, console: Console
) -> tuple[dict[str, Any], Handle, HeadScores]:
    """All numbers, the handle of the model, and the best method's scores."""
    plain = sharing_copy(encoder.model)
    handle = attach(encoder.model)
    held_out = sentences.held_out[: sizes.held_out]
    calibration = sentences.calibration[: sizes.calibration]
    learning = sentences.calibration[: sizes.learning]
    total, counts = handle.layers.num_heads, kept_counts(handle.layers)
    half = counts[len(counts) // 2]
    console.print(
        f"scoring {total} heads on {len(calibration)} sentences, and learning which {half} to keep in "
        f"{sizes.learning_steps} steps on {len(learning)}"
    )
    scores = score_all(encoder, sentences.calibration, sizes, half, seed)
    console.print(f"embedding {len(held_out)} held-out sentences with fewer heads")
    quality = measure_quality(encoder, handle, scores, held_out)
    best = scores[LEARNED][0]
    batches, _ = encoder.batches(held_out)
    console.print("timing every way to run the heads, in turn")
    timings, note = measure_speed(plain, handle, best, batches, sizes, seed)
    console.print("running one batch in which every sentence has its own budget of heads")
    requests = measure_requests(encoder, plain, handle, best, batches, sizes.timing_seconds / 10, seed)
    timed = timings[0].sentences
    device = encoder.model.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU threads: {torch.get_num_threads()}"
    results = {
        "caption": (
            f"Heads scored on {len(calibration)} sentences; {LEARNED}: gates trained for {half} heads in "
            f"{sizes.learning_steps} steps on {len(learning)} sentences. Quality of {len(held_out)} held-out ones. "
            f"Speed: {timed} of these in batches of {BATCH_SIZE} by length, float32, {place}, "
            f"medians of {timings[0].rounds} interleaved rounds; {note}."
        ),
        "seed": seed,
        "heads": total,
        "kept": counts,
        "learned_for": half,
        "methods": list(scores),
        "quality": quality,
        "timings": [asdict(timing) for timing in timings],
        "timed_sentences": timed,
        "ceiling_sentences_per_second": ceiling(timings, timed),
        "requests": requests,
    }
    return results, handle, best


def writable_folder(out: Path) -> Path:
    """Make the folder for the results; an error now spares the minutes until they are written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out.resolve()
    except OSError as error:
        raise invalid("--out", "a folder that can be written", f"{out} ({error})") from error


def check_saved(encoder: Encoder, handle: Handle, subset: HeadSubset, folder: Path, sentences: list[str]) -> None:
    """Set the subset that was saved and raise unless it gives the embeddings, bit for bit, of the one in memory."""
    batches, order = encoder.batches(sentences)
    with handle.use_heads(subset):
        wanted = encoder.embed(batches, order)
    handle.set_heads(HeadSubset.from_pretrained(folder))
    if not torch.equal(encoder.embed(batches, order), wanted):
        raise SparseHeadsError(f"{folder}: the reloaded subset gives other embeddings than the one that was saved")


def closing_words(out: Path, subset: HeadSubset, results: dict[str, Any]) -> str:
    """Where everything lies, and how to use it."""
    return (
        f"{out / 'demo.png'}   the tables as a picture\n"
        f"{out / 'demo.json'}  every number\n"
        f"{out / 'subset'}     the {subset.count()} heads that {results['methods'][0]} keeps; "
        f"reloaded and set, they give the same embeddings\n"
        f"{out / 'scores'}     what these heads are worth: any other budget, for all sentences or for each\n\n"
        "Use it on the same model, loaded by transformers:\n\n"
        "    handle = sparse_heads.attach(model)\n"
        f'    handle.set_heads(sparse_heads.HeadSubset.from_pretrained("{out / "subset"}"))\n\n'
        "or with a budget for every sentence of a batch, here of two:\n\n"
        f'    scores = sparse_heads.HeadScores.from_pretrained("{out / "scores"}")\n'
        f"    handle.set_heads(scores.budgets([{results['kept'][-1]}, {results['kept'][0]}], groups=True))\n\n"
        f"Done in {results['seconds']:.0f} s."
    )
