"""What a save and a restore consist of, piece by piece, timed by pytest-benchmark."""
