"""Experts in slow memory: packed files, tiers, caches, predictions, and what puts them under a model.

Knows models only as modules with experts, and nothing of drafting, loops or commands.
"""
