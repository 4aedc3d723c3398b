"""Every error this package raises on purpose.

Each message is one line that says what was expected, what was found and what to do about it. The command
line prints it without a traceback and ends with the error's ``exit_code``.
"""


class DinoError(Exception):
    """Base of every deliberate error; the user's input is wrong unless a subclass says otherwise.

    Attributes:
        exit_code: Process exit code of the command line (2: the user's input, 1: a fault, 75: stopped on purpose).
    """

    exit_code = 2


class ConfigError(DinoError):
    """A setting is unknown, of the wrong type, out of range, or does not fit another setting."""


class DataError(DinoError):
    """An input file or folder is missing, damaged, or not what the command needs."""


class CheckpointError(DinoError):
    """A checkpoint is damaged, unsafe, of another level, or does not fit the model it is meant for."""


class TrainingFault(DinoError):
    """Training broke down (a non-finite loss or gradient); nothing on disk was overwritten."""

    exit_code = 1


class OutOfMemory(DinoError):
    """The device's memory does not hold what the settings ask for; the last checkpoint stands."""


class ProcessesLost(TrainingFault):
    """Another process of the same job ended, or did not come in time; this one cannot go on alone."""


class Stopped(DinoError):
    """The run was asked to stop (by a signal), saved its state, and can be continued.

    Attributes:
        signal: Number of the signal that this process received; None when it was another process of the job.
    """

    exit_code = 75

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal
