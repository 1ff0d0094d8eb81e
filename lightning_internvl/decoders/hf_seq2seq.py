"""Any Hugging Face encoder-decoder as the decoder: its encoder reads pictures and prompt, its
decoder writes the answer (Flan-T5 in BLIP-2 and InstructBLIP).

Letters: B rows, L prompt length, A answer length, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM
from transformers.masking_utils import create_bidirectional_mask

from lightning_internvl.decoders.hf_causal import HFCausalLM


class HFSeq2SeqLM(HFCausalLM):
    """A language model whose labels are answers of their own, not the rest of the prompt; its names
    are kept below `lm.`.

    It reads no packed rows: answers are rows of their own.

    Args: those of `HFCausalLM`. With `config`, `tie_word_embeddings` says whether input and output
    embeddings are one tensor, whatever the library makes of it.
    """

    models = AutoModelForSeq2SeqLM
    inputs = ("labels", "decoder_input_ids")
    feeds_blocks = False  # its longest list of blocks may be that of either side
    # the state at a place judges the label at that place: the inputs are shifted instead
    shifts = False

    def __init__(self, *, config: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(config=config, **settings)
        if settings.get("pretrained") is None:
            self._tied = bool((config or {}).get("tie_word_embeddings", True))
        else:
            words, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
            self._tied = head.weight is words.weight
        self.lm.config.tie_word_embeddings = self._tied
        # T5's answers begin with padding
        if getattr(self.lm.config, "decoder_start_token_id", None) is None:
            self.lm.config.decoder_start_token_id = self.lm.config.pad_token_id
        if self.lm.generation_config.decoder_start_token_id is None:
            self.lm.generation_config.decoder_start_token_id = self.lm.config.decoder_start_token_id
        if not self._tied and settings.get("pretrained") is None:
            # The library ties what it builds of some configurations (T5) always.
            shape = self.lm.get_output_embeddings().weight.shape
            self.lm.get_output_embeddings().weight = nn.Parameter(torch.empty(shape).normal_(std=shape[1] ** -0.5))
        self.tie()

    @property
    def tied(self) -> bool:
        """Whether output and input embeddings are one tensor."""
        return self._tied

    def tie(self) -> None:
        """Let the embeddings of both sides, and the output's if tied, share one tensor again."""
        shared = self.lm.get_input_embeddings().weight
        for stack in (self.lm.get_encoder(), self.lm.get_decoder()):
            stack.get_input_embeddings().weight = shared
        super().tie()

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one: the blocks of both stacks."""
        stacks = (self.lm.get_encoder(), self.lm.get_decoder())
        outermost = [next(m for m in stack.modules() if isinstance(m, nn.ModuleList)) for stack in stacks]
        return [block for blocks in outermost for block in blocks]

    # it reads no packed rows, and has no `segments`
    def hidden(  # type: ignore[override]
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """States of the answer, ready for `head`: (B, L, H) and the answer's ids -> (B, A, H).

        Args:
            labels: (B, A), -100 where nothing is to be learnt; shifted, they are what the decoder
                reads.
            decoder_input_ids: (B, A), what the decoder reads instead.

        Raises:
            ValueError: if neither is given.
        """
        if decoder_input_ids is None and labels is None:
            raise ValueError("an encoder-decoder needs labels or decoder_input_ids beside the prompt")
        if decoder_input_ids is None:
            decoder_input_ids = self.lm.prepare_decoder_input_ids_from_labels(labels)
        mask, cross = attention_mask_BL, attention_mask_BL
        own = None
        # transformers would look into a mask of two dimensions; those of four it takes as they are
        if embeds_BLH.is_meta:
            prompt, answer = mask.shape[1], decoder_input_ids.shape[1]
            mask, cross = (attention_mask_BL.bool()[:, None, None].expand(-1, 1, n, prompt) for n in (prompt, answer))
            whole = torch.ones(len(mask), 1, answer, answer, dtype=torch.bool, device=mask.device)
            own = whole.tril()
        else:
            # made here, transformers does not ask the device whether it could do without
            mask = self._seen(self.lm.get_encoder(), embeds_BLH, attention_mask_BL)
            cross = self._seen(self.lm.get_decoder(), decoder_input_ids[..., None], attention_mask_BL, embeds_BLH)
        read = self.lm.get_encoder()(inputs_embeds=embeds_BLH, attention_mask=mask)[0]
        states = self.lm.get_decoder()(
            input_ids=decoder_input_ids,
            attention_mask=own,
            encoder_hidden_states=read,
            encoder_attention_mask=cross,
            use_cache=False,
        )[0]
        scales = getattr(self.lm.config, "scale_decoder_outputs", False)
        return states * self.dim**-0.5 if scales else states

    @staticmethod
    def _seen(stack: Any, queries: Tensor, attention_mask_BL: Tensor, keys: Tensor | None = None) -> Any:
        """Which tokens of the prompt each query sees, as the attention of a stack wants it; of
        queries the number counts."""
        options: dict[str, Any] = {"encoder_hidden_states": keys, "allow_is_bidirectional_skip": False}
        return create_bidirectional_mask(stack.config, queries, attention_mask_BL, **options)

    @torch.no_grad()
    def generate(self, embeds_BLH: Tensor, attention_mask_BL: Tensor, **options: Any) -> Tensor:
        """New ids (B, <= max_new_tokens) after embeddings; options as in transformers."""
        return self.lm.generate(inputs_embeds=embeds_BLH, attention_mask=attention_mask_BL, **options)[:, 1:]
