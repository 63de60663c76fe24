"""Models: config.json to ModelSpec, tensor names, and the decoder they share."""
