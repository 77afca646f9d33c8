"""From a float encoder to a quantized one, guided by its Hessian: the whole of Q-BERT's first half in one command.

    python experiments/hessian_spectrum.py
    python experiments/hessian_spectrum.py --task sst2 --data-dir DATA --runs 10

1. fine-tunes the encoder on the task (cached; ``--no-fine-tune`` takes a sentence encoder as it is, for stsb);
2. measures the top Hessian eigenvalue of every encoder layer over several random subsets of the training data;
3. ranks the layers by |mean| + std and turns the ranking into bits;
4. quantizes after training at several widths and prints score and size.

Writes spectrum.json, bits.json, ptq.json, spectrum.png and landscape.png. Under five minutes on two CPU cores with no
argument. Reference: Shen et al. 2020, Q-BERT, sections 3.1-3.3, figures 1 and 2.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import add_task_arguments, positive, prepare_run, run_script

_DEFAULT_SAMPLES = 32


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--no-fine-tune", action="store_true", help="measure the model as it is (a tuned one, or stsb)")
    tuning.add_argument("--epochs", type=positive, help="passes over the training data; default: by task")
    tuning.add_argument("--train-limit", type=positive, help="tune on at most this many rows")
    tuning.add_argument("--eval-limit", type=positive, help="score on at most this many rows")
    hessian = parser.add_argument_group("Hessian")
    hessian.add_argument("--runs", type=positive, default=10, help="random data subsets; default: 10, as in the paper")
    hessian.add_argument(
        "--fraction",
        type=float,
        help=f"share of the training data in a subset; default: 0.1, at most {_DEFAULT_SAMPLES} rows",
    )
    hessian.add_argument("--granularity", default="layer", choices=("layer", "block", "matrix"), help="default: layer")
    hessian.add_argument("--method", default="lanczos", choices=("lanczos", "power", "ggn"), help="default: lanczos")
    hessian.add_argument("--tol", type=float, default=1e-2, help="relative error of an eigenvalue; default: 0.01")
    hessian.add_argument("--resume", action="store_true", help="go on after an interrupt, to the same numbers")
    hessian.add_argument("--no-landscape", action="store_true", help="skip the loss surfaces")
    bits = parser.add_argument_group("bits")
    bits.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="widths to allocate; default: 2 3")
    bits.add_argument(
        "--size-mb", type=float, help="allocate exactly under this many megabytes (10^6 bytes) instead of by rank"
    )
    bits.add_argument("--groups", type=positive, help="row groups a matrix; default: 128")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(task, model in eval mode, tokenizer), fine-tuned unless told otherwise.

    Everything asked for is tried on the untuned model first, so that a bad request fails before minutes of work.
    """
    from qbert.tasks import build_model, build_sentence_model, fine_tune, load_task

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
    tuned = fine_tune(
        task,
        arguments.model,
        device=arguments.device,
        epochs=arguments.epochs,
        train_limit=arguments.train_limit,
        seed=arguments.seed,
    )
    how = "from the cache" if tuned.from_cache else f"in {tuned.seconds:.0f} s"
    scores = ", ".join(f"{name} {tuned.scores[name]:.2f}" for name in task.metric_names)
    print(f"model  {arguments.model or 'the embedded MiniLM-L6'}, fine-tuned ({how}): {scores} on held-out data")
    return task, tuned.model.eval(), tuned.tokenizer


def check_request(arguments: argparse.Namespace, model: Any) -> None:
    """Refuse bits, groups, sizes and subsets that cannot work for this architecture.

    Raises:
        ValueError: naming the argument and what would do.
    """
    import qbert
    from qbert.targets import encoder_layers

    if arguments.fraction is not None and not 0 < arguments.fraction <= 1:
        raise ValueError(f"--fraction {arguments.fraction} is not a share of the data; use a number in (0, 1]")
    settings = {"groups": arguments.groups} if arguments.groups else {}
    equal = {name: 1.0 for name, _ in encoder_layers(model)}
    qbert.allocate_bits(equal, bits=tuple(arguments.bits), size_mb=arguments.size_mb, model=model, **settings)


def bits_configs(arguments: argparse.Namespace, spectrum: Any, model: Any) -> dict[str, Any]:
    """Label -> configuration of everything that is compared; the requested allocation is called ``chosen``."""
    import qbert

    settings = {"groups": arguments.groups} if arguments.groups else {}
    chosen = qbert.allocate_bits(
        spectrum, bits=tuple(arguments.bits), size_mb=arguments.size_mb, model=model, **settings
    )
    label = "/".join(map(str, arguments.bits)) + (f" in {arguments.size_mb:g} MB" if arguments.size_mb else " mixed")
    configs: dict[str, Any] = {f"{b} bits": qbert.BitsConfig(b, **settings) for b in (8, 4, 3, 2)}
    configs["2/3 mixed"] = qbert.allocate_bits(spectrum, bits=(2, 3), model=model, **settings)
    configs["2/4 mixed"] = qbert.allocate_bits(spectrum, bits=(2, 4), model=model, **settings)
    return {**configs, label: chosen, "chosen": chosen}


def main() -> None:
    """Fine-tune, measure, allocate, quantize, report."""
    arguments = parse_arguments()
    folder = prepare_run(arguments, "hessian_spectrum")
    import qbert
    from qbert.files import write_json
    from qbert.report import ptq_report, ptq_table, text_table
    from qbert.tasks import evaluate, prepare
    from qbert.tasks.evaluation import wants_pairs

    task, model, tokenizer = load(arguments)
    data = prepare(task, tokenizer, "train", as_pairs=wants_pairs(model))
    fraction = min(0.1, _DEFAULT_SAMPLES / len(data)) if arguments.fraction is None else arguments.fraction
    print(
        f"\nTop Hessian eigenvalue of every {arguments.granularity}, {arguments.runs} random subsets of "
        f"{max(1, round(fraction * len(data)))} of {len(data)} training examples:"
    )
    spectrum = qbert.hessian_spectrum(
        model,
        data,
        collate_fn=data.collate,
        runs=arguments.runs,
        fraction=fraction,
        granularity=arguments.granularity,
        method=arguments.method,
        tol=arguments.tol,
        seed=arguments.seed,
        checkpoint=folder / "spectrum.partial",
        resume=arguments.resume,
    )
    spectrum.save(folder / "spectrum.json")
    shutil.rmtree(folder / "spectrum.partial", ignore_errors=True)
    spectrum.plot(folder / "spectrum.png")
    configs = bits_configs(arguments, spectrum, model)
    chosen = configs.pop("chosen")
    chosen.save(folder / "bits.json")
    print(_spectrum_table(spectrum, chosen))
    if not arguments.no_landscape:
        _landscapes(model, data, spectrum, arguments, folder / "landscape.png")

    print(f"\nPost-training quantization, scored on {arguments.eval_limit or 'all'} held-out examples:")

    def score(candidate: Any) -> Any:
        split = task.evaluation_splits[0]
        return evaluate(candidate, task, tokenizer, split=split, limit=arguments.eval_limit, progress=False)

    results = ptq_report(model, configs, score)
    print(text_table(*ptq_table(results, task.primary_metric)))
    write_json(
        folder / "ptq.json",
        {"task": task.describe(), "metric": task.primary_metric, "rows": [asdict(r) for r in results]},
    )
    print(
        f"\nwritten to {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
    )


def _spectrum_table(spectrum: Any, config: Any) -> str:
    """The table of the spectrum with the bits that follow from it in a last column."""
    from qbert.report import text_table

    rank = {name: i for i, name in enumerate(spectrum.ranking(), 1)}
    rows = []
    for i, name in enumerate(spectrum.names):
        widths = sorted({config.rules[p]["bits"] for p in (name, *spectrum.members[name]) if p in config.rules})
        rows.append(
            (
                name,
                f"{spectrum.mean[i]:.4g}",
                f"{spectrum.std[i]:.4g}",
                f"{spectrum.sensitivity[i]:.4g}",
                rank[name],
                "/".join(map(str, widths)),
            )
        )
    table = text_table((spectrum.settings["granularity"], "mean", "std", "|mean|+std", "rank", "bits"), rows)
    return "\n".join([table, *spectrum.notes()])


def _landscapes(model: Any, data: Any, spectrum: Any, arguments: argparse.Namespace, path: Path) -> None:
    """Loss over the plane of the top two eigenvectors, for the most and the least sensitive block."""
    from qbert.hessian.landscape import loss_landscape, plot_landscapes

    ranking = spectrum.ranking()
    # 121 points a surface: a small sample keeps them to seconds, and its shape is what the picture is for.
    batches = data.batches(16, seed=arguments.seed)[:1]
    surfaces = [
        loss_landscape(model, batches, name, granularity=arguments.granularity, tol=5e-2, seed=arguments.seed)
        for name in (ranking[0], ranking[-1])
    ]
    plot_landscapes(surfaces, path)


if __name__ == "__main__":
    run_script(main, "add --resume to go on from there")
