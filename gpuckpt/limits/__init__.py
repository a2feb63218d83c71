"""What this machine can do at best, and which interval between saves that allows."""
