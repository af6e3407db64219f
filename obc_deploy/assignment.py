"""Which scheme each layer gets: the default, what is skipped, what is named layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from obc_deploy.errors import SchemeError
from obc_deploy.layers import Layer, select_layers
from obc_deploy.schemes import DENSE, Scheme, as_scheme
from obc_deploy.solvers import check_scheme


def resolve_schemes(
    layers: Sequence[Layer],
    scheme: Scheme,
    *,
    skip: Iterable[str] = (),
    layer_schemes: Mapping[str, Scheme | str] | None = None,
    fallback: Scheme | None = None,
) -> dict[str, Scheme]:
    """Each layer's scheme: the default, less what is skipped, with what is named layer by layer.

    Args:
        layers: the network's layers.
        scheme: what every layer gets.
        skip: names or shell patterns of layers that stay dense; one may stand alone.
        layer_schemes: schemes by name or shell pattern; later ones win.
        fallback: what layers get whose shape the default scheme does not divide.

    Raises:
        LayerError: a name matches nothing.
        SchemeError: a scheme does not divide a layer and there is no fallback.
    """
    chosen = {layer.name: scheme for layer in layers}
    explicit: set[str] = set()
    for pattern in (skip,) if isinstance(skip, str) else skip:
        for layer in select_layers(layers, pattern):
            chosen[layer.name] = DENSE
            explicit.add(layer.name)
    for pattern, text in (layer_schemes or {}).items():
        for layer in select_layers(layers, pattern):
            chosen[layer.name] = as_scheme(text)
            explicit.add(layer.name)
    misfits: list[tuple[Layer, SchemeError]] = []
    for layer in layers:
        try:
            check_scheme(
                chosen[layer.name], rows=layer.rows, cols=layer.cols, channels=layer.channels,
                name=layer.name,
            )  # fmt: skip
        except SchemeError as error:
            if fallback is None or layer.name in explicit:
                misfits.append((layer, error))
            else:
                chosen[layer.name] = fallback
    if misfits:
        names = [layer.name for layer, _ in misfits]
        rest = f" ({len(names)} layers: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
        fix = (
            f"leave such layers out with --skip '{names[0]}', or give them another scheme with "
            f"--fallback {scheme.quantization or 'w8a8'}"
        )
        raise SchemeError(f"{misfits[0][1]}{rest if len(names) > 1 else ''}; {fix}") from misfits[
            0
        ][1]
    return chosen


def fixed_schemes(
    layers: Sequence[Layer],
    *,
    skip: Iterable[str] = (),
    layer_schemes: Mapping[str, Scheme | str] | None = None,
) -> dict[str, Scheme]:
    """Schemes of the layers that were named one by one: a search has no say in them.

    Arguments and errors as in `resolve_schemes`.
    """
    chosen: dict[str, Scheme] = {}
    for pattern in (skip,) if isinstance(skip, str) else skip:
        chosen |= {layer.name: DENSE for layer in select_layers(layers, pattern)}
    for pattern, text in (layer_schemes or {}).items():
        chosen |= {layer.name: as_scheme(text) for layer in select_layers(layers, pattern)}
    for layer in layers:
        if layer.name in chosen:
            check_scheme(
                chosen[layer.name], rows=layer.rows, cols=layer.cols, channels=layer.channels,
                name=layer.name,
            )  # fmt: skip
    return chosen
