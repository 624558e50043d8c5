"""What does HQQ's own package make of the same arrays?
Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023."""

from typing import Any

import numpy as np

import quantjax as qj
from experiments.peers import Made, Network, each_kernel, need
from experiments.rows import NotApplicable


def weights(policy: qj.Policy, network: Network) -> Made:
    """All kernels by its `Quantizer`, with the settings that its `BaseQuantizeConfig` chooses.

    It takes matrices: a convolution is one with a row for each output. Without a group a whole
    row shares a scale and a zero point, both float32. Raises NotApplicable for activations."""
    package = need("hqq", "torch")
    tree, bits = each_kernel(policy, network.params, _kernel)
    return Made(tree, bits, package)


def _kernel(path: str, kernel: np.ndarray, spec: Any) -> tuple[np.ndarray, float]:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    if spec.act is not None:
        raise NotApplicable("HQQ quantizes weights alone")
    w_OI = torch.from_numpy(kernel.reshape(len(kernel), -1))
    if spec.group and w_OI.shape[1] % spec.group:
        raise NotApplicable(f"HQQ's groups of {spec.group} would run on into the next row")
    settings = BaseQuantizeConfig(nbits=spec.format.bits, group_size=spec.group, axis=1)
    codes, kept = Quantizer.quantize(
        w_OI,
        device="cpu",
        bitpack=False,  # packed, 3 bits of whole rows do not come back: it divides by the group
        **settings["weight_quant_params"],
    )
    floats = Quantizer.dequantize(codes, {**kept, "compute_dtype": torch.float32})
    bits = codes.numel() * spec.format.bits + 32 * (kept["scale"].numel() + kept["zero"].numel())
    return floats.numpy().reshape(kernel.shape), bits
