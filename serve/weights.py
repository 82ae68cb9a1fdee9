"""A look into an adapter's weights without torch: are they all finite numbers?"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lit_ft.adapter import ADAPTER_WEIGHTS

MAX_HEADER = 10_000_000
"""Tens of thousands of tensors; parsing more could take gigabytes of memory."""

CHUNK = 1 << 22

# Of each type: how numpy reads its bits, and which bits are all set in NaN and infinity alone (the exponent).
_EXPONENT = {
    "F64": ("<u8", np.uint64(0x7FF0000000000000)),
    "F32": ("<u4", np.uint32(0x7F800000)),
    "F16": ("<u2", np.uint16(0x7C00)),
    "BF16": ("<u2", np.uint16(0x7F80)),
}


def not_finite(folder: Path) -> str:
    """Why the weights cannot be used; empty where they can.

    Reads safetensors' layout directly (8 bytes of header length, a JSON header, the tensors), since numpy has no
    bfloat16 and torch takes seconds to import. It reads piece by piece: a file that is mapped into memory and cut
    short meanwhile would end the whole server.
    """
    try:
        with (folder / ADAPTER_WEIGHTS).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError("its header is longer than the file, or than any adapter needs")
            header = json.loads(file.read(length))
            left = size - 8 - length
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                begin, end = tensor["data_offsets"]
                left -= end - begin
                if not 0 <= begin <= end <= size - 8 - length or left < 0:
                    raise ValueError(f"{name} lies outside of the file, or over another tensor")
                if tensor["dtype"] in _EXPONENT and not _finite(file, 8 + length + begin, end - begin, tensor["dtype"]):
                    return f"Its weights are broken: {name} holds numbers that are not finite (NaN or infinite)."
    except OSError as error:
        return f"Its weights cannot be read: {error.strerror or error}."
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError) as error:
        return f"Its weights cannot be read as safetensors ({error}). Publish it again."
    return ""


def _finite(file: BinaryIO, begin: int, length: int, dtype: str) -> bool:
    kind, exponent = _EXPONENT[dtype]
    file.seek(begin)
    while length > 0:
        piece = file.read(min(CHUNK, length))
        if not piece:
            raise ValueError("it is cut short")
        bits = np.frombuffer(piece, kind)
        if ((bits & exponent) == exponent).any():
            return False
        length -= len(piece)
    return True
