"""``qbert export``: a packed model for another runtime."""

from __future__ import annotations

import click

from qbert.cli.options import as_json, check_packed, check_writable, load_any, show

_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--to",
    "runtime",
    type=click.Choice(list(_SUFFIXES)),
    help="Whose file OUT is; default: by its name, .onnx or .xml (OpenVINO, with a .bin beside it).",
)
@click.option("--float-activations", is_flag=True, help="Quantize weights only; the runtime multiplies in its own way.")
@click.option("--inputs", default="input_ids,attention_mask", show_default=True, help="Names of the inputs.")
@as_json
def export(folder: str, out: str, runtime: str | None, float_activations: bool, inputs: str, as_json: bool) -> None:
    """Write the packed model in FOLDER as the file OUT of another runtime: low-bit weights, dynamic batch and length.

    The file is checked before it is called done: run by OpenVINO, or, an ONNX file, where onnxruntime is installed.
    """
    from pathlib import Path

    import qbert

    named = next((name for name, suffix in _SUFFIXES.items() if out.endswith(suffix)), None)
    if runtime is None and named is None:
        raise ValueError(f"OUT {out} is no name of an ONNX or OpenVINO file; let it end in .onnx or .xml")
    if runtime is not None and named != runtime:
        raise ValueError(f"OUT {out} is no name for --to {runtime}; let it end in {_SUFFIXES[runtime]}")
    check_writable("OUT", out)
    names = tuple(name.strip() for name in inputs.split(",") if name.strip())
    packed, said = load_any(folder), {}
    check_packed("FOLDER", folder, packed)
    if named == "openvino":
        report = qbert.export_openvino(packed, out, inputs=names, quantize_activations=not float_activations)
        size, said = report.nbytes, {"error": report.error, "error_by_default": report.error_by_default}
    else:
        qbert.export_onnx(packed, out, inputs=names, quantize_activations=not float_activations)
        size = Path(out).stat().st_size
    text = f"{out}: {size / 1e6:.2f} MB"
    if said:
        text += (
            f", relative error beside the packed model {said['error']:.2g} in float32, "
            f"{said['error_by_default']:.2g} with OpenVINO's settings for this machine"
        )
    show({"folder": folder, "out": out, "bytes": size, **said}, text, as_json)
