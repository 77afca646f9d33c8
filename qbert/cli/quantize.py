"""``qbert quantize``: from a float model to a folder with a packed one."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import click

from qbert.cli.options import (
    as_json,
    beside,
    check_out,
    configuration_of,
    file_megabytes,
    float_model,
    keep_record,
    load_tokenizer,
    machine_options,
    resumable,
    roundings,
    save_result,
    set_machine,
    show,
    task_options,
    unlabelled_batches,
)


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), help="Bits of the encoder's matrices; default: 4.")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False), help="JSON of a BitsConfig.")
@click.option("--scheme", type=click.Choice(["asymmetric", "symmetric", "midrise", "offset"]), help="Grid of codes.")
@click.option("--groups", type=click.IntRange(min=1), help="Row groups a matrix, a range each; default: 128.")
@click.option(
    "--embedding-bits",
    type=click.Choice(["2", "3", "4", "8", "32"]),
    help="Bits of the tables; default: 4 beside at most 4 bits, else 8.",
)
@click.option(
    "--activation-bits", type=click.Choice(["4", "6", "8", "32"]), help="Bits of the inputs of products; default: 8."
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "compensated"]),
    help="How codes are chosen; default: as --config says, or nearest.",
)
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False),
    help="Calibration text, one sentence a line; it fixes the ranges of activations, unless rounding is compensated.",
)
@task_options(required=False)
@click.option("--rows", type=click.IntRange(min=1), default=384, show_default=True, help="Calibration rows.")
@click.option("--force", is_flag=True, help="Write into OUT even if it holds something.")
@machine_options
@as_json
def quantize(model: str, out: str, **asked: Any) -> None:
    """Quantize MODEL (a folder or a hub name) and write it, packed, to the folder OUT.

    The tokenizer goes with it. Compensated rounding needs a few hundred sentences like those the model will see:
    --texts FILE, or --task NAME, whose training rows are taken without their labels. Nearest rounding needs none;
    given, they fix one range of activations a matrix (static), where every token has its own otherwise: inspect shows
    which. Interrupted, compensated rounding goes on after the last whole layer, kept in OUT.partial, by the same
    command.

    \b
      qbert quantize my-model out --bits 4
      qbert quantize my-model out --bits 2 --rounding compensated --texts sentences.txt
      qbert quantize my-model out --config bits.json
    """
    import qbert
    from qbert.sizes import model_size

    check_out(out, asked["force"], {"MODEL": model})
    set_machine(asked["device"], asked["threads"])
    config = _configuration(asked)
    loaded = float_model(model)
    own = getattr(loaded, "tokenizer", None)  # a SentenceTransformer's, with its longest row and case
    tokenizer = own or _tokenizer(model, needed=bool(asked["texts"] or asked["task"]))
    data = _calibration(asked, tokenizer, loaded)
    loaded = loaded.to(asked["device"])
    start = time.perf_counter()
    options = {"calibration_data": data, "progress": not asked["as_json"]}
    with contextlib.ExitStack() as stack:
        if data is not None and "compensated" in roundings(config):
            names = ("texts", "task", "rows", "seed")
            source = {name: asked[name] for name in names}
            work = beside(out, ".partial")
            stack.enter_context(
                resumable(work, {"command": "quantize", "model": model, "config": config.to_dict(), **source})
            )
            options["checkpoint"] = work
        packed = qbert.pack(qbert.quantize_model(loaded, config, **options)).to("cpu")
        seconds, size = time.perf_counter() - start, model_size(packed)
        save_result(packed, tokenizer, out)
    megabytes = file_megabytes(out)
    content = {
        "model": model,
        "out": out,
        "config": config.to_dict(),
        "bytes": size.total,
        "float_bytes": size.float_total,
        "file_mb": megabytes,
        "seconds": seconds,
    }
    row = {"model": out, "MB": megabytes, "float MB": size.float_total / 1e6, "seconds": seconds}
    keep_record(out, {"model": model, **asked, "config": config.to_dict()}, [row])
    written = f"{out}: {megabytes:.2f} MB in its files; look at it with: qbert inspect {out}"
    show(content, f"{size}\n\n{written}", asked["as_json"])


def _configuration(asked: dict[str, Any]) -> Any:
    from qbert.bits import BitsConfig

    names = ("scheme", "groups")
    settings = {name: asked[name] for name in names if asked[name] is not None}
    if asked["embedding_bits"]:
        settings["embedding_bits"] = int(asked["embedding_bits"])
    if asked["activation_bits"]:
        settings["activation_bits"] = None if asked["activation_bits"] == "32" else int(asked["activation_bits"])
    if asked["config_file"]:
        if asked["bits"] or settings:
            given = "bits" if asked["bits"] else next(iter(settings))
            raise ValueError(
                f"--config says all; leave out --{given.replace('_', '-')}, or write it into {asked['config_file']}"
            )
        return configuration_of(asked["config_file"], asked["rounding"])
    if asked["rounding"]:
        settings["rounding"] = asked["rounding"]
    return BitsConfig(int(asked["bits"] or 4), **settings)


def _tokenizer(model: str, needed: bool) -> Any:
    try:
        return load_tokenizer(model)
    except (ValueError, OSError):
        if needed:
            raise
        return None


def _calibration(asked: dict[str, Any], tokenizer: Any, model: Any) -> Any:
    batches = unlabelled_batches(asked, tokenizer, model)
    if batches is None and asked["rounding"] == "compensated":
        raise ValueError("--rounding compensated needs data; add --texts FILE (a sentence a line), or --task NAME")
    return batches
