"""Drift: a log of predictions against a reference, window by window, with alarms that hold up statistically."""
