"""bfloat16 in Triton's interpreter: conversions as a GPU makes them.

The interpreter keeps bfloat16 as its 16 bits. It converts float32 to it by cutting off what does
not fit, and calculates with the bits as if they were integers; neither is to be repaired:
https://github.com/triton-lang/triton/issues/11584 and its pull request 10945. The kernels only
convert, so conversions are all that tests need.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """From now on float32 is rounded to the nearest bfloat16, ties to even."""
    original = interpreter._convert_float

    def convert(values: Any, from_dtype: Any, to_dtype: Any, rounding: Any) -> Any:
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.reshape(-1).copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16").reshape(values.shape)
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return values.view("uint16").astype("uint32") << 16
        return original(values, from_dtype, to_dtype, rounding)

    interpreter._convert_float = convert
