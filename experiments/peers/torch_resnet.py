"""The published ResNet in PyTorch, for peers that quantize what that can trace or export."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from experiments.resnet import ResNet


def in_torch(model: ResNet, variables: Any) -> Any:
    """The module with the arrays of `variables`, ready to predict; images are NCHW."""
    import torch
    from torch.nn import BatchNorm2d, Conv2d, Linear, Module, Sequential
    from torch.nn.functional import pad, relu

    class Block(Module):
        def __init__(self, inputs: int, channels: int, stride: int) -> None:
            super().__init__()
            self.conv1 = Conv2d(inputs, channels, 3, stride, 1, bias=False)
            self.bn1 = BatchNorm2d(channels)
            self.conv2 = Conv2d(channels, channels, 3, 1, 1, bias=False)
            self.bn2 = BatchNorm2d(channels)
            self.stride, self.grown = stride, (channels - inputs) // 2

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
            if self.stride > 1:
                x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *2 * (self.grown,)))
            return relu(y + x)

    class Network(Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = BatchNorm2d(16)
            self.blocks = Sequential()
            inputs = 16
            for stage, channels in enumerate((16, 32, 64), start=1):
                for i in range(model.blocks):
                    stride = 2 if stage > 1 and i == 0 else 1
                    self.blocks.add_module(f"layer{stage}_{i}", Block(inputs, channels, stride))
                    inputs = channels
            self.linear = Linear(64, model.classes)

        def forward(self, x: Any) -> Any:
            return self.linear(self.blocks(relu(self.bn1(self.conv1(x)))).mean((2, 3)))

    network = Network()
    arrays = {name: torch.tensor(array) for name, array in torch_arrays(variables).items()}
    network.load_state_dict(arrays, strict=False)
    missing = network.state_dict().keys() - arrays.keys()
    assert all(name.endswith("num_batches_tracked") for name in missing), sorted(missing)
    return network.eval()


def channels_first(images: Any) -> np.ndarray:
    """NHWC, as the experiments have them, to NCHW."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(images, np.float32), -1, 1))


def torch_arrays(variables: Any) -> dict[str, np.ndarray]:
    """The arrays under the names and in the layouts of the module."""
    out = {}
    for (collection, *modules, leaf), value in flatten_dict(variables).items():
        array = np.array(value)
        if leaf == "kernel":
            array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
        leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
        if collection == "batch_stats":
            leaf = f"running_{leaf}"
        inner = ["blocks"] if len(modules) > 1 else []
        out[".".join([*inner, *modules, leaf])] = array
    return out
