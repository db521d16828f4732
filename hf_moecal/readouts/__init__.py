"""How experts' predictions become one: mixtures, committees, attaching them to a model, what a checkpoint records."""
