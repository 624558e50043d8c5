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


def words_of(text: str) -> list[str]:
    """Its words, an end of line being one."""
    return text.replace("\n", " <eos> ").split()


def count_words(tokenizer: Any, tokens: Tokens) -> int:
    """Words and ends of line."""
    return len(words_of(tokenizer.decode(tokens.ravel())))


@dataclasses.dataclass(frozen=True)
class Streams:
    """The order of windows for a network that carries its state on (`train`'s `order`): the text is
    cut into `batch` equal parts, which are read side by side. An epoch is one of so many `pieces`
    of a pass. What does not fill the parts and pieces is not read.

    Raises ValueError, when called, where a piece holds no step.

    >>> Streams(examples=9, batch=2, pieces=2)(1).tolist()
    [[2, 6], [3, 7]]
    """

    examples: int
    batch: int
    pieces: int = 1

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.examples // self.batch // self.pieces

    def __call__(self, epoch: int) -> Int[np.ndarray, "steps batch"]:
        """The windows of each step."""
        if not self.steps:
            raise ValueError(
                f"{self.examples} windows give {self.batch} parts of {self.pieces} pieces no step."
            )
        first = np.arange(self.batch) * (self.examples // self.batch)
        here = epoch % self.pieces * self.steps + np.arange(self.steps)
        return (first + here[:, None]).astype(np.int32)
