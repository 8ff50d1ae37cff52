"""Do the helpers of the tests notice what they are for?"""

from __future__ import annotations

import pytest
import torch

from sparse_heads.testing import assert_close_to_reference

EXACT = torch.linspace(1, 2, 63, dtype=torch.float64)
EAGER = EXACT.float() + 4e-7


@pytest.mark.parametrize("error", [0.0, 7e-7, -7e-7])
def test_twice_the_eager_error_is_accepted(error):
    assert_close_to_reference(EXACT.float() + error, EAGER, EXACT)


def wrong_at(index: int, value: float) -> torch.Tensor:
    actual = EXACT.float()
    actual[index] = value
    return actual


WRONG = {
    "one value": (wrong_at(17, 1.5), r"at \[17\], allowed 2 x"),
    "nan": (wrong_at(3, float("nan")), "1 of 63 values are not finite"),
    "shape": (EXACT.float()[:62], r"shape \[62\], but low_precision_eager has \[63\]"),
    "dtype": (EXACT, "dtypes torch.float64, torch.float32, torch.float64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_not(case):
    actual, message = WRONG[case]
    with pytest.raises(AssertionError, match=message):
        assert_close_to_reference(actual, EAGER, EXACT)
