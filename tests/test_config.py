"""The configuration system: experiment files, overrides, saved configs."""

import dataclasses
import enum
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import config as configs
from attnlab.config.text import parse, split
from attnlab.errors import InputError


class Precision(enum.Enum):
    HALF = "bfloat16"
    FULL = "float32"


class Pattern:
    """A base class that is not a dataclass: its subclasses are the choices."""


@dataclass(frozen=True)
class Causal(Pattern):
    pass


@dataclass(frozen=True)
class Window(Pattern):
    size: int = 128
    look_ahead: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError("size must be positive")


@dataclass(frozen=True)
class Cosine:
    warmup: int = 100
    final: float = 0.1


@dataclass(frozen=True)
class Constant:
    warmup: int = 100


@dataclass(frozen=True)
class AdamW:
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Cosine | Constant = Cosine()


@dataclass(frozen=True)
class Lion:
    learning_rate: float = 3e-4
    weight_decay: float = 1.0
    schedule: Cosine | Constant = Cosine()


@dataclass(frozen=True)
class SGD:
    momentum: float
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Average:
    decay: float = 0.999


@dataclass(frozen=True, slots=True)
class Model:
    depth: int = 6
    width: int = 64
    heads: int = 4
    attention: Pattern = Causal()
    pattern: tuple[Pattern, ...] = ()
    activation: Literal["relu", "gelu", "swiglu"] = "gelu"
    precision: Precision = Precision.FULL
    tie: bool = True
    dropout: float | None = None

    def __post_init__(self):
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class Experiment:
    model: Model = Model()
    optimizer: AdamW | Lion | SGD = AdamW()
    average: Average | None = None
    name: str = "toy"
    note: str | None = None
    sizes: tuple[int, ...] = (1, 2)
    words: tuple[str, ...] = ()
    nested: tuple[tuple[int, int], ...] = ()
    limit: int | float | None = None
    derived: int = field(default=0, init=False)


TOY = Experiment()


def get(config, path):
    for part in path.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def refused(path, text, config=TOY):
    with pytest.raises(InputError) as caught:
        configs.override(config, path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Overrides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.depth", "12", 12),
        ("model.depth", "1_000", 1000),
        ("model.depth", "1e3", 1000),
        ("model.depth", "-3", -3),
        ("model.tie", "false", False),
        ("model.tie", "0", False),
        ("model.tie", "True", True),
        ("model.dropout", "0.5", 0.5),
        ("model.dropout", "1", 1.0),
        ("model.dropout", "None", None),
        ("model.activation", "relu", "relu"),
        ("model.precision", "HALF", Precision.HALF),
        ("model.attention", "Window", Window()),
        ("model.attention", "Window(5)", Window(5)),
        ("model.attention", "Window(5, look_ahead=2)", Window(5, 2)),
        ("model.pattern", "Window(256),Window(9,1),Causal", (Window(256), Window(9, 1), Causal())),
        ("model.pattern", "Window(256)*2, Causal()", (Window(256), Window(256), Causal())),
        ("model.pattern", "()", ()),
        ("optimizer.betas", "0.8,0.9", (0.8, 0.9)),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("sizes", "1,2,3", (1, 2, 3)),
        ("sizes", "(4,)", (4,)),
        ("sizes", "4", (4,)),
        ("sizes", "", ()),
        ("sizes.1", "7", (1, 7)),
        ("sizes.-1", "7", (1, 7)),
        ("words", "a, b", ("a", "b")),
        ("words", "'a, b',''", ("a, b", "")),
        ("words", "don't,won't", ("don't", "won't")),
        ("nested", "(1,2),(3,4)", ((1, 2), (3, 4))),
        ("nested", "((1,2),)", ((1, 2),)),
        ("note", "a=b, c(", "a=b, c("),
        ("note", "None", None),
        ("note", "'None'", "None"),
        ("name", "None", "None"),
        ("name", "", ""),
        ("limit", "5", 5),
        ("limit", "5.5", 5.5),
        ("average", "Average", Average()),
        ("average", "Average(decay=0.5)", Average(0.5)),
    ],
)
def test_override_parses_text_by_annotation(path, text, value):
    changed = configs.override(TOY, path, text)
    found = get(changed, path.removesuffix(".1").removesuffix(".-1"))
    assert found == value
    assert type(found) is type(value)
    assert Experiment() == TOY  # the original is unchanged


def test_override_sets_tuple_element_by_index():
    config = configs.override(TOY, "model.pattern", "Window(8),Causal")
    config = configs.override(config, "model.pattern.0.size", "5")
    assert config.model.pattern == (Window(5), Causal())
    config = configs.override(config, "model.pattern.1", "Window")
    assert config.model.pattern == (Window(5), Window())
    assert "valid indices: 0 to 1" in refused("model.pattern.2.size", "5", config)
    assert "the tuple is empty" in refused("model.pattern.0.size", "5")


def test_override_of_type_keeps_common_fields():
    config = configs.override(TOY, "optimizer.weight_decay", "0.7")
    config = configs.override(config, "optimizer.schedule", "Constant(5)")
    assert configs.override(config, "optimizer", "Lion").optimizer == Lion(1e-3, 0.7, Constant(5))
    lion = configs.override(config, "optimizer", "Lion(learning_rate=1e-4)").optimizer
    assert lion == Lion(1e-4, 0.7, Constant(5))
    assert configs.override(config, "optimizer.schedule", "Cosine").optimizer.schedule == Cosine(5)
    assert "SGD needs momentum" in refused("optimizer", "SGD", config)
    assert configs.override(config, "optimizer", "SGD(0.9)").optimizer == SGD(0.9, 1e-3)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        (
            "model.atn",
            "1",
            "config.model has no field 'atn'; did you mean 'attention'? Fields: depth, width, heads",
        ),
        ("optimiser.learning_rate", "1", "config has no field 'optimiser'; did you mean 'optimizer'?"),
        ("derived", "1", "config has no field 'derived'"),
        ("model.depth", "twelve", "config.model.depth=twelve: expected int"),
        ("model.depth", "1.5", "config.model.depth=1.5: expected int"),
        ("model.depth", "1e999999999", "expected int"),
        ("model.depth", "nan", "expected int"),
        ("model.depth", "1e100", "config.model.depth=1e100: expected int"),
        ("model.depth", "9223372036854775808", "expected int"),
        ("model.depth", "9" * 5000, "config.model.depth=9999"),
        ("model.depth", "\u0663", "expected int"),
        ("optimizer.learning_rate", "\u0663", "expected float"),
        ("model.depth", "", "config.model.depth=: expected int"),
        ("model.depth", "None", "expected int"),
        ("model.tie", "maybe", "expected true or false"),
        ("model.dropout", "half", "expected float or None"),
        ("model.activation", "gleu", "expected 'relu', 'gelu', 'swiglu'; did you mean 'gelu'?"),
        ("model.precision", "QUARTER", "expected HALF, FULL"),
        ("optimizer", "Adam", "expected AdamW, Lion or SGD; did you mean 'AdamW'?"),
        ("optimizer", "Lion(lr=1)", "Lion has no field 'lr'"),
        ("optimizer", "Lion(learning_rate=fast)", "Lion.learning_rate=fast: expected float"),
        ("optimizer", "Lion(1,2,3,4)", "Lion takes 3 arguments: learning_rate, weight_decay, schedule"),
        ("optimizer", "Lion(1,learning_rate=2)", "'learning_rate' given twice"),
        ("optimizer", "Lion(1))", "brackets do not match"),
        ("optimizer", "Lion(", "expected AdamW, Lion or SGD"),
        ("optimizer", "3", "expected AdamW, Lion or SGD"),
        ("model.attention", "Windw(3)", "expected Causal or Window; did you mean 'Window'?"),
        ("model.attention", "Window(0)", "config.model.attention=Window(0): size must be positive"),
        ("model.pattern", "Window(3),Globl", "element 1 is Globl: expected Causal or Window"),
        ("model.heads", "7", "config.model.heads=7: width 64 is not a multiple of heads 7"),
        ("model.heads", "0", "config.model.heads=0: "),
        ("average.decay", "0.9", "config.average is None; choose its type first, config.average=Average"),
        ("note.x", "1", "config.note is None and has no fields"),
        ("model.depth.x", "1", "config.model.depth is 6 and has no fields"),
        ("optimizer.betas", "1,2,3", "expected 2 values separated by commas, not 3"),
        ("optimizer.betas", "1,x", "element 1 is x: expected float"),
        ("sizes.x", "1", "config.sizes has no element 'x'"),
        ("sizes", "1,,2", "element 1 is empty: expected int"),
        ("model", "6", "config.model=6: expected Model"),
        ("", "6", "config has no field ''"),
    ],
)
def test_override_error_names_value_and_allowed_values(path, text, message):
    assert message in refused(path, text)


def test_override_all_checks_after_the_last_override():
    pairs = [("model.heads", "7"), ("model.width", "77")]
    for order in (pairs, pairs[::-1]):
        config = configs.override_all(TOY, order)
        assert (config.model.width, config.model.heads) == (77, 7)
    with pytest.raises(InputError, match=r"^config.model.heads=7 config.model.width=78: width 78 is not"):
        configs.override_all(TOY, [("name", "x"), ("model.heads", "7"), ("model.width", "78")])


def test_override_all_uses_the_last_of_two_values():
    assert configs.override_all(TOY, [("name", "a"), ("name", "b")]).name == "b"


def test_split_respects_brackets_and_quotes():
    assert split("a(b,c),d") == ["a(b,c)", "d"]
    assert split("A(name='x,)'),B") == ["A(name='x,)')", "B"]
    assert split("A('x,)')") == ["A('x,)')"]
    assert split(r"'it\'s, so',b") == [r"'it\'s, so'", "b"]
    assert split("a,b,") == ["a", "b"]
    for wrong in ("(a", "a)", "'a"):
        with pytest.raises(InputError, match="do not match"):
            split(wrong)


# Properties over random configs -------------------------------------------------------------------

floats = st.floats(allow_nan=False)
integers = st.integers(1 - 2**63, 2**63 - 1)
schedules = st.builds(Cosine, integers, floats) | st.builds(Constant, integers)
patterns = st.just(Causal()) | st.builds(Window, st.integers(1, 10**9), integers)
optimizers = (
    st.builds(AdamW, floats, floats, st.tuples(floats, floats), schedules)
    | st.builds(Lion, floats, floats, schedules)
    | st.builds(SGD, floats, floats)
)
models = st.builds(
    Model,
    integers,
    st.integers(1, 99).map(lambda n: 8 * n),
    st.sampled_from([1, 2, 4, 8]),
    patterns,
    st.lists(patterns, max_size=4).map(tuple),
    st.sampled_from(["relu", "gelu", "swiglu"]),
    st.sampled_from(Precision),
    st.booleans(),
    st.none() | floats,
)
experiments = st.builds(
    Experiment,
    models,
    optimizers,
    st.none() | st.builds(Average, floats),
    st.text(),
    st.none() | st.text(),
    st.lists(integers).map(tuple),
    st.lists(st.text()).map(tuple),
    st.lists(st.tuples(integers, integers)).map(tuple),
    st.none() | integers | floats,
)


@given(experiments)
@settings(max_examples=100, deadline=None)
def test_render_and_override_roundtrip(config):
    flat = configs.flatten(config)
    assert configs.override_all(config, [(p, configs.render(v)) for p, v in flat.items()]) == config
    assert configs.differences(config, config) == []


# SGD is excluded because its momentum has no default: `optimizer=SGD` alone is an error.
@given(experiments, experiments.filter(lambda config: not isinstance(config.optimizer, SGD)))
@settings(max_examples=100, deadline=None)
def test_override_all_with_values_of_another_config_equals_it(one, other):
    flat = configs.flatten(other)
    assert configs.override_all(one, [(p, configs.render(v)) for p, v in flat.items()]) == other
    assert bool(configs.differences(one, other)) == (one != other)


@given(experiments)
@settings(max_examples=100, deadline=None)
def test_json_roundtrip_preserves_config(config):
    text = json.dumps(configs.to_dict(config), allow_nan=False)
    back = configs.from_dict(json.loads(text))
    assert back == config
    assert configs.show(back, {}) == configs.show(config, {})  # also compares types: 1.0 is not 1


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_override_of_any_text_succeeds_or_raises_input_error(text):
    for path in configs.flatten(TOY):
        try:
            configs.override(TOY, path, text)
        except InputError as error:
            assert str(error)
    try:
        configs.override(TOY, text, "1")
    except InputError as error:
        assert str(error)


# Listings -----------------------------------------------------------------------------------------


def test_sources_distinguishes_default_file_and_flag():
    base = Experiment(model=Model(depth=8, pattern=(Window(3),)), optimizer=Lion(), name="mine")
    flags = {"model.width": "128", "optimizer": "AdamW(weight_decay=0.5)", "model.pattern.0.size": "4"}
    config = configs.override_all(base, flags.items())
    sources = configs.sources(config, base, flags)
    assert sources.keys() == configs.flatten(config).keys()
    expected = {
        "model": "default",
        "model.depth": "file",
        "model.width": "flag",
        "model.heads": "default",
        "model.pattern": "flag",
        "optimizer": "flag",
        "optimizer.learning_rate": "file",  # kept from Lion
        "optimizer.weight_decay": "flag",
        "optimizer.betas": "default",
        "name": "file",
        "note": "default",
    }
    assert {path: sources[path] for path in expected} == expected


def test_sources_flag_equal_to_default_is_a_flag():
    assert configs.sources(TOY, TOY, ["name"])["name"] == "flag"


def test_sources_default_component_determines_field_defaults():
    @dataclass(frozen=True)
    class Big:
        model: Model = Model(depth=48)

    assert configs.sources(Big(), Big(), [])["model.depth"] == "default"
    assert configs.sources(Big(Model()), Big(Model()), [])["model.depth"] == "file"


def test_show_aligns_columns():
    lines = configs.show(TOY, configs.sources(TOY, TOY, ["sizes"])).splitlines()
    assert len(lines) == len(configs.flatten(TOY))
    assert len({line.index("default") for line in lines if line.endswith("default")}) == 1
    assert any(line.split() == ["sizes", "(1,2)", "flag"] for line in lines)
    assert any(line.split() == ["optimizer", "AdamW", "default"] for line in lines)


def test_differences_lists_path_and_both_values():
    other = configs.override_all(TOY, [("model.depth", "12"), ("optimizer", "Lion")])
    assert configs.differences(TOY, other) == [
        "model.depth: 6 -> 12",
        "optimizer: AdamW -> Lion",
        "optimizer.betas: (0.9,0.95) -> absent",
    ]


# Experiment files ---------------------------------------------------------------------------------

EXPERIMENT = '''"""Pronouns: a toy.

More about it.
"""
from __future__ import annotations

from dataclasses import dataclass

@dataclass(frozen=True)
class Pronoun:
    who: str = "she"

@dataclass(frozen=True)
class Other:
    who: str = "it"
    count: int = 1

@dataclass(frozen=True)
class Toy:
    word: Pronoun | Other = Pronoun()
    depth: int = 2

def get_config(argument: str = "small") -> Toy:
    return Toy(depth={"small": 2, "large": 20}[argument])
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "experiments" / "pronouns.py"
    file.parent.mkdir()
    file.write_text(EXPERIMENT)
    return file


def write(file, body):
    file.write_text("import dataclasses\n" + body)
    return str(file)


def test_load_finds_experiment_by_path_and_name(toy, tmp_path, monkeypatch):
    for spec in ("experiments/pronouns.py", "experiments/pronouns", "pronouns", str(toy)):
        loaded = configs.load(spec)
        assert (loaded.config.depth, loaded.name, loaded.argument) == (2, "pronouns", None)
    large = configs.load("pronouns:large")
    assert (large.config.depth, large.argument) == (20, "large")
    assert type(large.config) is type(loaded.config)
    assert configs.load(f"{toy}:large").config == large.config
    # From another folder, experiments in the package's folder are found.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("attnlab.__file__", str(tmp_path / "attnlab" / "__init__.py"))
    assert configs.load("experiments/pronouns.py").config == loaded.config
    assert configs.available() == {"pronouns": "Pronouns: a toy."}


def test_load_bare_name_skips_files_without_get_config(toy, tmp_path, refuses):
    (tmp_path / "pronouns.py").write_text("print('a script of the same name')\n")
    assert configs.load("pronouns").path == toy
    with refuses("has no function get_config"):
        configs.load("pronouns.py")
    (tmp_path / "pronouns.py").write_text(EXPERIMENT)
    assert configs.load("pronouns").path == tmp_path / "pronouns.py"


def test_override_accepts_classes_of_the_experiment_file(toy):
    config = configs.override(configs.load("pronouns").config, "word", "Other(count=3)")
    assert (config.word.who, config.word.count) == ("she", 3)


def test_load_rereads_edited_experiment(toy):
    first = configs.load("pronouns").config
    toy.write_text(EXPERIMENT.replace('"small": 2', '"small": 3'))
    assert (first.depth, configs.load("pronouns").config.depth) == (2, 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "has no function get_config"),
        ("get_config = 3", "has no function get_config"),
        ("def get_config(): return dict(a=1)", "returned dict, not a dataclass"),
        ("def get_config(", "x.py:2: SyntaxError: '(' was never closed"),
        ("import nonesuch_module", "x.py:2: ModuleNotFoundError: No module named 'nonesuch_module'"),
        ("raise SystemExit('no data')", "x.py:2: SystemExit: no data"),
        ("async def get_config(): return 5", "returned coroutine, not a dataclass"),
        ("raise GeneratorExit", "x.py:2: GeneratorExit"),
        ("raise BaseException('stop')", "x.py:2: BaseException: stop"),
        ("def get_config(): raise BaseException('stop')", "x.py:2: BaseException: stop"),
        ("class Silent(Exception):\n  def __str__(self): raise ValueError\nraise Silent", "x.py:4: Silent"),
        ("raise Exception('x' * 10**6)", "x.py:2: Exception: xxx"),
        ("def get_config():\n  return get_config()", "x.py:3: RecursionError: "),
        ("get_config = type('C', (), {'__call__': 5})()", "x.py"),
        ("def get_config():\n  return 1 / 0", "x.py:3: ZeroDivisionError: division by zero"),
        ("def get_config(size): return size", "needs an argument (size)"),
        (
            "@dataclasses.dataclass\nclass C:\n  a: int = 'x'\nget_config = C",
            "config.a='x': expected int",
        ),
        (
            "@dataclasses.dataclass\nclass C:\n  a: 'Nonesuch' = 1\nget_config = C",
            "C: cannot resolve its annotations",
        ),
    ],
)
def test_load_reports_broken_experiment_in_one_line(tmp_path, body, message):
    with pytest.raises(InputError) as caught:
        configs.load(write(tmp_path / "x.py", body))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_rejects_fifo(tmp_path):
    os.mkfifo(tmp_path / "x.py")
    with pytest.raises(InputError, match=r"no experiment file|is a FIFO"):
        configs.load(str(tmp_path / "x.py"))


def test_load_rejects_argument_of_experiment_without_argument(tmp_path):
    file = write(tmp_path / "x.py", "@dataclasses.dataclass\nclass C: pass\ndef get_config(): return C()")
    assert dataclasses.is_dataclass(configs.load(file).config)
    with pytest.raises(InputError, match="takes no argument, but 'large'"):
        configs.load(f"{file}:large")


def test_load_mistyped_name_lists_experiments(toy):
    with pytest.raises(InputError, match=r"'pronuns'; did you mean 'pronouns'\? Experiments: pronouns"):
        configs.load("pronuns")


# Saved configs ------------------------------------------------------------------------------------


def with_count(text, json_value):
    """Return a saved config of `Toy` with another value of the field `word.count`, which is 3."""
    assert '"count": 3' in text
    return text.replace('"count": 3', f'"count": {json_value}')


def save(toy, workdir):
    loaded = configs.load("pronouns:large")
    config = configs.override(loaded.config, "word", "Other(count=3)")
    sources = configs.sources(config, loaded.config, ["word"])
    configs.save(workdir, loaded, config, sources)
    return config, sources


def test_load_workdir_needs_only_the_workdir(toy, tmp_path):
    config, sources = save(toy, tmp_path / "run")
    toy.unlink()
    back = configs.load_workdir(tmp_path / "run")
    assert configs.differences(back.config, config) == []
    assert (back.name, back.argument, dict(back.sources)) == ("pronouns", "large", sources)
    assert configs.load(str(tmp_path / "run" / "config.json")).config == back.config
    # Sources are preserved, and saving again changes nothing.
    again = configs.override(back.config, "depth", "9")
    assert configs.sources(again, back.config, ["depth"], back.sources) == sources | {"depth": "flag"}
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    configs.save(tmp_path / "run", back, back.config, back.sources)
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before
    assert before.keys() == {"config.json", "experiment.py"}


def test_save_writes_the_source_that_was_loaded(toy, tmp_path):
    loaded = configs.load("pronouns")
    toy.write_text("broken(")
    configs.save(tmp_path / "run", loaded, loaded.config, {})
    assert configs.load_workdir(tmp_path / "run").config.depth == 2


def test_load_workdir_in_another_process_without_jax(toy, tmp_path):
    save(toy, tmp_path / "run")
    code = f"from attnlab import config; print(config.load_workdir({str(tmp_path / 'run')!r}).config)"
    code += "; import sys; assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    root = configs.experiments.Path(configs.__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "Toy(word=Other(who='she', count=3), depth=20)"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: "", "it is not JSON"),
        (lambda text: text[:40], "it is not JSON"),
        (lambda text: "[" * 100_000, "nested more than"),
        (lambda text: '{"a":' * 100_000, "nested more than"),
        (lambda text: "[1, 2]", "is not a config that attnlab saved"),
        (lambda text: '{"model": 3}', "is not a config that attnlab saved"),
        (
            lambda text: text.replace(":Other", ":Gone"),
            "config.word is of type experiment:Gone, which this version",
        ),
        (lambda text: text.replace("experiment:Toy", "gone.module:Toy"), "config is of type gone.module:Toy"),
        (lambda text: text.replace("experiment:Toy", "json:dumps"), "json:dumps is not a type"),
        (lambda text: text.replace("experiment:Toy", "json:JSONDecoder"), "is not a dataclass"),
        (lambda text: text.replace('"count": 3', '"number": 3'), "config.word (Other) has no field 'number'"),
        (lambda text: text.replace('"count": 3', '"count": "3"'), "config.word.count='3': expected int"),
        (lambda text: with_count(text, '{"$float": "x"}'), "config.word.count: $float is 'x'; it must be"),
        (lambda text: with_count(text, '{"$float": [1]}'), "$float is [1]"),
        (lambda text: with_count(text, '{"$float": "inf"}'), "config.word.count=inf: expected int"),
        (lambda text: with_count(text, '{"$enum": "signal:Signals", "name": [1]}'), "has no member [1]"),
        (lambda text: with_count(text, '{"$enum": [], "name": "A"}'), "has no $type of the form"),
        (lambda text: with_count(text, '{"$type": []}'), "has no $type of the form"),
        (lambda text: with_count(text, "[3]"), "config.word.count=(3,): expected int"),
        (lambda text: with_count(text, "9" * 5000), "5,000 digits"),
        (lambda text: with_count(text, str(2**63)), f"config.word.count={2**63}: expected int"),
        (lambda text: text.replace('"mesh": null', '"mesh": 5'), "is not a config that attnlab saved"),
        (lambda text: text.replace('"argument": "large"', '"argument": []'), "does not name its experiment"),
        (lambda text: text.replace('"file"', "5"), "a source is not a text"),
        (lambda text: text.replace("experiment:Toy", "os:system"), "os:system is not a type"),
        (
            lambda text: text.replace("experiment:Toy", ".x:Toy"),
            "config is of type .x:Toy, which this version",
        ),
        (lambda text: text.replace('"$type"', '"type"'), "has no $type of the form"),
        (lambda text: text.replace('"name": "pronouns",', ""), "does not name its experiment"),
    ],
)
def test_load_workdir_reports_invalid_config_in_one_line(toy, tmp_path, edit, message):
    save(toy, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(edit(file.read_text()))
    with pytest.raises(InputError) as caught:
        configs.load_workdir(tmp_path / "run")
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda text: text.replace("experiment:Toy", "attnlab.gone:Toy"),
            "config is of type attnlab.gone:Toy",
        ),
        (lambda text: text.replace('"count": 3', '"number": 3'), "config.word (Other) has no field 'number'"),
    ],
)
def test_load_workdir_of_older_version_names_both_versions(toy, tmp_path, edit, message):
    save(toy, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(edit(file.read_text().replace(f'"{attnlab.__version__}"', '"0.1.0"')))
    with pytest.raises(InputError) as caught:
        configs.load_workdir(tmp_path / "run")
    head = (
        f"{file} was written by attnlab 0.1.0 and cannot be read by attnlab {attnlab.__version__}: {message}"
    )
    assert str(caught.value).startswith(head)
    assert str(caught.value).endswith("; start a new run")


def test_load_workdir_with_removed_imports_names_both_versions(toy, tmp_path):
    save(toy, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace(f'"{attnlab.__version__}"', '"0.1.0"'))
    source = tmp_path / "run" / "experiment.py"
    source.write_text(source.read_text() + "\nfrom attnlab.trained import Trained\n")
    with pytest.raises(
        InputError, match=r"was written by attnlab 0\.1\.0 .*No module named 'attnlab.trained'"
    ):
        configs.load_workdir(tmp_path / "run")


def test_load_workdir_without_run(tmp_path):
    with pytest.raises(InputError, match=r"holds no run: it has no config.json"):
        configs.load_workdir(tmp_path)


def test_load_workdir_missing_field_takes_default(toy, tmp_path):
    save(toy, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    record = json.loads(file.read_text())
    del record["config"]["depth"]
    file.write_text(json.dumps(record))
    assert configs.load_workdir(tmp_path / "run").config.depth == 2


def test_to_dict_names_value_that_cannot_be_saved():
    @dataclass(frozen=True)
    class Odd:
        things: object

    with pytest.raises(InputError, match=r"config.things is a list, which cannot be saved"):
        configs.to_dict(Odd([1]))


def test_json_roundtrip_of_nonfinite_floats():
    for value in (math.inf, -math.inf):
        assert configs.from_dict(configs.to_dict(Average(value))) == Average(value)
    assert math.isnan(configs.from_dict(configs.to_dict(Average(math.nan))).decay)


def test_parse_prefers_the_narrowest_type():
    assert parse("1", bool | int) == 1
    assert parse("x", str | None) == "x"
    assert parse("5", int | tuple[int, ...]) == 5
    assert parse("5,", int | tuple[int, ...]) == (5,)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the `type` statement requires Python 3.12")
def test_parse_resolves_type_aliases():
    names = {"AdamW": AdamW, "Lion": Lion}
    exec("type Optimizer = AdamW | Lion\ntype Maybe = Optimizer | None", names)
    assert parse("Lion", names["Maybe"], AdamW(weight_decay=0.3)) == Lion(1e-3, 0.3)
    assert parse("None", names["Maybe"]) is None
    with pytest.raises(InputError, match="expected AdamW, Lion or None; did you mean 'Lion'"):
        parse("Lino", names["Maybe"])


def test_override_accepts_subclass_defined_in_experiment_file(toy):
    toy.write_text(
        "from tests import test_config\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Dilated(test_config.Window):\n  rate: int = 2\n"
        "def get_config(): return test_config.Experiment()\n"
    )
    config = configs.override(configs.load("pronouns").config, "model.attention", "Dilated(64, rate=4)")
    assert type(config.model.attention).__name__ == "Dilated"
    assert config.model.attention.size == 64
    assert configs.to_dict(config)["model"]["attention"]["$type"] == "experiment:Dilated"


def saved_run(folder, config):
    record = {"attnlab": attnlab.__version__, "experiment": {"name": "x", "argument": None}, "sources": {}}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(record | {"config": config}))
    (folder / "experiment.py").write_text("raise SystemExit('this code ran')")
    return folder


BYTES = {"$type": "attnlab.data.tokenizer:Bytes"}


def test_without_experiment_code_a_config_of_library_classes_is_enough(tmp_path, refuses):
    run = saved_run(tmp_path, {"$type": "attnlab.data.text:Text", "tokenizer": BYTES})
    loaded = configs.load_workdir(run, experiment_code=False)
    assert (type(loaded.config.tokenizer).__name__, loaded.module) == ("Bytes", None)
    assert configs.load(str(run / "config.json"), False).config == loaded.config
    with refuses("this code ran"):
        configs.load_workdir(run)


@pytest.mark.parametrize(
    "tag",
    [
        *(
            "experiment:Model",
            "experiment.near:Model",
            "os:environ",
            "antigravity:X",
            "attnlab.__main__:X",
            "attnlab",
            5,
        ),
        *("attnlabx:X", "attnlab.runner.cli:main", "attnlab:os.path", "attnlab.x:Y\n", "./attnlab.x:Y"),
    ],
)
@pytest.mark.parametrize("key", ["$type", "$enum"])
def test_without_experiment_code_other_classes_are_refused(tmp_path, refuses, tag, key):
    modules = set(sys.modules)
    for config in ({key: tag}, {"$type": "attnlab.data.text:Text", "tokenizer": [BYTES, {key: tag}]}):
        with refuses("--no_experiment_code allows only attnlab's classes"):
            configs.load_workdir(saved_run(tmp_path, config), experiment_code=False)
    assert set(sys.modules) == modules
