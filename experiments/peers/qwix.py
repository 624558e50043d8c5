"""What does Qwix make of the same network: rounding, its `contrib` GPTQ and AWQ, integer products?

Driven as its documentation does: one model says how each parameter is quantized, another gathers
statistics, its own `quantize_params` quantizes."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import quantjax as qj
from experiments.peers import Made, Network, asked, need
from experiments.rows import NotApplicable


def weights(policy: qj.Policy, network: Network, *, method: str = "absmax") -> Made:
    """The network as Qwix stores it: read back where weights alone are quantized; where
    activations are too, in its own products, scaled for each row or image as it comes.

    method: "absmax", "gptq" or "awq". Bits count the scales, in float32, and those that AWQ keeps
    of each input. Raises NotApplicable for what Qwix does not do."""
    package = need("qwix")
    specs = asked(policy, network.params)
    _refuse(method, specs.values(), isinstance(network.model, nn.Module))
    find = _linen if isinstance(network.model, nn.Module) else _nnx
    stored, apply = find(method, specs, network)
    tree, bits = _read_back(stored, specs)
    if any(spec.act for spec in specs.values()):
        return Made(stored, bits, package, apply)
    return Made(tree, bits, package)


def _refuse(method: str, specs: Any, convolutions: bool) -> None:
    acts = [spec for spec in specs if spec.act]
    if method != "absmax" and convolutions:
        raise NotApplicable(f"Qwix's {method.upper()} takes dense layers alone")
    if method == "awq" and acts:
        raise NotApplicable("Qwix's AWQ is for weights alone")
    if method == "gptq" and any(spec.format.bits not in (2, 4, 8) for spec in specs):
        raise NotApplicable("Qwix's GPTQ keeps its codes in a dtype of JAX; int3 is none")
    if convolutions and any(spec.group for spec in specs):
        raise NotApplicable("Qwix scales a convolution for each output as a whole")
    if convolutions and any(spec.act.format.bits != spec.format.bits for spec in acts):
        raise NotApplicable("Qwix convolves weights and activations of the same bits alone")


def _rules(make: Callable[..., Any], specs: Mapping[str, Any], *, same: bool) -> list[Any]:
    """A rule for the module of each kernel. same: activations as the weights, if none are asked."""

    def dtype(format: Any) -> Any:
        bits = format.bits
        return {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}")

    acts = {
        path: s.act.format if s.act else s.format if same else None for path, s in specs.items()
    }
    return [
        make(
            module_path=path.removesuffix("/kernel"),
            weight_qtype=dtype(spec.format),
            act_qtype=acts[path] and dtype(acts[path]),
            tile_size=spec.group,
        )
        for path, spec in specs.items()
    ]


def _linen(method: str, specs: Mapping[str, Any], network: Network) -> tuple[Any, Any]:
    """(variables as Qwix stores them, what computes with them). It has no convolution of quantized
    weights by floats, though it quantizes them alike."""
    import qwix

    rules = _rules(qwix.QuantizationRule, specs, same=True)
    model = qwix.quantize_model(network.model, qwix.PtqProvider(rules))
    plan = jax.eval_shape(model.init, jax.random.key(0), network.batches[0][:1])["params"]
    stored = qwix.quantize_params(network.params["params"], plan)
    return {**network.params, "params": stored}, model.apply


def _nnx(method: str, specs: Mapping[str, Any], network: Network) -> tuple[Any, Any]:
    """(the state as Qwix stores it, what computes with it)."""
    import qwix
    from qwix.contrib import awq, gptq

    make, provider, quantize_params = {
        "absmax": (qwix.QuantizationRule, None, qwix.quantize_params),
        "gptq": (gptq.GptqRule, gptq.GptqCalibrationProvider, gptq.quantize_params),
        "awq": (awq.AwqRule, awq.AwqCalibrationProvider, awq.quantize_params),
    }[method]
    rules = _rules(make, specs, same=False)
    sample = network.batches[0][:1]
    plan = qwix.quantize_model(network.model, qwix.PtqProvider(rules), sample)
    statistics: list[Any] = []
    if provider is not None:
        observed = qwix.quantize_model(network.model, provider(rules), sample)
        run = nnx.jit(lambda m, inputs: m(inputs))
        for batch in network.batches:
            run(observed, batch)
        statistics.append(nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat)))
    params = nnx.to_pure_dict(nnx.state(network.model))
    graph, state = nnx.split(plan)
    structure = jax.tree.structure(state)

    def apply(stored: Any, inputs: Any) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(structure, jax.tree.leaves(stored)))(inputs)

    return quantize_params(params, plan, *statistics), apply


def _read_back(stored: Any, specs: Mapping[str, Any]) -> tuple[Any, float]:
    """(the floats that the codes stand for, in place of them; bits per quantized weight)."""
    import qwix

    flat = flatten_dict(stored, is_leaf=lambda _, node: "array" in node)
    bits, count = 0.0, 0
    for path, node in flat.items():
        spec = specs.get("/".join(map(str, path)).removeprefix("params/"))
        if spec is None:
            continue
        boxed = isinstance(node, dict)  # of NNX; of Linen an object
        array = qwix.QArray(**node["array"], zero_point=None) if boxed else node.array
        floats = qwix.dequantize(array)
        bits += floats.size * spec.format.bits + array.scale.size * 32
        if boxed and "awq_scale" in node:
            floats = floats / node["awq_scale"][:, None]
            bits += node["awq_scale"].size * 32
        flat[path], count = floats, count + floats.size
    return unflatten_dict(flat), bits / count
