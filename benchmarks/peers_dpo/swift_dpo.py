"""ms-swift's DPO: the same as `swift rlhf --rlhf_type dpo`. Run by benchmarks/pairs_speed.py."""

import json

import hook

hook.watch()

from swift.pipelines import rlhf_main  # noqa: E402

asked = hook.arguments()
rows = [
    {
        "messages": [
            {"role": "user", "content": row["question"].replace("<image>\n", "<image>")},  # its template adds the line
            {"role": "assistant", "content": row["chosen"]},
        ],
        "rejected_response": row["rejected"],
        "images": [row["image"]],
    }
    for row in hook.pairs()
]
source = hook.OUT / "swift_pairs.jsonl"
source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
settings = {
    "rlhf_type": "dpo", "beta": 0.1, "loss_type": "sigmoid", "model": hook.MODEL, "model_type": "internvl",
    "template": "internvl_hf", "dataset": source, "fp16": "false",
    "torch_dtype": "bfloat16" if asked.dtype == "bf16" else "float32", "bf16": str(asked.dtype == "bf16").lower(),
    "per_device_train_batch_size": asked.bs, "gradient_accumulation_steps": 1, "max_steps": asked.steps,
    "learning_rate": "1e-5", "lr_scheduler_type": "constant", "warmup_ratio": 0, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "output_dir": hook.OUT / "swift_dpo", "dataset_shuffle": "false",
    "train_dataloader_shuffle": "false", "use_cpu": "true", "gradient_checkpointing": "false", "attn_impl": "sdpa",
    "split_dataset_ratio": 0, "max_length": 4096, "dataloader_num_workers": 0, "dataset_num_proc": 1, "seed": 42,
    "use_hf": "true", "check_model": "false", "load_from_cache_file": "false", "eval_strategy": "no", "system": "",
    "tuner_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0, "target_modules": "all-linear",
    "freeze_vit": "true", "freeze_aligner": "true", "modules_to_save": "multi_modal_projector",
}  # fmt: skip
rlhf_main([part for key, value in settings.items() for part in (f"--{key}", str(value))])
