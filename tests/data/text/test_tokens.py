"""Pieces read one by one give the tokens of the whole text, for every way tokenizers treat spaces and newlines."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import NO_LOSS
from vlm_tune.data.fit import EncoderSettings, no_pictures
from vlm_tune.data.sample import Message, Sample
from vlm_tune.data.text.chat_template import choose_template
from vlm_tune.data.text.templates import load_template
from vlm_tune.data.text.tokens import TextTokenizer
from vlm_tune.errors import ConfigError, DataError

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CORPUS = ["A chat between a user and an assistant. USER: What is it? ASSISTANT: A cat on the couch.\n\n The end. " * 20]
ROWS = [
    (("What is it?", "A cat."),),
    (("What  is\n\nit?", "  A cat \n"), (" And this? ", "A dog on the couch"), ("\n", "Yes")),
    (("你好", "猫"), ("USER: hi", "</x> ASSISTANT:")),
]
PLAIN = (Message("assistant", ("A cat.",), supervised=True),)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def metaspace(scheme):
    return None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


KINDS = {
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "qwen": (
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
    "llama": metaspace("first"),
    "llama_always": metaspace("always"),
    "llama_legacy": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
}


@pytest.fixture(scope="module", params=[*KINDS, "phi3"])
def tokenizer(request):
    """Train a small tokenizer; phi3's special tokens swallow the white space after them."""
    normalizer, splitter = KINDS.get(request.param, KINDS["llama"])
    bare = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    # SentencePiece learns words but reads text whole.
    bare.pre_tokenizer = splitter if request.param in ("gpt2", "qwen") else pre_tokenizers.Metaspace()
    strips = request.param == "phi3"
    special = [AddedToken(text, normalized=False, rstrip=strips and text.startswith("<|")) for text in SPECIAL]
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=letters, show_progress=False)
    bare.train_from_iterator(CORPUS, trainer)
    bare.pre_tokenizer, bare.normalizer = splitter, normalizer
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sample_of(turns):
    pairs = [(Message("user", (asked,)), Message("assistant", (said,), supervised=True)) for asked, said in turns]
    return Sample("a", tuple(message for pair in pairs for message in pair))


@pytest.mark.parametrize("turns", ROWS)
@pytest.mark.parametrize(
    "name", ["chatml", "internvl2_5", "Hermes-2", "phi3-chat", "v1", "llama_2", "mistral_instruct"]
)
def test_tokens_are_those_of_the_whole_text(tokenizer, name, turns):
    """The references tokenize the whole prompt, or whole turns that begin with a special token."""
    template = load_template(name)
    encoder = Encoder(
        tokenizer, template, EncoderSettings(image_start="", image_context="", image_end="", system="Be kind.")
    )
    frame = f"{template.user}{template.assistant}%s{template.end}{template.after}"
    first = frame.replace(template.user, template.first_user or template.user)
    text = template.system.replace("{system}", "Be kind.")
    for number, (asked, said) in enumerate(turns):
        text += (frame if number else first).replace("{question}", asked).replace("%s", said)
    assert encoder.encode(sample_of(turns)).input_ids.tolist() == tokenizer(text)["input_ids"]


def test_first_word_of_an_answer_keeps_its_space(tokenizer):
    """LLaVA's prompt ends at "ASSISTANT:", so the model has to generate the token of " A"."""
    settings = EncoderSettings(image_start="", image_context="", image_end="")
    encoder = Encoder(tokenizer, load_template("v1"), settings)
    example = encoder.encode(sample_of(ROWS[0]))
    supervised = example.labels[example.labels >= 0].tolist()
    assert supervised == tokenizer(" ASSISTANT: A cat.</s>")["input_ids"][-len(supervised) :]
    prompt = encoder.encode_prompt(sample_of(ROWS[0])).input_ids.tolist()
    assert prompt + supervised == example.input_ids.tolist()


@pytest.mark.parametrize("text", ["The cat on the couch.\n\nThe end. ", " A dog\n", "你好 猫"])
@pytest.mark.parametrize("name", ["chatml", "v1", "plain", "default", "llama2_chat", "tokenizer"])
def test_plain_text_is_the_tokenizers_own_and_its_end(tokenizer, name, text):
    """A row {"text": ...} has no headers under any template; all of it is trained on, the first token aside."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for each in messages %}"
        "{{ '<|im_start|>' + each['role'] + '\n' + each['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    settings = EncoderSettings(image_start="", image_context="", image_end="")
    encoder = Encoder(tokenizer, choose_template(name, tokenizer), settings)
    sample = parse_record({"text": text}, "auto", "a.jsonl:1", 0)
    example = encoder.encode(sample)
    assert example.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert example.labels.tolist() == [NO_LOSS, *example.input_ids[1:].tolist()]
    assert encoder.encode_lengths([sample], [no_pictures])[0].num_tokens == len(example.input_ids)


def test_plain_text_takes_no_system_prompt(tokenizer):
    settings = EncoderSettings(image_start="", image_context="", image_end="", system="Be kind.", add_bos=False)
    example = Encoder(tokenizer, load_template("chatml"), settings).encode(Sample("a", PLAIN, is_plain=True))
    expected = tokenizer("A cat.", add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == [*expected, tokenizer.eos_token_id]


def test_plain_text_asks_nothing(tokenizer):
    encoder = Encoder(
        tokenizer, load_template("chatml"), EncoderSettings(image_context="", image_start="", image_end="")
    )
    with pytest.raises(DataError, match=r'a.jsonl:1 \(id "a"\): plain text holds no question to answer'):
        encoder.encode_prompt(Sample("a", PLAIN, "a.jsonl:1", is_plain=True))


def test_literal_special_tokens_stay_text(tokenizer):
    tokens = TextTokenizer(tokenizer)
    text = "a</s><|user|>\n<s>b<|im_end|>"
    for opens in (True, False):
        ids = tokens.plain([(opens, text)])[opens, text].ids
        assert not set(ids) & {tokenizer.convert_tokens_to_ids(each) for each in SPECIAL[1:]}


def test_first_token_is_added_as_the_tokenizer_does(tokenizer):
    assert TextTokenizer(tokenizer).bos_id == tokenizer.bos_token_id
    assert TextTokenizer(tokenizer, add_bos=False).bos_id is None


def test_runs_of_white_space_keep_their_added_tokens():
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    bare.add_tokens(["    "])
    tokens = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>"))
    assert bare.token_to_id("    ") in tokens.plain([(True, "a    b")])[True, "a    b"].ids


def test_tokenizer_that_cannot_keep_a_literal_apart_is_refused():
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "<|user|>": 1}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens(["<|user|>"])
    with pytest.raises(ConfigError, match=r"reads '<\|user\|>' as a special token even in the text of a user"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>"))


def test_slow_tokenizer_is_refused():
    class Slow:
        name_or_path = "org/model"

    with pytest.raises(ConfigError, match=r"org/model: Slow is not a fast tokenizer: save it with tokenizer.json"):
        TextTokenizer(Slow())


def test_template_that_needs_an_end_token_says_so():
    bare = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ConfigError, match="tokenizer's end token, and it has none"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")).control("<EOS>")


def test_first_token_that_does_not_exist_cannot_be_added():
    bare = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(ConfigError, match=r"has no first token \(bos_token\) to add"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>"), add_bos=True)
