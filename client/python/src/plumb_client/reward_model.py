"""A torch module that stands where a trainer wants a reward model, and asks a server.

TRL's GRPO, RLOO and online DPO call `module(input_ids=..., attention_mask=...).logits`, PPO (TRL up to 1.12) the
backbone and the head one after the other: both have their place here. It has no weights and knows no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .client import Client
from .inputs import Item, ScoreOptions, Text, TokenIds
from .results import Token

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PlumbRewardModel(nn.Module):
    """A reward model with one label, as `AutoModelForSequenceClassification` makes them."""

    base_model_prefix = "model"

    def __init__(
        self,
        target: str | Sequence[str] | Client | None,
        tokenizer: Any,
        *,
        token_ids: bool = False,
        item: Callable[[str], Item] = Text,
        name: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> None:
        """Connects at the first call, in the process that makes it.

        Args:
            target: Addresses as a `Client` takes them, asked as `Client.patient` does, or a client.
            tokenizer: The one that makes the `input_ids`; trainers that ask for the reward model's tokenizer
                (`reward_processing_classes`) get the same one.
            token_ids: Send the ids as they are, for a server's model that has the same tokenizer; the first call
                checks that. Otherwise they are decoded. A BOS in front is left out, which the server adds where there
                is one, and so is an EOS at the end that its model does not know. Other special tokens, as those of a
                chat template, stay in the text, where the server reads them as such; what its model does not know is
                refused where there is no `item`.
            item: What is scored of a decoded text, without an EOS at its end; default: the text as it is.
                `transcript.turns` reads `Human:` and `Assistant:` markers.
            name: What trainers log the rewards as; default: the model's name.
            options: Those of `Client.score`.
        """
        super().__init__()
        client = target if isinstance(target, Client) else Client.patient(target)
        self.config = PretrainedConfig(name_or_path=name or options.get("model") or "plumb", num_labels=1)
        self.model = _Backbone(client, tokenizer, token_ids, item, options)
        self.score = nn.Identity()

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        """Logits `[rows, 1]` in f32 of ids `[rows, length]`, padded on either side where the mask is 0."""
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(hidden)[:, -1])


class _Backbone(nn.Module):
    """Hidden states `[rows, length, 1]` that are the row's reward at every place: the head takes any of them."""

    def __init__(
        self, client: Client, tokenizer: Any, token_ids: bool, item: Callable[[str], Item], options: Any
    ) -> None:
        super().__init__()
        self.client, self.tokenizer, self.item, self.options = client, tokenizer, item, options
        self.token_ids, self.checked = token_ids, False
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        self.known: dict[int, bool] = {}

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        pad = self.tokenizer.pad_token_id
        whole = torch.ones_like(input_ids) if pad is None else input_ids != pad
        mask = whole if attention_mask is None else attention_mask
        rows = [ids[kept].tolist() for ids, kept in zip(input_ids, mask.bool(), strict=True)]
        if self.token_ids and not self.checked:
            self._check(rows)
        items = [TokenIds(row) if self.token_ids else self.item(self._text(row)) for row in rows]
        rewards = [score.reward for score in self.client.score(items, **self.options)]
        row = torch.tensor(rewards, dtype=torch.float32, device=input_ids.device)
        hidden = row[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))

    def _text(self, row: list[int]) -> str:
        if row and row[0] == self.tokenizer.bos_token_id:
            row = row[1:]
        plain = self.item is Text
        # Turns have their own ends, and another tokenizer's would be words.
        if row and row[-1] == self.tokenizer.eos_token_id and not (plain and self._knows(row[-1])):
            row = row[:-1]
        unknown = [token for token in self.special.intersection(row) if plain and not self._knows(token)]
        if unknown:
            raise ValueError(
                f"the server's model does not know the special token {self._decoded(unknown[:1])!r}: use its tokenizer "
                "and chat template, or say by `item` what the text is"
            )
        return self._decoded(row)

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _knows(self, token: int) -> bool:
        """Whether the server's tokenizer reads a special token as one, too."""
        if token not in self.known:
            [read] = self._tokenize([self._decoded([token])])
            self.known[token] = len(read) == 1 and read[0].special
        return self.known[token]

    def _check(self, rows: list[list[int]]) -> None:
        """Raises unless the server's tokenizer makes the same ids of some texts of these rows."""
        texts = [text for row in rows[:16] if (text := self.tokenizer.decode(row, skip_special_tokens=True))]
        for text, theirs in zip(texts, self._tokenize(texts) if texts else [], strict=True):
            ours = self.tokenizer.encode(text, add_special_tokens=False)
            if [token.id for token in theirs] != ours:
                raise ValueError(f"the server's model has another tokenizer: send texts instead of ids (of {text!r})")
        self.checked = bool(texts)

    def _tokenize(self, texts: list[str]) -> list[tuple[Token, ...]]:
        spec = {key: value for key, value in self.options.items() if key in ("model", "version", "label", "timeout")}
        return self.client.tokenize(texts, add_special_tokens=False, **spec)
