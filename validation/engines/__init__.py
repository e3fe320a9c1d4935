"""Overheads of serving engines, fitted to measured runs: `python -m validation.engines --data DIR [--write]`."""
