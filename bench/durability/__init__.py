"""Kills, reboots and flipped bits, by the thousand."""
