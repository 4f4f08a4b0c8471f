"""An engine that is not transformers answers from the exported files: `make test-engines` installs it.

VLM_TUNE_DEMO_RUN names the run folder of a trained demo; without it the toy model alone is asked.
"""

import base64
import io
import os
from itertools import product

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]
xllamacpp = pytest.importorskip("xllamacpp", reason="make test-engines installs it")

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]  # on exact multiples of a tile the engine cuts as InternVL does
QUESTIONS = {
    "toy": ["What colour?", "What shape?"],
    "demo": ["Which food group is this?", "Is this food vegetarian?"],
}
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=["toy", "demo"])
def exported(request, toys, tmp_path_factory):
    """Export a trained model, allowed four tiles, for transformers and for the engine."""
    from vlm_tune.cli import main

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "toy":
        given = ("stage.init_from=none", "model.tiles.max=4", "stage.lr={projector: 0.01, llm: 0.02}")
        runs = toys.arguments(*given, "stage.max_steps=40", "stage.evaluate=false", runs=folder / "runs")
        assert main(["stage=finetune", *runs]) == 0
        run, pictures = folder / "runs" / "latest", toys.data / "pictures"
    else:
        run, pictures = os.environ.get("VLM_TUNE_DEMO_RUN"), None
        if run is None:
            pytest.skip("VLM_TUNE_DEMO_RUN names no run of the demo")
    for layout in ("hf", "gguf"):
        given = (f"ckpt={run}", f"out={folder / layout}", f"layout={layout}", "model.tiles.max=4")
        assert main(["export", *given]) == 0
    return request.param, folder, find_pictures(run, pictures)


def find_pictures(run, pictures):
    """List five test pictures."""
    if pictures is not None:
        return sorted(pictures.glob("test_*.png"))[:5]
    from vlm_tune.config.schema import Precision
    from vlm_tune.evaluation.evaluate import open_test, read_questions
    from vlm_tune.model.trained import open_trained

    model, config = open_trained(str(run), [], Precision.fp32)
    test = open_test(config, model)
    paths = [test.root / picture.path for question in read_questions(test) for picture in question.sample.pictures]
    return list(dict.fromkeys(paths))[::10][:5]


def server(folder):
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.mmproj_use_gpu = 2048, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    return xllamacpp.Server(params)


def ask_engine(engine, image, question):
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    said = engine.handle_chat_completions(
        {"messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS, "temperature": 0}
    )
    return said["choices"][0]["message"]["content"].strip(), said["usage"]["prompt_tokens"]


def ask_transformers(native, processor, image, question):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    length = inputs["input_ids"].shape[1]
    said = native.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:]
    return processor.decode(said, skip_special_tokens=True).strip(), length


@pytest.mark.timeout(1200)
def test_the_engine_says_what_transformers_says(exported):
    # 40 prompts with a picture each, 30 of them of several tiles; pictures are exact multiples of a tile, because the
    # engine resamples and chooses grids otherwise (the export says so)
    name, folder, pictures = exported
    processor = AutoProcessor.from_pretrained(folder / "hf")
    processor.image_processor = AutoImageProcessor.from_pretrained(folder / "hf", backend="pil")
    native = AutoModelForImageTextToText.from_pretrained(folder / "hf", dtype=torch.float32)
    engine, side = server(folder / "gguf"), processor.image_processor.size["height"]
    assert len(pictures) == 5
    different = []
    for path, (columns, rows), question in product(pictures, GRIDS, QUESTIONS[name]):
        image = Image.open(path).convert("RGB").resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        theirs = ask_transformers(native, processor, image, question)
        said = ask_engine(engine, image, question)
        if said != theirs:
            different.append((path.name, columns, rows, question, theirs, said))
    assert not different, f"{name}: {len(different)} of 40 answers differ"
