"""A tokenizer that a folder ships as code is rebuilt from its sentencepiece model, id by id; the code is not run."""

import json
import random
from pathlib import Path

import pytest
from sentencepiece_toys import SETTINGS, train
from transformers import AutoTokenizer

from vlm_tune.data.text.tokens import TextTokenizer
from vlm_tune.errors import CheckpointError
from vlm_tune.model.parts.llm import load_tokenizer

TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizer"
ADDED = ("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")
TEXTS = (
    "",
    " ",
    "dog",
    " leading",
    "trailing ",
    "two  spaces   three",
    "   ",
    "\n",
    "line\nline\n\n  indented\n",
    "红色的方块 and 书生 mixed 文字",
    "字外之字：龘靐齉",  # no piece: bytes
    "\U0001f600 ok \U0001f468\u200d\U0001f469",
    "tab\there\r\n",
    "dogdog<sep>a dog <sep>",
    "<s>[INST] <|im_start|> <0x0A> <unk>",
    "e\u0301 \u200b \ufeff",
    "\u2581 looks like a space",
)
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"


def write_settings(folder, size, **changes):
    """Write the settings of a folder that asks for its own tokenizer code, as InternVL2's do."""
    tokens = {str(size + i): {"content": token, "special": True} for i, token in enumerate(ADDED)}
    tokens |= {str(i): {"content": token, "special": True} for i, token in enumerate(("<unk>", "<s>", "</s>"))}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": tokens,
        "additional_special_tokens": list(ADDED),
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "chat_template": CHAT,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes), encoding="utf-8")
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('code of a checkpoint was run')\n")


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch):
    """transformers asks on the terminal whether code may run: no load of ours may come so far."""

    def asked(*arguments):
        raise AssertionError("the user was asked to trust code")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, settings in SETTINGS.items():
        folder = tmp_path_factory.mktemp(name)
        reference = train(folder, settings)
        write_settings(folder, len(reference))
        found[name] = folder, reference
    return found


@pytest.fixture(params=SETTINGS)
def pair(request, folders):
    """Our tokenizer and sentencepiece's own."""
    folder, reference = folders[request.param]
    return load_tokenizer(folder), reference


@pytest.mark.parametrize("text", TEXTS)
def test_text_has_the_ids_of_sentencepiece(pair, text):
    # as our encoder reads a user's text: what looks like an added token is none
    tokenizer, reference = pair
    assert TextTokenizer(tokenizer).plain([(True, text)])[True, text].ids == reference.encode(text)


def test_random_text_has_the_ids_of_sentencepiece(pair):
    tokenizer, reference = pair
    chance = random.Random(0)
    pieces = [*"abc dog  \n\t.,!0123", "红", "色", "the ", "picture", "é", "\U0001f600", "  ", "ing", "<sep>"]
    for _ in range(300):
        text = "".join(chance.choices(pieces, k=chance.randint(1, 40)))
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), repr(text)


def test_text_between_added_tokens_is_sentencepieces(pair):
    tokenizer, reference = pair
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids == [1, start, *reference.encode("user\nhi"), end]


def test_added_tokens_have_the_ids_of_the_settings(pair):
    tokenizer, reference = pair
    assert [tokenizer.convert_tokens_to_ids(token) for token in ADDED] == list(
        range(len(reference), len(reference) + len(ADDED))
    )
    assert len(tokenizer) == len(reference) + len(ADDED)


def test_the_first_token_stands_in_front_of_every_text(folders):
    tokenizer = load_tokenizer(folders["llama"][0])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1


def test_the_settings_may_leave_out_the_first_token(tmp_path):
    reference = train(tmp_path, SETTINGS["llama"])
    write_settings(tmp_path, len(reference), add_bos_token=False)
    assert load_tokenizer(tmp_path)("a")["input_ids"] == reference.encode("a")


def test_names_and_chat_template_come_from_the_settings(folders):
    tokenizer = load_tokenizer(folders["llama"][0])
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<|im_start|>user\nx<|im_end|>"


def test_decoding_gives_the_text_back(pair):
    tokenizer, _ = pair
    text = "A picture of 红色的方块, and a dog."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_an_added_token_may_take_the_place_of_a_piece(tmp_path):
    # InternLM2 names some of its unused pieces: <|im_end|> is 92542 of 92544
    reference = train(tmp_path, SETTINGS["llama"] | {"user_defined_symbols": ["[UNUSED_TOKEN_0]"]})
    place = reference.piece_to_id("[UNUSED_TOKEN_0]")
    tokens = {"0": "<unk>", "1": "<s>", "2": "</s>", str(place): "<|im_end|>"}
    write_settings(
        tmp_path,
        len(reference),
        added_tokens_decoder={index: {"content": content, "special": True} for index, content in tokens.items()},
        additional_special_tokens=["<|im_end|>"],
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [place]
    assert len(tokenizer) == len(reference)


def test_the_rebuilt_tokenizer_survives_its_own_folder(pair, tmp_path):
    tokenizer, _ = pair
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "<|im_start|>user\nhi<|im_end|>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == CHAT


def test_a_folder_whose_model_is_code_keeps_the_tokenizer_class_that_it_names(tmp_path):
    # InternVL2-1B: Qwen2's vocabulary and merges, and a config.json that asks for code
    whole = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.Config"}}))
    tokenizer, reference = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(TOKENIZER)
    text = "a picture <img><IMG_CONTEXT></img> of it"
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]


def test_added_tokens_of_the_older_file_are_read(tmp_path):
    reference = train(tmp_path, SETTINGS["llama"])
    write_settings(tmp_path, len(reference), added_tokens_decoder={})
    names = {token: len(reference) + i for i, token in enumerate(ADDED)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ADDED} == names


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_gap_before_an_added_token_is_an_error(tmp_path):
    reference = train(tmp_path, SETTINGS["llama"])
    write_settings(tmp_path, len(reference) + 3)
    with pytest.raises(CheckpointError, match=r"<\|im_end\|> has id \d+ in its settings and \d+ in the vocabulary"):
        load_tokenizer(tmp_path)


def test_a_model_with_rules_that_are_not_rebuilt_is_refused(tmp_path):
    reference = train(tmp_path, SETTINGS["llama"] | {"treat_whitespace_as_suffix": True})
    write_settings(tmp_path, len(reference))
    with pytest.raises(CheckpointError, match="it writes spaces in a way that is not read"):
        load_tokenizer(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path):
    reference = train(tmp_path, {"model_type": "unigram"})
    write_settings(tmp_path, len(reference))
    with pytest.raises(CheckpointError, match="not a BPE model"):
        load_tokenizer(tmp_path)


def test_code_without_a_model_beside_it_is_an_error(tmp_path):
    write_settings(tmp_path, 100)
    with pytest.raises(CheckpointError, match="InternLM2Tokenizer is code, which is not run"):
        load_tokenizer(tmp_path)
