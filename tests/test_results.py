"""Records of what was asked and found: resumed, refused when they are of something else, never half read."""

import json
from pathlib import Path

import pytest

from qbert.results import Record

ASKED = {"model": "minilm", "widths": (2, 3), "limit": None}


def test_an_interrupted_record_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    first = Record(path, ASKED, resume=True)
    first.add("4 bits", {"seed": 0, "score": 91.5})
    first.add("4 bits", {"seed": 1, "score": 90.5}, made_by="a machine")
    again = Record(path, ASKED, resume=True)
    assert "4 bits" in again and "2 bits" not in again and list(again) == ["4 bits"] and again["2 bits"] == []
    assert again["4 bits"] == first["4 bits"] and again.content["made_by"] == "a machine"
    anew = Record(path, ASKED, resume=False)
    assert list(anew) == [] and list(Record(path, ASKED, resume=True)) == ["4 bits"]  # until there is a row
    with pytest.warns(UserWarning, match=r"the earlier rows of .* are kept in record\.json\.before"):
        anew.add("2 bits", {"seed": 0})
    assert list(Record(path, ASKED, resume=True)) == ["2 bits"]
    assert "4 bits" in json.loads(path.with_name("record.json.before").read_text())["rows"]


def test_a_record_of_another_question_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    Record(path, ASKED, resume=False).add("a", 1)
    with pytest.raises(ValueError, match=r"--resume: .*record\.json was made with another limit; remove the file"):
        Record(path, ASKED | {"limit": 5}, resume=True)


def test_a_damaged_or_foreign_record_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    Record(path, ASKED, resume=False).add("a", 1.5)
    text = path.read_text()
    asked = json.dumps(json.loads(text)["asked"])
    for wrong in (text.replace("1.5", "1.7"), text[:30], "[]", "{}", f'{{"asked": {asked}, "rows": [1]}}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"record\.json"):
            Record(path, ASKED, resume=True)
