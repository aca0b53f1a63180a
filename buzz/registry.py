"""From names to policies: `parse("buzz(window=300,stride=3)")`."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from inspect import isabstract
from typing import TypeVar

from buzz.policies.buzz import Buzz
from buzz.policies.buzz2 import Buzz2
from buzz.policies.cascade import Cascade
from buzz.policies.corm import Corm
from buzz.policies.elastic import Elastic
from buzz.policies.full import Full
from buzz.policies.h2o import H2O
from buzz.policies.streaming import Streaming
from buzz.policies.window import Window
from buzz.policy import Policy, PolicyError

MAX_SPEC_CHARS = 256

_SPEC = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\(([^()]*)\)\s*)?", re.ASCII)
_SETTING = re.compile(r"\s*([a-z][a-z0-9_]*)\s*=\s*([^\s=]+)\s*", re.ASCII)
_VALUE = re.compile(r"-?[0-9]+|[A-Za-z_]+|'[a-z_]+'|\"[a-z_]+\"", re.ASCII)
_WORDS = {"true": True, "false": False, "none": None}

_policies: dict[str, type[Policy]] = {}
_P = TypeVar("_P", bound=type[Policy])


def register(policy: _P) -> _P:
    """Make a policy known by its `name`; usable as a class decorator. The same class, defined anew, takes the
    place of the former.

    Raises:
        PolicyError: it is no complete dataclass derived from `Policy`, a setting has no default, or its name
            is malformed or taken by another class.
    """
    if not (isinstance(policy, type) and issubclass(policy, Policy)) or isabstract(policy):
        raise PolicyError(f"{policy!r} is not a complete dataclass derived from buzz.Policy")
    if "__dataclass_params__" not in vars(policy):  # what `is_dataclass` finds may be inherited
        raise PolicyError(f"{policy.__name__} needs @dataclass(frozen=True, kw_only=True) below @register")
    if missing := [field.name for field in fields(policy) if field.default is MISSING]:
        raise PolicyError(f"{policy.__name__}: settings need defaults, and {', '.join(missing)} has none")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", str(getattr(policy, "name", ""))):
        raise PolicyError(f"{policy.__name__} needs a name of lower-case letters, digits and _")
    known = _policies.get(policy.name, policy)
    # a cell of a notebook that is run again makes the same class anew
    if (known.__module__, known.__qualname__) != (policy.__module__, policy.__qualname__):
        raise PolicyError(f"the policy name {policy.name!r} is taken by {known.__qualname__}")
    _policies[policy.name] = policy
    return policy


def names() -> tuple[str, ...]:
    """The known policies' names, sorted."""
    return tuple(sorted(_policies))


def parse(spec: str) -> Policy:
    """Read a policy from its specification: a name, and settings by name in parentheses.

    Values are integers, `true`, `false`, `none` or words: `buzz`, `buzz(window=300,positions=original)`.
    `parse(str(policy)) == policy` for every policy.

    Raises:
        PolicyError: the specification is malformed or longer than 256 characters, the policy or a
            setting is unknown or repeated, or a value has the wrong type or is out of range.
    """
    if len(spec) > MAX_SPEC_CHARS:
        raise PolicyError(f"a policy has at most {MAX_SPEC_CHARS} characters, not {len(spec)}")
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise PolicyError(f"{spec!r} is not a policy; write for example buzz or buzz(window=300,stride=3)")
    name, body = match[1], match[2]
    if name not in _policies:
        raise PolicyError(f"unknown policy {name!r}; known are {', '.join(names())}")
    policy = _policies[name]
    allowed = [field.name for field in fields(policy)]
    settings: dict[str, object] = {}
    for part in body.split(",") if body and body.strip() else ():
        setting = _SETTING.fullmatch(part)
        if setting is None:
            raise PolicyError(
                f"{name}: {part.strip()!r} is not setting=value; settings are {', '.join(allowed)}"
            )
        key, text = setting[1], setting[2]
        if key not in allowed:
            raise PolicyError(f"{name}: unknown setting {key!r}; settings are {', '.join(allowed)}")
        if key in settings:
            raise PolicyError(f"{name}: {key} is set twice")
        if not _VALUE.fullmatch(text):
            raise PolicyError(f"{name}: {key}={text} is not an integer, true, false, none or a word")
        settings[key] = _value(text)
    return policy(**settings)  # type: ignore[arg-type]  # the policy checks its own types


def _value(text: str) -> object:
    if text[0] in "'\"":
        return text[1:-1]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    return text if text[0].isalpha() or text[0] == "_" else int(text)


for _builtin in (Buzz, Buzz2, Cascade, Corm, Elastic, Full, H2O, Streaming, Window):
    register(_builtin)
