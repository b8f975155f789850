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
- DeepSpeed learns of tensor-parallel groups from an object of getters (`mpu`), and counts a parameter that is not marked as
  divided on the first of their ranks only: the layers mark theirs;
- its pipelines take a flat list of layers and name their parameters by index: here a stage is a part of the Transformer with
  its own names, and every stage reads the micro batches itself, so that hidden states are all that travels;
- shutdown is explicit and bounded in time.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from megatronish.config.errors import UserError
from megatronish.config.run import BLOCK, BatchPlan, RunConfig
from megatronish.model.layout import VocabularyPart
from megatronish.model.transformer import IGNORED_LABEL, Transformer
from megatronish.parallel.ending import SHUTDOWN_SECONDS, end_within
from megatronish.parallel.layers import is_copy
from megatronish.parallel.meeting import Meeting, meet_by_environment
from megatronish.parallel.mesh import Axis, ParallelMesh
from megatronish.parallel.whole import collect_whole, parts_of
from megatronish.training.fragments import SavedFragments
from megatronish.training.held_state import HeldState, can_move
from megatronish.training.host_copies import HostCopies
from megatronish.training.optimizers import build_torch_optimizer, parameter_groups
from megatronish.training.pickled_state import PickledState
from megatronish.training.saving import Snapshot

NEVER = 1 << 60
STATE_CLASSES = (
    loss_scaler.LossScaler,
    loss_scaler.DynamicLossScaler,
    ZeroStageEnum,
    fragment_address,
)  # in its pickles
EVALUATED_AT_ONCE = 64  # micro batches that a pipeline runs between two fillings of itself
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
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=keys, mpu=mpu)
        stage, low_precision = config.deepspeed.zero_optimization.stage, config.deepspeed.dtype != "fp32"
        self._own_norm = stage == 0 and not low_precision
        self._stage3 = stage == 3
        self.can_move = can_move(config)
        self._files = PickledState(STATE_CLASSES)
        self._engine.checkpoint_engine = self._files
        self._engine._copy_recovery_script = lambda save_path: None  # a program has no place in a checkpoint
        if stage == 0 and low_precision:
            self._engine.optimizer.optimizer.state.clear()

    def _wrap(self, model: Transformer) -> tuple[nn.Module, Any]:
        """What DeepSpeed gets: a module, and the groups of tensor parallelism."""
        return _LossModule(model), _ModelParallelUnit.of(self.mesh)

    def _begin_step(self, batches: list[Batch], rate_share: float) -> torch.Tensor:
        """Set the learning rate; returns the number of tokens of the step."""
        tokens = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum().float()
        self.mesh.data.sum_(tokens)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_share
        return tokens

    def train_step(self, batches: list[Batch], rate_share: float) -> StepResult:
        """One optimizer step over the micro batches of this rank, at `rate_share` of the peak learning rate."""
        batches = [own_part(batch, self.mesh.sp) for batch in batches]
        tokens = self._begin_step(batches, rate_share)
        scale = self.mesh.data.size / tokens  # DeepSpeed averages over ranks
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
        divided: list[torch.Tensor] = []
        whole: list[torch.Tensor] = []
        for p in self._engine.module.parameters():
            if p.grad is not None:
                (whole if is_copy(p) else divided).append(p.grad)
        squares = torch.nn.utils.get_total_norm(divided).square().to(self.device)
        return (self.mesh.tp.sum_(squares) + torch.nn.utils.get_total_norm(whole).square()).sqrt()

    @torch.no_grad()
    def evaluate(self, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of token losses and token count of the batches of all ranks. Every rank needs equally many batches."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._engine.eval()
        for whole in batches:
            batch = own_part(whole, self.mesh.sp)
            total[0] += self._engine(batch)
            total[1] += (batch["labels"] != -100).sum()
        self.mesh.data.sum_(total)
        self._engine.train()
        return total[0], total[1]

    @property
    def module(self) -> nn.Module:
        """What DeepSpeed runs for each micro batch."""
        module: nn.Module = self._engine.module
        return module

    def weight_bytes(self) -> int:
        """Bytes of the weights that this rank holds between steps, in the training dtype."""
        held = self._engine.module.parameters()
        return sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in held)  # ds_tensor: ZeRO-3's partition

    def learning_rate(self) -> float:
        """The rate of the first parameter group."""
        return self._engine.optimizer.param_groups[0]["lr"]

    def snapshot(self, tag: str, copies: HostCopies | None = None) -> Snapshot:
        """The engine's state (master weights, moments, loss scale) as it is now, to be written to folder/tag.

        copies: where the state is copied to, so that it can be written while training goes on; without them it must be
        written before the next step. Every rank calls it. Where DeepSpeed alone knows the layout (see `can_move`) it writes
        the state itself: every rank then calls `write` in the thread of its collectives.
        """
        if not self.can_move:
            return Snapshot(0, lambda folder: self._save_pickled(folder, tag))
        fragments = self.held_state().fragments()
        size = fragments.bytes
        fragments, rank = fragments.on_host(copies), dist.get_rank()
        return Snapshot(size, lambda folder: fragments.write(folder / tag, rank))

    def state_bytes(self) -> int:
        """Of what `snapshot` would copy."""
        return self.held_state().fragments().bytes if self.can_move else 0

    def save(self, folder: Path, tag: str) -> None:
        """Write the state now. Every rank calls it."""
        self.snapshot(tag).write(folder)

    def _save_pickled(self, folder: Path, tag: str) -> list[Path]:
        self._files.written, self._files.error = [], None
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        if self._files.error:
            raise self._files.error
        return self._files.written

    def load(self, folder: Path, tag: str) -> None:
        """Read what a snapshot wrote; what DeepSpeed wrote, under the same layout only. Every rank calls it."""
        if saved := SavedFragments(folder / tag):
            self.held_state().load(saved)
        elif self._engine.load_checkpoint(str(folder), tag=tag)[0] is None:
            raise FileNotFoundError(f"{folder}/{tag} holds no DeepSpeed checkpoint.")

    def held_state(self) -> HeldState:
        """What this rank holds of the optimizer's state."""
        return HeldState(self._engine.module.model, self._engine.optimizer, self.mesh)

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole weights in the training dtype, on the first rank (elsewhere empty). Every rank calls it."""
        if self.mesh.tp.size > 1 or self.mesh.pp.size > 1:
            held = [part for part in parts_of(self._engine.module.model) if not is_tied_copy(part.tensor)]
            return collect_whole(held, self.mesh)
        if self._stage3:
            state = self._engine._zero3_consolidated_16bit_state_dict() or {}
        else:
            state = self._engine.module.state_dict() if dist.get_rank() == 0 else {}
        return {name.removeprefix("model."): value for name, value in state.items()}


class StageEngine(Engine):
    """An Engine whose model is one stage of a pipeline; micro batches follow one another through the stages (1F1B:
    Narayanan et al. 2019, PipeDream-Flush)."""

    def _wrap(self, model: Transformer) -> tuple[nn.Module, Any]:
        with contextlib.redirect_stdout(None):  # it prints its layers
            return _Stage(model, self.mesh), None

    def train_step(self, batches: list[Batch], rate_share: float) -> StepResult:
        """See Engine. Every stage gets the same micro batches."""
        tokens, stage = self._begin_step(batches, rate_share), self._engine.module
        # DeepSpeed averages over data-parallel ranks and over micro batches.
        stage.begin(batches, self.mesh.data.size / tokens * len(batches))
        self._engine.train_batch(_first_and_last(batches))
        skipped = bool(getattr(self._engine.optimizer, "overflow", False))
        loss_sum = self.mesh.pp.sum_(stage.loss_sum)
        return StepResult(loss_sum, tokens, self._engine.get_global_grad_norm(), skipped)

    @torch.no_grad()
    def evaluate(self, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        stage, waiting = self._engine.module, list(batches)
        for first in range(0, len(waiting), EVALUATED_AT_ONCE):
            some = waiting[first : first + EVALUATED_AT_ONCE]
            stage.begin(some, torch.ones((), device=self.device))
            self._engine.eval_batch(
                _first_and_last(some), reduce_output=None, bcast_loss=False, num_micro_batches=len(some)
            )
            total[0] += stage.loss_sum
            total[1] += sum((batch["labels"] != -100).sum() for batch in some)
        self.mesh.pp.sum_(total[0])
        self.mesh.data.sum_(total)
        self._engine.train()
        return total[0], total[1]


def start_engine(model: Transformer, config: RunConfig, plan: BatchPlan, mesh: ParallelMesh) -> Engine:
    """The engine of this rank; see Engine."""
    return (StageEngine if mesh.pp.size > 1 else Engine)(model, config, plan, mesh)


def own_part(batch: Batch, sp: Axis) -> Batch:
    """The rank's part of the sequences of a micro batch; documents stay those of the whole."""
    if sp.size == 1:
        return batch
    parts: Batch = {
        key: batch[key].chunk(sp.size, dim=1)[sp.rank] for key in ("tokens", "labels", "positions") if key in batch
    }
    return {**batch, **parts}


def _first_and_last(batches: list[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What DeepSpeed loads on the first and on the last stage; the stage itself looks up the rest."""
    return iter([(batch["tokens"], batch["labels"]) for batch in batches])


class _Stage(PipelineModule):
    """A stage of the pipeline as DeepSpeed wants it: hidden states in, hidden states or the scaled loss out."""

    def __init__(self, model: Transformer, mesh: ParallelMesh) -> None:
        self._given = (model, mesh)  # what the base's constructor asks for below
        topology = PipeModelDataParallelTopology(mesh.pp.size, mesh.tp.size, mesh.dp.size)
        super().__init__(layers=[None] * mesh.pp.size, topology=topology)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(range(self.num_stages + 1))
        self._set_bounds(self.stage_id, self.stage_id + 1)

    def _build(self) -> None:
        self.model, self.mesh = self._given
        for p in self.parameters():
            p.ds_pipe_replicated = False

    def _index_tied_modules(self) -> dict[str, Any]:
        """The embedding of the first stage and the head of the last, where they are one weight; gradients are summed."""
        tied: dict[str, Any] = {}
        if not self.model.config.tie_embeddings:
            return tied
        for data in range(self.mesh.dp.size):
            for tensor in range(self.mesh.tp.size):
                ends = [self._topo.get_rank(pipe=stage, data=data, model=tensor) for stage in (0, self.num_stages - 1)]
                group = dist.new_group(ends)
                if self.global_rank in ends:
                    module: Any = self.model.head if self.model.embedding is None else self.model.embedding
                    tied["embedding"] = {"ranks": ends, "group": group, "weight_attr": ["weight"], "module": module}
                    module.weight.ds_pipe_replicated = self.global_rank != ends[0]  # norms count it once
        return tied

    def get_tied_weights_and_groups(self) -> list[tuple[torch.Tensor, dist.ProcessGroup]]:
        return [(tied["module"].weight, tied["group"]) for tied in self.tied_comms.values()]

    def begin(self, batches: list[Batch], scale: torch.Tensor) -> None:
        """Get ready for these micro batches; their losses are multiplied by `scale` for the backward pass."""
        self._waiting, self._scale = iter(batches), scale
        self.loss_sum = torch.zeros((), device=scale.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The next micro batch: stages meet them in the same order."""
        batch = next(self._waiting)
        labels, rest = batch["labels"], {key: value for key, value in batch.items() if key != "labels"}
        hidden = self.model.run_stage(x, **rest)
        if self.model.head is None:
            return hidden
        loss = self.model.hidden_loss(hidden, labels)
        self.loss_sum += loss.detach()
        return loss * self._scale

    def _file(self, folder: str) -> str:
        return os.path.join(folder, f"stage_{self.stage_id:02d}-tensor_{self.mesh.tp.rank:02d}.pt")

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        if self.mesh.dp.rank == 0:
            checkpoint_engine.makedirs(save_dir, exist_ok=True)
            checkpoint_engine.save(self.model.state_dict(), self._file(save_dir))

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        self.model.load_state_dict(checkpoint_engine.load(self._file(load_dir), map_location="cpu"), strict=strict)


def is_tied_copy(parameter: torch.Tensor) -> bool:
    """Whether another pipeline stage has the same parameter and counts it."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


class _ModelParallelUnit:
    """The groups of the mesh under the names that DeepSpeed asks for (`mpu`, after Megatron-LM)."""

    def __init__(self, mesh: ParallelMesh) -> None:
        assert mesh.device_mesh is not None
        self._mesh, self._data, self._model = mesh, mesh.device_mesh.get_group("dp"), mesh.device_mesh.get_group("tp")

    @classmethod
    def of(cls, mesh: ParallelMesh) -> _ModelParallelUnit | None:
        """None where no matrix is divided: then DeepSpeed takes all ranks for data-parallel ones."""
        return cls(mesh) if mesh.tp.size > 1 else None

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, part: VocabularyPart | None = None
) -> torch.Tensor:
    """DeepSpeed's sum of the cross-entropy of hidden weight^T, a part of the logits at a time, in fp32.

    hidden [b, s, hidden], weight [V, hidden], labels int64 [b, s]; part: see `model.layout.LinearCrossEntropy`. Saves the
    memory of the logits and computes them twice.
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
        # To DeepSpeed a sequence-parallel rank is one more data-parallel rank.
        "train_batch_size": plan.samples * config.megatronish.parallel.sequence,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_print": config.deepspeed.steps_per_print or NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Sending hidden states in parts over tensor-parallel ranks would mix up parts of the sequence.
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
