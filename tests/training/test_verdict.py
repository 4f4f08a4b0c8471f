"""A score that is not clearly above a guess is said in words; one that is, is not."""

import re

import pytest
from rich.console import Console

from vlm_tune.pages.report_html import write_html
from vlm_tune.training import report
from vlm_tune.training.verdict import verdicts


def evaluation(after, blind, majority, count=100):
    return {
        "before": {"colour": 0.0},
        "after": {"colour": after},
        "blind": {"colour": blind},
        "majority": {"colour": majority},
        "num_questions": {"colour": count},
    }


@pytest.mark.parametrize(
    ("scores", "rivals"),
    [
        ((0.60, 0.50, 0.20, 50), ["the same model without its pictures"]),
        ((0.60, 0.20, 0.50, 50), ["always giving the most frequent answer"]),
        ((0.50, 0.50, 0.50, 1000), ["the same model without", "always giving the most frequent"]),
        ((0.30, 0.60, 0.60, 1000), ["the same model without", "always giving the most frequent"]),
        ((1.00, 0.50, 0.50, 3), ["the same model without", "always giving the most frequent"]),
        ((0.00, 0.00, 0.30, 50), ["the same model without", "always giving the most frequent"]),
        ((0.60, 0.50, 0.50, 5000), []),
        ((1.00, 0.20, 0.20, 50), []),
    ],
)
def test_a_score_is_measured_against_both_guesses(scores, rivals):
    said = verdicts(evaluation(*scores))
    assert len(said) == len(rivals)
    assert all(rival in line for rival, line in zip(rivals, said, strict=True))


def test_it_says_the_numbers():
    (line,) = verdicts(evaluation(0.60, 0.50, 0.20, 50))
    assert line.startswith("colour: 60.0% is not clearly above 50.0% of the same model without its pictures (50 questi")
    assert line.endswith("standard error of the difference 9.5 points): nothing shows that it uses them")


def test_the_end_of_a_run_and_its_page_say_it(capsys, tmp_path):
    def cautions(found):
        write_html({"evaluation": found}, tmp_path / "report.html")
        return "".join(re.findall("<p>(.+)</p>", (tmp_path / "report.html").read_text()))

    found = evaluation(0.60, 0.50, 0.20, 50)
    found["verdicts"] = verdicts(found)
    report.show_scores(Console(width=300), found)
    assert "not clearly above 50.0%" in capsys.readouterr().out
    assert "not clearly above 50.0%" in cautions(found)
    assert cautions(evaluation(1, 0, 0)) == ""
