"""Crops: a data worker draws their parameters, the training device applies them to the whole batch."""
