"""Slow twins: plain restatements of upstream's decoding scripts, used only as truth in tests.

They share no code with the package they check: torch, safetensors and the standard library only.
"""
