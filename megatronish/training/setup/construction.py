"""The model of a run on this rank: its part of the layers and matrices, with initial or imported weights."""

from __future__ import annotations

from megatronish.config.run import BatchPlan, RunConfig
from megatronish.errors import ConfigError
from megatronish.interop.huggingface import HuggingFaceWeights
from megatronish.model.accounting import layer_costs
from megatronish.model.init import init_weights
from megatronish.model.transformer import Transformer
from megatronish.parallel.layers import TensorParallel
from megatronish.parallel.mesh import ParallelMesh
from megatronish.parallel.pipeline import balanced_stages
from megatronish.training.engine import gathered, partitioned_construction


def build_model(
    config: RunConfig, plan: BatchPlan, mesh: ParallelMesh, imported: HuggingFaceWeights | None = None
) -> Transformer:
    """This rank's part of the run's model with its initial weights, partitioned from the start under ZeRO-3.

    imported: the weights to begin with instead of random ones; a tensor is read at a time. Raises ConfigError for a
    kernel that is asked for by name and not installed.
    """
    ours, zero3 = config.megatronish, config.deepspeed.zero_optimization.stage == 3
    try:
        with partitioned_construction(config, plan):
            tp = TensorParallel(mesh.tp, ours.parallel.tensor_sequence)
            costs = layer_costs(ours.model, ours.parallel.pipeline_balance)
            stage = balanced_stages(costs, mesh.pp.size)[mesh.pp.rank]
            seed = None if zero3 or imported else ours.train.seed
            model = Transformer(ours.model, ours.kernels, seed=seed, tp=tp, stage=stage, sp=mesh.sp)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if zero3 or imported:
        draw, gather = imported.initial if imported else None, gathered if zero3 else None
        init_weights(model, ours.model, ours.train.seed, gather=gather, draw=draw)
    model.set_activation_checkpointing(ours.train.activation_checkpointing)
    if ours.train.compile:
        model.compile_blocks(ours.train.compile_mode)
    return model
