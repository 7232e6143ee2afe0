"""What can go wrong, whose fault it is, and whether it heals.

SidestepError  (wandb's `Error`)
├── ProtocolError
│   ├── LocalProtocolError    we said something the wire does not allow
│   └── RemoteProtocolError   they did
├── UnsupportedValue          a value that no converter knows; the call goes on without it
├── SettingsError             a bad option, named together with its source
├── NeedsWandb                something that only wandb itself can do, and it is not installed
├── CommError                 wandb's names, for the `except` clauses of scripts: nothing here raises them
│   └── AuthenticationError
├── UsageError
│   └── UnsupportedError
└── ConfigError

None of these leaves `log()`: there they are counted and said once. They reach a user from `init(strict=True)`,
from what needs wandb itself, and from the daemon's command line.
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


class NeedsWandb(SidestepError, AttributeError):
    """A worker without wandb can not do this. Its text says what to do."""


class CommError(SidestepError):
    """wandb: the server could not be reached. Here the daemon waits for it."""


class AuthenticationError(CommError):
    """wandb: the key was refused. Here the daemon says so, and keeps the rows."""


class UsageError(SidestepError):
    """wandb: a call that makes no sense. Here it is said once."""


class UnsupportedError(UsageError):
    """wandb: something it does not have."""


class ConfigError(SidestepError):
    """wandb: an entry of the configuration was changed. Here it may be."""


Error = SidestepError
"""wandb's name for it."""
