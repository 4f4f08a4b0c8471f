"""Check what exists before torch is imported: that takes seconds, and finding a typing error should not.

Each is checked again where it is used; nothing here imports torch, lightning or transformers.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from vlm_tune.config.own_function import require_given
from vlm_tune.config.parse import find_choice, load_config, load_plain, options
from vlm_tune.config.schema import Config, Optimizer, Quantize, Strategy
from vlm_tune.data.dialects.dialects import require_format
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.rows.rows import find_files
from vlm_tune.data.sample import Picture
from vlm_tune.data.sets.paths import find_file, find_test
from vlm_tune.errors import ConfigError
from vlm_tune.model.checkpoint import find_checkpoint, run_config, start_of
from vlm_tune.model.layouts.folders import PARTS_SETTINGS, find_folder, require_weights
from vlm_tune.recipes.recipe import require_recipe

LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")  # the packages are of the same names
SMALLER = {"mlflow": "mlflow-skinny"}  # without its server
RECIPE = "recipe:"


def require_rows(config: Config) -> None:
    """Raise DataError or ConfigError for files of rows that do not exist, and for an unknown dialect.

    A recipe is not run: its name alone is looked at.
    """
    data = config.data
    for key, path in (("data.path", data.path), ("data.val", data.val), ("data.test", data.test)):
        if path.startswith(RECIPE):
            require_recipe(path.removeprefix(RECIPE).partition("/")[0])
        elif key == "data.path" or path not in ("auto", "none"):
            find_files(find_file(path, key))
    require_format(data.format)


def require_model(config: Config) -> None:
    """Raise ConfigError for a model without weights, or whose folder does not exist; the hub is not asked."""
    model = config.model
    require_weights(model)
    for key, path in (
        ("model.path", model.path),
        ("model.vision.path", model.vision.path),
        ("model.llm.path", model.llm.path),
    ):
        if path is None or (model.path is not None and key != "model.path"):
            continue
        is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
        if path.startswith(RECIPE):
            require_recipe(path.removeprefix(RECIPE))
        elif not is_hub_id:
            find_folder(path, key)


def require_packages(config: Config) -> None:
    """Raise ConfigError for loggers that do not exist and for packages that the settings need and that are missing."""
    unknown = [name for name in config.logger.names if name not in LOGGERS]
    if unknown:
        raise ConfigError(f"logger.names={unknown}: no such logger. There are: {', '.join(LOGGERS)}")
    missing = [name for name in config.logger.names if find_spec(name) is None]
    if missing:
        packages = " ".join(SMALLER.get(name, name) for name in missing)
        raise ConfigError(f"logger.names={missing}: not installed. Run `pip install {packages}`")
    needed = {
        "bitsandbytes": {
            f"stage.quantize={config.stage.quantize.value}": config.stage.quantize is not Quantize.none,
            f"stage.optimizer={config.stage.optimizer.value}": config.stage.optimizer is not Optimizer.adamw,
        },
        "deepspeed": {
            f"strategy={config.strategy.name.value}": config.strategy.name
            not in (Strategy.auto, Strategy.ddp, Strategy.fsdp)
        },
    }
    for package, settings in needed.items():
        asking = [setting for setting, asks in settings.items() if asks]
        if asking and find_spec(package) is None:
            raise ConfigError(
                f"{asking[0]} needs the package {package}, which is not installed. Run `pip install "
                f"{package}`, or leave the setting out"
            )


def require_run(ckpt: str, overrides: list[str]) -> Config:
    """Return the configuration of a run; raise CheckpointError or ConfigError where it, or its start, is none."""
    checkpoint = find_checkpoint(ckpt)
    config = run_config(checkpoint, overrides)
    start_of(checkpoint)
    return config


def is_model(ckpt: str) -> bool:
    """Return whether `ckpt` names a model that no run made: the folder of one, or a hub id."""
    folder = Path(ckpt).expanduser()
    if folder.is_dir():
        return any((folder / name).is_file() for name in ("config.json", PARTS_SETTINGS))
    looks_so = ckpt.count("/") == 1 and not ckpt.startswith((".", "/", "~")) and not ckpt.endswith(".ckpt")
    return looks_so and not folder.parent.exists()  # runs/NAME, where there are runs, is none


def config_of(ckpt: str, overrides: list[str], name: str = "") -> Config:
    """Return the configuration of a run, or the default one around a model that no run made, by model=NAME.

    What its folder does not say (template, system prompt, how pictures are cut) is the choice's; a hub id that is the
    path of one needs no name. Raises CheckpointError or ConfigError where there is no such run, or no name.
    """
    if not is_model(ckpt):
        if name:
            raise ConfigError(f"model={name}: {ckpt} is a run, which has its own. Leave model out")
        return require_run(ckpt, overrides)
    known = [choice for choice in options("model") if load_plain(find_choice("model", choice)).get("path") == ckpt]
    if not (name or known):
        raise ConfigError(
            f"ckpt={ckpt} is a model without a run: its template and tiles are not known. Name the settings that "
            "it was trained with, model=NAME (`python -m vlm_tune configs list` shows them)"
        )
    given = any(override.startswith("data.path=") for override in overrides)
    config = load_config([f"model={name or known[0]}", "data=own", *([] if given else ["data.path=none"]), *overrides])
    return replace(config, model=replace(config.model, path=ckpt))


def require_questions(config: Config) -> Path | None:
    """Return the test file of a run, None where it has none; raise for one that is not there or may not be read."""
    path = find_test(config)
    if path is not None:
        require_given(config.data.format)
        require_format(config.data.format)
    return path


def require_extra(package: str) -> None:
    """Raise ConfigError where a package of the extra `serve` is missing."""
    if find_spec(package) is None:
        raise ConfigError(f"{package} is not installed. Run `pip install '.[serve]'` in vlm_tune's checkout")


def require_picture(path: str, config: Config) -> Picture:
    """Return a picture that the user names; raise DataError where it cannot be read."""
    picture = Picture(str(Path(path).expanduser().resolve()))
    reader = ImageReader(config.data.image, Path(picture.path).parent)
    reader.open_picture(picture)
    return picture


def new_file(out: str, key: str = "out") -> Path:
    """Return the file to write; raise ConfigError, before anything is answered, where one is there already."""
    path = Path(out).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{key}={out}: not a file in a folder that is there. Name one: {key}=FILE")
    if path.is_file():
        raise ConfigError(f"{key}={out}: the file is there already. Name a new one: nothing is overwritten")
    return path
