"""Name patterns of a bits configuration: which tensors one matches, and which of several matches wins.

A pattern is a dotted name that stands for everything at and below it, or a glob over whole names. The longest match
wins, wildcards not counted.

    >>> covers("encoder.layer.1", ["encoder.layer.1.output.dense"])
    True
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def covers(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern matches one of the names of a tensor."""
    return any(n == pattern or n.startswith(pattern + ".") or fnmatch.fnmatchcase(n, pattern) for n in names)


def longest(patterns: Iterable[str]) -> list[str]:
    """Those of `patterns` that have the most characters besides wildcards, in their order."""
    given = list(patterns)
    most = max(map(_length, given), default=0)
    return [p for p in given if _length(p) == most]


def _length(pattern: str) -> int:
    return sum(c not in "*?[]" for c in pattern)
