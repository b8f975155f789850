"""DeepSpeed behind one small class. The only module that imports deepspeed.

What it settles, so that the rest of the code need not know (each met on deepspeed 0.19.8):
- the loss of a micro batch is a sum over tokens; it is scaled here so that the gradient of a step is that of the mean over
  all tokens of all micro batches of all ranks, however unevenly they are filled;
- fp32 ZeRO-0 reports no gradient norm: it is computed here;
- low-precision ZeRO-0 takes an optimizer step with zero gradients to allocate its moments, which decays the weights and
  counts as step 1 of AdamW's bias correction (losses 1% off): rates are 0 during set-up and the moments dropped after;
- the shared-memory op of CPU ranks leaves 69 MB a rank in /dev/shm: plain gloo is used;
- offloaded AdamW is torch's fused one: as fast as DeepSpeed's CPU Adam (tools/bench_cpu_adam.py), nothing to compile, and
  it resumes bit for bit;
- Muon's Newton-Schulz under torch.compile is slow on CPUs: it runs eagerly there;
- shutdown is explicit and bounded in time.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from megatronish.config.base import UserError
from megatronish.config.run import BLOCK, BatchPlan, RunConfig
from megatronish.model.transformer import IGNORED_LABEL, Transformer
from megatronish.parallel.ending import SHUTDOWN_SECONDS, end_within
from megatronish.parallel.meeting import Meeting, meet_by_environment
from megatronish.training.optimizers import build_torch_optimizer, parameter_groups

NEVER = 1 << 60
Batch = dict[str, Any]  # what data/loader.py yields, on the engine's device


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Tensors stay on the device: reading them waits for it."""

    loss_sum: torch.Tensor  # [] fp32, this rank's sum of token losses
    tokens: torch.Tensor  # [] fp32, tokens of the whole step over all ranks
    grad_norm: float | torch.Tensor | None  # before clipping, over all ranks
    skipped: bool  # fp16 overflow: nothing was updated


def device() -> torch.device:
    """The device of this rank."""
    if get_accelerator().device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(get_accelerator().device_name(), int(os.environ["LOCAL_RANK"]))


def start_process_group(
    timeout_minutes: float = 30.0, meeting: Meeting | None = None, start_seconds: float = 600.0
) -> None:
    """Join the other ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set): NCCL on GPUs, gloo on CPUs.

    timeout_minutes: of a collective; meeting: of ranks that have met, else they meet here within `start_seconds`.
    Raises UserError when the meeting place is taken, a rank does not come, or this machine has no GPU for this rank.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # deepspeed's calls, not ours
    on_cpu = device().type == "cpu"
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        local, found = int(os.environ["LOCAL_RANK"]), get_accelerator().device_count()
        if local >= found:
            raise UserError(
                f"rank {os.environ['RANK']} is number {local} on {socket.gethostname()} (from 0), which shows it {found} "
                "GPU(s): start at most as many ranks a machine as it has GPUs, and look at CUDA_VISIBLE_DEVICES."
            )
        get_accelerator().set_device(local)
    backend = "gloo" if on_cpu else get_accelerator().communication_backend_name()
    meeting = meeting or meet_by_environment(start_seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("process groups", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)  # takes over the group that it finds


def stop_process_group() -> None:
    """Leave the process group after a good run; if a peer keeps that from returning, the process ends all the same."""
    if not dist.is_initialized():
        return
    timer = end_within(SHUTDOWN_SECONDS, status=0)
    dist.destroy_process_group()
    timer.cancel()


class Engine:
    """One data-parallel rank of a training run: forward, backward, step, save and load through DeepSpeed.

    model: with its initial weights; config, plan: the run and its batch arithmetic.
    """

    def __init__(self, model: Transformer, config: RunConfig, plan: BatchPlan) -> None:
        self.device = device()
        self.data_size = dist.get_world_size()
        keys = engine_keys(config, plan)
        if model.kernels.cross_entropy == "linear":
            model.linear_cross_entropy = linear_cross_entropy
        groups = parameter_groups(model, config.deepspeed.optimizer)
        optimizer = build_optimizer(groups, config, self.device)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._engine, *_ = deepspeed.initialize(model=_LossModule(model), optimizer=optimizer, config=keys)
        stage, low_precision = config.deepspeed.zero_optimization.stage, config.deepspeed.dtype != "fp32"
        self._own_norm = stage == 0 and not low_precision
        self._stage3 = stage == 3
        if stage == 0 and low_precision:
            self._engine.optimizer.optimizer.state.clear()

    def train_step(self, batches: list[Batch], rate_share: float) -> StepResult:
        """One optimizer step over the micro batches of this rank, at `rate_share` of the peak learning rate."""
        tokens = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum().float()
        dist.all_reduce(tokens)
        scale = self.data_size / tokens  # DeepSpeed averages over ranks
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_share
        loss_sum = torch.zeros((), device=self.device)
        self._engine.train()
        for batch in batches:
            loss = self._engine(batch)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            loss_sum += loss.detach()
            norm = self._plain_norm() if self._own_norm and self._engine.is_gradient_accumulation_boundary() else None
            self._engine.step()
        skipped = bool(getattr(self._engine.optimizer, "overflow", False))
        return StepResult(loss_sum, tokens, norm if self._own_norm else self._engine.get_global_grad_norm(), skipped)

    def _plain_norm(self) -> torch.Tensor:
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    @torch.no_grad()
    def evaluate(self, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of token losses and token count of the batches of all ranks. Every rank needs equally many batches."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._engine.eval()
        for batch in batches:
            total[0] += self._engine(batch)
            total[1] += (batch["labels"] != -100).sum()
        dist.all_reduce(total)
        self._engine.train()
        return total[0], total[1]

    def learning_rate(self) -> float:
        """The rate of the first parameter group."""
        return self._engine.optimizer.param_groups[0]["lr"]

    def save(self, folder: str, tag: str) -> None:
        """Write the engine's state (weights, moments, loss scale) to folder/tag. Every rank calls it."""
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        """Read what `save` wrote under the same number of ranks and ZeRO stage. Every rank calls it."""
        path, _ = self._engine.load_checkpoint(folder, tag=tag)
        if path is None:
            raise FileNotFoundError(f"{folder}/{tag} holds no DeepSpeed checkpoint.")

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole weights in the training dtype, on the first rank (elsewhere empty). Every rank calls it."""
        if self._stage3:
            state = self._engine._zero3_consolidated_16bit_state_dict() or {}
        else:
            state = self._engine.module.state_dict() if dist.get_rank() == 0 else {}
        return {name.removeprefix("model."): value for name, value in state.items()}


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """DeepSpeed's sum of the cross-entropy of hidden weight^T, a part of the logits at a time, in fp32.

    hidden [b, s, hidden], weight [V, hidden], labels int64 [b, s]. Saves the memory of the logits and computes them twice.
    """
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy  # not in every run

    return vocab_parallel_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED_LABEL, reduction="sum")


def partitioned_construction(config: RunConfig, plan: BatchPlan) -> AbstractContextManager[Any]:
    """Inside it modules are born partitioned under ZeRO-3, so that no rank ever holds a whole model; else nothing."""
    enabled = config.deepspeed.zero_optimization.stage == 3
    return deepspeed.zero.Init(config_dict_or_path=engine_keys(config, plan)) if enabled else nullcontext()


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside it ZeRO-3 parameters are whole; what the first rank writes to them becomes theirs."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


class _LossModule(nn.Module):
    """What DeepSpeed calls: a batch in, the sum of its token losses out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        loss_sum, _ = self.model.loss(**batch)
        return loss_sum


def engine_keys(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """The configuration DeepSpeed gets: its own keys, with the batch resolved and the optimizer taken over by us."""
    keys = {key: value for key, value in config.to_json().items() if key not in (BLOCK, "optimizer")}
    return {
        **keys,
        "train_batch_size": plan.samples,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_print": config.deepspeed.steps_per_print or NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig, where: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the run: torch's fused AdamW or our Lion, on the GPU and under offload, or DeepSpeed's Muon."""
    chosen = config.deepspeed.optimizer
    if chosen.type != "Muon":
        return build_torch_optimizer(groups, chosen)
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon  # slow to import: only for runs that use it

    if where.type == "cpu":
        for module in (original_muon, muon_optimizer):  # the second imports muon_update by name, for ZeRO 0
            for name in {"zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz", "muon_update"} & set(
                vars(module)
            ):
                function = getattr(module, name)
                setattr(module, name, getattr(function, "_torchdynamo_orig_callable", function))
    return muon_optimizer.MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True}
    )
