"""What is done to a model first: its blocks found, what trains chosen, adapters, the head, the frozen prefix."""
