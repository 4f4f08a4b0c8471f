#!/usr/bin/env bash
# lightning 2.6.6 with deepspeed 0.19.8: gradients of accumulated batches are divided by their number twice.
#
# Expected: accumulate_grad_batches=4 averages the gradients of four batches, under every strategy.
# Seen: Lightning divides the loss by 4, and hands 4 to DeepSpeed as gradient_accumulation_steps, whose backward divides by it
# again. Adam hides it without clipping; SGD moves a fourth as far, and a clipping norm means four times as much.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
DS_BUILD_OPS=0 "$work/venv/bin/pip" install --quiet 'torch==2.14.1' 'lightning==2.6.6' 'deepspeed==0.19.8'
export DS_ACCELERATOR=cpu DS_BUILD_OPS=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29641 RANK=0 WORLD_SIZE=1 LOCAL_RANK=0
"$work/venv/bin/python" - <<'P'
import deepspeed
import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # nothing is compiled


class OnCpu(DeepSpeedStrategy):
    """Lightning starts DeepSpeed on CUDA alone; DeepSpeed itself runs on a CPU."""

    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Line(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, number):
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def moved(strategy):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=1, accumulate_grad_batches=4, **quiet
    )
    model = Line()
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(4), batch_size=1))
    return model.weight.item()


settings = {
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": 1,
}
alone, beside = moved("auto"), moved(OnCpu(config=settings, process_group_backend="gloo"))
versions = f"lightning {lightning.__version__} deepspeed {deepspeed.__version__}"
print(f"{versions} | the mean of four gradients of 1, rate 1: alone {alone}, under DeepSpeed {beside}")
assert (alone, beside) == (-1.0, -0.25), "behaviour changed"
P
