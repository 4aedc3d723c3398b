"""Typed settings and recipes."""
