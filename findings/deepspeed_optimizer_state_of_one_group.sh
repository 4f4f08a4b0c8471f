#!/usr/bin/env bash
# deepspeed 0.19.8: safe_get_full_optimizer_state knows the parameters of the first parameter group alone.
#
# Expected: after a step of ZeRO-1 it returns AdamW's moments of every parameter, whatever group that is in.
# Seen: of a parameter in the second group (another rate, no weight decay) it raises ValueError, "exp_avg not found in
# optimizer state fragment": the state is linked while the first group steps, when the others have none.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
DS_BUILD_OPS=0 "$work/venv/bin/pip" install --quiet 'torch==2.14.1' 'deepspeed==0.19.8'
export DS_ACCELERATOR=cpu DS_BUILD_OPS=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29642 RANK=0 WORLD_SIZE=1 LOCAL_RANK=0
"$work/venv/bin/python" - <<'P'
import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # nothing is compiled
model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
optimizer = torch.optim.AdamW([{"params": [layer.weight]} for layer in model], lr=1e-3)
settings = {
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": 1,
}
deepspeed.init_distributed("gloo")
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
for _ in range(2):
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
seen = []
for layer in model:
    try:
        seen.append(tuple(safe_get_full_optimizer_state(layer.weight, "exp_avg").shape))
    except ValueError as error:
        seen.append(str(error))
print(f"deepspeed {deepspeed.__version__} torch {torch.__version__} | exp_avg of a weight of each group: {seen}")
assert seen == [(4, 4), "exp_avg not found in optimizer state fragment"], "behaviour changed"
P
