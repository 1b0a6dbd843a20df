"""What each stage does: plain functions, each wrapped by a thin Prefect task."""
