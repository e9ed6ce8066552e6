"""Losses along directions equal those of models whose weights were put together by hand; the base comes back."""

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gaintune.adapters import load_adapter, read_record, save_adapter
from gaintune.analysis import LandscapeOptions, Subject, survey_landscape, write_result
from gaintune.analysis.landscape.directions import Geometry, directions, way_of
from gaintune.analysis.landscape.report import result
from gaintune.analysis.landscape.survey import Surface, range_apart
from gaintune.config import EvaluateConfig, MethodConfig, build_plan
from gaintune.errors import AdapterError, BaseModelError, ConfigError, DivergedError
from gaintune.evaluate import compare_adapters
from gaintune.models import load_base
from gaintune.progress import Silent
from gaintune.results import DomainLoss
from support import refused, tiny_adapters, tiny_base, tiny_domains

METHODS = {
    "lora": {"rank": 2, "alpha": 4.0, "targets": ("o_proj",)},
    "dora": {"rank": 2, "alpha": 4.0, "targets": ("o_proj",)},
    "disel": {"rank": 2, "alpha": 4.0, "targets": ("o_proj", "up_proj")},
}
PAIRS = (
    ("gain-ffn", "gain-ffn2"),
    ("gain", "gain-ia3"),
    ("gain", "gain-ffn2"),
    ("lora", "lora2"),
    ("gain-ffn", "lora"),
    ("full", "dora"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base in fp32 with one random adapter of each kind on it, and fully trained weights."""
    folder = tmp_path_factory.mktemp("landscape")
    tiny_base.folder(folder / "base", dtype=torch.float32)
    for name in ("gain", "gain-ffn", "gain-ffn2", "gain-ia3", "lora", "lora2", "dora", "disel", "disel2", "full"):
        make(folder, name)
    return folder


def make(folder, name, **options):
    method = name.rstrip("2")
    config = MethodConfig(name=method, label=method, **METHODS.get(method, {}))
    seed, domain = sum(map(ord, name)), f"{name}-text"
    return tiny_adapters.save(folder / "base", folder / name, config, seed, **{"domain": domain, **options})


def weights_of(base, folder):
    """The weights of the model with an adapter merged into it, by name."""
    model = load_adapter(replace(base, model=copy.deepcopy(base.model)), folder)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return {name: weight.detach().double() for name, weight in model.named_parameters()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_base.blocks()).logits


@pytest.mark.parametrize("names", [("gain",), ("gain-ffn",), ("lora",), ("dora",), ("full",), *PAIRS], ids="+".join)
def test_a_place_is_the_sum_of_weights_and_the_base_comes_back_bit_for_bit(place, names):
    check_places(place, names)


def test_weights_stored_as_in_by_out_are_measured_alike(tmp_path):
    sizes = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    GPT2LMHeadModel(sizes).save_pretrained(tmp_path / "base")
    tiny_base.tokenizer().save_pretrained(tmp_path / "base")
    for name in ("gain-ffn", "gain-ffn2", "gain-ia3"):
        make(tmp_path, name)
    check_places(tmp_path, ["gain-ffn", "gain-ffn2"])
    check_places(tmp_path, ["gain-ffn", "gain-ia3"])


def check_places(place, names):
    """Compare logits, lengths and angles at some places with those of weights summed by hand in float64."""
    base = load_base(str(place / "base"), dtype=torch.float32)
    kept = {name: weight.detach().clone() for name, weight in base.model.named_parameters()}
    flags = [weight.requires_grad for weight in base.model.parameters()]
    before = logits(base.model)
    merged = [weights_of(base, place / name) for name in names]
    by_hand = copy.deepcopy(base.model).double()
    own = {name: weight.detach().clone() for name, weight in by_hand.named_parameters()}
    with directions(base, [place / name for name in names]) as moving:
        for spot in ([0.3, -0.7], [1.0, 0.0], [0.0, 0.0], [1.25, 1.0]):
            spot = spot[: len(names)]
            moving.move(spot)
            with torch.no_grad():
                for name, weight in by_hand.named_parameters():
                    weight.copy_(own[name] + sum(t * (m[name] - own[name]) for t, m in zip(spot, merged, strict=True)))
            assert torch.allclose(logits(moving.model).double(), logits(by_hand), rtol=1e-4, atol=1e-4)
            assert torch.equal(logits(moving.model), before) == (not any(spot))
        moving.move([0.5] * len(names))
        geometry = moving.geometry()
    found = {name: weight.detach() for name, weight in base.model.named_parameters()}
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
    assert [weight.requires_grad for weight in base.model.parameters()] == flags
    assert torch.equal(logits(base.model), before)
    deltas = [torch.cat([(each[name] - own[name]).flatten() for name in own]) for each in merged]
    assert geometry.lengths == pytest.approx([delta.norm().item() for delta in deltas], rel=1e-5)
    touched = [name for name in own if any(not torch.equal(each[name], own[name]) for each in merged)]
    assert geometry.base_length == pytest.approx(math.sqrt(sum(float(own[name].square().sum()) for name in touched)))
    if len(names) == 2:
        assert geometry.cosine == pytest.approx(F.cosine_similarity(*deltas, dim=0).item(), abs=1e-6)
    else:
        assert geometry.cosine is None
    gains = all(name.startswith("gain") for name in names)
    assert (geometry.parameter_cosine is not None) == (gains and len(names) == 2)


def opened_update(folder):
    """`(alpha / r) B A` of all modules of a saved adapter with alpha = 2 r, as one vector."""
    saved = load_file(folder / "adapter_model.safetensors")
    names = sorted(name for name in saved if "lora_A" in name)
    pairs = [(saved[name.replace("lora_A", "lora_B")].double(), saved[name].double()) for name in names]
    return torch.cat([2 * (b @ a).flatten() for b, a in pairs])


def test_gated_updates_are_scaled_with_their_gates_as_they_are(place):
    base = load_base(str(place / "base"), dtype=torch.float32)
    before = logits(base.model)
    by_hand = load_adapter(load_base(str(place / "base"), dtype=torch.float32), place / "disel")
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.4)
    with directions(base, [place / "disel"]) as moving:
        moving.move([0.4])
        assert torch.allclose(logits(moving.model), logits(by_hand), rtol=1e-4, atol=1e-4)
        moving.move([0.0])
        assert torch.equal(logits(moving.model), before)
    assert torch.equal(logits(base.model), before)
    with directions(base, [place / "disel", place / "disel2"]) as moving:
        moving.move([0.4, 0.0])
        assert torch.allclose(logits(moving.model), logits(by_hand), rtol=1e-4, atol=1e-4)
        geometry = moving.geometry()
    updates = [opened_update(place / name) for name in ("disel", "disel2")]
    assert geometry.cosine == pytest.approx(F.cosine_similarity(*updates, dim=0).item(), abs=1e-6)
    assert geometry.lengths == pytest.approx([update.norm().item() for update in updates], rel=1e-5)


def test_what_spans_no_plane_is_refused(place, tmp_path):
    branches = tiny_adapters.save(place / "base", tmp_path / "branches", MethodConfig(name="gainlora"))
    refused(AdapterError, "of type GAINLORA has no weights to merge", way_of, [branches])
    refused(ConfigError, r"disel has gates.*spans no plane", way_of, [place / "lora", place / "disel"])
    assert way_of([place / "gain", place / "lora"]) == "weights"
    base = load_base(str(place / "base"), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="interpolated in fp32"), directions(base, [place / "full"]):
        pass
    refused(AdapterError, "no such adapter folder", way_of, [place / "missing"])


def test_weights_that_did_not_move_are_no_direction(place, tmp_path):
    dora = MethodConfig(name="dora", **METHODS["dora"])
    still = tiny_adapters.save(place / "base", tmp_path / "still", dora, scale=0)
    base = load_base(str(place / "base"), dtype=torch.float32)
    with pytest.raises(AdapterError, match="changes no weight"), directions(base, [still]):
        pass


@pytest.fixture(scope="module")
def plan(place):
    return build_plan(tiny_domains.plan(place / "base", place, model={"dtype": "bf16"}))


def test_lines_and_a_plane_are_measured_and_summed_up(place, plan):
    adapters = [place / "gain-ffn", place / "gain-ffn2"]
    found = survey_landscape(plan, adapters, LandscapeOptions(plane=True, line=[0.5, -0.25], grid=[0.5]))
    first, _ = found.lines
    assert list(first.points) == [(-0.25,), (0.0,), (0.5,), (1.0,)]
    assert found.plane is not None and len(found.plane.points) == 9
    for domain in ("prose", "code"):
        for t in (0.0, 0.5, 1.0):
            assert first.points[t,][domain] == found.plane.points[t, 0.0][domain]
        start, middle, end = (first.points[t,][domain].nats_per_token for t in (0, 0.5, 1))
        figures = first.figures(domain)
        assert figures.range.value == pytest.approx(max(start, middle, end) - min(start, middle, end))
        assert figures.barrier.value == pytest.approx(max(0.0, middle - (start + end) / 2))
        assert figures.at_adapted[0].value == pytest.approx(100 * (math.exp(end - start) - 1))
        assert first.change((0.0,), domain).value == 0.0
        assert len(found.plane.figures(domain).at_adapted) == 3 and found.plane.figures(domain).barrier is None
        assert 0.0 <= figures.range.low < figures.range.value < figures.range.high
        assert figures.barrier.low <= figures.barrier.value <= figures.barrier.high
    assert found.provenance.adapters["gain-ffn on gain-ffn-text"].method == "gain-ffn"
    assert set(found.provenance.texts) == {"prose", "code"}
    small = LandscapeOptions(plane=True, line=[0], grid=[0])
    mixed = survey_landscape(plan, [place / "dora", place / "gain-ffn"], small)
    assert [line.way for line in mixed.lines] == ["weights", "gains"]
    assert [line.precision for line in mixed.lines] == ["float32", "bfloat16"]
    assert mixed.plane is not None and (mixed.plane.way, mixed.plane.precision) == ("weights", "float32")
    for domain in ("prose", "code"):
        assert mixed.lines[1].points[1.0,][domain] == first.points[1.0,][domain]
        assert mixed.plane.points[1.0, 0.0][domain] == mixed.lines[0].points[1.0,][domain]
    apart = survey_landscape(plan, adapters, LandscapeOptions(line=[0], plane=True, grid=[0.5]))
    for domain in ("prose", "code"):  # at positions that only the plane has here
        assert apart.plane.points[0.5, 0.0][domain] == first.points[0.5,][domain]
    plane = LandscapeOptions(plane=True)
    refused(ConfigError, "spanned by two adapters, not by 1", survey_landscape, plan, adapters[:1], plane)


def test_places_that_lines_and_their_plane_share_are_measured_once(place, plan):
    titles = []

    class Listening(Silent):
        def task(self, title, total, unit):
            titles.append(title)
            return super().task(title, total, unit)

    options = LandscapeOptions(plane=True, line=[0.5], grid=[0.5])
    survey_landscape(plan, [place / "lora", place / "lora2"], options, progress=Listening())
    places = [title for title in titles if "prose at" in title]
    assert len(places) == len(set(places)) == 3 + 2 + 4  # of 3 + 3 + 9: not the base again, nor the plane's two edges


def test_broken_weights_of_a_base_and_of_an_adapter_have_messages_of_their_own(place, plan, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], math.inf)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base = plan.model_copy(update={"model": plan.model.model_copy(update={"name": str(tmp_path / "base")})})
    message, adapters = r"the base's own loss on \w+ is not finite in bfloat16", [place / "gain-ffn"]
    options = LandscapeOptions(line=[0.5])
    refused(BaseModelError, message, survey_landscape, base, adapters, options, allow_other_base=True)
    refused(BaseModelError, message, compare_adapters, base, adapters, allow_other_base=True)
    model = load_adapter(load_base(str(place / "base")), place / "gain-ffn", trainable=True)
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad).fill_(3e38)  # overflows in bf16
    save_adapter(model, tmp_path / "gain-ffn", read_record(place / "gain-ffn"))
    advice = "If it was just trained, lower the learning rate"
    refused(DivergedError, advice, compare_adapters, plan, [tmp_path / "gain-ffn"])
    refused(ConfigError, "an adapter cannot be called 'base'", compare_adapters, plan, [Path("base")])


def test_steps_that_16_bits_round_away_are_reported_and_an_earlier_plane_is_removed(place, plan, tmp_path, caplog):
    adapters = [place / "gain-ffn", place / "gain-ffn2"]

    def write(**options):
        found = survey_landscape(plan, adapters, LandscapeOptions(**options))
        write_result("landscape", result(found, Subject()), tmp_path)

    write(plane=True, line=[1e-6, 0.5], grid=[0])
    assert caplog.text.count("at 1e-06 every loss is the pretrained model's to the last bit, as bfloat16 rounds") == 2
    assert (tmp_path / "landscape-plane.png").exists()
    write(line=[0.5])
    assert (tmp_path / "landscape-lines.png").exists() and not list(tmp_path.glob("landscape-plane.*"))


def surface(places, nats):
    """What was seen at some places, nats a token on blocks of 100 tokens, `(places, blocks)`."""
    tokens = (100,) * nats.shape[1]
    losses = ({"d": DomainLoss(tuple(100 * row), tokens, tokens)} for row in nats)
    points = dict(zip(places, losses, strict=True))
    labels = ("one", "other")[: len(places[0])]
    return Surface(labels, "gains", "float32", Geometry((1.0,), 1.0), points, EvaluateConfig(bootstrap_samples=400))


def noisy_line(heights, generator):
    """A line that rises so in the mean over all text, seen on 8 blocks of it."""
    noise = np.array([[0.0], [1.0], [1.0]]) * generator.normal(0, 0.1, (3, 8))
    return surface([(0.0,), (0.5,), (1.0,)], 3.0 + np.array(heights)[:, None] + noise)


def flat_plane(noise, blocks, generator):
    """A plane that rises nowhere in the mean over all text, seen on some blocks that rise along both directions."""
    slopes = generator.normal(0, noise, (2, blocks))
    places = [(t, u) for t in (0.0, 0.5, 1.0) for u in (0.0, 0.5, 1.0)]
    return surface(places, np.array([3.0 + t * slopes[0] + u * slopes[1] for t, u in places]))


def steep_and_flat(generator):
    return noisy_line((0.0, 0.2, 0.5), generator), noisy_line((0.0, -0.1, -0.3), generator)


def test_the_difference_of_two_ranges_is_paired():
    steep, flat = steep_and_flat(np.random.default_rng(12))
    apart, other = range_apart(steep, flat, "d"), range_apart(flat, steep, "d")
    assert apart.value == pytest.approx(steep.figures("d").range.value - flat.figures("d").range.value)
    assert (other.value, other.low, other.high) == pytest.approx((-apart.value, -apart.high, -apart.low))
    same = range_apart(steep, steep, "d")
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_the_difference_of_two_ranges_is_covered():
    generator, held = np.random.default_rng(12), 0
    for _ in range(300):
        apart = range_apart(*steep_and_flat(generator), "d")
        held += apart.low <= 0.2 <= apart.high
    assert 0.93 < held / 300 < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [4, 8])
def test_of_two_flat_planes_the_noisier_one_is_seldom_called_wider(blocks):
    generator, wider = np.random.default_rng(13), 0
    for _ in range(600):
        apart = range_apart(flat_plane(0.2, blocks, generator), flat_plane(0.02, blocks, generator), "d")
        wider += apart.low > 0
    assert wider / 600 < 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("bump", "seen"), [(0.0, 0.02), (0.3, 0.98)])
def test_a_barrier_is_as_uncertain_as_its_blocks(bump, seen):
    """Lines that rise by `bump` half-way in the mean over all text: a flat one seldom shows a barrier, a hill does."""
    generator, held, above = np.random.default_rng(11), 0, 0
    for _ in range(400):
        found = noisy_line((0.0, bump, 0.0), generator).figures("d")
        held += found.barrier.low <= bump <= found.barrier.high
        above += found.barrier.low > 0
    assert held / 400 > 0.92 and abs(above / 400 - seen) < 0.03
