"""What many ranks cost: the engine's own code, with ranks that are simulated."""
