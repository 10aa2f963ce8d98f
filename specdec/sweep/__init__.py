"""Grids of measurements: YAML in, one record per finished cell out, and the reports made of them."""
