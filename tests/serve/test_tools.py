"""Chat with tools: the tools by themselves against hostile input, the model's text, and the loop with a real model."""

import time
from pathlib import Path

import pytest

from vlm_tune.config.parse import load_config
from vlm_tune.data.dialects.row import Row
from vlm_tune.data.dialects.text import read_msagent
from vlm_tune.errors import ConfigError, DataError
from vlm_tune.serve.calculator import calculate
from vlm_tune.serve.react import MOST_CALLS, Agent, Call, final_answer, read_call, run_tool
from vlm_tune.serve.tools import parse_tools, search


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * (3 + 4)", "14"),
        ("2^10", "1024"),
        ("-7 // 2", "-4"),
        ("sqrt(16) + abs(-1)", "5.0"),
        ("1,234 × 2", "2468"),
        ("7 % 4 ÷ 2", "1.5"),
        ("round(pi)", "3"),
    ],
)
def test_the_calculator_computes(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("9**9**9", "9**9**9**9", "2**99999999999", "(2**4000)**2", "(2**4000)*(2**4000)", "1e308*10", "10.0**400"),
        *("(-8)**0.5", "1/0", "0**-1", "sqrt(-1)", "log(0)", "round(1e308*10)", "exp(1000)"),
        *(
            "__import__('os')",
            "().__class__",
            "open('x')",
            "abs.__self__",
            "[1]*9",
            "'a'*9",
            "lambda: 1",
            "x:=1",
            "1if 1else 2",
        ),
        *(
            "round(1, 2)",
            "abs(x=1)",
            "abs(*[1])",
            "True",
            "1j",
            "1 if",
            "",
            "(" * 150,
            "-" * 190 + "1" + "!",
            "a" * 201,
            "\0",
        ),
        *(
            "exec('1')",
            "eval('1')",
            "print(1)",
            "1 < 2",
            "1 and 2",
            "1 << 99999999",
            "~1",
            "{1}",
            "f'{1}'",
            "await 1",
            "1_0_",
        ),
    ],
)
def test_the_calculator_refuses(text):
    start = time.perf_counter()
    with pytest.raises(DataError):
        calculate(text)
    assert time.perf_counter() - start < 1


def test_tools_are_chosen_by_name(tmp_path):
    assert list(parse_tools(f"calculator,clock,search:{tmp_path}")) == ["calculator", "clock", "search"]
    assert parse_tools("") == {}
    assert parse_tools("clock")["clock"].call("")[:2] == "20"


@pytest.mark.parametrize("text", ["python", "search", "search:/no/such/folder", "calculator:x", "clock,python"])
def test_a_tool_that_does_not_exist_is_an_error(text):
    with pytest.raises(ConfigError, match="tools="):
        parse_tools(text)


def test_a_search_finds_the_passage_with_most_words(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("Mapo tofu is hot.", encoding="utf-8")
    (tmp_path / "sub/b.md").write_text("Tofu is made of beans.", encoding="utf-8")
    (tmp_path / "c.txt").write_text("锅包肉是东北菜。", encoding="utf-8")
    assert search(tmp_path, "what is tofu made of?").splitlines()[0] == "sub/b.md: Tofu is made of beans."
    assert search(tmp_path, "锅包肉") == "c.txt: 锅包肉是东北菜。"
    assert search(tmp_path, "xyzzy") == search(tmp_path, "") == "nothing found"


def test_a_search_does_not_leave_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.txt").write_text("password tofu")
    (inside / "link.txt").symlink_to(tmp_path / "secret.txt")
    (inside / "up").symlink_to(tmp_path)
    assert search(inside, "password ../secret.txt") == "nothing found"


def test_a_search_reads_a_bounded_part_of_bounded_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_tune.serve.tools.MOST_BYTES", 10)
    monkeypatch.setattr("vlm_tune.serve.tools.MOST_FILES", 1)
    (tmp_path / "a.txt").write_text("0123456789 tofu")
    (tmp_path / "b.txt").write_text("tofu")
    assert search(tmp_path, "tofu") == "nothing found"


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("Thought:x\nAction:calculator\nAction Input:{'expression': '1+1'}", "calculator", "1+1"),
        ('Action: search\nAction Input: {"query": "tofu"}\nResponse:invented', "search", "tofu"),
        ("Action:clock\nAction Input:{}", "clock", ""),
        ("Action:calculator\nAction Input:1+1\nThought:and so on\nFinal Answer:2", "calculator", "1+1"),
    ],
)
def test_a_call_is_read(text, name, argument):
    call = read_call(text)
    assert call is not None
    assert (call.name, call.argument) == (name, argument)
    assert "invented" not in call.text
    assert "Final" not in call.text


@pytest.mark.parametrize("text", ["Hello", "Action:calculator", "Final Answer:2\nAction:x\nAction Input:y", ""])
def test_text_without_a_call_is_an_answer(text):
    assert read_call(text) is None


def test_a_final_answer_is_what_follows_the_words():
    assert final_answer("Thought:easy\nFinal Answer: 42\n") == "42"
    assert final_answer("just words") == "just words"


def test_what_fails_is_a_result_that_the_model_reads():
    tools = parse_tools("calculator")
    assert run_tool(tools, Call("calculator", "1+1", "")) == "{'result': '2'}"
    assert "cannot be computed" in run_tool(tools, Call("calculator", "9**9**9", ""))
    assert "there are: calculator" in run_tool(tools, Call("rm", "-rf", ""))


# ------------------------------------------------------------------------------------------------------- the loop


@pytest.fixture
def agent(toys, monkeypatch):
    """Begin a chat with the toy model; what it says is set by `agent.script`, what it is asked is really encoded."""
    seen: list[str] = []
    agent = Agent(parse_tools("calculator"), seen.append, toys.model(), load_config(toys.arguments()))
    agent.seen, agent.prompts, agent.script = seen, [], []

    def write(model, prompts, writers, sampling):
        agent.prompts.append(model.tokenizer.decode(prompts[0].example.input_ids))
        writers[0].text = agent.script.pop(0)

    monkeypatch.setattr("vlm_tune.serve.chat.write", write)
    return agent


def test_a_result_is_handed_back_as_the_next_system_turn(agent):
    agent.script += [
        "Thought:compute\nAction:calculator\nAction Input:{'expression': '6*7'}\nResponse:9",
        "Final Answer:42",
    ]
    assert agent.ask("What is 6*7?") == "42"
    assert agent.seen == ["calculator(6*7) -> {'result': '42'}"]
    assert "system\nResponse:{'result': '42'}\n" in agent.prompts[1]
    assert "Response:9" not in agent.prompts[1]


def test_the_conversation_is_encoded_as_a_row_of_training(agent):
    agent.script += ["Thought:compute\nAction:calculator\nAction Input:{'expression': '6*7'}", "Final Answer:42"]
    agent.ask("What is 6*7?")
    called = '<|startofthink|>```JSON\n{"api_name": "calculator", "parameters": {"expression": "6*7"}}```<|endofthink|>'
    said = f'compute{called}<|startofexec|>```JSON\n{{"result": "42"}}```<|endofexec|>42'
    turns = [("system", "none"), ("user", "What is 6*7?"), ("assistant", said)]
    row = Row({"conversations": [{"from": who, "value": value} for who, value in turns]}, "x", "1", Path())
    trained = [(message.role, message.text) for message in read_msagent(row)]
    assert [(message.role, message.text) for message in agent.messages][1:] == trained[1:]


def test_the_loop_is_bounded(agent):
    agent.script += ["Action:calculator\nAction Input:1+1"] * (MOST_CALLS + 1)
    assert agent.ask("Loop?").startswith(f"(no answer after {MOST_CALLS} calls of tools)")
    assert len(agent.seen) == MOST_CALLS


def test_a_reset_keeps_the_tools(agent):
    agent.script += ["Final Answer:1", "Final Answer:2"]
    agent.ask("One?")
    agent.reset()
    assert agent.ask("Two?") == "2"
    assert "calculator" in agent.prompts[1]
    assert "One?" not in agent.prompts[1]


def test_a_real_model_answers_with_tools_at_hand(toys):
    agent = Agent(
        parse_tools("calculator,clock"), print, toys.model(), load_config(toys.arguments("model.tiles.max=1"))
    )
    assert isinstance(agent.ask("What is 6*7?", max_new_tokens=4), str)
