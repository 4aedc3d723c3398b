"""Models of the runs that the viewer was given: loaded while it serves, and compared with what it shows."""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dino.errors import DinoError
from dino.extraction.catalogue import Catalogue
from dino.extraction.folders import tile_folder
from dino.extraction.record import check_made_by
from dino.viewer.attention import AttentionFiles, TileAttention

if TYPE_CHECKING:  # imports torch
    from dino.models.weights import LoadedBackbone


class RunModels:
    """Loads the models of the runs beside the server, since importing torch takes longer than all else at the start.

    Args:
        catalogue: The ROOT.
        runs: Runs by the encoder that their features are of.
        attention: Attention maps by encoder.
    """

    def __init__(
        self, catalogue: Catalogue, runs: Mapping[str, str], attention: Mapping[str, AttentionFiles] | None = None
    ) -> None:
        self.loaded: dict[str, TileAttention | None] = dict.fromkeys(runs)
        self._catalogue, self._runs, self._attention = catalogue, runs, attention or {}
        self._error: DinoError | None = None

    def start(self, end: Callable[[], None]) -> None:
        """Load them in a thread, which calls ``end`` if one cannot be loaded, or did not make what is shown of it."""

        def load() -> None:
            try:
                for name, run in self._runs.items():
                    model = _model(self._catalogue, name, run)
                    if name in self._attention:
                        self._attention[name].check_made_by({"model": run, "fingerprint": model.fingerprint}, run)
                    self.loaded[name] = TileAttention(self._catalogue, model)
            except DinoError as error:
                self._error = error
                end()

        if self._runs:
            threading.Thread(target=load, name="models", daemon=True).start()

    def check(self) -> None:
        """Raise the error that ended the server, if one did."""
        if self._error is not None:
            raise self._error


def _model(catalogue: Catalogue, name: str, run: str) -> "LoadedBackbone":
    """The level-1 model of a run, which must have made the features of that name.

    Raises:
        CheckpointError: If it cannot be loaded.
        DataError: If the features are of another model.
    """
    from dino.models.weights import load_backbone_file

    loaded, folder = load_backbone_file(run), tile_folder(catalogue.root, name)
    check_made_by(folder, loaded, f"view '{name}' alone")
    return loaded
