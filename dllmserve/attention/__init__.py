"""Attention backends: queries of a step against cached pages and fresh K,V."""
