#!/usr/bin/env bash
# transformers 5.23.0: decode(skip_special_tokens=True) skips tokens that all_special_ids does not list.
#
# Expected: all_special_ids are the ids that skip_special_tokens=True skips, so filtering by one or the other is the same.
# Seen: an added token that is marked special (as InternVL's <box>, <ref> are) is skipped by decode, but stands neither
# in all_special_ids nor in all_special_tokens. Answers with boxes lose their marks; code that counts special tokens
# through the list misses them.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'transformers==5.23.0' 'tokenizers==0.23.3'
"$work/venv/bin/python" - <<'P'
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

bare = Tokenizer(models.WordLevel({"<unk>": 0, "here": 1, "</s>": 2}, unk_token="<unk>"))
bare.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="</s>")
tokenizer.add_tokens([AddedToken("<box>", special=True, normalized=False)], special_tokens=True)
ids = tokenizer("<box>here</s>", add_special_tokens=False)["input_ids"]
box = tokenizer.convert_tokens_to_ids("<box>")
seen = tokenizer.decode(ids, skip_special_tokens=True)
print("transformers", transformers.__version__, "| ids", ids, "| listed as special", tokenizer.all_special_ids, "| decoded", repr(seen))
assert box in ids and box not in tokenizer.all_special_ids, "behaviour changed: it is listed"
assert seen.strip() == "here", "behaviour changed: it is kept"
P
