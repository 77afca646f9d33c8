"""Numbers that users pass: Python's or numpy's, checked once and kept as Python's, which JSON can hold.

>>> whole_number("runs", np.int64(10), least=1)
10
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether `value` is a Python or numpy integer and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """`value` as an int.

    Args:
        name: of the argument, for the message.
        value: a Python or numpy integer.
        least: smallest value that will do.

    Raises:
        TypeError: if it is no integer; ValueError if it is below `least`.
    """
    wanted = "a whole number" + ("" if least is None else f" of at least {least}")
    if not is_whole(value):
        raise TypeError(f"{name}: {value!r} is not possible; use {wanted}")
    if least is not None and value < least:
        raise ValueError(f"{name}: {value!r} is not possible; use {wanted}")
    return int(value)


def real_number(name: str, value: Any) -> float:
    """`value` as a float (an int stays one).

    Raises:
        TypeError: if it is no Python or numpy number; ValueError if it is NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {value!r} is not a number; use one")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value!r} is not finite; use a finite number")
    return int(value) if isinstance(value, Integral) else float(value)
