"""A row longer than the language model's positions stops the run before training; rope scaling stretches them."""

import json

import numpy as np
import pytest
from llava_toys import save_llava
from toys import TOKENIZER, draw, save_llm, turns, write_jsonl
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, OPTConfig, Qwen2Config

from vlm_tune.config.parse import load_config
from vlm_tune.data.sample import Message, Sample
from vlm_tune.data.text.positions import Positions, length_notes
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder, read_positions
from vlm_tune.model.generate import Prompt, answer_ids

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
SHORT = ("stage=pretrain", "stage.max_steps=1", "stage.evaluate=false", "trainer.num_chats=0")


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """Write language models of 64 positions: plain, stretched in two ways, and one with a learned table."""
    folder = tmp_path_factory.mktemp("llms")
    for name, rope in {
        "plain": {},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC},
    }.items():
        save_llm(folder / name, max_position_embeddings=64, **rope)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=5)).save_pretrained(folder / "learned")
    tokenizer.save_pretrained(folder / "learned")
    return folder


@pytest.fixture
def train(toys, llms, run_cli, tmp_path):
    """Give a function that trains on three rows, the second of about `words` tokens, or runs another verb on them."""

    def run(llm, words, *more, verb="train"):
        draw(tmp_path / "red.png", "red", "circle", (56, 56))
        pairs = [("<image>\nWhat?", "red"), ("<image>\nRead.", "a " * words), ("<image>\nWho?", "you")]
        rows = [{"id": f"r{n}", "image": "red.png", "conversations": turns(pair)} for n, pair in enumerate(pairs)]
        write_jsonl(tmp_path / "train.jsonl", rows)
        out = [f"out={tmp_path / 'out'}"] if verb == "check" else [*SHORT]
        paths = (f"model.llm.path={llms / llm}", f"data.path={tmp_path}/train.jsonl", "data.val=none")
        return run_cli(verb, *toys.arguments(*out, *paths, "model.tiles.max=1", *more, runs=tmp_path / "runs"))

    return run


@pytest.mark.parametrize("llm", ["plain", "learned"])
def test_a_row_beyond_the_positions_stops_the_run_before_training(train, llm):
    done = train(llm, 90)
    assert done.code == 2
    assert 'train.jsonl:2 (id "r1"): ' in done.err
    assert "but the language model's max_position_embeddings=64: shorten the row" in done.err
    assert "data.on_too_long=skip" in done.err


def test_a_row_beyond_stretched_positions_stops_the_run(train):
    done = train("linear", 200)
    assert done.code == 2
    assert "max_position_embeddings=64 with rope scaling linear, factor 2, which ends at 128: shorten" in done.err


def test_packs_may_be_longer_than_the_positions(train):
    done = train("plain", 5, "stage.pack_length=160")
    assert done.code == 0, done.err


def test_the_smaller_limit_is_named(train):
    assert "but data.max_length=40: raise it" in train("plain", 90, "data.max_length=40").err


@pytest.mark.parametrize(("llm", "batch"), [("linear", ()), ("dynamic", ("stage.packing=false",))])
def test_a_row_that_rope_scaling_carries_is_trained_with_a_note(train, llm, batch):
    done = train(llm, 80, *batch)
    assert done.code == 0, done.err
    assert f"more than the language model's max_position_embeddings=64 with rope scaling {llm}" in " ".join(
        done.out.split()
    )


def test_a_max_length_above_the_positions_is_no_error_and_told(train):
    done = train("plain", 5)
    told = " ".join(done.out.split())
    assert done.code == 0
    assert "a row may have 64 tokens, less than data.max_length=8,192, by the language model's max_position_emb" in told


@pytest.mark.parametrize(("policy", "outcome"), [("skip", "skip: left out"), ("trim_text", "trim_text: 0 of 1 turns")])
def test_the_policies_act_on_the_positions_too(train, tmp_path, policy, outcome):
    assert train("plain", 90, f"data.on_too_long={policy}").code == 0
    train("plain", 90, f"data.on_too_long={policy}", verb="check")
    long = json.loads((tmp_path / "out" / "check.json").read_text())["long_rows"]
    assert [(row["line"], row["outcome"].startswith(outcome)) for row in long] == [(2, True)]


def test_an_answer_ends_where_the_positions_do(toys, llms, tmp_path):
    model = build_model(load_config(toys.arguments(f"model.llm.path={llms / 'learned'}", "model.tiles.max=1")))
    asked = Sample("x", (Message("user", ("a " * 40,)),))
    prompt = Prompt(model.encoder.encode_prompt(asked), np.zeros((0, 56, 56, 3), np.uint8))
    model.encoder.stop_ids = (0,)  # never said
    ids = answer_ids(model, [prompt], 64)
    assert len(prompt.example.input_ids) + ids.shape[1] - 1 == 64  # the last token is read by nobody


def test_check_lists_rows_beyond_the_positions(train, tmp_path):
    done = train("learned", 90, verb="check")
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (done.code, report["faults"]) == (1, {"too long": 1})
    assert [(row["line"], row["kind"]) for row in report["bad_rows"]] == [(2, "too long")]


def test_check_lists_rows_that_rope_scaling_carries(train, tmp_path):
    done = train("linear", 80, verb="check")
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (done.code, [row["line"] for row in report["stretched_rows"]]) == (0, [2])
    assert "1 of more than max_position_embeddings=64, by rope scaling" in done.out


def test_tiles_that_cannot_fit_the_positions_are_a_fault_of_the_configuration(train):
    done = train("plain", 5, "model.tiles.size=448")
    assert done.code == 2
    assert "256 image tokens, but the language model's max_position_embeddings=64: shorten the row" in done.err


def llama(positions: int, **more: object) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=positions, **more)


def qwen(positions: int, **more: object) -> Qwen2Config:
    return Qwen2Config(max_position_embeddings=positions, **more)


def rope(kind: str, **more: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


OF_100 = {"original_max_position_embeddings": 100}
LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("config", "named", "end"),
    [
        (llama(100), 100, 100),
        (llama(100, **rope("linear", factor=4.0)), 100, 400),
        (llama(100, **rope("linear", factor=0.5)), 100, 100),
        (llama(100, rope_scaling={"type": "linear", "factor": 8.0}), 100, 800),
        (llama(100, **rope("dynamic", factor=2.0)), 100, None),
        (llama(100, **rope("llama3", **LLAMA3)), 100, 100),
        # Qwen2.5's own advice: the trained length stays in max_position_embeddings
        (qwen(100, **rope("yarn", factor=4.0, **OF_100)), 100, 400),
        # DeepSeek writes the stretched one
        (qwen(400, **rope("yarn", factor=4.0, **OF_100)), 400, 400),
        (qwen(100, **rope("yarn", factor=4.0)), 100, 400),
        (llama(400, **rope("longrope", **LONG, **OF_100)), 400, 400),
        (GPT2Config(n_positions=100), 100, 100),
        (OPTConfig(max_position_embeddings=100), 100, 100),
        (object(), None, None),
    ],
)  # fmt: skip
def test_the_end_of_the_positions_follows_the_kind_of_rope(config, named, end):
    found = Positions.of(config)
    assert (found.named, found.end) == (named, end)


def test_gemma_3_names_its_stretched_length():
    from transformers import Gemma3TextConfig

    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    nested = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    found = Positions.of(Gemma3TextConfig(max_position_embeddings=100, rope_parameters=nested))
    assert (found.named, found.end) == (100, 100)


SCALED = {"max_position_embeddings": 96, "rope_scaling": {"type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"} | SCALED}, (96, None)),
        ({"model_type": "internlm2"} | SCALED, (96, None)),
        ({"model_type": "internvl", "text_config": {"model_type": "qwen2", "max_position_embeddings": 96}}, (96, 96)),
        ({"model_type": "llava_llama", "mm_vision_tower": "clip", "max_position_embeddings": 96}, (96, 96)),
        ({"model_type": "gpt2", "n_positions": 96}, (96, 96)),
        ({"model_type": "qwen2", "max_position_embeddings": 96, "sliding_window": 8}, (96, 96)),
        ({"model_type": "nobody_knows", "max_position_embeddings": 96}, (None, None)),  # refused when it is loaded
    ],
)
def test_the_positions_of_every_layout_are_read_without_weights(tmp_path, config, positions):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_positions(tmp_path)
    assert (found.named, found.end) == positions


@pytest.mark.parametrize("layout", ["llava", "parts"])
def test_the_positions_without_weights_are_those_of_the_model(layout, toys, tmp_path):
    arguments = toys.arguments()
    if layout == "llava":
        save_llava(tmp_path / "m")
        whole = [f"model.path={tmp_path / 'm'}", "model.tiles.size=56", f"data.path={toys.data}/train.jsonl"]
        arguments = ["model=llava_1_5_7b", *whole, "trainer.precision=fp32"]
    found = build_encoder(load_config(arguments))[0].settings.positions
    assert found == build_model(load_config(arguments)).encoder.settings.positions
    assert found.end in (2048, 4096)


def test_a_model_without_an_end_has_no_notes():
    assert length_notes(Positions(), 8192, np.array([10, 9000])) == []
