"""What does ONNX Runtime's static quantization make of the same network, exported to ONNX?"""

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import quantjax as qj
from experiments.peers import Made, Network, asked, need
from experiments.peers.torch_resnet import channels_first, in_torch
from experiments.resnet import ResNet
from experiments.rows import NotApplicable

IMAGES, LOGITS = "images", "logits"


def predictions(policy: qj.Policy, network: Network, *, calibration: str = "MinMax") -> Made:
    """The network by `quantize_static`, as its documentation advises for a processor with integer
    dot products: QDQ nodes, uint8 activations, int8 or int4 weights with a scale for each output.

    calibration: a name of its `CalibrationMethod`, for the activations, static. The exporter
    folds the normalizations. Raises NotApplicable for other formats and networks, ValueError
    where the exported network does not compute what ours does."""
    package = need("onnxruntime", "onnx", "onnxscript", "torch")
    specs = asked(policy, network.params)
    bits = {spec.format.bits for spec in specs.values()}
    if not isinstance(network.model, ResNet):
        raise NotApplicable("the ResNet alone is exported to ONNX")
    if not all(spec.act and spec.act.format.bits == 8 for spec in specs.values()):
        raise NotApplicable("ONNX Runtime quantizes convolutions with 8-bit activations alone")
    if len(bits) != 1 or not bits <= {4, 8}:
        raise NotApplicable("ONNX Runtime has weights of 8 or 4 bits, the same everywhere")
    with tempfile.TemporaryDirectory() as scratch:
        floats = Path(scratch) / "float.onnx"
        _export(network, floats)
        _compare(network, floats)
        stored = Path(scratch) / "quantized.onnx"
        _quantize(floats, stored, network, bits.pop(), calibration)
        session = _session(stored)
        taken = _bits_per_weight(stored)
    return Made(network.params, taken, package, partial(_apply, session, network.model.classes))


def _export(network: Network, path: Path) -> None:
    import torch

    model = in_torch(network.model, network.params)
    example = torch.from_numpy(channels_first(network.batches[0][:2]))
    torch.onnx.export(
        model,
        (example,),
        str(path),
        input_names=[IMAGES],
        output_names=[LOGITS],
        dynamic_shapes=({0: torch.export.Dim("n", min=2, max=4096)},),
        opset_version=21,  # the first with int4
        external_data=False,
        verbose=False,
    )


def _compare(network: Network, path: Path) -> None:
    images = network.batches[0][:16]
    ours: Any = network.model.apply(network.params, images)
    theirs = _run(_session(path), images)
    np.testing.assert_allclose(theirs, ours, atol=1e-3, err_msg="float logits, exported")


def _quantize(floats: Path, stored: Path, network: Network, bits: int, calibration: str) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[Mapping[str, np.ndarray]] = (
                {IMAGES: channels_first(batch)} for batch in network.batches
            )

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.feeds, None)

    ready = floats.with_name("ready.onnx")
    quant_pre_process(str(floats), str(ready), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(ready),
        str(stored),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=getattr(quantization.QuantType, f"QInt{bits}"),
        calibrate_method=getattr(quantization.CalibrationMethod, calibration),
    )


def _bits_per_weight(path: Path) -> float:
    """Codes, scales and zero points of the kernels, over their weights."""
    import onnx

    graph = onnx.load(str(path)).graph
    arrays = {array.name: array for array in graph.initializer}
    widths = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8, onnx.TensorProto.FLOAT: 32}
    bits = count = 0
    for node in graph.node:
        kept = [arrays.get(name) for name in node.input]
        if node.op_type == "DequantizeLinear" and kept[0] is not None and len(kept[0].dims) > 1:
            bits += sum(int(np.prod(a.dims)) * widths[a.data_type] for a in kept if a is not None)
            count += int(np.prod(kept[0].dims))
    return bits / count


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _run(session: Any, images: Any) -> np.ndarray:
    return session.run([LOGITS], {IMAGES: channels_first(images)})[0]


def _apply(session: Any, classes: int, tree: Any, images: Any) -> jax.Array:
    """The logits, from within a compiled function."""
    shape = jax.ShapeDtypeStruct((len(images), classes), np.float32)
    return jax.pure_callback(partial(_run, session), shape, images)
