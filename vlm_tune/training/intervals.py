"""Default intervals: how often a run validates, saves and answers if the user does not say."""

from vlm_tune.config.schema import TrainerConfig

SHARE, MOST = 5, 200


def every(given: int | None, max_steps: int) -> int:
    """Return an interval in optimizer steps: the given one, else a fifth of the run, at most 200."""
    return min(MOST, -(-max_steps // SHARE)) if given is None else given


def describe(trainer: TrainerConfig, max_steps: int) -> str:
    """Describe the run's length and its intervals, and which of them follow from the length."""
    intervals = {"val_every": trainer.val_every, "save_every": trainer.save_every, "chat_every": trainer.chat_every}
    named = {name: every(given, max_steps) for name, given in intervals.items()}
    derived = ", ".join(f"trainer.{name}={named[name]}" for name, given in intervals.items() if given is None)
    chats = f"sample answers every {named['chat_every']}" if named["chat_every"] else "no sample answers in between"
    return (
        f"{max_steps} optimizer steps: validation every {named['val_every']} and at the end, a checkpoint every "
        f"{named['save_every']}, {chats}" + (f" (from the length of the run: {derived})" if derived else "")
    )
