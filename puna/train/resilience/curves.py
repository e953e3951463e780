"""A run's curves for TensorBoard: `metrics.jsonl`, followed, as files of events.

Whoever watches writes them, not the training: that neither waits for them nor imports anything for them at a restart. The
log is cut back when a run goes back; the same steps then come again, and TensorBoard is told to forget them (a session
that starts at the first of these steps), so that a run is one curve through all its faults.

A file of events is a row of records: length (8 bytes), its checksum, content, its checksum; the checksum is CRC-32C,
turned by 15 bits and with a constant added (TensorFlow's TFRecord). The content is the protocol buffer `Event`: 1 the
time, 2 the step, 3 the format's version, 5 the values (tag and number), 7 the session.
"""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"  # in the run's
METRICS = "metrics.jsonl"
_VERSION = b"brain.Event:2"
_START = b"\x08\x01"  # SessionLog: status = START


class Curves:
    """The curves of the run in `folder`. `follow` now and then; each process that follows has a file of its own."""

    def __init__(self, folder: Path):
        self.metrics, self.into = folder / METRICS, folder / FOLDER
        self.into.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self.file = (self.into / name).open("ab")
        self._add(b"\x1a" + _sized(_VERSION))
        self.begun = False  # whether older files' curves were superseded
        self.place, self.last, self.step = 0, b"", 0  # bytes that were read, the last line of them, and its step

    def follow(self) -> None:
        """Add the lines that came. Where the log was cut, what followed is forgotten and read again."""
        content = self.metrics.read_bytes() if self.metrics.is_file() else b""
        if content[: self.place][-len(self.last) :] != self.last or len(content) < self.place:
            self.place, self.last, self.begun = 0, b"", False
        for line in content[self.place :].splitlines(keepends=True):
            if not line.endswith(b"\n"):  # it is being written
                break
            self.place, self.last = self.place + len(line), line
            self._line(line)
        self.file.flush()

    def _line(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            return
        if not self.begun or step <= self.step:
            self._add(_step(step) + b"\x3a" + _sized(_START))
        self.begun, self.step = True, step
        numbers = [(key, value) for key, value in values.items() if key != "step" and _is_number(value)]
        summary = b"".join(b"\x0a" + _sized(_value(key, value)) for key, value in numbers)
        self._add(_step(step) + b"\x2a" + _sized(summary))

    def _add(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        self.file.write(length + _checksum(length) + event + _checksum(event))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(tag: str, number: float) -> bytes:
    return b"\x0a" + _sized(tag.encode()) + b"\x15" + struct.pack("<f", number)


def _step(step: int) -> bytes:
    return b"\x10" + _varint(step)


def _sized(content: bytes) -> bytes:
    return _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _table()


def _checksum(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
