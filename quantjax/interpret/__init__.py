"""The upper floor: an interpreter of jaxprs that runs models on quantized parameters."""

from quantjax.interpret.calibrate import calibrate
from quantjax.interpret.intercept import Intercepted, intercept, sites
from quantjax.interpret.record import Remark, Site, Sites
from quantjax.interpret.registry import register_rule
from quantjax.interpret.report import Report

__all__ = [
    "Intercepted",
    "Remark",
    "Report",
    "Site",
    "Sites",
    "calibrate",
    "intercept",
    "register_rule",
    "sites",
]
