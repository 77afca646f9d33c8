"""`quantize_model` with compensated rounding: what it collects, what it changes, and what becomes of its codes."""

import copy
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import distiller, rows
from encoders import FAMILIES, build, inputs_for
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import qbert
from qbert.calibration import input_moments, mean_logits
from qbert.encoders.inputs import unmasked
from qbert.encoders.targets import find_targets
from qbert.layers.kind import TrainableLayer
from qbert.layers.linear import QuantLinear
from qbert.layers.quantizer import WeightQuantizer
from qbert.layers.recurrent import GateRecurrence
from qbert.tasks import load_task
from qbert.tasks.embedded import embedded_encoder

COMPENSATED = {"rounding": "compensated"}


def batches(family: str, count: int = 3) -> list[dict[str, Tensor]]:
    # Differences of length, since what is padding differs by batch.
    return [inputs_for(family, batch=6, length=9 + i) for i in range(count)]


def linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def moments_of(model: nn.Module, data: list[dict[str, Tensor]], modules: list[nn.Linear]) -> dict[nn.Module, Tensor]:
    return {m: found.value for shared, found in input_moments(model, data, modules) for m in shared}


@pytest.mark.filterwarnings("ignore:calibration_data")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rounded_and_the_original_left_alone(family: str) -> None:
    model, data = build(family), batches(family)
    before = copy.deepcopy(model.state_dict())
    student = qbert.quantize_model(model, qbert.BitsConfig(2, **COMPENSATED), calibration_data=data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert student.training and all(m.training for m in student.modules() if isinstance(m, (QuantLinear, nn.Dropout)))
    plain = qbert.quantize_model(model, qbert.BitsConfig(2))
    assert list(linears(student)) == list(linears(plain))
    changed = 0
    for name, layer in linears(student).items():
        assert torch.equal(layer.weight, layer.quantized_weight()), name  # trains from the middle of every code
        changed += int(not torch.equal(layer.quantized_weight(), linears(plain)[name].quantized_weight()))
    assert changed == len(linears(student))


def test_moments_are_those_of_the_inputs_without_padding() -> None:
    model = build("bert").eval()
    data = batches("bert")
    layer = model.bert.encoder.layer[1]
    wanted = [layer.attention.self.query, layer.output.dense]
    seen: dict[nn.Module, list[Tensor]] = {m: [] for m in wanted}
    for batch in data:
        mask = batch["attention_mask"].bool()
        handles = [m.register_forward_pre_hook(lambda m, a, k=mask: seen[m].append(a[0][k].double())) for m in wanted]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    found = moments_of(model, data, wanted)
    for module, inputs in seen.items():
        x = torch.cat(inputs)
        assert torch.allclose(found[module], x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_a_matrix_sees_what_the_rounded_ones_before_it_make_of_the_batches() -> None:
    model, data = build("bert").eval(), batches("bert")
    first, last = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[1].output.dense
    alone = moments_of(model, data, [last])[last]
    for shared, moment in input_moments(model, data, [first, last]):
        if shared == [first]:
            first.weight.data.mul_(0.5)
        else:
            assert shared == [last] and not torch.allclose(moment.value, alone, rtol=0.01)
            assert torch.allclose(moment.value, moments_of(model, data, [last])[last], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_change_no_moment(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(family).eval(), batches(family, 2)
    modules = [m for n, m in model.named_modules() if type(m) is nn.Linear and "layer" in n]
    kept = moments_of(model, data, modules)
    monkeypatch.setattr("qbert.encoders.prefix.LayerCache._called_once_each", lambda self: False)
    for module, moment in moments_of(model, data, modules).items():
        assert torch.allclose(kept[module], moment, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("leading", [(4,), (2, 2)])
def test_padding_of_rows_and_of_pairs_that_are_encoded_apart(leading: tuple[int, ...]) -> None:
    mask = torch.tensor([1, 1, 0]).expand(*leading, 3)
    x = torch.randn(4, 3, 5)
    assert torch.equal(unmasked(x, mask), x[:, :2].reshape(8, 5))
    assert torch.equal(unmasked(x.reshape(12, 5), mask), x[:, :2].reshape(8, 5))
    assert unmasked(x, None) is x


@pytest.mark.parametrize(("bits", "scheme"), [(2, "asymmetric"), (3, "offset"), (4, "midrise"), (8, "symmetric")])
def test_codes_survive_packing_and_saving(bits: int, scheme: Any, tmp_path: Any) -> None:
    model = build("bert").eval()
    config = qbert.BitsConfig(bits, scheme=scheme, groups=16, **COMPENSATED)
    student = qbert.quantize_model(model, config, calibration_data=batches("bert"))
    packed = qbert.pack(student)
    assert qbert.model_size(packed).total == qbert.model_size(model, config).total
    packed.save_pretrained(tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed")
    trainable = qbert.unpack(loaded)
    for name, layer in linears(student).items():
        for other in (packed, loaded, trainable):
            assert torch.equal(other.get_submodule(name).quantized_weight(), layer.quantized_weight()), name
    batch = inputs_for("bert")
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, student(**batch).logits, atol=1e-5)


def test_mixed_configurations_and_their_json(tmp_path: Any) -> None:
    config = qbert.BitsConfig(
        {"encoder.layer.0": {"bits": 2, "input_group_size": 12}, "*.query": {"bits": 4, "rounding": "nearest"}, "*": 3},
        damping=0.05,
        column_order="given",
        refits=1,
        **COMPENSATED,
    )
    config.save(tmp_path / "bits.json")
    assert qbert.BitsConfig.load(tmp_path / "bits.json") == config
    model = build("bert").eval()
    student = qbert.quantize_model(model, str(tmp_path / "bits.json"), calibration_data=batches("bert"))
    specs = {n: m.weight_quantizer.spec for n, m in linears(student).items()}
    assert {s.bits for s in specs.values()} == {2, 3, 4}
    assert all((s.rounding == "nearest") == n.endswith("1.attention.self.query") for n, s in specs.items())
    # Those that are rounded to nearest train from their own float weights.
    query = "bert.encoder.layer.1.attention.self.query"
    assert torch.equal(student.get_submodule(query).weight, model.get_submodule(query).weight)


def test_settings_of_nearest_rounding_stay_out_of_the_record() -> None:
    from qbert.bits import spec_to_dict

    assert "rounding" not in spec_to_dict(qbert.TensorSpec()) and "damping" not in spec_to_dict(qbert.TensorSpec())
    assert spec_to_dict(qbert.TensorSpec(rounding="compensated"))["rounding"] == "compensated"


def test_two_modules_with_one_weight_share_codes_for_the_inputs_of_both() -> None:
    model = build("bert").eval()
    first, second = (layer.attention.self.query for layer in model.bert.encoder.layer)
    second.weight = first.weight
    student = qbert.quantize_model(model, qbert.BitsConfig(2, **COMPENSATED), calibration_data=batches("bert"))
    one, two = (layer.attention.self.query for layer in student.bert.encoder.layer)
    assert one.weight is two.weight and torch.equal(one.quantized_weight(), two.quantized_weight())
    found = [(len(s), m.inputs) for s, m in input_moments(model, batches("bert"), [first, second])]
    single = [m.inputs for _, m in input_moments(model, batches("bert"), [first])]
    assert found == [(2, 2 * single[0])]


def test_a_head_tied_to_a_table_is_rounded_as_the_table_is() -> None:
    small = BertConfig(vocab_size=100, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96)
    model = BertForMaskedLM(small).eval()
    config = qbert.BitsConfig({"embeddings": 4, "cls.predictions.decoder": 4, "*": 2}, **COMPENSATED)
    student = qbert.quantize_model(model, config, calibration_data=batches("bert"))
    table, head = student.bert.embeddings.word_embeddings, student.cls.predictions.decoder
    assert table.weight is head.weight and torch.equal(table.quantized_weight(), head.quantized_weight())
    assert torch.equal(table.weight, model.bert.embeddings.word_embeddings.weight)


def test_distillation_starts_from_the_compensated_codes(tmp_path: Any) -> None:
    config = qbert.BitsConfig(2, groups=16, **COMPENSATED)
    student = qbert.quantize_model(build("bert").eval(), config, calibration_data=batches("bert"))
    before = {n: m.weight_quantizer.codes(m.weight) for n, m in linears(student).items()}
    for layer in linears(student).values():
        layer.weight_quantizer.change_bits(2, layer.weight)  # as a stage with the same bits does
    trainer = distiller(tmp_path, student=student, max_steps=2, learning_rate=1e-12)
    trainer.train()
    for name, layer in linears(trainer.student).items():
        assert torch.equal(layer.weight_quantizer.codes(layer.weight), before[name]), name
    layer.weight_quantizer.change_bits(4, layer.weight)
    assert layer.weight_quantizer.spec.rounding == "nearest"


def test_a_student_starts_as_far_from_its_teacher_as_the_packed_compensated_model(tmp_path: Any) -> None:
    teacher, data = build("bert").eval(), batches("bert")
    teacher.classifier.weight.data *= 200  # outputs that differ
    student = qbert.quantize_model(teacher, qbert.BitsConfig(2, groups=16, **COMPENSATED), calibration_data=data)
    packed = qbert.pack(student.eval())
    trainer = distiller(tmp_path, teacher=teacher, student=student, max_steps=1)
    batch = trainer.data_collator(rows(6))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        wanted, deployed = (F.log_softmax(m(**inputs).logits, -1) for m in (teacher, packed))
        trainer.distillation.train()  # what the first step sees
        loss = trainer.distillation.losses(dict(batch))["terms"][0]
    entropy = -(wanted.exp() * wanted).sum(-1).mean()
    divergence = F.kl_div(deployed, wanted, log_target=True, reduction="batchmean")
    assert divergence > 1e-5 and float(loss - entropy) == pytest.approx(float(divergence), rel=1e-2, abs=1e-6)


def test_static_ranges_are_calibrated_on_the_rounded_model() -> None:
    config = qbert.BitsConfig(4, activation_range="static", **COMPENSATED)
    student = qbert.quantize_model(build("bert").eval(), config, calibration_data=batches("bert"))
    assert all(
        m.activation_quantizer.enabled and bool(torch.isfinite(m.activation_quantizer.scale))  # type: ignore[union-attr]
        for m in linears(student).values()
    )


def test_without_data_it_says_that_it_rounds_to_nearest() -> None:
    model = build("bert").eval()
    with pytest.warns(UserWarning, match="needs calibration_data, so they are rounded to nearest"):
        student = qbert.quantize_model(model, qbert.BitsConfig(2, **COMPENSATED))
    plain = qbert.quantize_model(model, 2)
    for name, layer in linears(student).items():
        assert layer.weight_quantizer.spec.rounding == "nearest"
        assert torch.equal(layer.quantized_weight(), linears(plain)[name].quantized_weight())


def test_a_matrix_that_calibration_never_reaches_is_named() -> None:
    class Model(BertForSequenceClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert.encoder.layer[1].spare = nn.Linear(48, 48)

    model = Model(build("bert").config).eval()
    with pytest.warns(UserWarning, match="never reaches bert.encoder.layer.1.spare"):
        student = qbert.quantize_model(model, qbert.BitsConfig(2, **COMPENSATED), calibration_data=batches("bert", 10))
    assert student.bert.encoder.layer[1].spare.weight_quantizer.spec.rounding == "nearest"


class Alone(nn.Sequential):
    """One layer that takes its input by keyword and gives its first output."""

    def forward(self, x: Any, attention_mask: Tensor | None = None) -> Tensor:
        output = super().forward(x)
        return output[0] if isinstance(output, tuple) else output


def correlated(*shape: int, axis: int = -1) -> Tensor:
    """Numbers whose `axis` has strongly correlated entries."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(shape[axis], shape[axis], generator=generator)
    return (torch.randn(*shape, generator=generator).transpose(axis, -1) @ mixing).transpose(axis, -1)


KINDS: dict[str, tuple[Any, Tensor]] = {
    "convolution": (lambda: nn.Conv1d(8, 12, 3, padding=1), correlated(60, 8, 9, axis=1)),
    "strided convolution": (lambda: nn.Conv1d(8, 12, 3, stride=2, dilation=2), correlated(60, 8, 11, axis=1)),
    "convolution of 2 channel groups": (lambda: nn.Conv1d(8, 12, 3, groups=2), correlated(60, 8, 9, axis=1)),
    "groups of rows over channel groups": (lambda: nn.Conv1d(9, 12, 3, groups=3), correlated(60, 9, 9, axis=1)),
    "transposed": (lambda: Conv1D(12, 8), correlated(60, 9, 8)),
    "lstm": (lambda: nn.LSTM(8, 6, batch_first=True, bidirectional=True), correlated(60, 9, 8)),
    "gru": (lambda: nn.GRU(8, 4, num_layers=2), correlated(9, 60, 8)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_is_compensated_for_its_own_inputs(name: str) -> None:
    torch.manual_seed(0)
    build_layer, x = KINDS[name]
    model = Alone(build_layer()).eval()
    errors = {}
    for rounding in ("nearest", "compensated"):
        config = qbert.BitsConfig(2, groups=4, activation_bits=None, rounding=rounding)
        student = qbert.quantize_model(model, config, calibration_data={"x": x}).eval()
        errors[rounding] = float((student(x) - model(x)).detach().square().mean())
        layers = [m for m in student.modules() if isinstance(m, TrainableLayer)]
        assert layers and all(m.weight_quantizer.spec.rounding == rounding for m in layers)
    assert errors["compensated"] < (0.97 if "over" in name else 0.9) * errors["nearest"]  # there, ranges must stay


def test_moments_of_a_convolution_are_those_of_its_windows_without_padding() -> None:
    x, mask = torch.randn(5, 4, 7), torch.ones(5, 7).long()
    mask[1:, 5:] = 0
    model = Alone(nn.Conv1d(4, 6, 3, padding=1, groups=2)).eval()
    ((_, found),) = input_moments(model, [{"x": x, "attention_mask": mask}], [model[0]])
    padded = nn.functional.pad(x, (1, 1))
    for group in range(2):
        channels = padded[:, 2 * group : 2 * group + 2]
        # A window counts if it holds a token.
        real = [(b, t) for b in range(5) for t in range(7) if mask[b, max(t - 1, 0) : t + 2].any()]
        rows = torch.stack([channels[b, :, t : t + 3].flatten() for b, t in real]).double()
        torch.testing.assert_close(found.value[group], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert found.inputs == len(real)


@pytest.mark.parametrize("how", ["packed", "masked"])
@pytest.mark.parametrize("reverse", [False, True])
def test_moments_of_gates_leave_out_the_steps_of_padding(how: str, reverse: bool) -> None:
    x, lengths = torch.randn(4, 6, 3), torch.tensor([6, 2, 5, 6])
    mask = (torch.arange(6) < lengths.unsqueeze(1)).long()
    model = Alone(GateRecurrence(nn.GRU(3, 5, batch_first=True, bidirectional=True))).eval()
    given: Any = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if how == "packed" else x
    suffix = "l0_reverse" if reverse else "l0"
    gates = [getattr(model[0], f"weight_{kind}_{suffix}") for kind in ("ih", "hh")]
    batch = {"x": given, "attention_mask": mask}
    found = moments_of(model, [batch], gates)
    inputs = x[mask.bool()].double()
    torch.testing.assert_close(found[gates[0]], inputs.T @ inputs / len(inputs), rtol=1e-5, atol=1e-6)
    if how == "packed":  # of every row the states before each of its own steps
        total = torch.zeros(5, 5, dtype=torch.float64)
        for row, length in zip(x, lengths.tolist(), strict=True):
            with torch.no_grad():
                states = model[0](row[:length])[0][:, 5:].flip(0) if reverse else model[0](row[:length])[0][:, :5]
            total += states[:-1].double().T @ states[:-1].double()  # the first state is zero
        torch.testing.assert_close(found[gates[1]], total / int(lengths.sum()), rtol=1e-5, atol=1e-6)


def test_convolutions_that_read_one_tensor_have_windows_of_their_own() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv1d(4, 6, width) for width in (1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([part(x).amax(-1) for part in self.parts], -1)

    model = Parallel().eval()
    found = input_moments(model, [{"x": torch.randn(5, 4, 7)}], list(model.parts))
    assert [(list(m.value.shape), m.inputs) for _, m in found] == [([4, 4], 35), ([12, 12], 25)]


@pytest.mark.filterwarnings("ignore:calibration_data")
@pytest.mark.parametrize(("bits", "scheme", "range_"), [(2, "asymmetric", None), (3, "midrise", "static")])
def test_no_shift_of_the_logits_is_left(bits: int, scheme: Any, range_: Any) -> None:
    model, data = build("bert").eval(), batches("bert")
    config = qbert.BitsConfig(bits, groups=16, scheme=scheme, activation_range=range_)
    compensated = replace_defaults(config, rounding="compensated")
    shifts = []
    for wanted in (config, compensated):
        student = qbert.quantize_model(model, wanted, calibration_data=data).eval()
        with torch.no_grad():
            off = torch.cat([student(**b).logits - model(**b).logits for b in data]).mean(0)
        shifts.append(float((off[1] - off[0]).abs()))
    assert shifts[1] < 1e-5 and shifts[0] > 10 * shifts[1]
    assert torch.equal(qbert.pack(student).classifier.bias, student.classifier.bias)


def replace_defaults(config: qbert.BitsConfig, **changed: Any) -> qbert.BitsConfig:
    return qbert.BitsConfig.from_dict(config.to_dict() | changed)


def test_a_handful_of_rows_is_said_to_be_one() -> None:
    with pytest.warns(UserWarning, match=r"fewer than the 96 inputs of .*output\.dense.*a few hundred rows"):
        qbert.quantize_model(build("bert"), qbert.BitsConfig(2, **COMPENSATED), calibration_data=inputs_for("bert"))


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_that_are_not_finite_change_nothing(inplace: bool) -> None:
    model = build("bert").eval()
    model.bert.encoder.layer[1].attention.output.LayerNorm.bias.data[3] = float("nan")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"input of bert.encoder.layer.1.intermediate.dense holds NaN"):
        qbert.quantize_model(
            model, qbert.BitsConfig(2, **COMPENSATED), calibration_data=batches("bert"), inplace=inplace
        )
    assert not linears(model) and not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


def test_the_covariance_of_inputs_that_hardly_vary_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 3)
    x = 100 + 1e-2 * torch.randn(4, 50, 6, generator=generator)
    (((_,), found),) = input_moments(nn.Sequential(layer), [{"input": part} for part in x], [layer])
    wide = x.flatten(0, 1).double()
    torch.testing.assert_close(found.mean, wide.mean(0))
    torch.testing.assert_close(found.value, wide.T @ wide / len(wide))
    torch.testing.assert_close(found.covariance, torch.cov(wide.T, correction=0), rtol=1e-4, atol=1e-8)


def test_a_head_that_is_not_finite_is_named() -> None:
    model = build("bert").eval()
    model.classifier.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the output of classifier holds NaN or infinity"):
        qbert.quantize_model(model, qbert.BitsConfig(2, **COMPENSATED), calibration_data=batches("bert"))


@pytest.mark.filterwarnings("ignore:calibration_data has")
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "mpnet"])
def test_rows_may_be_as_long_as_the_model_reads_and_no_longer(family: str) -> None:
    model = build(family, max_position_embeddings=18).eval()
    most = 16 if family in ("roberta", "mpnet") else 18
    config = qbert.BitsConfig(4, groups=4, **COMPENSATED)
    longest = inputs_for(family, length=most)
    with torch.no_grad():
        qbert.quantize_model(model, config, calibration_data=[longest])(**longest)
    longer = {name: torch.cat([x, x[..., -1:]], -1) for name, x in longest.items()}
    with pytest.raises(ValueError, match=rf"{most + 1} tokens a row, .* at most {most}; .*max_length={most}"):
        qbert.quantize_model(model, config, calibration_data=[longer])
    with pytest.raises(ValueError, match=rf"more tokens than the model reads, {most}"):
        qbert.optimize_for_inference(qbert.pack(qbert.quantize_model(model, 4)), warm_up=[(1, most + 1)])


def test_what_cannot_be_used_is_refused_with_its_mend() -> None:
    model = build("bert", max_position_embeddings=16).eval()
    with pytest.raises(ValueError, match=r"17 tokens a row, but the model reads at most 16; .*max_length=16"):
        qbert.quantize_model(
            model, qbert.BitsConfig(2, **COMPENSATED), calibration_data=[inputs_for("bert", length=17)]
        )
    with pytest.raises(ValueError, match=r"in the table embeddings\.word_embeddings"):
        qbert.quantize_model(model, {"embeddings": {"bits": 4, "rounding": "compensated"}, "*": 4})
    for settings, message in (
        ({"rounding": "best"}, "rounding='best'"),
        ({"damping": 0}, "damping=0 "),
        ({"refits": -1}, "refits=-1"),
        ({"column_order": "random"}, "column_order='random'"),
    ):
        with pytest.raises(ValueError, match=message):
            qbert.BitsConfig(2, **settings)


def test_half_precision_weights_keep_their_codes_through_packing() -> None:
    model = build("bert").eval().to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student = qbert.quantize_model(model, qbert.BitsConfig(4, **COMPENSATED), calibration_data=batches("bert"))
    packed = qbert.pack(student)
    for name, layer in linears(student).items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(packed.get_submodule(name).quantized_weight(), layer.quantized_weight())


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that operators make inside: those alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self._known:
                    self._known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._gone, key, size)
        self.most = max(self.most, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_weighing_inputs_keeps_little_more_than_a_backward_pass() -> None:
    model = build("bert", num_hidden_layers=4).eval()
    batch = {"input_ids": torch.randint(5, 90, (16, 16)), "attention_mask": torch.ones(16, 16, dtype=torch.long)}
    modules = [t.module for t in find_targets(model) if t.layer is not None]
    with _Live() as plain:
        torch.autograd.grad(model(**batch).logits.sum(), model.bert.embeddings.word_embeddings.weight)
    with _Live() as weighed:
        next(iter(input_moments(model, [batch], modules, weigh=0.5)))
    assert weighed.most < 1.25 * plain.most


def test_the_mean_of_logits_over_a_vocabulary_takes_no_copy_of_them() -> None:
    model = BertForMaskedLM(build("bert", vocab_size=2000).config).eval()
    ids = torch.randint(5, 90, (16, 32))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(32) < torch.randint(8, 33, (16, 1))).long()}
    with torch.no_grad():
        with _Live() as plain:
            logits = model(**batch).logits
        with _Live() as counted:
            found = mean_logits(model, [batch])
    assert found is not None
    torch.testing.assert_close(found[1], logits[batch["attention_mask"].bool()].double().mean(0))
    assert counted.most < plain.most + 0.5 * logits.nbytes


def test_inputs_that_the_outputs_do_not_depend_on_weigh_nothing() -> None:
    # A classifier reads the first token of the last layer alone, so that of its inputs there are as many as rows.
    model, data = build("bert").eval(), batches("bert", 1)
    last = model.bert.encoder.layer[1].output.dense
    ((_, plain),) = input_moments(model, data, [last])
    ((_, weighted),) = input_moments(model, data, [last], weigh=1.0)
    assert int(torch.linalg.matrix_rank(plain.value.float())) > 6
    assert int(torch.linalg.matrix_rank(weighted.value.float())) == 6
    ((_, directions),) = input_moments(model, data, [last], weigh=1e-9)
    ((_, mixed),) = input_moments(model, data, [last], weigh=0.25)
    assert torch.allclose(mixed.value, 0.75 * directions.value + 0.25 * weighted.value, rtol=1e-4, atol=1e-7)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert", "vit"])
def test_directions_of_inputs_count_alike_whatever_their_size(family: str) -> None:
    model, data = build(family).eval().requires_grad_(False), batches(family, 2)
    modules = [m for n, m in model.named_modules() if type(m) is nn.Linear and "layer" in n]
    inputs: dict[nn.Module, list[Tensor]] = {m: [] for m in modules}
    for batch in data:
        mask = batch.get("attention_mask")
        handles = [m.register_forward_pre_hook(lambda m, a: inputs[m].append(unmasked(a[0], mask))) for m in modules]  # noqa: B023
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    for shared, found in input_moments(model, data, modules, weigh=1e-9):
        for module in shared:
            x = torch.cat([rows.flatten(0, -2) for rows in inputs[module]]).double()
            weights = 1 / x.square().sum(1)
            expected = (x * (weights / weights.mean()).unsqueeze(1)).T @ x / len(x)
            assert torch.allclose(found.value, expected, rtol=1e-3, atol=1e-7)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_interrupted_rounding_goes_on_after_the_layers_that_are_finished(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, config = build("bert").eval(), batches("bert", 4), qbert.BitsConfig(2, groups=16, **COMPENSATED)
    whole = qbert.quantize_model(model, config, calibration_data=data)
    original, calls = WeightQuantizer.compensate, [0]
    per_layer = len(linears(whole)) // 2

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == per_layer + 3:  # in the middle of the second layer
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(WeightQuantizer, "compensate", counted)
    with pytest.raises(KeyboardInterrupt):
        qbert.quantize_model(model, config, calibration_data=data, checkpoint=tmp_path / "kept")
    before = calls[0]
    again = qbert.quantize_model(model, config, calibration_data=data, checkpoint=tmp_path / "kept")
    assert calls[0] - before == per_layer
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"rounded from other data; give another folder"):
        qbert.quantize_model(model, config, calibration_data=data[:2], checkpoint=tmp_path / "kept")
    with pytest.raises(ValueError, match=r"rounded from other settings"):
        other = qbert.BitsConfig(3, groups=16, **COMPENSATED)
        qbert.quantize_model(model, other, calibration_data=data, checkpoint=tmp_path / "kept")
    file = next((tmp_path / "kept").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        qbert.quantize_model(model, config, calibration_data=data, checkpoint=tmp_path / "kept")


@pytest.fixture(scope="module")
def real() -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Two layers of real weights, and batches of real sentences to calibrate on and to compare on."""
    try:
        path = embedded_encoder()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(f"the embedded encoder is not installed: {error}")
    model = AutoModel.from_pretrained(path).eval()
    model.encoder.layer = model.encoder.layer[:2]
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [row["text"] for row in load_task("reviews").splits["train"]]
    parts = []
    for chosen in (texts[:96], texts[96:144]):
        chosen = sorted(chosen, key=len)
        cut = [chosen[at : at + 24] for at in range(0, len(chosen), 24)]
        parts.append(
            [dict(tokenizer(c, padding=True, truncation=True, max_length=48, return_tensors="pt")) for c in cut]
        )
    return model, parts[0], parts[1]


@pytest.mark.filterwarnings("ignore:calibration_data")
@pytest.mark.parametrize(
    ("bits", "settings"),
    [
        (2, {"scheme": "asymmetric"}),
        (3, {"scheme": "offset"}),
        (3, {"scheme": "midrise"}),
        (4, {"range_method": "minmax"}),
        (8, {"scheme": "symmetric", "input_group_size": 64}),
    ],
)
def test_nothing_gets_worse_than_nearest_rounding_on_other_sentences(real: Any, bits: int, settings: Any) -> None:
    model, calibration, others = real
    errors = []
    for rounding in ("nearest", "compensated"):
        config = qbert.BitsConfig(bits, embedding_bits=32, activation_bits=None, rounding=rounding, **settings)
        student = qbert.quantize_model(model, config, calibration_data=calibration).eval()
        with torch.no_grad():
            pairs = [[m(**b).last_hidden_state[b["attention_mask"].bool()] for m in (model, student)] for b in others]
        off = sum(float((a - b).square().sum()) for a, b in pairs)
        errors.append((off / sum(float(a.square().sum()) for a, _ in pairs)) ** 0.5)
    assert errors[1] < 1.02 * errors[0], errors
