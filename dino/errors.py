"""All errors that this package raises deliberately.

Each message is one line: what was expected, what was found and what to do. The command line prints it without a
traceback and exits with the error's ``exit_code``.
"""


class DinoError(Exception):
    """Base class of all deliberate errors; an error in the user's input unless the subclass states otherwise.

    Attributes:
        exit_code: Exit code of the command line (2: wrong input, 1: training failed, 75: stopped on request).
    """

    exit_code = 2


class ConfigError(DinoError):
    """A setting is unknown, of the wrong type, out of range, or does not fit another setting."""


class DataError(DinoError):
    """An input file or folder is missing, damaged, or of the wrong kind."""


class CacheError(DataError):
    """The folder that keeps remote slides is full of slides in use, or cannot be written: no slide is at fault."""


class CheckpointError(DinoError):
    """A checkpoint is damaged, unsafe, of another level, or does not match the model."""


class TrainingFault(DinoError):
    """Training failed (a non-finite loss or gradient); nothing on disk was overwritten."""

    exit_code = 1


class OutOfMemory(DinoError):
    """The device's memory is too small for the settings; the last checkpoint is kept."""


class ProcessesLost(TrainingFault):
    """Another process of the same job ended or did not respond in time; this one cannot continue alone."""


class Stopped(DinoError):
    """A signal requested the run to stop; its state is saved, and it can be resumed.

    Attributes:
        signal: Number of the signal that this process received; None if another process of the job received it.
    """

    exit_code = 75

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal
