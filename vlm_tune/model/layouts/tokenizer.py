"""Tokenizers of folders with custom code: read from their files only, the sentencepiece kind rebuilt exactly.

InternLM2's tokenizer is such code around a sentencepiece model. Text between added tokens is sentencepiece's, id by id.
"""

from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm_tune.errors import CheckpointError
from vlm_tune.model.layouts.folder_files import read_object
from vlm_tune.model.layouts.pretrained import read_settings

MODEL = "tokenizer.model"
SPACE = "\u2581"  # sentencepiece writes a space so
NORMAL, USER_DEFINED = 1, 4  # kinds of its pieces
BPE = 2
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}  # of InternLM2Tokenizer
PROBES = (
    "",
    " ",
    "a",
    " a  b   c ",
    "What is in the picture?\nA red square, 3.14 of it.\n\n",
    "tabs\tand\r\nlines",
    "图片里有什么？一个红色的方块。",
    "Ünïcödé, кириллица, かな, עברית",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2603\ufe0f e\u0301",
    "<0x0A> <unk> \u2581x",
    "def f(x):\n    return x ** 2  # 100,000",
    "aaaaaaaaaaaaaaaa            zzzzzzzzzz!!!!!!!!",
)


def brings_code(folder: Path) -> bool:
    """Return whether transformers' automatic classes would offer to run code of this folder."""
    return any("auto_map" in _json(folder / name) for name in ("tokenizer_config.json", "config.json"))


def needs_building(folder: Path) -> bool:
    """Return whether a sentencepiece model is all there is: transformers 5 would split text by rules of its own."""
    return (folder / MODEL).is_file() and not (folder / "tokenizer.json").is_file()


def load_without_code(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer by the class of transformers that its settings name, else from its sentencepiece model.

    Raises CheckpointError where the files do not suffice.
    """
    settings = _json(folder / "tokenizer_config.json")
    name = str(settings.get("tokenizer_class"))
    if "auto_map" not in settings and hasattr(transformers, name) and not needs_building(folder):
        tokenizer: PreTrainedTokenizerBase = read_settings(getattr(transformers, name), folder)
        return tokenizer
    if (folder / MODEL).is_file():
        return build(folder, settings)
    if (folder / "tokenizer.json").is_file():
        return read_settings(PreTrainedTokenizerFast, folder)  # type: ignore[no-any-return]
    raise CheckpointError(
        f"{folder}: its tokenizer {name} is code, which is not run, and there is neither {MODEL} nor tokenizer.json to "
        "read in its place: copy one of them there"
    )


def build(folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Build the fast tokenizer of a sentencepiece model and its settings: first token, added tokens, chat template.

    Raises CheckpointError where added tokens leave a gap, or the result does not split text as sentencepiece does.
    """
    proto: Any = protobuf.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString((folder / MODEL).read_bytes())
    added = _added_tokens(folder, settings)
    backend = Tokenizer(_model(proto, added, folder))
    opens_only = settings.get("legacy") is False  # Llama's newer rule: a space before the whole text alone
    backend.normalizer = _normalizer(proto, folder, opens_only)
    if steps := _pre_tokenizers(proto, opens_only):
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    strip = [decoders.Strip(" ", left=1)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _check_probes(backend, folder)
    for index, token in sorted(added.items()):
        backend.add_tokens([token]) if not token.special else backend.add_special_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{folder}: the added token {token.content} has id {index} in its settings and "
                f"{backend.token_to_id(token.content)} in the vocabulary: copy its tokenizer files anew"
            )
    return _wrapped(backend, settings, folder)


def _wrapped(backend: Tokenizer, settings: dict[str, Any], folder: Path) -> PreTrainedTokenizerFast:
    given = _json(folder / "special_tokens_map.json") | settings
    names = {key: _content(given.get(key) or DEFAULTS[key]) for key in NAMED}
    first = [names["bos_token"]] if settings.get("add_bos_token", True) else []
    last = [names["eos_token"]] if settings.get("add_eos_token", False) else []
    marks = [(name, backend.token_to_id(name)) for name in {*first, *last}]
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=[*first, "$A", *last, *first, "$B", *last], special_tokens=marks
    )
    template = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        extra_special_tokens=[_content(each) for each in given.get("additional_special_tokens") or []],
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template"),
        model_max_length=settings.get("model_max_length", 10**30),
        clean_up_tokenization_spaces=False,
        name_or_path=str(folder),
    )


def _model(proto: Any, added: dict[int, AddedToken], folder: Path) -> models.Model:
    """Make the model of the pieces; an added token takes the place of the piece of its id."""
    if proto.trainer_spec.model_type != BPE:
        raise CheckpointError(f"{folder}/{MODEL}: not a BPE model, as InternLM2's is. Add a tokenizer.json")
    pieces = [added[i].content if i in added else piece.piece for i, piece in enumerate(proto.pieces)]
    spec = proto.trainer_spec
    normal = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL and i not in added}
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=_merges(normal, [piece.score for piece in proto.pieces]),
        unk_token=pieces[spec.unk_id],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=any(piece.type == USER_DEFINED for piece in proto.pieces),
    )


def _merges(normal: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """List the pairs of pieces that make a piece, in the order in which sentencepiece joins them: by score."""
    found = []
    for piece, index in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-scores[index], index, cut, left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _pre_tokenizers(proto: Any, opens_only: bool) -> list[pre_tokenizers.PreTokenizer]:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if opens_only and proto.normalizer_spec.add_dummy_prefix:
        # spaces are SPACE by now, so that the first step finds none and puts one there also where the text has its own
        steps.append(pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False))
        steps.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False))
    defined = sorted((piece.piece for piece in proto.pieces if piece.type == USER_DEFINED), key=len, reverse=True)
    if defined:  # each is a token of its own, and longer ones match first
        steps.append(pre_tokenizers.Split(Regex("|".join(map(_escaped, defined))), behavior="isolated"))
    return steps


def _normalizer(proto: Any, folder: Path, opens_only: bool) -> normalizers.Normalizer:
    spec = proto.normalizer_spec
    if not spec.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        raise CheckpointError(f"{folder}/{MODEL}: it writes spaces in a way that is not read. Add a tokenizer.json")
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if spec.add_dummy_prefix and not opens_only:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _check_probes(backend: Tokenizer, folder: Path) -> None:
    """Compare with sentencepiece itself on a few texts: a model with rules that are not rebuilt here is refused."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    for text in PROBES:
        ours, theirs = backend.encode(text, add_special_tokens=False).ids, reference.encode(text)
        if ours != theirs:
            raise CheckpointError(
                f"{folder}/{MODEL}: {text!r} becomes {ours} here and {theirs} by sentencepiece: its rules are not all "
                "known. Add a tokenizer.json that was made for it"
            )


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Read the added tokens by id, from either place where transformers has kept them."""
    found = {
        int(index): AddedToken(
            each["content"],
            lstrip=each.get("lstrip", False),
            rstrip=each.get("rstrip", False),
            single_word=each.get("single_word", False),
            normalized=False,  # code tokenizers cut them out of the text as it stands
            special=each.get("special", True),
        )
        for index, each in settings.get("added_tokens_decoder", {}).items()
    }
    known = {token.content for token in found.values()}
    for content, index in _json(folder / "added_tokens.json").items():
        if content not in known:
            found[index] = AddedToken(content, normalized=False, special=True)
    return found


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in r"\^$.|?*+()[]{}-" else char for char in text)


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
