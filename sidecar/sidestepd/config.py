"""Options: defaults, then the TOML file, then the environment, then the command line; the last word wins.

- everything is checked before any file is made or any process started
- a bad value names itself and where it came from; a name that nobody knows is an error with the nearest one
- an empty value is one that was not given, as it is for wandb
- what was resolved is written to the run directory as `config.json`: the other processes read only that
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
)

from sidestep.errors import SettingsError
from sidestepd.listening import JobOptions, ListenOptions, Section, UpstreamOptions
from sidestepd.quota import MOST_NAMES
from sidestepd.rules import operations

_RUN_ID = r"[A-Za-z0-9_][A-Za-z0-9_.=+@-]*"


class RunOptions(Section):
    """What the run is called. What is not given is left to the first `init()`, then to wandb."""

    id: str | None = Field(default=None, max_length=128, description="The run's id; made up when not given.")
    mode: Literal["offline", "online", "disabled"] = Field(
        default="offline",
        description="offline writes files for `sidestep sync`; online sends to W&B meanwhile; disabled runs the "
        "command without a daemon.",
    )
    resume: Literal["allow", "must", "never"] = Field(
        default="allow",
        description="Whether a run of this id may, must or must not be there: on the server, or offline (but for "
        "must) beside this one.",
    )
    project: str | None = Field(default=None, description="The W&B project.")
    entity: str | None = Field(default=None, description="The W&B user or team.")
    name: str | None = Field(default=None, description="The name shown for the run.")
    group: str | None = Field(default=None, description="The group of runs it belongs to.")
    job_type: str | None = Field(default=None, description="What kind of run it is: train, eval, ...")
    tags: tuple[str, ...] = Field(default=(), description="Tags; on the command line separated by commas.")
    notes: str | None = Field(default=None, description="A longer description.")
    sweep_id: str | None = Field(
        default=None, description="The sweep it belongs to, as `wandb agent` says. Such a run is online by itself."
    )
    dir: Path = Field(default=Path(), description="Where the folder `sidestep-runs` is made.")

    @field_validator("id")
    @classmethod
    def _names_a_file_too(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(_RUN_ID, value):
            raise ValueError("must be letters, digits and any of _ . = + @ -, and start with a letter, digit or _")
        return value

    @field_validator("project")
    @classmethod
    def _is_a_project_to_wandb(cls, value: str | None) -> str | None:
        if value is not None and (len(value) > 128 or any(sign in value for sign in "/\\#?%:")):
            raise ValueError("must have at most 128 characters, and none of / \\ # ? % :")
        return value

    @field_validator("tags", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(tag.strip() for tag in value.split(",") if tag.strip())
        return value

    @field_validator("mode", mode="before")
    @classmethod
    def _as_wandb_once_said(cls, value: object) -> object:
        return {"dryrun": "offline", "run": "online"}.get(value, value) if isinstance(value, str) else value

    @field_validator("resume", mode="before")
    @classmethod
    def _as_wandb_says(cls, value: object) -> object:
        return "allow" if value in ("auto", "true", "True", True) else value


class OrderOptions(Section):
    """How long rows wait, and for whom."""

    patience_s: float = Field(
        default=5.0, gt=0, description="A row waits at most this for a rank that has not moved past it."
    )
    capacity_rows: int = Field(
        default=10_000, gt=0, description="Rows held at once; above it the oldest leaves, counted as forced."
    )
    lease_s: float = Field(
        default=60.0, gt=0, description="A session that is not heard of for so long is no longer waited for."
    )
    relay_lease_s: float = Field(
        default=300.0,
        gt=0,
        description="The same for a session behind a relay that is not heard of, and for the relay.",
    )
    max_wait_s: float = Field(
        default=60.0, gt=0, description="A row of another axis waits at most this for a row of the main axis."
    )
    late_window_rows: int = Field(
        default=1000, ge=0, description="Among so many rows that left, a late value looks for its own."
    )


class IntakeOptions(Section):
    """How workers are served."""

    commit_interval_s: float = Field(
        default=0.01, gt=0, le=1, description="What arrives within this is written to disk together."
    )
    credit_bytes: int = Field(
        default=4 * 1024 * 1024,
        ge=1024 * 1024,
        description="A worker may have this much unacknowledged.",
    )
    flush_interval_s: float = Field(
        default=0.05, gt=0, le=60, description="Workers send at most once in this time."
    )
    heartbeat_s: float = Field(
        default=5.0, gt=0, le=600, description="A worker with nothing to say says so this often."
    )


class SpoolOptions(Section):
    """Where acknowledged records wait to be written into the run, and how much room they may take."""

    dir: Path | None = Field(
        default=None,
        description="A local disk for the databases. Without it: the run directory, or one that is found.",
    )
    max_bytes: int = Field(
        default=8 * 1024**3,
        ge=4 * 1024 * 1024,
        description="The spool's quota. From 70 % on workers are slowed, from 90 % on they keep what they have.",
    )
    reserve_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=0,
        description="What is left free on the disks of the spool and of wandb, beside what has yet to be written.",
    )
    blob_quota_bytes: int = Field(
        default=32 * 1024**3,
        ge=1024 * 1024,
        description="The bytes of media that wait may take this much; beyond it workers keep what they have. "
        "Files are not counted.",
    )
    ballast_bytes: int = Field(
        default=16 * 1024 * 1024,
        ge=0,
        description="Held by each of two files, which are given up so that a full disk can drain.",
    )


class DeliveryOptions(Section):
    """How the process that owns wandb is paced and watched."""

    poll_interval_s: float = Field(
        default=0.05, gt=0, le=10, description="The spool is looked at this often when nothing is due."
    )
    confirm_interval_s: float = Field(
        default=1.0, gt=0, le=600, description="How often rows are checked to be in the run for good."
    )
    stall_s: float = Field(
        default=60.0,
        gt=0,
        description="A delivery without progress for this long is killed and restarted.",
    )
    batch_rows: int = Field(
        default=500, gt=0, description="While catching up, about so many rows are decided in one commit."
    )
    max_names: int = Field(
        default=MOST_NAMES,
        gt=0,
        description="A run may have so many names; values of further ones are left out, and counted.",
    )
    media_threads: int = Field(
        default=2, gt=0, le=64, description="Images and other media are encoded in so many threads."
    )
    backoff_s: float = Field(
        default=30.0, gt=0, description="The longest pause before a delivery that died is started again."
    )


class SinkOptions(Section):
    """Where rows go."""

    kind: Literal["wandb", "jsonl", "upstream"] = Field(
        default="wandb",
        description="wandb; jsonl for `rows.jsonl` in the run directory; upstream for another daemon, to which "
        "this one is a relay.",
    )
    server: str | None = Field(
        default=None,
        pattern="^https?://",
        description="The address of the W&B server, if not wandb's own.",
    )
    ask_every_s: float = Field(
        default=15.0, gt=0, le=600, description="Online, how often the server is asked which rows it holds."
    )


class SamplerOptions(Section):
    """What is read of the machine beside the training. sidestepd/samplers/NAMES.md lists every name."""

    enabled: bool = Field(default=True, description="Read the machine at all: on or off.")
    gpu: bool = Field(default=True, description="NVIDIA GPUs, where there are any.")
    host: bool = Field(default=True, description="CPU, memory, disks, network.")
    own: bool = Field(default=True, description="What sidestep itself uses and holds.")
    torch: bool = Field(default=True, description="torch's allocator, in every worker that uses CUDA.")
    history: bool = Field(
        default=True, description="The newest samples go into the rows too, and not only to the System tab."
    )
    interval_s: float = Field(default=5.0, ge=0.5, lt=3600, description="How often most is read.")
    slow_interval_s: float = Field(
        default=30.0, ge=0.5, lt=3600, description="How often what changes seldom, or costs more, is read."
    )
    paths: tuple[str, ...] = Field(
        default=(), description="Further paths whose disks are watched; in the environment separated by commas."
    )
    samples_metric: str | None = Field(
        default=None, description="The metric that counts the training's samples so far, for the energy of each."
    )

    @property
    def torch_interval_s(self) -> float:
        """How often workers shall tell of torch's allocator; 0 for never."""
        return self.interval_s if self.enabled and self.torch else 0.0

    @field_validator("paths", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(path.strip() for path in value.split(",") if path.strip())
        return value


class ServeOptions(Section):
    """How `sidestep serve` keeps the runs that its workers name."""

    linger_s: float = Field(
        default=30.0, ge=0, description="A run is finished so long after its last worker left."
    )
    max_runs: int = Field(
        default=32, gt=0, le=64, description="Runs open at once; workers of further ones wait for their turn."
    )
    socket_mode: str = Field(
        default="600",
        pattern="^0?[0-7]{3}$",
        description="Who may connect to an ipc address, as chmod says it: 660 for the daemon's group too.",
    )
    metrics: str | None = Field(
        default=None,
        pattern=r"^\S+:\d{1,5}$",
        description="HOST:PORT of /metrics for Prometheus and of /healthz; nowhere when not given.",
    )


class WatchOptions(Section):
    """What only who hears all ranks can say: silence, death, stragglers, and values that are no number."""

    metrics: bool = Field(
        default=True, description="Rows of several ranks say how long their step took and who was slowest."
    )
    ranks_reported: bool = Field(
        default=True,
        description="They say how many ranks spoke; a run whose row log was lost is told by it what it holds.",
    )
    per_rank: int = Field(
        default=16, ge=0, description="With at most so many ranks, each one's straggler score is in the rows."
    )
    work_metric: str = Field(
        default="",
        description="A metric in which each rank logs how long it worked in a step; else the calls' times tell.",
    )
    alerts: bool = Field(
        default=True,
        description="What is found is told as alerts in the run; `sidestep status` shows it in any case.",
    )
    hangs: bool = Field(default=True, description="Tell of ranks that are silent, stalled or dead.")
    silent_s: float = Field(
        default=60.0,
        gt=0,
        description="A rank is silent after this, or after three times its longest pause if that is more.",
    )
    stalled_s: float = Field(
        default=300.0, gt=0, description="So long may all ranks say nothing while their processes live; likewise."
    )
    start_s: float = Field(
        default=1800.0,
        gt=0,
        description="So long instead while they have hardly begun, all or one of them: loading, compiling.",
    )
    longest_s: float = Field(
        default=1800.0,
        gt=0,
        description="However long they paused before, a checkpoint for instance, they are silent after this.",
    )
    stragglers: bool = Field(default=True, description="Tell of ranks that hold up the others.")
    straggler_share: float = Field(
        default=0.15, gt=0, description="A straggler needs this share more time than the median rank."
    )
    straggler_s: float = Field(default=30.0, ge=0, description="And has done so for this long.")
    not_finite: tuple[str, ...] = Field(
        default=("*loss*",),
        description="Tell when a metric of these names or patterns, in capitals or not, is NaN or infinite, once.",
    )

    @field_validator("not_finite", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value


class UnsafeOptions(Section):
    """Guards that a control experiment switches off to show that tests would notice; never for real runs."""

    duplicate_gate: bool = Field(default=True, description="A frame that was stored is not stored again.")
    row_log: bool = Field(
        default=True, description="Rows are written down before they are sent; what is lost is read from the run."
    )


def _known_operations(value: str | list[str]) -> str | list[str]:
    operations(value)
    return value


def _split(value: object) -> object:
    """Several reductions in one word, as a command line has them."""
    return value.split(",") if isinstance(value, str) and "," in value else value


Reduction = Annotated[str | list[str], BeforeValidator(_split), AfterValidator(_known_operations)]


class Config(Section):
    """All options, resolved."""

    run: RunOptions = Field(default_factory=RunOptions)
    order: OrderOptions = Field(default_factory=OrderOptions)
    intake: IntakeOptions = Field(default_factory=IntakeOptions)
    spool: SpoolOptions = Field(default_factory=SpoolOptions)
    delivery: DeliveryOptions = Field(default_factory=DeliveryOptions)
    sink: SinkOptions = Field(default_factory=SinkOptions)
    upstream: UpstreamOptions = Field(default_factory=UpstreamOptions)
    samplers: SamplerOptions = Field(default_factory=SamplerOptions)
    serve: ServeOptions = Field(default_factory=ServeOptions)
    listen: ListenOptions = Field(default_factory=ListenOptions)
    job: JobOptions = Field(default_factory=JobOptions)
    watch: WatchOptions = Field(default_factory=WatchOptions)
    reduce: dict[str, Reduction] = Field(
        default_factory=dict,
        description="How values of several ranks become one, by name or pattern; the first match counts.",
    )
    unsafe: UnsafeOptions = Field(default_factory=UnsafeOptions)
    sources: dict[str, str] = Field(
        default_factory=dict, description="Where each option was given, for messages and for `config.json`."
    )

    @classmethod
    def load(
        cls,
        toml: Path | None = None,
        environ: Mapping[str, str] = os.environ,
        overrides: Mapping[str, object] | None = None,
    ) -> Self:
        """Resolve all sources, or raise SettingsError. `overrides` maps `section.field` to what is set."""
        named = toml or (Path(environ["SIDESTEP_CONFIG"]) if environ.get("SIDESTEP_CONFIG") else None)
        given = (
            (_from_file(named) if named else {}) | _from_environment(environ) | _from_overrides(overrides or {})
        )
        if sweep := given.get("run.sweep_id"):  # whose server waits for what its runs come to
            given = {"run.mode": Given("online", sweep.source)} | given
        return cls._of(given)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read back what `to_json` wrote."""
        return cls.model_validate_json(text)

    def to_json(self) -> str:
        """All options, for the run directory's `config.json`."""
        return self.model_dump_json(indent=2) + "\n"

    def source(self, key: str) -> str:
        """Where `section.field` was given: a variable, a file, an option, or "default"."""
        return self.sources.get(key, "default")

    @classmethod
    def _of(cls, given: Mapping[str, Given]) -> Self:
        sources = {key: value.source for key, value in given.items()}
        try:
            config = cls.model_validate(_nested(given) | {"sources": sources})
        except ValidationError as error:
            raise SettingsError("\n".join(dict.fromkeys(_complaints(error, given)))) from None
        if config.is_relay and config.upstream.address is None and config.upstream.context is None:
            source = config.source("sink.kind")
            raise SettingsError(
                f"sink.kind = upstream (from {source}): needs upstream.address or upstream.context"
            )
        return config

    @property
    def is_relay(self) -> bool:
        """Whether another daemon makes rows of what comes."""
        return self.sink.kind == "upstream"


@dataclass(frozen=True, slots=True)
class Given:
    """A value and where it was given."""

    value: object
    source: str


SECTIONS: Mapping[str, type[Section]] = {
    name: spec.annotation
    for name, spec in Config.model_fields.items()
    if isinstance(spec.annotation, type) and issubclass(spec.annotation, Section)
}
"""The sections that have fields of their own: all but `reduce`, whose keys are names of metrics."""

KEYS = tuple(f"{section}.{field}" for section, model in SECTIONS.items() for field in model.model_fields)

_OTHER_NAMES = {
    "run.id": ("WANDB_RUN_ID",),
    "run.mode": ("WANDB_MODE", "SIDESTEP_MODE"),
    "run.resume": ("WANDB_RESUME",),
    "sink.server": ("WANDB_BASE_URL",),
    "run.project": ("WANDB_PROJECT",),
    "run.entity": ("WANDB_ENTITY",),
    "run.name": ("WANDB_NAME",),
    "run.group": ("WANDB_RUN_GROUP",),
    "run.job_type": ("WANDB_JOB_TYPE",),
    "run.tags": ("WANDB_TAGS",),
    "run.notes": ("WANDB_NOTES",),
    "run.sweep_id": ("WANDB_SWEEP_ID",),
    "run.dir": ("WANDB_DIR",),
}
_WORKERS_OWN = frozenset({"SIDESTEP_RUN_DIR", "SIDESTEP_JOB_SECRET"})
"""Variables that look like an option and are not: one leads workers to their run, one is never written down."""


def is_option(key: str) -> bool:
    """Whether there is such an option; what is reduced may have any name."""
    return key in KEYS or key.startswith("reduce.")


def variables(key: str) -> tuple[str, ...]:
    """The environment variables of an option, weakest first."""
    ours = "SIDESTEP_DIR" if key == "run.dir" else f"SIDESTEP_{key.replace('.', '_').upper()}"
    return (*_OTHER_NAMES.get(key, ()), ours)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    known = {name: key for key in KEYS for name in variables(key)}
    prefixes = tuple(f"SIDESTEP_{section.upper()}_" for section in SECTIONS)
    unknown = [name for name in environ if name.startswith(prefixes) and name not in known.keys() | _WORKERS_OWN]
    if unknown:
        raise SettingsError("\n".join(f"{name} is no option{_nearest(name, known)}" for name in unknown))
    return {key: Given(environ[name], name) for name, key in known.items() if environ.get(name)}


def _from_file(path: Path) -> dict[str, Given]:
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"can not read {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path} is no TOML: {error}") from None
    reduce = tables.pop("reduce", None)
    given = {key: Given(value, str(path)) for key, value in _flat(tables)}
    _refuse_unknown(given, str(path))
    given = {key: one for key, one in given.items() if one.value != ""}
    if reduce is not None and not isinstance(reduce, dict):
        return given | {"reduce": Given(reduce, str(path))}
    return given | {f"reduce.{name}": Given(value, str(path)) for name, value in (reduce or {}).items()}


def _from_overrides(overrides: Mapping[str, object]) -> dict[str, Given]:
    given = {
        key: value if isinstance(value, Given) else Given(value, "the command line")
        for key, value in overrides.items()
    }
    _refuse_unknown(given, "the command line")
    return given


def _refuse_unknown(keys: Iterable[str], source: str) -> None:
    unknown = [key for key in keys if not is_option(key)]
    if unknown:
        raise SettingsError(
            "\n".join(f"{source}: {key} is no option{_nearest(key, (*KEYS, 'reduce'))}" for key in unknown)
        )


def _flat(tables: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for section, fields in tables.items():
        if isinstance(fields, dict):
            yield from ((f"{section}.{field}", value) for field, value in fields.items())
        else:
            yield section, fields


def _nested(given: Mapping[str, Given]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in given.items():
        section, _, field = key.partition(".")
        if field:
            tables.setdefault(section, {})[field] = value.value
        else:
            tables[section] = value.value
    return tables


def _complaints(error: ValidationError, given: Mapping[str, Given]) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"][:2])
        value = given.get(key) or given[str(problem["loc"][0])]
        what = problem["input"] if key not in given else value.value
        why = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        yield f"{key} = {what} (from {value.source}): {why}"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
