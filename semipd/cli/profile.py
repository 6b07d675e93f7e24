"""``semipd profile``: measure all tables of a model through the executor that serves it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semipd.cli.needs import require
from semipd.cli.progress import watched
from semipd.cli.session import CutShortError, Session, note, show, show_json

if TYPE_CHECKING:
    from semipd.campaign import Subject
    from semipd.model_config import ModelConfig
    from semipd.profile_config import ProfileConfig

DEVICES = ("cuda", "cpu")
CPU_SMS = 16  # a CPU has no SMs: its partitions are names


def profile(
    ctx: typer.Context,
    model: Annotated[Path, typer.Option(metavar="FILE", help="The model, a YAML file as in configs/models.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The profile's folder.")],
    device: Annotated[str, typer.Option(help="Where to measure: cuda or cpu.")] = "cuda",
    prefill_sms: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="SMs of prefill in the splits to measure.")
    ] = None,
    holdout: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Random points to hold the cost model against."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn at random.")] = None,
    limit_s: Annotated[float | None, typer.Option(help="Be done after this many seconds, loading included.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML file instead of the defaults.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the configuration.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out has.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Measure a model's profile: each phase alone, both at once, fused batches; first coarsely, then where it errs."""
    from semipd.campaign import measure_profile
    from semipd.config import build, load, read_yaml
    from semipd.core import InputError
    from semipd.holdout import as_document, held_out
    from semipd.model_config import ModelConfig
    from semipd.profile import load_profile
    from semipd.profile_config import ProfileConfig

    begun_s = time.monotonic()
    session: Session = ctx.obj
    if device not in DEVICES:
        raise InputError(f"--device: found {device!r}; expected one of {', '.join(DEVICES)}")
    require("profile" if device == "cuda" else "profile --device cpu")
    described = load(model, ModelConfig)
    options = {
        "prefill_sms": f"[{prefill_sms}]" if prefill_sms is not None else None,
        "holdout": holdout,
        "seed": seed,
        "limit_s": limit_s,
    }
    given = tuple(f"{name}={value}" for name, value in options.items() if value is not None)
    data = ProfileConfig().model_dump() if config is None else read_yaml(config)
    found = build(data, ProfileConfig, "command line" if config is None else str(config), (*(sets or ()), *given))
    if device == "cpu" and found.num_blocks is None:
        raise InputError("num_blocks: missing; expected the KV blocks to take of this machine's memory")
    if (out / "profile.json").exists() and not resume:
        raise InputError(f"{out}: holds a profile; expected a new folder, or --resume to go on with it")
    if device == "cuda":
        from semipd.partition import Device

        Device(0).resource()  # says what is missing in one line, where torch would not
    from semipd.provenance import provenance

    work: dict[str, object] = {**described.model_dump(mode="json"), "page_size_tokens": found.block_size}
    about = provenance(work, session.command, device, CPU_SMS)
    sms = int(str(about["device_sms"]))
    with _subject(found, described, device, sms) as subject:
        note(f"loaded after {time.monotonic() - begun_s:.0f} s; {subject.num_blocks:,} KV blocks")
        result = measure_profile(subject, found, out, about, resume=resume, begun_s=begun_s, watched=watched, note=note)
    points = {name: len(table.points) for name, table in result.tables.items()}
    held = held_out(load_profile(out.resolve())) if result.usable else {}
    if as_json:
        show_json(
            {
                "complete": result.complete,
                "config": found.model_dump(mode="json"),
                "points": points,
                "overheads": asdict(result.overheads),
                "holdout": as_document(held),
            }
        )
    else:
        from semipd.report.holdout import profiled_report

        show(profiled_report(points, result.overheads, held))
    note(f"saved: {out}, after {time.monotonic() - begun_s:.0f} s")
    if result.interrupted:
        raise CutShortError(f"interrupted; go on with: {session.resume_command()}")
    if not result.complete:
        note(f"time limit reached; go on with: {session.resume_command()}")


@contextmanager
def _subject(config: ProfileConfig, model: ModelConfig, device: str, device_sms: int) -> Iterator[Subject]:
    """The model on the device, opened to be measured."""
    from semipd.areas import longest_sequence
    from semipd.campaign import Subject
    from semipd.padding import Padded, attention_queries, decode_sizes, prefill_sizes
    from semipd.sequences import pooled_prompts
    from semipd.tiles import SplitKeys
    from semipd.torch_executor import open_executor

    longest = longest_sequence(config)
    backends: dict[int, str] = {}
    with open_executor(
        model.model_copy(update={"max_positions": max(model.max_positions, longest)}),
        device="cuda" if device == "cuda" else "cpu",
        seed=config.seed,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        prefill_sms=config.prefill_sms,
        prefill_backend=lambda sms: backends.get(sms, "fa2"),
        prompts=pooled_prompts(model.vocab_size, longest, config.seed),
        blank_context=True,
    ) as executor:

        def use(sms: int, name: str) -> None:
            backends[sms] = name
            executor.engine.forget_prefill_plan(sms)

        kernels: dict[str, Any] = {}
        if device == "cuda":
            names = tuple(name for name in config.backends if name != "fa3-sized" or model.head_dim == 128)
            kernels = {"backends": names or ("fa2",), "use_backend": use}
            kernels |= {"decode_backend": "fa2", "mixed_backend": "fa2"}
            heads = {name: getattr(model, name) for name in ("query_heads", "kv_heads", "head_dim")}
            kernels["split_keys"] = SplitKeys(**heads)
        padded = Padded(
            batch=decode_sizes(config.max_num_seqs),
            tokens=prefill_sizes(config.max_num_batched_tokens),
            queries=attention_queries(model.query_heads // model.kv_heads) if device == "cuda" else 1,
        )
        yield Subject(
            executor, model, device_sms, executor.num_blocks, forget=executor.forget, padded=padded, **kernels
        )
