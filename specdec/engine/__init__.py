"""Requests, the scheduler, a step, automatic depth, costs, metrics and replay. Knows no drafter and no text."""
