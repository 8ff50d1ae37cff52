"""Compute the first blocks of a model once, and share them between forwards that differ only later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


def find_blocks(model: nn.Module, names: Iterable[str]) -> tuple[list[nn.Module | None], list[nn.Module]]:
    """The block of each named module, and all blocks whose outputs are worth keeping.

    A module's block is its nearest ancestor, or itself, that is an element of an `nn.ModuleList`; None without one.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Elements of outermost lists too: an encoder whose own layers are not attached is shared as well.
    kept = {path for path in lists if not any(path.startswith(f"{outer}.") for outer in lists)}
    own: list[nn.Module | None] = []
    for name in names:
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        block = next((path for path in paths if path.rpartition(".")[0] in lists), None)
        own.append(None if block is None else model.get_submodule(block))
        if block is not None:
            kept.add(block.rpartition(".")[0])
    return own, list(dict.fromkeys(block for path in lists if path in kept for block in lists[path]))


class Prefix:
    """What the blocks of one forward gave, for later forwards that need not run them again.

    Holds one output a block, as `output_hidden_states` would. While a block records or hands out, the instance has a
    `forward` of its own; hooks of the block see every call.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._outputs: list[tuple[nn.Module, Any]] = []
        self._before: dict[nn.Module, int] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the blocks give inside the `with` block, in the order in which they finish."""
        with _forwards({block: partial(self._record, block, block.forward) for block in self._blocks}):
            yield

    @contextmanager
    def handing_out(self, block: nn.Module | None, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside the `with` block, what finished before `block` began hands out `change` of the tensors it gave.

        A block that is called more often than it was by then runs.
        """
        waiting: dict[nn.Module, deque] = {}
        for each, output in self._outputs[: self._before.get(block, 0)]:
            waiting.setdefault(each, deque()).append(output)
        with _forwards({each: partial(_hand_out, queue, each.forward, change) for each, queue in waiting.items()}):
            yield

    def _record(self, block: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self._before.setdefault(block, len(self._outputs))
        output = forward(*args, **kwargs)
        # What comes after the block may write into the tensor that it was given.
        self._outputs.append((block, _changed(output, Tensor.clone)))
        return output


def _hand_out(waiting: deque, forward: Callable, change: Callable, *args: Any, **kwargs: Any) -> Any:
    return _changed(waiting.popleft(), change) if waiting else forward(*args, **kwargs)


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, output)


@contextmanager
def _forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Give instances a `forward` of their own inside the `with` block."""
    found = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in found.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
