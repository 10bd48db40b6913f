"""Joining the world of ranks: launchers' variables, the runtime, collectives and their time, preflight, bandwidth."""
