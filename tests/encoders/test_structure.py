"""Layers of other widths, in factors, or applied several times: they load as they were saved."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import build, inputs_for, outputs, same_state
from torch import nn

import qbert
from qbert.encoders.factors import corrected, factored
from qbert.encoders.parts import LayerParts
from qbert.encoders.replace import replace_everywhere
from qbert.encoders.sharing import SharedLayers, share, uses
from qbert.encoders.structure import STRUCTURE, changes, record
from qbert.encoders.targets import encoder_layers
from qbert.encoders.widths import keep, layer_widths
from qbert.students.depth import student_with_layers


def with_other_widths() -> Any:
    model = build("bert").eval()
    keep(model, {0: ([0, 1, 3], range(50)), 1: ([2], range(20, 70))})
    return model


def with_factors() -> Any:
    torch.manual_seed(0)
    model = build("bert").eval()
    query, ffn = "encoder.layer.0.attention.self.query", "encoder.layer.1.intermediate.dense"
    replace_everywhere(model, model.bert.get_submodule(query), factored(model.bert.get_submodule(query), 8))
    up = 0.1 * torch.randn(96, 4)
    replace_everywhere(model, model.bert.get_submodule(ffn), corrected(model.bert.get_submodule(ffn), 4, up=up))
    record(model, "factors", ranks={query: 8}, corrections={ffn: 4})
    return model


def with_shared_layers() -> Any:
    model = build("bert", num_hidden_layers=4).eval()
    share(model, [0, 2, 2, 3])
    return model


CHANGED = {"widths": with_other_widths, "factors": with_factors, "sharing": with_shared_layers}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_model_loads_in_every_form(change: str, tmp_path: Path) -> None:
    model = CHANGED[change]()
    student = qbert.quantize_model(model, 4)
    packed = qbert.pack(student)
    batch = inputs_for("bert")
    for form, saved in (("float", model), ("trainable", student), ("packed", packed)):
        saved.save_pretrained(tmp_path / form)
        for load in (qbert.load, type(model).from_pretrained):
            loaded = load(tmp_path / form).eval()
            assert same_state(loaded, saved) and torch.equal(outputs(loaded, batch), outputs(saved, batch)), form
    fast = qbert.optimize_for_inference(packed)
    torch.testing.assert_close(outputs(fast, batch), outputs(packed, batch), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs(qbert.unpack(packed), batch), outputs(packed, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", CHANGED)
def test_another_head_and_the_bare_encoder_find_the_changed_layers(change: str, tmp_path: Path) -> None:
    model = CHANGED[change]()
    model.save_pretrained(tmp_path)
    ids = inputs_for("bert")
    bare = transformers.AutoModel.from_pretrained(tmp_path).eval()
    other = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.bert(**ids).last_hidden_state
        assert torch.equal(bare(**ids).last_hidden_state, expected)
        assert torch.equal(other.bert(**ids).last_hidden_state, expected)


def test_without_qbert_a_changed_model_is_an_error_and_never_random(tmp_path: Path) -> None:
    with_factors().save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForSequenceClassification as A; A.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode and "import_qbert" in done.stderr


def test_one_width_of_all_layers_needs_no_record(tmp_path: Path) -> None:
    model = build("bert").eval()
    keep(model, {0: (range(4), range(40)), 1: (range(4), range(56, 96))})
    assert model.config.intermediate_size == 40 and not changes(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    batch = inputs_for("bert")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), batch), outputs(model, batch))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_what_is_kept_computes_as_before_where_the_rest_gave_nothing(family: str) -> None:
    """Columns and heads whose outputs are not read can go without a trace."""
    model = build(family).eval()
    layer = encoder_layers(model)[0][1]
    parts = LayerParts.of(layer)
    assert parts is not None
    with torch.no_grad():
        parts.ffn_out.weight[:, 30:] = 0
        parts.attention_output.weight[:, 12:24] = 0  # head 1 of four
    batch = inputs_for(family)
    before = outputs(model, batch)
    keep(model, {0: ([0, 2, 3], range(30))})
    assert layer_widths(layer) == (3, 30)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-5, atol=1e-6)


def test_a_shared_list_holds_each_layer_once() -> None:
    model = with_shared_layers()
    layers = model.bert.encoder.layer
    assert isinstance(layers, SharedLayers) and len(layers) == 4 and layers[1] is layers[2]
    assert [name for name, _ in encoder_layers(model)] == [f"encoder.layer.{i}" for i in range(3)]
    assert layers[:2] == [layers[0], layers[1]] and list(layers)[3] is layers[3]
    keys = [key for key in model.state_dict() if ".layer." in key]
    assert len({key.split(".layer.")[1].split(".")[0] for key in keys}) == 3
    assert {uses(model)[m] for m in layers[1].modules()} == {2} and layers[0] not in uses(model)


def test_sharing_by_assignment_cannot_be_saved_by_transformers(tmp_path: Path) -> None:
    """Why there is a list of our own."""
    model = build("bert", num_hidden_layers=4)
    model.bert.encoder.layer[2] = model.bert.encoder.layer[1]
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path)


def test_transformers_alone_does_not_load_another_width(tmp_path: Path) -> None:
    """Why widths are recorded: what transformers saves of such a layer it cannot load."""
    model = build("bert")
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = nn.Linear(48, 40), nn.Linear(40, 48)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path)


def test_transformers_prunes_no_heads_itself() -> None:
    """Why heads are pruned here; once this fails, theirs can be looked at."""
    model = build("bert")
    assert not hasattr(model, "prune_heads") and "head_mask" not in str(model.bert.forward.__annotations__)


@pytest.mark.parametrize("change", CHANGED)
def test_kept_layers_of_a_changed_teacher_load(change: str, tmp_path: Path) -> None:
    teacher = CHANGED[change]()
    student = student_with_layers(teacher, [-1, 0])
    student.save_pretrained(tmp_path)
    batch = inputs_for("bert")
    assert torch.equal(outputs(type(student).from_pretrained(tmp_path).eval(), batch), outputs(student, batch))


def widths_of_another_model(config: Any) -> None:
    getattr(config, STRUCTURE)[0]["layers"] = {"encoder.layer.7": [1, 1]}


def an_unknown_change(config: Any) -> None:
    getattr(config, STRUCTURE)[0]["change"] = "folding"


@pytest.mark.parametrize(
    ("damage", "message"), [(widths_of_another_model, "does not fit BertModel"), (an_unknown_change, "'folding'")]
)
def test_a_structure_that_does_not_fit_is_refused(damage: Callable[[Any], None], message: str) -> None:
    config = with_other_widths().config
    damage(config)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForSequenceClassification.from_config(config)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        share(build("bert"), [0, 1, 1])
    with pytest.raises(ValueError, match="no layer 2"):
        share(build("bert"), [0, 2])
