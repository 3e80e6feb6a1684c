"""Values that are not finite, named where arrays are read."""

from __future__ import annotations

import numpy as np

from jax_lora.errors import DataError

_BLOCK = 1 << 20  # elements that are looked at at a time, so that no copy of an array is made
# What the exponent's bits of a number that is not finite are, where numpy itself is slow.
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}


def check_finite(array: np.ndarray, name: str, path: object) -> np.ndarray:
    """The array itself.

    Args:
      array: of floating-point numbers, any shape.
      name: of the tensor in its file.
      path: of the file.

    Raises:
      DataError: some values are NaN or infinite; names the file, the tensor and the first of them.
    """
    flat = array.reshape(-1)
    exponent = _EXPONENT.get(array.dtype.name)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if exponent is None:
            bad = ~np.isfinite(block)
        else:
            bad = (block.view(np.uint16) & exponent) == exponent
        if bad.any():
            first = start + int(bad.argmax())
            index = tuple(map(int, np.unravel_index(first, array.shape)))
            raise DataError(
                f"{path}: tensor {name}: found {float(flat[first])} at {index}, expected finite "
                "numbers"
            )
    return array
