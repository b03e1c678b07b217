"""What `make run` ends with: what was loaded, what became of it, and who is champion."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from psycopg2.extensions import connection as Connection  # noqa: N812

_SPLITS = """
select 'train' as part, 'batch ' || batch_id as detail, rows, patients, positives, batch_id
from clean_data.batch_info
union all
select 'train', 'all', count(*), count(distinct patient_nbr), sum(readmitted_within_30_days), 1e6
from clean_data.diabetes_train
union all
select 'validation', '', count(*), count(distinct patient_nbr), sum(readmitted_within_30_days), 2e6
from clean_data.diabetes_validation
union all
select 'test', '', count(*), count(distinct patient_nbr), sum(readmitted_within_30_days), 3e6
from clean_data.diabetes_test
union all
select 'excluded', 'died or hospice', count(*), count(distinct patient_nbr), null, 4e6
from clean_data.diabetes_excluded
order by 6
"""

_LOAD = """
select load_id, source, sha256, is_synthetic, rows_read, rows_inserted, rows_updated, rows_deleted,
    rows_unchanged, rows_rejected
from raw_data.ingestion_log
order by load_id desc
limit 1
"""


def summary(connection: Connection) -> str:
    """Describe the last load and the rows of each split and batch, as lines of text."""
    cursor = connection.cursor()
    cursor.execute(_LOAD)
    load_id, source, sha256, synthetic, read, inserted, updated, deleted, unchanged, rejected = (
        cursor.fetchone() or (None,) * 10
    )
    lines = [
        f"Load {load_id}: {source}",
        f"  SHA-256 {sha256}",
        f"  {read:,} rows: {inserted:,} new, {updated:,} changed, {unchanged:,} unchanged, "
        f"{rejected:,} rejected; {deleted:,} removed",
    ]
    if synthetic:
        lines.insert(0, "*** SYNTHETIC DATA: made by a generator, no patient stands behind it ***")
    cursor.execute(_SPLITS)
    lines += ["", f"{'split':<12}{'':<16}{'rows':>9}{'patients':>10}{'<30 days':>10}{'rate':>8}"]
    for part, detail, rows, patients, positives, _ in cursor.fetchall():
        rate = f"{positives / rows:.1%}" if positives is not None and rows else ""
        known = f"{positives:,}" if positives is not None else ""
        lines.append(f"{part:<12}{detail:<16}{rows:>9,}{patients:>10,}{known:>10}{rate:>8}")
    return "\n".join(lines)


_METRICS = ("auroc", "auprc", "brier", "log_loss", "ece", "lift_top_decile", "recall_top_decile")


def champion_version(tracking_uri: str, state: Path) -> str:
    """Number of the champion; empty where there is none."""
    from training.actions import open_tracker
    from training.registry import CHAMPION, find_version

    version = find_version(open_tracker(tracking_uri, state).client(), CHAMPION)
    return version.number if version else ""


def champion(tracking_uri: str, state: Path) -> str:
    """The champion's card in short: metrics with intervals, policy, decision and addresses."""
    from training.actions import open_tracker
    from training.publish import card_url
    from training.registry import CHALLENGER, CHAMPION, MODEL, find_version
    from training.tracking import download

    client = open_tracker(tracking_uri, state).client()
    version = find_version(client, CHAMPION)
    if version is None:
        challenger = find_version(client, CHALLENGER)
        said = challenger.tags["decision_reason"] if challenger else "no version is registered"
        return f"{MODEL} has no champion: {said}"
    with TemporaryDirectory() as folder:
        file = download(client, version.run_id, "evaluation.json", Path(folder))
        facts = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        f"Champion: {MODEL} version {version.number}, {facts['candidate']}; "
        f"{facts['decision']['reason']}",
        "",
        f"{'':<20}{'validation':>26}{'test':>26}",
    ]
    if facts["data"]["is_synthetic"]:
        lines.insert(0, "*** SYNTHETIC DATA: these figures say nothing about patients ***")
    for name in _METRICS:
        cells = (_cell(facts[split]["metrics"][name]) for split in ("validation", "test"))
        lines.append(f"{name.replace('_', ' '):<20}{''.join(f'{cell:>26}' for cell in cells)}")
    for row in facts["test"]["policy"]:
        lines.append(
            f"alerts at p >= {row['threshold']:.3f}: {row['alerts_share']:.1%} of test encounters, "
            f"recall {row['recall']:.1%}, precision {row['precision']:.1%}"
        )
    return "\n".join(
        [*lines, "", f"Card      {card_url(facts)}", f"Model     {facts['registry_url']}"]
    )


def _cell(found: dict[str, float]) -> str:
    digits = 3 if found["value"] >= 0.1 else 4
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
