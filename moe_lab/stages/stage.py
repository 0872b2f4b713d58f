"""The shape of every stage: from what it works on to a result, and how that is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from moe_lab.stages.context import Context
from moe_lab.store import Artifact

if TYPE_CHECKING:  # a key follows imports, and no result depends on the run that asks for it
    from moe_lab.stages.run import Run

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Stage(Generic[Inputs]):
    """One step of a run.

    inputs(run): what it works on, for each result that it has to make in this run, by the name
    under which the report tells of it; nothing where nothing was asked. make(context, inputs): the
    result, which the store may have. read(run, name, result): what it says goes into the report
    and the run's folder, and what later stages need into the run. A figure that is no number ends
    the run.
    """

    inputs: Callable[[Run], Mapping[str, Inputs]]
    make: Callable[[Context, Inputs], Artifact]
    read: Callable[[Run, str, Artifact], None]

    def run(self, run: Run) -> None:
        """Make its results, and read each."""
        for name, inputs in self.inputs(run).items():
            result = self.make(run.context, inputs)
            run.add_result(name, result)
            self.read(run, name, result)
            run.check_figures(name)
