"""Benchmarks: one runner for ``specdec bench`` and for the cells of a sweep."""
