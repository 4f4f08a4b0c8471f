"""Hints with the correct line for what people write out of habit: flags, bare words, other trainers' keys."""

from vlm_tune.config.usage import PROGRAM, USAGE

LR = "stage.lr.llm=VALUE (and stage.lr.projector, stage.lr.vision: each part has its own)"
OURS = {  # our line -> what other trainers call it; dashes are read as underscores, case does not matter
    LR: "lr learning_rate",
    "stage.lr.projector=VALUE": "projector_lr mm_projector_lr",
    "trainer.global_batch=VALUE": "batch_size train_batch_size global_batch_size",
    "trainer.micro_batch=VALUE (trainer.global_batch is that of a whole step)": "per_device_train_batch_size",
    "trainer.micro_batch=VALUE": "micro_batch_size",
    "trainer.global_batch=VALUE, the batch of a whole step (accumulation follows)": "gradient_accumulation_steps",
    "stage.epochs=VALUE": "epochs num_epochs num_train_epochs",
    "stage.max_steps=VALUE": "steps max_steps",
    "stage.warmup=VALUE, a share of the steps": "warmup_ratio",
    "stage.warmup=SHARE, a share of the steps": "warmup_steps",
    "stage.weight_decay=VALUE": "weight_decay",
    "stage.beta2=VALUE": "adam_beta2",
    "stage.clip=VALUE": "max_grad_norm",
    "nothing: the schedule is a cosine; stage.min_lr=SHARE is what it leaves": "lr_scheduler_type",
    "stage.optimizer=VALUE": "optim optimizer",
    "stage=finetune, which trains adapters": "lora use_lora",
    "stage.lora.rank=VALUE": "lora_r lora_rank",
    "stage.lora.alpha=VALUE": "lora_alpha",
    "stage.lora.dropout=VALUE": "lora_dropout",
    "model.llm.targets=[q_proj,v_proj]": "lora_target lora_target_modules target_modules",
    "stage.lora.dora=true": "use_dora",
    "stage.train.vision=frozen": "freeze_vit freeze_vision_tower",
    "stage.train.llm=frozen": "freeze_llm",
    "stage=qlora": "load_in_4bit",
    "stage.quantize=int8": "load_in_8bit",
    "stage.quantize=nf4": "quantization_bit bits",
    "trainer.precision=bf16": "bf16",
    "trainer.precision=fp16": "fp16",
    "trainer.precision=VALUE": "precision",
    "model=NAME, or model.path=FOLDER": "model_name",
    "model.path=VALUE": "model_path model_name_or_path pretrained_model_name_or_path model_id",
    "model.vision.path=VALUE": "vision_tower",
    "model.template=VALUE": "template",
    "data.path=VALUE": "dataset dataset_path dataset_name train_file data_path meta_path file",
    "data.val=VALUE": "val_file validation_file eval_dataset val_dataset",
    "data.test=VALUE": "test_file",
    "data.image.root=VALUE": "image_folder image_root media_dir",
    "data.max_length=VALUE": "max_length max_seq_length model_max_length cutoff_len",
    "model.tiles.max=VALUE": "max_dynamic_patch max_tiles",
    "data.workers=VALUE": "num_workers dataloader_num_workers",
    "stage.packing=VALUE": "packing",
    "stage.gradient_checkpointing.llm=true": "gradient_checkpointing",
    "stage.gradient_checkpointing.llm=offload": "activation_offloading",
    "stage.gradient_checkpointing.llm=mlp": "tiled_mlp",
    "stage.neftune=VALUE": "neftune_noise_alpha",
    "runs=VALUE, the folder of the run folders": "output_dir save_dir",
    "trainer.save_every=VALUE": "save_steps",
    "trainer.val_every=VALUE": "eval_steps",
    "trainer.log_every=VALUE": "logging_steps",
    "trainer.keep=VALUE": "save_total_limit",
    "logger=wandb (or csv)": "report_to",
    "logger=wandb": "wandb",
    "resume=last (or a run folder)": "resume_from_checkpoint",
    "stage.init_from=VALUE to start from it, resume=VALUE to go on with it": "checkpoint ckpt",
    "trainer.devices=VALUE": "gpus num_gpus devices",
    "trainer.accelerator=VALUE (cpu or gpu)": "device",
    "trainer.sequence_parallel=VALUE": "sequence_parallel_size sp_size ulysses_size",
    "strategy=zero2": "deepspeed",
    "strategy=fsdp": "fsdp",
}
OWN_NAMES = {name: line for line, names in OURS.items() for name in names.split()}
CHOICES: dict[str, dict[str, str | None]] = {  # a choice that a group does not have -> what does the same
    "stage": {
        "lora": "stage=finetune, which trains adapters",
        "full": "stage=finetune_full",
        "pt": "stage=pretrain",
        "train": "stage=finetune",
        "finetuning": "stage=finetune",
        "instruct": "stage=finetune",
        "rlhf": None,
        "grpo": None,
    }
}
NOT_DONE = "only pretraining, supervised fine-tuning and preference tuning (stage=dpo, stage=mpo) are done"
FLAG_VALUES = {"resume": "last"}  # a flag of its own, without a value
PICTURE_ENDINGS = (  # that mark a name as a picture's, where only the name is checked
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"),
    *(".avif", ".heic", ".heif", ".jxl"),
)


def our_name(key: str, value: str = "") -> str | None:
    """Return our line for another trainer's key; None for a key that is not in the table."""
    line = OWN_NAMES.get(key.lstrip("-+~").replace("-", "_").lower().rpartition(".")[2])
    return line and (line.replace("VALUE", value) if value else line)


def choice_hint(group: str, choice: str) -> str | None:
    """Return what does the same as a choice that a group does not have."""
    if choice.endswith((".jsonl", ".json", ".parquet", ".csv", ".tar")):
        return f"a file of rows is named so: data.path={choice}"
    if group == "model" and "/" in choice:
        return f"a model's folder or hub id is named so: model.path={choice}"
    known = CHOICES.get(group, {})
    if choice not in known:
        return None
    return f"write {known[choice]}" if known[choice] else NOT_DONE


def flag_hint(verb: str, flag: str, following: str, known: dict[str, str]) -> str:
    """Turn `--key value` into the correct line; `known` maps the short names that are allowed to full keys."""
    key, sign, value = flag.lstrip("-").replace("-", "_").partition("=")
    if not sign:
        is_value = following and "=" not in following and not following.startswith("-")
        value = following if is_value else FLAG_VALUES.get(key, "VALUE")
    own = USAGE[verb].keys
    line = f"{known[key]}={value}" if key in known else f"{key}={value}" if key in own or "." in key else None
    line = line or our_name(key, value)
    return f"{flag}: keys are written without dashes. " + (f"Write {line}" if line else f"See `{PROGRAM} help {verb}`")


def bare_hint(verb: str, word: str, groups: dict[str, list[str]]) -> str:
    """Return which key a word without `=` was meant for: a choice of a group, a picture, or the verb's own key."""
    meant = [f"{group}={word}" for group, choices in groups.items() if word in choices]
    if meant and verb in ("train", "check", "cache", "inspect"):
        return f"Write {' or '.join(meant)}"
    if verb == "chat" and word.lower().endswith(PICTURE_ENDINGS):
        return f"Write image={word}"
    return f"Write {USAGE[verb].bare}={word}" if USAGE[verb].bare else f"See `{PROGRAM} help {verb}`"
