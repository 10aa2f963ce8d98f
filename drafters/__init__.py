"""Drafters, named in specdec.speculation.registry, and the parts that they share."""
