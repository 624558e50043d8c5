"""What does quantizing a trained network cost, without training it again?

The rows of the article's experiment: bits and ternary under three kinds of scales; 8-bit
activations; its printed rule taken at its word; a sweep of S."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from experiments.evaluate import evaluate
from experiments.train import Examples
from quantjax.policy import preset_spec
from quantjax.ptq import rtn

FORMATS = ("w8", "w7", "w6", "w5", "w4", "w3", "w2", "ternary", "w1")
OBSERVERS: dict[str, qj.Observer] = {"absmax": qj.absmax(), "mse": qj.mse()}
METHODS = (*OBSERVERS, "output")
IMAGES = 2048  # training images whose activations choose the scales of "output"
SWEEP = tuple(float(f) for f in np.geomspace(0.25, 8, 16).round(4))


class Tested(Examples, Protocol):
    """Examples with a test part: `experiments.data.Dataset`, or `experiments.sequences`."""

    @property
    def test_images(self) -> np.ndarray: ...
    @property
    def test_labels(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Judge:
    """Evaluates a tree on one dataset: the compiled function and the normalized images."""

    model: nn.Module
    data: Tested
    scratch: Path

    @property
    def apply(self) -> Callable[..., Any]:
        """(variables, images) -> logits."""
        return self.model.apply

    def _run(self, tree: Any) -> Callable[..., Any]:
        """The network itself on floats, intercepted on quantized parameters."""
        return qj.intercept(self.apply) if any(map(_is_q, _leaves(tree))) else self.apply

    def validation(self, tree: Any) -> float:
        """Accuracy on the validation images."""
        images = self.data.normalize(self.data.validation_images)
        return evaluate(self._run(tree), tree, images, self.data.validation_labels)[1]

    def test(
        self, tree: Any, apply: Callable[..., Any] | None = None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Loss and accuracy on the test images, as the article prints them; predictions. apply:
        what computes with the tree, if not the network itself."""
        images = self.data.normalize(self.data.test_images)
        labels = self.data.test_labels
        run = apply or self._run(tree)
        loss, accuracy, predictions = evaluate(run, tree, images, labels)
        correct = int((predictions == labels).sum())
        return {
            "loss": loss,
            "accuracy": accuracy,
            "correct": correct,
            "total": len(labels),
        }, predictions

    def row(self, name: str, method: str, tree: Any, reference: Any) -> dict[str, Any]:
        """Everything the tables show of one quantized tree, its size on disk measured.

        For what its products run on see `seen`."""
        path = self.scratch / "row.qj.safetensors"
        qj.save(path, tree)
        judged = seen(tree)
        scores, _ = self.test(judged)
        return {
            "format": name,
            "method": method,
            **scores,
            "validation_accuracy": self.validation(judged),
            "bytes": path.stat().st_size,
            "bits_per_weight": qj.summary(tree).totals.bits_per_weight,
            "sqnr_db": _sqnr(reference, qj.dequantize(tree)),
        }


def scored(judge: Judge, params: Any) -> dict[str, Any]:
    """A tree on the test images, without the predictions."""
    return judge.test(params)[0]


def seen(tree: Any) -> Any:
    """The tree as it is judged: weights alone as floats; with activations as it is, for products
    that `intercept` runs on codes."""
    return tree if any(_is_q(x) and x.act for x in _leaves(tree)) else qj.dequantize(tree)


def policy(
    name: str, observer: qj.Observer, *, biases: bool = False, full: bool = False
) -> qj.Policy:
    """Convolution, dense and normalization parameters, as in the article; biases float or not;
    the levels of the preset, or the whole range of the integers."""
    spec = dataclasses.replace(preset_spec(name), observer=observer)
    if full:
        grid = qj.IntFormat(spec.format.bits, levels=qj.Levels.FULL)
        spec = dataclasses.replace(spec, format=grid)
    rules = [("**/kernel", spec), ("bn*/scale", spec), ("bn*/bias", spec)]
    if biases:
        rules.append(("**/bias", spec))
    return qj.Policy(rules)


def fitting(policy: qj.Policy, params: Any) -> qj.Policy:
    """The policy without the normalization rules if the network has no normalization."""
    if any(name.startswith("bn") for name in params["params"]):
        return policy
    return qj.Policy([rule for rule in policy.rules if not rule[0].startswith("bn")])


def prepare(judge: Judge, params: Any) -> Callable[[str, str], Any]:
    """(format, method) -> the quantized tree: two observers of the weights, and scales that lose
    least of every layer's output on training images. Levels as in the presets; for "output",
    the whole range of the integers from 2 bits up. Both were chosen on validation images."""
    images = judge.data.normalize(judge.data.train_images[:IMAGES])
    batches = [images[i : i + 256] for i in range(0, len(images), 256)]

    def make(name: str, method: str) -> Any:
        if method in OBSERVERS:
            return qj.quantize(params, fitting(policy(name, OBSERVERS[method]), params))
        rules = fitting(policy(name, qj.mse(), full=name not in ("w1", "ternary")), params)
        return qj.calibrate(judge.apply, params, batches, rtn(rules, sequential=False))

    return make


def literal_rule(params: Any, bits: int = 8) -> Any:
    """The article's printed code at its word: clip(round(w / 255 * 2^bits), 0, 255), used as w.

    Weights lie within [-1, 1], so all but a few become 0, the negative ones always, and nothing
    is divided by S again; its formula Q(x) = round(x S), D(q) = q / S does both."""

    def rule(path: tuple, w: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel") or name.startswith("bn"):
            return jnp.clip(jnp.round(w / 255.0 * 2.0**bits), 0, 255)
        return w

    return {**params, "params": jax.tree_util.tree_map_with_path(rule, params["params"])}


def quantized_rows(
    judge: Judge,
    params: Any,
    make: Callable[[str, str], Any],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per format and kind of scales; one with the biases too; 8-bit activations, with
    scales of each input and, as calibrated, of each layer; one for the printed rule."""
    rows = []
    for name in FORMATS:
        for method in METHODS:
            progress(f"{name} {method}")
            rows.append(judge.row(name, method, make(name, method), params))
    progress("with biases")
    tree = qj.quantize(params, fitting(policy("w8", qj.absmax(), biases=True), params))
    rows.append(judge.row("w8", "absmax, biases too", tree, params))
    progress("8-bit activations")
    rules = fitting(policy("w8a8", qj.absmax()), params)
    rows.append(judge.row("w8a8", "dynamic", qj.quantize(params, rules), params))
    images = judge.data.normalize(judge.data.train_images[:IMAGES])
    batches = [images[i : i + 256] for i in range(0, len(images), 256)]
    tree = qj.calibrate(judge.apply, params, batches, rules)
    rows.append(judge.row("w8a8", "static", tree, params))
    progress("printed rule")
    rows.append(judge.row("w8", "printed rule", literal_rule(params), params))
    return rows


def sweep_scale(judge: Judge, params: Any, bits: int = 4) -> dict[str, Any]:
    """Accuracy and error as S = f * S_absmax varies, one S per layer, at fixed bits.

    Larger S: finer steps, more weights clipped. Also where each observer puts S, per layer."""
    spec = dataclasses.replace(preset_spec(f"w{bits}"), block=qj.Granularity.TENSOR)
    base = _per_tensor(params, spec, qj.absmax())
    points = []
    for factor in SWEEP:
        scaled = jax.tree.map(lambda q, f=factor: _rescaled(q, f), base, is_leaf=_is_q)
        tree = qj.dequantize(qj.quantize(params, like=scaled))
        points.append(
            {
                "factor": factor,
                "validation_accuracy": judge.validation(tree),
                "relative_error": _relative_error(params, tree),
            }
        )
    chosen = {}
    for label, observer in {**OBSERVERS, "percentile 99.9": qj.percentile(99.9)}.items():
        tree = _per_tensor(params, spec, observer)
        found = _layers(tree)
        ratios = {k: float((q.scale / found[k].scale).squeeze()) for k, q in _layers(base).items()}
        floats = qj.dequantize(tree)
        chosen[label] = {
            "factors": ratios,
            "validation_accuracy": judge.validation(floats),
            "relative_error": _relative_error(params, floats),
        }
    return {"bits": bits, "points": points, "observers": chosen}


def _is_q(x: Any) -> bool:
    return isinstance(x, qj.QTensor)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_q)


def _per_tensor(params: Any, spec: qj.QuantSpec, observer: qj.Observer) -> Any:
    spec = dataclasses.replace(spec, observer=observer)
    return qj.quantize(params, qj.Policy([("**/kernel", spec)]))


def _rescaled(leaf: Any, factor: float) -> Any:
    return dataclasses.replace(leaf, scale=leaf.scale / factor) if _is_q(leaf) else leaf


def _layers(tree: Any) -> dict[str, Any]:
    """The quantized leaves by layer."""
    return {name: layer["kernel"] for name, layer in tree["params"].items() if "kernel" in layer}


def _sqnr(reference: Any, tree: Any) -> float:
    """10 log10 of squared magnitude over squared error, all parameters together."""
    pairs = list(zip(jax.tree.leaves(reference), jax.tree.leaves(tree), strict=True))
    error = sum(float(jnp.sum((w - v) ** 2)) for w, v in pairs)
    return 10 * math.log10(sum(float(jnp.sum(w**2)) for w, _ in pairs) / error)


def _relative_error(params: Any, quantized: Any) -> float:
    """Squared error over squared magnitude, over all kernels."""
    pairs = list(zip(_layers(params).values(), _layers(quantized).values(), strict=True))
    error = sum(float(jnp.sum((w - v) ** 2)) for w, v in pairs)
    return error / sum(float(jnp.sum(w**2)) for w, _ in pairs)


def weight_histograms(params: Any, bits: int = 4, bins: int = 81) -> dict[str, Any]:
    """Counts of every layer's weights before and after quantization, over common edges."""
    spec = dataclasses.replace(preset_spec(f"w{bits}"), block=qj.Granularity.TENSOR)
    quantized = qj.dequantize(_per_tensor(params, spec, qj.mse()))
    out = {}
    for name, w in _layers(params).items():
        edge = float(jnp.abs(w).max())
        edges = np.linspace(-edge, edge, bins + 1)
        after = np.histogram(np.asarray(_layers(quantized)[name]), edges)[0]
        before = np.histogram(np.asarray(w), edges)[0]
        out[name] = {"edge": edge, "before": before.tolist(), "after": after.tolist()}
    return {"bits": bits, "layers": out}
