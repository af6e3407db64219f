"""Two networks of one graph side by side: what compression changed for the layers after it.

The dense and the compressed network run over the calibration samples together and stop where
something is to be measured or changed, so a whole network takes one pass, not one a layer, as long
as the activations at the stops fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from obc_deploy.capture import Network, get_tensor, set_tensor
from obc_deploy.corrections import Moments, MomentStream, corrected_moments
from obc_deploy.data import Batches
from obc_deploy.errors import CalibrationError
from obc_deploy.folding import BatchNorm, find_batch_norms
from obc_deploy.layers import Layer

ACTIVATION_MEMORY = 4 * 2**30
"""Bytes of activations of both networks that are kept between stops, unless told otherwise."""

_Values = dict[fx.Node, Any]
_See = Callable[[Any, Any], None]


class _Walker(fx.Interpreter):
    """Runs a stretch of a graph on values that are kept outside; parameters are always fresh."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.nodes = list(module.graph.nodes)
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        self._ends: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for source, node in last.items():
            self._ends[node].append(source)

    def begin(self, inputs: tuple[Tensor, ...]) -> _Values:
        """The values before the first node: the inputs."""
        names = [node for node in self.nodes if node.op == "placeholder"]
        return dict(zip(names, inputs, strict=True))

    def arguments_of(self, node: fx.Node, values: _Values) -> tuple[Any, ...]:
        """What a node is about to be called with."""
        self.env = values
        self._fetch(node)
        arguments: tuple[Any, ...] = self.fetch_args_kwargs_from_env(node)[0]
        return arguments

    def output_of(self, node: fx.Node, values: _Values) -> Any:
        """What a node is about to give; the values stay as they are."""
        self.env = dict(values)
        self._fetch(node)
        return self.run_node(node)

    def step(self, node: fx.Node, values: _Values) -> None:
        """Run one node; drop the values that nothing after it reads."""
        if node.op in ("placeholder", "get_attr", "output"):
            return
        self.env = values
        self._fetch(node)
        value = self.run_node(node)
        if node.users:
            values[node] = value
        for source in self._ends[node]:
            values.pop(source, None)

    def _fetch(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                self.env[source] = self.run_node(source)


class PairedMoments:
    """Channel by channel, mean and variance of the same values in both networks.

    Attributes:
        differ: whether any value did.
    """

    def __init__(self) -> None:
        self.differ = False
        self._streams = MomentStream(), MomentStream()

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Add a batch, channels in the second dimension."""
        self.differ = self.differ or not torch.equal(dense, compressed)
        for stream, values in zip(self._streams, (dense, compressed), strict=True):
            stream.add(values)

    def moments(self) -> tuple[Moments, Moments]:
        """Those of the dense and of the compressed network."""
        return self._streams[0].moments(), self._streams[1].moments()


class PairedNetworks:
    """The dense and the compressed network side by side, both stopped before one node.

    The compressed network's weights may change while they wait: what comes after is computed with
    the new ones. Activations of as many batches as fit `memory` wait in memory; the other batches
    run again from their inputs at every stop.
    """

    def __init__(
        self,
        dense: Network,
        compressed: Network,
        batches: Batches,
        *,
        memory: int = ACTIVATION_MEMORY,
    ) -> None:
        """Both networks before their first node.

        Args:
            dense: the dense network.
            compressed: a branch of it, the same graph.
            batches: the calibration batches.
            memory: bytes of activations to keep between stops.
        """
        self._networks = (_Walker(dense.module), _Walker(compressed.module))
        self._dense, self._module = dense.module, compressed.module
        self._position = {node.name: index for index, node in enumerate(self._networks[1].nodes)}
        self._batches = batches
        self._memory = memory
        self.device = next((p.device for p in dense.module.parameters()), torch.device("cpu"))
        self._at = 0
        self._kept: dict[int, tuple[_Values, _Values]] = {}

    def inputs(self, layer: Layer, see: Callable[[Tensor, Tensor], None]) -> None:
        """Show a layer's inputs in both networks; both go on to its first call and stop before it.

        A layer with several calls is seen in all of them, its own weight as it is now.

        Raises:
            CalibrationError: the networks are past the layer.
        """
        sites = self._sites(layer)
        self._advance(sites[0], sites, see)

    def reestimate(self, until: Layer | None = None) -> int:
        """Give the batch norms up to a layer's first call their statistics, in network order.

        Each gets what `corrections.reestimate_batch_norms` aims at: the dense network's normalised
        mean and deviation on the samples. Those that see what the dense ones see stay unchanged.

        Returns:
            The number of batch norms passed.
        """
        end = len(self._position)
        if until is not None:
            end = min(self._position[name] for name in until.call_sites)
        passed = 0
        for norm in find_batch_norms(self._module):
            place = self._position[norm.node.name]
            if not self._at <= place < end:
                continue
            self._restore(norm, place)
            passed += 1
        return passed

    def _restore(self, norm: BatchNorm, place: int) -> None:
        pair = PairedMoments()
        self._advance(place, [place], pair.add)
        mean = get_tensor(self._dense, norm.mean_name)
        variance = get_tensor(self._dense, norm.variance_name)
        if pair.differ:
            wanted, found = pair.moments()
            new = corrected_moments(norm, found, wanted, mean, variance)
            mean, variance = new.mean.to(mean), new.variance.to(variance)
        set_tensor(self._module, norm.mean_name, mean)
        set_tensor(self._module, norm.variance_name, variance)

    def output_moments(self, layer: Layer, channel: int) -> PairedMoments:
        """Moments of a layer's outputs in both networks; both stop before its first call.

        A layer with several calls is seen in all of them.

        Args:
            layer: a layer of the graph.
            channel: the dimension of its output that channels run over.

        Raises:
            CalibrationError: the networks are past the layer.
        """
        pair = PairedMoments()

        def see(dense: Tensor, compressed: Tensor) -> None:
            pair.add(dense.movedim(channel, 1), compressed.movedim(channel, 1))

        sites = self._sites(layer)
        self._advance(sites[0], sites, see, outputs=True)
        return pair

    def _sites(self, layer: Layer) -> list[int]:
        sites = sorted(self._position[name] for name in layer.call_sites)
        if sites[0] < self._at:
            raise CalibrationError(
                f"layer '{layer.name}' lies behind the place that both networks have come to; take "
                "layers in the order in which they run"
            )
        return sites

    def _advance(
        self, stop: int, watched: Sequence[int], see: _See, *, outputs: bool = False
    ) -> None:
        """Run every batch up to the node `stop`, and, on a copy, on to the last watched node.

        `see` is shown the first argument of each watched node in both networks, or its output.
        """
        kept, self._kept = self._kept, {}
        room = self._memory
        inputs = iter(self._batches) if len(kept) < len(self._batches) else None
        with torch.no_grad():
            for index in range(len(self._batches)):
                batch = None if inputs is None else next(inputs)
                values = kept.pop(index, None)
                start = self._at
                if values is None:
                    assert batch is not None
                    placed = tuple(tensor.to(self.device) for tensor in batch)
                    values = (self._networks[0].begin(placed), self._networks[1].begin(placed))
                    start = 0
                for place in range(start, stop):
                    self._step(place, values)
                size = _bytes(values)
                if size <= room:
                    room -= size
                    self._kept[index] = values
                ahead = (dict(values[0]), dict(values[1]))
                for place in range(stop, max(watched) + 1):
                    if place in watched:
                        see(*self._look(place, ahead, outputs=outputs))
                    if place < max(watched):
                        self._step(place, ahead)
        self._at = stop

    def _look(
        self, place: int, values: tuple[_Values, _Values], *, outputs: bool
    ) -> tuple[Any, Any]:
        dense, compressed = (
            walker.output_of(walker.nodes[place], each)
            if outputs
            else walker.arguments_of(walker.nodes[place], each)[0]
            for walker, each in zip(self._networks, values, strict=True)
        )
        return dense, compressed

    def _step(self, place: int, values: tuple[_Values, _Values]) -> None:
        for walker, each in zip(self._networks, values, strict=True):
            walker.step(walker.nodes[place], each)


def _bytes(values: Sequence[_Values]) -> int:
    """Memory that values take, what they share counted once."""
    storages: dict[int, int] = {}
    for each in values:
        for node, value in each.items():
            if node.op == "get_attr":
                continue
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, Tensor):
                    storage = part.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
