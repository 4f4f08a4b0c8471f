"""Let a model call tools: its ReAct text is read, the tool run, and the result handed back as XTuner's rows do."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from vlm_tune.config.schema import Config
from vlm_tune.data.dialects.row import literal
from vlm_tune.data.dialects.text import react_system
from vlm_tune.data.sample import Message
from vlm_tune.errors import DataError
from vlm_tune.model.build import Model
from vlm_tune.serve.chat import Chat
from vlm_tune.serve.tools import Tool

MOST_CALLS = 5  # of tools, before an answer is given up
LONGEST = 1000  # characters of a result
_CALL = re.compile(
    r"Action:\s*(?P<name>[^\n]+?)\s*\nAction Input:(?P<given>.*?)(?=\n(?:Response|Thought|Action):|\Z)", re.S
)
_FINAL = re.compile(r"Final Answer:(.*)", re.S)


class Call(NamedTuple):
    """A call of a tool, and the model's text up to its end."""

    name: str
    argument: str
    text: str


def read_call(text: str) -> Call | None:
    """Return the first call in a model's text, if it stands before a final answer; the rest of the text is invented.

    The input is plain text, or an object in JSON or as Python prints it, of which the first value is taken.
    """
    match = _CALL.search(text)
    final = _FINAL.search(text)
    if match is None or (final and final.start() < match.start()):
        return None
    given = match["given"].strip().strip("`").strip()
    try:
        value = literal(given)
    except ValueError:
        value = given
    if isinstance(value, dict):
        value = next(iter(value.values()), "")
    return Call(match["name"].strip(" `'\""), str(value), text[: match.end()])


def final_answer(text: str) -> str:
    """Return what follows "Final Answer:", or the whole text of a model that writes no such words."""
    match = _FINAL.search(text)
    return (match[1] if match else text).strip()


def run_tool(tools: Mapping[str, Tool], call: Call) -> str:
    """Run a tool; its failure, or that it does not exist, is a result that the model can read."""
    if call.name not in tools:
        return str({"error": f"no tool {call.name!r:.60}; there are: {', '.join(tools)}"})
    try:
        result = tools[call.name].call(call.argument)
    except (DataError, OSError) as error:
        return str({"error": str(error)[:LONGEST]})
    return str({"result": result[:LONGEST]})


class Agent(Chat):
    """A conversation whose model may call tools; `report` is given each call with its result."""

    def __init__(self, tools: Mapping[str, Tool], report: Callable[[str], None], model: Model, config: Config) -> None:
        super().__init__(model, config)
        self.tools, self.report = tools, report
        self.reset()

    def ask(self, question: str, max_new_tokens: int = 256, say: Callable[[str], bool] = lambda _: True) -> str:
        """Answer a question with the help of at most MOST_CALLS calls; the answer alone is said, when it is there."""
        text = super().ask(f"{question}\n", max_new_tokens)
        for _ in range(MOST_CALLS):
            call = read_call(text)
            self._said(f"{call.text}\n" if call else text)
            if call is None:
                return final_answer(text)
            result = run_tool(self.tools, call)
            self.report(f"{call.name}({call.argument:.200}) -> {result}")
            self.messages.append(Message("system", (f"Response:{result}\n",)))
            text = super().ask("", max_new_tokens)
        self._said(text)
        return f"(no answer after {MOST_CALLS} calls of tools) {final_answer(text)}"

    def reset(self) -> None:
        """Forget the conversation; the tools stay."""
        super().reset()
        told = react_system({name: tool.told() for name, tool in self.tools.items()})
        self.messages.append(Message("system", (told,)))

    def begin_with(self, messages: list[Message]) -> None:
        """Refuse: the system text is the tools' own."""
        raise DataError("with tools= the system text is theirs. Chat without tools for one of your own, or for /load")

    def _said(self, text: str) -> None:
        """Keep an answer as the rows of training write it: nothing behind its call, and a line end."""
        self.messages[-1] = Message("assistant", (f"{text}\n",), supervised=True)
