"""The demonstration: train, kill in mid-save, resume, compare bit for bit."""
