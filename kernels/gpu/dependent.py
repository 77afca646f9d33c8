"""Kernels that are launched while the one before still runs: programmatic dependent launch, on sm_90 and later.

It stands alone because every kernel of an encoder's chain needs it: quantize_rows, layernorm_quantize,
embed_layernorm, matmul_a8, matmul_a8_mixed and attention. With few tokens a kernel lasts a few microseconds, of which a
launch takes one or two; launched early, the next one has its programs on the chip when the one before ends.

Why results cannot change. A kernel launched so (`dependent_launch`) begins with `after_previous`: it waits until the
kernel before it in the stream has ended and all that it wrote can be seen, and only then lets the next one be launched.
Before that it computes addresses and asks the L2 cache to fetch weights (`fetch_rows`); it reads nothing into registers
or shared memory and writes nothing, and every one of its programs waits, also those that then find nothing to do. So:

- read after write, write after read, write after write: every access comes after the wait, thus after the end of the
  kernel before. That one ended after its own wait, thus after the end of the one before it, and so on: whatever stands
  earlier in the stream is done, be it activations, row sums, the parts and counters of split products, or memory that
  was given back to the allocator and is used again.
- The next kernel's programs may run beside this one only once all programs of this one have passed their wait, so that
  two neighbours are all that ever run together, and the later of them is waiting.
- What the cache is asked for early is the weights, which no kernel of the chain writes; that a line is fetched before
  some kernel writes to it changes no value either, because all processors share that cache.
- embed_layernorm begins the chain, in a CUDA graph behind a fill of memory, and is launched when all before has ended;
  its own wait then is none.
- A kernel that knows nothing of this (torch's, memory copies, `matmul_a16`) is launched when the one before has ended,
  and the next one of ours when it has ended: it never lets others begin early.
- No deadlock: programs that wait take up room only after all programs of the kernel before have begun.

In a CUDA graph the same attribute makes the same edges. The environment variable QBERT_PDL turns it on or off ("1",
"0"); without it, it is on for up to 2,048 tokens. Nobody has run it on a GPU yet: `experiments/bench/gpu_checks.py`
compares encoders with and without it bit for bit.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW_TOKENS = 2048


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Waits for the end of the kernel before, and lets the one behind be launched; with PDL False nothing."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_rows(ptr, rows, stride, first, last, PDL: tl.constexpr):
    """Asks for bytes first to last - 1 of these rows [R] of a matrix of bytes in the L2 cache, and waits for none."""
    if PDL:
        lines = tl.arange(0, 4) * 128
        for start in range(first, last, 512):
            at = rows[:, None].to(tl.int64) * stride + tl.minimum(start + lines, last - 1)[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; // $0", "=r,l", [ptr + at], dtype=tl.int32, is_pure=False, pack=1
            )


def dependent_launch(x: Tensor, tokens: int, first: bool = False) -> dict[str, bool]:
    """Options of a launch with so many tokens on the device of `x`: PDL for the kernel, launch_pdl for Triton.

    The `first` kernel of a chain is not launched early itself, it only lets the next one be.
    Raises ValueError for a QBERT_PDL other than "0", "1" or none.
    """
    forced = os.environ.get("QBERT_PDL", "")
    if forced not in ("", "0", "1"):
        raise ValueError(f"QBERT_PDL must be '0', '1' or not set, got {forced!r}.")
    wanted = forced == "1" or (not forced and tokens <= _FEW_TOKENS)
    if not wanted or not _can_depend(x):
        return {"PDL": False}
    return {"PDL": True} if first else {"PDL": True, "launch_pdl": True}


def _can_depend(x: Tensor) -> bool:
    known = hasattr(tl.extra.cuda, "gdc_wait")  # from Triton 3.4 on
    return known and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
