"""What all our models have in common: mixed in before the classes of a family of vLLM's."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import PPMissingLayer, make_layers, maybe_prefix

from moe_lab_vllm.building import Family, build_layer, with_config
from moe_lab_vllm.form import Layer, read_layers
from moe_lab_vllm.loading import Arriving

logger = init_logger("vllm.plugins.moe_lab_vllm")


class OwnLayers:
    """Mixed in before a family's model (embeddings, layers, norm): the layers that the form lists.

    The family builds all but the layers itself, from a config that has none; so no layer is built
    larger than it is.
    """

    family: ClassVar[Family]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        without = copy.deepcopy(config)
        without.num_hidden_layers = 0
        super().__init__(  # type: ignore[call-arg]  # of the family's class
            vllm_config=with_config(vllm_config, without), prefix=prefix
        )
        listed = read_layers(config.moe_lab)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: build_layer(
                self.family,
                listed.get(int(prefix.rsplit(".", 1)[1]), Layer()),
                vllm_config,
                prefix,
            ),
            prefix=f"{prefix}.layers",
        )
        self.vllm_config = vllm_config
        self.config = _with_most_experts(config, self.family, listed)


def _with_most_experts(config: Any, family: Family, layers: dict[int, Layer]) -> Any:
    """The config by which some families look for experts in a checkpoint, whatever their layer."""
    config = copy.deepcopy(config)
    counts = [layer.num_experts or 0 for layer in layers.values()]
    setattr(config, family.num_experts, max(*counts, getattr(config, family.num_experts)))
    return config


class OwnForm:
    """Mixed in before a family's ...ForCausalLM: the same parts, around layers of ours.

    Its own __init__ is not called: it would build the layers as the family has them, and some
    families want one of these to be a MoE.
    """

    layers_class: ClassVar[type[nn.Module]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]
        _check(vllm_config)
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.config, self.quant_config = config, quant_config
        self.model: Any = self.layers_class(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head: Any = PPMissingLayer()  # type: ignore[no-untyped-call]
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors: Any = self.model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The family's own loading, with every tensor looked at; ValueError if any is amiss."""
        arriving = Arriving(self, read_layers(self.config.moe_lab))
        loaded: set[str] = super().load_weights(arriving.checked(weights))  # type: ignore[misc]
        arriving.finish(loaded)
        return loaded


def _check(vllm_config: VllmConfig) -> None:
    """Refuse what nobody has tried with layers that differ from each other."""
    parallel = vllm_config.parallel_config
    refused = {
        "quantization": vllm_config.quant_config is not None,
        "LoRA adapters": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "expert parallel load balancing (--enable-eplb)": parallel.enable_eplb,
        "--enable-ep-weight-filter": parallel.enable_ep_weight_filter,
    }
    if asked := [name for name, wanted in refused.items() if wanted]:
        raise ValueError(
            f"moe_lab_vllm does not serve moe_lab's own form with {' and '.join(asked)}: leave it "
            "out, or save the model in its family's own form (method.padding, method.convert)"
        )
    if parallel.enable_expert_parallel or parallel.pipeline_parallel_size > 1:
        logger.warning_once(
            "moe_lab_vllm could be tried with tensor parallelism only, since vLLM 0.32 for CPUs "
            "does not run stock models with expert or pipeline parallelism: compare a few answers "
            "with those of one rank"
        )
