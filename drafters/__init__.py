"""Drafters: one file each, registered in specdec.registry."""
