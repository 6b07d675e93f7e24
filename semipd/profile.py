"""Profiles: what one model costs on one device, as a folder of measured tables (docs/profiles.md)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from semipd.contention import Scales
from semipd.core import InputError
from semipd.overheads import NO_OVERHEADS, Overheads
from semipd.padding import NOT_PADDED, Padded
from semipd.points import DecodePoint, HybridPoint, MixedPoint, Point, PrefillPoint, RaggedPoint
from semipd.table_cost import TableCost
from semipd.table_files import SweepTable, read_points, read_provenance, read_table
from semipd.tables import Tables
from semipd.tiles import SplitKeys

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class ProfileHeader:
    """What profile.json says.

    ``layers`` is how many layers the model has; the tables hold one layer's times. ``kv_bytes_per_token`` counts all
    layers. The KV cache gets what ``weights_bytes`` leave of ``device_memory_bytes``. ``overheads``: host time that is
    in no table; none when the file says nothing. ``padded``: the sizes that batches were padded to. ``split_keys``: by
    which rule, if it is known. ``model``: what was run, as in configs/models, if it was a model.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: Name
    description: str
    device: Name
    device_sms: Positive
    layers: Positive
    kv_bytes_per_token: Positive
    device_memory_bytes: Positive
    weights_bytes: Annotated[int, Field(ge=0)]
    overheads: Overheads = NO_OVERHEADS
    padded: Padded = NOT_PADDED
    model: dict[str, Any] | None = None
    split_keys: SplitKeys | None = None


@dataclass(frozen=True, kw_only=True)
class Profile(ProfileHeader):
    """A profile: its header, where it lies and its tables; those of fused and of ragged batches may be missing."""

    folder: Path
    prefill: SweepTable[PrefillPoint]
    decode: SweepTable[DecodePoint]
    hybrid: SweepTable[HybridPoint]
    mixed: SweepTable[MixedPoint] | None = None
    ragged: SweepTable[RaggedPoint] | None = None

    def cost(self) -> TableCost:
        """Cost model of these tables, worked out once. Raises InputError when a partition or a point is missing."""
        return self._cost

    @cached_property
    def _cost(self) -> TableCost:
        return TableCost(
            Tables.of(
                self.prefill.points,
                self.decode.points,
                self.hybrid.points,
                self.mixed.points if self.mixed else (),
                self.ragged.points if self.ragged else (),
                device_sms=self.device_sms,
                layers=self.layers,
                padded=self.padded,
                scales=Scales.of(self.weights_bytes, self.kv_bytes_per_token),
                waves=self.split_keys.waves if self.split_keys else None,
                source=str(self.folder),
            )
        )

    def prefill_backend(self, sms: int) -> str:
        """The attention kernel that prefill on a partition was measured with; of several the one fastest most often.

        Raises KeyError for a partition that was not measured.
        """
        fastest: dict[tuple[int, int], PrefillPoint] = {}
        for point in self.prefill.points:
            place = point.tokens, point.mean_context
            if point.sms == sms and (place not in fastest or point.median_ms < fastest[place].median_ms):
                fastest[place] = point
        if not fastest:
            raise KeyError(f"no prefill was measured on {sms} SMs")
        return Counter(point.backend for point in fastest.values()).most_common(1)[0][0]


def shipped_profiles() -> dict[str, Path]:
    """Folders of the profiles that come with the package, by name (``h200/gqa-64-8-128``)."""
    root = Path(__file__).resolve().parent / "profiles"
    folders = sorted(path.parent for path in root.glob("*/*/profile.json"))
    return {folder.relative_to(root).as_posix(): folder for folder in folders}


def load_profile(name: str | Path) -> Profile:
    """Read and check a profile: a shipped one by its name, else a folder.

    Raises InputError naming file, row and field of whatever is missing or malformed; an unknown name lists the
    shipped profiles.
    """
    shipped = shipped_profiles()
    folder = shipped.get(str(name), Path(name))
    if not folder.is_dir():
        raise InputError(
            f"profile: found {str(name)!r}; expected a folder or one of {', '.join(shipped) or 'none shipped'}"
        )
    header = _header(folder / "profile.json")
    prefill = _table(folder / "prefill.csv", PrefillPoint, header, ("sms",))
    decode = _table(folder / "decode.csv", DecodePoint, header, ("sms",))
    hybrid = _table(folder / "hybrid.csv", HybridPoint, header, ("prefill_sms", "decode_sms"))
    for row, point in enumerate(hybrid.points, 2):
        both = point.prefill_sms + point.decode_sms
        if point.mode == "split" and both > header.device_sms:
            raise InputError(
                f"{folder / 'hybrid.csv'}: row {row}: prefill_sms + decode_sms: found {both}; expected at most the "
                f"device's {header.device_sms}"
            )
    mixed = _begun(folder / "mixed.csv", MixedPoint)
    ragged = _begun(folder / "ragged.csv", RaggedPoint)
    said = {field.name: getattr(header, field.name) for field in fields(ProfileHeader)}
    return Profile(**said, folder=folder, prefill=prefill, decode=decode, hybrid=hybrid, mixed=mixed, ragged=ragged)


def _header(path: Path) -> ProfileHeader:
    try:
        return TypeAdapter(ProfileHeader).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected the profile's description") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            raise InputError(f"{path}: not JSON ({first['ctx']['error']}); expected an object") from None
        if first["type"] == "missing":
            raise InputError(f"{path}: {field}: missing; expected a value") from None
        if first["type"] == "unexpected_keyword_argument":
            nested = {"overheads": Overheads, "padded": Padded, "split_keys": SplitKeys}
            of = nested.get(str(first["loc"][0]), ProfileHeader) if len(first["loc"]) > 1 else ProfileHeader
            names = ", ".join(name.name for name in fields(of))
            raise InputError(f"{path}: {field}: unknown; expected only {names}") from None
        if first["type"] == "value_error":
            raise InputError(f"{path}: {field}.{first['ctx']['error']}") from None
        expected = first["msg"].replace("Input should", "expected to")
        raise InputError(f"{path}: {field or 'the whole'}: found {first['input']!r}; {expected}") from None


def _begun(path: Path, cls: type[Point]) -> SweepTable[Point] | None:
    """A table that may be missing, or have no row yet."""
    return SweepTable(tuple(read_points(path, cls)), read_provenance(path)) if path.exists() else None


def _table(path: Path, cls: type[Point], header: ProfileHeader, sizes: tuple[str, ...]) -> SweepTable[Point]:
    """A table whose partitions fit the device that the header names."""
    table = read_table(path, cls)
    for row, point in enumerate(table.points, 2):
        for field in sizes:
            if getattr(point, field) > header.device_sms:
                raise InputError(
                    f"{path}: row {row}: {field}: found {getattr(point, field)}; expected at most the device's "
                    f"{header.device_sms}"
                )
    return table
