"""Comparisons of the simulator with real systems; not part of the installed package."""
