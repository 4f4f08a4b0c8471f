"""Check the rows: read, parse and measure each one, look at its pictures, and record every fault."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from vlm_tune.config.schema import TileRule
from vlm_tune.data.dialects.dialects import recognise
from vlm_tune.data.example import Lengths
from vlm_tune.data.fit import SkippedSample
from vlm_tune.data.pictures.images import CheckedPictures
from vlm_tune.data.rows.cache import hashed
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.data.sets.dataset import Conversations, Tiling
from vlm_tune.data.sets.index import trained_content
from vlm_tune.data.sets.mixture import with_settings
from vlm_tune.data.text.positions import UNLIMITED
from vlm_tune.data.tiles import picture_tiles
from vlm_tune.errors import DataError
from vlm_tune.inspection.check_answers import Answers
from vlm_tune.inspection.check_pictures import LookCount
from vlm_tune.inspection.check_shared import Contents, HeldOut, Shared

CHUNK = 256  # rows that a worker checks at once: their texts are tokenized together
ENDLESS = 1 << 40  # tokens: a limit that nothing exceeds
UNREADABLE, UNKNOWN = "unreadable", "unknown"  # in the count of rows per dialect
UNKNOWN_DIALECT, REPEATED_ID, OTHER = "unknown dialect", "repeated id", "other"

Hashes = npt.NDArray[np.uint64]
GoodRow = tuple[int, Sample, Tiling]

# The kind of fault that the words of an error stand for; the first match counts, and "other" if there is none.
ROW_KINDS = {
    "not JSON": r"^not JSON",
    "bad encoding": r"^not UTF-8|holds a broken character",
    "not an object": r"^not an object|must be an object",
    "unknown role": r"unknown role",
    "turns out of order": r"are both from the|may only speak first",
    "empty conversation": r"the conversation is empty",
    "marks and images differ": r'"<(image|video)>" marks? but|belong to no image part|an image without a source',
    "pair or not": r"but this stage trains on",
    "equal answers": r"^both answers of the pair|^the answers of the pair differ only in white space",
    "half a pair": r'^a pair of answers has|^a pair without its question|^"rejected_\w+" (needs|without)',
    "pair of two questions": r'^the two conversations of the pair differ|^"rejected_images" differ',
    "no supervised token": r"nothing to train on|no supervised token",
    "too long": r"but data\.max_length=|but the language model's max_position",
    "field not read": r'" (is|are) not read in |^the text names a file in',
    "no answer": r"no answer|the answer is empty|<nooutput>",
    "wrong size declared": r"^width or height is|^\d+ widths and",
    "video": r'^video "|^the video cannot|^"clip"',
    UNKNOWN_DIALECT: r'^no known dialect|^no "',
}
PICTURE_KINDS = {
    "missing image": r" is not there",
    "empty image": r" is empty \(0 bytes\)",
    "truncated image": r" is a truncated or damaged ",
    "not an image": r" is not an image of a known format| is not a file",
    "image too large": r" is too large",
    "image outside the root": r" lies outside the image root| is a symbolic link out of| is a URL",
    "wrong size declared": r", the row declares ",
    "unreadable image": r"",
}
STATES = {"missing image": "missing", "wrong size declared": "found"}  # of a picture; any other fault: broken
RULES = (TileRule.dynamic, TileRule.area)  # compared with each other


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row."""

    kind: str
    where: str  # "train.jsonl:17"
    row: int  # from 0, as `inspect row=` takes it
    id: str | None
    reason: str


@dataclass(frozen=True)
class LongRow:
    """What happens to one row that is longer than a limit."""

    where: str
    row: int
    id: str
    tokens: int
    outcome: str


@dataclass
class Findings:
    """What was found in some rows; only counts, so that ten million rows cost no more memory than their faults."""

    num_rows: int = 0
    dialects: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)  # found, missing, broken; turned, ...: each place in a row
    tiles: Counter[int] = field(default_factory=Counter)  # tiles of a row -> rows
    tokens: Counter[int] = field(default_factory=Counter)  # tokens of a row, before data.on_too_long -> rows
    by_rule: dict[str, Counter[int]] = field(default_factory=dict)  # the same under each of RULES
    trained: Counter[str] = field(default_factory=Counter)  # rows, tokens, supervised, shared: what training will see
    faults: list[Fault] = field(default_factory=list)
    long_rows: list[LongRow] = field(default_factory=list)
    stretched_rows: list[LongRow] = field(default_factory=list)  # beyond max_position_embeddings, by rope scaling
    same_id: list[tuple[str, str]] = field(default_factory=list)  # (where, where the same id occurred first)
    same_content: list[tuple[str, str]] = field(default_factory=list)  # the same for whole conversations
    markup: Counter[str] = field(default_factory=Counter)  # tokens that belong to the texts (<box>) -> how often
    answers: Answers = field(default_factory=Answers)
    shared: dict[str, Shared] = field(default_factory=dict)  # "val", "test" -> what is in that file too
    ids: list[Hashes] = field(default_factory=list)  # one per row, 0 = none
    contents: list[Hashes] = field(default_factory=list)  # one per row, 0 = not readable
    pictures: list[Hashes] = field(default_factory=list)  # of the pictures' paths, each once per chunk

    def merge(self, other: "Findings") -> None:
        """Add the findings of later rows."""
        self.num_rows += other.num_rows
        for name in ("dialects", "images", "tiles", "tokens", "trained", "markup"):
            getattr(self, name).update(getattr(other, name))
        self.answers.merge(other.answers)
        for part, shared in other.shared.items():
            self.shared.setdefault(part, Shared()).merge(shared)
        for rule, counts in other.by_rule.items():
            self.by_rule.setdefault(rule, Counter()).update(counts)
        for name in ("faults", "long_rows", "stretched_rows", "same_id", "same_content", "ids", "contents", "pictures"):
            getattr(self, name).extend(getattr(other, name))

    def renumber(self, start: int) -> None:
        """Shift the row numbers of a set to those of its mixture."""
        if start:
            self.faults = [replace(fault, row=fault.row + start) for fault in self.faults]
            for rows in (self.long_rows, self.stretched_rows):
                rows[:] = [replace(long, row=long.row + start) for long in rows]


class RowCheck(Dataset[Findings]):
    """Checks the rows of one data file, a chunk at a time; `torch.utils.data.DataLoader` spreads the chunks."""

    def __init__(self, data: Conversations, held: Sequence[HeldOut] = ()) -> None:
        self.data = data
        self.held = held
        self.contents = Contents(data.reader)
        # Measured without a limit first, so that the histogram also covers rows that are too long.
        self.endless = with_settings(data.encoder, max_length=ENDLESS, positions=UNLIMITED)
        markup = sorted(data.encoder.markup, key=len, reverse=True)
        self.markup = re.compile("|".join(map(re.escape, markup))) if markup else None
        self.tiles = {rule: replace(data.pictures.tiles, rule=rule) for rule in RULES}
        self.checked = CheckedPictures(data.reader)
        self.looks = LookCount(data.reader, len(self))

    def __len__(self) -> int:
        """Count the chunks."""
        return -(-len(self.data) // CHUNK)

    def __getitem__(self, number: int) -> Findings:
        """Check one chunk of rows."""
        rows = range(number * CHUNK, min((number + 1) * CHUNK, len(self.data)))
        found = Findings(num_rows=len(rows))
        self.looks.begin(number)
        ids, contents = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
        pictures: set[int] = set()
        good: list[GoodRow] = []
        for place, row in enumerate(rows):
            sample, own_id = self._read(row, found)
            if own_id is not None:
                ids[place] = hashed([own_id.encode("utf-8", "surrogatepass")])
            if sample is not None:
                contents[place] = hashed(trained_content(sample))
                pictures.update(hashed([name_of(picture)]) for picture in sample.pictures)
                found.answers.add(sample)
                if self.markup is not None:
                    said = (text for turn in sample.turns for text in (turn.reasoning, *turn.parts))
                    texts = (text for text in said if isinstance(text, str))
                    found.markup.update(name for text in texts for name in self.markup.findall(text))
                tiling = self._look(row, sample, found)
                if tiling is not None:
                    for held in self.held:
                        held.compare(sample, self.contents, found.shared.setdefault(held.part, Shared()))
                good += [(row, sample, tiling)] if tiling is not None else []
        self._measure(good, found)
        found.ids, found.contents = [ids], [contents]
        found.pictures = [np.fromiter(pictures, np.uint64, len(pictures))]
        return found

    def _read(self, row: int, found: Findings) -> tuple[Sample | None, str | None]:
        """Parse one row; also return its own id, if it has one."""
        data = self.data
        try:
            record = data.rows[row]
        except DataError as error:
            found.dialects[UNREADABLE] += 1
            add_fault(found, row, error, ROW_KINDS)
            return None, error.sample_id
        try:
            sample = data.parse(record, row)
        except DataError as error:
            kind = add_fault(found, row, error, ROW_KINDS)
            found.dialects[dialect_of(record) if kind == UNKNOWN_DIALECT else data.format] += 1
            return None, error.sample_id
        found.dialects[dialect_of(record) if data.format == "auto" else data.format] += 1
        has_id = any(record.get(key) not in (None, "") for key in ("id", "question_id", "qid"))
        return sample, sample.id if has_id else None

    def _look(self, row: int, sample: Sample, found: Findings) -> Tiling | None:
        """Read the headers of a row's pictures; None where one of them cannot be used."""
        sizes: list[tuple[int, int]] = []
        pictures = sample.pictures
        for picture in pictures:
            try:
                sizes.append(self.checked.check(picture, sample.where, sample.id))
                found.images["found"] += 1
                self.looks.look(picture, found.images)
            except DataError as error:
                kind = add_fault(found, row, error, PICTURE_KINDS)
                found.images[STATES.get(kind, "broken")] += 1
        if len(sizes) < len(pictures):
            return None
        return Tiling(sizes, [picture.is_frame for picture in pictures], self.data.pictures.tiles)

    def _measure(self, good: list[GoodRow], found: Findings) -> None:
        """Count the tokens of all rows that could be read, and apply the policy to those that are too long."""
        limit, positions = self.data.encoder.settings.limit.tokens, self.data.encoder.settings.positions
        samples = [self.data.encoder.shortened(sample) for _, sample, _ in good]  # far too long: not counted to the end
        measured = self.endless.encode_lengths(samples, [tiling for _, _, tiling in good])
        for (row, sample, tiling), lengths in zip(good, measured, strict=True):
            if isinstance(lengths, DataError):
                add_fault(found, row, lengths, ROW_KINDS)
                continue
            found.tokens[lengths.num_tokens] += 1
            found.tiles[sum(lengths.num_tiles)] += 1
            self._compare_rules(tiling, lengths, found)
            kept: Lengths | None = lengths
            if lengths.num_tokens > limit:
                kept = self._shorten((row, sample, tiling), lengths.num_tokens, found)
            if kept is not None and kept.num_tokens > (positions.named or ENDLESS):
                outcome = f"trained by rope scaling {positions.rope}"
                found.stretched_rows.append(LongRow(sample.where, row, sample.id, kept.num_tokens, outcome))
            if kept is not None:
                found.trained.update(rows=1, tokens=kept.num_tokens, supervised=kept.num_supervised)
                found.trained["shared"] += kept.num_shared

    def _shorten(self, good: GoodRow, num_tokens: int, found: Findings) -> Lengths | None:
        """Record what happens to a row that is too long."""
        row, sample, tiling = good
        lengths = self.data.encoder.encode_lengths([sample], [tiling])[0]
        if isinstance(lengths, Lengths):
            outcome = lengths.note
        elif isinstance(lengths, SkippedSample):
            outcome = "skip: left out"
        else:
            outcome = "error: stops the run"
            add_fault(found, row, lengths, ROW_KINDS)
        found.long_rows.append(LongRow(sample.where, row, sample.id, num_tokens, outcome))
        return lengths if isinstance(lengths, Lengths) else None

    def _compare_rules(self, tiling: Tiling, lengths: Lengths, found: Findings) -> None:
        """Count the tokens of a row under both tile rules, where the model has one of them."""
        if tiling.tiles.rule not in RULES:
            return
        per_tile = self.data.encoder.settings.tokens_per_tile
        num_fixed = lengths.num_tokens - per_tile * sum(lengths.num_tiles)
        for rule, tiles in self.tiles.items():
            num_tiles = sum(picture_tiles(tiling.sizes, tiling.is_frame, tiles, lengths.max_tiles))
            found.by_rule.setdefault(rule.value, Counter())[num_fixed + per_tile * num_tiles] += 1


def add_fault(found: Findings, row: int, error: DataError, kinds: dict[str, str]) -> str:
    """Record a fault; return its kind."""
    kind = next((name for name, words in kinds.items() if re.search(words, error.reason)), OTHER)
    found.faults.append(Fault(kind, error.where, row, error.sample_id, error.reason))
    return kind


def dialect_of(record: Mapping[str, object]) -> str:
    """Name the dialect that a single record looks like."""
    try:
        return recognise(record)
    except DataError:
        return UNKNOWN


def name_of(picture: Picture) -> bytes:
    """Return what identifies a picture."""
    frame = "" if picture.frame is None else f" frame {picture.frame}"
    return picture.content or f"{picture.path}{frame}".encode("utf-8", "surrogatepass")


def add_repeats(found: Findings, data: Conversations, are_ids_unique: bool) -> None:
    """Find rows whose id, or whose whole conversation, occurred earlier; repeated ids are faults if so configured."""
    same_id, where = repeats(found.ids), data.rows.where
    found.same_id = [(where(row), where(first)) for row, first in same_id]
    found.same_content = [(where(row), where(first)) for row, first in repeats(found.contents)]
    for row, first in same_id if are_ids_unique else []:
        remedy = "Give each row an id of its own, or take them as they are: repeated_ids=allow"
        reason = f"the id is also that of {where(first)}. {remedy}"
        found.faults.append(Fault(REPEATED_ID, where(row), row, id_of(data, row), reason))
    found.faults.sort(key=lambda fault: fault.row)


def repeats(chunks: list[Hashes]) -> list[tuple[int, int]]:
    """List the rows whose hash an earlier row already has: (row, first row of that hash)."""
    hashes = np.concatenate([*chunks, np.zeros(0, np.uint64)])
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    first_row = first[inverse]
    rows = np.flatnonzero((hashes != 0) & (first_row != np.arange(len(hashes))))
    return [(int(row), int(first_row[row])) for row in rows]


def id_of(data: Conversations, row: int) -> str | None:
    """Read a row's id again."""
    try:
        return data.sample(row).id
    except DataError as error:
        return error.sample_id
