"""The LLaMA models of the low-rank papers, as names and shapes: modules without a forward."""

from torch import nn

# width, width of the feed-forward part, layers; vocabulary 32000
SIZES = {
    "60M": (512, 1376, 8),
    "130M": (768, 2048, 12),
    "350M": (1024, 2736, 24),
    "1B": (2048, 5461, 24),
    "7B": (4096, 11008, 32),
}


class Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(d, 1).weight.detach()[0])


def linear(d, out):
    return nn.Linear(d, out, bias=False)


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q_proj, self.k_proj = linear(d, d), linear(d, d)
        self.v_proj, self.o_proj = linear(d, d), linear(d, d)


class Mlp(nn.Module):
    def __init__(self, d, ffn):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(d, ffn),
            linear(d, ffn),
            linear(ffn, d),
        )


class Layer(nn.Module):
    def __init__(self, d, ffn):
        super().__init__()
        self.self_attn, self.mlp = Attention(d), Mlp(d, ffn)
        self.input_layernorm, self.post_attention_layernorm = Norm(d), Norm(d)


class Body(nn.Module):
    def __init__(self, d, ffn, layers, vocabulary):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(Layer(d, ffn) for _ in range(layers))
        self.norm = Norm(d)


class Llama(nn.Module):
    def __init__(self, d, ffn, layers, vocabulary=32000):
        super().__init__()
        self.model = Body(d, ffn, layers, vocabulary)
        self.lm_head = linear(d, vocabulary)
