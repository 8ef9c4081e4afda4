"""The words of docs/kv-quality.md, beside which kv_quality_document.py sets the figures."""

HEAD = """\
# What the KV codes cost in fidelity

Printed by `python benchmarks/kv_quality.py write` from the measurements in `benchmarks/results/kv_quality/`; how each
was made stands at the head of `kv_quality.py`, `kv_peers.py` and `kv_needles.py` in `benchmarks/`. To judge your own
model and text: `turbomoe eval -m MODEL --text FILE --kv tcq3 --kv tcq2.5/tcq2`.

- A setting is `keys/values sinks/recent`: the first and the last tokens are kept exact, everything between is stored in
  codes. `tq3` is 3-bit TurboQuant (Lloyd-Max levels after a random Hadamard rotation, one matched scale a vector),
  `tcq3` codes the same vector along a tail-biting trellis, in as many bits.
- KL is the divergence of the next-token distribution from the bf16 cache's, in nats a token; "same top" how often the
  likeliest token stays the same. The noise floor is an exact float32 cache against bf16: rounding alone does that. A KL
  near it says nothing. KL grows with the context, so compare rows of one table, not tables of different lengths.
- Bits per value count everything that is allocated for a cache of this length: codes, scales, page padding, exact
  windows. At a few thousand tokens the windows weigh much; codes alone are 0.25 bits above their name at head size 64
  and 0.06 at 256. Sliding-window layers (Gemma 3) stay exact and are left out of the rate.
- llama.cpp's rows count its blocks alone (its caches have no windows). Its weights and activations are packed; its own
  noise floor, a bf16 cache against f16, stands beside them. It stores sliding-window layers in the same type."""

LONG = """\
## Long contexts, and needles

The arithmetic is the one of `turbomoe run` where needles are asked for. A needle is a sentence such as "The access code
for Lisbon is 12025.", one of twenty at even depths of the text; it is found when the model, asked after the whole text,
answers with these digits, greedily. KL is over the whole text."""

FOOT = """\
## How to read this

- **Windows** count most on SmolLM2: compare the rows `0/0` with `64/256`. On Qwen2.5 means and scales count far more.
  A window is a fixed number of tokens, so the longer the context, the less it weighs in bits.
- **Means and key scales** are what keeps models with large biases in their keys (Qwen2.5) or a few large channels
  (Gemma 3): the rows "no means" have neither, the rows "no scales" have means that turn with the page and nothing else.
- **The trellis** is worth nearly half a bit at 3 bits: `tcq2.5` stands near `tq3`, with 5 to
  28% more KL over 4,096 tokens.
- **Perplexity is no verdict**: on Qwen2.5 it falls as codes get coarser, and so do the chances of the right answers.
- **A small mean KL does not find every needle**: what `auto` picks was judged at 2,048 tokens. Where single facts of a
  long text matter, say `-ctk tcq4 -ctv tcq4`, or `tcq3` for less memory, and compare in the table of needles.
  Differences of two or three needles are chance: codes of equal error and equal KL, by another codebook, had found 16
  where 18 are found now, and 13 where 16 are.
- **Keys or values first?** Compare pairs of equal bits; where in doubt leave it to `auto`."""

AUTO = """\
## What `auto` chooses

[kv-auto.md](kv-auto.md) says how. Do not compare these figures with those above: they come from other, shorter parts
of the book, the arithmetic is that of `turbomoe run` (packed weights, activations in 8 bits), and only positions
behind the exact windows count. "Held out" is another part again."""
