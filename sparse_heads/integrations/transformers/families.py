"""Where attention modules keep their projections: data, a few lines a family; structure decides which row fits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Attribute paths, relative to the module that owns the query, key and value projections.

    `output` may start with `../`: the projection belongs to a sibling. `head_dim` names an int attribute.
    The module's forward must reshape by `view(..., -1, head_dim)`, so that it follows the number of heads it is given.
    """

    query: str
    key: str
    value: str
    output: str
    head_dim: str


# To describe another family, append a row; `attach` takes the first whose attributes a module has.
FAMILIES = [
    Family("query", "key", "value", "../output.dense", "attention_head_size"),  # BERT, RoBERTa, ELECTRA
    Family("q_lin", "k_lin", "v_lin", "out_lin", "attention_head_size"),  # DistilBERT
    Family("q_proj", "k_proj", "v_proj", "o_proj", "head_dim"),  # Llama
    Family("q_proj", "k_proj", "v_proj", "out_proj", "head_dim"),  # BART, Marian, CLIP
]
