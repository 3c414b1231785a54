"""Ways to merge: every one gets the modules that the files have at each site, and gives the result's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.verbs.merge.methods.coefficients import average, model_stock, slerp
from lorasurgery.verbs.merge.methods.compat import as_kohya, as_peft
from lorasurgery.verbs.merge.methods.elementwise import elementwise
from lorasurgery.verbs.merge.methods.projection import projected
from lorasurgery.verbs.merge.options import DENSE, PEFT, SUM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.site import Site
    from lorasurgery.verbs.merge.inputs import Weighted
    from lorasurgery.verbs.merge.merging import Merging
    from lorasurgery.verbs.merge.sums import Sums

    Way = Callable[[Merging, Sums, Site, Sequence[Weighted]], "Module | None"]

_COEFFICIENTS = {"average": average, "slerp": slerp, "model-stock": model_stock}


def combine(run: Merging, sites: Mapping[Site, Sequence[Weighted]], sums: Sums) -> list[Module]:
    """The modules of the result, in the order of the sites."""
    way = _way(run)
    addable = ((site, sums.addable(members)) for site, members in sites.items())
    made = (way(run, sums, site, members) for site, members in addable if members)
    return [module for module in made if module is not None]


def _way(run: Merging) -> Way:
    options = run.options
    if options.compat is not None:
        return as_peft if options.compat == PEFT else as_kohya
    if options.method in DENSE:
        return elementwise
    if options.method in ("orthogonal", "remove"):
        return projected
    if options.method == SUM:
        return lambda run, sums, site, members: sums(site, members, [run.options.factor] * len(members))
    rule = _COEFFICIENTS[options.method]

    def linear(run: Merging, sums: Sums, site: Site, members: Sequence[Weighted]) -> Module | None:
        return sums(site, members, [factor * run.options.factor for factor in rule(run, members)])

    return linear
