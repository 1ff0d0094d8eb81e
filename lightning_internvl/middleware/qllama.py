"""QLLaMA, the language middleware of InternVL 1.0 (Chen et al. 2023, section 3.2; official
`internvl_stage2` code).

A LLaMA with learnable queries. It encodes captions (contrastive stage), reads images through its
queries (generative stage), and hands both its queries and the tower's patches to a decoder
(supervised stage). Parameter names are those of InternVL-14B.

Letters: B images, P visual tokens (CLS first), D encoder width, Q queries, L text length, M width,
E contrastive width, H decoder width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.layers.basic import AttentionPooling, init_normal, rotary_table
from lightning_internvl.middleware.beam_search import write
from lightning_internvl.middleware.connector import projection
from lightning_internvl.middleware.qllama_init import sizes_of, start_from_llama
from lightning_internvl.middleware.qllama_lm import KeyValues, QLlamaLM
from lightning_internvl.middleware.text_streams import Task, TextStream
from lightning_internvl.protocols import Part

Mode = Literal["c", "g"]


class QLLaMA(Part):
    """Visual tokens and text to embeddings, captions, matching scores and decoder tokens.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder); None in stages
            without a decoder, which then have no `mlp1` and `mlp2`.
        vocab_size: rows of the embedding table (completed from the tokenizer).
        dim, depth, heads, mlp_dim, rope_theta, norm_eps: the LLaMA (8B: 4096, 32, 32, 11008, 10000,
            1e-6); None: that of `init_from_llm`, and without one 10000 and 1e-6 for the last two.
        init_from_llm: a LLaMA-shaped language model from which all but queries and cross-attention
            starts: a hub id, a folder, a GGUF file or `package:NAME`. Nothing is loaded on the meta
            device.
        num_queries: learnable queries (8B: 96); 0 for a text encoder without queries,
            cross-attention and language head, as stage 1 of the paper trains it (InternVL-C).
        cross_every: cross-attention in layers 0, k, 2k, ... (8B: 2).
        embed_dim, pool_heads: the contrastive space and the heads of the two poolings (14B: 768,
            16); embed_dim None leaves them out (InternVL-Chat with QLLaMA).
        special_tokens: tokens that the encoder puts before its patches, such as CLS (completed from
            the encoder).
        patches: hand the tower's patches to the decoder beside the queries ("chat with QLLaMA", two
            MLPs).
        patch_layer: the encoder layer whose patches the decoder reads (InternVL-Chat 1.0: -4).
        init_std: deviation of the initial weights; beside a language model these are queries,
            cross-attention and heads (in the paper random too, with deviation 0.02).
        embed_std: deviation of the initial queries and token embeddings; None: as `init_std`.

    Raises:
        ValueError: for sizes that do not fit each other or the language model.
    """

    connector = "mlp*"  # of all this, what fine-tuning with a decoder trains
    roles: ClassVar = {
        "generative": ("query_tokens", "qllama.model.layers.*.cross_attn", "qllama.lm_head", "clip_projector2"),
        "language_head": ("qllama.lm_head",),
    }
    # parts of some stages, None in the others, which do not call for them
    query_tokens: Any
    text_projection: Any
    clip_projector: Any
    clip_projector2: Any
    mlp1: Any

    def __init__(
        self,
        *,
        encoder_dim: int,
        vocab_size: int,
        num_queries: int,
        embed_dim: int | None,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_dim: int | None = None,
        init_from_llm: str | None = None,
        pool_heads: int = 16,
        cross_every: int = 2,
        decoder_dim: int | None = None,
        special_tokens: int = 1,
        patches: bool = True,
        patch_layer: int = -4,
        rope_theta: float | None = None,
        norm_eps: float | None = None,
        init_std: float = 0.02,
        embed_std: float | None = None,
    ) -> None:
        super().__init__()
        given = {"dim": dim, "depth": depth, "heads": heads, "mlp_dim": mlp_dim, "rope_theta": rope_theta, "norm_eps": norm_eps}
        self.sizes = sizes_of(given, init_from_llm)
        dim, depth, heads, mlp_dim, rope_theta, norm_eps = self.sizes
        if dim % heads:
            raise ValueError(f"middleware {dim=} must divide by {heads=}")
        if not num_queries and decoder_dim is not None:
            fault = "it cannot read pictures for a decoder (num_queries=0)"
            raise ValueError(f"a QLLaMA without queries is a text encoder; {fault}")
        self.dim, self.embed_dim, self.num_queries = dim, embed_dim, num_queries
        self.head_dim, self.rope_theta, self.cross_every = dim // heads, rope_theta, cross_every
        self.patches, self.skipped = patches and decoder_dim is not None, special_tokens
        self.layers = (-1, patch_layer) if self.patches else (-1,)
        self.qllama = QLlamaLM(
            vocab_size=vocab_size, dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim,
            visual_dim=encoder_dim if num_queries else None, cross_every=cross_every, eps=norm_eps,
        )  # fmt: skip
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, dim)) if num_queries else None
        self.text_projection = nn.Parameter(torch.zeros(dim, embed_dim)) if embed_dim else None
        self.clip_projector = AttentionPooling(encoder_dim, pool_heads, embed_dim) if embed_dim else None
        self.clip_projector2 = AttentionPooling(dim, pool_heads, embed_dim) if embed_dim and num_queries else None
        patches_dim = decoder_dim if patches else None
        self.mlp1 = projection(encoder_dim, patches_dim) if patches_dim is not None else None
        self.mlp2 = projection(dim, decoder_dim) if decoder_dim is not None else None
        init_normal(self, init_std)
        if self.query_tokens is not None:
            # Equal queries would stay equal for ever: noise, not the zeros of the official
            # constructor, starts them apart.
            nn.init.normal_(self.query_tokens, std=embed_std or init_std)
        if embed_std is not None:
            nn.init.normal_(self.qllama.model.embed_tokens.weight, std=embed_std)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=dim**-0.5)
        if init_from_llm:
            start_from_llama(self.qllama, init_from_llm)

    @property
    def without_source(self) -> dict[str, Any]:
        """Settings that take the place of those given, to build the same architecture without
        reading a language model."""
        return {"init_from_llm": None, "vocab_size": self.qllama.model.embed_tokens.num_embeddings, **self.sizes._asdict()}

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens for one image of `tokens_in` visual tokens, CLS included."""
        return self.num_queries + (tokens_in - self.skipped if self.patches else 0)

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return list(self.qllama.model.layers)

    # --- text -----------------------------------------------------------------------------------

    def embed_text(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Captions as a causal LLaMA reads them: the state of the last token, projected. (B, L) ->
        (B, E), not normalised."""
        hidden, _ = self.qllama(self.qllama.model.embed_tokens(ids_BL), self._rotary(0, ids_BL.shape[1], ids_BL.device))
        return self.project_text(hidden, mask_BL)

    def project_text(self, hidden_BLM: Tensor, mask_BL: Tensor) -> Tensor:
        """State of the last token of each text, in the contrastive space: (B, E)."""
        last = mask_BL.sum(dim=1) - 1
        return hidden_BLM[torch.arange(len(last), device=last.device), last] @ self.text_projection

    def project_queries(self, queries_BQM: Tensor) -> Tensor:
        """States of the queries pooled into the contrastive space: (B, E)."""
        return self.clip_projector2(queries_BQM)

    @property
    def output_layer(self) -> nn.Module:
        """All that `head` calls."""
        return self.qllama.lm_head

    def head(self, states: Tensor) -> Tensor:
        """Scores of the next word: (..., M) -> (..., V)."""
        return self.output_layer(states)

    # --- images ---------------------------------------------------------------------------------

    def embed_image(self, feats: list[Tensor], mode: Mode = "c") -> Tensor:
        """Images in the contrastive space, as the original returns them: (B, E).

        Mode "c" pools the tower and is not normalised. Mode "g" is the sum of both normalised
        poolings, not normalised again.
        """
        backbone = self.clip_projector(feats[0])
        if mode == "c":
            return backbone
        queried = self.clip_projector2(self.query(feats[0]))
        return F.normalize(backbone, dim=-1) + F.normalize(queried, dim=-1)

    def query(self, visual_BPD: Tensor) -> Tensor:
        """What the queries say of each image alone, after the norm: (B, P, D) -> (B, Q, M)."""
        queries = self.query_tokens.expand(len(visual_BPD), -1, -1)
        seen = torch.ones(1, 1, self.num_queries, self.num_queries, dtype=torch.bool, device=visual_BPD.device)
        rotary = self._rotary(0, self.num_queries, visual_BPD.device)
        return self.qllama(queries, rotary, mask=seen, visual_BPD=visual_BPD, queries=self.num_queries)[0]

    def stream_states(self, visual_BPD: Tensor, streams: list[TextStream]) -> list[tuple[Tensor, Tensor]]:
        """Read each image beside a text, all streams in one forward of `len(streams) * B` rows [queries | text].

        Returns:
            for each stream the states of the queries (B, Q, M) and of the text (B, L, M), after the
            final norm
        """
        queries, length = self.num_queries, max(s.ids.shape[1] for s in streams)
        ids = torch.cat([F.pad(s.ids, (0, length - s.ids.shape[1])) for s in streams])
        mask = torch.cat([task_mask(s.task, queries, F.pad(s.mask, (0, length - s.mask.shape[1]))) for s in streams])
        embeds = torch.cat([self.query_tokens.expand(len(ids), -1, -1), self.qllama.model.embed_tokens(ids)], dim=1)
        rotary = self._rotary(0, queries + length, ids.device)
        hidden, _ = self.qllama(embeds, rotary, mask=mask, visual_BPD=visual_BPD, queries=queries)
        rows = hidden.split(len(visual_BPD))
        return [(h[:, :queries], h[:, queries : queries + s.ids.shape[1]]) for h, s in zip(rows, streams, strict=True)]

    def forward(self, feats: list[Tensor]) -> Tensor:
        """What the decoder reads, queries first: list of (N, P, D) -> (N, Q [+ patches], H)."""
        if self.mlp2 is None:
            raise ValueError("this QLLaMA was built without a decoder and has no tokens for one")
        tokens = self.mlp2(self.query(feats[0]))
        return torch.cat([tokens, self.mlp1(feats[1][:, self.skipped :])], dim=1) if self.patches else tokens

    # --- captions -------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, visual_BPD: Tensor, prompt_BL: Tensor, *, use_cache: bool = True, **options: Any) -> Tensor:
        """Captions after a bidirectional prefix of queries: new ids (B, <= max_new_tokens).

        Args:
            prompt_BL: (B, L), the same length in every row (no padding).
            use_cache: keep keys and values; False reads everything again for every token, with the
                same result.
            options: of `lightning_internvl.middleware.beam_search.write`, `max_new_tokens` and
                `eos_id` at least.
        """
        return write(_Captions(self, visual_BPD, use_cache), prompt_BL, **options)

    def _rotary(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary table for rows `start ..`; positions are rows, queries included."""
        return rotary_table(torch.arange(start, start + length, device=device), self.head_dim, self.rope_theta)


class _Captions:
    """QLLaMA as the search for captions reads it: `generation.Reader`."""

    def __init__(self, middleware: QLLaMA, visual_BPD: Tensor, use_cache: bool) -> None:
        self.middleware, self.visual, self.use_cache = middleware, visual_BPD, use_cache
        self.cache: list[KeyValues] | None = None

    def __call__(self, ids_RL: Tensor) -> Tensor:
        own, lm = self.middleware, self.middleware.qllama
        rows, length = ids_RL.shape
        if self.cache is not None:
            rotary = own._rotary(own.num_queries + length - 1, 1, ids_RL.device)
            hidden, self.cache = lm(lm.model.embed_tokens(ids_RL[:, -1:]), rotary, cache=self.cache)
        else:
            embeds = torch.cat([own.query_tokens.expand(rows, -1, -1), lm.model.embed_tokens(ids_RL)], dim=1)
            mask = task_mask("itg", own.num_queries, torch.ones_like(ids_RL))
            rotary = own._rotary(0, own.num_queries + length, ids_RL.device)
            hidden, cache = lm(embeds, rotary, mask=mask, visual_BPD=self.visual, queries=own.num_queries)
            self.cache = cache if self.use_cache else None
        return lm.lm_head(hidden[:, -1])

    def reorder(self, rows_S: Tensor) -> None:
        if self.cache is not None:
            self.cache = [(keys[rows_S], values[rows_S]) for keys, values in self.cache]
        else:
            self.visual = self.visual[rows_S]


def task_mask(task: Task, queries: int, text_mask_BL: Tensor) -> Tensor:
    """Who may look at whom among [queries | text] (BLIP-2 figure 2, InternVL stage 2): bool (B, 1, Q + L, Q + L).

    ====  ========  =======  ========  ==============================
    task  Q -> Q    Q -> T   T -> Q    T -> T
    ====  ========  =======  ========  ==============================
    itm   yes       yes      yes       both ways, padding unseen
    itc   yes       no       no        causal
    itg   yes       no       yes       causal
    ====  ========  =======  ========  ==============================
    """
    batch, length = text_mask_BL.shape
    total = queries + length
    allowed = torch.ones(total, total, dtype=torch.bool, device=text_mask_BL.device)
    if task != "itm":
        allowed = allowed.tril()
        allowed[:queries, :queries] = True
    if task == "itc":
        allowed[queries:, :queries] = False
    seen = F.pad(text_mask_BL.bool(), (queries, 0), value=True)
    return (allowed & seen[:, None, :])[:, None].expand(batch, 1, total, total)
