"""A trace at another rate: time warp, thinning and replication; sessions and prefix trees stay whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from semipd.core import FloatArray, InputError, IntArray
from semipd.trace.columns import Prefixes, Sessions, Trace, take

MAX_RATE_SCALE = 1e6
"""Rates may be scaled by this factor, up or down."""

MAX_REQUESTS = 50_000_000
SYSTEM_PROMPT_SHARE = 0.05
SYSTEM_PROMPT_REQUESTS = 16
"""Leading blocks of more than this share of all requests, and of more than so many, are taken for a system prompt."""


@dataclass(frozen=True, eq=False)
class Starts:
    """What arrives independently: a request, or a session with all its turns.

    ``first[k]``: row of the first request of start k, ascending. ``of[i]``: start of request i.
    """

    first: IntArray
    of: IntArray


def scale_rate(trace: Trace, factor: float) -> Trace:
    """Time warp: every arrival, and every delay of a session, divided by ``factor``: 2 gives twice the rate.

    Order and the coefficient of variation of the gaps stay; rate changes, think times and the daily shape are
    compressed with the rest. Raises InputError for a factor outside 1e-6 to 1e6.
    """
    check_rate_scale(trace.name, factor)
    if factor == 1:
        return trace
    sessions = trace.sessions
    return replace(
        trace,
        arrival_s=trace.arrival_s / factor,
        sessions=replace(sessions, delay_s=sessions.delay_s / factor) if sessions else None,
        operations=(*trace.operations, f"time warp, rate x {factor:g}"),
    )


def thin(trace: Trace, keep: float, seed: int = 0) -> Trace:
    """Keep each group of requests with probability ``keep``; the others are dropped as ``thinned``.

    A group is a session, or the requests whose prompts begin with the same blocks, or what both join; else a request
    alone. Blocks that begin more than 5 % of all prompts, and more than 16, are taken for a system prompt and do not
    join. The time axis stays. What a smaller ``keep`` leaves is part of what a larger one leaves. Raises InputError
    for a negative seed, a share that is not above 0 and up to 1, and when nothing is left.
    """
    if not 0 < keep <= 1:
        raise InputError(f"{trace.name}: thin: found {keep:g}, expected a share above 0 and up to 1")
    rng = generator(trace.name, seed, 0)
    if keep == 1:
        return trace
    group = np.unique(_groups(trace), return_inverse=True)[1]
    rows = np.flatnonzero(rng.random(int(group.max()) + 1)[group] < keep)
    if len(rows) == 0:
        raise InputError(f"{trace.name}: thin: found nothing left of {len(trace)} requests, expected a larger share")
    thinned = take(trace, rows, "thinned")
    return replace(thinned, operations=(*trace.operations, f"thinned to {keep:g}, seed {seed}"))


def replicate(trace: Trace, copies: int, jitter_s: float = 1.0, every_s: float = 0.0, seed: int = 0) -> Trace:
    """``copies`` of every request, the original included, counted in ``added``.

    Copy k starts k * ``every_s`` later: 0 lays them on top of each other, for that many times the rate, and the
    duration of the trace lays them end to end. Each start of a copy, a request or a session, is moved by its own
    uniform time from 0 to ``jitter_s``, without which arrivals would clump. A copy has block ids and sessions of its
    own. Raises InputError for a negative seed or time, for no copies, and for more than 50 million requests.
    """
    if not 1 <= copies <= MAX_REQUESTS // len(trace):
        most = MAX_REQUESTS // len(trace)
        raise InputError(f"{trace.name}: replicate: found {copies}, expected a number of copies from 1 to {most}")
    for name, value in (("jitter_s", jitter_s), ("every_s", every_s)):
        if not 0 <= value <= 1e9:
            raise InputError(f"{trace.name}: {name}: found {value:g}, expected 0 to 1e+09 s")
    rng = generator(trace.name, seed, 1)
    if copies == 1:
        return trace
    n, starts = len(trace), starts_of(trace)
    jitter = rng.uniform(0, jitter_s, (copies, len(starts.first)))
    jitter[0] = 0.0
    arrival_s = trace.arrival_s + jitter[:, starts.of] + every_s * np.arange(copies)[:, None]
    rows = np.tile(np.arange(n), copies)
    copy = np.repeat(np.arange(copies), n)
    done = f"replicated x {copies}, jitter {jitter_s:g} s" + (f", every {every_s:g} s" if every_s else "")
    many = replace(
        trace,
        arrival_s=np.zeros(copies * n),
        prompt_len=trace.prompt_len[rows],
        output_len=trace.output_len[rows],
        prefixes=_own_ids(trace.prefixes, rows, copy) if trace.prefixes else None,
        sessions=_own_sessions(trace.sessions, rows, copy) if trace.sessions else None,
        added=trace.added + (copies - 1) * n,
        operations=(*trace.operations, f"{done}, seed {seed}"),
    )
    return rebase(many, arrival_s.ravel())


def reblock(trace: Trace, block_tokens: int) -> Trace:
    """The prefixes in larger blocks: new ids, by first appearance, for each run of old blocks after the same prefix.

    Two prompts that agree in a part of a larger block only share nothing of it, so there is less reuse. Raises
    InputError unless ``block_tokens`` is a multiple of the trace's.
    """
    old = trace.prefixes
    if old is None or old.block_tokens == block_tokens:
        return trace
    times, rest = divmod(block_tokens, old.block_tokens)
    if rest or not times:
        raise InputError(
            f"{trace.name}: prefix blocks: found {old.block_tokens} tokens, expected a divisor of {block_tokens}"
        )
    known: dict[tuple[int, ...], int] = {}
    ids: list[int] = []
    offsets = [0]
    for start, stop in zip(old.offsets[:-1].tolist(), old.offsets[1:].tolist(), strict=True):
        blocks, parent = old.ids[start:stop].tolist(), -1
        for i in range(0, len(blocks), times):
            parent = known.setdefault((parent, *blocks[i : i + times]), len(known))
            ids.append(parent)
        offsets.append(len(ids))
    return replace(trace, prefixes=Prefixes(np.array(ids, dtype=np.int64), np.array(offsets), block_tokens))


def starts_of(trace: Trace) -> Starts:
    """The starts of a trace, in order of arrival."""
    n = len(trace)
    if trace.sessions is None:
        return Starts(np.arange(n), np.arange(n))
    index = trace.sessions.index
    owner = np.where(index >= 0, index, len(trace.sessions.names) + np.arange(n))
    _, first, of = np.unique(owner, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Starts(first[order], rank[of])


def rebase(trace: Trace, arrival_s: FloatArray) -> Trace:
    """The trace with those arrivals: in their order, equal ones as they were, and the first one at 0 s."""
    order: IntArray = np.argsort(arrival_s, kind="stable").astype(np.int64)
    arrival_s = arrival_s[order] - arrival_s[order[0]]
    return replace(
        trace,
        arrival_s=arrival_s,
        prompt_len=trace.prompt_len[order],
        output_len=trace.output_len[order],
        prefixes=trace.prefixes.take(order) if trace.prefixes else None,
        sessions=trace.sessions.take(order) if trace.sessions else None,
    )


def generator(name: str, seed: int, stream: int) -> np.random.Generator:
    """The random numbers of a seed, in a stream of one operation's own. Raises InputError for a negative seed."""
    if seed < 0:
        raise InputError(f"{name}: seed: found {seed}, expected an integer from 0")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream,))))


def check_rate_scale(name: str, factor: float) -> None:
    """Raises InputError for a factor outside 1e-6 to 1e6."""
    if not 1 / MAX_RATE_SCALE <= factor <= MAX_RATE_SCALE:
        raise InputError(f"{name}: rate scale: found {factor:g}, expected {1 / MAX_RATE_SCALE:g} to {MAX_RATE_SCALE:g}")


def _groups(trace: Trace) -> IntArray:
    """For every request a label that those of its sessions and prefix trees share."""
    label: IntArray = np.arange(len(trace))
    joins = []
    if trace.sessions is not None:
        joins.append(starts_of(trace).of)
    if trace.prefixes is not None:
        joins.append(_prefix_groups(trace.prefixes))
    while joins:
        before = label
        for group in joins:  # every request takes the lowest label of its group, until none changes
            lowest = np.full(int(group.max()) + 1, len(label))
            np.minimum.at(lowest, group, label)
            label = lowest[group]
        if np.array_equal(label, before):
            break
    return label


def _prefix_groups(prefixes: Prefixes) -> IntArray:
    """Groups of requests by their first blocks, as many as it takes to be no system prompt's; ends are alone."""
    n = len(prefixes.offsets) - 1
    counts = np.diff(prefixes.offsets)
    names, ids = np.unique(prefixes.ids, return_inverse=True)
    group = np.zeros(n, dtype=np.int64)
    final: IntArray = np.arange(n)  # alone, until a group claims the request
    active, depth = np.flatnonzero(counts > 0), 0
    while len(active):
        prefix = group[active] * len(names) + ids[prefixes.offsets[active] + depth]
        _, inverse, sizes = np.unique(prefix, return_inverse=True, return_counts=True)
        small = sizes[inverse] <= max(SYSTEM_PROMPT_SHARE * n, SYSTEM_PROMPT_REQUESTS)
        claimed, claimants = inverse[small], active[small]
        lowest = np.full(len(sizes), n)
        np.minimum.at(lowest, claimed, claimants)
        final[claimants] = lowest[claimed]
        group[active] = inverse
        depth += 1
        active = active[~small & (counts[active] > depth)]
    return final


def _own_ids(prefixes: Prefixes, rows: IntArray, copy: IntArray) -> Prefixes:
    """The prefixes of several copies, each with ids that no other has."""
    names, compact = np.unique(prefixes.ids, return_inverse=True)
    many = Prefixes(compact.astype(np.int64), prefixes.offsets, prefixes.block_tokens).take(rows)
    return replace(many, ids=many.ids + len(names) * np.repeat(copy, np.diff(many.offsets)))


def _own_sessions(sessions: Sessions, rows: IntArray, copy: IntArray) -> Sessions:
    """The sessions of several copies, named after the original and the copy's number."""
    index = sessions.index[rows]
    copies = int(copy[-1]) + 1
    names = (*sessions.names, *(f"{name}#{k}" for k in range(1, copies) for name in sessions.names))
    index = np.where(index >= 0, index + len(sessions.names) * copy, -1)
    return Sessions(index, sessions.turn[rows], sessions.delay_s[rows], names)
