"""Keys, values and recurrent states of tokens that have been run: caches with roll-back, and cached prefixes."""
