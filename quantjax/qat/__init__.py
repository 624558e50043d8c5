"""Training through quantization: float parameters are trained, quantized ones are refused."""

from quantjax.fake_quantized import FakeQuantized
from quantjax.ops import Backward
from quantjax.qat.binary import binary_connect, clip_values, xnor
from quantjax.qat.dorefa import dorefa
from quantjax.qat.estimator import ActivationEstimator, Estimator, WeightEstimator
from quantjax.qat.guard import guard, refuse_quantized
from quantjax.qat.ir_net import ir_net
from quantjax.qat.labels import labels
from quantjax.qat.lsq import lsq, lsq_plus
from quantjax.qat.pact import pact
from quantjax.qat.paretoq import paretoq
from quantjax.qat.prepare import finalize, prepare
from quantjax.qat.progress import at
from quantjax.qat.ternary import bitnet, twn
from quantjax.qat.ttq import ttq

__all__ = [
    "ActivationEstimator",
    "Backward",
    "Estimator",
    "FakeQuantized",
    "WeightEstimator",
    "at",
    "binary_connect",
    "bitnet",
    "clip_values",
    "dorefa",
    "finalize",
    "guard",
    "ir_net",
    "labels",
    "lsq",
    "lsq_plus",
    "pact",
    "paretoq",
    "prepare",
    "refuse_quantized",
    "ttq",
    "twn",
    "xnor",
]
