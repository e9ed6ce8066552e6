"""The report of a run: one page, figures and tables, made from what the run directory holds."""

from gaintune.report.page import write_report

__all__ = ["write_report"]
