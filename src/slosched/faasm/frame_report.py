"""report.md of a run: what is replaced, where and when it was measured, each table and each figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slosched.faasm.frame import Frame
from slosched.faasm.frame_table import EXPERIMENTS
from slosched.faasm.frame_tables import markdown_text
from slosched.faasm.names import REPLACED
from slosched.output_files import utf8, write_file
from slosched.units import exact_duration

REPORT = "report.md"


def write_report(frame: Frame, manifest: Mapping[str, Any]) -> Path:
    """Write report.md of a run whose tables and figures are made; return its path."""
    summary = EXPERIMENTS[frame.name].summary if frame.name in EXPERIMENTS else ""
    parts = [f"# {frame.name}", summary, REPLACED, _facts(frame, manifest)]
    for table in frame.tables:
        parts += [f"## {table.name}", markdown_text(table.rows)]
        parts += [table.note] if table.note else []
    pictures = [path for path in frame.figures if path.with_name(f"{path.name}.png").is_file()]
    if pictures:
        parts.append("## Figures")
        parts += [f"![{path.name}](figures/{path.name}.png)" for path in pictures]
    path = frame.directory / REPORT
    write_file(path, ("\n\n".join(part for part in parts if part) + "\n").encode())
    return path


def _facts(frame: Frame, manifest: Mapping[str, Any]) -> str:
    host = manifest.get("host") or {}
    memory_gb = int(host.get("memory_bytes") or 0) / 1e9
    complete = manifest.get("complete")
    outcome = manifest.get("outcome") or {}
    end = "complete" if complete else f"not complete ({outcome.get('ended_by', 'it did not end')})"
    versions = manifest.get("versions") or {}
    lines = [
        f"- measured {manifest.get('started_at')}, {end}; {len(frame.cells)} cells, scale {frame.scale}",
        f"- machine: {host.get('cpu_model') or 'unknown CPU'}, {host.get('cpu_usable')} cores usable, "
        f"{memory_gb:.1f} GB, {host.get('platform')}",
        f"- slosched {manifest.get('slosched')}, Python {host.get('python')}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- options: {_options(manifest.get('options_at_scale') or manifest.get('config') or {})}",
        f"- seeds: {manifest.get('seeds') or 'see the options'}",
    ]
    return utf8("\n".join(lines))


def _options(config: Mapping[str, Any]) -> str:
    return ", ".join(_option(key, value) for key, value in config.items()) or "none"


def _option(name: str, value: Any) -> str:
    if name.endswith("_ns") and isinstance(value, int):
        return f"{name.removesuffix('_ns')} {exact_duration(value)}"
    if isinstance(value, list):
        return f"{name} {','.join(map(str, value)) or '-'}"
    return f"{name} {value if value != '' else '-'}"
