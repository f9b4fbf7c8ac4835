"""A recipe's command line: preset, launcher, config file and flags become one configuration. No torch."""

from distkit.cli.parse import parse

__all__ = ["parse"]
