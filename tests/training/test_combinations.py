"""Ways of training that are seldom combined with several processes: each trains as one process does."""

import pytest
import torch
from processes import run_two
from test_strategies import TWO, compare

from vlm_tune.cli import main
from vlm_tune.data.pictures.feature_cache import FeatureCache
from vlm_tune.model.checkpoint import find_runs

ALL = (
    "stage=finetune",
    "stage.init_from=none",
    "stage.lr={vision: 1e-3, projector: 1e-3, llm: 1e-3}",
    "stage.lora.dropout=0",
    "stage.clip=0",
    "stage.pack_length=60",  # one or two rows a pack: ranks often get one without pictures
    "stage.max_steps=4",
    "stage.evaluate=false",
    "trainer.global_batch=4",
    "trainer.num_chats=0",
    "trainer.val_every=2",
)
QLORA, DORA = ("stage.quantize=nf4",), ("stage.lora.dora=true",)
RECOMPUTED = ("stage=finetune_full", "stage.gradient_checkpointing={vision: true, projector: true, llm: true}")
CHUNKED = ("stage=finetune_full", "stage.gradient_checkpointing.llm=mlp")
NOISY, FEATURES = ("stage.neftune=5",), ("data.feature_cache=on",)
ROWS = [
    *[(strategy, QLORA) for strategy in ("ddp", "zero1", "zero2")],
    *[(strategy, CHUNKED) for strategy in ("ddp", "fsdp", "zero2")],
    *[(strategy, way) for strategy in ("fsdp", "zero3") for way in (DORA, RECOMPUTED, NOISY, FEATURES)],
]


@pytest.fixture(scope="module")
def one(toys, tmp_path_factory):
    """Give a function that returns the run of one process, made once."""
    made = {}

    def run(way):
        if way not in made:
            runs = tmp_path_factory.mktemp("one")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            assert main(given(toys, runs, *way)) == 0
            torch.set_num_threads(threads)
            made[way] = find_runs(runs)[0]
        return made[way]

    return run


def given(toys, runs, *more):
    chosen = {key.partition("=")[0]: key for key in (*ALL, *more)}
    return toys.arguments(*chosen.values(), runs=runs)


@pytest.mark.strategies
@pytest.mark.parametrize(("strategy", "way"), ROWS, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_two_processes_train_as_one(toys, one, tmp_path, strategy, way):
    run = run_two(given(toys, tmp_path / "runs", *way, *TWO, f"strategy={strategy}"), tmp_path / "runs")
    loss, weight = compare(run, one(way))
    assert loss < 1e-5
    assert weight < 1e-5


@pytest.mark.strategies
def test_each_picture_is_encoded_once_for_all_ranks(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    write, log = FeatureCache.write, tmp_path / "written"

    def written(self, key, features):
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{key}\n")
        write(self, key, features)

    monkeypatch.setattr(FeatureCache, "write", written)
    run_two(given(toys, tmp_path / "runs", *FEATURES, *TWO, "strategy=ddp"), tmp_path / "runs")
    keys = log.read_text(encoding="utf-8").split()
    assert len(keys) == len(set(keys)) > 10
