"""megatronish: a DeepSpeed/Megatron-style stack for pretraining transformers, small enough to read in an afternoon."""

__version__ = "0.1.0"
