"""Pruning: masks of single weights, and networks with fewer channels."""

from quantjax.prune.apply import apply
from quantjax.prune.channels import Cut, channels, heads
from quantjax.prune.magnitude import magnitude
from quantjax.prune.n_of_m import n_m
from quantjax.prune.optimizer import masked
from quantjax.prune.schedule import Cubic

__all__ = ["Cubic", "Cut", "apply", "channels", "heads", "magnitude", "masked", "n_m"]
