"""Test that drafts change no token: the losslessness certificate of the command ``specdec verify``."""
