r"""How far quantization moves the weights: :math:`\|W - Q_b(W)\|^2` of every tensor at every bit width b.

The quantizer is the library's own, with the groups, scheme and range method that the configuration will use, so that
what is predicted is what happens.

    >>> weight_errors(model, bits=(2, 4))["encoder.layer.0.output.dense"][4]

Reference: Dong et al. 2020, HAWQ-V2, lemma 1 and section 3.2 (the perturbation of the weights as a factor of the
damage).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qbert.bits import FLOAT_BITS, BitsConfig, TensorSpec
from qbert.modules import WeightQuantizer
from qbert.quantizers.groups import group_layout
from qbert.targets import Target, find_targets


def target_specs(model: nn.Module, bits: int, **settings: Any) -> dict[str, TensorSpec]:
    """Path -> specification of every matrix outside of the embeddings and heads when all of them get `bits` bits.

    Args:
        bits: 2, 3, 4 or 8; 16 and 32 (float) give an empty dict.
        **settings: `BitsConfig` defaults (``groups``, ``scheme``, ``range_method``, ...).

    Raises:
        ValueError: as `BitsConfig.resolve`.
    """
    config = BitsConfig({"*": bits}, embedding_bits=32, **settings)
    return {} if bits in FLOAT_BITS else config.resolve(model)


@torch.no_grad()
def quantized_weight(target: Target, spec: TensorSpec) -> Tensor:
    """The dequantized weight [O, I] that `quantize_model` would compute with, in the weight's own dtype."""
    weight = target.module.weight
    assert isinstance(weight, Tensor)
    row_group, input_groups = group_layout(target, spec)
    quantizer = WeightQuantizer(row_group, input_groups, spec).to(weight.device)
    quantizer.find(weight)
    moved = quantizer(weight.detach())
    assert isinstance(moved, Tensor)
    return moved


def weight_errors(
    model: nn.Module, bits: Sequence[int], *, names: Iterable[str] | None = None, **settings: Any
) -> dict[str, dict[int, float]]:
    """Squared error ||W - Q_b(W)||^2 by target name and bit width; 0 at 16 and 32 bits.

    Args:
        model: a float encoder.
        bits: bit widths to look at.
        names: names of targets (`Target.name`); all matrices outside of the embeddings and heads where None.
        **settings: `BitsConfig` defaults.

    Raises:
        ValueError: if a name is not a quantizable matrix of the model, or the settings do not fit it.
    """
    targets = {t.name: t for t in find_targets(model)}
    specs = {b: target_specs(model, b, **settings) for b in bits}
    known = [n for n, t in targets.items() if any(t.path in s for s in specs.values())]
    wanted = list(names) if names is not None else known
    errors: dict[str, dict[int, float]] = {}
    for name in wanted:
        if name not in targets:
            raise ValueError(f"model: it has no quantizable matrix {name!r}; measure and quantize the same model")
        target = targets[name]
        errors[name] = {b: _squared_error(target, specs[b].get(target.path)) for b in bits}
    return errors


def _squared_error(target: Target, spec: TensorSpec | None) -> float:
    if spec is None:
        return 0.0
    weight = target.module.weight
    assert isinstance(weight, Tensor)
    return float((weight.detach().double() - quantized_weight(target, spec).double()).square().sum())
