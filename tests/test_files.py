"""What is written is whole, flushed, named by nobody else, and refused when it comes back another."""

import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qbert import files

CONTENT = {"format": "x/1", "numbers": [0.1, -2.0, 1e22], "inner": {"b": None, "a": "é"}}


def flips(content: bytes, count: int, seed: int = 0) -> list[bytes]:
    chance, found = random.Random(seed), []
    for _ in range(count):
        changed = bytearray(content)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        found.append(bytes(changed))
    return found


def test_json_comes_back_without_its_digest(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", CONTENT)
    assert files.read_json(tmp_path / "a.json") == CONTENT
    assert len(json.loads((tmp_path / "a.json").read_text())[files.SEAL]) == 64


def test_a_file_without_a_digest_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(CONTENT))
    assert files.read_json(tmp_path / "old.json") == CONTENT


def test_no_flipped_bit_of_a_json_file_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, CONTENT)
    for changed in flips(path.read_bytes(), 600):
        path.write_bytes(changed)
        try:
            assert files.read_json(path) == CONTENT
        except ValueError as error:
            assert str(path) in str(error)


def test_no_flipped_bit_of_a_tensor_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"x": torch.arange(30.0)}, {"step": "3"})
    assert files.check_tensors(path) == {"step": "3"}
    assert torch.equal(load_file(path)["x"], torch.arange(30.0))
    for changed in flips(path.read_bytes(), 400):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            files.check_tensors(path)


@pytest.mark.parametrize("text", ["[" * 10_000 + "]" * 10_000, '{"a": ' + "9" * 5000 + "}", '{"a": 1', "\x00"])
def test_hostile_json_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")


def test_threads_that_write_one_path_never_meet(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def work(own: int) -> None:
        try:
            for _ in range(60):
                files.write_json(tmp_path / "a.json", {"own": own, "long": list(range(300))})
                files.read_json(tmp_path / "a.json")
        except (OSError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill a process in the middle")
def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path) -> None:
    def die(aside: Path) -> None:
        aside.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        files.write_whole(tmp_path / "a[1].txt", die)
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    files.write_whole(tmp_path / "a[1].txt", lambda aside: aside.write_text("whole"))
    assert [p.name for p in tmp_path.iterdir()] == ["a[1].txt"]


def test_what_another_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / files.own_name("", ".part.a.txt").replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
    elsewhere = tmp_path / ".00000000-1-00000000.part.a.txt"
    for path in (other, elsewhere):
        path.touch()
    files.write_whole(tmp_path / "a.txt", lambda aside: aside.write_text("whole"))
    assert other.exists() and elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    files.write_whole(tmp_path / "a.txt", lambda aside: aside.write_text("whole"))
    assert other.exists() and not elsewhere.exists()


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    files.write_json(tmp_path / "a.json", {})
    assert done[:2] == ["fsync", "replace"]


def full(path: Path) -> Any:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("older")
    with pytest.raises(OSError, match=r"a\.json cannot be written \(No space left on device\); make room") as caught:
        files.write_whole(tmp_path / "a.json", full)
    assert caught.value.errno == 28 and (tmp_path / "a.json").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 1
