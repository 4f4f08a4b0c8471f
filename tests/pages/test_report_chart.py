"""The loss curve as a drawing: its axes, what thinning and smoothing keep, and the file of its own."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vlm_tune.pages.report_chart import (
    MAX_POINTS,
    Axis,
    curve,
    loss_axis,
    loss_svg,
    smoothed,
    thinned,
    write_loss_svg,
)
from vlm_tune.words import loss as loss_text
from vlm_tune.words import rate as rate_text

SVG = "{http://www.w3.org/2000/svg}"


def make_report(losses: list[Any], **more: Any) -> dict[str, Any]:
    rates = {"projector": 1e-3, "llm": 1e-4, "vision": 0.0}
    points = [{"step": step, "loss": loss, "lr": rates} for step, loss in enumerate(losses, start=1)]
    return {"loss_curve": points, **more}


def lines_of(svg: str) -> dict[str, int]:
    """Return the number of points of each drawn line."""
    found = ElementTree.fromstring(svg).iter(SVG + "polyline")
    return {str(element.get("class")): len(str(element.get("points")).split()) for element in found}


def test_the_drawing_has_training_validation_and_rates_of_trained_parts():
    val = [{"step": 5, "loss": 1.5}, {"step": 10, "loss": 1.2}]
    svg = loss_svg(make_report([3 - step / 5 for step in range(10)], val_curve=val, best=val[1]))
    assert lines_of(svg) == {"raw line": 10, "train line": 10, "val line": 2, "part0 line": 10, "part1 line": 10}
    texts = [element.text for element in ElementTree.fromstring(svg).iter(SVG + "text")]
    assert {"loss", "learning rate", "optimizer step", "projector", "llm", "best 1.20 at step 10"} <= set(texts)
    assert "vision" not in texts


def test_a_run_without_rates_or_training_losses_is_drawn():
    assert lines_of(loss_svg({"val_curve": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})) == {"val line": 2}
    assert "learning rate" not in loss_svg({"loss_curve": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})


@pytest.mark.parametrize(
    "losses", [[2.0], [3.0, 3.0], [0.0, 0.0], [-1.0, -2.0], [5e4, 1e-3], [1e-9, 2e-9], [1e30, 1.0]]
)
def test_odd_losses_are_drawn_inside_the_picture(losses):
    root = ElementTree.fromstring(loss_svg(make_report(losses)))
    for element in root.iter():
        pairs = [pair.split(",") for pair in element.get("points", "").split()]
        pairs += [[element.get("cx"), element.get("cy")]] if element.get("cx") else []
        assert all(0 <= float(x) <= 880 and 0 <= float(y) <= 420 for x, y in pairs)


def test_a_wide_span_of_losses_gets_a_log_axis_and_a_narrow_one_does_not():
    def axis(*losses: float) -> Axis:
        points = [(float(step), loss) for step, loss in enumerate(losses)]
        return loss_axis(points, points, [], (100.0, 0.0))

    assert axis(6.0, 0.1).is_log
    assert not axis(2.0, 1.0).is_log
    assert not axis(6.0, 0.0).is_log  # zero has no logarithm
    assert axis(2.0, 0.5).low == 0.0
    assert axis(2.2, 2.0).low > 1.9  # where nothing is near zero, zero is not shown


@pytest.mark.parametrize("axis", [Axis(0.0, 7.3, 0, 1), Axis(0.08, 9.0, 0, 1, True), Axis(1e-4, 1e5, 0, 1, True)])
def test_ticks_are_few_ordered_and_on_the_axis(axis):
    ticks = axis.ticks(6)
    assert 3 <= len(ticks) <= 10
    assert ticks == sorted(set(ticks))
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_not_finite_losses_are_left_out_and_a_repeated_step_counts_once():
    points = [
        {"step": 2, "loss": 1.0},
        {"step": 1, "loss": math.nan},
        {"step": 3, "loss": None},
        {"step": 2, "loss": 4.0},
    ]
    assert curve({"loss_curve": points}, "loss_curve") == [(2.0, 4.0)]


def test_thinning_keeps_ends_and_spikes():
    points = [(float(step), 1.0 + step % 2) for step in range(50_000)]
    points[31_111] = (31_111.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 3
    assert points[31_111] in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_smoothing_keeps_the_first_loss_and_straight_lines():
    straight = [(float(step), 500.0 - step) for step in range(400)]
    result = smoothed(straight)
    assert result[0] == straight[0]
    assert [loss for _, loss in result[:390]] == pytest.approx([loss for _, loss in straight[:390]])
    assert smoothed([]) == []


def test_the_file_is_valid_xml_with_its_own_colours_whatever_the_parts_are_called(tmp_path: Path):
    report = {"loss_curve": [{"step": step, "loss": 1.0, "lr": {'</text><x a="\x00\ud800&': 1.0}} for step in (1, 2)]}
    assert write_loss_svg(report, tmp_path / "loss.svg")
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    assert root.get("viewBox") == "-20 -20 920 460"
    assert "prefers-color-scheme: dark" in str(root.findtext(SVG + "style"))
    assert any(element.text == '</text><x a="&' for element in root.iter(SVG + "text"))


def test_no_file_without_a_loss(tmp_path: Path):
    assert not write_loss_svg(make_report([math.nan, None]), tmp_path / "loss.svg")
    assert not (tmp_path / "loss.svg").exists()


def test_numbers_are_written_as_people_do():
    assert [loss_text(loss) for loss in (0.16432, 2.0, 123.4, 999.4, 12345.6)] == [
        "0.164",
        "2.00",
        "123",
        "999",
        "12,346",
    ]
    assert [rate_text(rate) for rate in (0.0, 2e-4, 1.5e-5, 1.0)] == ["0", "2e-4", "1.5e-5", "1e0"]
