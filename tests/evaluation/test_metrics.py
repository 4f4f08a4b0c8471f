"""Each metric says what its field says of an answer."""

import json

import pytest

from vlm_tune.data.sample import Sample
from vlm_tune.errors import ConfigError, DataError
from vlm_tune.evaluation.evaluate import accepted_answers, batches_of
from vlm_tune.evaluation.metrics import METRICS, choice_of, metric_of, options_of
from vlm_tune.evaluation.prediction import Prediction, conclusion, write_predictions
from vlm_tune.evaluation.vqa import CONTRACTIONS, normalise

OPTIONS = "What is it?\nA. a red ball\nB. a ball\nC. Answer\nAnswer with the option's letter."


def asked(answer, expected="", answers=(), question="", task="all", score=0.0, tokens=0):
    return Prediction(0, "row", task, question, expected, answer, tuple(answers), score, tokens)


def score(metric, *given, **named):
    return metric_of(metric).graded(asked(*given, **named)).score


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("an apple, a pear", "apple pear"),  # a comma beside a space goes
        ("black/white", "black white"),  # elsewhere a space comes in its place
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("it's\na\tcat", "it's cat"),
    ],
)
def test_answers_are_normalised_as_the_official_code_of_vqa_does(answer, normal):
    assert normalise(answer) == normal


def test_contractions_are_those_of_the_official_list():
    """It has 120 keys: four in capitals equal no lowered word, and two change nothing."""
    assert len(CONTRACTIONS) == 114


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_of_ten_people_out_in_turn(agreeing, expected):
    people = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    assert score("vqa", "Yes.", "yes", people) == pytest.approx(expected)


@pytest.mark.parametrize("answer", ["Red", "The Eiffel Tower"])
def test_vqa_accuracy_reads_the_answers_of_ones_own_rows_as_it_reads_the_models(answer):
    """VQA's own are in small letters and without articles; only the model's side is normalised there."""
    assert score("vqa", answer, answer, [answer] * 10) == 1.0


def test_vqa_accuracy_asks_for_what_people_answered():
    with pytest.raises(DataError, match=r'the row has 1 "answers". Give those of ten people, or take another metric'):
        score("vqa", "yes", "yes", ["yes"])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a red ball", "B"),  # the letter is what was asked for
        ("a ball", "B"),
        ("The answer is (A).", "A"),
        ("Answer: B", "B"),
        ("The answer is: B", "B"),
        ("The correct answer is **B**.", "B"),
        ("**Answer:** B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("答案是B", "B"),
        ("答案：B", "B"),
        ("我选B", "B"),
        ("The answer is a ball", None),  # it holds "Answer", the text of C, too; "a" is no letter
        ("a dog", None),
        ("I see a red ball here", "A"),
        ("a ball, or a red ball", None),  # it holds the text of two choices
        ("D", None),
        ("A dog", None),
        ("", None),
    ],
)
def test_a_choice_is_read_from_a_letter_or_a_text(answer, letter):
    assert choice_of(answer, options_of(OPTIONS)) == letter


def test_the_last_list_of_choices_counts():
    assert options_of("A. one\nB. two\n\nA. three\nB) four\nD. five") == {"A": "three", "B": "four"}


def test_pictures_may_be_the_choices():
    assert options_of("A. \nB. \nC. \nWhich one?") == {"A": "", "B": "", "C": ""}


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("红烧肉。", "红烧肉", True),
        ("红烧肉！", "红烧肉", True),
        ("cafe\u0301", "café", True),  # a letter and its accent, apart or as one
        ("“Stop”", "Stop", True),
        ("Yes .", "yes", True),
        ("red?", "red", True),
        ("3.5", "35", False),
        ("dog", "<ref>dog</ref><box>(10,20),(30,40)</box>", False),  # boxes of another form are text
        ("<ref>dog</ref><box>(10,20),(30,40)</box>", "<ref>dog</ref><box>(10,20),(30,40)</box>", True),
    ],
)
def test_auto_compares_texts_whatever_their_punctuation_and_form(answer, expected, same):
    assert score("auto", answer, expected) == same


@pytest.mark.parametrize("metric", ["choice", "likelihood"])
def test_a_question_without_choices_does_not_fit(metric):
    with pytest.raises(DataError, match=r"is no choice. List two or more, one a line"):
        score(metric, "B", "B", question="What is it?")


@pytest.mark.parametrize(
    ("answer", "similar"), [("Kitten", 1.0), ("kittens", 6 / 7), ("sitting", 4 / 7), ("mitts", 0.5), ("dog", 0.0)]
)
def test_anls_is_the_similarity_to_the_nearest_accepted_answer(answer, similar):
    assert score("anls", answer, "kitten", ["tabby"]) == pytest.approx(similar)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<box>[[0, 0, 100, 50]]</box>", 0.5),
        ("<box>[[0, 0, 100, 100], [0, 0, 5, 5]]</box>", 0.5),  # one too many
        ("a cup", 0.0),
    ],
)
def test_mean_iou_counts_missing_and_needless_boxes_as_none(answer, expected):
    assert score("iou", answer, "<box>[[0, 0, 100, 100]]</box>") == expected


def test_mean_iou_asks_for_a_box():
    with pytest.raises(DataError, match="has no box in its expected answer"):
        score("iou", "", "a cup")


def test_bleu_of_a_task_is_that_of_sacrebleu():
    """The example of sacreBLEU's own documentation, one reference each: 48.53 (signature 13a, exp unused)."""
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    wanted = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    answers = [["The dog had bit the man."], ["No one was surprised."], ["The man had bitten the dog."]]
    rows = [asked(a, b, c) for a, b, c in zip(said, wanted, answers, strict=True)]
    assert METRICS["caption"].scores(rows)["all"] == pytest.approx(0.4853, abs=1e-4)


def test_a_caption_that_is_the_expected_one_scores_one_even_if_short():
    assert score("caption", "green", "green") == pytest.approx(1.0)
    assert METRICS["caption"].scores([asked("一只猫在桌子上", "一只猫在桌子上")])["all"] == pytest.approx(1.0)


def test_perplexity_weighs_answers_by_their_tokens():
    rows = [asked("", score=0.5, tokens=3), asked("", score=0.25, tokens=1)]
    assert METRICS["perplexity"].scores(rows)["all"] == pytest.approx(2 ** (5 / 4))


def test_exact_takes_any_accepted_answer_and_auto_the_expected_one_alone():
    assert score("exact", "feline", "cat", ["feline"]) == 1
    assert score("auto", "feline", "cat", ["feline"]) == 0


def test_the_majority_is_graded_by_the_metric():
    rows = [asked("", answer) for answer in ("kitten", "Kitten.", "kittens", "dog")]
    assert METRICS["anls"].majority(rows)["all"] == pytest.approx((1 + 6 / 7 + 6 / 7) / 4, abs=0.05)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ConfigError, match=r"metric=bleu: no such metric\. There are: auto, exact, vqa, choice"):
        metric_of("bleu")


def test_a_line_says_whether_an_answer_is_correct_as_it_always_did(tmp_path):
    write_predictions({"run": [asked("cat", "cat", score=1.0)]}, tmp_path / "predictions.jsonl")
    line = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert list(line) == ["row", "id", "task", "question", "expected", "answer", "score", "correct"]
    assert line["correct"] is True


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Red.", "Red."),
        ("<think>\nBlue? No.\n</think>\n\nRed.", "Red."),
        ("Blue? No.</think>Red.", "Red."),  # the template has written the first mark
        ("<think>\nBlue", ""),  # cut off
        ("He says <think>, in red", "He says <think>, in red"),
    ],
)
def test_what_follows_the_reasoning_is_the_answer(answer, said):
    assert conclusion(answer) == said


@pytest.mark.parametrize("metric", ["auto", "exact", "vqa", "anls", "caption"])
def test_reasoning_before_an_answer_is_not_scored(metric):
    assert score(metric, "<think>\nIt may be blue.\n</think>\n\nred", "red", 10 * ["red"]) == 1


def test_a_box_in_the_reasoning_is_no_answer():
    thought = "<think>\n<box>[[0, 0, 9, 9]]</box>\n</think>\n\n"
    assert score("iou", thought + "<box>[[50, 50, 90, 90]]</box>", "<box>[[50, 50, 90, 90]]</box>") == 1


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (None, ()),
        ("", ()),
        ([], ()),
        (["red", "Red"], ("red", "Red")),
        ([{"answer": "red"}], ("red",)),
        ([3, "3.0"], ("3", "3.0")),
        ('["red", "scarlet"]', ("red", "scarlet")),  # the cell of a table
    ],
)
def test_accepted_answers_are_read_in_the_forms_that_rows_have(value, read):
    sample = Sample("row", (), "test.jsonl:1")
    assert accepted_answers(value, sample) == read


@pytest.mark.parametrize("value", ["red", {"text": ["red"]}, [["red"]], ["red", None]])
def test_accepted_answers_of_other_forms_are_an_error(value):
    with pytest.raises(DataError, match=r'test.jsonl:1 \(id "row"\): "answers" is no list of texts'):
        accepted_answers(value, Sample("row", (), "test.jsonl:1"))


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [([40] * 70, [32, 32, 6]), ([3400] * 9, [4, 4, 1]), ([20_000, 20_000], [1, 1]), ([100, 100, 9000], [2, 1])],
)
def test_long_questions_are_answered_in_smaller_batches(lengths, sizes):
    batches = list(batches_of([(number, b"", 0, b"") for number in range(len(lengths))], lengths, 64))
    assert [len(batch) for batch in batches] == sizes
    assert [key[0] for batch in batches for key in batch] == list(range(len(lengths)))
