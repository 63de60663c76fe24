"""Scenarios of clients that are not ours, against a running server; see README.md."""
