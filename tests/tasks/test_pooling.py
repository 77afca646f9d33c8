"""Sentence vectors are those that sentence-transformers makes of the same folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tasks import sentiment_rows, tiny_encoder, write_task
from transformers import AutoModel

from qbert.tasks import SentenceRegression, build_sentence_model, load_task, sentence_similarity_score
from qbert.tasks.pooling import Pooling, read_pooling
from qbert.tasks.task import Task

_LEGACY = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("data")
    texts = [row["sentence"] for row in sentiment_rows(24)]
    rows = [
        {"sentence1": a, "sentence2": b, "label": float(i % 6)}
        for i, (a, b) in enumerate(zip(texts, texts[::-1], strict=True))
    ]
    return load_task("stsb", data_dir=write_task(folder, "stsb", {"train.jsonl": rows, "dev.jsonl": rows}))


def sentence_folder(
    folder: Path, pooled: str, *, encoder: str = "", further: tuple[str, ...] = (), **files: Any
) -> Path:
    """A random encoder in the folder of a SentenceTransformer, in the format of before version 5.4."""
    torch.manual_seed(0)
    tiny_encoder(folder / encoder)
    names = ("Transformer", "Pooling", *further)
    places = [encoder, *(f"{i}_{name}" for i, name in enumerate(names[1:], 1))]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{name}"}
        for i, (place, name) in enumerate(zip(places, names, strict=True))
    ]
    modes = {f"pooling_mode_{mode}": mode == pooled for mode in _LEGACY}
    write = {
        "modules": modules,
        "1_Pooling/config": {"word_embedding_dimension": 32, **modes},
        f"{encoder}/sentence_bert_config".lstrip("/"): {"max_seq_length": 64, "do_lower_case": False},
        **files,
    }
    for name, content in write.items():
        (folder / f"{name}.json").parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def cosines_by_hand(folder: Path, tokenizer: Any, task: Task, pooled: str) -> torch.Tensor:
    """Of one sentence at a time, so that nothing is padded."""
    model = AutoModel.from_pretrained(folder).eval()

    def vector(text: str) -> torch.Tensor:
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return states[0] if pooled == "cls_token" else states.mean(0)

    with torch.no_grad():
        pairs = [(vector(row["sentence1"]), vector(row["sentence2"])) for row in task.rows("validation")]
        return torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pairs])


@pytest.mark.parametrize("pooled", ["cls_token", "mean_tokens", "mean_sqrt_len_tokens"])
def test_sentences_are_pooled_as_their_folder_says(tmp_path: Path, task: Task, pooled: str) -> None:
    folder = sentence_folder(tmp_path, pooled, further=("Normalize",))
    model, tokenizer = build_sentence_model(folder)
    wanted = cosines_by_hand(folder, tokenizer, task, pooled)
    found = sentence_similarity_score(model, tokenizer, task, progress=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    encoder = AutoModel.from_pretrained(folder).eval()
    kind = "cls" if pooled == "cls_token" else "mean"
    told = sentence_similarity_score(encoder, tokenizer, task, pooling=kind, progress=False).logits
    torch.testing.assert_close(told, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_padding_counts_for_nothing_wherever_it_stands(kind: Any) -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    whole = torch.ones(2, 3, dtype=torch.long)
    torch.testing.assert_close(
        Pooling(kind)(hidden, mask), Pooling(kind)(torch.stack([hidden[0, 2:], hidden[1, :3]]), whole)
    )


@pytest.mark.parametrize("pooled", ["cls", "mean"])
def test_scores_are_of_the_vectors_that_the_package_makes(tmp_path: Path, task: Task, pooled: Any) -> None:
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling as Theirs
    from sentence_transformers.models import Transformer

    tiny_encoder(tmp_path / "encoder")
    package.SentenceTransformer(
        modules=[Transformer(str(tmp_path / "encoder")), Theirs(32, pooling_mode=pooled)], device="cpu"
    ).save(str(tmp_path / "whole"))
    model, tokenizer = build_sentence_model(tmp_path / "whole")
    found = sentence_similarity_score(model, tokenizer, task, progress=False).logits
    theirs = package.SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    rows = task.rows("validation")
    a, b = (theirs.encode([row[k] for row in rows], normalize_embeddings=True) for k in ("sentence1", "sentence2"))
    np.testing.assert_allclose(found.numpy(), (a * b).sum(1), atol=1e-5)


def test_an_encoder_in_a_folder_of_its_own_is_found(tmp_path: Path, task: Task) -> None:
    folder = sentence_folder(tmp_path, "cls_token", encoder="0_Transformer")
    model, tokenizer = build_sentence_model(folder)
    found = sentence_similarity_score(model, tokenizer, task, progress=False).logits
    wanted = cosines_by_hand(folder / "0_Transformer", tokenizer, task, "cls_token")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_rows_are_cut_and_lowered_as_the_package_does(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    folder = sentence_folder(tmp_path, "cls_token")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": true}')
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    _, tokenizer = build_sentence_model(folder)
    texts = ["The FILM was kind", "the meal was dull and the hotel was dull and the song was dull ."]
    theirs = package.SentenceTransformer(str(folder), device="cpu").tokenizer
    found, wanted = (t(texts, truncation=True)["input_ids"] for t in (tokenizer, theirs))
    assert found == wanted and len(found[1]) == 9 and tokenizer.unk_token_id not in found[0]


@pytest.mark.parametrize("pooled", ["cls_token", "mean_tokens"])
def test_what_is_saved_pools_as_before(tmp_path: Path, pooled: str) -> None:
    package = pytest.importorskip("sentence_transformers")
    source = sentence_folder(tmp_path / "source", pooled, encoder="0_Transformer", further=("Normalize",))
    model, tokenizer = build_sentence_model(source)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    texts = ["the film was kind", "a meal"]
    found, wanted = (
        package.SentenceTransformer(str(tmp_path / n), device="cpu").encode(texts) for n in ("saved", "source")
    )
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert build_sentence_model(tmp_path / "saved")[0].pooling.kind == model.pooling.kind


def test_an_encoder_that_came_from_no_sentence_transformer_is_made_one_where_it_needs_to_be(tmp_path: Path) -> None:
    encoder = AutoModel.from_pretrained(tiny_encoder(tmp_path / "encoder"))
    for kind in ("mean", "cls"):
        SentenceRegression(encoder, 5.0, kind).save_pretrained(tmp_path / kind)  # type: ignore[arg-type]
        assert read_pooling(str(tmp_path / kind))[0].kind == kind
    assert not (tmp_path / "mean" / "modules.json").exists()  # stays an encoder for whatever head
    kept = SentenceRegression(encoder, 1.0, "cls").around(encoder)
    assert kept.pooling.kind == "cls" and kept.label_max == 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"1_Pooling/config": {"pooling_mode_max_tokens": True}}, "pools by max; only mean and cls"),
        ({"1_Pooling/config": {"pooling_mode": ["cls", "mean"]}}, "pools by cls and mean; only"),
        ({"further": ("Dense",)}, "makes its vectors by Transformer, Pooling, Dense; only"),
        ({"modules": [{"type": "mine.Whole", "path": ""}]}, "makes its vectors by mine.Whole; only"),
        ({"modules": []}, "modules.json of .* names no parts of a SentenceTransformer"),
        (
            {"config_sentence_transformers": {"prompts": {"q": "query: "}, "default_prompt_name": "q"}},
            "puts 'query: ' before every sentence",
        ),
    ],
)
def test_vectors_that_are_made_in_another_way_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    folder = sentence_folder(tmp_path, "mean_tokens", **change)
    with pytest.raises(ValueError, match=sentence):
        build_sentence_model(folder)


def test_a_whole_sentence_transformer_is_no_encoder(task: Task) -> None:
    with pytest.raises(TypeError, match="give what build_sentence_model"):
        sentence_similarity_score(torch.nn.Sequential(), None, task)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="pooling='max' is not known; use 'mean', or 'cls'"):
        Pooling("max")  # type: ignore[arg-type]


def test_where_the_hub_cannot_be_asked_the_mean_is_taken_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no way to the hub")

    monkeypatch.setattr("qbert.tasks.pooling.cached_file", unreachable)
    with pytest.warns(UserWarning, match=r"whether 'some/encoder' says how it pools .* \(no way to the hub\)"):
        assert read_pooling("some/encoder")[0] == Pooling("mean")
