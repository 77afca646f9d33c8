"""The scripts as a user runs them: what they write, what they refuse, and that an interrupt loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import EXPERIMENTS, run_here
from tiny_tasks import sentiment_rows, tiny_encoder, write_task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, a tiny task and a cache of its own."""
    folder = tmp_path_factory.mktemp("world")
    tiny_encoder(folder / "encoder")
    write_task(
        folder / "data",
        "sst2",
        {"train.jsonl.gz": sentiment_rows(96), "dev.jsonl.gz": sentiment_rows(40)},
    )
    return folder


def arguments_for(world: Path, *more: str) -> list[str]:
    return [
        *("--model", str(world / "encoder"), "--task", "sst2", "--data-dir", str(world / "data")),
        *("--output-dir", str(world / "out"), "--epochs", "1"),
        *more,
    ]


def run(world: Path, *more: str, script: str = "hessian_spectrum.py") -> subprocess.CompletedProcess[str]:
    return run_here(script, *arguments_for(world, *more), QBERT_CACHE=str(world / "cache"))


def in_a_process(world: Path, *more: str) -> list[str]:
    return [sys.executable, str(EXPERIMENTS / "hessian_spectrum.py"), *arguments_for(world, *more)]


def environment(world: Path) -> dict[str, str]:
    return {**os.environ, "QBERT_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_spectrum_script_writes_what_it_promises(world: Path) -> None:
    done = run(world, "--runs", "2", "--fraction", "0.2", "--output-dir", str(world / "first"))
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (world / "first").iterdir() if not p.name.startswith(".")}
    assert {"spectrum.json", "bits.json", "ptq.json", "spectrum.png", "landscape.png"} <= names
    for word in ("encoder.layer.0", "|mean|+std", "8 bits", "2/3 mixed", "2/4 mixed", "accuracy"):
        assert word in done.stdout
    spectrum = json.loads((world / "first" / "spectrum.json").read_text())
    assert len(spectrum["eigenvalues"]) == 2 and len(spectrum["names"]) == 2
    assert set(json.loads((world / "first" / "bits.json").read_text())["bits"].values()) == {2, 3}


def test_two_processes_give_the_numbers_of_one_and_tell_them_once(world: Path) -> None:
    settings = ("--runs", "2", "--fraction", "0.2", "--no-landscape", "--bound", "gap", "--confidence", "0.9")
    one = run(world, *settings, "--output-dir", str(world / "one"))
    assert one.returncode == 0, one.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*torchrun, *in_a_process(world, *settings, "--output-dir", str(world / "two"))[1:]]
    fresh = {**environment(world), "QBERT_CACHE": str(world / "fresh")}  # so that the first process has to fine-tune
    two = subprocess.run(arguments, capture_output=True, text=True, env=fresh, timeout=300)
    assert two.returncode == 0, two.stderr
    first, second = ((world / name / "spectrum.json").read_bytes() for name in ("one", "two"))
    assert first == second and json.loads(first)["settings"]["bound"] == "gap"
    assert {p.name for p in (world / "one").iterdir()} == {p.name for p in (world / "two").iterdir()}
    for line in ("|mean|+std", "written to", "fine-tuned (in"):
        assert two.stdout.count(line) == 1
    assert len(list((world / "fresh").iterdir())) == 1


def test_interrupt_and_resume_give_the_same_numbers(world: Path) -> None:
    settings = ("--runs", "6", "--fraction", "0.3", "--tol", "1e-3", "--no-landscape")
    whole = run(world, *settings, "--output-dir", str(world / "whole"))
    assert whole.returncode == 0, whole.stderr
    arguments = in_a_process(world, *settings, "--output-dir", str(world / "cut"))
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(world),
        # A test run in the background inherits an ignored SIGINT, which Python would then not turn into an interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if list((world / "cut").glob("spectrum.partial*")):
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    assert not (world / "cut" / "spectrum.json").exists()
    resumed = run(world, *settings, "--resume", "--output-dir", str(world / "cut"))
    assert resumed.returncode == 0, resumed.stderr
    first, second = (json.loads((world / f / "spectrum.json").read_text()) for f in ("whole", "cut"))
    assert first["eigenvalues"] == second["eigenvalues"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bits", "5"), "bits=(5,)"),
        (("--task", "mrpc"), "mrpc"),
        (("--data-dir", "/nowhere"), "/nowhere"),
        (("--model", "/nowhere/model"), "/nowhere/model"),
        (("--device", "cuda:7"), "--device cuda:7"),
        (("--output-dir", "/proc/nothing"), "--output-dir /proc/nothing"),
        (("--groups", "7"), "groups=7"),
        (("--fraction", "2"), "fraction"),
        (("--tol", "3"), "tol: 3"),
        (("--size-mb", "0.0001"), "size_mb"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(world: Path, more: tuple[str, ...], message: str) -> None:
    done = run(world, "--runs", "1", *more)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Top Hessian" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr


def test_labels_out_of_range_and_empty_data_are_refused_before_work(world: Path) -> None:
    rows = sentiment_rows(10)
    for name, train, message in (
        ("out-of-range", [{**rows[0], "label": 7}, *rows[1:]], "7"),
        ("empty", [], "empty|no rows"),
    ):
        write_task(world / name, "sst2", {"train.jsonl": train, "dev.jsonl": rows})
        done = run(world, "--data-dir", str(world / name))
        assert done.returncode == 2 and any(m in done.stderr for m in message.split("|")), done.stderr
        assert "Traceback" not in done.stderr


def test_ptq_table_script(world: Path) -> None:
    limited = ("--groups", "1", "4", "32", "--eval-limit", "40", "--peers")
    done = run(world, "--report", str(world / "ptq.md"), *limited, script="ptq_table.py")
    assert done.returncode == 0, done.stderr
    page = (world / "ptq.md").read_text()
    assert "| reviews | MB |" in page  # the score on another domain
    assert "least squares, 128 groups" in page and "| 4 bits, min-max |" in page
    assert "| 3 bits, GPTQ, a range a row |" in page


def test_sentence_pairs_without_fine_tuning(world: Path) -> None:
    # Each sentence of a pair is encoded apart: batches are [B, 2, T].
    rows = [
        {"sentence1": "the film was lovely .", "sentence2": f"a {word} film .", "label": score, "idx": i}
        for i, (word, score) in enumerate([("lovely", 5.0), ("dull", 0.5), ("superb", 4.0), ("rude", 1.0)] * 6)
    ]
    write_task(world / "pairs", "stsb", {"train.jsonl": rows, "dev.jsonl": rows})
    where = ("--task", "stsb", "--data-dir", str(world / "pairs"), "--output-dir", str(world / "pairs-out"))
    done = run(world, *where, "--no-fine-tune", "--runs", "2", "--fraction", "0.4", "--no-landscape")
    assert done.returncode == 0, done.stderr
    assert "spearman" in done.stdout and "as it is" in done.stdout
