"""Do the papers' recipes run end to end on examples in the published format, and do their parts do what they say?"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import pytest
import torch

import sparse_heads as sh
from benchmarks.experiments import recipe_data, recipe_models, recipes
from benchmarks.experiments.bleu import corpus_bleu
from benchmarks.experiments.recipes import RECIPES, SHIPPED, TRANSLATION

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def run(name, out, *options):
    recipes.main([name, "--smoke", "--max-steps", "2", "--out", str(out), *options])
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_on_the_shipped_examples(name, tmp_path):
    result = run(name, tmp_path)
    recipe = RECIPES[name]
    assert result["recipe"] == name and result["model"].startswith("tiny random")
    dense, *rows = result["rows"] if recipe.dense else [None, *result["rows"]]
    assert rows
    for row in rows:
        if recipe.kept != (None,):
            assert row["kept"] == result["heads"] // 2
        measure = "accuracy" if recipe.task.label else "bleu"
        assert all(0 <= row[f"{measure} {split}"] <= 100 for split in recipe.task.tests)
    if dense is not None:
        assert dense["kept"] == result["heads"] and dense["steps"] == 2


def test_recovery_gives_second_rows(tmp_path):
    rows = run("sst2_magnitude", tmp_path, "--recovery", "1", "--kept", "2", "8")["rows"]
    assert [(row["kept"], row["steps"]) for row in rows] == [(8, 2), (2, 0), (2, 1), (8, 0), (8, 1)]


def test_recovery_sees_all_batches_whatever_the_scores_see(tmp_path, monkeypatch):
    recipe = RECIPES["sst2_attention_guided"]
    score, dense = {**recipe.score, "batches": 1}, replace(recipe.dense, batch=2)
    monkeypatch.setitem(RECIPES, "sst2_attention_guided", replace(recipe, score=score, dense=dense))
    seen = []
    for name, position in (("score_heads", 1), ("recover", 2)):
        real = getattr(sh, name)
        monkeypatch.setattr(
            sh, name, lambda *a, real=real, at=position, **options: (seen.append(len(a[at])), real(*a, **options))[1]
        )
    run("sst2_attention_guided", tmp_path, "--recovery", "1", "--kept", "2")
    assert seen == [1, 2]


def test_counts_are_refused_where_the_method_decides():
    with pytest.raises(sh.errors.InvalidArgumentError, match="kept: wanted nothing.*mnli_voita"):
        recipes.main(["mnli_voita", "--smoke", "--kept", "3"])


def test_published_settings():
    config = RECIPES["mnli_dsp_joint"].config
    assert (config.anneal_steps, config.start_temperature, config.end_temperature) == (25_000, 1000.0, 1e-8)
    assert (config.gate_lr, config.mode, RECIPES["mnli_dsp_joint"].gates.lr) == (0.5, "joint", 2e-5)
    assert RECIPES["mnli_dsp_pipelined"].config.mode == "pipelined"
    assert RECIPES["mnli_ste_joint"].config.estimator == "ste"
    assert RECIPES["mnli_voita"].config.penalty == 0.0015
    assert RECIPES["iwslt14_dsp_joint"].config.anneal_steps == 15_000
    assert (TRANSLATION.betas, TRANSLATION.warmup, TRANSLATION.label_smoothing) == ((0.9, 0.98), 4000, 0.1)
    assert RECIPES["sst2_michel"].kept == (72, 65, 58, 50, 43, 36, 29, 22, 14, 7)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        sh.errors.UnsupportedError, match="data: wanted the package 'datasets'.*nyu-mll/glue/mnli.*--data"
    ):
        recipe_data.load_split(recipes.MNLI, "train", None)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(sh.errors.InvalidArgumentError, match=r"data: wanted a folder with train.jsonl or train.csv"):
        recipe_data.load_split(recipes.SST2, "train", tmp_path)
    (tmp_path / "train.csv").write_text("text,label\nfine,1\n")
    with pytest.raises(sh.errors.InvalidArgumentError, match=r"data: wanted columns sentence, label.*row 0 without"):
        recipe_data.load_split(recipes.SST2, "train", tmp_path)
    (tmp_path / "train.csv").write_text("sentence,label\nfine,-1\n")
    with pytest.raises(sh.errors.InvalidArgumentError, match="data: wanted examples in the split train, got none"):
        recipe_data.load_split(recipes.SST2, "train", tmp_path)


def test_rows_without_a_label_are_left_out(tmp_path):
    lines = [{"sentence": "good", "label": 1}, {"sentence": "hidden", "label": -1}, {"sentence": "bad", "label": 0}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    rows = recipe_data.load_split(recipes.SST2, "train", tmp_path)
    assert [row["sentence"] for row in rows] == ["good", "bad"]


def test_pairs_have_two_segments_and_translations_end():
    rows = recipe_data.load_split(recipes.MNLI, "train", SHIPPED / "mnli")
    words = [row["premise"] for row in rows]
    (example, *_) = recipe_data.encode(recipes.MNLI, rows, recipe_data.own_tokenizer(recipes.MNLI, words, 300))
    ids, types = example["input_ids"], example["token_type_ids"]
    first = ids.index(3) + 1  # the [SEP] of the premise
    assert ids[0] == 2 and ids[-1] == 3 and types == [0] * first + [1] * (len(ids) - first)
    rows = recipe_data.load_split(recipes.IWSLT14, "train", SHIPPED / "iwslt14")
    tokenizer = recipe_data.own_tokenizer(recipes.IWSLT14, (row["en"] for row in rows), 400)
    ids = tokenizer("nineteen oh five")["input_ids"]
    assert ids[-1] == 3 and 2 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "nineteen oh five"


def test_batches_hold_every_example_once_within_their_tokens():
    generator = random.Random(0)
    examples = [
        {"input_ids": [5] * generator.randint(1, 9), "labels": [index] * generator.randint(1, 9)} for index in range(50)
    ]
    training = recipes.Training(epochs=1, lr=1.0, tokens=40)
    batches = recipe_data.batches_of(examples, training, 0, random.Random(1))
    seen = sorted(row[0].item() for batch in batches for row in batch["labels"])
    assert seen == list(range(50))
    for batch in batches:
        assert max(batch["labels"].numel(), batch["input_ids"].numel()) <= 40
        assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] == 5)
        assert torch.equal(batch["decoder_attention_mask"] == 1, batch["labels"] >= 0)
    assert len(batches) < 20


def test_learning_rates():
    linear = recipe_models.factor(recipes.BERT_TUNING, 10)
    assert [linear(step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    root = recipe_models.factor(TRANSLATION, 100_000)
    assert root(0) == 1 / 4000 and root(3999) == 1.0
    assert root(15_999) == pytest.approx(0.5)


def test_bleu():
    reference = "the cat sat on the mat today".split()
    assert corpus_bleu([reference], [reference]) == pytest.approx(100.0)
    assert corpus_bleu([["no", "word"]], [reference]) == 0.0
    # of its runs of one to four words, and no penalty of length
    changed = "the cat sat on a mat today".split()
    wanted = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert corpus_bleu([changed], [reference]) == pytest.approx(wanted)
    short = corpus_bleu([reference[:5]], [reference])
    assert short == pytest.approx(100 * torch.tensor(1 - 7 / 5).exp().item())
