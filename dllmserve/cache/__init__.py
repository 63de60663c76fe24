"""Cache policies: which tokens are computed, read and kept in each step."""
