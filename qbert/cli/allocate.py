"""``qbert allocate``: bits from a saved spectrum, by rank or exactly under a budget."""

from __future__ import annotations

from typing import Any

import click

from qbert.cli.options import as_json, check_kept, check_writable, load_any, show


@click.command()
@click.argument("spectrum", type=click.Path(exists=True, dir_okay=False))
@click.option("--bits", default="2,3", show_default=True, help="Widths to choose from, such as 2,3 or 2,3,4,8.")
@click.option("--size-mb", type=float, help="Largest size of the whole model, 10^6 bytes; needs --model.")
@click.option("--average-bits", type=float, help="Largest mean bits of the measured weights; needs --model.")
@click.option("--model", help="The float model: a folder or a hub name.")
@click.option(
    "--embedding-bits",
    type=click.Choice(["2", "3", "4", "8", "32"]),
    help="Bits of the tables; default: 4 where no width is above 4, else 8.",
)
@click.option("--groups", type=click.IntRange(min=1), help="Groups of output rows a matrix; default: 128.")
@click.option("--save", type=click.Path(dir_okay=False), help="JSON file for qbert quantize --config.")
@as_json
def allocate(spectrum: str, bits: str, save: str | None, model: str | None, **asked: Any) -> None:
    """Turn SPECTRUM (a file that qbert spectrum saved) into bits for every block.

    Without a budget the blocks are ranked by |mean| + std and the upper half gets the larger of two widths, as in the
    paper; with one the predicted damage is minimised exactly.

    \b
      qbert allocate spectrum.json --bits 2,3 --save bits.json
      qbert allocate spectrum.json --bits 2,3,4,8 --size-mb 12 --model my-model
    """
    import qbert
    from qbert.hessian.spectrum import HessianSpectrum
    from qbert.results import text_table

    if save:
        check_writable("--save", save)
        check_kept("--save", save, {"SPECTRUM": spectrum, "--model": model})
    try:
        widths = tuple(int(width) for width in bits.replace(",", " ").split())
    except ValueError as error:
        raise ValueError(f"--bits {bits} are no widths; write them as 2,3 or 2,3,4,8") from error
    try:
        measured = HessianSpectrum.load(spectrum)
    except (ValueError, OSError) as error:
        raise ValueError(f"SPECTRUM {spectrum}: {error}; qbert spectrum --save writes one") from error
    loaded = load_any(model) if model else None
    settings = {"groups": asked["groups"]} if asked["groups"] else {}
    config = qbert.allocate_bits(
        measured,
        widths,
        size_mb=asked["size_mb"],
        average_bits=asked["average_bits"],
        model=loaded,
        embedding_bits=int(asked["embedding_bits"]) if asked["embedding_bits"] else None,
        **settings,
    )
    if save:
        config.save(save)
    rows = [[pattern, rule.get("bits", "")] for pattern, rule in config.rules.items()]
    lines = [text_table(["pattern", "bits"], rows)]
    if loaded is not None:
        lines += ["", str(qbert.model_size(loaded, config))]
    show(config.to_dict(), "\n".join(lines), asked["as_json"])
