"""The score-against-size comparison of post-training quantization, which two scripts print.

>>> rows = ptq_report(model, {"4 bits": 4, "2/3 mixed": bits}, score=lambda m: evaluate(m, task, tokenizer))
>>> print(text_table(*ptq_table(rows, "accuracy")))
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qbert.bits import BitsConfig
from qbert.encoders.inputs import unmasked
from qbert.encoders.targets import base_model
from qbert.progress import progress_bar, write
from qbert.quantize import quantize_model
from qbert.results import Record
from qbert.sizes import model_size
from qbert.tasks.evaluation import fidelity, wants_pairs


@dataclass(frozen=True)
class PTQResult:
    """One row of a post-training comparison.

    Attributes:
        label: what was done, such as "4 bits".
        score: primary metric, 0 to 100.
        retention: score in percent of the float model's.
        standard_error: of the score over the held-out examples (bootstrap); ``None`` if not asked for.
        agreement: percent of held-out examples that get the float model's class; ``None`` without classes.
        divergence: mean KL(float || quantized) of the outputs in nats; for numbers, their mean squared difference.
        hidden_error: relative error of the encoder's last hidden states, padding left out; ``None`` if not asked for.
        embedding_error: mean 1 - cosine to the float model of each row's mean last hidden state; likewise. Ranks do not
            tell that embeddings collapse, and thresholds that users set on cosines do not survive it.
        cosines: mean and standard deviation of the outputs, where those are the cosines of pairs.
        megabytes: exact size of the packed tensors, 10^6 bytes.
        ratio: how many times smaller than the float model, everything counted.
        seconds: time to quantize.
        elsewhere: score by name of another domain.
    """

    label: str
    score: float
    retention: float
    standard_error: float | None
    agreement: float | None
    divergence: float
    hidden_error: float | None
    embedding_error: float | None
    cosines: tuple[float, float] | None
    megabytes: float
    ratio: float
    seconds: float
    elsewhere: Mapping[str, float] = field(default_factory=dict)


def ptq_report(
    model: nn.Module,
    configs: Mapping[str, int | Mapping[str, Any] | BitsConfig],
    score: Callable[[nn.Module], Any],
    *,
    calibration_data: Any = None,
    standard_error: Callable[[Any], float] | None = None,
    hidden: bool = False,
    record: Record | None = None,
    elsewhere: Mapping[str, Callable[[nn.Module], Any]] | None = None,
    others: Mapping[str, Callable[[], tuple[nn.Module, float]]] | None = None,
    progress: bool = False,
) -> list[PTQResult]:
    """Score `model` in float and quantized under each configuration.

    Args:
        model: a float model.
        configs: label -> bits configuration.
        score: returns an `Evaluation` (with ``primary`` and ``logits``) of a model.
        calibration_data: as in `quantize_model`; given to configurations with compensated rounding only, so that
            the others keep ranges per token.
        standard_error: returns that of an `Evaluation`'s primary metric, such as `bootstrap`.
        hidden: compare the last hidden states too.
        record: keeps every row; those that are there already are not computed again.
        elsewhere: like `score`, on the rows of other domains by name.
        others: label -> what makes a model in another way, and tells its size in MB.
        progress: show a bar over the configurations, and each row when it is there.

    Returns:
        The float model's row, then one row a configuration and one of `others`, in the given order.
    """
    made: dict[str, Callable[[], tuple[nn.Module, float]]] = {
        label: partial(_quantized, model, config, calibration_data) for label, config in configs.items()
    }
    made |= others or {}
    if record is not None and all(label in record for label in ("float", *made)):
        return [_from_record(record, label) for label in ("float", *made)]
    states: list[_States] = []
    with _last_hidden(model, states if hidden else None):
        reference = score(model)
    size, wanted = model_size(model), list(states)
    error = standard_error(reference) if standard_error else None
    pairs = wants_pairs(model)
    domains = elsewhere or {}
    plain = PTQResult(
        label="float",
        score=reference.primary,
        retention=100.0,
        standard_error=error,
        agreement=None,
        divergence=0.0,
        hidden_error=None,
        embedding_error=None,
        cosines=_cosines(reference) if pairs else None,
        megabytes=size.mb,
        ratio=1.0,
        seconds=0.0,
        elsewhere={name: scored(model).primary for name, scored in domains.items()},
    )
    results = [plain]
    if record is not None and "float" not in record:
        record.add("float", asdict(plain))
    for label, make in progress_bar(made.items(), desc="quantized", disable=not progress):
        if record is not None and label in record:
            results.append(_from_record(record, label))
            continue
        start = time.perf_counter()
        student, megabytes = make()
        seconds = time.perf_counter() - start
        states.clear()
        with _last_hidden(student, states if hidden else None):
            result = score(student)
        row = PTQResult(
            label=label,
            score=result.primary,
            retention=100.0 * result.primary / reference.primary if reference.primary else float("nan"),
            standard_error=standard_error(result) if standard_error else None,
            agreement=_agreement(reference, result),
            divergence=fidelity(reference.logits, result.logits).divergence,
            hidden_error=_relative_error(wanted, states) if hidden else None,
            embedding_error=_embedding_error(wanted, states) if hidden else None,
            cosines=_cosines(result) if pairs else None,
            megabytes=megabytes,
            ratio=size.mb / megabytes,
            seconds=seconds,
            elsewhere={name: scored(student).primary for name, scored in domains.items()},
        )
        results.append(row)
        if record is not None:
            record.add(label, asdict(row))
        if progress:
            write(", ".join(f"{k} {v}" for k, v in zip(*_one_row(row), strict=True) if v))
    return results


def _quantized(model: nn.Module, config: Any, calibration_data: Any) -> tuple[nn.Module, float]:
    """The model in a configuration, and its size in MB."""
    parsed = BitsConfig.parse(config)
    compensated = any("compensated" in s.values() for s in (parsed.defaults, *parsed.rules.values()))
    student = quantize_model(model, parsed, calibration_data=calibration_data if compensated else None)
    return student, model_size(student).mb


def _from_record(record: Record, label: str) -> PTQResult:
    (row,) = record[label]
    return PTQResult(**row | {"cosines": row["cosines"] and tuple(row["cosines"])})


def _cosines(result: Any) -> tuple[float, float]:
    values = result.logits.double()
    return float(values.mean()), float(values.std())


def _one_row(result: PTQResult) -> tuple[list[str], list[str]]:
    header, (row,) = ptq_table([result], "score")
    return header, row


class _States(NamedTuple):
    """Last hidden states of a batch without padding [N, D], and their means a row [B, D]."""

    tokens: Tensor
    means: Tensor


@contextlib.contextmanager
def _last_hidden(model: nn.Module, states: list[_States] | None) -> Iterator[None]:
    """Inside, the last hidden states of every forward pass are added to `states`."""
    if states is None:
        yield
        return

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden, mask = output[0].detach(), kwargs.get("attention_mask")
        real = torch.ones(hidden.shape[:2]) if mask is None else mask
        share = real.to(hidden).unsqueeze(-1)
        means = (hidden * share).sum(1) / share.sum(1).clamp_min(1.0)
        states.append(_States(unmasked(hidden, mask), means))

    handle = base_model(model)[1].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _relative_error(wanted: Sequence[_States], found: Sequence[_States]) -> float:
    off = sum(float((a.tokens - b.tokens).square().sum()) for a, b in zip(wanted, found, strict=True))
    return float((off / sum(float(a.tokens.square().sum()) for a in wanted)) ** 0.5)


def _embedding_error(wanted: Sequence[_States], found: Sequence[_States]) -> float:
    ones, others = (torch.cat([s.means for s in states]) for states in (wanted, found))
    return float((1.0 - torch.cosine_similarity(ones, others)).mean())


def bootstrap(task: Any, rows: Sequence[Mapping[str, Any]], draws: int = 200) -> Callable[[Any], float]:
    """The standard error of a task's primary metric over its held-out `rows`, as a function of an `Evaluation`."""
    read = {"token": lambda row: row["tags"], "span": lambda row: row["answers"]["text"]}.get(
        task.kind, lambda row: row["label"]
    )
    references = [read(row) for row in rows]

    def error(result: Any) -> float:
        generator, found = np.random.default_rng(0), []
        for _ in range(draws):
            chosen = generator.integers(0, len(references), len(references))
            predictions = [result.predictions[i] for i in chosen]
            whole = predictions if task.kind in ("token", "span") else np.array(predictions)
            found.append(task.score(whole, [references[i] for i in chosen])[task.primary_metric])
        return float(np.std(found))

    return error


def ptq_table(results: Sequence[PTQResult], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows for `text_table` or `markdown_table`."""
    hidden = any(r.hidden_error is not None for r in results)
    header = ["weights", metric, "of float", "same class", "divergence"]
    header += ["hidden error", "1 - cosine"] if hidden else []
    pairs = any(r.cosines is not None for r in results)
    header += ["cosines of pairs"] if pairs else []
    domains = list(dict.fromkeys(name for r in results for name in r.elsewhere))
    header += [*domains, "MB", "smaller"]
    rows = [
        [
            r.label,
            f"{r.score:.2f}" + ("" if r.standard_error is None else f" +- {r.standard_error:.2f}"),
            f"{r.retention:.1f} %",
            "" if r.agreement is None else f"{r.agreement:.1f} %",
            f"{r.divergence:.4f}" if r.label != "float" else "",
            *([_told(r.hidden_error), _told(r.embedding_error)] if hidden else []),
            *(["" if r.cosines is None else "{:.2f} +- {:.2f}".format(*r.cosines)] if pairs else []),
            *(f"{r.elsewhere[name]:.2f}" if name in r.elsewhere else "" for name in domains),
            f"{r.megabytes:.1f}",
            f"{r.ratio:.1f}x",
        ]
        for r in results
    ]
    return header, rows


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _agreement(reference: Any, result: Any) -> float | None:
    expected, got = reference.logits, result.logits
    if expected.dim() != 2 or expected.shape != got.shape or expected.shape[1] < 2 or expected.shape[1] > 100:
        return None
    return 100.0 * float((expected.argmax(1) == got.argmax(1)).to(torch.float32).mean())
