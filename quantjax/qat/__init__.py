"""Training through quantization: float parameters are trained, quantized ones are refused."""

from quantjax.fake_quantized import FakeQuantized
from quantjax.ops import Backward
from quantjax.qat.guard import guard, refuse_quantized
from quantjax.qat.prepare import finalize, prepare

__all__ = ["Backward", "FakeQuantized", "finalize", "guard", "prepare", "refuse_quantized"]
