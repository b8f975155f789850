"""Fused operators: one public function per file, with an fp32 reference for each in reference.py."""
