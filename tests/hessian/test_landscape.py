"""Loss surfaces: the right plane, the right values, and a model that is left bit by bit as it was."""

from typing import Any

import numpy as np
import pytest
import torch
from encoders import build, inputs_for

from qbert.hessian import hessian_spectrum, loss_landscape, parameter_blocks, plot_landscapes


def encoder() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model = build("bert", hidden_size=12, num_attention_heads=2, intermediate_size=16).double()
    return model, [{**inputs_for("bert", batch=6), "labels": torch.tensor([0, 1, 1, 0, 1, 1])}]


def test_the_surface_is_the_loss_in_the_plane_of_the_top_two_eigenvectors() -> None:
    model, batches = encoder()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    surface = loss_landscape(model, batches, "encoder.layer.1", steps=5, radius=0.02, tol=1e-6)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and model.training
    model.eval()
    assert surface.center == pytest.approx(model(**batches[0]).loss.item(), rel=1e-12)
    assert surface.converged and surface.losses.shape == (5, 5)
    assert abs(surface.eigenvalues[0]) >= abs(surface.eigenvalues[1])
    np.testing.assert_allclose(surface.offsets, [-0.02, -0.01, 0, 0.01, 0.02], atol=1e-15)
    # Along eigenvector i the second difference of the loss is the eigenvalue, and mixed differences vanish.
    h, losses = 0.01, surface.losses
    second = [losses[3, 2] - 2 * losses[2, 2] + losses[1, 2], losses[2, 3] - 2 * losses[2, 2] + losses[2, 1]]
    np.testing.assert_allclose(np.array(second) / h**2, surface.eigenvalues, rtol=1e-2)
    mixed = losses[3, 3] - losses[3, 1] - losses[1, 3] + losses[1, 1]
    assert abs(mixed / (4 * h**2)) < 1e-2 * abs(surface.eigenvalues[1])


def test_an_interrupt_leaves_the_weights_as_they_were() -> None:
    model, batches = encoder()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved = []

    def loss_fn(model: Any, batch: Any) -> Any:
        parameters = dict(model.named_parameters())
        moved.append(not all(torch.equal(parameters[n], p) for n, p in before.items()))
        if sum(moved) == 3:
            raise KeyboardInterrupt
        return model(**batch).loss

    with pytest.raises(KeyboardInterrupt):
        loss_landscape(model, batches, "encoder.layer.0", steps=3, loss_fn=loss_fn)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_block_may_be_a_matrix_and_the_radius_follows_its_weights() -> None:
    model, batches = encoder()
    name = "encoder.layer.0.output.dense"
    surface = loss_landscape(model, batches, name, granularity="matrix", steps=3)
    (block,) = [b for b in parameter_blocks(model, "matrix") if b.name == name]
    assert surface.offsets[-1] == pytest.approx(0.01 * float(block.parameters[0].detach().norm()))


@pytest.mark.parametrize("kind", ["contour", "surface"])
def test_plots_are_written(tmp_path: Any, kind: str) -> None:
    model, batches = encoder()
    surfaces = [loss_landscape(model, batches, f"encoder.layer.{i}", steps=3) for i in (0, 1)]
    surfaces[0].losses[0, 0] = np.inf
    spectrum = hessian_spectrum(model, batches, runs=2, fraction=0.5, tol=0.1, progress=False)
    plot_landscapes(surfaces, tmp_path / "l.png", kind=kind, spectrum=spectrum)
    assert (tmp_path / "l.png").stat().st_size > 10000


def test_titles_say_what_the_eigenvalues_were_measured_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = encoder()
    surface = loss_landscape(model, batches, "encoder.layer.1", steps=3, samples=4)
    spectrum = hessian_spectrum(model, batches, runs=2, fraction=0.5, tol=0.1, progress=False)
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, text, **_: titles.append(text))
    plot_landscapes([surface], tmp_path / "l.png", spectrum=spectrum)
    assert surface.samples == 4 and "of these 4 samples" in titles[0]
    assert f"over 2 runs: mean {spectrum.mean[1]:.3g}, deviation {spectrum.std[1]:.3g}" in titles[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4}, "steps: 4"),
        ({"radius": 0.0}, "radius: 0.0"),
        ({"samples": 0}, "samples: 0"),
        ({"name": "encoder.layer.9"}, r"name: 'encoder.layer.9' is no layer of the model"),
        ({"granularity": "row"}, "granularity: 'row'"),
    ],
)
def test_bad_arguments_are_named(changes: Any, message: str) -> None:
    model, batches = encoder()
    with pytest.raises(ValueError, match=message):
        loss_landscape(model, batches, **{"name": "encoder.layer.0", **changes})
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_landscapes([], "x.png")
