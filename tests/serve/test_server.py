"""The server, asked by OpenAI's own client: many streams at once, chat's answers, and errors of OpenAI's shape."""

import asyncio
import base64
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from vlm_tune.config.parse import load_config
from vlm_tune.data.tiles import count_tiles
from vlm_tune.errors import ConfigError
from vlm_tune.serve.chat import Chat
from vlm_tune.serve.speaker import Speaker

openai = pytest.importorskip("openai", reason="the client is not installed (make install)")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")
server_room = pytest.importorskip("vlm_tune.serve.server", reason="the extra `serve` is not installed")
MOST_BYTES, make_server, open_port = server_room.MOST_BYTES, server_room.make_server, server_room.open_port

pytestmark = pytest.mark.filterwarnings("ignore")
QUESTIONS = ("What colour?", "What shape?", "Which is larger, 3 or 5?")
TOKEN = "let-me-in"
LIMIT = 12


def url_of(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def asked(path, question):
    content = [{"type": "image_url", "image_url": {"url": url_of(path)}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def served(toys):
    """Serve the toy model under a token."""
    model, config = toys.model(), load_config(toys.arguments())
    with open_port(0) as listening, Speaker(model, config) as speaker:
        server = make_server(speaker, "toy", TOKEN)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        pictures = sorted((toys.data / "pictures").glob("*.png"))
        yield SimpleNamespace(address=address, model=model, config=config, pictures=pictures, speaker=speaker)
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(served):
    """Give OpenAI's client."""
    with openai.OpenAI(base_url=served.address, api_key=TOKEN, max_retries=0, timeout=60) as client:
        yield client


def chat_answer(served, path, question):
    talk = Chat(served.model, served.config)
    talk.show(str(path))
    return talk.ask(question, LIMIT)


def test_32_streams_at_once_say_what_chat_says(served):
    pairs = [(path, question) for path in served.pictures[:16] for question in QUESTIONS[:2]]

    async def one(client, path, question):
        stream = await client.chat.completions.create(
            model="toy", messages=asked(path, question), max_tokens=LIMIT, stream=True
        )
        return [piece.choices[0] async for piece in stream]

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=served.address, api_key=TOKEN, max_retries=0) as client:
            return await asyncio.gather(*(one(client, *pair) for pair in pairs))

    said = asyncio.run(all_of_them())
    assert len(said) == 32
    texts = ["".join(choice.delta.content or "" for choice in choices) for choices in said]
    assert texts == [chat_answer(served, *pair) for pair in pairs]
    assert {choices[-1].finish_reason for choices in said} <= {"stop", "length"}
    assert max(len(choices) for choices in said) > 4, "the answers came in one piece"


def test_a_whole_answer_counts_its_tokens(served, client):
    path = served.pictures[0]
    done = client.chat.completions.create(model="toy", messages=asked(path, QUESTIONS[0]), max_completion_tokens=LIMIT)
    assert done.choices[0].message.content == chat_answer(served, path, QUESTIONS[0])
    assert done.choices[0].finish_reason == ("length" if done.usage.completion_tokens == LIMIT else "stop")
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens > 20


def test_low_detail_shows_one_tile(served, client):
    tiles = served.config.model.tiles
    counts = {path: count_tiles(*Image.open(path).size, tiles) for path in served.pictures}
    wide = max(counts, key=lambda path: counts[path])
    assert counts[wide] > 1

    def num_tokens(detail):
        messages = asked(wide, QUESTIONS[0])
        messages[0]["content"][0]["image_url"]["detail"] = detail
        return client.chat.completions.create(model="toy", messages=messages, max_tokens=1).usage.prompt_tokens

    more = (counts[wide] - 1) * served.model.encoder.settings.tokens_per_tile
    assert num_tokens("high") == num_tokens("auto") == num_tokens("low") + more


def test_a_conversation_goes_on_under_its_system_text(served, client):
    talk = Chat(served.model, served.config)
    said = [talk.ask(question, LIMIT) for question in QUESTIONS[:2]]
    messages = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": said[0]}]
    messages.append({"role": "user", "content": QUESTIONS[1]})
    done = client.chat.completions.create(model="toy", messages=messages, max_tokens=LIMIT)
    assert done.choices[0].message.content == said[1]
    system = [{"role": "system", "content": "Answer in Chinese, please, and at some length."}, *messages]
    other = client.chat.completions.create(model="toy", messages=system, max_tokens=LIMIT)
    assert other.usage.prompt_tokens > done.usage.prompt_tokens + 5


def test_a_drawn_answer_is_repeatable_by_its_seed(client):
    def draw(seed):
        settings = {"temperature": 1.5, "seed": seed, "max_tokens": LIMIT}
        messages = [{"role": "user", "content": "Hello"}]
        return client.chat.completions.create(model="toy", messages=messages, **settings).choices[0].message.content

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"


@pytest.mark.parametrize("key", ["none", "wrong", "l\u00e9t-me-in"])
def test_the_token_is_asked_for(served, key):
    headers = {"Authorization": f"Bearer {key}".encode()}
    for path in ("models", "models/toy", "chat/completions"):
        method = "POST" if path == "chat/completions" else "GET"
        answer = httpx.request(method, f"{served.address}/{path}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


HELLO = [{"role": "user", "content": "Hello"}]


def shows(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"model": "gpt-4o"}, 404, "model='gpt-4o': no such model here. There is: 'toy'"),
        ({"messages": None}, 400, "messages: give a list of turns"),
        ({"messages": []}, 400, "the conversation is empty"),
        ({"messages": "Hello"}, 400, "messages: give a list of turns"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "is empty"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, 400, "the last turn must be the user's"),
        ({"messages": [*HELLO, *HELLO]}, 400, "are both from the user"),
        ({"messages": shows("https://example.com/a.png")}, 400, "data URLs alone"),
        ({"messages": shows("file:///etc/passwd")}, 400, "data URLs alone"),
        ({"messages": shows("/etc/passwd")}, 400, "data URLs alone"),
        ({"messages": shows("data:image/png;base64,AAAA")}, 400, "is not an image of a known format"),
        ({"messages": shows("data:image/png;base64,*")}, 400, "not base64"),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, 400, "max_position_embeddings=2048"),
        ({"max_tokens": 0}, 400, "max_tokens=0: give a number from 1"),
        ({"max_tokens": "many"}, 400, 'max_tokens="many"'),
        ({"temperature": 3}, 400, "temperature=3: give a number from 0 to 2"),
        ({"top_p": 0}, 400, "top_p=0"),
        ({"seed": -1}, 400, "seed=-1"),
        ({"n": 2}, 400, "n=2 is not supported here. Leave it out"),
        ({"stop": ["."]}, 400, 'stop=["."] is not supported here'),
        ({"tools": [{"type": "function"}]}, 400, "tools="),
        ({"logprobs": True}, 400, "logprobs=true is not supported"),
        ({"made_up": 1}, 400, "made_up=1 is not supported"),
    ],
)
def test_a_bad_request_gets_an_error_of_openais_shape(served, changes, status, said):
    body = {"model": "toy", "messages": HELLO, "max_tokens": 1} | changes
    answer = httpx.post(f"{served.address}/chat/completions", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert said in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "chat/completions", b"{", 400),
        ("POST", "chat/completions", b"[" * 100_000, 400),
        ("POST", "chat/completions", b"[]", 400),
        ("POST", "chat/completions", b" " * (MOST_BYTES + 1), 413),
        ("GET", "chat/completions", b"", 405),
        ("GET", "embeddings", b"", 404),
        ("GET", "models/other", b"", 404),
    ],
)
def test_what_is_no_request_gets_one_too(served, method, path, content, status):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.request(method, f"{served.address}/{path}", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_page_of_another_site_gets_nothing(served):
    answer = httpx.get(f"{served.address}/models", headers={"Host": "evil.example", "Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 400


def test_a_client_that_goes_away_ends_its_answer(served, client):
    stream = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=1900, stream=True)
    next(iter(stream))
    stream.close()
    start = time.monotonic()
    client.chat.completions.create(model="toy", messages=HELLO, max_tokens=1)
    assert time.monotonic() - start < 5


def test_a_failing_batch_leaves_the_server_alive(served, client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vlm_tune.serve.speaker.write", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client.chat.completions.create(model="toy", messages=HELLO)
    assert client.chat.completions.create(model="toy", messages=HELLO, max_tokens=1).usage.completion_tokens == 1


@pytest.mark.slow
def test_the_verb_says_how_it_is_called_and_ends_by_a_signal(toys, start_cli, run_cli, tmp_path):
    quiet = ("stage.init_from=none", "stage.max_steps=1", "stage.evaluate=false", "trainer.num_chats=0")
    assert run_cli("stage=finetune", *toys.arguments(*quiet, runs=tmp_path)).code == 0
    process = start_cli("server", f"ckpt={tmp_path}/latest", "port=0")
    lines = [process.stdout.readline() for _ in range(2)]
    name = lines[0].split()[1].rstrip(":")
    address = lines[0].split()[-1]
    assert f'OpenAI(base_url="{address}", api_key="-"), model="{name}"' in lines[1]
    for _ in range(100):
        try:
            client = openai.OpenAI(base_url=address, api_key="-", max_retries=0)
            done = client.chat.completions.create(model=name, messages=HELLO, max_tokens=2)
            break
        except openai.APIConnectionError:
            time.sleep(0.1)
    assert done.usage.completion_tokens <= 2
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [("port=x", "port=x: give a number from 0 to 65535"), ("port=70000", "give a number from 0 to 65535")],
)
def test_a_port_that_is_none_is_an_error(run_cli, given, said):
    done = run_cli("server", given)
    assert (done.code, said in done.err) == (2, True)


def test_a_taken_port_is_an_error_before_anything_is_loaded():
    with open_port(0) as listening, pytest.raises(ConfigError, match="Give another one, or port=0"):
        open_port(listening.getsockname()[1])
