"""Training through quantization: float parameters are trained, quantized ones are refused."""

from quantjax.fake_quantized import FakeQuantized
from quantjax.ops import Backward
from quantjax.qat.apot import apot
from quantjax.qat.binary import binary_connect, clip_values, xnor
from quantjax.qat.distill import attention_transfer, distill_loss, hint_loss
from quantjax.qat.dorefa import dorefa
from quantjax.qat.estimator import ActivationEstimator, Estimator, WeightEstimator
from quantjax.qat.guard import guard, refuse_not_finite, refuse_quantized
from quantjax.qat.ir_net import ir_net
from quantjax.qat.labels import labels
from quantjax.qat.lsq import lsq, lsq_plus
from quantjax.qat.n2uq import n2uq
from quantjax.qat.oscillation import dampening, freeze_oscillations
from quantjax.qat.pact import pact
from quantjax.qat.paretoq import paretoq
from quantjax.qat.prepare import finalize, prepare
from quantjax.qat.progress import at
from quantjax.qat.quantize_gradients import quantize_gradients
from quantjax.qat.quantize_state import quantize_state
from quantjax.qat.schedule import stages, unrounded, until, with_bits
from quantjax.qat.teacher import StoredLogits, load_logits, store_logits
from quantjax.qat.ternary import bitnet, twn
from quantjax.qat.ttq import ttq

__all__ = [
    "ActivationEstimator",
    "Backward",
    "Estimator",
    "FakeQuantized",
    "StoredLogits",
    "WeightEstimator",
    "apot",
    "at",
    "attention_transfer",
    "binary_connect",
    "bitnet",
    "clip_values",
    "dampening",
    "distill_loss",
    "dorefa",
    "finalize",
    "freeze_oscillations",
    "guard",
    "hint_loss",
    "ir_net",
    "labels",
    "load_logits",
    "lsq",
    "lsq_plus",
    "n2uq",
    "pact",
    "paretoq",
    "prepare",
    "quantize_gradients",
    "quantize_state",
    "refuse_not_finite",
    "refuse_quantized",
    "stages",
    "store_logits",
    "ttq",
    "twn",
    "unrounded",
    "until",
    "with_bits",
    "xnor",
]
