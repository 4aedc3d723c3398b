"""Datasets, samplers and batches of tiles and feature grids."""
