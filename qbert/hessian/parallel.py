"""Share the blocks of a measurement between the processes that torchrun started.

Blocks are independent of each other, so process r of N takes blocks r, r + N, ... and the numbers are those of one
process. Only the finished table travels.

    torchrun --nproc_per_node=2 script.py     # after torch.distributed.init_process_group("gloo") in the script
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Index of this process and number of processes; (0, 1) unless a process group was set up."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_share(items: Sequence[T]) -> list[T]:
    """Every N-th of `items`, beginning with this process's index: neighbours, alike in cost, go to different ones."""
    rank, world = rank_and_world()
    return list(items[rank::world])


def wait_for_all() -> None:
    """Return when every process has come here."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def check_same(description: str, what: str, mend: str = "load the same one in each") -> None:
    """Refuse to share work between processes whose descriptions differ.

    Args:
        description: of this process.
        what, mend: beginning and end of the sentence that is raised.

    Raises:
        ValueError: in every process.
    """
    world = rank_and_world()[1]
    if world == 1:
        return
    found: list[str | None] = [None] * world
    dist.all_gather_object(found, description)
    if len(set(found)) > 1:
        raise ValueError(f"{what} between the {world} processes; {mend}")


def gathered(table: Tensor, device: torch.device) -> Tensor:
    """Sum of the float64 `table` over all processes; entries that are not this process's own must be 0."""
    if rank_and_world()[1] == 1:
        return table
    moved = table.to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(moved)
    return moved.cpu()
