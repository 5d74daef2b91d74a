"""A run's folder -> a page that explains it. The door: read_run, runs_below, report_page."""

from report.folder import Run, duration, is_run, read_run, runs_below
from report.page import report_page
from report.words import headline

__all__ = ["Run", "duration", "headline", "is_run", "read_run", "report_page", "runs_below"]
