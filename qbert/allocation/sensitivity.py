"""Measure how much each block of an encoder suffers at each bit width, by six predictions and in truth.

>>> report = sensitivity(model, batches, bits=(2, 3, 4, 8))
>>> print(report)

The predictions and their sources are in `qbert.allocation.predictions`. Weights alone are quantized, activations and
embeddings stay in float.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qbert.allocation.blocks import check_widths
from qbert.allocation.damage import quantized_weight, target_specs
from qbert.allocation.kronecker import kronecker_factors
from qbert.allocation.predictions import TRUTH, Sensitivities
from qbert.arguments import whole_number
from qbert.bits import BitsConfig
from qbert.encoders.prefix import LayerCache
from qbert.encoders.targets import Target, encoder_layers, find_targets
from qbert.hessian import HessianOperator, HessianSpectrum, estimate_trace, hessian_spectrum, parameter_blocks
from qbert.hessian.batches import Batch, batch_size
from qbert.hessian.blocks import vector_options
from qbert.hessian.gauss_newton.loss_factor import MixedSamplesError, NoModelOutputError
from qbert.hessian.losses import LossFunction, MeasuredLoss, in_full_precision
from qbert.progress import progress_bar


@in_full_precision
def sensitivity(
    model: nn.Module,
    batches: Any,
    bits: Sequence[int] = (2, 3, 4, 8),
    *,
    granularity: str = "layer",
    spectrum: HessianSpectrum | None = None,
    runs: int = 5,
    fraction: float = 0.1,
    samples: int | None = 512,
    probes: int = 18,
    held_out: bool = False,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    micro_batch_size: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Sensitivities:
    """Eigenvalue, trace, quadratic form and true loss change of every block at every bit width.

    For L blocks and B widths: L B + `probes` L Hessian products and at most L B + 1 forward passes on `samples`
    samples, besides the spectrum. The model is left as it was.

    Args:
        model: a float encoder with a task head (or any module together with `loss_fn`).
        batches: labelled data: a DataLoader, a data set, or a list of dicts of tensors.
        bits: widths out of 2, 3, 4, 8.
        granularity: ``layer``, ``block`` or ``matrix``; that of `spectrum` if one is given.
        spectrum: top eigenvalues measured before, on this model; measured here with `runs` and `fraction` where None.
        samples: number of samples for trace, quadratic form and loss change, drawn by `seed`; all where None.
        probes: Hessian products for the trace of a block (Hutch++), at least 4.
        held_out: measure the loss change on as many other samples: a prediction flatters itself on its own.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss; default ``model(**batch).loss``.
        collate_fn: for a data set: makes a batch of a list of samples.
        micro_batch_size: samples in a forward pass; bounds memory.
        progress: show progress bars.
        **settings: `BitsConfig` defaults of the quantizer (``groups``, ``scheme``, ``range_method``, ...).

    Raises:
        ValueError, TypeError: an argument that cannot be used, named with its value.
    """
    widths = quantized_widths(bits)
    probes = whole_number("probes", probes)
    if probes < 4 or (samples is not None and whole_number("samples", samples) < 1):
        raise ValueError(f"probes={probes!r}, samples={samples!r}: use at least 4 probes (for an error) and 1 sample")
    if spectrum is not None:
        if not isinstance(spectrum, HessianSpectrum):
            raise TypeError(f"spectrum: expected a HessianSpectrum or None, got {type(spectrum).__name__}")
        granularity = str(spectrum.settings.get("granularity", granularity))
    if settings.get("rounding") == "compensated":
        raise ValueError(
            "rounding='compensated' depends on calibration data, which this does not see; leave it out, or measure "
            "compensated codes by allocate_bits(model, size_mb=..., calibration_data=...)"
        )
    if granularity == "group":
        raise ValueError("granularity: 'group' is finer than what gets bits of its own; use layer, block or matrix")
    targets = {t.name: t for t in find_targets(model)}
    blocks = {b.name: _distinct(b.members, targets) for b in parameter_blocks(model, granularity) if b.members}
    if spectrum is not None and list(blocks) != [n for n in spectrum.names if spectrum.members[n]]:
        raise ValueError("spectrum: its blocks are not those of the model; measure this model, or leave it out")
    specs = {b: target_specs(model, b, **settings) for b in widths}
    measured = MeasuredLoss.on_random_samples(
        model,
        batches,
        loss_fn,
        samples=samples if samples is None or not held_out else 2 * samples,
        seed=seed,
        collate_fn=collate_fn,
        micro_batch_size=micro_batch_size,
    )
    scored = measured
    if held_out:
        if len(measured.batches) < 2:
            raise ValueError("held_out: there is one micro-batch of samples, which cannot be halved; give more samples")
        measured, scored = (measured.over(measured.batches[half::2]) for half in (0, 1))
    if spectrum is None:
        spectrum = hessian_spectrum(
            model,
            batches,
            runs=runs,
            fraction=fraction,
            granularity=granularity,
            seed=seed,
            loss_fn=loss_fn,
            collate_fn=collate_fn,
            micro_batch_size=micro_batch_size,
            progress=progress,
        )
    found = _measure(measured, scored, blocks, targets, specs, probes, seed, progress)
    kept = [spectrum.names.index(name) for name in blocks]
    return Sensitivities(
        names=list(blocks),
        members=blocks,
        bits=widths,
        omega=spectrum.sensitivity[kept],
        eigenvalue=spectrum.mean[kept],
        metric=TRUTH,
        settings={
            "granularity": granularity,
            "spectrum": spectrum.settings,
            "samples": sum(map(batch_size, measured.batches)),
            "probes": probes,
            **({"held_out": sum(map(batch_size, scored.batches))} if held_out else {}),
            "seed": seed,
            "quantizer": BitsConfig(4, **settings).to_dict(),
        },
        **found,
    )


def quantized_widths(bits: Sequence[int]) -> tuple[int, ...]:
    """`bits` in ascending order.

    Raises:
        ValueError: as `check_widths`, or a width that leaves weights as they are.
    """
    widths = check_widths(bits)
    if widths[-1] > 8:
        raise ValueError(f"bits={tuple(bits)!r}: 16 and 32 bits leave the weights as they are; use 2, 3, 4, 8")
    return widths


def _measure(
    measured: MeasuredLoss,
    scored: MeasuredLoss,
    blocks: Mapping[str, Sequence[str]],
    targets: Mapping[str, Target],
    specs: Mapping[int, Mapping[str, Any]],
    probes: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """All arrays but the eigenvalues, and the loss: predictions on `measured`, the loss and its changes on `scored`."""
    shape = (len(blocks), len(specs))
    found: dict[str, Any] = {n: np.zeros(shape) for n in ("weight_error", "curvature", "gradient", "loss_change")}
    found |= {"trace": np.zeros(len(blocks)), "trace_error": np.full(len(blocks), np.inf)}
    weights = {name: [_parameter(targets[m]) for m in members] for name, members in blocks.items()}
    operator = HessianOperator.of(measured, weights)
    total = len(blocks) * (probes + len(specs))
    with progress_bar(total=total, desc="sensitivity", unit="product", disable=not progress, smoothing=0) as bar:
        for i, (name, members) in enumerate(blocks.items()):

            def product(vector: Tensor, name: str = name) -> Tensor:
                bar.update()
                return operator.product(name, vector)

            size = operator.size(name)
            trace = estimate_trace(product, size, probes=probes, seed=seed, **vector_options(weights[name]))
            found["trace"][i], found["trace_error"][i] = trace.value / size, trace.error / size
            slope = operator.gradient(name).double()
            for j, by_path in enumerate(specs.values()):
                moved = torch.cat([_change(targets[m], by_path[targets[m].path]) for m in members])
                curved = product(moved)
                found["weight_error"][i, j] = float(moved.double().square().sum())
                found["curvature"][i, j] = float(moved.double() @ curved.double())
                found["gradient"][i, j] = float(slope @ moved.double())
    operator.release()
    found["kronecker"] = _kronecker(measured, blocks, targets, specs)
    changes = LossChanges(scored.model, scored.batches, loss_fn=scored.loss_fn)
    with progress_bar(
        total=len(blocks) * len(specs), desc="loss change", unit="pass", disable=not progress, smoothing=0
    ) as bar:
        for i, members in enumerate(blocks.values()):
            for j, by_path in enumerate(specs.values()):
                quantized = {m: quantized_weight(targets[m], by_path[targets[m].path]) for m in members}
                found["loss_change"][i, j] = changes.of(quantized)
                bar.update()
    return found | {"loss": changes.loss}


def _kronecker(
    measured: MeasuredLoss,
    blocks: Mapping[str, Sequence[str]],
    targets: Mapping[str, Target],
    specs: Mapping[int, Mapping[str, Any]],
) -> NDArray[np.float64] | None:
    """[L, B] damage by Kronecker factors; None where the loss is not seen to come from logits of samples."""
    modules = {m: cast(nn.Linear, targets[m].module) for members in blocks.values() for m in members}
    try:
        linears = list(dict.fromkeys(modules.values()))
        factors = kronecker_factors(measured.model, measured.batches, linears, measured.loss_fn)
    except (NoModelOutputError, MixedSamplesError):
        return None
    return np.array(
        [
            [
                sum(
                    factors[modules[m]].damage(_change(targets[m], by_path[targets[m].path]).view(targets[m].shape))
                    for m in members
                )
                for by_path in specs.values()
            ]
            for members in blocks.values()
        ]
    )


def _distinct(members: Sequence[str], targets: Mapping[str, Target]) -> list[str]:
    """The members without those that share the weight of an earlier one."""
    return list({id(targets[m].weight): m for m in reversed(members)}.values())[::-1]


def _change(target: Target, spec: Any) -> Tensor:
    """dW of a matrix, flat."""
    return (quantized_weight(target, spec) - _parameter(target).detach()).reshape(-1)


def _parameter(target: Target) -> nn.Parameter:
    weight = target.weight
    assert isinstance(weight, nn.Parameter)
    return weight


_SAME_LOSS = 1e-5


class LossChanges:
    """Losses of a model on fixed data with some of its weights replaced; the model is left as it was.

    Args:
        model: a float encoder with a task head, or any module together with `loss_fn`.
        batches: micro-batches with labels.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss of a batch; default ``model(**batch).loss``.
        cache_prefix: keep the output of the layers below.

    Attributes:
        loss: mean loss of the unchanged model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        loss_fn: LossFunction | None = None,
        cache_prefix: bool = True,
    ) -> None:
        self._measured = MeasuredLoss(model, batches, loss_fn)
        self._shares = [self._measured.share(batch) for batch in batches]
        self._modules = {t.name: t.module for t in find_targets(model)}
        self._layer_of = {t.name: t.layer for t in find_targets(model)}
        layers = [layer for _, layer in encoder_layers(model)] if cache_prefix else []
        self._cache = LayerCache(layers, len(batches), self._whole_loss)
        self._first = self._batch_loss(0)
        self.loss = self._mean_loss()

    def of(self, weights: Mapping[str, Tensor]) -> float:
        """Change of the mean loss when the matrices named (`Target.name`) have these values [O, I].

        Fastest when called for the lowest layers first.
        """
        self._advance(min(self._layer_of[name] or 0 for name in weights))
        with replaced({name: self._modules[name] for name in weights}, weights):
            return self._mean_loss() - self.loss

    def _mean_loss(self) -> float:
        return sum(share * self._batch_loss(i) for i, share in enumerate(self._shares))

    def _batch_loss(self, index: int) -> float:
        with self._cache.replay(index):
            return self._whole_loss(index)

    def _whole_loss(self, index: int) -> float:
        return self._measured.value(self._measured.batches[index])

    def _advance(self, depth: int) -> None:
        """Keep the outputs of the layers below `depth`, unless the loss then comes out another."""
        before = self._cache.depth
        self._cache.advance(depth)
        if self._cache.depth != before and not self._same_as(self._batch_loss(0), self._first):
            self._cache.forget()

    @staticmethod
    def _same_as(loss: float, expected: float) -> bool:
        return abs(loss - expected) <= _SAME_LOSS * max(1.0, abs(expected))


@contextlib.contextmanager
def replaced(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the modules compute with the given weights; the parameters stay the same objects."""
    parameters = {name: module.weight for name, module in modules.items()}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(kept[name])  # type: ignore[operator, arg-type]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]
