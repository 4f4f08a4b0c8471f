"""The page's server answers a few addresses of the shown runs, to this machine alone, and keeps up with their files."""

import json
import threading
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest
from recorded_runs import rows_up_to, say, step_row, write_run

from vlm_tune.errors import ConfigError
from vlm_tune.pages.recorded import curve, describe, newest_runs, write_metrics
from vlm_tune.serve.watch import Shown, make_server


@contextmanager
def served(runs, folder, port=0):
    """Serve a page; give its port."""
    with make_server(runs, folder, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def get(port, path, host=None):
    connection = HTTPConnection("127.0.0.1", port)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.getheader("Content-Type"), answer.read()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Serve one of two runs."""
    runs = tmp_path_factory.mktemp("served")
    run = write_run(runs, "shown")
    write_run(runs, "not_shown")
    with served([run], runs) as port:
        yield port


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8222", "localhost:9999", "[::1]:1"])
def test_it_answers_under_the_names_of_this_machine(page, host):
    assert get(page, "/", host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8222", "127.0.0.1.evil.example", "localhost@evil"])
def test_it_answers_under_no_other_name(page, host):
    assert get(page, "/data.json", host)[0] == 421


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/watch.js", "text/javascript"),
        ("/data.json", "application/json"),
        ("/picture/shown/0", "image/jpeg"),
    ],
)
def test_it_has_these_addresses(page, path, kind):
    status, found, content = get(page, path)
    assert (status, found) == (200, f"{kind}; charset=utf-8")
    assert content


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml",
        "/shown/config.yaml",
        "/picture/shown/1",
        "/picture/shown/-1",
        "/picture/shown/x",
        "/picture/not_shown/0",
        "/picture/..%2Fnot_shown/0",
        "/picture/shown",
        "/watch.css",
        "//etc/passwd",
    ],
)
def test_it_has_no_others(page, path):
    assert get(page, path)[0] == 404


def test_addresses_are_relative_so_that_a_forwarded_page_works(page):
    text = get(page, "/")[2].decode() + get(page, "/watch.js")[2].decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert 'src="/' not in text
    assert "fetch(`data.json" in text


def test_paths_of_pictures_are_not_told(page):
    assert b"red.png" not in get(page, "/data.json")[2]


def test_what_a_page_knows_is_not_sent_again(tmp_path):
    run = write_run(tmp_path, "one")
    shown = Shown([run], tmp_path)
    (first,) = shown.news({})["runs"]
    assert first["step"] == 20
    (again,) = shown.news({"one": first["version"]})["runs"]
    assert "curves" not in again
    write_metrics(run / "metrics.csv", rows_up_to(21))
    (grown,) = shown.news({"one": first["version"]})["runs"]
    assert len(grown["curves"]["train/loss"]) == 21


def test_it_follows_a_run_that_goes_back_to_a_checkpoint(tmp_path):
    run = write_run(tmp_path, "one")
    shown = Shown([run], tmp_path)
    shown.news({})
    write_metrics(run / "metrics.csv", rows_up_to(10))
    assert shown.news({})["runs"][0]["step"] == 10


def test_without_names_the_newest_runs_are_shown_also_one_that_starts_later(tmp_path):
    shown = Shown([], tmp_path)
    assert shown.news({}) == {"runs": []}
    for number in range(7):
        write_run(tmp_path, f"run_{number}", steps=number)
    (tmp_path / "latest").symlink_to("run_6")
    assert [run["name"] for run in shown.news({})["runs"]] == [f"run_{number}" for number in range(2, 7)]
    assert newest_runs(tmp_path, 1) == [tmp_path / "run_6"]


@pytest.mark.parametrize(
    ("spoil", "file"), [("\n{half a li", "sample_answers.jsonl"), ("{", "report.json"), ("21,0.5", "metrics.csv")]
)
def test_a_file_that_is_being_written_is_read_as_far_as_it_is_whole(tmp_path, spoil, file):
    run = write_run(tmp_path, "one")
    with (run / file).open("a", encoding="utf-8") as open_file:
        open_file.write(spoil)
    found = describe(run)
    assert found["step"] == 20
    assert found["answers"][0]["said"] == [[0, "no idea", False], [20, "Red.", True]]


def test_a_run_that_has_just_begun_is_shown(tmp_path):
    run = write_run(tmp_path, "one")
    for name in ("metrics.csv", "sample_answers.jsonl"):
        (run / name).unlink()
    assert describe(run)["curves"] == {}


def test_a_run_is_finished_when_its_report_is_its_last_file(tmp_path):
    run = write_run(tmp_path, "one")
    assert not describe(run)["is_finished"]
    (run / "report.json").write_text(json.dumps({"evaluation": {"after": {"colour": 0.5}}}), encoding="utf-8")
    assert describe(run)["is_finished"]
    assert describe(run)["scores"] == {"colour": 0.5}


def test_a_long_curve_keeps_its_spikes():
    rows = [step_row(step, 1.0) for step in range(1, 5001)]
    rows[3333]["train/loss"] = 99.0
    points = curve(rows, "train/loss")
    assert len(points) <= 400
    assert max(point[3] for point in points) == 99
    assert points[-1][0] == 5000


def test_an_answer_that_is_given_anew_stands_once(tmp_path):
    run = write_run(tmp_path, "one")
    say(run, 20, "blue")
    assert describe(run)["answers"][0]["said"] == [[0, "no idea", False], [20, "blue", False]]


def test_time_left_follows_from_the_last_steps(tmp_path):
    assert describe(write_run(tmp_path, "one", 30))["seconds_left"] == 20  # 10 steps of 2 s


def test_a_taken_port_is_an_error_that_says_what_to_do(tmp_path, page):
    with pytest.raises(ConfigError, match=rf"port={page}: Address already in use. Give another one, or port=0"):
        make_server([], tmp_path, page)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("watch", "runs/nowhere"), "runs/nowhere: no run folder"),
        (("watch", "port=http"), "port=http: give a number"),
        (("watch", "--logdir", "x"), "--logdir: no such key. This verb has: port, runs, and names of runs"),
        (("compare", "runs/one"), "compare: name two runs or more"),
    ],
)
def test_mistakes_are_said(run_cli, arguments, said):
    done = run_cli(*arguments)
    assert done.code == 2
    assert said in done.err
