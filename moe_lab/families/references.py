"""What stock transformers makes of a checkpoint, and of an edit written down by hand.

Nothing of moe_lab is imported here, neither for loading nor for the references. Run as a file, in a
process of its own, it answers jobs from a socket, each connection in a fork:
`python references.py SOCKET`.
"""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
BY_LOGITS = ("Llama4Router", "JetMoeTopKGating")  # return logits last, and their experts no indices
NEVER = -1e30  # as a bias: chosen last
EXTRA_ROWS = 2  # behind the experts' in a router: for a shared expert, or for none
NEW_TOKENS, PROMPT = 8, 9


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the routed experts of a layer, by path: known by their classes' names.

    Of several linear maps of all experts in a block (JetMoE's) the first stands for all; experts of
    an attention are none of these.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        block, _, name = path.rpartition(".")
        if "shared" in name or "attention" in block or not any(True for _ in module.parameters()):
            continue
        parts = type(module).__name__.endswith("ParallelExperts")
        beside = parts and any(other.rpartition(".")[0] == block for other in found)
        if beside or any(path.startswith(f"{other}.") for other in found):
            continue
        if type(module).__name__.endswith(("Experts", "ExpertGLU")):
            found[path] = module
    return found


def layer_of(path: str) -> int:
    """The number of the decoder layer in a module's path."""
    return int(next(part for part in reversed(path.split(".")) if part.isdigit()))


@torch.no_grad()
def logits_of(model: Any, batches: list[Batch]) -> list[Tensor]:
    """The logits of each batch, computed without a cache."""
    return [model(**batch, use_cache=False).logits for batch in batches]


def open_model(auto: str, folder: str) -> tuple[Any, dict[str, list[str]]]:
    """A checkpoint by stock transformers, and what its loading report complains of."""
    loaded = getattr(transformers, auto).from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    return model.eval(), {key: sorted(map(str, names))[:3] for key, names in info.items() if names}


def generation(model: Any, batch: Batch) -> str:
    """Whether greedy decoding with a cache and without one gives the same: "equal", or what not."""
    ids, made = batch["input_ids"][:1, :PROMPT], {}
    for cached in (True, False):
        try:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=cached,
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  # a family's own way of not generating
            return f"{'with' if cached else 'without'} a cache: {_words(error)}"
        made[cached] = out[0, PROMPT:].tolist()
    pairs = list(zip(made[True], made[False], strict=True))
    return next(
        (f"differs at token {at}" for at, (one, other) in enumerate(pairs) if one != other), "equal"
    )


def expert_counts(model: nn.Module) -> dict[int, int]:
    """How many routed experts each decoder layer has."""
    return {layer_of(path): _num_experts(one) for path, one in expert_modules(model).items()}


@contextmanager
def counting_tokens(model: nn.Module, batches: list[Batch]) -> Iterator[dict[int, Tensor]]:
    """By layer how many valid tokens reach each expert [E], by what their modules are given.

    While it is open the model computes these batches in turn. A layer whose experts are given no
    indices is left out.
    """
    counts: dict[int, Tensor] = {}
    masks = {
        path: [one["attention_mask"].bool().flatten() for one in batches]
        for path in expert_modules(model)
    }

    def hook(path: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        def count(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            valid = masks[path].pop(0)
            for value in (*args, *named.values()):
                if torch.is_tensor(value) and not value.is_floating_point():
                    chosen = value.reshape(len(valid), -1)[valid].flatten()
                    add(path, chosen)

        return count

    def add(path: str, chosen: Tensor) -> None:
        number = _num_experts(model.get_submodule(path))
        new = torch.bincount(chosen, minlength=number)[:number]
        counts[layer_of(path)] = counts.get(layer_of(path), 0) + new

    def at_router(path: str) -> Callable[[nn.Module, Any, Any], None]:
        """Of experts that are given no indices: the choice is that of the router's best logits."""

        def count(module: nn.Module, args: Any, output: Any) -> None:
            logits, valid = output[-1], router_masks[path].pop(0)
            chosen = logits.reshape(len(valid), -1)[valid].topk(_top_k(model), dim=1).indices
            add(path, chosen.flatten())

        return count

    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
        for path in masks
    ]
    router_masks = {path: list(valid) for path, valid in masks.items()}
    for path in masks:
        router = _router_of(model.get_submodule(path.rpartition(".")[0]))
        if type(router).__name__ in BY_LOGITS:
            handles.append(router.register_forward_hook(at_router(path)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def masked(model: Any, kept: dict[str, list[int]], batches: list[Batch]) -> list[Tensor] | None:
    """The logits of a model whose routers cannot choose but the experts kept, by layer.

    The rows of the others give minus infinity and their selection biases NEVER. None where that is
    not what chooses: no such rows are found, or tokens still reach the others.
    """
    rows: dict[int, list[int]] = {}
    for path, experts in expert_modules(model).items():
        number = _num_experts(experts)
        gone = sorted(set(range(number)) - set(kept.get(str(layer_of(path)), range(number))))
        block = model.get_submodule(path.rpartition(".")[0])
        inside = set(experts.modules())
        before = len(rows)
        for module in block.modules():
            if module not in inside:
                _mask_biases(module, number, gone)
                tensors = module._parameters.values()
                rows |= {id(t): gone for t in tensors if t is not None and _is_router(t, number)}
                _rename_in_table(module, gone)
        if gone and len(rows) == before:
            return None
    with _masked_rows(rows), counting_tokens(model, batches) as counts:
        logits = logits_of(model, batches)
    stay = {int(index): some for index, some in kept.items()}
    reached = (
        set(count.nonzero().flatten().tolist()) - set(stay.get(index, range(len(count))))
        for index, count in counts.items()
    )
    return None if any(reached) else logits


def _num_experts(experts: nn.Module) -> int:
    sizes = [parameter.shape[0] for parameter in experts.parameters() if parameter.dim() == 3]
    # The smallest: rows of some tensors are there for zero experts (longcat_flash).
    return min(sizes) if sizes else int(getattr(experts, "num_experts", 0))


def _top_k(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_experts_per_tok)


def _router_of(block: nn.Module) -> nn.Module:
    children = dict(block.named_children())
    return children.get("gate", children.get("router", block))


def _is_router(tensor: Tensor, number: int) -> bool:
    rows = tensor.shape[0] - number if tensor.dim() == 2 else -1
    return tensor.is_floating_point() and 0 <= rows <= EXTRA_ROWS


def _mask_biases(module: nn.Module, number: int, gone: list[int]) -> None:
    """Selection biases [E] or [1, E]; a router's plain `bias` goes with its rows."""
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None or "bias" not in key or key == "bias":
            continue
        if 0 <= tensor.shape[-1] - number <= EXTRA_ROWS:
            tensor.data[..., gone] = NEVER


def _rename_in_table(module: nn.Module, gone: list[int]) -> None:
    """In a table of experts by token id: for each lost one the most similar that is not there yet.

    Similar by the cosine of the router's rows; the lost are replaced in ascending order.
    """
    for tensor in module._buffers.values():
        if tensor is None or tensor.is_floating_point() or tensor.dim() != 2:
            continue
        weight = module.get_parameter("weight").detach().double()
        rows = [row / row.norm() for row in weight.unbind()]
        for chosen in tensor:
            for lost in gone:
                for place in [i for i, one in enumerate(chosen.tolist()) if one == lost]:
                    free = set(range(len(rows))) - set(gone) - set(chosen.tolist())
                    near = max(sorted(free), key=lambda one: float(rows[one] @ rows[lost]))
                    chosen[place] = near


@contextmanager
def _masked_rows(rows: dict[int, list[int]]) -> Iterator[None]:
    plain = F.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = plain(input, weight, bias)
        if gone := rows.get(id(weight)):
            y = y.clone()
            y[..., gone] = -torch.inf
        return y

    F.linear = linear
    try:
        yield
    finally:
        F.linear = plain


def with_constant_weights(model: Any, edit: dict[str, Any], batches: list[Batch]) -> list[Tensor]:
    """The logits of a model one of whose layers gets the same experts and weights for each token.

    The family's own code computes everything behind the router. edit: one of kind "condense".
    """
    model.set_experts_implementation("eager")
    block = model.get_submodule(edit["name"])
    path = next(path for path in expert_modules(model) if path.startswith(f"{edit['name']}."))

    def constant(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        def replaced(value: Any) -> Any:
            if not torch.is_tensor(value) or value is hidden:
                return value
            chosen = edit["gates"] if value.is_floating_point() else edit["experts"]
            return torch.tensor(chosen, dtype=value.dtype).expand(len(value), -1)

        hidden = args[0] if args else named["hidden_states"]
        return tuple(map(replaced, args)), {key: replaced(one) for key, one in named.items()}

    def scored(module: nn.Module, args: Any, output: Any) -> Any:
        """Of a router that gives a score for each expert, and no choice (llama4)."""
        if len(output) != 2:
            return output
        scores = torch.zeros_like(output[0])
        scores[:, edit["experts"]] = torch.tensor(edit["gates"], dtype=scores.dtype)
        return scores, *output[1:]

    model.get_submodule(path).register_forward_pre_hook(constant, with_kwargs=True)
    _router_of(block).register_forward_hook(scored)
    if hasattr(block, "shared_expert_gate"):
        value = float(torch.logit(torch.tensor(edit["shared_gate"], dtype=torch.float64)))
        block.shared_expert_gate.register_forward_hook(
            lambda m, a, out: torch.full_like(out, value)
        )
    return logits_of(model, batches)


def dropped(model: Any, edit: dict[str, Any], batches: list[Batch]) -> list[Tensor]:
    """The logits of a model one of whose MoE blocks gives zeros. edit: of kind "drop_layer"."""

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    model.get_submodule(edit["name"]).register_forward_hook(zero)
    return logits_of(model, batches)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What became of a job; logits are written to job["out"], of the batches at job["batches"].

    kind: reload; masked (kept), condensed (edit) or dropped (edit), which are references.
    """
    batches = torch.load(job["batches"])
    model, complaints = open_model(job["auto"], job["folder"])
    reply: dict[str, Any] = {"complaints": complaints}
    kinds: dict[str, Callable[[], list[Tensor] | None]] = {
        "reload": lambda: logits_of(model, batches),
        "masked": lambda: masked(model, job["kept"], batches),
        "condensed": lambda: with_constant_weights(model, job["edit"], batches),
        "dropped": lambda: dropped(model, job["edit"], batches),
    }
    if (logits := kinds[job["kind"]]()) is None:
        return {"error": "what chooses its experts is no router whose rows can be masked"}
    torch.save(logits, job["out"])
    if job.get("generate"):
        reply["generation"] = generation(model, batches[0])
    return reply


class Jobs(socketserver.StreamRequestHandler):
    """A connection: a job a line, an answer a line."""

    def handle(self) -> None:
        """Answer until the other side hangs up."""
        for line in self.rfile:
            try:
                reply = answer(json.loads(line))
            except Exception as error:  # noqa: BLE001  # told to who asked
                reply = {"error": _words(error)}
            self.wfile.write(json.dumps(reply).encode() + b"\n")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """A fork of this process, with transformers imported, for each connection."""


def serve(path: str) -> None:
    """Answer until standard input closes: until who started this is gone."""
    torch.set_num_threads(1)
    assert "moe_lab" not in sys.modules
    _ = transformers.AutoModelForCausalLM  # imported now, and not in each fork
    with Server(path, Jobs) as server:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    # Once, and not in each fork.
    import transformers.generation.utils
    import transformers.masking_utils
    import transformers.modeling_layers
    import transformers.processing_utils

    serve(sys.argv[1])
