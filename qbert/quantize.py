"""`quantize_model`: from a float encoder and a bits configuration to its trainable, fake-quantized twin.

    >>> student = quantize_model(model, {"encoder.layer.0": 8, "embeddings": 8, "*": 4})

Everything that can be refused is refused before the first tensor is touched. Tied and shared weights stay tied and
shared; task heads stay in float unless the configuration names them.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig, TensorSpec
from qbert.calibration import (
    Batch,
    Moment,
    Run,
    by_length,
    calibrate_activations,
    check_batches,
    input_moments,
    mean_logits,
)
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import Target, encoder_weights, find_targets, join_path
from qbert.encoders.weights import is_table, stored, weight_matrix
from qbert.layers.kind import TrainableLayer, kind_of
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.recurrent import open_recurrent
from qbert.layers.tables import TableUse, open_tables, part_specs
from qbert.quantizers.activations import ActivationQuantizer
from qbert.quantizers.groups import group_layout
from qbert.quantizers.ranges import GroupRanges
from qbert.quantizers.rounding import bias_change
from qbert.rounded import RoundedLayers
from qbert.usage import table_uses

_GRADIENT_SHARE = 0.9
_LARGEST_WEIGHT = 1e36  # the ends of a grid of a few levels lie beyond the range, and must be finite too
Model = TypeVar("Model", bound=nn.Module)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@torch.inference_mode(False)  # else the copy's parameters could never be trained
def quantize_model(
    model: Model,
    bits_config: int | Mapping[str, Any] | BitsConfig | str | os.PathLike[str],
    *,
    calibration_data: Any = None,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Model:
    """The fake-quantized twin of an encoder, ready to be evaluated, trained or packed.

    Args:
        model: any encoder built from the kinds of layer in `qbert.layers` (linear maps, tables, convolutions over a
            sequence, LSTMs and GRUs), with or without a task head, or a wrapper of one or several
            (``SentenceTransformer``, a bi-encoder). It is left alone unless `inplace`.
        bits_config: bits for all encoder matrices (2, 3, 4 or 8), a mapping from name patterns, a `BitsConfig`, or
            the path of its JSON file.
        calibration_data: batches (a DataLoader, or a list of dicts of tensors; a few hundred unlabelled rows) that
            are run through the model to fix static activation ranges, for compensated rounding, and for tables of low
            rank or of different bits by rows; ``None`` gives activations a range per token at run time, and rounds to
            nearest.
        inplace: convert `model` itself instead of a copy.
        checkpoint: folder in which compensated rounding keeps every finished encoder layer; those that are there
            already, of the same model, data and configuration, are not rounded again.
        progress: show a bar over the matrices of compensated rounding.

    Returns:
        The converted model, of the same class and in the same mode. Every converted module has
        ``quantized_weight()`` and the hooks of the module whose place it takes.

    Raises:
        ValueError: if the configuration does not fit the model (see `BitsConfig.resolve`), the model is quantized
            already, nothing in its layers can be quantized, a weight is not finite or beyond 1e36, static activation
            ranges, a ``rank`` or ``row_bits`` are asked for without `calibration_data`, or `checkpoint` is of another
            model, data or configuration.
        TypeError: for a `model`, `bits_config` or `calibration_data` of another type.

    Warns:
        UserWarning: where weights of the encoder stay in float because no kind of layer covers their modules; where
            compensated rounding is asked for but matrices are rounded to nearest, because there is no
            `calibration_data` or it does not reach them; and where it has fewer tokens than a matrix has inputs.

    Source: Shen et al. 2020, sections 3.1 and 3.3; for compensated rounding `qbert.quantizers.rounding`.
    """
    config = BitsConfig.parse(bits_config)
    _check_model(model)
    specs = config.resolve(model)
    targets = {t.path: t for t in find_targets(model)}
    _tell_what_is_not_covered(model, targets.values())
    _check_weights(targets, specs)
    batches = check_batches(calibration_data)
    static = [p for p, s in specs.items() if s.activation_range == "static" and not targets[p].is_embedding]
    if static and batches is None:
        raise ValueError(f"activation_range='static' of {static[0]} needs calibration_data; pass a few batches")
    if batches is not None:
        batches = by_length(model, batches)
    uses = _uses_of_composed(model, specs, batches)
    if not inplace:
        model = copy.deepcopy(model)
    specs = {path: _settled(spec, batches is not None) for path, spec in specs.items()}
    compensated = {path: spec for path, spec in specs.items() if spec.rounding == "compensated"}
    if batches is None:
        specs, compensated = _without_data(specs, compensated), {}
    open_recurrent(model, specs.keys())
    wanted = None
    if compensated and batches is not None:
        _, wanted = mean_logits(model, batches) or (None, None)
    ranged = any(spec.activation_range == "static" for spec in specs.values())
    done = _Conversions(model)
    if uses:
        specs |= done.compose({path: specs.pop(path) for path in uses}, uses)
        targets = {t.path: t for t in find_targets(model)}
    try:
        for path, spec in specs.items():
            if path not in compensated:
                done.convert(path, targets[path], spec)
        done.convert_tied()
        if batches is not None:
            if compensated:
                # Before static ranges are fixed nobody knows the last logits.
                _round_compensated(
                    done, targets, compensated, batches, checkpoint, progress, None if ranged else wanted
                )
            calibrate_activations(model, batches)
            if ranged and wanted is not None:
                done.keep_mean_logits(wanted, batches)
    except BaseException:
        done.undo()
        raise
    return model


def _uses_of_composed(
    model: nn.Module, specs: Mapping[str, TensorSpec], batches: list[Batch] | None
) -> dict[str, TableUse]:
    """Path -> what a table that is to be stored as several tensors is used for.

    Raises:
        ValueError: if there is such a table and no data.
    """
    composed = {path: model.get_submodule(path) for path, spec in specs.items() if spec.is_composed}
    if not composed:
        return {}
    if batches is None:
        path = next(iter(composed))
        name = "row_bits" if specs[path].row_bits else "rank"
        raise ValueError(f"{name} of {path} needs calibration_data, which tells its rows apart; pass a few batches")
    uses = table_uses(model, batches, list(composed.values()))
    return {path: uses[module] for path, module in composed.items()}


def _tell_what_is_not_covered(model: nn.Module, targets: Iterable[Target]) -> None:
    """Name the weights of the encoder that no kind of layer covers, and so stay in float whatever is asked.

    Raises:
        ValueError: if those are all the weights of its layers.
    """
    covered = {id(t.weight) for t in targets}
    weights = encoder_weights(model)
    left = [w for w in weights if id(w.tensor) not in covered]
    if not left:
        return
    share = sum(w.tensor.numel() for w in left) / sum(w.tensor.numel() for w in weights)
    left.sort(key=lambda w: (not w.in_layers, -w.tensor.numel()))
    names = ", ".join(f"{w.path} ({w.owner})" for w in left[:3]) + (f" and {len(left) - 3} more" if left[3:] else "")
    in_layers = [w for w in weights if w.in_layers]
    if in_layers and not any(id(w.tensor) in covered for w in in_layers):
        raise ValueError(
            f"model: none of the weights in the layers of {type(model).__name__} can be quantized: {names}; pass an "
            "encoder built from Linear, Embedding, Conv1d, LSTM or GRU modules, or register a kind of layer for these"
        )
    warnings.warn(
        f"{share:.1%} of the weights of {type(model).__name__}'s encoder stay in float, because no kind of layer "
        f"covers them, or they are read without calling one: {names}",
        stacklevel=4,  # past the decorator of quantize_model
    )


def _settled(spec: TensorSpec, calibrated: bool) -> TensorSpec:
    """`spec` with the activation range that it leaves open."""
    if spec.activation_range not in (None, "dynamic or static"):
        return spec
    if spec.rounding == "compensated":
        return replace(spec, activation_range="asymmetric")
    if calibrated:
        return replace(spec, activation_range="static")
    return replace(spec, activation_range="asymmetric" if spec.activation_range is None else "dynamic")


def _without_data(specs: Mapping[str, TensorSpec], compensated: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    if compensated:
        warnings.warn(
            f"rounding='compensated' of {next(iter(compensated))} and others ({len(compensated)} in all) needs "
            "calibration_data, so they are rounded to nearest; pass batches of a few hundred unlabelled rows",
            stacklevel=3,
        )
    return {path: replace(spec, rounding="nearest") for path, spec in specs.items()}


def _round_compensated(
    done: _Conversions,
    targets: Mapping[str, Target],
    specs: Mapping[str, TensorSpec],
    batches: list[Batch],
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
    logits: Tensor | None,
) -> None:
    """Convert matrices one after the other, each with codes for the inputs that those before it leave to it.

    With `logits` [C] the model's mean ones are set to these at the end.
    """
    kept = reference = None
    if checkpoint is not None:
        reference = copy.deepcopy(done.model)  # gradients must come from what stood here before any layer was rounded
        kept = RoundedLayers(checkpoint, reference, batches, specs)
    by_weight: dict[int, list[str]] = {}
    for path in specs:
        by_weight.setdefault(id(done.model.get_submodule(path).weight), []).append(path)

    def members(paths: Iterable[str]) -> list[tuple[str, Target, TensorSpec]]:
        return [(path, targets[path], specs[path]) for path in paths]

    finished = [found for found in by_weight.values() if kept is not None and found[0] in kept]
    for found in finished:
        assert kept is not None
        done.place(members(found), **kept[found[0]])
    left = [path for found in by_weight.values() if found not in finished for path in found]
    paths = {done.model.get_submodule(path): path for path in left}
    depth = 0
    missed: list[str] = []
    few: dict[str, Moment] = {}
    for modules, moment in input_moments(
        done.model,
        batches,
        list(paths),
        weigh=_GRADIENT_SHARE,
        reference=reference,
        at_end=None if logits is None else partial(done.keep_mean_logits, logits, batches),
        progress=progress,
    ):
        if moment.inputs == 0:
            missed += [paths[m] for m in modules]
            for module in modules:
                done.convert(paths[module], targets[paths[module]], replace(specs[paths[module]], rounding="nearest"))
            continue
        if moment.inputs < moment.value.shape[-1]:
            few[paths[modules[0]]] = moment
        if kept is not None and moment.depth != depth:
            kept.finish_layer()
        depth = moment.depth
        rounded = done.compensate(members(paths[m] for m in modules), moment)
        if kept is not None:
            kept.add(paths[modules[0]], rounded)
    if kept is not None:
        kept.finish_layer()
    done.restore_modes()
    if missed:
        warnings.warn(
            f"calibration_data never reaches {', '.join(missed)}, so their weights are rounded to nearest; pass "
            "batches that use them, or name them with rounding='nearest'",
            stacklevel=3,
        )
    if few:
        path, moment = max(few.items(), key=lambda item: item[1].value.shape[-1])
        columns = moment.value.shape[-1]
        warnings.warn(
            f"calibration_data has {moment.inputs} tokens without padding, fewer than the {columns} inputs of "
            f"{path}, whose codes will suit these tokens more than others; pass a few hundred rows",
            stacklevel=3,
        )


class _Conversions:
    """What is put into a model in the place of float modules, so that it can be taken back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._replaced: list[tuple[nn.Module, nn.Module]] = []
        self._weights: list[tuple[nn.Parameter, Tensor]] = []

    def compose(self, specs: Mapping[str, TensorSpec], uses: Mapping[str, TableUse]) -> dict[str, TensorSpec]:
        """Put float tables of several parts in the places of `specs`: path of each part -> its specification."""
        tables = {path: self.model.get_submodule(path) for path in specs}
        self._replaced += open_tables(self.model, specs, {tables[path]: use for path, use in uses.items()})
        return {
            join_path(path, name): part
            for path, spec in specs.items()
            for name, part in part_specs(spec, tables[path].num_embeddings).items()  # type: ignore[arg-type]
        }

    def convert(self, path: str, target: Target, spec: TensorSpec) -> None:
        """Put the quantized twin in the place of a target, rounded to nearest."""
        module = self.model.get_submodule(path)
        weight = weight_matrix(module).detach()
        quantizer = _quantizer(target, spec, weight)
        quantizer.find(weight)
        self._place(module, quantizer, spec)

    def compensate(self, members: list[tuple[str, Target, TensorSpec]], moment: Moment) -> dict[str, Tensor]:
        """Put quantized twins in the place of matrices with one weight, which is rounded for inputs of this moment.

        Returns:
            What `place` takes to do the same again.
        """
        modules = [self.model.get_submodule(path) for path, _, _ in members]
        matrix = weight_matrix(modules[0]).detach()
        bias = getattr(modules[0], "bias", None) if len(modules) == 1 else None
        metric = moment.value if bias is None else moment.covariance
        quantizer = _quantizer(*members[0][1:], matrix)
        rounded = quantizer.compensate(matrix, metric.to(matrix.device))
        # The middle of every code. Where training starts from the places in the codes nearest to the given weights,
        # those at a border go back to the code of nearest rounding within a few steps, and the gain is lost.
        found = {"weight": stored(modules[0], rounded).contiguous(), "scale": quantizer.scale, "zero": quantizer.zero}
        if bias is not None:
            found["bias"] = (bias.detach().double() + bias_change(matrix - rounded, moment.mean)).to(bias)
        self.place(members, **found)
        return found

    def place(
        self,
        members: list[tuple[str, Target, TensorSpec]],
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        """Put quantized twins in the place of matrices with one weight, which gets this value, on these grids."""
        modules = [self.model.get_submodule(path) for path, _, _ in members]
        parameter = cast(nn.Parameter, modules[0].weight)
        for module, (_, target, spec) in zip(modules, members, strict=True):
            quantizer = _quantizer(target, spec, weight_matrix(module).detach())
            quantizer.take(GroupRanges(scale.to(parameter.device), zero.to(parameter.device)), parameter.dtype)
            self._place(module, quantizer, spec)
        self._change(parameter, weight)
        if bias is not None:
            self._change(cast(nn.Parameter, modules[0].bias), bias)

    def keep_mean_logits(self, wanted: Tensor, batches: list[Batch], run: Run | None = None) -> None:
        """Move the bias of the layer that gives the logits, so that their mean over the batches is this [C]."""
        found = mean_logits(self.model, batches, run)
        if found is None:
            return
        name, logits = found
        change = wanted - logits
        if not bool(torch.isfinite(change).all()):
            raise ValueError(
                f"calibration_data: the output of {name} holds NaN or infinity; pass batches on which the model "
                "computes finite numbers"
            )
        bias = cast(nn.Parameter, self.model.get_submodule(name).bias)
        self._change(bias, bias.detach() + change.to(bias))

    def _change(self, parameter: nn.Parameter, value: Tensor) -> None:
        self._weights.append((parameter, parameter.data))
        parameter.data = value.to(parameter)

    def convert_tied(self) -> None:
        """Give a float layer that shares its weight with a quantized one (a head with its table) that one's grids."""
        tables = {id(m.weight): m.weight_quantizer for m in self.model.modules() if isinstance(m, TrainableLayer)}
        for module in list(self.model.modules()):
            kind = None if isinstance(module, TrainableLayer) else kind_of(module)
            if kind is not None and id(module.weight) in tables:
                twin: Any = kind.trainable.from_float(module, tables[id(module.weight)])
                self._replace(module, twin)

    def restore_modes(self) -> None:
        """Give the new modules the modes of the old ones."""
        for old, new in self._replaced:
            new.train(old.training)

    def undo(self) -> None:
        """Put everything back."""
        for old, new in self._replaced:
            replace_everywhere(self.model, new, old)
        for weight, original in reversed(self._weights):
            weight.data = original

    def _place(self, module: nn.Module, quantizer: WeightQuantizer, spec: TensorSpec) -> None:
        kind = kind_of(module)
        assert kind is not None
        activation = None
        if spec.activation_bits is not None and not is_table(module):
            activation = ActivationQuantizer(spec.activation_bits, spec.activation_range or "dynamic")
            activation.to(quantizer.scale.device)
            activation.enabled = activation.mode != "static"  # until it is calibrated
        twin: Any = kind.trainable.from_float(module, quantizer, activation)
        self._replace(module, twin)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new`, with the hooks of `old`, in its place."""
        for name in _HOOKS:
            setattr(new, name, getattr(old, name))
        replace_everywhere(self.model, old, new)
        self._replaced.append((old, new))


def convert_tied(model: nn.Module) -> None:
    """Give float layers that share their weight with a quantized one (a head with its table) that one's grids."""
    _Conversions(model).convert_tied()


def _quantizer(target: Target, spec: TensorSpec, weight: Tensor) -> WeightQuantizer:
    row_group, input_groups = group_layout(target, spec)
    return WeightQuantizer(row_group, input_groups, spec).to(weight.device)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an encoder (nn.Module), got {type(model).__name__}")
    if kind_of(model) is not None:
        raise ValueError(
            f"model: a bare {type(model).__name__} has no place to be replaced in; pass nn.Sequential of it"
        )
    for path, module in model.named_modules():
        if hasattr(module, "quantized_weight"):
            raise ValueError(f"model: {path} is quantized already; pass an encoder that is not quantized yet")


def _check_weights(targets: Mapping[str, Target], specs: Mapping[str, TensorSpec]) -> None:
    for path in specs:
        module, weight = targets[path].module, targets[path].weight
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"model: {path} rescales its rows when they are used (max_norm); set max_norm to None")
        if weight.is_meta:
            raise ValueError(f"model: {path} has no values (device 'meta'); load the weights first")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"model: the weight of {path} holds NaN or infinity; reload or retrain the model")
        largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
        if largest > _LARGEST_WEIGHT:
            raise ValueError(
                f"model: the weight of {path} holds values up to {largest:.1e}, whose range no float32 grid covers; "
                f"use weights of at most {_LARGEST_WEIGHT:.0e}"
            )
