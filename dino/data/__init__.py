"""Samples and batches: where pixels and feature grids come from, as a function of the draw number."""
