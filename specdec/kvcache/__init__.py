"""The KV cache: keys, values and recurrent states of tokens that have been run, with roll-back, and cached prefixes."""
