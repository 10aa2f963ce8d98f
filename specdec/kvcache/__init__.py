"""What runs hold of tokens they have seen: keys, values and recurrent states, with roll-back, and kept prefixes."""
