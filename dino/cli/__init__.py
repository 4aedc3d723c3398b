"""The command line: parses arguments and settings, and calls :mod:`dino.api`."""
