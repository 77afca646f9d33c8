r"""How much a model's outputs depend on what its modules compute, without labels.

It stands alone because it knows no tables: any module of any model can be asked about.

The damage that small changes do to the outputs of a model is, to second order,

.. math:: \tfrac12\, E\,[\delta^T F \delta], \qquad \delta = \sum_{t} J_t\, dy_t,

with J the derivative of the outputs of one sample in what a module returns for its token t, and F the metric of the
outputs: for classes the Fisher matrix diag(p) - p p^T, so that the damage is the KL divergence from the outputs as they
were, and diag(p (1 - p)) for labels each of which may hold or not; for a sentence embedding that of the unit vector, so
that it is 1 - cosine; for numbers half the squared change.
With one random vector z of covariance F a sample, the gradients g_t of z^T y give an unbiased estimate by a single
backward pass: the mean of (sum_t g_t dy_t)^2 / 2.

    >>> for samples, calls in output_gradients(model, batches, [model.encoder.layer[0].output.dense]): ...

Reference: Martens 2020, "New insights and perspectives on the natural gradient method", sections 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.calibration import Batch, run_batch
from qbert.encoders.inputs import to_device
from qbert.encoders.modes import evaluation_mode
from qbert.progress import progress_bar


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        module: the module.
        input: what it read: [..., I], or ids [...] of a table.
        gradient: of z^T y in what it returned, [..., O]; zero at padding that nothing reads. Where one call serves all
            samples, as that of a table of positions, it is their sum, which serves as well: they have independent z.
    """

    module: nn.Module
    input: Tensor
    gradient: Tensor


def output_gradients(
    model: nn.Module, batches: Sequence[Batch], modules: Sequence[nn.Module], *, seed: int = 0, progress: bool = False
) -> Iterator[tuple[int, list[Call]]]:
    """(number of samples, calls of `modules`) of every batch, from one forward and one backward pass each.

    Args:
        model: left in the mode and with the hooks that it had.
        batches: dicts of tensors; labels are not needed.
        modules: linear maps and tables of `model`, which the outputs may depend on or not.
        seed: of the random vectors.
        progress: show a bar over the batches.

    Raises:
        ValueError: if the model returns no tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    frozen = [m.weight for m in modules if not m.weight.requires_grad]
    with evaluation_mode(model):
        for batch in progress_bar(batches, desc="gradients", disable=not progress):
            seen: list[tuple[nn.Module, Tensor, Tensor]] = []

            def hook(module: nn.Module, args: Any, output: Tensor, seen: list[Any] = seen) -> None:
                seen.append((module, args[0].detach(), output))

            handles = [m.register_forward_hook(hook) for m in modules]
            try:
                for weight in frozen:
                    weight.requires_grad_(True)  # type: ignore[operator]
                with torch.enable_grad():
                    inputs = {k: v for k, v in to_device(batch, model).items() if k != "labels"}
                    probed, samples = _probe(run_batch(model, inputs), inputs.get("attention_mask"), kind, generator)
                    found = torch.autograd.grad(probed, [y for _, _, y in seen], allow_unused=True)
            finally:
                for weight in frozen:
                    weight.requires_grad_(False)  # type: ignore[operator]
                for handle in handles:
                    handle.remove()
            yield (
                samples,
                [
                    Call(module, x, torch.zeros_like(y) if g is None else g)
                    for (module, x, y), g in zip(seen, found, strict=True)
                ],
            )


def _probe(output: Any, mask: Tensor | None, kind: str | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """(z^T y over all samples, number of samples) of a model's output; `kind` is ``config.problem_type``."""
    values = dict(output) if isinstance(output, Mapping) else {}
    if isinstance(values.get("start_logits"), Tensor) and isinstance(values.get("end_logits"), Tensor):
        ends = [values["start_logits"], values["end_logits"]]
        if mask is not None and mask.shape == ends[0].shape:  # an answer is never read from padding
            ends = [y.masked_fill(mask.to(y.device) == 0, torch.finfo(y.dtype).min) for y in ends]
        return torch.stack([_classes(y, generator).sum() for y in ends]).sum(), len(ends[0])
    logits = values.get("logits")
    if isinstance(logits, Tensor):
        if logits.dim() < 2 or logits.shape[-1] == 1 or kind == "regression":
            return (logits * _signs(logits, generator)).sum(), len(logits)
        if kind == "multi_label_classification":
            p = logits.detach().sigmoid()
            return (logits * (p * (1 - p)).sqrt() * _signs(logits, generator)).sum(), len(logits)
        probed = _classes(logits, generator)  # [N] or [N, T]
        if probed.dim() == 2:
            keep = torch.ones_like(probed) if mask is None or mask.shape != probed.shape else mask.to(probed)
            probed = probed * keep / keep.sum(1, keepdim=True).clamp_min(1).sqrt()
        return probed.sum(), len(logits)
    if isinstance(values.get("sentence_embedding"), Tensor):
        vectors = values["sentence_embedding"]
    else:
        tensors = list(values.values()) or (list(output) if isinstance(output, (tuple, list)) else [output])
        vectors = next((y for y in tensors if isinstance(y, Tensor) and y.is_floating_point()), None)
        if vectors is None:
            raise ValueError(f"model: it returns a {type(output).__name__} without a tensor; pass an encoder")
        if vectors.dim() == 3:
            keep = vectors.new_ones(vectors.shape[:2]) if mask is None else mask.to(vectors)
            vectors = (vectors * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True).clamp_min(1)
    unit = F.normalize(vectors.flatten(1) if vectors.dim() > 1 else vectors.unsqueeze(1), dim=-1)
    return (unit * _signs(unit, generator)).sum(), len(unit)


def _classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """z^T y [...] for logits [..., C], with z of covariance diag(p) - p p^T; of two classes its length is no chance."""
    p = logits.detach().softmax(-1)
    if logits.shape[-1] == 2:
        return p.prod(-1).sqrt() * _signs(p[..., 0], generator) * (logits[..., 0] - logits[..., 1])
    noise = p.sqrt() * _signs(p, generator)
    return (logits * (noise - p * noise.sum(-1, keepdim=True))).nan_to_num(0.0).sum(-1)


def _signs(y: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs in the shape of `y`: of all vectors of covariance 1 those whose length varies least."""
    return torch.randint(0, 2, y.shape, generator=generator).mul_(2).sub_(1).to(y)
