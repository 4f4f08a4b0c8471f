"""The line that works, for what people write out of habit: flags, bare words, and the keys of other trainers."""

from vlm_tune.config.usage import PROGRAM, USAGE

LR = "stage.lr.llm=VALUE (and stage.lr.projector, stage.lr.vision: each part has its own)"
OWN_NAMES = {  # names of other trainers' settings -> ours; dashes are read as underscores, case does not matter
    "lr": LR,
    "learning_rate": LR,
    "projector_lr": "stage.lr.projector=VALUE",
    "mm_projector_lr": "stage.lr.projector=VALUE",
    "batch_size": "trainer.global_batch=VALUE",
    "train_batch_size": "trainer.global_batch=VALUE",
    "global_batch_size": "trainer.global_batch=VALUE",
    "per_device_train_batch_size": "trainer.micro_batch=VALUE (trainer.global_batch is that of a whole step)",
    "micro_batch_size": "trainer.micro_batch=VALUE",
    "gradient_accumulation_steps": "trainer.global_batch=VALUE, the batch of a whole step (accumulation follows)",
    "epochs": "stage.epochs=VALUE",
    "num_epochs": "stage.epochs=VALUE",
    "num_train_epochs": "stage.epochs=VALUE",
    "steps": "stage.max_steps=VALUE",
    "max_steps": "stage.max_steps=VALUE",
    "warmup_ratio": "stage.warmup=VALUE, a share of the steps",
    "warmup_steps": "stage.warmup=SHARE, a share of the steps",
    "weight_decay": "stage.weight_decay=VALUE",
    "max_grad_norm": "stage.clip=VALUE",
    "lr_scheduler_type": "nothing: the schedule is a cosine; stage.min_lr=SHARE is what it leaves",
    "optim": "stage.optimizer=VALUE",
    "optimizer": "stage.optimizer=VALUE",
    "lora": "stage=finetune, which trains adapters",
    "use_lora": "stage=finetune, which trains adapters",
    "lora_r": "stage.lora.rank=VALUE",
    "lora_rank": "stage.lora.rank=VALUE",
    "lora_alpha": "stage.lora.alpha=VALUE",
    "lora_dropout": "stage.lora.dropout=VALUE",
    "lora_target": "model.llm.targets=[q_proj,v_proj]",
    "lora_target_modules": "model.llm.targets=[q_proj,v_proj]",
    "target_modules": "model.llm.targets=[q_proj,v_proj]",
    "use_dora": "stage.lora.dora=true",
    "freeze_vit": "stage.train.vision=frozen",
    "freeze_vision_tower": "stage.train.vision=frozen",
    "freeze_llm": "stage.train.llm=frozen",
    "load_in_4bit": "stage=qlora",
    "load_in_8bit": "stage.quantize=int8",
    "quantization_bit": "stage.quantize=nf4",
    "bits": "stage.quantize=nf4",
    "bf16": "trainer.precision=bf16",
    "fp16": "trainer.precision=fp16",
    "precision": "trainer.precision=VALUE",
    "model_name": "model=NAME, or model.path=FOLDER",
    "model_path": "model.path=VALUE",
    "model_name_or_path": "model.path=VALUE",
    "pretrained_model_name_or_path": "model.path=VALUE",
    "model_id": "model.path=VALUE",
    "vision_tower": "model.vision.path=VALUE",
    "template": "model.template=VALUE",
    "dataset": "data.path=VALUE",
    "dataset_path": "data.path=VALUE",
    "dataset_name": "data.path=VALUE",
    "train_file": "data.path=VALUE",
    "data_path": "data.path=VALUE",
    "meta_path": "data.path=VALUE",
    "file": "data.path=VALUE",
    "val_file": "data.val=VALUE",
    "validation_file": "data.val=VALUE",
    "eval_dataset": "data.val=VALUE",
    "val_dataset": "data.val=VALUE",
    "test_file": "data.test=VALUE",
    "image_folder": "data.image.root=VALUE",
    "image_root": "data.image.root=VALUE",
    "media_dir": "data.image.root=VALUE",
    "max_length": "data.max_length=VALUE",
    "max_seq_length": "data.max_length=VALUE",
    "model_max_length": "data.max_length=VALUE",
    "cutoff_len": "data.max_length=VALUE",
    "max_dynamic_patch": "model.tiles.max=VALUE",
    "max_tiles": "model.tiles.max=VALUE",
    "num_workers": "data.workers=VALUE",
    "dataloader_num_workers": "data.workers=VALUE",
    "packing": "stage.packing=VALUE",
    "gradient_checkpointing": "stage.gradient_checkpointing.llm=true",
    "neftune_noise_alpha": "stage.neftune=VALUE",
    "output_dir": "runs=VALUE, the folder of the run folders",
    "save_dir": "runs=VALUE, the folder of the run folders",
    "save_steps": "trainer.save_every=VALUE",
    "eval_steps": "trainer.val_every=VALUE",
    "logging_steps": "trainer.log_every=VALUE",
    "save_total_limit": "trainer.keep=VALUE",
    "report_to": "logger=wandb (or csv)",
    "wandb": "logger=wandb",
    "resume_from_checkpoint": "resume=last (or a run folder)",
    "checkpoint": "stage.init_from=VALUE to start from it, resume=VALUE to go on with it",
    "ckpt": "stage.init_from=VALUE to start from it, resume=VALUE to go on with it",
    "gpus": "trainer.devices=VALUE",
    "num_gpus": "trainer.devices=VALUE",
    "devices": "trainer.devices=VALUE",
    "device": "trainer.accelerator=VALUE (cpu or gpu)",
    "deepspeed": "strategy=zero2",
    "fsdp": "strategy=fsdp",
}
CHOICES: dict[str, dict[str, str | None]] = {  # what a group has no choice for -> what does it
    "stage": {
        "lora": "stage=finetune, which trains adapters",
        "full": "stage=finetune_full",
        "pt": "stage=pretrain",
        "train": "stage=finetune",
        "finetuning": "stage=finetune",
        "instruct": "stage=finetune",
        "dpo": None,
        "rlhf": None,
        "grpo": None,
    }
}
FLAG_VALUES = {"resume": "last"}  # a flag of its own, without a value
PICTURE_ENDINGS = (  # by which a name is known as a picture's, where only the name is looked at
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"),
    *(".avif", ".heic", ".heif", ".jxl"),
)


def our_name(key: str, value: str = "") -> str | None:
    """Name our line for another trainer's key; None where it is none of the table."""
    line = OWN_NAMES.get(key.lstrip("-+~").replace("-", "_").lower().rpartition(".")[2])
    return line and (line.replace("VALUE", value) if value else line)


def choice_hint(group: str, choice: str) -> str | None:
    """Say what does the work of a choice that a group does not have."""
    if choice.endswith((".jsonl", ".json", ".parquet", ".csv", ".tar")):
        return f"a file of rows is named so: data.path={choice}"
    if group == "model" and "/" in choice:
        return f"a model's folder or hub id is named so: model.path={choice}"
    known = CHOICES.get(group, {})
    if choice not in known:
        return None
    return f"write {known[choice]}" if known[choice] else "only pretraining and supervised fine-tuning are done"


def flag_hint(verb: str, flag: str, following: str, known: dict[str, str]) -> str:
    """Turn `--key value` into the line that works; `known` maps the names that may stand alone to whole keys."""
    key, sign, value = flag.lstrip("-").replace("-", "_").partition("=")
    if not sign:
        is_value = following and "=" not in following and not following.startswith("-")
        value = following if is_value else FLAG_VALUES.get(key, "VALUE")
    own = USAGE[verb].keys
    line = f"{known[key]}={value}" if key in known else f"{key}={value}" if key in own or "." in key else None
    line = line or our_name(key, value)
    return f"{flag}: keys are written without dashes. " + (f"Write {line}" if line else f"See `{PROGRAM} help {verb}`")


def bare_hint(verb: str, word: str, groups: dict[str, list[str]]) -> str:
    """Say which key a word without `=` was meant for: a choice of a group, a picture, or the verb's own key."""
    meant = [f"{group}={word}" for group, choices in groups.items() if word in choices]
    if meant and verb in ("train", "check", "cache", "inspect"):
        return f"Write {' or '.join(meant)}"
    if verb == "chat" and word.lower().endswith(PICTURE_ENDINGS):
        return f"Write image={word}"
    return f"Write {USAGE[verb].bare}={word}" if USAGE[verb].bare else f"See `{PROGRAM} help {verb}`"
