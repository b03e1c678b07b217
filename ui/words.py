"""All words of the page, in each language, and how it writes numbers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "es")
_FOLDER = Path(__file__).with_name("words")


class Words:
    """The words of one language.

    Args:
        language: one of `LANGUAGES`.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        text = (_FOLDER / f"{language}.json").read_text(encoding="utf-8")
        self.all: dict[str, Any] = json.loads(text)

    def __call__(self, key: str, **values: object) -> str:
        """A text of the page, with its gaps filled."""
        text: str = self.all["texts"][key]
        return text.format(**values) if values else text

    def knows(self, key: str) -> bool:
        """Whether there is a text with this key."""
        return key in self.all["texts"]

    def field(self, name: str) -> str:
        """Label of a field; a field that is newer than this page keeps its name."""
        return str(self.all["fields"].get(name, name))

    def value(self, field: str, value: object, otherwise: str = "") -> str:
        """Label of a field's value, else of that value in any field, else what the API calls it."""
        for group in (field, "any"):
            label = self.all["values"].get(group, {}).get(str(value))
            if label is not None:
                return str(label)
        return otherwise or str(value)

    def feature(self, name: str) -> str:
        """What a feature of the model means."""
        return self._named("features", name)

    def metric(self, name: str) -> str:
        """Name of a metric."""
        return self._named("metrics", name)

    def gate(self, name: str) -> str:
        """Name of a promotion gate."""
        return self._named("gates", name)

    def slice(self, dimension: str, value: str) -> str:
        """Name of a group of encounters."""
        known = self.all["slices"].get(value)
        return str(known) if known else self.value(dimension, value)

    def required(self, rule: str) -> str:
        """What a promotion gate asks for; its numbers stay."""
        for phrase, translated in self.all["required"].items():
            rule = rule.replace(phrase, translated)
        return rule.replace(".", self.all["decimal"])

    def number(self, value: float | None, digits: int = 0) -> str:
        """A number as this language writes it; a dash for none."""
        if value is None:
            return self("none")
        marks = {",": self.all["thousands"], ".": self.all["decimal"]}
        return "".join(marks.get(sign, sign) for sign in f"{value:,.{digits}f}")

    def percent(self, share: float | None, digits: int = 1) -> str:
        """A share as a percentage, with the space that keeps the sign on its line."""
        return self("none") if share is None else f"{self.number(100 * share, digits)}\N{NBSP}%"

    def _named(self, group: str, name: str) -> str:
        return str(self.all[group].get(name, name))


@cache
def words(language: str) -> Words:
    """The words of a language, read once; English for one that we do not have."""
    return Words(language if language in LANGUAGES else LANGUAGES[0])
