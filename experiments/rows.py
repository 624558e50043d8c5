"""A table that is computed row by row, over days if need be: what is there is not done again.

One JSON holds a head, which says what all rows are of, and the rows. Each is written as soon as
it is known, whole or not at all, so a run that stops loses the row it was at. A row that fails
holds the reason in place of numbers, and is tried again by the next run."""

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.describe import differences, digest_of
from experiments.report import write_json


class NotApplicable(Exception):
    """Raised by what computes a row: this row has no number, and the message says why."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """path: the JSON. head: what must agree for its rows to belong here.

    Raises ValueError, when used, for a file with another head."""

    path: Path
    head: Mapping[str, Any]

    def stored(self) -> list[dict[str, Any]]:
        """The rows there are."""
        if not self.path.is_file():
            return []
        payload = json.loads(self.path.read_text())
        mine = json.loads(json.dumps(self.head))  # tuples become lists
        if lines := differences({k: payload.get(k) for k in mine}, mine):
            raise ValueError(
                f"{self.path} is of another experiment (stored != asked): {'; '.join(lines[:3])}. "
                "Delete it, or write elsewhere."
            )
        return payload["rows"]

    def have(self, keys: Iterable[Mapping[str, Any]]) -> bool:
        """Whether each of these rows is known, so that none would be computed."""
        return all(self._known(key) is not None for key in keys)

    def of_network(
        self,
        key: Mapping[str, Any],
        params: Any,
        compute: Callable[[], Mapping[str, Any]],
        **about: Any,
    ) -> dict[str, Any]:
        """The row of a network as it is, with a digest of its parameters: other rows say what came
        of it. Raises ValueError where the stored row is of other parameters: trained anew by the
        same seed, on another machine, it is another network, and the losses of both do not mix."""
        mine = digest_of(params)
        row = self.row(key, lambda: {**compute(), "checkpoint": mine}, **about)
        if "reason" not in row and (stored := row.get("checkpoint")) != mine:
            raise ValueError(
                f"{self.path}: the rows of {dict(key)} are of other parameters (digest {stored}, "
                f"now {mine}). Delete them, write elsewhere, or ask for another seed."
            )
        return row

    def row(
        self, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]], **about: Any
    ) -> dict[str, Any]:
        """The row of this key: as stored, or computed and stored. `about` goes to the file's top,
        such as the versions of the last run; a row keeps its own device, whose seconds it has."""
        if (there := self._known(key)) is not None:
            return there
        try:
            own = {"device": about["device"]} if "device" in about else {}
            found = {**key, **compute(), **own}
        except NotApplicable as why:
            found = {**key, "reason": str(why)}
        except Exception as error:  # one row's failure is that row's result
            traceback.print_exc(file=sys.stderr)
            found = {**key, "reason": f"{type(error).__name__}: {error}"[:500]}
        rows = self.stored()  # anew: another process may have added to them meanwhile
        place = next((i for i, row in enumerate(rows) if key.items() <= row.items()), len(rows))
        rows[place : place + 1] = [found]
        write_json(self.path, {**self.head, **about, "rows": rows})
        return found

    def _known(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row that need not be computed."""
        there = next((row for row in self.stored() if key.items() <= row.items()), None)
        return None if there is None or "reason" in there else there
