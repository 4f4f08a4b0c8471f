"""Shape comments are true: each is compared with the tensor that it stands beside, and each is reached."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch
from official_toys import MIXTURE, write_official
from shape_comments import ShapeComments, read_statements
from transformers import AutoModel, Siglip2VisionConfig

import vlm_tune
from vlm_tune.config.schema import ProjectorConfig
from vlm_tune.evaluation.evaluate import prompt_of
from vlm_tune.model.generate import answer
from vlm_tune.model.kernels import attention, attention_cpu
from vlm_tune.model.kernels.attention_cpu import SHORT
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder

PACKAGE = Path(__file__).parents[1] / "vlm_tune"
FILES = [*sorted((PACKAGE / "model").rglob("*.py")), PACKAGE / "data" / "tiles.py"]
LEGEND = {"P": 16, "C": 32, "S": 4, "D": 32, "H": 56, "W": 56, "r": 2, "heads": 4, "d": 8}


def run_source(tmp_path, source, legend=None):
    """Run a function `f` of its own file under the trace; return the checker."""
    path = tmp_path / "sample.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with ShapeComments([path], legend) as run:
        module.f(torch)
    return run


@pytest.fixture(scope="module")
def traced(toys):
    """Train, validate and answer once, packed and padded, with samples above and below the bound of short ones."""
    staged = toys.staged("stage=finetune")
    data = staged.data.train.data
    table = staged.model.vlm.llm.get_input_embeddings().weight
    long = staged.batch(list(range(12)))  # one pack whose samples are joined to one that is not short
    long.segments = [sum(long.segments[:8]), *long.segments[8:]]
    assert long.segments[0] > SHORT > long.segments[1]
    noisy = toys.staged("stage=finetune", "stage.train.vision=full", "stage.drop_path=0.2", "stage.neftune=5")
    with ShapeComments(FILES, LEGEND | {"V": len(table)}) as run:
        staged.model.vlm(staged.batch([0, 1, 6])).backward()
        staged.model.vlm(staged.batch([0, 1, 6], packing=False))
        staged.model.vlm(long)
        with pytest.MonkeyPatch.context() as patch:  # what 16 bit takes on a CPU
            patch.setattr(attention, "uses_products", lambda tensor: True)
            patch.setattr(attention_cpu, "KEPT", SHORT)
            for has_amx in (True, False):
                patch.setattr(attention_cpu, "has_amx", lambda has_amx=has_amx: has_amx)
                attention_cpu.lay_out.cache_clear()
                staged.model.vlm(long).backward()
        attention_cpu.lay_out.cache_clear()
        with torch.no_grad():  # as in validation
            staged.model.vlm(staged.batch([0, 1, 6]))
        noisy.model.vlm(noisy.batch([0, 1, 6])).backward()
        answer(staged.model, [prompt_of(data, data.sample(row)) for row in (0, 6)], 2)
    return run


@pytest.fixture(scope="module")
def traced_convolution():
    """See a tile with a convolutional network, which has sizes of its own."""
    tower = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    vision = VisionEncoder(tower)
    with ShapeComments(FILES, {"P": vision.num_patches(64), "C": tower.num_features, "H": 64, "W": 64}) as run:
        vision(torch.zeros(1, 3, 64, 64))
    return run


@pytest.fixture(scope="module")
def traced_queries():
    """See a tile with an encoder that takes rows of pixels, and read it by a Q-Former."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower = AutoModel.from_config(Siglip2VisionConfig(**sizes, patch_size=14, num_patches=16))
    projector = Projector(ProjectorConfig(kind="qformer", num_queries=4, qformer_layers=1, qformer_width=64), 32, 24)
    with ShapeComments(FILES, LEGEND | {"D": 24}) as run:
        projector(VisionEncoder(tower)(torch.zeros(2, 3, 56, 56)))
    return run


@pytest.fixture(scope="module")
def traced_experts(toys, tmp_path_factory):
    """Train adapters of a mixture's experts."""
    whole = f"model.path={write_official(tmp_path_factory.mktemp('mixture'), MIXTURE)}"
    of_parts = ("model.vision.path=null", "model.llm.path=null", "model.template=internvl2_5", "model.tiles.max=2")
    lora = ("model.llm.targets=[q_proj,gate_up_proj,down_proj]", "stage.lora.dropout=0")
    staged = toys.staged("stage=finetune", whole, *of_parts, *lora)
    with ShapeComments(FILES) as run:
        staged.model.vlm(staged.batch([0, 1]))
    return run


@pytest.fixture(scope="module")
def runs(traced, traced_convolution, traced_queries, traced_experts):
    return traced, traced_convolution, traced_queries, traced_experts


def test_shape_comments_hold(runs):
    assert not [error for run in runs for error in run.errors]


def test_every_shape_comment_is_reached(runs):
    assert not set.intersection(*(set(run.unreached) for run in runs))


def test_there_are_shape_comments():
    assert sum(len(read_statements(path)) for path in FILES) >= 12


def test_the_letters_are_those_of_the_legend():
    legend = set(re.findall(r"\b([A-Z])\b", vlm_tune.__doc__))
    used = {
        letter
        for path in FILES
        for each in read_statements(path)
        for size in each.sizes
        for letter in size
        if letter.isupper()
    }
    assert used <= legend


# --------------------------------------------------------------------------------------------------- the checker itself


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ("x = torch.zeros(2, 3)  # (T, C)\n    y = x * 2  # (T, C)", []),
        ("x = torch.zeros(2, 3)  # (T, C)\n    y = x.T  # (T, C)", ["y: T is 2, the shape is (3, 2)", "y: C is 3"]),
        ("x = torch.zeros(2, 3)  # (T, C, D)", ["x: the comment has 3 sizes, the shape is (2, 3)"]),
        ("x = torch.zeros(2, 3)  # (T, C)\n    y = torch.zeros(2, 12)  # (T, 4*C)", []),
        (
            "x = torch.zeros(2, 3)  # (T, C)\n    y = torch.zeros(2, 11)  # (T, 4*C)",
            ["y: 4*C is 12, the shape is (2, 11)"],
        ),
        ("x = torch.zeros(2, 3)  # (2, _)", []),
        ("x = torch.zeros(2, 3)  # (3, _)", ["x: 3 is 3, the shape is (2, 3)"]),
        ("side = 5\n    x = torch.zeros(side, 3)  # (side, C)", []),
        ("side = 4\n    x = torch.zeros(5, 3)  # (side, C)", ["x: side is 4, the shape is (5, 3)"]),
        ("x, y = torch.zeros(2), torch.zeros(3)  # (T,)", ["y: T is 2, the shape is (3,)"]),
        ("x: object = torch.zeros(2, 3)  # (T,)", ["x: the comment has 1 sizes"]),
        ("x = (\n        torch.zeros(2)\n        .repeat(2)\n    )  # (T, T)", ["x: the comment has 2 sizes"]),
        ("for n in (1, 2):\n        x = torch.zeros(n, 3)  # (T, C)", []),
        ("x = 3  # (T, C)", ["x has no shape"]),
        ("x = 3  # (a word, and another)", []),
        ("x = [torch.zeros(n) for n in (1, 2)][0]  # (T,)", []),
        ("x = torch.zeros(2, 9)  # (T, X)", ["x: X is 8, the shape is (2, 9)"]),
        ("try:\n        x = torch.zeros(2).missing  # (T,)\n    except AttributeError:\n        pass", []),
        ("return torch.zeros(2)", []),
    ],
)
def test_the_checker_finds_what_is_wrong_and_nothing_else(tmp_path, body, errors):
    found = run_source(tmp_path, f"def f(torch):\n    {body}\n", {"X": 8}).errors
    assert len(found) == len(errors)
    assert all(part in error for part, error in zip(errors, found, strict=True))


def test_the_checker_names_a_comment_that_is_never_reached(tmp_path):
    run = run_source(tmp_path, "def f(torch):\n    if torch is None:\n        x = torch.zeros(1)  # (T,)\n")
    assert run.unreached == ["sample.py:3"]
