"""How often something happens, for those who think in epochs."""

from __future__ import annotations

from decimal import Decimal

from distkit.errors import ConfigError


class Epochs:
    """So many passes over the training set; typed as `1e`, or `0.5e`.

    Raises:
        ConfigError: `number` is not finite and above 0.
    """

    __slots__ = ("number",)

    def __init__(self, number: float) -> None:
        if not 0 < number < float("inf"):
            raise ConfigError("epochs between two events must be above 0", expected="such as 1e", got=f"{number:g}e",
                              fix="1e")  # fmt: skip
        self.number = float(number)

    @classmethod
    def parse(cls, text: str) -> Epochs:
        """`2e` -> Epochs(2).

        Raises:
            ValueError: it is something else.
        """
        number = text.removesuffix("e")
        if number == text or not number.replace(".", "", 1).isdecimal() or float(number) == 0:
            raise ValueError(text)
        return cls(float(number))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epochs) and self.number == other.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __str__(self) -> str:
        return f"{Decimal(repr(self.number)):f}".removesuffix(".0") + "e"

    def __repr__(self) -> str:
        return f"Epochs({self.number:g})"


def in_steps(every: int | Epochs | None, steps_per_epoch: float) -> float | None:
    """Steps between two events; epochs need not have a whole number of them.

    A little less, or a multiple that is a whole number could be taken for one that is above it by a rounding error.
    """
    return every.number * steps_per_epoch * (1 - 1e-11) if isinstance(every, Epochs) else every
