"""Residual networks for CIFAR-10: ResNet-20 and -32 (He et al.), ResNet-8 (MLPerf Tiny).
He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, section 4.2;
Banbury et al., "MLPerf Tiny Benchmark", 2021, arXiv:2106.07597.
Published weights of ResNet-32: Idelbayev, "Proper ResNet Implementation for CIFAR10/CIFAR100 in
PyTorch", as arrays under PyTorch's names in one npz. On the 10,000 test images they are right on
92.63 %."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.data import Dataset

FILE = "resnet32_cifar10.npz"
# The pixels it was trained on: those of ImageNet, a little off those of CIFAR-10.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """conv - norm - relu - conv - norm, plus the input, relu. Where the shape changes, the input is
    subsampled and padded with zero channels on both sides (option A, without parameters), or, with
    `projection`, goes through a 1x1 convolution, without the bias that the norm beside it has."""

    channels: int
    stride: int = 1
    projection: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n p q d"]:
        y = _convolved(x, self.channels, self.stride, train, "1")
        y = _convolved(nn.relu(y), self.channels, 1, train, "2")
        if self.projection and (self.stride, x.shape[-1]) != (1, self.channels):
            shortcut = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False, name="shortcut")
            return nn.relu(y + shortcut(x))
        short = x[:, :: self.stride, :: self.stride]
        grown = (self.channels - x.shape[-1]) // 2
        return nn.relu(y + jnp.pad(short, ((0, 0), (0, 0), (0, 0), (grown, grown))))


class ResNet(nn.Module):
    """A 3x3 convolution, a stage of `blocks` at each of 16, 32 and 64 channels, the mean over the
    pixels, a dense layer: 6 blocks + 2 layers with weights, 32 for five. MLPerf Tiny's ResNet-8 has
    one block and `projection`, whose layers its name does not count."""

    blocks: int = 5
    classes: int = 10
    channels: tuple[int, ...] = (16, 32, 64)
    projection: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        x = nn.relu(_convolved(x, self.channels[0], 1, train, "1"))
        for stage, channels in enumerate(self.channels, start=1):
            for i in range(self.blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                block = Block(channels, stride, self.projection, name=f"layer{stage}_{i}")
                x = block(x, train)
        return nn.Dense(self.classes, name="linear")(x.mean((1, 2)))


def _convolved(x: Array, channels: int, stride: int, train: bool, name: str) -> Array:
    """A convolution and its normalization, modules of the caller. The padding is one pixel on
    each side for every stride, as in PyTorch; "SAME" would pad a stride of 2 on one side only."""
    conv = nn.Conv(
        channels, (3, 3), stride, padding=((1, 1), (1, 1)), use_bias=False, name=f"conv{name}"
    )
    norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=f"bn{name}")
    return norm(conv(x))


def load_resnet(path: Path, model: ResNet | None = None) -> dict[str, Any]:
    """The variables of `model`, by default ResNet-32, from arrays under PyTorch's names.

    Raises FileNotFoundError without the file; ValueError naming what is missing, unknown or of
    another shape."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Pass the folder that holds {FILE}.")
    with np.load(path) as arrays:
        return from_torch(arrays, model or ResNet(), str(path))


def from_torch(arrays: Mapping[str, np.ndarray], model: ResNet, where: str = "") -> dict[str, Any]:
    """The variables of `model` from arrays by name; see `load_resnet`."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    found = {}
    for name in arrays:
        if not name.endswith("num_batches_tracked"):
            path, array = _ours(name, np.asarray(arrays[name]))
            found[path] = jnp.asarray(array)
    wanted = flax.traverse_util.flatten_dict(shapes)
    if odd := sorted("/".join(path) for path in found.keys() ^ wanted.keys()):
        raise ValueError(f"{where}: expected the arrays of {model}; differs in {odd[:5]}.")
    for path, leaf in wanted.items():
        if found[path].shape != leaf.shape:
            raise ValueError(
                f"{where}: {'/'.join(path)}: expected {leaf.shape}, got {found[path].shape}."
            )
    return flax.traverse_util.unflatten_dict(found)


def _ours(name: str, array: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Where an array of PyTorch's name goes, in our layout: OIHW becomes HWIO, OI becomes IO."""
    *modules, leaf = re.sub(r"layer(\d)\.(\d)", r"layer\1_\2", name).split(".")
    if leaf.startswith("running_"):
        return ("batch_stats", *modules, leaf.removeprefix("running_")), array
    if array.ndim > 1:
        layout = (2, 3, 1, 0) if array.ndim == 4 else (1, 0)
        return ("params", *modules, "kernel"), array.transpose(layout)
    return ("params", *modules, "scale" if leaf == "weight" else leaf), array


def pixels_of_resnet(data: Dataset) -> Dataset:
    """The set, normalized as the network expects it."""
    return dataclasses.replace(data, mean=MEAN, std=STD)
