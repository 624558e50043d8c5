"""Post-training quantization: methods that need samples of the inputs, or none, but no training.

A method is a frozen value that `quantjax.calibrate` runs; `chain` joins several."""

from quantjax.interpret.method import Journal, Method, Run
from quantjax.ptq.adaround import adaround
from quantjax.ptq.awq import awq
from quantjax.ptq.batch_norm import fold_batch_norm
from quantjax.ptq.bias_correction import bias_correction
from quantjax.ptq.chain import chain
from quantjax.ptq.equalize import equalize
from quantjax.ptq.fisher import own_labels
from quantjax.ptq.gptq import gptq
from quantjax.ptq.hqq import hqq
from quantjax.ptq.layerwise import Layerwise, Problem, Solver
from quantjax.ptq.low_rank import low_rank
from quantjax.ptq.moments import Moments
from quantjax.ptq.re_estimate import re_estimate_batch_norm
from quantjax.ptq.reconstruct import brecq, qdrop
from quantjax.ptq.rotate import rotate
from quantjax.ptq.rtn import rtn
from quantjax.ptq.smoothquant import smoothquant

__all__ = [
    "Journal",
    "Layerwise",
    "Method",
    "Moments",
    "Problem",
    "Run",
    "Solver",
    "adaround",
    "awq",
    "bias_correction",
    "brecq",
    "chain",
    "equalize",
    "fold_batch_norm",
    "gptq",
    "hqq",
    "low_rank",
    "own_labels",
    "qdrop",
    "re_estimate_batch_norm",
    "rotate",
    "rtn",
    "smoothquant",
]
