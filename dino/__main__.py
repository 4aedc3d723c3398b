"""``python -m dino`` is the ``dino`` command."""

from dino.cli.main import main

if __name__ == "__main__":
    main()
