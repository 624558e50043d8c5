"""Products in low precision, each with the lowering that is fast on its platform."""

from quantjax.ops.activation import activation_codes, fake_activation
from quantjax.ops.backward import Backward, GradientAxes, with_rounded_gradients
from quantjax.ops.conv import integer_conv, prefers_integers
from quantjax.ops.dot import Lowering, Plan, plan_dot, quantized_dot
from quantjax.ops.forms import DimensionNumbers, Pair
from quantjax.ops.grouped import grouped_dot, grouped_pays
from quantjax.ops.integer import integer_dot_general
from quantjax.ops.probe import Probe, force, probe
from quantjax.ops.quantized_conv import ConvParams, plan_conv, quantized_conv
from quantjax.ops.ragged import plan_ragged_dot, quantized_ragged_dot
from quantjax.ops.weight_only import fits_weight_only, weight_only_dot

__all__ = [
    "Backward",
    "ConvParams",
    "DimensionNumbers",
    "GradientAxes",
    "Lowering",
    "Pair",
    "Plan",
    "Probe",
    "activation_codes",
    "fake_activation",
    "fits_weight_only",
    "force",
    "grouped_dot",
    "grouped_pays",
    "integer_conv",
    "integer_dot_general",
    "plan_conv",
    "plan_dot",
    "plan_ragged_dot",
    "prefers_integers",
    "probe",
    "quantized_conv",
    "quantized_dot",
    "quantized_ragged_dot",
    "weight_only_dot",
    "with_rounded_gradients",
]
