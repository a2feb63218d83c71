"""gpuckpt beside other checkpointers: same state, same disk, each in a process of its own."""
