"""How a save's and a restore's cost grows with the state, its tensors, cores and chains."""
