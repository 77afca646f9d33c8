"""A pipeline makes its steps in order, keeps each, scores each, and goes on where it was stopped."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qbert
from qbert.pipeline import Depth, Distill, Factorize, Pack, Pipeline, Prune, Quantize, Share, compress
from qbert.pipeline.run import _Run, foresee
from qbert.pipeline.steps import Step
from qbert.tasks import SentenceRegression, build_sentence_model, evaluate, load_task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A classifier of two layers, its tokenizer and its task."""
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=2).eval()
    write_task(folder / "data", "sst2", {"train.jsonl": sentiment_rows(64), "dev.jsonl": sentiment_rows(40)})
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    return {"model": model, "tokenizer": tokenizer, "data": load_task("sst2", data_dir=folder / "data")}


PLANS = {
    "bits": Pipeline((Quantize(4, rounding="nearest"), Pack())),
    "depth, training and bits": Pipeline(
        (
            Depth(1),
            Distill("minilm", steps=3, options={"relation_heads": 4}),
            Quantize(2, embedding_bits=4),
            Distill("qbert_kd", steps=3),
            Pack(),
        )
    ),
    "narrow": Pipeline((Prune(heads=0.25, ffn=0.5), Quantize(4), Pack())),
    "factors": Pipeline((Factorize(0.6), Quantize(8), Pack())),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_comes_out_loads_from_its_folder_and_scores_as_recorded(
    name: str, world: dict[str, Any], tmp_path: Path
) -> None:
    done = compress(**world, plan=PLANS[name], folder=tmp_path / "out", progress=False)
    assert len(done.record.results) == len(PLANS[name].steps) + 1
    loaded = qbert.load(done.folder)
    batch = world["tokenizer"](["the film was kind", "the meal"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, done.model(**batch).logits)
    last = done.record.results[-1]
    assert evaluate(loaded, world["data"], world["tokenizer"], progress=False).primary == last.score
    assert qbert.model_size(loaded).mb == last.megabytes < done.record.results[0].megabytes
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == [done.folder.name]
    assert str(len(PLANS[name].steps)) in json.loads((tmp_path / "out" / "pipeline.json").read_text())["rows"]


def test_one_step_is_the_library_call(world: dict[str, Any], tmp_path: Path) -> None:
    done = compress(**world, plan=PLANS["bits"], folder=tmp_path, progress=False)
    wanted = qbert.pack(qbert.quantize_model(world["model"], 4)).state_dict()
    found = done.model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_every_seed_is_scored_on_the_same_rows(world: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = copy.deepcopy(world["model"])
    torch.nn.init.normal_(model.classifier.weight, std=3.0)  # else all rows are of one class
    found = [
        compress(
            **{**world, "model": model},
            plan=PLANS["bits"],
            folder=tmp_path / str(seed),
            eval_limit=9,
            seed=seed,
            progress=False,
        )
        .record.results[0]
        .score
        for seed in range(4)
    ]
    assert len(set(found)) == 1


def test_a_sentence_encoder_goes_through_a_pipeline_by_the_cosines_of_pairs(tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "encoder")
    words = ("film", "meal", "kind", "room")
    rows = [{"sentence1": f"the {a}", "sentence2": f"the {b}", "label": 5.0 * (a == b)} for a in words for b in words]
    write_task(tmp_path / "data", "stsb", {"train.jsonl": rows, "dev.jsonl": rows})
    model, tokenizer = build_sentence_model(tmp_path / "encoder")
    task = load_task("stsb", data_dir=tmp_path / "data")
    plan = Pipeline((Quantize(4), Distill("qbert_kd", steps=2), Pack()))
    done, again = (compress(model, tokenizer, task, plan, folder=tmp_path / "out", progress=False) for _ in range(2))
    assert again.record == done.record
    encoder = qbert.load(done.folder)
    batch = tokenizer(["the film", "the meal"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = SentenceRegression(encoder).embed(**batch)
        torch.testing.assert_close(found, again.model.embed(**batch))  # type: ignore[operator]


def test_a_step_that_is_taken_up_lies_where_the_teacher_does(world: dict[str, Any], tmp_path: Path) -> None:
    world["model"].save_pretrained(tmp_path / "step-1")
    taken_up = _Run.__new__(_Run)
    taken_up.folder, taken_up.teacher = tmp_path, copy.deepcopy(world["model"]).to("meta")
    assert {parameter.device.type for parameter in taken_up._load(1).parameters()} == {"meta"}


def test_stopped_anywhere_it_goes_on_to_the_same_result(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS["depth, training and bits"]
    whole = compress(**world, plan=plan, folder=tmp_path / "whole", progress=False)
    stopped: list[Step] = []
    for kind in (Depth, Distill, Quantize, Pack):

        def stopping(self: Step, model: Any, context: Any, plain: Any = kind.apply) -> Any:
            result = plain(self, model, context)
            if self not in stopped:  # each step is stopped once, when it is made and not kept yet
                stopped.append(self)
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(kind, "apply", stopping)
    for _ in plan.steps:
        with pytest.raises(KeyboardInterrupt):
            compress(**world, plan=plan, folder=tmp_path / "torn", progress=False)
    torn = compress(**world, plan=plan, folder=tmp_path / "torn", progress=False)
    for a, b in zip(whole.record.results, torn.record.results, strict=True):
        assert (a.step, a.megabytes) == (b.step, b.megabytes)
        assert a.divergence == pytest.approx(b.divergence, rel=1e-3, abs=1e-6)


def test_a_finished_run_is_not_made_again(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compress(**world, plan=PLANS["bits"], folder=tmp_path, progress=False)

    def never(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(Quantize, "apply", never)
    again = compress(**world, plan=PLANS["bits"], folder=tmp_path, progress=False)
    assert again.record == first.record and again.folder == first.folder


def test_another_plan_or_model_does_not_go_on_from_here(world: dict[str, Any], tmp_path: Path) -> None:
    compress(**world, plan=PLANS["bits"], folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="made with another plan"):
        compress(**world, plan=PLANS["narrow"], folder=tmp_path, progress=False)
    with torch.no_grad():
        other = AutoModelForSequenceClassification.from_config(world["model"].config).eval()
    with pytest.raises(ValueError, match="made with another model"):
        compress(**{**world, "model": other}, plan=PLANS["bits"], folder=tmp_path, progress=False)


STEPS = st.one_of(
    st.builds(Depth, st.one_of(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple))),
    st.builds(Prune, heads=st.floats(0, 0.9), ffn=st.floats(0, 0.9), pattern=st.sampled_from([None, "2:4", 0.5])),
    st.builds(Factorize, st.one_of(st.floats(0.1, 0.9), st.just({"encoder.layer.0.output.dense": 8}))),
    st.builds(Share, st.one_of(st.sampled_from(["all", "sandwich"]), st.integers(1, 3), st.just((0, 0, 1)))),
    st.builds(Distill, st.sampled_from(["minilm", "pkd", "qbert_kd"]), steps=st.integers(1, 500)),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(STEPS, max_size=4), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_json_gives_the_same_pipeline(first: list[Step], bits: int, packed: bool) -> None:
    plan = Pipeline((*first, Quantize(bits, settings={"groups": 8}), *([Pack()] if packed else [])))
    assert Pipeline.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert str(plan).count(" -> ") == len(plan.steps) - 1


def test_a_pipeline_of_the_first_format_quantizes_as_it_did() -> None:
    text = (
        '{"format": "qbert.pipeline/1", "steps": [{"step": "quantize", "bits": 4, "rounding": "nearest", '
        '"embedding_bits": 8, "settings": {"groups": 12}, "rows": 384}]}'
    )
    (step,) = Pipeline.from_dict(json.loads(text)).steps
    old = '{"format": "qbert.bits/1", "bits": {"*": 4}, "embedding_bits": 8, "rounding": "nearest", "groups": 12}'
    assert isinstance(step, Quantize) and step.config() == qbert.BitsConfig.from_dict(json.loads(old))


def test_a_saved_pipeline_is_read_back_and_a_damaged_one_refused(tmp_path: Path) -> None:
    plan = Pipeline((Depth((0, 1)), Quantize(qbert.BitsConfig({"*": 2, "embeddings": 4})), Pack()))
    plan.save(tmp_path / "plan.json")
    assert Pipeline.load(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"depth"', '"death"'))
    with pytest.raises(ValueError, match=r"altered|not known"):
        Pipeline.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Pipeline(()), "steps is empty"),
        (lambda: Pipeline((Quantize(4), Pack(), Depth(1))), "comes after Pack"),
        (lambda: Pipeline((Quantize(4), Prune(ffn=0.5))), "change the structure first"),
        (lambda: Pipeline((Quantize(4), Quantize(2))), "quantize once"),
        (lambda: Pipeline((Depth(1), Pack())), "nothing to pack"),
        (lambda: Quantize(5), "bits"),
        (lambda: Distill("alchemy"), "recipe='alchemy' is not known; use one of"),
        (lambda: Distill(steps=0), "steps=0 is not possible"),
        (lambda: Distill(batch_size=0), "batch_size: 0 is not possible"),
        (lambda: Distill(learning_rate=-1.0), r"learning_rate=-1\.0 is not possible"),
        (lambda: Distill("minilm", options={"nope": 1}), "do not fit recipe 'minilm': .*nope"),
        (lambda: Depth(0), "layers: 0 is not possible"),
        (lambda: Depth(()), "layers is empty"),
        (lambda: Prune(heads=2.0), r"heads=2\.0 is not a share"),
        (lambda: Prune(ffn=-1), "ffn=-1 is not a share"),
        (lambda: Prune(pattern="7:3"), "pattern='7:3' is not known"),
        (lambda: Factorize(-3), "rank=-3 is not possible"),
        (lambda: Factorize({"*": 0.5}), r"rank=0\.5 is not possible"),  # type: ignore[dict-item]
        (lambda: Factorize(0.5, weighting="some"), "weighting='some' is not known"),  # type: ignore[arg-type]
        (lambda: Share("sandwhich"), "layers='sandwhich' is not known"),
        (lambda: Quantize(4, rows=0), "rows: 0 is not possible"),
        (lambda: Quantize(qbert.BitsConfig(4), rounding="compensated"), "rounding='compensated' beside a whole"),
        (lambda: Quantize(qbert.BitsConfig(4), embedding_bits=2), "embedding_bits=2 beside a whole"),
        (lambda: Quantize(qbert.BitsConfig(4), settings={"groups": 4}), "settings=.* beside a whole"),
        (lambda: Pipeline.from_dict({"format": "x"}), "are no pipeline"),
        (lambda: Pipeline.from_dict([4]), "are no pipeline"),  # type: ignore[arg-type]
        (lambda: Pipeline.from_dict({"format": "qbert.pipeline/2", "steps": "pack"}), "are no pipeline"),
        (lambda: Pipeline.from_dict({"format": "qbert.pipeline/1", "steps": ["pack"]}), "are no pipeline"),
        (lambda: Pipeline.from_dict({"format": "qbert.pipeline/2", "steps": [{"step": "depth"}]}), "lacks 'layers'"),
        (lambda: Pipeline.from_dict({"format": "qbert.pipeline/1", "steps": [{"step": "dream"}]}), "is not known"),
        (
            lambda: Pipeline.from_dict({"format": "qbert.pipeline/1", "steps": [{"step": "pack", "hard": 1}]}),
            "has no 'hard'",
        ),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (Depth(99), r"step 2, depth \(99\): keep=99 is not possible"),
        (Depth((0, 7)), "has no layer 7"),
        (Prune(heads=0.99), "leaves none of the"),
        (Prune(), "nothing to prune"),
        (Prune(pattern="2:4", names="encoder.layers.0"), r"'encoder\.layers\.0' matches no matrix"),
        (Factorize(10**6), "ranks up to"),
        (Share(7), "groups do not divide"),
        (Quantize(qbert.BitsConfig({"encoder.layers.0": 8, "*": 4})), r"'encoder\.layers\.0' matches no tensor"),
        (Quantize(4, settings={"input_group_size": 7}), "input_group_size"),
    ],
    ids=str,
)
def test_what_a_later_step_refuses_is_said_before_the_first(
    step: Step, sentence: str, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distill, "apply", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=sentence):
        compress(**world, plan=(Distill("minilm", steps=5000), step), folder=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ((Depth(1), Quantize(qbert.BitsConfig({"encoder.layer.1": 8, "*": 4}))), "matches no tensor"),
        ((Share((0, 0)), Quantize(qbert.BitsConfig({"encoder.layer.1": 8, "*": 4}))), "matches no tensor"),
        ((Prune(heads=0.5), Prune(heads=0.8)), "leaves none of the 2"),
        ((Prune(pattern="2:4"), Prune(ffn=0.5)), "zeros in a pattern"),
        ((Prune(heads=0.5, ffn=0.5), Quantize(qbert.BitsConfig({"encoder.layer.1": 8, "*": 4})), Pack()), None),
    ],
)
def test_later_steps_are_foreseen_on_what_the_structure_will_be(
    steps: tuple[Step, ...], sentence: str | None, world: dict[str, Any]
) -> None:
    before = copy.deepcopy(world["model"].state_dict())
    if sentence is None:
        foresee(Pipeline(steps), world["model"])
    else:
        with pytest.raises(ValueError, match=sentence):
            foresee(Pipeline(steps), world["model"])
    assert all(torch.equal(value, before[key]) for key, value in world["model"].state_dict().items())


def test_static_ranges_of_rounding_to_nearest_are_fixed_on_training_rows(world: dict[str, Any], tmp_path: Path) -> None:
    plan = (Quantize(4, rounding="nearest", settings={"activation_range": "static"}), Pack())
    done = compress(**world, plan=plan, folder=tmp_path, progress=False)
    layer = done.model.bert.encoder.layer[0].output.dense
    assert layer.spec.activation_range == "static" and float(layer.input_scale) not in (0.0, 1.0)


def test_a_whole_configuration_in_a_file_may_stand_beside_a_rounding() -> None:
    step = Quantize(qbert.BitsConfig({"*": 4}, rounding="nearest"))
    values = step.to_dict()
    assert values["rounding"] == "compensated"  # as it always was written
    assert Pipeline.from_dict(json.loads(json.dumps(Pipeline((step,)).to_dict()))).steps == (step,)


def test_a_quantized_model_and_other_types_are_refused_before_any_work(world: dict[str, Any], tmp_path: Path) -> None:
    student = qbert.quantize_model(world["model"], 4)
    with pytest.raises(ValueError, match="quantized already"):
        compress(**{**world, "model": student}, plan=PLANS["bits"], folder=tmp_path / "out")
    with pytest.raises(TypeError, match="expected a transformers model"):
        compress(**{**world, "model": torch.nn.Linear(2, 2)}, plan=PLANS["bits"], folder=tmp_path / "out")
    with pytest.raises(TypeError, match="expected a task"):
        compress(**{**world, "data": [1]}, plan=PLANS["bits"], folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
