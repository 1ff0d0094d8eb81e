"""The Q-Former: queries that read the picture and share a BERT with text (BLIP-2, 3.1).

With text it is the middleware of BLIP-2's first stage (contrast, matching, writing); without, that
of its second stage, of MiniGPT-4 and of XComposer; with instructions, that of InstructBLIP (Dai et
al. 2023). Source: LAVIS `blip2_qformer.py`.

Letters: B images, P visual tokens (CLS first), D encoder width, Q queries, L text length, M width,
E contrastive width, H decoder width, T = Q + L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.layers.basic import init_normal
from lightning_internvl.messages import check_choice
from lightning_internvl.middleware.beam_search import write
from lightning_internvl.middleware.qformer_init import start_from_bert
from lightning_internvl.middleware.qformer_lm import KeyValues, QFormerLM
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.protocols import Part

INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")
TEXTS = ("none", "read", "write")


class QFormer(Part):
    """Visual tokens and text to embeddings, matching scores, captions and decoder tokens.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        decoder_dim: width of the decoder's embeddings (completed from the decoder); None in stages
            without a decoder, which then have no `proj`.
        vocab_size: rows of the embedding table (completed from the tokenizer).
        text: "none" keeps only what pictures need (BLIP-2 stage 2, MiniGPT-4); "read" adds the text
            branch (retrieval, InstructBLIP); "write" also the language head (BLIP-2 stage 1).
        dim, depth, heads, mlp_dim: the BERT (base: 768, 12, 12, 3072).
        num_queries: learnable queries (BLIP-2: 32).
        cross_every: cross-attention in layers 0, k, 2k, ... (2).
        embed_dim: the contrastive space (256); None without.
        instructed: the queries also read an instruction (`qformer_input_ids`, one row for every
            picture) before the decoder does.
        image_prefix: the first `num_queries` ids of every text stand for the picture and are left
            out (retrieval checkpoints of transformers with an image token).
        vision_norm_eps: of the LayerNorm on visual tokens (LAVIS 1e-5, transformers 1e-6); None
            leaves the norm out.
        visual_layer: which hidden state of the encoder is read.
        act: activation of the feed-forwards.
        dropout, attention_dropout: while training (BERT: 0.1).
        init_std: deviation of the initial weights.
        embed_std: deviation of the initial queries and word embeddings; None: as `init_std`.
        pretrained: a BERT to start from, a hub id or a local folder; None starts from random
            weights.

    On the meta device no weights are loaded.
    """

    embeds = "queries"  # one embedding a query, of which the best one counts
    roles: ClassVar[dict[str, tuple[str, ...]]] = {
        "connector": ("proj",),
        "generative": ("qformer.head",),
        "language_head": ("qformer.head",),
    }

    def __init__(
        self,
        *,
        encoder_dim: int,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 3072,
        num_queries: int = 32,
        cross_every: int = 2,
        text: str = "none",
        vocab_size: int | None = None,
        max_positions: int = 512,
        embed_dim: int | None = None,
        decoder_dim: int | None = None,
        instructed: bool = False,
        image_prefix: bool = False,
        vision_norm_eps: float | None = 1e-5,
        norm_eps: float = 1e-12,
        visual_layer: int = -1,
        act: str = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init_std: float = 0.02,
        embed_std: float | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        _check(dim, heads, text, vocab_size, instructed, embed_dim)
        self.dim, self.embed_dim, self.num_queries, self.cross_every = dim, embed_dim, num_queries, cross_every
        self.text, self.instructed, self.image_prefix, self.layers = text, instructed, image_prefix, (visual_layer,)
        self.act, self.inputs = act, INSTRUCTION if instructed else ()
        self.ln_vision = nn.Identity() if vision_norm_eps is None else nn.LayerNorm(encoder_dim, eps=vision_norm_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.qformer = QFormerLM(
            dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, visual_dim=encoder_dim,
            cross_every=cross_every, vocab_size=None if text == "none" else vocab_size,
            max_positions=max_positions, writes=text == "write", eps=norm_eps, act=act,
            dropout=dropout, attention_dropout=attention_dropout,
        )  # fmt: skip
        self.vision_proj: Any = nn.Linear(dim, embed_dim) if embed_dim else None
        self.text_proj: Any = nn.Linear(dim, embed_dim) if embed_dim else None
        self.proj: Any = nn.Linear(dim, decoder_dim) if decoder_dim is not None else None
        init_normal(self, init_std)
        # Equal queries would stay equal for ever.
        nn.init.normal_(self.query_tokens, std=embed_std or init_std)
        if embed_std is not None and text != "none":
            nn.init.normal_(self.qformer.embeddings.words.weight, std=embed_std)
        if pretrained is not None and torch.get_default_device().type != "meta":
            start_from_bert(self.qformer, pretrained)

    def tokens_out(self, tokens_in: int) -> int:
        """Decoder tokens of one image, whatever the number of visual tokens."""
        return self.num_queries

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return list(self.qformer.layers)

    # --- what the decoder reads -----------------------------------------------------------------

    def forward(
        self, feats: list[Tensor], qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None
    ) -> Tensor:
        """Projected queries: one (B, P, D) -> (B, Q, H).

        Args:
            qformer_input_ids: (B, L), the instruction of each picture, where the Q-Former is
                `instructed`.
            qformer_attention_mask: (B, L), 1 on text; None: everywhere.

        Raises:
            ValueError: without a decoder, without instructions where they are read, or for another
                number of them.
        """
        if self.proj is None:
            raise ValueError("this Q-Former was built without a decoder and has no tokens for one")
        if not self.instructed:
            return self.proj(self.query(feats[0]))
        ids = qformer_input_ids
        if ids is None:
            raise ValueError("an instructed Q-Former needs qformer_input_ids, one row a picture")
        mask = torch.ones_like(ids) if qformer_attention_mask is None else qformer_attention_mask
        if len(ids) == 0:  # a batch without pictures, of which a blank one stands for the graph
            ids, mask = ids.new_zeros(len(feats[0]), 1), mask.new_ones(len(feats[0]), 1)
        if len(ids) != len(feats[0]):
            needed = f"{len(feats[0])} pictures need as many rows of qformer_input_ids"
            raise ValueError(f"{needed}, but there are {len(ids)}")
        ((queries, _),) = self.stream_states(feats[0], [TextStream("itm", ids, mask)])
        return self.proj(queries)

    def query(self, visual_BPD: Tensor) -> Tensor:
        """What the queries say of each image, no text in sight: (B, P, D) -> (B, Q, M)."""
        return self._queries(self.ln_vision(visual_BPD))[0]

    # --- contrast -------------------------------------------------------------------------------

    def embed_image(self, feats: list[Tensor], mode: str = "c") -> Tensor:
        """One normalised embedding a query, whatever the mode: (B, Q, E). The similarity to a text
        is that of its best query."""
        return F.normalize(self.project_queries(self.query(feats[0])), dim=-1)

    def embed_text(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Text alone, read both ways; the first token, normalised: (B, L) -> (B, E)."""
        ids, mask = self.text_of(ids_BL), self.text_of(mask_BL)
        embeds = self.qformer.embed_text(ids)
        states, _ = self.qformer(embeds, queries=0, mask=mask.bool()[:, None, None])
        return F.normalize(self.project_text(states, mask), dim=-1)

    def text_of(self, ids_BL: Tensor) -> Tensor:
        """Ids, or their mask, without the places of the picture."""
        return ids_BL[:, self.num_queries :] if self.image_prefix else ids_BL

    def project_queries(self, queries_BQM: Tensor) -> Tensor:
        """Query states in the contrastive space: (B, Q, E), not normalised."""
        return self.vision_proj(queries_BQM)

    def project_text(self, states_BLM: Tensor, mask_BL: Tensor) -> Tensor:
        """The first token of each text in the contrastive space: (B, E), not normalised."""
        return self.text_proj(states_BLM[:, 0])

    # --- reading pictures and text --------------------------------------------------------------

    def stream_states(self, visual_BPD: Tensor, streams: Sequence[TextStream]) -> list[tuple[Tensor, Tensor]]:
        """Read each image beside a text. Queries that see no text (itc, itg) run once, however many
        such texts there are.

        Returns:
            for each stream the states of the queries (B, Q, M) and of the text (B, L, M)
        """
        streams = [TextStream(s.task, self.text_of(s.ids), self.text_of(s.mask)) for s in streams]
        visual = self.ln_vision(visual_BPD)
        alone = iter(self._read_apart(visual, [s for s in streams if s.task != "itm"]))
        return [self._read_together(visual, s) if s.task == "itm" else next(alone) for s in streams]

    def head(self, states: Tensor) -> Tensor:
        """Scores of the next word: (..., M) -> (..., V)."""
        return self.qformer.logits(states)

    def _queries(self, visual_BPD: Tensor) -> tuple[Tensor, list[KeyValues]]:
        queries = self.query_tokens.expand(len(visual_BPD), -1, -1)
        return self.qformer(queries, queries=self.num_queries, visual_BPD=visual_BPD)

    def _read_together(self, visual_BPD: Tensor, stream: TextStream) -> tuple[Tensor, Tensor]:
        count = self.num_queries
        embeds = torch.cat([self.query_tokens.expand(len(stream.ids), -1, -1), self.qformer.embed_text(stream.ids)], dim=1)
        seen = F.pad(stream.mask.bool(), (count, 0), value=True)[:, None, None]
        states, _ = self.qformer(embeds, queries=count, visual_BPD=visual_BPD, mask=seen)
        return states[:, :count], states[:, count:]

    def _read_apart(self, visual_BPD: Tensor, streams: Sequence[TextStream]) -> list[tuple[Tensor, Tensor]]:
        """All texts beside one run of the queries, in one row [queries | first text | second text ...]."""
        if not streams:
            return []
        embeds = [self.query_tokens.expand(len(visual_BPD), -1, -1), *(self.qformer.embed_text(s.ids) for s in streams)]
        lengths = [part.shape[1] for part in embeds]
        mask = apart_mask(self.num_queries, streams)
        states, _ = self.qformer(torch.cat(embeds, dim=1), queries=self.num_queries, visual_BPD=visual_BPD, mask=mask)
        queries, *texts = states.split(lengths, dim=1)
        return [(queries, text) for text in texts]

    # --- captions -------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, visual_BPD: Tensor, prompt_BL: Tensor, **options: Any) -> Tensor:
        """Captions after the queries and a prompt: new ids (B, <= max_new_tokens).

        Args:
            prompt_BL: (B, L), the same length in every row (no padding); its first token is that of
                writing ([DEC]).
            options: of `lightning_internvl.middleware.beam_search.write`, `max_new_tokens` and
                `eos_id` at least.
        """
        return write(_Captions(self, visual_BPD), prompt_BL, **options)


class _Captions:
    """A Q-Former as the search for captions reads it: `generation.Reader`."""

    def __init__(self, middleware: QFormer, visual_BPD: Tensor) -> None:
        self.lm, self.first = middleware.qformer, middleware.num_queries
        self.cache = middleware._queries(middleware.ln_vision(visual_BPD))[1]

    def __call__(self, ids_RL: Tensor) -> Tensor:
        known = self.cache[0][0].shape[2] - self.first
        new = ids_RL[:, known:]
        length = new.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids_RL.device).tril()
        mask = F.pad(causal, (self.first + known, 0), value=True)
        embeds = self.lm.embed_text(new, known)
        states, self.cache = self.lm(embeds, queries=0, mask=mask, cache=self.cache)
        return self.lm.logits(states[:, -1])

    def reorder(self, rows_S: Tensor) -> None:
        self.cache = [(keys[rows_S], values[rows_S]) for keys, values in self.cache]


def apart_mask(queries: int, streams: Sequence[TextStream]) -> Tensor:
    """Who may look at whom in [queries | texts of itc or itg], where no query sees text and no text another: bool (B, 1, T, T).

    ====  ========  =======  ========  ==============================
    task  Q -> Q    Q -> T   T -> Q    T -> T
    ====  ========  =======  ========  ==============================
    itc   yes       no       no        both ways, padding unseen
    itg   yes       no       yes       causal, padding unseen
    ====  ========  =======  ========  ==============================

    (itm, where all see all but padding, is read in rows of its own. BLIP-2 figure 2.)
    """
    batch, total = len(streams[0].mask), queries + sum(s.mask.shape[1] for s in streams)
    mask = torch.zeros(batch, total, total, dtype=torch.bool, device=streams[0].mask.device)
    mask[:, :queries, :queries] = True
    start = queries
    for stream in streams:
        end = start + stream.mask.shape[1]
        seen = stream.mask.bool()[:, None].expand(-1, end - start, -1)
        mask[:, start:end, start:end] = seen.tril() if stream.task == "itg" else seen
        mask[:, start:end, :queries] = stream.task == "itg"
        start = end
    return mask[:, None]


def _check(dim: int, heads: int, text: str, vocab_size: int | None, instructed: bool, embed_dim: int | None) -> None:
    check_choice("middleware text", text, TEXTS)
    if dim % heads:
        raise ValueError(f"middleware {dim=} must divide by {heads=}")
    if text != "none" and vocab_size is None:
        raise ValueError(f"a Q-Former with {text=} needs a tokenizer, or vocab_size")
    if text == "none" and (instructed or embed_dim):
        needed = "a Q-Former that reads text (text: read or write)"
        raise ValueError(f"{instructed=} and {embed_dim=} need {needed}")
