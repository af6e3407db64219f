"""Schemes: what may be done to one layer, and the grammar that writes it down.

    scheme   := pattern | quant | pattern "+" quant | "dense"
    pattern  := "unstructured@" S | "block4@" S | "block4x2@" S | N ":" M
    quant    := "w" BITS ["g" GROUP] ["a" BITS] ["-asym"]

The same text is used on the command line, in file names, in tables and in code:
`str(Scheme.parse(text))` is the canonical form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from obc_deploy.errors import SchemeError

BLOCK_SIZE = 4
"""Input channels in a block: what one VNNI or SDOT instruction multiplies and adds at once."""

GRAMMAR = (
    "a scheme is 'dense', a pattern ('unstructured@0.9', 'block4@0.9', 'block4x2@0.9', '2:4'), "
    "a quantization ('w8a8', 'w4g128', 'w3-asym'), or both joined by '+' ('block4@0.9+w8a8')"
)


def _fraction(sparsity: float) -> str:
    return f"{sparsity:.6f}".rstrip("0").rstrip(".")


def _check_sparsity(sparsity: float, pattern: str) -> None:
    if not 0.0 < sparsity < 1.0:
        raise SchemeError(
            f"sparsity {sparsity:g} in '{pattern}@{sparsity:g}' is not a fraction of zeros between "
            f"0 and 1 (90 % zeros is '{pattern}@0.9')"
        )


@dataclass(frozen=True)
class Unstructured:
    """Any weight of the layer may be zero; `sparsity` is the layer's fraction of zeros."""

    sparsity: float

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity, "unstructured")

    def __str__(self) -> str:
        return f"unstructured@{_fraction(self.sparsity)}"

    @property
    def density(self) -> float:
        """Fraction of weights that stay."""
        return 1.0 - self.sparsity


@dataclass(frozen=True)
class Block4:
    """Four consecutive input channels of a row at one kernel position live or die together.

    With `together` 2 they do so in two rows at once, so that a kernel loads them once for both.
    """

    sparsity: float
    together: int = 1

    def __post_init__(self) -> None:
        if self.together not in (1, 2):
            raise SchemeError(
                f"'{self.kind}' asks for blocks that {self.together} output channels share; "
                "'block4' and 'block4x2' work"
            )
        _check_sparsity(self.sparsity, self.kind)

    @property
    def kind(self) -> str:
        """The pattern without its sparsity."""
        return "block4" if self.together == 1 else f"block4x{self.together}"

    def __str__(self) -> str:
        return f"{self.kind}@{_fraction(self.sparsity)}"

    @property
    def density(self) -> float:
        """Fraction of weights that stay."""
        return 1.0 - self.sparsity


@dataclass(frozen=True)
class NM:
    """At most `n` non-zeros in each `m` consecutive input channels."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise SchemeError(
                f"'{self.n}:{self.m}' keeps {self.n} of {self.m} weights; N:M needs 0 < N < M "
                "(NVIDIA's sparse tensor cores read '2:4')"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Fraction of weights that stay."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1.0 - self.density


Pattern: TypeAlias = Unstructured | Block4 | NM


@dataclass(frozen=True)
class Quantization:
    """The grids of a layer's weights and, where `activation_bits` is given, of its input.

    Weight grids are per output channel (row), or per `group` consecutive columns of a row;
    symmetric (zero point 0, codes in ±(2^(bits-1) - 1)) unless `asymmetric`.
    """

    weight_bits: int
    group: int | None = None
    activation_bits: int | None = None
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise SchemeError(
                f"'w{self.weight_bits}' asks for {self.weight_bits}-bit weights; 2 to 8 work"
            )
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise SchemeError(
                f"'a{self.activation_bits}' asks for {self.activation_bits}-bit activations; "
                "2 to 8 work (leave 'a' out for float activations)"
            )
        if self.group is not None and self.group < 2:
            raise SchemeError(
                f"'g{self.group}' is no group of columns; 2 or more work, e.g. 'w4g128'"
            )

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group is not None else ""
        activations = f"a{self.activation_bits}" if self.activation_bits is not None else ""
        return f"w{self.weight_bits}{group}{activations}{'-asym' if self.asymmetric else ''}"

    @property
    def code_min(self) -> int:
        """Smallest weight code (int8 storage, whatever the bits)."""
        return -(1 << (self.weight_bits - 1)) + (0 if self.asymmetric else 1)

    @property
    def code_max(self) -> int:
        """Largest weight code."""
        return (1 << (self.weight_bits - 1)) - 1


_NUMBER = r"[0-9]*\.?[0-9]+"
_PATTERN = re.compile(
    rf"(?:(?P<kind>unstructured|block4)(?:(?<=4)x(?P<together>\d+))?@(?P<sparsity>{_NUMBER})"
    r"|(?P<n>\d+):(?P<m>\d+))"
)
_QUANT = re.compile(r"w(?P<w>\d+)(?:g(?P<g>\d+))?(?:a(?P<a>\d+))?(?P<asym>-asym)?")


def _parse_pattern(text: str, whole: str) -> Pattern:
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise SchemeError(f"'{text}' in scheme '{whole}' is no pattern; {GRAMMAR}")
    if match["kind"] is None:
        return NM(int(match["n"]), int(match["m"]))
    sparsity = float(match["sparsity"])
    if match["kind"] == "unstructured":
        return Unstructured(sparsity)
    return Block4(sparsity, int(match["together"] or 1))


def _parse_quantization(text: str, whole: str) -> Quantization:
    match = _QUANT.fullmatch(text)
    if match is None:
        raise SchemeError(f"'{text}' in scheme '{whole}' is no quantization; {GRAMMAR}")
    return Quantization(
        weight_bits=int(match["w"]),
        group=int(match["g"]) if match["g"] else None,
        activation_bits=int(match["a"]) if match["a"] else None,
        asymmetric=match["asym"] is not None,
    )


@dataclass(frozen=True)
class Scheme:
    """What is done to one layer: a pattern, a quantization, both (in that order) or neither."""

    pattern: Pattern | None = None
    quantization: Quantization | None = None

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme's text.

        Raises:
            SchemeError: the text does not follow the grammar, or names an impossible value.
        """
        stripped = text.strip()
        if stripped == "dense":
            return cls()
        first, plus, second = stripped.partition("+")
        if plus:
            return cls(_parse_pattern(first, text), _parse_quantization(second, text))
        if _QUANT.fullmatch(first):
            return cls(None, _parse_quantization(first, text))
        if _PATTERN.fullmatch(first):
            return cls(_parse_pattern(first, text), None)
        raise SchemeError(f"cannot read scheme '{text}': {GRAMMAR}")

    def __str__(self) -> str:
        return "+".join(str(part) for part in (self.pattern, self.quantization) if part) or "dense"

    @property
    def is_dense(self) -> bool:
        """Nothing is done to the layer."""
        return self.pattern is None and self.quantization is None

    @property
    def skips_zeros(self) -> bool:
        """There is a pattern of zeros, which a runtime may skip."""
        return self.pattern is not None

    @property
    def density(self) -> float:
        """Fraction of weights that stay (1 without a pattern)."""
        return 1.0 if self.pattern is None else self.pattern.density

    @property
    def weight_bits(self) -> int:
        """Bits a stored weight takes (32 without quantization)."""
        return 32 if self.quantization is None else self.quantization.weight_bits

    @property
    def activation_bits(self) -> int:
        """Bits of the layer's input (32 where activations stay float)."""
        quantization = self.quantization
        return 32 if quantization is None else quantization.activation_bits or 32


DENSE = Scheme()


def as_scheme(scheme: Scheme | str) -> Scheme:
    """A scheme from itself or from its text."""
    return scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)


def changes_between(schemes: Iterable[Scheme]) -> int:
    """How often a layer with zeros to skip follows one without, or the reverse."""
    return sum(before.skips_zeros != after.skips_zeros for before, after in pairwise(schemes))
