"""What programs can ask: the files, a look through the folders, and what the last picture's tags did."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..oft_core.report import trigger_words
from . import activation, files


def register(_: Any, app: Any) -> None:
    """Add the routes; the host calls it with its page and its FastAPI app."""

    @app.get("/sdapi/v1/ofts")
    def ofts() -> list[dict[str, Any]]:
        return [_about(file) for file in files.all_files()]

    @app.post("/sdapi/v1/refresh-ofts")
    def refresh_ofts() -> list[dict[str, Any]]:
        return [_about(file) for file in files.refresh().values()]

    @app.get("/sdapi/v1/oft-report")
    def oft_report() -> list[dict[str, Any]]:
        return [asdict(report) for report in activation.last]


def _about(file: files.OFTFile) -> dict[str, Any]:
    return {
        "name": file.name, "alias": file.alias, "path": file.path, "hash": file.sha256,
        "trigger_words": trigger_words(file.metadata), "metadata": dict(file.metadata),
    }
