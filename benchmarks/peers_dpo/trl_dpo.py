"""TRL's DPOTrainer on transformers' InternVL, with peft. COMMAND: see benchmarks/pairs_speed.py, which runs this."""

import hook

hook.watch()

import torch  # noqa: E402
from datasets import Dataset, Sequence  # noqa: E402
from datasets import Image as DatasetImage  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
asked = hook.arguments()
is_bf16 = asked.dtype == "bf16"
rows = Dataset.from_list(
    [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": row["question"].removeprefix("<image>\n")}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in hook.pairs()
    ]
).cast_column("images", Sequence(DatasetImage()))
config = DPOConfig(
    output_dir=str(hook.OUT / "trl_dpo"), per_device_train_batch_size=asked.bs, max_steps=asked.steps,
    learning_rate=1e-5, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no", report_to=[],
    use_cpu=True, bf16=is_bf16, gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=None,
    beta=0.1, loss_type=["sigmoid"], seed=42,
)  # fmt: skip
DPOTrainer(
    model=AutoModelForImageTextToText.from_pretrained(hook.MODEL, dtype=torch.bfloat16 if is_bf16 else torch.float32),
    args=config,
    train_dataset=rows,
    processing_class=AutoProcessor.from_pretrained(hook.MODEL),
    peft_config=LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=LINEAR,
        modules_to_save=["multi_modal_projector"],
    ),
).train()  # fmt: skip
