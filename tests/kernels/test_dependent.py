"""When kernels are launched before the one before has ended."""

import pytest
import torch

pytest.importorskip("triton")

from qbert.kernels.gpu import dependent

X = torch.zeros(1)
ON, OFF = {"PDL": True, "launch_pdl": True}, {"PDL": False}


@pytest.fixture
def able(monkeypatch):
    monkeypatch.setattr(dependent, "_can_depend", lambda x: True)
    monkeypatch.delenv("QBERT_PDL", raising=False)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(("switch", "few", "many"), [("", ON, OFF), ("0", OFF, OFF), ("1", ON, ON)])
def test_few_tokens_are_launched_early_unless_the_variable_says_otherwise(switch, few, many, monkeypatch):
    monkeypatch.setenv("QBERT_PDL", switch)
    assert dependent.dependent_launch(X, 2048) == few
    assert dependent.dependent_launch(X, 2048, first=True) == {"PDL": few["PDL"]}
    assert dependent.dependent_launch(X, 2049) == many


@pytest.mark.usefixtures("able")
def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("QBERT_PDL", "yes")
    with pytest.raises(ValueError, match="QBERT_PDL must be '0', '1' or not set, got 'yes'"):
        dependent.dependent_launch(X, 1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_older_gpus_and_cpus_launch_one_kernel_after_the_other(capability, monkeypatch):
    monkeypatch.setenv("QBERT_PDL", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dependent.dependent_launch(X, 1) == OFF

    class OnGpu:
        is_cuda, device = True, "cuda:0"

    assert dependent.dependent_launch(OnGpu(), 1) == OFF
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dependent.dependent_launch(OnGpu(), 1) == ON
