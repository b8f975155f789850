"""Checks of a run: parallel layouts against one process, killed runs against uninterrupted ones, replays of recorded steps."""
