"""`-m` tries every combination of listed values, each run in a process of its own, and ends with one table of all."""

import pytest

from vlm_tune.config.parse import expand_sweep


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (["seed=1"], [["seed=1"]]),
        (["stage=pretrain,finetune"], [["stage=pretrain"], ["stage=finetune"]]),
        (["seed=1,2", "model=tiny"], [["seed=1", "model=tiny"], ["seed=2", "model=tiny"]]),
        (["a=1,2", "b=3,4"], [["a=1", "b=3"], ["a=1", "b=4"], ["a=2", "b=3"], ["a=2", "b=4"]]),
        (["seed=range(1,3)"], [["seed=1"], ["seed=2"]]),
        (["model.llm.targets=[q,k]"], [["model.llm.targets=[q,k]"]]),
        (["model.llm.targets=[q],[q,k]"], [["model.llm.targets=[q]"], ["model.llm.targets=[q,k]"]]),
        (["data.path='a,b.jsonl'", "~tuned"], [["data.path='a,b.jsonl'", "~tuned"]]),
    ],
)
def test_all_combinations_are_tried(given, lines):
    assert expand_sweep(given) == lines


SHORT = ("stage.init_from=none", "stage.evaluate=false", "trainer.num_chats=0", "stage.max_steps=2")


@pytest.mark.slow
def test_a_sweep_trains_each_and_ends_with_one_table(toys, tmp_path, start_cli):
    done = start_cli("-m", *toys.arguments(*SHORT, "stage.lora.rank=2,4", runs=tmp_path))
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    runs = sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink())
    assert len(runs) == 2
    table = out[out.index("┏") :]
    for run, rank in zip(runs, (2, 4), strict=True):
        (row,) = [line for line in table.splitlines() if f"│ {run}" in line]
        assert [cell.strip() for cell in row.split("│")[2:5]] == [str(rank), "finished", "2 of 2"]
    assert "run 2 of 2: " in out


def test_a_mistake_in_the_last_line_is_said_before_the_first_is_trained(toys, tmp_path, run_cli):
    done = run_cli("-m", *toys.arguments("stage.lora.rank=2,0", runs=tmp_path))
    assert done.code == 2
    assert "stage.lora.rank=0" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_fails_does_not_hide_the_others(toys, tmp_path, start_cli):
    done = start_cli("-m", *toys.arguments(*SHORT, "data.max_length=4,512", runs=tmp_path))
    out, _ = done.communicate(timeout=120)
    assert done.returncode == 2
    assert "run 1 failed (exit code 2): " in out
    assert "finished" in out
