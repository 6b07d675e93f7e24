"""What steps cost and when they end, compiled: where a simulated replay spends its time (csrc/steps.hpp)."""

from collections.abc import Sequence

from semipd.core import FloatArray

class Axis:
    """The measured values of one variable of a grid, ascending; beyond ``low`` and ``high`` is outside the grid.

    A number between two values is weighted by its distance to them, or with ``log`` by that of the logarithm of it
    and an ``offset``.
    """

    def __init__(self, values: Sequence[float], low: float, high: float, log: bool, offset: float = 0.0) -> None: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...

CTAS_OF_SM: int
"""Of flashinfer's fa2 kernels that an SM runs at once."""

class Waves:
    """Attention of prompts by flashinfer's fa2 kernel: where its keys are best split, and how long it takes.

    Its constants are an H200's (docs/results/split-kv.md). ``workspace_bytes``: room for partial results. Can be
    pickled. Raises ValueError for impossible heads, and for no prompts or SMs.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, workspace_bytes: int) -> None: ...
    def tile_rows(self, new_tokens: Sequence[int]) -> int:
        """Rows of a tile, which has one for each token and each query head that shares keys."""
    def partial_bytes(self, rows: int) -> int:
        """What flashinfer's planner sets aside for partial results of a tile of each KV head, in float32 with a sum."""
    def chunks(self, new_tokens: Sequence[int], kv_lens: Sequence[int], sms: int) -> int:
        """See ``semipd.tiles.prefill_chunks``."""
    def seconds(self, new_tokens: Sequence[int], context_lens: Sequence[int], sms: int) -> float:
        """An estimate for one layer, of what depends on how tiles and keys are dealt."""

class Grid:
    """Multilinear interpolation between points of a rectangular grid: exact on it, clamped to its edge outside.

    ``values`` are numbers, or equally long vectors, in row-major order of the axes. Can be pickled. Raises ValueError
    unless there is a point at every combination.
    """

    def __init__(self, axes: Sequence[Axis], values: FloatArray) -> None: ...
    @property
    def axes(self) -> list[Axis]: ...
    def number(self, *place: float) -> tuple[float, bool]:
        """The number at a place, and whether the place is outside. Raises TypeError for a grid of vectors."""

    def vector(self, *place: float) -> tuple[FloatArray, bool]:
        """The vector at a place, and whether the place is outside."""

class Curve:
    """Decode step time of one batch in one situation: piecewise linear between the knots, flat beyond them.

    Outside ``low`` to ``high`` KV tokens is outside the grid; ``outside``: everywhere is.
    """

    def __init__(self, kv_tokens: FloatArray, seconds: FloatArray, low: float, high: float, outside: bool) -> None: ...
    def at(self, kv_tokens: int, more: int, steps: int) -> tuple[FloatArray, int]:
        """Seconds of so many steps, each reading ``more`` tokens more than the one before; how many are outside."""

    def at_speed(self, grid: Grid, low: float, high: float, *place: float) -> Curve:
        """This curve with the time at each knot divided by what a grid of vectors has for it at a place.

        ``low`` and ``high`` are those of the new curve.

        Raises ValueError unless the vectors have a number for each knot.
        """

class Boundaries:
    """When the steps of a run in flight end, as what they take changes under way.

    A *stretch* is a time over which prices hold; it may begin within a step, of which the share that is left then goes
    on at the new price. Ends are added up one by one, as those of single steps would be.
    """

    begin_s: float
    """When the first step begins."""

    def __init__(self, start_s: float, steps: int) -> None: ...
    def reached(self, now_s: float) -> int:
        """Boundaries reached by now, one at this moment included."""

    def leave(self, now_s: float) -> tuple[int, int, int]:
        """Leave the present stretch now, or at its last boundary if that comes first.

        How many steps it worked on, how many boundaries have been reached, and how many are left.
        """

    def price(self, seconds: FloatArray) -> tuple[float, float]:
        """Seconds of each of the next steps, of those that are left: the new stretch.

        The last boundary known then (minus infinity without one), and the end of the run: infinite while that is
        further than was priced.
        """

    def price_evenly(self, seconds: float, steps: int) -> tuple[float, float]:
        """Likewise, for so many steps that take the same."""

    def stop(self, now_s: float) -> tuple[float, float]:
        """End at the first boundary from now on, and that is now at one other than the start; as ``price`` returns."""

    def ends_s(self) -> FloatArray:
        """All boundaries that are known."""
