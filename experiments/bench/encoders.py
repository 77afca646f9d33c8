"""Speed of encoders whose layers are not of the BERT kind on a CPU: fused, layer by layer, and torch in float32.

Weights are random and layers few, which no ratio depends on. All run the same shapes in turn, round after round; the
smallest CPU time of the process counts. "Layer by layer" is a packed model each of whose linear maps runs by the engine
that is fastest for it, with the rest of the model as transformers wrote it.

    python experiments/bench/encoders.py --output experiments/results/encoders_cpu.md
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qbert
from qbert.cli.arguments import positive, run_script
from qbert.files import write_whole
from qbert.inference.chosen import ChosenLinear, can_choose
from qbert.results import provenance

SHAPES = ("1x16", "1x128", "8x32")
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "vocab_size": 1000}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ModernBERT-base": ("ModernBertConfig", {**_BASE, "intermediate_size": 1152, "pad_token_id": 0}),
    "MobileBERT": ("MobileBertConfig", {"vocab_size": 1000}),
    "DeBERTa-v3-base": (
        "DebertaV2Config",
        {
            **_BASE,
            "intermediate_size": 3072,
            "type_vocab_size": 0,
            "layer_norm_eps": 1e-7,
            "share_att_key": True,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
    ),
    "ViT-base": ("ViTConfig", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),
}
# The ids that ModernBERT's config wants inside of its vocabulary.
_IDS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}


def main() -> None:
    """Parse the command line, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES), help="which encoders"
    )
    parser.add_argument("--layers", type=positive, default=4, help="how many layers each has")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=8, help="of the weights")
    parser.add_argument("--rounds", type=positive, default=10, help="of which the fastest counts")
    parser.add_argument("--threads", type=positive, default=1, help="of torch")
    parser.add_argument("--output", type=Path, help="Markdown file for the table; else it is printed only")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    rows = [row for family in arguments.families for row in measure(family, arguments)]
    text = "\n".join([*HEAD, *rows, "", provenance()]) + "\n"
    if arguments.output is not None:
        write_whole(arguments.output, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(text)


HEAD = (
    "| encoder, batch x tokens | fp32, ms | layer by layer, x fp32 | fused, x fp32 | fused, x layer by layer | engine "
    "| error to the packed model |",
    "|---|---:|---:|---:|---:|---|---:|",
)


def measure(family: str, arguments: argparse.Namespace) -> list[str]:
    """The rows of one family."""
    import transformers

    torch.manual_seed(0)
    kind, settings = FAMILIES[family]
    ids = _IDS if "ModernBert" in kind else {}
    rows = []
    sizes = {"1x16": 64, "1x128": 176, "8x32": 96} if family.startswith("ViT") else {}
    made: dict[Any, tuple[Any, Any, Any, Any]] = {}
    for shape in SHAPES:
        size = sizes.get(shape)
        if size not in made:
            extra = {} if size is None else {"image_size": size}
            config = getattr(transformers, kind)(num_hidden_layers=arguments.layers, **settings, **ids, **extra)
            model = transformers.AutoModel.from_config(config).eval()
            bits = qbert.BitsConfig(arguments.bits, activation_range="asymmetric", range_method="minmax")
            packed = qbert.pack(qbert.quantize_model(model, bits))
            made[size] = (model, packed, by_layer(packed), qbert.optimize_for_inference(packed))
        model, packed, single, fused = made[size]
        batch, length = map(int, shape.split("x"))
        given = inputs(batch, length, size)
        models = {"fp32": model, "single": single, "fused": fused}
        calls = {name: partial(call, **given) for name, call in models.items()}
        with torch.inference_mode():
            expected, got = packed(**given)[0], fused(**given)[0]
            times = in_turn(calls, arguments.rounds)
        tokens = expected.shape[1]
        error = float((got - expected).norm() / expected.norm())
        ratios = (times["fp32"] / times["single"], times["fp32"] / times["fused"], times["single"] / times["fused"])
        cells = [f"{family}, {batch}x{tokens}", f"{times['fp32'] * 1e3:.1f}", *(f"{r:.1f}" for r in ratios)]
        rows.append(f"| {' | '.join([*cells, engine_of(fused, batch * tokens), f'{error:.4f}'])} |")
        print(rows[-1], flush=True)
    return rows


def by_layer(packed: Any) -> Any:
    """A copy of a packed model that runs map by map, each by its fastest engine."""
    single = copy.deepcopy(packed).requires_grad_(False)
    for module in single.modules():
        if can_choose(module):
            module._fast = ChosenLinear(module, True, "auto")
        elif hasattr(module, "prepare"):
            module.prepare()
    return single


def inputs(batch: int, length: int, size: int | None) -> dict[str, torch.Tensor]:
    """Random ids [batch, length] and their mask, or pixels [batch, 3, size, size]."""
    if size is not None:
        return {"pixel_values": torch.randn(batch, 3, size, size)}
    ids = torch.randint(5, 1000, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def engine_of(fused: Any, tokens: int) -> str:
    """The engine that a fused model takes for so many tokens."""
    forward: Any = fused.forward
    layers = getattr(forward, "layers", None) or forward.run.__self__
    return str(layers._stages[0].choice.at(tokens))


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Smallest CPU seconds of each call."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(3):
        for call in calls.values():
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # not timed: the one before left the caches to itself
            before = time.process_time()
            call()
            seconds[name] = min(seconds[name], time.process_time() - before)
    return seconds


if __name__ == "__main__":
    run_script(main)
