"""The public face: every promised name is there, and importing them all costs no model."""

import importlib
import importlib.util

import pytest

import qbert


@pytest.mark.parametrize("name", qbert.__all__)
def test_every_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    value = getattr(qbert, name)
    assert isinstance(value, str) or (value.__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qbert.no_such_name


def test_distill_exports_its_trainer_and_recipes() -> None:
    from qbert.distill import Distiller, recipes

    assert callable(Distiller) and callable(recipes.qbert_kd)


def test_import_paths_of_the_first_version_lead_to_the_new_places() -> None:
    from qbert import moved

    for old, places in moved._NOW_IN.items():
        assert all(importlib.util.find_spec(f"qbert.{place}") for place in places), old
    with pytest.warns(DeprecationWarning, match=r"qbert\.modules has moved to qbert\.layers"):
        modules = importlib.import_module("qbert.modules")
    assert modules.QuantLinear.__module__ == "qbert.layers.linear"
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = modules.NoSuchLayer
