"""Fits coefficients of the cost model to measured rows: deterministic, robust, with standard errors and provenance."""
