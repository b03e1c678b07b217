"""Which model answers: follows an alias of the registry, and lets nothing bad take over."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from serving.errors import ModelRefusedError, RegistryError
from serving.model import Model
from serving.registry import Registry

Outcome = Literal["swapped", "refused", "failed"]

_KEPT = 2
"""Versions in the cache beside the one that is served."""

log = logging.getLogger(__name__)


class Keeper:
    """Keeps the model of one alias: loads it, tests it, puts it in the place of the one before.

    Every version has a folder of its own in the cache, which is complete or not there;
    `<alias>.json` in the cache names the one that was served last, for a start without MLflow.

    Args:
        registry: where the alias is looked up.
        alias: whose version is served.
        cache: folder of downloaded versions.
        on_outcome: called with what became of each version that was tried.
    """

    def __init__(
        self,
        registry: Registry,
        alias: str,
        cache: Path,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self.alias = alias
        self.model: Model | None = None
        self.loaded_at = 0.0
        self.source: Literal["registry", "cache"] = "registry"
        self.reason = f"no model is loaded yet: looking for the version with alias {alias}"
        self._registry = registry
        self._cache = cache
        self._on_outcome = on_outcome
        self._refused: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, seconds: float, on_swap: Callable[[Model], None]) -> None:
        """Ask for the alias now and every so many seconds, in a thread of its own.

        Args:
            seconds: between two questions.
            on_swap: called with a model that has passed, just before it takes over.
        """

        def work() -> None:
            while not self._stopping.is_set():
                try:
                    self.refresh(on_swap)
                except Exception:
                    log.exception("%s: going on with what is loaded", self.alias)
                # Until there is a model, the service is of no use: ask more often.
                self._stopping.wait(seconds if self.model else min(seconds, 1.0))

        self._thread = threading.Thread(target=work, name=f"follow-{self.alias}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        self._stopping.set()

    def refresh(self, on_swap: Callable[[Model], None] = lambda model: None) -> None:
        """Look the alias up once, and serve its version if it passes."""
        try:
            found = self._registry.find(self.alias, timeout=5 if self.model else 3)
        except RegistryError as error:
            self._without_registry(str(error), on_swap)
            return
        if found is None:
            self.reason = (
                f"no version of the registered model has the alias {self.alias}; train one "
                "(make run), or promote one (python -m training promote)"
            )
            return
        version = found["version"]
        if self.model and self.model.version == version:
            self.source = "registry"
            return
        if version in self._refused:
            self.reason = self._refused[version]
            return
        try:
            self._serve(self._fetched(found), "registry", on_swap)
        except ModelRefusedError as error:
            self._refuse(version, str(error))
        except RegistryError as error:
            self.reason = str(error)
            log.warning("%s: %s", self.alias, error)
            self._on_outcome("failed")

    def _fetched(self, found: dict[str, Any]) -> Model:
        folder = self._cache / found["version"]
        if folder.exists():
            try:
                model = Model(folder)
                # Another registry counts its versions from 1 as well.
                if model.about["run_id"] == found["run_id"]:
                    return model
                log.info("version %s in the cache is another registry's", found["version"])
            except ModelRefusedError as error:
                log.warning("the cached copy is broken, fetched anew: %s", error)
            shutil.rmtree(folder)
        log.info("%s: fetching version %s", self.alias, found["version"])
        self._registry.fetch(found, folder)
        return Model(folder)

    def _serve(
        self, model: Model, source: Literal["registry", "cache"], on_swap: Callable[[Model], None]
    ) -> None:
        on_swap(model)
        before = self.model
        # One assignment: a request has the old one or the new one, whole.
        self.model, self.source, self.loaded_at = model, source, time.time()
        pointer = self._cache / f"{self.alias}.json"
        partial = pointer.with_suffix(".part")
        partial.write_text(json.dumps({"version": model.version}), encoding="utf-8")
        partial.replace(pointer)
        self._on_outcome("swapped")
        said = f"in place of {before.version}" if before else f"from the {source}"
        log.info("%s: version %s is served, %s", self.alias, model.version, said)
        self._prune()

    def _refuse(self, version: str, reason: str) -> None:
        self._refused[version] = self.reason = reason
        serving = f"version {self.model.version} goes on" if self.model else "nothing is served"
        log.error("%s: version %s is refused, %s: %s", self.alias, version, serving, reason)
        shutil.rmtree(self._cache / version, ignore_errors=True)
        self._on_outcome("refused")

    def _without_registry(self, why: str, on_swap: Callable[[Model], None]) -> None:
        self.reason = why
        if self.model:
            return
        version = _pointed(self._cache / f"{self.alias}.json")
        if version is None:
            self.reason = f"no version is in the cache, and {why}"
            return
        try:
            model = Model(self._cache / version)
        except ModelRefusedError as error:
            self.reason = f"{why}, and the cached copy is broken: {error}"
            return
        log.warning("%s: %s; serving version %s from the cache", self.alias, why, version)
        self._serve(model, "cache", on_swap)

    def _prune(self) -> None:
        pointers = [_pointed(path) for path in self._cache.glob("*.json")]
        # A name with a point is a version on its way here, of this keeper or another.
        folders = [path for path in self._cache.iterdir() if path.is_dir() and not path.suffix]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        spare = [path for path in folders if path.name not in pointers]
        for path in spare[_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


def _pointed(pointer: Path) -> str | None:
    """The version that was served last; None where none was, or the file is broken."""
    try:
        version = json.loads(pointer.read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return version if isinstance(version, str) else None
