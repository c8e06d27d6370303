"""Config: strict YAML 1.2, one clear message for each problem, and a record of where every value came from."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from rich.console import Console

from minllm.config import ConfigError, config, dump, explain, flatten, load, schema, undecorated


@config
class AdamW:
    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)  # the peak learning rate
    b2: float = Field(0.99, ge=0, lt=1, description="decay of the second moment")


@config
class Lion:
    kind: Literal["lion"] = "lion"
    lr: float = Field(1e-4, gt=0)


@config
class Files:
    kind: Literal["files"] = "files"
    paths: tuple[str, ...]
    weight: float = 1.0


@config
class Stdlib:
    kind: Literal["stdlib"] = "stdlib"
    weight: float = 1.0


@config
class Model:
    layers: int = Field(ge=1)
    act: Literal["silu", "gelu"] = "silu"


@config
class Run:
    model: Model
    optimizer: AdamW | Lion = AdamW(lr=2e-3)
    data: tuple[Files | Stdlib, ...] = (Stdlib(weight=3.0),)
    mix: dict[str, float] = Field(default_factory=lambda: {"web": 1.0})
    init_from: str | Files | Stdlib | None = None
    out: Path = Path("runs/x")
    steps: int | Literal["auto"] = 100
    betas: tuple[float, int] = (0.1, 2)
    resume: bool = False
    note: str | None = None

    def __post_init__(self):
        if self.steps == 13:
            raise ValueError("steps: 13 is not divisible by batch 2")


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(text, *overrides, cls=Run):
        Path("run.yaml").write_text(text, encoding="utf-8")
        return load(cls, "run.yaml", overrides)

    return read


@pytest.fixture
def refused(read):
    def refused(text, *overrides, cls=Run):
        with pytest.raises(ConfigError) as caught:
            read(text, *overrides, cls=cls)
        told = str(caught.value)
        assert "pydantic" not in told and "http" not in told and "validation" not in told
        assert all(problem in told for problem in caught.value.problems)
        return list(caught.value.problems)

    return refused


OK = "model: {layers: 2}\n"


# --- YAML 1.2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [("1e-3", 1e-3), ("3e8", 3e8), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("7", 7.0), ("+3", 3.0), ("-2.5e+1", -25.0)],
)
def test_numbers(read, text, value):
    loaded = read(f"{OK}mix: {{web: {text}}}").value.mix["web"]
    assert loaded == value and type(loaded) is float


@pytest.mark.parametrize(
    "text, value", [("010", 10), ("0o10", 8), ("0x10", 16), ("1_000", 1000), ("12345678901234567890", 12345678901234567890)]
)
def test_whole_numbers(read, text, value):
    assert read(OK + f"steps: {text}").value.steps == value


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "n", "1:30", "2020-01-01", "12:30:00", "1.2.3"])
def test_words_are_text(read, text):
    assert read(OK + f"note: {text}").value.note == text


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("false", False)])
def test_booleans(read, text, value):
    assert read(OK + f"resume: {text}").value.resume is value


def test_aliases_and_byte_order_mark(read):
    assert read("\ufeff" + OK + "data: [&a {kind: stdlib, weight: 2}, *a]").value.data == (Stdlib(weight=2.0),) * 2


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "run.yaml: the file is empty"),
        ("# only a comment\n", "run.yaml: the file is empty"),
        ("- 1\n- 2", "run.yaml: a config file holds `key: value` lines, but this one holds the list [1, 2]"),
        ("hello", 'run.yaml: a config file holds `key: value` lines, but this one holds the text "hello"'),
        ("model:\n\tlayers: 1", "run.yaml:2:1: a tab cannot indent YAML; use spaces"),
        ("model: {layers: 1", "run.yaml:1:18: expected ',' or '}', but got '<stream end>'"),
        ("a: b: c", "run.yaml:1:5: mapping values are not allowed here"),
        ("a: !!python/object:os.system 1", "run.yaml:1:4: could not determine a constructor for the tag"),
        ("a: &x [*x]", "run.yaml: an alias contains itself"),
        ("? [1, 2]\n: 3", "run.yaml:1: a key must be a single word"),
        ("a: \x07", "run.yaml: unacceptable character #x0007: special characters are not allowed"),
        ("a: 1\n---\nb: 2", "run.yaml:2:1: but found another document"),
    ],
)
def test_bad_yaml(refused, text, told):
    (problem,) = refused(text)
    assert told in problem


def test_duplicate_keys_are_all_told(refused):
    assert refused("a: 1\nb: {c: 1, c: 2}\na: 2") == [
        "b.c: duplicate key (run.yaml:2; first on line 2)",
        "a: duplicate key (run.yaml:3; first on line 1)",
    ]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "quickstart.yaml").write_bytes(b"a: \xff\xfe")
    for path, told in [
        (tmp_path / "quikstart.yaml", f"no such file; did you mean {tmp_path / 'quickstart.yaml'}?"),
        (tmp_path / "nowhere" / "x.yaml", "no such file"),
        (tmp_path, "this is a directory; give the YAML file in it"),
        (tmp_path / "quickstart.yaml", "byte 3 is not UTF-8 text"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(Run, path)
        assert str(caught.value) == f"{path}: {told}"


# --- types ------------------------------------------------------------------------------------------------------------------


PAIR = "a list of 2: a finite number, a whole number"


@pytest.mark.parametrize(
    "text, told",
    [
        ("mix: {web: '1'}", 'mix.web: the text "1" is not allowed; it must be a finite number (run.yaml:2)'),
        ("mix: {web: .nan}", "mix.web: NaN is not allowed; it must be a finite number (run.yaml:2)"),
        ("mix: {web: true}", "mix.web: true is not allowed; it must be a finite number (run.yaml:2)"),
        ("mix: 3", "mix: 3 is not allowed; it must be a mapping (run.yaml:2)"),
        ("steps: 1.5", 'steps: 1.5 is not allowed; it must be a whole number or "auto" (run.yaml:2)'),
        ("steps: 1e4", 'steps: 10000.0 is not allowed; it must be a whole number or "auto" (run.yaml:2); write 10000'),
        ("steps: true", 'steps: true is not allowed; it must be a whole number or "auto" (run.yaml:2)'),
        ("steps: '7'", 'steps: the text "7" is not allowed; it must be a whole number or "auto" (run.yaml:2)'),
        ("steps: auot", 'steps: the text "auot" is not allowed; it must be a whole number or "auto" (run.yaml:2); did you mean auto?'),
        ("steps: null", 'steps: null is not allowed; it must be a whole number or "auto" (run.yaml:2)'),
        ("resume: yes", 'resume: the text "yes" is not allowed; it must be true or false (run.yaml:2)'),
        ("resume: 1", "resume: 1 is not allowed; it must be true or false (run.yaml:2)"),
        ("out: 3", "out: 3 is not allowed; it must be a path (run.yaml:2)"),
        ("note: 3", "note: 3 is not allowed; it must be text or null (run.yaml:2)"),
        ("betas: [1]", "betas.1: missing; it must be a whole number (its section: run.yaml:2)"),
        ("betas: [1, 2, 3]", f"betas: the list [1, 2, 3] is not allowed; it must be {PAIR} (run.yaml:2)"),
        ("betas: [x, 2]", 'betas.0: the text "x" is not allowed; it must be a finite number (run.yaml:2)'),
        ("optimizer: 1", "optimizer: 1 is not allowed; it must be a section with kind adamw, lion (run.yaml:2)"),
        ("optimizer: {kind: lino}", 'optimizer.kind: "lino" is not one of adamw, lion (run.yaml:2); did you mean lion?'),
        ("optimizer:\n  lr: 0", "optimizer.lr: 0 is not allowed; it must be a finite number > 0 (run.yaml:3)"),
        ("optimizer: {b2: 1}", "optimizer.b2: 1 is not allowed; it must be a finite number >= 0 and < 1 (run.yaml:2)"),
        ("data: {}", "data: the section {} is not allowed; it must be a list, each item a section with kind files, stdlib (run.yaml:2)"),
        ("data:\n- kind: stdlib\n- weight: 2", "data.1.kind: missing; it must be one of files, stdlib (run.yaml:4)"),
        ("data:\n- kind: files", "data.0.paths: missing; it must be a list, each item text (its section: run.yaml:3)"),
        ("data: [{kind: files, paths: a}]", 'data.0.paths: the text "a" is not allowed; it must be a list, each item text (run.yaml:2)'),
        ("init_from: 3", "init_from: 3 is not allowed; it must be a section with kind files, stdlib or text or null (run.yaml:2)"),
        ("init_from: {kind: stdlib, weigth: 1}", "init_from.weigth: no such setting (run.yaml:2); did you mean weight?"),
        ("nota: x", "nota: no such setting (run.yaml:2); did you mean note?"),
        ("lr: 1", "lr: no such setting (run.yaml:2); did you mean optimizer.lr?"),
        ("zzz: 1", f"zzz: no such setting (run.yaml:2); the settings here: {', '.join(f.name for f in dataclasses.fields(Run))}"),
        ("steps: 13", "steps: 13 is not divisible by batch 2"),
    ],
)  # fmt: skip
def test_wrong_values(refused, text, told):
    assert refused(OK + text) == [told]


def test_every_problem_is_told_once(refused):
    problems = refused("model: {layers: 0, act: gleu, depth: 3}\nsteps: x\nmodle: 1")
    assert sorted(p.split(":")[0] for p in problems) == ["model.act", "model.depth", "model.layers", "modle", "steps"]
    assert refused("steps: 3") == ["model: missing; it must be a section (layers, act) (its section: run.yaml:1)"]


@config
class Limits:
    a: int | None = Field(None, ge=1, le=9, multiple_of=2)
    b: Annotated[str, Field(pattern="^x", min_length=2)] = "xx"
    c: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)


@pytest.mark.parametrize(
    "text, told",
    [
        ("a: 11", "a: 11 is not allowed; it must be a whole number >= 1 and <= 9 and a multiple of 2 or null (run.yaml:1)"),
        ("b: yy", 'b: the text "yy" is not allowed; it must be text of length >= 2 and matching ^x (run.yaml:1)'),
        ("c: [1, -1]", "c.1: -1 is not allowed; it must be a whole number >= 0 (run.yaml:1)"),
    ],
)
def test_limits_are_named(refused, text, told):
    assert refused(text, cls=Limits) == [told]


# --- overrides and sections -------------------------------------------------------------------------------------------------


def test_overrides_are_yaml(read):
    data = "data=[{kind: files, paths: [a=b, c]}]"
    run = read(OK, "optimizer.lr=3e-4", data, "note=yes", "out=/a:b", "init_from.kind=stdlib", "mix.code=2").value
    assert run.optimizer == AdamW(lr=3e-4) and run.data == (Files(paths=("a=b", "c")),) and run.note == "yes"
    assert run.out == Path("/a:b") and run.init_from == Stdlib() and run.mix == {"web": 1.0, "code": 2.0}
    assert read(OK + "note: x", "note=").value.note is None
    assert read(OK, "data.0.weight=2").value.data == (Stdlib(weight=2.0),)
    assert read(OK, "steps=1", "steps=2").value.steps == 2


def test_a_section_keeps_the_defaults_it_does_not_name(read):
    assert read(OK + "optimizer: {b2: 0.5}").value.optimizer == AdamW(lr=2e-3, b2=0.5)  # lr of Run's default, not of the class
    assert read(OK + "optimizer: {kind: lion}").value.optimizer == Lion()  # another member: nothing is carried over
    assert read(OK + "mix: {code: 1}").value.mix == {"code": 1.0}  # a plain mapping is one value


def test_an_overridden_kind_does_not_carry_what_the_new_member_lacks(read, refused):
    text = OK + "optimizer:\n  kind: adamw\n  b2: 0.9\n  lr: 1"
    assert refused(text, "optimizer.kind=lion") == [
        "optimizer.b2: no such setting (run.yaml:4); kind lion lacks it: "
        "optimizer='{kind: lion}' on the command line drops the section of the file"
    ]
    assert read(text, "optimizer={kind: lion}").value.optimizer == Lion()
    assert read(text.replace("  b2: 0.9\n", ""), "optimizer.kind=lion").value.optimizer == Lion(lr=1.0)


@pytest.mark.parametrize(
    "override, told",
    [
        ("steps", "command line: 'steps' is not of the form key.sub=value"),
        ("=3", "command line: '=3' is not of the form key.sub=value"),
        ("a..b=3", "command line: 'a..b=3' is not of the form key.sub=value"),
        ("data=[1,", "command line: data=[1,: expected the node content, but found '<stream end>'"),
        ("optimizr.lr=1", "optimizr: no such setting (command line); did you mean optimizer?"),
        ("model.layers=x", 'model.layers: the text "x" is not allowed; it must be a whole number >= 1 (command line)'),
        ("steps.y=2", 'steps: the section {"y": 2} is not allowed; it must be a whole number or "auto" (command line)'),
        ("data.3.weight=1", "data.3.weight: data is a list of 1, so '3' must be 0 to 0; data=[...] replaces the list"),
    ],
)
def test_wrong_overrides(refused, override, told):
    assert refused(OK, override) == [told]


# --- what it tells ----------------------------------------------------------------------------------------------------------


def test_where_every_leaf_came_from(read):
    text = "model:\n  layers: 2\ndata:\n- kind: files\n  paths: [a,\n    b]\n- kind: stdlib\n"
    loaded = read(text, "optimizer.lr=1e-4", "data.1.weight=2")
    assert loaded.where.keys() == flatten(loaded.value).keys()
    told = {key: where.removeprefix("run.yaml:") for key, where in loaded.where.items() if where != "default"}
    assert told == {
        "model.layers": "2", "data.0.kind": "4", "data.0.paths": "5", "data.1.kind": "7",
        "optimizer.lr": "command line", "data.1.weight": "command line",
    }  # fmt: skip
    assert set(load(Run, None, ("model.layers=1",)).where.values()) == {"default", "command line"}


def test_explain_shows_value_origin_and_comment(read):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(explain(read(OK + "note: '[red]'")))
    lines = {line.split()[0]: line for line in console.export_text().splitlines()}
    assert "0.002" in lines["optimizer.lr"] and "default" in lines["optimizer.lr"] and "the peak learning rate" in lines["optimizer.lr"]
    assert "decay of the second moment" in lines["optimizer.b2"]
    assert "run.yaml:2" in lines["note"] and '"[red]"' in lines["note"]


CONFUSABLE = ["yes", "1e-3", "null", "~", "2020-01-01", "0x1", "- a", "a: b", "#", " x ", "\t", "0o7", "1_0", "\x85", "\u2028", "a\nb"]


@st.composite
def runs(draw):
    text, number = st.text(), st.floats(allow_nan=False, allow_infinity=False)
    positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
    return Run(
        model=Model(layers=draw(st.integers(1, 10**30)), act=draw(st.sampled_from(["silu", "gelu"]))),
        optimizer=draw(st.builds(AdamW, lr=positive, b2=st.floats(0, 1, exclude_max=True)) | st.builds(Lion, lr=positive)),
        data=draw(st.lists(st.builds(Files, paths=st.lists(text).map(tuple), weight=number) | st.builds(Stdlib), max_size=3).map(tuple)),
        mix=draw(st.dictionaries(text, number, max_size=3)),
        init_from=draw(st.none() | text | st.builds(Stdlib, weight=number)),
        steps=draw(st.integers().filter(lambda n: n != 13) | st.just("auto")),
        note=draw(st.none() | text | st.sampled_from(CONFUSABLE)),
    )


@settings(max_examples=150, deadline=None)
@given(run=runs())
def test_dump_round_trips_exactly(run, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump(run), encoding="utf-8", newline="")
    assert load(Run, path).value == run


def test_flatten():
    assert flatten(Run(model=Model(layers=2), data=(Files(paths=("a", "b")),))) == {
        "model.layers": 2, "model.act": "silu", "optimizer.kind": "adamw", "optimizer.lr": 2e-3, "optimizer.b2": 0.99,
        "data.0.kind": "files", "data.0.paths": ["a", "b"], "data.0.weight": 1.0, "mix.web": 1.0, "init_from": None, "out": "runs/x",
        "steps": 100, "betas": [0.1, 2], "resume": False, "note": None,
    }  # fmt: skip


def test_schema():
    made = json.loads(json.dumps(schema(Run)))
    assert made["required"] == ["model"] and made["additionalProperties"] is False
    lr = made["$defs"]["AdamW"]["properties"]["lr"]
    assert lr["exclusiveMinimum"] == 0 and lr["description"] == "the peak learning rate"
    assert made["properties"]["optimizer"]["discriminator"]["propertyName"] == "kind"
    assert made["$defs"]["Lion"]["additionalProperties"] is False


# --- the decorator ----------------------------------------------------------------------------------------------------------


def test_config_classes_are_frozen_hashable_and_strict_in_python_too():
    assert hash(AdamW()) == hash(AdamW()) and AdamW() == AdamW()
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdamW().lr = 2.0
    with pytest.raises(ValueError, match="rl"):
        AdamW(rl=2.0)
    for cls in (AdamW, Stdlib):  # the first with Field(...), the second without
        with pytest.raises(ValueError, match="positional"):
            cls(2.0)


def test_undecorated_finds_what_breaks_the_rules():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        x: int = 0

    @config
    class NoKind:
        x: int = 0

    @dataclasses.dataclass(frozen=True)
    class Inherits(AdamW):
        y: int = 0

    @config
    class Bad:
        a: dict[str, tuple[Plain, ...]]
        b: AdamW | NoKind
        c: Annotated[Inherits | None, "note"] = None

    assert undecorated(Run) == [] and undecorated(Limits) == []
    assert sorted(undecorated(Bad)) == [
        "Bad.a: Plain is not made by @config",
        "Bad.b: NoKind is a member of a union and has no `kind: Literal[...]`",
        "Bad.c: Inherits is not made by @config",
    ]
