"""Measurements: cells side by side (``bench``), grids of cells (``sweep``), their results and reports."""
