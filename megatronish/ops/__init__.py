"""Fused operators: one public function per file, with an fp32 reference for each in reference.py.

Importing this package registers the operators of csrc/ as `torch.ops.megatronish.*` (see extension.py), so it loads torch.
"""

from megatronish.ops import extension as extension
