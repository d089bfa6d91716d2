"""The planner: how fast a cluster would train, by every method, before there is a cluster."""
