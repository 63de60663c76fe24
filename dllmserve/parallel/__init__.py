"""One model on several devices: who holds what, and how ranks exchange it."""
