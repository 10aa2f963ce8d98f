"""Benchmarks: the runner of ``specdec bench``, ``specdec sweep`` and ``specdec tune drafter``."""
