"""The command line: words in, calls of :mod:`dino.api` out; nothing is decided here."""
