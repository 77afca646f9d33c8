"""LSTMs and GRUs whose gate matrices are layers of their own, so that each can be quantized and packed.

`nn.LSTM` and `nn.GRU` hold their gate matrices as bare parameters; `GateRecurrence` computes the same with one linear
map for each, under the parameter's name. Those are quantized as every other linear map is. Its state dict keeps the
names of the float module as long as the gates are not packed, so that checkpoints fit both.

    >>> open_recurrent(model, {"lstm.weight_ih_l0"})    # model.lstm.weight_ih_l0 is a linear map now
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qbert.encoders.replace import replace_everywhere
from qbert.encoders.targets import join_path
from qbert.encoders.weights import gate_matrices, is_recurrent

State = tuple[Tensor, ...]  # (h,) of a GRU, (h, c) of an LSTM; each [B, H]


class GateRecurrence(nn.Module):
    """What an `nn.LSTM` or `nn.GRU` computes, step by step, with a linear map for each gate matrix.

    Takes and gives what the float module does: inputs [T, B, I] or [B, T, I] (``batch_first``), without a batch [T, I],
    or a `PackedSequence`; several layers, two directions, dropout between layers.
    """

    def __init__(self, recurrent: Any) -> None:
        super().__init__()
        self.mode: str = recurrent.mode
        self.input_size, self.hidden_size = recurrent.input_size, recurrent.hidden_size
        self.num_layers, self.bidirectional = recurrent.num_layers, recurrent.bidirectional
        self.batch_first, self.dropout, self.bias = recurrent.batch_first, recurrent.dropout, recurrent.bias
        for name, linear in gate_matrices(recurrent):
            self.add_module(name, linear)
        self.register_state_dict_post_hook(_to_parameter_names)
        self.register_load_state_dict_pre_hook(_from_parameter_names)
        self.train(recurrent.training)

    def flatten_parameters(self) -> None:
        """Nothing to flatten; models call it on the float module."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """(outputs of the last layer, last state), as `nn.LSTM` and `nn.GRU` return them."""
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input)
            output, state = self._layers(padded, lengths.to(padded.device), hx)
            packed = pack_padded_sequence(output, lengths, enforce_sorted=False)
            return packed, self._as_given(state)
        batched = input.dim() == 3
        steps = input.transpose(0, 1) if batched and self.batch_first else input
        if not batched:
            steps = steps.unsqueeze(1)
            hx = None if hx is None else tuple(h.unsqueeze(1) for h in self._states(hx))
        output, state = self._layers(steps, None, hx)
        if not batched:
            return output.squeeze(1), self._as_given(tuple(s.squeeze(1) for s in state))
        return (output.transpose(0, 1) if self.batch_first else output), self._as_given(state)

    def _states(self, hx: Any) -> State:
        return (hx,) if isinstance(hx, Tensor) else tuple(hx)

    def _as_given(self, state: State) -> Any:
        return state if self.mode == "LSTM" else state[0]

    def _layers(self, steps: Tensor, lengths: Tensor | None, hx: Any) -> tuple[Tensor, State]:
        """Outputs [T, B, D H] and last states [layers * D, B, H] each, of inputs [T, B, I]."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        kinds = 2 if self.mode == "LSTM" else 1
        zeros = steps.new_zeros(self.num_layers * len(directions), steps.shape[1], self.hidden_size)
        start = (zeros,) * kinds if hx is None else self._states(hx)
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in directions:
                state = tuple(s[len(last)] for s in start)
                output, state = self._direction(steps, lengths, state, f"l{layer}{direction}")
                outputs.append(output)
                last.append(state)
            steps = torch.cat(outputs, -1)
            if layer + 1 < self.num_layers and self.dropout:
                steps = nn.functional.dropout(steps, self.dropout, self.training)
        return steps, tuple(torch.stack([state[k] for state in last]) for k in range(kinds))

    def _direction(self, steps: Tensor, lengths: Tensor | None, state: State, suffix: str) -> tuple[Tensor, State]:
        inputs = getattr(self, f"weight_ih_{suffix}")(steps)  # all steps in one product: [T, B, gates * H]
        recurrent = getattr(self, f"weight_hh_{suffix}")
        order = range(len(steps) - 1, -1, -1) if suffix.endswith("_reverse") else range(len(steps))
        outputs: list[Tensor] = [inputs.new_empty(0)] * len(steps)
        for step in order:
            after = self._cell(inputs[step], recurrent(state[0]), state)
            if lengths is not None:  # rows that have ended, or not begun from behind, stay as they are
                inside = (step < lengths).unsqueeze(-1)
                after = tuple(torch.where(inside, new, old) for new, old in zip(after, state, strict=True))
                outputs[step] = torch.where(inside, after[0], torch.zeros_like(after[0]))
            else:
                outputs[step] = after[0]
            state = after
        return torch.stack(outputs), state

    def _cell(self, of_input: Tensor, of_state: Tensor, state: State) -> State:
        if self.mode == "LSTM":
            i, f, g, o = (of_input + of_state).chunk(4, -1)
            cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(cell), cell
        (r, z, n), (hr, hz, hn) = of_input.chunk(3, -1), of_state.chunk(3, -1)
        new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
        update = torch.sigmoid(z + hz)
        return ((1 - update) * new + update * state[0],)

    def extra_repr(self) -> str:
        """Shown in the module tree."""
        directions = ", bidirectional" if self.bidirectional else ""
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, layers={self.num_layers}{directions}"


def open_recurrent(model: nn.Module, paths: Collection[str]) -> None:
    """Put a `GateRecurrence` in the place of every LSTM and GRU one of whose gate matrices is among `paths`."""
    for path, module in list(model.named_modules()):
        inside = (join_path(path, name) for name, _ in _gates(module))
        if any(gate in paths for gate in inside):
            replace_everywhere(model, module, GateRecurrence(module))


class StepMasks:
    """Which rows of the inputs of gate matrices are no padding, while a model runs batch after batch.

    A gate matrix sees all steps [T, B, I] in one call, or the states [B, H] of one step after the other, and no
    attention mask has that shape. The lengths of a `PackedSequence` count; without them the attention mask does.

    Attributes:
        mask: attention mask [B, T] of the batch under way, or None; whoever runs the batches sets it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        self._owner: dict[nn.Module, GateRecurrence] = {}
        self._reverse: dict[nn.Module, bool] = {}
        self._real: dict[GateRecurrence, Tensor | None] = {}
        self._steps: dict[nn.Module, int] = {}
        self._handles = []
        for recurrence in [m for m in model.modules() if isinstance(m, GateRecurrence)]:
            self._handles.append(recurrence.register_forward_pre_hook(self._begin))
            for name, gate in recurrence.named_children():
                self._owner[gate], self._reverse[gate] = recurrence, name.endswith("_reverse")

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._owner

    def of(self, gate: nn.Module, x: Tensor) -> Tensor | None:
        """The mask of the rows of one call's input (or output) `x`, to be asked once a call; None if all count."""
        real = self._real.get(self._owner[gate])
        if x.dim() == 3:
            return real
        step = self._steps[gate] = self._steps.get(gate, -1) + 1
        if real is None:
            return None
        return real[len(real) - 1 - step if self._reverse[gate] else step]

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        recurrence: Any = module
        for gate in recurrence.children():
            self._steps.pop(gate, None)
        self._real[recurrence] = self._real_steps(recurrence, args[0])

    def _real_steps(self, recurrence: GateRecurrence, input: Any) -> Tensor | None:
        if isinstance(input, PackedSequence):
            lengths = pad_packed_sequence(input)[1]
            steps = torch.arange(int(lengths.max())).unsqueeze(1) < lengths  # [T, B]
            return steps.to(input.data.device)
        mask = self.mask
        if mask is None or mask.dim() != 2 or input.dim() != 3:
            return None
        steps = mask.bool().t()
        shape = input.shape[1::-1] if recurrence.batch_first else input.shape[:2]
        return steps.to(input.device) if steps.shape == shape else None


def _gates(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return list(gate_matrices(module)) if is_recurrent(module) else []


_GATE = re.compile(r"weight_([ih]h_l\d+(?:_reverse)?)\.(weight|bias)$")


def _to_parameter_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        match = _GATE.fullmatch(key[len(prefix) :])
        if match and not hasattr(module.get_submodule(f"weight_{match[1]}"), "codes"):  # packed: no float module's
            state[f"{prefix}{match[2]}_{match[1]}"] = state.pop(key)


def _from_parameter_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, _child in module.named_children():
        suffix = name.removeprefix("weight_")
        for leaf in ("weight", "bias"):
            key = f"{prefix}{leaf}_{suffix}"
            if isinstance(state.get(key), Tensor):
                state[f"{prefix}{name}.{leaf}"] = state.pop(key)
