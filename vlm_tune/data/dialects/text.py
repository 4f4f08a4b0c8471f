"""Dialects of text: plain text, alpaca, oasst-guanaco, openorca, and MSAgent's tool use."""

import json
import re
from collections.abc import Mapping

from vlm_tune.data.dialects.fields import check_turn, turn_fields
from vlm_tune.data.dialects.row import Row, check_order, kind_of, single_turns
from vlm_tune.data.sample import Message


def read_text(row: Row) -> list[Message]:
    """Read plain text for continued pretraining: there are no turns, and all of it is trained on."""
    return [Message("assistant", (row.answer(row.required("text"), '"text"'),), supervised=True)]


def read_alpaca(row: Row, ending: str = "") -> list[Message]:
    """Read alpaca, or alpaca_zh, whose fields end in "_zh": the question is the instruction, a newline and the input.

    LLaMA-Factory's "system" and "history" are read, too.
    """
    instruction = row.text(row.required(f"instruction{ending}"), f'"instruction{ending}"')
    question = f"{instruction}\n{row.optional(f'input{ending}')}"  # the newline stays if input is empty, as in XTuner
    answer = row.answer(row.required(f"output{ending}"), f'"output{ending}"')
    if answer == "<nooutput>":
        raise row.fault('the output is "<nooutput>": the row has no answer. Remove it, as XTuner does.')
    return single_turns(row, "system", question, answer, f'"instruction{ending}"')


def read_oasst1(row: Row) -> list[Message]:
    """Read oasst-guanaco: '### Human: ...### Assistant: ...'. An unanswered last question is left out.

    Other readers of the data set do the same; unlike in XTuner's, other '###' headings stay in the text.
    """
    text = row.text(row.required("text"), '"text"')
    before, *pieces = re.split(r"###\s*(Human|Assistant):", text)
    if before.strip() or not pieces:
        raise row.fault('the text does not begin with "### Human:". Use data.format=text for plain text.')
    spoken = [(who, piece.strip()) for who, piece in zip(pieces[::2], pieces[1::2], strict=True)]
    if spoken[-1][0] == "Human":
        spoken.pop()
    messages = []
    for number, (who, said) in enumerate(spoken, 1):
        if who == "Human":
            messages.append(Message("user", (row.question(said, f"turn {number}"),)))
        else:
            messages.append(Message("assistant", (row.answer(said, f"turn {number}"),), supervised=True))
    check_order(row, messages)
    return messages


def read_openorca(row: Row) -> list[Message]:
    """Read OpenOrca: system_prompt, question, response."""
    question, answer = row.required("question"), row.required("response")
    return single_turns(row, "system_prompt", question, answer, '"question" or "response"')


# MSAgent-Bench: {"conversations": [{"from": system | user | assistant, "value"}]}, the list often written as text.
# The text that the model learns is exactly XTuner's, including dicts as Python prints them.
_THINK = re.compile(r"<\|startofthink\|>(.*?)<\|endofthink\|>", re.DOTALL)
_REACT_SYSTEM = (
    "你是一个可以调用外部工具的助手，可以使用的工具包括：\n{tools}\n"
    "如果使用工具请遵循以下格式回复：\n```\n"
    "Thought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
    "Action:工具名称，你的工具必须从 [{names}] 选择\n"
    "Action Input:工具输入参数\n```\n工具返回按照以下格式回复：\n```\n"
    "Response:调用工具后的结果\n```\n如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复\n```\n"
    "Thought:给出最终答案的思考过程\nFinal Answer:最终答案\n```\n开始!\n"
)


def read_msagent(row: Row) -> list[Message]:
    """Read MSAgent's tool use as ReAct text. A tool's result becomes the system text of a turn without a question.

    Raise DataError for rows that XTuner drops silently: broken JSON in a call or a result.
    """
    turns = row.required("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.fault(f'"conversations" is {kind_of(turns)}, not a list of objects. Write [{{...}}, {{...}}].')
    messages: list[Message] = []
    known = turn_fields("msagent")
    for number, turn in enumerate(turns, 1):
        check_turn(row, turn, number, known)
        role = turn.get("from")
        text = row.text(turn.get("value"), f"turn {number}")
        follows = messages[-1].role if messages else None
        if role == "system" and follows in (None, "assistant"):
            messages.append(Message("system", (_react_system(text),)))
        elif role == "user" and follows != "user":
            messages.append(Message("user", (row.question(text, f"turn {number}") + "\n",)))
        elif role == "assistant" and follows == "user":
            messages += _react_answer(row, row.answer(text, f"turn {number}"), f"turn {number}")
        else:
            raise row.fault(
                f"turn {number}: {role!r} is unknown or not in turn. Write system, user, assistant, user, ..."
            )
    return messages


def _react_system(text: str) -> str:
    """Rewrite MSAgent's list of plugins, the JSON objects in the text that have a name and a description."""
    tools: dict[str, str] = {}
    decoder = json.JSONDecoder()
    position = text.find("{")
    while position >= 0:
        try:
            tool, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            tool, end = {}, position + 1
        if "name" in tool and "description" in tool:
            tools[str(tool["name"])] = f"{tool['description']}{_parameters(tool)}"
        else:
            end = position + 1  # it may hold objects that are tools
        position = text.find("{", end)
    return react_system(tools)


def react_system(tools: Mapping[str, str]) -> str:
    """Write the system text that offers tools, each with its description, as XTuner does."""
    return _REACT_SYSTEM.format(tools=tools, names=str(list(tools)))


def _parameters(tool: Mapping[str, object]) -> str:
    try:
        listed_parameters = tool["paths"][0]["parameters"]  # type: ignore[index]
        return f"\n输入参数: { ({entry['name']: entry['description'] for entry in listed_parameters}) }"
    except (LookupError, TypeError):
        return ""  # a tool without parameters


def _react_answer(row: Row, text: str, name: str) -> list[Message]:
    """Turn thoughts and a call into Thought, Action, Action Input; a result and what follows into a second answer."""
    said, *results = text.split("<|startofexec|>")
    if len(results) > 1:
        raise row.fault(f"{name}: more than one <|startofexec|>. Split the turn.")
    written, end = "", 0
    for match in _THINK.finditer(said):
        thought = said[end : match.start()].strip()
        fields = _block(row, match[1], name)
        if not isinstance(fields, dict) or "api_name" not in fields or "parameters" not in fields:
            raise row.fault(f'{name}: the call needs "api_name" and "parameters". Fix it, or remove the row.')
        written += f"Thought:{thought}\n" if thought else ""
        written += f"Action:{fields['api_name']}\nAction Input:{fields['parameters']}\n"
        end = match.end()
    if not end and not said.strip():
        raise row.fault(f"{name}: the answer is empty before the result of a call. Write the call.")
    answer = f"{written}{said[end:]}\n" if end else f"Final Answer:{said}\n"
    messages = [Message("assistant", (answer,), supervised=True)]
    if results:
        block, closing, final = results[0].partition("<|endofexec|>")
        if not closing:
            raise row.fault(f"{name}: <|startofexec|> without <|endofexec|>. Close it.")
        result = _block(row, block, name)
        if final.strip():  # without an answer there is nothing to train on after the result
            messages.append(Message("system", (f"Response:{result}\n",)))
            messages.append(Message("user", ()))
            messages.append(Message("assistant", (f"Final Answer:{final.strip()}\n",), supervised=True))
    return messages


def _block(row: Row, text: str, name: str) -> object:
    """Parse a fenced block of JSON."""
    try:
        return json.loads(text.replace("```JSON", "").replace("```", "").replace("\n", ""))
    except (ValueError, RecursionError) as error:
        raise row.fault(f"{name}: the call or its result is not JSON: {error}. Fix it, or remove the row.") from error
