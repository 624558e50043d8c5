"""Plays of Shakespeare, character by character: the text that small language models learn first.
Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015, made the file.

The last tenth of the text is held out: its first half is for validation, its second the test."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int

from experiments.windows import Windows, count_words, windows

FILES = ("input.txt", "tinyshakespeare.txt")


@dataclasses.dataclass(frozen=True)
class Characters:
    """One token for each character of an alphabet, in its order.

    >>> letters = Characters.of("to be")
    >>> letters.encode("bet"), letters.decode(letters.encode("bet"))
    (array([1, 2, 4], dtype=int32), 'bet')
    """

    alphabet: str

    @classmethod
    def of(cls, text: str) -> "Characters":
        """Those that a text holds, sorted."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        """Raises ValueError naming a character that is not in the alphabet."""
        if unknown := sorted(set(text) - set(self.alphabet)):
            raise ValueError(f"{unknown[0]!r} is not among the {len(self.alphabet)} characters.")
        place = {letter: i for i, letter in enumerate(self.alphabet)}
        return np.array([place[letter] for letter in text], np.int32)

    def decode(self, tokens: Int[np.ndarray, "n"]) -> str:
        """The inverse."""
        return "".join(self.alphabet[i] for i in tokens)


def load(data_dir: Path, *, context: int = 64) -> Windows:
    """Reads `input.txt` in `data_dir` or its folder `tinyshakespeare`.

    Raises FileNotFoundError naming the files it looked for."""
    tried = [home / f for home in (data_dir, data_dir / "tinyshakespeare") for f in FILES]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"tiny Shakespeare: none of {', '.join(map(str, tried))}.")
    text = path.read_text("utf8")
    letters = Characters.of(text)
    tokens = letters.encode(text)
    first, second = (len(tokens) * tenths // 20 for tenths in (18, 19))
    parts = np.split(tokens, (first, second))
    train, valid, test = (windows(part, context) for part in parts)
    return Windows("tinyshakespeare", letters, *train, *valid, *test, count_words(letters, test[1]))
