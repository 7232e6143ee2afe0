"""The bounds of everything on the wire, enforced where it is made and again where it arrives.

A frame above what the daemon accepts would disconnect its sender, be resent, and disconnect it again for
ever; so the worker refuses before it accepts, and the daemon's own bounds are never met by an honest peer.
"""

VERSION = 1
"""The protocol spoken here. A daemon speaks this and the one before; 1 is the first."""
OLDEST_VERSION = 1

MAX_RECORD_BYTES = 256 * 1024
"""One packed record: one `log()` call. About 7,000 scalars with names of 20 characters.

Every entry of a list or a map takes a byte at least, so this bounds what decoding one can cost: 20 MB.
"""
MAX_CHUNK_BYTES = 255 * 1024
"""Bytes of media in one record: two such records fit into a frame."""
MAX_FRAME_BYTES = 512 * 1024
"""The body of one FRAME: records are joined until the next one would not fit."""
MAX_FRAME_RECORDS = 65_536
MAX_CONTROL_BYTES = 64 * 1024
"""The body of every other message."""
MAX_ENVELOPE_BYTES = 1024 * 1024
"""The body of an ENVELOPE: a full frame always fits, with small ones beside it."""
MAX_ENVELOPE_MESSAGES = 1024
"""Handled in one go, while others wait."""
MAX_PARTS = 2
"""Header and body. A message with any other number of parts is no message."""

MAX_NAME_CHARS = 512
"""A metric's name, a stage's, a host's: whatever names something."""
MAX_TEXT_CHARS = 4096
"""What is said to people: why something was refused."""
MAX_DEPTH = 32
"""Containers inside containers in one value."""
MAX_REASONS = 256
"""Reasons in a count of what was dropped."""
END_OF_SEQUENCES = 2**63
"""Sequences and counters lie below: they fit the signed integers of every store."""
END_OF_STEPS = 2**61
"""Steps that are given lie below; those counted on from there, or from a launch's base, may lie beyond."""
