"""Of several ranks, which all find the same faulty rows, one writes them down."""

import json
import os

from processes import run_two

from vlm_tune.data import datamodule


def test_one_rank_writes_all_rows(toys, tmp_path, monkeypatch):
    good = (toys.data / "train.jsonl").read_text(encoding="utf-8")
    bad = [{"id": f"bad_{number}", "conversations": []} for number in range(3)]
    (tmp_path / "train.jsonl").write_text(good + "".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")
    write = datamodule.write_faults

    def written(faults, path):
        (tmp_path / f"written_by_{os.environ['LOCAL_RANK']}").touch()
        write(faults, path)

    monkeypatch.setattr(datamodule, "write_faults", written)
    settings = {
        "data.path": tmp_path / "train.jsonl",
        "data.image.root": toys.data,
        "data.val": "none",
        "data.on_bad_sample": "skip",
        "stage": "finetune",
        "stage.init_from": "none",
        "stage.max_steps": 1,
        "stage.evaluate": "false",
        "trainer.num_chats": 0,
        "trainer.devices": 2,
        "trainer.accelerator": "cpu",
        "strategy": "ddp",
    }
    arguments = toys.arguments(*(f"{key}={value}" for key, value in settings.items()), runs=tmp_path / "runs")
    run = run_two(arguments, tmp_path / "runs")
    lines = (run / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["bad_0", "bad_1", "bad_2"]
    assert [path.name for path in tmp_path.glob("written_by_*")] == ["written_by_0"]
