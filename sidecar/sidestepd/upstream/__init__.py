"""What a relay has in the place of delivery: it hands what lies in its spool on to the daemon above.

    ▓spool▓ ─▶ read ─▶ legs: one dialogue for each session ─▶ ENVELOPE ══ZMQ══▶ the daemon above, its intake
    deleted ◀── cursor ◀── settled ◀───────────── ACK for each session ◀──────┘

- frames go up uncut, under the sequences that their workers gave them: the gate above keeps each record once,
  however often a relay, its forwarder or the daemon above is killed
- the bytes of media have a connection of their own, on which metrics never wait
- sessions are introduced, told of and ended above as they are here; what was lost here is counted there
"""
