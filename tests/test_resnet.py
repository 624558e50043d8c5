"""Is the ResNet the published one: its layers, its arrays, and what it computes from them?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.resnet import ResNet, from_torch, load_resnet

SMALL = ResNet(blocks=1)


def torch_arrays(blocks, seed=0):
    """Random arrays under PyTorch's names, with its counters of batches."""
    random = np.random.default_rng(seed)
    arrays, channels = {}, 3

    def layer(prefix, name, inputs, outputs):
        shape = (outputs, inputs, 3, 3)
        arrays[f"{prefix}conv{name}.weight"] = random.normal(0, (9 * inputs) ** -0.5, shape)
        norm = f"{prefix}bn{name}."
        arrays[norm + "weight"] = random.uniform(0.5, 1.5, outputs)
        arrays[norm + "bias"] = random.normal(size=outputs)
        arrays[norm + "running_mean"] = random.normal(size=outputs)
        arrays[norm + "running_var"] = random.uniform(0.5, 1.5, outputs)
        arrays[norm + "num_batches_tracked"] = np.array(7)

    layer("", "1", channels, 16)
    channels = 16
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for i in range(blocks):
            layer(f"layer{stage}.{i}.", "1", channels, width)
            layer(f"layer{stage}.{i}.", "2", width, width)
            channels = width
    arrays["linear.weight"] = random.normal(0, 0.1, (10, 64))
    arrays["linear.bias"] = random.normal(size=10)
    return {k: np.asarray(a, np.float32 if a.ndim else np.int64) for k, a in arrays.items()}


def reference(arrays, x, blocks):
    """The paper's network in NumPy and float64, images as NCHW, arrays under PyTorch's names."""

    def layer(prefix, name, x, stride):
        w = arrays[f"{prefix}conv{name}.weight"].astype(np.float64)
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
        y = np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], w)
        scale, bias, mean, var = (
            arrays[f"{prefix}bn{name}.{part}"].reshape(-1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(layer("", "1", x, 1), 0)
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for i in range(blocks):
            stride = 2 if stage > 1 and i == 0 else 1
            y = np.maximum(layer(f"layer{stage}.{i}.", "1", x, stride), 0)
            y = layer(f"layer{stage}.{i}.", "2", y, 1)
            short, extra = x[:, :, ::stride, ::stride], (width - x.shape[1]) // 2
            short = np.pad(short, ((0, 0), (extra, extra), (0, 0), (0, 0)))
            x = np.maximum(y + short, 0)
    return x.mean((2, 3)) @ arrays["linear.weight"].T + arrays["linear.bias"]


def test_thirty_two_layers_of_the_published_size():
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(ResNet().init, jax.random.key(0), image)
    kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
    assert len(kernels) == 32
    # The paper's 0.46 million, and two running statistics of 1,136 channels each.
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert (count(variables["params"]), count(variables["batch_stats"])) == (464_154, 2 * 1_136)
    assert variables["params"]["layer3_0"]["conv1"]["kernel"].shape == (3, 3, 32, 64)
    assert jax.eval_shape(ResNet().apply, variables, image).shape == (2, 10)


def test_it_computes_what_the_paper_says():
    arrays = torch_arrays(1)
    variables = from_torch(arrays, SMALL)
    x = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    expected = reference(arrays, x.transpose(0, 3, 1, 2).astype(np.float64), 1)
    # Eight layers in float32, of sums of up to 9 * 64 terms: 1e-7 * sqrt(576) each.
    got = jax.jit(SMALL.apply)(variables, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_weights_come_from_a_file(tmp_path):
    arrays = torch_arrays(1)
    np.savez(tmp_path / "w.npz", **arrays)
    found = load_resnet(tmp_path / "w.npz", SMALL)
    jax.tree.map(np.testing.assert_array_equal, found, from_torch(arrays, SMALL))
    with pytest.raises(FileNotFoundError, match="missing.npz: no such file"):
        load_resnet(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"linear.bias": np.zeros(3)}, r"params/linear/bias: expected \(10,\), got \(3,\)"),
        ({"linear.bias": None}, r"differs in \['params/linear/bias'\]"),
        ({"extra.weight": np.zeros(1)}, r"differs in \['params/extra/scale'\]"),
    ],
)
def test_other_arrays_are_refused(change, message):
    arrays = {k: v for k, v in (torch_arrays(1) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        from_torch(arrays, SMALL, "file")
