"""What a rank writes of a save plan: shards of tensors, plain values, bytes of other objects.

In the structure, a dict or a list is one that DCP has taken apart, a value or a
list of values is an object as it was, and `{"object": {"tensor": n}}` an object
as the bytes that `torch.save` made of it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from gpuckpt.adapters.dcp.tensors import seen
from gpuckpt.arrays import Tensor, look
from gpuckpt.arrays.view import shard
from gpuckpt.boxes import Box
from gpuckpt.errors import UnsupportedError
from gpuckpt.inventory import Inventory, Roster
from gpuckpt.structure import NOBODYS, Path
from gpuckpt.values import Json, NotPlainError, encode_value

# Longer strings and bytes lie better in a segment than in a manifest.
_VALUE_LENGTH_MAX = 16 << 10

Lengths = dict[Path, int]


def lengths_of(mappings: Iterable[Any]) -> Lengths:
    """How long each list of the state is that DCP has taken apart, by its path.

    `mappings` are what the ranks' planners say of their names: paths by name,
    whose integers are places in lists.
    """
    found: Lengths = {}
    for mapping in mappings:
        for path in mapping.values() if isinstance(mapping, Mapping) else ():
            for at, key in enumerate(path):
                if type(key) is int:
                    found[path[:at]] = max(found.get(path[:at], 0), key + 1)
    return found


def inventory_of(plan: SavePlan, planner: SavePlanner, lengths: Lengths) -> Inventory:
    """What the plan's items are, with the bytes where they are; copies no tensor that it can read.

    Raises:
        UnsupportedError: it names an item that can't be saved, and says why.
    """
    paths = plan.planner_data if isinstance(plan.planner_data, Mapping) else {}
    tensors: list[Tensor] = []
    nodes: dict[Path, Json] = {}
    for item in plan.items:
        node: Json = None
        if item.type == WriteItemType.BYTE_IO:
            node = _value_node(planner, item)
        if node is None:
            node = {"tensor": len(tensors)}
            tensors.append(_tensor(planner, item))
            if item.type == WriteItemType.BYTE_IO:
                node = {"object": node}
        nodes[tuple(paths.get(item.index.fqn, (item.index.fqn,)))] = node
    roster = Roster(
        nested(nodes, lengths),
        tuple(tensor.spec for tensor in tensors),
        tuple(tensor.strides for tensor in tensors),
    )
    addresses = np.array([tensor.address for tensor in tensors], np.uint64)
    return Inventory(roster, addresses, [tensor.owner for tensor in tensors], ())


def nested(nodes: Mapping[Path, Json], lengths: Lengths) -> Json:
    """The structure whose leaves are `nodes`: dicts, and lists where paths have integers.

    What other ranks have in a list is nobody's here.
    """
    tree: dict[Any, Any] = {}
    for path, node in nodes.items():
        inside = tree
        for key in path[:-1]:
            inside = inside.setdefault(key, {})
            if not isinstance(inside, dict):
                raise UnsupportedError(_named(path), "a part of it is saved under its own name")
        if path[-1] in inside:
            raise UnsupportedError(_named(path), "the plan has two things under this name")
        inside[path[-1]] = _Leaf(node)
    return _nested(tree, (), lengths)


class _Leaf:
    """A node that isn't looked into."""

    def __init__(self, node: Json) -> None:
        self.node = node


def _nested(tree: Any, path: Path, lengths: Lengths) -> Json:
    if isinstance(tree, _Leaf):
        return tree.node
    inside = {key: _nested(child, (*path, key), lengths) for key, child in tree.items()}
    if path not in lengths:
        return {"dict": [[encode_value(key), node] for key, node in inside.items()]}
    return {"list": [inside.get(at, NOBODYS) for at in range(lengths[path])]}


def _named(path: Path) -> str:
    return ".".join(map(str, path))


def _value_node(planner: SavePlanner, item: WriteItem) -> Json:
    """A plain value, or a list of such, as it is; None for all else.

    Only the default planner's way from an object to bytes is known, so that
    the object can stand for them.
    """
    kind = type(planner)
    if not (
        isinstance(planner, DefaultSavePlanner)
        and kind.resolve_data is DefaultSavePlanner.resolve_data
        and kind.transform_object is DefaultSavePlanner.transform_object
    ):
        return None
    return value_node(planner.lookup_object(item.index))


def value_node(value: Any) -> Json:
    """The node of a plain value or of a list of such; None for all else, and for long ones."""
    if type(value) is list:
        nodes = [value_node(one) for one in value]
        return None if None in nodes or len(nodes) > _VALUE_LENGTH_MAX else {"list": nodes}
    if isinstance(value, str | bytes | bytearray) and len(value) > _VALUE_LENGTH_MAX:
        return None
    try:
        return {"value": encode_value(value)}
    except NotPlainError:
        return None


def _tensor(planner: SavePlanner, item: WriteItem) -> Tensor:
    """A shard of a tensor, or the bytes of an object, where they are."""
    name, data = item.index.fqn, planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        found = look(np.frombuffer(data.getbuffer(), np.uint8), name)
        assert found is not None
        return found
    tensor = seen(data, name)
    wanted = item.tensor_data
    if wanted is None or wanted.chunk is None:
        raise UnsupportedError(name, "the plan doesn't say which part of a tensor it is")
    box = Box(_ints(wanted.chunk.offsets), _ints(wanted.chunk.sizes))
    if tensor.spec.shape != box.shape:
        raise UnsupportedError(name, f"{tensor.spec.shape} elements, the plan says {box.shape}")
    return shard(tensor, box, _ints(wanted.size))


def _ints(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, size))
