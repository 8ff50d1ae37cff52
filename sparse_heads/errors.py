"""Everything that sparse_heads raises or warns on purpose, and the helpers that word the messages."""

from __future__ import annotations

import warnings

import torch


class SparseHeadsError(Exception):
    """Base of every error raised on purpose."""


class InvalidArgumentError(SparseHeadsError, ValueError):
    """An argument has a wrong value, shape, device or length."""


class InvalidTypeError(SparseHeadsError, TypeError):
    """An argument has a wrong type or dtype."""


class SubsetMismatchError(SparseHeadsError, ValueError):
    """A subset or scores of one model were handed to another."""


class FileFormatError(SparseHeadsError, ValueError):
    """A file is truncated, malformed or of an unknown schema version."""


class UnknownFamilyError(SparseHeadsError, ValueError):
    """`attach` found no attention layer that it can describe."""


class UnsupportedError(SparseHeadsError, ValueError):
    """A combination that is not built, or that cannot be honoured."""


class DetachedError(SparseHeadsError, ValueError):
    """A handle was used after `detach`."""


class NotFiniteError(SparseHeadsError, ValueError):
    """Training met a loss, gradients or importances that are NaN or infinite; the last good ones are kept."""


class BackendUnavailableError(SparseHeadsError, ValueError):
    """A backend was asked for by name and cannot run here."""


class SparseHeadsWarning(UserWarning):
    """Category of every warning given on purpose."""


_warned: set[str] = set()  # of what was warned already


def warn_of_reference(what: str, missing: str, reason: str | None, stacklevel: int) -> None:
    """Warn, once in the process, that `what` ("attention runs") takes the reference, as `missing` is not available.

    stacklevel: 1 is the caller's own line, 2 the line that called it, and so on.
    """
    if what not in _warned:
        _warned.add(what)
        warnings.warn(
            f"{what} the reference: {missing} is not available: {reason}", SparseHeadsWarning, stacklevel=stacklevel + 1
        )


def describe(value: object) -> str:
    """Word `value` for a message: dtype, shape and device of a tensor, a short repr of anything else."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def invalid(argument: str, wanted: str, got: object) -> InvalidArgumentError:
    """An error that names the argument, what was wanted and what came (`got` is described unless it is a str)."""
    return InvalidArgumentError(f"{argument}: wanted {wanted}, got {got if isinstance(got, str) else describe(got)}")


def invalid_type(argument: str, wanted: str, got: object) -> InvalidTypeError:
    """As `invalid`, for a wrong type or dtype."""
    return InvalidTypeError(f"{argument}: wanted {wanted}, got {got if isinstance(got, str) else describe(got)}")
