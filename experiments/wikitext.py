"""WikiText-2 as windows of tokens, to train a language model and to judge it.
Merity et al., "Pointer Sentinel Mixture Models", 2016, arXiv:1609.07843.

The tokenised version: words stand between spaces, rare ones are the word <unk>."""

import lzma
from pathlib import Path

from experiments.byte_pairs import learn
from experiments.windows import Windows, count_words, windows


def load(data_dir: Path, *, vocabulary: int = 4096, context: int = 128) -> Windows:
    """Reads `wiki.{train,valid,test}.tokens`, with or without `.xz`, in `data_dir` or its folder
    `wikitext2`; the byte pairs are learned on the training text.

    Raises FileNotFoundError naming the files."""
    texts = {split: _read(data_dir, f"wiki.{split}.tokens") for split in ("train", "valid", "test")}
    tokenizer = learn(texts["train"], vocabulary)
    train, valid, test = (windows(tokenizer.encode(t), context) for t in texts.values())
    words = count_words(tokenizer, test[1])
    return Windows("wikitext2", tokenizer, *train, *valid, *test, words)


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
