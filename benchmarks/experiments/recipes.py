"""The papers' experiments as data, one command each: `python -m benchmarks.experiments.recipes NAME [--data FOLDER]`.

Without `--data` the data and the pretrained models come from the Hub, by the package `datasets`; a folder has the same
columns in SPLIT.jsonl or SPLIT.csv. `--smoke` takes the shipped examples and a tiny random model, and claims nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sparse_heads as sh
from sparse_heads.errors import invalid

SHIPPED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Task:
    """A data set with the model for it.

    texts, label: its columns; of a translation `texts` are source and target. size: pieces of a vocabulary of its own,
    for a model that is trained from scratch with the settings `architecture`; otherwise `model` is fine-tuned.
    beams, length: of decoding; a translation is at most length[0] times as long as its source, and length[1].
    family, tiny: the model type, and settings of a tiny random one.
    """

    dataset: tuple[str, ...]
    train: str
    tests: Sequence[str]
    texts: Sequence[str]
    model: str
    family: str
    tiny: Mapping[str, Any]
    label: str | None = None
    classes: int = 0
    longest: int = 128
    size: int = 0
    architecture: Mapping[str, Any] = field(default_factory=dict)
    beams: int = 5
    length: tuple[float, int] = (1.2, 10)


@dataclass(frozen=True)
class Training:
    """AdamW. batch: examples; tokens: of the longer side of a batch, where it is packed by length.

    schedule: of the weights, "linear" (to 0) or "inverse_sqrt" after `warmup` steps; gate_schedule: "same" or
    "constant". clip: the largest norm of all gradients together.
    """

    epochs: int
    lr: float
    batch: int = 0
    tokens: int = 0
    schedule: str = "linear"
    gate_schedule: str = "same"
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    clip: float | None = None


@dataclass(frozen=True)
class Recipe:
    """dense: training before any head goes; None where gates train with the weights from the start.

    gates: the training of the gates, with `config` as its method: one run for every count of `kept` that it takes.
    score: method and options of `score_heads` on the trained model, and on how many "batches" of the training split
    (all by default): all counts of one ranking.
    kept: numbers of heads; (None,) where the method decides.
    """

    task: Task
    source: str
    kept: Sequence[int | None]
    dense: Training | None = None
    gates: Training | None = None
    config: Any = None
    score: Mapping[str, Any] | None = None


TINY_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
TINY_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 128}
TINY_MARIAN = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}

MNLI = Task(
    dataset=("nyu-mll/glue", "mnli"),
    train="train",
    tests=("validation_matched", "validation_mismatched"),
    texts=("premise", "hypothesis"),
    label="label",
    classes=3,
    model="google-bert/bert-base-uncased",
    family="bert",
    tiny=TINY_BERT,
)
SST2 = Task(
    dataset=("nyu-mll/glue", "sst2"),
    train="train",
    tests=("validation",),
    texts=("sentence",),
    label="label",
    classes=2,
    model="distilbert/distilbert-base-uncased",
    family="distilbert",
    tiny=TINY_DISTILBERT,
)
IWSLT14 = Task(
    dataset=("bbaaaa/iwslt14-de-en-preprocess",),
    train="train",
    tests=("test",),
    texts=("de", "en"),
    model="a Transformer from scratch",
    family="marian",
    tiny=TINY_MARIAN,
    longest=256,
    size=10_000,
    architecture={
        "d_model": 512,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 1024,
        "decoder_ffn_dim": 1024,
        "activation_function": "relu",
        "dropout": 0.3,
        "scale_embedding": True,
    },
)

BERT_TUNING = Training(epochs=3, lr=2e-5, batch=32, clip=1.0)
BERT_GATES_ALONE = Training(epochs=1, lr=2e-5, batch=32, clip=1.0)
TRANSLATION = Training(
    epochs=60,
    lr=5e-4,
    tokens=4096,
    schedule="inverse_sqrt",
    gate_schedule="constant",
    warmup=4000,
    betas=(0.9, 0.98),
    weight_decay=1e-4,
    label_smoothing=0.1,
)
TRANSLATION_GATES_ALONE = Training(**{**vars(TRANSLATION), "epochs": 1})

DSP = "Li, Cotterell and Sachan 2021 (arXiv 2108.04657) and its code"
GUIDED = "Attention-Guided Pruning 2022 (IJISAE 10(3s)); the definitions of its scores are this project's"
COUNTS_144 = (12, 24, 48, 72, 96, 120, 132)
COUNTS_72 = (4, 9, 18, 36, 54)
TENTHS = tuple(round(72 * (10 - tenth) / 10) for tenth in range(10))  # 0 to 90 % of DistilBERT's heads removed
TWENTIETHS = tuple(round(144 * (20 - part) / 20) for part in range(1, 21))  # 5 to 100 % of BERT's heads removed

RECIPES = {
    "mnli_dsp_joint": Recipe(
        MNLI, DSP, COUNTS_144, gates=BERT_TUNING, config=sh.DSPConfig.from_preset("bert_joint", k=12)
    ),
    "mnli_dsp_pipelined": Recipe(
        MNLI,
        DSP,
        COUNTS_144,
        dense=BERT_TUNING,
        gates=BERT_GATES_ALONE,
        config=sh.DSPConfig.from_preset("bert_pipelined", k=12),
    ),
    "mnli_ste_joint": Recipe(
        MNLI, DSP, COUNTS_144, gates=BERT_TUNING, config=sh.DSPConfig.from_preset("bert_joint", k=12, estimator="ste")
    ),
    "mnli_ste_pipelined": Recipe(
        MNLI,
        DSP,
        COUNTS_144,
        dense=BERT_TUNING,
        gates=BERT_GATES_ALONE,
        config=sh.DSPConfig.from_preset("bert_pipelined", k=12, estimator="ste"),
    ),
    "mnli_voita": Recipe(
        MNLI, DSP, (None,), gates=BERT_TUNING, config=sh.HardConcreteConfig.from_preset("voita", gate_lr=0.1)
    ),
    "mnli_michel": Recipe(
        MNLI,
        "Michel, Levy and Neubig 2019 (arXiv 1905.10650), re-scored as by Li et al. 2021",
        TWENTIETHS,
        dense=BERT_TUNING,
        score={"method": "michel", "rescore_every": 7},
    ),
    "sst2_attention_guided": Recipe(
        SST2, GUIDED, TENTHS, dense=BERT_TUNING, score={"method": "attention_guided", "batches": 32}
    ),
    "sst2_random": Recipe(SST2, GUIDED, TENTHS, dense=BERT_TUNING, score={"method": "random"}),
    "sst2_magnitude": Recipe(SST2, GUIDED, TENTHS, dense=BERT_TUNING, score={"method": "magnitude"}),
    "sst2_michel": Recipe(SST2, GUIDED, TENTHS, dense=BERT_TUNING, score={"method": "michel"}),
    "iwslt14_dsp_joint": Recipe(
        IWSLT14, DSP, COUNTS_72, gates=TRANSLATION, config=sh.DSPConfig.from_preset("iwslt_joint", k=4)
    ),
    "iwslt14_dsp_pipelined": Recipe(
        IWSLT14,
        DSP,
        COUNTS_72,
        dense=TRANSLATION,
        gates=TRANSLATION_GATES_ALONE,
        config=sh.DSPConfig.from_preset("iwslt_pipelined", k=4),
    ),
    # The published 200 is of a loss summed over the tokens of a batch.
    "iwslt14_voita": Recipe(
        IWSLT14,
        DSP,
        (None,),
        gates=TRANSLATION,
        config=sh.HardConcreteConfig.from_preset("voita", gate_lr=0.2, penalty=200 / 4096),
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from .recipe_models import Limits
    from .recipe_runs import run

    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.recipes", description=__doc__)
    parser.add_argument("name", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--data", type=Path, help="a folder of SPLIT.jsonl or SPLIT.csv files instead of the Hub")
    parser.add_argument("--max-steps", type=int, help="stop every training after so many steps; schedules shrink")
    parser.add_argument("--kept", type=int, nargs="+", help="numbers of heads to keep, instead of the recipe's")
    parser.add_argument("--recovery", type=int, default=0, help="steps of fine-tuning after heads chosen by scores")
    parser.add_argument("--smoke", action="store_true", help="shipped examples, a tiny random model, ten steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("recipe-results"), help="folder of results and dense models")
    given = parser.parse_args(arguments)
    recipe = RECIPES[given.name]
    if given.kept and tuple(recipe.kept) == (None,):
        raise invalid("kept", f"nothing, as {given.name} decides itself", given.kept)
    folder = given.data or (SHIPPED / given.name.split("_")[0] if given.smoke else None)
    limits = Limits(given.max_steps or (10 if given.smoke else None), given.smoke, given.seed, given.device)
    result = run(recipe, given.name, folder, given.kept, given.recovery, limits, given.out)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(map(json.dumps, result["rows"])), f"written: {path}", sep="\n")


if __name__ == "__main__":
    main()
