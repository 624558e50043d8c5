"""What does torchao make of the same arrays: weights in few bits, and 8-bit activations?"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

import quantjax as qj
from experiments.peers import Made, Network, asked, each_kernel, need
from experiments.rows import NotApplicable


def weights(policy: qj.Policy, network: Network, *, algorithm: str = "AFFINE") -> Made:
    """All kernels by its `quantize_` with an `IntxWeightOnlyConfig`, symmetric.

    algorithm: a name of its `IntxChooseQParamsAlgorithm`. Dense layers have one scale an output,
    or one a group; of a convolution torchao scales each position of the window alone. Its HQQ
    takes matrices: there a convolution is one with a row for each output. Where activations are
    quantized see `products`."""
    package = need("torchao", "torch")
    if any(spec.act for spec in asked(policy, network.params).values()):
        if algorithm != "AFFINE":
            raise NotApplicable("torchao's scales of HQQ are for weights alone")
        return products(policy, network, package)

    def kernel(path: str, array: np.ndarray, spec: Any) -> tuple[np.ndarray, float]:
        taken = array if algorithm == "AFFINE" else array.reshape(len(array), -1)
        floats, bits = _read_back(_layer(taken, _weight_only(spec, algorithm)), spec)
        return floats.reshape(array.shape), bits

    tree, bits = each_kernel(policy, network.params, kernel)
    return Made(tree, bits, package)


def products(policy: qj.Policy, network: Network, package: str) -> Made:
    """Dense layers of an NNX module with int8 activations, scaled for each token as it comes:
    `apply` computes the network in JAX and each of these layers in torchao."""
    if not isinstance(network.model, nnx.Module):
        raise NotApplicable("torchao scales activations as they come in dense layers alone")
    layers: dict[str, Any] = {}

    def kernel(path: str, array: np.ndarray, spec: Any) -> tuple[np.ndarray, float]:
        layer = layers[path.removesuffix("/kernel")] = _layer(array, _dynamic(spec))
        return _read_back(layer, spec)

    tree, bits = each_kernel(policy, network.params, kernel)
    graph, state = nnx.split(network.model)
    return Made(tree, bits, package, partial(_apply, graph, jax.tree.structure(state), layers))


def _apply(graph: Any, structure: Any, layers: Mapping[str, Any], tree: Any, inputs: Any) -> Any:
    model = nnx.merge(graph, jax.tree.unflatten(structure, jax.tree.leaves(tree)))
    for path, module in nnx.iter_modules(model):
        if layer := layers.get("/".join(map(str, path))):
            linear: Any = module
            linear.dot_general = partial(_called, layer)
    return model(inputs)


def _called(layer: Any, x: Any, kernel: Any, *_: Any, **__: Any) -> jax.Array:
    """layer(x), by PyTorch, from within a compiled function."""
    import torch

    def call(x: Any) -> np.ndarray:
        with torch.inference_mode():
            return layer(torch.from_numpy(np.array(x))).numpy()

    shape = jax.ShapeDtypeStruct((*x.shape[:-1], kernel.shape[-1]), x.dtype)
    return jax.pure_callback(call, shape, x)


def _weight_only(spec: Any, algorithm: str) -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{spec.format.bits}"),
        granularity=PerGroup(spec.group) if spec.group else PerAxis(0),
        intx_choose_qparams_algorithm=getattr(IntxChooseQParamsAlgorithm, algorithm),
    )


def _dynamic(spec: Any) -> Any:
    import torch
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerAxis,
        PerGroup,
    )

    if spec.act is None or spec.act.format.bits != 8:
        raise NotApplicable("torchao has activations of 8 bits")
    if spec.format.bits == 8 and not spec.group:
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{spec.format.bits}"),
        weight_granularity=PerGroup(spec.group) if spec.group else PerAxis(0),
    )


def _layer(kernel: np.ndarray, config: Any) -> Any:
    """A layer of PyTorch with this kernel, outputs first, that `quantize_` has changed."""
    import torch
    from torchao.quantization import quantize_

    weight = torch.from_numpy(np.ascontiguousarray(np.moveaxis(kernel, -1, 1)))
    outputs, inputs, *window = weight.shape
    make: Callable[..., Any] = torch.nn.Linear
    if window:
        make = partial(torch.nn.Conv2d, kernel_size=tuple(window))
    layer = make(inputs, outputs, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(layer, config, filter_fn=lambda *_: True)
    return layer


def _read_back(layer: Any, spec: Any) -> tuple[np.ndarray, float]:
    kept = layer.weight
    floats = np.moveaxis(kept.dequantize().numpy(), 1, -1)
    return floats, kept.qdata.numel() * spec.format.bits + 32 * kept.scale.numel()
