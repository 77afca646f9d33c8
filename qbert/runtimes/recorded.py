"""A packed encoder as one record of its steps for all batches and lengths, which other runtimes can take over.

>>> record = record_model(packed, twin_of, ("input_ids", "attention_mask"))
>>> record.outputs
('last_hidden_state',)
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.inputs import most_tokens
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import base_model
from qbert.layers.embedding import PackedEmbedding
from qbert.layers.linear import PackedLinear
from qbert.layers.packed import PackedTensor, check_module
from qbert.layers.transposed import PackedTransposed
from qbert.runtimes.layers import QuantizedInput

RECORDED = 2, 9  # batch and length at which the model is recorded
_OTHERS = (3, 5), (1, 33), (2, 64), (1, 130), (1, 520)
_LONGEST = 2048  # of models that take more; those that cut texts into blocks do so from fewer tokens on
SAME, ALIKE = 1e-3, 0.25  # relative errors: of one computation; of one whose activations may round to other codes
MEND = "run it in torch (qbert.optimize_for_inference), or export a model of another family"
# What modules of sentence-transformers call their results: its name in a file.
_FEATURES = {"sentence_embedding": "sentence_embedding", "scores": "logits", "token_embeddings": "token_embeddings"}


class Recorded(nn.Module):
    """A model as a function of its named inputs: int64 [B, T] each, to a tuple of its named outputs."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], every_output: bool = False) -> None:
        super().__init__()
        self.model, self.inputs, self.name = model, tuple(inputs), type(model).__name__
        self.sentences = _is_sentence_model(model)
        self.every_output = every_output
        self.outputs: tuple[str, ...] = ()
        self.keys: tuple[str, ...] = ()  # of the outputs in what the model returns
        # Asked before twins take the places of tables, which may not say which rows are no token's.
        self.longest = min(most_tokens(model, base_model(model)[1]) or _LONGEST, _LONGEST)
        self.axes: dict[str, dict[int, str]] = {}  # those of varying size, of inputs and outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The outputs of `inputs` in their order."""
        given = dict(zip(self.inputs, values, strict=True))
        result = self.model(given) if self.sentences else self.model(**given)
        if isinstance(result, Mapping):
            return tuple(result[key] for key in self.keys)
        return (result if isinstance(result, Tensor) else result[0],)

    def copy(self, quantize_activations: bool = True) -> Recorded:
        """A copy that shares all tensors, for one run: BigBird leaves its kind of attention changed by a short text."""
        tensors = {id(t): t for t in (*self.parameters(), *self.buffers())}
        twin = deepcopy(self, dict(tensors)).eval()
        for module in twin.modules():
            if isinstance(module, QuantizedInput) and not quantize_activations:
                module.mode = module.static = None
        return twin

    @property
    def limit(self) -> float:
        """The relative error up to which two ways to compute in float32 are one; larger if activations are rounded."""
        rounded = (m.spec.activation_bits for m in self.modules() if isinstance(m, PackedTensor))
        twins = (m.mode or m.static for m in self.modules() if isinstance(m, QuantizedInput))
        return ALIKE if any(rounded) or any(twins) else SAME

    def example(self, batch: int, length: int, with_empty: bool = False) -> tuple[Tensor, ...]:
        """Inputs [batch, length]; the last sequence of several is padded to a third of its length.

        `with_empty` lets the mask hide the first sequence whole.
        """
        ids = torch.arange(batch * length, device="cpu").view(batch, length) % 7
        mask = torch.ones_like(ids)
        if batch > 1:  # a mask of ones would be traced away
            mask[-1, length * 2 // 3 :] = 0
        if with_empty:
            mask[0] = 0
        return tuple(mask if "mask" in n else torch.zeros_like(ids) if "type" in n else ids for n in self.inputs)

    def trace(self, quantize_activations: bool = True) -> Any:
        """The steps of the model, recorded at one length, as TorchScript."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer names every place where it takes a value for a constant
            model = self.copy(quantize_activations)
            return torch.jit.trace(model, self.example(*RECORDED), strict=False, check_trace=False)

    def name_outputs(self) -> None:
        """Find out the names of the outputs, and which axes vary; ValueError if the model cannot be called so."""
        try:
            with torch.no_grad():
                self.keys = self._results()
                self.outputs = tuple(_FEATURES.get(key, key) for key in self.keys) or ("output",)
                long, short = (self.copy()(*self.example(*shape)) for shape in (RECORDED, _OTHERS[0]))
        except Exception as error:  # whatever the forward of an unknown model may raise
            raise ValueError(
                f"packed: {self.name} cannot be called with {', '.join(self.inputs)} of shape [batch, length] "
                f"({type(error).__name__}: {error}); export a text encoder, such as the one inside "
                "of it, or name other inputs"
            ) from error
        if self.expected((1, self.longest)) is None:
            self.longest -= 2  # of kinds whose positions begin with 2, and whose tables do not tell
        self.axes = {name: {0: "batch", 1: "length"} for name in self.inputs}
        for name, one, other in zip(self.outputs, long, short, strict=True):
            varying = {d: "length" for d in range(1, one.dim()) if one.shape[d] != other.shape[d]}
            self.axes[name] = {0: "batch"} | varying

    def _results(self) -> tuple[str, ...]:
        """What the outputs are called in the results of the model: the first and what belongs to it, or all."""
        given = dict(zip(self.inputs, self.example(*RECORDED), strict=True))
        result = self.copy().model(given) if self.sentences else self.copy().model(**given)
        if not isinstance(result, Mapping):
            return ()
        if self.every_output:
            return tuple(key for key, value in result.items() if isinstance(value, Tensor))
        if self.sentences:
            return tuple(key for key in _FEATURES if key in result)[: 2 if self.name == "SentenceTransformer" else 1]
        return ("start_logits", "end_logits") if "start_logits" in result else tuple(result)[:1]

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Batches and lengths to compare at, up to the longest text that the model says it takes."""
        yield from (shape for shape in (RECORDED, *_OTHERS) if shape[1] < self.longest)
        yield 1, self.longest

    def expected(
        self, shape: tuple[int, int], quantize_activations: bool = True, with_empty: bool = False
    ) -> tuple[Tensor, ...] | None:
        """What the model computes in torch; ``None`` where it refuses so long a text."""
        try:
            with torch.no_grad():
                return self.copy(quantize_activations)(*self.example(*shape, with_empty))
        except (RuntimeError, IndexError, ValueError):
            if shape[1] <= RECORDED[1]:
                raise
            return None

    def check_record(self) -> None:
        """Refuse a model whose steps, recorded at one length, are not its steps at another."""
        record = self.trace(False)
        for shape in self.shapes():
            wanted = self.expected(shape, False)
            if wanted is None:
                continue
            try:
                with torch.no_grad(), torch.jit.optimized_execution(False):
                    error = relative_error(record(*self.example(*shape)), wanted)
                problem = "" if error <= SAME else f"relative error {error:.2g}"
            except RuntimeError as failure:
                problem = str(failure).strip().splitlines()[-1]
            if problem:
                raise ValueError(
                    f"packed: {self.name} takes other steps for {shape[1]} tokens than for {RECORDED[1]} ({problem}), "
                    f"and a file takes the same for all lengths; {MEND}"
                )

    def check_replay(
        self, run: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], limit: float, with_empty: bool = False
    ) -> float:
        """The largest relative error of what `run` makes of inputs at several lengths, with and without padding.

        `with_empty` compares a batch with a sequence without a token too, if the model itself computes numbers for it.

        Raises:
            ValueError: if it is above `limit`; ``relative error ... for ... tokens``.
        """
        largest = 0.0
        for shape in self.shapes():
            wanted = self.expected(shape)
            if wanted is None:
                continue
            error = relative_error(run(self.example(*shape)), wanted)
            if not error <= limit:
                raise ValueError(f"relative error {error:.2g} for {shape[1]} tokens")
            largest = max(largest, error)
        if with_empty and any("mask" in name for name in self.inputs):
            wanted = self.expected(_OTHERS[0], with_empty=True)
            if wanted is not None and all(bool(torch.isfinite(t).all()) for t in wanted):
                error = relative_error(run(self.example(*_OTHERS[0], with_empty=True)), wanted)
                if not error <= limit:
                    raise ValueError(f"relative error {error:.2g} where a sequence has no token")
                largest = max(largest, error)
        return largest


def record_model(
    model: nn.Module, twin_of: Callable[[PackedTensor], nn.Module], inputs: Sequence[str], every_output: bool = False
) -> Recorded:
    """The steps of `model` with `twin_of` each packed layer in its place, replayed at several lengths.

    Args:
        model: packed, in float32, on the CPU, without fast forwards; it is changed.
        twin_of: what computes a packed layer in operators that a runtime has.
        inputs: names of its int64 [B, T] inputs.
        every_output: record all tensors that the model returns, not only the first and what belongs to it.

    Raises:
        ValueError: if a packed layer has no twin, or the model cannot be called with these inputs or takes other steps
            at other lengths.
    """
    check_inputs(model, inputs)
    record = Recorded(model, inputs, every_output)
    record.name_outputs()
    packed, limit = record.expected(RECORDED), record.limit
    for module in [m for m in model.modules() if isinstance(m, PackedTensor)]:
        replace_everywhere(model, module, twin_of(module))
    found = record.expected(RECORDED)
    assert packed is not None and found is not None
    error = relative_error(found, packed)
    if not error <= limit:
        raise ValueError(f"packed: {record.name} in plain operators has a relative error of {error:.2g}; {MEND}")
    record.check_record()
    return record


def check_packed(packed: Any) -> None:
    """Raises TypeError for what is no torch module, ValueError without packed layers or elsewhere than on the CPU."""
    check_module("packed", packed)
    layers = [m for m in packed.modules() if isinstance(m, PackedTensor)]
    if not layers:
        raise ValueError(f"packed: {type(packed).__name__} has no packed layer; call qbert.pack first")
    if any(layer.owner.codes.device.type != "cpu" for layer in layers):  # type: ignore[union-attr]
        raise ValueError("packed: the model is not on the CPU; move it with .to('cpu')")


def check_kind(module: PackedTensor, form: str) -> None:
    """Raises ValueError for a packed layer that is neither a table nor a linear map, and so has no `form`."""
    if not isinstance(module, PackedEmbedding) and type(module) not in (PackedLinear, PackedTransposed):
        raise ValueError(
            f"packed: {type(module).__name__} has no {form} form yet; export a model without convolutions, or "
            "quantize with {'*': ..., '<its name>': 32} to leave it in float"
        )


def check_inputs(model: nn.Module, inputs: Sequence[str]) -> None:
    """Raises ValueError for names that are not among the inputs of `model`, or are no list."""
    called = base_model(model)[1] if _is_sentence_model(model) else model
    taken = list(inspect.signature(called.forward).parameters)
    if isinstance(inputs, str):
        raise ValueError(
            f"inputs: {inputs!r} is a text, not a list of names; give a list, such as [{inputs!r}], of some of "
            f"{', '.join(taken)}"
        )
    wrong = [name for name in inputs if name not in taken]
    if wrong or not inputs:
        raise ValueError(
            f"inputs: {wrong[0] if wrong else inputs!r} is not among the inputs of {type(called).__name__}; give a "
            f"list of some of {', '.join(taken)}"
        )


def relative_error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest relative error of the outputs; infinite for other shapes or values that are not finite."""
    pairs = list(zip(found, wanted, strict=True))
    if any(a.shape != b.shape or not bool(torch.isfinite(a).all()) for a, b in pairs):
        return math.inf
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def _is_sentence_model(model: nn.Module) -> bool:
    """Whether it is one of sentence-transformers: a sequence of modules from a dict of features to another."""
    return isinstance(model, nn.Sequential) and type(model).__module__.startswith("sentence_transformers.")
