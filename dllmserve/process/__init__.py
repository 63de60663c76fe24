"""Child processes for engines and their ranks, and the code that starts and watches them."""
