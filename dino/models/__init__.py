"""Backbones, the head, and reading and writing of weights."""
