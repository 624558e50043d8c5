"""Where can a run be watched? In a JSON that grows by the epoch, or in TensorBoard."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.report import write_json


class Judged(NamedTuple):
    """The validation examples' mean cross-entropy, and the share of them that is right."""

    loss: float
    accuracy: float


class EpochRecord(NamedTuple):
    """One line of a run's history. `seconds` are those of training, without the validation; of
    all runs together where several train at once, `run` being the place of this one's seed.
    `skipped`: steps that were not finite, and changed nothing."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    skipped: int = 0
    run: int = 0


def write(folder: Path, start: Sequence[Judged], history: Sequence[EpochRecord]) -> None:
    """Writes `metrics.json`: each run before its first step, and a line an epoch and run."""
    payload = {
        "start": [judged._asdict() for judged in start],
        "history": [record._asdict() for record in history],
    }
    write_json(folder / "metrics.json", payload)


def tensorboard(folder: Path) -> Callable[[EpochRecord, Any], None]:
    """An `on_epoch` of the loop that writes event files, a folder for each run.

    Raises ImportError, before anything trains, if tensorboardX is not there."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "event files for TensorBoard need tensorboardX, which nothing else here does: "
            "pip install tensorboardX."
        ) from error
    writers: dict[int, Any] = {}

    def write_events(record: EpochRecord, params: Any) -> None:
        if record.run not in writers:
            writers[record.run] = SummaryWriter(str(folder / f"run{record.run}"))
        for name in ("train_loss", "validation_loss", "validation_accuracy", "seconds", "skipped"):
            writers[record.run].add_scalar(name, getattr(record, name), record.epoch)
        writers[record.run].flush()

    return write_events
