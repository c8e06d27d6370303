"""Typed, strict configuration: one decorator for every config dataclass, one loader for every config file.

    defaults of the class  <-  the YAML file  <-  key.sub=value from the command line

are laid over each other as plain data, then pydantic checks the result once, as strictly as JSON: an int is a number,
but "1", 1.0 and true are not ints. Where each value came from is kept beside it, so that every error and `explain` can say so.
"""

import ast
import dataclasses
import difflib
import enum
import inspect
import io
import json
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Union, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _dataclass
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.representer import SafeRepresenter


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, dataclasses.field))
def config[T](cls: type[T]) -> type[T]:
    """Makes a config class: a frozen, hashable dataclass with keyword arguments only, in which an unknown key is an error.

    Standard dataclasses drop unknown keys silently under pydantic, so every config class is made here. The members of a
    Union carry `kind: Literal["name"] = "name"`; the loader picks the member by it.
    """
    for name, hint in cls.__annotations__.items():
        default = vars(cls).get(name)
        if not getattr(default, "discriminator", None):
            hint = _by_kind(hint)
        if isinstance(default, FieldInfo):  # pydantic would take a field that has Field(...) by position too
            hint = Annotated[hint, Field(kw_only=True)]
        cls.__annotations__[name] = hint
    made: Any = _dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)
    made.__made_by_config__ = made  # a subclass inherits the attribute, but is not equal to it
    return made


class ConfigError(ValueError):
    """What is wrong with a config: `problems` has one line for each thing to mend."""

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__(problems[0] if len(problems) == 1 else "\n".join((f"{len(problems)} problems:", *(f"  {p}" for p in problems))))


@dataclasses.dataclass(frozen=True)
class Loaded[T]:
    """A config and, for each dotted key of `flatten(value)`, where it came from: "default", "FILE:LINE" or "command line"."""

    value: T
    where: dict[str, str]


def load[T](cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> Loaded[T]:
    """Reads the YAML 1.2 file `path` (None: defaults alone) as a `cls`, with overrides such as "optimizer.lr=3e-4" laid over it.

    A section laid over a section replaces only the keys it names, unless the file names another `kind` than the default: then
    the default's values are gone. An override of `kind` keeps the keys that the file gave, and those that the new member lacks
    are errors; `optimizer='{kind: lion}'` replaces the whole section. Raises ConfigError with every problem found.
    """
    data = {name: _plain(field.get_default(call_default_factory=True)) for name, field in _fields(cls).items() if not field.is_required()}
    where: dict[tuple, str] = {}
    if path is not None:
        given, places = _parse(_read(path), str(path))
        if not isinstance(given, dict):
            raise ConfigError(f"{path}: a config file holds `key: value` lines, but this one holds {_a(given)}")
        _lay(data, given)
        where |= places
    for text in overrides:
        _override(data, where, text)
    try:
        # JSON is pydantic's strict mode for text formats: a list may be a tuple, an int a float, a string a path; nothing else.
        value = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as e:
        raise ConfigError(*_explained(e, cls, data, where)) from None
    return Loaded(value, {".".join(map(str, key)): where.get(key, "default") for key, _ in _leaves(to_jsonable_python(value))})


def dump(value: Any) -> str:
    """The resolved config as YAML; `load` of it gives an equal value."""
    yaml, out = _yaml(), io.StringIO()
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = False, 10**6, False  # type: ignore[attr-defined]
    yaml.dump(to_jsonable_python(value), out)
    return out.getvalue()


def flatten(value: Any) -> dict[str, Any]:
    """{"optimizer.lr": 0.001, ...}: every leaf under its dotted key. A list of plain values is one leaf."""
    return {".".join(map(str, key)): leaf for key, leaf in _leaves(to_jsonable_python(value))}


def explain(loaded: Loaded) -> Table:
    """A table of every setting: its value, where it came from, and what the class says about it."""
    docs, table = dict(_docs(loaded.value)), Table(box=None, pad_edge=False, header_style="bold")
    for name in ("setting", "value", "from", "about"):
        table.add_column(name, overflow="fold")
    for key, leaf in flatten(loaded.value).items():
        where = loaded.where[key]
        table.add_row(*map(Text, (key, _show(leaf), where, docs.get(key, ""))), style="dim" if where == "default" else "")
    return table


def schema(cls: type) -> dict[str, Any]:
    """The JSON schema of a config file, for completion and checks in editors."""
    made = TypeAdapter(cls).json_schema()
    for _, member, _ in _classes(cls):
        properties = made.get("$defs", {}).get(member.__name__, made)["properties"]
        for name, comment in _comments(member).items():
            properties[name].setdefault("description", comment)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | made


def undecorated(cls: type) -> list[str]:
    """What breaks the rules among the classes that `cls` reaches through its annotations: classes not made by `@config` (they
    would drop unknown keys) and members of a union without `kind` (they could not be chosen)."""
    found = []
    for name, member, among in _classes(cls):
        if among > 1 and not _kind(member):
            found.append(f"{name}: {member.__name__} is a member of a union and has no `kind: Literal[...]`")
        if vars(member).get("__made_by_config__") is not member:
            found.append(f"{name}: {member.__name__} is not made by @config")
    return found


# --- reading YAML -----------------------------------------------------------------------------------------------------------


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)  # pure: the C parser is YAML 1.1, where 1e-3 is a string and `no` is false


class _Representer(SafeRepresenter):
    """Writes text that does not print in double quotes: YAML has line ends that Python has not, and only there come they back."""

    def represent_str(self, data: str) -> Node:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def _read(path: str | Path) -> str:
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: this is a directory; give the YAML file in it")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1)
        raise ConfigError(f"{path}: no such file{_did_you_mean([str(path.parent / n) for n in near])}") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: byte {e.start} is not UTF-8 text") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None


def _parse(text: str, source: str, line: bool = True) -> tuple[Any, dict[tuple, str]]:
    """The plain data of a YAML document, and for each path in it the place where it stands."""
    yaml, where, problems = _yaml(), {}, []

    def build(node: Node, path: tuple) -> Any:
        where.setdefault(path, f"{source}:{node.start_mark.line + 1}" if line else source)
        if isinstance(node, SequenceNode):
            return [build(child, (*path, i)) for i, child in enumerate(node.value)]
        if not isinstance(node, MappingNode):
            # YAML 1.2 has no dates: what looks like one is text.
            return node.value if node.tag.endswith(":timestamp") else yaml.constructor.construct_object(node)
        data, first = {}, {}
        for key, child in node.value:
            at, name = key.start_mark.line + 1, key.value
            if not isinstance(name, str):
                problems.append(f"{source}:{at}: a key must be a single word")
            elif name in first:
                problems.append(f"{'.'.join(map(str, (*path, name)))}: duplicate key ({source}:{at}; first on line {first[name]})")
            else:
                first[name], where[*path, name] = at, f"{source}:{at}" if line else source
                data[name] = build(child, (*path, name))
        return data

    try:
        node = yaml.compose(text)
        if node is None:
            raise ConfigError(f"{source}: the file is empty")
        data = build(node, ())
    except YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or str(e).splitlines()[0]
        if "\\t" in problem:
            problem = "a tab cannot indent YAML; use spaces"
        place = f":{mark.line + 1}:{mark.column + 1}" if mark and line else ""
        raise ConfigError(f"{source}{place}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: an alias contains itself") from None
    if problems:
        raise ConfigError(*problems)
    return data, where


class _Section(dict):
    """The data of a config class. A mapping laid over it keeps what it does not name; over a plain dict it replaces it."""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _Section({f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return to_jsonable_python(value)


def _lay(base: dict, given: dict) -> None:
    for key, value in given.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, _Section) and value.get("kind", below.get("kind")) == below.get("kind"):
            _lay(below, value)
        else:
            base[key] = value


def _override(data: dict, where: dict[tuple, str], text: str) -> None:
    dotted, equals, value = text.partition("=")
    *parents, last = path = tuple(dotted.split("."))
    if not equals or not all(path):
        raise ConfigError(f"command line: {text!r} is not of the form key.sub=value")
    node: Any = data
    at: tuple = ()

    def enter(container: Any, step: str) -> Any:
        if not isinstance(container, list):
            return step
        if not (step.isdecimal() and int(step) < len(container)):
            name, size = ".".join(map(str, at)), len(container)
            raise ConfigError(f"{dotted}: {name} is a list of {size}, so {step!r} must be 0 to {size - 1}; {name}=[...] replaces the list")
        return int(step)

    for step in parents:
        step = enter(node, step)
        at += (step,)
        if not isinstance(node[step] if isinstance(node, list) else node.get(step), dict | list):
            node[step] = {}  # an absent section, or a plain value where a section is meant: pydantic judges it
            where[at] = "command line"
        node = node[step]
    if last == "kind":
        for key in [k for k in node if (*at, k) not in where]:
            del node[key]  # a default of the old member
    at += (last := enter(node, last),)
    parsed, places = _parse(value, f"command line: {text}", line=False) if value.strip() else (None, {})
    node[last] = parsed
    for old in [p for p in where if p[: len(at)] == at]:
        del where[old]
    where |= {at: "command line"} | {at + p: "command line" for p in places}


# --- types ------------------------------------------------------------------------------------------------------------------


def _fields(cls: Any) -> dict[str, FieldInfo]:
    return cls.__pydantic_fields__


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel))


def _classes(cls: type) -> Iterator[tuple[str, type, int]]:
    """(where it is used, class, number of classes in that union) of `cls` and every class reached through its annotations."""
    seen, todo = set(), [(cls.__name__, cls)]
    while todo:
        name, hint = todo.pop()
        sections = [m for m in _members(hint) if _is_section(m)]
        for member in _members(hint):
            if member not in sections:
                todo += [(name, arg) for arg in get_args(member) if get_origin(member) is not Literal]
            elif member not in seen:
                seen.add(member)
                yield name, member, len(sections)
                todo += [(f"{member.__name__}.{field}", inner) for field, inner in get_type_hints(member, include_extras=True).items()]


def _kind(cls: type) -> tuple[str, ...]:
    return get_args(_members(get_type_hints(cls, include_extras=True).get("kind", None))[0])


def _members(hint: Any) -> list[Any]:
    """The members of a union, nested or annotated; a list of one for anything else."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [m for arg in get_args(hint) for m in _members(arg)]
    return [hint]


def _by_kind(hint: Any) -> Any:
    """The annotation with each union of config classes marked as chosen by `kind`, at any depth."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        chosen = any(getattr(a, "discriminator", None) for a in args[1:])
        return hint if chosen else Annotated[(_by_kind(args[0]), *args[1:])]
    if origin in (Union, types.UnionType):
        kinds = [a for a in args if _is_section(a) and "kind" in get_type_hints(a)]
        rest = [_by_kind(a) for a in args if a not in kinds]
        union = [Annotated[Union[tuple(kinds)], Field(discriminator="kind")]] if len(kinds) > 1 else kinds
        return Union[tuple(union + rest)]
    if args and origin not in (Literal, Callable) and isinstance(origin, type):
        return types.GenericAlias(origin, tuple(_by_kind(a) for a in args))
    return hint


def _leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        for i, child in enumerate(value):
            yield from _leaves(child, (*path, i))
    else:
        yield path, value


def _docs(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, what its class says about it): the description of its Field, or the comment at the end of its line."""
    if dataclasses.is_dataclass(value):
        comments = _comments(type(value))
        for name, field in _fields(value).items():
            yield prefix + name, field.description or comments.get(name, "")
            yield from _docs(getattr(value, name), f"{prefix}{name}.")
    elif isinstance(value, tuple | list | dict):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _docs(child, f"{prefix}{key}.")


def _comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class typed into a prompt has no source
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    ends = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    return {n.target.id: ends[n.end_lineno] for n in body if isinstance(n, ast.AnnAssign) and n.end_lineno in ends}  # type: ignore[attr-defined]


# --- saying what is wrong ---------------------------------------------------------------------------------------------------


def _explained(e: ValidationError, cls: type, data: Any, where: dict[tuple, str]) -> list[str]:
    """One line for each problem that pydantic found."""
    lines: dict[tuple, str] = {}
    for error in e.errors(include_url=False):
        found = _follow(cls, error["loc"], data)
        if found is None:
            continue  # a member of a union that was not meant
        path, hint, owner = found
        lines.setdefault(path, ".".join(map(str, path)) + _problem(error, path, hint, owner, data, where))
    return list(lines.values())


def _follow(hint: Any, loc: tuple, data: Any) -> tuple[tuple, Any, Any] | None:
    """Pydantic's location names keys and also the members of unions that it tried: (the path of keys, the annotation of what
    stands there, the class that holds it)."""
    path, owner, steps = (), None, list(loc)
    while steps:
        members = [m for m in _members(hint) if m is not type(None)]
        step = steps.pop(0)
        if len(members) > 1:
            sections = [m for m in members if _is_section(m)]
            if not isinstance(data, dict) or not sections:
                break  # plain values: all members are told at once
            if len(sections) < len(members):  # text | Section: the data is a section, so only those are meant
                if not str(step).startswith(("tagged-union", sections[0].__name__)):
                    return None
                hint = Union[tuple(sections)]
                continue
            hint = next((m for m in sections if step in _kind(m)), hint)
            continue
        member = members[0]
        path += (step,)
        if _is_section(member):
            owner, field = member, _fields(member).get(step)
            hint = Annotated[(field.annotation, field)] if field else None
        else:
            args = [a for a in get_args(member) if a is not ...]
            hint = args[-1 if isinstance(step, str) or len(args) == 1 else step] if args else None
        data = _item(data, step)
    return path, hint, owner


def _problem(error: Any, path: tuple, hint: Any, owner: Any, data: Any, where: dict[tuple, str]) -> str:
    kind, given = error["type"], reduce(_item, path, data)
    near = next((where[path[:n]] for n in range(len(path), -1, -1) if path[:n] in where), "default")
    if kind == "missing":
        return f": missing; it must be {_allowed(hint)}" + (f" (its section: {near})" if near != "default" else "")
    if kind == "unexpected_keyword_argument":
        names, name, above = list(_fields(owner)), path[-1], path[:-1]
        elsewhere = (".".join(map(str, (*above, key))) for key in _keys(owner) if key.split(".")[-1] == name)
        guess = _did_you_mean(difflib.get_close_matches(str(name), names, 1) or list(dict.fromkeys(elsewhere))[:3])
        chosen = _kind(owner) and where.get((*above, "kind"), "default") == "command line" != where.get(path)
        if chosen:  # the command line took another member than the file wrote its keys for
            section, member = ".".join(map(str, above)), _kind(owner)[0]
            guess = f"; kind {member} lacks it: {section}='{{kind: {member}}}' on the command line drops the section of the file"
        return f": no such setting ({where.get(path, 'default')}){guess or '; the settings here: ' + ', '.join(names)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [k for m in _members(hint) if _is_section(m) for k in _kind(m)]
        tag = given.get("kind")
        said = f"{_show(tag)} is not one of" if "kind" in given else "missing; it must be one of"
        guess = difflib.get_close_matches(str(tag), kinds, 1)
        return f".kind: {said} {', '.join(kinds)} ({where.get((*path, 'kind'), near)}){_did_you_mean(guess)}"
    place = f" ({near})" if near != "default" else " (default)"
    if kind in ("value_error", "assertion_error"):
        return f": {error['ctx']['error']}{place}" if path else str(error["ctx"]["error"])
    allowed = _allowed(hint)
    tip = ""
    if isinstance(given, float) and given.is_integer() and int in _members(hint):
        tip = f"; write {int(given)}"
    elif isinstance(given, str):
        literals = [str(v) for m in _members(hint) if get_origin(m) is Literal for v in get_args(m)]
        tip = _did_you_mean(difflib.get_close_matches(given, literals, 1))
    return f": {_a(given)} is not allowed; it must be {allowed}{place}{tip}"


def _allowed(hint: Any) -> str:
    """What may stand at a place with this annotation, in words."""
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        words, limits = _allowed(base), " and ".join(text for note in notes for text in _limits(note))
        value, null, _ = words.partition(" or null")
        return f"{value} {limits}{null}" if limits else words
    members = _members(hint)
    if len(members) > 1:
        kinds = [k for m in members if _is_section(m) for k in _kind(m)]
        rest = [_allowed(m) for m in members if not (_is_section(m) and _kind(m))]
        return " or ".join(([f"a section with kind {', '.join(kinds)}"] if kinds else []) + rest)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(_show, args))
    if origin in (tuple, list, set, frozenset, Sequence):
        if origin is tuple and ... not in args:
            return f"a list of {len(args)}: " + ", ".join(map(_allowed, args))
        return f"a list, each item {_allowed(args[0])}"
    if _is_section(hint):
        return f"a section ({', '.join(_fields(hint))})"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(_show(m.value) for m in hint)
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path", type(None): "null"}
    return words.get(origin or hint) or ("a mapping" if origin is dict else getattr(hint, "__name__", str(hint)))


def _limits(note: Any) -> list[str]:
    if isinstance(note, FieldInfo):
        return [text for inner in note.metadata for text in _limits(inner)]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of", "min_length": "of length >=",
             "max_length": "of length <=", "pattern": "matching"}  # fmt: skip
    return [f"{sign} {getattr(note, name)}" for name, sign in signs.items() if getattr(note, name, None) is not None]


def _keys(hint: Any, prefix: str = "", above: tuple = ()) -> Iterator[str]:
    """Every dotted key below an annotation, for suggestions."""
    for member in _members(hint):
        if _is_section(member) and member not in above:
            for name, field in _fields(member).items():
                yield prefix + name
                yield from _keys(field.annotation, f"{prefix}{name}.", (*above, member))


def _item(data: Any, step: Any) -> Any:
    inside = step in data if isinstance(data, dict) else isinstance(data, list) and isinstance(step, int) and step < len(data)
    return data[step] if inside else None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _a(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {_show(value)}"
    name = {dict: "the section ", list: "the list "}.get(type(value), "")
    return name + _show(value)


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""
