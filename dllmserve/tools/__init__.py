"""What is neither the engine nor the server: benchmarks, evaluations and the model of lm-eval."""
