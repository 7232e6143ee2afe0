"""Options of the way between daemons and nodes: where one listens, whom it lets in, and which one is above it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from sidestepd.hosts import check_upper, host_and_port, is_loopback


class Section(BaseModel):
    """What all sections share: frozen, no unknown names, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UpstreamOptions(Section):
    """Where a relay hands its records on to."""

    address: str | None = Field(
        default=None, description="The daemon above, for sink.kind = upstream: tcp://HOST:PORT or ipc:///PATH."
    )
    context: Path | None = Field(
        default=None, description="Instead of it: a file that tells where it is, now or later."
    )
    key_file: Path | None = Field(
        default=None, description="Our key, for a daemon above on tcp: a client's, of `sidestep keygen`."
    )
    gather_s: float = Field(
        default=0.2,
        ge=0,
        le=5,
        description="So long is gathered what goes up as one message. The daemon above works the less, and hears "
        "later.",
    )

    @field_validator("address")
    @classmethod
    def _can_be_connected_to(cls, value: str | None) -> str | None:
        if value is not None:
            check_upper(value)
        return value

    @field_validator("context", "key_file")
    @classmethod
    def _wherever_we_are_started_again(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()


class ListenOptions(Section):
    """Where workers of other nodes are let in, and whom; those of this node always have a socket of their own."""

    key_file: Path | None = Field(
        default=None, description="The daemon's key pair, for tcp; `sidestep keygen` makes it."
    )
    clients: Path | None = Field(
        default=None, description="The list of public keys that are let in, for tcp; read again when it changes."
    )
    tcp: tuple[str, ...] = Field(
        default=(),
        validate_default=False,
        description="Addresses such as tcp://*:7711; beyond this machine only with key_file and clients.",
    )
    advertise: str | None = Field(
        default=None,
        description="The host name or address by which other nodes reach this one, if not its own name.",
    )
    context_file: Path | None = Field(
        default=None, description="Written when workers can connect: where this daemon is, for SIDESTEP_CONTEXT."
    )

    @field_validator("key_file", "clients", "context_file")
    @classmethod
    def _wherever_we_are_started_again(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("tcp", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(address.strip() for address in value.split(",") if address.strip())
        return value

    @field_validator("tcp")
    @classmethod
    def _asks_who_is_speaking(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        without = [f"listen.{name}" for name in ("key_file", "clients") if info.data.get(name) is None]
        for address in value:
            host, _ = host_and_port(address)
            if without and (len(without) == 1 or not is_loopback(host)):
                raise ValueError(
                    f"beyond this machine only with keys, and {' and '.join(without)} "
                    f"{'are' if len(without) > 1 else 'is'} not given: `sidestep keygen` makes what is needed"
                )
        return value


class JobOptions(Section):
    """How commands that one launcher started together, on one node or on many, find each other."""

    together: bool = Field(
        default=True, description="They make one run: the first has the daemon with it, other nodes have relays."
    )
    wait_s: float = Field(
        default=60.0, ge=0, description="So long a command waits for others that have not come, at start and end."
    )
