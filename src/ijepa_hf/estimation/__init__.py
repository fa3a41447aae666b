"""Says what a run takes before it is started: operations, memory, time."""
