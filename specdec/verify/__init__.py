"""The losslessness certificate: ``specdec verify``."""
