"""Choosing settings for a model, a machine and the user's prompts, by measurement."""
