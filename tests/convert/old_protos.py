"""The messages of SINGA and Fluid as their own .proto files define them, for Google's protobuf.

Independent of gpuckpt: their descriptors are made here, field by field, from
src/proto/common.proto of SINGA 0.1 to 0.3 and paddle/fluid/framework/framework.proto.
"""

from __future__ import annotations

from typing import Any

import pytest

descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2", reason="needs protobuf")
descriptor_pool = pytest.importorskip("google.protobuf.descriptor_pool", reason="needs protobuf")
message_factory = pytest.importorskip("google.protobuf.message_factory", reason="needs protobuf")

Field = descriptor_pb2.FieldDescriptorProto


def _messages(package: str, messages: dict[str, list[tuple]]) -> dict[str, Any]:
    """Classes of messages; a field is (name, number, label, type or message, packed)."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto2"
    )
    for name, rows in messages.items():
        message = file.message_type.add(name=name)
        for row in rows:
            field = message.field.add(name=row[0], number=row[1], label=row[2])
            if isinstance(row[3], str):
                field.type, field.type_name = Field.TYPE_MESSAGE, f".{package}.{row[3]}"
            else:
                field.type = row[3]
            if row[4:]:
                field.options.packed = row[4]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in messages
    }


_MANY, _ONE = Field.LABEL_REPEATED, Field.LABEL_REQUIRED
_singa = _messages(
    "singa",
    {
        "BlobProto": [
            ("shape", 1, _MANY, Field.TYPE_INT32),
            ("data", 2, _MANY, Field.TYPE_FLOAT, True),
        ],
        "BlobProtos": [
            ("id", 2, _MANY, Field.TYPE_INT32),
            ("version", 3, _MANY, Field.TYPE_INT32),
            ("name", 4, _MANY, Field.TYPE_STRING),
            ("blob", 5, _MANY, "BlobProto"),
        ],
    },
)
_unpacked = _messages(
    "unpacked",
    {
        "BlobProto": [
            ("shape", 1, _MANY, Field.TYPE_INT32, True),
            ("data", 2, _MANY, Field.TYPE_FLOAT),
        ],
        "BlobProtos": [
            ("version", 3, _MANY, Field.TYPE_INT32, True),
            ("name", 4, _MANY, Field.TYPE_STRING),
            ("blob", 5, _MANY, "BlobProto"),
        ],
    },
)
_fluid = _messages(
    "paddle",
    # An enum is the same on the wire.
    {
        "TensorDesc": [
            ("data_type", 1, _ONE, Field.TYPE_INT32),
            ("dims", 2, _MANY, Field.TYPE_INT64),
        ]
    },
)
BlobProtos, UnpackedBlobProtos = _singa["BlobProtos"], _unpacked["BlobProtos"]
TensorDesc = _fluid["TensorDesc"]
