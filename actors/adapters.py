"""Parameter-efficient fine-tuning: a frozen model with a small trained part, mostly by the `peft` library.

    kind         what is trained                            in the packed row
    lora, ia3    factors beside linear layers               nothing to do: layers are replaced in place
    bottleneck   a small network after each feed-forward    nothing to do: layers are hooked
    prompt       embeddings of virtual tokens               virtual tokens are put in front of every sample
    prefix       keys and values of virtual tokens          the same, and its keys and values are replaced there

All that is trained lies below the model itself, so `model.parameters()` is everything and the frozen part has
`requires_grad` False. Under ZeRO-3 the caller gathers the parameters around whatever reads them here.
Legend: B samples and T tokens of a packed row, V virtual tokens, H width of the model.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from actors.bottleneck import CONFIG_FILE, WEIGHTS_FILE, add_bottlenecks, describe_bottlenecks
from actors.packed_model import packed_hidden_states
from actors.packed_row import PackedRow
from actors.virtual_tokens import Places, PrefixInRow, Recorder
from engine.config import AdapterConfig, UserError

Task = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"]
HEADS = ("score", "classifier")
"""Names of the heads of reward models, which are new and therefore trained beside every adapter."""
ADAPTER = "default"
"""peft's name for the one adapter that there is."""


class AdaptedModel(ABC):
    """A frozen model and its adapter. Made by `add_adapter`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        """The model that was given, changed in place."""

    def hidden_states(self, row: PackedRow) -> torch.Tensor:
        """Last hidden states [T, H] of a packed row."""
        return packed_hidden_states(self.model, row)

    @abstractmethod
    def disabled(self) -> AbstractContextManager[Any]:
        """Within it, forward passes are those of the frozen base. Heads of reward models stay trained."""

    @abstractmethod
    def adapter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is saved, and published to engines that know the kind: every trained tensor under peft's name."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What adapter_config.json holds: plain values only."""

    def merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once under its original name, the adapter merged in layer by layer, in the model's type.

        The base weights are read only.

        Raises:
            ValueError: this kind of adapter cannot be merged.
        """
        raise ValueError(f"{self.description()['peft_type']} cannot be merged into the weights")

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter alone, in peft's format."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.adapter_weights()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(self.description(), indent=2, sort_keys=True) + "\n")

    def count_parameters(self) -> tuple[int, int]:
        """(trained, all) parameters, before they are partitioned."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def add_adapter(model: PreTrainedModel, config: AdapterConfig, *, task: Task) -> AdaptedModel:
    """Freeze a model and add an adapter, initialised from torch's global random numbers.

    Raises:
        UserError: the model has no such layers, or this kind of adapter does not fit it.
        ValueError: the kind is `none`.
    """
    if config.four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if config.kind == "bottleneck":
        return _Bottlenecks(model, config.rank, task)
    if config.kind in ("prompt", "prefix"):
        return _VirtualTokens(model, _virtual_tokens_config(config, task))
    if config.kind == "lora":
        return _Factors(model, _lora_config(model, config, task))
    if config.kind == "ia3":
        return _Factors(model, _ia3_config(model, config, task))
    raise ValueError(f"{config.kind} is not an adapter")


def quantization_config(config: AdapterConfig) -> BitsAndBytesConfig | None:
    """How the frozen weights are loaded: None leaves them as they are, else 4-bit NormalFloat (arXiv:2305.14314).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not config.four_bit:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.adapter.four_bit: needs bitsandbytes; pip install bitsandbytes, or set it to false")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _lora_config(model: PreTrainedModel, config: AdapterConfig, task: Task) -> LoraConfig:
    _check_targets(model, config.targets)
    return LoraConfig(
        task_type=task,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, as vLLM does
        lora_dropout=0.0,
        target_modules=list(config.targets) or "all-linear",
        exclude_modules=list(HEADS) if task != "CAUSAL_LM" else None,
        use_dora=config.dora,
        use_rslora=config.rslora,
    )


def _ia3_config(model: PreTrainedModel, config: AdapterConfig, task: Task) -> IA3Config:
    defaults = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    model_type = model.config.get_text_config().model_type
    if not config.targets:
        if model_type not in defaults:
            raise UserError(
                f"model.adapter.targets: peft has no choice of IA3 layers for {model_type}; name those of the keys, "
                "the values and the end of the feed-forward block, for instance [k_proj, v_proj, down_proj]"
            )
        return IA3Config(task_type=task)
    _check_targets(model, config.targets)
    # A feed-forward layer's input is scaled, every other layer's output.
    known = {name for names in defaults.values() for name in names}
    feed_forward = [t for t in config.targets if any(f".{t}".endswith(f".{name}") for name in known)]
    return IA3Config(task_type=task, target_modules=list(config.targets), feedforward_modules=feed_forward)


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Every target names a layer, and none an embedding: log-probs and engines use those unchanged."""
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    modules = dict(model.named_modules())
    for target in targets:
        named = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if not named:
            layers = {name.rsplit(".", 1)[-1] for name, module in modules.items() if isinstance(module, nn.Linear)}
            has = ", ".join(sorted(layers))
            raise UserError(f"model.adapter.targets: {type(model).__name__} has no layer {target}; it has {has}")
        if any(id(module) in embeddings for module in named):
            raise UserError(f"model.adapter.targets: {target} is an embedding, which stays frozen; leave it out")


def _virtual_tokens_config(config: AdapterConfig, task: Task) -> PromptTuningConfig | PrefixTuningConfig:
    if config.kind == "prefix":
        return PrefixTuningConfig(task_type=task, num_virtual_tokens=config.virtual_tokens)
    return PromptTuningConfig(
        task_type=task,
        num_virtual_tokens=config.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )


class _Peft(AdaptedModel):
    """An adapter of peft's."""

    def __init__(self, model: PreTrainedModel, config: PeftConfig) -> None:
        super().__init__(model)
        try:
            self._peft: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UserError(f"model.adapter: peft cannot adapt {type(model).__name__}: {error}") from error

    def disabled(self) -> AbstractContextManager[Any]:
        return self._peft.disable_adapter()

    def adapter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from get_peft_model_state_dict(self._peft, save_embedding_layers=False).items()

    def description(self) -> dict[str, Any]:
        config = replace(self._peft.peft_config[ADAPTER], inference_mode=True)
        return json.loads(json.dumps(config.to_dict(), default=sorted))  # sets become lists in a fixed order


class _Factors(_Peft):
    """LoRA (with DoRA and rsLoRA) and IA3."""

    def __init__(self, model: PreTrainedModel, config: PeftConfig) -> None:
        super().__init__(model, config)
        self._named: dict[str, nn.Parameter] = {}

    def adapter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """peft's names are looked up once: that takes longer than to copy the factors."""
        if not self._named:
            parameters = {p.data_ptr(): p for p in self._peft.parameters() if p.requires_grad}
            self._named = {name: parameters[tensor.data_ptr()] for name, tensor in super().adapter_weights()}
        yield from ((name, parameter.detach()) for name, parameter in self._named.items())

    @torch.no_grad()
    def merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _merged_weights(self.model, "", set()):
            yield name, tensor.detach()


def _merged_weights(module: nn.Module, prefix: str, seen: set[nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """`seen` holds the parameters that were met, so that tied ones travel once."""
    if isinstance(module, LoraLayer | IA3Layer):
        merged = _merged_lora(module) if isinstance(module, LoraLayer) else _merged_ia3(module)
        yield from ((prefix + name, tensor) for name, tensor in merged.items() if tensor is not None)
    elif isinstance(module, ModulesToSaveWrapper):
        trained: Any = module.modules_to_save
        yield from _merged_weights(trained[ADAPTER], prefix, seen)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield prefix + name, dequantize_module_weight(module) if name == "weight" else parameter
        for name, child in module.named_children():
            yield from _merged_weights(child, f"{prefix}{name}.", seen)


def _merged_lora(layer: Any) -> dict[str, torch.Tensor | None]:
    """Parameters of a plain layer that computes what this linear LoraLayer does."""
    weight = dequantize_module_weight(layer.get_base_layer()) + layer.get_delta_weight(ADAPTER)
    if layer.use_dora[ADAPTER]:
        # arXiv:2402.09353, eq. 5: a magnitude for each output, times the direction
        inputs = 0 if layer.fan_in_fan_out else 1
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        weight = weight * (magnitude.unsqueeze(inputs) / torch.linalg.norm(weight, dim=inputs, keepdim=True))
    return {"weight": weight, "bias": layer.get_base_layer().bias}


def _merged_ia3(layer: Any) -> dict[str, torch.Tensor | None]:
    """Parameters of a plain layer that computes what this linear IA3Layer does."""
    base = layer.get_base_layer()
    scale = layer.ia3_l[ADAPTER]  # [1, in] of a feed-forward layer, else [out, 1]
    bias = base.bias if layer.is_feedforward or base.bias is None else base.bias * scale.flatten()
    return {"weight": dequantize_module_weight(base) * transpose(scale, layer.fan_in_fan_out), "bias": bias}


class _Bottlenecks(AdaptedModel):
    """Small networks after the feed-forward blocks."""

    def __init__(self, model: PreTrainedModel, width: int, task: Task) -> None:
        super().__init__(model)
        self._bottlenecks = add_bottlenecks(model, width)
        self._description = describe_bottlenecks(model, width, task)
        for name in HEADS if task != "CAUSAL_LM" else ():
            if hasattr(model, name):
                getattr(model, name).requires_grad_(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    def adapter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()

    def description(self) -> dict[str, Any]:
        return self._description

    def _enable(self, enabled: bool) -> None:
        for bottleneck in self._bottlenecks:
            bottleneck.enabled = enabled


class _VirtualTokens(_Peft):
    """Prompt tuning (arXiv:2104.08691) and prefix tuning (arXiv:2101.00190)."""

    def __init__(self, model: PreTrainedModel, config: PromptTuningConfig | PrefixTuningConfig) -> None:
        super().__init__(model, config)
        self._length = config.num_virtual_tokens
        self._is_prefix = isinstance(config, PrefixTuningConfig)
        self._enabled = True
        model.add_module("virtual_tokens", self._peft.prompt_encoder)  # where the optimizer finds what is trained
        if self._is_prefix:
            self._start_as_real_tokens()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def hidden_states(self, row: PackedRow) -> torch.Tensor:
        """Last hidden states [T, H] of a packed row; those of the virtual tokens are left out.

        Raises:
            UserError: gradient checkpointing is on, which would drop the prefix.
        """
        if not self._enabled:
            return super().hidden_states(row)
        places = Places.of(row.cu_seq_lens, self._length)
        words_TH = self.model.get_input_embeddings()(row.tokens[0])
        cache = None
        if self._is_prefix:
            if self.model.is_gradient_checkpointing:
                raise UserError("model.gradient_checkpointing: has no prefix tuning; set it to false, or use prompt")
            prefix: Any = self._peft.get_prompt(batch_size=1)
            cache = PrefixInRow([(layer.keys, layer.values) for layer in prefix.layers], places)
            virtual_VH = words_TH.new_zeros(self._length, words_TH.shape[1])
        else:
            virtual_VH = self._peft.get_prompt(batch_size=1)[0].to(words_TH.dtype)
        longest = int(torch.diff(places.cu_seq_lens).max())
        hidden = self.model.base_model(
            inputs_embeds=places.insert(words_TH, virtual_VH)[None],
            position_ids=places.position_ids[None],
            attention_mask=None,
            past_key_values=cache,
            use_cache=False,
            cu_seq_lens_q=places.cu_seq_lens,
            cu_seq_lens_k=places.cu_seq_lens,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state[0]
        return hidden[places.token_at]

    @torch.no_grad()
    def _start_as_real_tokens(self) -> None:
        """Begin with the keys and values of random tokens, which trains better than noise (section 7.4 there)."""
        model = self.model
        vocabulary = model.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (1, self._length)).to(model.device)
        attention = model.config._attn_implementation
        model.set_attn_implementation("sdpa")  # the model is still on the host, where flash attention does not run
        try:
            cache = Recorder()
            model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
            initialize_kv_prefix_from_past_key_values(self._peft, past_key_values=cache.states)
        except ValueError as error:
            raise UserError(
                f"model.adapter.kind: prefix does not fit the attention of {type(model).__name__} ({error}); use prompt"
            ) from error
        finally:
            model.set_attn_implementation(attention)
