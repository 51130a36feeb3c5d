"""IDX files as MNIST and its kin have them, made of arrays."""

import gzip
import struct


def encoded(array, kind=8):
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, files, compressed=True, prefix=""):
    folder.mkdir(exist_ok=True, parents=True)
    for name, array in files.items():
        content = array if isinstance(array, bytes) else encoded(array)
        if compressed:
            (folder / f"{prefix}{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{prefix}{name}").write_bytes(content)
