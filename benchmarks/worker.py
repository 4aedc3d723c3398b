"""One of several processes that train together; rank 0 prints how many images all of them see in a second."""

import argparse
import json
import time

import torch

from benchmarks.material import random_views
from benchmarks.networks import ReadyViews, Task, our_trainer, take_steps
from dino import distributed


def main() -> None:
    """Train some steps from ready views, on one thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    device = distributed.choose_device("auto")
    task = Task("vit_tiny", 256 if device.type == "cuda" else 16, 4096, ((2, 96), (6, 48)))
    if quick:
        task = Task("vit:dim=64,depth=2,heads=2", 2, 256, ((2, 32), (3, 16)))
    steps = 1 if quick else 6
    with distributed.process_group(device):
        trainer = our_trainer(task, device, "bf16", ReadyViews(random_views(task.batch, 3, task.groups, device)))
        take_steps(trainer, 2)
        distributed.barrier()
        started = time.perf_counter()
        take_steps(trainer, steps)
        float(next(trainer.model.parameters()).sum())  # waits for the device
        distributed.barrier()
        rate = task.batch * steps * distributed.world_size() / (time.perf_counter() - started)
    if distributed.is_main():
        print(json.dumps({"images_per_second": rate}), flush=True)


if __name__ == "__main__":
    main()
