"""Experts in slow memory: packed files, tiers, caches, predictors, and the modules that replace a model's experts."""
