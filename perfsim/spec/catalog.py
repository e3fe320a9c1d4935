"""Finds models, hardware and traces by name: one resolver, case-insensitive, over the data directories.

A data directory holds `hardware/` and `workloads/`. They are searched in this order, the first owner of a name wins:
each entry of `$PERFSIM_PATH`, the repository this package was imported from, the data packaged with the wheel. Names
are file stems, Hugging Face ids (`org/Name` is the stem `org--Name`), aliases (`aliases.yaml` of `hardware/` and
`workloads/`) and, for models, an id without its organisation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from perfsim.errors import InputError, nearest
from perfsim.spec.hardware_yaml import (
    is_cluster_file,
    is_node_file,
    load_accelerator,
    load_cluster,
    load_link,
    load_node,
    load_storage,
    usual_node,
)
from perfsim.spec.problems import shorten
from perfsim.spec.yaml import load_yaml

if TYPE_CHECKING:
    from perfsim.spec.cluster import Cluster
    from perfsim.spec.hardware import Accelerator, Node
    from perfsim.spec.model import ModelArch
    from perfsim.spec.parts import LinkType, Storage

Kind = Literal["model", "accelerator", "node", "cluster", "link", "storage", "trace"]
AliasSection = Literal["models", "traces", "hardware"]
_FOLDERS: dict[Kind, str] = {
    "model": "workloads/models", "accelerator": "hardware/accelerators", "node": "hardware/nodes",
    "cluster": "hardware/clusters", "link": "hardware/links", "storage": "hardware/storage",
    "trace": "workloads/traces",
}  # fmt: skip
_ALIAS_SECTION: dict[Kind, AliasSection] = {
    "model": "models", "accelerator": "hardware", "node": "hardware", "cluster": "hardware", "link": "hardware",
    "storage": "hardware", "trace": "traces",
}  # fmt: skip
_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "model": (".json",), "accelerator": (".yaml",), "node": (".yaml",), "cluster": (".yaml",), "link": (".yaml",),
    "storage": (".yaml",), "trace": (".parquet", ".csv", ".jsonl", ".json"),
}  # fmt: skip


class Entry(NamedTuple):
    """One accepted name as it is spelled, and the file it stands for."""

    spelling: str
    stem: str
    path: Path


def data_directories() -> list[Path]:
    """The directories that are searched, in order; InputError when an entry of `$PERFSIM_PATH` is not a directory."""
    found = []
    for entry in os.environ.get("PERFSIM_PATH", "").split(os.pathsep):
        if entry and not Path(entry).is_dir():
            raise InputError(f"PERFSIM_PATH: '{shorten(entry)}' is not a directory with hardware/ or workloads/")
        if entry:
            found.append(Path(entry))
    package = Path(__file__).resolve().parents[1]
    repository = package.parent
    if (repository / "pyproject.toml").is_file() and (repository / "hardware").is_dir():
        found.append(repository)
    if (package / "_data").is_dir():
        found.append(package / "_data")
    return found


def list_models() -> list[str]:
    """The file stems of all known models, sorted."""
    return sorted(_files("model"))


def list_hardware() -> list[str]:
    """The names of all known accelerators, nodes and clusters, sorted: what a scenario's `hardware` may name."""
    return sorted([*_files("accelerator"), *_files("node"), *_files("cluster")])


def list_accelerators() -> list[str]:
    """The names of all known accelerators, sorted."""
    return sorted(_files("accelerator"))


def list_nodes() -> list[str]:
    """The names of all known nodes, sorted."""
    return sorted(_files("node"))


def list_clusters() -> list[str]:
    """The names of all known clusters, sorted."""
    return sorted(_files("cluster"))


def list_links() -> list[str]:
    """The names of all known kinds of links, sorted."""
    return sorted(_files("link"))


def list_storage() -> list[str]:
    """The names of all known kinds of stores, sorted."""
    return sorted(_files("storage"))


def list_traces() -> list[str]:
    """The names of all known traces, sorted."""
    return sorted(_files("trace"))


def aliases(section: AliasSection) -> dict[str, str]:
    """Other names and the file stem each stands for, as the alias files have them; first directory wins."""
    merged: dict[str, str] = {}
    for root in data_directories():
        path = root / ("hardware" if section == "hardware" else "workloads") / "aliases.yaml"
        content = load_yaml(path) if path.is_file() else {}
        entries = content if section == "hardware" else content.get(section, {})
        for name, target in _alias_entries(entries, path):
            merged.setdefault(name, target)
    return merged


def model(name_or_path: str | Path) -> ModelArch:
    """The model of this name, or the one that a path ending in `.json` describes.

    Raises InputError for an unknown name (with the nearest one), a broken file or an unsupported architecture.
    """
    from perfsim.spec.huggingface import load_model

    if str(name_or_path).lower().endswith(".json"):
        return load_model(name_or_path)
    found = _find("model", str(name_or_path))
    return load_model(found.path, name=found.stem, hf_id=_hf_id(found.stem))


def accelerator(name: str) -> Accelerator:
    """The accelerator of this name; InputError, with the nearest name, when there is none."""
    return load_accelerator(_find("accelerator", name).path)


def node(name_or_path: str | Path) -> Node:
    """The node of this name, the usual node of an accelerator of this name, or the node that a `.yaml` file describes.

    Raises InputError for an unknown name (with the nearest one), a broken file, or an accelerator without usual node.
    """
    name = str(name_or_path)
    if name.lower().endswith((".yaml", ".yml")):
        if not is_node_file(name):
            raise InputError(f"{name}: expected a node, which names its 'accelerator'")
        return load_node(name, accelerator=accelerator)
    candidates = _names("node")
    if name.lower() in candidates:
        return load_node(candidates[name.lower()].path, accelerator=accelerator)
    if name.strip().lower() in _names("cluster"):
        inside = cluster(name).node.name
        raise InputError(f"hardware '{name}' is a cluster; expected a node or an accelerator, such as its '{inside}'")
    found = _find("accelerator", name, also={**candidates, **_names("cluster")})
    usual = usual_node(found.path)
    if usual is None:
        raise InputError(f"accelerator '{found.stem}' names no usual_node; name a node: {_some(list_nodes())}")
    return load_node(_find("node", usual).path, accelerator=accelerator)


def cluster(name_or_path: str | Path) -> Cluster:
    """The cluster of this name, or the one that a `.yaml` file describes; InputError when there is none."""
    name = str(name_or_path)
    path = Path(name) if name.lower().endswith((".yaml", ".yml")) else _find("cluster", name).path
    return load_cluster(path, node=node)


def machine(name_or_path: str | Path) -> Node | Cluster:
    """The cluster or node of this name or path, or the usual node of an accelerator; InputError when there is none."""
    name = str(name_or_path)
    is_file = name.lower().endswith((".yaml", ".yml"))
    if is_cluster_file(name) if is_file else name.strip().lower() in _names("cluster"):
        return cluster(name)
    return node(name)


def link(name: str) -> LinkType:
    """The kind of link of this name; InputError, with the nearest name, when there is none."""
    return load_link(_find("link", name).path)


def storage(name: str) -> Storage:
    """The kind of store of this name; InputError, with the nearest name, when there is none."""
    return load_storage(_find("storage", name).path)


def hardware(name: str) -> Accelerator | LinkType | Storage | Node | Cluster:
    """Whatever has this name; an accelerator before the node that an alias of it may also stand for.

    Raises InputError, with the nearest of all these names, when there is none.
    """
    kinds: tuple[tuple[Kind, Callable[[str], Accelerator | LinkType | Storage]], ...] = (
        ("accelerator", accelerator), ("link", link), ("storage", storage),
    )  # fmt: skip
    for kind, load in kinds:
        if name.strip().lower() in _names(kind):
            return load(name)
    is_file = name.lower().endswith((".yaml", ".yml"))
    others = {key: entry for kind in ("node", "cluster", "link", "storage") for key, entry in _names(kind).items()}
    if not is_file and name.strip().lower() not in others:
        _find("accelerator", name, also=others)
    return machine(name)


def trace_path(name_or_path: str | Path) -> Path:
    """The file of the trace of this name, or the path itself when it is one (it has a suffix or a separator).

    Raises InputError for an unknown name (with the nearest one) and for a path at which there is no file.
    """
    name = str(name_or_path)
    known = _names("trace")
    if name.lower() in known:
        return known[name.lower()].path
    path = Path(name)
    try:
        if path.is_file():
            return path
        missing = path.suffix.lower() in _SUFFIXES["trace"] or len(path.parts) > 1 or path.exists()
    except (OSError, ValueError):
        missing = True
    if missing:
        raise InputError(f"trace file '{shorten(name, 200)}' does not exist or is not a file")
    return _find("trace", name).path


def _files(kind: Kind) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in data_directories():
        folder = root / _FOLDERS[kind]
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix in _SUFFIXES[kind]:
                    found.setdefault(path.stem, path)
    return found


def _names(kind: Kind) -> dict[str, Entry]:
    """Every accepted name in lower case, strongest claim first: stem, Hugging Face id, alias, bare id."""
    files = _files(kind)
    names = {stem.lower(): Entry(stem, stem, path) for stem, path in files.items()}
    if kind == "model":
        for stem, path in files.items():
            if "--" in stem:
                spelling = stem.replace("--", "/", 1)
                names.setdefault(spelling.lower(), Entry(spelling, stem, path))
    for alias, target in aliases(_ALIAS_SECTION[kind]).items():
        if target.lower() in names:
            names.setdefault(alias.lower(), names[target.lower()]._replace(spelling=alias))
    if kind == "model":
        for entry in [entry for entry in names.values() if "/" in entry.spelling]:
            short = entry.spelling.split("/", 1)[1]
            names.setdefault(short.lower(), entry._replace(spelling=short))
    return names


def _find(kind: Kind, name: str, *, also: Mapping[str, Entry] | None = None) -> Entry:
    """What `name` stands for; names of `also` are suggested too when nothing is found."""
    names = _names(kind)
    found = names.get(name.strip().lower())
    if found is not None:
        return found
    every = [*names.values(), *(also or {}).values()]
    hint = nearest(name[:100], [entry.spelling for entry in every])
    listed = "" if hint else f"; known: {_some(sorted({entry.stem for entry in every}))}"
    what = "hardware" if also is not None else kind
    raise InputError(f"unknown {what} '{shorten(name)}'{hint}{listed}")


def _hf_id(stem: str) -> str | None:
    """`org/Name` from the stem, from an alias, or from another file of this name that has the organisation."""
    if "--" in stem:
        return stem.replace("--", "/", 1)
    for alias, target in aliases("models").items():
        if target == stem and "/" in alias:
            return alias
    namesakes = (other for other in _files("model") if other.lower().endswith(f"--{stem.lower()}"))
    return next((other.replace("--", "/", 1) for other in namesakes), None)


def _alias_entries(entries: Any, path: Path) -> list[tuple[str, str]]:
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected a mapping of aliases, got '{shorten(str(entries))}'")
    found = []
    for name, entry in entries.items():
        target = entry.get("name") if isinstance(entry, dict) else entry
        if not isinstance(target, str):
            raise InputError(f"{path}: alias '{shorten(name)}': expected the name it stands for")
        found.append((name, target))
    return found


def _some(names: list[str], limit: int = 6) -> str:
    if not names:
        return "none (no data directory found)"
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
