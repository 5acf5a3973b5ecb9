"""Messages that parse and mean harm: good ones with a few of their fields as nobody would fill them."""

from __future__ import annotations

import random
from collections.abc import MutableMapping
from typing import TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)
_SIGNED = {FieldDescriptor.CPPTYPE_INT32: 31, FieldDescriptor.CPPTYPE_INT64: 63}
_UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32: 32, FieldDescriptor.CPPTYPE_UINT64: 64}
_FLOATS = (0.0, -1.0, 1.5, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))
_TEXTS = ("", "\0", "../../x", "x" * 300, "%s%n", "\u202e", "\U0001f600", "127.0.0.1:1")
_COUNTS = (0, 1, 2, 33)
# How often a field is changed that has a value; and an inner message rather than replaced.
_NEAR, _INNER = 0.7, 0.8


def altered(source: random.Random, message: M, fields: int = 2) -> M:
    """A copy of `message`, which has fields, with up to so many of them changed, in it or in messages inside it."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(source.randint(1, fields)):
        filled = [field for field, _ in copy.ListFields()]
        near = filled and source.random() < _NEAR
        _alter(source, copy, source.choice(filled if near else copy.DESCRIPTOR.fields))
    return copy


def _alter(source: random.Random, message: Message, field: FieldDescriptor) -> None:
    former = getattr(message, field.name)
    if isinstance(former, Message) and message.HasField(field.name) and source.random() < _INNER:
        former.CopyFrom(altered(source, former))
        return
    message.ClearField(field.name)
    place = getattr(message, field.name)
    if isinstance(place, MutableMapping):
        for key in (0, 5, 2**32 - 1):
            place[key] = source.choice(_FLOATS)
    elif isinstance(place, Message):
        _fill(source, place)
    elif hasattr(place, "add"):
        for _ in range(source.choice(_COUNTS)):
            _fill(source, place.add())
    elif hasattr(place, "extend"):
        place.extend([_value(source, field) for _ in range(source.choice(_COUNTS))])
    else:
        setattr(message, field.name, _value(source, field))


def _fill(source: random.Random, message: Message) -> None:
    """Set one field of an empty message."""
    message.SetInParent()
    if message.DESCRIPTOR.fields:
        _alter(source, message, source.choice(message.DESCRIPTOR.fields))


def _value(source: random.Random, field: FieldDescriptor) -> object:
    kind = field.cpp_type
    if kind in _UNSIGNED:
        return source.choice((0, 1, 2, 5, 511, 2**16, 2 ** (_UNSIGNED[kind] - 1), 2 ** _UNSIGNED[kind] - 1))
    if kind in _SIGNED:
        return source.choice((0, 1, -1, -2, 5, 2 ** _SIGNED[kind] - 1, -(2 ** _SIGNED[kind])))
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return source.choice(_FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return source.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return source.choice((0, 1, 2, 99))
    if field.type == FieldDescriptor.TYPE_STRING:
        return source.choice(_TEXTS)
    return source.randbytes(source.choice((0, 1, 16, 17, 512, 5000)))
