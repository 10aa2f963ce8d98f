"""The decoding loop, automatic depth, costs, metrics and replay. Knows no drafter, no text and no command line."""
