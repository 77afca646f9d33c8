"""A model with the right head for a task.

    >>> model, tokenizer = build_model(task)                              # the embedded MiniLM with a new head
    >>> model, tokenizer = build_model(task, "bert-base-uncased")

Missing encoder weights are an error here, not a warning: transformers would go on with random ones.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from qbert.tasks.embedded import embedded_encoder
from qbert.tasks.evaluation import Evaluation, evaluate
from qbert.tasks.pooling import Kind, Pooling, as_read, read_pooling
from qbert.tasks.task import Task

_AUTO_CLASS = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "span": transformers.AutoModelForQuestionAnswering,
}


def build_model(
    task: Task, model_name_or_path: str | Path | None = None, *, seed: int = 0, tuned: bool = False
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) for `task`; a head that the checkpoint lacks is drawn by `seed`.

    A checkpoint that was already tuned for the same labels in another order has the rows of its head put into the
    task's order, so that class i means `task.label_names[i]` everywhere.

    Args:
        task: decides head, number of labels and label maps.
        model_name_or_path: hub name or folder; the embedded MiniLM where None.
        tuned: the model is to be used as it is, so a head that the checkpoint lacks is refused.

    Raises:
        ValueError: the checkpoint is damaged, lacks encoder weights (or, if `tuned`, the head), or has a head for other
            labels, or a quantized one for the same labels in another order.
        FileNotFoundError: no such model (or no package for the embedded one).
    """
    source = str(model_name_or_path or embedded_encoder())
    config = load_quietly(transformers.AutoConfig, source)
    own_names = _own_label_names(config)
    order = _label_order(own_names, task, source)
    config.num_labels = max(len(task.label_names), 1) if task.kind != "span" else 2
    if task.label_names:
        names = task.label_names if order is None else [task.label_names[i] for i in order]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    if task.kind in ("classification", "regression"):
        config.problem_type = "single_label_classification" if task.kind == "classification" else "regression"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = load_quietly(_AUTO_CLASS[task.kind], source, config=config, output_loading_info=True)
    _refuse_incomplete(model, report, source, task)
    if tuned and report["missing_keys"]:
        raise ValueError(
            f"model {source!r} has no head tuned for task {task.name!r} (missing: {min(report['missing_keys'])}); "
            "name a fine-tuned checkpoint, or have it fine-tuned"
        )
    if order is not None:
        _reorder_head(model, order, task)
    return model.eval(), load_quietly(transformers.AutoTokenizer, source)


def load_quietly(auto_class: Any, source: str, **arguments: Any) -> Any:
    """``auto_class.from_pretrained`` without its load report and bars, its failures as one sentence.

    Raises:
        ValueError: the file is damaged or of another format.
        FileNotFoundError: nothing of that name here, in the cache or on the hub.
    """
    from safetensors import SafetensorError

    arguments.setdefault("trust_remote_code", False)  # else a question comes up where the model brings code
    try:
        with quiet_libraries():
            return auto_class.from_pretrained(source, **arguments)
    except SafetensorError as error:
        raise ValueError(f"the weights of {source!r} are damaged ({error}); fetch or save them again") from error
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"the folder {source!r} holds no loadable model: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"model {source!r} is neither a folder nor a model that the hub gives ({_first_line(error)}); "
            "check the name, or go online once to fetch it"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"model {source!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _own_label_names(config: Any) -> tuple[str, ...] | None:
    """The names of the labels that a checkpoint was tuned for; None where it names none."""
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered


def _label_order(own: tuple[str, ...] | None, task: Task, source: str) -> list[int] | None:
    """For each output of the checkpoint's head the task's label; None where they agree or the head is new."""
    if own is None or not task.label_names:
        return None
    wanted = [name.lower() for name in task.label_names]
    given = [name.lower() for name in own]
    if sorted(given) != sorted(wanted):
        raise ValueError(
            f"model {source!r} was tuned for the labels {', '.join(own)}, task {task.name!r} has "
            f"{', '.join(task.label_names)}; name a base model, or one tuned for this task"
        )
    return None if given == wanted else [wanted.index(name) for name in given]


def _refuse_incomplete(model: Any, report: dict[str, Any], source: str, task: Task) -> None:
    prefix = model.base_model_prefix + "."
    # the pooler belongs to the head: checkpoints of plain or masked-language encoders do not have one
    lost = sorted(key for key in report["missing_keys"] if key.startswith(prefix) and ".pooler." not in key)
    if lost:
        raise ValueError(
            f"model {source!r} lacks {len(lost)} encoder weights of {type(model).__name__} (first: {lost[0]}); "
            "transformers would fill them with random numbers; name a complete checkpoint"
        )
    if report["mismatched_keys"] or report["error_msgs"]:
        raise ValueError(
            f"model {source!r} has a head of another shape than task {task.name!r} needs; name a base model"
        )


def _reorder_head(model: Any, order: list[int], task: Task) -> None:
    heads = [m for m in model.modules() if getattr(m, "out_features", None) == len(order)]
    if not heads or not isinstance(heads[-1], nn.Linear):
        raise ValueError(
            f"the head for {', '.join(task.label_names)} has its outputs in another order and is no nn.Linear whose "
            "rows could be moved; quantize the model with its head in float, or with its labels in this order"
        )
    head = heads[-1]
    rows = torch.tensor([order.index(i) for i in range(len(order))])
    with torch.no_grad():
        head.weight.copy_(head.weight[rows])
        if head.bias is not None:
            head.bias.copy_(head.bias[rows])
    model.config.id2label = dict(enumerate(task.label_names))
    model.config.label2id = {name: i for i, name in enumerate(task.label_names)}


class SentenceRegression(nn.Module):
    """Cosine of two sentence vectors, with the squared error to the label as its loss.

    Args:
        backbone: any transformers encoder that gives `last_hidden_state`.
        label_max: the label that stands for the same meaning (5 in STS-B); labels are divided by it.
        pooling: "mean" over the tokens, "cls" for the first one's state, or what `read_pooling` found.

    Raises:
        ValueError: another `pooling`.
    """

    encodes_pairs_apart = True  # tells `evaluate` and `prepare` which batch this model reads

    def __init__(
        self, backbone: transformers.PreTrainedModel, label_max: float = 5.0, pooling: Kind | Pooling = "mean"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.label_max = label_max
        self.pooling = pooling if isinstance(pooling, Pooling) else Pooling(pooling)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    def embed(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Unit vectors [N, D] of N sentences given as tokens [N, T] with their attention mask [N, T]."""
        return self.pooling(self.backbone(**inputs).last_hidden_state, inputs["attention_mask"])

    def around(self, backbone: transformers.PreTrainedModel) -> SentenceRegression:
        """Another encoder, whose sentences are pooled and compared in the same way."""
        return SentenceRegression(backbone, self.label_max, self.pooling).train(self.training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder, and beside it how its sentences are pooled: as a SentenceTransformer, or by cls."""
        self.backbone.save_pretrained(folder)
        self.pooling.save(folder, self.config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """``loss`` (where labels [B] are given) and ``logits``, the cosines [B], of pairs: every input [B, 2, T].

        ``hidden_states`` [2 B, T, D] where they are asked for, as the encoder gives them.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        flat: dict[str, Any] = {key: value.flatten(0, 1) for key, value in inputs.items() if value is not None}
        encoded = self.backbone(**flat, **({"output_hidden_states": True} if output_hidden_states else {}))
        vectors = self.pooling(encoded.last_hidden_state, flat["attention_mask"])  # [2 B, D]
        first, second = vectors.view(-1, 2, vectors.shape[-1]).unbind(1)
        cosine = (first * second).sum(-1)  # [B]
        loss = None if labels is None else F.mse_loss(cosine, labels.to(cosine.dtype) / self.label_max)
        states = {"hidden_states": encoded.hidden_states} if output_hidden_states else {}
        return ModelOutput(loss=loss, logits=cosine, **states)


def build_sentence_model(model_name_or_path: str | Path | None = None, *, label_max: float = 5.0) -> tuple[Any, Any]:
    """(SentenceRegression in eval mode, tokenizer); the embedded MiniLM where no model is named.

    Sentences are pooled as the files of a SentenceTransformer say, and by the mean where there are none.

    Raises:
        ValueError, FileNotFoundError: as `load_quietly` and `read_pooling`.
    """
    source = str(model_name_or_path or embedded_encoder())
    pooling, encoder = read_pooling(source)
    backbone = load_quietly(transformers.AutoModel, source, subfolder=encoder)
    tokenizer = load_quietly(transformers.AutoTokenizer, source, subfolder=encoder)
    return SentenceRegression(backbone, label_max, pooling).eval(), as_read(tokenizer, pooling)


def sentence_similarity_score(
    model: nn.Module, tokenizer: Any, task: Task, *, pooling: Kind | Pooling = "mean", **options: Any
) -> Evaluation:
    """Pearson and Spearman (-100 to 100) between the cosines of a task's sentence pairs and its labels.

    Args:
        model: a `SentenceRegression`, or an encoder (or a model with a head, whose encoder is taken).
        task: pairs with a numeric label, for instance stsb.
        pooling: of an encoder, as in `SentenceRegression`, which knows its own.
        options: as `evaluate` (split, batch_size, limit, device, progress, ...).

    Raises:
        ValueError: the task has no pairs of sentences with a numeric label. TypeError: a SentenceTransformer.
    """
    if task.kind != "regression":
        raise ValueError(f"sentence similarity needs pairs with a number as label, task {task.name!r} is {task.kind}")
    if isinstance(model, nn.Sequential):
        raise TypeError("model: of a SentenceTransformer give what build_sentence_model(its folder) returns")
    if not getattr(model, "encodes_pairs_apart", False):
        label_max = task.label_range[1] if task.label_range else 1.0
        encoder: Any = getattr(model, "base_model", model)
        model = SentenceRegression(encoder, label_max, pooling).train(model.training)
    return evaluate(model, task, tokenizer, **options)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings or bars of transformers, no retry messages of the hub client inside; restored afterwards."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
