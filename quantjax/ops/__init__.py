"""Products in low precision, each with the lowering that is fast on its platform."""

from quantjax.ops.dot import fake_rows, fits_integers, integer_dot
from quantjax.ops.integer import integer_dot_general
from quantjax.ops.probe import Probe, force, probe

__all__ = [
    "Probe",
    "fake_rows",
    "fits_integers",
    "force",
    "integer_dot",
    "integer_dot_general",
    "probe",
]
