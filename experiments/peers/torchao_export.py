"""What does torchao's static quantization make of the same network, exported from PyTorch?"""

from functools import partial
from typing import Any

import jax
import numpy as np

import quantjax as qj
from experiments.peers import Made, Network, asked, need
from experiments.peers.torch_resnet import channels_first, in_torch
from experiments.resnet import ResNet
from experiments.rows import NotApplicable


def predictions(policy: qj.Policy, network: Network) -> Made:
    """The network by `prepare_pt2e` and `convert_pt2e` with the `X86InductorQuantizer`'s default:
    int8 weights with a scale for each output, static uint8 activations by their histograms.

    It folds the normalizations. The integers are computed with by way of their floats, as the
    converted program says. Raises NotApplicable for other formats and networks, ValueError where
    the exported network does not compute what ours does."""
    package = need("torchao", "torch")
    specs = asked(policy, network.params)
    if not isinstance(network.model, ResNet):
        raise NotApplicable("the ResNet alone is exported to PyTorch")
    if any((s.format.bits, s.act and s.act.format.bits) != (8, 8) for s in specs.values()):
        raise NotApplicable("this quantizer has weights and activations of 8 bits alone")
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    batches = [torch.from_numpy(channels_first(batch)) for batch in network.batches]
    model = in_torch(network.model, network.params)
    images = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(model, (batches[0],), dynamic_shapes=({0: images},)).module()
    ours: Any = network.model.apply(network.params, network.batches[0])
    np.testing.assert_allclose(_run(program, network.batches[0]), ours, atol=1e-3)
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(program, quantizer)
    with torch.inference_mode():
        for batch in batches:
            observed(batch)
    converted = convert_pt2e(observed)
    kept = list(converted.buffers())
    codes = sum(array.numel() for array in kept if array.dtype == torch.int8)
    scales = sum(array.numel() for array in kept if array.dtype == torch.float32)
    # Zero points are there, but zero: weights are symmetric.
    bits = 8 + 32 * scales / codes
    return Made(network.params, bits, package, partial(_apply, converted, network.model.classes))


def _run(program: Any, images: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return program(torch.from_numpy(channels_first(images))).numpy()


def _apply(program: Any, classes: int, tree: Any, images: Any) -> jax.Array:
    """The logits, from within a compiled function."""
    shape = jax.ShapeDtypeStruct((len(images), classes), np.float32)
    return jax.pure_callback(partial(_run, program), shape, images)
