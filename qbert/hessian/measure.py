"""Measure the Hessian spectrum of an encoder: runs x blocks.

>>> spectrum = hessian_spectrum(model, loader, runs=10, fraction=0.1)
>>> print(spectrum)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from qbert.arguments import real_number, whole_number
from qbert.hessian.batches import (
    BATCH_COST,
    as_samples,
    draw,
    fingerprint,
    loss_weight,
    micro_batch,
    micro_batches,
)
from qbert.hessian.blocks import parameter_blocks
from qbert.hessian.checkpoint import Checkpoint, check_same, model_fingerprint, own_share, rank_and_world, wait_for_all
from qbert.hessian.eigenpair import check_confidence, check_limits
from qbert.hessian.krylov import BOUNDS
from qbert.hessian.losses import LossFunction, MeasuredLoss, in_full_precision
from qbert.hessian.runs import METHODS, PRECISIONS, Measurement, assemble
from qbert.hessian.spectrum import HessianSpectrum


@in_full_precision
def hessian_spectrum(
    model: nn.Module,
    batches: Any,
    *,
    runs: int = 10,
    fraction: float = 0.1,
    granularity: str = "layer",
    method: str = "lanczos",
    tol: float = 1e-3,
    bound: str = "residual",
    confidence: float | None = None,
    precision: str = "fp32",
    max_products: int = 200,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    micro_batch_size: int | None = None,
    block_chunk: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> HessianSpectrum:
    """Top Hessian eigenvalue of every block of `model` over several random data subsets (Q-BERT, section 3.1).

    The model is left as it was; dropout is off, attention of any kind that is twice differentiable will do. The
    same seed gives the same numbers, interrupted or not, in one process or (with `torch.distributed` set up, as under
    torchrun) in several that share the blocks.

    Args:
        model: a transformers encoder with a task head, or any module together with `loss_fn`.
        batches: labelled data: a DataLoader, a data set, or a list of dicts of tensors.
        runs: number of random subsets.
        fraction: share of the samples in each subset, in (0, 1].
        granularity: ``layer``, ``block`` (attention / feed-forward), ``matrix``, or ``group`` (the rows of each head).
        method: ``lanczos``; ``power`` (the paper's rule, for comparison); or ``ggn``: the top eigenvalue of the
            Gauss-Newton matrix instead of the Hessian, for the price of one backward pass.
        tol: bound on the relative error of an eigenvalue.
        bound: ``residual``: an eigenvalue certainly lies within `tol`; ``gap``: the same if the top eigenvalue is
            not one of an unresolved cluster, for a third fewer products.
        confidence: such as 0.99: go on until it is proven, with that probability, that no eigenvalue is larger by
            more than `tol`; about twice the products. None: no other Ritz value can be larger.
        precision: ``fp32``; or ``bf16``: iterate on bfloat16 products to a residual of 1e-2, then take one product in
            the model's own precision for value, residual and error. For accelerators: a CPU without bfloat16 units
            computes it about ten times more slowly than float32. Expect errors of a few 1e-3, and ``converged`` only
            where `tol` and `bound` allow for them.
        max_products: Hessian products after which an eigenvalue is given up as not converged.
        seed: draws the subsets and the start vectors.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss of the batch; default ``model(**batch).loss``.
        collate_fn: for a data set: makes a batch of a list of samples.
        micro_batch_size: samples per forward pass at most; bounds memory, does not change the result: a loss that is
            not a mean over samples or labels is measured on the whole subset at once (a warning in the log says so).
            Default: as `batches`. On CPUs, batches of short and long texts are cut further, for less padding.
        block_chunk: blocks that share one graph and are solved together; bounds memory. Default: by free memory.
        checkpoint: folder that finished (run, block) pairs are kept in.
        resume: go on from `checkpoint`, if there is one; without it, an earlier one is overwritten.
        progress: show a progress bar, counted in Hessian products (in samples for ``ggn``).

    Raises:
        ValueError, TypeError: an argument that cannot be used, named with its value; a foreign checkpoint.
        ArithmeticError: a Hessian that is not finite.
    """
    settings: dict[str, Any] = {"runs": runs, "fraction": fraction, "granularity": granularity, "method": method}
    settings |= {"tol": tol, "bound": bound, "confidence": confidence, "precision": precision}
    settings |= {"max_products": max_products, "seed": seed}
    settings = checked_settings(settings)
    runs, fraction, seed = settings["runs"], settings["fraction"], settings["seed"]
    if resume and checkpoint is None:
        raise ValueError("resume: there is nothing to go on from without a checkpoint; give checkpoint=FOLDER")
    blocks = parameter_blocks(model, granularity)
    check_finite(model)
    if precision == "bf16" and any(p.dtype == torch.float64 for p in model.parameters()):
        raise ValueError("precision: 'bf16' is for float32 models, and this one is float64; use model.float()")
    loss = MeasuredLoss(model, loss_fn=loss_fn)
    samples = as_samples(batches, collate_fn=collate_fn, pad_token_id=loss.pad_token_id, trim=loss.masks_padding)
    size = micro_batch(micro_batch_size, samples)
    settings["samples"] = len(samples)

    def drawn(run: int) -> MeasuredLoss:
        chosen = draw(len(samples), fraction=fraction, seed=seed, run=run)
        cost = BATCH_COST.get(loss.device.type)
        return loss.over(micro_batches(samples, chosen, size, seed=seed + run, batch_cost=cost, unlabelled=True))

    saved = None
    if checkpoint is not None or rank_and_world()[1] > 1:
        signature = {**settings, "micro_batch_size": size, "loss_fn": getattr(loss_fn, "__qualname__", None)}
        check_same(repr(signature), "runs, seed or another argument differs", "pass the same ones in each")
        signature["weights"] = model_fingerprint(model)
        check_same(signature["weights"], "model: the weights differ")
        signature["data"] = fingerprint(b for run in range(runs) for b in drawn(run).batches if loss_weight(b) > 0)
        check_same(signature["data"], "batches: the data differ")
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, signature, resume=resume)
        if not resume and rank_and_world()[0] == 0:
            saved.clear()
        wait_for_all()
    mine = own_share(blocks)
    work = Measurement(mine, block_chunk, settings, saved)
    unit, total = (
        ("sample", runs * round(fraction * len(samples))) if method == "ggn" else ("product", 6 * runs * len(mine))
    )
    # Products of lower blocks cost several times those of upper ones: only their mean over all so far tells the rest.
    hidden = not progress or rank_and_world()[0] > 0
    with tqdm(total=total, desc="Hessian", unit=unit, disable=hidden, smoothing=0) as bar:
        for run in range(runs):
            bar.set_postfix(run=f"{run + 1}/{runs}")
            work.run(run, lambda run: drawn(run).additive(), bar)
    spectrum = assemble(blocks, work, settings)
    if saved is not None:
        saved.finish(block.name for block in mine)
    return spectrum


def check_finite(model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity, or can have no gradients.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(f"model: {name} was made in torch.inference_mode(); load the model outside of it")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"model: the parameter {name} holds NaN or infinity; load or train the model again")


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with Python's numbers, which JSON holds, in the place of numpy's.

    Args:
        settings: the arguments ``runs``, ``fraction``, ``method``, ``tol``, ``bound``, ``confidence``, ``precision``,
            ``max_products`` and ``seed`` of `hessian_spectrum`; others are left as they are.

    Raises:
        ValueError, TypeError: naming the one that cannot be used.
    """
    method, confidence = settings["method"], settings["confidence"]
    numbers: dict[str, Any] = {name: whole_number(name, settings[name], least=1) for name in ("runs", "max_products")}
    numbers |= {name: real_number(name, settings[name]) for name in ("fraction", "tol")}
    numbers["seed"] = whole_number("seed", settings["seed"])
    numbers["confidence"] = None if confidence is None else real_number("confidence", confidence)
    if not 0 < numbers["fraction"] <= 1:
        raise ValueError(f"fraction: {settings['fraction']} is not a share of the samples; use a number in (0, 1]")
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is unknown; use one of {', '.join(METHODS)}")
    if settings["bound"] not in BOUNDS:
        raise ValueError(f"bound: {settings['bound']!r} is unknown; use one of {', '.join(BOUNDS)}")
    if settings["precision"] not in PRECISIONS:
        raise ValueError(f"precision: {settings['precision']!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if settings["precision"] == "bf16" and (method == "ggn" or confidence is not None):
        raise ValueError(
            "precision: 'bf16' goes with method='lanczos' or 'power' and without confidence, since rounded products "
            "prove nothing; use 'fp32'"
        )
    check_confidence(numbers["confidence"])
    check_limits(numbers["tol"], numbers["max_products"])
    return {**settings, **numbers}
