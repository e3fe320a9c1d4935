"""Reads descriptors of accelerators, nodes, clusters, links and stores, in which every value stands beside its source.

A value is written `{value: 3350 GB/s, source: infsim, verified: false, note: ...}`; names and kinds are bare. `source`
is a reference in full or a short name that the file's `refs` spells out. The reader splits such facts into the numeric
fields of a description and its `sources`. A bare number is accepted too, so that a what-if machine needs no paperwork;
it then has no entry in `sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perfsim.errors import InputError, nearest
from perfsim.spec.cluster import Cluster
from perfsim.spec.hardware import Accelerator, Fact, Node
from perfsim.spec.parts import LinkType, Storage
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

FACT_KEYS = ("value", "source", "verified", "note")


def load_accelerator(path: str | Path) -> Accelerator:
    """The accelerator that a YAML file describes; InputError naming file and key when it is malformed."""
    content = load_yaml(path)
    content.pop("usual_node", None)
    return validated(Accelerator, _with_sources(content, where=str(path)), where=str(path))


def usual_node(path: str | Path) -> str | None:
    """The name of the node in which this accelerator is usually sold (`usual_node`), None when the file names none."""
    name = load_yaml(path).get("usual_node")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{path}: usual_node: expected the name of a node, got {name!r}")
    return name


def load_node(path: str | Path, *, accelerator: Callable[[str], Accelerator]) -> Node:
    """The node that a YAML file describes; `accelerator` resolves the name in its `accelerator` key.

    Raises InputError naming file and key when the file is malformed or its accelerator is unknown.
    """
    content = load_yaml(path)
    name = content.get("accelerator")
    if not isinstance(name, str):
        raise InputError(f"{path}: accelerator: expected the name of an accelerator, got {name!r}")
    content["accelerator"] = accelerator(name)
    return validated(Node, _with_sources(content, where=str(path)), where=str(path))


def load_cluster(path: str | Path, *, node: Callable[[str], Node]) -> Cluster:
    """The cluster that a YAML file describes; `node` resolves the name in its `node` key.

    Raises InputError naming file and key when the file is malformed or its node is unknown.
    """
    content = load_yaml(path)
    name = content.get("node")
    if not isinstance(name, str):
        raise InputError(f"{path}: node: expected the name of a node, got {name!r}")
    content["node"] = node(name)
    return validated(Cluster, _with_sources(content, where=str(path)), where=str(path))


def load_link(path: str | Path) -> LinkType:
    """The kind of link that a YAML file describes; InputError naming file and key when it is malformed."""
    return validated(LinkType, _with_sources(load_yaml(path), where=str(path)), where=str(path))


def load_storage(path: str | Path) -> Storage:
    """The kind of store that a YAML file describes; InputError naming file and key when it is malformed."""
    return validated(Storage, _with_sources(load_yaml(path), where=str(path)), where=str(path))


def is_node_file(path: str | Path) -> bool:
    """Whether a hardware YAML file describes a node: only nodes name an accelerator."""
    return "accelerator" in load_yaml(path)


def is_cluster_file(path: str | Path) -> bool:
    """Whether a hardware YAML file describes a cluster: only clusters name a node."""
    return "node" in load_yaml(path)


def _with_sources(content: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    if "sources" in content:
        raise InputError(f"{where}: unknown key 'sources'; write a source beside each value")
    refs = content.get("refs", {})
    if not isinstance(refs, Mapping):
        raise InputError(f"{where}: refs: expected a mapping of short names to references, got {refs!r}")
    sources: dict[str, Fact] = {}
    values = {key: _split(value, key, sources, where) for key, value in content.items() if key != "refs"}
    spelled = {path: fact.model_copy(update={"source": refs.get(fact.source, fact.source)})
               for path, fact in sources.items()}  # fmt: skip
    return {**values, "sources": spelled}


def _split(entry: Any, path: str, sources: dict[str, Fact], where: str) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    if "value" not in entry:
        return {key: _split(value, f"{path}.{key}", sources, where) for key, value in entry.items()}
    unknown = [key for key in entry if key not in FACT_KEYS]
    if unknown:
        raise InputError(f"{where}: unknown key '{path}.{unknown[0]}'{nearest(unknown[0], FACT_KEYS)}")
    fact = {key: value for key, value in entry.items() if key != "value"}
    sources[path] = validated(Fact, fact, where=f"{where}: {path}")
    return entry["value"]
