"""Operator curves against the measurements they were fitted to, and those they were not."""
