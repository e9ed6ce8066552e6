"""What several tests share: tiny models, texts, rows, and runs that are killed."""

from pathlib import Path

STUDY_DATA = Path(__file__).parents[3] / "shared" / "data"
"""Real data sets beside the checkout; what needs them is skipped where they are missing."""
