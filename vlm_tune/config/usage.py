"""What the verbs of the command line are called with: their own keys, an example, and the text of `help`."""

from dataclasses import dataclass, field

PROGRAM = "python -m vlm_tune"
RUN_KEYS = "a run's keys with a dot (data.test=FILE) lie over its configuration"
ALL_KEYS = "all keys of a run: docs/configuration.md"


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, an example, its own keys, and which key a word without `=` was meant for."""

    does: str
    example: str
    bare: str  # `check my.jsonl` means data.path=my.jsonl
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (default, meaning)
    more: str = ALL_KEYS

    @property
    def defaults(self) -> dict[str, str]:
        """The verb's own keys with their defaults."""
        return {key: default for key, (default, _) in self.keys.items()}


CKPT = ("runs/latest", "run folder or checkpoint")
MODEL = ("", "settings of a model that no run made: a name of `configs list`")
USAGE = {
    "train": Verb(
        "(default) run a stage",
        "stage=finetune model=internvl2_2b data.path=my.jsonl",
        "data.path",
        more=f"-m before the keys tries all values that they list (-m stage.lora.rank=8,16); {ALL_KEYS}",
    ),
    "chat": Verb(
        "talk to a trained model",
        "ckpt=runs/latest image=photo.jpg",
        "ckpt",
        {
            "ckpt": CKPT,
            "image": ("", "pictures of the first question: photo.jpg,other.jpg"),
            "tools": ("", "that the model may call: calculator,clock,search:FOLDER"),
            "base": ("false", "true talks to the model before its training"),
            "temperature": ("0", "above 0 draws each token by chance"),
            "top_p": ("1", "share of the likeliest tokens that is drawn from"),
            "seed": ("", "number that makes drawn answers repeatable"),
        },
        f"{RUN_KEYS}; stage.quantize=nf4 packs the language model into 4 bits",
    ),
    "web": Verb(
        "a page to talk to it",
        "ckpt=runs/latest ckpt2=base",
        "ckpt",
        {
            "ckpt": CKPT,
            "ckpt2": ("", "another run beside it, or base: the model before its training"),
            "port": ("7860", "where the page is served on this machine"),
            "auth": ("", "USER:PASSWORD that the page asks for"),
        },
        RUN_KEYS,
    ),
    "server": Verb(
        "OpenAI's chat API",
        "ckpt=runs/latest port=8000",
        "ckpt",
        {
            "ckpt": CKPT,
            "port": ("8000", "where it answers on this machine"),
            "token": ("", "that each request must bring as its api_key"),
        },
        RUN_KEYS,
    ),
    "evaluate": Verb(
        "score a test file",
        "ckpt=runs/latest data.test=test.jsonl",
        "ckpt",
        {
            "ckpt": ("runs/latest", "run, checkpoint, model folder or hub id; several side by side: ONE,OTHER"),
            "model": MODEL,
            "metric": ("auto", "exact, vqa, choice, likelihood, anls, iou, caption, perplexity; auto: exact, or boxes"),
            "by": ("task", "field of the rows that the scores are listed by"),
            "max_new_tokens": ("auto", "longest answer; auto: as the expected ones need"),
            "out": ("", "new file for the answers; left out: predictions.jsonl of the run"),
            "page": ("", "new .html file for the worst answers with their pictures"),
        },
        RUN_KEYS,
    ),
    "answer": Verb(
        "answer many questions",
        "ckpt=runs/latest data.path=asked.jsonl out=answers.jsonl",
        "data.path",
        {
            "ckpt": ("runs/latest", "run, checkpoint, model folder or hub id"),
            "model": MODEL,
            "out": ("", "file for the answers; those that it holds already are kept"),
            "question": ("", "asked about each picture of a folder, data.path=FOLDER"),
            "max_new_tokens": ("256", "longest answer"),
        },
        "data.path=FILE: rows of questions, or a folder of pictures; other keys of a run lie over its configuration",
    ),
    "export": Verb(
        "write a merged model folder",
        "ckpt=runs/latest out=my_model layout=hf dtype=bf16",
        "ckpt",
        {
            "ckpt": CKPT,
            "out": ("", "new folder for the model"),
            "layout": ("auto", "hf, official, llava_hf, parts, gguf, adapter or adapter_and_base"),
            "dtype": ("fp32", "fp32, bf16 or fp16; of gguf f32, f16 or q8_0"),
            "base": ("trained", "of a quantized run: trained or original"),
            "max_shard_size": ("2GB", "largest file of weights"),
        },
        RUN_KEYS,
    ),
    "merge": Verb(
        "fold a peft adapter into it",
        "base=FOLDER adapter=FOLDER out=my_model",
        "adapter",
        {"base": ("", "model folder"), "adapter": ("", "folder of peft"), "out": ("", "new folder for the model")},
        "it reads no run, so these are all",
    ),
    "check": Verb(
        "find every fault in a file",
        "data.path=my.jsonl model=internvl2_2b out=FOLDER",
        "data.path",
        {"out": ("", "new folder for the report"), "repeated_ids": ("error", "error or allow")},
    ),
    "cache": Verb("encode all pictures ahead", "data.path=my.jsonl model=internvl2_2b", "data.path"),
    "inspect": Verb(
        "see a row as the model does",
        "data.path=my.jsonl row=17 out=row.html (or --text)",
        "data.path",
        {"row": ("0", "number of a row, from 0"), "out": ("", "new .html file")},
    ),
    "plan": Verb(
        "memory and time of a run",
        "stage=finetune model=internvl2_8b gpu=24GB",
        "data.path",
        {
            "gpu": ("", "memory of the card (24GB), or its name (a100); left out: this machine"),
            "gpus": ("", "number of devices: the same as trainer.devices"),
            "fit": ("false", "true prints only the settings that make the run fit"),
        },
    ),
    "watch": Verb(
        "a live page of runs",
        "runs/latest",
        "",
        {"port": ("8222", "where the page is served on this machine"), "runs": ("runs", "folder of the newest runs")},
        "names of runs; left out: the newest ones, also those that start later",
    ),
    "compare": Verb(
        "runs side by side",
        "runs/ONE runs/OTHER out=compared.html",
        "",
        {"out": ("", "new .html file for their curves and answers")},
        "names of two runs or more",
    ),
    "configs": Verb(
        "list, show, copy settings",
        "show model/internvl2_2b",
        "",
        more="list: the choices of each group; show NAME: one, as written; copy NAME [NEW]: one of your own in conf/",
    ),
}


def usage() -> str:
    """List all verbs."""
    lines = [f"  {name:10} {verb.does:27} {verb.example}".rstrip() for name, verb in USAGE.items()]
    return (
        f"{PROGRAM} [VERB] key=value ...\n\n"
        + "\n".join(lines)
        + f"\n\n{PROGRAM} help VERB shows its keys. All keys of a run with their defaults: docs/configuration.md.\n"
        "VLM_TUNE_DEBUG=1 shows the traceback of an error; VLM_TUNE_QUIET=1 leaves out colours and progress.\n"
    )


def usage_of(name: str) -> str:
    """Show one verb: an example, its own keys with their defaults, and what else it takes."""
    verb = USAGE[name]
    shown = f"{name}  {verb.does}\n\n  {PROGRAM} {name} {verb.example}".rstrip() + "\n\n"
    for key, (default, meaning) in verb.keys.items():
        shown += f"  {key:15} {meaning}" + (f" (default {default})\n" if default else "\n")
    return f"{shown}  {verb.more}\n"
