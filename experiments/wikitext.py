"""WikiText-2 as windows of tokens, to train a language model and to judge it.
Merity et al., "Pointer Sentinel Mixture Models", 2016, arXiv:1609.07843.

The tokenised version: words stand between spaces, rare ones are the word <unk>."""

import collections
import dataclasses
import lzma
from pathlib import Path

import numpy as np
from jaxtyping import Int

from experiments.byte_pairs import learn
from experiments.windows import Windows, count_words, windows, words_of


def load(data_dir: Path, *, vocabulary: int = 4096, context: int = 128) -> Windows:
    """Reads `wiki.{train,valid,test}.tokens`, with or without `.xz`, in `data_dir` or its folder
    `wikitext2`; the byte pairs are learned on the training text.

    Raises FileNotFoundError naming the files."""
    texts = {split: _read(data_dir, f"wiki.{split}.tokens") for split in ("train", "valid", "test")}
    tokenizer = learn(texts["train"], vocabulary)
    train, valid, test = (windows(tokenizer.encode(t), context) for t in texts.values())
    words = count_words(tokenizer, test[1])
    return Windows("wikitext2", tokenizer, *train, *valid, *test, words)


@dataclasses.dataclass(frozen=True)
class Words:
    """One token for each word, and one for each end of line; the commonest first.

    >>> words = Words.of("a b a\\n")
    >>> words.encode("b a\\n"), words.decode(words.encode("b a\\n"))
    (array([1, 0, 2], dtype=int32), 'b a <eos>')
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Words":
        """Those that a text holds."""
        return cls(tuple(word for word, _ in collections.Counter(words_of(text)).most_common()))

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        """Raises ValueError naming a word that is not among them."""
        place = {word: i for i, word in enumerate(self.words)}
        found = words_of(text)
        if unknown := sorted(set(found) - set(place)):
            raise ValueError(f"{unknown[0]!r} is not among the {len(self.words)} words.")
        return np.array([place[word] for word in found], np.int32)

    def decode(self, tokens: Int[np.ndarray, "n"]) -> str:
        """The words with spaces between."""
        return " ".join(self.words[i] for i in tokens)


def load_words(data_dir: Path, *, context: int = 30, judged: int = 128) -> Windows:
    """The same files word by word: windows of `context` words to train on, of `judged` words in
    the other parts. The vocabulary is that of the training text, which has all words of the others.

    Raises FileNotFoundError naming the files."""
    texts = {split: _read(data_dir, f"wiki.{split}.tokens") for split in ("train", "valid", "test")}
    words = Words.of(texts["train"])
    sizes = {"train": context, "valid": judged, "test": judged}
    train, valid, test = (windows(words.encode(texts[k]), sizes[k]) for k in texts)
    return Windows("wikitext2 words", words, *train, *valid, *test, test[1].size)


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
