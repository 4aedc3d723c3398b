"""Crops: data workers draw their parameters, and the training device applies them to the batch."""
