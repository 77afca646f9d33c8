"""``qbert inspect``: what a quantized folder holds, read from its files without building or running the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qbert.cli.options import as_json, show

_PACKED = ("codes", "scale", "zero", "input_scale", "input_zero")


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--tensors", is_flag=True, help="List every tensor, not only the sums.")
@as_json
def inspect(folder: str, tensors: bool, as_json: bool) -> None:
    """Tell what a quantized FOLDER holds: class, bits, grids, bytes, and whether the files are those that were saved.

    Activations are the bits of a product's inputs; their range is static (fixed on calibration text), or that of each
    token, asymmetric or around zero (dynamic).

    Reads config.json and the safetensors files; nothing is unpacked and no model is built.
    """
    content = folder_content(Path(folder))
    show(content, _text(content, tensors), as_json)


def folder_content(folder: Path) -> dict[str, Any]:
    """What the files of a quantized model say, as JSON values.

    Returns:
        ``architecture``, ``form`` ("packed" or "trainable"), ``format_version``, ``grids`` (one entry a layout: bits,
        scheme, groups, rounding, activation_bits, tensors, values, bytes), ``float`` (tensors, values and bytes that
        are stored in 16 bits or more), ``tensors`` (name -> dtype, shape, bytes, layout), ``file_bytes``.

    Raises:
        ValueError: the folder holds no quantized model, or its files are not those that were saved.
    """
    from safetensors import safe_open

    from qbert.saving.folder import check_folder
    from qbert.saving.records import METHOD, check_index, configuration

    values = configuration(folder)
    record = values.get("quantization_config")
    if not isinstance(record, dict) or record.get("quant_method") != METHOD:
        raise ValueError(f"FOLDER {folder} holds no quantized model; make one with: qbert quantize MODEL OUT")
    check_index(folder, record.get("weights"))
    files = _files(folder, record)
    check_folder(files, record)
    stored: dict[str, dict[str, Any]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                stored[name] = {"dtype": dtype, "shape": shape, "bytes": _bytes(dtype, shape)}
    grids = {
        label: {**{k: v for k, v in spec.items() if v is not None}, "tensors": 0, "values": 0, "bytes": 0}
        for label, spec in record["specs"].items()
    }
    rest = {"tensors": 0, "values": 0, "bytes": 0}
    labels = _labels(stored, record)
    for name, tensor in stored.items():
        label = labels.get(name)
        tensor["layout"] = label
        entry = rest if label is None else grids[label]
        entry["bytes"] += tensor["bytes"]
        if label is None or name.endswith((".codes", ".weight")):
            entry["tensors"] += 1
            entry["values"] += _values(tensor, entry)
    return {
        "folder": str(folder),
        "architecture": (values.get("architectures") or ["?"])[0],
        "form": record.get("form", "packed"),
        "format_version": record["format_version"],
        "grids": grids,
        "tied": record["tied"],
        "float": rest,
        "tensors": stored,
        "file_bytes": sum(file.stat().st_size for file in files),
    }


def _files(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    from qbert.files import read_json

    named = folder / (record.get("weights") or "model.safetensors")
    if named.name.endswith(".index.json"):
        return [folder / name for name in sorted(set(read_json(named)["weight_map"].values()))]
    if not named.is_file():
        raise ValueError(f"FOLDER {folder} has no {named.name}; copy or download the folder again")
    return [named]


def _labels(stored: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Name in the files -> label of its layout, for what belongs to a quantized tensor."""
    found: dict[str, str] = {}
    parts = _PACKED if record.get("form", "packed") == "packed" else ("weight",)
    by_end: dict[str, list[str]] = {}
    for name in stored:
        by_end.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    for module, label in record["tensors"].items():
        for part in parts:
            wanted = f"{module}.{part}"
            for name in by_end.get(part, ()):
                if name == wanted or name.endswith("." + wanted):
                    found[name] = label
    return found


def _bytes(dtype: str, shape: list[int]) -> int:
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    return math.prod(shape) * widths.get(dtype, 1)


def _values(tensor: Mapping[str, Any], grid: Mapping[str, Any]) -> int:
    """Number of weights of a stored tensor: a packed code takes its bits, that of a 2:4 matrix bits / 2 + .75."""
    size = math.prod(tensor["shape"])
    bits = grid["bits"] / 2 + 0.75 if grid.get("sparsity") else grid.get("bits")
    return int(size * 8 / bits) if tensor["dtype"] == "U8" and bits else size


def _range(grid: Mapping[str, Any]) -> str:
    """How the range of a product's inputs is found, in the words of `BitsConfig`; tables and float inputs have none."""
    return str(grid.get("activation_range") or "") if grid.get("activation_bits") else ""


def _text(content: Mapping[str, Any], tensors: bool) -> str:
    from qbert.results import text_table

    header = ["layout", "bits", "grid", "groups", "rounding", "activations", "range", "tensors", "values", "MB"]
    rows = [
        [
            label,
            grid["bits"],
            grid.get("scheme", "asymmetric") + (f", {grid['sparsity']}" if "sparsity" in grid else ""),
            grid.get("groups", "auto"),
            grid.get("rounding", "nearest"),
            grid.get("activation_bits") or "float",
            _range(grid),
            grid["tensors"],
            f"{grid['values']:,}",
            f"{grid['bytes'] / 1e6:.2f}",
        ]
        for label, grid in content["grids"].items()
    ]
    rest = content["float"]
    rows.append(["float", "", "", "", "", "", "", rest["tensors"], f"{rest['values']:,}", f"{rest['bytes'] / 1e6:.2f}"])
    lines = [
        f"{content['folder']}: {content['architecture']}, {content['form']}, format {content['format_version']}, "
        f"{content['file_bytes'] / 1e6:.2f} MB in its files, digests right",
        "",
        text_table(header, rows),
    ]
    if tensors:
        listed = [
            [name, t["layout"] or "float", t["dtype"], "x".join(map(str, t["shape"])), f"{t['bytes']:,}"]
            for name, t in content["tensors"].items()
        ]
        lines += ["", text_table(["tensor", "layout", "dtype", "shape", "bytes"], listed)]
    return "\n".join(lines)
