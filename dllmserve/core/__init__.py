"""Host-side heart of the engine: integers only, no torch."""
