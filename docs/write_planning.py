"""Write the table of docs/planning.md: predicted peaks of InternVL2 models, from the code that `plan` runs.

COMMAND: python docs/write_planning.py
"""

import sys
from pathlib import Path

from vlm_tune.config.parse import load_config
from vlm_tune.planning.plan import open_run
from vlm_tune.planning.seconds import find_gpu
from vlm_tune.planning.show import total_gib

PAGE = Path(__file__).with_name("planning.md")
START, END = "<!-- TABLE -->", "<!-- /TABLE -->"
MODELS = {"InternVL2-2B": "internvl2_2b", "InternVL2-8B": "internvl2_8b", "InternVL2-26B": "internvl2_26b"}
STAGES = {
    "LoRA": ["stage=finetune"],
    "QLoRA": ["stage=qlora"],
    "full": ["stage=finetune_full", "stage.optimizer=adamw8bit"],
}
RECOMPUTED = ["stage.gradient_checkpointing.llm=true"]
CARDS = (8, 16, 24, 40, 80)


def predicted(arguments: list[str]) -> float:
    """Count the GiB of a run on one card."""
    with open_run(load_config(arguments), on_gpu=True) as run:
        return total_gib(run.needs(), find_gpu("80GB"))


def table() -> str:
    """Write one line for each model and way of training."""
    heads = ["model", "training", "predicted GiB", "recomputed", *(f"{size} GB" for size in CARDS)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for model, name in MODELS.items():
        for how, arguments in STAGES.items():
            plain, small = (predicted([f"model={name}", *arguments, *more]) for more in ([], RECOMPUTED))
            marks = ["yes" if plain <= size else "recomputed" if small <= size else "-" for size in CARDS]
            lines.append(f"| {' | '.join([model, how, f'{plain:.1f}', f'{small:.1f}', *marks])} |")
            sys.stdout.write(f"{lines[-1]}\n")
    return "\n".join(lines)


def main() -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
