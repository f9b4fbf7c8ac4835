"""Debug mode: what went wrong, where, and with what."""

from distkit.debug.session import debug

__all__ = ["debug"]
