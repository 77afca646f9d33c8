"""The base model of a packed encoder in OpenVINO or ONNX Runtime, behind the forward that it has in torch.

Its steps are recorded once (`qbert.runtimes`) and handed over in memory, weights in their codes. Requests for more than
the plain outputs (hidden states, attentions, embedded inputs), ids or lengths that the tables do not hold and sequences
without a token get the packed model's own forward.

    >>> run_elsewhere(model.bert, "openvino")
    >>> model(**batch).logits
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoders.copied import CopiedParameters
from qbert.inference.cpu_model import is_plain_request, tokens_before_padding
from qbert.inference.forward import FastForward, remove_fast_forwards
from qbert.runtimes.onnx import OnnxSession, onnx_twin, write_onnx
from qbert.runtimes.openvino import OpenVinoSession, openvino_model, openvino_twin
from qbert.runtimes.recorded import ALIKE, RECORDED, SAME, Recorded, record_model, relative_error

Session = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
_INTEGERS = (torch.int64, torch.int32)  # that a table is read by
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def run_elsewhere(base: Any, engine: str, zero_padding: bool = False) -> None:
    """Let `base` compute in the runtime `engine`; ValueError if it does not compute the same there.

    Args:
        base: base model with packed layers, on the CPU, in eval mode.
        engine: "openvino" or "onnxruntime", which is installed.
        zero_padding: give zeros as hidden states of padding on the right.
    """
    forward = RuntimeModel(base, engine, zero_padding)
    base.forward = forward
    base.extra_repr = forward.report


class RuntimeModel(FastForward):
    """``forward`` of a base model by another runtime (not a module: it adds nothing to the state of the model).

    Attributes:
        error: the largest relative error of its outputs beside the packed model, at several lengths, with and without
            padding.
    """

    own = ("base", "_copied")

    def __init__(self, base: Any, engine: str, zero_padding: bool) -> None:
        self.base, self.engine, self.zero_padding = base, engine, zero_padding
        self._names = list(inspect.signature(type(base).forward).parameters)[1:]
        try:
            record = _record(base, engine)
            self.inputs, self._keys = record.inputs, record.keys
            self._longest = record.longest
            self._session_of = _OPENERS[engine](record)
            self._sessions = {torch.get_num_threads(): self._session_of(torch.get_num_threads())}
            self.error = record.check_replay(self._session(), ALIKE)
        except Exception as error:  # the runtimes' own classes, which derive from nothing narrower
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise ValueError(
                f"engine={engine!r} cannot run {type(base).__name__}: {lines[0][:300]}; use engine='auto'"
            ) from error
        self._kind = type(_plain_result(base))
        self._copied = CopiedParameters({"": base})
        self.report = RuntimeReport(f"runtime: {engine} (as asked), relative error {self.error:.1e}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids and mask [B, T] to transformers' output, as the base model returns it."""
        base = self.base
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
        types = given.pop("token_type_ids", None) if "token_type_ids" in self.inputs else None
        if torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()):
            raise RuntimeError(
                f"engine={self.engine!r} computes no gradients, and parameters of {type(base).__name__} want them; "
                "call it under torch.no_grad(), or train what qbert.unpack(model) returns"
            )
        if ids is None or not self._can_run(ids, mask, types, given):
            return type(base).forward(base, *args, **kwargs)
        self._copied.check(ids.numel())
        seen = torch.ones_like(ids) if mask is None else mask.to(torch.int64)
        types = torch.zeros_like(ids) if types is None else types
        values = {"input_ids": ids.to(torch.int64), "attention_mask": seen, "token_type_ids": types.to(torch.int64)}
        dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
        found = [value.to(dtype) for value in self._session()(tuple(values[name] for name in self.inputs))]
        if self.zero_padding and mask is not None and tokens_before_padding(mask != 0) is not None:
            found[0].masked_fill_((mask == 0).unsqueeze(-1), 0.0)
        return self._kind(**dict(zip(self._keys, found, strict=True)))

    def _session(self) -> Session:
        """The session for the number of threads that torch has now."""
        threads = torch.get_num_threads()
        if threads not in self._sessions:
            self._sessions[threads] = self._session_of(threads)
        return self._sessions[threads]

    def _can_run(self, ids: Tensor, mask: Tensor | None, types: Tensor | None, given: dict[str, Any]) -> bool:
        config = self.base.config
        return (
            ids.device.type == "cpu"
            and is_plain_request(self.base, ids, mask, given.pop("inputs_embeds", None), given)
            and ids.dtype in _INTEGERS
            and ids.shape[1] <= self._longest
            and 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size
            and (mask is None or bool((mask != 0).any(1).all()))
            and (
                types is None
                or (
                    types.shape == ids.shape
                    and types.dtype in _INTEGERS
                    and 0 <= int(types.min()) <= int(types.max()) < config.type_vocab_size
                )
            )
        )


class RuntimeReport:
    """What ``print`` shows of a base model that runs elsewhere."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeReport:
        return self

    def __call__(self) -> str:
        """One line."""
        return self._text


def _record(base: nn.Module, engine: str) -> Recorded:
    """The steps of `base` with those of its inputs that a batch of texts has."""
    twins: dict[str, Callable[..., nn.Module]]
    twins = {"openvino": partial(openvino_twin, least_bits=4), "onnxruntime": onnx_twin}
    model = deepcopy(base).eval().to(torch.float32)
    remove_fast_forwards(model)
    twin_of = partial(twins[engine], quantize_activations=False)
    return record_model(model, twin_of, _inputs_of(model), every_output=True)


def _inputs_of(base: Any) -> list[str]:
    """Ids and mask, and types where leaving them out is the same as zeros."""
    names = [name for name in _INPUTS if name in inspect.signature(type(base).forward).parameters]
    if names[-1:] != ["token_type_ids"]:
        return names
    zeros = torch.zeros(RECORDED, dtype=torch.int64, device="cpu")
    with_types, without = (
        tuple(v for v in _plain_result(base, **types).values() if isinstance(v, Tensor))
        for types in ({"token_type_ids": zeros}, {})
    )
    return names if relative_error(with_types, without) <= SAME else names[:-1]


def _plain_result(base: Any, **more: Tensor) -> Any:
    ids = torch.arange(RECORDED[0] * RECORDED[1], device="cpu").view(RECORDED) % 7
    mask = torch.ones_like(ids)
    mask[-1, RECORDED[1] * 2 // 3 :] = 0
    with torch.no_grad():
        return type(base).forward(base, input_ids=ids, attention_mask=mask, **more)


def _openvino(record: Recorded) -> Callable[[int], Session]:
    model, outputs = openvino_model(record), len(record.outputs)
    return lambda threads: OpenVinoSession(outputs, model, {"INFERENCE_NUM_THREADS": threads})


def _onnxruntime(record: Recorded) -> Callable[[int], Session]:
    inputs, outputs, buffer = record.inputs, record.outputs, BytesIO()
    write_onnx(record, buffer)
    data = buffer.getvalue()
    return lambda threads: OnnxSession(inputs, outputs, data, threads)


_OPENERS = {"openvino": _openvino, "onnxruntime": _onnxruntime}
