"""Read a request of OpenAI's chat API: its messages as a row of that dialect, and the settings that are honoured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_tune.config.schema import Config
from vlm_tune.data.dialects.chat import read_openai
from vlm_tune.data.dialects.row import Row
from vlm_tune.data.sample import Message, Part, Picture, Sample
from vlm_tune.errors import DataError
from vlm_tune.model.generate import Sampling

MOST_TOKENS = 256  # of an answer, where a request names no number: as in a chat
IGNORED = ("user", "store", "metadata", "service_tier", "parallel_tool_calls")  # that change no answer
NEUTRAL: dict[str, tuple[object, ...]] = {  # settings that are honoured at these values alone
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "stop": ([], ""),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self, words: str, status: int = 400, kind: str = "invalid_request_error", code: str | None = None
    ) -> None:
        super().__init__(words)
        self.status, self.kind, self.code = status, kind, code


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    model: object
    sample: Sample
    limit: int
    sampling: Sampling
    stream: bool
    with_usage: bool


def read_request(content: bytes, config: Config) -> Asked:
    """Read the body of a request; raise Refused for what is no request, or asks for what is not done here.

    Without a temperature the answer is greedy, as those are that a run is scored by; OpenAI's own default is 1.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused("the request is no JSON object")
    known = {"model", "messages", "stream", "stream_options", "temperature", "top_p", "seed"}
    known |= {"max_tokens", "max_completion_tokens", *IGNORED, *NEUTRAL}
    for key, value in body.items():
        if value is not None and (key not in known or (key in NEUTRAL and value not in NEUTRAL[key])):
            raise Refused(f"{key}={json.dumps(value):.80} is not supported here. Leave it out")
    limit = number(body, "max_completion_tokens", number(body, "max_tokens", MOST_TOKENS, 1, 1 << 20), 1, 1 << 20)
    seed = body.get("seed")
    sampling = Sampling(
        float(number(body, "temperature", 0, 0, 2)),
        float(number(body, "top_p", 1, 1e-6, 1)),
        None if seed is None else int(number(body, "seed", 0, 0, (1 << 63) - 1)),
    )
    if sampling.temperature == 0:
        sampling = Sampling()
    options = body.get("stream_options") or {}
    with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return Asked(body.get("model"), read_sample(body), int(limit), sampling, bool(body.get("stream")), with_usage)


def number(body: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    """Return a number of the request; raise Refused for anything else, and for one out of its bounds."""
    value = default if body.get(key) is None else body[key]
    is_whole = key in ("seed", "max_tokens", "max_completion_tokens")
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float) or not least <= value <= most:
        raise Refused(f"{key}={json.dumps(value):.80}: give a number from {least:g} to {most:g}")
    return value


def read_sample(body: Mapping[str, Any]) -> Sample:
    """Read the messages; raise Refused where they are none, end with no question, or name pictures by an address."""
    if not isinstance(body.get("messages"), list):
        raise Refused('messages: give a list of turns: [{"role": "user", "content": "..."}]')
    row = Row({"messages": body["messages"]}, "messages", None, Path())
    try:
        messages = read_openai(row)
    except DataError as error:
        raise Refused(error.reason) from error
    if not messages or messages[-1].role != "user":
        raise Refused("messages: the last turn must be the user's, as the question to answer")
    sample = Sample("request", tuple(with_line_ends(message) for message in messages), "messages")
    if any(picture.content is None for picture in sample.pictures):
        raise Refused("image_url: pictures are read from data URLs alone: data:image/png;base64,...")
    return sample


def with_line_ends(message: Message) -> Message:
    """Put each picture on a line of its own, as `chat` and the chat template of an export do."""
    parts: list[Part] = []
    for part in message.parts:
        parts += [part, "\n"] if isinstance(part, Picture) else [part]
    return Message(message.role, tuple(parts), message.supervised)
