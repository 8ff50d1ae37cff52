"""Tiny BERT regressors whose weights are set by hand, so that what each head is worth is known.

The first token attends evenly to all. Head h reads one feature of the tokens, takes the mean, and writes it to the
outputs by its own weights; the outputs are tanh(gain * the sum of what the heads wrote). Word embeddings hold the
features as pairs (f, -f), and heads write pairs, so that layer norm only rescales; the feed-forward parts give zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models import masked_copy
from torch import Tensor, nn

import sparse_heads as sh

LAYERS, HEADS, FEATURES, OUTPUTS = 2, 4, 9, 7
COUNT = LAYERS * HEADS
_OWN = list(range(1, FEATURES))  # a feature a head
_HIDDEN = 2 * (FEATURES + OUTPUTS)
_VOCABULARY = 40
_QUIET = 0.02  # what heads without a part to play write
_GAIN = 2.0
_PAIR, _SATURATING = 0.2, 14.0  # a faint write, so that layer norm hardly feels it, and the gain that it is read with


@dataclass
class Constructed:
    """A model, one batch with labels, and the heads by their number, 4 a layer, that carry the labels.

    special: heads that the construction is about beside them: the redundant pair, or the harmful head.
    """

    model: nn.Module
    batches: list[dict[str, Tensor]]
    signal: list[int]
    special: list[int]

    @property
    def others(self) -> list[int]:
        return [head for head in range(COUNT) if head not in self.signal + self.special]


def signal_model(seed: int, count: int = 3) -> Constructed:
    """`count` heads carry the signal, in both layers; the others write next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    signal = _draw_heads(generator, count)
    write = _quiet(generator)
    for output, head in enumerate(signal):
        write[output, head] = 1.0
    return _constructed(generator, write, _OWN, signal, [], signal)


def redundant_model(seed: int) -> Constructed:
    """Beside two heads with a signal of their own, a pair that writes the same, of which one saturates the output."""
    generator = torch.Generator().manual_seed(100 + seed)
    first, second, *signal = _draw_heads(generator, 4)
    write = _quiet(generator)
    for output, head in enumerate(signal, 1):
        write[output, head] = 1.0
    write[0], write[:, [first, second]] = 0.0, 0.0
    write[0, [first, second]] = _PAIR
    # Feature 0 is the same for all tokens of an example, so that the pair's mean is never small.
    read = [0 if head in (first, second) else feature for head, feature in enumerate(_OWN)]
    return _constructed(generator, write, read, signal, [first, second], [first, *signal], _SATURATING)


def harmful_model(seed: int) -> Constructed:
    """Beside three heads that carry the signal, one that writes noise to one of their outputs."""
    generator = torch.Generator().manual_seed(200 + seed)
    harmful, *signal = _draw_heads(generator, 4)
    write = _quiet(generator)
    for output, head in enumerate(signal):
        write[output, head] = 1.0
    write[:, harmful] = 0.0
    write[0, harmful] = 1.5
    return _constructed(generator, write, _OWN, signal, [harmful], signal)


def train_gates(constructed: Constructed, config: Any, steps: int) -> Any:
    """The gates after `steps` steps of plain PyTorch on the importances."""
    model = constructed.model.train()
    gates = sh.attach_gates(model, config)
    optimizer = torch.optim.Adam(gates.parameter_groups())
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**constructed.batches[step % len(constructed.batches)]).loss
        (loss + gates.penalty()).backward()
        optimizer.step()
        gates.step()
    return gates


def kept_heads(subset: sh.HeadSubset) -> list[int]:
    """The numbers of the heads of a subset."""
    return subset.mask.flatten().nonzero().flatten().tolist()


def loss_of(constructed: Constructed, kept: list[int]) -> float:
    """The mean loss of a copy that keeps these heads."""
    mask = torch.zeros(COUNT, dtype=torch.bool)
    mask[kept] = True
    model = constructed.model.eval()
    attached = sh.get_handle(model) is not None
    handle = sh.attach(model)
    with torch.no_grad(), handle.use_heads(mask.view(LAYERS, HEADS)):
        losses = [float(model(**batch).loss) for batch in constructed.batches]
    if not attached:
        handle.detach()
    return sum(losses) / len(losses)


def _draw_heads(generator: torch.Generator, count: int) -> list[int]:
    """Distinct heads, the last two of them in different layers."""
    while True:
        heads = torch.randperm(COUNT, generator=generator)[:count].tolist()
        if {head // HEADS for head in heads[-2:]} == {0, 1}:
            return heads


def _quiet(generator: torch.Generator) -> Tensor:
    return _QUIET * torch.randn(OUTPUTS, COUNT, generator=generator)


def _constructed(
    generator: torch.Generator,
    write: Tensor,
    read: list[int],
    signal: list[int],
    special: list[int],
    target: list[int],
    first_gain: float = _GAIN,
) -> Constructed:
    """The labels are what the `target` heads alone give, and an offset that no head explains.

    write `[OUTPUTS, COUNT]`, read: the feature of each head; first_gain: of output 0.
    """
    model = _model(generator, write, read)
    with torch.no_grad():
        model.bert.pooler.dense.weight[0] *= first_gain / _GAIN
    mask = torch.zeros(COUNT, dtype=torch.bool)
    mask[target] = True
    handle = sh.attach(model)
    layers = handle.layers
    handle.detach()
    teacher = masked_copy(model, layers, mask.view(LAYERS, HEADS))
    batches = []
    for _ in range(2):
        ids = torch.randint(_VOCABULARY // 2, (12, 5), generator=generator)
        ids[::2] += _VOCABULARY // 2
        with torch.no_grad():
            logits = teacher(input_ids=ids).logits
        labels = logits + 0.05 * torch.randn(logits.shape, generator=generator)
        batches.append({"input_ids": ids, "labels": labels})
    return Constructed(model, batches, sorted(signal), sorted(special))


@torch.no_grad()
def _model(generator: torch.Generator, write: Tensor, read: list[int]) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=1,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=OUTPUTS,
        problem_type="regression",
    )
    model = transformers.BertForSequenceClassification._from_config(config, attn_implementation="sdpa").eval()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    features = torch.randn(_VOCABULARY, FEATURES, generator=generator)
    features[:, 0] = torch.where(torch.arange(_VOCABULARY) < _VOCABULARY // 2, 1.0, -1.0)
    words = model.bert.embeddings.word_embeddings.weight
    words[:, 0 : 2 * FEATURES : 2], words[:, 1 : 2 * FEATURES : 2] = features, -features
    first = 2 * FEATURES
    for row, layer in enumerate(model.bert.encoder.layer):
        value, output = layer.attention.self.value.weight, layer.attention.output.dense.weight
        for head in range(HEADS):
            number, lane = row * HEADS + head, head * config.hidden_size // HEADS
            value[lane, 2 * read[number]] = 1.0
            output[first::2, lane], output[first + 1 :: 2, lane] = write[:, number], -write[:, number]
    readout = torch.arange(OUTPUTS)
    model.bert.pooler.dense.weight[readout, first + 2 * readout] = _GAIN
    model.classifier.weight[readout, readout] = 1.0
    return model
