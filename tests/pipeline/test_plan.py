"""A plan keeps its budget, is the best of what it lists, and comes true when its pipeline is run."""

import copy
import functools
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from encoders import build, inputs_for
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import qbert
from qbert.pipeline import Depth, Distill, Factorize, Pack, Prune, Quantize, answers, clock, compress
from qbert.pipeline import plan as plans
from qbert.pipeline.alternatives import matrix_alternatives, steps_of
from qbert.pipeline.answers import Answers
from qbert.quantizers.sparsity import half_is_zero
from qbert.students.curvature import observed_inputs
from qbert.tasks import build_sentence_model, load_task
from qbert.tasks.evaluation import fidelity


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A classifier with decided outputs, its tokenizer, task and batches."""
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=2).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    write_task(folder / "data", "sst2", {"train.jsonl": sentiment_rows(128), "dev.jsonl": sentiment_rows(40)})
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    texts = [row["sentence"] for row in sentiment_rows(128)]
    batches = [dict(tokenizer(texts[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, 128, 16)]
    return {
        "model": model,
        "tokenizer": tokenizer,
        "data": load_task("sst2", data_dir=folder / "data"),
        "batches": batches,
        "folder": folder,
    }


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes one second."""
    monkeypatch.setattr(clock.time, "perf_counter", itertools.count().__next__)


@pytest.fixture(scope="module")
def sized(world: dict[str, Any]) -> plans.Plan:
    """A plan for two thirds of the way to the smallest file."""
    return qbert.plan(world["model"], world["batches"], size_mb=0.022)


def test_the_plan_keeps_its_size_and_is_the_nearest_of_those_made(sized: plans.Plan) -> None:
    assert sized.best is sized.candidates[0]
    assert all(c.megabytes <= 0.022 for c in sized.candidates)
    made = [c for c in sized.candidates if c.measured is not None]
    assert made and sized.best.measured == min(c.measured for c in made)  # type: ignore[type-var]
    assert sized.candidates[len(made) :] == tuple(sorted(sized.candidates[len(made) :], key=lambda c: c.predicted))
    assert "bits alone" in sized.front and "Plan for at most 0.022 MB" in str(sized)


def test_the_file_has_the_size_that_was_planned(sized: plans.Plan, world: dict[str, Any], tmp_path: Path) -> None:
    done = compress(world["model"], world["tokenizer"], world["data"], sized.pipeline, folder=tmp_path, progress=False)
    size = (done.folder / "model.safetensors").stat().st_size / 1e6
    assert size <= 0.022
    assert size == pytest.approx(sized.best.megabytes, rel=0.05)


def test_bits_alone_are_exact(world: dict[str, Any]) -> None:
    found = qbert.plan(world["model"], world["batches"], size_mb=0.022, bits=(2, 8), structures=[])
    part = plans.Planner(world["model"], world["batches"], bits=(2, 8), structures=[]).part(())
    options = [range(len(item.options)) for item in part.files.items]
    picked = part.files.choose(0.022)
    best = part.files.damage(picked)
    # Brute force over all changes of up to two items of the choice: none of the allowed ones is better.
    for a, b in itertools.combinations(range(len(options)), 2):
        for x, y in itertools.product(options[a], options[b]):
            other = [x if i == a else y if i == b else p for i, p in enumerate(picked)]
            if part.files.size(other) <= 0.022e6:
                assert part.files.damage(other) >= best - 1e-12
    assert min(c.predicted for c in found.candidates) == pytest.approx(found.prediction(best))
    whole = part.files.choose(0.022, further=False)
    assert not part.files.forms(whole) and part.files.damage(whole) >= best
    plain = [c for c in found.candidates if not c.structure]
    assert plain[0].predicted == pytest.approx(found.prediction(part.files.damage(whole)))
    assert plain[0].measured is not None


def test_what_is_measured_is_what_a_forward_pass_says(sized: plans.Plan, world: dict[str, Any]) -> None:
    rest = [batch for i, batch in enumerate(world["batches"]) if i % 4 != 3]
    model = world["model"]
    for step in sized.best.structure:
        if isinstance(step, Depth):
            model = qbert.students.depth(model, step.layers)
        elif isinstance(step, Prune):
            model = qbert.prune(
                model, ffn=step.ffn, heads=step.heads, pattern=step.pattern, names=step.names, data=rest
            )
        elif isinstance(step, Factorize):
            model = qbert.factorize(model, step.rank, weighting=step.weighting, data=rest)
    packed = qbert.pack(qbert.quantize_model(model, sized.best.config, calibration_data=rest))
    outputs = []
    with torch.no_grad():
        for some in (world["model"], packed):
            outputs.append(torch.cat([some(**batch).logits for batch in world["batches"][3::4]]))
    assert sized.best.measured == pytest.approx(fidelity(*outputs).divergence, rel=1e-3)


def test_within_gives_the_smallest_that_agrees(world: dict[str, Any]) -> None:
    found = qbert.plan(world["model"], world["batches"], within=0.05, structures=[(Depth((1,)),)])
    assert found.best.agreement is not None and found.best.agreement >= 95
    assert found.best.megabytes == min(c.megabytes for c in found.candidates)


def test_a_latency_budget_leaves_out_what_is_too_slow(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def by_depth(self: Any, model: Any, shape: Any) -> float:
        return float(len(model.base_model.encoder.layer))

    monkeypatch.setattr(plans.Planner, "_latency", by_depth)
    found = qbert.plan(world["model"], world["batches"], latency_ms=1.5, structures=[(Depth((1,)),)])
    assert found.best.structure == (Depth((1,)),) and found.best.latency_ms == 1.0
    assert any("bits alone: 2.00 ms are too slow" in line for line in found.left_out)
    with pytest.raises(ValueError, match=r"latency_ms=0\.5: no plan keeps it"):
        qbert.plan(world["model"], world["batches"], latency_ms=0.5, structures=[])


def test_a_noisy_clock_is_named(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.accumulate(itertools.cycle((0.0, 1.0, 0.0, 3.0, 0.0, 3.0)))  # a call takes one second, or three
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    with pytest.raises(ValueError, match=r"200 % longer than the fastest .* this machine's clock says little"):
        qbert.plan(world["model"], world["batches"], latency_ms=10, structures=[])


def test_the_clock_is_read_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class OnGPU(torch.nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=torch.device("cuda"))])

        def forward(self) -> None:
            told.append("call")

    def clock_read() -> float:
        told.append("clock")
        return float(len(told))

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: told.append("done"))
    monkeypatch.setattr(clock.time, "perf_counter", clock_read)
    clock.milliseconds(OnGPU(), {})
    assert told[:5] == ["done", "clock", "call", "done", "clock"] and told == told[:5] * (len(told) // 5)


def test_an_encoder_without_a_head_is_planned_by_its_embeddings(world: dict[str, Any]) -> None:
    model = AutoModel.from_pretrained(world["folder"] / "encoder").eval()
    found = qbert.plan(model, world["batches"], size_mb=0.027, structures=[])
    assert found.best.measured is not None and 0 <= found.best.measured < 1
    assert found.best.agreement == pytest.approx(100 * (1 - found.best.measured))


def test_a_sentence_encoder_is_planned_by_the_cosines_of_pairs(world: dict[str, Any]) -> None:
    model = build_sentence_model(world["folder"] / "encoder")[0]
    pairs = [{k: v.unflatten(0, (-1, 2)) for k, v in batch.items()} for batch in world["batches"]]
    found = qbert.plan(model, pairs, size_mb=0.022, structures=[(Depth((1,)),)])
    assert found.prediction.unit == 2.0  # of a mean squared difference the damage is half
    assert found.best.measured is not None and found.best.measured >= 0 and found.best.megabytes <= 0.022


class _Plain(torch.nn.Module):
    """A model of the user's own, which returns vectors and no names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("head", "kind", "masked"),
    [
        ("ForQuestionAnswering", "spans", True),
        ("ForPreTraining", "vectors", True),
        ("ForMaskedLM", "tokens", False),
        ("ForTokenClassification", "tokens", False),
        ("Model", "vectors", False),
        ("ForMultipleChoice", "rows", True),
    ],
)
@pytest.mark.usefixtures("steady_clock")
def test_every_head_is_planned_by_its_answers(world: dict[str, Any], head: str, kind: str, masked: bool) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, "Bert" + head).from_pretrained(world["folder"] / "encoder").eval()
    model = _Plain(model) if head == "Model" else model
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    batches = [{k: batch[k][:8] for k in names} for batch in world["batches"][:4]]
    if head == "ForMultipleChoice":
        batches = [{k: v.unflatten(0, (-1, 2)) for k, v in batch.items()} for batch in batches]
    assert Answers(model, batches).kind == kind
    budget: dict[str, Any] = {"size_mb": 0.6 * qbert.model_size(model).mb}
    if head == "ForMultipleChoice":
        budget = {"latency_ms": 1e6, "shape": (2, 8)}
    found = qbert.plan(model, batches, **budget, structures=[], further=False, rounding="nearest")
    assert found.best.measured is not None and -1e-6 <= found.best.measured < 0.1


@pytest.mark.usefixtures("steady_clock")
def test_images_are_planned() -> None:
    torch.manual_seed(0)
    model, images = build("vit").eval(), [inputs_for("vit", batch=4) for _ in range(4)]
    size = 0.65 * qbert.model_size(model).mb
    found = qbert.plan(model, images, size_mb=size, latency_ms=1e6, shape=(3, 8), structures=[], rounding="nearest")
    assert found.best.latency_ms == 1000.0 and found.best.megabytes <= size


@pytest.mark.usefixtures("steady_clock")
def test_a_sentence_transformer_is_planned_with_structures_and_timed(world: dict[str, Any]) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    encoder = modules.Transformer(str(world["folder"] / "encoder"))
    model = SentenceTransformer(modules=[encoder, modules.Pooling(32, pooling_mode="cls")], device="cpu")
    structures = [(Depth(1),), (Prune(ffn=0.5),)]
    asked: dict[str, Any] = {"size_mb": 0.022, "latency_ms": 1e6, "shape": (2, 8), "bits": (2, 4)}
    asked |= {"rounding": "nearest", "further": False}
    found = qbert.plan(model, world["batches"][:4], structures=structures, **asked)
    assert {c.structure for c in found.candidates} >= {structures[0]}
    assert found.best.agreement == pytest.approx(100 * (1 - found.best.measured))  # type: ignore[operator]


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForQuestionAnswering"])
def test_answers_by_pieces_are_those_of_all_rows_at_once(
    world: dict[str, Any], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, "Bert" + head).from_pretrained(world["folder"] / "encoder").eval()
    other = qbert.quantize_model(model, 2)
    outputs = []
    with torch.no_grad():
        for some in (model, other):
            rows = []
            for batch in world["batches"][:2]:
                mask, output = batch["attention_mask"] == 1, some(**batch)
                if head == "ForMaskedLM":
                    rows += list(output.logits[mask])
                else:
                    ends = (output.start_logits, output.end_logits)
                    rows += [logits[real] for values in ends for logits, real in zip(values, mask, strict=True)]
            outputs.append(rows)
    each = [fidelity(a[None], b[None]) for a, b in zip(*outputs, strict=True)]
    expected = [sum(getattr(f, name) for f in each) / len(each) for name in ("divergence", "agreement")]
    assert Answers(model, world["batches"][:2]).likeness(other) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(answers, "_MOST_KEPT", 0)
    monkeypatch.setattr(answers, "_AT_ONCE", 1000)
    assert Answers(model, world["batches"][:2]).likeness(other) == pytest.approx(expected, rel=1e-6)


def test_one_planner_serves_several_budgets(world: dict[str, Any]) -> None:
    planner = plans.Planner(world["model"], world["batches"], structures=[])
    planner.plan(size_mb=0.03)
    again, alone = (
        planner.plan(size_mb=0.022),
        qbert.plan(world["model"], world["batches"], size_mb=0.022, structures=[]),
    )
    assert str(again) == str(alone) and again.pipeline == alone.pipeline


_RESUMED: dict[str, Any] = {
    **{"structures": [(Depth((1,)),), (Prune(ffn=0.5),)], "bits": (2, 4)},
    **{"further": False, "rounding": "nearest"},
}


def test_an_interrupted_plan_goes_on_after_the_last_structure(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the very same plan, with fewer passes; and once more with none but those that tell what is asked."""
    model, passes, parts = world["model"], [0], [0]
    forward = type(model).forward

    @functools.wraps(forward)
    def counted(*given: Any, **named: Any) -> Any:
        passes[0] += 1
        return forward(*given, **named)

    class Interrupted(plans.FilePlan):
        def __init__(self, *given: Any, **named: Any) -> None:
            parts[0] += 1
            if parts[0] == 2:
                raise KeyboardInterrupt
            super().__init__(*given, **named)

    monkeypatch.setattr(type(model), "forward", counted)

    def planned(**more: Any) -> tuple[plans.Plan, int]:
        passes[0] = 0
        found = qbert.plan(model, world["batches"][:4], size_mb=0.022, **_RESUMED, **more)
        return found, passes[0]

    whole, all_passes = planned()
    with monkeypatch.context() as patched:
        patched.setattr(plans, "FilePlan", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            planned(checkpoint=tmp_path / "kept")
    spent = passes[0]
    resumed, left = planned(checkpoint=tmp_path / "kept")
    again, few = planned(checkpoint=tmp_path / "kept")
    for found in (resumed, again):
        assert str(found) == str(whole) and found.pipeline == whole.pipeline
        assert found.candidates == whole.candidates and found.front == whole.front
        assert found.prediction == whole.prediction
        assert found.bits_alone is not None and whole.bits_alone is not None
        assert found.bits_alone.items == whole.bits_alone.items
    assert few < left < all_passes and left + spent < 1.25 * all_passes
    other = qbert.plan(model, world["batches"][:4], size_mb=0.03, **_RESUMED, checkpoint=tmp_path / "kept")
    assert other.best.megabytes <= 0.03


@pytest.mark.parametrize(
    ("other", "named"),
    [({"bits": (2, 8)}, "bits"), ({"structures": []}, "structures"), ({"groups": 4}, "settings"), ({}, "batches")],
)
def test_what_was_measured_of_something_else_is_refused(
    world: dict[str, Any], tmp_path: Path, other: dict[str, Any], named: str
) -> None:
    plans.Planner(world["model"], world["batches"][:4], **_RESUMED, checkpoint=tmp_path)._start(())
    batches = world["batches"][4 if named == "batches" else 0 :][:4]
    with pytest.raises(ValueError, match=rf"checkpoint: .*measured\.json was measured with another {named}; give"):
        qbert.plan(world["model"], batches, size_mb=0.022, **{**_RESUMED, **other}, checkpoint=tmp_path)


def test_a_file_is_no_checkpoint(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint: .*file is a file; give the path of a folder"):
        qbert.plan(world["model"], world["batches"], size_mb=0.022, checkpoint=tmp_path / "file")


def test_the_front_is_drawn(sized: plans.Plan, tmp_path: Path) -> None:
    sized.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000
    for points in sized.front.values():
        assert all(a[0] < b[0] and a[1] >= b[1] - 1e-12 for a, b in itertools.pairwise(points))


def test_training_goes_where_it_is_put(sized: plans.Plan) -> None:
    steps = sized.with_training(after_bits=[Distill(steps=5)]).steps
    assert [step.kind for step in steps[-3:]] == ["quantize", "distill", "pack"]


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({}, "a plan needs a budget"),
        ({"size_mb": 1000}, "is no budget: the float model has"),
        ({"size_mb": 1e-4}, "is too small: with all weights in 2 bits this model takes about"),
        ({"latency_ms": 5.0, "shape": (1, 9000)}, "9000 tokens are more than the model reads"),
        ({"size_mb": 0.01}, "no plan keeps it"),
        ({"size_mb": 0.02, "within": 0.01}, "contradict"),
        ({"within": 1.0}, "use a share such as 0.01"),
        ({"latency_ms": -1}, "use a positive number"),
        (
            {"size_mb": 0.022, "structures": [(Distill(steps=1),)]},
            "give sequences of Depth, Share, Prune and Factorize",
        ),
        ({"latency_ms": 9, "shape": (0, 8)}, r"shape=\(0, 8\) is not possible; give \(sequences, tokens\)"),
        ({"latency_ms": 9, "shape": "1x8"}, "shape='1x8' is not possible"),
        ({"latency_ms": 9, "shape": (1,)}, r"shape=\(1,\) is not possible"),
        ({"size_mb": 0.022, "bits": 4}, "bits=4 is one number; give the widths to choose from"),
        ({"size_mb": 0.022, "bits": (16,)}, r"bits=\(16,\) leaves every weight in float"),
        ({"size_mb": 0.022, "structures": [Depth(1)]}, "structures: Depth.* is no sequence of steps"),
        ({"size_mb": 0.022, "structures": Depth(1)}, "structures=Depth.* is no list"),
    ],
)
def test_impossible_budgets_are_refused(world: dict[str, Any], budget: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        qbert.plan(world["model"], world["batches"], **{"structures": [], **budget})


def test_the_smallest_file_of_a_structure_is_known_before_it_is_measured(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"structures": [(Depth((1,)),)], "bits": (3, 4), "rounding": "nearest"}
    planner = plans.Planner(world["model"], world["batches"][:4], **given)
    smallest = {steps: planner._smallest_mb(steps) for steps in planner.structures}
    assert smallest == {steps: planner.part(steps).files.smallest_mb for steps in planner.structures}

    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("options were measured")

    monkeypatch.setattr(plans, "FilePlan", measured)
    with pytest.raises(ValueError, match=r"no plan keeps it \(bits alone: the smallest file has .*; depth"):
        size = 0.99 * min(smallest.values())
        qbert.plan(world["model"], world["batches"][:4], size_mb=size, **given)


def test_what_takes_more_away_than_another_is_known() -> None:
    half, both = (Prune(ffn=0.5),), (Depth((0, 2)), Prune(heads=0.25, ffn=0.5))
    assert plans._takes_more(both, half) and not plans._takes_more(half, both)
    assert plans._takes_more((Prune(ffn=0.75),), half) and not plans._takes_more(half, half)
    assert not plans._takes_more((Prune(heads=0.25, ffn=0.25),), half)
    assert not plans._takes_more((Depth((0, 2)), Factorize(4)), half)


def test_a_matrix_of_low_rank_may_be_stored_as_two_factors(world: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(world["model"])
    name = "encoder.layer.0.intermediate.dense"
    matrix = model.base_model.get_submodule(name).weight
    with torch.no_grad():
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix.copy_((left[:, :4] * values[:4]) @ right[:4])
    files = plans.Planner(model, world["batches"], structures=[], rounding="nearest").part(()).files
    place = next(i for i, item in enumerate(files.items) if item.names == (name,))
    options = files.items[place].options
    factors = [i for i, option in enumerate(options) if option.parts is not None]
    best = min(factors, key=lambda i: options[i].damage)
    plain = [option for option in options if option.parts is None]
    assert options[best].damage < min(option.damage for option in plain if option.rule["bits"] < 4)
    picked = [best if i == place else 0 for i in range(len(files.items))]
    forms, size = files.forms(picked), files.size(picked)
    assert set(forms) == {name}
    steps = (*steps_of(forms), Quantize(files.configuration(picked)), Pack())
    done = compress(model, world["tokenizer"], world["data"], steps, folder=tmp_path, progress=False)
    assert 0.95 * size <= (done.folder / "model.safetensors").stat().st_size <= size


def test_a_matrix_of_2_to_4_zeros_may_be_stored_as_such(world: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(world["model"])
    name = "encoder.layer.0.intermediate.dense"
    matrix = model.base_model.get_submodule(name).weight
    with torch.no_grad():
        matrix.mul_(torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(matrix.shape[1] // 4))
    files = plans.Planner(model, world["batches"], structures=[]).part(()).files
    place = next(i for i, item in enumerate(files.items) if item.names == (name,))
    options = files.items[place].options
    sparse = next(i for i, o in enumerate(options) if o.form == {"pattern": "2:4"} and o.rule["bits"] == 4)
    plain = next(i for i, o in enumerate(options) if o.parts is None and o.rule["bits"] == 4)
    assert options[sparse].size == options[plain].size  # the zeros were there already
    found = matrix_alternatives(model, world["batches"], {}, (4,))[name]
    (alternative,) = (other for other in found if other.form == {"pattern": "2:4"})
    change = alternative.change
    assert half_is_zero(matrix + change) and change.norm() < 0.2 * matrix.norm()
    (seen,) = observed_inputs(model, world["batches"], [model.base_model.get_submodule(name)]).values()
    assert alternative.bias is not None  # what compensated rounding moves it by: outputs keep their mean
    torch.testing.assert_close(alternative.bias, -(change.double() @ seen.mean).float(), rtol=1e-3, atol=1e-5)
    dense = next(i for i, item in enumerate(files.items) if item.names == ("encoder.layer.0.output.dense",))
    kinds = [(o.form.get("pattern"), o.rule["bits"]) for o in files.items[dense].options]
    own, other = kinds.index(("2:4", 4)), kinds.index((None, 4))
    assert files.items[dense].options[own].size < files.items[dense].options[other].size
    picked = [sparse if i == place else own if i == dense else 0 for i in range(len(files.items))]
    forms, size = files.forms(picked), files.size(picked)
    steps = (*steps_of(forms), Quantize(files.configuration(picked)), Pack())
    assert "prune (zeros 2:4 in 2 matrices)" in plans.structure_name(steps)
    done = compress(world["model"], world["tokenizer"], world["data"], steps, folder=tmp_path, progress=False)
    assert 0.95 * size <= (done.folder / "model.safetensors").stat().st_size <= size


def test_too_few_batches_and_a_quantized_model_are_refused(world: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 4 batches"):
        qbert.plan(world["model"], world["batches"][:3], size_mb=0.022)
    with pytest.raises(ValueError, match="plan for the float model"):
        qbert.plan(qbert.quantize_model(world["model"], 4), world["batches"], size_mb=0.022)
    assert re.match(r"\w+", plans.structure_name(()))
