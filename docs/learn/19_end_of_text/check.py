"""Against CLIPTextTransformer.pool."""

import torch
from compare import same

from miniclip import CLIPTextConfig, CLIPTextModel


def check(answer) -> None:
    """Both rules; padding with the end token and with 0; an added token with a larger id."""
    hidden, rows = torch.randn(3, 6, 4), torch.arange(3)
    end, added = 98, 99
    plain = torch.tensor([[97, 5, 6, end, end, end], [97, 7, end, end, end, end], [97, 5, 5, 5, 5, end]])
    zeros = torch.tensor([[97, 5, 6, end, 0, 0], [97, 7, end, 0, 0, 0], [97, 5, 5, 5, 5, end]])
    more = torch.tensor([[97, added, 6, end, end, end], [97, 7, end, 0, 0, 0], [97, 5, 5, added, 5, end]])
    for ids, eos in ((plain, 2), (zeros, 2), (plain, end), (zeros, end), (more, end)):
        config = CLIPTextConfig(vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                num_attention_heads=1, max_position_embeddings=6, eos_token_id=eos)
        pool = CLIPTextModel(config).text_model.pool
        last = 5 - (ids == end).int().flip(1).argmax(1)
        same(answer.pool(hidden, ids, eos), pool(hidden, ids), f"with eos = {eos}", 0.0, {
            "that is the last position, which is padding": hidden[:, -1],
            "that is the last end token: the first one counts": hidden[rows, last],
            "an added token has the largest id: look for eos itself": hidden[rows, ids.argmax(1)],
            "eos = 2 stands for the old rule, there is no token 2": hidden[:, 0]})
