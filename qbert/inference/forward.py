"""Forwards that `qbert.optimize_for_inference` puts in the place of a module's own, and how they are taken out again.

Such a forward is an attribute of the instance, not a module, so that it adds nothing to the state of the model: what
is saved, moved and listed stays as it was. It computes from weights that it prepared, never from those of the modules
around it; so a model whose weights change must lose it (`remove_fast_forwards`).

    >>> encoder.forward = FusedEncoder(encoder)
    >>> remove_fast_forwards(model)                    # encoder.forward is the one of its class again
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

Forward = TypeVar("Forward", bound="FastForward")
_FROZEN, _LOAD_HOOK = "_frozen_for_inference", "_refuses_to_load"


def is_recording() -> bool:
    """Whether the operators of this call are recorded for other inputs, by torch.compile, torch.export or a trace.

    A fast path looks at the values of its inputs, which a record would take for those of all inputs.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class FastForward:
    """Base of the forwards of fused modules, on CPUs and GPUs.

    Attributes:
        own: names of the attributes that a copy of the model has to copy with it, its module first.
        shares_the_rest: what else was prepared is never written to, and shared by all copies; otherwise a copy has
            none of it, and prepares its own.
    """

    own: ClassVar[tuple[str, ...]] = ()
    shares_the_rest: ClassVar[bool] = True

    def __deepcopy__(self: Forward, memo: dict[int, Any]) -> Forward:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        if self.shares_the_rest:
            twin.__dict__.update(self.__dict__)
        for name in self.own:
            setattr(twin, name, deepcopy(getattr(self, name), memo))
        return twin

    @property
    def __code__(self) -> Any:
        """That of the forward it stands for, which torch.export looks up."""
        return type(getattr(self, self.own[0])).forward.__code__

    def __getstate__(self) -> Any:
        raise TypeError(
            "a model that was optimized for inference cannot be pickled: its operands are laid out for this "
            "machine; send or save the packed model and call qbert.optimize_for_inference where it runs"
        )


def freeze(base: nn.Module) -> None:
    """Let no parameter of `base` want a gradient, and note which ones did."""
    wanted = tuple(name for name, parameter in base.named_parameters() if parameter.requires_grad)
    base.requires_grad_(False)
    setattr(base, _FROZEN, getattr(base, _FROZEN, ()) + wanted)


def refuse_to_load(module: nn.Module) -> None:
    """Let `module`, from whose weights operands were prepared, take no others until `remove_fast_forwards`."""
    if _LOAD_HOOK not in module.__dict__:
        module.__dict__[_LOAD_HOOK] = module.register_load_state_dict_pre_hook(_refuse)


def _refuse(module: nn.Module, *_: Any) -> None:
    raise RuntimeError(
        "load_state_dict: this model was optimized for inference and computes from copies of its weights, which would "
        "stay the old ones; load the weights into the packed model and call qbert.optimize_for_inference on it"
    )


@contextmanager
def unchanged_by_failure(model: nn.Module) -> Iterator[None]:
    """If what is inside raises, the modules of `model` get their forwards, operands, modes and gradients back."""
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        remove_fast_forwards(model)
        for module, attributes in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            if module.__dict__.pop(_LOAD_HOOK, None) is not None:
                refuse_to_load(module)
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
        raise


def remove_fast_forwards(model: nn.Module) -> None:
    """Give every module inside of `model` the forward of its class back, where one of qbert's had taken its place.

    Parameters that `freeze` froze want gradients again, operands that single layers prepared are dropped, and weights
    may be loaded again.
    """
    for module in model.modules():
        frozen = set(module.__dict__.pop(_FROZEN, ()))
        for name, parameter in module.named_parameters() if frozen else ():
            if name in frozen:
                parameter.requires_grad_()
        if _is_ours(module.__dict__.get("forward")):
            del module.forward
            module.__dict__.pop("extra_repr", None)
        if _LOAD_HOOK in module.__dict__:
            module.__dict__.pop(_LOAD_HOOK).remove()
            if "_fast" in module.__dict__:
                module._fast = None  # type: ignore[assignment]


def reason_not_to_replace(modules: Iterable[nn.Module]) -> str:
    """Why some of `modules` may compute something else than transformers' class of that name; empty if none may."""
    for module in modules:
        if not type(module).__module__.startswith(("transformers.", "torch.nn.")):
            return f"{type(module).__name__} of {type(module).__module__} is not a class of transformers"
        forward = module.__dict__.get("forward")
        if forward is not None and not _is_ours(forward):
            return f"the forward of its {type(module).__name__} was replaced"
    return ""


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, FastForward)
