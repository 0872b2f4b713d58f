"""One table from many reports: `python -m moe_lab.tables FOLDER` pivots every report.json below it.

Keys are those of report.json. A cell is the mean over the reports that fall into it, with the
sample standard deviation (n - 1) where they differ; below the table stands what was averaged over,
what was the same everywhere, and which jobs failed and why.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from moe_lab import report
from moe_lab.types import UserError

DEFAULT_VALUES = (
    "dense/eval/average compressed/eval/average finetuned/eval/average compressed/kl finetuned/kl "
    "compressed/parameter_ratio compressed/memory_ratio compressed/prefill_speedup "
    "compressed/decode_speedup"
).split()
# Not settings: what a job gave, and what names it. The rest of a report's keys is its settings.
RESULTS = re.compile(
    r"(status|error|sweep|job)$|"
    rf"(({'|'.join(report.VARIANTS)})(_top_\d+)?|seconds|cached|plan|diagnosis)/"
)
ORIGIN = re.compile(r"commit$|fingerprint/")  # told below a table, not made rows by themselves
SEED = re.compile(r"(^|/)seed$")
FAILED, NONE, STATUS = "failed", "none", "status"


@dataclass(frozen=True)
class Table:
    """A pivoted table: numbers for files, text for people, and the remarks below it.

    index: the labels of the rows, a column for each key; mean, deviation: a column for each value
    (at each setting of the columns), NaN where there is none; text: the same as it is shown.
    """

    index: pd.DataFrame
    mean: pd.DataFrame
    deviation: pd.DataFrame
    text: pd.DataFrame
    remarks: tuple[str, ...]

    def markdown(self) -> str:
        """GitHub Markdown, the remarks as a list below."""
        rule = ["---"] * len(self.index.columns) + ["---:"] * len(self.text.columns)
        head, *body = self._lines()
        rows = [[cell.replace("|", "/") for cell in row] for row in [head, rule, *body]]
        table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return table + "\n" + "".join(f"- {remark}\n" for remark in self.remarks)

    def csv(self) -> str:
        """Plain numbers to ten digits; each deviation in the column after its mean."""
        deviation = self.deviation.dropna(axis=1, how="all").add_suffix(" (std)")
        numbers = pd.concat([self.mean, deviation], axis=1)
        order = [name for column in self.mean for name in (column, f"{column} (std)")]
        numbers = numbers[[name for name in order if name in numbers]]
        return pd.concat([self.index, numbers], axis=1).to_csv(index=False, float_format="%.10g")

    def show(self) -> None:
        """Print it, fitted to the terminal."""
        head, *body = self._lines()
        made = RichTable()
        for column in head:
            shown = column.replace("/", "/\n").replace(" (", "\n(")  # keys are long: let them fold
            made.add_column(shown, justify="right" if column in self.text else "left")
        for row in body:
            made.add_row(*row)
        Console().print(made)
        for remark in self.remarks:
            _print(f"- {remark}")

    def _lines(self) -> list[list[str]]:
        shown = pd.concat([self.index, self.text], axis=1)
        return [list(shown.columns), *shown.to_numpy().tolist()]


def read(folder: Path) -> pd.DataFrame:
    """All reports under a folder, one a row in the order of the jobs; UserError if there are none.

    What a report lacks is None.
    """
    paths = sorted(folder.rglob(report.FILE), key=_natural)
    if not paths:
        raise UserError(f"{folder} holds no {report.FILE}: name a folder of runs, or one run's")
    reports = [report.read(path.parent) for path in paths]
    keys = dict.fromkeys(key for one in reports for key in one)
    return pd.DataFrame({key: [one.get(key) for one in reports] for key in keys}, dtype=object)


def pivot(
    reports: pd.DataFrame,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    values: Sequence[str] = (),
    filters: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """Reports as a table; UserError for a key that none of them has.

    rows: default, the settings that differ between reports, seeds aside; columns: settings that
    are spread out, each value once for each; values: default, those of DEFAULT_VALUES that are
    there; filters: only reports in which each key is, as text, one of these.
    """
    filters = filters or {}
    _check_keys(reports, rows, columns, values, filters)
    for key, allowed in filters.items():
        reports = reports[reports[key].map(_label).isin(allowed)]
    if reports.empty:
        asked = (f"{key}={_words(allowed)}" for key, allowed in filters.items())
        raise UserError(f"no report has {' and '.join(asked)}")
    varying = [key for key in _settings(reports) if _differs(reports[key])]
    free = [key for key in varying if not SEED.search(key) and not ORIGIN.match(key)]
    rows = list(rows) or [key for key in free if key not in columns] or ["model"]
    values = list(values) or [key for key in DEFAULT_VALUES if key in reports] or [STATUS]

    labels = reports[[*rows, *columns]].map(_label)
    by_cell = [labels[key] for key in labels]
    ok = reports[STATUS] == "ok"
    cells = _numbers(reports.where(ok), values).groupby(by_cell, sort=False)
    finished = ok.groupby(by_cell, sort=False).any()
    mean, deviation, done = (
        _spread(frame, columns)
        for frame in (cells.mean(), cells.std(), pd.DataFrame(dict.fromkeys(values, finished)))
    )
    text = {
        key: list(map(partial(_cell, key), mean[key], deviation[key], done[key])) for key in mean
    }
    frames = (mean.index.to_frame(), mean, deviation, pd.DataFrame(text, index=mean.index))
    remarks = tuple(_remarks(reports, labels, varying))
    return Table(*(frame.reset_index(drop=True) for frame in frames), remarks)


def tell(folder: Path) -> None:
    """Print the default table of a sweep, and leave it as table.md and table.csv in its folder."""
    made = pivot(read(folder))
    (folder / "table.md").write_text(made.markdown(), encoding="utf-8")
    (folder / "table.csv").write_text(made.csv(), encoding="utf-8")
    made.show()
    _print(f"sweep: {folder} (table.md, table.csv)")


def _settings(reports: pd.DataFrame) -> list[str]:
    return [key for key in reports if not RESULTS.match(key)]


def _check_keys(reports: pd.DataFrame, rows: Iterable[str], columns: Iterable[str],
                *others: Iterable[str]) -> None:  # fmt: skip
    if twice := [key for key in columns if key in rows]:
        raise UserError(f"{twice[0]} can stand in --rows or in --columns, not in both")
    for key in (key for keys in (rows, columns, *others) for key in keys):
        if key not in reports:
            settings = _settings(reports)
            results = [key for key in reports if key not in settings]
            raise UserError(
                f"no report has {key!r}; settings are {', '.join(settings)}; "
                f"results are {', '.join(results)}"
            )


def _numbers(reports: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    numbers = reports[values].apply(pd.to_numeric, errors="coerce")
    for key in values:
        if key != STATUS and numbers[key].isna().all() and reports[key].notna().any():
            raise UserError(f"{key} is no number in any report; it could be one of --rows")
    return numbers.astype(float)


def _spread(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Move settings from the index into the head: `value (setting=label)`."""
    if not columns:
        return frame
    wide = frame.unstack(list(columns), sort=False)
    wide.columns = [
        f"{key} ({', '.join(f'{k}={v}' for k, v in zip(columns, names, strict=True))})"
        for key, *names in wide.columns
    ]
    return wide


def _cell(key: str, mean: float, deviation: float, done: Any) -> str:
    """done: whether a report of this cell went well; neither True nor False for no report."""
    name = key.partition(" (")[0]
    if pd.isna(mean):
        empty = "ok" if name == STATUS else report.MISSING
        return {True: empty, False: FAILED}.get(done, report.MISSING)
    shown = report.shown(name, mean)
    differ = deviation > 1e-12 * abs(mean)  # not where equal numbers were added up
    return f"{shown} ± {report.shown(name, deviation)}" if differ else shown


def _remarks(reports: pd.DataFrame, labels: pd.DataFrame, varying: list[str]) -> Iterator[str]:
    """What a reader has to know beside the cells."""
    inside = [key for key in varying if key not in labels]
    ok = reports[reports[STATUS] == "ok"]
    cells = ok.groupby([labels.loc[ok.index, key] for key in labels], sort=False)
    mixed = [key for key in inside if cells[key].agg(_differs).any()]
    for title, keys in (
        ("mean ± sample standard deviation over", [key for key in mixed if SEED.search(key)]),
        ("cells also mix", [key for key in mixed if not SEED.search(key)]),
        ("differs between cells", [key for key in inside if key not in mixed]),
    ):
        if keys:
            yield f"{title} {_values(reports, keys)}"
    same = [key for key in _settings(reports) if key not in varying and key not in labels]
    given = [key for key in same if reports[key].notna().any()]
    yield f"the same in all {len(reports)} reports that have it: {_values(reports, given)}"
    for number, one in reports[reports[STATUS] != "ok"].iterrows():
        where = ", ".join(f"{key}={labels.at[number, key]}" for key in labels)
        yield f"{FAILED}: {where}: {' '.join(_label(one.get('error')).split())}"


def _differs(column: pd.Series) -> bool:
    """Whether a setting has several values; to have none (another method's setting) is none."""
    return column.dropna().map(str).nunique() > 1


def _label(value: Any) -> str:
    return NONE if value is None else str(value)


def _words(values: Iterable[Any]) -> str:
    return ",".join(dict.fromkeys(map(_label, values)))


def _values(reports: pd.DataFrame, keys: list[str]) -> str:
    return "; ".join(f"{key}={_words(reports[key].dropna())}" for key in keys)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts job 10 after job 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]


def _print(text: str) -> None:
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def _keys(text: str) -> list[str]:
    return [key for key in text.split(",") if key]


def _filter(text: str) -> tuple[str, list[str]]:
    key, sign, values = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE[,VALUE]")
    return key, values.split(",")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.tables", description="One table from every report.json in a folder."
    )
    parser.add_argument("folder", type=Path, help="a sweep, a run, or a folder of them")
    for name, text in (
        ("rows", "settings that make rows; default: those that differ"),
        ("columns", "settings to spread over columns"),
        ("values", "figures; default: accuracy, KL, parameters, memory, speed"),
    ):
        parser.add_argument(f"--{name}", type=_keys, default=[], metavar="KEY,KEY", help=text)
    only = {"action": "append", "default": [], "metavar": "KEY=VALUE,VALUE", "type": _filter}
    parser.add_argument("--filter", help="only reports with one of these; may be repeated", **only)
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    parser.add_argument("--output", type=Path, help="write there instead of printing")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """The command; 2 where what was asked for is not there."""
    asked = _arguments(given)
    filters = dict(asked.filter)
    try:
        made = pivot(read(asked.folder), asked.rows, asked.columns, asked.values, filters)
        text = made.markdown() if asked.format == "markdown" else made.csv()
        if asked.output:
            asked.output.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
