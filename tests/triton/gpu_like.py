"""What Triton's interpreter does otherwise than a GPU, and the tests need.

bfloat16: the interpreter keeps its 16 bits. It converts float32 to them by cutting off what does
not fit, and calculates with them as if they were integers; neither is to be repaired:
https://github.com/triton-lang/triton/issues/11584 and its pull request 10945. The kernels only
convert, so conversions are all that tests need.

Assertions: the interpreter leaves them out, whatever a launch says.

Warnings: numpy warns of infinities and NaN, which a GPU passes over in silence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _round_to_nearest() -> None:
    """float32 is rounded to the nearest bfloat16, ties to even."""
    original = interpreter._convert_float

    def convert(values: Any, from_dtype: Any, to_dtype: Any, rounding: Any) -> Any:
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.reshape(-1).copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16").reshape(values.shape)
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return values.view("uint16").astype("uint32") << 16
        return original(values, from_dtype, to_dtype, rounding)

    interpreter._convert_float = convert


def _assert() -> None:
    """``tl.device_assert`` raises, with its message."""
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _without_warnings() -> None:
    original = interpreter.GridExecutor.__call__

    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return original(*args, **kwargs)

    interpreter.GridExecutor.__call__ = call


def install() -> None:
    _round_to_nearest()
    _assert()
    _without_warnings()
