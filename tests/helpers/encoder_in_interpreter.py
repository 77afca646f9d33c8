"""Whole fused encoders on the Triton kernels in Triton's interpreter, against the kernels' slow twins.

Run by `kernels/test_interpreted.py` in a process of its own, with TRITON_INTERPRET=1.
"""

import interpreted_asm  # noqa: F401  the interpreter cannot run inline assembly by itself
import pytest
from encoders import build, inputs_for
from transformers import AutoModel

import qbert
from qbert.inference.gpu import GpuEncoder
from qbert.kernels import dispatch
from qbert.packing import pack

BITS = {"encoder.layer.0.attention.self.query": 2, "encoder.layer.0.attention.self.key": 4, "embeddings": 4, "*": 3}


@pytest.mark.parametrize(
    ("family", "ranges", "operands"),
    [
        ("bert", "dynamic", "int8"),
        ("electra", "static", "int8"),
        ("bert", "asymmetric", "int8"),
        ("roberta", "mixed", "int8"),
        ("bert", "dynamic", "e4m3"),
        ("electra", "static", "e4m3"),
    ],
)
def test_the_kernels_of_a_fused_encoder_work_together(family, ranges, operands, monkeypatch):
    model = AutoModel.from_config(build(family).config).eval()
    kind = "asymmetric" if ranges == "mixed" else ranges
    # "mixed": the kernels with a static int8 output between those with offsets.
    rules = BITS | ({"*.output.dense": {"bits": 4, "activation_range": "static"}} if ranges == "mixed" else {})
    data = [inputs_for(family, 4, 12)] if ranges in ("static", "mixed") else None
    config = qbert.BitsConfig(rules, activation_range=kind)
    packed = pack(qbert.quantize_model(model, config, calibration_data=data))
    batch = inputs_for(family, 2, 7)
    packed.forward = GpuEncoder(packed, operands=operands)
    expected = packed(**batch)[0]
    used = []
    monkeypatch.setattr(dispatch, "implementation", lambda device: used.append(device) or "triton")
    got = packed(**batch)[0]
    # Per token range: products q, k, v | attention | quantize | output | norm | in | quantize | out | norm.
    assert len(used) == 1 + 2 * (7 if data else 9) + (family == "electra")
    keep = batch["attention_mask"].bool()
    assert float((got - expected)[keep].norm() / expected[keep].norm()) < 0.01
    assert bool((got[~keep] == 0).all())
