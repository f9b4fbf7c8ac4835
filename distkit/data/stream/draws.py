"""Random numbers per sample as a pure function of (seed, position, name of the draw): the same bits on every device.

Counter-based: nothing is consumed and there is no state to save. The draw of a name at position p is output p of
splitmix64 (Steele, Lea and Flood 2014) started at a key that belongs to (seed, name). All of it is wrapping int64
arithmetic, which CPU and GPU do alike.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from distkit.errors import ConfigError


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
#: Keeps apart the draws of one name and position; any odd number unrelated to GAMMA works.
GAMMA_DRAW = _signed(0xD1342543DE82EF95)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
#: A float64 has 52 bits of mantissa behind its exponent; the first of them say which part of an octave it is in.
SEGMENT_BITS = 7
SEGMENT_SHIFT, FIRST_SEGMENT = 52 - SEGMENT_BITS, 1023 << SEGMENT_BITS


class Draws:
    """Draws for a batch of samples.

    Every draw is fresh for its name; asking twice for a name gives the same numbers twice. With `count` given there
    are that many draws per sample, and draw k is the same whatever the count; without it, draw 0.

    Args:
        seed: seed of the run, 0 to 2^63 - 1.
        positions: int64 [B], the samples' positions in the stream, on the device that shall draw.
    """

    def __init__(self, seed: int, positions: Tensor) -> None:
        self.seed = seed
        self.positions = positions

    def bits(self, name: str, count: int | None = None) -> Tensor:
        """64 random bits: int64 [B], or [B, count]."""
        return _xor_shift_(self._mixed(name, count), 31)

    def uniform(self, name: str, count: int | None = None) -> Tensor:
        """Uniform in [0, 1): float32 [B], or [B, count], multiples of 2^-24."""
        bits = _top_bits_(self._mixed(name, count), 24)
        return bits.to(torch.float32).mul_(2.0**-24)

    def integers(self, name: str, low: int, high: int, count: int | None = None) -> Tensor:
        """Uniform in low .. high - 1: int64 [B], or [B, count]; no integer is favoured by more than 2^-32.

        Raises:
            ConfigError: high - low is not in 1 .. 2^31.
        """
        span = high - low
        if not 1 <= span <= 2**31:
            raise ConfigError(
                f"the draw {name!r} has an impossible range", expected="1 <= high - low <= 2^31", got=f"{low} to {high}"
            )
        bits = _top_bits_(self._mixed(name, count), 32)
        return bits.mul_(span).bitwise_right_shift_(32).add_(low)

    def bernoulli(self, name: str, p: float, count: int | None = None) -> Tensor:
        """True with probability p, to 2^-32: bool [B], or [B, count].

        Raises:
            ConfigError: p is not in [0, 1].
        """
        if not 0 <= p <= 1:
            raise ConfigError(f"the draw {name!r} has an impossible probability", expected="0 <= p <= 1", got=p)
        return _top_bits_(self._mixed(name, count), 32) < round(p * 2**32)

    def normal(self, name: str, count: int | None = None) -> Tensor:
        """Standard normal: float32 [B], or [B, count]; quantiles are right to 1e-5, and end at +-7.1.

        Logarithms and cosines differ between devices in their last bits, so there are none here: the quantile function
        is a table, finer towards the tails, read with linear interpolation.
        """
        bits = self.bits(name, count)
        # an odd number below 2^41, exact in float64, whose bits are octave, segment and the place in the segment
        place = (bits >> 22).bitwise_and_((1 << 41) - 1).bitwise_or_(1).to(torch.float64).view(torch.int64)
        quantiles, steps = _quantiles(place.device)
        segment = (place >> SEGMENT_SHIFT).sub_(FIRST_SEGMENT)
        within = place.bitwise_and_((1 << SEGMENT_SHIFT) - 1).to(torch.float64).mul_(2.0**-SEGMENT_SHIFT)
        # product and sum apart: fused, they would round otherwise
        size = steps[segment].mul_(within).add_(quantiles[segment])
        return torch.where(bits < 0, -size, size).to(torch.float32)

    def _mixed(self, name: str, count: int | None) -> Tensor:
        """Fresh int64 [B] or [B, count]: splitmix64 without its last xor-shift, which leaves the top 31 bits alone."""
        counter = self.positions.mul(GAMMA).add_(_key(self.seed, name))
        if count is not None:
            counter = counter.unsqueeze(1) + torch.arange(count, device=counter.device).mul_(GAMMA_DRAW)
        _xor_shift_(counter, 30).mul_(MIX_1)
        return _xor_shift_(counter, 27).mul_(MIX_2)


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of |z| at the first place of each segment, and the way to that of the next: float64 [octaves x segments] each.

    A place x stands for the upper tail's probability x / 2^42, in (0, 0.5).
    """
    segments = 1 << SEGMENT_BITS
    places = [2.0**octave * (1 + part / segments) for octave in range(41) for part in range(segments)] + [2.0**41]
    sizes = torch.tensor([-NormalDist().inv_cdf(place * 2.0**-42) for place in places], dtype=torch.float64)
    return sizes[:-1].to(device), sizes.diff().to(device)


@lru_cache(maxsize=1024)
def _key(seed: int, name: str) -> int:
    message = seed.to_bytes(8, "little") + name.encode()
    digest = hashlib.blake2b(message, digest_size=8, person=b"distkit.draws").digest()
    return int.from_bytes(digest, "little", signed=True)


def _xor_shift_(x: Tensor, shift: int) -> Tensor:
    """x ^= x >>> shift; torch has only the arithmetic shift, so the sign's copies are masked away."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def _top_bits_(x: Tensor, count: int) -> Tensor:
    """The top `count` bits as a non-negative number, in place."""
    return x.bitwise_right_shift_(64 - count).bitwise_and_((1 << count) - 1)
