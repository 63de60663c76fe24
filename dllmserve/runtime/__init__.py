"""Runtime: device state and the execution of a plan."""
