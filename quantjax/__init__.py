"""quantjax: compress JAX models by quantizing their parameter trees."""

from quantjax import lora, ptq
from quantjax.allocate import allocate_bits, sensitivity
from quantjax.formats import Codebook, FloatFormat, IntFormat, Levels
from quantjax.interpret import calibrate, intercept, register_rule, sites
from quantjax.observers import Observer, absmax, ema, minmax, mse, percentile
from quantjax.policy import Policy, preset
from quantjax.ptq import Method, chain
from quantjax.qtensor import QTensor
from quantjax.rounding import Rounding
from quantjax.spec import Granularity, QuantSpec
from quantjax.storage import load, save
from quantjax.stream import quantize_file
from quantjax.summary import summary
from quantjax.transform import dequantize, fake_quantize, quantize

__all__ = [
    "Codebook",
    "FloatFormat",
    "Granularity",
    "IntFormat",
    "Levels",
    "Method",
    "Observer",
    "Policy",
    "QTensor",
    "QuantSpec",
    "Rounding",
    "absmax",
    "allocate_bits",
    "calibrate",
    "chain",
    "dequantize",
    "ema",
    "fake_quantize",
    "intercept",
    "load",
    "lora",
    "minmax",
    "mse",
    "percentile",
    "preset",
    "ptq",
    "quantize",
    "quantize_file",
    "register_rule",
    "save",
    "sensitivity",
    "sites",
    "summary",
]
