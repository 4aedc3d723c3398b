"""Feature extraction: tiles to feature grids (level 1), feature grids to slide files (level 2)."""
