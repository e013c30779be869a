"""What a user, a configuration or a checkpoint can get wrong. Everything else is an assertion."""


class ShardError(ValueError):
    """Base of the errors that are shown to an operator as one line."""

    exit_code = 1


class ConfigError(ShardError):
    """A setting, or a value of the model's configuration, that cannot be served."""


class CheckpointError(ShardError):
    """A file of the model folder that is missing, damaged or does not fit the configuration."""
