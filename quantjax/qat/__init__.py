"""Training through quantization: float parameters are trained, quantized ones are refused."""

from quantjax.fake_quantized import FakeQuantized
from quantjax.ops import Backward
from quantjax.qat.estimator import Estimator
from quantjax.qat.guard import guard, refuse_quantized
from quantjax.qat.labels import labels
from quantjax.qat.lsq import lsq, lsq_plus
from quantjax.qat.prepare import finalize, prepare

__all__ = [
    "Backward",
    "Estimator",
    "FakeQuantized",
    "finalize",
    "guard",
    "labels",
    "lsq",
    "lsq_plus",
    "prepare",
    "refuse_quantized",
]
