"""Training engine: forward, backward, step, save and load of one rank through DeepSpeed.

Only this module and pipeline_stage.py import deepspeed. What they work around (observed with deepspeed 0.19.8):
- The loss of a micro batch is a sum over tokens. It is scaled here so that the gradient of a step is that of the mean over
  all tokens of all micro batches of all ranks, however unevenly they are filled.
- fp32 ZeRO-0 reports no gradient norm: it is computed here.
- Low-precision ZeRO-0 takes an optimizer step with zero gradients to allocate its moments, which decays the weights and
  counts as step 1 of AdamW's bias correction (losses 1% off): learning rates are 0 during set-up, and the moments are
  dropped afterwards.
- The shared-memory op of CPU ranks leaks 69 MB per rank in /dev/shm: plain gloo is used.
- Offloaded AdamW is torch's fused one: as fast as DeepSpeed's CPU Adam (tools/bench/cpu_adam.py), nothing to compile, and
  resuming is bit-identical.
- Muon's Newton-Schulz iteration under torch.compile is slow on CPUs: it runs eagerly there.
- DeepSpeed takes tensor-parallel groups from an object of getters (`mpu`), and counts a parameter that is not marked as
  divided on the first of their ranks only: the layers mark theirs.
- Its pipelines take a flat list of layers and name their parameters by index. Here a stage is a part of the Transformer
  with its own names, and every stage reads the micro batches itself, so that only hidden states are sent.
- A step with a non-finite loss on any rank, or a non-finite gradient norm, updates nothing. A non-finite loss makes the
  gradients of its rank non-finite and with them the norm that every rank computes, so no extra communication is needed.
  DeepSpeed then skips the step. In bf16 under ZeRO 1 and 2 it checks only with `check_grad_overflow`, and then reads every
  gradient once more: that is replaced by a check of the norm.
- Shutdown is explicit and bounded in time.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import socket
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from megatronish.checkpoint.deepspeed_files import DeepSpeedFiles
from megatronish.checkpoint.optimizer_shards import OptimizerShard, SavedOptimizerShards
from megatronish.checkpoint.saver import CheckpointSnapshot
from megatronish.checkpoint.staging import StagingBuffers
from megatronish.checkpoint.zero_state import LocalOptimizerState, can_move
from megatronish.config.run import BLOCK, BatchPlan, RunConfig
from megatronish.errors import UserError
from megatronish.launch.exit import SHUTDOWN_SECONDS, exit_within
from megatronish.launch.rendezvous import Rendezvous, join_rendezvous_from_env
from megatronish.model.sharded_layers import VocabularyPart
from megatronish.model.transformer import IGNORED_LABEL, Transformer
from megatronish.parallel.full_tensors import gather_full_tensors, parts_of
from megatronish.parallel.layers import is_copy
from megatronish.parallel.mesh import ParallelMesh
from megatronish.training.memory import GIB, ActivationBudget, OutOfMemory, shortest_batch
from megatronish.training.optimizers import build_torch_optimizer, parameter_groups
from megatronish.training.pipeline_stage import Stage, first_and_last, is_tied_copy, model_parallel_unit
from megatronish.training.step import (
    Batch,
    LossModule,
    StepResult,
    let_skip_steps,
    nan_unless_finite,
    own_part,
    skip_overflow_check,
)

NEVER = 1 << 60
# The classes in DeepSpeed's pickles.
STATE_CLASSES = (loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address)
EVALUATED_AT_ONCE = 64  # micro batches of an evaluation between two fillings of the pipeline


def device() -> torch.device:
    """The device of this rank."""
    if get_accelerator().device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(get_accelerator().device_name(), int(os.environ["LOCAL_RANK"]))


def start_process_group(
    timeout_minutes: float = 30.0, rendezvous: Rendezvous | None = None, start_seconds: float = 600.0
) -> None:
    """Join the other ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set): NCCL on GPUs, gloo on CPUs.

    timeout_minutes: of a collective; rendezvous: that the ranks have joined; by default they join one here within `start_seconds`.
    Raises UserError when the port of the rendezvous is taken, a rank is missing, or this machine has no GPU for this rank.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    # Recovery reports these steps.
    deepspeed_logger.addFilter(lambda record: "Gradients are non-finite" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # deepspeed's calls, not ours
    on_cpu = device().type == "cpu"
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        local, found = int(os.environ["LOCAL_RANK"]), get_accelerator().device_count()
        if local >= found:
            raise UserError(
                f"rank {os.environ['RANK']} is number {local} on {socket.gethostname()} (from 0), which shows it {found} "
                "GPU(s): start at most one rank per GPU of a machine, and look at CUDA_VISIBLE_DEVICES."
            )
        get_accelerator().set_device(local)
    backend = "gloo" if on_cpu else get_accelerator().communication_backend_name()
    rendezvous = rendezvous or join_rendezvous_from_env(start_seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("process groups", rendezvous.store),
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)  # takes over the group that it finds


def stop_process_group() -> None:
    """Leave the process group after a successful run; if a peer blocks that, the process exits after SHUTDOWN_SECONDS."""
    if not dist.is_initialized():
        return
    timer = exit_within(SHUTDOWN_SECONDS, status=0)
    dist.destroy_process_group()
    timer.cancel()


class Engine:
    """One rank of a training run: forward, backward, step, save and load through DeepSpeed.

    model: this rank's part with its initial weights; config, plan: the run and its batch arithmetic; mesh: the ranks.
    """

    def __init__(self, model: Transformer, config: RunConfig, plan: BatchPlan, mesh: ParallelMesh) -> None:
        self.device = device()
        self.mesh = mesh
        keys = engine_keys(config, plan)
        if model.kernels.cross_entropy == "linear":
            model.linear_cross_entropy = linear_cross_entropy
        module, mpu = self._wrap(model)
        groups = parameter_groups(model, config.deepspeed.optimizer)
        optimizer = build_optimizer(groups, config, self.device)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        stage, low_precision = config.deepspeed.zero_optimization.stage, config.deepspeed.dtype != "fp32"
        self._own_norm = stage == 0 and not low_precision
        if self._own_norm:
            let_skip_steps(optimizer)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=keys, mpu=mpu)
        self._stage3 = stage == 3
        self.can_move = can_move(config)
        self._files = DeepSpeedFiles(STATE_CLASSES)
        self._engine.checkpoint_engine = self._files
        self._engine._copy_recovery_script = lambda save_path: None  # keep its script out of checkpoints
        self._fp16 = config.deepspeed.dtype == "fp16"
        limit = config.megatronish.train.memory_budget
        self.budget = None if limit is None else ActivationBudget(model, limit * GIB)
        self._lacked_memory = False
        self.can_shrink = stage < 3 and mesh.tp.size * mesh.pp.size * mesh.sp.size == 1
        if stage == 0 and low_precision:
            self._engine.optimizer.optimizer.state.clear()
        if hasattr(self._engine.optimizer, "check_grad_overflow") and not self._fp16:
            self._engine.optimizer.check_grad_overflow = True
            if not config.deepspeed.zero_optimization.offloads_optimizer:  # there each gradient is checked anyway
                self._engine.optimizer.check_overflow = skip_overflow_check

    def _wrap(self, model: Transformer) -> tuple[nn.Module, Any]:
        """The module and the tensor-parallel groups for DeepSpeed."""
        return LossModule(model), model_parallel_unit(self.mesh)

    def _begin_step(self, batches: list[Batch], learning_rate_multiplier: float) -> torch.Tensor:
        """Set the learning rate; returns the number of tokens of the step."""
        tokens = torch.stack([(batch["labels"] != IGNORED_LABEL).sum() for batch in batches]).sum().float()
        self.mesh.data.sum_(tokens)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_multiplier
        return tokens

    def train_step(self, batches: list[Batch], learning_rate_multiplier: float) -> StepResult:
        """One optimizer step over the micro batches of this rank, at `learning_rate_multiplier` times the peak learning rate."""
        batches = [own_part(batch, self.mesh.sp) for batch in batches]
        tokens = self._begin_step(batches, learning_rate_multiplier)
        scale = self.mesh.data.size / tokens  # DeepSpeed averages over ranks
        loss_sum, norm = torch.zeros((), device=self.device), None
        self._engine.train()
        scaler = self.local_optimizer_state().scaler_numbers() if self._fp16 else {}
        self._lacked_memory = False
        for batch in batches:
            loss = self._forward(batch)
            try:
                self._engine.backward(loss * (scale + nan_unless_finite(loss)), scale_wrt_gas=False)
            except torch.OutOfMemoryError as error:
                raise self._no_memory(batch, error) from None
            loss_sum += loss.detach()
            if self._own_norm and self._engine.is_gradient_accumulation_boundary():
                norm = self._plain_norm()
                self._engine.optimizer.overflow = not torch.isfinite(norm)
            self._engine.step()
        return self._result(loss_sum, tokens, norm, scaler)

    def _forward(self, batch: Batch) -> torch.Tensor:
        """The loss of a micro batch; NaN when memory is short, and then every rank skips the step.

        A few tokens take the place of the micro batch, since the other ranks wait for this rank's gradients. Raises
        OutOfMemory where ranks also communicate inside the forward pass.
        """
        try:
            with self.budget or nullcontext():
                loss: torch.Tensor = self._engine(batch)
            return loss
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            if not self.can_shrink:
                raise self._no_memory(batch, error) from None
        self._lacked_memory = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._engine(shortest_batch(batch)) * math.nan

    def _no_memory(self, batch: Batch, error: Exception) -> OutOfMemory:
        """The error that ends the run where a rank cannot skip a step, because others wait for its part of it."""
        return OutOfMemory(
            f"no memory for a micro batch of {len(batch['tokens'])} on rank {dist.get_rank()} ({error}). Halve "
            "--train_micro_batch_size_per_gpu and double --gradient_accumulation_steps, which keeps the samples per step, or add "
            "--train.activation_checkpointing selective (then full). This happens automatically in the forward pass under ZeRO 0 to 2 "
            "without tensor, pipeline or sequence parallel ranks."
        )

    def set_plan(self, plan: BatchPlan) -> None:
        """Use micro batches of another size from the next step on; the samples per step stay the same."""
        engine = self._engine
        engine._config.train_micro_batch_size_per_gpu = plan.micro
        engine._config.gradient_accumulation_steps = plan.accumulation
        engine.micro_steps = engine.global_steps * plan.accumulation  # a step ends where they are a multiple
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = plan.accumulation

    def _result(
        self, loss_sum: torch.Tensor, tokens: torch.Tensor, own_norm: torch.Tensor | None, scaler: dict[str, float]
    ) -> StepResult:
        """The result of the step; scaler: the state of the loss scaler before it."""
        skipped = bad = bool(getattr(self._engine.optimizer, "overflow", False))
        lacked = False
        if skipped:
            # ZeRO-2 offload would add the gradients of the next step to those of the skipped one.
            for name in ("averaged_gradients", "all_grad_tensors"):
                if isinstance(gradients := getattr(self._engine.optimizer, name, None), dict):
                    gradients.update(dict.fromkeys(gradients))
            known = torch.tensor([not torch.isfinite(loss_sum), self._lacked_memory], device=self.device).float()
            dist.all_reduce(known, op=dist.ReduceOp.MAX)
            broken, lacked = (bool(each) for each in known.tolist())
            if self._fp16:
                bad = broken
                if bad:  # the loss is not scaled: no smaller scale would have helped
                    self.local_optimizer_state().set_scaler(scaler)
        norm = self._engine.get_global_grad_norm() if own_norm is None else own_norm
        return StepResult(loss_sum, tokens, norm, skipped, bad and not lacked, lacked)

    def _plain_norm(self) -> torch.Tensor:
        divided: list[torch.Tensor] = []
        replicated: list[torch.Tensor] = []
        for p in self._engine.module.parameters():
            if p.grad is not None:
                (replicated if is_copy(p) else divided).append(p.grad)
        squares = torch.nn.utils.get_total_norm(divided).square().to(self.device)
        return (self.mesh.tp.sum_(squares) + torch.nn.utils.get_total_norm(replicated).square()).sqrt()

    @torch.no_grad()
    def evaluate(self, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of token losses and token count of the batches of all ranks. Every rank needs the same number of batches."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._engine.eval()
        for batch in (own_part(batch, self.mesh.sp) for batch in batches):
            total[0] += self._engine(batch)
            total[1] += (batch["labels"] != IGNORED_LABEL).sum()
        self.mesh.data.sum_(total)
        self._engine.train()
        return total[0], total[1]

    @property
    def module(self) -> nn.Module:
        """The module that DeepSpeed runs for each micro batch."""
        module: nn.Module = self._engine.module
        return module

    def weight_bytes(self) -> int:
        """Bytes of the weights that this rank holds between steps, in the training dtype."""
        held = self._engine.module.parameters()
        return sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in held)  # ds_tensor: ZeRO-3's partition

    def learning_rate(self) -> float:
        """The rate of the first parameter group."""
        return self._engine.optimizer.param_groups[0]["lr"]

    def optimizer_shard(self) -> OptimizerShard | None:
        """What this rank writes of the optimizer state: views of it. None if DeepSpeed writes it itself (see `can_move`)."""
        return self.local_optimizer_state().shard() if self.can_move else None

    def snapshot(
        self, tag: str, copies: StagingBuffers | None = None, shard: OptimizerShard | None = None
    ) -> CheckpointSnapshot:
        """The engine's state (master weights, moments, loss scale) as it is now, to be written to folder/tag.

        copies: buffers to which the state is copied, so that it can be written while training continues; without them it
        must be written before the next step. shard: what `optimizer_shard` returned for the present state, if it was called.
        Every rank calls it. Where only DeepSpeed knows the layout (see `can_move`) it writes the state itself: every rank
        then calls `write` in the thread of its collectives.
        """
        shard = shard or self.optimizer_shard()
        if shard is None:
            size = self.weight_bytes() + self.local_optimizer_state().optimizer_bytes()
            return CheckpointSnapshot(size, lambda folder: self._save_pickled(folder, tag))
        staged, rank = shard.on_host(copies), dist.get_rank()
        return CheckpointSnapshot(shard.bytes, lambda folder: staged.write(folder / tag, rank))

    def save(self, folder: Path, tag: str) -> None:
        """Write the state now. Every rank calls it."""
        self.snapshot(tag).write(folder)

    def _save_pickled(self, folder: Path, tag: str) -> list[Path]:
        self._files.written, self._files.error = [], None
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        if self._files.error:
            raise self._files.error
        return self._files.written

    def load(self, folder: Path, tag: str, shards: SavedOptimizerShards | None = None) -> None:
        """Read what a snapshot wrote; what DeepSpeed wrote, under the same layout only. Every rank calls it.

        shards: those of the folder, if they are open already. They are closed.
        """
        shards = shards or SavedOptimizerShards(folder / tag)
        if shards:
            self.local_optimizer_state().load(shards)
            shards.close()
        elif self._engine.load_checkpoint(str(folder), tag=tag)[0] is None:
            raise FileNotFoundError(f"{folder}/{tag} holds no DeepSpeed checkpoint.")

    def local_optimizer_state(self) -> LocalOptimizerState:
        """What this rank holds of the optimizer's state."""
        return LocalOptimizerState(self._engine.module.model, self._engine.optimizer, self.mesh)

    def weights(self) -> dict[str, torch.Tensor]:
        """Full weights in the training dtype, on the first rank (elsewhere empty). Every rank calls it."""
        if self.mesh.tp.size > 1 or self.mesh.pp.size > 1:
            held = [part for part in parts_of(self._engine.module.model) if not is_tied_copy(part.tensor)]
            return gather_full_tensors(held, self.mesh)
        if self._stage3:
            state = self._engine._zero3_consolidated_16bit_state_dict() or {}
        else:
            state = self._engine.module.state_dict() if dist.get_rank() == 0 else {}
        return {name.removeprefix("model."): value for name, value in state.items()}


class StageEngine(Engine):
    """An Engine whose model is one stage of a pipeline; micro batches follow one another through the stages (1F1B:
    Narayanan et al. 2019, PipeDream-Flush)."""

    def _wrap(self, model: Transformer) -> tuple[nn.Module, Any]:
        with contextlib.redirect_stdout(None):  # PipelineModule prints its layers
            return Stage(model, self.mesh), None

    def train_step(self, batches: list[Batch], learning_rate_multiplier: float) -> StepResult:
        """See Engine. Every stage gets the same micro batches."""
        tokens, stage = self._begin_step(batches, learning_rate_multiplier), self._engine.module
        # DeepSpeed averages over data-parallel ranks and over micro batches.
        stage.begin(batches, self.mesh.data.size / tokens * len(batches))
        self._engine.train_batch(first_and_last(batches))
        return self._result(self.mesh.pp.sum_(stage.loss_sum), tokens, None, {})

    @torch.no_grad()
    def evaluate(self, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        stage, waiting = self._engine.module, list(batches)
        for first in range(0, len(waiting), EVALUATED_AT_ONCE):
            some = waiting[first : first + EVALUATED_AT_ONCE]
            stage.begin(some, torch.ones((), device=self.device))
            self._engine.eval_batch(
                first_and_last(some), reduce_output=None, bcast_loss=False, num_micro_batches=len(some)
            )
            total[0] += stage.loss_sum
            total[1] += sum((batch["labels"] != IGNORED_LABEL).sum() for batch in some)
        self.mesh.pp.sum_(total[0])
        self.mesh.data.sum_(total)
        self._engine.train()
        return total[0], total[1]


def start_engine(model: Transformer, config: RunConfig, plan: BatchPlan, mesh: ParallelMesh) -> Engine:
    """The engine of this rank; see Engine."""
    return (StageEngine if mesh.pp.size > 1 else Engine)(model, config, plan, mesh)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, part: VocabularyPart | None = None
) -> torch.Tensor:
    """DeepSpeed's summed cross-entropy of hidden weight^T in fp32, computed in chunks of the logits.

    hidden [b, s, hidden], weight [V, hidden], labels int64 [b, s]; part: see `model.sharded_layers.LinearCrossEntropy`. Saves
    the memory of the logits and computes them twice.
    """
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy  # not in every run

    return vocab_parallel_linear_cross_entropy(
        hidden,
        weight,
        labels,
        tp_group=part and part.group,
        vocab_start_index=part and part.start,
        vocab_end_index=part and part.stop,
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


def partitioned_construction(config: RunConfig, plan: BatchPlan) -> AbstractContextManager[Any]:
    """Context in which ZeRO-3 partitions modules as they are created, so that no rank ever holds the full model."""
    enabled = config.deepspeed.zero_optimization.stage == 3
    return deepspeed.zero.Init(config_dict_or_path=engine_keys(config, plan)) if enabled else nullcontext()


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Context in which ZeRO-3 parameters are gathered; what the first rank writes to them is kept."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def engine_keys(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """The configuration for DeepSpeed: its own keys with the batch resolved, without the optimizer, which is built here."""
    keys = {key: value for key, value in config.to_json().items() if key not in (BLOCK, "optimizer")}
    return {
        **keys,
        # To DeepSpeed a sequence-parallel rank is one more data-parallel rank.
        "train_batch_size": plan.samples * config.megatronish.parallel.sequence,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_print": config.deepspeed.steps_per_print or NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Splitting hidden states over tensor-parallel ranks for sending would mix up parts of the sequence.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, **(config.deepspeed.pipeline or {})},
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
