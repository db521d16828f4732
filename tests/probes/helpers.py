"""What the tests over all families share."""

from __future__ import annotations


# Experts that no module computes from an index and weights, so that none can be consulted alone.
UNSUPPORTED = {"doge", "jetmoe"}


TOLERANCE = 1e-5
