"""Measured collectives against the cost model, before anything is fitted to them."""
