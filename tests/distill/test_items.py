"""Parts of a batch, of whatever lengths and in whatever process, add up to the whole; so does the evaluation's loss."""

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
import transformers as tf
from distilling import distiller, tokenizer

from qbert.distill import Match, Recipe, Stage, recipes

SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
EVERY_FEATURE = Recipe(
    "every", "test",
    (Stage("one", (Match("logits", "kl"), Match("hidden", "cosine"), Match("scores"), Match("relations.value"),
                   Match("cls"), Match("scores", "attention_kl", name="maps"), Match("module:pooler", "mse"))),),
    steps="fixed",
)  # fmt: skip


def texts(head: str) -> list[dict[str, Any]]:
    """Eight texts, of 4 and of 30 tokens; some have labels where others have none."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate([4] * 4 + [30] * 4):
        ids = torch.randint(5, 100, (length,), generator=generator)
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if head == "SequenceClassification":
            row["labels"] = torch.tensor(number % 2)
        elif head == "QuestionAnswering":
            row["start_positions"] = torch.tensor(number % 3)
            row["end_positions"] = torch.tensor(2 if number != 1 else 99)  # an answer that was cut off
        else:
            labels = ids % (2 if head == "TokenClassification" else 100)
            row["labels"] = torch.where(torch.arange(length) % 3 == 0, labels, -100)
            if number in (2, 3):
                row["labels"] = torch.full_like(ids, -100)  # a micro-batch without any label
        found.append(row)
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    padding = {"labels": -100}
    return {
        key: torch.nn.utils.rnn.pad_sequence([r[key] for r in rows], True, padding.get(key, 0))
        if rows[0][key].dim()
        else torch.stack([r[key] for r in rows])
        for key in rows[0]
    }


def gradient(trainer: Any, loss: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in trainer.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering"])
@pytest.mark.parametrize("recipe", [recipes.qbert_kd(), recipes.distilbert(), recipes.qat(), EVERY_FEATURE])
def test_micro_batches_of_unequal_texts_have_the_gradient_of_the_whole(
    recipe: Recipe, head: str, tmp_path: Path
) -> None:
    if recipe is EVERY_FEATURE and head != "SequenceClassification":
        pytest.skip("only this head has a pooler")
    config = tf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher, student = (getattr(tf, f"BertFor{head}")(config) for _ in range(2))
    rows = texts(head)
    trainer = distiller(tmp_path, teacher=teacher, student=student, recipe=recipe, data=[{
        k: v.tolist() for k, v in row.items()} for row in rows[:1]], per_device_train_batch_size=2)  # fmt: skip
    trainer.distillation.train()
    whole = gradient(trainer, trainer.distillation(**collate(rows))["loss"])
    batches = [collate(rows[i : i + 2]) for i in range(0, 8, 2)]
    trainer.get_batch_samples(iter(batches), 4, torch.device("cpu"))
    parts = [gradient(trainer, trainer.compute_loss(trainer.distillation, dict(batch))) for batch in batches]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-4, atol=1e-6)


SHARED = Recipe(
    "shared", "test",
    (Stage("one", (Match("hidden", options={"normalized": True}), Match("scores", options={"normalized": True}),
                   Match("logits", weight="auto"), Match("hidden", "cosine", weight="auto", name="angle"))),),
    steps="fixed",
)  # fmt: skip


def test_normalised_terms_and_automatic_weights_are_those_of_the_whole_step(tmp_path: Path) -> None:
    config = tf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher, student = (tf.BertForSequenceClassification(config) for _ in range(2))
    rows = texts("SequenceClassification")
    data = [{k: v.tolist() for k, v in rows[0].items()}]
    trainer = distiller(tmp_path, teacher=teacher, student=student, recipe=SHARED, data=data)
    trainer.distillation.train()
    whole = gradient(trainer, trainer.distillation(**collate(rows))["loss"])
    trainer.distillation.heads.forget()
    batches = [collate(rows[i : i + 2]) for i in range(0, 8, 2)]
    trainer.get_batch_samples(iter(batches), 4, torch.device("cpu"))
    parts = [gradient(trainer, trainer.compute_loss(trainer.distillation, dict(batch))) for batch in batches]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-4, atol=1e-6)
    assert trainer.distillation.heads.auto_count.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_evaluations_loss_does_not_depend_on_the_batch_size(size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.BertForTokenClassification(tf.BertConfig(**SMALL)).eval()
    rows = texts("TokenClassification")
    trainer = distiller(
        tmp_path, teacher=tf.BertForTokenClassification(model.config), student=model, recipe=recipes.qat(),
        data=[{k: v.tolist() for k, v in rows[0].items()}], per_device_eval_batch_size=size,
    )  # fmt: skip
    trainer.data_collator = collate
    with torch.no_grad():
        expected = model(**collate(rows)).loss
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_two_processes_with_unequal_texts_train_as_one_does(tmp_path: Path) -> None:
    script, out = tmp_path / "train.py", tmp_path / "weights"
    helpers, here = Path(__file__).parents[1] / "helpers", Path(__file__).parent
    script.write_text(
        f"import sys; sys.path[:0] = [{str(helpers)!r}, {str(here)!r}]\n"
        "from pathlib import Path\nimport torch\nfrom test_items import trained\n"
        "torch.set_num_threads(1)\n"
        f"trainer = trained(Path({str(tmp_path)!r}), per_device_train_batch_size=2, ddp_backend='gloo')\n"
        "if trainer.args.process_index == 0:\n"
        f"    torch.save(trainer.student.state_dict(), {str(out)!r})\n"
        "trainer.accelerator.wait_for_everyone()\ntrainer.accelerator.end_training()\n"
        "import os\nos._exit(0)\n"  # the threads of gloo may abort a process that ends while its peer is still there
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    alone = trained(tmp_path / "alone", per_device_train_batch_size=4).student.state_dict()
    for name, value in torch.load(out, weights_only=True).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6, msg=name)


def trained(folder: Path, **arguments: Any) -> Any:
    """A student after one plain gradient step on rows whose lengths go up and down."""
    torch.manual_seed(0)
    config = tf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher, student = (tf.BertForTokenClassification(config) for _ in range(2))
    rows = texts("TokenClassification")
    data = [{k: v.tolist() for k, v in rows[i].items()} for i in (0, 1, 4, 5)]
    trainer = distiller(
        folder, teacher=teacher, student=student, recipe=recipes.distilbert(), data=data, max_steps=1,
        train_sampling_strategy="sequential", optim="sgd", learning_rate=0.1, max_grad_norm=0.0, warmup_steps=0,
        data_collator=tf.DataCollatorForTokenClassification(tokenizer()), **arguments,
    )  # fmt: skip
    trainer.train()
    return trainer
