"""What became of every leaf of a tree: format, bytes, bits per weight, error, and why."""

from quantjax.summary.measure import summary
from quantjax.summary.report import Summary
from quantjax.summary.rows import Row, Totals

__all__ = ["Row", "Summary", "Totals", "summary"]
