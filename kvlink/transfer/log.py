"""The structured log of transfers: one logger, and fields that programs can read.

Each record of the logger `kvlink.transfer` has `event` (below) and `endpoint`, and those of
`transfer_id` (hex), `peer`, `path`, `reason`, ... that it has something to say about. What happens
to every transfer is DEBUG, what happens to links INFO, refusals and corrupted data WARNING.

    handler = logging.StreamHandler()
    handler.setFormatter(kvlink.transfer.log.JsonFormatter())
    logging.getLogger("kvlink.transfer").addHandler(handler)
"""

from __future__ import annotations

import datetime
import json
import logging
from typing import Any

logger = logging.getLogger("kvlink.transfer")

EVENTS = (
    "granted", "offered", "begun", "posted", "refused", "arrived", "failed", "ended", "released",
    "adopted",    "link_up", "link_down", "reconnected", "reconnect_failed", "handshake_refused",
)  # fmt: skip

# What every record has; the rest are fields.
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def event(level: int, name: str, text: str, *arguments: object, **fields: Any) -> None:
    """Logs `text % arguments` with fields, and with `event=name`."""
    if logger.isEnabledFor(level):
        fields["event"] = name
        logger.log(level, text, *arguments, extra=fields, stacklevel=2)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Values that JSON does not know become text."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        found: dict[str, Any] = {
            "time": when.isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        found |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)
