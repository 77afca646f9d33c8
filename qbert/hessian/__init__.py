"""Second-order analysis of encoders: Hessian products, eigenvalues, and the sensitivity spectrum built on them.

Everything here is exact (up to stated bounds) and leaves the model as it was.

    >>> from qbert.hessian import hessian_spectrum
    >>> spectrum = hessian_spectrum(model, loader, runs=10)
"""

from qbert.hessian.blocks import ParameterBlock, Rows, parameter_blocks
from qbert.hessian.density import SpectralDensity, hessian_density, spectral_density
from qbert.hessian.eigen import Eigenpair, Lanczos, PowerIteration, lanczos, power_iteration, top_eigenpairs
from qbert.hessian.gauss_newton.top import gauss_newton_starts, gauss_newton_top
from qbert.hessian.landscape import LossLandscape, loss_landscape
from qbert.hessian.measure import hessian_spectrum
from qbert.hessian.operator import HessianOperator
from qbert.hessian.spectrum import HessianSpectrum
from qbert.hessian.trace import TraceEstimate, estimate_trace, hessian_traces
from qbert.plots import plot_landscapes

__all__ = [
    "Eigenpair",
    "HessianOperator",
    "HessianSpectrum",
    "Lanczos",
    "LossLandscape",
    "ParameterBlock",
    "PowerIteration",
    "Rows",
    "SpectralDensity",
    "TraceEstimate",
    "estimate_trace",
    "gauss_newton_starts",
    "gauss_newton_top",
    "hessian_density",
    "hessian_spectrum",
    "hessian_traces",
    "lanczos",
    "loss_landscape",
    "parameter_blocks",
    "plot_landscapes",
    "power_iteration",
    "spectral_density",
    "top_eigenpairs",
]
