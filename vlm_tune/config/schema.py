"""Every setting of a run, as dataclasses. Hydra composes the YAML, `parse` checks it, the code sees only these."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Train(Enum):
    """How a part is trained."""

    frozen = "frozen"
    lora = "lora"
    full = "full"


VISION_LAYERS = ["q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"]
LLM_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TileRule(Enum):
    """How a picture is cut into tiles."""

    dynamic = "dynamic"  # InternVL: the grid of tiles whose aspect ratio is nearest, plus a thumbnail
    area = "area"  # the same, but a picture is never enlarged to more tiles than its area fills
    resize = "resize"  # one tile, stretched to the square
    pad = "pad"  # one tile, padded to a square with the mean colour (LLaVA 1.5)
    anyres = "anyres"  # LLaVA-NeXT: best-fit resolution, padded, plus a base tile


class BadSample(Enum):
    """What to do with a faulty row."""

    error = "error"
    skip = "skip"


class TooLong(Enum):
    """What to do with a row of more than `data.max_length` tokens."""

    error = "error"
    skip = "skip"
    fewer_tiles = "fewer_tiles"
    trim_text = "trim_text"


class FeatureCaching(Enum):
    """Whether a frozen encoder's features are kept on disk."""

    auto = "auto"  # when they fit and pictures are not changed at random
    on = "on"
    off = "off"


class LossWeight(Enum):
    """Weight of one supervised token in a sample with x of them: 1, 1/x or 1/sqrt(x)."""

    token = "token"
    sample = "sample"
    square = "square"


class SharePrefix(Enum):
    """Whether rows of one picture share the tokens with which they begin; `auto` does so where nothing is random."""

    auto = "auto"
    on = "on"
    off = "off"


class Quantize(Enum):
    """Storage of the frozen base of the language model."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class Optimizer(Enum):
    """AdamW, and bitsandbytes' versions of it that keep less in GPU memory."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"  # both moments in 8 bit: a quarter of the memory
    paged_adamw32bit = "paged_adamw32bit"  # moments that move to main memory when the GPU is full
    paged_adamw8bit = "paged_adamw8bit"


class Precision(Enum):
    """Arithmetic of the forward and backward pass; trained weights are always kept in float32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass
class TilesConfig:
    """How pictures are cut."""

    size: int = 448  # pixels, side of a tile
    min: int = 1  # fewest tiles of a picture
    max: int = 12  # without the thumbnail; shared by the pictures of one sample
    thumbnail: bool = True  # one more tile that shows the whole picture, where there are several
    rule: TileRule = TileRule.dynamic  # how a picture's grid is chosen (docs/data_format.md)


@dataclass
class VisionConfig:
    """The vision encoder."""

    path: str | None = None  # folder, hub id or recipe:NAME; null = the part inside model.path
    select_layer: int = -1  # index into the hidden states (0 = embeddings); later layers are not run
    normalize: str = "imagenet"  # imagenet | clip (InternVL) | openai_clip (LLaVA) | siglip | half
    targets: list[str] = field(default_factory=VISION_LAYERS.copy)  # linear layers that LoRA adapts


@dataclass
class ProjectorConfig:
    """The network between encoder and language model."""

    kind: str = "mlp"  # mlp (LayerNorm, Linear, GELU, Linear) | mlp2x_gelu (LLaVA 1.5) | linear (LLaVA) | qformer
    shuffle: int = 2  # pixel shuffle: r x r patches become one token; 1 = none
    shuffle_version: str = "v2"  # v1 = transposed token order, as in the first InternVL 1.5
    bias: bool = True  # of the linear layers
    newline: bool = False  # a token at the end of each row of an any-resolution picture (LLaVA-NeXT)
    num_queries: int = 32  # of a Q-Former: tokens per tile
    qformer_layers: int = 12  # of a Q-Former
    qformer_width: int = 768  # a multiple of 64, the width of its heads


@dataclass
class LlmConfig:
    """The language model."""

    path: str | None = None  # folder, hub id or recipe:NAME; null = the part inside model.path
    targets: list[str] = field(default_factory=LLM_LAYERS.copy)  # linear layers that LoRA adapts


@dataclass
class ModelConfig:
    """Which weights, and how text and pictures reach them."""

    name: str = "demo"  # runs of the same name go on from one another; conf/model/NAME.yaml sets it
    path: str | None = None  # a whole checkpoint: folder or hub id; null = built from vision.path and llm.path
    template: str = "chatml"  # a name of data/text/templates.yaml
    system: str | None = None  # system prompt; null = the template's own
    markup: list[str] | None = None  # added tokens that texts may contain (<box>); null = all but control tokens
    tiles: TilesConfig = field(default_factory=TilesConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)


@dataclass
class ImageConfig:
    """Where pictures are, and their limits."""

    root: str | None = None  # folder of relative picture paths; null = the folder of the data file
    exif: bool = False  # turn photos upright as their EXIF data ask, as phones' need; InternVL and LLaVA do not
    alpha: str = "drop"  # transparency: drop = the hidden colours show (as in the references); white, black, "#RRGGBB"
    max_pixels: int = 100_000_000  # width times height of the largest picture that is read


@dataclass
class AugmentConfig:
    """Random changes of training pictures; all off by default."""

    flip: bool = False  # mirror half of the pictures, but those of rows with a <box>
    crop: float = 1.0  # smallest share of the sides that a random crop keeps (not of a row with a <box>); 1 = none
    jpeg: bool = False  # re-encode with a random JPEG quality of 75 to 100 (InternVL's data_augment)


@dataclass
class DataConfig:
    """The rows to train, validate and test on."""

    path: str = "???"  # file, folder, recipe:NAME/FILE, or the file of a mixture (docs/data_format.md)
    recipe: dict[str, str] = field(default_factory=dict)  # settings of the recipe in data.path: data.recipe.name=Ada
    val: str = "auto"  # file; auto = the file next to data.path with "train" read as "val", else a split; none
    val_share: float = 0.02  # of the rows, when data.val=auto finds no file
    test: str = "auto"  # file for `evaluate` and the sample answers; auto = test.jsonl next to data.path; none
    format: str = "auto"  # dialect of the rows; auto = recognised from the first row
    ignore_fields: list[str] = field(default_factory=list)  # fields of rows to ignore
    reasoning_loss: bool = True  # train on an answer's reasoning_content too; false = only show it
    on_bad_sample: BadSample = BadSample.error  # what becomes of a row that cannot be trained on
    on_too_long: TooLong = TooLong.error  # what becomes of a row longer than max_length
    max_length: int = 8192  # tokens of one sample, including image tokens
    image: ImageConfig = field(default_factory=ImageConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    feature_cache: FeatureCaching = FeatureCaching.auto  # a frozen encoder then runs once per picture
    feature_cache_gib: float = 10.0  # most that a run's cached features may take on disk
    workers: int = 2  # processes that read and cut pictures; 0 = the main process


@dataclass
class TrainParts:
    """How each part is trained."""

    vision: Train = Train.frozen  # the vision encoder
    projector: Train = Train.full  # the projector between both
    llm: Train = Train.frozen  # the language model


@dataclass
class LearningRates:
    """The peak learning rate of each part."""

    vision: float = 2e-6  # of the vision encoder, where it is trained
    projector: float = 1e-3  # of the projector
    llm: float = 2e-4  # of the language model's weights or adapters


@dataclass
class WeightDecays:
    """The weight decay of each part, where it differs from the stage's; null = stage.weight_decay."""

    vision: float | None = None  # of the vision encoder
    projector: float | None = None  # of the projector
    llm: float | None = None  # of the language model


@dataclass
class Checkpointing:
    """Recompute a part's layers in the backward pass instead of keeping their activations: less memory, more time."""

    vision: bool = False  # recompute its layers: less memory, more time
    projector: bool = False  # recompute it
    llm: bool | str = False  # false | mlp (its MLPs alone, in chunks of tokens) | true | offload (true, in main memory)


@dataclass
class LoraConfig:
    """peft's adapters."""

    rank: int = 16  # inner width of an adapter
    alpha: float = 32.0  # scale: an adapter counts alpha / rank times
    dropout: float = 0.05  # share of an adapter's inputs that are dropped while training
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    dora: bool = False  # learn lengths and directions of weights apart (DoRA)


@dataclass
class PreferenceConfig:
    """The weights of the losses of pairs of answers; all 0 = the rows are conversations."""

    sigmoid: float = 0.0  # of DPO's loss
    bco: float = 0.0  # of BCO's: each answer against the running mean of all rewards
    nll: float = 0.0  # of the chosen answer's mean loss of a token
    beta: float = 0.1  # a reward is this times the logarithm of how much likelier training made an answer
    label_smoothing: float = 0.0  # share of the pairs whose answers are taken to be the wrong way round, in DPO's loss

    @property
    def is_on(self) -> bool:
        """Whether the rows are pairs."""
        return any((self.sigmoid, self.bco, self.nll))


@dataclass
class StageConfig:
    """What a stage trains, and how."""

    name: str = "finetune"  # pretrain, finetune, ...: conf/stage/NAME.yaml sets it
    init_from: str = "auto"  # run folder or checkpoint to start from; auto = newest run of init_stage; none
    init_stage: str | None = None  # stage that `auto` looks for; null = start from the base weights
    train: TrainParts = field(default_factory=TrainParts)
    lr: LearningRates = field(default_factory=LearningRates)
    layer_decay: float = 1.0  # learning rate of a vision encoder layer, as a fraction of the next layer's
    optimizer: Optimizer = Optimizer.adamw  # bitsandbytes' keep less in GPU memory
    beta2: float = 0.999  # of AdamW's mean of squares; 0.98 forgets a new projector's first, large gradients sooner
    weight_decay: float = 0.0  # not on norms, biases and other vectors
    part_weight_decay: WeightDecays = field(default_factory=WeightDecays)
    warmup: float = 0.03  # share of the optimizer steps
    min_lr: float = 0.0  # fraction of the learning rate that remains at the end of the cosine
    clip: float = 1.0  # norm of the gradient; 0 = off
    epochs: float = 1.0  # passes over the rows, also parts of one
    max_steps: int = -1  # optimizer steps; -1 = from epochs
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantize: Quantize = Quantize.none  # the frozen language model is kept in 4 or 8 bits (QLoRA)
    gradient_checkpointing: Checkpointing = field(default_factory=Checkpointing)
    neftune: float = 0.0  # alpha of the noise on text embeddings while training (5, 10 or 15); 0 = off
    router_loss: float = 0.0  # weight of the loss that spreads tokens over experts (Qwen3: 0.001); 0 = off, as InternVL
    drop_path: float = 0.0  # probability of skipping the last layer of a trained vision encoder; lower for earlier ones
    loss: LossWeight = LossWeight.token  # weight of a token in a row of x trained ones: 1, 1/x or 1/sqrt(x)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    evaluate: bool = True  # score the test file before and after training
    packing: bool = True  # concatenate samples without padding; false = pad to the longest
    pack_length: int = 4096  # tokens of one pack
    pack_tiles: int = 48  # tiles of one pack
    share_prefix: SharePrefix = SharePrefix.off  # rows of one picture in one pack: their common tokens come once


@dataclass
class TrainerConfig:
    """Devices, batch sizes and intervals."""

    accelerator: str = "auto"  # auto, gpu or cpu
    devices: int = 1  # GPUs of a machine
    nodes: int = 1  # machines
    sequence_parallel: int = 1  # devices that share each pack, a stretch of its tokens each: packs can be longer
    precision: Precision = Precision.auto  # auto = bf16 where the hardware has it, else fp32 (older GPUs: fp16)
    global_batch: int = 16  # packs (samples when stage.packing=false) in one optimizer step, over all devices
    micro_batch: int = 1  # of these, in one forward pass on one device
    find_batch: bool = False  # divide a step into the largest packs that fit: pack_length, pack_tiles, global_batch
    log_every: int = 1  # optimizer steps
    val_every: int | None = None  # optimizer steps, and at the end; null = a fifth of the run, at most 200
    max_val_rows: int = 512  # rows of the validation file that are used
    patience: int | None = None  # validations without a lower loss, after which the run ends early; null = never
    save_every: int | None = None  # optimizer steps, and at the end; null = as val_every
    save_minutes: float | None = None  # also save after this many minutes
    max_bad_steps: int = 5  # consecutive steps skipped for a loss or gradient that is not finite, before the run stops
    keep: int = 2  # newest checkpoints kept, in addition to the best
    sharded_checkpoints: bool | None = None  # a folder of one file a process; null = above 16 GiB, of several processes
    chat_every: int | None = None  # steps between sample answers; 0 = only before and after; null = as val_every
    num_chats: int = 6  # fixed questions of the test file for the sample answers
    max_test_rows: int = 500  # scored before and after training

    @property
    def groups(self) -> int:
        """How many packs are computed at a time: one a device, or one a group of devices that share it."""
        return self.devices * self.nodes // max(1, self.sequence_parallel)


class Strategy(Enum):
    """How several devices share the work."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    zero3_offload = "zero3_offload"


@dataclass
class StrategyConfig:
    """How several devices share the work."""

    name: Strategy = Strategy.auto  # how several devices share the work (docs/scaling.md)


@dataclass
class LoggerConfig:
    """Where metrics go."""

    names: list[str] = field(default_factory=lambda: ["tensorboard"])  # besides metrics.csv, which every run writes


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0  # of all that is random: order, new weights, dropout, augmentation
    resume: str | None = None  # last, a run folder or a checkpoint
    resume_allow: list[str] = field(default_factory=list)  # keys that may differ from the interrupted run's
    runs: str = "runs"  # folder of the run folders


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted keys to values: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return flat
