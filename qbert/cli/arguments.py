"""What every experiment does alike: arguments for model and data, early refusals, one clear sentence for an error.

Exit codes: 0 done, 2 something in the request cannot work (one sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qbert.extras import MissingPackageError

_LONG = 120


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model --task --data-dir --device --threads --seed --output-dir``, with their help."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", help="hub name or local folder; default: the embedded MiniLM-L6")
    group.add_argument(
        "--task", default="reviews", help="embedded corpus (reviews) or sst2, mrpc, stsb, ...; default: reviews"
    )
    group.add_argument(
        "--data-dir", help="folder with one sub-folder of jsonl(.gz) files a task; default: the hub, by name"
    )
    group.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda; default: cpu")
    group.add_argument("--threads", type=positive, help="CPU threads; default: torch's own choice")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random; default: 0")
    group.add_argument("--output-dir", help="where results are written; default: outputs/<script>-<task>")


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """``--epochs --bf16 --train-limit --eval-limit``, with their help."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--bf16", action="store_true", help="tune in bfloat16, where the device computes it")
    group.add_argument("--epochs", type=positive, help="passes over the training data; default: by task")
    group.add_argument("--train-limit", type=positive, help="tune on at most this many rows")
    group.add_argument("--eval-limit", type=positive, help="score on at most this many held-out rows")


def check_training(arguments: argparse.Namespace) -> None:
    """Refuse a teacher that is not there, and passes or a rate that cannot train a student.

    Raises:
        ValueError: naming the argument and the mend.
    """
    if arguments.no_fine_tune and arguments.model is None:
        raise ValueError("--no-fine-tune needs --model, a checkpoint that is fine-tuned on the task")
    if not arguments.epochs > 0:
        raise ValueError(f"--epochs {arguments.epochs:g} is not possible; use a positive number")
    if arguments.learning_rate is not None and not 0 < arguments.learning_rate < 1:
        raise ValueError(f"--learning-rate {arguments.learning_rate:g} is not possible; use a number such as 1e-4")


def fine_tuned(task: Any, arguments: argparse.Namespace) -> Any:
    """The `FineTuned` encoder of the arguments, from the cache if it is there; says how and how good it is."""
    from qbert.tasks import fine_tune

    tuned = fine_tune(
        task,
        arguments.model,
        device=arguments.device,
        epochs=arguments.epochs,
        train_limit=arguments.train_limit,
        seed=arguments.seed,
        bf16=getattr(arguments, "bf16", False),
    )
    how = "from the cache" if tuned.from_cache else f"in {tuned.seconds:.0f} s"
    scores = ", ".join(f"{name} {tuned.scores[name]:.2f}" for name in task.metric_names)
    print(f"model  {arguments.model or 'the embedded MiniLM-L6'}, fine-tuned ({how}): {scores} on held-out data")
    return tuned


def subject_of(task: Any, model: Any) -> dict[str, str]:
    """What the numbers of a record are of: the rows trained and scored on, and the weights, as digests."""
    from qbert.hessian.checkpoint import model_fingerprint

    splits = {"training data": "train", "held-out data": task.evaluation_splits[0]}
    return {name: task.fingerprint(split) for name, split in splits.items()} | {"weights": model_fingerprint(model)}


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible; use a whole number of at least 1")
    return value


def prepare_run(arguments: argparse.Namespace, script: str) -> Path:
    """Set threads, check the device, and make sure that results can be written, before any work.

    Returns:
        The output folder.

    Raises:
        ValueError: no such device; PermissionError or NotADirectoryError: the folder cannot be written.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    check_device(arguments.device)
    folder = Path(arguments.output_dir or Path("outputs") / f"{script}-{arguments.task}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"--output-dir {folder} cannot be written ({error.strerror}); name another folder"
        ) from error
    return folder


@contextlib.contextmanager
def process_group(arguments: argparse.Namespace) -> Iterator[int]:
    """Inside, the processes that torchrun started are joined (gloo on CPUs, nccl on GPUs); gives this one's rank.

    Each process of a machine takes a GPU of its own. Those after the first print nothing. Without torchrun nothing is
    set up, and the rank is 0. At the end all wait for each other and leave the group: a process that ends while
    others still talk to it takes them down.
    """
    if "LOCAL_RANK" not in os.environ:
        yield 0
        return
    import torch.distributed as dist

    on_gpu = torch.device(arguments.device).type == "cuda"
    if on_gpu:
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(arguments.device)
        torch.cuda.set_device(arguments.device)
    # Long, since the others wait while the first one fine-tunes.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=2))
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield dist.get_rank()
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_rank_first(rank: int) -> Iterator[None]:
    """The first process runs the body while the others wait; then they do, and find in the cache what it made."""
    import torch.distributed as dist

    joined = dist.is_available() and dist.is_initialized()
    if joined and rank > 0:
        dist.barrier()
    yield
    if joined and rank == 0:
        dist.barrier()


def run_script(main: Callable[[], None], resume_hint: str | Callable[[], str] = "") -> None:
    """Run `main`; turn what the user can mend into one sentence, and an interrupt into a hint how to go on.

    The hint may be a function, called when it is needed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a pipe or a file too, where lines would come minutes late
    try:
        main()
    except KeyboardInterrupt:
        hint = resume_hint if isinstance(resume_hint, str) else resume_hint()
        print(f"\ninterrupted; {hint or 'run the same command again'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, ArithmeticError, MissingPackageError) as error:
        if os.environ.get("QBERT_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def check_device(device: str) -> None:
    """Raise ValueError where torch cannot compute on `device`."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        why = f" ({why})" if len(why) < _LONG else ""  # torch names twenty kinds of device for a name it does not know
        raise ValueError(f"--device {device} is not usable here{why}; use cpu, or cuda where there is a GPU") from error
