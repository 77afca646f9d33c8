"""Layer maps: which layer of the teacher a layer of the student learns from.

    >>> layer_pairs("uniform", students=4, teachers=12)
    [(0, 2), (1, 5), (2, 8), (3, 11)]

Layers count from 0. Hidden states have one entry more (entry 0 is the embedding output, entry i the output of layer
i - 1), and `state_pairs` maps those.

References: Jiao et al. 2020, TinyBERT, section 3.1 and table 5 (uniform, top, bottom); Sun et al. 2019 (skip, last).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Pairs: TypeAlias = list[tuple[int, int]]
LayerMap: TypeAlias = "str | Sequence[tuple[int, int]]"

LAYER_MAPS = ("uniform", "top", "bottom", "skip", "last")


def layer_pairs(layers: LayerMap, *, students: int, teachers: int) -> Pairs:
    """(student layer, teacher layer) pairs.

    Args:
        layers: ``uniform`` (evenly spread, the last onto the last), ``top`` (the teacher's last layers), ``bottom``
            (its first), ``skip`` (uniform without the last), ``last`` (only the last onto the last), or explicit
            pairs; negative numbers count from the end.
        students, teachers: numbers of layers N and M.

    Raises:
        ValueError: an unknown map, a pair with a layer that does not exist, or more student than teacher layers
            with a named map.
    """
    if not isinstance(layers, str):
        return [(_index(s, students, "student"), _index(t, teachers, "teacher")) for s, t in layers]
    if layers not in LAYER_MAPS:
        raise ValueError(f"layer map {layers!r} is not known; use one of {', '.join(LAYER_MAPS)} or a list of pairs")
    if layers == "last":
        return [(students - 1, teachers - 1)]
    if students > teachers:
        raise ValueError(
            f"layer map {layers!r} needs at least as many teacher layers as student layers, got {students} student "
            f"and {teachers} teacher layers; give explicit pairs"
        )
    if layers == "top":
        return [(s, teachers - students + s) for s in range(students)]
    if layers == "bottom":
        return [(s, s) for s in range(students)]
    uniform = [(s, _round((s + 1) * teachers, students) - 1) for s in range(students)]
    return uniform[:-1] if layers == "skip" and students > 1 else uniform


def state_pairs(layers: LayerMap, *, students: int, teachers: int, embedding: bool = True) -> Pairs:
    """Pairs of indices into hidden states (0 is the embedding output), of models with that many layers.

    Explicit pairs are taken as indices of hidden states; for a named map `embedding` adds the pair (0, 0).
    """
    if not isinstance(layers, str):
        what = " hidden states, that of the embeddings included"
        return [(_index(s, students + 1, "student", what), _index(t, teachers + 1, "teacher", what)) for s, t in layers]
    mapped = [(s + 1, t + 1) for s, t in layer_pairs(layers, students=students, teachers=teachers)]
    return [(0, 0), *mapped] if embedding and layers not in ("last", "skip") else mapped


def _round(numerator: int, denominator: int) -> int:
    """The quotient rounded half up, in whole numbers."""
    return (2 * numerator + denominator) // (2 * denominator)


def _index(index: int, count: int, whose: str, what: str = "") -> int:
    resolved = index + count if index < 0 else index
    if not 0 <= resolved < count:
        raise ValueError(f"the {whose} has no layer {index} to match; it has {count}{what}, numbered 0 to {count - 1}")
    return resolved
