"""``qbert``: the library from a shell. Each command is one file of this folder.

    qbert quantize path-or-hub-name out --bits 4
    qbert inspect out
    qbert evaluate out --task sst2

A model is a local folder or a hub name. With ``--json`` a command prints one JSON object and nothing else on standard
output. Exit codes: 0 done, 2 something in the request cannot work (one sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import shlex
import sys

import click

from qbert.cli.allocate import allocate
from qbert.cli.arguments import run_script
from qbert.cli.compress import compress
from qbert.cli.distill import distill
from qbert.cli.evaluate import evaluate
from qbert.cli.export import export
from qbert.cli.inspect import inspect
from qbert.cli.options import Shared
from qbert.cli.plan import plan
from qbert.cli.quantize import quantize
from qbert.cli.report import report
from qbert.cli.spectrum import spectrum
from qbert.cli.wording import spoken_as_options
from qbert.version import __version__


class _InOrder(click.Group):
    """Lists the commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qbert")
def app() -> None:
    """Quantize BERT-like encoders to 2-8 bits, guided by the Hessian of the task loss.

    \b
    A fine-tuned classifier, from its float weights to a small file:
      qbert quantize my-model out --bits 4               every matrix and table in 4 bits
      qbert inspect out                                  what the folder holds
      qbert evaluate out --task sst2                     how good it is
      qbert distill my-model out --task sst2 --bits 2    fewer bits, made good by training
      qbert export out model.onnx                        for ONNX Runtime

    \b
    Bits by the Hessian:
      qbert spectrum my-model --task sst2 --save spectrum.json
      qbert allocate spectrum.json --bits 2,3 --save bits.json
      qbert quantize my-model out --config bits.json

    \b
    As small or as fast as it has to be:
      qbert plan my-model --size-mb 10 --task sst2 --save plan.json
      qbert compress my-model out --task sst2 --plan plan.json
    """


for _command in (spectrum, allocate, quantize, distill, plan, compress, evaluate, inspect, export, report):
    if _command.callback is not None:
        _command.callback = spoken_as_options(_command.callback)
    app.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line (that of the process where None) and leave with its exit code."""

    shared = Shared(shlex.join(["qbert", *(sys.argv[1:] if arguments is None else arguments)]))

    def run() -> None:
        try:
            app.main(arguments, prog_name="qbert", standalone_mode=False, obj=shared)
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except click.Abort as error:  # click turns Ctrl-C into this
            raise KeyboardInterrupt from error

    run_script(run, resume_hint=lambda: shared.hint)


if __name__ == "__main__":
    main()
