"""Changes to a model's activations while it runs: functions from activations to activations."""
