"""One decorator that makes a torch operator of a function: check, fake implementation, arguments taken apart.

torch operators take plain tensors, numbers and lists of them. The functions here take `operands` (a `PackedWeight`, an
`InputGrid`) as well; a call takes them apart into their fields, field by field, and the operator puts them together
again. Nothing else does either.

An optional argument that is written to cannot be an argument of one operator: the dispatcher drops trailing arguments
that equal their defaults, and torch 2.6 to 2.11 then look for it in vain (IndexError; pytorch issue 176078). So a
function with an `out_row_sum` becomes two, `qbert::name` without it, and `qbert::name_summed` with it as the first.

    @operator(check=check_rows, like=lambda x, grid: torch.empty_like(x))
    def quantized(x: Tensor, grid: InputGrid = InputGrid()) -> Tensor: ...

    y = quantized(x, InputGrid(asymmetric=True))     # torch.ops.qbert.quantized(x, 0.0, 0, True, torch.int8, 8)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
_SUM = "out_row_sum"


def operator(check: Callable[..., None], like: Callable[..., Any]) -> Callable[[Function], Function]:
    """Registers the function as `qbert::its_name`; the result is called as the function is.

    Every argument is a tensor, a number, a dtype, a list of tensors or numbers, a NamedTuple of these, or a list of
    such NamedTuples. `check` and `like` take the function's arguments, by position, tensors possibly fake: `check` is
    called before any work, `like` returns empty tensors in the shape of the result.
    """

    def register(function: Function) -> Function:
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        names = tuple(parameters)
        kinds = tuple((name, *_kind(hints[name])) for name in names)

        def call(*arguments: Any, **options: Any) -> Any:
            given = list(arguments)
            for name in names[len(given) :]:
                if name not in options and name not in defaults:
                    raise TypeError(f"{function.__name__}() misses the argument {name!r}")
                given.append(options.pop(name) if name in options else defaults[name])
            if options or len(given) > len(names):
                raise TypeError(f"{function.__name__}() takes {', '.join(names)}, got also {', '.join(options)}")
            sums, flat = None, []
            for (name, fields, listed), value in zip(kinds, given, strict=True):
                if name == _SUM:
                    sums = value
                elif listed:
                    flat += [[getattr(one, field) for one in value] for field in fields]
                elif fields:
                    flat += list(value)
                else:
                    flat.append(value)
            return plain(*flat) if sums is None else summed(sums, *flat)

        def together(flat: tuple[Any, ...], sums: Tensor | None) -> list[Any]:
            values: list[Any] = []
            rest = iter(flat)
            for name, fields, listed in kinds:
                if name == _SUM:
                    values.append(sums)
                elif fields:
                    kind, columns = (get_args(hints[name])[0] if listed else hints[name]), islice(rest, len(fields))
                    values.append([kind(*row) for row in zip(*columns, strict=True)] if listed else kind(*columns))
                else:
                    values.append(next(rest))
            return values

        def define(name: str, schema: str, with_sums: bool) -> Any:
            def objects(flat: tuple[Any, ...]) -> list[Any]:
                values = together(flat[1:], flat[0]) if with_sums else together(flat, None)
                check(*values)
                return values

            changed = (_SUM,) if with_sums else ()
            run = torch.library.custom_op(
                f"qbert::{name}", lambda *flat: function(*objects(flat)), mutates_args=changed, schema=schema
            )
            run.register_fake(lambda *flat: like(*objects(flat)))
            return getattr(torch.ops.qbert, name)

        schema = _schema(kinds, hints)
        plain = define(function.__name__, schema, with_sums=False)
        if _SUM in names:
            added = schema.replace("(", f"(Tensor(a0!) {_SUM}, ", 1)
            summed = define(f"{function.__name__}_summed", added, with_sums=True)
        return functools.wraps(function)(call)  # type: ignore[return-value]

    return register


def _kind(hint: Any) -> tuple[tuple[str, ...], bool]:
    """Fields of a NamedTuple, or of those that a list holds, and whether it is a list."""
    listed = get_origin(hint) is list and hasattr(get_args(hint)[0], "_fields")
    return getattr(get_args(hint)[0] if listed else hint, "_fields", ()), listed


def _schema(kinds: tuple[tuple[str, tuple[str, ...], bool], ...], hints: dict[str, Any]) -> str:
    """The operator's schema without its name: fields are called `argument_field`."""
    flat = {}
    for name, fields, listed in kinds:
        if not fields:
            flat[name] = hints[name]
            continue
        of_fields = get_type_hints(get_args(hints[name])[0] if listed else hints[name])
        flat |= {f"{name}_{field}": list[of_fields[field]] if listed else of_fields[field] for field in fields}  # type: ignore[valid-type]
    flat.pop(_SUM, None)

    def shown() -> None: ...

    shown.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint) for n, hint in flat.items()],
        return_annotation=hints["return"],
    )
    return torch.library.infer_schema(shown, mutates_args=())
