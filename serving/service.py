"""What the routes share: models, workers, log and metrics of one process."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from functools import partial
from typing import Any, get_args

import uuid_utils

from serving import batch
from serving.errors import ServingError
from serving.lifecycle import Keeper, Outcome
from serving.model import Model, Scored
from serving.prediction_log import PredictionLog
from serving.problems import ProblemError
from serving.registry import PART, Registry
from serving.shadow import Shadow
from serving.telemetry import Telemetry, Values
from settings import Settings

CHALLENGER = "challenger"


class Service:
    """The prediction service, as the routes see it.

    Args:
        chosen: the settings.
    """

    def __init__(self, chosen: Settings) -> None:
        self.settings = chosen
        self.telemetry = Telemetry()
        home = chosen.state_dir / "serving"
        registry = Registry(chosen)
        cache = home / "models"
        cache.mkdir(parents=True, exist_ok=True)
        for abandoned in cache.glob(f"*{PART}"):
            shutil.rmtree(abandoned, ignore_errors=True)
        self.champion = self._keeper(registry, chosen.api_alias)
        self.challenger = self._keeper(registry, CHALLENGER) if chosen.api_shadow else None
        self.workers = batch.Workers(chosen.api_batch_workers)
        self.log: PredictionLog | None = None
        if chosen.prediction_log:
            key = chosen.prediction_log_key.get_secret_value().encode()[:64]
            if not key:
                raise ServingError(
                    "DIABETES_PREDICTION_LOG_KEY is not set: without it the hashes of identifiers "
                    "could be guessed; set it (make up does), or DIABETES_PREDICTION_LOG=false"
                )
            self.log = PredictionLog(
                home / "spool",
                chosen.dsn,
                key,
                chosen.prediction_log_limit_mib << 20,
                self._on_copied,
            )
            self.telemetry.registry.register(Values(self._log_state))
        self.shadow = Shadow(self.workers, self.telemetry)

    def _keeper(self, registry: Registry, alias: str) -> Keeper:
        def on_outcome(outcome: str) -> None:
            self.telemetry.outcomes.labels(alias, outcome).inc()

        for outcome in get_args(Outcome):
            self.telemetry.outcomes.labels(alias, outcome)  # from 0 on, as in telemetry.py
        cache = self.settings.state_dir / "serving" / "models"
        return Keeper(registry, alias, cache, on_outcome)

    async def start(self) -> None:
        """Begin to follow the registry and to empty the log."""
        loop = asyncio.get_running_loop()
        if self.log:
            self.log.start()
        for keeper in filter(None, (self.champion, self.challenger)):
            keeper.follow(self.settings.api_poll_seconds, partial(self._before_swap, loop, keeper))
        self.shadow.start()

    def _before_swap(self, loop: asyncio.AbstractEventLoop, keeper: Keeper, model: Model) -> None:
        """In the keeper's thread: names to the log, metrics, and the workers warmed."""
        if self.log:
            self.log.describe(model.version, model.feature_sha256, model.feature_names)
        self.telemetry.served(
            keeper.alias,
            model.version,
            model.feature_sha256,
            # Not of a copy that an older release of ours left in the cache.
            model.about.get("registered_at"),
        )
        asyncio.run_coroutine_threadsafe(self._warm(model), loop)

    async def _warm(self, model: Model) -> None:
        with contextlib.suppress(Exception):  # a batch will say what is wrong, if it still is
            await self.workers.warm(model.folder)

    async def stop(self) -> None:
        """End all of it; what is in the log's spool is copied, or stays there."""
        for keeper in filter(None, (self.champion, self.challenger)):
            keeper.close()
        await self.shadow.close()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.workers.close)
        if self.log:
            await loop.run_in_executor(None, self.log.close)

    def model(self) -> Model:
        """The model that answers.

        Raises:
            ProblemError: 503, there is none yet.
        """
        if self.champion.model is None:
            raise ProblemError(503, self.champion.reason, headers={"Retry-After": "5"})
        return self.champion.model

    def alert_rate(self, model: Model, asked: float | None) -> float:
        """The rate to decide by.

        Raises:
            ProblemError: 422, no threshold was chosen for it.
        """
        rate = self.settings.api_alert_rate if asked is None else asked
        try:
            model.scorer.threshold(rate)
        except ValueError as error:
            raise ProblemError(422, str(error), [("alert_rate", str(error))]) from None
        return rate

    def job(self, model: Model, alert_rate: float) -> batch.Job:
        """What a batch needs to know."""
        challenger = self.challenger.model if self.challenger else None
        return batch.Job(
            model.folder,
            challenger.folder if challenger else None,
            alert_rate,
            self.log.folder if self.log else None,
            self.log.key if self.log else b"",
        )

    def check_log(self) -> None:
        """See whether predictions can be kept.

        Raises:
            LogFullError: they can't.
        """
        if self.log:
            self.log.check()

    def predict(
        self, encounter: dict[str, Any], alert_rate: float | None, source: str
    ) -> tuple[Model, Scored, dict[str, Any]]:
        """Score, log and answer one encounter."""
        model = self.model()
        rate = self.alert_rate(model, alert_rate)
        self.check_log()
        columns = {name: (value,) for name, value in encounter.items()}
        scored = model.score(batch.without_identifiers(columns), 1)
        ids = [str(uuid_utils.uuid7())]
        if self.log and not scored.excluded:
            made = batch.entry(model, scored, ids, role="champion", source=source, columns=columns)
            self.log.append(made)
            self.telemetry.spooled.inc(len(made.ids))
        if self.challenger:
            self.shadow.add(self.job(model, rate), source, encounter)
        if scored.excluded:
            self.count(source, excluded=1)
        else:
            self.count(source, scored=1)
            self.telemetry.scores.add(model.version, scored.probability)
        return model, scored, batch.predictions(model, scored, ids, rate)[0]

    def count(self, source: str, **results: int) -> None:
        """Count encounters by what became of them."""
        for result, number in results.items():
            if number:
                self.telemetry.rows.labels(source, result).inc(number)

    def count_batch(self, source: str, result: batch.Result) -> None:
        """Count what became of a scored part of a batch."""
        self.count(
            source, scored=len(result.scores), excluded=result.excluded, broken=result.broken
        )
        self.telemetry.scores.add(result.version, result.scores)
        self.telemetry.spooled.inc(result.logged)

    def _on_copied(self, rows: int, seconds: float) -> None:
        self.telemetry.logged.inc(rows)
        self.telemetry.log_seconds.observe(seconds)

    def _log_state(self) -> list[tuple[str, str, float]]:
        assert self.log is not None  # noqa: S101  (registered only then)
        try:
            disk = shutil.disk_usage(self.log.folder)
        except OSError:
            sizes = []  # what the other values say is told all the same
        else:
            sizes = [
                (
                    "prediction_log_disk_free_bytes",
                    "Free on the file system that the spool lies on",
                    float(disk.free),
                ),
                (
                    "prediction_log_disk_size_bytes",
                    "Size of the file system that the spool lies on",
                    float(disk.total),
                ),
            ]
        return [
            *sizes,
            (
                "prediction_log_spool_bytes",
                "Predictions on disk that wait for the database",
                float(self.log.pending_bytes),
            ),
            (
                "prediction_log_spool_files",
                "Closed files of the spool that queue for the database",
                float(self.log.waiting_files),
            ),
            (
                "prediction_log_spool_limit_bytes",
                "Spool from which nothing is predicted any more",
                float(self.settings.prediction_log_limit_mib << 20),
            ),
            (
                "prediction_log_connected",
                "1 if the last contact with the database succeeded",
                float(self.log.connected),
            ),
            (
                "prediction_log_broken_files",
                "Files of the spool that were put aside as unreadable",
                float(self.log.broken_files),
            ),
        ]
