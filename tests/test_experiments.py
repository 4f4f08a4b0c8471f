"""Every experiment plans and trains two steps on rows of its own layout, with a toy in place of its model."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from toys import write_jsonl

from vlm_tune.config.parse import load_config, options
from vlm_tune.recipes.recipe import RECORD, prepared_folder, recipe_folders, recipe_version

CAPTION = [{"from": "human", "value": "Write a caption.\n<image>"}, {"from": "gpt", "value": "a red bus on a street"}]
CHAT = [{"from": "human", "value": "Where is Paris?"}, {"from": "gpt", "value": "In France."}]
FOODIE = {"question": "图片中的食物通常属于哪个菜系?", "choices": ["京菜", "徽菜", "新疆菜", "桂菜"], "answer": "2"}
FOOD = {"main_ingredient": ["羊"], "id": 217, "food_name": "烤羊肉串", "food_type": "新疆菜", "food_location": "餐馆"}
PATHS = '[{"parameters": [{"name": "city", "description": "a city"}]}]'
TOOL = f'{{"name": "weather", "description": "says the weather", "paths": {PATHS}}}'
CALL = 'I look it up.<|startofthink|>```JSON\n{"api_name": "weather", "parameters": {"city": "Paris"}}```<|endofthink|>'
RESULT = '<|startofexec|>```JSON\n{"weather": "rain"}```<|endofexec|>It rains.'


@pytest.fixture
def place(tmp_path, monkeypatch, toys) -> Path:
    """Write a few rows of each layout where the experiments look for them, and what their recipes would fetch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    write_llava(tmp_path / "data/llava_data")
    write_internvl(tmp_path / "data/internvl")
    write_foodieqa(tmp_path / "data/FoodieQA")
    write_texts(tmp_path / "data")
    prepared("chat_text", "english")
    prepared("chat_text?languages=chinese", "chinese")
    write_grounding(prepared("grounding"))
    shutil.copytree(toys.data, prepared("demo"), dirs_exist_ok=True)
    shutil.copy(toys.data / "train.jsonl", prepared("demo") / "finetune_train.jsonl")
    return tmp_path


def write_llava(folder: Path) -> None:
    for name, rows in {
        "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": [
            {"id": "004", "image": "00453/004.jpg", "conversations": CAPTION}
        ],
        "LLaVA-Instruct-150K/llava_v1_5_mix665k.json": [
            {"id": "000000033471", "image": "coco/train2017/1.jpg", "conversations": CAPTION + CHAT},
            {"id": "wgByO4Y_0", "model": "", "conversations": CHAT},
        ],
    }.items():
        write_json(folder / name, [{**row, "id": f"{row['id']}{number}"} for number in range(4) for row in rows])
    picture(folder / "LLaVA-Pretrain/images/00453/004.jpg")
    picture(folder / "llava_images/coco/train2017/1.jpg")


def write_internvl(folder: Path) -> None:
    row = {"image": "1.jpg", "width": 60, "height": 40, "conversations": CAPTION}
    (folder / "rows").mkdir(parents=True)
    write_jsonl(folder / "rows/coco.jsonl", [{"id": number, **row} for number in range(8)])
    picture(folder / "images/1.jpg")
    entry = {"root": "images", "annotation": "rows/coco.jsonl", "data_augment": True, "max_dynamic_patch": 2}
    write_json(folder / "meta.json", {"coco": {**entry, "repeat_time": 1, "length": 8}})


def write_foodieqa(folder: Path) -> None:
    about = {"question_type": "cuisine_type", "food_name": "烤羊肉串"}
    english = {"question_en": "Which cuisine is it?", "choices_en": ["Beijing", "Anhui", "Xinjiang", "Guangxi"]}
    one = {**FOODIE, **about, "food_meta": {**FOOD, "food_file": "images/1.jpg"}, **english}
    four = {**FOODIE, "choices": "", "question_type": "flavor", "ann_group": "闽", "question_en": "Which one?"}
    text = {**FOODIE, **about, "cuisine_type": "新疆菜"}
    four["images"] = [f"images/{number}.jpg" for number in (1, 2, 3, 4)]
    for name, row in {"mivqa": four, "sivqa": one, "textqa": text}.items():
        write_json(folder / f"{name}_tidy.json", [{**row, "question_id": f"{name}-{number}"} for number in range(4)])
    for number in (1, 2, 3, 4):
        picture(folder / f"images/{number}.jpg")


def write_grounding(folder: Path) -> None:
    picture(folder / "images/shapes-train-0000.jpeg")
    asked = {"role": "user", "content": "<image>\nWhere is <ref-object>?"}
    row = {"messages": [asked, {"role": "assistant", "content": "<bbox>"}], "images": ["images/shapes-train-0000.jpeg"]}
    objects = {"ref": ["the red star"], "bbox": [[3, 4, 30, 31]]}
    rows = [{"id": f"shapes-train-0000-{number}", **row, "objects": objects, "task": "shapes"} for number in range(8)]
    for part in ("train", "val", "test", "pretrain_train", "pretrain_val"):
        write_jsonl(folder / f"{part}.jsonl", rows)


def write_texts(folder: Path) -> None:
    for name in ("alpaca/data", "openassistant-guanaco", "MSAgent-Bench"):
        (folder / name).mkdir(parents=True)
    alpaca = {"instruction": "Name a colour.", "input": "", "output": "Red.", "text": "Below is an instruction. Red."}
    pq.write_table(
        pa.Table.from_pylist([alpaca] * 8), folder / "alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
    )
    talk = {"text": "### Human: Where is Paris?### Assistant: In France.### Human: Thanks"}
    write_jsonl(folder / "openassistant-guanaco/openassistant_best_replies_train.jsonl", [talk] * 8)
    spoken = {"system": f"Use these tools: {TOOL}", "user": "Does it rain in Paris?", "assistant": CALL + RESULT}
    turns = [{"from": who, "value": value} for who, value in spoken.items()]
    rows = [{"id": f"MS_{number}", "conversations": str(turns)} for number in range(8)]
    write_jsonl(folder / "MSAgent-Bench/train.jsonl", rows)


def prepared(named: str, language: str = "") -> Path:
    """Leave the folder of a recipe as if it had run; of chat_text with a few conversations."""
    folder = prepared_folder(named)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe_folders()[named.partition("?")[0]]
    (folder / RECORD).write_text(json.dumps({"version": recipe_version(recipe)}))
    for part in ("train", "val") if language else ():
        turns = [{"role": "user", "content": f"Hello {part}"}, {"role": "assistant", "content": "Hello to you"}]
        write_jsonl(
            folder / f"{part}.jsonl", [{"id": "1", "messages": turns, "language": language, "topic": "food"}] * 3
        )
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), (200, 30, 30)).save(path)


def small(name: str, toys) -> list[str]:
    """Name an experiment with a toy for its model, and two short steps."""
    toy = [f"model.{part}.path={getattr(toys, part)}" for part in ("vision", "llm")]
    sizes = [
        "model.tiles.size=56",
        "model.tiles.max=2",
        "stage.pack_length=512",
        "data.workers=0",
        "data.max_length=2048",
    ]
    steps = ["stage.max_steps=2", "trainer.global_batch=2", "trainer.micro_batch=1", "trainer.num_chats=0"]
    machine = ["trainer.precision=fp32", "stage.optimizer=adamw", "logger=csv", "stage.init_from=none"]
    return [
        f"experiment={name}",
        "model=tiny",
        *toy,
        *sizes,
        *steps,
        *machine,
        "stage.evaluate=false",
        "data.val_share=0",
    ]


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_plans_and_trains_on_rows_of_its_layout(name, place, toys, run_cli):
    done = run_cli("plan", *small(name, toys), "gpu=24GB", "fit=true")  # says what to change: nothing
    assert (done.code, done.out) == (0, "\n"), done.err
    done = run_cli("train", *small(name, toys))
    assert done.code == 0, done.err
    losses = [line.split(",")[1] for line in (place / "runs/latest/metrics.csv").read_text().splitlines()[1:]]
    assert [float(loss) > 0 for loss in losses if loss] == [True, True]


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_says_its_command_and_the_source_of_its_numbers(name):
    text = (Path(__file__).parents[1] / "conf/experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("# COMMAND: python -m vlm_tune "))
    words = shlex.split(command.partition("vlm_tune ")[2].partition("; then")[0])
    assert words[0] == f"experiment={name}"
    assert "# NUMBERS: " in text
    assert "# EXPECT: " in text
    load_config(words)
