"""Ranks: where a process stands among its peers, and what it needs before torch is loaded."""
