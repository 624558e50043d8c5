"""What do other packages make of the same arrays? Their weights, read back as floats.

A package that is not installed is a reason, not an error. Qwix: GPTQ and AWQ as its `contrib`
has them, driven as its documentation does: one model gathers statistics, another says how each
parameter is quantized, its own `quantize_params` does it."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.rows import NotApplicable


def qwix_weights(
    method: str,
    model: nnx.Module,
    batches: Sequence[jax.Array],
    *,
    module_path: str,
    bits: int,
    group: int | None,
) -> tuple[dict[str, Any], float]:
    """(the parameters of `model` as Qwix stores them, dequantized; bits per quantized weight).

    method: "absmax", "gptq" or "awq". module_path: a regular expression of the modules whose
    kernels, of shape (inputs, outputs), are quantized; so many inputs of one output share a
    scale, all if `group` is None. Bits count the scales, in float32, and those that AWQ keeps of
    each input. Raises NotApplicable where Qwix is not installed."""
    if importlib.util.find_spec("qwix") is None:
        raise NotApplicable("Qwix is not installed")
    if method == "gptq" and bits not in (2, 4, 8):
        raise NotApplicable(f"Qwix's GPTQ keeps its codes in a dtype of JAX; int{bits} is none")
    import qwix
    from qwix.contrib import awq, gptq

    how = {
        "absmax": (qwix.QuantizationRule, None, qwix.quantize_params),
        "gptq": (gptq.GptqRule, gptq.GptqCalibrationProvider, gptq.quantize_params),
        "awq": (awq.AwqRule, awq.AwqCalibrationProvider, awq.quantize_params),
    }
    make_rule, provider, quantize_params = how[method]
    kinds = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}
    rule = make_rule(
        module_path=module_path, weight_qtype=kinds.get(bits, f"int{bits}"), tile_size=group
    )
    plan = qwix.quantize_model(model, qwix.PtqProvider([rule]), batches[0][:1])
    statistics: list[Any] = []
    if provider is not None:
        observed = qwix.quantize_model(model, provider([rule]), batches[0][:1])
        run = nnx.jit(lambda m, tokens: m(tokens))
        for batch in batches:
            run(observed, batch)
        statistics.append(nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat)))
    params = nnx.to_pure_dict(nnx.state(model))
    stored = quantize_params(params, plan, *statistics)
    weights, bytes_, count = {}, 0.0, 0
    for path, kept in _quantized(stored):
        array = kept["array"]
        floats = qwix.dequantize(qwix.QArray(array["qvalue"], array["scale"], None))
        bytes_ += floats.size * bits / 8 + array["scale"].size * 4
        if "awq_scale" in kept:
            floats = floats / kept["awq_scale"][:, None]
            bytes_ += kept["awq_scale"].size * 4
        weights[path], count = floats, count + floats.size
    return _replaced(params, weights), 8 * bytes_ / count


def _quantized(tree: dict[Any, Any], path: tuple[Any, ...] = ()) -> list[tuple[tuple, dict]]:
    """The nodes that hold codes, by path."""
    if "array" in tree:
        return [(path, tree)]
    inner = [(k, v) for k, v in tree.items() if isinstance(v, dict)]
    return [found for k, v in inner for found in _quantized(v, (*path, k))]


def _replaced(
    tree: dict[Any, Any], leaves: dict[tuple, jax.Array], path: tuple[Any, ...] = ()
) -> dict[Any, Any]:
    def one(key: Any, node: Any) -> Any:
        here = (*path, key)
        return _replaced(node, leaves, here) if isinstance(node, dict) else leaves.get(here, node)

    return {key: one(key, node) for key, node in tree.items()}
