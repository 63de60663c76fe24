"""Data that ships with the package: the embedded model, and the scorers of its tasks."""
