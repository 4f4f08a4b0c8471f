"""lmms-eval, an evaluation of other people's, gives the accuracy that `evaluate` gives: docs/exports.md says how.

VLM_TUNE_LMMS_PYTHON names the python of an environment that has it; without it nothing is asked.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]
PYTHON = os.environ.get("VLM_TUNE_LMMS_PYTHON")
TASK = Path(__file__).parents[1] / "docs" / "lmms_eval"
TRAINED = ("stage.init_from=none", "model.tiles.max=2", "stage.lr={projector: 0.01, llm: 0.02}", "stage.max_steps=120")


@pytest.mark.skipif(not PYTHON, reason="VLM_TUNE_LMMS_PYTHON names no python")
def test_lmms_eval_gives_the_accuracy_of_evaluate(toys, tmp_path, run_cli):
    quiet = ("stage.evaluate=false", "trainer.num_chats=0", "data.val=none", "trainer.save_every=120")
    assert run_cli("stage=finetune", *toys.arguments(*TRAINED, *quiet, runs=tmp_path / "runs")).code == 0
    rows = [json.loads(line) for line in (toys.data / "train.jsonl").read_text().splitlines()]
    asked = [row for row in rows if "image" in row and len(row["conversations"]) == 2]
    shutil.copytree(toys.data / "pictures", tmp_path / "pictures")
    with (tmp_path / "questions.jsonl").open("w") as file:
        for row in asked:
            question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
            line = {"id": row["id"], "image": row["image"], "question": question, "answer": answer}
            file.write(json.dumps(line) + "\n")
    out = tmp_path / "answers.jsonl"
    given = (f"data.test={tmp_path}/questions.jsonl", "data.format=vqa", f"out={out}")
    assert run_cli("evaluate", f"ckpt={tmp_path}/runs/latest", *given).code == 0
    ours = [json.loads(line)["correct"] for line in out.read_text().splitlines()]
    assert run_cli("export", f"ckpt={tmp_path}/runs/latest", f"out={tmp_path}/model", "layout=hf").code == 0
    model = f"pretrained={tmp_path}/model,device=cpu,device_map=cpu,max_patches=2"
    command = ["-m", "lmms_eval", "--model", "internvl_hf", "--model_args", model, "--include_path", str(TASK)]
    command += ["--tasks", "own", "--batch_size", "1", "--output_path", str(tmp_path / "theirs")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run([PYTHON, *command], cwd=tmp_path, env=os.environ | offline, check=True)
    results = json.loads(next((tmp_path / "theirs").rglob("*_results.json")).read_text())
    theirs = results["results"]["own"]["exact_match,none"]
    assert theirs == pytest.approx(sum(ours) / len(ours))
    assert theirs > 0.5
