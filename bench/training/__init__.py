"""What deltas and increments save in real training runs."""
