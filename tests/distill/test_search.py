"""Probes on a teacher's layers, and a search that trains weights and choices in turns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import distiller, rows, tokenizer
from encoders import build
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments

from qbert import students
from qbert.distill import Match, Recipe, Stage, recipes
from qbert.distill.probes import ProbedTeacher, layer_means, probe_layers
from qbert.distill.recipes.adabert import probe_pairs
from qbert.distill.search import Search, in_turns


def collate(examples: Any) -> Any:
    return DataCollatorWithPadding(tokenizer())(examples)


def probed_teacher() -> ProbedTeacher:
    torch.manual_seed(2)
    model = build("bert").eval()
    model.classifier.weight.data *= 30
    return probe_layers(model, rows(), collate=collate, progress=False)


def space_for(probed: ProbedTeacher, **settings: Any) -> Any:
    return students.adabert_space(probed.teacher, **{"width": 8, "dense": 8, "depth": 2, **settings})


def search(folder: Path, probed: ProbedTeacher, space: Any, weights_first: float = 0.0, **arguments: Any) -> Search:
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps" if "save_steps" in arguments else "no",
        **arguments,
    }
    recipe = recipes.adabert_search(probed.losses, depth=2)
    given = TrainingArguments(str(folder), **settings)
    return Search(
        probed, space, recipe, given, rows(), weights_first=weights_first, data_collator=collate, check_teacher=False
    )


def test_probes_are_those_of_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    probed, data = probed_teacher(), rows()
    batch = collate(data)
    labels = batch.pop("labels").numpy()
    means = layer_means(probed.teacher, dict(batch))[1].double().numpy()
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    apart = np.zeros(len(data), dtype=bool)
    apart[[order[i] for i in range(0, len(data), 4)]] = True
    for layer, (probe, loss) in enumerate(zip(probed.probes, probed.losses, strict=True)):
        x = means[:, layer]
        x = (x - x[~apart].mean(0)) / x[~apart].std(0, ddof=1)
        # A softmax of two classes with weights w and -w has 2 w as the weights of its difference, and half the penalty.
        penalty = 1 / ((~apart).sum() * 0.1)
        fitted = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000).fit(x[~apart], labels[~apart])
        chance = fitted.predict_proba(x[apart])[np.arange(apart.sum()), labels[apart]]
        assert loss == pytest.approx(-np.log(chance).mean(), rel=2e-2)
        said = torch.from_numpy(means[:, layer]).float()
        ours = (probe(said)[:, 1] - probe(said)[:, 0]).numpy()
        np.testing.assert_allclose(ours, fitted.decision_function(x), rtol=0.05, atol=0.05)


def test_a_probed_teacher_says_the_same_of_a_row_once_and_again() -> None:
    probed = probed_teacher()
    batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in rows(6)])
    calls: list[int] = []
    probed.teacher.register_forward_hook(lambda _, __, output: calls.append(len(output.logits)))
    first = probed(**batch, output_probes=True)
    padded = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in batch.items()}
    again = probed(**padded, output_probes=True)
    torch.testing.assert_close((again.logits, again.probes), (first.logits, first.probes))
    other = {k: v.roll(1, 0) for k, v in batch.items()}
    torch.testing.assert_close(probed(**other).logits, first.logits.roll(1, 0))
    assert calls == [6]
    logits, means = layer_means(probed.teacher, dict(batch))
    torch.testing.assert_close(first.logits, logits)
    torch.testing.assert_close(first.probes[1], probed.probes[1](means[:, 1]))


def test_the_loss_is_that_of_the_paper(tmp_path: Path) -> None:
    probed = ProbedTeacher(build("bert").eval(), [torch.nn.Linear(48, 2) for _ in range(2)], [0.3, 0.7])
    probed.probes = torch.nn.ModuleList(torch.nn.Linear(probed.config.hidden_size, 2) for _ in range(2))
    space = space_for(probed, dropout=0.0)
    recipe = recipes.adabert_search(probed.losses, depth=2, efficiency=3.0, gamma=0.7, prediction=0.25, temperature=2.0)
    trainer = distiller(tmp_path, teacher=probed, student=space.eval(), recipe=recipe)
    batch = collate(rows(6))
    with torch.no_grad():
        found = trainer.distillation.losses(dict(batch))
        labels = batch.pop("labels")
        ours, theirs = space(**batch, output_probes=True), probed(**batch, output_probes=True)

    def log_softmax(x: torch.Tensor) -> np.ndarray:
        values = x.double().numpy()
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    def soft(student: torch.Tensor, teacher: torch.Tensor) -> float:
        return float(-4 * (np.exp(log_softmax(teacher / 2)) * log_softmax(student / 2)).sum(1).mean())

    share = np.exp([-0.3, -0.7]) / np.exp([-0.3, -0.7]).sum()
    hard = -log_softmax(ours.logits)[np.arange(6), labels.numpy()].mean()
    knowledge = sum(w * soft(s, t) for w, s, t in zip(share, ours.probes, theirs.probes, strict=True))
    whole = (
        0.3 * hard
        + 0.7 * (0.25 * soft(ours.logits, theirs.logits) + 0.75 * knowledge)
        + 3 * float(space.cost().detach())
    )
    assert float(found["loss"]) == pytest.approx(whole, rel=1e-4)


def test_layers_learn_from_the_probes_of_the_paper() -> None:
    assert probe_pairs(5, 12) == [(0, 2), (1, 4), (2, 7), (3, 9), (4, 11)]
    assert probe_pairs(4, 6) == [(0, 1), (1, 2), (2, 4), (3, 5)]


def test_batches_come_from_two_halves_in_turns() -> None:
    order = np.array(in_turns(rows(40), 8, 12, seed=3)).reshape(12, 8)
    ours, theirs = set(order[::2].flatten().tolist()), set(order[1::2].flatten().tolist())
    assert not ours & theirs and len(ours) == len(theirs) == 20
    assert all(len(set(batch)) == 8 for batch in order.tolist())
    assert order.flatten().tolist() == in_turns(rows(40), 8, 12, seed=3)
    later = np.array(in_turns(rows(40), 8, 12, seed=3, first=6)).reshape(12, 8)
    assert (
        set(later[[*range(6), 6, 8, 10]].flatten().tolist()) == ours and set(later[7::2].flatten().tolist()) <= theirs
    )


def test_weights_and_choices_move_in_turns(tmp_path: Path) -> None:
    probed = probed_teacher()
    space = space_for(probed)
    run = search(tmp_path, probed, space, max_steps=6, weights_first=0.3)
    moved: list[tuple[bool, bool]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = {n: p.detach().clone() for n, p in space.named_parameters()}

        def on_step_end(self, *_: Any, **__: Any) -> None:
            changed = [n for n, p in space.named_parameters() if not torch.equal(p, self.before[n])]
            choices = [n.startswith("architecture.") for n in changed]
            moved.append((not all(choices), any(choices)))

    run.add_callback(Watch())
    run.train()
    assert moved == [(True, False)] * 3 + [(False, True), (True, False), (False, True)]
    assert space.temperature == pytest.approx(0.2 ** (5 / 6))


def test_a_search_is_a_function_of_its_seed_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    probed = probed_teacher()

    def searched(name: str, resume: str | None = None, **arguments: Any) -> Any:
        space = space_for(probed, seed=1)
        search(tmp_path / name, probed, space, **arguments).train(resume_from_checkpoint=resume)
        return space

    whole = searched("whole", save_steps=4)
    for other in (searched("again"), searched("resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))):
        assert other.derive() == whole.derive()
        for name, choice in whole.architecture.items():
            torch.testing.assert_close(other.architecture[name], choice)


def test_a_price_makes_cells_smaller(tmp_path: Path) -> None:
    probed = probed_teacher()
    space = space_for(probed)
    before = float(space.cost().detach())
    search(tmp_path, probed, space, max_steps=20).train()
    assert float(space.cost().detach()) < before


def test_a_derived_cell_learns_from_the_probes(tmp_path: Path) -> None:
    probed = probed_teacher()
    cell = students.random_cell(seed=0)
    student = students.adabert(probed.teacher, cell, 2, width=8, dense=8, dropout=0.0)
    run = distiller(
        tmp_path,
        teacher=probed,
        student=student,
        recipe=recipes.adabert(probed.losses, depth=2),
        max_steps=40,
        learning_rate=1e-2,
    )
    run.train()
    losses = [entry["loss_labels"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert {"loss_probe_0", "loss_probe_1", "loss_labels", "loss_logits"} <= set(run.state.log_history[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.adabert_search(efficiency=0.0), "efficiency=0.0 searches without an efficiency weight"),
        (lambda: recipes.adabert_search(choices=0.0), "choices=0.0 is no rate"),
        (lambda: recipes.adabert(depth=7), "depth=7 does not fit a teacher of 6 layers"),
        (lambda: recipes.adabert(gamma=1.0), "gamma=1.0"),
        (lambda: probe_layers(build("bert"), rows(8), collate=collate), "8 are too few to train probes on"),
        (
            lambda: probe_layers(build("bert"), [{**row, "labels": -100} for row in rows()], collate=collate),
            "a row has no label",
        ),
        (lambda: in_turns(rows(10), 8, 4, seed=0), "10 rows make no batch of 8 in each half"),
        (lambda: in_turns(iter(rows(10)), 8, 4, seed=0), "a stream has no halves"),
    ],
)
def test_impossible_searches_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_search_needs_an_architecture_a_price_and_one_process(tmp_path: Path) -> None:
    probed = probed_teacher()
    given = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=2)
    free = Recipe("free", "here", (Stage("search", (Match("logits"),)),), steps="fixed")
    with pytest.raises(ValueError, match="recipe 'free' searches without an efficiency weight"):
        Search(probed, space_for(probed), free, given, rows())
    with pytest.raises(ValueError, match="BertForSequenceClassification has no architecture"):
        Search(probed, build("bert"), recipes.adabert_search(probed.losses, depth=2), given, rows())
    with pytest.raises(ValueError, match=r"weights_first=1\.0 leaves no step"):
        search(tmp_path, probed, space_for(probed), weights_first=1.0)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2; use one of each"):
        search(tmp_path, probed, space_for(probed), gradient_accumulation_steps=2)


def test_probes_and_prices_of_models_without_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no probes on its layers"):
        distiller(tmp_path, student=build("bert"), recipe=recipes.adabert((1.0, 1.0), depth=2))
    priced = Recipe("priced", "here", (Stage("s", (Match("cost"), Match("logits"))),), steps="fixed")
    with pytest.raises(ValueError, match="'cost' prices an architecture under search"):
        distiller(tmp_path, student=build("bert"), recipe=priced)
