"""The demo's split: what counts as one food, and that a held-out food is met nowhere before."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.errors import DataError
from vlm_tune.recipes.recipe import recipe_folders


def load_recipe() -> ModuleType:
    """Load the recipe from its file: recipes are programs, not modules of the package."""
    path = recipe_folders()["demo"] / "prepare.py"
    spec = importlib.util.spec_from_file_location("demo_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_recipe"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


demo = load_recipe()


def food(name: str, group: str = "fruits", **facts):
    return demo.Food(code=facts.pop("code", name), name=name, group=group, **facts)


def photo(*foods):
    return demo.Photo(Path(f"{foods[0].code}.jpeg"), foods)


def photos_of(*names: str):
    return [photo(food(name)) for name in names]


def nouns_of(photos) -> list[list[str]]:
    return [[one.name for one in component] for component in demo.components(photos)]


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("Apple, green", "apple"),
        ("Brinjal-10", "brinjal"),
        ("Brinjal - all varieties", "brinjal"),
        ("Knol - Khol", "knol khol"),
        ("Knol-Khol, leaves", "knol khol"),
        ("Chillies, green-2", "chilli"),
        ("Chilli powder", "chilli"),
        ("Cherries, red", "cherry"),
        ("Ladies finger", "lady finger"),
        ("Mustard leaves", "mustard"),
        ("Mustard seeds", "mustard"),
        ("Mustard oil", "mustard"),
        ("Cotton seed oil", "cotton"),
        ("Safflower oil (blended)", "safflower"),
        ("Ground nut", "groundnut"),
        ("Groundnut oil", "groundnut"),
        ("Soyabean oil", "soya bean"),
        ("Soya bean, brown", "soya bean"),
        ("Coconut Water", "coconut"),
        ("Water Chestnut", "water chestnut"),
        ("Garden cress, seeds", "garden cress"),
        ("Parcus", "parcus"),
        ("Betel leaves, big (kolkata)", "betel"),
    ],
)
def test_head_noun(name: str, noun: str) -> None:
    assert demo.head_noun(name) == noun


def test_a_fish_has_the_head_noun_of_its_english_name_too() -> None:
    assert demo.head_nouns(food("Sankata paarai", english="giant trevally")) == {"sankata paarai", "trevally"}
    assert demo.head_nouns(food("Milk fish", english="milk fish")) == {"milk fish"}


def test_names() -> None:
    assert food("Brinjal-10").short_name == "brinjal"
    assert food("Chillies, green - all varieties").full_name == "chillies, green"
    assert food("Goat, tube (small intestine)").full_name == "goat, tube"
    assert food("Hilsa", english="ilish").full_name == "hilsa (ilish)"
    assert food("Rohu", english="rohu").full_name == "rohu"
    assert photo(food("Goat, brain"), food("Goat, legs")).name == "goat"


def test_one_food_under_one_noun() -> None:
    assert nouns_of(photos_of("Brinjal-1", "Carrot, red", "Brinjal - all varieties")) == [
        ["brinjal", "brinjal"],
        ["carrot, red"],
    ]


def test_a_noun_within_another_name_ties_them() -> None:
    assert len(nouns_of(photos_of("Potato, red skin", "Sweet potato, pink skin"))) == 1
    assert len(nouns_of(photos_of("Chicken, poultry, leg", "Poultry, chicken, liver"))) == 1
    assert len(nouns_of(photos_of("Apple, big", "Pineapple"))) == 2  # whole words only
    assert len(nouns_of(photos_of("Orange, pulp", "Carrot, orange"))) == 2  # a colour there


def test_ties_go_through_shared_photos_and_species() -> None:
    shared = photo(food("Alpha, leg"), food("Beta, liver"))
    assert len(nouns_of([shared, *photos_of("Beta, raw"), *photos_of("Alpha, raw"), *photos_of("Gamma")])) == 2
    aluva = photo(food("Aluva", species="Parastromateus niger"))
    pomfret = photo(food("Pomfret, black", species="Parastromateus niger"))
    assert len(nouns_of([aluva, pomfret])) == 1
    one, other = photo(food("Squid", species="Loligo sp.")), photo(food("Jallal", species="Loligo sp."))
    assert len(nouns_of([one, other])) == 2  # "sp." names a genus only


def many_photos():
    return photos_of(*(f"{chr(97 + a)}{chr(97 + b)}mo, {kind}" for a in range(26) for b in range(6) for kind in "xy"))


def test_the_split_keeps_components_together_and_does_not_depend_on_the_order() -> None:
    photos = many_photos()
    parts = demo.split(photos)
    assert sum(len(part) for part in parts.values()) == len(photos)
    nouns = {name: {demo.head_noun(one.food.name) for one in part} for name, part in parts.items()}
    assert not nouns["test"] & nouns["train"]
    assert not nouns["val"] & nouns["train"]
    assert 0.12 < len(parts["test"]) / len(photos) < 0.28
    assert 0.03 < len(parts["val"]) / len(photos) < 0.14
    demo.check_split(parts)
    assert demo.split(photos[::-1]) == parts


def test_the_check_finds_what_is_met_before() -> None:
    parts = {"train": photos_of("Sweet potato"), "val": [], "test": photos_of("Potato, brown")}
    with pytest.raises(DataError, match="the test food 'potato' occurs in train: 'Sweet potato'"):
        demo.check_split(parts)
    twins = [photo(food(name, species="Zea mays")) for name in ("Maize", "Corn")]
    with pytest.raises(DataError, match=r"test and val share \['species zea mays'\]"):
        demo.check_split({"train": [], "val": twins[:1], "test": twins[1:]})


@pytest.fixture
def maker():
    phrases = json.loads((recipe_folders()["demo"] / "phrases.json").read_text(encoding="utf-8"))
    return demo.RowMaker(phrases, {"M001": (307, 172), "O001": (307, 172)})


def test_every_row_can_be_trained_on(maker) -> None:
    mango = photo(food("Mango, ripe", code="M001", hindi="aam", protein=0.6, energy=178.0))
    rows = [*maker.test_questions(mango), *maker.questions(mango, True), *maker.captions(mango)]
    assert all(parse_record(row, "auto", "demo.jsonl:1", 0).pictures for row in rows)


def test_rows(maker) -> None:
    mango = photo(food("Mango, ripe", code="M001", hindi="aam", protein=0.6, energy=178.0))
    for row in maker.test_questions(mango):
        assert set(row) == {"id", "image", "width", "height", "conversations", "task", "topic"}
    questions = {row["task"]: [turn["value"] for turn in row["conversations"]] for row in maker.test_questions(mango)}
    assert questions == {
        "food_group": ["<image>\nWhich food group is this?", "fruits"],
        "vegetarian": ["<image>\nIs this food vegetarian?", "yes"],
    }
    training = list(maker.questions(mango, True))
    assert training == list(maker.questions(mango, True))  # the wording is drawn from a seed
    assert [row["task"] for row in training].count("food_group") == 2
    assert len({row["id"] for row in training}) == len(training) == 9
    assert maker.answers(mango) == {
        "food_group": "fruits",
        "vegetarian": "yes",
        "name": "mango",
        "kind": "plant",
        "protein": "no",
        "energy": "no",
        "hindi_name": "aam",
    }
    for row in maker.captions(mango):
        assert "mango, ripe" in row["conversations"][1]["value"].lower()


def test_a_fact_on_which_the_foods_of_a_photo_differ_is_not_asked(maker) -> None:
    leg, fat = (food(f"Goat, {cut}", "animal meat", code="O001", protein=g) for cut, g in (("leg", 20.0), ("fat", 1.0)))
    answers = maker.answers(photo(leg, fat))
    assert "protein" not in answers
    assert answers["kind"] == "meat"


def test_majority() -> None:
    rows = [{"task": "t", "conversations": [{"value": answer}]} for answer in ("yes", "yes", "no", "yes")]
    assert demo.majority([*rows, {"task": "u", "conversations": [{"value": "no"}]}], "t") == ("yes", 0.75)


def test_names_of_the_table() -> None:
    names = "A. Aahu; E. Giant trevally, Ulua; H. Aam (paka), Am; Kan. Mavina hannu; [Place of collection: Kochi]"
    assert demo.name_in("E", names) == "giant trevally"
    assert demo.name_in("H", names) == "aam"
    assert demo.name_in("B", names) == ""
