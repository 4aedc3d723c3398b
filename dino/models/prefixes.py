"""Prefixes of models that are not files of this package."""

TIMM = "timm:"
LOCAL, HUB = "local-dir:", "hf-hub:"  # timm's prefixes of a folder, and of a repository of Hugging Face
