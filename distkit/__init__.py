"""distkit: a training run that is the same run everywhere."""

from __future__ import annotations

__version__ = "0.1.0"
