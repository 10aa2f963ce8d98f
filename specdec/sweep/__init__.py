"""Sweeps: a YAML grid of bench cells, one record per finished cell, and reports."""
