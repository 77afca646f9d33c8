"""What the library says of its arguments, in the words of the command line: options in the place of Python's names.

Alone because no command should have to know how the library puts a sentence: `qbert.cli.main` wraps them all in it.

>>> spoken_as_options(quantize.callback)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

# What only makes sense in Python -> what to do in a shell.
_MENDS = (
    (r"pass model=\.\.\.", "add --model MODEL"),
    (r"leave out resume, or give another folder", "add --anew, or name another --save"),
    (r"; give another folder, or the same model, data and settings", "; add --anew, or name another --save"),
    (
        r"; give another folder, or the same model, calibration_data and bits_config",
        "; remove its folder, or name another OUT",
    ),
    (r"remove the file, or leave --resume out", "remove its folder, or name another OUT"),
    (r"^(--resume|checkpoint|folder|path): (?=\S*[/.])", ""),
    (r"(?<=: )path: ", ""),
)
# Arguments of the library -> options that say them.
_SAID_BY = {
    "bits_config": ("config_file",),
    "calibration_data": ("texts", "task"),
    "batches": ("texts", "task"),
    "spectrum": ("spectrum",),
}


def spoken_as_options(callback: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a command, whose refusals name its options."""

    @functools.wraps(callback)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return callback(*args, **kwargs)
        except (ValueError, TypeError, ArithmeticError) as error:
            said = in_options(str(error), click.get_current_context())
            if said == str(error):
                raise
            raise ValueError(said) from error

    return call


def in_options(message: str, context: click.Context) -> str:
    """A sentence of the library with the options of the command in the place of arguments.

    ``name=value`` is an option where it was given on the command line: a value may also come from a file. A name with
    an underscore is one wherever it stands outside of quotes, and so is a name that the sentence begins with.
    """
    for pattern, mend in _MENDS:
        message = re.sub(pattern, mend, message)
    options = {p.name: _shown(p) for p in context.command.params if p.name}
    for name, said_by in _SAID_BY.items():
        found = [options[other] for other in said_by if other in options]
        if found and message.startswith(f"{name}: "):
            return f"{' or '.join(found)}{message[len(name) :]}"
    for name, shown in options.items():
        message = re.sub(rf"^{name}(?=: )", shown, message)
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            message = re.sub(rf"(?<![\w'\"-]){name}(?==\S)", shown, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w'\"-]){name}(?![\w'\"=])", shown, message)
    return message


def _shown(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    return max(parameter.opts, key=len)
