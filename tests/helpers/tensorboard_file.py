"""What a run's TensorBoard file holds."""

import struct

from tensorboardX.proto import event_pb2


def values(run) -> dict:
    """{(tag, step): value} of the one file: length, checksum, event, checksum, ..."""
    (path,) = (run / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found |= {(v.tag, event.step): v for v in event.summary.value}
        data = data[16 + length :]
    return found
