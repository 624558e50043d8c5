"""WikiText-2 as windows of tokens, to train a language model and to judge it.
Merity et al., "Pointer Sentinel Mixture Models", 2016, arXiv:1609.07843.

The tokenised version: words stand between spaces, rare ones are the word <unk>."""

import dataclasses
import lzma
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.byte_pairs import BytePairs, learn

Tokens = Int[np.ndarray, "n t"]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `context` tokens that follow each other, and the token after each of theirs, in
    three parts; the fields are named as the shared loop knows them. The rest of a part that
    fills no window is left out.

    test_words: the words and ends of line that the test windows hold, for a perplexity by word,
    which does not depend on the vocabulary."""

    name: str
    tokenizer: BytePairs
    train_images: Tokens
    train_labels: Tokens
    validation_images: Tokens
    validation_labels: Tokens
    test_images: Tokens
    test_labels: Tokens
    test_words: int

    def normalize(self, tokens: Int[Array, "n t"] | Tokens) -> Int[Array, "n t"]:
        """Tokens need none."""
        return jnp.asarray(tokens)


def load(data_dir: Path, *, vocabulary: int = 4096, context: int = 128) -> Windows:
    """Reads `wiki.{train,valid,test}.tokens`, with or without `.xz`, in `data_dir` or its folder
    `wikitext2`; the byte pairs are learned on the training text.

    Raises FileNotFoundError naming the files."""
    texts = {split: _read(data_dir, f"wiki.{split}.tokens") for split in ("train", "valid", "test")}
    tokenizer = learn(texts["train"], vocabulary)
    train, valid, test = (_windows(tokenizer.encode(t), context) for t in texts.values())
    words = tokenizer.decode(test[1].ravel()).replace("\n", " <eos> ").split()
    return Windows("wikitext2", tokenizer, *train, *valid, *test, len(words))


def _windows(tokens: Int[np.ndarray, "n"], context: int) -> tuple[Tokens, Tokens]:
    count = (len(tokens) - 1) // context
    shifted = (tokens[start : start + count * context] for start in (0, 1))
    first, second = (part.reshape(count, context) for part in shifted)
    return first, second


def _read(folder: Path, name: str) -> str:
    tried = [
        home / file for home in (folder, folder / "wikitext2") for file in (name, f"{name}.xz")
    ]
    for path in tried:
        if path.is_file():
            raw = path.read_bytes()
            return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf8")
    raise FileNotFoundError(
        f"WikiText-2: none of {', '.join(map(str, tried))}. Pass the folder of its files as "
        "--data-dir."
    )
