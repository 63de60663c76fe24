"""Open-loop load on a running HTTP server, and what its users would have seen of it."""
