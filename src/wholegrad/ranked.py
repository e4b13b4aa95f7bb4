"""Steps that several processes take together: one plan for all, their tiles, and what comes of several slides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from wholegrad.errors import PlanError
from wholegrad.given import Given
from wholegrad.graph.graph import Graph, Kind
from wholegrad.plan.bands import bands
from wholegrad.plan.devices import DeviceRates
from wholegrad.plan.plan import Plan
from wholegrad.plan.planner import Request
from wholegrad.plan.traffic import Link, bucket_bytes
from wholegrad.run.distributed.agreement import agree, pixels_digest, plan_digest, tensors_digest, versions
from wholegrad.run.distributed.norms import BatchNorms, batch_norms
from wholegrad.run.distributed.ranks import Ranks, ranks_of, timeout_of, wire_of
from wholegrad.run.distributed.slides import combined
from wholegrad.run.distributed.wire import Wire
from wholegrad.run.whole_image import Outcome

RanksLike = object  # a number, (rows, columns), a ProcessGroup, a DeviceMesh or Ranks


def shared_request(ranks: RanksLike, graph: Graph, request: Request, columns: bool = False) -> Request:
    """The request that all ranks make alike, so that all get the same plan.

    Args:
        ranks: a number of ranks or their layout, to plan for processes that need not exist; or ``group=``.
        columns: whether bands must be of columns, so that all ranks go down the same rows.

    Raises:
        PlanError: no such layout.
    """
    size = (graph.image.outputs[0].rows, graph.image.outputs[0].cols)
    if isinstance(ranks, int) and not isinstance(ranks, bool) and ranks > 0:
        return replace(request, bands=bands(size, layout_of(size, ranks)))
    if isinstance(ranks, tuple) and len(ranks) == 2 and all(isinstance(n, int) and n > 0 for n in ranks):
        return replace(request, bands=bands(size, ranks))
    if isinstance(ranks, int | tuple):
        raise PlanError("ranks", f"is {ranks!r}", "give a number of ranks, (rows, columns) of blocks, or a group")
    group = ranks_of(ranks)
    assert group is not None and group.tiles is not None
    wire = wire_of(group.tiles, timeout_of(group, 0.0))
    shape = group.layout or ((1, group.count) if columns else layout_of(size, group.count, bool(group.shares)))
    if columns and shape[0] > 1:
        raise PlanError("layout", f"is {shape}, and predictions are of bands of columns", "leave it out")
    with wire.step():
        return _agreed(wire, replace(request, bands=bands(size, shape, group.shares), link=group.link))


def sharing(ranks: RanksLike) -> RanksLike:
    """What of ``ranks=`` decides a plan: nothing of a group whose ranks have an image each."""
    if ranks is None or isinstance(ranks, int | tuple):
        return ranks
    group = ranks_of(ranks)
    return None if group is None or group.tiles is None else group


def of_one_image(group: object) -> Ranks | None:
    """Of a group the ranks that share this image, for what is run forward only; None for this process alone."""
    ranks = ranks_of(group)
    return None if ranks is None or ranks.tiles is None else replace(ranks, slides=None)


def told_by_first(ranks: Ranks | None, make: Callable[[], str]) -> str:
    """What ``make`` gives on rank 0, where alone it is called; what it raises is raised on all."""
    if ranks is None or ranks.tiles is None:
        return make()
    wire = wire_of(ranks.tiles, timeout_of(ranks, 0.0))
    with wire.step():
        text = make().encode() if wire.rank == 0 else b""
        told = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else None
        return bytes(wire.meet(told)[0].tolist()).decode()


def of_batch(ranks: RanksLike) -> bool:
    """Whether batch norms take their statistics of several slides."""
    return isinstance(ranks, Ranks) and ranks.slides is not None and ranks.statistics == "batch"


def exchanged(ranks: RanksLike, graph: Graph) -> int:
    """Bytes that this process takes beside a step to bring the gradients of several slides together."""
    if ranks is None or isinstance(ranks, int | tuple):
        return 0
    group = ranks_of(ranks)
    assert group is not None
    sizes = [node.outputs[0].numel for node in graph.of_kind(Kind.PARAMETER) if node.needs_grad]
    return group.held + (0 if group.slides is None else bucket_bytes(sizes))


def layout_of(size: tuple[int, int], ranks: int, one_axis: bool = False) -> tuple[int, int]:
    """Bands along rows and along columns for so many ranks: those of the shortest cuts, hence of the smallest halos."""

    def cut(shape: tuple[int, int]) -> int:
        return (shape[0] - 1) * size[1] + (shape[1] - 1) * size[0]

    shapes = [(down, ranks // down) for down in range(1, ranks + 1) if ranks % down == 0]
    return min((shape for shape in shapes if not one_axis or min(shape) == 1), key=lambda each: (cut(each), each[1]))


def _agreed(wire: Wire, request: Request) -> Request:
    """The least room and the fewest workers of any rank, rank 0's rates, and what the rank holds that writes."""
    room = None if request.budget is None else request.budget - request.reserved
    mine: dict[str, Any] = {
        "room": room,
        "workers": request.workers,
        "rates": asdict(request.rates),
        "link": asdict(request.link),
    }
    text = json.dumps(mine | {"sink": [request.sink_bytes, request.sink_held]}).encode()
    told = wire.meet(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    found = [json.loads(bytes(each.tolist())) for each in told]
    rooms = [each["room"] for each in found if each["room"] is not None]
    if any(each["rates"].keys() != mine["rates"].keys() for each in found):
        raise PlanError("ranks", "have tiles on processors and on other devices", "give all ranks device= of one kind")
    rates, apart = type(request.rates).of(found[0]["rates"]), request.apart
    if apart is not None and isinstance(rates, DeviceRates):
        apart = replace(apart, across=rates.across, triton=None if apart.triton is None else rates.up_to)
    return replace(
        request,
        budget=request.reserved + min(rooms) if rooms else None,
        workers=min(each["workers"] for each in found),
        rates=rates,
        apart=apart,
        link=Link(**found[0]["link"]),
        sink_bytes=max(each["sink"][0] for each in found),
        sink_held=max(each["sink"][1] for each in found),
    )


@dataclass
class Together:
    """One step of this process with the others: in its tiles' group, and in its slides'."""

    tiles: Wire | None
    slides: Wire | None
    combine: str
    batch: bool = False  # whether batch norms take their statistics of all slides

    @staticmethod
    def of(group: object, made: Plan) -> Together:
        """How a plan runs in that group.

        Raises:
            PlanError: it was made for another number of ranks.
        """
        ranks = ranks_of(group)
        if ranks is None:
            ranks = Ranks()
        planned = 1 if made.bands is None else made.bands.ranks
        if planned != ranks.count:
            cause = f"is for {planned} ranks that share the image, and {ranks.count} run it"
            raise PlanError("plan", cause, "plan with ranks=group")
        wait = timeout_of(ranks, made.seconds)
        tiles = wire_of(ranks.tiles, wait) if ranks.tiles is not None and made.bands is not None else None
        slides = None if ranks.slides is None else wire_of(ranks.slides, wait)
        return Together(tiles, slides, ranks.combine, of_batch(ranks))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Open while the step runs: an error of one rank is raised on all."""
        with ExitStack() as stack:
            for wire in (self.slides, self.tiles):
                if wire is not None:
                    stack.enter_context(wire.step())
            yield

    def checked(
        self,
        made: Plan,
        tensors: Mapping[str, torch.Tensor],
        inputs: Given,
        seed: int | None,
        draw: Callable[[], int],
        norms: Mapping[int, str] | None = None,
    ) -> int:
        """The seed of the step, once all ranks have shown that they mean the same one.

        Raises:
            RankError: one does not; names it, and what differs.
        """
        if self.tiles is None and self.slides is None:
            return draw()
        trained = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter)}
        buffers = {name: tensor for name, tensor in tensors.items() if name not in trained}
        alike = {"version": versions(), "weights": tensors_digest(trained), "buffers": tensors_digest(buffers)}
        if self.slides is not None:
            order = BatchNorms.order(made, norms or {})
            agree(self.slides, {**alike, "way to combine slides": self.combine, "order of norms": str(order)})
            self._wait_for_the_largest(self.slides)
        if self.tiles is None:
            return draw()
        own = {"plan": plan_digest(made), **alike, "values": tensors_digest(inputs.values)}
        own["pixels"] = pixels_digest(inputs.sources)
        agree(self.tiles, {**own, "seed": str(seed)})
        first = self.tiles.meet(torch.tensor([draw()], dtype=torch.int64).view(torch.uint8))[0]
        return int(first.cpu().view(torch.int64).item())

    def norms(self, model: torch.nn.Module, made: Plan) -> dict[int, str]:
        """The batch norms whose statistics are those of all slides.

        Raises:
            PlanError: the plan holds maps whole, or a norm cannot be shared.
        """
        if not self.batch:
            return {}
        if made.strategy != "stream":
            raise PlanError("plan", f"is {made.strategy}, and statistics are of a batch", "plan with ranks=group")
        return batch_norms(model, made.graph)

    @staticmethod
    def _wait_for_the_largest(slides: Wire) -> None:
        """Slides differ in size: who has a small one waits as long as who has the largest would."""
        told = slides.meet(torch.tensor([slides.timeout], dtype=torch.float64).view(torch.uint8))
        slides.timeout = max(float(each.cpu().view(torch.float64).item()) for each in told)

    def meet(self) -> None:
        """Wait until all that share the image are here; an error of one is raised on all."""
        if self.tiles is not None:
            self.tiles.meet()

    def combined(self, outcome: Outcome, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> Outcome:
        """What this slide's step gives, with those of all others."""
        if self.slides is None:
            return outcome
        trained = {node.name: tensors[node.name] for node in graph.of_kind(Kind.PARAMETER) if node.needs_grad}
        return combined(self.slides, outcome, trained, self.combine)
