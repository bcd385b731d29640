"""The losses of one batch: what is hidden or left out, decoded in part, or rounded stays the same.

Hardware: CPU, seconds. Run: python -m pytest tests/test_step.py
"""

import pytest
import torch
import torch.nn.functional as F
from test_frozen import gradients, setting  # noqa: F401  (setting is a fixture)

import train
from ltx.lora import LoRALinear
from reference import predict_velocity


def watched(made, monkeypatch):
    """What the model is shown: (tokens, whether there is a mask) of each call."""
    seen = []

    def predict(model, noisy, sigma, positions, context, reference=None, attention_mask=None):
        tokens = noisy.shape[1] + (0 if reference is None else reference.tokens.shape[1])
        seen.append((tokens, attention_mask is not None))
        return predict_velocity(model, noisy, sigma, positions, context, reference,
                                attention_mask=attention_mask)

    terms = train.losses(made.args, made.model, predict, made.frozen, made.clips, made.draws)
    made.model.zero_grad()
    sum(terms).backward()
    grads = [p.grad for p in made.model.parameters() if p.requires_grad]
    return seen, [*terms, *grads]


@pytest.mark.parametrize(("keep", "shown"), [
    ([True, True], (64, False)), ([True, False], (64, True)), ([False, False], (48, False))])
def test_nothing_is_masked_unless_the_batch_is_mixed_and_the_numbers_are_those_of_a_mask(
        setting, monkeypatch, keep, shown):  # noqa: F811
    made = setting("--precision", "fp32")
    made.draws.keep_ref[:] = torch.tensor(keep)
    made.draws.frame[~made.draws.keep_ref] = -1
    found = {}
    for made.args.compile in (False, True):  # a compiled model gets one shape: always a mask
        seen, found[made.args.compile] = watched(made, monkeypatch)
        assert seen == [(64, True) if made.args.compile else shown]
    worst = max(((a - b).norm() / b.norm().clamp(min=1e-6)).item()
                for a, b in zip(*found.values(), strict=True))
    assert worst < 1e-4, worst


def test_bf16_weights_stay_as_near_to_float32_as_autocast_was(setting, monkeypatch):  # noqa: F811
    """Gradients of a LoRA on the bundled base, all as one vector; relative. The way before: the
    same bf16 base with float32 adapters and VAE, under autocast. Measured: 0.009 both."""
    found = {}
    for precision in ("fp32", "bf16"):
        found[precision] = flat(gradients(setting("--precision", precision)))

    def layers(self: LoRALinear, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    monkeypatch.setattr(LoRALinear, "forward", layers)
    made = setting("--precision", "fp32")
    assert (flat(gradients(made)) - found["fp32"]).norm() < 1e-5 * found["fp32"].norm()
    made = setting("--precision", "bf16")
    made.frozen.vae.float()
    monkeypatch.setattr(train, "mixed_precision", lambda *_: torch.autocast("cpu", torch.bfloat16))
    found["autocast"] = flat(gradients(made))
    apart = {name: ((g - found["fp32"]).norm() / found["fp32"].norm()).item()
             for name, g in found.items()}
    print(apart)
    assert apart["bf16"] < 1.2 * apart["autocast"] < 0.1, apart


def flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in named.values()])
