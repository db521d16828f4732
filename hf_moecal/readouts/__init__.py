"""How experts' predictions become one: mixtures, committees, reading them, what a checkpoint records."""
