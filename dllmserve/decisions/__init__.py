"""Decisions: typed questions about an input, read off a model's distributions. No HTTP."""
