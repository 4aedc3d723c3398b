"""Reports: one self-contained HTML page on tiling, training and features, and the summary of a run in the terminal."""
