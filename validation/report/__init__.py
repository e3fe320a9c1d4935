"""The report of what perfsim misses: `make validate [DATA=DIR]` writes validation/REPORT.md and its figures."""
