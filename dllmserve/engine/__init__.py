"""Engine: the step loop, text, and start-up."""
