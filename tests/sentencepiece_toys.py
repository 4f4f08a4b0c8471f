"""Small sentencepiece models of each kind, trained on a few sentences."""

import sentencepiece

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is in the picture? A red square, 3.14 of it.",
    "图片里有什么？一个红色的方块。上海人工智能实验室",
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型。",
    "def square(x):    return x ** 2  # a comment, 100,000 of them",
    "one two three four five six seven eight nine ten eleven twelve",
    "A picture of a dog and a cat, and another picture of a cat.",
]
SETTINGS = {
    "llama": {"model_type": "bpe", "add_dummy_prefix": True, "remove_extra_whitespaces": False},  # InternLM2's kind
    "no_prefix": {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "trimmed": {"model_type": "bpe", "remove_extra_whitespaces": True},
    "defined": {"model_type": "bpe", "remove_extra_whitespaces": False, "user_defined_symbols": ["<sep>", "dog", "  "]},
    "no_bytes": {"model_type": "bpe", "byte_fallback": False, "remove_extra_whitespaces": False},
}


def train(folder, settings):
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "character_coverage": 1.0} | settings
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=520 if settings.get("byte_fallback", True) else 264,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
