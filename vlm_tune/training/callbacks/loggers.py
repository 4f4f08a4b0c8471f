"""The loggers that others look at, by name, and the sample answers for those that show pictures.

Each keeps its files on this machine unless its own environment variables name a server (WANDB_MODE,
MLFLOW_TRACKING_URI, TRACKIO_SERVER_URL). metrics.csv is written whether or not any of them is asked for.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vlm_tune.config.schema import ImageConfig
from vlm_tune.pages.report_html import small_picture
from vlm_tune.training.callbacks.metrics import Curves

PROJECT = "vlm_tune"
COLUMNS = ("question", "expected", "answer")


class Trackio(Logger):
    """Trackio, for which Lightning has no logger of its own."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run
        self.opened: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return PROJECT

    @property
    def version(self) -> str:
        """The run."""
        return self.run.name

    def open(self) -> Any:
        """Open the run; a resumed one goes on in its own."""
        import trackio

        if self.opened is None:
            self.opened = trackio.init(project=PROJECT, name=self.run.name, resume="allow", embed=False)
        return self.opened

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **options: Any) -> None:
        """Leave settings to config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log a step's numbers."""
        self.open().log(metrics, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        if self.opened is not None:
            self.opened.finish()
            self.opened = None


def mlflow_logger(run: Path) -> Logger:
    """Log to the server that MLFLOW_TRACKING_URI names, else into a folder of the run."""
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return MLFlowLogger(PROJECT, run.name, server or (run / "mlflow").as_uri())


LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda run: Curves(run, name="", version="tensorboard"),
    "wandb": lambda run: WandbLogger(save_dir=run, name=run.name, project=PROJECT),
    "mlflow": mlflow_logger,
    "trackio": Trackio,
}


def show_answers(logger: Logger, step: int, answers: list[dict[str, Any]]) -> None:
    """Hand sample answers (as in sample_answers.jsonl) and their pictures to a logger that shows them."""
    show = next((show for kind, show in SHOWING.items() if isinstance(logger, kind)), None)
    if show is not None:
        paths = [answer["picture"] for answer in answers]
        pictures = [small_picture(path, ImageConfig()) if path else None for path in paths]
        show(logger, step, answers, pictures)


def in_tensorboard(logger: Any, step: int, answers: list[dict[str, Any]], pictures: list[Any]) -> None:
    """Write each answer as text, with its picture beside it at the first step."""
    import numpy as np

    if logger.has_failed:
        return
    for number, (answer, picture) in enumerate(zip(answers, pictures, strict=True)):
        text = "\n\n".join(f"**{name}**: {answer[name]}" for name in COLUMNS)
        logger.experiment.add_text(f"sample answers/{number}", text, step)
        if picture is not None and step == 0:
            logger.experiment.add_image(f"sample answers/{number}", np.asarray(picture), step, dataformats="HWC")


def in_wandb(logger: Any, step: int, answers: list[dict[str, Any]], pictures: list[Any]) -> None:
    """Write a table, and the pictures with question and answer below them."""
    import wandb

    rows = [[answer[name] for name in COLUMNS] for answer in answers]
    said = [f"{answer['question']} {answer['answer']}" for answer in answers]
    shown = [wandb.Image(each, caption=text) for each, text in zip(pictures, said, strict=True) if each is not None]
    logger.experiment.log({f"sample answers/{step}": wandb.Table(list(COLUMNS), rows), "sample answers": shown})


def in_mlflow(logger: Any, step: int, answers: list[dict[str, Any]], pictures: list[Any]) -> None:
    """Write the pictures once, and a table of each step."""
    for number, picture in enumerate(pictures):
        if picture is not None and step == 0:
            logger.experiment.log_image(logger.run_id, picture, f"sample_answers/{number}.png")
    columns = {name: [answer[name] for answer in answers] for name in COLUMNS}
    logger.experiment.log_table(logger.run_id, columns, f"sample_answers/step_{step:08d}.json")


def in_trackio(logger: Trackio, step: int, answers: list[dict[str, Any]], pictures: list[Any]) -> None:
    """Write a table with a column of pictures."""
    import pandas as pd
    import trackio

    run = logger.open()
    table = pd.DataFrame({name: [answer[name] for answer in answers] for name in COLUMNS})
    table.insert(0, "picture", [picture and trackio.Image(picture) for picture in pictures])
    run.log({"sample answers": trackio.Table(dataframe=table)}, step=step)


SHOWING: dict[type, Callable[..., None]] = {
    TensorBoardLogger: in_tensorboard,
    WandbLogger: in_wandb,
    MLFlowLogger: in_mlflow,
    Trackio: in_trackio,
}
