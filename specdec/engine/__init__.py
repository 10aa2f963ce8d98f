"""The decoding loop: requests, scheduler, steps, draft depth, metrics and replay. Knows no drafter and no text."""
