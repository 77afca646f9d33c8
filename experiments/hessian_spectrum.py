"""From a float encoder to a quantized one, guided by its Hessian: the whole of Q-BERT's first half in one command.

    python experiments/hessian_spectrum.py
    python experiments/hessian_spectrum.py --task sst2 --data-dir DATA --runs 10
    torchrun --nproc_per_node=2 experiments/hessian_spectrum.py --task sst2 --data-dir DATA

1. fine-tunes the encoder on the task (cached; ``--no-fine-tune`` takes a sentence encoder as it is, for stsb);
2. measures the top Hessian eigenvalue of every encoder layer over several random subsets of the training data;
3. ranks the layers by |mean| + std and turns the ranking into bits;
4. quantizes after training at several widths, rounded to nearest and compensated, and prints score and size.

Writes spectrum.json, bits.json, ptq.json, spectrum.png and landscape.png. About four minutes on two CPU cores with no
argument. Under torchrun the processes share the blocks (gloo on CPUs, nccl with ``--device cuda``): the first one
fine-tunes, prints and writes, and the numbers are those of one process. Reference: Shen et al. 2020, Q-BERT, sections
3.1-3.3, figures 1 and 2.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qbert.cli.arguments import (
    add_task_arguments,
    add_tuning_arguments,
    fine_tuned,
    first_rank_first,
    positive,
    prepare_run,
    process_group,
    run_script,
)
from qbert.extras import require

_DEFAULT_SAMPLES = 32
_CALIBRATION_ROWS = 384
_DRAWS = 200


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    add_tuning_arguments(parser)
    parser.add_argument("--no-fine-tune", action="store_true", help="measure the model as it is (a tuned one, or stsb)")
    hessian = add_hessian_arguments(parser)
    hessian.add_argument("--resume", action="store_true", help="go on after an interrupt, to the same numbers")
    hessian.add_argument("--no-landscape", action="store_true", help="skip the loss surfaces")
    bits = parser.add_argument_group("bits")
    bits.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="widths to allocate; default: 2 3")
    bits.add_argument(
        "--size-mb", type=float, help="allocate exactly under this many megabytes (10^6 bytes) instead of by rank"
    )
    bits.add_argument("--groups", type=positive, help="row groups a matrix; default: 128")
    return parser.parse_args()


def add_hessian_arguments(parser: argparse.ArgumentParser) -> Any:
    """What is measured on which subsets and how exactly, with their help; returns the group."""
    hessian = parser.add_argument_group("Hessian")
    hessian.add_argument("--runs", type=positive, default=10, help="random data subsets; default: 10, as in the paper")
    hessian.add_argument(
        "--fraction",
        type=float,
        help=f"share of the training data in a subset; default: 0.1, at most {_DEFAULT_SAMPLES} rows",
    )
    hessian.add_argument(
        "--granularity",
        default="layer",
        choices=("layer", "block", "matrix", "group"),
        help="encoder layers, their halves, matrices, or the rows of heads; default: layer",
    )
    hessian.add_argument("--method", default="lanczos", choices=("lanczos", "power", "ggn"), help="default: lanczos")
    hessian.add_argument("--tol", type=float, default=1e-2, help="relative error of an eigenvalue; default: 0.01")
    hessian.add_argument(
        "--bound",
        default="residual",
        choices=("residual", "gap"),
        help="how the error is bounded: always true, or for fewer products where --tol is tight; default: residual",
    )
    hessian.add_argument(
        "--confidence", type=float, help="prove with this probability, such as 0.99, that nothing larger was missed"
    )
    return hessian


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(task, model in eval mode, tokenizer), fine-tuned unless told otherwise.

    Everything asked for is tried on the untuned model first, so that a bad request fails before minutes of work.
    """
    from qbert.tasks import build_model, build_sentence_model, load_task

    task = load_task(arguments.task, data_dir=arguments.data_dir)
    print(f"data   {task.describe()}")
    if arguments.no_fine_tune and task.kind == "regression":
        model, tokenizer = build_sentence_model(arguments.model)
    elif arguments.no_fine_tune and arguments.model is None:
        raise ValueError(f"--no-fine-tune needs --model with a head tuned for {task.name}, or --task stsb")
    else:
        model, tokenizer = build_model(task, arguments.model)
    check_request(arguments, model)
    if arguments.no_fine_tune:
        print(f"model  {arguments.model or 'the embedded MiniLM-L6'}, as it is")
        return task, model.to(arguments.device).eval(), tokenizer
    tuned = fine_tuned(task, arguments)
    return task, tuned.model.eval(), tuned.tokenizer


def check_request(arguments: argparse.Namespace, model: Any) -> None:
    """Refuse bits, groups, sizes, subsets and tolerances that cannot work for this architecture.

    Raises:
        ValueError: naming the argument and what would do.
    """
    import qbert
    from qbert.encoders.targets import encoder_layers

    check_hessian(arguments)
    equal = {name: 1.0 for name, _ in encoder_layers(model)}
    qbert.allocate_bits(equal, **requested(arguments, model))


def check_hessian(arguments: argparse.Namespace) -> None:
    """Refuse subsets and tolerances that cannot work for any model.

    Raises:
        ValueError: naming the argument and what would do.
    """
    from qbert.hessian.measure import checked_settings

    if arguments.fraction is not None and not 0 < arguments.fraction <= 1:
        raise ValueError(f"--fraction {arguments.fraction} is not a share of the data; use a number in (0, 1]")
    asked = {name: getattr(arguments, name) for name in ("runs", "method", "tol", "bound", "confidence", "seed")}
    checked_settings({**asked, "fraction": arguments.fraction or 0.1, "precision": "fp32", "max_products": 200})


def measure(task: Any, model: Any, tokenizer: Any, arguments: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """(training examples, `HessianSpectrum` of the model on random subsets of them)."""
    import qbert
    from qbert.tasks import prepare
    from qbert.tasks.evaluation import wants_pairs

    data = prepare(task, tokenizer, "train", as_pairs=wants_pairs(model))
    fraction = min(0.1, _DEFAULT_SAMPLES / len(data)) if arguments.fraction is None else arguments.fraction
    print(
        f"\nTop Hessian eigenvalue of every {arguments.granularity}, {arguments.runs} random subsets of "
        f"{max(1, round(fraction * len(data)))} of {len(data)} training examples:"
    )
    names = ("runs", "granularity", "method", "tol", "bound", "confidence", "seed", "resume")
    spectrum = qbert.hessian_spectrum(
        model,
        data,
        collate_fn=data.collate,
        fraction=fraction,
        checkpoint=folder / "spectrum.partial",
        **{name: getattr(arguments, name) for name in names},
    )
    return data, spectrum


def requested(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the command line asks of `allocate_bits`."""
    settings = {"groups": arguments.groups} if arguments.groups else {}
    return {"bits": tuple(arguments.bits), "size_mb": arguments.size_mb, "model": model, **settings}


def bits_configs(arguments: argparse.Namespace, spectrum: Any, model: Any) -> dict[str, Any]:
    """Label -> configuration of everything that is compared; the requested allocation is called ``chosen``."""
    import qbert

    settings = {"groups": arguments.groups} if arguments.groups else {}
    chosen = qbert.allocate_bits(spectrum, **requested(arguments, model))
    label = "/".join(map(str, arguments.bits)) + (f" in {arguments.size_mb:g} MB" if arguments.size_mb else " mixed")
    configs: dict[str, Any] = {f"{b} bits": qbert.BitsConfig(b, **settings) for b in (8, 4, 3, 2)}
    configs["2/3 mixed"] = qbert.allocate_bits(spectrum, bits=(2, 3), model=model, **settings)
    configs["2/4 mixed"] = qbert.allocate_bits(spectrum, bits=(2, 4), model=model, **settings)
    configs[label] = chosen
    compensated = {"rounding": "compensated", **settings}
    configs |= {f"{b} bits, compensated": qbert.BitsConfig(b, **compensated) for b in (3, 2)}
    configs[f"{label}, compensated"] = qbert.allocate_bits(
        spectrum, **requested(arguments, model), rounding="compensated"
    )
    return {**configs, "chosen": chosen}


def main() -> None:
    """Fine-tune, measure, allocate, quantize, report."""
    arguments = parse_arguments()
    require("matplotlib", "the picture")
    with process_group(arguments) as rank:
        folder = prepare_run(arguments, "hessian_spectrum")
        with first_rank_first(rank):
            task, model, tokenizer = load(arguments)
        data, spectrum = measure(task, model, tokenizer, arguments, folder)
    if rank > 0:
        return
    from other_domains import other_domains
    from ptq import ptq_report, ptq_table
    from ptq_table import calibration_batches

    import qbert
    from qbert.files import write_json
    from qbert.results import provenance, text_table
    from qbert.tasks import evaluate

    spectrum.save(folder / "spectrum.json")
    shutil.rmtree(folder / "spectrum.partial", ignore_errors=True)
    configs = bits_configs(arguments, spectrum, model)
    chosen = configs.pop("chosen")
    title = title_of(arguments.model, task.name)
    widths = {name: f"{bits} bits" for name, bits in _widths(spectrum, chosen).items() if bits}
    spectrum.plot(folder / "spectrum.png", title=title, notes=widths)
    chosen.save(folder / "bits.json")
    print(_spectrum_table(spectrum, chosen))
    if len(spectrum.eigenvalues) > 1:
        sure = qbert.bit_shares(spectrum, draws=_DRAWS, **requested(arguments, model))
        print(f"These bits come out of {100 * sure.same:.0f} % of {_DRAWS} random draws of the same runs.")
    if not arguments.no_landscape:
        landscapes(model, data, spectrum, arguments, folder / "landscape.png", title)

    print(f"\nPost-training quantization, scored on {arguments.eval_limit or 'all'} held-out examples:")

    def score(candidate: Any) -> Any:
        split = task.evaluation_splits[0]
        return evaluate(candidate, task, tokenizer, split=split, limit=arguments.eval_limit)

    domains = other_domains(task, tokenizer, data_dir=arguments.data_dir, limit=arguments.eval_limit or 1000)
    results = ptq_report(
        model,
        configs,
        score,
        calibration_data=calibration_batches(task, model, tokenizer, _CALIBRATION_ROWS, arguments.seed),
        elsewhere={domain.name: domain.evaluate for domain in domains},
    )
    print(text_table(*ptq_table(results, task.primary_metric)))
    print(
        f"compensated: codes chosen for the outputs on {_CALIBRATION_ROWS} unlabelled training rows; the rest: nearest"
    )
    write_json(
        folder / "ptq.json",
        {
            "task": task.describe(),
            "metric": task.primary_metric,
            "made by": provenance(),
            "rows": [asdict(r) for r in results],
        },
    )
    print(
        f"\nwritten to {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
    )


def title_of(model: str | None, task: str) -> str:
    """What a picture shows: the encoder by its hub name or the name of its folder, and the task."""
    name = Path(model).name if model and Path(model).is_dir() else model
    return f"{name or 'MiniLM-L6'} on {task}"


def _widths(spectrum: Any, config: Any) -> dict[str, str]:
    """Block -> the bits that follow from its rank."""
    return {
        name: "/".join(
            map(str, sorted({config.rules[p]["bits"] for p in (name, *spectrum.members[name]) if p in config.rules}))
        )
        for name in spectrum.names
    }


def _spectrum_table(spectrum: Any, config: Any) -> str:
    """The table of the spectrum with the bits that follow from it in a last column."""
    from qbert.results import text_table

    rank = {name: i for i, name in enumerate(spectrum.ranking(), 1)}
    rows = []
    widths = _widths(spectrum, config)
    for i, name in enumerate(spectrum.names):
        rows.append(
            (
                name,
                f"{spectrum.mean[i]:.4g}",
                f"{spectrum.std[i]:.4g}",
                f"{spectrum.sensitivity[i]:.4g}",
                rank[name],
                widths[name],
            )
        )
    table = text_table((spectrum.settings["granularity"], "mean", "std", "|mean|+std", "rank", "bits"), rows)
    return "\n".join([table, *spectrum.notes()])


def landscapes(
    model: Any, data: Any, spectrum: Any, arguments: argparse.Namespace, path: Path, title: str, steps: int = 15
) -> None:
    """Loss over the plane of the top two eigenvectors, for the most and the least sensitive block."""
    from qbert.hessian.landscape import loss_landscape
    from qbert.plots import plot_landscapes

    ranking = spectrum.ranking()
    # Hundreds of points a surface: a small sample keeps them short, and its shape is what the picture is for.
    batches = data.batches(16, seed=arguments.seed)[:1]
    surfaces = [
        loss_landscape(
            model, batches, name, granularity=arguments.granularity, steps=steps, tol=5e-2, seed=arguments.seed
        )
        for name in (ranking[0], ranking[-1])
    ]
    plot_landscapes(surfaces, path, spectrum=spectrum, title=title)


if __name__ == "__main__":
    run_script(main, "add --resume to go on from there")
