"""Reports: one self-contained HTML page on what was tiled, how the networks were trained and what they learned."""
