r"""Narrower students of a BERT, started from a projection of the teacher instead of at random.

    >>> student = narrow(teacher, 312, batches)                          # TinyBERT's width
    >>> student = narrow(students.depth(teacher, [0, 2, 4, 5]), 312, batches, intermediate=1200)

Hidden states h of width D are described by d < D numbers z with h = Q z, for the Q [D, d] that keeps most of the
second moment of the hidden states of all layers (principal components, as SliceGPT takes them: Ashkboos et al. 2024,
section 3). Every matrix that reads h is multiplied by Q, every one that writes it by Q^T. What else there is to it:

- A LayerNorm subtracts the mean of its d inputs, which would be one direction of z. Q is therefore turned so that the
  columns of Q^T x have the mean 0 for every x: d - 1 components, spread over d coordinates.
- Its gain is a diagonal matrix, and Q^T diag(g) Q is not. The gain and offset of every norm are fitted, from the bottom
  to the top, by least squares to what the teacher has in its place, on the batches.
- A head has D / H columns, in the student d / H. Scores are a product of two maps, and so are the values with the
  output map: each product is cut to the student's size by its best approximation for the teacher's inputs (a singular
  value decomposition weighed by their second moment), biases included.
- Neurons of the feed-forward network and of the pooler are kept or left out whole, the ones that do most first.

The start is rough, since the gains are not diagonal in the new coordinates; it is for distillation to go on from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert.encoders.inputs import accepted_inputs
from qbert.encoders.modes import evaluation_mode
from qbert.encoders.structure import refuse_changed
from qbert.encoders.targets import base_model

Model = TypeVar("Model", bound=nn.Module)
Batch = Mapping[str, Any]
_SMALLEST = 1e-6
_READ = ("input_ids", "attention_mask", "token_type_ids")


def narrow(teacher: Model, width: int, batches: Iterable[Batch], *, intermediate: int | None = None) -> Model:
    """A model of the same class and depth with hidden states of another width, started from the teacher's weights.

    Args:
        teacher: a float BERT, with or without a head for rows, tokens or spans; left as it is.
        width: of the hidden states, less than the teacher's; the number of heads stays and must divide it.
        batches: a few hundred unlabelled rows; labels are not looked at.
        intermediate: neurons of the feed-forward network; in the proportion of the widths where None.

    Returns:
        The student in evaluation mode, whose config says its sizes, so that it can be saved.

    Raises:
        ValueError: another family, a language-model head, a width or number of neurons that cannot work, or no batches.
    """
    _, base = base_model(teacher)
    config: Any = getattr(base, "config", None)
    if getattr(config, "model_type", None) != "bert":
        raise ValueError(f"teacher: {type(teacher).__name__} is no BERT; only that family can be made narrower")
    full, heads = config.hidden_size, config.num_attention_heads
    if not 1 < width < full or width % heads:
        low = width // heads * heads
        near = [w for w in (low, low + heads) if 1 < w < full]
        raise ValueError(
            f"width={width} is not possible; it must be less than the teacher's {full} and a multiple of its {heads} "
            f"heads: use {' or '.join(map(str, near)) or full - heads}"
        )
    neurons = config.intermediate_size
    kept_neurons = round(neurons * width / full) if intermediate is None else intermediate
    if not 1 <= kept_neurons <= neurons:
        raise ValueError(f"intermediate={intermediate} is not possible; the teacher has {neurons}, so use 1 to that")
    refuse_changed(teacher, "narrow")
    if hasattr(teacher, "cls") or any(type(m) is not nn.Linear for m in teacher.modules() if isinstance(m, nn.Linear)):
        raise ValueError(
            f"teacher: {type(teacher).__name__} has a head over the vocabulary or is quantized; give the encoder, "
            "in float, alone or with a head for rows or tokens"
        )
    rows = _one_batch(batches, next(teacher.parameters()).device)
    new = copy.deepcopy(config)
    new.hidden_size, new.intermediate_size = width, kept_neurons
    student: Any = type(teacher)(new).eval().to(next(teacher.parameters()).device)
    with torch.no_grad():
        seen = _Seen(teacher, rows)
        basis = _basis(seen, width)
        _project(teacher, student, basis, seen)
        _fit_norms(student, rows, basis, seen)
    return student  # type: ignore[no-any-return]


def _norms(model: nn.Module) -> list[nn.LayerNorm]:
    """Every norm of the trunk in the order of the forward pass: the table's, then two a layer."""
    _, base = base_model(model)
    found: list[Any] = [base.embeddings.LayerNorm]  # type: ignore[union-attr]
    for layer in base.encoder.layer:  # type: ignore[union-attr]
        found += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
    return found


def _one_batch(batches: Iterable[Batch], device: torch.device) -> dict[str, Tensor]:
    """All rows as one batch, padded with zeros, without labels, with an attention mask. ValueError for none."""
    parts = [{k: v for k, v in b.items() if isinstance(v, Tensor) and k in _READ} for b in batches]
    if not parts:
        raise ValueError("batches is empty; give a few hundred unlabelled rows")
    parts = [{"attention_mask": torch.ones_like(part["input_ids"]), **part} for part in parts]
    longest = max(part["input_ids"].shape[1] for part in parts)
    return {
        key: torch.cat([F.pad(part[key], (0, longest - part[key].shape[1])) for part in parts]).to(device)
        for key in parts[0]
    }


class _Seen:
    """What the teacher has on the rows.

    Attributes:
        after: outputs of every norm, [N tokens, D] each, in the teacher's own dtype: all of them at once are the most
            that is held, and `state` gives one in float64 when it is its turn.
        neurons: mean square of every feed-forward neuron [I], a layer, float64.
        pooled: mean square of every output of the pooler [D], float64; None without one.
    """

    def __init__(self, model: nn.Module, rows: dict[str, Tensor]) -> None:
        _, base = base_model(model)
        layers: Any = base.encoder.layer  # type: ignore[union-attr]
        keep = rows["attention_mask"].bool()
        self.after: list[Tensor] = []
        self.neurons: list[Tensor] = []
        self.pooled: Tensor | None = None

        def note_state(module: nn.Module, args: Any, output: Tensor) -> None:
            self.after.append(output[keep])

        def note_neurons(module: nn.Module, args: Any, output: Tensor) -> None:
            self.neurons.append(output[keep].double().square().mean(0))

        def note_pooled(module: nn.Module, args: Any, output: Tensor) -> None:
            self.pooled = output.double().square().mean(0)

        hooks = [(norm, note_state) for norm in _norms(model)]
        hooks += [(layer.intermediate, note_neurons) for layer in layers]
        if getattr(base, "pooler", None) is not None:
            hooks.append((base.pooler, note_pooled))  # type: ignore[arg-type]
        _run(model, rows, hooks)

    def state(self, norm: int) -> Tensor:
        """Output of one norm [N, D], float64."""
        return self.after[norm].double()


def _run(model: nn.Module, rows: dict[str, Tensor], hooks: Sequence[tuple[nn.Module, Any]]) -> None:
    """One forward pass with these forward hooks."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(**accepted_inputs(model, rows))
    finally:
        for handle in handles:
            handle.remove()


def _basis(seen: _Seen, width: int) -> Tensor:
    """Q [D, d], float64: Q^T x has the mean 0, and Q Q^T x is near to x for the hidden states x of all layers."""
    states = (seen.state(i) for i in range(len(seen.after)))
    moment = sum(x.T @ x / x.square().mean() for x in states)  # each layer counts the same, whatever its scale
    assert isinstance(moment, Tensor)
    components = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : width - 1]  # [D, d - 1]
    ones = torch.ones(width, 1, dtype=torch.float64, device=moment.device) / width**0.5
    spread = torch.linalg.qr(torch.cat([ones, torch.eye(width, dtype=torch.float64, device=moment.device)], 1)).Q
    return components @ spread[:, 1:width].T


def _project(teacher: Any, student: Any, basis: Tensor, seen: _Seen) -> None:
    """Fill the student's tables, matrices and head; its norms are still those of a new model."""
    _, theirs = base_model(teacher)
    _, ours = base_model(student)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        table = getattr(theirs.embeddings, name).weight  # type: ignore[union-attr]
        getattr(ours.embeddings, name).weight.copy_(table.double() @ basis)  # type: ignore[union-attr]
    pairs = zip(theirs.encoder.layer, ours.encoder.layer, strict=True)  # type: ignore[union-attr, arg-type]
    for index, (old, new) in enumerate(pairs):
        # The inputs of layer i are the outputs of norm 2 i.
        coordinates = seen.state(2 * index) @ basis  # [N, d]
        _project_attention(old.attention, new.attention, basis, coordinates)
        weights = old.output.dense.weight.double()
        importance = seen.neurons[index] * (basis.T @ weights).square().sum(0)
        kept = importance.topk(new.intermediate.dense.out_features).indices.sort().values
        new.intermediate.dense.weight.copy_(old.intermediate.dense.weight.double()[kept] @ basis)
        new.intermediate.dense.bias.copy_(old.intermediate.dense.bias[kept])
        new.output.dense.weight.copy_(basis.T @ weights[:, kept])
        new.output.dense.bias.copy_(basis.T @ old.output.dense.bias.double())
    _project_head(teacher, student, basis, seen)


def _project_attention(old: Any, new: Any, basis: Tensor, coordinates: Tensor) -> None:
    """Queries with keys, and values with the output map, head by head."""
    heads, full, size = old.self.num_attention_heads, old.self.attention_head_size, new.self.attention_head_size
    query, key = (_with_bias(m, basis).unflatten(0, (heads, full)) for m in (old.self.query, old.self.key))
    value = (old.self.value.weight.double() @ basis).unflatten(0, (heads, full))
    out = (basis.T @ old.output.dense.weight.double()).unflatten(1, (heads, full))
    root, inverse = _roots(torch.cat([coordinates, torch.ones_like(coordinates[:, :1])], 1))
    plain_root, plain_inverse = _roots(coordinates)
    fourth = (size / full) ** 0.25  # scores are divided by the square root of the size of a head
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        left, right = _halves(root @ query[head].T, key[head] @ root, size)
        for linear, part in ((new.self.query, left.T @ inverse), (new.self.key, right @ inverse)):
            linear.weight[rows] = (fourth * part[:, :-1]).to(linear.weight.dtype)
            linear.bias[rows] = (fourth * part[:, -1]).to(linear.bias.dtype)
        left, right = _halves(out[:, head], value[head] @ plain_root, size)
        new.output.dense.weight[:, rows] = left.to(new.output.dense.weight.dtype)
        new.self.value.weight[rows] = (right @ plain_inverse).to(new.self.value.weight.dtype)
    # Attention sums to 1, so the bias of the values goes through the output map as it is.
    new.self.value.bias.zero_()
    whole = old.output.dense.bias.double() + old.output.dense.weight.double() @ old.self.value.bias.double()
    new.output.dense.bias.copy_(basis.T @ whole)


def _with_bias(linear: Any, basis: Tensor) -> Tensor:
    """[O, d + 1]: the matrix in the new coordinates, its bias as the last column."""
    return torch.cat([linear.weight.double() @ basis, linear.bias.double().unsqueeze(1)], 1)


def _roots(values: Tensor) -> tuple[Tensor, Tensor]:
    """The square root [d, d] of the second moment of `values` [N, d], and its inverse."""
    sizes, vectors = torch.linalg.eigh(values.T @ values / len(values))
    sizes = sizes.clamp_min(float(sizes[-1]) * _SMALLEST).sqrt()
    return (vectors * sizes) @ vectors.T, (vectors / sizes) @ vectors.T


def _halves(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[m, rank] and [rank, n], of equal size, with the product nearest to that of `left` [m, k] and `right` [k, n]."""
    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(outer.R @ inner.R.T)
    half = s[:rank].sqrt()
    return outer.Q @ u[:, :rank] * half, half.unsqueeze(1) * (v[:rank] @ inner.Q.T)


def _project_head(teacher: Any, student: Any, basis: Tensor, seen: _Seen) -> None:
    """Pooler and whatever matrix stands behind the encoder."""
    _, theirs = base_model(teacher)
    _, ours = base_model(student)
    inside = {id(m) for m in theirs.modules()}
    outer = [(name, m) for name, m in teacher.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    kept: Tensor | None = None
    pooler: Any = getattr(theirs, "pooler", None)
    if pooler is not None and seen.pooled is not None:
        weight = torch.cat([m.weight.double() for _, m in outer]) if outer else torch.ones_like(pooler.dense.weight)
        importance = seen.pooled * weight.square().sum(0)
        kept = importance.topk(basis.shape[1]).indices.sort().values
        ours.pooler.dense.weight.copy_(pooler.dense.weight.double()[kept] @ basis)  # type: ignore[union-attr, operator]
        ours.pooler.dense.bias.copy_(pooler.dense.bias[kept])  # type: ignore[union-attr, operator]
    for name, linear in outer:
        new = student.get_submodule(name)
        new.weight.copy_(linear.weight.double() @ basis if kept is None else linear.weight[:, kept])
        if linear.bias is not None:
            new.bias.copy_(linear.bias)


def _fit_norms(student: nn.Module, rows: dict[str, Tensor], basis: Tensor, seen: _Seen) -> None:
    """Gains and offsets by least squares, each norm on what those below it, already fitted, give."""
    keep = rows["attention_mask"].bool()
    norms = _norms(student)
    order = {id(norm): i for i, norm in enumerate(norms)}

    def fit(norm: Any, args: Any, output: Tensor) -> Tensor:
        aim = seen.state(order[id(norm)]) @ basis
        normalized = output[keep].double()  # its gain is 1 and its offset 0
        centre, goal = normalized.mean(0), aim.mean(0)
        spread = (normalized - centre).square().mean(0).clamp_min(_SMALLEST)
        gain = ((normalized - centre) * (aim - goal)).mean(0) / spread
        norm.weight.copy_(gain)
        norm.bias.copy_(goal - gain * centre)
        return output * norm.weight + norm.bias

    for norm in norms:
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    _run(student, rows, [(norm, fit) for norm in norms])
