"""The live slide viewer: slides as deep zoom with what models see on them, and the same as GeoJSON for QuPath."""
