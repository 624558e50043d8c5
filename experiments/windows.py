"""Texts as windows of tokens, to train a language model and to judge it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Tokens = Int[np.ndarray, "n t"]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `context` tokens that follow each other, and the token after each of theirs, in
    three parts; the fields are named as the shared loop knows them. The rest of a part that
    fills no window is left out.

    tokenizer: encodes text and decodes tokens. test_words: the words and ends of line that the test
    windows hold, for a perplexity by word, which does not depend on the vocabulary."""

    name: str
    tokenizer: Any
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


def windows(tokens: Int[np.ndarray, "n"], context: int) -> tuple[Tokens, Tokens]:
    """Those that follow each other without overlap, and the next token at each of their places."""
    count = (len(tokens) - 1) // context
    shifted = (tokens[start : start + count * context] for start in (0, 1))
    first, second = (part.reshape(count, context) for part in shifted)
    return first, second


def count_words(tokenizer: Any, tokens: Tokens) -> int:
    """Words and ends of line."""
    return len(tokenizer.decode(tokens.ravel()).replace("\n", " <eos> ").split())
