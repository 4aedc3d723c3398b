"""Self-distillation: the module, the one loop, schedules, optimizer, checkpoints and callbacks."""
