"""LLaMA-Factory's DPO: what `llamafactory-cli train` does with this configuration. Run by benchmarks/pairs_speed.py."""

import json

import hook

hook.watch()

from llamafactory.train.tuner import run_exp  # noqa: E402

asked = hook.arguments()
rows = [
    {
        "conversations": [{"from": "human", "value": row["question"]}],
        "chosen": {"from": "gpt", "value": row["chosen"]},
        "rejected": {"from": "gpt", "value": row["rejected"]},
        "images": [row["image"]],
    }
    for row in hook.pairs()
]
columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
known = {
    "pairs": {"file_name": "llamafactory_pairs.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
}
(hook.OUT / "llamafactory_pairs.json").write_text(json.dumps(rows), encoding="utf-8")
(hook.OUT / "dataset_info.json").write_text(json.dumps(known), encoding="utf-8")
run_exp(
    {
        "model_name_or_path": hook.MODEL, "stage": "dpo", "do_train": True, "pref_beta": 0.1, "pref_loss": "sigmoid",
        "dataset": "pairs", "dataset_dir": str(hook.OUT), "template": "intern_vl", "default_system": "",
        "cutoff_len": 4096, "overwrite_cache": True, "preprocessing_num_workers": 1, "dataloader_num_workers": 0,
        "output_dir": str(hook.OUT / "llamafactory_dpo"), "overwrite_output_dir": True, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "per_device_train_batch_size": asked.bs, "max_steps": asked.steps,
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "use_cpu": True,
        "bf16": asked.dtype == "bf16", "infer_dtype": "auto" if asked.dtype == "bf16" else "float32",
        "disable_shuffling": True, "disable_gradient_checkpointing": True, "flash_attn": "sdpa",
        "image_max_pixels": 16777216, "video_max_pixels": 16384, "seed": 42, "finetuning_type": "lora",
        "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all", "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True, "additional_target": "multi_modal_projector",
    }
)  # fmt: skip
