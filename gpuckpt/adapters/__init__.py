"""Adapters: what lets other libraries keep their state by gpuckpt.

Each module imports its library when it is imported; nothing of the engine
imports any of them.
"""
