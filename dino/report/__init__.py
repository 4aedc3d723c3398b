"""What was done and what came of it, as one self-contained page: figures over arrays, prose over settings."""
