"""Families of levels: which kinds of schemes a search may choose from.

    families := family ("," family)*
    family   := kind | quant | kind "+" quant | "dense"
    kind     := "unstructured" | "block4" | "block4x2" | N ":" M

A kind without a sparsity stands for all levels of its grid: "block4+w8a8" is 4-block sparsity at
every level, with 8-bit weights and activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obc_deploy.database.levels import UNSTRUCTURED_LEVELS, block4_sparsities, sparsity_grid
from obc_deploy.errors import SchemeError
from obc_deploy.schemes import BLOCK_SIZE, NM, Block4, Quantization, Scheme, Unstructured

if TYPE_CHECKING:
    from obc_deploy.database.outline import LayerOutline

GRAMMAR = (
    "families are e.g. 'block4+w8a8,w8a8': unstructured, block4, block4x2 or N:M, alone or "
    "with '+' and a quantization, or a quantization alone, or dense; joined by commas"
)
_BLOCKS = {block.kind: block.together for block in (Block4(0.5), Block4(0.5, together=2))}
_KINDS = ("unstructured", *_BLOCKS)


@dataclass(frozen=True)
class Family:
    """One kind of schemes.

    Attributes:
        kind: a pattern without its sparsity for all its levels, one `NM` pattern, or None.
        quantization: what weights and activations are stored in, or None.
    """

    kind: str | NM | None
    quantization: Quantization | None

    @classmethod
    def parse(cls, text: str) -> Family:
        """Read one family's text.

        Raises:
            SchemeError: it is no family.
        """
        head, plus, rest = text.strip().partition("+")
        try:
            if head.strip() in _KINDS:
                return cls(head.strip(), Scheme.parse(rest).quantization if plus else None)
            scheme = Scheme.parse(text.strip())
        except SchemeError as error:
            raise SchemeError(f"cannot read family '{text}': {error}; {GRAMMAR}") from error
        if isinstance(scheme.pattern, Unstructured | Block4):
            raise SchemeError(
                f"family '{text}' names one sparsity; leave it out ('{str(scheme).split('@')[0]}') "
                "for all levels, or give the scheme itself with --scheme"
            )
        return cls(scheme.pattern, scheme.quantization)

    def __str__(self) -> str:
        parts = [str(part) for part in (self.kind, self.quantization) if part is not None]
        return "+".join(parts) or "dense"

    def levels(self, outline: LayerOutline) -> tuple[Scheme, ...]:
        """The family's schemes that a layer's shape allows, sparsest last; may be none."""
        quantization = self.quantization
        if quantization and quantization.group and outline.cols % quantization.group:
            return ()
        if self.kind is None:
            return (Scheme(None, quantization),)
        if isinstance(self.kind, NM):
            fits = outline.channels % self.kind.m == 0
            return (Scheme(self.kind, quantization),) if fits else ()
        if self.kind in _BLOCKS:
            together = _BLOCKS[self.kind]
            if outline.channels % BLOCK_SIZE or outline.rows // outline.groups % together:
                return ()
            levels = (Block4(s, together) for s in block4_sparsities())
            return tuple(Scheme(level, quantization) for level in levels)
        grid = sparsity_grid(UNSTRUCTURED_LEVELS)
        return tuple(Scheme(Unstructured(s), quantization) for s in grid)


def as_families(families: str | Iterable[str | Family]) -> tuple[Family, ...]:
    """Families from comma separated text, or from a list of texts and families.

    Raises:
        SchemeError: a text that is no family, or no family at all.
    """
    parts = families.split(",") if isinstance(families, str) else tuple(families)
    found = [part if isinstance(part, Family) else Family.parse(part) for part in parts]
    if not found:
        raise SchemeError(f"no family to choose from: {GRAMMAR}")
    return tuple(dict.fromkeys(found))
