"""Every error that a user can meet. Each message says what is wrong, where, and what to do."""


class VlmTuneError(Exception):
    """A fault in the input, not in the program; the command line prints it without a traceback."""


class ConfigError(VlmTuneError):
    """Faults in the configuration, all of them at once."""

    @classmethod
    def from_problems(cls, problems: list[str]) -> "ConfigError":
        """List all problems below one headline."""
        if len(problems) == 1:
            return cls(problems[0])
        return cls(f"{len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems))


class DataError(VlmTuneError):
    """A fault in the user's data, with file, line and sample id where they are known."""

    def __init__(self, reason: str, where: str = "", sample_id: str | None = None) -> None:
        self.reason = reason
        self.where = where
        self.sample_id = sample_id
        identity = f' (id "{sample_id}")' if sample_id is not None else ""
        super().__init__(f"{where}{identity}: {reason}" if where else reason)


class TrainingError(VlmTuneError):
    """A run that cannot continue: its loss or weights are not finite, or another process trains in its folder."""


class CheckpointError(VlmTuneError):
    """A checkpoint that is missing, incomplete, or does not fit the model."""


class Stopped(Exception):
    """A run that was asked to stop and has saved its state: not a fault, but with an exit code of its own."""

    code = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, resume later

    def __init__(self, step: int, asked: str) -> None:
        super().__init__(f"{asked}: stopped after step {step}, and its state is saved. Go on with resume=last")
