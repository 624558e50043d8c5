"""Which layer hurts, and how many bits should each have? Sensitivity and bit allocation."""

from quantjax.allocate.allocation import (
    Allocation,
    allocate_bits,
    operations,
    predicted_loss,
    stored_bytes,
)
from quantjax.allocate.distribution import Distribution, categorical, gaussian
from quantjax.allocate.measures import Mode
from quantjax.allocate.report import Cell, Row, Sensitivity
from quantjax.allocate.sensitivity import sensitivity

__all__ = [
    "Allocation",
    "Cell",
    "Distribution",
    "Mode",
    "Row",
    "Sensitivity",
    "allocate_bits",
    "categorical",
    "gaussian",
    "operations",
    "predicted_loss",
    "sensitivity",
    "stored_bytes",
]
