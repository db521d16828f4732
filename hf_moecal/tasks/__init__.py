"""What a batch is judged on: classification, choice, language modelling; the prompts they come with."""

TASKS = ("classification", "choice", "lm")
