"""The way of a model through the library, on a tiny encoder: what every way of installing it and every version must do.

Run as a script (``python core.py FOLDER [WHERE]``), it also checks that every room was imported from below WHERE.
"""

import importlib
import os
import sys
from pathlib import Path

ROOMS = (
    "kernels.formats",
    "kernels",
    "distill",
    "distill.recipes",
    "students",
    "allocation",
    "tasks",
    "hessian",
    "cli",
)


def imported_from() -> dict[str, Path]:
    """Room -> the folder that it was imported from."""
    modules = {name: importlib.import_module(f"qbert.{name}") for name in ROOMS}
    return {name: Path(next(iter(getattr(m, "__path__", [m.__file__])))).resolve() for name, m in modules.items()}


def use_everything(folder: str | os.PathLike[str]) -> None:
    """One Hessian product, quantize, pack, save, load, optimize; AssertionError where outputs differ.

    Args:
        folder: an empty one to save into.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import qbert
    from qbert.hessian import hessian_spectrum

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 50, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    spectrum = hessian_spectrum(model, [batch], runs=1, fraction=1.0, progress=False)
    assert spectrum.eigenvalues.shape == (1, 2)
    bits = qbert.allocate_bits(spectrum, bits=(2, 4), model=model)
    packed = qbert.pack(qbert.quantize_model(model, bits))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = packed(**inputs).logits
        packed.save_pretrained(folder)
        loaded = qbert.load(folder)
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-6)
        fast = qbert.optimize_for_inference(loaded)
        torch.testing.assert_close(fast(**inputs).logits, expected, rtol=0, atol=5e-2)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        where = Path(sys.argv[2]).resolve()
        for room, found in imported_from().items():
            assert found.is_relative_to(where), f"qbert.{room} comes from {found}, not from {where}"
    use_everything(sys.argv[1])
    print("qbert works")
