"""What `evaluate` and `answer` are asked for, checked before torch is imported."""

from dataclasses import dataclass, replace
from pathlib import Path

from vlm_tune.config.schema import Config, DataConfig
from vlm_tune.data.dialects.dialects import require_format
from vlm_tune.data.rows.rows import find_files
from vlm_tune.data.sets.paths import find_file
from vlm_tune.errors import ConfigError
from vlm_tune.evaluation.metrics import Metric, metric_of
from vlm_tune.model.ready import config_of, is_model, new_file, require_questions


@dataclass(frozen=True)
class Wanted:
    """The checkpoints to score, in what way, and where the answers go."""

    ckpts: tuple[str, ...]
    model: str  # the settings of those that no run made
    overrides: list[str]
    metric: Metric
    by: str  # the field of rows that groups them
    max_new_tokens: int | None
    out: str
    page: str

    @classmethod
    def read(cls, own: dict[str, str], overrides: list[str]) -> "Wanted":
        """Check the verb's keys; raise ConfigError or CheckpointError for the first that is wrong."""
        ckpts = names_of(own["ckpt"])
        for key in ("out", "page"):
            if own[key]:
                new_file(own[key], key)
        if not own["out"] and (len(ckpts) > 1 or is_model(ckpts[0])):
            raise ConfigError(
                "out is not set, and one run alone keeps its answers itself. Name a file: out=answers.jsonl"
            )
        tokens = None if own["max_new_tokens"] == "auto" else whole("max_new_tokens", own["max_new_tokens"])
        metric = metric_of(own["metric"])
        wanted = cls(ckpts, own["model"], overrides, metric, own["by"], tokens, own["out"], own["page"])
        configs = [wanted.config(ckpt) for ckpt in ckpts]
        if require_test(ckpts[0], configs[0], overrides) is None:
            raise ConfigError(
                "data.test is not set and there is no test.jsonl beside data.path: name a file, data.test=FILE"
            )
        return wanted

    def config(self, ckpt: str) -> Config:
        """Return the configuration of one of the checkpoints."""
        return config_of(ckpt, self.overrides, self.model if is_model(ckpt) or len(self.ckpts) == 1 else "")


def names_of(ckpt: str) -> tuple[str, ...]:
    """Separate the names of several checkpoints: "runs/a,runs/b" or "[runs/a, runs/b]"."""
    if Path(ckpt).exists():  # its name may hold a comma
        return (ckpt,)
    names = tuple(name.strip() for name in ckpt.removeprefix("[").removesuffix("]").split(","))
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"ckpt={ckpt}: a name is missing, or given twice. Write ckpt=RUN or ckpt=RUN,FOLDER")
    return names


def require_test(ckpt: str, config: Config, overrides: list[str]) -> Path | None:
    """Return the test file; raise for one that is missing, and for a model without a run, which has none of its own."""
    if is_model(ckpt) and not any(override.startswith("data.test=") for override in overrides):
        raise ConfigError(f"data.test is not set, and {ckpt} is no run that has one. Name a file: data.test=FILE")
    return require_questions(config)


def whole(key: str, value: str) -> int:
    """Read a number of tokens; raise ConfigError for anything else."""
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{key}={value}: give a whole number from 1")
    return int(value)


@dataclass(frozen=True)
class Asked:
    """A file of questions, or a folder of pictures with one question, and where the answers go."""

    ckpt: str
    model: str
    overrides: list[str]
    data: DataConfig
    question: str
    max_new_tokens: int
    out: Path

    @classmethod
    def read(cls, own: dict[str, str], overrides: list[str]) -> "Asked":
        """Check the verb's keys. Where pictures lie and what the rows are written in is not the run's affair."""
        given = {override.partition("=")[0] for override in overrides}
        if "data.path" not in given:
            raise ConfigError("data.path is not set. Name a file of questions or a folder of pictures: data.path=FILE")
        out = Path(own["out"]).expanduser()
        if out.suffix != ".jsonl" or not out.parent.is_dir() or out.is_dir():
            raise ConfigError(
                f"out={own['out']}: no .jsonl file in a folder that is there. Name one: out=answers.jsonl"
            )
        data = config_of(own["ckpt"], overrides, own["model"]).data
        if "data.format" not in given:
            data = replace(data, format="auto")
        if "data.image.root" not in given:
            data = replace(data, image=replace(data.image, root=None))
        path = find_file(data.path)
        if own["question"] and not path.is_dir():
            raise ConfigError(
                f"question={own['question']}: {data.path} is no folder of pictures; its rows ask their own"
            )
        if not own["question"]:
            find_files(path)
            require_format(data.format)
        tokens = whole("max_new_tokens", own["max_new_tokens"])
        return cls(own["ckpt"], own["model"], overrides, data, own["question"], tokens, out)
