"""Crops: drawn as a few numbers by a data worker, applied to the whole batch on the training device."""
