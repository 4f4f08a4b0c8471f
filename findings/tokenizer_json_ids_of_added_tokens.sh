#!/usr/bin/env bash
# tokenizers 0.23.3: the "id" of an added token in tokenizer.json is not obeyed.
#
# Expected: added_tokens entries carry "id", so leaving one of them out of the file leaves the others at their ids,
# or the file is refused.
# Seen: tokens that the model's vocabulary lacks are numbered anew in the order of the list, without an error. Taking
# <a> (id 3) out of the list gives its id to <b>; whoever edits the file by hand moves every token behind the cut.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'tokenizers==0.23.3'
"$work/venv/bin/python" - <<'P'
import json
import tokenizers
from tokenizers import Tokenizer, models

made = Tokenizer(models.WordLevel({"<unk>": 0, "x": 1, "y": 2}, unk_token="<unk>"))
made.add_special_tokens(["<a>", "<b>", "<c>"])
spec = json.loads(made.to_str())
assert [(each["content"], each["id"]) for each in spec["added_tokens"]] == [("<a>", 3), ("<b>", 4), ("<c>", 5)]
spec["added_tokens"] = spec["added_tokens"][1:]
cut = Tokenizer.from_str(json.dumps(spec))
seen = {name: cut.token_to_id(name) for name in ("<b>", "<c>")}
print("tokenizers", tokenizers.__version__, "| the file says <b>=4, <c>=5 | loaded:", seen)
assert seen == {"<b>": 3, "<c>": 4}, "behaviour changed"
P
