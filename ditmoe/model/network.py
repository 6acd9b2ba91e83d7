"""The diffusion transformer whose feed-forward layers are mixtures of experts: read it top to bottom.

Shapes: N images, C channels, H W size, T tokens of an image, D width.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .. import __version__
from ..config.experts import RouterInput, RouterKind, has_experts
from ..config.rule import Overflow, RouterScore, RoutingRule, SelectKind, Weights
from ..files import CODE
from ..moe.attention import AttentionExperts
from ..moe.experts import Experts, FeedForward
from ..moe.factorised import FactorisedExperts
from ..moe.layer import MoELayer, Routing, decide
from ..moe.policy import Steering
from ..moe.router import Condition, Input, Router
from . import layers
from .blocks import DiTBlock, DiTMoEOutput, FinalLayer, Heads


class DiTMoETransformer2DModel(ModelMixin, CacheMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """DiT with mixture-of-experts feed-forward layers. Saved and loaded as any diffusers model.

    Args: the fields of `ditmoe.config.ModelConfig`, `MoEConfig` and `ObjectiveConfig` of the same names, or of those in
        `KEYS`; num_classes is a number here, 0 for a model without labels, and the null label is `num_classes`.
        router_bias: Keep a balancing bias in every router.
        expert_rank: Factors of factorised experts; None for stacked ones.
        other_sizes: Of images beside sample_size, whose places lie between those of its grid.
        time_scale: Length of the time axis that the embedding was trained on. `forward` takes t on 0..1000 and
            embeds t * time_scale / 1000; an imported model that saw t in [0, 1] has time_scale 1.
        reverse_time: Embed 1000 - t instead of t, for a model whose time ran from noise to data (SiT).
        freq_shift: Of the time's sinusoids: 0 as in the official DiT, 1 as in diffusers'.
        expert_storage: "int8": the weights of experts are 8 bits wide, see `store_int8`.
        norm2_eps: Epsilon of the norm before the feed-forward layers (diffusers' DiT: 1e-5).

    Raises:
        ValueError: The router is to look at labels, of which there are none; or freq_shift or norm2_eps is no such
            value.

    Source: DiT (arXiv 2212.09748); DiT-MoE (arXiv 2407.11633).
    """

    __module__ = "ditmoe.model"  # which is in saved files

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)
    _repeated_blocks = ("DiTBlock",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, sample_size: int = 32, in_channels: int = 4, num_classes: int = 1000, patch_size: int = 2,
        hidden_size: int = 384, depth: int = 12, num_heads: int = 6, ffn_width: int = 1024,
        activation: Literal["swiglu", "gelu"] = "swiglu", positions: Literal["rope", "sincos"] = "rope",
        qk_norm: Literal["rms", "layer", "none"] = "rms", refine_width: int = 0, local_conv: bool = False,
        long_skips: bool = False, head_experts: int = 0, head_width: int | None = None,
        moe_blocks: Literal["all", "every-second", "none"] = "every-second", num_experts: int = 16, top_k: int = 3,
        expert_width: int = 256, shared_width: int = 256, router_kind: RouterKind = "linear",
        cosine_scale: float | None = None, router_input: RouterInput = "token",
        router_score: RouterScore = "sigmoid", router_renormalize: bool = True, router_scale: float = 1.0,
        router_bias: bool = False, router_scope: Literal["layer", "shared"] = "layer", jitter: float = 0.0,
        router_select: SelectKind = "topk", router_tau: float | None = None, router_capacity: float | None = None,
        router_overflow: Overflow = "none", router_groups: int = 1, router_top_groups: int = 1, null_experts: int = 0,
        router_weights: Weights = "scores", shared_gate: bool = False, expert_rank: int | None = None,
        expert_biases: bool = False, attention_experts: int = 0, attention_top_k: int = 2,
        backend: Literal["auto", "grouped", "loop"] = "auto", learn_sigma: bool = False,
        prediction_type: str = "v_prediction", time_scale: float = 1000.0, reverse_time: bool = False,
        freq_shift: int = 0, norm2_eps: float = 1e-6, other_sizes: tuple[int, ...] = (),
        expert_storage: Literal["float", "int8"] = "float",
    ) -> None:  # fmt: skip
        super().__init__()
        if freq_shift not in (0, 1) or norm2_eps <= 0:
            raise ValueError(f"freq_shift is {freq_shift} and norm2_eps {norm2_eps}; they are 0 or 1, and above 0")
        self.gradient_checkpointing = False
        self.capacity: float | None = None
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = layers.PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = layers.TimestepEmbedder(hidden_size, freq_shift)
        self.y_embedder = layers.LabelEmbedder(num_classes, hidden_size) if num_classes else None
        head = self.head_width = head_width or hidden_size // num_heads
        tables = layers.position_tables(positions, hidden_size, head, sample_size // patch_size)
        for name, table in zip(("pos_embed", "rotary_cos", "rotary_sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        inputs, places = cast("Sequence[Input]", router_input.split("+")), None
        if "position" in inputs:
            table = layers.sincos_positions(hidden_size, sample_size // patch_size)[0]  # (T, D)
            places = nn.functional.layer_norm(table, (hidden_size,))
        if "label" in inputs and not num_classes:
            raise ValueError(f"router_input {router_input} needs a model with classes, and this one has none")
        self.rule = RoutingRule(
            top_k, router_score, router_renormalize, router_scale, router_select, router_tau, router_capacity,
            router_overflow, router_groups, router_top_groups, null_experts, router_weights,
        )  # fmt: skip
        router: Any = {
            "kind": router_kind, "inputs": inputs, "positions": places, "with_bias": router_bias, "jitter": jitter,
            "cosine_scale": 1.0 if cosine_scale is None and router_score == "identity" else cosine_scale,
        }  # fmt: skip
        shared = router_scope == "shared" and moe_blocks != "none"
        self.router = Router(hidden_size, num_experts + null_experts, **router) if shared else None

        def feed_forward(i: int) -> MoELayer | FeedForward:
            if not has_experts(moe_blocks, i):
                return FeedForward(hidden_size, ffn_width, activation)
            return MoELayer(
                hidden_size, num_experts=num_experts, expert_width=expert_width, shared_width=shared_width,
                rule=self.rule, activation=activation, backend=backend, shared_gate=shared_gate, own_router=not shared,
                rank=expert_rank, biases=expert_biases, **router,
            )  # fmt: skip

        def attention() -> layers.Attention:
            some = num_heads, head, attention_experts, attention_top_k, backend
            maps = AttentionExperts(hidden_size, *some) if attention_experts else None
            return layers.Attention(hidden_size, num_heads, qk_norm, maps, head)

        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, attention(), feed_forward(i), norm2_eps, long_skips and 2 * i >= depth, local_conv)
            for i in range(depth)
        )
        for i, module in enumerate(m for m in self.modules() if isinstance(m, Router)):
            module.salt = i
        self.refiner = layers.Refiner(in_channels, self.out_channels, refine_width) if refine_width else None
        features = 0 if self.refiner is None else self.refiner.FEATURES
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels + features, head_experts)
        self._initialise()
        if expert_storage == "int8":
            self.store_int8()

    def store_int8(self) -> None:
        """Store stacked experts in a quarter of the memory, see `Experts.store_int8`. Such a model is not trained.

        ValueError where there are none.
        """
        stacked = [module for module in self.modules() if isinstance(module, Experts)]
        if not stacked:
            raise ValueError("int8 is for stacked experts, and this model has none")
        for module in stacked:
            module.store_int8()
        self.register_to_config(expert_storage="int8")

    def _initialise(self) -> None:
        """DiT's initialisation: Xavier linear maps, small embeddings, zero gates and a zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (AttentionExperts, Experts, FactorisedExperts, FeedForward, Router)):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        for weight in self.t_embedder.mlp.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero: list[Any] = [self.x_embedder.proj.bias, self.final_layer.linear.weight]
        zero += [part.adaLN_modulation[1].weight for part in (*self.blocks, self.final_layer)]
        zero += [m.shared_gate.weight for m in self.modules() if isinstance(m, MoELayer) and m.shared_gate is not None]
        zero += [] if self.refiner is None else self.refiner.conv3.parameters()
        zero += [m.skip.weight for m in self.modules() if isinstance(m, DiTBlock) and m.skip is not None]
        zero += [p for module in self.modules() if isinstance(module, layers.LocalConv) for p in module.parameters()]
        for weight in zero:
            nn.init.zeros_(weight)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> Any:
        """As in diffusers, but ValueError for settings that are unknown: without them it would be another network."""
        known = {*CODE, *signature(cls.__init__).parameters}
        if strange := sorted(name for name in config_dict.keys() - known if name[:1] != "_"):
            what = f"has {strange[0]} {config_dict[strange[0]]!r:.100}, which ditmoe {__version__} does not know"
            raise ValueError(f"its config.json {what}; it may be of a newer version: pip install --upgrade ditmoe")
        return super().extract_init_dict(config_dict, **options)

    def enable_layerwise_casting(
        self, storage_dtype: torch.dtype = torch.float8_e4m3fn, compute_dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        """As in diffusers, and the experts are stored so too: their products cast them. Routers stay as they are."""
        super().enable_layerwise_casting(storage_dtype, compute_dtype, **options)
        for module in self.modules():
            for weight in module.parameters(recurse=False) if isinstance(module, Experts | AttentionExperts) else ():
                weight.data = weight.data.to(storage_dtype)

    def enable_cache(self, config: FirstBlockCacheConfig | TaylorSeerCacheConfig) -> None:
        """As in diffusers, of its caches those that hook whole blocks. There are no routing records meanwhile."""
        if not isinstance(config, FirstBlockCacheConfig | TaylorSeerCacheConfig):
            kind = type(config).__name__
            raise ValueError(f"config is {kind}; this model takes FirstBlockCacheConfig and TaylorSeerCacheConfig")
        TransformerBlockRegistry.register(DiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    @property
    def null_label(self) -> int | None:
        """The label that means "no class"; None for a model without labels."""
        return self.config.num_classes or None

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None,
        return_dict: bool = True, routed: bool = True, steering: Steering | None = None,
        decided: dict[tuple[int, ...], Routing | None] | None = None,
    ) -> DiTMoEOutput | tuple[Tensor, list[Routing]] | tuple[Tensor, list[Routing], Heads]:  # fmt: skip
        """Predict from noisy images. A sample's output does not depend on the others of its batch.

        Args:
            hidden_states: x_t (N, C, H, W).
            timestep: t on the 0..1000 scale, (N,) or one for all; whole numbers or fractions.
            class_labels: y (N,) int64 in [0, num_classes]; None is the null label.
            return_dict: Return `DiTMoEOutput`; otherwise the tuple (sample, routing), or with heads those too.
            routed: False leaves the routed experts out: of a layer with experts the shared one alone.
            steering: Another tau of a rule that has one, biases of single experts: see `ditmoe.moe.policy`.
            decided: What blocks' routers that see the place alone decided in other passes with the same weights, by
                (block, N, T): used, and filled. Not with gradients or `steering`.

        Raises:
            ValueError: Labels for a model without classes, x_t of another shape, or tau for a rule that has none.
        """
        self._check(hidden_states, class_labels)
        condition = self.condition(hidden_states, timestep, class_labels)
        if steering is not None and steering.tau is not None and not self.rule.has_tau:
            raise ValueError(f"tau is {steering.tau}, but this model selects {self.rule.kind}, which has none")
        x = self.x_embedder(hidden_states)  # (N, T, D)
        table, rotary = self._positions(hidden_states)
        if table is not None:
            x = x + table.to(x.dtype)
        tokens, decision, routing, begun = x, None, list[Routing](), list[Tensor]()
        if steering is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            decided = None
        for i, block in enumerate(self.blocks):
            if self.config.long_skips and 2 * i + 1 < len(self.blocks):
                begun.append(x)
            early = None if block.skip is None else begun.pop()
            if steering is not None:
                condition = condition._replace(steering=steering.at(i))
            if self.router is not None and (decision is None or (steering is not None and steering.bias is not None)):
                plain = nn.functional.layer_norm(tokens, tokens.shape[-1:])
                decision = decide(self.router, self.rule, tokens, condition._replace(plain=plain), self.capacity)
                condition = condition._replace(routing=decision)
            if decided is not None:
                if (key := (i, *x.shape[:2])) not in decided:
                    decided[key] = cast("DiTBlock", block).by_place(x)
                condition = condition._replace(routing=decided[key] or decision)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, record = self._gradient_checkpointing_func(block, x, condition, rotary, routed, early)
            elif self.is_cache_enabled:
                x, record = block(x, condition, rotary, routed, early, True), None
            else:
                x, record = block(x, condition, rotary, routed, early)
            if record is not None:
                routing.append(record)
        x, several = self.final_layer(x, condition.c)
        sample = self._drawn(x)
        if self.refiner is not None:
            sample = self.refiner(sample, hidden_states)
        heads = None
        if several is not None:
            gates, each = several  # (N, K), (N, K, T, ...)
            heads = Heads(gates, self._drawn(each.flatten(0, 1)).unflatten(0, gates.shape)[:, :, : self.out_channels])
        if return_dict:
            return DiTMoEOutput(sample=sample, routing=routing, heads=heads)
        return (sample, routing) if heads is None else (sample, routing, heads)

    def _positions(self, images: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """What is added to tokens, or turns them in attention, for images (N, C, H, W)."""
        c = self.config
        side, span = images.shape[-1] // c.patch_size, c.sample_size // c.patch_size
        table, cos, sin = self.pos_embed, self.rotary_cos, self.rotary_sin
        if side != span:
            found = layers.position_tables(c.positions, c.hidden_size, self.head_width, side, span)
            table, cos, sin = (each if each is None else each.to(images.device) for each in found)
        return table, None if cos is None else (cos, sin)

    def _drawn(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, patch_size^2 * channels) as images (N, channels, H, W)."""
        p: int = self.config.patch_size
        return layers.unpatchify(tokens, p, tokens.shape[-1] // p**2)

    def condition(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> Condition:
        """What blocks and routers get beside the tokens: of N images x, whose pixels do not matter, at t and of y."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        own = 1000 - t.float() if self.config.reverse_time else t.float()  # on the time axis of the training
        time: Tensor = self.t_embedder(own * (self.config.time_scale / 1000), x.dtype)
        if self.y_embedder is None:
            return Condition(time, time, timestep=t)
        y = torch.full((len(x),), self.config.num_classes, device=x.device) if y is None else y
        label = self.y_embedder(y)
        return Condition(time + label, time, label, timestep=t)

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        C, sizes = self.config.in_channels, (self.config.sample_size, *self.config.other_sizes)
        if x.ndim != 4 or x.shape[1] != C or (x.shape[2], x.shape[3]) not in [(size, size) for size in sizes]:
            expected = " or ".join(str((C, size, size)) for size in sizes)
            raise ValueError(f"x_t must be (N, C, H, W) with (C, H, W) = {expected}, got {tuple(x.shape)}")
        if y is not None and self.y_embedder is None:
            raise ValueError("class_labels were given to a model that was trained without labels")
