"""The terminal chat: tokens as they come, pasted paths, system texts, chance, and conversations that are kept."""

import io
import sys

import pytest
import torch
from rich.console import Console

from vlm_tune.cli import main
from vlm_tune.config.parse import load_config
from vlm_tune.data.sample import Sample
from vlm_tune.errors import DataError
from vlm_tune.model.generate import Sampling, Writer, answer
from vlm_tune.serve.chat import Chat, pasted, respond
from vlm_tune.serve.kept import load_messages

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(toys):
    return toys.model()


@pytest.fixture
def talk(toys, model):
    return Chat(model, load_config(toys.arguments()))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=1000, markup=False, highlight=False)


def test_an_answer_comes_in_pieces_that_join_to_the_whole(talk, toys):
    pieces = []
    for path in sorted((toys.data / "pictures").glob("*.png"))[:4]:
        talk.reset()
        talk.show(str(path))
        text = talk.ask("What colour?", 16, lambda piece: pieces.append(piece) or True)
        assert "".join(pieces) == text
        assert len(pieces) > 1
        pieces.clear()


def test_pieces_hold_whole_characters(talk, model):
    ids = model.tokenizer("锅包肉 🥟 é", add_special_tokens=False).input_ids
    pieces = []
    writer = Writer(model, len(ids), lambda piece: pieces.append(piece) or True)
    for end in range(1, len(ids) + 1):
        writer.read(ids[:end])
    assert "".join(pieces) == writer.text == "锅包肉 🥟 é"
    assert "\ufffd" not in "".join(pieces)


def test_a_listener_ends_the_answer(talk):
    assert len(talk.ask("Hello", 200, lambda piece: False)) < len(talk.ask("Hello", 200))


def test_a_streamed_answer_is_the_greedy_one(talk, model, toys):
    path = str(toys.data / "pictures" / "train_1.png")
    talk.show(path)
    text = talk.ask("What colour?", 16)
    assert answer(model, [talk.prompt(Sample("chat", tuple(talk.messages[:1])))], 16) == [text]


def test_a_seed_repeats_a_drawn_answer_and_leaves_the_generator_alone(talk):
    before = torch.random.get_rng_state()
    said = []
    for seed in (1, 1, 2):
        talk.reset()
        talk.sampling = Sampling(1.5, 0.95, seed)
        said.append(talk.ask("Hello", 16))
    assert said[0] == said[1] != said[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_several_pictures_are_shown_with_one_question(talk, toys, console):
    for name in ("train_0", "train_1"):
        respond(talk, f"/image {toys.data}/pictures/{name}.png", console)
    talk.ask("Which is larger?", 2)
    assert [type(part).__name__ for part in talk.messages[0].parts] == ["Picture", "str", "Picture", "str", "str"]


@pytest.mark.parametrize("written", ["my cat's.png", "'my cat'\\''s.png'", '"my cat\'s.png"', "my\\ cat\\'s.png"])
def test_a_path_may_be_pasted_as_a_terminal_writes_it(tmp_path, monkeypatch, written):
    (tmp_path / "my cat's.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert pasted(written) == "my cat's.png"


@pytest.mark.parametrize("path", ["two words.png", "it's.png"])
def test_a_path_that_is_not_there_stays_as_it_was_written(path):
    assert pasted(path) == path


def test_a_missing_picture_is_named_once(talk, tmp_path):
    with pytest.raises(DataError) as caught:
        talk.show(f"{tmp_path}/nope.png")
    assert str(caught.value).count("nope.png") == 1


def test_a_system_text_begins_anew(talk, console):
    talk.ask("Hello", 2)
    respond(talk, "/system Answer in one word.", console)
    assert [(message.role, message.text) for message in talk.messages] == [("system", "Answer in one word.")]


@pytest.mark.parametrize("command", ["/image", "/system", "/save", "/load"])
def test_a_command_without_its_word_says_what_is_wanted(talk, console, command):
    with pytest.raises(DataError, match=f"{command} [A-Z]"):
        respond(talk, command, console)


def test_a_conversation_is_saved_as_a_row_that_training_reads_and_goes_on(talk, toys, tmp_path, console):
    picture = toys.data / "pictures" / "train_1.png"
    (tmp_path / "a.png").write_bytes(picture.read_bytes())
    respond(talk, "/system Be short.", console)
    talk.show(str(tmp_path / "a.png"))
    talk.ask("What colour?", 6)
    talk.show(str(picture))
    talk.ask("And this one?", 6)
    respond(talk, f"/save {tmp_path}/kept.jsonl", console)
    row = (tmp_path / "kept.jsonl").read_text(encoding="utf-8")
    assert '"url": "a.png"' in row
    assert f'"url": "{picture}"' in row
    loaded = load_messages(f"{tmp_path}/kept.jsonl", talk.config)
    assert loaded == talk.messages
    onward = talk.ask("Sure?", 6)
    other = Chat(talk.model, talk.config)
    respond(other, f"/load {tmp_path}/kept.jsonl", console)
    assert other.ask("Sure?", 6) == onward


def test_nothing_is_overwritten(talk, tmp_path, console):
    talk.ask("Hello", 2)
    (tmp_path / "kept.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="nothing is overwritten"):
        respond(talk, f"/save {tmp_path}/kept.jsonl", console)
    assert (tmp_path / "kept.jsonl").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"messages": "x"}', '{"messages": [{"role": "user"}]}'])
def test_what_is_no_conversation_is_an_error(talk, tmp_path, content):
    (tmp_path / "bad.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError):
        load_messages(f"{tmp_path}/bad.jsonl", talk.config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("temperature=warm", "temperature=warm: give a number from 0 to 2"),
        ("temperature=nan", "temperature=nan: give a number"),
        ("top_p=0", "top_p=0: give a number"),
        ("seed=-1", "seed=-1: give a number"),
        ("base=yes", "base=yes: give true or false"),
    ],
)
def test_a_setting_that_is_none_is_an_error_at_once(run_cli, given, said):
    done = run_cli("chat", given)
    assert (done.code, said in done.err) == (2, True)


@pytest.mark.slow
def test_base_talks_to_the_model_before_its_training(toys, run_cli, tmp_path, monkeypatch, model):
    quiet = ("stage.init_from=none", "stage.max_steps=3", "stage.evaluate=false", "trainer.num_chats=0")
    lr = "stage.lr={projector: 0.05, llm: 0.1}"
    assert main(["stage=finetune", *toys.arguments(*quiet, lr, runs=tmp_path)]) == 0
    said = []
    for base in ("true", "false"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Which is larger, 3 or 5?\n"))
        done = run_cli("chat", f"ckpt={tmp_path}/latest", f"base={base}")
        assert done.code == 0
        assert ("without its training" in done.err) == (base == "true")
        said.append(done.out.strip())
    assert said[0] == Chat(model, load_config(toys.arguments())).ask("Which is larger, 3 or 5?").strip() != said[1]
