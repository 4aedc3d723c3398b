"""DINO pretraining for pathology: from whole slides to a hierarchical model."""
