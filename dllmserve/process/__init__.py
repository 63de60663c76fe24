"""Workers, which are child processes: engines, their ranks, and whoever starts and watches them."""
