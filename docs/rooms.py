"""The rooms of moe_lab: what each is for, who may import whom, and the picture of it.

`python docs/rooms.py` draws docs/rooms.svg from the imports as they are, and writes the table into
docs/architecture.md. tests/test_rooms.py holds the code to the table, and the picture to the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What every room may import.
GROUND = {
    "types": "the values that pass between rooms: LayerInfo, Routing, Choice; UserError",
    "finite": "numbers that are none",
    "files": "the names of the files that moe_lab writes",
    "option": "plug-ins and their options: type, range, help",
    "lookup": "what a name in an option stands for",
    "chosen": "plug-ins by a config group of their own, or by their name alone",
    "integrity": "whether files are still what was written",
    "provenance": "where a result came from: commit, versions, machine",
    "progress": "progress bars, and times in words",
    "stopping": "signals that stop a run",
    "processes": "several processes that share one run",
    "launching": "starting the processes that a launcher leaves out",
    "locks": "one process at a time, on one machine or many",
    "console": "the terminal, where nothing of a user's is markup",
    "knapsack": "one choice of each group, the least sum of errors within a budget",
}
# Each room: what it is for, and what else it may import; a dotted name is one part of a room.
ROOMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "store": ("results on disk, by what they depend on", ()),
    "dependencies": ("which code a result depends on", ()),
    "compute": ("device, threads, batch size, memory", ()),
    "data": ("where text comes from, and how it becomes samples", ()),
    "models": ("all knowledge of transformers", ()),
    "measure": ("parameters, memory and speed of models, here and in vLLM", ("models",)),
    "profile": ("what is measured of an intact model", ("models",)),
    "methods": ("from a profile to a plan", ("profile", "models")),
    "finetune": (
        "recipes, and the loop",
        ("models", "data.source", "data.tokens", "compute"),
    ),
    "quantize": (
        "what a checkpoint's matrices are in few bits",
        ("profile", "models", "data.tokens", "compute"),
    ),
    "evaluate": ("tasks and held-out text", ("profile", "models", "data")),
    "forecast": ("what a run will cost, from shapes and from costs once measured", ("models",)),
    "report": (
        "report.json; its tables, pictures, card, page",
        ("store", "dependencies", "models.edits"),
    ),
    "tables": ("many reports as one table", ("report",)),
    "diagnose": ("what experts do", ("profile", "models", "report.plots")),
    "trace": (
        "which experts each token was sent to, while a model generates",
        ("models", "data.source", "data.tokens"),
    ),
    "offload": (
        "experts that do not fit on the device: caches, simulated on traces",
        ("trace", "models.checkpoint", "report.plots"),
    ),
    "track": ("W&B, TensorBoard", ("store",)),
    "stages": (
        "the pipeline, and each of its stages",
        ("store", "dependencies", "compute", "data", "models", "measure", "profile", "methods",
         "finetune", "quantize", "evaluate", "report", "diagnose", "trace", "forecast"),
    ),
    "families": (
        "what works for each model type of transformers",
        ("compute", "models", "profile", "methods", "stages.profile"),
    ),
    "serving": (
        "what serving engines make of the checkpoints",
        ("store", "dependencies", "models", "profile", "methods", "families", "report.serving",
         "export"),
    ),
    "runs": (
        "jobs and sweeps, from start to end",
        ("report", "tables", "track", "store", "models.edits"),
    ),
    "export": ("checkpoints and plans in the words of serving engines", ("models", "store")),
    "run.py": ("Hydra's entry", ("stages", "runs")),
}  # fmt: skip
# The package's own face: lazy entry points, so that `import moe_lab` stays light.
FACE = ("models.checkpoint", "models.hook")

# Who alone may import what: the first match counts, so insides come before the whole.
LIBRARIES = {
    "transformers.integrations": (
        "models.adapters",
        "models.condensing",
        "models.factorized",
        "models.grouped",
        "models.observing",
    ),
    "transformers.core_model_loading": ("models.stored", "models.uneven"),
    "transformers.conversion_mapping": ("models.quantised",),
    "transformers.modeling_utils": (
        "models.fitting",
        "models.layerwise",
        "models.stored",
        "models.uneven",
    ),
    "transformers.models": ("models.adapters",),
    "transformers": ("models", "families", "serving.in_transformers"),
    "accelerate": ("processes", "launching"),
    "compressed_tensors": ("models.packing",),
    "filelock": ("locks",),
    "conversion": ("export.gguf_converter", "serving.in_llama_cpp"),
    "rich.console": ("console",),
    "rich.markup": (),
    "datasets": ("data.hub", "evaluate.tasks.harness"),
    "gguf": ("export.gguf_converter", "serving.in_llama_cpp"),
    "hydra": ("run.py", "runs.sweep", "runs.composing", "runs.quoting"),
    "huggingface_hub": (
        "models.checkpoint",
        "models.headers",
        "evaluate.tasks.harness",
        "report.card",
    ),
    "jinja2": ("report",),
    "lm_eval": ("evaluate",),
    "matplotlib": ("report.plots", "diagnose.pictures", "offload.pictures"),
    "tensorboardX": ("track.tensorboard",),
    "vllm": ("serving.in_vllm", "measure.vllm_script"),
    "wandb": ("track.wandb",),
    "xllamacpp": ("export.llama_process",),
}

# Plug-ins: every file of these packages but the named ones, which plug-ins build on.
PLUGIN_PACKAGES: dict[str, tuple[str, ...]] = {
    "data": ("source", "rows", "reading", "chat", "standard_library", "kept_text", "tokens"),
    "evaluate.decoding": ("base",),
    "export": (
        "__main__",
        "folder",
        "gguf_converter",
        "given",
        "llama_cpp",
        "llama_process",
    ),
    "finetune": (
        "recipe",
        "tuning",
        "training",
        "state",
        "sharding",
        "teacher",
        "gate_entropy",
        "as_stored",
    ),
    "quantize": (
        "base",
        "rounded_each",
        "column_rounding",
        "hessians",
        "expert_levels",
        "error_curves",
        "measuring",
        "allocation",
        "calibrated",
    ),
    "methods": (
        "base",
        "layer_choice",
        "dropping",
        "narrowing",
        "scored",
        "both_units",
        "ridge",
        "least_squares",
        "forward_selection",
        "second_order",
        "joint_refit",
        "refit",
    ),
    "methods.metrics": ("base", "by_gradient"),
    "methods.ratios": ("bits", "budget", "neurons", "pairs", "widths"),
    "methods.grouping": ("base", "alignment"),
    "methods.skipping": ("base", "by_weight", "thresholds"),
    "methods.factorizing": ("base", "alternating", "low_rank", "whitening"),
    "methods.condense": (
        "base",
        "divergence",
        "expert_choice",
        "expert_search",
        "layer_data",
        "layer_fit",
        "layer_search",
        "refits",
        "solving",
    ),
    "methods.condense.experts": (),
    "methods.condense.layers": (),
    "methods.condense.gates": (),
    "models.adapters": ("base",),
    "models.edits": ("base", "chain", "plan"),
    "models.families": ("base",),
    "offload.policies": ("base",),
    "track": ("tracker", "artifacts", "switches"),
}
# Kinds of plug-ins inside methods/, and which other kinds each may import.
KINDS: dict[str, tuple[str, ...]] = {
    "methods.metrics": (),
    "methods.ratios": (),
    "methods.grouping": ("methods.metrics", "methods.ratios"),
    "methods.skipping": (),
    "methods.condense": (),
    "methods.factorizing": (),
    "methods.factorize": ("methods.factorizing", "methods.ratios"),
    "methods.merge": ("methods.grouping", "methods.ratios"),
    "methods.dern": ("methods.metrics", "methods.ratios"),
    "methods.prune": ("methods.metrics", "methods.ratios"),
}


def module_of(path: Path) -> str:
    """Dotted name below moe_lab: "stages.plan", "report" for its __init__, "" for our own."""
    if path == ROOT / "run.py":
        return "run.py"
    parts = path.relative_to(ROOT / "moe_lab").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """All files of the package, and run.py, by name."""
    paths = [*sorted((ROOT / "moe_lab").rglob("*.py")), ROOT / "run.py"]
    return {module_of(path): path for path in paths}


FILES = modules()


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Each import, also those inside functions: its line and what it names, dots and all."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def own_module(name: str) -> str:
    """The module of ours behind a full name: moe_lab.report.frame.OK is report.frame."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts)


def inside(module: str, names: Iterable[str]) -> bool:
    """Whether a module is one of these, or lies in one of them."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def room_of(module: str) -> str:
    """The room of a module: its first part."""
    return module if module == "run.py" else module.split(".")[0]


def is_plugin(module: str) -> bool:
    """Whether a module is one of several of its kind, chosen by an option."""
    package, _, name = module.rpartition(".")
    bases = PLUGIN_PACKAGES.get(package)
    return bases is not None and FILES[module].stem != "__init__" and name not in bases


def _kind_of(module: str) -> str:
    return next((kind for kind in KINDS if inside(module, [kind])), "")


def why_not(module: str, name: str) -> str | None:
    """Why `module` may not import `name`; None where it may."""
    if name.startswith("."):
        return "relative imports hide rooms: write moe_lab.…"
    for library, allowed in LIBRARIES.items():
        if inside(name, [library]):
            return None if inside(module, allowed) else f"{library} is for {', '.join(allowed)}"
    if name.split(".")[0] != "moe_lab":
        return None
    other = own_module(name)
    room, other_room = room_of(module), room_of(other)
    if module == "":
        return None if other in FACE else f"the package's face offers only {', '.join(FACE)}"
    if other == "":
        return "nothing inside moe_lab imports the package's face"
    if other_room in GROUND:
        return None
    if room in GROUND:
        return f"{room} is the ground: it imports nothing of ours"
    if room != other_room:
        allowed = ROOMS[room][1]
        return None if inside(other, allowed) else f"{room} may import {', '.join(allowed) or '–'}"
    kind, other_kind = _kind_of(module), _kind_of(other)
    if kind and other_kind and kind != other_kind:
        return None if other_kind in KINDS[kind] else f"{kind} knows nothing of {other_kind}"
    if is_plugin(module) and is_plugin(other) and kind == other_kind:
        return f"{other} is a sibling plug-in"
    if kind and not other_kind and is_plugin(other):
        return f"{other} is a method by itself"
    return None


def arrows() -> dict[str, set[str]]:
    """For each module the modules of ours that it imports."""
    found: dict[str, set[str]] = {}
    for module, path in FILES.items():
        names = (name for _, name in imports(path.read_text(encoding="utf-8")))
        others = {own_module(name) for name in names if name.split(".")[0] == "moe_lab"}
        found[module] = others - {module}
    return found


def room_arrows() -> dict[str, set[str]]:
    """For each room the rooms that it imports; the ground, which all import, left out."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, others in arrows().items():
        if (room := room_of(module)) in found:
            found[room] |= {room_of(other) for other in others} & found.keys() - {room}
    return found


def floors() -> list[list[str]]:
    """The rooms by floor, the ground first: each stands above all that it imports."""
    arrows, height = room_arrows(), {}

    def floor_of(room: str) -> int:
        if room not in height:
            height[room] = 1 + max(map(floor_of, arrows[room]), default=-1)
        return height[room]

    highest = max(map(floor_of, ROOMS))
    return [[room for room in ROOMS if height[room] == floor] for floor in range(highest + 1)]


def _ordered(rows: list[list[str]], arrows: dict[str, set[str]]) -> list[list[str]]:
    """The rooms of each floor, moved towards those that they import and that import them."""
    rows = [list(row) for row in rows]
    near = {room: set(others) for room, others in arrows.items()}
    for room, others in arrows.items():
        for other in others:
            near[other].add(room)
    for _ in range(8):
        place = {room: (at + 0.5) / len(row) for row in rows for at, room in enumerate(row)}
        for row in rows:
            row.sort(key=lambda one: (_mean([place[other] for other in near[one]]), one))
    return rows


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 6) if values else 0.5


ROW, BOX_WIDTH, BOX_HEIGHT = 124, 172, 52
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
STYLE = """
  text { font-family: sans-serif; text-anchor: middle; fill: #222 }
  .name { font-size: 15px; font-weight: bold } .about { font-size: 10.5px }
  rect { fill: #fff; stroke: #222; stroke-width: 1.2 } .ground { fill: #eee }
  path { fill: none; stroke-width: 1.3; opacity: 0.75 }
"""


def drawing() -> str:
    """An SVG of the rooms by floor and of who imports whom, the colour that of who imports."""
    arrows = room_arrows()
    rows = _ordered(floors(), arrows)
    height, width = ROW * len(rows) + 70, (BOX_WIDTH + 8) * max(map(len, rows))
    at: dict[str, tuple[float, float]] = {}
    for floor, row in enumerate(rows):
        for place, room in enumerate(row):
            x = width * (place + 0.5) / len(row)
            at[room] = (x, height - 70 - ROW * floor - ROW / 2)
    colour = {room: COLOURS[number % len(COLOURS)] for number, room in enumerate(at)}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        "<title>The rooms of moe_lab, and who imports whom</title>",
        f"<style>{STYLE}</style>",
        f'<rect x="0" y="0" width="{width}" height="{height}" style="stroke: none"/>',
    ]
    for room, others in arrows.items():
        for other in sorted(others, key=lambda one: at[one]):
            lines.append(_arrow(at[room], at[other], colour[room]))
    lines += [_box(room, at[room], ROOMS[room][0]) for room in at]
    names = ", ".join(GROUND)
    lines += [
        f'<rect class="ground" x="10" y="{height - 58}" width="{width - 20}" height="46"/>',
        f'<text class="name" x="{width / 2:g}" y="{height - 38}">{names}</text>',
        f'<text class="about" x="{width / 2:g}" y="{height - 22}">the ground: every room may '
        "import it</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> str:
    """From the foot of a room to the head of one below, ending in a dot."""
    (x, y), (to_x, to_y) = start, end
    shift = (to_x - x) * 0.08  # several arrows leave and reach a room side by side
    x, to_x = x + max(-70, min(70, shift)), to_x - max(-70, min(70, shift))
    y, to_y = y + BOX_HEIGHT / 2, to_y - BOX_HEIGHT / 2
    bend = 0.45 * (to_y - y)
    points = ((x, y), (x, y + bend), (to_x, to_y - bend), (to_x, to_y))
    begin, *curve = (f"{one:.0f} {other:.0f}" for one, other in points)
    path = f"M{begin} C{' '.join(curve)}"
    dot = f'<circle cx="{to_x:.0f}" cy="{to_y - 2:.0f}" r="3.2" fill="{colour}"/>'
    return f'<path d="{path}" stroke="{colour}"/>{dot}'


def _box(room: str, centre: tuple[float, float], about: str) -> str:
    x, y = centre
    words = about.split()
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 26:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    height = BOX_HEIGHT if len(lines) < 3 else BOX_HEIGHT + 10
    text = "".join(
        f'<text class="about" x="{x:g}" y="{y + 6 + 12 * number:g}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    )
    return (
        f'<rect x="{x - BOX_WIDTH / 2:g}" y="{y - BOX_HEIGHT / 2:g}" width="{BOX_WIDTH}" '
        f'height="{height}" rx="5"/>'
        f'<text class="name" x="{x:g}" y="{y - 9:g}">{room}</text>{text}'
    )


MARKS = "<!-- rooms: made by docs/rooms.py -->", "<!-- /rooms -->"


def table() -> str:
    """Who may import whom, as Markdown."""
    rows = [
        f"| {room} | {about} | {', '.join(may) or '–'} |" for room, (about, may) in ROOMS.items()
    ]
    ground = "; ".join(f"`{name}`: {about}" for name, about in GROUND.items())
    head = ["| room | what it is for | may import, beside the ground |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, "", f"The ground: {ground}."])


def with_table(text: str) -> str:
    """A page with the table between its marks made anew."""
    start, rest = text.split(MARKS[0])
    _, end = rest.split(MARKS[1])
    return f"{start}{MARKS[0]}\n{table()}\n{MARKS[1]}{end}"


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "rooms.svg").write_text(drawing(), encoding="utf-8")
    page = here / "architecture.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
