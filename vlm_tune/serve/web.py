"""`python -m vlm_tune web ckpt=RUN [ckpt2=RUN]`: a page to talk to one model, or to two side by side.

Gradio draws it; `speaker` answers. A model's text is shown as text, never as HTML or Markdown.
"""

import asyncio
import os
import queue
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is sent to anybody

import gradio
from rich.console import Console

from vlm_tune.console import tell
from vlm_tune.data.sample import Message, Part, Picture, Sample
from vlm_tune.errors import ConfigError, DataError, VlmTuneError
from vlm_tune.evaluation.evaluate import open_test, picture_of, read_questions
from vlm_tune.model.generate import GREEDY, Sampling
from vlm_tune.model.trained import open_base, open_trained
from vlm_tune.serve.chat import Chat
from vlm_tune.serve.speaker import Job, Speaker

LARGEST_FILE = "32mb"
LIMIT = 256  # tokens of an answer, as in a chat
NUM_EXAMPLES = 6
FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # this machine's: none is fetched
Shown = list[dict[str, Any]]  # a conversation as the page shows it


class Side:
    """One model of the page."""

    def __init__(self, name: str, speaker: Speaker) -> None:
        self.name, self.speaker = name, speaker
        self.chat = Chat(speaker.model, speaker.config)

    def job(self, messages: list[Message], limit: int, sampling: Sampling) -> Job:
        """Put the last question of a conversation into the model's queue."""
        open_turn = Message("assistant", ("",), supervised=True)
        prompt = self.chat.prompt(Sample("chat", (*messages, open_turn), "chat"))
        try:
            return self.speaker.take(prompt, limit, sampling)
        except queue.Full:
            raise DataError("too many questions wait already: ask again in a while") from None

    def drawn(self, messages: list[Message]) -> Shown:
        """Show the newest picture with the boxes of the last answer on it; nothing where there are none."""
        found = self.chat.boxed(messages, messages[-1].text)
        if found is None:
            return []
        _, image = found
        shown = gradio.Image(image, format="png", buttons=["fullscreen", "download"])
        return [{"role": "assistant", "content": shown}]


def asked_turn(image: str | None, question: str) -> Message:
    """Write a question with its picture as `chat` does; the file is read now, so that it may go away later."""
    parts: tuple[Part, ...] = (Picture("", Path(image).read_bytes()), "\n") if image else ()
    return Message("user", (*parts, question))


def answered(text: str) -> Message:
    """Write a model's turn."""
    return Message("assistant", (text,), supervised=True)


async def ask(
    sides: Sequence[Side],
    turn: Message,
    settings: tuple[int, Sampling],
    histories: list[list[Message]],
) -> AsyncIterator[list[str]]:
    """Ask each model; yield the texts so far, again and again, until all are whole.

    Raise DataError for a question that cannot be asked, and gradio.Error for a model that fails.
    """
    jobs: list[Job] = []
    try:
        for side, messages in zip(sides, histories, strict=True):
            jobs.append(side.job([*messages, turn], *settings))
        texts, open_jobs = [""] * len(jobs), set(range(len(jobs)))
        while open_jobs:
            for number in sorted(open_jobs):
                while not jobs[number].pieces.empty():
                    piece = jobs[number].pieces.get_nowait()
                    texts[number] += piece or ""
                    if piece is None:
                        open_jobs.discard(number)
            yield texts
            await asyncio.sleep(0.05)  # between two pictures of growing texts
        for side, job in zip(sides, jobs, strict=True):
            if job.fault:
                raise gradio.Error(f"{side.name}: {job.fault}", print_exception=False)
    finally:
        for job in jobs:
            job.is_left = True


class Page:
    """What the page's buttons do."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides

    async def answer(self, *given: Any) -> AsyncIterator[list[Any]]:
        """Answer with each model: yields what `lay_out` names as its outputs, again and again.

        Only the first takes Ask and the fields: what is typed while the answer comes is the next question.
        """
        picture, words, told, most, warm, share, number, known, *seen = given
        if not (words or "").strip():
            raise gradio.Error("write a question first", print_exception=False)
        sampling = Sampling(warm, share, None if number is None else int(number)) if warm > 0 else GREEDY
        start = [Message("system", (told,))] if (told or "").strip() else []
        turn, before = asked_turn(picture, words), [messages or start for messages in known]
        parts = [gradio.Image(picture, buttons=["fullscreen"]), words] if picture else [words]
        mine = [{"role": "user", "content": part} for part in parts]
        fields: list[Any] = [gradio.Button(interactive=False), None, ""]
        try:
            async for texts in ask(self.sides, turn, (int(most), sampling), before):
                now = [[*messages, turn, answered(text)] for messages, text in zip(before, texts, strict=True)]
                pairs = zip(seen, texts, strict=True)
                shown = [[*each, *mine, {"role": "assistant", "content": text}] for each, text in pairs]
                yield [*fields, now, *shown]
                fields = [gradio.skip() for _ in fields]
            for side, messages, each in zip(self.sides, now, shown, strict=True):
                each += side.drawn(messages)
            yield [*fields, now, *shown]
        except VlmTuneError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    def clear(self) -> list[Any]:
        """Empty the fields, the conversations, and what is shown of them."""
        return [None, "", [[] for _ in self.sides], *([] for _ in self.sides)]

    def lay_out(self, examples: list[list[str | None]]) -> gradio.Blocks:
        """Lay the page out."""
        with gradio.Blocks(title="vlm_tune") as blocks:
            histories = gradio.State([[] for _ in self.sides])
            with gradio.Row():
                bots = [chatbot(number, side.name) for number, side in enumerate(self.sides)]
            with gradio.Row():
                image = gradio.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,  # the file as it is
                    height=220,
                    min_width=220,
                    sources=["upload", "webcam", "clipboard"],
                    elem_id="picture",
                )
                with gradio.Column(scale=2, min_width=300):
                    question = gradio.Textbox(label="Question", lines=3, max_lines=8, elem_id="question")
                    with gradio.Row():
                        send = gradio.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                        stop = gradio.Button("Stop", elem_id="stop", min_width=80)
                        clear = gradio.Button("Clear", elem_id="clear", min_width=80)
            chosen = settings()
            if examples:
                gradio.Examples(examples, [image, question], label="Of the run's test set", cache_examples=False)
            inputs, outputs = [image, question, *chosen, histories, *bots], [image, question, histories, *bots]
            how: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            running: Any = gradio.on(
                [send.click, question.submit], self.answer, inputs, [send, *outputs], concurrency_limit=8, **how
            )
            for over in (running.then, running.failure):  # the page takes no question before: it would drop it
                over(lambda: gradio.Button(interactive=True), None, send, **how)
            stop.click(None, cancels=running)
            for each in (clear.click, *(bot.clear for bot in bots)):
                each(self.clear, None, outputs, cancels=running, **how)
        return blocks


def chatbot(number: int, name: str) -> gradio.Chatbot:
    """Make the conversation of one model."""
    return gradio.Chatbot(
        label=name,
        render_markdown=False,
        height=460,
        min_width=300,
        elem_id=f"side{number}",
        feedback_options=None,
        buttons=["copy"],
    )


def settings() -> list[gradio.components.Component]:
    """Make the fields below the question."""
    with gradio.Accordion("Settings", open=False, elem_id="settings"):
        return [
            gradio.Textbox(label="System text, of the next conversation", value="", lines=1),
            gradio.Slider(1, 2048, LIMIT, step=1, label="Longest answer, tokens", elem_id="limit"),
            gradio.Slider(0, 2, 0, step=0.05, label="Temperature: 0 takes the likeliest token"),
            gradio.Slider(0.05, 1, 1, step=0.05, label="top_p: share of the likeliest tokens that is drawn from"),
            gradio.Number(label="Seed of drawn answers", value=None, precision=0),
        ]


def questions_of(speaker: Speaker) -> list[list[str | None]]:
    """List a few pictures and questions of a run's test set; none where it has none."""
    test = open_test(speaker.config, speaker.model)
    if test is None:
        return []
    found: list[list[str | None]] = []
    for each in read_questions(test, NUM_EXAMPLES):
        first = next(message for message in each.sample.messages if message.role == "user")
        path = picture_of(test, each.sample)
        if path is not None:
            found.append([path, first.text.strip()])
    return found


def web(
    ckpts: tuple[str, str], port: int, auth: tuple[str, str] | None, overrides: list[str], console: Console
) -> None:
    """Serve the page until Ctrl-C."""
    with ExitStack() as stack:
        sides = []
        for ckpt in filter(None, ckpts):
            model, config = open_base(ckpts[0], overrides) if ckpt == "base" else open_trained(ckpt, overrides)
            tell(console, model.notes)
            name = "base: before training" if ckpt == "base" else Path(ckpt).expanduser().resolve().name
            sides.append(Side(name, stack.enter_context(Speaker(model, config))))
        examples = questions_of(sides[0].speaker)
        blocks = Page(sides).lay_out(examples)
        stack.callback(blocks.close)
        address = launch(blocks, port, auth, [str(Path(str(path)).parent) for path, _ in examples])
        console.print(f"page: {address}  Ctrl-C ends it", soft_wrap=True)
        blocks.block_thread()


def launch(blocks: gradio.Blocks, port: int, auth: tuple[str, str] | None, folders: list[str]) -> str:
    """Serve a page on this machine alone; return its address. Raise ConfigError where the port is taken."""
    try:
        _, address, _ = blocks.queue(max_size=64).launch(
            server_name="127.0.0.1",
            server_port=port,
            auth=auth,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=LARGEST_FILE,
            allowed_paths=folders,
            footer_links=[],
            theme=gradio.themes.Default(font=FONTS[0], font_mono=FONTS[1]),
        )
    except OSError as error:
        raise ConfigError(f"port={port}: it cannot be opened ({error}). Give another one") from error
    return str(address)
