"""How a launch begins and ends, what its processes agree on, signals."""
