"""The public face: every promised name is there, and importing them all costs no model."""

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
