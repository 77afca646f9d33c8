"""Row groups: which output neurons of a matrix share one quantization range.

Q-BERT (Shen et al. 2020, section 3.3, figure 3) cuts a weight matrix [O, I] along its output neurons: one group a head
for the query, key and value matrices, then sub-groups inside a head. Here a group never crosses a head: 128 groups
over 12 heads become 11 sub-groups in eight heads and 10 in four, sizes as equal as they can be.

    >>> row_groups(rows=6, groups=3)
    tensor([0, 0, 1, 1, 2, 2])
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.bits import DEFAULT_GROUPS, TensorSpec
from qbert.encoders.targets import Target


def row_groups(rows: int, groups: int, heads: int | None = None) -> Tensor:
    """The group of each row.

    Args:
        rows: number of output neurons O.
        groups: number of groups; at least `rows` means one group a row.
        heads: number of equal blocks of rows that groups of more than `heads` may not cross.

    Returns:
        int64 tensor [O], non-decreasing, with values 0 .. min(groups, rows) - 1, each taken at least once.

    Raises:
        ValueError: if `groups` is below 1 or `heads` does not divide `rows`.
    """
    if groups < 1:
        raise ValueError(f"groups={groups} is not possible; use at least 1")
    if heads is not None and rows % heads:
        raise ValueError(f"heads={heads} does not divide rows={rows}")
    groups = min(groups, rows)
    if heads is None or groups <= heads:
        return _near_equal(rows, groups)
    per_head = torch.bincount(_near_equal(groups, heads), minlength=heads)
    parts, start = [], 0
    for count in per_head.tolist():
        parts.append(_near_equal(rows // heads, count) + start)
        start += count
    return torch.cat(parts)


def group_layout(target: Target, spec: TensorSpec) -> tuple[Tensor, int]:
    """The row groups [O] of a tensor under its specification, and its number of input groups."""
    rows, columns = target.shape
    default = rows if target.is_embedding else DEFAULT_GROUPS
    groups = default if spec.groups is None else spec.groups
    input_groups = columns // spec.input_group_size if spec.input_group_size else 1
    return row_groups(rows, groups, target.heads), input_groups


def _near_equal(items: int, parts: int) -> Tensor:
    """The part of each item when `items` are cut into `parts` runs whose sizes differ by at most one."""
    return torch.div(torch.arange(items, device="cpu") * parts, items, rounding_mode="floor")


def row_group_of(index: Tensor, rows: int, groups: int, heads: int | None) -> Tensor:
    """The row group of each row of `index` (int64, any shape), as `qbert.quantizers.groups.row_groups` cuts them.

    In closed form, so that neither a map of all rows nor its bytes are needed: row r of R lies in group r G // R; with
    more groups than heads, head h of H owns groups ceil(h G / H) and on, shared out over its rows alike.
    """
    if groups == rows:
        return index
    if heads is None or groups <= heads:
        return torch.div(index * groups, rows, rounding_mode="floor")
    head_rows = rows // heads
    head = torch.div(index, head_rows, rounding_mode="floor")
    first = torch.div(head * groups + heads - 1, heads, rounding_mode="floor")
    after = torch.div((head + 1) * groups + heads - 1, heads, rounding_mode="floor")
    inside = torch.div((index % head_rows) * (after - first), head_rows, rounding_mode="floor")
    return first + inside
