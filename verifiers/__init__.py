"""Acceptance rules: one file each, registered in specdec.registry."""
