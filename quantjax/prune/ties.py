"""Which of many channels are one, and which can not go? Union-find, with why something stays."""

import numpy as np

FIXED = 0

# Of one axis: the label at each position, or None where all positions hold the same.
Labels = np.ndarray | None


class Ties:
    """Which labels are one, and why some are fixed. Mutable; it lives as long as one analysis."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._stays = {FIXED: ""}  # by the label that stands for all: why these are fixed
        self.heads: set[int] = set()

    def fresh(self, n: int) -> np.ndarray:
        """New labels."""
        new = np.arange(len(self._parent), len(self._parent) + n)
        self._parent += new.tolist()
        return new

    def _end(self, label: int) -> int:
        """The label that stands for all that are tied to it."""
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def root(self, label: int) -> int:
        """The label that stands for all that are tied to it, or FIXED."""
        end = self._end(label)
        return FIXED if end in self._stays else end

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """The same for many."""
        found, inverse = np.unique(labels, return_inverse=True)
        return np.array([self.root(int(x)) for x in found], np.int64)[inverse].reshape(labels.shape)

    def why(self, labels: np.ndarray) -> list[str]:
        """Why any of these is fixed, each reason once."""
        reasons = [self._stays.get(self._end(x), "") for x in np.unique(labels).tolist()]
        return list(dict.fromkeys(filter(None, reasons)))

    def tie(self, a: Labels, b: Labels, why: str) -> Labels:
        """Position by position; fixed for this reason where one side is."""
        if a is None or b is None:
            return b if a is None else a
        if a is b or not (a.any() or b.any()):
            return a
        for x, y in {*zip(a.tolist(), b.tolist(), strict=True)}:
            self._one(x, y, why)
        return b if not a.any() else a

    def _one(self, x: int, y: int, why: str) -> None:
        if FIXED in (x, y):
            self._fix(max(x, y), why)
            return
        p, q = self._end(x), self._end(y)
        if p != q:
            self._parent[max(p, q)] = min(p, q)
            if p in self._stays or q in self._stays:
                self._stays[min(p, q)] = self._stays.get(p) or self._stays.get(q) or why

    def _fix(self, label: int, why: str) -> None:
        self._stays.setdefault(self._end(label), why)

    def fix(self, labels: Labels, why: str) -> None:
        """These stay."""
        for x in np.unique(labels).tolist() if labels is not None else ():
            self._fix(x, why)

    def all_one(self, labels: np.ndarray) -> None:
        """Along the last axis: one channel."""
        for row in labels.reshape(-1, labels.shape[-1]).tolist():
            for x in {*row[1:]}:
                self._one(row[0], x, "it is one with what stays")
