"""Training through quantization: float parameters are trained, quantized ones are refused."""

from quantjax.qat.guard import guard, refuse_quantized

__all__ = ["guard", "refuse_quantized"]
