"""How does text become a few thousand kinds of tokens, with nothing lost?
Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016,
arXiv:1508.07909, on bytes: every text has an encoding, and decoding gives it back.

Text is cut before each space and around each end of line; pairs are merged within these pieces."""

import dataclasses
import functools
import heapq
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
from jaxtyping import Int

Pair = tuple[int, int]
PIECE = re.compile(r" ?[^ \n]+| ?\n| ")


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """The merges in the order learned: token 256 + i stands for the two tokens of merge i.

    >>> tokenizer = learn("low lower lowest low", 260)
    >>> [tokenizer.decode([i]) for i in tokenizer.encode("lower low")]
    ['low', 'e', 'r', ' low']
    """

    merges: tuple[Pair, ...]

    @property
    def vocabulary(self) -> int:
        return 256 + len(self.merges)

    @functools.cached_property
    def _ranks(self) -> dict[Pair, int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        table = [bytes([i]) for i in range(256)]
        for left, right in self.merges:
            table.append(table[left] + table[right])
        return table

    def encode(self, text: str) -> Int[np.ndarray, "n"]:
        """The tokens of `text`: in each piece the earliest learned merge is applied first."""
        known: dict[str, np.ndarray] = {}
        pieces = PIECE.findall(text)
        for piece in set(pieces):
            known[piece] = np.array(self._encode_piece(piece), np.int32)
        return np.concatenate([np.zeros(0, np.int32), *map(known.__getitem__, pieces)])

    def decode(self, tokens) -> str:
        """The text of `tokens`; a character cut in half becomes U+FFFD."""
        return b"".join(self._bytes[int(i)] for i in tokens).decode("utf8", "replace")

    def _encode_piece(self, piece: str) -> list[int]:
        tokens = list(piece.encode("utf8"))
        while len(tokens) > 1:
            last = len(self.merges)
            pair = min(pairwise(tokens), key=lambda p: self._ranks.get(p, last))
            if pair not in self._ranks:
                break
            tokens = _merge(tokens, pair, 256 + self._ranks[pair])
        return tokens


def learn(text: str, vocabulary: int) -> BytePairs:
    """Merges the most frequent pair of neighbours until there are so many tokens, or no pair.

    Of equally frequent pairs the one of smaller tokens comes first, so the result is one.
    Raises ValueError below 256 tokens, the bytes."""
    if vocabulary < 256:
        raise ValueError(f"a vocabulary of {vocabulary} does not hold the 256 bytes.")
    counts = Counter(PIECE.findall(text))
    words = [list(piece.encode("utf8")) for piece in counts]
    times = list(counts.values())
    frequency: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)  # which words may hold a pair
    for i, word in enumerate(words):
        for pair in pairwise(word):
            frequency[pair] += times[i]
            holders[pair].add(i)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and 256 + len(merges) < vocabulary:
        count, pair = heapq.heappop(heap)
        if frequency[pair] != -count or not count:  # changed since: its true entry is elsewhere
            continue
        changed: set[Pair] = set()
        for i in holders.pop(pair):
            merged = _merge(words[i], pair, 256 + len(merges))
            for old in pairwise(words[i]):
                frequency[old] -= times[i]
                changed.add(old)
            for new in pairwise(merged):
                frequency[new] += times[i]
                holders[new].add(i)
                changed.add(new)
            words[i] = merged
        merges.append(pair)
        for p in changed:
            heapq.heappush(heap, (-frequency[p], p))
    return BytePairs(tuple(merges))


def _merge(tokens: list[int], pair: Pair, merged: int) -> list[int]:
    out, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out
