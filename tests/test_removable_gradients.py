"""What is left of a frozen norm: values and gradients against the definition and against small steps."""

import pytest
import torch
from removable_models import EOT, KINDS, exact, log_probs, make_plain, make_tokens, measured, same

from lnfree_interp.finetune.modules import RemovableReader
from lnfree_interp.finetune.removable import collect_std, freeze, removal_sites, update_averages

of_every_kind = pytest.mark.parametrize("kind", KINDS)


def norms_and_readers(model):
    """Each norm that has readers of its own kind, and those."""
    readers = [m for m in model.modules() if isinstance(m, RemovableReader)]
    return {norm: [r for r in readers if r.reads[0] is norm] for norm in {r.reads[0]: None for r in readers}}


def by_definition(norm, reader, x, tokens):
    """What a reader gives, by the definition, in operations that autograd knows: (x - mean) / std * gamma + beta, W."""
    centred = x - x.mean(-1, keepdim=True) if norm.centres else x
    own = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    out = torch.empty(*x.shape[:2], len(reader.matrix), dtype=x.dtype)
    parts = reader.split(torch.arange(len(reader.matrix), dtype=torch.float64))
    for site, rows in zip(reader.reads[1], parts, strict=True):
        std = own
        if site.frozen:
            ordinary, at0, massive = site.average
            std = torch.full_like(own, ordinary.item())
            if site.massive and massive.isfinite():
                std = torch.where(own > site.classes.massive * ordinary, massive, std)
            if site.position0:
                std[:, 0] = at0
            if site.eot:
                std[tokens == EOT] = at0
        normed = centred / std * norm.weight + (0 if norm.bias is None else norm.bias)
        rows = rows.flatten().long()
        out[..., rows] = normed @ reader.matrix[rows].T + (0 if reader.bias is None else reader.bias[rows])
    return out


def measured_twice(model, tokens):
    """From the second step on massive tokens have an average."""
    measured(model, tokens, massive=1.2)
    with exact():
        model.train()(tokens)
    collect_std(model)
    update_averages(model)
    return model.eval()


TREATED = {"untreated": {}, "position 0": {"position0": True}, "eot": {"eot": True}}
TREATED |= {"all": {"position0": True, "eot": True, "massive": True}}


@of_every_kind
@pytest.mark.parametrize("treated", TREATED)
@pytest.mark.parametrize("frozen", [("qk",), ("v", "ln_2"), ("ln_2", "qk", "v", "ln_f")])
def test_gradients_equal_those_of_the_definition(kind, treated, frozen):
    """Of the stream, the weights and biases of readers and of their norm, in fp64."""
    tokens = make_tokens()
    model = measured_twice(make_plain(kind), tokens)
    freeze(model, [name for name in removal_sites(model) if name[0] in frozen], **TREATED[treated])
    log_probs(model, tokens)  # the tokens are known
    found_massive = 0
    for norm, readers in norms_and_readers(model).items():
        site = next(iter(norm.sites.values()))
        x = torch.randn(*tokens.shape, 8, dtype=torch.float64) * site.average[0]
        x[0, 3] *= 3
        x.requires_grad_()
        weights = [*norm.parameters(), *(p for reader in readers for p in reader.parameters())]
        with exact():
            outs = [reader(norm(x)) for reader in readers]
        expected = [by_definition(norm, reader, x, tokens) for reader in readers]
        directions = [torch.randn_like(out) for out in outs]
        found = torch.autograd.grad(outs, [x, *weights], directions)
        theirs = torch.autograd.grad(expected, [x, *weights], directions)
        for a, b in zip((*outs, *found), (*expected, *theirs), strict=True):
            assert a.dtype == b.dtype == torch.float64
            same(a, b)
        found_massive += sum(site.massive and site.average[2].isfinite().item() for site in norm.sites.values())
    assert found_massive > 0 or treated != "all"


@pytest.mark.parametrize("treated", ["untreated", "all"])
@pytest.mark.parametrize("kind", ["GPT-2", "GPT-NeoX", "Llama with biases"])
def test_gradients_are_those_of_small_steps(kind, treated):
    """The first and the second: nothing here has a backward of its own."""
    tokens = make_tokens()[:2, 3:6]
    model = measured_twice(make_plain(kind, num_hidden_layers=1), make_tokens())
    freeze(model, removal_sites(model), **TREATED[treated])
    log_probs(model, tokens)
    for norm, readers in norms_and_readers(model).items():
        x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
        for reader in readers:

            def read(x, *weights, norm=norm, reader=reader):
                return reader(norm(x))

            parts = [reader.weight] if reader.bias is None else [reader.weight, reader.bias]
            assert torch.autograd.gradcheck(read, (x, *norm.parameters(), *parts), fast_mode=True)
            assert torch.autograd.gradgradcheck(read, (x, norm.weight), fast_mode=True)
