"""Compute what comes first in a model once, and share it between forwards that differ only later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


def find_blocks(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The elements of every outermost `nn.ModuleList` of a model, and of the innermost ones around named modules."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    chosen = {path for path in lists if not any(path.startswith(f"{outer}.") for outer in lists)}
    for name in names:
        around = [path for path in lists if name.startswith(f"{path}.")]
        chosen.update(around[-1:])  # named_modules gives outer ones first
    return list(dict.fromkeys(block for path in lists if path in chosen for block in lists[path]))


@dataclass(frozen=True)
class _Run:
    """One call of a module: what it gave, and how many others had finished when it began."""

    module: nn.Module
    output: Any
    began: int


class Prefix:
    """What modules gave in one forward, for later forwards that need not run them again.

    kept: the modules, whose outputs it holds; ends: the modules that may be where later forwards begin to differ. While
    they record or hand out, instances have a `forward` of their own; hooks of a module see every call.
    """

    def __init__(self, kept: Iterable[nn.Module], ends: Iterable[nn.Module]) -> None:
        self._kept = list(kept)
        self._ends = list(ends)
        self._runs: list[_Run] = []
        self._before: dict[nn.Module, int] = {}
        self._fills_caches = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the modules give inside the `with` block, in the order in which they finish."""
        forwards = {module: partial(self._record, module, module.forward) for module in self._kept}
        forwards |= {module: partial(self._note, module, module.forward) for module in self._ends}
        with _forwards(forwards):
            yield

    @contextmanager
    def handing_out(self, end: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside the `with` block, what finished before `end` first began hands out `change` of the tensors it gave.

        A module that is called more often than it was by then runs; every one does where a cache was to be filled.
        """
        waiting: dict[nn.Module, deque] = {}
        last = 0 if self._fills_caches else self._before.get(end, 0)
        while last:
            run = self._runs[last - 1]
            waiting.setdefault(run.module, deque()).appendleft(run.output)
            last = run.began  # what it called itself is not called now
        with _forwards({each: partial(_hand_out, queue, each.forward, change) for each, queue in waiting.items()}):
            yield

    def _record(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self._fills_caches |= kwargs.get("past_key_values") is not None
        began = len(self._runs)
        output = forward(*args, **kwargs)
        # What comes after the module may write into the tensor that it was given.
        self._runs.append(_Run(module, _changed(output, Tensor.clone), began))
        return output

    def _note(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self._before.setdefault(module, len(self._runs))
        return forward(*args, **kwargs)


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
