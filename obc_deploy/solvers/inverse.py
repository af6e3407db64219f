"""G ← G - G_:p (G_pp)⁻¹ G_p: after each eliminated index p, for a batch of rows at once.

A row's run is a pivoted Cholesky factorization of G = H⁻¹ whose pivot rule the caller owns. With
V = L⁻¹ G_p: and L Lᵀ = G_pp the update is G ← G - Vᵀ V, so the last few V are kept aside: a wanted
column is the stored one less a combination of them, and the stored matrix itself changes once in
`lazy` eliminations, by one matrix product. Indices that no longer matter are then dropped, their
places taken by indices from the end, so the work shrinks with what is left.
"""

from __future__ import annotations

import torch

from obc_deploy.solvers.problems import DampedProblem
from obc_deploy.solvers.settings import SolverSettings


class DowndatedInverse:
    """The inverses of a batch of rows, each with its own eliminated indices.

    Positions (not columns) name the places that are left; `column` maps them to the layer's
    columns. All rows keep the same number of positions.

    Nothing here waits for the device, but for `compact` where it must count what is left.

    Attributes:
        stored: (rows, size, size), the inverses without what is kept aside; symmetric.
        vectors: (rows, lazy, size), V; the first `kept` of each row count.
        kept: update vectors that `stored` lacks.
        column: (rows, size) int64, the layer column at each position.
        floor: (rows, size), a lower bound 1 / H_ii of G_ii whatever has been eliminated; it keeps
            rounding from turning a pivot negative.
    """

    def __init__(
        self,
        inverse: torch.Tensor,
        hessian_diagonal: torch.Tensor,
        *,
        lazy: int,
        owned: bool = False,
    ) -> None:
        """Start from H⁻¹.

        Args:
            inverse: (rows, size, size); may be an expanded view.
            hessian_diagonal: (rows, size), H_ii.
            lazy: update vectors to keep before the stored matrix changes.
            owned: whether `inverse` may be written to.
        """
        rows, size, _ = inverse.shape
        self.stored = inverse
        self._owned = owned
        self.vectors = inverse.new_empty(rows, lazy, size)
        self.kept = 0
        self._row = torch.arange(rows, device=inverse.device)[:, None]
        self.column = torch.arange(size, device=inverse.device).repeat(rows, 1)
        self.floor = hessian_diagonal.reciprocal()

    @classmethod
    def of_rows(
        cls, problem: DampedProblem, batch: slice, settings: SolverSettings
    ) -> DowndatedInverse:
        """What a batch of a dense layer's rows starts from; rows of one group share one matrix."""
        group = problem.group_of_row[batch]
        rows, cols = group.shape[0], problem.weight.shape[1]
        rows_of_group = problem.weight.shape[0] // problem.inverse.shape[0]
        first, last = batch.start // rows_of_group, (batch.stop - 1) // rows_of_group
        if first == last:
            start = problem.inverse[first].to(settings.dtype).expand(rows, cols, cols)
        else:
            start = problem.inverse[first : last + 1].to(settings.dtype)[group - first]
        diagonal = problem.hessian.diagonal(dim1=1, dim2=2)[group].to(settings.dtype)
        return cls(start, diagonal, lazy=settings.update_length(), owned=first != last)

    @property
    def size(self) -> int:
        """Positions left in each row."""
        return self.stored.shape[1]

    @property
    def lazy(self) -> int:
        """Eliminations after which `compact` must be called."""
        return self.vectors.shape[1]

    def diagonal(self) -> torch.Tensor:
        """G_ii at each position, (rows, size), as of the last `compact`."""
        return torch.maximum(self.stored.diagonal(dim1=1, dim2=2), self.floor)

    def diagonal_blocks(self, width: int) -> torch.Tensor:
        """G_BB of neighbouring positions, (width, width, rows, size / width), likewise."""
        stored = self.stored
        pairs = [(i, j) for i in range(width) for j in range(width)]
        blocks = [stored[:, i::width, j::width].diagonal(dim1=1, dim2=2) for i, j in pairs]
        return torch.stack(blocks).reshape(width, width, stored.shape[0], -1)

    def columns(self, position: torch.Tensor) -> torch.Tensor:
        """Columns of the present inverse at position (rows, p), as (rows, p, size)."""
        wanted = self.stored[self._row, position]
        if self.kept:
            vectors = self.vectors[:, : self.kept]
            at = _repeated(position, self.kept)
            wanted.baddbmm_(vectors.gather(2, at).mT, vectors, alpha=-1.0)
        return wanted

    def eliminate(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one index (rows, 1) of each row out.

        Returns:
            v = G_:p / √G_pp, (rows, size), and √G_pp, (rows, 1).
        """
        column = self.columns(position).squeeze(1)
        pivot = torch.maximum(column.gather(1, position), self.floor.gather(1, position)).sqrt_()
        vector = self.vectors[:, self.kept]
        torch.div(column, pivot, out=vector)
        self.kept += 1
        return vector, pivot

    def keep(self, vectors: torch.Tensor) -> None:
        """Subtract Vᵀ V; `vectors` is V, (rows, p, size)."""
        end = self.kept + vectors.shape[1]
        self.vectors[:, self.kept : end] = vectors
        self.kept = end

    def compact(
        self, dropped: torch.Tensor, *, width: int = 1, size: int | None = None
    ) -> torch.Tensor:
        """Update the stored matrix and shrink it by what was dropped.

        Args:
            dropped: (rows, size / width) bool, true where `width` neighbouring positions will not
                be asked for again. A row may keep some dropped positions, so that all stay equal.
            width: positions that stay together.
            size: new size / width, where all rows dropped equally many; None: what the fullest row
                needs, which the host waits to hear.

        Returns:
            (rows, new size / width) int64: which of the old places each new place holds.
        """
        vectors = self.vectors[:, : self.kept]
        if self._owned:
            self.stored.baddbmm_(vectors.mT, vectors, alpha=-1.0)
        else:
            self.stored = torch.baddbmm(self.stored, vectors.mT, vectors, alpha=-1.0)
            self._owned = True
        self.kept = 0

        if size is None:
            size = int((~dropped).sum(1).max())
        order, hole, source = _closing_moves(dropped, size)
        hole, source, places = (_widened(part, width) for part in (hole, source, order))
        size = places.shape[1]
        stored = self.stored
        if hole.shape[1]:
            # The matrix is symmetric: a moved index's row, in the new order, is its column too.
            moved = stored[self._row, source].gather(2, _repeated(places, hole.shape[1]))
            stored[:, :, :size][self._row, hole] = moved
            stored[:, :size].scatter_(2, _repeated(hole, size), moved.mT)
        self.stored = stored[:, :size, :size]
        self.vectors = self.vectors[:, :, :size]
        self.column = self.column.gather(1, places)
        self.floor = self.floor.gather(1, places)
        return order


def _closing_moves(
    dropped: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves that leave `size` places of each row: (order, hole, source), `source` goes into `hole`.

    There are as many as any row could need; the others move a place onto itself.
    """
    rows, before = dropped.shape
    in_tail = ~dropped[:, size:]
    per_row = in_tail.sum(1, keepdim=True)
    moves = min(size, before - size)
    place = torch.arange(size, device=dropped.device)
    order = place.repeat(rows, 1)
    hole = true_places(dropped[:, :size])[:, :moves]
    source = true_places(in_tail)[:, :moves] + size
    source = torch.where(place[:moves] < per_row, source, hole)
    return order.scatter_(1, hole, source), hole, source


def true_places(mask: torch.Tensor) -> torch.Tensor:
    """(rows, cols) int64: each row's places where the mask is true, in order, then the rest."""
    return torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)


def _repeated(index: torch.Tensor, times: int) -> torch.Tensor:
    """(rows, n) seen as (rows, times, n)."""
    return index[:, None, :].expand(-1, times, -1)


def _widened(places: torch.Tensor, width: int) -> torch.Tensor:
    if width == 1:
        return places
    within = torch.arange(width, device=places.device)
    return (places[:, :, None] * width + within).flatten(1)
