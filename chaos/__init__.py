"""Faults against a real server: it is started, loaded, broken and checked from outside.

    python -m chaos [NAME...] [--model KIND] [--quick]

docs/reliability.md says what each scenario does, and what was measured.
"""
