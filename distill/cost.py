"""What a training will cost on this machine, measured before it begins.

>>> distiller.estimate()["seconds"]
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from qbert.distill.distiller import Distiller


def estimate_cost(distiller: Distiller, steps: int) -> dict[str, float]:
    """See `Distiller.estimate`."""
    args = distiller.args
    collate = distiller._get_collator_with_removed_columns(distiller.data_collator)
    with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
        loader: Any = DataLoader(distiller.rows, args.train_batch_size, collate_fn=collate)
        times = [_time_step(distiller, batch) for batch in itertools.islice(iter(loader), steps)]
    distiller.distillation.zero_grad(set_to_none=True)
    warm = times[1:] or times
    per_step = sum(warm) / len(warm) * args.gradient_accumulation_steps
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    total = args.max_steps if args.max_steps > 0 else args.num_train_epochs * -(-len(distiller.rows) // rows_a_step)
    return {"seconds_per_step": per_step, "steps": float(total), "seconds": per_step * total}


def _time_step(distiller: Distiller, batch: Any) -> float:
    inputs = distiller._prepare_inputs(batch)
    distiller.distillation.train()
    start = time.perf_counter()
    distiller.distillation(**inputs)["loss"].backward()
    if distiller.args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
