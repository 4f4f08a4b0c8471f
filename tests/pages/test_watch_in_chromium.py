"""The live page in a real browser: curves grow, runs lie over one another, pictures show, and text is never run."""

import csv

import pytest
from chromium import FOUND, Chromium
from recorded_runs import rows_up_to, say, step_row, write_run
from test_watch import served

from vlm_tune.pages.compare import compare_runs
from vlm_tune.pages.recorded import COLUMNS, write_metrics

pytestmark = pytest.mark.skipif(FOUND is None, reason="no chromium on this machine (apt-get install chromium)")
SERVER_GONE = ("ERR_CONNECTION", "ERR_SOCKET_NOT_CONNECTED", "ERR_EMPTY_RESPONSE")
LAST = "document.querySelector('#plot0 polyline.train').getAttribute('points').split(' ').length"


@pytest.fixture(scope="module")
def browser():
    """Start the browser once; its pages must not complain."""
    with Chromium() as page:
        yield page


@pytest.fixture
def page(browser, tmp_path):
    """Hold a page whose complaints, of script or policy, fail the test; it is left before the runs' folder goes."""
    browser.errors.clear()
    yield browser
    browser.open("about:blank")
    browser.see("0")
    assert not [error for error in browser.errors if not any(name in error for name in SERVER_GONE)]


def append_step(run, step):
    with (run / "metrics.csv").open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writerow(step_row(step, 0.5))


def test_the_curve_grows_while_the_run_goes_on(page, tmp_path):
    run = write_run(tmp_path, "one")
    with served([run], tmp_path) as port:
        page.open(f"http://localhost:{port}/")
        page.wait_for(f"{LAST} === 20")
        assert "step 20 of 40" in page.see("document.body.innerText")
        append_step(run, 21)
        page.wait_for(f"{LAST} === 21")
        page.wait_for("document.title.startsWith('52%')")
        write_metrics(run / "metrics.csv", rows_up_to(10))  # a resumed run goes back to its checkpoint
        page.wait_for(f"{LAST} === 10")


def test_two_runs_lie_over_one_another_in_each_chart_and_say_how_they_differ(page, tmp_path):
    runs = [write_run(tmp_path, name, 20, 4.0, f"stage.lora.rank={rank}") for name, rank in (("one", 8), ("two", 16))]
    with served(runs, tmp_path) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait_for("document.querySelectorAll('#plot0 polyline.train').length === 4")  # training and validation
        page.wait_for("document.querySelectorAll('#plot2 .train.line').length > 1")
        strokes = page.see(
            "[...document.querySelectorAll('#plot2 .train.line')].map((e) => getComputedStyle(e).stroke)"
        )
        assert len(set(strokes)) == 2
        shown = page.see("document.body.innerText")
        assert "stage.lora.rank=8" in shown
        assert "rank=16, training" in shown
        page.see("document.querySelector('.run').click()")
        page.wait_for("document.querySelectorAll('#plot0 polyline.train').length === 2")


def test_a_picture_shows_with_its_answers_and_an_earlier_one_can_be_chosen(page, tmp_path):
    run = write_run(tmp_path, "one")
    with served([run], tmp_path) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait_for("document.querySelector('#answers img')?.naturalWidth === 64")
        assert "Red. step 20" in page.see("document.querySelector('.said').innerText")
        page.see("document.querySelector('.steps button').click()")
        assert "no idea step 0" in page.see("document.querySelector('.said').innerText")


def test_text_of_a_run_is_shown_and_never_run(page, tmp_path):
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    run = write_run(tmp_path, "<b>one<")
    say(run, 20, hostile, question=hostile)
    with served([run], tmp_path) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait_for("document.querySelectorAll('.said').length === 2")
        assert page.see("document.querySelectorAll('.gallery .card')[1].innerText").count(hostile) == 2
        assert page.see("document.querySelectorAll('.gallery script, .run b b').length") == 0
        assert page.see("document.title") != "run"


def test_it_waits_for_its_server_and_goes_on_when_that_is_back(page, tmp_path):
    run = write_run(tmp_path, "one")
    with served([run], tmp_path) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait_for(f"{LAST} === 20")
    page.wait_for("document.body.innerText.includes('No answer from the server')")
    append_step(run, 21)
    with served([run], tmp_path, port):
        page.wait_for(f"{LAST} === 21")
        assert "No answer" not in page.see("document.body.innerText")


def test_a_comparison_is_drawn_by_the_same_script_from_one_file(page, tmp_path):
    runs = [write_run(tmp_path, name, 20, start) for name, start in (("one", 4.0), ("two", 3.0))]
    compare_runs(runs, str(tmp_path / "compared.html"))
    for run in runs:
        (run / "metrics.csv").unlink()
    page.open(f"file://{tmp_path}/compared.html")
    page.wait_for("document.querySelectorAll('#plot0 polyline.train').length === 4")
    page.wait_for("document.querySelector('#answers img')?.naturalWidth === 64")
