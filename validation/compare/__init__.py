"""Measured tables against predictions: `python -m validation.compare --table FILE.parquet`."""
