"""Recipes weigh their terms as their papers and the authors' code do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from distilling import distiller, rows
from encoders import build

import qbert
from qbert.distill import Match, Recipe, Stage, recipes

SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def terms(recipe: Recipe, folder: Path, *, teacher: Any, student: Any, stage: int = 0, data: Any = None) -> Any:
    """(terms by name, loss, [outputs of teacher and student]) of one batch."""
    data = rows(6) if data is None else data
    trainer = distiller(folder, teacher=teacher, student=student.eval(), recipe=recipe, data=data)
    trainer.distillation.stage_index = stage
    batch = trainer.data_collator(data)
    with torch.no_grad():
        found = trainer.distillation.losses(dict(batch))
        batch.pop("labels")
        outputs = [model(**batch, output_hidden_states=True) for model in (teacher.eval(), student)]
    names = [match.term for match in recipe.stages[stage].matches]
    return dict(zip(names, found["terms"], strict=True)), found["loss"], outputs


def test_the_patience_of_pkd_is_a_mean_over_layers_and_width(tmp_path: Path) -> None:
    teacher, student = build("bert", num_hidden_layers=4), build("bert")
    found, loss, (theirs, ours) = terms(recipes.pkd(), tmp_path, teacher=teacher, student=student)
    unit = [F.normalize(x[:, 0], dim=-1) for x in (ours.hidden_states[1], theirs.hidden_states[2])]
    torch.testing.assert_close(found["cls"], F.mse_loss(*unit))
    torch.testing.assert_close(loss, 0.5 * found["labels"] + 0.5 * found["logits"] + 100 * found["cls"])


@pytest.mark.parametrize("recipe", [recipes.tinybert(projection=False), recipes.ternarybert()])
def test_states_and_scores_are_summed_over_the_layers(recipe: Recipe, tmp_path: Path) -> None:
    teacher, student = build("bert", num_hidden_layers=3), build("bert", num_hidden_layers=3)
    found, _, (theirs, ours) = terms(recipe, tmp_path, teacher=teacher, student=student)
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    torch.testing.assert_close(found["hidden"], torch.stack([F.mse_loss(s, t) for s, t in pairs]).sum())
    mean = Recipe("m", "test", (Stage("m", (Match("scores"),)),), steps="fixed")
    averaged, *_ = terms(mean, tmp_path, teacher=teacher, student=student)
    torch.testing.assert_close(found["scores"], 3 * averaged["scores"])


@pytest.mark.parametrize(
    ("named", "pairs"),
    [("uniform", [(0, 1), (1, 3)]), ("top", [(0, 2), (1, 3)]), ("uniform", [(-2, -3), (-1, -1)])],
)
@pytest.mark.parametrize("without", [(), ("embeddings",)])
def test_tinyberts_pairs_are_of_layers_in_states_and_scores(
    named: str, pairs: list[tuple[int, int]], without: tuple[str, ...], tmp_path: Path
) -> None:
    teacher, student = build("bert", num_hidden_layers=4), build("bert")
    one, two = (
        terms(recipes.tinybert(layers=x, projection=False, without=without), tmp_path, teacher=teacher, student=student)
        for x in (named, pairs)
    )
    assert {k: float(v) for k, v in one[0].items()} == pytest.approx({k: float(v) for k, v in two[0].items()})


def test_a_language_model_is_asked_about_every_real_token(tmp_path: Path) -> None:
    teacher, student = (tf.BertForMaskedLM(tf.BertConfig(**SMALL)).eval() for _ in range(2))
    data = [{**row, "labels": [-100, row["input_ids"][1]] + [-100] * 7} for row in rows(6)]
    data[0]["attention_mask"] = [1] * 5 + [0] * 4
    recipe = Recipe("d", "test", (Stage("d", (Match("logits"),)),), steps="fixed")
    found, _, (theirs, ours) = terms(recipe, tmp_path, teacher=teacher, student=student, data=data)
    real = torch.tensor([row["attention_mask"] for row in data]).bool()
    expected = F.cross_entropy(ours.logits[real], theirs.logits[real].softmax(-1))
    torch.testing.assert_close(found["logits"], expected)


@pytest.mark.parametrize("unlabelled", [-1, -100])
def test_tags_are_compared_where_words_have_one(unlabelled: int, tmp_path: Path) -> None:
    config = tf.BertConfig(**SMALL, num_labels=5)
    teacher, student = (tf.BertForTokenClassification(config).eval() for _ in range(2))
    data = [{**row, "labels": [unlabelled, 1, unlabelled, *range(5), unlabelled]} for row in rows(6)]
    data[0]["labels"] = [unlabelled] * 9  # a row without any tag has something to learn from everywhere
    recipe = Recipe("d", "test", (Stage("d", (Match("logits"),)),), steps="fixed")
    found, _, (theirs, ours) = terms(recipe, tmp_path, teacher=teacher, student=student, data=data)
    kept = torch.tensor([row["labels"] for row in data]) >= 0
    kept[0] = True
    torch.testing.assert_close(found["logits"], F.cross_entropy(ours.logits[kept], theirs.logits[kept].softmax(-1)))


def test_electras_discriminator_decides_every_token_on_its_own(tmp_path: Path) -> None:
    config = tf.ElectraConfig(**SMALL, embedding_size=8)
    teacher, student = (tf.ElectraForPreTraining(config).eval() for _ in range(2))
    data = [{**row, "labels": [0, 1] + [0] * 7} for row in rows(6)]
    data[0]["attention_mask"] = [1] * 5 + [0] * 4
    recipe = Recipe("d", "test", (Stage("d", (Match("logits"),)),), steps="fixed")
    found, _, (theirs, ours) = terms(recipe, tmp_path, teacher=teacher, student=student, data=data)
    real = torch.tensor([row["attention_mask"] for row in data]).bool()
    expected = F.binary_cross_entropy_with_logits(ours.logits[real], theirs.logits[real].sigmoid())
    torch.testing.assert_close(found["logits"], expected)


def test_heads_of_another_number_are_matched_by_relations(tmp_path: Path) -> None:
    teacher, student = build("bert", num_attention_heads=8), build("bert")
    mend = "leave the term out, or match 'relations.query'"
    with pytest.raises(ValueError, match=rf"'scores': .* 4 and 8 heads; {mend}"):
        terms(recipes.qbert_kd(), tmp_path, teacher=teacher, student=student)
    without, *_ = terms(recipes.qbert_kd(scores=0), tmp_path, teacher=teacher, student=student)
    assert "scores" not in without and "hidden" in without
    with pytest.raises(ValueError, match="give all relations options="):
        one = Recipe("r", "test", (Stage("r", (Match("relations.query"),)),), steps="fixed")
        terms(one, tmp_path, teacher=teacher, student=student)
    match = Match("relations.query", options={"heads": 6})
    found, *_ = terms(Recipe("r", "test", (Stage("r", (match,)),)), tmp_path, teacher=teacher, student=student)
    assert float(found["relations_query"]) > 0


@pytest.mark.parametrize("feature", ["scores", "relations.key", "logits", "labels"])
def test_only_states_can_be_projected(feature: str) -> None:
    with pytest.raises(ValueError, match="maps states to another width"):
        Match(feature, projection="linear")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage("a", (Match("logits"),), schedule="cosine"), "schedule='cosine' is not possible"),  # type: ignore[arg-type]
        (lambda: Stage("a", (Match("logits"),), teacher="prevoius"), "teacher='prevoius' is not possible"),  # type: ignore[arg-type]
        (lambda: recipes.logits(temperature=0), "temperature=0 of logits is not possible"),
        (lambda: recipes.pkd(temperature=float("nan")), "temperature=nan of logits is not possible"),
        (lambda: Match("hidden", options={"temperature": 2.0}), "takes no 'temperature'; use some of normalized"),
        (lambda: Match("scores", options={"heads": 2}), "takes no 'heads'; use some of normalized"),
        (lambda: Match("cls", options={"temperature": 2.0}), "takes no 'temperature'; leave options out"),
        (lambda: Match("hidden", name="h.1", projection="linear"), "name='h.1' has a dot"),
        (lambda: Match("hidden", layers=[]), r"layers=\[\] of hidden is empty"),
    ],
)
def test_terms_and_stages_that_cannot_work_are_refused_when_they_are_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_of_ones_own_take_any_option_they_name(tmp_path: Path) -> None:
    def scaled(student: Any, teacher: Any, mask: Any, factor: float = 1.0) -> Any:
        return factor * F.mse_loss(student, teacher)

    match = Match("hidden", scaled, options={"factor": 3.0}, name="h.1")
    found, *_ = terms(
        Recipe("r", "test", (Stage("r", (match,)),)), tmp_path, teacher=build("bert"), student=build("bert")
    )
    assert float(found["h.1"]) > 0
    with pytest.raises(ValueError, match="takes no 'fcator'; use some of factor"):
        Match("hidden", scaled, options={"fcator": 3.0})


def test_relations_of_several_numbers_of_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="relations of several numbers of heads"):
        Stage("r", tuple(Match(f"relations.{n}", options={"heads": h}) for n, h in (("query", 4), ("key", 6))))


def test_a_grid_for_nearest_rounding_is_not_taken_for_compensated_codes() -> None:
    for rounding, scheme in (("nearest", "midrise"), ("compensated", "asymmetric")):
        for config in (
            qbert.BitsConfig(2, rounding=rounding),
            qbert.BitsConfig({"*": {"bits": 2, "rounding": rounding}}),
        ):
            specs = recipes.qbert_kd().adapt(config).resolve(build("bert")).values()
            assert {spec.scheme for spec in specs if spec.bits == 2} == {scheme}
