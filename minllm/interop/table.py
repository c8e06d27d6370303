"""The weight-name table: one row says what a tensor is called elsewhere, where it lives here, and how its dims map.

    "model.layers.{i}.self_attn.q_proj.weight": ("layers/{i}/0/inner/q", "(n h) d -> d n h")
    "h.{i}.attn.c_attn.weight": (("layers/{i}/0/inner/q", "layers/{i}/0/inner/k", "layers/{i}/0/inner/v"),
                                 "d (n h + n h + n h) -> d n h, d n h, d n h")
    "experts.{e}.w1.weight": ("layers/{i}/1/inner/gate", "f d -> d f")

The same rows read and write; nothing in them is about a file format, so that every format of a family is one table.

Names: {i} counts the layers of the family, {e} the experts of a layer. Paths: `layers/{i}/k/...` is the k-th sublayer (attention 0,
feed-forward 1) of layer i, wherever stacks and patterns put it; all else is a path of the parameter tree. A row holds for the layers
whose tree has its path with as many dims; each part of each parameter has exactly one row. Where two kinds of layers share a path, a row
ends with a path that only its own kind has.

Patterns are read as einops': letters are dims, parentheses join dims in order, digits are dims of that size (a 1 of the file has no
counterpart here). One pair of parentheses on the left may hold a sum: parts side by side, the first for the first path, and so on.
Sizes come from our own declared shapes, so that the shape a file must have is known before it is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from minllm.layers.stack import Stack
from minllm.models.family import Rows
from minllm.spec import Spec, Tree, is_spec, path_name
from minllm.weights import as_array, as_runs, repetitions

Dims = tuple[str, ...]
Shapes = tuple[tuple[int, ...], ...]


class Part(NamedTuple):
    """One summand of the file's tensor, and the letters of each of our dims."""

    summand: Dims
    ours: tuple[Dims, ...]


@dataclass(frozen=True)
class Pattern:
    """The pattern of a row, one `Part` for each of its paths.

    given: for each dim of the file's tensor its letters; a letter "+" stands for the sum.
    """

    given: tuple[Dims, ...]
    parts: tuple[Part, ...]

    def sizes(self, ours: Shapes) -> dict[str, int]:
        """Of each letter, and "+" for all summands together."""
        left = [(dim, n) for part, shape in zip(self.parts, ours, strict=True) for dim, n in zip(part.ours, shape, strict=True)]
        letters = [letter for dims in (self.given, *(part.ours for part in self.parts)) for dim in dims for letter in dim]
        size = {letter: int(letter) for letter in letters if letter.isdecimal()}
        while left:
            dim, n = min(left, key=lambda pair: len(set(pair[0]) - set(size)))
            left.remove((dim, n))
            free, known = [letter for letter in dim if letter not in size], prod(size[letter] for letter in dim if letter in size)
            assert len(free) <= 1 and n % known == 0 and (free or n == known), (self, ours)
            size |= {free[0]: n // known} if free else {}
        return size | {"+": sum(prod(size[letter] for letter in part.summand) for part in self.parts)}

    def shape(self, ours: Shapes) -> tuple[int, ...]:
        """The shape of the file's tensor, from the shapes of our parts."""
        size = self.sizes(ours)
        return tuple(prod(size[letter] for letter in dim) for dim in self.given)

    def split(self, tensor: Any, ours: Shapes) -> list[Any]:
        """Our parts of the file's tensor: views where NumPy can."""
        size, start, parts = self.sizes(ours), 0, []
        letters = [letter for dim in self.given for letter in dim if letter != "1"]
        tensor = tensor.reshape([size[letter] for letter in letters])
        for part, shape in zip(self.parts, ours):
            one, names = tensor, list(letters)
            if "+" in letters:
                at, width = letters.index("+"), prod(size[letter] for letter in part.summand)
                one = one[(slice(None),) * at + (slice(start, start + width),)]
                names[at : at + 1] = part.summand
                one, start = one.reshape([size[letter] for letter in names]), start + width
            parts.append(one.transpose([names.index(letter) for dim in part.ours for letter in dim]).reshape(shape))
        return parts

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The file's tensor of our parts."""
        ours = tuple(part.shape for part in parts)
        size, given = self.sizes(ours), []
        letters = [letter for dim in self.given for letter in dim if letter != "1"]
        for part, array in zip(self.parts, parts):
            names = [letter for dim in part.ours for letter in dim]
            groups = [part.summand if letter == "+" else (letter,) for letter in letters]
            array = array.reshape([size[letter] for letter in names])
            array = array.transpose([names.index(letter) for group in groups for letter in group])
            given.append(array.reshape([prod(size[letter] for letter in group) for group in groups]))
        whole = np.concatenate(given, letters.index("+")) if "+" in letters else given[0]
        return whole.reshape(self.shape(ours))


@lru_cache
def parse(pattern: str) -> Pattern:
    """'d (n h + k h) -> d n h, d k h' and the like."""
    left, right = pattern.split("->")
    dims = lambda text: [tuple(group.strip("()").split()) for group in re.findall(r"\([^()]*\)|\S+", text)]
    ours = [tuple(dims(text)) for text in right.split(",")]
    if "+" not in left:
        assert len(ours) == 1, pattern
        return Pattern(tuple(dims(left)), (Part((), ours[0]),))
    (inner,) = [text for text in re.findall(r"\(([^()]*)\)", left) if "+" in text]
    summands = [tuple(letter for letter in text.split() if letter != "1") for text in inner.split("+")]
    before, after = left.split(f"({inner})")
    opened = before.count("(") > before.count(")")  # the sum is a part of a larger dim
    flat = f"{before} + {after}" if opened else f"{before} (+) {after}"
    given = tuple(dims(flat))
    assert len(summands) == len(ours), pattern
    return Pattern(given, tuple(Part(summand, own) for summand, own in zip(summands, ours)))


class Target(NamedTuple):
    """A place in our tree: a parameter, and which of its leading dims (layer, expert) are chosen."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]  # of what is there


class Tensor(NamedTuple):
    """A tensor of the file."""

    name: str
    row: str  # the name in the table: tensors of one row fill the same parameters
    shape: tuple[int, ...]
    pattern: Pattern
    targets: tuple[Target, ...]


def tensors(model: Any, rows: Rows) -> list[Tensor]:
    """Every tensor of a model, in the order of the table."""
    specs = flat(model.params())
    places = _Places(model, rows)
    found, covered = [], dict.fromkeys(specs, 0)
    for name, (paths, text, *having) in rows.items():
        pattern = parse(text)
        paths = (paths,) if isinstance(paths, str) else paths
        assert len(paths) == len(pattern.parts), name
        for i in range(places.count(paths[0])) if "{i}" in name else (0,):
            if any(places.find(path, i)[0] not in specs for path in having):
                continue
            at = [places.find(path, i) for path in paths]
            each = [specs.get(path) for path, _ in at]
            if any(spec is None or len(_own(spec, "{e}" in name)) != len(part.ours) for spec, part in zip(each, pattern.parts)):
                continue  # this layer is of another kind
            experts = range(each[0].shape[each[0].names.index("experts")]) if "{e}" in name else (None,)
            for e in experts:
                targets = tuple(
                    Target(path, (*index, *([] if e is None else [e])), _own(spec, e is not None)) for (path, index), spec in zip(at, each)
                )
                shape = pattern.shape(tuple(target.shape for target in targets))
                found.append(Tensor(name.format(i=i, e=e), name, shape, pattern, targets))
                for target in targets:
                    covered[target.path] += prod(target.shape)
    wrong = [f"{path}: {n} of {specs[path].size}" for path, n in covered.items() if n != specs[path].size]
    assert not wrong, f"the table does not cover each parameter once: {wrong}"
    return found


def flat(specs: Tree) -> dict[str, Spec]:
    """Specs by their path."""
    return {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)}


def _own(spec: Spec, expert: bool) -> tuple[int, ...]:
    """The shape of one layer's, or one expert's part of a parameter."""
    chosen = {"layers", "experts"} if expert else {"layers"}
    return tuple(n for name, n in zip(spec.names, spec.shape) if name not in chosen)


class _Places:
    """Where `layers/{i}/k` is in the tree of a model."""

    def __init__(self, model: Any, rows: Rows):
        self.width: dict[str, int] = {}  # sublayers a layer, of each trunk
        self.sublayers: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for paths, *_ in rows.values():
            for path in (paths,) if isinstance(paths, str) else paths:
                if found := re.fullmatch(r"(.*?)layers/\{i\}/(\d+)/.*", path):
                    owner, k = found[1], int(found[2])
                    self.width[owner] = max(self.width.get(owner, 0), k + 1)
        for owner, width in self.width.items():
            part = model
            for name in owner.split("/")[:-1]:
                part = getattr(part, name)
            self.sublayers[owner] = list(_sublayers(part.trunk, owner))
            assert len(self.sublayers[owner]) % width == 0, (owner, width)

    def count(self, path: str) -> int:
        owner = path.partition("layers/")[0]
        return len(self.sublayers[owner]) // self.width[owner]

    def find(self, path: str, i: int) -> tuple[str, tuple[int, ...]]:
        found = re.fullmatch(r"(.*?)layers/\{i\}/(\d+)/(.*)", path)
        if not found:
            return path, ()
        root, index = self.sublayers[found[1]][i * self.width[found[1]] + int(found[2])]
        return f"{root}/{found[3]}", index


def _sublayers(trunk: tuple, owner: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for t, layer in enumerate(trunk):
        if isinstance(layer, Stack):
            yield from ((f"{owner}trunk/{t}/pattern/{j}", (r,)) for r in range(layer.times) for j in range(len(layer.pattern)))
        else:
            yield f"{owner}trunk/{t}", ()


def pick(params: Tree, target: Target) -> jax.Array:
    """The array at a target; stacks may come in runs, and weights as any array-like."""
    found, index = re.fullmatch(r"(.*?trunk/\d+)/(pattern/.*)", target.path), target.index
    tree, path = params, target.path
    if found:
        for run in as_runs(_at(params, found[1])):
            if index[0] < repetitions(run):
                tree, path = run, found[2]
                break
            index = (index[0] - repetitions(run), *index[1:])
    return as_array(jax.tree.map(lambda a: a[index], _at(tree, path)))


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = getattr(tree, name) if hasattr(tree, "_fields") else tree[name if isinstance(tree, dict) else int(name)]
    return tree
