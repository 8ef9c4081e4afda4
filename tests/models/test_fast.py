"""Fast bodies against the stock layers they stand for: the same logits, whatever the chunking, batch and codes."""

from functools import cache

import pytest
import torch

from tests.tiny_models import FAMILIES, LLAMA3_ROPE, tiny_model, tokens, write_gguf
from turbomoe.config import EngineSettings, KVSettings
from turbomoe.engine.runner import ModelRunner
from turbomoe.errors import SettingsError
from turbomoe.experts.base import Phase
from turbomoe.models import load_model
from turbomoe.models.fast import BODIES, make_body

COVERED = [family for family in FAMILIES if family in BODIES]
EXACT = KVSettings("f32", "f32")
# One chunk is longer than DeltaNet's 64, others end inside it; the last feeds token by token from the start.
CHUNKS = {"one": [130], "many": [37] * 3 + [19], "mixed": [70] + [1] * 10 + [50], "single": [1] * 70}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(stock, fast) of a family, each with weights of its own: merging must not be what makes them equal."""

    @cache
    def pair(family):
        path = write_gguf(tiny_model(family), tmp_path_factory.mktemp(family) / "model.gguf")
        return tuple(load_model(path, EngineSettings(dtype="float32", body=body)) for body in ("stock", "auto"))

    return pair


def run(model, kv, ids, chunks, slots=(0,), means=None):
    """Logits of all tokens of ids [B, S] fed in chunks, and the memory afterwards."""
    runner = ModelRunner(model, kv, slots=max(slots) + 1, ctx_size=ids.shape[1], means=means)
    return feed(runner, ids, chunks, slots), runner.memory


def feed(runner, ids, chunks, slots):
    outs = []
    for part in ids.split(chunks, 1):
        phase = Phase.DECODE if part.shape[1] == 1 else Phase.PREFILL
        outs.append(runner.forward(list(slots), part, phase, keep=0))
    runner.memory.check_integrity()
    return torch.cat(outs, 1)


def assert_close(got, want, noise=0.0):
    """Float32 arithmetic in another order: 1e-5 of the largest value, or three times what stock's own order moves."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= max(1e-5 * want.abs().max(), 3 * noise)


def test_every_family_but_gemma_has_a_body(models):
    assert set(FAMILIES) - set(COVERED) == {"gemma3"}
    assert models("gemma3")[1].body is None
    for family in COVERED:
        stock, fast = models(family)
        assert stock.body is None and type(fast.body) is BODIES[family]


@pytest.fixture(scope="module")
def stock_logits(models):
    """Stock logits of (family, name of chunking), and how far chunking alone moves them."""

    @cache
    def by_stock(family, chunks):
        return run(models(family)[0], EXACT, tokens(sum(CHUNKS[chunks])), CHUNKS[chunks])[0]

    @cache
    def noise(family):
        return max((by_stock(family, c) - by_stock(family, "one")).abs().max() for c in ("many", "mixed"))

    return by_stock, noise


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_logits_equal_stock(models, stock_logits, family, chunks):
    by_stock, noise = stock_logits
    got, _ = run(models(family)[1], EXACT, tokens(sum(CHUNKS[chunks])), CHUNKS[chunks])
    assert noise(family) < 2e-5 * got.abs().max(), "too noisy to tell anything"
    assert_close(got, by_stock(family, chunks), noise(family))


@pytest.mark.parametrize("family", COVERED)
def test_a_batch_of_unequal_lengths_equals_stock(models, family):
    prompts, slots = [tokens(n, seed=n) for n in (5, 30, 81)], [3, 0, 2]
    logits = []
    for model in models(family):
        runner = ModelRunner(model, EXACT, slots=4, ctx_size=100)
        firsts = [feed(runner, ids, [ids.shape[1]], [slot]) for ids, slot in zip(prompts, slots, strict=True)]
        batch = [feed(runner, tokens(8, seed=step, batch=3), [1, 1, 6], slots) for step in range(2)]
        logits.append([*firsts, *batch])
    for want, got in zip(*logits, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.parametrize("chunks", ["one", "mixed", "single"])
def test_logits_over_codes_equal_stock(models, family, chunks):
    """A value near the border between two codes may fall on either side, so one or two may differ, not more."""
    stock, fast = models(family)
    kv, ids = KVSettings("tq3", "tq3", 4, 8), tokens(60)
    sizes = {"one": [60], "mixed": [20] + [1] * 20 + [20], "single": [1] * 60}[chunks]
    want, theirs = run(stock, kv, ids, sizes)
    got, ours = run(fast, kv, ids, sizes)
    differ = sum(
        int((a != b).sum())
        for layer in ours.attention
        for side, other in zip(ours.attention[layer], theirs.attention[layer], strict=True)
        for a, b in zip(side.planes, other.planes, strict=True)
    )
    assert differ <= 2
    exact, _ = run(fast, EXACT, ids, sizes)
    assert (got - want).abs().mean() < 0.05 * (exact - want).abs().mean()


@pytest.mark.parametrize("family", COVERED)
def test_states_and_keys_are_stored_where_stock_stores_them(models, family):
    """A sequence begun by one can be continued by the other."""
    stock, fast = models(family)
    ids = tokens(90)
    want, _ = run(stock, EXACT, ids, [50, 40])
    for first, second in ((stock, fast), (fast, stock)):
        runner = ModelRunner(first, EXACT, slots=2, ctx_size=90)
        start = feed(runner, ids[:, :50], [49, 1], [1])
        runner.model = second
        assert_close(torch.cat((start, feed(runner, ids[:, 50:], [1, 39], [1])), 1), want)


def test_merging_keeps_the_shell_whole_and_copies_nothing(models):
    stock, fast = models("qwen2")
    for (name, want), (_, got) in zip(stock.shell.named_parameters(), fast.shell.named_parameters(), strict=True):
        assert torch.equal(got, want), name
    attention = fast.shell.model.layers[0].self_attn
    storages = {getattr(attention, f"{x}_proj").weight.untyped_storage().data_ptr() for x in "qkv"}
    assert len(storages) == 1
    assert sum(p.nbytes for p in fast.shell.parameters()) == fast.weight_bytes


@pytest.mark.parametrize(
    "family,changes",
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3moe", {"norm_topk_prob": False}),
        ("qwen3moe", {"mlp_only_layers": [1]}),
        ("qwen35", {"linear_num_value_heads": 2}),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0}}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 9,
                   "use_sliding_window": True}),
    ],
)  # fmt: skip
def test_variants_of_a_family_equal_a_plain_forward_pass(family, changes):
    """Straight from a transformers model, with its own experts and its own attention as the judge."""
    from turbomoe.kv.cache import KVCache
    from turbomoe.models.shapes import layer_shapes
    from turbomoe.upstream.forward import forward

    model = tiny_model(family, **changes)
    ids, shapes = tokens(80), layer_shapes(model.config)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        body = make_body(family, model, shapes)
        memory, outs = KVCache(shapes, EXACT, slots=1, ctx_size=80), []
        for part in ids.split([70, 1, 9], 1):
            memory.begin([0], part.shape[1])
            outs.append(forward(model, part, memory, 0, body))
            memory.commit()
    # Windows keep bfloat16 for sliding layers; everything else is float32 throughout.
    tolerance = 2e-2 if "sliding_window" in changes else 1e-5
    assert (torch.cat(outs, 1) - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "dynamic"}}])
def test_what_no_body_computes_is_left_to_stock(changes):
    rope = changes.get("rope_parameters")
    if rope is not None:
        changes = {"rope_parameters": rope | {"rope_theta": 5e3, "factor": 2.0}}
    model = tiny_model("llama", **changes)
    assert make_body("llama", model, ()) is None
    assert make_body("mystery", model, ()) is None


def test_the_switch_is_checked():
    with pytest.raises(SettingsError, match="auto or stock"):
        EngineSettings(body="quick")


@pytest.mark.parametrize("family", ["llama", "qwen35moe"])
def test_numbers_of_one_sequence_stay_its_own(models, family):
    """In-place states: a neighbour's rows are not touched while another sequence runs alone."""
    _, fast = models(family)
    runner = ModelRunner(fast, EXACT, slots=2, ctx_size=40)
    feed(runner, tokens(20, seed=3), [20], [0])
    before = {i: (s.conv[0].clone(), s.state[0].clone()) for i, s in runner.memory.recurrent.items()}
    want = feed(ModelRunner(fast, EXACT, slots=2, ctx_size=40), tokens(30, seed=4), [29, 1], [1])
    assert torch.equal(feed(runner, tokens(30, seed=4), [29, 1], [1]), want)
    for i, (conv, state) in before.items():
        assert torch.equal(runner.memory.recurrent[i].conv[0], conv)
        assert torch.equal(runner.memory.recurrent[i].state[0], state)
        assert state.abs().sum() > 0


@cache
def smollm2(body):
    from tests.real_models import smollm2 as locate

    return load_model(locate(), EngineSettings(dtype="float32", body=body))


def greedy(model, kv, prompt, count):
    runner = ModelRunner(model, kv, slots=1, ctx_size=len(prompt) + count)
    out = [int(runner.forward([0], torch.tensor([prompt]), Phase.PREFILL)[0, -1].argmax())]
    while len(out) < count:
        out.append(int(runner.forward([0], torch.tensor([out[-1:]]), Phase.DECODE)[0, -1].argmax()))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kv", [EXACT, KVSettings("tq4", "tq4", 8, 16)], ids=["f32", "tq4"])
def test_smollm2_says_the_same(kv):
    prompt = smollm2("stock").tokenizer("The history of the steam engine begins with")["input_ids"]
    want = greedy(smollm2("stock"), kv, prompt, 16)
    assert greedy(smollm2("auto"), kv, prompt, 16) == want
    assert len(set(want)) > 8
