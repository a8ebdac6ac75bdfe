"""The logger that writes metrics.csv: a run that goes on keeps its rows."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

FILE = "metrics.csv"
"""In the folder of a run."""


class CSVLog(CSVLogger):
    """Lightning's CSVLogger, but rows that are in the file already stay. Lightning's deletes the file."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            rows = self._rows()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory")  # says that it deletes files
                writer = super().experiment
            writer.metrics.extend(rows)
            writer.save()
        return self._experiment

    def keep_rows_before(self, step: int) -> None:
        """Drop the rows from a training step on, because the run goes on from there."""
        rows = [row for row in self._rows() if int(row["step"]) < step]
        self._file.unlink(missing_ok=True)
        if rows:
            with self._file.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0]])
                writer.writeheader()
                writer.writerows(rows)

    @property
    def _file(self) -> Path:
        return Path(self.log_dir) / FILE

    def _rows(self) -> list[dict[str, str]]:
        if not self._file.is_file():
            return []
        with self._file.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if (row.get("step") or "").isdigit()]  # the last may be cut off
