"""What can go wrong, whose fault it is, and whether it heals.

SidestepError
├── ProtocolError
│   ├── LocalProtocolError    we said something the wire does not allow
│   └── RemoteProtocolError   they did
├── UnsupportedValue          a value that no converter knows; the call goes on without it
└── SettingsError             a bad option, named together with its source

None of these leaves `log()`: there they are counted and said once. They reach a user from `init(strict=True)`
and from the daemon's command line.
"""


class SidestepError(Exception):
    """Anything that sidestep raises itself."""


class ProtocolError(SidestepError):
    """The two ends of the wire do not agree."""


class LocalProtocolError(ProtocolError):
    """This process built a message that the wire does not allow: our bug."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that are no message: its bug, its version, or an attack."""


class UnsupportedValue(SidestepError, TypeError):
    """A value that can not be logged. Its text says what it was and what to log instead."""


class SettingsError(SidestepError, ValueError):
    """An option that can not be used. Its text names the option, its value and where that came from."""
