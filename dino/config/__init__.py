"""Typed settings, recipes and how they are resolved."""
