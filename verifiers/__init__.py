"""Acceptance rules: one file each, registered in specdec.speculation.registry."""
