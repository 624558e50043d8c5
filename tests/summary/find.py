"""Finds the row of a leaf in a report."""

from quantjax.summary import Row, Summary


def row(report: Summary, path: str) -> Row:
    return next(row for row in report.rows if row.path == path)
