"""The web page in a real browser: a picture is uploaded and asked about, two models are compared, all is cleared."""

import asyncio
import time
from pathlib import Path

import pytest
import torch
from chromium import FOUND, Chromium
from processes import free_port

from vlm_tune.config.parse import load_config
from vlm_tune.data.sample import Message
from vlm_tune.errors import ConfigError
from vlm_tune.model.ready import require_extra
from vlm_tune.serve.chat import Chat
from vlm_tune.serve.speaker import Speaker

httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")
gradio = pytest.importorskip("gradio", reason="the extra `serve` is not installed")
web = pytest.importorskip("vlm_tune.serve.web", reason="the extra `serve` is not installed")
Page, Side, answered, asked_turn, launch = web.Page, web.Side, web.answered, web.asked_turn, web.launch

pytestmark = pytest.mark.filterwarnings("ignore")
in_a_browser = pytest.mark.skipif(FOUND is None, reason="no chromium on this machine (apt-get install chromium)")
PHOTOS = Path("build/screenshots")
LIMIT = 60  # tokens of an answer: enough to be seen growing


@pytest.fixture(scope="module")
def sides(toys):
    """Hold two toy models that answer differently."""
    made = [Side(name, Speaker(toys.model(), load_config(toys.arguments()))) for name in ("trained", "base")]
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made[1].speaker.model.vlm.llm.get_input_embeddings().weight.normal_(0, 0.1, generator=chance)
    with made[0].speaker, made[1].speaker:
        yield made


@pytest.fixture(scope="module")
def served(sides, toys):
    """Serve the page."""
    folder = toys.data / "pictures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "LIMIT", LIMIT)  # what the page's own setting begins with
        blocks = Page(sides).lay_out([[str(folder / "test_0.png"), "What shape?"]])
    yield launch(blocks, int(free_port()), None, [str(folder)])
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    """Start the browser once."""
    with Chromium() as page:
        yield page


@pytest.fixture
def page(browser, served):
    """Open the page anew; it must not complain."""
    browser.errors.clear()
    browser.open("about:blank")
    browser.open(served)
    for part in ("#question textarea", "#ask", "#clear", "#picture input[type=file]"):  # they come one by one
        browser.wait_for(f"!!document.querySelector('{part}')")
    yield browser
    browser.see("0")
    assert not browser.errors


def upload(page, path):
    root = page.ask("DOM.getDocument")["root"]["nodeId"]
    node = page.ask("DOM.querySelector", nodeId=root, selector="#picture input[type=file]")["nodeId"]
    page.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
    page.wait_for("!!document.querySelector('#picture img')")


def fill(page, selector, text):
    kind = "HTMLTextAreaElement" if "textarea" in selector else "HTMLInputElement"
    page.see(
        f"(() => {{ const field = document.querySelector('{selector}');"
        f"Object.getOwnPropertyDescriptor({kind}.prototype, 'value').set.call(field, {text!r});"
        "for (const kind of ['input', 'change', 'blur']) field.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


def click(page, selector):
    page.wait_for(f"!!document.querySelector({selector!r})")
    page.see(f"document.querySelector({selector!r}).click()")


def ask(page, question):
    fill(page, "#question textarea", question)
    page.wait_for(f"document.querySelector('#question textarea').value === {question!r}")
    time.sleep(0.3)  # the page hands a field's value on a moment after it was typed
    page.wait_for("!document.querySelector('#ask').disabled")
    click(page, "#ask")


def text_of(number):
    return f"document.querySelector('#side{number}').innerText"


def chat_answers(side, path, *questions):
    talk = Chat(side.speaker.model, side.speaker.config)
    talk.show(str(path))
    return [talk.ask(question, LIMIT) for question in questions]


@in_a_browser
def test_a_picture_is_uploaded_asked_about_by_two_models_and_cleared(page, sides, toys):
    path = toys.data / "pictures" / "train_1.png"
    expected = [chat_answers(side, path, "What colour?", "And what shape?") for side in sides]
    assert expected[0][0] != expected[1][0]
    page.see(
        "window.seen = new Set(); const side = document.querySelector('#side1');"
        "new MutationObserver(() => seen.add(side.innerText.length)).observe(side, {subtree: true, childList: true})"
    )
    upload(page, path)
    for number, question in enumerate(("What colour?", "And what shape?")):
        ask(page, question)
        for side in (0, 1):
            answer = expected[side][number]
            times = expected[side][: number + 1].count(answer)
            page.wait_for(f"{text_of(side)}.split({answer!r}).length > {times}")
    assert page.see("seen.size") > 4, "the answer did not grow"
    assert page.see("document.querySelectorAll('#side0 img, #side1 img').length") == 2
    assert not page.see("document.querySelector('#picture img')")
    for width in (1280, 390):
        page.photograph(PHOTOS / f"web_{width}.png", width)
        assert page.see("document.documentElement.scrollWidth <= window.innerWidth"), f"too wide at {width} pixels"
    click(page, "#clear")
    page.wait_for(f"!{text_of(0)}.includes('What colour?') && !{text_of(1)}.includes('What colour?')")
    ask(page, "What colour?")  # of no picture now: nothing is remembered
    alone = Chat(sides[0].speaker.model, sides[0].speaker.config).ask("What colour?", LIMIT)
    page.wait_for(f"{text_of(0)}.includes({alone!r})")


@in_a_browser
def test_an_example_of_the_test_set_fills_the_question(page):
    click(page, "tbody tr, .gallery-item")
    page.wait_for("!!document.querySelector('#picture img')")
    page.wait_for("document.querySelector('#question textarea').value === 'What shape?'")


@in_a_browser
def test_a_picture_is_pasted(page):
    page.ask("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.ask("Page.bringToFront")
    page.see(
        "(async () => { const canvas = document.createElement('canvas'); canvas.width = canvas.height = 40;"
        "canvas.getContext('2d').fillRect(5, 5, 20, 20);"
        "const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));"
        "await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]); })()"
    )
    click(page, "#picture button[aria-label='Paste from clipboard']")
    page.wait_for("document.querySelector('#picture img').naturalWidth === 40")


@in_a_browser
def test_a_picture_is_taken_by_the_camera(page):
    click(page, "#picture button[aria-label='Capture from camera']")
    click(page, "#picture [title='grant webcam access'] button")
    page.wait_for("document.querySelector('#picture video').videoWidth > 0")
    click(page, "#picture button[aria-label='capture photo']")
    width = page.wait_for("document.querySelector('#picture img[src*=\"/file=\"]').naturalWidth")
    assert width > 100
    ask(page, "What is it?")
    page.wait_for("!!document.querySelector('#side1 img')")


@in_a_browser
def test_stop_ends_an_answer_and_frees_the_model(page, sides):
    click(page, "#settings button")
    page.wait_for("!!document.querySelector('#limit input[type=number]')")
    fill(page, "#limit input[type=number]", "1900")
    ask(page, "Hello")
    page.wait_for(f"{text_of(1)}.length > 60")
    click(page, "#stop")
    time.sleep(1)
    length = page.see(f"{text_of(1)}.length")
    time.sleep(1)
    assert page.see(f"{text_of(1)}.length") == length
    page.wait_for("!document.querySelector('#ask').disabled")
    assert all(side.speaker.waiting.empty() for side in sides)


@in_a_browser
def test_no_question_is_no_error_of_the_program(page):
    click(page, "#ask")
    page.wait_for("document.body.innerText.includes('write a question first')")


def test_what_is_typed_while_an_answer_comes_is_left_alone(sides):
    async def taken():
        return [given[:3] async for given in Page(sides).answer(None, "Hello", "", 60, 0, 1, None, [[], []], [], [])]

    first, *later = asyncio.run(taken())
    assert (first[0].interactive, *first[1:]) == (False, None, "")
    assert len(later) > 1
    assert all(each == [gradio.skip()] * 3 for each in later)


@in_a_browser
def test_a_question_typed_while_an_answer_comes_is_asked_after_it(page, sides):
    ask(page, "Hello")
    page.wait_for("document.querySelector('#ask').disabled")
    ask(page, "And then?")  # waits until Ask is free
    page.wait_for(f"{text_of(0)}.includes('And then?')")


def test_boxes_of_an_answer_are_drawn_on_the_newest_picture(sides, toys):
    turn = asked_turn(str(toys.data / "pictures" / "train_1.png"), "Where is it?")
    (drawn,) = sides[0].drawn([turn, answered("<ref>it</ref><box>[[100, 100, 800, 800]]</box>")])
    assert drawn["role"] == "assistant"
    assert sides[0].drawn([turn, answered("In the middle.")]) == []
    assert sides[0].drawn([Message("user", ("Where?",)), answered("<box>[[1, 1, 8, 8]]</box>")]) == []


def test_the_page_asks_for_its_password(sides):
    blocks = Page(sides).lay_out([])
    address = launch(blocks, int(free_port()), ("me", "secret"), [])
    try:
        assert httpx.get(f"{address}config").status_code == 401
        for password, code in (("wrong", 400), ("secret", 200)):
            given = {"username": "me", "password": password}
            assert httpx.post(f"{address}login", data=given).status_code == code
    finally:
        blocks.close()


def test_a_large_file_is_turned_away(served):
    files = {"files": ("a.png", b"\0" * (33 << 20), "image/png")}
    assert httpx.post(f"{served}gradio_api/upload", files=files, timeout=60).status_code == 413


def test_a_file_of_this_machine_is_not_served(served):
    assert httpx.get(f"{served}gradio_api/file=/etc/hostname").status_code == 403


def test_a_taken_port_is_an_error(sides, served):
    with pytest.raises(ConfigError, match="Give another one"):
        launch(Page(sides).lay_out([]), int(served.rstrip("/").rpartition(":")[2]), None, [])


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(ConfigError, match=r"no_such_package is not installed. Run `pip install '\.\[serve\]'`"):
        require_extra("no_such_package")


@pytest.mark.parametrize(
    ("given", "said"), [("auth=me", "auth=USER:PASSWORD"), ("port=x", "port=x: give a number from 0 to 65535")]
)
def test_a_mistake_is_said_before_anything_is_loaded(run_cli, given, said):
    done = run_cli("web", given)
    assert (done.code, said in done.err) == (2, True)
