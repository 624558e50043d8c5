"""Is every crop and mirror image as likely as the next, and nothing else made?"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.augment import PAD, crop_and_flip


def test_images_are_crops_of_the_padded_image_all_equally_likely():
    side, count = 5, 162 * 30
    image = np.arange(1, 2 * side**2 + 1, dtype=np.uint8).reshape(side, side, 2)
    padded = np.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)))
    possible = {}
    for down in range(2 * PAD + 1):
        for right in range(2 * PAD + 1):
            cut = padded[down : down + side, right : right + side]
            possible[cut.tobytes()] = possible[cut[:, ::-1].tobytes()] = 0
    assert len(possible) == 162
    batch = jnp.broadcast_to(image, (count, *image.shape))
    found = np.asarray(jax.jit(crop_and_flip)(jax.random.key(0), batch))
    for one in found:
        possible[one.tobytes()] += 1
    # 30 of each are expected, give or take 5.5; of 162 some are three deviations off.
    assert min(possible.values()) > 8 and max(possible.values()) < 55
    again = jax.jit(crop_and_flip)(jax.random.key(0), batch)
    other = jax.jit(crop_and_flip)(jax.random.key(1), batch)
    assert np.array_equal(found, again) and not np.array_equal(found, other)
