"""The ranks of one engine as processes: plans go out, signs of life come back."""
