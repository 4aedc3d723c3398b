"""Versions of the software that results depend on, and threads for independent work on the CPU."""

import importlib
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from dino.errors import ConfigError

VERSION = "0.1.0"
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "simplejpeg",
    "hs2p",
    "openslide-python",
    "openslide-bin",
)


def import_extra(package: str, use: str, extra: str = "") -> Any:
    """A package that is installed with an extra of this one, or that not every machine that trains has.

    Args:
        package: Its name.
        use: What it is needed for, for the message.
        extra: Name of the extra; "" for a package that is no part of one.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        name = f"'histodino[{extra}]'" if extra else package
        raise ConfigError(
            f"expected the package {package} for {use}, found that it is not installed; pip install {name}"
        ) from None


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the installed packages among :data:`PACKAGES`."""
    found = {"histodino": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # training needs neither hs2p nor openslide
    return found


def run_threaded(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call ``work`` on every item, on as many threads as torch uses, each torch operation on a single thread.

    By default torch splits each operation over all threads, which then synchronise hundreds of times per tile. That is
    slower as soon as the machine is busy. With one thread per item, the results do not depend on the number of threads.

    Args:
        work: Function to call; the calls must be independent of each other.
        items: Its arguments.
    """
    import torch  # here, because the command line imports this module and must start fast

    threads = torch.get_num_threads()
    if threads == 1:
        for item in items:
            work(item)
        return
    # torch.set_num_threads in a worker also sets the default of threads that start later: restore it.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(torch.no_grad()(work), items):
                pass
    finally:
        torch.set_num_threads(threads)
