"""YAML presets and recipes, installed as package data."""
