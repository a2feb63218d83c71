"""torch's own tests of its distributed checkpoints, with gpuckpt as their storage."""
