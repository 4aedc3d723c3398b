"""Slides to tiles and regions, over hs2p: slide list, lattice, tissue, cutting, tables."""
