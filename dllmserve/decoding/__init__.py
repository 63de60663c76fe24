"""Decoding: which positions are written in a step, and with which token."""
