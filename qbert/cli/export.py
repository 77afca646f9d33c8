"""``qbert export``: a packed model for another runtime."""

from __future__ import annotations

import click

from qbert.cli.options import as_json, load_any, show


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--float-activations", is_flag=True, help="Quantize weights only; the runtime multiplies floats.")
@click.option("--inputs", default="input_ids,attention_mask", show_default=True, help="Names of the inputs.")
@as_json
def export(folder: str, out: str, float_activations: bool, inputs: str, as_json: bool) -> None:
    """Write the packed model in FOLDER as the ONNX file OUT: low-bit weights, dynamic batch and length.

    The file is checked before it is called done, and run where onnxruntime is installed.
    """
    from pathlib import Path

    import qbert

    if not out.endswith(".onnx"):
        raise ValueError(f"OUT {out} is no name of an ONNX file; let it end in .onnx")
    names = tuple(name.strip() for name in inputs.split(",") if name.strip())
    qbert.export_onnx(load_any(folder), out, inputs=names, quantize_activations=not float_activations)
    size = Path(out).stat().st_size
    show({"folder": folder, "out": out, "bytes": size}, f"{out}: {size / 1e6:.2f} MB", as_json)
