"""A configuration as text: layers of yaml and `key=value` words over typed defaults, and what is said of a mistake.

Knows no key by name: which there are, and what fits, follows from the dataclass that it is given. Values are typed by
the key's declaration, never guessed from their looks; nothing in a file is resolved or expanded, `$VAR` and `~` only in
values typed on the command line. What was read and typed, OmegaConf merges and writes (docs/adr/0152). Every mistake is
a SettingsError of one line that names the key.

A list of sections (a field `list[Dataclass]`) has keys by place, from 0: `views.1.flip`. Its field's metadata names, as
`length`, the key beside it that says how many there are where the list itself is not given.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf

from amclip_ds import plain_yaml, synonyms
from amclip_ds.errors import LocalSettingsError, SettingsError, UserError, in_one_line
from amclip_ds.redact import redact_all

Config = TypeVar("Config")
Values = dict[str, Any]  # dotted key -> value, of its declared type
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
LARGEST = 2**63 - 1


def keys_and_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key -> its declared type; a list of sections is one key (with_items adds those of its items)."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            found |= keys_and_types(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = hint
    return found


def shard_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys that take SHARDS, by their fields' metadata."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from shard_keys(typing.cast(type, hint), f"{prefix}{item.name}.")
        elif item.metadata.get("shards"):
            yield prefix + item.name


def with_sections(base: type[Config], sections: Mapping[str, type]) -> type[Config]:
    """The dataclass with further sections, name -> dataclass, or with others in the place of its own."""
    made: type[Config] = _made(base, tuple(sections.items()))  # type: ignore[arg-type]
    return made


@functools.cache
def _made(base: Any, sections: tuple[tuple[str, type], ...]) -> Any:
    fields = [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in sections]
    own = {"has_no_source": True, "made_of": (base, sections), "__reduce__": _reduced}
    return dataclasses.make_dataclass(base.__name__, fields, bases=(base,), namespace=own)


def _reduced(settings: Any) -> tuple[Any, ...]:
    """For pickle, which finds no class that was made here: it is made again (settings go from rank to rank)."""
    return _revived, (_parts_of(type(settings)), settings.__dict__)


def _parts_of(kind: Any) -> Any:
    if "made_of" not in vars(kind):
        return kind
    base, sections = kind.made_of
    return _parts_of(base), tuple((name, _parts_of(section)) for name, section in sections)


def _kind_of(parts: Any) -> Any:
    if isinstance(parts, type):
        return parts
    base, sections = parts
    return _made(_kind_of(base), tuple((name, _kind_of(section)) for name, section in sections))


def _revived(parts: Any, values: dict[str, Any]) -> Any:
    settings = object.__new__(_kind_of(parts))
    settings.__dict__.update(values)
    return settings


def check_options(kind: Any, who: str) -> None:
    """Whether a dataclass that is not ours can be a section. Raises UserError, with `who` first."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserError(f"{who} are no dataclass")
    try:
        kind()
        keys = keys_and_types(kind)
    except Exception as error:
        raise UserError(f"{who}: {type(error).__name__}: {in_one_line(error, 200)}; each needs a default") from None
    for key, hint in keys.items():
        base, _ = _parts(hint)
        items = typing.get_args(base) if typing.get_origin(base) is list else (base,)
        if not set(items) <= {bool, int, float, str}:
            raise UserError(
                f"{who}: {key} is a {hint}; bool, int, float, str, a list of these, or a dataclass can be set"
            )


def item_kind(hint: Any) -> type | None:
    """The dataclass of a list of sections; None for any other type."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return kinds[0] if kinds and dataclasses.is_dataclass(kinds[0]) else None  # type: ignore[return-value]


def with_items(known: Mapping[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """The keys, and those of each item of a list of sections that one of the words names: `views.1.flip`."""
    found = dict(known)
    for key, hint in known.items():
        if kind := item_kind(hint):
            places = {match[1] for word in words if (match := re.match(rf"{re.escape(key)}\.(0|[1-9]\d*)\.", word))}
            for place in places:
                found |= keys_and_types(kind, f"{key}.{place}.")
    return found


def merge(kind: type[Config], layers: Sequence[Values], sources: Mapping[str, str]) -> Config:
    """The dataclass with `layers`, each over the one before, in place of its defaults. sources: key -> where its value
    was written. Raises SettingsError with what a section's own check says.
    """
    for layer in layers:
        plain_yaml.refuse_interpolation(layer, "settings")  # OmegaConf would resolve it
    values = _in_one_layer(kind, layers, sources)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), _nested(values))
        return typing.cast(Config, OmegaConf.to_object(merged))
    except (ValueError, OverflowError) as error:
        text = in_one_line(error)
        source = sources.get(text.split(":", 1)[0])
        raise SettingsError(text + (f" (in {source})" if source else "")) from None


def _in_one_layer(kind: type, layers: Sequence[Values], sources: Mapping[str, str]) -> Values:
    """The layers, each over the one before; a list of sections that is given anew takes the place of the one below."""
    values: Values = {}
    lists = list(_lists_of(kind))
    for layer in layers:
        for key, _, _ in lists:
            if key in layer:
                values = {name: value for name, value in values.items() if not name.startswith(f"{key}.")}
        values |= layer
        for key, length, _ in lists:
            listed = values.get(key, 0)
            if listed and layer.get(length, listed) != listed:
                where = f" (in {sources[length]})" if length in sources else ""
                raise SettingsError(f"{length}: {layer[length]}, but {key} lists {listed}; change the list{where}")
    for key, length, default in lists:
        values = _with_list(values, key, length, default, sources)
    return values


def _with_list(values: Values, key: str, length: str, default: int, sources: Mapping[str, str]) -> Values:
    """The dotted keys of a list's items as one list. Raises SettingsError for an item that is not there."""
    listed = values.pop(key, 0)
    own = {name: value for name, value in values.items() if name.startswith(f"{key}.")}
    if not listed and not own:
        return values
    number = listed or values.get(length, default)
    items: list[Values] = [{} for _ in range(number)]
    for name, value in own.items():
        place, _, rest = name.removeprefix(f"{key}.").partition(".")
        if int(place) >= number:
            where = f" (in {sources[name]})" if name in sources else ""
            raise SettingsError(
                f"{name}: there is no {key}.{place}; {length} is {number}, the places are 0 to {number - 1}{where}"
            )
        items[int(place)][rest] = value
    rest_of_them = {name: value for name, value in values.items() if name not in own}
    return rest_of_them | {key: [_nested(item) for item in items]}


def _lists_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str, int]]:
    """Each list of sections: its key, the key of its length and that key's default."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if item_kind(hint):
            length = item.metadata["length"]
            yield f"{prefix}{item.name}", f"{prefix}{length}", getattr(kind(), length)
        elif dataclasses.is_dataclass(hint):
            yield from _lists_of(typing.cast(type, hint), f"{prefix}{item.name}.")


def _nested(values: Values) -> dict[str, Any]:
    """`{"run.seed": 3}` -> `{"run": {"seed": 3}}`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


def dump(config: Any, leave_out: Sequence[str] = ()) -> str:
    """The resolved settings as yaml, without secrets and the keys `leave_out`."""
    plain = redact_all({key: value for key, value in dataclasses.asdict(config).items() if key not in leave_out})
    plain_yaml.refuse_interpolation(plain, "settings")  # the text could not be read again
    return OmegaConf.to_yaml(plain)


def explain(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Each key with its value and what it means, from the docstrings beside the fields."""
    docs = field_docs(type(node))
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from explain(value, f"{prefix}{item.name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for place, one in enumerate(value):
                yield from explain(one, f"{prefix}{item.name}.{place}.")
        else:
            yield f"{prefix}{item.name}", value, docs.get(item.name, "")


def field_docs(kind: type) -> dict[str, str]:
    """Field name -> the string literal that follows it in the source of a dataclass, or of one that it derives from."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base) and not hasattr(base, "has_no_source"):
            docs |= _docs_in(base)
    return docs


def _docs_in(kind: type) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    docs = {}
    for statement, after in zip(body, body[1:]):
        is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_doc:
            docs[statement.target.id] = " ".join(str(typing.cast(ast.Constant, after.value).value).split())  # type: ignore[attr-defined]
    return docs


def read_layer(layer: Any, known: Mapping[str, Any], source: str) -> Values:
    """A yaml's nested sections as dotted keys, each value of its declared type. An empty section sets nothing."""
    return _read_section(layer, known, f" (in {source})")


def _read_section(layer: Any, known: Mapping[str, Any], where: str, prefix: str = "") -> Values:
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        what = f"{prefix[:-1]}: {_shown(layer)}" if prefix else _shown(layer)
        raise SettingsError(f"{what} is no section: expected `key: value` lines{where}")
    values: Values = {}
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if any(other.startswith(key + ".") for other in known):
            values |= _read_section(value, known, where, key + ".")
        elif key not in known:
            raise SettingsError(f"{unknown(key, known)}{where}")
        elif "." in str(name):
            section, _, last = key.rpartition(".")
            raise SettingsError(f"{key}: nest it in a yaml: `{last}:` below `{section}:`{where}")
        else:
            values |= _read_value(key, known[key], value, where)
    return values


def _read_value(key: str, hint: Any, value: Any, where: str = "") -> Values:
    """The value of a key, by its type; of a list of sections, how many there are and the keys of each."""
    kind = item_kind(hint)
    if kind is None:
        return {key: coerce(key, hint, value, where)}
    if isinstance(value, dict):  # some items, by place
        values, items = {}, value
    elif isinstance(value, list):
        values, items = {key: len(value)}, dict(enumerate(value))
    else:
        raise SettingsError(f"{key}: {_shown(value)} does not fit; it takes {fits(key, hint)}{where}")
    for place, item in items.items():
        if not isinstance(place, int) or isinstance(place, bool) or place < 0:
            raise SettingsError(f"{key}.{place}: items are named by their place, a whole number from 0{where}")
        prefix = f"{key}.{place}."
        values |= _read_section(item, keys_and_types(kind, prefix), where, prefix)
    return values


def read_overrides(words: Sequence[str], known: Mapping[str, Any], shards: Collection[str] = ()) -> Values:
    """`key=value` words of a command line. Raises SettingsError, also for a key that is given twice.

    shards: the keys whose value a shell may have expanded, because it was in no quotes.
    """
    texts: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise SettingsError(f"{word!r}: expected key=value")
        texts.setdefault(key, []).append(text)
    known, values = with_items(known, texts), Values()
    for key, given in texts.items():
        if key not in known:
            inside = [name for name in known if name.startswith(key + ".")]
            if inside:
                raise SettingsError(f"{key}: a section, not a key; its keys: {', '.join(inside)}")
            raise SettingsError(unknown(key, known))
        if len(given) > 1:
            raise SettingsError(_twice(key, given, key in shards))
        values |= _typed(key, known[key], given[0])
    return values


def _twice(key: str, given: list[str], takes_shards: bool) -> str:
    """Of shards, a shell has most often made several words of one."""
    reported = f"{key} is given {len(given)} times: {key}={given[0]} and {key}={given[-1]}"
    whole = unexpand(given) if takes_shards else None
    if whole is None:
        return f"{reported}; give it once"
    return f"{reported}; a shell expands braces outside quotes: write '{key}={whole}'"


def unexpand(given: Sequence[str]) -> str | None:
    """The braces that a shell made `given` of: ['a0.tar', 'a1.tar'] -> 'a{0..1}.tar'; None if they are no such row."""
    before = os.path.commonprefix(list(given))
    after = os.path.commonprefix([text[len(before) :][::-1] for text in given])[::-1]
    middles = [text[len(before) : len(text) - len(after)] for text in given]
    if len(set(given)) < len(given) or not (before or after):
        return None
    digits = len(before) - len(before.rstrip("0123456789"))  # 00000..00003 share their first zeros
    before, middles = before[: len(before) - digits], [before[len(before) - digits :] + text for text in middles]
    if all(text.isdecimal() for text in middles):
        numbers = [int(text) for text in middles]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{before}{{{middles[0]}..{middles[-1]}}}{after}"
    return f"{before}{{{','.join(middles)}}}{after}"


def _typed(key: str, hint: Any, text: str) -> Values:
    """A command line's text as what the key takes."""
    base, optional = _parts(hint)
    if optional and text in ("null", "none", "None"):
        return {key: None}
    if base is str:
        return {key: _expand(key, text)}
    if typing.get_origin(base) is list:
        if not text.startswith("["):
            raise SettingsError(f"{key}: {text!r} does not fit; it takes {fits(key, hint)}")
        try:
            items = plain_yaml.parse(text, key)
        except UserError:
            raise SettingsError(f"{key}: {text!r} does not fit; it takes {fits(key, hint)}") from None
        return _read_value(key, hint, items)
    return {key: coerce(key, hint, text)}


def coerce(key: str, hint: Any, value: Any, where: str = "") -> Any:
    """The value as the type that the key declares. Raises SettingsError that says what would fit."""
    base, optional = _parts(hint)
    if value is None and optional:
        return None
    if isinstance(value, bool) and bool in typing.get_args(hint):
        return str(value).lower()
    if typing.get_origin(base) is list:
        (item,) = typing.get_args(base)
        if isinstance(value, list | tuple):
            return [coerce(key, item, one, where) for one in value]
    else:
        try:
            return {bool: _boolean, int: _whole, float: _number, str: _text}[base](value)
        except ValueError:
            pass
    raise SettingsError(f"{key}: {_shown(value)} does not fit; it takes {fits(key, hint)}{where}")


def fits(key: str, hint: Any) -> str:
    """What a key takes, in words."""
    base, optional = _parts(hint)
    if item_kind(base):
        words = f"a list of sections, in brackets and quotes: '{key}=[{{KEY: VALUE}}, {{}}]'"
    elif typing.get_origin(base) is list:
        item = fits(key, typing.get_args(base)[0]).removeprefix("a ")
        words = (
            f"a list of {item}s, in brackets and quotes: '{key}=[A,B]'"
            if item != "text"
            else (f"a list of texts, in brackets and quotes: '{key}=[A,B]'")
        )
    else:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[base]
    return f"{words}, or null" if optional else words


def _parts(hint: Any) -> tuple[Any, bool]:
    """`int | None` -> (int, True); `str | bool`, words of which two are true and false -> (str, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        bases = [part for part in typing.get_args(hint) if part is not type(None)]
        is_optional = type(None) in typing.get_args(hint)
        return (str if str in bases else bases[0] if len(bases) == 1 else hint), is_optional
    return hint, False


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in BOOLEANS and not isinstance(value, float):
        return BOOLEANS[str(value).lower()]
    raise ValueError


def _whole(value: Any) -> int:
    if isinstance(value, bool | float) or not isinstance(value, int | str):
        raise ValueError
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9][0-9_]*", value.strip()):
        raise ValueError
    number = int(value)
    if abs(number) > LARGEST:
        raise ValueError
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    text = str(value)
    text.encode()  # bytes of an argument that are no UTF-8 raise UnicodeEncodeError, a ValueError
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError
    return text


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _expand(key: str, text: str) -> str:
    """Environment variables and ~ in a text value, so that 'data.train=$SCRATCH/...' may be quoted."""
    expanded = os.path.expanduser(os.path.expandvars(_checked_text(key, text)))
    missing = re.search(r"\$\{?([A-Za-z_]\w*)\}?", expanded)
    if missing:
        raise LocalSettingsError(f"{key}: the environment variable {missing.group(1)} in {text!r} is not set")
    plain_yaml.refuse_interpolation(expanded, key)  # config.yaml, which will hold it, has none
    return expanded


def _checked_text(key: str, text: str) -> str:
    try:
        return _text(text)
    except ValueError:
        raise SettingsError(
            f"{key}: {_shown(text)} does not fit: a line end, a control character, or no UTF-8"
        ) from None


def unknown(word: str, known: Mapping[str, Any]) -> str:
    """What is said of a key that there is not: another trainer's word, a key of that last name, or a misspelling."""
    if normal := next((key for key in known if key == synonyms.normalise(word)), None):
        return f"{word}: unknown key; did you mean {normal}? Keys are written as here, without dashes"
    suggestion = synonyms.suggest(word) or nearest(word, list(known))
    word = word if word.isprintable() and word else repr(word)
    return f"{word}: unknown key; {suggestion or '`amclip recipes RECIPE` lists all keys'}"


def nearest(word: str, known: Sequence[str]) -> str | None:
    """`did you mean X?`: of dotted names first the whole, then those with that last part; None if nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    last = word.rsplit(".", 1)[-1]
    if not near:
        near = [key for key in known if key.rsplit(".", 1)[-1] == last]
        near = near if len(near) == 1 or last == word else []  # data.name is neither model.vision.name nor optim.name
    if not near:  # within a section, names alone: what they share of the section would make anything near
        section = word.rpartition(".")[0]
        names = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section or not section}
        longer = [name for name in names if name.startswith(last + "_")]
        near = [names[name] for name in longer or difflib.get_close_matches(last, names, n=1, cutoff=0.7)]
    return f"did you mean {' or '.join(near[:3])}?" if near else None
